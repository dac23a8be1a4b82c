"""List, watch, and what to do when that does not work; the scenarios of client-go's reflector tests."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionRefusedError, DNSLookupError
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.reflectors import EXPIRED, ReflectorCase, bookmark, listOf, versioned
from twisted_kproxy.core.values import Change, Rejected, Replaced
from twisted_kproxy.sources import reflector
from twisted_kproxy.sources.backoff import Backoff


class ListAndWatchTests(ReflectorCase):
    """As long as all goes well."""

    def test_requests(self) -> None:
        """Lists begin with what the server has at hand; watches ask for bookmarks and an end; both send selectors."""
        self.start()
        exchange = self.nextList("0")
        self.assertEqual(exchange.path, "/prefix/api/v1/services")
        self.assertEqual(
            exchange.query,
            {"resourceVersion": "0", "limit": "500", "labelSelector": "!a/b", "fieldSelector": "spec.clusterIP!=None"},
        )
        self.assertEqual(exchange.headers["accept"], "application/json")
        self.assertRegex(exchange.headers["user-agent"], r"^kproxy/\d")
        self.assertNotIn("authorization", exchange.headers)
        exchange.answerJson(listOf(rv="7"))
        self.assertEqual(
            self.next().query,
            {
                "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": "7", "timeoutSeconds": "300",
                "labelSelector": "!a/b", "fieldSelector": "spec.clusterIP!=None",
            },
        )

    def test_words(self) -> None:
        """A list is one word, each event another."""
        watch = self.watching(versioned("web", "90"), rv="100")
        watch.event("ADDED", versioned("db", "101"))
        watch.event("MODIFIED", versioned("web", "102", port=81))
        watch.event("DELETED", versioned("db", "103"))
        replaced, added, modified, deleted = self.words.said
        assert isinstance(replaced, Replaced) and isinstance(added, Change) and isinstance(modified, Change)
        self.assertEqual(list(replaced.objects), ["shop/web"])
        self.assertEqual((added.key, modified.key), ("shop/db", "shop/web"))
        assert modified.object is not None
        self.assertEqual(modified.object.spec.ports[0].port, 81)
        self.assertEqual(deleted, Change("api", "Service", "shop/db", None))
        self.assertEqual(self.reflector.status()["resourceVersion"], "103")

    def test_cleanEndResumes(self) -> None:
        """A watch that ended regularly goes on from its last event, without another list."""
        watch = self.watching()
        watch.event("ADDED", versioned("web", "105"))
        self.clock.advance(300)
        watch.end()
        self.nextWatch("105")
        self.assertEqual(len(self.words.said), 2)

    def test_floor(self) -> None:
        """Two watches never start within a quarter of a second, however the first one ends."""
        watch = self.watching()
        watch.event("ADDED", versioned("web", "105"))
        watch.end()
        self.clock.advance(0.24)
        self.nothing()
        self.clock.advance(0.011)
        self.nextWatch("105")

    def test_bookmarksMoveOn(self) -> None:
        """A bookmark moves the resource version and says nothing."""
        watch = self.watching()
        watch.event("BOOKMARK", bookmark("140"))
        self.assertEqual(len(self.words.said), 1)
        self.clock.advance(100)
        watch.end()
        self.nextWatch("140")

    def test_timeoutsSpread(self) -> None:
        """Watches are asked to last between five and ten minutes, at random."""
        self.chance = 0.5
        self.start()
        self.nextList("0").answerJson(listOf())
        self.assertEqual(self.next().query["timeoutSeconds"], "450")
        self.chance = 0.999999
        self.clock.advance(30)
        self.clock.advance(4)
        self.assertEqual(self.next().query["timeoutSeconds"], "599")

    def test_rejectedInList(self) -> None:
        """An item that cannot be read is named beside the others."""
        self.watching(versioned("web", "1"), versioned("bad", "2", port="x"))
        (replaced,) = self.words.said
        assert isinstance(replaced, Replaced)
        self.assertEqual((list(replaced.objects), list(replaced.rejected)), (["shop/web"], ["shop/bad"]))
        self.assertEqual(list(self.reflector.status()["rejected"]), ["shop/bad"])

    def test_rejectedInWatch(self) -> None:
        """An object that becomes unreadable is reported, its resource version passed; the next event counts."""
        watch = self.watching(versioned("web", "1"))
        watch.event("MODIFIED", versioned("web", "101", port="x"))
        rejected = self.words.said[-1]
        assert isinstance(rejected, Rejected)
        self.assertEqual(rejected.key, "shop/web")
        self.clock.advance(2)
        watch.end()
        watch = self.nextWatch("101")
        watch.begin()
        watch.event("MODIFIED", versioned("web", "102"))
        self.assertEqual(self.reflector.status()["rejected"], {})

    def test_unknownEvent(self) -> None:
        """An event of an unknown type is passed over, with its resource version."""
        watch = self.watching()
        watch.event("RENAMED", versioned("web", "101"))
        watch.event("ADDED", versioned("web", "102"))
        self.assertEqual(len(self.words.said), 2)

    def test_anyChunks(self) -> None:
        """Chunks that end within events make no difference."""
        watch = self.watching()
        data = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"777"}}}\n'
        for at in range(len(data)):
            watch.chunk(data[at : at + 1])
        self.assertEqual(self.reflector.status()["resourceVersion"], "777")


class ExpiredTests(ReflectorCase):
    """When the server no longer knows, or does not know yet, what we know."""

    def test_inStream(self) -> None:
        """A 410 within a watch leads to a list not older than the last event, after a pause that spreads nodes."""
        watch = self.watching()
        watch.event("ADDED", versioned("web", "105"))
        watch.event("ERROR", EXPIRED)
        self.assertFalse(watch.open)
        self.nothing()
        self.clock.advance(0.8)
        self.nextList("105").answerJson(listOf(versioned("db", "150"), rv="200"))
        self.assertEqual(list(self.words.state["Service"]), ["shop/db"])
        self.nextWatch("200")

    def test_asStatus(self) -> None:
        """So does a 410 instead of a watch."""
        self.start()
        self.nextList("0").answerJson(listOf())
        self.nextWatch("100").answerJson(EXPIRED, 410)
        self.clock.advance(0.8)
        self.nextList("100")

    def test_listExpired(self) -> None:
        """A 410 for a list is followed at once by one for the newest state; after that all is as before."""
        watch = self.watching()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(EXPIRED, 410)
        self.nextList("").answerJson(listOf(rv="300"))
        watch = self.nextWatch("300")
        watch.begin()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(1.6)
        self.nextList("300")

    def test_tooLarge(self) -> None:
        """A server that lags behind another is asked for its own newest state."""
        self.watching().event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(
            {
                "kind": "Status", "code": 504, "reason": "Timeout", "message": "Too large resource version: 100",
                "details": {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large"}]},
            },
            504,
        )
        self.nextList("").answerJson(listOf(rv="90"))
        self.nextWatch("90")

    def test_twiceInARow(self) -> None:
        """A 410 for the watch that follows the list leads to another list, after a longer pause."""
        self.watching().event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(listOf(rv="200"))
        watch = self.nextWatch("200")
        watch.begin()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(1.59)
        self.nothing()
        self.clock.advance(0.02)
        self.nextList("200").answerJson(EXPIRED, 410)
        self.nextList("")

    def test_newestFailsToo(self) -> None:
        """Where even the newest state is refused, there is a pause, and the newest is asked for again."""
        self.start()
        self.nextList("0").answerJson(EXPIRED, 410)
        self.nextList("").answerJson(EXPIRED, 410)
        self.nothing()
        self.clock.advance(0.8)
        self.nextList("").answerJson(listOf())
        self.nextWatch("100")

    def test_nothingIsTakenBack(self) -> None:
        """Until the new list is there, nothing is said."""
        watch = self.watching(versioned("web", "1"))
        watch.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").reset()
        self.assertEqual(len(self.words.said), 1)


class BackInTimeTests(ReflectorCase):
    """When the server has been restored from a backup."""

    def test_bookmark(self) -> None:
        """A bookmark from before what is known leads to the newest state, which counts."""
        watch = self.watching(versioned("web", "1"), rv="500")
        self.clock.advance(60)
        watch.event("BOOKMARK", bookmark("400"))
        self.assertFalse(watch.open)
        self.clock.advance(0.8)
        self.nextList("").answerJson(listOf(versioned("db", "2"), rv="410"))
        self.assertEqual(list(self.words.state["Service"]), ["shop/db"])
        self.nextWatch("410")

    def test_event(self) -> None:
        """So does an event, which is not taken over."""
        watch = self.watching(versioned("web", "1"), rv="500")
        watch.event("DELETED", versioned("web", "400"))
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
        self.clock.advance(0.8)
        self.nextList("")

    def test_list(self) -> None:
        """A list from before what is known is not said before the newest state is there."""
        self.watching(versioned("web", "1"), rv="500").event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("500").answerJson(listOf(rv="499"))
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
        self.nextList("").answerJson(listOf(versioned("web", "1"), rv="510"))
        self.assertEqual(len(self.words.said), 1)
        self.nextWatch("510")

    def test_safety(self) -> None:
        """A watch from the future is silent: between half an hour and an hour later the newest state is listed."""
        for chance, due in ((0.0, 1800), (0.5, 2700)):
            self.chance = chance
            watch = self.watching(versioned("web", "1"), rv="500")
            asked = []
            while not asked:
                left = due - self.clock.seconds()
                self.clock.advance(min(300, left))
                watch.end()
                self.clock.advance(0.25)
                exchange = self.next()
                if not exchange.watching:
                    asked.append(exchange)
                else:
                    watch = exchange
                    watch.begin()
            self.assertLess(abs(self.clock.seconds() - due), 6)
            self.assertNotIn("resourceVersion", asked[0].query)
            asked[0].answerJson(listOf(versioned("db", "2"), rv="410"))
            self.assertEqual(list(self.words.state["Service"]), ["shop/db"])
            self.nextWatch("410")
            self.stop()
            self.setUp()

    def test_safetyFails(self) -> None:
        """Where the newest state cannot be had, the watch goes on, and it is tried again after five minutes."""
        self.patch(reflector, "SAFETY_SECONDS", (300, 300))
        watch = self.watching(versioned("web", "1"))
        self.clock.advance(300)
        watch.end()
        self.nextList("").answerJson({"code": 504, "message": "etcd is down"}, 504)
        watch = self.nextWatch("100")
        watch.begin()
        watch.event("MODIFIED", versioned("web", "101", port=81))
        self.assertEqual(len(self.words.said), 2)
        self.clock.advance(300)
        watch.end()
        self.nextList("").answerJson(listOf(versioned("web", "101", port=81), rv="102"))
        self.assertEqual(len(self.words.said), 2)
        self.nextWatch("102")

    def test_nowhere(self) -> None:
        """
        A watch from "0" begins with what is there, in any order: only what follows has a resource version to go on
        from.
        """
        watch = self.watching(rv="0")
        watch.event("ADDED", versioned("b", "90"))
        watch.event("ADDED", versioned("a", "50"))
        self.assertEqual(self.reflector.status()["resourceVersion"], "0")
        watch.event("MODIFIED", versioned("a", "91"))
        watch.event("ADDED", versioned("c", "92"))
        self.assertEqual(self.reflector.status()["resourceVersion"], "92")
        self.assertEqual(sorted(self.words.state["Service"]), ["shop/a", "shop/b", "shop/c"])


class LinkTests(ReflectorCase):
    """When the network fails."""

    def test_refusedAtStart(self) -> None:
        """While nobody listens, lists are tried again after growing pauses."""
        self.network.refusal = ConnectionRefusedError()
        self.start()
        for pause in (0.8, 1.6, 3.2):
            attempts = self.network.attempts
            self.clock.advance(pause - 0.001)
            self.assertEqual(self.network.attempts, attempts)
            self.clock.advance(0.002)
            self.assertEqual(self.network.attempts, attempts + 1)
        self.network.refusal = None
        self.clock.advance(6.4)
        self.nextList("0").answerJson(listOf())
        self.assertIn("refused", self.reflector.status()["lastError"])

    def test_refusedWatch(self) -> None:
        """While a restarting server refuses, the same watch is tried again; there is no other list."""
        watch = self.watching()
        self.clock.advance(5)
        self.network.refusal = ConnectionRefusedError()
        watch.reset()
        self.clock.advance(0.8)
        self.clock.advance(1.6)
        self.network.refusal = None
        self.clock.advance(3.2)
        self.nextWatch("100")

    def test_noSuchName(self) -> None:
        """A name that does not resolve is a reason to wait."""
        self.network.refusal = DNSLookupError("no such host")
        self.start()
        self.assertIn("no such host", self.reflector.status()["lastError"])
        self.assertEqual(self.reflector.status()["state"], "waiting")

    def test_resetWithinEvent(self) -> None:
        """A connection that breaks within an event drops that part and goes on from the event before."""
        watch = self.watching()
        watch.event("ADDED", versioned("web", "105"))
        watch.chunk(b'{"type":"MODIFIED","object":{"metadata":{"name":"web","namespace":"shop","resourceVersion":"106"')
        self.clock.advance(5)
        watch.reset()
        self.assertEqual(len(self.words.said), 2)
        watch = self.nextWatch("105")
        watch.begin()
        watch.event("MODIFIED", versioned("web", "106", port=81))
        self.assertEqual(self.words.state["Service"]["shop/web"].spec.ports[0].port, 81)

    def test_brokenBeforeHeaders(self) -> None:
        """A connection that breaks before the answer to a watch is a reason to wait, not to list."""
        self.start()
        self.nextList("0").answerJson(listOf())
        self.nextWatch("100").reset()
        self.nothing()
        self.clock.advance(0.8)
        self.nextWatch("100")

    def test_brokenAtOnce(self) -> None:
        """A server that breaks every watch at once is not asked without a pause."""
        self.watching().reset()
        self.clock.advance(0.79)
        self.nothing()
        self.clock.advance(0.02)
        self.nextWatch("100")

    def test_breaksAgainAndAgain(self) -> None:
        """Watches that break one after the other, without an event, are tried again after pauses that grow."""
        watch = self.watching()
        times = []
        while self.clock.seconds() < 300:
            self.clock.advance(2)
            watch.reset()
            while not self.network.exchanges:
                self.clock.advance(0.1)
            times.append(self.clock.seconds())
            watch = self.nextWatch("100")
            watch.begin()
        self.assertLess(len(times), 16)

    def test_listBroken(self) -> None:
        """Half a list is no list."""
        self.start()
        exchange = self.nextList("0")
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{\"kind\"")
        exchange.reset()
        self.assertEqual(self.words.said, [])
        self.clock.advance(0.8)
        self.nextList("0").answerJson(listOf())
        self.assertEqual(len(self.words.said), 1)

    def test_shortWatch(self) -> None:
        """A watch that ends regularly but at once, without an event, is an error: pause, then list."""
        watch = self.watching()
        self.clock.advance(0.9)
        watch.end()
        self.nothing()
        self.clock.advance(0.8)
        self.nextList("100")

    def test_noHeaders(self) -> None:
        """A server that takes the request and says nothing is given up after half a minute."""
        self.start()
        exchange = self.nextList("0")
        self.clock.advance(29.9)
        self.assertTrue(exchange.open)
        self.clock.advance(0.2)
        self.assertTrue(exchange.aborted)
        self.assertIn("30 s", self.reflector.status()["lastError"])

    def test_noConnection(self) -> None:
        """So is an address that does not even take the connection."""
        self.network.silent = True
        self.start()
        self.clock.advance(30)
        self.assertEqual(self.network.connecting, [])
        self.assertEqual(self.reflector.status()["state"], "waiting")

    def test_listStalls(self) -> None:
        """A list that stops flowing is given up after a minute without a byte; one that flows slowly is not."""
        self.start()
        exchange = self.nextList("0")
        exchange.begin()
        for _ in range(5):
            self.clock.advance(50)
            exchange.chunk(b" ")
        self.assertTrue(exchange.open)
        self.clock.advance(60)
        self.assertTrue(exchange.aborted)


class WatchdogTests(ReflectorCase):
    """A link that is dead without a word."""

    def test_overdue(self) -> None:
        """A watch that does not end half a minute after its time is cut, and goes on from where it was."""
        watch = self.watching()
        self.clock.advance(329.9)
        self.assertTrue(watch.open)
        self.clock.advance(0.2)
        self.assertTrue(watch.aborted)
        self.nextWatch("100")

    def test_silentAfterBookmark(self) -> None:
        """Once bookmarks come, 150 seconds without a byte are too many."""
        self.chance = 0.99
        watch = self.watching()
        self.clock.advance(60)
        watch.event("BOOKMARK", bookmark("110"))
        self.clock.advance(140)
        self.assertTrue(watch.open)
        watch.event("ADDED", versioned("web", "111"))
        self.clock.advance(149)
        self.assertTrue(watch.open)
        self.clock.advance(1.1)
        self.assertTrue(watch.aborted)
        # The next watch knows by then what to expect, before its first bookmark.
        watch = self.nextWatch("111")
        watch.begin()
        self.clock.advance(150.1)
        self.assertTrue(watch.aborted)

    def test_slowBookmarks(self) -> None:
        """Bookmarks that come more slowly are waited for twice as long."""
        watch = self.watching()
        self.clock.advance(100)
        watch.event("BOOKMARK", bookmark("110"))
        self.clock.advance(199)
        self.assertTrue(watch.open)
        self.clock.advance(1.1)
        self.assertTrue(watch.aborted)

    def test_trickles(self) -> None:
        """Bytes that make no event are no sign of life: a connection may trickle for ever."""
        watch = self.watching()
        self.clock.advance(60)
        watch.event("BOOKMARK", bookmark("110"))
        for _ in range(15):
            self.assertTrue(watch.open)
            self.clock.advance(10)
            watch.chunk(b" ")
        self.clock.advance(0.1)
        self.assertTrue(watch.aborted)

    def test_deadForLong(self) -> None:
        """Through a black hole: found, tried again at once, then with growing pauses, and as before once it is gone."""
        watch = self.watching()
        self.clock.advance(60)
        watch.event("BOOKMARK", bookmark("110"))
        self.clock.advance(150)
        self.assertTrue(watch.aborted)
        self.network.silent = True
        attempts = self.network.attempts
        for _ in range(600):
            self.clock.advance(1)
        self.assertTrue(5 < self.network.attempts - attempts <= 16, self.network.attempts - attempts)
        self.network.silent = False
        self.network.exchanges.clear()
        came = self.clock.seconds()
        while not self.network.exchanges:
            self.clock.advance(1)
        self.assertLess(self.clock.seconds() - came, 92)
        self.nextWatch("110")

    def test_noBookmarks(self) -> None:
        """Without bookmarks, silence proves nothing."""
        watch = self.watching()
        watch.event("ADDED", versioned("web", "111"))
        self.clock.advance(329)
        self.assertTrue(watch.open)


class RefusalTests(ReflectorCase):
    """When the server answers, but not what was asked for."""

    def test_tooManyRequests(self) -> None:
        """A 429 for a watch is waited out; the watch is tried again, without a list."""
        self.start()
        self.nextList("0").answerJson(listOf())
        self.nextWatch("100").answer(b"Too many requests, please try again later.\n", 429, "text/plain")
        self.clock.advance(0.8)
        self.nextWatch("100")
        self.assertIn("429: Too many requests", self.reflector.status()["lastError"])

    def test_retryAfter(self) -> None:
        """A server that says how long to wait is asked the same again just then: a list or a watch, 429 or 5xx."""
        self.start()
        for code in (429, 500, 503, 504):
            self.nextList("0").answer(b"", code, "text/plain", Retry_After="7")
            self.clock.advance(6.9)
            self.nothing()
            self.clock.advance(0.2)
        self.nextList("0").answerJson(listOf())
        for code in (429, 503):
            self.nextWatch("100").answer(b"", code, "text/plain", Retry_After="3")
            self.clock.advance(2.9)
            self.nothing()
            self.clock.advance(0.2)
        self.nextWatch("100")

    def test_retryAfterTenTimes(self) -> None:
        """It is not asked in that way for ever: after ten times the pauses are our own, for a watch and a list."""
        self.start()
        for _ in range(10):
            self.nextList("0").answer(b"", 503, "text/plain", Retry_After="1")
            self.clock.advance(1)
        self.nextList("0").answer(b"", 503, "text/plain", Retry_After="1")
        self.clock.advance(0.99)
        self.nothing()
        self.clock.advance(0.02)
        self.nextList("0").answerJson(listOf())
        for _ in range(10):
            self.nextWatch("100").answer(b"", 503, "text/plain", Retry_After="1")
            self.clock.advance(1)
        self.nextWatch("100").answer(b"", 503, "text/plain", Retry_After="1")
        self.clock.advance(2)
        self.nextList("100")

    def test_strangeRetryAfter(self) -> None:
        """A time of zero is a second, one of days five minutes, a date or a minus counts for nothing."""
        for said, pause in (("0", 1.0), ("9999999", 300.0), ("-5", 0.8), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.6)):
            self.start()
            self.nextList("0").answer(b"", 503, "text/plain", Retry_After=said)
            self.clock.advance(pause - 0.01)
            self.nothing()
            self.clock.advance(0.02)
            self.nextList("0")
            self.stop()

    def test_retryAfterOfOthers(self) -> None:
        """Only 429 and errors of the server may say when to come back."""
        self.start()
        self.nextList("0").answer(b"", 403, "text/plain", Retry_After="100")
        self.clock.advance(0.8)
        self.nextList("0")

    def test_badVersion(self) -> None:
        """A resource version that the server calls wrong is not asked for again: the newest state is."""
        self.watching().event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson({"kind": "Status", "code": 400, "reason": "BadRequest", "message": "rv"}, 400)
        self.clock.advance(1.6)
        self.nextList("").answerJson(listOf())
        self.nextWatch("100")

    def test_notAcceptable(self) -> None:
        """A 406 is a reason to wait, told in the server's words."""
        self.start()
        self.nextList("0").answer(b"only protobuf here\n", 406, "text/plain")
        self.assertIn("406: only protobuf here", self.reflector.status()["lastError"])
        self.clock.advance(0.8)
        self.nextList("0")

    def test_sameErrorOnceAMinute(self) -> None:
        """What goes wrong all the time is logged once a minute, also where two errors take turns."""
        said: list[str] = []
        observer = lambda event: said.append(event.get("error", ""))  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.start()
        answers = 0
        while self.clock.seconds() < 300:
            for exchange in list(self.network.exchanges):
                self.network.exchanges.remove(exchange)
                answers += 1
                exchange.answerJson({"kind": "Status", "code": 403, "message": f"no {answers % 2}"}, 403)
            self.clock.advance(0.5)
        self.assertGreater(answers, 10)
        self.assertLessEqual(len([it for it in said if "403" in it]), 12)

    def test_forbidden(self) -> None:
        """A 403, as a starting server gives it for a moment, is waited out and changes nothing that was said."""
        watch = self.watching(versioned("web", "1"))
        self.clock.advance(5)
        watch.reset()
        self.nextWatch("100").answerJson({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "no"}, 403)
        self.clock.advance(0.8)
        self.nextList("100").answerJson({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "no"}, 403)
        self.clock.advance(1.6)
        self.nextList("100").answerJson(listOf(versioned("web", "1")))
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
        self.assertEqual(self.reflector.status()["lastError"], "403 Forbidden: no")

    def test_internalErrorInStream(self) -> None:
        """Any other error within a watch leads to a pause and a list."""
        self.watching().event("ERROR", {"code": 500, "reason": "InternalError", "message": "etcd"})
        self.clock.advance(0.8)
        self.nextList("100")

    def test_garbageInStream(self) -> None:
        """A stream that cannot be read is cut; what came before counts; pause and list."""
        watch = self.watching()
        watch.chunk(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"120"}}}\n<html>\n')
        self.assertTrue(watch.aborted or not watch.open)
        self.clock.advance(0.8)
        self.nextList("120")

    def test_notJson(self) -> None:
        """An answer of another type is not read, whatever its status."""
        self.start()
        self.nextList("0").answer(b"<html>login</html>", type="text/html")
        self.assertIn("text/html", self.reflector.status()["lastError"])
        self.assertEqual(self.words.said, [])

    def test_table(self) -> None:
        """An answer of another kind is not taken for a list."""
        self.start()
        self.nextList("0").answerJson({"kind": "Table", "metadata": {"resourceVersion": "1"}, "rows": []})
        self.assertIn("Table", self.reflector.status()["lastError"])
        self.assertEqual(self.words.said, [])

    def test_redirect(self) -> None:
        """A redirect is not followed: the credentials are for one server."""
        self.start()
        self.nextList("0").answer(b"", 302, "text/plain", Location="https://elsewhere.example/")
        self.nothing()
        self.assertIn("elsewhere.example", self.reflector.status()["lastError"])

    def test_cookies(self) -> None:
        """Cookies are not kept."""
        self.start()
        self.nextList("0").answer(b"{}", 500, Set_Cookie="a=b; Path=/")
        self.clock.advance(0.8)
        self.assertNotIn("cookie", self.next().headers)

    def test_notHttp(self) -> None:
        """Bytes that are not HTTP are a reason to wait."""
        self.start()
        self.nextList("0").send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n\r\n")
        self.assertEqual(self.reflector.status()["state"], "waiting")

    def test_mislabelledStatus(self) -> None:
        """The Status of a request timeout is understood, though it comes as text; one that is cut does no harm."""
        body = b'{"metadata":{},"status":"Failure","message":"Timeout: too slow","reason":"Timeout","code":504}'
        self.start()
        self.nextList("0").answer(body, 504, "text/plain; charset=utf-8")
        self.assertEqual(self.reflector.status()["lastError"], "504 Timeout: Timeout: too slow")
        self.clock.advance(0.8)
        self.nextList("0").answer(body[:-10], 504, "text/plain; charset=utf-8")
        self.assertEqual(self.reflector.status()["lastError"], "504: the answer cannot be read")

    def test_longErrorIsCut(self) -> None:
        """A page of text for an error is kept short, on one line, without control characters."""
        self.start()
        self.nextList("0").answer(b"bad\r\n\x1b[31m" + b"x" * 5000, 500, "text/plain")
        text = self.reflector.status()["lastError"]
        self.assertLess(len(text), 250)
        self.assertTrue(text.isprintable())

    def test_hugeErrorIsCut(self) -> None:
        """An error without end is not read to it."""
        self.start()
        exchange = self.nextList("0")
        exchange.send(b"HTTP/1.1 500 X\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            exchange.chunk(b"x" * 10000)
        self.assertTrue(exchange.aborted or not exchange.open)
        self.assertEqual(self.reflector.status()["state"], "waiting")


class UnexpectedTests(ReflectorCase):
    """When something fails that must not."""

    def test_channelRaises(self) -> None:
        """An error of whoever listens is logged, and answered with a pause and another list."""
        say = self.words.say
        failures = [ValueError("no")]

        def raising(word: Any) -> None:
            if failures:
                raise failures.pop()
            say(word)

        self.reflector._known._say = raising
        self.start()
        self.nextList("0").answerJson(listOf())
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(listOf())
        watch = self.nextWatch("100")
        watch.begin()
        failures.append(ValueError("no"))
        watch.event("ADDED", versioned("web", "101"))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertFalse(watch.open)
        self.clock.advance(1.6)
        self.nextList("101")


class AgeTests(ReflectorCase):
    """How long ago the server last proved that we know all."""

    def test_age(self) -> None:
        """Lists, events, bookmarks and regular ends prove it; a silent connection and its loss do not."""
        self.assertIsNone(self.reflector.age())
        self.start()
        self.assertIsNone(self.reflector.age())
        self.nextList("0").answerJson(listOf())
        self.assertEqual(self.reflector.age(), 0)
        watch = self.nextWatch("100")
        self.clock.advance(10)
        watch.begin()
        self.assertEqual(self.reflector.age(), 10)
        watch.event("ADDED", versioned("web", "101"))
        self.assertEqual(self.reflector.age(), 0)
        self.clock.advance(20)
        self.assertEqual(self.reflector.age(), 20)
        watch.event("BOOKMARK", bookmark("102"))
        self.clock.advance(30)
        watch.reset()
        self.assertEqual(self.reflector.age(), 30)
        watch = self.nextWatch("102")
        watch.begin()
        self.clock.advance(40)
        watch.end()
        self.assertEqual(self.reflector.age(), 0)


class StopTests(ReflectorCase):
    """Cancelled in every state, a reflector leaves nothing: no timer, no connection, no word."""

    def test_connecting(self) -> None:
        """While it connects."""
        self.network.silent = True
        self.start()
        self.stop()
        self.assertEqual(self.network.connecting, [])

    def test_awaitingList(self) -> None:
        """While it waits for the headers of a list."""
        self.start()
        exchange = self.nextList("0")
        self.stop()
        self.assertTrue(exchange.aborted)

    def test_readingList(self) -> None:
        """Within a list."""
        self.start()
        exchange = self.nextList("0")
        exchange.begin()
        exchange.chunk(b"{")
        self.stop()
        self.assertFalse(exchange.open)

    def test_awaitingWatch(self) -> None:
        """While it waits for the headers of a watch."""
        self.start()
        self.nextList("0").answerJson(listOf())
        exchange = self.nextWatch("100")
        self.stop()
        self.assertTrue(exchange.aborted)

    def test_watching(self) -> None:
        """Within a watch, also one whose watchdog counts."""
        watch = self.watching()
        watch.event("BOOKMARK", bookmark("110"))
        self.stop()
        self.assertFalse(watch.open)
        self.assertEqual(len(self.words.said), 1)

    def test_paused(self) -> None:
        """While it waits after an error."""
        self.network.refusal = ConnectionRefusedError()
        self.start()
        self.stop()

    def test_floored(self) -> None:
        """Between two watches."""
        watch = self.watching()
        watch.event("BOOKMARK", bookmark("110"))
        watch.end()
        self.stop()

    def test_whileSaying(self) -> None:
        """While a word is being said: the rest of the same bytes is not said."""
        watch = self.watching()
        say = self.words.say

        def stopping(word: Any) -> None:
            say(word)
            self.stop()

        self.reflector._known._say = stopping
        watch.chunk(
            b'{"type":"DELETED","object":{"metadata":{"name":"a","namespace":"b","resourceVersion":"101"}}}\n'
            b'{"type":"DELETED","object":{"metadata":{"name":"c","namespace":"b","resourceVersion":"102"}}}\n'
        )
        self.assertFalse(watch.open)
        self.assertEqual(len(self.words.said), 2)


    def test_whileSayingTheList(self) -> None:
        """While the list is being said: no watch begins."""
        self.start()
        say = self.words.say

        def stopping(word: Any) -> None:
            say(word)
            self.stop()

        self.reflector._known._say = stopping
        self.nextList("0").answerJson(listOf())
        self.nothing()
        self.assertEqual(self.reflector.status()["state"], "stopped")

    def test_again(self) -> None:
        """It may be started again, with a list from where it was."""
        self.watching().event("BOOKMARK", bookmark("110"))
        self.stop()
        self.start()
        self.nextList("110").answerJson(listOf(rv="120"))
        self.nextWatch("120")


class BackoffTests(SynchronousTestCase):
    """How pauses grow."""

    def test_growth(self) -> None:
        """Pauses double from 0.8 s and stay at 30 s."""
        backoff = Backoff(Clock(), lambda: 0.0)
        pauses = [backoff.next() for _ in range(8)]
        self.assertEqual(pauses, [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0])

    def test_jitter(self) -> None:
        """Each pause may be up to twice as long."""
        backoff = Backoff(Clock(), lambda: 0.5)
        self.assertEqual([round(backoff.next(), 6) for _ in range(3)], [1.2, 2.4, 4.8])
        backoff = Backoff(Clock(), lambda: 0.999)
        for _ in range(10):
            self.assertLess(backoff.next(), 60.0)

    def test_reset(self) -> None:
        """Two minutes without a pause, and they begin anew."""
        clock = Clock()
        backoff = Backoff(clock, lambda: 0.0)
        for _ in range(5):
            backoff.next()
        clock.advance(120)
        self.assertEqual(backoff.next(), 25.6)
        clock.advance(120.1)
        self.assertEqual(backoff.next(), 0.8)
