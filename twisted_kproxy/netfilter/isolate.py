"""Finding the service port whose rules are refused, so that all others are served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from twisted.logger import Logger

from ..core.rules import Delta, Rule, Ruleset
from ..core.values import Family, FrontendKey, ServicePortName
from ..interfaces import IRuleWriter, RulesNotJudged, RulesRejected
from .planning import deltaOf
from .ruleset import Fragment, Held

#: More service ports than these are not refused one by one: then the reason is another.
MOST = 16
#: Addresses for documentation (RFC 5737, RFC 3849): nobody has them, and nobody dials them.
_CANARIES: dict[Family, str] = {"IPv4": "198.51.100.255", "IPv6": "2001:db8:ffff::ff"}


class Unit(Struct, frozen=True):
    """What one service port needs written."""

    name: ServicePortName
    rules: Mapping[FrontendKey, Rule]
    held: frozenset[Held]


class Isolation:
    """
    Applies in parts what was refused as a whole.

    :ivar refused: the service ports at fault, with the reason.
    """

    log = Logger()

    def __init__(self, writer: IRuleWriter) -> None:
        self._writer = writer
        self._canaries: set[Family] = set()  # families that are known to be taken
        self.refused: dict[ServicePortName, str] = {}

    async def run(
        self,
        error: RulesRejected,
        delta: Delta,
        fragments: Iterable[Fragment],
        before: Mapping[ServicePortName, Fragment],
    ) -> Ruleset:
        """
        Apply a delta but for what is refused of it: of that, what was in force stays.

        :param error: with which the whole was refused.
        :param fragments: of the service ports that the delta is made from.
        :param before: of those in force.
        :return: what is in force now.
        :raise RulesRejected: where not even a rule that does no harm is taken: then no service port is to blame.
        """
        units = unitsOf(delta, fragments)
        owned = {it for unit in units for it in unit.held}
        await self._sure()
        base = deltaOf({}, (delta.guardsAdded | delta.clusterIPsAdded) - owned, locality=delta.locality)
        if base:
            await self._writer.apply(base)
        await self._part(self._named(error, units), error)
        kept = [before[name] for name in self.refused if name in before]
        keys = {key for it in kept for key, _rule in it.rules}
        rest = deltaOf(
            {key: None for key, rule in delta.rules.items() if rule is None and key not in keys},
            added=(),
            removed=(delta.guardsRemoved | delta.clusterIPsRemoved).difference(*(it.held for it in kept)),
        )
        if rest:
            await self._writer.apply(rest)
        found = await self._sure()
        self.log.info(
            "{count} of {total} changed service ports are in force", count=len(units) - len(self.refused),
            total=len(units),
        )
        return found

    async def again(self, unit: Unit) -> bool:
        """Whether a unit that was refused before is taken by now; it is in force then."""
        try:
            await self._writer.apply(deltaOf(unit.rules, unit.held))
        except RulesNotJudged:
            raise
        except RulesRejected as error:
            self.refused[unit.name] = str(error)
            await self._sure()
            return False
        return True

    async def _sure(self) -> Ruleset:
        """After a refusal, what is in force is what was: but that has to be read."""
        found: Ruleset | None = await self._writer.adopt()
        if found is None:
            raise RulesNotJudged("what is in force cannot be read, after rules were refused")
        return found

    def _named(self, error: RulesRejected, units: Sequence[Unit]) -> list[Unit]:
        """Refuse those that an error names; gives the others."""
        left = []
        for unit in units:
            if error.frontends & unit.rules.keys():
                self._refuse(unit, error)
            else:
                left.append(unit)
        return left

    def _refuse(self, unit: Unit, error: RulesRejected) -> None:
        self.refused[unit.name] = str(error)
        if len(self.refused) > MOST and not error.frontends:
            raise error

    async def _part(self, units: Sequence[Unit], error: RulesRejected) -> None:
        if not units:
            return
        delta = deltaOf(
            {key: rule for unit in units for key, rule in unit.rules.items()},
            {it for unit in units for it in unit.held},
        )
        try:
            await self._writer.apply(delta)
            return
        except RulesNotJudged:
            raise
        except RulesRejected as refusal:
            error = refusal
        await self._sure()
        left = self._named(error, units)
        if len(left) < len(units):
            await self._part(left, error)
            return
        await self._canary(units[0].name.family, error)
        if len(units) == 1:
            await self._single(units[0])
            return
        middle = len(units) // 2
        await self._part(units[:middle], error)
        await self._part(units[middle:], error)

    async def _single(self, unit: Unit) -> None:
        """Once more, in case that it was an accident."""
        try:
            await self._writer.apply(deltaOf(unit.rules, unit.held))
        except RulesNotJudged:
            raise
        except RulesRejected as refusal:
            await self._sure()
            self._refuse(unit, refusal)

    async def _canary(self, family: Family, error: RulesRejected) -> None:
        """:raise RulesRejected: where a rule that does no harm is refused too: then none of the others is at fault."""
        if family in self._canaries:
            return
        key = FrontendKey(family, "TCP", _CANARIES[family], 9)
        try:
            await self._writer.apply(Delta({key: Rule("drop", "drop")}))
            await self._writer.apply(Delta({key: None}))
        except RulesNotJudged:
            raise
        except RulesRejected:
            raise error from None
        self._canaries.add(family)


def unitsOf(delta: Delta, fragments: Iterable[Fragment]) -> list[Unit]:
    """What of a delta adds or changes something, by service port."""
    units = []
    for it in fragments:
        rules = {key: rule for key, rule in it.rules if delta.rules.get(key) == rule}
        held = it.held & (delta.guardsAdded | delta.clusterIPsAdded)
        if rules or held:
            units.append(Unit(it.port.name, rules, held))
    return units
