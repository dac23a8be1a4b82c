"""Words for people: numbers of things, and what is wrong with a field."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_SORTS = {
    "int": "a number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list",
    "object": "a mapping", "null": "empty",
}
_PLACE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`\Z")
_EXPECTED = re.compile(r"Expected `(?P<wanted>[^`]*)`, got `(?P<found>[^`]*)`\Z")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`\Z")


def counted(count: int, what: str, many: str = "") -> str:
    """``1 object``, ``2 objects``; ``many`` where that is not the same with an *s*."""
    return f"{count} {what if count == 1 else many or what + 's'}"


def plural(kind: str) -> str:
    """Many objects of a kind."""
    return kind if kind.endswith("s") else f"{kind}s"


def suggestion(word: str, known: Iterable[str], nearness: float = 0.6) -> str:
    """
    ``; did you mean 'x'?`` where something known is near, else nothing.

    :param nearness: from 0, anything is near, to 1, it differs in capitals at the most.
    """
    folded = {one.lower(): one for one in known}
    near = get_close_matches(word.lower(), folded, 1, nearness)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def fieldFault(text: str) -> str:
    """
    What msgspec says of data of the wrong type, as a sentence about a field: ``spec.ports[0].port must be a number, and
    is text``. What cannot be put so is left as it is.
    """
    place = _PLACE.search(text)
    said, path = (text[: place.start()], place["path"]) if place else (text, "")
    missing = _MISSING.match(said)
    if missing:
        return f"{path}.{missing['field']} is missing" if path else f"{missing['field']} is missing"
    expected = _EXPECTED.match(said)
    if expected is None:
        return f"{path}: {said}" if path else text
    wanted = [it for it in expected["wanted"].split(" | ") if it != "null"]
    if expected["found"] == "float" and "int" in wanted:
        return f"{path or 'it'} must be a whole number within bounds"
    words = " or ".join(dict.fromkeys(_SORTS.get(it, it) for it in wanted))
    return f"{path or 'it'} must be {words}, and is {_SORTS.get(expected['found'], expected['found'])}"
