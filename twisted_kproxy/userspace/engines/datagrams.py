"""
UDP in batches (``datagrams.c``): datagrams of known flows go both ways in C, up to 64 per system call, and trains of
equal ones in one piece where the kernel can (GRO, GSO). Whom a client is led to, and what becomes of it when its
endpoint fails, stays in Python: the C side asks.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from twisted.internet.protocol import DatagramProtocol
from twisted.logger import Logger

from ...core.values import Endpoint
from ...interfaces import NotAvailable
from ..udpflows import KEPT, Connected, FlowKey, Traffic
from ..udpsockets import PlainSocket, Receiver, Sockets, WildcardPort
from .poller import READABLE, Poller

_UNKNOWN, _UNSENT, _REPORTED = 1, 2, 3
_GRO, _GSO = 1, 2
_REASONS = ("too-long", "busy", "error")

# From linux/udp.h
_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104


class NativeFlow:
    """An :class:`~twisted_kproxy.userspace.udpflows.AnyFlow` that C has; C counts."""

    __slots__ = ("_kept", "_table", "_tried", "c", "endpoint", "since", "socket")

    def __init__(
        self, table: NativeTable, c: Any, endpoint: Endpoint, since: float, tried: tuple[Endpoint, ...]
    ) -> None:
        self._table = table
        self.c = c
        self.endpoint = endpoint
        self.since = since
        self.socket: Connected | None = None
        self._tried = tried
        self._kept: bytes | None = None

    @property
    def key(self) -> FlowKey:
        return self._table.unpacked(self.c.key)

    @property
    def used(self) -> float:
        return float(self.c.used)

    @property
    def answered(self) -> bool:
        return bool(self.c.answered)

    @property
    def tried(self) -> tuple[Endpoint, ...]:
        return () if self.c.answered else self._tried

    @property
    def unanswered(self) -> bytes | None:
        return self._kept if self._kept is not None else self._table.kept(self.c)

    @property
    def sent(self) -> int:
        return int(self.c.sent)

    @property
    def received(self) -> int:
        return int(self.c.received)

    @property
    def stale(self) -> bool:
        return bool(self.c.stale)

    @stale.setter
    def stale(self, stale: bool) -> None:
        self.c.stale = stale

    def ended(self) -> None:
        """C forgets it: what may still be asked for is kept here."""
        self._kept = self._table.kept(self.c)


class NativeTable:
    """:class:`~twisted_kproxy.userspace.udpflows.Flows` that C has."""

    def __init__(self, engine: NativeSockets) -> None:
        self._engine = engine
        self._lib, self._ffi = engine.lib, engine.ffi
        service = self._ffi.new("struct service *")
        self._lib.udp_service(service)
        self.c = self._ffi.gc(service, self._lib.udp_emptied)
        #: address in memory → flow
        self.flows: dict[int, NativeFlow] = {}
        self._drops: dict[str, int] = {}
        self._key = self._ffi.new("struct key *")

    def __len__(self) -> int:
        return int(self.c.count)

    def __iter__(self) -> Iterator[NativeFlow]:
        return iter(list(self.flows.values()))

    def __contains__(self, flow: NativeFlow) -> bool:
        return self.flows.get(self._engine.address(flow.c)) is flow

    def _inOrder(self, answered: bool) -> Iterator[NativeFlow]:
        ring = self._ffi.addressof(self.c, "answered" if answered else "unanswered")
        flow = ring.newer
        while flow != ring:
            yield self.flows[self._engine.address(flow)]
            flow = flow.newer

    @property
    def unanswered(self) -> int:
        return int(self.c.unansweredCount)

    # --- flows

    def make(
        self, key: FlowKey, endpoint: Endpoint, now: float, since: float, tried: tuple[Endpoint, ...]
    ) -> NativeFlow:
        flow = self._ffi.new("struct flow *")
        self._lib.udp_flow(flow)
        flow.used = now
        self._pack(key, flow.key)
        return NativeFlow(self, flow, endpoint, since, tried)

    def find(self, key: FlowKey) -> NativeFlow | None:
        self._pack(key, self._key)
        found = self._lib.udp_find(self._engine.c, self.c, self._key)
        return self.flows[self._engine.address(found)] if found else None

    def add(self, flow: NativeFlow) -> None:
        fd = flow.socket.fileno() if isinstance(flow.socket, PlainSocket) else -1
        failed = self._lib.udp_add(self._engine.c, self.c, flow.c, fd)
        if failed:
            raise OSError(-failed, os.strerror(-failed))
        self.flows[self._engine.address(flow.c)] = flow

    def remove(self, flow: NativeFlow) -> None:
        del self.flows[self._engine.address(flow.c)]
        flow.ended()
        self._lib.udp_remove(self._engine.c, flow.c)

    def touch(self, flow: NativeFlow, now: float) -> None:
        self._lib.udp_touch(flow.c, now)

    def answer(self, flow: NativeFlow, now: float) -> None:
        self._lib.udp_answer(flow.c, now)
        self._lib.udp_keep(flow.c, self._ffi.NULL, -1)

    def sent(self, flow: NativeFlow, datagram: bytes) -> None:
        size = len(datagram)
        flow.c.sent += size
        self.c.sentBytes += size
        self.c.sentCount += 1
        self._lib.udp_keep(flow.c, datagram, size if size <= KEPT else -1)

    def drop(self, reason: str) -> None:
        self._drops[reason] = self._drops.get(reason, 0) + 1

    def drops(self) -> Mapping[str, int]:
        drops = dict(self._drops)
        for reason, count in zip(_REASONS, self.c.dropped, strict=True):
            if count:
                drops[reason] = drops.get(reason, 0) + count
        return drops

    def traffic(self) -> Traffic:
        c = self.c
        return Traffic(c.sentCount, c.sentBytes, c.receivedCount, c.receivedBytes)

    def victim(self) -> NativeFlow | None:
        return next(self._inOrder(False), None) or next(self._inOrder(True), None)

    def idle(self, before: float, atMost: int) -> list[NativeFlow]:
        found: list[NativeFlow] = []
        for answered in (False, True):
            for flow in self._inOrder(answered):
                if len(found) == atMost or flow.used > before:
                    break
                found.append(flow)
        return found

    def oldest(self) -> float | None:
        fronts = (next(self._inOrder(False), None), next(self._inOrder(True), None))
        return min((flow.used for flow in fronts if flow is not None), default=None)

    # --- between C and Python

    def kept(self, c: Any) -> bytes | None:
        """The last datagram sent, while nothing has come back since."""
        return bytes(self._ffi.buffer(c.kept, c.keptSize)) if c.keptSize >= 0 else None

    def _pack(self, key: FlowKey, into: Any) -> None:
        (host, port, *rest), dialled = key
        six = ":" in host
        address = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, host.partition("%")[0])
        into.address = address.ljust(16, b"\0")
        into.six = six
        into.port = port
        into.scope = rest[1] if rest else 0
        into.dialledSize = len(dialled)
        into.dialled = dialled.ljust(24, b"\0")

    def unpacked(self, key: Any) -> FlowKey:
        """A client's address, and what it had dialled."""
        dialled = bytes(key.dialled)[: key.dialledSize]
        if key.six:
            host = socket.inet_ntop(socket.AF_INET6, bytes(key.address))
            zone = f"%{_zone(key.scope)}" if key.scope else ""
            return (host + zone, key.port, 0, key.scope), dialled
        return (socket.inet_ntop(socket.AF_INET, bytes(key.address)[:4]), key.port), dialled


