"""What the fake API server adds to objects that come through its API, and what it refuses."""

from __future__ import annotations

import json
import time
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ..fakes.apidefaults import Admission
from ..fakes.apikinds import SERVICES
from ..fakes.apiserver import FakeApi
from ..fakes.apistore import Store
from ..fakes.wire import Answer, Wire
from .test_fakes_kubectl import listed, recorded

SERVICE_PATH = "/api/v1/namespaces/default/services"
SLICE_PATH = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
Json = dict[str, Any]


class AdmissionTestCase(SynchronousTestCase):
    """A server that does as the program does."""

    def setUp(self) -> None:
        self.store = Store()
        self.api = FakeApi(Clock(), self.store, admission=Admission(self.store, ("10.96.0.0/24", "fd00::/120")))

    def ask(self, method: str, path: str, body: Any = None, type: str = "application/json", **query: str) -> Answer:
        return Wire(self.api).send(path, query or None, method, body, type).answer

    def create(self, name: str = "web", code: int = 201, status: Any = None, **spec: Any) -> Json:
        """A Service with that spec, and port 80 unless there are others. Gives its spec, or the Status."""
        spec = {"ports": [{"port": 80}], **spec}
        body: Json = {"metadata": {"name": name}, "spec": spec, **({"status": status} if status else {})}
        answer = self.ask("POST", SERVICE_PATH, body)
        self.assertEqual(answer.code, code, answer.body)
        return dict(answer.json["spec"] if code == 201 else answer.json)

    def patch(self, spec: Json, name: str = "web", code: int = 200, contentType: str = MERGE) -> Json:
        answer = self.ask("PATCH", f"{SERVICE_PATH}/{name}", {"spec": spec}, contentType)
        self.assertEqual(answer.code, code, answer.body)
        return dict(answer.json["spec"] if code == 200 else answer.json)

    def fields(self, refusal: Json) -> list[str]:
        """The fields that a refusal complains about."""
        self.assertEqual((refusal["code"], refusal["reason"]), (422, "Invalid"))
        return [cause["field"] for cause in refusal["details"]["causes"]]


def asWritten(it: Json) -> Json:
    """A recorded Service without what its server has added."""
    spec = json.loads(json.dumps(it["spec"]))
    if spec.get("clusterIP") != "None":
        spec.pop("clusterIP", None), spec.pop("clusterIPs", None)
    for field, usual in (("sessionAffinity", "None"), ("internalTrafficPolicy", "Cluster"), ("type", "ClusterIP"),
                         ("externalTrafficPolicy", "Cluster"), ("allocateLoadBalancerNodePorts", True),
                         ("ipFamilyPolicy", "SingleStack"), ("ipFamilies", ["IPv4"])):  # fmt: skip
        if spec.get(field) == usual:
            del spec[field]
    if len(spec.get("ipFamilies", ())) == 2:
        del spec["ipFamilies"]
    spec.pop("healthCheckNodePort", None)
    for port in spec.get("ports", ()):
        port.pop("nodePort", None)
        if port["protocol"] == "TCP":
            del port["protocol"]
        if port["targetPort"] == port["port"]:
            del port["targetPort"]
    return {"metadata": {"name": it["metadata"]["name"]}, "spec": spec}


