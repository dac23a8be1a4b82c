"""
From a row's objects to rules, by the proxy's own parts: the cluster, the load balancer, the userspace dataplane with
sockets that are none, the rule plane, and the text that each writer makes. Then what becomes of a packet.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from tests.fakes.nfttracer import NftRules
from tests.fakes.tracer import Chain, Packet, trace
from tests.fakes.xttracer import IptablesRules
from tests.shared.proxiers import RecordingObserver
from twisted_kproxy import config
from twisted_kproxy.balance.balancer import LoadBalancer
from twisted_kproxy.balance.policies import RoundRobin
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.configmodel import nodeSettings
from twisted_kproxy.core import wire
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Ruleset
from twisted_kproxy.core.values import (
    FAMILIES,
    KINDS,
    Endpoint,
    Family,
    PoolName,
    Reached,
    Rejected,
    Replaced,
    ServiceMap,
)
from twisted_kproxy.interfaces import IProxier
from twisted_kproxy.netfilter.memory import MemoryWriter
from twisted_kproxy.netfilter.nftlayout import wholeStep
from twisted_kproxy.netfilter.nfttext import stepText, structureText
from twisted_kproxy.netfilter.plane import RulePlane
from twisted_kproxy.netfilter.xtbytes import pack, parse
from twisted_kproxy.netfilter.xtlayout import JUMPS, TABLES, render
from twisted_kproxy.netfilter.xtscript import wholeScript
from twisted_kproxy.netfilter.xttext import textOf
from twisted_kproxy.userspace.dataplane import UserspaceDataplane

from .site import LAN, NODE, Flow, Row, plainNode

#: The addresses that this node has beside the loopback ones.
LOCAL = frozenset({"192.0.2.2", "2001:db8:2::2", "10.244.0.1", "fd00:10:244::1"})
OWN: dict[Family, str] = {"IPv4": LAN[4].format(2), "IPv6": LAN[6].format(2)}


class Wrong(AssertionError):
    """A packet ended where none may."""


@implementer(IProxier)
class NoSocket:
    """A proxier that opens nothing; it has a port."""

    def __init__(self, pool: PoolName, open_: dict[tuple[str, str, int], NoSocket]) -> None:
        self.pool = pool
        self.port = 0
        self._open = open_

    @property
    def _key(self) -> tuple[str, str, int]:
        return self.pool.port.family, self.pool.port.protocol, self.port

    def listen(self, port: int = 0) -> None:
        self.port = port or 40001 + len(self._open)
        self._open[self._key] = self

    def renamed(self, pool: PoolName) -> None:
        self.pool = pool

    def endpointsChanged(self, endpoints: tuple[Endpoint, ...]) -> None:
        """The balancer knows."""

    def stopListening(self) -> None:
        del self._open[self._key]

    def drained(self) -> Deferred[None]:
        return succeed(None)

    def abort(self) -> None:
        """Nothing is open."""

    def status(self) -> Mapping[str, Any]:
        return {"protocol": self.pool.port.protocol, "port": self.port, "active": 0}


def settingsOf(said: Mapping[str, str]) -> config.Config:
    """What keys of ``[kproxy]`` mean, by way of an ini file."""
    keys = "\n".join(f"{key} = {value}" for key, value in {"node-name": NODE, **said}.items())
    with tempfile.NamedTemporaryFile("w", suffix=".ini", encoding="utf-8") as file:
        file.write(f"[kproxy]\n{keys}\n[source:test]\ntype = files\npath = {os.path.dirname(file.name)}\n")
        file.flush()
        return config.load(file.name, writers=("none",), policies=("round-robin",), sourceTypes=())


class Machine:
    """
    The proxy on node n0, with a row's objects and settings.

    :ivar map: the service map.
    :ivar ruleset: what is in force.
    :ivar sockets: family, protocol and port → what listens there.
    """

    def __init__(self, row: Row) -> None:
        loaded = settingsOf(row.settings)
        self._clock = Clock()
        self.cluster = Cluster(NODE, loaded.proxyName, nodeSettings(loaded))
        self._say(list(row.objects))
        self.cluster.say(Reached("test", frozenset(row.servers)))
        self.map = self.cluster.current()
        self.sockets: dict[tuple[str, str, int], NoSocket] = {}
        self.balancer = LoadBalancer(self._clock, RoundRobin)
        self._writer = MemoryWriter()
        self._serve()
        assert self._writer.inForce is not None
        self.ruleset: Ruleset = self._writer.inForce

    def _say(self, objects: list[Mapping[str, Any]]) -> None:
        if not any(it["kind"] == "Node" for it in objects):
            objects.append(plainNode())
        self.cluster.expect("test", KINDS)
        for kind in KINDS:
            found, bad = {}, []
            for it in objects:
                if it["kind"] != kind:
                    continue
                try:
                    value = wire.convert(kind, it)
                    found[wire.keyOf(value.metadata)] = value
                except wire.Unreadable as error:
                    bad.append(Rejected("test", kind, error.key, error.reason))
            self.cluster.say(Replaced("test", kind, found))
            for word in bad:
                self.cluster.say(word)
        assert self.cluster.synced

    def _serve(self) -> None:
        def make(reactor: Any, pool: PoolName, balancer: Any, observer: Any) -> NoSocket:
            return NoSocket(pool, self.sockets)

        plane = UserspaceDataplane(
            self._clock,
            self.balancer,
            RulePlane(self._clock, self._writer),
            makeTcp=make,
            makeUdp=make,
            addressOf=OWN.__getitem__,
            observer=RecordingObserver(),
        )
        update = Update(ServiceMap(), self.map, full=True)
        self._wait(plane.start())
        self._wait(self.balancer.onUpdate(update))
        self._wait(plane.onUpdate(update))

    def _wait(self, it: Deferred[None]) -> None:
        results: list[Any] = []
        it.addBoth(results.append)
        for _ in range(1000):
            if results:
                break
            self._clock.advance(0.01)
        if results != [None]:
            raise Wrong(f"not in force: {results}")

    def endpoints(self, family: Family, protocol: str, port: int) -> frozenset[str]:
        """Whom the socket with that port of this node leads to."""
        socket = self.sockets.get((family, protocol, port))
        if socket is None:
            raise Wrong(f"nobody listens on {port}/{protocol}/{family}")
        return frozenset(str(it) for it in self.balancer.endpoints(socket.pool))

    def answer(self, chains: Iterable[Chain], packet: Packet) -> frozenset[str] | str:
        """
        Where a packet ends: endpoints, or a word.

        :raise Wrong: where it ends where none may.
        """
        dialled = packet.address, packet.port
        fate = trace(list(chains), packet)
        if fate.verdict != "accept":
            return fate.verdict
        if not fate.rewritten:
            if (fate.address, fate.port) != dialled:
                raise Wrong("rewritten unnoticed")
            return "untouched"
        family: Family = "IPv6" if ":" in fate.address else "IPv4"
        if not fate.isHere or fate.address != OWN[family]:
            raise Wrong(f"it is led to {fate.address}")
        return self.endpoints(family, packet.protocol, fate.port)


def packetOf(flow: Flow, settings: Mapping[str, str]) -> Packet:
    """
    The packet that a flow begins with.

    :param settings: of the row; they say how the interfaces of this node's pods are called.
    """
    prefix = settings.get("pod-interface-prefix")
    pods = settings.get("pod-bridge") or (f"{prefix}1a2b3c" if prefix else "cbr")
    four = ":" not in flow.address
    addresses = {
        "pod": ("10.244.0.11" if four else "fd00:10:244::11", pods),
        "other pod": ("10.244.1.10" if four else "fd00:10:244:1::10", "eth0"),
        "node": (OWN["IPv4" if four else "IPv6"], ""),
        "outside": (LAN[4 if four else 6].format(5), "eth0"),
    }
    isPod = flow.source.startswith(("10.244.0.", "fd00:10:244::"))
    source, link = addresses.get(flow.source, (flow.source, pods if isPod else "eth0"))
    if not link and (flow.address in LOCAL or ipaddress.ip_address(flow.address).is_loopback):
        source = flow.address
    return Packet(source, flow.address, flow.port, flow.protocol, link, LOCAL)


# --- what each writer makes of rules ---------------------------------------------------------------------------------


def _nftables(ruleset: Ruleset) -> list[Chain]:
    structure = structureText("kproxy", "0", ruleset.locality.insiderLinks)
    return NftRules(structure + stepText("kproxy", wholeStep(ruleset))).chains()


def _iptables(ruleset: Ruleset) -> list[Chain]:
    return [
        chain
        for family, version in zip(FAMILIES, (4, 6), strict=True)
        for chain in IptablesRules(version, wholeScript(family, ruleset, {})).chains()
    ]


def _pythonIptables(ruleset: Ruleset) -> list[Chain]:
    """The bytes of the entries, read back."""
    chains: list[Chain] = []
    for family, version in zip(FAMILIES, (4, 6), strict=True):
        content = render(ruleset, family, pack)
        lines: list[str] = []
        for table in TABLES:
            own = content.of(table)
            lines += [f"*{table}", *(f":{chain} - [0:0]" for chain in own)]
            for chain, rules in own.items():
                lines += [f"-A {chain} {textOf(parse(family, it))}" for it in rules]
            lines += [
                f"-A {it.hook} {textOf(parse(family, pack(it.entry(family))))}" for it in JUMPS if it.table == table
            ]
            lines.append("COMMIT")
        chains += IptablesRules(version, "\n".join(lines)).chains()
    return chains


WRITERS: dict[str, Callable[[Ruleset], list[Chain]]] = {
    "nftables": _nftables,
    "python-iptables": _pythonIptables,
    "iptables": _iptables,
}


def faults(row: Row, writer: str, machine: Machine | None = None) -> list[str]:
    """What is not as the row says; nothing where all is well."""
    machine = machine or Machine(row)
    chains = WRITERS[writer](machine.ruleset)
    found = []
    for flow in row.flows:
        try:
            answer = machine.answer(chains, packetOf(flow, row.settings))
        except Wrong as error:
            answer = str(error)
        if answer != flow.expected:
            found.append(f"{row}: {flow}: {told(answer)} instead of {told(flow.expected)} ({writer})")
    return found


def told(answer: Any) -> str:
    """An answer in words."""
    return answer if isinstance(answer, str) else ", ".join(sorted(answer))
