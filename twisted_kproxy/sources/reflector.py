"""
Keeps what is known of one kind in agreement with the API server: have the state, then watch from there on. The rules
are those of client-go's Reflector (``k8s.io/client-go/tools/cache/reflector.go``), with a guard against lists that
would take everything away. :file:`docs/api-client.rst` tells them as a table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..core.values import Word
from ..interfaces import KproxyError
from . import errors
from .backoff import Backoff, patiently
from .client import ApiClient, Resource
from .contact import Outage
from .journal import Journal
from .knowledge import Knowledge
from .lister import Lister
from .routes import PROBE_EVERY, Routes
from .store import Guard, earlier
from .stream import Listing
from .watcher import Watcher

#: Seconds that a watch is asked to last: uniform in between, so that those of many nodes do not end together; and the
#: least, where something else is due before.
WATCH_SECONDS, LEAST_SECONDS = (300, 600), 5
#: Seconds between the starts of two watches, at least.
RESTART_FLOOR = 0.25
#: A watch that brought nothing and lasted less is an error: it would otherwise be repeated without end.
SHORT_WATCH = 1.0
#: Seconds after which the newest state is listed again although nothing seems wrong: after a restore from a backup, a
#: server may take a watch from the future, and say nothing (kubernetes#107457). Uniform in between.
SAFETY_SECONDS = (1800, 3600)
#: Seconds before a list that would remove most objects is confirmed by a second one.
CONFIRM_AFTER = 10.0
#: Seconds for which a server that does not know streaming lists is not asked for one again.
UNSTREAMED = 3600.0
#: Seconds after which the newest state is listed again where that has failed. Meanwhile the watch goes on.
SAFETY_RETRY = 300.0


class Step(Enum):
    """What to do next. Each step says which one follows."""

    SYNC = "have the whole state, by whatever way"
    STREAM = "have it as the beginning of a watch"
    LIST = "have it as a list"
    WATCH = "follow what changes"


class _Doubted(Exception):
    """What came as the initial state of a watch has to be confirmed first."""


class Reflector:
    """
    Says what one kind of object is, as the API server has it.

    :param source: the source's name, for the words.
    :param say: takes the words.
    :param random: gives numbers in [0, 1).
    :param streaming: whether to ask for streaming lists (KEP-3157), which cost the server far less.
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
        streaming: bool = False,
    ) -> None:
        self._clock = clock
        self._client = client
        self._random = random
        self._backoff = backoff or Backoff(clock, random)
        self._routes = Routes(clock, resource)
        self._journal = Journal(clock, source, resource.kind)
        self._lister = Lister(client)
        self._known = Knowledge(
            clock, source, say, self._routes, self._journal, client.limits.initial, self._complete
        )
        self._watcher = Watcher(clock, client, self._opened, self._known.take, self._postponed)
        self._guard = Guard()
        self._steps: dict[Step, Callable[[], Awaitable[Step]]] = {
            Step.SYNC: self._sync, Step.STREAM: self._stream, Step.LIST: self._list, Step.WATCH: self._watch,
        }
        # Only the newest state will do: the server cannot answer for our resource version, or is not to be believed.
        self._newest = False
        self._streamAt: float | None = 0.0 if streaming else None
        self._safetyAt = 0.0
        self._watchedAt: float | None = None
        self._barren = 0
        self._running: Deferred[None] | None = None

    # --- running

    def start(self) -> None:
        """Begin :meth:`run`, with the whole state. What was heard before a stop stays."""
        self._known.silenced = False
        self._known.doubt()
        self._watchedAt = None
        running = Deferred.fromCoroutine(self.run())
        running.addErrback(self._ended)
        self._running = running

    def stop(self) -> None:
        """End it. Once this returns nothing is said any more, and no timer and no connection is left."""
        self._known.silenced = True
        running, self._running = self._running, None
        if running is not None:
            running.cancel()

    def _ended(self, reason: Failure) -> None:
        if not isinstance(reason.value, CancelledError):
            self.log.failure("The reflector of {kind} has died", reason, kind=self._known.kind)

    async def run(self) -> None:
        """Step by step, until cancelled. Whatever goes wrong ends here, and nothing said is taken back."""
        step = Step.SYNC
        try:
            while True:
                try:
                    step = await self._steps[step]()
                except CancelledError:
                    raise
                except Exception as error:
                    self.log.failure("Asking for all {kind} anew after an unexpected error", kind=self._known.kind)
                    self._known.doubt()
                    await self._pause(error)
                    step = Step.SYNC
        finally:
            self._journal.state = "stopped"

    async def _sync(self) -> Step:
        streaming = self._streamAt is not None and self._clock.seconds() >= self._streamAt
        return Step.STREAM if streaming and not self._newest else Step.LIST

    # --- the whole state

    async def _list(self) -> Step:
        """List all of it."""
        self._journal.state = "confirming" if self._guard.alarm else "listing"
        newest = self._newest
        # "0": the first list may come from the server's cache, which spares etcd when all nodes start at once.
        rv = "" if newest else self._known.rv or "0"
        try:
            listing = await self._listed(rv)
        except (errors.Expired, errors.TooLargeResourceVersion) as error:
            return await self._outdated(error)
        except errors.Denied as error:
            if error.code == 404 and self._routes.lacks():
                self._journal.error(error)
                self._known.turn()
                return Step.SYNC
            # A resource version that is none for this server must not be asked for again and again.
            self._newest = newest or (error.code == 400 and rv not in ("", "0"))
            await self._pause(error)
            return Step.SYNC
        except KproxyError as error:
            await self._pause(error)
            return Step.SYNC
        if not newest and earlier(listing.rv, self._known.rv):
            self._journal.error(errors.WentBack(f"the list is of {listing.rv}, and {self._known.rv} was there already"))
            self._newest = True
            return Step.LIST
        return await self._believe(listing)

    async def _listed(self, rv: str) -> Listing:
        resource, known = self._routes.resource, self._known.store.objects
        return await patiently(self._clock, lambda: self._lister.list(resource, rv, known), self._postponed)

    async def _believe(self, listing: Listing) -> Step:
        self._routes.works()
        if self._guard.doubts(self._known.store, listing):
            return await self._doubt()
        self._journal.counts["lists"] += 1
        self._replace(listing)
        return Step.WATCH

    async def _safety(self) -> Step:
        """Compare with the newest state. Where that cannot be had, there is no reason to give up the watch."""
        self._journal.state = "comparing"
        try:
            listing = await self._listed("")
        except KproxyError as error:
            self._journal.error(error)
            self._safetyAt = self._clock.seconds() + SAFETY_RETRY
            return Step.WATCH
        self._newest = True
        return await self._believe(listing)

    async def _stream(self) -> Step:
        """Watch, with all that is there as its beginning; what follows it is a watch like any other."""
        self._known.begin(True)
        started, events = self._clock.seconds(), self._journal.counts["events"]
        failure: KproxyError | None = None
        try:
            await self._follow(self._watchSeconds(), True)
        except KproxyError as error:
            failure = error
        except _Doubted:
            return await self._doubt()
        if not self._known.awaiting:
            return await self._watched(failure, started, events)
        match failure:
            case errors.Expired() | errors.TooLargeResourceVersion():
                return await self._outdated(failure)
            case errors.Denied(code=404):
                return Step.LIST
            case errors.Denied(code=401 | 403 | 429):
                await self._pause(failure)
                return Step.SYNC
            case errors.NotStreamed() | errors.Denied(code=400 | 405 | 406 | 422):
                return self._unstreamed(failure)
            case errors.TimedOut() if self._watcher.openedAt is not None:
                return self._unstreamed(failure)
            case errors.LinkError() if self._watcher.openedAt is None:
                await self._pause(failure)
                return Step.SYNC
            case errors.WentBack():
                self._newest = True
        # What came so far is worth nothing. Another try might end in the same way: a list is the surer one.
        await self._pause(failure or errors.ConnectionLost("the watch ended before its initial state was there"))
        return Step.LIST

    def _complete(self, listing: Listing) -> None:
        """The initial state of a watch is there; the watch goes on if that can be believed."""
        if earlier(listing.rv, self._known.rv):
            raise errors.WentBack(f"the initial state is of {listing.rv}, and {self._known.rv} was there already")
        if self._guard.doubts(self._known.store, listing):
            raise _Doubted()
        self._watcher.settled()
        self._watchedAt = self._clock.seconds()
        self._routes.works()
        self._journal.state = "watching"
        self._journal.counts["streams"] += 1
        self._replace(listing)

    def _unstreamed(self, error: KproxyError) -> Step:
        self._journal.error(error)
        self._streamAt = self._clock.seconds() + UNSTREAMED
        return Step.LIST

    async def _outdated(self, error: KproxyError) -> Step:
        """The server cannot answer for our resource version: the newest state, and at once, but not time and again."""
        if self._newest:
            await self._pause(error)
        else:
            self._newest = True
            self._journal.error(error)
        return Step.LIST

    async def _doubt(self) -> Step:
        """What came may be a mistake: it is not said before another list, of the newest state, agrees."""
        self.log.error(
            "ALARM: the server sent {what} of {kind}. That is not believed before a second list says the same, in "
            "{seconds:g} s; until then everything goes on as last known",
            what=self._guard.alarm, kind=self._known.kind, seconds=CONFIRM_AFTER,
        )
        self._newest = True
        self._journal.state = "doubting"
        await deferLater(self._clock, CONFIRM_AFTER)
        return Step.LIST

    def _replace(self, listing: Listing) -> None:
        if self._newest or not self._safetyAt:
            low, high = SAFETY_SECONDS
            self._safetyAt = self._clock.seconds() + low + self._random() * (high - low)
        if self._newest and earlier(listing.rv, self._known.rv):
            self.log.warn(
                "The server went back from {old} to {rv}, as after restoring a backup: {kind} is as it is there now",
                old=self._known.rv, rv=listing.rv, kind=self._known.kind,
            )
        self._newest = False
        self._known.replace(listing)

    # --- what changes

    async def _watch(self) -> Step:
        """Watch once; only where that proves too little, the whole state follows."""
        now = self._clock.seconds()
        if self._watchedAt is not None and now - self._watchedAt < RESTART_FLOOR:
            await deferLater(self._clock, self._watchedAt + RESTART_FLOOR - now)
        if self._routes.untilProbe() == 0.0 and await self._routes.probe(self._client):
            self._known.turn()
            return Step.SYNC
        if self._clock.seconds() >= self._safetyAt:
            return await self._safety()
        started, events = self._clock.seconds(), self._journal.counts["events"]
        self._watchedAt = started
        self._known.begin(False)
        due = [self._watchSeconds(), self._safetyAt - started, self._routes.untilProbe()]
        seconds = max(LEAST_SECONDS, int(min(it for it in due if it is not None)))
        try:
            await self._follow(seconds, False)
        except KproxyError as error:
            return await self._watched(error, started, events)
        return await self._watched(None, started, events)

    async def _follow(self, seconds: int, initialEvents: bool) -> None:
        self._journal.state = "connecting"
        await self._watcher.watch(self._routes.resource, self._known.rv, seconds, initialEvents)

    def _opened(self) -> None:
        self._journal.state = "streaming" if self._known.awaiting else "watching"
        self._journal.counts["watches"] += 1

    async def _watched(self, failure: KproxyError | None, started: float, events: int) -> Step:
        """A watch has ended; what next?"""
        barren = self._journal.counts["events"] == events
        short = self._clock.seconds() - (self._watcher.openedAt or started) < SHORT_WATCH
        self._barren = self._barren + 1 if barren and failure is not None else 0
        match failure:
            case None if barren and short:
                await self._pause(errors.ConnectionLost("the watch ended at once, without an event"))
                return Step.SYNC
            case None:
                self._journal.agreed()
                return Step.WATCH
            case errors.Denied():
                await self._pause(failure)
                # Also for 410: a restarted server gives it to all nodes at once, and the pause spreads them.
                return Step.WATCH if failure.code == 429 else Step.SYNC
            case errors.LinkError():
                # Nothing says that the state here is wrong: go on from where we are, and at once, but not time and
                # again.
                if barren and (short or self._barren > 1):
                    await self._pause(failure)
                else:
                    self._journal.error(failure)
                return Step.WATCH
            case errors.WentBack():
                self._newest = True
        await self._pause(failure)
        return Step.SYNC

    def _watchSeconds(self) -> int:
        low, high = WATCH_SECONDS
        return low + int(self._random() * (high - low))

    # --- all the rest

    def _postponed(self, error: errors.Denied) -> None:
        self._journal.counts["retries"] += 1
        self._journal.error(error)
        self._journal.state = "waiting"

    async def _pause(self, error: Exception) -> None:
        if self._routes.goesWithout(error):
            self._journal.lacking(error)
            seconds = PROBE_EVERY * (1 + self._random() / 2) if self._routes.isSettled else self._backoff.next()
            await deferLater(self._clock, seconds)
            return
        self._journal.counts["retries"] += 1
        self._journal.error(error)
        self._journal.state = "waiting"
        # A server that says how long to wait is not asked earlier.
        await deferLater(self._clock, max(self._backoff.next(), getattr(error, "postponed", None) or 0.0))

    @property
    def inUse(self) -> bool:
        """Whether this is a kind that must be there, or is."""
        return not self._routes.resource.optional or (self._journal.heard is not None and not self._journal.missing)

    def age(self) -> float | None:
        """
        Seconds since the server last proved that nothing is missing here: by a list, an event, a bookmark, the regular
        end of a watch. A connection that is just up proves nothing. ``None``: never.
        """
        return self._journal.age()

    def outage(self) -> Outage | None:
        """Since when nothing has worked, if so."""
        opened = self._watcher.openedAt
        if self._journal.state == "watching" and opened is not None and self._clock.seconds() - opened >= SHORT_WATCH:
            self._journal.connected()
        return self._journal.outage()

    def counters(self) -> dict[str, int]:
        """What only grows: for metrics."""
        return {**self._journal.counters(), **self._guard.counters()}

    @property
    def alarm(self) -> str:
        """Why the last list is not believed yet; ``""`` where it is."""
        return self._guard.alarm

    def status(self) -> dict[str, Any]:
        """JSON-able facts for operators."""
        age = self.age()
        return {
            "state": self._journal.state, "reads": self._routes.resource.path, "resourceVersion": self._known.rv,
            "ageSeconds": None if age is None else round(age, 3),
            **self.counters(),
            "objects": len(self._known.store.objects),
            "rejected": dict(self._known.store.rejected),
            "alarm": self._guard.alarm,
            "lastError": self._journal.lastError,
        }
