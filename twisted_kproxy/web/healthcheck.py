"""
The ports on which load balancers ask whether this node has endpoints of a Service (``spec.healthCheckNodePort``, of
Services whose external traffic policy is Local). As kube-proxy answers them (kubernetes
``pkg/proxy/healthcheck/service_health.go``).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import msgspec
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred, succeed
from twisted.internet.interfaces import IAddress, IDelayedCall, IListeningPort
from twisted.internet.protocol import ServerFactory
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.server import Request
from zope.interface import implementer

from ..core.changes import Update
from ..core.values import EVERYWHERE, FAMILIES, Family, ServiceMap, ServicePortName
from ..interfaces import IEventRecorder, IUpdateListener
from .site import RETRY_SECONDS, Channel, ReadOnlySite
from .status import JSON, Page

#: All ports together may have so many connections, and one more for each of them: all are asked at once, or nearly so.
#: A probe takes milliseconds. Whoever holds connections open keeps nobody out: the oldest is cut for a new one.
MAX_CONNECTIONS = 64
#: A port holds a descriptor for itself, and one for that connection.
DESCRIPTORS = 2
REQUEST_SECONDS = 10.0
BACKLOG = 128
#: Seconds for which the reactor is kept from its other work at a time.
SLICE_SECONDS = 0.004

#: One Service in one family.
Group: TypeAlias = tuple[str, str, Family]
#: Where a load balancer asks.
Place: TypeAlias = tuple[Family, int]
#: Opens a listening socket on every address of a family; raises OSError.
Listen: TypeAlias = Callable[[Any, Family, int, ServerFactory], IListeningPort]


class Descriptors(Protocol):
    """Who keeps count of file descriptors for listening sockets."""

    def hold(self, n: int) -> bool:
        """Whether so many can be had."""

    def release(self, n: int) -> None:
        """They are free again."""


def listenOn(reactor: Any, family: Family, port: int, factory: ServerFactory) -> IListeningPort:
    """
    Listen on every address of one family, and of that one only.

    :raise OSError: where that cannot be.
    """
    kind = socket.AF_INET if family == "IPv4" else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "IPv6":
            it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        it.bind(("0.0.0.0" if family == "IPv4" else "::", port))
        it.listen(BACKLOG)
        it.setblocking(False)
        opened: IListeningPort = reactor.adoptStreamPort(it.fileno(), kind, factory)
        return opened


class Check:
    """
    What is asked about one Service in one family.

    :ivar local: how many distinct addresses of this node's endpoints are ready.
    """

    __slots__ = ("group", "local", "port", "uid")

    def __init__(self, group: Group, port: int) -> None:
        self.group = group
        self.port = port
        self.uid = ""
        self.local = 0

    @property
    def place(self) -> Place:
        return self.group[2], self.port

    @property
    def name(self) -> str:
        return f"{self.group[0]}/{self.group[1]}"


class Door(ServerFactory):
    """
    One port, for as long as some Service is asked about on it.

    :ivar check: whom it is asked about now.
    :ivar listening: ``None`` while the port could not be had.
    :ivar fault: why it could not.
    """

    noisy = False

    def __init__(self, site: ReadOnlySite, serves: Callable[[Family, str], bool], check: Check) -> None:
        self._site = site
        self._serves = serves
        self.check = check
        self.listening: IListeningPort | None = None
        self.fault = ""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        channel = self._site.buildProtocol(addr)
        channel.door = self
        return channel

    def serves(self, address: str) -> bool:
        """Whether it answers on that address of the node."""
        return self._serves(self.check.group[2], address.partition("%")[0])


class DoorChannel(Channel):
    """A connection to a :class:`Door`. It ends at once where node ports are not served at the dialled address."""

    door: Door

    def connectionMade(self) -> None:
        super().connectionMade()  # type: ignore[no-untyped-call]
        transport: Any = self.transport
        if not self.door.serves(transport.getHost().host):
            transport.abortConnection()


def _ignore(code: int) -> None:
    pass


@implementer(IUpdateListener)
class HealthChecks(Service):
    """
    Opens and closes health-check ports with their Services, and answers on them: 200 when an endpoint of this node is
    ready and the proxy is healthy, else 503. Any path, GET and HEAD.

    A port that cannot be had is tried again every five seconds. Whose a port is that several Services claim was decided
    before maps come here.

    :param healthy: whether the proxy itself is; the node's fate does not count.
    :param budget: counts the descriptors of listening sockets; ``None`` for nobody.
    :param answered: is told the HTTP status of each answer.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        nodeName: str,
        healthy: Callable[[], bool],
        events: IEventRecorder,
        *,
        budget: Descriptors | None = None,
        answered: Callable[[int], None] = _ignore,
        listen: Listen = listenOn,
    ) -> None:
        self._reactor = reactor
        self._nodeName = nodeName
        self._healthy = healthy
        self._events = events
        self._budget = budget
        self._answered = answered
        self._listen = listen
        page = Page(self._answer)
        page.isLeaf = True  # any path
        self._site = ReadOnlySite(reactor, page, MAX_CONNECTIONS, REQUEST_SECONDS)
        self._site.protocol = DoorChannel
        self._map = ServiceMap()
        self._names: dict[Group, set[ServicePortName]] = {}
        self._checks: dict[Group, Check] = {}
        self._doors: dict[Place, Door] = {}
        self._networks: dict[Family, tuple[Any, ...] | None] = dict.fromkeys(FAMILIES)  # None: everywhere
        self._retry: IDelayedCall | None = None
        self._stopping = self._closed = False
        self._pause = 0.0

    # --- IUpdateListener

    def onUpdate(self, update: Update) -> Deferred[None]:
        """See :class:`~twisted_kproxy.interfaces.IUpdateListener`. A port that cannot be had is no failure."""
        return Deferred.fromCoroutine(self._follow(update))

    async def _follow(self, update: Update) -> None:
        if self._closed:
            return
        if update.previous is not self._map:
            update = Update(self._map, update.current)
        self._map = update.current
        self._pause = self._reactor.seconds() + SLICE_SECONDS
        self._locate(update.current.locality.nodePorts)
        touched: dict[Group, None] = {}
        for name in (*update.removed, *update.changed):
            group = name.namespace, name.service, name.family
            if name in update.current:
                self._names.setdefault(group, set()).add(name)
            elif group in self._names:
                self._names[group].discard(name)
            touched[group] = None
            await self._breathe()
        moved = [check for group in touched if (check := self._look(group)) is not None]
        await self._open(moved)

    def stopping(self) -> None:
        """The daemon drains: every answer is 503 from now on, so that load balancers go elsewhere."""
        self._stopping = True

    def stopService(self) -> Deferred[Any]:
        """Close every port; fires once they are."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        closing = [self._close(place) for place in list(self._doors)]
        self._site.closeAll()
        return DeferredList(closing)

    def status(self) -> Mapping[str, Any]:
        """JSON-able: ``{namespace/name: {family: {port, localEndpoints, listening, error}}}``."""
        shown: dict[str, dict[str, Any]] = {}
        for check in self._checks.values():
            door = self._doors.get(check.place)
            about = {"port": check.port, "localEndpoints": check.local, "listening": False, "error": ""}
            if door is not None and door.check is check:
                about["listening"], about["error"] = door.listening is not None, door.fault
            shown.setdefault(check.name, {})[check.group[2]] = about
        return dict(sorted(shown.items()))

    def counts(self) -> Mapping[tuple[Family, bool], int]:
        """How many ports there are by family, and by whether they could be had."""
        found = {(family, had): 0 for family in FAMILIES for had in (True, False)}
        for (family, _port), door in self._doors.items():
            found[family, door.listening is not None] += 1
        return found

    # --- following the map

    def _locate(self, nodePorts: Iterable[str]) -> None:
        networks = [ipaddress.ip_network(it) for it in nodePorts]
        for family, version in (("IPv4", 4), ("IPv6", 6)):
            mine = tuple(it for it in networks if it.version == version)
            everywhere = any(str(it) in EVERYWHERE for it in mine)
            self._networks[family] = None if everywhere else mine  # type: ignore[index]

    def _serves(self, family: Family, address: str) -> bool:
        networks = self._networks[family]
        return networks is None or any(ipaddress.ip_address(address) in it for it in networks)

    def _look(self, group: Group) -> Check | None:
        """See what a Service is asked now; gives its check where that is at another port than before."""
        names = self._names.get(group, ())
        if not names:
            self._names.pop(group, None)
        ports = [self._map[name] for name in names]
        number = max((it.healthCheckPort for it in ports), default=0)
        check = self._checks.get(group)
        isNew = check is None or check.port != number
        if isNew:
            self._checks.pop(group, None)
            if not number:
                return None
            check = self._checks[group] = Check(group, number)
        assert check is not None
        check.uid = ports[0].uid
        check.local = len(frozenset().union(*(it.localReady for it in ports)))
        return check if isNew else None

    async def _open(self, moved: Iterable[Check]) -> None:
        """Give those their ports, and close all that nobody is asked about any more."""
        for check in moved:
            # A port that goes over to another Service stays open.
            door = self._doors.setdefault(check.place, Door(self._site, self._serves, check))
            door.check = check
        gone = [place for place, door in self._doors.items() if self._checks.get(door.check.group) is not door.check]
        # Closed before others are opened: one of those may want what another holds.
        for closing in [self._close(place) for place in gone]:
            await closing
        for check in moved:
            door = self._doors.get(check.place)  # type: ignore[assignment]
            if door is not None and door.listening is None and not self._closed:
                self._try(door)
                await self._breathe()

    def _close(self, place: Place) -> Deferred[Any]:
        door = self._doors.pop(place)
        listening, door.listening = door.listening, None
        if listening is None:
            return succeed(None)
        self._site.maxConnections -= 1
        if self._budget is not None:
            self._budget.release(DESCRIPTORS)
        return maybeDeferred(listening.stopListening)

    def _try(self, door: Door) -> None:
        family, port = door.check.place
        if self._budget is not None and not self._budget.hold(DESCRIPTORS):
            self._failed(door, "there are too few file descriptors; raise LimitNOFILE")
            return
        try:
            door.listening = self._listen(self._reactor, family, port, door)
        except OSError as error:
            if self._budget is not None:
                self._budget.release(DESCRIPTORS)
            self._failed(door, error.strerror or str(error))
            return
        self._site.maxConnections += 1
        if door.fault:
            self.log.info(
                "The health check of {service} is answered on {family} port {port} now",
                service=door.check.name, family=family, port=port,
            )
        door.fault = ""

    def _failed(self, door: Door, reason: str) -> None:
        check = door.check
        if self._retry is None:
            self._retry = self._reactor.callLater(RETRY_SECONDS, self._tryAgain)
        if door.fault == reason:
            return
        door.fault = reason
        self.log.error(
            "The health check of {service} cannot be answered on {family} port {port}: {reason}; load balancers will "
            "take this node for one without endpoints of it. It is tried again every {seconds:g} s",
            service=check.name, family=check.group[2], port=check.port, reason=reason, seconds=RETRY_SECONDS,
        )
        self._events.record(
            "Service", check.group[0], check.group[1], check.uid, "FailedToStartServiceHealthcheck", "Listen",
            f"node {self._nodeName} failed to start the health check on {check.group[2]} port {check.port}: {reason}",
            warning=True,
        )

    def _tryAgain(self) -> None:
        self._retry = None
        for door in list(self._doors.values()):
            if door.listening is None:
                self._try(door)

    async def _breathe(self) -> None:
        if self._reactor.seconds() >= self._pause:
            await deferLater(self._reactor, 0, lambda: None)
            self._pause = self._reactor.seconds() + SLICE_SECONDS

    # --- answering

    def _answer(self, request: Request) -> tuple[int, str, bytes]:
        channel: Any = request.channel
        check: Check = channel.door.check
        healthy = self._healthy() and not self._stopping
        code = 200 if check.local and healthy else 503
        request.responseHeaders.setRawHeaders("X-Load-Balancing-Endpoint-Weight", [str(check.local)])
        self._answered(code)
        body = {
            "service": {"namespace": check.group[0], "name": check.group[1]},
            "localEndpoints": check.local,
            "serviceProxyHealthy": healthy,
        }
        return code, JSON, msgspec.json.encode(body)
