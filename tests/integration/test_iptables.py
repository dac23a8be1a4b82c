"""The writer for the legacy tables against the kernel, in network namespaces of its own."""

from __future__ import annotations

import fcntl
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from tests.shared.hardships import Hardships, services
from tests.shared.namespaces import Namespace, canMakeNamespaces
from tests.shared.processor import spent
from tests.shared.writers import NODE4, SAMPLE, KernelWriterTests, key, many, same, to
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset, Target, applied, deltaBetween
from twisted_kproxy.core.values import Frontend, Locality, ServiceMap, ServicePort, ServicePortName
from twisted_kproxy.interfaces import NotAvailable, RulesRejected
from twisted_kproxy.netfilter.plane import RulePlane
from twisted_kproxy.netfilter.xt import writer as iptables
from twisted_kproxy.netfilter.xt.writer import IptablesWriter

SAVES = ("iptables-legacy-save", "ip6tables-legacy-save")


def missing() -> str | None:
    """Why these tests cannot run here."""
    if not canMakeNamespaces():
        return "needs root and the ip tool"
    lacking = [tool for tool in (*SAVES, "iptables-legacy") if not shutil.which(tool)]
    return f"needs {', '.join(lacking)}" if lacking else None


#: Another program changes the table between a read and the commit that follows.
OVERTAKEN = """
import subprocess, sys
from twisted_kproxy.netfilter.xt import tables as xttables
table = xttables.LiveTable("IPv4", "nat")
table.clear("KPROXY-X")
table.commit()
for attempt in range(2):
    table.refresh()
    table.clear("KPROXY-X")
    if attempt == 0:
        subprocess.run(["iptables-legacy", "-t", "nat", "-N", "OTHER"], check=True)
    try:
        table.commit()
    except xttables.Collision as collision:
        print("collision:", collision)
    else:
        print("committed")
"""

FOREIGN = {
    "iptables-legacy": [
        "-t nat -N DOCKER",
        "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER",
        "-t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
        "-t nat -N CNI-HOSTPORT-DNAT",
        "-t nat -A CNI-HOSTPORT-DNAT -p udp -m udp --dport 5353 -j DNAT --to-destination 10.244.0.9:53",
        "-t nat -I PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
        "-t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",
        "-c 7 420 -A FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-t mangle -A PREROUTING -p tcp -j MARK --set-xmark 0x1/0x1",
    ],
    "ip6tables-legacy": [
        "-t nat -N DOCKER",
        "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",
    ],
}


class IptablesCase(TestCase):
    """A namespace, and writers that live in it."""

    skip = missing()
    timeout = 300

    def setUp(self) -> None:
        self.space = Namespace("ipt")
        self.addCleanup(self.space.delete)

    def makeWriter(self) -> IptablesWriter:
        writer = IptablesWriter(reactor, spawnPrefix=self.space.prefix)
        self.addCleanup(writer.close)
        return writer

    def saved(self) -> str:
        """Both families as the tool prints them, without counters and times."""
        text = "".join(self.space.run(tool) for tool in SAVES)
        text = re.sub(r"^#.*\n", "", text, flags=re.M)
        return re.sub(r"\[\d+:\d+\]", "[0:0]", text)

    def plantForeign(self) -> None:
        for tool, rules in FOREIGN.items():
            for rule in rules:
                self.space.run(tool, *rule.split())

    def foreign(self) -> str:
        """The rules of others to the byte, with their counters."""
        text = "".join(self.space.run(tool, "-c") for tool in SAVES)
        return "".join(line for line in text.splitlines(keepends=True) if "KPROXY-" not in line and line[0] != "#")


