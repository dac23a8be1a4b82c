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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from ..core.rules import PROXY_MARK, Delta, Guard, Rule, Ruleset, Target
from ..core.values import FAMILIES, Family, FrontendKey, Protocol
from .ruleset import canonicalNetworks

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


# --- structure -------------------------------------------------------------------------------------------------------

_PROTOCOLS = "meta l4proto { tcp, udp, sctp }"


def _chains() -> dict[str, list[str]]:
    """Chain → its lines, hook first. Chains that are jumped to come before those that jump."""
    chains: dict[str, list[str]] = {LAYOUT: [], "refuse": ["meta l4proto tcp reject with tcp reset", "reject"]}
    block = ["type filter hook {} priority -110; policy accept;", "ct state != new accept"]
    ours = f"meta mark & {PROXY_MARK:#x} == {PROXY_MARK:#x} accept"
    hooks: dict[str, list[str]] = {
        "block-prerouting": [block[0].format("prerouting"), block[1], 'iifname "lo" accept'],
        "block-output": [block[0].format("output"), ours, block[1]],
        "nat-prerouting": ["type nat hook prerouting priority dstnat; policy accept;"],
        "nat-output": ["type nat hook output priority -100; policy accept;", ours],
        "guard": ["type filter hook input priority filter; policy accept;"],
    }
    for family in FAMILIES:
        digit, names = DIGITS[family], NAMES[family]
        ip = "ip" if family == "IPv4" else "ip6"
        mine = f"meta nfproto {family.lower()}"
        dialled = f"{_PROTOCOLS} {ip} daddr . meta l4proto . th dport"
        led = f"{_PROTOCOLS} dnat {ip} to {ip} daddr . meta l4proto . th dport"
        nodePort = f"{mine} fib daddr type local {_PROTOCOLS} meta l4proto . th dport"
        nodePortLed = f"{mine} fib daddr type local {_PROTOCOLS} dnat {ip} to meta l4proto . th dport"

        chains[f"block{digit}"] = [
            f"{dialled} vmap @{names.block[True]}",
            f"{nodePort} vmap @{names.block[False]}",
        ]
        chains[f"block{digit}-inside"] = [
            f"{dialled} vmap @{names.blockInside[True]}",
            f"{dialled} vmap @{names.block[True]}",
            f"{nodePort} vmap @{names.blockInside[False]}",
            f"{nodePort} vmap @{names.block[False]}",
        ]
        chains[f"lead{digit}"] = [
            f"{led} map @{names.lead[True]}",
            f"{nodePortLed} map @{names.lead[False]}",
        ]
        chains[f"lead{digit}-inside"] = [
            f"{led} map @{names.leadInside[True]}",
            f"{led} map @{names.lead[True]}",
            f"{nodePortLed} map @{names.leadInside[False]}",
            f"{nodePortLed} map @{names.lead[False]}",
        ]
        for hook, what in (("block", "block"), ("nat", "lead")):
            hooks[f"{hook}-prerouting"] += [
                f"{ip} saddr @{names.insiders} goto {what}{digit}-inside",
                f"{mine} goto {what}{digit}",
            ]
            hooks[f"{hook}-output"].append(f"{mine} goto {what}{digit}-inside")
        hooks["guard"].append(
            f"ct state new ct status ! dnat {mine} {_PROTOCOLS} meta l4proto . th dport @{names.guards} goto refuse"
        )
    return {**chains, **hooks}


CHAINS: dict[str, list[str]] = _chains()

#: Chain → how many rules it has.
RULES: dict[str, int] = {chain: sum(not line.startswith("type ") for line in lines) for chain, lines in CHAINS.items()}


