"""Bodies that come compressed."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.rawhttp import Exchange
from tests.shared.reflectors import ReflectorCase, listOf, versioned
from twisted_kproxy.sources.client import Limits
from twisted_kproxy.sources.compression import PIECE, Inflater
from twisted_kproxy.sources.errors import ConnectionLost, Unusable


class InflaterTests(SynchronousTestCase):
    """From compressed bytes to those that were meant."""

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(st.binary(max_size=5000), st.integers(1, 500))
    def test_anyPieces(self, data: bytes, size: int) -> None:
        """Whatever pieces the bytes come in, the result is the same."""
        packed = gzip.compress(data)
        inflater = Inflater()
        found = b"".join(b"".join(inflater.feed(packed[at : at + size])) for at in range(0, len(packed), size))
        inflater.finish()
        self.assertEqual(found, data)

    def test_large(self) -> None:
        """Pieces are never larger than the limit, and none is lost at it."""
        for size in (PIECE - 1, PIECE, PIECE + 1, 3 * PIECE):
            inflater = Inflater()
            pieces = list(inflater.feed(gzip.compress(b"x" * size)))
            inflater.finish()
            self.assertEqual(sum(map(len, pieces)), size)
            self.assertLessEqual(max(map(len, pieces)), PIECE)

    def test_members(self) -> None:
        """Several compressed parts, one after the other, are one body."""
        inflater = Inflater()
        self.assertEqual(b"".join(inflater.feed(gzip.compress(b"ab") + gzip.compress(b"cd"))), b"abcd")
        inflater.finish()

    def test_flushed(self) -> None:
        """What the sender has flushed is there before the end."""
        packer = zlib.compressobj(wbits=31)
        inflater = Inflater()
        first = packer.compress(b"event\n") + packer.flush(zlib.Z_SYNC_FLUSH)
        self.assertEqual(b"".join(inflater.feed(first)), b"event\n")
        with self.assertRaises(ConnectionLost):
            inflater.finish()

    def test_wrong(self) -> None:
        """No gzip, and a wrong check sum, are told apart from what was cut short."""
        packed = gzip.compress(b"some text")
        for bad in (b"no gzip at all", packed[:-8] + b"\0" * 8):
            with self.assertRaises(Unusable):
                list(Inflater().feed(bad))
        for cut in range(1, len(packed)):
            inflater = Inflater()
            list(inflater.feed(packed[:cut]))
            self.assertRaises(ConnectionLost, inflater.finish)

    def test_empty(self) -> None:
        """No bytes at all are an empty body."""
        Inflater().finish()


class CompressedTests(ReflectorCase):
    """Lists and watches that come compressed."""

    limits = Limits(size=1_000_000)

    def listed(self, body: bytes, coding: str = "gzip") -> Exchange:
        self.start()
        exchange = self.nextList("0")
        exchange.answer(body, Content_Encoding=coding)
        return exchange

    def test_asked(self) -> None:
        """Lists are asked for compressed, watches as they are: an event must not wait in a buffer."""
        self.start()
        exchange = self.nextList("0")
        self.assertEqual(exchange.headers["accept-encoding"], "gzip")
        exchange.answerJson(listOf())
        self.assertEqual(self.nextWatch("100").headers["accept-encoding"], "identity")

    def test_cutAtAnyPlace(self) -> None:
        """A compressed list that is cut anywhere is refused, also where all of the JSON has come."""
        body = gzip.compress(json.dumps(listOf(versioned("web", "1"))).encode())
        for cut in (1, 4, 8, 9, 50, len(body) - 1):
            self.listed(body[:-cut])
            self.assertEqual(self.words.said, [], cut)
            self.assertEqual(self.reflector.status()["state"], "waiting")
            self.stop()

    def test_bomb(self) -> None:
        """What inflates to more than the limit costs no more memory than that."""
        body = gzip.compress(b" " * 50_000_000)
        self.start()
        exchange = self.nextList("0")
        tracemalloc.start()
        try:
            exchange.answer(body, Content_Encoding="gzip")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        self.assertLess(peak, 10_000_000)
        self.assertFalse(exchange.open)
        self.assertIn("1000000 bytes", self.reflector.status()["lastError"])

    def test_otherCoding(self) -> None:
        """Another coding than was asked for is refused, and its connection is cut."""
        exchange = self.listed(b"...", "br")
        self.assertIn("br", self.reflector.status()["lastError"])
        self.assertFalse(exchange.open)

    def test_watch(self) -> None:
        """A watch that comes compressed though it should not is read event by event."""
        self.start()
        self.nextList("0").answerJson(listOf())
        watch = self.nextWatch("100")
        watch.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        packer = zlib.compressobj(wbits=31)
        for number in range(3):
            event = {"type": "ADDED", "object": versioned(f"s{number}", str(101 + number))}
            watch.chunk(packer.compress(json.dumps(event).encode() + b"\n") + packer.flush(zlib.Z_SYNC_FLUSH))
            self.assertEqual(len(self.words.state["Service"]), number + 1)
        self.clock.advance(5)
        watch.chunk(packer.flush())
        watch.end()
        self.nextWatch("103")

    def test_identity(self) -> None:
        """C{identity} is no coding."""
        self.listed(json.dumps(listOf(versioned("web", "1"))).encode(), "identity")
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