class NativePort(WildcardPort):
    """The socket for all clients, which C reads."""

    def startReading(self) -> None:
        self.engine.attach(self)

    def stopReading(self) -> None:
        self.engine.detach(self)


class NativeSockets(Sockets):
    """
    The engine in C. One for all proxiers; all of its sockets are in one epoll object, which is nested in the reactor's.

    :param offload: whether the kernel takes trains of datagrams and cuts them (bits 1 and 2); ``None`` to try.
    :raise NotAvailable: where the C module was not built, or does not work.
    """

    log = Logger()
    portType = NativePort

    def __init__(self, reactor: Any, poller: Poller, offload: int | None = None) -> None:
        super().__init__(reactor, poller)
        try:
            from ._datagrams import ffi, lib  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise NotAvailable(f"its C module is not there ({error}); install with a C compiler at hand") from None
        self.ffi, self.lib = ffi, lib
        self.offload = probeOffload() if offload is None else offload
        engine = lib.udp_new(self.offload)
        if engine == ffi.NULL:
            raise NotAvailable("it gets no descriptors or no memory")
        self.c = ffi.gc(engine, lib.udp_free)
        self._ask = ffi.new("struct ask *")
        self._fd = lib.udp_fd(engine)
        #: address of the service in memory → its port
        self._ports: dict[int, NativePort] = {}

    @property
    def description(self) -> str:  # type: ignore[override]
        offloads = [name for flag, name in ((_GRO, "GRO"), (_GSO, "GSO")) if self.offload & flag]
        return f"in batches, {' and '.join(offloads) or 'without GRO and GSO'}"

    def address(self, c: Any) -> int:
        """Where that is in memory."""
        return int(self.ffi.cast("uintptr_t", c))

    # --- Sockets

    def table(self) -> NativeTable:
        return NativeTable(self)

    def connect(self, endpoint: Endpoint, receiver: Receiver, flow: Any) -> PlainSocket:
        skt = self._connect(endpoint)
        try:
            if self.offload & _GRO:
                skt.setsockopt(_SOL_UDP, _UDP_GRO, 1)
            connected = PlainSocket(skt, self._forget)
        except BaseException:
            skt.close()
            raise
        self._connected.add(connected.local)
        return connected

    # --- what ports tell

    def attach(self, port: NativePort) -> None:
        """Read that socket."""
        if self.offload & _GRO:
            port.socket.setsockopt(_SOL_UDP, _UDP_GRO, 1)
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


