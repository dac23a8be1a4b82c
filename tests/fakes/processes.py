"""Time, and programs that run in it: what they print and how they end is in the test's hands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import Clock
from twisted.python.failure import Failure


class FakeProcess:
    """
    One run of a program.

    :ivar env: its whole environment.
    :ivar killed: the signals that it was sent.
    """

    pid = None

    def __init__(self, protocol: Any, argv: Sequence[str], env: dict[str, str]) -> None:
        self.protocol = protocol
        self.argv = list(argv)
        self.env = env
        self.killed: list[str] = []
        self.running = True
        self.hungUp = False
        self.stubborn = False
        protocol.makeConnection(self)

    def closeStdin(self) -> None:
        pass

    def loseConnection(self) -> None:
        self.hungUp = True
        if not self.running:
            self.protocol.processEnded(Failure(ProcessDone(0)))

    def signalProcess(self, name: str) -> None:
        if not self.running:
            raise ProcessExitedAlready()
        self.killed.append(name)
        if not self.stubborn:
            self.end(signal=9)

    def say(self, out: Any = b"", err: bytes = b"") -> FakeProcess:
        """Print; what is not bytes goes as JSON."""
        data = out if isinstance(out, bytes) else json.dumps(out).encode()
        if data:
            self.protocol.outReceived(data)
        if err:
            self.protocol.errReceived(err)
        return self

    def exit(self, code: int = 0, signal: int | None = None) -> Failure:
        """The program has ended, its output is still open."""
        self.running = False
        good = not code and not signal
        reason = Failure(ProcessDone(0) if good else ProcessTerminated(code or None, signal, 0))
        self.protocol.processExited(reason)
        return reason

    def end(self, code: int = 0, signal: int | None = None) -> None:
        """The program has ended for good."""
        self.protocol.processEnded(self.exit(code, signal))


class ProcessClock(Clock):
    """
    :param respond: called with each run, by the clock; without it runs wait in ``runs``.
    """

    def __init__(self, respond: Callable[[FakeProcess], None] | None = None) -> None:
        super().__init__()
        self.runs: list[FakeProcess] = []
        self.respond = respond
        self.failure: Exception | None = None

    def spawnProcess(self, protocol: Any, executable: str, args: Sequence[str] = (), env: Any = None) -> FakeProcess:
        if self.failure is not None:
            raise self.failure
        run = FakeProcess(protocol, args, env)
        self.runs.append(run)
        if self.respond is not None:
            self.callLater(0, self.respond, run)
        return run


def credential(token: str = "", version: str = "v1", **status: Any) -> dict[str, Any]:
    """What an exec plugin prints."""
    if token:
        status["token"] = token
    return {"apiVersion": f"client.authentication.k8s.io/{version}", "kind": "ExecCredential", "status": status}
