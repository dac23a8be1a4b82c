"""The kernel's settings of connection tracking, over a tree of files."""

from __future__ import annotations

import os
from typing import Any

from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from tests.builders import serviceMap, servicePort
from twisted_kproxy.config import Config, conntrackSettings
from twisted_kproxy.core.values import Frontend
from twisted_kproxy.netfilter.sysctls import (
    LIMIT,
    KernelSettings,
    Setting,
    Wishes,
    Write,
    connectionsWanted,
    decide,
    nodePortsOf,
    read,
    unreserved,
    warnOfLocalPorts,
)

#: What a machine with little memory comes up with.
FOUND = {
    "nf_conntrack_max": 65536,
    "nf_conntrack_buckets": 16384,
    "nf_conntrack_tcp_timeout_established": 432000,
    "nf_conntrack_tcp_timeout_close_wait": 60,
    "nf_conntrack_udp_timeout": 30,
    "nf_conntrack_udp_timeout_stream": 120,
    "nf_conntrack_tcp_be_liberal": 0,
}
GLOBAL = {"nf_conntrack_max", "nf_conntrack_buckets"}


def settings(host: bool = True, **values: int) -> dict[str, Setting]:
    """As they are in the host's network namespace, or in another."""
    return {name: Setting(value, host or name not in GLOBAL) for name, value in {**FOUND, **values}.items()}


