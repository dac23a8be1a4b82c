"""
More than one core: the bytes of connections go through worker processes. Accepting, choosing an endpoint and dialing
stay in the daemon, so that affinity, open counts and the memory of failures are one; what a worker gets is two
connected sockets. Listening sockets are never in a worker, and survive the end of any.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import msgpack
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ...core.values import Outcome
from ...interfaces import IRelay
from .channel import LARGEST, Cut, Pair, decodeEndings
from .handed import Handed
from .poller import Poller

#: Seconds before a worker that has ended is replaced: at first, and at the most.
SOON, LATE = 0.1, 10.0
#: A worker that has lived for so long has not failed at its start.
SETTLED = 30.0
_BUFFER = 1 << 20
_MESSAGES = 64


@implementer(IReadDescriptor)
class _Worker(ProcessProtocol):
    """
    The daemon's end of the channel to one worker, and the process.

    :ivar open: what the worker has, by number.
    :ivar ready: it takes connections.
    """

    log = Logger()

    def __init__(self, relay: WorkersRelay, index: int) -> None:
        self._relay = relay
        self.index = index
        self.open: dict[int, Handed] = {}
        self.ready = False
        self._number = 0
        self._gone = False
        self._uncut: list[int] = []
        self.began = relay.reactor.seconds()
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        relay.reactor.addReader(self)
        module = "twisted_kproxy.userspace.engines.worker"
        arguments = [sys.executable, "-P", "-m", module, "3", relay.engine, "yes" if relay.threaded else "no"]
        environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LANG", "LC_ALL") if key in os.environ}
        with other, open(os.devnull, "rb") as nothing:
            self.process = relay.reactor.spawnProcess(
                self, sys.executable, arguments, environment,
                childFDs={0: nothing.fileno(), 1: 2, 2: 2, 3: other.fileno()},
            )

    # --- orders

    def take(
        self, client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Handed | None:
        """Give it a pair, and close ours; ``None`` where it cannot take one now."""
        self._number += 1
        order = msgpack.encode(Pair(self._number, early))
        descriptors = array.array("i", (client.fileno(), backend.fileno()))
        try:
            self._channel.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS):
                self.ready = False  # it is gone; the process tells that as well
            return None
        client.close()
        backend.close()
        it = self.open[self._number] = Handed(self, self._number, ended)
        return it

    def cut(self, number: int) -> None:
        """Have a pair reset."""
        self._uncut.append(number)
        if len(self._uncut) == 1:
            self._sendCuts()

    def _sendCuts(self) -> None:
        while self._uncut and not self._gone:
            if self._uncut[0] in self.open:
                try:
                    self._channel.send(msgpack.encode(Cut(self._uncut[0])))
                except BlockingIOError:
                    self._relay.reactor.callLater(0.01, self._sendCuts)
                    return
                except OSError:
                    return
            del self._uncut[0]

    def close(self) -> None:
        """Let it go: it ends, with what it has open."""
        if not self._gone:
            self._relay.reactor.removeReader(self)
            self._channel.close()
            self._lost()

    # --- what it says

    def fileno(self) -> int:
        return self._channel.fileno()

    def logPrefix(self) -> str:
        return "relay worker"

    def doRead(self) -> None:
        for _ in range(_MESSAGES):
            if self._gone:
                return
            try:
                data = self._channel.recv(LARGEST)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            if not self.ready:
                self.ready = True
                self._relay.workerReady()
            for it in decodeEndings(data).ended:
                self._end(it.number, Outcome(it.reason, it.sent, it.received))

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def _end(self, number: int, outcome: Outcome) -> None:
        it = self.open.pop(number, None)
        if it is None:
            return
        ended = it.over()
        try:
            ended(outcome)
        except Exception:
            self.log.failure("After a connection had ended")

    def _lost(self) -> None:
        """Whatever it had is gone with it."""
        self._gone = True
        self.ready = False
        for number in list(self.open):
            self._end(number, Outcome("aborted", 0, 0))

    def processEnded(self, reason: Failure) -> None:
        self.close()
        self._relay.workerEnded(self, reason)


@implementer(IRelay)
class WorkersRelay:
    """
    Gives each pair to the worker that has the fewest. While none takes any (at the start, or when all are busy) the
    daemon carries the bytes itself.

    :param own: the engine for that.
    :param count: how many workers.
    :param engine: the name of theirs.
    """

    log = Logger()

    def __init__(
        self, reactor: Any, poller: Poller, own: IRelay, count: int, engine: str = "auto", threaded: bool = False
    ) -> None:
        self.reactor = reactor
        self.engine = engine
        self.threaded = threaded
        self.name = f"{own.name}, in {count} workers"
        self._poller = poller
        self._own = own
        self._stopping = False
        self._waiting: Deferred[None] | None = None
        #: fires when all workers have been ready for the first time
        self.started: Deferred[None] = Deferred()
        self._pauses: dict[int, float] = {}
        self._timers: dict[int, Any] = {}
        self._workers: dict[int, _Worker] = {}
        for index in range(count):
            self._begin(index)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """For operators: each worker's process, and how many connections it has."""
        return [
            {"pid": it.process.pid, "ready": it.ready, "active": len(it.open)}
            for _, it in sorted(self._workers.items())
        ]

    def relay(
        self, client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        ready = [it for it in self._workers.values() if it.ready]
        ready.sort(key=lambda it: len(it.open))
        if ready:
            for fd in (client.fileno(), backend.fileno()):
                self._poller.release(fd)
            for worker in ready:
                it = worker.take(client, backend, early, ended)
                if it is not None:
                    return it.cut
        return self._own.relay(client, backend, early, ended)

    def status(self) -> Mapping[str, Any]:
        """``workers``: each one's process, and how many connections it has; ``active`` are those of the daemon too."""
        own = self._own.status()
        workers = self.workers
        active = own["active"] + sum(it["active"] for it in workers)
        return {"engine": self.engine, "active": active, "workers": workers, "daemon": own}

    def stop(self) -> Deferred[None]:
        """Let the workers go, with what they have open. Fires when their processes have ended."""
        self._stopping = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        done: Deferred[None] = Deferred()
        self._waiting = done
        for it in list(self._workers.values()):
            it.close()
        self._allEnded()
        # Connections that the daemon itself has carried, for want of a worker.
        return done.addCallback(lambda _: self._own.stop())

    def _begin(self, index: int) -> None:
        self._timers.pop(index, None)
        self._workers[index] = _Worker(self, index)

    def workerReady(self) -> None:
        """One more takes connections."""
        if not self.started.called and all(it.ready for it in self._workers.values()):
            self.log.info("{count} relay workers are ready", count=len(self._workers))
            self.started.callback(None)

    def workerEnded(self, worker: _Worker, reason: Failure) -> None:
        """Its process has ended; another one takes its place."""
        del self._workers[worker.index]
        if self._stopping:
            self._allEnded()
            return
        lived = self.reactor.seconds() - worker.began
        pause = SOON if lived >= SETTLED else min(self._pauses.get(worker.index, SOON / 2) * 2, LATE)
        self._pauses[worker.index] = pause
        self.log.error(
            "Relay worker {index} has ended ({reason}); its connections are lost. Another one begins in {pause:g} s",
            index=worker.index, reason=reason.getErrorMessage(), pause=pause,
        )
        self._timers[worker.index] = self.reactor.callLater(pause, self._begin, worker.index)

    def _allEnded(self) -> None:
        if not self._workers and self._waiting is not None:
            done, self._waiting = self._waiting, None
            done.callback(None)
