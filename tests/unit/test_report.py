"""Tests of twisted_kproxy.report."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.builders import member, portName, service, slice_
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core import wire
from twisted_kproxy.core.values import Change, Replaced, ServiceMap
from twisted_kproxy.report import Report


class Source:
    name = "local"

    def ages(self) -> dict[str, float | None]:
        return {"Service": 1.5}

    def faults(self) -> dict[str, str]:
        return {"a.yaml": "is no YAML"}

    def status(self) -> dict[str, Any]:
        return {"type": "files"}


class Balancer:
    def status(self) -> dict[str, Any]:
        return {f"{portName()}/cluster": {"endpoints": {"10.1.0.1:8080": 3}}}


class Syncer:
    failures = 2
    outFor = 0.0
    applied = ServiceMap()


class ReportTests(SynchronousTestCase):
    """What operators see."""

    def setUp(self) -> None:
        self.cluster = Cluster("n0")
        self.cluster.expect("local", ("Service", "EndpointSlice"))
        self.syncer = Syncer()
        self.report = Report(
            {"version": "1"}, self.cluster, lambda: [Source()], Balancer(), lambda: None,  # type: ignore[arg-type,list-item]
            lambda: self.syncer, lambda port, endpoints: {str(it): {"failures": 1} for it in endpoints[:1]},
            lambda: {"engine": "python", "active": 3},
        )

    def put(self, it: Any, kind: Any) -> None:
        self.cluster.say(Change("local", kind, wire.keyOf(it.metadata), it))

    def page(self) -> dict[str, Any]:
        loaded = json.loads(json.dumps({name: part() for name, part in self.report.parts().items()}))
        assert isinstance(loaded, dict)
        return loaded

    def test_waiting(self) -> None:
        """Before everything was listed it says what is waited for."""
        page = self.page()
        self.assertEqual(page["sync"]["waitingFor"], ["local/EndpointSlice", "local/Service"])
        self.assertEqual(page["dataplane"], {"state": "not started"})

    def test_services(self) -> None:
        """Frontends, endpoints with open connections, and those that fail."""
        self.cluster.say(Replaced("local", "Service", {}))
        self.cluster.say(Replaced("local", "EndpointSlice", {}))
        self.put(service(), "Service")
        self.put(slice_(member("10.1.0.1")), "EndpointSlice")
        self.cluster.current()
        shown = self.page()["services"][str(portName())]
        self.assertEqual(shown["frontends"], [{"kind": "ClusterIP", "address": "10.96.0.10:80/TCP"}])
        self.assertEqual(shown["cluster"], {"endpoints": {"10.1.0.1:8080": 3}})
        self.assertEqual(shown["failing"], {"10.1.0.1:8080": {"failures": 1}})
        self.assertEqual(self.page()["relay"], {"engine": "python", "active": 3})

    def test_inForce(self) -> None:
        """What is shown is what was last worked out: to look costs no work, and says when something is not in force."""
        self.syncer.applied = self.cluster.current()
        self.assertTrue(self.page()["sync"]["inForce"])
        self.put(service(), "Service")
        page = self.page()
        self.assertEqual((page["sync"]["inForce"], page["services"]), (False, {}))
        self.assertFalse(self.cluster.settled)
        self.syncer.applied = self.cluster.current()
        self.assertTrue(self.page()["sync"]["inForce"])

    def test_problems(self) -> None:
        """Files that cannot be read stand beside parts of objects that are not served."""
        self.put(service(externalIPs=["x"]), "Service")
        self.cluster.current()
        self.assertEqual(
            [(it["kind"], it["key"]) for it in self.page()["problems"]],
            [("source local", "a.yaml"), ("Service", "shop/web")],
        )
