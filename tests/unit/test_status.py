"""The pages for operators and load balancers, and the site that serves them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, connectProtocol
from twisted.internet.error import CannotListenError, ConnectionDone
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from twisted_kproxy.core.wire import Node, NodeSpec, ObjectMeta, Taint
from twisted_kproxy.web.site import Listener, ReadOnlySite, makeSite
from twisted_kproxy.web.status import Health, HealthState, Page, eligible, healthPages, metricsPages, tree

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Answer:
    """What came back for one request."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.code = int(first.split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A connection to a site, without a network; a new one for the next request where it was closed."""

    def __init__(self, site: ReadOnlySite) -> None:
        self.site = site
        self.connect()

    def connect(self) -> None:
        self.transport = StringTransport()
        self.protocol = self.site.buildProtocol(None)
        self.protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def ask(self, path: str, method: str = "GET", headers: str = "") -> Answer:
        if self.transport.disconnecting:
            self.lost()
            self.connect()
        self.transport.clear()
        self.send(f"{method} {path} HTTP/1.1\r\nHost: node\r\n{headers}\r\n".encode())
        return Answer(self.transport.value())

    def lost(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))


def node(taints: tuple[str, ...] = (), deleted: str | None = None) -> Node:
    return Node(ObjectMeta(name="n", deletionTimestamp=deleted), spec=NodeSpec(taints=[Taint(key=it) for it in taints]))