def structureText(table: str, version: str) -> str:
    """
    The table without elements, for ``nft -f``; one that is there already is removed in the same transaction.

    :param version: of this program, for the table's comment.
    """
    lines = [f"table inet {table}", f"delete table inet {table}", f"table inet {table} {{"]
    lines.append(f'\tcomment "rules of kproxy {version}; do not edit"')
    for name, (family, hasAddress, leads) in MAPS.items():
        address = f"{family.lower()}_addr"
        key = (f"{address} . " if hasAddress else "") + "inet_proto . inet_service"
        lines.append(f"\tmap {name} {{ type {key} : {f'{address} . inet_service' if leads else 'verdict'}; }}")
    lines += [f"\tset {name} {{ type inet_proto . inet_service; }}" for name in GUARDS]
    lines += [f"\tset {name} {{ type {family.lower()}_addr; flags interval; }}" for name, family in INSIDERS.items()]
    for chain, rules in CHAINS.items():
        lines.append(f"\tchain {chain} {{")
        lines += [f"\t\t{rule}" for rule in rules]
        lines.append("\t}")
    lines.append("}")
    return "\n".join(lines) + "\n"


def structureProblem(listing: Mapping[str, Any]) -> str:
    """
    What is wrong with the structure in a listing of ``nft --json``: ``""`` for nothing, ``"absent"`` for no table.
    """
    rules: dict[str, int] = {}
    sets: set[str] = set()
    there = False
    for item in listing.get("nftables", ()):
        if "table" in item:
            there = True
        elif "chain" in item:
            rules.setdefault(item["chain"]["name"], 0)
        elif "rule" in item:
            chain = item["rule"]["chain"]
            rules[chain] = rules.get(chain, 0) + 1
        elif "map" in item or "set" in item:
            sets.add((item.get("map") or item.get("set"))["name"])
    if not there:
        return "absent"
    if LAYOUT not in rules:
        return f"it is not of {LAYOUT}"
    if rules != RULES:
        return "its chains have been changed"
    return "" if sets == set(SETS) else "its sets have been changed"


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


