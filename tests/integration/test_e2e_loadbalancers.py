"""
Kubernetes' end-to-end tests ``[sig-network] LoadBalancers``: see :mod:`.scenario`. The load balancer is a route of the
outside host, and a test that writes ``status.loadBalancer.ingress``.
"""

from __future__ import annotations

import itertools
import signal
from typing import Any

from twisted.trial.unittest import TestCase

from .scenario import BOTH, TERMINATING, Json, Load, Scenario, Target, behind, port
from .test_e2e_services import STICKY


class LoadBalancers(Scenario):
    """What the scenarios here have in common."""

    _balancers = itertools.count(1)

    def addresses(self) -> tuple[str, str]:
        """Two of a load balancer."""
        number = next(self._balancers)
        return f"10.96.220.{number}", f"fd00:10:96::dc{number:02x}"

    def balanced(self, *pods: str, udp: bool = False, **spec: Any) -> tuple[Json, list[Target], int]:
        """A Service with addresses of a load balancer: it, where that is, and its node port."""
        number, addresses = self.nodePort(), self.addresses()
        protocol = "UDP" if udp else "TCP"
        it = self.make(
            *pods, type="LoadBalancer", status=addresses, ports=[port(nodePort=number, protocol=protocol)],
            slicePorts=[behind(protocol=protocol)], **spec,
        )
        return it, [(ip, 80) for ip in addresses], number

    def route(self, targets: list[Target], node: str) -> None:
        """The load balancer sends everything to this node from now on."""
        for ip, _ in targets:
            via = self.rig.address(node, 6 if ":" in ip else 4)
            self.rig.run("x", ["ip", "-6" if ":" in ip else "-4", "route", "replace", ip, "via", via])


class LoadBalancersCore(LoadBalancers):
    """What every rule writer must bring about."""

    def changes(self, udp: bool) -> None:
        """Every type and every port that a Service can have, one after the other."""
        protocol = "UDP" if udp else "TCP"
        ports, inside = [port(protocol=protocol)], [behind(protocol=protocol)]
        it = self.make("p0a", "p1a", ports=ports, slicePorts=inside)
        cluster = self.clusterIPs(it)
        self.expect(cluster, BOTH, udp=udp)
        first, second, addresses = self.nodePort(), self.nodePort(), self.addresses()
        balancer = [(ip, 80) for ip in addresses]

        self.change(it, type="NodePort", ports=[{**ports[0], "nodePort": first}])
        self.expect([*cluster, *self.onNodes(first)], BOTH, udp=udp)
        self.change(it, type="LoadBalancer")
        self.expect([*cluster, *self.onNodes(first)], BOTH, udp=udp)
        self.ingress(it, *addresses)
        self.expect([*cluster, *self.onNodes(first), *balancer], BOTH, udp=udp)

        self.change(it, ports=[{**ports[0], "nodePort": second}])
        self.refused(self.onNodes(first), udp=udp)
        self.expect([*cluster, *self.onNodes(second), *balancer], BOTH, udp=udp)

        self.change(it, ports=[{**ports[0], "port": 81, "nodePort": second}])
        self.refused(cluster, ("p0b", "x"), udp)
        self.down(balancer, udp=udp)
        cluster, balancer = self.clusterIPs(it, 81), [(ip, 81) for ip in addresses]
        self.expect([*cluster, *self.onNodes(second), *balancer], BOTH, udp=udp)

        self.behind(it, ports=inside)
        self.refused([*cluster, *self.onNodes(second), *balancer], ("p0b", "x"), udp)
        self.behind(it, "p1a", ports=inside)
        self.expect([*cluster, *self.onNodes(second), *balancer], {"p1a"}, udp=udp)

        it["status"] = {"loadBalancer": {}}
        self.change(it, type="ClusterIP", ports=[{**ports[0], "port": 81}])
        self.refused(self.onNodes(second), udp=udp)
        self.down(balancer, udp=udp)
        self.expect(cluster, {"p1a"}, udp=udp)

    def test_changesTCP(self) -> None:
        """
        "should be able to change the type and ports of a TCP service": ClusterIP, NodePort, LoadBalancer; another node
        port, another port; no endpoint, one; ClusterIP.
        """
        self.changes(False)

    def test_changesUDP(self) -> None:
        """ "should be able to change the type and ports of a UDP service": in the same steps."""
        self.changes(True)

    def sources(self, *places: str) -> list[str]:
        """Each place's addresses, as networks."""
        lengths = ((4, 32), (6, 128))
        return [f"{self.rig.address(place, family)}/{length}" for place in places for family, length in lengths]

    def test_sourceRanges(self) -> None:
        """
        "should only allow access from service loadbalancer source ranges": from one pod; from another one; from
        outside; from everywhere. What is not sent to the load balancer's address is not asked where it comes from.
        """
        it, targets, number = self.balanced("p0a", "p1a", loadBalancerSourceRanges=self.sources("p0b"))
        for place, others in (("p0b", ("p1b", "x")), ("p1b", ("p0b", "x")), ("x", ("p0b", "p1b"))):
            self.change(it, loadBalancerSourceRanges=self.sources(place))
            self.expect(targets, BOTH, (place,))
            self.down(targets, others)
            self.expect([*self.clusterIPs(it), *self.onNodes(number)], BOTH, others)
        self.change(it, loadBalancerSourceRanges=None)
        self.expect(targets, BOTH, ("p0b", "p1b", "x"))

    def test_onlyNodesWithEndpoints(self) -> None:
        """
        "should only target nodes with endpoints": the node of the endpoint serves and says so to load balancers, the
        other one does neither; and the other way round.
        """
        health = self.nodePort()
        it, targets, _ = self.balanced(externalTrafficPolicy="Local", healthCheckNodePort=health)
        for pod, here, there in (("p0a", "n0", "n1"), ("p1a", "n1", "n0")):
            self.behind(it, pod)
            self.assertEqual(self.healthy(health), {here: 200, there: 503})
            self.route(targets, here)
            self.expect(targets, {pod}, ("x",))
            self.route(targets, there)
            self.down(targets, ("x",), times=2)


