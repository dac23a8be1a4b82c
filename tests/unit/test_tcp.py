"""The TCP proxier: accepting, dialing, refusing; and what is under it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from tests.shared.proxiers import (
    Backend,
    ProxierParts,
    RecordingObserver,
    ScriptedBalancer,
    deadEndpoint,
)
from tests.shared.relays import PATIENCE, arrived, descriptors, ending, readAll, readExactly, reset, tcpPair
from twisted_kproxy.core.values import Endpoint, Outcome, PoolName, ServicePortName
from twisted_kproxy.interfaces import IProxierFactory
from twisted_kproxy.userspace.dial import Deadlines, Dial, Dialer, established
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import LAST, OUTPUT, Poller
from twisted_kproxy.userspace.ports import Budget
from twisted_kproxy.userspace.session import Session
from twisted_kproxy.userspace.sockets import openListener
from twisted_kproxy.userspace.tcp import ListeningPort, TcpProxier

POOL = PoolName(ServicePortName("shop", "cart", "web", "TCP", "IPv4"), "cluster")


class BlackHole:
    """An endpoint that answers no connect: a listener whose backlog is full."""

    def __init__(self) -> None:
        self._sockets = [socket.socket()]
        self._sockets[0].bind(("127.0.0.1", 0))
        self._sockets[0].listen(0)
        self.endpoint = Endpoint(*self._sockets[0].getsockname())
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self._sockets[0].getsockname())
            self._sockets.append(filler)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


class TcpTestCase(ProxierParts, TestCase):
    """Parts of the tests below."""

    timeout = 20
    reactor: Any = reactor
    protocol = "TCP"
    #: Long ones: what is there must not come too late because the machine is busy.
    connectTimeouts: tuple[float, ...] = (15.0,) * 4
    limit: int | None = None

    def makeProxier(self, pool: PoolName, balancer: Any, observer: Any) -> TcpProxier:
        self.budget = Budget(reactor, self.limit)
        poller = Poller(reactor)
        self.dialer = Dialer(reactor, poller)
        return TcpProxier(
            reactor,
            pool,
            balancer,
            observer,
            relay=PairRelay(reactor, poller),
            dialer=self.dialer,
            budget=self.budget,
            connectTimeouts=self.connectTimeouts,
        )

    def listening(self, *endpoints: Endpoint) -> TcpProxier:
        proxier: TcpProxier = self.proxier(*endpoints)
        proxier.listen()
        return proxier

    def blackHole(self) -> Endpoint:
        hole = BlackHole()
        self.addCleanup(hole.close)
        return hole.endpoint

    async def dialing(self, proxier: TcpProxier) -> None:
        """Until its only client waits for an endpoint."""
        while not any(session._dial for session in proxier._sessions):
            await deferLater(reactor, 0.005)  # type: ignore[arg-type]

    @staticmethod
    def giveUp(session: Session) -> None:
        """As if the time for its endpoint to answer were over."""
        assert session._dial is not None
        session._dial.expired()


class DialingTests(TcpTestCase):
    """From the accepted client to a connected endpoint."""

    def test_factory(self) -> None:
        """It is a Twisted protocol factory."""
        verifyObject(IProxierFactory, self.proxier())

    async def test_refusedThenNext(self) -> None:
        """An endpoint that refuses is reported, to be avoided from then on, and the next one serves."""
        dead, backend = deadEndpoint(), self.backend()
        proxier = self.listening(dead, backend.endpoint)
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")
        self.assertEqual(self.balancer.asked, [("127.0.0.1", ()), ("127.0.0.1", (dead,))])
        self.assertEqual((self.observer.misses, self.observer.failures), ([(dead, "refused")], []))
        self.assertEqual(self.balancer.active, {(POOL, backend.endpoint): 1})

    async def test_allRefuse(self) -> None:
        """After the last attempt the client is reset: it never sees a connection that just ends."""
        dead = deadEndpoint()
        proxier = self.listening(dead)
        client = self.client(proxier)
        self.assertEqual(await self.run_(ending, client), "reset")
        self.assertEqual((self.observer.misses, self.observer.failures), ([(dead, "refused")] * 4, ["refused"]))
        self.assertEqual(self.balancer.asked[-1], ("127.0.0.1", (dead,) * 3))
        self.assertEqual((proxier.status()["active"], self.balancer.active), (0, {}))

    async def test_noEndpointIsReset(self) -> None:
        """No endpoint at all: the client is reset."""
        proxier = self.listening()
        self.assertEqual(await self.run_(ending, self.client(proxier)), "reset")

    async def test_timeout(self) -> None:
        """An endpoint that does not answer in time is left for the next."""
        self.connectTimeouts = (0.1, 15.0)
        backend = self.backend()
        proxier = self.listening(self.blackHole(), backend.endpoint)
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")
        self.assertEqual([reason for _, reason in self.observer.misses], ["timeout"])
        ((_, _, seconds),) = self.observer.openings
        self.assertTrue(0.09 < seconds < 15, seconds)

    async def test_handshakeWaitsForTheQuestion(self) -> None:
        """
        The last word of the handshake goes with what the client has said; at once, where it has said nothing yet: its
        server may speak first.
        """
        backend = self.backend()
        proxier = self.listening(*[backend.endpoint] * 3)
        dial, eagerness = self.dialer.dial, []

        def dialled(*arguments: Any) -> Dial:
            eagerness.append(arguments[3])
            return dial(*arguments)

        self.dialer.dial = dialled  # type: ignore[method-assign]
        self.client(proxier)
        await deferLater(reactor, 0.01)  # type: ignore[arg-type]
        eager = self.client(proxier)
        eager.sendall(b"hello")
        self.assertEqual(await self.run_(readExactly, eager, 5), b"hello")
        self.assertEqual(eagerness, [False, True])

    async def test_slowDialHoldsUpNobody(self) -> None:
        """While one client's endpoint does not answer, others are accepted, dialed and served."""
        backend = self.backend()
        proxier = self.listening(self.blackHole(), *[backend.endpoint] * 10)
        slow = self.client(proxier)
        for _ in range(10):
            self.assertEqual(await self.ask(self.client(proxier)), b"hello")
        # Nor has anybody had to wait until it was given up.
        self.assertEqual((self.observer.misses, proxier.status()["active"]), ([], 11))
        slow.close()

    async def test_clientResetsWhileDialing(self) -> None:
        """A client that resets meanwhile ends the attempt."""
        proxier = self.listening(self.blackHole())
        client = self.client(proxier)
        client.sendall(b"hello")
        await self.dialing(proxier)
        reset(client)
        await self.observer.until(lambda: bool(self.observer.failures))
        self.assertEqual(self.observer.failures, ["client-gone"])
        self.assertEqual((proxier.status()["active"], self.budget.used + self.budget.held), (0, 1))

    async def test_clientLeavesWhileDialing(self) -> None:
        """A client that ends without a word has gone: no endpoint is tried any further for it."""
        proxier = self.listening(self.blackHole())
        self.client(proxier).close()
        await self.observer.until(lambda: bool(self.observer.failures))
        self.assertEqual(self.observer.failures, ["client-gone"])
        self.assertEqual(len(self.balancer.asked), 1)

    async def test_halfCloseWhileDialing(self) -> None:
        """A client that asks and half-closes before an endpoint is there gets its answer all the same."""
        self.connectTimeouts = (0.1, 15.0)
        backend = self.backend()
        proxier = self.listening(self.blackHole(), backend.endpoint)
        client = self.client(proxier)
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.run_(readAll, client), b"question")
        await self.observer.until(lambda: bool(self.observer.closings))
        self.assertEqual(self.observer.closings[0][2], Outcome("done", 8, 8))

    async def test_muchBeforeTheEndpoint(self) -> None:
        """What a client says early is kept up to 64 KiB, then it waits; nothing is lost."""
        backend = self.backend()
        proxier = self.listening(self.blackHole(), backend.endpoint)
        client = self.client(proxier)
        payload = os.urandom(3_000_000)

        def send() -> None:
            client.sendall(payload[1000:])
            client.shutdown(socket.SHUT_WR)

        client.sendall(payload[:1000])
        await self.dialing(proxier)
        sent, answer = self.run_(send), self.run_(readAll, client)
        (session,) = proxier._sessions
        while len(session._early) < 65536:
            await deferLater(reactor, 0.005)  # type: ignore[arg-type]
        await deferLater(reactor, 0.05)  # type: ignore[arg-type]
        self.assertEqual(len(session._early), 65536)
        self.giveUp(session)
        self.assertTrue((await answer) == payload)
        await sent

    async def test_halfClose(self) -> None:
        """A whole exchange with the end passed on both ways, through both sockets, counted on both sides."""
        backend = self.backend(serve=lambda sock: sock.sendall(b"%d" % len(readAll(sock))))
        proxier = self.listening(backend.endpoint)
        client = self.client(proxier)
        client.sendall(b"x" * 100_000)
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.run_(readAll, client), b"100000")
        await self.observer.until(lambda: bool(self.observer.closings))
        self.assertEqual(self.observer.closings, [(POOL, backend.endpoint, Outcome("done", 100_000, 6))])
        self.assertEqual((self.balancer.active, self.budget.used + self.budget.held), ({}, 1))

    async def test_noLookup(self) -> None:
        """What is not an address is never looked up: that try fails."""
        backend = self.backend()
        proxier = self.listening(Endpoint("localhost", 1), backend.endpoint)
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")
        self.assertEqual([reason for _, reason in self.observer.misses], ["error"])

    async def test_descriptorsRunOutOnDial(self) -> None:
        """No descriptor for the endpoint's side: the client is reset, no other endpoint tried, accepting pauses."""

        class Poor:
            def dial(self, *args: Any) -> Dial:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        proxier = self.listening(deadEndpoint(), deadEndpoint())
        proxier.dialer = Poor()  # type: ignore[assignment]
        self.assertEqual(await self.run_(ending, self.client(proxier)), "reset")
        self.assertEqual((self.observer.failures, len(self.balancer.asked)), (["limit"], 1))
        self.assertTrue(self.budget.paused)
        proxier.dialer = self.dialer
        backend = self.backend()
        self.balancer.turns[:] = [backend.endpoint]
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")

    async def test_portsRunOut(self) -> None:
        """No local port left towards an endpoint: another endpoint is tried."""
        backend = self.backend()
        real = self.proxier(deadEndpoint(), backend.endpoint)
        real.listen()

        class Spent(Dialer):
            first = True

            def dial(self, *args: Any) -> Dial:
                if self.first:
                    self.first = False
                    raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
                return super().dial(*args)

        real.dialer = Spent(reactor, real.poller)
        self.assertEqual(await self.ask(self.client(real)), b"hello")
        self.assertEqual([reason for _, reason in self.observer.misses], ["limit"])
        self.assertFalse(self.budget.paused)

    async def test_bugInBalancer(self) -> None:
        """Whatever raises while a client is served costs that client only; it is logged."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        good = self.balancer.nextEndpoint
        self.balancer.nextEndpoint = lambda *args: 1 // 0  # type: ignore[assignment]
        self.assertEqual(await self.run_(ending, self.client(proxier)), "reset")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual((self.observer.failures, self.budget.used + self.budget.held), (["error"], 1))
        self.balancer.nextEndpoint = good  # type: ignore[method-assign]
        self.balancer.opened = lambda *args: 1 // 0  # type: ignore[assignment, method-assign, return-value]
        self.assertEqual(await self.run_(ending, self.client(proxier)), "reset")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual((proxier.status()["active"], self.budget.used + self.budget.held), (0, 1))


class AcceptingTests(TcpTestCase):
    """The listening socket."""

    async def test_tuning(self) -> None:
        """
        Neither side has a Nagle delay; the client's has keepalive after 60 s, 4 times 15 s apart. Neither blocks: with
        a blocking socket splice(2) would wait, and everything with it, as its own flag is for the pipe alone.
        """
        seen: list[list[int]] = []

        class Looking(PairRelay):
            def relay(self, client: socket.socket, backend: socket.socket, early: bytes, ended: Any) -> Any:
                for sock in (client, backend):
                    seen.append(
                        [
                            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                            os.get_inheritable(sock.fileno()),
                            os.get_blocking(sock.fileno()),
                        ]
                    )
                return super().relay(client, backend, early, ended)

        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        proxier.relay = Looking(reactor, proxier.poller)
        await self.ask(self.client(proxier))
        self.assertEqual(seen[0], [1, 1, 60, 15, 4, False, False])
        # That of the backend comes later, with those connections that last.
        self.assertEqual((seen[1][:2], seen[1][5:]), ([1, 0], [False, False]))

    async def test_stopKeepsConnections(self) -> None:
        """After stopListening() what is open goes on; drained() fires when the last one has ended."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        client = self.client(proxier)
        await self.ask(client)
        proxier.stopListening()
        drained = proxier.drained()
        self.assertRaises(OSError, socket.create_connection, ("127.0.0.1", proxier.port), 1)
        self.assertEqual(await self.ask(client, b"again"), b"again")
        self.assertFalse(drained.called)
        client.close()
        await drained

    async def test_stopWithinAccept(self) -> None:
        """A listener may be closed by whoever hears of the connection that it is just accepting."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        opened = self.observer.until(lambda: bool(self.observer.openings))
        opened.addCallback(lambda _: proxier.stopListening())
        clients = [self.client(proxier) for _ in range(3)]
        await opened
        self.assertFalse(proxier.status()["listening"])
        self.assertEqual(await self.ask(clients[0]), b"hello")
        self.assertEqual(self.budget.used + self.budget.held, 2 * proxier.status()["active"])

    async def test_stopServesTheBacklog(self) -> None:
        """Who got through before the socket was closed is served, though nobody had accepted it yet."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        client = self.client(proxier)
        proxier.stopListening()
        self.assertEqual(await self.ask(client), b"hello")

    async def test_drainedGivenUp(self) -> None:
        """Cancelling a wait for the drain harms nobody."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        client = self.client(proxier)
        await self.ask(client)
        first, second = proxier.drained(), proxier.drained()
        first.addErrback(lambda _: None)
        first.cancel()
        client.close()
        await second

    async def test_adopt(self) -> None:
        """A socket that was opened elsewhere is served like its own, with what waits in it."""
        backend = self.backend()
        proxier = self.proxier(backend.endpoint)
        sock = openListener("IPv4", 0)
        proxier.budget.take(1)
        proxier.port = sock.getsockname()[1]
        client = self.client(proxier)
        proxier.adopt(sock)
        self.assertEqual(await self.ask(client), b"hello")

    async def test_abortWhileDialing(self) -> None:
        """abort() also cuts who still waits for an endpoint."""
        proxier = self.listening(self.blackHole())
        client = self.client(proxier)
        await self.dialing(proxier)
        self.assertEqual(proxier.status()["active"], 1)
        proxier.abort()
        self.assertEqual(await self.run_(ending, client), "reset")

    async def test_manyShortConnections(self) -> None:
        """However many come and go, descriptors and connection counts return to where they were."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)

        def many() -> int:
            good = 0
            for _ in range(200):
                with socket.create_connection(("127.0.0.1", proxier.port), PATIENCE) as client:
                    client.sendall(b"ping")
                    client.shutdown(socket.SHUT_WR)
                    good += readAll(client) == b"ping"
            return good

        before = descriptors()
        self.assertEqual(await self.run_(many), 200)
        await self.observer.until(lambda: len(self.observer.closings) == 200)
        await proxier.drained()
        self.assertLessEqual(descriptors(), before + 2)
        self.assertEqual((self.budget.used + self.budget.held, self.balancer.active), (1, {}))


