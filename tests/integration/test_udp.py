"""The UDP proxier on real sockets of the loopback interface."""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest, TestCase
from zope.interface import implementer

from tests.shared.datagrams import socketsOf
from twisted_kproxy.core.values import Endpoint, Family, Outcome, PoolName, ServicePortName
from twisted_kproxy.interfaces import NoEndpoint
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.udp import UdpProxier
from twisted_kproxy.userspace.udpsockets import Sockets

reactor: Any = _reactor

LOOPBACK: dict[Family, str] = {"IPv4": "127.0.0.1", "IPv6": "::1"}
AF: dict[Family, socket.AddressFamily] = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
LARGEST: dict[Family, int] = {"IPv4": 65507, "IPv6": 65527}


def datagramSockets() -> int:
    """How many UDP sockets this process has, bound or not."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:
            continue  # the folder's own
        try:
            one = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            continue
        with one:
            count += one.type == socket.SOCK_DGRAM and one.family in AF.values()
    return count


@implementer(IReadDescriptor)
class Peer:
    """A socket of a client or of an endpoint: keeps what arrives, and wakes who waits for it."""

    def __init__(self, family: Family, host: str = "", port: int = 0) -> None:
        self.socket = socket.socket(AF[family], socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind((host or LOOPBACK[family], port))
        self.port = self.socket.getsockname()[1]
        self.arrived: list[tuple[bytes, tuple[Any, ...]]] = []
        self._waiting: list[tuple[int, Deferred[None]]] = []
        reactor.addReader(self)

    def fileno(self) -> int:
        return self.socket.fileno()

    def logPrefix(self) -> str:
        return "peer"

    def connectionLost(self, reason: Any) -> None:
        pass

    def doRead(self) -> None:
        while True:
            try:
                datagram, address = self.socket.recvfrom(65536)
            except OSError:
                return
            self.arrived.append((datagram, address[:2]))
            self.got(datagram, address)
            for count, waiting in self._waiting[:]:
                if len(self.arrived) >= count:
                    self._waiting.remove((count, waiting))
                    waiting.callback(None)

    def got(self, datagram: bytes, address: tuple[Any, ...]) -> None:
        """For endpoints."""

    def arrivals(self, count: int) -> Deferred[None]:
        """Fires once so many datagrams have arrived altogether; fails after ten seconds."""
        waiting: Deferred[None] = Deferred()
        if len(self.arrived) >= count:
            waiting.callback(None)
        else:
            self._waiting.append((count, waiting))
            waiting.addTimeout(10, reactor)
        return waiting

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            reactor.removeReader(self)
            self.socket.close()


class Echo(Peer):
    """An endpoint that sends everything back."""

    def got(self, datagram: bytes, address: tuple[Any, ...]) -> None:
        self.socket.sendto(datagram, address)


class Trains(Peer):
    """An endpoint that answers in trains: four datagrams of two bytes and one of one, for the kernel to cut."""

    def got(self, datagram: bytes, address: tuple[Any, ...]) -> None:
        segment = [(socket.IPPROTO_UDP, 103, (2).to_bytes(2, sys.byteorder))]
        self.socket.sendmsg([datagram * 4 + b"."], segment, 0, address)


class Turns:
    """In the place of the balancer."""

    def __init__(self) -> None:
        self.pool: list[Endpoint] = []
        self.active = 0
        self._turn = 0

    def nextEndpoint(self, pool: PoolName, client: str, avoid: Any = ()) -> Endpoint:
        for _ in self.pool:
            self._turn += 1
            chosen = self.pool[self._turn % len(self.pool)]
            if chosen not in avoid:
                return chosen
        if not self.pool:
            raise NoEndpoint(f"{pool} has no endpoint")
        return self.pool[0]

    def opened(self, pool: PoolName, endpoint: Endpoint) -> None:
        self.active += 1

    def closed(self, pool: PoolName, endpoint: Endpoint) -> None:
        self.active -= 1


class Seen:
    """In the place of the metrics."""

    def __init__(self) -> None:
        self.misses: list[str] = []
        self.failures: list[str] = []
        self.outcomes: list[Outcome] = []

    def opened(self, pool: PoolName, endpoint: Endpoint, seconds: float) -> None:
        pass

    def missed(self, pool: PoolName, endpoint: Endpoint, reason: str) -> None:
        self.misses.append(reason)

    def failed(self, pool: PoolName, reason: str) -> None:
        self.failures.append(reason)

    def closed(self, pool: PoolName, endpoint: Endpoint, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


class Unlimited:
    used = 0

    def take(self, n: int) -> bool:
        self.used += n
        return True

    def give(self, n: int) -> None:
        self.used -= n


class LoopbackMixin:
    """The tests, for either family and either engine."""

    family: Family
    engine = "python"
    timeout = 20

    def setUp(self) -> None:
        if self.family == "IPv6":
            try:
                with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
                    probe.bind(("::1", 0))
            except OSError as error:
                raise SkipTest("this machine has no IPv6") from error
        self.engineSockets = socketsOf(self.engine, reactor)
        self.sockets = datagramSockets()
        self.balancer = Turns()
        self.seen = Seen()
        self.budget = Unlimited()
        self.peers: list[Peer] = []
        self.host = LOOPBACK[self.family]
        self.proxier = self.makeProxier()

    def makeProxier(self, idleTimeout: float = 30.0) -> UdpProxier:
        proxier = UdpProxier(
            reactor,
            PoolName(ServicePortName("default", "dns", "dns", "UDP", self.family), "cluster"),
            self.balancer,  # type: ignore[arg-type]
            self.seen,  # type: ignore[arg-type]
            idleTimeout=idleTimeout,
            budget=self.budget,
            sockets=self.engineSockets,
        )
        proxier.listen()
        return proxier

    def tearDown(self) -> None:
        """Every test ends with all sockets closed and all books balanced."""
        self.proxier.stopListening()
        for peer in self.peers:
            peer.close()
        self.assertEqual((self.balancer.active, self.budget.used), (0, 0))
        self.assertEqual(datagramSockets(), self.sockets)

    def client(self, host: str = "") -> Peer:
        self.peers.append(Peer(self.family, host))
        return self.peers[-1]

    def endpoint(self, kind: type[Peer] = Echo, port: int = 0) -> tuple[Peer, Endpoint]:
        peer = kind(self.family, "", port)
        self.peers.append(peer)
        return peer, Endpoint(self.host, peer.port)

    def deadEndpoint(self) -> Endpoint:
        peer = Peer(self.family)
        peer.close()
        return Endpoint(self.host, peer.port)

    def to(self, host: str = "") -> tuple[str, int]:
        return (host or self.host, self.proxier.port)

    def status(self, name: str) -> Any:
        return self.proxier.status()[name]

    async def test_sizes(self) -> None:
        """Datagrams of every size, from none to the largest there is, arrive whole, both ways."""
        self.balancer.pool = [self.endpoint()[1]]
        client = self.client()
        sizes = [0, 1, 512, 1500, 8192, 8193, 20000, LARGEST[self.family]]
        for count, size in enumerate(sizes):
            sent = os.urandom(size)
            client.socket.sendto(sent, self.to())
            await client.arrivals(count + 1)
            self.assertEqual(client.arrived[-1], (sent, self.to()))
        self.assertEqual((self.status("bytesSent"), self.status("bytesReceived")), (sum(sizes), sum(sizes)))
        self.assertEqual(self.status("drops"), {})

    async def test_burst(self) -> None:
        """A burst of more datagrams than one turn reads arrives whole and in order."""
        self.balancer.pool = [self.endpoint()[1]]
        client = self.client()
        sent = [b"%d" % number for number in range(300)]
        for datagram in sent:
            client.socket.sendto(datagram, self.to())
        await client.arrivals(len(sent))
        self.assertEqual([datagram for datagram, _ in client.arrived], sent)

    async def test_train(self) -> None:
        """What a client sends in one piece, for the kernel to cut, arrives as the datagrams that it stands for."""
        self.balancer.pool = [self.endpoint()[1]]
        client = self.client()
        sent = os.urandom(10 * 1200 + 7)
        segment = [(socket.IPPROTO_UDP, 103, (1200).to_bytes(2, sys.byteorder))]
        try:
            for _ in range(3):
                client.socket.sendmsg([sent], segment, 0, self.to())
        except OSError as error:
            raise SkipTest(f"this kernel cuts no datagrams: {error}") from None
        await client.arrivals(33)
        self.assertEqual(b"".join(datagram for datagram, _ in client.arrived), 3 * sent)
        self.assertEqual((self.status("datagramsSent"), self.status("datagramsReceived")), (33, 33))
        self.balancer.pool = [self.endpoint(Trains)[1]]
        another = self.client()
        for count in range(4):
            another.socket.sendto(b"%2d" % count, self.to())
            await another.arrivals(5 * count + 5)
        expected = [part for count in range(4) for part in (*[b"%2d" % count] * 4, b".")]
        self.assertEqual([datagram for datagram, _ in another.arrived], expected)

    async def test_clientsApart(self) -> None:
        """Two hundred clients at a time over three endpoints: each gets its own replies and no other's."""
        self.balancer.pool = [self.endpoint()[1] for _ in range(3)]
        clients = [self.client() for _ in range(200)]
        before = datagramSockets()
        for turn in range(5):
            for number, client in enumerate(clients):
                client.socket.sendto(b"%d of %d" % (turn, number), self.to())
            await gatherResults([client.arrivals(turn + 1) for client in clients])
        for number, client in enumerate(clients):
            self.assertEqual(
                [datagram for datagram, _ in client.arrived], [b"%d of %d" % (turn, number) for turn in range(5)]
            )
        self.assertEqual((self.status("active"), self.status("unanswered"), self.balancer.active), (200, 0, 200))
        self.assertEqual(datagramSockets(), before + 200, "one descriptor per flow")

    async def test_flowStays(self) -> None:
        """A client's datagrams all go to the endpoint of its first one."""
        endpoints = [self.endpoint() for _ in range(3)]
        self.balancer.pool = [endpoint for _, endpoint in endpoints]
        client = self.client()
        for count in range(10):
            client.socket.sendto(b"x", self.to())
            await client.arrivals(count + 1)
        self.assertEqual(sorted(len(peer.arrived) for peer, _ in endpoints), [0, 0, 10])

    async def test_refused(self) -> None:
        """A datagram that an endpoint's node refuses reaches another endpoint without the client's doing."""
        peer, alive = self.endpoint()
        dead = self.deadEndpoint()
        self.balancer.pool = [alive, dead]
        client = self.client()
        client.socket.sendto(b"question", self.to())
        await client.arrivals(1)
        self.assertEqual(client.arrived, [(b"question", self.to())])
        self.assertEqual((self.seen.misses, self.seen.outcomes), (["refused"], [Outcome("refused", 8, 0)]))
        self.assertEqual([datagram for datagram, _ in peer.arrived], [b"question"])

    async def test_endpointDies(self) -> None:
        """A client whose endpoint dies under it goes on with another one."""
        endpoints = [self.endpoint() for _ in range(2)]
        self.balancer.pool = [endpoint for _, endpoint in endpoints]
        client = self.client()
        client.socket.sendto(b"one", self.to())
        await client.arrivals(1)
        for peer, _ in endpoints:
            if peer.arrived:
                peer.close()
        client.socket.sendto(b"two", self.to())
        await client.arrivals(2)
        self.assertEqual(client.arrived[-1], (b"two", self.to()))

    async def test_onlyEndpointDiesAndComesBack(self) -> None:
        """The only endpoint is refused, and is there again for the client's next datagram."""
        peer, endpoint = self.endpoint()
        self.balancer.pool = [endpoint]
        peer.close()
        client = self.client()
        client.socket.sendto(b"lost", self.to())
        while not self.seen.outcomes:
            await deferLater(reactor, 0.005, lambda: None)
        self.assertEqual(self.status("drops"), {"failed": 1})
        self.endpoint(port=endpoint.port)
        client.socket.sendto(b"found", self.to())
        await client.arrivals(1)
        self.assertEqual(client.arrived[0][0], b"found")

    async def test_endpointLeaves(self) -> None:
        """An endpoint that left the pool gets nothing more, and after its client has moved is not heard any more."""
        old, leaving = self.endpoint(Peer)
        self.balancer.pool = [leaving]
        client = self.client()
        client.socket.sendto(b"one", self.to())
        await old.arrivals(1)
        _, staying = self.endpoint()
        self.balancer.pool = [staying]
        self.proxier.endpointsChanged((staying,))
        client.socket.sendto(b"two", self.to())
        await client.arrivals(1)
        old.socket.sendto(b"late", old.arrived[0][1])
        client.socket.sendto(b"three", self.to())
        await client.arrivals(2)
        self.assertEqual([datagram for datagram, _ in client.arrived], [b"two", b"three"])
        self.assertEqual(len(old.arrived), 1)

    async def test_strangersAreNotHeard(self) -> None:
        """Only the endpoint itself can answer a client: what others send to its socket is not passed on."""
        peer, endpoint = self.endpoint(Peer)
        self.balancer.pool = [endpoint]
        client, stranger = self.client(), self.client()
        client.socket.sendto(b"question", self.to())
        await peer.arrivals(1)
        stranger.socket.sendto(b"forged", peer.arrived[0][1])
        peer.socket.sendto(b"answer", peer.arrived[0][1])
        await client.arrivals(1)
        self.assertEqual([datagram for datagram, _ in client.arrived], [b"answer"])

    async def test_endpointIsTheProxierItself(self) -> None:
        """A service whose endpoint leads back to it sends nothing round in circles."""
        self.balancer.pool = [Endpoint(self.host, self.proxier.port)]
        client = self.client()
        client.socket.sendto(b"x", self.to())
        while not self.status("drops"):
            await deferLater(reactor, 0.005, lambda: None)
        await deferLater(reactor, 0.05, lambda: None)
        self.assertEqual((self.status("drops"), self.status("opened")), ({"loop": 1}, 1))

    async def test_idle(self) -> None:
        """Flows end after the idle time, and their sockets with them."""
        self.proxier.stopListening()
        self.proxier = self.makeProxier(idleTimeout=1.5)
        self.balancer.pool = [self.endpoint()[1]]
        clients = [self.client() for _ in range(20)]
        before = datagramSockets()
        for client in clients:
            client.socket.sendto(b"x", self.to())
        await gatherResults([client.arrivals(1) for client in clients])
        self.assertEqual(datagramSockets(), before + self.status("active"))
        while self.status("active"):
            await deferLater(reactor, 0.02, lambda: None)
        self.assertEqual((datagramSockets(), self.status("opened")), (before, 20))
        self.assertEqual({outcome.reason for outcome in self.seen.outcomes}, {"idle"})

    async def test_stop(self) -> None:
        """After stopping, the port is free at once, and the flows have ended."""
        self.balancer.pool = [self.endpoint()[1]]
        client = self.client()
        client.socket.sendto(b"x", self.to())
        await client.arrivals(1)
        port = self.proxier.port
        self.proxier.stopListening()
        await self.proxier.drained()
        self.proxier.listen(port)
        self.assertEqual(self.proxier.port, port)
        client.socket.sendto(b"y", self.to())
        await client.arrivals(2)

    async def test_portInUse(self) -> None:
        """A port that somebody holds is an error with its reason."""
        another = self.makeProxier()
        self.addCleanup(another.stopListening)
        third = UdpProxier(
            reactor,
            another.pool,
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            idleTimeout=1,
            budget=self.budget,
            sockets=self.engineSockets,
        )
        error = self.assertRaises(CannotListenError, third.listen, another.port)
        self.assertIsInstance(error.socketError, OSError)
        another.stopListening()


