"""
Proxies to go through, on sockets of this process: HTTP's ``CONNECT``, and SOCKS 5 (RFC 1928, RFC 1929). They look
names up in a table of their own, so that a test sees who resolves them.
"""

from __future__ import annotations

import socket
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.protocol import Factory, Protocol


class _Beyond(Protocol):
    """The connection to the server."""

    def __init__(self, near: _Near) -> None:
        self.near = near

    def dataReceived(self, data: bytes) -> None:
        self.near.transport.write(data)

    def connectionLost(self, reason: Any = None) -> None:
        self.near.transport.loseConnection()


class _Near(Protocol):
    """The connection from the client."""

    factory: Any
    far: Any = None
    gone = False

    def __init__(self) -> None:
        self.data = b""
        self.established = False

    def connectionMade(self) -> None:
        self.factory.connections += 1

    def dataReceived(self, data: bytes) -> None:
        if self.established:
            self.far.transport.write(data)
            return
        self.data += data
        self.factory.heard.append(data)
        if not self.factory.silent:
            self.negotiate()

    def negotiate(self) -> None:
        raise NotImplementedError

    def established_(self) -> bytes:
        raise NotImplementedError

    def reach(self, host: str, port: int) -> None:
        self.factory.targets.append((host, port))
        host, port = self.factory.hosts.get(host, (host, port))
        kind: Any = TCP6ClientEndpoint if ":" in host else TCP4ClientEndpoint
        beyond = _Beyond(self)
        factory = Factory.forProtocol(lambda: beyond)
        factory.noisy = False
        kind(self.factory.reactor, host, port).connect(factory).addCallbacks(self._reached, self.refused)

    def _reached(self, far: Any) -> None:
        if self.gone:
            far.transport.abortConnection()
            return
        self.far, self.established = far, True
        answer = self.established_()
        step = self.factory.trickle or len(answer)
        for at in range(0, len(answer), step):
            self.transport.write(answer[at : at + step])

    def refused(self, reason: Any) -> None:
        raise NotImplementedError

    def connectionLost(self, reason: Any = None) -> None:
        self.gone = True
        if self.far is not None:
            self.far.transport.loseConnection()


class _Connect(_Near):
    def negotiate(self) -> None:
        if b"\r\n\r\n" not in self.data:
            return
        factory = self.factory
        line, *fields = self.data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
        factory.requests.append((line, headers))
        if factory.answer is not None:
            self.transport.write(factory.answer)
            return
        if factory.users:
            sort, _, said = headers.get("proxy-authorization", "").partition(" ")
            user, _, password = b64decode(said).decode().partition(":") if sort == "Basic" else ("", "", "")
            if factory.users.get(user) != password:
                self.transport.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                self.transport.loseConnection()
                return
        method, target, _ = line.split(" ")
        assert method == "CONNECT", line
        host, _, port = target.rpartition(":")
        self.reach(host.strip("[]"), int(port))

    def established_(self) -> bytes:
        return b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n"

    def refused(self, reason: Any) -> None:
        self.transport.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        self.transport.loseConnection()


class _Socks(_Near):
    step = "methods"

    def negotiate(self) -> None:
        if self.factory.answer is not None:
            self.transport.write(self.factory.answer)
            return
        getattr(self, f"_{self.step}")()

    def _methods(self) -> None:
        if len(self.data) < 2 or len(self.data) < 2 + self.data[1]:
            return
        assert self.data[0] == 5
        offered, self.data = self.data[2 : 2 + self.data[1]], self.data[2 + self.data[1] :]
        wanted = 2 if self.factory.users else 0
        if wanted not in offered:
            self.transport.write(b"\x05\xff")
            self.transport.loseConnection()
            return
        self.step = "login" if wanted else "request"
        self.transport.write(b"\x05%c" % wanted)

    def _login(self) -> None:
        if len(self.data) < 2 or len(self.data) < 3 + self.data[1]:
            return
        size = self.data[1]
        user, end = self.data[2 : 2 + size].decode(), 3 + size + self.data[2 + size]
        if len(self.data) < end:
            return
        password, self.data = self.data[3 + size : end].decode(), self.data[end:]
        good = self.factory.users.get(user) == password
        self.step = "request"
        self.transport.write(b"\x01\x00" if good else b"\x01\x01")
        if not good:
            self.transport.loseConnection()

    def _request(self) -> None:
        if len(self.data) < 5:
            return
        version, command, _, sort = self.data[:4]
        assert (version, command) == (5, 1)
        size = {1: 4, 3: 1 + self.data[4], 4: 16}[sort]
        if len(self.data) < 6 + size:
            return
        raw, port = self.data[4 : 4 + size], int.from_bytes(self.data[4 + size : 6 + size], "big")
        if sort == 3:
            host = raw[1:].decode()
        else:
            host = socket.inet_ntop(socket.AF_INET if sort == 1 else socket.AF_INET6, raw)
        self.factory.sorts.append(sort)
        self.reach(host, port)

    def established_(self) -> bytes:
        # The bound address as a name: its length is not that of an address.
        return b"\x05\x00\x00\x03\x05proxy\x00\x00"

    def refused(self, reason: Any) -> None:
        self.transport.write(b"\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00")
        self.transport.loseConnection()


class FakeProxy(Factory):
    """
    :param kind: ``connect`` or ``socks5``.
    :param users: who may use it, with passwords; everybody where there is none.
    :param hosts: where names (or addresses) lead.
    :ivar answer: bytes to say instead, whatever is asked.
    :ivar silent: says nothing.
    :ivar trickle: pieces of so many bytes.
    :ivar targets: what it was asked to connect to.
    :ivar requests: of ``connect``: first line and headers.
    :ivar sorts: of ``socks5``: the sort of each address, 1, 3 or 4.
    :ivar heard: all that clients said before the way was free.
    """

    noisy = False

    def __init__(
        self,
        reactor: Any,
        kind: str,
        users: Mapping[str, str] | None = None,
        hosts: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        self.reactor = reactor
        self.kind = kind
        self.users = dict(users or {})
        self.hosts = dict(hosts or {})
        self.answer: bytes | None = None
        self.silent = False
        self.trickle = 0
        self.targets: list[tuple[str, int]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sorts: list[int] = []
        self.heard: list[bytes] = []
        self.connections = 0

    def buildProtocol(self, addr: Any) -> Any:
        protocol = _Connect() if self.kind == "connect" else _Socks()
        protocol.factory = self
        return protocol
