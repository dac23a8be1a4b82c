"""
The ways to patch an object: JSON merge patch (RFC 7396), JSON patch (RFC 6902), strategic merge patch, and server-side
apply.

How a strategic merge treats a list, and by which keys server-side apply does, stands in :mod:`tests.fakes.apischema`.
Server-side apply (KEP-555) remembers what each field manager applied last, and takes away what it no longer applies. It
knows no owners beyond that: nothing ever conflicts, and objects carry no managedFields.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from .apikinds import Json
from .apischema import Field
from .apistatus import StatusError, badRequest, failure

APPLY = "application/apply-patch+yaml"
_REJECTED = "the server rejected our request due to an error in our request"
_KEY_DEFAULTS = {"protocol": "TCP"}


def unprocessable(text: str) -> StatusError:
    """A patch that can be read but not applied."""
    return failure(422, "Invalid", _REJECTED, {"causes": [{"reason": "UnexpectedServerResponse", "message": text}]})


def mergePatch(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = mergePatch(new.get(name), value)
    return new


# --- RFC 6902 ---


def jsonPatch(old: Any, patch: Any) -> Any:
    """
    RFC 6902. What is said about managedFields, which objects here do not have, is passed over.

    :raise StatusError: 400 for what is no patch, 422 for one that does not fit.
    """
    if not isinstance(patch, list) or not all(isinstance(it, dict) for it in patch):
        raise badRequest("error decoding patch: json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    new = copy.deepcopy(old)
    for step in patch:
        if str(step.get("path", "")).startswith("/metadata/managedFields"):
            continue
        try:
            new = _step(new, step)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            op, path = step.get("op"), step.get("path")
            raise unprocessable(f"{op} operation does not apply: doc is missing path: {path}: {error}") from None
    return new


def _step(document: Any, step: Json) -> Any:
    op, path = step["op"], _pointer(step["path"])
    if op == "test":
        if _at(document, path) != step["value"]:
            raise unprocessable(f"testing value {step['path']} failed: test failed")
        return document
    if op in ("move", "copy"):
        origin = _pointer(step["from"])
        value = copy.deepcopy(_at(document, origin))
        return _set(_set(document, origin, None, "remove") if op == "move" else document, path, value, "add")
    if op not in ("add", "replace", "remove"):
        raise unprocessable(f"unexpected kind: {op}")
    return _set(document, path, None if op == "remove" else copy.deepcopy(step["value"]), op)


def _pointer(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise ValueError("not a JSON pointer")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _at(document: Any, path: list[str]) -> Any:
    for part in path:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _set(document: Any, path: list[str], value: Any, op: str) -> Any:
    """Change the document in place; gives it, or the value that takes its place."""
    if not path:
        return value
    parent, last = _at(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        at = len(parent) if last == "-" and op == "add" else int(last)
        if not 0 <= at <= len(parent) - (op != "add"):
            raise IndexError(last)
        parent[at : at + (op != "add")] = [] if op == "remove" else [value]
    elif op == "remove":
        del parent[last]
    elif op == "replace" and last not in parent:
        raise KeyError(last)
    else:
        parent[last] = value
    return document


# --- strategic merge ---


def strategicMerge(schema: Field | None, old: Any, patch: Any) -> Any:
    """
    A patch that merges lists whose items have a key, with the directives ``$patch``, ``$retainKeys``,
    ``$setElementOrder/LIST`` and ``$deleteFromPrimitiveList/LIST``.

    :param schema: of the objects; without it, lists are replaced.
    :raise StatusError: 400, 422.
    """
    if not isinstance(patch, dict):
        raise badRequest("json: cannot unmarshal array into Go value of type map[string]interface {}")
    return _mergeObject(schema, old if isinstance(old, dict) else {}, patch)


def _mergeObject(schema: Field | None, old: Json, patch: Json) -> Json:
    directive = patch.get("$patch")
    said = {name: value for name, value in patch.items() if name not in ("$patch", "$retainKeys")}
    if directive == "replace":
        return said
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise badRequest("unknown patch type found in patch: " + str(directive))
    kept = patch.get("$retainKeys")
    new = {name: value for name, value in old.items() if kept is None or name in kept}
    for name, value in said.items():
        if name.startswith("$"):
            continue
        field = _fieldOf(schema, name)
        if value is None:
            new.pop(name, None)
        elif isinstance(value, dict):
            before = new.get(name)
            new[name] = _mergeObject(field, before if isinstance(before, dict) else {}, value)
        elif isinstance(value, list) and field is not None and field.mergeKey:
            new[name] = _mergeList(field, new.get(name) or [], value)
        elif isinstance(value, list) and field is not None and field.merged:
            there = list(new.get(name) or [])
            new[name] = there + [it for it in value if it not in there]
        else:
            new[name] = value
    for name, value in said.items():
        directive, _, name = name.partition("/")
        field = _fieldOf(schema, name)
        if directive == "$deleteFromPrimitiveList":
            new[name] = [it for it in new.get(name) or [] if it not in value]
        elif directive == "$setElementOrder" and field is not None and name in new:
            new[name] = _ordered(field.mergeKey, old.get(name) or [], new[name], value)
    return new


def _fieldOf(schema: Field | None, name: str) -> Field | None:
    if schema is None:
        return None
    return schema.fields.get(name) if schema.type == "object" else schema.item


def _mergeList(field: Field, old: list[Any], patch: list[Any]) -> list[Any]:
    key = field.mergeKey
    if any(isinstance(it, dict) and it.get("$patch") == "replace" for it in patch):
        return [it for it in patch if it.get("$patch") != "replace"]
    new = list(old)
    for it in patch:
        if not isinstance(it, dict) or key not in it:
            raise unprocessable(f"map: {it} does not contain declared merge key: {key}")
        found = [at for at, there in enumerate(new) if there.get(key) == it[key]]
        if it.get("$patch") == "delete":
            new = [there for there in new if there.get(key) != it[key]]
        elif found:
            new[found[0]] = _mergeObject(field.item, new[found[0]], it)
        else:
            new.append(_mergeObject(field.item, {}, it))
    return new


def _ordered(key: str, old: list[Any], new: list[Any], order: list[Any]) -> list[Any]:
    """Those that the client named in its order; the server's others keep their places between them."""

    def keyOf(it: Any) -> Any:
        return it.get(key) if key and isinstance(it, dict) else it

    wanted = [keyOf(it) for it in order]
    before = {keyOf(it): at for at, it in enumerate(old)}
    named = sorted((it for it in new if keyOf(it) in wanted), key=lambda it: wanted.index(keyOf(it)))
    others = [it for it in new if keyOf(it) not in wanted]
    merged = []
    for it in named:
        while others and before.get(keyOf(others[0]), len(old)) < before.get(keyOf(it), -1):
            merged.append(others.pop(0))
        merged.append(it)
    return merged + others


