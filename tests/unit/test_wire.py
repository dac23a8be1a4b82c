"""Tests of twisted_kproxy.core.wire."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core import wire
from twisted_kproxy.core.wire import Unreadable


def data(name: Any = "web", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}], **spec},
    }


class ServiceTests(SynchronousTestCase):
    """What is read of a Service, and what makes one unreadable as a whole."""

    def reason(self, it: dict[str, Any]) -> tuple[str, str]:
        """Why it is refused, alike as JSON and as plain values."""
        asValues = self.assertRaises(Unreadable, wire.convert, "Service", it)
        asJson = self.assertRaises(Unreadable, wire.decode, "Service", json.dumps(it).encode())
        self.assertEqual((asJson.key, asJson.reason), (asValues.key, asValues.reason))
        return asJson.key, asJson.reason

    def test_good(self) -> None:
        """Unknown fields do not matter; what the API may leave out may be left out, or null."""
        for it in (
            data(), data(unknown={"x": [1]}), data(clusterIP="None"), data(ports=None),
            data(type=None, clusterIPs=None),
            data(type="ExternalName", clusterIP="rubbish"), data(clusterIP="010.096.0.1"),
            data(ports=[{"port": 53, "protocol": "UDP", "name": None, "nodePort": None}]),
        ):
            self.assertEqual(wire.convert("Service", it).metadata.name, "web")

    def test_unfit(self) -> None:
        """A wrong address, port, protocol or type: the whole object is refused, with its key and the reason."""
        cases = {
            "'10.96.0.381' is not an IP address": data(clusterIP="10.96.0.381"),
            "'x' is not an IP address": data(clusterIPs=["10.96.0.1", "x"]),
            "port 0 is not in": data(ports=[{"port": 80}, {"port": 0}]),
            "port 70000 is not in": data(ports=[{"port": 70000}]),
            "nodePort -1 is not in": data(ports=[{"port": 80, "nodePort": -1}]),
            "protocol 'tcp' is none of TCP, UDP, SCTP": data(ports=[{"port": 80, "protocol": "tcp"}]),
            "type 'Cluster' is none of": data(type="Cluster"),
            "it has no spec": {"metadata": {"name": "web", "namespace": "shop"}, "spec": None},
            "spec.ports[0].port must be a number, and is text": data(ports=[{"port": "80"}]),
            "spec.ports[0].port must be a number, and is true or false": data(ports=[{"port": True}]),
            "spec.ports must be a list, and is a mapping": data(ports={"port": 80}),
        }
        for expected, it in cases.items():
            key, reason = self.reason(it)
            self.assertEqual(key, "shop/web")
            self.assertIn(expected, reason)

    def test_nameless(self) -> None:
        """What has no name, or no namespace, is refused as far as it can be named."""
        self.assertEqual(self.reason(data(name="")), ("", "it has no metadata.name"))
        self.assertEqual(self.reason({"metadata": {"name": "web"}}), ("web", "it has no metadata.namespace"))
        self.assertEqual(self.reason({"metadata": {"name": 7}})[0], "")
        self.assertEqual(self.reason({"spec": {}})[0], "")

    def test_keyDespiteBadMetadata(self) -> None:
        """Which object it is can be told though its labels cannot be read: its last good version can be kept."""
        it = data()
        it["metadata"]["labels"] = {"a": None}
        self.assertEqual(self.reason(it)[0], "shop/web")

    def test_deep(self) -> None:
        """Nesting without end is refused, not followed."""
        text = b'{"metadata":{"name":"web","namespace":"shop"},"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        self.assertRaises(Unreadable, wire.decode, "Service", text)

    def test_notUtf8(self) -> None:
        """Bytes that are no text are refused."""
        self.assertRaises(Unreadable, wire.decode, "Service", b'{"metadata":{"name":"\xff"}}')
