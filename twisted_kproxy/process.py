"""The process: what signals do to it, and the status that it ends with."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from twisted.logger import Logger

_log = Logger()


def catchSignals(reactor: Any, isStopping: Callable[[], bool], cut: Callable[[], None]) -> None:
    """
    The first SIGTERM or SIGINT stops the reactor, a second one cuts: Twisted itself knows only the first. To be called
    once the reactor runs.

    :param isStopping: whether the first one has been there.
    :param cut: ends what is still waited for.
    """

    def caught(number: int, frame: object) -> None:
        reactor.callFromThread(cut if isStopping() else reactor.stop)

    def ignored(number: int, frame: object) -> None:
        reactor.callFromThread(
            _log.info, "{signal} is ignored; the configuration is read at the start only",
            signal=signal.Signals(number).name,
        )

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, caught)
        # Left alone they would end the process without a word, and its rules would lead nowhere.
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, ignored)


def exitStatus(status: int) -> None:
    """
    Let the process end with that status. twistd has no means to say so, and exceptions in shutdown triggers are only
    logged; what is registered last with atexit runs first, so output that others flush there is flushed here.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)

    atexit.register(leave)
