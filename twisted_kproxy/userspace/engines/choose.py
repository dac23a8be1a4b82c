"""
Which engine carries bytes: by name, or the best that works here.

An engine that cannot be had says why and is passed over; the native one is tried with a few bytes before anything else
goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger

from ...interfaces import IRelay, NotAvailable
from .native import NativeRelay, selfTest
from .pairs import PairRelay
from .poller import Poller
from .protocol import ProtocolRelay
from .workers import WorkersRelay

#: In order of preference.
AUTOMATIC = ("native", "python", "protocol")
_log = Logger()


def _native(reactor: Any, poller: Poller, threaded: bool) -> IRelay:
    relay = NativeRelay(reactor, poller, threaded=threaded)
    selfTest(relay)
    found: IRelay = relay
    return found


_MAKERS: dict[str, Callable[[Any, Poller, bool], IRelay]] = {
    "native": _native,
    "python": lambda reactor, poller, threaded: PairRelay(reactor, poller),
    "protocol": lambda reactor, poller, threaded: ProtocolRelay(reactor, poller),
}


def chooseEngine(reactor: Any, poller: Poller, wanted: str = "auto", threaded: bool = False) -> IRelay:
    """
    The engine of that name; for ``auto`` the first that works.

    :param threaded: whether the native one gets a thread of its own.
    :raise NotAvailable: where none does; the text says why each did not.
    """
    reasons = []
    for name in AUTOMATIC if wanted == "auto" else (wanted,):
        try:
            engine = _MAKERS[name](reactor, poller, threaded)
        except NotAvailable as error:
            reasons.append(f"{name}: {error}")
            continue
        where = "its own thread" if threaded and name == "native" else "the reactor's thread"
        events = "the reactor's own epoll" if poller.integrated else f"an epoll nested in {type(reactor).__name__}"
        _log.info(
            "Connections are relayed by the engine {name} in {where}; events by {events}{why}",
            name=name, where=where, events=events, why=f" (not {'; not '.join(reasons)})" if reasons else "",
        )
        return engine
    raise NotAvailable(f"engine = {wanted}: {'; '.join(reasons)}")


def makeRelay(reactor: Any, poller: Poller, wanted: str, threaded: bool, workers: int) -> IRelay:
    """
    What carries bytes, as it is configured.

    :param workers: how many processes; 1 for this one alone.
    :raise NotAvailable: see :func:`chooseEngine`.
    """
    own = chooseEngine(reactor, poller, wanted, threaded)
    if workers == 1:
        return own
    relay: IRelay = WorkersRelay(reactor, poller, own, workers, own.name, threaded)
    return relay
