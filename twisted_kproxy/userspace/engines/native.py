"""
The engine in C (``pump.c``): as :mod:`.pairs`, but the way of the bytes is native. Accepting, choosing and dialing stay
in Python.

In the reactor's thread it is one reader of the reactor; in a thread of its own nothing that Python does keeps bytes
waiting.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ...core.values import Outcome
from ...interfaces import IRelay, NotAvailable
from .handed import Handed
from .poller import Poller
from .splice import MOST

_REASONS = ("done", "client-reset", "backend-reset", "client-timeout", "backend-timeout", "aborted")
_SWEEP = 15.0
#: Endings that are told at a time.
_ENDINGS = 256


@implementer(IRelay, IReadDescriptor)
class NativeRelay:
    """
    Relays between pairs of raw sockets, in C.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param poller: what has watched the sockets before.
    :param halfClosedSeconds: see :class:`.pairs.PairRelay`.
    :param threaded: whether the bytes have a thread of their own.
    :raise NotAvailable: where the C module was not built, or does not work.
    """

    log = Logger()
    name = "native"

    def __init__(
        self, reactor: Any, poller: Poller, halfClosedSeconds: float = 3600.0, *, threaded: bool = False
    ) -> None:
        try:
            from ._pump import ffi, lib  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise NotAvailable(f"its C module is not there ({error}); install with a C compiler at hand") from None
        self._ffi, self._lib = ffi, lib
        self._reactor = reactor
        self._poller = poller
        pump = lib.pump_new(MOST, 1, halfClosedSeconds)
        if pump == ffi.NULL:
            raise NotAvailable("it gets no descriptors or no memory")
        self._pump = ffi.gc(pump, lib.pump_free)
        self._endings = ffi.new("struct ended[]", _ENDINGS)
        self._open: dict[int, Handed] = {}
        self._free: list[int] = []
        self._reading = self._stopped = False
        self._goOnCall: Any = None
        self._timer: Any = None
        self._thread: threading.Thread | None = None
        self._fd = lib.pump_fd(pump)
        if threaded:
            self._fd = lib.pump_notify(pump)
            if self._fd < 0:
                raise NotAvailable(f"it gets no descriptor: {os.strerror(-self._fd)}")
            self._thread = threading.Thread(target=lib.pump_loop, args=(pump,), name="kproxy relay", daemon=True)
            self._thread.start()

    # --- IRelay

    def relay(
        self, client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        number = self._free.pop() if self._free else len(self._open)
        self._poller.release(client.fileno())
        self._poller.release(backend.fileno())
        if not self._reading:
            self._reading = True
            self._reactor.addReader(self)
        if self._timer is None:
            self._timer = self._reactor.callLater(_SWEEP, self._sweep)
        it = self._open[number] = Handed(self, number, ended)
        over = self._lib.pump_add(self._pump, number, client.detach(), backend.detach(), early, len(early))
        if over < 0:
            self._end(number, Outcome("aborted", 0, 0))
        elif over:
            self._tell()
        return it.cut

    @property
    def pipes(self) -> tuple[int, int]:
        """How many pipes there are, and how many of them are idle."""
        return self._lib.pump_pipes(self._pump, 0), self._lib.pump_pipes(self._pump, 1)

    def stop(self) -> Deferred[None]:
        if self._stopped:
            return succeed(None)
        self._stopped = True
        if self._goOnCall is not None:
            self._goOnCall.cancel()
            self._goOnCall = None
        if self._thread is not None:
            knock = self._lib.pump_stop(self._pump)
            self._thread.join()
            if knock >= 0:
                os.close(knock)
        for number in list(self._open):
            self._lib.pump_cut(self._pump, number)
        self._tell()
        self._ffi.release(self._pump)
        return succeed(None)

    def status(self) -> Mapping[str, Any]:
        pipes = 0 if self._stopped else self.pipes[0]
        return {
            "engine": self.name, "active": len(self._open), "pipes": pipes, "ownThread": self._thread is not None
        }  # fmt: skip

    # --- IReadDescriptor

    def fileno(self) -> int:
        return int(self._fd)

    def logPrefix(self) -> str:
        return "relay"

    def doRead(self) -> None:
        if self._thread is not None:
            try:
                os.read(self._fd, 8)
            except BlockingIOError:
                pass
        else:
            self._run()
        self._tell()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""

    # --- inside

    def _run(self) -> None:
        if self._lib.pump_run(self._pump, 0) and self._goOnCall is None:
            self._goOnCall = self._reactor.callLater(0, self._goOn)

    def _goOn(self) -> None:
        self._goOnCall = None
        self._run()
        self._tell()

    def cut(self, number: int) -> None:
        """Reset a pair that is open."""
        self._lib.pump_cut(self._pump, number)
        self._tell()

    def _tell(self) -> None:
        while True:
            count = self._lib.pump_ended(self._pump, self._endings, _ENDINGS)
            for index in range(count):
                it = self._endings[index]
                self._end(it.id, Outcome(_REASONS[it.reason], it.sent, it.received))
            if count < _ENDINGS:
                return

    def _end(self, number: int, outcome: Outcome) -> None:
        ended = self._open.pop(number).over()
        self._free.append(number)
        if not self._open:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._reading = False
            self._reactor.removeReader(self)
        try:
            ended(outcome)
        except Exception:
            self.log.failure("After a connection had ended")

    def _sweep(self) -> None:
        self._timer = self._reactor.callLater(_SWEEP, self._sweep)
        self._lib.pump_sweep(self._pump)
        self._tell()


def selfTest(relay: NativeRelay) -> None:
    """
    A few bytes and both ends through it.

    :raise NotAvailable: where they do not come through.
    """
    lib, ffi = relay._lib, relay._ffi
    pump = ffi.gc(lib.pump_new(0, 0, 1.0), lib.pump_free)
    client, clientSide = socket.socketpair()
    backend, backendSide = socket.socketpair()
    with client, backend:
        for it in (clientSide, backendSide):
            it.setblocking(False)
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        backend.sendall(b"answer")
        backend.shutdown(socket.SHUT_WR)
        failed = lib.pump_add(pump, 7, clientSide.detach(), backendSide.detach(), b"a ", 2)
        if failed:
            raise NotAvailable(f"its trial failed: {errno.errorcode.get(-failed, failed)}")
        ended = ffi.new("struct ended *")
        for _ in range(8):
            lib.pump_run(pump, 10)
            if lib.pump_ended(pump, ended, 1):
                break
        client.settimeout(0)
        backend.settimeout(0)
        try:
            heard = (backend.recv(100), client.recv(100))
        except OSError as error:
            heard = (str(error).encode(), b"")
        if heard != (b"a question", b"answer") or (ended.id, ended.reason, ended.sent, ended.received) != (7, 0, 10, 6):
            raise NotAvailable(f"its trial gave {heard!r} instead of what was sent")
