"""The engine of Twisted protocols: the suite of every engine, and who sees its bytes."""

from __future__ import annotations

import os
import socket
from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from tests.shared.relays import BulkSuite, RelaySuite, ending, inThread, readAll, relayed, tcpPair
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
