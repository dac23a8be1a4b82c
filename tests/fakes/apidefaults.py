"""
What the API server adds to objects before it stores them: defaults, and for Services addresses and ports.

A Service that comes without a ClusterIP or a node port gets one, one that asks for another's is refused; when its type
changes, what the new type does not have is taken away (kubernetes pkg/apis/core/v1/defaults.go,
pkg/registry/core/service/storage/alloc.go). What is taken is read from the objects themselves at each change, so
objects that were put into the store directly count, and nothing has to be kept in step.
"""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .apichecks import (
    FAMILIES,
    checkEndpoints,
    checkMetadata,
    checkService,
    checkServiceChange,
    checkServiceStatus,
    checkSlice,
    needsClusterIp,
    needsHealthCheck,
    needsNodePort,
    reachableOutside,
)
from .apievents import checkEvent
from .apiinvalid import Problems, familyOf
from .apikinds import EVENTS_V1, NAMESPACES, SERVICES, Json, Kind
from .apistatus import failure, notFound
from .apistore import Store

NAMES = ("default", "kube-node-lease", "kube-public", "kube-system")
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
NODE_PORTS = (30000, 32767)
_MANY = "must be 'RequireDualStack' or 'PreferDualStack' when multiple {} are specified"


class Admission:
    """
    :param serviceCidrs: one or two networks of different families; the first one is that of single-stack Services.
    :param nodePorts: the first and the last one.
    """

    def __init__(
        self, store: Store, serviceCidrs: Iterable[str] = SERVICE_CIDRS, nodePorts: tuple[int, int] = NODE_PORTS
    ) -> None:
        self.store = store
        networks = [ipaddress.ip_network(cidr) for cidr in serviceCidrs]
        self.networks: dict[str, Any] = {f"IPv{network.version}": network for network in networks}
        if not networks or len(self.networks) != len(networks):
            raise ValueError("service networks: one, or one of each family")
        self.nodePorts = nodePorts
        # Where the next search begins: what was given back is not given away at once.
        self._next: dict[str, int] = {}

    def begin(self) -> None:
        """The namespaces that every cluster has."""
        there = self.store.objects(NAMESPACES)
        names = [name for name in NAMES if ("", name) not in there]
        self.store.begin(*(namespaceDefaults({**_head(NAMESPACES), "metadata": {"name": name}}) for name in names))

    def admit(self, kind: Kind, new: Json, old: Json | None, subresource: str = "") -> Json:
        """
        The object to store in the place of another one, or as a new one.

        :raise StatusError: 404 where its namespace does not exist, 422.
        """
        new = copy.deepcopy(new)
        problems, name = Problems(), str(new["metadata"].get("name", ""))
        if old is None and kind.namespaced:
            namespace = new["metadata"].get("namespace", "")
            if ("", namespace) not in self.store.objects(NAMESPACES):
                raise notFound(NAMESPACES, namespace)
        checkMetadata(kind, new, old, problems)
        if kind is SERVICES:
            self._service(new, old, subresource, problems)
        elif kind.kind == "EndpointSlice":
            _sliceDefaults(new, old)
            checkSlice(new, old, problems)
        elif kind.kind == "Endpoints":
            for subset in new.get("subsets") or ():
                _portDefaults(subset.get("ports"))
            checkEndpoints(new, problems)
        elif kind is EVENTS_V1:
            checkEvent(new, old, problems)
        elif kind is NAMESPACES:
            new = namespaceDefaults(new)
        problems.end(kind, name)
        return new

    # --- Services ---

    def _service(self, new: Json, old: Json | None, subresource: str, problems: Problems) -> None:
        spec = new.setdefault("spec", {})
        if not subresource and old is None:
            new["status"] = {}
        new.setdefault("status", {}).setdefault("loadBalancer", {})
        serviceDefaults(new)
        if subresource:
            checkServiceStatus(new, problems)
            return
        before: Json = (old or {}).get("spec") or {}
        if old is not None:
            _keepAllocated(spec, before)
            _dropForType(spec, before)
        elif spec.get("clusterIP") and not spec.get("clusterIPs"):
            spec["clusterIPs"] = [spec["clusterIP"]]
        if spec.get("type") != "LoadBalancer":
            new["status"]["loadBalancer"] = {}
        checkService(new, problems)
        if old is not None:
            checkServiceChange(new, old, problems)
        problems.end(SERVICES, new["metadata"]["name"])
        if needsClusterIp(spec):
            self._families(new, before, problems)
            problems.end(SERVICES, new["metadata"]["name"])
            self._clusterIps(new, old, problems)
        else:
            for field in ("clusterIP", "clusterIPs"):
                spec.pop(field, None)
        self._ports(new, old, problems)

    def _families(self, new: Json, before: Json, problems: Problems) -> None:
        """Which families the Service has."""
        spec = new["spec"]
        bare = spec.get("clusterIP") == "None" and not spec.get("selector")
        if not spec.get("ipFamilyPolicy"):
            # The second half: an object that came into the store without defaults.
            dual = bare or len(before.get("clusterIPs") or ()) == 2
            spec["ipFamilyPolicy"] = before.get("ipFamilyPolicy") or ("RequireDualStack" if dual else "SingleStack")
        policy, ips, families = spec["ipFamilyPolicy"], spec.get("clusterIPs") or [], spec.get("ipFamilies") or []
        if policy == "SingleStack":
            # Whoever asks for a single stack and leaves the rest as it was gives the second address back.
            if before and ips == before.get("clusterIPs"):
                ips = ips[:1]
            if before and families == before.get("ipFamilies"):
                families = families[:1]
            for many, words in ((ips, "cluster IPs"), (families, "IP families")):
                if len(many) > 1:
                    problems.invalid("spec.ipFamilyPolicy", policy, _MANY.format(words))
        else:
            for field, now, words in (("clusterIPs", ips, "cluster IP"), ("ipFamilies", families, "IP family")):
                if len(before.get(field) or ()) == 2 and len(now) == 1:
                    text = f"must be 'SingleStack' to release the secondary {words}"
                    problems.invalid("spec.ipFamilyPolicy", policy, text)
        families = [*families, *(familyOf(ip) for ip in ips[len(families) :] if ip != "None")]
        known = FAMILIES if bare else tuple(self.networks)
        if policy == "RequireDualStack" and len(known) < 2:
            problems.invalid("spec.ipFamilyPolicy", policy, "this cluster is not configured for dual-stack services")
        for at, family in enumerate(families):
            if family not in known:
                problems.invalid(f"spec.ipFamilies[{at}]", family, "not configured on this cluster")
        families = families or [next(iter(self.networks))]
        if policy != "SingleStack":
            families += [family for family in known if family not in families]
        spec["ipFamilies"] = families
        if ips:
            spec["clusterIPs"] = ips

    def _clusterIps(self, new: Json, old: Json | None, problems: Problems) -> None:
        spec = new["spec"]
        ips: list[str] = list(spec.get("clusterIPs") or ())
        if ips[:1] == ["None"]:
            return
        taken = {ip for it in self._others(old) for ip in _clusterIps(it["spec"])}
        own = _clusterIps((old or {}).get("spec") or {})
        for at, family in enumerate(spec["ipFamilies"]):
            network = self.networks[family]
            if at >= len(ips):
                ips.append(self._free(family, network, taken))
            elif ips[at] not in own:
                problem = ""
                if ipaddress.ip_address(ips[at]) not in network:
                    problem = f"the provided IP ({ips[at]}) is not in the valid range. "
                    problem += f"The range of valid IPs is {network}"
                elif ips[at] in taken:
                    problem = "provided IP is already allocated"
                if problem:
                    problems.invalid("spec.clusterIPs", ips, f"failed to allocate IP {ips[at]}: {problem}")
        spec["clusterIP"], spec["clusterIPs"] = ips[0], ips

    def _free(self, family: str, network: Any, taken: set[str]) -> str:
        # The lower part of the network is for those who choose, until nothing else is left (KEP-3070); the ends are
        # nobody's.
        size = min(network.num_addresses, 1 << 16)
        band = max(1, min(256, size // 16))
        return str(network[self._search(family, 1, band, size - 2, lambda at: str(network[at]) in taken)])

    def _ports(self, new: Json, old: Json | None, problems: Problems) -> None:
        """Node ports, and the port for health checks."""
        spec = new["spec"]
        before = (old or {}).get("spec") or {}
        taken: set[int] = {number for it in self._others(old) for number in _nodePorts(it["spec"])}
        own = set(_nodePorts(before))
        first, last = self.nodePorts
        chosen: dict[Any, int] = {}
        ports = spec.get("ports") or ()
        for at, port in enumerate(ports):
            if number := port.get("nodePort"):
                self._claim(f"spec.ports[{at}].nodePort", number, own, taken, problems)
                chosen.setdefault(port["port"], number)
        wanted = [*chosen.values(), spec.get("healthCheckNodePort")]
        for port in ports if needsNodePort(spec) else ():
            if not port.get("nodePort"):
                # Ports of one number and different protocols share their node port.
                if port["port"] not in chosen:
                    busy = taken.union(wanted)
                    chosen[port["port"]] = self._search("port", first, first + 86, last, busy.__contains__)
                    wanted.append(chosen[port["port"]])
                port["nodePort"] = chosen[port["port"]]
        if needsHealthCheck(spec):
            if number := spec.get("healthCheckNodePort"):
                self._claim("spec.healthCheckNodePort", number, own, taken, problems)
            else:
                busy = taken.union(wanted)
                spec["healthCheckNodePort"] = self._search("port", first, first + 86, last, busy.__contains__)

    def _claim(self, field: str, number: int, own: set[int], taken: set[int], problems: Problems) -> None:
        first, last = self.nodePorts
        if number in own:
            return
        if not first <= number <= last:
            text = f"provided port is not in the valid range. The range of valid ports is {first}-{last}"
            problems.invalid(field, number, text)
        elif number in taken:
            problems.invalid(field, number, "provided port is already allocated")

    def _search(self, what: str, first: int, band: int, last: int, taken: Callable[[int], bool]) -> int:
        """The next free number from ``band`` on, or else of those before it."""
        begin = self._next.get(what, band)
        at: int
        for at in (*range(begin, last + 1), *range(band, begin), *range(first, min(band, last + 1))):
            if not taken(at):
                self._next[what] = at + 1 if band <= at < last else band
                return at
        raise failure(500, "InternalError", "Internal error occurred: failed to allocate: range is full")

    def _others(self, old: Json | None) -> Iterable[Json]:
        there = self.store.objects(SERVICES).values()
        return (it for it in there if it is not old and isinstance(it.get("spec"), dict))


# --- defaults ---


def serviceDefaults(it: Json) -> None:
    """Fill in, in place, what a Service says nothing about."""
    spec = it["spec"]
    type = spec.setdefault("type", "ClusterIP")
    if spec.setdefault("sessionAffinity", "None") == "None":
        spec.pop("sessionAffinityConfig", None)
    elif spec["sessionAffinity"] == "ClientIP":
        clientIp = (spec.setdefault("sessionAffinityConfig", {})).setdefault("clientIP", {})
        clientIp.setdefault("timeoutSeconds", 10800)
    for port in spec.get("ports") or ():
        port.setdefault("protocol", "TCP")
        if not port.get("targetPort") and "port" in port:
            port["targetPort"] = port["port"]
    if reachableOutside(spec):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if type != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if type == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
        for point in it["status"]["loadBalancer"].get("ingress") or ():
            if point.get("ip"):
                point.setdefault("ipMode", "VIP")


def namespaceDefaults(it: Json) -> Json:
    """A Namespace as it is when it is there."""
    metadata = it["metadata"]
    labels = {**(metadata.get("labels") or {}), "kubernetes.io/metadata.name": metadata["name"]}
    metadata = {**metadata, "labels": labels}
    spec, status = {"finalizers": ["kubernetes"]}, {"phase": "Active", **(it.get("status") or {})}
    return {**it, "metadata": metadata, "spec": spec, "status": status}


def _sliceDefaults(new: Json, old: Json | None) -> None:
    new.setdefault("endpoints", None)
    _portDefaults(new.setdefault("ports", None), named=True)
    for endpoint in new["endpoints"] or ():
        endpoint.setdefault("conditions", {})
    metadata = new["metadata"]
    if old is None:
        metadata["generation"] = 1
        return
    generation = old["metadata"].get("generation", 0)
    changed = any(old.get(field) != new.get(field) for field in ("addressType", "endpoints", "ports"))
    changed = changed or (old["metadata"].get("labels") or {}) != (metadata.get("labels") or {})
    metadata["generation"] = generation + changed


def _portDefaults(ports: Sequence[Json] | None, named: bool = False) -> None:
    for port in ports or ():
        port.setdefault("protocol", "TCP")
        if named:
            port.setdefault("name", "")


# --- changes of a Service ---


def _keepAllocated(spec: Json, before: Json) -> None:
    """What the server has given and the new object does not mention stays; singular and plural go together."""
    if needsClusterIp(before) and needsClusterIp(spec):
        if not spec.get("clusterIP") and before.get("clusterIP"):
            spec["clusterIP"] = before["clusterIP"]
        if not spec.get("clusterIPs") and spec.get("clusterIP") == before.get("clusterIP"):
            spec["clusterIPs"] = list(before.get("clusterIPs") or [before.get("clusterIP")])
        if not spec.get("ipFamilies") and spec.get("ipFamilyPolicy") in (None, before.get("ipFamilyPolicy")):
            spec["ipFamilies"] = list(before.get("ipFamilies") or ())
    if spec.get("clusterIP") != before.get("clusterIP") and spec.get("clusterIPs") == before.get("clusterIPs"):
        spec["clusterIPs"] = [spec["clusterIP"]] if spec.get("clusterIP") else []
    if needsNodePort(before) and needsNodePort(spec):
        used = set(_numbers(before)) & set(_numbers(spec))
        byName = {port.get("name"): port.get("nodePort") for port in before.get("ports") or ()}
        for port in spec.get("ports") or ():
            number = byName.get(port.get("name"))
            if not port.get("nodePort") and number and number not in used:
                port["nodePort"] = number
                used.add(number)
    if needsHealthCheck(before) and needsHealthCheck(spec) and before.get("healthCheckNodePort"):
        spec.setdefault("healthCheckNodePort", before["healthCheckNodePort"])


def _dropForType(spec: Json, before: Json) -> None:
    """What the new type does not have and nobody has touched goes."""
    dropped: list[str] = []
    if needsClusterIp(before) and not needsClusterIp(spec):
        dropped += ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"]
    if needsNodePort(before) and not needsNodePort(spec) and _numbers(before) == _numbers(spec):
        for port in spec.get("ports") or ():
            port.pop("nodePort", None)
    if needsHealthCheck(before) and not needsHealthCheck(spec):
        dropped.append("healthCheckNodePort")
    if before.get("type") == "LoadBalancer" and spec.get("type") != "LoadBalancer":
        dropped += ["allocateLoadBalancerNodePorts", "loadBalancerClass"]
    if reachableOutside(before) and not reachableOutside(spec):
        dropped.append("externalTrafficPolicy")
    for field in dropped:
        if spec.get(field) == before.get(field):
            spec.pop(field, None)


def _clusterIps(spec: Json) -> list[str]:
    return spec.get("clusterIPs") or [spec.get("clusterIP") or ""]


def _numbers(spec: Json) -> list[int]:
    return [port["nodePort"] for port in spec.get("ports") or () if port.get("nodePort")]


def _nodePorts(spec: Json) -> list[int]:
    """All that it holds."""
    return [*_numbers(spec), *([spec["healthCheckNodePort"]] if spec.get("healthCheckNodePort") else ())]


def _head(kind: Kind) -> Json:
    return {"apiVersion": kind.apiVersion, "kind": kind.kind}
