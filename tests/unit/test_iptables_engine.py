"""In what order the worker commits, and what it does when that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import structs
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.shared.writers import NODE6, SAMPLE, key, many, same, to
from twisted_kproxy.core.rules import Delta, Guard, Ruleset, applied
from twisted_kproxy.core.values import FAMILIES, Locality
from twisted_kproxy.netfilter.xtlayout import CHAINS, CLUSTER_IPS, GUARD, HOOKS, JUMPS, NO_PORT, REFUSE, render
from twisted_kproxy.netfilter.xtwire import Reply, Request

try:
    from twisted_kproxy.netfilter import xtengine, xttables
    from twisted_kproxy.netfilter.xtcheck import Checked
except Exception as error:
    unavailable = f"python-iptables cannot be used here: {error}"
else:
    unavailable = ""


class FakeTable:
    """
    A table whose commits take effect in a dictionary.

    :ivar trouble: errors for its next commits, ``None`` for none.
    """

    def __init__(self, kernel: FakeKernel, family: str, name: Any) -> None:
        self.kernel, self.family, self.name = kernel, family, name
        self.trouble: list[Exception | None] = []
        self.committed: dict[str, list[bytes]] | None = None
        self.edited: dict[str, list[bytes]] = {}
        self.dirty = False
        self.jumpsAreRight = True

    def __str__(self) -> str:
        return f"{self.family} {self.name}"

    def refresh(self) -> None:
        self.dirty = False
        self.edited = {chain: list(entries) for chain, entries in (self.committed or {}).items()}

    def close(self) -> None:
        pass

    def commit(self) -> None:
        if not self.dirty:
            return
        trouble = self.trouble.pop(0) if self.trouble else None
        if trouble is not None:
            raise trouble
        self.committed, self.dirty = self.edited, False
        self.kernel.commits.append(str(self))
        self.kernel.whenCommitted()

    def isChain(self, chain: str) -> bool:
        return chain in self.edited

    def ownChains(self) -> list[str]:
        return list(self.edited)

    def rules(self, chain: str) -> list[tuple[bytes, str]]:
        return [(data, "") for data in self.edited[chain]]

    def content(self) -> dict[str, list[bytes]] | None:
        return {chain: list(self.edited.get(chain, ())) for chain in CHAINS[self.name]} if self.edited else None

    def isOlder(self) -> bool:
        return not set(CHAINS[self.name]) <= self.edited.keys()

    def normalised(self, chain: str) -> list[bytes]:
        return list(self.edited[chain])

    def normal(self, data: bytes, target: str) -> bytes:
        return data

    def jumpsStand(self) -> bool:
        return self.jumpsAreRight

    def append(self, chain: str, entries: list[bytes]) -> None:
        self.dirty = self.dirty or bool(entries)
        self.edited[chain] += entries

    def prepend(self, chain: str, data: bytes) -> None:
        self.dirty = True
        self.edited[chain].insert(0, data)

    def delete(self, chain: str, entries: list[bytes]) -> None:
        for data in entries:
            self.dirty = True
            if data not in self.edited[chain]:
                raise xttables.Gone(f"a rule is no longer in {chain}")
            self.edited[chain].remove(data)

    def clear(self, chain: str) -> None:
        self.dirty = True
        self.edited[chain] = []

    def placeJumps(self) -> None:
        pass

    def removeOwn(self, keep: Any = ()) -> tuple[str, ...]:
        for chain in [chain for chain in self.edited if chain not in keep]:
            self.dirty = True
            del self.edited[chain]
        return ()


class FakeKernel:
    """All four tables, and who looks on."""

    def __init__(self) -> None:
        self.commits: list[str] = []
        self.whenCommitted: Callable[[], None] = lambda: None
        self.tables = {
            (family, name): FakeTable(self, family, name) for family in ("IPv4", "IPv6") for name in ("nat", "filter")
        }

    def table(self, family: str, name: str) -> FakeTable:
        return self.tables[family, name]

    def names(self, family: str) -> set[str]:
        return {name for (it, name), table in self.tables.items() if it == family and table.committed is not None}

    def counts(self, family: str, name: str) -> tuple[int, int]:
        chains = self.tables[family, name].committed or {}
        return sum(map(len, chains.values())), sum(len(data) for entries in chains.values() for data in entries)


class FakeLock:
    waited = held = 0.0

    def __init__(self, seconds: float) -> None:
        pass

    def __enter__(self) -> FakeLock:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class EngineTests(SynchronousTestCase):
    """Over tables that a test plays."""

    def setUp(self) -> None:
        if unavailable:
            raise SkipTest(unavailable)
        self.kernel = FakeKernel()
        self.patch(xttables, "Lock", FakeLock)
        self.patch(xttables, "tableNames", self.kernel.names)
        self.patch(xttables, "counts", self.kernel.counts)
        self.checked = Checked({}, {}, True)
        self.patch(xtengine, "run", lambda: self.checked)
        self.waits: list[float] = []
        self.patch(xtengine.select, "select", lambda r, w, x, seconds: self.waits.append(seconds))
        self.engine = self.newEngine()

    def newEngine(self) -> Any:
        engine = xtengine.Engine()
        engine._table = self.kernel.table
        return engine

    def serve(self, op: str, **said: Any) -> Reply:
        reply: Reply = self.engine.serve(Request(op, **said))
        return reply

    def replace(self, ruleset: Ruleset) -> Reply:
        reply: Reply = self.engine.serve(Request.replacing(ruleset))
        return reply

    def apply(self, delta: Delta) -> Reply:
        reply: Reply = self.engine.serve(Request.applying(delta))
        return reply

    def inForce(self) -> Ruleset | None:
        """Read by another worker."""
        self.engine, mine = self.newEngine(), self.engine
        try:
            return self.serve("adopt").ruleset()
        finally:
            self.engine = mine

    def test_guardsFirst(self) -> None:
        """Nothing leads to a port before it is guarded, and no guard goes before what leads there has gone."""
        self.assertEqual(self.replace(SAMPLE).error, "")
        one, two = Guard("IPv4", "TCP", 40001), Guard("IPv4", "TCP", 47000)
        moved = key("10.96.0.10", 80)
        seen: list[bool] = []

        def look() -> None:
            nat = self.kernel.table("IPv4", "nat").committed or {}
            guards = (self.kernel.table("IPv4", "filter").committed or {})[GUARD]
            for guard, target in ((one, 40001), (two, 47000)):
                led = any(
                    data in render(Ruleset({moved: same(to(target))}), "IPv4").nat[chain]
                    for chain, entries in nat.items()
                    for data in entries
                    if chain.startswith("KPROXY-PORTALS")
                )
                guarded = render(Ruleset(guards=frozenset({guard})), "IPv4").filter[GUARD][0] in guards
                seen.append(guarded or not led)

        self.kernel.whenCommitted = look
        self.kernel.commits.clear()
        step = Delta({moved: same(to(47000))}, frozenset({two}), frozenset({one}))
        self.assertEqual(self.apply(step).error, "")
        self.assertEqual(self.kernel.commits, ["IPv4 filter", "IPv4 nat", "IPv4 filter"])
        self.assertEqual(self.replace(SAMPLE).error, "")
        self.assertTrue(seen and all(seen))

    def test_oneCommitForOneTable(self) -> None:
        """A step that only concerns nat commits nat once, and nothing else."""
        self.replace(SAMPLE)
        self.kernel.commits.clear()
        self.apply(Delta({key("10.96.0.10", 80): same(to(41000))}))
        self.assertEqual(self.kernel.commits, ["IPv4 nat"])
        self.apply(Delta({key("10.96.0.10", 80): same(to(41000)), key("10.9.9.9", 1): None}))
        self.assertEqual(self.kernel.commits, ["IPv4 nat"])

    def test_collision(self) -> None:
        """Who was overtaken by somebody without the lock reads and edits anew, a few times."""
        self.replace(SAMPLE)
        nat = self.kernel.table("IPv4", "nat")
        nat.trouble = [xttables.Collision("busy")] * xtengine.RETRIES
        step = Delta({key("10.96.0.10", 80): same(to(47000))}, frozenset({Guard("IPv4", "TCP", 47000)}))
        self.assertEqual(self.apply(step).error, "")
        self.assertEqual(len(self.waits), xtengine.RETRIES)
        found = self.inForce()
        assert found is not None
        self.assertEqual(found.rules[key("10.96.0.10", 80)], same(to(47000)))

    def test_collisionsWithoutEnd(self) -> None:
        """Not for ever; then what was committed before is taken back."""
        self.replace(SAMPLE)
        self.kernel.table("IPv4", "nat").trouble = [xttables.Collision("busy")] * (xtengine.RETRIES + 1)
        step = Delta({key("10.96.0.10", 80): same(to(47000))}, frozenset({Guard("IPv4", "TCP", 47000)}))
        self.assertIn("without the lock", self.apply(step).error)
        self.assertEqual(self.inForce(), SAMPLE)

    def test_refusedHalfway(self) -> None:
        """When the second family is refused the first one is put back; the next step starts from there."""
        self.replace(SAMPLE)
        for op in (self.replace, lambda new: self.apply(Delta(dict(new.rules)))):
            self.kernel.table("IPv6", "nat").trouble = [xttables.Refused("no memory")]
            self.assertIn("no memory", op(many(40)).error)
            self.assertEqual(self.inForce(), SAMPLE)
        self.assertEqual(self.apply(Delta({key("10.96.0.10", 80): None})).error, "")

    def test_refusedForGood(self) -> None:
        """Where even that is refused, the error says so, and steps are refused until all is written anew."""
        self.replace(SAMPLE)
        self.kernel.table("IPv4", "nat").trouble = [None, xttables.Refused("no memory")]
        self.kernel.table("IPv6", "nat").trouble = [xttables.Refused("no memory")]
        error = self.replace(many(40)).error
        self.assertIn("could not be restored", error)
        self.assertIn("half-way", self.apply(Delta({key("10.96.0.10", 80): None})).error)
        self.assertEqual(self.replace(SAMPLE).error, "")
        self.assertEqual(self.apply(Delta({key("10.9.9.9", 80): None})).error, "")
        self.assertEqual(self.inForce(), SAMPLE)

    def test_unknownBefore(self) -> None:
        """A worker that did not know what was in force cannot take anything back, and says so."""
        self.replace(SAMPLE)
        self.engine = self.newEngine()
        self.kernel.table("IPv6", "nat").trouble = [xttables.Refused("no memory")]
        self.assertIn("is not known", self.replace(many(40)).error)
        self.assertIn("half-way", self.apply(Delta({key("10.96.0.10", 80): None})).error)
        self.serve("adopt")
        self.assertNotIn("half-way", self.apply(Delta({key("10.96.0.10", 80): None})).error)

    def test_gone(self) -> None:
        """A step that does not find what it was to take out changes nothing, and the next one reads first."""
        self.replace(SAMPLE)
        nat = self.kernel.table("IPv4", "nat")
        assert nat.committed is not None
        nat.committed["KPROXY-PORTALS-HOST"].clear()
        self.kernel.commits.clear()
        step = Delta({key("10.96.0.10", 80): None}, frozenset({Guard("IPv4", "TCP", 5)}))
        self.assertIn("no longer", self.apply(step).error)
        self.assertEqual(self.kernel.commits, [])
        self.assertIn("nothing that can be read", self.apply(step).error)

    def test_missingFamily(self) -> None:
        """Rules of a family that this machine cannot have are refused by name; the other one goes on."""
        self.checked = Checked({"IPv6": "no ip6_tables here"}, {"IPv4": "no xt_sctp here"}, True)
        four = Ruleset({it: rule for it, rule in SAMPLE.rules.items() if it.family == "IPv4"})
        self.assertEqual(self.replace(four).error, "")
        error = self.apply(Delta({key("fd00:10:96::1", 80): same(to(1, NODE6))})).error
        self.assertEqual(error, "[fd00:10:96::1]:80/TCP: no ip6_tables here")
        self.assertIn("no xt_sctp here", self.apply(Delta({key("10.96.0.1", 80, "SCTP"): same(to(1))})).error)
        self.assertIn("python-iptables", self.serve("check").text)
        self.checked = Checked({"IPv4": "no ip_tables here", "IPv6": "no ip6_tables here"}, {}, True)
        reply = self.serve("check")
        self.assertEqual((reply.error, reply.unavailable), ("no ip_tables here", True))

    def test_busy(self) -> None:
        """Who does not get the lock has changed nothing, and knows that."""
        self.replace(Ruleset({key("10.96.0.1", 80): same(to(1))}))

        class NoLock(FakeLock):
            def __enter__(self) -> FakeLock:
                raise xttables.Busy("locked by another")

        self.patch(xttables, "Lock", NoLock)
        self.assertEqual(self.replace(SAMPLE).error, "locked by another")
        self.patch(xttables, "Lock", FakeLock)
        self.assertEqual(self.apply(Delta(dict(SAMPLE.rules))).error, "")
        found = self.inForce()
        assert found is not None
        self.assertEqual(len(found.rules), len(SAMPLE.rules) + 1)

    def test_peek(self) -> None:
        """Other sizes are looked into; what is as it was is no news, and news are told once."""
        self.assertFalse(self.serve("peek").known)
        self.replace(SAMPLE)
        self.assertEqual(self.serve("peek"), Reply(known=True))
        nat = self.kernel.table("IPv4", "nat")
        assert nat.committed is not None
        entries = nat.committed["KPROXY-PORTALS-HOST"]
        entries.append(entries.pop(0))  # another order of the same is the same
        self.assertEqual(self.serve("peek", full=True), Reply(known=True))
        entries.pop()
        self.assertTrue(self.serve("peek").changed)
        self.assertFalse(self.serve("peek").changed)
        self.replace(SAMPLE)
        self.kernel.table("IPv6", "filter").jumpsAreRight = False
        self.assertEqual(self.serve("peek"), Reply(known=True))
        self.assertEqual(self.serve("peek", full=True), Reply(changed=True))

    def test_families(self) -> None:
        """A family without rules has no chains, but for one that says that there is a ruleset."""
        self.replace(SAMPLE)
        self.replace(Ruleset())
        self.assertEqual(self.inForce(), Ruleset())
        self.assertEqual(self.kernel.table("IPv6", "nat").committed, {})
        self.assertEqual(set(self.kernel.table("IPv4", "nat").committed or {}), set(CHAINS["nat"]))

    def test_twoTimes(self) -> None:
        """Families that were written at different times are not taken for one ruleset."""
        self.replace(SAMPLE)
        old = self.kernel.table("IPv6", "nat").committed
        self.replace(structs.replace(SAMPLE, locality=Locality(("10.0.0.0/8",))))
        self.kernel.table("IPv6", "nat").committed = old
        self.assertIsNone(self.inForce())

    def test_earlierVersion(self) -> None:
        """
        What a version without chains for ClusterIPs has left is taken over, and the first step adds what is missing
        and nothing else.
        """
        old = structs.replace(
            SAMPLE,
            rules={it: rule for it, rule in SAMPLE.rules.items() if rule.sources is None},
            clusterIPs=frozenset(),
            locality=Locality(("10.0.0.0/8",)),
        )
        self.replace(old)
        for family in FAMILIES:
            filters = self.kernel.table(family, "filter").committed
            assert filters is not None
            for chain in (CLUSTER_IPS, NO_PORT):
                self.assertEqual(filters.pop(chain), [])
        self.engine = self.newEngine()
        self.assertEqual(self.serve("adopt").ruleset(), old)
        self.assertEqual(self.serve("peek", full=True), Reply(known=True))
        self.kernel.commits.clear()
        step = Delta(clusterIPsAdded=frozenset({"10.96.0.10", "fd00:10:96::10"}))
        self.assertEqual(self.apply(step).error, "")
        self.assertEqual(self.kernel.commits, ["IPv4 filter", "IPv6 filter"])
        self.assertEqual(self.inForce(), applied(old, step))
        self.kernel.commits.clear()
        self.assertEqual(self.apply(Delta({key("10.96.0.10", 80): None})).error, "")
        self.assertEqual(self.kernel.commits, ["IPv4 nat"])

    def test_clusterIPs(self) -> None:
        """A ClusterIP that comes or goes takes one rule of filter; so does a frontend that is refused, before it."""
        self.replace(SAMPLE)
        filters = self.kernel.table("IPv4", "filter")
        before = dict(filters.committed or {})
        self.kernel.commits.clear()
        for step in (
            Delta(clusterIPsAdded=frozenset({"10.96.0.77", "203.0.113.77"})),
            Delta({key("10.96.0.77", 1): same("drop"), key("203.0.113.77", 1): same("drop")}),
        ):
            self.assertEqual(self.apply(step).error, "")
        self.assertEqual(self.kernel.commits, ["IPv4 filter", "IPv4 nat", "IPv4 filter"])
        after = filters.committed or {}
        self.assertEqual(after[CLUSTER_IPS][:-1], before[CLUSTER_IPS])
        self.assertEqual(after[REFUSE][2:-1], before[REFUSE])
        gone = frozenset({"10.96.0.77", "203.0.113.77"})
        self.apply(Delta({key("10.96.0.77", 1): None, key("203.0.113.77", 1): None}, clusterIPsRemoved=gone))
        self.assertEqual(self.inForce(), SAMPLE)
        self.assertEqual(filters.committed, before)

    def test_missingFamilyOfServices(self) -> None:
        """A network of ClusterIPs in a family that this machine cannot have is left alone; a ClusterIP is refused."""
        self.checked = Checked({"IPv6": "no ip6_tables here"}, {}, True)
        four = Ruleset({key("10.96.0.10", 80): same(to(1))}, locality=Locality(services=("10.96.0.0/16", "fd00::/112")))
        self.assertEqual(self.replace(four).error, "")
        self.assertEqual(self.inForce(), four)
        self.assertIsNone(self.kernel.table("IPv6", "filter").committed)
        error = self.apply(Delta(clusterIPsAdded=frozenset({"fd00::1"}))).error
        self.assertEqual(error, "ClusterIP fd00::1: no ip6_tables here")
        self.kernel.commits.clear()
        self.assertEqual(self.apply(Delta({key("10.96.0.10", 80): None})).error, "")
        self.assertEqual(self.kernel.commits, ["IPv4 nat"])

    def test_unknownCall(self) -> None:
        """A call that nobody knows is an error."""
        self.assertIn("dance", self.serve("dance").error)

    def test_jumps(self) -> None:
        """Every hook of a jump is one that is looked at, and every chain that a jump leads to is one of ours."""
        for jump in JUMPS:
            self.assertIn(jump.hook, HOOKS[jump.table])
            self.assertIn(jump.chain, CHAINS[jump.table])
