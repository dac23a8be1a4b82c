"""
Which endpoints each pool of a service port may use: readiness, termination, locality and hints, decided once.

The rules are those of kubernetes ``pkg/proxy/topology.go`` (``CategorizeEndpoints``), KEP-1669 (serving while
terminating), KEP-2433 and KEP-4444 (hints).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from .values import Endpoint


class NodeFacts(Struct, frozen=True):
    """
    What is known of the node that the proxy runs on.

    :ivar name: as Kubernetes knows it.
    :ivar zone: its label ``topology.kubernetes.io/zone``.
    :ivar addresses: its own, as its Node object has them.
    :ivar servers: address and port of each server that sources are read from.
    :ivar allowed: networks that external IPs and addresses of load balancers must be in; none for no such restriction.
    :ivar denied: networks that they must not be in.
    """

    name: str = ""
    zone: str = ""
    addresses: frozenset[str] = frozenset()
    servers: frozenset[tuple[str, int]] = frozenset()
    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()


class Candidate(Struct, frozen=True):
    """
    One endpoint of one service port, before anything is decided.

    :ivar serving: it answers, even if it should get no new work.
    :ivar zones: hints ``forZones``; empty for none.
    :ivar nodes: hints ``forNodes``; empty for none.
    """

    address: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    isLocal: bool = False
    zones: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Pools(Struct, frozen=True):
    """
    The decision.

    :ivar reachable: some endpoint of the service port can be used, on whichever node.
    :ivar localReady: addresses of this node's ready endpoints (terminating ones never count).
    """

    cluster: tuple[Endpoint, ...]
    local: tuple[Endpoint, ...]
    reachable: bool
    localReady: frozenset[str]
    serving: frozenset[str]


def categorize(candidates: Iterable[Candidate], node: NodeFacts) -> Pools:
    """
    Decide both pools.

    Ready endpoints are used if there are any; else those that serve while terminating, separately for the cluster
    pool (which then ignores hints) and the local one.
    """
    every = list(candidates)
    ready = [it for it in every if it.ready]
    leaving = [it for it in every if it.serving and it.terminating]
    localReady = [it for it in ready if it.isLocal]
    cluster = _hinted(ready, node) or leaving
    local = localReady or [it for it in leaving if it.isLocal]
    return Pools(
        cluster=_endpoints(cluster),
        local=_endpoints(local),
        reachable=bool(ready or leaving),
        localReady=frozenset(it.address for it in localReady),
        serving=frozenset(it.key for it in every if it.serving),
    )


def _hinted(ready: Sequence[Candidate], node: NodeFacts) -> Sequence[Candidate]:
    """One endpoint without a hint switches that level of hints off, as does a level that names nobody here."""
    if ready and all(it.nodes for it in ready):
        here = [it for it in ready if node.name in it.nodes]
        if here:
            return here
    if ready and node.zone and all(it.zones for it in ready):
        here = [it for it in ready if node.zone in it.zones]
        if here:
            return here
    return ready


def _endpoints(candidates: Iterable[Candidate]) -> tuple[Endpoint, ...]:
    return tuple(sorted(Endpoint(it.address, it.port, it.isLocal) for it in candidates))
