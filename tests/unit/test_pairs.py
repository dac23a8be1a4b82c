"""The engine of raw pairs: the suite of every engine, in every kind of reactor; its pipes; its state."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.internet.test.reactormixins import ReactorBuilder
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.shared.relays import (
    BulkSuite,
    RelaySuite,
    arrived,
    descriptors,
    ending,
    readExactly,
    relayed,
    reset,
    stuffed,
    tcpPair,
)
from tests.shared.relayscripts import ScriptSuite
from twisted_kproxy.core.values import Outcome
from twisted_kproxy.reactor import DirectReactor
from twisted_kproxy.userspace.engines.pairs import BLOCK, PairRelay
from twisted_kproxy.userspace.engines.poller import ERROR, INPUT, LAST, OUTPUT, Poller
from twisted_kproxy.userspace.engines.splice import CHUNK, MOST, Pipes, findSplice


class PairRelayTests(RelaySuite, BulkSuite, ScriptSuite, TestCase):
    """The engine in the reactor that the tests run under."""

    timeout = 60
    reactor = reactor
    pooled = 2 * MOST

    def makeRelay(self, reactor: Any) -> PairRelay:
        relay = PairRelay(reactor)
        self.addCleanup(relay.stop)
        return relay

    def pipesInUse(self, relay: Any) -> int:
        return int(relay.pipes.made - relay.pipes.idle)


class CopyingTests(RelaySuite, BulkSuite, ScriptSuite, TestCase):
    """The same where there is no splice(2)."""

    timeout = 60
    reactor = reactor

    def makeRelay(self, reactor: Any) -> PairRelay:
        return PairRelay(reactor, splice=None)

    def pipesInUse(self, relay: Any) -> int:
        return int(relay.pipes.made)


class ReactorTests(ReactorBuilder):
    """The engine in each kind of reactor that watches descriptors."""

    reactor: Any
    run_ = RelaySuite.run_
    connect = RelaySuite.connect
    equal = RelaySuite.equal
    pause = RelaySuite.pause
    pooled = 2 * MOST
    echoes = (20, 150_000)
    transfers = (4, 8 << 20)
    scripts = 40

    def makeRelay(self, reactor: Any) -> PairRelay:
        relay = PairRelay(reactor)
        self.addCleanup(relay.stop)
        return relay

    def pipesInUse(self, relay: Any) -> int:
        return int(relay.pipes.made - relay.pipes.idle)

    def perform(self, scenario: Any) -> None:
        self.reactor = self.buildReactor()
        failures: list[Failure] = []

        def begin() -> None:
            done: Deferred[Any] = ensureDeferred(scenario(self))
            done.addErrback(failures.append)
            done.addCallback(lambda _: self.reactor.stop())

        self.reactor.callWhenRunning(begin)
        self.runReactor(self.reactor, timeout=30)
        for failure in failures:
            failure.raiseException()

    def test_halfClose(self) -> None:
        """Requests of all sizes are answered after their end."""
        self.perform(RelaySuite.test_requestHalfCloseReply)

    def test_echoes(self) -> None:
        """Many connections at once, to the byte."""
        self.perform(RelaySuite.test_parallelEchoes)

    def test_backendReset(self) -> None:
        """A reset stays a reset."""
        self.perform(RelaySuite.test_backendReset)

    def test_clientReset(self) -> None:
        """The other way round."""
        self.perform(RelaySuite.test_clientReset)

    def test_backPressure(self) -> None:
        """A backend that never reads holds up its client."""
        self.perform(RelaySuite.test_backendNeverReads)

    def test_manyEvents(self) -> None:
        """More events at a time than are taken at a time."""
        self.perform(RelaySuite.test_moreEventsThanOneBatch)

    def test_scripts(self) -> None:
        """Whatever both ends do."""
        self.perform(ScriptSuite.test_randomScripts)

    def test_bulk(self) -> None:
        """The end rides on the last bytes of a bulk transfer."""
        self.perform(BulkSuite.test_endRidesOnData)


class DirectReactorTests(ReactorTests):
    """The reactor of this package."""

    reactorFactory = DirectReactor

    @classmethod
    def makeTestCaseClasses(cls) -> dict[str, Any]:
        cls._reactors = ["twisted_kproxy.reactor.DirectReactor"]
        return super().makeTestCaseClasses()


globals().update(DirectReactorTests.makeTestCaseClasses())
globals().update(
    (name, case)
    for name, case in ReactorTests.makeTestCaseClasses().items()
    if name.rpartition("_")[2].removesuffix("ReactorTests") in ("EPoll", "Poll", "Select", "Asyncio")
)
del ReactorTests, DirectReactorTests


class _Turning(Clock):
    """A reactor of which the test says when it looks at its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        assert reader.fileno() >= 0
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def turn(self) -> None:
        self.advance(0)
        for reader in list(self.readers):
            reader.doRead()


