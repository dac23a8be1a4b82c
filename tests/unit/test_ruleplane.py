"""The rule plane, over a writer in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.shared.writers import key, same, to
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta, Guard, Ruleset, Target
from twisted_kproxy.core.values import (
    EVERYWHERE,
    Endpoint,
    Frontend,
    FrontendKey,
    Locality,
    ServiceMap,
    ServicePort,
    ServicePortName,
)
from twisted_kproxy.interfaces import IRulePlane, NotAvailable, RulesNotJudged, RulesRejected
from twisted_kproxy.netfilter.memory import MemoryWriter
from twisted_kproxy.netfilter.plane import RulePlane

INSIDERS = ("10.244.0.0/16",)


def service(name: str, address: str, socket: int, protocol: Any = "TCP", port: int = 80) -> ServicePort:
    """A service port with a ClusterIP that is served by a socket of this node; 0 for none."""
    pool = (Endpoint("192.0.2.2", socket, True, True),) if socket else ()
    name_ = ServicePortName("default", name, "", protocol, "IPv4")
    return ServicePort(name_, f"uid-{name}", (Frontend("ClusterIP", address, port),), pool)


def mapOf(*ports: ServicePort) -> ServiceMap:
    return ServiceMap({port.name: port for port in ports}, locality=Locality(INSIDERS))


class CountingClock(Clock):
    """
    Counts how often something was put off.

    :ivar cost: by how much looking at it makes it go on.
    """

    turns = 0
    cost = 0.0

    def seconds(self) -> float:
        self.rightNow += self.cost
        return self.rightNow

    def callLater(self, *arguments: Any, **keywords: Any) -> Any:
        self.turns += 1
        return super().callLater(*arguments, **keywords)


class FakeFlows:
    """Remembers what was to be forgotten."""

    def __init__(self, writer: MemoryWriter) -> None:
        self.writer = writer
        self.calls: list[dict[FrontendKey, frozenset[Target]]] = []
        self.looks: list[tuple[dict[FrontendKey, frozenset[Target]], set[Target]]] = []
        self.writesBefore: list[int] = []
        self.failure: Exception | None = None

    def forget(self, stale: Mapping[FrontendKey, frozenset[Target]], nodePorts: Sequence[str]) -> Deferred[int]:
        self.calls.append(dict(stale))
        return self._done(nodePorts, len(stale))

    def reconcile(
        self, led: Mapping[FrontendKey, frozenset[Target]], own: Collection[Target], nodePorts: Sequence[str]
    ) -> Deferred[int]:
        self.looks.append((dict(led), set(own)))
        return self._done(nodePorts, 1)

    def _done(self, nodePorts: Sequence[str], count: int) -> Deferred[int]:
        assert tuple(nodePorts) == EVERYWHERE
        self.writesBefore.append(len(self.writer.writes))
        return fail(self.failure) if self.failure else succeed(count)


class RulePlaneTests(SynchronousTestCase):
    """Maps go in, steps come out."""

    def setUp(self) -> None:
        self.clock = CountingClock()
        self.writer = MemoryWriter()
        self.flows = FakeFlows(self.writer)
        self.told = 0
        self.plane = self.makePlane()
        self.web = service("web", "10.96.0.1", 40001)
        self.api = service("api", "10.96.0.2", 40002)
        self.dns = service("dns", "10.96.0.3", 40003, "UDP", 53)
        self.current = mapOf()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def makePlane(self) -> RulePlane:
        def changed() -> None:
            self.told += 1

        return RulePlane(
            self.clock, self.writer, flows=self.flows, changedOutside=changed
        )

    def start(self) -> None:
        self.successResultOf(self.plane.start())

    def update(self, *ports: ServicePort, full: bool = False) -> Deferred[None]:
        previous, self.current = self.current, mapOf(*ports)
        return self.plane.onUpdate(Update(previous, self.current, full))

    def done(self, *ports: ServicePort, full: bool = False) -> None:
        self.successResultOf(self.update(*ports, full=full))

    def lastDelta(self) -> Delta:
        it = self.writer.writes[-1].value
        assert isinstance(it, Delta), it
        return it

    def test_interface(self) -> None:
        """It is a rule plane."""
        verifyObject(IRulePlane, self.plane)

    def test_startChangesNothing(self) -> None:
        """Starting probes and reads; nothing is written before the first update."""
        self.start()
        self.assertEqual([it.call for it in self.writer.history], ["probe", "adopt"])

    def test_notAvailable(self) -> None:
        """Where the writer does not work, starting fails with its reason."""
        self.writer.probe = lambda: fail(NotAvailable("there is no nft"))  # type: ignore[method-assign]
        self.assertIn("no nft", str(self.failureResultOf(self.plane.start(), NotAvailable).value))

    def test_firstUpdate(self) -> None:
        """Where nothing is in force, the first update writes all of it at once."""
        self.start()
        self.done(self.web, self.dns)
        self.assertEqual(
            self.writer.inForce,
            Ruleset(
                {key("10.96.0.1", 80): same(to(40001)), key("10.96.0.3", 53, "UDP"): same(to(40003))},
                frozenset({Guard("IPv4", "TCP", 40001), Guard("IPv4", "UDP", 40003)}),
                frozenset({"10.96.0.1", "10.96.0.3"}),
                Locality(INSIDERS),
            ),
        )
        self.assertEqual([it.call for it in self.writer.writes], ["replace"])

    def test_firstUpdateOfNothing(self) -> None:
        """An empty map is put into force too: our table is there from then on."""
        self.start()
        self.done()
        self.assertEqual(self.writer.inForce, Ruleset(locality=Locality(INSIDERS)))

    def test_nothingToDo(self) -> None:
        """The same map again writes nothing, be it as the same objects or as equal ones."""
        self.start()
        self.done(self.web, self.api)
        self.done(self.web, self.api)
        self.done(service("web", "10.96.0.1", 40001), self.api)
        self.assertEqual(len(self.writer.writes), 1)

    def test_onlyWhatHasChanged(self) -> None:
        """An update writes what has changed, and renders only that."""
        self.start()
        self.done(self.web, self.api, self.dns)
        made = self.plane._fragments.made
        self.done(self.web, service("api", "10.96.0.2", 45000))
        self.assertEqual(
            self.lastDelta(),
            Delta(
                {key("10.96.0.2", 80): same(to(45000)), key("10.96.0.3", 53, "UDP"): None},
                frozenset({Guard("IPv4", "TCP", 45000)}),
                frozenset({Guard("IPv4", "TCP", 40002), Guard("IPv4", "UDP", 40003)}),
                clusterIPsRemoved=frozenset({"10.96.0.3"}),
            ),
        )
        self.assertEqual(self.plane._fragments.made, made + 1)

    def test_endpointsLost(self) -> None:
        """A service that loses its endpoints refuses."""
        self.start()
        self.done(self.web)
        self.done(service("web", "10.96.0.1", 0))
        self.assertEqual(self.lastDelta().rules, {key("10.96.0.1", 80): same("reject")})
        self.assertEqual(self.writer.inForce.guards, frozenset())  # type: ignore[union-attr]

    def test_keyMoves(self) -> None:
        """A frontend that goes from one service to another is in the step once, as what it becomes."""
        for first, second in (("aaa", "zzz"), ("zzz", "aaa")):
            self.setUp()
            self.start()
            self.done(service(first, "10.96.0.1", 40001))
            self.done(service(second, "10.96.0.1", 40002))
            self.assertEqual(self.lastDelta().rules, {key("10.96.0.1", 80): same(to(40002))})

    def test_renamed(self) -> None:
        """A service port that is renamed and keeps its socket changes nothing in the kernel."""
        self.start()
        self.done(service("web", "10.96.0.1", 40001))
        self.done(service("other", "10.96.0.1", 40001))
        self.assertEqual(len(self.writer.writes), 1)

    def test_sharedGuard(self) -> None:
        """A guard stays as long as one service port is left that has it."""
        self.start()
        self.done(self.web, service("twin", "10.96.0.9", 40001))
        self.done(self.web)
        self.assertEqual(self.writer.inForce.guards, {Guard("IPv4", "TCP", 40001)})  # type: ignore[union-attr]
        self.done()
        self.assertEqual(self.writer.inForce.guards, frozenset())  # type: ignore[union-attr]

    def test_restart(self) -> None:
        """What an earlier run has left is compared with: only the difference is written."""
        left = {key("10.96.0.1", 80): same(to(40001)), key("10.96.0.8", 80): same(to(40008))}
        addresses = frozenset({"10.96.0.1", "10.96.0.8"})
        self.writer.inForce = Ruleset(left, frozenset({Guard("IPv4", "TCP", 40001)}), addresses, Locality(INSIDERS))
        self.start()
        self.assertEqual(self.plane.ruleInForce(key("10.96.0.1", 80)), same(to(40001)))
        self.assertIsNone(self.plane.ruleInForce(key("10.96.0.2", 80)))
        self.done(self.web, self.api)
        self.assertEqual([it.call for it in self.writer.writes], ["apply"])
        self.assertEqual(
            self.lastDelta(),
            Delta(
                {key("10.96.0.2", 80): same(to(40002)), key("10.96.0.8", 80): None},
                frozenset({Guard("IPv4", "TCP", 40002)}),
                clusterIPsAdded=frozenset({"10.96.0.2"}),
                clusterIPsRemoved=frozenset({"10.96.0.8"}),
            ),
        )

    def test_restartUnchanged(self) -> None:
        """When an earlier run has left exactly what shall be, nothing is written."""
        self.writer.inForce = Ruleset(
            {key("10.96.0.1", 80): same(to(40001))},
            frozenset({Guard("IPv4", "TCP", 40001)}),
            frozenset({"10.96.0.1"}),
            Locality(INSIDERS),
        )
        self.start()
        self.done(self.web)
        self.assertEqual(self.writer.writes, [])

    def test_otherInsiders(self) -> None:
        """When the pod networks differ from the earlier run's, they are written."""
        self.writer.inForce = Ruleset(locality=Locality(("10.0.0.0/8",)))
        self.start()
        self.done()
        self.assertEqual(self.lastDelta(), Delta(locality=Locality(INSIDERS)))

    def test_adoptFails(self) -> None:
        """When reading fails at the start, the first update reads again."""
        adopt = self.writer.adopt
        self.writer.inForce = Ruleset({key("10.96.0.1", 80): same(to(40001))}, locality=Locality(INSIDERS))
        self.writer.adopt = lambda: fail(RulesRejected("nft: too slow"))  # type: ignore[method-assign]
        self.start()
        self.writer.adopt = adopt  # type: ignore[method-assign]
        self.done(self.web)
        self.assertEqual([it.call for it in self.writer.writes], ["apply"])
        self.assertEqual(dict(self.lastDelta().rules), {})

    def test_failure(self) -> None:
        """After a failure what is in force is read anew; what was missed is written then."""
        self.start()
        self.done(self.web)
        self.writer.failures.append(RulesNotJudged("no memory"))
        missed = self.update(self.web, self.api)
        self.assertIn("no memory", str(self.failureResultOf(missed, RulesRejected).value))
        self.assertEqual(self.plane.status()["failures"], 1)
        self.assertIn("no memory", self.plane.status()["lastError"])
        self.writer.history.clear()
        self.successResultOf(self.plane.onUpdate(Update(mapOf(self.web), mapOf(self.web, self.api), True)))
        self.assertEqual([it.call for it in self.writer.history], ["adopt", "apply"])
        self.assertEqual(set(self.lastDelta().rules), {key("10.96.0.2", 80)})
        self.assertEqual(self.plane.status()["lastError"], "")

    def test_doubtEnds(self) -> None:
        """After a failure the next update reads, whatever it says; the one after it does not."""
        self.start()
        self.done(self.web)
        self.writer.failures.append(RulesNotJudged("no memory"))
        self.failureResultOf(self.update(self.web, self.api), RulesRejected)
        self.writer.inForce = None
        self.writer.history.clear()
        self.done(self.web, self.dns)
        self.done(self.web)
        self.assertEqual([it.call for it in self.writer.history], ["adopt", "replace", "apply"])
        self.assertEqual(set(self.writer.inForce.rules), {key("10.96.0.1", 80)})

    def test_failureOfTheFirst(self) -> None:
        """When the very first write fails, the next update writes all."""
        self.start()
        self.writer.failures.append(RulesNotJudged("no memory"))
        self.failureResultOf(self.update(self.web), RulesRejected)
        self.done(self.web)
        self.assertEqual(set(self.writer.inForce.rules), {key("10.96.0.1", 80)})  # type: ignore[union-attr]

    def test_fullRepairs(self) -> None:
        """A full update repairs what has been changed behind our back."""
        self.start()
        self.done(self.web, self.api)
        self.writer.inForce = Ruleset({key("10.96.0.1", 80): same("drop")}, locality=Locality(INSIDERS))
        self.done(self.web, self.api, full=True)
        self.assertEqual(set(self.lastDelta().rules), {key("10.96.0.1", 80), key("10.96.0.2", 80)})
        self.writer.inForce = None
        self.done(self.web, self.api, full=True)
        self.assertEqual(len(self.writer.inForce.rules), 2)  # type: ignore[union-attr]

    def test_fullOfNothing(self) -> None:
        """A full update that finds everything as it shall be writes nothing."""
        self.start()
        self.done(self.web)
        self.done(self.web, full=True)
        self.assertEqual(len(self.writer.writes), 1)
        self.assertEqual(self.writer.history[-1].call, "adopt")

    def test_unknownPrevious(self) -> None:
        """An update whose previous map is not the one in force is compared with the one that is."""
        self.start()
        self.done(self.web, self.api)
        self.current = mapOf(self.web)
        self.done(self.web, self.dns)
        self.assertEqual(set(self.writer.inForce.rules), {key("10.96.0.1", 80), key("10.96.0.3", 53, "UDP")})  # type: ignore[union-attr]

    def test_changedOutside(self) -> None:
        """A change by somebody else is passed on, and the next update reads first, whatever it says."""
        self.start()
        self.done(self.web)
        self.writer.disturb(None)
        self.assertEqual(self.told, 1)
        self.done(self.web)
        self.assertEqual(set(self.writer.inForce.rules), {key("10.96.0.1", 80)})  # type: ignore[union-attr]
        self.assertEqual(self.plane.status()["changedByOthers"], 1)

    def test_changedDuringWrite(self) -> None:
        """A change by somebody else while we write is not forgotten when the write ends well."""
        self.start()
        self.done(self.web)
        self.writer.hang = True
        writing = self.update(self.web, self.api)
        self.writer._changed()  # type: ignore[misc]
        self.writer.release()
        self.successResultOf(writing)
        self.writer.inForce = None
        self.done(self.web, self.api)
        self.assertEqual(len(self.writer.inForce.rules), 2)  # type: ignore[union-attr]

    def far(self, name: str = "far") -> ServicePort:
        """A service port that rules cannot lead to."""
        name_ = ServicePortName("default", name, "", "TCP", "IPv4")
        return ServicePort(name_, "u", (Frontend("ClusterIP", "10.96.0.7", 80),), (Endpoint("10.244.1.1", 80),))

    def test_cannotRender(self) -> None:
        """A pool that is no socket costs its own service port only."""
        self.start()
        self.done(self.web, self.far())
        self.assertEqual(set(self.writer.inForce.rules), {key("10.96.0.1", 80)})  # type: ignore[union-attr]
        self.done(self.web, self.api, self.far())
        self.assertEqual(set(self.writer.inForce.rules), {key("10.96.0.1", 80), key("10.96.0.2", 80)})  # type: ignore[union-attr]
        [(name, reason)] = self.plane.unserved().items()
        self.assertEqual(name, "default/far:/TCP/IPv4")
        self.assertIn("10.244.1.1", reason)
        self.assertEqual(self.plane.status()["quarantined"], {name: reason})
        self.done(self.web)
        self.assertEqual(self.plane.unserved(), {})

    def test_oneAtATime(self) -> None:
        """An update waits for the one before."""
        self.start()
        self.writer.hang = True
        first = self.update(self.web)
        second = self.update(self.web, self.api)
        self.assertEqual(len(self.writer.writes), 1)
        self.assertNoResult(second)
        self.writer.release()
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual(len(self.writer.inForce.rules), 2)  # type: ignore[union-attr]

    def test_manyInSlices(self) -> None:
        """Thousands of service ports are rendered in slices, with turns of the reactor between them."""
        ports = [service(f"s{n}", f"10.97.{n // 250}.{n % 250}", 20000 + n) for n in range(1800)]
        self.start()
        self.clock.cost = 0.0001
        over: list[None] = []
        self.update(*ports).addCallback(over.append)
        self.assertEqual(self.writer.writes, [])
        while not over:
            self.clock.advance(0)
        self.assertGreater(self.clock.turns, 20)
        self.assertEqual(len(self.writer.inForce.rules), 1800)  # type: ignore[union-attr]

    # --- UDP flows ---

    def test_staleFlows(self) -> None:
        """Flows to UDP frontends that changed are forgotten once the rules are in, but those that lead right."""
        self.start()
        self.done()
        self.done(self.dns, self.web)
        where = key("10.96.0.3", 53, "UDP")
        self.assertEqual(self.flows.calls, [{where: frozenset({to(40003)})}])
        self.done(service("dns", "10.96.0.3", 45003, "UDP", 53), service("web", "10.96.0.1", 40009))
        self.assertEqual(self.flows.calls[1:], [{where: frozenset({to(45003)})}])
        self.assertEqual(self.flows.writesBefore, [1, 2, 3])
        self.done(service("dns", "10.96.0.3", 0, "UDP", 53))
        self.done()
        self.assertEqual(self.flows.calls[2:], [{where: frozenset()}, {where: frozenset()}])
        self.assertEqual(len(self.flows.looks), 1)

    def test_flowsOfTcp(self) -> None:
        """TCP connections are left alone."""
        self.start()
        self.done(self.web)
        self.done()
        self.assertEqual(self.flows.calls, [])
        self.assertEqual(self.flows.looks, [({}, set())])

    def test_allFlowsAtFirst(self) -> None:
        """The first update looks at all flows: also where nothing had to be written, and at where rules led before."""
        self.start()
        self.done(self.dns, self.web)
        where = key("10.96.0.3", 53, "UDP")
        for ports, led, own in (
            ((self.dns,), {where: frozenset({to(40003)})}, {to(40003)}),
            ((), {where: frozenset()}, {to(40003)}),
            ((), {}, set()),
        ):
            self.flows.looks.clear()
            self.plane = self.makePlane()
            self.start()
            self.current = mapOf()
            self.done(*ports)
            self.assertEqual(self.flows.looks, [(led, own)])
        self.assertEqual(self.flows.calls, [])

    def test_allFlowsAfterFullWrite(self) -> None:
        """All flows are looked at after each full comparison that wrote something, and after no other."""
        self.start()
        self.done(self.dns)
        self.done(self.dns, full=True)
        self.assertEqual(len(self.flows.looks), 1)
        self.writer.disturb(None)
        self.done(self.dns, full=True)
        self.assertEqual(len(self.flows.looks), 2)
        self.done(self.dns, full=True)
        self.assertEqual(len(self.flows.looks), 2)

    def test_flowsFail(self) -> None:
        """When flows cannot be forgotten the update is in force all the same; the next full comparison tries again."""
        self.start()
        self.done()
        self.flows.failure = OSError("no such thing")
        self.done(self.dns)
        self.done(self.dns, self.web)
        self.assertEqual(len(self.flows.calls), 1)
        self.assertEqual(len(self.writer.inForce.rules), 2)  # type: ignore[union-attr]
        self.done(self.dns, self.web, full=True)
        self.assertEqual(len(self.flows.looks), 2)
        self.flows.failure = None
        self.done(self.dns, self.web, full=True)
        self.done(self.dns, self.web, full=True)
        self.assertEqual(len(self.flows.looks), 3)

    def test_noFlowsBeforeRules(self) -> None:
        """When the rules are refused no flow is touched; once they are in, all are looked at."""
        self.start()
        self.writer.failures.append(RulesNotJudged("no"))
        self.failureResultOf(self.update(self.dns), RulesRejected)
        self.assertEqual((self.flows.calls, self.flows.looks), ([], []))
        self.done(self.dns, full=True)
        self.writer.failures.append(RulesNotJudged("no"))
        self.failureResultOf(self.update(), RulesRejected)
        self.assertEqual((len(self.flows.calls), len(self.flows.looks)), (0, 1))
        self.done(full=True)
        self.assertEqual(len(self.flows.looks), 2)

    def test_ownFlowsAtTheEnd(self) -> None:
        """Stopping forgets what is led to our sockets, once the rules are gone; a failure is logged."""
        self.start()
        self.done(self.dns, self.web)
        self.flows.failure = OSError("no such thing")
        self.successResultOf(self.plane.stop(0))
        self.assertEqual(self.flows.looks[1:], [({}, {to(40003)})])
        self.assertTrue(self.writer.closed)

    # --- the end ---

    def test_stop(self) -> None:
        """Stopping removes the rules, lets go of the writer, and ends the watch; twice is harmless."""
        self.start()
        self.done(self.web)
        self.successResultOf(self.plane.stop(300))
        self.assertIsNone(self.writer.inForce)
        self.assertTrue(self.writer.closed)
        count = len(self.writer.history)
        self.successResultOf(self.plane.stop(0))
        self.done(self.api)
        self.assertEqual(len(self.writer.history), count)
        self.writer.disturb(None)
        self.assertEqual(self.told, 0)

    def test_stopWaits(self) -> None:
        """Stopping waits for the update under way."""
        self.start()
        self.writer.hang = True
        update = self.update(self.web)
        stopped = self.plane.stop(0)
        self.assertNoResult(stopped)
        self.writer.release()
        self.successResultOf(update)
        self.successResultOf(stopped)
        self.assertIsNone(self.writer.inForce)

    def test_stopFails(self) -> None:
        """When the rules cannot be removed the plane lets go all the same."""
        self.start()
        self.done(self.web)
        self.writer.failures.append(RulesRejected("no"))
        self.successResultOf(self.plane.stop(0))
        self.assertTrue(self.writer.closed)

    def test_status(self) -> None:
        """Operators see the writer, how many rules there are and how writing goes."""
        self.start()
        self.done(self.web, self.dns)
        status = self.plane.status()
        self.assertEqual(
            (status["writer"], status["rules"], status["guards"], status["writes"], status["insiders"]),
            ("memory", 2, 2, 1, list(INSIDERS)),
        )
        self.assertEqual(status["lastWriteSeconds"], 0.0)
        self.assertEqual(status["flowsForgotten"], 1)
