"""
The endpoints that slices have for one service port: which count at all, and of duplicates which one.

The rules are those of kubernetes ``pkg/proxy/endpointslicecache.go``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from msgspec import Struct

from . import wire
from .addresses import BadAddress, canonical, isMapped, unusable
from .topology import Candidate, NodeFacts
from .values import Family, Protocol


class Unfit(Struct, frozen=True):
    """
    Why a member of a slice can be no endpoint.

    :ivar problem: the same for who has to mend the slice; empty where nothing is wrong with it.
    :ivar refused: the address, where it is one that must not be reached.
    """

    reason: str
    problem: str = ""
    refused: str = ""


class Seen(Struct, frozen=True):
    """
    What was found of one member of one slice.

    :ivar fate: the candidate that it is, which counts if it is the very one under its key; or why it is none.
    """

    slice: wire.EndpointSlice
    member: wire.SliceEndpoint
    fate: Candidate | str


#: is told of what is wrong: the slice, the problem, and the address that must not be reached, where it is that
Complain: TypeAlias = Callable[[wire.EndpointSlice, str, str], None]


def ordered(slices: Iterable[wire.EndpointSlice]) -> list[wire.EndpointSlice]:
    """In the order in which they are gathered: it must not depend on the order in which they came."""
    return sorted(slices, key=lambda it: it.metadata.name)


def gather(
    slices: Iterable[wire.EndpointSlice],
    name: str,
    protocol: Protocol,
    family: Family,
    node: NodeFacts,
    complain: Complain,
    seen: list[Seen] | None = None,
) -> dict[str, Candidate]:
    """
    Every endpoint of one service port, once: of duplicates the one that :func:`ranks <rank>` highest.

    :param slices: of the Service, :func:`ordered`.
    :param name: of the service port.
    :param seen: takes what was found of every member, where somebody wants to know.
    :return: by address and port.
    """
    found: dict[str, Candidate] = {}
    for it in slices:
        if it.addressType != family:
            if seen is not None:
                why = f"its slice is of {it.addressType} addresses; this service port is {family}"
                seen.extend(Seen(it, member, why) for member in it.endpoints or ())
            continue
        used, why = False, f"its slice has no port {name!r} for {protocol}"
        for port in it.ports or ():
            if port.name is None:
                complain(it, "a port without name is ignored", "")
            elif port.name == name and (port.protocol or "TCP") == protocol:
                if port.port is None or not 0 < port.port < 65536:
                    why = f"port {name!r} has no usable number ({port.port})"
                    complain(it, f"{why} and is ignored", "")
                else:
                    used = True
                    _take(it, port.port, family, node, found, complain, seen)
        if seen is not None and not used:
            seen.extend(Seen(it, member, why) for member in it.endpoints or ())
    return found


def _take(
    it: wire.EndpointSlice,
    port: int,
    family: Family,
    node: NodeFacts,
    found: dict[str, Candidate],
    complain: Complain,
    seen: list[Seen] | None,
) -> None:
    for member in it.endpoints or ():
        candidate = judged(member, port, family, node)
        if isinstance(candidate, Unfit):
            if candidate.problem:
                complain(it, candidate.problem, candidate.refused)
            if seen is not None:
                seen.append(Seen(it, member, candidate.reason))
            continue
        if seen is not None:
            seen.append(Seen(it, member, candidate))
        twin = found.get(candidate.key)
        if twin is None or rank(twin) < rank(candidate):
            found[candidate.key] = candidate


def rank(it: Candidate) -> tuple[object, ...]:
    """
    Of two with the same address and port, the one that ranks higher counts: a running pod beats a terminating one that
    had the same address, and a ready one beats one that is not, whatever their order.
    """
    return not it.terminating, it.ready, it.serving, it.isLocal, sorted(it.zones), sorted(it.nodes)


#: what the loser of two is told, by the first part of :func:`rank` in which they differ
OUTRANKED = (
    "this one is terminating",
    "this one is not ready",
    "this one is not serving",
    "this one is not on this node",
    "their hints differ",
    "their hints differ",
)


def article(word: str) -> str:
    """That goes before one of the words about addresses."""
    return "an" if word[0] in "Iu" else "a"


def judged(member: wire.SliceEndpoint, port: int, family: Family, node: NodeFacts) -> Candidate | Unfit:
    """What a member of a slice of that family is."""
    if not member.addresses:
        return Unfit("it has no address")
    try:
        address, actual = canonical(member.addresses[0])
    except BadAddress as error:
        return Unfit(str(error), f"endpoint: {error}")
    kind = unusable(address) or ("IPv4-mapped" if isMapped(member.addresses[0]) else None)
    if kind:
        shown = address if kind != "IPv4-mapped" else member.addresses[0]
        why = f"{shown} is {article(kind)} {kind} address"
        return Unfit(why, f"endpoint {why}; it is not used", address)
    if actual != family:
        why = f"is not an {family} address"
        return Unfit(f"{address} {why}", f"endpoint {address} {why}; it is not used")
    conditions = member.conditions or wire.EndpointConditions()
    # discovery.k8s.io/v1beta1 names the node by a topology label
    nodeName = member.nodeName or (member.topology or {}).get("kubernetes.io/hostname")
    hints = member.hints or wire.EndpointHints()
    return Candidate(
        address=address,
        port=port,
        ready=conditions.ready is not False,
        serving=conditions.serving is not False,
        terminating=conditions.terminating is True,
        isLocal=bool(nodeName) and nodeName == node.name,
        zones=frozenset(it.name for it in hints.forZones or ()),
        nodes=frozenset(it.name for it in hints.forNodes or ()),
        nodeName=nodeName or "",
    )
