"""What real API servers do that one would not expect: a test for each such thing that the recordings show."""

from __future__ import annotations

import json
from typing import Any

from tests.fakes.recordings import Recorded, Recording
from tests.fakes.replay import answer
from tests.shared.replays import SLICES, ReplayCase, listed
from twisted_kproxy.core.values import Change
from twisted_kproxy.core.wire import HEADLESS_LABEL
from twisted_kproxy.sources.client import Resource
from twisted_kproxy.sources.stream import Bookmark, WatchStream

START = "v1.36/lists/services-rv-unset"


def linesOf(name: str) -> list[dict[str, Any]]:
    """The events of a recorded watch."""
    return [json.loads(line) for line in Recorded(name).body.splitlines()]


class ListTests(ReplayCase):
    """Lists."""

    async def test_itemsCarryNoKind(self) -> None:
        """Items of lists say no kind and apiVersion, objects of watches do: both read as the same."""
        self.assertNotIn("kind", Recorded("v1.36/watches/services.start").json["items"][0])
        self.assertEqual(linesOf("v1.36/watches/services")[0]["object"]["kind"], "Service")
        rig = self.rig()
        rig.start("v1.36/watches/services.start", "v1.36/watches/services", "v1.36/errors/watch-compacted-rv",
                  "v1.36/watches/services.end")
        await rig.asked(4)
        known, said = dict(rig.words.state["Service"]), len(rig.words.said)
        await rig.asked(5)
        # What a list says in the end is what events had said, so there is nothing to say.
        self.assertEqual((rig.status["lists"], len(rig.words.said)), (2, said))
        self.assertEqual(rig.words.state["Service"], known)

    async def test_managedFieldsAreDropped(self) -> None:
        """``managedFields`` come along, and are not kept: they would be the greater part of the memory."""
        self.assertIn("managedFields", Recorded(START).json["items"][0]["metadata"])
        rig = self.rig()
        rig.start(START)
        await rig.asked(2)
        self.assertFalse([it for it in rig.words.state["Service"].values() if hasattr(it.metadata, "managedFields")])

    async def test_onlyLargeListsAreCompressed(self) -> None:
        """Compression is asked for each time, and comes only beyond 128 KiB: what comes plain is read as such."""
        for name, compressed in (("services-small-accept-gzip", False), ("services-gzip", True)):
            recorded = Recorded(f"v1.36/lists/{name}")
            self.assertEqual(b"Content-Encoding: gzip" in recorded.response, compressed)
            rig = self.rig(recorded.resource)
            rig.start(recorded.name)
            await rig.asked(2)
            self.assertEqual(rig.server.requests[0].headers["accept-encoding"], "gzip")
            self.assertEqual(rig.state, listed(recorded.name))

    async def test_watchIsNotCompressed(self) -> None:
        """A watch comes plain even where compression is asked for; ours does not ask."""
        recorded = Recorded("v1.36/watches/services-watch-accept-gzip")
        self.assertNotIn(b"Content-Encoding", recorded.response)
        rig = self.rig(recorded.resource)
        rig.start("v1.36/lists/services-namespace-media", recorded.name)
        await rig.asked(2)
        self.assertEqual(rig.server.requests[1].headers["accept-encoding"], "identity")

    async def test_limitIsIgnoredAtZero(self) -> None:
        """With version 0 a limit is ignored: all items in one answer, no token, and so no second page."""
        rig = self.rig()
        rig.start("v1.36/lists/services-rv0-limit5")
        self.assertEqual(await rig.asked(2), ["LIST 0", "WATCH 508"])
        self.assertEqual(rig.server.requests[0].query["limit"], "500")
        self.assertEqual(len(rig.state), 25)

    async def test_zeroMayBeBehind(self) -> None:
        """
        A list of what the server has at hand may be older (273) than what was known before (325): not believed; the
        newest state counts. Nothing that was known is taken back meanwhile.
        """
        rig = self.rig()
        rig.start("v1.20/watches/services.start", "v1.20/errors/watch-compacted-rv", "v1.20/lists/services-rv0",
                  "v1.20/lists/services-rv-unset")
        self.assertEqual(await rig.asked(5), ["LIST 0", "WATCH 325", "LIST 325", "LIST", "WATCH 325"])
        self.assertEqual(rig.times[2], rig.times[3])
        self.assertEqual(len(rig.words.said), 1)

    async def test_zeroMayBeBehindAtFirst(self) -> None:
        """As the first list it is fine: the watch from there tells what came since."""
        rig = self.rig()
        rig.start("v1.20/lists/services-rv0", "v1.20/errors/watch-rv-1")
        self.assertEqual((await rig.asked(2)), ["LIST 0", "WATCH 273"])


