"""
As much of Kubernetes' protobuf as kubectl cannot do without: it creates Services and Namespaces with typed clients,
which send nothing else (``kubectl create service``, ``kubectl create namespace``).

Messages are read by the tables below: number of the field, its name in JSON, and what it is (k8s.io/api
core/v1/generated.proto, apimachinery meta/v1/generated.proto). Other fields are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from .apikinds import Json, Kind

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\0"

Table = dict[int, tuple[str, Any]]  # a table for a message, [..] for a repeated field

_REFERENCE: Table = {
    1: ("kind", str), 3: ("name", str), 4: ("uid", str), 5: ("apiVersion", str), 6: ("controller", bool),
    7: ("blockOwnerDeletion", bool),
}  # fmt: skip
_METADATA: Table = {
    1: ("name", str), 2: ("generateName", str), 3: ("namespace", str), 5: ("uid", str), 6: ("resourceVersion", str),
    8: ("creationTimestamp", "time"), 11: ("labels", "map"), 12: ("annotations", "map"),
    13: ("ownerReferences", [_REFERENCE]), 14: ("finalizers", [str]),
}  # fmt: skip
_PORT: Table = {
    1: ("name", str), 2: ("protocol", str), 3: ("port", int), 4: ("targetPort", "intOrString"), 5: ("nodePort", int),
    6: ("appProtocol", str),
}  # fmt: skip
_AFFINITY: Table = {1: ("clientIP", {1: ("timeoutSeconds", int)})}
_SPEC: Table = {
    1: ("ports", [_PORT]), 2: ("selector", "map"), 3: ("clusterIP", str), 4: ("type", str), 5: ("externalIPs", [str]),
    7: ("sessionAffinity", str), 8: ("loadBalancerIP", str), 9: ("loadBalancerSourceRanges", [str]),
    10: ("externalName", str), 11: ("externalTrafficPolicy", str), 12: ("healthCheckNodePort", int),
    13: ("publishNotReadyAddresses", bool), 14: ("sessionAffinityConfig", _AFFINITY), 17: ("ipFamilyPolicy", str),
    18: ("clusterIPs", [str]), 19: ("ipFamilies", [str]), 20: ("allocateLoadBalancerNodePorts", bool),
    21: ("loadBalancerClass", str), 22: ("internalTrafficPolicy", str), 23: ("trafficDistribution", str),
}  # fmt: skip
MESSAGES: dict[str, Table] = {
    "Service": {1: ("metadata", _METADATA), 2: ("spec", _SPEC)},
    "Namespace": {1: ("metadata", _METADATA)},
}
_UNKNOWN: Table = {1: ("type", {1: ("apiVersion", str), 2: ("kind", str)}), 2: ("raw", bytes)}


def decode(data: bytes, kind: Kind) -> Json | None:
    """
    An object as typed clients send it; ``None`` for a kind that is not read here.

    :raise ValueError: for what is not such a message.
    """
    table = MESSAGES.get(kind.kind)
    if table is None:
        return None
    if not data.startswith(MAGIC):
        raise ValueError("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")
    envelope = _read(data[len(MAGIC) :], _UNKNOWN)
    return {**envelope.get("type", {}), **_read(envelope.get("raw", b""), table)}


def message(*fields: tuple[int, str | bytes]) -> bytes:
    """A message of texts and messages: pairs of a field's number and what is in it."""
    parts = []
    for number, value in fields:
        data = value.encode() if isinstance(value, str) else value
        parts.append(_varint(number << 3 | 2) + _varint(len(data)) + data)
    return b"".join(parts)


def _read(data: bytes, table: Table) -> Json:
    it: Json = {}
    for number, value in _fields(data):
        name, what = table.get(number, ("", None))
        if isinstance(what, list):
            it.setdefault(name, []).append(_value(value, what[0]))
        elif what == "map":
            entry = _read(value, {1: ("key", str), 2: ("value", str)})
            it.setdefault(name, {})[entry.get("key", "")] = entry.get("value", "")
        elif what is not None and (found := _value(value, what)) not in ("", None):
            it[name] = found
    return it


def _value(value: Any, what: Any) -> Any:
    if isinstance(what, dict) or what in (str, bytes, "intOrString", "time"):
        if not isinstance(value, bytes):
            raise ValueError("a number where a text or a message belongs")
    elif not isinstance(value, int):
        raise ValueError("a text where a number belongs")
    if isinstance(what, dict):
        return _read(value, what)
    if what is str:
        return value.decode()
    if what == "intOrString":
        said = _read(value, {1: ("type", int), 2: ("number", int), 3: ("text", str)})
        return said.get("text", "") if said.get("type") else said.get("number", 0)
    if what == "time":
        seconds = _read(value, {1: ("seconds", int)}).get("seconds")
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else None
    return bool(value) if what is bool else value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        if tag & 7 == 0:
            value, at = _number(data, at)
            yield tag >> 3, value
        elif tag & 7 == 2:
            size, at = _number(data, at)
            if at + size > len(data):
                raise ValueError("unexpected EOF")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {tag & 7}")


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("unexpected EOF")
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
