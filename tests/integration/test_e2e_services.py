"""Kubernetes' end-to-end tests ``[sig-network] Services`` on two nodes of namespaces: see :mod:`.scenario`."""

from __future__ import annotations

import json
import re
import socket
import struct
from copy import deepcopy
from typing import Any

from twisted.trial.unittest import TestCase

from tests.fakes.network import waitFor
from tests.integration.world import OTHER_PORT, PORT

from .scenario import (
    BOTH,
    DEAD,
    REFUSED,
    TERMINATING,
    UNREADY,
    VISIBLE,
    Json,
    Scenario,
    Target,
    behind,
    port,
)

STICKY = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}}
EXTERNAL = ("203.0.113.250", "2001:db8:ffff::250")
MIXED = [port(), port(name="udp", protocol="UDP")]
MIXED_SLICE = [behind(), behind(name="udp", protocol="UDP")]


def crc32c(data: bytes) -> int:
    """SCTP's checksum (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sctpInit(number: int) -> bytes:
    """A packet that asks for an association with that port."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 1, 1, 1)
    header = struct.pack("!HHI", 40000, number, 0)
    return header + struct.pack("<I", crc32c(header + bytes(4) + chunk)) + chunk


class ServicesCore(Scenario):
    """What every rule writer must bring about."""

    def test_basicEndpoint(self) -> None:
        """
        "should serve a basic endpoint from pods": nobody, p0a, p0a and p1a, p1a, nobody. Nobody is a refusal.
        """
        it = self.make()
        self.refused(self.clusterIPs(it))
        for pods in (("p0a",), ("p0a", "p1a"), ("p1a",)):
            self.behind(it, *pods)
            self.expect(self.clusterIPs(it), set(pods))
        self.behind(it)
        self.refused(self.clusterIPs(it))

    def test_multiport(self) -> None:
        """
        "should serve multiport endpoints from pods": two ports, two slices with one pod and one port each.
        """
        it = self.make(ports=[port(80, name="portname1"), port(81, name="portname2")])
        first = self.slices(it, "p0a", ports=[behind(PORT, "portname1")])
        second = self.slices(it, "p1a", ports=[behind(OTHER_PORT, "portname2")], part="-2")
        self.world.apply(*first, *second, seconds=VISIBLE)
        self.expect(self.clusterIPs(it, 80), {"p0a"})
        self.expect(self.clusterIPs(it, 81), {"p1a"})
        self.world.delete(*first, seconds=VISIBLE)
        self.refused(self.clusterIPs(it, 80))
        self.expect(self.clusterIPs(it, 81), {"p1a"})

    def test_hairpin(self) -> None:
        """
        "should allow pods to hairpin back to themselves through services": and sees the node as the client.
        """
        it = self.make("p0a")
        for target in self.clusterIPs(it):
            answer = self.ask("p0a", target)
            self.assertEqual(answer.name, "p0a")
            own = self.rig.address("p0a", 6 if ":" in target[0] else 4)
            self.assertNotIn(answer.client.rpartition(":")[0].strip("[]"), (own, ""))

    def test_upAndDown(self) -> None:
        """ "should be able to up and down services": the neighbour does not notice."""
        first, second = self.make("p0a", "p1a"), self.make("p0b", "p1a")
        self.expect(self.clusterIPs(first), BOTH)
        self.expect(self.clusterIPs(second), {"p0b", "p1a"})
        self.world.delete(first, seconds=VISIBLE)
        self.down(self.clusterIPs(first))
        self.expect(self.clusterIPs(second), {"p0b", "p1a"})
        third = self.make("p0a", "p0b")
        self.expect(self.clusterIPs(second), {"p0b", "p1a"})
        self.expect(self.clusterIPs(third), {"p0a", "p0b"})

    def test_nodePort(self) -> None:
        """ "should be able to create a functioning NodePort service": on both nodes, from everywhere."""
        number = self.nodePort()
        it = self.make("p0a", "p1a", type="NodePort", ports=[port(nodePort=number)])
        self.expect(self.clusterIPs(it), BOTH, ("p0b", "p1b", "n0", "n1", "x"))
        self.expect(self.onNodes(number), BOTH, ("p0b", "p1b", "n0", "n1", "x"))

    def test_externalIP(self) -> None:
        """
        "should be possible to connect to a service via ExternalIP when the external IP is not assigned to a node"
        """
        it = self.make("p0a", "p1a", externalIPs=list(EXTERNAL))
        self.expect(self.clusterIPs(it), BOTH, ("p0b", "p1b", "n0", "n1"))
        self.expect([(ip, 80) for ip in EXTERNAL], BOTH, ("p0b", "p1b", "n0", "n1"))

    def test_rejected(self) -> None:
        """
        "should be rejected when no endpoints exist": there is no slice; refused at once, at every frontend.
        """
        number = self.nodePort()
        it = self.make(type="NodePort", ports=[port(nodePort=number)])
        self.world.delete(*self.slices(it), seconds=VISIBLE)
        self.refused([*self.clusterIPs(it), *self.onNodes(number)], ("p0b", "p1b", "n0", "n1", "x"))

    def test_affinity(self) -> None:
        """ "should have session affinity work for service with type clusterIP": each client has its own."""
        it = self.make("p0a", "p0b", "p1a", **STICKY)
        for target in self.clusterIPs(it):
            found = {self.sticks(place, target) for place in ("p0a", "p0b", "n0", "x")}
            self.assertGreater(len(found), 1)

    def test_localPodToPod(self) -> None:
        """ "should respect internalTrafficPolicy=Local Pod to Pod": from the other node it always fails."""
        it = self.make("p0a", internalTrafficPolicy="Local")
        self.expect(self.clusterIPs(it), {"p0a"}, ("p0b",))
        self.down(self.clusterIPs(it), ("p1b",), times=5)

    def test_externalLocalTerminating(self) -> None:
        """
        "should fallback to local terminating endpoints when there are no ready endpoints with
        externalTrafficPolicy=Local": the node of the endpoint serves, the other one does not.
        """
        number = self.nodePort()
        self.make(
            "p0a", type="NodePort", externalTrafficPolicy="Local", ports=[port(nodePort=number)],
            more={"p0a": TERMINATING},
        )
        self.expect(self.onNodes(number, "n0"), {"p0a"}, ("x",))
        self.down(self.onNodes(number, "n1"), ("x",), times=5)
        self.expect(self.onNodes(number, "n1"), {"p0a"}, ("p1b",))  # inside, every endpoint counts

    def test_samePortTwoProtocols(self) -> None:
        """
        "should serve endpoints on same port and different protocols": both; TCP alone; UDP alone.
        """
        it = self.make("p0a", ports=MIXED, slicePorts=MIXED_SLICE)
        self.expect(self.clusterIPs(it), {"p0a"})
        self.expect(self.clusterIPs(it), {"p0a"}, udp=True)
        self.change(it, ports=MIXED[:1])
        self.expect(self.clusterIPs(it), {"p0a"})
        self.refused(self.clusterIPs(it), ("p0b", "x"), udp=True)
        self.change(it, ports=MIXED[1:])
        self.refused(self.clusterIPs(it))
        self.expect(self.clusterIPs(it), {"p0a"}, udp=True)

    def test_sctp(self) -> None:
        """
        "should allow creating a basic SCTP service with pod and endpoints": the TCP port beside it serves, an INIT is
        refused by ICMP and told of in the status, and nobody has loaded the kernel's module.
        """
        loaded = self.sctpLoaded()
        it = self.make(
            "p0a", ports=[port(), port(81, name="sctp", protocol="SCTP")],
            slicePorts=[behind(), behind(name="sctp", protocol="SCTP")],
        )
        self.expect(self.clusterIPs(it), {"p0a"})
        self.assertEqual([self.sendInit(place, it) for place in ("p0b", "x")], [REFUSED] * 2)
        self.assertIn(self.sendInit("n0", it), (REFUSED, "PermissionError"))  # there it does not even leave
        self.assertEqual(self.sctpLoaded(), loaded)
        problems = json.dumps(self.world.status())
        self.assertRegex(problems, rf'"default/{it["metadata"]["name"]}:sctp/SCTP/IPv4": "SCTP')

    def sctpLoaded(self) -> bool:
        with open("/proc/net/protocols", encoding="ascii") as file:
            return bool(re.search("^SCTP", file.read(), re.M))

    def sendInit(self, place: str, it: Json) -> str:
        """What becomes of an INIT to the SCTP port; a raw socket, because another one would load the module."""
        with self.rig.open(place):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP)
        with raw:
            raw.settimeout(5)
            try:
                raw.connect((it["spec"]["clusterIP"], 0))
                raw.send(sctpInit(81))
                return repr(raw.recv(1000))
            except OSError as error:
                return type(error).__name__


