"""The whole state as the beginning of a watch (KEP-3157); the scenarios of client-go's watch-list tests."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionRefusedError

from tests.fakes.rawhttp import Exchange
from tests.shared.reflectors import EXPIRED, ReflectorCase, bookmark, listOf, versioned
from twisted_kproxy.core.values import Change, Replaced
from twisted_kproxy.sources import reflector


def mark(rv: str, value: str = "true") -> dict[str, Any]:
    it = bookmark(rv)
    it["metadata"]["annotations"] = {"k8s.io/initial-events-end": value}
    return it


class StreamCase(ReflectorCase):
    """A reflector that asks for streaming lists."""

    streaming = True

    def nextStream(self, rv: str = "") -> Exchange:
        """The request that has come must be for a streaming list."""
        exchange = self.next()
        expected = {
            "watch": "true", "allowWatchBookmarks": "true", "sendInitialEvents": "true", "timeoutSeconds": "300",
            "resourceVersionMatch": "NotOlderThan", "labelSelector": "!a/b", "fieldSelector": "spec.clusterIP!=None",
        }
        if rv:
            expected["resourceVersion"] = rv
        self.assertEqual(exchange.query, expected)
        return exchange

    def streamed(self, *items: dict[str, Any], rv: str = "100") -> Exchange:
        """Start; the whole state has come, and the watch goes on."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        for it in items:
            stream.event("ADDED", it)
        stream.event("BOOKMARK", mark(rv))
        return stream


class StreamTests(StreamCase):
    """As long as the server can do it."""

    def test_oneWordThenChanges(self) -> None:
        """All up to the mark is one word; the same watch then brings changes, and the next one begins where it ends."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        stream.event("ADDED", versioned("b", "9"))
        stream.event("ADDED", versioned("a", "3"))
        self.assertEqual(self.words.said, [])
        self.assertIsNone(self.reflector.age())
        self.assertEqual(self.reflector.status()["state"], "streaming")
        stream.event("BOOKMARK", mark("10"))
        (word,) = self.words.said
        assert isinstance(word, Replaced)
        self.assertEqual(sorted(word.objects), ["shop/a", "shop/b"])
        self.assertEqual(self.reflector.status()["state"], "watching")
        self.assertEqual(self.reflector.age(), 0)
        stream.event("MODIFIED", versioned("a", "11", port=81))
        self.assertIsInstance(self.words.said[-1], Change)
        self.clock.advance(300)
        stream.end()
        self.nextWatch("11")
        self.assertEqual(self.reflector.status()["streams"], 1)
        self.assertEqual(self.reflector.status()["lists"], 0)

    def test_updatesAndDeletesDuringInitial(self) -> None:
        """What changes or goes before the mark is as it is then."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        stream.event("ADDED", versioned("a", "1"))
        stream.event("ADDED", versioned("b", "2"))
        stream.event("MODIFIED", versioned("a", "3", port=81))
        stream.event("DELETED", versioned("b", "4"))
        stream.event("BOOKMARK", mark("4"))
        state = self.words.state["Service"]
        self.assertEqual(list(state), ["shop/a"])
        self.assertEqual(state["shop/a"].spec.ports[0].port, 81)

    def test_rejected(self) -> None:
        """An object that cannot be read is named in that word, and keeps its last good version."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        stream.event("ADDED", versioned("a", "1", port="x"))
        stream.event("ADDED", versioned("b", "2"))
        stream.event("BOOKMARK", mark("4"))
        (word,) = self.words.said
        assert isinstance(word, Replaced)
        self.assertEqual((list(word.objects), list(word.rejected)), (["shop/b"], ["shop/a"]))

    def test_bookmarksWithoutMark(self) -> None:
        """A bookmark without the annotation, or with another value, is not the end; nothing counts before it is."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        stream.event("ADDED", versioned("a", "1"))
        stream.event("BOOKMARK", bookmark("5"))
        stream.event("BOOKMARK", mark("6", "false"))
        self.assertEqual(self.words.said, [])
        stream.event("BOOKMARK", mark("7"))
        self.assertEqual(len(self.words.said), 1)

    def test_markIsNoInterval(self) -> None:
        """The mark tells nothing about how often bookmarks come."""
        self.chance = 0.0
        stream = self.streamed()
        self.clock.advance(200)
        self.assertTrue(stream.open)
        stream.event("BOOKMARK", bookmark("101"))
        self.clock.advance(120)
        self.assertTrue(stream.open)

    def test_overdue(self) -> None:
        """Also a watch that began in this way is cut half a minute after its time."""
        stream = self.streamed()
        self.clock.advance(329.9)
        self.assertTrue(stream.open)
        self.clock.advance(0.2)
        self.assertTrue(stream.aborted)
        self.nextWatch("100")

    def test_again(self) -> None:
        """After a 410 the whole state is streamed again, not older than what is known; equal is not said."""
        stream = self.streamed(versioned("a", "1"))
        stream.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        stream = self.nextStream("100")
        stream.begin()
        stream.event("ADDED", versioned("a", "1"))
        stream.event("BOOKMARK", mark("120"))
        self.assertEqual(len(self.words.said), 1)
        self.assertEqual(self.reflector.status()["relists"], 1)

    def test_poison(self) -> None:
        """An error of whoever listens is logged, and answered with the whole state again, which is then said."""
        say, failures = self.words.say, [ValueError("no")]

        def raising(word: Any) -> None:
            if failures:
                raise failures.pop()
            say(word)

        self.reflector._known._say = raising
        self.streamed(versioned("a", "1"))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.clock.advance(0.8)
        stream = self.nextStream("100")
        stream.begin()
        stream.event("ADDED", versioned("a", "1"))
        stream.event("BOOKMARK", mark("120"))
        self.assertEqual(list(self.words.state["Service"]), ["shop/a"])


