"""Whether the tables of iptables may have changed, asked in some microseconds."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable

from ...core.values import Family
from ..netlink import NetlinkSocket, SocketOpener
from .layout import TABLES

SO_GET_INFO = 64
#: name, valid_hooks, hook_entry, underflow, num_entries, size
INFO = struct.Struct("=32sI5I5III")
_LEVELS: dict[Family, tuple[int, int]] = {
    "IPv4": (socket.AF_INET, socket.IPPROTO_IP),
    "IPv6": (socket.AF_INET6, socket.IPPROTO_IPV6),
}


def legacyCounts(opener: SocketOpener, family: Family, table: str) -> tuple[int, int]:
    """
    Number of rules and size in bytes of a legacy table. One that there is not comes into being by being asked for.

    :raise OSError: where the kernel does not say.
    """
    af, level = _LEVELS[family]
    with opener(af, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as it:
        buffer = ctypes.create_string_buffer(table.encode(), INFO.size)
        size = ctypes.c_uint32(INFO.size)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.getsockopt(it.fileno(), level, SO_GET_INFO, buffer, ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        fields = INFO.unpack(buffer.raw)
    return fields[12], fields[13]


def nftGeneration(opener: SocketOpener) -> int:
    """
    A number that grows with each change of nf_tables.

    :raise OSError: where the kernel does not say.
    """
    netlink = NetlinkSocket(opener)
    try:
        return netlink.generation()
    finally:
        netlink.close()


class TableSigns:
    """
    What tells, without reading any rule, that nobody was at the tables.

    :param opener: opens sockets; ``None`` for this process's own network namespace.
    """

    def __init__(self, variant: str, opener: SocketOpener | None) -> None:
        self._variant = variant
        self._opener = opener or socket.socket
        self._families: tuple[Family, ...] = ()
        self._signs: object = None

    def remember(self, families: Iterable[Family]) -> None:
        """This is how the tables are now; ``families`` are those that have our chains."""
        self._families = tuple(families)
        self._signs = self._now()

    def same(self) -> bool:
        """Whether they are as they were remembered; where that cannot be told they are not."""
        return self._signs is not None and self._now() == self._signs

    def close(self) -> None:
        self._signs = None

    def _now(self) -> object:
        try:
            if self._variant == "nft":
                return nftGeneration(self._opener)
            return [legacyCounts(self._opener, family, table) for family in self._families for table in TABLES]
        except OSError:
            return None
