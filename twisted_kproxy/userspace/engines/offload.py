"""What the kernel can do with trains of datagrams, and whether the engine in C works: tried, over loopback."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any

from twisted.internet.protocol import DatagramProtocol

from ...core.values import Endpoint
from ...interfaces import NotAvailable

#: Trains are taken in one piece, and are cut when sent.
GRO, GSO = 1, 2

#: Milliseconds that a datagram may take over loopback.
_WAIT = 100

# From linux/udp.h
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104


def probeOffload() -> int:
    """Whether the kernel takes trains of datagrams whole, and cuts them: tried over loopback, with three datagrams."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("127.0.0.1", 0))
            sender.connect(receiver.getsockname())
            sender.sendmsg((b"x" * 300,), ((SOL_UDP, UDP_SEGMENT, struct.pack("@H", 100)),))
            if any(len(_arrived(receiver)) != 100 for _ in range(3)):
                return 0
        except OSError:
            return 0
        try:
            receiver.setsockopt(SOL_UDP, UDP_GRO, 1)
            sender.sendmsg((b"x" * 300,), ((SOL_UDP, UDP_SEGMENT, struct.pack("@H", 100)),))
            return GSO | GRO if len(_arrived(receiver)) == 300 else GSO
        except OSError:
            return GSO


def described(offload: int) -> str:
    """That, for the log."""
    names = [name for flag, name in ((GRO, "GRO"), (GSO, "GSO")) if offload & flag]
    return f"with {' and '.join(names)}" if names else "without GRO and GSO"


def _arrived(receiver: socket.socket) -> bytes:
    """
    A datagram, or train; ``b""`` where none comes. Where the kernel leaves delivery to another processor, or to a
    thread of its own, one that was sent over loopback is not there at once.
    """
    poll = select.poll()
    poll.register(receiver, select.POLLIN)
    return receiver.recv(1000) if poll.poll(_WAIT) else b""


class _Trial(DatagramProtocol):
    """Leads a single client to a single endpoint."""

    noisy = False

    def __init__(self, sockets: Any, endpoint: Endpoint) -> None:
        self._sockets = sockets
        self._endpoint = endpoint
        self.flows = sockets.table()
        self.port = sockets.listen("IPv4", 0, self, self.flows)

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        flow = self.flows.make((addr, self.port.dialled), self._endpoint, 0.0, 0.0, ())
        connected = flow.socket = self._sockets.connect(self._endpoint, self, flow)
        self.flows.add(flow)
        connected.send(datagram)

    def close(self) -> None:
        for flow in self.flows:
            self.flows.remove(flow)
            if flow.socket is not None:
                flow.socket.close()
        self._sockets.close(self.port)


def selfTest(sockets: Any) -> None:
    """
    A few datagrams there and back, over loopback.

    :param sockets: the engine in C, a :class:`~.datagrams.NativeSockets`.
    :raise NotAvailable: where they do not come through.
    """
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as backend,
    ):
        try:
            backend.bind(("127.0.0.1", 0))
            trial = _Trial(sockets, Endpoint(*backend.getsockname()))
            try:
                client.connect(("127.0.0.1", trial.port.number))
                heard = [_relayed(sockets, client, backend, question) for question in (b"first", b"second")]
                traffic = tuple(trial.flows.traffic())
            finally:
                trial.close()
        except OSError as error:
            raise NotAvailable(f"its trial failed: {error}") from None
        # What Python sends first counts for no more than what it is told.
        if heard != [(b"first", b"re first"), (b"second", b"re second")] or traffic != (1, 6, 2, 17):
            raise NotAvailable(f"its trial gave {heard!r} and counted {traffic!r}")


def _relayed(
    sockets: Any, client: socket.socket, backend: socket.socket, question: bytes
) -> tuple[bytes, bytes]:
    for it in (client, backend):
        it.settimeout(_WAIT / 1000)
    client.send(question)
    sockets.relay(_WAIT)
    heard, address = backend.recvfrom(100)
    backend.sendto(b"re " + heard, address)
    sockets.relay(_WAIT)
    return heard, client.recv(100)
