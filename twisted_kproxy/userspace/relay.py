"""
The relay that works everywhere: raw sockets in the reactor, no transport objects.

Each side of a connection is one small object, registered level-triggered. What is read from one side is sent to the
other at once; only what the kernel does not take waits, and nothing more is read meanwhile: at most one block of
64 KiB (and what came early) is ever held per direction.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from ..core.values import Outcome
from ..interfaces import IRelay
from .sockets import isDead, pendingError, resetClose

#: The most that is read, and held, at a time.
BLOCK = 65536
#: Blocks per event: a bulk flow must not starve its neighbours.
READS = 8
_SWEEP = 15.0
_VANISHED = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})


@implementer(IReadDescriptor, IWriteDescriptor)
class _Half:
    """
    One side of a connection.

    :ivar peer: the other side; what is read here is sent there.
    :ivar pending: what the kernel did not take of what is meant for this side.
    :ivar count: bytes that were read here and handed to the kernel on the other side.
    :ivar ended: nothing more will be read here.
    :ivar shut: this side was told that nothing more comes.
    :ivar error: the error number with which this side stopped taking bytes; 0 while it takes them.
    """

    __slots__ = (
        "count", "ended", "error", "name", "pair", "peer", "pending", "reading", "shut", "socket", "writing"
    )  # fmt: skip

    peer: _Half

    def __init__(self, pair: _Pair, sock: socket.socket, name: str) -> None:
        self.pair = pair
        self.socket = sock
        self.name = name
        self.pending = b""
        self.count = 0
        self.error = 0
        self.ended = self.shut = self.reading = self.writing = False

    # --- what the reactor calls

    def fileno(self) -> int:
        return self.socket.fileno()

    def logPrefix(self) -> str:
        return "relay"

    def doRead(self) -> None:
        peer = self.peer
        relay = self.pair.relay
        buffer, view = relay.buffer, relay.view
        receive, send = self.socket.recv_into, peer.socket.send
        for _ in range(READS):
            try:
                size = receive(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self.pair.broken(self, error.errno or errno.ECONNRESET)
                return
            if not size:
                self._readEnded()
                return
            if peer.error:
                # The other side takes nothing any more, but may still have something to say.
                continue
            try:
                sent = send(view[:size])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.pair.deaf(peer, error.errno or errno.EPIPE)
                return
            self.count += sent
            if sent < size:
                peer.pending = bytes(view[sent:size])
                self.stopReading()
                peer.startWriting()
                return
            if size < BLOCK:
                # That was all. Level-triggered: if not, we are called again.
                return

    def doWrite(self) -> None:
        try:
            sent = self.socket.send(self.pending)
        except BlockingIOError:
            return
        except OSError as error:
            self.pair.deaf(self, error.errno or errno.EPIPE)
            return
        peer = self.peer
        peer.count += sent
        self.pending = self.pending[sent:]
        if self.pending:
            return
        self.stopWriting()
        if peer.ended:
            self._shutdown()
        else:
            peer.startReading()

    def connectionLost(self, reason: Failure) -> None:
        """
        The reactor saw a hang-up or an error with nothing to read (or stops, or something raised): it has
        unregistered this side.
        """
        reading, writing = self.reading, self.writing
        self.stopReading()
        self.stopWriting()
        if not self.pair.open:
            return
        if not isinstance(reason.value, (ConnectionDone, ConnectionLost)):
            self.pair.abort()
            return
        dead = isDead(self.socket)
        number = pendingError(self.socket)
        if not dead:
            # Meant for an earlier socket of the same number, in the same batch of events.
            if reading:
                self.startReading()
            if writing:
                self.startWriting()
        elif reading:
            self.pair.broken(self, number or errno.ECONNRESET)
        else:
            self.pair.deaf(self, number or errno.ECONNRESET)

    # --- registration

    def startReading(self) -> None:
        if not self.reading:
            self.reading = True
            self.pair.relay.reactor.addReader(self)

    def stopReading(self) -> None:
        if self.reading:
            self.reading = False
            self.pair.relay.reactor.removeReader(self)

    def startWriting(self) -> None:
        if not self.writing:
            self.writing = True
            self.pair.relay.reactor.addWriter(self)

    def stopWriting(self) -> None:
        if self.writing:
            self.writing = False
            self.pair.relay.reactor.removeWriter(self)

    # --- ends

    def _readEnded(self) -> None:
        self.ended = True
        self.stopReading()
        self.pair.oneSided()
        if self.error:
            # It has said all that it had, and takes nothing: what is held for the other side may still go out.
            self.pair.broken(self, self.error)
            return
        peer = self.peer
        if not peer.pending:
            peer._shutdown()

    def _shutdown(self) -> None:
        """All that the other side had to say is out: pass its end on."""
        self.shut = True
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.pair.deaf(self, error.errno or errno.EPIPE)
            return
        if self.peer.shut:
            self.pair.close("done")


class _Pair:
    """
    One relayed connection.

    :ivar lastMoved: of a connection of which one direction has ended: when that was, or when bytes were last seen to
        have moved since; negative before.
    :ivar moved: bytes that had moved then.
    """

    __slots__ = ("backend", "client", "deferred", "lastMoved", "moved", "open", "relay")

    def __init__(self, relay: SocketRelay, client: socket.socket, backend: socket.socket) -> None:
        self.relay = relay
        self.client = _Half(self, client, "client")
        self.backend = _Half(self, backend, "backend")
        self.client.peer = self.backend
        self.backend.peer = self.client
        self.lastMoved = -1.0
        self.moved = 0
        self.open = True
        self.deferred: Deferred[Outcome] = Deferred(self._cancelled)

    def begin(self, early: bytes) -> None:
        backend = self.backend
        if early:
            try:
                sent = backend.socket.send(early)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.deaf(backend, error.errno or errno.EPIPE)
                return
            self.client.count = sent
            backend.pending = early[sent:]
        backend.startReading()
        if backend.pending:
            backend.startWriting()
        else:
            self.client.startReading()

    def broken(self, half: _Half, number: int) -> None:
        """There is nothing more to read from that side, and it did not end well: reset the other."""
        self.close(f"{half.name}-{'timeout' if number in _VANISHED else 'reset'}")

    def deaf(self, half: _Half, number: int) -> None:
        """
        That side takes nothing any more (it has reset, most likely). What it had said before waits in the kernel
        and is still passed on: a server that refuses a request early answers and closes like this.
        """
        if not self.open or half.error:
            return
        half.error = number
        half.pending = b""
        self.oneSided()
        half.stopWriting()
        half.peer.stopReading()
        if half.ended:
            self.broken(half, number)
        elif not half.peer.pending:
            half.startReading()

    def oneSided(self) -> None:
        """One direction has ended: from now on it matters whether the other one moves."""
        if self.lastMoved < 0:
            self.lastMoved = self.relay.reactor.seconds()

    def expired(self, now: float) -> bool:
        """Whether one direction has ended and the other has not moved for too long."""
        if self.lastMoved < 0:
            return False
        moved = self.client.count + self.backend.count
        if moved != self.moved:
            self.moved = moved
            self.lastMoved = now
        return now - self.lastMoved >= self.relay.halfClosedSeconds

    def abort(self) -> None:
        """Reset both sides."""
        self.close("aborted")

    def expire(self) -> None:
        """One side has ended long ago and the other never did."""
        self.close(f"{(self.backend if self.client.ended else self.client).name}-timeout")

    def stalled(self) -> list[_Half]:
        """Sides that wait for the other one: not registered, so nobody hears if they die."""
        return [
            half
            for half in (self.client, self.backend)
            if not (half.reading or half.writing or half.ended or half.error)
        ]

    def close(self, reason: str) -> None:
        """Close both sockets and tell the outcome; whatever is not ``done`` ends in resets."""
        if not self.open:
            return
        self.open = False
        client, backend, deferred = self.client, self.backend, self.deferred
        close = socket.socket.close if reason == "done" else resetClose
        for half in (client, backend):
            half.stopReading()
            half.stopWriting()
            half.pending = b""
            close(half.socket)
        # No circles: memory goes now, not when the collector comes.
        del client.peer, backend.peer, self.client, self.backend, self.deferred
        self.relay._ended(self)
        deferred.callback(Outcome(reason, client.count, backend.count))

    def _cancelled(self, deferred: Deferred[Outcome]) -> None:
        self.abort()


@implementer(IRelay)
class SocketRelay:
    """
    Relays between sockets that the reactor watches. Works with every reactor that watches sockets.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param halfClosedSeconds: how long the connection may stand still once one side has ended; then both are reset
        (the kernel's conntrack gives CLOSE_WAIT an hour in kube-proxy's set-up). There is no other idle time-out:
        keepalive finds the dead.
    """

    def __init__(self, reactor: Any, halfClosedSeconds: float = 3600.0) -> None:
        self.reactor = reactor
        self.halfClosedSeconds = halfClosedSeconds
        # All connections read into the same memory: what is not sent on at once is copied out.
        self.buffer = bytearray(BLOCK)
        self.view = memoryview(self.buffer)
        self._pairs: set[_Pair] = set()
        self._timer: Any = None

    def relay(self, client: socket.socket, backend: socket.socket, early: bytes) -> Deferred[Outcome]:
        pair = _Pair(self, client, backend)
        self._pairs.add(pair)
        if self._timer is None:
            self._timer = self.reactor.callLater(_SWEEP, self._sweep)
        deferred = pair.deferred
        pair.begin(early)
        return deferred

    def _ended(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        if not self._pairs and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = self.reactor.callLater(_SWEEP, self._sweep)
        now = self.reactor.seconds()
        stalled: list[_Half] = []
        for pair in list(self._pairs):
            # A callback of one may have cut another.
            if not pair.open:
                continue
            if pair.expired(now):
                pair.expire()
            else:
                stalled += pair.stalled()
        for half in _failed(half for half in stalled if half.pair.open):
            half.pair.broken(half, pendingError(half.socket) or errno.ECONNRESET)


def _failed(halves: Iterable[_Half]) -> list[_Half]:
    """Those whose sockets have failed. A hang-up alone says only that both ways are shut, with data left to read."""
    poll = select.poll()
    known = {}
    for half in halves:
        known[half.fileno()] = half
        poll.register(half.fileno(), 0)
    return [known[fd] for fd, event in poll.poll(0) if event & select.POLLERR] if known else []
