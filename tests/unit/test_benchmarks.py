"""The benchmark of the data plane: what it makes of figures, and of names. What it measures is not tested."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from shutil import which

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from benchmarks.dataplane import table
from benchmarks.dataplane.__main__ import chosen, known
from benchmarks.dataplane.machine import build, family, processorTime
from tests.fakes.waiting import waitFor

NAN = float("nan")


class TableTests(SynchronousTestCase):
    """Medians, ratios, bars."""

    raw = {
        "direct": {"requests": [100.0, 300.0, 200.0]},
        "haproxy": {"requests": [50.0, 100.0, NAN], "connections": [10.0, 10.0, 10.0]},
        "kproxy python": {"requests": [45.0, 80.0, 900.0], "connections": [5.0, NAN, 7.0], "idle": [1.5]},
    }

    def test_ratio(self) -> None:
        """A ratio is that of figures of the same round; rounds that lack one do not count."""
        self.assertEqual(table.ratio(self.raw, "kproxy python", "haproxy", "requests"), (0.9 + 0.8) / 2)
        self.assertEqual(table.ratio(self.raw, "kproxy python", "haproxy", "connections"), 0.6)
        self.assertIsNone(table.ratio(self.raw, "kproxy python", "haproxy", "idle"))

    def test_spread(self) -> None:
        """Half of the distance of the quartiles; nothing of fewer than three values."""
        self.assertEqual(table.spread(self.raw, "direct", "requests"), 0.25)
        self.assertIsNone(table.spread(self.raw, "haproxy", "requests"))

    def test_bars(self) -> None:
        """A bar is judged where its figures are there; less is better where it is."""
        text, missed = table.bars(self.raw)
        self.assertEqual(missed, 1)
        self.assertRegex(text, r"met +kproxy python +requests +0\.85 x haproxy +at least 0\.85")
        self.assertRegex(text, r"MISSED +kproxy python +connections +0\.60 x haproxy +at least 0\.80")
        self.assertRegex(text, r"met +kproxy python +idle +1\.50 KiB +at most 2\.00")

    def test_tables(self) -> None:
        """Who was not measured is not in a table, and a table without figures is not shown."""
        text = table.tables(self.raw)
        idle = text[text.index("Memory") :]
        self.assertNotIn("haproxy", idle)
        self.assertNotIn("Datagrams", text)


class NamesTests(SynchronousTestCase):
    """Who and what is measured."""

    def test_all(self) -> None:
        """Without names all, in the order of the tables."""
        self.assertEqual(chosen([], False)[0], known())

    def test_some(self) -> None:
        """A contestant brings those along that it is compared with."""
        self.assertEqual(
            chosen(["bulk", "kproxy-native", "requests"], False),
            (["direct", "haproxy", "kproxy native"], ["requests", "bulk"]),
        )

    def test_unknown(self) -> None:
        """What there is not ends it, with what there is."""
        self.assertIn("nginx-16k", str(self.assertRaises(SystemExit, chosen, ["nonsense"], False)))


class LoadTests(SynchronousTestCase):
    """The load program, against its own server and a bare one."""

    def setUp(self) -> None:
        if not which("cc"):
            raise SkipTest("there is no C compiler")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.load = build(folder.name)

    def freePort(self, kind: int) -> str:
        with closing(socket.socket(socket.AF_INET, kind)) as it:
            it.bind(("127.0.0.1", 0))
            return str(it.getsockname()[1])

    def serve(self, word: str, kind: int) -> str:
        port = self.freePort(kind)
        server = subprocess.Popen([self.load, word, port])
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        return port

    def say(self, *words: str) -> str:
        done = subprocess.run([self.load, *words], capture_output=True, text=True, timeout=20)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def counted(self, *words: str) -> tuple[float, float]:
        """How much, in which time. The server may not be there yet, or not have its turn in so short a time."""

        def ask() -> tuple[float, float] | None:
            count, seconds = map(float, self.say(*words).split())
            return (count, seconds) if count else None

        found: tuple[float, float] = waitFor(ask, 20)
        return found

    def test_bulk(self) -> None:
        """Bytes are counted both ways, of all streams."""
        port = self.serve("serve", socket.SOCK_STREAM)
        for way in ("down", "up"):
            _, seconds = self.counted("bulk", way, "127.0.0.1", port, "2", "0.05")
            self.assertGreaterEqual(seconds, 0.05)

    def test_datagrams(self) -> None:
        """Replies are counted, of single datagrams and of trains."""
        port = self.serve("echo", socket.SOCK_DGRAM)
        for train in ("1", "4"):
            self.counted("datagrams", "127.0.0.1", port, "2", train, "2", "100", "0.2")

    def test_open(self) -> None:
        """There is a time for each request; where the server stands still, all that were due meanwhile are late."""
        stalled = threading.Event()
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                for n in range(1000):
                    if not sock.recv(100):
                        return
                    if n == 10:
                        stalled.wait(0.1)
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        threading.Thread(target=answer, daemon=True).start()
        port = str(listener.getsockname()[1])
        took = [int(it) for it in self.say("open", "127.0.0.1", port, "1", "200", "0.3").split()]
        self.assertEqual(len(took), 60)
        self.assertGreater(sum(it > 20_000 for it in took), 10)

    def test_processorTime(self) -> None:
        """That of all threads, of a process and those that it has started."""
        mine = family(os.getpid())
        self.assertIn(os.getpid(), mine)
        before = processorTime(mine)
        sum(range(300_000))
        self.assertGreater(processorTime(mine), before)
        self.assertEqual(processorTime([]), 0)


class FilesTests(SynchronousTestCase):
    """What goes with the package of sources."""

    def test_load(self) -> None:
        """The load program's source is where it is looked for."""
        self.assertTrue(Path(table.__file__).with_name("load.c").exists())
