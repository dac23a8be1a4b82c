"""A node whose addresses change while the daemon runs: what is led to them follows, without a word from any source."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar

from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.daemon import Backend, Daemon
from tests.fakes.network import SmallRig, waitFor
from tests.integration.world import PORT, service, slices
from tests.shared.namespaces import canMakeNamespaces

NODE_PORT = 30080
#: Nothing but the kernel's word can be why anything follows.
CONFIG = """
[kproxy]
node-name = n0
cluster-cidr = 10.244.0.0/16, fd00:10:244::/56
sync-period = 1h
[source:local]
type = files
path = {folder}
[rules]
writer = {writer}
[userspace]
drain-timeout = 0s
"""
SECONDS = 20


class Addresses:
    """See the module."""

    timeout = 120
    writer: ClassVar[str]

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("network namespaces need root")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)  # type: ignore[attr-defined]
        self.backend = Backend(self.rig, "p0a", http=[PORT])
        ports = [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT}]
        self.service = service("web", 1, ports, type="NodePort")
        items = [self.service, *slices(self.rig, "web", "p0a")]
        folder = os.path.join(self.rig.folder, "services.d")
        os.mkdir(folder)
        Path(folder, "all.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": items}))
        self.config = CONFIG.format(folder=folder, writer=self.writer)

    def start(self) -> None:
        self.daemon = Daemon(self.rig, "n0", self.config)
        self.daemon.waitUntil(lambda: self.status()["sync"]["inForce"])

    def status(self) -> Any:
        return json.loads(self.daemon.get("http://127.0.0.1:10249/status")[2])

    def syncs(self) -> int:
        """How many updates there were."""
        text = self.daemon.get("http://127.0.0.1:10249/metrics")[2].decode()
        found = re.findall(r"^kubeproxy_sync_proxy_rules_duration_seconds_count\S* (\S+)$", text, re.M)
        assert found, text
        return int(max(map(float, found)))

    def ip(self, *lines: str) -> None:
        for line in lines:
            self.rig.run("n0", ["ip", *line.split()])

    def served(self, place: str, host: str, port: int, timeout: float = 1) -> bool:
        where = f"[{host}]" if ":" in host else host
        try:
            return self.rig.http(place, f"http://{where}:{port}/", timeout=timeout)[0] == 200
        except OSError:
            return False

    def expectServed(self, place: str, host: str, port: int) -> None:
        try:
            waitFor(lambda: self.served(place, host, port), SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{place} {host}:{port}: {error}; {self.daemon.log()}") from None

    def test_otherAddress(self) -> None:
        """The node gets another IPv4 address: its pods, the node itself and clients outside are served by that."""
        four = self.service["spec"]["clusterIPs"][0]
        self.start()
        self.expectServed("p0a", four, 80)
        self.ip(
            "-4 addr flush dev eth0", "addr add 192.0.2.77/24 dev eth0", "route add default via 192.0.2.5",
        )
        for place, host, port in (("p0a", four, 80), ("n0", four, 80), ("x", "192.0.2.77", NODE_PORT)):
            self.expectServed(place, host, port)
        found = self.daemon.waitUntil(lambda: self.status()["dataplane"])
        self.assertEqual(found["addresses"]["IPv4"], "192.0.2.77")  # type: ignore[attr-defined]
        self.daemon.assertNoTraceback()

    def test_familyComesLater(self) -> None:
        """A node without any IPv6 address serves IPv4; once it has one, IPv6 too."""
        four, six = self.service["spec"]["clusterIPs"]
        self.ip("-6 addr flush dev lo", "-6 addr flush dev eth0", "-6 addr flush dev cbr")
        self.start()
        self.expectServed("p0a", four, 80)
        self.assertIsNone(self.status()["dataplane"]["addresses"]["IPv6"])  # type: ignore[attr-defined]
        self.ip(
            "-6 addr add fd00:10:244:0::1/64 dev cbr", "-6 addr add 2001:db8:2::2/64 dev eth0",
            "-6 route replace default via 2001:db8:2::5",
        )
        self.expectServed("p0a", six, 80)
        self.expectServed("x", "2001:db8:2::2", NODE_PORT)
        self.assertTrue(self.served("p0a", four, 80, SECONDS))  # type: ignore[attr-defined]
        self.daemon.assertNoTraceback()

    def test_podsComeAndGo(self) -> None:
        """Interfaces of pods that come and go by the hundred are no reason to do anything."""
        self.start()
        before = self.syncs()
        lines = [f"link add t{number} type veth peer name u{number}" for number in range(100)]
        lines += [f"link set t{number} up" for number in range(100)]
        lines += [f"link del t{number}" for number in range(100)]
        self.rig.run("n0", ["ip", "-batch", "-"], input="\n".join(lines), timeout=90)
        self.ip("addr add 192.0.2.78/24 dev eth0")  # not the one that the node talks from
        self.expectServed("p0a", self.service["spec"]["clusterIPs"][0], 80)
        self.assertEqual(self.syncs(), before)  # type: ignore[attr-defined]
        self.ip("addr add 192.0.2.79/24 dev eth0", "route change default via 192.0.2.5 src 192.0.2.79")
        self.daemon.waitUntil(lambda: self.syncs() == before + 1)


class NftablesTests(Addresses, TestCase):
    """Rules of nf_tables."""

    writer = "nftables"


class IptablesTests(Addresses, TestCase):
    """Rules of iptables."""

    writer = "iptables"
