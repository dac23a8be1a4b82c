"""
Our table in nf_tables: which chains and sets there are, and which element of which set says what. Pure: text and
values, no kernel.

The table's rules never change; everything about services is in the elements of its maps. A new connection is first
looked at by the ``block`` chains, which answer for frontends that lead nowhere, before any address is rewritten; then
by the ``nat`` chains. The node itself and sources in ``insiders`` are asked for in the ``inside`` maps first; those
hold only what differs. Node ports come after every frontend with an address of its own. The ``guard`` chain refuses
what reaches a port of the proxy without having been led there. What the proxy itself sends to an endpoint carries a
mark, and is let through as it is (:data:`~twisted_kproxy.core.rules.PROXY_MARK`).

TCP is refused by a reset: an ICMP error would do as well for the client, but the kernel sends only a few of them per
second to one host, and what comes after those would wait for its own time-out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from ..core.rules import Delta, Guard, Rule, Ruleset, Target
from ..core.values import FAMILIES, Family, FrontendKey, Protocol
from .ruleset import canonicalNetworks
from .slices import finish

#: Grows with every change of the chains, sets or rules below. It is a chain's name, so that a listing shows it.
LAYOUT = "layout-2"

#: What an element of a ``blocked`` map says; ``pass`` ends the search: insiders are not blocked where others are.
Block: TypeAlias = Literal["reject", "drop", "pass"]
Value: TypeAlias = Target | Block

BLOCKS: dict[Block, str] = {"reject": "goto refuse", "drop": "drop", "pass": "accept"}
PROTOCOLS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
DIGITS: dict[Family, str] = {"IPv4": "4", "IPv6": "6"}


class Unreadable(ValueError):
    """What is in force is not what this module writes."""


class Torn(Unreadable):
    """Each element is one that this module writes, but some do not belong together: somebody has removed others."""


#: How many elements are looked at before there may be an interruption.
BREATH = 64


class Names:
    """The names of one family's sets."""

    def __init__(self, digit: str) -> None:
        self.lead = {True: f"service-ips{digit}", False: f"node-ports{digit}"}
        self.leadInside = {True: f"service-ips{digit}-inside", False: f"node-ports{digit}-inside"}
        self.block = {True: f"blocked-ips{digit}", False: f"blocked-ports{digit}"}
        self.blockInside = {True: f"blocked-ips{digit}-inside", False: f"blocked-ports{digit}-inside"}
        self.guards = f"proxy-ports{digit}"
        self.insiders = f"insiders{digit}"

    def maps(self) -> Iterator[tuple[str, bool, bool]]:
        """Each map that frontends are in: name, whether its key has an address, whether it leads somewhere."""
        for hasAddress in (True, False):
            yield self.lead[hasAddress], hasAddress, True
            yield self.leadInside[hasAddress], hasAddress, True
            yield self.block[hasAddress], hasAddress, False
            yield self.blockInside[hasAddress], hasAddress, False


NAMES: dict[Family, Names] = {family: Names(digit) for family, digit in DIGITS.items()}

#: Every set and map: its name → (family, key has an address, it leads somewhere). Guards and insiders are apart.
MAPS: dict[str, tuple[Family, bool, bool]] = {
    name: (family, hasAddress, leads) for family in FAMILIES for name, hasAddress, leads in NAMES[family].maps()
}
GUARDS: dict[str, Family] = {NAMES[family].guards: family for family in FAMILIES}
INSIDERS: dict[str, Family] = {NAMES[family].insiders: family for family in FAMILIES}
SETS: tuple[str, ...] = (*MAPS, *GUARDS, *INSIDERS)


# --- elements --------------------------------------------------------------------------------------------------------


def placed(key: FrontendKey, rule: Rule) -> list[tuple[str, Value]]:
    """In which sets a frontend is, and what they say of it."""
    names, hasAddress = NAMES[key.family], bool(key.address)
    outside, inside = rule.outside, rule.inside
    leads = isinstance(outside, Target)
    found: list[tuple[str, Value]] = [((names.lead if leads else names.block)[hasAddress], outside)]
    if inside != outside:
        if isinstance(inside, Target):
            found.append((names.leadInside[hasAddress], inside))
            if not leads:
                found.append((names.blockInside[hasAddress], "pass"))
        else:
            found.append((names.blockInside[hasAddress], inside))
    return found


