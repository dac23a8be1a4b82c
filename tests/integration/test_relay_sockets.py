"""The userspace dataplane for TCP as a whole, on loopback: volume, numbers, and what a service's end does."""

from __future__ import annotations

import gc
import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from tests.builders import portName, serviceMap, servicePort
from tests.shared.proxiers import Backend, RecordingObserver, ScriptedBalancer
from tests.shared.relays import PATIENCE, descriptors, inThread, memory, readAll
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import Endpoint, FrontendKey, PoolName, ServiceMap, ServicePort
from twisted_kproxy.interfaces import IRulePlane
from twisted_kproxy.userspace.dataplane import UserspaceDataplane
from twisted_kproxy.userspace.dial import Dialer
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.ports import Budget
from twisted_kproxy.userspace.tcp import TcpProxier


@implementer(IRulePlane)
class NoRules:
    """Clients of these tests dial the sockets themselves."""

    def __init__(self) -> None:
        self.map = ServiceMap()

    def start(self) -> Deferred[None]:
        return succeed(None)

    def onUpdate(self, update: Update) -> Deferred[None]:
        self.map = update.current
        return succeed(None)

    def stop(self, drainSeconds: float) -> Deferred[None]:
        return succeed(None)

    def status(self) -> Mapping[str, Any]:
        return {}

    def unserved(self) -> Mapping[str, str]:
        return {}

    def ruleInForce(self, key: FrontendKey) -> None:
        return None


