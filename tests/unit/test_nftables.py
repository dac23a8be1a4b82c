"""The nftables writer without a kernel: its table as text, its answers to tools that fail, the watch."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.shared.writers import LOCALITY, SAMPLE, key, many, same, to
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset
from twisted_kproxy.core.values import Locality
from twisted_kproxy.interfaces import NotAvailable, RulesRejected
from twisted_kproxy.netfilter import tool
from twisted_kproxy.netfilter.netlink import HEADER, text
from twisted_kproxy.netfilter.nft.layout import (
    LAYOUT,
    MAPS,
    NETWORKS,
    SETS,
    Allowed,
    Unreadable,
    costly,
    gathered,
    intervals,
    placed,
    sourcesOf,
    stepFor,
    wholeStep,
)
from twisted_kproxy.netfilter.nft.text import (
    chainsFor,
    readListing,
    rulesIn,
    signature,
    stepText,
    structureProblem,
    structureText,
)
from twisted_kproxy.netfilter.nft.watch import TableWatch
from twisted_kproxy.netfilter.nft.writer import NftablesWriter
from twisted_kproxy.netfilter.tool import Tool, TooSlow, find


class PlacingTests(SynchronousTestCase):
    """Which frontend is in which set."""

    def test_sameForAll(self) -> None:
        """What is the same for everybody is one element."""
        for where, rule, name, value in (
            (key("10.96.0.1", 80), same(to(1)), "service-ips4", to(1)),
            (key("", 30080, "TCP", "IPv6"), same("reject"), "blocked-ports6", "reject"),
        ):
            self.assertEqual(placed(where, rule), [(name, where, value)])

    def test_passed(self) -> None:
        """Insiders that are served where others are not have to get past what blocks the others."""
        found = placed(key("203.0.113.5", 80), Rule(outside="drop", inside=to(1)))
        self.assertEqual(
            {name: value for name, _key, value in found},
            {"blocked-ips4": "drop", "service-ips4-inside": to(1), "blocked-ips4-inside": "pass"},
        )

    def test_sources(self) -> None:
        """A frontend that is not for everybody says so once, and once for each network; for nobody, just that."""
        for where, sources in (
            (key("203.0.113.5", 80), ("10.0.0.0/8", "192.0.2.1/32")),
            (key("2001:db8::5", 53, "UDP"), ("fd00::/8",)),
            (key("2001:db8::5", 53), ()),
        ):
            digit = 4 if where.family == "IPv4" else 6
            self.assertEqual(
                placed(where, Rule("drop", "drop", sources))[1:],
                [
                    (f"restricted-ips{digit}", where, None),
                    *((f"allowed-sources{digit}", Allowed(where, it), None) for it in sources),
                ],
            )

    def test_sourcesOfNodePorts(self) -> None:
        """Sources are for frontends that have an address: a node port is not left open to everybody in silence."""
        where = key("", 30080, "TCP", "IPv4")
        for call in (
            lambda: placed(where, same(to(1), ())),
            lambda: wholeStep(Ruleset({where: same(to(1), ("10.0.0.0/8",))})),
            lambda: stepFor(Ruleset(), Delta({where: same(to(1), ())})),
        ):
            self.assertEqual(self.assertRaises(RulesRejected, call).frontends, frozenset({where}))

    def test_thereAndBack(self) -> None:
        """The elements of any ruleset add up to it again."""
        for ruleset in (SAMPLE, many(200), Ruleset()):
            elements = [it for key, rule in ruleset.rules.items() for it in placed(key, rule)]
            self.assertEqual(gathered(elements), dict(ruleset.rules))

    def test_doNotBelong(self) -> None:
        """Elements that we would never write together are not taken for a rule."""
        where = key("203.0.113.5", 80)
        for elements in (
            [("service-ips4-inside", to(1))],
            [("service-ips4", to(1)), ("blocked-ips4", "drop")],
            [("blocked-ips4", "drop"), ("service-ips4-inside", to(1))],
            [("service-ips4", to(1)), ("blocked-ips4-inside", "pass")],
            [("blocked-ips4", "pass")],
            [("service-ips4", to(1)), ("service-ips4-inside", to(1))],
        ):
            self.assertRaises(Unreadable, gathered, [(name, where, value) for name, value in elements])

    def test_sourcesDoNotBelong(self) -> None:
        """The same for sources: of no frontend, of one that is for everybody, or not as this program writes them."""
        where = key("203.0.113.5", 80)
        led, restricted = ("service-ips4", where, to(1)), ("restricted-ips4", where, None)

        def allowed(network: str) -> tuple[str, Allowed, None]:
            return "allowed-sources4", Allowed(where, network), None

        whole = [led, restricted, allowed("10.0.0.0/8")]
        self.assertEqual(gathered(whole), {where: same(to(1), ("10.0.0.0/8",))})
        for elements in (
            whole[1:],
            [whole[0], whole[2]],
            [restricted],
            [*whole, allowed("11.0.0.0/8")],
            [*whole, allowed("10.1.0.0/16")],
        ):
            self.assertRaises(Unreadable, gathered, elements)

    def test_steps(self) -> None:
        """A step takes out and puts in just what differs, and elements in force stay."""
        where = key("203.0.113.5", 80)
        before = {where: Rule(outside=to(1), inside=to(2))}
        step = stepFor(Ruleset(before), Delta({where: Rule(outside="drop", inside=to(2))}))
        self.assertEqual(step.removed, [("service-ips4", where)])
        self.assertEqual(
            step.added, [("blocked-ips4", where, "drop"), ("blocked-ips4-inside", where, "pass")]
        )
        self.assertEqual(len(stepFor(Ruleset(before), Delta({where: before[where], key("1.1.1.1", 1): None}))), 0)

    def test_sourceSteps(self) -> None:
        """Of sources just those that differ come and go."""
        where = key("203.0.113.5", 80)
        before = Ruleset({where: same(to(1), ("10.0.0.0/8", "192.0.2.0/24"))})
        step = stepFor(before, Delta({where: same(to(1), ("10.0.0.0/8", "192.0.2.1/32"))}))
        self.assertEqual(step.removed, [("allowed-sources4", Allowed(where, "192.0.2.0/24"))])
        self.assertEqual(step.added, [("allowed-sources4", Allowed(where, "192.0.2.1/32"), None)])
        step = stepFor(before, Delta({where: same(to(1))}))
        self.assertEqual({name for name, _item in step.removed}, {"restricted-ips4", "allowed-sources4"})
        self.assertEqual((len(step), step.added), (3, []))

    def test_guardSteps(self) -> None:
        """Guards that are there are not added, those that are not are not removed."""
        one, two = Guard("IPv4", "TCP", 1), Guard("IPv4", "TCP", 2)
        step = stepFor(Ruleset(guards=frozenset({one})), Delta({}, frozenset({one, two}), frozenset({two})))
        self.assertEqual((step.added, step.removed), ([("proxy-ports4", two, None)], []))

    def test_costly(self) -> None:
        """Few sources that go are taken out one by one; for many among many the table is made anew."""
        keys = [key(f"203.0.{n // 250}.{n % 250}", 80) for n in range(2000)]
        for count, gone, expected in ((2000, 1, False), (2000, 30, True), (100, 100, False), (300, 200, True)):
            known = Ruleset(dict.fromkeys(keys[:count], same(to(1), ("10.0.0.0/8",))))
            there = sourcesOf(known.rules.values())
            step = stepFor(known, Delta(dict.fromkeys(keys[:gone])))
            self.assertEqual((there, count, gone, costly(step, there)), (count, count, gone, expected))
            self.assertFalse(costly(stepFor(Ruleset(), Delta(known.rules)), 0), "adding costs little")
            self.assertEqual(costly(wholeStep(known), there), count == 2000)
        self.assertFalse(costly(wholeStep(many(2000)), 0))

    def test_clusterIPSteps(self) -> None:
        """The same for the addresses of Services, each in its family's set."""
        known = Ruleset(clusterIPs=frozenset({"10.96.0.1", "fd00::1"}))
        step = stepFor(
            known,
            Delta(clusterIPsAdded=frozenset({"10.96.0.1", "fd00::2"}), clusterIPsRemoved=frozenset({"fd00::1", "::9"})),
        )
        self.assertEqual(step.added, [("cluster-ips6", "fd00::2", None)])
        self.assertEqual(step.removed, [("cluster-ips6", "fd00::1")])

    def test_localitySteps(self) -> None:
        """Of what is said of addresses just the sets that differ are written."""
        changed = Locality(LOCALITY.insiders, (), LOCALITY.nodePorts, ("10.96.0.0/15", "fd00:10:96::/112"))
        self.assertEqual(stepFor(SAMPLE, Delta(locality=changed)).networks, {"service-networks4": ("10.96.0.0/15",)})
        self.assertEqual(len(stepFor(SAMPLE, Delta(locality=LOCALITY))), 0)

    def test_intervals(self) -> None:
        """A network that ends with the last address has no address behind it."""
        self.assertEqual(intervals(["255.0.0.0/8", "fd00::/8"], "IPv4"), [(b"\xff\0\0\0", None)])


