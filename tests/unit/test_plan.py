"""Tests of twisted_kproxy.plan: sources and kernel are read, and nothing is written."""

from __future__ import annotations

import os
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import member, service, slice_
from twisted_kproxy.config import ApiOptions, Config, FilesOptions
from twisted_kproxy.core import wire
from twisted_kproxy.core.rules import Guard, Rule, Ruleset, Target
from twisted_kproxy.core.values import FrontendKey, Replaced
from twisted_kproxy.interfaces import KproxyError, NotAvailable, RulesRejected
from twisted_kproxy.netfilter.memory import MemoryWriter, NoWriter
from twisted_kproxy.plan import plan

KEY = FrontendKey("IPv4", "TCP", "10.96.0.10", 80)
LEFT = Ruleset(
    {KEY: Rule(Target("192.0.2.7", 41000), Target("192.0.2.7", 41000))}, frozenset({Guard("IPv4", "TCP", 41000)}),
    frozenset({"10.96.0.10"}),
)


class Source(Service):
    """Says what it is to say, ``delay`` seconds after it was started."""

    kinds = ("Service", "EndpointSlice")

    def __init__(self, clock: Clock, channel: Any, objects: list[Any], name: str = "local", delay: float = 0) -> None:
        self.name = name
        self.stops = 0
        self.broken: dict[str, str] = {}
        self.rejected: dict[str, str] = {}
        self._speaking = self._spoke = False
        self._clock, self._channel, self._objects, self._delay = clock, channel, objects, delay

    def startService(self) -> None:
        super().startService()
        if self._delay:
            self._clock.callLater(self._delay, self._speak)
        else:
            self._speak()

    def _speak(self) -> None:
        if not self.running:
            return
        self._speaking = True
        for kind in self.kinds:
            objects = {wire.keyOf(it.metadata): it for it in self._objects if type(it).__name__ == kind}
            rejected = self.rejected if kind == "Service" else {}
            self._channel.say(Replaced(self.name, kind, objects, rejected))  # type: ignore[arg-type]
        self._speaking, self._spoke = False, True

    def stopService(self) -> Any:
        assert not self._speaking, "stopped while it spoke"
        self.stops += 1
        return super().stopService()

    def faults(self) -> dict[str, str]:
        return self.broken if self._spoke else {"Service": "connection refused"}


