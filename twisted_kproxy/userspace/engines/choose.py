"""
Which engine carries bytes and datagrams: by name, or the best that works here.

An engine that cannot be had says why and is passed over; the native one is tried with a few bytes, and a few datagrams,
before anything else goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.logger import Logger

from ...interfaces import IRelay, NotAvailable
from ..udpsockets import Sockets
from . import offload
from .datagrams import NativeSockets
from .native import NativeRelay, selfTest
from .pairs import PairRelay
from .poller import Poller
from .protocol import ProtocolRelay
from .workers import WorkersRelay

#: In order of preference.
AUTOMATIC = ("native", "python", "protocol")
_log = Logger()
_T = TypeVar("_T")


def _native(reactor: Any, poller: Poller, threaded: bool) -> IRelay:
    relay = NativeRelay(reactor, poller, threaded=threaded)
    selfTest(relay)
    found: IRelay = relay
    return found


def _batches(reactor: Any, poller: Poller) -> Sockets:
    sockets = NativeSockets(reactor, poller)
    offload.selfTest(sockets)
    return sockets


_RELAYS: dict[str, Callable[[Any, Poller, bool], IRelay]] = {
    "native": _native,
    "python": lambda reactor, poller, threaded: PairRelay(reactor, poller),
    "protocol": lambda reactor, poller, threaded: ProtocolRelay(reactor, poller),
}
_SOCKETS: dict[str, Callable[[Any, Poller], Sockets]] = {"native": _batches, "python": Sockets, "protocol": Sockets}


def chooseEngine(reactor: Any, poller: Poller, wanted: str = "auto", threaded: bool = False) -> IRelay:
    """
    The engine of that name for connections; for ``auto`` the first that works.

    :param threaded: whether the native one gets a thread of its own.
    :raise NotAvailable: where none does; the text says why each did not.
    """
    relay, where = _relayOf(reactor, poller, wanted, threaded)
    _log.info("Connections are relayed by {where}; {events}", where=where, events=_events(reactor, poller))
    return relay


def makeEngines(
    reactor: Any, poller: Poller, wanted: str = "auto", threaded: bool = False, workers: int = 1
) -> tuple[IRelay, Sockets]:
    """
    What carries bytes and what carries datagrams, as it is configured.

    :param workers: how many processes carry bytes; 1 for this one alone.
    :raise NotAvailable: see :func:`chooseEngine`.
    """
    own, where = _relayOf(reactor, poller, wanted, threaded)
    name, sockets, why = _first(wanted, lambda name: _SOCKETS[name](reactor, poller))
    _log.info(
        "Connections are relayed by {where}; datagrams by the engine {name} {how}{why}; {events}",
        where=where, name=name, how=sockets.description, why=why, events=_events(reactor, poller),
    )
    if workers == 1:
        return own, sockets
    relay: IRelay = WorkersRelay(reactor, poller, own, workers, own.name, threaded)
    return relay, sockets


def _relayOf(reactor: Any, poller: Poller, wanted: str, threaded: bool) -> tuple[IRelay, str]:
    name, relay, why = _first(wanted, lambda name: _RELAYS[name](reactor, poller, threaded))
    where = "its own thread" if threaded and name == "native" else "the reactor's thread"
    return relay, f"the engine {name} in {where}{why}"


def _events(reactor: Any, poller: Poller) -> str:
    where = "the reactor's own epoll" if poller.integrated else f"an epoll nested in {type(reactor).__name__}"
    return f"events by {where}"


def _first(wanted: str, make: Callable[[str], _T]) -> tuple[str, _T, str]:
    """The first that can be had: its name, it, and for the log why others cannot."""
    reasons: list[str] = []
    for name in AUTOMATIC if wanted == "auto" else (wanted,):
        try:
            return name, make(name), f" (not {'; not '.join(reasons)})" if reasons else ""
        except NotAvailable as error:
            reasons.append(f"{name}: {error}")
    raise NotAvailable(f"engine = {wanted}: {'; '.join(reasons)}")
