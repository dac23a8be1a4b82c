"""What the kernel tells of our elements by netlink: pure, bytes in, values out. ``nftelements`` is the other way."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..core.rules import Guard, Target
from ..core.values import FrontendKey, Protocol
from .netlink import attributes, text
from .nftelements import (
    DATA,
    FLAGS,
    INTERVAL_END,
    KEY,
    KEY_END,
    LIST_ELEMENTS,
    LIST_SET,
    LIST_TABLE,
    PORT,
    TARGET_PORT,
    VERDICT,
    VERDICTS,
    allowedBytes,
    keyBytes,
    valueBytes,
)
from .nftlayout import ALLOWED, CLUSTER_IPS, GUARDS, MAPS, PROTOCOLS, RESTRICTED, Allowed, Item, Unreadable, Value

_NAMES: dict[int, Protocol] = {number: name for name, number in PROTOCOLS.items()}
_SIZES = {"IPv4": 4, "IPv6": 16}


def question(table: str, name: str) -> bytes:
    """The payload that asks for the elements of a set."""
    return text(LIST_TABLE, table) + text(LIST_SET, name)


class Raw(NamedTuple):
    """
    An element as the kernel told of it.

    :ivar data: its data attribute's payload.
    :ivar ends: it is the end of an interval.
    :ivar last: the end of its key; nothing where it has none.
    """

    key: bytes
    data: bytes
    ends: bool
    last: bytes


def elementsIn(answer: bytes) -> Iterator[Raw]:
    """The elements in one answer to a dump."""
    for kind, listed in attributes(answer):
        if kind != LIST_ELEMENTS:
            continue
        for _kind, it in attributes(listed):
            parts = dict(attributes(it))
            key = dict(attributes(parts.get(KEY, b""))).get(1, b"")
            ends = bool(parts.get(FLAGS, bytes(4))[-1] & INTERVAL_END)
            last = dict(attributes(parts[KEY_END])).get(1, b"") if KEY_END in parts else b""
            yield Raw(key, parts.get(DATA, b""), ends, last)


def decode(name: str, it: Raw) -> tuple[Item, Value | None]:
    """
    What an element of any set but those of networks stands for.

    :raise Unreadable: when it is none that this program writes.
    """
    if name in MAPS:
        return decodeMap(name, it.key, it.data)
    try:
        if name in ALLOWED:
            return _allowed(name, it), None
        if name in CLUSTER_IPS:
            if len(it.key) != _SIZES[CLUSTER_IPS[name]]:
                raise ValueError("an address of another size")
            return _address(it.key), None
        if name in GUARDS:
            number, port = PORT.unpack(it.key)
            return Guard(GUARDS[name], _NAMES[number], port), None
        size = _SIZES[RESTRICTED[name]]
        number, port = PORT.unpack(it.key[size:])
        found = FrontendKey(RESTRICTED[name], _NAMES[number], _address(it.key[:size]), port)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise Unreadable(f"an element of {name} has another form than expected: {error!r}") from error
    if keyBytes(found) != it.key:
        raise Unreadable(f"an element of {name} has another form than expected")
    return found, None


def _allowed(name: str, it: Raw) -> Allowed:
    """:raise ValueError: (or another, see :func:`decode`) when it is no frontend and network."""
    family = ALLOWED[name]
    size = _SIZES[family]
    behind = size + PORT.size
    number, port = PORT.unpack(it.key[size:behind])
    ends = ipaddress.ip_address(it.key[behind:]), ipaddress.ip_address((it.last or it.key)[behind:])
    [network] = ipaddress.summarize_address_range(*ends)
    found = Allowed(FrontendKey(family, _NAMES[number], _address(it.key[:size]), port), str(network))
    if allowedBytes(found) != (it.key, it.last or it.key):
        raise ValueError("more than one frontend")
    return found


def addresses(name: str, answer: bytes) -> Iterator[str]:
    """
    The addresses in one answer to a dump of a set of such.

    :raise Unreadable: see :func:`decode`.
    """
    behind = 8 + _SIZES[CLUSTER_IPS[name]]
    for kind, listed in attributes(answer):
        if kind == LIST_ELEMENTS:
            for _kind, it in attributes(listed):
                if len(it) != behind:  # somebody has put a comment there, or a time
                    parts = dict(attributes(it))
                    it = bytes(8) + dict(attributes(parts.get(KEY, b""))).get(1, b"")
                if len(it) != behind:
                    raise Unreadable(f"an element of {name} has another form than expected")
                yield _address(it[8:])


def decodeMap(name: str, key: bytes, data: bytes) -> tuple[FrontendKey, Value]:
    """
    One element of a map.

    :raise Unreadable: when encoding it again would not give the same bytes: then the kernel speaks of something that
        this module does not understand.
    """
    family, hasAddress, leads = MAPS[name]
    size = _SIZES[family] if hasAddress else 0
    try:
        number, port = PORT.unpack(key[size:])
        address = str(ipaddress.ip_address(key[:size])) if hasAddress else ""
        found = FrontendKey(family, _NAMES[number], address, port)
        parts = dict(attributes(data))
        value: Value
        if leads:
            raw = parts[1]
            value = Target(str(ipaddress.ip_address(raw[:-4])), TARGET_PORT.unpack(raw[-4:])[0])
        else:
            verdict = dict(attributes(parts[2]))
            said = (VERDICT.unpack(verdict[1])[0], verdict.get(2, b"").rstrip(b"\0").decode())
            value = next(block for block, it in VERDICTS.items() if it == said)
    except (KeyError, ValueError, StopIteration, struct.error) as error:
        raise Unreadable(f"an element of {name} has another form than expected: {error!r}") from error
    if keyBytes(found) != key or dict(attributes(valueBytes(value)[4:])).keys() != parts.keys():
        raise Unreadable(f"an element of {name} has another form than expected")
    if leads and valueBytes(value)[8:] != raw:
        raise Unreadable(f"an element of {name} has another form than expected")
    return found, value


class MapReader:
    """
    Reads the elements of one map. The first of each shape is decoded with care; the others that look alike are cut
    out by position, which is many times as fast.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._family, self._hasAddress, self._leads = MAPS[name]
        self._wide = 4 if self._family == "IPv4" else 16
        self._shapes: set[tuple[bytes, bytes, int]] = set()
        self._blocks: dict[bytes, Value] = {}
        self._addresses: dict[bytes, str] = {}

    def read(self, answer: bytes) -> Iterator[tuple[str, FrontendKey, Value]]:
        """
        The elements in one answer to a dump: set, key, value.

        :raise Unreadable: see :func:`decodeMap`.
        """
        for kind, listed in attributes(answer):
            if kind == LIST_ELEMENTS:
                for _kind, it in attributes(listed):
                    yield self._quick(it) or self._careful(it)

    def _quick(self, it: bytes) -> tuple[str, FrontendKey, Value] | None:
        """An element whose shape is known: headers, key, data header, data; padding zero."""
        port = 8 + (self._wide if self._hasAddress else 0)
        data = port + PORT.size
        if (it[:8], it[data : data + 8], len(it)) not in self._shapes:
            return None
        protocol = _NAMES.get(it[port])
        if protocol is None or it[port + 1 : port + 4] + it[port + 6 : data] != _ZEROS:
            return None
        value: Value | None
        if self._leads:
            end = data + 8 + self._wide
            if it[end + 2 :] != b"\0\0":
                return None
            value = Target(self._text(it[data + 8 : end]), it[end] << 8 | it[end + 1])
        else:
            value = self._blocks.get(it[data:])
            if value is None:
                return None
        address = _address(it[8:port]) if self._hasAddress else ""
        return self._name, FrontendKey(self._family, protocol, address, it[port + 4] << 8 | it[port + 5]), value

    def _careful(self, it: bytes) -> tuple[str, FrontendKey, Value]:
        parts = dict(attributes(it))
        raw, said = dict(attributes(parts.get(KEY, b""))).get(1, b""), parts.get(DATA, b"")
        key, value = decodeMap(self._name, raw, said)
        data = 8 + len(raw)
        if it[8:data] == raw and it[data + 4 :] == said:
            self._shapes.add((it[:8], it[data : data + 8], len(it)))
            if not self._leads:
                self._blocks[it[data:]] = value
        return self._name, key, value

    def _text(self, raw: bytes) -> str:
        found = self._addresses.get(raw)
        if found is None:
            found = self._addresses[raw] = _address(raw)
        return found


