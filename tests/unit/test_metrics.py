"""What is counted, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parseOpenMetrics
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from twisted_kproxy.core import wire
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import (
    Change,
    Endpoint,
    Frontend,
    Outcome,
    PoolName,
    Problem,
    Replaced,
    ServiceMap,
    ServicePort,
    ServicePortName,
    Word,
)
from twisted_kproxy.interfaces import IChannel, ITrafficObserver, IUpdateListener
from twisted_kproxy.metrics import LoopLag, Metrics

ENDPOINT = Endpoint("10.0.0.1", 8080)
LOCAL = Endpoint("10.0.0.2", 8080, isLocal=True)


def named(service: str, port: str = "http") -> ServicePortName:
    return ServicePortName("shop", service, port, "TCP", "IPv4")


def pool(service: str, port: str = "http") -> PoolName:
    return PoolName(named(service, port), "cluster")


def mapOf(*ports: ServicePort) -> ServiceMap:
    return ServiceMap({port.name: port for port in ports})


def servicePort(service: str, port: str = "http", **kw: Any) -> ServicePort:
    kw.setdefault("frontends", (Frontend("ClusterIP", "10.96.0.1", 80),))
    return ServicePort(named(service, port), "uid", **kw)


@implementer(IChannel)
class _Channel:
    """Takes words, and forgets them."""

    def say(self, word: Word) -> None:
        pass


class MetricsCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = 1_700_000_000.0
        self.metrics = Metrics(wallClock=lambda: self.now)

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = self.metrics.exposition()[1].decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """The one sample of that name whose labels contain these; None where there is none."""
        found = [
            value
            for (itsName, itsLabels), value in self.samples().items()
            if itsName == name and set(labels.items()) <= set(itsLabels)
        ]
        self.assertLess(len(found), 2, f"{name} {labels}")
        return found[0] if found else None

    def services(self) -> set[str]:
        return {
            dict(labels)["service"]
            for name, labels in self.samples()
            if name == "kproxy_service_connections_opened_total"
        }

    def opened(self, service: str, **labels: str) -> float | None:
        return self.value("kproxy_service_connections_opened_total", service=service, **labels)

    def active(self, service: str, **labels: str) -> float | None:
        return self.value("kproxy_service_connections_active", service=service, **labels)


class ExpositionTests(MetricsCase):
    """The text itself."""

    def test_plainText(self) -> None:
        """By default it is the Prometheus text format, and every line of it can be parsed."""
        self.metrics.opened(pool("cart"), ENDPOINT, 0.002)
        contentType, body = self.metrics.exposition()
        self.assertTrue(contentType.startswith("text/plain; version=0.0.4"), contentType)
        names = {family.name for family in text_string_to_metric_families(body.decode())}
        for name in (
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "kproxy_service_connect_seconds",
            "kproxy_source_age_seconds",
            "process_resident_memory_bytes",
            "python_gc_collections",
            "kproxy_build_info",
        ):
            self.assertIn(name, names)

    def test_openMetrics(self) -> None:
        """Who accepts OpenMetrics gets it, ended as the strict parser demands, with the same numbers."""
        self.metrics.opened(pool("cart"), ENDPOINT, 0.002)
        self.metrics.failed(pool("cart"), "refused")
        contentType, body = self.metrics.exposition("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        self.assertTrue(contentType.startswith("application/openmetrics-text"), contentType)
        self.assertTrue(body.endswith(b"# EOF\n"))
        families = {family.name: family for family in parseOpenMetrics(body.decode())}
        self.assertEqual(families["kproxy_service_connections_opened"].type, "counter")
        self.assertEqual(families["kproxy_service_connections_opened"].samples[0].value, 1)

    def test_ownRegistry(self) -> None:
        """Two sets of metrics in one process know nothing of each other."""
        other = Metrics()
        other.queued(services=1)
        self.assertEqual(self.value("kubeproxy_sync_proxy_rules_service_changes_total"), 0)

    def test_escapes(self) -> None:
        """Names from outside cannot break out of their label."""
        name = ServicePortName('a"b', "c\\d", "e\nf", "TCP", "IPv4")
        self.metrics.opened(PoolName(name, "cluster"), ENDPOINT, 0.1)
        self.assertEqual(self.opened("c\\d", namespace='a"b', port="e\nf"), 1)

    def test_familiesFromTheStart(self) -> None:
        """Syncs are told for each IP family, from zero on: a rate needs a first value."""
        for family in ("IPv4", "IPv6"):
            self.assertEqual(self.value("kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family=family), 0)

    def test_servedFamiliesOnly(self) -> None:
        """Where one family is served there is no other in the metrics."""
        self.metrics = Metrics(families=["IPv4"])
        self.metrics.applied(0.1)
        self.assertIsNone(self.value("kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family="IPv6"))

    def test_buckets(self) -> None:
        """The buckets are kube-proxy's."""
        bounds = [
            float(dict(labels)["le"])
            for name, labels in self.samples()
            if name == "kubeproxy_sync_proxy_rules_duration_seconds_bucket" and ("ip_family", "IPv4") in labels
        ]
        self.assertEqual(sorted(bounds)[:3], [0.001, 0.002, 0.004])
        self.assertEqual(sorted(bounds)[-2:], [16.384, float("inf")])
        bounds = [
            float(dict(labels)["le"])
            for name, labels in self.samples()
            if name == "kubeproxy_network_programming_duration_seconds_bucket" and ("ip_family", "IPv4") in labels
        ]
        self.assertEqual(sorted(bounds)[:5], [0, 0.25, 0.5, 1, 2])
        self.assertEqual(sorted(bounds)[-9:], [115, 120, 150, 180, 210, 240, 270, 300, float("inf")])