class PlanTests(SynchronousTestCase):
    """See above."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.writer: Any = MemoryWriter(inForce=LEFT)
        self.sources: list[Source] = []
        self.delay = 0.0
        self.broken: dict[str, str] = {}
        self.rejected: dict[str, str] = {}
        self.faults: list[str] = []
        self.config = Config(path="", nodeName="n0")

    def makeSources(self, reactor: Any, config: Config, channel: Any) -> list[Source]:
        objects = [service(), slice_(member("10.1.0.1"))]
        self.sources = [Source(self.clock, channel, objects, delay=self.delay)]
        self.sources[0].broken, self.sources[0].rejected = self.broken, self.rejected
        return self.sources

    def choose(self, reactor: Any, config: Config) -> Deferred[Any]:
        return succeed(self.writer)

    def ask(self, mayRead: bool = True, choose: Any = None) -> Deferred[tuple[list[str], list[str]]]:
        makers: Any = {"sources": self.makeSources, "choose": choose or self.choose}
        return plan(
            self.clock, self.config, mayRead, **makers,
            addressOf=lambda family: "192.0.2.7" if family == "IPv4" else None,
        )

    def lines(self, **how: Any) -> list[str]:
        fired = self.ask(**how)
        self.clock.advance(self.delay)
        self.clock.advance(0)
        found, self.faults = self.successResultOf(fired)
        self.assertEqual([it.stops for it in self.sources], [1])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        assert isinstance(found, list)
        return found

    def test_nothingToDo(self) -> None:
        """Beside a daemon that has done all; the writer is asked what there is, and nothing else."""
        lines = self.lines()
        self.assertEqual(lines[0], "Plan for node n0, mode userspace, rules by memory")
        self.assertIn("  shop/web:http/TCP/IPv4/cluster: port 41000, where the rules lead now; 1 endpoint", lines)
        self.assertEqual(lines[-1], "nothing to do")
        self.assertEqual([it.call for it in self.writer.history], ["adopt", "close"])

    def test_slowSource(self) -> None:
        """It waits for sources, as long as they may take."""
        self.delay = 29.0
        self.assertEqual(self.lines()[-1], "nothing to do")

    def test_unreadable(self) -> None:
        """What could not be read in time is named, with what the source says of it."""
        self.delay = 31.0
        fired = self.ask()
        self.clock.advance(30)
        error = self.failureResultOf(fired, KproxyError)
        self.assertEqual(
            error.getErrorMessage(),
            "within 30 s these could not be read: local/EndpointSlice, local/Service\n"
            "local: Service: connection refused",
        )
        self.assertEqual([it.stops for it in self.sources], [1])
        self.assertEqual(self.writer.history, [])

    def test_noRight(self) -> None:
        """Without the right to read the kernel's rules the plan is shown, and why it is not compared."""
        lines = self.lines(mayRead=False)
        self.assertEqual(lines[0], "Plan for node n0, mode userspace, rules by auto")
        self.assertIn("  10.96.0.10:80/TCP -> 192.0.2.7, any free port", lines)
        self.assertEqual(
            lines[-1], "Not compared with the kernel: that needs root, or the capability CAP_NET_ADMIN"
        )
        self.assertEqual(self.writer.history, [])

    def test_noWriter(self) -> None:
        """Where no writer works, or it writes nothing, or cannot tell, that is said."""
        lines = self.lines(choose=lambda reactor, config: fail(NotAvailable("nft is not installed")))
        self.assertEqual(lines[-1], "Not compared with the kernel: nft is not installed")
        self.writer = NoWriter()
        self.assertEqual(self.lines()[-1], "Not compared with the kernel: writer none writes no rules")
        self.writer = MemoryWriter()
        self.writer.adopt = lambda: fail(RulesRejected("no netlink"))
        self.assertEqual(self.lines()[-1], "Not compared with the kernel: its rules cannot be read: no netlink")
        self.assertTrue(self.writer.closed)

    def test_firstRun(self) -> None:
        """Where the kernel has nothing of ours, everything is to be added."""
        self.writer = MemoryWriter()
        self.assertEqual(self.lines()[-1], "3 to add, 0 to change, 0 to remove")

    def test_nodeUnknown(self) -> None:
        """An API server that does not know this node: nothing will be local."""
        self.config = Config(path="", nodeName="n0", sources=(ApiOptions("c"),))
        self.assertIn("No source has a Node n0: endpoints count as local by nodeName n0 alone", self.lines()[1])

    def test_brokenFile(self) -> None:
        """What a source cannot read is told on top, with what a daemon makes of it; the rest is planned."""
        self.broken = {"a.yaml": "line 3: is no YAML"}
        lines = self.lines()
        told = "local: a.yaml: line 3: is no YAML (a daemon that runs keeps its last good content)"
        self.assertEqual(lines[1:3], ["Problems (1):", f"  {told}"])
        self.assertEqual(self.faults, ["kproxy: not in the plan: local: a.yaml: line 3: is no YAML"])
        self.assertEqual(lines[-1], "nothing to do")

    def test_brokenPart(self) -> None:
        """Of a part of a file nobody says that there is a good version of it."""
        self.broken = {"a.yaml:3": "is no object but text"}
        self.assertEqual(self.lines()[1:3], ["Problems (1):", "  local: a.yaml:3: is no object but text"])
        self.assertEqual(self.faults, ["kproxy: not in the plan: local: a.yaml:3: is no object but text"])

    def test_badObject(self) -> None:
        """An object that cannot be read is told on top, too."""
        self.rejected = {"shop/bad": "it has no spec"}
        self.assertEqual(self.lines()[1:3], ["Problems (1):", "  Service shop/bad cannot be read: it has no spec"])
        self.assertEqual(self.faults, [])

    def test_missingFolder(self) -> None:
        """A folder that is not there is told at once."""
        path = os.path.abspath(self.mktemp())
        self.config = Config(path="", nodeName="n0", sources=(FilesOptions("local", path=path),))
        error = self.failureResultOf(self.ask(), KproxyError)
        self.assertEqual(
            error.getErrorMessage(),
            f"[source:local] path = {path}: does not exist; a daemon that runs keeps its last good content",
        )
        self.assertEqual((self.sources, self.writer.history), ([], []))
