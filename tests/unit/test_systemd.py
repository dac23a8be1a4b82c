"""What systemd is told."""

from __future__ import annotations

import os
import socket

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.systemd import Notifier


class NotifierTests(SynchronousTestCase):
    """With a socket of our own in the place of systemd's."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.alive = True
        self.path = os.path.join("/tmp", f"kp-{os.getpid()}-{id(self):x}.sock")  # a unix path holds only 108 bytes
        self.socket = self.listen(self.path)
        self.addCleanup(os.unlink, self.path)

    def listen(self, address: str) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(listening.close)
        listening.bind(address)
        listening.setblocking(False)
        return listening

    def told(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def notifier(self, **environ: str) -> Notifier:
        return Notifier(self.clock, {"NOTIFY_SOCKET": self.path, **environ}, self.isAlive)

    def isAlive(self) -> bool:
        return self.alive

    def test_states(self) -> None:
        """Ready, status and stopping are told as they come; a status on one line, and only when it is another."""
        notifier = self.notifier()
        notifier.startService()
        self.assertEqual(self.told(), [])
        notifier.ready()
        notifier.status("12 services\nin force é")
        notifier.status("12 services in force é")
        notifier.stopping()
        notifier.stopService()
        self.assertEqual(self.told(), ["READY=1", "STATUS=12 services in force é", "STOPPING=1"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_abstract(self) -> None:
        """A leading @ stands for the abstract name space."""
        name = f"kp-{os.getpid()}-{id(self):x}"
        self.socket = self.listen("\0" + name)
        Notifier(self.clock, {"NOTIFY_SOCKET": f"@{name}"}, self.isAlive).ready()
        self.assertEqual(self.told(), ["READY=1"])

    def test_withoutSystemd(self) -> None:
        """Where the environment names no socket, nothing is said and no timer runs."""
        for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}, {"WATCHDOG_USEC": "1000000"}):
            notifier = Notifier(self.clock, environ, self.isAlive)
            notifier.startService()
            notifier.ready()
            notifier.status("x")
            notifier.stopping()
            self.assertEqual(self.clock.getDelayedCalls(), [])
            notifier.stopService()
        self.assertEqual(self.told(), [])

    def test_watchdog(self) -> None:
        """The watchdog is fed twice in each of its periods, until the service stops."""
        notifier = self.notifier(WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
        notifier.startService()
        self.assertEqual(self.told(), ["WATCHDOG=1"])
        self.clock.advance(14.9)
        self.assertEqual(self.told(), [])
        self.clock.advance(0.1)
        self.clock.advance(15)
        self.assertEqual(self.told(), ["WATCHDOG=1"] * 2)
        notifier.stopService()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stuck(self) -> None:
        """A daemon that does no work does not feed the watchdog, and does again once it works."""
        notifier = self.notifier(WATCHDOG_USEC="2000000")
        notifier.startService()
        self.alive = False
        self.clock.pump([1, 1, 1])
        self.assertEqual(self.told(), ["WATCHDOG=1"])
        self.alive = True
        self.clock.advance(1)
        self.assertEqual(self.told(), ["WATCHDOG=1"])
        notifier.stopService()

    def test_aliveRaises(self) -> None:
        """Not to know whether the daemon works counts as no, and does not end the watch."""
        notifier = self.notifier(WATCHDOG_USEC="2000000")
        notifier.startService()
        self.told()
        notifier._alive = lambda: bool(1 / 0)
        self.clock.advance(1)
        self.assertEqual(self.told(), [])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        notifier._alive = self.isAlive
        self.clock.advance(1)
        self.assertEqual(self.told(), ["WATCHDOG=1"])
        notifier.stopService()

    def test_watchdogOfAnother(self) -> None:
        """A watchdog that is meant for another process, is off or makes no sense is not fed."""
        for environ in (
            {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
            {"WATCHDOG_USEC": "0"},
            {"WATCHDOG_USEC": "-5"},
            {"WATCHDOG_USEC": "soon"},
        ):
            notifier = self.notifier(**environ)
            notifier.startService()
            self.assertEqual(self.clock.getDelayedCalls(), [])
            notifier.stopService()
        self.assertEqual(self.told(), [])

    def test_deafSystemd(self) -> None:
        """A socket that is gone or full costs nothing but a line in the log."""
        notifier = Notifier(self.clock, {"NOTIFY_SOCKET": "/nonexistent/socket"}, self.isAlive)
        notifier.ready()
        notifier = self.notifier()
        for number in range(5000):
            notifier.status(str(number))
        self.assertLess(len(self.told()), 5000)