def gathered(elements: Iterable[tuple[str, FrontendKey, Value]]) -> dict[FrontendKey, Rule]:
    """
    The rules that elements (set, key, value) add up to.

    :raise Unreadable: where they are not such as :func:`placed` gives.
    """
    found: dict[FrontendKey, dict[str, Value]] = {}
    for name, key, value in elements:
        found.setdefault(key, {})[name] = value
    rules: dict[FrontendKey, Rule] = {}
    for key, said in found.items():
        names, hasAddress = NAMES[key.family], bool(key.address)
        outside = said.get(names.lead[hasAddress]) or said.get(names.block[hasAddress])
        inside = said.get(names.leadInside[hasAddress]) or said.get(names.blockInside[hasAddress]) or outside
        if outside is None or inside is None or outside == "pass" or inside == "pass":
            raise Unreadable(f"the elements of {key} do not belong together")
        rule = rules[key] = Rule(outside, inside)
        if dict(placed(key, rule)) != said:
            raise Unreadable(f"the elements of {key} do not belong together")
    return rules


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

    :ivar whole: empty every set first.
    """

    removed: list[tuple[str, FrontendKey]] = []
    added: list[tuple[str, FrontendKey, Value]] = []
    guardsRemoved: frozenset[Guard] = frozenset()
    guardsAdded: frozenset[Guard] = frozenset()
    insiders: tuple[str, ...] | None = None
    whole: bool = False

    def __len__(self) -> int:
        return len(self.removed) + len(self.added) + len(self.guardsRemoved) + len(self.guardsAdded)


def wholeStep(ruleset: Ruleset) -> Step:
    """From whatever there is to exactly this."""
    added = [(name, key, value) for key, rule in ruleset.rules.items() for name, value in placed(key, rule)]
    return Step(added=added, guardsAdded=ruleset.guards, insiders=ruleset.insiders, whole=True)


def stepFor(rules: Mapping[FrontendKey, Rule], guards: frozenset[Guard], delta: Delta) -> Step:
    """
    The elements that a delta changes.

    :param rules: what is in force.
    :param guards: likewise.
    """
    removed: list[tuple[str, FrontendKey]] = []
    added: list[tuple[str, FrontendKey, Value]] = []
    for key, rule in delta.rules.items():
        before = rules.get(key)
        if before == rule:
            continue
        old = dict(placed(key, before)) if before is not None else {}
        new = dict(placed(key, rule)) if rule is not None else {}
        removed += [(name, key) for name, value in old.items() if new.get(name) != value]
        added += [(name, key, value) for name, value in new.items() if old.get(name) != value]
    return Step(removed, added, delta.guardsRemoved & guards, delta.guardsAdded - guards, delta.insiders)


# --- elements as text ------------------------------------------------------------------------------------------------


def stepText(table: str, step: Step) -> str:
    """A step for ``nft -f``."""
    lines: list[str] = []
    if step.whole:
        lines += [f"flush set inet {table} {name}" for name in (*GUARDS, *INSIDERS)]
        lines += [f"flush map inet {table} {name}" for name in MAPS]
    gone: dict[str, list[str]] = {}
    for name, key in step.removed:
        gone.setdefault(name, []).append(_keyText(key))
    for guard in step.guardsRemoved:
        gone.setdefault(NAMES[guard.family].guards, []).append(_guardText(guard))
    new: dict[str, list[str]] = {}
    for name, key, value in step.added:
        said = f"{value.address} . {value.port}" if isinstance(value, Target) else BLOCKS[value]
        new.setdefault(name, []).append(f"{_keyText(key)} : {said}")
    for guard in step.guardsAdded:
        new.setdefault(NAMES[guard.family].guards, []).append(_guardText(guard))
    if step.insiders is not None:
        if not step.whole:
            lines += [f"flush set inet {table} {name}" for name in INSIDERS]
        for network in canonicalNetworks(step.insiders):
            new.setdefault(NAMES["IPv6" if ":" in network else "IPv4"].insiders, []).append(network)
    lines += [f"delete element inet {table} {name} {{ {', '.join(elements)} }}" for name, elements in gone.items()]
    lines += [f"add element inet {table} {name} {{ {', '.join(elements)} }}" for name, elements in new.items()]
    return "".join(f"{line}\n" for line in lines)


def _keyText(key: FrontendKey) -> str:
    dialled = f"{key.address} . " if key.address else ""
    return f"{dialled}{key.protocol.lower()} . {key.port}"


def _guardText(guard: Guard) -> str:
    return f"{guard.protocol.lower()} . {guard.port}"


_KNOWN_PROTOCOLS: dict[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}


def readListing(listing: Mapping[str, Any]) -> Ruleset:
    """
    The ruleset in a listing of ``nft --json list table``.

    :raise Unreadable: where it is not what this module writes.
    """
    elements: list[tuple[str, FrontendKey, Value]] = []
    guards: set[Guard] = set()
    insiders: list[str] = []
    try:
        for item in listing.get("nftables", ()):
            it = item.get("map") or item.get("set")
            if not it:
                continue
            name, elems = it["name"], it.get("elem", ())
            if name in MAPS:
                elements += [(name, *_mapElement(name, *elem)) for elem in elems]
            elif name in GUARDS:
                guards |= {Guard(GUARDS[name], _KNOWN_PROTOCOLS[e["concat"][0]], e["concat"][1]) for e in elems}
            elif name in INSIDERS:
                insiders += [network for e in elems for network in _networks(e)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable(f"the listing of nft has another form than expected: {error!r}") from error
    return Ruleset(gathered(elements), frozenset(guards), canonicalNetworks(insiders))


def _mapElement(name: str, key: Mapping[str, Any], value: Mapping[str, Any]) -> tuple[FrontendKey, Value]:
    family, hasAddress, leads = MAPS[name]
    parts = key["concat"]
    address = str(ipaddress.ip_address(parts[0])) if hasAddress else ""
    protocol, port = parts[-2:]
    found = FrontendKey(family, _KNOWN_PROTOCOLS[protocol], address, int(port))
    if leads:
        to, at = value["concat"]
        return found, Target(str(ipaddress.ip_address(to)), int(at))
    words: dict[str, Block] = {"goto": "reject", "drop": "drop", "accept": "pass"}
    return found, words[next(iter(value))]


def _networks(element: Any) -> list[str]:
    if isinstance(element, str):
        return [element]
    if "prefix" in element:
        return [f"{element['prefix']['addr']}/{element['prefix']['len']}"]
    first, last = (ipaddress.ip_address(it) for it in element["range"])
    return [str(it) for it in ipaddress.summarize_address_range(first, last)]
