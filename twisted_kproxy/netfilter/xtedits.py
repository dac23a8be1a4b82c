"""What is done to a table that has just been read: as a whole, or by the step from one ruleset to the next."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ..core.values import Family
from .xtbytes import UnknownBytes, parse
from .xtlayout import CHAINS, GUARD, REFUSE, Content, frontendOf
from .xtsteps import Frontend, flat, mendOf
from .xttables import LiveTable


def writeAll(table: LiveTable, content: dict[str, list[bytes]], mend: bool = False) -> None:
    """
    Exactly this, in our chains; with the rules that lead to them.

    :param mend: touch no rule that is as it shall be.
    """
    table.removeOwn(keep=CHAINS[table.name])
    chains, mending = list(content), None
    if mend:
        mending = mendOf(_present(table), content, partial(_frontend, table.family))
        chains = mending.whole
    for chain in chains:  # before any rule that leads there
        table.clear(chain)
    if mending is not None:
        edit(table, flat(mending.gone), flat(mending.come), flat(mending.first))
    for chain in chains:
        table.append(chain, content[chain])
    table.placeJumps()


def _present(table: LiveTable) -> dict[str, list[bytes]]:
    """The chains that can be understood."""
    found: dict[str, list[bytes]] = {}
    for chain in table.ownChains():
        try:
            found[chain] = table.normalised(chain)
        except UnknownBytes:
            continue
    return found


def _frontend(family: Family, chain: str, data: bytes) -> Frontend:
    return frontendOf(chain, parse(family, data))


def guardsFirst(table: LiveTable, content: Content[bytes], mend: bool = False) -> None:
    """Before anything leads to a port of the proxy, it is guarded. Guards that shall go stay for now."""
    if not table.isChain(GUARD) or not table.isChain(REFUSE):
        writeAll(table, content.filter, mend)
        return
    present = set()
    for data, target in table.rules(GUARD):
        try:
            present.add(table.normal(data, target))
        except UnknownBytes:
            pass
    table.append(GUARD, [data for data in content.filter[GUARD] if data not in present])


def edit(
    table: LiveTable,
    gone: Iterable[tuple[str, bytes]],
    come: Iterable[tuple[str, bytes]],
    first: Iterable[tuple[str, bytes]] = (),
) -> None:
    """
    Take rules out, put others at the end, or at the head, in their order.

    :raise Gone: where one that was to be taken out is not there.
    """
    for chain, data in gone:
        table.delete(chain, [data])
    for chain, data in reversed([*first]):
        table.prepend(chain, data)
    for chain, data in come:
        table.append(chain, [data])


def remove(table: LiveTable) -> None:
    """Everything of ours."""
    if table.ownChains():
        table.removeOwn()
