"""Balancing policies."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.policies import PolicySuite, endpoint, endpoints
from twisted_kproxy.balance.policies import LeastConnections, Random, RoundRobin
from twisted_kproxy.interfaces import IBalancingPolicy, IPolicyMaker
from twisted_kproxy.plugin import find


class RoundRobinSuiteTests(PolicySuite):
    def makePolicy(self) -> IBalancingPolicy:
        return RoundRobin()


class RandomSuiteTests(PolicySuite):
    def makePolicy(self) -> IBalancingPolicy:
        return Random(random.Random(1))


class LeastConnectionsSuiteTests(PolicySuite):
    def makePolicy(self) -> IBalancingPolicy:
        return LeastConnections(random.Random(1))


del PolicySuite  # the suite itself has no policy to test


class PluginTests(SynchronousTestCase):
    def test_names(self) -> None:
        """Each policy is found under the name that it gives in the status."""
        for policy in (RoundRobin, Random, LeastConnections):
            self.assertIsInstance(find(IPolicyMaker, policy.name).make(), policy)


class RoundRobinTests(SynchronousTestCase):
    def chosen(self, policy: RoundRobin, count: int, avoid: tuple[int, ...] = ()) -> list[int]:
        numbers = {endpoint(n): n for n in range(100)}
        avoided = {endpoint(n) for n in avoid}
        return [numbers[policy.choose("192.0.2.1", avoided)] for _ in range(count)]  # type: ignore[index]

    def policyOf(self, *numbers: int) -> RoundRobin:
        policy = RoundRobin(start=0)
        policy.replaced(endpoints(*numbers))
        return policy

    def test_oneAfterTheOther(self) -> None:
        """Each is served once before any is served again, in the same order each time."""
        self.assertEqual(self.chosen(self.policyOf(1, 2, 3), 7), [1, 2, 3, 1, 2, 3, 1])

    def test_startIsSpread(self) -> None:
        """By default pools begin at different endpoints, so that all nodes do not begin at the same one."""
        begun = set()
        for _ in range(200):
            policy = RoundRobin()
            policy.replaced(endpoints(1, 2, 3))
            begun.add(policy.choose("192.0.2.1", ()))
        self.assertEqual(begun, set(endpoints(1, 2, 3)))

    def test_sameEndpointsAgain(self) -> None:
        """Being told the same endpoints again changes nothing."""
        policy = self.policyOf(1, 2, 3)
        self.assertEqual(self.chosen(policy, 2), [1, 2])
        policy.replaced(endpoints(1, 2, 3))
        self.assertEqual(self.chosen(policy, 2), [3, 1])

    def test_toldAgainBeforeTheFirstChoice(self) -> None:
        """A pool that grows before anybody came begins where it is told to begin."""
        policy = self.policyOf(2)
        policy.replaced(endpoints(1, 2))
        self.assertEqual(self.chosen(policy, 2), [1, 2])

    def test_joining(self) -> None:
        """One that joins is served in its place; who was next stays next, or comes right after."""
        policy = self.policyOf(1, 3, 5)
        self.assertEqual(self.chosen(policy, 2), [1, 3])
        policy.replaced(endpoints(0, 1, 2, 3, 4, 5))
        self.assertEqual(self.chosen(policy, 6), [4, 5, 0, 1, 2, 3])

    def test_leaving(self) -> None:
        """When some leave, the next in the ring that is still there follows."""
        policy = self.policyOf(1, 2, 3, 4, 5)
        self.assertEqual(self.chosen(policy, 2), [1, 2])
        policy.replaced(endpoints(1, 2, 4, 5))
        self.assertEqual(self.chosen(policy, 4), [4, 5, 1, 2])

    def test_lastServedLeaves(self) -> None:
        """When the one that was served last leaves, its successor is next: nobody is skipped."""
        policy = self.policyOf(1, 2, 3)
        self.assertEqual(self.chosen(policy, 2), [1, 2])
        policy.replaced(endpoints(1, 3))
        self.assertEqual(self.chosen(policy, 3), [3, 1, 3])

    def test_endOfRingLeaves(self) -> None:
        """When the end of the ring leaves, its beginning is next."""
        policy = self.policyOf(1, 2, 3)
        self.assertEqual(self.chosen(policy, 2), [1, 2])
        policy.replaced(endpoints(1, 2))
        self.assertEqual(self.chosen(policy, 2), [1, 2])

    def test_toNothingAndBack(self) -> None:
        """A pool that was empty for a while goes on where it was."""
        policy = self.policyOf(1, 2, 3)
        self.assertEqual(self.chosen(policy, 1), [1])
        policy.replaced(())
        policy.replaced(endpoints(1, 2, 3))
        self.assertEqual(self.chosen(policy, 3), [2, 3, 1])

    def test_avoidedIsPassedOver(self) -> None:
        """One that is avoided is passed over; the walk goes on behind the one that was chosen instead."""
        policy = self.policyOf(1, 2, 3)
        self.assertEqual(self.chosen(policy, 1, avoid=(1,)), [2])
        self.assertEqual(self.chosen(policy, 2), [3, 1])

    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.one_of(st.integers(1, 12), st.sets(st.integers(0, 15))), max_size=30))
    def test_churn(self, steps: list[int | set[int]]) -> None:
        """
        Property: after any updates, who is chosen is the first behind the one chosen last in the sorted ring.
        """
        policy = RoundRobin(start=0)
        pool: list[int] = []
        last = -1
        for step in steps:
            if isinstance(step, set):
                pool = sorted(step)
                policy.replaced(endpoints(*pool))
                continue
            for _ in range(step):
                chosen = policy.choose("192.0.2.1", ())
                if not pool:
                    self.assertIsNone(chosen)
                    continue
                last = next((n for n in pool if n > last), pool[0])
                self.assertEqual(chosen, endpoint(last))


class RandomTests(SynchronousTestCase):
    def test_even(self) -> None:
        """Each endpoint has the same share."""
        policy = Random(random.Random(7))
        policy.replaced(endpoints(*range(4)))
        counts = Counter(policy.choose("192.0.2.1", ()) for _ in range(8000))
        for count in counts.values():
            self.assertTrue(1800 < count < 2200, counts)


class LeastConnectionsTests(SynchronousTestCase):
    def test_twoAreBalancedExactly(self) -> None:
        """Of two endpoints the less busy one is always chosen."""
        policy = LeastConnections(random.Random(1))
        policy.replaced(endpoints(1, 2))
        for _ in range(3):
            policy.opened(endpoint(1))
        for _ in range(3):
            self.assertEqual(policy.choose("192.0.2.1", ()), endpoint(2))
            policy.opened(endpoint(2))
        policy.closed(endpoint(1))
        self.assertEqual(policy.choose("192.0.2.1", ()), endpoint(1))

    def test_busiestIsNotChosen(self) -> None:
        """The one endpoint that is busier than all others gets nothing."""
        policy = LeastConnections(random.Random(2))
        policy.replaced(endpoints(*range(5)))
        policy.opened(endpoint(3))
        self.assertNotIn(endpoint(3), {policy.choose("192.0.2.1", ()) for _ in range(500)})

    def test_newcomerIsNotOverrun(self) -> None:
        """One that joins a busy pool gets twice a fair share of what comes, not all of it."""
        policy = LeastConnections(random.Random(3))
        policy.replaced(endpoints(*range(9)))
        for number in range(9):
            for _ in range(100):
                policy.opened(endpoint(number))
        policy.replaced(endpoints(*range(10)))
        share = sum(policy.choose("192.0.2.1", ()) == endpoint(9) for _ in range(4000)) / 4000
        self.assertTrue(0.17 < share < 0.23, share)

    def test_staysEven(self) -> None:
        """Connections that stay open end up spread evenly."""
        policy = LeastConnections(random.Random(4))
        policy.replaced(endpoints(*range(10)))
        counts: Counter[object] = Counter()
        for _ in range(5000):
            chosen = policy.choose("192.0.2.1", ())
            assert chosen is not None
            policy.opened(chosen)
            counts[chosen] += 1
        self.assertLessEqual(max(counts.values()) - min(counts.values()), 10)

    def test_comesBackBusy(self) -> None:
        """One that left and came back still has the connections that did not end meanwhile."""
        policy = LeastConnections(random.Random(5))
        policy.replaced(endpoints(1, 2))
        policy.opened(endpoint(1))
        policy.replaced(endpoints(2))
        policy.replaced(endpoints(1, 2))
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(50)}, {endpoint(2)})
        policy.closed(endpoint(1))
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(50)}, set(endpoints(1, 2)))
