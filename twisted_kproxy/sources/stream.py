"""
From bytes to what they say: watch streams and list bodies of the API server. No I/O.

A watch stream is JSON documents, each ended by a newline; Go's encoder escapes newlines within strings, so splitting
at them is safe. Borders of TCP segments, TLS records, HTTP chunks and events have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from ..core import wire
from ..core.values import Kind
from .errors import BadFrame, FrameTooLong, StreamError, Unusable

#: etcd takes no request beyond 1.5 MiB, so no true event comes near.
FRAME_LIMIT = 16 * 1024 * 1024
INITIAL_EVENTS_END = "k8s.io/initial-events-end"


class Set(Struct, frozen=True):
    """
    An object is there, new or changed.

    :ivar added: the server calls it new.
    """

    key: str
    object: Any
    rv: str
    added: bool = False


class Gone(Struct, frozen=True):
    """
    An object is no longer there, or no longer matches the selectors.

    :ivar object: its last state, ``None`` where that cannot be read.
    """

    key: str
    object: Any | None
    rv: str


class Bookmark(Struct, frozen=True):
    """
    Nothing has happened up to this resource version.

    :ivar initialEventsEnd: everything that existed when the watch began has been sent.
    """

    rv: str
    initialEventsEnd: bool = False


class Failed(Struct, frozen=True):
    """The server gives up on this watch, and says why."""

    status: wire.Status


class Bad(Struct, frozen=True):
    """
    An object that cannot be read.

    :ivar key: ``""`` where not even that can be told.
    :ivar rv: still counts: the next watch must not meet the same event again. ``""`` where it cannot be told.
    :ivar uid: ``""`` where it cannot be told.
    """

    key: str
    reason: str
    rv: str
    uid: str = ""


class Unknown(Struct, frozen=True):
    """An event of a type that this version does not know; there to be logged and passed over."""

    type: str
    rv: str


WatchEvent: TypeAlias = Set | Gone | Bookmark | Failed | Bad | Unknown

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class WatchStream:
    """
    The bytes of one watch, in any pieces, to its events.

    The work is linear in the bytes fed, whatever the pieces are.

    :param kind: what the watched objects are.
    :param limit: of one event, in bytes.
    """

    def __init__(self, kind: Kind, limit: int = FRAME_LIMIT) -> None:
        self._kind = kind
        self._limit = limit
        self._parts: list[bytes] = []
        self._pending = 0
        self._broken: StreamError | None = None

    def feed(self, data: bytes) -> list[WatchEvent]:
        """
        Take the next bytes.

        :return: the events that they complete.
        :raise StreamError: where the stream cannot be read any further; the events before are in it. So does every
            later call.
        """
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))
        events: list[WatchEvent] = []
        start = 0
        while True:
            end = data.find(b"\n", start)
            piece = data[start:] if end < 0 else data[start:end]
            if self._pending + len(piece) > self._limit:
                raise self._break(FrameTooLong, f"an event is longer than {self._limit} bytes", events)
            if end < 0:
                if piece:
                    self._parts.append(piece)
                    self._pending += len(piece)
                return events
            if self._parts:
                self._parts.append(piece)
                piece = b"".join(self._parts)
                self._parts.clear()
                self._pending = 0
            start = end + 1
            if not piece or piece.isspace():
                continue
            try:
                events.append(self._event(piece))
            except _UNDECODABLE as error:
                raise self._break(BadFrame, f"a line of the watch is not an event: {error}", events)

    def close(self) -> int:
        """
        The bytes have ended.

        :return: how many bytes of an unfinished event there were; they are dropped, since the next watch brings the
            whole of it.
        """
        dropped = self._pending
        self._parts.clear()
        self._pending = 0
        return dropped

    def _break(self, error: type[StreamError], message: str, events: list[WatchEvent]) -> StreamError:
        self.close()
        self._broken = error(message, events)
        return self._broken

    def _event(self, frame: bytes) -> WatchEvent:
        event = wire.decodeEvent(frame)
        match event.type:
            case "ADDED" | "MODIFIED" | "DELETED":
                return self._change(event)
            case "BOOKMARK":
                meta = wire.decodeMeta(event.object).metadata or wire.ObjectMeta()
                end = (meta.annotations or {}).get(INITIAL_EVENTS_END) == "true"
                return Bookmark(meta.resourceVersion or "", end)
            case "ERROR":
                return Failed(wire.decodeStatus(event.object))
            case _:
                return Unknown(event.type, identityOf(event.object).rv)

    def _change(self, event: wire.Event) -> WatchEvent:
        try:
            it = wire.decode(self._kind, event.object)
        except wire.Unreadable as error:
            about = identityOf(event.object)
            key = error.key or about.key
            if event.type == "DELETED" and key:
                # Which one it was is all that has to be known of it.
                return Gone(key, None, about.rv)
            return Bad(key, error.reason, about.rv, about.uid)
        key = wire.keyOf(it.metadata)
        rv = it.metadata.resourceVersion or ""
        return Gone(key, it, rv) if event.type == "DELETED" else Set(key, it, rv, event.type == "ADDED")


class Identity(Struct, frozen=True):
    """Which object this is, as far as it can be told: what cannot is ``""``."""

    key: str = ""
    uid: str = ""
    rv: str = ""


class _Whatever(Struct, frozen=True):
    """An object whose metadata is looked at field by field: one that is wrong does not hide the others."""

    metadata: dict[str, msgspec.Raw] = {}


_decodeWhatever = wire.deeply(msgspec.json.Decoder(_Whatever))
_decodeText = msgspec.json.Decoder(str).decode


def identityOf(data: Any) -> Identity:
    """Which object the JSON of one that cannot be read is about."""
    try:
        metadata = _decodeWhatever(data).metadata
    except _UNDECODABLE:
        return Identity()

    def text(field: str) -> str:
        try:
            return _decodeText(metadata[field])
        except (KeyError, *_UNDECODABLE):
            return ""

    name, namespace = text("name"), text("namespace")
    key = f"{namespace}/{name}" if name and namespace else name
    return Identity(key, text("uid"), text("resourceVersion"))


class Listing(Struct, frozen=True):
    """
    One list, or one page of it.

    :ivar objects: by key.
    :ivar rejected: key → reason, of items that cannot be read.
    :ivar rv: the resource version of the collection.
    :ivar next: the token for the next page, ``""`` on the last.
    """

    objects: Mapping[str, Any]
    rejected: Mapping[str, str]
    rv: str
    next: str = ""


class ListingReader:
    """
    Reads the body of a list, in steps: between two of them others may have their turn. Items are decoded one by one:
    one that cannot be read costs only itself.

    :param known: objects by key: one that is equal comes back as the very same, so that nobody has to compare again.
        An item that says no name is told by its uid, where one of these has it.
    :raise Unusable: where the body is not a list of that kind: not JSON, another kind such as Table, or without a
        resource version to watch from.
    """

    def __init__(self, kind: Kind, body: bytes, known: Mapping[str, Any] | None = None) -> None:
        try:
            listing = wire.decodeList(body)
        except _UNDECODABLE as error:
            raise Unusable(f"the answer to a list of {kind} is not a list: {error}")
        if listing.kind != f"{kind}List":
            raise Unusable(f"the answer to a list of {kind} is of kind {listing.kind or 'unknown'}, not {kind}List")
        rv = listing.metadata.resourceVersion
        if not rv:
            raise Unusable(f"the list of {kind} has no metadata.resourceVersion")
        self._kind = kind
        self._known = known or {}
        self._items = listing.items or []
        self._at = 0
        self._objects: dict[str, Any] = {}
        self._rejected: dict[str, str] = {}
        self._rv = rv
        self._next = listing.metadata.continue_ or ""

    def read(self, count: int = 20) -> bool:
        """
        Decode some more items.

        :return: whether there are more.
        """
        for item in self._items[self._at : self._at + count]:
            self._read(item)
            self._at += 1
        return self._at < len(self._items)

    @property
    def listing(self) -> Listing:
        """What has been read."""
        return Listing(self._objects, self._rejected, self._rv, self._next)

    def _read(self, item: msgspec.Raw) -> None:
        try:
            it = wire.decode(self._kind, item)
        except wire.Unreadable as error:
            about = identityOf(item)
            key = error.key or about.key or keyByUid(self._known, about.uid)
            self._rejected[key or f"(item {self._at})"] = error.reason
            return
        key = wire.keyOf(it.metadata)
        before = self._known.get(key)
        self._objects[key] = before if before == it else it


def keyByUid(known: Mapping[str, Any], uid: str) -> str:
    """The key of the object with that uid; ``""`` where there is none."""
    return next((key for key, it in known.items() if it.metadata.uid == uid), "") if uid else ""


def decodeListing(kind: Kind, body: bytes) -> Listing:
    """
    The same, all at once.

    :raise Unusable: see :class:`ListingReader`.
    """
    reader = ListingReader(kind, body)
    while reader.read():
        pass
    return reader.listing
