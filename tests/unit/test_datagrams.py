"""The engine for datagrams in C: batches and trains, over sockets that are not real; its trial, over real ones."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from tests.fakes.datagrams import FakeSocket
from tests.shared.datagrams import socketsOf
from tests.shared.policies import endpoint, endpoints
from tests.shared.relays import descriptors
from tests.unit.test_udp import CLIENT, UdpCase
from twisted_kproxy.interfaces import NoEndpoint, NotAvailable
from twisted_kproxy.userspace.engines import offload
from twisted_kproxy.userspace.engines.choose import makeEngines
from twisted_kproxy.userspace.engines.offload import probeOffload, selfTest
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.udpsockets import Sockets

ANOTHER = ("192.0.2.2", 1)
POLL = select.poll


class BatchTests(UdpCase):
    engine = "native"

    def arrive(self, *datagrams: tuple[bytes, Any]) -> None:
        """All at once."""
        self.service.arrive(*((datagram, client, b"a", 0) for datagram, client in datagrams))

    @property
    def first(self) -> FakeSocket:
        found: FakeSocket = self.sockets.connected[0]
        return found

    def test_oneCallPerFlow(self) -> None:
        """What came at once goes to each endpoint with one call, in order."""
        self.arrive((b"1", CLIENT), (b"a", ANOTHER))
        for skt in self.sockets.connected:
            skt.calls.clear()
        self.arrive((b"2", CLIENT), (b"b", ANOTHER), (b"3", CLIENT), (b"c", ANOTHER), (b"4", CLIENT))
        self.assertEqual([s.sent for s in self.sockets.connected], [[b"1", b"2", b"3", b"4"], [b"a", b"b", b"c"]])
        self.assertEqual([s.calls for s in self.sockets.connected], [[3], [2]])

    def test_repliesWithOneCall(self) -> None:
        """What an endpoint has said at once goes to its client with one call."""
        self.say()
        self.last.reply(b"1", b"2", b"3")
        self.assertEqual((self.service.sent, self.service.calls), ([b"1", b"2", b"3"], [3]))

    def test_newClientInABatch(self) -> None:
        """Several datagrams of a client that nobody knew are one flow, and stay in order."""
        self.arrive(*((b"%d" % number, CLIENT) for number in range(5)), (b"x", ANOTHER))
        self.assertEqual([s.sent for s in self.sockets.connected], [[b"0", b"1", b"2", b"3", b"4"], [b"x"]])
        self.assertEqual(self.proxier.status()["datagramsSent"], 6)

    def test_moreThanABatch(self) -> None:
        """A thousand at once arrive all, in order."""
        sent = [b"%d" % number for number in range(1000)]
        self.say(b"first")
        self.arrive(*((datagram, CLIENT) for datagram in sent))
        for _ in range(20):
            self.sockets.relay(0)
        self.assertEqual(self.last.sent, [b"first", *sent])
        self.last.reply(*sent)
        for _ in range(20):
            self.sockets.relay(0)
        self.assertEqual(self.service.sent, sent)
        self.assertEqual(self.proxier.status()["datagramsReceived"], 1000)

    def test_refusedInABatch(self) -> None:
        """When the endpoint refuses in the middle of a batch, the rest of it goes to the next one, in order."""
        self.say(b"0")
        self.first.errors = [errno.ECONNREFUSED]
        self.arrive((b"1", CLIENT), (b"2", CLIENT), (b"3", CLIENT))
        self.assertEqual((self.first.sent, self.last.sent), ([b"0"], [b"0", b"1", b"2", b"3"]))
        self.assertEqual((self.reasons(), self.drops()), (["refused"], {}))

    def test_newClientRefusedInABatch(self) -> None:
        """When the endpoint of a new client refuses the second datagram of a batch, nothing is lost or overtaken."""
        self.sockets.errors[endpoint(1)] = [0, errno.ECONNREFUSED]
        self.arrive((b"1", CLIENT), (b"2", CLIENT), (b"3", CLIENT), (b"x", ANOTHER))
        sent = [s.sent for s in self.sockets.connected]
        self.assertEqual(sent, [[b"1"], [b"1", b"2", b"3"], [b"x"]])
        self.assertEqual(self.drops(), {})

    def test_allRefuseInABatch(self) -> None:
        """Where all refuse, each datagram of the batch is tried and dropped; nothing hangs."""
        self.say(b"0")
        for it in endpoints(1, 2, 3):
            self.sockets.errors[it] = [errno.ECONNREFUSED] * 20
        self.first.errors = [errno.ECONNREFUSED]
        self.arrive((b"1", CLIENT), (b"2", CLIENT))
        self.assertEqual((self.active(), self.first.sent), (0, [b"0"]))
        # The one that was sent before, and the two at hand.
        self.assertEqual(self.drops(), {"failed": 3})

    def test_shortOfBuffers(self) -> None:
        """What the kernel does not take in the middle of a batch is dropped; the rest goes on."""
        self.say(b"0")
        self.last.errors = [errno.ENOBUFS]
        self.arrive((b"1", CLIENT), (b"2", CLIENT), (b"3", CLIENT))
        self.assertEqual((self.last.sent, self.drops()), ([b"0", b"2", b"3"], {"busy": 1}))

    def test_evictedInABatch(self) -> None:
        """A flow that makes room for another in the midst of a batch gets nothing more; the client begins anew."""
        self.make(1, maxFlows=1)
        self.arrive((b"1", CLIENT), (b"2", ANOTHER), (b"3", CLIENT))
        self.assertEqual([s.sent for s in self.sockets.connected], [[b"1"], [b"2"], [b"3"]])
        self.assertEqual([s.open for s in self.sockets.connected], [False, False, True])

    def test_stoppedInABatch(self) -> None:
        """When the proxier stops while a batch is at hand, the rest of it is dropped."""

        def stop(*_: Any) -> Any:
            self.proxier.stopListening()
            raise NoEndpoint("stopped")

        self.say(b"1")
        with mock.patch.object(self.balancer, "nextEndpoint", side_effect=stop) as asked:
            self.arrive((b"2", ANOTHER), (b"3", CLIENT), (b"4", ("192.0.2.3", 1)), (b"5", ("192.0.2.4", 1)))
        self.assertEqual((asked.call_count, self.last.sent), (1, [b"1", b"3"]))

    def test_staleInABatch(self) -> None:
        """A client whose endpoint has left moves with the first datagram of a batch, and the others follow."""
        self.say(b"0")
        self.balancer.pool = [endpoint(2)]
        self.proxier.endpointsChanged(endpoints(2))
        self.arrive((b"1", CLIENT), (b"2", CLIENT))
        self.assertEqual((self.first.sent, self.last.sent), ([b"0"], [b"1", b"2"]))

    def test_lateEvent(self) -> None:
        """An event of a socket that was closed meanwhile is nobody's."""
        self.arrive((b"1", CLIENT), (b"2", ANOTHER))
        first, second = self.sockets.connected
        wake, self.sockets.kernel.wake = self.sockets.kernel.wake, lambda skt, events: None
        first.reply(b"re 1")
        second.reply(b"re 2")
        # As another process has them for a moment after fork().
        copies = [os.dup(skt.fd) for skt in (first, second)]
        for copy in copies:
            self.addCleanup(os.close, copy)
            os.eventfd_write(copy, 1)
        self.proxier.abort()
        gc.collect()
        self.sockets.kernel.wake = wake
        self.sockets.relay(0)
        self.assertEqual((self.service.sent, first.arrivals[0][0]), ([], b"re 1"))


