"""The engine of Twisted protocols: the suite of every engine, and who sees its bytes."""

from __future__ import annotations

import gc
import os
import select
import socket
import weakref
from typing import Any

from twisted.internet import reactor
from twisted.internet.posixbase import PosixReactorBase
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.shared.relays import (
    BulkSuite,
    RelaySuite,
    arrived,
    ending,
    inThread,
    readAll,
    readExactly,
    relayed,
    reset,
    stuffed,
    tcpPair,
)
from tests.shared.relayscripts import ScriptSuite
from twisted_kproxy.core.values import Outcome
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.engines.protocol import Direction, ProtocolRelay, Tap


class ProtocolRelayTests(RelaySuite, BulkSuite, ScriptSuite, TestCase):
    """The engine in the reactor that the tests run under."""

    timeout = 60
    reactor = reactor

    def makeRelay(self, reactor: Any) -> ProtocolRelay:
        relay = ProtocolRelay(reactor, Poller(reactor))
        self.addCleanup(relay.stop)
        return relay

    def pipesInUse(self, relay: Any) -> int:
        return 0


class _Turning(Clock):
    """A reactor of which the test says when it looks at descriptors; what it does with them is as Twisted's."""

    _disconnectSelectable = PosixReactorBase._disconnectSelectable

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()
        for what in ("reader", "writer"):
            them = getattr(self, f"{what}s")
            setattr(self, f"add{what.capitalize()}", them.add)
            setattr(self, f"remove{what.capitalize()}", them.discard)

    def turn(self) -> None:
        self.advance(0)
        readers, writers, _ = select.select(self.readers, self.writers, [], 0)
        for it, doing in [(it, "doRead") for it in readers] + [(it, "doWrite") for it in writers]:
            if why := getattr(it, doing)():
                self._disconnectSelectable(it, why, doing == "doRead")  # type: ignore[no-untyped-call]


class TimeTests(SynchronousTestCase):
    """What the engine asks of the reactor, and what it does when time passes."""

    def setUp(self) -> None:
        self.reactor = _Turning()
        self.relay = ProtocolRelay(self.reactor, Poller(self.reactor))
        self.addCleanup(self.relay.stop)
        self.client, self.clientSide = tcpPair()
        self.backend, self.backendSide = tcpPair()
        for end in (self.client, self.backend, self.clientSide, self.backendSide):
            self.addCleanup(end.close)
        self.done = relayed(self.relay, self.clientSide, self.backendSide)

    def stuff(self) -> None:
        """Let the client send until nothing is taken any more."""
        stuffed(self.client, self.reactor.turn, b"b" * 65536)

    def test_eager(self) -> None:
        """What is read goes out in the same turn, and the reactor is not asked to tell when the backend can take it."""
        self.client.sendall(b"ping")
        arrived(self.clientSide)
        self.reactor.turn()
        self.assertEqual(self.reactor.writers, set())
        self.assertEqual(readExactly(self.backend, 4), b"ping")

    def test_stalled(self) -> None:
        """When the backend takes no more, the client is not read, and one block at the most waits."""
        self.stuff()
        (waiting,) = self.reactor.writers
        self.assertTrue(0 < waiting.queued <= 65536)
        self.assertEqual(self.reactor.readers, {waiting})
        self.reactor.pump([15.0] * 10)
        self.assertNoResult(self.done)

    def test_clientDiesWhileStalled(self) -> None:
        """A client that resets while the backend takes nothing: the backend is reset within two sweeps."""
        self.stuff()
        reset(self.client)
        arrived(self.clientSide, 0)
        self.reactor.turn()
        self.reactor.pump([15.0, 15.0])
        self.assertEqual(self.successResultOf(self.done).reason, "client-reset")
        self.assertEqual(ending(self.backend), "reset")
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.assertEqual(self.reactor.readers | self.reactor.writers, set())

    def test_diesAfterItsEnd(self) -> None:
        """So does a client that resets after it has ended, when no descriptor of it is watched any more."""
        self.client.shutdown(socket.SHUT_WR)
        arrived(self.clientSide, select.POLLRDHUP)
        self.reactor.turn()
        self.reactor.pump([15.0] * 10)
        self.assertNoResult(self.done)
        reset(self.client)
        arrived(self.clientSide, 0)
        self.reactor.pump([15.0, 15.0])
        self.assertEqual(self.successResultOf(self.done).reason, "client-reset")

    def test_keepalive(self) -> None:
        """A connection that lasts gets keepalive towards its backend."""
        self.assertEqual(self.backendSide.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 0)
        self.reactor.pump([15.0])
        self.assertEqual(self.backendSide.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)

    def test_halfClosedForTooLong(self) -> None:
        """One side has ended, and nothing has moved for an hour: both are cut. What moves, or is whole, stays."""
        self.reactor.pump([15.0] * 300)
        self.assertNoResult(self.done)
        self.client.shutdown(socket.SHUT_WR)
        arrived(self.clientSide, select.POLLRDHUP)
        self.reactor.turn()
        self.reactor.pump([15.0] * 235)
        self.backend.sendall(b"12345678")
        arrived(self.backendSide)
        self.reactor.turn()
        self.reactor.pump([15.0] * 239)
        self.assertNoResult(self.done)
        self.reactor.pump([15.0] * 3)
        self.assertEqual(self.successResultOf(self.done), Outcome("backend-timeout", 0, 8))
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_nothingStays(self) -> None:
        """What a connection was made of goes with it, without the collector."""
        (pair,) = self.relay._pairs
        gone = [weakref.ref(it) for it in (pair.client, pair.backend, pair.client.transport, pair.backend.transport)]
        del pair
        gc.disable()
        self.addCleanup(gc.enable)
        self.done.cut()
        self.assertEqual([it() for it in gone], [None] * 4)


