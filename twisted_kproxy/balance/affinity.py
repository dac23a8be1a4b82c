"""
ClientIP session affinity: which endpoint a client was led to, for a while.

The time slides: each new connection of a client starts it anew (Kubernetes, ``sessionAffinityConfig.clientIP``:
1 to 86400 seconds since the last connection).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from ..core.values import Endpoint


class _Seat:
    """What the clients of one endpoint have in common."""

    __slots__ = ("clients", "endpoint", "gone")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.clients = 0
        self.gone = False


class _Binding:
    __slots__ = ("seat", "used")

    def __init__(self, seat: _Seat, used: float) -> None:
        self.seat = seat
        self.used = used


class AffinityTable:
    """
    The bindings of one pool's clients. It knows no clock; callers say what time it is, in seconds of the monotonic
    clock, never going back.

    Every use moves a binding to the end, so the order of the table is the order of age: what has expired lies at its
    front. Each new binding removes at most two of those there, so that no call pays for many and none is left for
    long; a table that is full gives up the oldest. No binding has a timer.

    :param limit: how many clients are remembered at most (a spoofed flood must not grow the proxy).
    :param seconds: how long a client is remembered after its last connection.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._bindings: OrderedDict[str, _Binding] = OrderedDict()
        self._seats: dict[Endpoint, _Seat] = {}
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._bindings)

    @property
    def seconds(self) -> float:
        return self._seconds

    def find(self, client: str, now: float) -> Endpoint | None:
        """Where the client belongs, and from now on for the whole time again; ``None`` where it belongs nowhere."""
        binding = self._bindings.get(client)
        if binding is None:
            return None
        if now - binding.used >= self._seconds:
            self._drop(client)
            return None
        binding.used = now
        self._bindings.move_to_end(client)
        return binding.seat.endpoint

    def peek(self, client: str, now: float) -> Endpoint | None:
        """As :meth:`find`, to look only: its time does not begin anew."""
        binding = self._bindings.get(client)
        return binding.seat.endpoint if binding is not None and now - binding.used < self._seconds else None

    def bind(self, client: str, endpoint: Endpoint, now: float) -> None:
        """The client belongs to that endpoint, whatever was before."""
        if client in self._bindings:
            self._drop(client)
        self._expire(now, atMost=2)
        while len(self._bindings) >= self._limit:
            self._drop(next(iter(self._bindings)))
            self.evicted += 1
        seat = self._seats.get(endpoint)
        if seat is None:
            seat = self._seats[endpoint] = _Seat(endpoint)
        seat.clients += 1
        self._bindings[client] = _Binding(seat, now)

    def setSeconds(self, seconds: float, now: float) -> None:
        """
        Another time is in force at once, for bindings that exist too. What had expired under the old one stays
        expired when the new one is longer.
        """
        self._expire(now)
        self._seconds = seconds
        self._expire(now)

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Forget the clients of every endpoint that is not among these; the others stay where they are."""
        gone = self._seats.keys() - set(endpoints)
        if not gone:
            return
        for endpoint in gone:
            self._seats[endpoint].gone = True
        for client in [client for client, binding in self._bindings.items() if binding.seat.gone]:
            self._drop(client)

    def count(self, now: float) -> int:
        """How many clients are bound; forgets what has expired."""
        self._expire(now)
        return len(self._bindings)

    def _expire(self, now: float, atMost: int | None = None) -> None:
        while self._bindings and atMost != 0:
            client, binding = next(iter(self._bindings.items()))
            if now - binding.used < self._seconds:
                return
            self._drop(client)
            if atMost is not None:
                atMost -= 1

    def _drop(self, client: str) -> None:
        seat = self._bindings.pop(client).seat
        seat.clients -= 1
        if not seat.clients:
            del self._seats[seat.endpoint]
