"""
What a node should do with its frontends, worked out anew from the objects by the shortest way there is, with nothing of
the product's own code: an oracle for tests. Objects are as JSON has them; what cannot be read is not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple


class Way(NamedTuple):
    """Whose a frontend is, and where clients from outside and from inside go: endpoints, or ``reject`` or ``drop``."""

    owner: str
    outside: frozenset[str] | str
    inside: frozenset[str] | str
    sources: tuple[str, ...] | None


class Node(NamedTuple):
    """What is known of the node."""

    name: str = "n0"
    zone: str = ""
    addresses: frozenset[str] = frozenset()
    servers: frozenset[tuple[str, int]] = frozenset()


def desired(services: Iterable[Any], slices: Iterable[Any], node: Node) -> dict[str, Way]:
    """``address:port/protocol`` (``node4``, ``node6`` for node ports) → what should be."""
    claims: dict[str, list[tuple[tuple[str, ...], Way]]] = {}
    slices = list(slices)
    for it in services:
        meta, spec = it["metadata"], it["spec"]
        if spec.get("type") == "ExternalName" or spec.get("clusterIP") in (None, "", "None"):
            continue
        balancers = [entry["ip"] for entry in (it.get("status") or {}).get("loadBalancer", {}).get("ingress") or ()]
        for version in (4, 6):
            own = [ip for ip in spec["clusterIPs"] if ip_address(ip).version == version]
            if not own or own[0] in node.addresses:
                continue
            others = [ip for ip in (*(spec.get("externalIPs") or ()), *balancers) if ip_address(ip).version == version]
            for port in spec["ports"]:
                name, protocol = port.get("name") or "", port.get("protocol") or "TCP"
                owner = f"{meta['namespace']}/{meta['name']}:{name}/{protocol}/IPv{version}"
                pools = _pools(_ends(slices, meta, version, name, protocol), node)
                inner = pools["local" if spec.get("internalTrafficPolicy") == "Local" else "cluster"]
                outer = pools["local" if spec.get("externalTrafficPolicy") == "Local" else "cluster"]
                rank = (meta.get("creationTimestamp") or "~", meta["namespace"], meta["name"], name, protocol)

                def claim(host: str, number: int, way: Way, key: str = protocol, rank: Any = rank) -> None:
                    claims.setdefault(f"{host}:{number}/{key}", []).append((rank, way))

                claim(own[0], port["port"], Way(owner, inner, inner, None))
                for ip in dict.fromkeys(others):
                    if ip not in own and not (protocol == "TCP" and (ip, port["port"]) in node.servers):
                        allowed = _sources(spec, version, ip, node) if ip in balancers else None
                        claim(ip, port["port"], Way(owner, outer, pools["cluster"], allowed))
                number = port.get("nodePort")
                if number and not (protocol == "TCP" and any((ip, number) in node.servers for ip in node.addresses)):
                    claim(f"node{version}", number, Way(owner, outer, pools["cluster"], None))
    return {key: min(those, key=lambda it: it[0])[1] for key, those in claims.items()}


def _sources(spec: Any, version: int, ip: str, node: Node) -> tuple[str, ...] | None:
    every = [ip_network(text) for text in spec.get("loadBalancerSourceRanges") or ()]
    mine = {it for it in every if it.version == version}
    if any(ip_address(own) in it for it in mine for own in node.addresses):
        mine.add(ip_network(ip))  # the node's own packets to a load balancer may come from its address
    return tuple(map(str, sorted(mine))) or None  # type: ignore[type-var]


def _ends(slices: Iterable[Any], meta: Any, version: int, name: str, protocol: str) -> list[Any]:
    best: dict[str, tuple[bool, bool, Any]] = {}
    for it in slices:
        labels = it["metadata"].get("labels") or {}
        home = it["metadata"]["namespace"], labels.get("kubernetes.io/service-name")
        if home != (meta["namespace"], meta["name"]) or it["addressType"] != f"IPv{version}":
            continue
        for port in it["ports"]:
            if (port["name"], port.get("protocol") or "TCP") != (name, protocol):
                continue
            for end in it["endpoints"]:
                host = end["addresses"][0]
                key = f"[{host}]:{port['port']}" if version == 6 else f"{host}:{port['port']}"
                state = {"ready": True, "serving": True, "terminating": False}
                state |= {k: v for k, v in (end.get("conditions") or {}).items() if v is not None}
                rank = (not state["terminating"], state["ready"], {**state, "end": end, "key": key})
                if key not in best or best[key][:2] < rank[:2]:
                    best[key] = rank
    return [it[2] for it in best.values()]


def _pools(ends: list[Any], node: Node) -> Mapping[str, frozenset[str] | str]:
    ready = [it for it in ends if it["ready"]]
    leaving = [it for it in ends if it["serving"] and it["terminating"]]
    hinted = [[zone["name"] for zone in (it["end"].get("hints") or {}).get("forZones") or ()] for it in ready]
    near = [it for it, zones in zip(ready, hinted, strict=True) if node.zone and node.zone in zones]
    cluster = (near if near and all(hinted) else ready) or leaving
    here = [[it for it in those if it["end"].get("nodeName") == node.name] for those in (ready, leaving)]
    nobody = "drop" if ready or leaving else "reject"
    return {
        "cluster": frozenset(it["key"] for it in cluster) or nobody,
        "local": frozenset(it["key"] for it in here[0] or here[1]) or nobody,
    }
