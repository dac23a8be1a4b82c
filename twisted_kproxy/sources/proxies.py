"""
The way through a proxy: HTTP's ``CONNECT`` (RFC 9110, 9.3.6), with basic authentication (RFC 7617), and SOCKS 5
(RFC 1928), with user name and password (RFC 1929). What talks to the proxy is without I/O; :class:`ProxyEndpoint`
carries the bytes.
"""

from __future__ import annotations

import ipaddress
import re
from base64 import b64encode
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import connectionDone
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import directlyProvides, implementer, providedBy

from .. import __version__
from ..core.values import hostPort
from ..interfaces import KproxyError
from .credentials import Proxy
from .errors import Unreachable, short, why

#: Seconds that a proxy may take to answer once it is connected; it connects to the server meanwhile.
ANSWER_TIMEOUT = 15.0
#: Bytes of the headers of its answer.
HEADERS_LIMIT = 16 * 1024

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: ([^\r\n]*))?\r?\n")
_HEADERS_END = re.compile(rb"\r?\n\r?\n")
_SOCKS_REPLIES = {
    1: "it has failed", 2: "its rules do not allow it", 3: "the network is unreachable", 4: "the host is unreachable",
    5: "the connection was refused", 6: "the host is too far away", 7: "it knows no CONNECT",
    8: "it does not know this sort of address",
}


class ProxyRefused(Exception):
    """What a proxy said instead of yes; the text says it."""


class _Negotiation(Protocol):
    """A talk with a proxy."""

    def begin(self) -> bytes:
        """What to send first."""

    def received(self, data: bytes) -> bytes | None:
        """
        The proxy said that.

        :return: what to answer (perhaps nothing), or ``None`` once the way is free: then :attr:`rest` is from beyond.
        :raise ProxyRefused: where it will not be.
        """

    @property
    def rest(self) -> bytes: ...


