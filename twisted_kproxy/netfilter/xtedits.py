"""What is done to a table that has just been read: as a whole, or by the step from one ruleset to the next."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from ..core.rules import Delta, Ruleset
from ..core.values import Family, FrontendKey
from .xtbytes import UnknownBytes, normalised, pack
from .xtlayout import CHAINS, GUARD, REFUSE, Content, TableName, guardEntries, insidersOf, ruleEntries
from .xttables import LiveTable


class Edits(Struct):
    """What a delta means for the chains of one family: ``(chain, bytes)``."""

    natGone: list[tuple[str, bytes]]
    natNew: list[tuple[str, bytes]]
    filterGone: list[tuple[str, bytes]]
    filterNew: list[tuple[str, bytes]]
    guardsNew: list[tuple[str, bytes]]


def editsOf(family: Family, old: Ruleset, new: Ruleset, changed: Delta) -> Edits:
    """What has to go from the chains and what to come; what a rule keeps stays where it is, with its counters."""
    edits = Edits([], [], [], [], [])
    own = insidersOf(family, new.insiders)

    def packed(key: FrontendKey, ruleset: Ruleset) -> dict[tuple[TableName, str], list[bytes]]:
        rule = ruleset.rules.get(key)
        chains: dict[tuple[TableName, str], list[bytes]] = {}
        for table, chain, entry in ruleEntries(key, rule, own) if rule else ():
            chains.setdefault((table, chain), []).append(pack(entry))
        return chains

    for key in changed.rules:
        if key.family == family:
            before, after = packed(key, old), packed(key, new)
            for where in before.keys() | after.keys():
                gone, come = before.get(where, []), after.get(where, [])
                if gone != come:
                    table, chain = where
                    (edits.natGone if table == "nat" else edits.filterGone).extend((chain, it) for it in gone)
                    (edits.natNew if table == "nat" else edits.filterNew).extend((chain, it) for it in come)
    for guard in sorted(new.guards - old.guards):
        if guard.family == family:
            edits.guardsNew.extend((GUARD, pack(entry)) for entry in guardEntries(guard))
    for guard in sorted(old.guards - new.guards):
        if guard.family == family:
            edits.filterGone.extend((GUARD, pack(entry)) for entry in guardEntries(guard))
    return edits


def writeAll(table: LiveTable, content: dict[str, list[bytes]]) -> None:
    """Exactly this, in our chains; with the rules that lead to them."""
    table.removeOwn(keep=CHAINS[table.name])
    for chain, entries in content.items():
        table.clear(chain)
        table.append(chain, entries)
    table.placeJumps()


def guardsFirst(table: LiveTable, content: Content) -> None:
    """Before anything leads to a port of the proxy, it is guarded. Guards that shall go stay for now."""
    if not table.isChain(GUARD) or not table.isChain(REFUSE):
        writeAll(table, content.filter)
        return
    present = set()
    for data, _ in table.rules(GUARD):
        try:
            present.add(normalised(table.family, data))
        except UnknownBytes:
            pass
    table.append(GUARD, [data for data in content.filter[GUARD] if data not in present])


def edit(table: LiveTable, gone: Iterable[tuple[str, bytes]], come: Iterable[tuple[str, bytes]]) -> None:
    """
    Take rules out, put others at the end.

    :raise Gone: where one that was to be taken out is not there.
    """
    for chain, data in gone:
        table.delete(chain, [data])
    for chain, data in come:
        table.append(chain, [data])


def remove(table: LiveTable) -> None:
    """Everything of ours."""
    if table.ownChains():
        table.removeOwn()
