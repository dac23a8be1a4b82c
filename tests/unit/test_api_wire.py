"""What no API server should send, but something between may: the last state stays, and all is well once it is over."""

from __future__ import annotations

import json

from tests.shared.reflectors import ReflectorCase, listOf, versioned

GOOD = json.dumps(listOf(versioned("web", "1"))).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def whole(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


class BadListTests(ReflectorCase):
    """Answers to a list that are refused."""

    def refused(self, answer: bytes) -> str:
        """It is refused, and the connection is not kept; the next answer counts. Gives what was said of it."""
        self.start()
        exchange = self.nextList("0")
        exchange.send(answer)
        exchange.reset()
        self.assertEqual(self.words.said, [], answer[:200])
        status = self.reflector.status()
        self.assertEqual(status["state"], "waiting", answer[:200])
        self.clock.advance(0.8)
        self.nextList("0").answer(GOOD)
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
        self.stop()
        self.setUp()
        said: str = status["lastError"]
        return said

    def test_bodies(self) -> None:
        """Bodies that are no list: cut, not JSON, not UTF-8, nested without end, of something else."""
        deep = b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"},"items":' + b"[" * 100_000
        for body in (
            b"", b"null", b"[]", b"{}", GOOD[:-1], GOOD + b"}", b"\x00" + GOOD, b"\xef\xbb\xbf" + GOOD, deep,
            b'{"kind":"ServiceList","metadata":{"resourceVersion":NaN}}', GOOD.replace(b"ServiceList", b"PodList"),
            b'{"kind":"ServiceList","metadata":{"resourceVersion":7}}', b"<!DOCTYPE html><title>Log in</title>",
        ):
            self.refused(whole(body))

    def test_framing(self) -> None:
        """Answers that are not HTTP as it should be."""
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        for answer in (
            chunked + b"zz\r\n" + GOOD, chunked + b"-5\r\n" + GOOD, chunked + b"5\r\n" + GOOD[:5] + b"xx",
            HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD, HEAD + b"Content-Length: x\r\n\r\n" + GOOD,
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi", b"\x16\x03\x01\x02\x00",
            b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 301 X\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/9.9 200 OK\r\n\r\n", b"\r\n\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + GOOD,
        ):
            self.refused(answer)

    def test_badUtf8(self) -> None:
        """A name that is no UTF-8 makes one object unreadable, or the list; nothing of it is taken for a name."""
        self.start()
        body = GOOD.replace(b"web", b"w\xc3\x28")
        exchange = self.nextList("0")
        exchange.answer(body)
        self.assertEqual(self.words.state.get("Service", {}), {})

    def test_informational(self) -> None:
        """An answer may be preceded by others that only say that it is coming."""
        self.start()
        self.nextList("0").send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + whole(GOOD))
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])

    def test_harmless(self) -> None:
        """What is strange but can be read is read: blanks, line ends, keys that come twice (the last one counts)."""
        for body in (
            b"\r\n " + GOOD + b"\r\n", GOOD.replace(b'"kind"', b'"kind": "Table", "kind"', 1),
            GOOD.replace(b'"items"', b'"unknown": {"deep": [1, {"x": null}]}, "items"'),
        ):
            self.start()
            self.nextList("0").answer(body)
            self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
            self.stop()
            self.setUp()


class BadWatchTests(ReflectorCase):
    """Bytes within a watch."""

    def test_broken(self) -> None:
        """A line that is no event ends the watch; what came before counts, what comes after does not; then a list."""
        before = json.dumps({"type": "ADDED", "object": versioned("a", "101")}).encode() + b"\n"
        after = json.dumps({"type": "ADDED", "object": versioned("b", "103")}).encode() + b"\n"
        for line in (b"\x00\n", b"\xef\xbb\xbf{}\n", b"NaN\n", b"<html>\n", b"[" * 100_000 + b"\n", b"{}\n", b"\xff\n",
                     b'{"type":"ADDED"}\n', b'{"type":"ERROR","object":7}\n'):
            watch = self.watching(versioned("web", "1"))
            watch.chunk(before + line + after)
            self.assertFalse(watch.open, line[:50])
            self.assertEqual(sorted(self.words.state["Service"]), ["shop/a", "shop/web"], line[:50])
            self.clock.advance(0.8)
            self.nextList("101")
            self.stop()
            self.setUp()

    def test_endlessLine(self) -> None:
        """A line of more than 16 MiB is not gathered."""
        watch = self.watching(versioned("web", "1"))
        piece = b'"' + b"x" * (1024 * 1024 - 2) + b'"'
        for number in range(16):
            self.assertTrue(watch.open, number)
            watch.chunk(piece)
        watch.chunk(b"xx")
        self.assertFalse(watch.open)
        self.assertIn("longer than 16777216 bytes", self.reflector.status()["lastError"])
        self.clock.advance(0.8)
        self.nextList("100")

    def test_brokenChunks(self) -> None:
        """Chunk framing that breaks in the middle ends the watch like a broken connection."""
        watch = self.watching(versioned("web", "1"))
        self.clock.advance(5)
        watch.send(b"zz\r\n")
        self.assertFalse(watch.open)
        self.clock.advance(0.8)
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
        self.assertEqual(self.next().query["resourceVersion"], "100")

    def test_poison(self) -> None:
        """Objects with values that are none cost only themselves; their neighbours and what follows count."""
        watch = self.watching(versioned("web", "1"))
        for number, port in enumerate(("80", 1e400, True, None, -1, 70000, [], {})):
            it = versioned("bad", str(200 + 2 * number), port=port)
            watch.chunk(json.dumps({"type": "ADDED", "object": it}).replace("Infinity", "1e400").encode() + b"\n")
            watch.event("MODIFIED", versioned("web", str(201 + 2 * number), port=81 + number))
            self.assertTrue(watch.open, port)
            self.assertEqual(self.words.state["Service"]["shop/web"].spec.ports[0].port, 81 + number)
        self.assertEqual(self.reflector.status()["resourceVersion"], "215")
