"""Lists in pages; the scenarios of client-go's pager and of its reflector's lists."""

from __future__ import annotations

from typing import Any

from tests.fakes.rawhttp import Exchange
from tests.shared.reflectors import EXPIRED, ReflectorCase, listOf, versioned
from twisted_kproxy.core.values import Replaced
from twisted_kproxy.sources import lister

TOO_LARGE = {
    "kind": "Status", "code": 504, "reason": "Timeout", "message": "Too large resource version: 999, current: 9",
    "details": {"causes": [{"reason": "ResourceVersionTooLarge", "message": "x"}], "retryAfterSeconds": 1},
}


def page(*items: dict[str, Any], next: str = "", rv: str = "100") -> dict[str, Any]:
    it = listOf(*items, rv=rv)
    if next:
        it["metadata"]["continue"] = next
    return it


class PagingTests(ReflectorCase):
    """What is asked for, page by page."""

    def nextPage(self, token: str) -> Exchange:
        """The request that has come must be for that page: nothing may go with the token but limit and selectors."""
        exchange = self.next()
        self.assertEqual(
            exchange.query,
            {"limit": "500", "continue": token, "labelSelector": "!a/b", "fieldSelector": "spec.clusterIP!=None"},
        )
        return exchange

    def relist(self, rv: str, code: str = "ERROR") -> None:
        """Have the reflector list again from what it has."""
        watch = self.nextWatch(rv)
        watch.begin()
        watch.event(code, EXPIRED)
        self.clock.advance(60)

    def test_oneWord(self) -> None:
        """Pages are one list: said once, when the last one is in, with the resource version of the first."""
        self.start()
        self.nextList("0").answerJson(page(versioned("a", "1"), next="t1"))
        self.nextPage("t1").answerJson(page(versioned("b", "2"), versioned("bad", "3", port="x"), next="t2", rv="101"))
        self.assertEqual(self.words.said, [])
        self.nextPage("t2").answerJson(page(versioned("c", "3"), rv="102"))
        (word,) = self.words.said
        assert isinstance(word, Replaced)
        self.assertEqual(sorted(word.objects), ["shop/a", "shop/b", "shop/c"])
        self.assertEqual(list(word.rejected), ["shop/bad"])
        self.nextWatch("100")

    def test_relistIsWhole(self) -> None:
        """A list that must not be older than some version is asked for without a limit: pages come from etcd."""
        self.start()
        self.nextList("0").answerJson(listOf())
        self.relist("100")
        exchange = self.nextList("100")
        self.assertNotIn("limit", exchange.query)

    def test_pagingIsRemembered(self) -> None:
        """A server that pages even what may be old has no cache: everything is paged from then on."""
        self.start()
        self.nextList("0").answerJson(page(next="t1"))
        self.nextPage("t1").answerJson(page())
        self.relist("100")
        exchange = self.nextList("100")
        self.assertEqual(exchange.query["limit"], "500")
        exchange.answerJson(page(next="t2", rv="200"))
        self.nextPage("t2").answerJson(page())
        self.nextWatch("200")

    def test_newestIsPaged(self) -> None:
        """The newest state comes in pages; that says nothing about the cache."""
        self.start()
        self.nextList("0").answerJson(EXPIRED, 410)
        exchange = self.nextList("")
        self.assertEqual(exchange.query["limit"], "500")
        exchange.answerJson(page(next="t1"))
        self.nextPage("t1").answerJson(page())
        self.relist("100")
        self.assertNotIn("limit", self.nextList("100").query)

    def test_secondPageExpired(self) -> None:
        """
        A page that is gone is answered with one whole list, not older than what was first asked for; the token that
        comes with the refusal, for going on inconsistently, is not used.
        """
        for code, status in ((410, {**EXPIRED, "metadata": {"continue": "inconsistent"}}), (400, {"code": 400})):
            self.start()
            self.nextList("0").answerJson(page(versioned("a", "1"), next="t1"))
            self.nextPage("t1").answerJson(status, code)
            exchange = self.nextList("0")
            self.assertNotIn("limit", exchange.query)
            exchange.answerJson(page(versioned("b", "2"), rv="300"))
            self.assertEqual(list(self.words.state["Service"]), ["shop/b"])
            self.nextWatch("300")
            self.stop()
            self.setUp()

    def test_firstPageExpired(self) -> None:
        """A first page that is refused as expired is followed by the newest state."""
        self.start()
        self.nextList("0").answerJson(EXPIRED, 410)
        self.nextList("").answerJson(page(rv="300"))
        self.nextWatch("300")

    def test_wholeListExpiredToo(self) -> None:
        """Where even the whole list has expired, the newest state is next."""
        self.start()
        self.nextList("0").answerJson(page(next="t1"))
        self.nextPage("t1").answerJson(EXPIRED, 410)
        self.nextList("0").answerJson(EXPIRED, 410)
        self.nextList("").answerJson(page(rv="300"))
        self.nextWatch("300")

    def test_tooLargeWithRetryAfter(self) -> None:
        """A server that lags asks to be asked again; it is asked for its own newest state instead, and at once."""
        self.start()
        self.nextList("0").answerJson(listOf(rv="999"))
        self.relist("999")
        self.nextList("999").answerJson(TOO_LARGE, 504, Retry_After="1")
        self.nextList("").answerJson(listOf(rv="9"))
        self.nextWatch("9")

    def test_brokenPage(self) -> None:
        """A page that breaks off, or is refused, leaves what was said; the list begins anew."""
        self.start()
        self.nextList("0").answerJson(page(versioned("a", "1"), next="t1"))
        exchange = self.nextPage("t1")
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        exchange.reset()
        self.assertEqual(self.words.said, [])
        self.clock.advance(0.8)
        self.nextList("0").answerJson(page(versioned("a", "1"), next="t2"))
        self.nextPage("t2").answerJson({"kind": "Status", "code": 500}, 500)
        self.clock.advance(1.6)
        self.nextList("0").answerJson(page(versioned("a", "1")))
        self.assertEqual(len(self.words.said), 1)

    def test_endless(self) -> None:
        """Pages without an end are given up."""
        self.patch(lister, "MOST_PAGES", 5)
        self.start()
        self.nextList("0").answerJson(page(next="t"))
        for _ in range(3):
            self.nextPage("t").answerJson(page(next="t"))
        self.assertIn("does not end", self.reflector.status()["lastError"])
        self.assertEqual(self.reflector.status()["state"], "waiting")

    def test_namelessOnTwoPages(self) -> None:
        """Items without a name on different pages are told apart."""
        self.start()
        self.nextList("0").answerJson(page({"metadata": {}}, next="t"))
        self.nextPage("t").answerJson(page({"metadata": {}}))
        self.assertEqual(list(self.reflector.status()["rejected"]), ["(item 0)", "(page 2, item 0)"])


