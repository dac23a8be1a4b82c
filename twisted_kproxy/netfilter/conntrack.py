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
import struct
from collections.abc import Container, Iterator, Mapping
from typing import Any

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from ..core.rules import Target
from ..core.values import FAMILIES, Family, FrontendKey
from ..interfaces import KproxyError
from .netlink import (
    NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    Interrupted,
    NetlinkSocket,
    Refused,
    SocketOpener,
    attribute,
    attributes,
    message,
)
from .tool import Tool, find

CTNETLINK = 1
GET, DELETE = CTNETLINK << 8 | 1, CTNETLINK << 8 | 2
UDP = 17
_ORIG, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_SOCKETS: dict[Family, int] = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
_BY_DST, _BY_PROTOCOL, _BY_DPORT = 1 << 1, 1 << 3, 1 << 5
#: Deletions sent to the kernel at once.
_AT_ONCE = 200


class Flow(Struct, frozen=True):
    """
    A flow as the kernel tells of it.

    :ivar destination: what the client dialled.
    :ivar source: where its answers come from.
    :ivar identity: the attributes that name it, to be given back to the kernel.
    """

    protocol: int
    destination: tuple[bytes, int]
    source: tuple[bytes, int]
    identity: bytes


class FlowsRemain(KproxyError):
    """Stale flows could not be deleted."""


def question(family: Family, key: FrontendKey | None) -> bytes:
    """The payload of a dump that the kernel narrows to UDP, and to one frontend. Old kernels do not narrow."""
    flags = _BY_PROTOCOL
    proto = attribute(1, bytes([UDP]))
    ip = b""
    if key is not None:
        flags |= _BY_DPORT
        proto += attribute(3, struct.pack(">H", key.port))
        # Not by IPv6 addresses: there the kernel's comparison is the wrong way round (ctnetlink_filter_match_tuple
        # takes the 0 of ipv6_addr_cmp for a difference; seen on 6.18), and what was asked for would be left out.
        if key.address and family == "IPv4":
            flags |= _BY_DST
            ip = attribute(1 | NESTED, attribute(2, socket.inet_pton(socket.AF_INET, key.address)))
    tuple_ = attribute(_ORIG | NESTED, ip + attribute(2 | NESTED, proto))
    narrowed = attribute(_FILTER | NESTED, attribute(1, struct.pack("=I", flags)) + attribute(2, struct.pack("=I", 0)))
    return tuple_ + narrowed


def decode(answer: bytes) -> Flow | None:
    """The flow in one answer to a dump; ``None`` where it is none that could be deleted."""
    parts = dict(attributes(answer))
    if _ORIG not in parts or _REPLY not in parts:
        return None
    orig, reply = _side(parts[_ORIG]), _side(parts[_REPLY])
    if orig is None or reply is None:
        return None
    identity = attribute(_ORIG | NESTED, parts[_ORIG])
    identity += b"".join(attribute(kind, parts[kind]) for kind in (_ID, _ZONE) if kind in parts)
    return Flow(orig[0], orig[2], reply[1], identity)


def _side(data: bytes) -> tuple[int, tuple[bytes, int], tuple[bytes, int]] | None:
    """One direction's protocol, source and destination."""
    parts = dict(attributes(data))
    ip, proto = dict(attributes(parts.get(1, b""))), dict(attributes(parts.get(2, b"")))
    source, destination = ip.get(1) or ip.get(3), ip.get(2) or ip.get(4)
    if source is None or destination is None or not {1, 2, 3} <= proto.keys():
        return None
    ports = [int.from_bytes(proto[it], "big") for it in (2, 3)]
    return proto[1][0], (source, ports[0]), (destination, ports[1])


class Glance:
    """
    Tells whom a flow was dialled to by looking at fixed places, many times as fast as :func:`decode`: of a hundred
    thousand flows some hundred matter. The first flow that was decoded with care tells where these places are.
    """

    def __init__(self, family: Family) -> None:
        wide = 4 if family == "IPv4" else 16
        # original, its addresses, source | destination | protocol, its number | source port | destination port
        self._heads = (
            slice(0, 12), slice(12 + wide, 16 + wide), slice(16 + 2 * wide, 24 + 2 * wide),
            slice(28 + 2 * wide, 32 + 2 * wide), slice(36 + 2 * wide, 40 + 2 * wide),
        )  # fmt: skip
        self._address = slice(16 + wide, 16 + 2 * wide)
        self._port = slice(40 + 2 * wide, 42 + 2 * wide)
        self._shape: list[bytes] | None = None

    def destination(self, answer: bytes) -> tuple[bytes, int] | None:
        """Address and port; ``None`` where the answer looks otherwise than those before."""
        if self._shape is None:
            flow = decode(answer)
            if flow is None or self._at(answer) != flow.destination:
                return None
            self._shape = [answer[it] for it in self._heads]
        if [answer[it] for it in self._heads] != self._shape:
            return None
        return self._at(answer)

    def _at(self, answer: bytes) -> tuple[bytes, int]:
        return answer[self._address], int.from_bytes(answer[self._port], "big")


