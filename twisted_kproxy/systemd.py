"""
What a service tells systemd about itself, spoken by hand: datagrams of ``NAME=value`` lines to the socket in
``NOTIFY_SOCKET`` (sd_notify(3)). Where the environment names none, all of it does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger


class Notifier(Service):
    """
    Says when the daemon is ready, that it is stopping, what it is doing, and, twice in each watchdog period, that it
    is alive.

    :param environ: of the process; ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are read from it.
    :param alive: whether the daemon does its work. While it says no (or raises), the watchdog is not fed, and systemd
        starts the daemon anew.
    """

    log = Logger()
    name = "systemd"

    def __init__(self, reactor: IReactorTime, environ: Mapping[str, str], alive: Callable[[], bool]) -> None:
        self._reactor = reactor
        self._alive = alive
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._period = self._watchdogSeconds(environ) if self._address else 0.0
        self._loop: LoopingCall | None = None
        self._status = ""
        self._wasAlive = True
        self._failed = False

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        if self._period:
            self._loop = LoopingCall(self._feed)
            self._loop.clock = self._reactor
            self._loop.start(self._period / 2, now=True)

    def stopService(self) -> None:
        super().stopService()  # type: ignore[no-untyped-call]
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def ready(self) -> None:
        """The daemon does its work; what was ordered after it may start. Twice is harmless."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon has begun to shut down."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; sent only when it is another than before."""
        text = " ".join(text.split())
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _watchdogSeconds(self, environ: Mapping[str, str]) -> float:
        """The watchdog's period; 0 where there is none, or it is meant for another process (sd_watchdog_enabled(3))."""
        text = environ.get("WATCHDOG_USEC", "")
        pid = environ.get("WATCHDOG_PID", "")
        if not text or (pid and pid != str(os.getpid())):
            return 0.0
        if not (text.isascii() and text.isdigit()) or int(text) == 0:
            self.log.warn("WATCHDOG_USEC is {value!r}, not a number of microseconds; no watchdog", value=text)
            return 0.0
        return int(text) / 1_000_000

    def _feed(self) -> None:
        try:
            alive = bool(self._alive())
        except Exception:
            self.log.failure("Cannot tell whether the daemon is alive")
            alive = False
        if alive:
            self._send("WATCHDOG=1")
        elif self._wasAlive:
            self.log.error(
                "The daemon is stuck: the watchdog of {seconds:g} s is not fed until it goes on", seconds=self._period
            )
        self._wasAlive = alive

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode("utf-8", "replace"), self._address)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self.log.warn("Cannot tell systemd {message}: {error}", message=message, error=str(error))
            self._failed = True


def _address(text: str) -> str:
    """The socket's address for :meth:`socket.socket.sendto`; a leading ``@`` stands for the abstract name space."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else ""
