"""
What it costs to work out the service map: all of a cluster from scratch, and one change of it.

Usage, in a checkout: ``.venv/bin/python -m benchmarks.resolve [SERVICES ...]`` (1000 5000 10000). Each Service has one
port and a slice of ten endpoints. Nothing but the cluster and the update is measured: no sockets, no rules, no API.

*from scratch*: lists of all Services and slices to the first map. *one change*: a word that exchanges one slice to the
new map and the update that says what differs; *one Service*: the same for a Service that comes and goes. Counted is the
time of the processor, for which the reactor does nothing else. The figures are medians; ``most`` is that of the changes
after which the map is made as a whole again.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core import wire
from twisted_kproxy.core.addresses import canonical, unusable
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import Change, Replaced

ENDPOINTS = 10
KINDS = ("Service", "EndpointSlice", "Node")


def service(number: int, port: int = 80) -> wire.Service:
    """One with a ClusterIP of its own."""
    ip = f"10.{96 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
    meta = {"name": f"s{number}", "namespace": "shop", "uid": f"u{number}", "creationTimestamp": "2026-01-01T00:00:00Z"}
    spec = {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "http", "port": port, "protocol": "TCP"}]}
    it: wire.Service = wire.convert("Service", {"metadata": meta, "spec": spec})
    return it


def slice_(number: int, turn: int = 0) -> wire.EndpointSlice:
    """Its endpoints; those of another turn have one other address."""
    addresses = [f"10.{at}.{number // 250}.{number % 250}" for at in range(ENDPOINTS - 1)]
    addresses.append(f"10.{100 + turn % 100}.{number // 250}.{number % 250}")
    ends = [
        {"addresses": [it], "nodeName": f"n{at}", "conditions": {"ready": True, "serving": True, "terminating": False}}
        for at, it in enumerate(addresses)
    ]
    labels = {"kubernetes.io/service-name": f"s{number}"}
    it: wire.EndpointSlice = wire.convert("EndpointSlice", {
        "metadata": {"name": f"s{number}-abcde", "namespace": "shop", "labels": labels},
        "addressType": "IPv4", "endpoints": ends, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })  # fmt: skip
    return it


def objects(count: int) -> dict[str, dict[str, Any]]:
    """Kind → key → object."""
    every = [*map(service, range(count)), *map(slice_, range(count))]
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for it in every:
        found[type(it).__name__][wire.keyOf(it.metadata)] = it
    return found


def filled(said: dict[str, dict[str, Any]]) -> Cluster:
    """A cluster that was told of these and has resolved them."""
    cluster = Cluster("n0")
    cluster.expect("s", KINDS)
    for kind, those in said.items():
        cluster.say(Replaced("s", kind, those))  # type: ignore[arg-type]
    cluster.current()
    return cluster


def scratch(said: dict[str, dict[str, Any]], times: int) -> list[float]:
    """Processor seconds from two lists to the map."""
    took = []
    for _ in range(times):
        for cached in (canonical, unusable):
            cached.cache_clear()
        gc.collect()
        began = time.process_time()
        filled(said)
        took.append(time.process_time() - began)
    return took


def changes(cluster: Cluster, word: Callable[[int], Change], times: int) -> list[float]:
    """Processor seconds from a word to the update that follows from it."""
    took = []
    before = cluster.current()
    words = [word(turn) for turn in range(1, times + 1)]
    gc.collect()
    for it in words:
        began = time.process_time()
        cluster.say(it)
        after = cluster.current()
        update = Update(before, after)
        took.append(time.process_time() - began)
        assert len(update.changed) + len(update.removed) == 1, update
        before = after
    return took


def row(what: str, took: list[float], of: int) -> float:
    """One line of the table; the median."""
    middle = statistics.median(took)
    least, most = min(took) * 1000, max(took) * 1000
    print(f"{what:<14} {of:7,} {middle * 1000:10.3f} ms   least {least:9.3f} ms   most {most:9.3f} ms", flush=True)
    return middle


def main(counts: list[int]) -> None:
    """Print the table."""
    for count in counts:
        said = objects(count)
        row("from scratch", scratch(said, 5), count)
        cluster = filled(said)
        last, more = count - 1, service(count)

        def exchange(turn: int, last: int = last) -> Change:
            it = slice_(last, turn)
            return Change("s", "EndpointSlice", wire.keyOf(it.metadata), it)

        def comeAndGo(turn: int, more: wire.Service = more) -> Change:
            return Change("s", "Service", wire.keyOf(more.metadata), more if turn % 2 else None)

        row("one change", changes(cluster, exchange, 1100), count)
        row("one Service", changes(cluster, comeAndGo, 1100), count)


if __name__ == "__main__":
    main([int(it) for it in sys.argv[1:]] or [1000, 5000, 10_000])
