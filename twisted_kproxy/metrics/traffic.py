"""
Traffic per service port, counted and told.

All of it happens in one thread, the reactor's, so the counters are plain attributes without locks: counting costs a
fraction of a microsecond. The text is written by hand, since prometheus-client takes ten times as long (0.2 s for 2,000
service ports), and no connection is served while it runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator

from ..core.values import Endpoint, Outcome, ServicePortName

CONNECT_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.0)
REASONS = frozenset(("refused", "timeout", "unreachable", "reset", "no-endpoint", "client-gone", "limit", "error"))
OTHERS = "(others)"
#: endpoints (by reason) of one service port whose failures are counted apart
MOST_ENDPOINTS = 64


class _Traffic:
    """
    The counters of one service port, or of all those that got none of their own.

    :ivar labels: as they stand between the braces.
    :ivar leaving: the service port is gone; so are these numbers once nothing is open.
    """

    __slots__ = ("active", "buckets", "failed", "labels", "leaving", "missed", "opened", "received", "seconds", "sent")

    def __init__(self, labels: str) -> None:
        self.labels = labels
        self.opened = self.active = self.sent = self.received = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(CONNECT_BUCKETS) + 1)
        self.failed: dict[str, int] = {}
        self.missed: dict[tuple[Endpoint | None, str], int] = {}
        self.leaving = False


def _labels(namespace: str, service: str, port: str, protocol: str, family: str) -> str:
    values = {"namespace": namespace, "service": service, "port": port, "protocol": protocol, "ip_family": family}
    return ",".join(
        '{}="{}"'.format(key, value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"'))
        for key, value in values.items()
    )


def _labelsOf(name: ServicePortName) -> str:
    return _labels(name.namespace, name.service, name.port, name.protocol, name.family)


#: name, type, meaning
_TRAFFIC = (
    ("kproxy_service_connections_opened", "counter", "Connections (UDP: flows) established to an endpoint"),
    ("kproxy_service_connections_active", "gauge", "Connections (UDP: flows) that are open now"),
    ("kproxy_service_connections_failed", "counter", "Clients that could not be served"),
    ("kproxy_endpoint_failures", "counter", "Tries at an endpoint that failed; the client may have got another"),
    ("kproxy_service_sent_bytes", "counter", "Bytes from clients to endpoints, counted when a connection ends"),
    ("kproxy_service_received_bytes", "counter", "Bytes from endpoints to clients, counted when a connection ends"),
    ("kproxy_service_connect_seconds", "histogram", "From the client's arrival until an endpoint was connected"),
)


def _text(traffic: Iterable[_Traffic], openMetrics: bool) -> str:
    opened: list[str] = []
    active: list[str] = []
    failed: list[str] = []
    missed: list[str] = []
    sent: list[str] = []
    received: list[str] = []
    connect: list[str] = []
    bounds = [*(repr(bound) for bound in CONNECT_BUCKETS), "+Inf"]
    for it in traffic:
        labels = it.labels
        opened.append(f"kproxy_service_connections_opened_total{{{labels}}} {it.opened}\n")
        active.append(f"kproxy_service_connections_active{{{labels}}} {it.active}\n")
        for reason, count in it.failed.items():
            failed.append(f'kproxy_service_connections_failed_total{{{labels},reason="{reason}"}} {count}\n')
        for (endpoint, reason), count in it.missed.items():
            where = f'{labels},endpoint="{endpoint or OTHERS}",reason="{reason}"'
            missed.append(f"kproxy_endpoint_failures_total{{{where}}} {count}\n")
        sent.append(f"kproxy_service_sent_bytes_total{{{labels}}} {it.sent}\n")
        received.append(f"kproxy_service_received_bytes_total{{{labels}}} {it.received}\n")
        if it.opened:
            total = 0
            for bound, count in zip(bounds, it.buckets, strict=True):
                total += count
                connect.append(f'kproxy_service_connect_seconds_bucket{{{labels},le="{bound}"}} {total}\n')
            connect.append(f"kproxy_service_connect_seconds_count{{{labels}}} {total}\n")
            connect.append(f"kproxy_service_connect_seconds_sum{{{labels}}} {it.seconds!r}\n")
    parts: list[str] = []
    every = (opened, active, failed, missed, sent, received, connect)
    for (name, kind, meaning), lines in zip(_TRAFFIC, every, strict=True):
        shown = f"{name}_total" if kind == "counter" and not openMetrics else name
        parts += f"# HELP {shown} {meaning}\n", f"# TYPE {shown} {kind}\n", *lines
    return "".join(parts)


class TrafficCounters:
    """
    :param limit: so many service ports get numbers of their own, those with traffic first come first served; all
        others are counted together as ``service="(others)"``.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._own = 0
        self._traffic: dict[ServicePortName, _Traffic] = {}
        self._others = _Traffic(_labels("", OTHERS, "", "", ""))
        self._former: dict[ServicePortName, _Traffic] = {}

    def opened(self, name: ServicePortName, seconds: float) -> None:
        """A connection is established, so long after the client came."""
        it = self._traffic.get(name) or self._of(name)
        it.opened += 1
        it.active += 1
        it.seconds += seconds
        it.buckets[bisect_left(CONNECT_BUCKETS, seconds)] += 1

    def failed(self, name: ServicePortName, reason: str) -> None:
        """A client could not be served; an unknown reason counts as ``error``."""
        it = self._traffic.get(name) or self._of(name)
        if reason not in REASONS:
            reason = "error"
        it.failed[reason] = it.failed.get(reason, 0) + 1

    def missed(self, name: ServicePortName, endpoint: Endpoint, reason: str) -> None:
        """A try at an endpoint failed. So many endpoints of a service port are told apart at the most."""
        it = self._traffic.get(name) or self._of(name)
        if reason not in REASONS:
            reason = "error"
        key: tuple[Endpoint | None, str] = (endpoint, reason)
        if it is self._others or (key not in it.missed and len(it.missed) >= MOST_ENDPOINTS):
            key = (None, reason)
        it.missed[key] = it.missed.get(key, 0) + 1

    def serving(self, name: ServicePortName, endpoints: Container[Endpoint]) -> None:
        """A service port has these endpoints now: the failures of others are forgotten."""
        it = self._traffic.get(name)
        if it is not None and it.missed and it is not self._others:
            it.missed = {key: count for key, count in it.missed.items() if key[0] is None or key[0] in endpoints}

    def closed(self, name: ServicePortName, outcome: Outcome) -> None:
        """A connection that was opened has ended."""
        # Unknown by now is only what was opened among the others.
        it = self._traffic.get(name) or self._former.get(name) or self._others
        if it.active > 0:
            it.active -= 1
        it.sent += outcome.sent
        it.received += outcome.received
        if not it.active and (it.leaving or self._former):
            self._settle(it)

    def renamed(self, old: ServicePortName, new: ServicePortName) -> None:
        """The numbers go on under another name; the old one is understood for as long as something is open."""
        it = self._traffic.get(old)
        if it is None or new in self._traffic:
            return
        if it is not self._others:
            it.labels = _labelsOf(new)
        self._traffic[new] = self._traffic.pop(old)
        if it.active:
            self._former[old] = it

    def forget(self, names: Iterable[ServicePortName]) -> None:
        """These are gone; so are their numbers, as soon as nothing is open any more."""
        for name in names:
            it = self._traffic.get(name)
            if it is None:
                continue
            if it.active and it is not self._others:
                it.leaving = True
            else:
                self._drop(name)

    def forgetOthersThan(self, names: Container[ServicePortName]) -> None:
        """Forget every other name, also one that came up again after it was forgotten."""
        self.forget([name for name in self._traffic if name not in names])

    def returned(self, names: Iterable[ServicePortName]) -> None:
        """These are there (again): numbers about to go stay, and a former name is a name again."""
        for name in names:
            self._former.pop(name, None)
            it = self._traffic.get(name)
            if it is not None:
                it.leaving = False

    def text(self, openMetrics: bool = False) -> str:
        """In the Prometheus text format, or in OpenMetrics without its end mark."""
        return _text(self._each(), openMetrics)

    def _of(self, name: ServicePortName) -> _Traffic:
        former = self._former.get(name)
        if former is not None:
            return former
        if self._own < self._limit:
            self._own += 1
            it = _Traffic(_labelsOf(name))
        else:
            it = self._others
        self._traffic[name] = it
        return it

    def _settle(self, it: _Traffic) -> None:
        """Nothing is open any more: let go of what was kept only for that."""
        for name in [name for name, former in self._former.items() if former is it]:
            del self._former[name]
        if it.leaving:
            for name in [name for name, own in self._traffic.items() if own is it]:
                self._drop(name)

    def _drop(self, name: ServicePortName) -> None:
        if self._traffic.pop(name) is not self._others:
            self._own -= 1

    def _each(self) -> Iterator[_Traffic]:
        yield from (it for it in self._traffic.values() if it is not self._others)
        if self._others.opened or self._others.failed or self._others.missed:
            yield self._others
