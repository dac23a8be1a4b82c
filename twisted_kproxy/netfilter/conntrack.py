"""
Making the kernel forget established UDP flows (``include/uapi/linux/netfilter/nfnetlink_conntrack.h``).

A UDP flow is led where its first packet was led for as long as packets keep coming; new rules are for new flows. So
the flows to a frontend that now leads elsewhere are deleted, after the rules are in: the next packet then finds them.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from ..core.rules import Target
from ..core.values import EVERYWHERE, FAMILIES, Family, FrontendKey
from ..interfaces import KproxyError
from .flowscan import DELETE, GET, SOCKETS, Flow, Scanner, Spot, at, question, spot
from .netlink import NLM_F_ACK, NLM_F_REQUEST, NetlinkSocket, Refused, SocketOpener, message
from .node import Localness
from .tool import Tool, find

#: Deletions sent to the kernel at once.
_AT_ONCE = 200


class FlowsRemain(KproxyError):
    """Stale flows could not be deleted."""


class Tally(Struct, frozen=True):
    """What became of the flows of one family: how long it took, how many were deleted."""

    family: Family
    seconds: float
    deleted: int


class Judge:
    """
    Says which flows of one family are led astray.

    :param led: for each frontend the targets that the rules lead to; none for one that is refused, dropped or gone.
    :param own: where only rules of ours lead to: flows that end there and were sent to no frontend that leads there are
        stale. Only those that were rewritten count.
    :param nodePorts: the networks in which addresses of this node serve node ports.
    :param isLocal: whether an address is one of this node's.
    """

    def __init__(
        self,
        family: Family,
        led: Mapping[FrontendKey, frozenset[Target]],
        own: Iterable[Target],
        nodePorts: Sequence[str],
        isLocal: Callable[[bytes], bool],
    ) -> None:
        self._addressed: dict[Spot, frozenset[Spot]] = {}
        self._numbered: dict[bytes, frozenset[Spot]] = {}
        for key, targets in led.items():
            if key.family != family or key.protocol != "UDP":
                continue
            port, spots = key.port.to_bytes(2, "big"), frozenset(_spot(it) for it in targets)
            if key.address:
                self._addressed[_packed(key.address), port] = spots
            else:
                self._numbered[port] = spots
        self._own = frozenset(_spot(it) for it in own if (":" in it.address) == (family == "IPv6"))
        self._networks = [
            it for it in map(ipaddress.ip_network, nodePorts) if it.version == (4 if family == "IPv4" else 6)
        ]
        self._isLocal = isLocal
        self._served: dict[bytes, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._addressed or self._numbered or self._own)

    def stale(self, dialled: Spot, answers: Spot) -> bool:
        """Whether a flow that was sent there and is answered from there has to go."""
        targets = self._addressed.get(dialled)
        if targets is None:
            # A node port has every address of this node that serves them, and no other: a flow to the same number
            # elsewhere is not ours.
            targets = self._numbered.get(dialled[1])
            if targets is None or not self._serves(dialled[0]):
                return answers in self._own and answers != dialled
        return answers not in targets

    def _serves(self, address: bytes) -> bool:
        known = self._served.get(address)
        if known is None:
            within = any(ipaddress.ip_address(address) in it for it in self._networks)
            known = self._served[address] = within and self._isLocal(address)
        return known


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _spot(it: Target) -> Spot:
    return spot(_packed(it.address), it.port)


class Flows:
    """
    Deletes UDP flows, in a thread: a look through a hundred thousand flows takes about a tenth of a second, most of it
    the kernel's, and the reactor has the interpreter's lock meanwhile.

    :param openSocket: opens netlink and datagram sockets; see :data:`~twisted_kproxy.netfilter.netlink.SocketOpener`.
    :param tool: runs the ``conntrack`` program where netlink fails; made when first needed.
    :param observe: is told family, seconds and number deleted after each look.
    :ivar SINGLY: up to so many frontends the kernel is asked for each one; above, for all UDP flows once.
    """

    log = Logger()
    SINGLY = 8

    def __init__(
        self,
        reactor: Any,
        *,
        openSocket: SocketOpener = socket.socket,
        tool: Tool | None = None,
        observe: Callable[[Family, float, int], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._opener = openSocket
        self._tool = tool
        self._observe = observe

    def forget(
        self, stale: Mapping[FrontendKey, frozenset[Target]], nodePorts: Sequence[str] = EVERYWHERE
    ) -> Deferred[int]:
        """
        Delete the UDP flows to each frontend, but those that are led to one of its targets.

        :param nodePorts: the networks in which addresses of this node serve node ports.
        :return: fires with how many were deleted, some hundred per millisecond; fails with :class:`FlowsRemain`.
        """
        return Deferred.fromCoroutine(self._forget(dict(stale), nodePorts))

    def reconcile(
        self,
        led: Mapping[FrontendKey, frozenset[Target]],
        own: Collection[Target] = (),
        nodePorts: Sequence[str] = EVERYWHERE,
    ) -> Deferred[int]:
        """
        Compare all UDP flows with the rules: delete those to a frontend that are led to none of its targets, or were
        never led anywhere, and those that were led to a socket of ours from where nothing leads there any more.

        :param led: every frontend with the targets that the rules in force have for it.
        :param own: where only rules of ours lead, or led.
        :return: fires with how many were deleted; fails with :class:`FlowsRemain`.
        """
        return Deferred.fromCoroutine(self._reconcile(led, own, nodePorts))

    async def _forget(self, stale: dict[FrontendKey, frozenset[Target]], nodePorts: Sequence[str]) -> int:
        stale = {key: targets for key, targets in stale.items() if key.protocol == "UDP"}
        if not stale:
            return 0
        try:
            return await self._inThread(self._singly if len(stale) <= self.SINGLY else self._look, stale, (), nodePorts)
        except OSError as error:
            self.log.warn("Flows could not be deleted by netlink: {error!r}; trying conntrack.", error=error)
            return await self._byTool(stale)

    async def _reconcile(
        self, led: Mapping[FrontendKey, frozenset[Target]], own: Collection[Target], nodePorts: Sequence[str]
    ) -> int:
        try:
            return await self._inThread(self._look, led, own, nodePorts)
        except OSError as error:
            raise FlowsRemain(f"the flows could not be looked through: {error!r}") from error

    async def _inThread(self, work: Callable[..., list[Tally]], *arguments: Any) -> int:
        found = await deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work, *arguments)
        if self._observe is not None:
            for it in found:
                self._observe(it.family, it.seconds, it.deleted)
        return sum(it.deleted for it in found)

    # --- netlink, in a thread ---

    def _look(
        self, led: Mapping[FrontendKey, frozenset[Target]], own: Collection[Target], nodePorts: Sequence[str]
    ) -> list[Tally]:
        """At all UDP flows."""
        return self._each(led, own, nodePorts, lambda family: [None])

    def _singly(
        self, led: Mapping[FrontendKey, frozenset[Target]], own: Collection[Target], nodePorts: Sequence[str]
    ) -> list[Tally]:
        """At those to each frontend."""
        return self._each(
            led, own, nodePorts, lambda family: [(key.address, key.port) for key in led if key.family == family]
        )

    def _each(
        self,
        led: Mapping[FrontendKey, frozenset[Target]],
        own: Collection[Target],
        nodePorts: Sequence[str],
        narrowed: Callable[[Family], Sequence[tuple[str, int] | None]],
    ) -> list[Tally]:
        tallies = []
        netlink = NetlinkSocket(self._opener)
        localness = Localness(self._opener)
        try:
            for family in FAMILIES:
                begun = time.perf_counter()
                judge = Judge(family, led, own, nodePorts, localness.isLocal)
                if not judge:
                    continue
                deleted = 0
                for where in narrowed(family):
                    found = {it.identity for it in self._stale(netlink, family, where, judge)}
                    deleted += self._delete(netlink, family, sorted(found))
                tallies.append(Tally(family, time.perf_counter() - begun, deleted))
        finally:
            localness.close()
            netlink.close()
        return tallies

    @staticmethod
    def _stale(
        netlink: NetlinkSocket, family: Family, where: tuple[str, int] | None, judge: Judge
    ) -> Iterator[Flow]:
        # The table always changes, and no dump of it is consistent. What came while it was read came after the rules.
        scanner = Scanner(family)
        stale = judge.stale
        for data, number in netlink.buffers(GET, SOCKETS[family], question(family, where)):
            for dialled, answers, start in scanner.rows(data, number):
                if stale(dialled, answers):
                    flow = at(data, start)
                    if flow is not None:
                        yield flow

    @staticmethod
    def _delete(netlink: NetlinkSocket, family: Family, identities: list[bytes]) -> int:
        count = 0
        for start in range(0, len(identities), _AT_ONCE):
            some = identities[start : start + _AT_ONCE]
            first = netlink.numbers(len(some))
            data = b"".join(
                message(DELETE, NLM_F_REQUEST | NLM_F_ACK, number, SOCKETS[family], identity)
                for number, identity in enumerate(some, first)
            )
            for code in netlink.answers(data, first, first + len(some) - 1):
                if code == 0:
                    count += 1
                elif code != errno.ENOENT:  # gone meanwhile
                    raise Refused(code, f"a flow could not be deleted (errno {code})")
        return count

    # --- the conntrack program ---

    async def _byTool(self, stale: dict[FrontendKey, frozenset[Target]]) -> int:
        """
        One run per frontend. It cannot leave out targets, and of node ports it only deletes flows that were
        rewritten: both cost a flow at most one packet's way through the rules.
        """
        if self._tool is None:
            self._tool = Tool(self._reactor, find("conntrack", "conntrack"))
        count = 0
        for key in sorted(stale):
            arguments = ["-D", "-f", key.family.lower(), "-p", "udp", "--orig-port-dst", str(key.port)]
            arguments += ["--orig-dst", key.address] if key.address else ["--dst-nat"]
            try:
                done = await self._tool.run(*arguments)
            except Exception as error:
                raise FlowsRemain(f"flows to {key} could not be deleted: {error}") from error
            deleted = re.search(r": (\d+) flow entr", done.err)  # also where none was found, with exit status 1
            if deleted is None:
                lines = done.err.strip().splitlines() or [f"exit status {done.code}"]
                raise FlowsRemain(f"flows to {key} could not be deleted: {lines[-1][:200]}")
            count += int(deleted[1])
        return count