class SelectorTests(ReplayCase):
    """What selectors let through."""

    async def test_leavingASelectorIsADeletion(self) -> None:
        """
        An object that stops matching comes as DELETED, with its old contents and the new version; when it matches
        again, as ADDED.
        """
        events = [it for it in linesOf("v1.36/watches/services-selectors")
                  if it["object"]["metadata"].get("name") == "toggle"]
        self.assertEqual([it["type"] for it in events], ["ADDED", "DELETED", "ADDED", "MODIFIED"])
        # It became headless at 656; what is said of it is what it was before.
        self.assertEqual(events[1]["object"]["metadata"]["resourceVersion"], "656")
        self.assertEqual(events[1]["object"]["spec"]["type"], "ExternalName")
        recording = Recording("services-selectors")
        rig = self.rig(recording.recorded.resource)
        rig.start(f"{recording.name}.start", recording.name)
        await rig.asked(3)
        words = [it for it in rig.words.said if isinstance(it, Change) and it.key == "shop/toggle"]
        self.assertEqual([it.object is None for it in words], [False, True, False, False])
        self.assertEqual(rig.state["shop/toggle"], recording.final()["shop/toggle"])

    async def test_externalNameMatches(self) -> None:
        """``spec.clusterIP!=None`` lets ExternalName Services through, which have no address at all."""
        rig = self.rig(Recorded("v1.36/lists/services-selectors").resource)
        rig.start("v1.36/lists/services-selectors")
        await rig.asked(2)
        specs = [it.spec for it in rig.words.state["Service"].values() if it.spec.type == "ExternalName"]
        self.assertTrue(specs)
        self.assertEqual({it.clusterIP or "" for it in specs}, {""})

    async def test_headlessLabelSticks(self) -> None:
        """
        A slice keeps the label of headless Services after its Service has got an address, until its endpoints change
        next. Who selects by that label, as every service proxy does, hears of it only then.
        """
        labelled = [HEADLESS_LABEL in it["object"]["metadata"]["labels"] for it in
                    linesOf("v1.36/watches/endpointslices") if it["object"]["metadata"].get("name") == "toggle-9wsfm"]
        self.assertEqual(labelled, [True, False])
        recording = Recording("endpointslices-selectors")
        rig = self.rig(recording.recorded.resource)
        rig.start(f"{recording.name}.start", recording.name)
        await rig.asked(3)
        words = [it for it in rig.words.said if isinstance(it, Change) and it.key == "shop/toggle-9wsfm"]
        # The Service has its address since 662.
        self.assertEqual([it.object.metadata.resourceVersion for it in words if it.object], ["782"])
        self.assertIn("shop/db-5vzr2", rig.state)


class BookmarkTests(ReplayCase):
    """Bookmarks."""

    async def test_bookmarksAreNoObjects(self) -> None:
        """A bookmark looks like an object without contents: nothing is said of it, and only its version counts."""
        empty = [it["object"] for it in linesOf("v1.36/watches/endpointslices") if it["type"] == "BOOKMARK"]
        self.assertIsNone(empty[0]["endpoints"])
        recording = Recording("endpointslices-watchlist-empty")
        rig = self.rig(recording.recorded.resource, streaming=True)
        rig.start(recording.name)
        await rig.asked(2)
        self.assertEqual((len(rig.words.said), rig.state, rig.status["rejected"]), (1, {}, {}))

    async def test_bookmarksComeTwice(self) -> None:
        """Two bookmarks with the same version, and one with that of the last event, are in order."""
        bookmarks = Recording("services").expected["bookmarks"]
        self.assertEqual([it["resourceVersion"] for it in bookmarks[1:]], ["937", "937"])
        rig = self.rig()
        rig.start("v1.36/watches/services.start", "v1.36/watches/services")
        self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 554", "WATCH 937"])
        self.assertEqual((rig.status["retries"], rig.status["lastError"]), (0, ""))

    async def test_initialEventsEnd(self) -> None:
        """Only the annotated bookmark ends the initial state, and with version 0 or none there is no such mark."""
        for name, marked in (("services-watchlist", 1), ("endpointslices-watchlist-empty", 1),
                             ("services-watch-rv0", 0), ("services-watch-rv-unset", 0)):
            recorded = Recorded(f"v1.36/watches/{name}")
            events = WatchStream(recorded.resource.kind).feed(recorded.body)
            marks = [it for it in events if isinstance(it, Bookmark) and it.initialEventsEnd]
            self.assertEqual(len(marks), marked, name)
            rig = self.rig(recorded.resource, streaming=True)
            rig.start(recorded.name, "v1.36/lists/services-empty")
            await rig.server.until(lambda rig=rig: rig.words.said)
            self.assertEqual((rig.status["streams"], rig.status["lists"]), (marked, 1 - marked), name)

    async def test_bookmarksTellThatTheLinkIsUp(self) -> None:
        """Their distance is measured: a watch that is silent for twice as long, and 150 s at least, is given up."""
        silent = answer("v1.36/errors/watch-too-large-rv", stretch=1000)
        rig = self.rig()
        rig.start("v1.36/watches/services.start", "v1.36/watches/services", silent)
        await rig.asked(4)
        self.assertEqual((await rig.asked(4))[2:], ["WATCH 937", "WATCH 937"])
        # There were 80.6 s between two of the recorded ones.
        self.assertAlmostEqual(rig.times[3] - rig.times[2], 161.1, 1)


