"""
What the fake API server refuses in Services, EndpointSlices and Endpoints, after their defaults are in (kubernetes
pkg/apis/core/validation, pkg/apis/discovery/validation).
"""

from __future__ import annotations

import ipaddress
from typing import Any

from .apiinvalid import Problems, familyOf
from .apikinds import Json, Kind

TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
PROTOCOLS = ("TCP", "UDP", "SCTP")
FAMILIES = ("IPv4", "IPv6")
POLICIES = ("SingleStack", "PreferDualStack", "RequireDualStack")
DISTRIBUTIONS = ("PreferClose", "PreferSameNode", "PreferSameZone")
CIDR = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
ONLY_BALANCER = "may only be used when `type` is 'LoadBalancer'"
ONCE = "may not change once set"
_HEALTH = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
_OUTSIDE = "may only be set for externally-accessible services"
_TIMEOUT = "must be greater than 0 and less than 86400"


def needsClusterIp(spec: Json) -> bool:
    return spec.get("type") in ("ClusterIP", "NodePort", "LoadBalancer")


def needsNodePort(spec: Json) -> bool:
    type = spec.get("type")
    return type == "NodePort" or (type == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is not False)


def needsHealthCheck(spec: Json) -> bool:
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def reachableOutside(spec: Json) -> bool:
    return spec.get("type") in ("NodePort", "LoadBalancer") or (
        spec.get("type") == "ClusterIP" and bool(spec.get("externalIPs"))
    )


def checkMetadata(kind: Kind, new: Json, old: Json | None, problems: Problems) -> None:
    """Name and labels, and what cannot change."""
    metadata = new["metadata"]
    if kind.kind in ("Service", "Namespace"):
        problems.label("metadata.name", metadata.get("name"))
    else:
        problems.subdomain("metadata.name", metadata.get("name"))
    problems.labels("metadata.labels", metadata.get("labels") or {})
    for field in ("name", "namespace") if old is not None else ():
        problems.same(f"metadata.{field}", old["metadata"].get(field), metadata.get(field))  # type: ignore[index]


