"""The table of UDP flows that C has (``datagrams.c``), and one of them, as the rest of the dataplane sees them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.values import Endpoint
from ..udpflows import KEPT, Connected, FlowKey, Traffic
from ..udpsockets import PlainSocket

_REASONS = ("too-long", "busy", "error")


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
    """
    :class:`~twisted_kproxy.userspace.udpflows.Flows` that C has.

    :param ffi: of the C module, as :param lib: is. :param engine: what ``udp_new()`` gave.
    :ivar c: the service, as C knows it. :ivar flows: address in memory → flow.
    """

    def __init__(self, ffi: Any, lib: Any, engine: Any) -> None:
        self._ffi, self._lib, self._engine = ffi, lib, engine
        service = self._ffi.new("struct service *")
        self._lib.udp_service(service)
        self.c = self._ffi.gc(service, self._lib.udp_emptied)
        self.flows: dict[int, NativeFlow] = {}
        self._drops: dict[str, int] = {}
        self._key = self._ffi.new("struct key *")

    def __len__(self) -> int:
        return int(self.c.count)

    def __iter__(self) -> Iterator[NativeFlow]:
        return iter(list(self.flows.values()))

    def __contains__(self, flow: NativeFlow) -> bool:
        return self.flows.get(self._address(flow.c)) is flow

    def _inOrder(self, answered: bool) -> Iterator[NativeFlow]:
        ring = self._ffi.addressof(self.c, "answered" if answered else "unanswered")
        flow = ring.newer
        while flow != ring:
            yield self.flows[self._address(flow)]
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
        found = self._lib.udp_find(self._engine, self.c, self._key)
        return self.flows[self._address(found)] if found else None

    def add(self, flow: NativeFlow) -> None:
        fd = flow.socket.fileno() if isinstance(flow.socket, PlainSocket) else -1
        failed = self._lib.udp_add(self._engine, self.c, flow.c, fd)
        if failed:
            raise OSError(-failed, os.strerror(-failed))
        self.flows[self._address(flow.c)] = flow

    def remove(self, flow: NativeFlow) -> None:
        del self.flows[self._address(flow.c)]
        flow.ended()
        self._lib.udp_remove(self._engine, flow.c)

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

    def _address(self, c: Any) -> int:
        return int(self._ffi.cast("uintptr_t", c))

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


def _zone(scope: int) -> str:
    try:
        return socket.if_indextoname(scope)
    except OSError:
        return str(scope)
