"""
Looking through very many flows: what the kernel sends of them is read at fixed places, a whole buffer at a time.

The kernel writes the attributes of a flow in the order of its code (``ctnetlink_fill_info``), the two directions first.
So, within one family and one protocol, addresses and ports stand at the same distances in every message, and messages
of the same length stand at the same distance from each other. That makes :func:`struct.iter_unpack` fit, which is many
times as fast as reading attribute by attribute. Heads that are not as expected (a zone within a direction, another
protocol where the kernel does not narrow) send a message to :func:`decode`, which reads with care.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import TypeAlias

from msgspec import Struct

from ..core.values import Family
from .netlink import ATTRIBUTE, HEADER, NESTED, attribute, attributes

CTNETLINK = 1
NEW, GET, DELETE = (CTNETLINK << 8 | kind for kind in (0, 1, 2))
UDP = 17
_ORIG, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_BY_DST, _BY_PROTOCOL, _BY_DPORT = 1 << 1, 1 << 3, 1 << 5
SOCKETS: dict[Family, int] = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}

_LENGTH = struct.Struct("=I")

#: An address and a port.
Place: TypeAlias = tuple[bytes, int]
#: The same, with the port's two bytes as they are on the wire.
Spot: TypeAlias = tuple[bytes, bytes]
#: What was dialled, where answers come from, and where in the buffer the message begins.
Row: TypeAlias = tuple[Spot, Spot, int]


class Flow(Struct, frozen=True):
    """
    A flow as the kernel tells of it.

    :ivar destination: what the client dialled.
    :ivar source: where its answers come from.
    """

    protocol: int
    destination: Place
    source: Place


def question(family: Family, where: tuple[str, int] | None = None) -> bytes:
    """
    The payload of a dump that the kernel narrows to UDP. Old kernels do not narrow.

    :param where: narrow to what was sent to this address (``""``: any) and port, too.
    """
    flags = _BY_PROTOCOL
    proto = attribute(1, bytes([UDP]))
    ip = b""
    if where is not None:
        address, port = where
        flags |= _BY_DPORT
        proto += attribute(3, struct.pack(">H", port))
        # Not by IPv6 addresses: there the kernel's comparison is the wrong way round (ctnetlink_filter_match_tuple
        # takes the 0 of ipv6_addr_cmp for a difference; seen on 6.18), and what was asked for would be left out.
        if address and family == "IPv4":
            flags |= _BY_DST
            ip = attribute(1 | NESTED, attribute(2, socket.inet_pton(socket.AF_INET, address)))
    tuple_ = attribute(_ORIG | NESTED, ip + attribute(2 | NESTED, proto))
    narrowed = attribute(_FILTER | NESTED, attribute(1, struct.pack("=I", flags)) + attribute(2, struct.pack("=I", 0)))
    return tuple_ + narrowed


def decode(answer: bytes) -> Flow | None:
    """The flow in one answer to a dump, read with care; ``None`` where it is none with ports."""
    parts = dict(attributes(answer))
    if _ORIG not in parts or _REPLY not in parts:
        return None
    orig, reply = _side(parts[_ORIG]), _side(parts[_REPLY])
    if orig is None or reply is None:
        return None
    return Flow(orig[0], orig[2], reply[1])


def _side(data: bytes) -> tuple[int, Place, Place] | None:
    """One direction's protocol, source and destination."""
    parts = dict(attributes(data))
    ip, proto = dict(attributes(parts.get(1, b""))), dict(attributes(parts.get(2, b"")))
    source, destination = ip.get(1) or ip.get(3), ip.get(2) or ip.get(4)
    if source is None or destination is None or not {1, 2, 3} <= proto.keys():
        return None
    if len(proto[1]) != 1 or len(proto[2]) != 2 or len(proto[3]) != 2:
        return None
    ports = [int.from_bytes(proto[it], "big") for it in (2, 3)]
    return proto[1][0], (source, ports[0]), (destination, ports[1])


