"""
What may go wrong between this node and the API server, as few kinds of errors as a reflector has answers to.

:mod:`~twisted_kproxy.sources.client` and :mod:`~twisted_kproxy.sources.stream` convert everything else into
these, with the functions below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from OpenSSL import SSL
from service_identity import CertificateError, VerificationError
from twisted.internet import error as neterror
from twisted.python.failure import Failure
from twisted.web.client import RequestGenerationFailed, RequestTransmissionFailed, ResponseFailed
from twisted.web.http import PotentialDataLoss

from ..core import wire
from ..interfaces import ApiError, KproxyError

_TEXT_LIMIT = 200


class Denied(ApiError):
    """
    The API server answered, and the answer is an error.

    :ivar retryAfter: seconds that the server asked to wait, ``None`` where it did not say.
    """

    def __init__(self, code: int, reason: str, message: str, retryAfter: float | None = None) -> None:
        super().__init__(code, reason, message)
        self.retryAfter = retryAfter

    @property
    def postponed(self) -> float | None:
        """Seconds after which the same request may be made again, where the server asks for just that."""
        return self.retryAfter if self.code == 429 or self.code >= 500 else None


class Expired(Denied):
    """410: the resource version is older than what the server remembers. A new list is needed."""


class TooLargeResourceVersion(Denied):
    """
    504 with that cause: this API server has not seen the resource version yet that another one gave out. It has
    waited for it already, and asks to be asked again; but it may never come.
    """

    @property
    def postponed(self) -> None:
        return None


class Unauthorized(Denied):
    """401: the credentials were not taken."""


class LinkError(KproxyError):
    """No answer, or not all of it: nothing is known about what the server thinks."""


class Refused(LinkError):
    """Nobody listens there now."""


class Unreachable(LinkError):
    """No connection: no such name, no route, or no answer to the attempt."""


class Unverified(LinkError):
    """TLS failed: the server could not prove who it is, or did not take our certificate."""


class ConnectionLost(LinkError):
    """The connection ended before the answer did."""


class TimedOut(LinkError):
    """The connection is up, but what had to come did not come in time."""


class NoCredentials(LinkError):
    """There is nothing to be known by at the moment, so nothing was asked."""


class Unusable(KproxyError):
    """An answer that cannot be understood as what was asked for."""


class WentBack(Unusable):
    """The server's resource version is an earlier one than before, as after restoring a backup."""


class NotStreamed(Unusable):
    """A streaming list whose end the server does not mark: it does not know such lists."""


class StreamError(Unusable):
    """
    A watch stream that cannot be read any further.

    :ivar events: what was read from the same bytes before.
    """

    def __init__(self, message: str, events: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.events = tuple(events)


class FrameTooLong(StreamError):
    """One event is longer than the limit."""


class BadFrame(StreamError):
    """A line of the stream is not a watch event."""


def denied(code: int, contentType: str, body: bytes, retryAfter: float | None = None) -> Denied:
    """
    The error that an answer is.

    :param retryAfter: the header's value.
    """
    status = wire.Status()
    message = ""
    # Whatever its type says: the Status of a request timeout comes as text/plain.
    if body.lstrip().startswith(b"{"):
        try:
            status = wire.decodeStatus(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            message = "the answer cannot be read"
    elif not contentType or contentType.startswith("text/plain"):
        message = short(body)
    details = status.details or wire.StatusDetails()
    if retryAfter is None and details.retryAfterSeconds:
        retryAfter = float(details.retryAfterSeconds)
    return fromStatus(status, code, message, retryAfter)


def fromStatus(
    status: wire.Status, code: int = 0, message: str = "", retryAfter: float | None = None
) -> Denied:
    """
    The error that a Status object stands for.

    :param code: of the HTTP answer; without one, or for 200, the Status' own counts.
    """
    if code in (0, 200):
        code = status.code or 500
    reason = status.reason or ""
    text = short((status.message or message or "no reason given").encode("utf-8", "replace"))
    causes = {cause.reason for cause in (status.details.causes if status.details else None) or ()}
    kind: type[Denied] = Denied
    if code == 410 or reason in ("Expired", "Gone"):
        kind = Expired
    elif "ResourceVersionTooLarge" in causes or (code == 504 and "Too large resource version" in text):
        kind = TooLargeResourceVersion
    elif code == 401:
        kind = Unauthorized
    return kind(code, reason, text, retryAfter)


def short(body: bytes) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(body[: 4 * _TEXT_LIMIT].decode("utf-8", "replace").split())
    text = "".join(it if it.isprintable() else "?" for it in text)
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]}…"


def translated(error: BaseException) -> KproxyError:
    """What the network or the HTTP client said, as one of ours."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, (SSL.Error, VerificationError, CertificateError)):
            return Unverified(f"TLS failed: {_named(cause)}")
    for cause in causes:
        if isinstance(cause, neterror.ConnectionRefusedError):
            return Refused("the connection was refused")
        if isinstance(cause, (neterror.ConnectError, neterror.DNSLookupError, OSError)):
            return Unreachable(f"no connection: {_named(cause)}")
    for cause in causes:
        if isinstance(cause, neterror.ConnectionAborted):
            return ConnectionLost("the connection was cut before there was an answer")
        if isinstance(cause, (neterror.ConnectionLost, neterror.ConnectionDone)):
            return ConnectionLost("the server closed the connection before it had answered")
    if isinstance(error, ResponseFailed):
        return Unusable(f"the answer is not HTTP that can be read: {_named(causes[-1])}")
    return Unreachable(f"the server cannot be asked: {_named(causes[-1])}")


def _causes(error: BaseException) -> list[BaseException]:
    """What lies at the bottom of an error of the HTTP client, which may have several causes."""
    if isinstance(error, (ResponseFailed, RequestTransmissionFailed, RequestGenerationFailed)):
        return [cause for inner in error.reasons for cause in _causes(inner.value)] or [error]
    return [error]


def why(error: BaseException | None) -> str:
    """An error of the network or the HTTP client in words."""
    if error is None:
        return "for no given reason"
    return ", ".join(dict.fromkeys(_named(cause) for cause in _causes(error)))


def brokenOff(reason: Failure) -> ConnectionLost:
    """The end of an answer that is not complete, or cannot be known to be."""
    causes = _causes(reason.value) if reason.value is not None else []
    if any(isinstance(cause, (SSL.Error, VerificationError)) for cause in causes) or not any(
        isinstance(cause, (neterror.ConnectionLost, neterror.ConnectionDone, PotentialDataLoss)) for cause in causes
    ):
        return ConnectionLost(f"the answer broke off: {why(reason.value)}")
    return ConnectionLost("the server closed the connection")


def _named(error: BaseException) -> str:
    """An error in words; OpenSSL's carry a list of tuples, service-identity's a list of objects."""
    if isinstance(error, SSL.Error):
        told = error.args[0] if error.args and isinstance(error.args[0], list) else []
        return "; ".join(dict.fromkeys(str(it[-1]) for it in told if it)) or type(error).__name__
    if isinstance(error, VerificationError):
        return "the server's certificate is for another name or address"
    return short(str(error).encode()) or type(error).__name__
