"""
The real kubectl against the fake API server, kproxy on a node that watches it, and curl: what an operator types is what
clients see.
"""

from __future__ import annotations

import json
import os
from typing import Any
from unittest import SkipTest

from twisted.trial.unittest import TestCase

from tests.fakes.kubectl import MISSING, Kubectl
from tests.fakes.network import waitFor
from tests.integration.world import PORT, World, slices

# Addresses apart from those that World.make gives out, and a file, so that the server can be killed.
OPTIONS = ("--service-cidr", "10.96.64.0/18,fd00:10:96::4000/114", "--state", "{folder}/api.state")
DOWN = {"curl 7", "curl 28"}
Json = dict[str, Any]


def service(name: str, **spec: Any) -> Json:
    """A Service as one writes it: nothing that the server knows better."""
    ports = [{"name": "http", "port": 80, "targetPort": PORT}]
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": ports, **spec}}


class KubectlTests(TestCase):
    """Each test has Services of its own."""

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        if MISSING:
            raise SkipTest(MISSING)
        self.world = World.get("nftables", OPTIONS)
        self.rig = self.world.rig
        self.kubectl = Kubectl(self.rig, self.world.api.url)

    def tearDown(self) -> None:
        self.world.daemon.assertNoTraceback()
        self.world.api.assertNoTraceback()

    def create(self, name: str, *pods: str, **spec: Any) -> Json:
        """By ``kubectl apply``: a Service with these pods behind it. Gives the Service."""
        said = self.kubectl("apply", "-f", "-", input=[service(name, **spec), *slices(self.rig, name, *pods)])
        self.assertIn(f"service/{name} created", said)
        return self.kubectl.get("services", name)

    def url(self, name: str, port: int = 80) -> str:
        """Of its ClusterIP, as the API server has it."""
        return f"http://{self.kubectl.get('services', name)['spec']['clusterIP']}:{port}/"

    def until(self, url: str, whom: str | set[str], place: str = "p0b") -> None:
        """Wait until it answers, or until it does not any more."""
        wanted = {whom} if isinstance(whom, str) else whom
        waitFor(lambda: self.world.curl(place, url, 0.5) in wanted, 20)

    def watched(self) -> set[str]:
        """The label selectors of all watches that were begun."""
        return {it["query"].get("labelSelector", "") for it in self.world.api.requests() if it["verb"] == "watch"}

    def patch(self, name: str, patch: Any, type: str = "strategic") -> None:
        self.kubectl("patch", "service", name, f"--type={type}", "-p", json.dumps(patch))

    def test_applyAndDelete(self) -> None:
        """What is applied serves on both families and shows in tables; applied again, nothing; deleted, it is gone."""
        it = self.create("applied", "p0a", ipFamilyPolicy="PreferDualStack")
        ip4, ip6 = it["spec"]["clusterIPs"]
        for url in (f"http://{ip4}/", f"http://[{ip6}]/"):
            self.until(url, "p0a")
        table = self.kubectl("get", "services", "applied", "-o", "wide").split("\n")
        self.assertEqual(table[0].split(), ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"])
        self.assertEqual(table[1].split()[:5], ["applied", "ClusterIP", ip4, "<none>", "80/TCP"])
        table = self.kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=applied").split("\n")
        self.assertEqual(table[1].split()[1:4], ["IPv4", str(PORT), self.rig.address("p0a")])
        again = self.kubectl("apply", "-f", "-", input=[service("applied", ipFamilyPolicy="PreferDualStack")])
        self.assertIn("service/applied unchanged", again)
        self.assertIn(f"IP: {ip4}", " ".join(self.kubectl("describe", "service", "applied").split()))
        self.kubectl("delete", "service", "applied")
        self.until(f"http://{ip4}/", DOWN)
        self.until(f"http://[{ip6}]/", DOWN)
        self.kubectl("get", "service", "applied", code=1)

    def test_imperative(self) -> None:
        """``create service``, ``expose``, ``replace`` and ``delete -f`` do what they say."""
        self.kubectl("create", "service", "clusterip", "imperative", f"--tcp=80:{PORT}")
        port = self.kubectl.get("services", "imperative")["spec"]["ports"][0]
        ports = [{"name": port["name"], "port": PORT, "protocol": "TCP"}]
        made = slices(self.rig, "imperative", "p0a", ports=ports)
        self.kubectl("create", "-f", "-", input=made)
        self.until(self.url("imperative"), "p0a")
        words = ("--name=exposed", "--port=8000", f"--target-port={PORT}", "--labels=app=exposed")
        self.kubectl("expose", "service", "imperative", *words)
        self.kubectl("create", "-f", "-", input=slices(self.rig, "exposed", "p1a", ports=[{**ports[0], "name": ""}]))
        self.until(self.url("exposed", 8000), "p1a")
        moved = slices(self.rig, "imperative", "p1a", ports=ports)
        self.kubectl("replace", "-f", "-", input=moved)
        self.until(self.url("imperative"), "p1a")
        self.kubectl("delete", "-f", "-", input=moved)
        self.until(self.url("imperative"), "curl 7")
        self.kubectl("delete", "service", "-l", "app=imperative")
        self.until(self.url("exposed", 8000), "p1a")

    def test_anothersProxy(self) -> None:
        """Labelled for another proxy, a Service is not served; without that label it is again."""
        self.create("labelled", "p0a")
        url, label = self.url("labelled"), "service.kubernetes.io/service-proxy-name"
        self.until(url, "p0a")
        for _ in range(2):
            self.kubectl("label", "service", "labelled", f"{label}=mesh")
            self.until(url, DOWN)
            self.kubectl("label", "service", "labelled", f"{label}-")
            self.until(url, "p0a")

    def test_loadBalancer(self) -> None:
        """The address that a load balancer writes into the status is served, until it is taken away."""
        it = self.create("balanced", "p0a", type="LoadBalancer", externalTrafficPolicy="Local")
        self.assertIn("<pending>", self.kubectl("get", "service", "balanced"))
        self.assertTrue(it["spec"]["healthCheckNodePort"])
        url = "http://10.96.202.7/"
        self.until(self.url("balanced"), "p0a")
        self.kubectl.setStatus("services", "balanced", {"loadBalancer": {"ingress": [{"ip": "10.96.202.7"}]}})
        for place in ("p0b", "x", "n0"):
            self.until(url, "p0a", place)
        self.assertIn("10.96.202.7", self.kubectl("get", "service", "balanced"))
        self.assertRegex(self.kubectl("describe", "service", "balanced"), r"LoadBalancer Ingress: +10\.96\.202\.7")
        self.patch("balanced", {"spec": {"type": "ClusterIP"}})
        self.until(url, DOWN, "x")
        self.until(self.url("balanced"), "p0a")

    def test_portChanges(self) -> None:
        """Ports that are changed, added and removed, by each kind of patch, and by editing what was applied."""
        self.create("ports", "p0a")
        base = self.url("ports").removesuffix(":80/")
        self.until(f"{base}:80/", "p0a")
        self.patch("ports", [{"op": "replace", "path": "/spec/ports/0/port", "value": 81}], "json")
        self.until(f"{base}:81/", "p0a")
        self.until(f"{base}:80/", DOWN)
        more = {"name": "alt", "port": 82, "targetPort": PORT}
        self.patch("ports", {"spec": {"ports": [more]}})
        ports = [{"name": name, "port": PORT, "protocol": "TCP"} for name in ("http", "alt")]
        self.kubectl("apply", "-f", "-", input=slices(self.rig, "ports", "p1a", ports=ports))
        self.until(f"{base}:82/", "p1a")
        self.until(f"{base}:81/", "p1a")
        self.patch("ports", {"spec": {"ports": [more]}}, "merge")
        self.until(f"{base}:81/", DOWN)
        self.until(f"{base}:82/", "p1a")
        changed = service("ports", ports=[{"name": "http", "port": 83, "targetPort": PORT}])
        self.assertIn("83", self.kubectl("diff", "-f", "-", input=[changed], code=1))
        self.kubectl("apply", "-f", "-", input=[changed])
        self.until(f"{base}:83/", "p1a")

    def test_typeChanges(self) -> None:
        """ClusterIP to NodePort, to ExternalName, and back: what the new type does not have is not served."""
        self.create("types", "p0a")
        first = self.url("types")
        self.until(first, "p0a")
        self.patch("types", {"spec": {"type": "NodePort"}})
        number = self.kubectl.get("services", "types")["spec"]["ports"][0]["nodePort"]
        outside = f"http://{self.rig.address('n0')}:{number}/"
        self.until(outside, "p0a", "x")
        self.assertEqual(self.url("types"), first)
        self.patch("types", {"spec": {"type": "ExternalName", "externalName": "www.example.com"}})
        self.until(outside, DOWN, "x")
        self.until(first, DOWN)
        spec = self.kubectl.get("services", "types")["spec"]
        self.assertLessEqual({"clusterIP", "clusterIPs", "ipFamilies"} & set(spec), set())
        self.patch("types", {"spec": {"type": "ClusterIP", "externalName": None}})
        self.until(self.url("types"), "p0a")
        self.until(outside, DOWN, "x")

    def test_serverSideApply(self) -> None:
        """What a manager no longer applies is gone."""
        words = ("apply", "--server-side", "-f", "-")
        self.kubectl(*words, input=[service("serverside"), *slices(self.rig, "serverside", "p0a")])
        base = self.url("serverside").removesuffix(":80/")
        self.until(f"{base}:80/", "p0a")
        self.kubectl(*words, input=[service("serverside", ports=[{"name": "http", "port": 81, "targetPort": PORT}])])
        self.until(f"{base}:81/", "p0a")
        self.until(f"{base}:80/", DOWN)

    def test_watch(self) -> None:
        """``kubectl get --watch`` sees what is done, as tables and by name."""
        table = self.kubectl.watch("services", "-l", "app=watched")
        self.addCleanup(self.kubectl.stop, table)
        plain = self.kubectl.watch("endpointslices", "-l", "kubernetes.io/service-name=watched", "-o", "name")
        self.addCleanup(self.kubectl.stop, plain)
        selectors = {"app=watched", "kubernetes.io/service-name=watched"}
        waitFor(lambda: selectors <= self.watched(), 20)
        it = service("watched")
        it["metadata"]["labels"] = {"app": "watched"}
        self.kubectl("create", "-f", "-", input=[it, *slices(self.rig, "watched", "p0a")])
        self.until(self.url("watched"), "p0a")
        self.patch("watched", {"spec": {"type": "NodePort"}})
        self.kubectl("delete", "endpointslices", "-l", "kubernetes.io/service-name=watched")
        self.kubectl("delete", "service", "watched")

        def lines(text: str) -> list[list[str]]:
            return [line.split()[:2] for line in text.splitlines() if "watched" in line]

        expected = [["watched", "ClusterIP"], ["watched", "NodePort"], ["watched", "NodePort"]]
        waitFor(lambda: lines(table.log()) == expected, 10)
        names = [f"endpointslice.discovery.k8s.io/watched-ipv{family}" for family in (4, 6, 4, 6)]
        waitFor(lambda: plain.log().split() == names, 10)
        self.assertIn("NAME", table.log())

    def test_refusals(self) -> None:
        """What the server refuses ends kubectl with 1 and a reason, and leaves what is served alone."""
        made = self.create("refused", "p0a", type="NodePort")
        spec, number = made["spec"], made["spec"]["ports"][0]["nodePort"]
        self.until(self.url("refused"), "p0a")
        create = ("create", "-f", "-")
        said = self.kubectl(*create, input=[service("bad", ports=[{"port": 99999}])], code=1)
        self.assertIn("spec.ports[0].port: Invalid value: 99999", said)
        said = self.kubectl(*create, input=[service("bad", clusterIP=spec["clusterIP"])], code=1)
        self.assertIn("provided IP is already allocated", said)
        ports = [{"port": 80, "nodePort": number}]
        said = self.kubectl(*create, input=[service("bad", type="NodePort", ports=ports)], code=1)
        self.assertIn("provided port is already allocated", said)
        self.assertIn("AlreadyExists", self.kubectl(*create, input=[service("refused")], code=1))
        stale = {**made, "metadata": {**made["metadata"], "resourceVersion": "1"}}
        self.assertIn("Conflict", self.kubectl("replace", "-f", "-", input=[stale], code=1))
        said = self.kubectl("patch", "service", "refused", "-p", '{"spec":{"clusterIP":"10.96.65.1"}}', code=1)
        self.assertIn("may not change once set", said)
        self.assertIn("NotFound", self.kubectl("get", "service", "nosuch", code=1))
        said = self.kubectl("-n", "nosuch", *create, input=[service("x")], code=1)
        self.assertIn('namespaces "nosuch" not found', said)
        self.assertEqual(self.kubectl.get("services", "refused"), made)
        self.until(self.url("refused"), "p0a")

    def test_events(self) -> None:
        """That kproxy has started is an event on its node."""
        waitFor(lambda: "Starting" in self.kubectl("get", "events"), 10)
        line = next(it for it in self.kubectl("get", "events").splitlines() if "Starting" in it)
        for word in ("Normal", "node/n0", "kproxy"):
            self.assertIn(word, line)

    def test_serviceCidrs(self) -> None:
        """Networks of ClusterIPs that come and go are followed."""
        it = {
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
            "spec": {"cidrs": ["10.97.0.0/24"]},
        }
        self.kubectl("apply", "-f", "-", input=[it])
        self.assertRegex(self.kubectl("get", "servicecidrs"), r"(?m)^more +10\.97\.0\.0/24 ")
        self.world.settle(lambda status: status["sync"]["objects"].get("ServiceCIDR") == 1)
        self.kubectl("delete", "servicecidr", "more")
        self.world.settle(lambda status: status["sync"]["objects"].get("ServiceCIDR") == 0)

    def test_zLastServerKilled(self) -> None:
        """
        The API server is killed and started again: what is served stays, kubectl works again, and what is changed
        then reaches the node. (Named to be the last, though others would find everything as it was.)
        """
        self.create("survivor", "p0a")
        url = self.url("survivor")
        self.until(url, "p0a")
        before = self.kubectl.get("services", "survivor")
        watch = self.kubectl.watch("services", "-o", "name")
        self.addCleanup(self.kubectl.stop, watch)
        self.world.killApi()
        try:
            self.assertIn("refused", self.kubectl("get", "services", code=1))
            self.assertEqual(set(self.world.who("p0b", url)), {"p0a"})
        finally:
            self.world.api = self.world.startApi()
        self.assertEqual(self.kubectl.get("services", "survivor"), before)
        self.kubectl("apply", "-f", "-", input=slices(self.rig, "survivor", "p1a"))
        self.until(url, "p1a")
        self.create("newcomer", "p0a")
        self.until(self.url("newcomer"), "p0a")
        self.assertNotEqual(self.url("newcomer"), url)
        self.kubectl("delete", "service", "survivor")
        self.until(url, DOWN)
