"""Kubernetes' end-to-end tests ``[sig-network] Conntrack`` on two nodes of namespaces: see :mod:`.scenario`."""

from __future__ import annotations

import re
import socket
import struct
from typing import Any

from twisted.trial.unittest import TestCase

from tests.fakes.network import waitFor
from tests.integration.world import OTHER_PORT

from .scenario import UNREADY, Json, Scenario, Target, behind, port

DNS = [port(80, name="udp", protocol="UDP")]
SLICE = [behind(name="udp", protocol="UDP")]
OTHER_SLICE = [behind(OTHER_PORT, "udp", "UDP")]

INVALID = """
table inet kp-invalid {
  chain arriving { type filter hook prerouting priority 0; ct state invalid tcp sport 8080 counter; }
}
"""


def segment(source: Target, destination: Target, sequence: int) -> bytes:
    """A TCP segment with one byte of data, right but for its sequence number."""
    body = struct.pack("!HHIIBBHHH", source[1], destination[1], sequence, 1, 5 << 4, 0x18, 512, 0, 0) + b"x"
    pseudo = socket.inet_aton(source[0]) + socket.inet_aton(destination[0]) + struct.pack("!BBH", 0, 6, len(body))
    data = pseudo + body + bytes(len(body) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return body[:16] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + body[18:]


class ConntrackCore(Scenario):
    """A client that keeps its port is led to where the Service leads now, whatever the kernel remembers of it."""

    def udp(self, *pods: str, nodePort: int = 0, **spec: Any) -> Json:
        ports = [{**DNS[0], "nodePort": nodePort}] if nodePort else DNS
        return self.make(*pods, ports=ports, slicePorts=SLICE, type="NodePort" if nodePort else "ClusterIP", **spec)

    def test_nodePort(self) -> None:
        """ "should be able to preserve UDP traffic when server pod cycles for a NodePort service" """
        number = self.nodePort()
        it = self.udp(nodePort=number)
        targets = [("p1b", target) for target in self.onNodes(number)]
        targets += [("x", target) for target in self.onNodes(number)]
        self.cycles(it, [self.talker(*each) for each in targets], "p0a", "p0b", SLICE)

    def test_clusterIP(self) -> None:
        """ "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service" """
        it = self.udp()
        talkers = [self.talker(place, target) for place in ("p1b", "x") for target in self.clusterIPs(it)]
        self.cycles(it, talkers, "p0a", "p0b", SLICE)

    def test_hostNetwork(self) -> None:
        """
        "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service and client is
        hostNetwork": on the pods' node and on the other one.
        """
        it = self.udp()
        talkers = [self.talker(place, target) for place in ("n0", "n1") for target in self.clusterIPs(it)]
        self.cycles(it, talkers, "p0a", "p0b", SLICE)

    def test_unready(self) -> None:
        """
        "should be able to preserve UDP traffic when initial unready endpoints get ready": the client has asked all
        the while (kubernetes#105657).
        """
        it = self.udp()
        talkers = [self.talker(place, target) for place in ("p0b", "n0", "x") for target in self.clusterIPs(it)]
        self.behind(it, "p1a", ports=SLICE, more={"p1a": UNREADY})
        for talker in talkers:
            talker.unanswered(5)
        self.behind(it, "p1a", ports=SLICE)
        for talker in talkers:
            talker.hears("p1a")


class ConntrackMore(ConntrackCore):
    """What does not depend on the rule writer, or hardly."""

    def test_local(self) -> None:
        """
        "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service with
        InternalTrafficPolicy set to Local": for a while the only endpoint is on the other node (kubernetes#126934).
        The pod that comes anew has another port rather than another address.
        """
        it = self.udp("p1a", internalTrafficPolicy="Local")
        talkers = [self.talker("p1b", target) for target in self.clusterIPs(it)]
        for talker in talkers:
            talker.hears("p1a")
        self.behind(it, "p1a", "p0a", ports=SLICE)
        self.behind(it, "p0a", ports=SLICE)
        for talker in talkers:
            talker.unanswered(5)
        others = self.slices(it, "p1a", ports=OTHER_SLICE, part="-2")
        self.world.apply(*others)
        for talker in talkers:
            talker.hears("p1a")

    def test_invalid(self) -> None:
        """
        "should drop INVALID conntrack entries [Privileged]": a server sends what is out of its window; nobody resets
        the connection (kubernetes#74839). To a relay it is a stray segment of a connection of its own.
        """
        it = self.make("p1a")
        self.rig.run("n0", ["nft", "-f", "-"], input=INVALID)
        self.addCleanup(self.rig.run, "n0", ["nft", "delete", "table", "inet", "kp-invalid"])
        self.rig.fail("p1a", "tcp flags rst", "counter")
        self.addCleanup(self.rig.heal, "p1a")
        client = self.rig.connect("p0b", self.clusterIPs(it)[0])
        self.addCleanup(client.close)

        def ask() -> tuple[str, int]:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            name, peer = client.recv(1000).partition(b"\r\n\r\n")[2].decode().split()[:2]
            self.assertEqual(name, "p1a")
            host, _, number = peer.rpartition(":")
            return host, int(number)

        peer = ask()
        with self.rig.open("p1a"):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        with raw:
            for sequence in (1, 0x40000000, 0x80000000, 0xC0000000):
                raw.sendto(segment((self.rig.address("p1a"), 8080), peer, sequence), (peer[0], 0))
        waitFor(lambda: self.counted("n0", "kp-invalid"), 10)
        self.assertEqual(ask(), peer)
        self.assertEqual(self.counted("p1a", "kp-faults"), 0)

    def counted(self, place: str, table: str) -> int:
        """The packets that the only counter of a table has seen."""
        listed = self.rig.run(place, ["nft", "list", "table", "inet", table]).stdout
        return sum(int(number) for number in re.findall(r"packets (\d+)", listed))


class NftablesConntrackTests(ConntrackMore, TestCase):
    """With rules by nftables."""

    writer = "nftables"
