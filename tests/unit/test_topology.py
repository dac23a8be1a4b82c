"""Tests of twisted_kproxy.core.topology."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core.topology import Candidate, NodeFacts, Pools, categorize

NODE = NodeFacts("n0", "zone-a")


def at(last: int, **fields: object) -> Candidate:
    return Candidate(f"10.0.0.{last}", 80, **fields)


def names(pools: Pools) -> tuple[list[str], list[str]]:
    return [it.address[7:] for it in pools.cluster], [it.address[7:] for it in pools.local]


class ReadinessTests(SynchronousTestCase):
    """Readiness and termination."""

    def test_readyOnly(self) -> None:
        """As long as one endpoint is ready, those that are not get nothing."""
        pools = categorize([at(1), at(2, ready=False), at(3, ready=False, terminating=True)], NODE)
        self.assertEqual(names(pools), (["1"], []))

    def test_terminatingServesWhenAlone(self) -> None:
        """Without a ready endpoint those that still serve while terminating are used (KEP-1669)."""
        pools = categorize([at(1, ready=False, terminating=True), at(2, ready=False)], NODE)
        self.assertEqual(names(pools), (["1"], []))
        self.assertTrue(pools.reachable)

    def test_terminatingNotServing(self) -> None:
        """What terminates and no longer serves is never used, and does not make the service reachable."""
        pools = categorize([at(1, ready=False, serving=False, terminating=True)], NODE)
        self.assertEqual(names(pools), ([], []))
        self.assertFalse(pools.reachable)

    def test_fallbackIsPerPool(self) -> None:
        """The local pool falls back by itself, though the cluster has a ready endpoint elsewhere."""
        pools = categorize([at(1), at(2, ready=False, terminating=True, isLocal=True)], NODE)
        self.assertEqual(names(pools), (["1"], ["2"]))
        self.assertEqual(pools.localReady, frozenset())

    def test_reachableElsewhere(self) -> None:
        """A service with endpoints on other nodes only is reachable though its local pool is empty."""
        pools = categorize([at(1)], NODE)
        self.assertEqual((pools.local, pools.reachable), ((), True))

    def test_localReady(self) -> None:
        """Ready local endpoints are counted by address."""
        two = [Candidate("10.0.0.1", port, isLocal=True) for port in (80, 81)]
        self.assertEqual(categorize(two, NODE).localReady, {"10.0.0.1"})

    def test_serving(self) -> None:
        """Whatever serves may keep its established flows, ready or not."""
        pools = categorize([at(1), at(2, ready=False), at(3, ready=False, serving=False)], NODE)
        self.assertEqual(pools.serving, {"10.0.0.1:80", "10.0.0.2:80"})


class HintTests(SynchronousTestCase):
    """Topology hints."""

    def test_zone(self) -> None:
        """When all ready endpoints have zone hints, those for this node's zone are used."""
        pools = categorize([at(1, zones=frozenset({"zone-a"})), at(2, zones=frozenset({"zone-b"}))], NODE)
        self.assertEqual(names(pools)[0], ["1"])

    def test_oneWithoutHint(self) -> None:
        """One endpoint without hint switches hints off."""
        pools = categorize([at(1, zones=frozenset({"zone-a"})), at(2)], NODE)
        self.assertEqual(names(pools)[0], ["1", "2"])

    def test_nobodyHere(self) -> None:
        """Hints that name nobody for this zone are ignored."""
        pools = categorize([at(1, zones=frozenset({"zone-b"})), at(2, zones=frozenset({"zone-c"}))], NODE)
        self.assertEqual(names(pools)[0], ["1", "2"])

    def test_nodeBeforeZone(self) -> None:
        """Hints for this node win over hints for its zone (KEP-4444)."""
        both = frozenset({"zone-a"})
        pools = categorize(
            [at(1, zones=both, nodes=frozenset({"n0"})), at(2, zones=both, nodes=frozenset({"n1"}))], NODE
        )
        self.assertEqual(names(pools)[0], ["1"])

    def test_unreadyHintless(self) -> None:
        """Only ready endpoints have a say in whether hints count."""
        pools = categorize([at(1, zones=frozenset({"zone-a"})), at(2, ready=False)], NODE)
        self.assertEqual(names(pools)[0], ["1"])

    def test_terminatingIgnoresHints(self) -> None:
        """The fallback to terminating endpoints does not look at hints."""
        leaving = {"ready": False, "terminating": True}
        pools = categorize(
            [at(1, zones=frozenset({"zone-a"}), **leaving), at(2, zones=frozenset({"zone-b"}), **leaving)], NODE
        )
        self.assertEqual(names(pools)[0], ["1", "2"])

    def test_zoneUnknown(self) -> None:
        """A node without zone uses all endpoints."""
        pools = categorize([at(1, zones=frozenset({"zone-a"})), at(2, zones=frozenset({"zone-b"}))], NodeFacts("n0"))
        self.assertEqual(names(pools)[0], ["1", "2"])

    def test_localPoolIgnoresHints(self) -> None:
        """Local endpoints are used whatever zone they are meant for."""
        pools = categorize([at(1, zones=frozenset({"zone-b"}), isLocal=True)], NODE)
        self.assertEqual(names(pools)[1], ["1"])
