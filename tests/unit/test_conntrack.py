"""Conntrack messages."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import key
from twisted_kproxy.netfilter.conntrack import Flow, Flows, Glance, decode, question
from twisted_kproxy.netfilter.netlink import NESTED, attribute, attributes


def side(source: str, sport: int, destination: str, dport: int, protocol: int = 17) -> bytes:
    """One direction of a flow."""
    family, kinds = (socket.AF_INET6, (3, 4)) if ":" in source else (socket.AF_INET, (1, 2))
    ip = b"".join(
        attribute(kind, socket.inet_pton(family, it)) for kind, it in zip(kinds, (source, destination), strict=True)
    )
    proto = attribute(1, bytes([protocol])) + attribute(2, struct.pack(">H", sport))
    proto += attribute(3, struct.pack(">H", dport))
    return attribute(1 | NESTED, ip) + attribute(2 | NESTED, proto)


class FlowTests(SynchronousTestCase):
    """Reading flows, asking for them."""

    def test_decode(self) -> None:
        """A flow is what was dialled, where answers come from, and what names it to the kernel."""
        orig = side("10.244.0.9", 5000, "10.96.0.10", 53)
        answer = attribute(1 | NESTED, orig)
        answer += attribute(2 | NESTED, side("192.0.2.2", 40002, "10.244.0.9", 5000))
        answer += attribute(12, b"\0\0\0\x07") + attribute(3, b"\0\0\x01\x8e") + attribute(18, b"\0\x03")
        identity = attribute(1 | NESTED, orig) + attribute(12, b"\0\0\0\x07") + attribute(18, b"\0\x03")
        found = decode(answer)
        self.assertEqual(
            found, Flow(17, (socket.inet_aton("10.96.0.10"), 53), (socket.inet_aton("192.0.2.2"), 40002), identity)
        )

    def test_decode6(self) -> None:
        """IPv6 likewise."""
        answer = attribute(1 | NESTED, side("fd00::9", 5000, "fd00::10", 53))
        answer += attribute(2 | NESTED, side("2001:db8::2", 40002, "fd00::9", 5000))
        found = decode(answer)
        assert found is not None
        self.assertEqual(found.source, (socket.inet_pton(socket.AF_INET6, "2001:db8::2"), 40002))

    def test_incomplete(self) -> None:
        """What is not a flow with ports is passed over."""
        self.assertIsNone(decode(b""))
        self.assertIsNone(decode(attribute(1 | NESTED, side("10.0.0.1", 1, "10.0.0.2", 2))))
        self.assertIsNone(decode(attribute(1 | NESTED, b"") + attribute(2 | NESTED, b"")))

    def test_glance(self) -> None:
        """A glance gives what reading with care gives; of what looks otherwise it gives nothing."""
        four, six = ("10.0.0.1", "10.0.0.2", "10.96.0.1"), ("fd00::1", "fd00::2", "fd96::1")
        for family, hosts in (("IPv4", four), ("IPv6", six)):
            glance = Glance(family)  # type: ignore[arg-type]
            back = attribute(2 | NESTED, side(hosts[1], 7, hosts[0], 5000))
            for n in range(3):
                answer = attribute(1 | NESTED, side(hosts[0], 5000 + n, hosts[2 - n % 2], 53 + n)) + back
                found = decode(answer)
                assert found is not None
                self.assertEqual(glance.destination(answer), found.destination)
            zoned = attribute(1 | NESTED, side(hosts[0], 1, hosts[1], 2) + attribute(3, b"\0\x01")) + back
            other = "fd00::9" if family == "IPv4" else "10.0.0.9"
            for answer in (zoned, attribute(1 | NESTED, side(other, 1, other, 2)) + back, b"", back):
                self.assertIsNone(glance.destination(answer))

    @given(st.lists(st.binary(max_size=120), max_size=5))
    def test_glanceAtAnything(self, answers: list[bytes]) -> None:
        """Whatever comes, no wrong answer."""
        glance = Glance("IPv4")
        for answer in answers:
            found = decode(answer)
            self.assertIn(glance.destination(answer), (None, found.destination if found else None))

    @given(st.binary(max_size=120))
    def test_anyBytes(self, data: bytes) -> None:
        """Whatever comes is read without an error."""
        decode(data)

    def test_question(self) -> None:
        """The kernel is asked for UDP, and for one IPv4 frontend by address and port."""
        said = dict(attributes(question("IPv4", key("10.96.0.10", 53, "UDP"))))
        self.assertEqual(struct.unpack("=I", dict(attributes(said[25]))[1])[0], 0b101010)
        said = dict(attributes(question("IPv4", None)))
        self.assertEqual(struct.unpack("=I", dict(attributes(said[25]))[1])[0], 0b001000)

    def test_neverByAddress6(self) -> None:
        """IPv6 is never narrowed by address: kernels take equal for different there."""
        said = dict(attributes(question("IPv6", key("fd00::10", 53, "UDP"))))
        self.assertEqual(struct.unpack("=I", dict(attributes(said[25]))[1])[0], 0b101000)

    def test_stale(self) -> None:
        """A flow is stale when its answers come from none of its frontend's targets."""
        flows = Flows(None)
        here = socket.inet_aton("192.0.2.2")
        led = {(socket.inet_aton("10.96.0.10"), 53): {(here, 40002)}}
        for source, dialled, expected in (
            ((here, 40002), "10.96.0.10", False),
            ((here, 40003), "10.96.0.10", True),
            ((socket.inet_aton("10.96.0.10"), 53), "10.96.0.10", True),
            ((here, 40003), "10.96.0.11", False),
        ):
            flow = Flow(17, (socket.inet_aton(dialled), 53), source, b"")
            self.assertIs(flows._isStale(flow, led), expected)

    def test_staleNodePort(self) -> None:
        """A node port's flows are those to an address of this node."""
        flows = Flows(None)
        led: dict[tuple[bytes, int], set[tuple[bytes, int]]] = {(b"", 30053): set()}
        for dialled, expected in (("127.0.0.1", True), ("203.0.113.77", False)):
            flow = Flow(17, (socket.inet_aton(dialled), 30053), (b"", 0), b"")
            self.assertIs(flows._isStale(flow, led), expected)
