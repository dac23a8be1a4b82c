"""One watch after the other: opened, read, and given up when its link is dead."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from . import errors
from .backoff import patiently
from .client import ApiClient, Resource, Watch
from .stream import Bookmark, WatchEvent, WatchStream


class Watchdog:
    """
    Gives a watch up when its link is dead. HTTP/1.1 has no ping: the server's bookmarks are its sign of life.

    :param deadline: seconds until it is given up in any case.
    :param silence: seconds without an event that are too many; ``None``: any number is fine.
    """

    def __init__(self, clock: IReactorTime, watch: Watch, deadline: float, silence: float | None) -> None:
        self._clock = clock
        self._watch = watch
        self._silence = silence
        self._late: IDelayedCall = clock.callLater(deadline, self._expired, f"it did not end within {deadline:g} s")
        self._silent: IDelayedCall | None = None
        self.heard()

    def heard(self) -> None:
        """An event came. Single bytes do not count: a link may trickle for ever without bringing one."""
        if self._silence is None:
            return
        if self._silent is None:
            self._silent = self._clock.callLater(self._silence, self._quiet)
        else:
            self._silent.reset(self._silence)

    def expect(self, silence: float | None) -> None:
        """From now on, that many seconds without an event are too many."""
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None
        self._silence = silence
        self.heard()

    def extend(self, deadline: float) -> None:
        """It is given up that many seconds from now, rather."""
        self._late.cancel()
        self._late = self._clock.callLater(deadline, self._expired, f"it did not end within {deadline:g} s more")

    def stop(self) -> None:
        for call in (self._late, self._silent):
            if call is not None and call.active():
                call.cancel()

    def _quiet(self) -> None:
        self._expired(f"nothing came for {self._silence:g} s")

    def _expired(self, why: str) -> None:
        self.stop()
        self._watch.abort(errors.TimedOut(f"the watch is given up: {why}"))


class Watcher:
    """
    Watches one kind.

    :param opened: is told that the server has begun to answer.
    :param take: takes the events; what it raises ends the watch.
    :param postponed: is told of answers that say when to ask again, which is done.
    :ivar openedAt: when the server began to answer; ``None`` before.
    """

    log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        client: ApiClient,
        opened: Callable[[], None],
        take: Callable[[WatchEvent], None],
        postponed: Callable[[errors.Denied], None],
    ) -> None:
        self._clock = clock
        self._client = client
        self._limits = client.limits
        self._opened = opened
        self._takeOne = take
        self._postponed = postponed
        self._bookmarkGap: float | None = None
        self._dog: Watchdog | None = None
        self._until = 0.0
        self._settled = True
        self._lastBookmark = 0.0
        self.openedAt: float | None = None

    async def watch(self, resource: Resource, rv: str, seconds: int, initialEvents: bool = False) -> None:
        """
        Watch once, from there on.

        :param seconds: after which the server should end it.
        :param initialEvents: what is there comes first; once it has come, call :meth:`settled`.
        :return: at the regular end.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`, or what taking an event raised.
        """
        self.openedAt = None
        watch = await patiently(
            self._clock, lambda: self._client.watch(resource, rv, seconds, initialEvents), self._postponed
        )
        self.openedAt = self._clock.seconds()
        self._opened()
        self._until = self.openedAt + seconds + self._limits.grace
        deadline, silence = seconds + self._limits.grace, self._silence()
        if initialEvents:
            deadline, silence = min(deadline, self._limits.initialTotal), self._limits.initial
        self._dog = dog = Watchdog(self._clock, watch, deadline, silence)
        self._lastBookmark = self.openedAt
        self._settled = not initialEvents
        stream = WatchStream(resource.kind)

        def received(data: bytes) -> None:
            try:
                events = stream.feed(data)
            except errors.StreamError as error:
                self._take(error.events)
                raise
            if events:
                dog.heard()
                self._take(events)

        try:
            await watch.deliver(received)
        finally:
            self._dog = None
            dog.stop()
        dropped = stream.close()
        if dropped:
            self.log.debug("Dropped {dropped} bytes of an unfinished event", dropped=dropped)

    def settled(self) -> None:
        """The initial state has come: from now on this is a watch like any other."""
        self._settled = True
        if self._dog is not None:
            self._dog.expect(self._silence())
            self._dog.extend(self._until - self._clock.seconds())

    def _silence(self) -> float | None:
        return None if self._bookmarkGap is None else max(self._limits.silence, 2 * self._bookmarkGap)

    def _take(self, events: Iterable[WatchEvent]) -> None:
        for event in events:
            self._takeOne(event)
            if type(event) is Bookmark:
                self._bookmarked(event)

    def _bookmarked(self, bookmark: Bookmark) -> None:
        now = self._clock.seconds()
        if not bookmark.initialEventsEnd:
            self._bookmarkGap = max(self._bookmarkGap or 0.0, now - self._lastBookmark)
        self._lastBookmark = now
        if self._dog is not None and self._settled:
            self._dog.expect(self._silence())
