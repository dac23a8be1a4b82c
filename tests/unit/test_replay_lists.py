"""Recorded lists over a real socket, through the real client."""

from __future__ import annotations

from typing import Any

from tests.fakes.recordings import Recorded
from tests.fakes.replay import answer, anywhere, cutsOf, singly
from tests.shared.replays import SERVICES, ReplayCase, listed

#: Those that are a list in one answer.
LISTS = (
    *(f"v1.36/lists/{name}" for name in (
        "services-rv0", "services-rv-unset", "services-rv0-limit5", "services-selectors", "services-namespace-media",
        "services-empty", "services-small-accept-gzip", "services-connection-close", "services-gzip",
        "endpointslices-rv0", "endpointslices-rv-unset", "endpointslices-selectors", "endpointslices-empty",
        "endpointslices-gzip", "endpoints-namespace-kube-system", "node-list-fieldselector",
    )),
    "v1.36/errors/etcd-down-list-rv0",
    *(f"v1.20/lists/{name}" for name in (
        "services-rv0", "services-rv-unset", "endpoints-rv0", "endpoints-selectors", "endpoints-empty",
        "endpointslices-v1beta1-rv0", "endpointslices-v1beta1-selectors", "endpointslices-v1beta1-empty",
        "node-list-fieldselector",
    )),
)


def versions(recorded: Recorded) -> dict[str, str]:
    """Names and resource versions, read without our decoders."""
    metadata = [it["metadata"] for it in recorded.json["items"]]
    return {"/".join(filter(None, (it.get("namespace"), it["name"]))): it["resourceVersion"] for it in metadata}


class ListTests(ReplayCase):
    """Whole lists."""

    async def test_objects(self) -> None:
        """However the bytes are cut: all items with all their fields, and a watch from the list's version."""
        for name in LISTS:
            recorded = Recorded(name)
            for cut in cutsOf(recorded):
                rig = self.rig(recorded.resource)
                rig.start(answer(name, cut))
                version = recorded.json["metadata"]["resourceVersion"]
                self.assertEqual(await rig.asked(2), ["LIST 0", f"WATCH {version}"], name)
                self.assertEqual(rig.state, listed(name), name)
                self.assertEqual(rig.words.versions(recorded.resource.kind), versions(recorded), name)
                self.assertEqual(rig.status["rejected"], {})
                self.assertEqual(len(rig.words.said), 1)

    async def test_empty(self) -> None:
        """A list without items is a word, too: there is nothing."""
        for name in ("v1.36/lists/services-empty", "v1.36/lists/endpointslices-empty",
                     "v1.20/lists/endpoints-empty", "v1.20/lists/endpointslices-v1beta1-empty"):
            rig = self.rig(Recorded(name).resource)
            rig.start(answer(name, singly))
            await rig.asked(2)
            (word,) = rig.words.said
            self.assertEqual((word.objects, word.rejected), ({}, {}))  # type: ignore[union-attr]

    async def test_gzip(self) -> None:
        """Lists are asked for compressed, watches are not; what comes compressed is inflated, at any borders."""
        for name, count in (("services-gzip", 329), ("endpointslices-gzip", 348)):
            recorded = Recorded(f"v1.36/lists/{name}")
            for seed in range(4):
                rig = self.rig(recorded.resource)
                rig.start(answer(recorded.name, anywhere(seed, 300)))
                await rig.asked(2)
                self.assertEqual([it.headers["accept-encoding"] for it in rig.server.requests], ["gzip", "identity"])
                self.assertEqual(len(rig.state), count)

    async def test_gzipCut(self) -> None:
        """A compressed list that is cut anywhere is refused as a whole."""
        name = "v1.36/lists/services-gzip"
        length = len(Recorded(name).response)
        for size in (450, length // 2, length - 5, length - 20):
            rig = self.rig()
            rig.start(answer(name, length=size), "v1.36/lists/services-rv0")
            self.assertEqual((await rig.asked(3))[1:], ["LIST 0", "WATCH 505"])
            self.assertEqual(rig.state, listed("v1.36/lists/services-rv0"))
            self.assertEqual(len(rig.words.said), 1)

    async def test_connectionClose(self) -> None:
        """An answer after which the server closes the connection is complete by its length."""
        rig = self.rig(Recorded("v1.36/lists/services-connection-close").resource)
        rig.start("v1.36/lists/services-connection-close")
        self.assertEqual(await rig.asked(2), ["LIST 0", "WATCH 508"])
        self.assertEqual(list(rig.state), ["media/rtp"])
        self.assertEqual(rig.status["retries"], 0)

    async def test_otherKinds(self) -> None:
        """A Table, and metadata alone, are no lists of Services: refused, and asked for again."""
        for name, kind in (("v1.36/lists/services-table", "Table"),
                           ("v1.36/lists/services-metadata-only", "PartialObjectMetadataList"),
                           ("v1.36/watches/endpointslices-table.start", "Table")):
            rig = self.rig(Recorded(name).resource)
            rig.start(name)
            self.assertEqual(await rig.asked(2), ["LIST 0", "LIST 0"])
            self.assertEqual(rig.words.said, [])
            self.assertIn(f"is of kind {kind}, not", rig.status["lastError"])
            self.assertEqual(rig.times, [0.0, 0.8])
            self.assertEqual({it.headers["accept"] for it in rig.server.requests}, {"application/json"})

    async def test_tableEvents(self) -> None:
        """Events that carry Tables are no objects: nothing is said of them, and the watch goes on."""
        name = "v1.36/watches/endpointslices-table"
        rig = self.rig(Recorded(name).resource)
        rig.start("v1.36/lists/endpointslices-empty", name)
        self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "WATCH 1103"])
        self.assertEqual([type(it).__name__ for it in rig.words.said], ["Replaced"])
        self.assertEqual(rig.state, {})


