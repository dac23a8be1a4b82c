"""UDP: one socket for all clients of a pool, and for each client a connected socket to its endpoint."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.protocol import DatagramProtocol
from twisted.logger import Logger
from zope.interface import implementer

from ..core.values import Endpoint, Outcome, PoolName
from ..interfaces import ILoadBalancer, IProxier, ITrafficObserver, NoEndpoint
from .udpflows import DROPS, Address, AnyFlow, FlowKey
from .udpport import WildcardPort
from .udpsockets import Sockets

#: How many endpoints a datagram is sent to at most, one after the other.
TRIES = 4
#: How many flows end in one turn of the reactor at most.
SLICE = 500
#: Idle flows may live so much longer than they should, so that one sweep ends many.
_GRAIN = 0.125
_LONGEST_GRAIN = 1.0

# EPERM is this node's own packet filter.
_UNREACHABLE = frozenset(
    {
        errno.EPERM,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
        errno.ENONET,
        errno.EACCES,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPROTO,
    }
)
# This machine is short of descriptors, memory or local ports; no endpoint is to blame. (A UDP connect() that finds no
# free port says EAGAIN.)
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})


class Descriptors(Protocol):
    """How many file descriptors may still be opened, in the whole proxy."""

    def take(self, n: int) -> bool: ...

    def give(self, n: int) -> None: ...


class _NoWay(Exception):
    """A client cannot be led anywhere now."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@implementer(IProxier)
