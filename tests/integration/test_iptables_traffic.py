"""What packets come to under the rules of the legacy tables: the same as under those of nf_tables."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from twisted.internet import reactor

from tests.integration import test_nftables_traffic as traffic
from tests.integration.test_iptables import missing
from tests.shared.writers import key, same
from twisted_kproxy.core.rules import Delta, Rule, Ruleset, deltaBetween
from twisted_kproxy.core.values import Family, FrontendKey, Locality, Protocol
from twisted_kproxy.netfilter.xt.restore import RestoreWriter
from twisted_kproxy.netfilter.xt.writer import IptablesWriter


class IptablesTrafficTests(traffic.TrafficTests):
    """One node with rules, a pod on it, a host outside."""

    skip = missing()
    variant: Any = "legacy"

    def setUp(self) -> None:
        super().setUp()
        # The outside host is also the node's way out. That the node tells it so counts against the few ICMP messages
        # that it sends to a host per second, before any rule of the legacy tables can refuse something.
        for interface in ("all", "eth0"):
            self.rig.run("n0", ["sysctl", "-qw", f"net.ipv4.conf.{interface}.send_redirects=0"])

    def makeWriter(self, **options: Any) -> Any:
        writer = IptablesWriter(reactor, spawnPrefix=self.rig.argv("n0", ()))
        self.addCleanup(writer.close)
        return writer

    async def test_refusedWithoutForwarding(self) -> None:
        """
        The legacy tables can refuse only what reaches INPUT, FORWARD or OUTPUT: on a node that does not forward,
        others who dial a refused cluster IP get no answer. The node itself, and who dials a node port, do.
        """
        self.rig.run("n0", ["sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"])
        await self.writer.replace(self.ruleset("reject"))
        for family, protocol, address, port, _name in self.dialled("n0"):
            self.assertEqual(self.ask("n0", family, protocol, address, port), "refused")
        for client in ("p0a", "x"):
            self.assertEqual(self.ask(client, "IPv4", "TCP", self.address("n0", "IPv4"), 30080), "refused")
            self.assertEqual(self.ask(client, "IPv4", "TCP", traffic.CLUSTER["IPv4"], 80, 0.2), "timeout")

    async def test_refusedAndDropped(self) -> None:
        """Where insiders and outsiders are both not served, each is not served in his own way."""
        for outside, inside in (("reject", "drop"), ("drop", "reject")):
            await self.writer.replace(self.ruleset(outside, inside))  # type: ignore[arg-type]
            for client in traffic.CLIENTS:
                expected = outside if client == "x" else inside
                for family, protocol, address, port, _name in self.dialled(client):
                    if port != 80:
                        timeout = 2 if expected == "reject" else 0.1
                        answer = self.ask(client, family, protocol, address, port, timeout)
                        what = f"{protocol} {address}:{port} from {client}"
                        self.assertEqual((what, answer), (what, "refused" if expected == "reject" else "timeout"))

    async def test_closedFirewall(self) -> None:
        """A node whose firewall lets nothing in but what is established serves services all the same."""
        for tool in (f"iptables-{self.variant}", f"ip6tables-{self.variant}"):
            established = ["-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"]
            self.rig.run("n0", [tool, "-A", "INPUT", *established])
            self.rig.run("n0", [tool, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT"])
            if tool.startswith("ip6"):
                self.rig.run("n0", [tool, "-A", "INPUT", "-p", "icmpv6", "-j", "ACCEPT"])
            self.rig.run("n0", [tool, "-P", "INPUT", "DROP"])
        await self.writer.replace(self.ruleset())
        for client in ("p0a", "x"):
            for family, protocol, address, port, name in self.dialled(client):
                answer = self.ask(client, family, protocol, address, port)
                self.assertEqual((client, address, port, answer.split()[0]), (client, address, port, name))

    async def test_resyncUnderLoadByTool(self) -> None:
        """While other frontends come and go step by step, no client fails."""
        mine = self.ruleset()
        await self.writer.replace(mine)
        answers: list[str] = []
        ending = threading.Event()

        def hammer() -> None:
            while not ending.is_set():
                answers.append(self.ask("p0a", "IPv4", "TCP", traffic.CLUSTER["IPv4"], 80).split()[0])

        thread = threading.Thread(target=hammer)
        thread.start()
        try:
            for n in range(100):
                come, go = key("10.96.9.9", 1000 + n), key("10.96.9.9", 999 + n)
                await self.writer.apply(Delta({come: same(self.to("IPv4", "TCP")), go: None}))
        finally:
            ending.set()
            thread.join(10)
        self.assertEqual(set(answers), {"cluster"})

    async def test_addressOfTheNode(self) -> None:
        """A load balancer's IP that is an address of the node is served as such, before node ports are looked at."""
        served = key(self.address("n0", "IPv4"), 30080)
        rules = {
            served: same(self.to("IPv4", "TCP")),
            key("", 30080, "TCP", "IPv4"): Rule("drop", "drop"),
        }
        await self.writer.replace(Ruleset(rules, self.ruleset().guards))
        for client in traffic.CLIENTS:
            self.assertIn("cluster", self.ask(client, "IPv4", "TCP", self.address("n0", "IPv4"), 30080))

    async def test_unknownPorts(self) -> None:
        """
        What is sent to a Service's address, and belongs to no frontend, is refused, echo requests too. On a node that
        does not forward that holds for the node itself.
        """
        await self.writer.replace(self.ruleset())
        for forwarding in (True, False):
            if not forwarding:
                self.rig.run("n0", ["sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"])
            expected = {it: "refused" if forwarding or it == "n0" else "timeout" for it in traffic.CLIENTS}
            for family, protocol in traffic.EVERY:
                self.assertAnswers(expected, family, protocol, traffic.CLUSTER[family], 81)
            for client, answer in expected.items():
                found = self.ping(client, "IPv4", traffic.CLUSTER["IPv4"], 0.3 if answer == "timeout" else 3)
                self.assertEqual((client, found), (client, answer))

    def asked(self, client: str, places: Iterable[tuple[Family, Protocol, str, int]]) -> set[str]:
        """What a client comes to at all of these: all of the answers, without addresses."""
        return {self.ask(client, *place, timeout=0.4 if self.quiet else 3).split()[0] for place in places}

    quiet = False

    async def test_sourcesOfTheNodesAddress(self) -> None:
        """
        Source ranges hold on a node that has the frontend's address itself, and whose node port another service has:
        who is not in them reaches neither that, nor what listens there.
        """
        rules: dict[FrontendKey, Rule] = {}
        for family, protocol in traffic.EVERY:
            sources = ("10.244.0.0/16",) if family == "IPv4" else ("fd00:10:244::/56",)
            own = self.address("n0", family)
            rules[key(own, 30080, protocol)] = same(self.to(family, protocol), sources)
            rules[key("", 30080, protocol, family)] = same(self.to(family, protocol, "local"))
            port = self.servers.listen("beside", traffic.SOCKETS[family], traffic.KINDS[protocol])
            rules[key(own, port, protocol)] = same(self.to(family, protocol), sources)
        await self.writer.replace(Ruleset(rules, self.ruleset().guards, locality=Locality(traffic.INSIDERS)))
        for client in traffic.CLIENTS:
            self.quiet = client != "p0a"
            places = [(it.family, it.protocol, it.address, it.port) for it in rules if it.address]
            self.assertEqual((client, self.asked(client, places)), (client, {"timeout" if self.quiet else "cluster"}))
        self.quiet = False
        loopback = [(f, p, traffic.LOOPBACK[f], 30080) for f, p in traffic.EVERY]
        self.assertEqual(self.asked("n0", loopback), {"local"})

    async def test_clusterIPs(self) -> None:
        """
        Unknown ports of a ClusterIP are refused at once, as often as one asks, whether its network is known or not;
        an address in the network that no Service has does not answer.
        """
        ruleset = self.ruleset()
        addresses = frozenset(traffic.CLUSTER.values())
        networks = ("10.96.0.0/16", "fd00:10:96::/112")
        for services in ((), networks):
            locality = Locality(traffic.INSIDERS, services=services)
            await self.writer.replace(Ruleset(ruleset.rules, ruleset.guards, addresses, locality))
            for client in traffic.CLIENTS:
                self.quiet = False
                known = [(f, p, traffic.CLUSTER[f], 80) for f, p in traffic.EVERY]
                self.assertEqual((client, self.asked(client, known)), (client, {"cluster"}))
                unknown = [(f, p, traffic.CLUSTER[f], 81) for f, p in traffic.EVERY]
                self.assertEqual((client, services, self.asked(client, unknown)), (client, services, {"refused"}))
                for _ in range(20):
                    self.assertEqual(self.ask(client, "IPv4", "TCP", traffic.CLUSTER["IPv4"], 82), "refused")
                self.quiet = True
                free = [(f, p, {"IPv4": "10.96.9.9", "IPv6": "fd00:10:96::99"}[f], 80) for f, p in traffic.EVERY]
                if services:
                    self.assertEqual((client, self.asked(client, free)), (client, {"timeout"}))
        # A step: the address goes with its last service, and is one of nobody's then.
        gone = Ruleset({}, ruleset.guards, frozenset(), Locality(traffic.INSIDERS, services=networks))
        await self.writer.apply(deltaBetween(Ruleset(ruleset.rules, ruleset.guards, addresses, gone.locality), gone))
        self.assertEqual(self.asked("p0a", [(f, p, traffic.CLUSTER[f], 81) for f, p in traffic.EVERY]), {"timeout"})

    async def test_refusedBeforeItsAddress(self) -> None:
        """A frontend that is dropped from some step on is, though its address was there before, to refuse the rest."""
        for services in ((), ("10.96.0.0/16",)):
            locality = Locality(traffic.INSIDERS, services=services)
            old = Ruleset({}, frozenset(), frozenset({"10.96.0.10"}), locality)
            await self.writer.replace(old)
            await self.writer.apply(Delta({key("10.96.0.10", 83): same("drop")}))
            self.assertEqual(self.ask("p0a", "IPv4", "TCP", "10.96.0.10", 83, 0.4), "timeout")
            self.assertEqual(self.ask("p0a", "IPv4", "TCP", "10.96.0.10", 84), "refused")


class RestoreLegacyTrafficTests(IptablesTrafficTests):
    """The same chains, written by iptables-legacy-restore."""

    def makeWriter(self, **options: Any) -> Any:
        writer = RestoreWriter(reactor, self.variant, spawnPrefix=self.rig.argv("n0", ()))
        self.addCleanup(writer.close)
        return writer


class RestoreNftTrafficTests(RestoreLegacyTrafficTests):
    """The same chains over nf_tables."""

    variant = "nft"
