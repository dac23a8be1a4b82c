"""
What rules do with one packet that opens a connection, by reading them: no kernel. A reader of rules
(:mod:`tests.fakes.nfttracer`, :mod:`tests.fakes.xttracer`) gives their chains; here is the way of a packet through the
hooks. Whatever a reader does not understand is an error, so that nothing is passed over.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection
from typing import Literal

from msgspec import Struct

Verdict = Literal["accept", "drop", "reject"]


class NotUnderstood(Exception):
    """Rules that a tracer does not know the meaning of."""


class Packet(Struct):
    """
    The first packet of a connection. Rules change its destination.

    :ivar source: its source address.
    :ivar link: the interface that it comes in by; ``""`` for what the node itself sends.
    :ivar local: the node's own addresses.
    :ivar rewritten: a rule has changed where it goes.
    :ivar judged: rules about addresses have been asked; for one connection they are asked once.
    """

    source: str
    address: str
    port: int
    protocol: str = "TCP"
    link: str = ""
    local: frozenset[str] = frozenset()
    mark: int = 0
    rewritten: bool = False
    judged: bool = False

    @property
    def version(self) -> int:
        return 6 if ":" in self.address else 4

    def isLocal(self, address: str) -> bool:
        """Whether an address is the node's own."""
        return address in self.local or ipaddress.ip_address(address).is_loopback


class Chain(Struct):
    """
    A chain that the kernel calls.

    :ivar run: what it says of a packet; rewrites it.
    :ivar version: of the packets that it gets, 4 or 6; 0 for both.
    """

    hook: str
    priority: int
    isNat: bool
    run: Callable[[Packet], Verdict]
    version: int = 0


class Fate(Struct, frozen=True):
    """
    Where a packet ends: ``accept``: it goes to that address and port.

    :ivar hook: where it was stopped.
    :ivar isHere: it arrives on this node.
    """

    verdict: Verdict
    address: str
    port: int
    rewritten: bool
    isHere: bool
    hook: str = ""


HOOKS = ("prerouting", "input", "forward", "output", "postrouting")


def trace(chains: Collection[Chain], packet: Packet) -> Fate:
    """The way of a packet through the hooks of a node. Everybody else's rules let everything pass."""
    strange = {it.hook for it in chains} - set(HOOKS)
    if strange:
        raise NotUnderstood(f"chains in the hooks {strange}")

    def through(hook: str) -> Fate | None:
        for chain in sorted((it for it in chains if it.hook == hook), key=lambda it: it.priority):
            if (chain.isNat and packet.judged) or chain.version not in (0, packet.version):
                continue
            before = packet.address, packet.port
            verdict = chain.run(packet)
            if chain.isNat and (packet.address, packet.port) != before:
                packet.rewritten = True
            packet.judged |= chain.isNat
            if verdict != "accept":
                return Fate(verdict, packet.address, packet.port, packet.rewritten, False, hook)
        return None

    fromHere = not packet.link
    stopped = through("output" if fromHere else "prerouting")
    if stopped:
        return stopped
    here = packet.isLocal(packet.address)
    hooks = ("input",) if here else ("forward", "postrouting")
    if fromHere:
        hooks = ("postrouting", "prerouting", "input") if here else ("postrouting",)
        packet.link = "lo" if here else ""
    for hook in hooks:
        stopped = through(hook)
        if stopped:
            return stopped
    return Fate("accept", packet.address, packet.port, packet.rewritten, here)
