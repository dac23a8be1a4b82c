"""A reflector before a server that replays recordings over real sockets."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from tests.fakes.recordings import Recorded, comparable
from tests.fakes.replay import Answer, ReplayServer
from tests.shared.sources import Words
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.client import ApiClient, Resource
from twisted_kproxy.sources.credentials import ApiAccess
from twisted_kproxy.sources.reflector import Reflector
from twisted_kproxy.sources.stream import decodeListing

SERVICES = Resource("Service", "/api/v1/services")
SLICES = Resource("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices")


class Rig:
    """
    One client and its server; end it with :meth:`close`.

    :ivar words: what the reflector says.
    """

    def __init__(self, resource: Resource = SERVICES, streaming: bool = False) -> None:
        self.clock = Clock()
        self.server = ReplayServer(self.clock)
        self.words = Words()
        access = ApiAccess(self.server.url, "test")
        self.agent = ApiAgent(reactor, access, self.server.endpoint)
        self.client = ApiClient(self.clock, access, self.agent)
        self.resource = resource
        self.reflector = Reflector(
            self.clock, self.client, resource, "api", self.words.say, lambda: 0.0, streaming=streaming
        )

    def start(self, *answers: Answer | str | None) -> None:
        self.server.script(*answers)
        self.reflector.start()

    async def asked(self, count: int) -> list[str]:
        return await self.server.asked(count)

    async def run(self, request: Any) -> Any:
        """What a request of the client's gives, while time passes."""
        made: Deferred[Any] = Deferred.fromCoroutine(request)
        ended: list[Any] = []
        made.addBoth(ended.append)
        await self.server.until(lambda: ended)
        result = ended[0]
        if hasattr(result, "raiseException"):
            result.raiseException()
        return result

    @property
    def state(self) -> dict[str, Any]:
        """What was said, folded, in a form that can be compared."""
        return {key: comparable(it) for key, it in self.words.state.get(self.resource.kind, {}).items()}

    @property
    def status(self) -> dict[str, Any]:
        return self.reflector.status()

    @property
    def times(self) -> list[float]:
        """When each request was made."""
        return [round(it.at, 3) for it in self.server.requests]

    async def close(self) -> None:
        """Also holds after each test: no timer, no connection is left."""
        self.reflector.stop()
        await self.server.close()
        assert self.clock.getDelayedCalls() == [], self.clock.getDelayedCalls()
        assert self.agent.links == set()


def listed(*names: str) -> dict[str, Any]:
    """What recorded lists, or pages of one, say."""
    state = {}
    for name in names:
        recorded = Recorded(name)
        listing = decodeListing(recorded.resource.kind, recorded.body)
        assert not listing.rejected, listing.rejected
        state.update({key: comparable(it) for key, it in listing.objects.items()})
    return state


class ReplayCase(TestCase):
    """Makes rigs, and ends them."""

    timeout = 60

    def rig(self, resource: Resource = SERVICES, streaming: bool = False) -> Rig:
        rig = Rig(resource, streaming)
        self.addCleanup(lambda: Deferred.fromCoroutine(rig.close()))
        return rig
