"""Label and field selectors of the API: text to predicate over an object."""

from __future__ import annotations

import re
from collections.abc import Callable

from .apikinds import Json, Kind
from .apistatus import badRequest

Predicate = Callable[[Json], bool]

_SET = re.compile(r"^(?P<key>[^\s!=,()]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)$")
_EQUAL = re.compile(r"^(?P<key>[^\s!=,()]+)\s*(?P<op>==|=|!=)\s*(?P<value>[^\s!=,()]*)$")
_EXISTS = re.compile(r"^(?P<op>!?)\s*(?P<key>[^\s!=,()]+)$")


def labelSelector(text: str) -> Predicate:
    """
    ``a=b``, ``a==b``, ``a!=b``, ``a in (b,c)``, ``a notin (b,c)``, ``a``, ``!a``, joined by commas.

    As in the API, ``!=`` and ``notin`` also match objects without that label.

    :raise StatusError: 400.
    """
    tests = [_labelTest(part) for part in _split(text)]
    return lambda it: all(test(it.get("metadata", {}).get("labels") or {}) for test in tests)


def fieldSelector(text: str, kind: Kind) -> Predicate:
    """
    ``a=b``, ``a==b``, ``a!=b``, joined by commas.

    :raise StatusError: 400, also for a field that this kind cannot be selected by.
    """
    known = {"metadata.name", *(("metadata.namespace",) if kind.namespaced else ()), *kind.fields}
    tests: list[Predicate] = []
    for part in _split(text):
        found = _EQUAL.match(part)
        if found is None:
            raise badRequest(f"invalid field selector; can't understand '{part}'")
        key, op, value = found.groups()
        if key not in known:
            raise badRequest(f"field label not supported: {key}")
        tests.append(_fieldTest(key.split("."), value, op != "!="))
    return lambda it: all(test(it) for test in tests)


def _split(text: str) -> list[str]:
    """At the commas outside of parentheses."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)] if text.strip() else []


def _labelTest(part: str) -> Callable[[dict[str, str]], bool]:
    if found := _SET.match(part):
        key, op = found["key"], found["op"]
        values = {value.strip() for value in found["values"].split(",")}
        if op == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if found := _EQUAL.match(part):
        key, op, value = found.groups()
        if op == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if found := _EXISTS.match(part):
        key, wanted = found["key"], not found["op"]
        return lambda labels: (key in labels) is wanted
    raise badRequest(f"unable to parse requirement: found '{part[:1]}', expected: identifier")


def _fieldTest(path: list[str], value: str, equal: bool) -> Predicate:
    def test(it: Json) -> bool:
        found = it
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None  # type: ignore[assignment]
        return ((found if isinstance(found, str) else "") == value) is equal

    return test
