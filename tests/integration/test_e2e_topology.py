"""
Kubernetes' end-to-end tests ``[sig-network] Traffic Distribution`` and ``Topology Hints``: see :mod:`.scenario`. What
the controller writes into EndpointSlices is written by the test; there are two nodes, so that a node with another zone
label takes the place of a third one.
"""

from __future__ import annotations

from collections.abc import Mapping

from twisted.trial.unittest import TestCase

from .scenario import BOTH, Json, Scenario


def hints(zone: str, node: str = "") -> Json:
    """What traffic distribution makes of an endpoint's zone and node."""
    it: Json = {"forZones": [{"name": zone}]}
    if node:
        it["forNodes"] = [{"name": node}]
    return {"hints": it}


class Topology(Scenario):
    """Zones, and who is asked from where."""

    def zones(self, **zones: str) -> None:
        """The zone of each node."""
        self.addCleanup(lambda: self.world.apply(*(self.world.node(node) for node in zones)))
        self.world.apply(*(self.world.node(node, zone=zone) for node, zone in zones.items()))

    def reaches(self, it: Json, **expected: set[str]) -> None:
        """From each of these places, exactly these."""
        for place, whom in expected.items():
            self.expect(self.clusterIPs(it), whom, (place,))

    def sameZone(self, distribution: str) -> None:
        """Whose zone has an endpoint asks that one; who has none, everybody."""
        more: Mapping[str, Json] = {"p0a": hints("a"), "p1a": hints("b")}
        self.zones(n0="a", n1="b")
        it = self.make("p0a", "p1a", more=more, trafficDistribution=distribution)
        self.reaches(it, p0b={"p0a"}, n0={"p0a"}, p1b={"p1a"}, n1={"p1a"})
        self.zones(n1="c")
        self.reaches(it, p0b={"p0a"}, p1b=BOTH)

    def severalNodes(self, distribution: str) -> None:
        """Two nodes of one zone with a pod each; then one with a client and one with a pod; then a client alone."""
        self.zones(n0="a", n1="a")
        it = self.make("p0a", "p1a", more={"p0a": hints("a"), "p1a": hints("a")}, trafficDistribution=distribution)
        self.reaches(it, p0b=BOTH, p1b=BOTH)
        self.behind(it, "p0a", "p1a", more={"p0a": hints("z"), "p1a": hints("a")})
        self.reaches(it, p0b={"p1a"}, p1b={"p1a"})
        self.zones(n0="c")
        self.reaches(it, p0b=BOTH, p1b={"p1a"})

    def test_closeSameZone(self) -> None:
        """ "should route traffic to an endpoint in the same zone when using PreferClose" """
        self.sameZone("PreferClose")

    def test_closeSeveralNodes(self) -> None:
        """ "should route traffic correctly between pods on multiple nodes when using PreferClose" """
        self.severalNodes("PreferClose")

    def test_sameZone(self) -> None:
        """ "should route traffic to an endpoint in the same zone when using PreferSameZone" """
        self.sameZone("PreferSameZone")

    def test_sameZoneSeveralNodes(self) -> None:
        """ "should route traffic correctly between pods on multiple nodes when using PreferSameZone" """
        self.severalNodes("PreferSameZone")

    def test_sameNode(self) -> None:
        """
        "should route traffic to an endpoint on the same node or fall back to same zone when using PreferSameNode"
        """
        self.zones(n0="a", n1="a")
        more = {"p0a": hints("a", "n0"), "p1a": hints("a", "n1")}
        it = self.make("p0a", "p1a", more=more, trafficDistribution="PreferSameNode")
        self.reaches(it, p0b={"p0a"}, p1b={"p1a"})
        self.behind(it, "p0a", "p1a", more={"p0a": hints("z", "n9"), "p1a": hints("a", "n1")})
        self.reaches(it, p0b={"p1a"}, p1b={"p1a"})
        self.zones(n0="c")
        self.reaches(it, p0b=BOTH, p1b={"p1a"})

    def test_sameNodeGoes(self) -> None:
        """
        "should route traffic to an endpoint on the same node when using PreferSameNode and fall back when the endpoint
        becomes unavailable": and comes back.
        """
        self.zones(n0="a", n1="b")
        more = {"p0a": hints("a", "n0"), "p1a": hints("b", "n1")}
        it = self.make("p0a", "p1a", more=more, trafficDistribution="PreferSameNode")
        self.reaches(it, p0b={"p0a"}, p1b={"p1a"})
        self.behind(it, "p1a", more=more)
        self.reaches(it, p0b={"p1a"}, p1b={"p1a"})
        self.behind(it, "p0a", "p1a", more=more)
        self.reaches(it, p0b={"p0a"}, p1b={"p1a"})

    def test_hints(self) -> None:
        """
        "should distribute endpoints evenly": with hints for every endpoint each zone is served by its own; one endpoint
        without a hint, and all serve everybody.
        """
        more = {"p0a": hints("a"), "p0b": hints("b"), "p1a": hints("b"), "p1b": hints("a")}
        self.zones(n0="a", n1="b")
        it = self.make(*more, more=more)
        self.reaches(it, n0={"p0a", "p1b"}, n1={"p0b", "p1a"})
        del more["p1b"]
        self.behind(it, *more, "p1b", more=more)
        self.reaches(it, n0={*more, "p1b"}, n1={*more, "p1b"})


class NftablesTopologyTests(Topology, TestCase):
    """With rules by nftables."""

    writer = "nftables"
