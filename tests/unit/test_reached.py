"""Where the API server of a source is reached."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.rawhttp import RawNetwork, Transport
from twisted_kproxy.core.values import Reached
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.credentials import ApiAccess, Proxy
from twisted_kproxy.sources.reached import MOST, Whereabouts


class WhereaboutsTests(SynchronousTestCase):
    """From URLs and connections to words."""

    def make(self, server: str) -> Whereabouts:
        self.said: list[Reached] = []
        return Whereabouts("main", server, self.said.append)

    def last(self) -> set[tuple[str, int]]:
        return set(self.said[-1].servers)

    def test_url(self) -> None:
        """An address in the URL counts, in canonical form, with the port of its scheme."""
        for server, where in (
            ("https://192.0.2.4:6443", ("192.0.2.4", 6443)),
            ("https://192.0.2.4/k8s", ("192.0.2.4", 443)),
            ("http://[2001:DB8::0:4]", ("2001:db8::4", 80)),
        ):
            self.make(server).tell()
            self.assertEqual(self.last(), {where})

    def test_name(self) -> None:
        """A name says nothing until a connection was made."""
        it = self.make("https://api.example:6443")
        it.tell()
        self.assertEqual(self.last(), set())
        it.met("192.0.2.4", 6443)
        self.assertEqual(self.last(), {("192.0.2.4", 6443)})

    def test_onlyNews(self) -> None:
        """What is known is not said again."""
        it = self.make("https://192.0.2.4:6443")
        it.tell()
        it.met("192.0.2.4", 6443)
        self.assertEqual(len(self.said), 1)
        for _ in range(3):
            it.met("192.0.2.5", 6443)
        self.assertEqual(len(self.said), 2)

    def test_bounded(self) -> None:
        """Of very many addresses those count that were met last; the one in the URL stays."""
        it = self.make("https://192.0.2.4:6443")
        it.met("10.0.0.0", 1)
        for number in range(1, MOST + 1):
            it.met("10.0.0.1", 1)  # again and again, so it stays
            it.met(f"10.0.1.{number}", 1)
        self.assertEqual(len(self.last()), MOST + 1)
        self.assertLessEqual({("192.0.2.4", 6443), ("10.0.0.1", 1), (f"10.0.1.{MOST}", 1)}, self.last())
        self.assertNotIn(("10.0.0.0", 1), self.last())

    def test_noAddress(self) -> None:
        """What is no address of either family is passed over."""
        it = self.make("https://api.example:6443")
        it.met("fe80::1%eth0", 6443)
        self.assertEqual(self.said, [])


class AgentTests(SynchronousTestCase):
    """Whom connections were made to."""

    def peers(self, access: ApiAccess, peer: Any) -> list[tuple[str, int]]:
        clock = Clock()
        network = RawNetwork(clock)
        agent = ApiAgent(clock, access, network.endpoint)
        met: list[tuple[str, int]] = []
        agent.reached = lambda address, port: met.append((address, port))
        self.patch(network, "asked", lambda exchange: None)
        self.patch(Transport, "getPeer", lambda transport: peer)
        agent.request(b"GET", b"http://api.example/").addErrback(lambda _: None)
        self.successResultOf(agent.close())
        return met

    def test_direct(self) -> None:
        """The peer of a connection is the server."""
        peer = IPv4Address("TCP", "192.0.2.4", 80)
        self.assertEqual(self.peers(ApiAccess("http://api.example", "test"), peer), [("192.0.2.4", 80)])

    def test_proxy(self) -> None:
        """That of a connection to a proxy is not."""
        access = ApiAccess("http://api.example", "test", proxy=Proxy("http", "proxy.example", 3128))
        self.assertEqual(self.peers(access, IPv4Address("TCP", "192.0.2.9", 3128)), [])

    def test_other(self) -> None:
        """One that has no address is passed over."""
        self.assertEqual(self.peers(ApiAccess("http://api.example", "test"), UNIXAddress("/x")), [])
