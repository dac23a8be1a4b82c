"""Which API slices are read from, of servers old and new."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from treq.testing import RequestTraversalAgent
from twisted.internet.task import Clock
from twisted.logger import LogLevel, globalLogPublisher
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
from twisted_kproxy.sources.routes import PATIENCE, PROBE_EVERY, Routes

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


class ServerCase(SynchronousTestCase):
    """A source before a server."""

    def start(self, kinds: Any, watchList: str = "off", forbidden: Iterable[str] = ()) -> None:
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
        for it in forbidden:
            self.api.forbidden.add((it, "*"))
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

class OldServerTests(ServerCase):
    """A server that lacks something."""

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


CIDR = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "ServiceCIDR",
    "metadata": {"name": "kubernetes"},
    "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]},
}
WITHOUT = [kind for kind in KINDS if kind.kind != "ServiceCIDR"]


class OptionalTests(ServerCase):
    """ServiceCIDRs: what a server may lack, or keep from us, and nothing is wrong by that."""

    def setUp(self) -> None:
        self.logged: list[Any] = []
        globalLogPublisher.addObserver(self.logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.logged.append)

    def networks(self) -> tuple[str, ...]:
        return self.cluster.current().locality.services

    def asked(self) -> int:
        return len(self.api.asked("servicecidrs"))

    def told(self, level: Any) -> list[str]:
        said = [it for it in self.logged if it["log_level"] == level and it.get("kind") == "ServiceCIDR"]
        return [it["log_format"] for it in said]

    def checkHarmless(self) -> None:
        """It is synced and sound, one line says what is missing, and the server is left alone with it."""
        self.pass_(20)
        self.assertTrue(self.cluster.synced)
        self.assertEqual(dict(self.source.faults()), {})
        self.assertEqual(set(self.source.ages()), {"Service", "EndpointSlice", "Node"})
        self.assertEqual(self.source.status()["kinds"]["ServiceCIDR"]["state"], "not available")
        self.assertEqual((len(self.told(LogLevel.info)), self.told(LogLevel.warn)), (1, []))
        before = self.asked()
        self.pass_(PROBE_EVERY - 30, 10)
        self.assertEqual(self.asked(), before)
        self.assertEqual(dict(self.source.faults()), {})
        self.pass_(PROBE_EVERY, 10)
        self.assertGreater(self.asked(), before)
        self.assertEqual((len(self.told(LogLevel.info)), self.told(LogLevel.warn)), (1, []))

    def test_there(self) -> None:
        """Where they are there, they are read and followed like everything else."""
        for watchList in ("on", "off"):
            self.start(KINDS, watchList)
            self.put(CIDR)
            self.pass_(1)
            self.assertEqual(self.networks(), ("10.96.0.0/16", "fd00:10:96::/112"))
            self.assertIn("ServiceCIDR", self.source.ages())
            self.api.store.delete(CIDR)
            self.pass_(1)
            self.assertEqual(self.networks(), ())

    def test_missing(self) -> None:
        """A server before 1.33."""
        self.start(WITHOUT)
        self.checkHarmless()

    def test_missingWithStreams(self) -> None:
        """The same where lists are streamed."""
        self.start(WITHOUT, "on")
        self.checkHarmless()

    def test_forbidden(self) -> None:
        """A role that says nothing of them."""
        self.start(KINDS, forbidden=["servicecidrs"])
        self.checkHarmless()

    def test_comesLater(self) -> None:
        """Once we may read them they are found, without a restart."""
        self.start(KINDS, forbidden=["servicecidrs"])
        self.put(CIDR)
        self.pass_(60)
        self.assertEqual(self.networks(), ())
        self.api.forbidden.clear()
        self.pass_(PROBE_EVERY * 1.5, 10)
        self.assertEqual(self.networks(), ("10.96.0.0/16", "fd00:10:96::/112"))

    def test_startingServer(self) -> None:
        """A server that has not read its roles yet is asked again soon."""
        self.start(KINDS, forbidden=["servicecidrs"])
        self.put(CIDR)
        self.api.forbidden.clear()
        self.pass_(10)
        self.assertEqual(len(self.networks()), 2)

    def test_takenAway(self) -> None:
        """What was read stays when the right to read it is taken away, and that is no fault either."""
        self.start(KINDS)
        self.put(CIDR)
        self.pass_(1)
        self.api.forbidden.add(("servicecidrs", "*"))
        self.api.closeWatches(resource="servicecidrs")
        self.pass_(120)
        self.assertEqual(len(self.networks()), 2)
        self.assertEqual(dict(self.source.faults()), {})
        self.assertEqual(set(self.source.ages()), {"Service", "EndpointSlice", "Node"})

    def test_otherTroubleIsAFault(self) -> None:
        """A server that fails at them is a fault like any other: they may be there."""
        self.start(KINDS)
        self.api.faults.add(resource="servicecidrs", status=500, times=0)
        self.api.closeWatches(abort=True, resource="servicecidrs")
        self.pass_(60)
        self.assertEqual(set(self.source.faults()), {"ServiceCIDR"})
