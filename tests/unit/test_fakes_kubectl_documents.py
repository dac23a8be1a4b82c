"""How the fake API server describes itself to kubectl, and what it keeps in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ..fakes.apikinds import KINDS, NAMESPACES, SERVICES
from ..fakes.apiopenapi import OpenApi
from ..fakes.apiserver import FakeApi
from ..fakes.apistate import Journal
from ..fakes.apistore import Store
from ..fakes.wire import Answer, Wire
from .test_fakes_kubectl import recorded

Json = dict[str, Any]


class DocumentTests(SynchronousTestCase):
    """Discovery and OpenAPI."""

    def ask(self, path: str, **headers: str) -> Answer:
        return Wire(FakeApi(Clock())).send(path, **headers).answer

    def test_aggregated(self) -> None:
        """What the aggregated form says of each resource is what the real server says, and in its type."""
        for what in ("api", "apis"):
            expected = recorded(f"discovery/{what}-aggregated")
            answer = self.ask(f"/{what}", Accept=expected.headers["content-type"] + ",application/json")
            self.assertEqual(answer.headers["content-type"], expected.headers["content-type"])
            theirs = dict(self.entries(expected.json))
            ours = dict(self.entries(answer.json))
            self.assertTrue(ours)
            for key, it in ours.items():
                for entry in (it, theirs[key]):
                    parts = entry.get("subresources", ())
                    entry["subresources"] = [one for one in parts if one["subresource"] == "status"]
                self.assertEqual(it, theirs[key])

    def entries(self, document: Json) -> Iterator[tuple[str, Json]]:
        for group in document["items"]:
            for version in group["versions"]:
                for it in version["resources"]:
                    yield f"{group['metadata'].get('name')}/{version['version']}/{it['resource']}", it

    def test_openApi(self) -> None:
        """The index leads to documents, whose references lead somewhere, and in which each resource can be patched."""
        index = self.ask("/openapi/v3").json["paths"]
        groups = ("discovery", "events", "networking")
        self.assertEqual(set(index), {"api/v1", *(f"apis/{it}.k8s.io/v1" for it in groups)})
        patched = set()
        for it in index.values():
            answer = self.ask(it["serverRelativeURL"])
            schemas = answer.json["components"]["schemas"]
            for reference in answer.body.decode().split('"$ref":"')[1:]:
                self.assertIn(reference.partition('"')[0].removeprefix("#/components/schemas/"), schemas)
            for path in answer.json["paths"].values():
                if "patch" in path:
                    patched.add(path["patch"]["x-kubernetes-group-version-kind"]["kind"])
                    self.assertIn("fieldValidation", [it["name"] for it in path["patch"]["parameters"]])
        self.assertEqual(patched, {kind.kind for kind in KINDS})
        ports = self.ask("/openapi/v3/api/v1").json["components"]["schemas"]["io.k8s.api.core.v1.ServiceSpec"]
        self.assertEqual(ports["properties"]["ports"]["x-kubernetes-patch-merge-key"], "port")
        self.assertEqual(self.ask("/openapi/v3/apis/nosuch/v1").code, 404)

    def test_openApiForOldClients(self) -> None:
        """Version 2 names each kind's patch, with the parameter dryRun, in protobuf."""
        data = OpenApi([SERVICES, NAMESPACES], "v1").v2()
        self.assertEqual(data.count(b"x-kubernetes-group-version-kind"), 2)
        self.assertEqual(data.count(b"dryRun"), 2)
        self.assertEqual(self.ask("/openapi/v2").headers["content-type"], "application/octet-stream")


class JournalTests(SynchronousTestCase):
    """What outlives the server."""

    def test_restart(self) -> None:
        """Objects, resourceVersion and counting are as they were; watches from before are too old."""
        path = self.mktemp()
        store = Store()
        journal = Journal(store, path)
        for name in ("a", "b", "c"):
            store.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {}})
        store.delete({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}})
        store.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"type": "NodePort"}})
        journal.close()
        again = Store()
        journal = Journal(again, path)
        self.addCleanup(journal.close)
        self.assertEqual(again.objects(SERVICES), store.objects(SERVICES))
        self.assertEqual((again.resourceVersion, again.oldest), (store.resourceVersion, store.resourceVersion))
        new = again.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {}})
        self.assertEqual(new["metadata"]["resourceVersion"], str(store.resourceVersion + 1))

    def test_killedInTheMiddle(self) -> None:
        """A line that was not written to its end never happened, and does not spoil the next one."""
        path = self.mktemp()
        store = Store()
        journal = Journal(store, path)
        store.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {}})
        journal.close()
        with open(path, "ab") as file:
            file.write(b'[3,"v1","Serv')
        for expected in (1, 2):
            store = Store()
            journal = Journal(store, path)
            self.assertEqual(len(store.objects(SERVICES)), expected)
            store.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": f"n{expected}"}, "spec": {}})
            journal.close()
