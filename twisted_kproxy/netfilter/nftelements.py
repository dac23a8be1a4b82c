"""
Elements of our table as netlink messages (``include/uapi/linux/netfilter/nf_tables.h``): pure, bytes in and out.

A batch of these costs the kernel some tens of microseconds, a run of ``nft`` some milliseconds.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator

from msgspec import Struct

from ..core.rules import Guard, Target
from ..core.values import Family, FrontendKey, Protocol
from .netlink import NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, attribute, attributes, message, text
from .nftlayout import (
    BREATH,
    GUARDS,
    INSIDERS,
    MAPS,
    NAMES,
    PROTOCOLS,
    SETS,
    Block,
    Step,
    Unreadable,
    Value,
    intervals,
)
from .slices import Slices, finish

NFTABLES = 10
INET = 1
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NEWSETELEM, GETSETELEM, DELSETELEM = (NFTABLES << 8 | it for it in (12, 13, 14))

_BATCH_GENID = 1
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_KEY, _DATA, _FLAGS = 1, 2, 3
_INTERVAL_END = 1
#: An attribute's length has 16 bits; what is longer goes into several messages of the batch.
_MOST = 60000

_FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
_NAMES: dict[int, Protocol] = {number: name for name, number in PROTOCOLS.items()}
_PORT = struct.Struct(">B3xH2x")
_TARGET_PORT = struct.Struct(">H2x")
_NESTED_VALUE = struct.Struct("=HHHH")
_VERDICT = struct.Struct(">i")
_VERDICTS: dict[Block, tuple[int, str]] = {"drop": (0, ""), "pass": (1, ""), "reject": (-4, "refuse")}


def keyBytes(key: FrontendKey) -> bytes:
    """A frontend as the key of an element: each part padded to four bytes."""
    port = _PORT.pack(PROTOCOLS[key.protocol], key.port)
    return socket.inet_pton(_FAMILIES[key.family], key.address) + port if key.address else port


def guardBytes(guard: Guard) -> bytes:
    """A guard as the key of an element."""
    return _PORT.pack(PROTOCOLS[guard.protocol], guard.port)


def valueBytes(value: Value) -> bytes:
    """The value of an element, as its data attribute."""
    if isinstance(value, Target):
        family = socket.AF_INET6 if ":" in value.address else socket.AF_INET
        raw = socket.inet_pton(family, value.address) + _TARGET_PORT.pack(value.port)
        return _NESTED_VALUE.pack(len(raw) + 8, _DATA | NESTED, len(raw) + 4, 1) + raw
    return _BLOCK_BYTES[value]


def _block(value: Block) -> bytes:
    code, chain = _VERDICTS[value]
    verdict = attribute(1, _VERDICT.pack(code)) + (text(2, chain) if chain else b"")
    return attribute(_DATA | NESTED, attribute(2 | NESTED, verdict))


_BLOCK_BYTES: dict[Block, bytes] = {block: _block(block) for block in _VERDICTS}


def element(key: bytes, rest: bytes = b"") -> bytes:
    """One element, for a list of them."""
    size = len(key)
    return _ELEMENT.pack(size + len(rest) + 12, 1 | NESTED, size + 8, _KEY | NESTED, size + 4, 1) + key + rest


_ELEMENT = struct.Struct("=HHHHHH")
_END = attribute(_FLAGS, struct.pack(">I", _INTERVAL_END))


def insiderElements(networks: Iterable[str], family: Family) -> list[bytes]:
    """Networks as intervals: the first address, and the first address behind the last one."""
    found: list[bytes] = []
    for first, behind in intervals(networks, family):
        found.append(element(first))
        if behind is not None:
            found.append(element(behind, _END))
    return found


class Elements(Struct, frozen=True):
    """
    A step as elements in bytes: set → those that go, and those that come.

    :ivar flushed: sets that are emptied first.
    """

    flushed: list[str]
    gone: dict[str, list[bytes]]
    new: dict[str, list[bytes]]


def elementsOf(step: Step) -> Slices[Elements]:
    """The elements of a step, in slices."""
    gone: dict[str, list[bytes]] = {}
    new: dict[str, list[bytes]] = {}
    flushed: list[str] = list(SETS) if step.whole else list(INSIDERS) if step.insiders is not None else []
    for count, (name, key) in enumerate(step.removed):
        gone.setdefault(name, []).append(element(keyBytes(key)))
        if not count % BREATH:
            yield
    for name, raw in step.strange:
        gone.setdefault(name, []).append(element(raw))
    for guard in step.guardsRemoved:
        gone.setdefault(NAMES[guard.family].guards, []).append(element(guardBytes(guard)))
    values: dict[Value, bytes] = {}
    for count, (name, key, value) in enumerate(step.added):
        data = values.get(value)
        if data is None:
            data = values[value] = valueBytes(value)
        new.setdefault(name, []).append(element(keyBytes(key), data))
        if not count % BREATH:
            yield
    for guard in step.guardsAdded:
        new.setdefault(NAMES[guard.family].guards, []).append(element(guardBytes(guard)))
    if step.insiders is not None:
        for name, family in INSIDERS.items():
            new[name] = insiderElements(step.insiders, family)
    return Elements(flushed, gone, new)


def batch(table: str, elements: Elements, first: int = 1, generation: int | None = None) -> tuple[bytes, int]:
    """
    Elements as one batch.

    :param first: the sequence number of its first message.
    :param generation: of the ruleset that this is meant for; the kernel refuses the batch with ERESTART where it is
        another by then (``NFNL_BATCH_GENID``).
    :return: the bytes, and the number of the last message before the end of the batch, which asks for an
        acknowledgement.
    """
    bodies: list[tuple[int, int, bytes]] = []
    names = {*elements.flushed, *elements.gone, *elements.new}
    heads = {name: text(_LIST_TABLE, table) + text(_LIST_SET, name) for name in names}
    bodies += [(DELSETELEM, NLM_F_REQUEST, heads[name]) for name in elements.flushed]
    for kind, flags, some in (
        (DELSETELEM, NLM_F_REQUEST, elements.gone),
        (NEWSETELEM, NLM_F_REQUEST | NLM_F_CREATE, elements.new),
    ):
        for name, those in some.items():
            bodies += [(kind, flags, heads[name] + attribute(_LIST_ELEMENTS | NESTED, part)) for part in _parts(those)]
    if not bodies:
        return b"", first
    wanted = attribute(_BATCH_GENID, generation.to_bytes(4, "big")) if generation is not None else b""
    out = [message(BATCH_BEGIN, NLM_F_REQUEST, first, 0, wanted, NFTABLES)]
    last = first + len(bodies)
    for number, (kind, flags, body) in enumerate(bodies, first + 1):
        out.append(message(kind, flags | NLM_F_ACK if number == last else flags, number, INET, body))
    out.append(message(BATCH_END, NLM_F_REQUEST, last + 1, 0, b"", NFTABLES))
    return b"".join(out), last


def encode(table: str, step: Step, first: int = 1) -> tuple[bytes, int]:
    """A step as one batch, at once; see :func:`batch`."""
    return batch(table, finish(elementsOf(step)), first)


def _parts(elements: list[bytes]) -> Iterator[bytes]:
    part: list[bytes] = []
    size = 0
    for it in elements:
        if size + len(it) > _MOST:
            yield b"".join(part)
            part, size = [], 0
        part.append(it)
        size += len(it)
    if part:
        yield b"".join(part)


# --- reading ---------------------------------------------------------------------------------------------------------


def question(table: str, name: str) -> bytes:
    """The payload that asks for the elements of a set."""
    return text(_LIST_TABLE, table) + text(_LIST_SET, name)


def elementsIn(answer: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """The elements in one answer to a dump: key, data attribute's payload, whether it ends an interval."""
    for kind, listed in attributes(answer):
        if kind != _LIST_ELEMENTS:
            continue
        for _kind, it in attributes(listed):
            parts = dict(attributes(it))
            key = dict(attributes(parts.get(_KEY, b""))).get(1, b"")
            ends = bool(parts.get(_FLAGS, bytes(4))[-1] & _INTERVAL_END)
            yield key, parts.get(_DATA, b""), ends


