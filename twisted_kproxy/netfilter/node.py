"""The node's own addresses."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator

from msgspec import Struct

from ..core.values import Family
from .netlink import (
    HEADER,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SocketOpener,
    attribute,
    attributes,
    messages,
)

_SOCKETS: dict[Family, int] = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
#: Addresses for documentation (RFC 5737, RFC 3849): nobody has them, so they stand for the default route.
_FAR: dict[Family, str] = {"IPv4": "198.51.100.1", "IPv6": "2001:db8:ffff::1"}
_LOOPBACK: dict[Family, str] = {"IPv4": "127.0.0.1", "IPv6": "::1"}
_NETLINK_ROUTE = 0
_NEWADDR, _GETADDR = 20, 22
_GETROUTE = 26
_LOCAL_ROUTE = 2  # RTN_LOCAL
_TEMPORARY, _DEPRECATED, _TENTATIVE = 0x01, 0x20, 0x40


class Address(Struct, frozen=True):
    """
    An address of an interface.

    :ivar scope: 0 for global, 253 for the link, 254 for the host.
    """

    address: str
    scope: int
    flags: int


def primaryAddress(family: Family, openSocket: SocketOpener = socket.socket) -> str | None:
    """
    The address of this node to lead packets to: the one from which it would talk along its default route, else the
    first global one of an interface, else its loopback address.

    :return: canonical text; ``None`` where the node does not speak that family.
    """
    towards = sourceTowards(_FAR[family], openSocket)
    if towards is not None and _fits(towards):
        return towards
    try:
        known = list(addresses(family, openSocket))
    except OSError:
        known = []
    for it in known:
        if it.scope == 0 and not it.flags & (_TEMPORARY | _DEPRECATED | _TENTATIVE) and _fits(it.address):
            return it.address
    return _LOOPBACK[family] if any(it.address == _LOOPBACK[family] for it in known) else None


def sourceTowards(address: str, openSocket: SocketOpener = socket.socket) -> str | None:
    """
    The address of this node from which it would talk to another: what that one sees. Connecting a datagram socket
    sends nothing.

    :return: canonical text; ``None`` where there is no way there.
    """
    family: Family = "IPv6" if ":" in address else "IPv4"
    try:
        with openSocket(_SOCKETS[family], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0) as it:
            if family == "IPv6":
                try:
                    it.setsockopt(socket.IPPROTO_IPV6, 72, 2)  # IPV6_ADDR_PREFERENCES, IPV6_PREFER_SRC_PUBLIC
                except OSError:
                    pass
            it.connect((address, 9))
            return str(ipaddress.ip_address(it.getsockname()[0].partition("%")[0]))
    except OSError:
        return None


def ownAddresses(openSocket: SocketOpener = socket.socket) -> frozenset[str]:
    """The addresses of all interfaces of this node, canonical; none of a family that cannot be read."""
    found: set[str] = set()
    for family in _SOCKETS:
        try:
            found.update(it.address for it in addresses(family, openSocket))
        except OSError:
            continue
    return frozenset(found)


def _fits(address: str) -> bool:
    it = ipaddress.ip_address(address)
    return not (it.is_loopback or it.is_link_local or it.is_unspecified or it.is_multicast)


def addresses(family: Family, openSocket: SocketOpener = socket.socket) -> Iterator[Address]:
    """
    The addresses of this node's interfaces, in the kernel's order.

    :raise OSError: where they cannot be read.
    """
    with openSocket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as it:
        it.settimeout(5)
        it.bind((0, 0))
        question = struct.pack("=BBBBI", _SOCKETS[family], 0, 0, 0, 0)
        it.send(HEADER.pack(16 + len(question), _GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + question)
        while True:
            for kind, _flags, _sequence, _sender, payload in messages(it.recv(65536)):
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return
                if kind != _NEWADDR:
                    continue
                said, _length, flags, scope, _index = struct.unpack_from("=BBBBI", payload)
                parts = dict(attributes(payload, 8))
                raw = parts.get(2) or parts.get(1)  # the local one; the peer's on a point-to-point link is the other
                if said == _SOCKETS[family] and raw is not None:
                    if 8 in parts:
                        flags = struct.unpack("=I", parts[8])[0]
                    yield Address(str(ipaddress.ip_address(raw)), scope, flags)


class Localness:
    """
    Asks the kernel whether addresses are this node's own: whether its routes lead packets for them to itself. That is
    what rules about local addresses go by; an interface need not have the address. Blocks, for some microseconds.
    """

    def __init__(self, openSocket: SocketOpener = socket.socket) -> None:
        self._open = openSocket
        self._socket: socket.socket | None = None
        self._number = 0

    def isLocal(self, address: bytes) -> bool:
        """Whether it is; ``False`` also where no route leads there at all."""
        if self._socket is None:
            self._socket = self._open(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
            self._socket.settimeout(5)
            self._socket.bind((0, 0))
        self._number += 1
        family, bits = (socket.AF_INET, 32) if len(address) == 4 else (socket.AF_INET6, 128)
        asked = struct.pack("=BBBBBBBBI", family, bits, 0, 0, 0, 0, 0, 0, 0) + attribute(1, address)
        self._socket.send(HEADER.pack(16 + len(asked), _GETROUTE, NLM_F_REQUEST, self._number, 0) + asked)
        while True:
            for kind, _flags, number, _sender, payload in messages(self._socket.recv(65536)):
                if number == self._number:
                    return kind != NLMSG_ERROR and payload[7] == _LOCAL_ROUTE

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
