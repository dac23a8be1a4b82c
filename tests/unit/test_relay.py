"""The relay over sockets in the reactor."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.test.reactormixins import ReactorBuilder
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.shared.relays import RelaySuite, ending, readExactly, reset, tcpPair
from twisted_kproxy.core.values import Outcome
from twisted_kproxy.userspace.relay import BLOCK, SocketRelay


class SocketRelayTests(RelaySuite, TestCase):
    """The engine in the reactor that the tests run under."""

    timeout = 30
    reactor = reactor

    def makeRelay(self, reactor: Any) -> SocketRelay:
        return SocketRelay(reactor)


class SocketRelayReactorTests(ReactorBuilder):
    """The engine in each kind of reactor that watches sockets."""

    reactor: Any
    run_ = RelaySuite.run_
    connect = RelaySuite.connect
    equal = RelaySuite.equal

    def makeRelay(self, reactor: Any) -> SocketRelay:
        return SocketRelay(reactor)

    def perform(self, scenario: Any) -> None:
        self.reactor = self.buildReactor()
        failures: list[Failure] = []

        def begin() -> None:
            done: Deferred[Any] = ensureDeferred(scenario(self))
            done.addErrback(failures.append)
            done.addCallback(lambda _: self.reactor.stop())

        self.reactor.callWhenRunning(begin)
        self.runReactor(self.reactor, timeout=20)
        for failure in failures:
            failure.raiseException()

    def test_halfClose(self) -> None:
        """Requests of all sizes are answered after their end."""
        self.perform(RelaySuite.test_requestHalfCloseReply)

    def test_backPressure(self) -> None:
        """A backend that reads nothing holds the client up, and loses nothing."""
        self.perform(RelaySuite.test_backendNeverReads)

    def test_backendReset(self) -> None:
        """A reset stays a reset."""
        self.perform(RelaySuite.test_backendReset)

    def test_clientReset(self) -> None:
        """A reset stays a reset, the other way."""
        self.perform(RelaySuite.test_clientReset)

    def test_closedBefore(self) -> None:
        """Both sides are gone already."""
        self.perform(RelaySuite.test_closedBefore)

    def test_segments(self) -> None:
        """Random segments through small buffers."""
        self.perform(RelaySuite.test_randomSegments)


globals().update(
    (name, case)
    for name, case in SocketRelayReactorTests.makeTestCaseClasses().items()
    if name.rpartition("_")[2].removesuffix("ReactorTests") in ("EPoll", "Poll", "Select", "Asyncio")
)


class _Watcher(Clock):
    """A reactor of which the test decides what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        assert reader.fileno() >= 0
        self.readers.add(reader)

    def addWriter(self, writer: Any) -> None:
        assert writer.fileno() >= 0
        self.writers.add(writer)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def turn(self) -> None:
        """Everything that is watched is called, ready or not."""
        for reader in list(self.readers):
            if reader in self.readers:
                reader.doRead()
        for writer in list(self.writers):
            if writer in self.writers:
                writer.doWrite()


