"""
The pages of the health bind and of the metrics bind, and what healthy means.

What the pages say about time is the time of day, for whoever reads them; what is healthy is decided by the monotonic
clock alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import msgspec
from msgspec import Struct
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import Request

from ..core.question import USAGE, BadQuestion, Question, questionOf
from ..core.values import FAMILIES, Family
from ..core.wire import Node

#: The cluster autoscaler's mark of a node that is about to go (KEP-3836).
TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
#: parameters of a query that are looked at; more are none of a person
MOST_PARAMETERS = 16
_NEVER = "0001-01-01T00:00:00Z"  # how kube-proxy says it


def eligible(node: Node | None) -> bool:
    """Whether load balancers may send this node new connections: it is there and is to stay (KEP-3836)."""
    if node is None or node.metadata.deletionTimestamp:
        return False
    taints = (node.spec.taints if node.spec else None) or ()
    return not any(taint.key == TO_BE_DELETED_TAINT for taint in taints)


class FamilyHealth(Struct, frozen=True):
    """:ivar lastUpdated: seconds of the monotonic clock; ``None`` for never."""

    lastUpdated: float | None
    healthy: bool


class Health(Struct, frozen=True):
    """
    How the proxy is at one moment.

    :ivar at: that moment, of the monotonic clock.
    """

    at: float
    families: Mapping[Family, FamilyHealth]
    nodeEligible: bool = True

    @property
    def healthy(self) -> bool:
        """Whether every family is."""
        return all(it.healthy for it in self.families.values())

    @property
    def lastUpdated(self) -> float | None:
        """When one of the families was last brought up to date."""
        return max((it.lastUpdated for it in self.families.values() if it.lastUpdated is not None), default=None)


class _Waiting:
    """When the oldest change of a family came that waits for a sync, and that a running sync brings."""

    __slots__ = ("applied", "queued", "taken")

    def __init__(self) -> None:
        self.queued: float | None = None
        self.taken: float | None = None
        self.applied: float | None = None


class HealthState:
    """
    Keeps what :class:`Health` is computed from.

    A family is unhealthy while its oldest change that is not in force has waited for twice the sync period or longer;
    it is healthy with nothing waiting, so also while starting (kubernetes ``pkg/proxy/healthcheck``). Other than there,
    a first sync that does not succeed in that time is unhealthy too: such a node serves nothing.

    :param clock: of whose ``seconds()`` everything here is.
    """

    def __init__(self, clock: IReactorTime, syncPeriod: float, families: Iterable[Family] = FAMILIES) -> None:
        self._clock = clock
        self._limit = 2 * syncPeriod
        self._families: dict[Family, _Waiting] = {family: _Waiting() for family in families}
        self._nodeEligible = True
        self._stopping = False

    def queued(self, family: Family | None = None) -> None:
        """A change came that is not yet in force; ``None`` for every family."""
        now = self._clock.seconds()
        for it in self._each(family):
            if it.queued is None:
                it.queued = now

    def began(self, family: Family | None = None) -> None:
        """A sync begins, with all that waits; what comes from now on waits for the next."""
        for it in self._each(family):
            if it.taken is None:
                it.taken = it.queued
            it.queued = None

    def applied(self, family: Family | None = None) -> None:
        """
        The sync has succeeded. Without :meth:`began` before it, nothing waits any more. A failed sync needs no word:
        what it was to bring goes on waiting.
        """
        now = self._clock.seconds()
        for it in self._each(family):
            if it.taken is None:
                it.queued = None
            it.taken = None
            it.applied = now

    def nodeChanged(self, node: Node | None) -> None:
        """This node's object is that now, or is gone. Before the first call the node counts as eligible."""
        self._nodeEligible = eligible(node)

    def stopping(self) -> None:
        """The daemon drains: load balancers are to send the node nothing new, though it is alive."""
        self._stopping = True

    def health(self) -> Health:
        """How things are now."""
        now = self._clock.seconds()
        families: dict[Family, FamilyHealth] = {}
        for family, it in self._families.items():
            oldest = it.queued if it.taken is None else it.taken
            families[family] = FamilyHealth(it.applied, oldest is None or now - oldest < self._limit)
        return Health(now, families, self._nodeEligible and not self._stopping)

    def _each(self, family: Family | None) -> Iterable[_Waiting]:
        return self._families.values() if family is None else (self._families[family],)


def utcNow() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def healthBody(health: Health, now: datetime, withNode: bool) -> tuple[int, dict[str, Any]]:
    """
    HTTP status and JSON of ``/healthz`` (with the node) or ``/livez`` (without), as kube-proxy gives them.

    :param now: the time of day of ``health.at``.
    """

    def shown(seconds: float | None) -> str:
        return _NEVER if seconds is None else _rfc3339(now - timedelta(seconds=health.at - seconds))

    healthy = health.healthy and (health.nodeEligible or not withNode)
    body: dict[str, Any] = {
        # Who is healthy is up to date: what was last written may be old, since nothing has changed.
        "lastUpdated": _rfc3339(now) if healthy else shown(health.lastUpdated),
        "currentTime": _rfc3339(now),
    }
    if withNode:
        body["nodeEligible"] = health.nodeEligible
    body["healthy"] = health.healthy
    body["status"] = {
        family: {"lastUpdated": shown(it.lastUpdated), "healthy": it.healthy} for family, it in health.families.items()
    }
    return (200 if healthy else 503), body


