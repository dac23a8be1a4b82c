"""Tests of twisted_kproxy.core.explain."""

from __future__ import annotations

import itertools
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.builders import member, portName, service, slice_
from twisted_kproxy.core.explain import Explanation, explain
from twisted_kproxy.core.resolve import resolve
from twisted_kproxy.core.topology import NodeFacts
from twisted_kproxy.core.values import PoolKind

NODE = NodeFacts("n0", "zone-a")
READY: dict[str, Any] = {}
LEAVING: dict[str, Any] = {"ready": False, "terminating": True}
GONE: dict[str, Any] = {"ready": False, "serving": False, "terminating": True}
UNREADY: dict[str, Any] = {"ready": False}


def zone(*names: str) -> dict[str, Any]:
    return {"hints": {"forZones": [{"name": name} for name in names]}}


def node(*names: str) -> dict[str, Any]:
    return {"hints": {"forNodes": [{"name": name} for name in names]}}


def ask(*slices: Any, facts: NodeFacts = NODE, **of: Any) -> Explanation:
    return explain(portName(**of), slices, facts)


def said(found: Explanation, kind: PoolKind = "cluster") -> list[str]:
    """For each endpoint ``yes``, or why it is not in that pool."""
    return [it.reasons.get(kind, "yes") for it in found.fates]


class CategorizeTests(SynchronousTestCase):
    """The matrix of kubernetes ``pkg/proxy/topology_test.go`` (``TestCategorizeEndpoints``), answer by answer."""

    def check(self, members: list[dict[str, Any]], cluster: list[str], notes: list[str], **fields: Any) -> None:
        found = ask(slice_(*(member(f"10.0.0.{n}", **it) for n, it in enumerate(members, 1))), **fields)
        self.assertEqual((said(found), list(found.notes)), (cluster, notes))

    def test_hintsForZone(self) -> None:
        """Hints of all lead to those for this node's zone."""
        self.check([zone("zone-a"), zone("zone-b")], ["yes", "its hints are for other zones: zone-b"], [])

    def test_hintMissing(self) -> None:
        """One endpoint without a hint switches them off, and is named."""
        self.check(
            [zone("zone-a"), zone("zone-b"), READY], ["yes"] * 3,
            ["cluster: hints for zones do not count, since 10.0.0.3:8080 has none"],
        )

    def test_noHints(self) -> None:
        """Without any hints there is nothing to say of them."""
        self.check([READY, READY], ["yes", "yes"], [])

    def test_zoneUnknown(self) -> None:
        """A node without zone uses all."""
        self.check(
            [zone("zone-a"), zone("zone-b")], ["yes", "yes"],
            ["cluster: hints for zones do not count, since the zone of this node is not known"], facts=NodeFacts("n0"),
        )

    def test_nobodyForThisZone(self) -> None:
        """Hints that name nobody here are ignored."""
        self.check(
            [zone("zone-b"), zone("zone-c")], ["yes", "yes"],
            ["cluster: hints for zones do not count, since none is for zone-a"],
        )

    def test_unreadyHasNoSay(self) -> None:
        """An endpoint that is not ready neither switches hints off nor is chosen by them."""
        self.check([zone("zone-a"), {**zone("zone-a"), **UNREADY}, UNREADY], ["yes", "not ready", "not ready"], [])

    def test_hintsForNode(self) -> None:
        """Hints for nodes go before those for zones."""
        self.check(
            [{"hints": {"forNodes": [{"name": "n0"}], "forZones": [{"name": "zone-b"}]}}, node("n1", "n2")],
            ["yes", "its hints are for other nodes: n1, n2"], [],
        )

    def test_nodeHintsThenZone(self) -> None:
        """Where hints for nodes do not lead anywhere, those for zones are asked."""
        both = {"hints": {"forNodes": [{"name": "n1"}], "forZones": [{"name": "zone-a"}]}}
        other = {"hints": {"forNodes": [{"name": "n2"}], "forZones": [{"name": "zone-b"}]}}
        self.check(
            [both, other], ["yes", "its hints are for other zones: zone-b"],
            ["cluster: hints for nodes do not count, since none is for n0"],
        )

    def test_terminating(self) -> None:
        """What terminates is left alone while others are ready, and used when none is, if it serves."""
        self.check([READY, LEAVING, GONE], [
            "yes", "terminating, while others are ready", "terminating, and no longer serving",
        ], [])
        self.check([UNREADY, LEAVING, GONE], ["not ready", "yes", "terminating, and no longer serving"], [
            "cluster: none is ready, so those that still serve while terminating are used",
        ])

    def test_terminatingIgnoresHints(self) -> None:
        """The fallback knows no hints."""
        self.check([{**LEAVING, **zone("zone-b")}], ["yes"], [
            "cluster: none is ready, so those that still serve while terminating are used",
            "cluster: hints do not count for endpoints that are terminating",
        ])

    def test_local(self) -> None:
        """The local pool: only this node's, with a fallback of its own."""
        found = ask(slice_(
            member("10.0.0.1", nodeName="n0", **LEAVING), member("10.0.0.2", nodeName="n1"), member("10.0.0.3"),
            member("10.0.0.4", nodeName="n0", **GONE),
        ))
        self.assertEqual(said(found, "local"), [
            "yes", "not on this node, but on n1", "its slice does not say where it runs",
            "terminating, and no longer serving",
        ])
        self.assertEqual(list(found.notes), [
            "local: none of this node is ready, so those that still serve while terminating are used",
        ])
        self.assertEqual(found.fates[0].pools, ("local",))

    def test_localReady(self) -> None:
        """With a ready endpoint on this node no other of this node is used."""
        found = ask(slice_(
            member("10.0.0.1", nodeName="n0"), member("10.0.0.2", nodeName="n0", **LEAVING),
            member("10.0.0.3", nodeName="n0", **UNREADY),
        ))
        self.assertEqual(said(found, "local"), ["yes", "terminating, while others are ready", "not ready"])


