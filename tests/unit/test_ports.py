"""The budget of descriptors, and where proxiers listen."""

from __future__ import annotations

import errno
import os
import random
import resource
from typing import Any

from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core.values import PoolName, ServicePortName
from twisted_kproxy.userspace.ports import RESERVE, Budget, PortRange, descriptorLimit, raiseLimit


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def pauseAccepting(self) -> None:
        self.heard.append("pause")

    def resumeAccepting(self) -> None:
        self.heard.append("resume")


class BudgetTests(SynchronousTestCase):
    """File descriptors."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.budget = Budget(self.clock, 100)
        self.listener = Listener()
        self.budget.addListener(self.listener)

    def test_limit(self) -> None:
        """What RLIMIT_NOFILE leaves after the reserve; of a tiny limit a quarter is kept back."""
        for soft, expected in (
            (20000, 20000 - RESERVE),
            (256, 192),
            (1024, 768),
            (resource.RLIM_INFINITY, 2**20 - 256),
        ):
            self.patch(resource, "getrlimit", lambda what, soft=soft: (soft, soft))
            self.assertEqual(descriptorLimit(), expected)
            self.assertEqual(Budget(self.clock).limit, expected)

    def test_takeAndGive(self) -> None:
        """Nothing beyond the limit is given, and what does not fit takes nothing."""
        self.assertTrue(self.budget.take(90))
        self.assertFalse(self.budget.take(11))
        self.assertTrue(self.budget.take(10))
        self.assertFalse(self.budget.take(1))
        self.budget.give(100)
        self.assertEqual(self.budget.used, 0)

    def test_listenersAlone(self) -> None:
        """
        Listening sockets may hold three quarters, and no more; what they hold keeps no client waiting, and the mark is
        at 95 % of the rest.
        """
        self.assertTrue(self.budget.hold(75))
        self.assertFalse(self.budget.hold(1))
        self.assertEqual((self.budget.status()["paused"], self.listener.heard), (False, []))
        self.assertTrue(self.budget.take(22))
        self.assertFalse(self.budget.paused)
        self.assertTrue(self.budget.take(1))
        self.assertTrue(self.budget.paused)
        self.assertFalse(self.budget.take(3))
        self.budget.release(75)
        self.clock.advance(1)
        self.assertEqual((self.budget.paused, self.listener.heard), (False, ["pause", "resume"]))

    def test_share(self) -> None:
        """Who has a share cannot take more than that, nor what is not there; what it gives back can be taken again."""
        share = self.budget.share(0.5)
        self.assertTrue(share.take(50))
        self.assertFalse(share.take(1))
        self.assertEqual(self.listener.heard, [])
        share.give(10)
        self.assertTrue(self.budget.take(60))
        self.assertFalse(share.take(1))
        self.assertEqual((share.used, self.budget.used), (40, 100))

    def test_raiseLimit(self) -> None:
        """The soft limit becomes the hard one; where that is forbidden it stays."""
        said: list[Any] = []
        self.patch(resource, "getrlimit", lambda what: (1024, 4096))
        self.patch(resource, "setrlimit", lambda what, limits: said.append(limits))
        raiseLimit()
        self.assertEqual(said, [(4096, 4096)])

        def forbidden(what: int, limits: Any) -> None:
            raise ValueError("not allowed")

        self.patch(resource, "setrlimit", forbidden)
        raiseLimit()

    def test_pause(self) -> None:
        """At 95 % listeners pause; they are looked after each 100 ms, not at each return, and go on below."""
        self.budget.take(94)
        self.assertEqual(self.listener.heard, [])
        self.budget.take(1)
        self.assertEqual(self.listener.heard, ["pause"])
        self.budget.take(1)
        self.budget.give(50)
        self.assertEqual(self.listener.heard, ["pause"])
        self.clock.advance(0.1)
        self.assertEqual(self.listener.heard, ["pause", "resume"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_staysPaused(self) -> None:
        """For as long as nothing is given back."""
        self.budget.take(95)
        self.clock.pump([0.1] * 10)
        self.assertEqual(self.listener.heard, ["pause"])
        self.assertTrue(self.budget.status()["paused"])

    def test_newListenerDuringPause(self) -> None:
        """Who comes during a pause waits with the others."""
        self.budget.take(95)
        late = Listener()
        self.budget.addListener(late)
        self.budget.give(95)
        self.clock.advance(0.1)
        self.assertEqual(late.heard, ["pause", "resume"])

    def test_exhausted(self) -> None:
        """When the kernel has none, whatever the budget says, there is a pause of 100 ms."""
        self.budget.exhausted()
        self.budget.exhausted()
        self.assertEqual(self.listener.heard, ["pause"])
        self.clock.advance(0.1)
        self.assertEqual(self.listener.heard, ["pause", "resume"])

    def test_lastListenerLeaves(self) -> None:
        """No timer runs for nobody, and no pause outlives its listeners."""
        self.budget.exhausted()
        self.budget.removeListener(self.listener)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertFalse(self.budget.paused)
        self.budget.exhausted()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class FakeProxier:
    """Listens nowhere; some ports are taken by others."""

    def __init__(self, taken: Any = (), protocol: Any = "TCP", error: int = errno.EADDRINUSE, wrapped: bool = False):
        self.pool = PoolName(ServicePortName("shop", "cart", "", protocol, "IPv4"), "cluster")
        self.port = 0
        self.tried: list[int] = []
        self._taken = taken
        self._error = error
        self._wrapped = wrapped

    def listen(self, port: int = 0) -> None:
        self.tried.append(port)
        if port in self._taken:
            error = OSError(self._error, os.strerror(self._error))
            raise CannotListenError("", port, error) if self._wrapped else error
        self.port = port or 50000


class PortRangeTests(SynchronousTestCase):
    """Local ports."""

    def open(self, ports: PortRange, preferred: int = 0, **kw: Any) -> FakeProxier:
        proxier = FakeProxier(**kw)
        ports.open(proxier, preferred)  # type: ignore[arg-type]
        return proxier

    def test_kernelChooses(self) -> None:
        """Without a range the kernel chooses, unless a port is preferred and free."""
        self.assertEqual(self.open(PortRange()).tried, [0])
        self.assertEqual(self.open(PortRange(), 40123).tried, [40123])
        self.assertEqual(self.open(PortRange(), 40123, taken={40123}).tried, [40123, 0])
        self.assertEqual(self.open(PortRange(), 40123, taken={40123}, wrapped=True).tried, [40123, 0])

    def test_range(self) -> None:
        """All ports of a range are used, each once per protocol, from a random start; then it is full, and says so."""
        ports = PortRange(40000, 40009, random.Random(1))
        used = [self.open(ports).port for _ in range(10)]
        self.assertEqual(sorted(used), list(range(40000, 40010)))
        error = self.assertRaises(OSError, self.open, ports)
        self.assertEqual(error.errno, errno.EADDRINUSE)
        self.assertIn("40000-40009", str(error))
        self.assertIn(self.open(ports, protocol="UDP").port, used)
        starts = {self.open(PortRange(40000, 40999, random.Random(seed))).port for seed in range(20)}
        self.assertGreater(len(starts), 10)

    def test_skipsWhatOthersUse(self) -> None:
        """Ports in use by other programs are passed over."""
        proxier = self.open(PortRange(40000, 40004, random.Random(3)), taken={40000, 40001, 40003, 40004})
        self.assertEqual(proxier.port, 40002)

    def test_boundedTries(self) -> None:
        """A huge range in use by others does not hold the reactor up."""
        proxier = FakeProxier(taken=range(65536))
        self.assertRaises(OSError, PortRange(1024, 65535).open, proxier)
        self.assertEqual(len(proxier.tried), PortRange.tries)

    def test_release(self) -> None:
        """A port that was released may be given again; releasing what was never opened is harmless."""
        ports = PortRange(40000, 40000)
        proxier = self.open(ports)
        ports.release(FakeProxier())  # type: ignore[arg-type]
        self.assertRaises(OSError, self.open, ports)
        ports.release(proxier)  # type: ignore[arg-type]
        self.assertEqual(self.open(ports).port, 40000)

    def test_preferredOutsideRange(self) -> None:
        """A preferred port counts only within the range."""
        self.assertEqual(self.open(PortRange(40000, 40000), 41000).tried, [40000])
        self.assertEqual(self.open(PortRange(40000, 40010), 40007).tried, [40007])

    def test_otherErrors(self) -> None:
        """What another port does not help against is raised at once."""
        proxier = FakeProxier(taken=range(65536), error=errno.EMFILE)
        error = self.assertRaises(OSError, PortRange(40000, 40010).open, proxier)
        self.assertEqual((error.errno, len(proxier.tried)), (errno.EMFILE, 1))

    def test_badRange(self) -> None:
        """A range that is none is refused, and named."""
        for first, last in ((5, 4), (1, 70000), (-1, 5)):
            self.assertIn(f"{first}-{last}", str(self.assertRaises(ValueError, PortRange, first, last)))