class Page(Resource):
    """
    One page.

    :param make: makes HTTP status, content type and body.
    """

    def __init__(self, make: Callable[[Request], tuple[int, str, bytes]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._make = make

    def render_GET(self, request: Request) -> bytes:
        code, contentType, body = self._make(request)
        request.setResponseCode(code)
        headers = request.responseHeaders
        headers.setRawHeaders("Content-Type", [contentType])
        headers.setRawHeaders("Content-Length", [str(len(body))])
        headers.setRawHeaders("X-Content-Type-Options", ["nosniff"])
        headers.setRawHeaders("Cache-Control", ["no-store"])
        return body

    def render_HEAD(self, request: Request) -> bytes:
        self.render_GET(request)
        return b""

    def getChild(self, path: bytes, request: Request) -> Resource:
        return Page(lambda request: (404, TEXT, b"no such page; / lists those that there are\n"))


def _json(value: Any, pretty: bool = False) -> bytes:
    text = msgspec.json.encode(value, enc_hook=str)
    return (msgspec.json.format(text, indent=2) if pretty else text) + b"\n"


def _wantsPretty(request: Request) -> bool:
    return b"pretty" in request.uri.partition(b"?")[2].replace(b"=", b"&").split(b"&")


def _ignore(page: str, code: int) -> None:
    pass


def healthPages(
    health: Callable[[], Health],
    answered: Callable[[str, int], None] = _ignore,
    now: Callable[[], datetime] = utcNow,
) -> dict[str, Page]:
    """
    ``healthz`` and ``livez``.

    :param answered: is told page name and HTTP status of each answer.
    """

    def page(name: str, withNode: bool) -> Page:
        def make(request: Request) -> tuple[int, str, bytes]:
            code, body = healthBody(health(), now(), withNode)
            answered(name, code)
            return code, JSON, msgspec.json.encode(body)

        return Page(make)

    return {"healthz": page("healthz", True), "livez": page("livez", False)}


class _Status:
    """``/status``: each part by itself, so that one that fails does not hide the others."""

    log = Logger()

    def __init__(self, parts: Mapping[str, Callable[[], Any]]) -> None:
        self._parts = parts

    def make(self, request: Request) -> tuple[int, str, bytes]:
        shown: dict[str, Any] = {}
        for name, part in self._parts.items():
            try:
                shown[name] = msgspec.Raw(msgspec.json.encode(part(), enc_hook=str))
            except Exception:
                self.log.failure("The part {part} of /status could not be made", part=name)
                shown[name] = {"error": "this part could not be made; the log says why"}
        return 200, JSON, _json(shown, _wantsPretty(request))


def explainPage(answer: Callable[[Question], Any]) -> dict[str, Page]:
    """
    ``explain``.

    :param answer: makes what is shown, JSON-able.
    """

    def make(request: Request) -> tuple[int, str, bytes]:
        try:
            question = questionOf(_query(request))
        except BadQuestion as error:
            return 400, TEXT, f"{error}\n".encode()
        return 200, JSON, _json(answer(question), _wantsPretty(request))

    return {"explain": Page(make)}


def _query(request: Request) -> dict[str, list[str]]:
    """:raise BadQuestion: for what cannot be decoded."""
    try:
        text = request.uri.partition(b"?")[2].decode("ascii")
        query = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMETERS)
    except ValueError:
        raise BadQuestion(f"the query cannot be read; {USAGE}") from None
    query.pop("pretty", None)
    return query


def tree(pages: Mapping[str, Page]) -> Page:
    """A root with those pages under it, and ``/`` as their list."""
    index = "".join(f"/{name}\n" for name in sorted(pages)).encode()
    root = Page(lambda request: (404, TEXT, b""))
    for name, page in {"": Page(lambda request: (200, TEXT, index)), **pages}.items():
        root.putChild(name.encode(), page)
    return root


def metricsPages(
    exposition: Callable[[str], tuple[str, bytes]],
    mode: Callable[[], str],
    config: Callable[[], Any],
    status: Mapping[str, Callable[[], Any]],
) -> dict[str, Page]:
    """
    What the metrics bind has beside :func:`healthPages`.

    :param exposition: makes content type and body of ``/metrics`` from an ``Accept`` header.
    :param mode: the dataplane in use, for ``/proxyMode``.
    :param config: the effective configuration, JSON-able, secrets already masked, for ``/configz``.
    :param status: parts of ``/status``, each JSON-able.
    """

    def metrics(request: Request) -> tuple[int, str, bytes]:
        contentType, body = exposition(request.getHeader("accept") or "")
        return 200, contentType, body

    return {
        "metrics": Page(metrics),
        "proxyMode": Page(lambda request: (200, TEXT, mode().encode())),
        "configz": Page(lambda request: (200, JSON, _json(config(), _wantsPretty(request)))),
        "status": Page(_Status(status).make),
    }
