"""
Rules of ip_tables and ip6_tables as the bytes that the kernel takes, and back.

python-iptables can build such bytes itself, from libxtables' own parsers; but not for DNAT of both families in one
process, and at a millisecond a rule. What is packed here is the same, byte for byte, as
:mod:`twisted_kproxy.netfilter.xtcheck` makes sure of on each machine before anything is written: the structures are
those of ``linux/netfilter_ipv4/ip_tables.h``, ``linux/netfilter_ipv6/ip6_tables.h`` and ``linux/netfilter/xt_*.h``, in
the revisions that libxtables chooses, so that ``iptables-legacy-save`` prints and restores them.
"""

from __future__ import annotations

import re
import socket
import struct
from functools import lru_cache
from ipaddress import ip_network
from typing import Literal, TypeAlias

from msgspec import Struct

from ..core.rules import PROXY_MARK, Target
from ..core.values import Family, Protocol

State: TypeAlias = Literal["", "NEW", "!ESTABLISHED", "DNAT", "!DNAT"]

#: What a rule may lead to, besides a :class:`~twisted_kproxy.core.rules.Target` and the name of a chain.
ACCEPT, DROP, RETURN, REJECT, RESET = "ACCEPT", "DROP", "RETURN", "REJECT", "REJECT tcp-reset"

#: Comments are cut in the kernel at 255 bytes, and ``iptables-restore`` stumbles over anything but printable ASCII.
COMMENT_LIMIT = 240


class UnknownBytes(ValueError):
    """A rule that is not of any shape that is written here."""


class Entry(Struct, frozen=True):
    """
    One rule of a chain.

    :ivar source: a canonical CIDR, ``""`` for any.
    :ivar destination: one address, or the canonical CIDR of several; ``""`` for any.
    :ivar protocol: ``None`` for any.
    :ivar port: the destination port, with ``protocol``; 0 for any.
    :ivar sourceLocal: only from addresses of this node.
    :ivar destinationLocal: only to addresses of this node.
    :ivar state: of the connection, a condition for the conntrack match.
    :ivar unmarked: only what does not carry the proxy's own mark.
    :ivar interface: only what came in by this one, or by those that begin so where it ends with ``+``; ``""`` for any.
    :ivar target: where to: rewrite the destination, or one of the words above, or a chain.
    """

    family: Family
    comment: str
    target: Target | str
    source: str = ""
    destination: str = ""
    protocol: Protocol | None = None
    port: int = 0
    sourceLocal: bool = False
    destinationLocal: bool = False
    state: State = ""
    unmarked: bool = False
    interface: str = ""


def sanitised(comment: str) -> str:
    """Nothing that a shell, a restore file or libxtables' parser could take for something else."""
    return re.sub(r"[^A-Za-z0-9/_.:\[\]() -]", "_", comment)[:COMMENT_LIMIT]


# --- the pieces ------------------------------------------------------------------------------------------------------

_NUMBERS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_PROTOCOLS = {number: name for name, number in _NUMBERS.items()}
_AF = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
_ANY = {"IPv4": bytes(4), "IPv6": bytes(16)}
_ONE = {"IPv4": b"\xff" * 4, "IPv6": b"\xff" * 16}
_F_PROTO = 1  # IP6T_F_PROTO: look at the protocol at all

#: src, dst, smsk, dmsk | iniface, outiface and their masks | proto, (tos,) flags, invflags | nfcache | offsets | rest
_HEAD4 = struct.Struct("=4s4s4s4s16s16x16s16xHBBIHHI16x")
_HEAD6 = struct.Struct("=16s16s16s16s16s16x16s16xHBBB3xIHHI4x16x")
#: Where iniface begins, and proto.
_LINK = {"IPv4": 16, "IPv6": 64}
_PROTO = {"IPv4": 80, "IPv6": 128}
#: Where nfcache ends, then comefrom and counters begin: fields that the kernel and libiptc use for themselves.
_NFCACHE = {"IPv4": 84, "IPv6": 136}
HEAD = {"IPv4": _HEAD4.size, "IPv6": _HEAD6.size}
_OFFSETS = struct.Struct("=HH")

