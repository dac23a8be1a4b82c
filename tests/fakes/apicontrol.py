"""
``/fake/``: how a test in another process scripts the fake API server. Bodies are JSON.

- ``GET /fake/requests`` the request log; ``DELETE`` empties it
- ``GET /fake/state`` ``{resourceVersion, oldest, watches, connections, accepted, objects: {plural: count}}``
- ``POST /fake/faults`` one :class:`~tests.fakes.apifaults.Fault` or a list of them; ``DELETE`` takes back all
- ``POST /fake/objects`` an object or a List: each is created or replaced; ``DELETE`` with such a body deletes each
- ``POST /fake/closeWatches`` ``{abort, midEvent, resource}``; ``POST /fake/sendRaw`` ``{data, resource}``
- ``POST /fake/bookmarkNow``, ``POST /fake/compact``, ``POST /fake/rewind`` ``{resourceVersion}``
- ``POST /fake/pause`` ``{seconds}``: no connections for so long; without it until ``POST /fake/resume``, which takes a
  control endpoint of its own
- ``POST /fake/settings`` ``{tokens, forbidden, bookmarkSeconds, watchSeconds, watchList, watchCache, historySize}``
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from .apifaults import Fault
from .apikinds import Json
from .apistatus import badRequest, noMethod

if TYPE_CHECKING:
    from .apiresources import Call

SETTINGS = ("bookmarkSeconds", "watchSeconds", "watchList", "watchCache", "historySize", "tokens", "forbidden")


def control(call: Call) -> None:
    """Answer a request below ``/fake/``."""
    api, what = call.api, "/".join(call.parts[1:])
    if call.method == "GET":
        if what == "requests":
            call.json(msgspec.to_builtins(api.requests))
        elif what == "state":
            call.json(api.state())
        else:
            raise noMethod()
        return
    data = call.request.content.read()
    try:
        body: Any = json.loads(data) if data.strip() else {}
    except ValueError as error:
        raise badRequest(f"the body is not JSON: {error}") from None
    answer: Json = {}
    if (call.method, what) == ("DELETE", "requests"):
        api.requests.clear()
    elif (call.method, what) == ("DELETE", "faults"):
        api.faults.clear()
    elif (call.method, what) == ("DELETE", "objects"):
        for it in objectsIn(body):
            api.store.delete(it)
    elif call.method != "POST":
        raise noMethod()
    elif what == "objects":
        for it in objectsIn(body):
            api.store.apply(it)
        answer = {"resourceVersion": str(api.store.resourceVersion)}
    elif what == "faults":
        _faults(call, body if isinstance(body, list) else [body])
    elif what in ("closeWatches", "sendRaw", "bookmarkNow", "compact", "rewind"):
        try:
            given = {**body, "data": body["data"].encode("latin-1")} if what == "sendRaw" else body
            getattr(api, what)(**given)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise badRequest(f"{what}: {error}") from None
    elif what == "pause":
        api.reactor.callLater(0.02, api.pause)  # after this answer has left
        if "seconds" in body:
            api.reactor.callLater(0.02 + float(body["seconds"]), api.resume)
    elif what == "resume":
        api.resume()
    elif what == "settings":
        _settings(call, body)
    else:
        raise noMethod()
    call.json(answer)


def objectsIn(it: Any) -> list[Json]:
    """The items of a List, or the object itself. List items may lack kind and apiVersion where the List implies it."""
    if not isinstance(it, dict):
        raise badRequest("neither an object nor a List")
    kind = str(it.get("kind", ""))
    if not kind.endswith("List") or not isinstance(it.get("items"), list):
        return [it]
    implied = {} if kind == "List" else {"kind": kind.removesuffix("List"), "apiVersion": it.get("apiVersion", "")}
    return [{**implied, **item} for item in it["items"]]


def _faults(call: Call, said: list[Any]) -> None:
    try:
        faults = msgspec.convert(said, list[Fault])
    except msgspec.ValidationError as error:
        raise badRequest(f"not a fault: {error}") from None
    for fault in faults:
        call.api.faults.add(fault)


def _settings(call: Call, said: Json) -> None:
    if unknown := set(said) - set(SETTINGS):
        raise badRequest(f"unknown settings: {', '.join(sorted(unknown))}")
    api = call.api
    for name, value in said.items():
        if name == "historySize":
            api.store.historySize = value
        elif name == "tokens":
            api.tokens = tokensOf(value)
        elif name == "forbidden":
            api.forbidden = {(resource, verb) for resource, verb in value}
        else:
            setattr(api, name, value)


def tokensOf(said: Any) -> dict[str, str] | None:
    """Tokens and whose they are, from such a mapping or from a list of tokens."""
    if said is None or isinstance(said, dict):
        return said
    return dict.fromkeys(said, "system:node-proxier")
