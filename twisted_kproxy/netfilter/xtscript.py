"""
What ``iptables-restore --noflush`` is given: pure. Each ``*table … COMMIT`` is one transaction of the kernel; they
stand in the order in which nothing is open that shall not be (see :mod:`~twisted_kproxy.netfilter.xtengine`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..core.rules import Ruleset
from ..core.values import Family
from .xtlayout import CHAINS, GUARD, HOOKS, JUMPS, REFUSE, TABLES, TableName, frontendOf, render
from .xtsteps import Edits, flat, mendOf
from .xttext import Saved, entryOf, textOf

_NOTHING = Saved()


def blocksOf(script: str) -> list[str]:
    """A script's transactions, each a script of its own."""
    return [f"{block}COMMIT\n" for block in script.split("COMMIT\n") if block]


def _block(table: str, lines: Iterable[str]) -> str:
    text = "".join(f"{line}\n" for line in lines)
    return f"*{table}\n{text}COMMIT\n" if text else ""


def wholeScript(family: Family, ruleset: Ruleset, tables: Mapping[str, Saved], mend: bool = False) -> str:
    """
    Exactly this, in our chains; with the rules that lead to them.

    :param tables: what there is.
    :param mend: touch no rule that is as it shall be.
    """
    content = render(ruleset, family, textOf)
    nat, filters = tables.get("nat", _NOTHING), tables.get("filter", _NOTHING)
    blocks = []
    if GUARD in filters.own and REFUSE in filters.own:
        # Before anything leads to a port of the proxy, it is guarded. Guards that shall go stay for now.
        present = set(filters.own[GUARD])
        blocks.append(_block("filter", (f"-A {GUARD} {it}" for it in content.filter[GUARD] if it not in present)))
        if mend and blocks[0]:
            filters = Saved({**filters.own, GUARD: [*filters.own[GUARD], *_new(content.filter[GUARD], present)]},
                            filters.leads, filters.builtin)  # fmt: skip
        later = [_table(family, "filter", content.filter, filters, mend)]
    else:
        blocks.append(_table(family, "filter", content.filter, filters, mend))
        later = []
    return "".join([*blocks, _table(family, "nat", content.nat, nat, mend), *later])


def _new(rules: Iterable[str], present: set[str]) -> list[str]:
    return [rule for rule in rules if rule not in present]


def _table(family: Family, name: TableName, chains: dict[str, list[str]], saved: Saved, mend: bool) -> str:
    lines: list[str] = []
    if mend:
        it = mendOf(saved.own, chains, lambda chain, rule: frontendOf(chain, entryOf(family, rule)))
        whole = {chain: chains[chain] for chain in it.whole}
        lines += [f"-D {chain} {rule}" for chain, rule in flat(it.gone)]
    else:
        whole = chains
    # A chain that is declared is made, or emptied where it is there.
    lines += [f":{chain} - [0:0]" for chain in whole]
    lines += [f"-A {chain} {rule}" for chain, rule in flat(whole)]
    if mend:
        lines += _heads(flat(it.first))
        lines += [f"-A {chain} {rule}" for chain, rule in flat(it.come)]
    lines += _jumps(family, name, saved)
    lines += _gone(saved, keep=CHAINS[name])
    return _block(name, lines)


def _heads(rules: Iterable[tuple[str, str]]) -> list[str]:
    """To the heads of their chains, in their order."""
    return [f"-I {chain} 1 {rule}" for chain, rule in reversed([*rules])]


def _jumps(family: Family, name: TableName, saved: Saved) -> list[str]:
    """Put each jump where it belongs: before everybody else's rules, or behind them. What is right stays."""
    lines = []
    for hook in HOOKS[name]:
        jumps = [jump for jump in JUMPS if (jump.table, jump.hook) == (name, hook)]
        firsts = [textOf(jump.entry(family)) for jump in jumps if not jump.last]
        lasts = [textOf(jump.entry(family)) for jump in jumps if jump.last]
        found = [it for it in saved.leads if it.hook == hook and it.to in CHAINS[name]]
        total = saved.builtin.get(hook, 0)
        places = [*range(len(firsts)), *range(total - len(lasts), total)]
        if [it.index for it in found] == places and [it.text for it in found] == [*firsts, *lasts]:
            continue
        lines += [f"-D {hook} {it.text}" for it in found]
        lines += [f"-I {hook} {number} {it}" for number, it in enumerate(firsts, 1)]
        lines += [f"-A {hook} {it}" for it in lasts]
    return lines


def jumpsStand(family: Family, tables: Mapping[str, Saved]) -> bool:
    """
    Whether each jump is there, once, as it is written, and in the right order among ours. Others may stand before
    them; see :meth:`.xttables.LiveTable.jumpsStand`.
    """
    for name in TABLES:
        saved = tables.get(name, _NOTHING)
        for hook in HOOKS[name]:
            expected = [textOf(jump.entry(family)) for jump in JUMPS if (jump.table, jump.hook) == (name, hook)]
            if [it.text for it in saved.leads if it.hook == hook] != expected:
                return False
    return True


def editScript(edits: Edits[str]) -> str:
    """A step. A rule that shall go and is not there fails its transaction."""
    blocks = [_block("filter", (f"-A {chain} {rule}" for chain, rule in edits.guardsNew))]
    for table, gone, first, come in (
        ("nat", edits.natGone, [], edits.natNew),
        ("filter", edits.filterGone, edits.filterFirst, edits.filterNew),
    ):
        lines = [f"-D {chain} {rule}" for chain, rule in gone] + _heads(first)
        blocks.append(_block(table, [*lines, *(f"-A {chain} {rule}" for chain, rule in come)]))
    return "".join(blocks)


def removeScript(tables: Mapping[str, Saved]) -> str:
    """Everything of ours, and nothing else. Tables that have nothing of ours are not touched."""
    return "".join(_block(name, _gone(tables[name])) for name in TABLES if name in tables)


def _gone(saved: Saved, keep: Iterable[str] = ()) -> list[str]:
    doomed = [chain for chain in saved.own if chain not in set(keep)]
    lines = [f"-D {it.hook} {it.text}" for it in saved.leads if it.hook in saved.builtin and it.to in doomed]
    lines += [f":{chain} - [0:0]" for chain in doomed]
    held = stuck(saved)
    return lines + [f"-X {chain}" for chain in doomed if chain not in held]


def stuck(saved: Saved) -> set[str]:
    """Our chains that cannot be removed, since a chain of somebody else leads there."""
    return {it.to for it in saved.leads if it.hook not in saved.builtin}

