"""
Manifests as text to API objects: YAML with many documents, JSON, and lists of every kind. No I/O.

YAML is read from the parser's events, not through PyYAML's constructor: so that timestamps stay text, aliases, depth
and doubled keys are seen to, each object knows its line, and a deeply nested text cannot overflow the C stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import yaml
from msgspec import Struct

from ..core import wire
from ..core.values import Kind
from ..core.wording import suggestion

MAX_BYTES = 32 << 20
MAX_DEPTH = 100
#: How many values the aliases of one document may stand for together.
MAX_ALIASED = 100_000

#: kind → the API versions under which it is read.
VERSIONS: dict[str, tuple[str, ...]] = {
    "Service": ("v1",),
    "Endpoints": ("v1",),
    "Node": ("v1",),
    "EndpointSlice": ("discovery.k8s.io/v1", "discovery.k8s.io/v1beta1"),
    "ServiceCIDR": ("networking.k8s.io/v1", "networking.k8s.io/v1beta1"),
}
#: From this nearness on an unknown kind is a misspelled one. Less, and Kubernetes' own ServiceAccount would be.
NEARNESS = 0.85
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
#: Numbers as PyYAML and kubectl agree on them. On ``1e3``, ``089``, ``0o17`` and ``12:30`` they do not: these are text.
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?\Z")
_BASES = {"0b": 2, "0x": 16}
_SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}


class Broken(ValueError):
    """
    A text that cannot be read at all.

    :ivar line: where; 0 where that cannot be told.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


class Found(Struct, frozen=True):
    """
    An object of a manifest, or why it is none.

    :ivar key: ``namespace/name``; ``""`` where not even that can be told.
    :ivar line: where its document or list item begins.
    :ivar object: one of :mod:`twisted_kproxy.core.wire`, ``None`` with a reason.
    """

    kind: Kind
    key: str
    line: int
    object: Any | None
    reason: str = ""


class Manifest(Struct, frozen=True):
    """
    What one file says.

    :ivar found: in the order of the file; no key twice.
    :ivar faults: line and reason of each part that says nothing that can be used; those in ``found`` are among them.
    :ivar loose: those of them that nobody learns of from ``found``.
    :ivar skipped: kind → how many objects of it, of kinds that a service proxy does not read.
    """

    found: tuple[Found, ...] = ()
    faults: tuple[tuple[int, str], ...] = ()
    loose: tuple[tuple[int, str], ...] = ()
    skipped: dict[str, int] = {}


def parse(data: bytes, isJSON: bool = False) -> Manifest:
    """
    Read one file.

    :raise Broken: where the text is not YAML (or JSON), or is too large.
    """
    if len(data) > MAX_BYTES:
        raise Broken(0, f"is larger than {MAX_BYTES >> 20} MiB: split it")
    sorting = _Sorting()
    for line, value in _json(data) if isJSON else _yaml(data):
        sorting.take(value, line, "", "")
    return Manifest(
        tuple(sorting.found.values()), tuple(sorting.faults), tuple(sorting.loose), sorting.skipped
    )


class Lines:
    """The line on which each of the outer mappings of a document begins."""

    def __init__(self) -> None:
        self._lines: dict[int, tuple[Any, int]] = {}

    def put(self, value: Any, line: int) -> None:
        self._lines[id(value)] = (value, line)  # the value is kept, so that its id stays its own

    def of(self, value: Any, default: int) -> int:
        return self._lines.get(id(value), (None, default))[1]


