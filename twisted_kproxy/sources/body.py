"""The body of an answer on its way: piece by piece, inflated, never waited for without an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer, IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from . import errors
from .compression import Inflater


class Body(Protocol):
    """
    Takes the body of an answer as it comes. :attr:`done` fires with ``None`` at its regular end and fails with one of
    :mod:`~twisted_kproxy.sources.errors`, or with whatever ``received`` raises; cancelling it, as every other end,
    cuts the connection at once.

    :param received: called with each piece, inflated.
    :param idle: seconds without a byte after which it is given up.
    :param total: seconds after which it is given up although bytes come.
    :param limit: of the whole, inflated, in bytes.
    :param inflater: where it comes compressed.
    """

    def __init__(
        self,
        clock: IReactorTime,
        received: Callable[[bytes], None],
        idle: float | None = None,
        limit: int | None = None,
        total: float | None = None,
        inflater: Inflater | None = None,
    ) -> None:
        self.done: Deferred[None] | None = Deferred(lambda _: self._forget())
        self._received = received
        self._idle = idle
        self._limit = limit
        self._inflater = inflater
        self._size = 0
        self._silence: IDelayedCall | None = None
        self._deadline: IDelayedCall | None = None
        if idle is not None:
            self._silence = clock.callLater(idle, self._late, f"no byte of the answer for {idle:g} s")
        if total is not None:
            self._deadline = clock.callLater(total, self._late, f"the answer was not complete within {total:g} s")

    def dataReceived(self, data: bytes) -> None:
        if self.done is None:
            return
        if self._silence is not None and self._idle is not None:
            self._silence.reset(self._idle)
        try:
            if self._inflater is None:
                self._take(data)
                return
            for piece in self._inflater.feed(data):
                self._take(piece)
                if self.done is None:
                    return
        except Exception as error:
            self.abort(error)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        done = self._leave()
        if done is None:
            return
        if not isinstance(reason.value, ResponseDone):
            # PotentialDataLoss too: an answer without length or chunks ends with its connection, complete or not.
            done.errback(errors.ConnectionLost(f"the answer broke off: {errors.why(reason.value)}"))
            return
        try:
            if self._inflater is not None:
                self._inflater.finish()
        except errors.ConnectionLost as error:
            done.errback(error)
        else:
            done.callback(None)

    def abort(self, error: Exception) -> None:
        """Cut it; :attr:`done` fails with that error."""
        done = self._leave()
        if done is not None:
            cut(self.transport)
            done.errback(error)

    def _take(self, data: bytes) -> None:
        self._size += len(data)
        if self._limit is not None and self._size > self._limit:
            raise errors.Unusable(f"the answer is longer than {self._limit} bytes")
        self._received(data)

    def _forget(self) -> None:
        # Forget the Deferred first: closing the transport may report back at once.
        self._leave()
        cut(self.transport)

    def _leave(self) -> Deferred[None] | None:
        done, self.done = self.done, None
        for timer in (self._silence, self._deadline):
            if timer is not None and timer.active():
                timer.cancel()
        self._silence = self._deadline = None
        return done

    def _late(self, why: str) -> None:
        self.abort(errors.TimedOut(why))


class Unwanted(Protocol):
    """Takes a body that nobody waits for any more."""

    def connectionMade(self) -> None:
        cut(self.transport)


def cut(transport: Any) -> None:
    """Cut a connection without waiting for the peer: over a dead link TLS would never finish its good-bye."""
    if transport is not None:
        abort = getattr(transport, "abortConnection", None) or transport.loseConnection
        abort()


@implementer(IBodyProducer)
class Bytes:
    """The body of a request that is short enough to be written at once; Twisted's own needs the global reactor."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._data)
        return succeed(None)

    def pauseProducing(self) -> None:
        """Nothing is left to pause."""

    def resumeProducing(self) -> None:
        """Nothing is left to resume."""

    def stopProducing(self) -> None:
        """Nothing is left to stop."""
