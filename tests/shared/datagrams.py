"""The engines for datagrams, by name."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SkipTest

from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.userspace.engines.datagrams import NativeSockets
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.udpsockets import Sockets


def socketsOf(engine: str, reactor: Any) -> Sockets:
    """That engine; the test is skipped where it cannot be had."""
    try:
        return (NativeSockets if engine == "native" else Sockets)(reactor, Poller(reactor))
    except NotAvailable as error:
        raise SkipTest(str(error)) from None
