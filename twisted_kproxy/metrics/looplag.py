"""How late the reactor is."""

from __future__ import annotations

from collections.abc import Callable

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime


class LoopLag(Service):
    """
    Measures how late the reactor runs a timer: whatever holds up the loop shows here.

    :param observe: is told the lateness in seconds, once per interval.
    """

    def __init__(self, reactor: IReactorTime, observe: Callable[[float], None], interval: float = 1.0) -> None:
        self._reactor = reactor
        self._observe = observe
        self._interval = interval
        self._due = 0.0
        self._call: IDelayedCall | None = None

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self._schedule()

    def stopService(self) -> None:
        super().stopService()  # type: ignore[no-untyped-call]
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _schedule(self) -> None:
        self._due = self._reactor.seconds() + self._interval
        self._call = self._reactor.callLater(self._interval, self._tick)

    def _tick(self) -> None:
        self._observe(max(0.0, self._reactor.seconds() - self._due))
        self._schedule()
