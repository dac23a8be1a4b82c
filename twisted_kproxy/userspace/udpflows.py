"""
UDP flows: who talks to which endpoint, in the order in which they may be given up. No I/O and no clock.
"""

from __future__ import annotations

import errno
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeAlias

from ..core.values import Endpoint

#: A socket address as the kernel gives it: two parts in IPv4, four in IPv6.
Address: TypeAlias = tuple[Any, ...]

#: A client's socket address, and the local address that it dialled: on another one it is another conversation.
FlowKey: TypeAlias = tuple[Address, bytes]

#: A larger datagram is not kept for a second try. It covers what fits an Ethernet frame: DNS, DHCP, SIP, a QUIC or
#: DTLS hello. What is larger is a stream of its own kind, whose sender repeats what is lost.
KEPT = 1500


#: Why a datagram is dropped, by the error number with which the kernel does not take it; ``error`` for any other.
DROPS = {errno.EMSGSIZE: "too-long", errno.EAGAIN: "busy", errno.ENOBUFS: "busy", errno.ENOMEM: "busy"}
#: With these the kernel says that it cannot cut a train of datagrams, or not for that path.
UNCUT = frozenset({errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP})


class Connected(Protocol):
    """The socket towards an endpoint."""

    def send(self, datagram: bytes) -> int: ...

    def close(self) -> None: ...


class Traffic(NamedTuple):
    """What was relayed, in the words of the status page."""

    datagramsSent: int
    bytesSent: int
    datagramsReceived: int
    bytesReceived: int


class AnyFlow(Protocol):
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

    endpoint: Endpoint
    since: float
    socket: Connected | None

    @property
    def key(self) -> FlowKey: ...

    @property
    def used(self) -> float: ...

    @property
    def answered(self) -> bool: ...

    @property
    def tried(self) -> tuple[Endpoint, ...]: ...

    @property
    def unanswered(self) -> bytes | None: ...

    @property
    def sent(self) -> int: ...

    @property
    def received(self) -> int: ...

    @property
    def stale(self) -> bool: ...

    @stale.setter
    def stale(self, stale: bool) -> None: ...


class Flows(Protocol):
    """
    The flows of one proxier, and what they have relayed.

    Flows that were never answered and flows that were are kept apart, each lot in the order of last use: spoofed
    senders fill the first, and it is the first to be given up.
    """

    @property
    def unanswered(self) -> int:
        """How many flows were never answered."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __contains__(self, flow: Any) -> bool: ...

    def make(self, key: FlowKey, endpoint: Endpoint, now: float, since: float, tried: tuple[Endpoint, ...]) -> Any:
        """A flow that is not in the table yet."""

    def find(self, key: FlowKey) -> Any:
        """That client's flow; ``None`` where there is none."""

    def add(self, flow: Any) -> None:
        """
        A new flow, whose socket is connected.

        :raise OSError: where there is no room for it; then it is not there.
        """

    def remove(self, flow: Any) -> None:
        """It has ended."""

    def touch(self, flow: Any, now: float) -> None:
        """A datagram went either way."""

    def answer(self, flow: Any, now: float) -> None:
        """The endpoint has answered."""

    def sent(self, flow: Any, datagram: bytes) -> None:
        """The kernel has taken that for the endpoint: count it, and keep it where it may be needed again."""

    def drop(self, reason: str) -> None:
        """A datagram was dropped."""

    def drops(self) -> Mapping[str, int]:
        """How many were, by reason."""

    def traffic(self) -> Traffic:
        """What was relayed so far."""

    def victim(self) -> Any:
        """
        Whom to give up when there is no room: the longest unused one of the unanswered, then of the others; ``None``
        where there is no flow.
        """

    def idle(self, before: float, atMost: int) -> list[Any]:
        """Those that were last used then or earlier, or as many of them."""

    def oldest(self) -> float | None:
        """When the longest unused flow was last used; ``None`` where there is no flow."""


class Flow:
    """
    An :class:`AnyFlow` whose datagrams go through Python.

    :ivar plain: trains do not get through in one piece.
    """

    __slots__ = (
        "answered",
        "endpoint",
        "key",
        "plain",
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
        self.plain = False
        self.unanswered: bytes | None = None
        self.sent = 0
        self.received = 0


class FlowTable:
    """
    :class:`Flows` whose datagrams go through Python.

    :ivar new: those that were never answered, and :ivar answered: those that were; the longest unused one first.
    """

    def __init__(self) -> None:
        self.new: OrderedDict[FlowKey, Flow] = OrderedDict()
        self.answered: OrderedDict[FlowKey, Flow] = OrderedDict()
        self._drops: Counter[str] = Counter()
        self._datagramsSent = self._bytesSent = self._datagramsReceived = self._bytesReceived = 0

    def __len__(self) -> int:
        return len(self.new) + len(self.answered)

    def __iter__(self) -> Iterator[Flow]:
        yield from self.new.values()
        yield from self.answered.values()

    def __contains__(self, flow: Flow) -> bool:
        return self.find(flow.key) is flow

    @property
    def unanswered(self) -> int:
        return len(self.new)

    def make(self, key: FlowKey, endpoint: Endpoint, now: float, since: float, tried: tuple[Endpoint, ...]) -> Flow:
        return Flow(key, endpoint, now, since, tried)

    def find(self, key: FlowKey) -> Flow | None:
        return self.answered.get(key) or self.new.get(key)

    def add(self, flow: Flow) -> None:
        self.new[flow.key] = flow

    def remove(self, flow: Flow) -> None:
        del (self.answered if flow.answered else self.new)[flow.key]

    def touch(self, flow: Flow, now: float) -> None:
        flow.used = now
        (self.answered if flow.answered else self.new).move_to_end(flow.key)

    def answer(self, flow: Flow, now: float) -> None:
        if not flow.answered:
            del self.new[flow.key]
            flow.answered = True
            self.answered[flow.key] = flow
        flow.unanswered = None
        flow.tried = ()
        flow.used = now
        self.answered.move_to_end(flow.key)

    def sent(self, flow: Flow, datagram: bytes) -> None:
        size = len(datagram)
        flow.unanswered = datagram if size <= KEPT else None
        flow.sent += size
        self._datagramsSent += 1
        self._bytesSent += size

    def received(self, flow: Flow, size: int) -> None:
        flow.received += size
        self._datagramsReceived += 1
        self._bytesReceived += size

    def drop(self, reason: str) -> None:
        self._drops[reason] += 1

    def drops(self) -> Mapping[str, int]:
        return dict(self._drops)

    def traffic(self) -> Traffic:
        return Traffic(self._datagramsSent, self._bytesSent, self._datagramsReceived, self._bytesReceived)

    def victim(self) -> Flow | None:
        return next(iter(self.new.values()), None) or next(iter(self.answered.values()), None)

    def idle(self, before: float, atMost: int) -> list[Flow]:
        flows = chain(_upTo(self.new.values(), before), _upTo(self.answered.values(), before))
        return list(islice(flows, atMost))

    def oldest(self) -> float | None:
        fronts = (next(iter(self.new.values()), None), next(iter(self.answered.values()), None))
        return min((flow.used for flow in fronts if flow is not None), default=None)


def _upTo(flows: Iterable[Flow], before: float) -> Iterator[Flow]:
    for flow in flows:
        if flow.used > before:
            return
        yield flow
