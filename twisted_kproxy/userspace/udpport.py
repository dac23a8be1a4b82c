"""
The datagram socket for all clients of a pool, bound to the wildcard.

It would answer from whatever address the route back suggests. A client, and the connection tracking that has rewritten
its datagram's destination, takes a reply only from the very address that the datagram was sent to. So that address is
read with every datagram (``IP_PKTINFO``, :manpage:`ip(7)`; ``IPV6_RECVPKTINFO``, RFC 3542 section 6) and given back
with every reply.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet import udp
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import DatagramProtocol
from twisted.logger import Logger

from ..core.values import Family
from .engines.offload import GRO, GSO, SOL_UDP, UDP_GRO, UDP_SEGMENT
from .engines.poller import READABLE, Poller
from .udpflows import DROPS, UNCUT, Flow

#: The most that a UDP length field can say: nothing is ever truncated.
LARGEST = 65535
#: How many datagrams one socket may read in one turn of the reactor, so that none starves the others.
TURN = 64
#: Bursts wait here while the reactor does other work. The kernel only charges what is queued.
SHARED_BUFFER = 1 << 20

# Of a train, in bytes: what fits a packet of either family.
_LONGEST = 65000
_ANCILLARY = socket.CMSG_SPACE(20) + socket.CMSG_SPACE(4)

# A node has few addresses that clients dial; how to answer from each is kept ready.
_ADDRESSES = 64

# As plain numbers: enumerations take long.
_IPPROTO_IP = int(socket.IPPROTO_IP)
_IPPROTO_IPV6 = int(socket.IPPROTO_IPV6)
_IPV6_PKTINFO = int(socket.IPV6_PKTINFO)

# From linux/in.h, asm-generic/socket.h: the socket module of Python 3.11 lacks them.
_IP_PKTINFO = 8
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


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
            if self.engine.offload & GRO:
                skt.setsockopt(SOL_UDP, UDP_GRO, 1)
            enlarge(skt, SHARED_BUFFER)
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
                segment = _segment(ancillary)
                if 0 < segment < len(datagram):
                    self._train(datagram, segment, address, dialled)
                    if not self.connected:
                        return
                    continue
            key = (address, dialled)
            flow = answered.get(key)
            if flow is not None and not flow.stale:
                answered.move_to_end(key)
            else:
                flow = new.get(key)
                if flow is None or flow.stale:
                    self._decide(datagram, address, dialled)
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

    def _train(self, data: bytes, segment: int, address: Any, dialled: bytes) -> None:
        """Datagrams of one size, the last one perhaps shorter, that came in one piece go on as one, if possible."""
        flow = self.flows.find((address, dialled))
        parts = [data[at : at + segment] for at in range(0, len(data), segment)]
        if flow is not None and not (flow.stale or flow.plain) and self.engine.offload & GSO:
            number = flow.socket.sendTrain(data, segment)
            if not number:
                self.flows.touch(flow, self._seconds())
                for part in parts:
                    self.flows.sent(flow, part)
                return
            if number in UNCUT:
                flow.plain = True
            else:
                self.protocol.unsent(flow, number, parts.pop(0))
        for part in parts:
            if self.connected:
                self._decide(part, address, dialled)

    def _decide(self, datagram: bytes, address: Any, dialled: bytes) -> None:
        self.dialled = dialled
        try:
            self.protocol.datagramReceived(datagram, address)
        except Exception:
            self.log.failure("A datagram was lost because of a defect")

    def reply(self, flow: Flow, datagram: bytes) -> None:
        """A flow's endpoint has sent this: send it to the client, from the address that it had dialled."""
        if not self.connected:
            return
        flows = self.flows
        key = flow.key
        if flow.answered:
            flow.used = self._seconds()
            flow.unanswered = None
            flows.answered.move_to_end(key)
        else:
            flows.answer(flow, self._seconds())
        client, dialled = key
        ancillary = self._ancillary.get(dialled)
        if ancillary is None:
            ancillary = self._ancillaryFor(dialled)
        try:
            self.socket.sendmsg((datagram,), ancillary, 0, client)
        except OSError as error:
            flows.drop(DROPS.get(error.errno or 0, "error"))
        else:
            flows.received(flow, len(datagram))

    def replies(self, flow: Flow, datagrams: list[bytes]) -> None:
        """Several at a time: as a train that the kernel cuts, where all are of one size, the last perhaps smaller."""
        size = len(datagrams[0])
        fits = 0 < size * len(datagrams) <= _LONGEST and {size}.issuperset(map(len, datagrams[:-1]))
        if not (
            fits
            and len(datagrams[-1]) <= size
            and not flow.plain
            and self.connected
            and self.engine.offload & GSO
            and self._replyTrain(flow, datagrams, size)
        ):
            for datagram in datagrams:
                self.reply(flow, datagram)

    def _replyTrain(self, flow: Flow, datagrams: list[bytes], size: int) -> bool:
        client, dialled = flow.key
        train = (SOL_UDP, UDP_SEGMENT, size.to_bytes(2, sys.byteorder))
        try:
            self.socket.sendmsg(datagrams, [*self._ancillaryFor(dialled), train], 0, client)
        except OSError as error:
            # One by one each is sent, or dropped for its own reason.
            flow.plain = error.errno in UNCUT
            return False
        self.flows.answer(flow, self._seconds())
        for datagram in datagrams:
            self.flows.received(flow, len(datagram))
        return True

    def _read(self, ancillary: list[tuple[int, int, bytes]]) -> bytes:
        dialled = _dialled(ancillary)
        if len(ancillary) == 1:
            if len(self._dialled) >= _ADDRESSES:
                self._dialled.clear()
            self._dialled[ancillary[0][2]] = dialled
        return dialled

    def _ancillaryFor(self, dialled: bytes) -> list[tuple[int, int, bytes]]:
        known = self._ancillary.get(dialled)
        if known is not None:
            return known
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


def _segment(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The size of a train's datagrams; 0 where it is none."""
    for level, kind, data in ancillary:
        if level == SOL_UDP and kind == UDP_GRO:
            return int.from_bytes(data[:4], sys.byteorder)
    return 0


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


def enlarge(skt: socket.socket, size: int) -> None:
    """Give a socket buffers of that size; what the administrator allows others where we lack the privilege."""
    for forced, allowed in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        if skt.getsockopt(socket.SOL_SOCKET, allowed) >= 2 * size:
            continue
        try:
            skt.setsockopt(socket.SOL_SOCKET, forced, size)
        except OSError:
            skt.setsockopt(socket.SOL_SOCKET, allowed, size)
