"""Following the addresses of this node (:manpage:`rtnetlink(7)`)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from typing import Any

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..core.values import FAMILIES, Family
from .netlink import SocketOpener
from .node import primaryAddress

_NETLINK_ROUTE = 0
#: Links too: when one goes down, the kernel takes its IPv4 routes away without a word about them.
_LINK, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV4_RULE = 0x1, 0x10, 0x40, 0x80
_IPV6_ADDRESS, _IPV6_ROUTE, _IPV6_RULE = 0x100, 0x400, 0x40000
GROUPS = _LINK | _IPV4_ADDRESS | _IPV4_ROUTE | _IPV4_RULE | _IPV6_ADDRESS | _IPV6_ROUTE | _IPV6_RULE
#: Bytes that the kernel keeps for us. It is only read that something was said, not what: the less, the cheaper.
_BUFFER = 8192
#: More than fit into it; who is told more than that meanwhile looks again at once.
_MOST_READS = 256


@implementer(IReadDescriptor)
class AddressWatch(Service):
    """
    Calls back when the address of a family (:func:`~twisted_kproxy.netfilter.node.primaryAddress`) is another one.

    A node's interfaces are talked of all the time: each pod has one that comes and goes. So the first word of a burst
    is answered by not listening at all for a moment; then what was said meanwhile is thrown away, and the addresses are
    looked at once. However much the kernel has to say, that is all it costs.

    :param changed: called with the address of each family, ``None`` where there is none.
    :param addressOf: the node's own address of a family.
    :ivar addresses: as they are known to be.
    :ivar SETTLE: seconds from the first word to the look.
    """

    log = Logger()
    SETTLE = 0.25

    def __init__(
        self,
        reactor: Any,
        changed: Callable[[Mapping[Family, str | None]], None],
        opener: SocketOpener = socket.socket,
        addressOf: Callable[[Family], str | None] = primaryAddress,
    ) -> None:
        self._reactor = reactor
        self._changed = changed
        self._opener = opener
        self._addressOf = addressOf
        self._socket: Any = None
        self._timer: IDelayedCall | None = None
        self.addresses: Mapping[Family, str | None] = self._now()

    def startService(self) -> None:
        """Listen, and look at once: there may have been changes since :attr:`addresses` were read."""
        super().startService()  # type: ignore[no-untyped-call]
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self._socket = self._opener(socket.AF_NETLINK, kind, _NETLINK_ROUTE)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, GROUPS))
        except OSError as error:
            self._close()
            self.log.warn(
                "Changes of this node's addresses are not heard of, only found when all is compared: {error}",
                error=str(error),
            )
            return
        self._look()

    def stopService(self) -> None:
        """No call any more."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._close()

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        it, self._socket = self._socket, None
        if it is not None:
            if it.fileno() >= 0:
                self._reactor.removeReader(self)
            it.close()

    def _now(self) -> dict[Family, str | None]:
        return {family: self._addressOf(family) for family in FAMILIES}

    # --- IReadDescriptor

    def fileno(self) -> int:
        return -1 if self._socket is None else int(self._socket.fileno())

    def logPrefix(self) -> str:
        return "address watch"

    def doRead(self) -> None:
        """Something was said: look in a moment, and hear nothing until then."""
        self._reactor.removeReader(self)
        self._timer = self._reactor.callLater(self.SETTLE, self._look)

    def connectionLost(self, reason: Failure) -> None:
        self.log.warn("The watch over this node's addresses has ended: {reason}", reason=reason.value)
        self._close()

    def _look(self) -> None:
        """Forget what was said, listen again, and only then look: what happens from here on is said anew."""
        self._timer = None
        if not self._forget():
            return
        self._reactor.addReader(self)
        now = self._now()
        if now == self.addresses:
            return
        for family, address in now.items():
            if address != self.addresses[family]:
                self.log.info(
                    "The {family} address of this node is {address} now, and was {before}",
                    family=family, address=address or "none", before=self.addresses[family] or "none",
                )
        self.addresses = now
        self._changed(now)

    def _forget(self) -> bool:
        """Read what there is. That some of it was lost (ENOBUFS) makes no difference: nothing of it is looked at."""
        for _ in range(_MOST_READS):
            try:
                self._socket.recv(_BUFFER)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    self.log.warn("The watch over this node's addresses has ended: {error}", error=str(error))
                    self._close()
                    return False
        return True