class HealthStateTests(SynchronousTestCase):
    """What healthy means (KEP-3836)."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.state = HealthState(self.clock, 30.0)

    def healthy(self) -> bool:
        return self.state.health().healthy

    def test_startingIsHealthy(self) -> None:
        """With nothing queued yet the proxy is healthy for as long as that takes, and was never updated."""
        self.clock.advance(10_000)
        self.assertTrue(self.healthy())
        self.assertIsNone(self.state.health().lastUpdated)

    def test_stopping(self) -> None:
        """While it drains no new clients are to come to this node; it is alive all the same."""
        self.state.stopping()
        health = self.state.health()
        self.assertEqual((health.nodeEligible, health.healthy), (False, True))

    def test_idleIsHealthy(self) -> None:
        """Once everything is in force, quiet time does not make it unhealthy."""
        self.state.queued()
        self.state.applied()
        self.clock.advance(10_000)
        self.assertTrue(self.healthy())

    def test_oldChangeIsUnhealthy(self) -> None:
        """A change that waits for twice the sync period is too old; one moment less is not."""
        self.state.queued("IPv4")
        self.clock.advance(59.9)
        self.assertTrue(self.healthy())
        self.clock.advance(0.1)
        health = self.state.health()
        self.assertFalse(health.families["IPv4"].healthy)
        self.assertTrue(health.families["IPv6"].healthy)
        self.assertFalse(health.healthy)

    def test_oldestCounts(self) -> None:
        """Further changes do not make the oldest any younger."""
        self.state.queued()
        self.clock.advance(40)
        self.state.queued()
        self.clock.advance(20)
        self.assertFalse(self.healthy())

    def test_appliedHeals(self) -> None:
        """When the change is in force the family is healthy again, and was updated now."""
        self.state.queued()
        self.clock.advance(100)
        self.state.began()
        self.state.applied()
        self.assertTrue(self.healthy())
        self.assertEqual(self.state.health().lastUpdated, 100)

    def test_changeDuringSyncWaitsOn(self) -> None:
        """What came while a sync was running is not covered by its success."""
        self.state.queued()
        self.state.began()
        self.clock.advance(1)
        self.state.queued()
        self.state.applied()
        self.clock.advance(59.9)
        self.assertTrue(self.healthy())
        self.clock.advance(0.1)
        self.assertFalse(self.healthy())

    def test_failedSyncKeepsAge(self) -> None:
        """Syncs that begin again and again without success do not hide how long the change waits."""
        self.state.queued()
        for _ in range(6):
            self.state.began()
            self.clock.advance(10)
            self.state.queued()
        self.assertFalse(self.healthy())

    def test_eligibleNode(self) -> None:
        """A node is eligible unless it is absent, being deleted, or marked by the autoscaler."""
        self.assertTrue(eligible(node()))
        self.assertTrue(eligible(node(("node.kubernetes.io/unschedulable",))))
        self.assertFalse(eligible(None))
        self.assertFalse(eligible(node(deleted="2026-01-01T00:00:00Z")))
        self.assertFalse(eligible(node(("other", "ToBeDeletedByClusterAutoscaler"))))
        self.assertTrue(eligible(Node(ObjectMeta(name="n"))))

    def test_nodeUnknownIsEligible(self) -> None:
        """Before anything was heard of the node it counts as eligible; what is heard then counts."""
        self.assertTrue(self.state.health().nodeEligible)
        self.state.nodeChanged(None)
        self.assertFalse(self.state.health().nodeEligible)
        self.state.nodeChanged(node())
        self.assertTrue(self.state.health().nodeEligible)


class PagesTests(SynchronousTestCase):
    """Bodies, codes and headers."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.state = HealthState(self.clock, 30.0)
        self.answers: list[tuple[str, int]] = []
        self.accepted: list[str] = []
        pages: dict[str, Page] = healthPages(
            self.state.health, lambda page, code: self.answers.append((page, code)), lambda: NOW
        )
        pages.update(
            metricsPages(
                exposition=self.exposition,
                mode=lambda: "userspace",
                config=lambda: {"source": {"token": "***"}},
                status={
                    "services": lambda: {"a/<b>": 1},
                    "sources": self.broken,
                    "problems": lambda: (frozenset({"x"}), ObjectMeta(name="n")),
                },
            )
        )
        self.fail_ = False
        self.site = makeSite(self.clock, tree(pages))
        self.site.doStart()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))
        self.addCleanup(self.site.doStop)
        self.client = Client(self.site)
        self.addCleanup(self.client.lost)

    def exposition(self, accept: str) -> tuple[str, bytes]:
        self.accepted.append(accept)
        return "text/plain; version=0.0.4", b"up 1\n"

    def broken(self) -> Any:
        if self.fail_:
            raise RuntimeError("secret reason")
        return {"api": {"Service": 1.5}}

    def test_healthz(self) -> None:
        """A healthy proxy says 200, and that it was updated now, whenever that last really was."""
        self.state.queued()
        self.state.applied()
        self.clock.advance(20)
        answer = self.client.ask("/healthz")
        self.assertEqual(answer.code, 200)
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
        family = {"lastUpdated": "2026-01-02T03:03:45Z", "healthy": True}
        self.assertEqual(
            answer.json(),
            {
                "lastUpdated": "2026-01-02T03:04:05Z",
                "currentTime": "2026-01-02T03:04:05Z",
                "nodeEligible": True,
                "healthy": True,
                "status": {"IPv4": family, "IPv6": family},
            },
        )
        self.assertEqual(self.answers, [("healthz", 200)])

    def test_healthzUnhealthy(self) -> None:
        """An unhealthy family makes it 503, and the time of the last real update is shown."""
        self.state.applied()
        self.state.queued("IPv6")
        self.clock.advance(60)
        client = Client(self.site)
        self.addCleanup(client.lost)
        answer = client.ask("/healthz")
        self.assertEqual(answer.code, 503)
        body = answer.json()
        self.assertEqual(body["lastUpdated"], "2026-01-02T03:03:05Z")
        self.assertEqual((body["healthy"], body["nodeEligible"]), (False, True))
        self.assertEqual([body["status"][family]["healthy"] for family in ("IPv4", "IPv6")], [True, False])
        self.assertEqual(self.answers, [("healthz", 503)])

    def test_ineligibleNode(self) -> None:
        """A node that is about to go is not for load balancers, but its proxy lives: restarting it would not help."""
        self.state.nodeChanged(node(("ToBeDeletedByClusterAutoscaler",)))
        answer = self.client.ask("/healthz")
        self.assertEqual(answer.code, 503)
        self.assertEqual(answer.json()["lastUpdated"], "0001-01-01T00:00:00Z")
        self.assertEqual((answer.json()["healthy"], answer.json()["nodeEligible"]), (True, False))
        answer = self.client.ask("/livez")
        self.assertEqual(answer.code, 200)
        self.assertNotIn("nodeEligible", answer.json())
        self.assertEqual(set(answer.json()), {"lastUpdated", "currentTime", "healthy", "status"})
        self.assertEqual(self.answers, [("healthz", 503), ("livez", 200)])

    def test_metrics(self) -> None:
        """The page has the content type that the exposition says, made for the Accept header that came."""
        answer = self.client.ask("/metrics", headers="Accept: application/openmetrics-text\r\n")
        self.assertEqual((answer.code, answer.body), (200, b"up 1\n"))
        self.assertEqual(answer.headers["content-type"], "text/plain; version=0.0.4")
        self.assertEqual(self.accepted, ["application/openmetrics-text"])

    def test_proxyMode(self) -> None:
        """The mode is a bare word."""
        self.assertEqual(self.client.ask("/proxyMode").body, b"userspace")

    def test_configz(self) -> None:
        """The configuration is JSON, as it was given."""
        self.assertEqual(self.client.ask("/configz").json(), {"source": {"token": "***"}})

    def test_status(self) -> None:
        """Every part is there, and Structs and sets become JSON."""
        body = self.client.ask("/status").json()
        self.assertEqual(body["services"], {"a/<b>": 1})
        self.assertEqual(body["sources"], {"api": {"Service": 1.5}})
        self.assertEqual(body["problems"][0], ["x"])
        self.assertEqual(body["problems"][1]["name"], "n")

    def test_statusPretty(self) -> None:
        """``?pretty`` only changes the layout."""
        plain, pretty = self.client.ask("/status"), self.client.ask("/status?pretty")
        self.assertEqual(plain.json(), pretty.json())
        self.assertEqual(plain.body.count(b"\n"), 1)
        self.assertGreater(pretty.body.count(b"\n"), 5)

    def test_brokenStatusPart(self) -> None:
        """A part that fails costs only itself; the reason goes to the log, not to the client."""
        self.fail_ = True
        answer = self.client.ask("/status")
        self.assertEqual(answer.json()["services"], {"a/<b>": 1})
        self.assertIn("error", answer.json()["sources"])
        self.assertNotIn(b"secret reason", answer.body)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    def test_index(self) -> None:
        """The root lists the pages."""
        answer = self.client.ask("/")
        self.assertEqual(
            answer.body.decode().split(), ["/configz", "/healthz", "/livez", "/metrics", "/proxyMode", "/status"]
        )

    def test_unknownPage(self) -> None:
        """What is not there, also below what is there, is a plain 404 that does not repeat what was asked for."""
        for path in ("/<script>", "/healthz/x", "/debug/pprof", "//"):
            answer = self.client.ask(path)
            self.assertEqual(answer.code, 404, path)
            self.assertTrue(answer.headers["content-type"].startswith("text/plain"))
            self.assertNotIn(b"script", answer.body)