class DecideTests(SynchronousTestCase):
    """What is to be written."""

    def said(self, wishes: Wishes, cpus: int, found: dict[str, Setting]) -> dict[str, int]:
        return {it.name.removeprefix("nf_conntrack_"): it.value for it in decide(wishes, cpus, found)}

    def test_connections(self) -> None:
        """So many per CPU, at least the minimum, at most a million unless the minimum is more; 0 for nothing."""
        for maxPerCore, minimum, cpus, expected in (
            (32768, 131072, 2, 131072),
            (32768, 131072, 8, 262144),
            (32768, 131072, 128, LIMIT),
            (32768, 3_000_000, 128, 3_000_000),
            (0, 131072, 8, 0),
            (100, 0, 2, 200),
        ):
            wishes = Wishes(maxPerCore=maxPerCore, minimum=minimum)
            self.assertEqual(connectionsWanted(wishes, cpus), expected)

    def test_host(self) -> None:
        """On the host: the number, the table for it, and the two times of TCP; in this order."""
        expected = [
            Write("nf_conntrack_max", 262144),
            Write("nf_conntrack_buckets", 65536),
            Write("nf_conntrack_tcp_timeout_established", 86400),
            Write("nf_conntrack_tcp_timeout_close_wait", 3600),
        ]
        self.assertEqual(decide(Wishes(), 8, settings()), expected)
        self.assertEqual(decide(Wishes(mode="on"), 8, settings()), expected)

    def test_neverLowered(self) -> None:
        """A larger number or table stays; a longer time does not."""
        found = settings(
            nf_conntrack_max=500_000, nf_conntrack_buckets=500_000, nf_conntrack_tcp_timeout_close_wait=9999
        )
        self.assertEqual(
            self.said(Wishes(), 8, found), {"tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}
        )

    def test_asItShouldBe(self) -> None:
        """What is right is not written."""
        found = settings(
            nf_conntrack_max=262144, nf_conntrack_buckets=65536, nf_conntrack_tcp_timeout_established=86400,
            nf_conntrack_tcp_timeout_close_wait=3600,
        )  # fmt: skip
        self.assertEqual(decide(Wishes(), 8, found), [])

    def test_everything(self) -> None:
        """Each wish has its setting; 0 leaves it."""
        wishes = Wishes("on", 0, 5, 0, 0, 40, 240, True)
        self.assertEqual(
            self.said(wishes, 8, settings()), {"udp_timeout": 40, "udp_timeout_stream": 240, "tcp_be_liberal": 1}
        )

    def test_elsewhere(self) -> None:
        """In another network namespace auto writes nothing, on writes what each namespace has for itself."""
        self.assertEqual(decide(Wishes(), 8, settings(host=False)), [])
        self.assertEqual(
            self.said(Wishes(mode="on"), 8, settings(host=False)),
            {"tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600},
        )

    def test_off(self) -> None:
        """Off is off."""
        self.assertEqual(decide(Wishes(mode="off"), 8, settings()), [])

    def test_missing(self) -> None:
        """What an older kernel does not have is left out."""
        found = settings()
        del found["nf_conntrack_tcp_timeout_close_wait"], found["nf_conntrack_buckets"]
        self.assertEqual(self.said(Wishes(), 8, found), {"max": 262144, "tcp_timeout_established": 86400})


class FilesTests(SynchronousTestCase):
    """Reading and writing."""

    def setUp(self) -> None:
        self.root = os.path.abspath(self.mktemp())
        self.folder = os.path.join(self.root, "proc/sys/net/netfilter")
        os.makedirs(self.folder)
        os.makedirs(os.path.join(self.root, "proc/sys/net/ipv4"))

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        path = os.path.join(self.root, path)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, mode)

    def fill(self, host: bool = True) -> None:
        for name, value in FOUND.items():
            mode = 0o644 if host or name not in GLOBAL else 0o444
            self.put(f"proc/sys/net/netfilter/{name}", f"{value}\n", mode)

    def now(self) -> dict[str, int | None]:
        return {name: it.value for name, it in read(self.root).items()}

    def test_written(self) -> None:
        """The settings are as wanted afterwards, and the log tells of each what it was and is."""
        self.fill()
        with capturedLogs() as logs:
            KernelSettings(Wishes(), self.root, 8).apply()
        self.assertEqual(
            self.now(),
            {
                **FOUND, "nf_conntrack_max": 262144, "nf_conntrack_buckets": 65536,
                "nf_conntrack_tcp_timeout_established": 86400, "nf_conntrack_tcp_timeout_close_wait": 3600,
            },
        )  # fmt: skip
        self.assertEqual((logs[0]["log_level"], logs[0]["before"]), (LogLevel.info, 65536))
        self.assertEqual(len(logs), 4)

    def test_elsewhere(self) -> None:
        """With auto nothing is touched, nor said, in a namespace that is not the host's."""
        self.fill(host=False)
        with capturedLogs() as logs:
            KernelSettings(Wishes(), self.root, 8).apply()
        self.assertEqual((self.now(), logs), (FOUND, []))

    def test_refused(self) -> None:
        """What cannot be written is one warning each; the others are."""
        self.fill()
        path = os.path.join(self.folder, "nf_conntrack_tcp_timeout_established")
        os.unlink(path)
        os.mkdir(path)
        with capturedLogs() as logs:
            KernelSettings(Wishes(), self.root, 8).apply()
        (warning,) = [it for it in logs if it["log_level"] is LogLevel.warn]
        self.assertEqual((warning["name"], warning["value"]), ("nf_conntrack_tcp_timeout_established", 86400))
        self.assertEqual(self.now()["nf_conntrack_tcp_timeout_close_wait"], 3600)

    def test_once(self) -> None:
        """What others change afterwards stays."""
        self.fill()
        settings = KernelSettings(Wishes(), self.root, 8)
        settings.apply()
        self.fill()
        settings.apply()
        self.assertEqual(self.now(), FOUND)

    def test_absent(self) -> None:
        """Without connection tracking there is nothing to write yet; the next call does."""
        settings = KernelSettings(Wishes(), self.root, 8)
        settings.apply()
        self.assertFalse(settings.done)
        self.fill()
        settings.apply()
        self.assertTrue(settings.done)
        self.assertEqual(self.now()["nf_conntrack_max"], 262144)

    def test_order(self) -> None:
        """What the configuration says comes in the order of its keys."""
        config = Config("", conntrackTcpCloseWait=7, conntrackUdpStream=8, conntrackMin=9)
        self.assertEqual(Wishes(*conntrackSettings(config)), Wishes(tcpCloseWait=7, udpStream=8, minimum=9))
        self.assertEqual(Wishes(*conntrackSettings(Config(""))), Wishes())

    def test_nodePorts(self) -> None:
        """Node ports and health-check ports count."""
        frontends = [Frontend("ClusterIP", "10.96.0.1", 80), Frontend("NodePort", None, 30080)]
        services = serviceMap(servicePort(frontends=frontends, healthCheckPort=32000))
        self.assertEqual(list(nodePortsOf(services)), [30080, 32000])

    def test_localPorts(self) -> None:
        """Node ports among the ports that connections get are told of, once and together; reserved ones are not."""
        for portRange, reserved, ports, expected in (
            ("32768\t60999\n", "\n", [30080, 31000], ""),
            ("16384\t60999\n", "\n", [30080, 30080, 31000], "30080, 31000"),
            ("16384\t60999\n", "22,30000-32767,40000\n", [30080, 40000], ""),
            ("16384\t60999\n", "30080\n", [30079, 30080, 30081], "30079, 30081"),
            ("16384\t60999\n", "\n", range(30000, 30020), "30000, 30001, 30002, 30003, 30004 and 15 more"),
            ("nonsense\n", "\n", [30080], ""),
        ):
            self.put("proc/sys/net/ipv4/ip_local_port_range", portRange)
            self.put("proc/sys/net/ipv4/ip_local_reserved_ports", reserved)
            with capturedLogs() as logs:
                warnOfLocalPorts(ports, self.root)
            said: list[Any] = [it["ports"] for it in logs]
            self.assertEqual(said, [expected] if expected else [])
        with capturedLogs() as logs:
            warnOfLocalPorts([30080], os.path.join(self.root, "nowhere"))
        self.assertEqual(logs, [])

    def test_unreserved(self) -> None:
        """Both ends count."""
        self.assertEqual(unreserved("100 200", "120-130", [99, 100, 120, 130, 131, 200, 201]), [100, 131, 200])
