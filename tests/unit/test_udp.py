"""The UDP proxier, over sockets that are not real."""

from __future__ import annotations

import errno
import json
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.trial.unittest import SkipTest, SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.fakes.datagrams import FakeNativeSockets, FakeSocket, FakeSockets
from tests.shared.policies import endpoint, endpoints
from twisted_kproxy.core.values import Endpoint, Outcome, PoolName, ServicePortName
from twisted_kproxy.interfaces import IProxier, NoEndpoint, NotAvailable
from twisted_kproxy.userspace.ports import raiseLimit
from twisted_kproxy.userspace.udp import SLICE, TRIES, UdpProxier
from twisted_kproxy.userspace.udpflows import KEPT

POOL = PoolName(ServicePortName("default", "dns", "dns", "UDP", "IPv4"), "cluster")
RENAMED = PoolName(ServicePortName("default", "dns", "dns-udp", "UDP", "IPv4"), "cluster")
CLIENT = ("192.0.2.1", 5353)
IDLE = 30.0


class TurningClock(Clock):
    """What is to happen in the next turn of the reactor happens a millisecond later, not within the same advance."""

    def callLater(self, when: float, what: Any, *a: Any, **kw: Any) -> Any:
        return Clock.callLater(self, max(when, 0.001), what, *a, **kw)

    def removeWriter(self, writer: Any) -> None:
        """What Twisted's ports do when they are closed."""


class FakeBalancer:
    """Takes turns; remembers what it was asked, and counts what is open."""

    def __init__(self, *numbers: int) -> None:
        self.pool = list(endpoints(*numbers))
        self.asked: list[tuple[PoolName, str, tuple[Endpoint, ...]]] = []
        self.active: dict[Endpoint, int] = {}
        self.turn = 0

    def nextEndpoint(self, pool: PoolName, client: str, avoid: Any = ()) -> Endpoint:
        self.asked.append((pool, client, tuple(avoid)))
        if not self.pool:
            raise NoEndpoint(f"{pool} has no endpoint")
        for step in range(len(self.pool)):
            chosen = self.pool[(self.turn + step) % len(self.pool)]
            if chosen not in avoid:
                self.turn += step + 1
                return chosen
        return self.pool[self.turn % len(self.pool)]

    def opened(self, pool: PoolName, endpoint: Endpoint) -> None:
        self.active[endpoint] = self.active.get(endpoint, 0) + 1

    def closed(self, pool: PoolName, endpoint: Endpoint) -> None:
        self.active[endpoint] -= 1


class FakeObserver:
    def __init__(self) -> None:
        self.begun: list[tuple[PoolName, Endpoint, float]] = []
        self.misses: list[str] = []
        self.failures: list[str] = []
        self.outcomes: list[tuple[PoolName, Endpoint, Outcome]] = []

    def opened(self, pool: PoolName, endpoint: Endpoint, seconds: float) -> None:
        self.begun.append((pool, endpoint, seconds))

    def missed(self, pool: PoolName, endpoint: Endpoint, reason: str) -> None:
        self.misses.append(reason)

    def failed(self, pool: PoolName, reason: str) -> None:
        self.failures.append(reason)

    def closed(self, pool: PoolName, endpoint: Endpoint, outcome: Outcome) -> None:
        self.outcomes.append((pool, endpoint, outcome))


class FakeBudget:
    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit = limit
        self.used = 0

    def take(self, n: int) -> bool:
        if self.used + n > self.limit:
            return False
        self.used += n
        return True

    def give(self, n: int) -> None:
        self.used -= n


