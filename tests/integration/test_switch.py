"""An operator changes the writer: the daemon takes over, and the other writer's rules go."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.daemon import Backend, Daemon
from tests.fakes.network import SmallRig, waitFor
from tests.integration.test_iptables import missing
from tests.integration.test_loops import CONFIG, TCP, Loops
from tests.shared.namespaces import canMakeNamespaces

#: What each writer leaves, in both families: one that ends in between has cleared only the first.
TRACES = {
    "nftables": (["nft list ruleset"], "table inet kproxy"),
    "python-iptables": (["iptables-legacy-save", "ip6tables-legacy-save"], "KPROXY-"),
    "iptables-legacy": (["iptables-legacy-save", "ip6tables-legacy-save"], "KPROXY-"),
    "iptables-nft": (["iptables-nft-save", "ip6tables-nft-save"], "KPROXY-"),
}


class SwitchTests(TestCase):
    """One node, one daemon after the other; the first ends without a word."""

    skip = missing()
    timeout = 120

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("network namespaces need root")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)
        Backend(self.rig, "p0a", http=[TCP])
        self.folder = os.path.join(self.rig.folder, "services.d")
        os.mkdir(self.folder)
        items = Loops.service("web", {4: "10.96.7.7", 6: "fd00:10:96::7:7"}, {4: self.rig.address("p0a")}, [])
        Path(self.folder, "all.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": items}))

    def start(self, writer: str) -> Daemon:
        daemon = Daemon(self.rig, "n0", CONFIG.format(folder=self.folder, writer=writer))
        daemon.waitUntil(lambda: json.loads(daemon.get("http://127.0.0.1:10249/status")[2])["sync"]["inForce"])
        return daemon

    def traces(self) -> set[str]:
        """The writers whose rules are there."""
        return {
            name
            for name, (commands, word) in TRACES.items()
            if any(word in self.rig.run("n0", command.split(), check=False).stdout for command in commands)
        }

    def curl(self) -> str:
        url = f"http://10.96.7.7:{TCP}/"
        done: Any = self.rig.run("p0a", ["curl", "-sS", "-m", "10", url], check=False)
        return done.stdout.split()[0] if done.stdout else done.stderr

    def test_switch(self) -> None:
        """After a crash another writer's daemon serves, and soon nothing of the first writer is left."""
        legacy = {"python-iptables", "iptables-legacy"}
        for writer, expected in (
            ("python-iptables", legacy),
            ("nftables", {"nftables"}),
            ("iptables-nft", {"iptables-nft"}),
            ("iptables-legacy", legacy),
            ("python-iptables", legacy),  # the same rules, adopted
        ):
            daemon = self.start(writer)
            waitFor(lambda expected=expected: self.traces() == expected, 30)  # type: ignore[misc]
            self.assertEqual((writer, self.curl()), (writer, "p0a"))
            daemon.assertNoTraceback()
            daemon.stop(signal.SIGKILL)
            self.assertEqual(self.traces(), expected)
        self.assertIn("rules of an earlier run are in force", daemon.log())
        self.assertNotIn("were removed from", daemon.log())
