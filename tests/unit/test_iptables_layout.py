"""Rules as bytes of ip_tables, and rulesets as its chains."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import NODE4, NODE6, SAMPLE, key, many, same, to
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset, Target, applied, deltaBetween
from twisted_kproxy.core.values import EVERYWHERE, FAMILIES, Family, FrontendKey, Locality
from twisted_kproxy.netfilter.ruleset import Invalid
from twisted_kproxy.netfilter.xtbytes import (
    ACCEPT,
    DROP,
    HEAD,
    REJECT,
    RESET,
    RETURN,
    Entry,
    UnknownBytes,
    normalised,
    pack,
    parse,
    sanitised,
)
from twisted_kproxy.netfilter.xtlayout import (
    CHAINS,
    CLUSTER_IPS,
    GUARD,
    INSIDERS,
    JUMPS,
    NO_PORT,
    PORTALS_CONTAINER,
    PORTALS_HOST,
    REFUSE,
    TABLES,
    Content,
    Place,
    frontendOf,
    placeOf,
    render,
    ruleEntries,
)
from twisted_kproxy.netfilter.xtread import joined, reconstruct
from twisted_kproxy.netfilter.xtsteps import editsOf, flat, mendOf
from twisted_kproxy.netfilter.xttext import entryOf, textOf
from twisted_kproxy.netfilter.xtvalid import check

#: What libxtables 1.8.9 makes of ``-s 10.1.0.0/16 -d 10.0.0.1 -p tcp -m comment --comment "kproxy x" -m tcp --dport 80
#: -j DNAT --to-destination 192.168.0.9:4000``.
DNAT4 = (
    "0a0100000a000001ffff0000ffffffff" + "00" * 64 + "06000000" + "00000000" + "c0011002" + "00" * 20
    + "2001" + b"comment".hex() + "00" * 23 + b"kproxy x".hex() + "00" * 248
    + "3000" + b"tcp".hex() + "00" * 27 + "0000ffff50005000" + "00" * 8
    + "5000" + b"DNAT".hex() + "00" * 25 + "02" + "03000000" + "c0a80009" + "00" * 12 + "c0a80009" + "00" * 12
    + "0fa00fa0" + "00" * 8
)  # fmt: skip
#: ``ip6tables -p tcp -m comment --comment "kproxy x" -m tcp --dport 80 -m conntrack ! --ctstate DNAT -j REJECT
#: --reject-with tcp-reset``.
GUARD6 = (
    "00" * 128 + "0600" + "00" + "01" + "00" * 4 + "00000000" + "c002e802" + "00" * 24
    + "2001" + b"comment".hex() + "00" * 23 + b"kproxy x".hex() + "00" * 248
    + "3000" + b"tcp".hex() + "00" * 27 + "0000ffff50005000" + "00" * 8
    + "c800" + b"conntrack".hex() + "00" * 20 + "03" + "00" * 146 + "010001008000" + "00" * 16
    + "2800" + b"REJECT".hex() + "00" * 24 + "06000000" + "00000000"
)  # fmt: skip

TEN = Locality(("10.0.0.0/8",))


def asRead(family: Family, data: bytes, verdict: int | None = None) -> bytes:
    """As the kernel gives a rule back: with counters and marks of its own, and plain verdicts as numbers."""
    nfcache = {"IPv4": 84, "IPv6": 136}[family]
    at = struct.unpack_from("=H", data, nfcache + 4)[0]
    read = bytearray(data)
    read[nfcache : nfcache + 4] = b"\x07\0\0\0"
    read[nfcache + 8 : nfcache + 12] = b"\x1f\0\0\0"
    read[HEAD[family] - 16 : HEAD[family]] = struct.pack("=QQ", 17, 1234)
    read[HEAD[family] + 2 + len(b"comment\0") + 4] = 0x7F  # what lay behind the name in the reader's memory
    if verdict is not None:
        read[at + 2 : at + 31] = bytes(29)
        read[at + 32 : at + 36] = struct.pack("=i", verdict)
    return bytes(read)


class BytesTests(SynchronousTestCase):
    """Packing, and what reading does to it."""

    def test_dnat(self) -> None:
        """A rule of nat is, byte for byte, what libxtables makes of it."""
        entry = Entry("IPv4", "kproxy x", Target("192.168.0.9", 4000), "10.1.0.0/16", "10.0.0.1", "TCP", 80)
        self.assertEqual(pack(entry).hex(), DNAT4)

    def test_guard(self) -> None:
        """So is a guard of IPv6."""
        entry = Entry("IPv6", "kproxy x", RESET, protocol="TCP", port=80, state="!DNAT")
        self.assertEqual(pack(entry).hex(), GUARD6)

    def test_interface(self) -> None:
        """An interface, whole and as a prefix, is as ``xtables_parse_interface`` has it, and comes back."""
        for name, text, mask in (
            ("cbr0", b"cbr0", b"\xff" * 5),
            ("cali+", b"cali+", b"\xff" * 4),
            ("a" * 15, b"a" * 15, b"\xff" * 16),
        ):
            for family, at in (("IPv4", 16), ("IPv6", 64)):
                entry = Entry(family, "kproxy x", RETURN, interface=name)  # type: ignore[arg-type]
                data = pack(entry)
                self.assertEqual(data[at : at + 16], text.ljust(16, b"\0"))
                self.assertEqual(data[at + 32 : at + 48], mask.ljust(16, b"\0"))
                self.assertEqual(parse(family, data), entry)  # type: ignore[arg-type]

    def test_destinationNetwork(self) -> None:
        """A destination may be a network, and a protocol may be without a port."""
        for entry in (
            Entry("IPv4", "kproxy x", DROP, destination="10.96.0.0/16"),
            Entry("IPv6", "kproxy x", RESET, destination="fd00:10:96::/112", protocol="TCP"),
            Entry("IPv4", "kproxy x", "KPROXY-NO-PORT", destination="10.96.0.10"),
        ):
            self.assertEqual(parse(entry.family, pack(entry)), entry)
            self.assertEqual(entryOf(entry.family, textOf(entry)), entry)

    def test_sizes(self) -> None:
        """Offsets and sizes are consistent and aligned, whatever the shape."""
        for family in FAMILIES:
            for data in allBytes(SAMPLE, family):
                at, end = struct.unpack_from("=HH", data, {"IPv4": 88, "IPv6": 140}[family])
                self.assertEqual(end, len(data))
                self.assertEqual(end % 8, 0)
                position = HEAD[family]
                while position < at:
                    position += struct.unpack_from("=H", data, position)[0]
                self.assertEqual(position, at)
                self.assertEqual(struct.unpack_from("=H", data, at)[0], end - at)

    def test_backAndForth(self) -> None:
        """What is parsed is what was packed."""
        for family in FAMILIES:
            for data in allBytes(SAMPLE, family):
                self.assertEqual(pack(parse(family, data)), data)

    def test_normalised(self) -> None:
        """Counters, the kernel's own marks and the reader's garbage make no difference; a verdict is one by name."""
        for family in FAMILIES:
            for target, verdict in ((RETURN, -5), (DROP, -1), (ACCEPT, -2), (REJECT, None), (Target(NODE4, 1), None)):
                if isinstance(target, Target) and family == "IPv6":
                    target = Target(NODE6, 1)
                data = pack(Entry(family, "kproxy y", target, protocol="UDP", port=53))
                self.assertEqual(normalised(family, asRead(family, data, verdict)), data)

    def test_jump(self) -> None:
        """A jump is read by the chain that it leads to."""
        data = pack(JUMPS[0].entry("IPv4"))
        self.assertEqual(normalised("IPv4", asRead("IPv4", data, 4711), PORTALS_CONTAINER), data)
        self.assertRaises(UnknownBytes, normalised, "IPv4", asRead("IPv4", data, 4711))

    def test_notARule(self) -> None:
        """Whatever bytes there are, they are read or refused; nothing else happens."""
        draw = random.Random(1)
        whole = pack(Entry("IPv4", "kproxy x", Target(NODE4, 4000), "", "10.0.0.1", "TCP", 80))
        for n in range(3000):
            data = bytearray(whole[: draw.randrange(len(whole) + 1)] if n % 3 == 0 else whole)
            for _ in range(draw.randrange(1, 6)):
                if data:
                    data[draw.randrange(len(data))] = draw.randrange(256)
            try:
                parse("IPv4", normalised("IPv4", bytes(data)))
            except UnknownBytes:
                pass

    def test_comments(self) -> None:
        """Nothing in a comment can end a line, a word or a rule."""
        self.assertEqual(sanitised("a\"b\n-A x'\\;$(c)é"), "a_b_-A x___$(c)_".replace("$", "_"))
        self.assertEqual(len(sanitised("x" * 1000)), 240)
        self.assertEqual(sanitised("kproxy [fd00::1]:80/TCP"), "kproxy [fd00::1]:80/TCP")


def allBytes(ruleset: Ruleset, family: Family) -> list[bytes]:
    content = render(ruleset, family)
    return [data for table in TABLES for chain in content.of(table).values() for data in chain]


def both(ruleset: Ruleset) -> Ruleset:
    """Rendered and read back, family by family."""
    found = joined({family: reconstruct(family, render(ruleset, family)) for family in FAMILIES})
    assert found is not None
    return found


_verdicts = st.sampled_from(["reject", "drop", to(1), to(2)])
_sources = st.sampled_from(
    [
        None,
        (),
        ("0.0.0.0/0",),
        ("10.0.0.0/8",),
        ("10.1.2.0/24", "192.0.2.1/32"),
        ("0.0.0.0/1", "128.0.0.0/2"),
        ("255.255.255.255/32",),
        ("198.51.100.0/24", "203.0.113.0/25", "203.0.113.200/32"),
    ]
)
_rules = st.builds(Rule, _verdicts, _verdicts, _sources)
_keys = st.builds(
    FrontendKey,
    st.just("IPv4"),
    st.sampled_from(["TCP", "UDP", "SCTP"]),
    st.sampled_from(["", "10.96.0.1", "10.96.0.2", NODE4]),
    st.sampled_from([1, 80, 65535]),
)
_guards = st.builds(
    Guard, st.just("IPv4"), st.sampled_from(["TCP", "UDP", "SCTP"]), st.integers(min_value=1, max_value=65535)
)
_insiders = st.sampled_from(
    [(), ("10.0.0.0/8",), ("0.0.0.0/0",), ("fd00::/8", "10.1.0.0/16", "10.0.0.0/16"), ("::/0",)]
)
_links = st.sampled_from([(), ("cbr0",), ("cali*",), ("a" * 15, "a" * 15 + "*", "a" * 14 + "*", "eth0.7", "#x@y")])
_nodePorts = st.sampled_from(
    [
        EVERYWHERE,
        (),
        ("192.0.2.2/32",),
        ("10.0.0.0/8", "127.0.0.0/8", "::1/128"),
        ("0.0.0.0/0",),
        ("::/0",),
        ("255.255.255.255/32", "::/0"),
    ]
)
_services = st.sampled_from(
    [(), ("10.96.0.0/24",), ("10.96.0.1/32", "10.97.0.0/16", "fd00:10:96::/112"), ("0.0.0.0/0",)]
)
_localities = st.builds(Locality, _insiders, _links, _nodePorts, _services)
_clusterIPs = st.frozensets(st.sampled_from(["10.96.0.1", "10.96.0.2", "10.97.0.1", "192.0.2.9"]))


_rulesets = st.builds(
    Ruleset,
    st.dictionaries(_keys, _rules, max_size=6).map(
        lambda rules: {it: rule if it.address else Rule(rule.outside, rule.inside) for it, rule in rules.items()}
    ),
    st.frozensets(_guards, max_size=3),
    _clusterIPs,
    _localities,
)


class LayoutTests(SynchronousTestCase):
    """Chains from rulesets, and rulesets from chains."""

    def test_names(self) -> None:
        """Names of chains are no longer than the kernel takes."""
        for chains in CHAINS.values():
            for chain in chains:
                self.assertLessEqual(len(chain), 28)

    def test_sample(self) -> None:
        """One of everything comes back."""
        self.assertEqual(deltaBetween(SAMPLE, both(SAMPLE)), Delta())
        self.assertEqual(both(many(500)), many(500))

    @given(_rulesets, st.randoms())
    @settings(deadline=None, max_examples=300)
    def test_anyRuleset(self, ruleset: Ruleset, draw: random.Random) -> None:
        """Any ruleset comes back, in whatever order its frontends were written, as bytes and as text."""
        check(ruleset)
        order = list(ruleset.rules.items())
        draw.shuffle(order)
        shuffled = structs.replace(ruleset, rules=dict(order))
        self.assertEqual(reconstruct("IPv4", render(shuffled, "IPv4")), ruleset)
        texts = render(shuffled, "IPv4", textOf)
        self.assertEqual(reconstruct("IPv4", mapped(texts, lambda text: pack(entryOf("IPv4", text)))), ruleset)

    @given(_rulesets, _rulesets)
    @settings(deadline=None, max_examples=200)
    def test_anyStep(self, old: Ruleset, other: Ruleset) -> None:
        """The edits of any step lead to the chains of what it comes to, and mending does so from anywhere."""
        new = structs.replace(other, locality=old.locality)
        delta = deltaBetween(old, new)
        content = copied(render(old, "IPv4"))
        it = editsOf("IPv4", old, new, delta, pack)
        edited(content, it.natGone + it.filterGone, it.filterFirst, it.guardsNew + it.natNew + it.filterNew)
        self.assertEqual(reconstruct("IPv4", content), new)
        content, wanted = copied(render(old, "IPv4")), render(other, "IPv4")
        for table in TABLES:
            mend = mendOf(content.of(table), wanted.of(table), lambda chain, it: frontendOf(chain, parse("IPv4", it)))
            for chain in mend.whole:
                content.of(table)[chain][:] = wanted.of(table)[chain]
            edited(content, flat(mend.gone), flat(mend.first), flat(mend.come))
        self.assertEqual(reconstruct("IPv4", content), other)

    def test_damage(self) -> None:
        """Whichever one rule is missing, doubled or moved to another chain: the rest is not taken for a ruleset."""
        for family in FAMILIES:
            whole = render(SAMPLE, family)
            for table in TABLES:
                for chain, entries in whole.of(table).items():
                    for index in range(len(entries)):
                        damaged = copied(whole)
                        del damaged.of(table)[chain][index]
                        self.assertNotSample(family, damaged)
                        damaged = copied(whole)
                        damaged.of(table)[chain].append(entries[index])
                        self.assertNotSample(family, damaged)

    def assertNotSample(self, family: Family, content: Content) -> None:
        """Some damage gives another ruleset, which a comparison then finds."""
        try:
            found = reconstruct(family, content)
        except UnknownBytes:
            return
        rules = {it: rule for it, rule in SAMPLE.rules.items() if it.family == family}
        guards = frozenset(guard for guard in SAMPLE.guards if guard.family == family)
        self.assertNotEqual(found, Ruleset(rules, guards, locality=SAMPLE.locality))

    def test_unreachable(self) -> None:
        """A rule behind the one that takes everybody is not taken for an insider's."""
        rule = Rule(to(1), to(2))
        content = render(Ruleset({key("10.96.0.1", 80): rule}, locality=TEN), "IPv4")
        content.nat[PORTALS_CONTAINER].reverse()
        self.assertRaises(UnknownBytes, reconstruct, "IPv4", content)
        content = render(Ruleset({key("10.96.0.1", 80): Rule("drop", to(1))}, locality=TEN), "IPv4")
        content.nat[PORTALS_CONTAINER].reverse()
        self.assertRaises(UnknownBytes, reconstruct, "IPv4", content)
        content = render(Ruleset({key("10.96.0.1", 80): Rule("drop", "reject")}, locality=TEN), "IPv4")
        content.filter[REFUSE].reverse()
        self.assertRaises(UnknownBytes, reconstruct, "IPv4", content)

    def test_refusedIsNotLed(self) -> None:
        """Who is refused is led nowhere, and not on to the node ports either: the address may be the node's own."""
        rules = {key("10.96.0.1", 80): same("reject"), key("", 30000): same("drop")}
        content = render(Ruleset(rules, locality=TEN), "IPv4")
        led = {chain: [parse("IPv4", it).target for it in entries] for chain, entries in content.nat.items() if entries}
        self.assertEqual(led, {PORTALS_CONTAINER: [ACCEPT], PORTALS_HOST: [ACCEPT], INSIDERS: [RETURN]})
        self.assertEqual(len(content.filter[REFUSE]), 2)

    def test_insideFirst(self) -> None:
        """Insiders' rules come before the one for everybody; the node's own have a chain of their own."""
        own = placeOf("IPv4", Locality(("10.1.0.0/16", "fd00::/8", "10.2.0.0/16")))
        entries = list(ruleEntries(key("203.0.113.5", 80), Rule(to(1), to(2)), own))
        self.assertEqual(
            [(chain, entry.source, entry.target) for _, chain, entry in entries],
            [
                (PORTALS_CONTAINER, "10.1.0.0/16", to(2)),
                (PORTALS_CONTAINER, "10.2.0.0/16", to(2)),
                (PORTALS_CONTAINER, "", to(1)),
                (PORTALS_HOST, "", to(2)),
            ],
        )

    def test_sources(self) -> None:
        """
        Who is in the source ranges is led, insiders to where insiders are; everybody else is left unrewritten, and
        dropped.
        """
        place = placeOf("IPv4", Locality(("10.1.0.0/16", "10.2.0.0/16"), ("cali*",)))
        rule = Rule(to(1), to(2), ("10.2.0.0/24", "203.0.113.0/24"))
        found = [
            (chain, entry.interface, entry.source, entry.target)
            for _, chain, entry in ruleEntries(key("198.51.100.5", 80), rule, place)
        ]
        self.assertEqual(
            found,
            [
                (PORTALS_CONTAINER, "", "10.2.0.0/24", to(2)),
                (PORTALS_CONTAINER, "cali+", "10.2.0.0/24", to(2)),
                (PORTALS_CONTAINER, "cali+", "203.0.113.0/24", to(2)),
                (PORTALS_CONTAINER, "", "10.2.0.0/24", to(1)),
                (PORTALS_CONTAINER, "", "203.0.113.0/24", to(1)),
                (PORTALS_CONTAINER, "", "", ACCEPT),
                (PORTALS_HOST, "", "10.2.0.0/24", to(2)),
                (PORTALS_HOST, "", "203.0.113.0/24", to(2)),
                (PORTALS_HOST, "", "", ACCEPT),
                (REFUSE, "", "", DROP),
            ],
        )

    def test_nobody(self) -> None:
        """A frontend for nobody has rules for a source that no packet has, so that its verdicts can be read back."""
        entries = [it for _, _, it in ruleEntries(key("198.51.100.5", 80), Rule(to(1), to(1), ()), Place())]
        self.assertEqual({it.source for it in entries if it.target == to(1)}, {"255.255.255.255/32"})
        self.assertEqual({it.comment for it in entries}, {"kproxy 198.51.100.5:80/TCP for nobody"})

    def test_refusedSources(self) -> None:
        """Who is in the ranges is refused as the verdict has it, everybody else is dropped."""
        rule, place = Rule("reject", "drop", ("203.0.113.0/24",)), placeOf("IPv4", Locality(("203.0.113.7/32",)))
        found = [
            (entry.sourceLocal, entry.source, entry.target)
            for _, chain, entry in ruleEntries(key("198.51.100.5", 80), rule, place)
            if chain == REFUSE
        ]
        self.assertEqual(
            found,
            [
                (True, "203.0.113.0/24", DROP),
                (False, "203.0.113.7/32", DROP),
                (False, "203.0.113.0/24", RESET),
                (False, "", DROP),
            ],
        )

    def test_nodePorts(self) -> None:
        """Node ports have their rules once for each network, and service addresses are as they were."""
        place = placeOf("IPv4", Locality(nodePorts=("127.0.0.0/8", "192.0.2.2/32", "::1/128")))
        for rule, target in ((same(to(1)), to(1)), (same("drop"), DROP)):
            entries = [it for _, _, it in ruleEntries(key("", 30080), rule, place)]
            self.assertEqual({it.target for it in entries}, {target})
            self.assertEqual({it.destination for it in entries}, {"127.0.0.0/8", "192.0.2.2"})
        here, everywhere = (list(ruleEntries(key("10.96.0.1", 80), same(to(1)), it)) for it in (place, Place()))
        self.assertEqual(here, everywhere)
        self.assertEqual(placeOf("IPv6", Locality(nodePorts=("192.0.2.2/32",))).nodePorts, ("ff00::",))

    def test_nothingForNothing(self) -> None:
        """Who uses none of it has none of its rules."""
        plain = Ruleset(SAMPLE.rules, SAMPLE.guards, locality=TEN)
        for family in FAMILIES:
            content = render(plain, family, lambda entry: entry)
            self.assertEqual((content.filter[CLUSTER_IPS], content.filter[NO_PORT]), ([], []))
            self.assertEqual([it for it in content.filter[REFUSE] if it.protocol is None], [])
            entries = [it for table in TABLES for its in content.of(table).values() for it in its]
            self.assertEqual([it for it in entries if it.interface or "/" in it.destination], [])

    def test_clusterIPs(self) -> None:
        """Those in a known network are passed by who sends there only; each has one rule."""
        locality = Locality(services=("10.96.0.0/16", "fd00:10:96::/112"))
        ruleset = Ruleset(clusterIPs=frozenset({"10.96.0.1", "10.97.0.1", "fd00:10:96::1"}), locality=locality)
        content = render(ruleset, "IPv4", lambda entry: entry)
        self.assertEqual([(it.destination, it.target) for it in content.filter[CLUSTER_IPS]], [("10.96.0.1", NO_PORT)])
        self.assertEqual(
            [(it.destination, it.target) for it in content.filter[REFUSE]],
            [*(("10.96.0.0/16", target) for target in (CLUSTER_IPS, RETURN, DROP)), ("10.97.0.1", NO_PORT)],
        )
        self.assertEqual([(it.protocol, it.target) for it in content.filter[NO_PORT]], [("TCP", RESET), (None, REJECT)])

    def test_outOfOrder(self) -> None:
        """A frontend's rule behind those for all protocols, or a refusal that is never reached, is no ruleset."""
        locality = Locality(services=("10.96.0.0/16",))
        ruleset = Ruleset({key("10.96.0.1", 80): same("drop")}, clusterIPs=frozenset({"10.96.0.1"}), locality=locality)
        for chain in (REFUSE, NO_PORT):
            content = render(ruleset, "IPv4")
            content.filter[chain].reverse()
            self.assertRaises(UnknownBytes, reconstruct, "IPv4", content)

    def test_guardBeforeAccept(self) -> None:
        """A guard refuses what no rule led there."""
        content = render(Ruleset(guards=frozenset({Guard("IPv4", "UDP", 4000)})), "IPv4")
        first, second = (parse("IPv4", data) for data in content.filter[GUARD])
        self.assertEqual((first.state, first.target, first.port), ("!DNAT", REJECT, 4000))
        self.assertEqual((second.state, second.target, second.port), ("DNAT", ACCEPT, 4000))

    def test_everybodyIsInside(self) -> None:
        """A pod network of everything is still a condition that can be told from none."""
        everything = Locality(("0.0.0.0/0", "::/0"))
        self.assertEqual(placeOf("IPv4", everything), Place(("0.0.0.0/1", "128.0.0.0/1")))
        self.assertEqual(placeOf("IPv6", everything), Place(("::/1", "8000::/1")))

    def test_check(self) -> None:
        """What the kernel could not take is refused by name."""
        check(SAMPLE)
        bad: list[tuple[str, Ruleset]] = [
            ("10.96.0.1:80/TCP", Ruleset({key("10.96.0.1", 80): same(to(0))})),
            ("10.96.0.1:80/TCP", Ruleset({key("10.96.0.1", 80): same(to(1, "0.0.0.0"))})),
            ("10.96.0.1:80/TCP", Ruleset({key("10.96.0.1", 80): Rule("drop", to(1, NODE6))})),
            ("10.96.0.1:80/TCP", Ruleset({key("10.96.0.1", 80): same("accept")})),  # type: ignore[arg-type]
            ("must be written", Ruleset({key("fd00::0:1", 80): same("drop")})),
            ("010.96.0.1", Ruleset({key("010.96.0.1", 80): same("drop")})),
            ("a\0b", Ruleset({key("a\0b", 80): same("drop")})),
            ("10.0.0.1/8", Ruleset(locality=Locality(("10.0.0.1/8",)))),
            ("guard", Ruleset(guards=frozenset({Guard("IPv4", "TCP", 65536)}))),
            ("10.0.0.1/8", Ruleset(locality=Locality(nodePorts=("10.0.0.1/8",)))),
            ("ClusterIPs 'x'", Ruleset(locality=Locality(services=("x",)))),
            ("010.96.0.1", Ruleset(clusterIPs=frozenset({"010.96.0.1"}))),
            ("must be written", Ruleset(clusterIPs=frozenset({"fd00::0:1"}))),
            ("unspecified", Ruleset(clusterIPs=frozenset({"::"}))),
            ("203.0.113.5:80/TCP, '10.0.0.1/8'", Ruleset({key("203.0.113.5", 80): same("drop", ("10.0.0.1/8",))})),
            ("another family", Ruleset({key("203.0.113.5", 80): same("drop", ("fd00::/8",))})),
        ]
        links = ("", "*", "a b", "a+", "é", "a" * 16)
        bad += [(repr(it), Ruleset(locality=Locality(insiderLinks=(it,)))) for it in links]
        for word, ruleset in bad:
            error = self.assertRaises(Invalid, check, ruleset)
            self.assertIn(word, str(error))

    def test_steps(self) -> None:
        """A ruleset after a step is rendered as one that was always so."""
        step = Delta({key("10.96.0.10", 80): None, key("10.96.0.99", 80): same(to(1))})
        self.assertEqual(both(applied(SAMPLE, step)), applied(SAMPLE, step))


def mapped(content: Content[Any], form: Callable[[Any], Any]) -> Content[Any]:
    return Content(
        {chain: [form(it) for it in entries] for chain, entries in content.nat.items()},
        {chain: [form(it) for it in entries] for chain, entries in content.filter.items()},
    )


def copied(content: Content[Any]) -> Content[Any]:
    return mapped(content, lambda it: it)


def edited(
    content: Content[bytes],
    gone: list[tuple[str, bytes]],
    first: list[tuple[str, bytes]],
    come: list[tuple[str, bytes]],
) -> None:
    """What the writers do with a step."""
    chains = {**content.nat, **content.filter}
    for chain, data in gone:
        chains[chain].remove(data)
    for chain, data in reversed(first):
        chains[chain].insert(0, data)
    for chain, data in come:
        chains[chain].append(data)
