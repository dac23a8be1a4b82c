"""What is counted beside traffic: UDP flows that are forgotten, health checks of Services that are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .core.values import FAMILIES, Family

#: 1 ms to 16 s, doubling.
LOOK_BUCKETS = tuple(0.001 * 2**k for k in range(15))


class Upkeep(Collector):
    """:param registry: where these are registered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ports: Callable[[], Mapping[tuple[Family, bool], int]] = dict
        self._looks = Histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Time to look for stale UDP flows and to delete them",
            ["ip_family"],
            registry=registry,
            buckets=LOOK_BUCKETS,
        )
        self._deleted = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries_total",
            "UDP flows that were led astray and have been deleted",
            ["ip_family"],
            registry=registry,
        )
        self._answers = Counter(
            "kproxy_service_health_checks_total",
            "Answers on the health-check ports of Services",
            ["code"],
            registry=registry,
        )
        for family in FAMILIES:
            self._looks.labels(family)
            self._deleted.labels(family)
        for code in (200, 503):
            self._answers.labels(code)
        registry.register(self)

    def looked(self, family: Family, seconds: float, deleted: int) -> None:
        """Stale flows were looked for; so many were deleted."""
        self._looks.labels(family).observe(seconds)
        self._deleted.labels(family).inc(deleted)

    def answered(self, code: int) -> None:
        """A health check of a Service was answered with that HTTP status."""
        self._answers.labels(code).inc()

    def watchPorts(self, counts: Callable[[], Mapping[tuple[Family, bool], int]]) -> None:
        """Report these from now on: how many health-check ports there are, by family and whether they could be had."""
        self._ports = counts

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        gauge = self._family()
        for (family, listening), count in self._ports().items():
            gauge.add_metric([family, "true" if listening else "false"], count)
        return [gauge]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "kproxy_health_check_ports",
            "Health-check ports of Services; listening is false for those that could not be had",
            labels=["ip_family", "listening"],
        )
