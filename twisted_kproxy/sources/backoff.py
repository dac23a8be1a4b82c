"""How long to wait before trying again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from .errors import Denied

#: How many times a request is repeated because the server says when to.
REPEATS = 10
#: Seconds that such a repetition waits, at least and at most, whatever the server says.
POSTPONED = (1.0, 300.0)
_T = TypeVar("_T")


class Backoff:
    """
    Growing pauses, spread so that many nodes do not come at once: client-go's numbers. Pause *n* is uniform in
    [d, 2d) with d = 0.8 s, 1.6 s, … up to 30 s; after two minutes without one it starts anew.

    :param random: gives numbers in [0, 1).
    """

    def __init__(
        self,
        clock: IReactorTime,
        random: Callable[[], float],
        *,
        first: float = 0.8,
        factor: float = 2.0,
        most: float = 30.0,
        jitter: float = 1.0,
        resetAfter: float = 120.0,
    ) -> None:
        self._clock = clock
        self._random = random
        self._first = first
        self._factor = factor
        self._most = most
        self._jitter = jitter
        self._resetAfter = resetAfter
        self._pause = first
        self._last: float | None = None

    def next(self) -> float:
        """Seconds to wait now."""
        now = self._clock.seconds()
        if self._last is not None and now - self._last > self._resetAfter:
            self._pause = self._first
        self._last = now
        pause = self._pause
        self._pause = min(pause * self._factor, self._most)
        return pause * (1.0 + self._jitter * self._random())


async def patiently(clock: IReactorTime, request: Callable[[], Awaitable[_T]], told: Callable[[Denied], None]) -> _T:
    """
    Make a request; where the answer is 429 or an error of the server and says ``Retry-After``, make it again just
    then, as client-go does (``rest/with_retry.go``): whoever is told when to come back has not failed yet.

    :param told: is told of each such answer.
    """
    for _ in range(REPEATS):
        try:
            return await request()
        except Denied as error:
            if error.postponed is None:
                raise
            told(error)
            await deferLater(clock, min(max(error.postponed, POSTPONED[0]), POSTPONED[1]))
    return await request()
