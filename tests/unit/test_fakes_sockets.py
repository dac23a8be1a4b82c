"""The fake API server on real sockets of the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import treq
from twisted.internet import reactor, ssl
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent, BrowserLikePolicyForHTTPS, ResponseFailed, ResponseNeverReceived

from ..fakes.apiserver import FakeApi
from ..fakes.certificates import Authority
from .test_fakes_apistore import service

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SERVICES = "/api/v1/services"
Steps = Iterator[Deferred[Any]]


class _Policy(BrowserLikePolicyForHTTPS):
    """Trusts one authority, and shows a certificate where it has one."""

    def __init__(self, authority: Authority, pair: Any = None) -> None:
        super().__init__()
        self.root = ssl.trustRootFromCertificates([ssl.Certificate.loadPEM(authority.certificate)])
        self.mine = ssl.PrivateCertificate.loadPEM(pair.certificate + pair.key) if pair else None

    def creatorForNetloc(self, hostname: bytes, port: int) -> Any:
        return ssl.optionsForClientTLS(hostname.decode(), self.root, self.mine)


class SocketTests(TestCase):
    """Listening, cutting, pausing."""

    timeout = 20

    def setUp(self) -> None:
        self.api = FakeApi(reactor)
        self.addCleanup(self.api.close)

    def get(self, path: str = SERVICES, agent: Agent | None = None, **kw: Any) -> Deferred[Any]:
        client = treq.client.HTTPClient(agent or Agent(reactor))
        return client.get(self.api.url + path, unbuffered=True, **kw)

    def plain(self) -> Deferred[Any]:
        """The same without treq: it asks for no compression, and knows IPv6 addresses."""
        return Agent(reactor).request(b"GET", f"{self.api.url}{SERVICES}".encode())

    @inlineCallbacks
    def test_list(self) -> Steps:
        """It answers on the port that it was given, and counts connections."""
        port = self.api.listen()
        self.assertEqual(self.api.url, f"http://127.0.0.1:{port}")
        response = yield self.get()
        body = yield response.json()
        self.assertEqual(body["kind"], "ServiceList")
        self.assertEqual(self.api.accepted, 1)

    @inlineCallbacks
    def test_ipv6(self) -> Steps:
        """It listens on IPv6, too."""
        self.api.listen("::1")
        response = yield self.plain()
        yield treq.content(response)
        self.assertEqual(response.code, 200)

    @inlineCallbacks
    def test_cutDelivers(self) -> Steps:
        """What comes before a cut arrives, even much of it; then the connection fails."""
        self.api.listen()
        for n in range(2000):
            self.api.store.create(service(f"s{n}", text="x" * 500))
        self.api.faults.add(cutAfter=1_000_000)
        response = yield self.plain()
        got: list[bytes] = []
        yield self.assertFailure(treq.collect(response, got.append), ResponseFailed)
        self.assertEqual(len(b"".join(got)), 1_000_000)

    @inlineCallbacks
    def test_pause(self) -> Steps:
        """Paused, it cuts all connections and refuses new ones; resumed, it is back on the same port."""
        port = self.api.listen()
        response = yield self.get(params={"watch": "true", "resourceVersion": "1"})
        ended = response.collect(lambda _: None)
        yield self.api.pause()
        yield self.api.pause()
        yield self.assertFailure(ended, ResponseFailed)
        yield self.assertFailure(self.get(), ConnectionRefusedError)
        self.assertEqual(self.api.watches, [])
        self.api.resume()
        response = yield self.get()
        yield response.content()
        self.assertEqual(self.api.url, f"http://127.0.0.1:{port}")

    @inlineCallbacks
    def test_closeLeavesNothing(self) -> Steps:
        """After close() nothing is open: no black hole, no watch, no port."""
        self.api.listen()
        self.api.faults.add(verb="list", blackHole=True)
        response = yield self.get(params={"watch": "true", "resourceVersion": "1"})
        ended = response.collect(lambda _: None)
        unanswered = self.get()
        while len(self.api.requests) < 2:
            yield deferToThread(time.sleep, 0.005)
        yield self.api.close()
        self.assertEqual(self.api.connections, 0)
        yield self.assertFailure(ended, ResponseFailed)
        yield self.assertFailure(unanswered, ResponseNeverReceived)
        yield self.assertFailure(self.get(), ConnectionRefusedError)

    @inlineCallbacks
    def test_certificates(self) -> Steps:
        """Over TLS a client certificate says who somebody is; a server of another authority is not believed."""
        authority = Authority()
        self.api.certificatesOnly = True
        self.api.forbidden = {("nodes", "list")}
        self.api.listen("127.0.0.1", tls=authority.serverContext(authority.server(["127.0.0.1"])))
        self.assertTrue(self.api.url.startswith("https://"))
        response = yield self.get(agent=Agent(reactor, _Policy(authority)))
        body = yield response.json()
        self.assertIn("system:anonymous", body["message"])
        mine = Agent(reactor, _Policy(authority, authority.client("me")))
        response = yield self.get(agent=mine)
        yield response.content()
        self.assertEqual(response.code, 200)
        response = yield self.get("/api/v1/nodes", agent=mine)
        body = yield response.json()
        self.assertIn('User "me"', body["message"])
        yield self.assertFailure(self.get(agent=Agent(reactor, _Policy(Authority("other")))), ResponseNeverReceived)

    @inlineCallbacks
    def test_certificateRequired(self) -> Steps:
        """It can refuse those who show no certificate, or that of a stranger."""
        authority = Authority()
        context = authority.serverContext(authority.server(["127.0.0.1"]), requireCertificate=True)
        self.api.listen("127.0.0.1", tls=context)
        for pair in (None, Authority("other").client()):
            agent = Agent(reactor, _Policy(authority, pair))
            yield self.assertFailure(self.get(agent=agent), ResponseNeverReceived, ResponseFailed)
        response = yield self.get(agent=Agent(reactor, _Policy(authority, authority.client())))
        yield response.content()
        self.assertEqual(response.code, 200)


class ProgramTests(TestCase):
    """The program."""

    timeout = 30

    def run_(self, *argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.apiserver", *argv],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.addCleanup(self.ended, process)
        return process

    def ended(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()

    def test_program(self) -> None:
        """It says where it listens, serves the objects of its files, and ends at SIGTERM."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        with open(os.path.join(folder, "a.yaml"), "w", encoding="ascii") as file:
            json.dump(service("one"), file)
            file.write("\n---\n")
            json.dump({"apiVersion": "v1", "kind": "List", "items": [service("two")]}, file)
        process = self.run_("--listen", "127.0.0.1:0", "--objects", folder, "--token", "t")
        assert process.stdout
        line = process.stdout.readline()
        self.assertTrue(line.startswith("listening on http://127.0.0.1:"), line)
        with socket.create_connection(("127.0.0.1", int(line.rpartition(":")[2])), 5) as client:
            client.sendall(f"GET {SERVICES} HTTP/1.0\r\nAuthorization: Bearer t\r\n\r\n".encode())
            said = client.makefile("rb").read()
        self.assertEqual(len(json.loads(said.partition(b"\r\n\r\n")[2])["items"]), 2)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(10), 0)

    def test_tls(self) -> None:
        """With a folder of certificates it speaks TLS."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        Authority().write(folder, ["127.0.0.1"])
        process = self.run_("--tls", folder)
        assert process.stdout
        self.assertTrue(process.stdout.readline().startswith("listening on https://127.0.0.1:"))