class SyncTests(MetricsCase):
    """Syncs and changes."""

    def pending(self) -> tuple[float | None, float | None]:
        return (
            self.value("kubeproxy_sync_proxy_rules_service_changes_pending"),
            self.value("kubeproxy_sync_proxy_rules_endpoint_changes_pending"),
        )

    def test_changes(self) -> None:
        """Changes wait until a sync that began after them has succeeded; the totals only grow."""
        self.metrics.queued(services=2, endpoints=3)
        self.metrics.began()
        self.metrics.queued(endpoints=1)
        self.assertEqual(self.pending(), (2, 4))
        self.metrics.applied(0.1)
        self.assertEqual(self.pending(), (0, 1))
        self.assertEqual(self.value("kubeproxy_sync_proxy_rules_endpoint_changes_total"), 4)

    def test_countingChannel(self) -> None:
        """What sources say is counted by kind before it is passed on; a node is neither."""
        said: list[object] = []
        channel = self.metrics.counting(SimpleNamespace(say=said.append))  # type: ignore[arg-type]
        words: list[Word] = [
            Replaced("api", "Service", {"a/b": None, "a/c": None}),
            Change("api", "EndpointSlice", "a/b-1", None),
            Change("api", "Endpoints", "a/b", None),
            Change("api", "Node", "n", None),
        ]
        for word in words:
            channel.say(word)
        self.assertEqual(said, words)
        self.assertEqual(self.pending(), (2, 2))
        verifyObject(IChannel, channel)

    def test_failedSync(self) -> None:
        """A failed sync is counted, and what it was to bring still waits for the next one."""
        self.metrics.queued(services=1)
        self.metrics.began()
        self.metrics.syncFailed()
        self.assertEqual(self.pending(), (1, 0))
        self.assertEqual(self.value("kproxy_sync_failures_total"), 1)
        self.metrics.began()
        self.metrics.applied(0.1)
        self.assertEqual(self.pending(), (0, 0))

    def test_applied(self) -> None:
        """A sync is observed with its duration and the time of day; only full ones also as full."""
        self.metrics.applied(0.003)
        self.metrics.applied(0.005, full=True)
        for family in ("IPv4", "IPv6"):
            self.assertEqual(self.value("kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family=family), 2)
            self.assertEqual(self.value("kubeproxy_sync_full_proxy_rules_duration_seconds_count", ip_family=family), 1)
            self.assertEqual(
                self.value("kubeproxy_sync_proxy_rules_last_timestamp_seconds", ip_family=family), 1_700_000_000
            )
        self.assertEqual(self.value("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", ip_family="IPv4"), 0)

    def test_programming(self) -> None:
        """The latency of a change is observed for its family; differing clocks do not make it negative."""
        self.metrics.observeProgramming(1.5, "IPv6")
        self.metrics.observeProgramming(-3.0, "IPv6")
        self.assertEqual(self.value("kubeproxy_network_programming_duration_seconds_sum", ip_family="IPv6"), 1.5)
        self.assertEqual(self.value("kubeproxy_network_programming_duration_seconds_count", ip_family="IPv6"), 2)

    def test_triggered(self) -> None:
        """
        From the time that the endpoints controller stamped on a slice until it is in force: observed once, by the sync
        that brings it; changes from before the start, and stamps that are no time, are left out.
        """
        channel = self.metrics.counting(_Channel())
        for stamp in ("2023-11-14T22:13:25Z", "2023-11-14T22:00:00Z", "yesterday"):
            meta = wire.ObjectMeta("web-1", "shop", annotations={wire.CHANGE_TRIGGER_ANNOTATION: stamp})
            channel.say(Change("s", "EndpointSlice", "shop/web-1", wire.EndpointSlice(meta, "IPv6")))
        self.metrics.began()
        self.metrics.syncFailed()
        self.metrics.began()
        self.now += 7.5
        for _ in range(2):
            self.metrics.applied(0.1)
            self.metrics.began()
        self.assertEqual(self.value("kubeproxy_network_programming_duration_seconds_count", ip_family="IPv6"), 1)
        self.assertEqual(self.value("kubeproxy_network_programming_duration_seconds_sum", ip_family="IPv6"), 2.5)

    def test_missed(self) -> None:
        """
        Failed tries are counted per endpoint and reason, apart from clients that were lost; so many endpoints apart at
        the most; those that left are forgotten.
        """
        for _ in range(3):
            self.metrics.missed(pool("cart"), ENDPOINT, "refused")
        self.metrics.missed(pool("cart"), LOCAL, "timeout")
        labels = {"service": "cart", "namespace": "shop", "port": "http", "protocol": "TCP", "ip_family": "IPv4"}
        name = "kproxy_endpoint_failures_total"
        self.assertEqual(self.value(name, endpoint="10.0.0.1:8080", reason="refused", **labels), 3)
        self.assertNotIn("connections_failed_total{", self.metrics.exposition()[1].decode())
        self.successResultOf(
            self.metrics.onUpdate(Update(ServiceMap(), mapOf(servicePort("cart", cluster=(ENDPOINT,)))))
        )
        self.assertNotIn("10.0.0.2", self.metrics.exposition()[1].decode())
        for number in range(1, 200):
            self.metrics.missed(pool("cart"), Endpoint("10.0.0.9", number), "refused")
        shown = self.metrics.exposition()[1].decode().count("kproxy_endpoint_failures_total{")
        self.assertEqual(shown, 65)
        self.assertEqual(self.value(name, endpoint="(others)", reason="refused", **labels), 199 - 63)

    def test_healthAnswers(self) -> None:
        """Answers of the health pages are counted by page and code."""
        self.metrics.healthAnswered("healthz", 503)
        self.metrics.healthAnswered("livez", 200)
        self.assertEqual(self.value("kubeproxy_proxy_healthz_total", code="503"), 1)
        self.assertEqual(self.value("kubeproxy_proxy_livez_total", code="200"), 1)

    def test_noLocalEndpoints(self) -> None:
        """Service ports with a Local policy count while their endpoints are all elsewhere, by policy and family."""

        def values() -> tuple[float | None, float | None]:
            name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
            return tuple(  # type: ignore[return-value]
                self.value(name, ip_family="IPv4", traffic_policy=policy) for policy in ("internal", "external")
            )

        inside = servicePort("a", frontends=(Frontend("ClusterIP", "10.96.0.1", 80, "local", "local"),), reachable=True)
        outside = servicePort(
            "b",
            frontends=(Frontend("ClusterIP", "10.96.0.2", 80), Frontend("NodePort", None, 30000, "local")),
            cluster=(ENDPOINT,),
            reachable=True,
        )
        served = servicePort(
            "c", frontends=(Frontend("NodePort", None, 30001, "local"),), local=(LOCAL,), reachable=True
        )
        empty = servicePort("d", frontends=(Frontend("NodePort", None, 30002, "local"),))
        first = mapOf(inside, outside, served, empty)
        self.successResultOf(self.metrics.onUpdate(Update(ServiceMap(), first)))
        self.assertEqual(values(), (1, 1))
        second = mapOf(servicePort("b", cluster=(ENDPOINT,), reachable=True), inside)
        self.successResultOf(self.metrics.onUpdate(Update(first, second)))
        self.assertEqual(values(), (1, 0))
        self.successResultOf(self.metrics.onUpdate(Update(second, mapOf(outside), full=True)))
        self.assertEqual(values(), (0, 1))


class TrafficTests(MetricsCase):
    """Numbers per service port."""

    def test_interfaces(self) -> None:
        """It may stand wherever traffic is observed and maps are followed."""
        verifyObject(ITrafficObserver, self.metrics)
        verifyObject(IUpdateListener, self.metrics)

    def test_connection(self) -> None:
        """A connection counts as opened and active, then no longer as active but with its bytes."""
        self.metrics.opened(pool("cart"), ENDPOINT, 0.003)
        self.metrics.opened(PoolName(named("cart"), "local"), LOCAL, 3.0)
        self.assertEqual((self.opened("cart"), self.active("cart")), (2, 2))
        self.metrics.closed(pool("cart"), ENDPOINT, Outcome("done", 10, 200))
        self.assertEqual((self.opened("cart"), self.active("cart")), (2, 1))
        self.assertEqual(self.value("kproxy_service_sent_bytes_total", service="cart"), 10)
        self.assertEqual(self.value("kproxy_service_received_bytes_total", service="cart"), 200)
        labels = {"namespace": "shop", "port": "http", "protocol": "TCP", "ip_family": "IPv4"}
        self.assertEqual(self.opened("cart", **labels), 2)

    def test_connectTime(self) -> None:
        """Connect times fall into their bucket, bounds included, and add up."""
        for seconds in (0.001, 0.0011, 0.5, 7.0):
            self.metrics.opened(pool("cart"), ENDPOINT, seconds)

        def bucket(bound: str) -> float | None:
            return self.value("kproxy_service_connect_seconds_bucket", le=bound)

        self.assertEqual([bucket(it) for it in ("0.001", "0.005", "0.5", "2.0", "+Inf")], [1, 2, 3, 3, 4])
        self.assertEqual(self.value("kproxy_service_connect_seconds_count"), 4)
        self.assertAlmostEqual(self.value("kproxy_service_connect_seconds_sum") or 0, 7.5021)

    def test_failures(self) -> None:
        """Failures count by reason; a reason outside the fixed set is ``error``, and makes no series of its own."""
        for reason in ("refused", "refused", "no-endpoint", "made up by somebody"):
            self.metrics.failed(pool("cart"), reason)
        name = "kproxy_service_connections_failed_total"
        self.assertEqual(
            [self.value(name, reason=it) for it in ("refused", "no-endpoint", "error")],
            [2, 1, 1],
        )
        self.assertEqual(len([it for it in self.samples() if it[0] == name]), 3)

    def test_quietServiceHasNoSeries(self) -> None:
        """A service port without traffic costs nothing."""
        self.successResultOf(self.metrics.onUpdate(Update(ServiceMap(), mapOf(servicePort("cart")))))
        self.assertEqual(self.services(), set())

    def test_limit(self) -> None:
        """Beyond the limit service ports share one series; what was opened there is closed there."""
        self.metrics = Metrics(maxServicePorts=2)
        for service in "abcd":
            self.metrics.opened(pool(service), ENDPOINT, 0.001)
        self.assertEqual(self.services(), {"a", "b", "(others)"})
        self.assertEqual(self.active("(others)"), 2)
        self.metrics.forget([named("a")])
        self.metrics.closed(pool("a"), ENDPOINT, Outcome("done", 1, 1))
        self.metrics.opened(pool("c"), ENDPOINT, 0.001)
        self.metrics.closed(pool("c"), ENDPOINT, Outcome("done", 1, 1))
        self.metrics.closed(pool("c"), ENDPOINT, Outcome("done", 1, 1))
        self.metrics.closed(pool("d"), ENDPOINT, Outcome("done", 1, 1))
        self.assertEqual(self.active("(others)"), 0)

    def test_limitFreesUp(self) -> None:
        """A place that a removed service port leaves goes to the next one with traffic."""
        self.metrics = Metrics(maxServicePorts=1)
        self.metrics.failed(pool("a"), "refused")
        self.metrics.forget([named("a")])
        self.metrics.failed(pool("b"), "refused")
        self.metrics.failed(pool("c"), "refused")
        self.assertEqual(self.services(), {"b", "(others)"})

    def test_forgottenOthers(self) -> None:
        """A service port that was counted among the others and is gone still closes its connections there."""
        self.metrics = Metrics(maxServicePorts=0)
        self.metrics.opened(pool("a"), ENDPOINT, 0.001)
        self.metrics.forget([named("a")])
        self.metrics.closed(pool("a"), ENDPOINT, Outcome("done", 5, 5))
        self.assertEqual((self.active("(others)"), self.opened("(others)")), (0, 1))

    def test_removed(self) -> None:
        """The series of a removed service port is gone with the update, its neighbour's is not."""
        for service in "ab":
            self.metrics.failed(pool(service), "refused")
        before, after = mapOf(servicePort("a"), servicePort("b")), mapOf(servicePort("b"))
        self.successResultOf(self.metrics.onUpdate(Update(before, after)))
        self.assertEqual(self.services(), {"b"})

    def test_removedWhileDraining(self) -> None:
        """While connections to a removed service port are open it is still told; its last one takes it along."""
        self.metrics.opened(pool("a"), ENDPOINT, 0.001)
        self.metrics.opened(pool("a"), ENDPOINT, 0.001)
        self.successResultOf(self.metrics.onUpdate(Update(mapOf(servicePort("a")), ServiceMap())))
        self.metrics.closed(pool("a"), ENDPOINT, Outcome("done", 1, 1))
        self.assertEqual(self.active("a"), 1)
        self.metrics.closed(pool("a"), ENDPOINT, Outcome("done", 1, 1))
        self.assertEqual(self.services(), set())

    def test_returned(self) -> None:
        """A service port that comes back while draining keeps its series."""
        self.metrics.opened(pool("a"), ENDPOINT, 0.001)
        there = mapOf(servicePort("a"))
        self.successResultOf(self.metrics.onUpdate(Update(there, ServiceMap())))
        self.successResultOf(self.metrics.onUpdate(Update(ServiceMap(), there)))
        self.metrics.closed(pool("a"), ENDPOINT, Outcome("done", 1, 1))
        self.assertEqual(self.opened("a"), 1)

    def test_lateTraffic(self) -> None:
        """What is still reported for a removed service port leaves no series behind for ever."""
        there = mapOf(servicePort("a"), servicePort("b"))
        left = mapOf(servicePort("b"))
        self.successResultOf(self.metrics.onUpdate(Update(there, left)))
        self.metrics.failed(pool("a"), "refused")
        self.successResultOf(self.metrics.onUpdate(Update(left, ServiceMap())))
        self.assertEqual(self.services(), set())

    def rename(self) -> Update:
        update = Update(mapOf(servicePort("a", "old")), mapOf(servicePort("a", "new")))
        self.assertEqual(update.renamed, {named("a", "new"): named("a", "old")})
        self.successResultOf(self.metrics.onUpdate(update))
        return update

    def test_renamed(self) -> None:
        """A renamed service port goes on counting under its new name, whichever name a connection still uses."""
        for _ in range(2):
            self.metrics.opened(pool("a", "old"), ENDPOINT, 0.001)
        self.rename()
        self.assertIsNone(self.opened("a", port="old"))
        self.metrics.closed(pool("a", "old"), ENDPOINT, Outcome("done", 1, 1))
        self.assertEqual(self.active("a", port="new"), 1)
        self.metrics.opened(pool("a", "old"), ENDPOINT, 0.001)
        self.metrics.closed(pool("a", "new"), ENDPOINT, Outcome("done", 1, 1))
        self.metrics.closed(pool("a", "new"), ENDPOINT, Outcome("done", 1, 1))
        self.assertEqual((self.opened("a", port="new"), self.active("a", port="new")), (3, 0))
        self.assertEqual(self.value("kproxy_service_sent_bytes_total", service="a"), 3)

    def test_formerNameIsFreeAgain(self) -> None:
        """Once nothing is open under it, or another service port has it, a former name means what it says."""
        self.metrics.opened(pool("a", "old"), ENDPOINT, 0.001)
        update = self.rename()
        both = mapOf(update.current[named("a", "new")], servicePort("a", "old"))
        self.successResultOf(self.metrics.onUpdate(Update(update.current, both)))
        self.metrics.opened(pool("a", "old"), ENDPOINT, 0.001)
        self.assertEqual((self.opened("a", port="old"), self.opened("a", port="new")), (1, 1))


class StateTests(MetricsCase):
    """What is asked for when somebody asks."""

    def test_sourceAges(self) -> None:
        """Ages come from the sources themselves, at the time of asking; never heard from is infinite."""
        ages: Mapping[str, float | None] = {"Service": 1.5, "EndpointSlice": None}
        source: Any = SimpleNamespace(name="api", ages=lambda: ages, faults=lambda: {"Service": "away"})
        self.metrics.watchSources(lambda: [source])
        name = "kproxy_source_age_seconds"
        self.assertEqual(self.value(name, source="api", kind="Service"), 1.5)
        self.assertEqual(self.value(name, source="api", kind="EndpointSlice"), float("inf"))
        ages = {"Service": 0.5}
        self.assertEqual(self.value(name, source="api", kind="Service"), 0.5)
        self.assertEqual(self.value("kproxy_source_faults", source="api"), 1)

    def test_problems(self) -> None:
        """Problems and unreadable objects are counted by kind, each by themselves."""
        self.metrics.watchQuarantined(lambda: [{"kind": "Node", "key": "n", "reason": "x"}])
        self.metrics.watchProblems(
            lambda: [Problem("Service", "a/b", "x"), Problem("Service", "a/c", "y"), Problem("Node", "n", "z")]
        )
        self.assertEqual(self.value("kproxy_problems", kind="Service"), 2)
        self.assertEqual(self.value("kproxy_problems", kind="Node"), 1)
        self.assertEqual(self.value("kproxy_quarantined_objects", kind="Node"), 1)
        self.assertIsNone(self.value("kproxy_quarantined_objects", kind="Service"))

    def test_refused(self) -> None:
        """Addresses that must not be reached are counted by what they would be, as they are when asked."""
        self.assertIsNone(self.value("kproxy_refused_addresses", what="frontend"))
        refused = {"frontend": 2, "endpoint": 0}
        self.metrics.watchRefused(lambda: refused)
        self.assertEqual(self.value("kproxy_refused_addresses", what="frontend"), 2)
        self.assertEqual(self.value("kproxy_refused_addresses", what="endpoint"), 0)
        refused["endpoint"] = 3
        self.assertEqual(self.value("kproxy_refused_addresses", what="endpoint"), 3)

    def test_loopLag(self) -> None:
        """A timer that runs late shows how late; stopped, it leaves no timer behind."""
        clock = Clock()
        lag = LoopLag(clock, self.metrics.observeLag)
        lag.startService()
        clock.advance(1)
        self.assertEqual(self.value("kproxy_loop_last_lag_seconds"), 0)
        clock.advance(1.25)
        self.assertAlmostEqual(self.value("kproxy_loop_last_lag_seconds") or 0, 0.25)
        self.assertEqual(self.value("kproxy_loop_lag_seconds_count"), 2)
        lag.stopService()
        self.assertEqual(clock.getDelayedCalls(), [])
