"""The kernel's settings of connection tracking, as the daemon leaves them in a network namespace of its own."""

from __future__ import annotations

import os
from unittest import SkipTest

from twisted.trial.unittest import TestCase

from tests.fakes.daemon import Daemon
from tests.fakes.network import SmallRig

CONFIG = """
[kproxy]
node-name = n0
[source:local]
type = files
path = services.d
[conntrack]
{said}
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.1.1
  ports: [{name: http, port: 80, nodePort: 30080}]
"""


class SysctlTests(TestCase):
    """Only what a namespace has for itself can differ here; what is the whole machine's must not."""

    timeout = 90

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)
        os.mkdir(os.path.join(self.rig.folder, "services.d"))
        with open(os.path.join(self.rig.folder, "services.d", "web.yaml"), "w") as file:
            file.write(SERVICE)

    def now(self, name: str, place: str = "netfilter/nf_conntrack_") -> str:
        return self.rig.run("n0", ["cat", f"/proc/sys/net/{place}{name}"]).stdout.strip()

    def run_(self, said: str) -> Daemon:
        daemon = Daemon(self.rig, "n0", CONFIG.format(said=said))
        daemon.waitUntil("http://127.0.0.1:10256/healthz")
        daemon.waitUntil(lambda: b'"inForce":true' in daemon.get(STATUS)[2])
        return daemon

    def test_on(self) -> None:
        """With on the times are set, here only; the number of connections, which is everybody's, is not."""
        before = self.now("max"), self.now("buckets")
        daemon = self.run_("sysctls = on\nudp-timeout = 77s\ntcp-be-liberal = yes")
        for name, value in (
            ("tcp_timeout_close_wait", "3600"), ("tcp_timeout_established", "86400"), ("udp_timeout", "77"),
            ("udp_timeout_stream", "120"), ("tcp_be_liberal", "1"),
        ):  # fmt: skip
            self.assertEqual(self.now(name), value, name)
        self.assertEqual((self.now("max"), self.now("buckets")), before)
        self.assertIn("nf_conntrack_tcp_timeout_close_wait was 60 and is 3600 now", daemon.log())
        self.assertNotIn("nf_conntrack_max", daemon.log())
        daemon.assertNoTraceback()

    def test_noRules(self) -> None:
        """A daemon that writes no rules leaves the kernel's settings alone, too."""
        daemon = self.run_("sysctls = on\n[rules]\nwriter = none")
        self.assertEqual(self.now("tcp_timeout_close_wait"), "60")
        daemon.assertNoTraceback()

    def test_auto(self) -> None:
        """With auto nothing is touched in a namespace, nor said. Node ports among local ports are told of, once."""
        self.rig.run("n0", ["sysctl", "-qw", "net.ipv4.ip_local_port_range=20000 60999"])
        names = ("tcp_timeout_close_wait", "tcp_timeout_established", "udp_timeout", "max", "buckets")
        before = [self.now(name) for name in names]
        daemon = self.run_("")
        self.assertEqual([self.now(name) for name in names], before)
        self.assertEqual(before[0], "60")
        self.assertNotIn("net.netfilter", daemon.log())
        self.assertEqual(daemon.log().count("Node ports lie where this node takes ports"), 1)
        self.assertIn("20000-60999): 30080.", daemon.log())
        daemon.assertNoTraceback()


STATUS = "http://127.0.0.1:10249/status"
