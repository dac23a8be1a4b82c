"""
A relay worker: a process that carries bytes for the daemon. It is given pairs of connected sockets, and tells how each
pair has ended. :mod:`.workers` runs it: ``python -m …engines.worker DESCRIPTOR ENGINE THREADED``.

It ends when the daemon's end of the channel is closed, and by nothing else that the daemon gets as well: signals to
stop are the daemon's business, which lets open connections go on for a while.
"""

from __future__ import annotations

import array
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import msgpack
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import (
    FilteringLogObserver,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from ...core.values import Outcome
from ...interfaces import IRelay
from ...reactor import installIfFree
from ..ports import raiseLimit
from ..sockets import resetClose
from .channel import LARGEST, Cut, Ended, Endings, Pair, decodeOrder
from .choose import chooseEngine
from .poller import Poller

#: Orders that are read per event.
_ORDERS = 64
#: How many endings go into one message.
_ENDINGS = 500


@implementer(IReadDescriptor)
class Worker:
    """
    The worker's end of the channel.

    :param finished: called when the daemon is gone.
    """

    log = Logger()

    def __init__(self, reactor: Any, channel: socket.socket, engine: IRelay, finished: Callable[[], None]) -> None:
        self._reactor = reactor
        self._channel = channel
        self._engine = engine
        self._finished = finished
        self._cuts: dict[int, Callable[[], None]] = {}
        self._endings: list[Ended] = []
        self._telling = False
        self._over = False

    def fileno(self) -> int:
        return self._channel.fileno()

    def logPrefix(self) -> str:
        return "worker"

    def doRead(self) -> None:
        for _ in range(_ORDERS):
            try:
                data, ancillary, _flags, _address = self._channel.recvmsg(
                    LARGEST, socket.CMSG_SPACE(2 * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, ancillary = b"", []
            if not data:
                self._finish()
                return
            descriptors = _descriptors(ancillary)
            try:
                self._obey(decodeOrder(data), descriptors)
            except Exception:
                self.log.failure("An order of the daemon could not be obeyed")

    def connectionLost(self, reason: Failure) -> None:
        """The channel is gone, and so is the daemon; or the reactor stops."""
        self._finish()

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._reactor.removeReader(self)
            self._finished()

    def _obey(self, order: Pair | Cut, descriptors: list[int]) -> None:
        if isinstance(order, Cut):
            cut = self._cuts.get(order.number)
            if cut is not None:
                cut()
            return
        number = order.number
        pair = [socket.socket(fileno=it) for it in descriptors]
        if len(pair) != 2:
            # Out of descriptors: the kernel gives fewer of them, or none.
            for it in pair:
                resetClose(it)
            self._ended(number, Outcome("aborted", 0, 0))
            return
        self._cuts[number] = lambda: None  # the end may come before there is anything to cut
        cut = self._engine.relay(pair[0], pair[1], order.early, lambda outcome: self._ended(number, outcome))
        if number in self._cuts:
            self._cuts[number] = cut

    def _ended(self, number: int, outcome: Outcome) -> None:
        self._cuts.pop(number, None)
        self._endings.append(Ended(number, outcome.reason, outcome.sent, outcome.received))
        if not self._telling:
            self._telling = True
            self._reactor.callLater(0, self._tell)

    def _tell(self) -> None:
        self._telling = False
        while self._endings:
            some = self._endings[:_ENDINGS]
            try:
                self._channel.send(msgpack.encode(Endings(some)))
            except BlockingIOError:
                # The daemon is busy; nothing is lost by telling it later.
                self._telling = True
                self._reactor.callLater(0.01, self._tell)
                return
            except OSError:
                return
            del self._endings[:_ENDINGS]


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def main(arguments: list[str]) -> None:
    """The process: until the daemon is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    onlyTrouble = LogLevelFilterPredicate(LogLevel.warn)
    observer = FilteringLogObserver(textFileLogObserver(sys.stderr), [onlyTrouble])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    reactor = installIfFree()
    raiseLimit()
    channel = socket.socket(fileno=int(arguments[0]))
    channel.setblocking(False)
    engine = chooseEngine(reactor, Poller(reactor), arguments[1], arguments[2] == "yes")
    worker = Worker(reactor, channel, engine, reactor.stop)
    reactor.addReader(worker)
    gc.freeze()
    try:
        channel.send(msgpack.encode(Endings([])))  # it is ready
    except OSError:
        return  # the daemon has stopped meanwhile
    reactor.run(installSignalHandlers=False)


if __name__ == "__main__":
    main(sys.argv[1:])
