"""What counting a connection costs, and how long telling 2,000 service ports holds up the reactor."""

from __future__ import annotations

import timeit

from twisted_kproxy.core.values import Endpoint, Outcome, PoolName, ServicePortName
from twisted_kproxy.metrics import Metrics

PORTS = 2000
CALLS = 200_000


def main() -> None:
    metrics = Metrics(maxServicePorts=PORTS)
    endpoint = Endpoint("10.0.0.1", 80)
    outcome = Outcome("done", 1000, 2000)
    pools = [
        PoolName(ServicePortName(f"ns-{n % 20}", f"service-{n}", "http", "TCP", "IPv4"), "cluster")
        for n in range(PORTS)
    ]
    for pool in pools:
        metrics.opened(pool, endpoint, 0.003)
        metrics.failed(pool, "refused")
        metrics.closed(pool, endpoint, outcome)
    pool = pools[PORTS // 2]
    for name, call in (
        ("opened", lambda: metrics.opened(pool, endpoint, 0.003)),
        ("failed", lambda: metrics.failed(pool, "refused")),
        ("closed", lambda: metrics.closed(pool, endpoint, outcome)),
    ):
        print(f"{name:<12} {min(timeit.repeat(call, number=CALLS, repeat=3)) / CALLS * 1e6:8.3f} us")
    for name, accept in (("text", ""), ("openmetrics", "application/openmetrics-text;version=1.0.0")):
        seconds = min(timeit.repeat(lambda accept=accept: metrics.exposition(accept), number=1, repeat=3))  # type: ignore[misc]
        size = len(metrics.exposition(accept)[1])
        print(f"{name:<12} {seconds * 1e3:8.1f} ms for {PORTS} service ports, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
