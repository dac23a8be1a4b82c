"""Recorded servers before a whole API source: three kinds at once, over real sockets, with and without TLS."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from tests.fakes.pki import Authority
from tests.fakes.recordings import Recording, comparable
from tests.fakes.replay import Answer, Asked, ReplayServer, answer, anywhere
from tests.shared.replays import listed
from tests.shared.sources import Words
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.core.values import Replaced
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.api import ApiSource, accessFor

SERVICES, NODES, ENDPOINTS = "/api/v1/services", "/api/v1/nodes", "/api/v1/endpoints"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"
OLD_SLICES = "/apis/discovery.k8s.io/v1beta1/endpointslices"


class SourceCase(TestCase):
    """A source and its server."""

    timeout = 60
    tls: Any = None
    options: dict[str, Any] = {}

    def started(self, scripts: dict[str, list[Answer | str | None]], **options: Any) -> None:
        self.clock = Clock()
        self.words = Words()
        self.server = ReplayServer(self.clock, self.tls)
        for path, answers in scripts.items():
            self.server.script(*answers, path=path)
        self.server.script(*["v1.36/errors/404-group"] * 40, path=CIDRS)
        section = ApiOptions("main", server=self.server.url, **{**self.options, **options})
        self.agent = ApiAgent(reactor, accessFor("main", section, {}), self.server.endpoint)
        self.source: Any = ApiSource(
            self.clock, "main", section, self.words, nodeName="node-a", agent=self.agent, random=lambda: 0.0,
        )
        self.source.startService()
        self.addCleanup(lambda: Deferred.fromCoroutine(self.close()))

    async def close(self) -> None:
        await self.source.stopService()
        await self.server.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    @property
    def requests(self) -> list[Asked]:
        """Those for what every server has."""
        return [it for it in self.server.requests if it.path != CIDRS]

    def asked(self, path: str) -> list[str]:
        return [it.brief for it in self.server.requests if it.path == path]

    async def until(self, reached: Callable[[], Any]) -> None:
        await self.server.until(reached)

    def state(self, kind: str) -> dict[str, Any]:
        return {key: comparable(it) for key, it in self.words.state.get(kind, {}).items()}

    def status(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = self.source.status()["kinds"][kind]
        return found


class NewestTests(SourceCase):
    """A server of today."""

    def scripts(self, *cut: Any) -> dict[str, list[Answer | str | None]]:
        watches = {SERVICES: "services-selectors", SLICES: "endpointslices-selectors", NODES: "node"}
        return {
            path: [f"v1.36/watches/{name}.start", answer(f"v1.36/watches/{name}", *cut)]
            for path, name in watches.items()
        }

    async def follow(self, *cut: Any, **options: Any) -> None:
        self.started(self.scripts(*cut), watchList="off", **options)
        await self.until(lambda: len(self.requests) >= 9)
        for path, name in ((SERVICES, "services-selectors"), (SLICES, "endpointslices-selectors"), (NODES, "node")):
            recording = Recording(name)
            self.assertEqual(self.asked(path), ["LIST 0", "WATCH 554", f"WATCH {recording.last}"])
            self.assertEqual(self.state(recording.kind), recording.final())
        self.assertEqual({self.status(kind)["retries"] for kind in self.source.kinds}, {0})

    async def test_all(self) -> None:
        """Services, slices and the node, each with its list and its watch, for the same two minutes."""
        await self.follow()

    async def test_anyBorders(self) -> None:
        """The same, cut by lot."""
        await self.follow(anywhere(11, 300))

    async def test_streams(self) -> None:
        """The whole state as the beginning of a watch, for each kind for which the server can."""
        self.started({
            SERVICES: ["v1.36/watches/services-watchlist"],
            SLICES: ["v1.36/watches/endpointslices-watchlist"],
            NODES: ["v1.36/errors/422-send-initial-events", "v1.36/lists/node-list-fieldselector"],
        }, watchList="auto")
        await self.until(lambda: len(self.requests) >= 7)
        self.assertEqual(self.asked(SERVICES), ["STREAM", "WATCH 989"])
        self.assertEqual(self.asked(SLICES), ["STREAM", f"WATCH {Recording('endpointslices-watchlist').last}"])
        self.assertEqual(self.asked(NODES), ["STREAM", "LIST 0", "WATCH 506"])
        self.assertEqual(self.state("Service"), Recording("services-watchlist").final())
        self.assertEqual(self.state("EndpointSlice"), Recording("endpointslices-watchlist").final())
        self.assertEqual(self.state("Node"), listed("v1.36/lists/node-list-fieldselector"))

    async def test_startingServer(self) -> None:
        """A server that is starting refuses who has the right: nothing is said, and it is asked until it agrees."""
        name = "v1.36/errors/startup-list-0-403"
        lists = {SERVICES: "services-selectors", SLICES: "endpointslices-selectors", NODES: "node-list-fieldselector"}
        self.started({path: [name] * 3 + [f"v1.36/lists/{it}"] for path, it in lists.items()}, watchList="off")
        await self.until(lambda: len(self.requests) >= 9)
        self.assertEqual(self.words.said, [])
        self.assertEqual(set(self.source.ages().values()), {None})
        self.assertIn("403 Forbidden", self.status("Service")["lastError"])
        await self.until(lambda: len(self.requests) >= 15)
        self.assertEqual(sorted(it.kind for it in self.words.said), ["EndpointSlice", "Node", "Service"])
        self.assertTrue(all(isinstance(it, Replaced) for it in self.words.said))
        self.assertEqual(self.state("Service"), listed("v1.36/lists/services-selectors"))


class WrongSchemeTests(SourceCase):
    """A URL that does not fit the port."""

    async def test_plainHttpToTlsPort(self) -> None:
        """http:// before a port that speaks TLS: the status says so, in the server's own words."""
        self.started({path: ["v1.36/errors/plain-http-to-tls-port"] for path in (SERVICES, SLICES, NODES)})
        await self.until(lambda: len(self.asked(SERVICES)) >= 2)
        self.assertIn("Client sent an HTTP request to an HTTPS server", self.status("Service")["lastError"])


