"""The engine in C: the suite of every engine, in the reactor's thread and in one of its own."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import SkipTest, TestCase

from tests.shared.relays import BulkSuite, RelaySuite, descriptors
from tests.shared.relayscripts import ScriptSuite
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.userspace.engines.native import NativeRelay, selfTest
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.engines.splice import MOST


class NativeRelayTests(RelaySuite, BulkSuite, ScriptSuite, TestCase):
    """In the reactor's thread."""

    timeout = 60
    reactor = reactor
    pooled = 2 * MOST
    threaded = False

    def makeRelay(self, reactor: Any) -> NativeRelay:
        try:
            relay = NativeRelay(reactor, Poller(reactor), threaded=self.threaded)
        except NotAvailable as error:
            raise SkipTest(str(error))
        self.addCleanup(relay.stop)
        return relay

    def pipesInUse(self, relay: Any) -> int:
        made, idle = relay.pipes
        return int(made - idle)

    def test_selfTest(self) -> None:
        """The trial at the start succeeds, and leaves nothing behind."""
        relay = self.makeRelay(reactor)
        before = descriptors()
        selfTest(relay)
        self.assertEqual(descriptors(), before)

    def test_stopsGoingOn(self) -> None:
        """What was to go on in the next turn does not once it is stopped: its memory is gone by then."""
        relay = self.makeRelay(reactor)
        goingOn = relay._goOnCall = reactor.callLater(0, relay._goOn)  # type: ignore[attr-defined]
        relay.stop()
        self.assertFalse(goingOn.active())


class ThreadTests(NativeRelayTests):
    """In a thread of its own."""

    threaded = True