class VersionTests(ReplayCase):
    """Too old, and too new."""

    async def test_tooOldIsAnEventOf200(self) -> None:
        """"Too old" is no 410 on a watch, but 200 with an ERROR event and a regular end; new and old servers alike."""
        for name in ("v1.36/errors/watch-compacted-rv", "v1.20/errors/watch-compacted-rv"):
            self.assertTrue(Recorded(name).response.startswith(b"HTTP/1.1 200"))
            self.assertTrue(Recorded(name).response.endswith(b"0\r\n\r\n"))
            rig = self.rig()
            rig.start(START, name, START)
            self.assertEqual(await rig.asked(4), ["LIST 0", "WATCH 508", "LIST 508", "WATCH 508"])

    async def test_tooOldAfterAMereRestart(self) -> None:
        """It comes also where nothing was compacted: the server was only restarted."""
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-after-restart-old-rv", START)
        self.assertEqual(await rig.asked(4), ["LIST 0", "WATCH 508", "LIST 508", "WATCH 508"])
        self.assertEqual(len(rig.words.said), 1)

    async def test_tooNewWaits(self) -> None:
        """"Too new" is 504 with Retry-After on a list, and that advice would lead nowhere; silence on a watch."""
        self.assertIn(b"Retry-After: 1", Recorded("v1.36/errors/list-too-large-rv").response)
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-compacted-rv", "v1.36/errors/list-too-large-rv", START)
        self.assertEqual((await rig.asked(4))[2:], ["LIST 508", "LIST"])
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-too-large-rv")
        self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "WATCH 508"])


class ErrorTests(ReplayCase):
    """Errors of odd forms."""

    async def test_startingServerForbids(self) -> None:
        """A starting server says 403 to who has the right: that is no reason to give up, as list or as watch."""
        rig = self.rig()
        rig.start("v1.36/errors/startup-list-0-403", "v1.36/errors/startup-list-unset-0-403", START,
                  "v1.36/errors/startup-watch-0-403", START)
        asked = await rig.asked(6)
        self.assertEqual(asked, ["LIST 0"] * 3 + ["WATCH 508", "LIST 508", "WATCH 508"])

    async def test_tooManyRequestsIsText(self) -> None:
        """429 is no Status but text: it is told, and Retry-After is kept to."""
        self.assertIn(b"Content-Type: text/plain", Recorded("v1.36/errors/429-priority-and-fairness").response)
        rig = self.rig()
        rig.start("v1.36/errors/429-priority-and-fairness", START)
        await rig.asked(2)
        self.assertEqual(rig.times, [0.0, 1.0])
        self.assertEqual(rig.status["lastError"], "429: Too many requests, please try again later.")

    async def test_unknownGroupIsText(self) -> None:
        """404 for an unknown group is text, for an unknown version a Status: both lead to the next API at once."""
        for name in ("v1.36/errors/404-group", "v1.36/errors/404-group-version", "v1.36/errors/404-resource"):
            older = Resource("EndpointSlice", "/apis/discovery.k8s.io/v1beta1/endpointslices")
            rig = self.rig(Resource(SLICES.kind, SLICES.path, instead=(older,)))
            rig.start(name, "v1.20/lists/endpointslices-v1beta1-rv0")
            self.assertEqual(await rig.asked(3), ["LIST 0", "LIST 0", "WATCH 325"])
            self.assertEqual([it.path for it in rig.server.requests], [SLICES.path, older.path, older.path])
            self.assertLess(rig.times[1], 0.01)

    async def test_timeoutIsAStatusWithoutKind(self) -> None:
        """A request timeout is a Status without kind, said to be text: its message is told, not its JSON."""
        recorded = Recorded("v1.36/errors/etcd-down-list-rv-unset")
        self.assertNotIn("kind", recorded.json)
        rig = self.rig()
        rig.start(recorded.name)
        await rig.asked(2)
        self.assertEqual(
            rig.status["lastError"],
            "504 Timeout: Timeout: request did not complete within the allotted timeout",
        )

    async def test_etcdDownIsServedFromTheCache(self) -> None:
        """Without etcd a server still answers for version 0: a node that starts then still gets a state."""
        rig = self.rig(Recorded("v1.36/errors/etcd-down-list-rv0").resource)
        rig.start("v1.36/errors/etcd-down-list-rv0")
        self.assertEqual(await rig.asked(2), ["LIST 0", "WATCH 3754"])

    async def test_killedServerSendsNoLastChunk(self) -> None:
        """A cut is no regular end: the error is told, and the watch goes on from the last event."""
        for name, rv in (("watch-cut-sigkill", "3590"), ("watch-cut-sigterm", "3603")):
            self.assertFalse(Recorded(f"v1.36/errors/{name}").response.endswith(b"0\r\n\r\n"))
            rig = self.rig()
            rig.start(START, f"v1.36/errors/{name}")
            self.assertEqual((await rig.asked(3))[2], f"WATCH {rv}")
            self.assertEqual(rig.status["lastError"], "the server closed the connection")

    async def test_endingServerIsSilent(self) -> None:
        """With SIGTERM an open watch stays open and silent for 50 s: that long nothing is wrong."""
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-cut-sigterm")
        await rig.asked(2)
        await rig.server.until(lambda: rig.status["events"])
        self.assertEqual((rig.status["state"], rig.status["lastError"]), ("watching", ""))
        await rig.asked(3)
        self.assertGreater(rig.times[2], 50)