def _zone(scope: int) -> str:
    try:
        return socket.if_indextoname(scope)
    except OSError:
        return str(scope)


class _Trial(DatagramProtocol):
    """Leads a single client to a single endpoint."""

    noisy = False

    def __init__(self, sockets: NativeSockets, endpoint: Endpoint) -> None:
        self._sockets = sockets
        self._endpoint = endpoint
        self.flows = sockets.table()
        self.port = sockets.listen("IPv4", 0, self, self.flows)

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        flow = self.flows.make((addr, self.port.dialled), self._endpoint, 0.0, 0.0, ())
        connected = flow.socket = self._sockets.connect(self._endpoint, self, flow)  # type: ignore[arg-type]
        self.flows.add(flow)
        connected.send(datagram)

    def close(self) -> None:
        for flow in self.flows:
            self.flows.remove(flow)
            if flow.socket is not None:
                flow.socket.close()
        self._sockets.close(self.port)


def selfTest(sockets: NativeSockets) -> None:
    """
    A few datagrams there and back, over loopback.

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
    sockets: NativeSockets, client: socket.socket, backend: socket.socket, question: bytes
) -> tuple[bytes, bytes]:
    client.send(question)
    sockets.relay(100)
    backend.settimeout(0)
    heard, address = backend.recvfrom(100)
    backend.sendto(b"re " + heard, address)
    sockets.relay(100)
    client.settimeout(0)
    return heard, client.recv(100)


def probeOffload() -> int:
    """Whether the kernel takes trains of datagrams whole, and cuts them: tried over loopback, with three datagrams."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("127.0.0.1", 0))
            sender.connect(receiver.getsockname())
            sender.sendmsg((b"x" * 300,), ((_SOL_UDP, _UDP_SEGMENT, struct.pack("@H", 100)),))
            if len(_arrived(receiver)) != 100:
                return 0
            while _arrived(receiver, wait=0):
                pass
        except OSError:
            return 0
        try:
            receiver.setsockopt(_SOL_UDP, _UDP_GRO, 1)
            sender.sendmsg((b"x" * 300,), ((_SOL_UDP, _UDP_SEGMENT, struct.pack("@H", 100)),))
            return _GSO | _GRO if len(_arrived(receiver)) == 300 else _GSO
        except OSError:
            return _GSO


def _arrived(receiver: socket.socket, wait: int = 100) -> bytes:
    """A datagram, or train; ``b""`` where none comes within so many milliseconds."""
    poll = select.poll()
    poll.register(receiver, select.POLLIN)
    return receiver.recv(1000) if poll.poll(wait) else b""