class SliceTests(SynchronousTestCase):
    """What is no endpoint of this service port at all."""

    def test_otherPort(self) -> None:
        """Slices without such a port, or with one that has no number."""
        found = ask(
            slice_(member("10.0.0.1"), name="a", ports=[{"name": "metrics", "port": 9100, "protocol": "TCP"}]),
            slice_(member("10.0.0.2"), name="b", ports=[{"name": "http", "port": 80, "protocol": "UDP"}]),
            slice_(member("10.0.0.3"), name="c", ports=[{"name": "http", "protocol": "TCP"}]),
        )
        self.assertEqual(said(found), [
            "its slice has no port 'http' for TCP", "its slice has no port 'http' for TCP",
            "port 'http' has no usable number (None)",
        ])
        self.assertEqual([it.slice for it in found.fates], ["shop/a", "shop/b", "shop/c"])

    def test_otherFamily(self) -> None:
        """Slices of the other family serve the other service port, and those of names none."""
        found = ask(
            slice_(member("fd00::1"), name="a", addressType="IPv6"),
            slice_(member("db.example.com"), name="b", addressType="FQDN"),
            slice_(member("fd00::2"), name="c"),
        )
        self.assertEqual(said(found), [
            "its slice is of IPv6 addresses; this service port is IPv4",
            "its slice is of FQDN addresses; this service port is IPv4",
            "fd00::2 is not an IPv4 address",
        ])
        six = ask(slice_(member("fd00::1"), addressType="IPv6"), family="IPv6")
        self.assertEqual([(it.address, it.pools) for it in six.fates], [("[fd00::1]:8080", ("cluster",))])

    def test_refused(self) -> None:
        """Addresses that must not be reached, or are none."""
        found = ask(slice_(
            member("127.0.0.1"), member("169.254.169.254"), member("::ffff:10.0.0.1"), member("nonsense"),
            {"addresses": []},
        ))
        self.assertEqual(said(found), [
            "127.0.0.1 is a loopback address", "169.254.169.254 is a link-local address",
            "::ffff:10.0.0.1 is an IPv4-mapped address", "'nonsense' is not an IP address", "it has no address",
        ])
        self.assertEqual([it.address for it in found.fates][3:], ["nonsense", "(none)"])

    def test_duplicate(self) -> None:
        """Of duplicates it is said which slice counts, and why."""
        found = ask(
            slice_(member("10.0.0.1"), member("10.0.0.2"), member("10.0.0.3", **UNREADY), name="a"),
            slice_(member("10.0.0.1"), member("10.0.0.2", **LEAVING), member("10.0.0.3", **READY), name="b"),
        )
        self.assertEqual(said(found), [
            "yes", "yes", "a duplicate: that of shop/b counts, since this one is not ready",
            "a duplicate: that of shop/a counts, since it says the same and comes first",
            "a duplicate: that of shop/a counts, since this one is terminating", "yes",
        ])

    def test_duplicateHere(self) -> None:
        """One that is said to be on this node goes before its twin elsewhere."""
        there, here = (slice_(member("10.0.0.1", nodeName=it), name=f"on-{it}") for it in ("n1", "n0"))
        found = ask(there, here)
        self.assertEqual(said(found)[1], "a duplicate: that of shop/on-n0 counts, since this one is not on this node")

    def test_slicesInAnyOrder(self) -> None:
        """The answer does not depend on the order in which slices came."""
        a, b = slice_(member("10.0.0.1"), name="a"), slice_(member("10.0.0.1"), name="b")
        self.assertEqual(ask(a, b), ask(b, a))


class SameAsResolvedTests(SynchronousTestCase):
    """What is explained is what is served."""

    def test_everyCombination(self) -> None:
        """For every three endpoints of many kinds, those that are said to be in a pool are that pool."""
        kinds: list[dict[str, Any]] = [
            {**state, **hint, **where}
            for state in (READY, LEAVING, GONE, UNREADY)
            for hint in ({}, zone("zone-a"), zone("zone-b"), node("n0"), node("n1"))
            for where in ({}, {"nodeName": "n0"})
        ]
        for chosen in itertools.combinations(kinds, 2):
            for third in (READY, LEAVING, {"nodeName": "n0", **zone("zone-a")}):
                slices = [slice_(*(member(f"10.0.0.{n}", **it) for n, it in enumerate((*chosen, third))))]
                port = resolve(service(), slices, NODE).ports[0]
                found = explain(port.name, slices, NODE)
                for kind in ("cluster", "local"):
                    served = tuple(sorted(it.endpoint for it in found.fates if kind in it.pools and it.endpoint))
                    self.assertEqual(served, port.pool(kind), chosen)
                    self.assertEqual(found.pool(kind), port.pool(kind))
