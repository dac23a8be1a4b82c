"""Forgetting UDP flows, on a real kernel."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from twisted.internet import reactor
from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.network import SmallRig
from tests.shared.echo import EchoServers
from tests.shared.namespaces import canMakeNamespaces
from tests.shared.writers import key, same
from twisted_kproxy.core.rules import Rule, Ruleset, Target
from twisted_kproxy.core.values import FAMILIES, Family, FrontendKey
from twisted_kproxy.netfilter.conntrack import Flows, FlowsRemain
from twisted_kproxy.netfilter.nftables import NftablesWriter
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
