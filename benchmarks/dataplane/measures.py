"""
What is measured. Each measurement of a contestant gives figures by name; those that count processor time divide that of
the proxy alone, all its processes and threads, by what went through it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tests.fakes.network import waitFor

from .contestants import MANIES, Contestant, Way
from .machine import family, memory, processorTime, realTime

Figures: TypeAlias = dict[str, float]
#: how: the contestant, and for how many seconds
Measure: TypeAlias = Callable[[Contestant, float], Figures]

CONNECTIONS = 64
#: requests per second of the latency measurement
RATE = 3000
IDLE = 5000
#: sockets, datagrams at a time, such trains on their way, size
SINGLE = (16, 1, 16, 64)
TRAIN = (8, 16, 2, 1200)
#: name of a figure → its unit, and whether more is better
FIGURES: dict[str, tuple[str, bool]] = {
    "requests": ("/s", True),
    "requests cpu": ("us", False),
    "connections": ("/s", True),
    "connections cpu": ("us", False),
    "down 1": ("Gbit/s", True),
    "down 8": ("Gbit/s", True),
    "up 1": ("Gbit/s", True),
    "up 8": ("Gbit/s", True),
    "down 1 cpu": ("us/MB", False),
    "up 1 cpu": ("us/MB", False),
    "p50": ("us", False),
    "p99": ("us", False),
    "p99.9": ("us", False),
    "idle": ("KiB", False),
    "idle again": ("KiB", False),
    "base": ("MiB", False),
    "udp": ("/s", True),
    "udp cpu": ("us", False),
    "udp trains": ("/s", True),
    "udp trains cpu": ("us", False),
}


def _client(it: Contestant, argv: Sequence[str], seconds: float) -> str:
    return it.rig.run("x", argv, timeout=seconds + 15).stdout


def _load(it: Contestant, word: str, way: Way, *options: object, before: Sequence[str] = (), seconds: float) -> str:
    host, port = it.target(way)
    return _client(it, [it.rig.load, word, *before, host, str(port), *map(str, options)], seconds)


def _wrk(it: Contestant, seconds: float, *options: str) -> tuple[float, float]:
    """Requests per second, and the proxy's microseconds per request."""
    host, port = it.target("web")
    before = processorTime(it.pids)
    argv = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", *options, f"http://{host}:{port}/"]
    said = _client(it, argv, seconds)
    spent = processorTime(it.pids) - before
    count, rate = re.search(r"(\d+) requests in", said), re.search(r"Requests/sec:\s+([\d.]+)", said)
    if count is None or rate is None or not int(count[1]):
        raise RuntimeError(f"wrk against {it.name} said: {said}")
    trouble = re.search(r"Socket errors: .*", said)
    if trouble is not None and not re.search(r"connect 0, read \d+, write 0, timeout 0", trouble[0]):
        print(f"    {it.name}: {trouble[0]}", flush=True)
    return float(rate[1]), spent / int(count[1]) * 1e6


def _withCpu(name: str, it: Contestant, rate: float, cpu: float) -> Figures:
    return {name: rate, **({f"{name} cpu": cpu} if it.pids else {})}


def requests(it: Contestant, seconds: float) -> Figures:
    """Requests per second over connections that are kept."""
    return _withCpu("requests", it, *_wrk(it, seconds))


def connections(it: Contestant, seconds: float) -> Figures:
    """New connections per second, one request each."""
    return _withCpu("connections", it, *_wrk(it, seconds, "-H", "Connection: close"))


def bulk(it: Contestant, seconds: float) -> Figures:
    """One stream and eight, each way."""
    found: Figures = {}
    for word in ("down", "up"):
        for streams in (1, 8):
            before = processorTime(it.pids)
            said = _load(it, "bulk", "bulk", streams, seconds, before=[word], seconds=seconds)
            spent = processorTime(it.pids) - before
            total, took = map(float, said.split())
            found[f"{word} {streams}"] = total * 8 / took / 1e9
            if streams == 1 and it.pids:
                found[f"{word} 1 cpu"] = spent / (total / 1e6) * 1e6
    return found


def latency(it: Contestant, seconds: float) -> Figures:
    """At a fixed rate, from the moment when each request was due; client, proxy and server before all others."""
    servers = [*it.pids, *family(it.rig.web.pid)]
    host, port = it.target("web")
    # The client begins in this class of scheduling, and so needs no time to be found.
    argv = ["chrt", "-r", "1", it.rig.load, "open", host, str(port), str(CONNECTIONS), str(RATE), str(seconds)]
    with realTime(servers):
        took = sorted(map(int, _client(it, argv, seconds).split()))
    return {f"p{share:g}": float(took[int(len(took) * share / 100)]) for share in (50, 99, 99.9)}


def idle(it: Contestant, seconds: float) -> Figures:
    """What the proxy's memory grows by per idle connection, each served once; and again after all were closed."""
    found: Figures = {}
    base, sockets = memory(it.pids), _sockets(it)
    host, port = it.target("web")
    argv = [it.rig.load, "hold", host, str(port), str(IDLE)]
    for name in ("idle", "idle again"):
        holder = it.rig.spawn("x", argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            line = holder.stdout.readline()  # type: ignore[union-attr]
            if line.strip() != f"held {IDLE}":
                raise RuntimeError(f"{it.name} does not hold {IDLE} connections: {line!r}")
            found[name] = (memory(it.pids) - base) / 1024 / IDLE
        finally:
            holder.stdin.close()  # type: ignore[union-attr]
            holder.wait(20)
            it.rig.stop(holder)
        waitFor(lambda: _sockets(it) < sockets + IDLE // 10, 20)
    found["base"] = base / (1 << 20)
    return found


def _sockets(it: Contestant) -> int:
    """How many TCP sockets the node has, that no clean-up of the kernel waits for."""
    said = it.rig.run("n0", ["cat", "/proc/net/sockstat"]).stdout
    return int(re.search(r"TCP: inuse (\d+)", said)[1])  # type: ignore[index]


def datagrams(it: Contestant, seconds: float) -> Figures:
    """Replies per second to single datagrams, and to trains that senders hand over in one call."""
    found: Figures = {}
    for name, options in (("udp", SINGLE), ("udp trains", TRAIN)):
        before = processorTime(it.pids)
        count, took = map(float, _load(it, "datagrams", "udp", *options, seconds, seconds=seconds).split())
        spent = processorTime(it.pids) - before
        found.update(_withCpu(name, it, count / took, spent / max(1, count) * 1e6))
    return found


#: name → how, seconds by default, whether it takes turns (or is done once), who takes part. In this order: new
#: connections come last, because a minute later the kernel frees what is left of all of them at once, which keeps a
#: processor busy for 20 ms. That must not be while latency is measured.
MEASURES: dict[str, tuple[Measure, float, bool, Callable[[Contestant], bool]]] = {
    "latency": (latency, 1.5, True, lambda it: True),
    "requests": (requests, 1, True, lambda it: True),
    "bulk": (bulk, 0.6, True, lambda it: True),
    "datagrams": (datagrams, 0.6, True, lambda it: it.udp and it.name not in _SAME_UDP),
    "connections": (connections, 1, True, lambda it: True),
    "idle": (idle, 0, False, lambda it: bool(it.pids) and it.name not in _SAME_IDLE),
}
#: what differs from another one in nothing that this measures
_SAME_UDP = frozenset({"nginx 64k", "kproxy thread", "kproxy workers", "kproxy protocol"})
_SAME_IDLE = frozenset({"haproxy 2", "haproxy splice", "nginx 64k", "kproxy thread", *MANIES})
