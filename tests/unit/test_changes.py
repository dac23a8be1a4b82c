"""Tests of twisted_kproxy.core.changes and twisted_kproxy.core.rules."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import portName, serviceMap, servicePort
from twisted_kproxy.core import values
from twisted_kproxy.core.changes import StaleFlow, Update
from twisted_kproxy.core.rules import Guard, Rule, Ruleset, Target, applied, deltaBetween
from twisted_kproxy.core.values import (
    PLAIN,
    Frontend,
    FrontendKey,
    Locality,
    ServiceMap,
    ServicePort,
    ServicePortName,
)

_names = [portName(it) for it in "abcdefg"]
_steps = st.lists(
    st.dictionaries(st.sampled_from(_names), st.one_of(st.none(), st.integers(1, 2)), max_size=4), max_size=12
)


class ServiceMapTests(SynchronousTestCase):
    """A map that shares with others what did not change."""

    def assertSame(self, it: ServiceMap, plain: dict[ServicePortName, ServicePort]) -> None:
        self.assertEqual(dict(it), plain)
        self.assertEqual(dict(it.items()), plain)
        self.assertEqual((len(it), list(it), bool(it)), (len(plain), list(dict(it)), bool(plain)))
        for name in _names:
            self.assertIs(it.get(name), plain.get(name))
            self.assertEqual(name in it, name in plain)

    @given(_steps, st.sampled_from([0, 2, 512]))
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def test_likeADict(self, steps: list[dict[ServicePortName, int | None]], layered: int) -> None:
        """Whatever steps led to it, it is as one made at once; earlier maps stay, and any two tell what differs."""
        self.patch(values, "MOST_LAYERED", layered)
        made = {(name, n): servicePort(name, cluster=[("10.1.0.1", n)]) for name in _names for n in (1, 2)}
        plain: dict[ServicePortName, ServicePort] = {name: made[name, 1] for name in _names[:4]}
        history = [(ServiceMap(plain), dict(plain))]
        for step in steps:
            changes = {name: None if n is None else made[name, n] for name, n in step.items()}
            for name, port in changes.items():
                plain.pop(name, None)
                if port is not None:
                    plain[name] = port
            history.append((history[-1][0].step(changes, len(history), PLAIN), dict(plain)))
        for it, expected in history:
            self.assertSame(it, expected)
            for other, was in history:
                self.assertEqual(it.since(other), ServiceMap(expected).since(ServiceMap(was)))
                changed = {name for name, port in expected.items() if was.get(name) is not port}
                self.assertEqual(it.since(other), (changed, was.keys() - expected.keys()))

    def test_missing(self) -> None:
        """What is not there, or no longer, is asked for in vain; there may be a default."""
        it = serviceMap(servicePort()).step({portName(): None}, 1, PLAIN)
        self.assertRaises(KeyError, it.__getitem__, portName())
        self.assertRaises(KeyError, it.__getitem__, portName("other"))
        self.assertEqual(it.get(portName(), "none"), "none")

    def test_bounded(self) -> None:
        """Steps do not pile up: what came and went leaves nothing behind."""
        it = ServiceMap()
        for n in range(2000):
            it = it.step({portName(f"s{n}"): servicePort(), portName(f"s{n - 1}"): None}, n, PLAIN)
            self.assertLessEqual(len(it._over), values.MOST_LAYERED)
        self.assertEqual((len(it), len(it._base) + len(it._over)), (1, 1))


class UpdateTests(SynchronousTestCase):
    """The step between two maps."""

    def test_sameObjects(self) -> None:
        """What is the same object is no change; a map that differs in nothing is no update."""
        port = servicePort()
        self.assertFalse(Update(serviceMap(port), serviceMap(port)))
        self.assertTrue(Update(serviceMap(port), serviceMap(port), full=True))

    def test_changedAndRemoved(self) -> None:
        """New, altered and removed names are told apart from those that stay."""
        stays, old, gone = servicePort(), servicePort(portName("a")), servicePort(portName("b"))
        new, fresh = servicePort(portName("a"), cluster=[("10.1.0.1", 1)]), servicePort(portName("c"))
        update = Update(serviceMap(stays, old, gone), serviceMap(stays, new, fresh))
        self.assertEqual(update.changed, {portName("a"), portName("c")})
        self.assertEqual(update.removed, {portName("b")})
        self.assertEqual(update.renamed, {})

    def test_renamed(self) -> None:
        """A port of the same Service with the same tuple under another name was renamed."""
        old, new = servicePort(portName(port="http")), servicePort(portName(port="web"))
        update = Update(serviceMap(old), serviceMap(new))
        self.assertEqual(update.renamed, {portName(port="web"): portName(port="http")})

    def test_notRenamed(self) -> None:
        """Another uid, another tuple, or another Service is no renaming."""
        old = servicePort(portName(port="http"))
        others = [
            servicePort(portName(port="web"), uid="u2"),
            servicePort(portName(port="web"), frontends=[Frontend("ClusterIP", "10.96.0.10", 81)]),
            servicePort(portName("other", port="web")),
            servicePort(portName(port="web", protocol="UDP")),
        ]
        for new in others:
            self.assertEqual(Update(serviceMap(old), serviceMap(new)).renamed, {})

    def test_staleFlows(self) -> None:
        """UDP frontends that are new, gone or lead elsewhere have flows to look at; TCP and the unchanged have not."""
        def udp(name: str, *cluster: object, ip: str = "10.96.0.1") -> object:
            return servicePort(portName(name, protocol="UDP"), cluster, frontends=[Frontend("ClusterIP", ip, 53)])

        def flow(ip: str) -> StaleFlow:
            return StaleFlow(FrontendKey("IPv4", "UDP", ip, 53))

        before = serviceMap(
            udp("gone", ("10.1.0.1", 1), ip="10.96.0.1"), udp("moved", ("10.1.0.1", 1), ip="10.96.0.2"),
            udp("same", ("10.1.0.1", 1), ip="10.96.0.3"), servicePort(),
        )
        after = serviceMap(
            udp("moved", ("10.1.0.2", 1), ip="10.96.0.2"), udp("same", ("10.1.0.1", 1), ip="10.96.0.3"),
            udp("new", ip="10.96.0.4"),
        )
        self.assertEqual(
            Update(before, after).staleFlows, {flow("10.96.0.1"), flow("10.96.0.2"), flow("10.96.0.4")}
        )

    def test_first(self) -> None:
        """From nothing, everything is new."""
        self.assertEqual(Update(ServiceMap(), serviceMap(servicePort())).changed, {portName()})


_keys = st.builds(
    FrontendKey, st.just("IPv4"), st.sampled_from(["TCP", "UDP"]), st.sampled_from(["10.96.0.1", ""]), st.integers(1, 3)
)
_verdicts = st.sampled_from([Target("192.0.2.1", 4000), Target("192.0.2.1", 4001), "reject", "drop"])
_rulesets = st.builds(
    Ruleset,
    st.dictionaries(_keys, st.builds(Rule, _verdicts, _verdicts, st.sampled_from([None, (), ("192.0.2.0/24",)]))),
    st.frozensets(st.builds(Guard, st.just("IPv4"), st.just("TCP"), st.integers(1, 3))),
    st.frozensets(st.sampled_from(["10.96.0.1", "10.96.0.2"])),
    st.builds(Locality, st.sampled_from([(), ("10.244.0.0/16",)]), st.sampled_from([(), ("cni0",)])),
)


class DeltaTests(SynchronousTestCase):
    """The step between two rulesets."""

    @given(_rulesets, _rulesets)
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    def test_roundTrip(self, old: Ruleset, new: Ruleset) -> None:
        """Applying the difference gives the new state, and there is a difference only where they differ."""
        delta = deltaBetween(old, new)
        self.assertEqual(applied(old, delta), new)
        self.assertEqual(bool(delta), old != new)