class UdpCase(SynchronousTestCase):
    engine = "python"
    offload = 3

    def setUp(self) -> None:
        raiseLimit()
        self.make(1, 2, 3)

    def make(self, *numbers: int, maxFlows: int = 100, fds: int = 1 << 20, idleTimeout: float = IDLE) -> None:
        self.clock = TurningClock()
        self.clock.advance(1000)
        try:
            kind = FakeNativeSockets if self.engine == "native" else FakeSockets
            self.sockets: Any = kind(self.clock, self.offload)
        except NotAvailable as error:
            raise SkipTest(str(error)) from None
        self.balancer = FakeBalancer(*numbers)
        self.observer = FakeObserver()
        self.budget = FakeBudget(fds)
        self.proxier = UdpProxier(
            self.clock,
            POOL,
            self.balancer,  # type: ignore[arg-type]
            self.observer,  # type: ignore[arg-type]
            idleTimeout=idleTimeout,
            budget=self.budget,
            maxFlows=maxFlows,
            sockets=self.sockets,
        )
        self.proxier.listen()
        self.transport: Any = self.proxier.transport
        self.service: FakeSocket = self.transport.socket

    def tearDown(self) -> None:
        """Whatever happened, a stopped proxier leaves nothing behind and its books are balanced."""
        self.proxier.stopListening()
        self.clock.pump([0.001] * 100)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.budget.used, 0)
        self.assertEqual(set(self.balancer.active.values()) - {0}, set())
        self.assertEqual(len(self.observer.begun), len(self.observer.outcomes))
        self.assertFalse([s for s in self.sockets.connected if s.open])

    def say(self, datagram: bytes = b"?", client: tuple[Any, ...] = CLIENT, dialled: bytes = b"a") -> None:
        self.service.arrive((datagram, client, dialled, 0))

    @property
    def last(self) -> FakeSocket:
        found: FakeSocket = self.sockets.connected[-1]
        return found

    def reasons(self) -> list[str]:
        return [outcome.reason for _, _, outcome in self.observer.outcomes]

    def active(self) -> int:
        return int(self.proxier.status()["active"])

    def drops(self) -> dict[str, int]:
        return dict(self.proxier.status()["drops"])