class IPv4Tests(LoopbackMixin, TestCase):
    family: Family = "IPv4"

    async def test_addressDialled(self) -> None:
        """Replies come from the address that was dialled, whichever of the node's it is, though one socket serves."""
        self.balancer.pool = [self.endpoint()[1]]
        client = self.client("127.0.0.9")
        for count, host in enumerate(("127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.2")):
            client.socket.sendto(b"x", self.to(host))
            await client.arrivals(count + 1)
            self.assertEqual(client.arrived[-1], (b"x", self.to(host)))
        self.assertEqual(self.status("active"), 3)

    async def test_familiesApart(self) -> None:
        """Both families may have the same port, each with a proxier of its own."""
        six = PoolName(ServicePortName("default", "dns", "dns", "UDP", "IPv6"), "cluster")
        other = UdpProxier(
            reactor,
            six,
            self.balancer,  # type: ignore[arg-type]
            self.seen,  # type: ignore[arg-type]
            idleTimeout=1,
            budget=self.budget,
            sockets=self.engineSockets,
        )
        other.listen(self.proxier.port)
        self.assertEqual(other.port, self.proxier.port)
        other.stopListening()


class IPv6Tests(LoopbackMixin, TestCase):
    family: Family = "IPv6"


class NativeIPv4Tests(IPv4Tests):
    engine = "native"