class SiteTests(SynchronousTestCase):
    """What every page has in common."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.made: list[str] = []
        self.site = makeSite(self.clock, tree({"page": Page(self.page)}), maxConnections=3)
        self.site.doStart()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))
        self.addCleanup(self.site.doStop)

    def page(self, request: Any) -> tuple[int, str, bytes]:
        if b"fail" in request.uri:
            raise RuntimeError("secret reason")
        self.made.append(request.uri.decode())
        return 200, "text/plain", b"body"

    def client(self) -> Client:
        client = Client(self.site)
        self.addCleanup(client.lost)
        return client

    def test_head(self) -> None:
        """HEAD has the headers of GET and no body, and the connection stays usable."""
        client = self.client()
        answer = client.ask("/page", "HEAD")
        self.assertEqual((answer.code, answer.body, answer.headers["content-length"]), (200, b"", "4"))
        self.assertEqual(client.ask("/page").body, b"body")

    def test_otherMethods(self) -> None:
        """Everything but GET and HEAD is refused with 405, on any path, and nothing is made."""
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
            answer = self.client().ask("/page", method, "Content-Length: 0\r\n")
            self.assertEqual((answer.code, answer.headers["allow"]), (405, "GET, HEAD"), method)
        self.assertEqual(self.client().ask("*", "OPTIONS").code, 405)
        self.assertEqual(self.made, [])

    def test_bodyIsForgotten(self) -> None:
        """The body of a request is read and thrown away: it costs neither memory nor a file."""
        client = self.client()
        client.send(b"POST /page HTTP/1.1\r\nHost: n\r\nContent-Length: 1000000\r\n\r\n")
        content = client.protocol.requests[0].content
        for _ in range(9):
            client.send(b"x" * 100_000)
        self.assertEqual(content.getvalue(), b"")
        client.send(b"x" * 100_000)
        self.assertEqual(Answer(client.transport.value()).code, 405)

    def test_forms(self) -> None:
        """A form is not parsed, however it is sent: it is refused like every other body, and nothing is logged."""
        for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "multipart/form-data"):
            client = self.client()
            client.send(
                f"POST /page HTTP/1.1\r\nContent-Type: {kind}\r\nContent-Length: 9\r\n\r\n--b\r\n\r\n--".encode()
            )
            self.assertIn(Answer(client.transport.value()).code, (400, 405), kind)
        self.assertEqual(self.made, [])

    def test_noServerHeader(self) -> None:
        """No answer says what software it comes from."""
        client = self.client()
        for answer in (client.ask("/page"), client.ask("/none"), client.ask("/page", "PUT"), client.ask("/page?fail")):
            self.assertNotIn("server", answer.headers)
        self.flushLoggedErrors(RuntimeError)

    def test_failure(self) -> None:
        """A page that fails is a 500 without the reason; the reason is logged, and the site goes on."""
        client = self.client()
        answer = client.ask("/page?fail")
        self.assertEqual(answer.code, 500)
        self.assertNotIn(b"secret", answer.body)
        self.assertNotIn(b"Traceback", answer.body)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.assertEqual(client.ask("/page").code, 200)

    def test_longHeaders(self) -> None:
        """Headers beyond the limit of 8 KiB or of 64 are refused."""
        client = self.client()
        client.send(b"GET /page HTTP/1.1\r\n" + b"X: " + b"y" * 9000 + b"\r\n\r\n")
        self.assertIn(b"400", client.transport.value())
        client = self.client()
        client.send(b"GET /page HTTP/1.1\r\n" + b"X: y\r\n" * 70 + b"\r\n")
        self.assertIn(b"400", client.transport.value())
        self.assertEqual(self.made, [])

    def test_slowRequest(self) -> None:
        """A request has 30 seconds to arrive: trickling bytes do not prolong that."""
        client = self.client()
        for _ in range(3):
            client.send(b"G")
            self.clock.advance(9.9)
        self.assertFalse(client.transport.disconnecting)
        self.clock.advance(0.4)
        self.assertTrue(client.transport.disconnecting)

    def test_onePerConnection(self) -> None:
        """
        After one answer the connection is closed; requests that were sent along with the first are not even made: who
        sends thousands and reads nothing costs one.
        """
        client = self.client()
        client.send(b"GET /page HTTP/1.1\r\nHost: n\r\n\r\n" * 1000)
        self.assertTrue(client.transport.disconnecting)
        self.assertEqual(len(self.made), 1)
        self.assertEqual(client.transport.value().count(b"HTTP/1.1 "), 1)
        self.assertIn(b"\r\nConnection: close\r\n", client.transport.value())

    def test_connectionLimit(self) -> None:
        """One connection too many cuts the oldest; the new one is served."""
        first, second, third = self.client(), self.client(), self.client()
        fourth = self.client()
        self.assertEqual([it.transport.disconnecting for it in (first, second, third)], [True, False, False])
        self.assertEqual(fourth.ask("/page").code, 200)

    def test_lostConnectionMakesRoom(self) -> None:
        """Connections that have ended do not count."""
        kept = self.client()
        for _ in range(10):
            client = Client(self.site)
            client.ask("/page")
            client.lost()
        self.assertFalse(kept.transport.disconnecting)

    def test_noAccessLogTimer(self) -> None:
        """A site at rest keeps no timer, neither for an access log nor for anything else."""
        self.assertEqual(self.clock.getDelayedCalls(), [])


class BusyReactor(MemoryReactorClock):
    """Refuses to listen for a number of times."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.refusals = refusals

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        if self.refusals:
            self.refusals -= 1
            raise CannotListenError(interface, port, OSError(98, "Address already in use"))
        return super().listenTCP(port, factory, backlog, interface)


