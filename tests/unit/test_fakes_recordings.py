"""The fake API server against recordings of a real one: the same bytes, where the same things are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ..fakes.apiserver import FakeApi
from ..fakes.apistore import Store
from ..fakes.wire import Answer, Wire, parse

RECORDINGS = Path(__file__).parent.parent / "fixtures" / "apiserver" / "v1.36"
TOKEN = "REDACTED"  # what the recordings have in place of theirs
# Of priority and fairness, and of the time of recording.
IGNORED = {"x-kubernetes-pf-flowschema-uid", "x-kubernetes-pf-prioritylevel-uid", "date", "audit-id"}


def request(name: str) -> bytes:
    return (RECORDINGS / f"{name}.request").read_bytes()


def recorded(name: str) -> Answer:
    return parse((RECORDINGS / f"{name}.response").read_bytes())


def stocked(*names: str) -> Store:
    """A store with the objects of recorded lists, under the versions that they had."""
    store = Store()
    objects: list[dict[str, Any]] = []
    for name in names:
        said = recorded(name).json
        kind = said["kind"].removesuffix("List")
        objects += [{"apiVersion": said["apiVersion"], "kind": kind, **it} for it in said["items"]]
    for it in sorted(objects, key=lambda it: int(it["metadata"]["resourceVersion"])):
        store.resourceVersion = int(it["metadata"]["resourceVersion"]) - 1
        store.create(it)
    return store


class RecordingTests(SynchronousTestCase):
    """Each test replays recorded requests."""

    def api(self, store: Store | None = None, version: int = 508) -> FakeApi:
        store = stocked("lists/services-rv-unset") if store is None else store
        store.resourceVersion = version
        self.clock = Clock()
        return FakeApi(self.clock, store, tokens={TOKEN: "admin"})

    def check(self, name: str, api: FakeApi, seconds: float = 0) -> Answer:
        """Replay a request, let time pass, compare status, headers, framing and body."""
        wire = Wire(api).raw(request(name))
        if seconds:
            self.clock.advance(seconds)
        answer, expected = wire.answer, recorded(name)
        self.assertEqual(answer.code, expected.code, name)
        self.assertEqual(answer.complete, expected.complete, name)
        ours, theirs = set(answer.headers) - IGNORED, set(expected.headers) - IGNORED
        self.assertEqual(ours, theirs, name)
        for header in ours - {"content-length"}:
            self.assertEqual(answer.headers[header], expected.headers[header], name)
        return answer

    def same(self, name: str, api: FakeApi | None = None, seconds: float = 0) -> None:
        """The same body, byte for byte."""
        answer = self.check(name, self.api() if api is None else api, seconds)
        self.assertEqual(answer.body.decode(), recorded(name).body.decode())

    def test_lists(self) -> None:
        """Lists of all namespaces and of one, empty ones, selections; one object."""
        for name in ("rv-unset", "rv0-limit5", "selectors", "namespace-media", "empty"):
            self.same(f"lists/services-{name}")
        self.same("lists/service-get")

    def test_bufferOfGo(self) -> None:
        """A body beyond Go's buffer of 2,048 bytes comes in chunks, the first one of that size."""
        answer = self.check("lists/services-rv-unset", self.api())
        self.assertEqual(len(answer.chunks[0]), len(recorded("lists/services-rv-unset").chunks[0]))

    def test_pages(self) -> None:
        """Every page with its token, which are the real server's own."""
        api = self.api()
        for page in range(1, 6):
            self.same(f"lists/services-paged-{page:02}", api)

    def test_otherKinds(self) -> None:
        """A Node by field selector, and Endpoints with their warning."""
        store = stocked("lists/node-list-fieldselector")
        self.same("lists/node-list-fieldselector", self.api(store, 506))
        store = stocked("lists/endpoints-namespace-kube-system")
        self.same("lists/endpoints-namespace-kube-system", self.api(store))

    def test_errors(self) -> None:
        """What the server refuses, and in which words."""
        for name in (
            "401-bad-token",
            "403-anonymous",
            "404-object",
            "404-resource",
            "404-group",
            "404-group-version",
            "404-root",
            "405-method",
            "409-conflict",
            "409-already-exists",
            "415-content-type",
            "415-patch-type",
            "422-send-initial-events",
            "422-resource-version-match",
            "400-resource-version",
            "400-limit",
            "400-label-selector",
            "400-field-selector",
            "400-timeout-seconds",
            "500-watch-resource-version",
        ):
            api = self.api()
            if name == "401-bad-token":
                api.tokens = {"another": "admin"}
            self.same(f"errors/{name}", api)

    def test_notAcceptable(self) -> None:
        """An Accept that it cannot satisfy."""
        answer = self.check("errors/406-accept", self.api())
        self.assertEqual(answer.json, recorded("errors/406-accept").json)

    def test_tooManyRequests(self) -> None:
        """The usual 429 is text with a Retry-After."""
        api = self.api()
        api.tokens = None
        api.faults.add(status=429, headers={"Retry-After": "1"})
        self.same("errors/429-max-in-flight", api)

    def test_tooLarge(self) -> None:
        """A LIST of the future is answered after three seconds."""
        api = self.api(version=3546)
        wire = Wire(api).raw(request("errors/list-too-large-rv"))
        self.clock.advance(2.9)
        self.assertFalse(wire.answered)
        self.same("errors/list-too-large-rv", api, 3)

    def test_watches(self) -> None:
        """A watch of the future and one without events end in silence; one from too long ago says so."""
        self.same("errors/watch-too-large-rv", seconds=5)
        self.same("errors/watch-timeout-clean-end", seconds=3)
        self.same("errors/watch-compacted-rv", self.api(Store(resourceVersion=3621), 3621))

    def test_expired(self) -> None:
        """Old tokens and old exact versions are 410, the former with a token to go on."""
        for name in ("410-continue-expired", "410-list-exact-compacted"):
            self.same(f"errors/{name}", self.api(Store(resourceVersion=3690), 3690))

    def test_discovery(self) -> None:
        """A group and its resources; ours serves fewer, but says the same of each."""
        self.same("discovery/apis-discovery")
        for name in ("discovery/apis-discovery-v1", "discovery/api-v1"):
            ours = Wire(self.api()).raw(request(name)).answer.json
            theirs = {it["name"]: it for it in recorded(name).json["resources"]}
            self.assertEqual(set(ours) - {"resources"}, set(recorded(name).json) - {"resources"})
            for it in ours["resources"]:
                expected = theirs[it["name"]]
                self.assertLessEqual(set(it.pop("verbs")), set(expected["verbs"]))
                self.assertEqual(it, {key: expected[key] for key in it})

    def test_health(self) -> None:
        """``/readyz`` says ok; ``/version`` is indented JSON."""
        self.same("lists/readyz")
        version = self.check("lists/version", self.api())
        self.assertEqual(json.loads(version.body)["gitVersion"], recorded("lists/version").json["gitVersion"])
        self.assertTrue(version.body.startswith(b'{\n  "major": "1",'))