# --- server-side apply ---


def applied(schema: Field | None, live: Any, before: Any, now: Any) -> Any:
    """
    The live object after a manager who had applied ``before`` (``{}`` for the first time) applies ``now``.
    """
    if not isinstance(now, dict) or not isinstance(live, dict):
        return now
    before = before if isinstance(before, dict) else {}
    new = {name: value for name, value in live.items() if name not in before or name in now}
    for name, value in now.items():
        field = _fieldOf(schema, name)
        if value is None:
            continue
        if isinstance(value, list) and field is not None and field.listKeys:
            new[name] = _appliedList(field, live.get(name) or [], before.get(name) or [], value)
        elif isinstance(value, list) and field is not None and field.merged:
            there = [it for it in live.get(name) or [] if it not in (before.get(name) or [])]
            new[name] = [*there, *(it for it in value if it not in there)]
        elif isinstance(value, dict):
            new[name] = applied(field, live.get(name) or {}, before.get(name), value)
        else:
            new[name] = value
    return new


def _appliedList(field: Field, live: list[Any], before: list[Any], now: list[Any]) -> list[Any]:
    def keyOf(it: Json) -> tuple[Any, ...]:
        return tuple(it.get(key, _KEY_DEFAULTS.get(key)) for key in field.listKeys)

    earlier, wanted = {keyOf(it): it for it in before}, {keyOf(it): it for it in now}
    there = {keyOf(it): it for it in live if keyOf(it) not in earlier or keyOf(it) in wanted}
    for key, it in wanted.items():
        there[key] = applied(field.item, there.get(key, {}), earlier.get(key), it)
    return list(there.values())


# Of a schema, the object and the patch; server-side apply needs to know more and is not among them.
PATCHES: dict[str, Callable[[Field | None, Any, Any], Any]] = {
    "application/merge-patch+json": lambda schema, old, patch: mergePatch(old, patch),
    "application/json-patch+json": lambda schema, old, patch: jsonPatch(old, patch),
    "application/strategic-merge-patch+json": strategicMerge,
}