class TrainTests(UdpCase):
    """Trains: datagrams of one size that come in one piece."""

    engine = "native"
    TRAIN = b"aaaabbbbccccd"
    PARTS = [b"aaaa", b"bbbb", b"cccc", b"d"]

    def train(self, client: Any = CLIENT) -> None:
        self.service.arrive((self.TRAIN, client, b"a", 4))

    def test_goesInOnePiece(self) -> None:
        """A train goes on as one, both ways; each of its datagrams counts, and the last may be sent again."""
        self.say(b"hello")
        self.last.reply(b"single")
        self.service.sent.clear()
        self.train()
        self.last.reply(self.TRAIN, segment=4)
        self.assertEqual((self.last.sent, self.last.trains), ([b"hello", *self.PARTS], [4]))
        self.assertEqual((self.service.sent, self.service.trains), (self.PARTS, [4]))
        status = self.proxier.status()
        self.assertEqual([status[it] for it in ("datagramsSent", "bytesSent")], [5, 18])
        self.assertEqual([status[it] for it in ("datagramsReceived", "bytesReceived")], [5, 19])
        self.train()
        self.last.refuse()
        self.assertEqual(self.last.sent, [b"d"])

    def test_ofANewClient(self) -> None:
        """The first datagram of a train opens the flow; the others follow it as a train."""
        self.train()
        self.assertEqual((self.last.sent, self.last.trains), (self.PARTS, [4]))

    def test_refused(self) -> None:
        """An endpoint that refuses a train is left, and all of the train goes to the next one."""
        self.say(b"hello")
        self.last.errors = [errno.ECONNREFUSED]
        self.train()
        self.assertEqual(self.last.sent, [b"hello", *self.PARTS])
        self.assertEqual(self.last.endpoint, endpoint(2))

    def test_notTaken(self) -> None:
        """Where the kernel cannot cut trains for that path their datagrams go one by one, and it is not asked again."""
        for number in (errno.EINVAL, errno.EMSGSIZE, errno.EIO):
            self.make(1)
            self.say(b"hello")
            for skt in (self.last, self.service):
                skt.noTrains = number
            self.train()
            self.train()
            self.last.reply(self.TRAIN, b"single", segment=4)
            self.last.reply(self.TRAIN, segment=4)
            self.assertEqual((self.last.sent, self.last.trains), ([b"hello", *self.PARTS, *self.PARTS], []))
            self.assertEqual(self.last.calls, [4, 4])
            self.assertEqual([it for it in self.service.sent if it in self.PARTS], [*self.PARTS, *self.PARTS])
            self.assertEqual(self.drops(), {})
            self.proxier.stopListening()

    def test_someFit(self) -> None:
        """Of a train that is sent one by one each datagram that does not fit is dropped by itself."""
        self.say(b"hello")
        self.last.noTrains = errno.EINVAL
        self.last.errors = [errno.EMSGSIZE]
        self.train()
        self.assertEqual((self.last.sent, self.drops()), ([b"hello", b"bbbb", b"cccc", b"d"], {"too-long": 1}))

    def test_noRoom(self) -> None:
        """A train for which there is no buffer space is dropped as so many datagrams."""
        self.say(b"hello")
        self.last.errors = [errno.EAGAIN]
        self.train()
        self.assertEqual((self.last.sent, self.drops()), ([b"hello"], {"busy": 4}))

    def test_withoutOffload(self) -> None:
        """Where the kernel is known to have none, trains are not even tried."""
        self.offload = 1
        self.make(1)
        self.say(b"hello")
        self.last.noTrains = self.service.noTrains = errno.EADDRNOTAVAIL
        self.train()
        self.last.reply(self.TRAIN, segment=4)
        self.assertEqual((self.last.sent, self.service.sent), ([b"hello", *self.PARTS], self.PARTS))
        self.assertEqual(self.service.trains, [])


