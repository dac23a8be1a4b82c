"""
Events: what the cluster's operators are told through the API (``events.k8s.io/v1``, KEP-383).

They are a courtesy. So they are bounded in number, rate and time, go out one after the other, and whatever stands in
their way costs nobody else anything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..interfaces import IEventRecorder, KproxyError
from . import errors
from .backoff import Backoff
from .client import ApiClient
from .credentials import timeOfDay

CONTROLLER = "kproxy"
#: So many events wait at most; the same number is remembered for folding.
MOST = 100
#: Seconds within which the same event again is only counted; the count is told at their end.
FOLD = 360.0
#: Seconds after which an event that could not be passed on is let go.
PATIENCE = 600.0
#: So many events go out at once, then one in so many seconds.
BURST, EVERY = 10, 5.0
#: Seconds without another try once the server has said that we may not.
MUTE = 3600.0
#: Bytes of a note, and of the shorter texts, that an API server takes.
NOTE_LIMIT, WORD_LIMIT = 1024, 128

_Key: TypeAlias = tuple[str, str, str, str, str, str, str, bool]


@implementer(IEventRecorder)
class NoEvents:
    """For a configuration without an API server: there is nobody to tell."""

    def record(
        self, kind: str, namespace: str, name: str, uid: str, reason: str, action: str, note: str, warning: bool = False
    ) -> None:
        """See :meth:`IEventRecorder.record`."""


class _Series:
    """
    One event, and how often it has come.

    :ivar told: how many times the server knows of; 0 while it does not know the event at all.
    :ivar until: when counting ends, in seconds of the clock.
    """

    def __init__(self, key: _Key, name: str, at: float, until: float) -> None:
        self.key = key
        self.namespace = key[1] or "default"
        self.name = name
        self.began = self.last = at
        self.count = 1
        self.told = 0
        self.until = until

    @property
    def path(self) -> str:
        """Of the events of its namespace."""
        return f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events"

    def whole(self, instance: str) -> bytes:
        """All of it, as JSON."""
        kind, namespace, name, uid, reason, action, note, warning = self.key
        regarding = {"apiVersion": "v1", "kind": kind, "namespace": namespace, "name": name, "uid": uid}
        return msgspec.json.encode(
            {
                "apiVersion": "events.k8s.io/v1",
                "kind": "Event",
                "metadata": {"name": self.name, "namespace": self.namespace},
                "eventTime": _microTime(self.began),
                "reportingController": CONTROLLER,
                "reportingInstance": _cut(instance, WORD_LIMIT),
                "action": _cut(action, WORD_LIMIT),
                "reason": _cut(reason, WORD_LIMIT),
                "regarding": {field: value for field, value in regarding.items() if value},
                "note": _cut(note, NOTE_LIMIT),
                "type": "Warning" if warning else "Normal",
            }
        )

    def repeated(self) -> bytes:
        """How often it has come by now, as a JSON merge patch."""
        return msgspec.json.encode({"series": {"count": self.count, "lastObservedTime": _microTime(self.last)}})


class _Ticket(Struct, frozen=True, eq=False):
    """Something to be told. :ivar since: when it began to wait, in seconds of the clock."""

    series: _Series
    since: float


@implementer(IEventRecorder)
class EventRecorder:
    """
    Writes events through the client of a source.

    :param source: the source's name, for the log.
    :param instance: who tells: the name of this node.
    :param random: gives numbers in [0, 1).
    :param timeOfDay: seconds since the epoch, for the people who read events.
    """

    log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        client: ApiClient,
        source: str,
        instance: str,
        random: Callable[[], float],
        timeOfDay: Callable[[], float] = timeOfDay,
    ) -> None:
        self._clock = clock
        self._client = client
        self._source = source
        self._instance = instance
        self._timeOfDay = timeOfDay
        self._backoff = Backoff(clock, random)
        self._counts: Counter[str] = Counter()
        self._numbers = count()
        self._known: dict[_Key, _Series] = {}
        self._queue: deque[_Ticket] = deque()
        self._tokens, self._tokensAt = float(BURST), clock.seconds()
        self._mutedUntil = 0.0
        self._complainedAt: float | None = None
        self._lastError = ""
        self._active = False
        self._working: Deferred[None] | None = None
        self._timer: IDelayedCall | None = None

    def start(self) -> None:
        """From now on, what is recorded is passed on."""
        self._active = True

    def stop(self) -> None:
        """Let go of everything. Once this returns, no timer and no request is left."""
        self._active = False
        working, self._working = self._working, None
        if working is not None:
            working.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._known.clear()
        self._queue.clear()

    def status(self) -> dict[str, Any]:
        """JSON-able facts for operators."""
        return {
            "sent": self._counts["sent"], "dropped": self._counts["dropped"], "waiting": len(self._queue),
            "lastError": self._lastError,
        }

    def record(
        self, kind: str, namespace: str, name: str, uid: str, reason: str, action: str, note: str, warning: bool = False
    ) -> None:
        """See :meth:`IEventRecorder.record`."""
        if not self._active:
            return
        now = self._clock.seconds()
        if now < self._mutedUntil:
            self._counts["dropped"] += 1
            return
        key = (kind, namespace, name, uid, reason, action, note, warning)
        series = self._known.get(key)
        if series is not None:
            series.count += 1
            series.last = self._timeOfDay()
            return
        at = self._timeOfDay()
        # No two of a name, not even of one moment or after a restart.
        unique = f"{name[:200]}.{int(at * 1e9) + next(self._numbers):x}"
        series = self._known[key] = _Series(key, unique, at, now + FOLD)
        if len(self._known) > MOST:
            del self._known[next(iter(self._known))]
        self._put(_Ticket(series, now))
        self._watchTime()

    # --- the queue

    def _put(self, ticket: _Ticket) -> None:
        if len(self._queue) >= MOST:
            self._drop(self._queue.popleft())
        self._queue.append(ticket)
        if self._working is None:
            working = self._working = Deferred.fromCoroutine(self._work())
            working.addBoth(self._worked)

    def _drop(self, ticket: _Ticket) -> None:
        """Of an event that was not told, nothing is remembered: the next time it is news again."""
        self._counts["dropped"] += 1
        if self._known.get(ticket.series.key) is ticket.series:
            del self._known[ticket.series.key]

    def _worked(self, outcome: Any) -> None:
        self._working = None
        if isinstance(outcome, Failure) and not outcome.check(CancelledError):  # type: ignore[no-untyped-call]
            self.log.failure("Events are no longer passed on until the next one comes", outcome)

    async def _work(self) -> None:
        """Tell one after the other until there is none left."""
        await deferLater(self._clock, 0)  # whoever records something goes on first
        while self._queue:
            await self._mayGo()
            if not self._queue:
                return
            ticket = self._queue.popleft()
            if self._clock.seconds() - ticket.since > PATIENCE:
                self._drop(ticket)
                continue
            try:
                await self._send(ticket.series)
                self._counts["sent"] += 1
            except errors.Denied as error:
                self._lastError = str(error)
                if error.code in (401, 429) or error.code >= 500:
                    await self._again(ticket, error.postponed or 0.0)
                else:
                    self._refused(ticket, error)
            except KproxyError as error:
                self._lastError = str(error)
                await self._again(ticket, 0.0)

    async def _mayGo(self) -> None:
        now = self._clock.seconds()
        self._tokens = min(float(BURST), self._tokens + (now - self._tokensAt) / EVERY)
        self._tokensAt = now
        self._tokens -= 1
        if self._tokens < 0:
            await deferLater(self._clock, -self._tokens * EVERY)

    async def _send(self, series: _Series) -> None:
        number = series.count
        if series.told:
            path = f"{series.path}/{series.name}"
            await self._client.send("PATCH", path, series.repeated(), "application/merge-patch+json")
            series.told = number
        else:
            await self._client.send("POST", series.path, series.whole(self._instance))
            series.told = 1

    async def _again(self, ticket: _Ticket, postponed: float) -> None:
        """It may work later. What has come meanwhile is newer: where there is no room for both, this one goes."""
        if len(self._queue) >= MOST:
            self._drop(ticket)
        else:
            self._queue.appendleft(ticket)
        await deferLater(self._clock, max(self._backoff.next(), min(postponed, PATIENCE)))

    def _refused(self, ticket: _Ticket, error: errors.Denied) -> None:
        """It will not work later either."""
        self._drop(ticket)
        if error.code == 404 and ticket.series.told:
            return  # events live for an hour or so: this one has gone
        if error.code == 403 and "being terminated" not in str(error):
            self._mutedUntil = self._clock.seconds() + MUTE
            while self._queue:
                self._drop(self._queue.popleft())
            self._known.clear()
            self.log.warn(
                "Source {source} does not let kproxy write events, which does no other harm. They need verbs [create, "
                "patch] for resources [events] in apiGroups [events.k8s.io]; see etc/rbac.yaml. The next try is in "
                "{minutes:g} minutes at the earliest: {error}",
                source=self._source, minutes=MUTE / 60, error=str(error),
            )
        elif self._complainedAt is None or self._clock.seconds() - self._complainedAt >= MUTE:
            self._complainedAt = self._clock.seconds()
            self.log.info(
                "An event was not taken by source {source}, and is let go: {error}",
                source=self._source, error=str(error),
            )

    # --- repetitions

    def _watchTime(self) -> None:
        if self._timer is None and self._known:
            due = min(series.until for series in self._known.values())
            self._timer = self._clock.callLater(max(0.0, due - self._clock.seconds()), self._look)

    def _look(self) -> None:
        """Counting is over for some: tell the count; what has not come again is forgotten."""
        self._timer = None
        now = self._clock.seconds()
        for key, series in list(self._known.items()):
            if series.until > now:
                continue
            series.until = now + FOLD
            if series.told and series.count == series.told:
                del self._known[key]
            elif series.told:
                self._put(_Ticket(series, now))
        self._watchTime()


def _microTime(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _cut(text: str, limit: int) -> str:
    """At most so many bytes of a text."""
    return text.encode()[:limit].decode("utf-8", "ignore")
