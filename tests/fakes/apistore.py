"""
The objects of the fake API server: one resourceVersion over all kinds, and a history of what changed. No I/O.

Objects are plain JSON dictionaries. One that is in the store is never altered in place: a change puts another one
there. The store checks next to nothing, so that broken objects can be served, too.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from .apikinds import KINDS, Json, Kind
from .apiobjects import Event, Key, Page, encode, eventFrame, full, stamped
from .apistatus import (
    StatusError,
    alreadyExists,
    badRequest,
    conflict,
    expiredContinue,
    expiredExact,
    noResource,
    notFound,
    tooLarge,
)

_UIDS = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")


class Store:
    """
    :param kinds: what it has room for.
    :param historySize: so many changes are remembered: from before that, no watch can start and no page be continued.
    :param resourceVersion: where counting starts.
    :param now: the wall clock, for creationTimestamp.
    :ivar admission: called with each object to be stored and the one that it replaces; gives the object to store or
        raises :class:`~tests.fakes.apistatus.StatusError`. For defaults and checks.
    :ivar tooLargeSeconds: how long a request for a resourceVersion of the future waits.
    """

    tooLargeSeconds = 3.0

    def __init__(
        self,
        kinds: Sequence[Kind] = KINDS,
        historySize: int = 10_000,
        resourceVersion: int = 1,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.kinds = tuple(kinds)
        self.resourceVersion = resourceVersion
        self.admission: list[Callable[[Json, Json | None], Json]] = []
        self.now = now
        self._objects: dict[Kind, dict[Key, Json]] = {kind: {} for kind in self.kinds}
        self._byKind = {(kind.apiVersion, kind.kind): kind for kind in self.kinds}
        self._byPath = {(kind.group, kind.version, kind.plural): kind for kind in self.kinds}
        self._history: deque[Event] = deque()
        self._historySize = historySize
        self._oldest = resourceVersion  # the earliest version from which everything since is known
        self._uids = 0
        self._listeners: list[Callable[[Event], None]] = []

    # --- what there is ---

    @property
    def historySize(self) -> int:
        return self._historySize

    @historySize.setter
    def historySize(self, size: int) -> None:
        self._historySize = size
        self._trim()

    @property
    def oldest(self) -> int:
        """The earliest resourceVersion that a watch can start from."""
        return self._oldest

    def kindAt(self, group: str, version: str, plural: str) -> Kind | None:
        return self._byPath.get((group, version, plural))

    def kindOf(self, it: Json) -> Kind:
        """:raise StatusError: 404 for what is not served."""
        try:
            return self._byKind[it.get("apiVersion", ""), it.get("kind", "")]
        except (KeyError, TypeError):
            raise noResource() from None

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        """:raise StatusError: 404."""
        try:
            return self._objects[kind][namespace if kind.namespaced else "", name]
        except KeyError:
            raise notFound(kind, name) from None

    def objects(self, kind: Kind, version: int | None = None) -> dict[Key, Json]:
        """All objects of a kind, now or as they were at a resourceVersion that the history reaches back to."""
        if version is None or version >= self.resourceVersion:
            return self._objects[kind]
        then = dict(self._objects[kind])
        for event in reversed(self._history):
            if event.version <= version:
                break
            if event.kind is kind:
                self._undo(then, event)
        return then

    def list(
        self,
        kind: Kind,
        namespace: str = "",
        wanted: Callable[[Json], bool] | None = None,
        limit: int = 0,
        token: str = "",
        exact: int | None = None,
    ) -> Page:
        """
        :param namespace: ``""`` for all.
        :param limit: 0 for all; a page ends with a token where there is more.
        :param token: of an earlier page.
        :param exact: as it was at that resourceVersion.
        :raise StatusError: 400, 410, 504.
        """
        version, start = self.resourceVersion if exact is None else exact, ("", "")
        if token:
            version, start = self._opened(token)
        elif version > self.resourceVersion:
            raise tooLarge(version, self.resourceVersion, self.tooLargeSeconds)
        elif version < self._oldest:
            raise expiredExact()
        there = self.objects(kind, version)
        keys = sorted(key for key in there if not namespace or key[0] == namespace)
        if token:
            keys = keys[bisect_right(keys, start) :]
        found = [(key, there[key]) for key in keys if wanted is None or wanted(there[key])]
        page = Page(version, [it for _, it in (found[:limit] if limit else found)])
        if limit and len(found) > limit:
            page.token = _sealed(version, found[limit - 1][0], kind.namespaced)
            if wanted is None:
                page.remaining = len(found) - limit
        return page

    def _opened(self, token: str) -> tuple[int, Key]:
        try:
            said = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
            version, start = int(said["rv"]), str(said["start"])
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise badRequest(f"invalid continue token: continue key is not valid: {error}") from None
        namespace, _, name = start.removesuffix("\0").removeprefix("/").rpartition("/")
        if version == -1:
            return self.resourceVersion, (namespace, name)
        if version < self._oldest:
            raise expiredContinue(_sealed(-1, (namespace, name), bool(namespace)))
        return version, (namespace, name)

    def since(self, version: int) -> Iterable[Event]:
        """The changes after a resourceVersion, which must not be before :attr:`oldest`."""
        newer = []
        for event in reversed(self._history):
            if event.version <= version:
                break
            newer.append(event)
        return reversed(newer)

    # --- changes ---

    def begin(self, *objects: Json) -> None:
        """Put objects there that have been there from the start: they take up no resourceVersion and are no news."""
        for it in objects:
            kind, key = self._placed(it)
            self._objects[kind][key] = stamped(self._made(kind, key, None, it), self.resourceVersion)

    def restore(self, version: int, kind: Kind, key: Key, it: Json | None) -> None:
        """Redo a change of an earlier life: ``it`` is what was stored, ``None`` where it was deleted."""
        self._uids += 1
        if it is None:
            self._objects[kind].pop(key, None)
        else:
            self._objects[kind][key] = it
        self.resourceVersion = max(version, self.resourceVersion)
        self._forget()

    def create(self, it: Json, dry: bool = False) -> Json:
        """
        Store a new object. A uid and a creationTimestamp that it brings are kept, so that tests can choose them.

        :param dry: only tell what would be stored.
        :raise StatusError: 409 where there is one of that name.
        """
        self.absent(it)
        kind, key = self._placed(it)
        return self._made(kind, key, None, it) if dry else self._put(kind, key, None, it)

    def absent(self, it: Json) -> None:
        """:raise StatusError: 409 where there is one of that name."""
        kind, key = self._placed(it)
        if key in self._objects[kind]:
            raise alreadyExists(kind, key[1])

    def update(self, it: Json, dry: bool = False) -> Json:
        """
        Replace an object; uid and creationTimestamp stay.

        :param dry: only tell what would be stored.
        :raise StatusError: 404; 409 where it says a resourceVersion or a uid other than that of the stored one.
        """
        kind, key = self._placed(it)
        old = self._objects[kind].get(key)
        if old is None:
            raise notFound(kind, key[1])
        self.matches(it, old)
        if dry:
            return stamped(self._made(kind, key, old, it), int(old["metadata"]["resourceVersion"]))
        return self._put(kind, key, old, it)

    def matches(self, it: Json, old: Json) -> None:
        """:raise StatusError: 409 where it says a resourceVersion or a uid other than that of the stored one."""
        for field in ("resourceVersion", "uid"):
            if it["metadata"].get(field) not in (None, "", old["metadata"].get(field)):
                raise conflict(self.kindOf(it), old["metadata"]["name"])

    def apply(self, it: Json) -> Json:
        """Create or replace, whatever resourceVersion it says."""
        kind, key = self._placed(it)
        return self._put(kind, key, self._objects[kind].get(key), it)

    def delete(self, it: Json) -> Json:
        """
        Delete the object of that kind, namespace and name. With finalizers it only gets a deletionTimestamp, and goes
        when an update takes the last finalizer away.

        :return: the object as it was last.
        :raise StatusError: 404.
        """
        kind, key = self._placed(it)
        return self.remove(kind, *key)

    def remove(self, kind: Kind, namespace: str, name: str) -> Json:
        """The same by kind and name."""
        old = self.get(kind, namespace, name)
        if not old["metadata"].get("finalizers"):
            return self._drop(kind, (namespace, name), old)
        if "deletionTimestamp" in old["metadata"]:
            return old
        doomed = {"deletionTimestamp": self._timestamp(), "deletionGracePeriodSeconds": 0}
        return self._put(kind, (namespace, name), old, {**old, "metadata": {**old["metadata"], **doomed}})

    # --- misfortunes ---

    def compact(self) -> int:
        """
        Forget the history: no watch can start before now, and no page be continued. Takes up one resourceVersion,
        as other writers would in a real cluster, so that nobody's is current any more.
        """
        self.resourceVersion += 1
        self._forget()
        return self.resourceVersion

    def rewind(self, resourceVersion: int) -> None:
        """
        Go back in time, as after restoring a backup: objects and resourceVersion are those of then, and what came
        after never was. Nobody is told.

        :raise ValueError: when the history does not reach back so far.
        """
        if not self._oldest <= resourceVersion <= self.resourceVersion:
            raise ValueError(f"{resourceVersion} is not between {self._oldest} and {self.resourceVersion}")
        while self._history and self._history[-1].version > resourceVersion:
            event = self._history.pop()
            self._undo(self._objects[event.kind], event)
        self.resourceVersion = resourceVersion
        self._forget()

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Tell of each change from now on. Gives what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    # --- inside ---

    def _placed(self, it: Json) -> tuple[Kind, Key]:
        kind = self.kindOf(it)
        metadata = it.get("metadata")
        if not isinstance(metadata, dict):
            metadata = {}
        name = metadata.get("name")
        if not isinstance(name, str) or not name:
            raise badRequest(f"the {kind.kind} has no metadata.name")
        return kind, (str(metadata.get("namespace") or "default") if kind.namespaced else "", name)

    def _put(self, kind: Kind, key: Key, old: Json | None, it: Json) -> Json:
        new = self._made(kind, key, old, it)
        if old is not None:
            if stamped(old, 0) == stamped(new, 0):
                return old  # a write that changes nothing makes no event
            if "deletionTimestamp" in old["metadata"] and not new["metadata"].get("finalizers"):
                return self._drop(kind, key, new)
        self.resourceVersion += 1
        new["metadata"]["resourceVersion"] = str(self.resourceVersion)
        self._objects[kind][key] = new
        self._tell(Event(self.resourceVersion, kind, key, old, new))
        return new

    def _made(self, kind: Kind, key: Key, old: Json | None, it: Json) -> Json:
        """The object as it is stored, but for its resourceVersion."""
        for step in self.admission:
            it = step(it, old)
        metadata = {name: value for name, value in it["metadata"].items() if value is not None}
        if old is None:
            self._uids += 1
            uid = metadata.get("uid") or str(uuid.uuid5(_UIDS, f"{kind.plural}/{key[0]}/{key[1]}/{self._uids}"))
            kept = {"uid": uid, "creationTimestamp": metadata.get("creationTimestamp") or self._timestamp()}
        else:
            kept = {name: old["metadata"][name] for name in ("uid", "creationTimestamp") if name in old["metadata"]}
        place = {"name": key[1], **({"namespace": key[0]} if kind.namespaced else {})}
        ours = {"name", "namespace", "resourceVersion", *kept}
        rest = {name: value for name, value in metadata.items() if name not in ours}
        new: Json = {"metadata": {**place, "uid": "", "resourceVersion": "", **kept, **rest}}
        new.update((name, value) for name, value in it.items() if name not in ("kind", "apiVersion", "metadata"))
        return new

    def _drop(self, kind: Kind, key: Key, last: Json) -> Json:
        self.resourceVersion += 1
        del self._objects[kind][key]
        self._tell(Event(self.resourceVersion, kind, key, last, None))
        return stamped(last, self.resourceVersion)

    def _tell(self, event: Event) -> None:
        self._history.append(event)
        self._trim()
        for listener in list(self._listeners):
            listener(event)

    def _trim(self) -> None:
        while len(self._history) > self._historySize:
            self._oldest = self._history.popleft().version

    def _forget(self) -> None:
        self._history.clear()
        self._oldest = self.resourceVersion

    @staticmethod
    def _undo(objects: dict[Key, Json], event: Event) -> None:
        if event.old is None:
            objects.pop(event.key, None)
        else:
            objects[event.key] = event.old

    def _timestamp(self) -> str:
        return self.now().strftime("%Y-%m-%dT%H:%M:%SZ")


def _sealed(version: int, key: Key, namespaced: bool) -> str:
    """The continue token after a key; like the real one, which starts with ``/`` unless it is inconsistent."""
    start = f"{key[0]}/{key[1]}" if namespaced else key[1]
    said = {"v": "meta.k8s.io/v1", "rv": version, "start": f"{'' if version == -1 else '/'}{start}\0"}
    return base64.urlsafe_b64encode(json.dumps(said, separators=(",", ":")).encode()).decode().rstrip("=")


__all__ = ["Event", "Key", "Page", "StatusError", "Store", "encode", "eventFrame", "full", "stamped"]
