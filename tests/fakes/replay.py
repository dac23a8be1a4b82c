"""
A server on a real socket that answers with recorded bytes, and time that passes as it was recorded: on the client's
clock, and only while nothing is on its way in any socket. So a test may wait for hours, sleeps never, and knows at
which moment each request was made.
"""

from __future__ import annotations

import random
from bisect import bisect_left as bisect
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from msgspec import Struct
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions
from twisted.internet.task import Clock, deferLater
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from .recordings import Recorded

reactor: Any = _reactor
Piece = tuple[float, bytes]
#: Turns of the reactor in which nothing may be on its way before time passes.
_QUIET_TURNS = 3
#: Bytes of an answer up to which sending it byte by byte is worth its time.
SINGLE_LIMIT = 6000

# --- how an answer is cut into writes


def asReceived(pieces: list[Piece]) -> list[Piece]:
    """Where the recording's reads ended."""
    return pieces


def whole(pieces: list[Piece]) -> list[Piece]:
    """All at once, at the beginning."""
    return [(pieces[0][0], b"".join(data for _, data in pieces))]


def singly(pieces: list[Piece]) -> list[Piece]:
    """Byte by byte."""
    return [(at, bytes([byte])) for at, data in pieces for byte in data]


def anywhere(seed: int, count: int = 40) -> Callable[[list[Piece]], list[Piece]]:
    """At places by lot, which have nothing to do with where anything ends."""

    def cut(pieces: list[Piece]) -> list[Piece]:
        lot = random.Random(seed)
        data = b"".join(data for _, data in pieces)
        ends = list(accumulate(len(piece) for _, piece in pieces))
        # Headers must not wait for what comes long after them.
        borders = sorted({0, ends[0], len(data), *(lot.randrange(len(data)) for _ in range(count))})
        # Each at the time of its last byte.
        return [(pieces[bisect(ends, stop)][0], data[start:stop]) for start, stop in pairwise(borders)]

    return cut


def cutsOf(recorded: Recorded, seeds: Iterable[int] = (1, 2)) -> list[Callable[[list[Piece]], list[Piece]]]:
    """Every way to cut it that takes no long time."""
    ways = [asReceived, whole, *map(anywhere, seeds)]
    return [*ways, singly] if len(recorded.response) <= SINGLE_LIMIT else ways


# --- what is said


class Answer(Struct, frozen=True):
    """
    What a request is answered with.

    :ivar pieces: seconds since the request, bytes.
    :ivar ending: seconds after which the server ends the connection; ``None``: it stays open.
    :ivar reset: and whether it does so without a good-bye.
    """

    pieces: list[Piece]
    ending: float | None = None
    reset: bool = False


def answer(
    name: str,
    cut: Callable[[list[Piece]], list[Piece]] = asReceived,
    stretch: float = 1.0,
    reset: bool = False,
    length: int | None = None,
) -> Answer:
    """
    A recorded one, ending as it was recorded.

    :param stretch: every time is that many times as long.
    :param reset: where it ends before its time: whether by a reset rather than by a regular end of the connection.
    :param length: the connection ends after so many bytes.
    """
    recorded = Recorded(name)
    pieces = recorded.pieces
    ending = recorded.cut
    if length is not None:
        kept, left = [], length
        for at, data in pieces:
            if left > 0:
                kept.append((at, data[:left]))
                left -= len(data)
        pieces, ending = kept, kept[-1][0]
    head = recorded.response.partition(b"\r\n\r\n")[0].lower()
    if ending is None and (b"\r\nconnection: close" in head or head.startswith(b"http/1.0")):
        ending = pieces[-1][0]
    return Answer(
        [(at * stretch, data) for at, data in cut(pieces)], None if ending is None else ending * stretch, reset
    )


