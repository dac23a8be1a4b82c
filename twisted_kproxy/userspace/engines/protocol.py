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

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ...core.values import Outcome
from ...interfaces import IRelay
from ..sockets import VANISHED, isDead, keepAlive, pendingError
from .poller import Poller
from .transport import Broken, EagerTransport

_SWEEP = 15.0

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
            self.pair.broken(self, error)
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
            self.pair.broken(self.peer, self.peer.transport.error)
        elif self.transport.ended:
            self.pair.broken(self, error)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if isinstance(reason.value, Broken):
            self.pair.broken(self, reason.value.number)
        else:
            self.pair.abort()  # somebody's mistake; the reactor has logged it


class _Pair:
    """
    One relayed connection.

    :ivar lastMoved: of a connection of which one direction has ended, or one side has failed: when that was, or when
        bytes were last seen to have moved since; negative before.
    :ivar moved: bytes that had moved then.
    :ivar failing: one side has failed, and what it said before is still on its way.
    :ivar lasting: it is more than short: the backend has keepalive.
    """

    __slots__ = ("backend", "client", "ended", "failing", "lastMoved", "lasting", "moved", "open", "relay", "tap")

    def __init__(self, relay: ProtocolRelay, ended: Callable[[Outcome], None]) -> None:
        self.relay = relay
        self.ended = ended
        self.client = Side(self, "client", "sent")
        self.backend = Side(self, "backend", "received")
        self.client.peer = self.backend
        self.backend.peer = self.client
        self.tap: Tap | None = None
        self.lastMoved = -1.0
        self.moved = 0
        self.open = True
        self.failing = self.lasting = False

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
        for side, _ in ends:
            if self.open and not side.transport.paused:
                side.transport.resumeProducing()

    def outcome(self, reason: str) -> Outcome:
        front = len(self.tap.front) if self.tap is not None else 0
        return Outcome(reason, max(0, self.backend.transport.sent - front), self.client.transport.sent)

    def broken(self, side: Side, number: int) -> None:
        """There is nothing more to read from that side, and it did not end well: reset the other."""
        self.close(f"{side.name}-{'timeout' if number in VANISHED else 'reset'}")

    def ailing(self) -> None:
        """A side has failed; if that is not the end yet, it is soon."""
        self.failing = True
        self.oneSided()

    def oneSided(self) -> None:
        """One direction has ended: from now on it matters whether the other one moves."""
        if self.lastMoved < 0:
            self.lastMoved = self.relay.reactor.seconds()

    def sweep(self, now: float) -> None:
        """From time to time: is it still alive, and does it still move?"""
        if not self.lasting:
            self.lasting = True
            keepAlive(self.backend.transport.socket)
        for side in (self.client, self.backend):
            if not self.failing and not side.transport.watched and isDead(side.transport.socket):
                self.ailing()
        if self.lastMoved < 0:
            return
        moved = self.client.transport.sent + self.backend.transport.sent
        if moved != self.moved:
            self.moved = moved
            self.lastMoved = now
        limit = min(_SWEEP, self.relay.halfClosedSeconds) if self.failing else self.relay.halfClosedSeconds
        if now - self.lastMoved >= limit:
            self.expire()

    def expire(self) -> None:
        """One side has ended long ago and the other never did; or one has failed and the other takes nothing."""
        if self.failing:
            for side in (self.client, self.backend):
                number = side.transport.error or pendingError(side.transport.socket)
                if number:
                    self.broken(side, number)
                    return
        self.close(f"{(self.backend if self.client.transport.ended else self.client).name}-timeout")

    def abort(self) -> None:
        """Reset both sides."""
        self.close("aborted")

    def close(self, reason: str) -> None:
        """Close both sockets and tell the outcome; whatever is not ``done`` ends in resets."""
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
class ProtocolRelay:
    """
    Relays between pairs of protocols. Works with every reactor that watches descriptors.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param poller: what has watched the sockets before.
    :param halfClosedSeconds: see :class:`.pairs.PairRelay`.
    :param tap: gives what sees the bytes of a connection, from its client's and its backend's socket; ``None``, or one
        that gives ``None``, where nobody does.
    """

    log = Logger()
    name = "protocol"

    def __init__(
        self,
        reactor: Any,
        poller: Poller,
        halfClosedSeconds: float = 3600.0,
        *,
        tap: Callable[[socket.socket, socket.socket], Tap | None] | None = None,
    ) -> None:
        self.reactor = reactor
        self.halfClosedSeconds = halfClosedSeconds
        self.tap = tap
        self._poller = poller
        self._pairs: set[_Pair] = set()
        self._timer: Any = None

    def relay(
        self, client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        self._poller.release(client.fileno())
        self._poller.release(backend.fileno())
        pair = _Pair(self, ended)
        self._pairs.add(pair)
        if self._timer is None:
            self._timer = self.reactor.callLater(_SWEEP, self._sweep)
        try:
            pair.begin(client, backend, early)
        except Exception:
            self.log.failure("A connection is cut")
            pair.abort()
        return pair.abort

    def stop(self) -> Deferred[None]:
        for pair in list(self._pairs):
            pair.abort()
        return succeed(None)

    def status(self) -> Mapping[str, Any]:
        return {"engine": self.name, "active": len(self._pairs)}

    def _ended(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        if not self._pairs and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = self.reactor.callLater(_SWEEP, self._sweep)
        now = self.reactor.seconds()
        for pair in list(self._pairs):
            # A callback of one may have cut another.
            if pair.open:
                pair.sweep(now)
