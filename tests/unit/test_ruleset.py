"""From service ports to rules, and from one ruleset to the next."""

from __future__ import annotations

import ipaddress

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import LOCALITY, SAMPLE, key, many, same, to
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset, Target, applied, deltaBetween
from twisted_kproxy.core.values import Endpoint, Frontend, Locality, ServicePort, ServicePortName
from twisted_kproxy.netfilter.ruleset import CannotRender, Fragments, canonicalNetworks, fragment

NAME = ServicePortName("shop", "web", "http", "TCP", "IPv4")


def here(port: int) -> tuple[Endpoint, ...]:
    """A socket of this node."""
    return (Endpoint("192.0.2.2", port, True, True),)


class FragmentTests(SynchronousTestCase):
    """What one service port comes to."""

    def test_led(self) -> None:
        """Every frontend leads to the socket of its pool, insiders to that of theirs."""
        port = ServicePort(
            NAME,
            "u",
            (
                Frontend("ClusterIP", "10.96.0.10", 80),
                Frontend("ExternalIP", "203.0.113.5", 80, "local", "cluster"),
                Frontend("NodePort", None, 30080, "local", "cluster"),
            ),
            cluster=here(40001),
            local=here(40002),
        )
        made = fragment(port)
        split = Rule(outside=to(40002), inside=to(40001))
        self.assertEqual(
            dict(made.rules),
            {
                key("10.96.0.10", 80): same(to(40001)),
                key("203.0.113.5", 80): split,
                key("", 30080, "TCP", "IPv4"): split,
            },
        )
        self.assertEqual(made.guards, {Guard("IPv4", "TCP", 40001), Guard("IPv4", "TCP", 40002)})

    def test_empty(self) -> None:
        """Without any endpoint a frontend refuses; when endpoints exist that it may not use, it drops."""
        frontends = (Frontend("ClusterIP", "10.96.0.10", 80), Frontend("ExternalIP", "203.0.113.5", 80, "local"))
        nowhere = fragment(ServicePort(NAME, "u", frontends))
        self.assertEqual([rule for _key, rule in nowhere.rules], [same("reject"), same("reject")])
        elsewhere = fragment(ServicePort(NAME, "u", frontends, cluster=here(40001), reachable=True))
        self.assertEqual(
            [rule for _key, rule in elsewhere.rules],
            [same(to(40001)), Rule(outside="drop", inside=to(40001))],
        )
        self.assertEqual(nowhere.guards, frozenset())

    def test_unusedPoolHasNoGuard(self) -> None:
        """A pool that no frontend leads to is not looked at."""
        port = ServicePort(NAME, "u", (Frontend("ClusterIP", "10.96.0.10", 80),), here(40001), here(40002))
        self.assertEqual(fragment(port).guards, {Guard("IPv4", "TCP", 40001)})

    def test_notASocket(self) -> None:
        """Endpoints that are no socket of this node, and more than one, are refused with the service's name."""
        frontends = (Frontend("ClusterIP", "10.96.0.10", 80),)
        for pool in ((Endpoint("10.244.1.10", 8080),), (*here(40001), *here(40002))):
            error = self.assertRaises(CannotRender, fragment, ServicePort(NAME, "u", frontends, pool))
            self.assertIn("shop/web:http/TCP/IPv4", str(error))

    def test_sources(self) -> None:
        """A frontend's sources are its rule's; those of a node port, or of another family, cannot be."""
        sources = ("10.0.0.0/8", "192.0.2.1/32")
        one = Frontend("LoadBalancer", "203.0.113.5", 443, sources=sources)
        made = fragment(ServicePort(NAME, "u", (one,), here(40001)))
        self.assertEqual(made.rules, ((key("203.0.113.5", 443), same(to(40001), sources)),))
        for frontend in (
            Frontend("NodePort", None, 30080, sources=()),
            Frontend("LoadBalancer", "203.0.113.5", 443, sources=("fd00::/8",)),
        ):
            error = self.assertRaises(CannotRender, fragment, ServicePort(NAME, "u", (frontend,), here(40001)))
            self.assertIn("shop/web:http/TCP/IPv4", str(error))

    def test_cache(self) -> None:
        """A service port is rendered once per object; one that is equal but another object is rendered anew."""
        fragments = Fragments()
        one = ServicePort(NAME, "u", (Frontend("ClusterIP", "10.96.0.10", 80),), here(40001))
        two = ServicePort(NAME, "u", (Frontend("ClusterIP", "10.96.0.10", 80),), here(40001))
        self.assertIs(fragments.of(one), fragments.of(one))
        self.assertEqual(fragments.made, 1)
        fragments.of(two)
        self.assertEqual(fragments.made, 2)
        self.assertIs(fragments.last(NAME).port, two)  # type: ignore[union-attr]
        fragments.keepOnly({})
        self.assertIsNone(fragments.last(NAME))


class NetworkTests(SynchronousTestCase):
    """Pod networks."""

    def test_canonical(self) -> None:
        """Host bits go, neighbours and what is inside another are joined, IPv4 is first."""
        self.assertEqual(
            canonicalNetworks(["fd00:10:244::1/56", "10.1.0.0/16", " 10.0.0.0/16", "10.0.4.0/24", "10.244.1.7/24"]),
            ("10.0.0.0/15", "10.244.1.0/24", "fd00:10:244::/56"),
        )

    def test_nonsense(self) -> None:
        """What is no network is named."""
        self.assertIn("10.244.0.0/33", str(self.assertRaises(ValueError, canonicalNetworks, ["10.244.0.0/33"])))

    @settings(deadline=None)
    @given(st.lists(st.ip_addresses(network="10.0.0.0/27"), max_size=12), st.lists(st.integers(27, 32), max_size=12))
    def test_sameAddresses(self, addresses: list[ipaddress.IPv4Address], lengths: list[int]) -> None:
        """The canonical networks have exactly the addresses of those given, and are their own canonical form."""
        given_ = [f"{a}/{n}" for a, n in zip(addresses, lengths, strict=False)]
        found = canonicalNetworks(given_)

        def all_(networks: object) -> set[object]:
            return {a for n in networks for a in ipaddress.ip_network(n, strict=False)}  # type: ignore[attr-defined]

        self.assertEqual(all_(found), all_(given_))
        self.assertEqual(canonicalNetworks(found), found)


class DeltaTests(SynchronousTestCase):
    """Steps between rulesets."""

    def test_toItself(self) -> None:
        """From a ruleset to itself there is nothing to do."""
        self.assertFalse(deltaBetween(SAMPLE, Ruleset(dict(SAMPLE.rules), SAMPLE.guards, SAMPLE.clusterIPs, LOCALITY)))

    def test_everyStep(self) -> None:
        """A delta leads from the one to the other, whatever they are, and names only what differs."""
        ten = Locality(("10.0.0.0/8",))
        moved = Ruleset({**SAMPLE.rules, key("10.96.0.10", 80): same("reject")}, frozenset(), locality=ten)
        some = [Ruleset(), SAMPLE, moved, many(40), many(50, 30000)]
        for old in some:
            for new in some:
                self.assertEqual(applied(old, deltaBetween(old, new)), new)
        self.assertEqual(set(deltaBetween(SAMPLE, moved).rules), {key("10.96.0.10", 80)})

    def test_truth(self) -> None:
        """A delta that empties the insiders is one."""
        self.assertTrue(Delta(locality=Locality(())))
        self.assertFalse(Delta())

    def test_targetsDiffer(self) -> None:
        """A target is its address and port."""
        self.assertNotEqual(Target("192.0.2.2", 1), Target("192.0.2.2", 2))