_SIZE = struct.Struct("=H")
_EXTENSION = struct.Struct("=H29sB")  # size, name, revision: of a match as of a target
_COMMENT_SIZE = 288
_PORTS_SIZE = 48
_SCTP_SIZE = 328
_ADDRTYPE_SIZE = 40
_CONNTRACK_SIZE = 200
_MARK_SIZE = 48
_LOCAL = 1 << 2  # XT_ADDRTYPE_LOCAL is 1 << RTN_LOCAL
_LINK_SIZE = 16  # IFNAMSIZ
_NO_LINK = bytes(_LINK_SIZE)
_CT_STATE = 1  # XT_CONNTRACK_STATE
_CT_BITS = {"NEW": 8, "ESTABLISHED": 2, "DNAT": 128}
_DNAT = struct.Struct("=I16s16s2s2s8x")
_MAP_IPS_AND_PORTS = 3  # NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED
_REASONS: dict[Family, dict[str, int]] = {"IPv4": {REJECT: 3, RESET: 7}, "IPv6": {REJECT: 4, RESET: 6}}
#: What libiptc makes of the plain verdicts when a table is read: -NF_DROP-1, -NF_ACCEPT-1, XT_RETURN.
_VERDICTS = {-1: DROP, -2: ACCEPT, -5: RETURN}


def _extension(name: str, revision: int, data: bytes, size: int) -> bytes:
    return (_EXTENSION.pack(size, name.encode(), revision) + data).ljust(size, b"\0")


@lru_cache(maxsize=256)
def _comment(text: str) -> bytes:
    return _extension("comment", 0, text.encode("ascii"), _COMMENT_SIZE)


@lru_cache(maxsize=4096)
def _port(protocol: Protocol, port: int) -> bytes:
    if protocol == "SCTP":
        # dpts, spts, chunkmap, chunk_match_type, four unused flag_info, flag_count, flags, invflags
        data = struct.pack("=HHHH256xI12sIII", port, port, 0, 0, 0, b"\xff\0\0" * 4, 0, 2, 0)
        return _extension("sctp", 0, data, _SCTP_SIZE)
    return _extension(protocol.lower(), 0, struct.pack("=HHHH", 0, 65535, port, port), _PORTS_SIZE)


@lru_cache(maxsize=8)
def _addrtype(source: bool, destination: bool) -> bytes:
    data = struct.pack("=HHI", _LOCAL * source, _LOCAL * destination, 0)
    return _extension("addrtype", 1, data, _ADDRTYPE_SIZE)


@lru_cache(maxsize=8)
def _conntrack(state: State) -> bytes:
    inverted = state.startswith("!")
    # Eight addresses, two times and five ports are unused, and so is what follows the state's bits.
    data = struct.pack("=128x8x10xHHHH", _CT_STATE, _CT_STATE * inverted, _CT_BITS[state.lstrip("!")], 0)
    return _extension("conntrack", 3, data, _CONNTRACK_SIZE)


#: mark, mask, invert
_UNMARKED = _extension("mark", 1, struct.pack("=IIB", PROXY_MARK, PROXY_MARK, 1), _MARK_SIZE)


@lru_cache(maxsize=16384)
def _target(family: Family, target: Target | str) -> bytes:
    if isinstance(target, Target):
        address = socket.inet_pton(_AF[family], target.address)
        port = target.port.to_bytes(2, "big")
        return _extension("DNAT", 2, _DNAT.pack(_MAP_IPS_AND_PORTS, address, address, port, port), 80)
    if target in (REJECT, RESET):
        return _extension("REJECT", 0, struct.pack("=I", _REASONS[family][target]), 40)
    return _extension(target, 0, b"", 40)


