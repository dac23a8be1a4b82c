"""From bytes to watch events and lists."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.recordings import WATCHES, Recording, bodyOf, comparable, names
from tests.shared.sources import manifest
from twisted_kproxy.sources.errors import BadFrame, FrameTooLong, StreamError, Unusable
from twisted_kproxy.sources.stream import (
    Bad,
    Bookmark,
    Failed,
    Gone,
    Listing,
    Set,
    Unknown,
    WatchEvent,
    WatchStream,
    decodeListing,
)


def frame(type: str, it: Any) -> bytes:
    return json.dumps({"type": type, "object": it}).encode() + b"\n"


def versioned(name: str, rv: str, **fields: Any) -> dict[str, Any]:
    it = manifest(name, **fields)
    it["metadata"]["resourceVersion"] = rv
    return it


def listOf(*items: Any, kind: str = "ServiceList", **metadata: Any) -> bytes:
    return json.dumps({"kind": kind, "metadata": {"resourceVersion": "9", **metadata}, "items": items}).encode()


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def recordings() -> list[Recording]:
    """Of the newest and of an old server."""
    return [Recording(name, version) for version in ("v1.36", "v1.20") for name in names(version)]


def eventsOf(recording: Recording, chunks: list[bytes]) -> list[WatchEvent]:
    stream = WatchStream(recording.kind)
    events = [event for chunk in chunks for event in stream.feed(chunk)]
    assert stream.close() == 0
    return events


class EventTests(SynchronousTestCase):
    """What each line of a watch becomes."""

    def one(self, data: bytes) -> WatchEvent:
        (event,) = WatchStream("Service").feed(data)
        return event

    def test_setAndGone(self) -> None:
        """ADDED and MODIFIED set an object, DELETED takes it away; all carry key and resource version."""
        for type, into in (("ADDED", Set), ("MODIFIED", Set), ("DELETED", Gone)):
            event = self.one(frame(type, versioned("web", "7")))
            assert isinstance(event, (Set, Gone)) and event.object is not None
            self.assertIs(into, event.__class__)
            self.assertEqual((event.key, event.rv), ("shop/web", "7"))
            self.assertEqual(event.object.spec.clusterIP, "10.96.0.10")

    def test_bookmark(self) -> None:
        """A bookmark is its resource version; only the annotation "true" marks the end of initial events."""
        for marks, end in ((None, False), ({"k8s.io/initial-events-end": "true"}, True),
                                 ({"k8s.io/initial-events-end": "false"}, False), ({"other": "true"}, False)):
            it = {"kind": "Service", "metadata": {"resourceVersion": "12", "annotations": marks}}
            self.assertEqual(self.one(frame("BOOKMARK", it)), Bookmark("12", end))

    def test_failed(self) -> None:
        """An ERROR is the Status that it carries."""
        event = self.one(frame("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}))
        assert isinstance(event, Failed)
        self.assertEqual((event.status.code, event.status.reason, event.status.message), (410, "Expired", "too old"))

    def test_unreadableObject(self) -> None:
        """An object that cannot be read is reported by name, its resource version still counts."""
        event = self.one(frame("MODIFIED", versioned("web", "7", port="eighty")))
        assert isinstance(event, Bad)
        self.assertEqual((event.key, event.rv), ("shop/web", "7"))
        self.assertIn("port", event.reason)

    def test_unreadableMetadata(self) -> None:
        """Where not even the name can be read, the event is still passed on, nameless."""
        event = self.one(frame("ADDED", {"metadata": {"name": 5}}))
        assert isinstance(event, Bad)
        self.assertEqual((event.key, event.rv), ("", ""))

    def test_unreadableGone(self) -> None:
        """An object that cannot be read can still be deleted."""
        event = self.one(frame("DELETED", versioned("web", "7", port="eighty")))
        self.assertEqual(event, Gone("shop/web", None, "7"))

    def test_unknownType(self) -> None:
        """An event of a type from the future is passed on as such."""
        self.assertEqual(self.one(frame("RENAMED", versioned("web", "7"))), Unknown("RENAMED", "7"))

    def test_table(self) -> None:
        """Rows of a Table are not taken for objects."""
        data = bodyOf((WATCHES / "endpointslices-table.response").read_bytes())
        events = WatchStream("EndpointSlice").feed(data)
        self.assertFalse([event for event in events if isinstance(event, (Set, Gone))])


class FramingTests(SynchronousTestCase):
    """Where events begin and end."""

    def test_emptyLinesAndReturns(self) -> None:
        """Empty lines and carriage returns around events are passed over."""
        data = frame("ADDED", versioned("web", "7"))
        events = WatchStream("Service").feed(b"\n\r\n" + data[:-1] + b"\r\n \n" + data)
        self.assertEqual([event.rv for event in events if isinstance(event, Set)], ["7", "7"])

    def test_unfinishedEvent(self) -> None:
        """An event without its end is no event; closing tells how much was dropped."""
        data = frame("ADDED", versioned("web", "7"))
        stream = WatchStream("Service")
        self.assertEqual(stream.feed(data[:-1]), [])
        self.assertEqual(stream.close(), len(data) - 1)
        self.assertEqual(stream.close(), 0)

    def test_limit(self) -> None:
        """An event of just the limit passes; one byte more breaks the stream, also before its end is there."""
        data = frame("ADDED", versioned("web", "7"))
        for size in (1, 7, len(data)):
            stream = WatchStream("Service", limit=len(data) - 1)
            self.assertEqual(sum((len(stream.feed(piece)) for piece in pieces(data * 2, size)), 0), 2)
            stream = WatchStream("Service", limit=len(data) - 2)
            with self.assertRaises(FrameTooLong):
                for piece in pieces(data[:-1], size):
                    stream.feed(piece)

    def test_brokenStaysBroken(self) -> None:
        """What follows a broken line is not read: nobody knows where it begins."""
        stream = WatchStream("Service")
        with self.assertRaises(BadFrame) as caught:
            stream.feed(frame("ADDED", versioned("web", "7")) + b"<html>\n" + frame("ADDED", versioned("db", "8")))
        self.assertEqual([event.key for event in caught.exception.events], ["shop/web"])
        with self.assertRaises(BadFrame) as caught:
            stream.feed(frame("ADDED", versioned("db", "8")))
        self.assertEqual(caught.exception.events, ())

    def test_notAnEvent(self) -> None:
        """A line that is JSON but no event, or not UTF-8, or nested without end breaks the stream, and nothing else."""
        for line in (b"[]", b"{}", b'{"type": "ADDED"}', b'{"type": 1, "object": {}}', b"null", b"\xff\xfe",
                     b'{"type":"BOOKMARK","object":[]}', b'{"type":"ERROR","object":"x"}', b"[" * 100000):
            with self.assertRaises(BadFrame):
                WatchStream("Service").feed(line + b"\n")

    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(st.binary(max_size=200))
    def test_anyBytes(self, data: bytes) -> None:
        """Whatever the bytes are, there is a list of events or a L{StreamError}."""
        stream = WatchStream("Service")
        try:
            stream.feed(data)
        except StreamError:
            pass


class RecordingTests(SynchronousTestCase):
    """Recorded watches of a real API server."""

    def folded(self, recording: Recording, chunks: list[bytes]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if recording.start:
            state.update(decodeListing(recording.kind, bodyOf(recording.start)).objects)
        for event in eventsOf(recording, chunks):
            if isinstance(event, Set):
                state[event.key] = event.object
            elif isinstance(event, Gone):
                del state[event.key]
            else:
                self.assertIsInstance(event, Bookmark)
        return {key: comparable(it) for key, it in state.items()}

    def test_final(self) -> None:
        """Start list and events give what the server listed in the end, field by field."""
        self.assertGreaterEqual(len(recordings()), 14)
        for recording in recordings():
            self.assertEqual(self.folded(recording, [recording.body]), recording.final(), recording.name)

    def test_sequence(self) -> None:
        """Every event is seen, in order, with its key or resource version."""
        for recording in recordings():
            told = [
                f"BOOKMARK {event.rv}" if isinstance(event, Bookmark) else getattr(event, "key", "?")
                for event in eventsOf(recording, [recording.body])
            ]
            expected = [
                it if it.startswith("BOOKMARK") else it.partition(" ")[2] for it in recording.expected["sequence"]
            ]
            self.assertEqual(told, expected, recording.name)

    def test_initialEventsEnd(self) -> None:
        """The mark after the initial events of a streaming list is seen where it stands, and only there."""
        for recording in recordings():
            events = eventsOf(recording, [recording.body])
            marks = [event.rv for event in events if isinstance(event, Bookmark) and event.initialEventsEnd]
            expected = [it["resourceVersion"] for it in recording.expected["bookmarks"] if it["initialEventsEnd"]]
            self.assertEqual(marks, expected, recording.name)

    def test_byteByByte(self) -> None:
        """Single bytes give the same events as the whole."""
        for recording in recordings():
            whole = eventsOf(recording, [recording.body])
            self.assertEqual(eventsOf(recording, pieces(recording.body, 1)), whole, recording.name)

    def test_anyBorders(self) -> None:
        """Any borders give the same events as the whole."""
        recording = Recording("services")
        whole = eventsOf(recording, [recording.body])

        @settings(derandomize=True, deadline=None, max_examples=50)
        @given(st.lists(st.integers(0, len(recording.body)), max_size=200))
        def check(cuts: list[int]) -> None:
            borders = [0, *sorted(cuts), len(recording.body)]
            chunks = [recording.body[a:b] for a, b in pairwise(borders)]
            self.assertEqual(eventsOf(recording, chunks), whole)

        check()


class ListingTests(SynchronousTestCase):
    """Bodies of lists."""

    def test_items(self) -> None:
        """Items come by key, with the resource version of the collection and the token for the next page."""
        body = json.loads(listOf(manifest("web"), manifest("db"), **{"continue": "abc"}))
        listing = decodeListing("Service", json.dumps(body).encode())
        self.assertEqual(sorted(listing.objects), ["shop/db", "shop/web"])
        self.assertEqual((listing.rv, listing.next, listing.rejected), ("9", "abc", {}))

    def test_lastPage(self) -> None:
        """A list without a token has no further page, and may be empty or have C{null} for items."""
        for items in ([], None):
            body = json.dumps({"kind": "ServiceList", "metadata": {"resourceVersion": "9"}, "items": items}).encode()
            self.assertEqual(decodeListing("Service", body), Listing({}, {}, "9", ""))

    def test_badItem(self) -> None:
        """An item that cannot be read costs only itself; one without a name gets its place for a name."""
        listing = decodeListing("Service", listOf(manifest("web"), manifest("bad", port="x"), {"metadata": {}}, 5))
        self.assertEqual(list(listing.objects), ["shop/web"])
        self.assertEqual(sorted(listing.rejected), ["(item 2)", "(item 3)", "shop/bad"])

    def test_anotherKind(self) -> None:
        """A body of another kind is refused: a Table, a single object, a Status, a list of something else."""
        for kind in ("Table", "Service", "Status", "EndpointSliceList", None):
            with self.assertRaises(Unusable) as caught:
                decodeListing("Service", json.dumps({"kind": kind, "metadata": {"resourceVersion": "1"}}).encode())
            self.assertIn("ServiceList", str(caught.exception))

    def test_recordedTable(self) -> None:
        """The Table that kubectl asks for is refused."""
        body = bodyOf((WATCHES / "endpointslices-table.start.response").read_bytes())
        with self.assertRaises(Unusable):
            decodeListing("EndpointSlice", body)

    def test_noVersion(self) -> None:
        """A list without a resource version cannot be watched from, and is refused."""
        for metadata in ({}, {"resourceVersion": ""}, {"resourceVersion": None}):
            with self.assertRaises(Unusable):
                decodeListing("Service", json.dumps({"kind": "ServiceList", "metadata": metadata}).encode())

    def test_notAList(self) -> None:
        """A body that is cut, not JSON or not an object is refused."""
        for body in (b"", b"<html>", b"[]", b"\xff", listOf(manifest("web"))[:-5]):
            with self.assertRaises(Unusable):
                decodeListing("Service", body)