class PageTests(ReplayCase):
    """Lists in pages."""

    async def pages(self, *names: str) -> Any:
        rig = self.rig(Recorded(names[0]).resource)
        rig.start(*names)
        tokens = [Recorded(name).json["metadata"].get("continue", "") for name in names]
        version = Recorded(names[0]).json["metadata"]["resourceVersion"]
        asked = await rig.asked(len(names) + 1)
        self.assertEqual(asked, ["LIST 0", *(f"PAGE {it}" for it in tokens[:-1]), f"WATCH {version}"])
        for request in rig.server.requests[1:-1]:
            # No version goes with a token: that would be a 400.
            self.assertEqual(sorted(request.query), ["continue", "limit"])
        self.assertEqual(rig.state, listed(*names))
        self.assertEqual(len(rig.words.said), 1)
        return rig

    async def test_services(self) -> None:
        """Page by page, each by the token of the one before; all of it is one word, as of the first page's version."""
        rig = await self.pages(*(f"v1.36/lists/services-paged-{it:02}" for it in range(1, 6)))
        self.assertEqual(rig.state, listed("v1.36/lists/services-rv-unset"))

    async def test_slices(self) -> None:
        """The same for slices, whose last page has a single item."""
        rig = await self.pages(*(f"v1.36/lists/endpointslices-paged-{it:02}" for it in range(1, 9)))
        self.assertEqual(rig.state, listed("v1.36/lists/endpointslices-rv-unset"))

    async def test_old(self) -> None:
        """The same of an old server."""
        rig = await self.pages(*(f"v1.20/lists/services-paged-{it:02}" for it in range(1, 4)))
        self.assertEqual(rig.state, listed("v1.20/lists/services-rv-unset"))

    async def test_cutPage(self) -> None:
        """A page that is cut costs the whole list, and only that: it begins anew."""
        first, second = (answer(f"v1.36/lists/services-paged-{it:02}") for it in (1, 2))
        cut = answer("v1.36/lists/services-paged-02", length=2000)
        rig = self.rig()
        rig.start(first, cut, first, second)
        asked = await rig.asked(5)
        self.assertEqual([it.split()[0] for it in asked], ["LIST", "PAGE", "LIST", "PAGE", "PAGE"])
        self.assertEqual(rig.words.said, [])

    async def test_exact(self) -> None:
        """A page of an exact version reads as any other."""
        rig = self.rig()
        rig.server.script("v1.36/lists/services-exact-rv")
        listing = await rig.run(rig.client.list(SERVICES, "508", 3))
        self.assertEqual((len(listing.objects), listing.rv, bool(listing.next)), (3, "508", True))

    async def test_afterRestart(self) -> None:
        """A token from before the server's restart is still good, as long as its version is there."""
        first = Recorded("v1.36/errors/continue-after-restart").query["continue"]
        rig = self.rig()
        rig.server.script("v1.36/errors/continue-after-restart")
        listing = await rig.run(rig.client.list(SERVICES, limit=5, next=first))
        self.assertEqual((len(listing.objects), listing.rv, bool(listing.next)), (5, "3588", True))

    async def test_expired(self) -> None:
        """
        A token whose version is gone: one whole list, not the rest by the token that comes with the refusal, which
        would be as of another time.
        """
        for version, refusal, start, whole in (
            ("508", "v1.36/errors/410-continue-expired", "v1.36/lists/services-paged-01",
             "v1.36/lists/services-rv-unset"),
            ("325", "v1.20/errors/410-continue-expired", "v1.20/lists/services-paged-01",
             "v1.20/lists/services-rv-unset"),
            ("508", "v1.36/errors/400-continue", "v1.36/lists/services-paged-01", "v1.36/lists/services-rv-unset"),
            ("325", "v1.20/errors/400-continue", "v1.20/lists/services-paged-01", "v1.20/lists/services-rv-unset"),
            ("508", "v1.36/errors/400-continue-with-rv", "v1.36/lists/services-paged-01",
             "v1.36/lists/services-rv-unset"),
        ):
            rig = self.rig()
            rig.start(start, refusal, whole)
            token = Recorded(start).json["metadata"]["continue"]
            self.assertEqual(await rig.asked(4), ["LIST 0", f"PAGE {token}", "LIST 0", f"WATCH {version}"])
            self.assertNotIn("limit", rig.server.requests[2].query)
            self.assertEqual(rig.state, listed(whole))
            self.assertEqual((len(rig.words.said), rig.status["retries"]), (1, 0))

    async def test_expiredFollowed(self) -> None:
        """What going on by that other token would give: a page of another version than the first one's."""
        refusal = Recorded("v1.36/errors/410-continue-expired").json
        followed = Recorded("v1.36/errors/410-continue-expired-followed")
        self.assertEqual(followed.query["continue"], refusal["metadata"]["continue"])
        rig = self.rig()
        rig.server.script(followed.name)
        listing = await rig.run(rig.client.list(SERVICES, limit=5, next=refusal["metadata"]["continue"]))
        self.assertEqual(listing.rv, "3690")
        self.assertNotEqual(listing.rv, Recorded("v1.36/lists/services-paged-01").json["metadata"]["resourceVersion"])
