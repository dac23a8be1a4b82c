"""
What every relay engine promises: one suite, mixed into a test case for each of them.

The ends of the connections are blocking sockets in threads of their own: whatever the engine does with its two
sockets in between, these see only TCP.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from twisted_kproxy.core.values import Outcome
from twisted_kproxy.interfaces import IRelay

#: Seconds after which a blocked end gives up: a hang is a failure, not a wait. sendall() has no more for all of it.
PATIENCE = 30.0


def inThread(reactor: Any, run: Callable[..., Any], *args: Any) -> Deferred[Any]:
    """What a blocking function returns, run in a thread of its own."""
    done: Deferred[Any] = Deferred()

    def body() -> None:
        try:
            result = run(*args)
        except BaseException:
            reactor.callFromThread(done.errback, Failure())
        else:
            reactor.callFromThread(done.callback, result)

    threading.Thread(target=body, daemon=True).start()
    return done


def tcpPair(buffers: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback: the first blocking with a time-out, the second non-blocking."""
    with socket.socket() as listener:
        if buffers:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        outer = socket.socket()
        if buffers:
            outer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
            outer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        outer.settimeout(PATIENCE)
        outer.connect(listener.getsockname())
        inner, _ = listener.accept()
    inner.setblocking(False)
    return outer, inner


class Relayed(Deferred[Outcome]):
    """Fires with the outcome of a relayed connection; ``cut()`` cuts it."""

    cut: Callable[[], None]


def relayed(relay: Any, client: socket.socket, backend: socket.socket, early: bytes = b"") -> Relayed:
    """Give two sockets to an engine."""
    done = Relayed()
    done.cut = relay.relay(client, backend, early, done.callback)
    return done


def arrived(sock: socket.socket, what: int = select.POLLIN) -> None:
    """
    Wait until bytes, the end (``POLLRDHUP``) or a reset (0: that is always told) have come to a socket. What goes over
    loopback is there at once only as long as no other processor, and no thread of the kernel, has to deliver it.
    """
    poll = select.poll()
    poll.register(sock, what)
    if not poll.poll(PATIENCE * 1000):
        raise AssertionError("nothing came")


def stuffed(sock: socket.socket, turn: Callable[[], object], block: bytes) -> None:
    """Send, with turns of the engine in between, until nothing is taken any more."""
    sock.setblocking(False)
    idle = 0
    while idle < 20:
        try:
            sock.send(block)
            idle = 0
        except BlockingIOError:
            idle += not select.select([], [sock], [], 0.01)[1]
        turn()


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def readAll(sock: socket.socket, size: int = 65536) -> bytes:
    """Everything until the other side ends."""
    parts = []
    while data := sock.recv(size):
        parts.append(data)
    return b"".join(parts)


def readExactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes."""
    parts = []
    while count:
        data = sock.recv(min(count, 65536))
        if not data:
            raise AssertionError(f"the connection ended {count} bytes early")
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def ending(sock: socket.socket) -> str:
    """How the other side ends, whatever it says before: ``end`` or ``reset``."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "end"


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def memory() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class RelaySuite:
    """
    Mix into a :class:`twisted.trial.unittest.TestCase` that sets ``reactor``.

    :cvar pooled: descriptors that the engine may keep for later use.
    :cvar echoes: how many connections echo how much at the same time.
    """

    reactor: Any
    pooled = 0
    echoes = (50, 150_000)

    def makeRelay(self, reactor: Any) -> Any:
        """The engine under test."""
        raise NotImplementedError

    # --- parts of scenarios

    def connect(self, relay: Any, early: bytes = b"", buffers: int = 0) -> tuple[Any, Any, Relayed]:
        """A relayed connection: the client, the backend, the outcome."""
        client, clientSide = tcpPair(buffers)
        backend, backendSide = tcpPair(buffers)
        for end in (client, backend):
            self.addCleanup(end.close)  # type: ignore[attr-defined]
        return client, backend, relayed(relay, clientSide, backendSide, early)

    def run_(self, *args: Any) -> Deferred[Any]:
        return inThread(self.reactor, *args)

    def pause(self, seconds: float) -> Deferred[None]:
        return deferLater(self.reactor, seconds)

    def equal(self, first: Any, second: Any) -> None:
        """Without the whole megabyte in the message."""
        if first != second:
            raise AssertionError(f"{first!r:.200} is not {second!r:.200}")

    # --- the suite

    def test_interface(self) -> None:
        """It is an IRelay, and says of itself what can be shown."""
        relay = self.makeRelay(self.reactor)
        verifyObject(IRelay, relay)
        status = json.loads(json.dumps(relay.status()))
        self.equal((status["active"], bool(status["engine"])), (0, True))

    async def test_noCircles(self) -> None:
        """Who is told of a connection's end, and has kept how to cut it, is then gone without the garbage collector."""
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()
        over: Deferred[Outcome] = Deferred()

        class Owner:
            def __init__(self, relay: Any) -> None:
                self.cut = relay.relay(clientSide, backendSide, b"early", self.ended)

            def ended(self, outcome: Outcome) -> None:
                over.callback(outcome)

        gc.disable()
        try:
            owner: Any = weakref.ref(Owner(self.makeRelay(self.reactor)))
            client.close()
            backend.close()
            await over
            await self.pause(0)
            self.equal(owner(), None)
        finally:
            gc.enable()

    async def test_stopTellsEverybody(self) -> None:
        """One who cannot bear to be told of the end costs nobody else the end, when all are cut at once."""
        relay = self.makeRelay(self.reactor)
        connections = [self.connect(relay) for _ in range(6)]
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()

        def raising(outcome: Outcome) -> None:
            raise ZeroDivisionError

        relay.relay(clientSide, backendSide, b"", raising)
        connections += [self.connect(relay) for _ in range(6)]
        await relay.stop()
        outcomes = await gatherResults([done for _, _, done in connections])
        self.equal({it.reason for it in outcomes}, {"aborted"})
        self.equal(relay.status()["active"], 0)
        self.equal(len(self.flushLoggedErrors(ZeroDivisionError)), 1)  # type: ignore[attr-defined]
        for it in (client, backend):
            it.close()

    async def test_acknowledgesAtOnce(self) -> None:
        """
        A backend that answers in two pieces waits until the first one is acknowledged. That a dialer has put off an
        acknowledgement until the early bytes go does not last.
        """
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()
        kept = backendSide.dup()
        for it in (client, backend, kept):
            self.addCleanup(it.close)  # type: ignore[attr-defined]
        backendSide.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        over = relayed(self.makeRelay(self.reactor), clientSide, backendSide, b"early")
        self.equal(await self.run_(backend.recv, 100), b"early")
        end = time.monotonic() + PATIENCE
        while not kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK):  # a worker may be about to say so
            if time.monotonic() > end:
                raise AssertionError("acknowledgements are put off")
            await self.pause(0.01)
        over.cut()
        await over

    async def test_parallelEchoes(self) -> None:
        """Random bytes come back as they went, on many connections at once, and are counted to the byte."""
        relay = self.makeRelay(self.reactor)
        count, size = self.echoes

        def echo(sock: socket.socket) -> None:
            while data := sock.recv(65536):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        def ask(sock: socket.socket, seed: int) -> bool:
            payload = random.Random(seed).randbytes(size)
            sender = threading.Thread(target=lambda: (sock.sendall(payload), sock.shutdown(socket.SHUT_WR)))
            sender.start()
            back = readAll(sock)
            sender.join()
            return back == payload

        waiting: list[Deferred[Any]] = []
        outcomes: list[Deferred[Outcome]] = []
        for seed in range(count):
            client, backend, outcome = self.connect(relay)
            waiting += [self.run_(ask, client, seed), self.run_(echo, backend)]
            outcomes.append(outcome)
        results = await gatherResults(waiting)
        self.equal(results[::2], [True] * count)
        self.equal(await gatherResults(outcomes), [Outcome("done", size, size)] * count)

    async def test_requestHalfCloseReply(self) -> None:
        """A request of any size, ended by a half-close, is answered after its end."""
        relay = self.makeRelay(self.reactor)
        for size in (0, 1, 100, 65536, 131072, 1 << 20):
            client, backend, outcome = self.connect(relay)

            def serve(backend: socket.socket = backend) -> int:
                got = readAll(backend)
                backend.sendall(hashlib.sha256(got).digest() * 1000)
                backend.close()
                return len(got)

            def ask(client: socket.socket = client, size: int = size) -> bool:
                payload = os.urandom(size)
                client.sendall(payload)
                client.shutdown(socket.SHUT_WR)
                return readAll(client) == hashlib.sha256(payload).digest() * 1000

            served, right = await gatherResults([self.run_(serve), self.run_(ask)])
            self.equal((size, served, right), (size, size, True))
            self.equal(await outcome, Outcome("done", size, 32000))

    async def test_backendHalfClose(self) -> None:
        """The backend ends its side first; what the client still has to say arrives."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)

        def serve() -> int:
            backend.sendall(b"greeting")
            backend.shutdown(socket.SHUT_WR)
            return len(readAll(backend))

        def ask() -> bytes:
            greeting = readAll(client)
            client.sendall(b"x" * 200_000)
            client.shutdown(socket.SHUT_WR)
            return greeting

        served, greeting = await gatherResults([self.run_(serve), self.run_(ask)])
        self.equal((served, greeting), (200_000, b"greeting"))
        self.equal(await outcome, Outcome("done", 200_000, 8))

    async def test_sendThenClose(self) -> None:
        """300 clients that send and close at once lose nothing: each backend gets every byte, then the end."""
        relay = self.makeRelay(self.reactor)
        rng = random.Random(7)
        for _ in range(5):
            batch = []
            for _ in range(60):
                client, backend, outcome = self.connect(relay)
                size = rng.choice((1, 10, 1000, 70_000))
                client.sendall(b"y" * size)
                client.close()
                batch.append((backend, size, outcome))

            def serve(backends: list[Any] = [it[0] for it in batch]) -> list[int]:  # noqa: B006
                counts = [len(readAll(backend)) for backend in backends]
                for backend in backends:
                    backend.close()
                return counts

            self.equal(await self.run_(serve), [size for _, size, _ in batch])
            for _, size, outcome in batch:
                self.equal(await outcome, Outcome("done", size, 0))

    async def test_moreEventsThanOneBatch(self) -> None:
        """
        Several hundred sockets have something to tell at the same moment, more than are taken from the kernel at a
        time: what is told only once is not lost, not in the first round and in no later one.
        """
        relay = self.makeRelay(self.reactor)
        opened = [self.connect(relay) for _ in range(150)]
        for number in range(3):
            # All of it before the engine (in this thread, at least) gets to look.
            for index, (client, backend, _) in enumerate(opened):
                client.sendall(b"c%d.%d" % (number, index))
                backend.sendall(b"b%d.%d" % (number, index))

            def hear(number: int = number) -> None:
                for index, (client, backend, _) in enumerate(opened):
                    up, down = b"c%d.%d" % (number, index), b"b%d.%d" % (number, index)
                    self.equal((readExactly(backend, len(up)), readExactly(client, len(down))), (up, down))

            await self.run_(hear)
        for client, backend, _ in opened:
            client.close()
            backend.close()
        sizes = [3 * len(b"c0.%d" % index) for index in range(150)]
        self.equal(await gatherResults([it[2] for it in opened]), [Outcome("done", size, size) for size in sizes])

    async def test_countersOfAScript(self) -> None:
        """The counters of the same exchange are the same with every engine: bytes handed on, early ones included."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay, b"early", 4096)

        def serve() -> None:
            readExactly(backend, 5 + 100_000)
            backend.sendall(b"s" * 70_000)
            backend.shutdown(socket.SHUT_WR)
            readAll(backend)

        def ask() -> None:
            client.sendall(b"c" * 100_000)
            readExactly(client, 70_000)
            client.sendall(b"c" * 11)
            client.shutdown(socket.SHUT_WR)

        await gatherResults([self.run_(serve), self.run_(ask)])
        self.equal(await outcome, Outcome("done", 100_016, 70_000))

    async def test_backendReset(self) -> None:
        """A reset of the backend reaches the client as a reset, never as an end."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        client.sendall(b"hello")
        self.equal(await self.run_(readExactly, backend, 5), b"hello")
        reset(backend)
        self.equal(await self.run_(ending, client), "reset")
        self.equal(await outcome, Outcome("backend-reset", 5, 0))

    async def test_clientReset(self) -> None:
        """A reset of the client reaches the backend as a reset."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        backend.sendall(b"hello")
        self.equal(await self.run_(readExactly, client, 5), b"hello")
        reset(client)
        self.equal(await self.run_(ending, backend), "reset")
        self.equal(await outcome, Outcome("client-reset", 0, 5))

    async def test_resetAfterHalfClose(self) -> None:
        """A backend that resets after the client's half-close: the client still sees a reset."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        self.equal(await self.run_(readAll, backend), b"hello")
        reset(backend)
        self.equal(await self.run_(ending, client), "reset")
        self.equal((await outcome).reason, "backend-reset")

    async def test_bothResetWhileStalled(self) -> None:
        """Neither side takes what the other says, and then both reset: that is the end, and told so."""
        relay = self.makeRelay(self.reactor)
        for number in range(6):
            client, backend, outcome = self.connect(relay, b"e" * 65536, 4096)
            first, second = (client, backend) if number % 2 else (backend, client)
            for end in (client, backend):
                end.setblocking(False)
            for _ in range(4):
                for end in (client, backend):
                    try:
                        end.send(b"x" * 65536)
                    except BlockingIOError:
                        pass
                if number >= 2:
                    await self.pause(0)
            reset(first)
            if number >= 4:
                await self.pause(0)
            reset(second)
            self.equal((await outcome).reason.endswith("-reset"), True)

    async def test_answerBeforeRequestEnds(self) -> None:
        """
        A backend that answers and closes without reading the rest of the request (which makes its kernel reset): the
        answer reaches the client.
        """
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)

        def serve() -> None:
            backend.recv(1000)
            backend.sendall(b"too large")
            backend.close()

        def ask() -> bytes:
            try:
                for _ in range(200):
                    client.sendall(b"z" * 10_000)
            except OSError:
                pass
            return client.recv(100)

        _, answer = await gatherResults([self.run_(serve), self.run_(ask)])
        self.equal(answer, b"too large")
        client.close()
        self.equal((await outcome).reason in ("backend-reset", "client-reset"), True)

    async def test_backendNeverReads(self) -> None:
        """Back-pressure: a client cannot push more than a bounded number of bytes at a backend that reads nothing."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        before = memory()
        block = b"b" * 65536

        def push() -> int:
            client.setblocking(False)
            total = 0
            while total < 128 << 20 and select.select([], [client], [], 0.4)[1]:
                try:
                    total += client.send(block)
                except BlockingIOError:
                    continue
            return total

        accepted = await self.run_(push)
        self.equal(accepted < 64 << 20, True)
        self.equal(memory() - before < 8 << 20, True)
        # It is only held up: once the backend reads, all of it arrives.
        client.settimeout(PATIENCE)
        client.shutdown(socket.SHUT_WR)
        self.equal(await self.run_(lambda: len(readAll(backend))), accepted)
        backend.close()
        self.equal(await outcome, Outcome("done", accepted, 0))

    async def test_earlyBytesFirst(self) -> None:
        """What was read of the client before comes first, and counts; also when it is more than fits at once."""
        relay = self.makeRelay(self.reactor)
        for early, buffers in ((b"early ", 0), (os.urandom(65536), 4096)):
            client, backend, outcome = self.connect(relay, early, buffers)
            client.sendall(b"late")
            client.shutdown(socket.SHUT_WR)
            self.equal(await self.run_(readAll, backend), early + b"late")
            backend.close()
            self.equal(await outcome, Outcome("done", len(early) + 4, 0))

    async def test_cutResetsBoth(self) -> None:
        """Cutting resets both sides; the outcome says so."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        client.sendall(b"abc")
        self.equal(await self.run_(readExactly, backend, 3), b"abc")
        outcome.cut()
        self.equal(await outcome, Outcome("aborted", 3, 0))
        self.equal(await self.run_(ending, client), "reset")
        self.equal(await self.run_(ending, backend), "reset")

    async def test_descriptorsReturn(self) -> None:
        """However connections end, no descriptor is left behind."""
        relay = self.makeRelay(self.reactor)
        # A reactor that has just started has its own to open.
        await self.pause(0)
        before = descriptors()
        endings: list[Callable[[socket.socket, socket.socket], None]] = [
            lambda client, backend: (client.close(), backend.close()),  # type: ignore[func-returns-value]
            lambda client, backend: (reset(client), backend.close()),  # type: ignore[func-returns-value]
            lambda client, backend: (client.close(), reset(backend)),  # type: ignore[func-returns-value]
        ]
        for number in range(45):
            client, backend, outcome = self.connect(relay, b"e" * (number % 2))
            client.sendall(b"1")
            endings[number % 3](client, backend)
            await outcome
        self.equal(descriptors() <= before + self.pooled, True)

    async def test_stopReturnsDescriptors(self) -> None:
        """Stopped in the middle of everything, an engine lets go of all descriptors, pipes and idle ones as well."""
        relay = self.makeRelay(self.reactor)
        await self.pause(0)
        before = descriptors()
        outcomes = []
        for number in range(6):
            client, backend, outcome = self.connect(relay)
            outcomes.append(outcome)
            backend.setblocking(False)
            if number % 2:
                try:
                    while True:
                        backend.send(b"x" * 65536)
                        await self.pause(0)
                except BlockingIOError:
                    pass
            elif number:
                client.shutdown(socket.SHUT_WR)
        await relay.stop()
        for outcome in outcomes:
            self.equal((await outcome).reason, "aborted")
        ends = 2 * len(outcomes)
        self.equal(descriptors() - ends <= before, True)

    async def test_closedBefore(self) -> None:
        """Both sides were gone before the relay began: it ends all the same."""
        relay = self.makeRelay(self.reactor)
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()
        reset(client)
        reset(backend)
        self.equal((await relayed(relay, clientSide, backendSide, b"early")).reason.endswith("-reset"), True)

    async def test_randomSegments(self) -> None:
        """
        Against a perfect pipe: random segments both ways, through small buffers, slow and fast readers, random order
        of ends; what comes out is what went in.
        """
        relay = self.makeRelay(self.reactor)

        def write(sock: socket.socket, seed: int, payload: bytes, wait: threading.Event) -> None:
            rng = random.Random(seed)
            sent = 0
            while sent < len(payload):
                size = rng.choice((1, 7, 536, 1460, 9000, 70_000))
                sock.sendall(payload[sent : sent + size])
                sent += size
                if rng.random() < 0.05:
                    wait.wait(rng.random() / 100)
            sock.shutdown(socket.SHUT_WR)

        def read(sock: socket.socket, seed: int, wait: threading.Event) -> bytes:
            rng = random.Random(seed)
            parts = []
            while data := sock.recv(rng.choice((1, 100, 4096, 65536))):
                parts.append(data)
                if rng.random() < 0.02:
                    wait.wait(rng.random() / 100)
            return b"".join(parts)

        never = threading.Event()
        for seed in range(6):
            rng = random.Random(seed)
            client, backend, outcome = self.connect(relay, buffers=rng.choice((0, 4096, 16384)))
            up, down = rng.randbytes(rng.randrange(150_000)), rng.randbytes(rng.randrange(150_000))
            _, _, gotUp, gotDown = await gatherResults(
                [
                    self.run_(write, client, seed, up, never),
                    self.run_(write, backend, seed + 100, down, never),
                    self.run_(read, backend, seed + 200, never),
                    self.run_(read, client, seed + 300, never),
                ]
            )
            self.equal((gotUp == up, gotDown == down), (True, True))
            self.equal(await outcome, Outcome("done", len(up), len(down)))


class BulkSuite:
    """
    Much at a time: where engines go another way than for a few bytes. Mix in beside :class:`RelaySuite`.

    :cvar transfers: how many transfers, of at least how many bytes, the end of which rides on data.
    """

    reactor: Any
    transfers = (12, 8 << 20)

    def makeRelay(self, reactor: Any) -> Any:
        """The engine under test."""
        raise NotImplementedError

    def pipesInUse(self, relay: Any) -> int:
        """How many pipes connections hold at the moment."""
        raise NotImplementedError

    connect = RelaySuite.connect
    run_ = RelaySuite.run_
    pause = RelaySuite.pause
    equal = RelaySuite.equal

    async def test_endRidesOnData(self) -> None:
        """The end of a bulk transfer comes with its last bytes, for which there is no second event: it is not lost."""
        relay = self.makeRelay(self.reactor)
        count, least = self.transfers
        for number in range(count):
            size = least + number * 4099
            client, backend, outcome = self.connect(relay)

            def serve(backend: socket.socket = backend, size: int = size) -> None:
                readExactly(backend, 3)
                block = bytes(range(256)) * 4096
                left = size
                while left:
                    left -= backend.send(memoryview(block)[: min(left, len(block))])
                backend.close()

            def ask(client: socket.socket = client) -> int:
                client.sendall(b"get")
                total = 0
                while data := client.recv(1 << 20):
                    total += len(data)
                client.close()
                return total

            _, total = await gatherResults([self.run_(serve), self.run_(ask)])
            self.equal(total, size)
            self.equal(await outcome, Outcome("done", 3, size))
        self.equal(self.pipesInUse(relay), 0)

    async def test_bothWays(self) -> None:
        """Much in both directions at once, through slow readers, arrives as it was."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        size = 24 << 20
        up, down = random.Random(1).randbytes(size), random.Random(2).randbytes(size)

        def write(sock: socket.socket, payload: bytes) -> None:
            sock.sendall(payload)
            sock.shutdown(socket.SHUT_WR)

        def read(sock: socket.socket, seed: int) -> bytes:
            rng = random.Random(seed)
            digest = hashlib.sha256()
            while data := sock.recv(rng.choice((1000, 65536, 1 << 20))):
                digest.update(data)
            return digest.digest()

        _, _, gotUp, gotDown = await gatherResults(
            [
                self.run_(write, client, up), self.run_(write, backend, down),
                self.run_(read, backend, 3), self.run_(read, client, 4),
            ]
        )
        self.equal((gotUp == hashlib.sha256(up).digest(), gotDown == hashlib.sha256(down).digest()), (True, True))
        self.equal(await outcome, Outcome("done", size, size))
        self.equal(self.pipesInUse(relay), 0)

    async def test_smallAfterBulk(self) -> None:
        """A connection that has carried much is as quick as before with a few bytes."""
        relay = self.makeRelay(self.reactor)
        client, backend, outcome = self.connect(relay)
        size = 6 << 20

        def serve() -> None:
            for _ in range(3):
                readExactly(backend, 4)
                backend.sendall(b"d" * size)
                for _ in range(20):
                    backend.sendall(readExactly(backend, 5))
            readAll(backend)
            backend.close()

        def ask() -> bool:
            good = True
            for _ in range(3):
                client.sendall(b"much")
                good &= readExactly(client, size) == b"d" * size
                for _ in range(20):
                    client.sendall(b"small")
                    good &= readExactly(client, 5) == b"small"
            client.shutdown(socket.SHUT_WR)
            return good and readAll(client) == b""

        _, good = await gatherResults([self.run_(serve), self.run_(ask)])
        self.equal(good, True)
        self.equal(await outcome, Outcome("done", 3 * 104, 3 * (size + 100)))
        self.equal(self.pipesInUse(relay), 0)

    async def test_endsInTheMiddle(self) -> None:
        """Whoever goes while bytes are on their way, in a pipe as well: nothing of it goes to anybody else."""
        relay = self.makeRelay(self.reactor)
        await self.pause(0)
        before = descriptors()

        def push(sock: socket.socket) -> None:
            try:
                for _ in range(2000):
                    sock.sendall(b"x" * 65536)
            except OSError:
                pass

        for number in range(6):
            client, backend, outcome = self.connect(relay)
            pushing = self.run_(push, backend)
            await self.run_(readExactly, client, 3 << 20)
            if number % 3 == 0:
                reset(client)
            elif number % 3 == 1:
                outcome.cut()
            else:
                client.close()
            self.equal((await outcome).reason in ("client-reset", "aborted"), True)
            await pushing
            client.close()
            backend.close()
            self.equal(self.pipesInUse(relay), 0)
        self.equal(descriptors() <= before + getattr(self, "pooled", 0), True)

    async def test_pipeBytesGoToNobodyElse(self) -> None:
        """
        A connection is cut while a pipe holds bytes that its client has not taken: the next ones, which may get that
        pipe, get their own bytes alone.
        """
        relay = self.makeRelay(self.reactor)
        for number in range(4):
            client, backend, outcome = self.connect(relay)
            backend.setblocking(False)
            idle = 0
            while idle < 20:
                try:
                    backend.send(b"o" * 65536)
                    idle = 0
                except BlockingIOError:
                    idle += 1
                await self.pause(0)
            if number % 2:
                outcome.cut()
            else:
                reset(client)
                backend.close()
            await outcome
            other, server, outcome = self.connect(relay)

            def serve(server: socket.socket = server) -> None:
                server.sendall(b"n" * (4 << 20))
                server.close()

            def hear(other: socket.socket = other) -> bytes:
                return readAll(other)

            _, heard = await gatherResults([self.run_(serve), self.run_(hear)])
            other.close()
            self.equal((len(heard), set(heard)), (4 << 20, {ord("n")}))
            self.equal(await outcome, Outcome("done", 0, 4 << 20))
            self.equal(self.pipesInUse(relay), 0)
