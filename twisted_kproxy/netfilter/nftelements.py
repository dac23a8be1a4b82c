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
from ..core.values import Family, FrontendKey
from .netlink import NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, attribute, message, text
from .nftlayout import BREATH, NETWORKS, PROTOCOLS, SETS, Allowed, Block, Item, Step, Value, intervals
from .slices import Slices, finish

NFTABLES = 10
INET = 1
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NEWSETELEM, GETSETELEM, DELSETELEM = (NFTABLES << 8 | it for it in (12, 13, 14))

_BATCH_GENID = 1
LIST_TABLE, LIST_SET, LIST_ELEMENTS = 1, 2, 3
KEY, DATA, FLAGS, KEY_END = 1, 2, 3, 10
INTERVAL_END = 1
#: An attribute's length has 16 bits; what is longer goes into several messages of the batch.
_MOST = 60000

_FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
PORT = struct.Struct(">B3xH2x")
TARGET_PORT = struct.Struct(">H2x")
_NESTED_VALUE = struct.Struct("=HHHH")
VERDICT = struct.Struct(">i")
VERDICTS: dict[Block, tuple[int, str]] = {"drop": (0, ""), "pass": (1, ""), "reject": (-4, "refuse")}


def keyBytes(key: FrontendKey) -> bytes:
    """A frontend as the key of an element: each part padded to four bytes."""
    port = PORT.pack(PROTOCOLS[key.protocol], key.port)
    return socket.inet_pton(_FAMILIES[key.family], key.address) + port if key.address else port


def guardBytes(guard: Guard) -> bytes:
    """A guard as the key of an element."""
    return PORT.pack(PROTOCOLS[guard.protocol], guard.port)


def allowedBytes(it: Allowed) -> tuple[bytes, bytes]:
    """A frontend and a network as the first key of an element, and as its last."""
    network = ipaddress.ip_network(it.network)
    key = keyBytes(it.key)
    return key + network.network_address.packed, key + network.broadcast_address.packed


def valueBytes(value: Value) -> bytes:
    """The value of an element, as its data attribute."""
    if isinstance(value, Target):
        family = socket.AF_INET6 if ":" in value.address else socket.AF_INET
        raw = socket.inet_pton(family, value.address) + TARGET_PORT.pack(value.port)
        return _NESTED_VALUE.pack(len(raw) + 8, DATA | NESTED, len(raw) + 4, 1) + raw
    return _BLOCK_BYTES[value]


def _block(value: Block) -> bytes:
    code, chain = VERDICTS[value]
    verdict = attribute(1, VERDICT.pack(code)) + (text(2, chain) if chain else b"")
    return attribute(DATA | NESTED, attribute(2 | NESTED, verdict))


_BLOCK_BYTES: dict[Block, bytes] = {block: _block(block) for block in VERDICTS}


def element(key: bytes, rest: bytes = b"") -> bytes:
    """One element, for a list of them."""
    size = len(key)
    return _ELEMENT.pack(size + len(rest) + 12, 1 | NESTED, size + 8, KEY | NESTED, size + 4, 1) + key + rest


_ELEMENT = struct.Struct("=HHHHHH")
_END = attribute(FLAGS, struct.pack(">I", INTERVAL_END))


def itemElement(item: Item, data: bytes = b"") -> bytes:
    """
    What stands in a set as an element.

    :param data: its data attribute, in a map.
    """
    if isinstance(item, FrontendKey):
        return element(keyBytes(item), data)
    if isinstance(item, Allowed):
        first, last = allowedBytes(item)
        return element(first, ending(last))
    if isinstance(item, Guard):
        return element(guardBytes(item))
    return element(socket.inet_pton(socket.AF_INET6 if ":" in item else socket.AF_INET, item))


def ending(last: bytes) -> bytes:
    """The attribute with the last key of an element that stands for many; nothing where there is none."""
    return attribute(KEY_END | NESTED, attribute(1, last)) if last else b""


def networkElements(networks: Iterable[str], family: Family) -> list[bytes]:
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
    for count, (name, item) in enumerate(step.removed):
        gone.setdefault(name, []).append(itemElement(item))
        if not count % BREATH:
            yield
    for name, raw, last in step.strange:
        gone.setdefault(name, []).append(element(raw, ending(last)))
    values: dict[Value, bytes] = {}
    for count, (name, item, value) in enumerate(step.added):
        data = b""
        if value is not None:
            data = values.get(value) or values.setdefault(value, valueBytes(value))
        new.setdefault(name, []).append(itemElement(item, data))
        if not count % BREATH:
            yield
    for name, networks in step.networks.items():
        new[name] = networkElements(networks, NETWORKS[name][0])
    return Elements(list(SETS) if step.whole else list(step.networks), gone, new)


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
    heads = {name: text(LIST_TABLE, table) + text(LIST_SET, name) for name in names}
    bodies += [(DELSETELEM, NLM_F_REQUEST, heads[name]) for name in elements.flushed]
    for kind, flags, some in (
        (DELSETELEM, NLM_F_REQUEST, elements.gone),
        (NEWSETELEM, NLM_F_REQUEST | NLM_F_CREATE, elements.new),
    ):
        for name, those in some.items():
            bodies += [(kind, flags, heads[name] + attribute(LIST_ELEMENTS | NESTED, part)) for part in _parts(those)]
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
