"""
What becomes of one flow on this node: who owns the address that it is sent to, which pool serves it, and why.

This says in plain functions what the rules in the kernel and the sockets behind them come to. The rules about pools,
refusals and masquerading are those of kubernetes ``pkg/proxy/nftables/proxier.go`` and its sibling under ``iptables``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

from msgspec import Struct

from .addresses import contains, familyOf
from .locality import LOCALHOST
from .values import (
    Endpoint,
    Family,
    Frontend,
    FrontendKey,
    Locality,
    PoolKind,
    ServiceMap,
    ServicePort,
    ServicePortName,
)

#: ``service``: a frontend of a service port. ``no such port``: a ClusterIP whose Services have no such port.
#: ``unallocated``: in a network of ClusterIPs, and no Service has it. ``not served here``: a node port, at an address
#: of the node where none are served. ``none``: no service address at all.
Hit: TypeAlias = Literal["service", "no such port", "unallocated", "not served here", "none"]
FlowVerdict: TypeAlias = Literal["endpoints", "reject", "drop", "untouched"]
#: Why the source of packets is rewritten. ``hairpin``: the endpoint is the client itself.
Masquerade: TypeAlias = Literal["masquerade-all", "off-cluster", "external", "node", "hairpin"]


class Flow(Struct, frozen=True):
    """
    A new connection, or the first datagram of many.

    :ivar source: canonical address of the client; ``""`` for anybody's, see :func:`anybody`.
    :ivar destination: canonical address that it dials, of the same family.
    :ivar protocol: ``TCP``, ``UDP`` or ``SCTP``; anything else can reach no service port.
    :ivar link: the interface by which it comes in; ``None`` where that is not known, and for the node itself.
    :ivar fromNode: it is sent by the node itself. An address of the node as source says the same.
    """

    source: str
    destination: str
    port: int
    protocol: str = "TCP"
    link: str | None = None
    fromNode: bool = False

    @property
    def family(self) -> Family:
        return familyOf(self.destination)


class Origin(Struct, frozen=True):
    """
    Where a flow comes from.

    :ivar isPod: pods of this node, as far as they can be told from others.
    :ivar isNode: the node itself.
    :ivar detected: pods of that family can be told from others at all.
    :ivar why: for people.
    """

    isPod: bool
    isNode: bool
    detected: bool
    why: str

    @property
    def isInside(self) -> bool:
        """It meets the inside pool of a frontend."""
        return self.isPod or self.isNode


class Decision(Struct, frozen=True):
    """
    What becomes of a flow.

    :ivar hit: what is dialled. Without a service port (all but ``service`` and ``not served here``) there is neither
        ``port`` nor ``frontend``; without ``service`` none of ``pool``, ``endpoints`` and ``masquerade`` says anything.
    :ivar admitted: ``loadBalancerSourceRanges`` let the source in, or there are none, or it is anybody's.
    :ivar pool: the one that serves it, or would if it had endpoints; ``None`` where it does not come to that.
    :ivar endpoints: the members of that pool, any of which may get the flow.
    :ivar masquerade: why a dataplane in the kernel rewrites the source whichever endpoint is chosen; ``None`` where
        only the endpoint decides: see :meth:`masqueradeTo`.
    :ivar why: the verdict for people.
    """

    flow: Flow
    origin: Origin
    hit: Hit
    verdict: FlowVerdict
    why: str
    port: ServicePort | None = None
    frontend: Frontend | None = None
    admitted: bool = True
    pool: PoolKind | None = None
    endpoints: tuple[Endpoint, ...] = ()
    masquerade: Masquerade | None = None

    @property
    def owner(self) -> ServicePortName | None:
        """The service port that owns what is dialled."""
        return self.port.name if self.port is not None else None

    def masqueradeTo(self, endpoint: Endpoint) -> Masquerade | None:
        """
        Why a dataplane in the kernel rewrites the source of packets to that endpoint, ``None`` where it does not. A
        proxy in userspace dials by itself: its endpoints see an address of the node in any case.
        """
        if self.masquerade is None and endpoint.address == self.flow.source:
            return "hairpin"
        return self.masquerade


class Frontends:
    """Finds who owns a frontend. Made once for each map; it goes with the map."""

    def __init__(self, services: ServiceMap) -> None:
        self.services = services
        self._owners: dict[FrontendKey, tuple[ServicePort, Frontend]] = {}
        self._clusterIPs: set[str] = set()
        for port in services.values():
            for frontend in port.frontends:
                self._owners[port.key(frontend)] = port, frontend
                if frontend.kind == "ClusterIP" and frontend.address:
                    self._clusterIPs.add(frontend.address)

    def find(self, flow: Flow, node: bool = False) -> tuple[ServicePort, Frontend] | None:
        """:param node: look among the node ports, not among the addresses of Services."""
        address = "" if node else flow.destination
        return self._owners.get(FrontendKey(flow.family, flow.protocol, address, flow.port))  # type: ignore[arg-type]

    def isClusterIP(self, address: str) -> bool:
        """Whether a Service has that address as its ClusterIP."""
        return address in self._clusterIPs


def originOf(flow: Flow, locality: Locality, addresses: Collection[str]) -> Origin:
    """
    Where a flow comes from.

    :param addresses: of the node, canonical.
    """
    networks = _podNetworks(locality, flow.family)
    links = locality.insiderLinks
    detected = bool(networks or links)
    if flow.fromNode:
        return Origin(False, True, detected, "it comes from the node itself")
    if isOwn(flow.source, addresses):
        return Origin(False, True, detected, f"{flow.source} is an address of this node")
    for it in networks:
        if contains((it,), flow.source):
            return Origin(True, False, detected, f"{flow.source} is in {it}, a pod network")
    for it in links:
        if flow.link is not None and _isLink(it, flow.link):
            return Origin(True, False, detected, f"{flow.link} is an interface of pods ({it})")
    if not detected:
        return Origin(False, False, False, f"pods cannot be told from others: no {flow.family} pod network is known")
    if flow.link is None and not networks:
        return Origin(False, False, True, "the interface is not given; pods are told by it")
    where = f"{flow.link} is no interface of pods" if links else f"{flow.source} is in no pod network"
    return Origin(False, False, True, where)


def anybody(isInside: bool, locality: Locality, family: Family) -> Origin:
    """Where a flow comes from of which no more is known than on which side it begins."""
    detected = bool(_podNetworks(locality, family) or locality.insiderLinks)
    if not isInside:
        return Origin(False, False, detected, "as anybody from elsewhere")
    if detected:
        return Origin(True, False, True, "as a pod of this node; the node itself meets the same pool")
    return Origin(False, True, False, f"as the node itself: no {family} pod network is known")


def _podNetworks(locality: Locality, family: Family) -> tuple[str, ...]:
    return tuple(it for it in locality.insiders if familyOf(it) == family)


def _isLink(pattern: str, link: str) -> bool:
    return link.startswith(pattern[:-1]) if pattern.endswith("*") else link == pattern


def isOwn(address: str, addresses: Collection[str]) -> bool:
    """Whether an address is one of the node: those that are given, and the loopback ones."""
    return address in addresses or contains((LOCALHOST[familyOf(address)],), address)


def decide(
    frontends: Frontends,
    addresses: Collection[str],
    flow: Flow,
    masqueradeAll: bool = False,
    origin: Origin | None = None,
) -> Decision:
    """
    What becomes of a flow: first the addresses of Services count, then node ports, then what belongs to no Service.

    :param addresses: of the node, canonical: where node ports may be served.
    :param masqueradeAll: as in the configuration.
    :param origin: where it comes from, if not what the flow itself says.
    """
    locality = frontends.services.locality
    origin = origin or originOf(flow, locality, addresses)
    found = frontends.find(flow)
    if found is not None:
        return serve(flow, origin, *found, masqueradeAll)
    what = f"{flow.port}/{flow.protocol}"
    if frontends.isClusterIP(flow.destination):
        why = f"{flow.destination} is a ClusterIP, and no Service that has it has a port {what}"
        return Decision(flow, origin, "no such port", "reject", why)
    if isOwn(flow.destination, addresses):
        found = frontends.find(flow, node=True)
        if found is None:
            why = f"{flow.destination} is an address of this node, and {what} is no node port"
            return Decision(flow, origin, "none", "untouched", why)
        if not contains(locality.nodePorts, flow.destination):
            why = f"node ports are not served at {flow.destination}: it is in none of the networks for them"
            return Decision(flow, origin, "not served here", "untouched", why, *found)
        return serve(flow, origin, *found, masqueradeAll)
    if contains(locality.services, flow.destination):
        why = f"{flow.destination} is in a network of ClusterIPs, and no Service has it"
        return Decision(flow, origin, "unallocated", "drop", why)
    why = f"{flow.destination} port {what} is no frontend of any Service"
    return Decision(flow, origin, "none", "untouched", why)


def serve(
    flow: Flow, origin: Origin, port: ServicePort, frontend: Frontend, masqueradeAll: bool = False
) -> Decision:
    """What becomes of a flow to that frontend of that service port."""
    if frontend.sources is not None and flow.source and not contains(frontend.sources, flow.source):
        why = f"{flow.source} is in none of loadBalancerSourceRanges"
        return Decision(flow, origin, "service", "drop", why, port, frontend, admitted=False)
    kind = frontend.insidePool if origin.isInside else frontend.pool
    pool = port.pool(kind)
    if pool:
        verdict: FlowVerdict = "endpoints"
        whose = "any endpoint" if kind == "cluster" else "an endpoint of this node"
        why = f"{whose} may serve it"
    elif port.reachable:
        verdict = "drop"
        why = f"endpoints exist, but the {kind} pool has none: the client is to try again, and elsewhere"
    else:
        verdict, why = "reject", "no endpoint can be used anywhere"
    masquerade = _masquerade(frontend, origin, masqueradeAll) if pool else None
    return Decision(flow, origin, "service", verdict, why, port, frontend, True, kind, pool, masquerade)


def _masquerade(frontend: Frontend, origin: Origin, masqueradeAll: bool) -> Masquerade | None:
    """
    Replies must come back through this node where it has rewritten the destination, and the endpoint may be elsewhere.
    The node itself is no pod: what it sends to a ClusterIP counts as off-cluster.
    """
    if frontend.kind == "ClusterIP":
        if masqueradeAll:
            return "masquerade-all"
        return "off-cluster" if origin.detected and not origin.isPod else None
    if frontend.pool == "cluster":
        return "external"
    # The chosen source may be the very address of the load balancer, which the endpoint would answer in vain.
    return "node" if origin.isNode else None
