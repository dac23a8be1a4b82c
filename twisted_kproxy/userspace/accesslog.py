"""
The access log: one line for each TCP connection when it has ended. Off unless somebody asks for it.

Lines are gathered, and written twice a second from a thread: a disk that is slow or full costs lines, never
connections.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..core.values import Endpoint, Outcome, PoolName, hostPort

#: Seconds between two writes.
PERIOD = 0.5
#: Lines that wait at the most; what comes beyond is dropped and counted.
MOST = 20_000
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; the same number for IPv6


def originalDestination(sock: socket.socket) -> str:
    """
    The frontend that the client of an accepted connection dialled, before a rule led it here; where none did, where
    it came in.
    """
    six = sock.family == socket.AF_INET6
    try:
        if six:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            address, port = socket.inet_ntop(socket.AF_INET6, raw[8:24]), raw[2:4]
        else:
            raw = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
            address, port = socket.inet_ntop(socket.AF_INET, raw[4:8]), raw[2:4]
        return hostPort(address, int.from_bytes(port, "big"))
    except OSError:
        pass  # no rule has led it here, or the kernel remembers none
    try:
        address, number = sock.getsockname()[:2]
    except OSError:
        return "-"
    return hostPort(address, number)


class AccessLog:
    """
    Appends lines to a file, which may be moved away (by logrotate, say) at any time: then a new one is begun.

    :param reactor: provides IReactorTime and IReactorThreads.
    :param wallClock: seconds since 1970.
    :ivar dropped: lines that were lost since the start.
    """

    log = Logger()

    def __init__(self, reactor: Any, path: str, wallClock: Callable[[], float] = time.time) -> None:
        self._reactor = reactor
        self._path = path
        self._wallClock = wallClock
        self._lines: list[str] = []
        self._timer: Any = None
        self._writing = False
        self._failing = False
        self._fd = -1
        self.dropped = 0
        self._untold = 0

    def open(self) -> None:
        """Tell now where the file cannot be written, not when the first connection has ended."""
        self._write()

    def ended(
        self,
        pool: PoolName,
        client: str,
        frontend: str,
        endpoint: Endpoint | None,
        *,
        tries: int,
        connect: float | None,
        total: float,
        outcome: Outcome,
    ) -> None:
        """
        A connection has ended.

        :param endpoint: ``None`` where no endpoint took it.
        :param connect: seconds until an endpoint had taken it.
        :param total: seconds in all.
        """
        if len(self._lines) >= MOST:
            self.dropped += 1
            self._untold += 1
            return
        port = pool.port
        moment = datetime.fromtimestamp(self._wallClock(), UTC).isoformat(timespec="milliseconds")
        self._lines.append(
            f"{moment.replace('+00:00', 'Z')} service={port.namespace}/{port.service}:{port.port} client={client} "
            f"frontend={frontend} endpoint={endpoint or '-'} tries={tries} "
            f"connect={'-' if connect is None else f'{connect * 1000:.3f}ms'} total={total * 1000:.3f}ms "
            f"sent={outcome.sent} received={outcome.received} outcome={outcome.reason}\n"
        )
        if self._timer is None and not self._writing:
            self._timer = self._reactor.callLater(PERIOD, self._flush)

    def close(self) -> Deferred[None]:
        """Write what waits, and let go of the file."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        done = self._write()
        return done.addBoth(lambda _: self._closeFile())

    def _flush(self) -> None:
        self._timer = None
        self._write()

    def _write(self) -> Deferred[None]:
        lines, self._lines = self._lines, []
        self._writing = True
        # An access log in use keeps one thread of the reactor's busy for a moment, twice a second.
        pool = self._reactor.getThreadPool()
        done: Deferred[None] = deferToThreadPool(self._reactor, pool, self._append, "".join(lines))
        return done.addCallbacks(self._written, self._failed, errbackArgs=(len(lines),))

    def _written(self, _: object) -> None:
        self._writing = False
        if self._failing:
            self._failing = False
            self.log.info("The access log {path} is written again", path=self._path)
        if self._untold:
            self.log.warn("{count} lines of the access log were lost: they came faster than they could be written",
                          count=self._untold)  # fmt: skip
            self._untold = 0
        if self._lines and self._timer is None:
            self._timer = self._reactor.callLater(PERIOD, self._flush)

    def _failed(self, failure: Failure, count: int) -> None:
        self._writing = False
        self.dropped += count
        if not self._failing:
            self._failing = True
            self.log.error(
                "The access log {path} cannot be written: {error}. Its lines are lost until it can",
                path=self._path, error=failure.getErrorMessage(),
            )  # fmt: skip
        if self._lines and self._timer is None:
            self._timer = self._reactor.callLater(PERIOD, self._flush)

    # --- in the thread

    def _append(self, text: str) -> None:
        if self._moved():
            self._closeFile()
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._fd, data) :]

    def _moved(self) -> bool:
        if self._fd < 0:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:
            return True

    def _closeFile(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
