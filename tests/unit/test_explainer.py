"""Tests of twisted_kproxy.explainer, through the page ``/explain``."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import member, portName, service, slice_
from tests.unit.test_status import Answer, Client
from twisted_kproxy.balance.balancer import LoadBalancer
from twisted_kproxy.balance.policies import RoundRobin
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core import wire
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.locality import NodeSettings
from twisted_kproxy.core.values import Change, PoolName, Rejected, Replaced, ServiceMap
from twisted_kproxy.explainer import Explainer
from twisted_kproxy.web.site import makeSite
from twisted_kproxy.web.status import explainPage, tree

NODE, POD, OUTSIDE = "192.0.2.7", "10.244.0.5", "203.0.113.9"
SETTINGS = NodeSettings(clusterCIDRs=("10.244.0.0/16",), denied=("203.0.113.0/24",))


class ExplainTests(SynchronousTestCase):
    """What an operator is told who asks where a request goes."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.cluster = Cluster("n0", settings=SETTINGS)
        self.cluster.hostAddresses([NODE])
        self.cluster.expect("local", ("Service", "EndpointSlice"))
        self.cluster.say(Replaced("local", "Service", {}))
        self.cluster.say(Replaced("local", "EndpointSlice", {}))
        self.balancer = LoadBalancer(self.clock, RoundRobin)
        self.applied: ServiceMap | None = ServiceMap()
        self.unserved: dict[str, str] = {}
        self.failing: dict[str, Any] = {}
        self.site = makeSite(self.clock, tree(explainPage(lambda question: self.explainer().answer(question))))
        self.site.doStart()
        self.addCleanup(self.site.doStop)
        self.userspace = True
        self.stopping: dict[str, bool] = {}

    def explainer(self) -> Explainer:
        return Explainer(
            self.cluster,
            applied=lambda: self.applied,
            sync=lambda: {"inForce": self.applied is self.cluster.latest, **self.stopping},
            boundTo=self.balancer.boundTo,
            failing=lambda port, endpoints: {k: v for k, v in self.failing.items() if k in map(str, endpoints)},
            unserved=lambda: self.unserved,
            addresses=lambda: [NODE, "127.0.0.1"],
            sourceTowards=lambda address: NODE,
            userspace=self.userspace,
        )

    def put(self, *objects: Any) -> None:
        for it in objects:
            kind: Any = type(it).__name__
            self.cluster.say(Change("local", kind, wire.keyOf(it.metadata), it))
        self.cluster.current()

    def apply(self) -> None:
        """What is known is in force."""
        before = self.applied or ServiceMap()
        self.applied = self.cluster.current()
        self.balancer.onUpdate(Update(before, self.applied))

    def shop(self, **spec: Any) -> None:
        """A Service with an endpoint here, one elsewhere, and one that is not ready."""
        self.put(
            service(**spec),
            slice_(
                member("10.244.0.9", nodeName="n0"), member("10.244.3.4", nodeName="n3"),
                member("10.244.3.5", nodeName="n3", ready=False),
            ),
        )
        self.apply()

    def request(self, query: str) -> Answer:
        client = Client(self.site)
        self.addCleanup(client.lost)
        return client.ask(f"/explain{query}")

    def ask(self, query: str) -> Any:
        answer = self.request(query)
        self.assertEqual(answer.code, 200, answer.body)
        return answer.json()

    def test_stopping(self) -> None:
        """While the daemon stops, nothing of what would hold does; what it never served is none of its business."""
        self.shop()
        self.stopping = {"stopping": True}
        for query in (f"?from={POD}&to=10.96.0.10:80", "?service=shop/web"):
            found = self.ask(query)
            for it in (*found["answers"], *found["servicePorts"]):
                self.assertEqual(it["notServed"], "kproxy is stopping")
            self.assertEqual({it["inForce"] for it in found["answers"]}, {False})
            self.assertTrue(found["sync"]["stopping"])
        (answer,) = self.ask(f"?from={POD}&to=8.8.8.8:80")["answers"]
        self.assertEqual((answer.get("notServed"), answer["inForce"]), (None, True))

    def test_unreadable(self) -> None:
        """A Service that a source has, and that cannot be read, is not one that nobody has."""
        self.cluster.say(Rejected("local", "Service", "shop/bad", "it has no spec"))
        found = self.ask("?service=shop/bad")
        self.assertEqual(found["notServed"], "source local has it, but it cannot be read: it has no spec")

    def test_clusterIP(self) -> None:
        """The whole answer for one client."""
        self.shop(sessionAffinity="ClientIP")
        self.failing["10.244.3.4:8080"] = {"failures": 2, "reason": "refused", "secondsAgo": 1.0}
        found = self.ask(f"?from={POD}&to=10.96.0.10:80/tcp")
        ready, unready = (
            {"ready": it, "serving": True, "terminating": False} for it in (True, False)
        )
        self.assertEqual(found, {
            "to": "10.96.0.10:80/TCP",
            "answers": [{
                "from": POD,
                "inside": True,
                "whyInside": "10.244.0.5 is in 10.244.0.0/16, a pod network",
                "hit": "service",
                "servicePort": "shop/web:http/TCP/IPv4",
                "verdict": "endpoints",
                "why": "any endpoint may serve it",
                "frontend": {"kind": "ClusterIP", "address": "10.96.0.10:80/TCP"},
                "pool": "cluster",
                "source": "endpoints see an address of this node, which dials them itself",
                "affinity": {"seconds": 10800, "boundTo": None},
                "inForce": True,
            }],
            "servicePorts": [{
                "servicePort": "shop/web:http/TCP/IPv4",
                "frontends": [{"kind": "ClusterIP", "address": "10.96.0.10:80/TCP"}],
                "pools": {"cluster": {
                    "endpoints": [
                        {"endpoint": "10.244.0.9:8080", "slice": "shop/web-1", "node": "n0", "conditions": ready,
                         "sees": NODE},
                        {"endpoint": "10.244.3.4:8080", "slice": "shop/web-1", "node": "n3", "conditions": ready,
                         "sees": NODE, "failing": {"failures": 2, "reason": "refused", "secondsAgo": 1.0}},
                    ],
                    "leftOut": [
                        {"endpoint": "10.244.3.5:8080", "slice": "shop/web-1", "node": "n3", "conditions": unready,
                         "why": "not ready"},
                    ],
                }},
                "notes": [],
            }],
            "sync": {"inForce": True},
        })

    def test_affinity(self) -> None:
        """Where the client is bound is told, and asking binds nobody and keeps nobody bound."""
        self.shop(sessionAffinity="ClientIP")
        pool = PoolName(portName(), "cluster")
        bound = self.balancer.nextEndpoint(pool, POD)
        self.clock.advance(10000)
        for client, expected in ((POD, str(bound)), ("10.244.0.6", None)):
            [answer] = self.ask(f"?from={client}&to=10.96.0.10:80")["answers"]
            self.assertEqual(answer["affinity"], {"seconds": 10800, "boundTo": expected})
        self.clock.advance(800)
        [answer] = self.ask(f"?from={POD}&to=10.96.0.10:80")["answers"]
        self.assertEqual(answer["affinity"]["boundTo"], None)

    def test_insideAndOutside(self) -> None:
        """Without a client both are answered, with the pools of both."""
        self.shop(externalIPs=["198.51.100.1"], externalTrafficPolicy="Local")
        found = self.ask("?to=198.51.100.1:80")
        said = [(it["from"], it["inside"], it["pool"], it["verdict"]) for it in found["answers"]]
        self.assertEqual(said, [("inside", True, "cluster", "endpoints"), ("outside", False, "local", "endpoints")])
        left = {it["endpoint"]: it["why"] for it in found["servicePorts"][0]["pools"]["local"]["leftOut"]}
        self.assertEqual(left, {
            "10.244.3.4:8080": "not on this node, but on n3", "10.244.3.5:8080": "not on this node, but on n3",
        })
        self.assertIn("cluster", found["servicePorts"][0]["pools"])

    def test_sourceRanges(self) -> None:
        """Who is let in is told; and whoever is not meets no pool."""
        self.shop(
            type="LoadBalancer", ingress=[{"ip": "198.51.100.2"}], loadBalancerSourceRanges=["198.51.100.0/24"],
        )
        [answer] = self.ask(f"?from={OUTSIDE}&to=198.51.100.2:80")["answers"]
        self.assertEqual((answer["verdict"], answer["pool"], answer["onlyFrom"]), ("drop", None, ["198.51.100.0/24"]))
        self.assertEqual(answer["why"], "203.0.113.9 is in none of loadBalancerSourceRanges")
        verdicts = [it["verdict"] for it in self.ask("?to=198.51.100.2:80")["answers"]]
        self.assertEqual(verdicts, ["endpoints", "endpoints"])

    def test_notInForce(self) -> None:
        """A Service that is known, and not in force yet."""
        self.shop()
        self.put(service(name="new", clusterIP="10.96.0.11"))
        found = self.ask(f"?from={POD}&to=10.96.0.11:80")
        self.assertEqual((found["answers"][0]["inForce"], found["sync"]["inForce"]), (False, False))
        self.assertTrue(self.ask(f"?from={POD}&to=10.96.0.10:80")["answers"][0]["inForce"])
        self.applied = None
        self.assertFalse(self.ask(f"?from={POD}&to=10.96.0.10:80")["answers"][0]["inForce"])

    def test_noSuchPort(self) -> None:
        """Other ports of a ClusterIP are refused, and strange addresses left alone."""
        self.shop()
        said = [
            (found["hit"], found["verdict"], found["servicePort"])
            for to in ("10.96.0.10:81", "198.51.100.99:80")
            for found in self.ask(f"?from={POD}&to={to}")["answers"]
        ]
        self.assertEqual(said, [("no such port", "reject", None), ("none", "untouched", None)])

    def test_claimedTwice(self) -> None:
        """Of an address that two Services claim it is told who has it and who waits, from both sides."""
        self.put(
            service(name="old", clusterIP="10.96.0.20", externalIPs=["198.51.100.1"], created="2026-01-01T00:00:00Z"),
            service(name="new", clusterIP="10.96.0.21", externalIPs=["198.51.100.1"], created="2026-02-01T00:00:00Z"),
        )
        self.apply()
        found = self.ask("?to=198.51.100.1:80")
        self.assertEqual(found["answers"][0]["servicePort"], "shop/old:http/TCP/IPv4")
        self.assertEqual(found["alsoClaimedBy"], ["shop/new:http/TCP/IPv4"])
        [port] = self.ask("?service=shop/new:http")["servicePorts"]
        self.assertEqual(port["waitsFor"], {"198.51.100.1:80/TCP": "shop/old:http/TCP/IPv4"})
        self.assertEqual([it["address"] for it in port["frontends"]], ["10.96.0.21:80/TCP"])

    def test_refusedAddress(self) -> None:
        """An address that must not be served: whose it was to be, and why not."""
        self.shop(externalIPs=["203.0.113.80"])
        found = self.ask("?to=203.0.113.80:80")
        self.assertEqual(found["answers"][0]["verdict"], "untouched")
        self.assertEqual(found["refused"], [{
            "kind": "Service", "key": "shop/web",
            "reason": "externalIPs: 203.0.113.80 is in a network that frontend-deny names; it is not served",
        }])
        self.assertNotIn("refused", self.ask("?to=203.0.113.8:80"))

    def test_dataplaneCannot(self) -> None:
        """What the dataplane does not serve is told, with its reason."""
        self.shop()
        self.apply()
        self.assertTrue(self.ask("?to=10.96.0.10:80")["answers"][0]["inForce"])
        self.unserved = {str(portName()): "no socket"}
        found = self.ask("?to=10.96.0.10:80")
        self.assertFalse(found["answers"][0]["inForce"])
        self.assertEqual(found["answers"][0]["notServed"], "no socket")
        self.assertEqual(found["servicePorts"][0]["notServed"], "no socket")

    def test_kernel(self) -> None:
        """Where the kernel leads clients, it is told whose address is rewritten, and why."""
        self.shop(externalIPs=["198.51.100.1"])
        self.userspace = False
        for source, to, words in (
            (POD, "10.96.0.10:80", "kept"),
            (OUTSIDE, "10.96.0.10:80", "endpoints see an address of this node: the client is no pod"),
            (POD, "198.51.100.1:80", "endpoints see an address of this node: "
             "the traffic policy is Cluster, so that the endpoint may be elsewhere"),
            ("10.244.0.9", "10.96.0.10:80", "kept; where the client is led to itself (10.244.0.9:8080) it sees an "
             "address of this node"),
        ):
            found = self.ask(f"?from={source}&to={to}")
            self.assertEqual(found["answers"][0]["source"], words)
            self.assertNotIn("sees", found["servicePorts"][0]["pools"]["cluster"]["endpoints"][0])

    def test_service(self) -> None:
        """By name: every frontend of every port that is meant, in both families unless the client is of one."""
        self.put(service(
            type="NodePort", clusterIPs=["10.96.0.10", "fd00::10"],
            ports=[{"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        ))
        self.apply()

        def said(query: str) -> list[tuple[str, str]]:
            found = self.ask(query)
            self.assertEqual(
                {it["servicePort"] for it in found["answers"]}, {it["servicePort"] for it in found["servicePorts"]}
            )
            return [(it["frontend"]["address"], it["from"]) for it in found["answers"]]

        self.assertEqual(said(f"?service=shop/web:http&from={POD}"), [
            ("10.96.0.10:80/TCP", POD), ("node:30080/TCP", POD),
        ])
        self.assertEqual(said(f"?service=shop/web:30080&from={POD}"), said(f"?service=shop/web:80&from={POD}"))
        self.assertEqual(said("?service=shop/web:dns"), [
            ("10.96.0.10:53/UDP", "inside"), ("10.96.0.10:53/UDP", "outside"),
            ("[fd00::10]:53/UDP", "inside"), ("[fd00::10]:53/UDP", "outside"),
        ])
        self.assertEqual(len(self.ask("?service=shop/web")["servicePorts"]), 4)
        self.assertEqual(len(self.ask("?service=shop/web:53/udp")["servicePorts"]), 2)

    def test_serviceNotServed(self) -> None:
        """A Service that means nothing here, and why."""
        self.put(
            service(), service(name="head", clusterIP="None"), service(name="ext", type="ExternalName"),
            service(name="other", labels={wire.PROXY_NAME_LABEL: "cilium"}), service(name="void", ports=[]),
        )
        self.cluster.say(Rejected("local", "Service", "shop/Bad_Name", "metadata.name 'Bad_Name' is odd"))
        for name, words in (
            ("shop/none", "no source has it"),
            ("shop/head", "it is headless: without a ClusterIP there is nothing to serve"),
            ("shop/ext", "its type is ExternalName, which is a matter of DNS"),
            ("shop/other", f"its label {wire.PROXY_NAME_LABEL} says 'cilium', proxy-name of this one ''"),
            ("shop/void", "it has no ports"),
            ("shop/Bad_Name:http", "source local has it, but it cannot be read: metadata.name 'Bad_Name' is odd"),
            ("shop/web:https", "it has no such port; it has http/TCP/IPv4"),
        ):
            found = self.ask(f"?service={name}")
            self.assertEqual((found["notServed"], found["answers"], found["servicePorts"]), (words, [], []))

    def test_serviceNotServedProblems(self) -> None:
        """Of a Service of which nothing is served, what is wrong with it and its slices is told all the same."""
        self.put(
            service(name="mine", clusterIP=NODE), slice_(member("10.244.3.4"), of="mine", addressType="ipv4"),
            service(name="bare", clusterIP=""), service(name="head", clusterIP="None"),
        )
        found = self.ask("?service=shop/mine")
        self.assertEqual(found["notServed"], "nothing of it can be served")
        self.assertEqual([(it["key"], it["reason"]) for it in found["problems"]], [
            ("shop/web-1", "addressType 'ipv4' is none of IPv4, IPv6, FQDN; the slice is left out"),
            ("shop/mine", f"clusterIP: {NODE} is an address of this node; it is not served"),
        ])
        found = self.ask("?service=shop/bare")
        self.assertIn("it has no clusterIP", found["notServed"])
        self.assertEqual([it["reason"] for it in found["problems"]], [found["notServed"]])
        self.assertNotIn("problems", self.ask("?service=shop/head"))

    def test_noSuchPortProblems(self) -> None:
        """Of a ClusterIP that has no such port, what is wrong with its Service is told: that may be why."""
        self.put(
            service(ports=[{"port": 80}, {"port": 81}]),
            slice_(member("127.0.0.1"), ports=[{"name": "", "port": 8080}]),
            service(name="other", clusterIP="10.96.0.11", externalIPs=["x"]),
        )
        found = self.ask("?to=10.96.0.10:81")
        self.assertEqual(found["problems"], [{
            "kind": "Service", "key": "shop/web",
            "reason": "port 81/TCP: it has no name, like an earlier one, which serves; give each its own",
        }])
        self.assertNotIn("problems", self.ask("?to=10.96.0.10:80"))
        self.assertNotIn("problems", self.ask("?to=10.96.0.99:80"))

    def test_problems(self) -> None:
        """What is wrong with the Service and its slices is told beside it, and of no other."""
        self.put(
            service(), slice_(member("127.0.0.1")),
            service(name="bad", clusterIP="10.96.0.30"), slice_(member("127.0.0.2"), of="bad", name="bad-1"),
        )
        [port] = self.ask("?service=shop/web:http")["servicePorts"]
        self.assertEqual(port["problems"], [{
            "kind": "EndpointSlice", "key": "shop/web-1",
            "reason": "endpoint 127.0.0.1 is a loopback address; it is not used",
        }])
        self.assertEqual(port["pools"]["cluster"]["leftOut"][0]["why"], "127.0.0.1 is a loopback address")

    def test_badQuestions(self) -> None:
        """400 with a text that says how to ask."""
        for query, words in (
            ("", "either to or service must be given"),
            ("?to=fd00::10:80", "write an IPv6 address in brackets"),
            ("?to=%ff", "the query cannot be read"),
            ("?" + "&".join(f"to=1&a{n}=2" for n in range(20)), "the query cannot be read"),
            ("?to=10.0.0.1:80&pretty&verbose", "there is no parameter 'verbose'"),
        ):
            answer = self.request(query)
            self.assertEqual(answer.code, 400)
            self.assertEqual(answer.headers["content-type"], "text/plain; charset=utf-8")
            self.assertIn(words, answer.body.decode())

    def test_pretty(self) -> None:
        """For people."""
        self.shop()
        self.assertIn(b'\n  "answers"', self.request("?pretty&to=%5Bfd00::1%5D:80").body)
