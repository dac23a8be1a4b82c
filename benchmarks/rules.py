"""
What the rule writers cost, beside the programs that they do without; and how long they keep the reactor.

Usage, as root, in a checkout: ``.venv/bin/python -m benchmarks.rules [ROW ...]``. Everything happens in network
namespaces of its own. What is compared is done in turns within one run; figures are medians, and the ratio is the one
to trust on a machine that does other things as well. ``late`` is the longest time by which a 2 ms timer of the reactor
was late; ``machine`` for how long a process that wants nothing but the processor was kept from it meanwhile.
"""

from __future__ import annotations

import gc
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred

from tests.fakes.network import SmallRig
from tests.shared.echo import EchoServers
from tests.shared.flows import plant
from tests.shared.hardships import services
from tests.shared.namespaces import Namespace
from tests.shared.writers import key, many, same
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta, Rule, Ruleset, Target
from twisted_kproxy.core.values import FAMILIES, ServiceMap
from twisted_kproxy.netfilter.conntrack import Flows
from twisted_kproxy.netfilter.iptables import IptablesWriter
from twisted_kproxy.netfilter.iptrestore import RestoreWriter
from twisted_kproxy.netfilter.nftables import NftablesWriter
from twisted_kproxy.netfilter.nftlayout import stepFor, wholeStep
from twisted_kproxy.netfilter.nfttext import stepText
from twisted_kproxy.netfilter.plane import RulePlane
from twisted_kproxy.netfilter.xtscript import editScript, wholeScript
from twisted_kproxy.netfilter.xtsteps import editsOf
from twisted_kproxy.netfilter.xttext import parseSave, textOf

WHERE = key("10.250.9.9", 80)
STEMS = {"IPv4": "iptables-legacy", "IPv6": "ip6tables-legacy"}
Work = Callable[[int], Any]


def row(what: str, ours: float, theirs: float | None = None, beside: str = "", unit: str = "ms") -> None:
    """One line of the table."""
    scale = 1e3 if unit == "ms" else 1e6
    line = f"{what:<58} {ours * scale:9.2f} {unit}"
    if theirs is not None:
        line += f"   {beside} {theirs * scale:9.2f} {unit}   ratio {ours / theirs:6.3f}"
    print(line, flush=True)


async def timed(work: Work, n: int) -> float:
    begun = time.perf_counter()
    done = work(n)
    if isinstance(done, Awaitable):
        await done
    return time.perf_counter() - begun


async def turns(times: int, *works: Work) -> list[float]:
    """The median of each, done in turns."""
    took: list[list[float]] = [[] for _ in works]
    for n in range(times):
        for work, found in zip(works, took, strict=True):
            found.append(await timed(work, n))
    return [statistics.median(it) for it in took]


@contextmanager
def namespaces(*labels: str) -> Any:
    """Namespaces of these names, gone at the end."""
    made = [Namespace(label) for label in labels]
    try:
        yield made
    finally:
        for it in made:
            it.delete()


def nftWriter(reactor: Any, space: Namespace, **options: Any) -> NftablesWriter:
    return NftablesWriter(reactor, spawnPrefix=space.prefix, openSocket=space.socket, limit=120, **options)


def one(n: int) -> Rule:
    return same(Target("192.0.2.2", 30000 + n))


# --- nftables --------------------------------------------------------------------------------------------------------


async def nftChange(reactor: Any) -> None:
    """One change, beside a run of nft; and how that grows."""
    took: dict[int, float] = {}
    with namespaces("mine", "theirs") as (mine, theirs):
        writer, tool = nftWriter(reactor, mine), nftWriter(reactor, theirs)
        for count in (100, 10_000, 100_000):
            ruleset = many(count)
            await writer.replace(ruleset)
            await tool.replace(ruleset)
            before: dict[Any, Rule] = {}

            def byTool(n: int, before: dict[Any, Rule] = before) -> None:
                script = stepText("kproxy", stepFor(Ruleset(before), Delta({WHERE: one(n)})))
                before[WHERE] = one(n)
                subprocess.run([*theirs.prefix, "nft", "-f", "-"], input=script, text=True, check=True)

            ours, others = await turns(31, lambda n: writer.apply(Delta({WHERE: one(n)})), byTool)
            took[count] = ours
            row(f"nftables: one change at {count:,}", ours, others, "nft -f")
        print(f"{'nftables: one change, growth 100 → 100,000':<58} {took[100_000] / took[100]:9.2f} times")
        for it in (writer, tool):
            await it.close()


async def nftSources(reactor: Any) -> None:
    """One change among so many frontends that are not for everybody, with two networks each, beside 10,000 others."""
    for count in (100, 1000, 10_000):
        await nftSourcesAt(reactor, count)


