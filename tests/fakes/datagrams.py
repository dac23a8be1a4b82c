"""
In the place of the kernel's UDP sockets, below either engine: a test says what arrives and which errors wait, and sees
what is sent. Descriptors are real ones, so that an engine may wait for them.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted_kproxy.core.values import Endpoint
from twisted_kproxy.userspace.engines.datagrams import NativePort, NativeSockets
from twisted_kproxy.userspace.udpport import WildcardPort
from twisted_kproxy.userspace.udpsockets import Sockets

_IP_PKTINFO = 8
_UDP_SEGMENT, _UDP_GRO, _SOL_UDP = 103, 104, 17

Address = tuple[Any, ...]


class FakeSocket:
    """
    A socket.

    :ivar sent: what the proxy has sent here. :ivar calls: how many went out with each call of the C engine.
    :ivar errors: one for each datagram that is sent next, 0 for none. :ivar trouble: what reading says next.
    :ivar trains: sizes of the datagrams of each train that was sent in one piece.
    :ivar noTrains: the error with which trains are refused.
    """

    def __init__(self, kernel: FakeKernel, endpoint: Endpoint | None = None) -> None:
        self.kernel = kernel
        self.endpoint = endpoint
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        kernel.sockets[self.fd] = self
        self.number = 0
        self.open = True
        self.arrivals: deque[tuple[bytes, Address, bytes, int]] = deque()
        self.sent: list[bytes] = []
        self.replies: list[tuple[bytes, Address, bytes]] = []
        self.calls: list[int] = []
        self.trains: list[int] = []
        self.noTrains = 0
        self.errors: list[int] = []
        self.trouble: list[int] = []

    # --- what a test does

    def reply(self, *datagrams: bytes, segment: int = 0) -> None:
        """The endpoint sends that."""
        self.arrive(*((datagram, (), b"", segment) for datagram in datagrams))

    def refuse(self, number: int = errno.ECONNREFUSED) -> None:
        """The network reports that error."""
        self.trouble.append(number)
        self.kernel.wake(self, select.EPOLLIN | select.EPOLLERR)

    def arrive(self, *datagrams: tuple[bytes, Address, bytes, int]) -> None:
        """Datagrams (or trains) with their senders, what these had dialled, and the size of a train's datagrams."""
        self.arrivals.extend(datagrams)
        self.kernel.wake(self, select.EPOLLIN)

    # --- what both engines do

    def take(self) -> tuple[bytes, Address, bytes, int]:
        """The next one."""
        if self.arrivals:
            return self.arrivals.popleft()
        raise OSError(self.trouble.pop(0) if self.trouble else errno.EAGAIN, "no datagram")

    def put(self, data: bytes, address: Address, dialled: bytes, segment: int) -> None:
        """That is sent."""
        assert self.open, "sent to a closed socket"
        if segment and self.noTrains:
            raise OSError(self.noTrains, "no trains")
        number = self.errors.pop(0) if self.errors else 0
        if number:
            raise OSError(number, "not sent")
        if segment:
            self.trains.append(segment)
        parts = [data[at : at + segment] for at in range(0, len(data), segment)] if segment else [data]
        self.sent += parts
        self.replies += [(part, address, dialled) for part in parts]

    # --- a socket of Python

    def fileno(self) -> int:
        return self.fd if self.open else -1

    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", self.number or 50000 + self.fd)

    def setsockopt(self, *_: Any) -> None: ...

    def bind(self, address: Address) -> None:
        if address[1] in self.kernel.taken:
            raise OSError(errno.EADDRINUSE, "in use")
        self.number = address[1] or 40000

    def close(self) -> None:
        if self.open:
            self.open = False
            del self.kernel.sockets[self.fd]
            os.close(self.fd)

    def recv(self, size: int) -> bytes:
        return self.take()[0]

    def recvmsg(self, size: int, space: int = 0, flags: int = 0) -> tuple[bytes, list[Any], int, Address]:
        if flags & socket.MSG_ERRQUEUE:
            raise BlockingIOError(errno.EAGAIN, "none")
        data, address, dialled, segment = self.take()
        train = [(_SOL_UDP, _UDP_GRO, struct.pack("@i", segment))] if segment else []
        return data, packetInfo(address, dialled) + train, 0, address

    def send(self, data: bytes) -> int:
        self.put(data, (), b"", 0)
        return len(data)

    def sendmsg(self, buffers: Any, ancillary: Any, flags: int = 0, address: Address = ()) -> int:
        data = b"".join(buffers)
        segment = next((struct.unpack("@H", it[2])[0] for it in ancillary if it[:2] == (_SOL_UDP, _UDP_SEGMENT)), 0)
        self.put(data, address, dialledIn([it[2] for it in ancillary]), segment)
        return len(data)