class DefaultsTests(AdmissionTestCase):
    """What comes to be of a Service that says little."""

    def test_asRecorded(self) -> None:
        """Each Service of the recordings, written anew without what a server adds, becomes what it was."""
        names = set()
        for it in listed("lists/services-rv-unset"):
            answer = self.ask("POST", SERVICE_PATH, asWritten(it))
            self.assertEqual(answer.code, 201, answer.body)
            ours, theirs = answer.json["spec"], json.loads(json.dumps(it["spec"]))
            for spec in (ours, theirs):
                if spec.get("clusterIP") != "None":
                    spec["clusterIPs"] = len(spec.pop("clusterIPs", ()))
                    spec["clusterIP"] = bool(spec.get("clusterIP"))
                spec["healthCheckNodePort"] = bool(spec.get("healthCheckNodePort"))
                for port in spec.get("ports", ()):
                    port["nodePort"] = bool(port.get("nodePort"))
            self.assertEqual(ours, theirs, it["metadata"]["name"])
            names.add(it["metadata"]["name"])
        self.assertEqual(len(names), 25)

    def test_addresses(self) -> None:
        """Addresses are of the network, never the same, and not given again at once; at last there is none left."""
        first = self.create("a")["clusterIP"]
        self.ask("DELETE", f"{SERVICE_PATH}/a")
        self.assertNotEqual(self.create("b")["clusterIP"], first)
        found = [self.create(f"s{number}")["clusterIP"] for number in range(253)]
        self.assertIn(first, found)
        self.assertEqual(len(set(found)), 253)
        self.assertEqual(self.create("late", 500)["reason"], "InternalError")

    def test_dualStack(self) -> None:
        """Families are given and taken back as the policy says; the first one stays."""
        dual = self.create(ipFamilyPolicy="PreferDualStack")
        self.assertEqual(dual["ipFamilies"], ["IPv4", "IPv6"])
        single = self.patch({"ipFamilyPolicy": "SingleStack"})
        self.assertEqual((single["clusterIPs"], single["ipFamilies"]), (dual["clusterIPs"][:1], ["IPv4"]))
        again = self.patch({"ipFamilyPolicy": "RequireDualStack"})
        self.assertEqual((again["clusterIPs"][0], len(again["clusterIPs"])), (dual["clusterIP"], 2))
        six = self.create("six", ipFamilies=["IPv6"], ipFamilyPolicy="RequireDualStack")
        self.assertEqual(six["ipFamilies"], ["IPv6", "IPv4"])
        self.assertEqual(six["clusterIP"][:4], "fd00")
        headless = self.create("headless", clusterIP="None")
        self.assertEqual((headless["ipFamilies"], headless["clusterIPs"]), (["IPv4", "IPv6"], ["None"]))
        self.assertEqual(self.fields(self.create("x", 422, ipFamilies=["IPv4", "IPv6"])), ["spec.ipFamilyPolicy"])

    def test_singleStackCluster(self) -> None:
        """Where there is one network, the other family is refused, and preferring two gives one."""
        self.api.admission = Admission(self.store, ["10.96.0.0/24"])
        self.assertEqual(self.create(ipFamilyPolicy="PreferDualStack")["ipFamilies"], ["IPv4"])
        self.assertEqual(self.fields(self.create("x", 422, ipFamilyPolicy="RequireDualStack")), ["spec.ipFamilyPolicy"])
        self.assertEqual(self.fields(self.create("x", 422, ipFamilies=["IPv6"])), ["spec.ipFamilies[0]"])
        self.assertRaises(ValueError, Admission, self.store, ["10.96.0.0/24", "10.97.0.0/24"])

    def test_nodePorts(self) -> None:
        """Node ports are given once, kept through changes, shared by the protocols of one port, and given back."""
        ports = [{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53}, {"name": "h", "port": 80}]
        given = [port["nodePort"] for port in self.create(type="NodePort", ports=ports)["ports"]]
        self.assertEqual((given[0], len(set(given))), (given[1], 2))
        changed = self.patch({"ports": [{"name": "h", "port": 81}, {"name": "new", "port": 82}]})
        numbers = [port["nodePort"] for port in changed["ports"]]
        self.assertEqual(numbers[0], given[2])
        self.assertNotIn(numbers[1], given)
        self.create("taker", type="NodePort", ports=[{"port": 1, "nodePort": given[0]}])
        self.assertNotIn("nodePort", self.patch({"type": "ClusterIP"})["ports"][0])
        none = self.create("none", type="LoadBalancer", allocateLoadBalancerNodePorts=False)
        self.assertNotIn("nodePort", none["ports"][0])

    def test_healthCheckNodePort(self) -> None:
        """There as long as it is needed, and not to be changed."""
        made = self.create(type="LoadBalancer", externalTrafficPolicy="Local")
        number = made["healthCheckNodePort"]
        self.assertNotEqual(number, made["ports"][0]["nodePort"])
        refused = self.patch({"healthCheckNodePort": 31000}, code=422)
        self.assertEqual(self.fields(refused), ["spec.healthCheckNodePort"])
        self.assertEqual(self.patch({"sessionAffinity": "ClientIP"})["healthCheckNodePort"], number)
        self.assertNotIn("healthCheckNodePort", self.patch({"externalTrafficPolicy": "Cluster"}))
        self.assertTrue(self.patch({"externalTrafficPolicy": "Local"})["healthCheckNodePort"])

    def test_typeChanges(self) -> None:
        """Each change of type takes away what the new type does not have, and gives what it needs."""
        made = self.create(type="LoadBalancer", externalTrafficPolicy="Local", ipFamilyPolicy="PreferDualStack")
        plain = self.patch({"type": "ClusterIP"})
        self.assertEqual(set(made) - set(plain), {"allocateLoadBalancerNodePorts", "externalTrafficPolicy",
                                                  "healthCheckNodePort"})  # fmt: skip
        self.assertEqual(plain["clusterIPs"], made["clusterIPs"])
        named = self.patch({"type": "ExternalName", "externalName": "a.example"})
        self.assertEqual(set(plain) - set(named), {"clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy",
                                                   "internalTrafficPolicy"})  # fmt: skip
        back = self.patch({"type": "NodePort", "externalName": None})
        self.assertEqual((len(back["clusterIPs"]), back["externalTrafficPolicy"]), (1, "Cluster"))
        self.assertTrue(back["ports"][0]["nodePort"])

    def test_status(self) -> None:
        """A status comes by /status alone, is for load balancers, and gets its ipMode."""
        status = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "lb.example"}]}}
        self.create(type="LoadBalancer", status=status)
        self.assertEqual(self.ask("GET", f"{SERVICE_PATH}/web").json["status"], {"loadBalancer": {}})
        answer = self.ask("PATCH", f"{SERVICE_PATH}/web/status", {"status": status}, MERGE)
        expected = [{"ip": "192.0.2.1", "ipMode": "VIP"}, {"hostname": "lb.example"}]
        self.assertEqual(answer.json["status"]["loadBalancer"]["ingress"], expected)
        self.assertEqual(self.patch({"sessionAffinity": "ClientIP"})["type"], "LoadBalancer")
        self.assertEqual(self.ask("GET", f"{SERVICE_PATH}/web").json["status"]["loadBalancer"]["ingress"], expected)
        wrong = {"status": {"loadBalancer": {"ingress": [{"ip": "nowhere"}]}}}
        refused = self.ask("PATCH", f"{SERVICE_PATH}/web/status", wrong, MERGE)
        self.assertEqual(self.fields(refused.json), ["status.loadBalancer.ingress[0].ip"])
        self.patch({"type": "ClusterIP"})
        self.assertEqual(self.ask("GET", f"{SERVICE_PATH}/web").json["status"], {"loadBalancer": {}})
        refused = self.ask("PATCH", f"{SERVICE_PATH}/web/status", {"status": status}, MERGE)
        self.assertEqual(self.fields(refused.json), ["status.loadBalancer.ingress"])

    def test_slices(self) -> None:
        """A slice gets protocols, names and a generation, which counts changes of what it says and of its labels."""
        body = {"metadata": {"name": "web-1"}, "addressType": "IPv4", "ports": [{"port": 80}],
                "endpoints": [{"addresses": ["10.0.0.1"]}]}  # fmt: skip
        made = self.ask("POST", SLICE_PATH, body).json
        self.assertEqual(made["ports"], [{"port": 80, "name": "", "protocol": "TCP"}])
        generations = [made["metadata"]["generation"]]
        said = {"a": "b"}
        for patch in ({"metadata": {"annotations": said}}, {"metadata": {"labels": said}}, {"endpoints": []}):
            answer = self.ask("PATCH", f"{SLICE_PATH}/web-1", patch, MERGE)
            generations.append(answer.json["metadata"]["generation"])
        self.assertEqual(generations, [1, 1, 2, 3])
        empty = self.ask("POST", SLICE_PATH, {"metadata": {"name": "empty"}, "addressType": "IPv6"}).json
        self.assertEqual((empty["endpoints"], empty["ports"]), (None, None))

    def test_asGiven(self) -> None:
        """What tests put into the store is as they gave it, counts as taken, and can be changed through the API."""
        it = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "uid": "u"},
              "spec": {"clusterIP": "10.96.0.77", "clusterIPs": ["10.96.0.77", "fd00::77"], "type": "ClusterIP",
                       "ports": [{"port": 80, "protocol": "TCP"}]}}  # fmt: skip
        self.store.apply(it)
        self.assertEqual(self.ask("GET", f"{SERVICE_PATH}/web").json["spec"], it["spec"])
        self.assertEqual(self.fields(self.create("x", 422, clusterIP="10.96.0.77")), ["spec.clusterIPs"])
        answer = self.ask("PATCH", f"{SERVICE_PATH}/web", {"metadata": {"labels": {"a": "b"}}}, MERGE).json
        self.assertEqual(answer["spec"]["clusterIPs"], ["10.96.0.77", "fd00::77"])
        self.assertEqual((answer["metadata"]["uid"], answer["metadata"]["labels"]), ("u", {"a": "b"}))


