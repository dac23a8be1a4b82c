"""What a step means for the chains of ip_tables, in whichever form rules are written: pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeAlias, TypeVar

from msgspec import Struct

from ..core.addresses import familyOf
from ..core.rules import Delta, Ruleset
from ..core.values import Family, FrontendKey, Protocol
from .xtbytes import Entry
from .xtlayout import (
    GUARD,
    INSIDERS,
    NO_PORT,
    REFUSE,
    TableName,
    clusterEntry,
    guardEntries,
    isOrdered,
    noPortEntries,
    ownOf,
    placeOf,
    ruleEntries,
)

_T = TypeVar("_T", bound=Hashable)

#: What a rule is for; see :func:`~twisted_kproxy.netfilter.xtlayout.frontendOf`.
Frontend: TypeAlias = tuple[str, Protocol | None, int]


class Edits(Struct, Generic[_T]):
    """
    What a delta means for the chains of one family: ``(chain, rule)``.

    :ivar filterFirst: what comes to the head of its chain, in its order; all else that is new comes to the end.
    """

    natGone: list[tuple[str, _T]]
    natNew: list[tuple[str, _T]]
    filterGone: list[tuple[str, _T]]
    filterFirst: list[tuple[str, _T]]
    filterNew: list[tuple[str, _T]]
    guardsNew: list[tuple[str, _T]]


def editsOf(family: Family, old: Ruleset, new: Ruleset, changed: Delta, form: Callable[[Entry], _T]) -> Edits[_T]:
    """
    What has to go from the chains and what to come; what a rule keeps stays where it is, with its counters.

    The localities are the same: where they differ everything is written anew.

    :param changed: the rules that differ; guards and ClusterIPs are compared here.
    :param form: what a rule is written as.
    """
    edits: Edits[_T] = Edits([], [], [], [], [], [])
    place = placeOf(family, new.locality)

    def written(key: FrontendKey, ruleset: Ruleset) -> dict[tuple[TableName, str], list[_T]]:
        rule = ruleset.rules.get(key)
        chains: dict[tuple[TableName, str], list[_T]] = {}
        for table, chain, entry in ruleEntries(key, rule, place) if rule else ():
            chains.setdefault((table, chain), []).append(form(entry))
        return chains

    for key in changed.rules:
        if key.family == family:
            before, after = written(key, old), written(key, new)
            for where in before.keys() | after.keys():
                gone, come = before.get(where, []), after.get(where, [])
                if gone != come:
                    table, chain = where
                    (edits.natGone if table == "nat" else edits.filterGone).extend((chain, it) for it in gone)
                    (edits.natNew if table == "nat" else edits.filterFirst).extend((chain, it) for it in come)
    for guard in sorted(new.guards - old.guards):
        if guard.family == family:
            edits.guardsNew.extend((GUARD, form(entry)) for entry in guardEntries(guard))
    for guard in sorted(old.guards - new.guards):
        if guard.family == family:
            edits.filterGone.extend((GUARD, form(entry)) for entry in guardEntries(guard))
    for one, other, some in (
        (old.clusterIPs, new.clusterIPs, edits.filterGone),
        (new.clusterIPs, old.clusterIPs, edits.filterNew),
    ):
        addresses = ownOf(family, one - other)
        for address in addresses:
            chain, entry = clusterEntry(address, place)
            some.append((chain, form(entry)))
        if addresses and not any(familyOf(it) == family for it in other):
            some.extend((NO_PORT, form(entry)) for entry in noPortEntries(family))
    return edits


class Mend(Struct, Generic[_T]):
    """
    What makes the chains of one table what they shall be: of damage no more than was damaged.

    :ivar whole: chains that are written anew.
    :ivar gone: chain → rules that are taken out, each as often as it is in here.
    :ivar first: chain → rules that are put at its head afterwards, in their order.
    :ivar come: chain → rules that are put at the end.
    """

    whole: list[str]
    gone: dict[str, list[_T]]
    first: dict[str, list[_T]]
    come: dict[str, list[_T]]

    def __bool__(self) -> bool:
        return bool(self.whole or self.gone or self.first or self.come)


def mendOf(
    found: Mapping[str, list[_T]], wanted: Mapping[str, list[_T]], frontend: Callable[[str, _T], Frontend]
) -> Mend[_T]:
    """
    Compare what a table's chains hold with what they shall hold. The order matters among the rules of one frontend
    only; so where one of these is wrong, all of them are taken out and put in again.

    :param found: without the chains that are not there.
    :param frontend: what a rule of a chain is for; what it raises (``ValueError``) means that the rule is none of ours.
    """
    mend: Mend[_T] = Mend([], {}, {}, {})
    for chain, rules in wanted.items():
        there = found.get(chain)
        if there == rules:
            continue
        if there is None or chain == INSIDERS:
            mend.whole.append(chain)
            continue
        try:
            before, after = _grouped(chain, there, frontend), _grouped(chain, rules, frontend)
            ordered = isOrdered(chain, (frontend(chain, rule) for rule in there))
        except ValueError:
            mend.whole.append(chain)
            continue
        wrong = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        if not ordered or len(wrong) * 4 > len(after):  # so much that this is the shorter way
            mend.whole.append(chain)
        elif wrong:
            mend.gone[chain] = [rule for key in wrong for rule in before.get(key, ())]
            for head, where in ((True, mend.first), (False, mend.come)):
                come = [rule for key in wrong if isFirst(chain, key) == head for rule in after.get(key, ())]
                if come:
                    where[chain] = come
    return mend


def isFirst(chain: str, frontend: Frontend) -> bool:
    """Whether a new rule comes to the head of its chain: a frontend's, where what is for all protocols is the end."""
    return chain == REFUSE and frontend[1] is not None


def _grouped(
    chain: str, rules: Iterable[_T], frontend: Callable[[str, _T], Frontend]
) -> dict[Frontend, list[_T]]:
    groups: dict[Frontend, list[_T]] = {}
    for rule in rules:
        groups.setdefault(frontend(chain, rule), []).append(rule)
    return groups


def flat(chains: Mapping[str, Iterable[_T]]) -> list[tuple[str, _T]]:
    """``(chain, rule)`` for each."""
    return [(chain, rule) for chain, rules in chains.items() for rule in rules]
