"""Tests of twisted_kproxy.syncer and twisted_kproxy.broadcast."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.builders import portName, serviceMap, servicePort
from twisted_kproxy.broadcast import Broadcast
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import ServiceMap
from twisted_kproxy.interfaces import ISyncObserver, IUpdateListener, RulesRejected
from twisted_kproxy.syncer import Syncer


class Desired:
    """A cluster whose state the test sets."""

    def __init__(self) -> None:
        self.synced = True
        self.map = ServiceMap()
        self.pieces = 0
        self.during: Callable[[], None] = lambda: None

    def catchUp(self, limit: int = 100) -> bool:
        self.pieces = max(0, self.pieces - 1)
        self.during()
        return self.pieces > 0

    def current(self) -> ServiceMap:
        return self.map


@implementer(IUpdateListener)
class Listener:
    """Keeps what it gets; answers at once, or when told to."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.answer: Exception | None = None
        self.held: Deferred[None] | None = None
        self.hold = False

    def onUpdate(self, update: Update) -> Deferred[None]:
        self.updates.append(update)
        if self.hold:
            self.held = Deferred()
            return self.held
        return fail(self.answer) if self.answer else succeed(None)


@implementer(ISyncObserver)
class Observer:
    """Keeps the order of what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def queued(self) -> None:
        self.seen.append("queued")

    def began(self, update: Update) -> None:
        self.seen.append("began")

    def applied(self, update: Update, seconds: float) -> None:
        self.seen.append("applied")

    def failed(self, update: Update, seconds: float) -> None:
        self.seen.append("failed")


class SyncerTests(SynchronousTestCase):
    """When updates go out."""

    def setUp(self) -> None:
        self.clock, self.desired, self.listener, self.observer = Clock(), Desired(), Listener(), Observer()
        self.syncer = Syncer(
            self.clock, self.desired, self.listener, self.observer, minPeriod=1.0, fullPeriod=30.0
        )

    def change(self, number: int) -> ServiceMap:
        """The desired state is another one, and the syncer hears of it."""
        self.desired.map = serviceMap(servicePort(portName(f"s{number}")))
        self.syncer.changed()
        return self.desired.map

    def begin(self) -> None:
        """Start, let the first (full) update go by, and use up nothing of the burst."""
        self.syncer.start()
        self.clock.pump([0, 0, 5])
        self.listener.updates.clear()
        self.observer.seen.clear()

    def sent(self) -> list[ServiceMap]:
        return [update.current for update in self.listener.updates]

    def test_interfaces(self) -> None:
        """The doubles are what they stand for, and the broadcast is a listener."""
        verifyObject(ISyncObserver, self.observer)
        verifyObject(IUpdateListener, Broadcast([]))

    def test_waitsForSources(self) -> None:
        """Nothing goes out before all sources have synced and the listeners are ready."""
        self.desired.synced = False
        self.syncer.start()
        self.change(1)
        self.clock.advance(100)
        self.assertEqual(self.sent(), [])
        self.desired.synced = True
        self.syncer.changed()
        self.clock.pump([0, 0])
        self.assertEqual(self.sent(), [self.desired.map])
        self.assertTrue(self.listener.updates[0].full)

    def test_waitsForListeners(self) -> None:
        """Synced sources alone do not start it."""
        self.change(1)
        self.clock.advance(100)
        self.assertEqual(self.sent(), [])

    def test_firstAtOnceThenCoalesced(self) -> None:
        """A change when quiet goes out at once, as does the next; then one per period, the last state each time."""
        self.begin()
        first = self.change(1)
        self.clock.pump([0, 0])
        second = self.change(2)
        self.clock.pump([0, 0])
        self.assertEqual(self.sent(), [first, second])
        for number in range(3, 13):
            last = self.change(number)
            self.clock.advance(0.09)
        self.assertEqual(len(self.sent()), 2)
        self.clock.pump([0.11, 0, 0])
        self.assertEqual(self.sent(), [first, second, last])

    def test_changesWhileOut(self) -> None:
        """While an update is out, changes gather into the next one; none is lost, none overtakes."""
        self.begin()
        self.listener.hold = True
        self.change(1)
        self.clock.pump([0, 0])
        held = self.listener.held
        self.change(2)
        last = self.change(3)
        self.clock.pump([5, 5])
        self.assertEqual(len(self.sent()), 1)
        self.listener.hold = False
        assert held is not None
        held.callback(None)
        self.clock.pump([1, 0, 0])
        self.assertEqual(self.sent()[1:], [last])
        self.assertEqual(self.listener.updates[1].removed, {portName("s1")})

    def test_failureIsRetriedInFull(self) -> None:
        """After a failure the same or a newer map comes again, in full, after 1, 2, 4 … 30 s, until it is in force."""
        self.begin()
        self.listener.answer = RulesRejected("no")
        last = self.change(1)
        self.clock.pump([0, 0])
        for wait in (1, 2, 4, 8, 16, 30, 30):
            before = len(self.sent())
            self.clock.pump([wait - 0.01, 0])
            self.assertEqual(len(self.sent()), before)
            self.clock.pump([0.01, 0])
            self.assertEqual(len(self.sent()), before + 1)
        self.assertTrue(self.listener.updates[-1].full)
        self.assertEqual(len(self.listener.updates[-1].previous), 0)
        self.listener.answer = None
        self.clock.pump([30, 0])
        self.assertIs(self.syncer.applied, last)
        self.assertEqual(self.syncer.failures, 0)

    def test_changesWhileResting(self) -> None:
        """What changes during back-off is in the next try, and does not hasten it."""
        self.begin()
        self.listener.answer = RulesRejected("no")
        self.change(1)
        self.clock.pump([0, 0])
        last = self.change(2)
        self.listener.answer = None
        self.clock.pump([0.5, 0])
        self.assertEqual(len(self.sent()), 1)
        self.clock.pump([0.5, 0])
        self.assertIs(self.syncer.applied, last)

    def test_periodicComparison(self) -> None:
        """Every full period all is compared with the world, without any change."""
        self.begin()
        self.clock.pump([25, 0, 0])
        self.assertEqual([update.full for update in self.listener.updates], [True])

    def test_expensiveComparisonIsRarer(self) -> None:
        """A comparison that takes long is made less often."""
        self.listener.hold = True
        self.syncer.start()
        self.clock.pump([0, 0, 6])
        assert self.listener.held is not None
        self.listener.held.callback(None)
        self.clock.pump([60, 0, 0])
        self.assertEqual(len(self.listener.updates), 1)
        self.clock.pump([60, 0, 0])
        self.assertEqual(len(self.listener.updates), 2)

    def test_resync(self) -> None:
        """A change from outside asks for a full comparison at once."""
        self.begin()
        self.syncer.resync()
        self.clock.pump([0, 0])
        self.assertEqual([update.full for update in self.listener.updates], [True])

    def test_nothingToDo(self) -> None:
        """A change that alters nothing bothers no listener, and leaves nothing queued."""
        self.begin()
        self.syncer.changed()
        self.clock.pump([0, 0])
        self.assertEqual((self.sent(), self.observer.seen), ([], ["queued", "began", "applied"]))

    def test_pieces(self) -> None:
        """Resolving much is cut into turns of the reactor, before anything is sent."""
        self.begin()
        stacks: list[int] = []
        self.desired.during = lambda: stacks.append(len(traceback.extract_stack()))
        self.desired.pieces = 5
        self.change(1)
        self.clock.pump([0, 0])
        self.assertEqual(len(stacks), 5)
        self.assertEqual(len(set(stacks)), 1, "pieces were nested in each other")
        self.assertEqual(len(self.sent()), 1)

    def test_cannotBeWorkedOut(self) -> None:
        """A defect in working out what should be is logged, and tried again like any failure."""
        def fails() -> None:
            raise ValueError("a defect")

        self.begin()
        self.desired.during = fails
        last = self.change(1)
        self.clock.pump([0, 0])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.desired.during = lambda: None
        self.clock.pump([1, 0, 0])
        self.assertIs(self.syncer.applied, last)

    def test_unlimited(self) -> None:
        """With a minimal period of 0 every change goes out at once."""
        self.syncer = Syncer(self.clock, self.desired, self.listener, self.observer, minPeriod=0)
        self.begin()
        for number in range(10):
            self.change(number)
            self.clock.pump([0, 0])
        self.assertEqual(len(self.sent()), 10)

    def test_stopWhenQuiet(self) -> None:
        """Stopping fires at once and leaves no timer; nothing goes out afterwards."""
        self.begin()
        self.successResultOf(self.syncer.stop())
        self.change(1)
        self.syncer.resync()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.successResultOf(self.syncer.stop())

    def test_stopWhileOut(self) -> None:
        """Stopping waits for the update that is out, however it ends."""
        for answer in (None, RulesRejected("no")):
            self.setUp()
            self.begin()
            self.listener.hold = True
            self.change(1)
            self.clock.pump([0, 0])
            stopped = self.syncer.stop()
            self.assertNoResult(stopped)
            assert self.listener.held is not None
            if answer is None:
                self.listener.held.callback(None)
            else:
                self.listener.held.errback(answer)
            self.successResultOf(stopped)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stopWhilePreparing(self) -> None:
        """Stopping in the middle of resolving sends nothing any more."""
        self.begin()
        stopped: list[Deferred[None]] = []

        def stopOnce() -> None:
            if self.desired.pieces == 2:
                stopped.append(self.syncer.stop())

        self.desired.during = stopOnce
        self.desired.pieces = 5
        self.change(1)
        self.clock.pump([0, 0, 0])
        self.successResultOf(stopped[0])
        self.assertEqual((self.sent(), self.clock.getDelayedCalls()), ([], []))

    def test_stopBeforeStart(self) -> None:
        """Stopping before anything began is fine."""
        self.successResultOf(self.syncer.stop())
        self.syncer.start()
        self.change(1)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class BroadcastTests(SynchronousTestCase):
    """One update, several listeners."""

    def test_inOrder(self) -> None:
        """The second is told when the first is done; the Deferred fires when all are."""
        first, second = Listener(), Listener()
        first.hold = True
        update = Update(ServiceMap(), serviceMap(servicePort()))
        done = Broadcast([first, second]).onUpdate(update)
        self.assertEqual((first.updates, second.updates), ([update], []))
        assert first.held is not None
        first.held.callback(None)
        self.assertEqual(second.updates, [update])
        self.successResultOf(done)

    def test_failure(self) -> None:
        """One that fails does not keep the update from the next, and the whole fails."""
        first, second = Listener(), Listener()
        first.answer = RulesRejected("no")
        done = Broadcast([first, second]).onUpdate(Update(ServiceMap(), serviceMap(servicePort())))
        self.assertEqual(len(second.updates), 1)
        self.failureResultOf(done, RulesRejected)

    def test_raises(self) -> None:
        """A listener that raises counts as one that failed."""
        @implementer(IUpdateListener)
        class Broken:
            def onUpdate(self, update: Update) -> Deferred[None]:
                raise ValueError("broken")

        done = Broadcast([Broken()]).onUpdate(Update(ServiceMap(), ServiceMap()))
        self.failureResultOf(done, ValueError)