class RelayTests(UdpCase):
    def test_interface(self) -> None:
        """It provides L{IProxier}."""
        verifyObject(IProxier, self.proxier)
        self.assertEqual((self.proxier.pool, self.proxier.port), (POOL, 40000))

    def test_portInUse(self) -> None:
        """A port that cannot be had is an error, and another may be tried."""
        self.proxier.stopListening()
        self.sockets.kernel.taken.add(40001)
        self.assertRaises(CannotListenError, self.proxier.listen, 40001)
        self.proxier.listen(40002)
        self.assertEqual(self.proxier.port, 40002)

    def test_thereAndBack(self) -> None:
        """A client's datagrams go to its endpoint, and what comes back goes to it, from where it had dialled."""
        self.say(b"one")
        self.say(b"two")
        self.assertEqual(self.last.sent, [b"one", b"two"])
        self.last.reply(b"three")
        self.assertEqual(self.service.replies, [(b"three", CLIENT, b"a")])
        self.assertEqual(self.balancer.asked, [(POOL, "192.0.2.1", ())])

    def test_emptyDatagram(self) -> None:
        """A datagram without content is one too."""
        self.say(b"")
        self.last.reply(b"")
        self.assertEqual((self.last.sent, self.service.replies), ([b""], [(b"", CLIENT, b"a")]))

    def test_clientsApart(self) -> None:
        """Another port of the same client, and another dialled address, is another flow with its own socket."""
        self.say(b"1")
        self.say(b"2", ("192.0.2.1", 5354))
        self.say(b"3", CLIENT, b"b")
        for socket in self.sockets.connected:
            socket.reply(b"re " + socket.sent[0])
        self.assertEqual(
            self.service.replies,
            [(b"re 1", CLIENT, b"a"), (b"re 2", ("192.0.2.1", 5354), b"a"), (b"re 3", CLIENT, b"b")],
        )

    def test_zoneIsNoPartOfTheClient(self) -> None:
        """The balancer is asked for the bare address of a link-local client; replies keep its scope."""
        client = ("fe80::1%eth0", 5353, 0, 2)
        self.say(client=client)
        self.last.reply(b"!")
        self.assertEqual(self.balancer.asked[-1][1], "fe80::1")
        self.assertEqual(self.service.replies, [(b"!", client, b"a")])

    def test_noEndpoint(self) -> None:
        """Without an endpoint a datagram is dropped, reported, and leaves nothing behind."""
        self.make()
        self.say()
        self.assertEqual((self.observer.failures, self.drops()), (["no-endpoint"], {"no-endpoint": 1}))
        self.assertEqual((self.active(), self.budget.used), (0, 0))

    def test_sourcePortZero(self) -> None:
        """A datagram from port 0, which nobody could answer, opens no flow."""
        self.say(client=("192.0.2.1", 0))
        self.assertEqual((self.drops(), self.balancer.asked), ({"source-port-0": 1}, []))

    def test_ownSocket(self) -> None:
        """A datagram from a socket of the proxy itself would go round for ever: it is dropped."""
        self.sockets.own.add(("127.0.0.1", 40000))
        self.say(client=("127.0.0.1", 40000))
        self.assertEqual((self.drops(), self.balancer.asked), ({"loop": 1}, []))

    def test_sendErrors(self) -> None:
        """What the kernel does not take is dropped and counted by reason; the flow goes on."""
        self.say()
        self.last.errors = [errno.EMSGSIZE, errno.EAGAIN, errno.ENOBUFS, errno.EIO]
        for _ in range(5):
            self.say(b"x")
        self.assertEqual(self.drops(), {"too-long": 1, "busy": 2, "error": 1})
        self.assertEqual((self.last.sent, len(self.sockets.connected)), ([b"?", b"x"], 1))

    def test_replyErrors(self) -> None:
        """A reply that the kernel does not take is dropped and counted; the flow goes on."""
        self.say()
        self.service.errors = [errno.EAGAIN, errno.EMSGSIZE]
        self.last.reply(b"1")
        self.last.reply(b"2")
        self.last.reply(b"3")
        self.assertEqual(self.drops(), {"busy": 1, "too-long": 1})
        self.assertEqual(self.service.replies, [(b"3", CLIENT, b"a")])

    def test_status(self) -> None:
        """The status is plain JSON and counts flows, datagrams and bytes both ways."""
        self.say(b"12345")
        self.say(b"1", ("192.0.2.2", 1))
        self.last.reply(b"123")
        status = json.loads(json.dumps(self.proxier.status()))
        self.assertEqual(
            status,
            {
                "protocol": "UDP",
                "port": 40000,
                "listening": True,
                "active": 2,
                "unanswered": 1,
                "opened": 2,
                "ended": {},
                "datagramsSent": 2,
                "bytesSent": 6,
                "datagramsReceived": 1,
                "bytesReceived": 3,
                "drops": {},
            },
        )


