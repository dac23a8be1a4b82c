"""Rules to try a machine with, and what a machine that cannot have some of them refuses."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.rules import Guard, Rule, Ruleset, Target
from ..core.values import Family, FrontendKey, Protocol
from .xtbytes import Entry
from .xtlayout import TableName, guardEntries, insiderEntries, ruleEntries


def shapes(family: Family) -> list[tuple[TableName, str, Entry]]:
    """One rule of each shape that is ever written, without SCTP."""
    four = family == "IPv4"
    address, cidr, node = ("192.0.2.1", "10.0.0.0/9", "192.0.2.9") if four else ("2001:db8::1", "fd00::/57", "fd00::9")
    one, two = Target(node, 40001), Target(node, 40002)
    rules = (Rule(one, two), Rule("reject", "drop"), Rule("drop", one), Rule(one, "reject"))
    keys = (FrontendKey(family, "TCP", address, 80), FrontendKey(family, "UDP", "", 30080))
    entries = [it for key in keys for rule in rules for it in ruleEntries(key, rule, [cidr])]
    protocols: tuple[Protocol, ...] = ("TCP", "UDP")
    for protocol in protocols:
        for entry in guardEntries(Guard(family, protocol, 40001)):
            entries.append(("filter", "KPROXY-GUARD", entry))
    entries += [("nat", "KPROXY-INSIDERS", entry) for entry in insiderEntries(family, [cidr])]
    return entries


def sctpShapes(family: Family) -> list[tuple[TableName, str, Entry]]:
    """The same for SCTP, which many kernels have no match for."""
    key = FrontendKey(family, "SCTP", "", 30080)
    node = "192.0.2.9" if family == "IPv4" else "fd00::9"
    rules = (Rule(Target(node, 4), Target(node, 4)), Rule("drop", "drop"))
    entries = [it for rule in rules for it in ruleEntries(key, rule, ())]
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
    return "", keys
