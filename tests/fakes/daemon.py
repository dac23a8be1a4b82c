"""Programs that tests run in the namespaces of a network: the daemon itself, backends, the fake API server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .network import Network, waitFor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TWISTD = os.path.join(os.path.dirname(sys.executable), "twistd")
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|Unhandled error in Deferred|Unhandled Error", re.M)


class Program:
    """
    A program in a namespace whose output is collected.

    :param ready: a line of its standard output that says that it is ready begins with this; ``""``: do not wait.
    :param seconds: how long that may take.
    :raise AssertionError: where it ends before, or takes longer; with what it has said.
    """

    def __init__(
        self,
        rig: Network,
        name: str,
        argv: Sequence[str],
        *,
        ready: str = "",
        seconds: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str = ROOT,
    ) -> None:
        self.rig = rig
        self.name = name
        self._lines: list[str] = []
        self._ready = ready
        self.readyLine = ""
        self._heard = threading.Event()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process = rig.spawn(name, argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready:
            self._heard.wait(seconds)
            if not self.readyLine:
                code = self.stop()
                raise AssertionError(f"{' '.join(argv)} did not say {ready!r} (exit code {code}):\n{self.log()}")

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        """What it has said so far."""
        return "".join(self._lines)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """End it; gives its exit code, which is -9 where it did not end by itself in time."""
        # Not through rig.stop() alone: that closes the pipe that the reader still reads from.
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGCONT)
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        return self.rig.stop(self.process)

    def assertNoTraceback(self) -> None:
        """:raise AssertionError: with the log, where there is a traceback in it."""
        if _TRACEBACK.search(self.log()):
            raise AssertionError(f"there is a traceback in the log of {self.name}:\n{self.log()}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self._lines.append(line)
                if self._ready and not self.readyLine and line.startswith(self._ready):
                    self.readyLine = line.strip()
                    self._heard.set()
        except ValueError:  # the pipe was closed by close() of the network
            pass
        self._heard.set()


class Daemon(Program):
    """
    kproxy in a namespace.

    :param config: the text of the ini file (one that contains a newline), or its path.
    :param waitFor: a URL that must answer 200, or something to call that must be true; ``None``: do not wait.
    :param options: further options of ``kproxy``; ``twistd`` those of twistd.
    :raise AssertionError: where it does not come to be, with the log.
    """

    def __init__(
        self,
        rig: Network,
        name: str,
        config: str,
        *,
        waitFor: str | Callable[[], Any] | None = "http://127.0.0.1:10256/livez",
        seconds: float = 60,
        options: Sequence[str] = (),
        twistd: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        if "\n" in config:
            self.config = os.path.join(rig.folder, f"{name}.ini")
            with open(self.config, "w", encoding="utf-8") as file:
                file.write(config)
        else:
            self.config = config
        argv = [sys.executable, TWISTD, "-n", "--pidfile=", *twistd, "kproxy", "--config", self.config, *options]
        super().__init__(rig, name, argv, env=env, cwd=rig.folder)
        if waitFor is not None:
            self.waitUntil(waitFor, seconds)

    def waitUntil(self, what: str | Callable[[], Any], seconds: float = 60) -> Any:
        """
        Until a URL answers 200, or what is called gives something true; gives that.

        :raise AssertionError: after so many seconds, or when the daemon ends; with the log.
        """
        ended = threading.Event()

        def ask() -> Any:
            if self.process.poll() is not None:
                ended.set()
                raise AssertionError(f"it ended with {self.process.returncode}")
            return self.get(what)[0] == 200 if isinstance(what, str) else what()

        try:
            return waitFor(ask, seconds, 0.05, ended)
        except AssertionError as error:
            self.stop()
            raise AssertionError(f"kproxy in {self.name}: {error}; its log:\n{self.log()}") from None

    def get(self, url: str, timeout: float = 10) -> tuple[int, dict[str, str], bytes]:
        """An HTTP request from its namespace."""
        return self.rig.http(self.name, url, timeout=timeout)


class Backend(Program):
    """
    :mod:`tests.fakes.backends` in a namespace: ``Backend(rig, "p0a", tcp=[8080], udp=[5353])``. A port stands for
    that port on all addresses of both families, a text for one address.
    """

    def __init__(
        self,
        rig: Network,
        name: str,
        *,
        tcp: Iterable[int | str] = (),
        http: Iterable[int | str] = (),
        udp: Iterable[int | str] = (),
        mode: str = "line",
        called: str = "",
        options: Sequence[str] = (),
    ) -> None:
        argv = [sys.executable, "-m", "tests.fakes.backends", "--name", called or name, "--mode", mode, *options]
        for option, ports in (("--tcp", tcp), ("--http", http), ("--udp", udp)):
            for port in ports:
                for address in (f"0.0.0.0:{port}", f"[::]:{port}") if isinstance(port, int) else (port,):
                    argv += [option, address]
        super().__init__(rig, name, argv, ready="ready")


class ApiProcess(Program):
    """
    :mod:`tests.fakes.apiserver` in a namespace, and the words of its control endpoint.

    :param listen: address and port; by default port 6443 of the namespace's IPv4 address.
    :param options: of the program, such as ``["--token", "t"]``.
    :param control: port of the control endpoint, on the namespace's loopback interface.
    :ivar url: where it listens.
    """

    def __init__(
        self, rig: Network, name: str = "api", listen: str = "", options: Sequence[str] = (), control: int = 6440
    ) -> None:
        self._control = f"127.0.0.1:{control}"
        listen = listen or f"{rig.address(name)}:6443"
        argv = [sys.executable, "-m", "tests.fakes.apiserver", "--listen", listen, "--control", self._control, *options]
        super().__init__(rig, name, argv, ready="listening on ")
        self.url = self.readyLine.removeprefix("listening on ")

    def fake(self, word: str, body: Any = None, method: str = "POST") -> Any:
        """Say a word of :mod:`tests.fakes.apicontrol`: ``fake("faults", {"verb": "list", "status": 500})``."""
        data = json.dumps(body if body is not None else {}) if method != "GET" else None
        status, _, answer = self.rig.http(self.name, f"http://{self._control}/fake/{word}", method, data, timeout=20)
        if status != 200:
            raise AssertionError(f"/fake/{word} answered {status}: {answer!r}")
        return json.loads(answer)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Create or replace objects."""
        self.fake("objects", {"kind": "List", "items": list(objects)})

    def delete(self, *objects: Mapping[str, Any]) -> None:
        """Delete objects."""
        self.fake("objects", {"kind": "List", "items": list(objects)}, "DELETE")

    def requests(self) -> list[dict[str, Any]]:
        """The request log."""
        return list(self.fake("requests", method="GET"))

    def state(self) -> dict[str, Any]:
        return dict(self.fake("state", method="GET"))
