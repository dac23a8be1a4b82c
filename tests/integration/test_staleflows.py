"""
UDP clients with a fixed source port, whose flows the kernel remembers: the whole daemon on a node of namespaces,
through everything that makes such flows stale.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from typing import Any
from unittest import SkipTest

from twisted.trial.unittest import TestCase

from tests.fakes.daemon import TWISTD
from tests.fakes.network import waitFor
from tests.integration.world import PORT, World, slices
from tests.shared.flows import plant

UDP = [{"name": "dns", "port": 53, "protocol": "UDP"}]
UDP_SLICE = [{"name": "dns", "port": PORT, "protocol": "UDP"}]
#: The end-to-end tests of Kubernetes give a client 60.
SECONDS = 20


class StaleFlowsTests(TestCase):
    """Each test has a Service of its own."""

    timeout = 120

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        self.world = World.get("nftables")
        self.rig = self.world.rig

    def tearDown(self) -> None:
        self.world.daemon.assertNoTraceback()

    def make(self, name: str, number: int, *pods: str) -> Any:
        return self.world.make(
            name, *pods, type="NodePort", ports=[{**UDP[0], "nodePort": number}], slicePorts=UDP_SLICE
        )

    def clients(self, service: Any) -> list[socket.socket]:
        """One for each frontend, in a pod and outside, each with the one port that it ever uses."""
        number = service["spec"]["ports"][0]["nodePort"]
        made = []
        for place, host, port in (
            *(("p0b", ip, 53) for ip in service["spec"]["clusterIPs"]),
            *(("x", self.rig.address("n0", family), number) for family in (4, 6)),
        ):
            it = self.rig.socketIn(place, socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
            self.addCleanup(it.close)
            it.connect((host, port))
            it.settimeout(0.2)
            made.append(it)
        return made

    def ask(self, client: socket.socket) -> str:
        """Who answers now; "" for nobody."""
        try:
            client.send(b"x")
            return client.recv(100).split()[0].decode()
        except OSError:
            return ""

    def reach(self, clients: list[socket.socket], whom: str) -> None:
        """All of them, who go on to send, are answered by that pod soon."""
        begun = time.monotonic()
        for it in clients:
            waitFor(lambda it=it: self.ask(it) == whom, SECONDS + begun - time.monotonic(), 0.05)  # type: ignore[misc]

    def flows(self, port: int) -> list[str]:
        """What the node's kernel remembers of flows to that port."""
        lines = []
        for family in ("ipv4", "ipv6"):
            argv = ["conntrack", "-L", "-p", "udp", "-f", family, "--orig-port-dst", str(port)]
            lines += self.rig.run("n0", argv).stdout.splitlines()
        return lines

    def led(self, port: int) -> list[str]:
        """Those of them that are led elsewhere."""
        ports = re.compile(r"dport=(\d+) .*sport=(\d+) ")
        return [line for line in self.flows(port) if (it := ports.search(line)) is not None and it[1] != it[2]]

    def kill(self) -> None:
        """The daemon dies without a word; its rules stay."""
        self.world.daemon.stop(signal.SIGKILL)

    def test_beforeEndpoints(self) -> None:
        """A client that sends before there are endpoints reaches the first one."""
        clients = self.clients(self.make("early", 30501))
        for it in clients:
            self.assertEqual(self.ask(it), "")
        self.world.endpoints("early", "p1a", ports=UDP_SLICE)
        self.reach(clients, "p1a")

    def test_beforeService(self) -> None:
        """A client that sends before there is even the Service."""
        it = self.rig.socketIn("p0b", socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(it.close)
        it.settimeout(0.2)
        soon = f"10.96.1.{next(self.world.numbers) + 1}"
        it.connect((soon, 53))
        self.assertEqual(self.ask(it), "")
        service = self.make("tooearly", 30502, "p1a")
        self.assertEqual(service["spec"]["clusterIP"], soon)
        self.reach([it], "p1a")

    def test_swap(self) -> None:
        """The endpoint is exchanged for another one, and back."""
        clients = self.clients(self.make("swapped", 30503, "p0a"))
        self.reach(clients, "p0a")
        for pod in ("p1a", "p0a"):
            self.world.endpoints("swapped", pod, ports=UDP_SLICE)
            self.reach(clients, pod)

    def test_deleted(self) -> None:
        """Of a Service that goes no flow is left that is led to us; one that comes in its place is reached."""
        service = self.make("deleted", 30504, "p0a")
        clients = self.clients(service)
        self.reach(clients, "p0a")
        self.world.api.delete(service)
        self.world.settle(lambda status: not any("deleted:" in key for key in status["services"]))
        for it in clients:
            self.ask(it)
        self.assertEqual(self.led(30504), [])
        again = dict(service, metadata={"name": "again", "namespace": "default"})
        self.world.api.apply(again)
        self.world.endpoints("again", "p1a", ports=UDP_SLICE)
        self.reach(clients, "p1a")

    def test_restarted(self) -> None:
        """
        The daemon dies; meanwhile one Service gets another endpoint, one is deleted, one is new. Clients never stop
        sending. Once the daemon is back they are served as things are now, and flows of the deleted one are gone.
        """
        services = {name: self.make(name, number, "p0a") for name, number in (("kept", 30505), ("gone", 30506))}
        kept, gone = self.clients(services["kept"]), self.clients(services["gone"])
        self.reach(kept + gone, "p0a")
        self.kill()
        for it in kept + gone:
            self.ask(it)
        self.assertTrue(self.flows(30506))
        self.world.api.delete(services["gone"])
        self.world.api.apply(*slices(self.rig, "kept", "p1a", ports=UDP_SLICE))
        self.world.daemon = self.world.startDaemon()
        self.reach(kept, "p1a")
        self.assertEqual(self.flows(30506), [], "flows that were led to a socket that is gone")
        shown = self.world.daemon.get("http://127.0.0.1:10249/metrics")[2].decode()
        count = shown.partition('kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv6"}')[2].split()[0]
        self.assertGreater(float(count), 0)
        self.assertIn('kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"}', shown)

    def test_rulesLost(self) -> None:
        """The daemon dies, and its rules are removed; clients send into the void. Once it is back they are served."""
        clients = self.clients(self.make("void", 30507, "p1a"))
        self.reach(clients, "p1a")
        self.kill()
        self.rig.run("n0", ["nft", "delete", "table", "inet", "kproxy"])
        for it in clients:
            self.ask(it)
        self.world.daemon = self.world.startDaemon()
        self.reach(clients, "p1a")

    def test_leftBehind(self) -> None:
        """
        A flow that the last run should have had forgotten is found at the start, though no rule is to be changed. Flows
        of others stay.
        """
        service = self.make("leftbehind", 30509, "p1a")
        clients = self.clients(service)
        self.reach(clients, "p1a")
        self.kill()
        ip, here = service["spec"]["clusterIP"], self.rig.address("n0")
        flows = [
            ("10.244.0.77", 5000, ip, 53, here, 9),  # led where nothing is
            ("10.244.0.77", 5001, ip, 53, ip, 53),  # never led anywhere
            ("10.244.0.77", 5002, ip, 54, "10.244.1.10", 54),  # to what is no frontend
            ("192.0.2.5", 5003, here, 30509, here, 30509),
            ("10.244.0.77", 5004, "198.51.100.7", 30509, "198.51.100.7", 30509),  # another host's port
        ]
        with self.rig.open("n0"):
            self.assertEqual(plant(socket.socket, flows), len(flows))
        self.world.daemon = self.world.startDaemon()
        self.world.daemon.waitUntil(lambda: "stale UDP flows were forgotten" in self.world.daemon.log())
        left = self.rig.run("n0", ["conntrack", "-L", "-p", "udp"]).stdout
        for number, stays in ((5000, False), (5001, False), (5002, True), (5003, False), (5004, True)):
            self.assertIs(f"sport={number} " in left, stays, number)
        self.reach(clients, "p1a")

    def test_stopped(self) -> None:
        """After it was stopped nothing is led to where its sockets were."""
        clients = self.clients(self.make("stopped", 30508, "p1a"))
        self.reach(clients, "p1a")
        self.world.daemon.stop()
        for it in clients:
            self.ask(it)
        self.assertEqual(self.led(30508), [])
        self.world.daemon = self.world.startDaemon()
        self.reach(clients, "p1a")

    def test_cleanedUp(self) -> None:
        """The same after a daemon that has died, once --cleanup has removed what it left."""
        clients = self.clients(self.make("cleaned", 30510, "p1a"))
        self.reach(clients, "p1a")
        self.kill()
        done = self.rig.run("n0", [sys.executable, TWISTD, "kproxy", "--cleanup"])
        self.assertRegex(done.stdout, r"\d+ UDP flows? to sockets of kproxy forgotten")
        for it in clients:
            self.ask(it)
        self.assertEqual(self.led(30510), [])
        self.world.daemon = self.world.startDaemon()
        self.reach(clients, "p1a")
