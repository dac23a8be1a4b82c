"""
Which endpoints each pool of a service port may use: readiness, termination, locality and hints, decided once.

The rules are those of kubernetes ``pkg/proxy/topology.go`` (``CategorizeEndpoints``), KEP-1669 (serving while
terminating), KEP-2433 and KEP-4444 (hints).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct

from .values import Endpoint, hostPort

StageName: TypeAlias = Literal["ready", "terminating", "local", "node hints", "zone hints"]


class NodeFacts(Struct, frozen=True):
    """
    What is known of the node that the proxy runs on.

    :ivar name: as Kubernetes knows it.
    :ivar zone: its label ``topology.kubernetes.io/zone``.
    :ivar addresses: its own, as its Node object has them.
    :ivar servers: address and port of each server that sources are read from.
    :ivar allowed: networks that external IPs and addresses of load balancers must be in; none for no such restriction.
    :ivar denied: networks that they must not be in.
    :ivar taken: TCP ports where this proxy itself answers, at addresses that node ports are served on.
    """

    name: str = ""
    zone: str = ""
    addresses: frozenset[str] = frozenset()
    servers: frozenset[tuple[str, int]] = frozenset()
    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    taken: frozenset[int] = frozenset()


class Candidate(Struct, frozen=True):
    """
    One endpoint of one service port, before anything is decided.

    :ivar serving: it answers, even if it should get no new work.
    :ivar zones: hints ``forZones``; empty for none.
    :ivar nodes: hints ``forNodes``; empty for none.
    :ivar nodeName: where it runs; empty where that is not said.
    """

    address: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    isLocal: bool = False
    zones: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    nodeName: str = ""

    @property
    def key(self) -> str:
        return hostPort(self.address, self.port)


class Stage(Struct, frozen=True):
    """
    One step of a choice: it lets some endpoints through. Who is left out by the first step that leaves it out is left
    out for that reason.

    :ivar what: ``ready`` lets those through that are ready, ``terminating`` (where none is) those that still serve,
        ``local`` those of this node, ``node hints`` and ``zone hints`` those whose hints name this node or zone.
    :ivar kept: those let through.
    :ivar without: of hints: an endpoint that has none of that kind, which switches them off for all; then none is kept.
    """

    what: StageName
    kept: Sequence[Candidate]
    without: Candidate | None = None


class Sifted(Struct, frozen=True):
    """
    How both pools come to be.

    :ivar cluster: the steps to the cluster pool, which is what the last one lets through; ``local`` the same.
    :ivar hints: steps by hints that were tried; one that let somebody through is the last of ``cluster`` as well.
    """

    cluster: tuple[Stage, ...]
    local: tuple[Stage, ...]
    hints: tuple[Stage, ...] = ()


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
    """Decide both pools."""
    every = list(candidates)
    sifted = sift(every, node)
    usable, local = sifted.cluster[0], sifted.local[-1]
    return Pools(
        cluster=endpointsOf(sifted.cluster[-1].kept),
        local=endpointsOf(local.kept),
        reachable=bool(usable.kept),
        localReady=frozenset(it.address for it in local.kept) if local.what == "ready" else frozenset(),
        serving=frozenset(it.key for it in every if it.serving),
    )


def sift(every: Sequence[Candidate], node: NodeFacts) -> Sifted:
    """
    Choose step by step.

    Ready endpoints are used if there are any; else those that serve while terminating, separately for the cluster
    pool (which then ignores hints) and the local one.
    """
    usable = _usable(every)
    here = Stage("local", [it for it in every if it.isLocal])
    local = (here, _usable(here.kept))
    if usable.what != "ready":
        return Sifted((usable,), local)
    hints: list[Stage] = []
    for step in _hinted(usable.kept, node):
        hints.append(step)
        if step.kept:
            return Sifted((usable, step), local, tuple(hints))
    return Sifted((usable,), local, tuple(hints))


def _usable(every: Sequence[Candidate]) -> Stage:
    ready = [it for it in every if it.ready]
    if ready:
        return Stage("ready", ready)
    return Stage("terminating", [it for it in every if it.serving and it.terminating])


def _hinted(ready: Sequence[Candidate], node: NodeFacts) -> Iterator[Stage]:
    """One endpoint without a hint switches that level of hints off, as does a level that names nobody here."""
    for it in ready:
        if not it.nodes:
            yield Stage("node hints", (), it)
            break
    else:
        yield Stage("node hints", [it for it in ready if node.name in it.nodes])
    for it in ready:
        if not it.zones:
            yield Stage("zone hints", (), it)
            break
    else:
        yield Stage("zone hints", [it for it in ready if node.zone and node.zone in it.zones])


def endpointsOf(candidates: Iterable[Candidate]) -> tuple[Endpoint, ...]:
    """A pool of these."""
    return tuple(sorted(Endpoint(it.address, it.port, it.isLocal) for it in candidates))
