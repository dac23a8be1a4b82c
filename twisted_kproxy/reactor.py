"""
A reactor that costs less per event.

Twisted's epoll reactor wraps each event in a log context, which takes longer than relaying a request does. This one
calls whoever an event is for, catches what is raised, and has a table of descriptors that are registered once, for
edges (:mod:`twisted_kproxy.userspace.engines.poller`).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor
from twisted.logger import Logger

#: Events taken at a time: enough for a busy moment, few enough that a long batch does not hold up timers.
BATCH = 256
_log = Logger()


class DirectReactor(EPollReactor):
    """
    Twisted's epoll reactor with direct dispatch.

    :ivar edgePoll: the epoll object, to register descriptors with.
    :ivar edgeHandlers: descriptor → whom to call with its events.
    """

    def __init__(self) -> None:
        self.edgeHandlers: dict[int, Callable[[int], object]] = {}
        super().__init__()  # type: ignore[no-untyped-call]
        self.edgePoll = self._poller

    def doPoll(self, timeout: float | None) -> None:
        """Wait for events, at most so many seconds (``None``: for ever), and dispatch every one that was taken."""
        try:
            events = self._poller.poll(-1 if timeout is None else timeout, BATCH)
        except OSError as error:
            if error.errno == errno.EINTR:
                return
            raise
        handlers, selectables, dispatch = self.edgeHandlers, self._selectables, self._doReadOrWrite
        for fd, event in events:
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(event)
                except Exception:
                    _log.failure("An event of a connection could not be handled")
                continue
            selectable = selectables.get(fd)
            if selectable is not None:
                # It logs what is raised, and lets go of whoever did.
                dispatch(selectable, fd, event)  # type: ignore[no-untyped-call]

    doIteration = doPoll


def install() -> DirectReactor:
    """Make this the process's reactor; to be called before anybody has imported one."""
    reactor = DirectReactor()
    installReactor(reactor)  # type: ignore[no-untyped-call]
    return reactor


def installIfFree() -> Any:
    """The process's reactor: this one, unless another was chosen already."""
    if "twisted.internet.reactor" not in sys.modules:
        install()
    from twisted.internet import reactor

    return reactor
