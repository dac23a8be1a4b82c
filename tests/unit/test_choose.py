"""Which engine carries bytes: by name, by what works here, and what is said about it."""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import reactor
from twisted.internet.pollreactor import PollReactor
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.relays import descriptors
from twisted_kproxy.configmodel import ENGINES
from twisted_kproxy.interfaces import IRelay, NotAvailable
from twisted_kproxy.reactor import DirectReactor
from twisted_kproxy.userspace.engines import choose
from twisted_kproxy.userspace.engines.choose import AUTOMATIC, chooseEngine, makeEngines
from twisted_kproxy.userspace.engines.native import NativeRelay
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.engines.protocol import ProtocolRelay
from twisted_kproxy.userspace.udpsockets import Sockets

PUMP = "twisted_kproxy.userspace.engines._pump"


class ChooseTests(SynchronousTestCase):
    """:func:`chooseEngine`."""

    def choose(self, *args: Any, on: Any = reactor) -> tuple[IRelay, str]:
        """What is chosen, and the one line that is logged about it."""
        with capturedLogs() as events:
            engine = chooseEngine(on, Poller(on), *args)
        self.addCleanup(engine.stop)
        (line,) = [formatEvent(event) for event in events]
        return engine, line

    def withoutModule(self) -> None:
        """As if the C module had not been built."""
        had = sys.modules.pop(PUMP, None)
        sys.modules[PUMP] = None  # type: ignore[assignment]
        self.addCleanup(lambda: sys.modules.update({PUMP: had}) if had else sys.modules.pop(PUMP))

    def test_names(self) -> None:
        """Every name that the configuration may say stands for an engine, and the other way round."""
        self.assertEqual(set(ENGINES) - {"auto"}, set(choose._RELAYS))
        self.assertEqual(set(AUTOMATIC), set(choose._RELAYS))
        self.assertEqual(set(choose._SOCKETS), set(choose._RELAYS))

    def test_byName(self) -> None:
        """A named engine is taken; ``protocol`` is never taken by itself where another works."""
        engine, line = self.choose("protocol")
        self.assertIsInstance(engine, ProtocolRelay)
        self.assertTrue(line.startswith("Connections are relayed by the engine protocol in the reactor's thread"), line)
        self.assertIsInstance(self.choose("python")[0], PairRelay)
        self.assertIn(self.choose()[0].name, ("native", "python"))

    def test_withoutModule(self) -> None:
        """Without the C module ``auto`` takes the engine in Python, and says why; ``native`` cannot be had."""
        self.withoutModule()
        engine, line = self.choose()
        self.assertIsInstance(engine, PairRelay)
        self.assertIn("engine python in the reactor's thread", line)
        self.assertIn("(not native: its C module is not there", line)
        error = self.assertRaises(NotAvailable, chooseEngine, reactor, Poller(reactor), "native")
        self.assertTrue(str(error).startswith("engine = native: native: its C module is not there"), error)
        self.assertIn("install with a C compiler", str(error))

    def test_failsItsTrial(self) -> None:
        """A C module that is there and does not work is passed over, and lets go of what it had."""

        def fails(relay: NativeRelay) -> None:
            raise NotAvailable("its trial gave nothing")

        try:
            NativeRelay(reactor, Poller(reactor)).stop()
        except NotAvailable:
            raise self.skipTest("the C module was not built here")
        self.patch(choose, "selfTest", fails)
        poller = Poller(reactor)
        before = descriptors()
        with capturedLogs() as events:
            engine = chooseEngine(reactor, poller)
        self.assertIsInstance(engine, PairRelay)
        self.assertIn("(not native: its trial gave nothing)", formatEvent(events[0]))
        self.assertLessEqual(descriptors(), before)

    def test_nothingElse(self) -> None:
        """Where neither of the usual ones can be had the protocols serve; where nothing can be had, each says why."""

        def none(*args: Any) -> IRelay:
            raise NotAvailable("broken")

        self.patch(choose, "_RELAYS", {**choose._RELAYS, "native": none, "python": none})
        engine, line = self.choose()
        self.assertIsInstance(engine, ProtocolRelay)
        self.assertIn("(not native: broken; not python: broken)", line)
        self.patch(choose, "_RELAYS", dict.fromkeys(AUTOMATIC, none))
        error = self.assertRaises(NotAvailable, chooseEngine, reactor, Poller(reactor))
        self.assertEqual(str(error), "engine = auto: native: broken; python: broken; protocol: broken")

    def test_reactors(self) -> None:
        """In our reactor events come from its own epoll; in any other, a strange one too, from a nested one."""

        class Strange(PollReactor):
            pass

        for make, expected in ((DirectReactor, "the reactor's own epoll"), (Strange, "an epoll nested in Strange")):
            on = make()
            self.addCleanup(on.removeAll)
            _, line = self.choose("python", on=on)
            self.assertIn(f"events by {expected}", line)

    def test_thread(self) -> None:
        """A thread of its own is for the native engine; the others go without."""
        try:
            self.assertIn("native in its own thread", self.choose("native", True)[1])
        except NotAvailable:
            pass  # not built here
        self.assertIn("python in the reactor's thread", self.choose("python", True)[1])

    def test_oneProcess(self) -> None:
        """With one worker, which is the daemon itself, there is no other process."""
        relay, sockets = makeEngines(reactor, Poller(reactor), "python", False, 1)
        self.assertIsInstance(relay, PairRelay)
        self.assertIs(type(sockets), Sockets)

    def test_protocol(self) -> None:
        """Datagrams have no protocols of their own: beside that engine they go through Python."""
        relay, sockets = makeEngines(reactor, Poller(reactor), "protocol")
        self.assertIsInstance(relay, ProtocolRelay)
        self.assertIs(type(sockets), Sockets)