class Asked(Struct, frozen=True):
    """
    One request.

    :ivar at: when, on the client's clock.
    :ivar headers: by lower-case name.
    """

    at: float
    path: str
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def brief(self) -> str:
        """What it wants: ``LIST``, ``PAGE`` (with its token), ``WATCH`` or ``STREAM``, and from which version."""
        if "continue" in self.query:
            return f"PAGE {self.query['continue']}"
        what = "LIST"
        if self.query.get("watch") == "true":
            what = "STREAM" if self.query.get("sendInitialEvents") == "true" else "WATCH"
        return f"{what} {self.query['resourceVersion']}" if "resourceVersion" in self.query else what


class _Side(ProtocolWrapper):
    """One end of a TCP connection, below TLS: how many bytes went through it."""

    def __init__(self, factory: Any, wrapped: Any) -> None:
        super().__init__(factory, wrapped)
        self.sent = self.received = 0
        self.lost = False

    def connectionMade(self) -> None:
        self.factory.met(self)
        super().connectionMade()

    def write(self, data: bytes) -> None:
        self.sent += len(data)
        super().write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.received += len(data)

    def connectionLost(self, reason: Any) -> None:
        super().connectionLost(reason)
        self.lost = True

    @property
    def closing(self) -> bool:
        return bool(not self.lost and (self.disconnecting or self.transport.disconnecting))


class _Sides(WrappingFactory):
    protocol = _Side
    noisy = False

    def __init__(self, wrapped: Any, met: Callable[[_Side], None]) -> None:
        super().__init__(wrapped)
        self.met = met


class _Conversation(Protocol):
    """Takes one request, and says what it is told to."""

    def __init__(self, server: ReplayServer) -> None:
        self._server = server
        self._request = b""
        self._answer: Answer | None = None
        self._began = 0.0
        self._left: list[Piece] = []
        self.asked = False
        self.over = False

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        self._request += data
        if not self.asked and self._request.endswith(b"\r\n\r\n"):
            self.asked = True
            self.answer(self._server.heard(self._request))

    def connectionLost(self, reason: Any = None) -> None:
        self.over = True

    @property
    def waiting(self) -> bool:
        return self.asked and not self.over and self._answer is None

    def answer(self, answer: Answer | None) -> None:
        self._began = self._server.clock.seconds()
        self._answer = answer
        self._left = list(answer.pieces) if answer else []

    @property
    def due(self) -> float | None:
        """When it has something to say, or to end."""
        if self.over or self._answer is None:
            return None
        if self._left:
            return self._began + self._left[0][0]
        return None if self._answer.ending is None else self._began + self._answer.ending

    def speak(self) -> None:
        """One write, or the end."""
        if self._left:
            self.transport.write(self._left.pop(0)[1])
            return
        assert self._answer is not None
        self.over = True
        if self._answer.reset:
            self.transport.abortConnection()
        else:
            self.transport.loseConnection()


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, server: ReplayServer, host: str, port: int, timeout: float) -> None:
        self._server = server
        self._inner = HostnameEndpoint(reactor, host, port, timeout=timeout)

    def connect(self, factory: Any) -> Deferred[Any]:
        self._server.connecting += 1
        made = self._inner.connect(_Sides(factory, self._server.client))

        def done(result: Any) -> Any:
            self._server.connecting -= 1
            return result

        return made.addBoth(done).addCallback(lambda side: side.wrappedProtocol)