class Work:
    """
    How much the reactor's thread computed at most between two turns, in seconds: what it holds everybody up by on an
    idle machine. Time that other threads and programs take from it does not count.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._seen = time.thread_time()
        self._call = reactor.callLater(0, self._look)  # type: ignore[attr-defined]

    def _look(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._seen)
        self._seen = now
        self._call = reactor.callLater(0.001, self._look)  # type: ignore[attr-defined]

    def stop(self) -> float:
        self._call.cancel()
        return self.longest


def pause(seconds: float) -> Deferred[None]:
    return deferLater(reactor, seconds)  # type: ignore[arg-type]


class UserspaceTests(TestCase):
    """Real sockets under real load, in small amounts."""

    timeout = 60

    def setUp(self) -> None:
        self.rules = NoRules()
        self.balancer = ScriptedBalancer()
        self.observer = RecordingObserver()
        self.budget = Budget(reactor)
        poller = Poller(reactor)
        relay, dialer = PairRelay(reactor, poller), Dialer(reactor, poller)

        def makeTcp(reactor: Any, pool: PoolName, balancer: Any, observer: Any) -> TcpProxier:
            return TcpProxier(reactor, pool, balancer, observer, relay=relay, dialer=dialer, budget=self.budget)

        self.dataplane = UserspaceDataplane(
            reactor,
            self.balancer,
            self.rules,
            makeTcp=makeTcp,
            makeUdp=makeTcp,
            addressOf=lambda family: "127.0.0.1" if family == "IPv4" else "::1",
            observer=self.observer,
        )
        self.current = ServiceMap()

    def tearDown(self) -> Deferred[None]:
        return self.dataplane.stop(0)

    def update(self, *ports: ServicePort) -> Deferred[None]:
        new = serviceMap(*ports)
        update = Update(self.current, new)
        self.current = new
        return self.dataplane.onUpdate(update)

    def backend(self, serve: Callable[[socket.socket], None] | None = None) -> Backend:
        backend = Backend(serve=serve) if serve is not None else Backend()
        self.balancer.turns.append(backend.endpoint)
        self.addCleanup(inThread, reactor, backend.close)
        return backend

    async def serve(self, backend: Backend) -> Endpoint:
        """One service with that backend. :return: its socket."""
        await self.update(servicePort(cluster=[backend.endpoint]))
        (socket_,) = self.rules.map[portName()].cluster
        return socket_

    def client(self, target: Endpoint) -> socket.socket:
        sock = socket.create_connection((target.address, target.port), PATIENCE)
        self.addCleanup(sock.close)
        return sock

    async def test_volume(self) -> None:
        """50 MB each way at the same time arrive as they went."""
        size, block = 50_000_000, random.Random(5).randbytes(1 << 20)

        def pump(sock: socket.socket) -> str:
            sent = hashlib.sha256()
            left = size
            while left:
                part = block[: min(left, len(block))]
                sock.sendall(part)
                sent.update(part)
                left -= len(part)
            sock.shutdown(socket.SHUT_WR)
            return sent.hexdigest()

        def sink(sock: socket.socket) -> str:
            got = hashlib.sha256()
            while data := sock.recv(1 << 18):
                got.update(data)
            return got.hexdigest()

        arrived: Deferred[str] = Deferred()

        def both(sock: socket.socket) -> None:
            sock.settimeout(30)
            sender = threading.Thread(target=pump, args=(sock,))
            sender.start()
            digest = sink(sock)
            sender.join()
            reactor.callFromThread(arrived.callback, digest)  # type: ignore[attr-defined]

        target = await self.serve(self.backend(both))
        client = self.client(target)
        client.settimeout(30)
        sent, got = await gatherResults([inThread(reactor, pump, client), inThread(reactor, sink, client)])
        await self.observer.until(lambda: bool(self.observer.closings))
        self.assertEqual(got, sent)
        self.assertEqual(await arrived, sent)
        outcome = self.observer.closings[0][2]
        self.assertEqual((outcome.reason, outcome.sent, outcome.received), ("done", size, size))

    async def test_shortConnections(self) -> None:
        """2,000 short connections leave descriptors and memory where they were, without help of the collector."""
        target = await self.serve(self.backend())
        done = 0

        def many(count: int) -> int:
            good = 0
            for _ in range(count):
                with socket.create_connection((target.address, target.port), PATIENCE) as sock:
                    sock.sendall(b"ping")
                    sock.shutdown(socket.SHUT_WR)
                    good += readAll(sock) == b"ping"
            return good

        async def run(count: int) -> None:
            nonlocal done
            done += count
            self.assertEqual(await inThread(reactor, many, count), count)
            await self.observer.until(lambda: len(self.observer.closings) == done)
            await pause(0.05)

        def alive() -> int:
            kinds = ("_Half", "_Pair", "Session", "Dial")
            return sum(type(it).__name__ in kinds for it in gc.get_objects())

        await run(300)
        gc.collect()
        gc.disable()
        before = descriptors(), memory(), alive()
        self.addCleanup(gc.enable)
        await run(2000)
        self.assertLessEqual(descriptors(), before[0])
        self.assertEqual(alive(), before[2])
        # The observer's lists are the test's own: about 2,000 times half a kilobyte.
        self.assertLess(memory() - before[1], 4 << 20)
        self.assertEqual(self.balancer.active, {})
        self.assertEqual((self.budget.used, self.budget.held), (0, 1))

    async def test_manyServices(self) -> None:
        """1,500 sockets open and close while the reactor goes on."""
        before = descriptors()
        backend = self.backend()
        work = Work()
        await self.update(*(servicePort(portName(f"s{n}"), cluster=[backend.endpoint]) for n in range(1500)))
        self.assertEqual(self.budget.held, 1500)
        ports = {it.cluster[0].port for it in self.rules.map.values()}
        self.assertEqual(len(ports), 1500)
        await self.update()
        longest = work.stop()
        self.assertLess(longest, 0.05)
        self.assertLessEqual(descriptors(), before + 4)

    async def test_endOfABusyService(self) -> None:
        """
        A service with many open connections is deleted: its socket closes at once, its connections go on; when they
        are cut at last, the reactor is not held up.
        """
        backend = self.backend()
        target = await self.serve(backend)
        count = 1500
        clients: list[socket.socket] = []

        def connect() -> None:
            for _ in range(count):
                sock = socket.create_connection((target.address, target.port), PATIENCE)
                clients.append(sock)
                sock.sendall(b"x")

        await inThread(reactor, connect)
        self.addCleanup(lambda: [it.close() for it in clients])
        await self.observer.until(lambda: len(self.observer.openings) == count)
        work = Work()
        await self.update()
        self.assertRaises(OSError, socket.create_connection, (target.address, target.port), 1)

        def talk() -> bytes:
            clients[7].sendall(b"y")
            clients[7].recv(1)
            return clients[7].recv(1)

        self.assertEqual(await inThread(reactor, talk), b"y")
        (draining,) = self.dataplane.status()["draining"]
        self.assertEqual(draining["active"], count)
        await self.dataplane.stop(0.05)
        self.assertLess(work.stop(), 0.1)
        self.assertEqual((len(self.observer.closings), self.balancer.active, self.budget.used), (count, {}, 0))
        self.assertEqual({it[2].reason for it in self.observer.closings}, {"aborted"})

    async def test_endpointsMove(self) -> None:
        """When a service's endpoints change, the socket stays, new clients go to the new one, old ones stay."""
        first = self.backend()
        target = await self.serve(first)
        old = self.client(target)
        old.sendall(b"1")
        self.assertEqual(await inThread(reactor, old.recv, 1), b"1")
        second = self.backend()
        self.balancer.turns[:] = [second.endpoint]
        self.assertEqual(await self.serve(second), target)
        new = self.client(target)
        for sock, text in ((old, b"2"), (new, b"3")):
            sock.sendall(text)
            self.assertEqual(await inThread(reactor, sock.recv, 1), text)
        self.assertEqual((first.accepted, second.accepted), (1, 1))
