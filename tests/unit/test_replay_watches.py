"""Recorded watches over a real socket, through the real client: what it holds in the end."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fakes.recordings import Recorded, Recording, bodyOf, names
from tests.fakes.replay import Answer, answer, anywhere, asReceived, cutsOf, whole
from tests.shared.replays import ReplayCase, Rig, listed
from twisted_kproxy.sources.stream import Bookmark, WatchEvent, WatchStream

#: Those that start from a list.
FROM_LIST = {
    "v1.36": ("services", "services-selectors", "endpointslices", "endpointslices-selectors", "node"),
    "v1.20": ("services", "endpoints", "endpointslices-v1beta1"),
}
STREAMS = ("services-watchlist", "endpointslices-watchlist", "endpointslices-watchlist-empty")
#: Those that begin with what there is, without a mark where that ends.
FROM_NOTHING = ("services-watch-rv0", "services-watch-rv-unset", "services-watch-accept-gzip")


class FromListTests(ReplayCase):
    """A list, and a watch from there."""

    async def follow(self, version: str, name: str, watch: Answer) -> Rig:
        """Started, until the watch is over and the next one asked for."""
        recording = Recording(name, version)
        rig = self.rig(recording.recorded.resource)
        rig.start(f"{recording.name}.start", watch)
        first, second, third = await rig.asked(3)
        start = recording.expected["startResourceVersion"]
        self.assertEqual((first, second), ("LIST 0", f"WATCH {start}"))
        self.assertEqual(rig.server.requests[1].query["allowWatchBookmarks"], "true")
        for request in rig.server.requests:
            asked = {key: request.query.get(key, "") for key in ("labelSelector", "fieldSelector")}
            self.assertEqual(asked, {key: recording.recorded.query.get(key, "") for key in asked})
            self.assertEqual(request.path, recording.recorded.path)
        self.assertEqual(rig.state, recording.final(), name)
        self.assertEqual(third, f"WATCH {recording.last}")
        self.assertEqual(rig.status["events"], len(recording.expected["sequence"]))
        self.assertEqual((rig.status["lists"], rig.status["retries"], rig.status["rejected"]), (1, 0, {}))
        return rig

    async def test_final(self) -> None:
        """However the bytes are cut, the state in the end is what the server listed then; the next watch goes on."""
        for version, recordings in FROM_LIST.items():
            for name in recordings:
                for cut in (asReceived, whole, anywhere(1, 400), anywhere(2, 7)):
                    await self.follow(version, name, answer(f"{version}/watches/{name}", cut))

    async def test_time(self) -> None:
        """Time passes as it was recorded: the next watch follows at once after the regular end."""
        rig = await self.follow("v1.36", "services", answer("v1.36/watches/services"))
        end = Recorded("v1.36/watches/services").pieces[-1][0]
        self.assertEqual(rig.times, [0.0, 0.0, round(end, 3)])

    async def test_endLists(self) -> None:
        """A list that was made after the watch says nothing new: there is no other word than the first, and events."""
        for version, recordings in FROM_LIST.items():
            for name in recordings:
                rig = await self.follow(version, name, answer(f"{version}/watches/{name}"))
                said = len(rig.words.said)
                rig.server.script("v1.36/errors/watch-compacted-rv", f"{version}/watches/{name}.end")
                # The one that nobody answered is given up first.
                *_, relist, watch = await rig.asked(len(rig.server.requests) + 3)
                end = Recorded(f"{version}/watches/{name}.end").json["metadata"]["resourceVersion"]
                self.assertTrue(relist.startswith("LIST "), relist)
                self.assertEqual(watch, f"WATCH {end}")
                self.assertEqual(rig.words.said[said:], [], name)


class CutTests(ReplayCase):
    """Watches that end before their time, at any place."""

    def rest(self, recorded: Recorded, rv: str, size: int) -> Answer:
        """What a server sends that is asked for everything after a version: headers, and a chunk for each event."""
        head = recorded.response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        lines = [
            line + b"\n" for line in recorded.body.splitlines()
            if int(json.loads(line)["object"]["metadata"]["resourceVersion"]) > int(rv)
        ]
        data = head + b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
        if size >= len(data):
            return Answer([(2.0, data + b"0\r\n\r\n")])
        return Answer([(2.0, data[:size])], 2.5, reset=bool(size % 2))

    async def test_resumes(self) -> None:
        """Cut at any byte, again and again: it goes on from the last whole event, without a list, to the same end."""
        lot = random.Random(5)
        for name in ("services-selectors", "endpointslices-selectors"):
            recording = Recording(name)
            rig = self.rig(recording.recorded.resource)
            rig.start(f"{recording.name}.start")
            # Else one might never come through.
            longest, turns = max(map(len, recording.body.splitlines())), 0
            while int(rv := (await rig.asked(turns + 2))[-1].removeprefix("WATCH ")) < int(recording.last):
                # Only now is it known from where.
                size = lot.randrange(341, 341 + 2 * longest)
                rig.server.say(self.rest(recording.recorded, rv, size))
                turns += 1
            self.assertGreater(turns, 6)
            self.assertEqual(rig.state, recording.final(), name)
            self.assertEqual(rig.status["lists"], 1)

    async def test_cutSigkill(self) -> None:
        """A server that is killed ends a watch without its last chunk: on from the last event, at once."""
        for reset in (False, True):
            rig = self.rig()
            rig.start("v1.36/lists/services-rv-unset", answer("v1.36/errors/watch-cut-sigkill", reset=reset))
            self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "WATCH 3590"])
            self.assertEqual(rig.times, [0.0, 0.0, 2.308])
            self.assertEqual(rig.words.versions("Service")["shop/cart"], "3590")
            self.assertEqual((rig.status["lists"], rig.status["retries"]), (1, 0))
            self.assertIn("the server closed the connection", rig.status["lastError"])

    async def test_cutSigterm(self) -> None:
        """A server that is told to end leaves a watch open and silent, and cuts it: the same, only later."""
        for reset in (False, True):
            rig = self.rig()
            rig.start("v1.36/lists/services-rv-unset", answer("v1.36/errors/watch-cut-sigterm", reset=reset))
            self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "WATCH 3603"])
            self.assertEqual(rig.times, [0.0, 0.0, 50.979])
            self.assertEqual(rig.words.versions("Service")["shop/cart"], "3603")
            self.assertEqual((rig.status["lists"], rig.status["retries"]), (1, 0))

    async def test_cutMidEvent(self) -> None:
        """An event without its end is dropped; of a state that was still coming in nothing counts: a list instead."""
        name = "v1.36/errors/watch-cut-mid-event"
        for cut in (asReceived, whole, anywhere(3)):
            rig = self.rig(Recorded(name).resource, streaming=True)
            rig.start(answer(name, cut), "v1.36/lists/endpointslices-rv0")
            self.assertEqual(await rig.asked(3), ["STREAM", "LIST 0", "WATCH 496"])
            self.assertEqual(rig.state, listed("v1.36/lists/endpointslices-rv0"))
            self.assertEqual(len(rig.words.said), 1)
            # The back-off of 0.8 s after the cut.
            self.assertAlmostEqual(rig.times[1] - 2.027265, 0.8, 2)


class StreamTests(ReplayCase):
    """Watches that begin with what there is."""

    async def test_watchlist(self) -> None:
        """Up to the mark it is one word, from then on a watch; in the end all is as listed."""
        for name in STREAMS:
            recording = Recording(name)
            for cut in cutsOf(recording.recorded):
                rig = self.rig(recording.recorded.resource, streaming=True)
                rig.start(answer(recording.name, cut))
                self.assertEqual(await rig.asked(2), ["STREAM", f"WATCH {recording.last}"])
                self.assertEqual(rig.server.requests[0].query["resourceVersionMatch"], "NotOlderThan")
                self.assertEqual(rig.state, recording.final(), name)
                self.assertEqual((rig.status["streams"], rig.status["lists"], rig.status["retries"]), (1, 0, 0))
                mark = next(i for i, it in enumerate(recording.expected["bookmarks"]) if it["initialEventsEnd"])
                initial = recording.expected["bookmarks"][mark]["index"]
                later = [it for it in recording.expected["sequence"][initial:] if not it.startswith("BOOKMARK")]
                self.assertEqual(len(rig.words.said), 1 + len(later), name)

    async def test_unmarked(self) -> None:
        """A watch that begins with what there is but never marks its end is no streaming list: a list follows."""
        for name in FROM_NOTHING:
            recording = Recording(name)
            rig = self.rig(recording.recorded.resource, streaming=True)
            rig.start(recording.name, "v1.36/lists/services-namespace-media")
            self.assertEqual((await rig.asked(3))[:2], ["STREAM", "LIST 0"])
            self.assertEqual(rig.state, listed("v1.36/lists/services-namespace-media"))
            self.assertEqual(len(rig.words.said), 1)

    async def test_compacted(self) -> None:
        """After "too old", a streaming list from that same version is no error: its state is what counts."""
        rig = self.rig(streaming=True)
        rig.start(
            "v1.36/watches/services-watchlist", "v1.36/errors/watch-compacted-rv",
            "v1.36/errors/watch-watchlist-compacted-rv",
        )
        self.assertEqual(await rig.asked(4), ["STREAM", "WATCH 989", "STREAM 989", "WATCH 3690"])
        recorded = Recorded("v1.36/errors/watch-watchlist-compacted-rv")
        expected = {
            f"{it['metadata']['namespace']}/{it['metadata']['name']}": it["metadata"]["resourceVersion"]
            for it in (json.loads(line)["object"] for line in recorded.body.splitlines())
            if it["metadata"].get("name")
        }
        self.assertEqual(rig.words.versions("Service"), expected)


class EventTests(ReplayCase):
    """The events of every recorded watch, by client and stream alone."""

    async def events(self, rig: Rig, name: str, cut: Any) -> list[WatchEvent]:
        recorded = Recorded(name)
        rig.server.script(answer(name, cut))
        stream = WatchStream(recorded.resource.kind)
        events: list[WatchEvent] = []

        async def follow() -> None:
            watch = await rig.client.watch(recorded.resource, "0", 300)
            await watch.deliver(lambda data: events.extend(stream.feed(data)))

        await rig.run(follow())
        self.assertEqual(stream.close(), 0)
        return events

    async def test_sequence(self) -> None:
        """All of them, in order, however the bytes are cut."""
        for version in ("v1.36", "v1.20"):
            for name in names(version):
                recording = Recording(name, version)
                expected = [
                    it if it.startswith("BOOKMARK") else it.partition(" ")[2] for it in recording.expected["sequence"]
                ]
                rig = self.rig()
                for cut in cutsOf(recording.recorded):
                    events = await self.events(rig, recording.name, cut)
                    told = [f"BOOKMARK {it.rv}" if isinstance(it, Bookmark) else getattr(it, "key", "?")
                            for it in events]
                    self.assertEqual(told, expected, recording.name)

    async def test_fromTheBeginning(self) -> None:
        """A watch from version 1, where the server remembers: all that ever happened, which folds to what is listed."""
        rig = self.rig()
        events = await self.events(rig, "v1.20/errors/watch-rv-1", asReceived)
        state: dict[str, str] = {}
        for event in events:
            if type(event).__name__ == "Gone":
                del state[event.key]  # type: ignore[union-attr]
            else:
                state[event.key] = event.rv  # type: ignore[union-attr]
        items = json.loads(bodyOf(Recorded("v1.20/watches/services.end").response))["items"]
        self.assertEqual(
            state,
            {f"{it['metadata']['namespace']}/{it['metadata']['name']}": it["metadata"]["resourceVersion"]
             for it in items},
        )