class ListenerTests(SynchronousTestCase):
    """Binding a site as a service."""

    def listener(self, refusals: int) -> tuple[BusyReactor, Listener]:
        clock = BusyReactor(refusals)
        return clock, Listener(clock, makeSite(clock, tree({})), "127.0.0.1", 10256, "health")

    def test_retries(self) -> None:
        """An address in use is tried again every five seconds, and logged once."""
        clock, listener = self.listener(2)
        with capturedLogs() as logs:
            listener.startService()
            clock.advance(4.9)
            self.assertEqual((clock.refusals, listener.port), (1, 0))
            clock.advance(0.1)
            self.assertEqual((clock.refusals, clock.tcpServers), (0, []))
            clock.advance(5)
        self.assertEqual([server[0] for server in clock.tcpServers], [10256])
        errors = [event for event in logs if event["log_level"] == LogLevel.error]
        self.assertEqual([event["reason"] for event in errors], ["[Errno 98] Address already in use"])
        self.successResultOf(listener.stopService() or self.fired())
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_stopWhileRetrying(self) -> None:
        """Stopping ends the tries."""
        clock, listener = self.listener(1)
        listener.startService()
        self.assertIsNone(listener.stopService())
        self.assertEqual(clock.getDelayedCalls(), [])
        clock.advance(100)
        self.assertEqual(clock.tcpServers, [])

    @staticmethod
    def fired() -> Deferred[None]:
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done


