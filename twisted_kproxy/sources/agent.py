"""
The HTTP agent for one API server: TLS from its certificates, sockets that notice a dead link, connections that can be
cut at once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from OpenSSL import SSL
from OpenSSL.crypto import X509, PKey
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.internet.ssl import Certificate, CertificateOptions, optionsForClientTLS, trustRootFromCertificates
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.components import proxyForInterface
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IBodyProducer, IPolicyForHTTPS, IResponse
from zope.interface import implementer

from ..interfaces import NotAvailable
from .credentials import ApiAccess, Pem

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


@implementer(IOpenSSLClientConnectionCreator)
class _AnyServer:
    """TLS with whoever answers; only ever made for ``insecure-skip-tls-verify``."""

    def __init__(self, options: CertificateOptions, hostname: str) -> None:
        self._context = options.getContext()
        self._hostname = hostname

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        connection = SSL.Connection(self._context, None)
        if not _isAddress(self._hostname):
            connection.set_tlsext_host_name(self._hostname.encode("ascii"))
        return connection


@implementer(IPolicyForHTTPS)
class TlsPolicy:
    """
    TLS as an access asks for it. Certificate files are read again for each connection, so that they may rotate; new
    ones that cannot be read leave the old ones in use.

    :raise NotAvailable: naming the file or field.
    """

    log = Logger()

    def __init__(self, access: ApiAccess) -> None:
        self._access = access
        self._made: tuple[bytes, ...] | None = None
        self._extra: dict[str, Any] = {}
        self._trustRoot: Any = None
        self._load()

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """What makes TLS connections to that host."""
        try:
            self._load()
        except NotAvailable as error:
            self.log.warn("The last certificates stay in use: {error}", error=str(error))
        name = self._access.tlsServerName or hostname.decode("ascii")
        if self._access.insecure:
            creator: IOpenSSLClientConnectionCreator = _AnyServer(CertificateOptions(**self._extra), name)
            return creator
        return optionsForClientTLS(name, trustRoot=self._trustRoot, extraCertificateOptions=dict(self._extra))

    def _load(self) -> None:
        access = self._access
        pems = (access.certificateAuthority, access.clientCertificate, access.clientKey)
        read = tuple(b"" if pem is None else pem.read() for pem in pems)
        if read == self._made:
            return
        extra: dict[str, Any] = {}
        trustRoot: Any = None  # the platform's
        if access.certificateAuthority is not None:
            found = _certificates(access.certificateAuthority, read[0])
            anchors = [Certificate(X509.from_cryptography(it)) for it in found]  # type: ignore[no-untyped-call]
            trustRoot = trustRootFromCertificates(anchors)  # type: ignore[no-untyped-call]
        if access.clientCertificate is not None and access.clientKey is not None:
            chain = _certificates(access.clientCertificate, read[1])
            try:
                key = load_pem_private_key(read[2], password=None)
            except (ValueError, TypeError):
                raise NotAvailable(f"{access.clientKey.origin}: it is not a private key in PEM without a password")
            if _public(key.public_key()) != _public(chain[0].public_key()):
                certificate = access.clientCertificate.origin
                raise NotAvailable(f"{access.clientKey.origin}: it does not belong to {certificate}")
            extra["privateKey"] = PKey.from_cryptography_key(key)  # type: ignore[arg-type]
            extra["certificate"] = X509.from_cryptography(chain[0])
            extra["extraCertChain"] = [X509.from_cryptography(it) for it in chain[1:]]
        self._made, self._extra, self._trustRoot = read, extra, trustRoot


def _certificates(pem: Pem, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise NotAvailable(f"{pem.origin}: there is no certificate in PEM in it")


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _isAddress(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return True
    return False


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
    """The connection of one request: makes its endpoint, knows its link."""

    def __init__(self, agent: ApiAgent) -> None:
        self._agent = agent
        self._link: _Link | None = None
        self._inner: IStreamClientEndpoint

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        host = uri.host.decode("ascii")
        self._inner = self._agent.endpoint(self._agent.reactor, host, uri.port, timeout=CONNECT_TIMEOUT)
        policy = self._agent.policy
        if policy is None:
            return self
        endpoint: IStreamClientEndpoint = wrapClientTLS(policy.creatorForNetloc(uri.host, uri.port), self)
        return endpoint

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        d: Deferred[Any] = self._inner.connect(_LinkFactory(protocolFactory, self))
        return d.addCallback(lambda link: link.wrappedProtocol)

    def made(self, link: _Link) -> None:
        self._link = link
        self._agent.links.add(link)
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
    lists are rare.

    :param endpoint: makes what a connection to a host and port is made with, below TLS.
    :raise NotAvailable: where certificates of the access cannot be used; the text names them.
    """

    def __init__(
        self,
        reactor: Any,
        access: ApiAccess,
        endpoint: Callable[..., IStreamClientEndpoint] = HostnameEndpoint,
    ) -> None:
        self.reactor = reactor
        self.endpoint = endpoint
        self.policy = TlsPolicy(access) if access.secure else None
        self.links: set[_Link] = set()
        self._closing: list[Deferred[None]] = []

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """Cancelling cuts the connection; so does ``abortConnection`` of the transport that a body is given."""
        connection = _Connection(self)
        agent = Agent.usingEndpointFactory(self.reactor, connection)  # type: ignore[no-untyped-call]
        d: Deferred[IResponse] = agent.request(method, uri, headers, bodyProducer)
        return d.addCallback(_Response, connection)

    def close(self) -> Deferred[None]:
        """Cut every connection; fires once they are gone."""
        d: Deferred[None] = Deferred()
        self._closing.append(d)
        for link in list(self.links):
            link.transport.abortConnection()  # type: ignore[union-attr]
        self._settle()
        return d

    def forget(self, link: _Link) -> None:
        self.links.discard(link)
        self._settle()

    def _settle(self) -> None:
        if not self.links:
            closing, self._closing = self._closing, []
            for d in closing:
                d.callback(None)
