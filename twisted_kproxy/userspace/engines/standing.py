"""
What the engines that are written in Python share: which connections there are, and which of them stand still for too
long after one direction has ended or one side has failed.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from ...core.values import Outcome
from ..sockets import VANISHED, keepAlive, pendingError

#: Seconds from one look at all connections to the next.
_SWEEP = 15.0


class End(Protocol):
    """
    The socket of one side of a connection.

    :ivar error: the error number with which this side stopped taking bytes; 0 while it takes them.
    :ivar ended: nothing more will be read here.
    """

    socket: socket.socket
    error: int
    ended: bool


class Relayed(ABC):
    """
    One relayed connection.

    :ivar relay: the engine, which keeps it.
    :ivar ended: is told the outcome.
    :ivar lastMoved: of a connection of which one direction has ended, or one side has failed: when that was, or when
        bytes were last seen to have moved since; negative before.
    :ivar moved: bytes that had moved then.
    :ivar failing: one side has failed, and what it said before is still on its way.
    :ivar lasting: it is more than short: the backend has keepalive.
    """

    __slots__ = ("ended", "failing", "lastMoved", "lasting", "moved", "open")

    relay: Relays

    def __init__(self, ended: Callable[[Outcome], None]) -> None:
        self.ended = ended
        self.lastMoved = -1.0
        self.moved = 0
        self.open = True
        self.failing = self.lasting = False

    @abstractmethod
    def ends(self) -> tuple[End, End]:
        """The client's and the backend's, while it is open."""

    @abstractmethod
    def carried(self) -> int:
        """Bytes of both directions that a kernel has taken."""

    @abstractmethod
    def close(self, reason: str) -> None:
        """Close both sockets and tell the outcome; whatever is not ``done`` ends in resets."""

    def broken(self, name: str, number: int) -> None:
        """There is nothing more to read from that side, and it did not end well: reset the other."""
        self.close(f"{name}-{'timeout' if number in VANISHED else 'reset'}")

    def abort(self) -> None:
        """Reset both sides."""
        self.close("aborted")

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
            keepAlive(self.ends()[1].socket)
        if self.lastMoved < 0:
            return
        moved = self.carried()
        if moved != self.moved:
            self.moved = moved
            self.lastMoved = now
        allowed = self.relay.halfClosedSeconds
        if now - self.lastMoved >= (min(_SWEEP, allowed) if self.failing else allowed):
            self._expire()

    def _expire(self) -> None:
        """One side has ended long ago and the other never did; or one has failed and the other takes nothing."""
        client, backend = self.ends()
        if self.failing:
            for name, end in (("client", client), ("backend", backend)):
                number = end.error or pendingError(end.socket)
                if number:
                    self.broken(name, number)
                    return
        self.close(f"{'backend' if client.ended else 'client'}-timeout")


class Relays:
    """
    The connections of an engine.

    :param reactor: provides IReactorTime.
    :param halfClosedSeconds: how long a connection may stand still once one side has ended; then both are reset
        (the kernel's conntrack gives CLOSE_WAIT an hour in kube-proxy's set-up). There is no other idle time-out:
        keepalive finds the dead.
    """

    log = Logger()

    def __init__(self, reactor: Any, halfClosedSeconds: float) -> None:
        self.reactor = reactor
        self.halfClosedSeconds = halfClosedSeconds
        self._pairs: set[Relayed] = set()
        self._timer: Any = None

    def stop(self) -> Deferred[None]:
        """Abort them all."""
        for pair in list(self._pairs):
            try:
                pair.abort()
            except Exception:
                self.log.failure("A connection could not be cut, or its end not be told")
        return succeed(None)

    def _start(self, pair: Relayed, begin: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        """
        Begin with a connection; where that fails it is cut.

        :return: what cuts it.
        """
        self._pairs.add(pair)
        if self._timer is None:
            self._timer = self.reactor.callLater(_SWEEP, self._sweep)
        try:
            begin(*arguments)
        except Exception:
            self.log.failure("A connection is cut")
            pair.abort()
        return pair.abort

    def _ended(self, pair: Relayed) -> None:
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
                try:
                    pair.sweep(now)
                except Exception:
                    self.log.failure("A connection could not be looked after")