@lru_cache(maxsize=1024)
def _network(cidr: str) -> tuple[bytes, bytes]:
    network = ip_network(cidr)
    return network.network_address.packed, network.netmask.packed


@lru_cache(maxsize=64)
def _link(name: str) -> tuple[bytes, bytes]:
    """As ``xtables_parse_interface`` has it: the ``+`` stays, but is not looked at; a whole name ends with a zero."""
    looked = len(name) - 1 if name.endswith("+") else len(name) + 1
    return name.encode("ascii").ljust(_LINK_SIZE, b"\0"), (b"\xff" * looked).ljust(_LINK_SIZE, b"\0")


def pack(entry: Entry) -> bytes:
    """The bytes of a rule, as libiptc takes them for an append: counters zero, plain verdicts by name."""
    family = entry.family
    source, sourceMask = _network(entry.source) if entry.source else (_ANY[family], _ANY[family])
    if "/" in entry.destination:
        destination, destinationMask = _network(entry.destination)
    elif entry.destination:
        destination, destinationMask = socket.inet_pton(_AF[family], entry.destination), _ONE[family]
    else:
        destination = destinationMask = _ANY[family]
    link, linkMask = _link(entry.interface) if entry.interface else (_NO_LINK, _NO_LINK)
    matches = _comment(entry.comment)
    number = 0
    if entry.protocol is not None:
        number = _NUMBERS[entry.protocol]
        if entry.port:
            matches += _port(entry.protocol, entry.port)
    if entry.sourceLocal or entry.destinationLocal:
        matches += _addrtype(entry.sourceLocal, entry.destinationLocal)
    if entry.state:
        matches += _conntrack(entry.state)
    if entry.unmarked:
        matches += _UNMARKED
    target = _target(family, entry.target)
    at = HEAD[family] + len(matches)
    end = at + len(target)
    where = (source, destination, sourceMask, destinationMask, link, linkMask, number)
    if family == "IPv4":
        head = _HEAD4.pack(*where, 0, 0, 0, at, end, 0)
    else:
        head = _HEAD6.pack(*where, 0, _F_PROTO if number else 0, 0, 0, at, end, 0)
    return head + matches + target


def normalised(family: Family, data: bytes, jump: str = "") -> bytes:
    """
    Bytes that were read from a table as :func:`pack` gives them, so that they can be compared.

    :param jump: the chain that the rule leads to, where it leads to one: the bytes only have an offset then.
    """
    if len(data) < HEAD[family]:
        raise UnknownBytes("too short for a rule")
    nfcache, head = _NFCACHE[family], HEAD[family]
    at, end = _OFFSETS.unpack_from(data, nfcache + 4)
    if not head <= at <= len(data) - _EXTENSION.size or end != len(data):
        raise UnknownBytes("its offsets lead nowhere")
    clean = bytearray(data)
    clean[nfcache : nfcache + 4] = bytes(4)
    clean[nfcache + 8 : head] = bytes(head - nfcache - 8)
    position = head
    while position < at:
        _cleanName(clean, position)
        (size,) = _SIZE.unpack_from(clean, position)
        if size < _EXTENSION.size:
            raise UnknownBytes("a match has no size")
        position += size
    if clean[at + 2]:  # an extension has a name; a plain verdict or a jump has none
        _cleanName(clean, at)
        return bytes(clean)
    name = jump or _VERDICTS.get(struct.unpack_from("=i", clean, at + _EXTENSION.size)[0])
    if name is None:
        raise UnknownBytes("it has a verdict that is never written")
    return bytes(clean[:at]) + _target(family, name)


def _cleanName(data: bytearray, position: int) -> None:
    """The kernel gives a name up to its end; what follows is what lay in the reader's memory."""
    start, stop = position + 2, position + 31
    end = data.find(0, start, stop)
    if end >= 0:
        data[end:stop] = bytes(stop - end)