class ReplayServer:
    """
    A server for one test.

    :param clock: the client's; nothing else may move it on.
    :param tls: it speaks TLS, as this says.
    :ivar requests: those that came, in order.
    :ivar url: where it is.
    :ivar connecting: attempts to connect that have not come to an end.
    """

    def __init__(self, clock: Clock, tls: CertificateOptions | None = None) -> None:
        self.clock = clock
        self.requests: list[Asked] = []
        self.connecting = 0
        self._answers: dict[str, list[Answer | None]] = {}
        self._conversations: list[_Conversation] = []
        # By the port of the client: its side and the server's.
        self._pairs: dict[int, dict[str, _Side]] = {}
        factory: Any = Factory.forProtocol(self._converse)
        if tls is not None:
            factory = TLSMemoryBIOFactory(tls, False, factory)
        factory.noisy = False
        self._port = reactor.listenTCP(
            0, _Sides(factory, lambda side: self._met(side.transport.getPeer().port, "server", side)),
            interface="127.0.0.1",
        )
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._port.getHost().port}"

    def script(self, *answers: Answer | str | None, path: str = "") -> None:
        """
        Say these from now on, one for each request; ``None``, and whatever comes after the last: nothing at all.

        :param answers: a string is the name of a recording.
        :param path: only where that is asked for.
        """
        new = [answer(it) if isinstance(it, str) else it for it in answers]
        self._answers.setdefault(path, []).extend(new)

    def heard(self, request: bytes) -> Answer | None:
        head = request.decode("latin-1").split("\r\n")
        target = urlsplit(head[0].split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (it.partition(":") for it in head[1:])}
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        self.requests.append(Asked(self.clock.seconds(), target.path, query, headers))
        left = self._answers.get(target.path) or self._answers.get("")
        return left.pop(0) if left else None

    def say(self, answer: Answer) -> None:
        """Answer the one request that waits for it."""
        (it,) = (it for it in self._conversations if it.waiting)
        it.answer(answer)

    # --- sockets

    def endpoint(self, reactor: Any, host: str, port: int, timeout: float = 30) -> _Endpoint:
        """For the client's agent, in the place of L{twisted.internet.endpoints.HostnameEndpoint}."""
        return _Endpoint(self, host, port, timeout)

    def client(self, side: _Side) -> None:
        self._met(side.transport.getHost().port, "client", side)

    def _met(self, port: int, which: str, side: _Side) -> None:
        pair = self._pairs.setdefault(port, {})
        if which in pair:  # the kernel gave the port out again
            pair = self._pairs[port] = {}
        pair[which] = side

    def _converse(self) -> _Conversation:
        it = _Conversation(self)
        self._conversations.append(it)
        return it

    def _quiet(self) -> bool:
        """Whether nothing is on its way: no byte, no connection, no end of one."""
        for port, pair in list(self._pairs.items()):
            if len(pair) == 2 and pair["client"].lost and pair["server"].lost:
                del self._pairs[port]
                continue
            if len(pair) < 2 or any(side.lost or side.closing for side in pair.values()):
                return False
            client, server = pair["client"], pair["server"]
            if (client.sent, server.sent) != (server.received, client.received):
                return False
        return not self.connecting and all(it.asked or it.over for it in self._conversations)

    async def settled(self) -> None:
        """Until nothing is on its way. Time does not pass meanwhile."""
        turns = 0
        while turns < _QUIET_TURNS:
            await deferLater(reactor, 0)
            turns = turns + 1 if self._quiet() else 0

    # --- time

    async def until(self, reached: Callable[[], Any], seconds: float = 7200.0) -> None:
        """
        Let time pass until then.

        :param seconds: within which it must come to be.
        """
        end = self.clock.seconds() + seconds
        while True:
            await self.settled()
            if reached():
                return
            self._conversations = [it for it in self._conversations if not it.over]
            due = [it for it in self._conversations if it.due is not None]
            speaker = min(due, key=lambda it: it.due or 0.0, default=None)
            timers = [call.getTime() for call in self.clock.getDelayedCalls()]
            soonest = min([*timers, *([speaker.due] if speaker else [])], default=None)
            if soonest is None or soonest > end:
                raise AssertionError(f"it does not come to be; asked were {[it.brief for it in self.requests]}")
            # Not by adding: the sum of two floats may fall short of the time that is due.
            self.clock.rightNow = max(self.clock.seconds(), soonest)
            if speaker is not None and speaker.due is not None and speaker.due <= soonest:
                speaker.speak()
            else:
                self.clock.advance(0)

    async def asked(self, count: int, seconds: float = 7200.0) -> list[str]:
        """What has been asked for in brief, once there are so many requests."""
        await self.until(lambda: len(self.requests) >= count, seconds)
        return [it.brief for it in self.requests]

    async def close(self) -> None:
        """The client has ended everything; fires once no socket is left."""
        await self.settled()
        assert not self._pairs, "the client keeps a connection"
        await self._port.stopListening()
