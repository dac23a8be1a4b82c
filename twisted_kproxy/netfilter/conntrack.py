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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from ..core.rules import Target
from ..core.values import EVERYWHERE, FAMILIES, Family, FrontendKey
from ..interfaces import KproxyError
from .flowscan import DELETE, GET, SOCKETS, Scanner, Spot, identity, question, spot
from .netlink import NLM_F_ACK, NLM_F_REQUEST, NetlinkSocket, Refused, SocketOpener, message
from .node import Localness
from .slices import Slices, inSlices
from .tool import Tool, find

#: Deletions sent to the kernel at once.
_AT_ONCE = 200
#: Buffers received at once; to read the some 150 flows of each takes about a tenth of a millisecond.
_BUFFERS = 8

_T = TypeVar("_T")


class FlowsRemain(KproxyError):
    """Stale flows could not be deleted."""


class Judge:
    """
    Says which flows of one family are led astray.

    :param addressed: for each address and port the spots that the rules lead to.
    :param numbered: the same for the number of each node port.
    :param own: where only rules of ours lead to: flows that end there and were sent to no frontend that leads there are
        stale. Only those that were rewritten count.
    :param nodePorts: the networks in which addresses of this node serve node ports.
    :param isLocal: whether an address is one of this node's.
    """

    def __init__(
        self,
        family: Family,
        addressed: Mapping[Spot, frozenset[Spot]],
        numbered: Mapping[bytes, frozenset[Spot]],
        own: Iterable[Target],
        nodePorts: Sequence[str],
        isLocal: Callable[[bytes], bool],
    ) -> None:
        self._addressed = addressed
        self._numbered = numbered
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


def judging(
    family: Family,
    led: Mapping[FrontendKey, frozenset[Target]],
    own: Iterable[Target],
    nodePorts: Sequence[str],
    isLocal: Callable[[bytes], bool],
) -> Slices[Judge]:
    """
    The judge of a family.

    :param led: for each frontend the targets that the rules lead to; none for one that is refused, dropped or gone.
    """
    addressed: dict[Spot, frozenset[Spot]] = {}
    numbered: dict[bytes, frozenset[Spot]] = {}
    for key, targets in led.items():
        if key.family == family and key.protocol == "UDP":
            port, spots = key.port.to_bytes(2, "big"), frozenset(_spot(it) for it in targets)
            if key.address:
                addressed[_packed(key.address), port] = spots
            else:
                numbered[port] = spots
            yield
    return Judge(family, addressed, numbered, own, nodePorts, isLocal)


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _spot(it: Target) -> Spot:
    return spot(_packed(it.address), it.port)


def _everywhere(family: Family) -> list[tuple[str, int] | None]:
    """All UDP flows."""
    return [None]


class Flows:
    """
    Deletes UDP flows. A look through a hundred thousand flows takes about two tenths of a second. The larger part of
    it is the kernel's, which looks through its whole table where it finds nothing to tell of: for that a thread waits.
    What it tells is read in slices.

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
        :return: fires with how many were deleted, about a hundred per millisecond; fails with :class:`FlowsRemain`.
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
        where: Callable[[Family], Sequence[tuple[str, int] | None]] = _everywhere
        if len(stale) <= self.SINGLY:
            where = lambda family: [(key.address, key.port) for key in stale if key.family == family]  # noqa: E731
        try:
            return await self._look(stale, (), nodePorts, where)
        except OSError as error:
            self.log.warn("Flows could not be deleted by netlink: {error!r}; trying conntrack.", error=error)
            return await self._byTool(stale)

    async def _reconcile(
        self, led: Mapping[FrontendKey, frozenset[Target]], own: Collection[Target], nodePorts: Sequence[str]
    ) -> int:
        try:
            return await self._look(led, own, nodePorts, _everywhere)
        except OSError as error:
            raise FlowsRemain(f"the flows could not be looked through: {error!r}") from error

    # --- netlink ---

    async def _look(
        self,
        led: Mapping[FrontendKey, frozenset[Target]],
        own: Collection[Target],
        nodePorts: Sequence[str],
        where: Callable[[Family], Sequence[tuple[str, int] | None]],
    ) -> int:
        """:param where: what the kernel is asked for, one by one; ``None`` for all UDP flows."""
        total = 0
        netlink = NetlinkSocket(self._opener)
        localness = Localness(self._opener)
        try:
            for family in FAMILIES:
                begun = self._reactor.seconds()
                judge = await inSlices(self._reactor, judging(family, led, own, nodePorts, localness.isLocal))
                if not judge:
                    continue
                deleted = 0
                for narrowed in where(family):
                    found = sorted(await self._stale(netlink, family, narrowed, judge))
                    for start in range(0, len(found), _AT_ONCE):
                        some = found[start : start + _AT_ONCE]
                        deleted += await self._inThread(self._delete, netlink, family, some)
                if self._observe is not None:
                    self._observe(family, self._reactor.seconds() - begun, deleted)
                total += deleted
        finally:
            localness.close()
            netlink.close()
        return total

    async def _stale(
        self, netlink: NetlinkSocket, family: Family, where: tuple[str, int] | None, judge: Judge
    ) -> set[bytes]:
        """What names each flow that is stale."""
        # The table always changes, and no dump of it is consistent. What came while it was read came after the rules.
        found: set[bytes] = set()
        scanner = Scanner(family)
        stale = judge.stale
        source = netlink.buffers(GET, SOCKETS[family], question(family, where))
        while buffers := await self._inThread(lambda: list(islice(source, _BUFFERS))):
            for data, number in buffers:
                for dialled, answers, start in scanner.rows(data, number):
                    if stale(dialled, answers):
                        found.add(identity(data, start))
        return found

    @staticmethod
    def _delete(netlink: NetlinkSocket, family: Family, identities: Sequence[bytes]) -> int:
        first = netlink.numbers(len(identities))
        data = b"".join(
            message(DELETE, NLM_F_REQUEST | NLM_F_ACK, number, SOCKETS[family], it)
            for number, it in enumerate(identities, first)
        )
        count = 0
        for code in netlink.answers(data, first, first + len(identities) - 1):
            if code == 0:
                count += 1
            elif code != errno.ENOENT:  # gone meanwhile
                raise Refused(code, f"a flow could not be deleted (errno {code})")
        return count

    def _inThread(self, work: Callable[..., _T], *arguments: Any) -> Deferred[_T]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work, *arguments)

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
