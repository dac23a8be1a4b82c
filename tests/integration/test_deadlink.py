"""Links to an API server that die without a word, on a real network: how long it takes until the source knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from tests.fakes.apiserver import FakeApi
from tests.fakes.network import SmallRig
from tests.shared.sources import Words, manifest
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.api import ApiSource
from twisted_kproxy.sources.backoff import Backoff
from twisted_kproxy.sources.client import Limits
from twisted_kproxy.sources.credentials import ApiAccess

PORT = 6443


class DeadLinkTests(TestCase):
    """The source on the node, the API server on another host, nft between them. Limits are as short as tests need."""

    skip = None if os.geteuid() == 0 else "network namespaces need root"
    timeout = 60
    limits = Limits(headers=1.0, idle=1.0, total=3.0, silence=1.5, grace=1.0, initial=1.0, initialTotal=3.0)

    def setUp(self) -> None:
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)
        self.api = FakeApi(reactor, bookmarkSeconds=0.5)
        self.api.listen(self.rig.address("x"), PORT, within=lambda: self.rig.open("x"))
        self.addCleanup(self.api.close)
        self.api.store.apply(manifest("web"))
        self.words = Words()

    def make(self, watchList: str = "auto") -> None:
        """The source, not started."""
        self.agent = ApiAgent(reactor, ApiAccess(self.api.url, "test"), self.endpoint)
        self.source = ApiSource(
            reactor, "main", ApiOptions("main", server=self.api.url, watchList=watchList), self.words,
            nodeName="n0", agent=self.agent, random=lambda: 0.0, limits=self.limits,
        )
        self.addCleanup(self.source.stopService)
        # Pauses as they are, but shorter.
        for reflector in self.source._reflectors.values():
            reflector._backoff = Backoff(reactor, lambda: 0.0, first=0.2, most=0.5)  # type: ignore[arg-type]

    def endpoint(self, reactor: Any, host: str, port: int, timeout: float) -> Any:
        """Connects from the node's namespace."""
        rig, inner = self.rig, TCP4ClientEndpoint(reactor, host, port, timeout=timeout)

        class Inside:
            def connect(self, factory: Any) -> Deferred[Any]:
                with rig.open("n0"):
                    return inner.connect(factory)

        return Inside()

    def die(self) -> None:
        """From now on nothing gets through, either way."""
        self.rig.fail("x", f"tcp dport {PORT}")
        self.rig.fail("n0", f"tcp sport {PORT}")

    def heal(self) -> None:
        for name in ("x", "n0"):
            self.rig.heal(name)

    def status(self) -> Any:
        return self.source.status()["kinds"]["Service"]

    async def until(self, what: Callable[[], object], seconds: float = 10) -> float:
        """Seconds until that is so."""
        began = reactor.seconds()  # type: ignore[attr-defined]
        while not what():
            if reactor.seconds() - began > seconds:  # type: ignore[attr-defined]
                raise AssertionError(f"it did not come to be within {seconds} s: {self.status()}")
            await deferLater(reactor, 0.02)  # type: ignore[arg-type]
        return float(reactor.seconds() - began)  # type: ignore[attr-defined]

    async def started(self) -> None:
        self.make()
        self.source.startService()
        await self.until(lambda: "shop/web" in self.words.state.get("Service", {}))
        # Bookmarks must have been seen: they are what silence is measured by.
        await deferLater(reactor, 1.2)  # type: ignore[arg-type]

    async def test_blackHole(self) -> None:
        """A link whose packets vanish is found out; what happened meanwhile is there soon after it is back."""
        await self.started()
        began = reactor.seconds()  # type: ignore[attr-defined]
        self.die()
        self.api.store.apply(manifest("db", "10.96.0.11"))
        await self.until(lambda: "nothing came for" in self.status()["lastError"])
        self.assertGreater(reactor.seconds() - began, 0.5)  # type: ignore[attr-defined]
        await self.until(lambda: "no answer within" in self.status()["lastError"])
        self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
        self.heal()
        await self.until(lambda: "shop/db" in self.words.state["Service"])

    async def test_halfOpen(self) -> None:
        """A server that vanished, and knows nothing of the connection when it is back, is found out."""
        await self.started()
        self.die()
        self.api._cutAll()
        await deferLater(reactor, 0.1)  # type: ignore[arg-type]
        self.api.store.apply(manifest("db", "10.96.0.11"))
        self.heal()
        await self.until(lambda: "shop/db" in self.words.state["Service"])

    async def test_oneWay(self) -> None:
        """Packets that get there while nothing comes back are no connection either."""
        await self.started()
        self.rig.fail("n0", f"tcp sport {PORT}")
        await self.until(lambda: "nothing came for" in self.status()["lastError"])
        self.heal()
        self.api.store.apply(manifest("db", "10.96.0.11"))
        await self.until(lambda: "shop/db" in self.words.state["Service"])

    async def test_stalledList(self) -> None:
        """A list that stops in the middle of its body is given up."""
        self.api.faults.add(resource="services", verb="list", trickle=(100, 30.0))
        self.make("off")
        self.source.startService()
        await self.until(lambda: "no byte of the answer for 1 s" in self.status()["lastError"])
        await self.until(lambda: "shop/web" in self.words.state.get("Service", {}))

    async def test_trickledList(self) -> None:
        """A list that never ends, though bytes keep coming, is given up."""
        self.api.faults.add(resource="services", verb="list", trickle=(1, 0.1))
        self.make("off")
        self.source.startService()
        seconds = await self.until(lambda: "not complete within 3 s" in self.status()["lastError"])
        self.assertGreater(seconds, 2.5)
        await self.until(lambda: "shop/web" in self.words.state.get("Service", {}))

    async def test_trickledWatch(self) -> None:
        """A watch over which bytes come but no event is given up."""
        self.api.faults.add(resource="services", verb="watch", trickle=(1, 0.1))
        self.make()
        self.source.startService()
        await self.until(lambda: self.status()["state"] == "streaming")
        await self.until(lambda: "the watch is given up" in self.status()["lastError"])
        await self.until(lambda: "shop/web" in self.words.state.get("Service", {}))

    async def test_stopWhileDead(self) -> None:
        """Stopping over a dead link is done at once, and leaves no connection."""
        await self.started()
        self.die()
        began = reactor.seconds()  # type: ignore[attr-defined]
        await self.source.stopService()  # type: ignore[misc]
        self.assertLess(reactor.seconds() - began, 0.5)  # type: ignore[attr-defined]
        self.assertEqual(self.agent.links, set())
        self.heal()
