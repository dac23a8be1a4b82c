"""One run of an exec plugin: a program with limits on its time and on what it may print."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

#: Seconds that one run may take.
TIME_LIMIT = 30.0
#: Bytes that it may print.
OUTPUT_LIMIT = 1 << 20
#: Bytes of standard error that are kept for the log.
STDERR_LIMIT = 8192
#: Seconds that output may stay open once the program has ended: what it leaves behind in the background may hold it.
_LINGER = 1.0
#: Seconds that a killed program may take to go, before it is left to itself: what waits for a dead disk cannot go.
_PATIENCE = 2.0

# A session of its own, so that the program goes with everything that it has started when its time is up.
_LAUNCH = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.setsid()
try:
    os.execv(sys.argv[1], sys.argv[2:])
except OSError as error:
    sys.exit(f"it cannot be run: {error.strerror}")
"""


class Run(ProcessProtocol):
    """
    One run of the program.

    :param ended: called once with its output, and why that does not count (``""`` where it does).
    """

    def __init__(self, reactor: Any, ended: Callable[[bytes, bytes, str], None]) -> None:
        self._reactor = reactor
        self._ended = ended
        self._out: list[bytes] = []
        self._err: list[bytes] = []
        self._size = self._errSize = 0
        self._fault = ""
        self.cancelled = False
        self._over = False
        self._timer: IDelayedCall = reactor.callLater(TIME_LIMIT, self._late)

    def connectionMade(self) -> None:
        self.transport.closeStdin()  # type: ignore[union-attr]

    def outReceived(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > OUTPUT_LIMIT:
            self._out.clear()
            self.kill(f"it printed more than {OUTPUT_LIMIT} bytes")
        else:
            self._out.append(data)

    def errReceived(self, data: bytes) -> None:
        if self._errSize < STDERR_LIMIT:
            self._err.append(data[: STDERR_LIMIT - self._errSize])
        self._errSize += len(data)

    def _late(self) -> None:
        self.kill(f"it did not end within {TIME_LIMIT:g} s")

    def cancel(self) -> None:
        """End it, since nobody wants its output any more."""
        self.cancelled = True
        self.kill("it was not needed any more")

    def kill(self, why: str) -> None:
        """End it, and all that it has started."""
        if self._fault or self._over:
            return
        self._fault = why
        self._schedule(_PATIENCE, self._end)
        pid = getattr(self.transport, "pid", None)
        try:
            # Only where the session is its own already: a group of somebody else is nothing to kill.
            if isinstance(pid, int) and pid > 1 and os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass  # it has ended meanwhile
        try:
            self.transport.signalProcess("KILL")  # type: ignore[union-attr]
        except ProcessExitedAlready:
            pass

    def processExited(self, reason: Failure) -> None:
        if not self._over:
            self._schedule(_LINGER, self._hangUp)

    def _hangUp(self) -> None:
        self.transport.loseConnection()  # type: ignore[union-attr]

    def processEnded(self, reason: Failure) -> None:
        if not self._fault and not reason.check(ProcessDone):  # type: ignore[no-untyped-call]
            number, code = getattr(reason.value, "signal", None), getattr(reason.value, "exitCode", None)
            self._fault = f"it was ended by signal {number}" if number else f"it ended with exit status {code}"
        self._end()

    def _end(self) -> None:
        self.stop()
        if not self._over:
            self._over = True
            self._ended(b"".join(self._out), b"".join(self._err), self._fault)

    def _schedule(self, seconds: float, call: Callable[[], None]) -> None:
        self.stop()
        self._timer = self._reactor.callLater(seconds, call)

    def stop(self) -> None:
        """Wait for nothing any more."""
        if self._timer.active():
            self._timer.cancel()

    def start(self, path: str, args: Sequence[str], env: Mapping[str, str]) -> None:
        """
        Start the program.

        :raise OSError: (or :class:`ValueError`, :class:`TypeError`) where that cannot be.
        """
        argv = [path, *args]
        if sys.executable:
            argv = [sys.executable, "-I", "-S", "-c", _LAUNCH, path, *argv]
        self._reactor.spawnProcess(self, argv[0], argv, env=dict(env))