class NativeIPv6Tests(IPv6Tests):
    engine = "native"


class EndpointSocketTests(TestCase):
    """The socket towards an endpoint, by itself."""

    def setUp(self) -> None:
        self.failures: list[tuple[str, int]] = []
        self.replies: list[tuple[str, bytes]] = []
        self.happened: Deferred[None] = Deferred()

    def failed(self, token: str, number: int) -> None:
        self.failures.append((token, number))
        self.happened.callback(None)

    @property
    def transport(self) -> Any:
        return self

    def reply(self, token: str, datagram: bytes) -> None:
        self.replies.append((token, datagram))
        self.happened.callback(None)

    async def test_goesOnAfterAnError(self) -> None:
        """
        An ICMP error is reported once, leaves the socket quiet, and does not end it: what the endpoint sends later
        arrives. Closed, the socket is forgotten.
        """
        for family in ("IPv4", "IPv6"):
            self.setUp()
            gone = Peer(family)
            gone.close()
            sockets = Sockets(reactor, Poller(reactor))
            connected = sockets.connect(Endpoint(LOOPBACK[family], gone.port), self, "token")
            self.addCleanup(connected.close)
            self.assertTrue(sockets.isOwn(connected.local))
            self.assertEqual(connected.send(b"one"), 0)
            await self.happened.addTimeout(5, reactor)
            self.assertEqual(self.failures, [("token", errno.ECONNREFUSED)])
            poll = select.poll()
            poll.register(connected.fileno(), select.POLLIN)
            self.assertEqual(poll.poll(0), [])
            self.happened = Deferred()
            back = Echo(family, port=gone.port)
            self.addCleanup(back.close)
            self.assertEqual(connected.send(b"two"), 0)
            await self.happened.addTimeout(5, reactor)
            self.assertEqual((self.failures[1:], self.replies), ([], [("token", b"two")]))
            connected.close()
            connected.close()
            self.assertFalse(sockets.isOwn(connected.local))
            self.assertEqual(connected.send(b"three"), errno.EBADF)

    def test_own(self) -> None:
        """
        A datagram from the port of a listening socket is our own only when it comes from an address of this node.
        """
        sockets = Sockets(reactor, Poller(reactor))
        service = sockets.listen("IPv4", 0, DatagramProtocol(), sockets.table())
        port = service.number
        self.assertTrue(sockets.isOwn(("127.0.0.1", port)))
        self.assertTrue(sockets.isOwn(("127.0.0.77", port)))
        self.assertFalse(sockets.isOwn(("192.0.2.1", port)))
        self.assertFalse(sockets.isOwn(("127.0.0.1", port - 1)))
        sockets.close(service)
        self.assertFalse(sockets.isOwn(("127.0.0.1", port)))

    async def test_repliesBeforeTheErrorCount(self) -> None:
        """What an endpoint sent before it went away is told before its failure."""
        peer = Peer("IPv4")
        connected = Sockets(reactor, Poller(reactor)).connect(Endpoint("127.0.0.1", peer.port), self, "token")
        self.addCleanup(connected.close)
        connected.send(b"one")
        await peer.arrivals(1)
        peer.socket.sendto(b"re one", peer.arrived[0][1])
        peer.close()
        connected.send(b"two")
        connected._receiver = connected._port = order = Order()  # type: ignore[attr-defined]
        while len(order.told) < 2:
            await deferLater(reactor, 0.005, lambda: None)
        self.assertEqual(order.told, [b"re one", errno.ECONNREFUSED])


