"""Misfortunes to order: what the fake API server does wrong, to which request, and how a connection is cut."""

from __future__ import annotations

from collections import deque
from typing import Any

from msgspec import Struct, field

from .apistatus import StatusError, status

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
GARBAGE = b'\x00\xff<html>{"kind":"ServiceList","items":[{]\r\n\xfe\x80 not JSON at all'


class Fault(Struct, kw_only=True):
    """
    What goes wrong with some requests. Parts may be combined: a delay with a status, trickling with a cut.

    :ivar resource: plural name, ``*`` for any.
    :ivar verb: ``list``, ``watch``, ``get``, ``create``, ``update``, ``patch``, ``delete``, ``*``.
    :ivar call: from which such request on, counted from when the fault was added; 1 is the next one. ``None``: from
        the next one on that no other fault hits, so that several faults come one after the other.
    :ivar times: for so many of them; 0 for as long as the fault is there.
    :ivar delay: seconds before anything is answered.
    :ivar status: answer that instead; with a body as the real server sends it, unless ``body`` is given.
    :ivar reason: of that Status; has a default per status.
    :ivar message: of that Status.
    :ivar headers: sent beside, or instead of, the usual ones (``Retry-After`` …).
    :ivar body: the whole body: bytes, text, or something to be sent as JSON.
    :ivar contentType: instead of the right one.
    :ivar garbage: a body that is neither JSON nor UTF-8.
    :ivar emptyList: a good list without items.
    :ivar cutAfter: cut the connection after so many bytes of the body.
    :ivar cutInEvent: cut it in the middle of the n-th event of the watch.
    :ivar fin: cut by an orderly end of the connection instead of a reset.
    :ivar trickle: send pieces of so many bytes, so many seconds apart: ``[1, 0.1]``.
    :ivar blackHole: never answer, and leave the connection open.
    :ivar raw: these bytes on the connection instead of an HTTP answer, then cut (text: as latin-1).
    """

    resource: str = "*"
    verb: str = "*"
    call: int | None = None
    times: int = 1
    delay: float = 0
    status: int | None = None
    reason: str | None = None
    message: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    contentType: str | None = None
    garbage: bool = False
    emptyList: bool = False
    cutAfter: int | None = None
    cutInEvent: int | None = None
    fin: bool = False
    trickle: tuple[int, float] | None = None
    blackHole: bool = False
    raw: Any = None
    seen: int = 0
    used: int = 0

    def matches(self, resource: str, verb: str) -> bool:
        return self.resource in ("*", resource) and self.verb in ("*", verb)

    def hits(self) -> bool:
        """Whether the request that was just counted is one of those."""
        if self.call is None:
            return not self.times or self.used < self.times
        return self.seen >= self.call and (not self.times or self.seen < self.call + self.times)

    def error(self) -> StatusError | None:
        """The error that it answers with, if it does."""
        if self.status is None or self.body is not None:
            return None
        if self.status == 429 and self.reason is None and self.message is None:
            return StatusError(429, "Too many requests, please try again later.\n", self.headers)
        reason = REASONS.get(self.status, "") if self.reason is None else self.reason
        message = self.message or f"the fake API server was told to answer {self.status}"
        return StatusError(self.status, status(self.status, reason, message, {}), self.headers)


class Faults:
    """The faults that are on order."""

    def __init__(self) -> None:
        self.ordered: list[Fault] = []

    def add(self, fault: Fault | None = None, **kw: Any) -> Fault:
        """Order a fault: ``add(resource="services", verb="list", status=500, times=2)``."""
        fault = Fault(**kw) if fault is None else fault
        self.ordered.append(fault)
        return fault

    def clear(self) -> None:
        self.ordered.clear()

    def take(self, resource: str, verb: str) -> Fault:
        """The fault that hits this request: the first of those ordered; one that does nothing where there is none."""
        matching = [fault for fault in self.ordered if fault.matches(resource, verb)]
        for fault in matching:
            fault.seen += 1
        for fault in matching:
            if fault.hits():
                fault.used += 1
                return fault
        return Fault()


class Reply:
    """
    The body of one answer on its way: whole or a stream, under the influence of a fault.

    :param reactor: for timers.
    :param request: the :class:`twisted.web.server.Request`.
    """

    def __init__(self, reactor: Any, request: Any, fault: Fault) -> None:
        self._reactor = reactor
        self._request = request
        self._fault = fault
        self._left = fault.cutAfter
        self._writes = 0
        self._pieces: deque[bytes] = deque()
        self._timer: Any = None
        self._ending = False
        self.over = False
        request.notifyFinish().addBoth(self._gone)

    def open(self) -> None:
        """Send the headers: a stream begins, and there may be nothing to say yet."""
        if not self.over:
            self._request.write(b"")

    def write(self, data: bytes) -> None:
        """A part of the body; for a watch one event, for others whatever is to be a chunk."""
        if self.over or self._ending:
            return
        self._writes += 1
        if self._writes == self._fault.cutInEvent:
            self._left = len(data) // 2
        cut = self._left is not None and self._left <= len(data)
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        if self._fault.trickle:
            size = self._fault.trickle[0]
            self._pieces.extend(data[at : at + size] for at in range(0, len(data), size))
            self._ending = cut
            self._trickle()
        else:
            self._request.write(data)
            if cut:
                self.cut(not self._fault.fin)

    def finish(self) -> None:
        """The orderly end, after what is still to be trickled."""
        if self.over:
            return
        if self._pieces or self._timer:
            self._ending = True
        elif self._left == 0:
            self.cut(not self._fault.fin)
        else:
            self.over = True
            self._request.finish()

    def cut(self, abort: bool = True) -> None:
        """End the connection without the end of the body, once all that was written is on its way."""
        if not self.over:
            self._over()
            cutConnection(self._reactor, self._request, abort)

    def _trickle(self) -> None:
        if self._timer is None and self._pieces:
            assert self._fault.trickle
            self._request.write(self._pieces.popleft())
            self._timer = self._reactor.callLater(self._fault.trickle[1], self._next)

    def _next(self) -> None:
        self._timer = None
        if self._pieces:
            self._trickle()
        elif self._ending:
            self._ending = False
            self.finish()

    def _gone(self, _: object) -> None:
        self._over()

    def _over(self) -> None:
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pieces.clear()


def cutConnection(reactor: Any, request: Any, abort: bool) -> None:
    """
    End a request's connection: by a reset, or by an orderly end. What was written before still goes out: Twisted
    would drop it from its buffer, so the reset waits (at most a second) until that is empty.
    """
    if request.channel is None:
        return
    transport = request.channel.transport
    if not abort:
        transport.loseConnection()
        return
    socket = transport
    while hasattr(socket, "transport") and not hasattr(socket, "_tempDataBuffer"):
        socket = socket.transport

    def wait(tries: int) -> None:
        unsent = getattr(socket, "_tempDataBuffer", None) or len(getattr(socket, "dataBuffer", b"")) > getattr(
            socket, "offset", 0
        )
        if unsent and tries:
            reactor.callLater(0.01, wait, tries - 1)
        else:
            transport.abortConnection()

    wait(100)
