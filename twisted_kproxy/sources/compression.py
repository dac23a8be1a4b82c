"""
Bodies that come compressed: asked for where it pays (lists), understood wherever it comes, and never inflated without
a limit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from twisted.internet.defer import Deferred
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from .errors import ConnectionLost, Unusable

#: Bytes that are inflated at a time: whoever counts them can stop a bomb before it is large.
PIECE = 1024 * 1024
_KEPT = b"x-kproxy-content-encoding"


@implementer(IAgent)
class Undecoded:
    """
    An agent whose bodies arrive as they were sent. Treq would inflate them itself: without a limit, and without
    noticing that the end of the compressed data is missing. It asks for gzip in every request, too; here the
    ``Accept-Encoding`` of the request counts.
    """

    def __init__(self, agent: IAgent) -> None:
        self._agent = agent

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        headers = Headers() if headers is None else headers.copy()
        # Ours is first; what treq asks for comes after it.
        wanted = headers.getRawHeaders(b"accept-encoding") or [b"identity"]
        headers.setRawHeaders(b"accept-encoding", wanted[:1])
        sent: Deferred[IResponse] = self._agent.request(method, uri, headers, bodyProducer)
        return sent.addCallback(_hide)


def _hide(response: IResponse) -> IResponse:
    coding = response.headers.getRawHeaders(b"content-encoding") or []
    response.headers.removeHeader(b"content-encoding")
    response.headers.setRawHeaders(_KEPT, coding)
    return response


class Inflater:
    """Inflates gzip, piece by piece."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """
        What these bytes give, in pieces of at most :data:`PIECE`: who stops iterating stops the inflating.

        :raise Unusable: where this is not gzip, or its check sum is wrong.
        """
        full = False
        while data or full:
            if self._stream.eof:  # another member follows
                self._stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
            self._begun = True
            try:
                piece = self._stream.decompress(data, PIECE)
            except zlib.error as error:
                raise Unusable(f"the answer cannot be inflated: {error}")
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            # There may be more to come out although nothing is left to go in.
            full = len(piece) == PIECE and not self._stream.eof
            if piece:
                yield piece

    def finish(self) -> None:
        """
        The bytes have ended.

        :raise ConnectionLost: where the compressed data has not: what is missing may be the greater part.
        """
        if self._begun and not self._stream.eof:
            raise ConnectionLost("the compressed answer was cut short")


def inflaterFor(response: IResponse) -> Inflater | None:
    """
    What inflates the body of a response of an :class:`Undecoded` agent, ``None`` where it comes as it is.

    :raise Unusable: where it is coded in a way that was not asked for.
    """
    codings = [
        it.strip().lower()
        for value in response.headers.getRawHeaders(_KEPT) or ()
        for it in value.split(b",")
        if it.strip().lower() not in (b"", b"identity")
    ]
    if not codings:
        return None
    if codings in ([b"gzip"], [b"x-gzip"]):
        return Inflater()
    said = b", ".join(codings)[:60].decode("ascii", "replace")
    raise Unusable(f"the answer is coded as {said}, which was not asked for")