def segments(sock: socket.socket) -> int:
    """How many segments it has received: ``tcpi_segs_in`` of linux/tcp.h."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 140)[0])


class StateTests(SynchronousTestCase):
    """What the engine asks of the reactor, and what it does when time passes."""

    def setUp(self) -> None:
        self.reactor = _Turning()
        self.poller = Poller(self.reactor)
        self.relay = PairRelay(self.reactor, self.poller, halfClosedSeconds=3600)
        self.addCleanup(self.relay.stop)
        self.client, self.clientSide = tcpPair()
        self.backend, self.backendSide = tcpPair()
        for end in (self.client, self.backend, self.clientSide, self.backendSide):
            self.addCleanup(end.close)
        self.done = relayed(self.relay, self.clientSide, self.backendSide)
        self.handlers = {
            it: self.poller._handlers[it.fileno()].__self__  # type: ignore[attr-defined]
            for it in (self.clientSide, self.backendSide)
        }

    def stuff(self) -> None:
        """Let the client send until nothing is taken any more."""
        stuffed(self.client, self.reactor.turn, b"b" * BLOCK)

    def test_oneReader(self) -> None:
        """However many connections: the reactor has one reader, and none when the last has ended."""
        self.assertEqual(len(self.reactor.readers), 1)
        self.done.cut()
        self.assertEqual(self.reactor.readers, set())
        self.assertEqual(self.successResultOf(self.done).reason, "aborted")
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_eager(self) -> None:
        """What is read goes out at once."""
        self.client.sendall(b"ping")
        arrived(self.clientSide)
        self.reactor.turn()
        self.assertEqual(readExactly(self.backend, 4), b"ping")

    def test_cannotBeWatched(self) -> None:
        """A connection whose sockets cannot be watched is cut, and told so."""
        self.done.cut()
        ends = [tcpPair(), tcpPair()]
        self.patch(self.poller, "watch", lambda *_: 1 / 0)
        done = relayed(self.relay, ends[0][1], ends[1][1])
        self.assertEqual(self.successResultOf(done).reason, "aborted")
        self.assertEqual((self.relay.status()["active"], self.reactor.getDelayedCalls()), (0, []))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        for outer, inner in ends:
            self.assertEqual(inner.fileno(), -1)
            outer.close()

    def test_quiet(self) -> None:
        """A connection that nothing is said on costs no event; that a side takes bytes is told once it took none."""
        self.assertEqual(self.poller._epoll.poll(0), [])
        self.stuff()
        self.assertTrue(self.handlers[self.backendSide].full)
        self.backend.setblocking(False)
        told: dict[int, int] = {}
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError):
                while self.backend.recv(BLOCK):
                    pass
            told |= dict(self.poller._epoll.poll(0.01))
            if self.backendSide.fileno() in told:
                break
        self.assertTrue(told[self.backendSide.fileno()] & OUTPUT)

    def test_endRidesOnLastBytes(self) -> None:
        """The last bytes and the end go out as one packet."""
        self.client.sendall(b"question")
        self.client.shutdown(socket.SHUT_WR)
        arrived(self.clientSide, select.POLLRDHUP)
        before = segments(self.backend)
        self.reactor.turn()
        self.assertEqual(self.backend.recv(100), b"question")
        self.assertEqual(self.backend.recv(100), b"")
        self.assertEqual(segments(self.backend) - before, 1)

    def test_answerOfTheDeaf(self) -> None:
        """A backend that takes nothing more has answered and ended: the answer is out before the client is reset."""
        self.handlers[self.backendSide].error = errno.EPIPE
        self.backend.sendall(b"too large")
        self.backend.shutdown(socket.SHUT_WR)
        arrived(self.backendSide, select.POLLRDHUP)
        self.reactor.turn()
        self.assertEqual(self.client.recv(100), b"too large")
        self.assertEqual(self.successResultOf(self.done).reason, "backend-reset")

    def test_resetInsteadOfTheEnd(self) -> None:
        """The end that an event has told of turns out to be a reset: what came before is out before it."""
        half = self.handlers[self.backendSide]
        said = [b"too large"]

        class Resetting:
            fileno = half.socket.fileno
            close = half.socket.close
            setsockopt = half.socket.setsockopt

            def recv_into(self, buffer: Any) -> int:
                if not said:
                    raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                data = said.pop()
                buffer[: len(data)] = data
                return len(data)

        half.socket = Resetting()
        half.event(INPUT & ~ERROR)
        self.assertEqual(self.client.recv(100), b"too large")
        self.assertEqual(self.successResultOf(self.done).reason, "backend-reset")

    def test_noEndAfterAll(self) -> None:
        """An event that tells of an end that is none keeps no bytes back."""
        self.client.sendall(b"ping")
        arrived(self.clientSide)
        self.handlers[self.clientSide].event(INPUT & ~ERROR)
        self.assertEqual(self.backend.recv(100), b"ping")

    def test_stalled(self) -> None:
        """When the backend takes no more, a bounded number of bytes is held."""
        self.stuff()
        half = self.handlers[self.clientSide]
        held = len(half.peer.pending) + (half.pipe.held if half.pipe is not None else 0)
        self.assertGreater(held, 0)
        self.assertLessEqual(held, CHUNK)

    def test_clientDiesWhileStalled(self) -> None:
        """A client that resets while the backend takes nothing: the backend is reset within two sweeps."""
        self.stuff()
        reset(self.client)
        arrived(self.clientSide, 0)
        self.reactor.turn()
        self.reactor.pump([15, 15])
        self.assertEqual(self.successResultOf(self.done).reason, "client-reset")
        self.assertEqual(ending(self.backend), "reset")
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.assertEqual(self.relay.pipes.made, self.relay.pipes.idle)

    def test_keepalive(self) -> None:
        """A connection that lasts gets keepalive towards its backend: after 60 s, 4 times 15 s apart."""
        self.assertEqual(self.backendSide.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 0)
        self.reactor.pump([15.0])
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        found = [self.backendSide.getsockopt(socket.IPPROTO_TCP, it) for it in options]
        self.assertEqual(found, [60, 15, 4])
        self.assertEqual(self.backendSide.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)

    def test_stalledSurvivesSweep(self) -> None:
        """A stalled connection whose both ends live stays."""
        self.stuff()
        self.reactor.pump([15.0] * 10)
        self.assertNoResult(self.done)

    def test_halfClosedForTooLong(self) -> None:
        """
        One side has ended, and nothing has moved for an hour: both are cut. An idle connection that is whole stays.
        """
        self.reactor.pump([15.0] * 300)
        self.assertNoResult(self.done)
        self.client.shutdown(socket.SHUT_WR)
        arrived(self.clientSide, select.POLLRDHUP)
        self.reactor.turn()
        # Bytes that still move, even after most of an hour, keep it.
        self.reactor.pump([15.0] * 235)
        self.backend.sendall(b"12345678")
        arrived(self.backendSide)
        self.reactor.turn()
        self.reactor.pump([15.0] * 239)
        self.assertNoResult(self.done)
        self.reactor.pump([15.0] * 3)
        self.assertEqual(self.successResultOf(self.done), Outcome("backend-timeout", 0, 8))
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_strayEvent(self) -> None:
        """Events that were meant for an earlier socket of the same number do no harm, now or later."""
        half = self.handlers[self.clientSide]
        half.event(INPUT | LAST | ERROR)
        self.reactor.pump([15.0] * 10)
        self.assertNoResult(self.done)
        self.client.sendall(b"ping")
        arrived(self.clientSide)
        self.reactor.turn()
        self.assertEqual(readExactly(self.backend, 4), b"ping")

    def test_bug(self) -> None:
        """Whatever raises in an event cuts that connection, and is not swallowed."""
        half = self.handlers[self.clientSide]

        class Broken:
            close = half.socket.close
            setsockopt = half.socket.setsockopt
            fileno = half.socket.fileno

        half.socket = Broken()
        self.assertRaises(AttributeError, half.event, INPUT)
        self.assertEqual(self.successResultOf(self.done).reason, "aborted")
        self.assertEqual(self.reactor.readers, set())

    def test_vanished(self) -> None:
        """A side that keepalive found dead counts as timed out, not as reset."""
        half = self.handlers[self.clientSide]

        class Dead:
            def recv_into(self, buffer: Any) -> int:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

            close = half.socket.close
            setsockopt = half.socket.setsockopt
            fileno = half.socket.fileno

        half.socket = Dead()
        half.event(INPUT)
        self.assertEqual(self.successResultOf(self.done).reason, "client-timeout")

    def test_budgetPerEvent(self) -> None:
        """One event moves a bounded number of bytes; the rest waits for the reactor's next turn."""
        half = self.handlers[self.clientSide]
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

        self.relay.splicing = False
        half.socket, half.peer.socket = Endless(), Sink()
        half.event(INPUT)
        self.assertLessEqual(sum(reads), 8 * BLOCK)
        (again,) = [it for it in self.reactor.getDelayedCalls() if it.getTime() == self.reactor.seconds()]
        before = len(reads)
        goOn = again.func
        again.cancel()
        goOn()
        self.assertGreater(len(reads), before)
        self.done.cut()

    def test_handedOver(self) -> None:
        """What came while somebody else watched the sockets, an end as well, is not lost."""
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()
        for end in (client, backend, clientSide, backendSide):
            self.addCleanup(end.close)
        self.poller.watch(clientSide.fileno(), lambda events: None)
        self.poller.watch(backendSide.fileno(), lambda events: None)
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        backend.sendall(b"answer")
        backend.shutdown(socket.SHUT_WR)
        for end in (clientSide, backendSide):
            arrived(end, select.POLLRDHUP)
        self.reactor.turn()
        done = relayed(self.relay, clientSide, backendSide, b"a ")
        self.assertEqual(self.successResultOf(done), Outcome("done", 10, 6))
        self.assertEqual((backend.recv(100), client.recv(100)), (b"a question", b"answer"))