class _Sorting:
    """Takes values apart into objects, lists and what is none of our business."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Found] = {}
        self.faults: list[tuple[int, str]] = []
        self.loose: list[tuple[int, str]] = []
        self.skipped: dict[str, int] = {}

    def take(self, value: Any, line: int, kind: str, version: str, lines: Lines | None = None) -> None:
        if isinstance(value, tuple):
            value, lines = value
        if value is None:
            return
        if not isinstance(value, dict):
            self._fault(line, f"is no object but {_sort(value)}")
            return
        kind = value.get("kind") or kind
        version = value.get("apiVersion") or version
        if not isinstance(kind, str) or not kind:
            self._fault(line, "has no kind")
        elif kind == "List" or (kind.endswith("List") and kind[:-4] in VERSIONS):
            self._list(value, line, kind, version, lines)
        elif kind not in VERSIONS:
            near = _near(kind) if _mayBeOurs(version) and len(kind) < 32 else ""
            if near:
                self._fault(line, f"kind {kind} is not known{near}")
            else:
                self.skipped[kind] = self.skipped.get(kind, 0) + 1
        elif version not in VERSIONS[kind]:
            if not _mayBeOurs(version):
                name = f"{kind}.{version}"  # another project's kind of the same name
                self.skipped[name] = self.skipped.get(name, 0) + 1
            else:
                must = f"must be {' or '.join(VERSIONS[kind])}"
                reason = f"apiVersion {must if version else f'is missing; it {must}'}"
                key = _keyOf(_placed(value, kind))  # type: ignore[arg-type]
                self._add(Found(kind, key, line, None, reason))  # type: ignore[arg-type]
        else:
            self._object(value, line, kind)  # type: ignore[arg-type]

    def _list(self, value: dict[Any, Any], line: int, kind: str, version: str, lines: Lines | None) -> None:
        items = value.get("items")
        if items is None:
            return
        if not isinstance(items, list):
            self._fault(line, f"{kind}: items is no list but {_sort(items)}")
            return
        inner = "" if kind == "List" else kind[:-4]
        for item in items:
            at = lines.of(item, line) if lines else line
            self.take(item, at, inner, version if inner else "", lines)

    def _object(self, value: dict[Any, Any], line: int, kind: Kind) -> None:
        value = _placed(value, kind)
        try:
            it = wire.convert(kind, value)
            found = Found(kind, wire.keyOf(it.metadata), line, it)
        except wire.Unreadable as error:
            found = Found(kind, error.key or _keyOf(value), line, None, error.reason)
        self._add(found)

    def _add(self, found: Found) -> None:
        line = found.line
        first = self.found.setdefault((found.kind, found.key), found) if found.key else None
        what = f"{found.kind} {found.key}".rstrip()
        if found.reason:
            self._fault(line, f"{what}: {found.reason}", isLoose=first is not found)
        if first is not None and first is not found:
            self._fault(line, f"{what}: is already on line {first.line}, which counts")

    def _fault(self, line: int, reason: str, isLoose: bool = True) -> None:
        self.faults.append((line, reason))
        if isLoose:
            self.loose.append((line, reason))


_GROUPS = {version.partition("/")[0] for versions in VERSIONS.values() for version in versions}
_KINDS = (*VERSIONS, "List", *(f"{kind}List" for kind in VERSIONS))


@lru_cache(64)  # a large file repeats its few kinds
def _near(kind: str) -> str:
    return suggestion(kind, _KINDS, NEARNESS)


def _mayBeOurs(version: Any) -> bool:
    """Whether an ``apiVersion`` is none of another project's, which may have kinds of the same name, in a group."""
    return not isinstance(version, str) or "/" not in version or version.partition("/")[0] in _GROUPS


def _placed(value: dict[Any, Any], kind: Kind) -> dict[Any, Any]:
    """
    The object as an API server would complete it: in its namespace, ``default`` where it names none (a Node, for one,
    is in none), and the ports of a slice with a name, be it ``""``.
    """
    ports = value.get("ports") if kind == "EndpointSlice" else None
    if isinstance(ports, list):
        named = [{**it, "name": ""} if isinstance(it, dict) and it.get("name") is None else it for it in ports]
        value = {**value, "ports": named}
    meta = value.get("metadata")
    if not isinstance(meta, dict):
        return value
    if kind in wire.CLUSTER_WIDE:
        return {**value, "metadata": {**meta, "namespace": None}}
    if meta.get("namespace") in (None, ""):
        return {**value, "metadata": {**meta, "namespace": "default"}}
    return value


def _keyOf(value: dict[Any, Any]) -> str:
    """The key of an object whose metadata cannot be read as a whole; ``""`` where it has no name."""
    meta = value.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(name, str) or not name:
        return ""
    namespace = meta.get("namespace")
    if namespace is None:
        return name
    return f"{namespace}/{name}" if isinstance(namespace, str) else ""


