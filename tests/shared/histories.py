"""Histories of what sources may say, made to collide: few names, addresses and ports, and every sort of word."""

from __future__ import annotations

from random import Random
from typing import Any, TypeAlias

import msgspec
from hypothesis import strategies as st

from tests.builders import member, node, service, slice_
from tests.shared.desired import Node, Way, desired
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core import wire
from twisted_kproxy.core.values import Change, FrontendKey, Kind, Reached, Rejected, Replaced, ServiceMap, Word

SOURCES = ("a", "b")
KINDS: tuple[Kind, ...] = ("Service", "EndpointSlice", "Node")
Key: TypeAlias = tuple[str, Kind, str]


def someService(rng: Random) -> wire.Service:
    """One of three; it may want what others have."""
    one = rng.choice
    ips = one([["10.96.0.1"], ["10.96.0.2"], ["10.96.0.3"], ["10.96.0.1", "fd00:96::1"], ["fd00:96::1"], ["None"]])
    names, numbers = rng.sample(["http", "dns", ""], 2), rng.sample([80, 81, 82], 2)
    ports = [
        {"name": name, "port": number, "protocol": one(["TCP", "TCP", "UDP"]), "nodePort": one([0, 30001, 30002])}
        for name, number in zip(names, numbers, strict=True)
    ]
    return service(
        one("abc"), clusterIP=ips[0], clusterIPs=ips, ports=ports[: one([1, 2])], uid=one(["u1", "u2"]),
        created=one([None, "2026-01", "2026-02"]),
        externalIPs=one([[], [], ["198.51.100.7"], ["198.51.100.7", "10.96.0.2"], ["2001:db8::7"]]),
        ingress=one([[], [{"ip": "198.51.100.7"}], [{"ip": "203.0.113.9"}]]),
        loadBalancerSourceRanges=one([[], ["10.0.0.0/8"], ["fd00::/8"], ["192.0.2.0/24", "10.0.0.0/8"]]),
        externalTrafficPolicy=one(["Cluster", "Local"]), internalTrafficPolicy=one(["Cluster", "Cluster", "Local"]),
        type=one(["ClusterIP", "LoadBalancer", "LoadBalancer", "ExternalName"]),
        sessionAffinity=one(["None", "ClientIP"]),
    )  # fmt: skip


def someSlice(rng: Random) -> wire.EndpointSlice:
    """One of three, of any of the Services; endpoints move between them, and may be in several, in several states."""
    one = rng.choice
    host = one(["10.1.0.{}", "10.1.0.{}", "10.1.0.{}", "fd00::{}"])
    members = [
        # where a pod runs, and for whom it is, is the same in all slices
        member(
            host.format(n), ready=one([True, True, False, None]), serving=one([True, None, False]),
            terminating=one([False, None, True]), nodeName=("n0", "n1", None, "n0")[n - 1],
            hints=(None, {"forZones": [{"name": "z"}]}, {"forZones": [{"name": "y"}]}, None)[n - 1],
        )
        for n in rng.sample([1, 2, 3, 4], one([0, 1, 2, 3]))
    ]
    http, dns, plain = {"name": "http", "port": 8080}, {"name": "dns", "port": 53}, {"name": "", "port": 7}
    return slice_(
        *members, name=one(["s1", "s2", "s3"]), of=one(["a", "b", "c", None]),
        addressType="IPv6" if "::" in host else "IPv4",
        ports=one([[http, plain], [http, dns | {"protocol": "UDP"}], [dns, plain | {"protocol": "UDP"}], []]),
    )  # fmt: skip


def _someNode(rng: Random) -> wire.Node:
    addresses = rng.choice([[], ["192.0.2.7"], ["10.96.0.3"], ["10.96.0.3", "10.96.0.1"]])
    return node(zone=rng.choice([None, "z", "y"]), addresses=addresses)


def _someServers(rng: Random) -> frozenset[tuple[str, int]]:
    return rng.choice([
        frozenset(), frozenset({("198.51.100.7", 80)}), frozenset({("10.96.0.3", 30001), ("192.0.2.7", 30002)}),
    ])  # fmt: skip


def keyOf(it: Any) -> tuple[Kind, str]:
    """Kind and key of an object."""
    kind: Kind = type(it).__name__
    return kind, wire.keyOf(it.metadata)


def _word(rng: Random) -> Word | Reached:
    source = rng.choice(SOURCES)
    what = rng.choices(["set", "drop", "list", "bad", "reach"], [12, 4, 2, 2, 1])[0]
    if what == "reach":
        return Reached(source, _someServers(rng))
    make = rng.choices([someService, someSlice, _someNode], [10, 10, 2])[0]
    kind, key = keyOf(it := make(rng))
    if what == "list":
        objects = {keyOf(each)[1]: each for each in (it, *(make(rng) for _ in range(rng.randrange(4))))}
        bad = {name: "bad" for name in ("shop/a", "shop/s1", "n0") if rng.random() < 0.2}
        return Replaced(source, kind, {k: v for k, v in objects.items() if k not in bad}, bad)
    if what == "bad":
        return Rejected(source, kind, key, "bad")
    return Change(source, kind, key, it if what == "set" else None)


