"""The suite of proxiers, for TCP and for UDP, on loopback."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from tests.shared.datagrams import socketsOf
from tests.shared.proxiers import ProxierSuite
from twisted_kproxy.core.values import PoolName
from twisted_kproxy.interfaces import ILoadBalancer, ITrafficObserver
from twisted_kproxy.userspace.dial import Dialer
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.ports import Budget
from twisted_kproxy.userspace.tcp import TcpProxier
from twisted_kproxy.userspace.udp import UdpProxier


class TcpProxierSuiteTests(ProxierSuite, TestCase):
    """TCP."""

    timeout = 20
    reactor: Any = reactor
    protocol = "TCP"

    def makeProxier(self, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> TcpProxier:
        poller = Poller(reactor)
        return TcpProxier(
            reactor,
            pool,
            balancer,
            observer,
            relay=PairRelay(reactor, poller),
            dialer=Dialer(reactor, poller),
            budget=Budget(reactor),
        )


class UdpProxierSuiteTests(ProxierSuite, TestCase):
    """UDP."""

    timeout = 20
    reactor: Any = reactor
    protocol = "UDP"
    engine = "python"

    def makeProxier(self, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> UdpProxier:
        return UdpProxier(
            reactor,
            pool,
            balancer,
            observer,
            idleTimeout=30.0,
            budget=Budget(reactor),
            sockets=socketsOf(self.engine, reactor),
        )


class NativeUdpProxierSuiteTests(UdpProxierSuiteTests):
    """UDP, in C."""

    engine = "native"
