"""The API server as a source."""

from __future__ import annotations

import json
import os
import socket
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet import reactor, ssl
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface.verify import verifyObject

from tests.fakes.pki import Authority
from tests.fakes.rawhttp import Exchange, RawNetwork
from tests.fakes.recordings import Recording, comparable
from tests.shared import sources
from tests.shared.sources import SourceRig, Words, manifest, sliceManifest
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.core.values import Change, Replaced
from twisted_kproxy.interfaces import ISource, NotAvailable
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.api import ApiSource, resources
from twisted_kproxy.sources.client import LIMITS, ApiClient, Limits
from twisted_kproxy.sources.credentials import ApiAccess, Pem
from twisted_kproxy.sources.errors import ConnectionLost, Denied, Refused, TimedOut, Unverified

PATHS = {
    "/api/v1/services": "Service",
    "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice",
    "/api/v1/nodes": "Node",
}


class Server:
    """Lists and watches of objects in memory; ``respond`` is for a L{RawNetwork}."""

    def __init__(self) -> None:
        self.version = 100
        self.objects: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in PATHS.values()}
        self.watches: list[tuple[str, Exchange]] = []
        self.tokens: list[str] = []
        self.accepted = ""

    def respond(self, exchange: Exchange) -> None:
        kind = PATHS.get(exchange.path)
        if kind is None:
            exchange.answer(b"404 page not found\n", 404, "text/plain; charset=utf-8")
            return
        self.tokens.append(exchange.headers.get("authorization", ""))
        if self.accepted and self.tokens[-1] != f"Bearer {self.accepted}":
            exchange.answerJson({"kind": "Status", "code": 401, "reason": "Unauthorized", "message": "who?"}, 401)
        elif exchange.watching:
            exchange.begin()
            self.watches.append((kind, exchange))
        else:
            items = list(self.objects[kind].values())
            exchange.answerJson(
                {"kind": f"{kind}List", "metadata": {"resourceVersion": str(self.version)}, "items": items}
            )

    def put(self, it: dict[str, Any]) -> None:
        self.version += 1
        key = f"{it['metadata']['namespace']}/{it['metadata']['name']}"
        there = key in self.objects[it["kind"]]
        it = {**it, "metadata": {**it["metadata"], "resourceVersion": str(self.version)}}
        self.objects[it["kind"]][key] = it
        self.tell(it["kind"], "MODIFIED" if there else "ADDED", it)

    def remove(self, kind: str, key: str) -> None:
        self.version += 1
        it = self.objects[kind].pop(key)
        self.tell(kind, "DELETED", {**it, "metadata": {**it["metadata"], "resourceVersion": str(self.version)}})

    def tell(self, kind: str, type: str, it: dict[str, Any]) -> None:
        for watched, exchange in self.watches:
            if watched == kind:
                exchange.event(type, it)


class Rig:
    """An API source and its server."""

    def __init__(self, options: ApiOptions | None = None, **extra: Any) -> None:
        self.clock = Clock()
        self.words = Words()
        self.server = Server()
        self.network = RawNetwork(self.clock, self.server.respond)
        self.agent = self.network.agent()
        options = options or ApiOptions("main", server="http://192.0.2.1:8080", watchList="off")
        self.source: Any = ApiSource(
            self.clock, "main", options, self.words,
            nodeName="node-a", agent=self.agent, random=lambda: 0.0, **extra,
        )

    def put(self, it: dict[str, Any]) -> None:
        self.server.put(it)

    def remove(self, kind: str, key: str) -> None:
        self.server.remove(kind, key)


class ApiSourceTests(sources.SourceSuite):
    """What every source promises."""

    def makeRig(self) -> SourceRig:
        return Rig()


