"""
One Service, its slices and the node → the service ports that it means here.

Port identity follows kubernetes ``pkg/proxy/serviceport.go``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from . import wire
from .addresses import (
    BadAddress,
    canonical,
    contains,
    everywhere,
    familyOf,
    joined,
    network,
    shortened,
    unusable,
)
from .candidates import article, gather, ordered
from .topology import NodeFacts, categorize
from .values import FAMILIES, Family, Frontend, FrontendKind, PoolKind, Problem, Protocol, ServicePort, ServicePortName

DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400
#: problems of one Service and its slices that are told one by one
MOST_PROBLEMS = 20
_NO_ADDRESS = (
    "it has no clusterIP, and is not served: write an address of the service network, or None for a headless Service"
)
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
    """Whether a Service is for a service proxy at all, and for one of that name (KEP-2447)."""
    return unconcerning(service, proxyName) is None


def unconcerning(service: wire.Service, proxyName: str = "") -> str | None:
    """
    Why a Service is nothing for the proxy of that name, ``None`` where it is.

    ExternalName is a matter for DNS; a headless Service has no address to capture, and one that is labelled as headless
    is to be treated as such (kubernetes ``cmd/kube-proxy/app/server.go``).
    """
    label = service.metadata.label(wire.PROXY_NAME_LABEL)
    if (label or "") != proxyName or (proxyName == "" and label is not None):
        says = f"says {label!r}" if label is not None else "is not set"
        return f"its label {wire.PROXY_NAME_LABEL} {says}, proxy-name of this one {proxyName!r}"
    if wire.HEADLESS_LABEL in (service.metadata.labels or {}):
        return f"it is headless: its label {wire.HEADLESS_LABEL} says so"
    spec = service.spec
    if spec is None:
        return "it has no spec"
    if spec.type == "ExternalName":
        return "its type is ExternalName, which is a matter of DNS"
    if (spec.clusterIP or (spec.clusterIPs or [""])[0]) == "None":
        return "it is headless: without a ClusterIP there is nothing to serve"
    return None if spec.clusterIP else _NO_ADDRESS


def passedOver(service: wire.Service, proxyName: str = "") -> Resolved:
    """
    What is to be told of a Service that does not :func:`concern <concerns>` the proxy of that name: nothing, where that
    can be meant. An API server gives an address to every Service that does not refuse one; a manifest may lack it.
    """
    why = unconcerning(service, proxyName)
    if why != _NO_ADDRESS:
        return NOTHING
    return Resolved(problems=(Problem("Service", wire.keyOf(service.metadata), why),))


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
        self.slices = ordered(slices)
        self.key = wire.keyOf(self.meta)
        self.problems: dict[Problem, None] = {}  # for its order
        self.more: set[Problem] = set()
        self.balancers: set[str] = set()
        self.internal: PoolKind = "cluster"
        self.external: PoolKind = "cluster"
        self.refusedFrontends: set[str] = set()
        self.refusedEndpoints: set[str] = set()

    def run(self) -> Resolved:
        ports: list[ServicePort] = []
        specs = list(self._ports())
        affinity = self._affinity()
        self.internal = self._policy("internalTrafficPolicy", self.spec.internalTrafficPolicy)
        self.external = self._policy("externalTrafficPolicy", self.spec.externalTrafficPolicy)
        self._addressTypes()
        isLoadBalancer = self.spec.type == "LoadBalancer" and self.external == "local"
        healthCheckPort = self._healthCheckPort() if isLoadBalancer else 0
        byFamily = self._addresses()
        ranges = self._sourceRanges()
        for family in FAMILIES:
            addresses = byFamily.get(family)
            if not addresses:
                continue
            for number, (name, protocol, spec) in enumerate(specs):
                found = gather(self.slices, name, protocol, family, self.node, self._slice)
                pools = categorize(found.values(), self.node)
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
            self.problems[Problem("Service", self.key, f"and {len(self.more)} more that are like these")] = None
        return Resolved(
            tuple(ports), tuple(self.problems), len(self.refusedFrontends), len(self.refusedEndpoints)
        )

    def _problem(self, reason: str, refused: str = "") -> None:
        """
        Note a problem of the Service.

        :param refused: the address or port that must not be reached, where that is the problem.
        """
        if refused:
            self.refusedFrontends.add(refused)
        self._note(Problem("Service", self.key, shortened(reason), bool(refused)))

    def _note(self, problem: Problem) -> None:
        """One object must not fill the log: the first few of its problems say enough."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems[problem] = None
        elif problem not in self.problems:
            self.more.add(problem)

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
            elif (spec.port, protocol) in numbers:
                self._problem(f"port {name or spec.port}: {spec.port}/{protocol} repeats an earlier one, which serves")
            elif (name, protocol) in names:
                why = f"the name {name!r} is that of" if name else "it has no name, like"
                self._problem(f"port {spec.port}/{protocol}: {why} an earlier one, which serves; give each its own")
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

    def _policy(self, field: str, word: str | None) -> PoolKind:
        if word not in (None, "", "Cluster", "Local"):
            self._problem(f"{field} {word!r} is none of Cluster, Local; Cluster is used")
        return "local" if word == "Local" else "cluster"

    def _addressTypes(self) -> None:
        for it in self.slices:
            if it.addressType not in wire.ADDRESS_TYPES:
                why = f"{it.addressType!r} is none of" if it.addressType else "is missing; it must be one of"
                self._slice(it, f"addressType {why} {', '.join(wire.ADDRESS_TYPES)}; the slice is left out", "")

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
                self._isBalancer(ingress.ip)
                take("LoadBalancer", "status.loadBalancer.ingress", ingress.ip, False)
        return found

    def _isBalancer(self, text: str | None) -> None:
        """An address of a load balancer is restricted to its source ranges, also where it is an external IP as well."""
        if text:
            try:
                self.balancers.add(canonical(text)[0])
            except BadAddress:
                return  # told elsewhere

    def _refusal(self, kind: FrontendKind, address: str) -> str | None:
        """Why nobody may be led away from an address, ``None`` where it may be served (CVE-2020-8554)."""
        why = unusable(address)
        if why:
            return f"is {article(why)} {why} address"
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
        The networks that may reach addresses of load balancers. A family for which none is given is open to all, but
        a slip opens nothing: what cannot be read lets nobody in, rather than everybody.
        """
        found: dict[Family, list[str]] = {}
        for text in self.spec.loadBalancerSourceRanges or ():
            if not text.strip():
                continue
            try:
                cidr, family = network(text)
            except BadAddress as error:
                self._problem(f"loadBalancerSourceRanges: {error}; it lets nobody in")
                for meant in _familiesOf(text):
                    found.setdefault(meant, [])
            else:
                found.setdefault(family, []).append(cidr)
        ranges = {family: joined(networks) for family, networks in found.items()}
        return {family: networks for family, networks in ranges.items() if networks != (everywhere(family),)}

    def _frontends(
        self,
        addresses: list[tuple[FrontendKind, str]],
        spec: wire.ServicePortSpec,
        protocol: Protocol,
        ranges: tuple[str, ...] | None,
    ) -> Iterator[Frontend]:
        internal, external = self.internal, self.external
        for kind, address in addresses:
            if kind == "ClusterIP":
                yield Frontend(kind, address, spec.port, internal, internal)
            elif protocol == "TCP" and (address, spec.port) in self.node.servers:
                where = f"{address}:{spec.port}"
                self._problem(f"{where} is where the API server is reached; it is not served", where)
            else:
                sources = self._withSelf(ranges, address) if address in self.balancers else None
                yield Frontend(kind, address, spec.port, external, "cluster", sources)
        if spec.nodePort:
            if not 0 < spec.nodePort < 65536:
                self._problem(f"nodePort {spec.nodePort} is not a port number (1 to 65535)")
            elif protocol == "TCP" and any((it, spec.nodePort) in self.node.servers for it in self.node.addresses):
                why = "is where the API server on this node is reached; it is not served"
                self._problem(f"nodePort {spec.nodePort} {why}", f"nodePort {spec.nodePort}")
            elif protocol == "TCP" and spec.nodePort in self.node.taken:
                why = "is where kproxy itself answers; it is not served"
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

    def _slice(self, it: wire.EndpointSlice, reason: str, refused: str) -> None:
        if refused:
            self.refusedEndpoints.add(refused)
        self._note(Problem("EndpointSlice", wire.keyOf(it.metadata), shortened(reason), bool(refused)))


def _familiesOf(text: str) -> tuple[Family, ...]:
    """Which families a network that cannot be read may have been meant for."""
    if ":" in text:
        return ("IPv6",)
    return ("IPv4",) if "." in text else FAMILIES


def _sameFamily(one: str, other: str) -> bool:
    return familyOf(one) == familyOf(other)