class OldTests(SourceCase):
    """A server of 2020: slices are v1beta1, and there are no streaming lists."""

    REFUSED = "v1.20/errors/watch-send-initial-events"

    def scripts(self) -> dict[str, list[Answer | str | None]]:
        return {
            SERVICES: [self.REFUSED, "v1.20/watches/services.start", "v1.20/watches/services"],
            SLICES: ["v1.20/errors/404-discovery-v1-watch", "v1.20/errors/404-discovery-v1-list"],
            OLD_SLICES: [
                self.REFUSED, "v1.20/watches/endpointslices-v1beta1.start", "v1.20/watches/endpointslices-v1beta1",
            ],
            NODES: [self.REFUSED, "v1.20/lists/node-list-fieldselector"],
        }

    async def test_all(self) -> None:
        """At once the older API, and lists: what is there is known before a second has passed; then it is followed."""
        self.started(self.scripts(), watchList="auto")
        await self.until(lambda: len(self.words.said) >= 3)
        self.assertLess(self.clock.seconds(), 1.0)
        await self.until(lambda: len(self.asked(OLD_SLICES)) >= 4 and len(self.asked(SERVICES)) >= 4)
        self.assertEqual(self.asked(SLICES), ["STREAM", "LIST 0"])
        self.assertEqual(self.asked(OLD_SLICES), ["STREAM", "LIST 0", "WATCH 326", "WATCH 410"])
        self.assertEqual(self.asked(SERVICES), [
            "STREAM", "LIST 0", "WATCH 325", f"WATCH {Recording('services', 'v1.20').last}",
        ])
        self.assertEqual(self.state("EndpointSlice"), Recording("endpointslices-v1beta1", "v1.20").final())
        self.assertEqual(self.state("Service"), Recording("services", "v1.20").final())
        self.assertEqual(self.status("EndpointSlice")["reads"], OLD_SLICES)

    async def test_upgrade(self) -> None:
        """Ten minutes later the best API is asked for: still missing; again after ten more, when it is there."""
        silent = answer("v1.36/errors/watch-too-large-rv", stretch=60)
        scripts = self.scripts()
        scripts[SLICES] += ["v1.20/errors/404-discovery-v1-list", "v1.36/lists/endpointslices-selectors",
                            "v1.36/lists/endpointslices-selectors"]
        scripts[OLD_SLICES] += [silent] * 6
        for path in (SERVICES, NODES):
            scripts[path] += [silent] * 8
        self.started(scripts, watchList="auto")
        await self.until(lambda: len(self.asked(SLICES)) >= 6)
        probes = [it for it in self.requests if it.path == SLICES][2:4]
        self.assertEqual([it.query["limit"] for it in probes], ["1", "1"])
        self.assertTrue(600 <= probes[0].at < 700 and 1200 <= probes[1].at < 1310, [it.at for it in probes])
        self.assertEqual(self.asked(SLICES)[4:], ["LIST 0", "WATCH 508"])
        self.assertEqual(self.state("EndpointSlice"), listed("v1.36/lists/endpointslices-selectors"))
        self.assertEqual(self.status("EndpointSlice")["reads"], SLICES)

    async def test_endpoints(self) -> None:
        """A server without any slices: both are refused, and Endpoints are read, followed, and said as such."""
        scripts = self.scripts()
        scripts[OLD_SLICES] = ["v1.36/errors/404-group", "v1.36/errors/404-group"]
        scripts[ENDPOINTS] = [self.REFUSED, "v1.20/watches/endpoints.start", "v1.20/watches/endpoints"]
        self.started(scripts, watchList="auto")
        await self.until(lambda: len(self.asked(ENDPOINTS)) >= 4)
        recording = Recording("endpoints", "v1.20")
        self.assertEqual(self.asked(ENDPOINTS), ["STREAM", "LIST 0", "WATCH 326", f"WATCH {recording.last}"])
        self.assertEqual(self.state("Endpoints"), recording.final())
        self.assertEqual(self.state("EndpointSlice"), {})