class IdleTests(UdpCase):
    def test_expires(self) -> None:
        """A flow ends when nothing has gone either way for the idle time; its outcome has its bytes."""
        self.say(b"12345")
        self.last.reply(b"123")
        self.clock.advance(IDLE - 0.1)
        self.assertEqual(self.active(), 1)
        self.clock.advance(0.1)
        self.assertEqual(self.active(), 0)
        self.assertEqual(self.observer.outcomes, [(POOL, endpoint(1), Outcome("idle", 5, 3))])
        self.assertEqual(self.clock.getDelayedCalls(), [], "no flow, no timer")

    def test_anew(self) -> None:
        """After that the client's next datagram is led anew."""
        self.say()
        self.clock.advance(IDLE)
        self.say()
        self.assertEqual([s.endpoint for s in self.sockets.connected], list(endpoints(1, 2)))

    def test_slidesBothWays(self) -> None:
        """Datagrams of the client and of the endpoint keep a flow alive."""
        self.say()
        for _ in range(5):
            self.clock.advance(IDLE - 1)
            self.say()
            self.clock.advance(IDLE - 1)
            self.last.reply(b"!")
        self.assertEqual((self.active(), len(self.sockets.connected)), (1, 1))

    def test_oneTimer(self) -> None:
        """However many flows, there is one timer; each ends at most an eighth of its time, or a second, late."""
        self.make(1, idleTimeout=IDLE)
        for number in range(50):
            self.say(client=("192.0.2.1", 1000 + number))
            self.clock.advance(0.1)
            self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        ended = {}
        for _ in range(400):
            self.clock.advance(0.1)
            ended[len(self.observer.outcomes)] = None
            oldest = 50 - self.active()
            if oldest < 50:
                self.assertLess(self.clock.seconds() - (1000 + oldest * 0.1), IDLE + 1.2)
        self.assertEqual(self.active(), 0)
        self.assertGreater(len(ended), 3, "they end as their time comes, not all with the last")

    def test_shortTime(self) -> None:
        """A time of a fraction of a second is kept to within an eighth."""
        self.make(1, idleTimeout=0.25)
        self.say()
        self.clock.advance(0.2)
        self.say()
        self.clock.advance(0.2)
        self.assertEqual(self.active(), 1)
        self.clock.advance(0.1)
        self.assertEqual(self.active(), 0)

    def test_manyAtOnce(self) -> None:
        """Thousands that expire together end in slices, so that the reactor is never held up for long."""
        self.make(1, maxFlows=5000)
        for number in range(2 * SLICE + 1):
            self.say(client=("192.0.2.1", 1000 + number))
        self.clock.advance(IDLE)
        self.assertEqual(self.active(), SLICE + 1)
        self.clock.advance(0.001)
        self.clock.advance(0.001)
        self.assertEqual(self.active(), 0)


class EvictionTests(UdpCase):
    def test_unansweredFirst(self) -> None:
        """At the cap the longest unused flow that was never answered makes room, before any that was answered."""
        self.make(1, maxFlows=3)
        for number in (1, 2, 3):
            self.say(client=("192.0.2.1", number))
        self.sockets.connected[0].reply(b"!")
        self.say(client=("192.0.2.1", 4))
        self.assertEqual([s.open for s in self.sockets.connected], [True, False, True, True])
        self.assertEqual((self.reasons(), self.active()), (["evicted"], 3))

    def test_thenLongestUnused(self) -> None:
        """Where all were answered the longest unused one makes room."""
        self.make(1, maxFlows=2)
        for number in (1, 2):
            self.say(client=("192.0.2.1", number))
            self.last.reply(b"!")
        self.say(client=("192.0.2.1", 1))
        self.say(client=("192.0.2.1", 3))
        self.assertEqual([s.open for s in self.sockets.connected], [True, False, True])

    def test_flood(self) -> None:
        """However many spoofed clients come, the cap holds and answered clients keep their flows."""
        self.make(1, maxFlows=50)
        self.say(b"real")
        real = self.last
        real.reply(b"!")
        for number in range(1000):
            self.say(client=("198.51.100.1", 1 + number))
        self.assertEqual((self.active(), self.budget.used), (50, 50))
        self.say(b"again")
        self.assertEqual(real.sent, [b"real", b"again"])

    def test_noDescriptors(self) -> None:
        """Where the process has no descriptor left, one of the proxier's own flows makes room."""
        self.make(1, fds=2)
        for number in (1, 2, 3):
            self.say(client=("192.0.2.1", number))
        self.assertEqual([s.open for s in self.sockets.connected], [False, True, True])

    def test_noDescriptorsAtAll(self) -> None:
        """Where others have them all, the datagram is dropped and reported; later it works."""
        self.make(1, fds=0)
        self.say()
        self.assertEqual((self.observer.failures, self.drops()), (["limit"], {"limit": 1}))
        self.budget.limit = 1
        self.say()
        self.assertEqual(self.active(), 1)

    def test_kernelOutOfDescriptors(self) -> None:
        """The kernel's own refusal is a lack of this machine, not of the endpoint: no other one is tried."""
        self.sockets.unreachable[endpoint(1)] = errno.EMFILE
        self.say()
        self.assertEqual((self.observer.failures, self.drops()), (["limit"], {"limit": 1}))
        self.assertEqual(len(self.balancer.asked), 1)