_ZEROS = bytes(5)


def _address(raw: bytes) -> str:
    if len(raw) == 4:
        return socket.inet_ntop(socket.AF_INET, raw)
    found = socket.inet_ntop(socket.AF_INET6, raw)
    return str(ipaddress.ip_address(raw)) if "." in found else found  # the C library's text of those differs


def decodeNetworks(elements: Iterable[Raw]) -> list[str]:
    """The networks in the elements of an interval set."""
    bounds = sorted((int.from_bytes(it.key, "big"), not it.ends, len(it.key)) for it in elements)
    found: list[str] = []
    start: int | None = None
    size = 4
    for number, begins, size in bounds:
        if start is not None and not begins:
            found += _summary(start, number - 1, size)
            start = None
        elif begins:
            start = number
    if start is not None:
        found += _summary(start, (1 << size * 8) - 1, size)
    return found


def _summary(first: int, last: int, size: int) -> list[str]:
    if size == 4:
        ends4 = ipaddress.IPv4Address(first), ipaddress.IPv4Address(last)
        return [str(it) for it in ipaddress.summarize_address_range(*ends4)]
    ends6 = ipaddress.IPv6Address(first), ipaddress.IPv6Address(last)
    return [str(it) for it in ipaddress.summarize_address_range(*ends6)]