class TextTests(SynchronousTestCase):
    """What nft is given."""

    def test_structure(self) -> None:
        """The text has every set and chain, and takes an older table's place in the same transaction."""
        said = structureText("kproxy", "1.2.3")
        self.assertTrue(said.startswith("table inet kproxy\ndelete table inet kproxy\ntable inet kproxy {\n"))
        for name in SETS:
            self.assertRegex(said, rf"\t(map|set) {name} \{{")
        for name in chainsFor():
            self.assertIn(f"\tchain {name} {{", said)
        self.assertIn("kproxy 1.2.3", said)

    def test_chainsBeforeJumps(self) -> None:
        """A chain is there before it is jumped to, and every map that is looked up exists."""
        seen: set[str] = set()
        for chain, lines in chainsFor(("cali*",)).items():
            for line in lines:
                words = line.split()
                for n, word in enumerate(words):
                    if word == "goto":
                        self.assertIn(words[n + 1], seen)
                    if word.startswith("@"):
                        self.assertIn(word[1:], SETS)
            seen.add(chain)

    def test_elements(self) -> None:
        """Elements as text, removing first."""
        where = key("10.96.0.1", 80)
        delta = Delta({where: same("reject")}, locality=Locality(("10.0.0.0/8",)))
        step = stepFor(Ruleset({where: same(to(1))}), delta)
        self.assertEqual(
            stepText("kproxy", step).splitlines(),
            [
                "flush set inet kproxy insiders4",
                "delete element inet kproxy service-ips4 { 10.96.0.1 . tcp . 80 }",
                "add element inet kproxy blocked-ips4 { 10.96.0.1 . tcp . 80 : goto refuse }",
                "add element inet kproxy insiders4 { 10.0.0.0/8 }",
            ],
        )

    def test_sourcesAsText(self) -> None:
        """The same for sources and the addresses of Services."""
        where = key("2001:db8::5", 53, "UDP")
        delta = Delta({where: same("drop", ("fd00::/8",))}, clusterIPsAdded=frozenset({"10.96.0.1"}))
        known = Ruleset({where: same("drop", ("::1/128",))})
        self.assertEqual(
            stepText("kproxy", stepFor(known, delta)).splitlines(),
            [
                "delete element inet kproxy allowed-sources6 { 2001:db8::5 . udp . 53 . ::1/128 }",
                "add element inet kproxy allowed-sources6 { 2001:db8::5 . udp . 53 . fd00::/8 }",
                "add element inet kproxy cluster-ips4 { 10.96.0.1 }",
            ],
        )

    def test_links(self) -> None:
        """Links of insiders are in the rules; what nft could take for something else is not handed to it."""
        said = structureText("kproxy", "1.2.3", ("cali*", "fifteen-letters*"))
        self.assertIn('iifname "cali*" meta nfproto ipv6 goto block6-inside comment "cali*"\n', said)
        only = 'iifname "fifteen-letters" meta nfproto ipv4 goto lead4-inside comment "fifteen-letters*"'
        self.assertIn(f"{only}\n", said)
        for name in ("", "*", 'a"b', "a b", "a\nb", "a\\*", "a*b", "sixteen-letters-", "a" * 17):
            error = self.assertRaises(RulesRejected, structureText, "kproxy", "1", (name,))
            self.assertIn(repr(name), str(error))

    def test_wholeText(self) -> None:
        """A whole ruleset empties every set first."""
        said = stepText("kproxy", wholeStep(SAMPLE))
        for name in SETS:
            self.assertIn(f" inet kproxy {name}\n", said)
        self.assertIn("fd00:10:96::10 . tcp . 80 : 2001:db8::2 . 40001", said)

    def test_tableNames(self) -> None:
        """A table's name goes into commands: what is no plain name is refused."""
        for name in ("", "a b", "a;b", "a\nb", "1a", "a{", "x" * 70):
            self.assertRaises(ValueError, NftablesWriter, None, name)