class FailureTests(UdpCase):
    def test_refusedMoves(self) -> None:
        """An endpoint that refuses is left at once, and the datagram that it refused goes to another one."""
        self.say(b"question")
        self.clock.advance(0.5)
        self.last.refuse()
        self.assertEqual([s.open for s in self.sockets.connected], [False, True])
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), [b"question"]))
        self.assertEqual(self.balancer.asked[-1], (POOL, "192.0.2.1", (endpoint(1),)))
        self.assertEqual((self.reasons(), self.observer.misses), (["refused"], ["refused"]))
        self.assertEqual(self.observer.begun[-1], (POOL, endpoint(2), 0.5), "the time runs from the client's datagram")
        self.last.reply(b"answer")
        self.assertEqual(self.service.replies, [(b"answer", CLIENT, b"a")])

    def test_unreachableMoves(self) -> None:
        """So does one whose host or network cannot be reached, or whose filter says so."""
        for number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM):
            self.make(1, 2)
            self.say(b"question")
            self.last.refuse(number)
            self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), [b"question"]))
            self.assertEqual((self.reasons(), self.observer.misses), (["unreachable"], ["unreachable"]))
            self.proxier.stopListening()

    def test_refusedWhileSending(self) -> None:
        """When sending reports it, both the earlier datagram and the one in hand go to another endpoint, in order."""
        self.say(b"one")
        self.last.errors = [errno.ECONNREFUSED]
        self.say(b"two")
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), [b"one", b"two"]))

    def test_noRoute(self) -> None:
        """An endpoint without a route is passed over before anything is sent."""
        self.sockets.unreachable[endpoint(1)] = errno.ENETUNREACH
        self.say(b"question")
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), [b"question"]))
        self.assertEqual((self.observer.misses, self.budget.used), (["unreachable"], 1))

    def test_answeredIsNotSentAgain(self) -> None:
        """A datagram that was answered is not sent again when a later one is refused."""
        self.say(b"one")
        self.last.reply(b"re one")
        self.last.refuse()
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), []))
        self.say(b"two")
        self.assertEqual(self.last.sent, [b"two"])

    def test_longIsNotSentAgain(self) -> None:
        """A datagram longer than a frame is not kept; its client moves all the same."""
        self.say(b"x" * (KEPT + 1))
        self.last.refuse()
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), []))
        self.say(b"x" * KEPT)
        self.last.refuse()
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(3), [b"x" * KEPT]))

    def test_allRefuse(self) -> None:
        """Each endpoint is tried once; then the datagram is dropped, and the next one begins anew."""
        for number in (1, 2, 3):
            self.say(b"question") if number == 1 else None
            self.assertEqual(self.last.endpoint, endpoint(number))
            self.last.refuse()
        self.assertEqual((self.active(), self.drops()), (0, {"failed": 1}))
        self.assertEqual((self.observer.misses, self.observer.failures), (["refused"] * 3, ["refused"]))
        self.say(b"again")
        self.assertEqual(self.last.sent, [b"again"])

    def test_boundedTries(self) -> None:
        """In a large dead pool a datagram is tried a few times, no more."""
        self.make(*range(50))
        self.say(b"question")
        for _ in range(TRIES):
            self.last.refuse()
        self.assertEqual(len(self.sockets.connected), TRIES)
        self.assertEqual((self.active(), self.drops()), (0, {"failed": 1}))

    def test_boundedTriesWithoutRoute(self) -> None:
        """Nor are more than a few asked when none has a route."""
        self.make(*range(50))
        self.sockets.unreachable = {endpoint(number): errno.EHOSTUNREACH for number in range(50)}
        self.say(b"question")
        self.assertEqual((len(self.observer.misses), self.drops()), (TRIES, {"failed": 1}))

    def test_refusedAtOnceByAll(self) -> None:
        """Endpoints that refuse within the very call are tried one after the other, without end only in number."""
        self.make(*range(50))
        self.sockets.errors = {endpoint(number): [errno.ENETUNREACH] * 9 for number in range(50)}
        self.say(b"question")
        self.assertEqual((len(self.sockets.connected), self.active(), self.drops()), (TRIES, 0, {"failed": 1}))

    def test_onlyOneAndItRefuses(self) -> None:
        """The only endpoint is tried again with the client's next datagram, not before."""
        self.make(1)
        self.say(b"one")
        self.last.refuse()
        self.assertEqual((len(self.sockets.connected), self.active()), (1, 0))
        self.say(b"two")
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(1), [b"two"]))

    def test_triesBeginAnewAfterAnAnswer(self) -> None:
        """Once an endpoint has answered, earlier failures no longer count."""
        self.make(1, 2)
        self.say(b"one")
        self.last.refuse()
        self.last.reply(b"!")
        self.say(b"two")
        self.last.refuse()
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(1), [b"two"]))

    def test_otherReports(self) -> None:
        """A report that blames nobody, such as a path's smaller size, is counted; the flow goes on."""
        self.say(b"one")
        self.last.refuse(errno.EMSGSIZE)
        self.say(b"two")
        self.assertEqual((self.last.sent, self.drops()), ([b"one", b"two"], {"too-long": 1}))

    def test_othersStay(self) -> None:
        """Only the client that was refused moves."""
        self.make(1)
        self.say(b"one")
        self.say(b"two", ("192.0.2.2", 1))
        self.balancer.pool = list(endpoints(1, 2))
        self.last.refuse()
        self.say(b"three")
        self.assertEqual(self.sockets.connected[0].sent, [b"one", b"three"])


