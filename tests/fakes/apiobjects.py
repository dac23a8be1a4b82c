"""Objects of the fake API server and what is said of them: JSON as Go writes it, events, pages. No I/O."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .apikinds import Json, Kind

Key = tuple[str, str]  # namespace ("" for what has none) and name


def encode(it: object) -> bytes:
    """JSON as Go writes it: compact, and with ``<``, ``>`` and ``&`` escaped."""
    data = msgspec.json.encode(it)
    return data.replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")


class Event:
    """
    One change.

    :ivar old: the object before; ``None`` for a new one.
    :ivar new: the object after; ``None`` where it was deleted.
    """

    __slots__ = ("_frames", "key", "kind", "new", "old", "version")

    def __init__(self, version: int, kind: Kind, key: Key, old: Json | None, new: Json | None) -> None:
        self.version = version
        self.kind = kind
        self.key = key
        self.old = old
        self.new = new
        self._frames: dict[str, bytes] = {}

    def said(self, wanted: Callable[[Json], bool] | None) -> tuple[str, Json] | None:
        """
        What a watch says of it through a selector: an object that stops matching is DELETED, with its old contents
        and the new resourceVersion; one that starts to is ADDED. ``None`` where there is nothing to say.
        """
        before = self.old is not None and (wanted is None or wanted(self.old))
        after = self.new is not None and (wanted is None or wanted(self.new))
        if not before and not after:
            return None
        type = "DELETED" if not after else "MODIFIED" if before else "ADDED"
        return type, (self.new or {}) if after else stamped(self.old or {}, self.version)

    def frame(self, wanted: Callable[[Json], bool] | None) -> bytes | None:
        """The same as a line; lines are made once for all watches."""
        said = self.said(wanted)
        if said is None:
            return None
        type, it = said
        if type not in self._frames:
            self._frames[type] = eventFrame(type, self.kind, it)
        return self._frames[type]


class Page(msgspec.Struct):
    """An answer to LIST."""

    version: int
    items: list[Json]
    token: str = ""
    remaining: int | None = None


def eventFrame(type: str, kind: Kind, it: Json) -> bytes:
    """One line of a watch."""
    return encode({"type": type, "object": full(kind, it)}) + b"\n"


def full(kind: Kind, it: Json) -> Json:
    """With its kind and apiVersion in front, as an object stands by itself; list items go without."""
    return {"kind": kind.kind, "apiVersion": kind.apiVersion, **it}


def stamped(it: Json, version: int) -> Json:
    """The object under another resourceVersion."""
    return {**it, "metadata": {**(it.get("metadata") or {}), "resourceVersion": str(version)}}