class StateTests(SynchronousTestCase):
    """What the relay asks of the reactor, and what it does when time passes."""

    def setUp(self) -> None:
        self.reactor = _Watcher()
        self.relay = SocketRelay(self.reactor, halfClosedSeconds=3600)
        self.client, clientSide = tcpPair()
        self.backend, backendSide = tcpPair()
        self.clientFd, self.backendFd = clientSide.fileno(), backendSide.fileno()
        for end in (self.client, self.backend, clientSide, backendSide):
            self.addCleanup(end.close)
        self.done = self.relay.relay(clientSide, backendSide, b"")

    def fds(self, watched: set[Any]) -> set[int]:
        return {it.fileno() for it in watched}

    def stuff(self) -> None:
        """Let the client send until nothing is taken any more."""
        self.client.setblocking(False)
        idle = 0
        while idle < 20:
            try:
                self.client.send(b"b" * BLOCK)
                idle = 0
            except BlockingIOError:
                idle += 1
            self.reactor.turn()

    def test_idle(self) -> None:
        """An idle connection is read on both sides and written on none."""
        self.assertEqual(self.fds(self.reactor.readers), {self.clientFd, self.backendFd})
        self.assertEqual(self.reactor.writers, set())

    def test_eager(self) -> None:
        """What is read goes out at once; no writability is waited for."""
        self.client.sendall(b"ping")
        self.reactor.turn()
        self.assertEqual(self.reactor.writers, set())
        self.backend.settimeout(5)
        self.assertEqual(readExactly(self.backend, 4), b"ping")

    def test_stalled(self) -> None:
        """When the backend takes no more, the client is not read, and at most one block is held."""
        self.stuff()
        self.assertEqual(self.fds(self.reactor.readers), {self.backendFd})
        (writer,) = self.reactor.writers
        self.assertLessEqual(len(writer.pending), BLOCK)
        self.assertGreater(len(writer.pending), 0)

    def test_clientDiesWhileStalled(self) -> None:
        """A client that resets while it is not read is found out by the sweep, and the backend is reset."""
        self.stuff()
        reset(self.client)
        self.assertNoResult(self.done)
        self.reactor.advance(15)
        self.assertEqual(self.successResultOf(self.done).reason, "client-reset")
        self.backend.settimeout(5)
        self.assertEqual(ending(self.backend), "reset")
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_stalledSurvivesSweep(self) -> None:
        """A stalled connection whose both ends live stays."""
        self.stuff()
        self.reactor.advance(15)
        self.reactor.advance(15)
        self.assertNoResult(self.done)

    def test_halfClosedForTooLong(self) -> None:
        """
        One side has ended, and nothing has moved for an hour: both are cut. An idle connection that is whole stays.
        """
        self.reactor.pump([15.0] * 300)
        self.assertNoResult(self.done)
        self.client.shutdown(socket.SHUT_WR)
        self.reactor.turn()
        # Bytes that still move, even after most of an hour, keep it.
        self.reactor.pump([15.0] * 235)
        self.backend.sendall(b"12345678")
        self.reactor.turn()
        self.reactor.pump([15.0] * 239)
        self.assertNoResult(self.done)
        self.reactor.pump([15.0] * 3)
        self.assertEqual(self.successResultOf(self.done), Outcome("backend-timeout", 0, 8))
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_strayHangUp(self) -> None:
        """A hang-up that was meant for an earlier socket of the same number does no harm."""
        half = next(it for it in self.reactor.readers if it.fileno() == self.clientFd)
        self.reactor.removeReader(half)
        half.connectionLost(Failure(ConnectionLost()))
        self.assertNoResult(self.done)
        self.assertIn(half, self.reactor.readers)

    def test_hangUp(self) -> None:
        """A hang-up that is real ends the connection as what the socket says it was."""
        reset(self.backend)
        half = next(it for it in self.reactor.readers if it.fileno() == self.backendFd)
        self.reactor.removeReader(half)
        half.connectionLost(Failure(ConnectionLost()))
        self.assertEqual(self.successResultOf(self.done).reason, "backend-reset")

    def test_bug(self) -> None:
        """Whatever raises in an event cuts that connection."""
        half = next(iter(self.reactor.readers))
        half.connectionLost(Failure(ZeroDivisionError()))
        self.assertEqual(self.successResultOf(self.done).reason, "aborted")
        self.assertEqual((self.reactor.readers, self.reactor.writers), (set(), set()))

    def test_vanished(self) -> None:
        """A side that keepalive found dead counts as timed out, not as reset."""
        half = next(it for it in self.reactor.readers if it.fileno() == self.clientFd)

        class Dead:
            def recv_into(self, buffer: Any) -> int:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

            close = half.socket.close
            setsockopt = half.socket.setsockopt
            fileno = half.socket.fileno

        half.socket = Dead()
        half.doRead()
        self.assertEqual(self.successResultOf(self.done).reason, "client-timeout")

    def test_budgetPerEvent(self) -> None:
        """One event moves a bounded number of bytes, so that a bulk flow does not hold up the others."""
        self.backend.close()
        half = next(it for it in self.reactor.readers if it.fileno() == self.clientFd)
        reads = []

        class Endless:
            fileno = half.socket.fileno
            close = half.socket.close
            setsockopt = half.socket.setsockopt

            def recv_into(self, buffer: Any) -> int:
                reads.append(len(buffer))
                return len(buffer)

        class Sink(Endless):
            def send(self, data: Any) -> int:
                return len(data)

        half.socket, half.peer.socket = Endless(), Sink()
        half.doRead()
        self.assertLessEqual(sum(reads), 8 * 65536)
        self.assertIn(half, self.reactor.readers)
