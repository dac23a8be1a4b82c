"""An accepted TCP connection: dialing an endpoint, then relaying, then closed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core.values import Endpoint, Outcome, hostPort
from ..interfaces import NoEndpoint
from .accesslog import AccessLog, originalDestination
from .dial import Dial, reasonOf
from .engines.poller import INPUT
from .sockets import EXHAUSTED, resetClose

if TYPE_CHECKING:
    from .tcp import TcpProxier

#: What is read of a client before it has an endpoint; and at first, without waiting.
_EARLY = 65536
_FIRST = 4096


class AcceptedSocket:
    """All the transport that a :class:`Session` needs: the accepted socket, non-blocking."""

    __slots__ = ("socket",)

    def __init__(self, sock: socket.socket, *unused: Any) -> None:
        self.socket = sock


class Session:
    """
    One accepted connection: dialing, then relaying, then closed.

    While an endpoint is dialed the client is read, so that it is noticed when it goes; what it says is sent first.
    """

    __slots__ = (
        "_address", "_attempt", "_connected", "_cut", "_dial", "_early", "_endpoint", "_failed", "_frontend",
        "_proxier", "_reason", "_socket", "_started",
    )  # fmt: skip

    _socket: socket.socket
    _endpoint: Endpoint

    def __init__(self, proxier: TcpProxier, address: tuple[Any, ...]) -> None:
        """:param address: the client's socket address."""
        self._proxier = proxier
        self._address = address
        self._frontend = ""
        self._connected: float | None = None
        self._attempt = 0
        self._failed: tuple[Endpoint, ...] = ()
        self._reason = "error"
        self._dial: Dial | None = None
        self._cut: Callable[[], None] | None = None
        self._early = b""
        self._started = 0.0

    def makeConnection(self, transport: AcceptedSocket) -> None:
        """Begin with a client that comes from elsewhere than :class:`.tcp.ListeningPort`."""
        self.begin(transport.socket)

    def begin(self, sock: socket.socket) -> None:
        """Begin. From here on the session owns the socket and the descriptors taken for it."""
        self._socket = sock
        self._proxier.sessionBegan(self)
        self._started = self._proxier.reactor.seconds()
        try:
            # Most clients speak first, and have by now. An end is found again by whoever relays.
            self._early = sock.recv(_FIRST)
        except BlockingIOError:
            pass
        except OSError:
            self._refuse("client-gone")
            return
        self._advance()

    def abort(self) -> None:
        """Reset both sides."""
        if self._cut is not None:
            self._cut()
        else:
            self._refuse()

    # --- dialing

    def dialConnected(self, sock: socket.socket) -> None:
        self._dial = None
        try:
            self._relay(sock)
        except Exception:
            self._proxier.log.failure("A connection of {pool} to {endpoint} is cut.", pool=str(self._proxier.pool),
                                      endpoint=str(self._endpoint))  # fmt: skip
            self._proxier.poller.closing(sock.fileno())
            resetClose(sock)
            self._refuse()

    def dialFailed(self, number: int) -> None:
        self._dial = None
        if self._blame(number):
            self._advance()

    def _advance(self) -> None:
        """Try endpoints until one is on its way, or all attempts are spent."""
        proxier = self._proxier
        try:
            while self._attempt < len(proxier.connectTimeouts):
                timeout = proxier.connectTimeouts[self._attempt]
                self._attempt += 1
                self._endpoint = proxier.balancer.nextEndpoint(proxier.pool, self._address[0], self._failed)
                try:
                    dial = proxier.dialer.dial(self._endpoint, timeout, self, bool(self._early))
                except OSError as error:
                    if not self._blame(error.errno or 0):
                        return
                    continue
                if dial.connected:
                    self.dialConnected(dial.socket)
                else:
                    self._dial = dial
                    proxier.poller.watch(self._socket.fileno(), self.event)
                return
        except NoEndpoint:
            self._refuse("no-endpoint")
        except Exception:
            proxier.log.failure("A client of {pool} could not be served.", pool=str(proxier.pool))
            self._refuse("error")
        else:
            self._refuse(self._reason)

    def _blame(self, number: int) -> bool:
        """One try has failed. :return: whether another endpoint may do better."""
        proxier = self._proxier
        self._reason = reasonOf(number)
        if number in EXHAUSTED:
            # This machine's fault, not the endpoint's; another one would fail alike.
            proxier.budget.exhausted()
            self._refuse(self._reason)
            return False
        proxier.observer.missed(proxier.pool, self._endpoint, self._reason)
        self._failed += (self._endpoint,)
        return True

    def _relay(self, backend: socket.socket) -> None:
        proxier = self._proxier
        endpoint = self._endpoint
        early, self._early = self._early, b""
        proxier.opened += 1
        proxier.balancer.opened(proxier.pool, endpoint)
        self._connected = proxier.reactor.seconds() - self._started
        proxier.observer.opened(proxier.pool, endpoint, self._connected)
        if proxier.accessLog is not None:
            self._frontend = originalDestination(self._socket)
        self._cut = proxier.relay.relay(self._socket, backend, early, self._relayEnded)

    def _relayEnded(self, outcome: Outcome) -> None:
        proxier = self._proxier
        proxier.sessionEnded(self)
        try:
            proxier.balancer.closed(proxier.pool, self._endpoint)
            proxier.observer.closed(proxier.pool, self._endpoint, outcome)
            if proxier.accessLog is not None:
                self._log(proxier.accessLog, outcome)
        except Exception:
            proxier.log.failure("After a connection of {pool} had ended.", pool=str(proxier.pool))
        proxier.tellDrained()

    # --- the client meanwhile

    def event(self, events: int) -> None:
        """The client, whose endpoint is being dialed, has said something, or is gone."""
        if self._dial is None or not events & INPUT:
            return
        while len(self._early) < _EARLY:
            try:
                data = self._socket.recv(_EARLY - len(self._early))
            except BlockingIOError:
                return
            except OSError:
                self._refuse("client-gone")
                return
            if not data:
                # It may have asked, and wait for the answer: then the relay will find the end again and pass it on.
                if not self._early:
                    self._refuse("client-gone")
                return
            self._early += data

    def _refuse(self, reason: str = "") -> None:
        """
        End without an endpoint: the client sees a reset.

        :param reason: for the observer; ``""`` where it was our own doing.
        """
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        proxier = self._proxier
        if proxier.accessLog is not None:
            self._frontend = originalDestination(self._socket)
            self._log(proxier.accessLog, Outcome(reason or "aborted", 0, 0))
        proxier.poller.closing(self._socket.fileno())
        resetClose(self._socket)
        proxier.sessionEnded(self)
        if reason:
            proxier.observer.failed(proxier.pool, reason)
        proxier.tellDrained()

    def _log(self, log: AccessLog, outcome: Outcome) -> None:
        proxier = self._proxier
        log.ended(
            proxier.pool, hostPort(*self._address[:2]), self._frontend,
            self._endpoint if self._connected is not None else None,
            tries=self._attempt, connect=self._connected, total=proxier.reactor.seconds() - self._started,
            outcome=outcome,
        )  # fmt: skip