class LimitTests(TcpTestCase):
    """When descriptors run out."""

    limit = 11

    async def test_clientsWait(self) -> None:
        """At the limit further clients wait in the kernel; they are served as soon as others have ended."""
        backend = self.backend()
        proxier = self.listening(backend.endpoint)
        clients = [self.client(proxier) for _ in range(8)]
        answers = [self.ask(client) for client in clients]
        await self.observer.until(lambda: len(self.observer.openings) == 5)
        self.assertTrue(self.budget.paused)
        await deferLater(reactor, 0.25)  # type: ignore[arg-type]
        self.assertEqual((len(self.observer.openings), self.budget.used + self.budget.held), (5, 11))
        for answer, client in zip(answers[:5], clients, strict=False):
            self.assertEqual(await answer, b"hello")
            client.close()
        for answer in answers[5:]:
            self.assertEqual(await answer, b"hello")

    async def test_noDescriptorToListen(self) -> None:
        """A listener that the budget does not allow raises EMFILE."""
        proxier = self.proxier()
        self.budget.take(11)
        error = self.assertRaises(OSError, proxier.listen)
        self.assertEqual(error.errno, errno.EMFILE)
        self.budget.give(11)


class _Reactor(Clock):
    """Watches nothing; the test calls."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def callLater(self, when: float, what: Any, *args: Any, **kw: Any) -> Any:
        # The next turn of the reactor is not the same advance().
        return super().callLater(max(when, 0.001), what, *args, **kw)

    def addReader(self, it: Any) -> None:
        self.readers.add(it)

    def removeReader(self, it: Any) -> None:
        self.readers.discard(it)

    def addWriter(self, it: Any) -> None:
        self.writers.add(it)

    def removeWriter(self, it: Any) -> None:
        self.writers.discard(it)


class AcceptErrorTests(SynchronousTestCase):
    """What accept() may say."""

    def setUp(self) -> None:
        self.reactor = _Reactor()
        self.budget = Budget(self.reactor, 100)
        self.observer = RecordingObserver()
        self.proxier = TcpProxier(
            self.reactor,
            POOL,
            ScriptedBalancer(),
            self.observer,
            relay=PairRelay(self.reactor),
            dialer=Dialer(self.reactor, Poller(self.reactor)),
            budget=self.budget,
        )
        self.proxier.listen()
        self.addCleanup(self.proxier.stopListening)
        (self.port,) = self.reactor.readers
        self.assertIsInstance(self.port, ListeningPort)
        self.real = self.port.socket
        self.script: list[int] = []
        test = self

        class Scripted:
            family = socket.AF_INET

            def _accept(self) -> Any:
                number = test.script.pop(0) if test.script else errno.EAGAIN
                raise OSError(number, os.strerror(number))

        self.port.socket = Scripted()
        self.addCleanup(setattr, self.port, "socket", self.real)

    def test_exhausted(self) -> None:
        """EMFILE and its like pause accepting for 100 ms: no spin, no client closed, no exception."""
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL):
            self.script[:] = [number, number]
            self.port.doRead()
            self.assertEqual(len(self.script), 1)
            self.assertNotIn(self.port, self.reactor.readers)
            self.reactor.advance(0.11)
            self.assertIn(self.port, self.reactor.readers)
        self.assertEqual((self.reactor.getDelayedCalls(), self.budget.used + self.budget.held), ([], 1))

    def test_passing(self) -> None:
        """A client that was gone before it was accepted does not keep the next from being accepted."""
        self.script[:] = [errno.ECONNABORTED, errno.EPROTO, errno.EPERM]
        self.port.doRead()
        self.assertEqual(self.script, [])
        self.assertIn(self.port, self.reactor.readers)
        self.assertEqual(self.budget.used + self.budget.held, 1)

    def test_stopWhilePaused(self) -> None:
        """A listener that is closed during a pause leaves no timer."""
        self.script[:] = [errno.EMFILE]
        self.port.doRead()
        self.port.socket = self.real
        self.proxier.stopListening()
        self.assertEqual((self.reactor.getDelayedCalls(), self.budget.used + self.budget.held), ([], 0))

    def test_cutInSlices(self) -> None:
        """abort() cuts 500 connections per turn of the reactor, without recursion."""
        cut: list[int] = []

        class Open:
            def __init__(self, number: int) -> None:
                self.number = number

            def abort(inner) -> None:
                cut.append(inner.number)
                self.proxier.sessionEnded(inner)  # type: ignore[arg-type]
                self.proxier.tellDrained()

        self.budget.used, self.budget.held = 2 * 8000, 1
        for number in range(8000):
            self.proxier.sessionBegan(Open(number))  # type: ignore[arg-type]
        drained = self.proxier.drained()
        self.proxier.abort()
        self.proxier.abort()
        self.assertEqual(len(cut), 500)
        turns = 0
        while self.reactor.getDelayedCalls():
            before = len(cut)
            self.reactor.advance(0.001)
            turns += 1
            self.assertLessEqual(len(cut) - before, 500)
        self.assertEqual((cut, turns), (list(range(8000)), 15))
        self.successResultOf(drained)
        self.assertEqual(self.budget.used + self.budget.held, 1)


class DialTests(SynchronousTestCase):
    """Single attempts, with a clock that the test turns."""

    def setUp(self) -> None:
        self.reactor = _Reactor()
        self.dialer = Dialer(self.reactor, Poller(self.reactor))
        self.connected: list[socket.socket] = []
        self.failed: list[int] = []
        hole = BlackHole()
        self.addCleanup(hole.close)
        self.hole = hole.endpoint

    def dialConnected(self, sock: socket.socket) -> None:
        self.connected.append(sock)

    def dialFailed(self, number: int) -> None:
        self.failed.append(number)

    def atOnce(self, listen: Callable[[], Endpoint], eager: bool = False) -> Dial:
        """An attempt that is through already. Now and then the kernel takes a moment: then at the next endpoint."""
        for _ in range(100):
            dial = self.dialer.dial(listen(), 1.0, self, eager)
            if dial.connected:
                self.addCleanup(dial.socket.close)
                return dial
            dial.cancel()
        raise AssertionError("it is never connected at once")

    def test_connected(self) -> None:
        """To an endpoint of this node the handshake is done at once; nothing is left with the reactor."""
        backend = Backend()
        self.addCleanup(backend.close)
        self.atOnce(lambda: backend.endpoint)
        self.assertEqual((self.reactor.writers, self.reactor.getDelayedCalls()), (set(), []))

    def test_eager(self) -> None:
        """The handshake's last word goes with the first bytes, and the endpoint hears of both at once."""
        listeners = []

        def listen() -> Endpoint:
            listeners.append(openListener("IPv4", 0))
            self.addCleanup(listeners[-1].close)
            return Endpoint("127.0.0.1", listeners[-1].getsockname()[1])

        dial = self.atOnce(listen, True)
        self.assertRaises(BlockingIOError, listeners[-1].accept)
        dial.socket.send(b"question")
        arrived(listeners[-1])
        accepted, _ = listeners[-1].accept()
        self.addCleanup(accepted.close)
        self.assertEqual(accepted.recv(100), b"question")

    def test_timeouts(self) -> None:
        """Attempts expire each at their own time, one timer serves all, and none is left."""
        before = descriptors()
        self.dialer.dial(self.hole, 1.0, self)
        self.dialer.dial(self.hole, 0.25, self)
        self.reactor.advance(0.2)
        self.dialer.dial(self.hole, 0.25, self)
        self.assertEqual(len(self.reactor.getDelayedCalls()), 1)
        self.reactor.advance(0.04)
        self.assertEqual(self.failed, [])
        self.reactor.advance(0.01)
        self.assertEqual(self.failed, [errno.ETIMEDOUT])
        self.reactor.advance(0.2)
        self.assertEqual(len(self.failed), 2)
        self.reactor.advance(0.6)
        self.assertEqual(len(self.failed), 3)
        self.assertEqual((self.reactor.writers, self.reactor.getDelayedCalls()), (set(), []))
        self.assertEqual(descriptors(), before)

    def test_badOwner(self) -> None:
        """Who cannot bear to be told that time is over costs nobody else the word."""

        class Bad:
            def dialFailed(self, number: int) -> None:
                raise ZeroDivisionError

        for owner in (Bad(), self):
            unconnected = socket.socket()
            self.addCleanup(unconnected.close)
            self.dialer.deadlines.add(Dial(self.dialer, unconnected, owner, 0.25), 0.25)  # type: ignore[arg-type]
        self.reactor.advance(1)
        self.assertEqual(self.failed, [errno.ETIMEDOUT])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_lateReactor(self) -> None:
        """A handshake that was over in time counts, though the reactor looks only when the time is over."""
        outer, inner = tcpPair()
        self.addCleanup(outer.close)
        self.addCleanup(inner.close)
        dial = Dial(self.dialer, inner, self, 0.25)
        self.dialer.deadlines.add(dial, 0.25)
        self.reactor.advance(3)
        self.assertEqual((self.connected, self.failed, self.reactor.getDelayedCalls()), ([inner], [], []))

    def test_cancel(self) -> None:
        """A cancelled attempt is silent, closes its socket, and leaves no timer; twice is harmless."""
        before = descriptors()
        dial = self.dialer.dial(self.hole, 1.0, self)
        dial.cancel()
        dial.cancel()
        dial.event(OUTPUT)
        self.assertEqual((self.reactor.writers, self.reactor.getDelayedCalls()), (set(), []))
        self.assertEqual((self.connected, self.failed, descriptors()), ([], [], before))

    def test_strayEvent(self) -> None:
        """An event that was meant for an earlier socket of the same number decides nothing."""
        dial = self.dialer.dial(self.hole, 1.0, self)
        self.addCleanup(dial.cancel)
        dial.event(OUTPUT)
        dial.event(OUTPUT | LAST)
        self.assertEqual((self.connected, self.failed), ([], []))
        self.assertEqual(len(self.reactor.readers), 1)

    def test_connectsToItself(self) -> None:
        """A socket that TCP's simultaneous open has connected to itself counts as refused."""
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        self.assertEqual(established(sock), errno.ECONNREFUSED)

    def test_established(self) -> None:
        """A connected socket is."""
        outer, inner = tcpPair()
        self.addCleanup(outer.close)
        self.addCleanup(inner.close)
        self.assertEqual(established(inner), 0)

    def test_deadlinesOfOneLength(self) -> None:
        """Many attempts that end in time cost no timer each."""

        class Counting(_Reactor):
            made = 0

            def callLater(self, *args: Any, **kw: Any) -> Any:
                self.made += 1
                return super().callLater(*args, **kw)

        clock = Counting()
        deadlines = Deadlines(clock)
        waiting = [object() for _ in range(1000)]
        for it in waiting:
            deadlines.add(it, 0.25)  # type: ignore[arg-type]
        for it in waiting:
            deadlines.remove(it, 0.25)  # type: ignore[arg-type]
        self.assertEqual((clock.made, clock.getDelayedCalls()), (1, []))
