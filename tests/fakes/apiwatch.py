"""WATCH, as the fake API server does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .apifaults import Reply
from .apikinds import Json, Kind
from .apistatus import tooOld
from .apistore import Event, encode, eventFrame

if TYPE_CHECKING:
    from .apiserver import FakeApi


class Watch:
    """
    One open watch: from its answer's headers to its end.

    :param wanted: its selectors, ``None`` for none.
    :param version: from which resourceVersion on; ``None`` for the present state first, as ADDED events.
    :param initial: whether that present state is wanted.
    :param mark: whether a bookmark says where the initial events end.
    :param seconds: when it ends by itself.
    :param frame: makes a line of an event's type and object, where that is not the usual one.
    """

    def __init__(
        self,
        api: FakeApi,
        reply: Reply,
        kind: Kind,
        namespace: str,
        wanted: Callable[[Json], bool] | None,
        version: int | None,
        initial: bool,
        mark: bool,
        bookmarks: bool,
        seconds: float,
        frame: Callable[[str, Json], bytes] | None = None,
    ) -> None:
        self.kind = kind
        self.version = version
        self._api = api
        self._reply = reply
        self._namespace = namespace
        self._wanted = wanted
        self._initial = initial
        self._mark = mark
        self._bookmarks = bookmarks
        self._seconds = seconds
        self._form = frame
        self._timers: dict[str, Any] = {}

    def start(self) -> None:
        store, reply = self._api.store, self._reply
        reply.open()
        if self.version is None:
            self.version = store.resourceVersion
            if self._initial:
                for it in store.list(self.kind, self._namespace, self._wanted).items:
                    reply.write(self._frame("ADDED", it))
                if self._mark:
                    reply.write(self._bookmark({"k8s.io/initial-events-end": "true"}))
        elif self.version < store.oldest:
            reply.write(encode({"type": "ERROR", "object": tooOld(self.version, store.oldest)}) + b"\n")
            reply.finish()
            return
        else:
            for event in store.since(self.version):
                self.deliver(event)
        if reply.over:
            return
        self._api.watches.append(self)
        self._later("deadline", self._seconds, self.end)
        if self._bookmarks:
            self._later("bookmark", self._api.bookmarkSeconds, self._regular)
            if self._seconds > 2:
                self._later("last", self._seconds - 2, self.bookmark)

    def deliver(self, event: Event) -> None:
        """Something has changed."""
        assert self.version is not None
        if event.kind is not self.kind or (self._namespace and event.key[0] != self._namespace):
            return
        # A watch from the future stays silent until the future is there, even if time has been turned back.
        if event.version <= self.version:
            return
        if self._form is None:
            frame = event.frame(self._wanted)
        else:
            said = event.said(self._wanted)
            frame = None if said is None else self._form(*said)
        if frame is not None:
            self._reply.write(frame)

    def bookmark(self) -> None:
        """Say how far this watch has come; nothing where bookmarks were not asked for, or it began in the future."""
        assert self.version is not None
        if self._bookmarks and self._api.store.resourceVersion >= self.version:
            self._reply.write(self._bookmark())

    def raw(self, data: bytes) -> None:
        """Put anything into the stream."""
        self._reply.write(data)

    def end(self) -> None:
        """The orderly end."""
        self.forget()
        self._reply.finish()

    def cut(self, abort: bool = True, midEvent: bool = False) -> None:
        """End the connection without the last chunk; with ``midEvent`` after the first half of an event."""
        self.forget()
        if midEvent:
            it = {"metadata": {"name": "never-complete", "namespace": "default"}}
            frame = eventFrame("ADDED", self.kind, it)
            self._reply.write(frame[: len(frame) // 2])
        self._reply.cut(abort)

    def forget(self) -> None:
        """The connection is gone, or about to be."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self in self._api.watches:
            self._api.watches.remove(self)

    def _regular(self) -> None:
        self._later("bookmark", self._api.bookmarkSeconds, self._regular)
        self.bookmark()

    def _bookmark(self, annotations: Json | None = None) -> bytes:
        metadata: Json = {"resourceVersion": str(self._api.store.resourceVersion)}
        if annotations:
            metadata["annotations"] = annotations
        return self._frame("BOOKMARK", {"metadata": metadata, **self.kind.bookmark})

    def _frame(self, type: str, it: Json) -> bytes:
        return eventFrame(type, self.kind, it) if self._form is None else self._form(type, it)

    def _later(self, name: str, seconds: float, what: Callable[[], None]) -> None:
        def now() -> None:
            self._timers.pop(name, None)
            what()

        self._timers[name] = self._api.reactor.callLater(seconds, now)