class LoadBalancersMore(LoadBalancers):
    """What does not depend on the rule writer, or hardly."""

    def test_affinityLocal(self) -> None:
        """ "should have session affinity work for LoadBalancer service with Local traffic policy" """
        _, targets, _ = self.balanced("p0a", "p0b", "p1a", externalTrafficPolicy="Local", **STICKY)
        for target in targets:
            self.assertNotEqual(self.sticks("x", target), "p1a")

    def test_affinityCluster(self) -> None:
        """ "should have session affinity work for LoadBalancer service with Cluster traffic policy" """
        _, targets, _ = self.balanced("p0a", "p0b", "p1a", externalTrafficPolicy="Cluster", **STICKY)
        for target in targets:
            self.sticks("x", target)

    def switches(self, policy: str, everybody: set[str]) -> None:
        it, targets, _ = self.balanced("p0a", "p0b", "p1a", externalTrafficPolicy=policy)
        for _ in range(2):
            self.expect(targets, everybody, ("x",))
            self.change(it, **STICKY)
            for target in targets:
                self.sticks("x", target)
            self.change(it, sessionAffinity="None", sessionAffinityConfig=None)

    def test_switchAffinityLocal(self) -> None:
        """ "should be able to switch session affinity for LoadBalancer service with Local traffic policy" """
        self.switches("Local", {"p0a", "p0b"})

    def test_switchAffinityCluster(self) -> None:
        """ "should be able to switch session affinity for LoadBalancer service with Cluster traffic policy" """
        self.switches("Cluster", {"p0a", "p0b", "p1a"})

    def test_withoutNodePort(self) -> None:
        """
        "should be able to create LoadBalancer Service without NodePort and change it": then it gets one.
        """
        addresses = self.addresses()
        it = self.make(
            "p0a", "p1a", type="LoadBalancer", allocateLoadBalancerNodePorts=False, status=addresses, ports=[port()]
        )
        targets = [(ip, 80) for ip in addresses]
        self.expect([*self.clusterIPs(it), *targets], BOTH)
        number = self.nodePort()
        self.change(it, allocateLoadBalancerNodePorts=True, ports=[port(nodePort=number)])
        self.expect([*self.clusterIPs(it), *targets, *self.onNodes(number)], BOTH)

    def rolls(self, policy: str) -> None:
        """
        On each node in turn: the old pod terminates; the new one is ready; the old one is gone. The load balancer
        sends to both nodes all the while, as it does before its health checks have told it better.
        """
        it, targets, number = self.balanced("p0a", "p1a", externalTrafficPolicy=policy)
        with Load(self, "x", [*targets, *self.onNodes(number)]) as load:
            load.until(20)
            pods = ["p0a", "p1a"]
            for old, new in (("p0a", "p0b"), ("p1a", "p1b")):
                self.behind(it, *pods, more={old: TERMINATING})
                load.until(20)
                pods.append(new)
                self.behind(it, *pods, more={old: TERMINATING})
                load.until(20)
                pods.remove(old)
                self.behind(it, *pods)
                load.until(20)
                self.world.backends[old].stop(signal.SIGKILL)
                self.addCleanup(self.again, old)
                load.until(20)
        self.assertEqual(load.failed, [])
        self.assertEqual(set(load.answers), {"p0a", "p0b", "p1a", "p1b"})

    def again(self, pod: str) -> None:
        self.world.backends[pod] = self.world.startBackend(pod)

    def test_rollsCluster(self) -> None:
        """
        "should not have connectivity disruption during rolling update with externalTrafficPolicy=Cluster": no request
        fails; upstream's goal is 99 %.
        """
        self.rolls("Cluster")

    def test_rollsLocal(self) -> None:
        """
        "should not have connectivity disruption during rolling update with externalTrafficPolicy=Local": no request
        fails; upstream's goal is 99 %.
        """
        self.rolls("Local")

    def test_localLoadBalancer(self) -> None:
        """
        "should work for type=LoadBalancer": with externalTrafficPolicy=Local only the node's own pods answer. That
        they see the client's address is what no proxy in userspace can bring about.
        """
        _, targets, _ = self.balanced("p0a", "p1a", externalTrafficPolicy="Local")
        self.expect(targets, {"p0a"}, ("x",))

    def test_localNodePort(self) -> None:
        """
        "should work for type=NodePort": with externalTrafficPolicy=Local on the nodes of endpoints, on no other one.
        """
        number = self.nodePort()
        self.make("p0a", type="NodePort", externalTrafficPolicy="Local", ports=[port(nodePort=number)])
        self.expect(self.onNodes(number, "n0"), {"p0a"}, ("x",))
        self.down(self.onNodes(number, "n1"), ("x",), times=3)

    def test_allNodesWithEndpoints(self) -> None:
        """ "should target all nodes with endpoints": each answers with its own."""
        _, targets, number = self.balanced("p0a", "p1a", externalTrafficPolicy="Local")
        for node, pod in (("n0", "p0a"), ("n1", "p1a")):
            self.route(targets, node)
            self.expect([*targets, *self.onNodes(number, node)], {pod}, ("x",))

    def test_localFromPods(self) -> None:
        """ "should work from pods": also from those of a node without an endpoint, and from nodes."""
        _, targets, _ = self.balanced("p0a", externalTrafficPolicy="Local")
        self.expect(targets, {"p0a"}, ("p0b", "p1b", "n0", "n1"))

    def test_policyChanges(self) -> None:
        """
        "should handle updates to ExternalTrafficPolicy field": Local, Cluster and Local again.
        """
        it, targets, number = self.balanced("p0a", externalTrafficPolicy="Local")
        self.route(targets, "n1")
        without = [*targets, *self.onNodes(number, "n1")]
        self.down(without, ("x",))
        self.change(it, externalTrafficPolicy="Cluster")
        self.expect(without, {"p0a"}, ("x",))
        self.change(it, externalTrafficPolicy="Local")
        self.down(without, ("x",))
        self.expect(self.onNodes(number, "n0"), {"p0a"}, ("x",))

    def keeps(self, first: str, second: str) -> None:
        """A client that keeps its port hears whoever is behind the Service, in whatever order they come and go."""
        it, targets, _ = self.balanced(udp=True)
        self.cycles(it, [self.talker("x", target) for target in targets], first, second, [behind(protocol="UDP")])

    def test_udpDifferentNodes(self) -> None:
        """
        "should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on different nodes"
        """
        self.keeps("p0a", "p1a")

    def test_udpSameNodes(self) -> None:
        """
        "should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on the same nodes"
        """
        self.keeps("p0a", "p0b")


class NftablesLoadBalancersTests(LoadBalancersCore, LoadBalancersMore, TestCase):
    """With rules by nftables."""

    writer = "nftables"