class PythonTrainTests(UdpCase):
    """The engine in Python takes trains of clients, too, and sends them on as such. It makes trains of replies."""

    TRAIN, PARTS = TrainTests.TRAIN, TrainTests.PARTS

    def train(self) -> None:
        self.service.arrive((self.TRAIN, CLIENT, b"a", 4))

    def test_goesInOnePiece(self) -> None:
        """A new client's train goes one by one, later ones in one piece; each datagram counts."""
        self.train()
        self.train()
        self.assertEqual((self.last.sent, self.last.trains), ([*self.PARTS, *self.PARTS], [4]))
        status = self.proxier.status()
        self.assertEqual([status[it] for it in ("datagramsSent", "bytesSent")], [8, 26])
        self.last.refuse()
        self.assertEqual(self.last.sent, [b"d"])

    def test_notTaken(self) -> None:
        """Where the kernel cannot cut trains for that path they go one by one from then on."""
        self.say(b"hello")
        self.last.noTrains = errno.EIO
        self.train()
        self.last.noTrains = 0
        self.train()
        self.assertEqual((self.last.sent, self.last.trains), ([b"hello", *self.PARTS, *self.PARTS], []))

    def test_refused(self) -> None:
        """An endpoint that refuses a train is left, and all of the train goes to the next one."""
        self.say(b"hello")
        self.last.errors = [errno.ECONNREFUSED]
        self.train()
        self.assertEqual((self.last.endpoint, self.last.sent), (endpoint(2), [b"hello", *self.PARTS]))

    def test_repliesAtOnce(self) -> None:
        """An endpoint that has much to say at once is passed on in trains, where the sizes allow it."""
        self.say(b"hello")
        sent = [b"%02d" % number for number in range(20)]
        self.last.reply(*sent, b"!")
        self.assertEqual((self.service.sent, self.service.trains), ([*sent, b"!"], [2]))
        self.assertEqual(self.proxier.status()["datagramsReceived"], 21)
        for datagrams in ([b"1", b"22", b"3"], [b"1", b"2", b"33"], [b"", b"", b""], [b"x" * 40000] * 2):
            self.service.sent.clear()
            self.last.reply(*sent[:4], *datagrams)
            self.assertEqual(self.service.sent, [*sent[:4], *datagrams])
        self.assertEqual(self.drops(), {})

    def test_repliesNotTaken(self) -> None:
        """Where the kernel does not take such a train each goes by itself, or is dropped for its own reason."""
        self.say(b"hello")
        self.service.noTrains = errno.EIO
        self.last.reply(*[b"12"] * 4)
        self.service.errors = [0, 0, errno.EAGAIN]
        self.last.reply(*[b"34"] * 8)
        self.assertEqual((self.service.sent, self.drops()), ([b"12"] * 4 + [b"34"] * 7, {"busy": 1}))

    def test_withoutOffload(self) -> None:
        """Where the kernel is known to cut none, trains are not even tried."""
        self.offload = 1
        self.make(1)
        self.say(b"hello")
        self.last.noTrains = errno.EADDRNOTAVAIL
        self.train()
        self.assertEqual(self.last.sent, [b"hello", *self.PARTS])


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 5), st.sampled_from([0, 1, 700, 1500, 1501])),
        st.tuples(st.just("burst"), st.integers(0, 5), st.integers(2, 5)),
        st.tuples(st.just("reply"), st.integers(0, 9), st.integers(1, 3)),
        st.tuples(st.just("refuse"), st.integers(0, 9), st.sampled_from([errno.ECONNREFUSED, errno.EMSGSIZE])),
        st.tuples(st.just("fail"), st.integers(0, 9), st.sampled_from([errno.ECONNREFUSED, errno.ENOBUFS, errno.EIO])),
        st.tuples(st.just("pool"), st.integers(0, 3), st.integers(1, 3)),
        st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
    ),
    max_size=40,
)


