"""
What holds whatever happens: from words to the service map, and from there to rules and sockets. The histories are made
to collide, and are the same in each run.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.desired import Way
from tests.shared.histories import (
    KINDS,
    SOURCES,
    Told,
    histories,
    hostOf,
    newCluster,
    seen,
    someService,
    someSlice,
    synced,
    ways,
)
from tests.shared.proxiers import RecordingObserver, ScriptedBalancer
from tests.unit.test_userspace_dataplane import FakeProxier
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core.resolve import concerns, resolve
from twisted_kproxy.core.rules import Guard, Rule, Ruleset, Target
from twisted_kproxy.core.topology import NodeFacts
from twisted_kproxy.core.values import Change, PoolName, Reached, Rejected, Replaced, Word
from twisted_kproxy.interfaces import RulesNotJudged, RulesRejected
from twisted_kproxy.netfilter.memory import MemoryWriter
from twisted_kproxy.netfilter.plane import RulePlane
from twisted_kproxy.syncer import Syncer
from twisted_kproxy.userspace.dataplane import UserspaceDataplane


def bounded(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


class OrderTests(SynchronousTestCase):
    """The order in which things are written or come does not matter."""

    @given(st.integers(0, 1 << 32))
    @bounded(300)
    def test_resolve(self, seed: int) -> None:
        """Slices, endpoints within them, and what they say twice, in any order, mean the same."""
        rng = random.Random(seed)
        service = someService(rng)
        if not concerns(service):
            return
        facts = NodeFacts("n0", "z")
        slices = list({it.metadata.name: it for it in (someSlice(rng) for _ in range(4))}.values())
        expected = resolve(service, slices, facts)
        shuffled = [self.shuffled(it, rng) for it in slices]
        rng.shuffle(shuffled)
        got = resolve(service, shuffled, facts)
        self.assertEqual(got.ports, expected.ports)
        self.assertEqual(set(got.problems), set(expected.problems))

    @staticmethod
    def shuffled(it: Any, rng: random.Random) -> Any:
        endpoints, ports = list(it.endpoints), list(it.ports)
        rng.shuffle(endpoints)
        rng.shuffle(ports)
        return type(it)(it.metadata, it.addressType, endpoints, ports)

    @given(histories(), st.integers(0, 1 << 32))
    @bounded(200)
    def test_interleavings(self, words: list[Word | Reached], seed: int) -> None:
        """Two ways in which the histories of single objects may be mixed come to the same."""
        rng = random.Random(seed)
        queues: dict[Any, list[Word]] = {}
        for word in words:
            if isinstance(word, Change | Rejected):
                queues.setdefault((word.source, word.kind, word.key), []).append(word)
        one, other = (self.mixed(queues, rng) for _ in range(2))
        self.assertEqual(one, other)

    @staticmethod
    def mixed(queues: dict[Any, list[Word]], rng: random.Random) -> dict[str, Any]:
        cluster = synced(newCluster())
        left = {key: list(words) for key, words in queues.items()}
        while left:
            key = rng.choice(sorted(left))
            cluster.say(left[key].pop(0))
            if not left[key]:
                del left[key]
            if rng.random() < 0.3:
                cluster.current()
        return seen(cluster)


class HistoryTests(SynchronousTestCase):
    """How one came here does not matter, and here is where one should be."""

    @given(histories(), st.integers(0, 1 << 32))
    @bounded(400)
    def test_cluster(self, words: list[Word | Reached], seed: int) -> None:
        """
        After each of the words: what is said is what the oracle says, what did not change is the same object. At the
        end all that can be seen is as after a start on the same objects.
        """
        rng = random.Random(seed)
        cluster, told = synced(newCluster()), Told()
        before = cluster.current()
        for word in words:
            cluster.say(word)
            told.say(word)
            if rng.random() < 0.4:
                continue
            current = cluster.current()
            self.assertEqual(ways(current), told.desired())
            self.assertIs(cluster.current(), current)
            for name, port in current.items():
                if before.get(name) == port:
                    self.assertIs(before[name], port)
            if (dict(before), before.locality) == (dict(current), current.locality):
                self.assertIs(current, before)
            before = current
        self.assertEqual(ways(cluster.current()), told.desired())
        self.assertEqual(seen(cluster), seen(told.fresh()))


class Daemon:
    """
    From a cluster to the kernel, with fakes for sockets and time.

    :param lastPort: the highest port that the fake kernel has given away.
    """

    def __init__(self, cluster: Cluster, writer: MemoryWriter, lastPort: int = 40000) -> None:
        self.errors: dict[str, Exception] = {}
        self.log: list[str] = []
        self.nextPort = lastPort
        self.clock = Clock()
        self.made: list[FakeProxier] = []
        self.cluster, self.writer = cluster, writer
        plane = RulePlane(self.clock, writer, changedOutside=self.changedOutside)
        self.dataplane = UserspaceDataplane(
            self.clock, ScriptedBalancer(), plane, makeTcp=self.make, makeUdp=self.make,  # type: ignore[arg-type]
            addressOf={"IPv4": "192.0.2.2", "IPv6": "2001:db8::2"}.__getitem__, observer=RecordingObserver(),
        )
        self.syncer = Syncer(self.clock, cluster, self.dataplane, self, minPeriod=0.0)  # type: ignore[arg-type]
        cluster.changed = self.syncer.changed
        self.dataplane.start()
        self.syncer.start()
        self.turn()

    def changedOutside(self) -> None:
        self.syncer.resync()

    @property
    def taken(self) -> set[int]:
        """Ports that are in use: no socket opens there."""
        return {it.port for it in self.made if it.listening}

    def make(self, reactor: object, pool: PoolName, balancer: object, observer: object) -> FakeProxier:
        self.made.append(FakeProxier(self, pool))  # type: ignore[arg-type]
        return self.made[-1]

    def queued(self) -> None:
        """See ISyncObserver, as the others."""

    def began(self, update: object) -> None:
        """Not looked at."""

    def applied(self, update: object, seconds: float) -> None:
        """Not looked at."""

    def failed(self, update: object, seconds: float) -> None:
        """Not looked at."""

    def turn(self, seconds: float = 0.0) -> None:
        """Let so much time go by."""
        for _ in range(4):
            self.clock.advance(0.001)
        self.clock.pump([1.0] * min(int(seconds), 30) + [10.0] * (max(0, int(seconds) - 30) // 10))

    def sockets(self) -> dict[int, FakeProxier]:
        """Port → what listens there."""
        found = {it.port: it for it in self.made if it.listening}
        assert len(found) == sum(it.listening for it in self.made), "two sockets on one port"
        return found

    def ways(self) -> dict[str, Way]:
        """Where clients get to: by the rules to a socket, and from there to what it was last told."""
        assert self.writer.inForce is not None
        sockets = self.sockets()

        def follow(verdict: Any) -> tuple[str, Any]:
            if not isinstance(verdict, Target):
                return "", verdict
            it = sockets[verdict.port]
            return str(it.pool.port), frozenset(map(str, it.told[-1]))

        found = {}
        for key, rule in self.writer.inForce.rules.items():
            (owner, outside), (other, inside) = follow(rule.outside), follow(rule.inside)
            found[hostOf(key)] = Way(owner or other, outside, inside, rule.sources)
        return found

    def guards(self) -> frozenset[Guard]:
        """One for each socket."""
        return frozenset(Guard(it.pool.port.family, it.pool.port.protocol, it.port) for it in self.sockets().values())


_mishaps = st.sampled_from(
    ["reject", "reject twice", "not judged", "flushed", "changed", "time", "time", "time", "restart"]
)


class WholeWayTests(SynchronousTestCase):
    """From what sources say to what the kernel does with packets."""

    def assertRight(self, daemon: Daemon, told: Told) -> None:
        """It is as the oracle says; nothing is left of what was."""
        expected = told.desired()
        got = daemon.ways()
        # A rule that leads nowhere does not tell whose it is.
        for key, way in got.items():
            if not way.owner and key in expected:
                got[key] = way._replace(owner=expected[key].owner)
        self.assertEqual(got, expected)
        ruleset = daemon.writer.inForce
        assert ruleset is not None
        self.assertEqual(ruleset.guards, daemon.guards())
        current = daemon.cluster.current()
        clusterIPs = {f.address for port in current.values() for f in port.frontends if f.kind == "ClusterIP"}
        self.assertEqual((ruleset.clusterIPs, ruleset.locality), (clusterIPs, current.locality))

    def assertQuiet(self, daemon: Daemon) -> None:
        """What is compared again, all of it as well, writes nothing and opens nothing."""
        writes, made = len(daemon.writer.writes), len(daemon.made)
        daemon.syncer.changed()
        daemon.turn(1)
        daemon.syncer.resync()
        daemon.turn(120)
        self.assertEqual((len(daemon.writer.writes), len(daemon.made)), (writes, made))

    @given(histories(), st.lists(_mishaps, max_size=12), st.integers(0, 1 << 32))
    @bounded(200)
    def test_mishaps(self, words: list[Word | Reached], mishaps: list[str], seed: int) -> None:
        """
        Whatever goes wrong on the way (writes that are refused, rules that others remove or change, a daemon that is
        killed and started anew), in the end rules and sockets are as the oracle says, and stay so.
        """
        rng = random.Random(seed)
        told = Told()
        daemon = Daemon(synced(newCluster()), MemoryWriter())
        steps: list[Any] = list(words)
        for mishap in mishaps:
            steps.insert(rng.randrange(len(steps) + 1), mishap)
        for step in steps:
            if isinstance(step, str):
                daemon = self.happens(step, daemon, told)
            else:
                daemon.cluster.say(step)
                told.say(step)
                if rng.random() < 0.5:
                    daemon.turn()
        daemon.turn(150)
        self.assertRight(daemon, told)
        self.assertQuiet(daemon)
        fresh = Daemon(told.fresh(), MemoryWriter())
        fresh.turn(1)
        self.assertRight(fresh, told)

    def happens(self, mishap: str, daemon: Daemon, told: Told) -> Daemon:
        writer = daemon.writer
        match mishap:
            case "reject":
                writer.failures = [RulesRejected("not now")]
            case "reject twice":
                writer.failures = [RulesRejected("not now"), RulesRejected("nor now")]
            case "not judged":
                writer.failures = [RulesNotJudged("nobody looked")]
            case "flushed":
                writer.disturb(None)
            case "changed":
                rules = dict(writer.inForce.rules) if writer.inForce else {}
                for key in list(rules)[::2]:
                    rules[key] = Rule("drop", "drop")
                writer.disturb(Ruleset(rules))
            case "time":
                daemon.turn(3)
            case "restart":
                writer.watch(None)
                writer.failures = []
                return Daemon(told.fresh(), writer, daemon.nextPort)
        return daemon

    @given(histories())
    @bounded(200)
    def test_smooth(self, words: list[Word | Reached]) -> None:
        """Without mishaps: right after each word, with one write for it at the most, and none where nothing differs."""
        told = Told()
        daemon = Daemon(synced(newCluster()), MemoryWriter())
        for word in words:
            before, writes = daemon.cluster.current(), len(daemon.writer.writes)
            daemon.cluster.say(word)
            told.say(word)
            daemon.turn()
            self.assertRight(daemon, told)
            most = 0 if daemon.cluster.current() is before else 1
            self.assertLessEqual(len(daemon.writer.writes) - writes, most)
        self.assertQuiet(daemon)

    def test_lists(self) -> None:
        """Nothing is written before all has been listed."""
        cluster = newCluster()
        daemon = Daemon(cluster, MemoryWriter())
        for source in SOURCES:
            for kind in KINDS:
                self.assertEqual(daemon.writer.writes, [])
                cluster.say(Replaced(source, kind, {}))
                daemon.turn()
        self.assertEqual(len(daemon.writer.writes), 1)
