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
from twisted_kproxy.core.resolve import Resolved, concerns, passedOver, resolve, serviceOf, slicesOf
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

    def test_passedOver(self) -> None:
        """Only who forgot the address is told so; a Service of another proxy is none of ours."""
        told = "\n".join(it.reason for it in passedOver(service(clusterIP=None)).problems)
        self.assertIn("write an address of the service network, or None", told)
        for it in (
            service(clusterIP="None"), service(clusterIP=None, clusterIPs=["None"]),
            service(type="ExternalName", clusterIP=None), service(clusterIP="", labels={wire.HEADLESS_LABEL: ""}),
            service(clusterIP="", labels={wire.PROXY_NAME_LABEL: "mine"}),
        ):
            self.assertEqual(passedOver(it), Resolved())

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


class SourceRangeTests(SynchronousTestCase):
    """Who may reach addresses of load balancers (kubernetes pkg/proxy/serviceport.go, nftables/proxier.go)."""

    V4, V6 = "203.0.113.9", "2001:db8::9"
    NODE = NodeFacts("n0", addresses=frozenset({"192.0.2.7", "2001:db8:1::7"}))

    def sources(self, *ranges: str, node: NodeFacts = NODE, **fields: Any) -> list[Any]:
        """What is said of the IPv4 and the IPv6 address."""
        it = service(
            clusterIPs=["10.96.0.10", "fd00:96::10"], loadBalancerSourceRanges=list(ranges),
            ingress=[{"ip": self.V4}, {"ip": self.V6}], ports=[{"port": 80, "nodePort": 30080}], **fields,
        )
        self.resolved = resolve(it, [], node)
        found = []
        for port in self.resolved.ports:
            kinds = {f.kind: f.sources for f in port.frontends}
            found.append(kinds["LoadBalancer"])
            self.assertEqual((kinds["ClusterIP"], kinds["NodePort"], kinds.get("ExternalIP")), (None, None, None))
        return found

    def test_none(self) -> None:
        """Without a range everybody is let in; blanks are no range."""
        self.assertEqual(self.sources(), [None, None])
        self.assertEqual(self.sources("", "  "), [None, None])
        self.assertEqual(one(resolve(service(ingress=[{"ip": self.V4}]), [], NODE)).frontends[-1].sources, None)

    def test_perFamily(self) -> None:
        """Ranges restrict their own family; the other is open to all."""
        self.assertEqual(self.sources("10.0.0.0/8"), [("10.0.0.0/8",), None])
        self.assertEqual(self.sources("fd00::/8"), [None, ("fd00::/8",)])
        self.assertEqual(self.sources("fd00::/8", "10.0.0.0/8"), [("10.0.0.0/8",), ("fd00::/8",)])

    def test_sloppy(self) -> None:
        """Blanks around, leading zeros and bits after the prefix are tolerated, as Kubernetes does."""
        self.assertEqual(self.sources(" 10.1.2.3/8 ", "192.168.001.0/24")[0], ("10.0.0.0/8", "192.168.1.0/24"))
        self.assertEqual(self.resolved.problems, ())

    def test_joined(self) -> None:
        """They come in one form, whatever their order and overlaps."""
        ranges = ["172.16.0.0/12", "10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16"]
        self.assertEqual(self.sources(*ranges)[0], ("10.0.0.0/8", "172.16.0.0/12"))
        self.assertEqual(self.sources(*ranges[::-1])[0], ("10.0.0.0/8", "172.16.0.0/12"))

    def test_everybody(self) -> None:
        """A range of everything is no restriction of its family."""
        self.assertEqual(self.sources("10.0.0.0/8", "0.0.0.0/0"), [None, None])
        self.assertEqual(self.sources("::/0", "10.0.0.0/8"), [("10.0.0.0/8",), None])
        self.assertEqual(self.sources("0.0.0.0/1", "128.0.0.0/1"), [None, None])

    def test_unreadable(self) -> None:
        """A slip opens nothing: where no range of a family can be read, nobody of it is let in."""
        self.assertEqual(self.sources("10.0.0.0/33"), [(), None])
        self.assertIn("'10.0.0.0/33' is not a network: the prefix is too long; it lets nobody", reasons(self.resolved))
        self.assertEqual(self.sources("10.0.0.0"), [(), None])
        self.assertEqual(self.sources("fd00::x/8"), [None, ()])
        self.assertEqual(self.sources("everybody"), [(), ()])
        self.assertEqual(self.sources("10.0.0.0/8", "10.0.0/8"), [("10.0.0.0/8",), None])
        self.assertEqual(self.sources("fd00::/8", "10.0.0/8"), [(), ("fd00::/8",)])
        self.assertEqual(len(self.resolved.problems), 1)

    def test_node(self) -> None:
        """Where the node may come in, so may what it sends to the address itself: that may come from there."""
        self.assertEqual(self.sources("192.0.2.0/24"), [("192.0.2.0/24", "203.0.113.9/32"), None])
        self.assertEqual(self.sources("2001:db8:1::/48"), [None, ("2001:db8::9/128", "2001:db8:1::/48")])
        self.assertEqual(self.sources("192.0.2.0/24", node=NODE), [("192.0.2.0/24",), None])
        self.assertEqual(self.sources("192.0.2.8/32"), [("192.0.2.8/32",), None])

    def test_onlyBalancers(self) -> None:
        """External IPs are not restricted, unless they are addresses of the load balancer as well."""
        it = service(
            externalIPs=["198.51.100.7", self.V4], ingress=[{"ip": self.V4}], loadBalancerSourceRanges=["10.0.0.0/8"]
        )
        found = {f.address: f.sources for f in one(resolve(it, [], NODE)).frontends}
        self.assertEqual(found, {"10.96.0.10": None, "198.51.100.7": None, self.V4: ("10.0.0.0/8",)})


