"""Tests of twisted_kproxy.core.resolve."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import member, service, slice_
from twisted_kproxy.core import wire
from twisted_kproxy.core.resolve import Resolved, concerns, resolve, serviceOf, slicesOf
from twisted_kproxy.core.topology import NodeFacts
from twisted_kproxy.core.values import ServicePort

NODE = NodeFacts("n0", "zone-a")
FIXTURES = Path(__file__).parent.parent / "fixtures" / "apiserver"


def one(it: Resolved) -> ServicePort:
    assert len(it.ports) == 1, it.ports
    return it.ports[0]


def places(port: ServicePort) -> list[tuple[str, str | None, int]]:
    return [(f.kind, f.address, f.port) for f in port.frontends]


def ends(port: ServicePort) -> list[str]:
    return [str(it) for it in port.cluster]


def reasons(it: Resolved) -> str:
    return "\n".join(problem.reason for problem in it.problems)


class ConcernsTests(SynchronousTestCase):
    """Which Services a service proxy serves."""

    def test_kinds(self) -> None:
        """Headless Services and ExternalName (even with a ClusterIP) are not ours."""
        self.assertTrue(concerns(service()))
        for it in (service(clusterIP="None"), service(clusterIP=""), service(clusterIP=None)):
            self.assertFalse(concerns(it))
        self.assertFalse(concerns(service(type="ExternalName")))

    def test_proxyName(self) -> None:
        """A Service labelled for another proxy is ignored, whatever the label says; ours is served (KEP-2447)."""
        mine = service(labels={wire.PROXY_NAME_LABEL: "mine"})
        self.assertFalse(concerns(mine))
        self.assertTrue(concerns(mine, "mine"))
        self.assertFalse(concerns(mine, "other"))
        self.assertFalse(concerns(service(), "mine"))
        self.assertFalse(concerns(service(labels={wire.PROXY_NAME_LABEL: ""})))

    def test_headlessLabel(self) -> None:
        """A Service that is labelled as headless is not served, whatever address it has."""
        self.assertFalse(concerns(service(labels={wire.HEADLESS_LABEL: ""})))
        self.assertFalse(concerns(service(labels={wire.HEADLESS_LABEL: "", wire.PROXY_NAME_LABEL: "mine"}), "mine"))

    def test_noSpec(self) -> None:
        """A Service without spec is nothing."""
        self.assertFalse(concerns(wire.Service(wire.ObjectMeta("a", "b"))))

    def test_slices(self) -> None:
        """A slice belongs to the Service that its label names; unlabelled and headless ones to none."""
        self.assertEqual(serviceOf(slice_()), ("shop", "web"))
        self.assertIsNone(serviceOf(slice_(of=None)))
        self.assertIsNone(serviceOf(slice_(labels={wire.HEADLESS_LABEL: ""})))


class FrontendTests(SynchronousTestCase):
    """What is captured."""

    def test_all(self) -> None:
        """ClusterIP, external IPs, load balancer addresses and node port, in this order."""
        it = service(
            type="LoadBalancer", externalIPs=["198.51.100.7"], ingress=[{"ip": "203.0.113.9", "ipMode": "VIP"}],
            ports=[{"name": "http", "port": 80, "nodePort": 30080}],
        )
        self.assertEqual(
            places(one(resolve(it, [], NODE))),
            [
                ("ClusterIP", "10.96.0.10", 80), ("ExternalIP", "198.51.100.7", 80),
                ("LoadBalancer", "203.0.113.9", 80), ("NodePort", None, 30080),
            ],
        )

    def test_dualStack(self) -> None:
        """Each family is a service port of its own, with the addresses of that family."""
        it = service(
            clusterIPs=["10.96.0.10", "fd00:96::10"], externalIPs=["2001:db8::7", "198.51.100.7"],
        )
        v4, v6 = resolve(it, [], NODE).ports
        self.assertEqual([p[1] for p in places(v4)], ["10.96.0.10", "198.51.100.7"])
        self.assertEqual([p[1] for p in places(v6)], ["fd00:96::10", "2001:db8::7"])

    def test_otherFamilyIgnored(self) -> None:
        """An external IP of a family without ClusterIP is not served."""
        self.assertEqual(len(places(one(resolve(service(externalIPs=["2001:db8::7"]), [], NODE)))), 1)

    def test_proxyModeIngress(self) -> None:
        """Load balancer addresses in mode Proxy, or with a hostname only, are not captured (KEP-1860)."""
        it = service(type="LoadBalancer", ingress=[{"ip": "203.0.113.9", "ipMode": "Proxy"}, {"hostname": "lb"}])
        self.assertEqual(len(places(one(resolve(it, [], NODE)))), 1)

    def test_badAddresses(self) -> None:
        """A bad external IP costs only itself."""
        it = service(externalIPs=["nonsense", "127.0.0.1", "198.51.100.007"])
        resolved = resolve(it, [], NODE)
        self.assertEqual([p[1] for p in places(one(resolved))], ["10.96.0.10", "198.51.100.7"])
        self.assertIn("'nonsense' is not an IP address", reasons(resolved))
        self.assertIn("127.0.0.1 is a loopback address", reasons(resolved))

    def test_manyProblems(self) -> None:
        """Thousands of bad addresses in one object are told in a few lines."""
        problems = resolve(service(externalIPs=[f"bad{n}" for n in range(10_000)]), [], NODE).problems
        self.assertEqual(len(problems), 21)
        self.assertIn("and 9980 more", problems[-1].reason)

    def test_repeatedAddress(self) -> None:
        """An address that is external IP and ingress IP is one frontend."""
        it = service(externalIPs=["203.0.113.9"], ingress=[{"ip": "203.0.113.9"}])
        self.assertEqual(len(places(one(resolve(it, [], NODE)))), 2)

    def test_policies(self) -> None:
        """Local policies choose the local pool; pods and node reach external addresses through the cluster pool."""
        it = service(
            internalTrafficPolicy="Local", externalTrafficPolicy="Local", externalIPs=["198.51.100.7"],
            ports=[{"port": 80, "nodePort": 30080}],
        )
        got = {f.kind: (f.pool, f.insidePool) for f in one(resolve(it, [], NODE)).frontends}
        external = ("local", "cluster")
        self.assertEqual(got, {"ClusterIP": ("local", "local"), "ExternalIP": external, "NodePort": external})

    def test_healthCheckPort(self) -> None:
        """Only a LoadBalancer with external policy Local has a health check port."""
        fields: dict[str, Any] = {"type": "LoadBalancer", "healthCheckNodePort": 32000}
        it = resolve(service(externalTrafficPolicy="Local", **fields), [], NODE)
        self.assertEqual(one(it).healthCheckPort, 32000)
        self.assertEqual(one(resolve(service(**fields), [], NODE)).healthCheckPort, 0)

    def test_healthCheckPortOnce(self) -> None:
        """The first port of each family has it for the whole Service; what is no port number is a problem."""
        spec: dict[str, Any] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}
        spec["clusterIPs"] = ["10.96.0.10", "fd00::10"]
        spec["ports"] = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
        found = resolve(service(**spec), [], NODE)
        self.assertEqual(
            {(it.name.port, it.name.family): it.healthCheckPort for it in found.ports},
            {("http", "IPv4"): 32000, ("dns", "IPv4"): 0, ("http", "IPv6"): 32000, ("dns", "IPv6"): 0},
        )
        spec["healthCheckNodePort"] = 70000
        found = resolve(service(**spec), [], NODE)
        self.assertEqual({it.healthCheckPort for it in found.ports}, {0})
        self.assertIn("healthCheckNodePort 70000", found.problems[0].reason)


class PortTests(SynchronousTestCase):
    """Port identity."""

    def test_sameNumberTwoProtocols(self) -> None:
        """DNS: one number, two protocols, two service ports."""
        it = service(ports=[{"name": "a", "port": 53, "protocol": "UDP"}, {"name": "b", "port": 53}])
        self.assertEqual([p.name.protocol for p in resolve(it, [], NODE).ports], ["UDP", "TCP"])

    def test_bad(self) -> None:
        """Bad ports are left out one by one."""
        it = service(
            ports=[
                {"name": "a", "port": 0}, {"name": "b", "port": 70000}, {"name": "c", "port": 80, "protocol": "tcp"},
                {"name": "d", "port": 81, "nodePort": 99999}, {"name": "e", "port": 81}, {"name": "d", "port": 82},
            ]
        )
        resolved = resolve(it, [], NODE)
        self.assertEqual([str(p.name) for p in resolved.ports], ["shop/web:d/TCP/IPv4"])
        self.assertEqual(len(resolved.problems), 6)

    def test_noPorts(self) -> None:
        """A Service without ports is nothing, and no fault."""
        self.assertEqual(resolve(service(ports=[]), [], NODE), Resolved())

    def test_affinity(self) -> None:
        """ClientIP affinity: default three hours, 1 to 86400 s; anything else falls back and is told."""
        def seconds(value: Any) -> tuple[int, bool]:
            config = {"clientIP": {"timeoutSeconds": value}}
            it = resolve(service(sessionAffinity="ClientIP", sessionAffinityConfig=config), [], NODE)
            return one(it).affinitySeconds, bool(it.problems)

        self.assertEqual([seconds(v) for v in (1, 86400, None)], [(1, False), (86400, False), (10800, False)])
        self.assertEqual([seconds(v) for v in (0, -1, 86401)], [(10800, True)] * 3)
        self.assertEqual(one(resolve(service(), [], NODE)).affinitySeconds, 0)


class EndpointTests(SynchronousTestCase):
    """From slices to endpoints."""

    def test_byName(self) -> None:
        """A slice port is matched by name and protocol; its number is the endpoint's."""
        ports = [
            {"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "http", "port": 9090, "protocol": "UDP"},
            {"name": "other", "port": 1, "protocol": "TCP"},
        ]
        it = resolve(service(), [slice_(member("10.1.0.1"), ports=ports)], NODE)
        self.assertEqual(ends(one(it)), ["10.1.0.1:8080"])

    def test_numbersPerSlice(self) -> None:
        """Pods that resolve a named port differently sit in different slices, each with its number."""
        other = slice_(member("10.1.0.2"), name="web-2", ports=[{"name": "http", "port": 9090}])
        it = resolve(service(), [slice_(member("10.1.0.1")), other], NODE)
        self.assertEqual(ends(one(it)), ["10.1.0.1:8080", "10.1.0.2:9090"])

    def test_portOddities(self) -> None:
        """Ports without name or number are skipped and told; an empty name is the unnamed port."""
        ports = [{"port": 1}, {"name": "", "port": None}, {"name": "", "port": 7}]
        it = resolve(service(ports=[{"port": 80}]), [slice_(member("10.1.0.1"), ports=ports)], NODE)
        self.assertEqual(ends(one(it)), ["10.1.0.1:7"])
        self.assertIn("without name", reasons(it))
        self.assertIn("no usable number", reasons(it))

    def test_addresses(self) -> None:
        """The first address counts, sloppily written ones too; none, bad and forbidden ones cost only themselves."""
        members = [
            {"addresses": ["10.1.0.01", "10.1.0.2"]}, {"addresses": []}, member("x"), member("127.0.0.1"),
            member("fd00::1"), member("169.254.169.254"),
        ]
        it = resolve(service(), [slice_(*members)], NODE)
        self.assertEqual(ends(one(it)), ["10.1.0.1:8080"])
        self.assertEqual(len(it.problems), 4)

    def test_conditionsAbsent(self) -> None:
        """Conditions that are not given mean ready, serving, not terminating."""
        self.assertEqual(ends(one(resolve(service(), [slice_({"addresses": ["10.1.0.1"]})], NODE))), ["10.1.0.1:8080"])

    def test_wrongType(self) -> None:
        """FQDN slices and slices of the other family give nothing."""
        for kind in ("FQDN", "IPv6", "Martian"):
            self.assertEqual(ends(one(resolve(service(), [slice_(member("10.1.0.1"), addressType=kind)], NODE))), [])

    def test_local(self) -> None:
        """Local is what names this node; what names none is remote. v1beta1 names it by a topology label."""
        it = slice_(
            member("10.1.0.1", nodeName="n0"), member("10.1.0.2"), member("10.1.0.3", nodeName="n1"),
            member("10.1.0.4", topology={"kubernetes.io/hostname": "n0"}),
        )
        local = one(resolve(service(), [it], NODE)).local
        self.assertEqual([str(e) for e in local], ["10.1.0.1:8080", "10.1.0.4:8080"])

    def test_duplicate(self) -> None:
        """A running pod beats a terminating one with the same address, in whichever slice it is."""
        running = member("10.1.0.1", nodeName="n0")
        leaving = member("10.1.0.1", ready=False, serving=True, terminating=True)
        for first, second in ((running, leaving), (leaving, running)):
            slices = [slice_(first), slice_(second, name="web-2")]
            port = one(resolve(service(), slices, NODE))
            self.assertEqual([(str(e), e.isLocal) for e in port.cluster], [("10.1.0.1:8080", True)])

    def test_legacyEndpoints(self) -> None:
        """Endpoints objects mean the same as slices: families apart, not-ready addresses not used."""
        it = wire.convert(
            "Endpoints",
            {
                "metadata": {"name": "web", "namespace": "shop"},
                "subsets": [
                    {
                        "addresses": [{"ip": "10.1.0.1", "nodeName": "n0"}, {"ip": "fd00::1"}],
                        "notReadyAddresses": [{"ip": "10.1.0.2"}],
                        "ports": [{"name": "http", "port": 8080}],
                    }
                ],
            },
        )
        both = service(clusterIPs=["10.96.0.10", "fd00:96::10"])
        ports = resolve(both, slicesOf(it), NODE).ports
        self.assertEqual([ends(port) for port in ports], [["10.1.0.1:8080"], ["[fd00::1]:8080"]])


class OrderTests(SynchronousTestCase):
    """The result does not depend on the order in which slices are given."""

    @given(st.randoms(use_true_random=False))
    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    def test_order(self, rng: random.Random) -> None:
        """Any order of slices, duplicates among them, gives equal ports."""
        slices = [
            slice_(
                *(
                    member(f"10.1.0.{rng.randrange(4)}", ready=rng.random() < 0.5, terminating=rng.random() < 0.5)
                    for _ in range(3)
                ),
                name=f"web-{number}",
            )
            for number in range(4)
        ]
        expected = resolve(service(), slices, NODE).ports
        rng.shuffle(slices)
        self.assertEqual(resolve(service(), slices, NODE).ports, expected)


class RecordingTests(SynchronousTestCase):
    """Objects as real API servers gave them."""

    def load(self, version: str) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        path = FIXTURES / version / "manifests" / "all-list.yaml"
        for it in yaml.load(path.read_text(), Loader=_Strings)["items"]:
            found.setdefault(it["kind"], []).append(it)
        return found

    def test_everyServiceResolves(self) -> None:
        """Each recorded Service that has a ClusterIP gives a port per port and family, with no problem of its own."""
        for version in ("v1.36", "v1.20"):
            objects = self.load(version)
            for data in objects["Service"]:
                it = wire.convert("Service", data)
                if not concerns(it):
                    continue
                slices = [
                    s for s in (wire.convert("EndpointSlice", d) for d in objects.get("EndpointSlice", []))
                    if serviceOf(s) == (it.metadata.namespace, it.metadata.name)
                ]
                resolved = resolve(it, slices, NodeFacts("node-a", "zone-1"))
                spec = data["spec"]
                self.assertEqual(len(resolved.ports), len(spec["ports"]) * len(spec["clusterIPs"]), it.metadata.name)
                self.assertEqual([p for p in resolved.problems if p.kind == "Service"], [])

    def test_namedTargetPort(self) -> None:
        """The dual-stack Service shop/web of the recording: two ports, both families, numbers that differ by slice."""
        objects = self.load("v1.36")
        it = next(
            wire.convert("Service", d) for d in objects["Service"]
            if (d["metadata"]["namespace"], d["metadata"]["name"]) == ("shop", "web")
        )
        slices = [
            s for s in (wire.convert("EndpointSlice", d) for d in objects["EndpointSlice"])
            if serviceOf(s) == ("shop", "web")
        ]
        ports = {str(p.name): ends(p) for p in resolve(it, slices, NodeFacts("node-a", "zone-1")).ports}
        self.assertEqual(
            ports["shop/web:http/TCP/IPv6"],
            ["[fd00:128:0:1::20]:8080", "[fd00:128:0:2::20]:9080", "[fd00:128::20]:8080"],
        )
        self.assertEqual(len(ports), 4)


class _Strings(yaml.SafeLoader):
    """Timestamps stay text, as in JSON."""


_Strings.yaml_implicit_resolvers = {
    key: [(tag, expression) for tag, expression in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
