"""Relay workers: the suite of every engine, and what happens when one ends."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from tests.shared.relays import BulkSuite, Relayed, RelaySuite, ending, inThread, readExactly, relayed, tcpPair
from tests.shared.relayscripts import ScriptSuite
from twisted_kproxy.core.values import Outcome
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.engines.workers import WorkersRelay


class _NoEngine:
    """The daemon's own engine, which these tests do not want to see at work."""

    name = "none"

    def relay(self, *args: Any) -> Any:
        raise AssertionError("no worker took it")

    def status(self) -> dict[str, Any]:
        return {"engine": self.name, "active": 0}

    def stop(self) -> Deferred[None]:
        return succeed(None)


class WorkersRelaySuiteTests(RelaySuite, BulkSuite, ScriptSuite, TestCase):
    """Two workers carry everything."""

    timeout = 60
    reactor = reactor

    async def setUp(self) -> None:  # type: ignore[override]
        self.relay = WorkersRelay(reactor, Poller(reactor), _NoEngine(), 2, "python")  # type: ignore[arg-type]
        self.addCleanup(self.relay.stop)
        await self.relay.started

    def makeRelay(self, reactor: Any) -> WorkersRelay:
        return self.relay

    def pipesInUse(self, relay: Any) -> int:
        return 0


class WorkersTests(TestCase):
    """Workers come and go."""

    timeout = 60

    def setUp(self) -> None:
        self.poller = Poller(reactor)
        self.own = PairRelay(reactor, self.poller)
        self.relay = WorkersRelay(reactor, self.poller, self.own, 2, "python")
        self.addCleanup(self.relay.stop)

    def open(self) -> tuple[socket.socket, socket.socket, Relayed]:
        client, clientSide = tcpPair()
        backend, backendSide = tcpPair()
        self.addCleanup(client.close)
        self.addCleanup(backend.close)
        return client, backend, relayed(self.relay, clientSide, backendSide)

    async def test_beforeTheyAreReady(self) -> None:
        """Until there is a worker the daemon carries the bytes itself."""
        client, backend, outcome = self.open()
        client.sendall(b"early")
        self.assertEqual(await inThread(reactor, readExactly, backend, 5), b"early")
        self.assertEqual([it["active"] for it in self.relay.workers], [0, 0])
        client.close()
        backend.close()
        self.assertEqual(await outcome, Outcome("done", 5, 0))

    async def test_spread(self) -> None:
        """Each worker gets as many as the other."""
        await self.relay.started
        opened = [self.open() for _ in range(10)]
        self.assertEqual([it["active"] for it in self.relay.workers], [5, 5])
        status = self.relay.status()
        self.assertEqual((status["engine"], status["active"], status["daemon"]["active"]), ("python", 10, 0))
        self.assertEqual([it["active"] for it in status["workers"]], [5, 5])
        for client, backend, _ in opened:
            client.close()
            backend.close()
        await gatherResults([outcome for _, _, outcome in opened])
        self.assertEqual([it["active"] for it in self.relay.workers], [0, 0])

    async def test_killed(self) -> None:
        """
        A worker that is killed takes its connections with it, and those alone; it is replaced, and the new one serves.
        """
        await self.relay.started
        opened = [self.open() for _ in range(4)]
        for client, backend, _ in opened:
            client.sendall(b"1")
            await inThread(reactor, readExactly, backend, 1)
        killed = self.relay.workers[0]["pid"]
        os.kill(killed, signal.SIGKILL)
        ended = [it for it in opened if opened.index(it) % 2 == 0]
        self.assertEqual({(await outcome).reason for _, _, outcome in ended}, {"aborted"})
        for client, _, _ in ended:
            self.assertIn(await inThread(reactor, ending, client), ("end", "reset"))
        for client, backend, outcome in opened:
            if (client, backend, outcome) not in ended:
                client.sendall(b"2")
                self.assertEqual(await inThread(reactor, readExactly, backend, 1), b"2")
                self.assertFalse(outcome.called)
                outcome.cut()
                await outcome
        while not all(it["ready"] for it in self.relay.workers) or len(self.relay.workers) < 2:
            await deferLater(reactor, 0.02)
        self.assertNotEqual(self.relay.workers[0]["pid"], killed)
        client, backend, outcome = self.open()
        client.sendall(b"again")
        self.assertEqual(await inThread(reactor, readExactly, backend, 5), b"again")
        outcome.cut()
        await outcome

    async def test_signals(self) -> None:
        """What stops the daemon does not stop its workers: they go on until it lets go of them."""
        await self.relay.started
        client, backend, outcome = self.open()
        for it in self.relay.workers:
            os.kill(it["pid"], signal.SIGTERM)
            os.kill(it["pid"], signal.SIGINT)
        client.sendall(b"still")
        self.assertEqual(await inThread(reactor, readExactly, backend, 5), b"still")
        await self.relay.stop()
        self.assertEqual((await outcome).reason, "aborted")
        self.assertEqual(self.relay.workers, [])
