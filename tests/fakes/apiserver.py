"""
A fake Kubernetes API server: real LIST and WATCH semantics and wire format, with faults to order.

Three ways to use it:

- in memory: ``FakeApi(clock)``, with ``StubTreq(api.resource)`` or ``RequestTraversalAgent(api.resource)``;
- on a socket of this process: ``api.listen("127.0.0.1")``, then ``api.url``; at the end ``yield api.close()``;
- as a program: ``python -m tests.fakes.apiserver --listen 192.0.2.4:6443 [--tls DIR] [--token T] [--objects FILE …]``
  prints ``listening on URL`` when it is ready and ends at SIGTERM. Script it through :mod:`tests.fakes.apicontrol`,
  from Python with :class:`tests.fakes.daemon.ApiProcess`.

The program is a server for kubectl: what is created and changed through its API gets defaults, addresses and ports,
is checked, and has to be in a namespace that exists (:mod:`tests.fakes.apidefaults`). What tests put there through
``/fake/objects`` or ``--objects`` is taken as it is. In a test, ``FakeApi(clock)`` takes everything as it is, and
``FakeApi(clock, admission=True)`` does as the program.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.task import Clock
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.web.server import Site

from .apicontrol import tokensOf
from .apidefaults import Admission
from .apievents import mirrorEvents
from .apifaults import Faults
from .apikinds import Json
from .apiopenapi import OpenApi
from .apirequest import Logged
from .apiresources import ApiRoot
from .apistore import Event, Store
from .apiwatch import Watch

VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.2",
    "gitCommit": "98b35193b2ac7a23a673325f5e9b830ecd5ba406",
    "gitTreeState": "clean",
    "buildDate": "2026-01-01T00:00:00Z",
    "goVersion": "go1.26.4",
    "compiler": "gc",
    "platform": "linux/amd64",
}


class FakeApi:
    """
    :param reactor: where timers run; may be a :class:`twisted.internet.task.Clock` as long as nothing listens.
    :param store: what it serves; an empty one of its own by default.
    :param tokens: bearer tokens that count, and whose they are; a list will do. ``None``: everybody is welcome.
        May be set at any time.
    :param certificatesOnly: who brings neither a token nor a client certificate is anonymous even where no tokens
        are set.
    :param bookmarkSeconds: how often a watch that wants bookmarks gets one.
    :param watchSeconds: when a watch ends that names no ``timeoutSeconds``.
    :param watchList: what becomes of ``sendInitialEvents``: ``on``, ``off`` (422) or ``ignored``.
    :param watchCache: without one, a LIST with ``resourceVersion=0`` heeds ``limit``.
    :param prefix: the path below which the API lives, such as ``/k8s/clusters/c1``.
    :param version: what ``/version`` says.
    :param seconds: the monotonic clock for the request log.
    :param admission: what fills in and checks objects that come through the API; ``True`` for the usual one, ``None``
        to take them as they are.
    :param modern: whether there is aggregated discovery and OpenAPI 3.
    :ivar resource: the root resource.
    :ivar faults: what is to go wrong: ``api.faults.add(resource="services", verb="list", status=500)``.
    :ivar requests: every request, as it came.
    :ivar watches: those that are open.
    :ivar forbidden: pairs of resource and verb, each may be ``*``, that are answered 403.
    """

    def __init__(
        self,
        reactor: Any,
        store: Store | None = None,
        *,
        tokens: dict[str, str] | Iterable[str] | None = None,
        certificatesOnly: bool = False,
        bookmarkSeconds: float = 60.0,
        watchSeconds: float = 1800.0,
        watchList: str = "on",
        watchCache: bool = True,
        prefix: str = "",
        version: Json = VERSION,
        seconds: Callable[[], float] | None = None,
        admission: Admission | bool | None = None,
        modern: bool = True,
    ) -> None:
        self.reactor = reactor
        self.store = Store() if store is None else store
        self.admission = Admission(self.store) if admission is True else admission or None
        if self.admission is not None:
            self.admission.begin()
        self.modern = modern
        self.openApi = OpenApi(self.store.kinds, version["gitVersion"])
        # What each field manager applied last: of kind, namespace, name and manager, the object's uid and the fields.
        self.applied: dict[tuple[str, ...], tuple[str, Json]] = {}
        self.tokens = tokensOf(tokens)
        self.certificatesOnly = certificatesOnly
        self.bookmarkSeconds = bookmarkSeconds
        self.watchSeconds = watchSeconds
        self.watchList = watchList
        self.watchCache = watchCache
        self.prefix = prefix.rstrip("/")
        self.version = version
        self.seconds = seconds or (reactor.seconds if isinstance(reactor, Clock) else time.monotonic)
        self.forbidden: set[tuple[str, str]] = set()
        self.faults = Faults()
        self.requests: list[Logged] = []
        self.watches: list[Watch] = []
        self.resource = ApiRoot(self)
        self.accepted = 0
        self._factory: Any = None
        self._context: Any = None
        self._port: Any = None
        self._held: socket.socket | None = None
        self._address = ("", 0)
        self._within: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.store.subscribe(self._changed)
        if self.admission is not None:
            mirrorEvents(self.store)

    # --- what tests do to it; each is also a word of the control endpoint ---

    def closeWatches(self, abort: bool = False, midEvent: bool = False, resource: str = "*") -> int:
        """
        End the open watches: in order, or by cutting the connection (``abort``), or in the middle of an event.

        :return: how many that were.
        """
        closing = [watch for watch in self.watches if resource in ("*", watch.kind.plural)]
        for watch in closing:
            if abort or midEvent:
                watch.cut(abort, midEvent)
            else:
                watch.end()
        return len(closing)

    def bookmarkNow(self, resource: str = "*") -> None:
        """Send a bookmark on every open watch that wants them."""
        for watch in list(self.watches):
            if resource in ("*", watch.kind.plural):
                watch.bookmark()

    def sendRaw(self, data: bytes, resource: str = "*") -> None:
        """Put bytes into every open watch as they are."""
        for watch in list(self.watches):
            if resource in ("*", watch.kind.plural):
                watch.raw(data)

    def compact(self) -> int:
        """Forget the history; see :meth:`Store.compact`."""
        return self.store.compact()

    def rewind(self, resourceVersion: int) -> None:
        """Go back in time; see :meth:`Store.rewind`. Open watches stay, and hear nothing of it."""
        self.store.rewind(resourceVersion)

    def state(self) -> Json:
        """A few facts."""
        return {
            "resourceVersion": self.store.resourceVersion,
            "oldest": self.store.oldest,
            "watches": len(self.watches),
            "connections": self.connections,
            "accepted": self.accepted,
            "objects": {kind.plural: len(self.store.objects(kind)) for kind in self.store.kinds},
        }

    def asked(self, resource: str = "*", verb: str = "*") -> list[Logged]:
        """Those of the requests."""
        return [it for it in self.requests if resource in ("*", it.resource) and verb in ("*", it.verb)]

    # --- sockets ---

    @property
    def url(self) -> str:
        """Where it listens; no slash at the end."""
        host, port = self._address
        scheme = "https" if self._context else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self.prefix}"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._factory.protocols) if self._factory else 0

    def listen(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Any = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> int:
        """
        :param tls: a context factory, such as :meth:`tests.fakes.certificates.Authority.serverContext` gives.
        :param within: inside of what it makes its sockets: ``lambda: rig.open("api")`` to listen in a namespace.
        :return: the port.
        """
        self._context = tls
        self._within = within
        self._factory = _Factory(self)
        self._address = (host, port)
        self.resume()
        return self._address[1]

    def pause(self) -> Deferred[None]:
        """
        Stop listening and cut every connection; connections are refused until :meth:`resume`. Twice is harmless.

        :return: fires when the port is closed, a moment later.
        """
        port, self._port = self._port, None
        if port is None:
            return succeed(None)

        def hold(_: object) -> None:
            # Keeps the port from others meanwhile: bound, but not listening.
            with self._within():
                self._held = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held.bind(self._address)

        self._cutAll()
        return maybeDeferred(port.stopListening).addCallback(hold)

    def resume(self) -> None:
        """Listen (again), on the same port. After :meth:`pause`, once that has fired."""
        if self._port is not None:
            return
        if self._held is not None:
            self._held.close()
            self._held = None
        host, port = self._address
        with self._within():
            if self._context is None:
                self._port = self.reactor.listenTCP(port, self._factory, backlog=1024, interface=host)
            else:
                self._port = self.reactor.listenSSL(port, self._factory, self._context, backlog=1024, interface=host)
        self._address = (host, self._port.getHost().port)

    def close(self) -> Deferred[None]:
        """Stop for good. Fires when the port is closed and every connection gone."""
        if self._held is not None:
            self._held.close()
            self._held = None
        port, self._port = self._port, None
        done = maybeDeferred(port.stopListening) if port is not None else maybeDeferred(lambda: None)
        self._cutAll()

        def gone(_: object) -> Any:
            if self.connections:
                self._factory.whenEmpty = Deferred()
                return self._factory.whenEmpty
            return None

        return done.addCallback(gone)

    def _cutAll(self) -> None:
        if self._factory is not None:
            for connection in list(self._factory.protocols):
                connection.transport.abortConnection()
        for watch in list(self.watches):
            watch.forget()

    def _changed(self, event: Event) -> None:
        for watch in list(self.watches):
            watch.deliver(event)


class QuietSite(Site):
    """Keeps no access log: tests read :attr:`FakeApi.requests`."""

    noisy = False

    def log(self, request: Any) -> None:
        pass


class _Connection(ProtocolWrapper):
    def makeConnection(self, transport: Any) -> None:
        self.factory.api.accepted += 1
        super().makeConnection(transport)  # type: ignore[no-untyped-call]


class _Factory(WrappingFactory):
    """Knows its open connections."""

    protocol = _Connection
    noisy = False

    def __init__(self, api: FakeApi) -> None:
        super().__init__(QuietSite(api.resource, reactor=api.reactor))  # type: ignore[no-untyped-call]
        self.api = api
        self.whenEmpty: Deferred[None] | None = None

    def unregisterProtocol(self, protocol: Any) -> None:
        super().unregisterProtocol(protocol)  # type: ignore[no-untyped-call]
        if not self.protocols and self.whenEmpty is not None:
            self.whenEmpty.callback(None)
            self.whenEmpty = None


if __name__ == "__main__":
    from .apiprogram import main

    main(sys.argv[1:])
