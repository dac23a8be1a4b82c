"""The fake API server against recorded conversations of kubectl with a real one."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ..fakes.apikinds import KINDS_OF_1_20, SERVICES
from ..fakes.apiserver import FakeApi
from ..fakes.apistore import Store
from ..fakes.wire import Answer, Wire, parse

RECORDINGS = Path(__file__).parent.parent / "fixtures" / "apiserver"
JSON, PROTOBUF = "application/json", "application/vnd.kubernetes.protobuf"
# One after the other, as they were recorded.
LIFE = (
    "apply-f-new", "apply-f-changed-warm", "apply-f-unchanged-warm", "apply-f-novalidate-warm",
    "apply-server-side-warm", "diff-warm", "replace-warm", "patch-warm", "patch-merge-status-warm", "label-warm",
    "annotate-warm", "describe-svc-warm", "wait-warm", "delete-svc", "create-f-warm", "create-f-again-conflict-warm",
    "delete-f-warm", "create-slice-f-warm", "delete-slice-warm", "expose-warm", "create-service-nodeport-warm",
    "delete-label-warm", "create-f-invalid-warm",
)  # fmt: skip


class Message(NamedTuple):
    """A request or the head of an answer."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.line.split(" ")[1].partition("?")[0]


def requestsOf(version: str, name: str) -> list[Message]:
    data = (RECORDINGS / version / "kubectl" / f"{name}.requests").read_bytes()
    found = []
    while data.strip():
        head, _, data = data.lstrip().partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        headers = dict(it.split(": ", 1) for it in fields)
        size = int(headers.pop("Content-Length", 0))
        found.append(Message(line, headers, data[:size]))
        data = data[size:]
    return found


def answersOf(version: str, name: str) -> list[Message]:
    """The heads of the answers."""
    text = (RECORDINGS / version / "kubectl" / f"{name}.responses").read_bytes().decode().replace("\r\n", "\n")
    found = []
    for head in text.strip().split("\n\n"):
        line, *fields = head.split("\n")
        found.append(Message(line, dict(it.split(": ", 1) for it in fields), b""))
    return found


def recorded(name: str) -> Answer:
    return parse((RECORDINGS / "v1.36" / f"{name}.response").read_bytes())


def listed(name: str) -> list[dict[str, Any]]:
    """The objects of a recorded list, with kind and apiVersion."""
    said = recorded(name).json
    head = {"apiVersion": said["apiVersion"], "kind": said["kind"].removesuffix("List")}
    return [{**head, **it} for it in said["items"]]


def stocked(kinds: Any = None) -> Store:
    """What the real server had."""
    store = Store(*(() if kinds is None else (kinds,)), now=lambda: datetime(2026, 11, 22, 7, 40, tzinfo=UTC))
    for name in ("shop", "edge", "media", "kube-system", "default"):
        store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    for it in (*listed("lists/services-rv-unset"), *listed("lists/node-list-fieldselector")):
        store.create(it)
    if kinds is None:
        for it in listed("watches/endpointslices.start"):
            store.create(it)
    return store


