"""
Edge-triggered events for raw sockets, in an epoll object of one's own or in that of the reactor.

A socket is registered once, and stays so until it is closed: what a handler does with an event is up to the state that
it keeps. That it takes bytes is only waited for once it has not taken some, and from then on for good: nearly every
socket takes them at once, and saying so would cost each connection two events. Events are hints: they may be late,
double, or meant for an earlier socket of the same number. So a handler tries, and believes only what the socket says.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any, TypeAlias

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

Handler: TypeAlias = Callable[[int], object]

#: What there is to read, and ends, at each change only.
QUIET = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
#: The same, and that it takes bytes again.
MASK = QUIET | select.EPOLLOUT
#: For as long as there is something to read.
READABLE = select.EPOLLIN
#: There is something to read, or there will never be again.
INPUT = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
#: No further event may come for what is left to read.
LAST = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
OUTPUT = select.EPOLLOUT
ERROR = select.EPOLLERR
RDHUP = select.EPOLLRDHUP
#: Events taken at a time.
_BATCH = 256


class Poller:
    """
    Gives each socket's events to its handler.

    In the reactor of :mod:`twisted_kproxy.reactor` the sockets are in the reactor's own epoll object. In any other one
    an epoll object of our own is a single reader of the reactor.

    :param reactor: provides IReactorFDSet and IReactorTime.
    """

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._again: list[Callable[[], object]] = []
        handlers = getattr(reactor, "edgeHandlers", None)
        self.integrated = handlers is not None
        self._nested = False
        if handlers is not None:
            self._handlers: dict[int, Handler] = handlers
            self._epoll = reactor.edgePoll
        else:
            self._handlers = {}
            self._epoll = select.epoll()
        self._nest = _Nest(self._epoll, self._handlers)

    def watch(self, fd: int, handler: Handler, mask: int = MASK) -> None:
        """
        From now on events of that descriptor go to this handler. Where it is new here, an event comes by itself if
        there is something to tell already.

        :param mask: of which events, where it is new. :data:`READABLE` for descriptors that nobody waits for to take
            more, or that are not read to the last at each event.
        """
        known = fd in self._handlers
        self._handlers[fd] = handler
        if not known:
            if not self._nested and not self.integrated:
                self._nested = True
                self._reactor.addReader(self._nest)
            self._epoll.register(fd, mask)

    def knows(self, fd: int) -> bool:
        """Whether somebody has that descriptor watched: events may have gone there."""
        return fd in self._handlers

    def output(self, fd: int) -> None:
        """That descriptor has not taken all: from now on also tell when it takes bytes again, or does so already."""
        if fd in self._handlers:
            self._epoll.modify(fd, MASK)

    def closing(self, fd: int) -> None:
        """That descriptor is about to be closed, and has no copy: the kernel forgets it by itself."""
        self._handlers.pop(fd, None)
        if self._nested:
            self._idle()

    def release(self, fd: int) -> None:
        """That descriptor goes to somebody else."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            if self._nested:
                self._idle()

    def _idle(self) -> None:
        """A reactor need not wait for events where none can come."""
        if not self._handlers:
            self._nested = False
            self._reactor.removeReader(self._nest)

    def again(self, work: Callable[[], object]) -> None:
        """Call this in the reactor's next turn: whoever has had his share for now and has more to do."""
        if not self._again:
            self._reactor.callLater(0, self._next)
        self._again.append(work)

    def _next(self) -> None:
        todo, self._again = self._again, []
        for work in todo:
            try:
                work()
            except Exception:
                self.log.failure("A connection could not go on")


@implementer(IReadDescriptor)
class _Nest:
    """An epoll object is readable while there are events in it."""

    log = Logger()

    def __init__(self, epoll: select.epoll, handlers: dict[int, Handler]) -> None:
        self._epoll = epoll
        self._handlers = handlers

    def fileno(self) -> int:
        return self._epoll.fileno()

    def logPrefix(self) -> str:
        return "relay"

    def doRead(self) -> None:
        handlers = self._handlers
        # Each event that was taken is dispatched: edges do not come twice.
        for fd, events in self._epoll.poll(0, _BATCH):
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(events)
                except Exception:
                    self.log.failure("An event of a connection could not be handled")

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""
