"""A reflector before a server that is the test: every byte of every answer is in the test's hands."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.rawhttp import Exchange, RawNetwork
from tests.shared.sources import Words, manifest
from twisted_kproxy.sources.client import ApiClient, Limits, Resource
from twisted_kproxy.sources.credentials import ApiAccess
from twisted_kproxy.sources.reflector import Reflector

SERVICES = Resource("Service", "/api/v1/services", labelSelector="!a/b", fieldSelector="spec.clusterIP!=None")
EXPIRED = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}


def versioned(name: str, rv: str, **fields: Any) -> dict[str, Any]:
    it = manifest(name, **fields)
    it["metadata"]["resourceVersion"] = rv
    return it


def listOf(*items: dict[str, Any], rv: str = "100") -> dict[str, Any]:
    return {"kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": rv}, "items": list(items)}


def bookmark(rv: str) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"resourceVersion": rv}}


class ReflectorCase(SynchronousTestCase):
    """A reflector for Services before a server that is the test."""

    chance = 0.0
    streaming = False
    resource = SERVICES
    limits = Limits(size=1_000_000)

    def setUp(self) -> None:
        self.clock = Clock()
        self.network = RawNetwork(self.clock)
        self.words = self.makeWords()
        access = ApiAccess("http://192.0.2.1:8080/prefix", "test")
        self.agent = self.network.agent()
        self.client = ApiClient(self.clock, access, self.agent, self.limits)
        self.reflector = Reflector(
            self.clock, self.client, self.resource, "api", self.words.say, lambda: self.chance,
            streaming=self.streaming,
        )
        self.addCleanup(self.stop)

    def makeWords(self) -> Any:
        """What the reflector tells its words to."""
        return Words()

    def start(self) -> None:
        self.reflector.start()

    def stop(self) -> None:
        """Also holds after each test: nothing is left running."""
        self.reflector.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.agent.links, set())

    def next(self) -> Exchange:
        self.assertEqual(len(self.network.exchanges), 1, "there is not just one request")
        return self.network.next()

    def nextList(self, rv: str) -> Exchange:
        """The request that has come must be a list from there."""
        exchange = self.next()
        self.assertFalse(exchange.watching, exchange.query)
        self.assertEqual(exchange.query.get("resourceVersion", ""), rv)
        return exchange

    def nextWatch(self, rv: str) -> Exchange:
        """The request that has come must be a watch from there; it is answered with headers."""
        exchange = self.next()
        self.assertTrue(exchange.watching, exchange.query)
        self.assertEqual(exchange.query["resourceVersion"], rv)
        return exchange

    def nothing(self) -> None:
        self.assertEqual(self.network.exchanges, [])

    def watching(self, *items: dict[str, Any], rv: str = "100") -> Exchange:
        """Start; the reflector has listed these and watches."""
        self.start()
        self.nextList("0").answerJson(listOf(*items, rv=rv))
        watch = self.nextWatch(rv)
        watch.begin()
        return watch