class OldServerTests(ReplayCase):
    """Kubernetes 1.20."""

    async def test_slicesOfV1beta1(self) -> None:
        """Endpoints have no nodeName and no zone, but ``topology``; their conditions have ``ready`` alone."""
        rig = self.rig(Recorded("v1.20/lists/endpointslices-v1beta1-rv0").resource)
        rig.start("v1.20/lists/endpointslices-v1beta1-rv0")
        await rig.asked(2)
        endpoints = [it for slice in rig.words.state["EndpointSlice"].values() for it in slice.endpoints or ()]
        placed = [it for it in endpoints if it.topology]
        self.assertTrue(placed)
        self.assertLessEqual({it.topology["kubernetes.io/hostname"] for it in placed}, {"node-a", "node-b"})
        self.assertEqual({(it.nodeName, it.zone) for it in endpoints}, {(None, None)})
        conditions = {(it.conditions.serving, it.conditions.terminating) for it in endpoints if it.conditions}
        self.assertEqual(conditions, {(None, None)})

    async def test_noStreamingLists(self) -> None:
        """``sendInitialEvents`` is a 422, and so is no reason to wait: a list at once."""
        rig = self.rig(streaming=True)
        rig.start("v1.20/errors/watch-send-initial-events", "v1.20/watches/services.start")
        self.assertEqual(await rig.asked(3), ["STREAM", "LIST 0", "WATCH 325"])
        self.assertLess(rig.times[1], 0.01)
        self.assertEqual(rig.status["retries"], 0)

    async def test_noDiscoveryV1(self) -> None:
        """``discovery.k8s.io/v1`` is missing, for lists as for watches: v1beta1 at once."""
        older = Resource("EndpointSlice", "/apis/discovery.k8s.io/v1beta1/endpointslices")
        rig = self.rig(Resource(SLICES.kind, SLICES.path, instead=(older,)), streaming=True)
        rig.start("v1.20/errors/404-discovery-v1-watch", "v1.20/errors/404-discovery-v1-list",
                  "v1.20/errors/watch-send-initial-events", "v1.20/lists/endpointslices-v1beta1-selectors")
        self.assertEqual(await rig.asked(5), ["STREAM", "LIST 0", "STREAM", "LIST 0", "WATCH 325"])
        self.assertLess(rig.times[3], 0.1)
        self.assertEqual(rig.state, listed("v1.20/lists/endpointslices-v1beta1-selectors"))

    async def test_badVersionIs500(self) -> None:
        """A version that is none is a 500 there, not a 400: a pause, and again."""
        rig = self.rig()
        rig.start(START, "v1.20/errors/500-resource-version", START)
        self.assertEqual(await rig.asked(4), ["LIST 0", "WATCH 508", "LIST 508", "WATCH 508"])
        self.assertEqual(rig.times[2], 0.8)