async def nftSourcesAt(reactor: Any, count: int) -> None:
    lead = Target("192.0.2.2", 30000)
    keys = [key(f"203.0.{n // 250}.{n % 250 + 1}", 443) for n in range(count)]
    rules = dict.fromkeys(keys, same(lead, ("10.0.0.0/8", "198.51.100.0/24")))
    others = [same(lead, ("10.0.0.0/8", f"192.0.2.{n}/32")) for n in range(2)]
    with namespaces("mine") as (mine,):
        writer = nftWriter(reactor, mine)
        await writer.replace(Ruleset({**many(10_000).rules, **rules}))
        ofSources, ofOthers = await turns(
            31,
            lambda n: writer.apply(Delta({keys[count // 2]: others[n % 2]})),
            lambda n: writer.apply(Delta({WHERE: one(n)})),
        )
        row(f"nftables: one change of sources, {count:,} restricted", ofSources)
        row(f"nftables: one other change, {count:,} restricted", ofOthers)
        await writer.close()


async def nftFull(reactor: Any) -> None:
    """Everything written anew, beside text for nft."""
    with namespaces("mine", "theirs") as (mine, theirs):
        writer, tool = nftWriter(reactor, mine), nftWriter(reactor, theirs)
        for count, times in ((10_000, 7), (100_000, 3)):
            rulesets = many(count), many(count, 20000)
            await writer.replace(rulesets[1])
            await tool.replace(rulesets[1])

            def byTool(n: int, rulesets: Any = rulesets) -> None:
                script = stepText("kproxy", wholeStep(rulesets[n % 2]))
                subprocess.run([*theirs.prefix, "nft", "-f", "-"], input=script, text=True, check=True)

            ours, others = await turns(times, lambda n, it=rulesets: writer.replace(it[n % 2]), byTool)  # type: ignore[misc]
            row(f"nftables: full write of {count:,}", ours, others, "nft -f")
            loads: list[list[float]] = [[], []]
            for n in range(times):
                await writer.replace(Ruleset())
                await tool.replace(Ruleset())
                loads[0].append(await timed(lambda n, it=rulesets: writer.replace(it[0]), n))  # type: ignore[misc]
                loads[1].append(await timed(byTool, 0))
            row(f"nftables: first write of {count:,}", *map(statistics.median, loads), "nft -f")
            (read,) = await turns(times, lambda n: writer.adopt())
            row(f"nftables: read back {count:,}", read)
        for it in (writer, tool):
            await it.close()


# --- iptables --------------------------------------------------------------------------------------------------------


class Restore:
    """The bare programs, with as much reading as a writer needs that knows nothing."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.state = Ruleset()

    def full(self, ruleset: Ruleset) -> None:
        for family, stem in STEMS.items():
            script = wholeScript(family, ruleset, parseSave(self.space.run(f"{stem}-save")))  # type: ignore[arg-type]
            self.space.run(f"{stem}-restore", "--noflush", "-w", stdin=script)
        self.state = ruleset

    def change(self, delta: Delta) -> None:
        rules = {**self.state.rules, **{k: r for k, r in delta.rules.items() if r is not None}}
        new = Ruleset(rules, self.state.guards, locality=self.state.locality)
        script = editScript(editsOf("IPv4", self.state, new, delta, textOf))
        self.space.run("iptables-legacy-restore", "--noflush", "-w", stdin=script)
        self.state = new


async def iptables(reactor: Any) -> None:
    """Full writes and one change: the library's worker and the restore writer, beside the bare legacy programs."""
    for count in (1000, 10_000):
        await iptablesAt(reactor, count)


async def iptablesAt(reactor: Any, count: int) -> None:
    with namespaces("lib", "res", "nft", "bare") as (lib, res, nft, bare):
        writers: dict[str, Any] = {
            "python-iptables": IptablesWriter(reactor, spawnPrefix=lib.prefix),
            "iptables-legacy": RestoreWriter(reactor, "legacy", spawnPrefix=res.prefix, openSocket=res.socket),
            "iptables-nft": RestoreWriter(reactor, "nft", spawnPrefix=nft.prefix, openSocket=nft.socket),
        }
        theirs = Restore(bare)
        rulesets = many(count), many(count, 20000)
        for it in writers.values():
            await it.probe()
            await it.replace(rulesets[1])
        theirs.full(rulesets[1])
        full: list[Work] = [lambda n, it=it: it.replace(rulesets[n % 2]) for it in writers.values()]  # type: ignore[misc]
        *took, bareFull = await turns(5, *full, lambda n: theirs.full(rulesets[n % 2]))
        for name, seconds in zip(writers, took, strict=True):
            row(f"{name}: full write of {count:,}", seconds, bareFull, "legacy-restore")
        change: list[Work] = [lambda n, it=it: it.apply(Delta({WHERE: one(n)})) for it in writers.values()]  # type: ignore[misc]
        *took, bareOne = await turns(15, *change, lambda n: theirs.change(Delta({WHERE: one(n)})))
        for name, seconds in zip(writers, took, strict=True):
            row(f"{name}: one change at {count:,}", seconds, bareOne, "legacy-restore")
        for it in writers.values():
            await it.close()


# --- data path -------------------------------------------------------------------------------------------------------


async def connect(reactor: Any) -> None:
    """How long connect() takes through ten thousand frontends, beside a hundred; the last frontend of its chain."""
    for name, make in (
        ("nftables", lambda rig: NftablesWriter(reactor, spawnPrefix=rig.argv("n0", ()), openSocket=opener(rig))),
        ("python-iptables", lambda rig: IptablesWriter(reactor, spawnPrefix=rig.argv("n0", ()))),
        ("iptables-nft", lambda rig: RestoreWriter(reactor, "nft", spawnPrefix=rig.argv("n0", ()))),
    ):
        rigs = [SmallRig(), SmallRig()]
        cleanups: list[Callable[[], Any]] = []
        try:
            dials: list[Callable[[], float]] = []
            for rig, count in zip(rigs, (10_000, 100), strict=True):
                servers = EchoServers(lambda family, kind, rig=rig: rig.socketIn("n0", family, kind))  # type: ignore[misc]
                cleanups.append(servers.close)
                port = servers.listen("here", socket.AF_INET, socket.SOCK_STREAM)
                writer = make(rig)  # type: ignore[no-untyped-call]
                rules = {it: rule for it, rule in many(2 * count).rules.items() if it.family == "IPv4"}
                rules[WHERE] = same(Target(rig.address("n0"), port))
                await writer.replace(Ruleset(rules))
                await writer.close()

                def dial(rig: SmallRig = rig) -> float:
                    with rig.socketIn("p0a") as it:
                        it.settimeout(5)
                        begun = time.perf_counter()
                        it.connect((WHERE.address, WHERE.port))
                        took = time.perf_counter() - begun
                        it.recv(100)
                    return took

                dials.append(dial)
            found: list[list[float]] = [[], []]
            for _ in range(400):
                for dialled, collected in zip(dials, found, strict=True):
                    collected.append(dialled())
            large, small = (statistics.median(it) for it in found)
            row(f"{name}: connect() through 10,000 frontends, the last", large, small, "through 100", "us")
        finally:
            for cleanup in cleanups:
                cleanup()
            for rig in rigs:
                rig.close()


def opener(rig: SmallRig) -> Callable[..., socket.socket]:
    def opened(*arguments: int) -> socket.socket:
        with rig.open("n0"):
            return socket.socket(*arguments)

    return opened


# --- lateness --------------------------------------------------------------------------------------------------------

#: Prints for how long it was kept from the processor, where it was.
SPINNER = """
import time
last = time.monotonic()
while True:
    now = time.monotonic()
    if now - last > 0.001:
        print(now - last, flush=True)
    last = now
"""


class Lateness:
    """How late a 2 ms timer of the reactor is."""

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.worst = 0.0

    def __enter__(self) -> Lateness:
        self._next()
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()

    def _next(self) -> None:
        self.due = self.reactor.seconds() + 0.002
        self.call = self.reactor.callLater(0.002, self._tick)

    def _tick(self) -> None:
        self.worst = max(self.worst, self.reactor.seconds() - self.due)
        self._next()


async def lateness(reactor: Any) -> None:
    """The reactor's while ten thousand service ports are written, compared, and written anew."""
    for busy in (0, 2):
        for name in ("nftables", "python-iptables", "iptables-legacy"):
            spinners = [
                subprocess.Popen([sys.executable, "-c", SPINNER], stdout=subprocess.PIPE, text=True)
                for _ in range(busy)
            ]
            said = ""
            maps = ServiceMap(), services(10_000), services(10_000, 25000)
            try:
                with namespaces("late") as (space,), Lateness(reactor) as late:
                    await follow(reactor, writerOf(reactor, name, space), maps)
            finally:
                for it in spinners:
                    it.kill()
                    said += it.communicate()[0]
            what = f"{name}: late at 10,000, {busy} others at work"
            machine = max((float(it) for it in re.findall(r"^0\.\d+$", said, re.M)), default=0.0)
            beside = f"   machine {machine * 1e3:.2f} ms" if busy else ""
            print(f"{what:<58} {late.worst * 1e3:9.2f} ms{beside}", flush=True)


def writerOf(reactor: Any, name: str, space: Namespace) -> Any:
    if name == "nftables":
        return nftWriter(reactor, space)
    if name == "python-iptables":
        return IptablesWriter(reactor, spawnPrefix=space.prefix)
    return RestoreWriter(reactor, "legacy", spawnPrefix=space.prefix, openSocket=space.socket)


async def follow(reactor: Any, writer: Any, maps: Sequence[ServiceMap]) -> None:
    """The plane, from nothing to ten thousand service ports, to ten thousand others; each compared once."""
    plane = RulePlane(reactor, writer)
    await plane.start()
    for before, after in ((0, 1), (1, 1), (1, 2), (2, 2)):
        await plane.onUpdate(Update(maps[before], maps[after], before == after))
    await plane.stop(0)


# --- conntrack -------------------------------------------------------------------------------------------------------


async def flows(reactor: Any) -> None:
    """Two hundred stale flows among a hundred thousand, beside ``conntrack -D``."""
    with namespaces("flows") as (space,):
        chain = "chain c { type filter hook output priority 0; ct state new accept; }"
        space.run("nft", "-f", "-", stdin=f"table inet x {{ {chain}; }}")
        client = [f"10.1.{n // 250 % 250}.{n % 250 + 1}" for n in range(62_500)]
        plant(
            space.socket,
            (
                (client[n % 62_500], 1024 + n // 62_500, f"10.97.{n % 4}.{n // 4 % 250 + 1}", 53, "192.0.2.2", 40000)
                for n in range(100_000)
            ),
        )
        forgetful = Flows(reactor, openSocket=space.socket)
        for count, shown in ((1, "one frontend"), (200, "200 frontends")):
            keys = [key(f"10.96.1.{n + 1}", 53, "UDP") for n in range(count)]

            def stale(keys: Any = keys) -> None:
                flows = ((f"10.2.0.{n + 1}", 2000, keys[n % len(keys)].address, 53, "192.0.2.3", 1) for n in range(200))
                plant(space.socket, flows)

            def byProgram(_n: int, keys: Any = keys) -> None:
                for it in keys[:3]:
                    argv = ["conntrack", "-D", "-p", "udp", "--orig-dst", it.address, "--orig-port-dst", "53"]
                    space.run(*argv, check=False)

            ours, theirs = [], []
            for n in range(3):
                stale()
                ours.append(
                    await timed(lambda _, keys=keys: forgetful.forget({it: frozenset() for it in keys}), n)  # type: ignore[misc]
                )
                stale()
                theirs.append(await timed(byProgram, n) * count / min(count, 3))
                await forgetful.forget({it: frozenset() for it in keys})
            what = f"conntrack: 200 stale flows of 100,000, {shown}"
            row(what, statistics.median(ours), statistics.median(theirs), "conntrack -D")
        await everyFlow(reactor, space, forgetful)


async def everyFlow(reactor: Any, space: Namespace, flows: Flows) -> None:
    """A look at all of a hundred thousand flows to a thousand frontends: none is stale, some are, half of them are."""
    right, wrong = Target("192.0.2.2", 40000), Target("192.0.2.2", 40001)
    where = [f"10.97.{n % 4}.{n // 4 % 250 + 1}" for n in range(1000)]
    led = {key(it, 53, "UDP"): frozenset({right}) for it in where}

    def look(led: Any) -> Work:
        return lambda _n: flows.reconcile(led, [right, wrong])

    def lists(_n: int) -> None:
        space.run("conntrack", "-L", "-p", "udp")

    ours, theirs = await turns(5, look(led), lists)
    row("conntrack: a look at 100,000 flows, none stale", ours, theirs, "conntrack -L")
    with Lateness(reactor) as late:
        await turns(5, look(led))
    print(f"{'conntrack: the reactor is late meanwhile, at most':<58} {late.worst * 1e3:9.2f} ms", flush=True)

    def again(count: int) -> None:
        addresses = ((n % 1000, f"10.{1 + n // 62_500}.{n // 250 % 250}.{n % 250 + 1}") for n in range(count))
        plant(space.socket, ((it, 9000, where[at], 53, "192.0.2.2", 40001) for at, it in addresses))

    def drops(_n: int) -> None:
        space.run("conntrack", "-D", "-p", "udp", "--reply-port-src", "40001", check=False)

    for count in (200, 50_000):
        took: list[list[float]] = [[], []]
        for n in range(3):
            for work, found in zip((look(led), drops), took, strict=True):
                again(count)
                found.append(await timed(work, n))
        what = f"conntrack: a look at 100,000 flows and {count:,} stale ones"
        row(what, *map(statistics.median, took), "conntrack -D")


ROWS = {
    "change": nftChange, "sources": nftSources, "full": nftFull, "iptables": iptables, "connect": connect,
    "lateness": lateness, "flows": flows,
}  # fmt: skip


async def main(reactor: Any, *names: str) -> None:
    assert set(FAMILIES) == set(STEMS)
    gc.collect()
    gc.freeze()  # as the daemon does
    for name in names or ROWS:
        await ROWS[name](reactor)


if __name__ == "__main__":
    task.react(lambda reactor, *names: Deferred.fromCoroutine(main(reactor, *names)), sys.argv[1:])
