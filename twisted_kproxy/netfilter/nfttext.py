"""Our table in nf_tables as text for ``nft``: chains, sets and elements; and what ``nft`` lists of them. Pure."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from ..core.rules import PROXY_MARK, Guard, Ruleset, Target
from ..core.values import FAMILIES, FrontendKey, Protocol
from ..interfaces import RulesRejected
from .nftlayout import (
    ALLOWED,
    BLOCKS,
    BREATH,
    CLUSTER_IPS,
    DIGITS,
    GUARDS,
    LAYOUT,
    MAPS,
    NAMES,
    NETWORKS,
    RESTRICTED,
    SETS,
    Allowed,
    Block,
    Element,
    Item,
    Step,
    Unreadable,
    gathered,
    localityOf,
)
from .slices import Slices, finish

# --- structure -------------------------------------------------------------------------------------------------------

_PROTOCOLS = "meta l4proto { tcp, udp, sctp }"


#: What a link of insiders may be called: nft has no way to say other names.
_LINK = re.compile(r"[^\s/:\"*\\\x00-\x1f]{1,15}\*?")


def _byLink(links: tuple[str, ...]) -> list[str]:
    """For each link what matches it, with itself as the comment, from which it is read back."""
    found = []
    for link in links:
        if not _LINK.fullmatch(link):
            raise RulesRejected(f"{link!r} is no name of a network interface that rules could be made for")
        # nft takes no pattern of 16 characters; there is only one name that begins with 15.
        found.append(f'iifname "{link[:15] if len(link) == 16 else link}" meta nfproto {{}} goto {{}} comment "{link}"')
    return found


def chainsFor(links: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """
    Chain → its lines, hook first. Chains that are jumped to come before those that jump.

    :param links: those of insiders.
    :raise RulesRejected: naming one that cannot be written.
    """
    byLink = _byLink(links)
    chains: dict[str, list[str]] = {LAYOUT: [], "refuse": ["meta l4proto tcp reject with tcp reset", "reject"]}
    block = ["type filter hook {} priority -110; policy accept;", "ct state != new accept"]
    rest = ["type filter hook {} priority -90; policy accept;", block[1]]
    ours = f"meta mark & {PROXY_MARK:#x} == {PROXY_MARK:#x} accept"
    fromHere = 'iifname "lo" accept'  # it has been looked at when the node sent it
    hooks: dict[str, list[str]] = {
        "block-prerouting": [block[0].format("prerouting"), block[1], fromHere],
        "block-output": [block[0].format("output"), ours, block[1]],
        "nat-prerouting": ["type nat hook prerouting priority dstnat; policy accept;"],
        "nat-output": ["type nat hook output priority -100; policy accept;", ours],
        "rest-prerouting": [rest[0].format("prerouting"), rest[1], fromHere],
        "rest-output": [rest[0].format("output"), ours, rest[1]],
        "guard": ["type filter hook input priority filter; policy accept;"],
    }
    for family in FAMILIES:
        digit, names = DIGITS[family], NAMES[family]
        ip = "ip" if family == "IPv4" else "ip6"
        mine = f"meta nfproto {family.lower()}"
        frontend = f"{ip} daddr . meta l4proto . th dport"
        dialled = f"{_PROTOCOLS} {frontend}"
        led = f"{_PROTOCOLS} dnat {ip} to {frontend}"
        node = f"{ip} daddr @{names.nodeNetworks} fib daddr type local {_PROTOCOLS}"
        nodePort = f"{node} meta l4proto . th dport"
        nodePortLed = f"{node} dnat {ip} to meta l4proto . th dport"
        restricted = f"{dialled} @{names.restricted} {frontend} . {ip} saddr != @{names.allowed} drop"

        chains[f"block{digit}"] = [
            restricted,
            f"{dialled} vmap @{names.block[True]}",
            f"{nodePort} vmap @{names.block[False]}",
        ]
        chains[f"block{digit}-inside"] = [
            restricted,
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
                *(it.format(family.lower(), f"{what}{digit}-inside") for it in byLink),
                f"{mine} goto {what}{digit}",
            ]
            hooks[f"{hook}-output"].append(f"{mine} goto {what}{digit}-inside")
            hooks[f"rest-{'prerouting' if hook == 'block' else 'output'}"] += [
                f"{ip} daddr @{names.clusterIPs} goto refuse",
                f"{ip} daddr @{names.serviceNetworks} fib daddr type != local drop",
            ]
        hooks["guard"].append(
            f"ct state new ct status ! dnat {mine} {_PROTOCOLS} meta l4proto . th dport @{names.guards} goto refuse"
        )
    return {**chains, **hooks}


def rulesIn(links: tuple[str, ...] = ()) -> dict[str, int]:
    """Chain → how many rules it has."""
    return {chain: sum(not line.startswith("type ") for line in lines) for chain, lines in chainsFor(links).items()}


def linksIn(listing: Mapping[str, Any]) -> tuple[str, ...]:
    """The links of insiders that the rules in a listing of ``nft --json`` are for."""
    rules = [it["rule"] for it in listing.get("nftables", ()) if "rule" in it]
    said = (it["comment"] for it in rules if it.get("chain") == "block-prerouting" and "comment" in it)
    return tuple(dict.fromkeys(said))


def structureText(table: str, version: str, links: tuple[str, ...] = ()) -> str:
    """
    The table without elements, for ``nft -f``; one that is there already is removed in the same transaction.

    :param version: of this program, for the table's comment.
    :param links: see :func:`chainsFor`.
    """
    lines = [f"table inet {table}", f"delete table inet {table}", f"table inet {table} {{"]
    lines.append(f'\tcomment "rules of kproxy {version}; do not edit"')
    for name, (family, hasAddress, leads) in MAPS.items():
        address = f"{family.lower()}_addr"
        key = (f"{address} . " if hasAddress else "") + "inet_proto . inet_service"
        lines.append(f"\tmap {name} {{ type {key} : {f'{address} . inet_service' if leads else 'verdict'}; }}")
    for name, family in RESTRICTED.items():
        lines.append(f"\tset {name} {{ type {family.lower()}_addr . inet_proto . inet_service; }}")
    for name, family in ALLOWED.items():
        key = f"{family.lower()}_addr . inet_proto . inet_service . {family.lower()}_addr"
        lines.append(f"\tset {name} {{ type {key}; flags interval; }}")
    lines += [f"\tset {name} {{ type {family.lower()}_addr; }}" for name, family in CLUSTER_IPS.items()]
    lines += [f"\tset {name} {{ type inet_proto . inet_service; }}" for name in GUARDS]
    lines += [f"\tset {name} {{ type {it[0].lower()}_addr; flags interval; }}" for name, it in NETWORKS.items()]
    for chain, rules in chainsFor(links).items():
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
    try:
        expected = rulesIn(linksIn(listing))
    except RulesRejected:
        expected = {}
    if {chain: count for chain, count in rules.items() if chain not in signed} != expected:
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
        lines += [f"flush {'map' if name in MAPS else 'set'} inet {table} {name}" for name in SETS]
    else:
        lines += [f"flush set inet {table} {name}" for name in step.networks]
    gone: dict[str, list[str]] = {}
    for count, (name, item) in enumerate(step.removed):
        gone.setdefault(name, []).append(_text(item))
        if not count % BREATH:
            yield
    new: dict[str, list[str]] = {}
    for count, (name, item, value) in enumerate(step.added):
        said = _text(item)
        if value is not None:
            said += f" : {value.address} . {value.port}" if isinstance(value, Target) else f" : {BLOCKS[value]}"
        new.setdefault(name, []).append(said)
        if not count % BREATH:
            yield
    new.update((name, list(networks)) for name, networks in step.networks.items() if networks)
    lines += [f"delete element inet {table} {name} {{ {', '.join(elements)} }}" for name, elements in gone.items()]
    lines += [f"add element inet {table} {name} {{ {', '.join(elements)} }}" for name, elements in new.items()]
    return "".join(f"{line}\n" for line in lines)


def _text(item: Item) -> str:
    if isinstance(item, FrontendKey):
        dialled = f"{item.address} . " if item.address else ""
        return f"{dialled}{item.protocol.lower()} . {item.port}"
    if isinstance(item, Allowed):
        return f"{_text(item.key)} . {item.network}"
    if isinstance(item, Guard):
        return f"{item.protocol.lower()} . {item.port}"
    return item


_KNOWN_PROTOCOLS: dict[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}


def readListing(listing: Mapping[str, Any]) -> Ruleset:
    """
    The ruleset in a listing of ``nft --json list table``.

    :raise Unreadable: where it is not what this module writes.
    """
    elements: list[Element] = []
    guards: set[Guard] = set()
    clusterIPs: set[str] = set()
    networks: dict[str, list[str]] = {}
    try:
        for item in listing.get("nftables", ()):
            it = item.get("map") or item.get("set")
            if not it:
                continue
            name, elems = it["name"], it.get("elem", ())
            if name in MAPS:
                elements += [_mapElement(name, *elem) for elem in elems]
            elif name in RESTRICTED or name in ALLOWED:
                elements += [(name, _frontend(name, elem["concat"]), None) for elem in elems]
            elif name in CLUSTER_IPS:
                clusterIPs |= {str(ipaddress.ip_address(elem)) for elem in elems}
            elif name in GUARDS:
                guards |= {Guard(GUARDS[name], _KNOWN_PROTOCOLS[e["concat"][0]], e["concat"][1]) for e in elems}
            elif name in NETWORKS:
                networks[name] = [network for e in elems for network in _networks(e)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable(f"the listing of nft has another form than expected: {error!r}") from error
    locality = localityOf(networks, linksIn(listing))
    return Ruleset(gathered(elements), frozenset(guards), frozenset(clusterIPs), locality)


def _frontend(name: str, parts: list[Any]) -> FrontendKey | Allowed:
    """The key of an element of one of the sets for sources."""
    address, protocol, port, *rest = parts
    family = RESTRICTED.get(name) or ALLOWED[name]
    key = FrontendKey(family, _KNOWN_PROTOCOLS[protocol], str(ipaddress.ip_address(address)), int(port))
    if name in RESTRICTED and not rest:
        return key
    [source] = rest
    [network] = _networks(source)
    return Allowed(key, str(ipaddress.ip_network(network)))


def _mapElement(name: str, key: Mapping[str, Any], value: Mapping[str, Any]) -> Element:
    family, hasAddress, leads = MAPS[name]
    parts = key["concat"]
    address = str(ipaddress.ip_address(parts[0])) if hasAddress else ""
    protocol, port = parts[-2:]
    found = FrontendKey(family, _KNOWN_PROTOCOLS[protocol], address, int(port))
    if leads:
        to, at = value["concat"]
        return name, found, Target(str(ipaddress.ip_address(to)), int(at))
    words: dict[str, Block] = {"goto": "reject", "drop": "drop", "accept": "pass"}
    return name, found, words[next(iter(value))]


def _networks(element: Any) -> list[str]:
    if isinstance(element, str):
        return [element]
    if "prefix" in element:
        return [f"{element['prefix']['addr']}/{element['prefix']['len']}"]
    first, last = (ipaddress.ip_address(it) for it in element["range"])
    return [str(it) for it in ipaddress.summarize_address_range(first, last)]
