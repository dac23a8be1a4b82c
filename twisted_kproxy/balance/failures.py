"""
Endpoints that fail: remembered for operators, and told in the log, so that nobody has to guess which pod is dead.

In come what connections report; everything goes on to the next observer. Nothing is decided here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from ..core.values import Endpoint, Outcome, PoolName, ServicePortName
from ..core.wording import counted
from ..interfaces import ITrafficObserver

#: an endpoint is in the log at most so often, in seconds
SILENCE = 60.0
#: failing endpoints remembered at the most; those that failed longest ago go first
MOST = 4096

_Key: TypeAlias = tuple[ServicePortName, Endpoint]
_WORDS = {
    "refused": "refuses connections",
    "timeout": "does not answer in time",
    "unreachable": "cannot be reached",
    "reset": "resets connections",
    "limit": "cannot be dialled: no local port is left",
}


class _Failing:
    """
    :ivar count: tries that failed since it last answered.
    :ivar saidAt: when the log last spoke of it.
    """

    __slots__ = ("at", "count", "reason", "saidAt")

    def __init__(self) -> None:
        self.count = 0
        self.at = 0.0
        self.reason = ""
        self.saidAt: float | None = None


@implementer(ITrafficObserver)
class EndpointFailures:
    """
    :param reactor: its ``seconds()`` is the monotonic clock.
    :param following: is told everything in turn.
    """

    log = Logger()

    def __init__(self, reactor: IReactorTime, following: ITrafficObserver) -> None:
        self._reactor = reactor
        self._following = following
        self._failing: OrderedDict[_Key, _Failing] = OrderedDict()

    def opened(self, pool: PoolName, endpoint: Endpoint, seconds: float) -> None:
        if self._failing and (pool.port, endpoint) in self._failing:
            self._answers(pool.port, endpoint)
        self._following.opened(pool, endpoint, seconds)

    def missed(self, pool: PoolName, endpoint: Endpoint, reason: str) -> None:
        key = (pool.port, endpoint)
        it = self._failing.get(key)
        if it is None:
            while len(self._failing) >= MOST:
                self._failing.popitem(last=False)
            it = self._failing[key] = _Failing()
        else:
            self._failing.move_to_end(key)
        now = it.at = self._reactor.seconds()
        it.reason = reason
        it.count += 1
        if it.saidAt is None or now - it.saidAt >= SILENCE:
            self.log.warn(
                "Endpoint {endpoint} of {port} {words} ({tries} since it last answered); "
                "its clients are led to others",
                endpoint=str(endpoint), port=str(pool.port), words=_WORDS.get(reason, "fails"), count=it.count,
                tries=counted(it.count, "failed try", "failed tries"), reason=reason,
            )
            it.saidAt = now
        self._following.missed(pool, endpoint, reason)

    def failed(self, pool: PoolName, reason: str) -> None:
        self._following.failed(pool, reason)

    def closed(self, pool: PoolName, endpoint: Endpoint, outcome: Outcome) -> None:
        self._following.closed(pool, endpoint, outcome)

    def status(self, port: ServicePortName, endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
        """Those of these endpoints that have failed and not answered since: how often, how, and how long ago."""
        now = self._reactor.seconds()
        return {
            str(endpoint): {"failures": it.count, "reason": it.reason, "secondsAgo": round(now - it.at, 1)}
            for endpoint in endpoints
            if (it := self._failing.get((port, endpoint))) is not None and it.count
        }

    def _answers(self, port: ServicePortName, endpoint: Endpoint) -> None:
        """
        It answers again. One that fails now and then stays remembered for as long as the log is to be silent about it,
        or each of its failures would be told.
        """
        it = self._failing[port, endpoint]
        now = self._reactor.seconds()
        if it.saidAt is not None and now - it.saidAt < SILENCE:
            it.count = 0
            return
        del self._failing[port, endpoint]
        self.log.info("Endpoint {endpoint} of {port} answers again", endpoint=str(endpoint), port=str(port))