class ServicesMore(Scenario):
    """What does not depend on the rule writer, or hardly."""

    def test_portsComeAndGo(self) -> None:
        """
        "should be updated after adding or deleting ports": a connection to the port that stays is not touched.
        """
        it = self.make("p0a", slicePorts=[behind(), behind(OTHER_PORT, "more")])
        targets = self.clusterIPs(it)
        clients = [self.connected("p0b", target) for target in targets]
        self.change(it, ports=[port(), port(81, name="more")])
        self.expect([*targets, *self.clusterIPs(it, 81)], {"p0a"})
        self.change(it, ports=[port()])
        self.refused(self.clusterIPs(it, 81))
        self.expect(targets, {"p0a"})
        self.assertEqual([ask() for ask in clients], ["p0a", "p0a"])

    def test_recreated(self) -> None:
        """
        "should work after the service has been recreated": with another ClusterIP and the slices of the first one.
        """
        first = self.make("p0a", "p1a")
        self.expect(self.clusterIPs(first), BOTH)
        again = deepcopy(first)
        number = next(self.world.numbers)
        again["spec"]["clusterIP"] = f"10.96.1.{number}"
        again["spec"]["clusterIPs"] = [f"10.96.1.{number}", f"fd00:10:96::{number:x}"]
        self.world.delete(first, seconds=VISIBLE)
        self.down(self.clusterIPs(first))
        self.world.apply(again, seconds=VISIBLE)
        self.expect(self.clusterIPs(again), BOTH)
        self.down(self.clusterIPs(first))

    def test_toNodePortOfTwoProtocols(self) -> None:
        """
        "should be able to update service type to NodePort listening on same port number but different protocols"
        """
        it = self.make("p0a", "p1a", ports=MIXED[:1], slicePorts=MIXED_SLICE)
        self.expect(self.clusterIPs(it), BOTH)
        number = self.nodePort()
        self.change(it, type="NodePort", ports=[{**each, "nodePort": number} for each in MIXED])
        for udp in (False, True):
            self.expect([*self.clusterIPs(it), *self.onNodes(number)], BOTH, ("p0b", "x"), udp=udp)

    def externalName(self, it: Json) -> None:
        """Change its type to one that no proxy serves."""
        gone = dict.fromkeys(("clusterIP", "clusterIPs", "ipFamilies", "ports"))
        self.change(it, type="ExternalName", externalName="example.com", **gone)

    def fromExternalName(self, **spec: Any) -> tuple[Json, list[Target]]:
        it = self.make("p0a", "p1a")
        targets, old = self.clusterIPs(it), deepcopy(it["spec"])
        self.externalName(it)
        self.down(targets)
        it["spec"] = old
        self.change(it, **spec)
        return it, targets

    def test_externalNameToClusterIP(self) -> None:
        """ "should be able to change the type from ExternalName to ClusterIP": in place."""
        _, targets = self.fromExternalName()
        self.expect(targets, BOTH)

    def test_externalNameToNodePort(self) -> None:
        """ "should be able to change the type from ExternalName to NodePort": in place."""
        number = self.nodePort()
        _, targets = self.fromExternalName(type="NodePort", ports=[port(nodePort=number)])
        self.expect([*targets, *self.onNodes(number)], BOTH)

    def test_clusterIPToExternalName(self) -> None:
        """ "should be able to change the type from ClusterIP to ExternalName": the address is served no longer."""
        it = self.make("p0a", "p1a")
        targets = self.clusterIPs(it)
        self.expect(targets, BOTH)
        self.externalName(it)
        self.down(targets)

    def test_nodePortToExternalName(self) -> None:
        """ "should be able to change the type from NodePort to ExternalName": the node port is served no longer."""
        number = self.nodePort()
        it = self.make("p0a", "p1a", type="NodePort", ports=[port(nodePort=number)])
        targets = [*self.clusterIPs(it), *self.onNodes(number)]
        self.expect(targets, BOTH)
        self.externalName(it)
        self.down(targets)
        self.assertEqual(self.listening(number), [])

    def listening(self, number: int) -> list[str]:
        """Who listens on that port of a node."""
        argv = ["ss", "-Hant46", "state", "listening", f"sport = :{number}"]
        return [line for node in ("n0", "n1") for line in self.rig.run(node, argv).stdout.splitlines()]

    def test_releasesNodePorts(self) -> None:
        """
        "should release NodePorts on delete": nobody listens any more, and another Service can have it.
        """
        number = self.nodePort()
        it = self.make("p0a", type="NodePort", ports=[port(nodePort=number)])
        self.expect(self.onNodes(number), {"p0a"}, ("x",))
        self.world.delete(it, seconds=VISIBLE)
        self.assertEqual(self.listening(number), [])
        self.refused(self.onNodes(number))
        self.make("p1a", type="NodePort", ports=[port(nodePort=number)])
        self.expect(self.onNodes(number), {"p1a"}, ("x",))

    def test_unreadyPods(self) -> None:
        """
        "should create endpoints for unready pods": a slice of publishNotReadyAddresses says ready for a pod that is
        not; without it, unready; when the Service goes, down.
        """
        it = self.make("p0a", publishNotReadyAddresses=True)
        self.expect(self.clusterIPs(it), {"p0a"})
        self.change(it, publishNotReadyAddresses=False)
        self.behind(it, "p0a", more={"p0a": UNREADY})
        self.refused(self.clusterIPs(it))
        self.change(it, publishNotReadyAddresses=True)
        self.behind(it, "p0a")
        self.expect(self.clusterIPs(it), {"p0a"})

    def test_terminatingAndPublished(self) -> None:
        """
        "should be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is true"
        """
        number = self.nodePort()
        conditions = {"conditions": {"ready": True, "serving": False, "terminating": True}}
        it = self.make(
            "p0a", type="NodePort", publishNotReadyAddresses=True, ports=[port(nodePort=number)],
            more={"p0a": conditions},
        )
        self.expect([*self.clusterIPs(it), *self.onNodes(number)], {"p0a"}, ("p0b", "p1b"))

    def test_terminatingAndNotPublished(self) -> None:
        """
        "should not be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is false"
        """
        number = self.nodePort()
        it = self.make("p0a", type="NodePort", ports=[port(nodePort=number)], more={"p0a": DEAD})
        self.refused([*self.clusterIPs(it), *self.onNodes(number)], ("p0b", "p1b"))

    def test_affinityNodePort(self) -> None:
        """ "should have session affinity work for NodePort service": at each node on its own."""
        number = self.nodePort()
        self.make("p0a", "p0b", "p1a", type="NodePort", ports=[port(nodePort=number)], **STICKY)
        for target in self.onNodes(number):
            self.sticks("x", target)
            self.sticks("p1b", target)

    def timesOut(self, it: Json, place: str, target: Target) -> None:
        """After as much idle time as the affinity lasts another endpoint is seen; upstream gives it ten tries too."""
        first = self.sticks(place, target)
        for _ in range(10):
            waitFor(lambda: not self.bound(it), 10, 0.1)
            if self.ask(place, target).name != first:
                return
        raise AssertionError(f"it stays with {first}")

    def bound(self, it: Json) -> int:
        """How many clients n0 binds to an endpoint of this Service; asking renews nothing."""
        services = self.world.status()["services"]
        mine = [each for key, each in services.items() if key.startswith(f"default/{it['metadata']['name']}:")]
        return sum(each[pool]["affinityEntries"] for each in mine for pool in ("cluster", "local") if pool in each)

    SHORT = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 2}}}

    def test_affinityTimeout(self) -> None:
        """
        "should have session affinity timeout work for service with type clusterIP": of two seconds, not eight.
        """
        it = self.make("p0a", "p0b", "p1a", **self.SHORT)
        self.timesOut(it, "p0b", self.clusterIPs(it)[0])

    def test_affinityTimeoutNodePort(self) -> None:
        """ "should have session affinity timeout work for NodePort service": of two seconds, not eight."""
        number = self.nodePort()
        it = self.make("p0a", "p0b", "p1a", type="NodePort", ports=[port(nodePort=number)], **self.SHORT)
        self.timesOut(it, "x", self.onNodes(number)[1])

    def switches(self, it: Json, place: str, targets: list[Target], everybody: set[str]) -> None:
        """Sticky or not, changed on the fly; who is connected stays so."""
        clients = [self.connected(place, target) for target in targets]
        first = [ask() for ask in clients]
        for _ in range(2):
            self.change(it, sessionAffinity="None", sessionAffinityConfig=None)
            self.expect(targets, everybody, (place,))
            self.change(it, **STICKY)
            for target in targets:
                self.sticks(place, target)
        self.assertEqual([ask() for ask in clients], first)

    def test_switchAffinity(self) -> None:
        """ "should be able to switch session affinity for service with type clusterIP": without losing connections."""
        it = self.make("p0a", "p0b", "p1a", **STICKY)
        self.switches(it, "p0b", self.clusterIPs(it), {"p0a", "p0b", "p1a"})

    def test_switchAffinityNodePort(self) -> None:
        """ "should be able to switch session affinity for NodePort service": without losing connections."""
        number = self.nodePort()
        it = self.make("p0a", "p0b", "p1a", type="NodePort", ports=[port(nodePort=number)], **STICKY)
        self.switches(it, "x", self.onNodes(number), {"p0a", "p0b", "p1a"})

    def toggles(self, label: str) -> None:
        """With the label it is down, without it up; the neighbour does not notice."""
        always, never = self.make("p0a"), self.make("p0a", labels={label: "foo-bar"})
        toggled = self.make("p1a")

        def check(there: bool) -> None:
            self.expect(self.clusterIPs(always), {"p0a"}, ("p0b", "x"))
            self.down(self.clusterIPs(never), ("p0b", "x"))
            if there:
                self.expect(self.clusterIPs(toggled), {"p1a"}, ("p0b", "x"))
            else:
                self.down(self.clusterIPs(toggled), ("p0b", "x"))

        check(True)
        for labels in ({label: "foo-bar"}, {}):
            toggled["metadata"]["labels"] = labels
            self.world.apply(toggled, seconds=VISIBLE)
            check(not labels)

    def test_proxyName(self) -> None:
        """ "should implement service.kubernetes.io/service-proxy-name": down with it, up without."""
        self.toggles("service.kubernetes.io/service-proxy-name")

    def test_headlessLabel(self) -> None:
        """ "should implement service.kubernetes.io/headless": down with it, up without."""
        self.toggles("service.kubernetes.io/headless")

    def test_evicted(self) -> None:
        """
        "should be rejected for evicted pods (no endpoints exist)": there is a slice, without endpoints.
        """
        number = self.nodePort()
        it = self.make(type="NodePort", ports=[port(nodePort=number)])
        self.refused([*self.clusterIPs(it), *self.onNodes(number)], ("p0b", "n1"))

    def test_localHostToPod(self) -> None:
        """ "should respect internalTrafficPolicy=Local Pod (hostNetwork: true) to Pod": that is, from the node."""
        it = self.make("p0a", internalTrafficPolicy="Local")
        self.expect(self.clusterIPs(it), {"p0a"}, ("n0",))
        self.down(self.clusterIPs(it), ("n1",), times=5)

    def test_localToHostPod(self) -> None:
        """
        "should respect internalTrafficPolicy=Local Pod and Node, to Pod (hostNetwork: true)": an endpoint that has
        the address of its node.
        """
        backend = self.world.startBackend("n0")
        self.addCleanup(backend.stop)
        it = self.make("n0", internalTrafficPolicy="Local")
        self.expect(self.clusterIPs(it), {"n0"}, ("p0b", "n0"))
        self.down(self.clusterIPs(it), ("p1b", "n1"), times=5)

    def test_terminatingInternalCluster(self) -> None:
        """
        "should fallback to terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Cluster"
        """
        it = self.make("p0a", more={"p0a": TERMINATING})
        self.expect(self.clusterIPs(it), {"p0a"}, ("p0b", "p1b", "n0", "n1"))
        self.behind(it, "p0a", "p1a", more={"p0a": TERMINATING})  # a ready one: it alone
        self.expect(self.clusterIPs(it), {"p1a"}, ("p0b", "p1b", "n0", "n1"))

    def test_terminatingInternalLocal(self) -> None:
        """
        "should fallback to local terminating endpoints when there are no ready endpoints with
        internalTrafficPolicy=Local": on the other node it fails.
        """
        it = self.make("p0a", more={"p0a": TERMINATING}, internalTrafficPolicy="Local")
        self.expect(self.clusterIPs(it), {"p0a"}, ("p0b", "n0"))
        self.down(self.clusterIPs(it), ("p1b", "n1"), times=5)

    def test_terminatingExternalCluster(self) -> None:
        """
        "should fallback to terminating endpoints when there are no ready endpoints with externallTrafficPolicy=Cluster"
        (spelt so there)
        """
        number = self.nodePort()
        self.make("p0a", type="NodePort", ports=[port(nodePort=number)], more={"p0a": TERMINATING})
        self.expect(self.onNodes(number), {"p0a"}, ("x", "p0b", "p1b"))

    def test_healthCheckNodePort(self) -> None:
        """
        "should fail health check node port if there are only terminating endpoints": while the node port serves on.
        """
        number, health = self.nodePort(), self.nodePort()
        it = self.make(
            "p0a", type="LoadBalancer", externalTrafficPolicy="Local", ports=[port(nodePort=number)],
            healthCheckNodePort=health,
        )
        self.assertEqual(self.healthy(health), {"n0": 200, "n1": 503})
        self.behind(it, "p0a", more={"p0a": TERMINATING})
        self.assertEqual(self.healthy(health), {"n0": 503, "n1": 503})
        self.expect(self.onNodes(number, "n0"), {"p0a"}, ("x",))

    def test_statusOpensLoadBalancer(self) -> None:
        """
        "should complete a service status lifecycle": what becomes of it here, an address in status.loadBalancer is
        served while it is there.
        """
        it = self.make("p0a", "p1a", type="LoadBalancer")
        targets = [("10.96.210.1", 80), ("fd00:10:96::d201", 80)]
        self.down(targets)
        self.ingress(it, *(ip for ip, _ in targets))
        self.expect(targets, BOTH)
        self.ingress(it)
        self.down(targets)

    def test_collectionDeleted(self) -> None:
        """ "should delete a collection of services": what becomes of it here, three go at once and one stays."""
        several, stays = [self.make("p0a") for _ in range(3)], self.make("p1a")
        self.world.delete(*several, seconds=VISIBLE)
        for it in several:
            self.down(self.clusterIPs(it))
        self.expect(self.clusterIPs(stays), {"p1a"})

    def test_samePortTwoProtocolsLoadBalancer(self) -> None:
        """
        "should serve endpoints on same port and different protocol for internal traffic on Type LoadBalancer": while
        no load balancer has given it an address.
        """
        number = self.nodePort()
        ports = [{**each, "nodePort": number} for each in MIXED]
        it = self.make("p0a", "p1a", type="LoadBalancer", ports=ports, slicePorts=MIXED_SLICE)
        for udp in (False, True):
            self.expect(self.clusterIPs(it), BOTH, ("p0b", "p1b", "n0", "n1"), udp=udp)


class NftablesServicesTests(ServicesCore, ServicesMore, TestCase):
    """With rules by nftables."""

    writer = "nftables"
