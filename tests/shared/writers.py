"""The suite that every rule writer passes."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import deferLater
from zope.interface.verify import verifyObject

from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset, Target, Verdict, applied, deltaBetween
from twisted_kproxy.core.values import Family, FrontendKey, Locality, Protocol
from twisted_kproxy.interfaces import IRuleWriter, RulesRejected

NODE4 = "192.0.2.2"
NODE6 = "2001:db8::2"
INSIDERS = ("10.244.0.0/16", "fd00:10:244::/56")
#: One of everything that may be said of this node's addresses.
LOCALITY = Locality(
    insiders=INSIDERS,
    insiderLinks=("cali*", "cbr0"),
    nodePorts=("127.0.0.0/8", "192.0.2.0/24", "::1/128", "2001:db8::/64"),
    services=("10.96.0.0/16", "fd00:10:96::/112"),
)
#: What is behind the insiders in it.
LOCALITY_REST = (LOCALITY.insiderLinks, LOCALITY.nodePorts, LOCALITY.services)


def key(address: str, port: int, protocol: Protocol = "TCP", family: Family | None = None) -> FrontendKey:
    """A frontend; ``""`` is a node port."""
    return FrontendKey(family or ("IPv6" if ":" in address else "IPv4"), protocol, address, port)


def to(port: int, address: str = NODE4) -> Target:
    return Target(address, port)


def same(verdict: Verdict, sources: tuple[str, ...] | None = None) -> Rule:
    """A rule that is the same for everybody (who is in ``sources``)."""
    return Rule(verdict, verdict, sources)


#: One of everything.
SAMPLE = Ruleset(
    rules={
        key("10.96.0.10", 80): same(to(40001)),
        key("10.96.0.10", 53, "UDP"): same(to(40002)),
        key("10.96.0.10", 53, "TCP"): same(to(40003)),
        key("fd00:10:96::10", 80): same(to(40001, NODE6)),
        key("fd00:10:96::10", 53, "UDP"): same(to(40002, NODE6)),
        key("", 30080, "TCP", "IPv4"): same(to(40001)),
        key("", 30080, "TCP", "IPv6"): same(to(40001, NODE6)),
        key("", 30053, "UDP", "IPv4"): same(to(40002)),
        key("", 30053, "UDP", "IPv6"): same(to(40002, NODE6)),
        # external addresses under the Local policy
        key("203.0.113.5", 443): Rule(outside=to(40004), inside=to(40005)),
        key("2001:db8:5::5", 443): Rule(outside=to(40004, NODE6), inside=to(40005, NODE6)),
        key("203.0.113.5", 444): Rule(outside="drop", inside=to(40005)),
        key("2001:db8:5::5", 444, "UDP"): Rule(outside="drop", inside=to(40005, NODE6)),
        key("203.0.113.5", 445): Rule(outside="reject", inside="drop"),
        key("203.0.113.5", 446): Rule(outside=to(40004), inside="drop"),
        key("203.0.113.5", 447): Rule(outside=to(40004), inside="reject"),
        key("", 30444, "TCP", "IPv4"): Rule(outside="drop", inside=to(40005)),
        key("", 30444, "TCP", "IPv6"): Rule(outside="drop", inside=to(40005, NODE6)),
        key("", 30445, "UDP", "IPv4"): Rule(outside=to(40004), inside=to(40005)),
        key("", 30446, "UDP", "IPv6"): Rule(outside=to(40004, NODE6), inside="reject"),
        # for some sources only
        key("203.0.113.6", 443): Rule(to(40004), to(40005), ("10.0.0.0/8", "198.51.100.0/25", "198.51.100.200/32")),
        key("203.0.113.6", 443, "UDP"): same(to(40002), ("198.51.100.7/32",)),
        key("2001:db8:5::6", 443): Rule(to(40004, NODE6), to(40005, NODE6), ("2001:db8:7::/48", "fd00::/8")),
        key("2001:db8:5::6", 443, "UDP"): same(to(40002, NODE6), ("::/0",)),
        key("203.0.113.6", 444): Rule("drop", to(40005), ("0.0.0.0/0",)),
        key("203.0.113.6", 445): same(to(40004), ()),
        key("2001:db8:5::6", 445): same("reject", ()),
        key("203.0.113.6", 446): same("drop", ("0.0.0.0/1", "192.0.2.1/32")),
        # nothing to lead to
        key("10.96.0.11", 80): same("reject"),
        key("10.96.0.11", 53, "UDP"): same("reject"),
        key("fd00:10:96::11", 80): same("reject"),
        key("10.96.0.12", 80): same("drop"),
        key("fd00:10:96::12", 53, "UDP"): same("drop"),
        key("", 30081, "TCP", "IPv4"): same("reject"),
        key("", 30081, "UDP", "IPv6"): same("reject"),
        key("", 30082, "TCP", "IPv4"): same("drop"),
        key("", 30082, "TCP", "IPv6"): same("drop"),
    },
    guards=frozenset(
        {
            Guard("IPv4", "TCP", 40001),
            Guard("IPv6", "TCP", 40001),
            Guard("IPv4", "UDP", 40002),
            Guard("IPv6", "UDP", 40002),
        }
    ),
    clusterIPs=frozenset({"10.96.0.10", "10.96.0.11", "10.96.0.12", "fd00:10:96::10", "fd00:10:96::11"}),
    locality=LOCALITY,
)


def many(count: int, port: int = 40000) -> Ruleset:
    """That many ClusterIPs, half of them IPv6, a tenth of them without endpoints."""
    rules: dict[FrontendKey, Rule] = {}
    for n in range(count):
        high, low = divmod(n // 2, 250)
        verdict: Verdict
        if n % 2:
            where, verdict = f"fd00:10:96::{n // 2 + 1:x}", to(port + n % 20000, NODE6)
        else:
            where, verdict = f"10.{97 + high // 250}.{high % 250}.{low + 1}", to(port + n % 20000)
        rules[key(where, 80, "UDP" if n % 3 == 0 else "TCP")] = same("reject" if n % 10 == 9 else verdict)
    return Ruleset(rules, frozenset(), locality=Locality(INSIDERS))


class WriterTests:
    """
    A mixin for :class:`twisted.trial.unittest.TestCase`. What is in force is read back by another writer over the
    same kernel, never asked of the one under test.

    :cvar bulk: how many frontends the test of a big change uses.
    :cvar patience: seconds within which a foreign change must be noticed.
    """

    bulk = 5000
    patience = 30.0

    # --- what a concrete suite gives ---

    def makeWriter(self) -> Any:
        """A new writer; each call over the same kernel state within one test. Clean it up."""
        raise NotImplementedError

    def inForce(self) -> Any:
        """What is in force, as a Ruleset or ``None``, read past the writer under test. May be a Deferred."""
        return self.makeWriter().adopt()

    def makeFailingWriter(self) -> Any:
        """A writer over the same kernel state whose writes the kernel or the tool refuses."""
        raise NotImplementedError

    def disturb(self) -> Any:
        """Remove our rules, or some of them, as another program would."""
        raise NotImplementedError

    # --- tools ---

    async def assertInForce(self, expected: Ruleset | None) -> None:
        found = await maybeDeferred(self.inForce)
        if expected is None or found is None:
            self.assertEqual(found, expected)  # type: ignore[attr-defined]
            return
        self.assertEqual(deltaBetween(expected, found), Delta())  # type: ignore[attr-defined]

    async def writerWith(self, ruleset: Ruleset) -> Any:
        writer = self.makeWriter()
        await writer.probe()
        await writer.adopt()
        await writer.replace(ruleset)
        return writer

    async def assertStep(self, new: Ruleset, old: Ruleset = SAMPLE) -> None:
        writer = await self.writerWith(old)
        await writer.apply(deltaBetween(old, new))
        await self.assertInForce(new)

    async def assertRejected(self, call: Deferred[Any]) -> None:
        try:
            await call
        except RulesRejected as error:
            self.assertNotEqual(str(error), "")  # type: ignore[attr-defined]
        else:
            self.fail("what the kernel refused was reported as done")  # type: ignore[attr-defined]

    # --- the suite ---

    def test_interface(self) -> None:
        """It is a rule writer, with a name."""
        writer = self.makeWriter()
        verifyObject(IRuleWriter, writer)
        self.assertTrue(writer.name)  # type: ignore[attr-defined]

    async def test_probeLeavesNoTrace(self) -> None:
        """A probe says a few words and leaves nothing in force."""
        words = await self.makeWriter().probe()
        self.assertIsInstance(words, str)  # type: ignore[attr-defined]
        self.assertTrue(words)  # type: ignore[attr-defined]
        await self.assertInForce(None)

    async def test_nothingToAdopt(self) -> None:
        """On a fresh node there is nothing to adopt."""
        writer = self.makeWriter()
        await writer.probe()
        self.assertIsNone(await writer.adopt())  # type: ignore[attr-defined]

    async def test_replaceIsReadBack(self) -> None:
        """Both families, TCP and UDP, verdicts, guards and all that is said of addresses come back as written."""
        await self.writerWith(SAMPLE)
        await self.assertInForce(SAMPLE)

    async def test_replaceReplaces(self) -> None:
        """A second ruleset takes the place of the whole first one."""
        writer = await self.writerWith(SAMPLE)
        guards = frozenset({Guard("IPv4", "TCP", 7777)})
        rules = {key("10.96.7.7", 7): same(to(7777)), key("203.0.113.6", 443): same(to(7777), ("10.0.0.0/9",))}
        locality = Locality(("10.1.0.0/16",), ("veth*",), ("192.0.2.2/32", "::/0"), ("10.96.0.0/12",))
        other = Ruleset(rules, guards, frozenset({"10.96.0.11", "10.96.7.7"}), locality)
        await writer.replace(other)
        await self.assertInForce(other)

    async def test_replaceWithNothing(self) -> None:
        """An empty ruleset is one too."""
        writer = await self.writerWith(SAMPLE)
        await writer.replace(Ruleset())
        await self.assertInForce(Ruleset())

    async def test_replaceTwice(self) -> None:
        """The same ruleset twice is harmless."""
        writer = await self.writerWith(SAMPLE)
        await writer.replace(SAMPLE)
        await self.assertInForce(SAMPLE)

    async def test_restart(self) -> None:
        """A writer of a later run adopts what is in force and goes on with steps."""
        first = await self.writerWith(SAMPLE)
        await first.close()
        second = self.makeWriter()
        await second.probe()
        found = await second.adopt()
        self.assertEqual(deltaBetween(SAMPLE, found), Delta())  # type: ignore[attr-defined]
        delta = Delta({key("10.96.0.99", 99): same(to(49999)), key("10.96.0.10", 80): None})
        await second.apply(delta)
        await self.assertInForce(applied(SAMPLE, delta))

    async def test_add(self) -> None:
        """Frontends are added beside those that are there."""
        more = {
            key("10.96.1.1", 80): same(to(41000)),
            key("fd00:10:96::1:1", 80, "UDP"): same(to(41001, NODE6)),
            key("", 31000, "TCP", "IPv4"): same(to(41002)),
            key("", 31000, "UDP", "IPv6"): Rule(outside="drop", inside=to(41003, NODE6)),
            key("198.51.100.7", 80): Rule(outside="drop", inside=to(41004)),
            key("10.96.1.2", 80): same("reject"),
        }
        await self.assertStep(applied(SAMPLE, Delta(more)))

    async def test_removeEachKind(self) -> None:
        """Each of the sample's frontends can be removed alone."""
        writer = await self.writerWith(SAMPLE)
        left = SAMPLE
        for it in SAMPLE.rules:
            step = Delta({it: None})
            await writer.apply(step)
            left = applied(left, step)
        await self.assertInForce(left)
        self.assertEqual(dict(left.rules), {})  # type: ignore[attr-defined]

    async def test_everyVerdictToEveryOther(self) -> None:
        """A frontend goes from any rule to any other, in both families, with address and as node port."""
        for family, node in (("IPv4", NODE4), ("IPv6", NODE6)):
            one, two = to(42001, node), to(42002, node)
            rules = [same(one), same(two), same("reject"), same("drop"), Rule(one, two), Rule("drop", one)]
            rules += [Rule("reject", one), Rule(one, "drop"), Rule(two, "reject"), Rule("reject", "drop")]
            where = "10.96.2.2" if family == "IPv4" else "fd00:10:96::2:2"
            keys = [key(where, 80), key("", 32000, "UDP", family)]  # type: ignore[arg-type]
            old = Ruleset(dict.fromkeys(keys, rules[0]), frozenset(), locality=Locality(INSIDERS))
            writer = await self.writerWith(old)
            # A walk over every ordered pair: each step is looked at in the end of a short chain of its own.
            for first in rules:
                for second in rules:
                    for rule in (first, second):
                        new = Ruleset(dict.fromkeys(keys, rule), frozenset(), locality=Locality(INSIDERS))
                        step = deltaBetween(old, new)
                        if step:
                            await writer.apply(step)
                        old = new
                await self.assertInForce(old)

    async def test_manyAtOnce(self) -> None:
        """Adding, changing and removing go together in one step."""
        new = Ruleset(dict(list(many(420, port=30000).rules.items())[50:]))
        await self.assertStep(new, many(300))

    async def test_removeWhatIsNotThere(self) -> None:
        """Removing a frontend that is not in force is harmless."""
        writer = await self.writerWith(SAMPLE)
        await writer.apply(Delta({key("10.96.3.3", 80): None, key("", 33333, "TCP", "IPv6"): None}))
        await self.assertInForce(SAMPLE)

    async def test_addWhatIsThere(self) -> None:
        """Adding a frontend that is in force as it shall be is harmless."""
        writer = await self.writerWith(SAMPLE)
        await writer.apply(deltaBetween(Ruleset(), SAMPLE))
        await self.assertInForce(SAMPLE)

    async def test_guards(self) -> None:
        """Guards come and go by steps."""
        guards = frozenset({Guard("IPv4", "TCP", 40001), Guard("IPv6", "UDP", 45000), Guard("IPv4", "UDP", 45001)})
        await self.assertStep(Ruleset(SAMPLE.rules, guards, SAMPLE.clusterIPs, LOCALITY))

    async def test_locality(self) -> None:
        """Whatever is said of this node's addresses can change by a step, to nothing at all and back."""
        writer = await self.writerWith(SAMPLE)
        for locality in (
            Locality(("10.128.0.0/9", "fd00:1::/64", "fd00:2::/64"), *LOCALITY_REST),
            Locality((), *LOCALITY_REST),
            Locality(("0.0.0.0/0",), *LOCALITY_REST),
            Locality(INSIDERS, ("veth*",), *LOCALITY_REST[1:]),
            Locality(INSIDERS, (), *LOCALITY_REST[1:]),
            Locality(INSIDERS, ("a", "ab*", "a-name-of-15-ch", "14-characters-*")),
            Locality(INSIDERS, nodePorts=()),
            Locality(INSIDERS, nodePorts=("192.0.2.2/32", "::/0")),
            Locality(services=("10.96.0.0/16", "10.100.0.0/16", "fd00:10:96::/112")),
            Locality(nodePorts=("0.0.0.0/0", "2001:db8::2/128"), services=("fd00:10:96::/112",)),
            Locality(),
            LOCALITY,
        ):
            await writer.apply(Delta(locality=locality))
            await self.assertInForce(Ruleset(SAMPLE.rules, SAMPLE.guards, SAMPLE.clusterIPs, locality))

    async def test_localityWithRules(self) -> None:
        """It can change in the same step in which frontends come and go."""
        rules = {key("10.96.7.7", 7): same(to(7777)), key("10.96.0.10", 80): None, key("203.0.113.6", 443): None}
        for locality in (Locality(("10.1.0.0/16",), LOCALITY.insiderLinks), Locality(INSIDERS, ("veth0",))):
            step = Delta(
                rules,
                guardsRemoved=SAMPLE.guards,
                clusterIPsAdded=frozenset({"10.96.7.7"}),
                clusterIPsRemoved=frozenset({"10.96.0.10"}),
                locality=locality,
            )
            await self.assertStep(applied(SAMPLE, step))

    async def test_clusterIPs(self) -> None:
        """Addresses of Services come and go by steps; what is there already, or not there, is harmless."""
        writer = await self.writerWith(SAMPLE)
        one, two = frozenset({"10.96.0.77", "fd00:10:96::77"}), frozenset({"10.96.0.10", "fd00:10:96::11"})
        for step in (
            Delta(clusterIPsAdded=one),
            Delta(clusterIPsRemoved=two),
            Delta(clusterIPsAdded=one | two, clusterIPsRemoved=frozenset({"10.96.99.99"})),
            Delta(clusterIPsAdded=two, clusterIPsRemoved=one),
        ):
            await writer.apply(step)
        await self.assertInForce(SAMPLE)
        await writer.apply(Delta(clusterIPsRemoved=SAMPLE.clusterIPs))
        await self.assertInForce(Ruleset(SAMPLE.rules, SAMPLE.guards, locality=LOCALITY))

    async def test_sources(self) -> None:
        """The sources of a frontend go from any to any others, alone and with where it leads."""
        some: dict[Family, list[tuple[str, ...] | None]] = {
            "IPv4": [None, (), ("10.0.0.0/8",), ("10.0.0.0/9", "192.0.2.0/24"), ("10.0.0.0/8", "192.0.2.1/32")],
            "IPv6": [None, (), ("fd00::/8",), ("2001:db8::/32", "fd00::/9"), ("2001:db8::1/128", "fd00::/8")],
        }
        for family, node, where in (("IPv4", NODE4, "203.0.113.9"), ("IPv6", NODE6, "2001:db8:5::9")):
            keys = [key(where, 80), key(where, 80, "UDP"), key(where, 81)]
            ways: list[Verdict] = [to(42001, node), to(42002, node), "drop"]
            rules = [Rule(ways[n % 3], to(42003, node), it) for n, it in enumerate(some[family])]  # type: ignore[index]
            rules.append(same(to(42001, node), some[family][3]))  # type: ignore[index]
            old = Ruleset(dict.fromkeys(keys, rules[0]), locality=Locality(INSIDERS))
            writer = await self.writerWith(old)
            for first in rules:
                for second in rules:
                    for rule in (first, second):
                        # The third one stays as it is: its neighbours' sources are none of its business.
                        new = Ruleset({**dict.fromkeys(keys[:2], rule), keys[2]: rules[2]}, locality=Locality(INSIDERS))
                        step = deltaBetween(old, new)
                        if step:
                            await writer.apply(step)
                        old = new
                await self.assertInForce(old)
            await writer.apply(Delta(dict.fromkeys(keys)))
            await self.assertInForce(Ruleset(locality=Locality(INSIDERS)))

    async def test_bulk(self) -> None:
        """Thousands of frontends in one step, then all of them led elsewhere, then gone."""
        writer = await self.writerWith(SAMPLE)
        big = many(self.bulk)
        await writer.apply(deltaBetween(SAMPLE, big))
        await self.assertInForce(big)
        moved = many(self.bulk, port=20000)
        await writer.apply(deltaBetween(big, moved))
        await self.assertInForce(moved)
        await writer.apply(deltaBetween(moved, SAMPLE))
        await self.assertInForce(SAMPLE)

    async def test_applyToNothing(self) -> None:
        """Where nothing is in force a step is refused, not taken for the whole."""
        writer = self.makeWriter()
        await writer.probe()
        await writer.adopt()
        await self.assertRejected(writer.apply(Delta({key("10.96.0.10", 80): same(to(40001))})))
        await self.assertInForce(None)

    async def test_cleanup(self) -> None:
        """Cleaning up removes what any run has left, and says so once."""
        await self.writerWith(SAMPLE)
        later = self.makeWriter()
        self.assertIs(await later.cleanup(), True)  # type: ignore[attr-defined]
        await self.assertInForce(None)
        self.assertIs(await later.cleanup(), False)  # type: ignore[attr-defined]

    async def test_cleanupOfNothing(self) -> None:
        """On a fresh node there is nothing to clean up, and that is no error."""
        self.assertIs(await self.makeWriter().cleanup(), False)  # type: ignore[attr-defined]

    async def test_replaceAfterCleanup(self) -> None:
        """The same writer may go on after a cleanup."""
        writer = await self.writerWith(SAMPLE)
        await writer.cleanup()
        await writer.replace(SAMPLE)
        await self.assertInForce(SAMPLE)

    async def test_refusedStep(self) -> None:
        """What is refused fails with RulesRejected, and changes nothing."""
        await self.writerWith(SAMPLE)
        writer = self.makeFailingWriter()
        await self.assertRejected(writer.apply(Delta({key("10.96.0.10", 80): None})))
        await self.assertInForce(SAMPLE)

    async def test_refusedReplace(self) -> None:
        """The same for a whole ruleset."""
        await self.writerWith(SAMPLE)
        writer = self.makeFailingWriter()
        await self.assertRejected(writer.replace(many(100)))
        await self.assertInForce(SAMPLE)

    async def test_foreignChangeIsHealed(self) -> None:
        """After another program has removed rules of ours, adopt tells and replace repairs."""
        writer = await self.writerWith(SAMPLE)
        await maybeDeferred(self.disturb)
        found = await writer.adopt()
        self.assertNotEqual(found, SAMPLE)  # type: ignore[attr-defined]
        await writer.replace(SAMPLE)
        await self.assertInForce(SAMPLE)

    async def test_foreignChangeIsNoticed(self) -> None:
        """A watch calls back when another program removes rules of ours, and not for what we do."""
        writer = await self.writerWith(SAMPLE)
        calls: list[bool] = []
        writer.watch(lambda: calls.append(True))
        await writer.apply(Delta({key("10.96.0.10", 80): None}))
        await writer.replace(many(200))
        await writer.replace(SAMPLE)
        await deferLater(reactor, 0.3, lambda: None)
        self.assertEqual(calls, [])  # type: ignore[attr-defined]
        await maybeDeferred(self.disturb)
        waited = 0.0
        while not calls and waited < self.patience:
            await deferLater(reactor, 0.05, lambda: None)
            waited += 0.05
        self.assertTrue(calls, "nobody was told")  # type: ignore[attr-defined]
        writer.watch(None)

    async def test_endedWatch(self) -> None:
        """After a watch has been ended nobody is called back."""
        writer = await self.writerWith(SAMPLE)
        calls: list[bool] = []
        writer.watch(lambda: calls.append(True))
        writer.watch(None)
        await maybeDeferred(self.disturb)
        await deferLater(reactor, min(1.5, self.patience), lambda: None)
        self.assertEqual(calls, [])  # type: ignore[attr-defined]

    async def test_closeKeepsRules(self) -> None:
        """Closing lets go of everything but the rules; twice is harmless."""
        writer = await self.writerWith(SAMPLE)
        await writer.close()
        await writer.close()
        await self.assertInForce(SAMPLE)


class KernelWriterTests(WriterTests):
    """The same for a writer that shares its kernel with other programs."""

    def plantForeign(self) -> None:
        """Put rules of other programs beside ours."""
        raise NotImplementedError

    def foreign(self) -> str:
        """The rules of other programs, as text without counters."""
        raise NotImplementedError

    async def test_foreignRulesStay(self) -> None:
        """Whatever we write, and cleaning up, leave the rules of others exactly as they were."""
        self.plantForeign()
        before = self.foreign()
        self.assertTrue(before.strip(), "the test has planted nothing")  # type: ignore[attr-defined]
        writer = await self.writerWith(SAMPLE)
        self.assertEqual(self.foreign(), before)  # type: ignore[attr-defined]
        await writer.apply(Delta({key("10.96.0.10", 80): None}))
        await writer.replace(many(20))
        self.assertEqual(self.foreign(), before)  # type: ignore[attr-defined]
        await writer.cleanup()
        self.assertEqual(self.foreign(), before)  # type: ignore[attr-defined]
