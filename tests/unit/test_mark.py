"""Marking what the proxy itself sends."""

from __future__ import annotations

import socket

from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core.rules import PROXY_MARK
from twisted_kproxy.userspace import sockets
from twisted_kproxy.userspace.sockets import markOwn


class FakeSocket:
    """Takes options, or refuses them."""

    def __init__(self, refuses: OSError | None = None) -> None:
        self.refuses = refuses
        self.options: list[tuple[int, int, int]] = []

    def setsockopt(self, *option: int) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.options.append(option)  # type: ignore[arg-type]


class MarkTests(SynchronousTestCase):
    """``markOwn``."""

    def setUp(self) -> None:
        self.patch(sockets._Marking, "told", False)
        self.events: list[str] = []

        def observer(event: dict[str, object]) -> None:
            if event.get("log_namespace") == sockets._log.namespace:
                self.events.append(str(event["log_format"]))

        globalLogPublisher.addObserver(observer)  # type: ignore[arg-type]
        self.addCleanup(globalLogPublisher.removeObserver, observer)  # type: ignore[arg-type]

    def test_oneBit(self) -> None:
        """The mark is one bit, so that the marks of others can be beside it."""
        self.assertEqual(PROXY_MARK.bit_count(), 1)

    def test_marked(self) -> None:
        """The socket gets the mark."""
        it = FakeSocket()
        markOwn(it)  # type: ignore[arg-type]
        self.assertEqual(it.options, [(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)])
        self.assertEqual(self.events, [])

    def test_noPrivilege(self) -> None:
        """Without the privilege the socket is used as it is; that is said once, not for each connection."""
        for _ in range(3):
            markOwn(FakeSocket(PermissionError(1, "Operation not permitted")))  # type: ignore[arg-type]
        self.assertEqual(len(self.events), 1)
        self.assertIn("CAP_NET_ADMIN", self.events[0])
