"""Which API to read a kind from, of a server that may not have the one that is best."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ..core.values import Kind
from ..interfaces import KproxyError
from .client import ApiClient, Resource
from .errors import Denied

#: Seconds after which a server that lacks the best API is asked for it again: it may have been upgraded.
PROBE_EVERY = 600.0
#: An API that has worked must be missing so many times in a row before another one is read.
PATIENCE = 3


class Routes:
    """
    A resource and those that may be read instead of it, the best first. ``discovery.k8s.io/v1`` came with 1.21 and
    ``v1beta1`` with 1.17; before that, there are only Endpoints.
    """

    log = Logger()

    def __init__(self, clock: IReactorTime, resource: Resource) -> None:
        self._clock = clock
        self._all = (resource, *resource.instead)
        self._at = 0
        self._working = False
        self._missing = 0
        self._denials = 0
        self._probedAt = 0.0

    @property
    def resource(self) -> Resource:
        """What to read now."""
        return self._all[self._at]

    @property
    def best(self) -> Resource:
        return self._all[0]

    @property
    def kinds(self) -> set[Kind]:
        """Every kind that may come to be read."""
        return {it.kind for it in self._all}

    def goesWithout(self, error: Exception) -> bool:
        """Whether an error says that we are not given the resource, and that is as good as any other answer."""
        isSo = self.resource.optional and isinstance(error, Denied) and error.code in (403, 404)
        self._denials += isSo
        return isSo

    @property
    def isSettled(self) -> bool:
        """Whether what was said about that will hold: a server that is just starting refuses who has the right."""
        return self._denials > PATIENCE

    def works(self) -> None:
        """The resource is there."""
        self._missing = self._denials = 0
        if not self._working:
            self._working = True
            self._probedAt = self._clock.seconds()

    def lacks(self) -> bool:
        """
        The server says that it does not have the resource.

        :return: whether to read another one at once.
        """
        self._missing += 1
        if len(self._all) == 1 or (self._working and self._missing < PATIENCE):
            return False
        lacking = self.resource.path
        self._working = False
        self._missing = 0
        self._at = (self._at + 1) % len(self._all)
        self.log.warn("The server has no {lacking}; trying {path}", lacking=lacking, path=self.resource.path)
        return self._at != 0

    def untilProbe(self) -> float | None:
        """Seconds until the best one should be asked for again; ``None`` while it is the one that is read."""
        if self._at == 0:
            return None
        return max(0.0, self._probedAt + PROBE_EVERY - self._clock.seconds())

    async def probe(self, client: ApiClient) -> bool:
        """
        Ask for the best one while another is read instead.

        :return: whether it is there: then it is what to read from now on.
        """
        self._probedAt = self._clock.seconds()
        try:
            await client.list(self.best, "0", 1)
        except KproxyError as error:
            self.log.debug("Still no {path}: {error}", path=self.best.path, error=str(error))
            return False
        self.log.info("The server has {path} now", path=self.best.path)
        self._at = 0
        self._working = False
        self._missing = 0
        return True
