"""
UDP flows: who talks to which endpoint, in the order in which they may be given up. No I/O and no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Protocol, TypeAlias

from ..core.values import Endpoint
from .udpsockets import Address

#: A client's socket address, and the local address that it dialled: on another one it is another conversation.
FlowKey: TypeAlias = tuple[Address, bytes]

#: A larger datagram is not kept for a second try. It covers what fits an Ethernet frame: DNS, DHCP, SIP, a QUIC or
#: DTLS hello. What is larger is a stream of its own kind, whose sender repeats what is lost.
KEPT = 1500


class Connected(Protocol):
    """The socket towards an endpoint."""

    def send(self, datagram: bytes) -> int: ...

    def close(self) -> None: ...


class Flow:
    """
    One client's conversation with one endpoint.

    :ivar key: whom it belongs to.
    :ivar since: when the client's datagram came that it was opened for.
    :ivar used: when a datagram last went either way.
    :ivar answered: the endpoint has sent something.
    :ivar stale: its endpoint has left the pool: it gets no more datagrams.
    :ivar tried: endpoints that failed this client since it was last answered, this one excepted.
    :ivar unanswered: the last datagram that was sent, while nothing has come back since. With two under way it is not
        known which one the network refused; sending the later one again is right more often, and a datagram may
        always arrive twice.
    :ivar sent: bytes towards the endpoint.
    :ivar received: bytes towards the client.
    """

    __slots__ = (
        "answered",
        "endpoint",
        "key",
        "received",
        "sent",
        "since",
        "socket",
        "stale",
        "tried",
        "unanswered",
        "used",
    )

    socket: Connected | None

    def __init__(self, key: FlowKey, endpoint: Endpoint, now: float, since: float, tried: tuple[Endpoint, ...]) -> None:
        self.key = key
        self.endpoint = endpoint
        self.since = since
        self.used = now
        self.tried = tried
        self.socket = None
        self.answered = False
        self.stale = False
        self.unanswered: bytes | None = None
        self.sent = 0
        self.received = 0


class FlowTable:
    """
    The flows of one proxier. Flows that were never answered and flows that were are kept apart, each lot in the order
    of last use: spoofed senders fill the first, and it is the first to be given up.
    """

    def __init__(self) -> None:
        self._unanswered: OrderedDict[FlowKey, Flow] = OrderedDict()
        self._answered: OrderedDict[FlowKey, Flow] = OrderedDict()

    def __len__(self) -> int:
        return len(self._unanswered) + len(self._answered)

    def __iter__(self) -> Iterator[Flow]:
        yield from self._unanswered.values()
        yield from self._answered.values()

    def __contains__(self, flow: Flow) -> bool:
        return self.find(flow.key) is flow

    @property
    def unanswered(self) -> int:
        """How many flows were never answered."""
        return len(self._unanswered)

    def find(self, key: FlowKey) -> Flow | None:
        return self._answered.get(key) or self._unanswered.get(key)

    def add(self, flow: Flow) -> None:
        """A new flow; its key is free."""
        self._unanswered[flow.key] = flow

    def remove(self, flow: Flow) -> None:
        """It has ended."""
        del (self._answered if flow.answered else self._unanswered)[flow.key]

    def touch(self, flow: Flow, now: float) -> None:
        """A datagram went either way."""
        flow.used = now
        (self._answered if flow.answered else self._unanswered).move_to_end(flow.key)

    def answer(self, flow: Flow, now: float) -> None:
        """The endpoint has answered."""
        if not flow.answered:
            del self._unanswered[flow.key]
            flow.answered = True
            self._answered[flow.key] = flow
        self.touch(flow, now)

    def victim(self) -> Flow | None:
        """Whom to give up when there is no room: the longest unused one of the unanswered, then of the others."""
        return next(iter(self._unanswered.values()), None) or next(iter(self._answered.values()), None)

    def idle(self, before: float, atMost: int) -> list[Flow]:
        """Those that were last used then or earlier, or as many of them."""
        flows = chain(_upTo(self._unanswered.values(), before), _upTo(self._answered.values(), before))
        return list(islice(flows, atMost))

    def oldest(self) -> float | None:
        """When the longest unused flow was last used; ``None`` where there is no flow."""
        fronts = (next(iter(self._unanswered.values()), None), next(iter(self._answered.values()), None))
        return min((flow.used for flow in fronts if flow is not None), default=None)


def _upTo(flows: Iterable[Flow], before: float) -> Iterator[Flow]:
    for flow in flows:
        if flow.used > before:
            return
        yield flow
