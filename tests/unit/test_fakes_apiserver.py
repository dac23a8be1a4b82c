"""The fake API server, on a clock and without a network."""

from __future__ import annotations

import gzip
import json
from typing import Any

from treq.testing import RequestTraversalAgent, StubTreq
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseFailed

from ..fakes.apifaults import Fault
from ..fakes.apikinds import KINDS_OF_1_20
from ..fakes.apiserver import FakeApi
from ..fakes.apistore import Store
from ..fakes.wire import Answer, Wire
from .test_fakes_apistore import names, service

SERVICES = "/api/v1/services"
SHOP = "/api/v1/namespaces/shop/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"


class ApiTestCase(SynchronousTestCase):
    """A server with one service."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.api = FakeApi(self.clock)
        self.api.store.create(service("web"))
        self.addCleanup(self.noTimersLeft)
        self.wires: list[Wire] = []

    def noTimersLeft(self) -> None:
        for wire in self.wires:
            wire.lose()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.api.watches, [])

    def ask(self, path: str, query: dict[str, Any] | None = None, **kw: Any) -> Answer:
        return self.wire().send(path, query, **kw).answer

    def wire(self, token: str = "") -> Wire:
        wire = Wire(self.api, token)
        self.wires.append(wire)
        return wire

    def watch(self, path: str = SERVICES, **query: Any) -> Wire:
        return self.wire().send(path, {"watch": "true", **query})

    def types(self, wire: Wire) -> list[tuple[str, str]]:
        """Type and resourceVersion of what a watch has said."""
        return [(type, it["metadata"]["resourceVersion"]) for type, it in wire.answer.events]


class WatchTests(ApiTestCase):
    """WATCH."""

    def test_fromVersion(self) -> None:
        """A watch says what came after its resourceVersion, at once what is past, then what happens."""
        self.api.store.create(service("api"))
        wire = self.watch(resourceVersion="2")
        self.assertEqual(self.types(wire), [("ADDED", "3")])
        self.api.store.update(service("api", a=1))
        self.api.store.delete(service("web"))
        self.assertEqual(self.types(wire), [("ADDED", "3"), ("MODIFIED", "4"), ("DELETED", "5")])
        self.assertFalse(wire.answer.complete)

    def test_headersComeFirst(self) -> None:
        """The answer's headers are there before the first event."""
        wire = self.watch(resourceVersion="2")
        self.assertEqual(wire.answer.code, 200)
        self.assertEqual(wire.answer.headers["transfer-encoding"], "chunked")
        self.assertEqual(wire.answer.body, b"")

    def test_eventPerChunk(self) -> None:
        """Each event is a line in a chunk of its own, and carries kind and apiVersion."""
        wire = self.watch(resourceVersion="2")
        self.api.store.create(service("a"))
        self.api.store.create(service("b"))
        self.assertEqual([chunk.count(b"\n") for chunk in wire.answer.chunks], [1, 1])
        self.assertEqual(wire.answer.events[0][1]["kind"], "Service")
        self.assertEqual(wire.answer.events[0][1]["apiVersion"], "v1")

    def test_fromState(self) -> None:
        """Without resourceVersion, or from 0, the present state comes first, as ADDED, unmarked."""
        self.api.store.create(service("api"))
        for query in ({}, {"resourceVersion": ""}, {"resourceVersion": "0"}):
            wire = self.watch(allowWatchBookmarks="true", **query)
            self.assertEqual(self.types(wire), [("ADDED", "3"), ("ADDED", "2")])
        self.api.store.delete(service("api"))
        self.assertEqual(self.types(wire)[2:], [("DELETED", "4")])

    def test_watchList(self) -> None:
        """A WatchList ends its initial events with an annotated bookmark."""
        wire = self.watch(sendInitialEvents="true", resourceVersionMatch="NotOlderThan", allowWatchBookmarks="true")
        types = self.types(wire)
        self.assertEqual(types, [("ADDED", "2"), ("BOOKMARK", "2")])
        self.assertEqual(
            wire.answer.events[1][1],
            {
                "kind": "Service",
                "apiVersion": "v1",
                "metadata": {"resourceVersion": "2", "annotations": {"k8s.io/initial-events-end": "true"}},
                "spec": {},
                "status": {"loadBalancer": {}},
            },
        )
        self.api.store.delete(service("web"))
        self.assertEqual(self.types(wire)[2:], [("DELETED", "3")])

    def test_watchListAtVersion(self) -> None:
        """A WatchList not older than a version gives the present state, even where that version is long forgotten."""
        self.api.compact()
        query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
        wire = self.watch(resourceVersion="1", **query)
        self.assertEqual(self.types(wire), [("ADDED", "2"), ("BOOKMARK", "3")])

    def test_watchListOff(self) -> None:
        """A server without WatchList says 422; an older one gives the events without ever marking their end."""
        query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
        self.api.watchList = "off"
        self.assertEqual(self.watch(**query).answer.json["reason"], "Invalid")
        self.api.watchList = "ignored"
        self.assertEqual(self.types(self.watch(**query)), [("ADDED", "2")])

    def test_bookmarks(self) -> None:
        """Bookmarks come at their interval and two seconds before the end, to those who want them."""
        self.api.bookmarkSeconds = 60
        wanting = self.watch(SLICES, resourceVersion="2", allowWatchBookmarks="true", timeoutSeconds="100")
        other = self.watch(SLICES, resourceVersion="2", timeoutSeconds="100")
        self.clock.advance(59)
        self.assertEqual(self.types(wanting), [])
        self.clock.advance(1)
        self.assertEqual(self.types(wanting), [("BOOKMARK", "2")])
        self.api.store.create(service("new"))
        self.clock.advance(38)
        self.assertEqual(self.types(wanting), [("BOOKMARK", "2"), ("BOOKMARK", "3")])
        bookmark = {"metadata": {"resourceVersion": "3"}, "addressType": "", "endpoints": None, "ports": None}
        expected = {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", **bookmark}
        self.assertEqual(wanting.answer.events[1][1], expected)
        self.clock.advance(2)
        self.assertTrue(wanting.answer.complete)
        self.assertEqual(other.answer.body, b"")

    def test_bookmarkNow(self) -> None:
        """Bookmarks can be had at once, of one resource."""
        services = self.watch(resourceVersion="2", allowWatchBookmarks="true")
        slices = self.watch(SLICES, resourceVersion="2", allowWatchBookmarks="true")
        self.api.bookmarkNow("services")
        self.assertEqual(self.types(services), [("BOOKMARK", "2")])
        self.assertEqual(self.types(slices), [])

    def test_timeout(self) -> None:
        """A watch ends in order when its time is over, and the connection can be used again."""
        wire = self.watch(resourceVersion="2", timeoutSeconds="5")
        self.clock.advance(4.9)
        self.assertFalse(wire.answer.complete)
        self.clock.advance(0.1)
        self.assertTrue(wire.answer.complete)
        self.assertFalse(wire.transport.disconnecting)
        self.assertEqual(wire.send(SERVICES).answer.code, 200)

    def test_tooOld(self) -> None:
        """From before the history a watch is one ERROR event with a Status 410, then its end."""
        self.api.compact()
        wire = self.watch(resourceVersion="2")
        ((type, status),) = wire.answer.events
        self.assertEqual((type, status["code"], status["reason"]), ("ERROR", 410, "Expired"))
        self.assertTrue(wire.answer.complete)

    def test_openWatchSurvivesCompaction(self) -> None:
        """A watch that is open goes on."""
        wire = self.watch(resourceVersion="2")
        self.api.compact()
        self.api.store.delete(service("web"))
        self.assertEqual(self.types(wire), [("DELETED", "4")])

    def test_afterRewind(self) -> None:
        """After going back in time, a watch of the lost future is silent until that version has come again."""
        for n in range(3):
            self.api.store.create(service(f"s{n}"))
        self.api.rewind(2)
        wire = self.watch(resourceVersion="4", allowWatchBookmarks="true")
        self.api.bookmarkNow()
        self.api.store.create(service("x"))
        self.api.store.create(service("y"))
        self.assertEqual(self.types(wire), [])
        self.api.store.create(service("z"))
        self.assertEqual(self.types(wire), [("ADDED", "5")])

    def test_selectors(self) -> None:
        """Selectors and namespaces count for what is past and for what happens."""
        labels = {"service.kubernetes.io/service-proxy-name": "x"}
        self.api.store.create(service("headless", clusterIP="None"))
        query = {"labelSelector": "!service.kubernetes.io/service-proxy-name", "fieldSelector": "spec.clusterIP!=None"}
        for wire in (self.watch(**query), self.watch(SHOP, **query)):
            self.assertEqual(self.types(wire), [("ADDED", "2")])
        elsewhere = self.watch("/api/v1/namespaces/edge/services", **query)
        self.api.store.update(service("web", labels=labels))
        self.assertEqual(self.types(wire), [("ADDED", "2"), ("DELETED", "4")])
        self.assertEqual(self.types(elsewhere), [])

    def test_clientGone(self) -> None:
        """When the client goes, the watch and its timers go."""
        wire = self.watch(resourceVersion="2", allowWatchBookmarks="true")
        self.assertEqual(len(self.api.watches), 1)
        wire.lose()
        self.wires.remove(wire)
        self.noTimersLeft()

    def test_closeWatches(self) -> None:
        """Watches can be ended in order, cut, and cut within an event; of one resource or all."""
        services, slices = self.watch(resourceVersion="2"), self.watch(SLICES, resourceVersion="2")
        self.assertEqual(self.api.closeWatches(resource="endpointslices"), 1)
        self.assertTrue(slices.answer.complete)
        self.assertFalse(services.answer.complete)
        self.assertEqual(self.api.closeWatches(abort=True), 1)
        self.assertFalse(services.answer.complete)
        self.assertTrue(services.transport.disconnected)
        wire = self.watch(resourceVersion="2")
        self.api.closeWatches(midEvent=True)
        self.assertTrue(wire.transport.disconnecting)
        self.assertNotIn(b"\n", wire.answer.body)
        self.assertIn(b'{"type":"ADDED"', wire.answer.body)

    def test_sendRaw(self) -> None:
        """Anything can be put into a watch."""
        wire = self.watch(resourceVersion="2")
        self.api.sendRaw(b'{"type":"NEW","object":{}}\n')
        self.assertEqual(wire.answer.events, [("NEW", {})])


class ListTests(ApiTestCase):
    """LIST and GET."""

    def test_itemsWithoutKind(self) -> None:
        """Items carry no kind; the list does."""
        answer = self.ask(SERVICES).json
        self.assertEqual((answer["kind"], answer["metadata"]), ("ServiceList", {"resourceVersion": "2"}))
        self.assertNotIn("kind", answer["items"][0])

    def test_limitAndVersionZero(self) -> None:
        """With resourceVersion=0 a limit is ignored, unless there is no watch cache."""
        self.api.store.create(service("api"))
        query = {"limit": 1, "resourceVersion": 0}
        self.assertNotIn("continue", self.ask(SERVICES, query).json["metadata"])
        self.api.watchCache = False
        self.assertEqual(self.ask(SERVICES, query).json["metadata"]["remainingItemCount"], 1)

    def test_continueWithVersion(self) -> None:
        """A token goes without a resourceVersion."""
        self.api.store.create(service("api"))
        token = self.ask(SERVICES, {"limit": 1}).json["metadata"]["continue"]
        self.assertEqual(self.ask(SERVICES, {"continue": token, "resourceVersion": "2"}).code, 400)
        self.assertEqual(names(self.ask(SERVICES, {"continue": token}).json["items"]), ["shop/web"])

    def test_noCountUnderSelector(self) -> None:
        """A page through a selector does not say how many remain."""
        self.api.store.create(service("api"))
        metadata = self.ask(SERVICES, {"limit": 1, "labelSelector": "!x"}).json["metadata"]
        self.assertIn("continue", metadata)
        self.assertNotIn("remainingItemCount", metadata)

    def test_gzip(self) -> None:
        """A large body is compressed for those who take it; a small one is not."""
        self.assertNotIn("content-encoding", self.ask(SERVICES, Accept_Encoding="gzip").headers)
        for n in range(300):
            self.api.store.create(service(f"s{n}", text="x" * 500))
        answer = self.ask(SERVICES, Accept_Encoding="deflate, gzip")
        self.assertEqual(answer.headers["content-encoding"], "gzip")
        self.assertEqual(len(json.loads(gzip.decompress(answer.body))["items"]), 301)
        self.assertEqual(len(self.ask(SERVICES).json["items"]), 301)

    def test_getAtVersion(self) -> None:
        """GET knows of the future, too."""
        self.assertEqual(self.ask(f"{SHOP}/web", {"resourceVersion": "2"}).code, 200)
        wire = self.wire().send(f"{SHOP}/web", {"resourceVersion": "9"})
        self.assertFalse(wire.answered)
        self.clock.advance(3)
        self.assertEqual(wire.answer.headers["retry-after"], "1")

    def test_old(self) -> None:
        """A server of 1.20 has no slices of v1, only those of v1beta1, and Endpoints."""
        self.api = FakeApi(self.clock, Store(KINDS_OF_1_20))
        self.assertEqual(self.ask(SLICES).json["reason"], "NotFound")
        self.assertEqual(self.ask("/apis/discovery.k8s.io/v1").json["reason"], "NotFound")
        old = self.ask("/apis/discovery.k8s.io/v1beta1/endpointslices").json
        self.assertEqual((old["kind"], old["apiVersion"]), ("EndpointSliceList", "discovery.k8s.io/v1beta1"))
        self.assertEqual(self.ask("/api/v1/endpoints").json["kind"], "EndpointsList")

    def test_prefix(self) -> None:
        """The API may live below a path."""
        self.api.prefix = "/k8s/clusters/c1"
        self.assertEqual(self.ask(f"/k8s/clusters/c1{SERVICES}").code, 200)


class WriteTests(ApiTestCase):
    """POST, PUT, PATCH, DELETE."""

    def test_lifeOfAnObject(self) -> None:
        """Created, replaced, patched, deleted; a watch hears it all."""
        wire = self.watch(resourceVersion="2")
        new = self.ask(SHOP, method="POST", body=service("api", ports=[{"port": 80}]))
        self.assertEqual((new.code, new.json["kind"], new.json["metadata"]["namespace"]), (201, "Service", "shop"))
        changed = {**new.json, "spec": {"type": "NodePort"}}
        self.assertEqual(self.ask(f"{SHOP}/api", method="PUT", body=changed).json["spec"], {"type": "NodePort"})
        self.assertEqual(self.ask(f"{SHOP}/api", method="PUT", body=changed).code, 409)
        patch = {"metadata": {"labels": {"a": "b"}}, "spec": {"type": None, "x": 1}}
        patched = self.ask(f"{SHOP}/api", method="PATCH", body=patch, contentType="application/merge-patch+json")
        self.assertEqual((patched.json["spec"], patched.json["metadata"]["labels"]), ({"x": 1}, {"a": "b"}))
        self.assertEqual(self.ask(f"{SHOP}/api", method="DELETE").json["metadata"]["name"], "api")
        self.assertEqual(self.ask(f"{SHOP}/api").code, 404)
        types = [type for type, _ in self.types(wire)]
        self.assertEqual(types, ["ADDED", "MODIFIED", "MODIFIED", "DELETED"])

    def test_status(self) -> None:
        """``/status`` changes the status and nothing else; anything else does not change the status."""
        patch = {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}, "spec": {"type": "NodePort"}}
        kind = "application/merge-patch+json"
        answer = self.ask(f"{SHOP}/web/status", method="PATCH", body=patch, contentType=kind)
        self.assertEqual((answer.json["spec"], answer.json["status"]), ({"type": "ClusterIP"}, patch["status"]))
        answer = self.ask(f"{SHOP}/web", method="PUT", body=service("web", type="LoadBalancer"))
        self.assertEqual((answer.json["spec"], answer.json["status"]), ({"type": "LoadBalancer"}, patch["status"]))
        self.assertEqual(self.ask(f"{SHOP}/web/scale").code, 404)

    def test_deletedSlice(self) -> None:
        """Most kinds answer DELETE with a Status."""
        metadata = {"name": "web-1", "namespace": "shop"}
        self.api.store.create({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata})
        path = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/web-1"
        self.assertEqual(self.ask(path, method="DELETE").json["status"], "Success")

    def test_event(self) -> None:
        """An Event is created under a generated name."""
        for path in ("/api/v1/namespaces/shop/events", "/apis/events.k8s.io/v1/namespaces/shop/events"):
            answer = self.ask(path, method="POST", body={"metadata": {"generateName": "web."}, "reason": "X"})
            self.assertTrue(answer.json["metadata"]["name"].startswith("web."))

    def test_elsewhere(self) -> None:
        """An object that names another place than the path is refused."""
        self.assertEqual(self.ask(SHOP, method="POST", body=service("x", "edge")).code, 400)
        self.assertEqual(self.ask(f"{SHOP}/web", method="PUT", body=service("other")).code, 400)
        self.assertEqual(self.ask(SHOP, method="POST", body=b"[]").code, 400)