class TlsTests(NewestTests):
    """The same over TLS, where each piece is a record of its own."""

    def setUp(self) -> None:
        authority = Authority()
        certificate, key = authority.issue("api", "127.0.0.1")
        self.tls = PrivateCertificate.loadPEM(certificate + key).options()
        ca = os.path.abspath(self.mktemp())
        with open(ca, "wb") as file:
            file.write(authority.certificate)
        self.token = os.path.abspath(self.mktemp())
        self.write("one")
        self.options = {"caFile": ca, "tokenFile": self.token}

    def write(self, token: str) -> None:
        with open(self.token, "w") as file:
            file.write(token)

    async def test_unauthorized(self) -> None:
        """After a 401 the token's file is read anew, whatever its age; what is known stays."""
        scripts = self.scripts()
        for answers in scripts.values():
            answers[1:] = ["v1.36/errors/401-bad-token", answers[0]]
        self.started(scripts, watchList="off")
        await self.until(lambda: len(self.requests) >= 6)
        self.write("two")
        said = len(self.words.said)
        await self.until(lambda: len(self.requests) >= 12)
        sent = [it.headers["authorization"] for it in self.requests]
        self.assertEqual(sent, ["Bearer one"] * 6 + ["Bearer two"] * 6)
        self.assertEqual(self.asked(SERVICES), ["LIST 0", "WATCH 554", "LIST 554", "WATCH 554"])
        self.assertLess(self.clock.seconds(), 1.0)
        self.assertEqual(len(self.words.said), said)
        self.assertEqual((said, self.status("Service")["retries"]), (3, 1))
        self.assertNotIn("Bearer", str(self.source.status()))
