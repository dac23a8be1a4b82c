"""
From objects in an API server to connections through real rules: the whole daemon on a node of namespaces, asked with
curl and datagrams, with each rule writer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from typing import Any, ClassVar
from unittest import SkipTest

from twisted.trial.unittest import TestCase

from tests.fakes.daemon import Backend
from tests.fakes.network import waitFor
from tests.integration.world import PORT, World, slices

PLACES = ("p0b", "n0", "x")
BOTH = {"p0a", "p1a"}
UDP = [{"name": "dns", "port": 53, "protocol": "UDP"}]
UDP_SLICE = [{"name": "dns", "port": PORT, "protocol": "UDP"}]


def brackets(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class EndToEnd:
    """What every writer must bring about. Names of services are the tests'."""

    writer: ClassVar[str]

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        self.world = World.get(self.writer)
        self.rig = self.world.rig

    def tearDown(self) -> None:
        self.world.daemon.assertNoTraceback()

    def expect(self, place: str, url: str, whom: set[str]) -> None:
        found = self.world.who(place, url)
        self.assertEqual(set(found), whom, f"{place} {url}: {found}")

    def expectRefused(self, place: str, url: str) -> None:
        """curl's exit code 7, and at once."""
        began = time.monotonic()
        answer = self.world.curl(place, url)
        self.assertEqual(answer, "curl 7", f"{place} {url}")
        self.assertLess(time.monotonic() - began, 4, f"{place} {url}")

    def frontends(self, it: Any) -> list[str]:
        """URLs of all that a Service made by :meth:`everything` can be dialled at."""
        spec = it["spec"]
        number = spec["ports"][0]["nodePort"]
        hosts = [*spec["clusterIPs"], *spec["externalIPs"]]
        hosts += [ingress["ip"] for ingress in it["status"]["loadBalancer"]["ingress"]]
        nodes = [self.rig.address("n0", 4), self.rig.address("n0", 6)]
        return [f"http://{brackets(h)}/" for h in hosts] + [f"http://{brackets(h)}:{number}/" for h in nodes]

    def everything(self, name: str, nodePort: int, last: int, *pods: str) -> Any:
        return self.world.make(
            name, *pods, type="LoadBalancer",
            ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": nodePort}],
            externalIPs=[f"10.96.200.{last}", f"fd00:10:96::c8{last:02x}"],
            status={"loadBalancer": {"ingress": [{"ip": f"10.96.201.{last}"}, {"ip": f"fd00:10:96::c9{last:02x}"}]}},
        )


