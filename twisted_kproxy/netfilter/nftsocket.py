"""The way to our table's elements over a netlink socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from msgspec import Struct

from ..core.rules import Guard, Ruleset
from . import nftelements, nftreading
from .netlink import Interrupted, NetlinkSocket, SocketOpener
from .nftelements import Elements
from .nftlayout import (
    ALLOWED,
    BREATH,
    CLUSTER_IPS,
    GUARDS,
    MAPS,
    NETWORKS,
    RESTRICTED,
    SETS,
    SINGLE,
    Element,
    Item,
    Step,
    Unreadable,
    Value,
    gathering,
    localityOf,
)
from .ruleset import canonicalNetworks
from .slices import Slices


class Collected(Struct, frozen=True):
    """
    Every element, as the kernel told of it.

    :ivar generation: of the ruleset that they are from.
    :ivar answers: set → the answers to a dump of it.
    """

    generation: int
    answers: dict[str, list[bytes]]


class ElementSocket:
    """
    Reads and writes elements. What blocks may be called from any one thread at a time; what takes long without
    blocking comes in slices.

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

    # --- what blocks ---

    def commit(self, elements: Elements, generation: int | None = None) -> None:
        """
        Carry out a step, all of it or nothing.

        :param generation: see :func:`~twisted_kproxy.netfilter.nftelements.batch`.
        :raise Refused: when the kernel says no.
        :raise OSError: when it is not known whether it was carried out.
        """
        with self._lock:
            netlink = self.open()
            first = netlink.numbers(1)
            data, last = nftelements.batch(self._table, elements, first, generation)
            netlink.numbers(last - first + 1)
            if data:
                netlink.request(data, first, last)

    def collect(self) -> Collected:
        """
        Ask for every element.

        :raise Interrupted: when the table changes faster than it can be read.
        :raise OSError: when the kernel says no.
        """
        with self._lock:
            netlink = self.open()
            for _try in range(5):
                try:
                    generation = netlink.generation()
                    return Collected(generation, {name: list(self._answers(netlink, name)) for name in SETS})
                except Interrupted:
                    continue
            raise Interrupted()

    def _answers(self, netlink: NetlinkSocket, name: str) -> Iterator[bytes]:
        question = nftreading.question(self._table, name)
        return netlink.dump(nftelements.GETSETELEM, nftelements.INET, question)

    # --- what takes long ---

    @staticmethod
    def reading(collected: Collected, links: tuple[str, ...] = ()) -> Slices[Ruleset]:
        """
        The ruleset in what was collected.

        :param links: of insiders, which are no elements.
        :raise Unreadable: when it is not such as we write.
        """
        elements: list[Element] = []
        for name in MAPS:
            reader = nftreading.MapReader(name)
            for answer in collected.answers[name]:
                elements += reader.read(answer)
                yield
        guards: set[Guard] = set()
        for name in (*RESTRICTED, *ALLOWED, *GUARDS):
            for answer in collected.answers[name]:
                for it in nftreading.elementsIn(answer):
                    item, _none = nftreading.decode(name, it)
                    if isinstance(item, Guard):
                        guards.add(item)
                    else:
                        elements.append((name, item, None))
                yield
        clusterIPs: set[str] = set()
        for name in CLUSTER_IPS:
            for answer in collected.answers[name]:
                clusterIPs.update(nftreading.addresses(name, answer))
                yield
        networks = {name: _networks(collected, name) for name in NETWORKS}
        rules = yield from gathering(elements)
        return Ruleset(rules, frozenset(guards), frozenset(clusterIPs), localityOf(networks, links))

    @staticmethod
    def mending(collected: Collected, whole: Step) -> Slices[Step]:
        """
        The step from what was collected, whatever it is, to what shall be: of damage no more than was damaged.

        :param whole: what :func:`~twisted_kproxy.netfilter.nftlayout.wholeStep` gives.
        """
        wanted: dict[tuple[str, Item], Value | None] = {}
        for count, (name, item, value) in enumerate(whole.added):
            wanted[name, item] = value
            if not count % BREATH:
                yield
        removed: list[tuple[str, Item]] = []
        strange: list[tuple[str, bytes, bytes]] = []
        for name in SINGLE:
            for answer in collected.answers[name]:
                for count, it in enumerate(nftreading.elementsIn(answer)):
                    try:
                        item, value = nftreading.decode(name, it)
                    except Unreadable:
                        strange.append((name, it.key, it.last))
                        continue
                    if (name, item) in wanted and wanted[name, item] == value:
                        del wanted[name, item]
                    else:
                        removed.append((name, item))
                    if not count % BREATH:
                        yield
        return Step(
            removed,
            [(name, item, value) for (name, item), value in wanted.items()],
            {name: it for name, it in whole.networks.items() if canonicalNetworks(_networks(collected, name)) != it},
            strange,
        )


def _networks(collected: Collected, name: str) -> list[str]:
    return nftreading.decodeNetworks(
        it for answer in collected.answers[name] for it in nftreading.elementsIn(answer)
    )
