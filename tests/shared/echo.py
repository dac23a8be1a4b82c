"""Sockets in the place of proxiers: they say who they are, from the address that they were reached at."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50


class EchoServers:
    """
    TCP and UDP sockets on the wildcard, served by one thread. TCP: ``name client-address`` and the end; UDP: the same
    as a datagram.

    :param opener: ``opener(family, type)`` gives a socket of the right namespace.
    """

    def __init__(self, opener: Callable[[int, int], socket.socket]) -> None:
        self._opener = opener
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def listen(self, name: str, family: int, kind: int, port: int = 0) -> int:
        """Open one; gives its port."""
        it = self._opener(family, kind)
        if family == socket.AF_INET6:
            it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif family == socket.AF_INET:
            it.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            it.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        it.bind(("", port))
        if kind == socket.SOCK_STREAM:
            it.listen(512)
        it.setblocking(False)
        self._selector.register(it, selectors.EVENT_READ, (name, kind))
        self._wake.send(b".")
        return int(it.getsockname()[1])

    def close(self) -> None:
        self._wake.close()
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _events in self._selector.select():
                if key.data is None:
                    if not self._woken.recv(64):
                        return
                    continue
                name, kind = key.data
                try:
                    if kind == socket.SOCK_STREAM:
                        client, address = key.fileobj.accept()  # type: ignore[union-attr]
                        with client:
                            client.sendall(f"{name} {address[0]}".encode())
                    else:
                        self._answer(key.fileobj, name)
                except OSError:
                    continue

    @staticmethod
    def _answer(it: Any, name: str) -> None:
        _data, ancillary, _flags, address = it.recvmsg(2048, 256)
        back = []
        for level, kind, data in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
                back.append((level, kind, struct.pack("=I4s4s", 0, data[8:12], bytes(4))))
            elif (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
                back.append((level, kind, data[:16] + bytes(4)))
        it.sendmsg([f"{name} {address[0]}".encode()], back, 0, address)


def ask(it: socket.socket, address: str, port: int, timeout: float = 3.0) -> str:
    """
    What is at a service: ``name client-address``, ``refused`` or ``timeout``.

    :param it: a fresh socket of the client's namespace; it is closed.
    """
    with it:
        it.settimeout(timeout)
        try:
            it.connect((address, port))
            if it.type == socket.SOCK_DGRAM:
                try:
                    it.send(b"who?")
                except PermissionError:
                    pass  # a rule on the sender's own host has stopped it; what it answered comes next
            return it.recv(200).decode() or "closed"
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return repr(error)
