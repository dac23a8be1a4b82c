"""
The datagram sockets of the userspace dataplane, and nothing else: one for all clients of a pool (:mod:`.udpport`), one
connected socket per client towards its endpoint. Who belongs to whom is decided elsewhere. An engine that goes without
Python for datagrams of known flows (:mod:`.engines.datagrams`) takes the place of :class:`Sockets`.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.protocol import DatagramProtocol

from ..core.values import Endpoint, Family
from .engines.offload import SOL_UDP, UDP_SEGMENT, described, probeOffload
from .engines.poller import ERROR, READABLE, Poller
from .sockets import familyOf, markOwn, openSocket
from .udpflows import Address, Flows, FlowTable
from .udpport import LARGEST, TURN, WildcardPort, enlarge

# So many datagrams one after the other are a lot.
_BULK = 3
#: Bursts wait here while the reactor does other work.
CLIENT_BUFFER = 1 << 18

# From linux/in.h, in6.h: the socket module of Python 3.11 lacks them.
_IP_RECVERR = 11
_IPV6_RECVERR = 25

_DATAGRAMS = int(socket.SOCK_DGRAM)


class Receiver(Protocol):
    """Who decides: it has the flows, as their engine calls it."""

    transport: Any

    def datagramReceived(self, datagram: bytes, addr: Address) -> None:
        """A client without a flow, or one that must move, has sent this; ``transport`` has whom it had dialled."""

    def unsent(self, flow: Any, number: int, datagram: bytes) -> None:
        """The kernel has not taken a client's datagram for the flow's endpoint, with this error number."""

    def failed(self, flow: Any, number: int) -> None:
        """The network says, by ICMP, that what was sent did not arrive, with this error number."""


class PlainSocket:
    """
    One client's socket, connected to its endpoint: the kernel lets through nothing but this endpoint's datagrams, and
    the ICMP errors that ours caused.

    :ivar local: its own address and port.
    """

    __slots__ = ("_closed", "_socket", "local")

    def __init__(self, skt: socket.socket, closed: Callable[[Address], None]) -> None:
        self._socket: socket.socket | None = skt
        self._closed = closed
        self.local: Address = skt.getsockname()[:2]

    def send(self, datagram: bytes) -> int:
        """
        Send to the endpoint.

        :return: an error number; 0 where it was sent. The error may be that of an earlier datagram; this one was not
            sent then.
        """
        if self._socket is None:
            return errno.EBADF
        try:
            self._socket.send(datagram)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def sendTrain(self, data: bytes, segment: int) -> int:
        """The same with datagrams of that size, which the kernel cuts."""
        if self._socket is None:
            return errno.EBADF
        try:
            self._socket.sendmsg((data,), ((SOL_UDP, UDP_SEGMENT, segment.to_bytes(2, sys.byteorder)),))
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def close(self) -> None:
        """Close at once. Nothing is reported any more. Twice is harmless."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._closed(self.local)

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()


