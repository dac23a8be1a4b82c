"""
The engine of Twisted protocols: each side of a connection is a protocol on a transport. It is for Services whose bytes
have to be seen on their way, or get something in front (:class:`Tap`), and the plain one beside which the others can be
judged: it uses nothing but what every reactor that watches descriptors can do.

Back-pressure is by producers, ends are half-closes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from ...core.values import Outcome
from ...interfaces import IRelay
from ..sockets import isDead, quickAck
from .poller import Poller
from .standing import Relayed, Relays
from .transport import Broken, EagerTransport

#: ``sent``: from the client to the backend; ``received``: the other way. The words of
#: :class:`~twisted_kproxy.core.values.Outcome`.
Direction: TypeAlias = Literal["sent", "received"]


class Tap:
    """
    What is done with the bytes of one connection; to be subclassed. Whatever it raises cuts the connection.

    :ivar front: goes to the backend before anything that the client says, and is not counted: a PROXY header, say.
    """

    front = b""

    def observe(self, direction: Direction, data: bytes) -> None:
        """These bytes, the next ones in that direction, are passed on now; each byte comes once."""


@implementer(IHalfCloseableProtocol)
class Side(Protocol):
    """
    One side of a connection.

    :ivar peer: the other side; what is received here is written there.
    :ivar shut: this side was told that nothing more comes.
    """

    transport: EagerTransport
    peer: Side

    def __init__(self, pair: _Pair, name: str, direction: Direction) -> None:
        self.pair = pair
        self.name = name
        self.direction = direction
        self.shut = False

    def dataReceived(self, data: bytes) -> None:
        tap = self.pair.tap
        if tap is not None:
            tap.observe(self.direction, data)
        self.peer.transport.write(data)

    def readConnectionLost(self) -> None:
        self.pair.oneSided()
        error = self.transport.error
        if error:
            # It has said all that it had, and takes nothing: that is no good end.
            self.pair.broken(self.name, error)
            return
        self.peer.transport.unregisterProducer()  # type: ignore[no-untyped-call]
        self.peer.transport.loseWriteConnection()

    def writeConnectionLost(self) -> None:
        error = self.transport.error
        if not error:
            self.shut = True
            if self.peer.shut:
                self.pair.close("done")
            return
        # Nobody will take what the other side says.
        self.transport.unregisterProducer()  # type: ignore[no-untyped-call]
        self.peer.transport.pauseProducing()
        self.pair.ailing()
        if self.peer.transport.error:
            # Nobody is left to listen to either of them.
            self.pair.broken(self.peer.name, self.peer.transport.error)
        elif self.transport.ended:
            self.pair.broken(self.name, error)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if isinstance(reason.value, Broken):
            self.pair.broken(self.name, reason.value.number)
        else:
            self.pair.abort()  # somebody's mistake; the reactor has logged it


class _Pair(Relayed):
    """One relayed connection."""

    __slots__ = ("backend", "client", "relay", "tap")

    relay: ProtocolRelay

    def __init__(self, relay: ProtocolRelay, ended: Callable[[Outcome], None]) -> None:
        super().__init__(ended)
        self.relay = relay
        self.client = Side(self, "client", "sent")
        self.backend = Side(self, "backend", "received")
        self.client.peer = self.backend
        self.backend.peer = self.client
        self.tap: Tap | None = None

    def ends(self) -> tuple[EagerTransport, EagerTransport]:
        return self.client.transport, self.backend.transport

    def carried(self) -> int:
        return self.client.transport.sent + self.backend.transport.sent

    def begin(self, client: socket.socket, backend: socket.socket, early: bytes) -> None:
        relay = self.relay
        ends = [(self.client, client), (self.backend, backend)]
        for side, sock in ends:
            side.makeConnection(EagerTransport(sock, side, relay.reactor))  # type: ignore[no-untyped-call]
        for side, _ in ends:
            side.transport.registerProducer(side.peer.transport, True)  # type: ignore[no-untyped-call]
            side.transport.paused = False
        if relay.tap is not None:
            self.tap = relay.tap(client, backend)
        if self.tap is not None and self.tap.front:
            self.backend.transport.write(self.tap.front)
        if early:
            self.client.dataReceived(early)
            quickAck(backend)
        for side, _ in ends:
            if self.open and not side.transport.paused:
                side.transport.resumeProducing()

    def outcome(self, reason: str) -> Outcome:
        front = len(self.tap.front) if self.tap is not None else 0
        return Outcome(reason, max(0, self.backend.transport.sent - front), self.client.transport.sent)

    def sweep(self, now: float) -> None:
        for end in self.ends():
            if not self.failing and not end.watched and isDead(end.socket):
                self.ailing()
        super().sweep(now)

    def close(self, reason: str) -> None:
        if not self.open:
            return
        self.open = False
        client, backend, ended, outcome = self.client, self.backend, self.ended, self.outcome(reason)
        for side in (client, backend):
            side.transport.close(reason != "done")
        self.relay._ended(self)
        # No circles: memory goes now, not when the collector comes.
        del client.peer, backend.peer, self.client, self.backend, self.ended
        ended(outcome)


@implementer(IRelay)
class ProtocolRelay(Relays):
    """
    Relays between pairs of protocols. Works with every reactor that watches descriptors.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param poller: what has watched the sockets before.
    :param halfClosedSeconds: see :class:`.standing.Relays`.
    :param tap: gives what sees the bytes of a connection, from its client's and its backend's socket; ``None``, or one
        that gives ``None``, where nobody does.
    """

    name = "protocol"

    def __init__(
        self,
        reactor: Any,
        poller: Poller,
        halfClosedSeconds: float = 3600.0,
        *,
        tap: Callable[[socket.socket, socket.socket], Tap | None] | None = None,
    ) -> None:
        super().__init__(reactor, halfClosedSeconds)
        self.tap = tap
        self._poller = poller

    def relay(
        self, client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        self._poller.release(client.fileno())
        self._poller.release(backend.fileno())
        pair = _Pair(self, ended)
        return self._start(pair, pair.begin, client, backend, early)

    def status(self) -> Mapping[str, Any]:
        return {"engine": self.name, "active": len(self._pairs)}
