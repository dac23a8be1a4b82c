"""One service port that the kernel refuses costs no other."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import key, same, to
from tests.unit.test_ruleplane import mapOf, service
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset
from twisted_kproxy.core.values import ServiceMap, ServicePort
from twisted_kproxy.interfaces import RulesNotJudged, RulesRejected
from twisted_kproxy.netfilter.memory import MemoryWriter
from twisted_kproxy.netfilter.plane import RulePlane


def several(count: int, base: int = 40000) -> list[ServicePort]:
    return [service(f"s{n}", f"10.96.1.{n + 1}", base + n) for n in range(count)]


class QuarantineTests(SynchronousTestCase):
    """The plane over a writer that refuses some frontends."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.writer = MemoryWriter()
        self.plane = RulePlane(self.clock, self.writer)
        self.successResultOf(self.plane.start())
        self.current = ServiceMap()
        self.bad = key("10.96.1.7", 80)  # of s6

    def update(self, *ports: ServicePort, full: bool = False) -> Deferred[None]:
        previous, self.current = self.current, mapOf(*ports)
        return self.plane.onUpdate(Update(previous, self.current, full))

    def done(self, *ports: ServicePort, full: bool = False) -> None:
        self.successResultOf(self.update(*ports, full=full))

    def inForce(self) -> dict[Any, Rule]:
        assert self.writer.inForce is not None
        return dict(self.writer.inForce.rules)

    def assertServed(self, *ports: ServicePort) -> None:
        """Just these are, and their guards."""
        keys = {port.key(port.frontends[0]): same(to(port.cluster[0].port)) for port in ports}
        self.assertEqual(self.inForce(), keys)
        guards = {Guard("IPv4", "TCP", port.cluster[0].port) for port in ports}
        self.assertEqual(self.writer.inForce.guards, guards)  # type: ignore[union-attr]

    def test_amongHundred(self) -> None:
        """Of a hundred, ninety-nine are served at the first update, after some tens of writes; the other is told."""
        self.writer.poison = {self.bad}
        ports = several(100)
        self.done(*ports)
        self.assertServed(*ports[:6], *ports[7:])
        self.assertEqual(list(self.plane.unserved()), ["default/s6:/TCP/IPv4"])
        self.assertIn("poison", self.plane.status()["quarantined"]["default/s6:/TCP/IPv4"])
        self.assertLess(len(self.writer.writes), 30)

    def test_amongChanged(self) -> None:
        """In a step it costs no other that has changed, and what was in force of it stays."""
        before, after = several(10), several(10, 41000)
        self.done(*before)
        self.writer.poison = {self.bad}
        self.done(*after)
        self.assertServed(*after[:6], before[6], *after[7:])

    def test_several(self) -> None:
        """Three of them are all found."""
        ports = several(50)
        self.writer.poison = {ports[n].key(ports[n].frontends[0]) for n in (0, 23, 49)}
        self.done(*ports)
        self.assertEqual(len(self.plane.unserved()), 3)
        self.assertServed(*(port for n, port in enumerate(ports) if n not in (0, 23, 49)))

    def test_named(self) -> None:
        """Where the writer says which, nothing is searched."""
        ports = several(50)
        self.writer.poison, self.writer.tellsPoison = {self.bad}, True
        self.done(*ports)
        self.assertServed(*ports[:6], *ports[7:])
        self.assertLessEqual(len(self.writer.writes), 4)

    def test_alone(self) -> None:
        """Also when nothing else has changed: a rule that does no harm tells that others are taken, and goes again."""
        self.done(*several(3))
        self.writer.poison = {self.bad}
        self.done(*several(7))
        self.assertServed(*several(6))
        self.assertEqual(list(self.plane.unserved()), ["default/s6:/TCP/IPv4"])

    def test_accident(self) -> None:
        """What is refused once and taken then is in force, and nobody is in quarantine."""
        for failures in (1, 2, 3):
            self.setUp()
            self.writer.failures = [RulesRejected("at this moment not") for _ in range(failures)]
            ports = several(20)
            update = self.update(*ports)
            if failures > 1:
                update.addErrback(lambda _: self.plane.onUpdate(Update(ServiceMap(), self.current, True)))
            self.successResultOf(update)
            self.assertServed(*ports)
            self.assertEqual(self.plane.unserved(), {})

    def test_everySecond(self) -> None:
        """A writer that fails every second time blames nobody for long."""
        ports = several(20)
        for _ in range(6):
            failures: list[Any] = []
            self.patch(self.writer, "_refuse", lambda value, seen=failures: self.alternately(value, seen))
            try:
                self.done(*ports, full=True)
            except self.failureException:
                continue
        self.assertServed(*ports)
        self.assertEqual(self.plane.unserved(), {})

    @staticmethod
    def alternately(value: object, seen: list[Any]) -> None:
        seen += [value] if value is not None else []
        if len(seen) % 2 and value is not None:
            raise RulesRejected("every second time")

    def test_nobodyToBlame(self) -> None:
        """Where everything is refused the update fails after a few writes, and nobody is in quarantine."""
        self.done(*several(2))
        before = self.inForce()

        def refuse(value: object) -> None:
            if value is None:
                return
            raise RulesRejected("the disk of the kernel is full")

        self.patch(self.writer, "_refuse", refuse)
        self.writer.history.clear()
        failed = self.failureResultOf(self.update(*several(200)), RulesRejected)
        self.assertIn("is full", str(failed.value))
        self.assertEqual(self.plane.unserved(), {})
        self.assertEqual(self.inForce(), before)
        self.assertLess(len(self.writer.writes), 5)

    def test_notJudged(self) -> None:
        """Where nobody got to judge the rules, nothing is searched: the update fails, and the next one reads."""
        self.writer.failures = [RulesNotJudged("no end after 30 s")]
        self.failureResultOf(self.update(*several(20)), RulesNotJudged)
        self.assertEqual(len(self.writer.writes), 1)
        self.done(*several(20))
        self.assertServed(*several(20))

    def test_triedAgain(self) -> None:
        """It is tried again with each full update, and leaves the quarantine when it is taken."""
        ports = several(10)
        self.writer.poison = {self.bad}
        self.done(*ports)
        self.done(*ports, service("more", "10.96.9.9", 45000))
        self.assertEqual(len(self.plane.unserved()), 1)
        self.done(*ports, full=True)
        self.assertEqual(len(self.plane.unserved()), 1)
        self.writer.poison = set()
        self.done(*ports, full=True)
        self.assertServed(*ports)
        self.assertEqual(self.plane.unserved(), {})

    def test_changes(self) -> None:
        """It is tried again when it changes, and forgotten when it goes."""
        ports = several(10)
        self.writer.poison = {self.bad}
        self.done(*ports)
        other = service("s6", "10.96.2.2", 44444)
        self.done(*ports[:6], other, *ports[7:])
        self.assertServed(*ports[:6], other, *ports[7:])
        self.assertEqual(self.plane.unserved(), {})
        self.done(*ports)
        self.assertEqual(len(self.plane.unserved()), 1)
        self.done(*ports[:6], *ports[7:])
        self.assertServed(*ports[:6], *ports[7:])
        self.assertEqual(self.plane.unserved(), {})

    def test_frontendGoesOver(self) -> None:
        """A frontend that one in quarantine had, and that another has now, is the other's."""
        ports = several(3)
        self.done(*ports)
        self.writer.poison = {key("10.96.9.9", 80)}
        refused = service("s0", "10.96.9.9", 40000)
        heir = service("heir", "10.96.1.1", 47000)
        for full in (False, True):
            self.done(refused, *ports[1:], heir, full=full)
            self.assertEqual(self.inForce()[key("10.96.1.1", 80)], same(to(47000)))
            self.assertEqual(list(self.plane.unserved()), ["default/s0:/TCP/IPv4"])

    def test_overDamage(self) -> None:
        """The same where something of ours was in force already, and was read."""
        self.writer.inForce = Ruleset({key("10.96.8.8", 80): same("drop")})
        self.writer.poison = {self.bad}
        ports = several(10)
        self.done(*ports, full=True)
        self.assertServed(*ports[:6], *ports[7:])

    def test_badAddress(self) -> None:
        """What is no address never gets to the writer."""
        self.done(*several(2), service("odd", "10.96.0.300", 43000))
        self.assertServed(*several(2))
        self.assertIn("10.96.0.300", self.plane.unserved()["default/odd:/TCP/IPv4"])
        self.assertEqual(len(self.writer.writes), 1)

    def test_canaryGoes(self) -> None:
        """Nothing of the search is left."""
        self.writer.poison = {self.bad}
        self.done(*several(10))
        step = [it.value for it in self.writer.writes if isinstance(it.value, Delta)]
        self.assertTrue(any(key("198.51.100.255", 9) in it.rules for it in step))
        self.assertNotIn(key("198.51.100.255", 9), self.inForce())
