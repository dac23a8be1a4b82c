"""
Keeps what is known of one kind in agreement with the API server: list once, then watch from there on. The rules are
those of client-go's Reflector (``k8s.io/client-go/tools/cache/reflector.go``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from ..core.values import Change, Rejected, Replaced, Word
from ..interfaces import KproxyError
from . import errors
from .backoff import Backoff
from .client import ApiClient, Resource, Watch
from .stream import Bad, Bookmark, Failed, Gone, Listing, Set, Unknown, WatchEvent, WatchStream

#: Seconds that a watch is asked to last: uniform in between, so that those of many nodes do not end together.
WATCH_SECONDS = (300, 600)
#: Seconds between the starts of two watches, at least.
RESTART_FLOOR = 0.25
#: A watch that brought nothing and lasted less is an error: it would otherwise be repeated without end.
SHORT_WATCH = 1.0
#: Seconds beyond its asked time after which a watch is given up.
GRACE = 30.0
#: Seconds without a byte after which a watch that gets bookmarks (about one a minute) is given up.
SILENCE = 150.0
#: The same message is logged once in so many seconds.
LOG_EVERY = 60.0


class _Watchdog:
    """
    Gives a watch up when its link is dead. HTTP/1.1 has no ping: the server's bookmarks are its sign of life.

    :param deadline: seconds until it is given up in any case.
    """

    def __init__(self, clock: IReactorTime, watch: Watch, deadline: float, silence: float | None) -> None:
        self._clock = clock
        self._watch = watch
        self._silence = silence
        self._late: IDelayedCall = clock.callLater(deadline, self._expired, f"it did not end within {deadline:g} s")
        self._silent: IDelayedCall | None = None
        self.heard()

    def heard(self) -> None:
        """A byte came."""
        if self._silence is None:
            return
        if self._silent is None:
            self._silent = self._clock.callLater(self._silence, self._quiet)
        else:
            self._silent.reset(self._silence)

    def expect(self, silence: float) -> None:
        """From now on, that many seconds without a byte are too many."""
        self._silence = silence
        self.heard()

    def stop(self) -> None:
        for call in (self._late, self._silent):
            if call is not None and call.active():
                call.cancel()

    def _quiet(self) -> None:
        self._expired(f"nothing came for {self._silence:g} s")

    def _expired(self, why: str) -> None:
        self.stop()
        self._watch.abort(errors.TimedOut(f"the watch is given up: {why}"))


class Reflector:
    """
    Says what one kind of object is, as the API server has it.

    :param source: the source's name, for the words.
    :param say: takes the words.
    :param random: gives numbers in [0, 1).
    :ivar heard: when the server last proved that nothing is missing here: a list, an event, a bookmark, the regular
        end of a watch. A connection that is just up proves nothing. ``None``: never.
    """

    log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        client: ApiClient,
        resource: Resource,
        source: str,
        say: Callable[[Word], None],
        random: Callable[[], float],
        backoff: Backoff | None = None,
    ) -> None:
        self._clock = clock
        self._client = client
        self._resource = resource
        self._source = source
        self._say = say
        self._random = random
        self._backoff = backoff or Backoff(clock, random)
        self._rv = ""
        # The server cannot answer for our resource version: ask it for its newest state.
        self._unavailable = False
        self._bookmarkGap: float | None = None
        self._rejected: dict[str, str] = {}
        self._lastLogged: tuple[str, float] | None = None
        self._state = "new"
        self._lastError = ""
        self._lists = self._watches = self._events = 0
        self.heard: float | None = None
        self._running: Deferred[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin :meth:`run`, with a list. What was heard before a stop stays."""
        self._stopping = False
        running = Deferred.fromCoroutine(self.run())
        running.addErrback(self._ended)
        self._running = running

    def stop(self) -> None:
        """End it. Once this returns nothing is said any more, and no timer and no connection is left."""
        self._stopping = True
        running, self._running = self._running, None
        if running is not None:
            running.cancel()

    def _ended(self, reason: Failure) -> None:
        if not isinstance(reason.value, CancelledError):
            self.log.failure("The reflector of {kind} has died", reason, kind=self._resource.kind)

    async def run(self) -> None:
        """List, watch, and again, until cancelled. Whatever goes wrong ends here, and nothing said is taken back."""
        try:
            while True:
                try:
                    await self._list()
                    await self._follow()
                except CancelledError:
                    raise
                except Exception as error:
                    self.log.failure("Listing {kind} anew after an unexpected error", kind=self._resource.kind)
                    await self._pause(error)
        finally:
            self._state = "stopped"

    def age(self) -> float | None:
        """Seconds since :attr:`heard`."""
        return None if self.heard is None else self._clock.seconds() - self.heard

    def status(self) -> dict[str, Any]:
        """JSON-able facts for operators."""
        age = self.age()
        return {
            "state": self._state,
            "resourceVersion": self._rv,
            "ageSeconds": None if age is None else round(age, 3),
            "lists": self._lists,
            "watches": self._watches,
            "events": self._events,
            "rejected": dict(self._rejected),
            "lastError": self._lastError,
        }

    # --- listing -----------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        """Returns once a list has been said."""
        while True:
            self._state = "listing"
            try:
                listing = await self._client.list(self._resource, self._listFrom())
            except (errors.Expired, errors.TooLargeResourceVersion) as error:
                if self._unavailable:
                    await self._pause(error)
                else:
                    self._unavailable = True
                    self._note(error)
            except KproxyError as error:
                await self._pause(error)
            else:
                self._replace(listing)
                return

    def _listFrom(self) -> str:
        # "0": the first list may come from the server's cache, which spares etcd when all nodes start at once.
        return "" if self._unavailable else self._rv or "0"

    def _replace(self, listing: Listing) -> None:
        self._lists += 1
        self._unavailable = False
        self._rv = listing.rv
        self._agreed()
        for key, reason in listing.rejected.items():
            self._reject(key, reason)
        self._rejected = dict(listing.rejected)
        self.log.info(
            "Listed {count} of {kind} at {rv}", count=len(listing.objects), kind=self._resource.kind, rv=self._rv
        )
        self._tell(Replaced(self._source, self._resource.kind, listing.objects, listing.rejected))

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Watch, time and again; returns where only another list can help."""
        while True:
            started = self._clock.seconds()
            events = self._events
            try:
                await self._watch()
            except errors.Denied as error:
                await self._pause(error)
                if error.code != 429:
                    # Also for 410: a restarted server gives it to all nodes at once, and the pause spreads them.
                    return
            except errors.LinkError as error:
                # Nothing says that the state here is wrong: go on from where we are.
                if self._fruitless(started, events):
                    await self._pause(error)
                else:
                    self._note(error)
            except KproxyError as error:
                await self._pause(error)
                return
            else:
                if self._fruitless(started, events):
                    await self._pause(errors.ConnectionLost("the watch ended at once, without an event"))
                    return
                self._agreed()
            left = started + RESTART_FLOOR - self._clock.seconds()
            if left > 0:
                await self._wait(left)

    def _fruitless(self, started: float, events: int) -> bool:
        return self._events == events and self._clock.seconds() - started < SHORT_WATCH

    async def _watch(self) -> None:
        low, high = WATCH_SECONDS
        seconds = low + int(self._random() * (high - low))
        self._state = "connecting"
        watch = await self._client.watch(self._resource, self._rv, seconds)
        self._state = "watching"
        self._watches += 1
        stream = WatchStream(self._resource.kind)
        dog = _Watchdog(self._clock, watch, seconds + GRACE, self._silence())
        lastBookmark = self._clock.seconds()

        def received(data: bytes) -> None:
            nonlocal lastBookmark
            dog.heard()
            try:
                events = stream.feed(data)
            except errors.StreamError as error:
                self._takeAll(error.events)
                raise
            self._takeAll(events)
            if any(type(event) is Bookmark for event in events):
                now = self._clock.seconds()
                self._bookmarkGap = max(self._bookmarkGap or 0.0, now - lastBookmark)
                lastBookmark = now
                dog.expect(self._silence() or SILENCE)

        try:
            await watch.deliver(received)
        finally:
            dog.stop()
        dropped = stream.close()
        if dropped:
            self.log.debug("Dropped {dropped} bytes of an unfinished event", dropped=dropped)

    def _silence(self) -> float | None:
        return None if self._bookmarkGap is None else max(SILENCE, 2 * self._bookmarkGap)

    def _takeAll(self, events: list[WatchEvent] | tuple[WatchEvent, ...]) -> None:
        for event in events:
            self._take(event)

    def _take(self, event: WatchEvent) -> None:
        kind = self._resource.kind
        if isinstance(event, Failed):
            raise errors.fromStatus(event.status)
        self._events += 1
        # Also for what is not understood: the next watch must not begin before it again.
        self._rv = event.rv or self._rv
        self._agreed()
        match event:
            case Set(key=key):
                self._rejected.pop(key, None)
                self._tell(Change(self._source, kind, key, event.object))
            case Gone(key=key):
                self._rejected.pop(key, None)
                self._tell(Change(self._source, kind, key, None))
            case Bad(key=key, reason=reason):
                self._reject(key, reason)
                if key:
                    self._rejected[key] = reason
                    self._tell(Rejected(self._source, kind, key, reason))
            case Unknown(type=type):
                self.log.warn("Passed over an event of unknown type {type!r} of {kind}", type=type, kind=kind)

    # --- all the rest ------------------------------------------------------------------------------------------------

    def _tell(self, word: Word) -> None:
        self._say(word)
        if self._stopping:
            # Stopped by whoever heard it: then this is no Deferred's callback that cancelling could reach.
            raise CancelledError()

    def _agreed(self) -> None:
        self.heard = self._clock.seconds()

    def _reject(self, key: str, reason: str) -> None:
        if not key or self._rejected.get(key) != reason:
            self.log.warn(
                "{kind} {key} cannot be read, its last good version stays: {reason}",
                kind=self._resource.kind,
                key=key or "(unknown)",
                reason=reason,
            )

    async def _pause(self, error: Exception) -> None:
        self._note(error)
        self._state = "waiting"
        # A server that says how long to wait is not asked earlier.
        await self._wait(max(self._backoff.next(), getattr(error, "retryAfter", None) or 0.0))

    async def _wait(self, seconds: float) -> None:
        await deferLater(self._clock, seconds)

    def _note(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        self._lastError = text
        now = self._clock.seconds()
        if self._lastLogged is not None and self._lastLogged[0] == text and now - self._lastLogged[1] < LOG_EVERY:
            return
        self._lastLogged = (text, now)
        # Losing the network is nothing out of the ordinary; being refused by a server that answers is.
        level = LogLevel.info if isinstance(error, (errors.LinkError, errors.Expired)) else LogLevel.warn
        self.log.emit(
            level, "No agreement on {kind} for now: {error}", kind=self._resource.kind, error=text, source=self._source
        )