class EndToEndTests(EndToEnd):
    """See :class:`EndToEnd`."""

    def test_everyFrontend(self) -> None:
        """ClusterIP, external IP, load balancer IP and node port, both families: from a pod, the node and outside."""
        it = self.everything("everyfrontend", 30101, 1, "p0a", "p1a")
        for url in self.frontends(it):
            for place in PLACES:
                self.expect(place, url, BOTH)
        self.expect("n0", "http://127.0.0.1:30101/", BOTH)

    def test_noEndpoints(self) -> None:
        """Without endpoints each frontend refuses at once, from everywhere; with an endpoint it serves again."""
        it = self.everything("noendpoints", 30102, 2)
        for url in self.frontends(it):
            for place in PLACES:
                self.expectRefused(place, url)
        self.world.endpoints("noendpoints", "p1a")
        for url in self.frontends(it):
            self.expect("p0b", url, {"p1a"})

    def test_udp(self) -> None:
        """A UDP Service: ClusterIP and node port, both families, from everywhere; answers come back from there."""
        it = self.world.make(
            "udp", "p0a", "p1a", type="NodePort", ports=[{**UDP[0], "nodePort": 30103}], slicePorts=UDP_SLICE
        )
        dialled = [(ip, 53) for ip in it["spec"]["clusterIPs"]]
        dialled += [(self.rig.address("n0", family), 30103) for family in (4, 6)]
        for host, number in dialled:
            for place in PLACES:
                answers = {self.world.ask(place, host, number) for _ in range(6)}
                self.assertEqual(answers, BOTH, f"{place} {host}:{number}")

    def test_udpFollowsEndpoints(self) -> None:
        """A client that keeps its port is moved when its endpoint leaves, and refused when all have left."""
        it = self.world.make("udpmoves", "p0a", ports=UDP, slicePorts=UDP_SLICE)
        client = self.rig.socketIn("p0b", socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(client.close)
        client.settimeout(3)
        client.connect((it["spec"]["clusterIP"], 53))

        def ask() -> str:
            client.send(b"x")
            return client.recv(100).split()[0].decode()

        self.assertEqual(ask(), "p0a")
        self.world.endpoints("udpmoves", "p1a", ports=UDP_SLICE)
        self.assertEqual(ask(), "p1a")
        self.world.endpoints("udpmoves", ports=UDP_SLICE)
        waitFor(lambda: self.refuses(client), 5)
        self.world.endpoints("udpmoves", "p0a", ports=UDP_SLICE)
        client.settimeout(1)
        waitFor(lambda: ask() == "p0a", 5)

    def refuses(self, client: socket.socket) -> bool:
        try:
            client.send(b"x")
            client.recv(100)
        except ConnectionRefusedError:
            return True
        return False

    def test_bigDatagrams(self) -> None:
        """Datagrams of 60 KB pass whole, both ways."""
        it = self.world.make("bigudp", "p1a", ports=UDP, slicePorts=UDP_SLICE)
        for ip in it["spec"]["clusterIPs"]:
            answer = self.world.ask("p0b", ip, 53, os.urandom(60_000))
            self.assertEqual(answer, "p1a")

    def test_apiServer(self) -> None:
        """A Service that would take the API server's own address and port gets all but that: the API stays."""
        address = self.rig.address("api")
        ports = [{"name": "http", "port": 6443, "protocol": "TCP"}]
        it = self.world.make("takesapi", "p0a", ports=ports, externalIPs=[address])
        self.expect("p0b", f"http://{it['spec']['clusterIP']}:6443/", {"p0a"})
        reason = f"{address}:6443 is where the API server is reached; it is not served"
        problems = self.world.status()["problems"]
        self.assertIn({"kind": "Service", "key": "default/takesapi", "reason": reason}, problems)
        self.assertEqual(self.rig.http("n0", f"http://{address}:6443/version")[0], 200)

    def test_endpointIsAFrontend(self) -> None:
        """
        An endpoint that is the Service's own ClusterIP, or a node port that leads back to it, is no loop: the client is
        refused or times out, no connection is left over, and the neighbours serve.
        """
        other = self.world.make("neighbour", "p1a")
        it = self.world.make("loop", type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30105}])
        host = it["spec"]["clusterIP"]
        for address, number in ((host, 80), (self.rig.address("n0"), 30105)):
            own = slices(self.rig, "loop", "p0a", ports=[{"name": "http", "port": number, "protocol": "TCP"}])[0]
            own["endpoints"][0]["addresses"] = [address]
            self.world.api.apply(own)
            self.world.settle(
                lambda status, wanted=f"{address}:{number}": wanted
                in status["services"]["default/loop:http/TCP/IPv4"]["cluster"]["endpoints"]
            )
            before = self.descriptors()
            self.assertIn("curl", self.world.curl("p0b", f"http://{host}/", 6))
            waitFor(lambda before=before: self.descriptors() <= before + 2, 10)
            self.expect("p0b", f"http://{other['spec']['clusterIP']}/", {"p1a"})

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.world.daemon.pid}/fd"))

    def test_killedBackend(self) -> None:
        """One of three backends is gone and nobody has told: no request fails, and all go to the other two."""
        it = self.world.make("killed", "p0a", "p0b", "p1a")
        url = f"http://{it['spec']['clusterIP']}/"
        self.expect("n0", url, {"p0a", "p0b", "p1a"})
        self.world.backends["p0b"].stop(signal.SIGKILL)
        try:
            found = self.world.who("n0", url, 30)
            self.assertEqual(set(found), BOTH)
        finally:
            self.world.backends["p0b"] = Backend(self.rig, "p0b", http=[PORT], udp=[PORT])
        status = self.world.daemon.get("http://127.0.0.1:10249/metrics")[2].decode()
        failed = re.search(r'failures_total\{[^}]*service="killed"[^}]*reason="refused"[^}]*\} (\d+)', status)
        assert failed is not None
        self.assertGreaterEqual(int(failed[1]), 10)

    def test_ownPortsAreClosed(self) -> None:
        """The proxy's sockets cannot be reached but through a service address: not from outside, pods or the node."""
        it = self.world.make("guarded", "p0a", type="NodePort",
                             ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30104}])
        listening = self.rig.run("n0", ["ss", "-Hltn"]).stdout
        ports = {int(line.split()[3].rsplit(":", 1)[1]) for line in listening.splitlines()} - {10249, 10256}
        self.assertTrue(ports)
        for number in sorted(ports)[:6]:
            for place in PLACES:
                for family in (4, 6):
                    self.expectRefused(place, f"http://{brackets(self.rig.address('n0', family))}:{number}/")
            self.expectRefused("n0", f"http://127.0.0.1:{number}/")
            self.expectRefused("n0", f"http://[::1]:{number}/")
        self.expect("x", f"http://{it['spec']['clusterIP']}/", {"p0a"})

    def test_renamedPortKeepsConnections(self) -> None:
        """Renaming a port, and changes of other Services, leave its open connections alone."""
        it = self.world.make("renamed", "p0a")
        client = self.rig.connect("p0b", (it["spec"]["clusterIP"], 80))
        self.addCleanup(client.close)

        def ask() -> bytes:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return client.recv(1000)

        self.assertIn(b"p0a", ask())
        it["spec"]["ports"][0]["name"] = "web"
        ports = [{"name": "web", "port": PORT, "protocol": "TCP"}]
        self.world.api.apply(it, *slices(self.rig, "renamed", "p0a", ports=ports))
        self.world.settle(lambda status: "default/renamed:web/TCP/IPv4" in status["services"])
        self.world.make("unrelated", "p1a")
        self.assertIn(b"p0a", ask())
        self.expect("p0b", f"http://{it['spec']['clusterIP']}/", {"p0a"})

    def test_changesUnderLoad(self) -> None:
        """Requests through a ClusterIP while endpoints come and go: none fails."""
        total, changes = 10_000, 100
        it = self.world.make("churn", "p0a", "p1a")
        stop = threading.Event()

        def churn() -> None:
            for number in range(changes):
                pods = (("p0a", "p1a"), ("p1a", "p0b"), ("p0b", "p0a"))[number % 3]
                self.world.api.apply(*slices(self.rig, "churn", *pods))
                if stop.wait(0.05):
                    return

        changer = threading.Thread(target=churn)
        changer.start()
        try:
            failed = self.hammer("p0b", it["spec"]["clusterIP"], total)
        finally:
            stop.set()
            changer.join()
        self.assertEqual(failed, [])

    def hammer(self, place: str, host: str, total: int) -> list[str]:
        """So many requests, each on its own connection, four at a time. Gives what went wrong."""
        failed: list[str] = []

        def work() -> None:
            for _ in range(total // 4):
                try:
                    with self.rig.connect(place, (host, 80)) as it:
                        it.sendall(b"GET / HTTP/1.0\r\n\r\n")
                        data = b""
                        while chunk := it.recv(1000):
                            data += chunk
                    if b"200 OK" not in data:
                        failed.append(repr(data))
                except OSError as error:
                    failed.append(repr(error))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for it in workers:
            it.start()
        for it in workers:
            it.join()
        return failed

    def test_yDrains(self) -> None:
        """
        While the daemon drains, new clients are refused at once and who is connected goes on; when he has gone, so has
        all. With no other rules on the node: connections must not depend on what others have set up.
        """
        it = self.world.make("drains", "p0a")
        host = it["spec"]["clusterIP"]
        url = f"http://{host}/"
        daemon = self.world.daemon
        client = self.rig.connect("p0b", (host, 80))
        self.addCleanup(client.close)

        def ask() -> bytes:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return client.recv(1000)

        self.assertIn(b"p0a", ask())
        daemon.process.send_signal(signal.SIGTERM)
        try:
            waitFor(lambda: self.world.curl("p0b", url) == "curl 7", 20)
            self.expectRefused("x", url)
            pages = [daemon.get(f"http://127.0.0.1:10256/{page}")[0] for page in ("healthz", "livez")]
            self.assertEqual(pages, [503, 200])
            sync = json.loads(daemon.get("http://127.0.0.1:10249/status")[2])["sync"]
            self.assertEqual((sync["stopping"], sync["inForce"]), (True, False))
            told = json.loads(daemon.get(f"http://127.0.0.1:10249/explain?to={host}:80")[2])["answers"]
            self.assertEqual({(it["notServed"], it["inForce"]) for it in told}, {("kproxy is stopping", False)})
            self.assertIn(b"p0a", ask())
            client.close()
            daemon.process.wait(30)
            self.assertNotIn("10.96.", self.rules())
            daemon.assertNoTraceback()
        finally:
            self.world.daemon = self.world.startDaemon()
        self.expect("p0b", url, {"p0a"})

    def test_zLastKilledAndStartedAgain(self) -> None:
        """
        After SIGKILL the rules are still there; the next run takes them over, its sockets on the same ports; a
        graceful end removes them all. (Named to be the last: the world ends with it.)
        """
        self.addCleanup(World.end)
        it = self.world.make("restart", "p0a", "p1a")
        url = f"http://{it['spec']['clusterIP']}/"
        before = self.rules()
        self.assertIn("10.96.", before)
        self.world.daemon.stop(signal.SIGKILL)
        self.assertEqual(self.rules(), before)
        self.expectRefused("p0b", url)
        self.world.daemon = self.world.startDaemon()
        self.expect("p0b", url, BOTH)
        self.assertEqual(self.rules(), before)
        daemon = self.world.daemon
        daemon.stop(signal.SIGTERM)
        try:
            self.assertNotIn("10.96.", self.rules())
            daemon.assertNoTraceback()
        finally:
            self.world.daemon = self.world.startDaemon()
        self.expect("p0b", url, BOTH)

    def rules(self) -> str:
        """All rules of the node in an order and without what counts."""
        raise NotImplementedError


class NftablesTests(EndToEndTests, TestCase):
    """With rules by nftables."""

    writer = "nftables"

    def rules(self) -> str:
        text = self.rig.run("n0", ["nft", "list", "ruleset"]).stdout
        return "\n".join(sorted(re.findall(r"[^,{}\n]+", re.sub(r"counter packets \d+ bytes \d+", "", text))))

    def test_bulkBothWays(self) -> None:
        """200 MB up, and the answer after the client's half-close; 200 MB down: byte for byte the same."""
        size = 200 << 20
        up = Backend(self.rig, "p1a", tcp=[8090], mode="half-close-reply", called="up")
        down = Backend(self.rig, "p1a", tcp=[8091], mode="source", called="down", options=["--bytes", str(size)])
        self.addCleanup(up.stop)
        self.addCleanup(down.stop)
        it = self.world.make(
            "bulk", "p1a",
            ports=[{"name": "up", "port": 80, "protocol": "TCP"}, {"name": "down", "port": 81, "protocol": "TCP"}],
            slicePorts=[{"name": "up", "port": 8090, "protocol": "TCP"},
                        {"name": "down", "port": 8091, "protocol": "TCP"}],
        )
        host = it["spec"]["clusterIP"]
        block, digest = os.urandom(1 << 20), hashlib.sha256()
        with self.rig.connect("p0b", (host, 80), 30) as client:
            for _ in range(size >> 20):
                client.sendall(block)
                digest.update(block)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1000).decode()
        self.assertIn(f"{size} {digest.hexdigest()}", answer)
        pattern, got = hashlib.sha256(), hashlib.sha256()
        whole = bytes(range(256)) * 4096
        for _ in range(size >> 20):
            pattern.update(whole)
        count = 0
        with self.rig.connect("p0b", (host, 81), 30) as client:
            while chunk := client.recv(1 << 18):
                got.update(chunk)
                count += len(chunk)
        self.assertEqual((count, got.hexdigest()), (size, pattern.hexdigest()))

    def test_memoryAfterManyConnections(self) -> None:
        """20,000 short connections leave the process as large as before (within a fifth), and no socket behind."""
        it = self.world.make("short", "p0a", "p1a")
        host = it["spec"]["clusterIP"]
        self.assertEqual(self.hammer("p0b", host, 2000), [])
        before, sockets = self.size()
        self.assertEqual(self.hammer("p0b", host, 20_000), [])
        waitFor(lambda: self.size()[1] <= sockets + 2, 10)
        self.assertLess(self.size()[0], before * 1.2)

    def size(self) -> tuple[int, int]:
        """Resident kilobytes and open file descriptors of the daemon."""
        pid = self.world.daemon.pid
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            found = re.search(r"VmRSS:\s+(\d+)", file.read())
        assert found is not None
        return int(found[1]), self.descriptors()


class PythonIptablesTests(EndToEndTests, TestCase):
    """With rules by python-iptables."""

    writer = "python-iptables"

    def rules(self) -> str:
        saved = [self.rig.run("n0", [tool]).stdout for tool in ("iptables-legacy-save", "ip6tables-legacy-save")]
        lines = [line for text in saved for line in text.splitlines() if not line.startswith(("#", ":"))]
        return "\n".join(sorted(lines))


class IptablesTests(EndToEndTests, TestCase):
    """With rules by iptables-restore, of whichever variant the node has."""

    writer = "iptables"

    def rules(self) -> str:
        saved = [self.rig.run("n0", [tool]).stdout for tool in ("iptables-save", "ip6tables-save")]
        lines = [line for text in saved for line in text.splitlines() if not line.startswith(("#", ":"))]
        return "\n".join(sorted(lines))