class RefusalTests(AdmissionTestCase):
    """What is refused, and that nothing has changed then."""

    def test_asRecorded(self) -> None:
        """The recorded refusal, word for word."""
        self.store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
        body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bad_name", "namespace": "shop"},
                "spec": {"type": "NodePort", "ports": [{"port": 99999}, {"port": 80}]}}  # fmt: skip
        answer = self.ask("POST", "/api/v1/namespaces/shop/services", body)
        self.assertEqual(answer.json, recorded("errors/422-create-invalid").json)

    def test_services(self) -> None:
        """Each fault names its field."""
        before = self.store.resourceVersion
        for field, spec in (
            ("spec.ports", {"ports": []}),
            ("spec.type", {"type": "Nosuch"}),
            ("spec.ports[0].protocol", {"ports": [{"port": 80, "protocol": "ICMP"}]}),
            ("spec.ports[1]", {"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}),
            ("spec.ports[1].name", {"ports": [{"name": "a", "port": 80}, {"name": "a", "port": 81}]}),
            ("spec.ports[0].name", {"ports": [{"name": "A_", "port": 80}]}),
            ("spec.ports[0].targetPort", {"ports": [{"port": 80, "targetPort": 70000}]}),
            ("spec.ports[0].targetPort", {"ports": [{"port": 80, "targetPort": "1234"}]}),
            ("spec.ports[0].nodePort", {"ports": [{"port": 80, "nodePort": 30000}]}),
            ("spec.ports[0].nodePort", {"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}),
            ("spec.ports[1].nodePort", {"type": "NodePort", "ports": [{"name": "a", "port": 80, "nodePort": 30000},
                                                                       {"name": "b", "port": 81, "nodePort": 30000}]}),
            ("spec.clusterIPs", {"clusterIP": "10.97.0.1"}),
            ("spec.clusterIPs[0]", {"clusterIP": "nowhere"}),
            ("spec.clusterIPs[0]", {"clusterIP": "10.96.0.9", "ipFamilies": ["IPv6"]}),
            ("spec.clusterIPs[0]", {"clusterIP": "None", "type": "NodePort"}),
            ("spec.clusterIPs", {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.8"]}),
            ("spec.ipFamilies[0]", {"ipFamilies": ["IPv5"]}),
            ("spec.ipFamilyPolicy", {"ipFamilyPolicy": "TripleStack"}),
            ("spec.externalName", {"type": "ExternalName"}),
            ("spec.clusterIPs", {"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.9"}),
            ("spec.externalIPs[0]", {"externalIPs": ["127.0.0.1"]}),
            ("spec.externalIPs[1]", {"externalIPs": ["192.0.2.1", "192.0.2.256"]}),
            ("spec.sessionAffinity", {"sessionAffinity": "Cookie"}),
            ("spec.sessionAffinityConfig.clientIP.timeoutSeconds",
             {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}),
            ("spec.externalTrafficPolicy", {"externalTrafficPolicy": "Local"}),
            ("spec.externalTrafficPolicy", {"type": "NodePort", "externalTrafficPolicy": "Near"}),
            ("spec.internalTrafficPolicy", {"internalTrafficPolicy": "Near"}),
            ("spec.trafficDistribution", {"trafficDistribution": "Near"}),
            ("spec.healthCheckNodePort", {"type": "NodePort", "healthCheckNodePort": 30000}),
            ("spec.loadBalancerSourceRanges", {"loadBalancerSourceRanges": ["192.0.2.0/24"]}),
            ("spec.loadBalancerSourceRanges[0]", {"type": "LoadBalancer", "loadBalancerSourceRanges": ["x"]}),
            ("spec.loadBalancerClass", {"loadBalancerClass": "a/b"}),
            ("spec.selector", {"selector": {"a": "b c"}}),
        ):  # fmt: skip
            self.assertEqual(self.fields(self.create("x", 422, **spec)), [field], spec)
        self.assertEqual(self.store.resourceVersion, before)

    def test_slices(self) -> None:
        """Each fault of a slice names its field; its family cannot change."""
        good = {"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 80}]}
        for field, wrong in (
            ("addressType", {"addressType": "IPX", "endpoints": []}),
            ("endpoints[0].addresses", {"endpoints": [{"addresses": []}]}),
            ("endpoints[0].addresses[0]", {"endpoints": [{"addresses": ["fd00::1"]}]}),
            ("ports[0].port", {"ports": [{"port": 0}]}),
            ("ports[1].name", {"ports": [{"port": 80}, {"port": 81}]}),
            ("metadata.labels", {"metadata": {"name": "x", "labels": {"a": "?"}}}),
            ("metadata.name", {"metadata": {"name": "X"}}),
        ):
            answer = self.ask("POST", SLICE_PATH, {"metadata": {"name": "x"}, **good, **wrong})
            self.assertEqual(self.fields(answer.json), [field], wrong)
        self.assertEqual(self.ask("POST", SLICE_PATH, {"metadata": {"name": "x"}, **good}).code, 201)
        answer = self.ask("PATCH", f"{SLICE_PATH}/x", {"addressType": "FQDN"}, MERGE)
        self.assertEqual(self.fields(answer.json)[0], "addressType")
        self.assertIn('EndpointSlice.discovery.k8s.io "x" is invalid', answer.json["message"])

    def test_collisions(self) -> None:
        """An address or node port is one Service's until that is gone."""
        made = self.create(type="NodePort")
        ip, number = made["clusterIP"], made["ports"][0]["nodePort"]
        ports = [{"port": 80, "nodePort": number}]
        self.assertIn("already allocated", self.create("x", 422, clusterIP=ip)["message"])
        self.assertIn("already allocated", self.create("x", 422, type="NodePort", ports=ports)["message"])
        self.ask("DELETE", f"{SERVICE_PATH}/web")
        self.create("x", clusterIP=ip, type="NodePort", ports=ports)

    def test_immutable(self) -> None:
        """The address stays, whichever way it is asked to change."""
        made = self.create()
        self.assertEqual(self.fields(self.patch({"clusterIP": "10.96.0.200"}, code=422)), ["spec.clusterIPs[0]"])
        self.assertEqual(self.patch({"clusterIP": None})["clusterIP"], made["clusterIP"])
        self.assertEqual(self.patch({"clusterIP": None, "clusterIPs": None})["clusterIPs"], made["clusterIPs"])
        answer = self.ask("PATCH", f"{SERVICE_PATH}/web", {"metadata": {"name": "other"}}, MERGE)
        self.assertEqual(self.fields(answer.json), ["metadata.name"])

    def test_namespaces(self) -> None:
        """Objects need a namespace that exists, and go with it."""
        path = "/api/v1/namespaces/shop/services"
        body = {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}
        self.assertEqual(self.ask("POST", path, body).code, 404)
        made = self.ask("POST", "/api/v1/namespaces", {"metadata": {"name": "shop"}}).json
        self.assertEqual((made["status"], made["metadata"]["labels"]),
                         ({"phase": "Active"}, {"kubernetes.io/metadata.name": "shop"}))  # fmt: skip
        self.assertEqual(self.ask("POST", path, body).code, 201)
        self.assertEqual(self.ask("DELETE", "/api/v1/namespaces/shop").code, 200)
        self.assertEqual(self.ask("GET", f"{path}/web").code, 404)
        self.assertEqual(self.store.resourceVersion, 5)  # the namespaces from the start took up none

    def test_unknownFields(self) -> None:
        """An unknown field is refused, warned of or passed over, as the client wishes, and never kept."""
        body = {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80, "y": 1}], "x": '"'}}
        self.assertEqual(self.ask("POST", SERVICE_PATH, body, fieldValidation="Strict").code, 400)
        answer = self.ask("POST", SERVICE_PATH, body, fieldValidation="Warn", dryRun="All")
        self.assertIn('299 - "unknown field \\"spec.', answer.headers["warning"])
        answer = self.ask("POST", SERVICE_PATH, body, fieldValidation="Ignore")
        self.assertNotIn("warning", answer.headers)
        self.assertNotIn("x", answer.json["spec"])
        wrong = {"metadata": {"name": "a"}, "spec": {"ports": [{"port": "80"}]}}
        self.assertIn("cannot unmarshal string", self.ask("POST", SERVICE_PATH, wrong).json["message"])

    def test_dryRun(self) -> None:
        """A dry run answers as if, and changes nothing."""
        before = self.store.resourceVersion
        body = {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}
        answer = self.ask("POST", SERVICE_PATH, body, dryRun="All")
        self.assertEqual((answer.code, bool(answer.json["spec"]["clusterIP"])), (201, True))
        self.assertEqual(self.ask("GET", f"{SERVICE_PATH}/web").code, 404)
        self.create()
        patch = {"spec": {"sessionAffinity": "ClientIP"}}
        answer = self.ask("PATCH", f"{SERVICE_PATH}/web", patch, STRATEGIC, dryRun="All")
        self.assertEqual((answer.json["spec"]["sessionAffinity"], answer.json["metadata"]["resourceVersion"]),
                         ("ClientIP", str(before + 1)))  # fmt: skip
        self.ask("DELETE", f"{SERVICE_PATH}/web", dryRun="All")
        self.ask("DELETE", f"{SERVICE_PATH}/web", {"dryRun": ["All"]})
        self.assertEqual(self.ask("GET", f"{SERVICE_PATH}/web").json["spec"]["sessionAffinity"], "None")
        self.assertEqual(self.store.resourceVersion, before + 1)

    def test_preconditions(self) -> None:
        """A DELETE of another object of that name is 409; so is a patch of another version."""
        self.create()
        options = {"preconditions": {"uid": "another"}}
        self.assertEqual(self.ask("DELETE", f"{SERVICE_PATH}/web", options).code, 409)
        patch = {"metadata": {"resourceVersion": "1"}, "spec": {"sessionAffinity": "ClientIP"}}
        answer = self.ask("PATCH", f"{SERVICE_PATH}/web", patch, MERGE)
        self.assertEqual(answer.code, 409)

    def test_collection(self) -> None:
        """A DELETE of a collection takes what is selected, each with an event of its own."""
        for name in ("a", "b", "c"):
            self.create(name)
        self.ask("PATCH", f"{SERVICE_PATH}/c", {"metadata": {"labels": {"keep": "me"}}}, MERGE)
        wire = Wire(self.api).send("/api/v1/services", {"watch": "true", "resourceVersion": self.store.resourceVersion})
        self.addCleanup(wire.lose)
        self.assertEqual(self.ask("DELETE", SERVICE_PATH, labelSelector="!keep").code, 200)
        self.assertEqual([(type, it["metadata"]["name"]) for type, it in wire.answer.events],
                         [("DELETED", "a"), ("DELETED", "b")])  # fmt: skip
        self.assertEqual(self.ask("DELETE", "/api/v1/services").code, 405)

    def test_applyPatch(self) -> None:
        """Server-side apply creates, needs a manager, and forgets what it knew of an object that is gone."""
        path, kind = f"{SERVICE_PATH}/web", "application/apply-patch+yaml"
        body = b"metadata: {name: web, labels: {a: b}}\nspec: {ports: [{port: 80}]}"
        self.assertEqual(self.ask("PATCH", path, body, kind).code, 422)
        self.assertEqual(self.ask("PATCH", path, body, kind, fieldManager="me").code, 201)
        less = b"metadata: {name: web}\nspec: {ports: [{port: 81}]}"
        answer = self.ask("PATCH", path, less, kind, fieldManager="me")
        self.assertEqual((answer.code, [port["port"] for port in answer.json["spec"]["ports"]]), (200, [81]))
        self.assertNotIn("labels", answer.json["metadata"])
        self.ask("DELETE", path)
        self.create(ports=[{"name": "a", "port": 81}])
        answer = self.ask("PATCH", path, b"spec: {sessionAffinity: ClientIP}", kind, fieldManager="me")
        self.assertEqual([port["port"] for port in answer.json["spec"]["ports"]], [81])
        self.assertEqual(self.ask("PATCH", path, b"{", kind, fieldManager="me").code, 400)
        self.assertEqual(self.ask("PATCH", path, b"[]", kind, fieldManager="me").code, 400)

    def test_quick(self) -> None:
        """500 Services with three endpoints and 1,000 changes of them take no time worth speaking of."""
        self.api.admission = Admission(self.store)
        began = time.thread_time()
        endpoints = [{"addresses": [f"10.244.0.{number}"]} for number in range(3)]
        for number in range(500):
            self.create(f"s{number}", type="NodePort" if number % 2 else "ClusterIP")
            body = {"metadata": {"name": f"s{number}"}, "addressType": "IPv4", "endpoints": endpoints}
            self.assertEqual(self.ask("POST", SLICE_PATH, body).code, 201)
        for number in range(1000):
            self.patch({"sessionAffinity": ("ClientIP", "None")[number // 500]}, f"s{number % 500}")
        self.assertLess(time.thread_time() - began, 20)
        ips = [it["spec"]["clusterIP"] for it in self.store.objects(SERVICES).values()]
        self.assertEqual(len(set(ips)), 500)
