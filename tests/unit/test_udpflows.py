"""The table of UDP flows: who is given up, and when."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.datagrams import socketsOf
from tests.shared.policies import endpoint
from twisted_kproxy.userspace.udpflows import KEPT, AnyFlow, Flows


def flowOf(table: Flows, number: int, now: float = 0.0) -> Any:
    return table.make((("192.0.2.1", number), b"here"), endpoint(1), now, now, ())


class FlowTableTests(SynchronousTestCase):
    """The table of the engine in Python."""

    engine = "python"

    def setUp(self) -> None:
        self.sockets = socketsOf(self.engine, reactor)
        self.table = self.sockets.table()
        self.flows = [flowOf(self.table, number, float(number)) for number in range(4)]
        for flow in self.flows:
            self.table.add(flow)

    def numbers(self, flows: list[Any]) -> list[int]:
        return [self.flows.index(flow) for flow in flows]

    def test_find(self) -> None:
        """A flow is found by client and dialled address, and by nothing else."""
        self.assertIs(self.table.find((("192.0.2.1", 2), b"here")), self.flows[2])
        self.assertIsNone(self.table.find((("192.0.2.1", 2), b"elsewhere")))
        self.assertIsNone(self.table.find((("192.0.2.2", 2), b"here")))

    def test_longestUnusedIsTheVictim(self) -> None:
        """Of flows that were never answered the longest unused one is given up first."""
        self.table.touch(self.flows[0], 5.0)
        self.assertIs(self.table.victim(), self.flows[1])

    def test_unansweredGoFirst(self) -> None:
        """One that was never answered goes before all that were, however lately it was used."""
        for number in (0, 1, 3):
            self.table.answer(self.flows[number], 5.0 + number)
        self.table.touch(self.flows[2], 100.0)
        self.assertIs(self.table.victim(), self.flows[2])
        self.assertEqual((len(self.table), self.table.unanswered), (4, 1))

    def test_thenTheAnswered(self) -> None:
        """Where all were answered the longest unused one is given up; an empty table has nobody to give up."""
        for number in (2, 0, 3, 1):
            self.table.answer(self.flows[number], 10.0 - number)
        order = []
        while (victim := self.table.victim()) is not None:
            order.append(victim)
            self.table.remove(victim)
        self.assertEqual(self.numbers(order), [2, 0, 3, 1])

    def test_idle(self) -> None:
        """Those not used since are idle, answered or not; no more are told than asked for."""
        self.table.answer(self.flows[0], 1.0)
        self.table.touch(self.flows[1], 9.0)
        self.assertEqual(sorted(self.numbers(self.table.idle(3.0, 10))), [0, 2, 3])
        self.assertEqual(len(self.table.idle(3.0, 2)), 2)
        self.assertEqual(self.table.idle(0.5, 10), [])

    def test_oldest(self) -> None:
        """The oldest use is known, over both kinds."""
        self.table.answer(self.flows[0], 7.0)
        self.assertEqual(self.table.oldest(), 1.0)
        for flow in self.flows[1:]:
            self.table.remove(flow)
        self.assertEqual(self.table.oldest(), 7.0)
        self.table.remove(self.flows[0])
        self.assertIsNone(self.table.oldest())

    def test_containsItself(self) -> None:
        """A flow that has ended is not in the table, even when another has its key."""
        self.table.remove(self.flows[0])
        self.assertNotIn(self.flows[0], self.table)
        self.table.add(flowOf(self.table, 0))
        self.assertNotIn(self.flows[0], self.table)
        self.assertIn(self.flows[1], self.table)

    def test_ofWhom(self) -> None:
        """A flow says whose it is, whatever the family; a link-local client with its zone."""
        for address in (("192.0.2.1", 65535), ("2001:db8::1", 1, 0, 0), ("fe80::1%lo", 5353, 0, 1)):
            flow = self.table.make((address, b"there"), endpoint(1), 1.0, 1.0, ())
            self.table.add(flow)
            self.assertEqual(flow.key, (address, b"there"))
            self.assertIs(self.table.find(flow.key), flow)

    def test_unanswered(self) -> None:
        """The last datagram is kept until there is an answer, also after the flow has ended; a long one is not."""
        flow = self.flows[0]
        self.table.sent(flow, b"one")
        self.assertEqual(flow.unanswered, b"one")
        self.table.sent(flow, b"x" * (KEPT + 1))
        self.assertIsNone(flow.unanswered)
        self.table.sent(flow, b"")
        self.table.remove(flow)
        self.assertEqual((flow.unanswered, flow.sent), (b"", KEPT + 4))
        self.table.sent(self.flows[1], b"two")
        self.table.answer(self.flows[1], 1.0)
        self.assertIsNone(self.flows[1].unanswered)

    def test_many(self) -> None:
        """Thousands are found, and those that ended are not."""
        flows = [flowOf(self.table, number, 9.0) for number in range(1000, 6000)]
        for flow in flows:
            self.table.add(flow)
        for flow in flows[::2]:
            self.table.remove(flow)
        self.assertEqual(len(self.table), 2504)
        for number, flow in enumerate(flows):
            self.assertIs(self.table.find((("192.0.2.1", 1000 + number), b"here")), flow if number % 2 else None)

    @settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.lists(st.tuples(st.sampled_from(["use", "answer", "evict"]), st.integers(0, 7)), max_size=60))
    def test_order(self, steps: list[tuple[str, int]]) -> None:
        """
        Property: whatever happens, the victim is the longest unused of the unanswered, or else of all, and exactly
        those last used before a moment are idle then.
        """
        table = self.sockets.table()
        flows: dict[int, AnyFlow] = {}
        for now, (what, number) in enumerate(steps):
            flow = flows.get(number)
            if what == "evict":
                candidates = [f for f in flows.values() if not f.answered] or list(flows.values())
                victim = table.victim()
                self.assertIs(victim, min(candidates, key=lambda f: f.used, default=None))
                if victim is not None:
                    table.remove(victim)
                    flows = {n: f for n, f in flows.items() if f is not victim}
            elif flow is None:
                flows[number] = flowOf(table, number, float(now))
                table.add(flows[number])
            elif what == "use":
                table.touch(flow, float(now))
            else:
                table.answer(flow, float(now))
            self.assertEqual(set(table), set(flows.values()))
            middle = now / 2
            self.assertEqual(set(table.idle(middle, 99)), {f for f in flows.values() if f.used <= middle})


class NativeTableTests(FlowTableTests):
    """That of the engine in C."""

    engine = "native"
