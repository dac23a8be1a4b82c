"""What the sockets of the userspace dataplane have in common: how they are opened, tuned, reset and read for errors."""

from __future__ import annotations

import _socket
import errno
import select
import socket
import struct

from twisted.internet.error import CannotListenError
from twisted.logger import Logger

from ..core.rules import PROXY_MARK
from ..core.values import Family

_log = Logger()
_PlainSocket = _socket.socket

#: Of a listening TCP socket; the kernel takes the smaller of this and ``net.core.somaxconn``.
BACKLOG = 4096

#: The machine, not the other side, is short of something.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: With these an established connection fails whose other side is not there any more.
VANISHED = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})

_FAMILIES: dict[Family, socket.AddressFamily] = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
_WILDCARDS: dict[Family, str] = {"IPv4": "0.0.0.0", "IPv6": "::"}

# A side that vanished without a word is found out after 60 + 4 * 15 seconds.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
_LINGER_ZERO = struct.pack("ii", 1, 0)


def openSocket(*arguments: int) -> socket.socket:
    """
    A socket without what the class of the standard library adds to that of the interpreter (``makefile()``,
    enumerations): making one takes half of the time. ``openSocket(family, kind, protocol, descriptor)``.
    """
    return _PlainSocket(*arguments)  # type: ignore[return-value]


def familyOf(address: str) -> socket.AddressFamily:
    """The socket family of an address in canonical text."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def wildcard(family: Family) -> str:
    """The address that stands for every address of the family."""
    return _WILDCARDS[family]


def keepAlive(sock: socket.socket) -> None:
    """Keepalive probes after 60 s of silence, 4 of them, 15 s apart. Never raises."""
    try:
        for level, option, value in _KEEPALIVE:
            sock.setsockopt(level, option, value)
    except OSError:
        pass  # It is dead already.


def noDelay(sock: socket.socket) -> None:
    """No Nagle delay, and whatever waits for more goes out now. Never raises."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        pass  # It is dead already, or no TCP socket.


# As plain numbers: members of an enumeration are looked at twice, and this is done for each connection.
_SOCKET, _MARK = int(socket.SOL_SOCKET), int(socket.SO_MARK)
_TCP, _QUICKACK = int(socket.IPPROTO_TCP), int(socket.TCP_QUICKACK)


def quickAck(sock: socket.socket) -> None:
    """
    Acknowledge at once again, once the bytes with which the last word of the handshake was to go have been sent
    (:meth:`.dial.Dialer.dial`). An endpoint that writes its answer in pieces has to wait for that before the second one
    (Nagle's algorithm, RFC 9293, 3.7.4): for 40 ms otherwise. Never raises.
    """
    try:
        sock.setsockopt(_TCP, _QUICKACK, 1)
    except OSError:
        pass  # It is dead already.


class _Marking:
    """Whether the lack of the privilege was told already."""

    told = False


def markOwn(sock: socket.socket) -> None:
    """
    Mark what this socket sends as the proxy's own way to an endpoint (:data:`~twisted_kproxy.core.rules.PROXY_MARK`):
    no rule of ours leads it anywhere else. To be called before connecting.

    Needs CAP_NET_ADMIN (or CAP_NET_RAW, Linux 5.17 and later). Without it everything works but endpoints that are
    frontends of this node as well; that is logged once.
    """
    try:
        sock.setsockopt(_SOCKET, _MARK, PROXY_MARK)
    except PermissionError:
        if not _Marking.told:
            _Marking.told = True
            _log.warn(
                "Connections to endpoints cannot be marked, for want of CAP_NET_ADMIN: an endpoint whose address and "
                "port are a frontend as well leads back to this proxy, and is not served"
            )


def openListener(family: Family, port: int) -> socket.socket:
    """
    A listening, non-blocking TCP socket on every address of the family.

    No Nagle delay, and keepalive: on Linux an accepted socket inherits both, so they are set once here and never per
    connection.

    :raise OSError: when that cannot be; nothing is left open.
    """
    sock = socket.socket(_FAMILIES[family], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "IPv6":
            # The other family has a socket of its own, perhaps on the same port.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keepAlive(sock)
        sock.bind((_WILDCARDS[family], port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def resetClose(sock: socket.socket) -> None:
    """Close so that the other side sees a reset, not an end (SO_LINGER with time 0). Never raises."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    except OSError:
        pass  # It is dead already.
    sock.close()


def pendingError(sock: socket.socket) -> int:
    """The error number that waits on the socket; 0 for none. Reading it clears it."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError as error:
        return error.errno or errno.EBADF


def isDead(sock: socket.socket) -> bool:
    """Whether the kernel reports an error or a hang-up right now."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def errnoOf(error: Exception) -> int:
    """The error number in what opening a socket raised; 0 where there is none."""
    inner = error.socketError if isinstance(error, CannotListenError) else error
    return (inner.errno or 0) if isinstance(inner, OSError) else 0
