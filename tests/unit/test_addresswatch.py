"""Following the node's addresses."""

from __future__ import annotations

import errno
import socket
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import Clock
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from twisted_kproxy.netfilter.addresswatch import GROUPS, AddressWatch


class FakeSocket:
    """What the kernel has to say; after that, nothing for now."""

    def __init__(self) -> None:
        self.said: list[bytes | OSError] = []
        self.bound: Any = None
        self.closed = False
        self.reads = 0

    def setsockopt(self, *_: int) -> None: ...

    def bind(self, address: Any) -> None:
        self.bound = address

    def fileno(self) -> int:
        return -1 if self.closed else 7

    def close(self) -> None:
        self.closed = True

    def recv(self, size: int) -> bytes:
        self.reads += 1
        if not self.said:
            raise BlockingIOError
        it = self.said.pop(0)
        if isinstance(it, OSError):
            raise it
        return it


class FakeReactor(Clock):
    """Knows who reads."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)


class AddressWatchTests(SynchronousTestCase):
    """The watch before a kernel that is the test."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.socket = FakeSocket()
        self.opened: list[tuple[int, ...]] = []
        self.refusal: OSError | None = None
        self.now: dict[Any, str | None] = {"IPv4": "192.0.2.2", "IPv6": None}
        self.looks = 0
        self.calls: list[Any] = []
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)
        self.watch = AddressWatch(self.reactor, self.calls.append, self.open, self.addressOf)
        self.looks = 0

    def open(self, *kind: int) -> Any:
        self.opened.append(kind)
        if self.refusal is not None:
            raise self.refusal
        return self.socket

    def addressOf(self, family: Any) -> str | None:
        self.looks += 1
        return self.now[family]

    def start(self) -> None:
        self.watch.startService()
        self.looks = 0

    def hear(self, *said: bytes | OSError) -> None:
        """The kernel says these; the reactor sees that, if anybody reads."""
        self.socket.said += said
        for reader in list(self.reactor.readers):
            reader.doRead()

    def settle(self) -> None:
        self.reactor.advance(AddressWatch.SETTLE)

    def warnings(self) -> int:
        return sum(it["log_level"] >= LogLevel.warn for it in self.events)

    def test_interface(self) -> None:
        """It is something that a reactor can read from."""
        verifyObject(IReadDescriptor, self.watch)

    def test_groups(self) -> None:
        """It hears of addresses, routes and rules of both families, and of links."""
        self.start()
        self.assertEqual(self.opened[0][0], socket.AF_NETLINK)
        self.assertEqual(self.socket.bound, (0, GROUPS))
        self.assertEqual(GROUPS, sum(1 << group - 1 for group in (1, 5, 7, 8, 9, 11, 19)))

    def test_otherAddress(self) -> None:
        """Another address is told, once, a moment after the word that it may be another one."""
        self.start()
        self.now["IPv4"] = "192.0.2.9"
        self.hear(b"x")
        self.assertEqual(self.calls, [])
        self.settle()
        self.assertEqual(self.calls, [{"IPv4": "192.0.2.9", "IPv6": None}])
        self.hear(b"x")
        self.settle()
        self.assertEqual(len(self.calls), 1)
        self.assertEqual(self.watch.addresses, {"IPv4": "192.0.2.9", "IPv6": None})

    def test_familyComesAndGoes(self) -> None:
        """A family that the node speaks from now on, and no longer, is told as well."""
        self.start()
        self.now["IPv6"] = "2001:db8::2"
        self.hear(b"x")
        self.settle()
        self.now["IPv6"] = None
        self.hear(b"x")
        self.settle()
        self.assertEqual([it["IPv6"] for it in self.calls], ["2001:db8::2", None])

    def test_burstsAreCheap(self) -> None:
        """Whatever comes within a moment costs one look: nobody listens meanwhile; and it tells nobody anything."""
        self.start()
        for _ in range(1000):
            self.hear(b"x" * 100)
        self.assertEqual((self.looks, self.reactor.readers), (0, set()))
        self.settle()
        self.assertEqual((self.looks, self.calls), (2, []))
        self.assertEqual(self.reactor.readers, {self.watch})

    def test_comesBack(self) -> None:
        """An address that is gone for less than that moment is nobody's business."""
        self.start()
        self.now["IPv4"] = None
        self.hear(b"x")
        self.now["IPv4"] = "192.0.2.2"
        self.hear(b"x")
        self.settle()
        self.assertEqual(self.calls, [])

    def test_overflow(self) -> None:
        """What the kernel could not keep for us is no reason to miss anything."""
        self.start()
        self.now["IPv4"] = "192.0.2.9"
        self.hear(OSError(errno.ENOBUFS, "No buffer space available"), b"x")
        self.settle()
        self.assertEqual(len(self.calls), 1)
        self.assertEqual(self.socket.said, [])
        self.assertEqual(self.reactor.readers, {self.watch})

    def test_neverSilent(self) -> None:
        """A kernel that goes on and on does not keep the reactor."""
        self.start()
        self.hear(*[b"x"] * 100_000)
        self.socket.reads = 0
        self.settle()
        self.assertLess(self.socket.reads, 1000)
        self.assertEqual(self.reactor.readers, {self.watch})

    def test_betweenReadingAndStart(self) -> None:
        """A change before the watch was there is found when it starts."""
        self.now["IPv4"] = "192.0.2.9"
        self.watch.startService()
        self.assertEqual(len(self.calls), 1)

    def test_stop(self) -> None:
        """After stopping there is no socket, no timer and no call; stopping twice is harmless."""
        self.start()
        self.now["IPv4"] = "192.0.2.9"
        self.hear(b"x")
        self.watch.stopService()
        self.watch.stopService()
        self.assertEqual((self.reactor.readers, self.reactor.getDelayedCalls()), (set(), []))
        self.assertTrue(self.socket.closed)
        self.assertEqual(self.calls, [])

    def test_noNetlink(self) -> None:
        """Where the kernel gives no such socket that is told, and all else goes on."""
        self.refusal = OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        self.start()
        self.assertEqual((self.reactor.readers, self.warnings()), (set(), 1))
        self.watch.stopService()

    def test_broken(self) -> None:
        """A socket that breaks ends the watch with a line in the log, not with an endless loop."""
        self.start()
        self.hear(OSError(errno.EBADF, "Bad file descriptor"))
        self.settle()
        self.assertEqual((self.reactor.readers, self.warnings()), (set(), 1))
        self.assertTrue(self.socket.closed)

    def test_connectionLost(self) -> None:
        """The same where the reactor finds it."""
        self.start()
        self.watch.connectionLost(Failure(OSError(errno.EBADF, "Bad file descriptor")))
        self.assertEqual((self.reactor.readers, self.warnings()), (set(), 1))
