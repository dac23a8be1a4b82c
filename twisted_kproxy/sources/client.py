"""
Lists and watches of an API server over treq. Everything that can go wrong leaves here as one of
:mod:`~twisted_kproxy.sources.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Protocol
from urllib.parse import urlencode

from hyperlink import URL
from msgspec import Struct
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol as BaseProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.iweb import IAgent, IResponse

from .. import __version__
from ..core.values import Kind
from ..interfaces import KproxyError, NotAvailable
from . import errors
from .authentication import Credentials
from .credentials import ApiAccess
from .stream import Listing, decodeListing

#: Seconds until the headers of an answer must be there, connecting included.
HEADERS_TIMEOUT = 30.0
#: Seconds without a byte after which a body that should flow is given up.
IDLE_TIMEOUT = 60.0
#: Bytes of a list, once inflated.
BODY_LIMIT = 256 * 1024 * 1024
_ERROR_LIMIT = 64 * 1024


class Resource(Struct, frozen=True):
    """
    What is listed and watched.

    :ivar path: of the collection, below the server's URL.
    """

    kind: Kind
    path: str
    labelSelector: str = ""
    fieldSelector: str = ""


class _Transport(Protocol):
    def loseConnection(self) -> None: ...


class Body(BaseProtocol):
    """
    Takes the body of an answer as it comes. :attr:`done` fires with ``None`` at its regular end and fails with one of
    :mod:`~twisted_kproxy.sources.errors`, or with whatever ``received`` raises; cancelling it, as every other end,
    cuts the connection at once.

    :param received: called with each piece.
    :param idle: seconds without a byte after which it is given up.
    :param limit: of the whole, in bytes.
    """

    def __init__(
        self,
        clock: IReactorTime,
        received: Callable[[bytes], None],
        idle: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.done: Deferred[None] | None = Deferred(lambda _: self._forget())
        self._received = received
        self._idle = idle
        self._limit = limit
        self._size = 0
        self._timer: IDelayedCall | None = None
        if idle is not None:
            self._timer = clock.callLater(idle, self._silent)

    def dataReceived(self, data: bytes) -> None:
        if self.done is None:
            return
        if self._timer is not None and self._idle is not None:
            self._timer.reset(self._idle)
        self._size += len(data)
        if self._limit is not None and self._size > self._limit:
            self.abort(errors.Unusable(f"the answer is longer than {self._limit} bytes"))
            return
        try:
            self._received(data)
        except Exception as error:
            self.abort(error)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        done = self._take()
        if done is None:
            return
        if isinstance(reason.value, ResponseDone):
            done.callback(None)
        else:
            # PotentialDataLoss too: an answer without length or chunks ends with its connection, complete or not.
            done.errback(errors.ConnectionLost(f"the answer broke off: {errors.why(reason.value)}"))

    def abort(self, error: Exception) -> None:
        """Cut it; :attr:`done` fails with that error."""
        done = self._take()
        if done is not None:
            cut(self.transport)
            done.errback(error)

    def _forget(self) -> None:
        # Forget the Deferred first: closing the transport may report back at once.
        self._take()
        cut(self.transport)

    def _take(self) -> Deferred[None] | None:
        done, self.done = self.done, None
        if self._timer is not None:
            timer, self._timer = self._timer, None
            if timer.active():
                timer.cancel()
        return done

    def _silent(self) -> None:
        self.abort(errors.TimedOut(f"no byte of the answer for {self._idle:g} s"))


def cut(transport: Any) -> None:
    """Cut a connection without waiting for the peer: over a dead link TLS would never finish its good-bye."""
    if transport is not None:
        abort = getattr(transport, "abortConnection", None) or transport.loseConnection
        abort()


class Watch:
    """A watch that the server has begun to answer."""

    def __init__(self, clock: IReactorTime, response: IResponse) -> None:
        self._clock = clock
        self._response = response
        self._body: Body | None = None

    def deliver(self, received: Callable[[bytes], None]) -> Deferred[None]:
        """
        To be called at once.

        :return: fires at the regular end of the stream; fails with :class:`~.errors.ConnectionLost`, with what
            ``received`` raises, or with what :meth:`abort` was given.
        """
        self._body = Body(self._clock, received)
        done = self._body.done
        assert done is not None
        self._response.deliverBody(self._body)  # type: ignore[no-untyped-call]
        return done

    def abort(self, error: KproxyError) -> None:
        """Cut it; what :meth:`deliver` returned fails with that error."""
        if self._body is not None:
            self._body.abort(error)


class _URL(URL):
    """A URL that is ASCII already. Hyperlink would take an IPv6 address for a name to be encoded, and fail."""

    def to_uri(self) -> URL:
        return self


class ApiClient:
    """
    Talks to one API server.

    :param agent: how requests are sent.
    :param credentials: who we are; by default what the access alone says.
    """

    def __init__(
        self, clock: IReactorTime, access: ApiAccess, agent: IAgent, credentials: Credentials | None = None
    ) -> None:
        self._clock = clock
        self._access = access
        self._credentials = credentials or Credentials(clock, access)
        cookies = IndexableCookieJar(policy=DefaultCookiePolicy(allowed_domains=()))
        self._http = HTTPClient(agent, cookiejar=cookies)

    async def list(self, resource: Resource, resourceVersion: str = "", limit: int = 0, next: str = "") -> Listing:
        """
        List a collection, or one page of it.

        :param resourceVersion: ``"0"`` for whatever the server has at hand, ``""`` for the newest, else not older.
        :param limit: items of one page; ``0`` for all.
        :param next: the token of a page before; no resource version may go with it.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`.
        """
        query = {}
        if next:
            query["continue"] = next
        elif resourceVersion:
            query["resourceVersion"] = resourceVersion
        if limit:
            query["limit"] = str(limit)
        response = await self._get(resource, query)
        return decodeListing(resource.kind, await self._content(response, BODY_LIMIT))

    async def watch(self, resource: Resource, resourceVersion: str, timeoutSeconds: int) -> Watch:
        """
        Ask for everything that changes after a resource version.

        :param timeoutSeconds: after which the server ends it.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resourceVersion,
            "timeoutSeconds": str(timeoutSeconds),
        }
        return Watch(self._clock, await self._get(resource, query))

    async def _get(self, resource: Resource, query: Mapping[str, str]) -> IResponse:
        """An answer that says 200 and is JSON, its body still to come."""
        asked = dict(query)
        if resource.labelSelector:
            asked["labelSelector"] = resource.labelSelector
        if resource.fieldSelector:
            asked["fieldSelector"] = resource.fieldSelector
        url = f"{self._access.server}{resource.path}"
        if asked:
            url += "?" + urlencode(asked)
        headers = {"Accept": "application/json", "User-Agent": f"kproxy/{__version__}"}
        identity = await self._credentials.current()
        if identity.token:
            headers["Authorization"] = f"Bearer {identity.token}"
        try:
            # reactor: treq would import the global one otherwise.
            sent = self._http.get(
                _URL.from_text(url), headers=headers, allow_redirects=False, unbuffered=True, reactor=self._clock  # type: ignore[arg-type]
            )
        except (ValueError, UnicodeError) as error:
            raise NotAvailable(f"{self._access.server} cannot be asked: {error}")
        try:
            response = await self._headers(sent)
        except (KproxyError, CancelledError):
            raise
        except Exception as error:
            raise errors.translated(error) from None
        if response.code == 200:
            type = _header(response, b"content-type")
            if type.partition(";")[0].strip().lower() == "application/json":
                return response
            await self._refusal(response)
            raise errors.Unusable(f"the answer is {type or 'of no type'}, not application/json: is this an API server?")
        refusal = await self._refusal(response)
        if isinstance(refusal, errors.Unauthorized):
            self._credentials.refused(identity)
        raise refusal

    def _headers(self, sent: Deferred[Any]) -> Deferred[IResponse]:
        """
        What was sent, within :data:`HEADERS_TIMEOUT`. Cancelling tells at once, and closes what is there to close:
        what the agent itself says to being cancelled differs from state to state.
        """
        waiting = True

        def leave() -> None:
            nonlocal waiting
            waiting = False
            if timer.active():
                timer.cancel()

        def cancelled(_: Deferred[IResponse]) -> None:
            leave()
            sent.cancel()

        def late() -> None:
            leave()
            sent.cancel()
            answer.errback(errors.TimedOut(f"no answer within {HEADERS_TIMEOUT:g} s"))

        def arrived(response: IResponse) -> None:
            if waiting:
                leave()
                answer.callback(response)
            else:
                response.deliverBody(_Unwanted())  # type: ignore[no-untyped-call]

        def failed(reason: Failure) -> None:
            if waiting:
                leave()
                answer.errback(reason)

        answer: Deferred[IResponse] = Deferred(cancelled)
        timer = self._clock.callLater(HEADERS_TIMEOUT, late)
        sent.addCallbacks(arrived, failed)
        return answer

    async def _content(self, response: IResponse, limit: int) -> bytes:
        parts: list[bytes] = []
        body = Body(self._clock, parts.append, IDLE_TIMEOUT, limit)
        done = body.done
        assert done is not None
        response.deliverBody(body)  # type: ignore[no-untyped-call]
        await done
        return b"".join(parts)

    async def _refusal(self, response: IResponse) -> errors.Denied:
        """The error that an answer with another code than 200 is."""
        where = _header(response, b"location")
        try:
            body = await self._content(response, _ERROR_LIMIT)
        except KproxyError:
            body = b""
        if 300 <= response.code < 400:
            # The credentials are for this server alone.
            where = errors.short(where.encode())
            return errors.Denied(response.code, "", f"it points to {where}, which is not followed")
        return errors.denied(
            response.code, _header(response, b"content-type"), body, _seconds(_header(response, b"retry-after"))
        )


class _Unwanted(BaseProtocol):
    """Takes a body that nobody waits for any more."""

    def connectionMade(self) -> None:
        cut(self.transport)


def _header(response: IResponse, name: bytes) -> str:
    values: list[bytes] = response.headers.getRawHeaders(name) or [b""]
    return values[0].decode("latin-1")


def _seconds(value: str) -> float | None:
    # The other form, a date, is not used by API servers.
    return float(value) if value.isascii() and value.isdigit() else None

