"""Tests of twisted_kproxy.balance.failures."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.builders import portName
from tests.shared.proxiers import RecordingObserver
from twisted_kproxy.balance import failures
from twisted_kproxy.balance.failures import EndpointFailures
from twisted_kproxy.core.values import Endpoint, Outcome, PoolName
from twisted_kproxy.interfaces import ITrafficObserver

POOL = PoolName(portName(), "cluster")
DEAD, WELL = Endpoint("10.1.0.1", 80), Endpoint("10.1.0.2", 80)


class FailuresTests(SynchronousTestCase):
    """Which endpoints fail is known and told."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.next = RecordingObserver()
        self.failures = EndpointFailures(self.clock, self.next)
        self.said: list[str] = []
        self.lines: list[str] = []
        globalLogPublisher.addObserver(self.hear)
        self.addCleanup(globalLogPublisher.removeObserver, self.hear)

    def hear(self, event: dict[str, object]) -> None:
        if event.get("log_namespace", "").startswith("twisted_kproxy.balance"):  # type: ignore[attr-defined]
            self.said.append(str(event.get("reason", "well")))
            self.lines.append(formatEvent(event))

    def miss(self, times: int = 1) -> None:
        for _ in range(times):
            self.failures.missed(POOL, DEAD, "refused")

    def test_passesOn(self) -> None:
        """Whoever follows hears everything."""
        verifyObject(ITrafficObserver, self.failures)
        self.miss()
        self.failures.opened(POOL, WELL, 0.5)
        self.failures.closed(POOL, WELL, Outcome("done", 1, 2))
        self.failures.failed(POOL, "no-endpoint")
        self.assertEqual(
            (self.next.misses, self.next.openings, self.next.failures, len(self.next.closings)),
            ([(DEAD, "refused")], [(POOL, WELL, 0.5)], ["no-endpoint"], 1),
        )

    def test_status(self) -> None:
        """What has failed and not answered since is shown, with how often, how, and when."""
        self.miss(3)
        self.clock.advance(5)
        self.assertEqual(
            self.failures.status(portName(), (DEAD, WELL)),
            {"10.1.0.1:80": {"failures": 3, "reason": "refused", "secondsAgo": 5.0}},
        )
        self.failures.opened(POOL, DEAD, 0.1)
        self.assertEqual(self.failures.status(portName(), (DEAD, WELL)), {})

    def test_one(self) -> None:
        """One is no plural."""
        self.miss()
        self.assertIn("(1 failed try since it last answered)", self.lines[0])

    def test_logged(self) -> None:
        """The first failure is logged at once, then one line a minute, however many there are."""
        self.miss(1000)
        self.clock.advance(59)
        self.miss()
        self.assertEqual(self.said, ["refused"])
        self.clock.advance(1)
        self.miss(2)
        self.assertEqual(self.said, ["refused", "refused"])

    def test_answersAgain(self) -> None:
        """That it answers again is logged, too."""
        self.miss()
        self.clock.advance(120)
        self.failures.opened(POOL, DEAD, 0.1)
        self.assertEqual(self.said, ["refused", "well"])

    def test_flapping(self) -> None:
        """One that fails and answers in turn does not fill the log."""
        for _ in range(100):
            self.miss()
            self.failures.opened(POOL, DEAD, 0.1)
            self.clock.advance(0.5)
        self.assertEqual(self.said, ["refused"])

    def test_bounded(self) -> None:
        """So many are remembered, those that failed last."""
        self.patch(failures, "MOST", 3)
        for number in range(1, 6):
            self.failures.missed(POOL, Endpoint("10.1.0.9", number), "timeout")
        everyone = tuple(Endpoint("10.1.0.9", number) for number in range(1, 6))
        self.assertEqual(list(self.failures.status(portName(), everyone)), [f"10.1.0.9:{n}" for n in (3, 4, 5)])
