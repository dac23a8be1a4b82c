"""The HTTP side of the fake API server: one resource that answers every path."""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from . import apidiscovery, apidocuments, apistatus
from .apicontrol import control
from .apifaults import GARBAGE, Fault, Reply, cutConnection
from .apikinds import Json, Kind
from .apirequest import (
    Logged,
    Representation,
    Target,
    listOptions,
    parseVersion,
    representation,
    segments,
    selector,
    target,
)
from .apistatus import StatusError
from .apistore import encode, full
from .apitables import partial, partialList, table
from .apiwatch import Watch
from .apiwrites import Write

if TYPE_CHECKING:
    from .apiserver import FakeApi

BUFFER = 2048  # Go's response buffer: a longer body is sent in chunks, the first one of this size
GZIP_FROM = 128 * 1024
OPEN_TO_ALL = ("version", "healthz", "readyz", "livez")


class Call:
    """One request under way."""

    log = Logger()

    def __init__(self, api: FakeApi, request: Any) -> None:
        self.api = api
        self.request = request
        self.method: str = request.method.decode("ascii", "replace")
        path: str = request.path.decode("utf-8", "replace")
        self.path = path.removeprefix(api.prefix) if api.prefix else path
        self.parts = segments(self.path)
        self.query = {
            name.decode("utf-8", "replace"): values[-1].decode("utf-8", "replace")
            for name, values in request.args.items()
        }
        self.target = target(self.parts) if self.parts[:1] in (["api"], ["apis"]) else None
        self.verb = self.target.verb(self.method, self.query) if self.target else ""
        self.headers: dict[str, str] = {}
        self.warnings: list[str] = []
        self.form = Representation()
        self.fault = Fault()
        self.logged: Logged | None = None

    def header(self, name: str) -> str:
        return self.request.getHeader(name) or ""

    # --- from request to answer ---

    def begin(self) -> None:
        if self.parts[:1] == ["fake"]:
            self._attempt(lambda: control(self))
            return
        plural = self.target.plural if self.target else ""
        agent, authorized = self.header("user-agent"), bool(self.header("authorization"))
        self.logged = Logged(
            self.api.seconds(), self.method, self.path, self.query, agent, authorized, plural, self.verb
        )
        self.api.requests.append(self.logged)
        self.fault = self.api.faults.take(plural, self.verb)
        if self.fault.blackHole:
            return
        self._after(self.fault.delay, self._answer)

    def _answer(self) -> None:
        fault = self.fault
        if fault.raw is not None:
            self.request.channel.transport.write(
                fault.raw.encode("latin-1") if isinstance(fault.raw, str) else fault.raw
            )
            cutConnection(self.api.reactor, self.request, not fault.fin)
            return
        if fault.body is not None or fault.garbage:
            body = GARBAGE if fault.garbage else fault.body
            if not isinstance(body, bytes):
                body = body.encode() if isinstance(body, str) else encode(body)
            self.send(fault.status or 200, body, "application/json")
            return
        self._attempt(self._normal)

    def _attempt(self, what: Any) -> None:
        try:
            what()
        except StatusError as error:
            answer = error
            self._after(answer.delay, lambda: self.error(answer))
        except Exception:
            failure = Failure()  # type: ignore[no-untyped-call]
            self.log.failure("The fake API server failed at {path}.", failure, path=self.path)
            self.error(apistatus.failure(500, "InternalError", failure.getErrorMessage()))

    def _normal(self) -> None:
        if error := self.fault.error():
            raise error
        user = self._user()
        first = self.parts[0] if self.parts else ""
        if self.target is not None:
            self._resource(self.target, user)
        elif first in ("api", "apis"):
            apidocuments.discovery(self)
        elif first == "openapi" and self.method == "GET":
            apidocuments.openApi(self)
        elif first == "version":
            self.json(self.api.version, pretty=True)
        elif first in OPEN_TO_ALL:
            self.send(200, b"ok", "text/plain; charset=utf-8")
        else:
            self.notFound()

    def _user(self) -> str:
        """Who asks. Raises 401."""
        header = self.header("authorization")
        if header:
            if self.api.tokens is None:
                return "system:admin"
            user = self.api.tokens.get(header.removeprefix("Bearer ").strip())
            if user is None:
                raise apistatus.unauthorized()
            return user
        certificate = getattr(self.request.channel.transport, "getPeerCertificate", lambda: None)()
        if certificate is not None:
            return str(certificate.get_subject().CN)
        return "system:admin" if self.api.tokens is None and not self.api.certificatesOnly else "system:anonymous"

    # --- what there is to answer ---

    def _resource(self, it: Target, user: str) -> None:
        kind = self.api.store.kindAt(it.group, it.version, it.plural)
        rights = {(it.plural, self.verb), (it.plural, "*"), ("*", self.verb), ("*", "*")}
        if user == "system:anonymous" or rights & self.api.forbidden:
            raise apistatus.forbidden(user, self.verb, kind, it.plural, it.namespace, it.name)
        if kind is None:
            if it.group and not apidiscovery.apiGroup(it.group, self.api.store.kinds):
                self.notFound()
                return
            raise apistatus.noResource()
        if it.subresource and not (it.subresource == "status" and kind.status and self.verb != "create"):
            raise apistatus.noResource()
        if kind.warning:
            self.warn(kind.warning)
        self.form = representation(self.header("accept"), self.verb == "list")
        if self.verb in ("list", "watch"):
            self._collection(kind, it)
        elif self.verb == "get":
            version = parseVersion(self.query.get("resourceVersion", ""))
            self._notTooLarge(version)
            self.object(kind, self.api.store.get(kind, it.namespace, it.name))
        else:
            Write(self, kind, it).perform()

    def _collection(self, kind: Kind, it: Target) -> None:
        store, watch = self.api.store, self.verb == "watch"
        options = listOptions(self.query, kind, watch, self.api.watchList)
        if watch:
            self._watch(kind, it, options)
            return
        if options.match != "Exact":
            self._notTooLarge(options.version)
        exact = None
        if options.version and (options.match == "Exact" or (options.limit and not options.match)):
            exact = options.version
        # The watch cache answers resourceVersion=0, and pays no heed to a limit.
        limit = 0 if options.version == 0 and self.api.watchCache else options.limit
        page = store.list(kind, it.namespace, options.wanted, limit, options.token, exact)
        metadata: Json = {"resourceVersion": str(page.version)}
        if page.token:
            metadata["continue"] = page.token
        if page.remaining is not None:
            metadata["remainingItemCount"] = page.remaining
        items = [] if self.fault.emptyList else page.items
        if self.form.form == "Table":
            self.json(self._table(kind, items, metadata))
        elif self.form.form != "json":
            self.json(partialList(items, metadata, self.form.version))
        else:
            head = {"kind": f"{kind.kind}List", "apiVersion": kind.apiVersion, "metadata": metadata}
            self.json({**head, "items": items})

    def _watch(self, kind: Kind, it: Target, options: Any) -> None:
        if options.initial:
            self._notTooLarge(options.version)
        fromState = not options.version or bool(options.initial)
        reply = self._stream()
        watch = Watch(
            self.api,
            reply,
            kind,
            it.namespace,
            options.wanted,
            version=None if fromState else options.version,
            initial=options.initial is not False,
            mark=bool(options.initial) and options.bookmarks,
            bookmarks=options.bookmarks,
            seconds=self.api.watchSeconds if options.seconds is None else options.seconds,
            frame=None if self.form.form == "json" else self._frames(kind),
        )
        self.request.notifyFinish().addBoth(lambda _: watch.forget())
        watch.start()

    def _notTooLarge(self, version: int | None) -> None:
        store = self.api.store
        if version and version > store.resourceVersion:
            raise apistatus.tooLarge(version, store.resourceVersion, store.tooLargeSeconds)

    def _frames(self, kind: Kind) -> Callable[[str, Json], bytes]:
        """Lines of a watch in the form that was asked for."""
        first = True

        def frame(type: str, it: Json) -> bytes:
            nonlocal first
            said = self._formed(kind, it, first)
            first = False
            return encode({"type": type, "object": said}) + b"\n"

        return frame

    def _formed(self, kind: Kind, it: Json, head: bool = True) -> Json:
        if self.form.form == "json":
            return full(kind, it)
        if self.form.form != "Table":
            return partial(it, self.form.version)
        return self._table(kind, [it], {"resourceVersion": it["metadata"].get("resourceVersion", "")}, head)

    def _table(self, kind: Kind, items: Sequence[Json], metadata: Json, head: bool = True) -> Json:
        include = self.query.get("includeObject", "")
        return table(kind, items, metadata, self.api.store.now(), include, self.form.version, head)

    def selection(self, kind: Kind) -> Callable[[Json], bool] | None:
        """What the request's selectors select."""
        return selector(self.query, kind)

    def warn(self, *texts: str) -> None:
        """Say something beside the answer."""
        self.warnings += ['299 - "' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts]

    # --- sending ---

    def object(self, kind: Kind, it: Json, code: int = 200) -> None:
        """Answer with an object, in the form that was asked for."""
        self.json(self._formed(kind, it), code)

    def json(self, it: Any, code: int = 200, pretty: bool = False) -> None:
        body = encode(it)
        if pretty:
            import msgspec

            body = msgspec.json.format(body, indent=2)
        else:
            body += b"\n"
        self.send(code, body, "application/json")

    def error(self, error: StatusError) -> None:
        self.headers.update(error.headers)
        if error.code == 403:
            self.headers["X-Content-Type-Options"] = "nosniff"
        if isinstance(error.body, str):
            self.send(error.code, error.body.encode(), "text/plain; charset=utf-8")
        else:
            self.json(error.body, error.code)

    def notFound(self) -> None:
        self.send(404, b"404 page not found\n", "text/plain; charset=utf-8")

    def send(self, code: int, body: bytes, contentType: str) -> None:
        if self.request.channel is None or self.request._disconnected:
            return
        if len(body) > GZIP_FROM and "gzip" in self.header("accept-encoding"):
            body = gzip.compress(body, 1)
            self.headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
        self._head(code, contentType, len(body) if len(body) <= BUFFER else None)
        reply = Reply(self.api.reactor, self.request, self.fault)
        for piece in (body[:BUFFER], body[BUFFER:]):
            if piece:
                reply.write(piece)
        reply.finish()

    def _stream(self) -> Reply:
        self._head(200, "application/json", None)
        return Reply(self.api.reactor, self.request, self.fault)

    def _head(self, code: int, contentType: str, length: int | None) -> None:
        if self.logged:
            self.logged.status = code
        self.request.setResponseCode(code)
        headers: dict[str, str] = {"Audit-Id": str(uuid.uuid4()), "Cache-Control": "no-cache, private"}
        headers["Content-Type"] = self.fault.contentType or contentType
        if contentType.startswith("text/plain"):
            headers["X-Content-Type-Options"] = "nosniff"
        if length is not None:
            headers["Content-Length"] = str(length)
        self._setHeaders({**headers, **self.headers, **self.fault.headers})

    def _setHeaders(self, headers: Mapping[str, str]) -> None:
        self.request.responseHeaders.removeHeader(b"server")
        for name, value in headers.items():
            self.request.setHeader(name, value)
        if self.warnings:
            self.request.responseHeaders.setRawHeaders("Warning", self.warnings)

    def _after(self, seconds: float, what: Any) -> None:
        if not seconds:
            what()
            return
        timer = self.api.reactor.callLater(seconds, what)
        self.request.notifyFinish().addBoth(lambda _: timer.active() and timer.cancel())


class ControlRoot(Resource):
    """``/fake/`` and nothing else."""

    isLeaf = True

    def __init__(self, api: FakeApi) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._api = api

    def render(self, request: Any) -> int:
        call = Call(self._api, request)
        if call.parts[:1] == ["fake"]:
            call.begin()
        else:
            call.error(apistatus.noResource())
        return NOT_DONE_YET


class ApiRoot(Resource):
    """Everything below ``/``."""

    isLeaf = True

    def __init__(self, api: FakeApi) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._api = api

    def render(self, request: Any) -> int:
        Call(self._api, request).begin()
        return NOT_DONE_YET
