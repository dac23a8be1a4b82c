"""What one request to the fake API server asks for: its path, its options, the form of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec
import yaml

from . import apiproto
from .apikinds import Json, Kind
from .apiselectors import fieldSelector, labelSelector
from .apistatus import StatusError, badRequest, failure, invalidOptions, status

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_UNKNOWN_BODY = (
    "the body of the request was in an unknown format - "
    "accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf"
)
_UNACCEPTABLE = (
    "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml, "
    "application/vnd.kubernetes.protobuf, application/json;stream=watch, "
    "application/vnd.kubernetes.protobuf;stream=watch"
)
_MATCH_WITHOUT = "resourceVersionMatch is forbidden unless resourceVersion is provided"
_MATCH_ON_WATCH = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
_NEEDS_MATCH = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
_GATE_OFF = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"


class Logged(msgspec.Struct):
    """
    One request in the log.

    :ivar time: seconds of the monotonic clock (of the test's clock, where there is one).
    :ivar agent: its User-Agent.
    :ivar authorized: whether it had an Authorization header.
    :ivar resource: plural name, ``""`` for what is no resource; ``verb`` likewise.
    :ivar status: what was answered, 0 as long as nothing was.
    """

    time: float
    method: str
    path: str
    query: dict[str, str]
    agent: str
    authorized: bool
    resource: str = ""
    verb: str = ""
    status: int = 0


class Target(msgspec.Struct):
    """
    What a path names.

    :ivar name: of the object; ``""`` for the whole collection.
    """

    group: str
    version: str
    plural: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    def verb(self, method: str, query: Mapping[str, str]) -> str:
        if method != "GET":
            return VERBS.get(method, method.lower())
        if not self.name and query.get("watch") in ("true", "1"):
            return "watch"
        return "get" if self.name else "list"


def segments(path: str) -> list[str]:
    return [unquote(part) for part in path.split("/") if part]


def target(parts: Sequence[str]) -> Target | None:
    """Of a path below ``/api`` or ``/apis``; ``None`` for one too short to name a resource."""
    if parts[0] == "api":
        group, rest = "", list(parts[1:])
    else:
        group, rest = (parts[1] if len(parts) > 1 else ""), list(parts[2:])
    if len(rest) < 2:
        return None
    version, rest = rest[0], rest[1:]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = [*rest, "", ""][:3]
    return Target(group, version, plural, namespace, name, subresource)


class ListOptions(msgspec.Struct):
    """
    The query of a LIST or WATCH, checked as the API server checks it.

    :ivar version: ``None`` for ``""``.
    """

    version: int | None
    match: str
    limit: int
    token: str
    wanted: Callable[[Json], bool] | None
    bookmarks: bool
    seconds: int | None
    initial: bool | None


def listOptions(query: Mapping[str, str], kind: Kind, watch: bool, watchList: str) -> ListOptions:
    """
    :param watchList: whether the server has WatchList: ``on``, ``off`` (422), ``ignored``.
    :raise StatusError: 400, 422, 500.
    """
    match, version = query.get("resourceVersionMatch", ""), query.get("resourceVersion", "")
    initial = {"true": True, "1": True, "false": False, "0": False}.get(query.get("sendInitialEvents", ""))
    if watch and watchList == "ignored":
        initial, match = None, ""
    problems: list[tuple[str, str]] = []
    if watch:
        if initial is not None and match != "NotOlderThan":
            problems.append(("resourceVersionMatch", _NEEDS_MATCH))
        if initial is not None and watchList == "off":
            problems.append(("sendInitialEvents", _GATE_OFF))
        if initial is None and match:
            problems.append(("resourceVersionMatch", _MATCH_ON_WATCH))
    elif match and not version:
        problems.append(("resourceVersionMatch", _MATCH_WITHOUT))
    if problems:
        raise invalidOptions(*problems)
    options = ListOptions(
        version=None,
        match=match,
        limit=_int(query.get("limit", "")) or 0,
        token=query.get("continue", ""),
        wanted=selector(query, kind),
        bookmarks=query.get("allowWatchBookmarks") in ("true", "1"),
        seconds=_int(query.get("timeoutSeconds", "")),
        initial=initial,
    )
    if options.token and version:
        raise badRequest("specifying resource version is not allowed when using continue")
    options.version = parseVersion(version, watch)
    return options


def parseVersion(text: str, watch: bool = False) -> int | None:
    """:raise StatusError: 400 for what is no number; on a watch the real server says 500."""
    if not text:
        return None
    if text.isdecimal() and text.isascii():
        return int(text)
    problem = f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
    raise failure(500, "", problem) if watch else badRequest(f"invalid resource version: {problem}")


class Representation(msgspec.Struct, frozen=True):
    """
    The form in which a client wants objects.

    :ivar form: ``json``, ``Table``, or ``PartialObjectMetadata``.
    :ivar version: of meta.k8s.io.
    """

    form: str = "json"
    version: str = "v1"


def representation(accept: str, lists: bool) -> Representation:
    """
    The first of the forms in an Accept header that there is.

    :param lists: whether it is about a list.
    :raise StatusError: 406.
    """
    partial = "PartialObjectMetadata"
    for part in accept.split(",") if accept else ("*/*",):
        type, *parameters = (it.strip() for it in part.split(";"))
        said = dict(it.partition("=")[::2] for it in parameters)
        if type not in ("application/json", "application/*", "*/*"):
            continue
        if "as" not in said:
            return Representation()
        if said.get("g") == "meta.k8s.io" and said.get("v") in ("v1", "v1beta1"):
            if said["as"] == "Table":
                return Representation("Table", said["v"])
            if said["as"] == partial + "List" * lists:
                return Representation(partial, said["v"])
    raise StatusError(406, status(406, "NotAcceptable", _UNACCEPTABLE, {}))


def parseBody(contentType: str, data: bytes, kind: Kind) -> Json:
    """:raise StatusError: 400, 415."""
    base = contentType.split(";")[0].strip()
    if base not in ("", "application/json", "application/yaml", apiproto.CONTENT_TYPE):
        raise failure(415, "UnsupportedMediaType", _UNKNOWN_BODY)
    try:
        if base == apiproto.CONTENT_TYPE:
            it: Any = apiproto.decode(data, kind)
            if it is None:
                raise failure(415, "UnsupportedMediaType", _UNKNOWN_BODY)
        else:
            it = yaml.safe_load(data) if base == "application/yaml" else json.loads(data)
    except (ValueError, yaml.YAMLError) as error:
        text = (
            f"the object provided is unrecognized (must be of type {kind.kind}): couldn't get version/kind; json parse "
            f"error: {error}"
        )
        raise badRequest(text) from None
    if not isinstance(it, dict) or not isinstance(it.setdefault("metadata", {}), dict):
        raise badRequest(f"the object provided is unrecognized (must be of type {kind.kind})")
    return it


def selector(query: Mapping[str, str], kind: Kind) -> Callable[[Json], bool] | None:
    labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
    if not labels and not fields:
        return None
    byLabel, byField = labelSelector(labels), fieldSelector(fields, kind)
    return lambda it: byLabel(it) and byField(it)


def _int(text: str) -> int | None:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise badRequest(f'strconv.ParseInt: parsing "{text}": invalid syntax') from None
