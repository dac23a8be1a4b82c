"""
UDP in batches (``datagrams.c``): datagrams of known flows go both ways in C, up to 64 per system call, and trains of
equal ones in one piece where the kernel can (GRO, GSO). Whom a client is led to, and what becomes of it when its
endpoint fails, stays in Python: the C side asks.
"""

from __future__ import annotations

import os
import select
from typing import Any

from twisted.logger import Logger

from ...core.values import Endpoint
from ...interfaces import NotAvailable
from ..udpport import WildcardPort
from ..udpsockets import PlainSocket, Receiver, Sockets
from .nativeflows import NativeTable
from .offload import GRO, SOL_UDP, UDP_GRO, described
from .poller import READABLE, Poller

_UNKNOWN, _UNSENT, _REPORTED = 1, 2, 3


class NativePort(WildcardPort):
    """The socket for all clients, which C reads."""

    def startReading(self) -> None:
        self.engine.attach(self)

    def stopReading(self) -> None:
        self.engine.detach(self)


class NativeSockets(Sockets):
    """
    The engine in C. One for all proxiers; all of its sockets are in one epoll object, which is nested in the reactor's.

    :raise NotAvailable: where the C module was not built, or does not work.
    """

    log = Logger()
    portType = NativePort

    def __init__(self, reactor: Any, poller: Poller, offload: int | None = None) -> None:
        super().__init__(reactor, poller, offload)
        try:
            from ._datagrams import ffi, lib  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise NotAvailable(f"its C module is not there ({error}); install with a C compiler at hand") from None
        self.ffi, self.lib = ffi, lib
        engine = lib.udp_new(self.offload)
        if engine == ffi.NULL:
            raise NotAvailable("it gets no descriptors or no memory")
        self.c = ffi.gc(engine, lib.udp_free)
        self._ask = ffi.new("struct ask *")
        self._fd = lib.udp_fd(engine)
        #: address of the service in memory → its port
        self._ports: dict[int, NativePort] = {}

    @property
    def description(self) -> str:
        return f"in batches, {described(self.offload)}"

    def address(self, c: Any) -> int:
        """Where that is in memory."""
        return int(self.ffi.cast("uintptr_t", c))

    # --- Sockets

    def table(self) -> NativeTable:
        return NativeTable(self.ffi, self.lib, self.c)

    def connect(self, endpoint: Endpoint, receiver: Receiver, flow: Any) -> PlainSocket:
        skt = self._connect(endpoint)
        try:
            if self.offload & GRO:
                skt.setsockopt(SOL_UDP, UDP_GRO, 1)
            connected = PlainSocket(skt, self._forget)
        except BaseException:
            skt.close()
            raise
        self._connected.add(connected.local)
        return connected

    # --- what ports tell

    def attach(self, port: NativePort) -> None:
        """Read that socket."""
        failed = self.lib.udp_listen(self.c, port.flows.c, port.socket.fileno())
        if failed:
            raise OSError(-failed, os.strerror(-failed))
        if not self._ports:
            self._poller.watch(self._fd, self._readable, READABLE)
        self._ports[self.address(port.flows.c)] = port

    def detach(self, port: NativePort) -> None:
        """It is about to be closed."""
        self.lib.udp_deafen(self.c, port.flows.c)
        if self._ports.pop(self.address(port.flows.c), None) is not None and not self._ports:
            self._poller.release(self._fd)

    def relay(self, wait: int) -> None:
        """Wait for something to relay, so many milliseconds at most, and do it; for the trial."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if poll.poll(wait):
            self._readable(0)

    # --- inside

    def _readable(self, events: int) -> None:
        run, engine, ask, seconds = self.lib.udp_run, self.c, self._ask, self._reactor.seconds
        while run(engine, seconds(), ask):
            try:
                self._decide(ask)
            except Exception:
                self.log.failure("A datagram was lost because of a defect")

    def _decide(self, ask: Any) -> None:
        port = self._ports.get(self.address(ask.service))
        if port is None:
            return
        proxier: Any = port.protocol
        if ask.what == _UNKNOWN:
            address, port.dialled = port.flows.unpacked(ask.key)
            proxier.datagramReceived(bytes(self.ffi.buffer(ask.data, ask.size)), address)
        elif ask.what == _UNSENT:
            flow = port.flows.flows[self.address(ask.flow)]
            proxier.unsent(flow, ask.number, bytes(self.ffi.buffer(ask.data, ask.size)))
        else:
            proxier.failed(port.flows.flows[self.address(ask.flow)], ask.number)
