"""
How long reading a large cluster holds up the event loop: fake API server (a process of its own) → source → cluster.

Usage, in a checkout: ``.venv/bin/python -m benchmarks.lists [SERVICES [ENDPOINTS]]`` (5000, 3).

Prints, for a streaming list, a plain list and another list of the same, the seconds until all is resolved and the
longest time for which the reactor could do nothing else: a timer that is due every millisecond tells. Beside it stands
the longest pause of Python's garbage collector, which is part of it.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from twisted_kproxy.cluster import Cluster
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.sources.api import ApiSource

ROOT = Path(__file__).resolve().parent.parent


def objects(count: int, endpoints: int) -> dict[str, Any]:
    """That many Services, each with a slice of that many endpoints, as a List."""
    items: list[Any] = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0"}, "spec": {}}]
    for number in range(count):
        name = f"s{number}"
        ip = f"10.{96 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
        items.append({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
            "spec": {
                "clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP", "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            },
        })  # fmt: skip
        items.append({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": f"{name}-abcde", "namespace": "shop", "labels": {"kubernetes.io/service-name": name},
            },
            "endpoints": [
                {
                    "addresses": [f"10.{at % 100}.{number // 250}.{number % 250}"], "nodeName": f"n{at}", "zone": "a",
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "targetRef": {"kind": "Pod", "name": f"{name}-{at}", "namespace": "shop"},
                }
                for at in range(endpoints)
            ],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        })  # fmt: skip
    return {"apiVersion": "v1", "kind": "List", "items": items}


class Stalls:
    """Measures for how long the reactor does nothing but one thing."""

    def __init__(self) -> None:
        self.most = self.collecting = 0.0
        self._last = self._began = 0.0
        self._call = task.LoopingCall(self._tick)
        gc.callbacks.append(self._collected)

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.collecting = max(self.collecting, time.perf_counter() - self._began)

    def _tick(self) -> None:
        now = reactor.seconds()  # type: ignore[attr-defined]
        self.most = max(self.most, now - self._last)
        self._last = now

    def start(self) -> None:
        self.most, self.collecting, self._last = 0.0, 0.0, reactor.seconds()  # type: ignore[attr-defined]
        self._call.start(0.001)

    def stop(self) -> str:
        self._call.stop()
        return f"longest stall {self.most * 1000:6.1f} ms (collecting garbage: {self.collecting * 1000:6.1f} ms)"


async def measure(what: str, url: str, watchList: str) -> None:
    """One source, from its start until all is resolved; then a relist."""
    cluster = Cluster("n0")
    source = ApiSource(
        reactor, "main", ApiOptions("main", server=url, watchList=watchList), cluster, nodeName="n0"
    )
    cluster.expect("main", source.kinds)
    stalls = Stalls()

    async def until(done: Any) -> float:
        gc.collect()
        began = reactor.seconds()  # type: ignore[attr-defined]
        stalls.start()
        while not done() or cluster.catchUp():
            await deferLater(reactor, 0)  # type: ignore[arg-type]
        cluster.current()
        return reactor.seconds() - began  # type: ignore[attr-defined, no-any-return]

    source.startService()
    seconds = await until(lambda: cluster.synced)
    print(f"{what:<20}{seconds:7.3f} s   {stalls.stop()}   {len(cluster.current())} service ports")
    before = cluster.current()
    for reflector in source._reflectors.values():
        reflector.stop()
        reflector._newest = True
        reflector.start()
    lists = {kind: counts["lists"] for kind, counts in source.counters().items()}
    seconds = await until(lambda: all(source.counters()[kind]["lists"] > lists[kind] for kind in lists))
    print(f"{'  the same again':<20}{seconds:7.3f} s   {stalls.stop()}")
    assert cluster.current() is before
    stopped = source.stopService()
    if stopped is not None:
        await stopped


def run(count: int, endpoints: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "objects.json"
        path.write_bytes(msgspec.json.encode(objects(count, endpoints)))
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.apiserver", "--objects", str(path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            print(f"{count} Services, {count} slices of {endpoints} endpoints", flush=True)
            for what, watchList in (("streaming list", "auto"), ("list", "off")):
                # Each in a process of its own: what one leaves behind would be garbage to the other.
                command = [sys.executable, "-m", "benchmarks.lists", "--measure", what, url, watchList]
                subprocess.run(command, cwd=ROOT, check=True, timeout=200)
        finally:
            process.terminate()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        task.react(lambda _: Deferred.fromCoroutine(measure(*sys.argv[2:])))
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 5000, int(sys.argv[2]) if len(sys.argv) > 2 else 3)


if __name__ == "__main__":
    main()