class OwnTests(SynchronousTestCase):
    """What is its own."""

    def started(self, rig: Rig) -> Rig:
        rig.source.startService()
        rig.clock.advance(0)
        self.addCleanup(rig.source.stopService)
        return rig

    def test_selectors(self) -> None:
        """Each kind is asked for with selectors that leave the rest at the server."""
        rig = Rig()
        self.started(rig)
        asked = {it.path: it.query for it in rig.network.exchanges if not it.watching}
        self.assertEqual(
            asked,
            {
                "/api/v1/services": {
                    "resourceVersion": "0", "limit": "500",
                    "labelSelector": "!service.kubernetes.io/service-proxy-name",
                    "fieldSelector": "spec.clusterIP!=None",
                },
                "/apis/discovery.k8s.io/v1/endpointslices": {
                    "resourceVersion": "0", "limit": "500", "labelSelector": "!service.kubernetes.io/headless",
                },
                "/api/v1/nodes": {"resourceVersion": "0", "limit": "500", "fieldSelector": "metadata.name=node-a"},
                "/apis/networking.k8s.io/v1/servicecidrs": {"resourceVersion": "0", "limit": "500"},
            },
        )

    def test_proxyName(self) -> None:
        """With a name of its own, it asks for the Services that carry it."""
        services, slices, *_ = resources("node-a", "mine")
        self.assertEqual(services.labelSelector, "service.kubernetes.io/service-proxy-name=mine")
        self.assertEqual(slices.labelSelector, "!service.kubernetes.io/headless")

    def test_interface(self) -> None:
        """It provides L{ISource}, and names its kinds."""
        verifyObject(ISource, Rig().source)
        self.assertEqual(Rig().source.kinds, ("Service", "EndpointSlice", "Node"))

    def test_kindsAreApart(self) -> None:
        """One kind whose list is refused holds up no other."""
        rig = Rig()
        answer = rig.server.respond

        def refusing(exchange: Exchange) -> None:
            if exchange.path == "/api/v1/nodes":
                exchange.answerJson({"kind": "Status", "code": 403, "message": "no"}, 403)
            else:
                answer(exchange)

        rig.network._respond = refusing
        self.started(rig)
        self.assertEqual({word.kind for word in rig.words.said}, {"Service", "EndpointSlice"})
        ages = rig.source.ages()
        self.assertIsNone(ages["Node"])
        self.assertEqual(ages["Service"], 0.0)
        self.assertEqual(rig.source.status()["kinds"]["Node"]["state"], "waiting")

    def test_stopCutsConnections(self) -> None:
        """Stopping cuts every watch at once, and fires when the connections are gone."""
        rig = Rig()
        rig.source.startService()
        rig.clock.advance(0)
        self.assertEqual(len(rig.agent.links), 3)
        self.assertIsNone(self.successResultOf(rig.source.stopService()))
        self.assertEqual([it for _, it in rig.server.watches if it.open], [])
        self.assertEqual(rig.agent.links, set())

    def tokenRig(self, token: str) -> Rig:
        path = self.mktemp()
        self.path = os.path.abspath(path)
        self.writeToken(token)
        # The network speaks no TLS; credentials go with https only.
        return Rig(ApiOptions("main", server="https://192.0.2.1", tokenFile=self.path, watchList="off"))

    def writeToken(self, token: str) -> None:
        with open(self.path, "w") as file:
            file.write(token)

    def test_tokenRotates(self) -> None:
        """Requests carry the token that the file holds by then."""
        rig = self.started(self.tokenRig("one"))
        self.assertEqual(set(rig.server.tokens), {"Bearer one"})
        self.writeToken("two")
        rig.clock.advance(120)
        rig.server.tokens.clear()
        for _, exchange in list(rig.server.watches):
            exchange.end()
        rig.clock.advance(0)
        self.assertEqual(rig.server.tokens, ["Bearer two"] * 3)

    def test_unauthorized(self) -> None:
        """After a 401 the file is read again at once, whatever its age; nothing that was said is taken back."""
        rig = self.tokenRig("one")
        rig.server.put(manifest("web"))
        self.started(rig)
        self.writeToken("two")
        rig.server.accepted = "two"
        rig.clock.advance(2)
        rig.server.tokens.clear()
        for _, exchange in list(rig.server.watches):
            exchange.end()
        rig.clock.advance(0)
        self.assertEqual(rig.server.tokens, ["Bearer one"] * 3)
        rig.clock.advance(0.8)
        # For each a list, and then a watch.
        self.assertEqual(rig.server.tokens[3:], ["Bearer two"] * 6)
        kinds = rig.source.status()["kinds"]
        self.assertEqual({kinds[kind]["state"] for kind in rig.source.kinds}, {"watching"})
        self.assertEqual(list(rig.words.state["Service"]), ["shop/web"])

    def test_noSecrets(self) -> None:
        """Neither status nor repr shows a token."""
        rig = self.started(self.tokenRig("s3cr3t"))
        self.assertNotIn("s3cr3t", json.dumps(rig.source.status()))
        self.assertNotIn("s3cr3t", repr(vars(rig.source)))

    def test_badOptions(self) -> None:
        """Options that lead nowhere are refused before anything starts, naming source, file and field."""
        certificate, _ = Authority().issue("node")
        path = os.path.abspath(self.mktemp())
        with open(path, "wb") as file:
            file.write(certificate)
        for options, parts in (
            (ApiOptions("main", kubeconfig="/nowhere/config"), ("main", "/nowhere/config", "No such file")),
            (ApiOptions("main", server="https://a", caFile="/nowhere/ca"), ("ca-file", "/nowhere/ca")),
            (
                ApiOptions("main", server="https://a", clientCertificate=path, clientKey=path),
                ("client-key", path, "not a private key"),
            ),
        ):
            with self.assertRaises(NotAvailable) as caught:
                ApiSource(Clock(), "main", options, Words(), nodeName="n")
            for part in parts:
                self.assertIn(part, str(caught.exception))
        with self.assertRaises(NotAvailable):
            ApiSource(Clock(), "main", ApiOptions("main", server="https://a"), Words(), nodeName="")


