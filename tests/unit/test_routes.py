"""Which API slices are read from, of servers old and new."""

from __future__ import annotations

from typing import Any

from treq.testing import RequestTraversalAgent
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.apikinds import KINDS, KINDS_OF_1_20
from tests.fakes.apiserver import FakeApi
from tests.fakes.apistore import Store
from tests.shared.sources import Words, manifest, sliceManifest
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.core.values import Replaced
from twisted_kproxy.sources.api import ApiSource
from twisted_kproxy.sources.client import Resource
from twisted_kproxy.sources.routes import PATIENCE, Routes

ENDPOINTS = {
    "apiVersion": "v1",
    "kind": "Endpoints",
    "metadata": {"name": "web", "namespace": "shop"},
    "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"name": "", "port": 8080, "protocol": "TCP"}]}],
}
V1 = "/apis/discovery.k8s.io/v1/endpointslices"
V1BETA1 = "/apis/discovery.k8s.io/v1beta1/endpointslices"


class RoutesTests(SynchronousTestCase):
    """The order in which they are tried."""

    def setUp(self) -> None:
        self.clock = Clock()
        instead = (Resource("EndpointSlice", "/b"), Resource("Endpoints", "/c"))
        self.routes = Routes(self.clock, Resource("EndpointSlice", "/a", instead=instead))

    def test_oneAfterTheOther(self) -> None:
        """Each that is missing is followed by the next at once; only after the last one is there a pause."""
        self.assertEqual([self.routes.lacks() for _ in range(4)], [True, True, False, True])
        self.assertEqual(self.routes.resource.path, "/b")

    def test_oneThatWorked(self) -> None:
        """One that has worked is given up only after it was missing several times in a row."""
        for _ in range(3):
            self.routes.works()
            self.assertEqual([self.routes.lacks() for _ in range(PATIENCE - 1)], [False] * (PATIENCE - 1))
        self.assertTrue(self.routes.lacks())

    def test_onlyOne(self) -> None:
        """Where there is no other, it is waited for."""
        routes = Routes(self.clock, Resource("Service", "/a"))
        self.assertEqual([routes.lacks() for _ in range(5)], [False] * 5)
        self.assertIsNone(routes.untilProbe())

    def test_probeTime(self) -> None:
        """The best is asked for again ten minutes after another one was found to work."""
        self.assertIsNone(self.routes.untilProbe())
        self.routes.lacks()
        self.clock.advance(1000)
        self.routes.works()
        self.assertEqual(self.routes.untilProbe(), 600)
        self.clock.advance(700)
        self.routes.works()
        self.assertEqual(self.routes.untilProbe(), 0)


class OldServerTests(SynchronousTestCase):
    """A source before servers that lack something."""

    def start(self, kinds: Any, watchList: str = "off") -> None:
        self.clock = Clock()
        self.words = Words()
        self.api = FakeApi(self.clock, Store(kinds), watchList=watchList)
        self.agent = RequestTraversalAgent(self.api.resource)
        self.cluster = Cluster("node-a")
        self.source = ApiSource(
            self.clock, "main", ApiOptions("main", server="http://192.0.2.1"), self, nodeName="node-a",
            agent=self.agent, random=lambda: 0.5,
        )
        self.cluster.expect("main", self.source.kinds)
        self.put(manifest("web"))
        if "Endpoints" in {kind.kind for kind in kinds}:
            self.put(ENDPOINTS)
        self.source.startService()
        self.pass_(2)
        self.addCleanup(self.stop)

    def say(self, word: Any) -> None:
        self.words.say(word)
        self.cluster.say(word)

    def stop(self) -> None:
        self.source.stopService()
        for watch in list(self.api.watches):
            watch.end()
        self.agent.flush()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def pass_(self, seconds: float, step: float = 0.5) -> None:
        self.agent.flush()
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.agent.flush()

    def put(self, it: dict[str, Any]) -> None:
        self.api.store.apply(it)

    def slice(self, version: str, *addresses: str) -> dict[str, Any]:
        return {**sliceManifest("web-1", *addresses), "apiVersion": f"discovery.k8s.io/{version}"}

    def reads(self) -> str:
        said: str = self.source.status()["kinds"]["EndpointSlice"]["reads"]
        return said

    def ends(self) -> list[str]:
        return sorted(str(end) for port in self.cluster.current().values() for end in port.cluster)

    def test_beta(self) -> None:
        """A server of 1.20 has its slices in v1beta1."""
        self.start(KINDS_OF_1_20)
        self.assertEqual(self.reads(), V1BETA1)
        self.put(self.slice("v1beta1", "10.0.0.2"))
        self.pass_(1)
        self.assertEqual(list(self.words.state["EndpointSlice"]), ["shop/web-1"])
        self.assertNotIn("Endpoints", self.words.state)
        self.assertTrue(self.cluster.synced)
        self.assertEqual(self.ends(), ["10.0.0.2:8080"])

    def test_endpoints(self) -> None:
        """One without slices has Endpoints; that there are no slices is said, but only once those are."""
        self.start([kind for kind in KINDS_OF_1_20 if kind.kind != "EndpointSlice"])
        self.assertEqual(self.reads(), "/api/v1/endpoints")
        said = [word.kind for word in self.words.said if isinstance(word, Replaced)]
        self.assertLess(said.index("Endpoints"), said.index("EndpointSlice"))
        self.assertTrue(self.cluster.synced)
        self.assertEqual(self.ends(), ["10.0.0.1:8080"])
        self.assertEqual(set(self.source.ages()), {"Service", "EndpointSlice", "Node"})

    def test_upgraded(self) -> None:
        """
        The server is asked for the best API every ten minutes; once it is there, slices are said before Endpoints go:
        at no time is the service without endpoints.
        """
        self.start([kind for kind in KINDS_OF_1_20 if kind.kind != "EndpointSlice"])
        self.pass_(1300, 5)
        probes = [it.time for it in self.api.requests if it.path == V1 and it.query.get("limit") == "1"]
        self.assertEqual(len(probes), 2)
        self.assertLess(abs(probes[1] - probes[0] - 600), 20)
        upgraded = Store(KINDS, resourceVersion=self.api.store.resourceVersion + 100)
        self.api.store = upgraded
        self.api.watchList = "on"
        upgraded.subscribe(self.api._changed)
        for it in (manifest("web"), ENDPOINTS, self.slice("v1", "10.0.0.1")):
            self.put(it)
        seen = set()
        for _ in range(130):
            self.pass_(5, 5)
            seen.add(tuple(self.ends()))
        self.assertEqual(self.reads(), V1)
        self.assertEqual(seen, {("10.0.0.1:8080",)})
        self.assertEqual(self.words.state["Endpoints"], {})
        self.put(self.slice("v1", "10.0.0.1", "10.0.0.2"))
        self.pass_(1)
        self.assertEqual(self.ends(), ["10.0.0.1:8080", "10.0.0.2:8080"])

    def test_missingForAMoment(self) -> None:
        """A server that says 404 for a moment (one that starts, a wrong one behind a balancer) changes nothing."""
        self.start(KINDS, "on")
        self.put(self.slice("v1", "10.0.0.1"))
        self.pass_(1)
        self.api.faults.add(resource="endpointslices", status=404, times=2)
        self.api.closeWatches(abort=True, resource="endpointslices")
        self.pass_(10)
        self.assertEqual(self.reads(), V1)
        self.assertEqual(list(self.words.state["EndpointSlice"]), ["shop/web-1"])
        self.assertNotIn("Endpoints", self.words.state)
        self.assertEqual(self.source.status()["kinds"]["EndpointSlice"]["state"], "watching")
