"""Hearing of changes that others make to our table (multicast group ``NFNLGRP_NFTABLES``)."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..netlink import NETLINK_NETFILTER, SOL_NETLINK, SocketOpener, attributes, messages
from .elements import NFTABLES

_ADD_MEMBERSHIP = 1
_GROUP = 7
_ATTACH_FILTER = 26
_STRUCTURE = {0, 2, 3, 5, 6, 8, 9, 11}  # new and gone: tables, chains, rules, sets
_ELEMENTS = {12, 14}


@implementer(IReadDescriptor)
class TableWatch:
    """
    Calls back when somebody else has changed our table.

    :param changed: called with whether more than elements has changed; soon after the first of a burst, once.
    :ivar SETTLE: seconds that a burst may last before the call.
    """

    log = Logger()
    SETTLE = 0.05

    def __init__(self, reactor: Any, opener: SocketOpener, table: str, changed: Callable[[bool], None]) -> None:
        self._reactor = reactor
        self._table = table.encode() + b"\0"
        self._changed = changed
        self._programs: deque[int] = deque(maxlen=16)
        self._sockets: deque[int] = deque(maxlen=4)  # apart: any number of programs must not push them out
        self._timer: Any = None
        self._structure = False
        self._socket = opener(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
        )
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        except BaseException:
            self._socket.close()
            raise
        reactor.addReader(self)

    def stop(self) -> None:
        """No call any more."""
        if self._socket.fileno() < 0:
            return
        self._reactor.removeReader(self)
        self._socket.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def own(self, port: int, lasting: bool = False) -> None:
        """
        What that port changes is our own doing. The kernel filters the last few of them out: a full load would overflow
        the queue.

        :param port: the process id of a program, which is its netlink port.
        :param lasting: it is that of a netlink socket which stays open.
        """
        if lasting:
            if port in self._sockets:
                return
            self._sockets.append(port)
        else:
            if port in self._programs:
                return
            self._programs.append(port)
        ports = [*self._sockets, *self._programs]
        # Classic BPF: ld [12] (nlmsg_pid); jeq port → drop …; keep.
        program = [struct.pack("=HBBI", 0x20, 0, 0, 12)]
        for n, it in enumerate(ports):
            seen = int.from_bytes(struct.pack("=I", it), "big")
            program.append(struct.pack("=HBBI", 0x15, len(ports) - n, 0, seen))
        program.append(struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF))
        program.append(struct.pack("=HBBI", 0x06, 0, 0, 0))
        code = ctypes.create_string_buffer(b"".join(program))
        where = struct.pack("@HP", len(program), ctypes.addressof(code))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, where)
        except OSError as error:
            self.log.debug("Own changes are not filtered by the kernel: {error}.", error=error)

    # --- IReadDescriptor ---

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "nftables watch"

    def doRead(self) -> None:
        for _turn in range(64):
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # something was lost: it may have been about us
                    self._seen(True)
                    continue
                raise
            for kind, _flags, _sequence, sender, payload in messages(data):
                if kind >> 8 != NFTABLES or sender in self._sockets or sender in self._programs:
                    continue
                what = kind & 0xFF
                if what not in _STRUCTURE and what not in _ELEMENTS:
                    continue
                if dict(attributes(payload, 4)).get(1) == self._table:
                    self._seen(what in _STRUCTURE)

    def connectionLost(self, reason: Failure) -> None:
        self.log.warn("The watch over the rules has ended: {reason}.", reason=reason.value)
        self.stop()

    def _seen(self, structure: bool) -> None:
        self._structure = self._structure or structure
        if self._timer is None:
            self._timer = self._reactor.callLater(self.SETTLE, self._tell)

    def _tell(self) -> None:
        self._timer = None
        structure, self._structure = self._structure, False
        self._changed(structure)
