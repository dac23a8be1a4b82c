"""Tests of twisted_kproxy.core.flows."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import portName, servicePort
from twisted_kproxy.core.flows import Decision, Flow, Frontends, decide
from twisted_kproxy.core.values import Endpoint, Frontend, Locality, ServiceMap, ServicePort

POD, NODE, OUTSIDE = "10.244.0.5", "192.0.2.7", "203.0.113.9"
HERE, ELSEWHERE = Endpoint("10.244.0.9", 8080, isLocal=True), Endpoint("10.244.3.4", 8080)
LOCALITY = Locality(insiders=("10.244.0.0/24", "fd00::/64"), services=("10.96.0.0/16",))
#: a way to dial the Service → where that leads, by the frontends that :func:`port` makes
DIALLED = {
    "cluster": ("10.96.0.10", 80),
    "node": (NODE, 30080),
    "external": ("198.51.100.1", 80),
    "balancer": ("198.51.100.2", 80),
}


def port(internal: Any = "cluster", external: Any = "cluster", sources: Any = None, **fields: Any) -> ServicePort:
    """A service port with a frontend of each kind."""
    fields.setdefault("cluster", (HERE, ELSEWHERE))
    fields.setdefault("local", (HERE,))
    frontends = (
        Frontend("ClusterIP", "10.96.0.10", 80, internal, internal),
        Frontend("ExternalIP", "198.51.100.1", 80, external, "cluster"),
        Frontend("LoadBalancer", "198.51.100.2", 80, external, "cluster", sources),
        Frontend("NodePort", None, 30080, external, "cluster"),
    )
    return servicePort(frontends=frontends, **fields)


def ask(it: ServicePort, source: str, way: str, locality: Locality = LOCALITY, **fields: Any) -> Decision:
    address, number = DIALLED[way]
    masqueradeAll = fields.pop("masqueradeAll", False)
    flow = Flow(source, address, number, **fields)
    return decide(Frontends(ServiceMap({it.name: it}, locality=locality)), {NODE}, flow, masqueradeAll)


class PoolTests(SynchronousTestCase):
    """Which pool, and what is done about an empty one."""

    def check(self, it: ServicePort, expected: dict[tuple[str, str], str], locality: Locality = LOCALITY) -> None:
        """:param expected: (source, way) → pool and verdict."""
        for (source, way), words in expected.items():
            found = ask(it, source, way, locality)
            self.assertEqual(f"{found.pool} {found.verdict}", words, (source, way))
            self.assertEqual(bool(found.endpoints), found.verdict == "endpoints")
            self.assertEqual((found.hit, found.owner), ("service", it.name))

    def test_clusterPolicies(self) -> None:
        """With both policies Cluster everybody meets every endpoint, whatever is dialled."""
        ways = {(source, way): "cluster endpoints" for source in (POD, NODE, OUTSIDE) for way in DIALLED}
        self.check(port(), ways)

    def test_externalLocal(self) -> None:
        """External addresses serve outsiders by endpoints of this node; pods and the node itself meet every one."""
        expected = {(OUTSIDE, way): "local endpoints" for way in ("node", "external", "balancer")}
        expected |= {(source, way): "cluster endpoints" for source in (POD, NODE) for way in DIALLED}
        expected[OUTSIDE, "cluster"] = "cluster endpoints"
        self.check(port(external="local"), expected)

    def test_internalLocal(self) -> None:
        """A ClusterIP under internalTrafficPolicy Local serves everybody by endpoints of this node."""
        expected = {(source, "cluster"): "local endpoints" for source in (POD, NODE, OUTSIDE)}
        expected |= {(source, "node"): "cluster endpoints" for source in (POD, NODE, OUTSIDE)}
        self.check(port(internal="local"), expected)

    def test_emptyLocalPool(self) -> None:
        """Where endpoints exist, but none that may be used, packets are dropped; insiders are served."""
        it = port(internal="local", external="local", local=(), cluster=(ELSEWHERE,))
        self.check(it, {
            (OUTSIDE, "node"): "local drop",
            (OUTSIDE, "balancer"): "local drop",
            (POD, "node"): "cluster endpoints",
            (NODE, "external"): "cluster endpoints",
            (POD, "cluster"): "local drop",
        })

    def test_nothingAnywhere(self) -> None:
        """Without any endpoint everybody is refused, under whichever policy."""
        it = port(external="local", cluster=(), local=(), reachable=False)
        self.check(it, {
            (POD, "cluster"): "cluster reject",
            (OUTSIDE, "node"): "local reject",
            (POD, "balancer"): "cluster reject",
        })

    def test_podsUnknown(self) -> None:
        """Where pods cannot be told from others they count as outside."""
        self.check(port(external="local"), {(POD, "node"): "local endpoints"}, Locality())


class OriginTests(SynchronousTestCase):
    """Who is inside, and why."""

    def check(self, locality: Locality, source: str, expected: tuple[bool, str], **fields: Any) -> None:
        origin = ask(port(), source, "cluster", locality, **fields).origin
        self.assertEqual((origin.isInside, origin.why), expected)

    def test_network(self) -> None:
        """A pod is known by its network."""
        self.check(LOCALITY, POD, (True, f"{POD} is in 10.244.0.0/24, a pod network"))
        self.check(LOCALITY, OUTSIDE, (False, f"{OUTSIDE} is in no pod network"))

    def test_interface(self) -> None:
        """A pod is known by its interface, by name or by how its name begins."""
        bridge, prefix = Locality(insiderLinks=("cni0",)), Locality(insiderLinks=("veth*",))
        self.check(bridge, POD, (True, "cni0 is an interface of pods (cni0)"), link="cni0")
        self.check(bridge, POD, (False, "cni01 is no interface of pods"), link="cni01")
        self.check(prefix, POD, (True, "veth12 is an interface of pods (veth*)"), link="veth12")
        self.check(prefix, POD, (False, "eth0 is no interface of pods"), link="eth0")
        self.check(prefix, POD, (False, "the interface is not given; pods are told by it"))

    def test_node(self) -> None:
        """The node itself is inside, by what sends or by its address."""
        self.check(Locality(), NODE, (True, f"{NODE} is an address of this node"))
        self.check(Locality(), OUTSIDE, (True, "it comes from the node itself"), fromNode=True)

    def test_familyWithoutNetworks(self) -> None:
        """Networks of pods of one family say nothing of the other."""
        words = "pods cannot be told from others: no IPv4 pod network is known"
        self.check(Locality(insiders=("fd00::/64",)), POD, (False, words))


class SourceRangeTests(SynchronousTestCase):
    """loadBalancerSourceRanges."""

    def test_onlyBalancers(self) -> None:
        """Only addresses of load balancers are for some sources alone, and pods are no exception."""
        it = port(sources=("203.0.113.0/24",))
        for source, way, admitted in (
            (OUTSIDE, "balancer", True), ("198.51.100.77", "balancer", False), (POD, "balancer", False),
            (NODE, "balancer", False), (POD, "external", True), ("198.51.100.77", "node", True),
        ):
            found = ask(it, source, way)
            self.assertEqual((found.admitted, found.verdict), (admitted, "endpoints" if admitted else "drop"))

    def test_nobody(self) -> None:
        """No source at all may be let in."""
        self.assertEqual(ask(port(sources=()), OUTSIDE, "balancer").verdict, "drop")

    def test_rangesBeforeEndpoints(self) -> None:
        """Who is not let in is not told that there is no endpoint."""
        it = port(sources=("203.0.113.0/24",), cluster=(), local=(), reachable=False)
        self.assertEqual(ask(it, POD, "balancer").verdict, "drop")
        self.assertEqual(ask(it, OUTSIDE, "balancer").verdict, "reject")


class MasqueradeTests(SynchronousTestCase):
    """Whose source a dataplane in the kernel rewrites."""

    def check(self, it: ServicePort, expected: dict[tuple[str, str], str | None], **fields: Any) -> None:
        for (source, way), why in expected.items():
            self.assertEqual(ask(it, source, way, **fields).masquerade, why, (source, way))

    def test_clusterPolicy(self) -> None:
        """External frontends always, ClusterIPs for whoever is no pod: the node itself is none."""
        self.check(port(), {
            (POD, "cluster"): None,
            (NODE, "cluster"): "off-cluster",
            (OUTSIDE, "cluster"): "off-cluster",
            (POD, "node"): "external",
            (NODE, "external"): "external",
            (OUTSIDE, "balancer"): "external",
        })

    def test_localPolicy(self) -> None:
        """Under external Local sources are kept, other than that of the node itself."""
        self.check(port(external="local"), {
            (OUTSIDE, "node"): None,
            (POD, "balancer"): None,
            (NODE, "balancer"): "node",
            (NODE, "cluster"): "off-cluster",
        })

    def test_podsUnknown(self) -> None:
        """Where pods cannot be told from others, no source is rewritten for being none."""
        expected: dict[tuple[str, str], str | None] = {(OUTSIDE, "cluster"): None, (OUTSIDE, "node"): "external"}
        self.check(port(), expected, locality=Locality())

    def test_masqueradeAll(self) -> None:
        """masquerade-all is about ClusterIPs, for everybody, and about nothing else."""
        expected: dict[tuple[str, str], str | None] = {(POD, "cluster"): "masquerade-all", (OUTSIDE, "node"): None}
        self.check(port(external="local"), expected, masqueradeAll=True)

    def test_hairpin(self) -> None:
        """An endpoint that dials its own Service must not see its own address as the client's."""
        found = ask(port(), HERE.address, "cluster")
        self.assertEqual([found.masqueradeTo(it) for it in found.endpoints], ["hairpin", None])

    def test_nobodyServes(self) -> None:
        """What is refused is not rewritten."""
        it = port(cluster=(), local=(), reachable=False)
        self.assertIsNone(ask(it, OUTSIDE, "node").masquerade)


