"""The userspace dataplane between fakes: which sockets it opens, what it tells the rules, and when it closes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.builders import portName, serviceMap, servicePort
from tests.shared.proxiers import RecordingObserver, ScriptedBalancer
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Rule, Target
from twisted_kproxy.core.values import (
    Endpoint,
    Frontend,
    FrontendKey,
    PoolName,
    ServiceMap,
    ServicePort,
)
from twisted_kproxy.interfaces import IDataplane, IProxier, IRulePlane, KproxyError, RulesRejected
from twisted_kproxy.userspace.dataplane import UserspaceDataplane
from twisted_kproxy.userspace.ports import PortRange

A = ("10.244.0.10", 8080)
B = ("10.244.1.10", 8080)
NODE = "192.0.2.2"
NODE6 = "2001:db8::2"


class TurningClock(Clock):
    """What is to happen in the next turn of the reactor does not happen within the same advance()."""

    def callLater(self, when: float, what: Any, *args: Any, **kw: Any) -> Any:
        return super().callLater(max(when, 0.001), what, *args, **kw)


@implementer(IRulePlane)
class FakeRules:
    """Takes every map, unless told otherwise."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.updates: list[Update] = []
        self.answers: list[Deferred[None]] = []
        self.earlier: dict[FrontendKey, Rule] = {}
        self.stopping: Deferred[None] = succeed(None)
        self.refused: dict[str, str] = {}

    def start(self) -> Deferred[None]:
        self.log.append("rules start")
        return succeed(None)

    def onUpdate(self, update: Update) -> Deferred[None]:
        self.log.append("rules")
        self.updates.append(update)
        return self.answers.pop(0) if self.answers else succeed(None)

    def stop(self, drainSeconds: float) -> Deferred[None]:
        self.log.append(f"rules stop {drainSeconds:g}")
        return self.stopping

    def status(self) -> Mapping[str, Any]:
        return {"writer": "fake"}

    def unserved(self) -> Mapping[str, str]:
        return self.refused

    def ruleInForce(self, key: FrontendKey) -> Rule | None:
        return self.earlier.get(key)

    @property
    def map(self) -> ServiceMap:
        """What it was last told."""
        return self.updates[-1].current


def leading(port: int) -> Rule:
    """A rule that leads everybody to that port of the node."""
    return Rule(Target("192.0.2.1", port), Target("192.0.2.1", port))


@implementer(IProxier)
class FakeProxier:
    """Opens nothing."""

    def __init__(self, test: DataplaneTests, pool: PoolName) -> None:
        self.test = test
        self.pool = pool
        self.port = 0
        self.listening = False
        self.active = 0
        self.told: list[tuple[Endpoint, ...]] = []
        self._waiting: list[Deferred[None]] = []

    def listen(self, port: int = 0) -> None:
        error = self.test.errors.get(self.pool.port.service)
        if error is not None:
            raise error
        if port in self.test.taken:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self.test.nextPort += 1
        self.port = port or self.test.nextPort
        self.listening = True
        self.test.log.append(f"open {self.pool.port.service}/{self.pool.kind}")

    def renamed(self, pool: PoolName) -> None:
        self.pool = pool

    def endpointsChanged(self, endpoints: tuple[Endpoint, ...]) -> None:
        self.told.append(endpoints)

    def stopListening(self) -> None:
        if self.listening:
            self.listening = False
            self.test.log.append(f"close {self.pool.port.service}/{self.pool.kind}")

    def drained(self) -> Deferred[None]:
        if not self.active:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def abort(self) -> None:
        self.test.log.append(f"abort {self.pool.port.service}")
        self.end()

    def end(self) -> None:
        self.active = 0
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.callback(None)

    def status(self) -> Mapping[str, Any]:
        return {"protocol": self.pool.port.protocol, "port": self.port, "active": self.active}


