"""
Why an endpoint is in a pool, or is not: the steps by which :mod:`~twisted_kproxy.core.candidates` and
:mod:`~twisted_kproxy.core.topology` decide, put into words. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from . import wire
from .candidates import OUTRANKED, Seen, gather, ordered, rank
from .topology import Candidate, NodeFacts, Sifted, Stage, endpointsOf, sift
from .values import Endpoint, PoolKind, ServicePortName

_KINDS: tuple[PoolKind, ...] = ("cluster", "local")


class Fate(Struct, frozen=True):
    """
    What becomes of one endpoint of one slice.

    :ivar slice: ``namespace/name`` of the slice.
    :ivar address: address and port; where it can be no endpoint, the address as the slice has it.
    :ivar endpoint: ``None`` where it can be none.
    :ivar node: where it runs; empty where the slice does not say.
    :ivar reasons: why it is not in a pool; it is in those that are not in here.
    """

    slice: str
    address: str
    endpoint: Endpoint | None
    node: str
    ready: bool
    serving: bool
    terminating: bool
    reasons: Mapping[PoolKind, str]

    @property
    def pools(self) -> tuple[PoolKind, ...]:
        """Those that it is in."""
        return tuple(kind for kind in _KINDS if kind not in self.reasons)


class Explanation(Struct, frozen=True):
    """
    :ivar fates: of every endpoint of every slice of the Service, in the order of slices.
    :ivar notes: what holds for a whole pool: what it falls back to, and why hints do not count.
    :ivar cluster: the pool that comes of it; ``local`` the same.
    """

    name: ServicePortName
    fates: tuple[Fate, ...]
    notes: tuple[str, ...]
    cluster: tuple[Endpoint, ...]
    local: tuple[Endpoint, ...]

    def pool(self, kind: PoolKind) -> tuple[Endpoint, ...]:
        return self.local if kind == "local" else self.cluster


def explain(name: ServicePortName, slices: Iterable[wire.EndpointSlice], node: NodeFacts) -> Explanation:
    """
    Explain the pools of one service port.

    :param slices: of its Service, of both families.
    """
    seen: list[Seen] = []
    found = gather(ordered(slices), name.port, name.protocol, name.family, node, _quiet, seen)
    sifted = sift(list(found.values()), node)
    judge = _Judge(seen, found, sifted)
    return Explanation(
        name,
        tuple(judge.fate(number) for number in range(len(seen))),
        tuple(_notes(sifted, node)),
        endpointsOf(sifted.cluster[-1].kept),
        endpointsOf(sifted.local[-1].kept),
    )


def _quiet(it: wire.EndpointSlice, reason: str, refused: str) -> None:
    """Whoever resolves the Service has told of it."""


class _Judge:
    """Puts the decisions about one endpoint after the other into words."""

    def __init__(self, seen: Sequence[Seen], found: Mapping[str, Candidate], sifted: Sifted) -> None:
        self._seen = seen
        self._found = found
        self._places = {id(it.fate): number for number, it in enumerate(seen)}
        self._steps: dict[PoolKind, list[tuple[Stage, set[int]]]] = {
            "cluster": [(step, {id(it) for it in step.kept}) for step in sifted.cluster],
            "local": [(step, {id(it) for it in step.kept}) for step in sifted.local],
        }

    def fate(self, number: int) -> Fate:
        """:param number: of what was seen."""
        it = self._seen[number]
        conditions = it.member.conditions or wire.EndpointConditions()
        candidate = it.fate
        if isinstance(candidate, str):
            endpoint, node = None, it.member.nodeName or ""
            address = (it.member.addresses or ["(none)"])[0]
            reasons: dict[PoolKind, str] = dict.fromkeys(_KINDS, candidate)
        else:
            endpoint, node = Endpoint(candidate.address, candidate.port, candidate.isLocal), candidate.nodeName
            address, reasons = candidate.key, self._reasons(candidate)
        return Fate(
            slice=wire.keyOf(it.slice.metadata),
            address=address,
            endpoint=endpoint,
            node=node,
            ready=conditions.ready is not False,
            serving=conditions.serving is not False,
            terminating=conditions.terminating is True,
            reasons=reasons,
        )

    def _reasons(self, candidate: Candidate) -> dict[PoolKind, str]:
        counts = self._found[candidate.key]
        if counts is not candidate:
            place = self._places[id(counts)]
            where = wire.keyOf(self._seen[place].slice.metadata)
            better = zip(rank(counts), rank(candidate), strict=True)
            differs = next((part for part, (one, other) in enumerate(better) if one != other), None)
            why = OUTRANKED[differs] if differs is not None else "it says the same and comes first"
            return dict.fromkeys(_KINDS, f"a duplicate: that of {where} counts, since {why}")
        reasons: dict[PoolKind, str] = {}
        for kind, steps in self._steps.items():
            stopped = next((step for step, kept in steps if id(candidate) not in kept), None)
            if stopped is not None:
                reasons[kind] = _words(stopped, candidate)
        return reasons


def _words(stage: Stage, it: Candidate) -> str:
    if stage.what == "local":
        return f"not on this node, but on {it.nodeName}" if it.nodeName else "its slice does not say where it runs"
    if stage.what == "node hints":
        return f"its hints are for other nodes: {_some(it.nodes)}"
    if stage.what == "zone hints":
        return f"its hints are for other zones: {_some(it.zones)}"
    if not it.terminating:
        return "not ready"
    if not it.serving:
        return "terminating, and no longer serving"
    return "terminating, while others are ready"


def _some(names: Iterable[str], most: int = 5) -> str:
    known = sorted(names)
    return ", ".join(known[:most]) + (", …" if len(known) > most else "")


def _notes(sifted: Sifted, node: NodeFacts) -> Iterator[str]:
    usable, local = sifted.cluster[0], sifted.local[-1]
    if usable.what == "terminating" and usable.kept:
        yield "cluster: none is ready, so those that still serve while terminating are used"
        if any(it.nodes or it.zones for it in usable.kept):
            yield "cluster: hints do not count for endpoints that are terminating"
    if local.what == "terminating" and local.kept:
        yield "local: none of this node is ready, so those that still serve while terminating are used"
    for step in sifted.hints:
        level = "nodes" if step.what == "node hints" else "zones"
        if step.without is not None:
            if any(it.nodes if level == "nodes" else it.zones for it in usable.kept):
                yield f"cluster: hints for {level} do not count, since {step.without.key} has none"
        elif not step.kept:
            if level == "zones" and not node.zone:
                yield "cluster: hints for zones do not count, since the zone of this node is not known"
            else:
                where = node.name if level == "nodes" else node.zone
                yield f"cluster: hints for {level} do not count, since none is for {where}"
