"""
What the daemon counts, in the words of Prometheus.

Where kube-proxy has a metric, it has the same name, labels and buckets here (``kubeproxy_…``, kubernetes
``pkg/proxy/metrics``), so that dashboards and alerts go on working; what only this proxy can tell is ``kproxy_…``.

Timestamps in metrics, and the age of a change that a controller stamped elsewhere, are the only numbers here that come
from the wall clock: they are compared with other machines' clocks, and nothing in the daemon ever reads them back.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from .. import __version__
from ..core.changes import Update
from ..core.values import (
    FAMILIES,
    Change,
    Endpoint,
    Family,
    Outcome,
    PoolName,
    Problem,
    Reached,
    Replaced,
    ServicePort,
    ServicePortName,
    Word,
)
from ..core.wire import CHANGE_TRIGGER_ANNOTATION, EndpointSlice
from ..interfaces import IChannel, ISource, ITrafficObserver, IUpdateListener
from .traffic import TrafficCounters
from .upkeep import Upkeep

#: 1 ms to 16 s, doubling.
SYNC_BUCKETS = tuple(0.001 * 2**k for k in range(15))
PROGRAMMING_BUCKETS = (0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
#: a daemon that cannot sync must not gather these without end
MAX_TRIGGERS = 10_000
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


# No series says since when it is counted: the process's own start time does, and the rest would be half as much again.
disable_created_metrics()  # type: ignore[no-untyped-call]


class _StateCollector(Collector):
    """Asks sources and quarantine for their state when somebody asks for metrics."""

    def __init__(self) -> None:
        self.sources: Callable[[], Iterable[ISource]] = tuple
        self.problems: Callable[[], Iterable[Problem]] = tuple
        self.quarantined: Callable[[], Iterable[Mapping[str, str]]] = tuple
        self.refused: Callable[[], Mapping[str, int]] = dict

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        families = age, faults, quarantined, problems, refused = self._families()
        for source in self.sources():
            faults.add_metric([source.name], len(source.faults()))
            for kind, seconds in source.ages().items():
                age.add_metric([source.name, kind], float("inf") if seconds is None else seconds)
        for name, count in Tally(it["kind"] for it in self.quarantined()).items():
            quarantined.add_metric([name], count)
        for kind, count in Tally(problem.kind for problem in self.problems()).items():
            problems.add_metric([kind], count)
        for what, count in self.refused().items():
            refused.add_metric([what], count)
        return families

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, ...]:
        return (
            GaugeMetricFamily(
                "kproxy_source_age_seconds",
                "Since the source was last known to agree with what it was told of; +Inf: never yet",
                labels=["source", "kind"],
            ),
            GaugeMetricFamily(
                "kproxy_source_faults",
                "Files, parts of files, or kinds of objects, that a source cannot read now",
                labels=["source"],
            ),
            GaugeMetricFamily(
                "kproxy_quarantined_objects",
                "Objects that cannot be read; the last good version of each stays in force",
                labels=["kind"],
            ),
            GaugeMetricFamily("kproxy_problems", "Things in objects that are not served", labels=["kind"]),
            GaugeMetricFamily(
                "kproxy_refused_addresses",
                "Addresses in objects that must not be reached, and are not: see problems in /status",
                labels=["what"],
            ),
        )


@implementer(ITrafficObserver, IUpdateListener)
class Metrics:
    """
    Every metric of the daemon, in a registry of its own.

    As an update listener it stands before the dataplane: a renamed service port keeps its numbers that way.

    :param registry: to add to; by default a new one. Never the library's global one.
    :param families: the IP families that are served.
    :param maxServicePorts: so many service ports get numbers of their own, those with traffic first come first served;
        all others are counted together as ``service="(others)"``. At 13 lines each, 2,000 make 26,000 lines.
    :param wallClock: seconds since 1970, for timestamps.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        families: Iterable[Family] = FAMILIES,
        maxServicePorts: int = 2000,
        wallClock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._families = tuple(families)
        self._wallClock = wallClock
        self.upkeep = Upkeep(self.registry)
        self._traffic = TrafficCounters(maxServicePorts)
        self._noLocal: dict[tuple[Family, str], set[ServicePortName]] = {
            (family, policy): set() for family in FAMILIES for policy in ("internal", "external")
        }
        self._state = _StateCollector()
        self._pending = [0, 0]
        self._taken = [0, 0]
        self._started = wallClock()
        self._triggers: list[tuple[Family, float]] = []
        self._triggersTaken = 0
        self._makeMetrics()

    def _makeMetrics(self) -> None:
        at = self.registry
        family = ["ip_family"]
        rules = "kubeproxy_sync_proxy_rules_"
        self._sync = Histogram(
            f"{rules}duration_seconds", "Time to bring changes into force", family, registry=at, buckets=SYNC_BUCKETS
        )
        self._fullSync = Histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "Time of syncs that compared everything with the kernel",
            family,
            registry=at,
            buckets=SYNC_BUCKETS,
        )
        self._lastSync = Gauge(f"{rules}last_timestamp_seconds", "When a sync last succeeded", family, registry=at)
        self._lastQueued = Gauge(
            f"{rules}last_queued_timestamp_seconds", "When a sync was last asked for", family, registry=at
        )
        self._programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of a pod or service until it was in force here; two clocks are involved",
            family,
            registry=at,
            buckets=PROGRAMMING_BUCKETS,
        )
        self._servicesPending = Gauge(
            f"{rules}service_changes_pending", "Service changes not yet in force", registry=at
        )
        self._endpointsPending = Gauge(
            f"{rules}endpoint_changes_pending", "Endpoint changes not yet in force", registry=at
        )
        self._servicesTotal = Counter(f"{rules}service_changes_total", "Service changes heard of", registry=at)
        self._endpointsTotal = Counter(f"{rules}endpoint_changes_total", "Endpoint changes heard of", registry=at)
        self._noLocalTotal = Gauge(
            f"{rules}no_local_endpoints_total",
            "Service ports whose traffic policy is Local and that have endpoints, but none on this node",
            ["ip_family", "traffic_policy"],
            registry=at,
        )
        self._healthAnswers = {
            page: Counter(f"kubeproxy_proxy_{page}_total", f"Answers of /{page}", ["code"], registry=at)
            for page in ("healthz", "livez")
        }
        self._syncFailures = Counter(
            "kproxy_sync_failures_total", "Syncs that failed; each is tried again", registry=at
        )
        self._lag = Histogram(
            "kproxy_loop_lag_seconds", "How late the event loop ran a timer", registry=at, buckets=LAG_BUCKETS
        )
        self._lagNow = Gauge("kproxy_loop_last_lag_seconds", "How late the event loop ran its last timer", registry=at)
        build = Gauge("kproxy_build_info", "Always 1; the version is a label", ["version"], registry=at)
        build.labels(__version__).set(1)
        for it in self._families:
            for metric in (self._sync, self._fullSync, self._lastSync, self._lastQueued, self._programming):
                metric.labels(it)
            for policy in ("internal", "external"):
                self._noLocalTotal.labels(it, policy)
        at.register(self._state)
        ProcessCollector(registry=at)
        GCCollector(registry=at)

    # --- for /metrics

    def exposition(self, accept: str = "") -> tuple[str, bytes]:
        """
        Everything as text.

        :param accept: the HTTP ``Accept`` header: OpenMetrics for who asks for it.
        :return: content type and body.
        """
        encode, contentType = choose_encoder(accept)
        openMetrics = contentType.startswith("application/openmetrics-text")
        body = encode(self.registry)
        end = b"# EOF\n" if openMetrics else b""
        return contentType, body.removesuffix(end) + self._traffic.text(openMetrics).encode() + end

    def watchSources(self, sources: Callable[[], Iterable[ISource]]) -> None:
        """Report the ages of these from now on."""
        self._state.sources = sources

    def watchProblems(self, problems: Callable[[], Iterable[Problem]]) -> None:
        """Report the number of these from now on: things in objects that are not served."""
        self._state.problems = problems

    def watchRefused(self, refused: Callable[[], Mapping[str, int]]) -> None:
        """Report these numbers from now on: how many addresses must not be reached, by what they would be."""
        self._state.refused = refused

    def watchQuarantined(self, quarantined: Callable[[], Iterable[Mapping[str, str]]]) -> None:
        """Report the number of these from now on: objects that cannot be read, each with its ``kind``."""
        self._state.quarantined = quarantined

    # --- syncs

    def queued(self, services: int = 0, endpoints: int = 0) -> None:
        """So many changes were heard of and wait for a sync."""
        self._servicesTotal.inc(services)
        self._endpointsTotal.inc(endpoints)
        self._pending[0] += services
        self._pending[1] += endpoints
        self._showPending()
        now = self._wallClock()
        for family in self._families:
            self._lastQueued.labels(family).set(now)

    def counting(self, channel: IChannel) -> IChannel:
        """A channel that counts what is said, and passes it on to another."""
        return _CountingChannel(channel, self)

    def began(self) -> None:
        """A sync begins, with all that waits; what comes from now on waits for the next."""
        self._taken = list(self._pending)
        self._triggersTaken = len(self._triggers)

    def applied(self, seconds: float, full: bool = False) -> None:
        """
        A sync has succeeded.

        :param seconds: how long it took.
        :param full: it compared everything with the kernel.
        """
        self._pending = [max(0, pending - taken) for pending, taken in zip(self._pending, self._taken, strict=True)]
        self._taken = [0, 0]
        self._showPending()
        now = self._wallClock()
        for family in self._families:
            self._sync.labels(family).observe(seconds)
            if full:
                self._fullSync.labels(family).observe(seconds)
            self._lastSync.labels(family).set(now)
        for family, triggered in self._triggers[: self._triggersTaken]:
            self.observeProgramming(now - triggered, family)
        del self._triggers[: self._triggersTaken]
        self._triggersTaken = 0

    def syncFailed(self) -> None:
        """A sync has failed; what it was to bring still waits."""
        self._syncFailures.inc()
        self._taken = [0, 0]
        self._triggersTaken = 0

    def triggered(self, text: str, family: Family) -> None:
        """
        A change was heard of that happened in the cluster at that time (RFC 3339); once it is in force, what lies
        between is observed. What happened before the start says nothing about this proxy, and is left out.
        """
        try:
            at = datetime.fromisoformat(text).timestamp()
        except ValueError:
            return
        if at >= self._started and len(self._triggers) < MAX_TRIGGERS:
            self._triggers.append((family, at))

    def observeProgramming(self, seconds: float, family: Family = "IPv4") -> None:
        """
        A change is in force, so long after it happened in the cluster
        (``endpoints.kubernetes.io/last-change-trigger-time``). A negative time, of clocks that differ, counts as 0.
        """
        self._programming.labels(family).observe(max(0.0, seconds))

    def _showPending(self) -> None:
        self._servicesPending.set(self._pending[0])
        self._endpointsPending.set(self._pending[1])

    # --- pages and the loop

    def healthAnswered(self, page: str, code: int) -> None:
        """``healthz`` or ``livez`` was answered with that HTTP status."""
        self._healthAnswers[page].labels(code).inc()

    def observeLag(self, seconds: float) -> None:
        """The event loop ran a timer so much later than it was due."""
        self._lag.observe(seconds)
        self._lagNow.set(seconds)

    # --- ITrafficObserver: called for each connection

    def opened(self, pool: PoolName, endpoint: Endpoint, seconds: float) -> None:
        self._traffic.opened(pool.port, seconds)

    def missed(self, pool: PoolName, endpoint: Endpoint, reason: str) -> None:
        self._traffic.missed(pool.port, endpoint, reason)

    def failed(self, pool: PoolName, reason: str) -> None:
        self._traffic.failed(pool.port, reason)

    def closed(self, pool: PoolName, endpoint: Endpoint, outcome: Outcome) -> None:
        self._traffic.closed(pool.port, outcome)

    # --- IUpdateListener

    def onUpdate(self, update: Update) -> Deferred[None]:
        """Follow names: drop the numbers of what is gone, carry over those of what was renamed."""
        for new, old in update.renamed.items():
            self._traffic.renamed(old, new)
        if update.removed or update.full:
            self._traffic.forgetOthersThan(update.current)
        self._traffic.returned(update.changed)
        for name in update.changed:
            port = update.current[name]
            self._traffic.serving(name, {*port.cluster, *port.local})
        self._countNoLocal(update)
        return succeed(None)

    def forget(self, names: Iterable[ServicePortName]) -> None:
        """These service ports are gone: so are their numbers, as soon as their last connection has ended."""
        self._traffic.forget(names)

    def _countNoLocal(self, update: Update) -> None:
        touched: Iterable[ServicePortName] = update.changed | update.removed
        if update.full:
            touched = update.current.keys()
            for names in self._noLocal.values():
                names.clear()
        for name in touched:
            port = update.current.get(name)
            for policy in ("internal", "external"):
                names = self._noLocal[name.family, policy]
                if port is not None and policy in _starved(port):
                    names.add(name)
                else:
                    names.discard(name)
        for family in self._families:
            for policy in ("internal", "external"):
                self._noLocalTotal.labels(family, policy).set(len(self._noLocal[family, policy]))


@implementer(IChannel)
class _CountingChannel:
    def __init__(self, channel: IChannel, metrics: Metrics) -> None:
        self._channel = channel
        self._metrics = metrics

    def say(self, word: Word | Reached) -> None:
        if isinstance(word, Reached):
            self._channel.say(word)
            return
        count = len(word.objects) if isinstance(word, Replaced) else 1
        if word.kind == "Service":
            self._metrics.queued(services=count)
        elif word.kind in ("EndpointSlice", "Endpoints"):
            self._metrics.queued(endpoints=count)
        if isinstance(word, Change) and isinstance(word.object, EndpointSlice):
            trigger = (word.object.metadata.annotations or {}).get(CHANGE_TRIGGER_ANNOTATION)
            if trigger:
                self._metrics.triggered(trigger, "IPv6" if word.object.addressType == "IPv6" else "IPv4")
        self._channel.say(word)


def _starved(port: ServicePort) -> set[str]:
    """Which traffic policies of a service port lead to no endpoint on this node although there are some elsewhere."""
    if port.local or not port.reachable:
        return set()
    return {
        "internal" if frontend.kind == "ClusterIP" else "external"
        for frontend in port.frontends
        if frontend.pool == "local"
    }
