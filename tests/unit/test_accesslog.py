"""The access log: what a line says, and what happens when it cannot be written."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.builders import portName
from tests.shared.proxiers import ProxierParts
from tests.unit.test_tcp import deadEndpoint
from twisted_kproxy.assembly import Carriers
from twisted_kproxy.config import Config
from twisted_kproxy.core.values import Endpoint, Outcome, PoolName
from twisted_kproxy.userspace import accesslog
from twisted_kproxy.userspace.accesslog import AccessLog, originalDestination
from twisted_kproxy.userspace.dial import Dialer
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.ports import Budget
from twisted_kproxy.userspace.tcp import TcpProxier

POOL = PoolName(portName(), "cluster")


class _Threads(Clock):
    """A reactor whose threads are no threads."""

    def getThreadPool(self) -> Any:
        return self

    def callInThreadWithCallback(self, onResult: Any, work: Any, *args: Any) -> None:
        try:
            result = work(*args)
        except Exception as error:
            from twisted.python.failure import Failure

            onResult(False, Failure(error))
        else:
            onResult(True, result)

    def callFromThread(self, work: Any, *args: Any) -> None:
        work(*args)


class AccessLogTests(SynchronousTestCase):
    """The file."""

    def setUp(self) -> None:
        self.reactor = _Threads()
        self.path = self.mktemp()
        self.log_ = AccessLog(self.reactor, self.path, lambda: 1_800_000_000.123)

    def note(self, **kw: Any) -> None:
        values = {"tries": 1, "connect": 0.0015, "total": 2.5, "outcome": Outcome("done", 5, 7), **kw}
        endpoint = values.pop("endpoint", Endpoint("10.244.0.5", 8080))
        self.log_.ended(POOL, "192.0.2.7:51234", "10.96.0.10:80", endpoint, **values)

    def written(self) -> list[str]:
        with open(self.path) as file:
            return file.read().splitlines()

    def test_line(self) -> None:
        """A line has the time, and everything about the connection, by name."""
        self.note()
        self.note(endpoint=None, connect=None, tries=4, outcome=Outcome("refused", 0, 0))
        self.reactor.advance(accesslog.PERIOD)
        self.assertEqual(
            self.written(),
            [
                "2027-01-15T08:00:00.123Z service=shop/web:http client=192.0.2.7:51234 frontend=10.96.0.10:80 "
                "endpoint=10.244.0.5:8080 tries=1 connect=1.500ms total=2500.000ms sent=5 received=7 outcome=done",
                "2027-01-15T08:00:00.123Z service=shop/web:http client=192.0.2.7:51234 frontend=10.96.0.10:80 "
                "endpoint=- tries=4 connect=- total=2500.000ms sent=0 received=0 outcome=refused",
            ],
        )
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_moved(self) -> None:
        """A file that is moved away gets no more lines; a new one does."""
        self.note()
        self.reactor.advance(accesslog.PERIOD)
        os.rename(self.path, self.path + ".1")
        self.note()
        self.reactor.advance(accesslog.PERIOD)
        self.assertEqual(len(self.written()), 1)

    def test_cannotBeWritten(self) -> None:
        """A log that cannot be written is told of once, loses its lines, and goes on when it can be."""
        os.mkdir(self.path)
        for _ in range(3):
            self.note()
            self.reactor.advance(accesslog.PERIOD)
        self.assertEqual(self.log_.dropped, 3)
        os.rmdir(self.path)
        self.note()
        self.reactor.advance(accesslog.PERIOD)
        self.assertEqual(len(self.written()), 1)

    def test_open(self) -> None:
        """A log that cannot be written is told of before there is a line for it, once; so is that it can be."""
        logged: list[str] = []

        def observer(event: Any) -> None:
            logged.append(formatEvent(event))

        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.path = self.log_._path = os.path.join(self.path, "access.log")
        self.log_.open()
        lost = "Its lines are lost until it can"
        error = f"[Errno 2] No such file or directory: '{self.path}'"
        told = f"The access log {self.path} cannot be written: {error}. {lost}"
        self.assertEqual(logged, [told])
        self.note()
        self.reactor.advance(accesslog.PERIOD)
        self.assertEqual((logged, self.log_.dropped), ([told], 1))
        os.mkdir(os.path.dirname(self.path))
        self.note()
        self.reactor.advance(accesslog.PERIOD)
        self.assertEqual(logged[1:], [f"The access log {self.path} is written again"])
        self.assertEqual(len(self.written()), 1)

    def test_openGood(self) -> None:
        """One that can be written is there from the start, and keeps what it has."""
        self.log_.open()
        self.note()
        self.reactor.advance(accesslog.PERIOD)
        again = AccessLog(self.reactor, self.path)
        again.open()
        self.assertEqual(len(self.written()), 1)
        for it in (self.log_, again):
            self.successResultOf(it.close())

    def test_bounded(self) -> None:
        """More lines than may wait are dropped and counted."""
        self.patch(accesslog, "MOST", 3)
        for _ in range(5):
            self.note()
        self.reactor.advance(accesslog.PERIOD)
        self.assertEqual((len(self.written()), self.log_.dropped), (3, 2))

    def test_close(self) -> None:
        """What waits is written when it is closed."""
        self.note()
        self.successResultOf(self.log_.close())
        self.assertEqual(len(self.written()), 1)
        self.assertEqual(self.reactor.getDelayedCalls(), [])


class StartTests(TestCase):
    """What comes before the first connection."""

    timeout = 20

    async def test_toldAtStart(self) -> None:
        """As soon as there is what serves clients, an access log that cannot be written is told of."""
        told: Deferred[str] = Deferred()
        path = os.path.join(self.mktemp(), "access.log")

        def observer(event: Any) -> None:
            if event.get("path") == path and not told.called:
                told.callback(formatEvent(event))

        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        carriers = Carriers(reactor, Config(path="", engine="python", accessLog=path))
        self.addCleanup(lambda: Deferred.fromCoroutine(carriers.stop()))
        self.assertIn(f"The access log {path} cannot be written: ", await told)


class SessionTests(ProxierParts, TestCase):
    """What connections write."""

    timeout = 20
    reactor: Any = reactor
    protocol = "TCP"

    def makeProxier(self, pool: PoolName, balancer: Any, observer: Any) -> TcpProxier:
        poller = Poller(reactor)
        self.path = self.mktemp()
        self.accessLog = AccessLog(reactor, self.path)
        return TcpProxier(
            reactor, pool, balancer, observer,
            relay=PairRelay(reactor, poller), dialer=Dialer(reactor, poller), budget=Budget(reactor),
            accessLog=self.accessLog,
        )

    async def test_lines(self) -> None:
        """Each connection writes one line when it has ended: one that was served, and one that was not."""
        backend = self.backend()
        proxier = self.proxier(deadEndpoint(), backend.endpoint)
        proxier.listen()
        client = self.client(proxier)
        number = client.getsockname()[1]
        await self.ask(client)
        client.close()
        proxier.stopListening()
        await proxier.drained()
        await self.accessLog.close()
        with open(self.path) as file:
            (line,) = file.read().splitlines()
        self.assertTrue(
            re.search(
                rf" client=127\.0\.0\.1:{number} frontend=127\.0\.0\.1:{proxier.port} endpoint={backend.endpoint} "
                r"tries=2 connect=\d+\.\d+ms total=\d+\.\d+ms sent=5 received=5 outcome=done$",
                line,
            ),
            line,
        )

    def test_frontendWithoutRule(self) -> None:
        """Where no rule has led a connection here, its frontend is where it came in."""
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            accepted, _ = server.accept()
            with accepted:
                self.assertEqual(originalDestination(accepted), f"127.0.0.1:{server.getsockname()[1]}")
