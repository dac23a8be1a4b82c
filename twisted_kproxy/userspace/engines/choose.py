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

#: In order of preference.
AUTOMATIC = ("native", "python")
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
}
_SOCKETS: dict[str, Callable[[Any, Poller], Sockets]] = {"native": _batches, "python": Sockets}


def _first(names: tuple[str, ...], make: Callable[[str], _T]) -> tuple[str, _T, str]:
    """The first that can be had: its name, it, and for the log why others cannot."""
    reasons: list[str] = []
    for name in names:
        try:
            return name, make(name), f" (not {'; not '.join(reasons)})" if reasons else ""
        except NotAvailable as error:
            reasons.append(f"{name}: {error}")
    raise NotAvailable("; ".join(reasons))


def chooseEngines(
    reactor: Any, poller: Poller, wanted: str = "auto", threaded: bool = False
) -> tuple[IRelay, Sockets]:
    """
    The engine of that name, for connections and for datagrams; for ``auto`` the first that works for either.

    :param threaded: whether the native one of connections gets a thread of its own.
    :raise NotAvailable: where none does; the text says why each did not.
    """
    names = AUTOMATIC if wanted == "auto" else (wanted,)
    try:
        name, relay, why = _first(names, lambda name: _RELAYS[name](reactor, poller, threaded))
        another, sockets, whyAnother = _first(names, lambda name: _SOCKETS[name](reactor, poller))
    except NotAvailable as error:
        raise NotAvailable(f"engine = {wanted}: {error}") from None
    _log.info(
        "Connections are relayed by the engine {name} in {where}{why}; datagrams by {another}, {how}{whyAnother}; "
        "events by {events}",
        name=name, where="its own thread" if threaded and name == "native" else "the reactor's thread", why=why,
        another=another, how=sockets.description, whyAnother=whyAnother,
        events="the reactor's own epoll" if poller.integrated else f"an epoll nested in {type(reactor).__name__}",
    )
    return relay, sockets
