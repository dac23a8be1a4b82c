"""The tracers of packets (:mod:`tests.fakes.tracer`): what they understand, and that they pass nothing over."""

from __future__ import annotations

from collections.abc import Iterable

from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.nfttracer import NftRules
from tests.fakes.tracer import Chain, Fate, NotUnderstood, Packet, trace
from tests.fakes.xttracer import IptablesRules

LOCAL = frozenset({"192.0.2.2", "2001:db8::2"})
NFT = """\
table inet t {{
\tset some {{ type ipv4_addr; flags interval; }}
\tset pairs {{ type ipv4_addr . inet_proto . inet_service . ipv4_addr; flags interval; }}
\tmap way {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
\tmap word {{ type inet_proto . inet_service : verdict; }}
\tchain other {{
\t\treject
\t}}
\tchain tested {{
\t\ttype filter hook prerouting priority raw; policy accept;
\t\t{}
\t}}
}}
add element inet t some {{ 10.0.0.0/8, 192.0.2.7 }}
add element inet t pairs {{ 10.1.0.1 . tcp . 80 . 198.51.100.0/24 }}
add element inet t way {{ 10.1.0.1 . tcp . 80 : 192.0.2.2 . 4000 }}
add element inet t word {{ tcp . 81 : goto other, udp . 81 : drop }}
"""
XT = """\
*nat
:OURS - [0:0]
-A OURS -d 10.1.0.1/32 -p tcp -m comment --comment "a b" -m tcp --dport 80 -j DNAT --to-destination 192.0.2.2:4000
-I PREROUTING 1 -j OURS
COMMIT
*filter
:MINE - [0:0]
-A MINE {}
-A INPUT -j MINE
-A FORWARD -j MINE
-A OUTPUT -j MINE
COMMIT
"""


def packet(address: str = "10.1.0.1", port: int = 80, source: str = "198.51.100.7", link: str = "eth0") -> Packet:
    return Packet(source, address, port, "TCP", link, LOCAL)


class WayTests(SynchronousTestCase):
    """The way of a packet through the hooks."""

    def run_(self, it: Packet, chains: Iterable[Chain] = ()) -> tuple[Fate, list[str]]:
        """Its fate, and the hooks that it came through."""
        seen: list[str] = []

        def chain(hook: str) -> Chain:
            return Chain(hook, 0, False, lambda _packet: (seen.append(hook), "accept")[1])  # type: ignore[func-returns-value, return-value]

        return trace([*map(chain, ("prerouting", "input", "forward", "output", "postrouting")), *chains], it), seen

    def test_hooks(self) -> None:
        """What is forwarded, comes in, goes out, and goes to the node from itself."""
        ways = {
            ("10.1.0.1", "eth0"): ["prerouting", "forward", "postrouting"],
            ("192.0.2.2", "eth0"): ["prerouting", "input"],
            ("10.1.0.1", ""): ["output", "postrouting"],
            ("127.0.0.1", ""): ["output", "postrouting", "prerouting", "input"],
        }
        for (address, link), hooks in ways.items():
            self.assertEqual(self.run_(packet(address, link=link))[1], hooks)

    def test_rewrittenOnce(self) -> None:
        """Rules about addresses are asked once for a connection; where it goes is decided after that."""

        def rewrite(it: Packet) -> str:
            it.address, it.port = "192.0.2.2", it.port + 1
            return "accept"

        chains = [Chain(hook, -100, True, rewrite) for hook in ("output", "prerouting")]  # type: ignore[arg-type]
        for link in ("", "eth0"):
            fate, seen = self.run_(packet(link=link), chains)
            self.assertEqual((fate.address, fate.port, fate.isHere, fate.rewritten), ("192.0.2.2", 81, True, True))
            self.assertEqual(seen[-1], "input")

    def test_order(self) -> None:
        """Chains of one hook are asked by priority; the first one that refuses ends it, in whichever hook."""
        verdicts = [Chain("forward", 5, False, lambda _: "drop"), Chain("forward", -5, False, lambda _: "reject")]
        fate, _ = self.run_(packet(), verdicts)
        self.assertEqual((fate.verdict, fate.hook), ("reject", "forward"))

    def test_unknownHook(self) -> None:
        """A chain in a hook that is not known is an error."""
        self.assertRaises(NotUnderstood, trace, [Chain("ingress", 0, False, lambda _: "accept")], packet())


