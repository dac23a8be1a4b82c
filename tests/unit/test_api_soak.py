"""A day of misfortunes on a clock of its own: the source always comes back, in time, without storms or leaks."""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.apiserver import FakeApi
from tests.fakes.pipes import Pipes
from tests.shared.sources import Words, manifest, sliceManifest
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.sources.api import ApiSource
from twisted_kproxy.sources.body import Body
from twisted_kproxy.sources.stream import WatchStream
from twisted_kproxy.sources.watcher import Watchdog

DAY = 24 * 3600.0
#: Seconds within which all must be as it is there, once a fault is over. A pause is a minute at most; a dead link is
#: found after twice the longest time between bookmarks, and headers are waited for for half a minute.
SOON = 65.0
DEAD = 150.0 + 30.0 + SOON
#: Only the comparison with the newest state finds that a silent server was restored.
RESTORED = 3600.0 + 2 * SOON
#: A server that takes a streaming list for a watch is found out after half a minute.
UNMARKED = 35.0
LEAKABLE = (Body, WatchStream, Watchdog)


class World:
    """A server, a source, a network between them, and time."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.clock = Clock()
        self.words = Words()
        self.api = FakeApi(self.clock)
        self.pipes = Pipes(self.clock, self.api)
        self.agent = self.pipes.agent()
        self.source = ApiSource(
            self.clock, "main", ApiOptions("main", server="http://192.0.2.1"), self.words, nodeName="node-a",
            agent=self.agent, random=self.dice.random,
        )
        self.most = 0
        self.pacedUntil = 0.0

    def pass_(self, seconds: float) -> None:
        """Let time pass, from one timer to the next."""
        end = self.clock.seconds() + seconds
        self.pipes.flush()
        while True:
            due = min((call.getTime() for call in self.clock.getDelayedCalls()), default=end)
            if due > end:
                break
            self.clock.advance(max(0.0, due - self.clock.seconds()))
            self.pipes.flush()
        self.clock.advance(end - self.clock.seconds())
        self.pipes.flush()

    def change(self, count: int) -> None:
        """Objects come, change and go."""
        for _ in range(count):
            number = self.dice.randrange(60)
            store = self.api.store
            there = {name for _, name in store.objects(self.kind("services"))}
            if f"s{number}" in there and self.dice.random() < 0.3 and len(there) > 40:
                store.delete(manifest(f"s{number}"))
            else:
                port = self.dice.randrange(1, 60000)
                store.apply(manifest(f"s{number}", f"10.96.0.{number + 1}", port=port))
            store.apply(sliceManifest(f"s{number}-x", f"10.0.{self.dice.randrange(250)}.{number + 1}"))

    def kind(self, plural: str) -> Any:
        return next(it for it in self.api.store.kinds if it.plural == plural and it.version == "v1")

    def there(self, plural: str) -> dict[str, str]:
        """Name → resource version, of what the server has."""
        found = self.api.store.objects(self.kind(plural))
        return {f"{namespace}/{name}": it["metadata"]["resourceVersion"] for (namespace, name), it in found.items()}

    def agrees(self) -> bool:
        """Whether the source says what the server has."""
        return (
            self.words.versions("Service") == self.there("services")
            and self.words.versions("EndpointSlice") == self.there("endpointslices")
        )

    def untilAgreed(self, most: float) -> float:
        """Seconds until it does. That is asked for each second, without another change."""
        began = self.clock.seconds()
        while not self.agrees():
            waited = self.clock.seconds() - began
            if waited > most:
                raise AssertionError(f"no agreement after {waited:.0f} s: {self.source.status()['kinds']}")
            self.pass_(min(1.0 + waited / 20, 30.0))
        return self.clock.seconds() - began


class SoakTests(SynchronousTestCase):
    """24 hours."""

    def test_day(self) -> None:
        """
        After each misfortune the source agrees with the server within the time that is stated for it; it never asks
        more often than client-go would, and holds on to nothing.
        """
        for seed in (1, 2):
            self.day(seed)

    def day(self, seed: int) -> None:
        left = self.leakables()
        world = World(seed)
        world.change(80)
        world.source.startService()
        world.untilAgreed(5)
        faults = [it.removeprefix("fault_") for it in dir(self) if it.startswith("fault_")]
        suffered: Counter[str] = Counter()
        while world.clock.seconds() < DAY:
            world.pass_(world.dice.uniform(1, 1500))
            world.change(world.dice.randrange(4))
            name = world.dice.choice(faults)
            suffered[name] += 1
            before = set(world.words.state["Service"])
            seconds = world.dice.choice((1.0, 5.0, 30.0, 200.0, 900.0))
            try:
                bound = getattr(self, f"fault_{name}")(world, seconds)
                self.assertGreaterEqual(2 * len(world.words.state["Service"]), len(before), "most of it was lost")
                world.api.faults.clear()
                world.untilAgreed(bound + (UNMARKED if world.api.watchList == "ignored" else 0))
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {name} for {seconds:g} s at {world.clock.seconds():.0f} s: {error}")
            world.change(1)
            world.pass_(2)
            self.checkRates(world)
        self.assertEqual(set(suffered), set(faults))
        world.pass_(1000)
        self.assertTrue(world.agrees())
        self.assertEqual(len(world.pipes.open), 4)
        self.assertEqual(len(world.api.watches), 4)
        # Each watch has its deadline, its silence and nothing else; the server has its own.
        ours = [call for call in world.clock.getDelayedCalls() if "twisted_kproxy" in call.func.__module__]
        self.assertLessEqual(len(ours), 4 * 2 + 1)
        self.assertLessEqual((self.leakables() - left).total(), 4 * len(LEAKABLE))
        world.source.stopService()
        world.pipes.flush()
        self.assertEqual(world.agent.links, set())
        self.assertEqual(world.pipes.open, {})
        self.assertEqual(world.clock.getDelayedCalls(), [])

    def leakables(self) -> Counter[type]:
        """How many there are of what belongs to a request."""
        gc.collect()
        return Counter(type(it) for it in gc.get_objects() if type(it) in LEAKABLE)

    def checkRates(self, world: World) -> None:
        """
        However long the server has been failing, five minutes see few attempts of the four kinds; save where the
        server itself said when to come again.
        """
        attempts, now = world.pipes.attempts, world.clock.seconds()
        while attempts and attempts[0] < max(now - 1200, world.pacedUntil):
            attempts.pop(0)
        most = max((sum(at <= it < at + 300 for it in attempts) for at in attempts), default=0)
        world.most = max(world.most, most)
        self.assertLessEqual(most, 0.22 * 300, "more than client-go's 0.22 requests a second")

    # Each brings a misfortune, lets that long pass, ends it, and gives the time in which all must be well again.

    def fault_refused(self, world: World, seconds: float) -> float:
        world.pipes.refusing = True
        world.pipes.cut()
        attempts = len(world.pipes.attempts)
        world.pass_(seconds)
        if seconds >= 200:
            self.assertLessEqual(len(world.pipes.attempts) - attempts, 3 * 16 * max(1.0, seconds / 300))
        world.change(5)
        world.pipes.refusing = False
        return SOON

    def fault_cut(self, world: World, seconds: float) -> float:
        for _ in range(5):
            world.pipes.cut()
            world.change(1)
            world.pass_(seconds / 5)
        return SOON

    def fault_blackHole(self, world: World, seconds: float) -> float:
        world.pipes.blackHole(True)
        world.change(3)
        world.pass_(seconds)
        world.pipes.blackHole(False)
        return DEAD

    def fault_errors(self, world: World, seconds: float) -> float:
        code = world.dice.choice((400, 401, 403, 406, 429, 500, 502, 503, 504))
        paced = code in (429, 503) and world.dice.random() < 0.5
        headers = {"Retry-After": str(world.dice.randrange(1, 9))} if paced else {}
        world.api.faults.add(status=code, headers=headers, times=0)
        world.api.closeWatches(abort=world.dice.random() < 0.5)
        world.change(3)
        world.pass_(seconds)
        if paced:
            world.pacedUntil = world.clock.seconds() + SOON
        return SOON

    def fault_expired(self, world: World, seconds: float) -> float:
        world.api.closeWatches(abort=True)
        world.change(10)
        world.api.compact()
        if world.dice.random() < 0.5:
            world.api.faults.add(status=410, times=4)
        world.pass_(seconds)
        return 2 * SOON

    def fault_midEvent(self, world: World, seconds: float) -> float:
        world.api.closeWatches(midEvent=True)
        world.change(3)
        return SOON

    def fault_garbage(self, world: World, seconds: float) -> float:
        world.api.sendRaw(world.dice.choice((b"<html>\n", b'{"type":"ERROR","object":{"code":500}}\n', b"\xff\n")))
        world.api.faults.add(garbage=True, times=4)
        world.change(3)
        world.pass_(seconds)
        return SOON

    def fault_silence(self, world: World, seconds: float) -> float:
        world.api.faults.add(blackHole=True, times=6)
        world.api.closeWatches()
        world.change(3)
        world.pass_(seconds)
        return 60 + SOON

    def fault_cutBody(self, world: World, seconds: float) -> float:
        world.api.closeWatches()
        world.api.compact()
        world.api.faults.add(cutAfter=world.dice.randrange(3000), times=6)
        world.pass_(seconds)
        return 2 * SOON

    def fault_trickle(self, world: World, seconds: float) -> float:
        world.api.closeWatches()
        world.api.compact()
        world.api.faults.add(trickle=(40, 1.0), times=3)
        world.change(3)
        world.pass_(seconds)
        return 300 + 2 * SOON

    def fault_empty(self, world: World, seconds: float) -> float:
        world.api.watchList = "off"
        for plural in ("services", "endpointslices"):
            world.api.faults.add(resource=plural, verb="list", emptyList=True)
        world.api.compact()
        world.api.closeWatches(abort=True)
        world.change(2)
        world.pass_(seconds)
        world.api.watchList = "on"
        return 10 + 2 * SOON

    def fault_watchList(self, world: World, seconds: float) -> float:
        world.api.watchList = world.dice.choice(("on", "off", "ignored"))
        world.api.compact()
        world.api.closeWatches(abort=True)
        world.change(2)
        return 2 * SOON

    def fault_missing(self, world: World, seconds: float) -> float:
        world.api.faults.add(resource="endpointslices", status=404, times=2)
        world.api.closeWatches()
        world.api.compact()
        return 2 * SOON

    def fault_restored(self, world: World, seconds: float) -> float:
        world.change(3)
        world.pass_(2)
        store = world.api.store
        back = max(store.oldest, store.resourceVersion - world.dice.randrange(1, 8))
        world.api.rewind(back)
        if world.dice.random() < 0.5:
            world.pipes.cut()
        return RESTORED
