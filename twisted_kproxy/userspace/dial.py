"""Connecting to endpoints: raw non-blocking sockets, any number in parallel, one timer for all."""

from __future__ import annotations

import errno
import socket
from typing import Any, Protocol

from twisted.logger import Logger

from ..core.values import Endpoint
from .engines.poller import Poller
from .sockets import EXHAUSTED, familyOf, markOwn, openSocket, pendingError, resetClose

_REASONS = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.EACCES: "unreachable",
    errno.EPERM: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    # All ephemeral ports towards this endpoint are taken: our fault, and another endpoint may have some left.
    errno.EADDRNOTAVAIL: "limit",
    **dict.fromkeys(EXHAUSTED, "limit"),
}


#: Ports that the kernel may give to a socket that dials: by default from 32768 on, and seldom below this.
_EPHEMERAL = 10000
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
# As plain numbers: Python looks twice at members of an enumeration.
_TCP, _NODELAY, _QUICKACK = int(socket.IPPROTO_TCP), int(socket.TCP_NODELAY), int(socket.TCP_QUICKACK)
#: Endpoints whose addresses are kept ready.
_WAYS = 10000


def reasonOf(number: int | None) -> str:
    """What :class:`~twisted_kproxy.interfaces.ITrafficObserver` calls that error number."""
    return _REASONS.get(number or 0, "error")


class Dialing(Protocol):
    """Who wants the connection. One of these is called, once, unless the dial was cancelled."""

    def dialConnected(self, sock: socket.socket) -> None: ...

    def dialFailed(self, number: int) -> None: ...


class Deadlines:
    """
    Time-outs of a few fixed lengths, kept in order by length, with one timer for all: a connection that is
    established in time costs two dictionary operations. No timer is left when nothing waits.
    """

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._queues: dict[float, dict[Dial, float]] = {}
        self._count = 0
        self._timer: Any = None

    def add(self, dial: Dial, seconds: float) -> None:
        deadline = self._reactor.seconds() + seconds
        self._queues.setdefault(seconds, {})[dial] = deadline
        self._count += 1
        if self._timer is None:
            self._timer = self._reactor.callLater(seconds, self._expire)
        elif deadline < self._timer.getTime():
            self._timer.reset(seconds)

    def remove(self, dial: Dial, seconds: float) -> None:
        if self._queues[seconds].pop(dial, None) is None:
            return
        self._count -= 1
        if not self._count and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        now = self._reactor.seconds()
        expired: list[Dial] = []
        earliest: float | None = None
        for queue in self._queues.values():
            for dial, deadline in queue.items():
                if deadline > now:
                    earliest = deadline if earliest is None else min(earliest, deadline)
                    break
                expired.append(dial)
        for dial in expired:
            del self._queues[dial.timeout][dial]
        self._count -= len(expired)
        if earliest is not None:
            self._timer = self._reactor.callLater(earliest - now, self._expire)
        for dial in expired:
            try:
                dial.expired()
            except Exception:
                self.log.failure("Who has dialled could not be told that its time is over")


class Dial:
    """
    One attempt to connect, watched until it is decided. A socket that is handed over is still watched: its new owner
    takes its events from then on, or releases it.

    :ivar socket: connected, for the caller to take over, when :meth:`Dialer.dial` could finish at once.
    """

    __slots__ = ("_dialer", "_owner", "connected", "socket", "timeout")

    def __init__(self, dialer: Dialer, sock: socket.socket, owner: Dialing, timeout: float) -> None:
        self._dialer = dialer
        self._owner: Dialing | None = owner
        self.socket = sock
        self.timeout = timeout
        self.connected = False

    def cancel(self) -> None:
        """Give up; the owner hears nothing. Harmless when it is over."""
        if self._finish() is not None:
            self._close()

    def expired(self) -> None:
        """Its time is over. Where the reactor comes late, what the socket has got to know meanwhile counts."""
        self.event(0)
        owner = self._finish()
        if owner is not None:
            self._close()
            owner.dialFailed(errno.ETIMEDOUT)

    def event(self, events: int) -> None:
        """The socket is connected, or has failed; what it was only the socket knows."""
        if self._owner is None:
            return
        number = established(self.socket)
        if number == errno.EINPROGRESS:
            # An event meant for an earlier socket of the same number.
            return
        owner = self._finish()
        if owner is None:
            return
        if number:
            self._close(number)
            owner.dialFailed(number)
        else:
            owner.dialConnected(self.socket)

    def _finish(self) -> Dialing | None:
        owner, self._owner = self._owner, None
        if owner is not None:
            self._dialer.deadlines.remove(self, self.timeout)
        return owner

    def _close(self, number: int | None = None) -> None:
        self._dialer.poller.closing(self.socket.fileno())
        _discard(self.socket, number)