class NftTests(SynchronousTestCase):
    """nf_tables."""

    def verdict(self, rule: str, it: Packet | None = None) -> str:
        return trace(NftRules(NFT.format(rule)).chains(), it or packet()).verdict

    def test_matches(self) -> None:
        """Each expression, where it is about the packet and where it is not."""
        holds = (
            "ct state new", "ct state { new, untracked }", "ct state != established", "ct status ! dnat",
            'iifname "eth0"', 'iifname "eth*"', 'iifname != "lo"', "meta nfproto ipv4", "meta l4proto { tcp, udp }",
            "meta l4proto != udp", "tcp dport 80", "th dport 1-100", "ip saddr 198.51.100.0/24", "ip daddr @some",
            "ip saddr != @some", "ip daddr . meta l4proto . th dport . ip saddr @pairs", "fib daddr type != local",
            "meta mark & 0x2000 != 0x2000", "counter",
        )  # fmt: skip
        fails = (
            "ct state established", "ct status dnat", 'iifname "lo"', "meta nfproto ipv6", "udp dport 80",
            "th dport 81", "ip6 saddr ::/0", "ip saddr @some",
            "ip daddr . meta l4proto . th dport . ip saddr != @pairs",
            "fib daddr type local", "meta mark & 0x2000 == 0x2000", "meta l4proto { udp, sctp }",
        )  # fmt: skip
        for rule in holds:
            self.assertEqual(self.verdict(f"{rule} drop"), "drop", rule)
        for rule in fails:
            self.assertEqual(self.verdict(f"{rule} drop"), "accept", rule)

    def test_verdicts(self) -> None:
        """Maps of verdicts, chains, and what ends a chain."""
        rule = "meta l4proto . th dport vmap @word"
        self.assertEqual(self.verdict(rule, packet(port=81)), "reject")
        self.assertEqual(self.verdict(rule), "accept")
        self.assertEqual(self.verdict("jump other"), "reject")
        self.assertEqual(self.verdict("return\n\t\tdrop"), "accept")
        self.assertEqual(self.verdict("meta l4proto udp accept\n\t\treject with tcp reset"), "reject")

    def test_dnat(self) -> None:
        """Addresses and ports are rewritten by a map; what is not in there goes on."""
        text = NFT.format("accept").replace(
            "filter hook prerouting priority raw", "nat hook prerouting priority dstnat"
        )
        text = text.replace("\t\taccept\n", "\t\tdnat ip to ip daddr . meta l4proto . th dport map @way\n\t\tdrop\n")
        fate = trace(NftRules(text).chains(), packet())
        self.assertEqual((fate.verdict, fate.address, fate.port, fate.isHere), ("accept", "192.0.2.2", 4000, True))
        self.assertEqual(trace(NftRules(text).chains(), packet(port=81)).verdict, "drop")

    def test_elements(self) -> None:
        """Elements go as they came; one that has no place in its set is an error."""
        text = NFT.format("ip daddr @some drop") + "delete element inet t some { 10.0.0.0/8 }\n"
        self.assertEqual(trace(NftRules(text).chains(), packet()).verdict, "accept")
        for element in ("some { 10.0.0.1 . tcp }", "way { 10.0.0.0/8 . tcp . 80 : 192.0.2.2 . 1 }"):
            self.assertRaises(NotUnderstood, NftRules, NFT.format("drop") + f"add element inet t {element}\n")

    def test_unknown(self) -> None:
        """What is not known is an error: an expression, a set, a chain, a hook, a line."""
        for rule in ("ip ttl 1 drop", "ip daddr @none drop", "masquerade", "limit rate 1/second drop", "queue"):
            self.assertRaises(NotUnderstood, NftRules, NFT.format(rule))
            self.assertRaises(NotUnderstood, NftRules, NFT.format(f"meta l4proto udp {rule}"))
        for text in (
            NFT.format("goto nowhere"),
            NFT.format("drop").replace("policy accept", "devices = 1"),
            "flowtable f",
        ):
            self.assertRaises(NotUnderstood, NftRules, text)


class IptablesTests(SynchronousTestCase):
    """ip_tables."""

    def verdict(self, rule: str, it: Packet | None = None) -> str:
        return trace(IptablesRules(4, XT.format(rule)).chains(), it or packet(port=81)).verdict

    def test_matches(self) -> None:
        """Each match, where it is about the packet and where it is not."""
        holds = (
            "-s 198.51.100.0/24", "! -s 10.0.0.0/8", "-d 10.1.0.1/32", "-p tcp -m tcp --dport 81", "-i eth0", "-i eth+",
            "-m addrtype ! --dst-type LOCAL", "-m conntrack --ctstate NEW", "-m conntrack ! --ctstate DNAT",
            "-m mark ! --mark 0x2000/0x2000",
        )  # fmt: skip
        fails = (
            "-s 10.0.0.0/8", "-p udp", "-p tcp -m tcp --dport 80", "! -i eth+", "-i eth",
            "-m addrtype --dst-type LOCAL",
            "-m addrtype --src-type LOCAL", "-m conntrack --ctstate ESTABLISHED", "-m mark --mark 0x2000/0x2000",
        )  # fmt: skip
        for rule in holds:
            self.assertEqual(self.verdict(f"{rule} -j DROP"), "drop", rule)
        for rule in fails:
            self.assertEqual(self.verdict(f"{rule} -j DROP"), "accept", rule)
        self.assertEqual(self.verdict("-j REJECT --reject-with tcp-reset"), "reject")
        self.assertEqual(self.verdict("-j RETURN"), "accept")

    def test_dnat(self) -> None:
        """Addresses and ports are rewritten before the filter is asked."""
        rule = "-m conntrack --ctstate DNAT -p tcp -m tcp --dport 4000 -j REJECT"
        self.assertEqual(self.verdict(rule, packet()), "reject")

    def test_otherFamily(self) -> None:
        """Tables of one family say nothing of packets of the other."""
        self.assertEqual(self.verdict("-j DROP", packet("2001:db8::7", source="2001:db8::9")), "accept")

    def test_unknown(self) -> None:
        """What is not known is an error: a match, a target, a chain, a line."""
        for rule in (
            "-m limit --limit 1/s -j DROP",
            "--sport 1 -j DROP",
            "-j MARK --set-mark 1",
            "-j NOWHERE",
            "-p tcp",
        ):
            self.assertRaises(NotUnderstood, self.verdict, rule)
        for text in ("-A INPUT -j DROP\n", "*nat\n-R INPUT 1 -j DROP\nCOMMIT\n"):
            self.assertRaises(NotUnderstood, IptablesRules, 4, text)