class ChainHardships(Hardships):
    """What others do to chains of iptables."""

    stem = "iptables-legacy"

    def listed(self) -> list[str]:
        tools = (self.stem, self.stem.replace("ip", "ip6", 1))
        tables = [(tool, table) for tool in tools for table in ("nat", "filter")]
        texts = [self.do([tool, "-t", table, "-S"]) for tool, table in tables]
        ours = ["".join(line for line in text.splitlines(True) if "KPROXY-" in line) for text in texts]
        return [text for text in ours if text]

    def versions(self) -> list[dict[int, int]]:
        return [it for it in super().versions() if it]  # filter has no rules that lead somewhere

    def flushes(self) -> list[tuple[list[str], str]]:
        nat = [self.stem, "-t", "nat"]
        return [
            ([*nat, "-F"], ""),
            ([*nat, "-F", "KPROXY-PORTALS-HOST"], ""),
            ([*nat, "-F", "OUTPUT"], ""),
            (["sh", "-c", f"{self.stem} -D INPUT 1 && {self.stem} -F KPROXY-GUARD && {self.stem} -X KPROXY-GUARD"], ""),
            self.spot("10.97.0.7"),
        ]

    def spot(self, address: str) -> tuple[list[str], str]:
        number = int(address.rpartition(".")[2])
        return [self.stem, "-t", "nat", "-D", "KPROXY-PORTALS-HOST", str(number)], ""

    def addForeign(self, n: int) -> list[str]:
        if n < 0:
            return [self.stem, "-t", "nat", "-N", "BESIDE"]
        rule = ["-s", f"10.77.{n // 250}.{n % 250}", "-j", "RETURN"]
        return [self.stem, "-w", "-t", "nat", "-A", "BESIDE", *rule]

    async def test_kernelRefusesTheSecondTable(self) -> None:
        """
        The kernel takes one table and refuses the next one (a rule of somebody else leads to ours from a hook where
        nothing may be rewritten): what was written first is taken back, and it is said why.
        """
        guards, locality = frozenset({Guard("IPv4", "TCP", 7)}), Locality(("10.244.0.0/16",))
        old = Ruleset({key("10.96.0.1", 80): same("reject")}, guards, locality=locality)
        writer = await self.writerWith(old)  # type: ignore[attr-defined]
        before = self.listed()
        self.do([self.stem, "-t", "nat", "-A", "POSTROUTING", "-j", "KPROXY-PORTALS-HOST"])
        later = self.makeWriter()  # type: ignore[attr-defined]
        guards = frozenset({Guard("IPv4", "TCP", 40001)})
        new = Ruleset({key("10.96.0.1", 80): same(to(40001))}, guards, locality=old.locality)
        for call in (writer.replace(new), writer.apply(deltaBetween(old, new)), writer.apply(deltaBetween(old, new))):
            await self.assertRejected(call)  # type: ignore[attr-defined]
        self.do([self.stem, "-t", "nat", "-D", "POSTROUTING", "-j", "KPROXY-PORTALS-HOST"])
        self.assertEqual([sorted(it.splitlines()) for it in self.listed()], [sorted(it.splitlines()) for it in before])  # type: ignore[attr-defined]
        self.assertEqual(await later.adopt(), old)  # type: ignore[attr-defined]
        await writer.adopt()
        await writer.replace(new)
        self.assertEqual(await later.adopt(), new)  # type: ignore[attr-defined]

    async def test_earlierVersion(self) -> None:
        """
        What a version without chains for ClusterIPs has left is taken over as it is; a step adds what is missing, and
        every rule that was there keeps its counters.
        """
        rules = {key(f"10.99.0.{n}", 80): same("reject") for n in range(1, 9)}
        rules[key("fd00:10:96::1", 80)] = same(to(1, "2001:db8::2"))
        old = Ruleset(rules, locality=Locality(("10.244.0.0/16",)))
        writer = await self.writerWith(old)  # type: ignore[attr-defined]
        for tool in (self.stem, self.stem.replace("ip", "ip6", 1)):
            for chain in ("KPROXY-CLUSTER-IPS", "KPROXY-NO-PORT"):
                self.do([tool, "-X", chain])
        self.do([self.stem, "-R", "KPROXY-REFUSE", "1", "-c", "7", "420", *self.listedRule("KPROXY-REFUSE", 1)])
        await writer.close()
        later = self.makeWriter()  # type: ignore[attr-defined]
        self.assertEqual(await later.adopt(), old)  # type: ignore[attr-defined]
        step = Delta(clusterIPsAdded=frozenset({"10.99.0.1", "fd00:10:96::1"}))
        await later.apply(step)
        self.assertEqual(await self.makeWriter().adopt(), applied(old, step))  # type: ignore[attr-defined]
        first = self.do([self.stem, "-L", "KPROXY-REFUSE", "1", "-v", "-n", "-x"]).split()
        self.assertEqual(first[:2], ["7", "420"])  # type: ignore[attr-defined]

    def listedRule(self, chain: str, number: int) -> list[str]:
        """The words of a rule, as the tool takes them."""
        return shlex.split(self.do([self.stem, "-S", chain, str(number)]))[2:]

    async def isInForce(self, current: Any) -> bool:
        """Others' commands may come between the reading of two tables."""
        try:
            return await super().isInForce(current)
        except RulesRejected:
            return False


