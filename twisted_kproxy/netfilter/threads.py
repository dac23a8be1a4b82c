"""Work in the reactor's threads, and waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.threads import deferToThreadPool

_T = TypeVar("_T")


class Threads:
    """Work handed to the reactor's pool by one user."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._busy = 0
        self._waiting: list[Deferred[None]] = []

    def run(self, work: Callable[..., _T], *arguments: Any) -> Deferred[_T]:
        """Call it in a thread; fires with what it gives."""

        def ended(result: Any) -> Any:
            self._busy -= 1
            if not self._busy:
                waiting, self._waiting = self._waiting, []
                for it in waiting:
                    it.callback(None)
            return result

        self._busy += 1
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work, *arguments).addBoth(ended)

    def idle(self) -> Deferred[None]:
        """Fires when nothing is at work."""
        if not self._busy:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting
