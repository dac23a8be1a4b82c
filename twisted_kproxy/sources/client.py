"""
Lists and watches of an API server over treq. Everything that can go wrong leaves here as one of
:mod:`~twisted_kproxy.sources.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlencode

from hyperlink import URL
from msgspec import Struct
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.iweb import IAgent, IBodyProducer, IResponse

from .. import __version__
from ..core.values import Kind
from ..interfaces import KproxyError, NotAvailable
from . import errors
from .authentication import Credentials
from .body import Body, Bytes, Unwanted
from .compression import Inflater, Undecoded, inflaterFor
from .credentials import ApiAccess
from .stream import Listing, ListingReader

#: Seconds that a list is decoded for before others get their turn.
TURN = 0.01
_ERROR_LIMIT = 64 * 1024
_ANSWER_LIMIT = 1024 * 1024


class Limits(Struct, frozen=True):
    """
    How long to wait for a server that says nothing. HTTP/1.1 has no ping: only such limits find a dead link. All are
    seconds of the monotonic clock.

    :ivar headers: until the headers of an answer must be there, connecting included.
    :ivar idle: without a byte, within the body of a list.
    :ivar total: for the whole body of a list: one that trickles would never end.
    :ivar error: for the whole body of an error.
    :ivar size: bytes of the body of a list, once inflated.
    :ivar silence: without an event, on a watch that gets bookmarks (about one a minute); at least twice the longest
        time between two of them.
    :ivar grace: beyond the time that a watch was asked to last.
    :ivar initial: without an event, while the initial state of a streaming list is awaited.
    :ivar initialTotal: for the whole of that.
    """

    headers: float = 30.0
    idle: float = 60.0
    total: float = 300.0
    error: float = 30.0
    size: int = 256 * 1024 * 1024
    silence: float = 150.0
    grace: float = 30.0
    initial: float = 30.0
    initialTotal: float = 300.0


LIMITS = Limits()


class Resource(Struct, frozen=True):
    """
    What is listed and watched.

    :ivar path: of the collection, below the server's URL.
    :ivar instead: what to read of a server that does not have this, the best first.
    :ivar optional: whether a server may well lack it, or keep it from us, and nothing is wrong by that.
    """

    kind: Kind
    path: str
    labelSelector: str = ""
    fieldSelector: str = ""
    instead: tuple[Resource, ...] = ()
    optional: bool = False


class Watch:
    """A watch that the server has begun to answer."""

    def __init__(self, clock: IReactorTime, response: IResponse, inflater: Inflater | None) -> None:
        self._clock = clock
        self._response = response
        self._inflater = inflater
        self._body: Body | None = None

    def deliver(self, received: Callable[[bytes], None]) -> Deferred[None]:
        """
        To be called at once.

        :return: fires at the regular end of the stream; fails with :class:`~.errors.ConnectionLost`, with what
            ``received`` raises, or with what :meth:`abort` was given.
        """
        self._body = Body(self._clock, received, inflater=self._inflater)
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
        self,
        clock: IReactorTime,
        access: ApiAccess,
        agent: IAgent,
        limits: Limits = LIMITS,
        credentials: Credentials | None = None,
    ) -> None:
        self._clock = clock
        self._access = access
        self._credentials = credentials or Credentials(clock, access)
        cookies = IndexableCookieJar(policy=DefaultCookiePolicy(allowed_domains=()))
        self._http = HTTPClient(Undecoded(agent), cookiejar=cookies)
        self.limits = limits

    async def list(
        self,
        resource: Resource,
        resourceVersion: str = "",
        limit: int = 0,
        next: str = "",
        known: Mapping[str, Any] | None = None,
    ) -> Listing:
        """
        List a collection, or one page of it. Reading a long one gives others their turn in between.

        :param resourceVersion: ``"0"`` for whatever the server has at hand, ``""`` for the newest, else not older.
        :param limit: items of one page; ``0`` for all.
        :param next: the token of a page before; no resource version may go with it.
        :param known: objects by key: one that is equal comes back as the very same.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`.
        """
        query = {}
        if next:
            query["continue"] = next
        elif resourceVersion:
            query["resourceVersion"] = resourceVersion
        if limit:
            query["limit"] = str(limit)
        response = await self._get(resource, query, "gzip")
        limits = self.limits
        body = await self._content(response, limits.size, limits.idle, limits.total)
        reader = ListingReader(resource.kind, body, known)
        del body
        turn = self._clock.seconds() + TURN
        while reader.read():
            if self._clock.seconds() >= turn:
                await deferLater(self._clock, 0)
                turn = self._clock.seconds() + TURN
        return reader.listing

    async def watch(
        self, resource: Resource, resourceVersion: str, timeoutSeconds: int, initialEvents: bool = False
    ) -> Watch:
        """
        Ask for everything that changes after a resource version.

        :param timeoutSeconds: after which the server ends it.
        :param initialEvents: what is there comes first, as if it were new, up to a bookmark that is marked (KEP-3157).
            The resource version then says how old that may be at most; ``""`` for not at all.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resourceVersion,
            "timeoutSeconds": str(timeoutSeconds),
        }
        if initialEvents:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
            if not resourceVersion:
                del query["resourceVersion"]
        # Compressed, an event might wait in a buffer for the next one.
        response = await self._get(resource, query, "identity")
        return Watch(self._clock, response, self._inflater(response))

    async def send(self, method: str, path: str, body: bytes, contentType: str = "application/json") -> None:
        """
        Write something. What the answer says beside "done" is not wanted.

        :param path: below the server's URL.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`.
        """
        url = f"{self._access.server}{path}"
        headers: dict[bytes | str, bytes | str] = {
            "Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": contentType,
        }
        response = await self._ask(method, url, headers, Bytes(body))
        await self._gather(lambda data: None, response, _ANSWER_LIMIT, self.limits.error, self.limits.error)

    async def _get(self, resource: Resource, query: Mapping[str, str], encoding: str) -> IResponse:
        """An answer that says 200 and is JSON, its body still to come."""
        asked = dict(query)
        if resource.labelSelector:
            asked["labelSelector"] = resource.labelSelector
        if resource.fieldSelector:
            asked["fieldSelector"] = resource.fieldSelector
        url = f"{self._access.server}{resource.path}"
        if asked:
            url += "?" + urlencode(asked)
        response = await self._ask("GET", url, {"Accept": "application/json", "Accept-Encoding": encoding})
        type = _header(response, b"content-type")
        if type.partition(";")[0].strip().lower() == "application/json":
            return response
        await self._refusal(response)
        raise errors.Unusable(f"the answer is {type or 'of no type'}, not application/json: is this an API server?")

    async def _ask(
        self, method: str, url: str, headers: dict[bytes | str, bytes | str], body: IBodyProducer | None = None
    ) -> IResponse:
        """An answer that says 200 (or 201, to what has a body), its own body still to come."""
        headers["User-Agent"] = f"kproxy/{__version__}"
        identity = await self._credentials.current()
        if identity.token:
            headers["Authorization"] = f"Bearer {identity.token}"
        try:
            # reactor: treq would import the global one otherwise.
            sent = self._http.request(
                method, _URL.from_text(url), headers=headers, data=body, allow_redirects=False, unbuffered=True,
                reactor=self._clock,  # type: ignore[arg-type]
            )
        except (ValueError, UnicodeError) as error:
            raise NotAvailable(f"{self._access.server} cannot be asked: {error}")
        try:
            response = await self._headers(sent)
        except (KproxyError, CancelledError):
            raise
        except Exception as error:
            raise errors.translated(error) from None
        if response.code == 200 or (response.code == 201 and body is not None):
            return response
        refusal = await self._refusal(response)
        if isinstance(refusal, errors.Unauthorized):
            self._credentials.refused(identity)
        raise refusal

    def _headers(self, sent: Deferred[Any]) -> Deferred[IResponse]:
        """
        What was sent, within :attr:`Limits.headers`. Cancelling tells at once, and closes what is there to close:
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
            answer.errback(errors.TimedOut(f"no answer within {self.limits.headers:g} s"))

        def arrived(response: IResponse) -> None:
            if waiting:
                leave()
                answer.callback(response)
            else:
                response.deliverBody(Unwanted())  # type: ignore[no-untyped-call]

        def failed(reason: Failure) -> None:
            if waiting:
                leave()
                answer.errback(reason)

        answer: Deferred[IResponse] = Deferred(cancelled)
        timer = self._clock.callLater(self.limits.headers, late)
        sent.addCallbacks(arrived, failed)
        return answer

    async def _content(self, response: IResponse, limit: int, idle: float, total: float) -> bytes:
        parts: list[bytes] = []
        await self._gather(parts.append, response, limit, idle, total)
        return b"".join(parts)

    def _gather(
        self, received: Callable[[bytes], None], response: IResponse, limit: int, idle: float, total: float
    ) -> Deferred[None]:
        body = Body(self._clock, received, idle, limit, total, self._inflater(response))
        done = body.done
        assert done is not None
        response.deliverBody(body)  # type: ignore[no-untyped-call]
        return done

    @staticmethod
    def _inflater(response: IResponse) -> Inflater | None:
        try:
            return inflaterFor(response)
        except errors.Unusable:
            response.deliverBody(Unwanted())  # type: ignore[no-untyped-call]
            raise

    async def _refusal(self, response: IResponse) -> errors.Denied:
        """The error that an answer with another code than 200 is."""
        where = _header(response, b"location")
        parts: list[bytes] = []
        try:
            await self._gather(parts.append, response, _ERROR_LIMIT, self.limits.error, self.limits.error)
        except KproxyError:
            # What came is still the best there is to tell: a TLS port answers plain HTTP with a line that ends with
            # its connection.
            pass
        body = b"".join(parts)
        if 300 <= response.code < 400:
            # The credentials are for this server alone.
            where = errors.short(where.encode())
            return errors.Denied(response.code, "", f"it points to {where}, which is not followed")
        return errors.denied(
            response.code, _header(response, b"content-type"), body, _seconds(_header(response, b"retry-after"))
        )


def _header(response: IResponse, name: bytes) -> str:
    values: list[bytes] = response.headers.getRawHeaders(name) or [b""]
    return values[0].decode("latin-1")


def _seconds(value: str) -> float | None:
    # The other form, a date, is not used by API servers.
    return float(value) if value.isascii() and value.isdigit() else None