class RefusedFrontendTests(SynchronousTestCase):
    """Addresses from which nobody may be led away (CVE-2020-8554)."""

    API = frozenset({("192.0.2.1", 6443), ("192.0.2.7", 6443), ("2001:db8::1", 6443)})
    NODE = NodeFacts("n0", addresses=frozenset({"192.0.2.7"}), servers=API)

    def served(self, it: Any, node: NodeFacts = NODE) -> list[str]:
        self.resolved = resolve(it, [], node)
        return [str(port.key(f)) for port in self.resolved.ports for f in port.frontends]

    def refused(self, *addresses: str, field: str = "externalIPs", **node: Any) -> list[str]:
        """The reasons why none of these is served."""
        more: dict[str, Any] = {"externalIPs": list(addresses)}
        if field != "externalIPs":
            more = {"ingress": [{"ip": it} for it in addresses]}
        facts = NodeFacts("n0", **node) if node else self.NODE
        self.assertEqual(self.served(service(**more), facts), ["10.96.0.10:80/TCP"])
        self.assertEqual(self.resolved.refusedFrontends, len(addresses))
        self.assertTrue(all(it.refused for it in self.resolved.problems))
        return [it.reason for it in self.resolved.problems]

    def test_unusable(self) -> None:
        """Loopback, link-local, multicast, unspecified and broadcast, of either family and in whichever spelling."""
        for address, why in (
            ("127.0.0.1", "loopback"), ("127.000.0.002", "loopback"), ("169.254.169.254", "link-local"),
            ("224.0.0.1", "multicast"), ("239.255.255.250", "multicast"), ("0.0.0.0", "unspecified"),
            ("255.255.255.255", "broadcast"), ("::1", "loopback"), ("fe80::1", "link-local"), ("ff02::1", "multicast"),
            ("::", "unspecified"), ("::ffff:127.0.0.1", "loopback"), ("::ffff:169.254.169.254", "link-local"),
        ):  # fmt: skip
            for field in ("externalIPs", "status.loadBalancer.ingress"):
                (reason,) = self.refused(address, field=field)
                self.assertTrue(reason.startswith(f"{field}: "), reason)
                article = "an" if why == "unspecified" else "a"
                self.assertIn(f" is {article} {why} address; it is not served", reason)

    def test_ordinary(self) -> None:
        """What lies beside these is served."""
        near = ["126.255.255.255", "128.0.0.1", "169.253.0.1", "169.255.0.1", "223.255.255.255", "1.0.0.1"]
        self.assertEqual(len(self.served(service(externalIPs=near))), 7)

    def test_clusterIP(self) -> None:
        """A ClusterIP of that kind costs its family: the other one is served."""
        for address in ("127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "192.0.2.7"):
            it = service(clusterIP=address, clusterIPs=[address, "fd00:96::10"], externalIPs=["198.51.100.7"])
            self.assertEqual(self.served(it), ["[fd00:96::10]:80/TCP"])
            self.assertEqual(self.resolved.refusedFrontends, 1)
        self.assertIn("192.0.2.7 is an address of this node", reasons(self.resolved))

    def test_nodesOwn(self) -> None:
        """An address of the node may be an external IP: only the Service's ports of it are taken."""
        self.assertIn("192.0.2.7:80/TCP", self.served(service(externalIPs=["192.0.2.7"])))

    def test_server(self) -> None:
        """Where an API server is reached stays its own: address and port, for TCP."""
        ports = [
            {"name": "a", "port": 6443}, {"name": "b", "port": 443}, {"name": "c", "port": 6443, "protocol": "UDP"},
        ]  # fmt: skip
        self.assertEqual(
            self.served(service(externalIPs=["192.0.2.1"], ports=ports)),
            ["10.96.0.10:6443/TCP", "10.96.0.10:443/TCP", "192.0.2.1:443/TCP", "10.96.0.10:6443/UDP",
             "192.0.2.1:6443/UDP"],
        )  # fmt: skip
        self.assertEqual(reasons(self.resolved), "192.0.2.1:6443 is where the API server is reached; it is not served")
        self.assertEqual(self.resolved.refusedFrontends, 1)
        it = service(ingress=[{"ip": "192.0.2.1"}], ports=[{"port": 6443}])
        self.assertEqual(self.served(it), ["10.96.0.10:6443/TCP"])

    def test_serverBehindClusterIP(self) -> None:
        """The ClusterIP by which the API server is reached is served: that leads there."""
        facts = NodeFacts("n0", servers=frozenset({("10.96.0.1", 443)}))
        it = service(clusterIP="10.96.0.1", ports=[{"port": 443}])
        self.assertEqual(self.served(it, facts), ["10.96.0.1:443/TCP"])

    def test_serversNodePort(self) -> None:
        """On a node where an API server runs its port is no node port; elsewhere it may be."""
        it = service(ports=[{"port": 80, "nodePort": 6443}])
        self.assertEqual(self.served(it), ["10.96.0.10:80/TCP"])
        self.assertIn("nodePort 6443 is where the API server on this node is reached", reasons(self.resolved))
        self.assertEqual(self.resolved.refusedFrontends, 1)
        elsewhere = NodeFacts("n1", addresses=frozenset({"192.0.2.8"}), servers=self.API)
        self.assertEqual(self.served(it, elsewhere), ["10.96.0.10:80/TCP", "node:6443/TCP"])
        udp = service(ports=[{"port": 80, "nodePort": 6443, "protocol": "UDP"}])
        self.assertIn("node:6443/UDP", self.served(udp))

    def test_ownNodePort(self) -> None:
        """Where this proxy itself answers is no node port; for UDP it may be."""
        facts = NodeFacts("n0", taken=frozenset({10256}))
        ports = [{"name": "a", "port": 80, "nodePort": 10256}, {"name": "b", "port": 81, "nodePort": 10257}]
        self.assertEqual(
            self.served(service(ports=ports), facts), ["10.96.0.10:80/TCP", "10.96.0.10:81/TCP", "node:10257/TCP"]
        )
        self.assertEqual(
            reasons(self.resolved), "nodePort 10256 is where kproxy itself answers; it is not served"
        )
        self.assertEqual(self.resolved.refusedFrontends, 1)
        udp = service(ports=[{"port": 80, "nodePort": 10256, "protocol": "UDP"}])
        self.assertIn("node:10256/UDP", self.served(udp, facts))

    def test_denied(self) -> None:
        """Networks of frontend-deny; a ClusterIP is none of its business."""
        (reason,) = self.refused("198.51.100.7", denied=("198.51.100.0/24", "10.0.0.0/8"))
        self.assertEqual(reason, "externalIPs: 198.51.100.7 is in a network that frontend-deny names; it is not served")
        self.refused("198.51.100.7", field="ingress", denied=("198.51.100.0/24",))

    def test_allowed(self) -> None:
        """Only networks of frontend-allow, where it names any; what is denied as well is denied."""
        (reason,) = self.refused("203.0.113.9", allowed=("198.51.100.0/24",))
        self.assertIn("203.0.113.9 is in none of the networks that frontend-allow names", reason)
        facts = NodeFacts("n0", allowed=("198.51.100.0/24", "2001:db8::/32"), denied=("198.51.100.7/32",))
        it = service(clusterIPs=["10.96.0.10", "fd00::1"], externalIPs=["198.51.100.7", "198.51.100.8", "2001:db8::1"])
        self.assertEqual(
            self.served(it, facts),
            ["10.96.0.10:80/TCP", "198.51.100.8:80/TCP", "[fd00::1]:80/TCP", "[2001:db8::1]:80/TCP"],
        )

    def test_countedOnce(self) -> None:
        """An address that is named twice, or under several ports, is one."""
        ports = [{"name": n, "port": p} for n, p in (("a", 80), ("b", 81))]
        it = service(externalIPs=["127.0.0.1", "127.0.0.1"], ingress=[{"ip": "127.0.0.1"}], ports=ports)
        self.served(it)
        self.assertEqual(self.resolved.refusedFrontends, 1)


class RefusedEndpointTests(SynchronousTestCase):
    """Endpoints that would lead to the node itself, or to everybody on the link (CVE-2021-25737)."""

    def test_oneByOne(self) -> None:
        """Each costs only itself, is told with its slice, and is counted once however many ports there are."""
        bad = {
            "127.0.0.1": "a loopback", "169.254.169.254": "a link-local", "224.0.0.251": "a multicast",
            "0.0.0.0": "an unspecified", "255.255.255.255": "a broadcast", "::ffff:10.1.0.9": "an IPv4-mapped",
        }  # fmt: skip
        ports = [{"name": n, "port": p} for n, p in (("a", 80), ("b", 81))]
        given = slice_(*map(member, bad), member("10.1.0.1"), ports=ports)
        it = resolve(service(ports=ports), [given], NODE)
        self.assertEqual([ends(port) for port in it.ports], [["10.1.0.1:80"], ["10.1.0.1:81"]])
        self.assertEqual(it.refusedEndpoints, len(bad))
        for (address, why), problem in zip(bad.items(), it.problems, strict=True):
            self.assertEqual(problem.reason, f"endpoint {address} is {why} address; it is not used")
            self.assertEqual((problem.kind, problem.key, problem.refused), ("EndpointSlice", "shop/web-1", True))

    def test_six(self) -> None:
        """The same for IPv6."""
        members = [member(it) for it in ("::1", "fe80::1", "ff02::1", "::", "fd00::1")]
        it = resolve(service(clusterIPs=["fd00:96::10"]), [slice_(*members, addressType="IPv6")], NODE)
        self.assertEqual(ends(one(it)), ["[fd00::1]:8080"])
        self.assertEqual((it.refusedEndpoints, len(it.problems)), (4, 4))

    def test_otherFamily(self) -> None:
        """One of the other family is a slip, not refused."""
        it = resolve(service(), [slice_(member("fd00::1"))], NODE)
        self.assertIn("endpoint fd00::1 is not an IPv4 address; it is not used", reasons(it))
        self.assertEqual((it.refusedEndpoints, it.problems[0].refused), (0, False))

    def test_many(self) -> None:
        """Beyond the first few they are only counted, each once."""
        ports = [{"name": n, "port": p} for n, p in (("a", 80), ("b", 81))]
        given = slice_(*(member(f"127.0.0.{n}") for n in range(1, 101)), ports=ports)
        it = resolve(service(ports=ports), [given], NODE)
        self.assertEqual(it.refusedEndpoints, 100)
        self.assertIn("and 80 more", it.problems[-1].reason)


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
