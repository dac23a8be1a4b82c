"""What packets come to under our rules: a pod, a host outside and the node itself, IPv4 and IPv6, TCP and UDP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.network import SmallRig
from tests.shared.echo import EchoServers, ask
from tests.shared.namespaces import canMakeNamespaces
from tests.shared.writers import key, many, same
from twisted_kproxy.core.rules import Guard, Rule, Ruleset, Target, Verdict, deltaBetween
from twisted_kproxy.core.values import FAMILIES, Family, FrontendKey, Locality, Protocol
from twisted_kproxy.netfilter.nftables import NftablesWriter

SOCKETS = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
CLUSTER = {"IPv4": "10.96.0.10", "IPv6": "fd00:10:96::10"}
EXTERNAL = {"IPv4": "203.0.113.5", "IPv6": "2001:db8:5::5"}
LOOPBACK = {"IPv4": "127.0.0.1", "IPv6": "::1"}
INSIDERS = ("10.244.0.0/16", "fd00:10:244::/56")
CLIENTS = ("p0a", "x", "n0")
EVERY: tuple[tuple[Family, Protocol], ...] = tuple((f, p) for f in FAMILIES for p in ("TCP", "UDP"))  # type: ignore[misc]


class TrafficTests(TestCase):
    """One node with rules, a pod on it, a host outside."""

    timeout = 120

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("this needs root and iproute2")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)
        self.rig.run("x", ["ip", "route", "add", "203.0.113.0/24", "via", self.rig.address("n0")])
        self.rig.run("x", ["ip", "-6", "route", "add", "2001:db8:5::/64", "via", self.rig.address("n0", 6)])
        self.servers = EchoServers(lambda family, kind: self.rig.socketIn("n0", family, kind))
        self.addCleanup(self.servers.close)
        self.ports: dict[tuple[Family, Protocol, str], int] = {}
        for family, protocol in EVERY:
            for name in ("cluster", "local"):
                port = self.servers.listen(name, SOCKETS[family], KINDS[protocol])
                self.ports[family, protocol, name] = port
        self.writer = self.makeWriter()

    def makeWriter(self, **options: Any) -> NftablesWriter:
        def opener(*arguments: int) -> socket.socket:
            with self.rig.open("n0"):
                return socket.socket(*arguments)

        writer = NftablesWriter(reactor, spawnPrefix=self.rig.argv("n0", ()), openSocket=opener, **options)
        self.addCleanup(writer.close)
        return writer

    def address(self, host: str, family: Family) -> str:
        return str(ip_address(self.rig.address(host, 4 if family == "IPv4" else 6)))

    def to(self, family: Family, protocol: Protocol, name: str = "cluster") -> Target:
        return Target(self.address("n0", family), self.ports[family, protocol, name])

    def ruleset(self, outside: Verdict | None = None, inside: Verdict | None = None) -> Ruleset:
        """A ClusterIP, a node port and an external IP; those two lead outsiders to ``local``."""
        rules = {}
        for family, protocol in EVERY:
            cluster, local = self.to(family, protocol), self.to(family, protocol, "local")
            rules[key(CLUSTER[family], 80, protocol)] = same(outside or cluster)
            for frontend in (key("", 30080, protocol, family), key(EXTERNAL[family], 443, protocol)):
                rules[frontend] = Rule(outside=outside or local, inside=inside or outside or cluster)
        guards = frozenset(Guard(family, protocol, port) for (family, protocol, _), port in self.ports.items())
        return Ruleset(rules, guards, locality=Locality(INSIDERS))

    def dialled(self, client: str) -> Iterator[tuple[Family, Protocol, str, int, str]]:
        """Everything that a client may dial, and who serves it."""
        for family, protocol in EVERY:
            external = "local" if client == "x" else "cluster"
            yield family, protocol, CLUSTER[family], 80, "cluster"
            yield family, protocol, EXTERNAL[family], 443, external
            yield family, protocol, self.address("n0", family), 30080, external
            if client == "n0":
                yield family, protocol, LOOPBACK[family], 30080, external

    def ask(self, client: str, family: Family, protocol: Protocol, address: str, port: int, timeout: float = 3) -> str:
        return ask(self.rig.socketIn(client, SOCKETS[family], KINDS[protocol]), address, port, timeout)

    def askAll(self, client: str, timeout: float = 3) -> dict[str, str]:
        return {
            f"{protocol} {address}:{port} from {client}": self.ask(client, family, protocol, address, port, timeout)
            for family, protocol, address, port, _name in self.dialled(client)
        }

    def assertAll(self, expected: str, timeout: float = 3, slowest: float = 1.0) -> None:
        for client in CLIENTS:
            for family, protocol, address, port, _name in self.dialled(client):
                begun = time.monotonic()
                answer = self.ask(client, family, protocol, address, port, timeout)
                what = f"{protocol} {address}:{port} from {client}"
                self.assertEqual((what, answer), (what, expected))
                self.assertLess(time.monotonic() - begun, slowest, what)

    async def test_served(self) -> None:
        """Every frontend is served for everybody who can dial it, and the proxy sees the client's own address."""
        await self.writer.replace(self.ruleset())
        for client in CLIENTS:
            for family, protocol, address, port, name in self.dialled(client):
                answer = self.ask(client, family, protocol, address, port)
                what = f"{protocol} {address}:{port} from {client}"
                self.assertEqual((what, answer.split()[0]), (what, name))
                if client != "n0":
                    self.assertEqual((what, answer.split()[1]), (what, self.address(client, family)))

    async def test_refused(self) -> None:
        """Without endpoints every frontend refuses at once, and goes on doing so as often as it is asked."""
        await self.writer.replace(self.ruleset("reject"))
        self.assertAll("refused")
        for client in CLIENTS:
            begun = time.monotonic()
            for _n in range(20):
                self.assertEqual(self.ask(client, "IPv4", "TCP", CLUSTER["IPv4"], 80), "refused")
            self.assertLess(time.monotonic() - begun, 1.0, client)

    async def test_refusedWithoutForwarding(self) -> None:
        """The same on a node that does not forward."""
        self.rig.run("n0", ["sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"])
        # Turning it off takes routes learnt as a router with it; those that were set stay.
        await self.writer.replace(self.ruleset("reject"))
        self.assertAll("refused")

    async def test_dropped(self) -> None:
        """Dropped packets are not answered."""
        await self.writer.replace(self.ruleset("drop"))
        self.assertAll("timeout", timeout=0.1)

    async def test_outsidersAlone(self) -> None:
        """Without local endpoints outsiders are not answered; pods and the node are served by the others."""
        full = self.ruleset()
        rules = {it: Rule("drop", rule.inside) if it.port != 80 else rule for it, rule in full.rules.items()}
        await self.writer.replace(Ruleset(rules, full.guards, locality=Locality(INSIDERS)))
        for client in CLIENTS:
            for family, protocol, address, port, name in self.dialled(client):
                answer = self.ask(client, family, protocol, address, port, 0.2 if client == "x" else 3)
                what = f"{protocol} {address}:{port} from {client}"
                expected = "timeout" if client == "x" and port != 80 else name
                self.assertEqual((what, answer.split()[0]), (what, expected))

    async def test_insidersAlone(self) -> None:
        """The other way round: pods and the node are refused where outsiders are served."""
        full = self.ruleset()
        rules = {it: Rule(rule.outside, "reject") if it.port != 80 else rule for it, rule in full.rules.items()}
        await self.writer.replace(Ruleset(rules, full.guards, locality=Locality(INSIDERS)))
        for client in CLIENTS:
            for family, protocol, address, port, name in self.dialled(client):
                answer = self.ask(client, family, protocol, address, port)
                what = f"{protocol} {address}:{port} from {client}"
                expected = "refused" if client != "x" and port != 80 else name
                self.assertEqual((what, answer.split()[0]), (what, expected))

    async def test_steps(self) -> None:
        """A frontend that loses its endpoints refuses from then on; one that gets some serves."""
        served, refused = self.ruleset(), self.ruleset("reject")
        await self.writer.replace(served)
        for ruleset, expected in ((refused, "refused"), (served, "cluster"), (refused, "refused")):
            old = await self.writer.adopt()
            await self.writer.apply(deltaBetween(old, ruleset))
            for family in FAMILIES:
                for client in CLIENTS:
                    answer = self.ask(client, family, "TCP", CLUSTER[family], 80)
                    self.assertEqual(answer.split()[0], expected)

    async def test_guards(self) -> None:
        """The proxy's own ports can be reached through a service only."""
        await self.writer.replace(self.ruleset())
        for family, protocol in EVERY:
            port = self.ports[family, protocol, "cluster"]
            places = [(client, self.address("n0", family)) for client in CLIENTS] + [("n0", LOOPBACK[family])]
            for client, address in places:
                what = f"{protocol} {address}:{port} from {client}"
                self.assertEqual((what, self.ask(client, family, protocol, address, port)), (what, "refused"))
            self.assertIn("cluster", self.ask("p0a", family, protocol, CLUSTER[family], 80))
        await self.writer.replace(Ruleset(self.ruleset().rules))
        self.assertIn("cluster", self.ask("x", "IPv4", "TCP", self.address("n0", "IPv4"), self.to("IPv4", "TCP").port))

    async def test_onlyTheNode(self) -> None:
        """A node port is a port of the node: the same port of another host is left alone."""
        await self.writer.replace(self.ruleset())
        self.rig.run("x", ["ip", "route", "add", "10.244.0.0/16", "via", self.rig.address("n0")])
        self.assertEqual(self.ask("p0a", "IPv4", "TCP", self.address("x", "IPv4"), 30080), "refused")
        beside = EchoServers(lambda family, kind: self.rig.socketIn("x", family, kind))
        self.addCleanup(beside.close)
        beside.listen("beside", socket.AF_INET, socket.SOCK_STREAM, 30080)
        self.assertIn("beside", self.ask("p0a", "IPv4", "TCP", self.address("x", "IPv4"), 30080))

    async def test_refusedAddressOfTheNode(self) -> None:
        """An address of the node that is refused is refused, also where its port is another service's node port."""
        for refusal, answer in (("reject", "refused"), ("drop", "timeout")):
            rules: dict[FrontendKey, Rule] = {}
            for family, protocol in EVERY:
                rules[key(self.address("n0", family), 30080, protocol)] = same(refusal)  # type: ignore[arg-type]
                rules[key("", 30080, protocol, family)] = same(self.to(family, protocol))
            await self.writer.replace(Ruleset(rules, self.ruleset().guards, locality=Locality(INSIDERS)))
            for family, protocol in EVERY:
                for client in CLIENTS:
                    found = self.ask(client, family, protocol, self.address("n0", family), 30080, 0.2)
                    self.assertEqual((client, family, protocol, found), (client, family, protocol, answer))
                self.assertIn("cluster", self.ask("n0", family, protocol, LOOPBACK[family], 30080))

    async def test_halfRefusedAddressOfTheNode(self) -> None:
        """The same where only insiders, or only outsiders, are refused."""
        for inside in (True, False):
            rules: dict[FrontendKey, Rule] = {}
            for family, protocol in EVERY:
                local = self.to(family, protocol, "local")
                rule = Rule(outside=local, inside="reject") if inside else Rule(outside="reject", inside=local)
                rules[key(self.address("n0", family), 30080, protocol)] = rule
                rules[key("", 30080, protocol, family)] = same(self.to(family, protocol))
            await self.writer.replace(Ruleset(rules, self.ruleset().guards, locality=Locality(INSIDERS)))
            for family, protocol in EVERY:
                for client in CLIENTS:
                    found = self.ask(client, family, protocol, self.address("n0", family), 30080, 2)
                    served = (client == "x") == inside
                    expected = "local" if served else "refused"
                    self.assertEqual((client, protocol, found.split()[0]), (client, protocol, expected))

    async def test_establishedGoesOn(self) -> None:
        """What is established goes on when its frontend is refused or goes."""
        listening = self.rig.socketIn("n0")
        self.addCleanup(listening.close)
        listening.bind(("", 0))
        listening.listen()
        held = key("10.96.0.77", 77)
        await self.writer.replace(
            Ruleset({held: same(Target(self.rig.address("n0"), listening.getsockname()[1]))})
        )
        client = self.rig.connect("p0a", ("10.96.0.77", 77))
        self.addCleanup(client.close)
        server, _address = listening.accept()
        self.addCleanup(server.close)
        for ruleset in (Ruleset({held: same("reject")}), Ruleset({held: same("drop")}), Ruleset()):
            await self.writer.replace(ruleset)
            client.sendall(b"still")
            server.settimeout(3)
            self.assertEqual(server.recv(16), b"still")
            server.sendall(b"there")
            self.assertEqual(client.recv(16), b"there")

    async def test_resyncUnderLoad(self) -> None:
        """While all rules are written anew, again and again, no client fails."""
        await self._hammered(self.writer)

    async def test_resyncUnderLoadByTool(self) -> None:
        """The same where nft writes the elements."""
        await self._hammered(self.makeWriter(useNetlink=False))

    async def _hammered(self, writer: NftablesWriter) -> None:
        mine = self.ruleset()
        rulesets = [
            Ruleset({**many(2000, port).rules, **mine.rules}, mine.guards, locality=Locality(INSIDERS))
            for port in (20000, 30000)
        ]
        await writer.replace(rulesets[0])
        failed: list[str] = []
        served = 0
        ending = threading.Event()

        def hammer() -> None:
            nonlocal served
            while not ending.is_set():
                for client in ("p0a", "x"):
                    answer = self.ask(client, "IPv4", "TCP", CLUSTER["IPv4"], 80)
                    if answer.startswith("cluster"):
                        served += 1
                    else:
                        failed.append(answer)

        thread = threading.Thread(target=hammer)
        thread.start()
        try:
            for n in range(15):
                await writer.replace(rulesets[(n + 1) % 2])
        finally:
            ending.set()
            thread.join(10)
        self.assertEqual(failed, [])
        self.assertGreater(served, 20)
