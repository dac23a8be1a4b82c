"""
A netlink socket to netfilter: messages, attributes, requests and dumps (RFC 3549; ``include/uapi/linux/netlink.h``,
``include/uapi/linux/netfilter/nfnetlink.h``). All calls block; the kernel answers a request before ``send`` returns,
so small ones are fine in the reactor, and dumps belong into a thread.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import TypeAlias

#: Opens a socket: ``opener(family, type, protocol)``. Another one than :class:`socket.socket` may open it in another
#: network namespace.
SocketOpener: TypeAlias = Callable[[int, int, int], socket.socket]

NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
SO_SNDBUFFORCE = 32

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400

_GETGEN = 10 << 8 | 16
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_ACK_TLVS = 0x200
NLM_F_CAPPED = 0x100

NESTED = 0x8000

HEADER = struct.Struct("=IHHII")
GENERIC = struct.Struct(">BBH")
ATTRIBUTE = struct.Struct("=HH")
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")


class Refused(OSError):
    """The kernel's no: ``errno``, and its own words where it has any."""


class Interrupted(Exception):
    """What is dumped has changed meanwhile; the dump has to be made anew."""


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return ATTRIBUTE.pack(len(payload) + 4, kind) + payload + _PAD[len(payload) & 3]


def text(kind: int, value: str) -> bytes:
    """An attribute of zero-terminated text."""
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, flags: int, sequence: int, family: int, payload: bytes = b"", resource: int = 0) -> bytes:
    """One message of a netfilter subsystem; ``kind`` is subsystem << 8 | type."""
    return HEADER.pack(len(payload) + 20, kind, flags, sequence, 0) + GENERIC.pack(family, 0, resource) + payload


