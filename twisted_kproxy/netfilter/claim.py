"""
One daemon at a time writes rules in a network namespace.

The claim is an abstract Unix socket (:manpage:`unix(7)`): such names belong to a network namespace, as the rules do, so
that a daemon in a container with the host's network and one beside it see each other, and two nodes on one machine do
not; no file system has to be shared or writable; and the kernel gives the name free when its holder dies, however that
comes.
"""

from __future__ import annotations

import errno
import socket
import struct

from twisted.logger import Logger

from ..interfaces import NotAvailable
from .netlink import SocketOpener

NAME = "\0kproxy-rules"
_CREDENTIALS = struct.Struct("=3i")
_CAP_NET_ADMIN = 12


class NamespaceClaim:
    """
    :param openSocket: opens the socket; another one than :class:`socket.socket` may open it in another namespace.
    """

    log = Logger()

    def __init__(self, openSocket: SocketOpener = socket.socket) -> None:
        self._opener = openSocket
        self._socket: socket.socket | None = None

    def take(self) -> None:
        """:raise NotAvailable: where another daemon has it, naming the process."""
        if self._socket is not None:
            return
        it = self._open()
        try:
            it.bind(NAME)
            it.listen(1)
        except OSError as error:
            it.close()
            if error.errno != errno.EADDRINUSE:
                raise NotAvailable(f"the claim to write rules could not be made: {error}") from error
            self._judge(self._holder())
            return
        self._socket = it

    def release(self) -> None:
        """Give it back; twice is harmless."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        return self._opener(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)

    def _holder(self) -> int:
        """The process that has it; 0 where that cannot be told."""
        with self._open() as it:
            try:
                it.connect(NAME)
                raw = it.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            except OSError:
                return 0
        pid: int = _CREDENTIALS.unpack(raw)[0]
        return pid

    def _judge(self, pid: int) -> None:
        """Anybody may bind the name. Who could not write a rule anyway must not keep others from it."""
        if pid and not _mayWriteRules(pid):
            self.log.warn(
                "Process {pid} holds the name by which kproxy tells that it is running, but has no right to write "
                "rules: it is not believed.",
                pid=pid,
            )
            return
        who = f"process {pid}" if pid else "of another process namespace"
        raise NotAvailable(
            f"another kproxy ({who}) writes rules in this network namespace already: two would undo each other's work. "
            "Stop it first"
        )


def _mayWriteRules(pid: int) -> bool:
    """Where that cannot be told, it may."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    except (OSError, ValueError, IndexError):
        pass
    return True
