"""Health-check ports of Services, as a load balancer outside sees them: the whole daemon on a node of namespaces."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any
from unittest import SkipTest

from twisted.trial.unittest import TestCase

from tests.fakes.network import waitFor
from tests.integration.world import World, slices

Json = dict[str, Any]


class HealthCheckPorts:
    """Each test has a Service of its own, type LoadBalancer with external traffic policy Local."""

    timeout = 120
    writer = "nftables"

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        self.world = World.get(self.writer)
        self.rig = self.world.rig
        self.name = ""

    def tearDown(self) -> None:
        self.world.daemon.assertNoTraceback()

    def make(self, name: str, number: int, *pods: str) -> Json:
        self.name, self.number = name, number
        return self.world.make(
            name, *pods, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=number,
            ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": number - 1000}],
        )  # fmt: skip

    def ask(self, family: int, path: str = "/", method: str = "GET") -> tuple[int, Json]:
        """Status and body of the node's answer to the load balancer; 0 where nobody listens."""
        host = self.rig.address("n0", family)
        url = f"http://[{host}]:{self.number}{path}" if family == 6 else f"http://{host}:{self.number}{path}"
        try:
            code, headers, body = self.rig.http("x", url, method)
        except ConnectionError:
            return 0, {}
        self.headers = headers
        return code, json.loads(body) if body else {}

    def become(self, code: int, local: int) -> None:
        """Until both families say so; and what they say is as it should be."""
        for family in (4, 6):
            waitFor(lambda family=family: self.ask(family)[0] == code, 30, 0.05)  # type: ignore[misc]
            said = self.ask(family, "/whatever?x=1")
            if not code:
                continue
            self.assertEqual(
                said,
                (
                    code,
                    {
                        "service": {"namespace": "default", "name": self.name},
                        "localEndpoints": local, "serviceProxyHealthy": True,
                    },
                ),
            )  # fmt: skip
            self.assertEqual(self.headers["x-load-balancing-endpoint-weight"], str(local))
            self.assertEqual(self.headers["content-type"], "application/json")
            self.assertEqual(self.headers["x-content-type-options"], "nosniff")
            self.assertEqual(self.ask(family, method="HEAD"), (code, {}))

    def test_follows(self) -> None:
        """A ready endpoint of this node, none, two; then the Service goes, and nobody listens any more."""
        service = self.make("hc-follows", 32101, "p0a")
        self.become(200, 1)
        self.world.endpoints(self.name, "p1a")
        self.become(503, 0)
        self.world.endpoints(self.name, "p0a", "p0b", "p1a")
        self.become(200, 2)
        curl = ["curl", "-sS", "-g", "-o", "/dev/null", "-w", "%{http_code}"]
        for host in (self.rig.address("n0", 4), f"[{self.rig.address('n0', 6)}]"):
            self.assertEqual(self.rig.run("x", [*curl, f"http://{host}:{self.number}/healthz"]).stdout, "200")
        self.assertEqual(
            self.world.status()["healthChecks"]["default/hc-follows"]["IPv6"],
            {"port": 32101, "localEndpoints": 2, "listening": True, "error": ""},
        )
        self.world.api.delete(service)
        self.become(0, 0)
        self.assertNotIn("default/hc-follows", self.world.status()["healthChecks"])


class HealthCheckPortTests(HealthCheckPorts, TestCase):
    """See :class:`HealthCheckPorts`."""

    def test_onlyTerminating(self) -> None:
        """With terminating endpoints only the answer is 503, while the node port goes on to serve by them."""
        service = self.make("hc-terminating", 32102, "p0a")
        self.become(200, 1)
        leaving = slices(self.rig, self.name, "p0a")
        for it in leaving:
            it["endpoints"][0]["conditions"] = {"ready": False, "serving": True, "terminating": True}
        self.world.api.apply(*leaving)
        self.become(503, 0)
        for host in (self.rig.address("n0", 4), f"[{self.rig.address('n0', 6)}]"):
            self.assertEqual(self.world.curl("x", f"http://{host}:{service['spec']['ports'][0]['nodePort']}/"), "p0a")

    def test_claimedTwice(self) -> None:
        """Of two Services that claim one port the older one (or the first by name) has it, then the other one."""
        older = self.make("hc-older", 32103, "p0a")
        self.become(200, 1)
        self.make("hc-younger", 32103)
        self.name = "hc-older"
        self.become(200, 1)
        self.assertIn("32103", str(self.world.status()["pending"]))
        self.world.api.delete(older)
        self.name = "hc-younger"
        self.become(503, 0)

    def test_inUse(self) -> None:
        """A port that another program has is told of, and served as soon as it is free."""
        with self.rig.open("n0"):
            other = socket.create_server(("0.0.0.0", 32104))
        self.addCleanup(other.close)
        self.make("hc-inuse", 32104, "p0a")
        about = self.world.status()["healthChecks"]["default/hc-inuse"]
        self.assertEqual((about["IPv4"]["listening"], about["IPv6"]["listening"]), (False, True))

        def told() -> bool:
            said = self.rig.http("api", f"{self.world.api.url}/apis/events.k8s.io/v1/events")[2]
            return any(
                it["reason"] == "FailedToStartServiceHealthcheck" and it["regarding"]["name"] == "hc-inuse"
                for it in json.loads(said)["items"]
            )

        waitFor(told, 30, 0.1)
        other.close()
        self.become(200, 1)

    def test_zDraining(self) -> None:
        """
        While connections drain the answer is 503; then they are cut and the port is closed. After a restart it is 200
        again.
        """
        service = self.make("hc-draining", 32105, "p0a")
        self.become(200, 1)
        client = self.rig.connect("x", (self.rig.address("n0"), service["spec"]["ports"][0]["nodePort"]))
        self.addCleanup(client.close)
        daemon = self.world.daemon
        daemon.process.send_signal(signal.SIGTERM)
        waitFor(lambda: self.ask(4)[0] == 503, 9, 0.02)
        code, said = self.ask(6)
        self.assertEqual((code, said["serviceProxyHealthy"], said["localEndpoints"]), (503, False, 1))
        client.settimeout(30)
        self.assertRaises(ConnectionResetError, client.recv, 1)
        daemon.process.wait(30)
        self.assertEqual(self.ask(4)[0], 0)
        daemon.stop()
        self.world.daemon = self.world.startDaemon()
        self.become(200, 1)


class LegacyTablesTests(HealthCheckPorts, TestCase):
    """Legacy tables do not get in the way either."""

    writer = "python-iptables"
