"""Tests of twisted_kproxy.core.ownership."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.builders import portName, servicePort
from twisted_kproxy.core.ownership import Claims
from twisted_kproxy.core.values import Frontend, FrontendKey, ServicePort

KEY = FrontendKey("IPv4", "TCP", "", 30080)


def nodePort(service: str) -> ServicePort:
    return servicePort(
        portName(service), frontends=[Frontend("ClusterIP", "10.96.0.1", 80), Frontend("NodePort", None, 30080)]
    )


def only(service: str, number: int = 30080) -> ServicePort:
    return servicePort(portName(service), frontends=[Frontend("NodePort", None, number)])


class ClaimsTests(SynchronousTestCase):
    """One owner for each frontend, the same on every node."""

    def test_oldestWins(self) -> None:
        """The older Service owns, whichever was seen first."""
        old, young = only("old"), only("a-young")
        for order in ((old, young), (young, old)):
            claims = Claims()
            for port in order:
                claims.change([], [port], "2026-01-01" if port is old else "2026-02-01")
            self.assertEqual(claims.owner(KEY), old.name)
            self.assertEqual(claims.owned(young).frontends, ())
            self.assertIs(claims.owned(old), old)
            self.assertEqual(claims.pending(young), {KEY: old.name})

    def test_sameAge(self) -> None:
        """Of the same age, the first by name."""
        claims = Claims()
        claims.change([], [only("b")], "x")
        claims.change([], [only("a")], "x")
        self.assertEqual(claims.owner(KEY), portName("a"))

    def test_promotion(self) -> None:
        """When the owner lets go the next one takes over, and is told of."""
        claims = Claims()
        claims.change([], [only("a")], "1")
        claims.change([], [only("b")], "2")
        touched = claims.change([only("a")], [only("a", 30081)], "1")
        self.assertIn(portName("b"), touched)
        self.assertEqual(claims.owner(KEY), portName("b"))

    def test_addBeforeDelete(self) -> None:
        """A late removal of the old owner does not take the frontend from the new one."""
        claims = Claims()
        claims.change([], [only("a")], "1")
        claims.change([], [only("b")], "2")
        claims.change([only("a")], [], "")
        self.assertEqual(claims.owner(KEY), portName("b"))
        self.assertEqual(claims.pending(only("b")), {})

    def test_restServes(self) -> None:
        """A Service that loses one frontend keeps its others."""
        claims = Claims()
        claims.change([], [only("a")], "1")
        loser = nodePort("b")
        claims.change([], [loser], "2")
        self.assertEqual([f.kind for f in claims.owned(loser).frontends], ["ClusterIP"])

    def test_many(self) -> None:
        """Of a thousand that claim the same, only those whose ownership changes are named."""
        claims = Claims()
        for number in range(1000):
            touched = claims.change([], [only(f"s{number:04}")], f"{number:04}")
            self.assertLessEqual(len(touched), 2)
        for number in range(999):
            touched = claims.change([only(f"s{number:04}")], [], "")
            self.assertLessEqual(touched, {portName(f"s{number:04}"), portName(f"s{number + 1:04}")})
            self.assertEqual(claims.owner(KEY), portName(f"s{number + 1:04}"))

    def test_agesAnew(self) -> None:
        """An owner that is made anew, and is the younger one now, hands over."""
        claims = Claims()
        claims.change([], [only("a")], "1")
        claims.change([], [only("b")], "2")
        self.assertIn(portName("b"), claims.change([only("a")], [only("a")], "3"))
        self.assertEqual(claims.owner(KEY), portName("b"))

    def test_nothingLeft(self) -> None:
        """Claims that are gone leave nothing behind."""
        claims = Claims()
        claims.change([], [nodePort("a")], "1")
        claims.change([nodePort("a")], [], "")
        self.assertEqual((claims._claims, claims._owners), ({}, {}))

    def test_healthCheckPort(self) -> None:
        """A health-check port has one owner as a node port has, and is in the way of a node port of that number."""
        older, younger = (servicePort(portName(name), frontends=[], healthCheckPort=30080) for name in ("z", "a"))
        claims = Claims()
        claims.change([], [younger], "2")
        claims.change([], [older], "1")
        claims.change([], [only("node")], "3")
        self.assertIs(claims.owned(older), older)
        self.assertEqual(claims.owned(younger).healthCheckPort, 0)
        self.assertEqual(claims.owned(only("node")).frontends, ())
        self.assertEqual(claims.pending(younger), {KEY: older.name})
        touched = claims.change([older], [], "")
        self.assertEqual(touched - {older.name}, {younger.name})
        self.assertIs(claims.owned(younger), younger)
        six = servicePort(portName("six", family="IPv6"), frontends=[], healthCheckPort=30080)
        claims.change([], [six], "9")
        self.assertIs(claims.owned(six), six)
