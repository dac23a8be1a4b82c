"""
What a daemon at work says of a request (``/explain``), and what a plan beside it says of the kernel (``--plan``).
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any
from unittest import SkipTest
from urllib.parse import quote

from twisted.trial.unittest import TestCase

from tests.fakes.daemon import TWISTD
from tests.integration.world import PORT, World


class ExplainTests(TestCase):
    """On a node of namespaces, with an API server and real rules."""

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        self.world = World.get("nftables")
        self.rig = self.world.rig

    def tearDown(self) -> None:
        self.world.daemon.assertNoTraceback()

    def explain(self, **query: str) -> Any:
        """By curl, on the node, as an operator does."""
        text = "&".join(f"{key.rstrip('_')}={quote(value)}" for key, value in query.items())
        url = f"http://127.0.0.1:10249/explain?{text}"
        done = self.rig.run("n0", ["curl", "-sS", "--fail-with-body", url], check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return json.loads(done.stdout)

    def plan(self) -> list[str]:
        done = self.rig.run("n0", [TWISTD, "kproxy", "--config", self.world.daemon.config, "--plan"], check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        return done.stdout.splitlines()

    def test_explain(self) -> None:
        """A client is answered by one of those that are said to be eligible, who sees the address that is told."""
        it = self.world.make(
            "why", "p0a", "p1a", type="NodePort", externalTrafficPolicy="Local", sessionAffinity="ClientIP",
            ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30970}],
        )
        address, client = it["spec"]["clusterIP"], self.rig.address("p0b", 4)
        asked = {"to": f"{address}:80", "from_": client}
        found = self.explain(**asked)
        [answer], [port] = found["answers"], found["servicePorts"]
        self.assertEqual((answer["inside"], answer["verdict"], answer["pool"]), (True, "endpoints", "cluster"))
        self.assertTrue(answer["inForce"])
        self.assertIsNone(answer["affinity"]["boundTo"])
        eligible = {it["endpoint"]: it["sees"] for it in port["pools"]["cluster"]["endpoints"]}
        self.assertEqual(set(eligible), {f"{self.rig.address(pod, 4)}:{PORT}" for pod in ("p0a", "p1a")})
        who = self.world.curl("p0b", f"http://{address}/")
        bound = self.explain(**asked)["answers"][0]["affinity"]["boundTo"]
        self.assertEqual(bound, f"{self.rig.address(who, 4)}:{PORT}")
        for place, expected in (("x", "local"), ("p0b", "cluster")):
            found = self.explain(to=f"{self.rig.address('n0', 4)}:30970", from_=self.rig.address(place, 4))
            self.assertEqual(found["answers"][0]["pool"], expected)
        left = self.explain(service="default/why:http")["servicePorts"][0]["pools"]["local"]["leftOut"]
        self.assertIn("not on this node, but on n1", [it["why"] for it in left])
        [answer] = self.explain(to=f"{address}:81", from_=client)["answers"]
        self.assertEqual((answer["hit"], answer["verdict"]), ("no such port", "reject"))

    def test_plan(self) -> None:
        """Beside the daemon there is nothing to do; what somebody takes out of the kernel is shown, and only that."""
        it = self.world.make(
            "planned", "p0a", type="NodePort",
            ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30971}],
        )
        address = it["spec"]["clusterIP"]
        lines = self.plan()
        self.assertEqual(lines[-1], "nothing to do", "\n".join(lines))
        self.world.daemon.process.send_signal(signal.SIGSTOP)  # it would mend the rules at once
        try:
            taken = f"delete element inet kproxy service-ips4 {{ {address} . tcp . 80 }}"
            self.rig.run("n0", ["nft", taken])
            lines = self.plan()
        finally:
            self.world.daemon.process.send_signal(signal.SIGCONT)
        begins = next(n for n, line in enumerate(lines) if line.startswith("Different"))
        self.assertEqual(lines[begins], "Different in the kernel (1):")
        self.assertRegex(lines[begins + 1], rf"^  \+ {address}:80/TCP -> {self.rig.address('n0', 4)}:[0-9]+$")
        self.assertEqual(lines[-1], "1 to add, 0 to change, 0 to remove")
        self.world.daemon.waitUntil(lambda: self.plan()[-1] == "nothing to do")