class UdpProxier(DatagramProtocol):
    """
    Serves one pool's UDP clients.

    A flow is what one client address and port sends to one local address. Its endpoint is chosen with its first
    datagram and kept until

    - nothing has gone either way for the idle time (its outcome is ``idle``);
    - the endpoint has left the pool: the client's next datagram goes to another one, and what the old one still sends
      reaches the client only until then (``moved``);
    - the network reports by ICMP that the endpoint cannot be reached (``refused``, ``unreachable``): the client moves
      at once to an endpoint that has not failed it, at most :data:`TRIES` in a row. Its last datagram is sent there
      again if it was not answered and is at most :data:`~twisted_kproxy.userspace.udpflows.KEPT` bytes long. Where no
      other endpoint is left the flow ends, and the next datagram begins anew;
    - its place is needed (``evicted``): there may be so many flows per proxier, and so many file descriptors in the
      process. The longest unused one of those that were never answered goes first, then the longest unused one;
    - the proxier stops (``aborted``).

    Replies leave from the very address that the client had dialled. Datagrams from port 0, or from a socket of this
    proxy itself, are dropped, and nobody is ever sent anything that an endpoint has not sent.

    :param pool: the pool that it serves.
    :param idleTimeout: seconds without a datagram either way after which a flow ends, and up to an eighth (at most
        a second) more.
    :param budget: one descriptor is taken per flow, and given back with it.
    :param maxFlows: how many flows there may be.
    :param sockets: the engine: what opens sockets, and carries the datagrams of flows that need no decision. One for
        the whole process, which knows the sockets that are its own.
    """

    log = Logger()
    noisy = False
    transport: WildcardPort | None = None

    def __init__(
        self,
        reactor: Any,
        pool: PoolName,
        balancer: ILoadBalancer,
        observer: ITrafficObserver,
        *,
        idleTimeout: float,
        budget: Descriptors,
        sockets: Sockets,
        maxFlows: int = 16384,
    ) -> None:
        self.pool = pool
        self.port = 0
        self._reactor = reactor
        self._seconds: Callable[[], float] = reactor.seconds
        self._balancer = balancer
        self._observer = observer
        self._idleTimeout = idleTimeout
        self._budget = budget
        self._maxFlows = maxFlows
        self._sockets = sockets
        self._flows = sockets.table()
        self._sweeping: Any = None
        self._doomed: deque[AnyFlow] = deque()
        self._cutting: Any = None
        self._waiting: list[Deferred[None]] = []
        self._opened = 0
        self._ended: dict[str, int] = {}

    # --- IProxier ----------------------------------------------------------------------------------------------------

    def listen(self, port: int = 0) -> None:
        service = self._sockets.listen(self.pool.port.family, port, self, self._flows)
        self.port = service.number
        self.log.debug("{pool} is served on UDP port {port}.", pool=str(self.pool), port=self.port)

    def renamed(self, pool: PoolName) -> None:
        self.pool = pool

    def endpointsChanged(self, endpoints: tuple[Endpoint, ...]) -> None:
        here = set(endpoints)
        for flow in self._flows:
            flow.stale = flow.endpoint not in here

    def stopListening(self) -> None:
        if self.transport is not None:
            self._sockets.close(self.transport)
            self.transport = None
        self.abort()

    def drained(self) -> Deferred[None]:
        waiting: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiting)
        self._tellDrained()
        return waiting

    def abort(self) -> None:
        self._doomed.extend(self._flows)
        if self._cutting is None:
            self._cut()

    def status(self) -> Mapping[str, Any]:
        """
        ``active`` flows, ``unanswered`` ones among them, flows ``opened`` and ``ended`` (outcome → count), ``drops``
        (reason → datagrams), and what was relayed: ``datagramsSent`` and ``bytesSent`` to endpoints,
        ``datagramsReceived`` and ``bytesReceived`` from them.

        Drops are for want of an endpoint (``no-endpoint``), of one that does not refuse (``failed``), of descriptors
        or local ports (``limit``), of buffer space (``busy``); because the datagram does not fit the path
        (``too-long``), came from port 0 (``source-port-0``) or from this proxy (``loop``); or for any other ``error``.
        """
        return {
            "protocol": "UDP",
            "port": self.port,
            "listening": self.transport is not None,
            "active": len(self._flows),
            "unanswered": self._flows.unanswered,
            "opened": self._opened,
            "ended": dict(self._ended),
            **self._flows.traffic()._asdict(),
            "drops": dict(self._flows.drops()),
        }

    # --- datagrams ---------------------------------------------------------------------------------------------------

    def datagramReceived(self, datagram: bytes, addr: Address) -> None:
        """A client has sent this; the transport knows whom it had dialled."""
        assert self.transport is not None
        now = self._seconds()
        key = (addr, self.transport.dialled)
        flow = self._flows.find(key)
        if flow is None:
            if addr[1] == 0 or self._sockets.isOwn(addr):
                self._flows.drop("loop" if addr[1] else "source-port-0")
                return
        elif flow.stale:
            self._end(flow, "moved")
            flow = None
        else:
            self._flows.touch(flow, now)
        try:
            self._send(flow or self._begin(key, now, now), datagram)
        except _NoWay as noWay:
            self._flows.drop(noWay.reason)

    def unsent(self, flow: AnyFlow, number: int, datagram: bytes) -> None:
        """The kernel has not taken a client's datagram for the flow's endpoint, with this error number."""
        try:
            self._send(flow, datagram, number)
        except _NoWay as noWay:
            self._flows.drop(noWay.reason)

    def failed(self, flow: AnyFlow, number: int) -> None:
        """The network has reported that something which was sent did not arrive at the flow's endpoint."""
        if not _blames(number):
            self._flows.drop(DROPS.get(number, "error"))
            return
        try:
            self._move(flow, number)
        except _NoWay:
            pass  # counted already; the client's next datagram begins anew

    def _send(self, flow: AnyFlow, datagram: bytes, number: int = 0) -> None:
        while True:
            if not number:
                assert flow.socket is not None
                number = flow.socket.send(datagram)
                if not number:
                    self._flows.sent(flow, datagram)
                    return
            if not _blames(number):
                self._flows.drop(DROPS.get(number, "error"))
                return
            # The error is an earlier datagram's; this one was not sent.
            flow = self._move(flow, number)
            number = 0

    # --- flows -------------------------------------------------------------------------------------------------------

    def _begin(
        self, key: FlowKey, now: float, since: float, tried: tuple[Endpoint, ...] = (), reason: str = "error"
    ) -> AnyFlow:
        host = key[0][0]
        client = host if "%" not in host else host.partition("%")[0]
        if self.transport is None:
            raise _NoWay("stopped")
        while True:
            try:
                endpoint = self._balancer.nextEndpoint(self.pool, client, tried)
            except NoEndpoint:
                self._observer.failed(self.pool, "no-endpoint")
                raise _NoWay("no-endpoint") from None
            if endpoint in tried or len(tried) >= TRIES:
                self._observer.failed(self.pool, reason)
                raise _NoWay("failed")
            flow: AnyFlow = self._flows.make(key, endpoint, now, since, tried)
            self._makeRoom()
            try:
                flow.socket = self._sockets.connect(endpoint, self, flow)
                self._flows.add(flow)
            except OSError as error:
                if flow.socket is not None:
                    flow.socket.close()
                self._budget.give(1)
                number = error.errno or errno.EIO
                if number in _SHORT:
                    self._observer.failed(self.pool, "limit")
                    raise _NoWay("limit") from None
                reason = _reason(number)
                self._observer.missed(self.pool, endpoint, reason)
                tried = (*tried, endpoint)
                continue
            self._opened += 1
            self._balancer.opened(self.pool, endpoint)
            self._observer.opened(self.pool, endpoint, now - since)
            self._armSweep()
            return flow

    def _makeRoom(self) -> None:
        """Take a descriptor for one more flow."""
        if len(self._flows) >= self._maxFlows:
            self._evict()
        if not self._budget.take(1):
            self._evict()
            if not self._budget.take(1):
                self._observer.failed(self.pool, "limit")
                raise _NoWay("limit")

    def _evict(self) -> None:
        flow = self._flows.victim()
        if flow is not None:
            self._end(flow, "evicted")

    def _move(self, flow: AnyFlow, number: int) -> AnyFlow:
        """The flow's endpoint has failed: lead the client to another, and send again what was not answered."""
        reason = _reason(number)
        self._end(flow, reason)
        self._observer.missed(self.pool, flow.endpoint, reason)
        now = self._seconds()
        since = now if flow.answered else flow.since
        try:
            successor = self._begin(flow.key, now, since, (*flow.tried, flow.endpoint), reason)
            if flow.unanswered is not None:
                self._send(successor, flow.unanswered)
        except _NoWay as noWay:
            if flow.unanswered is not None:
                self._flows.drop(noWay.reason)
            raise
        # To send it may have taken further moves.
        current: AnyFlow | None = self._flows.find(flow.key)
        if current is None:
            raise _NoWay(reason)
        return current

    def _end(self, flow: AnyFlow, reason: str) -> None:
        self._flows.remove(flow)
        if flow.socket is not None:
            flow.socket.close()
        self._budget.give(1)
        self._ended[reason] = self._ended.get(reason, 0) + 1
        self._balancer.closed(self.pool, flow.endpoint)
        self._observer.closed(self.pool, flow.endpoint, Outcome(reason, flow.sent, flow.received))
        self._tellDrained()

    def _tellDrained(self) -> None:
        if self._flows:
            return
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        while self._waiting and not self._flows:
            self._waiting.pop().callback(None)

    def _cut(self) -> None:
        self._cutting = None
        for _ in range(min(SLICE, len(self._doomed))):
            flow = self._doomed.popleft()
            if flow in self._flows:
                self._end(flow, "aborted")
        if self._doomed:
            self._cutting = self._reactor.callLater(0, self._cut)

    def _armSweep(self) -> None:
        oldest = self._flows.oldest()
        if self._sweeping is None and oldest is not None:
            rest = oldest + self._idleTimeout - self._seconds()
            grain = min(self._idleTimeout * _GRAIN, _LONGEST_GRAIN)
            self._sweeping = self._reactor.callLater(max(rest, grain), self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        idle = self._flows.idle(self._seconds() - self._idleTimeout, SLICE)
        for flow in idle:
            self._end(flow, "idle")
        if len(idle) == SLICE and self._flows:
            self._sweeping = self._reactor.callLater(0, self._sweep)
        else:
            self._armSweep()


def _blames(number: int) -> bool:
    return number == errno.ECONNREFUSED or number in _UNREACHABLE


def _reason(number: int) -> str:
    if number == errno.ECONNREFUSED:
        return "refused"
    return "unreachable" if number in _UNREACHABLE else "error"
