"""What packets come to under the rules of the legacy tables: the same as under those of nf_tables."""

from __future__ import annotations

import threading
from typing import Any

from twisted.internet import reactor

from tests.integration import test_nftables_traffic as traffic
from tests.integration.test_iptables import missing
from tests.shared.writers import key, same
from twisted_kproxy.core.rules import Delta, Rule, Ruleset
from twisted_kproxy.netfilter.iptables import IptablesWriter
from twisted_kproxy.netfilter.iptrestore import RestoreWriter


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


class RestoreLegacyTrafficTests(IptablesTrafficTests):
    """The same chains, written by iptables-legacy-restore."""

    def makeWriter(self, **options: Any) -> Any:
        writer = RestoreWriter(reactor, self.variant, spawnPrefix=self.rig.argv("n0", ()))
        self.addCleanup(writer.close)
        return writer


class RestoreNftTrafficTests(RestoreLegacyTrafficTests):
    """The same chains over nf_tables."""

    variant = "nft"