class Collect(Protocol):
    """Sends a request and keeps what comes back."""

    def __init__(self) -> None:
        self.data = b""
        self.done: Deferred[bytes] = Deferred()

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"GET /livez HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure = Failure(ConnectionDone())) -> None:  # noqa: B008
        self.done.callback(self.data)


class SocketTests(TestCase):
    """The same over real sockets of the loopback."""

    async def serve(self, host: str, endpoint: Any) -> None:
        def health() -> Health:
            return Health(0.0, {})

        listener = Listener(reactor, makeSite(reactor, tree(healthPages(health))), host, 0, "health")
        listener.startService()
        self.addCleanup(listener.stopService)
        client = await connectProtocol(endpoint(reactor, host, listener.port), Collect())
        answer = Answer(await client.done)
        self.assertEqual((answer.code, answer.json()["healthy"]), (200, True))

    async def test_ipv4(self) -> None:
        """A page is served on an IPv4 address."""
        await self.serve("127.0.0.1", TCP4ClientEndpoint)

    async def test_ipv6(self) -> None:
        """A page is served on an IPv6 address."""
        await self.serve("::1", TCP6ClientEndpoint)

    async def test_stopCutsConnections(self) -> None:
        """Stopping the service closes the port and the connections that are idle."""

        class Idle(Collect):
            def connectionMade(self) -> None:
                pass

        site = makeSite(reactor, tree({}))
        listener = Listener(reactor, site, "127.0.0.1", 0, "health")
        listener.startService()
        client = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", listener.port), Idle())
        other = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", listener.port), Collect())
        await other.done
        stopped = listener.stopService()
        assert stopped is not None
        await stopped
        self.assertEqual(await client.done, b"")
        self.assertEqual(listener.port, 0)
