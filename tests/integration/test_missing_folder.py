"""A daemon whose folder of manifests is not there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.daemon import Daemon
from tests.fakes.network import SmallRig
from tests.integration.test_loops import CONFIG, Loops
from tests.shared.namespaces import canMakeNamespaces


class MissingFolderTests(TestCase):
    """See above."""

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

    def status(self, daemon: Daemon) -> Any:
        return json.loads(daemon.get("http://127.0.0.1:10249/status")[2])

    def faults(self, daemon: Daemon) -> list[str]:
        lines = daemon.get("http://127.0.0.1:10249/metrics")[2].decode().splitlines()
        return [line.split()[-1] for line in lines if line.startswith("kproxy_source_faults{")]

    def rules(self) -> str:
        return self.rig.run("n0", ["nft", "list", "table", "inet", "kproxy"]).stdout

    def test_missing(self) -> None:
        """
        At the start it has not been read, and the rules of the run before stay; once it is there, it is served. When it
        goes, everything stays, and everybody is told.
        """
        first = Daemon(self.rig, "n0", self.config)
        first.waitUntil(lambda: self.status(first)["sync"]["inForce"])
        first.stop(signal.SIGKILL)
        before = self.rules()
        self.assertIn("10.96.7.7", before)
        away = f"{self.folder}.away"
        os.rename(self.folder, away)
        second = Daemon(self.rig, "n0", self.config)
        second.waitUntil(lambda: self.status(second)["problems"])
        status = self.status(second)
        self.assertIn("local/Service", status["sync"]["waitingFor"])
        self.assertFalse(status["sync"]["inForce"])
        self.assertEqual([(it["kind"], it["key"]) for it in status["problems"]], [("source local", self.folder)])
        self.assertEqual(self.faults(second), ["1.0"])
        second.waitUntil(lambda: "does not exist; until it has been read, rules stay as they are" in second.log())
        self.assertEqual(self.rules(), before)
        os.rename(away, self.folder)
        second.waitUntil(lambda: self.status(second)["sync"]["inForce"])
        self.assertEqual((self.rules(), self.faults(second)), (before, ["0.0"]))
        os.rename(self.folder, away)
        second.waitUntil(lambda: self.status(second)["problems"])
        self.assertTrue(self.status(second)["sync"]["inForce"])
        self.assertEqual((self.rules(), self.faults(second)), (before, ["1.0"]))
        second.stop()
