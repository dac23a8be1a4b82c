"""What a rule writer that shares its kernel with others survives."""

from __future__ import annotations

import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import deferLater

from tests.shared.resyncer import PORTS
from tests.shared.writers import NODE4, key, many, same, to
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta, applied, deltaBetween
from twisted_kproxy.core.values import Endpoint, Frontend, ServiceMap, ServicePort, ServicePortName
from twisted_kproxy.interfaces import RulesRejected
from twisted_kproxy.netfilter.plane import RulePlane
from twisted_kproxy.netfilter.tool import Tool, find

reactor: Any = _reactor
ROOT = Path(__file__).resolve().parent.parent.parent

#: Runs the real program, or not: as a file says. ``half`` dies in the middle of its input.
WRAPPER = """#!/bin/sh
case "$(cat {mode})" in
flaky) if [ -e {mode}.odd ]; then rm {mode}.odd; else : > {mode}.odd; echo "line 3 failed" >&2; exit 1; fi;;
hang) exec sleep 60;;
garbage) echo "*nat"; echo "{{ <garbage>"; exit 0;;
crash) kill -SEGV $$;;
half) case "$*" in *--noflush*|*--file*) head -c 700 | {real} "$@"; kill -KILL $$;; esac;;
poison) case "$*" in *--noflush*|*--file*)
  cat > {mode}.in
  if grep -q 10.96.66.66 {mode}.in; then echo "line 3 failed" >&2; exit 1; fi
  exec {real} "$@" < {mode}.in;;
  esac;;
esac
exec {real} "$@"
"""


def servicePort(name: str, address: str, socket: int) -> ServicePort:
    where = ServicePortName("default", name, "", "TCP", "IPv4")
    return ServicePort(where, "u", (Frontend("ClusterIP", address, 80),), (Endpoint(NODE4, socket, True, True),))


def services(count: int, base: int = 20000) -> ServiceMap:
    ports = [servicePort(f"s{n}", f"10.97.{n // 250}.{n % 250 + 1}", base + n) for n in range(count)]
    return ServiceMap({port.name: port for port in ports})


class Follower:
    """In the place of the syncer: full updates follow others' changes, until one is in force."""

    def __init__(self, writer: Any) -> None:
        self.plane = RulePlane(reactor, writer, changedOutside=self.again)
        self.current = ServiceMap()
        self.wanted = ServiceMap()
        self.running: Deferred[None] | None = None
        self.dirty = False
        self.failures = 0

    async def start(self, current: ServiceMap) -> None:
        await self.plane.start()
        self.wanted = current
        await self.plane.onUpdate(Update(ServiceMap(), current))
        self.current = current

    def again(self) -> None:
        self.dirty = True
        if self.running is None:
            self.running = Deferred.fromCoroutine(self._run())

    async def _run(self) -> None:
        while self.dirty:
            self.dirty = False
            try:
                await self.plane.onUpdate(Update(self.current, self.wanted, True))
                self.current = self.wanted
            except RulesRejected:
                self.failures += 1
                self.dirty = True
                await deferLater(reactor, 0.1, lambda: None)
        self.running = None

    async def settled(self) -> None:
        while self.running is not None:
            await deferLater(reactor, 0.02, lambda: None)


