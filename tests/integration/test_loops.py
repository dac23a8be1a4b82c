"""Endpoints that are frontends as well: what the proxy itself sends there must not come back to it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, ClassVar

from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.daemon import Backend, Daemon
from tests.fakes.network import SmallRig, waitFor
from tests.shared.namespaces import canMakeNamespaces

TCP, UDP = 8080, 5353
CLUSTER = {4: "10.96.7.7", 6: "fd00:10:96::7:7"}
CONFIG = """
[kproxy]
node-name = n0
cluster-cidr = 10.244.0.0/16, fd00:10:244::/56
[source:local]
type = files
path = {folder}
[rules]
writer = {writer}
[userspace]
drain-timeout = 0s
"""
#: Found by Python before anything else: the daemon without its mark, and with few file descriptors to waste.
UNMARKED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
import twisted_kproxy.userspace.sockets as sockets
sockets.markOwn = lambda sock: None
"""


class Loops:
    """
    Service ``host`` has the node's own address as external IP, and a backend on the node's network as its endpoint, on
    the same port. The endpoint of Service ``hop`` is the ClusterIP of Service ``host``.
    """

    timeout = 120
    writer: ClassVar[str]

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("network namespaces need root")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)  # type: ignore[attr-defined]
        self.backend = Backend(self.rig, "n0", http=[TCP], udp=[UDP])
        self.folder = os.path.join(self.rig.folder, "services.d")
        os.mkdir(self.folder)
        node = {family: self.rig.address("n0", family) for family in (4, 6)}
        items = [*self.service("host", CLUSTER, node, [node[4], node[6]])]
        items += self.service("hop", {4: "10.96.7.8", 6: "fd00:10:96::7:8"}, CLUSTER, [])
        Path(self.folder, "all.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": items}))

    @staticmethod
    def service(name: str, ips: dict[int, str], endpoints: dict[int, str], external: list[str]) -> list[Any]:
        ports = [{"name": "http", "port": TCP, "protocol": "TCP"}, {"name": "dns", "port": UDP, "protocol": "UDP"}]
        it: list[Any] = [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {
                    "clusterIP": ips[4],
                    "clusterIPs": list(ips.values()),
                    "ipFamilies": ["IPv4", "IPv6"],
                    "ports": ports,
                    "externalIPs": external,
                },
            }
        ]
        for family, address in endpoints.items():
            it.append(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{name}-{family}",
                        "namespace": "default",
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "addressType": f"IPv{family}",
                    "ports": ports,
                    "endpoints": [{"addresses": [address], "conditions": {"ready": True}, "nodeName": "n0"}],
                }
            )
        return it

    def start(self, env: dict[str, str] | None = None) -> Daemon:
        daemon = Daemon(self.rig, "n0", CONFIG.format(folder=self.folder, writer=self.writer), env=env)
        daemon.waitUntil(lambda: self.status(daemon)["sync"]["inForce"])
        return daemon

    @staticmethod
    def status(daemon: Daemon) -> Any:
        return json.loads(daemon.get("http://127.0.0.1:10249/status")[2])

    def ask(self, place: str, address: str, protocol: str, seconds: float = 10) -> str:
        """Who answers, or the error's name."""
        kind, port = (socket.SOCK_STREAM, TCP) if protocol == "TCP" else (socket.SOCK_DGRAM, UDP)
        with self.rig.socketIn(place, socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as it:
            it.settimeout(seconds)
            try:
                it.connect((address, port))
                it.send(b"GET / HTTP/1.0\r\n\r\n" if protocol == "TCP" else b"hello")
                return "served" if b"n0" in it.recv(4000) else "closed"
            except OSError as error:
                return type(error).__name__

    def each(self) -> list[tuple[str, str, str]]:
        """Client, address, protocol."""
        node = [self.rig.address("n0", family) for family in (4, 6)]
        dialled = {"p0a": [*CLUSTER.values(), *node], "n0": [*CLUSTER.values(), *node], "x": node}
        return [(p, a, protocol) for p, some in dialled.items() for a in some for protocol in ("TCP", "UDP")]

    def test_served(self) -> None:
        """A backend on the node's own network is served under the node's own address and port, to everybody."""
        daemon = self.start()
        for what in self.each():
            self.assertEqual((what, self.ask(*what)), (what, "served"))  # type: ignore[attr-defined]
        daemon.assertNoTraceback()

    def test_notTwice(self) -> None:
        """An endpoint that is a ClusterIP is dialled as it is written: nobody is there, and nothing goes round."""
        daemon = self.start()
        for address in ("10.96.7.8", "fd00:10:96::7:8"):
            for protocol in ("TCP", "UDP"):
                self.assertNotEqual(self.ask("p0a", address, protocol, 0.5), "served")  # type: ignore[attr-defined]
        opened = [it["active"] for it in self.status(daemon)["dataplane"]["servicePorts"].values()]
        self.assertLess(max(opened), 10)  # type: ignore[attr-defined]

    def test_loopsUnmarked(self) -> None:
        """Without the mark the proxy dials itself, again and again, and the client is not served."""
        folder = os.path.join(self.rig.folder, "site")
        os.mkdir(folder)
        Path(folder, "sitecustomize.py").write_text(UNMARKED)
        daemon = self.start({"PYTHONPATH": folder})
        node = self.rig.address("n0")
        with self.rig.socketIn("p0a") as it:
            it.settimeout(10)
            it.connect((node, TCP))

            def descriptors() -> bool:
                return len(os.listdir(f"/proc/{daemon.pid}/fd")) > 200

            waitFor(descriptors, 10)
        self.assertNotEqual(self.ask("p0a", node, "UDP", 1), "served")  # type: ignore[attr-defined]


class NftablesLoopTests(Loops, TestCase):
    """By nftables."""

    writer = "nftables"


class PythonIptablesLoopTests(Loops, TestCase):
    """By python-iptables."""

    writer = "python-iptables"


class IptablesNftLoopTests(Loops, TestCase):
    """By iptables-restore over nf_tables."""

    writer = "iptables-nft"
