"""The way through a proxy: which one, and the talk with it."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers
from zope.interface import implementer

from tests.fakes.rawhttp import RawNetwork
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.redaction import redacted
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.credentials import ApiAccess, Proxy
from twisted_kproxy.sources.errors import Unreachable
from twisted_kproxy.sources.proxies import ANSWER_TIMEOUT, HEADERS_LIMIT, Connect, ProxyEndpoint, ProxyRefused, Socks5
from twisted_kproxy.sources.proxychoice import excluded, fromEnvironment, parseProxy, withProxy

HTTP = Proxy("http", "192.0.2.9", 3128)
SOCKS = Proxy("socks5", "192.0.2.9", 1080)


class ChoiceTests(SynchronousTestCase):
    """Which proxy it is."""

    def test_parse(self) -> None:
        """Scheme, host and port, with the port of the scheme where none is said; escaped user and password."""
        for url, expected in (
            ("http://proxy.example", Proxy("http", "proxy.example", 80, origin="o")),
            ("https://proxy.example/", Proxy("https", "proxy.example", 443, origin="o")),
            ("socks5://[2001:db8::9]", Proxy("socks5", "2001:db8::9", 1080, origin="o")),
            ("http://me:p%40s%3As@h:1", Proxy("http", "h", 1, "me", "p@s:s", "o")),
            ("http://me@h:1", Proxy("http", "h", 1, "me", "", "o")),
        ):
            self.assertEqual(parseProxy(url, "o"), expected)

    def test_refused(self) -> None:
        """Anything else is refused by name, and no password is shown."""
        for url, part in (
            ("ftp://me:s3cr3tpw@h", "the scheme ftp is not supported"),
            ("socks4://h", "socks4"),
            ("socks5h://h", "leaves names to the proxy"),
            ("me:s3cr3tpw@h:3128", "scheme none"),
            ("h:3128", "scheme none"),
            ("http://", "HOST"),
            ("http://h:0", "HOST"),
            ("http://h:99999", "not the URL"),
            ("http://[::1", "not the URL"),
            ("http://[fe80::1%25eth0]:3128", "HOST"),
            ("http://me:s3cr3tpw@h h", "HOST"),
            ("http://h/path", "without path"),
            ("http://h?x", "without path"),
            ("http://a%3Ab:s3cr3tpw@h", "colon"),
            ("http://me:s3cr3tpw%0d%0aX@h", "control characters"),
            (f"socks5://me:{'p' * 256}@h", "longer than 255"),
        ):
            text = str(self.assertRaises(NotAvailable, parseProxy, url, "here").args[0])
            self.assertTrue(text.startswith("here: "), text)
            self.assertIn(part, text)
            self.assertNotIn("s3cr3t", text)

    def test_masked(self) -> None:
        """Neither repr nor str shows user or password, and the password is hidden everywhere from then on."""
        proxy = parseProxy("http://anna:sup3r%40s3cr3t@h:3128", "o")
        self.assertEqual((str(proxy), repr(proxy)), ("http://***@h:3128", "<Proxy http://***@h:3128>"))
        pair = b64encode(b"anna:sup3r@s3cr3t").decode()
        for said in ("sup3r@s3cr3t", "sup3r%40s3cr3t", f"Basic {pair}"):
            self.assertNotIn(said.rpartition(" ")[2], redacted(f"x {said} y"))
        self.assertNotIn("anna", repr(ApiAccess("https://a", "o", proxy=proxy)))

    def test_environment(self) -> None:
        """HTTPS_PROXY counts for https, HTTP_PROXY for http; upper case goes before lower; a scheme may be missing."""
        for environ, server, expected in (
            ({}, "https://api", None),
            ({"HTTPS_PROXY": "http://h:1"}, "https://api", "http://h:1"),
            ({"https_proxy": "h:1"}, "https://api", "http://h:1"),
            ({"https_proxy": "h:1", "HTTPS_PROXY": "socks5://g"}, "https://api", "socks5://g:1080"),
            ({"HTTPS_PROXY": "http://h:1"}, "http://api", None),
            ({"HTTP_PROXY": "http://h:1"}, "http://api", "http://h:1"),
            ({"HTTP_PROXY": "http://h:1", "ALL_PROXY": "http://h:1"}, "https://api", None),
            ({"HTTPS_PROXY": ""}, "https://api", None),
            ({"HTTPS_PROXY": "http://h:1"}, "https://localhost", None),
            ({"HTTPS_PROXY": "http://h:1"}, "https://127.1.2.3:6443", None),
            ({"HTTPS_PROXY": "http://h:1"}, "https://[::1]:6443", None),
            ({"HTTPS_PROXY": "http://h:1", "NO_PROXY": "api"}, "https://api", None),
            ({"HTTPS_PROXY": "http://h:1", "no_proxy": "10.0.0.0/8"}, "https://10.1.2.3:6443", None),
            ({"HTTPS_PROXY": "http://h:1", "no_proxy": "api", "NO_PROXY": "b"}, "https://api", "http://h:1"),
        ):
            found = fromEnvironment(server, environ)
            self.assertEqual(None if found is None else str(found), expected, environ)
        with self.assertRaises(NotAvailable) as caught:
            fromEnvironment("https://api", {"HTTPS_PROXY": "gopher://me:s3cr3tpw@h"})
        self.assertIn("environment variable HTTPS_PROXY: the scheme gopher", str(caught.exception))

    def test_noProxy(self) -> None:
        """Addresses, networks, domains, ports and the star, as Go understands them."""
        for entry, host, port, expected in (
            ("*", "api.example", 443, True),
            ("", "api.example", 443, False),
            (" , ,", "api.example", 443, False),
            ("example", "api.example", 443, True),
            ("api.example", "api.example", 443, True),
            ("API.Example", "api.EXAMPLE", 443, True),
            ("ample", "api.example", 443, False),
            (".example", "api.example", 443, True),
            (".api.example", "api.example", 443, False),
            ("*.example", "api.example", 443, True),
            ("*.api.example", "api.example", 443, False),
            ("*ample", "api.example", 443, False),
            ("api.example:443", "api.example", 443, True),
            ("api.example:6443", "api.example", 443, False),
            (".example:443", "api.example", 443, True),
            ("b, c ,api.example", "api.example", 443, True),
            ("192.0.2.1", "192.0.2.1", 443, True),
            ("192.0.2.1:443", "192.0.2.1", 443, True),
            ("192.0.2.1:6443", "192.0.2.1", 443, False),
            ("192.0.2.0/24", "192.0.2.1", 443, True),
            ("192.0.2.7/24", "192.0.2.1", 443, True),
            ("192.0.3.0/24", "192.0.2.1", 443, False),
            ("192.0.2.0/33", "192.0.2.1", 443, False),
            ("192.0.2.0/24", "api.example", 443, False),
            ("2001:db8::1", "2001:db8:0::1", 443, True),
            ("[2001:db8::1]", "2001:db8::1", 443, True),
            ("[2001:db8::1]:443", "2001:db8::1", 443, True),
            ("[2001:db8::1]:1", "2001:db8::1", 443, False),
            ("2001:db8::/32", "2001:db8::1", 443, True),
            ("192.0.2.0/24", "2001:db8::1", 443, False),
            ("2.1", "192.0.2.1", 443, False),
            (":443", "api.example", 443, False),
        ):
            self.assertIs(excluded(host, port, entry), expected, (entry, host, port))

    def test_order(self) -> None:
        """The section goes before the kubeconfig, and that before the environment."""
        own = Proxy("http", "own", 1)
        environ = {"HTTPS_PROXY": "http://env:1"}
        for inKubeconfig, chosen, expected in (
            (None, "", "http://env:1"),
            (own, "", "http://own:1"),
            (own, "environment", "http://env:1"),
            (own, "none", None),
            (own, "socks5://section", "socks5://section:1080"),
        ):
            access = withProxy(ApiAccess("https://api", "o", proxy=inKubeconfig), chosen, environ)
            self.assertEqual(access.proxy and str(access.proxy), expected)


class ConnectTests(SynchronousTestCase):
    """CONNECT."""

    def said(self, proxy: Proxy, host: str = "api.example", port: int = 6443) -> str:
        return Connect(proxy, host, port).begin().decode()

    def test_request(self) -> None:
        """It names the server and nothing else; an IPv6 address in brackets."""
        self.assertTrue(self.said(HTTP).startswith("CONNECT api.example:6443 HTTP/1.1\r\nHost: api.example:6443\r\n"))
        self.assertTrue(self.said(HTTP, "2001:db8::1").startswith("CONNECT [2001:db8::1]:6443 HTTP/1.1\r\n"))
        self.assertTrue(self.said(HTTP).endswith("\r\n\r\n"))
        self.assertNotIn("uthorization", self.said(HTTP))

    def test_credentials(self) -> None:
        """User and password go as basic authentication, in UTF-8."""
        said = self.said(Proxy("http", "h", 1, "me", "pä:ss"))
        self.assertIn(f"\r\nProxy-Authorization: Basic {b64encode('me:pä:ss'.encode()).decode()}\r\n", said)

    def test_yes(self) -> None:
        """Any 2xx opens the way, in whatever pieces it comes; what follows is from beyond."""
        for answer in (
            b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200\r\n\r\n", b"HTTP/1.1 204 x\r\nA: b\r\n\r\n",
            b"HTTP/1.1 200 OK\n\n", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        ):
            for size in (1, 3, 1000):
                talk = Connect(HTTP, "h", 1)
                talk.begin()
                data = answer + b"beyond"
                for at in range(0, len(data), size):
                    if talk.received(data[at : at + size]) is None:
                        break
                rest = talk.rest + data[at + size :]
                self.assertEqual(rest, b"beyond", answer)

    def test_no(self) -> None:
        """Everything else says what the proxy said, and what to do."""
        for answer, part in (
            (b"HTTP/1.1 403 Forbidden\r\n\r\n", "does not connect to h:1: 403 Forbidden"),
            (b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere/\r\n\r\n", "302 Found"),
            (b"HTTP/1.1 407 Who?\r\n\r\n", "give user name and password"),
            (b"SSH-2.0-OpenSSH\r\n", "no HTTP proxy"),
            (b"HTTP/1.1 huh\r\n\r\n", "no HTTP proxy"),
            (b"\x05\x00", "no HTTP proxy"),
            (b"HTTP/1.1 403 \x1b[31m\r\n\r\n", "403 ?[31m"),
        ):
            talk = Connect(HTTP, "h", 1)
            self.assertIn(part, str(self.assertRaises(ProxyRefused, talk.received, answer)))
        talk = Connect(Proxy("http", "h", 1, "me", "pw"), "h", 1)
        answer = b"HTTP/1.1 407 x\r\n\r\n"
        self.assertIn("does not take user name", str(self.assertRaises(ProxyRefused, talk.received, answer)))

    def test_endlessHeaders(self) -> None:
        """Headers without end are given up."""
        talk = Connect(HTTP, "h", 1)
        talk.received(b"HTTP/1.1 200 OK\r\n")
        with self.assertRaises(ProxyRefused):
            for _ in range(HEADERS_LIMIT):
                talk.received(b"X: y\r\n")
        self.assertLess(len(talk._data), HEADERS_LIMIT + 10)


class SocksTests(SynchronousTestCase):
    """SOCKS 5."""

    def test_plain(self) -> None:
        """No authentication; addresses go as addresses, names as names for the proxy to look up."""
        for host, expected in (
            ("192.0.2.1", b"\x01\xc0\x00\x02\x01"),
            ("2001:db8::1", b"\x04\x20\x01\x0d\xb8" + b"\0" * 11 + b"\x01"),
            ("api.example", b"\x03\x0bapi.example"),
        ):
            talk = Socks5(SOCKS, host, 6443)
            self.assertEqual(talk.begin(), b"\x05\x01\x00")
            self.assertEqual(talk.received(b"\x05\x00"), b"\x05\x01\x00" + expected + b"\x19\x2b")
            self.assertIsNone(talk.received(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00beyond"))
            self.assertEqual(talk.rest, b"beyond")

    def test_login(self) -> None:
        """User name and password, where the proxy wants them; not where it does not."""
        proxy = Proxy("socks5", "h", 1, "me", "pä")
        talk = Socks5(proxy, "a", 1)
        self.assertEqual(talk.begin(), b"\x05\x02\x00\x02")
        self.assertEqual(talk.received(b"\x05\x02"), b"\x01\x02me\x03p\xc3\xa4")
        self.assertEqual(talk.received(b"\x01\x00"), b"\x05\x01\x00\x03\x01a\x00\x01")
        talk = Socks5(proxy, "a", 1)
        self.assertEqual(talk.received(b"\x05\x00"), b"\x05\x01\x00\x03\x01a\x00\x01")

    def test_pieces(self) -> None:
        """Answers may come byte by byte, or all at once, with a bound address of any sort."""
        for bound in (b"\x01" + b"\0" * 6, b"\x04" + b"\0" * 18, b"\x03\x05proxy\0\0", b"\x03\x00\0\0"):
            answer = b"\x05\x00\x05\x00\x00" + bound + b"beyond"
            talk = Socks5(SOCKS, "a", 1)
            at = next(at for at in range(len(answer)) if talk.received(answer[at : at + 1]) is None)
            self.assertEqual(answer[at + 1 :], b"beyond")
            talk = Socks5(SOCKS, "a", 1)
            self.assertIsNone(talk.received(answer))
            self.assertEqual(talk.rest, b"beyond")

    def test_no(self) -> None:
        """What it has against it is said in words."""
        for answers, part in (
            ([b"\x05\xff"], "give user name and password"),
            ([b"\x05\x01"], "of sort 1"),
            ([b"\x05\x02"], "of sort 2"),
            ([b"\x04\x00"], "no SOCKS 5 proxy"),
            ([b"HTTP/1.1 400 Bad Request\r\n"], "no SOCKS 5 proxy"),
            ([b"\x05\x00", b"\x05\x02"], "does not connect to a:1: its rules do not allow it"),
            ([b"\x05\x00", b"\x05\x05\x00\x01\0\0\0\0\0\0"], "the connection was refused"),
            ([b"\x05\x00", b"\x05\x63"], "code 99"),
            ([b"\x05\x00", b"\x05\x00\x00\x09\x00"], "not SOCKS 5"),
            ([b"\x05\x00", b"\x04\x00\x00\x01\x00"], "not SOCKS 5"),
        ):
            talk = Socks5(SOCKS, "a", 1)
            with self.assertRaises(ProxyRefused) as caught:
                for it in answers:
                    talk.received(it)
            self.assertIn(part, str(caught.exception))
        talk = Socks5(Proxy("socks5", "h", 1, "me", "pw"), "a", 1)
        talk.received(b"\x05\x02")
        self.assertIn("does not take", str(self.assertRaises(ProxyRefused, talk.received, b"\x01\x01")))


@implementer(IStreamClientEndpoint)
class _Proxy:
    """The endpoint that leads to the proxy."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.transport: Any = None
        self.protocol: Any = None
        self.waiting: Deferred[Any] | None = None
        self.late = False
        self.cancelled = False

    def connect(self, factory: Any) -> Deferred[Any]:
        d: Deferred[Any] = Deferred(lambda _: setattr(self, "cancelled", True))
        self.factory, self.waiting = factory, d
        if self.refusal is not None:
            d.errback(self.refusal)
        elif not self.late:
            self.connected()
        return d

    def connected(self) -> None:
        self.protocol = self.factory.buildProtocol(None)
        self.transport = StringTransport()
        self.protocol.makeConnection(self.transport)
        assert self.waiting is not None
        self.waiting.callback(self.protocol)


