"""Parts of the engines' suites at sizes that would take the unit tests too long; over loopback, without namespaces."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import SkipTest, TestCase

from tests.shared.relays import BulkSuite, RelaySuite
from tests.shared.relayscripts import ScriptSuite
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.userspace.engines.native import NativeRelay
from twisted_kproxy.userspace.engines.pairs import PairRelay
from twisted_kproxy.userspace.engines.poller import Poller
from twisted_kproxy.userspace.engines.protocol import ProtocolRelay


class Big:
    """50 echoes of 3 MB at the same time, transfers of 100 MB and more, 500 scripts."""

    timeout = 180
    reactor: Any = reactor
    echoes = (50, 3 << 20)
    transfers = (4, 100 << 20)
    scripts = 500
    connect = RelaySuite.connect
    run_ = RelaySuite.run_
    equal = RelaySuite.equal
    test_parallelEchoes = RelaySuite.test_parallelEchoes
    test_endRidesOnData = BulkSuite.test_endRidesOnData
    test_randomScripts = ScriptSuite.test_randomScripts

    def pipesInUse(self, relay: Any) -> int:
        """Small sizes have been through that."""
        return 0

    def kept(self, relay: Any) -> Any:
        self.addCleanup(relay.stop)  # type: ignore[attr-defined]
        return relay


class PythonTests(Big, TestCase):
    """The engine in Python."""

    def makeRelay(self, reactor: Any) -> Any:
        return self.kept(PairRelay(reactor))


class CopyingTests(Big, TestCase):
    """The same without splice(2)."""

    def makeRelay(self, reactor: Any) -> Any:
        return self.kept(PairRelay(reactor, splice=None))


class ProtocolTests(Big, TestCase):
    """The engine of protocols."""

    def makeRelay(self, reactor: Any) -> Any:
        return self.kept(ProtocolRelay(reactor, Poller(reactor)))


class NativeTests(Big, TestCase):
    """The engine in C."""

    threaded = False

    def makeRelay(self, reactor: Any) -> Any:
        try:
            return self.kept(NativeRelay(reactor, Poller(reactor), threaded=self.threaded))
        except NotAvailable as error:
            raise SkipTest(str(error))


class NativeThreadTests(NativeTests):
    """The same in a thread of its own."""

    threaded = True
