"""Our table in nf_tables as text for ``nft``: chains, sets and elements; and what ``nft`` lists of them. Pure."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from ..core.rules import PROXY_MARK, Guard, Ruleset, Target
from ..core.values import FAMILIES, FrontendKey, Locality, Protocol
from .nftlayout import (
    BLOCKS,
    BREATH,
    DIGITS,
    GUARDS,
    INSIDERS,
    LAYOUT,
    MAPS,
    NAMES,
    SETS,
    Block,
    Step,
    Unreadable,
    Value,
    gathered,
)
from .ruleset import canonicalNetworks
from .slices import Slices, finish

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

    The table is signed: the name of one of its chains is the :func:`signature` of what was listed when it was made.
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
    signed = [chain for chain in rules if chain.startswith(SIGNATURE)]
    if {chain: count for chain, count in rules.items() if chain not in signed} != RULES:
        return "its chains have been changed"
    if sets != set(SETS):
        return "its sets have been changed"
    if not signed:
        return "its making was interrupted"
    return "" if signed == [signature(listing)] else "its rules have been changed"


#: What the name of the chain begins with that is the table's signature.
SIGNATURE = "made-as-"


def signature(listing: Mapping[str, Any]) -> str:
    """
    A name that is another one when a chain, rule or set in a listing without elements is another one. The same ``nft``
    lists the same table in the same words; after an upgrade of it the table is made anew, in one transaction.
    """
    said: list[tuple[str, dict[str, Any]]] = []
    for item in listing.get("nftables", ()):
        for kind in ("chain", "rule", "map", "set"):
            it = item.get(kind)
            if it is not None and not it.get("name", "").startswith(SIGNATURE):
                said.append((kind, {key: it[key] for key in it if key not in ("handle", "elem", "table", "index")}))
    # Rules in their order; everything else in any.
    ordered = sorted(said, key=lambda it: "" if it[0] == "rule" else f"{it[0]} {it[1].get('name')}")
    return SIGNATURE + sha256(json.dumps(ordered, sort_keys=True).encode()).hexdigest()[:16]


# --- elements as text ------------------------------------------------------------------------------------------------


def stepText(table: str, step: Step) -> str:
    """:func:`telling` at once."""
    return finish(telling(table, step))


def telling(table: str, step: Step) -> Slices[str]:
    """A step for ``nft -f``, in slices."""
    lines: list[str] = []
    if step.whole:
        lines += [f"flush set inet {table} {name}" for name in (*GUARDS, *INSIDERS)]
        lines += [f"flush map inet {table} {name}" for name in MAPS]
    gone: dict[str, list[str]] = {}
    for count, (name, key) in enumerate(step.removed):
        gone.setdefault(name, []).append(_keyText(key))
        if not count % BREATH:
            yield
    for guard in step.guardsRemoved:
        gone.setdefault(NAMES[guard.family].guards, []).append(_guardText(guard))
    new: dict[str, list[str]] = {}
    for count, (name, key, value) in enumerate(step.added):
        said = f"{value.address} . {value.port}" if isinstance(value, Target) else BLOCKS[value]
        new.setdefault(name, []).append(f"{_keyText(key)} : {said}")
        if not count % BREATH:
            yield
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
    return Ruleset(gathered(elements), frozenset(guards), locality=Locality(canonicalNetworks(insiders)))


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