def attributes(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes in a payload, without their flags."""
    end = len(data)
    while start + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & 0x3FFF, data[start + 4 : start + length]
        start += (length + 3) & ~3


def messages(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """The messages in what was received: type, flags, sequence, port of the sender, payload."""
    start, end = 0, len(data)
    while start + 16 <= end:
        length, kind, flags, sequence, sender = HEADER.unpack_from(data, start)
        if length < 16 or start + length > end:
            return
        yield kind, flags, sequence, sender, data[start + 16 : start + length]
        start += (length + 3) & ~3


class NetlinkSocket:
    """
    One socket, for one thread at a time.

    :param opener: see :data:`SocketOpener`.
    :param limit: seconds after which a silent kernel is given up.
    :ivar port: the number under which the kernel knows it; what others see of our changes carries it.
    """

    def __init__(self, opener: SocketOpener = socket.socket, limit: float = 5.0) -> None:
        self._socket = opener(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._limit = limit
            self._socket.settimeout(limit)
            self._socket.bind((0, 0))
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            self.port: int = self._socket.getsockname()[0]
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0
        self._sendBuffer = 0

    def close(self) -> None:
        self._socket.close()

    def numbers(self, count: int) -> int:
        """Reserve so many sequence numbers; gives the first."""
        first = self._sequence + 1
        self._sequence += count
        return first

    def request(self, data: bytes, first: int, last: int) -> None:
        """
        Send messages numbered from ``first`` to ``last``, the last of which asks for an acknowledgement.

        :raise Refused: with the first error.
        :raise OSError: when the socket fails; whether the request was carried out is not known then.
        """
        self._makeRoom(len(data))
        self._socket.send(data)
        while True:
            for kind, flags, sequence, _sender, payload in messages(self._socket.recv(65536)):
                if kind != NLMSG_ERROR or not first <= sequence <= last:
                    continue
                error = self._error(payload, flags)
                if error is not None:
                    self._drain()
                    raise error
                if sequence == last:
                    return

    def generation(self) -> int:
        """
        The number of the ruleset of nf_tables, which each change of anybody makes another
        (``NFT_MSG_GETGEN``).

        :raise OSError: when the kernel does not say.
        """
        number = self.numbers(1)
        self._socket.send(message(_GETGEN, NLM_F_REQUEST, number, 0))
        while True:
            for kind, flags, sequence, _sender, payload in messages(self._socket.recv(65536)):
                if sequence != number:
                    continue
                if kind == NLMSG_ERROR:
                    raise self._error(payload, flags) or OSError(errno.EPROTO, "no generation was given")
                return int.from_bytes(dict(attributes(payload, 4)).get(1, b""), "big")

    def buffers(self, kind: int, family: int, payload: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """
        Ask for a dump and give what comes as it comes, with the number of the request: some hundred messages at once.
        Whether the dump was consistent is not told.

        :raise Refused: when the kernel says no.
        """
        number = self.numbers(1)
        self._socket.send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, number, family, payload))
        while True:
            data = self._socket.recv(1 << 18)
            _length, what, flags, sequence, _sender = HEADER.unpack_from(data)
            if what in (NLMSG_DONE, NLMSG_ERROR):
                if sequence != number:
                    continue
                error = self._error(data[16:], flags)
                if error is not None:
                    raise error
                return
            yield data, number
            # Dumps that end with the last of their messages have it behind those; others in a buffer of its own.
            length, what, _flags, sequence, _sender = HEADER.unpack_from(data, max(0, len(data) - 20))
            if (length, what, sequence) == (20, NLMSG_DONE, number):
                return

    def dump(self, kind: int, family: int, payload: bytes = b"") -> Iterator[bytes]:
        """
        Ask for a dump and give the payload of each answer, behind the netfilter header.

        :raise Interrupted: at the end, when the kernel says that it was not consistent.
        :raise Refused: when it says no.
        """
        number = self.numbers(1)
        self._socket.send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, number, family, payload))
        torn = False
        while True:
            for what, flags, sequence, _sender, answer in messages(self._socket.recv(1 << 18)):
                if sequence != number:
                    continue
                torn = torn or bool(flags & NLM_F_DUMP_INTR)
                if what == NLMSG_DONE:
                    code = struct.unpack_from("=i", answer)[0] if len(answer) >= 4 else 0
                    if code:
                        raise Refused(-code, os.strerror(-code))
                    if torn:
                        raise Interrupted()
                    return
                if what == NLMSG_ERROR:
                    error = self._error(answer, flags)
                    if error is not None:
                        raise error
                    return
                yield answer[4:]

    def answers(self, data: bytes, first: int, last: int) -> list[int]:
        """Send messages that all ask for an acknowledgement; gives the errno of each, 0 for done."""
        self._makeRoom(len(data))
        self._socket.send(data)
        found: dict[int, int] = {}
        while len(found) <= last - first:
            for kind, _flags, sequence, _sender, payload in messages(self._socket.recv(65536)):
                if kind == NLMSG_ERROR and first <= sequence <= last:
                    found[sequence] = -struct.unpack_from("=i", payload)[0]
        return [found[number] for number in range(first, last + 1)]

    def _makeRoom(self, size: int) -> None:
        wanted = size + 4096
        if wanted <= max(self._sendBuffer, 65536):
            return
        for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, option, wanted)
            except PermissionError:
                continue
            self._sendBuffer = wanted
            return

    def _drain(self) -> None:
        """Throw away what is queued, without waiting (with a time-out set, Python waits whatever the flags say)."""
        self._socket.settimeout(0)
        try:
            while True:
                try:
                    self._socket.recv(65536)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        return
        finally:
            self._socket.settimeout(self._limit)

    @staticmethod
    def _error(payload: bytes, flags: int) -> Refused | None:
        code = -struct.unpack_from("=i", payload)[0]
        if not code:
            return None
        words = os.strerror(code)
        if flags & NLM_F_ACK_TLVS:
            start = 4 + 16
            if not flags & NLM_F_CAPPED:
                start = 4 + ((struct.unpack_from("=I", payload, 4)[0] + 3) & ~3)
            for kind, value in attributes(payload, start):
                if kind == 1:
                    words += f" ({value.rstrip(bytes(1)).decode(errors='replace')})"
        return Refused(code, words)
