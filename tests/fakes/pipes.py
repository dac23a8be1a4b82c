"""
Connections in memory between the real agent and a fake API server, on a test's clock: they can be refused, cut, and
turned into black holes. Unlike with a stand-in for the agent, every connection can be counted.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.server import Site
from zope.interface import implementer

from tests.fakes.apiserver import FakeApi
from twisted_kproxy.sources.agent import ApiAgent
from twisted_kproxy.sources.credentials import ApiAccess


class _End(StringTransport):
    """One end of a connection."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self.pipe = pipe
        self.protocol: Any = None
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        if not self.closed and data:
            self.sent.append(data)

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        self.pipe.close(self, abort=False)

    def abortConnection(self) -> None:
        self.pipe.close(self, abort=True)

    def lost(self, reason: Exception) -> None:
        if not self.closed:
            self.closed = True
            self.protocol.connectionLost(Failure(reason))


class Pipe:
    """One connection."""

    def __init__(self, pipes: Pipes, client: Any, server: Any) -> None:
        self._pipes = pipes
        self.client, self.server = _End(self), _End(self)
        for end, protocol in ((self.server, server), (self.client, client)):
            end.protocol = protocol
            protocol.makeConnection(end)

    def flow(self) -> bool:
        """Carry over what was sent. Whether there was anything."""
        if self._pipes.dead(self):
            return False
        moved = False
        for one, other in ((self.client, self.server), (self.server, self.client)):
            if one.sent:
                data, one.sent = b"".join(one.sent), []
                moved = True
                if not other.closed:
                    other.protocol.dataReceived(data)
        return moved

    def close(self, end: _End, abort: bool) -> None:
        """One end closes; the other hears of it unless this is a black hole."""
        other = self.server if end is self.client else self.client
        if not abort and not self._pipes.dead(self):
            self.flow()
        end.lost(ConnectionDone())
        if not self._pipes.dead(self):
            other.lost(ConnectionLost() if abort else ConnectionDone())
        self._pipes.settle(self)

    def cut(self) -> None:
        """The network breaks it."""
        self.client.lost(ConnectionLost())
        self.server.lost(ConnectionLost())
        self._pipes.settle(self)


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes

    def connect(self, factory: Any) -> Deferred[Any]:
        return self._pipes.connect(factory)


class Pipes:
    """
    The network between.

    :ivar open: connections of which at least one end is open.
    :ivar refusing: nobody listens.
    :ivar attempts: when somebody tried to connect.
    """

    def __init__(self, clock: IReactorTime, api: FakeApi) -> None:
        self._clock = clock
        self._site = Site(api.resource, reactor=clock)  # type: ignore[no-untyped-call]
        self._site.noisy = False
        self._site.log = lambda request: None  # type: ignore[method-assign]
        # Dictionaries, for their order: what happens in a test must not hang on addresses in memory.
        self.open: dict[Pipe, None] = {}
        self._dead: dict[Pipe, None] = {}
        self._hole = False
        self.refusing = False
        self.attempts: list[float] = []

    def agent(self) -> ApiAgent:
        """An agent that sends its requests through here, each over a connection of its own."""
        access = ApiAccess("http://unused.example", "test")
        return ApiAgent(self._clock, access, lambda *_, **__: _Endpoint(self))

    def connect(self, factory: Any) -> Deferred[Any]:
        self.attempts.append(self._clock.seconds())
        if self.refusing:
            return fail(ConnectionRefusedError())
        if self._hole:
            return Deferred(lambda _: None)
        server = self._site.buildProtocol(None)  # type: ignore[no-untyped-call]
        client = factory.buildProtocol(None)
        made: Deferred[Any] = Deferred()
        self.open[Pipe(self, client, server)] = None
        made.callback(client)
        return made

    def dead(self, pipe: Pipe) -> bool:
        return pipe in self._dead

    def settle(self, pipe: Pipe) -> None:
        if pipe.client.closed and pipe.server.closed:
            self.open.pop(pipe, None)
            self._dead.pop(pipe, None)

    def blackHole(self, on: bool) -> None:
        """
        From now on nothing gets through, and nobody is told. When that is over, connections made before stay dead:
        whatever was between has forgotten them.
        """
        self._hole = on
        if on:
            self._dead |= self.open
        else:
            for pipe in list(self._dead):
                pipe.server.lost(ConnectionLost())
                self.settle(pipe)

    def cut(self) -> None:
        """Break every connection."""
        for pipe in list(self.open):
            pipe.cut()

    def flush(self) -> None:
        """Let bytes flow until there are no more."""
        while any([pipe.flow() for pipe in list(self.open)]):  # noqa: C419
            pass
