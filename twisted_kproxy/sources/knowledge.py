"""
What is known of one kind, and what it is told to others as: lists and events come in, words go out.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ..core.values import Change, Kind, Rejected, Replaced, Word
from . import errors
from .journal import Journal
from .routes import Routes
from .store import Initial, Store, earlier
from .stream import Bad, Bookmark, Failed, Gone, Listing, Set, Unknown, WatchEvent


class Knowledge:
    """
    :param say: takes the words.
    :param patience: seconds after which a bookmark that does not mark the end of the initial state proves that none
        will.
    :param complete: takes the initial state of a watch once its end is marked; what it raises ends the watch. It calls
        :meth:`replace` if it believes it.
    :ivar rv: the resource version up to which all is known; ``""`` for none.
    :ivar silenced: whoever was told has ended this: not another word.
    """

    log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        source: str,
        say: Callable[[Word], None],
        routes: Routes,
        journal: Journal,
        patience: float,
        complete: Callable[[Listing], None],
    ) -> None:
        self._clock = clock
        self._source = source
        self._say = say
        self._routes = routes
        self._journal = journal
        self._patience = patience
        self._complete = complete
        self._stores: dict[Kind, Store] = {}
        self._initial: Initial | None = None
        self._initialSince = 0.0
        # A watch from nowhere begins with what is there, in any order: only what follows has a resource version.
        self._disordered = False
        self.rv = ""
        self.silenced = False

    @property
    def kind(self) -> Kind:
        """Of what is read now."""
        return self._routes.resource.kind

    @property
    def store(self) -> Store:
        """The objects of that kind."""
        return self._stores.setdefault(self.kind, Store())

    def doubt(self) -> None:
        """Whoever was told may not know it: the next list is said, whatever is in it."""
        self._initial = None
        for store in self._stores.values():
            store.said = False

    def turn(self) -> None:
        """From now on another resource is read: its resource versions have nothing to do with the old one's."""
        self.rv = ""
        self._journal.kind = self.kind
        self.store.said = False

    # --- lists

    def replace(self, listing: Listing) -> None:
        """Take over the whole state, and say it where it is another than before."""
        self.rv = listing.rv
        self._journal.agreed()
        for key, reason in listing.rejected.items():
            self._reject(key, reason)
        differs = self.store.replace(listing)
        self.log.info(
            "There are {count} of {kind} at {rv}{same}",
            count=len(listing.objects), kind=self.kind, rv=self.rv, same="" if differs else ", as before",
        )
        if differs:
            self._tell(Replaced(self._source, self.kind, listing.objects, listing.rejected))
            self._tellOthers()

    def _tellOthers(self) -> None:
        """Of two kinds that mean the same only one is read: once that is said, the other one is empty."""
        for kind in sorted(self._routes.kinds - {self.kind}):
            store = self._stores.get(kind, Store())
            # A kind that was never said is missed only where it is the one that was promised.
            if store.objects or (kind == self._routes.best.kind and not store.said):
                self._stores[kind] = Store()
                self._stores[kind].said = True
                self._tell(Replaced(self._source, kind, {}))

    # --- watches

    def begin(self, initialEvents: bool) -> None:
        """A watch begins, from :attr:`rv`; with what is there as its first events, or not."""
        self._initial = Initial(self.store) if initialEvents else None
        self._initialSince = self._clock.seconds()
        self._disordered = self.rv in ("", "0")

    @property
    def awaiting(self) -> bool:
        """Whether the initial state of the watch has not come yet."""
        return self._initial is not None

    def take(self, event: WatchEvent) -> None:
        """
        Take over one event.

        :raise KproxyError: where the watch should end here.
        """
        if isinstance(event, Failed):
            raise errors.fromStatus(event.status)
        self._journal.counts["events"] += 1
        if self._initial is not None:
            self._takeInitial(event, self._initial)
            return
        self._advance(event)
        self._journal.agreed()
        match event:
            case Set(key=key):
                if self.store.put(key, event.object):
                    self._tell(Change(self._source, self.kind, key, None))
                self._tell(Change(self._source, self.kind, key, event.object))
            case Gone(key=key):
                self.store.remove(key)
                self._tell(Change(self._source, self.kind, key, None))
            case Bad(reason=reason):
                key = self.store.keyOf(event.key, event.uid)
                self._reject(key, reason)
                if key:
                    self.store.rejected[key] = reason
                    self._tell(Rejected(self._source, self.kind, key, reason))
            case Unknown(type=type):
                self.log.warn("Passed over an event of unknown type {type!r} of {kind}", type=type, kind=self.kind)

    def _takeInitial(self, event: WatchEvent, initial: Initial) -> None:
        """The whole state as it comes in: it counts once its end is marked."""
        match event:
            case Set(key=key):
                initial.put(key, event.object)
            case Gone(key=key):
                initial.remove(key)
            case Bad(reason=reason):
                initial.reject(self.store.keyOf(event.key, event.uid), reason)
            case Bookmark(initialEventsEnd=True):
                if not event.rv:
                    raise errors.Unusable("the end of the initial state has no resource version")
                self._complete(initial.listing(event.rv))
                self._initial = None
                self._disordered = False
            case Bookmark() if self._clock.seconds() - self._initialSince >= self._patience:
                raise errors.NotStreamed("there are bookmarks, but none marks the end of the initial state")

    def _advance(self, event: WatchEvent) -> None:
        """Also for what is not understood: the next watch must not begin before it again."""
        assert not isinstance(event, Failed)
        if self._disordered and isinstance(event, Set) and event.added:
            return
        self._disordered = False
        if earlier(event.rv, self.rv):
            raise errors.WentBack(f"an event is of {event.rv}, and {self.rv} was there already")
        self.rv = event.rv or self.rv

    # --- words

    def _tell(self, word: Word) -> None:
        self._say(word)
        if self.silenced:
            # Stopped by whoever heard it: then this is no Deferred's callback that cancelling could reach.
            raise CancelledError()

    def _reject(self, key: str, reason: str) -> None:
        if not key or self.store.rejected.get(key) != reason:
            self._journal.rejected(key, reason, key in self.store.objects)
