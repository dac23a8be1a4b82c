"""What was saved of the tables of iptables, as a state: pure."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import structs

from ..core.rules import Delta, Rule, Ruleset, applied
from ..core.values import Family, FrontendKey
from . import xtscript
from .planning import updating
from .slices import Slices
from .xtbytes import UnknownBytes
from .xtlayout import CHAINS, TABLES
from .xtread import joined, reconstruct
from .xttext import Saved, packedContent

Tables: TypeAlias = dict[Family, dict[str, Saved]]


def stepOf(old: Ruleset, delta: Delta) -> Slices[tuple[Ruleset, Delta]]:
    """What a delta comes to, and what of it is a change at all."""
    rules = dict(old.rules)
    changed: dict[FrontendKey, Rule | None] = {}
    for key, rule in delta.rules.items():
        if rules.get(key) != rule:
            changed[key] = rule
        yield
    yield from updating(rules, changed)
    rest = applied(structs.replace(old, rules={}), structs.replace(delta, rules={}))
    return structs.replace(rest, rules=rules), Delta(changed)


def understood(tables: Tables) -> tuple[Ruleset | None, set[Family]]:
    """
    The ruleset in what was saved, ``None`` where there is none; and the families that have our chains.

    :raise UnknownBytes: where it is none that was written here.
    """
    found: dict[Family, Ruleset] = {}
    for family, there in tables.items():
        content = packedContent(family, there)
        if content is None:
            continue
        if not xtscript.jumpsStand(family, there):
            raise UnknownBytes(f"a rule of {family} that leads to our chains is missing or misplaced")
        found[family] = reconstruct(family, content)
    return joined(found), set(found)


def isOlder(tables: Tables) -> bool:
    """Whether there are chains of ours, but not those that an earlier version did not have."""
    every = {chain for name in TABLES for chain in CHAINS[name]}
    found = [{chain for saved in there.values() for chain in saved.own} for there in tables.values()]
    return any(own and not every <= own for own in found)


def fingerprint(tables: Tables) -> object:
    """Our rules as they stand, to be compared."""
    return hash(
        tuple(
            (family, name, chain, *rules)
            for family, there in tables.items()
            for name, saved in there.items()
            for chain, rules in saved.own.items()
        )
    ), [
        (family, name, it.hook, it.text)
        for family, there in tables.items()
        for name, saved in there.items()
        for it in saved.leads
    ]
