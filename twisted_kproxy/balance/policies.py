"""
Policies: who is next among the endpoints of one pool.

Each is told of the pool's endpoints by ``replaced()`` and answers ``choose()`` in O(1) while nothing is to be avoided,
for one endpoint as for thousands. What is to be avoided has just failed a client: that is rare, and costs a walk.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Collection
from typing import ClassVar

from zope.interface import implementer

from ..core.values import Endpoint
from ..interfaces import IBalancingPolicy


@implementer(IBalancingPolicy)
class RoundRobin:
    """
    One after the other. The ring is the sorted order of the endpoints, and the position in it is the endpoint that was
    served last, not a number: whoever comes after it in the ring is next, whatever has joined or left meanwhile, the
    one served last included. So an update never starts over, and never serves one twice in a row while there is
    another.

    :param start: the index to begin at; by default each pool begins somewhere else, so that the nodes of a cluster do
        not all send their first connection to the same endpoint.
    """

    name: ClassVar[str] = "round-robin"

    def __init__(self, start: int | None = None) -> None:
        self._start = start
        self._ring: tuple[Endpoint, ...] = ()
        self._next = 0
        self._last: Endpoint | None = None

    def replaced(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._ring = endpoints
        if not endpoints:
            return
        if self._last is not None:
            self._next = bisect_right(endpoints, self._last) % len(endpoints)
        elif self._start is None:
            self._next = random.randrange(len(endpoints))  # noqa: S311  spreads load, guards nothing
        else:
            self._next = self._start % len(endpoints)

    def choose(self, client: str, avoid: Collection[Endpoint]) -> Endpoint | None:
        ring = self._ring
        for _ in range(len(ring)):
            endpoint = ring[self._next]
            self._next = (self._next + 1) % len(ring)
            if not avoid or endpoint not in avoid:
                self._last = endpoint
                return endpoint
        return None

    def opened(self, endpoint: Endpoint) -> None:
        """Open connections do not matter here."""

    def closed(self, endpoint: Endpoint) -> None:
        """Open connections do not matter here."""


@implementer(IBalancingPolicy)
class Random:
    """
    Any of them, each with the same probability, as the kernel's own modes choose.

    :param source: of randomness; the process's own by default.
    """

    name: ClassVar[str] = "random"

    def __init__(self, source: random.Random | None = None) -> None:
        self._below = (source or random).randrange
        self._endpoints: tuple[Endpoint, ...] = ()

    def replaced(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._endpoints = endpoints

    def choose(self, client: str, avoid: Collection[Endpoint]) -> Endpoint | None:
        candidates = _without(self._endpoints, avoid)
        return candidates[self._below(len(candidates))] if candidates else None

    def opened(self, endpoint: Endpoint) -> None:
        """Open connections do not matter here."""

    def closed(self, endpoint: Endpoint) -> None:
        """Open connections do not matter here."""


@implementer(IBalancingPolicy)
class LeastConnections:
    """
    The less busy of two chosen at random ("the power of two choices", Mitzenmacher 2001): O(1), with no order to
    maintain.

    Exactly the least busy would be a worse choice on a node. Its counts are this node's own, a part of the load of an
    endpoint that all nodes share; and an endpoint that has just joined would get every new connection, of every node,
    until it had caught up with the others. Of two, it gets 2/n of them. The two are never the same, so the busiest
    endpoint of a pool is not chosen while there is another, and a pool of two is balanced exactly.

    :param source: of randomness; the process's own by default.
    """

    name: ClassVar[str] = "least-connections"

    def __init__(self, source: random.Random | None = None) -> None:
        self._below = (source or random).randrange
        self._endpoints: tuple[Endpoint, ...] = ()
        # Also of endpoints that have left: should one come back, its connections still count.
        self._active: dict[Endpoint, int] = {}

    def replaced(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._endpoints = endpoints

    def choose(self, client: str, avoid: Collection[Endpoint]) -> Endpoint | None:
        candidates = _without(self._endpoints, avoid)
        count = len(candidates)
        if count < 2:
            return candidates[0] if candidates else None
        first = self._below(count)
        second = self._below(count - 1)
        if second >= first:
            second += 1
        one, other = candidates[first], candidates[second]
        return other if self._active.get(other, 0) < self._active.get(one, 0) else one

    def opened(self, endpoint: Endpoint) -> None:
        self._active[endpoint] = self._active.get(endpoint, 0) + 1

    def closed(self, endpoint: Endpoint) -> None:
        left = self._active.get(endpoint, 0) - 1
        if left > 0:
            self._active[endpoint] = left
        else:
            self._active.pop(endpoint, None)


def _without(endpoints: tuple[Endpoint, ...], avoid: Collection[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(e for e in endpoints if e not in avoid) if avoid else endpoints
