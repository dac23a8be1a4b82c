"""
How long rules take, and how long they keep the reactor from its other work.

Run as root: ``python benchmarks/rules.py [frontends …]``. Works in a network namespace of its own; each figure is the
median of a few runs. ``late`` is the longest time by which a 2 ms timer of the reactor was late meanwhile.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.shared.namespaces import Namespace
from tests.shared.writers import key, many, same, to
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta
from twisted_kproxy.core.values import Endpoint, Frontend, ServiceMap, ServicePort, ServicePortName
from twisted_kproxy.netfilter.nftables import NftablesWriter
from twisted_kproxy.netfilter.plane import RulePlane


class Lateness:
    """Measures how late a short timer is."""

    TICK = 0.002

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.worst = 0.0
        self.due = 0.0
        self.call: Any = None

    def __enter__(self) -> Lateness:
        self._next()
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()

    def _next(self) -> None:
        self.due = self.reactor.seconds() + self.TICK
        self.call = self.reactor.callLater(self.TICK, self._tick)

    def _tick(self) -> None:
        self.worst = max(self.worst, self.reactor.seconds() - self.due)
        self._next()


async def measure(reactor: Any, name: str, work: Callable[[int], Deferred[Any]], times: int) -> None:
    """Do it so many times and print what it took."""
    took = []
    with Lateness(reactor) as late:
        for n in range(times):
            begun = reactor.seconds()
            await work(n)
            took.append(reactor.seconds() - begun)
    print(f"    {name:<34} {statistics.median(took) * 1e3:9.2f} ms   late {late.worst * 1e3:6.1f} ms")


def services(count: int) -> ServiceMap:
    """Service ports, each with a ClusterIP and a socket."""
    found = {}
    for n in range(count):
        name = ServicePortName("default", f"s{n}", "", "TCP", "IPv4")
        frontend = Frontend("ClusterIP", f"10.{97 + n // 62500}.{n // 250 % 250}.{n % 250 + 1}", 80)
        found[name] = ServicePort(name, "u", (frontend,), (Endpoint("192.0.2.2", 10000 + n % 50000, True, True),))
    return ServiceMap(found)


async def writer(reactor: Any, namespace: Namespace, count: int, useNetlink: bool) -> None:
    """The bare writer."""
    it = NftablesWriter(
        reactor, spawnPrefix=namespace.prefix, openSocket=namespace.socket, useNetlink=useNetlink, limit=120
    )
    await it.cleanup()
    rulesets = many(count), many(count, port=20000)
    print(f"  writer, {count} frontends, elements by {'netlink' if useNetlink else 'nft'}")
    await measure(reactor, "first load, with the structure", lambda n: it.replace(rulesets[0]), 1)
    await measure(reactor, "replace all", lambda n: it.replace(rulesets[(n + 1) % 2]), 3)
    await measure(reactor, "read all back", lambda n: it.adopt(), 3)
    where = key("10.96.9.9", 80)
    await measure(reactor, "one change", lambda n: it.apply(Delta({where: same(to(30000 + n))})), 41)
    await it.cleanup()
    await it.close()


async def plane(reactor: Any, namespace: Namespace, count: int) -> None:
    """The whole way from a service map."""
    it = RulePlane(reactor, NftablesWriter(reactor, spawnPrefix=namespace.prefix, openSocket=namespace.socket))
    await it.start()
    maps = [ServiceMap(), services(count)]
    print(f"  plane, {count} service ports")
    await measure(reactor, "first update", lambda n: it.onUpdate(Update(maps[0], maps[1])), 1)
    await measure(reactor, "full update, nothing to do", lambda n: it.onUpdate(Update(maps[1], maps[1], True)), 3)
    name = next(iter(maps[1]))

    def moved(n: int) -> Deferred[Any]:
        port = maps[-1][name]
        other = ServicePort(name, "u", port.frontends, (Endpoint("192.0.2.2", 60000 + n, True, True),))
        maps.append(ServiceMap({**maps[-1], name: other}))
        return it.onUpdate(Update(maps[-2], maps[-1]))

    await measure(reactor, "one changed (with map and diff)", moved, 21)
    await it.stop(0)


async def main(reactor: Any, *counts: str) -> None:
    namespace = Namespace("bench")
    try:
        for count in [int(it) for it in counts] or [100, 5000, 10000]:
            await writer(reactor, namespace, count, True)
            await writer(reactor, namespace, count, False)
            await plane(reactor, namespace, count)
    finally:
        namespace.delete()


if __name__ == "__main__":
    task.react(lambda reactor, *counts: Deferred.fromCoroutine(main(reactor, *counts)), sys.argv[1:])
