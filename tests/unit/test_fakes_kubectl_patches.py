"""How the fake API server patches objects, and how it reads protobuf."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ..fakes import apiproto
from ..fakes.apikinds import NODES, SERVICES, SLICES
from ..fakes.apipatch import applied, jsonPatch, mergePatch, strategicMerge
from ..fakes.apischema import Misfit, conform, schemaOf
from ..fakes.apistatus import StatusError

SERVICE = schemaOf(SERVICES)


def ports(*numbers: int, **fields: Any) -> dict[str, Any]:
    return {"spec": {"ports": [{"port": number, **fields} for number in numbers]}}


def numbers(it: Any) -> list[int]:
    return [port["port"] for port in it["spec"]["ports"]]


class StrategicMergeTests(SynchronousTestCase):
    """Strategic merge patch."""

    def merge(self, old: Any, patch: Any) -> Any:
        return strategicMerge(SERVICE, old, patch)

    def code(self, old: Any, patch: Any) -> int:
        return self.assertRaises(StatusError, self.merge, old, patch).code

    def test_listByKey(self) -> None:
        """Ports are found by their number and merged, new ones added; the old object is left alone."""
        old = ports(80, 81, protocol="TCP")
        new = self.merge(old, ports(81, 82, name="x"))
        self.assertEqual(new["spec"]["ports"], [{"port": 80, "protocol": "TCP"},
                                                {"port": 81, "protocol": "TCP", "name": "x"},
                                                {"port": 82, "name": "x"}])  # fmt: skip
        self.assertEqual(old, ports(80, 81, protocol="TCP"))

    def test_byNumberAlone(self) -> None:
        """Two ports of one number and different protocols are one to a strategic merge, as upstream."""
        old = {"spec": {"ports": [{"port": 53, "protocol": "UDP", "name": "u"}]}}
        new = self.merge(old, {"spec": {"ports": [{"port": 53, "protocol": "TCP", "name": "t"}]}})
        self.assertEqual(new["spec"]["ports"], [{"port": 53, "protocol": "TCP", "name": "t"}])

    def test_deletion(self) -> None:
        """An item goes by ``$patch: delete``, a field by null."""
        new = self.merge(ports(80, 81), {"spec": {"ports": [{"port": 80, "$patch": "delete"}]}})
        self.assertEqual(numbers(new), [81])
        self.assertEqual(self.merge({"a": 1, "b": {"c": 2}}, {"a": None, "b": {"c": None}}), {"b": {}})

    def test_replacement(self) -> None:
        """``$patch: replace`` replaces a whole list, or a whole object."""
        new = self.merge(ports(80, 81), {"spec": {"ports": [{"$patch": "replace"}, {"port": 9}]}})
        self.assertEqual(numbers(new), [9])
        new = self.merge({"spec": {"type": "NodePort", **ports(80)["spec"]}}, {"spec": {"$patch": "replace", "a": 1}})
        self.assertEqual(new, {"spec": {"a": 1}})
        self.assertEqual(self.merge({"a": {"b": 1}}, {"a": {"$patch": "delete"}}), {"a": {}})

    def test_retainKeys(self) -> None:
        """``$retainKeys`` names all that stays."""
        new = self.merge({"spec": {"a": 1, "b": 2}}, {"spec": {"$retainKeys": ["a", "c"], "c": 3}})
        self.assertEqual(new, {"spec": {"a": 1, "c": 3}})

    def test_order(self) -> None:
        """``$setElementOrder`` orders what the client knows; what only the server has keeps its place."""
        order = {"$setElementOrder/ports": [{"port": 83}, {"port": 82}, {"port": 80}]}
        new = self.merge(ports(80, 81, 82), {"spec": {"ports": [{"port": 83}], **order}})
        self.assertEqual(numbers(new), [83, 81, 82, 80])
        new = self.merge(ports(80, 81), {"spec": {"$setElementOrder/ports": [{"port": 81}, {"port": 80}]}})
        self.assertEqual(numbers(new), [81, 80])

    def test_plainLists(self) -> None:
        """Finalizers are united, and deleted by their directive; lists without a key are replaced."""
        old = {"metadata": {"finalizers": ["a", "b"]}, "spec": {"externalIPs": ["192.0.2.1"]}}
        patch = {"metadata": {"finalizers": ["b", "c"]}, "spec": {"externalIPs": ["192.0.2.2"]}}
        new = self.merge(old, patch)
        self.assertEqual((new["metadata"]["finalizers"], new["spec"]["externalIPs"]), (["a", "b", "c"], ["192.0.2.2"]))
        new = self.merge(new, {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a", "c"]}})
        self.assertEqual(new["metadata"], {"finalizers": ["b"]})

    def test_otherKinds(self) -> None:
        """Addresses and conditions of a Node have the key type; endpoints of a slice have none."""
        old = {"status": {"addresses": [{"type": "Hostname", "address": "a"}]}}
        patch = {"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}
        self.assertEqual(len(strategicMerge(schemaOf(NODES), old, patch)["status"]["addresses"]), 2)
        old = {"endpoints": [{"addresses": ["10.0.0.1"]}]}
        patch = {"endpoints": [{"addresses": ["10.0.0.2"]}]}
        self.assertEqual(strategicMerge(schemaOf(SLICES), old, patch), patch)

    def test_unfit(self) -> None:
        """Items without their key are 422; an unknown directive and what is no object are 400."""
        self.assertEqual(self.code(ports(80), {"spec": {"ports": [{"name": "x"}]}}), 422)
        self.assertEqual(self.code(ports(80), {"spec": {"ports": ["x"]}}), 422)
        self.assertEqual(self.code({}, {"$patch": "nosuch"}), 400)
        self.assertEqual(self.code({}, []), 400)


class JsonPatchTests(SynchronousTestCase):
    """RFC 6902; RFC 7396."""

    def step(self, old: Any, op: str, path: str, **more: Any) -> Any:
        return jsonPatch(old, [{"op": op, "path": path, **more}])

    def test_operations(self) -> None:
        """Each operation, on objects and lists; the old object is left alone."""
        old = {"a": {"b": [1, 2]}, "x/y~z": 0}
        self.assertEqual(self.step(old, "add", "/a/b/1", value=9)["a"]["b"], [1, 9, 2])
        self.assertEqual(self.step(old, "add", "/a/b/-", value=9)["a"]["b"], [1, 2, 9])
        self.assertEqual(self.step(old, "add", "/a/c", value={})["a"], {"b": [1, 2], "c": {}})
        self.assertEqual(self.step(old, "remove", "/a/b/0")["a"]["b"], [2])
        self.assertEqual(self.step(old, "replace", "/x~1y~0z", value=5)["x/y~z"], 5)
        self.assertEqual(self.step(old, "move", "/c", **{"from": "/a/b/0"}), {"a": {"b": [2]}, "x/y~z": 0, "c": 1})
        self.assertEqual(self.step(old, "copy", "/a/b/0", **{"from": "/x~1y~0z"})["a"]["b"], [0, 1, 2])
        self.assertEqual(self.step(old, "test", "/a/b", value=[1, 2]), old)
        self.assertEqual(self.step(old, "replace", "", value=1), 1)
        self.assertEqual(old, {"a": {"b": [1, 2]}, "x/y~z": 0})

    def test_unfit(self) -> None:
        """What does not apply is 422, what is no patch 400."""
        old = {"a": [1]}
        for op, path, more in (
            ("remove", "/b", {}), ("replace", "/b", {"value": 1}), ("add", "/b/c", {"value": 1}),
            ("remove", "/a/1", {}), ("add", "/a/5", {"value": 1}), ("add", "/a/x", {"value": 1}), ("add", "/c", {}),
            ("test", "/a", {"value": 2}), ("move", "/c", {"from": "/b"}), ("nosuch", "/a", {}),
            ("add", "a", {"value": 1}),
        ):  # fmt: skip
            error = self.assertRaises(StatusError, self.step, old, op, path, **more)
            self.assertEqual(error.code, 422, f"{op} {path}")
        self.assertEqual(self.assertRaises(StatusError, jsonPatch, old, {"op": "add"}).code, 400)

    def test_managedFields(self) -> None:
        """kubectl moves ownership by patching managedFields; there are none here, and it may."""
        self.assertEqual(self.step({"a": 1}, "replace", "/metadata/managedFields", value=[]), {"a": 1})

    def test_mergePatch(self) -> None:
        """Examples of RFC 7396."""
        self.assertEqual(mergePatch({"a": "b", "c": {"d": "e", "f": "g"}}, {"a": "z", "c": {"f": None}}),
                         {"a": "z", "c": {"d": "e"}})  # fmt: skip
        self.assertEqual(mergePatch({"a": [1]}, {"a": {"b": None, "c": 1}}), {"a": {"c": 1}})


class ApplyTests(SynchronousTestCase):
    """Server-side apply."""

    def test_first(self) -> None:
        """What is applied is merged by port and protocol, what others have set stays."""
        live = {"spec": {"type": "NodePort", "ports": [{"port": 53, "protocol": "UDP", "nodePort": 30053}]}}
        now = {"spec": {"ports": [{"port": 53, "name": "tcp"}, {"port": 53, "protocol": "UDP", "name": "udp"}]}}
        new = applied(SERVICE, live, {}, now)
        self.assertEqual(new["spec"]["type"], "NodePort")
        self.assertEqual({(port["name"], port.get("nodePort")) for port in new["spec"]["ports"]},
                         {("udp", 30053), ("tcp", None)})  # fmt: skip

    def test_again(self) -> None:
        """What the same manager applied and does not any more is gone: fields, labels, ports."""
        before = {"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"type": "NodePort", **ports(80, 81)["spec"]}}
        live = {"metadata": {"labels": {"a": "1", "b": "2", "c": "3"}}, "spec": {**before["spec"], "clusterIP": "x"}}
        new = applied(SERVICE, live, before, {"metadata": {"labels": {"a": "9"}}, **ports(81)})
        self.assertEqual(new["metadata"]["labels"], {"a": "9", "c": "3"})
        self.assertEqual(new["spec"], {"clusterIP": "x", "ports": [{"port": 81}]})


class ReadingTests(SynchronousTestCase):
    """How objects are read."""

    def test_unknownAndEmpty(self) -> None:
        """Fields that Go does not know are named and left out, like null and what it would not write."""
        assert SERVICE is not None
        it = {
            "kind": "Service", "metadata": {"name": "a", "labels": {}, "creationTimestamp": None, "x": 1},
            "spec": {"ports": [{"port": 80, "nodePort": 0, "y": 1}], "clusterIP": "", "selector": {"app": ""},
                     "publishNotReadyAddresses": False, "allocateLoadBalancerNodePorts": False, "externalIPs": []},
            "status": {"loadBalancer": {}},
        }  # fmt: skip
        known, unknown = conform(SERVICE, it)
        self.assertEqual(unknown, ["metadata.x", "spec.ports[0].y"])
        self.assertEqual(known, {
            "kind": "Service", "metadata": {"name": "a"}, "status": {"loadBalancer": {}},
            "spec": {"ports": [{"port": 80}], "selector": {"app": ""}, "allocateLoadBalancerNodePorts": False},
        })  # fmt: skip

    def test_wrongType(self) -> None:
        """A value of the wrong type is refused in Go's words."""
        assert SERVICE is not None
        for spec, words in (
            ({"ports": [{"port": "80"}]}, "string into Go struct field ServicePort.spec.ports.port of type int32"),
            ({"ports": {}}, "object into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort"),
            ({"externalIPs": ""}, "string into Go struct field ServiceSpec.spec.externalIPs of type []string"),
            ({"ports": [{"port": True}]}, "cannot unmarshal bool"),
            ({"ports": [{"port": 80, "targetPort": []}]}, "cannot unmarshal array"),
            ("x", "of type v1.ServiceSpec"),
        ):  # fmt: skip
            self.assertIn(words, str(self.assertRaises(Misfit, conform, SERVICE, {"spec": spec})))

    def test_protobuf(self) -> None:
        """A Service as typed clients send it."""
        entry = apiproto.message((1, "app"), (2, "web"))
        target = apiproto.message((4, b"\x08\x01\x1a\x03web"))
        port = apiproto.message((1, "http"), (2, "TCP")) + b"\x18\xd0\x0f" + target
        metadata = apiproto.message((1, "web"), (2, ""), (11, entry), (12, apiproto.message((1, "k"), (2, "v" * 300))))
        spec = apiproto.message((1, port), (2, entry), (4, "NodePort"))
        service = apiproto.message((1, metadata), (2, spec), (3, b""))
        kind = apiproto.message((1, "v1"), (2, "Service"))
        data = apiproto.MAGIC + apiproto.message((1, kind), (2, service), (3, ""), (4, ""))
        self.assertEqual(apiproto.decode(data, SERVICES), {
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "labels": {"app": "web"}, "annotations": {"k": "v" * 300}},
            "spec": {"ports": [{"name": "http", "protocol": "TCP", "port": 2000, "targetPort": "web"}],
                     "selector": {"app": "web"}, "type": "NodePort"},
        })  # fmt: skip
        self.assertIsNone(apiproto.decode(data, SLICES))
        for broken in (b"", b"{}", data[:-1] + b"\xff", data[:20], apiproto.MAGIC + b"\x0d\x00\x00\x00\x00",
                       apiproto.MAGIC + b"\x10\x01"):  # fmt: skip
            self.assertRaises(ValueError, apiproto.decode, broken, SERVICES)
