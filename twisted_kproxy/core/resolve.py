"""
One Service, its slices and the node → the service ports that it means here.

Port identity and endpoint rules follow kubernetes ``pkg/proxy/serviceport.go`` and ``endpointslicecache.go``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from . import wire
from .addresses import BadAddress, canonical, contains, familyOf, isMapped, joined, network, unusable
from .topology import Candidate, NodeFacts, categorize
from .values import FAMILIES, Family, Frontend, FrontendKind, PoolKind, Problem, Protocol, ServicePort, ServicePortName

DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400
#: problems of one Service and its slices that are told one by one
MOST_PROBLEMS = 20
_PROTOCOLS: dict[str, Protocol] = {"TCP": "TCP", "UDP": "UDP", "SCTP": "SCTP"}


class Resolved(Struct, frozen=True):
    """
    What a Service means here.

    :ivar problems: what of it (or of its slices) is not served, and why.
    :ivar refusedFrontends: how many of its addresses must not be reached, and are not served.
    :ivar refusedEndpoints: the same for endpoints.
    """

    ports: tuple[ServicePort, ...] = ()
    problems: tuple[Problem, ...] = ()
    refusedFrontends: int = 0
    refusedEndpoints: int = 0


NOTHING = Resolved()


def concerns(service: wire.Service, proxyName: str = "") -> bool:
    """
    Whether a Service is for a service proxy at all, and for one of that name (KEP-2447).

    ExternalName is a matter for DNS; a headless Service has no address to capture, and one that is labelled as headless
    is to be treated as such (kubernetes ``cmd/kube-proxy/app/server.go``).
    """
    if wire.HEADLESS_LABEL in (service.metadata.labels or {}):
        return False
    if (service.metadata.label(wire.PROXY_NAME_LABEL) or "") != proxyName:
        return False
    if proxyName == "" and wire.PROXY_NAME_LABEL in (service.metadata.labels or {}):
        return False
    spec = service.spec
    return spec is not None and spec.type != "ExternalName" and spec.clusterIP not in (None, "", "None")


def serviceOf(it: wire.EndpointSlice) -> tuple[str, str] | None:
    """
    The namespace and name of the Service that a slice belongs to; ``None`` where it belongs to none, or to a
    headless one.
    """
    name = it.metadata.label(wire.SERVICE_NAME_LABEL)
    if not name or wire.HEADLESS_LABEL in (it.metadata.labels or {}):
        return None
    return it.metadata.namespace or "", name


def slicesOf(endpoints: wire.Endpoints) -> list[wire.EndpointSlice]:
    """Legacy Endpoints as the slices that mean the same: one per subset and family."""
    meta = endpoints.metadata
    labels = dict(meta.labels or {})
    labels[wire.SERVICE_NAME_LABEL] = meta.name
    slices = []
    for number, subset in enumerate(endpoints.subsets or ()):
        ports = [wire.SlicePort(p.name or "", p.port, p.protocol) for p in subset.ports or ()]
        for family in FAMILIES:
            members = [
                wire.SliceEndpoint(
                    addresses=[address.ip],
                    conditions=wire.EndpointConditions(ready=ready),
                    nodeName=address.nodeName,
                )
                for ready, addresses in ((True, subset.addresses), (False, subset.notReadyAddresses))
                for address in addresses or ()
                if address.ip and _isFamily(address.ip, family)
            ]
            if members:
                name = f"{meta.name} (Endpoints, subset {number})"
                named = wire.ObjectMeta(name=name, namespace=meta.namespace, labels=labels)
                slices.append(wire.EndpointSlice(named, family, members, ports))
    return slices


def _isFamily(address: str, family: Family) -> bool:
    try:
        return canonical(address)[1] == family
    except BadAddress:
        return family == "IPv4"  # kept so that the resolver names it as a problem, once


def resolve(service: wire.Service, slices: Iterable[wire.EndpointSlice], node: NodeFacts) -> Resolved:
    """
    Resolve one Service that :func:`concerns` this proxy. The order of ``slices`` does not matter. Bad parts are left
    out one by one, each with a :class:`~twisted_kproxy.core.values.Problem`; nothing raises.
    """
    return _Resolver(service, slices, node).run()


class _Resolver:
    def __init__(self, service: wire.Service, slices: Iterable[wire.EndpointSlice], node: NodeFacts) -> None:
        assert service.spec is not None
        self.meta = service.metadata
        self.spec = service.spec
        self.status = service.status
        self.node = node
        self.slices = sorted(slices, key=lambda it: it.metadata.name)
        self.key = wire.keyOf(self.meta)
        self.problems: dict[Problem, None] = {}  # for its order
        self.more = 0
        self.refusedFrontends: set[str] = set()
        self.refusedEndpoints: set[str] = set()

    def run(self) -> Resolved:
        ports: list[ServicePort] = []
        specs = list(self._ports())
        affinity = self._affinity()
        isLoadBalancer = self.spec.type == "LoadBalancer" and self.spec.externalTrafficPolicy == "Local"
        healthCheckPort = self._healthCheckPort() if isLoadBalancer else 0
        byFamily = self._addresses()
        ranges = self._sourceRanges()
        for family in FAMILIES:
            addresses = byFamily.get(family)
            if not addresses:
                continue
            for number, (name, protocol, spec) in enumerate(specs):
                pools = categorize(self._candidates(name, protocol, family), self.node)
                ports.append(
                    ServicePort(
                        name=ServicePortName(self.meta.namespace or "", self.meta.name, name, protocol, family),
                        uid=self.meta.uid or "",
                        frontends=tuple(self._frontends(addresses, spec, protocol, ranges.get(family))),
                        cluster=pools.cluster,
                        local=pools.local,
                        reachable=pools.reachable,
                        affinitySeconds=affinity,
                        healthCheckPort=0 if number else healthCheckPort,
                        localReady=pools.localReady,
                        serving=pools.serving if protocol == "UDP" else frozenset(),
                    )
                )
        if self.more:
            self.problems[Problem("Service", self.key, f"and {self.more} more that are like these")] = None
        return Resolved(
            tuple(ports), tuple(self.problems), len(self.refusedFrontends), len(self.refusedEndpoints)
        )

    def _problem(self, reason: str, refused: str = "") -> None:
        """:param refused: the address or port that must not be reached, where that is the problem."""
        if refused:
            self.refusedFrontends.add(refused)
        self._note(Problem("Service", self.key, reason, bool(refused)))

    def _note(self, problem: Problem) -> None:
        """One object must not fill the log: the first few of its problems say enough."""
        if problem in self.problems or len(self.problems) < MOST_PROBLEMS:
            self.problems[problem] = None
        else:
            self.more += 1

    def _ports(self) -> Iterator[tuple[str, Protocol, wire.ServicePortSpec]]:
        """Ports that can be served; of two that claim the same name or the same number, the first in the list."""
        names: set[tuple[str, str]] = set()
        numbers: set[tuple[int, str]] = set()
        for spec in self.spec.ports or ():
            name = spec.name or ""
            protocol = _PROTOCOLS.get(spec.protocol or "TCP")
            if protocol is None:
                self._problem(f"port {name or spec.port}: protocol {spec.protocol!r} is none of TCP, UDP, SCTP")
            elif not 0 < spec.port < 65536:
                self._problem(f"port {name!r}: {spec.port} is not a port number (1 to 65535)")
            elif (name, protocol) in names or (spec.port, protocol) in numbers:
                self._problem(f"port {name or spec.port}: {spec.port}/{protocol} repeats an earlier one, which serves")
            else:
                names.add((name, protocol))
                numbers.add((spec.port, protocol))
                yield name, protocol, spec

    def _affinity(self) -> int:
        if self.spec.sessionAffinity in (None, "", "None"):
            return 0
        if self.spec.sessionAffinity != "ClientIP":
            self._problem(f"sessionAffinity {self.spec.sessionAffinity!r} is none of None, ClientIP; None is used")
            return 0
        config = self.spec.sessionAffinityConfig
        seconds = config.clientIP.timeoutSeconds if config and config.clientIP else None
        if seconds is None:
            return DEFAULT_AFFINITY_SECONDS
        if not 0 < seconds <= MAX_AFFINITY_SECONDS:
            self._problem(
                f"affinity timeoutSeconds {seconds} is not in 1 to {MAX_AFFINITY_SECONDS}; "
                f"{DEFAULT_AFFINITY_SECONDS} is used"
            )
            return DEFAULT_AFFINITY_SECONDS
        return seconds

    def _healthCheckPort(self) -> int:
        number = self.spec.healthCheckNodePort or 0
        if not 0 <= number < 65536:
            self._problem(f"healthCheckNodePort {number} is not a port number (1 to 65535)")
            return 0
        return number

    def _addresses(self) -> dict[Family, list[tuple[FrontendKind, str]]]:
        """
        For each family that has a ClusterIP, every address to capture, the ClusterIP first and none twice. A family
        without ClusterIP is not served at all.
        """
        found: dict[Family, list[tuple[FrontendKind, str]]] = {}
        seen: set[str] = set()

        def take(kind: FrontendKind, field: str, text: str | None, first: bool) -> None:
            if not text:
                return
            try:
                address, family = canonical(text)
            except BadAddress as error:
                self._problem(f"{field}: {error}")
                return
            why = self._refusal(kind, address)
            if why:
                self._problem(f"{field}: {address} {why}; it is not served", address)
            elif first:
                # clusterIPs holds at most one of each family; a second one is not ours to choose from
                if family not in found:
                    found[family] = [(kind, address)]
                    seen.add(address)
            elif family in found and address not in seen:
                found[family].append((kind, address))
                seen.add(address)

        for text in self.spec.clusterIPs or [self.spec.clusterIP or ""]:
            take("ClusterIP", "clusterIP", text, True)
        for text in self.spec.externalIPs or ():
            take("ExternalIP", "externalIPs", text, False)
        balancer = self.status.loadBalancer if self.status else None
        for ingress in (balancer.ingress if balancer else None) or ():
            # KEP-1860: with mode Proxy packets must go round by the load balancer
            if ingress.ipMode in (None, "VIP"):
                take("LoadBalancer", "status.loadBalancer.ingress", ingress.ip, False)
        return found

    def _refusal(self, kind: FrontendKind, address: str) -> str | None:
        """Why nobody may be led away from an address, ``None`` where it may be served (CVE-2020-8554)."""
        why = unusable(address)
        if why:
            return f"is a {why} address"
        if kind == "ClusterIP":
            # All of such an address is taken, not only the ports of the Service.
            return "is an address of this node" if address in self.node.addresses else None
        if contains(self.node.denied, address):
            return "is in a network that frontend-deny names"
        if self.node.allowed and not contains(self.node.allowed, address):
            return "is in none of the networks that frontend-allow names"
        return None

    def _sourceRanges(self) -> dict[Family, tuple[str, ...]]:
        """
        The networks that may reach addresses of load balancers. A family for which none is given is open to all; so
        that a slip opens nothing, where not one can be read it is closed.
        """
        found: dict[Family, list[str]] = {}
        texts = [text for text in self.spec.loadBalancerSourceRanges or () if text.strip()]
        for text in texts:
            try:
                cidr, family = network(text)
            except BadAddress as error:
                self._problem(f"loadBalancerSourceRanges: {error}")
                continue
            found.setdefault(family, []).append(cidr)
        if texts and not found:
            self._problem("loadBalancerSourceRanges: no range can be read, so nobody is let in")
            return dict.fromkeys(FAMILIES, ())
        return {family: joined(networks) for family, networks in found.items()}

    def _frontends(
        self,
        addresses: list[tuple[FrontendKind, str]],
        spec: wire.ServicePortSpec,
        protocol: Protocol,
        ranges: tuple[str, ...] | None,
    ) -> Iterator[Frontend]:
        internal: PoolKind = "local" if self.spec.internalTrafficPolicy == "Local" else "cluster"
        external: PoolKind = "local" if self.spec.externalTrafficPolicy == "Local" else "cluster"
        for kind, address in addresses:
            if kind == "ClusterIP":
                yield Frontend(kind, address, spec.port, internal, internal)
            elif protocol == "TCP" and (address, spec.port) in self.node.servers:
                where = f"{address}:{spec.port}"
                self._problem(f"{where} is where the API server is reached; it is not served", where)
            else:
                sources = self._withSelf(ranges, address) if kind == "LoadBalancer" else None
                yield Frontend(kind, address, spec.port, external, "cluster", sources)
        if spec.nodePort:
            if not 0 < spec.nodePort < 65536:
                self._problem(f"nodePort {spec.nodePort} is not a port number (1 to 65535)")
            elif protocol == "TCP" and any((it, spec.nodePort) in self.node.servers for it in self.node.addresses):
                why = "is where the API server on this node is reached; it is not served"
                self._problem(f"nodePort {spec.nodePort} {why}", f"nodePort {spec.nodePort}")
            else:
                yield Frontend("NodePort", None, spec.nodePort, external, "cluster")

    def _withSelf(self, ranges: tuple[str, ...] | None, address: str) -> tuple[str, ...] | None:
        """
        What comes from the node may have been given the address that it was sent to as source: where the node may
        come in, so may that.
        """
        if ranges is None or not any(contains(ranges, it) for it in self.node.addresses if _sameFamily(it, address)):
            return ranges
        return joined((*ranges, f"{address}/{32 if familyOf(address) == 'IPv4' else 128}"))

    def _candidates(self, name: str, protocol: Protocol, family: Family) -> Iterable[Candidate]:
        """
        Every endpoint of one service port, once. Of duplicates the later one (in order of slice names) counts,
        unless it is terminating: a running pod beats a terminating one that had the same address.
        """
        found: dict[str, Candidate] = {}
        for it in self.slices:
            if it.addressType != family:
                continue
            for port in it.ports or ():
                if port.name is None:
                    self._slice(it, "a port without name is ignored")
                elif port.name == name and (port.protocol or "TCP") == protocol:
                    if port.port is None or not 0 < port.port < 65536:
                        self._slice(it, f"port {name!r} has no usable number ({port.port}) and is ignored")
                    else:
                        self._members(it, port.port, family, found)
        return found.values()

    def _members(self, it: wire.EndpointSlice, port: int, family: Family, found: dict[str, Candidate]) -> None:
        for member in it.endpoints or ():
            if not member.addresses:
                continue
            try:
                address, actual = canonical(member.addresses[0])
            except BadAddress as error:
                self._slice(it, f"endpoint: {error}")
                continue
            why = unusable(address) or ("IPv4-mapped" if isMapped(member.addresses[0]) else None)
            if why:
                self.refusedEndpoints.add(address)
                what = f"an {why}" if why[0] in "IU" else f"a {why}"
                self._slice(it, f"endpoint {address} is {what} address; it is not used", True)
                continue
            if actual != family:
                self._slice(it, f"endpoint {address} is not an {family} address; it is not used")
                continue
            candidate = _candidate(member, address, port, self.node)
            earlier = found.get(candidate.key)
            if earlier is None or not candidate.terminating:
                found[candidate.key] = candidate

    def _slice(self, it: wire.EndpointSlice, reason: str, refused: bool = False) -> None:
        self._note(Problem("EndpointSlice", wire.keyOf(it.metadata), reason, refused))


def _sameFamily(one: str, other: str) -> bool:
    return familyOf(one) == familyOf(other)


def _candidate(member: wire.SliceEndpoint, address: str, port: int, node: NodeFacts) -> Candidate:
    conditions = member.conditions or wire.EndpointConditions()
    ready = conditions.ready is not False
    # discovery.k8s.io/v1beta1 names the node by a topology label
    nodeName = member.nodeName or (member.topology or {}).get("kubernetes.io/hostname")
    hints = member.hints or wire.EndpointHints()
    return Candidate(
        address=address,
        port=port,
        ready=ready,
        serving=conditions.serving is not False,
        terminating=conditions.terminating is True,
        isLocal=bool(nodeName) and nodeName == node.name,
        zones=frozenset(it.name for it in hints.forZones or ()),
        nodes=frozenset(it.name for it in hints.forNodes or ()),
    )
