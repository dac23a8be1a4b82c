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
    """An object is there, new or changed."""

    key: str
    object: Any
    rv: str


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
    """

    key: str
    reason: str
    rv: str


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
                return Unknown(event.type, _metaOf(event.object).resourceVersion or "")

    def _change(self, event: wire.Event) -> WatchEvent:
        try:
            it = wire.decode(self._kind, event.object)
        except wire.Unreadable as error:
            meta = _metaOf(event.object)
            rv = meta.resourceVersion or ""
            if event.type == "DELETED" and error.key:
                # Which one it was is all that has to be known of it.
                return Gone(error.key, None, rv)
            return Bad(error.key, error.reason, rv)
        key = wire.keyOf(it.metadata)
        rv = it.metadata.resourceVersion or ""
        return Gone(key, it, rv) if event.type == "DELETED" else Set(key, it, rv)


def _metaOf(data: Any) -> wire.ObjectMeta:
    try:
        return wire.decodeMeta(data).metadata or wire.ObjectMeta()
    except _UNDECODABLE:
        return wire.ObjectMeta()


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


def decodeListing(kind: Kind, body: bytes) -> Listing:
    """
    Read the body of a list. Items are decoded one by one: one that cannot be read costs only itself.

    :raise Unusable: where the body is not a list of that kind: not JSON, another kind such as Table, or without a
        resource version to watch from.
    """
    try:
        listing = wire.decodeList(body)
    except _UNDECODABLE as error:
        raise Unusable(f"the answer to a list of {kind} is not a list: {error}")
    if listing.kind != f"{kind}List":
        raise Unusable(f"the answer to a list of {kind} is of kind {listing.kind or 'unknown'}, not {kind}List")
    rv = listing.metadata.resourceVersion
    if not rv:
        raise Unusable(f"the list of {kind} has no metadata.resourceVersion")
    objects: dict[str, Any] = {}
    rejected: dict[str, str] = {}
    for index, item in enumerate(listing.items or ()):
        try:
            it = wire.decode(kind, item)
        except wire.Unreadable as error:
            rejected[error.key or f"(item {index})"] = error.reason
        else:
            objects[wire.keyOf(it.metadata)] = it
    return Listing(objects, rejected, rv, listing.metadata.continue_ or "")
