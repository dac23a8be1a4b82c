"""What the dataplane has of the machine: file descriptors, and local ports to listen on."""

from __future__ import annotations

import errno
import random
import resource
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from twisted.internet.error import CannotListenError
from twisted.logger import Logger

from ..core import values
from ..interfaces import IProxier
from .sockets import errnoOf

#: Kept back for the API server's connections, rule tools, health checks and files.
RESERVE = 256
_UNLIMITED = 1 << 20
_PAUSE = 0.1
_HIGH = 0.95
_HELD = 0.75
_SAY_AGAIN = 60.0


class Accepting(Protocol):
    """A listener that can hold off its clients: they wait in the kernel's backlog."""

    def pauseAccepting(self) -> None: ...

    def resumeAccepting(self) -> None: ...


def raiseLimit() -> None:
    """Allow this process as many file descriptors as it may have: the soft limit of most systems is a mere 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # then with what there is; the budget keeps to it


def descriptorLimit() -> int:
    """How many file descriptors the dataplane may use: RLIMIT_NOFILE less a reserve (a quarter, where it is tiny)."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft in (resource.RLIM_INFINITY, -1):
        soft = _UNLIMITED
    return int(soft - min(RESERVE, soft // 4))


class Budget:
    """
    File descriptors of all sockets of the dataplane.

    Listening sockets hold theirs for good, up to three quarters of all. Of what is left for connections, at 95 % every
    TCP listener stops accepting; each 100 ms it is looked whether they may go on. So a flood of connections never takes
    what the rest of the daemon needs, and never spins; and no number of listeners alone keeps clients waiting.

    :param limit: how many there are; ``None`` derives it from RLIMIT_NOFILE.
    :ivar held: by listening sockets. :ivar used: by connections and flows.
    """

    log = Logger()

    def __init__(self, reactor: Any, limit: int | None = None) -> None:
        self._reactor = reactor
        self.limit = descriptorLimit() if limit is None else limit
        self.used = self.held = 0
        self.paused = False
        self.pauses = 0
        # A dict for its order: who has listened longest is resumed first.
        self._listeners: dict[Accepting, None] = {}
        self._timer: Any = None
        self._said: float | None = None

    def take(self, n: int) -> bool:
        """Reserve so many descriptors. ``False``, and nothing reserved, when they are not there."""
        used = self.used + n
        room = self.limit - self.held
        if used > room:
            return False
        self.used = used
        # Nothing is near its limit most of the time, and this is done for each connection.
        if used * 2 >= room and not self.paused and self._isHigh():
            self._pause(f"{self.used} of {self.limit - self.held} file descriptors for connections are in use")
        return True

    def hold(self, n: int) -> bool:
        """Reserve so many for listening sockets. ``False``, and nothing reserved, when too few would be left."""
        if self.held + n > self.limit * _HELD or self.used + self.held + n > self.limit:
            return False
        self.held += n
        return True

    def release(self, n: int) -> None:
        """Give back what was held."""
        self.held -= n

    def share(self, fraction: float) -> Share:
        """A part of what is for connections, for those who must not take it all."""
        return Share(self, fraction)

    def _isHigh(self) -> bool:
        return self.used >= max(1, int((self.limit - self.held) * _HIGH))

    def give(self, n: int) -> None:
        """Give back what was taken."""
        self.used -= n

    def exhausted(self, why: str = "the kernel gives no more file descriptors") -> None:
        """Hold off new clients for 100 ms at least: the machine itself is short of descriptors or memory."""
        if not self.paused:
            self._pause(why)

    def addListener(self, listener: Accepting) -> None:
        """From now on that listener is told to pause and to resume; at once, when there is a pause."""
        self._listeners[listener] = None
        if self.paused:
            listener.pauseAccepting()
            self._arm()

    def removeListener(self, listener: Accepting) -> None:
        """That listener is closed."""
        self._listeners.pop(listener, None)
        if not self._listeners and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.paused = False

    def status(self) -> Mapping[str, Any]:
        """JSON-able: ``{limit, held, used, paused, pauses}``."""
        return {
            "limit": self.limit, "held": self.held, "used": self.used, "paused": self.paused, "pauses": self.pauses,
        }

    def _pause(self, why: str) -> None:
        if not self._listeners:
            return
        self.paused = True
        self.pauses += 1
        now = self._reactor.seconds()
        if self._said is None or now - self._said >= _SAY_AGAIN:
            self._said = now
            self.log.warn("New connections wait: {why}. Raise LimitNOFILE if this lasts.", why=why)
        for listener in self._listeners:
            listener.pauseAccepting()
        self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._reactor.callLater(_PAUSE, self._lookAgain)

    def _lookAgain(self) -> None:
        self._timer = None
        if self._isHigh():
            self._arm()
            return
        self.paused = False
        for listener in list(self._listeners):
            listener.resumeAccepting()


class Share:
    """
    A part of a budget: UDP flows come at the mere word of a sender, and must not keep TCP clients waiting.

    :ivar used: how much of the part is taken.
    """

    def __init__(self, budget: Budget, fraction: float) -> None:
        self._budget = budget
        self._fraction = fraction
        self.used = 0

    def take(self, n: int) -> bool:
        """As of a budget; ``False`` also when the part is used up."""
        budget = self._budget
        if self.used + n > (budget.limit - budget.held) * self._fraction or not budget.take(n):
            return False
        self.used += n
        return True

    def give(self, n: int) -> None:
        """Give back what was taken."""
        self.used -= n
        self._budget.give(n)


_Claim: TypeAlias = tuple[values.Protocol, values.Family, int]


class PortRange:
    """
    Where proxiers listen: ports of a range, from a random one upwards, or any that the kernel gives.

    :param first: of the range, with ``last`` included; 0 leaves the choice to the kernel.
    """

    #: How many ports in use by others are tried at one opening: the reactor waits meanwhile.
    tries = 256

    def __init__(self, first: int = 0, last: int = 0, rng: random.Random | None = None) -> None:
        if first and not 0 < first <= last < 65536:
            raise ValueError(f"port-range {first}-{last} must lie within 1-65535 and not run backwards")
        self.first = first
        self.last = last
        # Only spreads the start; nobody is kept out by not knowing it.
        self._random = rng or random.Random()  # noqa: S311
        self._claims: dict[IProxier, _Claim] = {}
        self._used: set[_Claim] = set()

    def open(self, proxier: IProxier, preferred: int = 0) -> None:
        """
        Let a proxier listen: on the preferred port if that is free (and in the range), else on one of the range.

        :raise OSError: (or :class:`twisted.internet.error.CannotListenError`) when none can be had.
        """
        name = proxier.pool.port
        last: Exception | None = None
        for port in self._candidates(name.protocol, name.family, preferred):
            try:
                proxier.listen(port)
            except (OSError, CannotListenError) as error:
                # Another port helps against these two only.
                if not port or errnoOf(error) not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                last = error
            else:
                claim = (name.protocol, name.family, proxier.port)
                self._claims[proxier] = claim
                self._used.add(claim)
                return
        raise OSError(
            errno.EADDRINUSE, f"no free port in {self.first}-{self.last}" + (f" (last tried: {last})" if last else "")
        )

    def release(self, proxier: IProxier) -> None:
        """Its socket is closed. Harmless when it never had one."""
        claim = self._claims.pop(proxier, None)
        if claim is not None:
            self._used.discard(claim)

    def _candidates(self, protocol: values.Protocol, family: values.Family, preferred: int) -> Iterator[int]:
        if preferred and (not self.first or self.first <= preferred <= self.last):
            yield preferred
        if not self.first:
            yield 0
            return
        size = self.last - self.first + 1
        start = self._random.randrange(size)
        tried = 0
        for step in range(size):
            port = self.first + (start + step) % size
            if port == preferred or (protocol, family, port) in self._used:
                continue
            yield port
            tried += 1
            if tried == self.tries:
                return
