"""What the userspace dataplane needs for each service port: which sockets, in the place of which pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace
from twisted.internet.error import CannotListenError
from twisted.internet.task import deferLater

from ..core.values import Endpoint, Family, FrontendKey, PoolKind, ServicePort
from ..interfaces import IProxier

KINDS: tuple[PoolKind, ...] = ("cluster", "local")
NO_SCTP = "SCTP is not served in userspace mode; its clients are refused"
#: The reactor gets a turn after so many seconds of work, or so many steps.
_SLICE = 0.01
_STEPS = 64


class Pace:
    """Long work in slices, so that connections are served meanwhile."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._begin()

    def _begin(self) -> None:
        self._until = self._reactor.seconds() + _SLICE
        self._steps = 0

    def step(self) -> None:
        """A socket was opened or closed."""
        self._steps += 1

    def due(self) -> bool:
        """Is it the reactor's turn?"""
        return self._steps >= _STEPS or self._reactor.seconds() >= self._until

    async def turn(self) -> None:
        await deferLater(self._reactor, 0)
        self._begin()


class Socket:
    """
    A proxier in service.

    :ivar uid: of the Service that it was opened for.
    :ivar endpoints: what it was last told.
    """

    __slots__ = ("endpoints", "proxier", "uid")

    def __init__(self, proxier: IProxier, uid: str, endpoints: tuple[Endpoint, ...]) -> None:
        self.proxier = proxier
        self.uid = uid
        self.endpoints = endpoints

    def follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        if endpoints != self.endpoints:
            self.endpoints = endpoints
            self.proxier.endpointsChanged(endpoints)


def poolsOf(port: ServicePort | None) -> tuple[PoolKind, ...]:
    """The pools that need a socket."""
    if port is None or port.name.protocol == "SCTP":
        return ()
    return tuple(kind for kind in port.poolKinds() if port.pool(kind))


def openingError(error: Exception) -> str:
    """For operators; without the number that Python puts before it."""
    inner = error.socketError if isinstance(error, CannotListenError) else error
    return str(getattr(inner, "strerror", None) or inner)


def closed(port: ServicePort) -> ServicePort:
    """As the rules see a service port that cannot be served: every client is refused at once."""
    return replace(port, cluster=(), local=(), reachable=False, localReady=frozenset(), serving=frozenset())


def redirected(port: ServicePort, targets: Mapping[PoolKind, tuple[Endpoint, ...]], sound: bool) -> ServicePort:
    """
    As the rules see a service port that sockets serve. Which endpoints come and go behind a socket is no business of
    theirs: the port stays the same to them.

    :param sound: no socket that it needs is missing; else clients of the missing one are refused at once.
    """
    return replace(
        port,
        cluster=targets["cluster"],
        local=targets["local"],
        reachable=port.reachable and sound,
        localReady=frozenset(),
        serving=frozenset(str(it) for pool in targets.values() for it in pool),
    )


def planned(
    port: ServicePort, targets: Mapping[PoolKind, tuple[Endpoint, ...]], address: str | None
) -> tuple[ServicePort, str | None]:
    """
    What would be handed to the rules if these sockets were open.

    :param address: of this node, of the family.
    :return: that, and why the service port is not served, if so.
    """
    if port.name.protocol == "SCTP":
        return closed(port), NO_SCTP
    fault = homeless(port.name.family) if address is None and poolsOf(port) else None
    return redirected(port, {"cluster": (), "local": (), **targets}, fault is None), fault


def preferred(port: ServicePort, kind: PoolKind, inForce: Callable[[FrontendKey], int | None]) -> int:
    """
    Where the socket of a pool should listen, 0 for anywhere.

    :param inForce: the port to which the rules in force lead a frontend.
    """
    known = (inForce(port.key(frontend)) for frontend in port.frontends if frontend.pool == kind)
    return next(filter(None, known), 0)


def homeless(family: Family) -> str:
    """Why nothing of a family is served."""
    return f"this node has no {family} address"


def same(before: ServicePort | None, now: ServicePort) -> ServicePort:
    """The same object for as long as it says the same."""
    return before if before is not None and before == now else now
