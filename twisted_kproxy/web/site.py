"""
Small read-only web sites for operators and load balancers: bounded in time, size and number of connections.

Twisted's :class:`~twisted.web.server.Site` does the work; what is different here is said at each class.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IDelayedCall, IListeningPort, IReactorTCP
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

MAX_CONNECTIONS = 64
REQUEST_SECONDS = 30.0
RETRY_SECONDS = 5.0


class _NoBody(BytesIO):
    """Takes the body of a request, and forgets it."""

    def write(self, data: Any) -> int:
        return len(data)


class _Request(Request):
    """GET and HEAD only. Answers say neither what they come from nor, in failure, why: the log does."""

    log = Logger()

    def process(self) -> None:
        channel: Channel = self.channel  # type: ignore[assignment]
        self.site = channel.site
        if self.method in (b"GET", b"HEAD"):
            super().process()  # type: ignore[no-untyped-call]
            return
        self.responseHeaders.setRawHeaders("Allow", ["GET, HEAD"])
        self._refuse(405, b"only GET and HEAD\n")

    def write(self, data: bytes) -> None:
        if not self.startedWriting:
            self.responseHeaders.removeHeader(b"Server")
        super().write(data)  # type: ignore[no-untyped-call]

    def processingFailed(self, reason: Failure) -> Failure:
        self.log.failure("The page {path} could not be made", reason, path=self.path.decode("ascii", "replace"))
        self._refuse(500, b"this page could not be made; the log says why\n")
        return reason

    def _refuse(self, code: int, text: bytes) -> None:
        self.setResponseCode(code)
        self.responseHeaders.setRawHeaders("Content-Type", ["text/plain; charset=utf-8"])
        self.responseHeaders.setRawHeaders("Content-Length", [str(len(text))])
        self.write(b"" if self.method == b"HEAD" else text)
        self.finish()  # type: ignore[no-untyped-call]


class Channel(HTTPChannel):
    """
    One request per connection, and it has its time to arrive as a whole: a byte now and then does not prolong it.

    Who sends many at once and reads none of the answers would have them all made, and kept in memory.
    """

    maxHeaders = 64
    totalHeadersSize = 8192
    site: ReadOnlySite

    def checkPersistence(self, request: Any, version: bytes) -> bool:
        """The answer says ``Connection: close``, and whatever was sent behind the request is not read."""
        request.responseHeaders.setRawHeaders(b"connection", [b"close"])
        return False

    def resetTimeout(self) -> None:
        """Called for all that arrives; the time runs from the connection, or from the last answer."""

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.site.lost(self)
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


class ReadOnlySite(Site):
    """
    No access log, no sessions, request bodies are thrown away. Twisted's access log would take the reactor's clock for
    the time of day, and this reactor's clock is monotonic.

    With too many connections the oldest is cut: whoever holds many open does not keep a load balancer's probe out.

    :ivar maxConnections: how many there may be.
    """

    noisy = False
    protocol = Channel  # type: ignore[assignment]
    requestFactory = _Request
    displayTracebacks = False

    def __init__(self, reactor: Any, root: IResource, maxConnections: int, timeout: float) -> None:
        super().__init__(root, timeout=timeout, reactor=reactor)  # type: ignore[no-untyped-call]
        self.maxConnections = maxConnections
        self._channels: dict[Channel, None] = {}

    def startFactory(self) -> None:
        """Without the timer and the file of the access log."""

    def stopFactory(self) -> None:
        pass

    def log(self, request: Any) -> None:
        pass

    def getContentFile(self, length: int | None) -> BytesIO:
        """Where the body of a request goes."""
        return _NoBody()

    def buildProtocol(self, addr: IAddress | None) -> Any:
        while len(self._channels) >= self.maxConnections:
            self._cut(next(iter(self._channels)))
        channel = super().buildProtocol(addr)  # type: ignore[no-untyped-call]
        self._channels[channel] = None
        return channel

    def lost(self, channel: Channel) -> None:
        """That connection is gone."""
        self._channels.pop(channel, None)

    def closeAll(self) -> None:
        """Cut every connection."""
        for channel in list(self._channels):
            self._cut(channel)

    def _cut(self, channel: Channel) -> None:
        del self._channels[channel]
        transport: Any = channel.transport
        if transport is not None:
            transport.abortConnection()


def makeSite(
    reactor: Any, root: IResource, maxConnections: int = MAX_CONNECTIONS, timeout: float = REQUEST_SECONDS
) -> ReadOnlySite:
    """
    A site that serves these resources.

    :param timeout: seconds within which a request must have arrived, and for which a connection may be idle.
    """
    return ReadOnlySite(reactor, root, maxConnections, timeout)


class Listener(Service):
    """
    Binds a site for as long as the service runs. Where that cannot be done it tries again every five seconds, as
    kube-proxy does: a web page is no reason for the node to lose its services.

    :param host: an address of this node, without brackets.
    :param what: names it in the log, ``health`` or ``metrics``.
    :ivar port: where it listens; 0 while it does not.
    """

    log = Logger()

    def __init__(self, reactor: IReactorTCP, site: ReadOnlySite, host: str, port: int, what: str) -> None:
        self._reactor: Any = reactor
        self._site = site
        self._host = host
        self._wanted = port
        self._what = what
        self._listening: IListeningPort | None = None
        self._retry: IDelayedCall | None = None
        self._said = ""
        self.port = 0

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self._listen()

    def stopService(self) -> Deferred[None] | None:
        """Fires once nothing listens any more; open connections are cut."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        listening, self._listening, self.port = self._listening, None, 0
        self._site.closeAll()
        return listening.stopListening() if listening is not None else None

    def _listen(self) -> None:
        self._retry = None
        try:
            self._listening = self._reactor.listenTCP(
                self._wanted, self._site, backlog=MAX_CONNECTIONS, interface=self._host
            )
        except CannotListenError as error:
            reason = str(error.socketError)
            if reason != self._said:
                self._said = reason
                self.log.error(
                    "The {what} pages cannot be served on {host} port {port}: {reason}; trying again every {seconds} s",
                    what=self._what,
                    host=self._host,
                    port=self._wanted,
                    reason=reason,
                    seconds=RETRY_SECONDS,
                )
            self._retry = self._reactor.callLater(RETRY_SECONDS, self._listen)
            return
        self._said = ""
        self.port = getattr(self._listening.getHost(), "port", self._wanted)
        self.log.info(
            "The {what} pages are served on {host} port {port}", what=self._what, host=self._host, port=self.port
        )