class ReplayTests(SynchronousTestCase):
    """Requests as recorded, but for resourceVersions and tokens, which are those of the moment."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.api = FakeApi(self.clock, stocked(), tokens=["REDACTED"], admission=True)
        self.wires: list[Wire] = []
        self.said: dict[str, Any] = {}
        self.addCleanup(self.noTimersLeft)

    def noTimersLeft(self) -> None:
        for wire in self.wires:
            wire.lose()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def send(self, it: Message) -> Answer:
        line, body = it.line, it.body
        if token := self.said.get("metadata", {}).get("continue"):
            line = re.sub(r"continue=[^& ]+", f"continue={token}", line)
        line = re.sub(r"resourceVersion=[1-9]\d*", f"resourceVersion={self.api.store.resourceVersion}", line)
        there = self.api.store.objects(SERVICES).get(("shop", "kapply"))
        if there is not None:
            version = rb'\1"' + there["metadata"]["resourceVersion"].encode() + b'"'
            body = re.sub(rb'("resourceVersion":|"/metadata/resourceVersion","value":)"\d+"', version, body)
        headers = {**it.headers, **({"Content-Length": str(len(body))} if body else {})}
        head = "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items())])
        wire = Wire(self.api).raw(head.encode() + b"\r\n\r\n" + body)
        self.wires.append(wire)
        self.clock.advance(0)
        answer = wire.answer
        if answer.complete and answer.headers.get("content-type") == JSON:
            self.said = answer.json
        return answer

    def replay(self, name: str, version: str = "v1.36") -> list[Answer]:
        """Replay one conversation; status and content type of every answer have to be those recorded."""
        answers = []
        for asked, expected in zip(requestsOf(version, name), answersOf(version, name), strict=True):
            if self.notHere(asked.path):
                continue
            if "continue=" in asked.line and not self.said["metadata"].get("continue"):
                break  # there are fewer objects here
            answer = self.send(asked)
            answers.append(answer)
            what = f"{name}: {asked.line}"
            code = int(expected.line.split()[1])
            # The index of OpenAPI is not always sent again.
            self.assertEqual(answer.code, 200 if code == 304 else code, f"{what}: {answer.body[:300]!r}")
            type = expected.headers.get("Content-Type")
            if code != 304:
                self.assertEqual(answer.headers["content-type"], JSON if type == PROTOBUF else type, what)
        return answers

    def notHere(self, path: str) -> bool:
        """Groups and resources that are not faked."""
        group = path.split("/")[2] if path.startswith("/apis/") else ""
        return group not in {kind.group for kind in self.api.store.kinds} or "/pods/" in path

    def test_reading(self) -> None:
        """get in all its forms: tables, JSON, selectors, pages, what is missing; discovery, old and new; version."""
        count = 0
        for name in (
            "version", "get-svc", "get-svc-kubectl-1.27", "warm-up-of-the-cache", "get-svc-warm",
            "get-svc-all-namespaces-yaml", "get-svc-one-json", "get-svc-missing", "get-svc-selector",
            "get-svc-chunk-size-5", "get-nodes-wide", "get-raw-healthz",
        ):  # fmt: skip
            count += len(self.replay(name))
        self.assertEqual(count, 26)

    def test_watching(self) -> None:
        """get -w: a table first, then a watch of tables; or objects, where only names are wanted."""
        table = self.replay("get-endpointslices-w")[-1]
        self.assertFalse(table.complete)
        self.replay("get-svc-w-all-yaml-warm")
        for name in ("watches/endpointslices.start", "lists/services-rv-unset"):
            self.api.store.create({**listed(name)[0], "metadata": {"name": "new", "namespace": "shop"}})
        events = [wire.answer.events for wire in self.wires if wire.answer.chunks and not wire.answer.complete]
        self.assertEqual([[(type, it["kind"]) for type, it in said] for said in events],
                         [[("ADDED", "Table")], [("ADDED", "Service")]])  # fmt: skip

    def test_life(self) -> None:
        """A Service applied, changed in every way and deleted; slices; what is refused."""
        done = {name: self.replay(name) for name in LIFE}
        spec = done["apply-f-new"][-1].json["spec"]
        self.assertEqual(set(spec), {"ports", "selector", "clusterIP", "clusterIPs", "type", "sessionAffinity",
                                     "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"})  # fmt: skip
        changed = done["apply-f-changed-warm"][-1].json["spec"]["ports"]
        self.assertEqual([port["port"] for port in changed], [80, 81])
        self.assertEqual(len(done["apply-f-novalidate-warm"][-1].json["spec"]["ports"]), 1)
        self.assertEqual(len(done["diff-warm"][-1].json["spec"]["ports"]), 2)
        affinity = done["patch-warm"][-1].json["spec"]["sessionAffinityConfig"]
        self.assertEqual(affinity, {"clientIP": {"timeoutSeconds": 10800}})
        self.assertEqual(done["annotate-warm"][-1].json["metadata"]["labels"], {"x": "y"})
        knp = done["create-service-nodeport-warm"][-1].json
        self.assertEqual((knp["metadata"]["name"], knp["metadata"]["labels"]), ("knp", {"app": "knp"}))
        port = knp["spec"]["ports"][0]
        self.assertTrue(30000 <= port.pop("nodePort") <= 32767)
        self.assertEqual(port, {"name": "80-8080", "protocol": "TCP", "port": 80, "targetPort": 8080})
        refused = done["create-f-invalid-warm"][-1].json
        expected = 'Service in version "v1" cannot be handled as a Service: strict decoding error: unknown field '
        self.assertEqual((refused["reason"], refused["message"]), ("BadRequest", expected + '"spec.ports[0].nosuch"'))

    def test_oldServer(self) -> None:
        """The same against a server as old as 1.20: plain discovery, no OpenAPI 3, slices of v1beta1."""
        self.api = FakeApi(self.clock, stocked(KINDS_OF_1_20), tokens=["REDACTED"], admission=True, modern=False)
        names = ("get-svc", "get-endpointslices", "delete-svc-warm")
        for name in ("apply-f-new-warm", *names):
            for asked, expected in zip(requestsOf("v1.20", name), answersOf("v1.20", name), strict=True):
                if self.notHere(asked.path):
                    continue
                self.assertEqual(self.send(asked).code, int(expected.line.split()[1]), f"{name}: {asked.line}")


class TableTests(SynchronousTestCase):
    """Tables, cell by cell."""

    def setUp(self) -> None:
        self.clock = Clock()

    def api(self, now: datetime, *lists: str, version: int = 508) -> FakeApi:
        store = Store(now=lambda: now)
        for it in (it for name in lists for it in listed(name)):
            store.resourceVersion = int(it["metadata"]["resourceVersion"]) - 1
            store.create(it)
        store.resourceVersion = version
        return FakeApi(self.clock, store, tokens=["REDACTED"])

    def bare(self, table: dict[str, Any]) -> dict[str, Any]:
        """Without the columns' descriptions."""
        columns = [{**it, "description": ""} for it in table["columnDefinitions"] or ()]
        return {**table, "columnDefinitions": columns}

    def test_services(self) -> None:
        """The table of Services is that of the real server, at the same moment."""
        api = self.api(datetime(2026, 11, 22, 7, 32, 21, tzinfo=UTC), "lists/services-rv-unset")
        request = (RECORDINGS / "v1.36" / "lists" / "services-table.request").read_bytes()
        answer = Wire(api).raw(request).answer
        self.assertEqual(self.bare(answer.json), self.bare(recorded("lists/services-table").json))

    def test_metadataOnly(self) -> None:
        """A list of metadata, byte for byte."""
        api = self.api(datetime(2026, 11, 22, 7, 32, 21, tzinfo=UTC), "lists/services-rv-unset")
        request = (RECORDINGS / "v1.36" / "lists" / "services-metadata-only.request").read_bytes()
        self.assertEqual(Wire(api).raw(request).answer.body, recorded("lists/services-metadata-only").body)

    def test_watch(self) -> None:
        """In a watch each event is a table, of which only the first describes its columns; bookmarks are rows too."""
        expected = [(type, self.bare(it)) for type, it in recorded("watches/endpointslices-table").events]
        moment = [datetime(2026, 11, 22, 7, 40, 46, tzinfo=UTC)]
        store = Store(resourceVersion=1100, now=lambda: moment[0])
        api = FakeApi(self.clock, store, tokens=["REDACTED"])
        wire = Wire(api).raw((RECORDINGS / "v1.36" / "watches" / "endpointslices-table.request").read_bytes())
        port, endpoint = {"name": "rtp", "port": 5004, "protocol": "UDP"}, {"addresses": ["192.0.2.120"]}
        head = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "ports": [port]}
        for type, table in expected[:3]:
            it = {**head, "endpoints": [endpoint], "metadata": table["rows"][0]["object"]["metadata"]}
            moment[0] = datetime(2026, 11, 22, 7, 40, 46 + int(table["rows"][0]["cells"][4][:-1]), tzinfo=UTC)
            {"ADDED": store.create, "MODIFIED": store.apply, "DELETED": store.delete}[type](it)
        self.clock.advance(4)
        said = [(type, self.bare(it)) for type, it in wire.answer.events]
        self.assertEqual(said, expected[: len(said)])
        self.assertEqual([type for type, _ in said], ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"])
        self.clock.advance(2)
        wire.lose()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_nodes(self) -> None:
        """The wide columns of Nodes are those that kubectl printed."""
        conversations = json.loads((RECORDINGS / "v1.36" / "kubectl" / "conversations.json").read_text())
        printed = next(it["output"] for it in conversations if it["name"] == "get-nodes-wide").splitlines()[0]
        api = self.api(datetime(2026, 11, 22, 7, 40, tzinfo=UTC), "lists/node-list-fieldselector")
        accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
        table = Wire(api, "REDACTED").send("/api/v1/nodes", {"includeObject": "None"}, Accept=accept).answer.json
        self.assertEqual([it["name"].upper() for it in table["columnDefinitions"]], printed.split())
        self.assertEqual(table["rows"][0]["cells"][:3], ["node-a", "Ready", "<none>"])
        self.assertNotIn("object", table["rows"][0])

    def test_manyEndpoints(self) -> None:
        """Three endpoints are named, and how many more there are; nothing is said of what is not there."""
        store = Store()
        api = FakeApi(self.clock, store)
        head = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "a"}}
        many = [{"addresses": [f"10.244.0.{number}"]} for number in range(5)]
        store.create({**head, "addressType": "IPv4", "endpoints": many, "ports": [{"port": 80}, {"port": None}]})
        store.create({**head, "metadata": {"name": "broken"}, "endpoints": None})
        accept = "application/json;as=Table;v=v1beta1;g=meta.k8s.io"
        table = Wire(api).send("/apis/discovery.k8s.io/v1/endpointslices", Accept=accept).answer.json
        self.assertEqual(table["apiVersion"], "meta.k8s.io/v1beta1")
        cells = [row["cells"][:4] for row in table["rows"]]
        self.assertEqual(cells[0], ["a", "IPv4", "80,*", "10.244.0.0,10.244.0.1,10.244.0.2 + 2 more..."])
        self.assertEqual(cells[1], ["broken", "", "<unset>", "<unset>"])

    def test_notAcceptable(self) -> None:
        """A form that there is not, and nothing else that would do, is 406."""
        api = FakeApi(self.clock, Store())
        for accept in ("application/json;as=Table;v=v9;g=meta.k8s.io", PROTOBUF, "application/json;as=Nosuch"):
            self.assertEqual(Wire(api).send("/api/v1/services", Accept=accept).answer.code, 406, accept)