def listing(signed: bool = True, links: tuple[str, ...] = (), **changed: Any) -> dict[str, Any]:
    """A listing of an untouched table."""
    items: list[dict[str, Any]] = [{"metainfo": {}}, {"table": {"name": "kproxy"}}]
    items += [{"map" if name in MAPS else "set": {"name": name, **changed.get(name, {})}} for name in SETS]
    for chain, count in rulesIn(links).items():
        items.append({"chain": {"name": chain}})
        said = links * 2 if chain in ("block-prerouting", "nat-prerouting") else ()
        items += [{"rule": {"chain": chain, "comment": it}} for it in said]
        items += [{"rule": {"chain": chain}}] * (count - len(said))
    if signed:
        items.append({"chain": {"name": signature({"nftables": items})}})
    return {"nftables": items}


class ListingTests(SynchronousTestCase):
    """Reading what nft lists."""

    def test_untouched(self) -> None:
        """A table of ours as it was made is one."""
        self.assertEqual(structureProblem(listing()), "")
        self.assertEqual(structureProblem(listing(links=("cali*", "cbr0"))), "")

    def test_absent(self) -> None:
        """No table is no table."""
        self.assertEqual(structureProblem({"nftables": [{"metainfo": {}}]}), "absent")

    def test_touched(self) -> None:
        """Whatever is missing or too much is noticed."""
        for n, item in enumerate(listing()["nftables"]):
            if "metainfo" in item:
                continue
            less = listing()
            del less["nftables"][n]
            if "chain" in item:  # its rules go with it
                name = item["chain"]["name"]
                less["nftables"] = [it for it in less["nftables"] if it.get("rule", {}).get("chain") != name]
            self.assertNotEqual(structureProblem(less), "", item)
            if "table" not in item and "set" not in item and "map" not in item and "chain" not in item:
                more = listing()
                more["nftables"].append(item)
                self.assertNotEqual(structureProblem(more), "", item)

    def test_exchanged(self) -> None:
        """A rule, chain or set that is another than was made is noticed, though there are as many; elements may be."""
        for n, item in enumerate(listing()["nftables"]):
            for kind in ("rule", "chain", "map", "set"):
                if kind in item and not item[kind].get("name", "").startswith("made-as-"):
                    other = listing()
                    other["nftables"][n] = {kind: {**item[kind], "prio": 7}}
                    self.assertIn("changed", structureProblem(other), item)
                    other["nftables"][n] = {kind: {**item[kind], "handle": 7}}
                    self.assertEqual(structureProblem(other), "", item)
        self.assertEqual(structureProblem(listing(**{"service-ips4": {"elem": [1]}})), "")
        swapped = listing()
        places = [n for n, item in enumerate(swapped["nftables"]) if item.get("rule", {}).get("chain") == "refuse"]
        one, two = places[:2]
        swapped["nftables"][one] = {"rule": {"chain": "refuse", "expr": 1}}
        swapped["nftables"][two] = {"rule": {"chain": "refuse", "expr": 2}}
        first = signature(swapped)
        swapped["nftables"][one], swapped["nftables"][two] = swapped["nftables"][two], swapped["nftables"][one]
        self.assertNotEqual(signature(swapped), first)

    def test_unsigned(self) -> None:
        """A table whose making was interrupted, or whose signature is not the only one, is made anew."""
        self.assertIn("interrupted", structureProblem(listing(signed=False)))
        twice = listing()
        twice["nftables"].append({"chain": {"name": "made-as-other"}})
        self.assertNotEqual(structureProblem(twice), "")

    def test_otherLayout(self) -> None:
        """The table of another version is made anew."""
        other = listing()
        other["nftables"] = [it for it in other["nftables"] if it.get("chain", {}).get("name") != LAYOUT]
        self.assertIn(LAYOUT, structureProblem(other))

    def test_strangeListings(self) -> None:
        """Elements in a form that we do not know are not guessed at."""
        for strange in (
            {"service-ips4": {"elem": [["10.96.0.1", "x"]]}},
            {"service-ips4": {"elem": [[{"concat": ["10.96.0.1", "dccp", 80]}, {"concat": ["192.0.2.2", 1]}]]}},
            {"blocked-ips4": {"elem": [[{"concat": ["10.96.0.1", "tcp", 80]}, {"continue": None}]]}},
            {"proxy-ports4": {"elem": [7]}},
            {"insiders4": {"elem": [{"elem": {"val": 1}}]}},
            {"service-networks6": {"elem": [7, {}]}},
            {"cluster-ips4": {"elem": ["10.96.0"]}},
            {"cluster-ips6": {"elem": [{"elem": {"val": "::1"}}]}},
            {"restricted-ips4": {"elem": [{"concat": ["10.96.0.1", "dccp", 80]}]}},
            {"restricted-ips4": {"elem": ["10.96.0.1"]}},
            {"allowed-sources4": {"elem": [{"concat": ["10.96.0.1", "tcp", 80]}]}},
            {"allowed-sources4": {"elem": [{"concat": ["10.96.0.1", "tcp", {"range": [1, 2]}, "10.0.0.1"]}]}},
            {"allowed-sources4": {"elem": [{"concat": ["10.96.0.1", "tcp", 80, {"range": ["10.0.0.1", "10.0.0.3"]}]}]}},
        ):
            self.assertRaises(Unreadable, readListing, listing(**strange))

    def test_ranges(self) -> None:
        """Insiders are read as addresses, networks and ranges."""
        elems = ["10.9.9.9", {"prefix": {"addr": "10.0.0.0", "len": 16}}, {"range": ["10.8.0.0", "10.8.0.2"]}]
        found = readListing(listing(insiders4={"elem": elems}))
        self.assertEqual(found.locality.insiders, ("10.0.0.0/16", "10.8.0.0/31", "10.8.0.2/32", "10.9.9.9/32"))


    def test_sources(self) -> None:
        """Networks of sources are read as addresses, networks, and ranges that are one."""
        where = {"concat": ["203.0.113.5", "tcp", 80]}
        elems = [
            {"concat": ["203.0.113.5", "tcp", 80, it]}
            for it in (
                "10.9.9.9",
                {"prefix": {"addr": "10.0.0.0", "len": 16}},
                {"range": ["10.8.0.0", "10.8.0.3"]},
            )
        ]
        found = readListing(
            listing(
                **{
                    "service-ips4": {"elem": [[where, {"concat": ["192.0.2.2", 1]}]]},
                    "restricted-ips4": {"elem": [where]},
                    "allowed-sources4": {"elem": elems},
                }
            )
        )
        sources = ("10.0.0.0/16", "10.8.0.0/30", "10.9.9.9/32")
        self.assertEqual(found.rules, {key("203.0.113.5", 80): same(to(1), sources)})

    def test_localities(self) -> None:
        """What is said of addresses is read from sets of networks, and from the rules."""
        said = {name: {"elem": []} for name in NETWORKS}
        for name, network in (("node-networks6", "fd00::"), ("service-networks4", "10.96.0.0")):
            said[name] = {"elem": [{"prefix": {"addr": network, "len": 16}}]}  # type: ignore[list-item]
        found = readListing(listing(links=("cali*", "cbr0"), **said)).locality
        self.assertEqual(found, Locality((), ("cali*", "cbr0"), ("fd00::/16",), ("10.96.0.0/16",)))


