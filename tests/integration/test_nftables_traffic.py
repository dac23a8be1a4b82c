"""What packets come to under our rules: a pod, a host outside and the node itself, IPv4 and IPv6, TCP and UDP."""

from __future__ import annotations

import itertools
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
from twisted_kproxy.core.rules import PROXY_MARK, Delta, Guard, Rule, Ruleset, Target, Verdict, deltaBetween
from twisted_kproxy.core.values import EVERYWHERE, FAMILIES, Family, FrontendKey, Locality, Protocol
from twisted_kproxy.netfilter.nft.writer import NftablesWriter
from twisted_kproxy.netfilter.ruleset import canonicalNetworks

SOCKETS = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
CLUSTER = {"IPv4": "10.96.0.10", "IPv6": "fd00:10:96::10"}
UNUSED = {"IPv4": "10.96.0.99", "IPv6": "fd00:10:96::99"}
EXTERNAL = {"IPv4": "203.0.113.5", "IPv6": "2001:db8:5::5"}
LOOPBACK = {"IPv4": "127.0.0.1", "IPv6": "::1"}
INSIDERS = ("10.244.0.0/16", "fd00:10:244::/56")
INSIDE = Locality(INSIDERS)
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
        self.held: list[socket.socket] = []
        self.fresh = itertools.count(20000)
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
        return Ruleset(rules, guards, frozenset(CLUSTER.values()), INSIDE)

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
        it = self.rig.socketIn(client, SOCKETS[family], KINDS[protocol])
        if protocol == "UDP":  # with the port of an earlier one it would belong to that flow, and go where that went
            it.bind(("", next(self.fresh)))
        return ask(it, address, port, timeout)

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
            for _n in range(20):
                begun = time.monotonic()
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
        await self.writer.replace(Ruleset(rules, full.guards, locality=INSIDE))
        for client in CLIENTS:
            for family, protocol, address, port, name in self.dialled(client):
                expected = "timeout" if client == "x" and port != 80 else name
                answer = self.ask(client, family, protocol, address, port, 0.2 if expected == "timeout" else 3)
                what = f"{protocol} {address}:{port} from {client}"
                self.assertEqual((what, answer.split()[0]), (what, expected))

    async def test_insidersAlone(self) -> None:
        """The other way round: pods and the node are refused where outsiders are served."""
        full = self.ruleset()
        rules = {it: Rule(rule.outside, "reject") if it.port != 80 else rule for it, rule in full.rules.items()}
        await self.writer.replace(Ruleset(rules, full.guards, locality=INSIDE))
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

    def assertAnswers(
        self, expected: dict[str, str], family: Family, protocol: Protocol, address: str, port: int
    ) -> None:
        """What each client gets there: who serves it, ``refused`` or ``timeout``."""
        found = {
            client: self.ask(client, family, protocol, address, port, 0.15 if answer == "timeout" else 3).split()[0]
            for client, answer in expected.items()
        }
        self.assertEqual((protocol, address, port, found), (protocol, address, port, expected))

    async def test_sources(self) -> None:
        """A frontend that is for some sources drops what all others send, inside, outside and the node itself."""
        full = self.ruleset()
        served = {client: "local" if client == "x" else "cluster" for client in CLIENTS}
        await self.writer.replace(full)
        for members in (("x",), ("p0a",), ("n0",), ("p0a", "x"), CLIENTS, ()):
            rules = {}
            for it, rule in full.rules.items():
                some = canonicalNetworks(self.address(client, it.family) for client in members)
                rules[it] = Rule(rule.outside, rule.inside, some) if it.address == EXTERNAL[it.family] else rule
            now = await self.writer.adopt()
            await self.writer.apply(deltaBetween(now, Ruleset(rules, full.guards, full.clusterIPs, INSIDE)))
            expected = {client: served[client] if client in members else "timeout" for client in CLIENTS}
            for family, protocol in EVERY:
                self.assertAnswers(expected, family, protocol, EXTERNAL[family], 443)
                self.assertAnswers(served, family, protocol, self.address("n0", family), 30080)

    async def test_sourcesOfNetworks(self) -> None:
        """Networks of all sizes; for one protocol and one port they say nothing of the others."""
        full = self.ruleset()
        everybody = {"p0a": "cluster", "x": "cluster", "n0": "cluster"}
        for networks, members in (
            ({"IPv4": ("10.244.0.0/16",), "IPv6": ("fd00:10:244::/56",)}, ("p0a",)),
            ({"IPv4": ("192.0.2.4/31",), "IPv6": ("2001:db8:2::4/127",)}, ("x",)),
            ({"IPv4": ("0.0.0.0/5", "192.0.0.0/3"), "IPv6": ("::/2",)}, ("x", "n0")),
            ({"IPv4": ("0.0.0.0/0",), "IPv6": ("::/0",)}, CLIENTS),
        ):
            rules: dict[FrontendKey, Rule] = {}
            for family, protocol in EVERY:
                to = self.to(family, protocol)
                rules[key(EXTERNAL[family], 443, protocol)] = same(to, networks[family])
                rules[key(EXTERNAL[family], 444, protocol)] = same(to)
                rules[key(CLUSTER[family], 443, protocol)] = same(to)
            rules[key(EXTERNAL["IPv4"], 443, "UDP")] = same(self.to("IPv4", "UDP"))
            await self.writer.replace(Ruleset(rules, full.guards, locality=INSIDE))
            expected = {client: "cluster" if client in members else "timeout" for client in CLIENTS}
            for family, protocol in EVERY:
                restricted = (family, protocol) != ("IPv4", "UDP")
                self.assertAnswers(expected if restricted else everybody, family, protocol, EXTERNAL[family], 443)
                self.assertAnswers(everybody, family, protocol, EXTERNAL[family], 444)
                self.assertAnswers(everybody, family, protocol, CLUSTER[family], 443)

    async def test_sourcesOfRefused(self) -> None:
        """Where nobody serves, those whom the frontend is for are refused; others hear nothing."""
        rules: dict[FrontendKey, Rule] = {}
        for family, protocol in EVERY:
            sources = canonicalNetworks([self.address("x", family)])
            rules[key(EXTERNAL[family], 443, protocol)] = same("reject", sources)
        await self.writer.replace(Ruleset(rules, locality=INSIDE))
        for family, protocol in EVERY:
            expected = {"x": "refused", "p0a": "timeout", "n0": "timeout"}
            self.assertAnswers(expected, family, protocol, EXTERNAL[family], 443)

    async def test_unknownPorts(self) -> None:
        """What is sent to a Service's address, and belongs to no frontend, is refused: any port, and echo requests."""
        await self.writer.replace(self.ruleset())
        refused = dict.fromkeys(CLIENTS, "refused")
        for forwarding in (1, 0):
            for family, protocol in EVERY:
                self.assertAnswers(refused, family, protocol, CLUSTER[family], 81)
                if forwarding:
                    self.assertAnswers(dict.fromkeys(CLIENTS, "cluster"), family, protocol, CLUSTER[family], 80)
            for family in FAMILIES:
                found = {client: self.ping(client, family, CLUSTER[family]) for client in CLIENTS}
                self.assertEqual((family, found), (family, refused))
                self.assertEqual(self.ping("x", family, self.address("n0", family)), "answered")
            self.rig.run("n0", ["sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"])

    async def test_unknownPortsOfTheNode(self) -> None:
        """The same where the node has that address: its own servers are not reached by it."""
        self.rig.run("n0", ["ip", "addr", "add", f"{CLUSTER['IPv4']}/32", "dev", "lo"])
        self.rig.run("n0", ["ip", "addr", "add", f"{CLUSTER['IPv6']}/128", "dev", "lo"])
        for family in FAMILIES:
            self.servers.listen("beside", SOCKETS[family], socket.SOCK_STREAM, 81)
            self.assertAnswers(dict.fromkeys(CLIENTS, "beside"), family, "TCP", CLUSTER[family], 81)
        await self.writer.replace(self.ruleset())
        for family in FAMILIES:
            self.assertAnswers(dict.fromkeys(CLIENTS, "refused"), family, "TCP", CLUSTER[family], 81)
            self.assertAnswers(dict.fromkeys(CLIENTS, "cluster"), family, "TCP", CLUSTER[family], 80)

    async def test_ownPacketsPass(self) -> None:
        """What the proxy itself sends is neither refused nor dropped, wherever it goes."""
        rules = {key(UNUSED[family], 8080): same("reject", ()) for family in FAMILIES}
        everything = Locality(services=EVERYWHERE)
        self.unused()
        for ruleset in (Ruleset(clusterIPs=frozenset(UNUSED.values())), Ruleset(rules), Ruleset(locality=everything)):
            await self.writer.replace(ruleset)
            for family in FAMILIES:
                it = self.rig.socketIn("n0", SOCKETS[family])
                it.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
                self.assertEqual(ask(it, UNUSED[family], 8080).split()[0], "beside")
                self.assertNotIn("beside", self.ask("n0", family, "TCP", UNUSED[family], 8080, 0.3))

    def unused(self) -> None:
        """Addresses of the services' networks that no Service has: the host outside serves there."""
        run = self.rig.run
        run("x", ["ip", "route", "add", "10.244.0.0/16", "via", self.rig.address("n0")])
        run("x", ["ip", "-6", "route", "add", "fd00:10:244::/56", "via", self.rig.address("n0", 6)])
        beside = EchoServers(lambda family, kind: self.rig.socketIn("x", family, kind))
        self.addCleanup(beside.close)
        for family, size in (("IPv4", 32), ("IPv6", 128)):
            run("x", ["ip", "addr", "add", f"{UNUSED[family]}/{size}", "dev", "lo"])
            for kind in KINDS.values():
                beside.listen("beside", SOCKETS[family], kind, 8080)

    async def test_unallocated(self) -> None:
        """An address of the services' networks that no Service has is not looked for elsewhere; open flows go on."""
        self.unused()
        full = self.ruleset()
        await self.writer.replace(full)
        for family, protocol in EVERY:
            self.assertAnswers({"p0a": "beside", "n0": "beside"}, family, protocol, UNUSED[family], 8080)
        opened = [self.rig.connect("p0a", (UNUSED[family], 8081)) for family in FAMILIES if self.hold(family)]
        await self.writer.apply(Delta(locality=Locality(INSIDERS, services=("10.96.0.0/16", "fd00:10:96::/112"))))
        for family, protocol in EVERY:
            self.assertAnswers({"p0a": "timeout", "n0": "timeout"}, family, protocol, UNUSED[family], 8080)
            self.assertAnswers(dict.fromkeys(CLIENTS, "cluster"), family, protocol, CLUSTER[family], 80)
            self.assertAnswers(dict.fromkeys(CLIENTS, "refused"), family, protocol, CLUSTER[family], 81)
        for family in FAMILIES:
            self.assertEqual(self.ping("p0a", family, UNUSED[family], 0.3), "timeout")
        for client, server in zip(opened, self.held, strict=True):
            with client, server.accept()[0] as other:
                client.sendall(b"still")
                other.settimeout(3)
                self.assertEqual(other.recv(16), b"still")

    def hold(self, family: Family) -> bool:
        """Somebody outside listens at the address that no Service has, and accepts later."""
        it = self.rig.socketIn("x", SOCKETS[family])
        self.addCleanup(it.close)
        it.bind((UNUSED[family], 8081))
        it.listen()
        self.held.append(it)
        return True

    async def test_ownAddressAmongServices(self) -> None:
        """An address that the node itself has is no unused one, even within the services' networks."""
        for family, size in (("IPv4", 32), ("IPv6", 128)):
            self.rig.run("n0", ["ip", "addr", "add", f"{UNUSED[family]}/{size}", "dev", "lo"])
            self.servers.listen("beside", SOCKETS[family], socket.SOCK_STREAM, 8080)
        locality = Locality(INSIDERS, services=("10.96.0.0/16", "fd00:10:96::/112"))
        await self.writer.replace(Ruleset(locality=locality))
        for family in FAMILIES:
            self.assertAnswers(dict.fromkeys(CLIENTS, "beside"), family, "TCP", UNUSED[family], 8080)

    async def test_nodePortAddresses(self) -> None:
        """Node ports are led, refused and dropped at those addresses of the node that are meant, and at no others."""
        full = self.ruleset()
        places: dict[str, list[tuple[Family, str]]] = {
            "lan": [("IPv4", self.address("n0", "IPv4")), ("IPv6", self.address("n0", "IPv6"))],
            "pods": [("IPv4", "10.244.0.1"), ("IPv6", "fd00:10:244::1")],
            "loopback": [("IPv4", "127.0.0.1"), ("IPv6", "::1")],
        }
        ways = {"served": self.ruleset(), "timeout": self.ruleset("drop")}
        for networks, meant in (
            (("192.0.2.0/24", "2001:db8:2::2/128"), ("lan",)),
            (("127.0.0.0/8", "::1/128"), ("loopback",)),
            (("10.244.0.1/32", "192.0.2.2/32", "2001:db8:2::/64", "fd00:10:244::/64"), ("lan", "pods")),
            ((), ()),
            (EVERYWHERE, ("lan", "pods", "loopback")),
        ):
            for way, ruleset in ways.items():
                locality = Locality(INSIDERS, nodePorts=networks)
                await self.writer.replace(Ruleset(ruleset.rules, full.guards, full.clusterIPs, locality))
                for place, addresses in places.items():
                    clients = {"lan": CLIENTS, "pods": ("p0a", "n0"), "loopback": ("n0",)}[place]
                    for family, address in addresses:
                        for protocol in KINDS:
                            expected = dict.fromkeys(clients, "cluster" if way == "served" else way)
                            if way == "served" and "x" in expected:
                                expected["x"] = "local"
                            if place not in meant:
                                expected = dict.fromkeys(clients, "refused")  # nobody listens there
                            self.assertAnswers(expected, family, protocol, address, 30080)  # type: ignore[arg-type]

    async def test_insiderLinks(self) -> None:
        """Who comes in by a link of pods is inside, whatever its address; the node itself always is."""
        full = self.ruleset()
        half = {it: Rule("drop", rule.inside) if it.port != 80 else rule for it, rule in full.rules.items()}
        await self.writer.replace(full)
        for links, inside in (
            (("cbr",), ("p0a", "n0")),
            (("cb*",), ("p0a", "n0")),
            (("eth0", "cbr"), CLIENTS),
            (("e*",), ("x", "n0")),
            (("cb", "cbr0", "eth0*"), ("x", "n0")),
            ((), ("n0",)),
        ):
            for rules, outside in ((full.rules, "local"), (half, "timeout")):
                step = Ruleset(rules, full.guards, full.clusterIPs, Locality(insiderLinks=links))
                await self.writer.apply(deltaBetween(await self.writer.adopt(), step))
                expected = {client: "cluster" if client in inside else outside for client in CLIENTS}
                for family, protocol in EVERY:
                    self.assertAnswers(expected, family, protocol, EXTERNAL[family], 443)
                    self.assertAnswers(expected, family, protocol, self.address("n0", family), 30080)

    def ping(self, client: str, family: Family, address: str, timeout: float = 3) -> str:
        """What becomes of an echo request: ``answered``, ``refused`` or ``timeout``."""
        protocol = socket.getprotobyname("icmp" if family == "IPv4" else "ipv6-icmp")
        with self.rig.open(client):
            it = socket.socket(SOCKETS[family], socket.SOCK_RAW, protocol)
        with it:
            it.settimeout(timeout)
            it.connect((address, 0))
            # Type, code, checksum (of this one; the kernel makes that of IPv6), identifier and number.
            request = b"\x08\0\xe7\xff\x10\0\0\0" if family == "IPv4" else b"\x80\0\0\0\x10\0\0\0"
            try:
                try:
                    it.send(request)
                except PermissionError:
                    pass  # as in ask()
                it.recv(200)
                return "answered"
            except ConnectionRefusedError:
                return "refused"
            except TimeoutError:
                return "timeout"

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
            await self.writer.replace(Ruleset(rules, self.ruleset().guards, locality=INSIDE))
            for family, protocol in EVERY:
                for client in CLIENTS:
                    patience = 0.2 if answer == "timeout" else 3
                    found = self.ask(client, family, protocol, self.address("n0", family), 30080, patience)
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
            await self.writer.replace(Ruleset(rules, self.ruleset().guards, locality=INSIDE))
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

    async def test_newTableUnderLoad(self) -> None:
        """The same where the whole table is made anew each time, since links of insiders come and go."""
        await self._hammered(self.writer, Locality(INSIDERS, ("cbr",)))

    async def _hammered(self, writer: NftablesWriter, other: Locality = INSIDE) -> None:
        """Pods are served all the time; outside, what is for pods alone is served to nobody, ever."""
        mine = self.ruleset()
        pods = {key(EXTERNAL["IPv4"], 443): same(self.to("IPv4", "TCP"), ("10.244.0.0/16",))}
        rules = [{**many(2000, port).rules, **mine.rules, **pods} for port in (20000, 30000)]
        rulesets = [
            Ruleset(it, mine.guards, mine.clusterIPs, locality)
            for it, locality in zip(rules, (INSIDE, other), strict=True)
        ]
        await writer.replace(rulesets[0])
        failed: list[str] = []
        served = 0
        ending = threading.Event()

        def hammer() -> None:
            nonlocal served
            while not ending.is_set():
                for client, address, port in (
                    ("p0a", CLUSTER["IPv4"], 80),
                    ("x", CLUSTER["IPv4"], 80),
                    ("p0a", EXTERNAL["IPv4"], 443),
                ):
                    answer = self.ask(client, "IPv4", "TCP", address, port)
                    if answer.startswith("cluster"):
                        served += 1
                    else:
                        failed.append(answer)
                if self.ask("x", "IPv4", "TCP", EXTERNAL["IPv4"], 443, 0.02) != "timeout":
                    failed.append("served outside")

        thread = threading.Thread(target=hammer)
        thread.start()
        try:
            n = 0
            while n < 15 or (served <= 20 and not failed):
                n += 1
                await writer.replace(rulesets[n % 2])
        finally:
            ending.set()
            thread.join(10)
        self.assertEqual(failed, [])
