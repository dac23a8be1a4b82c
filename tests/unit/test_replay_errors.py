"""Recorded errors over a real socket: what the real client does next, and when."""

from __future__ import annotations

from tests.fakes.recordings import Recorded
from tests.fakes.replay import answer, anywhere, cutsOf, singly
from tests.shared.replays import ReplayCase, listed

START = "v1.36/lists/services-rv-unset"

#: Refusals after which a client asks again later, for the same, with a part of what it tells operators.
REFUSALS = {
    "v1.36/errors/400-resource-version": "400 BadRequest: ",
    "v1.36/errors/400-limit": "400 BadRequest: ",
    "v1.36/errors/400-continue": "400 BadRequest: invalid continue token",
    "v1.36/errors/400-continue-with-rv": "continue key is not valid",
    "v1.36/errors/400-label-selector": "400 BadRequest: ",
    "v1.36/errors/400-field-selector": "field label not supported: spec.nosuch",
    "v1.36/errors/400-timeout-seconds": "400 BadRequest: ",
    "v1.36/errors/401-bad-token": "401 Unauthorized: Unauthorized",
    "v1.36/errors/403-anonymous": '403 Forbidden: services is forbidden: User "system:anonymous" cannot list',
    "v1.36/errors/403-secrets": "403 Forbidden: secrets is forbidden",
    "v1.36/errors/403-watch": "cannot watch resource",
    "v1.36/errors/startup-list-0-403": 'User "viewer" cannot list resource "services"',
    "v1.36/errors/startup-list-unset-0-403": 'User "viewer" cannot list resource "services"',
    "v1.36/errors/startup-watch-0-403": 'User "viewer" cannot watch resource "services"',
    "v1.36/errors/404-group": "404: 404 page not found",
    "v1.36/errors/404-group-version": "404 NotFound: the server could not find the requested resource",
    "v1.36/errors/404-resource": "404 NotFound: the server could not find the requested resource",
    "v1.36/errors/404-object": 'services "no-such" not found',
    "v1.36/errors/404-root": "404",
    "v1.36/errors/405-method": "405 MethodNotAllowed",
    "v1.36/errors/406-accept": "406 NotAcceptable: 406: Not Acceptable Available representations: application/json,",
    "v1.36/errors/422-resource-version-match": "resourceVersionMatch is forbidden unless resourceVersion is provided",
    "v1.36/errors/422-send-initial-events": "sendInitialEvents requires setting resourceVersionMatch",
    "v1.36/errors/500-watch-resource-version": '500: resourceVersion: Invalid value: "abc"',
    "v1.36/errors/etcd-down-list-rv-unset": "504 Timeout: Timeout: request did not complete within the allotted",
    "v1.36/errors/plain-http-to-tls-port": "Client sent an HTTP request to an HTTPS server",
    "v1.20/errors/400-continue": "400 BadRequest",
    "v1.20/errors/401-bad-token": "401 Unauthorized: Unauthorized",
    "v1.20/errors/403-secrets": "403 Forbidden: secrets is forbidden",
    "v1.20/errors/404-discovery-v1-list": "404 NotFound: the server could not find the requested resource",
    "v1.20/errors/404-discovery-v1-watch": "404 NotFound: the server could not find the requested resource",
    "v1.20/errors/404-discovery-v1-resources": "404",
    "v1.20/errors/500-resource-version": '500: resourceVersion: Invalid value: "abc"',
    "v1.20/errors/watch-send-initial-events": "resourceVersionMatch is forbidden for watch",
}