class EndpointsChangedTests(UdpCase):
    def test_leaves(self) -> None:
        """An endpoint that left gets nothing more: its clients' next datagrams go elsewhere."""
        self.say(b"one")
        old = self.last
        self.balancer.pool = list(endpoints(2, 3))
        self.proxier.endpointsChanged(endpoints(2, 3))
        self.say(b"two")
        self.assertEqual((old.sent, old.open), ([b"one"], False))
        self.assertIn(self.last.endpoint, endpoints(2, 3))
        self.assertEqual((self.last.sent, self.reasons()), ([b"two"], ["moved"]))

    def test_lastRepliesArrive(self) -> None:
        """Until then, what an endpoint that is leaving still has to say reaches the client."""
        self.say(b"one")
        self.proxier.endpointsChanged(endpoints(2, 3))
        self.last.reply(b"re one")
        self.assertEqual(self.service.replies, [(b"re one", CLIENT, b"a")])

    def test_stays(self) -> None:
        """A client whose endpoint stays keeps its flow, whoever else comes and goes."""
        self.say(b"one")
        self.proxier.endpointsChanged(endpoints(1, 7, 8))
        self.say(b"two")
        self.assertEqual((self.last.sent, len(self.sockets.connected)), ([b"one", b"two"], 1))

    def test_leavesAndComesBack(self) -> None:
        """An endpoint that is back before the client's next datagram keeps the client."""
        self.say(b"one")
        self.proxier.endpointsChanged(endpoints(2))
        self.proxier.endpointsChanged(endpoints(1, 2))
        self.say(b"two")
        self.assertEqual(self.last.sent, [b"one", b"two"])

    def test_allLeave(self) -> None:
        """When all leave, datagrams are dropped and the flow ends; when they are back it works again."""
        self.say(b"one")
        self.balancer.pool = []
        self.proxier.endpointsChanged(())
        self.say(b"two")
        self.assertEqual((self.active(), self.drops(), self.reasons()), (0, {"no-endpoint": 1}, ["moved"]))
        self.balancer.pool = list(endpoints(4))
        self.proxier.endpointsChanged(endpoints(4))
        self.say(b"three")
        self.assertEqual(self.last.sent, [b"three"])