def gathering(elements: Iterable[tuple[str, FrontendKey, Value]]) -> Generator[None, None, dict[FrontendKey, Rule]]:
    """
    The rules that elements (set, key, value) add up to, in slices.

    :raise Torn: where they are not such as :func:`placed` gives.
    """
    found: dict[FrontendKey, dict[str, Value]] = {}
    for count, (name, key, value) in enumerate(elements):
        found.setdefault(key, {})[name] = value
        if not count % BREATH:
            yield
    rules: dict[FrontendKey, Rule] = {}
    for count, (key, said) in enumerate(found.items()):
        names, hasAddress = NAMES[key.family], bool(key.address)
        outside = said.get(names.lead[hasAddress]) or said.get(names.block[hasAddress])
        inside = said.get(names.leadInside[hasAddress]) or said.get(names.blockInside[hasAddress]) or outside
        if outside is None or inside is None or outside == "pass" or inside == "pass":
            raise Torn(f"the elements of {key} do not belong together")
        rule = rules[key] = Rule(outside, inside)
        if dict(placed(key, rule)) != said:
            raise Torn(f"the elements of {key} do not belong together")
        if not count % BREATH:
            yield
    return rules


def gathered(elements: Iterable[tuple[str, FrontendKey, Value]]) -> dict[FrontendKey, Rule]:
    """:func:`gathering` at once."""
    return finish(gathering(elements))


def intervals(networks: Iterable[str], family: Family) -> list[tuple[bytes, bytes | None]]:
    """Networks of one family as (first address, first address after it); ``None`` after the last one there is."""
    found: list[tuple[bytes, bytes | None]] = []
    for text in canonicalNetworks(networks):
        network = ipaddress.ip_network(text)
        if f"IPv{network.version}" != family:
            continue
        last = network.broadcast_address
        end = None if int(last) == (1 << last.max_prefixlen) - 1 else (last + 1).packed
        found.append((network.network_address.packed, end))
    return found


class Step(Struct, frozen=True):
    """
    What one transaction does to the elements: removing comes before adding.

    :ivar strange: elements to remove by their bytes, set and key: those that nobody here would have written.
    :ivar whole: empty every set first.
    """

    removed: list[tuple[str, FrontendKey]] = []
    added: list[tuple[str, FrontendKey, Value]] = []
    guardsRemoved: frozenset[Guard] = frozenset()
    guardsAdded: frozenset[Guard] = frozenset()
    insiders: tuple[str, ...] | None = None
    strange: list[tuple[str, bytes]] = []
    whole: bool = False

    def __len__(self) -> int:
        counts = len(self.removed) + len(self.added) + len(self.guardsRemoved) + len(self.guardsAdded)
        return counts + len(self.strange)


def placing(ruleset: Ruleset) -> Generator[None, None, Step]:
    """From whatever there is to exactly this, in slices."""
    added: list[tuple[str, FrontendKey, Value]] = []
    for count, (key, rule) in enumerate(ruleset.rules.items()):
        added += [(name, key, value) for name, value in placed(key, rule)]
        if not count % BREATH:
            yield
    return Step(added=added, guardsAdded=ruleset.guards, insiders=ruleset.locality.insiders, whole=True)


def wholeStep(ruleset: Ruleset) -> Step:
    """:func:`placing` at once."""
    return finish(placing(ruleset))


def stepping(
    rules: Mapping[FrontendKey, Rule], guards: frozenset[Guard], delta: Delta
) -> Generator[None, None, Step]:
    """
    The elements that a delta changes, in slices.

    :param rules: what is in force.
    :param guards: likewise.
    """
    removed: list[tuple[str, FrontendKey]] = []
    added: list[tuple[str, FrontendKey, Value]] = []
    for count, (key, rule) in enumerate(delta.rules.items()):
        before = rules.get(key)
        if before != rule:
            old = dict(placed(key, before)) if before is not None else {}
            new = dict(placed(key, rule)) if rule is not None else {}
            removed += [(name, key) for name, value in old.items() if new.get(name) != value]
            added += [(name, key, value) for name, value in new.items() if old.get(name) != value]
        if not count % BREATH:
            yield
    insiders = delta.locality.insiders if delta.locality is not None else None
    return Step(removed, added, delta.guardsRemoved & guards, delta.guardsAdded - guards, insiders)


def stepFor(rules: Mapping[FrontendKey, Rule], guards: frozenset[Guard], delta: Delta) -> Step:
    """:func:`stepping` at once."""
    return finish(stepping(rules, guards, delta))