class Scanner:
    """
    Reads the UDP flows of one family out of what the kernel sends.

    :ivar strange: how many messages had to be read with care.
    """

    def __init__(self, family: Family) -> None:
        wide = 4 if family == "IPv4" else 16
        source = 1 if family == "IPv4" else 3
        # A direction: its own head and the heads of addresses and source | source | head | destination | the heads of
        # what the protocol has and of its number, that number | head, source port | head, destination port.
        # What is shorter than four bytes is padded.
        ip, proto = 4 + 2 * (4 + wide), 4 + 3 * 8
        heads = [
            struct.pack("=6H", 4 + ip + proto, side | NESTED, ip, 1 | NESTED, 4 + wide, source)
            for side in (_ORIG, _REPLY)
        ]
        number = struct.pack("=4H", proto, 2 | NESTED, 5, 1) + bytes([UDP, 0, 0, 0])
        self._heads = heads[0], number, heads[1], number
        asked = f"12s {wide}x 4x {wide}s 12s 8x 4x 2s 2x"
        answered = f"12s {wide}s 4x {wide}x 12s 4x 2s 2x 8x"
        self._format = f"= I H 2x I 4x 4x {asked} {answered}"
        self._least = struct.calcsize(self._format)
        self._layouts: dict[int, struct.Struct] = {}
        self.strange = 0

    def rows(self, data: bytes, sequence: int) -> Iterator[Row]:
        """The flows in what was received at once, in answer to the request of that number."""
        heads, least, view = self._heads, self._least, memoryview(data)
        start, end = 0, len(data)
        while start + 20 <= end:
            (length,) = _LENGTH.unpack_from(data, start)
            if length < 20 or start + length > end:
                return
            if length < least or length & 3:
                yield from self._withCare(data, start, length, sequence)
                start += (length + 3) & ~3
                continue
            run = view[start : start + (end - start) // length * length]
            for size, kind, number, one, dialled, proto, dport, two, answering, back, sport in self._layout(
                length
            ).iter_unpack(run):
                if size != length:
                    break
                if (one, proto, two, back) == heads and kind == NEW and number == sequence:
                    yield (dialled, dport), (answering, sport), start
                else:
                    yield from self._withCare(data, start, length, sequence)
                start += length

    def _layout(self, length: int) -> struct.Struct:
        """How messages of that length are unpacked. There are some dozen lengths."""
        known = self._layouts.get(length)
        if known is None:
            known = self._layouts[length] = struct.Struct(f"{self._format} {length - self._least}x")
        return known

    def _withCare(self, data: bytes, start: int, length: int, sequence: int) -> Iterator[Row]:
        _length, kind, _flags, number, _sender = HEADER.unpack_from(data, start)
        if kind != NEW or number != sequence:
            return
        self.strange += 1
        flow = decode(data[start + 20 : start + length])
        if flow is not None and flow.protocol == UDP:
            yield spot(*flow.destination), spot(*flow.source), start


def spot(address: bytes, port: int) -> Spot:
    """An address and a port as they are on the wire."""
    return address, port.to_bytes(2, "big")


def identity(data: bytes, start: int) -> bytes:
    """
    What names the flow in the message that begins there to the kernel: what the client sent, the kernel's number of the
    flow (so that one that has come in its place meanwhile is left alone), and its zone.
    """
    (length,) = _LENGTH.unpack_from(data, start)
    end = start + length
    start += 20
    found = b""
    while start + 4 <= end:
        size, kind = ATTRIBUTE.unpack_from(data, start)
        if size < 4 or start + size > end:
            break
        after = start + ((size + 3) & ~3)
        if kind & 0x3FFF in (_ORIG, _ID, _ZONE):
            found += data[start:after]
            if kind & 0x3FFF == _ID:  # the zone stands before it
                break
        start = after
    return found
