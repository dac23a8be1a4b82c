"""What every balancing policy promises: one suite, mixed into a test case for each of them."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from twisted_kproxy.core.values import Endpoint
from twisted_kproxy.interfaces import IBalancingPolicy


def endpoint(number: int) -> Endpoint:
    """The endpoint of that number; they sort as their numbers do, up to 65535."""
    return Endpoint(f"10.{number // 256 + 100}.{number % 256 + 100}.1", 8080)


def endpoints(*numbers: int) -> tuple[Endpoint, ...]:
    """A pool, as policies are told of it: sorted, none twice."""
    return tuple(sorted({endpoint(number) for number in numbers}))


class PolicySuite(SynchronousTestCase):
    """Mix in, and override :meth:`makePolicy`."""

    def makePolicy(self) -> IBalancingPolicy:
        raise NotImplementedError

    def policyOf(self, *numbers: int) -> IBalancingPolicy:
        policy = self.makePolicy()
        policy.replaced(endpoints(*numbers))
        return policy

    def test_interface(self) -> None:
        """A policy provides L{IBalancingPolicy}."""
        verifyObject(IBalancingPolicy, self.makePolicy())

    def test_nothingToldNothingChosen(self) -> None:
        """A policy that was told of no endpoint, or of none any more, chooses none."""
        policy = self.makePolicy()
        self.assertIsNone(policy.choose("192.0.2.1", ()))
        policy.replaced(endpoints(1, 2))
        policy.replaced(())
        self.assertIsNone(policy.choose("192.0.2.1", ()))
        self.assertIsNone(policy.choose("192.0.2.1", {endpoint(1)}))

    def test_onlyOne(self) -> None:
        """The only endpoint is chosen every time, and again when nobody else is left of many."""
        policy = self.policyOf(1)
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(10)}, {endpoint(1)})
        policy.replaced(endpoints(1, 2, 3))
        policy.replaced(endpoints(2))
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(10)}, {endpoint(2)})

    def test_everyEndpointServes(self) -> None:
        """In the long run no endpoint is left out, and none is chosen that is not in the pool."""
        policy = self.policyOf(*range(7))
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(1000)}, set(endpoints(*range(7))))

    def test_avoided(self) -> None:
        """What is to be avoided is never chosen; whoever is left is."""
        policy = self.policyOf(1, 2, 3, 4)
        avoid = {endpoint(1), endpoint(3)}
        self.assertEqual({policy.choose("192.0.2.1", avoid) for _ in range(200)}, set(endpoints(2, 4)))

    def test_avoidAsSequence(self) -> None:
        """What is to be avoided may come in any collection, with strangers in it."""
        policy = self.policyOf(1, 2)
        self.assertEqual(policy.choose("192.0.2.1", [endpoint(9), endpoint(2)]), endpoint(1))

    def test_allAvoided(self) -> None:
        """Where all are to be avoided there is none to choose; the next choice is free again."""
        policy = self.policyOf(1, 2, 3)
        self.assertIsNone(policy.choose("192.0.2.1", set(endpoints(1, 2, 3))))
        self.assertIn(policy.choose("192.0.2.1", ()), endpoints(1, 2, 3))

    def test_followsThePool(self) -> None:
        """Who has left is not chosen any more, who has joined is."""
        policy = self.policyOf(1, 2, 3)
        policy.choose("192.0.2.1", ())
        policy.replaced(endpoints(2, 4, 5))
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(500)}, set(endpoints(2, 4, 5)))

    def test_countsOfStrangers(self) -> None:
        """Connections that end at endpoints which have left, or that nobody reported, disturb nothing."""
        policy = self.policyOf(1, 2)
        policy.opened(endpoint(1))
        policy.replaced(endpoints(2, 3))
        policy.closed(endpoint(1))
        policy.closed(endpoint(1))
        policy.closed(endpoint(7))
        self.assertEqual({policy.choose("192.0.2.1", ()) for _ in range(200)}, set(endpoints(2, 3)))

    def test_thousands(self) -> None:
        """A choice among thousands does not walk them: ten thousand choices look at few endpoints each."""

        class Counting(tuple):  # type: ignore[type-arg]
            looks = 0

            def __getitem__(self, index):  # type: ignore[no-untyped-def]
                Counting.looks += 1
                return tuple.__getitem__(self, index)

            def __iter__(self):  # type: ignore[no-untyped-def]
                Counting.looks += len(self)
                return tuple.__iter__(self)

        policy = self.makePolicy()
        policy.replaced(Counting(endpoints(*range(5000))))
        Counting.looks = 0
        for _ in range(10000):
            policy.choose("192.0.2.1", ())
        self.assertLessEqual(Counting.looks, 2 * 10000)