def checkService(it: Json, problems: Problems) -> None:
    """Everything of one Service that does not depend on others, nor on what it was before."""
    spec = it["spec"]
    type = spec["type"]
    if not spec.get("ports") and spec.get("clusterIP") != "None" and type != "ExternalName":
        problems.required("spec.ports")
    problems.oneOf("spec.type", type, TYPES)
    if type == "ExternalName":
        for field in ("clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            if spec.get(field):
                problems.forbidden(f"spec.{field}", "may not be set for ExternalName services")
        if not spec.get("externalName"):
            problems.required("spec.externalName")
        else:
            problems.subdomain("spec.externalName", spec["externalName"].removesuffix("."))
    elif type in ("NodePort", "LoadBalancer") and spec.get("clusterIP") == "None":
        text = f"may not be set to 'None' for {type} services"
        problems.invalid("spec.clusterIPs[0]", spec.get("clusterIPs"), text)
    _ports(spec, problems)
    problems.labels("spec.selector", spec.get("selector") or {})
    problems.oneOf("spec.sessionAffinity", spec["sessionAffinity"], ("ClientIP", "None"))
    timeout = ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds")
    if timeout is not None and not 0 < timeout <= 86400:
        problems.invalid("spec.sessionAffinityConfig.clientIP.timeoutSeconds", timeout, _TIMEOUT)
    _addresses(spec, problems)
    _policies(spec, problems)
    checkServiceStatus(it, problems)


def _ports(spec: Json, problems: Problems) -> None:
    ports = spec.get("ports") or []
    names: set[str] = set()
    sockets: set[tuple[Any, Any]] = set()
    nodePorts: set[tuple[Any, Any]] = set()
    for at, port in enumerate(ports):
        where, name = f"spec.ports[{at}]", port.get("name")
        if name:
            problems.label(f"{where}.name", name)
            if name in names:
                problems.duplicate(f"{where}.name", name)
            names.add(name)
        elif len(ports) > 1:
            problems.required(f"{where}.name")
        problems.port(f"{where}.port", port.get("port"))
        problems.oneOf(f"{where}.protocol", port.get("protocol"), PROTOCOLS)
        target = port.get("targetPort")
        if isinstance(target, int):
            problems.port(f"{where}.targetPort", target)
        elif target is not None and (len(target) > 15 or not any(letter.isalpha() for letter in target)):
            problems.invalid(f"{where}.targetPort", target, "must contain at least one letter (a-z), at most 15 in all")
        nodePort = port.get("nodePort")
        if nodePort and spec["type"] in ("ClusterIP", "ExternalName"):
            problems.forbidden(f"{where}.nodePort", f"may not be used when `type` is '{spec['type']}'")
        if nodePort and (port.get("protocol"), nodePort) in nodePorts:
            problems.duplicate(f"{where}.nodePort", nodePort)
        nodePorts.add((port.get("protocol"), nodePort))
        socket = (port.get("protocol"), port.get("port"))
        if socket in sockets:
            problems.duplicate(where, {"protocol": socket[0], "port": socket[1]})
        sockets.add(socket)


def _addresses(spec: Json, problems: Problems) -> None:
    for at, ip in enumerate(spec.get("externalIPs") or ()):
        problems.ip(f"spec.externalIPs[{at}]", ip)
    families, ips = spec.get("ipFamilies") or [], spec.get("clusterIPs") or []
    for at, family in enumerate(families):
        problems.oneOf(f"spec.ipFamilies[{at}]", family, FAMILIES)
        if family in families[:at]:
            problems.duplicate(f"spec.ipFamilies[{at}]", family)
    if spec.get("ipFamilyPolicy") is not None:
        problems.oneOf("spec.ipFamilyPolicy", spec["ipFamilyPolicy"], POLICIES)
    if spec.get("clusterIP") and spec["clusterIP"] != (ips or [""])[0]:
        problems.invalid("spec.clusterIPs", ips, "first value must match `clusterIP`")
    elif ips and not spec.get("clusterIP"):
        problems.invalid("spec.clusterIPs", ips, "`clusterIP` must be set when `clusterIPs` is set")
    if len(ips) > 2:
        problems.tooMany("spec.clusterIPs", len(ips), 2)
    if "None" in ips:
        if len(ips) > 1:
            problems.invalid("spec.clusterIPs[0]", "None", "'None' must be the first and only value")
        return
    for at, ip in enumerate(ips):
        family = familyOf(ip)
        if not family:
            problems.invalid(f"spec.clusterIPs[{at}]", ip, "must be empty string, 'None', or a valid IP address")
        elif at < len(families) and families[at] != family:
            text = f"expected an {families[at]} value as indicated by `ipFamilies[{at}]`"
            problems.invalid(f"spec.clusterIPs[{at}]", ip, text)
    if len(ips) == 2 and familyOf(ips[0]) == familyOf(ips[1]):
        problems.invalid("spec.clusterIPs", ips, "may specify no more than one IP for each IP family")


def _policies(spec: Json, problems: Problems) -> None:
    type, external = spec["type"], spec.get("externalTrafficPolicy")
    if external:
        if reachableOutside(spec):
            problems.oneOf("spec.externalTrafficPolicy", external, ("Cluster", "Local"))
        else:
            problems.invalid("spec.externalTrafficPolicy", external, _OUTSIDE)
    if spec.get("healthCheckNodePort") and not needsHealthCheck(spec):
        problems.invalid("spec.healthCheckNodePort", spec["healthCheckNodePort"], _HEALTH)
    if spec.get("internalTrafficPolicy") is not None:
        problems.oneOf("spec.internalTrafficPolicy", spec["internalTrafficPolicy"], ("Cluster", "Local"))
    if spec.get("trafficDistribution") is not None:
        problems.oneOf("spec.trafficDistribution", spec["trafficDistribution"], DISTRIBUTIONS)
    for field in ("loadBalancerSourceRanges", "loadBalancerClass", "allocateLoadBalancerNodePorts"):
        if type != "LoadBalancer" and spec.get(field) not in (None, []):
            problems.forbidden(f"spec.{field}", ONLY_BALANCER)
    for at, cidr in enumerate(spec.get("loadBalancerSourceRanges") or ()):
        try:
            ipaddress.ip_network(cidr.strip(), strict=False)
        except ValueError:
            problems.invalid(f"spec.loadBalancerSourceRanges[{at}]", cidr, CIDR)


def checkServiceStatus(it: Json, problems: Problems) -> None:
    ingress = ((it.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    if ingress and it["spec"].get("type") != "LoadBalancer":
        problems.forbidden("status.loadBalancer.ingress", 'may only be used when `spec.type` is "LoadBalancer"')
    for at, point in enumerate(ingress):
        where = f"status.loadBalancer.ingress[{at}]"
        if point.get("ip"):
            problems.ip(f"{where}.ip", point["ip"], special=True)
        if point.get("hostname"):
            problems.subdomain(f"{where}.hostname", point["hostname"])
        if point.get("ipMode") is not None:
            problems.oneOf(f"{where}.ipMode", point["ipMode"], ("Proxy", "VIP"))


def checkServiceChange(new: Json, old: Json, problems: Problems) -> None:
    """What cannot change: addresses that were given, as long as the Service needs one."""
    spec, before = new["spec"], old.get("spec") or {}
    if needsClusterIp(before) and needsClusterIp(spec):
        for field in ("clusterIPs", "ipFamilies"):
            was, now = before.get(field) or [], spec.get(field) or []
            for at, value in enumerate(was):
                if at < len(now) and now[at] != value:
                    problems.invalid(f"spec.{field}[{at}]", now, ONCE)
    number = before.get("healthCheckNodePort")
    if number and needsHealthCheck(before) and needsHealthCheck(spec) and spec.get("healthCheckNodePort") != number:
        problems.forbidden("spec.healthCheckNodePort", "field is immutable")
    if before.get("type") == spec["type"] == "LoadBalancer":
        problems.same("spec.loadBalancerClass", before.get("loadBalancerClass"), spec.get("loadBalancerClass"), ONCE)


def checkSlice(new: Json, old: Json | None, problems: Problems) -> None:
    family = new.get("addressType")
    if not family:
        problems.required("addressType")
    else:
        problems.oneOf("addressType", family, ("FQDN", "IPv4", "IPv6"))
    if old is not None:
        problems.same("addressType", old.get("addressType"), family)
    endpoints, ports = new.get("endpoints") or [], new.get("ports") or []
    if len(endpoints) > 1000:
        problems.tooMany("endpoints", len(endpoints), 1000)
    if len(ports) > 100:
        problems.tooMany("ports", len(ports), 100)
    for at, endpoint in enumerate(endpoints):
        addresses = endpoint.get("addresses") or []
        if not addresses:
            problems.required(f"endpoints[{at}].addresses", "must contain at least 1 address")
        if len(addresses) > 100:
            problems.tooMany(f"endpoints[{at}].addresses", len(addresses), 100)
        for which, address in enumerate(addresses):
            where = f"endpoints[{at}].addresses[{which}]"
            if family == "FQDN":
                problems.subdomain(where, address)
            elif family in FAMILIES:
                problems.ip(where, address, family)
    _endpointPorts("ports", ports, problems)


def checkEndpoints(new: Json, problems: Problems) -> None:
    for at, subset in enumerate(new.get("subsets") or ()):
        where = f"subsets[{at}]"
        if not subset.get("addresses") and not subset.get("notReadyAddresses"):
            problems.required(where, "must specify `addresses` or `notReadyAddresses`")
        for field in ("addresses", "notReadyAddresses"):
            for which, address in enumerate(subset.get(field) or ()):
                problems.ip(f"{where}.{field}[{which}].ip", address.get("ip", ""))
        _endpointPorts(f"{where}.ports", subset.get("ports") or [], problems)


def _endpointPorts(where: str, ports: list[Json], problems: Problems) -> None:
    names: set[str] = set()
    for at, port in enumerate(ports):
        name = port.get("name") or ""
        if name in names:
            problems.duplicate(f"{where}[{at}].name", name)
        names.add(name)
        if name:
            problems.label(f"{where}[{at}].name", name)
        problems.oneOf(f"{where}[{at}].protocol", port.get("protocol"), PROTOCOLS)
        if port.get("port") is not None:
            problems.port(f"{where}[{at}].port", port["port"])