# --- reading ---------------------------------------------------------------------------------------------------------


def parse(family: Family, data: bytes) -> Entry:
    """
    What :func:`normalised` bytes say. It looks only at what tells one shape from another; whoever must know that
    nothing else is in them packs the entry and compares.

    :raise UnknownBytes: where they have another shape.
    """
    try:
        return _parse(family, data)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, IndexError) as error:
        raise UnknownBytes(str(error)) from None


def _parse(family: Family, data: bytes) -> Entry:
    width = len(_ANY[family])
    source = _cidr(family, data[:width], data[2 * width : 3 * width])
    mask = data[3 * width : 4 * width]
    if mask == _ONE[family]:
        destination = socket.inet_ntop(_AF[family], data[width : 2 * width])
    else:
        destination = _cidr(family, data[width : 2 * width], mask)
    start = _LINK[family]
    interface = ""
    if data[start + 2 * _LINK_SIZE : start + 3 * _LINK_SIZE] != _NO_LINK:
        interface = data[start : start + _LINK_SIZE].rstrip(b"\0").decode("ascii")
    number = struct.unpack_from("=H", data, _PROTO[family])[0]
    at, _ = _OFFSETS.unpack_from(data, _NFCACHE[family] + 4)
    position = HEAD[family]
    protocol = _PROTOCOLS[number] if number else None
    comment, port, sourceLocal, destinationLocal, state, unmarked = "", 0, False, False, "", False
    while position < at:
        size, raw, _ = _EXTENSION.unpack_from(data, position)
        name = raw.split(b"\0", 1)[0]
        inside = position + _EXTENSION.size
        if name == b"comment":
            comment = data[inside : position + size].rstrip(b"\0").decode("ascii")
        elif name in (b"tcp", b"udp"):
            port = struct.unpack_from("=H", data, inside + 4)[0]
        elif name == b"sctp":
            port = struct.unpack_from("=H", data, inside)[0]
        elif name == b"addrtype":
            kinds = struct.unpack_from("=HH", data, inside)
            sourceLocal, destinationLocal = kinds[0] == _LOCAL, kinds[1] == _LOCAL
        elif name == b"conntrack":
            state = _stateIn(data, inside)
        elif data[position : position + size] == _UNMARKED:
            unmarked = True
        else:
            raise UnknownBytes(f"it has a match {name!r}")
        if size < _EXTENSION.size:
            raise UnknownBytes("a match has no size")
        position += size
    return Entry(
        family, comment, _targetIn(family, data, at), source, destination, protocol, port, sourceLocal,
        destinationLocal, state, unmarked, interface,  # type: ignore[arg-type]
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _cidr(family: Family, address: bytes, mask: bytes) -> str:
    if mask == _ANY[family]:
        return ""
    length = int.from_bytes(mask, "big").bit_count()
    return f"{socket.inet_ntop(_AF[family], address)}/{length}"


def _stateIn(data: bytes, inside: int) -> str:
    _, inverted, bits = struct.unpack_from("=HHH", data, inside + 146)
    for word, bit in _CT_BITS.items():
        if bits == bit:
            return "!" + word if inverted else word
    raise UnknownBytes("it asks for a state that is never written")


def _targetIn(family: Family, data: bytes, at: int) -> Target | str:
    _, raw, _ = _EXTENSION.unpack_from(data, at)
    name = raw.split(b"\0", 1)[0]
    if name == b"DNAT":
        _, low, _, port, _ = _DNAT.unpack_from(data, at + _EXTENSION.size)
        return Target(socket.inet_ntop(_AF[family], low[: len(_ANY[family])]), int.from_bytes(port, "big"))
    if name == b"REJECT":
        reason = struct.unpack_from("=I", data, at + _EXTENSION.size)[0]
        for word, number in _REASONS[family].items():
            if number == reason:
                return word
        raise UnknownBytes("it rejects in a way that is never written")
    return str(name.decode("ascii"))
