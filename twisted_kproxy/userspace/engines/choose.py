"""
Which engine carries bytes: by name, or the best that works here.

An engine is made, then tried over a socket pair before anything else goes through it: one that cannot carry a few bytes
and an end is passed over, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger

from ...interfaces import IRelay, NotAvailable
from .pairs import PairRelay
from .poller import Poller

#: in order of preference
AUTOMATIC = ("python",)
_log = Logger()


def _python(reactor: Any, poller: Poller) -> IRelay:
    relay: IRelay = PairRelay(reactor, poller)
    return relay


_MAKERS: dict[str, Callable[[Any, Poller], IRelay]] = {"python": _python}


def chooseEngine(reactor: Any, poller: Poller, wanted: str = "auto") -> IRelay:
    """
    The engine of that name; for ``auto`` the first that works.

    :raise NotAvailable: where none does; the text says why each did not.
    """
    reasons = []
    for name in AUTOMATIC if wanted == "auto" else (wanted,):
        try:
            engine = _MAKERS[name](reactor, poller)
        except NotAvailable as error:
            reasons.append(f"{name}: {error}")
            continue
        how = "in the reactor's own epoll" if poller.integrated else "in an epoll of its own under this reactor"
        why = f"; not {'; not '.join(reasons)}" if reasons else ""
        _log.info("Connections are relayed by the engine {name}, {how}{why}", name=name, how=how, why=why)
        return engine
    raise NotAvailable("; ".join(reasons))