class Flows:
    """
    Deletes UDP flows, in a thread: a look through a hundred thousand flows takes a few tenths of a second.

    :param openSocket: opens netlink and datagram sockets; see :data:`~twisted_kproxy.netfilter.netlink.SocketOpener`.
    :param tool: runs the ``conntrack`` program where netlink fails; made when first needed.
    :ivar SINGLY: up to so many frontends the kernel is asked for each one; above, for all UDP flows once.
    """

    log = Logger()
    SINGLY = 8

    def __init__(self, reactor: Any, *, openSocket: SocketOpener = socket.socket, tool: Tool | None = None) -> None:
        self._reactor = reactor
        self._opener = openSocket
        self._tool = tool

    def forget(self, stale: Mapping[FrontendKey, frozenset[Target]]) -> Deferred[int]:
        """
        Delete the UDP flows to each frontend, but those that are led to one of its targets.

        :return: fires with how many were deleted, some hundred per millisecond; fails with :class:`FlowsRemain`.
        """
        return Deferred.fromCoroutine(self._forget(dict(stale)))

    async def _forget(self, stale: dict[FrontendKey, frozenset[Target]]) -> int:
        stale = {key: targets for key, targets in stale.items() if key.protocol == "UDP"}
        if not stale:
            return 0
        try:
            return await deferToThreadPool(self._reactor, self._reactor.getThreadPool(), self._byNetlink, stale)
        except (OSError, Interrupted) as error:
            self.log.warn("Flows could not be deleted by netlink: {error!r}; trying conntrack.", error=error)
            return await self._byTool(stale)

    # --- netlink, in a thread ---

    def _byNetlink(self, stale: dict[FrontendKey, frozenset[Target]]) -> int:
        count = 0
        netlink = NetlinkSocket(self._opener)
        try:
            for family in FAMILIES:
                keys = {
                    (socket.inet_pton(_SOCKETS[family], key.address) if key.address else b"", key.port): targets
                    for key, targets in stale.items()
                    if key.family == family
                }
                if not keys:
                    continue
                led = {
                    where: {(socket.inet_pton(_SOCKETS[family], it.address), it.port) for it in targets}
                    for where, targets in keys.items()
                }
                wanted: list[FrontendKey | None] = [key for key in stale if key.family == family]
                if len(wanted) > self.SINGLY:
                    wanted = [None]
                for one in wanted:
                    flows = self._flows(netlink, family, one, led)
                    found = {it.identity for it in flows if self._isStale(it, led)}
                    count += self._delete(netlink, family, sorted(found))
        finally:
            netlink.close()
        return count

    @staticmethod
    def _flows(
        netlink: NetlinkSocket, family: Family, key: FrontendKey | None, led: Container[tuple[bytes, int]]
    ) -> Iterator[Flow]:
        """Those that may be to a frontend in ``led``."""
        glance = Glance(family)
        try:
            for answer in netlink.dump(GET, _SOCKETS[family], question(family, key)):
                dialled = glance.destination(answer)
                if dialled is not None and dialled not in led and (b"", dialled[1]) not in led:
                    continue
                flow = decode(answer)
                if flow is not None and flow.protocol == UDP:
                    yield flow
        except Interrupted:
            # The table always changes. What came while it was read came after the rules.
            return

    def _isStale(self, flow: Flow, led: dict[tuple[bytes, int], set[tuple[bytes, int]]]) -> bool:
        address, port = flow.destination
        targets = led.get((address, port))
        if targets is None:
            # A node port has every address of this node, and no other: a flow to the same port elsewhere is not ours.
            targets = led.get((b"", port))
            if targets is None or not self._isMine(address):
                return False
        return flow.source not in targets

    def _isMine(self, address: bytes) -> bool:
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        try:
            with self._opener(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0) as it:
                it.bind((str(ipaddress.ip_address(address)), 0))
        except OSError as error:
            # A link-local address cannot be bound to without its interface, and is never routed: it is ours.
            return error.errno == errno.EINVAL and family == socket.AF_INET6
        return True

    @staticmethod
    def _delete(netlink: NetlinkSocket, family: Family, identities: list[bytes]) -> int:
        count = 0
        for start in range(0, len(identities), _AT_ONCE):
            some = identities[start : start + _AT_ONCE]
            first = netlink.numbers(len(some))
            data = b"".join(
                message(DELETE, NLM_F_REQUEST | NLM_F_ACK, number, _SOCKETS[family], identity)
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
