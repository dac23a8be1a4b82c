"""What is done to a table that has just been read: as a whole, or by the step from one ruleset to the next."""

from __future__ import annotations

from collections.abc import Iterable

from .xtbytes import UnknownBytes, normalised
from .xtlayout import CHAINS, GUARD, REFUSE, Content
from .xttables import LiveTable


def writeAll(table: LiveTable, content: dict[str, list[bytes]]) -> None:
    """Exactly this, in our chains; with the rules that lead to them."""
    table.removeOwn(keep=CHAINS[table.name])
    for chain, entries in content.items():
        table.clear(chain)
        table.append(chain, entries)
    table.placeJumps()


def guardsFirst(table: LiveTable, content: Content[bytes]) -> None:
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
