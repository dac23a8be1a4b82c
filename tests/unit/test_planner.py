"""Tests of twisted_kproxy.planner, with what the dataplane and the rule plane themselves say of a map."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import portName, serviceMap, servicePort
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset, Target, applied
from twisted_kproxy.core.values import Frontend, FrontendKey, Locality, Problem, ServiceMap
from twisted_kproxy.netfilter.planning import rendered
from twisted_kproxy.planner import Plan, Planner, PlanText
from twisted_kproxy.userspace.redirect import planned, poolsOf, preferred

HERE = "192.0.2.7"
CLUSTER = FrontendKey("IPv4", "TCP", "10.96.0.10", 80)
NODE = FrontendKey("IPv4", "TCP", "", 30080)
BOTH = (Frontend("ClusterIP", "10.96.0.10", 80), Frontend("NodePort", None, 30080, "local", "cluster"))
WEB = servicePort(frontends=BOTH, cluster=[("10.1.0.1", 8080), ("10.1.0.2", 8080)], local=[("10.1.0.1", 8080)])
#: as a daemon leaves it that listens on 41000 for all endpoints, and on 41001 for those of this node
LEFT = Ruleset(
    rules={
        CLUSTER: Rule(Target(HERE, 41000), Target(HERE, 41000)),
        NODE: Rule(Target(HERE, 41001), Target(HERE, 41000)),
    },
    guards=frozenset({Guard("IPv4", "TCP", 41000), Guard("IPv4", "TCP", 41001)}),
    clusterIPs=frozenset({"10.96.0.10"}),
)


def planner(portRange: Any = None, **addresses: str | None) -> Planner:
    known: dict[str, str | None] = {"IPv4": HERE, "IPv6": "fd00::7", **addresses}
    return Planner(
        poolsOf=poolsOf, preferred=preferred, redirect=planned, render=rendered,
        addressOf=lambda family: known[family], portRange=portRange,
    )


def compare(services: ServiceMap, found: Ruleset | None, *problems: Problem, **how: Any) -> list[str]:
    """The lines from the comparison on."""
    lines = list(PlanText(planner(**how).plan(services, found), found).lines(problems))
    begins = next((n for n, line in enumerate(lines) if line.startswith("Different")), len(lines) - 1)
    return lines[begins:]


class ListenerTests(SynchronousTestCase):
    """The sockets that would be opened."""

    def listeners(self, plan: Plan) -> list[tuple[str, int | None, int]]:
        return [(it.pool.kind, it.port if it.known else None, it.endpoints) for it in plan.listeners]

    def test_takenOver(self) -> None:
        """The ports that the rules name now."""
        found = self.listeners(planner().plan(serviceMap(WEB), LEFT))
        self.assertEqual(found, [("cluster", 41000, 2), ("local", 41001, 1)])

    def test_any(self) -> None:
        """Without rules any port will do, and each has a number of its own to stand in for it."""
        plan = planner().plan(serviceMap(WEB), None)
        self.assertEqual(self.listeners(plan), [("cluster", None, 2), ("local", None, 1)])
        self.assertEqual(len({it.port for it in plan.listeners}), 2)

    def test_range(self) -> None:
        """A port outside the range is not taken over."""
        found = self.listeners(planner((41001, 41010)).plan(serviceMap(WEB), LEFT))
        self.assertEqual(found, [("cluster", None, 2), ("local", 41001, 1)])

    def test_onePortTwice(self) -> None:
        """Two pools that prefer the same port: the second gets another."""
        frontends = [Frontend("ExternalIP", "198.51.100.1", 80)]
        other = servicePort(portName("other"), frontends=frontends, cluster=[("10.1.0.9", 1)])
        found = applied(LEFT, Delta({FrontendKey("IPv4", "TCP", "198.51.100.1", 80): LEFT.rules[CLUSTER]}))
        plan = planner().plan(serviceMap(WEB, other), found)
        self.assertEqual([it.known for it in plan.listeners], [True, False, True])

    def test_standInsAvoidKnownPorts(self) -> None:
        """No stand-in is a port that is taken over."""
        frontends = [Frontend("ExternalIP", "198.51.100.1", 80)]
        other = servicePort(portName("aa"), frontends=frontends, cluster=[("10.1.0.9", 1)])
        found = Ruleset({CLUSTER: Rule(Target(HERE, 65535), "drop")})
        plan = planner().plan(serviceMap(other, WEB), found)
        self.assertEqual(len({it.port for it in plan.listeners}), 3)

    def test_none(self) -> None:
        """What has no endpoints, or cannot be served, has no socket."""
        empty = servicePort(portName("empty"))
        sctp = servicePort(portName("sctp", protocol="SCTP"), cluster=[("10.1.0.1", 9)])
        six = servicePort(
            portName("six", family="IPv6"), frontends=[Frontend("ClusterIP", "fd00::10", 80)], cluster=[("fd00::1", 9)]
        )
        plan = planner(IPv6=None).plan(serviceMap(empty, sctp, six), None)
        self.assertEqual(plan.listeners, ())
        self.assertEqual({str(name): why for name, why in plan.notServed.items()}, {
            "shop/sctp:http/SCTP/IPv4": "SCTP is not served in userspace mode; its clients are refused",
            "shop/six:http/TCP/IPv6": "this node has no IPv6 address",
        })
        self.assertEqual({rule.outside for rule in plan.ruleset.rules.values()}, {"reject"})


class ComparisonTests(SynchronousTestCase):
    """What differs from what the kernel has."""

    def test_same(self) -> None:
        """Nothing, where a daemon is at work."""
        self.assertEqual(compare(serviceMap(WEB), LEFT), ["nothing to do"])

    def test_missing(self) -> None:
        """One element that somebody has taken out."""
        found = replace(LEFT, clusterIPs=frozenset())
        self.assertEqual(compare(serviceMap(WEB), found), [
            "Different in the kernel (1):", "  + ClusterIP 10.96.0.10", "1 to add, 0 to change, 0 to remove",
        ])

    def test_added(self) -> None:
        """A frontend that the kernel does not have leads to the port that others of its pool lead to."""
        more = (*BOTH, Frontend("ExternalIP", "198.51.100.1", 80))
        services = serviceMap(replace(WEB, frontends=more))
        added = FrontendKey("IPv4", "TCP", "198.51.100.1", 80)
        only = ["Different in the kernel (1):", "  + 198.51.100.1:80/TCP -> 192.0.2.7:41000"]
        self.assertEqual(compare(services, LEFT), [*only, "1 to add, 0 to change, 0 to remove"])
        found = applied(LEFT, Delta({added: LEFT.rules[CLUSTER], CLUSTER: None}))
        only = ["Different in the kernel (1):", "  + 10.96.0.10:80/TCP -> 192.0.2.7:41000"]
        self.assertEqual(compare(services, found), [*only, "1 to add, 0 to change, 0 to remove"])

    def test_changed(self) -> None:
        """Sources, verdicts and what addresses mean."""
        only = replace(BOTH[0], kind="LoadBalancer", sources=("203.0.113.0/24",))
        web = replace(WEB, frontends=(only, BOTH[1]), local=())
        services = ServiceMap({WEB.name: web}, locality=Locality(insiders=("10.244.0.0/16",)))
        self.assertEqual(compare(services, LEFT), [
            "Different in the kernel (5):",
            "  ~ node:30080/TCP/IPv4 inside -> 192.0.2.7:41000, outside drop; "
            "it is inside -> 192.0.2.7:41000, outside -> 192.0.2.7:41001",
            "  ~ 10.96.0.10:80/TCP -> 192.0.2.7:41000, only from 203.0.113.0/24; it is -> 192.0.2.7:41000",
            "  - guarded port 41001/TCP/IPv4",
            "  - ClusterIP 10.96.0.10",
            "  ~ pod networks: 10.244.0.0/16; it is none",
            "0 to add, 3 to change, 2 to remove",
        ])

    def test_removed(self) -> None:
        """Nothing is to be served."""
        self.assertEqual(compare(serviceMap(), LEFT), [
            "Different in the kernel (5):",
            "  - node:30080/TCP/IPv4 inside -> 192.0.2.7:41000, outside -> 192.0.2.7:41001",
            "  - 10.96.0.10:80/TCP -> 192.0.2.7:41000",
            "  - guarded port 41000/TCP/IPv4",
            "  - guarded port 41001/TCP/IPv4",
            "  - ClusterIP 10.96.0.10",
            "0 to add, 0 to change, 5 to remove",
        ])


class TextTests(SynchronousTestCase):
    """The whole text."""

    def test_crowded(self) -> None:
        """More listeners than there are ports for them."""
        for last, expected in ((20001, []), (20000, [
            "Not served (1):",
            "  1 of 2 listeners for TCP/IPv4: port-range 20000-20000 has no more ports; widen it",
        ])):
            lines = list(PlanText(planner((20000, last)).plan(serviceMap(WEB), None)).lines())
            begins = next((n for n, line in enumerate(lines) if line.startswith("Not served (1)")), len(lines))
            self.assertEqual(lines[begins : begins + 2], expected)

    def test_everything(self) -> None:
        """Each part, sorted; ports that are not known are shown as such."""
        found = Ruleset({CLUSTER: LEFT.rules[CLUSTER]}, frozenset({Guard("IPv4", "TCP", 41000)}))
        sctp = servicePort(portName("sctp", protocol="SCTP"), frontends=[Frontend("ClusterIP", "10.96.0.11", 9)])
        plan = planner().plan(serviceMap(sctp, WEB), found)
        problems = [Problem("Service", "shop/b", "is bad"), Problem("Service", "shop/a", "is bad")]
        self.assertEqual(list(PlanText(plan, found).lines(problems, ["local: a.yaml: is no YAML"])), [
            "Problems (3):",
            "  local: a.yaml: is no YAML",
            "  Service shop/a: is bad",
            "  Service shop/b: is bad",
            "Listeners (2):",
            "  shop/web:http/TCP/IPv4/cluster: port 41000, where the rules lead now; 2 endpoints",
            "  shop/web:http/TCP/IPv4/local: any free port; 1 endpoint",
            "Rules (3):",
            "  10.96.0.11:9/SCTP reject",
            "  node:30080/TCP/IPv4 inside -> 192.0.2.7:41000, outside -> 192.0.2.7, any free port",
            "  10.96.0.10:80/TCP -> 192.0.2.7:41000",
            "Guarded ports (2):",
            "  41000/TCP/IPv4",
            "  any free port, for shop/web:http/TCP/IPv4/local",
            "ClusterIPs (2):",
            "  10.96.0.10",
            "  10.96.0.11",
            "Addresses:",
            "  pod networks: none",
            "  interfaces of pods: none",
            "  node ports at: 0.0.0.0/0, ::/0",
            "  service networks: none",
            "Not served (1):",
            "  shop/sctp:http/SCTP/IPv4: SCTP is not served in userspace mode; its clients are refused",
            "Different in the kernel (5):",
            "  + 10.96.0.11:9/SCTP reject",
            "  + node:30080/TCP/IPv4 inside -> 192.0.2.7:41000, outside -> 192.0.2.7, any free port",
            "  + guarded port any free port, for shop/web:http/TCP/IPv4/local",
            "  + ClusterIP 10.96.0.10",
            "  + ClusterIP 10.96.0.11",
            "5 to add, 0 to change, 0 to remove",
        ])

    def test_kernelUnknown(self) -> None:
        """Nothing found, and nothing that could be looked at."""
        plan = planner().plan(serviceMap(WEB), None)
        words = "The kernel has no rules of kproxy, or none that can be understood: all are written anew"
        lines = list(PlanText(plan).lines())
        self.assertIn(words, lines)
        self.assertEqual(lines[-1], "5 to add, 0 to change, 0 to remove")
        lines = list(PlanText(plan, None, "no right").lines())
        self.assertEqual(lines[-1], "Not compared with the kernel: no right")
        self.assertNotIn(words, lines)

    def test_kernelUnknownNothingWanted(self) -> None:
        """Where the kernel has nothing, and nothing is to be served, one thing is said of that."""
        lines = list(PlanText(planner().plan(serviceMap(), None)).lines())
        self.assertEqual(
            lines[-1],
            "The kernel has no rules of kproxy, or none that can be understood: a table without rules is written",
        )
        self.assertNotIn("nothing to do", lines)

    def test_cannotRender(self) -> None:
        """A service port whose rules cannot be made is named; the others are planned."""
        frontends = [Frontend("ClusterIP", "0.0.0.0", 80)]
        bad = servicePort(portName("bad"), frontends=frontends, cluster=[("10.1.0.1", 8080)])
        plan = planner().plan(serviceMap(bad, WEB), LEFT)
        self.assertEqual(set(plan.ruleset.rules), {CLUSTER, NODE})
        self.assertIn("the unspecified address", plan.notServed[bad.name])