class DataplaneTests(SynchronousTestCase):
    """One update after the other."""

    def setUp(self) -> None:
        self.clock = TurningClock()
        self.log: list[str] = []
        self.rules = FakeRules(self.log)
        self.made: list[FakeProxier] = []
        self.errors: dict[str, Exception] = {}
        self.taken: set[int] = set()
        self.nextPort = 40000
        self.addresses: dict[str, str | None] = {"IPv4": NODE, "IPv6": NODE6}
        self.current = ServiceMap()
        self.dataplane = self.makeDataplane()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def makeDataplane(self, **kw: Any) -> UserspaceDataplane:
        def make(reactor: Any, pool: PoolName, balancer: Any, observer: Any) -> FakeProxier:
            self.made.append(FakeProxier(self, pool))
            return self.made[-1]

        return UserspaceDataplane(
            self.clock,
            ScriptedBalancer(),
            self.rules,
            makeTcp=make,  # type: ignore[arg-type]
            makeUdp=make,  # type: ignore[arg-type]
            addressOf=lambda family: self.addresses[family],
            observer=RecordingObserver(),
            **kw,
        )

    def begin(self, *ports: ServicePort, full: bool = False) -> Deferred[None]:
        new = serviceMap(*ports)
        update = Update(self.current, new, full)
        self.current = new
        return self.dataplane.onUpdate(update)

    def update(self, *ports: ServicePort, full: bool = False) -> None:
        self.turns(self.begin(*ports, full=full))

    def turns(self, done: Deferred[None]) -> list[tuple[int, int]]:
        """Turn the reactor until it has fired; after each turn, how many were made and closed."""
        fired: list[None] = []
        done.addCallback(fired.append)
        seen = []
        while not fired:
            self.assertTrue(self.clock.getDelayedCalls())
            seen.append((len(self.made), sum(not it.listening for it in self.made)))
            self.clock.advance(0.001)
        return seen

    def sockets(self) -> dict[str, int]:
        """Service and pool → port, of what listens."""
        return {f"{it.pool.port.service}/{it.pool.kind}": it.port for it in self.made if it.listening}

    def socket(self, port: int, address: str = NODE) -> tuple[Endpoint, ...]:
        return (Endpoint(address, port, isLocal=True, isSocket=True),)

    # --- opening

    def test_interface(self) -> None:
        """It is an IDataplane; starting starts the rules."""
        verifyObject(IDataplane, self.dataplane)
        self.successResultOf(self.dataplane.start())
        self.assertEqual(self.log, ["rules start"])

    def test_socketInThePlaceOfThePool(self) -> None:
        """The pool that a frontend uses becomes this node's socket; the rest of the service port stays."""
        port = servicePort(cluster=[A, B], affinitySeconds=60)
        self.update(port)
        self.assertEqual(self.log, ["open web/cluster", "rules"])
        redirected = self.rules.map[port.name]
        self.assertEqual(redirected.cluster, self.socket(40001))
        self.assertEqual((redirected.local, redirected.frontends, redirected.uid), ((), port.frontends, "u1"))
        self.assertTrue(redirected.reachable)
        self.assertEqual(self.made[0].told, [port.cluster])

    def test_bothPools(self) -> None:
        """A pool each for those outside and those inside, where the frontends say so; an unused pool has no socket."""
        port = servicePort(
            cluster=[A, B],
            local=[A],
            frontends=[
                Frontend("ClusterIP", "10.96.0.10", 80),
                Frontend("NodePort", None, 30080, pool="local", insidePool="cluster"),
            ],
        )
        other = servicePort(portName("other"), cluster=[A], local=[A])
        self.update(port, other)
        self.assertEqual(set(self.sockets()), {"web/cluster", "web/local", "other/cluster"})
        self.assertNotEqual(self.rules.map[port.name].local, self.rules.map[port.name].cluster)

    def test_emptyPoolStaysEmpty(self) -> None:
        """No endpoint, no socket; whether one exists elsewhere is passed on."""
        port = servicePort(cluster=[B], frontends=[Frontend("NodePort", None, 30080, "local", "local")])
        none = servicePort(portName("none"))
        self.update(port, none)
        self.assertEqual(self.made, [])
        self.assertEqual([it.reachable for it in self.rules.map.values()], [True, False])
        self.assertEqual([it.cluster + it.local for it in self.rules.map.values()], [(), ()])

    def test_families(self) -> None:
        """Each family leads to the node's address of that family."""
        name = portName(family="IPv6")
        self.update(servicePort(cluster=[A]), servicePort(name, cluster=[("2001:db8:1::1", 80)]))
        self.assertEqual(self.rules.map[name].cluster[0].address, NODE6)

    # --- sameness

    def test_sameObject(self) -> None:
        """Endpoints that come and go behind a socket change nothing for the rules: the very same object goes on."""
        self.update(servicePort(cluster=[A]), servicePort(portName("other"), cluster=[A]))
        before = dict(self.rules.map)
        self.update(
            servicePort(cluster=[A, B], localReady=frozenset({"10.244.0.10"}), serving=frozenset({"10.244.0.10:8080"})),
            servicePort(portName("other"), cluster=[A]),
        )
        for name, port in self.rules.map.items():
            self.assertIs(port, before[name])
        self.assertFalse(self.rules.updates[-1])
        self.assertEqual(len(self.made), 2)
        self.assertEqual([len(it) for it in self.made[0].told], [1, 2])
        self.assertEqual(len(self.made[1].told), 1)

    def test_sameObjectAfterFull(self) -> None:
        """A full update opens nothing anew, and is passed on as full."""
        port = servicePort(cluster=[A])
        self.update(port)
        before = self.rules.map[port.name]
        self.update(port, full=True)
        self.assertIs(self.rules.map[port.name], before)
        self.assertTrue(self.rules.updates[-1].full)
        self.assertEqual(len(self.made), 1)

    def test_udpServesOnlyItsSocket(self) -> None:
        """Established UDP flows to the socket may live on: it is what serves, to the rules."""
        port = servicePort(portName(protocol="UDP"), cluster=[A], serving=frozenset({"10.244.0.10:8080"}))
        self.update(port)
        self.assertEqual(self.rules.map[port.name].serving, frozenset({f"{NODE}:40001"}))

    def test_previousIsRedirected(self) -> None:
        """The rules are told the step between redirected maps."""
        self.update(servicePort(cluster=[A]))
        self.update(servicePort(cluster=[A]), servicePort(portName("new"), cluster=[B]))
        first, second = self.rules.updates
        self.assertIs(second.previous, first.current)
        self.assertEqual(second.changed, {portName("new")})

    def test_addressChanges(self) -> None:
        """When the node's address has changed, the next update leads everything there, through the same sockets."""
        port, other = servicePort(cluster=[A]), servicePort(portName("other"), cluster=[A])
        self.update(port, other)
        self.addresses["IPv4"] = "192.0.2.99"
        self.update(port, other)
        self.assertEqual({it.cluster[0].address for it in self.rules.map.values()}, {"192.0.2.99"})
        self.assertEqual(len(self.made), 2)

    # --- closing

    def test_removed(self) -> None:
        """A service that is gone: its rules first, then its socket, all in one step with what is new."""
        self.update(servicePort(cluster=[A]))
        self.log.clear()
        self.update(servicePort(portName("new"), cluster=[A]))
        self.assertEqual(self.log, ["open new/cluster", "rules", "close web/cluster"])
        self.assertEqual(self.rules.updates[-1].removed, {portName()})

    def test_emptied(self) -> None:
        """A pool that has lost its last endpoint is closed after the rules refuse for it; it is told at once."""
        self.update(servicePort(cluster=[A]))
        self.log.clear()
        self.update(servicePort())
        self.assertEqual(self.log, ["rules", "close web/cluster"])
        self.assertEqual(self.made[0].told[-1], ())
        self.update(servicePort(cluster=[B]))
        self.assertEqual(self.sockets(), {"web/cluster": 40002})

    def test_drains(self) -> None:
        """What is still connected to a closed socket goes on, and is shown until it has ended."""
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 8000
        self.update()
        self.assertEqual([it["active"] for it in self.dataplane.status()["draining"]], [8000])
        self.assertNotIn("abort web", self.log)
        self.made[0].end()
        self.assertEqual(self.dataplane.status()["draining"], [])

    def test_otherUid(self) -> None:
        """Another Service of the same name gets a proxier of its own; the old one is closed once the rules are in."""
        self.update(servicePort(cluster=[A]))
        self.log.clear()
        self.update(servicePort(cluster=[A], uid="u2"))
        self.assertEqual(self.log, ["open web/cluster", "rules", "close web/cluster"])
        self.assertEqual([it.listening for it in self.made], [False, True])

    def test_renamed(self) -> None:
        """A renamed port keeps its proxier, with its socket."""
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 3
        new = portName(port="http2")
        self.update(servicePort(new, cluster=[A]))
        self.assertEqual(len(self.made), 1)
        self.assertEqual(self.made[0].pool, PoolName(new, "cluster"))
        self.assertTrue(self.made[0].listening)
        self.assertEqual(self.rules.map[new].cluster, self.socket(40001))
        self.assertEqual(self.dataplane.status()["servicePorts"][str(new)]["active"], 3)

    # --- failures

    def test_rulesFail(self) -> None:
        """When the rules fail, nothing is closed, and the next update is a full one from what was in force before."""
        old = servicePort(cluster=[A])
        self.update(old)
        inForce = self.rules.map
        self.rules.answers.append(fail(RulesRejected("no")))
        new = servicePort(portName("new"), cluster=[A])
        self.failureResultOf(self.begin(new), RulesRejected)
        self.assertEqual(set(self.sockets()), {"web/cluster", "new/cluster"})
        self.update(new)
        last = self.rules.updates[-1]
        self.assertTrue(last.full)
        self.assertIs(last.previous, inForce)
        self.assertEqual(self.sockets(), {"new/cluster": 40002})
        self.update(new)
        self.assertFalse(self.rules.updates[-1].full)

    def test_rulesFailThenBack(self) -> None:
        """A service whose removal failed, and which is wanted again, has its old socket still."""
        port = servicePort(cluster=[A])
        self.update(port)
        self.rules.answers.append(fail(RulesRejected("no")))
        self.failureResultOf(self.begin(), RulesRejected)
        self.update(port, full=True)
        self.assertEqual((self.sockets(), len(self.made)), ({"web/cluster": 40001}, 1))

    def test_rulesFailAfterOtherUid(self) -> None:
        """The socket of a replaced Service is kept until rules are in that do not lead there."""
        self.update(servicePort(cluster=[A]))
        self.rules.answers.append(fail(RulesRejected("no")))
        self.failureResultOf(self.begin(servicePort(cluster=[A], uid="u2")), RulesRejected)
        self.assertEqual([it.listening for it in self.made], [True, True])
        self.update(servicePort(cluster=[A], uid="u2"))
        self.assertEqual([it.listening for it in self.made], [False, True])

    def test_cannotOpen(self) -> None:
        """A socket that cannot be opened costs only its own service port: refused, shown, tried with each update."""
        for error in (
            OSError(errno.EADDRINUSE, "Address already in use"),
            CannotListenError("", 0, OSError(errno.EMFILE, "Too many open files")),
        ):
            self.errors["bad"] = error
            bad, good = servicePort(portName("bad"), cluster=[A]), servicePort(portName("good"), cluster=[A])
            with capturedLogs() as events:
                self.update(bad, good)
                self.update(bad, good)
            self.assertEqual(len([it for it in events if "not served" in it["log_format"]]), 1)
            self.assertEqual(set(self.sockets()), {"good/cluster"})
            redirected = self.rules.map[bad.name]
            self.assertEqual((redirected.cluster, redirected.reachable), ((), False))
            ((name, reason),) = self.dataplane.status()["pending"].items()
            self.assertEqual(name, str(bad.name))
            self.assertIn((getattr(error, "socketError", None) or error).strerror, reason)
            self.errors.clear()
            self.update(bad, good)
            self.assertEqual(set(self.sockets()), {"good/cluster", "bad/cluster"})
            self.assertEqual(self.dataplane.status()["pending"], {})
            self.update()

    def test_bug(self) -> None:
        """Whatever raises while one service port is set up costs that one only; it is logged."""
        self.errors["bad"] = ZeroDivisionError()
        self.update(servicePort(portName("bad"), cluster=[A]), servicePort(portName("good"), cluster=[A]))
        self.assertEqual(set(self.sockets()), {"good/cluster"})
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertIn("internal error", self.dataplane.status()["pending"][str(portName("bad"))])

    def test_sctp(self) -> None:
        """SCTP is refused, said once, and the Service's other ports are served."""
        sctp = servicePort(portName(port="s", protocol="SCTP"), cluster=[A], local=[A])
        with capturedLogs() as events:
            self.update(sctp, servicePort(cluster=[A]))
            self.update(sctp, servicePort(cluster=[A]), full=True)
        self.assertEqual(len([it for it in events if "SCTP" in str(it.get("reason"))]), 1)
        self.assertEqual(set(self.sockets()), {"web/cluster"})
        redirected = self.rules.map[sctp.name]
        self.assertEqual((redirected.cluster, redirected.local, redirected.reachable), ((), (), False))
        self.assertEqual(redirected.frontends, sctp.frontends)
        self.assertEqual(list(self.dataplane.status()["refused"]), [str(sctp.name)])
        self.update(servicePort(cluster=[A]))
        self.assertEqual(self.dataplane.status()["refused"], {})

    def test_unserved(self) -> None:
        """What has no socket, what cannot have one and what has no rules is told together."""
        self.errors["bad"] = OSError(errno.EADDRINUSE, "Address already in use")
        self.rules.refused = {str(portName("odd")): "no rules"}
        bad, sctp = servicePort(portName("bad"), cluster=[A]), servicePort(portName(port="s", protocol="SCTP"))
        self.update(bad, sctp, servicePort(portName("odd"), cluster=[A]))
        unserved = self.dataplane.unserved()
        self.assertEqual(set(unserved), {str(bad.name), str(sctp.name), str(portName("odd"))})
        self.assertIn("Address already in use", unserved[str(bad.name)])
        self.assertIn("SCTP", unserved[str(sctp.name)])
        self.assertEqual(unserved[str(portName("odd"))], "no rules")

    def test_noAddress(self) -> None:
        """Service ports of a family that the node has no address of wait, with the reason, and one line in the log."""
        self.addresses["IPv6"] = None
        six = [servicePort(portName(f"six{n}", family="IPv6"), cluster=[("2001:db8:1::1", 80)]) for n in range(20)]
        with capturedLogs() as events:
            self.update(*six, servicePort(cluster=[A]))
            self.update(*six, servicePort(cluster=[A]), full=True)
        self.assertEqual(len([it for it in events if "address" in it["log_format"]]), 1)
        self.assertEqual(set(self.sockets()), {"web/cluster"})
        self.assertEqual(len(self.dataplane.status()["pending"]), 20)
        self.assertEqual({it.reachable for it in self.rules.map.values() if it.name.family == "IPv6"}, {False})
        self.addresses["IPv6"] = NODE6
        self.update(*six, servicePort(cluster=[A]))
        self.assertEqual(len(self.sockets()), 21)
        self.assertEqual(self.dataplane.status()["pending"], {})

    # --- ports

    def test_adoptsPort(self) -> None:
        """Where rules of an earlier run lead, there it listens again; such ports are opened before any other."""
        self.rules.earlier[FrontendKey("IPv4", "TCP", "10.96.0.10", 80)] = leading(40001)
        fresh = [
            servicePort(portName(f"a{n}"), cluster=[A], frontends=[Frontend("ClusterIP", f"10.96.1.{n}", 80)])
            for n in range(5)
        ]
        self.update(*fresh, servicePort(cluster=[A]))
        self.assertEqual(self.sockets()["web/cluster"], 40001)
        self.assertEqual(self.log[0], "open web/cluster")

    def test_adoptsByAnyFrontend(self) -> None:
        """One rule that is left of a pool is enough to find its port again, whichever frontend it is of."""
        self.rules.earlier[FrontendKey("IPv4", "TCP", "", 30080)] = leading(45000)
        frontends = [Frontend("ClusterIP", "10.96.0.10", 80), Frontend("NodePort", None, 30080)]
        self.update(servicePort(cluster=[A], frontends=frontends))
        self.assertEqual(self.sockets(), {"web/cluster": 45000})

    def test_adoptsInside(self) -> None:
        """A pool that only insiders are led to finds its port again, too, and not that of the others' pool."""
        key = FrontendKey("IPv4", "TCP", "", 30080)
        self.rules.earlier[key] = Rule(Target("192.0.2.1", 45001), Target("192.0.2.1", 45002))
        local = Frontend("NodePort", None, 30080, pool="local", insidePool="cluster")
        here = Endpoint("10.9.9.9", 1, True)
        self.update(servicePort(cluster=[A, here], local=[here], frontends=[local]))
        self.assertEqual(self.sockets(), {"web/local": 45001, "web/cluster": 45002})

    def test_adoptsNothingOfOthers(self) -> None:
        """Where others are dropped, the port of the insiders is not taken for theirs."""
        self.rules.earlier[FrontendKey("IPv4", "TCP", "", 30080)] = Rule("drop", Target("192.0.2.1", 45002))
        local = Frontend("NodePort", None, 30080, pool="local", insidePool="cluster")
        here = Endpoint("10.9.9.9", 1, True)
        self.update(servicePort(cluster=[A, here], local=[here], frontends=[local]))
        self.assertEqual(self.sockets()["web/cluster"], 45002)
        self.assertNotEqual(self.sockets()["web/local"], 45002)

    def test_adoptsOrNot(self) -> None:
        """A former port that is taken by now is let go without a word."""
        self.rules.earlier[FrontendKey("IPv4", "TCP", "10.96.0.10", 80)] = leading(45000)
        self.taken.add(45000)
        with capturedLogs() as events:
            self.update(servicePort(cluster=[A]))
        self.assertEqual(self.sockets(), {"web/cluster": 40001})
        self.assertEqual(events, [])

    def test_portRange(self) -> None:
        """Ports come from the range, and return there."""
        self.dataplane = self.makeDataplane(ports=PortRange(41000, 41000))
        one, two = servicePort(portName("one"), cluster=[A]), servicePort(portName("two"), cluster=[A])
        self.update(one)
        self.assertEqual(self.sockets(), {"one/cluster": 41000})
        self.update(one, two)
        self.assertIn("41000-41000", self.dataplane.status()["pending"][str(two.name)])
        self.update(two)
        self.update(two)
        self.assertEqual(self.sockets(), {"two/cluster": 41000})

    # --- many

    def test_slices(self) -> None:
        """Thousands are opened and closed in slices, with turns for everybody else in between."""
        many = [servicePort(portName(f"s{n}"), cluster=[A]) for n in range(1500)]
        seen = [made for made, _ in self.turns(self.begin(*many))]
        self.assertLessEqual(max(after - before for before, after in pairwise([0, *seen, len(self.made)])), 64)
        self.assertGreater(len(seen), 20)
        seen = [closed for _, closed in self.turns(self.begin())]
        self.assertLessEqual(max(after - before for before, after in pairwise([0, *seen, 1500])), 64)
        self.assertEqual(self.sockets(), {})

    def test_oneAtATime(self) -> None:
        """An update that comes while one is out waits for it."""
        answer: Deferred[None] = Deferred()
        self.rules.answers.append(answer)
        first = self.begin(servicePort(cluster=[A]))
        second = self.begin()
        self.assertEqual(len(self.rules.updates), 1)
        answer.callback(None)
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual(self.sockets(), {})

    # --- stopping

    def test_stop(self) -> None:
        """
        New clients are refused, sockets are closed, connections may end, and that is waited for; the rules go last:
        established connections may depend on them.
        """
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 2
        self.log.clear()
        done = self.dataplane.stop(30)
        self.assertEqual(self.log, ["rules", "close web/cluster"])
        (refusing,) = self.rules.updates[-1].current.values()
        self.assertEqual((refusing.cluster, refusing.reachable, len(refusing.frontends)), ((), False, 1))
        self.clock.advance(29)
        self.assertNoResult(done)
        self.assertNotIn("rules stop 0", self.log)
        self.made[0].end()
        self.successResultOf(done)
        self.assertEqual(self.log[-1], "rules stop 0")

    def test_stopThoughRulesFail(self) -> None:
        """Rules that cannot be changed keep nobody from draining."""
        self.update(servicePort(cluster=[A]))
        self.rules.answers.append(fail(RulesRejected("no")))
        self.successResultOf(self.dataplane.stop(30))
        self.assertEqual(len(self.flushLoggedErrors(RulesRejected)), 1)
        self.assertEqual(self.sockets(), {})

    def test_drainTimeEnds(self) -> None:
        """What is left after the drain time is cut."""
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 2
        done = self.dataplane.stop(30)
        self.clock.advance(31)
        self.successResultOf(done)
        self.assertIn("abort web", self.log)

    def test_secondStopCuts(self) -> None:
        """A second stop, with 0, cuts now; another with a time waits with the first."""
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 2
        first = self.dataplane.stop(300)
        waits = self.dataplane.stop(100)
        self.assertNoResult(waits)
        second = self.dataplane.stop(0)
        for done in (first, waits, second):
            self.successResultOf(done)
        self.assertIn("abort web", self.log)

    def test_stopCutsThoughRulesHang(self) -> None:
        """Rules that do not answer keep nobody from cutting."""
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 2
        self.rules.stopping = Deferred()
        first = self.dataplane.stop(0)
        self.assertNoResult(first)
        self.successResultOf(self.dataplane.stop(0))
        self.assertEqual(self.sockets(), {})
        self.rules.stopping.callback(None)
        self.successResultOf(first)

    def test_stopWithoutRules(self) -> None:
        """Rules that cannot be taken back are logged; sockets close all the same."""
        self.update(servicePort(cluster=[A]))
        self.rules.stopping = fail(RulesRejected("no"))
        self.successResultOf(self.dataplane.stop(0))
        self.assertEqual(len(self.flushLoggedErrors(RulesRejected)), 1)
        self.assertEqual(self.sockets(), {})

    def test_stopDuringUpdate(self) -> None:
        """An update that is still opening sockets is given up; nothing stays open."""
        many = [servicePort(portName(f"s{n}"), cluster=[A]) for n in range(200)]
        update = self.begin(*many)
        stop = self.dataplane.stop(0)
        self.turns(stop)
        self.failureResultOf(update, KproxyError)
        self.assertEqual(self.sockets(), {})
        self.assertEqual(self.rules.updates, [])
        self.failureResultOf(self.begin(), KproxyError)

    # --- status

    def test_status(self) -> None:
        """Per service port: frontends, sockets, open connections; all of it JSON."""
        self.update(servicePort(cluster=[A]))
        self.made[0].active = 7
        status = json.loads(json.dumps(self.dataplane.status()))
        self.assertEqual(
            status["servicePorts"],
            {
                "shop/web:http/TCP/IPv4": {
                    "frontends": ["ClusterIP 10.96.0.10:80/TCP"],
                    "sockets": {"cluster": {"protocol": "TCP", "port": 40001, "active": 7}},
                    "active": 7,
                }
            },
        )
        self.assertEqual((status["mode"], status["rules"]), ("userspace", {"writer": "fake"}))