def _pool(size: int) -> list[Word | Reached]:
    rng = Random(20)
    return [_word(rng) for _ in range(size)]


#: Chosen from a fixed lot: Hypothesis draws one number for each, which is fast, and leaves out one after the other
#: where it looks for the shortest failure. Some are twice among them: equal, but not the same objects.
_LOT = [*_pool(1000), *_pool(200)]


def histories(least: int = 10, most: int = 40) -> st.SearchStrategy[list[Word | Reached]]:
    """So many words of two sources."""
    return st.lists(st.sampled_from(_LOT), min_size=least, max_size=most)


class Told:
    """
    What words come to, in the plainest way.

    :ivar said: source, kind and key → the last good version.
    :ivar rejected: the same → why what came later is none.
    :ivar servers: source → where its server is.
    """

    def __init__(self) -> None:
        self.said: dict[Key, Any] = {}
        self.rejected: dict[Key, str] = {}
        self.servers: dict[str, frozenset[tuple[str, int]]] = {}

    def say(self, word: Word | Reached) -> None:
        if isinstance(word, Reached):
            self.servers[word.source] = word.servers
            return
        if isinstance(word, Replaced):
            mine = [it for it in {**self.said, **self.rejected} if it[:2] == (word.source, word.kind)]
            for it in mine:
                self.rejected.pop(it, None)
                if it[2] not in word.rejected:
                    self.said.pop(it, None)
            self.said.update(((word.source, word.kind, key), it) for key, it in word.objects.items())
            self.rejected.update(((word.source, word.kind, key), why) for key, why in word.rejected.items())
            return
        key = (word.source, word.kind, word.key)
        if isinstance(word, Rejected):
            self.rejected[key] = word.reason
            return
        self.rejected.pop(key, None)
        self.said.pop(key, None)
        if word.object is not None:
            self.said[key] = word.object

    def effective(self, kind: Kind) -> list[Any]:
        """Of each object what the first source says, as JSON would have it."""
        found: dict[str, Any] = {}
        for source in reversed(SOURCES):
            found.update((key[2], it) for key, it in self.said.items() if key[:2] == (source, kind))
        return [msgspec.to_builtins(it) for it in found.values()]

    def desired(self) -> dict[str, Way]:
        """What the oracle says to it."""
        zone, addresses = "", frozenset[str]()
        for it in self.effective("Node"):
            zone = (it["metadata"]["labels"] or {}).get("topology.kubernetes.io/zone", "")
            addresses = frozenset(each["address"] for each in it["status"]["addresses"])
        servers = frozenset[tuple[str, int]]().union(*self.servers.values())
        return desired(self.effective("Service"), self.effective("EndpointSlice"), Node("n0", zone, addresses, servers))

    def fresh(self) -> Cluster:
        """A cluster that was told of nothing but this."""
        cluster = newCluster()
        for source in SOURCES:
            for kind in KINDS:
                mine = {key[2]: it for key, it in self.said.items() if key[:2] == (source, kind)}
                cluster.say(Replaced(source, kind, mine))
                for key, why in self.rejected.items():
                    if key[:2] == (source, kind):
                        cluster.say(Rejected(source, kind, key[2], why))
        for source, servers in self.servers.items():
            cluster.say(Reached(source, servers))
        return cluster


def newCluster() -> Cluster:
    """One that nothing was said to, of two sources."""
    cluster = Cluster("n0")
    for source in SOURCES:
        cluster.expect(source, KINDS)
    return cluster


def synced(cluster: Cluster) -> Cluster:
    """All has been listed: there is nothing."""
    for source in SOURCES:
        for kind in KINDS:
            cluster.say(Replaced(source, kind, {}))
    return cluster


def hostOf(key: FrontendKey) -> str:
    """As the oracle writes it."""
    return f"{key.address or f'node{key.family[-1]}'}:{key.port}/{key.protocol}"


def ways(current: ServiceMap) -> dict[str, Way]:
    """A map as the oracle would write it. Fails where a frontend is in it twice."""
    found: dict[str, Way] = {}
    for port in current.values():
        nobody = "drop" if port.reachable else "reject"
        for frontend in port.frontends:
            outside, inside = (
                frozenset(map(str, port.pool(kind))) or nobody for kind in (frontend.pool, frontend.insidePool)
            )
            host = hostOf(port.key(frontend))
            assert host not in found, f"{host} has two owners"
            found[host] = Way(str(port.name), outside, inside, frontend.sources)
    return found


def seen(cluster: Cluster) -> dict[str, Any]:
    """All that a cluster shows."""
    current = cluster.current()
    return {
        "ports": dict(current), "locality": current.locality, "pending": cluster.pending(),
        "problems": cluster.problems(), "refused": cluster.refused(), "quarantined": cluster.quarantined(),
        "node": cluster.node, "counts": {kind: count for kind, count in cluster.counts().items() if count},
    }  # fmt: skip