class BodyTests(ReflectorCase):
    """Bodies that are not what they say."""

    def test_longerThanSaid(self) -> None:
        """Bytes beyond Content-Length are not read, and do no harm."""
        self.start()
        exchange = self.nextList("0")
        body = b'{"kind":"ServiceList","metadata":{"resourceVersion":"5"},"items":[]}'
        exchange.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body * 2)
        )
        self.nextWatch("5")

    def test_shorterThanSaid(self) -> None:
        """A body that is complete as JSON but shorter than it should be is refused."""
        self.start()
        exchange = self.nextList("0")
        body = b'{"kind":"ServiceList","metadata":{"resourceVersion":"5"},"items":[]}'
        exchange.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body) + 9, body)
        )
        exchange.reset()
        self.assertEqual(self.words.said, [])
        self.assertEqual(self.reflector.status()["state"], "waiting")

    def test_withoutLength(self) -> None:
        """A body that ends with its connection may be complete or not: it is refused."""
        self.start()
        exchange = self.nextList("0")
        body = b'{"kind":"ServiceList","metadata":{"resourceVersion":"5"},"items":[]}'
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n" + body)
        exchange.reset()
        self.assertEqual(self.words.said, [])

    def test_chunksWithoutEnd(self) -> None:
        """So is a body in chunks without the last one."""
        self.start()
        exchange = self.nextList("0")
        exchange.begin()
        exchange.chunk(b'{"kind":"ServiceList","metadata":{"resourceVersion":"5"},"items":[]}')
        exchange.reset()
        self.assertEqual(self.words.said, [])

    def test_noVersion(self) -> None:
        """A list without a resource version is refused: there is nothing to watch from."""
        self.start()
        self.nextList("0").answerJson({"kind": "ServiceList", "metadata": {}, "items": []})
        self.assertEqual(self.words.said, [])
        self.assertIn("resourceVersion", self.reflector.status()["lastError"])

    def test_trickles(self) -> None:
        """A list that trickles would take for ever: it is given up after five minutes, though bytes keep coming."""
        self.start()
        exchange = self.nextList("0")
        exchange.begin()
        for _ in range(29):
            self.clock.advance(10)
            exchange.chunk(b" ")
        self.assertTrue(exchange.open)
        self.clock.advance(10.1)
        self.assertTrue(exchange.aborted)
        self.assertIn("not complete within 300 s", self.reflector.status()["lastError"])

    def test_errorTrickles(self) -> None:
        """So is an error that trickles, sooner; its code counts."""
        self.start()
        exchange = self.nextList("0")
        exchange.send(b"HTTP/1.1 500 X\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(31):
            self.clock.advance(1)
            exchange.chunk(b"x")
        self.assertTrue(exchange.aborted)
        self.assertIn("500", self.reflector.status()["lastError"])

    def test_equalIsTheSame(self) -> None:
        """What a relist brings unchanged is the very same object as before, so that nobody has to compare it again."""
        self.start()
        self.nextList("0").answerJson(listOf(versioned("a", "1"), versioned("b", "2")))
        before = dict(self.words.state["Service"])
        watch = self.nextWatch("100")
        watch.begin()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(listOf(versioned("a", "1"), versioned("b", "3"), rv="101"))
        after = self.words.state["Service"]
        self.assertIs(after["shop/a"], before["shop/a"])
        self.assertEqual(after["shop/b"].metadata.resourceVersion, "3")

    def test_equalIsNotSaid(self) -> None:
        """A relist that brings nothing new is no word."""
        self.start()
        self.nextList("0").answerJson(listOf(versioned("a", "1")))
        watch = self.nextWatch("100")
        watch.begin()
        watch.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(listOf(versioned("a", "1"), rv="101"))
        self.assertEqual(len(self.words.said), 1)
        self.nextWatch("101")