class Hardships:
    """
    A mixin for a suite with :class:`~tests.shared.writers.KernelWriterTests`.

    :cvar program: what :mod:`tests.shared.resyncer` knows the writer as.
    :cvar tools: programs to put a wrapper in the place of; empty where it runs none.
    :cvar limit: seconds within which damage by others is repaired, on a loaded machine.
    """

    program: ClassVar[str]
    tools: ClassVar[tuple[str, ...]] = ()
    limit = 60.0
    many = 600

    # --- what a concrete suite gives ---

    def listed(self) -> list[str]:
        """What is in force, as text, one for each transaction."""
        raise NotImplementedError

    def flushes(self) -> list[tuple[list[str], str]]:
        """Ways in which others remove rules of ours: a command and its input."""
        raise NotImplementedError

    def spot(self, address: str) -> tuple[list[str], str]:
        """A command (and its input) that removes one rule for an address, and nothing else."""
        raise NotImplementedError

    def addForeign(self, n: int) -> list[str]:
        """A command that adds rule number ``n`` of another program, beside ours."""
        raise NotImplementedError

    # --- tools ---

    def do(self, argv: list[str], stdin: str = "") -> str:
        return str(self.space.run(*argv, stdin=stdin))  # type: ignore[attr-defined]

    def versions(self) -> list[dict[int, int]]:
        """For each transaction, how many rules lead where, by ten thousands of the port."""
        return [
            dict(Counter(int(port) // 10000 for port in re.findall(r"192\.0\.2\.2(?: \. |:)(\d{5})\b", text)))
            or dict(Counter(int(port) // 10000 for port in re.findall(r"2001:db8::2(?: \. |\]:)(\d{5})\b", text)))
            for text in self.listed()
        ]

    def assertWhole(self, counts: list[dict[int, int]]) -> None:
        """Each transaction is of one version, and complete."""
        expected = [sum(it.values()) for it in counts]
        found = self.versions()
        self.assertEqual([len(it) for it in found], [1] * len(counts), found)  # type: ignore[attr-defined]
        self.assertEqual([sum(it.values()) for it in found], expected)  # type: ignore[attr-defined]

    async def until(self, what: Any, seconds: float) -> float:
        """Wait until it is true; gives how long that took."""
        begun = time.monotonic()
        while not await maybeDeferred(what):
            if time.monotonic() - begun > seconds:
                self.fail(f"it did not come to be in {seconds} s")  # type: ignore[attr-defined]
            await deferLater(reactor, 0.02, lambda: None)
        return time.monotonic() - begun

    async def follower(self, current: ServiceMap, writer: Any = None) -> Follower:
        it = Follower(writer if writer is not None else self.makeWriter())  # type: ignore[attr-defined]
        await it.start(current)
        return it

    async def isInForce(self, current: ServiceMap) -> bool:
        found = await maybeDeferred(self.inForce)  # type: ignore[attr-defined]
        return found is not None and dict(found.rules) == self.rulesOf(current)

    @staticmethod
    def rulesOf(current: ServiceMap) -> dict[Any, Any]:
        return {port.key(port.frontends[0]): same(to(port.cluster[0].port)) for port in current.values()}

    # --- the suite ---

    async def test_besideAnother(self) -> None:
        """Another program changes the same tables all the time: none of its rules is lost, and none of ours."""
        writer = await self.writerWith(many(200))  # type: ignore[attr-defined]
        problems: list[str] = []
        ending = threading.Event()
        added = 0

        def another() -> None:
            nonlocal added
            while not ending.is_set():
                argv = [*self.space.prefix, *self.addForeign(added)]  # type: ignore[attr-defined]
                done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
                if done.returncode:
                    problems.append(done.stderr)
                added += 1

        self.do(self.addForeign(-1))
        thread = threading.Thread(target=another)
        thread.start()
        expected = many(200)
        steps = 0
        try:
            while steps < 6 or (added < 60 and steps < 400):
                step = Delta({key("10.96.8.8", 1 + steps): same(to(40001)), key("10.96.8.8", steps): None})
                await writer.apply(step)
                expected = applied(expected, step)
                if steps % 15 == 7:
                    await writer.replace(expected)
                steps += 1
        finally:
            ending.set()
            thread.join(30)
        self.assertEqual(problems, [])  # type: ignore[attr-defined]
        await self.assertInForce(expected)  # type: ignore[attr-defined]
        theirs = set(re.findall(r"10\.77\.\d+\.\d+", self.foreign()))  # type: ignore[attr-defined]
        numbers = {f"10.77.{n // 250}.{n % 250}" for n in range(added)}
        self.assertEqual(numbers - theirs, set())  # type: ignore[attr-defined]

    async def test_killedProcess(self) -> None:
        """Whoever is killed at whatever moment, each table is one complete version; the next run goes on from there."""
        writer = await self.writerWith(many(self.many, PORTS[0]))  # type: ignore[attr-defined]
        counts = self.versions()
        self.assertTrue(all(counts))  # type: ignore[attr-defined]
        await writer.close()
        draw = random.Random(7)
        for n in range(6):
            argv = [*self.space.prefix, sys.executable, "-m", "tests.shared.resyncer", self.program, str(self.many)]  # type: ignore[attr-defined]
            process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
            try:
                assert process.stdout is not None
                self.assertEqual(process.stdout.readline(), b"writing\n")  # type: ignore[attr-defined]
                time.sleep(draw.uniform(0.0, 0.3))
            finally:
                # The process alone, or with all that it has started.
                (os.killpg if n % 2 else os.kill)(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()  # type: ignore[union-attr]
            self.assertWhole(counts)
        # What was left alone may still be at work.
        await self.until(lambda: not self.space.processes(), self.limit)  # type: ignore[attr-defined]
        self.assertWhole(counts)
        later = self.makeWriter()  # type: ignore[attr-defined]
        found = await later.adopt()
        wanted = many(self.many, 25000)
        await (later.replace(wanted) if found is None else later.apply(deltaBetween(found, wanted)))
        await self.assertInForce(wanted)  # type: ignore[attr-defined]

    async def test_foreignFlushIsRepaired(self) -> None:
        """Whatever others remove of ours is back soon, and theirs is left alone."""
        self.plantForeign()  # type: ignore[attr-defined]
        current = services(50)
        follower = await self.follower(current)
        before = self.pieces()
        took = []
        for argv, stdin in self.flushes():
            self.do(argv, stdin)
            self.assertNotEqual(self.pieces(), before, argv)  # type: ignore[attr-defined]
            theirs = self.foreign()  # type: ignore[attr-defined]
            seconds = await self.until(lambda: self.pieces() == before, self.limit)
            self.assertTrue(await self.isInForce(current))  # type: ignore[attr-defined]
            took.append(f"{' '.join([*argv, stdin])}: {seconds:.2f} s")
            await follower.settled()
            self.assertEqual(self.foreign(), theirs)  # type: ignore[attr-defined]
        if os.environ.get("KPROXY_TEST_TIMES"):
            print("\n".join(took))
        await follower.plane.stop(0)

    async def test_restartWritesNothing(self) -> None:
        """A later run that finds all as it shall be writes nothing."""
        current = services(50)
        first = await self.follower(current)
        await first.plane._writer.close()
        before = self.listed()
        writer = self.makeWriter()  # type: ignore[attr-defined]
        wrote: list[str] = []
        for name in ("apply", "replace"):
            real = getattr(writer, name)
            setattr(writer, name, lambda it, name=name, real=real: (wrote.append(name), real(it))[1])
        later = await self.follower(current, writer)
        await later.plane.onUpdate(Update(current, current, True))
        self.assertEqual(wrote, [])  # type: ignore[attr-defined]
        self.assertEqual(self.listed(), before)  # type: ignore[attr-defined]

    async def test_partialDamage(self) -> None:
        """What was damaged while nobody ran is mended at the start, and nothing else is touched."""
        current = services(50)
        first = await self.follower(current)
        await first.plane._writer.close()
        before = self.listed()
        argv, stdin = self.spot("10.97.0.20")
        self.do(argv, stdin)
        damaged = self.listed()
        self.assertNotEqual(damaged, before)  # type: ignore[attr-defined]
        await self.follower(current)
        self.assertTrue(await self.isInForce(current))  # type: ignore[attr-defined]
        for was, now in zip(before, self.listed(), strict=True):
            self.assertEqual(sorted(self.words(was)), sorted(self.words(now)))  # type: ignore[attr-defined]
        for was, now in zip(damaged, self.listed(), strict=True):
            kept = [line for line in was.splitlines() if "10.97.0.20" not in line]
            order = [line for line in now.splitlines() if "10.97.0.20" not in line]
            self.assertEqual([it for it in order if it in set(kept)], [it for it in kept if it in set(order)])  # type: ignore[attr-defined]

    def pieces(self) -> list[list[str]]:
        """All that is in force, in whichever order."""
        try:
            return [sorted(self.words(text)) for text in self.listed()]
        except AssertionError:
            return []

    @staticmethod
    def words(text: str) -> list[str]:
        """A listing in pieces that may come in another order."""
        text = re.sub(r"elements = \{|\}|handle \d+", " ", text)
        return [it.strip() for it in re.split(r"\n|, ", text) if it.strip(" ,")]

    # --- programs that do not as they should ---

    def wrapped(self) -> tuple[Any, Path]:
        """A writer whose programs are wrapped, and the file that says what they do."""
        folder = Path(self.mktemp()).absolute()  # type: ignore[attr-defined]
        folder.mkdir()
        mode = folder / "mode"
        mode.write_text("ok")
        paths: dict[str, str] = {}

        def findTool(name: str, package: str) -> str:
            real = find(name, package)
            if name not in self.tools:
                return str(real)
            if name not in paths:
                path = folder / name
                path.write_text(WRAPPER.format(mode=mode, real=real))
                path.chmod(path.stat().st_mode | stat.S_IXUSR)
                paths[name] = str(path)
            return paths[name]

        return self.makeWriter(findTool=findTool), mode  # type: ignore[attr-defined]

    def impatient(self) -> Any:
        """From now on programs are given a second; gives what ends that."""
        real = Tool.run

        def run(it: Any, *arguments: Any, **options: Any) -> Any:
            limit, it._limit = it._limit, 1.0
            try:
                return real(it, *arguments, **options)
            finally:
                it._limit = limit

        return self.patch(Tool, "run", run)  # type: ignore[attr-defined]

    async def test_brokenProgram(self) -> None:
        """
        The program fails every second time, hangs, dies, dies in the middle of its input, or talks rubbish: each table
        stays one complete version, and once it is well again, so are the rules.
        """
        if not self.tools:
            return
        writer, mode = self.wrapped()
        versions = [services(60, base) for base in (20000, 30000)]
        follower = await self.follower(versions[0], writer)
        follower.plane._writer.watch(None)
        counts = self.versions()
        for n, how in enumerate(("flaky", "crash", "half", "garbage", "hang")):
            mode.write_text(how)
            impatience = self.impatient() if how == "hang" else None
            wanted = versions[(n + 1) % 2]
            try:
                await follower.plane.onUpdate(Update(follower.current, wanted, True))
            except RulesRejected as error:
                self.assertNotIn("\n", str(error))  # type: ignore[attr-defined]
            self.assertWhole([it for it in counts if it])
            if impatience is not None:
                impatience.restore()
            mode.write_text("ok")
            follower.wanted = wanted
            follower.again()
            await follower.settled()
            self.assertTrue(await self.isInForce(wanted), how)  # type: ignore[attr-defined]
            self.assertEqual(follower.plane.unserved(), {})  # type: ignore[attr-defined]

    async def test_flakyProgramConverges(self) -> None:
        """A program that fails every second time keeps nothing from coming into force, in a few tries."""
        if not self.tools:
            return
        writer, mode = self.wrapped()
        follower = await self.follower(services(30), writer)
        mode.write_text("flaky")
        follower.wanted = services(60, 30000)
        follower.again()
        await self.until(lambda: follower.running is None, 30)
        mode.write_text("ok")
        follower.again()
        await follower.settled()
        self.assertTrue(await self.isInForce(follower.wanted))  # type: ignore[attr-defined]

    async def test_poison(self) -> None:
        """Of a hundred service ports one is refused: ninety-nine are in force, and it is told which is not."""
        if not self.tools:
            return
        writer, mode = self.wrapped()
        await self.poisoned(writer, mode)

    async def poisoned(self, writer: Any, mode: Path | None) -> None:
        follower = await self.follower(ServiceMap(), writer)
        if mode is not None:
            mode.write_text("poison")
        good = services(99)
        bad = servicePort("bad", "10.96.66.66", 39999)
        await follower.plane.onUpdate(Update(ServiceMap(), ServiceMap({**good, bad.name: bad})))
        self.assertTrue(await self.isInForce(good))  # type: ignore[attr-defined]
        self.assertEqual(list(follower.plane.unserved()), ["default/bad:/TCP/IPv4"])  # type: ignore[attr-defined]
        everything = ServiceMap({**good, bad.name: bad})
        if mode is not None:
            mode.write_text("ok")
            await follower.plane.onUpdate(Update(everything, everything, True))
            self.assertTrue(await self.isInForce(everything))  # type: ignore[attr-defined]
            self.assertEqual(follower.plane.unserved(), {})  # type: ignore[attr-defined]