class EndpointSocket(PlainSocket):
    """One whose datagrams Python carries to the client, from the port that its receiver listens on now."""

    __slots__ = ("_bulk", "_flow", "_poller", "_port", "_receiver")

    def __init__(
        self, poller: Poller, skt: socket.socket, receiver: Receiver, flow: Any, closed: Callable[[Address], None]
    ) -> None:
        super().__init__(skt, closed)
        self._poller = poller
        self._receiver = receiver
        self._port = receiver.transport
        self._flow = flow
        self._bulk = 0
        poller.watch(skt.fileno(), self._readable, READABLE)

    def close(self) -> None:
        if self._socket is not None:
            self._poller.closing(self._socket.fileno())
            super().close()

    def _readable(self, events: int) -> None:
        # To hear that nothing more is there takes as long as to read a datagram. The poller tells where there is more,
        # so only one that has much to say is read until it has no more.
        trouble = count = 0
        most = TURN if events & ERROR or self._bulk >= _BULK else 1
        replies: list[bytes] = []
        while count < most:
            skt = self._socket
            if skt is None:
                return
            count += 1
            try:
                replies.append(skt.recv(LARGEST))
            except BlockingIOError:
                if count <= _BULK:
                    self._bulk = 0
                break
            except OSError as error:
                # Whatever the endpoint had sent before still counts: read on, report afterwards.
                trouble = error.errno or errno.EIO
                self._drainErrors()
        else:
            self._bulk += 1
        if len(replies) == 1:
            self._port.reply(self._flow, replies[0])
        elif replies:
            self._port.replies(self._flow, replies)
        if events & ERROR:
            self._drainErrors()
        if trouble and self._socket is not None:
            self._receiver.failed(self._flow, trouble)

    def _drainErrors(self) -> None:
        # Each error is told twice: as the result of the next call, and in this queue. A queue that is not emptied
        # keeps the socket in its error condition, and the reactor busy.
        for _ in range(TURN):
            if self._socket is None:
                return
            try:
                self._socket.recvmsg(0, 0, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            except OSError:
                return


class Sockets:
    """
    Opens the sockets, and knows which they are: a datagram that one of them sent must never be taken for a client's,
    or it would go round for ever. So there is one for all proxiers of a process.

    :param reactor: provides IReactorTime.
    :param poller: tells when there is something to read.
    :param offload: whether the kernel takes trains of datagrams and cuts them (:data:`~.engines.offload.GRO`,
        :data:`~.engines.offload.GSO`); ``None`` to try.
    """

    portType: type[WildcardPort] = WildcardPort

    def __init__(self, reactor: Any, poller: Poller, offload: int | None = None) -> None:
        self.offload = probeOffload() if offload is None else offload
        self._reactor = reactor
        self._poller = poller
        self._connected: set[Address] = set()
        self._forget = self._connected.discard
        self._listening: set[int] = set()

    @property
    def description(self) -> str:
        """How it goes about it, for the log."""
        return f"one at a time, {described(self.offload)}"

    def table(self) -> Flows:
        """A table for the flows of one proxier."""
        return FlowTable()

    def listen(self, family: Family, port: int, protocol: DatagramProtocol, flows: Flows) -> WildcardPort:
        """
        :param flows: what :meth:`table` gave: the flows of this port's clients.
        :raise OSError: (or :class:`twisted.internet.error.CannotListenError`) when that cannot be.
        """
        service = self.portType(self._reactor, self._poller, family, port, protocol, flows, self)
        service.startListening()
        self._listening.add(service.number)
        return service

    def close(self, service: WildcardPort) -> None:
        """Stop listening at once."""
        self._listening.discard(service.number)
        service.stopListening()

    def connect(self, endpoint: Endpoint, receiver: Receiver, flow: Any) -> PlainSocket:
        """
        A socket connected to an endpoint. Nothing is sent by that.

        :raise OSError: when there is no route, no descriptor, or no local port left.
        """
        skt = self._connect(endpoint)
        try:
            connected = EndpointSocket(self._poller, skt, receiver, flow, self._forget)
        except BaseException:
            skt.close()
            raise
        self._connected.add(connected.local)
        return connected

    def _connect(self, endpoint: Endpoint) -> socket.socket:
        family = familyOf(endpoint.address)
        skt = openSocket(family, _DATAGRAMS)
        try:
            skt.setblocking(False)
            markOwn(skt)
            # Without it, "host unreachable" and its like never reach a UDP socket: an endpoint whose node is dead
            # would go unnoticed (RFC 1122 section 4.1.3.3 asks for it).
            if family == socket.AF_INET6:
                skt.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            else:
                skt.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            enlarge(skt, CLIENT_BUFFER)
            skt.connect((endpoint.address, endpoint.port))
        except BaseException:
            skt.close()
            raise
        return skt

    def isOwn(self, address: Address) -> bool:
        """Whether a datagram from there was sent by one of these sockets."""
        if address[:2] in self._connected:
            return True
        return address[1] in self._listening and _isHere(address[0])


def _isHere(host: str) -> bool:
    """Whether that is an address of this node: the kernel's route to it starts at itself. Sends nothing."""
    if host.startswith("127.") or host == "::1":
        return True
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return False
        return bool(probe.getsockname()[0] == host)