class Scripted(TestCase):
    """Tests that write programs."""

    def script(self, body: str) -> str:
        path = Path(self.mktemp()).absolute()
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)


class ToolTests(Scripted):
    """Running a program."""

    async def test_output(self) -> None:
        """Its status, its output and what it complains of are given; its environment is a clean one."""
        os.environ["KPROXY_TEST_SECRET"] = "x"
        self.addCleanup(os.environ.pop, "KPROXY_TEST_SECRET")
        tool = Tool(reactor, self.script('cat; env | grep SECRET; echo "$LC_ALL $1" >&2; exit 3'))
        done = await tool.run("a;b", stdin="ab\n")
        self.assertEqual((done.code, done.out, done.err), (3, b"ab\n", "C a;b\n"))

    async def test_tooSlow(self) -> None:
        """What does not end in time is killed."""
        tool = Tool(reactor, self.script("exec sleep 60"), limit=0.2)
        running = tool.run()
        [pid] = tool.pids
        with self.assertRaises(TooSlow):
            await running
        self.assertRaises(ProcessLookupError, os.kill, pid, 0)
        self.assertEqual(tool.pids, frozenset())

    async def test_killed(self) -> None:
        """What dies of a signal is told apart from an exit."""
        self.assertEqual((await Tool(reactor, self.script("kill -SEGV $$")).run()).code, -11)

    async def test_deafToInput(self) -> None:
        """A program that ends without reading its input is no trouble."""
        done = await Tool(reactor, self.script("exit 0")).run(stdin="x" * 1_000_000)
        self.assertEqual(done.code, 0)

    def test_missing(self) -> None:
        """A program that is not there is named with the package that brings it."""
        said = str(self.assertRaises(NotAvailable, find, "no-such-program", "some"))
        self.assertIn("install the some package", said)