def _sort(value: Any) -> str:
    sorts = {list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number", dict: "a mapping"}
    return sorts.get(type(value), "nothing")


# --- JSON ------------------------------------------------------------------------------------------------------------

#: A number that is too large is the fault of the one object that it stands in.
_decodeAny = wire.deeply(msgspec.json.Decoder(float_hook=float))
_decodeFields = wire.deeply(msgspec.json.Decoder(dict[str, msgspec.Raw]))
_decodeItems = wire.deeply(msgspec.json.Decoder(list[msgspec.Raw] | None))


def _json(data: bytes) -> Iterator[tuple[int, Any]]:
    text = data.removeprefix(b"\xef\xbb\xbf")
    if not text.strip():
        return
    try:
        outer = _decodeFields(text)
        kind = _decodeAny(outer["kind"]) if "kind" in outer else ""
        if not (isinstance(kind, str) and kind.endswith("List") and "items" in outer):
            yield _lineAt(text, len(text) - len(text.lstrip())), _decodeAny(text)
            return
        # Item by item: one large list in one call would keep every other thread waiting.
        items = _decodeItems(outer.pop("items")) or []
        common = {name: _decodeAny(raw) for name, raw in outer.items() if name in ("kind", "apiVersion")}
        end, line = 0, 1
        for item in items:
            raw = bytes(item)
            start = text.find(raw, end)
            line += text.count(b"\n", end, start)
            end = start
            yield line, {**common, "items": [_decodeAny(raw)]}
            line += raw.count(b"\n")
            end = start + len(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        at = re.search(r"\(byte (\d+)\)", str(error))
        raise Broken(_lineAt(text, int(at[1])) if at else 0, f"is no JSON object: {error}") from None


def _lineAt(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


# --- YAML ------------------------------------------------------------------------------------------------------------


def yamlDocuments(data: bytes) -> Iterator[tuple[int, Any]]:
    """
    Line and value of each YAML document.

    :raise Broken: where the text cannot be read.
    """
    for line, (value, _) in _yaml(data):
        yield line, value


def _yaml(data: bytes) -> Iterator[tuple[int, tuple[Any, Lines]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Broken(_lineAt(data, error.start), "is not UTF-8 text") from None
    try:
        loader = _Loader(text)
        try:
            while not loader.check_event(yaml.StreamEndEvent):
                if loader.check_event(yaml.DocumentStartEvent):
                    yield _Document(loader).read()
                else:
                    loader.get_event()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise Broken(mark.line + 1 if mark else 0, f"is no YAML: {said}") from None
    except yaml.YAMLError as error:
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 0
        raise Broken(line, f"is no YAML: {getattr(error, 'reason', None) or error}") from None


class _Document:
    """Builds the value of one document from the parser's events."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._lines = Lines()
        self._weight = 0
        self._aliased = 0

    def read(self) -> tuple[int, tuple[Any, Lines]]:
        self._loader.get_event()  # the document's start
        event = self._loader.get_event()
        line = event.start_mark.line + 1
        value = self._value(event, 0)
        self._loader.get_event()  # its end
        return line, (value, self._lines)

    def _value(self, event: Any, depth: int) -> Any:
        before = self._weight
        self._weight += 1
        anchor = event.anchor
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        elif depth >= MAX_DEPTH:
            raise Broken(event.start_mark.line + 1, f"is nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(event, depth + 1)
        else:
            value = []
            get = self._loader.get_event
            while not isinstance(item := get(), yaml.SequenceEndEvent):
                value.append(self._value(item, depth + 1))
        if anchor is not None:
            self._anchors[anchor] = (value, self._weight - before)
        return value

    def _alias(self, event: Any) -> Any:
        line = event.start_mark.line + 1
        if event.anchor not in self._anchors:
            raise Broken(line, f"*{event.anchor} stands for nothing before it")
        value, weight = self._anchors[event.anchor]
        self._weight += weight
        self._aliased += weight
        if self._aliased > MAX_ALIASED:
            raise Broken(line, f"aliases stand for more than {MAX_ALIASED} values")
        return value

    def _mapping(self, event: Any, depth: int) -> dict[Any, Any]:
        value: dict[Any, Any] = {}
        if depth <= 5:
            self._lines.put(value, event.start_mark.line + 1)
        merged: list[Any] = []
        get = self._loader.get_event
        while not isinstance(keyEvent := get(), yaml.MappingEndEvent):
            line = keyEvent.start_mark.line + 1
            key = self._value(keyEvent, depth)
            item = self._value(get(), depth)
            if isinstance(key, dict | list):
                raise Broken(line, "a key must be text")
            if key == "<<" and isinstance(keyEvent, yaml.ScalarEvent) and not keyEvent.style:
                merged += item if isinstance(item, list) else [item]
            elif key in value:
                raise Broken(line, f"the key {key!r} is given twice")
            else:
                value[key] = item
        for other in merged:
            if not isinstance(other, dict):
                raise Broken(event.start_mark.line + 1, "<< needs a mapping")
            for key, item in other.items():
                value.setdefault(key, item)
        return value


def _scalar(event: Any) -> Any:
    """Its value by YAML's core rules, with 1.1's yes, no, on and off as in kubectl; what looks like a date is text."""
    text: str = event.value
    tag: str | None = event.tag
    if tag is None or tag == "!":
        if event.style or tag == "!":
            return text
        if text in _SPECIAL:
            return _SPECIAL[text]
        return _number(text) if text[0] in "-+.0123456789" else text
    short = tag.removeprefix(_TAG)
    line = event.start_mark.line + 1
    if short in ("str", "timestamp", "binary"):
        return text
    value: Any = _SPECIAL[text] if text in _SPECIAL else _number(text)
    sorts: dict[str, tuple[type, ...]] = {
        "int": (int,), "float": (int, float), "bool": (bool,), "null": (type(None),),
    }
    if short not in sorts:
        raise Broken(line, f"the tag {tag} is not known")
    if not isinstance(value, sorts[short]) or (isinstance(value, bool) and short != "bool"):
        raise Broken(line, f"{text!r} is no {short}")
    return float(value) if isinstance(value, int) and short == "float" else value


def _number(text: str) -> Any:
    if len(text) > 64:
        return text
    digits = text.replace("_", "")
    try:
        if _INT.match(text):
            plain = digits.lstrip("+-")
            base = _BASES.get(plain[:2], 8 if plain[0] == "0" else 10)
            return int(digits, base)
        return float(digits) if _FLOAT.match(text) else text
    except ValueError:
        return text  # nothing but underscores after the prefix
