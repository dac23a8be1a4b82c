"""The store of the fake API server."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ..fakes.apikinds import NODES, SERVICES, SLICES
from ..fakes.apiselectors import fieldSelector, labelSelector
from ..fakes.apistatus import StatusError
from ..fakes.apistore import Event, Store


def service(name: str, namespace: str = "shop", labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if labels is not None:
        metadata["labels"] = labels
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"type": "ClusterIP", **spec}}


def names(items: list[dict[str, Any]]) -> list[str]:
    return [f"{it['metadata']['namespace']}/{it['metadata']['name']}" for it in items]


class StoreTests(SynchronousTestCase):
    """Objects and versions."""

    def setUp(self) -> None:
        self.store = Store(now=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
        self.events: list[Event] = []
        self.store.subscribe(self.events.append)

    def refused(self, code: int, what: Any, *args: Any, **kw: Any) -> StatusError:
        error = self.assertRaises(StatusError, what, *args, **kw)
        self.assertEqual(error.code, code)
        return error

    def test_createAssigns(self) -> None:
        """A new object gets a uid, a creation time and the next resourceVersion, and loses kind and apiVersion."""
        made = self.store.create(service("web"))
        self.assertEqual(list(made["metadata"]), ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"])
        self.assertEqual(made["metadata"]["resourceVersion"], "2")
        self.assertEqual(made["metadata"]["creationTimestamp"], "2026-01-02T03:04:05Z")
        self.assertNotIn("kind", made)

    def test_oneVersionOverAllKinds(self) -> None:
        """Every change of any kind takes the next resourceVersion."""
        self.store.create(service("web"))
        self.store.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0"}})
        self.store.update(service("web", type="NodePort"))
        self.assertEqual([event.version for event in self.events], [2, 3, 4])

    def test_recreatedHasAnotherUid(self) -> None:
        """Deleting and creating again gives another uid; updating does not."""
        first = self.store.create(service("web"))
        self.assertEqual(self.store.update(service("web", a=1))["metadata"]["uid"], first["metadata"]["uid"])
        self.store.delete(service("web"))
        self.assertNotEqual(self.store.create(service("web"))["metadata"]["uid"], first["metadata"]["uid"])

    def test_conflicts(self) -> None:
        """There is one object of a name; an update with another resourceVersion than the stored one is refused."""
        made = self.store.create(service("web"))
        self.refused(409, self.store.create, service("web"))
        stale = service("web", a=1)
        stale["metadata"]["resourceVersion"] = "1"
        self.refused(409, self.store.update, stale)
        stale["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"]
        self.assertEqual(self.store.update(stale)["spec"]["a"], 1)

    def test_missing(self) -> None:
        """What is not there cannot be updated or deleted, and what is not served cannot be created."""
        self.refused(404, self.store.update, service("web"))
        self.refused(404, self.store.delete, service("web"))
        self.refused(404, self.store.create, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}})
        self.refused(400, self.store.create, {"apiVersion": "v1", "kind": "Service", "metadata": None})

    def test_applyUnchanged(self) -> None:
        """Writing what is there already makes no event and no version."""
        self.store.apply(service("web"))
        self.store.apply(service("web"))
        self.assertEqual(len(self.events), 1)
        self.store.apply(service("web", type="NodePort"))
        self.assertEqual(len(self.events), 2)

    def test_storedIsNotAltered(self) -> None:
        """An object that was given out stays as it was when it is replaced."""
        first = self.store.create(service("web"))
        before = dict(first["metadata"])
        self.store.update(service("web", a=1))
        self.assertEqual(first["metadata"], before)

    def test_finalizers(self) -> None:
        """An object with finalizers is only marked, and goes with the last of them."""
        held = service("web")
        held["metadata"]["finalizers"] = ["example.com/held"]
        self.store.create(held)
        self.store.delete(held)
        marked = self.store.get(SERVICES, "shop", "web")
        self.assertEqual(marked["metadata"]["deletionTimestamp"], "2026-01-02T03:04:05Z")
        self.store.update(service("web"))
        self.refused(404, self.store.get, SERVICES, "shop", "web")
        self.assertEqual([event.new is None for event in self.events], [False, False, True])

    def test_admission(self) -> None:
        """What is to be stored can be completed or refused on the way in."""
        self.store.admission.append(lambda it, old: {**it, "spec": {"clusterIP": "10.96.0.9", **it["spec"]}})
        self.assertEqual(self.store.create(service("web"))["spec"]["clusterIP"], "10.96.0.9")

    def test_list(self) -> None:
        """A list is sorted by namespace and name, of all namespaces or of one."""
        for namespace, name in (("shop", "web"), ("edge", "lb"), ("shop", "api")):
            self.store.create(service(name, namespace))
        self.assertEqual(names(self.store.list(SERVICES).items), ["edge/lb", "shop/api", "shop/web"])
        self.assertEqual(names(self.store.list(SERVICES, "shop").items), ["shop/api", "shop/web"])
        self.assertEqual(self.store.list(SLICES).items, [])

    def test_pagesAreOfOneVersion(self) -> None:
        """Pages show the state of the first one, whatever has changed meanwhile."""
        for n in range(5):
            self.store.create(service(f"s{n}"))
        page = self.store.list(SERVICES, limit=2)
        self.assertEqual((names(page.items), page.remaining, page.version), (["shop/s0", "shop/s1"], 3, 6))
        self.store.delete(service("s3"))
        self.store.create(service("s2a"))
        self.store.update(service("s4", a=1))
        page = self.store.list(SERVICES, limit=2, token=page.token)
        self.assertEqual((names(page.items), page.version), (["shop/s2", "shop/s3"], 6))
        page = self.store.list(SERVICES, limit=2, token=page.token)
        self.assertEqual((names(page.items), page.token, page.remaining), (["shop/s4"], "", None))
        self.assertNotIn("a", page.items[0]["spec"])

    def test_expiredToken(self) -> None:
        """After a compaction a token is 410, with one to go on from there in the present state."""
        for n in range(3):
            self.store.create(service(f"s{n}"))
        token = self.store.list(SERVICES, limit=1).token
        self.store.compact()
        error = self.refused(410, self.store.list, SERVICES, limit=1, token=token)
        assert isinstance(error.body, dict)
        page = self.store.list(SERVICES, limit=1, token=error.body["metadata"]["continue"])
        self.assertEqual((names(page.items), page.version), (["shop/s1"], self.store.resourceVersion))

    def test_badToken(self) -> None:
        """A token that was never given out is 400."""
        self.refused(400, self.store.list, SERVICES, token="garbage")
        self.refused(400, self.store.list, SERVICES, token="bm90IGpzb24")

    def test_exact(self) -> None:
        """A list as of an earlier version; of one too early it is 410, of the future 504."""
        self.store.create(service("a"))
        self.store.create(service("b"))
        self.assertEqual(names(self.store.list(SERVICES, exact=2).items), ["shop/a"])
        self.refused(504, self.store.list, SERVICES, exact=99)
        self.store.compact()
        self.refused(410, self.store.list, SERVICES, exact=2)

    def test_history(self) -> None:
        """Only so many changes are remembered."""
        self.store.historySize = 2
        for n in range(4):
            self.store.create(service(f"s{n}"))
        self.assertEqual(self.store.oldest, 3)
        self.assertEqual([event.version for event in self.store.since(3)], [4, 5])
        self.store.historySize = 1
        self.assertEqual(self.store.oldest, 4)

    def test_rewind(self) -> None:
        """Going back in time restores objects and version, and says nothing."""
        self.store.create(service("kept"))
        self.store.create(service("gone", a=1))
        then = self.store.resourceVersion
        self.store.delete(service("gone"))
        self.store.create(service("new"))
        self.store.update(service("kept", a=2))
        told = len(self.events)
        self.store.rewind(then)
        self.assertEqual(self.store.resourceVersion, then)
        self.assertEqual(names(self.store.list(SERVICES).items), ["shop/gone", "shop/kept"])
        self.assertEqual(self.store.get(SERVICES, "shop", "kept")["spec"], {"type": "ClusterIP"})
        self.assertEqual(len(self.events), told)
        self.assertEqual(self.store.create(service("next"))["metadata"]["resourceVersion"], str(then + 1))

    def test_rewindTooFar(self) -> None:
        """It cannot go back beyond its history."""
        self.store.create(service("a"))
        self.store.compact()
        self.assertRaises(ValueError, self.store.rewind, 1)

    def test_nodesHaveNoNamespace(self) -> None:
        """A namespace that a Node claims to be in is ignored."""
        self.store.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0", "namespace": "x"}})
        self.assertNotIn("namespace", self.store.get(NODES, "", "n0")["metadata"])

    def test_manyChanges(self) -> None:
        """500 services and 1,000 changes take a moment only, and so do pages in the midst of them."""
        start = time.thread_time()
        for n in range(500):
            self.store.apply(service(f"s{n}"))
        token = self.store.list(SERVICES, limit=100).token
        for n in range(1000):
            self.store.apply(service(f"s{n % 500}", a=n))
        self.assertEqual(len(self.store.list(SERVICES, limit=100, token=token).items), 100)
        self.assertLess(time.thread_time() - start, 2)


class FrameTests(SynchronousTestCase):
    """What a watch says of a change through a selector."""

    def setUp(self) -> None:
        self.store = Store()
        self.events: list[Event] = []
        self.store.subscribe(self.events.append)
        self.wanted = labelSelector("!service.kubernetes.io/service-proxy-name")
        self.other = {"service.kubernetes.io/service-proxy-name": "other"}

    def said(self) -> list[tuple[str, str, Any]]:
        import json

        found = [json.loads(frame) for event in self.events if (frame := event.frame(self.wanted)) is not None]
        return [(it["type"], it["object"]["metadata"]["resourceVersion"], it["object"]["spec"]) for it in found]

    def test_startsAndStopsMatching(self) -> None:
        """
        An object that stops matching is DELETED, with its old contents and the new resourceVersion; one that starts
        to is ADDED; what happens to it in between is not said.
        """
        self.store.create(service("web"))
        self.store.update(service("web", labels=self.other, a=1))
        self.store.update(service("web", labels=self.other, a=2))
        self.store.update(service("web", a=3))
        self.store.update(service("web", a=4))
        self.store.delete(service("web"))
        base = {"type": "ClusterIP"}
        self.assertEqual(
            self.said(),
            [
                ("ADDED", "2", base),
                ("DELETED", "3", base),
                ("ADDED", "5", {**base, "a": 3}),
                ("MODIFIED", "6", {**base, "a": 4}),
                ("DELETED", "7", {**base, "a": 4}),
            ],
        )

    def test_deletedUnseen(self) -> None:
        """Nothing is said of what never matched."""
        self.store.create(service("web", labels=self.other))
        self.store.delete(service("web"))
        self.assertEqual(self.said(), [])

    def test_eventsCarryKind(self) -> None:
        """An object in an event says its kind and apiVersion first."""
        self.store.create(service("<web>"))
        frame = self.events[0].frame(None) or b""
        self.assertTrue(frame.startswith(b'{"type":"ADDED","object":{"kind":"Service","apiVersion":"v1","metadata":'))
        self.assertTrue(frame.endswith(b"}}\n"))
        self.assertIn(b"\\u003cweb\\u003e", frame)


class SelectorTests(SynchronousTestCase):
    """Label and field selectors."""

    def matching(self, text: str) -> str:
        """Which of these objects match."""
        objects = {"a": {"app": "web", "tier": "1"}, "b": {"app": "db"}, "c": {}, "d": None}
        predicate = labelSelector(text)
        return "".join(name for name, labels in objects.items() if predicate({"metadata": {"labels": labels}}))

    def test_labels(self) -> None:
        """Each operator, alone and joined; the negative ones also match where the label is missing."""
        for text, expected in (
            ("", "abcd"),
            ("app=web", "a"),
            ("app==web", "a"),
            ("app = web", "a"),
            ("app!=web", "bcd"),
            ("app in (web, db)", "ab"),
            ("app notin (web)", "bcd"),
            ("app", "ab"),
            ("!app", "cd"),
            ("app,!tier", "b"),
            ("app in (web,db),tier", "a"),
            ("app=", ""),
            ("!example.com/a.b-c,app=web", "a"),
        ):
            self.assertEqual(self.matching(text), expected, text)

    def test_badLabels(self) -> None:
        """What cannot be understood is 400."""
        for text in ("!!", "a=b=c", "a in web", "=b", "a b"):
            self.assertEqual(self.assertRaises(StatusError, labelSelector, text).code, 400, text)

    def test_fields(self) -> None:
        """Name, namespace, clusterIP and type; what is not there counts as empty."""
        web = {"metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": "None", "type": "ClusterIP"}}
        external = {"metadata": {"name": "pay", "namespace": "shop"}, "spec": {"type": "ExternalName"}}
        for text, expected in (
            ("metadata.name=web", [True, False]),
            ("metadata.name!=web", [False, True]),
            ("metadata.namespace==shop", [True, True]),
            ("spec.clusterIP!=None", [False, True]),
            ("spec.clusterIP=", [False, True]),
            ("spec.type=ExternalName,metadata.name=pay", [False, True]),
        ):
            predicate = fieldSelector(text, SERVICES)
            self.assertEqual([predicate(web), predicate(external)], expected, text)

    def test_badFields(self) -> None:
        """A field that a kind cannot be selected by is 400."""
        for text, kind in (("spec.nosuch=x", SERVICES), ("spec.clusterIP=x", SLICES), ("metadata.namespace=x", NODES)):
            self.assertEqual(self.assertRaises(StatusError, fieldSelector, text, kind).code, 400, text)