class EndTests(UdpCase):
    def test_stop(self) -> None:
        """Stopping closes the socket and ends every flow; what endpoints then report does nothing."""
        self.say()
        self.say(client=("192.0.2.2", 1))
        self.proxier.stopListening()
        self.assertEqual((self.sockets.closed, self.reasons()), ([self.transport], ["aborted", "aborted"]))
        self.proxier.stopListening()
        self.assertEqual(len(self.sockets.closed), 1)
        self.assertIsNone(self.successResultOf(self.proxier.drained()))

    def test_stopOfThousands(self) -> None:
        """Thousands end in slices; in between nobody is answered and nobody moves; then it is drained."""
        self.make(1, 2, maxFlows=5000)
        for number in range(2 * SLICE + 2):
            self.say(client=("192.0.2.1", 1000 + number))
        self.proxier.stopListening()
        drained = self.proxier.drained()
        self.assertNoResult(drained)
        self.assertEqual(self.active(), SLICE + 2)
        self.last.reply(b"late")
        self.last.refuse()
        self.assertEqual((self.service.replies, len(self.sockets.connected)), ([], 2 * SLICE + 2))
        self.clock.advance(0.001)
        self.assertNoResult(drained)
        self.clock.advance(0.001)
        self.assertIsNone(self.successResultOf(drained))

    def test_drainedNow(self) -> None:
        """Without flows it is drained at once; a cancelled wait disturbs nobody."""
        self.assertIsNone(self.successResultOf(self.proxier.drained()))
        self.say()
        waits: list[Deferred[None]] = [self.proxier.drained() for _ in range(2)]
        waits[0].cancel()
        self.failureResultOf(waits[0])
        self.proxier.stopListening()
        self.assertIsNone(self.successResultOf(waits[1]))

    def test_abort(self) -> None:
        """Aborting ends the flows there are; a proxier that still listens goes on with new ones."""
        self.say()
        self.proxier.abort()
        self.assertEqual((self.active(), self.reasons()), (0, ["aborted"]))
        self.say()
        self.assertEqual(self.active(), 1)

    def test_abortTwice(self) -> None:
        """To be told again while it is being done is harmless, also when flows end by themselves meanwhile."""
        self.make(1, maxFlows=5000)
        for number in range(SLICE + 5):
            self.say(client=("192.0.2.1", 1000 + number))
        self.proxier.stopListening()
        self.proxier.abort()
        self.clock.advance(IDLE)
        self.clock.pump([0.001] * 5)
        self.assertEqual(self.active(), 0)

    def test_renamed(self) -> None:
        """Under another name flows go on, and are reported under it."""
        self.say(b"one")
        self.proxier.renamed(RENAMED)
        self.say(b"two")
        self.say(b"three", ("192.0.2.2", 1))
        self.assertEqual(self.sockets.connected[0].sent, [b"one", b"two"])
        self.assertEqual(self.balancer.asked[-1][0], RENAMED)
        self.proxier.stopListening()
        self.assertEqual({pool for pool, _, _ in self.observer.outcomes}, {RENAMED})


class NativeRelayTests(RelayTests):
    engine = "native"


class NativeIdleTests(IdleTests):
    engine = "native"


class NativeEvictionTests(EvictionTests):
    engine = "native"


class NativeFailureTests(FailureTests):
    engine = "native"


class NativeEndpointsChangedTests(EndpointsChangedTests):
    engine = "native"


class NativeEndTests(EndTests):
    engine = "native"
