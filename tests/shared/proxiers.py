"""
What every proxier promises: one suite, mixed into a test case for TCP and for UDP. Beside it what proxiers are tested
with: a balancer that is told what to answer, an observer that writes everything down, and echoing backends.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.task import deferLater
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.shared.relays import PATIENCE, inThread
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import Endpoint, Family, Outcome, PoolName, ServicePortName
from twisted_kproxy.interfaces import ILoadBalancer, IProxier, ITrafficObserver, NoEndpoint

LOOPBACK: Mapping[Family, str] = {"IPv4": "127.0.0.1", "IPv6": "::1"}
_FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}


@implementer(ILoadBalancer)
class ScriptedBalancer:
    """
    Gives the endpoints in turn, whatever is to be avoided; counts what is opened and closed.

    :ivar asked: ``(client, avoid)`` of every question.
    :ivar active: open connections by pool and endpoint; what comes back to 0 is gone.
    """

    def __init__(self, *endpoints: Endpoint) -> None:
        self.turns = list(endpoints)
        self.asked: list[tuple[str, tuple[Endpoint, ...]]] = []
        self.active: dict[tuple[PoolName, Endpoint], int] = {}
        self._next = 0

    def onUpdate(self, update: Update) -> Deferred[None]:
        return succeed(None)

    def nextEndpoint(self, pool: PoolName, client: str, avoid: Collection[Endpoint] = ()) -> Endpoint:
        self.asked.append((client, tuple(avoid)))
        if not self.turns:
            raise NoEndpoint(f"{pool} has no endpoint")
        self._next += 1
        return self.turns[(self._next - 1) % len(self.turns)]

    def opened(self, pool: PoolName, endpoint: Endpoint) -> None:
        self._count(pool, endpoint, 1)

    def closed(self, pool: PoolName, endpoint: Endpoint) -> None:
        self._count(pool, endpoint, -1)

    def endpoints(self, pool: PoolName) -> tuple[Endpoint, ...]:
        return tuple(self.turns)

    def status(self) -> Mapping[str, Any]:
        return {}

    def _count(self, pool: PoolName, endpoint: Endpoint, step: int) -> None:
        count = self.active.pop((pool, endpoint), 0) + step
        if count:
            self.active[pool, endpoint] = count


@implementer(ITrafficObserver)
class RecordingObserver:
    """Writes down what it is told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.openings: list[tuple[PoolName, Endpoint, float]] = []
        self.misses: list[tuple[Endpoint, str]] = []
        self.failures: list[str] = []
        self.closings: list[tuple[PoolName, Endpoint, Outcome]] = []
        self._waiting: list[tuple[Callable[[], bool], Deferred[None]]] = []

    def opened(self, pool: PoolName, endpoint: Endpoint, seconds: float) -> None:
        self.openings.append((pool, endpoint, seconds))
        self._tell()

    def missed(self, pool: PoolName, endpoint: Endpoint, reason: str) -> None:
        self.misses.append((endpoint, reason))
        self._tell()

    def failed(self, pool: PoolName, reason: str) -> None:
        self.failures.append(reason)
        self._tell()

    def closed(self, pool: PoolName, endpoint: Endpoint, outcome: Outcome) -> None:
        self.closings.append((pool, endpoint, outcome))
        self._tell()

    def until(self, condition: Callable[[], bool]) -> Deferred[None]:
        """Fires as soon as something has been told after which the condition holds."""
        if condition():
            return succeed(None)
        done: Deferred[None] = Deferred()
        self._waiting.append((condition, done))
        return done

    def _tell(self) -> None:
        for item in list(self._waiting):
            if item[0]():
                self._waiting.remove(item)
                item[1].callback(None)


def echoTcp(sock: socket.socket) -> None:
    """Send back what comes, then the end."""
    with sock:
        while data := sock.recv(65536):
            sock.sendall(data)