class ReplayTests(SynchronousTestCase):
    """Recorded answers of a real API server, their headers and chunk framing included."""

    def replay(self, recording: Recording, pieces: list[bytes]) -> None:
        """List, watch, and the state in the end; the next watch goes on where this one ended."""
        clock = Clock()
        words = Words()
        network = RawNetwork(clock)
        options = ApiOptions("main", server="http://192.0.2.1", watchList="off")
        source = ApiSource(
            clock, "main", options, words, nodeName="node-a", agent=network.agent(), random=lambda: 0.0
        )
        source.startService()
        (path,) = (path for path, kind in PATHS.items() if kind == recording.kind)
        (exchange,) = (it for it in network.exchanges if it.path == path)
        network.exchanges.clear()
        exchange.send(recording.start)
        watch = network.next()
        self.assertEqual(watch.query["resourceVersion"], recording.expected["startResourceVersion"])
        for piece in pieces:
            watch.send(piece)
        state = {key: comparable(it) for key, it in words.state[recording.kind].items()}
        self.assertEqual(state, recording.final())
        changes = [word for word in words.said if isinstance(word, Change)]
        sequence = [it.partition(" ")[2] for it in recording.expected["sequence"] if not it.startswith("BOOKMARK")]
        self.assertEqual([word.key for word in changes], sequence)
        clock.advance(1)
        self.assertEqual(network.next().query["resourceVersion"], recording.expected["lastEventResourceVersion"])
        self.assertEqual(sum(isinstance(word, Replaced) for word in words.said), 1)
        source.stopService()
        self.assertEqual(clock.getDelayedCalls(), [])

    def recordings(self) -> list[Recording]:
        """Those that begin with a list."""
        names = ("services", "services-selectors", "endpointslices", "endpointslices-selectors", "node")
        return [Recording(name) for name in names]

    def test_whole(self) -> None:
        """All at once."""
        for recording in self.recordings():
            self.replay(recording, [recording.response])

    def test_asReceived(self) -> None:
        """In the pieces in which it was received then."""
        for recording in self.recordings():
            self.assertEqual(b"".join(recording.segments), recording.response)
            self.replay(recording, recording.segments)

    def test_byteByByte(self) -> None:
        """Byte by byte."""
        recording = Recording("node")
        self.replay(recording, [recording.response[at : at + 1] for at in range(len(recording.response))])

    def test_anyBorders(self) -> None:
        """With borders anywhere: within headers, chunk sizes, events."""
        for recording in self.recordings():
            self.anyBorders(recording)

    def anyBorders(self, recording: Recording) -> None:
        size = len(recording.response)

        @settings(derandomize=True, deadline=None, max_examples=15)
        @given(st.lists(st.integers(0, size), max_size=60))
        def check(cuts: list[int]) -> None:
            borders = [0, *sorted(cuts), size]
            self.replay(recording, [recording.response[a:b] for a, b in pairwise(borders)])

        check()


