"""
The engine that works everywhere: raw sockets, edge-triggered, no transport objects.

Each side of a connection is one small object. What is read from one side is sent to the other at once; only what the
kernel does not take waits, and nothing more is read meanwhile: at most one block of 64 KiB (and what came early), or
what a pipe holds, is ever kept per direction. A direction that carries much goes through a pipe without being copied
(:mod:`.splice`).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from zope.interface import implementer

from ...core.values import Outcome
from ...interfaces import IRelay
from ..sockets import isDead, noDelay, quickAck, resetClose
from .poller import ERROR, INPUT, LAST, MASK, OUTPUT, QUIET, RDHUP, Poller
from .splice import CHUNK, Pipe, Pipes, Splice, findSplice
from .standing import Relayed, Relays

#: The most that is read, and held, at a time.
BLOCK = 65536
#: Blocks per event: a bulk flow must not starve its neighbours.
READS = 8
#: Full blocks after which a direction goes through a pipe.
FULL = 2
#: Bytes per event through a pipe.
PIPED = 4 << 20
# The kernel keeps such bytes for up to 200 ms, for more to go with them: the end, here.
_MORE = int(socket.MSG_MORE)
# That side has ended, and has not failed.
_END, _LEFT = RDHUP | ERROR, RDHUP
#: the way to call splice(2) here
SPLICE = findSplice()


class _Half:
    """
    One side of a connection.

    :ivar peer: the other side; what is read here is sent there.
    :ivar pending: what the kernel did not take of what is meant for this side.
    :ivar pipe: what is read here goes through this one.
    :ivar count: bytes that were read here and handed to the kernel on the other side.
    :ivar last: no event will tell of what is left to read here: read on until the end.
    :ivar full: it has not taken all at some time; since then it is told when it takes bytes again.
    :ivar ended: nothing more will be read here.
    :ivar shut: this side was told that nothing more comes.
    :ivar error: the error number with which this side stopped taking bytes; 0 while it takes them.
    """

    __slots__ = (
        "count", "ended", "error", "full", "last", "name", "pair", "peer", "pending", "pipe", "shut", "socket"
    )  # fmt: skip

    peer: _Half

    def __init__(self, pair: _Pair, sock: socket.socket, name: str) -> None:
        self.pair = pair
        self.socket = sock
        self.name = name
        self.pending = b""
        self.pipe: Pipe | None = None
        self.count = 0
        self.error = 0
        self.last = self.ended = self.shut = self.full = False

    # --- what the poller calls

    def event(self, events: int) -> None:
        """Something about this side is new."""
        try:
            if events & OUTPUT and (self.pending or self.peer.pipe is not None):
                self.flush()
            if events & INPUT and self.pair.open:
                if events & LAST:
                    self.last = True
                self.pump(events & _END == _LEFT)
                if events & ERROR and self.pair.open and isDead(self.socket):
                    self.pair.ailing()
        except Exception:
            self.pair.abort()
            raise

    # --- bytes

    def pump(self, ending: bool = False) -> None:
        """
        Carry what there is to read here to the other side, until one of the two has no more to give or to take.

        :param ending: the last of it is there, and the end: the two go out as one packet.
        """
        peer = self.peer
        if self.ended or peer.pending or peer.error:
            return
        if self.pipe is not None:
            self._pumpPipe(self.pipe)
            return
        relay = self.pair.relay
        buffer, view = relay.buffer, relay.view
        receive, send = self.socket.recv_into, peer.socket.send
        full = 0
        held = False
        for _ in range(READS):
            try:
                size = receive(buffer)
            except BlockingIOError:
                self.last = False
                if held:
                    noDelay(peer.socket)
                return
            except OSError as error:
                if held:  # before the reset, which would take its place
                    noDelay(peer.socket)
                self.pair.broken(self.name, error.errno or errno.ECONNRESET)
                return
            if not size:
                self._readEnded()
                return
            held = ending and size < BLOCK and not self.error
            try:
                sent = send(view[:size], _MORE) if held else send(view[:size])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.pair.deaf(peer, error.errno or errno.EPIPE)
                return
            self.count += sent
            if sent < size:
                peer.pending = bytes(view[sent:size])
                peer.wait()
                return
            if size == BLOCK:
                full += 1
                if full == FULL and relay.splicing:
                    self.pipe = relay.pipes.take()
                    if self.pipe is not None:
                        self._pumpPipe(self.pipe)
                        return
            elif not self.last:
                # That was all: if more comes there is another event.
                return
        if held:
            noDelay(peer.socket)
        relay.poller.again(self.goOn)

    def wait(self) -> None:
        """This side takes no more now; it is to be told when it does."""
        if not self.full:
            self.full = True
            self.pair.relay.poller.output(self.socket.fileno())

    def goOn(self) -> None:
        """The rest of what could not all be done at once."""
        if self.pair.open:
            try:
                self.pump()
            except Exception:
                self.pair.abort()
                raise

    def _pumpPipe(self, pipe: Pipe) -> None:
        relay = self.pair.relay
        splice, fd = relay.splice, self.socket.fileno()
        assert splice is not None
        total = 0
        while total < PIPED:
            if pipe.held and not self._drain(pipe):
                return
            try:
                size = splice(fd, pipe.writeEnd, CHUNK)
            except BlockingIOError:
                self.last = False
                self._leavePipe()
                return
            except OSError as error:
                self._leavePipe()
                if error.errno == errno.EINVAL:  # not with this kind of socket
                    relay.splicing = False
                    relay.poller.again(self.goOn)
                else:
                    self.pair.broken(self.name, error.errno or errno.ECONNRESET)
                return
            if not size:
                self._leavePipe()
                self._readEnded()
                return
            pipe.held = size
            total += size
        relay.poller.again(self.goOn)

    def _drain(self, pipe: Pipe) -> bool:
        """Hand what the pipe holds to the other side. :return: whether it took all."""
        splice = self.pair.relay.splice
        assert splice is not None
        fd = self.peer.socket.fileno()
        while pipe.held:
            try:
                sent = splice(pipe.readEnd, fd, pipe.held)
            except BlockingIOError:
                self.peer.wait()
                return False
            except OSError as error:
                self.pair.deaf(self.peer, error.errno or errno.EPIPE)
                return False
            pipe.held -= sent
            self.count += sent
        return True

    def _leavePipe(self) -> None:
        if self.pipe is not None:
            self.pair.relay.pipes.give(self.pipe)
            self.pipe = None

    def flush(self) -> None:
        """This side takes bytes again."""
        peer = self.peer
        if self.pending:
            try:
                sent = self.socket.send(self.pending)
            except BlockingIOError:
                return
            except OSError as error:
                self.pair.deaf(self, error.errno or errno.EPIPE)
                return
            peer.count += sent
            self.pending = self.pending[sent:]
            if self.pending:
                return
            if peer.ended:
                if peer.shut:
                    self.pair.close("done")
                else:
                    self._shutdown()
                return
        peer.pump()

    # --- ends

    def _readEnded(self) -> None:
        self.ended = True
        self.pair.oneSided()
        if self.error:
            # It has said all that it had, and takes nothing: what is held for the other side may still go out.
            self.pair.broken(self.name, self.error)
            return
        if self.shut:
            # The other side has ended before, and this was told so: that is all.
            if not self.peer.pending:
                self.pair.close("done")
        elif not self.peer.pending:
            self.peer._shutdown()

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


class _Pair(Relayed):
    """One relayed connection."""

    __slots__ = ("backend", "client", "relay")

    relay: PairRelay

    def __init__(
        self, relay: PairRelay, client: socket.socket, backend: socket.socket, ended: Callable[[Outcome], None]
    ) -> None:
        super().__init__(ended)
        self.relay = relay
        self.client = _Half(self, client, "client")
        self.backend = _Half(self, backend, "backend")
        self.client.peer = self.backend
        self.backend.peer = self.client

    def ends(self) -> tuple[_Half, _Half]:
        return self.client, self.backend

    def carried(self) -> int:
        return self.client.count + self.backend.count

    def begin(self, early: bytes) -> None:
        client, backend, poller = self.client, self.backend, self.relay.poller
        clientNumber, backendNumber = client.socket.fileno(), backend.socket.fileno()
        # Of what was watched before, events may have gone elsewhere. Others tell by themselves what there is.
        client.last, backend.last = poller.knows(clientNumber), poller.knows(backendNumber)
        if early:
            self._sendEarly(early)
        if client.last:
            client.pump()
        if backend.last and self.open:
            backend.pump()
        if self.open:
            poller.watch(clientNumber, client.event, MASK if client.full else QUIET)
            poller.watch(backendNumber, backend.event, MASK if backend.full else QUIET)

    def _sendEarly(self, early: bytes) -> None:
        client, backend = self.client, self.backend
        try:
            sent = backend.socket.send(early)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.deaf(backend, error.errno or errno.EPIPE)
            return
        quickAck(backend.socket)
        client.count = sent
        if sent < len(early):
            backend.pending = early[sent:]
            backend.wait()

    def deaf(self, half: _Half, number: int) -> None:
        """
        That side takes nothing any more (it has reset, most likely). What it had said before waits in the kernel
        and is still passed on: a server that refuses a request early answers and closes like this.
        """
        if not self.open or half.error:
            return
        half.error = number
        half.pending = b""
        half.last = True
        half.peer._leavePipe()
        self.oneSided()
        if half.peer.error:
            # Nobody is left to listen to either of them.
            self.broken(half.peer.name, half.peer.error)
        elif half.ended:
            self.broken(half.name, number)
        else:
            # What it had said may have been told of while this side could not listen.
            self.relay.poller.again(half.goOn)

    def close(self, reason: str) -> None:
        if not self.open:
            return
        self.open = False
        client, backend, ended, relay = self.client, self.backend, self.ended, self.relay
        for half in (client, backend):
            if half.pipe is not None:
                half._leavePipe()
            half.pending = b""
            relay.poller.closing(half.socket.fileno())
            if reason == "done":
                half.socket.close()
            else:
                resetClose(half.socket)
        # No circles: memory goes now, not when the collector comes.
        del client.peer, backend.peer, self.client, self.backend, self.ended
        relay._ended(self)
        ended(Outcome(reason, client.count, backend.count))


@implementer(IRelay)
class PairRelay(Relays):
    """
    Relays between pairs of raw sockets. Works with every reactor that watches descriptors.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param poller: what watches the sockets; one of its own by default.
    :param halfClosedSeconds: see :class:`.standing.Relays`.
    :param splice: how to call splice(2); ``None`` to copy everything.
    """

    name = "python"

    def __init__(
        self,
        reactor: Any,
        poller: Poller | None = None,
        halfClosedSeconds: float = 3600.0,
        splice: Splice | None = SPLICE,
    ) -> None:
        super().__init__(reactor, halfClosedSeconds)
        self.poller = poller or Poller(reactor)
        self.splice = splice
        self.splicing = splice is not None
        self.pipes = Pipes()
        # All connections read into the same memory: what is not sent on at once is copied out.
        self.buffer = bytearray(BLOCK)
        self.view = memoryview(self.buffer)

    def relay(
        self, client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        pair = _Pair(self, client, backend, ended)
        return self._start(pair, pair.begin, early)

    def stop(self) -> Deferred[None]:
        stopped = super().stop()
        self.pipes.close()
        return stopped

    def status(self) -> Mapping[str, Any]:
        return {"engine": self.name, "active": len(self._pairs), "pipes": self.pipes.made}
