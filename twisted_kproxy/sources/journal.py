"""What a reflector has lived through, for operators: state, errors, counts, and how fresh what it knows is."""

from __future__ import annotations

from collections import Counter

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger, LogLevel

from . import errors
from .contact import Outage

#: The same message is logged once in so many seconds.
LOG_EVERY = 60.0
_REMEMBERED = 20


class Journal:
    """
    :ivar kind: of the objects, for the log.
    :ivar state: in words.
    :ivar counts: of ``lists``, ``streams`` (whole states that came as the beginning of a watch), ``watches``,
        ``events``, ``retries``.
    :ivar missing: what the server last said of these objects is that it has none to give.
    :ivar heard: when the server last proved that nothing is missing here.
    """

    log = Logger()

    def __init__(self, clock: IReactorTime, source: str, kind: str) -> None:
        self._clock = clock
        self._source = source
        self.kind = kind
        self.state = "new"
        self.counts: Counter[str] = Counter()
        self.missing = False
        self.heard: float | None = None
        self.lastError = ""
        self._outSince: float | None = None
        self._lacking = ""
        self._logged: dict[str, float] = {}

    def agreed(self) -> None:
        """The server has just proved that nothing is missing here."""
        self.heard = self._clock.seconds()
        self.missing = False
        self._outSince = None

    def connected(self) -> None:
        """A watch has held for a while: it may be silent because nothing happens."""
        self._outSince = None

    def age(self) -> float | None:
        """Seconds since :attr:`heard`."""
        return None if self.heard is None else self._clock.seconds() - self.heard

    def outage(self) -> Outage | None:
        """Since when nothing has worked, if so."""
        return None if self._outSince is None or self.missing else Outage(self._outSince, self.lastError)

    def counters(self) -> dict[str, int]:
        """What only grows."""
        names = ("lists", "streams", "watches", "events", "retries")
        relists = max(0, self.counts["lists"] + self.counts["streams"] - 1)
        return {**{name: self.counts[name] for name in names}, "relists": relists}

    def error(self, error: Exception) -> None:
        """Something did not work. Told to the log, but the same thing once a minute only."""
        text = str(error) or type(error).__name__
        self.lastError = text
        now = self._clock.seconds()
        if self._outSince is None:
            # A link is dead for some time before that is found.
            dead = isinstance(error, errors.TimedOut) and self.heard is not None
            self._outSince = self.heard if dead else now
        if not self._mayTell(text):
            return
        # Losing the network is nothing out of the ordinary; being refused by a server that answers is.
        level = LogLevel.info if isinstance(error, (errors.LinkError, errors.Expired)) else LogLevel.warn
        self.log.emit(
            level, "No agreement on {kind} for now: {error}", kind=self.kind, error=text, source=self._source
        )

    def rejected(self, key: str, reason: str, kept: bool) -> None:
        """
        An object cannot be read.

        :param key: ``""`` for one of which not even that can be told; the same about such a one is told once a minute.
        :param kept: an earlier version of it can.
        """
        if key or self._mayTell(f"{self.kind}: {reason}"):
            self.log.warn(
                "{kind} {key} of source {source} cannot be read, {kept}: {reason}",
                kind=self.kind, key=key or "(without name)", source=self._source, reason=reason,
                kept="its last good version stays in force" if kept else "it is not served",
            )

    def _mayTell(self, text: str) -> bool:
        now = self._clock.seconds()
        if now - self._logged.get(text, -LOG_EVERY) < LOG_EVERY:
            return False
        self._logged[text] = now
        if len(self._logged) > _REMEMBERED:
            del self._logged[min(self._logged, key=self._logged.__getitem__)]
        return True

    def lacking(self, error: Exception) -> None:
        """The server does not have what may be missing, or does not let us read it: told once, and no fault."""
        text = self.lastError = str(error)
        self.state = "not available"
        self.missing = True
        self._outSince = None
        if text != self._lacking:
            self._lacking = text
            self.log.info(
                "There is no {kind} to be had, which does no harm; asking again now and then: {error}",
                kind=self.kind, error=text, source=self._source,
            )
