"""Forgetting UDP flows, on a real kernel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

from twisted.internet import reactor
from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.network import SmallRig, waitFor
from tests.shared.echo import EchoServers
from tests.shared.flows import plant
from tests.shared.namespaces import Namespace, canMakeNamespaces
from tests.shared.processor import spent
from tests.shared.writers import key, same
from twisted_kproxy.core.rules import Rule, Ruleset, Target
from twisted_kproxy.core.values import FAMILIES, Family, FrontendKey
from twisted_kproxy.netfilter.flows.conntrack import Flows, FlowsRemain
from twisted_kproxy.netfilter.nft.writer import NftablesWriter
from twisted_kproxy.netfilter.node import Localness
from twisted_kproxy.netfilter.tool import Tool, find

SOCKETS = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
CLUSTER = {"IPv4": "10.96.0.10", "IPv6": "fd00:10:96::10"}


class FlowsTests(TestCase):
    """A pod has UDP flows through the node, led by rules to sockets ``old`` and ``new``."""

    timeout = 60
    #: Flows that are led to where they belong are left alone.
    keeps = True

    async def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("this needs root and iproute2")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)
        self.servers = EchoServers(lambda family, kind: self.rig.socketIn("n0", family, kind))
        self.addCleanup(self.servers.close)
        self.ports = {
            (family, name): self.servers.listen(name, SOCKETS[family], socket.SOCK_DGRAM)
            for family in FAMILIES
            for name in ("old", "new")
        }
        self.writer = NftablesWriter(reactor, spawnPrefix=self.rig.argv("n0", ()), openSocket=self.opener)
        self.addCleanup(self.writer.close)
        self.flows = self.makeFlows()
        await self.lead("old")

    def opener(self, *arguments: int) -> socket.socket:
        with self.rig.open("n0"):
            return socket.socket(*arguments)

    def makeFlows(self) -> Flows:
        return Flows(reactor, openSocket=self.opener)

    def target(self, family: Family, name: str) -> Target:
        address = self.rig.address("n0", 4 if family == "IPv4" else 6)
        return Target(address, self.ports[family, name])

    async def lead(self, name: str) -> None:
        rules: dict[FrontendKey, Rule] = {}
        for family in FAMILIES:
            rules[key(CLUSTER[family], 53, "UDP")] = same(self.target(family, name))
            rules[key(CLUSTER[family], 54, "UDP")] = same(self.target(family, name))
            rules[key("", 30053, "UDP", family)] = same(self.target(family, name))
        await self.writer.replace(Ruleset(rules))

    def client(self, family: Family, address: str, port: int) -> socket.socket:
        it = self.rig.socketIn("p0a", SOCKETS[family], socket.SOCK_DGRAM)
        self.addCleanup(it.close)
        it.settimeout(3)
        it.connect((address, port))
        return it

    def says(self, it: socket.socket) -> str:
        it.send(b"who?")
        return it.recv(100).decode().split()[0]

    def each(self) -> Iterator[tuple[FrontendKey, socket.socket]]:
        for family in FAMILIES:
            node = self.rig.address("n0", 4 if family == "IPv4" else 6)
            yield key(CLUSTER[family], 53, "UDP"), self.client(family, CLUSTER[family], 53)
            yield key("", 30053, "UDP", family), self.client(family, node, 30053)

    async def test_moved(self) -> None:
        """A flow stays where it was led until it is forgotten, and then follows the rules."""
        clients = dict(self.each())
        others = [self.client(family, CLUSTER[family], 54) for family in FAMILIES]
        for it in (*clients.values(), *others):
            self.assertEqual(self.says(it), "old")
        await self.lead("new")
        for it in clients.values():
            self.assertEqual(self.says(it), "old")
        stale = {where: frozenset({self.target(where.family, "new")}) for where in clients}
        self.assertEqual(await self.flows.forget(stale), len(clients))
        for it in clients.values():
            self.assertEqual(self.says(it), "new")
        for it in others:
            self.assertEqual(self.says(it), "old", "a flow to another frontend was forgotten")
        self.assertEqual(await self.flows.forget(stale), 0 if self.keeps else len(clients))

    async def test_manyFrontends(self) -> None:
        """The same where so many frontends are stale that all flows are looked through."""
        clients = dict(self.each())
        other = self.client("IPv4", CLUSTER["IPv4"], 54)
        for it in (*clients.values(), other):
            self.assertEqual(self.says(it), "old")
        await self.lead("new")
        stale = {where: frozenset({self.target(where.family, "new")}) for where in clients}
        stale.update({key(f"10.96.1.{n}", 53, "UDP"): frozenset() for n in range(20)})
        stale.update({key(f"fd00:10:96::1:{n}", 53, "UDP"): frozenset() for n in range(20)})
        self.assertEqual(await self.flows.forget(stale), len(clients))
        for it in clients.values():
            self.assertEqual(self.says(it), "new")
        self.assertEqual(self.says(other), "old")

    async def test_hundreds(self) -> None:
        """Hundreds of flows to one frontend go, those of its neighbour stay."""
        clients = [self.client("IPv4", CLUSTER["IPv4"], 53) for _ in range(300)]
        others = [self.client("IPv4", CLUSTER["IPv4"], 54) for _ in range(100)]
        for it in (*clients, *others):
            self.assertEqual(self.says(it), "old")
        await self.lead("new")
        self.assertEqual(await self.flows.forget({key(CLUSTER["IPv4"], 53, "UDP"): frozenset()}), 300)
        self.assertEqual({self.says(it) for it in clients}, {"new"})
        self.assertEqual({self.says(it) for it in others}, {"old"})

    async def test_unledFlow(self) -> None:
        """A flow from before its frontend had rules is forgotten, so that it finds them."""
        await self.writer.replace(Ruleset())
        it = self.client("IPv4", CLUSTER["IPv4"], 53)
        it.send(b"lost")
        # The pod may have to look for the node first.
        waitFor(lambda: "dport=53 " in self.rig.run("n0", ["conntrack", "-L", "-p", "udp"]).stdout)
        await self.lead("new")
        self.assertEqual(await self.flows.forget({key(CLUSTER["IPv4"], 53, "UDP"): frozenset()}), 1)
        self.assertEqual(self.says(it), "new")

    async def test_otherHost(self) -> None:
        """A flow to the number of a node port on another host is none of ours."""
        servers = EchoServers(lambda family, kind: self.rig.socketIn("x", family, kind))
        self.addCleanup(servers.close)
        servers.listen("beside", socket.AF_INET, socket.SOCK_DGRAM, 30053)
        self.rig.run("x", ["ip", "route", "add", "10.244.0.0/16", "via", self.rig.address("n0")])
        it = self.client("IPv4", self.rig.address("x"), 30053)
        self.assertEqual(self.says(it), "beside")
        self.assertEqual(await self.flows.forget({key("", 30053, "UDP", "IPv4"): frozenset()}), 0)

    async def test_notUdp(self) -> None:
        """Frontends of other protocols are passed over."""
        self.assertEqual(await self.flows.forget({key(CLUSTER["IPv4"], 53, "TCP"): frozenset()}), 0)
        self.assertEqual(await self.flows.forget({}), 0)


class ManyFlowsTests(TestCase):
    """Flows that were planted: the kernel would not know them from real ones."""

    timeout = 120

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("this needs root and iproute2")
        self.space = Namespace("flows")
        self.addCleanup(self.space.delete)
        # Connections are tracked where something asks for it.
        chain = "chain c { type filter hook output priority 0; ct state new accept; }"
        self.space.run("nft", "-f", "-", stdin=f"table inet x {{ {chain}; }}")
        self.flows = Flows(reactor, openSocket=self.space.socket)

    def plant(self, count: int, dialled: Callable[[int], str], answering: str, net: str = "10.1") -> None:
        flows = (
            (f"{net}.{n // 250 % 250}.{n % 250 + 1}", 1024 + n // 62500, dialled(n), 53, answering, 40000)
            for n in range(count)
        )
        self.assertEqual(plant(self.space.socket, flows), count)

    def count(self, *filters: str) -> int:
        return len(self.space.run("conntrack", "-L", "-p", "udp", *filters).splitlines())

    async def test_amongHundredThousand(self) -> None:
        """
        Of a hundred thousand flows, two hundred to one frontend are found and deleted at less cost than the conntrack
        program has; and two hundred to as many frontends are, too.
        """
        self.plant(100_000, lambda n: f"10.97.{n % 4}.{n // 4 % 250 + 1}", "192.0.2.2")
        begun = spent()
        self.space.run("conntrack", "-D", "-p", "udp", "--orig-dst", "10.96.0.10", check=False)
        theirs = spent() - begun
        where = key("10.96.0.10", 53, "UDP")
        for keys in ([where], [key(f"10.96.1.{n + 1}", 53, "UDP") for n in range(200)]):
            self.plant(200, lambda n, keys=keys: keys[n % len(keys)].address, "192.0.2.3", "10.2")  # type: ignore[misc]
            begun = spent()
            self.assertEqual(await self.flows.forget({it: frozenset() for it in keys}), 200)
            if len(keys) == 1:
                self.assertLess(spent() - begun, theirs)
        self.assertEqual(int(self.space.run("conntrack", "-C")), 100_000)

    async def test_addressesOfSix(self) -> None:
        """
        Of two IPv6 frontends on one port, only the flows of the one that is stale go. (A kernel that compares IPv6
        addresses the wrong way round in its filter would give the others, if it were asked by address.)
        """
        addresses = ["fd00:10:96::10", "fd00:10:96::11"]
        flows = [(f"fd00:1::{n + 1:x}", 5000 + n, addresses[n % 2], 53, "2001:db8::2", 40000) for n in range(40)]
        self.assertEqual(plant(self.space.socket, flows), 40)
        self.assertEqual(await self.flows.forget({key(addresses[0], 53, "UDP"): frozenset()}), 20)
        self.assertEqual(self.count("-f", "ipv6", "-d", addresses[0]), 0)
        self.assertEqual(self.count("-f", "ipv6", "-d", addresses[1]), 20)

    async def test_ledRight(self) -> None:
        """Flows that are led where the frontend leads now stay, others go."""
        for n, answering in enumerate(("192.0.2.2", "192.0.2.3")):
            self.plant(50, lambda n: "10.96.0.10", answering, f"10.{n + 1}")
        stale = {key("10.96.0.10", 53, "UDP"): frozenset({Target("192.0.2.2", 40000)})}
        self.assertEqual(await self.flows.forget(stale), 50)
        self.assertEqual(self.count("-r", "192.0.2.2"), 50)
        self.assertEqual(self.count("-r", "192.0.2.3"), 0)


class ReconcileTests(TestCase):
    """A look at all flows of a namespace."""

    timeout = 120

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("this needs root and iproute2")
        self.space = Namespace("look")
        self.addCleanup(self.space.delete)
        chain = "chain c { type filter hook output priority 0; ct state new accept; }"
        self.space.run("nft", "-f", "-", stdin=f"table inet x {{ {chain}; }}")
        self.seen: list[tuple[Family, int]] = []
        self.flows = Flows(
            reactor, openSocket=self.space.socket, observe=lambda family, _s, count: self.seen.append((family, count))
        )

    def left(self) -> set[str]:
        """The clients whose flows are there."""
        found = set()
        for family in ("ipv4", "ipv6"):
            for line in self.space.run("conntrack", "-L", "-f", family).splitlines():
                found.add(line.split("src=")[1].split()[0])
        return found

    async def test_who(self) -> None:
        """
        What goes: flows to a frontend that are led elsewhere, or nowhere; to one without endpoints; from where nothing
        leads to a socket of ours any more. What stays: those led right, of other services, of other protocols, and to
        the number of a node port elsewhere.
        """
        self.space.run("sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1")  # as on nodes whose addresses move
        here, gone, pod = ("192.0.2.2", 40002), ("192.0.2.2", 40009), ("10.244.0.7", 53)
        planted = {
            "10.1.0.1": ("10.96.0.10", 53, *here),
            "10.1.0.2": ("10.96.0.10", 53, *gone),
            "10.1.0.3": ("10.96.0.10", 53, "10.96.0.10", 53),
            "10.1.0.4": ("10.96.0.11", 53, *here),
            "10.1.0.5": ("10.96.0.12", 53, *gone),
            "10.1.0.6": ("10.96.0.12", 53, *pod),
            "10.1.0.7": ("10.96.0.10", 54, *pod),
            "10.1.0.8": ("127.0.0.1", 30053, *gone),
            "10.1.0.9": ("203.0.113.77", 30053, "203.0.113.77", 30053),
            "10.1.0.10": ("203.0.113.77", 30054, *here),
            "10.1.0.11": ("224.0.0.251", 30053, "224.0.0.251", 30053),
            "fd01::1": ("fd00:10:96::10", 53, "2001:db8::2", 40002),
            "fd01::2": ("fd00:10:96::10", 53, "2001:db8::2", 40009),
        }
        count = plant(self.space.socket, ((client, 5000, *it) for client, it in planted.items()))
        self.assertEqual(count, len(planted))
        tcp = ["-p", "tcp", "-s", "10.1.0.20", "-d", "10.96.0.10", "--sport", "1", "--dport", "53", "--state"]
        self.space.run("conntrack", "-I", *tcp, "ESTABLISHED", "-t", "100")
        led = {
            key("10.96.0.10", 53, "UDP"): frozenset({Target(*here)}),
            key("10.96.0.11", 53, "UDP"): frozenset[Target](),
            key("", 30053, "UDP"): frozenset({Target(*here)}),
            key("fd00:10:96::10", 53, "UDP"): frozenset({Target("2001:db8::2", 40002)}),
            key("10.96.0.10", 53, "TCP"): frozenset[Target](),
        }
        goes = {f"10.1.0.{n}" for n in (2, 3, 4, 5, 8, 10)} | {"fd01::2"}
        self.assertEqual(await self.flows.reconcile(led, [Target(*here), Target(*gone)]), len(goes))
        self.assertEqual(self.left(), ({*planted} - goes) | {"10.1.0.20"})
        self.assertEqual(self.seen, [("IPv4", 6), ("IPv6", 1)])
        self.assertEqual(await self.flows.reconcile(led, [Target(*here), Target(*gone)]), 0)

    async def test_refused(self) -> None:
        """Where the kernel does not let us look, that is said."""

        def refused(*arguments: int) -> socket.socket:
            raise PermissionError(1, "Operation not permitted")

        flows = Flows(reactor, openSocket=refused)
        with self.assertRaises(FlowsRemain):
            await flows.reconcile({key("10.96.0.10", 53, "UDP"): frozenset()})

    def test_localness(self) -> None:
        """Which addresses are this node's: as the kernel's routes have it, broadcast and multicast not among them."""
        for line in (
            "link add eth0 type veth peer name eth1", "link set eth1 up", "link set eth0 up",
            "addr add 192.0.2.2/24 dev eth0", "-6 addr add 2001:db8::2/64 dev eth0 nodad",
            "-6 addr add fe80::77/64 dev eth0 nodad", "route add local 198.51.100.0/24 dev lo",
        ):  # fmt: skip
            self.space.run("ip", *line.split())
        self.space.run("sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1", "net.ipv6.ip_nonlocal_bind=1")
        localness = Localness(self.space.socket)
        self.addCleanup(localness.close)
        mine = "127.0.0.1 127.5.5.5 192.0.2.2 198.51.100.9 ::1 2001:db8::2 fe80::77"
        others = "192.0.2.3 192.0.2.255 255.255.255.255 224.0.0.1 203.0.113.1 2001:db8::3 2001:db8:9::1 fe80::1 ff02::1"
        for address in (*mine.split(), *others.split()):
            packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            self.assertIs(localness.isLocal(packed), address in mine.split(), address)


class FlowsByToolTests(FlowsTests):
    """The same by the conntrack program, where netlink does not work."""

    keeps = False

    def makeFlows(self) -> Flows:
        def refused(*arguments: int) -> socket.socket:
            raise PermissionError(1, "Operation not permitted")

        tool = Tool(reactor, find("conntrack", "conntrack"), self.rig.argv("n0", ()))
        return Flows(reactor, openSocket=refused, tool=tool)

    async def test_refused(self) -> None:
        """When the program fails too, that is said."""

        def refused(*arguments: int) -> socket.socket:
            raise PermissionError(1, "Operation not permitted")

        prefix = self.rig.argv("n0", ("setpriv", "--bounding-set", "-net_admin"))
        flows = Flows(reactor, openSocket=refused, tool=Tool(reactor, find("conntrack", "conntrack"), prefix))
        with self.assertRaises(FlowsRemain):
            await flows.forget({key(CLUSTER["IPv4"], 53, "UDP"): frozenset()})
