"""Kubernetes' end-to-end tests ``[sig-network] Networking Granular Checks: Services``: see :mod:`.scenario`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.trial.unittest import TestCase

from .scenario import BOTH, Json, Scenario, Target, behind, port
from .test_e2e_services import STICKY

HTTP, UDP = port(), port(90, name="udp", protocol="UDP")
SLICE = [behind(), behind(name="udp", protocol="UDP")]


class NetworkingCore(Scenario):
    """What every rule writer must bring about."""

    def service(self, *pods: str, **spec: Any) -> tuple[Json, list[Target], list[Target], int, int]:
        """A NodePort Service for HTTP and UDP: it, its HTTP targets, its UDP targets, and its two node ports."""
        http, udp = self.nodePort(), self.nodePort()
        it = self.make(
            *(pods or ("p0a", "p1a")), type="NodePort", slicePorts=SLICE,
            ports=[{**HTTP, "nodePort": http}, {**UDP, "nodePort": udp}], **spec,
        )
        targets = [*self.clusterIPs(it), *self.onNodes(http)]
        return it, targets, [*self.clusterIPs(it, 90), *self.onNodes(udp)], http, udp

    def functions(self, places: Sequence[str], udp: bool) -> None:
        """ClusterIP and node ports of a Service with two pods, dialled from there."""
        _, http, datagrams, _, _ = self.service()
        self.expect(datagrams if udp else http, BOTH, places, udp)

    def test_podHttp(self) -> None:
        """ "should function for pod-Service: http" """
        self.functions(("p0b", "p1b"), False)

    def test_podUdp(self) -> None:
        """ "should function for pod-Service: udp" """
        self.functions(("p0b", "p1b"), True)

    def test_nodeHttp(self) -> None:
        """ "should function for node-Service: http" """
        self.functions(("n0", "n1"), False)

    def test_nodeUdp(self) -> None:
        """ "should function for node-Service: udp" """
        self.functions(("n0", "n1"), True)

    def test_endpointHttp(self) -> None:
        """ "should function for endpoint-Service: http": the client is behind the Service itself."""
        self.functions(("p0a", "p1a"), False)

    def test_endpointUdp(self) -> None:
        """ "should function for endpoint-Service: udp": the client is behind the Service itself."""
        self.functions(("p0a", "p1a"), True)

    def large(self, udp: bool, bodies: Sequence[bytes]) -> None:
        it, _, _, _, _ = self.service()
        for target in self.clusterIPs(it, 90 if udp else 80):
            for place in ("p0b", "n0", "x"):
                for body in bodies:
                    found = self.ask(place, target, udp, body=body).name
                    self.assertEqual(found in BOTH, True, f"{place} {target} {len(body)} bytes: {found}")

    def test_largeHttp(self) -> None:
        """ "should be able to handle large requests: http": 2,000 bytes come back; and 1 MB."""
        self.large(False, (b"42" * 1000, b"42" * 500_000))

    def test_largeUdp(self) -> None:
        """ "should be able to handle large requests: udp": 2,000 bytes come back; and 60,000."""
        self.large(True, (b"n" + b"o" * 1999, b"n" + b"o" * 59_999))


class NetworkingMore(NetworkingCore):
    """What does not depend on the rule writer, or hardly."""

    def updates(self, udp: bool) -> None:
        it, http, datagrams, _, _ = self.service()
        targets = datagrams if udp else http
        self.expect(targets, BOTH, udp=udp)
        self.behind(it, "p1a", ports=SLICE)
        self.expect(targets, {"p1a"}, udp=udp)

    def test_updateEndpointsHttp(self) -> None:
        """ "should update endpoints: http": a pod that is deleted is asked no more."""
        self.updates(False)

    def test_updateEndpointsUdp(self) -> None:
        """ "should update endpoints: udp": a pod that is deleted is asked no more."""
        self.updates(True)

    def withoutNodePort(self, udp: bool) -> None:
        it, _, _, httpPort, udpPort = self.service()
        targets = self.onNodes(udpPort if udp else httpPort)
        self.expect(targets, BOTH, udp=udp)
        self.change(it, type="ClusterIP", ports=[HTTP, UDP])
        self.refused(targets, ("p0b", "x"), udp)
        self.down(targets, udp=udp, times=10)
        self.expect(self.clusterIPs(it, 90 if udp else 80), BOTH, udp=udp)

    def test_updateNodePortHttp(self) -> None:
        """ "should update nodePort: http": a node port that is no more is dead, at every try."""
        self.withoutNodePort(False)

    def test_updateNodePortUdp(self) -> None:
        """ "should update nodePort: udp": a node port that is no more is dead, at every try."""
        self.withoutNodePort(True)

    def test_basicNodePortUdp(self) -> None:
        """ "should support basic nodePort: udp functionality": from outside, on both nodes."""
        _, _, _, _, number = self.service()
        self.expect(self.onNodes(number), BOTH, ("x",), udp=True)

    def affinity(self, udp: bool) -> None:
        _, http, datagrams, _, _ = self.service(**STICKY)
        for target in datagrams if udp else http:
            self.sticks("p0b", target, udp)
            self.sticks("x", target, udp)

    def test_affinityHttp(self) -> None:
        """ "should function for client IP based session affinity: http" """
        self.affinity(False)

    def test_affinityUdp(self) -> None:
        """ "should function for client IP based session affinity: udp": each datagram is of another socket."""
        self.affinity(True)

    def test_sameSelector(self) -> None:
        """
        "should function for multiple endpoint-Services with same selector": one of the two can go.
        """
        first, second = self.service(), self.service()
        for _, http, datagrams, _, _ in (first, second):
            self.expect(http, BOTH, ("p0a",))
            self.expect(datagrams, BOTH, ("p0a",), udp=True)
        self.world.delete(second[0])
        self.expect(first[1], BOTH, ("p0a",))
        self.expect(first[2], BOTH, ("p0a",), udp=True)

    def test_hostNetwork(self) -> None:
        """
        "should function for service endpoints using hostNetwork": the endpoints have the addresses of their nodes.
        """
        for node in ("n0", "n1"):
            self.addCleanup(self.world.startBackend(node).stop)
        _, http, datagrams, _, _ = self.service("n0", "n1")
        self.expect(http, {"n0", "n1"}, ("p0b", "n0", "n1", "x"))
        self.expect(datagrams, {"n0", "n1"}, ("p0b", "n0", "n1", "x"), udp=True)


class NftablesNetworkingTests(NetworkingMore, TestCase):
    """With rules by nftables."""

    writer = "nftables"
