"""The rule plane: keeps the kernel's rules in line with the service map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger
from zope.interface import implementer

from ..core.changes import Update
from ..core.rules import Delta, Guard, Rule, Ruleset
from ..core.values import FrontendKey, Locality, ServiceMap, ServicePort, ServicePortName
from ..core.wording import counted
from ..interfaces import IRulePlane, IRuleWriter, RulesNotJudged, RulesRejected
from .flows.keeper import FlowKeeper
from .isolate import Isolation, Unit
from .planning import Claim, FlowRemover, deltaOf, differing, joining, rulesetOf, updating
from .ruleset import CannotRender, Fragment, Fragments, Held
from .slices import Slices, inSlices


@implementer(IRulePlane)
class RulePlane:
    """
    Renders service ports to rules, and hands the writer what has changed: nothing where nothing has.

    What an earlier run has left in the kernel is compared with, never flushed. After a failure, after somebody else
    has changed our rules, and when an update says so, what is in force is read anew first.

    A service port whose rules cannot be made, or that the writer refuses, is put in quarantine: all others are in force
    then, and of that one what was in force before. It is tried again when it changes, and with each full update.

    :param writer: an :class:`~twisted_kproxy.interfaces.IRuleWriter`; the plane is its only user.
    :param flows: forgets stale UDP flows once the rules are in; ``None`` for nobody.
    :param changedOutside: called when somebody else has changed our rules; a full update should follow.
    :param claim: is taken before anything is looked at, and given back when the rules are removed; ``None`` for none.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        writer: IRuleWriter,
        *,
        flows: FlowRemover | None = None,
        changedOutside: Callable[[], None] | None = None,
        claim: Claim | None = None,
    ) -> None:
        self._reactor = reactor
        self._writer = writer
        self._flows = FlowKeeper(reactor, flows)
        self._changedOutside = changedOutside
        self._claim = claim
        self._lock = DeferredLock()
        self._fragments = Fragments()
        self._good: dict[ServicePortName, Fragment] = {}  # those that are in force
        self._quarantine: dict[ServicePortName, tuple[ServicePort, str]] = {}
        self._applied: ServiceMap | None = None  # the map that is in force
        self._rules: dict[FrontendKey, Rule] = {}  # what is in force, as far as we know
        self._held: Counter[Held] = Counter()  # how many service ports need each
        self._locality = Locality()
        self._found: Ruleset | None = None  # what start() has read, until the first update
        self._doubt = True  # what is in force has to be read
        self._stopped = False
        self._writes = self._failures = self._foreign = 0
        self._lastSeconds: float | None = None
        self._lastError = ""

    # --- IDataplane ---

    def start(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        if self._claim is not None:
            self._claim.take()
        words = await self._writer.probe()
        self.log.info("Rules are written by {writer} ({words}).", writer=self._writer.name, words=words)
        try:
            self._found = await self._writer.adopt()
            self._doubt = False
        except Exception as error:
            self.log.warn("What an earlier run has left could not be read: {error}.", error=error)
        if self._found is not None:
            self._rules = dict(self._found.rules)
            count, are = len(self._rules), "is" if len(self._rules) == 1 else "are"
            self.log.info("{what} of an earlier run {are} in force.", what=counted(count, "rule"), are=are, count=count)
        self._writer.watch(self._seenForeign)

    def onUpdate(self, update: Update) -> Deferred[None]:
        """
        Put a map into force. Updates must lead to sockets of this node; see :class:`Fragments`.

        :return: fires when the rules are in, but for those of service ports in quarantine, and stale UDP flows are
            forgotten; fails with :class:`~twisted_kproxy.interfaces.RulesRejected`.
        """
        return self._lock.run(lambda: Deferred.fromCoroutine(self._onUpdate(update)))

    async def _onUpdate(self, update: Update) -> None:
        if self._stopped:
            return
        doubt, self._doubt = self._doubt or update.full, False
        begun = self._reactor.seconds()
        whole = doubt or self._applied is None
        try:
            if doubt or self._applied is None:
                refused = list(self._quarantine)
                delta = await self._whole(update.current, readFirst=doubt)
                await self._tryAgain(refused)
            elif update.previous is not self._applied:
                between = Update(self._applied, update.current)
                delta = await self._step(between.changed | between.removed, update.current)
            else:
                delta = await self._step(update.changed | update.removed, update.current)
        except Exception as error:
            self._doubt = True
            self._flows.doubt()
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
        await self._flows.follow(update, delta, self._rules, self._locality.nodePorts, whole)

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
        await self._flows.end(self._rules, self._locality.nodePorts)
        self._rules = {}
        if self._claim is not None:
            self._claim.release()
        await self._writer.close()

    def status(self) -> Mapping[str, Any]:
        return {
            "writer": self._writer.name,
            "rules": len(self._rules),
            "guards": sum(isinstance(it, Guard) for it in self._held),
            "insiders": [*self._locality.insiders, *self._locality.insiderLinks],
            "nodePortNetworks": list(self._locality.nodePorts),
            "serviceNetworks": list(self._locality.services),
            "writes": self._writes,
            "failures": self._failures,
            "lastWriteSeconds": self._lastSeconds,
            "lastError": self._lastError,
            "changedByOthers": self._foreign,
            "flowsForgotten": self._flows.forgotten,
            "quarantined": self.unserved(),
        }

    def unserved(self) -> dict[str, str]:
        """The service ports whose rules are not in force as they should be, and why."""
        return {str(name): reason for name, (_port, reason) in self._quarantine.items()}

    # --- IRulePlane ---

    def ruleInForce(self, key: FrontendKey) -> Rule | None:
        return self._rules.get(key)

    # --- inside ---

    def _fragment(self, name: ServicePortName, port: ServicePort | None) -> Fragment | None:
        """What shall be in force under a name: that of the port; while it is in quarantine, what was before."""
        known = self._quarantine.get(name)
        if known is not None:
            if known[0] is port:
                return self._good.get(name)
            del self._quarantine[name]
        if port is None:
            return None
        try:
            return self._fragments.of(port)
        except CannotRender as error:
            self._refuse(port, str(error))
            return self._good.get(name)

    def _refuse(self, port: ServicePort, reason: str) -> None:
        if port.name not in self._quarantine:
            self.log.error(
                "Service port {name} is in quarantine: {reason}. What was in force of it stays; it is tried again when "
                "it changes, and with each full comparison.",
                name=port.name, reason=reason,
            )
        self._quarantine[port.name] = (port, reason)

    def _rendering(self, current: ServiceMap) -> Slices[dict[ServicePortName, Fragment]]:
        for name in [name for name in self._quarantine if name not in current]:
            del self._quarantine[name]
        fragments = {}
        for name, port in current.items():
            fragment = self._fragment(name, port)
            if fragment is not None:
                fragments[name] = fragment
            yield
        return fragments

    async def _whole(self, current: ServiceMap, readFirst: bool) -> Delta | Ruleset | None:
        """Compare everything with what is in force; gives what was written."""
        found = await self._writer.adopt() if readFirst else self._found
        if found is not None:
            await self._flows.found(found.rules)
        fragments = await inSlices(self._reactor, self._rendering(current))
        desired, held = await inSlices(self._reactor, joining(fragments, self._quarantine))
        wanted = rulesetOf(dict(desired), held, current.locality)
        written: Delta | Ruleset | None = None
        if found is None:
            written = wanted
            try:
                await self._writer.replace(wanted)
            except RulesRejected as error:
                empty = Ruleset(locality=current.locality)
                delta = await inSlices(self._reactor, differing(empty, wanted))
                await self._isolate(error, delta, fragments, current, empty)
                return written
        else:
            delta = await inSlices(self._reactor, differing(found, wanted))
            if delta:
                written = delta
                try:
                    await self._writer.apply(delta)
                except RulesRejected as error:
                    await self._isolate(error, delta, fragments, current)
                    return written
        self._good, self._rules, self._held, self._locality = fragments, desired, held, current.locality
        return written

    async def _step(self, changed: Collection[ServicePortName], current: ServiceMap) -> Delta | None:
        """Render what has changed, write the difference; gives what was written."""
        delta, new, held = await inSlices(self._reactor, self._stepping(changed, current))
        if delta:
            try:
                await self._writer.apply(delta)
            except RulesRejected as error:
                fragments = {name: it for name, it in self._good.items() if name in current}
                fragments.update((name, it) for name, it in new.items() if it is not None)
                await self._isolate(error, delta, fragments, current)
                return delta
        await inSlices(self._reactor, updating(self._rules, delta.rules))
        await inSlices(self._reactor, updating(self._good, new))
        await inSlices(self._reactor, updating(self._held, held))
        self._locality = current.locality
        return delta or None

    def _stepping(
        self, changed: Collection[ServicePortName], current: ServiceMap
    ) -> Slices[tuple[Delta, dict[ServicePortName, Fragment | None], dict[Held, int | None]]]:
        """What is to be written; the fragments, and how many need each thing held, once it is; ``None``: nobody."""
        gone: set[FrontendKey] = set()
        come: dict[FrontendKey, Rule] = {}
        held: Counter[Held] = Counter()
        new: dict[ServicePortName, Fragment | None] = {}
        for name in changed:
            old, fragment = self._good.get(name), self._fragment(name, current.get(name))
            if old is not None:
                gone.update(key for key, _rule in old.rules)
                held.subtract(old.held)
            if fragment is not None:
                come.update(fragment.rules)
                held.update(fragment.held)
            new[name] = fragment
            yield
        rules: dict[FrontendKey, Rule | None] = {}
        for key in gone:
            if key not in come and key in self._rules:
                rules[key] = None
            yield
        for key, rule in come.items():
            if self._rules.get(key) != rule:
                rules[key] = rule
            yield
        added: set[Held] = set()
        removed: set[Held] = set()
        counts: dict[Held, int | None] = {}
        for it, more in held.items():
            before, after = self._held[it], self._held[it] + more
            counts[it] = after if after > 0 else None
            if after > 0 >= before:
                added.add(it)
            elif before > 0 >= after:
                removed.add(it)
            yield
        locality = current.locality if current.locality != self._locality else None
        return deltaOf(rules, added, removed, locality), new, counts

    # --- quarantine ---

    async def _isolate(
        self,
        error: RulesRejected,
        delta: Delta,
        fragments: dict[ServicePortName, Fragment],
        current: ServiceMap,
        base: Ruleset | None = None,
    ) -> None:
        """
        Put into force what is not refused of a step.

        :param fragments: of all service ports.
        :param base: to begin with, where nothing that can be understood is in force.
        """
        if isinstance(error, RulesNotJudged):
            raise error
        self.log.warn("Rules were refused: {error}. Those at fault are looked for.", error=error)
        if base is not None:
            await self._writer.replace(base)
        isolation = Isolation(self._writer)
        found = await isolation.run(error, delta, fragments.values(), self._good)
        for name, reason in isolation.refused.items():
            if name in current:
                self._refuse(current[name], reason)
            before = self._good.get(name)
            if before is not None:
                fragments[name] = before
            else:
                fragments.pop(name, None)
        self._good, self._rules = fragments, dict(found.rules)
        self._held = Counter(it for fragment in fragments.values() for it in fragment.held)
        self._locality = current.locality

    async def _tryAgain(self, names: Iterable[ServicePortName]) -> None:
        """Whether what was refused is taken by now."""
        for name in names:
            if name not in self._quarantine:
                continue
            port = self._quarantine[name][0]
            try:
                fragment = self._fragments.of(port)
            except CannotRender:
                continue
            isolation = Isolation(self._writer)
            missing = {key: rule for key, rule in fragment.rules if self._rules.get(key) != rule}
            if await isolation.again(Unit(name, missing, fragment.held)):
                self.log.info("Service port {name} has left the quarantine.", name=name)
                del self._quarantine[name]
                self._good[name] = fragment
                self._rules.update(missing)
                self._held = Counter(held for it in self._good.values() for held in it.held)
            else:
                self._quarantine[name] = (port, isolation.refused[name])

    def _seenForeign(self) -> None:
        self._doubt = True
        self._foreign += 1
        self.log.warn("Somebody else has changed our rules; they will be compared and repaired.")
        if self._changedOutside is not None:
            self._changedOutside()