class FakeKernel:
    """Has the sockets, and tells an engine that something is there to be read."""

    def __init__(self) -> None:
        self.sockets: dict[int, FakeSocket] = {}
        self.taken: set[int] = set()
        self.wake: Callable[[FakeSocket, int], None] = lambda skt, events: None


class FakePoller:
    """In the place of the Poller."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int], object]] = {}

    def watch(self, fd: int, handler: Callable[[int], object], mask: int) -> None:
        self.handlers[fd] = handler

    def closing(self, fd: int) -> None:
        self.handlers.pop(fd, None)

    release = closing


def packetInfo(address: Address, dialled: bytes) -> list[tuple[int, int, bytes]]:
    """The control message that says where a datagram was sent to. In tests that is a letter; in here an address."""
    if not dialled:
        return []
    if len(address) == 4:
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, dialled.ljust(16, b"\0") + b"\7\0\0\0")]
    return [(socket.IPPROTO_IP, _IP_PKTINFO, b"\7\0\0\0" + dialled.ljust(4, b"\0") + b"\1\1\1\1")]


def dialledIn(contents: list[bytes]) -> bytes:
    """The letter, from the control messages of a reply."""
    for content in contents:
        if len(content) == 12:
            return content[4:8].rstrip(b"\0")
        if len(content) == 20:
            return content[:16].rstrip(b"\0")
    return b""


class FakePort(WildcardPort):
    """A port on a socket that is not real."""

    kernel: FakeKernel

    def createInternetSocket(self) -> Any:
        return FakeSocket(self.kernel)


class FakeNativePort(NativePort, FakePort):
    """The same for the engine in C."""


class FakesMixin:
    """
    An engine over fake sockets.

    :ivar connected: those that were opened. :ivar unreachable: errors that connecting gives.
    :ivar errors: endpoints whose sockets report these errors, one per datagram. :ivar own: addresses of ours.
    """

    def prepare(self) -> None:
        self.kernel = FakeKernel()
        self.connected: list[FakeSocket] = []
        self.unreachable: dict[Endpoint, int] = {}
        self.errors: dict[Endpoint, list[int]] = {}
        self.own: set[Address] = set()
        self.closed: list[Any] = []

    def _connect(self, endpoint: Endpoint) -> FakeSocket:
        if endpoint in self.unreachable:
            raise OSError(self.unreachable[endpoint], "no way")
        connected = FakeSocket(self.kernel, endpoint)
        connected.errors = self.errors.get(endpoint, [])
        self.connected.append(connected)
        return connected

    def isOwn(self, address: Address) -> bool:
        return address in self.own

    def close(self, service: Any) -> None:
        self.closed.append(service)
        super().close(service)  # type: ignore[misc]


class FakeSockets(FakesMixin, Sockets):
    """The engine in Python."""

    def __init__(self, reactor: Any, offload: int = 3) -> None:
        self.prepare()
        poller: Any = FakePoller()
        super().__init__(reactor, poller, offload)
        self.portType = type("Port", (FakePort,), {"kernel": self.kernel})

        def wake(skt: FakeSocket, events: int) -> None:
            while skt.arrivals or skt.trouble:
                handler = poller.handlers.get(skt.fileno())
                if handler is None:
                    return
                handler(events)

        self.kernel.wake = wake


class FakeNativeSockets(FakesMixin, NativeSockets):
    """
    The engine in C, whose two system calls are led here.

    :raise NotAvailable: where it was not built.
    """

    def __init__(self, reactor: Any, offload: int = 3) -> None:
        self.prepare()
        poller: Any = FakePoller()
        super().__init__(reactor, poller, offload)
        self.portType = type("Port", (FakeNativePort,), {"kernel": self.kernel})
        calls = self.lib.udp_calls(self.c)
        kind = "int(int, struct mmsghdr *, unsigned, int)"
        self._callbacks = self.ffi.callback(kind, self._receive), self.ffi.callback(kind, self._send)
        calls.receive, calls.send = self._callbacks
        self._clients: dict[bytes, Address] = {}

        def wake(skt: FakeSocket, events: int) -> None:
            if skt.open:
                os.eventfd_write(skt.fd, 1)
                self.relay(0)

        self.kernel.wake = wake

    def _failed(self, number: int | None) -> int:
        self.ffi.errno = number or errno.EIO
        return -1

    def _receive(self, fd: int, messages: Any, count: int, flags: int) -> int:
        if flags & socket.MSG_ERRQUEUE:
            return self._failed(errno.EAGAIN)
        skt = self.kernel.sockets[fd]
        for index in range(count):
            try:
                data, address, dialled, segment = skt.take()
            except OSError as error:
                if index:
                    return index
                try:
                    if not skt.trouble:
                        os.eventfd_read(fd)
                except BlockingIOError:
                    pass
                return self._failed(error.errno)
            self._fill(messages[index], data, address, dialled, segment)
        return count

    def _fill(self, message: Any, data: bytes, address: Address, dialled: bytes, segment: int) -> None:
        header = message.msg_hdr
        self.ffi.memmove(header.msg_iov.iov_base, data, len(data))
        message.msg_len = len(data)
        if address:
            name = packedName(address)
            self._clients[name] = address
            assert header.msg_namelen >= len(name), "no room for the sender"
            self.ffi.memmove(header.msg_name, name, len(name))
            header.msg_namelen = len(name)
        control = b"".join(packedControl(*it) for it in packetInfo(address, dialled))
        if segment:
            control += packedControl(_SOL_UDP, _UDP_GRO, struct.pack("@i", segment))
        assert header.msg_controllen >= len(control), "no room for control messages"
        self.ffi.memmove(header.msg_control, control, len(control))
        header.msg_controllen = len(control)

    def _send(self, fd: int, messages: Any, count: int, flags: int) -> int:
        skt = self.kernel.sockets[fd]
        for index in range(count):
            header = messages[index].msg_hdr
            data = bytes(self.ffi.buffer(header.msg_iov.iov_base, header.msg_iov.iov_len))
            name = bytes(self.ffi.buffer(header.msg_name, header.msg_namelen)) if header.msg_namelen else b""
            contents = unpackedControl(bytes(self.ffi.buffer(header.msg_control, header.msg_controllen)))
            segment = next((struct.unpack("@H", it[2])[0] for it in contents if it[:2] == (_SOL_UDP, _UDP_SEGMENT)), 0)
            dialled = dialledIn([it[2] for it in contents])
            try:
                skt.put(data, self._clients.get(name, ()), dialled, segment)
            except OSError as error:
                if index:
                    break
                return self._failed(error.errno)
        else:
            index = count
        skt.calls.append(index)
        return index


def packedName(address: Address) -> bytes:
    """A socket address as the kernel has it, as long as that of IPv6."""
    host, port, *rest = address
    if rest:
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0) + packed + struct.pack("=I", rest[1])
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)


def packedControl(level: int, kind: int, data: bytes) -> bytes:
    """A control message."""
    return struct.pack("@Nii", 16 + len(data), level, kind) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def unpackedControl(data: bytes) -> list[tuple[int, int, bytes]]:
    """Control messages: level, kind, content."""
    found = []
    while len(data) >= 16:
        size, level, kind = struct.unpack_from("@Nii", data)
        found.append((level, kind, data[16:size]))
        data = data[-(-size // 8) * 8 :]
    return found
