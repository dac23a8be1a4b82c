"""
A network whose only server is the test: the real agent and Twisted's own HTTP client over memory, with every byte of
every answer (headers, chunk borders, how it ends) in the test's hands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.credentials import ApiAccess


class Transport(StringTransport):
    """Tells its exchange what the client does to it; a closed one closes at once."""

    exchange: Exchange

    def write(self, data: bytes) -> None:
        super().write(data)
        self.exchange.written()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        self.exchange.lost(ConnectionDone())

    def abortConnection(self) -> None:
        self.exchange.aborted = True
        self.exchange.lost(ConnectionLost())


class Exchange:
    """
    One connection with the one request that it carries.

    :ivar open: the client has not closed it, nor the test.
    :ivar aborted: the client has cut it.
    """

    def __init__(self, protocol: Any, asked: Callable[[Exchange], None]) -> None:
        self._asked = asked
        self.open = True
        self.aborted = False
        self.protocol = protocol
        self.transport = Transport()
        self.transport.exchange = self
        protocol.makeConnection(self.transport)

    def written(self) -> None:
        if self.request.endswith(b"\r\n\r\n"):
            self._asked(self)

    @property
    def request(self) -> bytes:
        """All that the client has sent."""
        return self.transport.value()

    @property
    def path(self) -> str:
        return urlsplit(self._target).path

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self._target).query, keep_blank_values=True))

    @property
    def headers(self) -> dict[str, str]:
        lines = self.request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def _target(self) -> str:
        return self.request.split(b" ", 2)[1].decode("ascii")

    @property
    def watching(self) -> bool:
        return self.query.get("watch") == "true"

    def send(self, data: bytes) -> None:
        """Give the client bytes, as they are; a client that has closed takes none."""
        if self.open:
            self.protocol.dataReceived(data)

    def answer(self, body: bytes, code: int = 200, type: str = "application/json", **headers: str) -> None:
        """A whole answer with its length."""
        lines = [f"HTTP/1.1 {code} X", f"Content-Type: {type}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def answerJson(self, document: Any, code: int = 200, **headers: str) -> None:
        self.answer(json.dumps(document).encode(), code, **headers)

    def begin(self) -> None:
        """The headers of a stream in chunks."""
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, type: str, it: Any) -> None:
        """One event of a watch, in a chunk of its own."""
        self.chunk(json.dumps({"type": type, "object": it}).encode() + b"\n")

    def end(self) -> None:
        """The regular end of a stream in chunks."""
        self.send(b"0\r\n\r\n")

    def reset(self) -> None:
        """The connection breaks."""
        self.lost(ConnectionLost())

    def lost(self, reason: Exception) -> None:
        if self.open:
            self.open = False
            self.protocol.connectionLost(Failure(reason))


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, network: RawNetwork) -> None:
        self.network = network

    def connect(self, factory: Any) -> Deferred[Any]:
        network = self.network
        network.attempts += 1
        if network.refusal is not None:
            return fail(network.refusal)
        made: Deferred[Any] = Deferred(lambda _: network.connecting.remove(connected))

        def connected() -> None:
            exchange = Exchange(factory.buildProtocol(None), network.asked)
            network.exchanges.append(exchange)
            made.callback(exchange.protocol)

        if network.silent:
            network.connecting.append(connected)
        else:
            connected()
        return made


class RawNetwork:
    """
    Everything there is beyond the agent's sockets.

    :param respond: called with each exchange once its request is there, by the clock.
    :ivar exchanges: those that nobody has taken yet, in order.
    :ivar refusal: what attempts to connect fail with.
    :ivar silent: attempts to connect go unanswered.
    :ivar attempts: how many there were.
    """

    def __init__(self, clock: IReactorTime, respond: Callable[[Exchange], None] | None = None) -> None:
        self._clock = clock
        self._respond = respond
        self.exchanges: list[Exchange] = []
        self.connecting: list[Callable[[], None]] = []
        self.refusal: Exception | None = None
        self.silent = False
        self.attempts = 0

    def endpoint(self, reactor: Any, host: str, port: int, timeout: float = 30) -> _Endpoint:
        """For an agent, in the place of L{twisted.internet.endpoints.HostnameEndpoint}."""
        return _Endpoint(self)

    def asked(self, exchange: Exchange) -> None:
        if self._respond is not None:
            self._clock.callLater(0, self._respond, exchange)

    def agent(self) -> ApiAgent:
        """An agent that speaks plain HTTP over this network, also to URLs of HTTPS."""
        return ApiAgent(self._clock, ApiAccess("http://unused.example", "test"), self.endpoint)

    def next(self) -> Exchange:
        """The exchange that has waited longest."""
        return self.exchanges.pop(0)