class FallbackTests(StreamCase):
    """When the server cannot, or it does not work."""

    def test_invalid(self) -> None:
        """A server that does not know it says 422: it is asked for a list at once, and for an hour for lists only."""
        self.patch(reflector, "SAFETY_SECONDS", (1_000_000, 1_000_000))
        self.start()
        self.nextStream().answerJson({"kind": "Status", "code": 422, "reason": "Invalid", "message": "forbidden"}, 422)
        self.nextList("0").answerJson(listOf())
        watch = self.nextWatch("100")
        watch.begin()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(listOf())
        watch = self.nextWatch("100")
        watch.begin()
        for _ in range(13):
            self.clock.advance(300)
            watch.event("BOOKMARK", bookmark("100"))
            watch.end()
            watch = self.nextWatch("100")
            watch.begin()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(60)
        self.nextStream("100")

    def test_noMark(self) -> None:
        """Half a minute without an event before the mark: a list."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        stream.event("ADDED", versioned("a", "1"))
        self.clock.advance(29.9)
        self.assertTrue(stream.open)
        self.clock.advance(0.2)
        self.assertTrue(stream.aborted)
        self.nextList("0").answerJson(listOf())
        self.nextWatch("100")

    def test_onlyPlainBookmarks(self) -> None:
        """Bookmarks, none of which is the mark, do not keep it waiting for ever."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        for _ in range(2):
            self.clock.advance(20)
            stream.event("BOOKMARK", bookmark("5"))
        self.assertFalse(stream.open)
        self.nextList("0")

    def test_endlessInitial(self) -> None:
        """A stream that brings events without end and no mark is given up after five minutes."""
        self.chance = 0.99
        self.start()
        stream = self.next()
        stream.begin()
        for number in range(29):
            self.clock.advance(10)
            stream.event("ADDED", versioned("a", str(number)))
        self.assertTrue(stream.open)
        self.clock.advance(10.1)
        self.assertTrue(stream.aborted)
        self.nextList("0")

    def test_endsBeforeMark(self) -> None:
        """A stream that ends, breaks or fails before the mark is worth nothing: after a pause, a list."""
        for how in ("end", "reset", "error", "garbage"):
            self.start()
            stream = self.nextStream()
            stream.begin()
            stream.event("ADDED", versioned("a", "1"))
            self.clock.advance(5)
            match how:
                case "end":
                    stream.end()
                case "reset":
                    stream.reset()
                case "error":
                    stream.event("ERROR", {"kind": "Status", "code": 500, "message": "etcd"})
                case "garbage":
                    stream.chunk(b"<html>\n")
            self.assertFalse(stream.open, how)
            self.assertEqual(self.words.said, [])
            self.nothing()
            self.clock.advance(0.8)
            self.nextList("0")
            self.stop()
            self.setUp()

    def test_expired(self) -> None:
        """A 410 for a streaming list, before or within it, leads to the newest state at once."""
        for within in (False, True):
            self.start()
            stream = self.nextStream()
            if within:
                stream.begin()
                stream.event("ERROR", EXPIRED)
            else:
                stream.answerJson(EXPIRED, 410)
            self.nextList("").answerJson(listOf())
            self.nextWatch("100")
            self.stop()
            self.setUp()

    def test_tooLarge(self) -> None:
        """So does a server that lags behind."""
        stream = self.streamed()
        stream.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextStream("100").answerJson(
            {"kind": "Status", "code": 504, "message": "Too large resource version: 100, current: 3"}, 504
        )
        self.nextList("").answerJson(listOf(rv="3"))
        self.nextWatch("3")

    def test_tooManyRequests(self) -> None:
        """A 429 is waited out, and the stream asked for again; with Retry-After just so long, and up to ten times."""
        self.start()
        self.nextStream().answer(b"Too many requests\n", 429, "text/plain")
        self.nothing()
        self.clock.advance(0.8)
        for _ in range(11):
            self.nextStream().answer(b"Too many requests\n", 429, "text/plain", Retry_After="3")
            self.clock.advance(2.9)
            self.nothing() if self.reflector.status()["retries"] < 12 else None
            self.clock.advance(0.2)
        self.nextStream()

    def test_refused(self) -> None:
        """Where nobody listens, it is not the stream that is at fault."""
        self.network.refusal = ConnectionRefusedError()
        self.start()
        self.network.refusal = None
        self.clock.advance(0.8)
        self.nextStream()

    def test_serverError(self) -> None:
        """An error of the server: after a pause a list, and only then the stream again: one request for each pause."""
        self.start()
        self.nextStream().answerJson({"code": 500}, 500)
        self.nothing()
        self.clock.advance(0.8)
        self.nextList("0").answerJson({"code": 500}, 500)
        self.nothing()
        self.clock.advance(1.6)
        self.nextStream()

    def test_wentBack(self) -> None:
        """An initial state older than what was known is not taken over before the newest state says the same."""
        stream = self.streamed(versioned("a", "1"), rv="500")
        stream.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        stream = self.nextStream("500")
        stream.begin()
        stream.event("BOOKMARK", mark("300"))
        self.assertEqual(list(self.words.state["Service"]), ["shop/a"])
        self.clock.advance(1.6)
        self.nextList("").answerJson(listOf(rv="300"))
        self.assertEqual(self.words.state["Service"], {})
        self.nextWatch("300")


class StopTests(StreamCase):
    """Stopped in any state, it leaves nothing."""

    def test_beforeHeaders(self) -> None:
        """While the server has not answered."""
        self.start()
        stream = self.nextStream()
        self.stop()
        self.assertTrue(stream.aborted)

    def test_beforeMark(self) -> None:
        """Before the mark: nothing is said."""
        self.start()
        stream = self.nextStream()
        stream.begin()
        stream.event("ADDED", versioned("a", "1"))
        self.stop()
        self.assertFalse(stream.open)
        self.assertEqual(self.words.said, [])

    def test_afterMark(self) -> None:
        """After it."""
        stream = self.streamed(versioned("a", "1"))
        self.stop()
        self.assertFalse(stream.open)

    def test_whileSaying(self) -> None:
        """While the whole state is being said: what follows in the same bytes is not."""
        say = self.words.say

        def stopping(word: Any) -> None:
            say(word)
            self.stop()

        self.reflector._known._say = stopping
        self.streamed(versioned("a", "1"))
        self.assertEqual(len(self.words.said), 1)
        self.assertEqual(self.reflector.status()["state"], "stopped")
