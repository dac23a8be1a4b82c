"""
A transport for protocols over sockets that are connected already: Twisted's own, but it sends at once where the kernel
takes bytes, counts them, and hears a side that fails to its end.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Protocol
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure

from ..sockets import pendingError, resetClose


class Broken(ConnectionLost):
    """:ivar number: the error number with which a socket failed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class EagerTransport(Connection):
    """
    A transport over a socket that is connected already. Reading begins with :meth:`resumeProducing`.

    Two things are otherwise than with Twisted's own. Bytes are sent at once where the kernel takes them, not in the
    next turn of the reactor: that halves the cost. And when a side takes no more, what it had said before is still
    read: the protocol is told ``writeConnectionLost`` then, with ``error`` set, and later how reading ended.

    :ivar sent: bytes that the kernel has taken.
    :ivar error: the error number with which this side stopped taking bytes; 0 while it takes them.
    :ivar paused: whoever gets what is read here wants no more for now.
    :ivar ended: nothing more will be read here.
    """

    def __init__(self, sock: socket.socket, protocol: Protocol, reactor: Any) -> None:
        super().__init__(sock, protocol, reactor)
        self.sent = self.error = 0
        self.paused = True
        self.ended = False
        self.connected = 1

    def logPrefix(self) -> str:
        return "relay"

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return len(self.dataBuffer) - self.offset + self._tempDataLen

    @property
    def watched(self) -> bool:
        """Whether the reactor would tell if this side failed."""
        return not (self.paused or self.ended) or bool(self.queued)

    # --- reading

    def resumeProducing(self) -> None:
        self.paused = False
        if self.connected and not self.ended:
            self.startReading()  # type: ignore[no-untyped-call]

    def pauseProducing(self) -> None:
        self.paused = True
        if self.connected:
            self.stopReading()  # type: ignore[no-untyped-call]

    def doRead(self) -> ConnectionLost | ConnectionDone | None:  # type: ignore[override]
        # An event may have been taken before somebody else's closed this, or had it paused.
        if not self.connected or self.paused or self.ended:
            return None
        try:
            data = self.socket.recv(self.bufferSize)
        except BlockingIOError:
            return None
        except OSError as error:
            return Broken(error.errno or errno.ECONNRESET)
        if not data:
            self.ended = True
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def readConnectionLost(self, reason: Failure) -> None:
        if self.ended:
            super().readConnectionLost(reason)
        else:
            # The reactor has seen a hang-up with nothing to read; why, the socket knows.
            why = Broken(pendingError(self.socket) or errno.ECONNRESET)
            self.connectionLost(Failure(why))  # type: ignore[no-untyped-call]

    # --- writing

    def write(self, data: bytes) -> None:
        """Send at once what the kernel takes; the rest waits, and holds up the producer."""
        if not self.connected or self._writeDisconnected:
            return
        if not self.queued:
            result = self.writeSomeData(data)
            if isinstance(result, Broken):
                self.deafen(result.number)
                return
            data = data[result:]
        super().write(data)  # type: ignore[no-untyped-call]

    def writeSomeData(self, data: bytes) -> int | Broken:
        try:
            size = self.socket.send(memoryview(data)[: self.SEND_LIMIT])
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno == errno.ENOBUFS:
                return 0
            return Broken(error.errno or errno.EPIPE)
        self.sent += size
        return size

    def doWrite(self) -> Any:
        if not self.connected:
            return None
        result = super().doWrite()  # type: ignore[no-untyped-call]
        if isinstance(result, Broken):
            self.deafen(result.number)
            return None
        return result

    def _isSendBufferFull(self) -> bool:
        # One block at the most waits here.
        return self.queued > 0

    def loseWriteConnection(self) -> None:
        """End this direction once all is out."""
        if not self.connected or self._writeDisconnected:
            return
        if self.queued:
            super().loseWriteConnection()  # type: ignore[no-untyped-call]
        else:
            self._writeDisconnected = True
            self._closeWriteConnection()

    def _closeWriteConnection(self) -> None:
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.deafen(error.errno or errno.EPIPE)
        else:
            self.protocol.writeConnectionLost()  # type: ignore[attr-defined]

    def deafen(self, number: int) -> None:
        """This side takes nothing any more (it has reset, most likely); what it has said before is still read."""
        if self.error:
            return
        self.error = number
        self.dataBuffer, self.offset = b"", 0
        self._tempDataBuffer, self._tempDataLen = [], 0
        self._writeDisconnected = True
        self.stopWriting()  # type: ignore[no-untyped-call]
        self.protocol.writeConnectionLost()  # type: ignore[attr-defined]

    # --- ends

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor, which thinks that this is over."""
        if not self.connected:
            return
        if type(reason.value) in (ConnectionLost, ConnectionDone):
            # A hang-up, seen while nothing was to be read.
            self.deafen(pendingError(self.socket) or errno.EPIPE)
        else:
            self.protocol.connectionLost(reason)

    def close(self, withReset: bool) -> None:
        """Close now; what waits is lost. The protocol, who wants it so, is not told."""
        self.connected, self.disconnected = 0, 1
        self.producer = None
        self.stopReading()  # type: ignore[no-untyped-call]
        self.stopWriting()  # type: ignore[no-untyped-call]
        if withReset:
            resetClose(self.socket)
        else:
            self.socket.close()
        del self.protocol, self.socket, self.fileno
