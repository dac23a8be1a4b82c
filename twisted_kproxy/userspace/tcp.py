"""A pool of a TCP service port on a socket of this node: the listening port, and the connections it accepts."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import ServerFactory
from twisted.internet.tcp import Port
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..core.values import Endpoint, PoolName
from ..interfaces import (
    ILoadBalancer,
    IProxier,
    IProxierFactory,
    IRelay,
    ITrafficObserver,
)
from .accesslog import AccessLog
from .dial import Dialer
from .ports import Budget
from .session import Session
from .sockets import BACKLOG, openListener, openSocket, wildcard

#: Descriptors of one proxied connection.
_PAIR = 2
_STREAM = int(socket.SOCK_STREAM)
#: Connections accepted per event, and cut per turn of the reactor.
_ACCEPTS = 32
_LAST_ACCEPTS = 512
_CUTS = 500

# A client that gave up before it was accepted, or a network error of its connection: accept(2) says to go on.
_PASSING = frozenset(
    {
        errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
        errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ETIMEDOUT,
    }
)  # fmt: skip


class ListeningPort(Port):
    """
    A Twisted port over a socket that is opened elsewhere (and may be taken over from elsewhere).

    Twisted builds a transport of its own for each connection, and closes clients when descriptors run out. This one
    hands the bare socket over, and lets clients wait in the kernel.
    """

    log = Logger()

    def __init__(self, reactor: Any, proxier: TcpProxier, sock: socket.socket, budget: Budget) -> None:
        super().__init__(sock.getsockname()[1], proxier, BACKLOG, wildcard(proxier.pool.port.family), reactor)
        self._proxier = proxier
        self._budget = budget
        self.socket: socket.socket = sock
        self._family = int(sock.family)

    def startListening(self) -> None:
        self._realPortNumber = self.port = self.socket.getsockname()[1]
        self.fileno = self.socket.fileno  # type: ignore[method-assign]
        self._proxier.doStart()  # type: ignore[no-untyped-call]
        self.connected = True
        self.resumeAccepting()
        self._budget.addListener(self)

    def stopListening(self) -> Deferred[None]:  # type: ignore[override]
        """Close at once. Who has already got through to the backlog is still served (a bounded number)."""
        if self.connected and not self.disconnecting:
            self.disconnecting = True
            self._accept(_LAST_ACCEPTS)
            self._budget.removeListener(self)
            self.pauseAccepting()
            # Not shutdown(): another process may go on with a copy of this socket.
            self._shouldShutdown = False
            self.connectionLost(Failure(ConnectionDone()))  # type: ignore[no-untyped-call]
            self._budget.release(1)
        return succeed(None)

    loseConnection = stopListening  # type: ignore[assignment]

    def pauseAccepting(self) -> None:
        self.stopReading()  # type: ignore[no-untyped-call]

    def resumeAccepting(self) -> None:
        self.startReading()  # type: ignore[no-untyped-call]

    def doRead(self) -> None:
        self._accept(_ACCEPTS)

    def _accept(self, limit: int) -> None:
        budget, proxier = self._budget, self._proxier
        # What accept() of the standard library does beside is not for us.
        accept = self.socket._accept  # type: ignore[attr-defined]
        family = self._family
        for _ in range(limit):
            # Whoever hears of the last connection may have closed this port.
            if budget.paused or not self.connected:
                return
            if not budget.take(_PAIR):
                budget.exhausted("all file descriptors of the dataplane are in use")
                return
            try:
                fd, address = accept()
            except OSError as error:
                budget.give(_PAIR)
                if isinstance(error, BlockingIOError):
                    return
                if error.errno not in _PASSING:
                    # EMFILE and its like, or something unknown: whatever it is, not in a loop.
                    budget.exhausted(f"accept() says {error}")
                    return
                continue
            sock = openSocket(family, _STREAM, 0, fd)
            sock.setblocking(False)
            Session(proxier, address).begin(sock)

    def _logConnectionLostMsg(self) -> None:
        """Thousands of ports open and close here; the dataplane logs what matters."""


@implementer(IProxier, IProxierFactory)
class TcpProxier(ServerFactory):
    """
    Serves one pool of a TCP service port.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param connectTimeouts: seconds for the first, second, … attempt to reach an endpoint, each at another one.
        After the last the client is reset.
    """

    noisy = False
    log = Logger()

    def __init__(
        self,
        reactor: Any,
        pool: PoolName,
        balancer: ILoadBalancer,
        observer: ITrafficObserver,
        *,
        relay: IRelay,
        dialer: Dialer,
        budget: Budget,
        connectTimeouts: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
        accessLog: AccessLog | None = None,
    ) -> None:
        self.reactor = reactor
        self.pool = pool
        self.port = 0
        self.balancer = balancer
        self.observer = observer
        self.relay = relay
        self.dialer = dialer
        self.poller = dialer.poller
        self.budget = budget
        self.connectTimeouts = tuple(connectTimeouts)
        self.accessLog = accessLog
        self.opened = 0
        self._listening: ListeningPort | None = None
        # A dict for its order: cut oldest first.
        self._sessions: dict[Session, None] = {}
        self._waiting: list[Deferred[None]] = []
        self._cutting: Any = None

    # --- IProxier

    def listen(self, port: int = 0) -> None:
        if not self.budget.hold(1):
            raise OSError(errno.EMFILE, "there are too few file descriptors for so many sockets; raise LimitNOFILE")
        try:
            self.adopt(openListener(self.pool.port.family, port))
        except BaseException:
            self.budget.release(1)
            raise

    def adopt(self, sock: socket.socket) -> None:
        """Accept connections of a listening, non-blocking socket: it, and one descriptor held for it, are ours now."""
        self._listening = ListeningPort(self.reactor, self, sock, self.budget)
        self._listening.startListening()
        self.port = sock.getsockname()[1]

    def renamed(self, pool: PoolName) -> None:
        self.pool = pool

    def endpointsChanged(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Connections stay where they are; new ones ask the balancer, which has been told."""

    def stopListening(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.stopListening()

    def drained(self) -> Deferred[None]:
        if not self._sessions:
            return succeed(None)
        waiting: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiting)
        return waiting

    def abort(self) -> None:
        if self._cutting is not None:
            return
        for session in list(self._sessions)[:_CUTS]:
            session.abort()
        if self._sessions:
            self._cutting = self.reactor.callLater(0, self._cutMore)

    def status(self) -> Mapping[str, Any]:
        return {
            "protocol": "TCP",
            "port": self.port,
            "listening": self._listening is not None,
            "active": len(self._sessions),
            "opened": self.opened,
        }

    # --- IProtocolFactory

    def buildProtocol(self, addr: IAddress) -> Session:  # type: ignore[override]
        """For connections that come from elsewhere than :class:`ListeningPort`, which makes its sessions itself."""
        return Session(self, (addr.host, addr.port))  # type: ignore[attr-defined]

    # --- what sessions tell

    def sessionBegan(self, session: Session) -> None:
        """A client was accepted."""
        self._sessions[session] = None

    def sessionEnded(self, session: Session) -> None:
        """Its sockets are closed."""
        if session in self._sessions:
            del self._sessions[session]
            self.budget.give(_PAIR)

    def tellDrained(self) -> None:
        """After all that there is to say of a session's end was said: was it the last?"""
        if not self._sessions:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.callback(None)

    def _cutMore(self) -> None:
        self._cutting = None
        self.abort()