class Connect:
    """``CONNECT`` to a host and port."""

    def __init__(self, proxy: Proxy, host: str, port: int) -> None:
        self._proxy = proxy
        self._target = hostPort(host, port)
        self._data = b""
        self.rest = b""

    def begin(self) -> bytes:
        lines = [f"CONNECT {self._target} HTTP/1.1", f"Host: {self._target}", f"User-Agent: kproxy/{__version__}"]
        if self._proxy.user or self._proxy.password:
            pair = f"{self._proxy.user}:{self._proxy.password}".encode()
            lines.append(f"Proxy-Authorization: Basic {b64encode(pair).decode('ascii')}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def received(self, data: bytes) -> bytes | None:
        self._data += data
        end = _HEADERS_END.search(self._data)
        if len(self._data) > HEADERS_LIMIT and (end is None or end.end() > HEADERS_LIMIT):
            raise ProxyRefused(f"its answer has more than {HEADERS_LIMIT} bytes of headers")
        if not b"HTTP/1.".startswith(self._data[:7]):
            raise ProxyRefused("what answers there is no HTTP proxy")
        if end is None:
            return b""
        said = _STATUS.match(self._data)
        if said is None:
            raise ProxyRefused("what answers there is no HTTP proxy")
        code, reason = int(said[1]), short(said[2] or b"")
        if 100 <= code < 200:
            self._data = self._data[end.end() :]
            return self.received(b"") if self._data else b""
        if code == 407:
            given = self._proxy.user or self._proxy.password
            hint = "it does not take user name and password" if given else "give user name and password in its URL"
            raise ProxyRefused(f"it wants authentication (407 {reason}): {hint}")
        if not 200 <= code < 300:
            raise ProxyRefused(f"it does not connect to {self._target}: {code} {reason}".rstrip())
        self.rest = self._data[end.end() :]
        return None


class Socks5:
    """SOCKS 5 to a host, which is an address or a name for the proxy to look up, and port."""

    def __init__(self, proxy: Proxy, host: str, port: int) -> None:
        self._proxy = proxy
        self._host = host
        self._port = port
        self._data = b""
        self._step = self._method
        self.rest = b""

    def begin(self) -> bytes:
        return b"\x05\x02\x00\x02" if self._proxy.user or self._proxy.password else b"\x05\x01\x00"

    def received(self, data: bytes) -> bytes | None:
        self._data += data
        answer = b""
        while self._data:
            before = self._step
            said = self._step()
            if said is None:
                self.rest = self._data
                return None
            answer += said
            if self._step == before:
                break  # more is to come
        return answer

    def _take(self, size: int) -> bytes | None:
        if len(self._data) < size:
            return None
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def _method(self) -> bytes | None:
        if self._data[0] != 5:
            raise ProxyRefused("what answers there is no SOCKS 5 proxy")
        said = self._take(2)
        if said is None:
            return b""
        given = bool(self._proxy.user or self._proxy.password)
        if said[1] == 0:
            self._step = self._reply
            return self._request()
        if said[1] == 2 and given:
            self._step = self._authenticated
            user, password = self._proxy.user.encode(), self._proxy.password.encode()
            return b"\x01%c%s%c%s" % (len(user), user, len(password), password)
        if said[1] == 255:
            hint = "it takes user name and password in no way that is known" if given else "give user name and password"
            raise ProxyRefused(f"it wants authentication: {hint}")
        raise ProxyRefused(f"it wants authentication of sort {said[1]}, which nobody offered")

    def _authenticated(self) -> bytes | None:
        said = self._take(2)
        if said is None:
            return b""
        if said[1] != 0:
            raise ProxyRefused("it does not take user name and password")
        self._step = self._reply
        return self._request()

    def _request(self) -> bytes:
        try:
            address = ipaddress.ip_address(self._host)
        except ValueError:
            name = self._host.encode("ascii")
            if len(name) > 255:
                raise ProxyRefused("the server's name is longer than 255 bytes")
            where = b"\x03%c%s" % (len(name), name)
        else:
            where = (b"\x01" if address.version == 4 else b"\x04") + address.packed
        return b"\x05\x01\x00" + where + self._port.to_bytes(2, "big")

    def _reply(self) -> bytes | None:
        if self._data[0] != 5:
            raise ProxyRefused("its answer is not SOCKS 5")
        if len(self._data) >= 2 and self._data[1] != 0:
            said = _SOCKS_REPLIES.get(self._data[1], f"it gives the code {self._data[1]}")
            raise ProxyRefused(f"it does not connect to {hostPort(self._host, self._port)}: {said}")
        if len(self._data) < 5:
            return b""
        sizes = {1: 4, 3: 1 + self._data[4], 4: 16}
        if self._data[3] not in sizes:
            raise ProxyRefused("its answer is not SOCKS 5")
        return b"" if self._take(4 + sizes[self._data[3]] + 2) is None else None


class _Tunnel(ProtocolWrapper):
    """A connection to a proxy; once the way is free, the connection beyond."""

    def makeConnection(self, transport: Any) -> None:
        # Like ProtocolWrapper, save that the wrapped protocol has to wait.
        directlyProvides(self, providedBy(transport))
        self.transport = transport
        self.connected = 1
        self.factory.registerProtocol(self)
        self.open = False
        self.factory.owner.connected(self)

    def dataReceived(self, data: bytes) -> None:
        if self.open:
            super().dataReceived(data)  # type: ignore[no-untyped-call]
        else:
            self.factory.owner.heard(data)

    def opened(self, rest: bytes) -> None:
        self.open = True
        self.wrappedProtocol.makeConnection(self)  # type: ignore[arg-type]
        if rest:
            self.wrappedProtocol.dataReceived(rest)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.open:
            super().connectionLost(reason)  # type: ignore[no-untyped-call]
        else:
            self.factory.unregisterProtocol(self)
            self.factory.owner.lost(reason)


class _TunnelFactory(WrappingFactory):
    protocol = _Tunnel
    noisy = False

    def __init__(self, wrapped: IProtocolFactory, owner: _Attempt) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.owner = owner


class _Attempt:
    """One way through a proxy."""

    def __init__(self, reactor: Any, proxy: Proxy, negotiation: _Negotiation) -> None:
        self._reactor = reactor
        self._proxy = proxy
        self._negotiation = negotiation
        self._timer: IDelayedCall | None = None
        self._tunnel: Any = None
        self._connecting: Deferred[Any] | None = None
        self._done: Deferred[IProtocol] | None = Deferred(lambda _: self._cancel())

    def go(self, endpoint: IStreamClientEndpoint, factory: IProtocolFactory) -> Deferred[IProtocol]:
        done = self._done
        assert done is not None
        self._connecting = endpoint.connect(_TunnelFactory(factory, self))
        self._connecting.addErrback(self._unreachable)
        return done

    def _unreachable(self, reason: Failure) -> None:
        self._connecting = None
        if isinstance(reason.value, KproxyError):
            self._fail(reason.value)
        else:
            self._fail(Unreachable(f"the proxy {self._proxy} cannot be reached: {why(reason.value)}"))

    def connected(self, tunnel: _Tunnel) -> None:
        self._tunnel = tunnel
        if self._done is None:
            self._cut()
            return
        self._timer = self._reactor.callLater(ANSWER_TIMEOUT, self._late)
        tunnel.transport.write(self._negotiation.begin())  # type: ignore[union-attr]

    def heard(self, data: bytes) -> None:
        if self._done is None:
            return
        try:
            answer = self._negotiation.received(data)
        except ProxyRefused as error:
            self._fail(Unreachable(f"no way through the proxy {self._proxy}: {error}"))
            return
        if answer is None:
            done = self._finish()
            self._tunnel.opened(self._negotiation.rest)
            if done is not None:
                done.callback(self._tunnel.wrappedProtocol)
        elif answer:
            self._tunnel.transport.write(answer)

    def lost(self, reason: Failure) -> None:
        what = why(reason.value)
        error = Unreachable(f"no way through the proxy {self._proxy}: it closed the connection ({what})")
        error.__cause__ = reason.value
        self._fail(error)

    def _late(self) -> None:
        self._fail(Unreachable(f"no way through the proxy {self._proxy}: no answer within {ANSWER_TIMEOUT:g} s"))

    def _cancel(self) -> None:
        self._finish()
        if self._connecting is not None and self._tunnel is None:
            self._connecting.cancel()
        self._cut()

    def _fail(self, error: KproxyError) -> None:
        done = self._finish()
        self._cut()
        if done is not None:
            done.errback(error)

    def _finish(self) -> Deferred[IProtocol] | None:
        done, self._done = self._done, None
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        return done

    def _cut(self) -> None:
        if self._tunnel is not None and not self._tunnel.open:
            self._tunnel.transport.abortConnection()


@implementer(IStreamClientEndpoint)
class ProxyEndpoint:
    """
    Connects to a host and port beyond a proxy.

    :param inner: leads to the proxy itself.
    """

    def __init__(self, reactor: Any, proxy: Proxy, inner: IStreamClientEndpoint, host: str, port: int) -> None:
        self._reactor = reactor
        self._proxy = proxy
        self._inner = inner
        self._host = host
        self._port = port

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """
        Fires with the protocol once the way is free; fails with :class:`~.errors.Unreachable`, whose text says what
        the proxy had against it. It has :data:`ANSWER_TIMEOUT` to answer once it is connected.
        """
        kind = Socks5 if self._proxy.scheme == "socks5" else Connect
        negotiation: _Negotiation = kind(self._proxy, self._host, self._port)
        return _Attempt(self._reactor, self._proxy, negotiation).go(self._inner, protocolFactory)