class _Recorder(Tap):
    """Keeps what it sees; ``front`` names the client as a PROXY header would."""

    def __init__(self, client: socket.socket, backend: socket.socket) -> None:
        self.front = b"client %d\r\n" % client.getpeername()[1]
        self.seen: dict[Direction, bytes] = {"sent": b"", "received": b""}

    def observe(self, direction: Direction, data: bytes) -> None:
        self.seen[direction] += data


class TapTests(TestCase):
    """Who sees bytes on their way."""

    timeout = 30

    def begin(self, tap: Any, early: bytes = b"") -> Any:
        relay = ProtocolRelay(reactor, Poller(reactor), tap=tap)
        self.addCleanup(relay.stop)
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()
        self.addCleanup(client.close)
        self.addCleanup(backend.close)
        return client, backend, relayed(relay, clientSide, backendSide, early)

    async def test_seesAll(self) -> None:
        """
        Each byte is seen once, in order, early ones too; what is put in front comes first, and is not counted.
        """
        taps: list[_Recorder] = []

        def tap(*sockets: socket.socket) -> Tap:
            taps.append(_Recorder(*sockets))
            return taps[-1]

        client, backend, outcome = self.begin(tap, b"early ")
        request, answer = os.urandom(300_000), os.urandom(200_000)
        port = client.getsockname()[1]

        def ask() -> bytes:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            return readAll(client)

        def serve() -> bytes:
            got = readAll(backend)
            backend.sendall(answer)
            backend.close()
            return got

        asking = inThread(reactor, ask)
        self.assertTrue(await inThread(reactor, serve) == b"client %d\r\nearly " % port + request)
        self.assertTrue(await asking == answer)
        self.assertEqual(await outcome, Outcome("done", len(request) + 6, len(answer)))
        (it,) = taps
        self.assertTrue(it.seen["sent"] == b"early " + request)
        self.assertTrue(it.seen["received"] == answer)

    async def test_none(self) -> None:
        """A connection that nobody wants to see goes its way."""
        client, backend, outcome = self.begin(lambda *sockets: None)
        client.sendall(b"x")
        client.close()
        self.assertEqual(await inThread(reactor, readAll, backend), b"x")
        backend.close()
        self.assertEqual(await outcome, Outcome("done", 1, 0))

    async def test_mistake(self) -> None:
        """What raises cuts its connection, and is logged: with the first bytes, later, or before any."""

        class Mistaken(Tap):
            def observe(self, direction: Direction, data: bytes) -> None:
                raise ZeroDivisionError

        def none(*sockets: socket.socket) -> Tap:
            raise ZeroDivisionError

        for tap, early in ((lambda *sockets: Mistaken(), b""), (lambda *sockets: Mistaken(), b"x"), (none, b"")):
            client, backend, outcome = self.begin(tap, early)
            if not outcome.called:
                client.sendall(b"x")
            self.assertEqual(await outcome, Outcome("aborted", 0, 0))
            self.assertEqual(await inThread(reactor, ending, client), "reset")
            self.assertEqual(await inThread(reactor, ending, backend), "reset")
            self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