class _Services(Resource):
    """A list of nothing, and watches that stay open."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[str | None] = []
        self.hosts: list[str] = []
        self.authorizations: list[str | None] = []
        self.watching: list[Any] = []

    def render_GET(self, request: Any) -> Any:
        certificate = getattr(request.transport, "getPeerCertificate", lambda: None)()
        self.peers.append(certificate and certificate.get_subject().CN)
        self.hosts.append(request.getHeader("host"))
        self.authorizations.append(request.getHeader("authorization"))
        request.setHeader("content-type", "application/json")
        if request.path.decode() not in PATHS:
            request.setResponseCode(404)
            return b""
        if request.args.get(b"watch"):
            request.write(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"8"}}}\n')
            self.watching.append(request)
            return NOT_DONE_YET
        kind = PATHS[request.path.decode()]
        return json.dumps({"kind": f"{kind}List", "metadata": {"resourceVersion": "7"}, "items": []}).encode()


class SocketTests(TestCase):
    """Real sockets and real TLS, on loopback."""

    timeout = 20
    limits = LIMITS

    def setUp(self) -> None:
        self.authority = Authority()
        self.services = _Services()

    def listen(self, *names: str, interface: str = "127.0.0.1") -> str:
        """A server whose certificate is good for those names; where it is."""
        certificate, key = self.authority.issue("server", *names)
        own = ssl.PrivateCertificate.loadPEM(certificate + key)
        options = ssl.CertificateOptions(
            privateKey=own.privateKey.original, certificate=own.original,
            verify=True, requireCertificate=False,
            caCerts=[ssl.Certificate.loadPEM(self.authority.certificate).original],
        )
        port: Any = reactor.listenSSL(0, Site(self.services), options, interface=interface)  # type: ignore[attr-defined]
        self.addCleanup(port.stopListening)
        host = f"[{interface}]" if ":" in interface else interface
        return f"https://{host}:{port.getHost().port}"

    def client(self, server: str, **access: Any) -> ApiClient:
        access.setdefault("certificateAuthority", Pem("ca", data=self.authority.certificate))
        it = ApiAccess(server, "test", **access)
        self.agent = ApiAgent(reactor, it)
        self.addCleanup(self.agent.close)
        return ApiClient(reactor, it, self.agent, self.limits)  # type: ignore[arg-type]

    def list(self, client: ApiClient) -> Deferred[Any]:
        return Deferred.fromCoroutine(client.list(resources("n")[0], "0"))

    @inlineCallbacks
    def test_address(self) -> Any:
        """A server that is an address proves itself by its certificate's addresses: IPv4 and IPv6."""
        for interface in ("127.0.0.1", "::1"):
            listing = yield self.list(self.client(self.listen(interface, interface=interface), token="abc"))
            self.assertEqual(listing.rv, "7")
        self.assertEqual(self.services.authorizations, ["Bearer abc"] * 2)
        self.assertTrue(self.services.hosts[1].startswith("[::1]:"))

    @inlineCallbacks
    def test_anotherAddress(self) -> Any:
        """A certificate for another address is not taken, nor is one for the address as a DNS name."""
        for name in ("192.0.2.1", "localhost"):
            yield self.assertFailure(self.list(self.client(self.listen(name), token="abc")), Unverified)
        self.assertEqual(self.services.authorizations, [])

    @inlineCallbacks
    def test_anotherAuthority(self) -> Any:
        """A certificate of another authority is not taken."""
        other = Pem("ca", data=Authority("another").certificate)
        error = yield self.assertFailure(
            self.list(self.client(self.listen("127.0.0.1"), certificateAuthority=other)), Unverified
        )
        self.assertIn("certificate verify failed", str(error))

    @inlineCallbacks
    def test_serverName(self) -> Any:
        """The name to verify may be another than the host."""
        server = self.listen("kubernetes.default.svc")
        listing = yield self.list(self.client(server, tlsServerName="kubernetes.default.svc"))
        self.assertEqual(listing.rv, "7")
        yield self.assertFailure(self.list(self.client(server, tlsServerName="other.svc")), Unverified)

    @inlineCallbacks
    def test_insecure(self) -> Any:
        """Whoever asks for it gets TLS without proof."""
        listing = yield self.list(
            self.client(self.listen("192.0.2.1"), insecure=True, certificateAuthority=None, token="abc")
        )
        self.assertEqual(listing.rv, "7")

    @inlineCallbacks
    def test_clientCertificate(self) -> Any:
        """The server sees the client's certificate."""
        certificate, key = self.authority.issue("system:node:n")
        client = self.client(
            self.listen("127.0.0.1"),
            clientCertificate=Pem("certificate", data=certificate), clientKey=Pem("key", data=key),
        )
        yield self.list(client)
        self.assertEqual(self.services.peers, ["system:node:n"])

    @inlineCallbacks
    def test_foreignClientCertificate(self) -> Any:
        """A client certificate that the server does not take is an error of TLS, or of the connection."""
        certificate, key = Authority("another").issue("mallory")
        client = self.client(
            self.listen("127.0.0.1"),
            clientCertificate=Pem("certificate", data=certificate), clientKey=Pem("key", data=key),
        )
        yield self.assertFailure(self.list(client), Unverified, ConnectionLost)

    @inlineCallbacks
    def test_refused(self) -> Any:
        """Nobody there is told apart from a server that fails."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield self.assertFailure(self.list(self.client(f"https://127.0.0.1:{port}")), Refused)

    @inlineCallbacks
    def test_plainServer(self) -> Any:
        """TLS to a port that speaks none, and plain HTTP to one that speaks TLS, come to an end."""
        self.limits = Limits(headers=0.5)
        port: Any = reactor.listenTCP(0, Site(self.services), interface="127.0.0.1")  # type: ignore[attr-defined]
        self.addCleanup(port.stopListening)
        yield self.assertFailure(
            self.list(self.client(f"https://127.0.0.1:{port.getHost().port}")), Unverified, ConnectionLost, TimedOut
        )
        server = self.listen("127.0.0.1").replace("https", "http")
        yield self.assertFailure(self.list(self.client(server)), ConnectionLost, Denied)

    @inlineCallbacks
    def test_socketOptions(self) -> Any:
        """The socket below TLS notices a dead link: keep-alive after 30 s, and a minute for unacknowledged bytes."""
        client = self.client(self.listen("127.0.0.1"))
        watch = yield Deferred.fromCoroutine(client.watch(resources("n")[0], "7", 300))
        heard: Deferred[bytes] = Deferred()
        done = watch.deliver(heard.callback)
        yield heard
        (link,) = self.agent.links
        handle = link.transport.getHandle()
        self.assertNotIsInstance(handle, SSL.Connection)
        found = [
            handle.getsockopt(level, option)
            for level, option in (
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            )
        ]
        self.assertEqual(found, [1, 30, 10, 3, 60000])
        gone = self.services.watching[0].notifyFinish()
        done.addErrback(lambda _: None)
        done.cancel()
        # Cancelling cuts the connection: the server sees it end.
        yield self.assertFailure(gone, Exception)
        self.assertEqual(self.agent.links, set())

    @inlineCallbacks
    def test_source(self) -> Any:
        """A source reads over TLS and stops cleanly: no connection, no timer, nothing for the reactor to do."""
        server = self.listen("127.0.0.1")
        folder = os.path.abspath(self.mktemp())
        os.mkdir(folder)
        path = os.path.join(folder, "ca.crt")
        with open(path, "wb") as file:
            file.write(self.authority.certificate)
        words = Words()
        options = ApiOptions("main", server=server, caFile=path, watchList="off")
        source = ApiSource(reactor, "main", options, words, nodeName="n")
        source.startService()
        for _ in range(500):
            if len(self.services.watching) == 3:
                break
            yield deferLater(reactor, 0.01)  # type: ignore[arg-type]
        self.assertEqual(sorted(word.kind for word in words.said), ["EndpointSlice", "Node", "Service"])
        ended = [it.notifyFinish() for it in self.services.watching]
        yield source.stopService()
        for it in ended:
            yield self.assertFailure(it, Exception)


class SliceTests(SynchronousTestCase):
    """Slices go the same way."""

    def test_slice(self) -> None:
        """A slice's endpoints arrive with their conditions."""
        rig = Rig()
        rig.source.startService()
        rig.clock.advance(0)
        rig.put(sliceManifest("web-1", "10.0.0.1", "10.0.0.2"))
        (endpoints,) = (it.endpoints for it in rig.words.state["EndpointSlice"].values())
        self.assertEqual([it.addresses for it in endpoints], [["10.0.0.1"], ["10.0.0.2"]])
        self.assertTrue(endpoints[0].conditions.ready)
        rig.source.stopService()