class NoServiceTests(SynchronousTestCase):
    """What is dialled and is no frontend."""

    def ask(self, address: str, number: int, protocol: str = "TCP", locality: Locality = LOCALITY) -> tuple[str, str]:
        six = servicePort(portName(family="IPv6"), frontends=(Frontend("ClusterIP", "fd00:96::1", 80),))
        four = port()
        frontends = Frontends(ServiceMap({four.name: four, six.name: six}, locality=locality))
        source = "fd00:1::1" if ":" in address else OUTSIDE
        found = decide(frontends, {NODE, "192.0.2.8"}, Flow(source, address, number, protocol))
        return found.hit, found.verdict

    def test_portOfClusterIP(self) -> None:
        """A ClusterIP answers nothing but its ports, by whatever protocol."""
        self.assertEqual(self.ask("10.96.0.10", 81), ("no such port", "reject"))
        self.assertEqual(self.ask("10.96.0.10", 80, "UDP"), ("no such port", "reject"))
        self.assertEqual(self.ask("10.96.0.10", 0, "ICMP"), ("no such port", "reject"))
        self.assertEqual(self.ask("fd00:96::1", 81), ("no such port", "reject"))

    def test_portOfExternal(self) -> None:
        """Other ports of an external address are nobody's business."""
        self.assertEqual(self.ask("198.51.100.1", 81), ("none", "untouched"))
        self.assertEqual(self.ask("198.51.100.2", 22), ("none", "untouched"))

    def test_unallocated(self) -> None:
        """Addresses of a network of ClusterIPs that no Service has are dropped, where the networks are known."""
        self.assertEqual(self.ask("10.96.0.11", 80), ("unallocated", "drop"))
        self.assertEqual(self.ask("10.96.0.11", 80, locality=Locality()), ("none", "untouched"))

    def test_nodePort(self) -> None:
        """Node ports belong to the addresses of this node, and only to those that the configuration names."""
        only = msgspec.structs.replace(LOCALITY, nodePorts=("192.0.2.8/32",))
        self.assertEqual(self.ask("192.0.2.9", 30080), ("none", "untouched"))
        self.assertEqual(self.ask(NODE, 30080, locality=only), ("not served here", "untouched"))
        self.assertEqual(self.ask("192.0.2.8", 30080, locality=only), ("service", "endpoints"))
        self.assertEqual(self.ask("127.0.0.1", 30080), ("service", "endpoints"))
        self.assertEqual(self.ask(NODE, 30081), ("none", "untouched"))
        self.assertEqual(self.ask(NODE, 30080, "UDP"), ("none", "untouched"))

    def test_externalIsOwnAddress(self) -> None:
        """An external address that is one of the node's goes before node ports."""
        it = servicePort(frontends=(Frontend("ExternalIP", NODE, 30080, "local"),), local=(HERE,))
        other = servicePort(portName("other"), frontends=(Frontend("NodePort", None, 30080),), cluster=(ELSEWHERE,))
        found = decide(
            Frontends(ServiceMap({it.name: it, other.name: other})), {NODE}, Flow(OUTSIDE, NODE, 30080)
        )
        self.assertEqual((found.owner, found.pool), (it.name, "local"))