class BrokenToolTests(Scripted):
    """The writer over an nft that does not do as it should."""

    def writer(self, body: str, **options: Any) -> NftablesWriter:
        path = self.script(body)
        options = {"findTool": lambda name, package: path, **options}
        writer = NftablesWriter(reactor, useNetlink=False, **options)
        self.addCleanup(writer.close)
        return writer

    async def assertProbe(self, words: str, body: str, **options: Any) -> None:
        with self.assertRaises(NotAvailable) as caught:
            await self.writer(body, **options).probe()
        self.assertIn(words, str(caught.exception))

    async def test_probes(self) -> None:
        """Each way in which nft can be of no use is told with what to do."""
        await self.assertProbe("too old: install nftables 1.0.1", "echo nftables v0.9.8")
        await self.assertProbe("does not tell its version", "echo hello")
        await self.assertProbe("signal 11", "kill -SEGV $$")
        await self.assertProbe("no end after", "exec sleep 60", limit=0.2)
        version = '[ "$1" = --version ] && echo "nftables v1.0.6" && exit;'
        await self.assertProbe("CAP_NET_ADMIN", version + "echo 'x: Operation not permitted' >&2; exit 1")
        await self.assertProbe("fib expression", version + "echo 'Error: fib expression' >&2; exit 1")

    async def test_noNft(self) -> None:
        """Without nft the package is named."""
        writer = self.writer("", findTool=find)
        self.patch(tool.os, "access", lambda *_: False)
        with self.assertRaises(NotAvailable) as caught:
            await writer.probe()
        self.assertIn("install the nftables package", str(caught.exception))

    async def test_rejections(self) -> None:
        """Whatever nft does wrong is RulesRejected, in one line."""
        absent = '[ "$1" = --json ] && echo "Error: No such file or directory" >&2 && exit 1;'
        for body, words in (
            (absent + "echo 'Error: out of memory' >&2; echo more >&2; exit 1", "Error: out of memory"),
            (absent + "kill -SEGV $$", "signal 11"),
            (absent + "exec sleep 60", "no end after"),
            ("echo 'Error: cache' >&2; exit 1", "Error: cache"),
            ("echo '{'", "not JSON"),
            ("echo '[]'", "not a JSON object"),
        ):
            # Only what hangs may take too long.
            writer = self.writer(body, limit=0.3 if "sleep" in body else 20)
            with self.assertRaises(RulesRejected) as caught:
                await writer.replace(SAMPLE)
            self.assertIn(words, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    async def test_close(self) -> None:
        """Closing ends an nft that hangs."""
        writer = self.writer("exec sleep 60")
        call = writer.adopt()
        await writer.close()
        with self.assertRaises(RulesRejected):
            await call


class WatchTests(SynchronousTestCase):
    """Telling others' changes from our own."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.addReader = lambda reader: None  # type: ignore[attr-defined]
        self.clock.removeReader = lambda reader: None  # type: ignore[attr-defined]
        self.calls: list[bool] = []
        self.mine, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.mine.setblocking(False)
        self.addCleanup(self.kernel.close)
        outer = self

        class Mine:
            """A socket pair's end in the place of a netlink socket."""

            def bind(self, address: object) -> None:
                pass

            def setsockopt(self, *arguments: object) -> None:
                pass

            def recv(self, size: int) -> bytes:
                return outer.mine.recv(size)

            def fileno(self) -> int:
                return outer.mine.fileno()

            def close(self) -> None:
                outer.mine.close()

        self.watch = TableWatch(self.clock, lambda *_: Mine(), "kproxy", self.calls.append)  # type: ignore
        self.addCleanup(self.watch.stop)

    def hear(self, what: int, table: str = "kproxy", sender: int = 99, subsystem: int = 10) -> None:
        payload = b"\x01\0\0\0" + text(1, table)
        self.kernel.send(HEADER.pack(16 + len(payload), subsystem << 8 | what, 0, 0, sender) + payload)
        self.watch.doRead()

    def test_foreign(self) -> None:
        """A burst of others' changes gives one call, soon."""
        for _ in range(10):
            self.hear(14)
        self.assertEqual(self.calls, [])
        self.clock.advance(TableWatch.SETTLE)
        self.assertEqual(self.calls, [False])
        self.hear(2)
        self.clock.advance(TableWatch.SETTLE)
        self.assertEqual(self.calls, [False, True])

    def test_notOurs(self) -> None:
        """Our own changes, other tables, generations and other subsystems are no news."""
        self.watch.own(99)
        self.hear(12)
        self.hear(2, table="docker", sender=5)
        self.hear(2, table="kproxy2", sender=5)
        self.hear(15, sender=5)
        self.hear(2, sender=5, subsystem=1)
        self.clock.advance(1)
        self.assertEqual(self.calls, [])

    def test_manyPrograms(self) -> None:
        """Our own socket stays our own, however many programs have run since; of these only the last ones are known."""
        self.watch.own(7, lasting=True)
        for pid in range(100, 150):
            self.watch.own(pid)
        self.hear(12, sender=7)
        self.hear(12, sender=149)
        self.clock.advance(1)
        self.assertEqual(self.calls, [])
        self.hear(12, sender=100)
        self.clock.advance(1)
        self.assertEqual(self.calls, [False])

    def test_overflow(self) -> None:
        """When the kernel could not tell everything, it may have been about us."""

        def recv(size: int) -> bytes:
            self.mine = real
            raise OSError(105, "No buffer space available")

        real = self.mine

        class Full:
            def recv(self, size: int) -> bytes:
                return recv(size)

        self.mine = Full()  # type: ignore[assignment]
        self.watch.doRead()
        self.clock.advance(1)
        self.assertEqual(self.calls, [True])

    def test_stop(self) -> None:
        """After the end nobody is called, also for what was heard before."""
        self.hear(2)
        self.watch.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.watch.stop()

    def test_garbage(self) -> None:
        """Bytes that are no message are passed over."""
        self.kernel.send(b"\xff" * 40)
        self.kernel.send(struct.pack("=I", 8))
        self.watch.doRead()
        self.assertEqual(self.clock.getDelayedCalls(), [])
