"""The source against a server with real list and watch semantics: whatever happens, it comes to hold what is there."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from treq.testing import RequestTraversalAgent
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.apiserver import FakeApi
from tests.shared.sources import Words, manifest, sliceManifest
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.core.values import Replaced
from twisted_kproxy.core.wire import HEADLESS_LABEL, PROXY_NAME_LABEL
from twisted_kproxy.sources.api import ApiSource


class World:
    """A server, a source, and time."""

    def __init__(self, **server: Any) -> None:
        self.clock = Clock()
        self.words = Words()
        self.api = FakeApi(self.clock, **server)
        self.agent = RequestTraversalAgent(self.api.resource)
        self.source = ApiSource(
            self.clock, "main", ApiOptions("main", server="http://192.0.2.1"), self.words, nodeName="node-a",
            agent=self.agent, random=lambda: 0.5,
        )

    def pass_(self, seconds: float, step: float = 0.5) -> None:
        """Let time pass, and bytes flow."""
        self.agent.flush()
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.agent.flush()

    def put(self, it: dict[str, Any], labels: dict[str, str] | None = None) -> None:
        it = {**it, "metadata": {**it["metadata"], "labels": {**it["metadata"].get("labels", {}), **(labels or {})}}}
        self.api.store.apply(it)

    def delete(self, it: dict[str, Any]) -> None:
        self.api.store.delete(it)

    def there(self, plural: str) -> dict[str, str]:
        """Name → resource version, of what the server has and a service proxy reads."""
        (kind,) = (it for it in self.api.store.kinds if it.plural == plural and it.version == "v1")
        found = {}
        for (namespace, name), it in self.api.store.objects(kind).items():
            labels = it["metadata"].get("labels") or {}
            if plural == "services" and (PROXY_NAME_LABEL in labels or it["spec"].get("clusterIP") == "None"):
                continue
            if plural == "endpointslices" and HEADLESS_LABEL in labels:
                continue
            found[f"{namespace}/{name}"] = it["metadata"]["resourceVersion"]
        return found


class ScenarioTests(SynchronousTestCase):
    """One thing at a time."""

    def started(self, **server: Any) -> World:
        world = World(**server)
        world.put(manifest("web"))
        world.put(sliceManifest("web-1", "10.0.0.1"))
        world.source.startService()
        world.pass_(1)
        self.addCleanup(self.stopped, world)
        self.assertAgrees(world)
        return world

    def stopped(self, world: World) -> None:
        world.source.stopService()
        for watch in list(world.api.watches):
            watch.end()
        world.agent.flush()
        self.assertEqual(world.clock.getDelayedCalls(), [])

    def assertAgrees(self, world: World) -> None:
        self.assertEqual(world.words.versions("Service"), world.there("services"))
        self.assertEqual(world.words.versions("EndpointSlice"), world.there("endpointslices"))

    def lists(self, world: World) -> int:
        return sum(isinstance(word, Replaced) for word in world.words.said)

    def test_quiet(self) -> None:
        """Hours without a change: watches follow each other, there is no other list, and the ages stay small."""
        world = self.started()
        for _ in range(60):
            world.pass_(120, 5)
            for age in world.source.ages().values():
                assert age is not None
                self.assertLessEqual(age, 70)
        self.assertEqual(self.lists(world), 4)
        self.assertEqual(len(world.api.watches), 4)

    def test_selected(self) -> None:
        """An object that stops matching goes, and comes again when it matches again."""
        world = self.started()
        world.put(manifest("web"), {PROXY_NAME_LABEL: "other"})
        world.put(sliceManifest("web-1", "10.0.0.1"), {HEADLESS_LABEL: ""})
        world.pass_(1)
        self.assertEqual((world.words.state["Service"], world.words.state["EndpointSlice"]), ({}, {}))
        world.put(manifest("web"))
        world.put(sliceManifest("web-1", "10.0.0.1"))
        world.pass_(1)
        self.assertEqual(list(world.words.state["Service"]), ["shop/web"])
        self.assertAgrees(world)

    def test_missedDeletion(self) -> None:
        """What went away while the history was lost is gone after the list that follows."""
        world = self.started()
        world.put(manifest("db", "10.96.0.11"))
        world.pass_(1)
        world.api.closeWatches(abort=True)
        world.delete(manifest("db"))
        world.api.compact()
        world.pass_(5)
        self.assertAgrees(world)
        self.assertEqual(list(world.words.state["Service"]), ["shop/web"])
        self.assertGreater(self.lists(world), 4)

    def test_cutWithinEvent(self) -> None:
        """Watches that break within events lose nothing and need no list."""
        world = self.started()
        world.pass_(2)
        for number in range(5):
            world.api.closeWatches(midEvent=True)
            world.put(manifest(f"s{number}", f"10.96.1.{number}"))
            world.pass_(3)
            self.assertAgrees(world)
        self.assertEqual(self.lists(world), 4)

    def test_outage(self) -> None:
        """Ten minutes of errors of all kinds take nothing away; soon after them all is as it is there."""
        world = self.started()
        faults = [
            world.api.faults.add(verb="list", status=500, times=0),
            world.api.faults.add(verb="watch", status=503, times=0),
        ]
        world.api.closeWatches()
        world.delete(manifest("web"))
        world.pass_(300)
        for fault in faults:
            world.api.faults.ordered.remove(fault)
        world.api.faults.add(garbage=True, times=4)
        world.api.faults.add(blackHole=True, times=4)
        self.assertEqual(list(world.words.state["Service"]), ["shop/web"])
        world.pass_(200)
        self.assertAgrees(world)

    def test_tooLarge(self) -> None:
        """A server that is behind the one before it is asked for its own state."""
        world = self.started()
        for number in range(20):
            world.put(manifest("web", port=1000 + number))
        world.pass_(1)
        world.api.closeWatches(abort=True)
        world.api.rewind(world.api.store.resourceVersion - 10)
        world.api.compact()
        world.api.faults.add(resource="services", verb="watch", status=410)
        world.pass_(60)
        self.assertAgrees(world)


WORDS = st.sampled_from(
    ["put", "put", "put", "slice", "delete", "hide", "end", "abort", "midEvent", "compact", "bookmark", "wait", "long",
     "status410", "status429", "status500", "status401", "garbage", "cut", "blackHole", "garbageInWatch", "errorEvent"]
)


class ConvergenceTests(SynchronousTestCase):
    """Many things in any order."""

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(st.sampled_from(("on", "off", "ignored")), st.lists(st.tuples(WORDS, st.integers(0, 5)), max_size=25))
    def test_converges(self, watchList: str, story: list[tuple[str, int]]) -> None:
        """After any story of changes and misfortunes, a quiet quarter of an hour makes all as it is there."""
        world = World(watchList=watchList)
        world.put(manifest("web"))
        world.source.startService()
        for word, number in story:
            self.tell(world, word, number)
        world.api.faults.clear()
        world.pass_(900, 5)
        self.assertEqual(world.words.versions("Service"), world.there("services"))
        self.assertEqual(world.words.versions("EndpointSlice"), world.there("endpointslices"))
        world.source.stopService()
        for watch in list(world.api.watches):
            watch.end()
        world.agent.flush()
        self.assertEqual(world.clock.getDelayedCalls(), [])

    def tell(self, world: World, word: str, number: int) -> None:
        name = f"s{number}"
        services = {key.partition("/")[2] for key in world.there("services")}
        faults = world.api.faults
        match word:
            case "put":
                world.put(manifest(name, f"10.96.0.{number + 1}", port=world.api.store.resourceVersion))
            case "slice":
                world.put(sliceManifest(name, f"10.0.0.{world.api.store.resourceVersion % 250 + 1}"))
            case "delete" if name in services:
                world.delete(manifest(name))
            case "hide":
                world.put(manifest(name, f"10.96.0.{number + 1}"), {PROXY_NAME_LABEL: "other"})
            case "end":
                world.api.closeWatches()
            case "abort":
                world.api.closeWatches(abort=True)
            case "midEvent":
                world.api.closeWatches(midEvent=True)
            case "compact":
                world.api.compact()
            case "bookmark":
                world.api.bookmarkNow()
            case "wait":
                world.pass_(number * 0.5)
            case "long":
                world.pass_(number * 60, 5)
            case "garbage":
                faults.add(garbage=True)
            case "cut":
                faults.add(cutAfter=number * 40)
            case "blackHole":
                faults.add(blackHole=True)
            case "garbageInWatch":
                world.api.sendRaw(b"<html>\n")
            case "errorEvent":
                world.api.sendRaw(b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}\n')
            case _ if word.startswith("status"):
                faults.add(status=int(word.removeprefix("status")))
        world.agent.flush()