class _Inner(Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.lost: Any = None

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = reason


class EndpointTests(SynchronousTestCase):
    """The endpoint around the talk."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.proxy = _Proxy()
        self.inner = _Inner()

    def connect(self, proxy: Proxy = HTTP) -> Deferred[Any]:
        endpoint = ProxyEndpoint(self.clock, proxy, self.proxy, "api.example", 6443)
        factory = Factory.forProtocol(lambda: self.inner)
        factory.noisy = False
        return endpoint.connect(factory)

    def failure(self, d: Deferred[Any]) -> str:
        self.assertEqual(self.clock.getDelayedCalls(), [])
        return str(self.failureResultOf(d, Unreachable).value)

    def test_open(self) -> None:
        """Once the way is free the protocol is connected, gets what came along, and then is on its own."""
        d = self.connect()
        self.assertIn(b"CONNECT", self.proxy.transport.value())
        self.assertFalse(self.inner.connected)
        self.proxy.protocol.dataReceived(b"HTTP/1.1 200 OK\r\n\r\nhel")
        self.assertIs(self.successResultOf(d), self.inner)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.proxy.protocol.dataReceived(b"lo")
        self.assertEqual(self.inner.data, b"hello")
        self.proxy.transport.clear()
        self.inner.transport.write(b"out")  # type: ignore[union-attr]
        self.assertEqual(self.proxy.transport.value(), b"out")
        self.proxy.protocol.connectionLost(Failure(ConnectionDone()))
        self.assertIsInstance(self.inner.lost.value, ConnectionDone)

    def test_refused(self) -> None:
        """A proxy that says no is cut off, and its reason told with its name, without password."""
        d = self.connect(Proxy("http", "proxy.example", 3128, "me", "s3cr3tpw"))
        self.proxy.protocol.dataReceived(b"HTTP/1.1 403 No\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
        self.assertEqual(
            self.failure(d),
            "no way through the proxy http://***@proxy.example:3128: it does not connect to api.example:6443: 403 No",
        )
        self.assertTrue(self.proxy.transport.disconnected or self.proxy.transport.disconnecting)
        self.assertFalse(self.inner.connected)

    def test_silent(self) -> None:
        """A proxy that does not answer is given up, however slowly it goes on sending headers."""
        d = self.connect()
        for _ in range(int(ANSWER_TIMEOUT)):
            self.assertNoResult(d)
            self.proxy.protocol.dataReceived(b"HTTP/1.1 200 OK\r\n" if not _ else b"X: y\r\n")
            self.clock.advance(1)
        self.assertIn("no answer within 15 s", self.failure(d))

    def test_closes(self) -> None:
        """A proxy that hangs up."""
        d = self.connect(SOCKS)
        self.proxy.protocol.connectionLost(Failure(ConnectionDone()))
        self.assertIn("no way through the proxy socks5://192.0.2.9:1080: it closed the connection", self.failure(d))

    def test_unreachable(self) -> None:
        """A proxy that is not there is told apart from a server that is not there."""
        self.proxy.refusal = ConnectionRefusedError()
        self.assertIn("the proxy http://192.0.2.9:3128 cannot be reached: ", self.failure(self.connect()))

    def test_cancelled(self) -> None:
        """Cancelling ends it, connected or not, and leaves no timer."""
        d = self.connect()
        d.cancel()
        self.failureResultOf(d)
        self.assertTrue(self.proxy.transport.disconnected or self.proxy.transport.disconnecting)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.proxy = _Proxy()
        self.proxy.late = True
        d = self.connect()
        d.cancel()
        self.failureResultOf(d)
        self.assertTrue(self.proxy.cancelled)


class AgentTests(SynchronousTestCase):
    """The agent of an access with a proxy."""

    def test_request(self) -> None:
        """It connects to the proxy, and sends its request, credentials and all, only beyond it."""
        clock = Clock()
        network = RawNetwork(clock)
        asked: list[tuple[str, int]] = []

        def endpoint(reactor: Any, host: str, port: int, timeout: float = 0) -> Any:
            asked.append((host, port))
            return network.endpoint(reactor, host, port, timeout)

        agent = ApiAgent(clock, ApiAccess("http://api.example", "o", proxy=HTTP), endpoint)
        d = agent.request(b"GET", b"http://api.example:8080/x", Headers({b"authorization": [b"Bearer abc"]}))
        self.assertEqual(asked, [("192.0.2.9", 3128)])
        exchange = network.next()
        self.assertTrue(exchange.request.startswith(b"CONNECT api.example:8080 HTTP/1.1\r\n"))
        self.assertNotIn(b"abc", exchange.request)
        exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
        beyond = exchange.request.partition(b"\r\n\r\n")[2]
        self.assertTrue(beyond.startswith(b"GET /x HTTP/1.1\r\n"), beyond)
        self.assertIn(b"Bearer abc", beyond)
        self.assertEqual(len(agent.links), 1)
        exchange.answer(json.dumps({}).encode())
        self.assertEqual(self.successResultOf(d).code, 200)
        self.successResultOf(agent.close())
        self.assertEqual(clock.getDelayedCalls(), [])