class _Way:
    """
    What connecting to an endpoint needs.

    :raise OSError: where the address is none: Python would ask the resolver, and wait for it.
    """

    __slots__ = ("address", "family", "mayBeItself")

    def __init__(self, endpoint: Endpoint) -> None:
        family = familyOf(endpoint.address)
        socket.inet_pton(family, endpoint.address)
        self.family = int(family)
        self.address = (endpoint.address, endpoint.port)
        self.mayBeItself = endpoint.port >= _EPHEMERAL


class Dialer:
    """
    Opens connections to endpoints.

    :param reactor: provides IReactorTime.
    :param poller: watches the sockets.
    """

    def __init__(self, reactor: Any, poller: Poller) -> None:
        self.reactor = reactor
        self.poller = poller
        self._ways: dict[Endpoint, _Way] = {}
        self.deadlines = Deadlines(reactor)

    def dial(self, endpoint: Endpoint, timeout: float, owner: Dialing, eager: bool = False) -> Dial:
        """
        Begin to connect. Addresses are literals: nothing is ever looked up.

        :param timeout: seconds.
        :param eager: there is something to send as soon as it is connected. The last word of the handshake then goes
            with that, which saves both sides a packet, and the endpoint a wake-up. The kernel sends it after 200 ms
            otherwise, and what comes is acknowledged late as well: see :func:`.sockets.quickAck`.
        :return: with ``connected`` set where that was done at once (the owner is not called then).
        :raise OSError: where it failed at once.
        """
        way = self._ways.get(endpoint)
        if way is None:
            if len(self._ways) >= _WAYS:
                self._ways.clear()
            way = self._ways[endpoint] = _Way(endpoint)
        sock = openSocket(way.family, _STREAM)
        try:
            sock.setsockopt(_TCP, _NODELAY, 1)
            if eager:
                sock.setsockopt(_TCP, _QUICKACK, 0)
            markOwn(sock)
            number = sock.connect_ex(way.address)
            if number == errno.EINPROGRESS or not number:
                # On this node the handshake is over by the time that connect() returns.
                number = established(sock, way.mayBeItself)
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, errno.errorcode.get(number, str(number)))
            dial = Dial(self, sock, owner, timeout)
            if number:
                self.poller.watch(sock.fileno(), dial.event)
                self.deadlines.add(dial, timeout)
            else:
                dial.connected = True
        except BaseException as error:
            _discard(sock, error.errno if isinstance(error, OSError) else None)
            raise
        return dial


def established(sock: socket.socket, mayBeItself: bool = True) -> int:
    """
    How a connect stands: 0 when it is done, EINPROGRESS while it is not, else why it failed.

    :param mayBeItself: a port of the ephemeral range is dialed.

    A port of the ephemeral range where nobody listens may be given to the very socket that dials it: TCP's
    simultaneous open (RFC 9293, 3.5) then connects it to itself. That is a refusal.
    """
    try:
        peer = sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            return error.errno or errno.EBADF
        return pendingError(sock) or errno.EINPROGRESS
    return errno.ECONNREFUSED if mayBeItself and peer == sock.getsockname() else 0


def _discard(sock: socket.socket, number: int | None) -> None:
    if number == errno.ECONNREFUSED:
        # Perhaps connected to itself: a plain close would leave the port in TIME_WAIT.
        resetClose(sock)
    else:
        sock.close()
