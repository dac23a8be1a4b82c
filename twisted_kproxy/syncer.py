"""
When to tell: the state machine between the cluster, which knows what should be, and the listeners, which make it so.

In come "something changed" and the clock; out goes one :class:`~twisted_kproxy.core.changes.Update` at a time. The
full desired map is the truth; the difference to the last applied map only saves work. So no change can be lost: an
update that fails leaves "last applied" where it was, and the next one is told to trust nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import define, field
from automat import TypeMachineBuilder
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .core.changes import Update
from .core.values import ServiceMap
from .interfaces import ISyncObserver, IUpdateListener

_log = Logger("twisted_kproxy.syncer.Syncer")

#: kubernetes util/bounded_frequency_runner.go: two at once, so that endpoints just behind their Service do not wait
BURST = 2.0
FIRST_RETRY = 1.0
LONGEST_RETRY = 30.0
#: a full comparison with the kernel may take at most this share of the time
FULL_SHARE = 0.05
#: Services of an update that the log names
NAMED = 3


def _named(update: Update) -> str:
    """The first few Services that an update is about."""
    names = sorted({f"{name.namespace}/{name.service}" for name in update.changed | update.removed})
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class IDesired(Protocol):
    """The cluster, as far as the syncer knows it."""

    @property
    def synced(self) -> bool:
        """Whether everything has been listed once."""

    def catchUp(self, limit: int = ...) -> bool:
        """Do a bounded piece of the work that current() needs; whether there is more."""

    def current(self) -> ServiceMap:
        """What should be."""


class _Inputs(Protocol):
    def changed(self) -> None:
        """The desired state may be another than before, or must be compared with the world."""

    def due(self) -> None:
        """The time that was waited for has come."""

    def succeeded(self) -> None:
        """The update that was out is in force."""

    def failed(self) -> None:
        """The update that was out is not in force."""

    def stop(self) -> None:
        """Tell nobody any more."""


@define(eq=False)
class _Core:
    """The data of the machine. Only what the transitions below say changes it."""

    clock: IReactorTime
    desired: IDesired
    listener: IUpdateListener
    observer: ISyncObserver
    minPeriod: float
    fullPeriod: float
    applied: ServiceMap = field(factory=ServiceMap)
    full: bool = True
    tokens: float = BURST
    tokensAt: float = 0.0
    failures: int = 0
    timer: IDelayedCall | None = None
    fullTimer: IDelayedCall | None = None
    out: Deferred[None] | None = None
    outSince: float | None = None
    whenOver: list[Deferred[None]] = field(factory=list)
    inputs: _Inputs | None = None

    # --- time

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self.cancelTimer()

        def fire() -> None:
            self.timer = None
            what()

        self.timer = self.clock.callLater(seconds, fire)

    def cancelTimer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def cancelAll(self) -> None:
        self.cancelTimer()
        if self.fullTimer is not None:
            self.fullTimer.cancel()
            self.fullTimer = None

    def untilAllowed(self) -> float:
        """Seconds until a token is there: one grows each minimal period, at most BURST are kept."""
        if self.minPeriod <= 0:
            return 0.0
        now = self.clock.seconds()
        self.tokens = min(BURST, self.tokens + (now - self.tokensAt) / self.minPeriod)
        self.tokensAt = now
        return max(0.0, (1.0 - self.tokens) * self.minPeriod)

    def schedule(self) -> None:
        assert self.inputs is not None
        self.observer.queued()
        self._later(self.untilAllowed(), self.inputs.due)

    def scheduleRetry(self) -> None:
        assert self.inputs is not None
        self.observer.queued()
        delay = min(LONGEST_RETRY, FIRST_RETRY * 2.0 ** min(self.failures - 1, 10))
        self._later(delay, self.inputs.due)

    def scheduleFull(self, lastSeconds: float) -> None:
        def fire() -> None:
            assert self.inputs is not None
            self.fullTimer = None
            self.full = True
            self.inputs.changed()

        if self.fullTimer is not None:
            self.fullTimer.cancel()
        self.fullTimer = self.clock.callLater(max(self.fullPeriod, lastSeconds / FULL_SHARE), fire)

    # --- telling

    def prepare(self) -> None:
        """Resolve in pieces, a turn of the reactor each, then send. Changes that come meanwhile are included."""
        assert self.inputs is not None
        try:
            more = self.desired.catchUp()
        except Exception:
            # A defect, and it must not be the last that is heard of this machine: what was in force stays, try again.
            _log.failure("What should be in force cannot be worked out")
            self.full = True
            self.failures += 1
            self.inputs.failed()
            return
        if more:
            self._later(0, self.prepare)
        else:
            self.send()

    def send(self) -> None:
        assert self.inputs is not None
        inputs = self.inputs
        self.tokens -= 1.0
        full, self.full = self.full, False
        update = Update(self.applied, self.desired.current(), full)
        self.observer.began(update)
        if not update:
            self.observer.applied(update, 0.0)
            inputs.succeeded()
            return
        began = self.outSince = self.clock.seconds()

        def done(_: None) -> None:
            self.out = self.outSince = None
            seconds = self.clock.seconds() - began
            self.applied = update.current
            self.failures = 0
            if update.changed or update.removed:
                _log.info(
                    "Applied {changed} changed, {removed} removed of {total} service ports in {seconds:.3f}s: {names}",
                    changed=len(update.changed), removed=len(update.removed), total=len(update.current),
                    seconds=seconds, names=_named(update),
                )
            else:
                _log.debug(
                    "Compared {total} service ports with what is in force in {seconds:.3f}s",
                    total=len(update.current), seconds=seconds,
                )
            self.observer.applied(update, seconds)
            if full:
                self.scheduleFull(seconds)
            inputs.succeeded()

        def broken(failure: Failure) -> None:
            self.out = self.outSince = None
            self.full = True
            self.failures += 1
            self.observer.failed(update, self.clock.seconds() - began)
            _log.error(
                "Could not apply {update}; what was in force stays, and all of it is tried again: {error}",
                update=update, error=failure.getErrorMessage(),
            )
            if self.failures == 1:
                _log.debug("{trace}", trace=failure.getTraceback())
            inputs.failed()

        self.out = self.listener.onUpdate(update)
        self.out.addCallbacks(done, broken)

    def over(self) -> None:
        waiting, self.whenOver = self.whenOver, []
        for deferred in waiting:
            deferred.callback(None)


def _makeMachine() -> Callable[[_Core], _Inputs]:
    builder = TypeMachineBuilder(_Inputs, _Core)
    waiting = builder.state("waiting for the sources")
    quiet = builder.state("quiet")
    scheduled = builder.state("scheduled")
    applying = builder.state("applying")
    applyingStale = builder.state("applying what is already outdated")
    resting = builder.state("resting after a failure")
    stopping = builder.state("stopping")
    stopped = builder.state("stopped")

    # "due" leaves waiting: the Syncer sends it once everything has been listed
    waiting.upon(_Inputs.changed).loop().returns(None)
    quiet.upon(_Inputs.due).loop().returns(None)
    scheduled.upon(_Inputs.changed).loop().returns(None)
    applying.upon(_Inputs.changed).to(applyingStale).returns(None)
    applyingStale.upon(_Inputs.changed).loop().returns(None)
    resting.upon(_Inputs.changed).loop().returns(None)
    for over in (stopping, stopped):
        over.upon(_Inputs.changed).loop().returns(None)
        over.upon(_Inputs.due).loop().returns(None)
    stopping.upon(_Inputs.stop).loop().returns(None)

    @quiet.upon(_Inputs.changed).to(scheduled)
    def first(inputs: _Inputs, core: _Core) -> None:
        core.schedule()

    @waiting.upon(_Inputs.due).to(applying)
    @scheduled.upon(_Inputs.due).to(applying)
    @resting.upon(_Inputs.due).to(applying)
    def apply(inputs: _Inputs, core: _Core) -> None:
        # not from within the transition: a listener that answers at once would feed the machine while it moves
        core._later(0, core.prepare)

    applying.upon(_Inputs.succeeded).to(quiet).returns(None)

    @applyingStale.upon(_Inputs.succeeded).to(scheduled)
    def again(inputs: _Inputs, core: _Core) -> None:
        core.schedule()

    @applying.upon(_Inputs.failed).to(resting)
    @applyingStale.upon(_Inputs.failed).to(resting)
    def rest(inputs: _Inputs, core: _Core) -> None:
        core.scheduleRetry()

    @stopped.upon(_Inputs.stop).loop()
    @waiting.upon(_Inputs.stop).to(stopped)
    @quiet.upon(_Inputs.stop).to(stopped)
    @scheduled.upon(_Inputs.stop).to(stopped)
    @resting.upon(_Inputs.stop).to(stopped)
    def stopNow(inputs: _Inputs, core: _Core) -> None:
        core.cancelAll()
        core.over()

    @applying.upon(_Inputs.stop).to(stopping)
    @applyingStale.upon(_Inputs.stop).to(stopping)
    def stopSoon(inputs: _Inputs, core: _Core) -> None:
        core.cancelAll()
        if core.out is None:
            core.clock.callLater(0, inputs.succeeded)

    @stopping.upon(_Inputs.succeeded).to(stopped)
    @stopping.upon(_Inputs.failed).to(stopped)
    def finish(inputs: _Inputs, core: _Core) -> None:
        core.cancelAll()
        core.over()

    return builder.build()


_machine = _makeMachine()


class Syncer:
    """
    The first change goes out at once, later ones at most every minimal period (with a burst of two); a failure is
    retried in full with back-off; everything is compared with the world every full period.
    """

    def __init__(
        self,
        clock: IReactorTime,
        desired: IDesired,
        listener: IUpdateListener,
        observer: ISyncObserver,
        *,
        minPeriod: float = 1.0,
        fullPeriod: float = 30.0,
    ) -> None:
        """
        :param minPeriod: seconds; 0 for every change at once.
        :param fullPeriod: seconds between comparisons with the world; stretched where one takes long.
        """
        self._core = _Core(clock, desired, listener, observer, minPeriod, fullPeriod, tokensAt=clock.seconds())
        self._inputs = _machine(self._core)
        self._core.inputs = self._inputs
        self._begun = False
        self._ready = False

    @property
    def applied(self) -> ServiceMap:
        """The map that is in force."""
        return self._core.applied

    @property
    def failures(self) -> int:
        """How many times in a row an update has failed by now."""
        return self._core.failures

    @property
    def outFor(self) -> float:
        """For how many seconds an update has been out by now; 0 when none is."""
        since = self._core.outSince
        return 0.0 if since is None else self._core.clock.seconds() - since

    def start(self) -> None:
        """The listeners are ready. Nothing goes out before this was called and the sources have synced."""
        self._ready = True
        self._begin()

    def changed(self) -> None:
        """The desired state may be another than before."""
        if self._begun:
            self._inputs.changed()
        else:
            self._begin()

    def resync(self) -> None:
        """Somebody else changed what we keep: compare all of it with the world, soon."""
        self._core.full = True
        self._inputs.changed()

    def stop(self) -> Deferred[None]:
        """Send no more updates. Fires when the one that is out, if any, is done."""
        self._begun = True
        done: Deferred[None] = Deferred()
        self._core.whenOver.append(done)
        self._inputs.stop()
        return done

    def _begin(self) -> None:
        if not self._begun and self._ready and self._core.desired.synced:
            self._begun = True
            self._inputs.due()
