"""Telling operators of a source that has lost contact."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionLost, ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseFailed
from twisted.web.http import PotentialDataLoss

from tests.shared.reflectors import ReflectorCase, bookmark, listOf
from tests.unit.test_api import Rig
from twisted_kproxy.sources import errors
from twisted_kproxy.sources.contact import Contact, Outage
from twisted_kproxy.sources.journal import Journal


class Log:
    """Collects what is logged."""

    def __init__(self, case: SynchronousTestCase) -> None:
        self.events: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self.events.append)
        case.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def texts(self, beginning: str) -> list[str]:
        said = [it["log_format"].format(**it) for it in self.events if it.get("log_format")]
        return [text for text in said if text.startswith(beginning)]


class ContactTests(SynchronousTestCase):
    """When it is a warning, and how often."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.log = Log(self)
        self.outages: dict[str, Outage] = {}
        self.contact = Contact(self.clock, "main", lambda: self.outages)
        self.contact.start()
        self.addCleanup(self.stop)

    def stop(self) -> None:
        self.contact.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def pass_(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.advance(1)

    def test_short(self) -> None:
        """Less than a minute is not worth a word."""
        self.outages["Service"] = Outage(0.0, "the connection was refused")
        self.pass_(60)
        self.outages.clear()
        self.pass_(60)
        self.assertEqual(self.log.texts("Source main"), [])

    def test_long(self) -> None:
        """After a minute it is a warning, once a minute, with since when and why; and told when it is over."""
        self.outages["Service"] = Outage(0.0, "the connection was refused")
        self.outages["Node"] = Outage(30.0, "timed out")
        self.pass_(300)
        warnings = self.log.texts("Source main has been out of contact")
        self.assertIn(len(warnings), (4, 5))
        self.assertIn("for 70 s (Service): the connection was refused. Everything goes on as last known", warnings[0])
        self.assertIn("(Node, Service)", warnings[1])
        self.outages.clear()
        self.pass_(60)
        (back,) = self.log.texts("Source main is in contact again")
        self.assertIn("after 310 s", back)

    def test_again(self) -> None:
        """A second outage is told like the first."""
        for _ in range(2):
            self.outages["Service"] = Outage(self.clock.seconds(), "x")
            self.pass_(80)
            self.outages.clear()
            self.pass_(80)
        self.assertEqual(len(self.log.texts("Source main is in contact again")), 2)


class OutageTests(ReflectorCase):
    """When a reflector is out of contact."""

    def since(self) -> float | None:
        outage = self.reflector.outage()
        return None if outage is None else outage.since

    def test_quietIsNoOutage(self) -> None:
        """A watch that brings nothing is in contact, however old the last news are."""
        self.watching()
        self.clock.advance(300)
        self.assertIsNone(self.since())

    def test_fromTheFirstError(self) -> None:
        """It begins with the first thing that goes wrong, and lasts until something works."""
        self.start()
        self.nextList("0").answerJson(listOf())
        watch = self.nextWatch("100")
        watch.begin()
        self.clock.advance(50)
        self.network.refusal = ConnectionRefusedError()
        watch.reset()
        for _ in range(100):
            self.clock.advance(1)
        self.assertEqual(self.since(), 50)
        self.network.refusal = None
        while not self.network.exchanges:
            self.clock.advance(1)
        watch = self.nextWatch("100")
        watch.begin()
        self.assertEqual(self.since(), 50)
        self.clock.advance(1)
        self.assertIsNone(self.since())

    def test_flapping(self) -> None:
        """Watches that open and break at once are no contact."""
        watch = self.watching()
        while self.clock.seconds() < 120:
            watch.reset()
            while not self.network.exchanges:
                self.clock.advance(0.5)
            watch = self.nextWatch("100")
            watch.begin()
        self.assertEqual(self.since(), 0)

    def test_deadLink(self) -> None:
        """A link that turns out to be dead was so since the last that came over it."""
        watch = self.watching()
        self.clock.advance(60)
        watch.event("BOOKMARK", bookmark("110"))
        self.clock.advance(150)
        self.assertTrue(watch.aborted)
        self.assertEqual(self.since(), 60)


class SourceTests(SynchronousTestCase):
    """A whole source."""

    def test_outage(self) -> None:
        """An API server that is down for ten minutes is told once a minute, all kinds together, and its return."""
        log = Log(self)
        rig = Rig()
        rig.source.startService()
        rig.clock.advance(0)
        rig.clock.advance(5)
        rig.network.refusal = ConnectionRefusedError()
        for _, exchange in rig.server.watches:
            exchange.reset()
        for _ in range(600):
            rig.clock.advance(1)
        warnings = log.texts("Source main has been out of contact")
        self.assertTrue(8 <= len(warnings) <= 10, warnings)
        self.assertIn("(EndpointSlice, Node, Service): the connection was refused", warnings[-1])
        rig.network.refusal = None
        for _ in range(120):
            rig.clock.advance(1)
        self.assertEqual(len(log.texts("Source main is in contact again")), 1)
        counters = rig.source.counters()["Service"]
        self.assertEqual((counters["lists"], counters["relists"], counters["watches"]), (1, 0, 2))
        self.assertGreater(counters["retries"], 5)
        rig.source.stopService()
        self.assertEqual(rig.clock.getDelayedCalls(), [])


class WordsTests(SynchronousTestCase):
    """What is said of an error when it happens, in words that need no knowledge of Twisted."""

    def test_words(self) -> None:
        """Contact that was never there, that was lost, and a server that answers otherwise than with what it has."""
        log = Log(self)
        clock = Clock()
        journal = Journal(clock, "main", "Service")
        cut = errors.brokenOff(Failure(ResponseFailed([Failure(ConnectionLost()), Failure(PotentialDataLoss())])))
        journal.error(cut)
        clock.advance(61)
        journal.agreed()
        journal.error(cut)
        journal.error(errors.Denied(403, "Forbidden", "no"))
        self.assertEqual(log.texts("Source main"), [
            "Source main: no contact yet for Services: the server closed the connection",
            "Source main: lost contact for Services: the server closed the connection",
            "Source main: cannot read Services: 403 Forbidden: no",
        ])

    def test_otherEnds(self) -> None:
        """An answer that ends otherwise is told with what is known of it."""
        self.assertEqual(str(errors.brokenOff(Failure(ValueError("odd")))), "the answer broke off: odd")
        lost = errors.translated(ResponseFailed([Failure(ConnectionLost())]))
        self.assertEqual(str(lost), "the server closed the connection before it had answered")
