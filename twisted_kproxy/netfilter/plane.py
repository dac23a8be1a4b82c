"""The rule plane: keeps the kernel's rules in line with the service map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from ..core.changes import Update
from ..core.rules import Delta, Guard, Rule, Ruleset, Target
from ..core.values import FrontendKey, ServiceMap, ServicePortName
from ..interfaces import IRulePlane, IRuleWriter
from .ruleset import Fragment, Fragments, canonicalNetworks


class FlowRemover(Protocol):
    """Makes the kernel forget where established UDP flows were led."""

    def forget(self, stale: Mapping[FrontendKey, frozenset[Target]]) -> Deferred[int]:
        """
        Delete the flows to each frontend but those that are led to one of its targets.

        :return: fires with how many were deleted.
        """


@implementer(IRulePlane)
class RulePlane:
    """
    Renders service ports to rules, and hands the writer what has changed: nothing where nothing has.

    What an earlier run has left in the kernel is compared with, never flushed. After a failure, after somebody else
    has changed our rules, and when an update says so, what is in force is read anew first.

    :param writer: an :class:`~twisted_kproxy.interfaces.IRuleWriter`; the plane is its only user.
    :param insiders: the pod networks, CIDRs.
    :param flows: forgets stale UDP flows once the rules are in; ``None`` for nobody.
    :param changedOutside: called when somebody else has changed our rules; a full update should follow.
    :raise ValueError: where an insider is no network.
    """

    log = Logger()
    #: Service ports (or rules) looked at in one turn of the reactor; some milliseconds.
    SLICE = 500

    def __init__(
        self,
        reactor: Any,
        writer: IRuleWriter,
        *,
        insiders: Iterable[str] = (),
        flows: FlowRemover | None = None,
        changedOutside: Callable[[], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._writer = writer
        self._insiders = canonicalNetworks(insiders)
        self._flows = flows
        self._changedOutside = changedOutside
        self._lock = DeferredLock()
        self._fragments = Fragments()
        self._applied: ServiceMap | None = None  # the map that is in force
        self._rules: dict[FrontendKey, Rule] = {}  # what is in force, as far as we know
        self._guards: Counter[Guard] = Counter()
        self._found: Ruleset | None = None  # what start() has read, until the first update
        self._doubt = True  # what is in force has to be read
        self._stopped = False
        self._writes = self._failures = self._foreign = self._flowsForgotten = 0
        self._lastSeconds: float | None = None
        self._lastError = ""

    # --- IDataplane ---

    def start(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        words = await self._writer.probe()
        self.log.info("Rules are written by {writer} ({words}).", writer=self._writer.name, words=words)
        try:
            self._found = await self._writer.adopt()
            self._doubt = False
        except Exception as error:
            self.log.warn("What an earlier run has left could not be read: {error}.", error=error)
        if self._found is not None:
            self._rules = dict(self._found.rules)
            self.log.info("{count} rules of an earlier run are in force.", count=len(self._rules))
        self._writer.watch(self._seenForeign)

    def onUpdate(self, update: Update) -> Deferred[None]:
        """
        Put a map into force. Updates must lead to sockets of this node; see :class:`Fragments`.

        :return: fires when the rules are in, and stale UDP flows are forgotten; fails with
            :class:`~twisted_kproxy.interfaces.RulesRejected`, or
            :class:`~twisted_kproxy.netfilter.ruleset.CannotRender`.
        """
        return self._lock.run(lambda: Deferred.fromCoroutine(self._onUpdate(update)))

    async def _onUpdate(self, update: Update) -> None:
        if self._stopped:
            return
        doubt, self._doubt = self._doubt or update.full, False
        begun = self._reactor.seconds()
        try:
            if doubt or self._applied is None:
                delta = await self._whole(update.current, readFirst=doubt)
            elif update.previous is not self._applied:
                delta = await self._step(self._fragmentsBetween(self._applied, update.current), update.current)
            else:
                delta = await self._step(
                    [(self._fragments.last(name), name) for name in update.changed | update.removed], update.current
                )
        except Exception as error:
            self._doubt = True
            self._failures += 1
            self._lastError = str(error)
            raise
        self._applied = update.current
        self._found = None
        self._lastError = ""
        self._fragments.keepOnly(update.current)
        if delta is not None:
            self._writes += 1
            self._lastSeconds = self._reactor.seconds() - begun
        await self._forgetFlows(update, delta)

    def stop(self, drainSeconds: float) -> Deferred[None]:
        """
        Remove the rules, since what they lead to is about to close, and let go of the writer. Connections that are
        established go on: the kernel remembers where each of them leads.
        """
        return self._lock.run(lambda: Deferred.fromCoroutine(self._stop()))

    async def _stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._writer.watch(None)
        try:
            await self._writer.cleanup()
        except Exception as error:
            self.log.error("The rules could not be removed; they lead nowhere now: {error}.", error=error)
        self._rules = {}
        await self._writer.close()

    def status(self) -> Mapping[str, Any]:
        return {
            "writer": self._writer.name,
            "rules": len(self._rules),
            "guards": len(self._guards),
            "insiders": list(self._insiders),
            "writes": self._writes,
            "failures": self._failures,
            "lastWriteSeconds": self._lastSeconds,
            "lastError": self._lastError,
            "changedByOthers": self._foreign,
            "flowsForgotten": self._flowsForgotten,
        }

    # --- IRulePlane ---

    def targetInForce(self, key: FrontendKey) -> int | None:
        """Where insiders and outsiders are led to two ports, that of the outsiders counts."""
        rule = self._rules.get(key)
        if rule is None:
            return None
        for verdict in (rule.outside, rule.inside):
            if isinstance(verdict, Target):
                return verdict.port
        return None

    # --- inside ---

    async def _whole(self, current: ServiceMap, readFirst: bool) -> Delta | Ruleset | None:
        """Compare everything with what is in force; gives what was written."""
        found = await self._writer.adopt() if readFirst else self._found
        desired: dict[FrontendKey, Rule] = {}
        guards: Counter[Guard] = Counter()
        for count, port in enumerate(current.values(), 1):
            fragment = self._fragments.of(port)
            desired.update(fragment.rules)
            guards.update(fragment.guards)
            if not count % self.SLICE:
                await self._breathe()
        written: Delta | Ruleset | None = None
        if found is None:
            written = Ruleset(dict(desired), frozenset(guards), self._insiders)
            await self._writer.replace(written)
        else:
            delta = await self._difference(found, desired, frozenset(guards))
            if delta:
                written = delta
                await self._writer.apply(delta)
        self._rules, self._guards = desired, guards
        return written

    async def _difference(self, found: Ruleset, desired: dict[FrontendKey, Rule], guards: frozenset[Guard]) -> Delta:
        rules: dict[FrontendKey, Rule | None] = {}
        for count, (key, rule) in enumerate(desired.items(), 1):
            if found.rules.get(key) != rule:
                rules[key] = rule
            if not count % (self.SLICE * 10):
                await self._breathe()
        for count, key in enumerate(found.rules, 1):
            if key not in desired:
                rules[key] = None
            if not count % (self.SLICE * 10):
                await self._breathe()
        insiders = self._insiders if found.insiders != self._insiders else None
        return Delta(rules, guards - found.guards, found.guards - guards, insiders)

    def _fragmentsBetween(
        self, applied: ServiceMap, current: ServiceMap
    ) -> list[tuple[Fragment | None, ServicePortName]]:
        update = Update(applied, current)
        return [(self._fragments.last(name), name) for name in update.changed | update.removed]

    async def _step(
        self, changed: list[tuple[Fragment | None, ServicePortName]], current: ServiceMap
    ) -> Delta | None:
        """Render what has changed, write the difference; gives what was written."""
        gone: set[FrontendKey] = set()
        new: dict[FrontendKey, Rule] = {}
        guardsGone: Counter[Guard] = Counter()
        guardsNew: Counter[Guard] = Counter()
        for count, (before, name) in enumerate(changed, 1):
            if before is not None:
                gone.update(key for key, _rule in before.rules)
                guardsGone.update(before.guards)
            port = current.get(name)
            if port is not None:
                fragment = self._fragments.of(port)
                new.update(fragment.rules)
                guardsNew.update(fragment.guards)
            if not count % self.SLICE:
                await self._breathe()
        rules: dict[FrontendKey, Rule | None] = {key: None for key in gone if key not in new and key in self._rules}
        rules.update((key, rule) for key, rule in new.items() if self._rules.get(key) != rule)
        guards = self._guards.copy()
        guards.subtract(guardsGone)
        guards.update(guardsNew)
        guards = +guards
        added, removed = guards.keys() - self._guards.keys(), self._guards.keys() - guards.keys()
        delta = Delta(rules, frozenset(added), frozenset(removed))
        if delta:
            await self._writer.apply(delta)
        for key, rule in rules.items():
            if rule is None:
                del self._rules[key]
            else:
                self._rules[key] = rule
        self._guards = guards
        return delta or None

    async def _forgetFlows(self, update: Update, written: Delta | Ruleset | None) -> None:
        """UDP flows that the kernel leads where they no longer belong; a failure costs the flows, not the update."""
        if self._flows is None:
            return
        keys = {flow.key for flow in update.staleFlows}
        if written is not None:
            keys.update(key for key in written.rules if key.protocol == "UDP")
        if not keys:
            return
        stale = {key: self._targets(key) for key in keys}
        try:
            count = await self._flows.forget(stale)
        except Exception as error:
            self.log.warn(
                "Stale UDP flows to {count} frontends could not be forgotten: {error}.", count=len(stale), error=error
            )
            return
        self._flowsForgotten += count
        if count:
            self.log.info("{count} stale UDP flows were forgotten.", count=count)

    def _targets(self, key: FrontendKey) -> frozenset[Target]:
        rule = self._rules.get(key)
        if rule is None:
            return frozenset()
        return frozenset(it for it in (rule.outside, rule.inside) if isinstance(it, Target))

    def _seenForeign(self) -> None:
        self._doubt = True
        self._foreign += 1
        self.log.warn("Somebody else has changed our rules; they will be compared and repaired.")
        if self._changedOutside is not None:
            self._changedOutside()

    def _breathe(self) -> Deferred[None]:
        return deferLater(self._reactor, 0, lambda: None)
