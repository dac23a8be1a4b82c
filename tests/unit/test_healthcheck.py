"""The ports on which load balancers ask about Services."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import ServerFactory
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from tests.builders import portName, servicePort
from tests.unit.test_status import Answer
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import EVERYWHERE, Locality, ServiceMap, ServicePort
from twisted_kproxy.interfaces import IUpdateListener
from twisted_kproxy.web.healthcheck import MAX_CONNECTIONS, HealthChecks, listenOn


class FakeEvents:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def record(self, *about: Any, warning: bool = False) -> None:
        self.told.append((*about, warning))


class FakePort:
    """A port that is listened on."""

    def __init__(self, world: World, place: Any) -> None:
        self.world = world
        self.place = place

    def stopListening(self) -> Deferred[None]:
        self.world.history.append(("close", *self.place))
        del self.world.open[self.place]
        return succeed(None)


class World:
    """
    Which ports are listened on.

    :ivar open: factory by family and port.
    :ivar taken: places that others have.
    """

    def __init__(self) -> None:
        self.open: dict[Any, Any] = {}
        self.taken: dict[Any, str] = {}
        self.history: list[tuple[Any, ...]] = []

    def listen(self, reactor: Any, family: Any, port: int, factory: Any) -> Any:
        place = family, port
        assert place not in self.open, f"{place} twice"
        if place in self.taken:
            raise OSError(98, self.taken[place])
        self.history.append(("open", *place))
        self.open[place] = factory
        return FakePort(self, place)

    def ask(self, place: Any, request: str = "GET /any/path HTTP/1.1", host: str = "192.0.2.2") -> Answer | None:
        """``None`` where the connection ends without an answer."""
        kind = IPv6Address if ":" in host else IPv4Address
        transport = StringTransport(hostAddress=kind("TCP", host, place[1]))
        protocol = self.open[place].buildProtocol(None)
        protocol.makeConnection(transport)
        if transport.disconnecting:
            protocol.connectionLost(Failure(ConnectionDone()))
            return None
        protocol.dataReceived(f"{request}\r\nHost: node\r\n\r\n".encode())
        answer = Answer(transport.value())
        protocol.connectionLost(Failure(ConnectionDone()))
        return answer


class FakeBudget:
    def __init__(self, limit: int) -> None:
        self.left = limit

    def hold(self, n: int) -> bool:
        if n > self.left:
            return False
        self.left -= n
        return True

    def release(self, n: int) -> None:
        self.left += n


def asked(
    service: str = "web", number: int = 32000, ready: Iterable[str] = (), port: str = "http", **name: Any
) -> ServicePort:
    """A service port that is asked about on that port."""
    return servicePort(
        portName(service, port, **name), healthCheckPort=number, localReady=frozenset(ready), uid=f"uid-{service}"
    )


class HealthCheckTests(SynchronousTestCase):
    """Ports come and go with Services, and say whether there are endpoints."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.world = World()
        self.events = FakeEvents()
        self.healthy = True
        self.codes: list[int] = []
        self.current = ServiceMap()
        self.checks = self.make()

    def make(self, **options: Any) -> HealthChecks:
        checks = HealthChecks(
            self.clock, "n0", lambda: self.healthy, self.events,  # type: ignore[arg-type]
            answered=self.codes.append, listen=self.world.listen, **options,
        )  # fmt: skip
        checks.startService()
        self.addCleanup(lambda: self.successResultOf(checks.stopService()) if not checks._closed else None)
        return checks

    def update(self, *ports: ServicePort, full: bool = False, nodePorts: tuple[str, ...] = EVERYWHERE) -> None:
        previous = self.current
        self.current = ServiceMap({it.name: it for it in ports}, locality=Locality(nodePorts=nodePorts))
        self.successResultOf(self.checks.onUpdate(Update(previous, self.current, full)))

    def ask(self, number: int = 32000, family: str = "IPv4", **how: Any) -> Answer:
        answer = self.world.ask((family, number), **how)
        assert answer is not None
        return answer

    def test_interface(self) -> None:
        """It follows the map."""
        verifyObject(IUpdateListener, self.checks)

    def test_answer(self) -> None:
        """200 with ready endpoints on this node: any path, GET and HEAD, body and headers as kube-proxy gives them."""
        self.update(asked(ready=("10.244.0.5", "10.244.0.6")))
        answer = self.ask()
        self.assertEqual(answer.code, 200)
        self.assertEqual(
            answer.json(),
            {"service": {"namespace": "shop", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": True},
        )
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
        self.assertEqual(answer.headers["x-load-balancing-endpoint-weight"], "2")
        head = self.ask(request="HEAD / HTTP/1.1")
        self.assertEqual((head.code, head.body), (200, b""))
        self.assertEqual(head.headers["content-length"], answer.headers["content-length"])
        self.assertEqual(self.ask(request="POST / HTTP/1.1").code, 405)
        self.assertEqual(self.codes, [200, 200])

    def test_comesAndGoes(self) -> None:
        """200, 503 and 200 again as ready endpoints go and come; the port stays open throughout."""
        for ready, code in (({"a"}, 200), ((), 503), ({"b"}, 200)):
            self.update(asked(ready=ready))
            answer = self.ask()
            self.assertEqual((answer.code, answer.json()["localEndpoints"]), (code, len(ready)))
        self.assertEqual(self.world.history, [("open", "IPv4", 32000)])

    def test_unitedOverPorts(self) -> None:
        """Addresses count once, over all ports of the Service in that family; only one port names the number."""
        other = servicePort(portName("web", "dns", "UDP"), localReady=frozenset({"a", "b"}))
        six = asked(ready={"x"}, family="IPv6")
        self.update(asked(ready={"a", "c"}), other, six)
        self.assertEqual(self.ask().json()["localEndpoints"], 3)
        self.assertEqual(self.ask(family="IPv6", host="2001:db8::2").json()["localEndpoints"], 1)
        self.update(asked(ready={"a", "c"}), six)
        self.assertEqual(self.ask().json()["localEndpoints"], 2)

    def test_unhealthy(self) -> None:
        """An unhealthy proxy answers 503 and says so, whatever endpoints there are."""
        self.update(asked(ready={"a"}))
        self.healthy = False
        answer = self.ask()
        self.assertEqual((answer.code, answer.json()["serviceProxyHealthy"]), (503, False))
        self.assertEqual(answer.json()["localEndpoints"], 1)

    def test_stopping(self) -> None:
        """While the daemon drains every answer is 503; at the end the port is closed, and nothing opens it again."""
        self.update(asked(ready={"a"}))
        self.checks.stopping()
        self.assertEqual(self.ask().code, 503)
        self.successResultOf(self.checks.stopService())
        self.assertEqual(self.world.open, {})
        self.update(asked(number=32001))
        self.assertEqual(self.world.open, {})

    def test_moves(self) -> None:
        """A number that is changed in place, a Service that goes, and one that is asked about no more."""
        self.update(asked(ready={"a"}), asked("other", 32010))
        self.update(asked(number=32001, ready={"a"}), asked("other", 32010))
        self.assertEqual(self.world.history[2:], [("close", "IPv4", 32000), ("open", "IPv4", 32001)])
        self.assertEqual(self.ask(32001).code, 200)
        self.update(asked(number=32001, ready={"a"}))
        self.assertEqual(set(self.world.open), {("IPv4", 32001)})
        self.update(asked(number=0, ready={"a"}))
        self.assertEqual(self.world.open, {})
        self.assertEqual(self.checks.status(), {})

    def test_swap(self) -> None:
        """Two Services exchange their numbers: the ports stay open, and speak of the other one."""
        self.update(asked("a", 32000, {"1"}), asked("b", 32001))
        self.update(asked("a", 32001, {"1"}), asked("b", 32000))
        self.assertEqual(len(self.world.history), 2)
        self.assertEqual(self.ask(32001).json()["service"]["name"], "a")
        self.assertEqual(self.ask(32000).json()["service"]["name"], "b")

    def test_handedOver(self) -> None:
        """The number of a Service that goes is taken over by the one that waited for it."""
        self.update(asked("a"), asked("b", 0, {"1"}))
        self.update(asked("b", 32000, {"1"}))
        self.assertEqual(self.world.history, [("open", "IPv4", 32000)])
        self.assertEqual(self.ask().json()["service"]["name"], "b")
        self.assertEqual(self.ask().code, 200)

    def test_renamedPort(self) -> None:
        """When the port that carried the number goes another one carries it: nothing is closed."""
        dns = servicePort(portName("web", "dns"), localReady=frozenset({"a"}))
        self.update(asked(ready={"a"}), dns)
        self.update(asked(port="dns", ready={"a"}))
        self.assertEqual(len(self.world.history), 1)
        self.assertEqual(self.ask().code, 200)

    def test_missedUpdate(self) -> None:
        """What it did not hear of, since an update failed elsewhere, is made good with the next one."""
        self.update(asked(ready={"a"}))
        later = ServiceMap({portName("late"): asked("late", 32005)})
        self.successResultOf(self.checks.onUpdate(Update(later, later, True)))
        self.assertEqual(set(self.world.open), {("IPv4", 32005)})

    def test_taken(self) -> None:
        """A port that another program has: told once, in the log and as an event; tried every 5 s until it is free."""
        self.world.taken["IPv4", 32000] = "Address already in use"
        with capturedLogs() as logs:
            self.update(asked(ready={"a"}), asked("other", 32001))
            for _ in range(3):
                self.clock.advance(5)
            self.update(asked(ready=()), asked("other", 32001))
            self.clock.advance(5)
            errors = [it for it in logs if it["log_level"] is LogLevel.error]
            self.assertEqual([(it["service"], it["port"]) for it in errors], [("shop/web", 32000)])
        self.assertEqual(set(self.world.open), {("IPv4", 32001)})
        (event,) = self.events.told
        self.assertEqual(
            (*event[:6], event[7]),
            ("Service", "shop", "web", "uid-web", "FailedToStartServiceHealthcheck", "Listen", True),
        )
        self.assertIn("32000: Address already in use", event[6])
        about = self.checks.status()["shop/web"]["IPv4"]
        self.assertEqual((about["listening"], about["error"]), (False, "Address already in use"))
        self.assertEqual(self.checks.counts()["IPv4", False], 1)
        self.world.taken.clear()
        self.clock.advance(5)
        self.assertEqual(self.ask().json()["localEndpoints"], 0)
        self.assertEqual(self.checks.status()["shop/web"]["IPv4"]["error"], "")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_takenAndGone(self) -> None:
        """A Service that goes while its port could not be had is not tried any more."""
        self.world.taken["IPv4", 32000] = "Address already in use"
        self.update(asked())
        self.update()
        self.world.taken.clear()
        self.clock.advance(5)
        self.assertEqual((self.world.open, self.clock.getDelayedCalls()), ({}, []))

    def test_budget(self) -> None:
        """Ports for which there are no descriptors wait for them."""
        budget = FakeBudget(3)
        self.successResultOf(self.checks.stopService())
        self.checks = self.make(budget=budget)
        self.update(asked("a", 32000), asked("b", 32001))
        self.assertEqual((len(self.world.open), budget.left), (1, 1))
        self.assertIn("LimitNOFILE", self.events.told[0][6])
        waiting = next(name for name in "ab" if not self.checks.status()[f"shop/{name}"]["IPv4"]["listening"])
        self.update(asked(waiting, {"a": 32000, "b": 32001}[waiting]))
        self.assertEqual(budget.left, 3)
        self.clock.advance(5)
        self.assertEqual((len(self.world.open), budget.left), (1, 1))

    def test_someAddresses(self) -> None:
        """Where node ports are served at some addresses only, connections to others end at once."""
        self.update(asked(ready={"a"}), asked(ready={"x"}, family="IPv6"), nodePorts=("192.0.2.0/24", "2001:db8::/64"))
        self.assertEqual(self.ask().code, 200)
        self.assertIsNone(self.world.ask(("IPv4", 32000), host="198.51.100.2"))
        self.assertEqual(self.ask(family="IPv6", host="2001:db8::2").code, 200)
        self.assertIsNone(self.world.ask(("IPv6", 32000), host="fe80::1%eth0"))
        self.update(asked(ready={"a"}), asked(ready={"x"}, family="IPv6"))
        self.assertEqual(self.ask(host="198.51.100.2").code, 200)

    def test_manyConnections(self) -> None:
        """A thousand Services may be asked at once; who holds more connections loses the oldest."""
        self.update(*(asked(f"s{number}", 30000 + number, {"a"}) for number in range(1000)))
        self.assertEqual(len(self.world.open), 1000)
        door = self.world.open["IPv4", 30000]
        transports = []
        for _ in range(1000 + MAX_CONNECTIONS + 1):
            transport = StringTransport(hostAddress=IPv4Address("TCP", "192.0.2.2", 30000))
            door.buildProtocol(None).makeConnection(transport)
            transports.append(transport)
        self.assertEqual([it.disconnecting for it in transports[:2]], [True, False])
        self.assertEqual(sum(it.disconnecting for it in transports), 1)


class ListenTests(TestCase):
    """Real sockets."""

    async def test_bothFamilies(self) -> None:
        """IPv4 and IPv6 listen on one number, each for itself; a second time it is taken."""
        four = listenOn(reactor, "IPv4", 0, ServerFactory())
        number = four.getHost().port  # type: ignore[attr-defined]
        six = listenOn(reactor, "IPv6", number, ServerFactory())
        try:
            self.assertEqual(six.getHost().port, number)  # type: ignore[attr-defined]
            self.assertRaises(OSError, listenOn, reactor, "IPv4", number, ServerFactory())
        finally:
            await four.stopListening()  # type: ignore[misc]
            await six.stopListening()  # type: ignore[misc]

    async def test_hundreds(self) -> None:
        """Hundreds of real ports come and go."""
        checks = HealthChecks(reactor, "n0", lambda: True, FakeEvents(), listen=anyPort)  # type: ignore[arg-type]
        ports = [asked(f"s{number}", 1 + number, {"a"}) for number in range(300)]
        await checks.onUpdate(Update(ServiceMap(), ServiceMap({it.name: it for it in ports})))
        self.assertEqual(checks.counts()["IPv4", True], len(ports))
        json.dumps(checks.status())
        await checks.stopService()
        self.assertEqual(checks.counts()["IPv4", True], 0)


def anyPort(reactor: Any, family: Any, port: int, factory: Any) -> Any:
    """On a number that the kernel gives."""
    return listenOn(reactor, family, 0, factory)