class PipesTests(SynchronousTestCase):
    """The pool of pipes."""

    def test_bounded(self) -> None:
        """There are only so many; what comes back is used again; all are closed in the end."""
        before = descriptors()
        pipes = Pipes(2)
        one, two = pipes.take(), pipes.take()
        assert one is not None and two is not None
        self.assertIsNone(pipes.take())
        pipes.give(one)
        self.assertIs(pipes.take(), one)
        pipes.give(one)
        pipes.give(two)
        self.assertEqual((pipes.made, pipes.idle), (2, 2))
        pipes.close()
        self.assertEqual((pipes.made, descriptors()), (0, before))

    def test_notEmpty(self) -> None:
        """A pipe with bytes in it never goes to the next one."""
        before = descriptors()
        pipes = Pipes(1)
        pipe = pipes.take()
        assert pipe is not None
        pipe.held = 1
        pipes.give(pipe)
        self.assertEqual((pipes.made, pipes.idle, descriptors()), (0, 0, before))
        self.assertIsNot(pipes.take(), pipe)
        pipes.close()

    def test_byTheLibrary(self) -> None:
        """Where Python's os module has no splice, that of the C library does the same."""
        self.patch(os, "splice", None)
        splice = findSplice()
        assert splice is not None
        outer, inner = tcpPair()
        pipe = Pipes().take()
        assert pipe is not None
        self.addCleanup(pipe.close)
        self.addCleanup(outer.close)
        self.addCleanup(inner.close)
        self.assertRaises(BlockingIOError, splice, inner.fileno(), pipe.writeEnd, 100)
        outer.sendall(b"0123456789")
        self.assertEqual(splice(inner.fileno(), pipe.writeEnd, 100), 10)
        self.assertEqual(splice(pipe.readEnd, inner.fileno(), 10), 10)
        self.assertEqual(outer.recv(100), b"0123456789")
        outer.close()
        self.assertEqual(splice(inner.fileno(), pipe.writeEnd, 100), 0)