class SameTests(UdpCase):
    """Both engines do the same."""

    def follow(self, engine: str, steps: list[tuple[str, int, int]]) -> Any:
        self.engine = engine
        self.make(1, 2, 3, maxFlows=4)
        for what, which, much in steps:
            links = [it for it in self.sockets.connected if it.open]
            link = links[which % len(links)] if links else None
            client = ("192.0.2.1", 1000 + which)
            if what == "say":
                self.say(b"x" * much, client)
            elif what == "burst":
                self.service.arrive(*((b"%d" % number, client, b"a", 0) for number in range(much)))
            elif what == "pool":
                self.balancer.pool = list(endpoints(*range(which, which + much)))
                self.proxier.endpointsChanged(tuple(self.balancer.pool))
            elif what == "wait":
                self.clock.pump([1.0] * which)
            elif link is not None and what == "reply":
                link.reply(*(b"re %d" % number for number in range(much)))
            elif link is not None and what == "refuse":
                link.refuse(much)
            elif link is not None:
                link.errors.append(much)
        told = (
            [(it.endpoint, it.open, list(it.sent)) for it in self.sockets.connected],
            self.service.replies,
            self.proxier.status(),
            [list(it) for it in vars(self.observer).values()],
        )
        self.tearDown()
        return told

    @settings(deadline=None, max_examples=150)
    @given(_STEPS)
    def test_random(self, steps: list[tuple[str, int, int]]) -> None:
        """Property: whatever happens, both engines send, keep, count and report the same."""
        self.assertEqual(self.follow("python", steps), self.follow("native", steps))


