"""Rules to try a machine with, and what a machine that cannot have some of them refuses."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.addresses import familyOf
from ..core.rules import Guard, Rule, Ruleset, Target
from ..core.values import Family, FrontendKey, Locality, Protocol
from .xtbytes import Entry
from .xtlayout import TABLES, Place, TableName, guardEntries, render, ruleEntries


def shapes(family: Family) -> list[tuple[TableName, str, Entry]]:
    """One rule of each shape that is ever written, without SCTP."""
    four = family == "IPv4"
    address, cidr, node = ("192.0.2.1", "10.0.0.0/9", "192.0.2.9") if four else ("2001:db8::1", "fd00::/57", "fd00::9")
    beside, other = ("10.128.0.1", "10.128.0.0/9") if four else ("fd00:0:0:80::1", "fd00:0:0:80::/57")
    one, two = Target(node, 40001), Target(node, 40002)
    rules = [Rule(one, two), Rule("reject", "drop"), Rule("drop", one), Rule(one, "reject")]
    rules += [Rule(it.outside, it.inside, (cidr,)) for it in rules[:3]]
    keys = (FrontendKey(family, "TCP", address, 80), FrontendKey(family, "UDP", "", 30080))
    protocols: tuple[Protocol, ...] = ("TCP", "UDP")
    guards = frozenset(Guard(family, protocol, 40001) for protocol in protocols)
    localities = (
        Locality((cidr,)),
        Locality((cidr,), ("kp0", "kp*"), nodePorts=(cidr,), services=(other,)),
    )
    entries: list[tuple[TableName, str, Entry]] = []
    for number, locality in enumerate(localities):
        for rule in rules:
            ruleset = Ruleset(dict.fromkeys(keys, rule), locality=locality)
            if rule is rules[0]:
                ruleset = Ruleset(ruleset.rules, guards, frozenset({address, beside} if number else ()), locality)
            content = render(ruleset, family, lambda entry: entry)
            for table in TABLES:
                entries += [(table, chain, it) for chain, its in content.of(table).items() for it in its]
    return list(dict.fromkeys(entries))


def sctpShapes(family: Family) -> list[tuple[TableName, str, Entry]]:
    """The same for SCTP, which many kernels have no match for."""
    key = FrontendKey(family, "SCTP", "", 30080)
    node = "192.0.2.9" if family == "IPv4" else "fd00::9"
    rules = (Rule(Target(node, 4), Target(node, 4)), Rule("drop", "drop"))
    entries = [it for rule in rules for it in ruleEntries(key, rule, Place())]
    return entries + [("filter", "KPROXY-GUARD", it) for it in guardEntries(Guard(family, "SCTP", 4))]


def lacking(
    ruleset: Ruleset, missing: Mapping[Family, str], sctp: Mapping[Family, str]
) -> tuple[str, frozenset[FrontendKey]]:
    """
    What of a ruleset cannot be written on this machine: the first of it in words, and all frontends.

    :param missing: family → why its rules cannot be written.
    :param sctp: family → why those of SCTP cannot be.
    """
    if not missing and not sctp:
        return "", frozenset()

    def reason(family: Family, protocol: Protocol) -> str:
        return missing.get(family) or (sctp.get(family, "") if protocol == "SCTP" else "")

    keys = frozenset(key for key in ruleset.rules if reason(key.family, key.protocol))
    for key in sorted(keys):
        return f"{key}: {reason(key.family, key.protocol)}", keys
    for it in ruleset.guards:
        why = reason(it.family, it.protocol)
        if why:
            return f"guard {it.port}/{it.protocol}: {why}", keys
    for address in sorted(ruleset.clusterIPs):
        if familyOf(address) in missing:
            return f"ClusterIP {address}: {missing[familyOf(address)]}", keys
    return "", keys