def decodeMap(name: str, key: bytes, data: bytes) -> tuple[FrontendKey, Value]:
    """
    One element of a map.

    :raise Unreadable: when encoding it again would not give the same bytes: then the kernel speaks of something that
        this module does not understand.
    """
    family, hasAddress, leads = MAPS[name]
    size = (4 if family == "IPv4" else 16) if hasAddress else 0
    try:
        number, port = _PORT.unpack(key[size:])
        address = str(ipaddress.ip_address(key[:size])) if hasAddress else ""
        found = FrontendKey(family, _NAMES[number], address, port)
        parts = dict(attributes(data))
        value: Value
        if leads:
            raw = parts[1]
            value = Target(str(ipaddress.ip_address(raw[:-4])), _TARGET_PORT.unpack(raw[-4:])[0])
        else:
            verdict = dict(attributes(parts[2]))
            said = (_VERDICT.unpack(verdict[1])[0], verdict.get(2, b"").rstrip(b"\0").decode())
            value = next(block for block, it in _VERDICTS.items() if it == said)
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
            if kind == _LIST_ELEMENTS:
                for _kind, it in attributes(listed):
                    yield self._quick(it) or self._careful(it)

    def _quick(self, it: bytes) -> tuple[str, FrontendKey, Value] | None:
        """An element whose shape is known: headers, key, data header, data; padding zero."""
        port = 8 + (self._wide if self._hasAddress else 0)
        data = port + _PORT.size
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
        raw, said = dict(attributes(parts.get(_KEY, b""))).get(1, b""), parts.get(_DATA, b"")
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


def decodeGuard(name: str, key: bytes) -> Guard:
    """
    One element of a set of guards.

    :raise Unreadable: when it is none.
    """
    try:
        number, port = _PORT.unpack(key)
        return Guard(GUARDS[name], _NAMES[number], port)
    except (KeyError, struct.error) as error:
        raise Unreadable(f"an element of {name} has another form than expected: {error!r}") from error


def decodeInsiders(elements: Iterable[tuple[bytes, bytes, bool]]) -> list[str]:
    """The networks in the elements of an interval set."""
    bounds = sorted((int.from_bytes(key, "big"), not ends, len(key)) for key, _data, ends in elements)
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
