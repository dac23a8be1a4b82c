"""The way to our table's elements over a netlink socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..core.rules import Guard, Ruleset
from ..core.values import FrontendKey
from . import nftelements
from .netlink import Interrupted, NetlinkSocket, SocketOpener
from .nftlayout import GUARDS, INSIDERS, MAPS, Step, Value, gathered
from .ruleset import canonicalNetworks


class ElementSocket:
    """
    Reads and writes elements. Calls block, and may come from any one thread at a time.

    :param opened: called with the port of each socket that is opened.
    """

    def __init__(self, opener: SocketOpener, table: str, opened: Callable[[int], None]) -> None:
        self._opener = opener
        self._table = table
        self._opened = opened
        self._socket: NetlinkSocket | None = None
        self._lock = threading.Lock()

    @property
    def port(self) -> int | None:
        """What others see our changes come from; ``None`` while no socket is open."""
        return self._socket.port if self._socket is not None else None

    def open(self) -> NetlinkSocket:
        """
        The socket, opened when there is none.

        :raise OSError: where it cannot be.
        """
        if self._socket is None:
            self._socket = NetlinkSocket(self._opener)
            self._opened(self._socket.port)
        return self._socket

    def close(self) -> None:
        """Close the socket; the next call opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def commit(self, step: Step) -> None:
        """
        Carry out a step, all of it or nothing.

        :raise Refused: when the kernel says no.
        :raise OSError: when it is not known whether it was carried out.
        """
        with self._lock:
            netlink = self.open()
            first = netlink.numbers(1)
            data, last = nftelements.encode(self._table, step, first)
            netlink.numbers(last - first + 1)
            if data:
                netlink.request(data, first, last)

    def read(self) -> Ruleset:
        """
        Every element.

        :raise Interrupted: when the table changes faster than it can be read.
        :raise Unreadable: when it is not such as we write.
        :raise OSError: when the kernel says no.
        """
        with self._lock:
            for _try in range(5):
                try:
                    return self._readOnce(self.open())
                except Interrupted:
                    continue
            raise Interrupted()

    def _readOnce(self, netlink: NetlinkSocket) -> Ruleset:
        elements: list[tuple[str, FrontendKey, Value]] = []
        guards: set[Guard] = set()
        insiders: list[str] = []

        def answers(name: str) -> Iterator[bytes]:
            question = nftelements.question(self._table, name)
            return netlink.dump(nftelements.GETSETELEM, nftelements.INET, question)

        for name in MAPS:
            reader = nftelements.MapReader(name)
            for answer in answers(name):
                elements += reader.read(answer)
        for name in GUARDS:
            for answer in answers(name):
                guards |= {nftelements.decodeGuard(name, key) for key, _data, _ends in nftelements.elementsIn(answer)}
        for name in INSIDERS:
            insiders += nftelements.decodeInsiders(
                it for answer in answers(name) for it in nftelements.elementsIn(answer)
            )
        return Ruleset(gathered(elements), frozenset(guards), canonicalNetworks(insiders))
