"""API servers on loopback with TLS of every sort, and clients for them: real sockets, real programs."""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import Any

from OpenSSL import SSL
from twisted.internet import reactor, ssl
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import TestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from tests.fakes.pki import Authority
from tests.fakes.proxyservers import FakeProxy
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.api import resources
from twisted_kproxy.sources.authentication import Credentials
from twisted_kproxy.sources.client import ApiClient
from twisted_kproxy.sources.credentials import ApiAccess, Pem

KINDS = {
    "/api/v1/services": "Service",
    "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice",
    "/api/v1/nodes": "Node",
}


class Api(Resource):
    """
    Lists of nothing, and watches that stay open.

    :ivar accepted: the tokens that count; ``None``: whoever comes.
    :ivar answer: status, headers and body to answer instead.
    :ivar requests: the headers of each request, with ``path`` and ``peer``, the common name of its certificate.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.accepted: set[str] | None = None
        self.answer: tuple[int, dict[str, str], bytes] | None = None
        self.requests: list[dict[str, str]] = []
        self.watching: list[Any] = []

    def render_GET(self, request: Any) -> Any:
        certificate = getattr(request.transport, "getPeerCertificate", lambda: None)()
        headers = {
            name.decode().lower(): value.decode("latin-1")
            for name, values in request.requestHeaders.getAllRawHeaders() for value in values
        }
        peer = certificate.get_subject().CN if certificate else ""
        self.requests.append({**headers, "path": request.path.decode(), "peer": peer})
        request.setHeader("content-type", "application/json")
        if self.answer is not None:
            code, fields, body = self.answer
            request.setResponseCode(code)
            for name, value in fields.items():
                request.setHeader(name, value)
            return body
        if self.accepted is not None and headers.get("authorization", "").removeprefix("Bearer ") not in self.accepted:
            request.setResponseCode(401)
            return json.dumps({"kind": "Status", "code": 401, "reason": "Unauthorized", "message": "who?"}).encode()
        kind = next((kind for path, kind in KINDS.items() if request.path.decode().endswith(path)), "Unknown")
        if request.args.get(b"watch"):
            request.write(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"8"}}}\n')
            self.watching.append(request)
            request.notifyFinish().addBoth(lambda _: self.watching.remove(request))
            return NOT_DONE_YET
        return json.dumps({"kind": f"{kind}List", "metadata": {"resourceVersion": "7"}, "items": []}).encode()


class ApiCase(TestCase):
    """
    Servers and clients that end with the test.

    :ivar names: the server names that clients have asked for by TLS.
    """

    timeout = 30

    def setUp(self) -> None:
        self.authority = Authority("kubernetes")
        self.api = Api()
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder)
        self.names: list[bytes | None] = []
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def logged(self) -> str:
        return "\n".join(formatEvent(it) or "" for it in self.events)

    def write(self, name: str, data: bytes | str) -> str:
        path = os.path.join(self.folder, name)
        with open(f"{path}.new", "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.replace(f"{path}.new", path)
        return path

    def script(self, name: str, body: str) -> str:
        """A program in Python."""
        path = self.write(name, f"#!{sys.executable} -S\nimport json, os, sys, time\n{body}\n")
        os.chmod(path, stat.S_IRWXU)
        return path

    def serve(
        self, *names: str, interface: str = "127.0.0.1", pair: tuple[bytes, bytes] | None = None,
        newest: int | None = None, demand: bool = False, site: Any = None, plain: bool = False,
    ) -> str:
        """
        A server whose certificate is good for those names.

        :param pair: certificate and key, instead.
        :param newest: version of TLS that it speaks at most.
        :param demand: refuse who has no client certificate of the authority.
        :return: where it is.
        """
        factory = site or Site(self.api)
        if plain:
            port: Any = reactor.listenTCP(0, factory, interface=interface)  # type: ignore[attr-defined]
        else:
            certificate, key = pair or self.authority.issue("kube-apiserver", *names)
            own = ssl.PrivateCertificate.loadPEM(certificate + key)
            options = ssl.CertificateOptions(
                privateKey=own.privateKey.original, certificate=own.original, verify=True, requireCertificate=demand,
                caCerts=[ssl.Certificate.loadPEM(self.authority.certificate).original],
            )
            context = options.getContext()
            context.set_tlsext_servername_callback(lambda it: self.names.append(it.get_servername()))
            if newest is not None:
                context.set_min_proto_version(SSL.TLS1_VERSION)
                context.set_max_proto_version(newest)
                context.set_cipher_list(b"ALL:@SECLEVEL=0")
            port = reactor.listenSSL(0, factory, options, interface=interface)  # type: ignore[attr-defined]
        self.addCleanup(port.stopListening)
        host = f"[{interface}]" if ":" in interface else interface
        return f"{'http' if plain else 'https'}://{host}:{port.getHost().port}"

    def proxy(self, kind: str, tls: bool = False, **options: Any) -> tuple[FakeProxy, str, int]:
        """A proxy; also its address and port."""
        fake = FakeProxy(reactor, kind, **options)
        host, port = self.serve("127.0.0.1", site=fake, plain=not tls).rpartition("/")[2].split(":")
        return fake, host, int(port)

    def client(self, server: str, **access: Any) -> ApiClient:
        access.setdefault("certificateAuthority", Pem("the authority", data=self.authority.certificate))
        return self.clientOf(ApiAccess(server, "test", **access))

    def clientOf(self, access: ApiAccess) -> ApiClient:
        credentials = Credentials(reactor, access)
        self.agent = ApiAgent(reactor, access, credentials=credentials)
        self.addCleanup(self.agent.close)
        return ApiClient(reactor, access, self.agent, credentials=credentials)  # type: ignore[arg-type]

    def list(self, client: ApiClient) -> Deferred[Any]:
        return Deferred.fromCoroutine(client.list(resources("n")[0], "0"))

    async def watch(self, client: ApiClient) -> Deferred[None]:
        """A watch that has begun; gives what fires at its end."""
        watch = await client.watch(resources("n")[0], "7", 300)
        heard: Deferred[bytes] = Deferred()
        done = watch.deliver(lambda data: None if heard.called else heard.callback(data))
        await heard
        return done

    async def error(self, d: Deferred[Any], *kinds: Any) -> str:
        """The text of the error that it fails with."""
        return str(await self.assertFailure(d, *kinds))

    async def until(self, what: Any, seconds: float = 10) -> None:
        for _ in range(int(seconds * 100)):
            if what():
                return
            await deferLater(reactor, 0.01)  # type: ignore[arg-type]
        self.fail(f"it did not come to be within {seconds} s")