class Late(socket.socket):
    """One that has nothing yet for whoever does not wait."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._hurried()
        return super().recv(size, flags)

    def recvfrom(self, size: int, flags: int = 0) -> Any:  # type: ignore[override]
        self._hurried()
        return super().recvfrom(size, flags)

    def _hurried(self) -> None:
        if self.gettimeout() == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


class Patient:
    """The same of a poll object."""

    def __init__(self) -> None:
        self._real = POLL()
        self.register = self._real.register

    def poll(self, wait: int) -> Any:
        return self._real.poll(wait) if wait else []


class TrialTests(TestCase):
    """What is tried before it is used."""

    def test_selfTest(self) -> None:
        """The trial at the start succeeds, and leaves nothing behind."""
        sockets: Any = socketsOf("native", reactor)
        gc.collect()  # of engines that earlier tests had
        before = descriptors()
        selfTest(sockets)
        self.assertEqual(descriptors(), before)

    def test_selfTestFails(self) -> None:
        """An engine that relays something else is not taken."""
        sockets: Any = socketsOf("native", reactor)
        with mock.patch.object(offload, "_relayed", lambda *_: (b"first", b"")):
            self.assertRaises(NotAvailable, selfTest, sockets)

    def test_selfTestWaits(self) -> None:
        """Nor is one refused because loopback takes a moment: nobody looks for datagrams without waiting for them."""
        sockets: Any = socketsOf("native", reactor)
        with mock.patch.object(offload.socket, "socket", Late):
            selfTest(sockets)

    def test_offloadWaits(self) -> None:
        """A train's datagrams may come one by one, each a moment later than the one before."""
        found = probeOffload()
        with mock.patch.object(offload.select, "poll", Patient):
            self.assertEqual(probeOffload(), found)

    def test_offload(self) -> None:
        """What is found out about trains is what the kernel does; a kernel without them has none."""
        self.assertIn(probeOffload(), (0, 2, 3))
        with mock.patch.object(offload, "UDP_SEGMENT", 9999), mock.patch.object(offload, "UDP_GRO", 9999):
            self.assertEqual(probeOffload(), 0)
        with mock.patch.object(offload, "UDP_GRO", 9999):
            self.assertIn(probeOffload(), (0, 2))


class ChooseTests(TestCase):
    """Which engine is taken."""

    def test_python(self) -> None:
        """By name."""
        relay, sockets = makeEngines(reactor, Poller(reactor), "python")
        self.assertEqual((relay.name, type(sockets)), ("python", Sockets))

    def test_fallsBack(self) -> None:
        """Where the one for datagrams does not work, Python relays them; asked for by name, that is an error."""
        with mock.patch.object(offload, "_relayed", side_effect=OSError(errno.EPERM, "no")):
            _, sockets = makeEngines(reactor, Poller(reactor))
            self.assertIs(type(sockets), Sockets)
            self.assertRaises(NotAvailable, makeEngines, reactor, Poller(reactor), "native")