class AccessTests(ApiTestCase):
    """Who may."""

    def test_tokens(self) -> None:
        """Tokens count from one request to the next; who brings none is anonymous."""
        self.api.tokens = {"old": "me"}
        self.assertEqual(self.wire("old").send(SERVICES).answer.code, 200)
        self.api.tokens = {"new": "me"}
        self.assertEqual(self.wire("old").send(SERVICES).answer.code, 401)
        self.assertEqual(self.wire("new").send(SERVICES).answer.code, 200)
        self.assertEqual(self.wire().send(SERVICES).answer.code, 403)
        self.assertEqual(self.wire().send("/readyz").answer.code, 200)

    def test_forbidden(self) -> None:
        """A right can be taken away; the answer says whose, and which."""
        self.api.tokens = {"t": "me"}
        self.api.forbidden = {("services", "watch"), ("nodes", "*")}
        self.assertEqual(self.wire("t").send(SERVICES).answer.code, 200)
        answer = self.wire("t").send(SERVICES, {"watch": "1"}).answer
        self.assertIn('User "me" cannot watch resource "services"', answer.json["message"])
        self.assertEqual(self.wire("t").send("/api/v1/nodes/n0").answer.code, 403)


class FaultTests(ApiTestCase):
    """Faults to order."""

    def codes(self, count: int, path: str = SERVICES, **query: Any) -> list[int]:
        return [self.ask(path, query).code for _ in range(count)]

    def test_whichRequests(self) -> None:
        """The n-th call, the next so many, for ever; of one resource and one verb."""
        self.api.faults.add(resource="services", verb="list", status=500, call=2, times=2)
        self.assertEqual(self.codes(1, SLICES), [200])
        self.assertEqual(self.codes(5), [200, 500, 500, 200, 200])
        self.api.faults.add(verb="get", status=503, times=0)
        self.assertEqual(self.codes(3, f"{SHOP}/web"), [503, 503, 503])
        self.assertEqual(self.codes(1), [200])
        self.api.faults.clear()
        self.assertEqual(self.codes(1, f"{SHOP}/web"), [200])

    def test_status(self) -> None:
        """An error has the Status that goes with it, headers as ordered, or a body as ordered."""
        self.api.faults.add(status=410)
        answer = self.ask(SERVICES)
        self.assertEqual((answer.json["kind"], answer.json["reason"], answer.json["code"]), ("Status", "Expired", 410))
        self.api.faults.add(status=503, headers={"Retry-After": "7"}, body="<html>")
        answer = self.ask(SERVICES)
        self.assertEqual((answer.code, answer.headers["retry-after"], answer.body), (503, "7", b"<html>"))

    def test_delay(self) -> None:
        """A delay, then the right answer; nobody is answered who has gone meanwhile."""
        self.api.faults.add(delay=2, times=2)
        wire, gone = self.wire().send(SERVICES), self.wire().send(SERVICES)
        gone.lose()
        self.wires.remove(gone)
        self.clock.advance(2)
        self.assertEqual(wire.answer.code, 200)
        self.assertFalse(gone.answered)

    def test_cutAfter(self) -> None:
        """So many bytes of the body, then a reset, or an end."""
        for fin in (False, True):
            self.api.faults.add(cutAfter=30, fin=fin)
            wire = self.wire().send(SERVICES)
            self.assertEqual((len(wire.answer.body), wire.answer.complete), (30, False))
            self.assertEqual((wire.transport.disconnected, wire.transport.disconnecting), (not fin, True))

    def test_cutInEvent(self) -> None:
        """The n-th event of a watch stops in the middle."""
        self.api.faults.add(verb="watch", cutInEvent=2)
        wire = self.watch(resourceVersion="2")
        for name in "abc":
            self.api.store.create(service(name))
        first, second = wire.answer.body.split(b"\n")
        self.assertEqual(json.loads(first)["type"], "ADDED")
        self.assertRaises(ValueError, json.loads, second)
        self.assertTrue(wire.transport.disconnected)

    def test_trickle(self) -> None:
        """A body in pieces, at intervals, complete in the end."""
        whole = self.ask(SERVICES).body
        self.api.faults.add(trickle=(10, 0.5))
        wire = self.wire().send(SERVICES)
        self.assertEqual(wire.answer.body, whole[:10])
        self.clock.pump([0.5] * (len(whole) // 10 + 1))
        self.assertEqual((wire.answer.body, wire.answer.complete), (whole, True))

    def test_trickledWatch(self) -> None:
        """A watch trickles, too, and ends after its last piece."""
        self.api.faults.add(verb="watch", trickle=(7, 0.1))
        wire = self.watch(resourceVersion="2", timeoutSeconds="5")
        self.api.store.create(service("a"))
        self.clock.advance(0.1)
        self.assertEqual(len(wire.answer.body), 14)
        self.clock.pump([0.1] * 60)
        self.assertEqual((self.types(wire), wire.answer.complete), ([("ADDED", "3")], True))

    def test_trickleThenCut(self) -> None:
        """Both together."""
        self.api.faults.add(trickle=(10, 0.1), cutAfter=25)
        wire = self.wire().send(SERVICES)
        self.clock.pump([0.1] * 4)
        self.assertEqual((len(wire.answer.body), wire.answer.complete), (25, False))
        self.assertTrue(wire.transport.disconnected)

    def test_wrongBodies(self) -> None:
        """Garbage, another content type, a list without its items."""
        for fault in (Fault(garbage=True), Fault(contentType="text/html"), Fault(emptyList=True)):
            self.api.faults.add(fault)
        self.assertRaises(ValueError, json.loads, self.ask(SERVICES).body.decode("latin-1"))
        answer = self.ask(SERVICES)
        self.assertEqual((answer.headers["content-type"], len(answer.json["items"])), ("text/html", 1))
        self.assertEqual(self.ask(SERVICES).json["items"], [])

    def test_blackHole(self) -> None:
        """No answer, and the connection stays."""
        self.api.faults.add(blackHole=True)
        wire = self.wire().send(SERVICES)
        self.clock.advance(1000)
        self.assertFalse(wire.answered)
        self.assertFalse(wire.transport.disconnecting)
        self.assertEqual(self.api.requests[0].status, 0)

    def test_raw(self) -> None:
        """Any bytes instead of an answer."""
        self.api.faults.add(raw="HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort")
        wire = self.wire().send(SERVICES)
        self.assertFalse(wire.answer.complete)
        self.assertTrue(wire.transport.disconnected)

    def test_bug(self) -> None:
        """An exception of ours is a 500, and fails the test in whose run it happens."""
        self.api.version = {"a": object()}
        self.assertEqual(self.ask("/version").json["reason"], "InternalError")
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)


class LogTests(ApiTestCase):
    """The request log."""

    def test_requests(self) -> None:
        """Each request with its time, what it asked for, and how it was answered."""
        self.clock.advance(5)
        self.wire("t").send(SERVICES, {"limit": "5"}, User_Agent="kproxy/1")
        self.clock.advance(1)
        self.ask(f"{SHOP}/none")
        first, second = self.api.requests
        self.assertEqual(
            (first.time, first.method, first.path, first.query, first.agent, first.authorized),
            (5, "GET", SERVICES, {"limit": "5"}, "kproxy/1", True),
        )
        self.assertEqual((second.time, second.verb, second.status, second.authorized), (6, "get", 404, False))
        self.assertEqual(self.api.asked("services", "list"), [first])


class ControlTests(ApiTestCase):
    """``/fake/``."""

    def say(self, word: str, body: Any = None, method: str = "POST") -> Any:
        answer = self.ask(f"/fake/{word}", method=method, body=body)
        self.assertEqual(answer.code, 200, answer.body)
        return answer.json

    def test_objects(self) -> None:
        """A List of objects is created or replaced, and deleted; watches hear of it."""
        wire = self.watch(resourceVersion="2")
        many = {"kind": "List", "apiVersion": "v1", "items": [service("web", a=1), service("api")]}
        self.assertEqual(self.say("objects", many), {"resourceVersion": "4"})
        self.assertEqual(self.types(wire), [("MODIFIED", "3"), ("ADDED", "4")])
        self.say("objects", {"kind": "ServiceList", "apiVersion": "v1", "items": [service("c")]})
        self.say("objects", many, "DELETE")
        self.assertEqual(self.say("state", method="GET")["objects"]["services"], 1)

    def test_words(self) -> None:
        """Each word does what the method of its name does."""
        wire = self.watch(resourceVersion="2", allowWatchBookmarks="true")
        self.say("bookmarkNow")
        self.say("sendRaw", {"data": "x\n", "resource": "services"})
        self.assertTrue(wire.answer.body.endswith(b"}\nx\n"))
        self.say("closeWatches", {"abort": True})
        self.assertTrue(wire.transport.disconnected)
        self.say("compact")
        self.assertEqual(self.api.store.oldest, 3)
        self.say("rewind", {"resourceVersion": 3})
        self.say("faults", [{"verb": "list", "status": 500, "trickle": [1, 0.5]}])
        self.assertEqual(self.api.faults.ordered[0].trickle, (1, 0.5))
        self.say("faults", method="DELETE")
        self.assertEqual(self.ask(SERVICES).code, 200)
        self.say("settings", {"tokens": ["t"], "bookmarkSeconds": 3, "forbidden": [["nodes", "*"]], "historySize": 1})
        self.assertEqual(self.ask(SERVICES).code, 403)

    def test_requests(self) -> None:
        """The log can be read and emptied; what is said to /fake/ is not in it."""
        self.ask(SERVICES)
        (logged,) = self.say("requests", method="GET")
        self.assertEqual((logged["resource"], logged["verb"], logged["status"]), ("services", "list", 200))
        self.say("requests", method="DELETE")
        self.assertEqual(self.api.requests, [])

    def test_wrongWords(self) -> None:
        """What is not understood is refused and says why."""
        for word, body in (
            ("faults", {"status": "x"}),
            ("objects", [1]),
            ("settings", {"nosuch": 1}),
            ("rewind", {}),
            ("rewind", {"resourceVersion": 99}),
            ("objects", b"{"),
        ):
            self.assertEqual(self.ask(f"/fake/{word}", method="POST", body=body).code, 400, word)
        self.assertEqual(self.ask("/fake/nosuch", method="POST", body={}).code, 405)


class TreqTests(SynchronousTestCase):
    """In memory, with treq's client."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.api = FakeApi(self.clock)
        self.api.store.create(service("web"))

    def test_stub(self) -> None:
        """A list through StubTreq."""
        treq = StubTreq(self.api.resource)
        response = self.successResultOf(treq.get(f"http://api.test{SERVICES}", params={"limit": "1"}))
        self.assertEqual(len(self.successResultOf(treq.json_content(response))["items"]), 1)

    def test_stream(self) -> None:
        """A watch through a RequestTraversalAgent, whose flush() carries what is written later."""
        agent = RequestTraversalAgent(self.api.resource)
        url = f"http://api.test{SERVICES}?watch=true&resourceVersion=2&timeoutSeconds=9".encode()
        response = self.successResultOf(agent.request(b"GET", url))
        from treq import collect

        got: list[bytes] = []
        done = collect(response, got.append)
        self.api.store.create(service("api"))
        agent.flush()
        self.assertEqual(json.loads(got[0])["type"], "ADDED")
        self.clock.advance(9)
        agent.flush()
        self.successResultOf(done)

    def test_cut(self) -> None:
        """A cut is a failure to the client."""
        agent = RequestTraversalAgent(self.api.resource)
        self.api.faults.add(cutAfter=10)
        response = self.successResultOf(agent.request(b"GET", f"http://api.test{SERVICES}".encode()))
        from treq import content

        done = content(response)
        agent.flush()
        self.failureResultOf(done, ResponseFailed)