class Backend:
    """
    A server in a thread of its own.

    :param serve: called with each accepted connection, in a thread per connection. UDP echoes.
    :ivar accepted: connections so far.
    """

    def __init__(
        self, family: Family = "IPv4", protocol: str = "TCP", serve: Callable[[socket.socket], None] = echoTcp
    ) -> None:
        self.accepted = 0
        self._serve = serve
        kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
        self._socket = socket.socket(_FAMILIES[family], kind)
        self._socket.bind((LOOPBACK[family], 0))
        address, port = self._socket.getsockname()[:2]
        self.endpoint = Endpoint(address, port, isLocal=True)
        if kind == socket.SOCK_STREAM:
            self._socket.listen(4096)
        self._thread = threading.Thread(target=self._echo if kind == socket.SOCK_DGRAM else self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept() or recvfrom().
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._thread.join(PATIENCE)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.accepted += 1
            connection.settimeout(PATIENCE)
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._serve(connection)
            except OSError:
                pass

    def _echo(self) -> None:
        while True:
            try:
                datagram, client = self._socket.recvfrom(65536)
            except OSError:
                return
            if not client:
                return
            self.accepted += 1
            self._socket.sendto(datagram, client)


def deadEndpoint(family: Family = "IPv4", protocol: str = "TCP") -> Endpoint:
    """Where nobody listens."""
    kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
    with socket.socket(_FAMILIES[family], kind) as sock:
        sock.bind((LOOPBACK[family], 0))
        return Endpoint(*sock.getsockname()[:2])


class ProxierParts:
    """Parts of scenarios, for a :class:`twisted.trial.unittest.TestCase` that sets ``reactor`` and ``protocol``."""

    reactor: Any
    protocol: Literal["TCP", "UDP"]

    def makeProxier(self, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> Any:
        """The proxier under test, not yet listening."""
        raise NotImplementedError

    def pool(self, family: Family = "IPv4", port: str = "web") -> PoolName:
        return PoolName(ServicePortName("shop", "cart", port, self.protocol, family), "cluster")

    def proxier(self, *endpoints: Endpoint, family: Family = "IPv4") -> Any:
        self.balancer = ScriptedBalancer(*endpoints)
        self.observer = RecordingObserver()
        proxier = self.makeProxier(self.pool(family), self.balancer, self.observer)

        def cleanUp() -> Deferred[None]:
            proxier.stopListening()
            proxier.abort()
            done: Deferred[None] = proxier.drained()
            return done

        self.addCleanup(cleanUp)  # type: ignore[attr-defined]
        return proxier

    def backend(self, family: Family = "IPv4", **kw: Any) -> Backend:
        backend = Backend(family, self.protocol, **kw)
        self.addCleanup(lambda: inThread(self.reactor, backend.close))  # type: ignore[attr-defined]
        return backend

    def client(self, proxier: Any) -> socket.socket:
        """A blocking socket, connected."""
        family = proxier.pool.port.family
        sock = socket.socket(_FAMILIES[family], socket.SOCK_DGRAM if self.protocol == "UDP" else socket.SOCK_STREAM)
        self.addCleanup(sock.close)  # type: ignore[attr-defined]
        sock.settimeout(PATIENCE)
        # The kernel completes the handshake; the proxier accepts when the reactor comes to it.
        sock.connect((LOOPBACK[family], proxier.port))
        return sock

    def run_(self, *args: Any) -> Deferred[Any]:
        return inThread(self.reactor, *args)

    def ask(self, client: socket.socket, text: bytes = b"hello") -> Deferred[bytes]:
        """Send, and fire with what comes back at once."""

        def talk() -> bytes:
            client.sendall(text)
            return client.recv(65536)

        return self.run_(talk)

    def pause(self, seconds: float) -> Deferred[None]:
        return deferLater(self.reactor, seconds)


class ProxierSuite(ProxierParts):
    """The suite; mixed in like :class:`ProxierParts`."""

    def test_interface(self) -> None:
        """It is an IProxier of its pool, and has no port before it listens."""
        proxier = self.proxier()
        verifyObject(IProxier, proxier)
        self.assertEqual((proxier.pool, proxier.port), (self.pool(), 0))  # type: ignore[attr-defined]

    async def test_serves(self) -> None:
        """A client is led to the endpoint that the balancer names, and gets its answer; both families."""
        for family in ("IPv4", "IPv6"):
            backend = self.backend(family)  # type: ignore[arg-type]
            proxier = self.proxier(backend.endpoint, family=family)  # type: ignore[arg-type]
            proxier.listen()
            assert proxier.port
            client = self.client(proxier)
            self.assertEqual(await self.ask(client), b"hello")  # type: ignore[attr-defined]
            self.assertEqual(  # type: ignore[attr-defined]
                self.balancer.asked,
                [(LOOPBACK[family], ())],  # type: ignore[index]
            )
            (opening,) = self.observer.openings
            self.assertEqual(opening[:2], (self.pool(family), backend.endpoint))  # type: ignore[attr-defined,arg-type]
            self.assertEqual(  # type: ignore[attr-defined]
                self.balancer.active,
                {(self.pool(family), backend.endpoint): 1},  # type: ignore[arg-type]
            )

    async def test_takesTurns(self) -> None:
        """Every client is asked for anew."""
        backends = [self.backend() for _ in range(2)]
        proxier = self.proxier(*(it.endpoint for it in backends))
        proxier.listen()
        clients = [self.client(proxier) for _ in range(4)]
        for number, client in enumerate(clients):
            self.assertEqual(await self.ask(client, b"%d" % number), b"%d" % number)  # type: ignore[attr-defined]
        self.assertEqual([it.accepted for it in backends], [2, 2])  # type: ignore[attr-defined]

    def test_listensWhereTold(self) -> None:
        """A given port is taken; one that is in use raises, and leaves nothing open."""
        first, second = self.proxier(), self.proxier()
        first.listen()
        self.assertRaises((OSError, CannotListenError), second.listen, first.port)  # type: ignore[attr-defined]
        self.assertFalse(second.status()["listening"])  # type: ignore[attr-defined]
        first.stopListening()
        second.listen(first.port)
        self.assertEqual(second.port, first.port)  # type: ignore[attr-defined]

    def test_familiesApart(self) -> None:
        """The two families may use the same port number."""
        for _ in range(10):
            first, second = self.proxier(), self.proxier(family="IPv6")
            first.listen()
            try:
                second.listen(first.port)
            except (OSError, CannotListenError):
                # Another program may own that number there, but not ten times.
                continue
            self.assertEqual(second.port, first.port)  # type: ignore[attr-defined]
            return
        self.fail("no port was free for both families")  # type: ignore[attr-defined]

    async def test_renamed(self) -> None:
        """Renaming keeps socket and connections; both count under the new name from then on."""
        backend = self.backend()
        proxier = self.proxier(backend.endpoint)
        proxier.listen()
        port = proxier.port
        client = self.client(proxier)
        self.assertEqual(await self.ask(client), b"hello")  # type: ignore[attr-defined]
        new = self.pool(port="http")
        proxier.renamed(new)
        self.assertEqual((proxier.pool, proxier.port), (new, port))  # type: ignore[attr-defined]
        self.assertEqual(await self.ask(client, b"still"), b"still")  # type: ignore[attr-defined]
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")  # type: ignore[attr-defined]
        self.assertEqual(self.observer.openings[1][0], new)  # type: ignore[attr-defined]

    async def test_stopTwice(self) -> None:
        """Closing twice is harmless, the port is free at once, and what never listened can be closed as well."""
        proxier = self.proxier()
        proxier.stopListening()
        proxier.listen()
        proxier.stopListening()
        proxier.stopListening()
        self.assertFalse(proxier.status()["listening"])  # type: ignore[attr-defined]
        await proxier.drained()

    async def test_abort(self) -> None:
        """After abort() nothing is left, everything that was opened was closed, and drained() fires."""
        backend = self.backend()
        proxier = self.proxier(backend.endpoint)
        proxier.listen()
        clients = [self.client(proxier) for _ in range(5)]
        for client in clients:
            await self.ask(client)
        self.assertEqual(proxier.status()["active"], 5)  # type: ignore[attr-defined]
        drained = proxier.drained()
        proxier.stopListening()
        proxier.abort()
        await drained
        await proxier.drained()
        self.assertEqual(proxier.status()["active"], 0)  # type: ignore[attr-defined]
        self.assertEqual(self.balancer.active, {})  # type: ignore[attr-defined]
        self.assertEqual(len(self.observer.closings), 5)  # type: ignore[attr-defined]

    async def test_status(self) -> None:
        """The status is JSON, and says protocol, port and counts."""
        backend = self.backend()
        proxier = self.proxier(backend.endpoint)
        proxier.listen()
        await self.ask(self.client(proxier))
        status = json.loads(json.dumps(proxier.status()))
        expected = {"protocol": self.protocol, "port": proxier.port, "listening": True, "active": 1, "opened": 1}
        self.assertEqual(  # type: ignore[attr-defined]
            {key: status[key] for key in expected}, expected
        )

    async def test_noEndpoint(self) -> None:
        """A client for whom there is no endpoint costs one report, and the next one is served again."""
        proxier = self.proxier()
        proxier.listen()
        client = self.client(proxier)
        if self.protocol == "UDP":
            client.sendall(b"anybody?")
        await self.observer.until(lambda: bool(self.observer.failures))
        self.assertEqual(self.observer.failures, ["no-endpoint"])  # type: ignore[attr-defined]
        backend = self.backend()
        self.balancer.turns.append(backend.endpoint)
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")  # type: ignore[attr-defined]

    async def test_endpointsChangedBeforeListening(self) -> None:
        """It may be told of its endpoints before it listens, and of none."""
        backend = self.backend()
        proxier = self.proxier(backend.endpoint)
        proxier.endpointsChanged(())
        proxier.endpointsChanged((backend.endpoint,))
        proxier.listen()
        self.assertEqual(await self.ask(self.client(proxier)), b"hello")  # type: ignore[attr-defined]