class RefusalTests(ReplayCase):
    """Answers that say no."""

    async def test_list(self) -> None:
        """A list that is refused is asked for again, later each time, for ever; the reason is in the status."""
        for name, told in REFUSALS.items():
            for cut in cutsOf(Recorded(name), ()):
                rig = self.rig()
                rig.start(answer(name, cut), name, name, START)
                self.assertEqual(await rig.asked(3), ["LIST 0"] * 3, name)
                self.assertEqual([round(it, 1) for it in rig.times], [0.0, 0.8, 2.4], name)
                self.assertIn(told, rig.status["lastError"], name)
                self.assertEqual(rig.words.said, [])
                self.assertEqual((await rig.asked(5))[3:], ["LIST 0", "WATCH 508"], name)
                self.assertEqual(rig.state, listed(START))

    async def test_watch(self) -> None:
        """A watch that is refused takes nothing back: a list, at least as new as what is known, and on from there."""
        for name, told in REFUSALS.items():
            rig = self.rig()
            rig.start(START, name)
            self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "LIST 508"], name)
            self.assertEqual([round(it, 1) for it in rig.times], [0.0, 0.0, 0.8], name)
            self.assertIn(told, rig.status["lastError"], name)
            self.assertEqual(rig.state, listed(START))
            self.assertEqual(len(rig.words.said), 1)
            self.assertNotIn("limit", rig.server.requests[2].query)

    async def test_listOfAVersion(self) -> None:
        """A version that a server will not take (400) is not asked for again: the newest state instead."""
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-compacted-rv", "v1.36/errors/400-resource-version", START)
        self.assertEqual(await rig.asked(5), ["LIST 0", "WATCH 508", "LIST 508", "LIST", "WATCH 508"])
        self.assertEqual(len(rig.words.said), 1)

    async def test_badVersionOfOld(self) -> None:
        """An old server says 500 to the same: nothing is lost, and it is asked again."""
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-compacted-rv", "v1.20/errors/500-resource-version", START)
        self.assertEqual(await rig.asked(5), ["LIST 0", "WATCH 508", "LIST 508", "LIST 508", "WATCH 508"])
        self.assertEqual(len(rig.words.said), 1)

    async def test_tooManyRequests(self) -> None:
        """429: the same request again after just the second that the server asked for; a watch costs no list."""
        for name in ("v1.36/errors/429-max-in-flight", "v1.36/errors/429-priority-and-fairness"):
            for cut in cutsOf(Recorded(name)):
                rig = self.rig()
                rig.start(answer(name, cut), name, START, answer(name, cut), name, "v1.36/watches/services")
                asked = await rig.asked(6)
                self.assertEqual(asked, [*["LIST 0"] * 3, *["WATCH 508"] * 3])
                self.assertEqual(rig.times, [0.0, 1.0, 2.0, 2.0, 3.0, 4.0])
                self.assertIn("Too many requests, please try again later.", rig.status["lastError"])

    async def test_tooManyForLong(self) -> None:
        """After ten times the client falls back on its own, longer pauses."""
        rig = self.rig()
        rig.start(*["v1.36/errors/429-max-in-flight"] * 12, START)
        await rig.asked(14)
        pauses = [round(b - a, 1) for a, b in zip(rig.times, rig.times[1:13], strict=False)]
        # The first time and ten repetitions; then the first pause of its own, which is not shorter either.
        self.assertEqual(pauses, [1.0] * 12)
        self.assertEqual(rig.state, listed(START))

    async def test_notAcceptableStream(self) -> None:
        """Refused as a stream (422, or as an old server does): a list at once, and no stream for an hour."""
        for name in ("v1.36/errors/422-send-initial-events", "v1.36/errors/422-resource-version-match",
                     "v1.20/errors/watch-send-initial-events", "v1.36/errors/406-accept",
                     "v1.36/errors/405-method"):
            rig = self.rig(streaming=True)
            rig.start(name, START, "v1.36/errors/watch-compacted-rv", START)
            self.assertEqual(await rig.asked(5), ["STREAM", "LIST 0", "WATCH 508", "LIST 508", "WATCH 508"], name)
            self.assertLess(rig.times[1], 0.01)

    async def test_forbiddenStream(self) -> None:
        """Refused for who we are, or for how much is going on: that is no reason to give streams up."""
        for name in ("v1.36/errors/startup-watch-0-403", "v1.36/errors/401-bad-token"):
            rig = self.rig(streaming=True)
            rig.start(name, "v1.36/watches/services-watchlist")
            self.assertEqual(await rig.asked(3), ["STREAM", "STREAM", "WATCH 989"], name)
            self.assertEqual(rig.times[:2], [0.0, 0.8])


class ExpiredTests(ReplayCase):
    """Versions that the server no longer has, or not yet."""

    async def test_watch(self) -> None:
        """"Too old" is 200 and one ERROR event: a pause, since all nodes hear it at once, and a list."""
        for name in ("v1.36/errors/watch-rv-1", "v1.36/errors/watch-compacted-rv",
                     "v1.36/errors/watch-after-restart-old-rv", "v1.20/errors/watch-rv-1-after-churn",
                     "v1.20/errors/watch-compacted-rv"):
            for cut in cutsOf(Recorded(name)):
                rig = self.rig()
                rig.start(START, answer(name, cut), START)
                self.assertEqual(await rig.asked(4), ["LIST 0", "WATCH 508", "LIST 508", "WATCH 508"], name)
                self.assertTrue(0.8 <= rig.times[2] <= 0.801 + Recorded(name).pieces[-1][0], rig.times)
                self.assertEqual(len(rig.words.said), 1)
                self.assertEqual((rig.status["retries"], rig.status["lists"]), (1, 2))
                self.assertIn("410", rig.status["lastError"])

    async def test_list(self) -> None:
        """410 for a list: the newest state, at once."""
        for name in ("v1.36/errors/410-list-exact-compacted", "v1.36/errors/410-continue-expired",
                     "v1.20/errors/410-continue-expired"):
            rig = self.rig()
            rig.start(START, "v1.36/errors/watch-compacted-rv", name, "v1.36/watches/services.start")
            asked = await rig.asked(5)
            self.assertEqual(asked, ["LIST 0", "WATCH 508", "LIST 508", "LIST", "WATCH 554"], name)
            self.assertEqual(rig.times[2], rig.times[3])
            # What is the newest state is asked for in pages, of a limit of its own.
            self.assertEqual(rig.server.requests[3].query, {"limit": "500"})

    async def test_listTooNew(self) -> None:
        """504 for a version that the server has not seen: its own newest state at once, whatever Retry-After says."""
        for name in ("v1.36/errors/list-too-large-rv", "v1.20/errors/504-too-large-rv"):
            for cut in cutsOf(Recorded(name)):
                rig = self.rig()
                rig.start(START, "v1.36/errors/watch-compacted-rv", answer(name, cut), START)
                asked = await rig.asked(5)
                self.assertEqual(asked, ["LIST 0", "WATCH 508", "LIST 508", "LIST", "WATCH 508"], name)
                self.assertEqual(rig.times[2], rig.times[3])

    async def test_watchTooNew(self) -> None:
        """
        On a watch, a version of the future is silence until a regular end. Only the comparison after half an hour
        finds that the server went back, as after restoring a backup; until then, all stays.
        """
        silent = answer("v1.36/errors/watch-too-large-rv", stretch=60)
        rig = self.rig()
        rig.start("v1.36/watches/services.end", *[silent] * 6, "v1.36/watches/services.start")
        asked = await rig.asked(9)
        self.assertEqual(asked, ["LIST 0", *["WATCH 951"] * 6, "LIST", "WATCH 554"])
        self.assertTrue(1800 <= rig.times[7] < 1810, rig.times[7])
        self.assertEqual(rig.state, listed("v1.36/watches/services.start"))


