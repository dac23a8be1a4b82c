"""Tells operators when a source has lost contact, for how long, and when it is back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

#: Seconds out of contact after which that is a warning, and after which it is one again.
WARN_AFTER = 60.0
_LOOK_EVERY = 10.0


class Outage(Struct, frozen=True):
    """
    Nothing new has been heard.

    :ivar since: when something last was, or when listening began.
    """

    since: float
    error: str


class Contact:
    """
    Looks after the contact of one source.

    :param outages: says what is out of contact now: kind → since when, and why.
    """

    log = Logger()

    def __init__(self, clock: IReactorTime, source: str, outages: Callable[[], Mapping[str, Outage]]) -> None:
        self._clock = clock
        self._source = source
        self._outages = outages
        self._timer: IDelayedCall | None = None
        self._warnedAt: float | None = None
        self._since = 0.0

    def start(self) -> None:
        self._timer = self._clock.callLater(_LOOK_EVERY, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._warnedAt = None

    def _look(self) -> None:
        now = self._clock.seconds()
        self._timer = self._clock.callLater(_LOOK_EVERY, self._look)
        outages = {kind: it for kind, it in self._outages().items() if now - it.since > WARN_AFTER}
        if outages:
            if self._warnedAt is None or now - self._warnedAt >= WARN_AFTER:
                self._warnedAt = now
                self._warn(outages, now)
        elif self._warnedAt is not None:
            self._warnedAt = None
            self.log.info(
                "Source {source} is in contact again, after {seconds:.0f} s",
                source=self._source, seconds=now - self._since,
            )

    def _warn(self, outages: Mapping[str, Outage], now: float) -> None:
        self._since = min(it.since for it in outages.values())
        oldest = min(outages.values(), key=lambda it: it.since)
        self.log.warn(
            "Source {source} has been out of contact for {seconds:.0f} s ({kinds}): {error}. "
            "Everything goes on as last known",
            source=self._source, seconds=now - self._since, kinds=", ".join(sorted(outages)), error=oldest.error,
        )