class Order:
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[bytes | int] = []

    def reply(self, token: str, datagram: bytes) -> None:
        self.told.append(datagram)

    def failed(self, token: str, number: int) -> None:
        self.told.append(number)


class NamespaceTests(TestCase):
    """What loopback alone cannot show, in a network namespace that ends with its process."""

    if os.geteuid() or not all(map(shutil.which, ("unshare", "ip", "nft"))):
        skip = "needs root, and unshare, ip and nft"
    timeout = 60

    engine = "python"

    def inNamespace(self, *arguments: str) -> None:
        script = Path(__file__).with_name("udpnamespace.py")
        done = subprocess.run(
            ["unshare", "--net", sys.executable, str(script), *arguments, self.engine],
            capture_output=True,
            text=True,
            timeout=50,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "as it should be"), done.stderr)

    def test_dialledThroughRules(self) -> None:
        """
        A client on the node itself that dials a service address, which rules lead to the proxier, takes the reply:
        it comes from the service address. With two addresses on the node the route back would suggest the wrong one.
        """
        for family in ("IPv4", "IPv6"):
            self.inNamespace("rules", family)

    def test_hostUnreachable(self) -> None:
        """An endpoint on a dead node is left as soon as the kernel knows; the client's datagram goes to another."""
        for family in ("IPv4", "IPv6"):
            self.inNamespace("unreachable", family)

    def test_filtered(self) -> None:
        """So is one that the node's own packet filter does not let through."""
        for family in ("IPv4", "IPv6"):
            self.inNamespace("filtered", family)


class NativeNamespaceTests(NamespaceTests):
    """The same with the engine in C."""

    engine = "native"