class CutListTests(ReplayCase):
    """Lists that end before their end."""

    async def test_recorded(self) -> None:
        """Of a list whose server was killed nothing is believed; it is asked for again."""
        name = "v1.36/errors/list-cut-mid-body"
        for reset in (False, True):
            for cut in (None, anywhere(1), anywhere(2)):
                rig = self.rig()
                rig.start(answer(name, *filter(None, [cut]), reset=reset), START)
                self.assertEqual(await rig.asked(3), ["LIST 0", "LIST 0", "WATCH 508"])
                self.assertAlmostEqual(rig.times[1], 2.860827, 2)
                self.assertEqual(rig.state, listed(START))
                self.assertEqual(len(rig.words.said), 1)

    async def test_anywhere(self) -> None:
        """Nor of one that is cut anywhere else: in its headers, within a chunk, before the last one."""
        for name in ("v1.36/lists/services-rv-unset", "v1.36/lists/services-namespace-media"):
            length = len(Recorded(name).response)
            for size in (1, 100, 340, 343, 400, length // 2, length - 6, length - 1):
                rig = self.rig(Recorded(name).resource)
                rig.start(answer(name, length=size, reset=bool(size % 2)), name)
                self.assertEqual(await rig.asked(3), ["LIST 0", "LIST 0", "WATCH 508"], (name, size))
                self.assertEqual(rig.times, [0.0, 0.8, 0.8])
                self.assertEqual(len(rig.words.said), 1)

    async def test_knownStays(self) -> None:
        """A list that is cut takes back nothing of what is known."""
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-compacted-rv", "v1.36/errors/list-cut-mid-body")
        await rig.asked(4)
        self.assertEqual(rig.state, listed(START))


class EndTests(ReplayCase):
    """How watches end."""

    async def test_cleanEnd(self) -> None:
        """The last chunk is the regular end: on from the same version, at once, and no error."""
        for cut in (singly, anywhere(1)):
            rig = self.rig(Recorded("v1.36/errors/watch-timeout-clean-end").resource)
            rig.start("v1.36/lists/services-empty", answer("v1.36/errors/watch-timeout-clean-end", cut))
            self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "WATCH 508"])
            self.assertEqual(rig.times, [0.0, 0.0, 3.002])
            self.assertEqual((rig.status["retries"], rig.status["lastError"]), (0, ""))

    async def test_whileEtcdStops(self) -> None:
        """A server whose etcd is gone goes on with a watch, silently, and ends it as usual: all stays as known."""
        before = {key: it["metadata"][3] for key, it in listed(START).items()}
        rig = self.rig()
        rig.start(START, "v1.36/errors/watch-while-etcd-stops")
        self.assertEqual(await rig.asked(3), ["LIST 0", "WATCH 508", "WATCH 3688"])
        self.assertEqual(rig.times, [0.0, 0.0, 14.002])
        self.assertEqual(rig.words.versions("Service"), {**before, "shop/cart": "3688"})
        self.assertEqual(rig.status["retries"], 0)

    async def test_etcdDown(self) -> None:
        """Without etcd, lists out of the cache are served, others are 504: back off, and what is known stays."""
        rig = self.rig(Recorded("v1.36/errors/etcd-down-list-rv0").resource)
        rig.start(
            "v1.36/errors/etcd-down-list-rv0", "v1.36/errors/watch-compacted-rv",
            *["v1.36/errors/etcd-down-list-rv-unset"] * 4,
        )
        self.assertEqual(await rig.asked(7), ["LIST 0", "WATCH 3754", *["LIST 3754"] * 5])
        pauses = [round(b - a, 1) for a, b in zip(rig.times[1:], rig.times[2:], strict=False)]
        self.assertEqual(pauses, [0.8, 1.6, 3.2, 6.4, 12.8])
        self.assertEqual(list(rig.state), ["media/rtp"])
