"""Running a tool of the system: no shell, a clean environment, a time limit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from ..interfaces import NotAvailable

FOLDERS = ("/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin", "/usr/local/bin")
ENVIRONMENT = {"PATH": ":".join(FOLDERS), "LC_ALL": "C", "LANG": "C"}


class Finished(Struct, frozen=True):
    """How a tool ended: ``code`` is its exit status, or minus the signal that ended it."""

    code: int
    out: bytes
    err: str


class TooSlow(Exception):
    """The tool did not come to an end in time and was killed."""


def find(name: str, package: str) -> str:
    """
    The absolute path of a tool: in the folders of the system, whatever the environment says.

    :raise NotAvailable: saying which package brings it.
    """
    for folder in FOLDERS:
        path = Path(folder, name)
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise NotAvailable(f"there is no {name} in {', '.join(FOLDERS)}: install the {package} package")


class _Run(ProcessProtocol):
    def __init__(self, reactor: Any, stdin: bytes, limit: float) -> None:
        self.reactor = reactor
        self.stdin = stdin
        self.limit = limit
        self.out: list[bytes] = []
        self.err: list[bytes] = []
        self.tooSlow = False
        self.done: Deferred[Finished] = Deferred()
        self.timer: Any = None

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.timer = self.reactor.callLater(self.limit, self.kill)
        if self.stdin:
            self.transport.write(self.stdin)
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:
        self.out.append(data)

    def errReceived(self, data: bytes) -> None:
        if len(self.err) < 100:
            self.err.append(data)

    def kill(self) -> None:
        self.tooSlow = True
        assert self.transport is not None
        try:
            self.transport.signalProcess("KILL")
        except ProcessExitedAlready:
            pass

    def processEnded(self, reason: Failure) -> None:
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        if self.tooSlow:
            self.done.errback(TooSlow(f"no end after {self.limit:g} s"))
            return
        status: Any = reason.value
        code = -status.signal if status.signal is not None else status.exitCode or 0
        self.done.callback(Finished(code, b"".join(self.out), b"".join(self.err).decode(errors="replace")))


class Tool:
    """
    Runs one program at a time.

    :param prefix: arguments before the program's own, the first of which is run instead: for tests, and for work in
        the network namespace of another process.
    :param limit: seconds after which a run is killed.
    :param environment: what it gets beside :data:`ENVIRONMENT`.
    """

    def __init__(
        self,
        reactor: Any,
        path: str,
        prefix: Sequence[str] = (),
        limit: float = 30.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._reactor = reactor
        self._prefix = tuple(prefix)
        self._path = path
        self._limit = limit
        self._environment = {**ENVIRONMENT, **(environment or {})}
        self._runs: set[_Run] = set()

    def run(self, *arguments: str, stdin: str = "", path: str = "") -> Deferred[Finished]:
        """
        Run it.

        :param path: another program than its own.
        :return: fires when it has ended and its output is complete, whatever its status; fails with
            :class:`TooSlow`, or OSError where it cannot be started.
        """
        argv = [*self._prefix, path or self._path, *arguments]
        run = _Run(self._reactor, stdin.encode(), self._limit)
        executable = argv[0] if argv[0].startswith("/") else find(argv[0], argv[0])
        self._reactor.spawnProcess(run, executable, argv, env=self._environment, path="/")
        self._runs.add(run)

        def ended(result: Any) -> Any:
            self._runs.discard(run)
            return result

        return run.done.addBoth(ended)

    @property
    def pids(self) -> frozenset[int]:
        """The processes that run now."""
        return frozenset(
            run.transport.pid for run in self._runs if run.transport is not None and run.transport.pid is not None
        )

    def kill(self) -> None:
        """End what runs."""
        for run in list(self._runs):
            run.kill()
