"""
The datagram sockets of the userspace dataplane, and nothing else: one bound to the wildcard for all clients of a pool,
one connected socket per client towards its endpoint. Who belongs to whom is decided elsewhere. An engine that goes
without Python for datagrams of known flows (:mod:`.engines.datagrams`) takes the place of :class:`Sockets`.

A wildcard socket would answer from whatever address the route back suggests. A client, and the connection tracking
that has rewritten its datagram's destination, takes a reply only from the very address that the datagram was sent to.
So that address is read with every datagram (``IP_PKTINFO``, :manpage:`ip(7)`; ``IPV6_RECVPKTINFO``, RFC 3542 section 6)
and given back with every reply.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet import udp
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import DatagramProtocol
from twisted.logger import Logger

from ..core.values import Endpoint, Family
from .engines.poller import ERROR, READABLE, Poller
from .sockets import familyOf, markOwn, openSocket
from .udpflows import DROPS, Address, Flow, Flows, FlowTable

#: The most that a UDP length field can say: nothing is ever truncated.
LARGEST = 65535
#: How many datagrams one socket may read in one turn of the reactor, so that none starves the others.
TURN = 64
# So many datagrams one after the other are a lot.
_BULK = 3
#: Bursts wait here while the reactor does other work. The kernel only charges what is queued.
SHARED_BUFFER = 1 << 20
CLIENT_BUFFER = 1 << 18

_ANCILLARY = socket.CMSG_SPACE(20)

# A node has few addresses that clients dial; how to answer from each is kept ready.
_ADDRESSES = 64

# As plain numbers: enumerations take long.
_IPPROTO_IP = int(socket.IPPROTO_IP)
_IPPROTO_IPV6 = int(socket.IPPROTO_IPV6)
_IPV6_PKTINFO = int(socket.IPV6_PKTINFO)

# From linux/in.h, in6.h, asm-generic/socket.h: the socket module of Python 3.11 lacks them.
_IP_PKTINFO = 8
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

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


class WildcardPort(udp.Port):
    """
    The socket on every local address of one family. It relays what clients with a flow send. For any other it calls
    ``datagramReceived(datagram, address)`` of its protocol with the kernel's whole socket address; meanwhile
    :attr:`dialled` says where the datagram was sent to.

    :param engine: what has made it.
    :param flows: the flows of its clients, which it looks up itself.
    :ivar dialled: opaque, hashable: a part of the flow's key.
    """

    log = Logger()

    dialled = b""

    def __init__(
        self,
        reactor: Any,
        poller: Poller,
        family: Family,
        port: int,
        protocol: DatagramProtocol,
        flows: Any,
        engine: Any,
    ) -> None:
        interface = "::" if family == "IPv6" else "0.0.0.0"
        udp.Port.__init__(self, port, protocol, interface, LARGEST, reactor)  # type: ignore[no-untyped-call]
        self.flows = flows
        self.engine = engine
        self._poller = poller
        self._seconds: Callable[[], float] = reactor.seconds
        self._dialled: dict[bytes, bytes] = {}
        self._ancillary: dict[bytes, list[tuple[int, int, bytes]]] = {}

    @property
    def number(self) -> int:
        """The local port; 0 while it does not listen."""
        return self._realPortNumber or 0

    def startListening(self) -> None:
        """
        :raise OSError: (or :class:`twisted.internet.error.CannotListenError`) when that cannot be; nothing is left
            open then.
        """
        skt = self.createInternetSocket()
        try:
            skt.bind((self.interface, self.port))
        except OSError as error:
            skt.close()
            raise CannotListenError(self.interface, self.port, error) from error  # type: ignore[no-untyped-call]
        self._preexistingSocket = skt  # type: ignore[assignment]
        udp.Port.startListening(self)  # type: ignore[no-untyped-call]

    def createInternetSocket(self) -> socket.socket:
        skt: socket.socket = udp.Port.createInternetSocket(self)
        try:
            if self.addressFamily == socket.AF_INET6:
                # The other family has a socket of its own, perhaps on the same port.
                skt.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                skt.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                skt.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            _enlarge(skt, SHARED_BUFFER)
        except BaseException:
            skt.close()
            raise
        return skt

    def startReading(self) -> None:
        self._poller.watch(self.socket.fileno(), self._readable, READABLE)

    def stopReading(self) -> None:
        self._poller.closing(self.socket.fileno())

    def _readable(self, events: int) -> None:
        # Whatever can be done without a call is: this runs for each datagram.
        receive, flows, protocol, known = self.socket.recvmsg, self.flows, self.protocol, self._dialled
        answered, new, now = flows.answered, flows.new, self._seconds()
        for _ in range(TURN):
            try:
                datagram, ancillary, _flags, address = receive(LARGEST, _ANCILLARY)
            except BlockingIOError:
                return
            except OSError as error:
                # Nothing is known that would cause it, and whatever it is ends with this turn.
                self.log.warn("Reading from UDP port {port} failed: {error}", port=self._realPortNumber, error=error)
                return
            dialled = known.get(ancillary[0][2]) if len(ancillary) == 1 else None
            if dialled is None:
                dialled = self._read(ancillary)
            key = (address, dialled)
            flow = answered.get(key)
            if flow is not None and not flow.stale:
                answered.move_to_end(key)
            else:
                flow = new.get(key)
                if flow is None or flow.stale:
                    self.dialled = dialled
                    try:
                        protocol.datagramReceived(datagram, address)
                    except Exception:
                        self.log.failure("A datagram was lost because of a defect")
                    if not self.connected:
                        return
                    continue
                new.move_to_end(key)
            flow.used = now
            number = flow.socket.send(datagram)
            if number:
                protocol.unsent(flow, number, datagram)
            else:
                flows.sent(flow, datagram)

    def reply(self, flow: Flow, datagram: bytes) -> None:
        """A flow's endpoint has sent this: send it to the client, from the address that it had dialled."""
        if not self.connected:
            return
        flows = self.flows
        flows.answer(flow, self._seconds())
        client, dialled = flow.key
        ancillary = self._ancillary.get(dialled)
        if ancillary is None:
            ancillary = self._ancillaryFor(dialled)
        try:
            self.socket.sendmsg((datagram,), ancillary, 0, client)
        except OSError as error:
            flows.drop(DROPS.get(error.errno or 0, "error"))
        else:
            flows.received(flow, len(datagram))

    def _read(self, ancillary: list[tuple[int, int, bytes]]) -> bytes:
        dialled = _dialled(ancillary)
        if len(ancillary) == 1:
            if len(self._dialled) >= _ADDRESSES:
                self._dialled.clear()
            self._dialled[ancillary[0][2]] = dialled
        return dialled

    def _ancillaryFor(self, dialled: bytes) -> list[tuple[int, int, bytes]]:
        if len(self._ancillary) >= _ADDRESSES:
            self._ancillary.clear()
        six = self.addressFamily == socket.AF_INET6
        level, kind = (_IPPROTO_IPV6, _IPV6_PKTINFO) if six else (_IPPROTO_IP, _IP_PKTINFO)
        ancillary = self._ancillary[dialled] = [(level, kind, dialled)] if dialled else []
        return ancillary

    def stopListening(self) -> Deferred[None]:
        """The socket is closed, and its port free, when this returns."""
        if self.connected:
            self.stopReading()
            self.connectionLost()  # type: ignore[no-untyped-call]
        return succeed(None)


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
        while count < most:
            skt = self._socket
            if skt is None:
                return
            count += 1
            try:
                datagram = skt.recv(LARGEST)
            except BlockingIOError:
                if count <= _BULK:
                    self._bulk = 0
                break
            except OSError as error:
                # Whatever the endpoint had sent before still counts: read on, report afterwards.
                trouble = error.errno or errno.EIO
                self._drainErrors()
                continue
            self._port.reply(self._flow, datagram)
        else:
            self._bulk += 1
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
    """

    #: For the log.
    description = "one at a time"
    portType: type[WildcardPort] = WildcardPort

    def __init__(self, reactor: Any, poller: Poller) -> None:
        self._reactor = reactor
        self._poller = poller
        self._connected: set[Address] = set()
        self._forget = self._connected.discard
        self._listening: set[int] = set()

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
            _enlarge(skt, CLIENT_BUFFER)
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


def _dialled(ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The control message of a reply from where the datagram was sent to; ``b""`` where that cannot be."""
    for level, kind, data in ancillary:
        if kind == _IP_PKTINFO and level == _IPPROTO_IP:
            # struct in_pktinfo: interface, local address (never a broadcast one), destination of the header.
            return b"\0\0\0\0" + data[4:8] + b"\0\0\0\0"
        if kind == _IPV6_PKTINFO and level == _IPPROTO_IPV6:
            # struct in6_pktinfo: destination, interface; that one matters for link-local addresses only.
            if data[0] == 0xFF:
                return b""
            return data[:20] if data[0] == 0xFE and data[1] & 0xC0 == 0x80 else data[:16] + b"\0\0\0\0"
    return b""


def _enlarge(skt: socket.socket, size: int) -> None:
    """Give a socket buffers of that size; what the administrator allows others where we lack the privilege."""
    for forced, allowed in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        if skt.getsockopt(socket.SOL_SOCKET, allowed) >= 2 * size:
            continue
        try:
            skt.setsockopt(socket.SOL_SOCKET, forced, size)
        except OSError:
            skt.setsockopt(socket.SOL_SOCKET, allowed, size)


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
