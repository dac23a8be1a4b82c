"""
The HTTP agent for one API server: TLS from its certificates, sockets that notice a dead link, connections that can be
cut at once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.components import proxyForInterface
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IBodyProducer, IResponse
from zope.interface import implementer

from .authentication import Credentials
from .credentials import ApiAccess
from .errors import Unverified
from .proxies import ProxyEndpoint
from .tls import RELOAD_AGE, TlsAttempt, TlsPolicy

#: Seconds for one attempt to connect to one address.
CONNECT_TIMEOUT = 15.0

# A peer that vanished without a word is noticed after 30 + 3 × 10 s, and unacknowledged bytes are given up after 60 s:
# the kernel's defaults mean hours and a quarter of an hour.
_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
)


class _Link(ProtocolWrapper):
    """The TCP connection itself, below TLS."""

    def connectionMade(self) -> None:
        self.factory.owner.made(self)
        super().connectionMade()  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        self.factory.owner.lost(self)


class _LinkFactory(WrappingFactory):
    protocol = _Link
    noisy = False

    def __init__(self, wrapped: IProtocolFactory, owner: _Connection) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.owner = owner


@implementer(IStreamClientEndpoint, IAgentEndpointFactory)
class _Connection:
    """The connection of one request: makes its endpoint, knows its link and how its TLS went."""

    def __init__(self, agent: ApiAgent) -> None:
        self._agent = agent
        self._link: _Link | None = None
        self._inner: IStreamClientEndpoint
        self._attempts: list[tuple[str, TlsAttempt]] = []

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        agent, host = self._agent, uri.host.decode("ascii")
        proxy, policy = agent.access.proxy, agent.policy
        nearest = (host, uri.port) if proxy is None else (proxy.host, proxy.port)
        self._inner = agent.endpoint(agent.reactor, *nearest, timeout=CONNECT_TIMEOUT)
        endpoint: IStreamClientEndpoint = self
        if proxy is not None:
            if proxy.scheme == "https":
                creator = agent.proxyPolicy.creatorForProxy(proxy.host)
                endpoint = self._secured(f"the proxy {proxy}: ", creator, endpoint)
            endpoint = ProxyEndpoint(agent.reactor, proxy, endpoint, host, uri.port)
        if policy is not None:
            endpoint = self._secured("", policy.creatorForNetloc(uri.host, uri.port), endpoint)
        return endpoint

    def _secured(self, whose: str, attempt: TlsAttempt, endpoint: IStreamClientEndpoint) -> IStreamClientEndpoint:
        self._attempts.append((whose, attempt))
        return wrapClientTLS(attempt, endpoint)

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        d: Deferred[Any] = self._inner.connect(_LinkFactory(protocolFactory, self))
        return d.addCallback(lambda link: link.wrappedProtocol)

    def answered(self, response: IResponse) -> IResponse:
        if response.code == 401 and self._agent.policy is not None:
            self._agent.policy.expire()
        return _Response(response, self)

    def failed(self, reason: Failure) -> Failure:
        """Where it was TLS, say what exactly and what to do."""
        for whose, attempt in self._attempts:
            text = attempt.explained(reason.value)
            if text:
                self._agent.tlsFailed(attempt)
                raise Unverified(f"TLS failed: {whose}{text}") from None
        return reason

    def made(self, link: _Link) -> None:
        self._link = link
        self._agent.add(link)
        getHandle = getattr(link.transport, "getHandle", None)
        if getHandle is not None:
            try:
                for level, option, value in _SOCKET_OPTIONS:
                    getHandle().setsockopt(level, option, value)
            except OSError:
                # Reset already; whoever waits for the answer is about to hear of it.
                pass

    def lost(self, link: _Link) -> None:
        self._link = None
        self._agent.forget(link)

    def abort(self) -> None:
        if self._link is not None:
            self._link.transport.abortConnection()  # type: ignore[union-attr]


class _Abortable:
    """The transport as a body protocol sees it, with ``abortConnection`` as on a socket."""

    def __init__(self, transport: Any, connection: _Connection) -> None:
        self._transport = transport
        self._connection = connection

    def abortConnection(self) -> None:
        self._connection.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Body(proxyForInterface(IProtocol)):  # type: ignore[misc]
    def __init__(self, original: IProtocol, connection: _Connection) -> None:
        super().__init__(original)
        self._connection = connection

    def makeConnection(self, transport: Any) -> None:
        self.original.makeConnection(_Abortable(transport, self._connection))


class _Response(proxyForInterface(IResponse)):  # type: ignore[misc]
    def __init__(self, original: IResponse, connection: _Connection) -> None:
        super().__init__(original)
        self._connection = connection

    def deliverBody(self, protocol: IProtocol) -> None:
        self.original.deliverBody(_Body(protocol, self._connection))


@implementer(IAgent)
class ApiAgent:
    """
    Sends requests to an API server, each over a connection of its own: a watch occupies one for minutes anyway, and
    lists are rare. When the client certificate becomes another one, every connection is cut, so that nothing goes on
    under the old one.

    :param endpoint: makes what a connection to a host and port is made with, below TLS and proxies.
    :param credentials: who we are, where that is not all in the access.
    :ivar reached: called with address and port of each connection that is made to the server itself.
    :raise NotAvailable: where certificates of the access cannot be used; the text names them.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        access: ApiAccess,
        endpoint: Callable[..., IStreamClientEndpoint] = HostnameEndpoint,
        credentials: Credentials | None = None,
    ) -> None:
        self.reactor = reactor
        self.access = access
        self.endpoint = endpoint
        self._credentials = credentials
        pair = credentials.pair if credentials is not None else lambda: None
        self.policy = TlsPolicy(access, reactor, pair) if access.secure else None
        # Without TLS there is no client certificate to be had, but there may still be a proxy that speaks TLS.
        self.proxyPolicy = self.policy or TlsPolicy(replace(access, clientCertificate=None, clientKey=None), reactor)
        self.links: set[_Link] = set()
        self.reached: Callable[[str, int], None] | None = None
        self._closing: list[Deferred[None]] = []
        self._look: IDelayedCall | None = None
        if self.policy is not None:
            self.policy.changed = self._cut
        if credentials is not None:
            # Also where nobody makes a connection just now.
            credentials.whenChanged(lambda: self.policy.refresh() if self.policy is not None else None)

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """
        Cancelling cuts the connection; so does ``abortConnection`` of the transport that a body is given. Fails with
        :class:`~.errors.Unverified` where TLS does.
        """
        if headers is not None and self.access.disableCompression:
            headers = headers.copy()
            headers.removeHeader(b"accept-encoding")
        connection = _Connection(self)
        agent = Agent.usingEndpointFactory(self.reactor, connection)  # type: ignore[no-untyped-call]
        d: Deferred[IResponse] = agent.request(method, uri, headers, bodyProducer)
        return d.addCallbacks(connection.answered, connection.failed)

    def close(self) -> Deferred[None]:
        """Cut every connection, and end a plugin that runs; fires once they are gone."""
        d: Deferred[None] = Deferred()
        self._closing.append(d)
        self._cut()
        self._settle()
        if self._credentials is None:
            return d
        return gatherResults([d, self._credentials.close()]).addCallback(lambda _: None)

    def tlsFailed(self, attempt: TlsAttempt) -> None:
        """Other certificates may mend it: look for some before the next connection."""
        if self.policy is not None:
            self.policy.expire()
        if attempt.alerted and self._credentials is not None:
            self._credentials.pairRefused()

    def status(self) -> Mapping[str, Any]:
        """JSON-able facts for operators."""
        return self.policy.status() if self.policy is not None else {}

    def _cut(self) -> None:
        for link in list(self.links):
            link.transport.abortConnection()  # type: ignore[union-attr]

    def add(self, link: _Link) -> None:
        self.links.add(link)
        if self.reached is not None and self.access.proxy is None:
            peer = link.transport.getPeer()  # type: ignore[union-attr]
            if isinstance(peer, IPv4Address | IPv6Address):
                self.reached(peer.host, peer.port)
        if self._look is None and self.policy is not None and self.policy.rotates:
            self._look = self.reactor.callLater(RELOAD_AGE, self._lookAgain)

    def _lookAgain(self) -> None:
        # A watch goes on for minutes: whether its certificate is still ours shows without a new connection.
        self._look = self.reactor.callLater(RELOAD_AGE, self._lookAgain)
        if self.policy is not None:
            self.policy.refresh()

    def forget(self, link: _Link) -> None:
        self.links.discard(link)
        self._settle()

    def _settle(self) -> None:
        if not self.links:
            look, self._look = self._look, None
            if look is not None and look.active():
                look.cancel()
            closing, self._closing = self._closing, []
            for d in closing:
                d.callback(None)
