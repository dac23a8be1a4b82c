"""Two daemons on one node."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.daemon import Backend, Daemon
from tests.fakes.network import SmallRig, waitFor
from tests.integration.test_loops import CONFIG, TCP, Loops
from tests.shared.namespaces import Namespace, canMakeNamespaces
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.netfilter.claim import NAME, NamespaceClaim

#: Binds the name without any right to write rules, and says so.
IMPOSTOR = f"""
import socket, time
it = socket.socket(socket.AF_UNIX)
it.bind({NAME!r})
it.listen(1)
print("bound", flush=True)
time.sleep(60)
"""


class ClaimTests(TestCase):
    """``NamespaceClaim``."""

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("network namespaces need root")
        self.space = Namespace("claim")
        self.addCleanup(self.space.delete)

    def claim(self, space: Namespace | None = None) -> NamespaceClaim:
        it = NamespaceClaim((space or self.space).socket)
        self.addCleanup(it.release)
        return it

    def test_second(self) -> None:
        """The second is told which process has it; once that has given it back, it has it."""
        first, second = self.claim(), self.claim()
        first.take()
        first.take()
        error = self.assertRaises(NotAvailable, second.take)
        self.assertIn(f"process {os.getpid()}", str(error))
        self.assertIn("Stop it first", str(error))
        first.release()
        first.release()
        second.take()
        self.assertRaises(NotAvailable, first.take)

    def test_otherNamespace(self) -> None:
        """Another node's namespace is another matter."""
        beside = Namespace("claim")
        self.addCleanup(beside.delete)
        self.claim().take()
        self.claim(beside).take()

    def test_impostor(self) -> None:
        """Who cannot write rules cannot keep others from it."""
        argv = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", IMPOSTOR]
        process = subprocess.Popen([*self.space.prefix, *argv], stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        self.addCleanup(process.stdout.close)
        self.assertEqual(process.stdout.readline(), "bound\n")
        self.claim().take()

    def test_busyHolder(self) -> None:
        """A holder who never accepts is a holder."""
        self.claim().take()
        waiting = []
        for _ in range(5):
            it = self.space.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.addCleanup(it.close)
            waiting.append(it.connect_ex(NAME))
        self.assertNotEqual(waiting[-1], 0)
        self.assertRaises(NotAvailable, self.claim().take)


class TwoDaemonsTests(TestCase):
    """Two whole daemons in one namespace."""

    timeout = 60

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("network namespaces need root")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)
        self.folder = os.path.join(self.rig.folder, "services.d")
        os.mkdir(self.folder)
        items = Loops.service("web", {4: "10.96.7.7", 6: "fd00:10:96::7:7"}, {4: self.rig.address("p0a")}, [])
        Path(self.folder, "all.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": items}))
        self.config = CONFIG.format(folder=self.folder, writer="nftables")

    def rules(self) -> str:
        done = self.rig.run("n0", ["nft", "list", "table", "inet", "kproxy"], check=False)
        return re.sub(r"# handle \d+", "", done.stdout)

    def inForce(self, daemon: Daemon) -> bool:
        return bool(json.loads(daemon.get("http://127.0.0.1:10249/status")[2])["sync"]["inForce"])

    def test_second(self) -> None:
        """The second ends with one clear line and harms nothing; after a crash of the first the next one starts."""
        first = Daemon(self.rig, "n0", self.config)
        first.waitUntil(lambda: self.inForce(first))
        before = self.rules()
        elsewhere = "[health]\nbind = 127.0.0.1:20256\n[metrics]\nbind = 127.0.0.1:20249\n"
        second = Daemon(self.rig, "n0", self.config + elsewhere, waitFor=None)
        waitFor(lambda: second.process.poll() is not None, 30)
        self.assertEqual(second.stop(), 1)
        [line] = [line for line in second.log().splitlines() if "cannot run" in line]
        self.assertIn(f"another kproxy (process {first.pid}) writes rules", line)
        second.assertNoTraceback()
        self.assertEqual(self.rules(), before)
        self.assertTrue(self.inForce(first))
        first.assertNoTraceback()
        first.stop(signal.SIGKILL)
        third = Daemon(self.rig, "n0", self.config)
        third.waitUntil(lambda: self.inForce(third))
        self.assertEqual(self.rules(), before)

    def test_cleanupBesideDaemon(self) -> None:
        """
        --cleanup beside a daemon that runs names it and removes nothing. What somebody else removes comes back; our own
        doings, up to the last one, are never taken for somebody else's.
        """
        daemon = Daemon(self.rig, "n0", self.config.replace("drain-timeout = 0s", "drain-timeout = 1s"))
        daemon.waitUntil(lambda: self.inForce(daemon))
        before = self.rules()
        Backend(self.rig, "p0a", http=[TCP])
        client = self.rig.connect("n0", ("10.96.7.7", TCP))
        self.addCleanup(client.close)
        done = self.rig.run("n0", [sys.executable, "-m", "twisted", "kproxy", "--cleanup"], check=False)
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertIn(f"process {daemon.pid}", done.stderr)
        self.assertEqual(self.rules(), before)
        for count in (1, 2, 3):
            self.rig.run("n0", ["nft", "delete", "table", "inet", "kproxy"])
            daemon.waitUntil(lambda count=count: daemon.log().count("Somebody else") == count)  # type: ignore[misc]
            waitFor(lambda: self.rules() == before, 10)
            # They are there before they have been signed and read back.
            daemon.waitUntil(
                lambda: not json.loads(daemon.get("http://127.0.0.1:10249/status")[2])["sync"]["running"]
            )
        self.assertEqual(daemon.stop(), 0)
        self.assertIn("cut", daemon.log())  # it has drained for a while
        self.assertEqual(daemon.log().count("Somebody else"), 3)