class IptablesWriterTests(IptablesCase, ChainHardships, KernelWriterTests):
    """What every writer does."""

    program = "python-iptables"

    def makeFailingWriter(self) -> IptablesWriter:
        """Its worker may not touch the tables."""
        prefix = (*self.space.prefix, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
        writer = IptablesWriter(reactor, spawnPrefix=prefix)
        self.addCleanup(writer.close)
        return writer

    def disturb(self) -> Any:
        self.space.run("iptables-legacy", "-t", "nat", "-F", "KPROXY-PORTALS-CONTAINER")


class LegacyTablesTests(IptablesCase):
    """What is special about the legacy tables."""

    def tool(self, *argv: str) -> str:
        return self.space.run("iptables-legacy", *argv)

    def tableNames(self) -> list[str]:
        files = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
        return sorted(self.space.run("cat", *files, check=False).split())

    def pid(self, writer: IptablesWriter) -> int:
        """Of the worker process: ``ip netns exec`` becomes what it runs."""
        assert writer._worker is not None and writer._worker.transport is not None
        return int(writer._worker.transport.pid)  # type: ignore[attr-defined]

    async def waitFor(self, what: Any, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                self.fail("it did not come to be")
            await deferLater(reactor, 0.02, lambda: None)  # type: ignore[arg-type]

    async def test_iptablesReadsAndRestores(self) -> None:
        """
        What is written is what iptables itself would have written: its save can be restored elsewhere, by its own
        parsers, and the result cannot be told from ours.
        """
        sctp = {key("10.96.0.10", 38412, "SCTP"): same(to(40009)), key("", 30009, "SCTP", "IPv6"): same("reject")}
        sample = applied(SAMPLE, Delta(sctp, guardsAdded=frozenset({Guard("IPv4", "SCTP", 40009)})))
        writer = self.makeWriter()
        await writer.replace(sample)
        other = Namespace("copy")
        self.addCleanup(other.delete)
        for save, restore in zip(SAVES, ("iptables-legacy-restore", "ip6tables-legacy-restore"), strict=True):
            text = self.space.run(save)
            self.assertNotIn("unsupported", text)
            self.space.run(restore, "--test", stdin=text)
            other.run(restore, stdin=text)
        reader = IptablesWriter(reactor, spawnPrefix=other.prefix)
        self.addCleanup(reader.close)
        found = await reader.adopt()
        assert found is not None
        self.assertEqual(deltaBetween(sample, found), Delta())
        self.assertIn(
            '-A KPROXY-PORTALS-CONTAINER -d 10.96.0.10/32 -p tcp -m comment --comment "kproxy 10.96.0.10:80/TCP" '
            "-m tcp --dport 80 -j DNAT --to-destination 192.0.2.2:40001",
            self.saved(),
        )

    async def test_onlyItsTables(self) -> None:
        """Nothing comes into being before something is written, and then no table but the two that are needed."""
        writer = self.makeWriter()
        await writer.probe()
        await writer.adopt()
        await writer.cleanup()
        self.assertEqual(self.tableNames(), [])
        await writer.replace(Ruleset({key("10.96.0.1", 443): same(to(40001))}))
        self.assertEqual(self.tableNames(), ["filter", "nat"])
        await writer.apply(Delta({key("fd00:10:96::1", 443): same(to(40001, "2001:db8::2"))}))
        self.assertEqual(self.tableNames(), ["filter", "filter", "nat", "nat"])

    async def test_order(self) -> None:
        """Service addresses come before everybody else's rules, node ports behind them."""
        self.plantForeign()
        await self.makeWriter().replace(SAMPLE)
        for hook in ("PREROUTING", "OUTPUT"):
            rules = [line for line in self.tool("-t", "nat", "-S", hook).splitlines() if line.startswith("-A")]
            self.assertIn("-j KPROXY-PORTALS-", rules[0])
            self.assertIn("-j KPROXY-NODEPORT-", rules[-1])
            self.assertGreater(len(rules), 2)
        first, second, *_ = [line for line in self.tool("-S", "INPUT").splitlines() if line.startswith("-A")]
        self.assertTrue(first.endswith("-j KPROXY-GUARD"))
        self.assertTrue(second.endswith("-j KPROXY-REFUSE"))

    async def test_othersMayComeFirst(self) -> None:
        """
        A rule that somebody else puts before ours later on is his business: what would move it back and forth is
        worse. The next full write takes the place again.
        """
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        self.tool("-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "1", "-j", "RETURN")
        self.tool("-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "2", "-j", "RETURN")
        self.assertEqual(await writer.adopt(), SAMPLE)
        await writer.replace(SAMPLE)
        rules = self.tool("-t", "nat", "-S", "PREROUTING").splitlines()
        self.assertIn("KPROXY-PORTALS-CONTAINER", rules[1])
        self.assertIn("KPROXY-NODEPORT-CONTAINER", rules[-1])
        self.assertEqual(len(rules), 5)

    async def test_notUnderstood(self) -> None:
        """What is missing, misplaced or strange makes the state one that cannot be adopted; a full write heals it."""
        comment = ["-m", "comment", "--comment", "kproxy service addresses"]
        jump = [*comment, "-m", "mark", "!", "--mark", "0x2000/0x2000", "-j", "KPROXY-PORTALS-HOST"]
        dnat = ["-d", "10.96.5.5", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination"]
        disturbances: dict[str, list[list[str]]] = {
            "jump missing": [["-t", "nat", "-D", "OUTPUT", *jump]],
            "jump twice": [["-t", "nat", "-A", "OUTPUT", *jump]],
            "jump for the proxy too": [["-t", "nat", "-R", "OUTPUT", "1", *comment, "-j", "KPROXY-PORTALS-HOST"]],
            "node ports first": [["-t", "nat", "-D", "OUTPUT", *jump], ["-t", "nat", "-A", "OUTPUT", *jump]],
            "jump without condition": [["-I", "FORWARD", "-j", "KPROXY-REFUSE"]],
            "chain of another version": [["-t", "nat", "-N", "KPROXY-OLD"]],
            "strange rule": [["-A", "KPROXY-GUARD", "-p", "icmp", "-j", "ACCEPT"]],
            "strange match": [["-A", "KPROXY-REFUSE", "-m", "mark", "--mark", "1", "-j", "ACCEPT"]],
            "not our comment": [["-t", "nat", "-A", "KPROXY-PORTALS-HOST", *dnat, "192.0.2.2:1"]],
            "half a frontend": [["-t", "nat", "-D", "KPROXY-PORTALS-HOST", "1"]],
            "insiders": [["-t", "nat", "-F", "KPROXY-INSIDERS"]],
            "chain gone": [["-D", "INPUT", "1"], ["-F", "KPROXY-GUARD"], ["-X", "KPROXY-GUARD"]],
        }
        writer, later = self.makeWriter(), self.makeWriter()
        for name, commands in disturbances.items():
            await writer.replace(SAMPLE)
            self.assertEqual(await later.adopt(), SAMPLE)
            for argv in commands:
                self.tool(*argv)
            self.assertEqual((name, await later.adopt()), (name, None))
        await writer.replace(SAMPLE)
        self.assertEqual(await later.adopt(), SAMPLE)

    async def test_stepOverChangedRules(self) -> None:
        """A step that finds other rules than were written is refused, and costs nothing."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        self.tool("-t", "nat", "-D", "KPROXY-PORTALS-HOST", "1")
        before = self.saved()
        error = await self.assertFailure(writer.apply(Delta({key("10.96.0.10", 80): None})), RulesRejected)
        self.assertIn("KPROXY-PORTALS-HOST", str(error))
        self.assertEqual(self.saved(), before)

    async def test_withoutSctp(self) -> None:
        """On a machine without xt_sctp, frontends of SCTP are in quarantine, and everything else is in force."""
        folder = self.mktemp()
        there = iptables.extensionFolder()
        assert there is not None
        shutil.copytree(there, folder, symlinks=True)
        for name in ("libxt_sctp.so", "libip6t_sctp.so", "libipt_sctp.so"):
            if os.path.lexists(os.path.join(folder, name)):
                os.unlink(os.path.join(folder, name))
        self.patch(os, "environ", {**os.environ, "XTABLES_LIBDIR": os.path.abspath(folder)})
        writer = self.makeWriter()
        self.assertIn("no SCTP", await writer.probe())
        good = services(20)
        name = ServicePortName("default", "sigtran", "", "SCTP", "IPv4")
        sctp = ServicePort(name, "u", (Frontend("ClusterIP", "10.96.0.99", 38412),))
        plane = RulePlane(reactor, writer)
        await plane.start()
        everything = ServiceMap({**good, name: sctp})
        await plane.onUpdate(Update(ServiceMap(), everything))
        [(which, why)] = plane.unserved().items()
        self.assertEqual(which, str(name))
        self.assertIn("10.96.0.99:38412/SCTP", why)
        found = await self.makeWriter().adopt()
        assert found is not None
        self.assertEqual(len(found.rules), 20)
        # It costs no step of the others either.
        more = ServiceMap({**everything, **services(21)})
        await plane.onUpdate(Update(everything, more))
        await plane.onUpdate(Update(more, more, True))
        self.assertEqual(len((await self.makeWriter().adopt()).rules), 21)  # type: ignore[union-attr]
        self.assertEqual(list(plane.unserved()), [str(name)])

    async def test_hangs(self) -> None:
        """A worker that does not answer is ended, and the next call is served by another one."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        self.patch(iptables, "CALL_SECONDS", 0.5)
        self.patch(iptables, "SECONDS_PER_RULE", 0.0)
        os.kill(self.pid(writer), signal.SIGSTOP)
        error = await self.assertFailure(writer.replace(Ruleset()), RulesRejected)
        self.assertIn("did not answer within", str(error))
        self.patch(iptables, "CALL_SECONDS", 30.0)
        self.assertEqual(await writer.adopt(), SAMPLE)

    async def test_badRuleset(self) -> None:
        """What cannot be written is refused by name before anything is touched."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        before = self.saved()
        bad = {
            "10.96.0.300": Ruleset({key("10.96.0.300", 80): same(to(1))}),
            "10.96.0.10:0": Ruleset({key("10.96.0.10", 0): same(to(1))}),
            "10.96.0.13:80": Ruleset({key("10.96.0.13", 80): same(Target("2001:db8::2", 80))}),
            "10.96.0.14:80": Ruleset({key("10.96.0.14", 80): same(Target("192.0.2.2; reboot", 80))}),
            "10.0.0.1/8": Ruleset(locality=Locality(("10.0.0.1/8",))),
            "70000": Ruleset(guards=frozenset({Guard("IPv4", "TCP", 70000)})),
        }
        for word, ruleset in bad.items():
            error = await self.assertFailure(writer.replace(ruleset), RulesRejected)
            self.assertIn(word, str(error))
            await self.assertFailure(writer.apply(deltaBetween(Ruleset(), ruleset)), RulesRejected)
        self.assertEqual(self.saved(), before)
        self.assertEqual(await writer.adopt(), SAMPLE)

    async def test_leftovers(self) -> None:
        """A chain of another version of ours goes with the next full write, and so do rules that lead there."""
        self.tool("-t", "nat", "-N", "KPROXY-OLD")
        self.tool("-t", "nat", "-A", "POSTROUTING", "-j", "KPROXY-OLD")
        self.tool("-t", "nat", "-A", "KPROXY-OLD", "-j", "MASQUERADE")
        await self.makeWriter().replace(SAMPLE)
        self.assertNotIn("KPROXY-OLD", self.saved())

    async def test_cleanupLeavesOthersChains(self) -> None:
        """Where a chain of somebody else leads to ours, ours is emptied, and his stays as it is."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        self.tool("-N", "ADMIN")
        self.tool("-A", "ADMIN", "-j", "KPROXY-GUARD")
        self.assertIs(await writer.cleanup(), True)
        self.assertEqual(self.tool("-S", "KPROXY-GUARD").split(), ["-N", "KPROXY-GUARD"])
        self.assertIn("-A ADMIN -j KPROXY-GUARD", self.tool("-S"))
        self.assertNotIn("KPROXY-REFUSE", self.saved())

    async def test_lock(self) -> None:
        """While another program holds the lock of xtables a write waits; it is not lost."""
        path = self.mktemp()
        self.patch(os, "environ", {**os.environ, "XTABLES_LOCKFILE": os.path.abspath(path)})
        writer = self.makeWriter()
        await writer.replace(Ruleset())
        with open(path, "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            done: list[object] = []
            call = writer.replace(SAMPLE).addCallback(done.append)
            await deferLater(reactor, 0.5, lambda: None)  # type: ignore[arg-type]
            self.assertEqual(done, [])
            self.assertNotIn("10.96.0.10", self.saved())
        await call
        self.assertEqual(await writer.adopt(), SAMPLE)

    async def test_lockNotGiven(self) -> None:
        """Who keeps the lock for too long is named, and nothing has changed."""
        path = self.mktemp()
        self.patch(os, "environ", {**os.environ, "XTABLES_LOCKFILE": os.path.abspath(path)})
        self.patch(iptables, "LOCK_SECONDS", 0.3)
        writer = self.makeWriter()
        await writer.replace(Ruleset())
        with open(path, "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            error = await self.assertFailure(writer.replace(SAMPLE), RulesRejected)
        self.assertIn(path.rpartition("/")[2], str(error))
        self.assertEqual(await writer.adopt(), Ruleset())
        await writer.replace(SAMPLE)

    async def test_togetherWithTheTool(self) -> None:
        """Changes of iptables and ours, at the same time, in the same table: none is lost."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        rule = ["-p", "tcp", "-m", "tcp", "-j", "RETURN"]
        problems: list[str] = []

        def tool() -> None:
            for n in range(60):
                argv = [*self.space.prefix, "iptables-legacy", "-w", "-t", "nat", "-A", "POSTROUTING", *rule]
                done = subprocess.run([*argv, "-s", f"10.9.9.{n}"], capture_output=True, text=True, timeout=30)
                if done.returncode:
                    problems.append(done.stderr)

        thread = threading.Thread(target=tool)
        thread.start()
        expected = SAMPLE
        n = 0
        while thread.is_alive() or n < 60:
            step = Delta({key("10.96.8.8", 1 + n): same(to(40001)), key("10.96.8.8", n): None})
            await writer.apply(step)
            expected = applied(expected, step)
            n += 1
        thread.join()
        self.assertEqual(problems, [])
        self.assertEqual(self.tool("-t", "nat", "-S", "POSTROUTING").count("RETURN"), 60)
        self.assertEqual(await self.makeWriter().adopt(), expected)

    def test_overtaken(self) -> None:
        """A change of a program that ignores the lock is seen by the commit, and not undone by it."""
        said = self.space.run(sys.executable, "-c", OVERTAKEN).splitlines()
        self.assertEqual(len(said), 2)
        self.assertIn("collision: can't commit: Resource temporarily unavailable", said[0])
        self.assertEqual(said[1], "committed")
        self.assertIn("-N OTHER", self.tool("-t", "nat", "-S"))

    async def test_killed(self) -> None:
        """A worker that is killed at any moment leaves each table as before or after; the next call starts another."""
        self.patch(iptables, "ATTEMPTS", 1)
        writer, reader = self.makeWriter(), self.makeWriter()
        both = [many(2000, 20000), many(2000, 30000)]
        await writer.replace(both[1])
        draw = random.Random(4)
        for n in range(12):
            call = writer.replace(both[n % 2])
            pid = self.pid(writer)
            await deferLater(reactor, draw.uniform(0.0, 0.08), lambda: None)  # type: ignore[arg-type]
            os.kill(pid, signal.SIGKILL)
            try:
                await call
            except RulesRejected:
                pass
            for tool in ("iptables-legacy", "ip6tables-legacy"):
                text = self.space.run(tool, "-t", "nat", "-S")
                versions = {int(port) // 10000 for port in re.findall(r"to-destination \S+:(\d+)", text)}
                self.assertEqual(len(versions), 1)
                for chain in ("KPROXY-PORTALS-CONTAINER", "KPROXY-PORTALS-HOST"):
                    count = self.space.run(tool, "-t", "nat", "-S", chain).count("DNAT")
                    self.assertEqual(count, sum(1 for k, r in both[0].rules.items() if self._served(tool, k, r)))
            await self.waitFor(lambda: writer._worker is not None and not writer._worker.usable)
            await writer.replace(both[n % 2])
            self.assertEqual(await reader.adopt(), both[n % 2])

    async def test_killedIsAskedAgain(self) -> None:
        """A call whose worker dies is made again, once, by another one."""
        writer = self.makeWriter()
        await writer.replace(many(2000, 20000))
        call = writer.replace(many(2000, 30000))
        os.kill(self.pid(writer), signal.SIGKILL)
        await call
        self.assertEqual(await writer.adopt(), many(2000, 30000))

    @staticmethod
    def _served(tool: str, frontend: Any, rule: Rule) -> bool:
        family = "IPv6" if tool.startswith("ip6") else "IPv4"
        return frontend.family == family and isinstance(rule.outside, Target)

    async def test_watchReadsBack(self) -> None:
        """A foreign change that keeps number and size of the rules is found as well."""
        self.patch(iptables, "READ_BACK_SECONDS", 1.0)
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        calls: list[bool] = []
        writer.watch(lambda: calls.append(True))
        dnat = ["-j", "DNAT", "--to-destination", "192.0.2.2:6666"]
        comment = ["-m", "comment", "--comment", "kproxy 10.96.0.10:80/TCP"]
        match = ["-d", "10.96.0.10", "-p", "tcp", *comment, "-m", "tcp", "--dport", "80"]
        self.tool("-t", "nat", "-R", "KPROXY-PORTALS-HOST", "1", *match, *dnat)
        await self.waitFor(lambda: calls)
        self.assertNotEqual(await writer.adopt(), SAMPLE)

    async def test_watchIgnoresOthers(self) -> None:
        """Rules of others come and go without our being called."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        calls: list[bool] = []
        writer.watch(lambda: calls.append(True))
        self.plantForeign()
        await deferLater(reactor, 2.5, lambda: None)  # type: ignore[arg-type]
        self.assertEqual(calls, [])

    async def test_watchAfterDeath(self) -> None:
        """When the worker has died, nobody knows what happened meanwhile: the rules are to be read again."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        calls: list[bool] = []
        writer.watch(lambda: calls.append(True))
        os.kill(self.pid(writer), signal.SIGKILL)
        self.tool("-t", "nat", "-F", "OUTPUT")
        await self.waitFor(lambda: calls)
        self.assertIsNone(await writer.adopt())

    async def test_stepAfterDeath(self) -> None:
        """A new worker reads what is in force before it takes a step."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        os.kill(self.pid(writer), signal.SIGKILL)
        await self.waitFor(lambda: writer._worker is not None and not writer._worker.usable)
        await writer.apply(Delta({key("10.96.0.10", 80): None}))
        self.assertEqual(await writer.adopt(), applied(SAMPLE, Delta({key("10.96.0.10", 80): None})))

    async def test_workerEndsWithUs(self) -> None:
        """Closing ends the worker; a stop signal to the whole group does not."""
        writer = self.makeWriter()
        await writer.replace(SAMPLE)
        pid = self.pid(writer)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        self.assertEqual(await writer.adopt(), SAMPLE)
        self.assertEqual(self.pid(writer), pid)
        await writer.close()
        self.assertFalse(os.path.exists(f"/proc/{pid}"))

    async def test_noPrivilege(self) -> None:
        """Without the right to change tables the probe says so."""
        prefix = (*self.space.prefix, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
        writer = IptablesWriter(reactor, spawnPrefix=prefix)
        self.addCleanup(writer.close)
        error = await self.assertFailure(writer.probe(), NotAvailable)
        self.assertIn("CAP_NET_ADMIN", str(error))

    async def test_noExtensions(self) -> None:
        """Where libxtables' extensions are missing the probe says what to install."""
        self.patch(os, "environ", {**os.environ, "XTABLES_LIBDIR": os.path.abspath(self.mktemp())})
        error = await self.assertFailure(self.makeWriter().probe(), NotAvailable)
        self.assertIn("iptables", str(error))
        self.assertEqual(self.tableNames(), [])

    async def test_large(self) -> None:
        """Five thousand frontends cost well under two seconds of a processor, and one more a small part of that."""
        writer = self.makeWriter()
        await writer.probe()
        big = many(5000)
        pid = self.pid(writer)
        begun = spent(pid)
        await writer.replace(big)
        whole = spent(pid) - begun
        self.assertLess(whole, 2.0)
        begun = spent(pid)
        await writer.apply(Delta({key("10.250.0.1", 80): same(to(40001, NODE4))}))
        self.assertLess(spent(pid) - begun, whole)
        self.assertEqual(self.pid(writer), pid)
