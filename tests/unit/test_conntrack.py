"""Conntrack messages."""

from __future__ import annotations

import socket
import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import key
from twisted_kproxy.core.rules import Target
from twisted_kproxy.core.values import EVERYWHERE, Family, FrontendKey
from twisted_kproxy.netfilter.flows.conntrack import Judge, judging
from twisted_kproxy.netfilter.flows.scan import NEW, Flow, Scanner, Spot, decode, identity, question, spot
from twisted_kproxy.netfilter.netlink import NESTED, attribute, attributes, message
from twisted_kproxy.netfilter.slices import finish


def side(source: str, sport: int, destination: str, dport: int, protocol: int = 17) -> bytes:
    """One direction of a flow."""
    family, kinds = (socket.AF_INET6, (3, 4)) if ":" in source else (socket.AF_INET, (1, 2))
    ip = b"".join(
        attribute(kind, socket.inet_pton(family, it)) for kind, it in zip(kinds, (source, destination), strict=True)
    )
    proto = attribute(1, bytes([protocol])) + attribute(2, struct.pack(">H", sport))
    proto += attribute(3, struct.pack(">H", dport))
    return attribute(1 | NESTED, ip) + attribute(2 | NESTED, proto)


#: What Linux 6.18 has sent of UDP flows: two of IPv4, the first of which was led nowhere, and one of IPv6.
RECORDED: dict[Family, bytes] = {
    "IPv4": bytes.fromhex(
        "c00000000001220001000000f3550000020000003400018014000180080001000af4000a080002000a60000b1c0002800500010011000000"
        "060002001389000006000300003500003400028014000180080001000a60000b080002000af4000a1c000280050001001100000006000200"
        "003500000600030013890000080003000000000e080008000000000008000c000572b1d008000b000000000108000700000002581c001880"
        "080001000000000008000200000000000800030000000000c00000000001220001000000f355000002000000340001801400018008000100"
        "0af40009080002000a60000a1c000280050001001100000006000200138800000600030000350000340002801400018008000100c0000202"
        "080002000af400091c0002800500010011000000060002009c4200000600030013880000080003000000000e080008000000000008000c00"
        "705bd41408000b000000000108000700000002581c001880080001000000000008000200000000000800030000000000"
    ),
    "IPv6": bytes.fromhex(
        "f000000000012200010000003be537db0a0000004c0001802c00018014000300fd00001002440000000000000000000914000400fd000010"
        "0096000000000000000000101c0002800500010011000000060002001388000006000300003500004c0002802c0001801400030020010db8"
        "00000000000000000000000214000400fd0000100244000000000000000000091c0002800500010011000000060002009c42000006000300"
        "13880000080003000000000e080008000000000008000c00cd4b8f4408000b000000000108000700000002571c0018800800010000000000"
        "08000200000000000800030000000000"
    ),
}


def place(address: str, port: int) -> Spot:
    """An address and a port, as the scanner gives them."""
    return spot(socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address), port)


class FlowTests(SynchronousTestCase):
    """Reading flows, asking for them."""

    def test_decode(self) -> None:
        """A flow is what was dialled, where answers come from, and what names it to the kernel."""
        orig = side("10.244.0.9", 5000, "10.96.0.10", 53)
        answer = attribute(1 | NESTED, orig)
        answer += attribute(2 | NESTED, side("192.0.2.2", 40002, "10.244.0.9", 5000))
        answer += attribute(12, b"\0\0\0\x07") + attribute(3, b"\0\0\x01\x8e") + attribute(18, b"\0\x03")
        self.assertEqual(
            decode(answer), Flow(17, (socket.inet_aton("10.96.0.10"), 53), (socket.inet_aton("192.0.2.2"), 40002))
        )

    def test_identity(self) -> None:
        """A flow is named by what was sent, its zone and its number; what cannot be read ends it."""
        orig = attribute(1 | NESTED, side("10.244.0.9", 5000, "10.96.0.10", 53))
        zone, number = attribute(18, b"\0\x03"), attribute(12, b"\0\0\0\x07")
        answer = orig + attribute(2 | NESTED, b"1234") + zone + attribute(3, b"\0\0\1\x8e") + number + attribute(8, b"")
        data = b"before" + message(NEW, 2, 1, 2, answer)
        self.assertEqual(identity(data, 6), orig + zone + number)
        self.assertEqual(identity(message(NEW, 2, 1, 2, orig + b"\2\0\1\0"), 0), orig)

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

    @settings(deadline=None)
    @given(st.binary(max_size=120))
    def test_anyBytes(self, data: bytes) -> None:
        """Whatever comes is read without an error."""
        decode(data)

    def test_question(self) -> None:
        """The kernel is asked for UDP, and for one IPv4 frontend by address and port."""
        said = dict(attributes(question("IPv4", ("10.96.0.10", 53))))
        self.assertEqual(struct.unpack("=I", dict(attributes(said[25]))[1])[0], 0b101010)
        said = dict(attributes(question("IPv4", None)))
        self.assertEqual(struct.unpack("=I", dict(attributes(said[25]))[1])[0], 0b001000)

    def test_neverByAddress6(self) -> None:
        """IPv6 is never narrowed by address: kernels take equal for different there."""
        said = dict(attributes(question("IPv6", ("fd00::10", 53))))
        self.assertEqual(struct.unpack("=I", dict(attributes(said[25]))[1])[0], 0b101000)


class ScannerTests(SynchronousTestCase):
    """Reading flows a buffer at a time."""

    def test_recorded(self) -> None:
        """What a kernel has sent is read at fixed places, none of it with care; each can be named to be deleted."""
        for family, expected in (
            (
                "IPv4",
                [
                    (place("10.96.0.11", 53), place("10.96.0.11", 53), 0),
                    (place("10.96.0.10", 53), place("192.0.2.2", 40002), 192),
                ],
            ),
            ("IPv6", [(place("fd00:10:96::10", 53), place("2001:db8::2", 40002), 0)]),
        ):
            data = RECORDED[family]  # type: ignore[index]
            scanner = Scanner(family)  # type: ignore[arg-type]
            self.assertEqual(list(scanner.rows(data, 1)), expected)
            self.assertEqual(scanner.strange, 0)
            self.assertEqual(list(scanner.rows(data, 2)), [], "answers to another request")
            for dialled, answers, start in expected:
                flow = decode(data[start + 20 : start + int.from_bytes(data[start : start + 4], "little")])
                assert flow is not None
                self.assertEqual((spot(*flow.destination), spot(*flow.source)), (dialled, answers))
                self.assertIn(b"\x08\0\x0c\0", identity(data, start), "the kernel's number of the flow")

    def test_mixed(self) -> None:
        """Flows of any length and look, other messages and other protocols among them: as reading with care has it."""
        back = attribute(2 | NESTED, side("10.0.0.2", 7, "10.0.0.1", 5000))
        plain = attribute(1 | NESTED, side("10.0.0.1", 5000, "10.96.0.1", 53)) + back
        zoned = attribute(1 | NESTED, side("10.0.0.1", 5000, "10.96.0.2", 53) + attribute(3, b"\0\1")) + back
        tcp = attribute(1 | NESTED, side("10.0.0.1", 5000, "10.96.0.3", 53, 6)) + back
        marked = plain + attribute(8, b"\0\0\0\1")
        foreign = attribute(1 | NESTED, side("fd00::1", 5000, "fd00::2", 53)) + attribute(
            2 | NESTED, side("fd00::2", 53, "fd00::1", 5000)
        )
        answers = [plain, plain, marked, zoned, tcp, plain, b"", foreign, marked, marked, zoned]
        data = b"".join(message(NEW, 2, 9, 2, it) for it in answers) + message(NEW + 1, 2, 9, 2, plain)
        scanner = Scanner("IPv4")
        found = [row[:2] for row in scanner.rows(data, 9)]
        expected = []
        for it in answers:
            flow = decode(it)
            if flow is not None and flow.protocol == 17:
                expected.append((spot(*flow.destination), spot(*flow.source)))
        self.assertEqual(len(expected), 9)
        self.assertEqual(found, expected)

    @settings(deadline=None)
    @given(st.lists(st.binary(max_size=160)), st.binary(max_size=40))
    def test_anything(self, answers: list[bytes], rest: bytes) -> None:
        """Whatever comes, no error, and nothing that reading with care would not give."""
        data = b"".join(message(NEW, 2, 1, 2, it) for it in answers) + rest
        for dialled, source, start in Scanner("IPv4").rows(data, 1):
            flow = decode(data[start + 20 : start + int.from_bytes(data[start : start + 4], "little")])
            assert flow is not None
            self.assertEqual((dialled, source), (spot(*flow.destination), spot(*flow.source)))


class JudgeTests(SynchronousTestCase):
    """Which flows are led astray."""

    here = Target("192.0.2.2", 40002)

    def judge(self, led: dict[FrontendKey, frozenset[Target]], *own: Target, nodePorts: Any = EVERYWHERE) -> Judge:
        self.asked: list[bytes] = []

        def isLocal(address: bytes) -> bool:
            self.asked.append(address)
            return address in (socket.inet_aton("192.0.2.2"), socket.inet_aton("127.0.0.1"))

        return finish(judging("IPv4", led, own, nodePorts, isLocal))

    def test_addressed(self) -> None:
        """A flow to a frontend is stale when it is answered from elsewhere than the rules lead, or was never led."""
        judge = self.judge({key("10.96.0.10", 53, "UDP"): frozenset({self.here})})
        for answers, dialled, expected in (
            (("192.0.2.2", 40002), ("10.96.0.10", 53), False),
            (("192.0.2.2", 40003), ("10.96.0.10", 53), True),
            (("192.0.2.3", 40002), ("10.96.0.10", 53), True),
            (("10.96.0.10", 53), ("10.96.0.10", 53), True),
            (("192.0.2.2", 40003), ("10.96.0.11", 53), False),
            (("192.0.2.2", 40003), ("10.96.0.10", 54), False),
        ):
            self.assertIs(judge.stale(place(*dialled), place(*answers)), expected, (answers, dialled))

    def test_withoutTarget(self) -> None:
        """Every flow to a frontend without endpoints is stale."""
        judge = self.judge({key("10.96.0.10", 53, "UDP"): frozenset()})
        self.assertTrue(judge.stale(place("10.96.0.10", 53), place("192.0.2.2", 40002)))
        self.assertTrue(judge.stale(place("10.96.0.10", 53), place("10.96.0.10", 53)))

    def test_nodePort(self) -> None:
        """A node port's flows are those to an address of this node; each address is asked about once."""
        judge = self.judge({key("", 30053, "UDP"): frozenset({self.here})})
        for address, expected in (("127.0.0.1", True), ("203.0.113.77", False), ("203.0.113.77", False)):
            self.assertIs(judge.stale(place(address, 30053), place(address, 30053)), expected)
        self.assertEqual(len(self.asked), 2)
        self.assertFalse(judge.stale(place("127.0.0.1", 30054), place("127.0.0.1", 30054)))

    def test_nodePortNetworks(self) -> None:
        """Where node ports are served at some addresses only, flows to others are somebody else's."""
        judge = self.judge({key("", 30053, "UDP"): frozenset()}, nodePorts=("192.0.2.0/24", "::/0"))
        self.assertTrue(judge.stale(place("192.0.2.2", 30053), place("192.0.2.2", 30053)))
        self.assertFalse(judge.stale(place("127.0.0.1", 30053), place("127.0.0.1", 30053)))

    def test_own(self) -> None:
        """What was led to a socket of ours from where nothing leads there is stale; what was sent there is not."""
        judge = self.judge({key("10.96.0.10", 53, "UDP"): frozenset({self.here})}, self.here)
        self.assertTrue(judge.stale(place("10.96.0.99", 53), place("192.0.2.2", 40002)))
        self.assertTrue(judge.stale(place("203.0.113.77", 30053), place("192.0.2.2", 40002)))
        self.assertFalse(judge.stale(place("192.0.2.2", 40002), place("192.0.2.2", 40002)))
        self.assertFalse(judge.stale(place("10.96.0.10", 53), place("192.0.2.2", 40002)))
        self.assertFalse(judge.stale(place("10.96.0.99", 53), place("10.244.0.7", 53)), "somebody else's")

    def test_nothing(self) -> None:
        """Without frontends of the family there is nothing to look for."""
        others = key("fd00::10", 53, "UDP"), key("10.96.0.1", 53, "TCP")
        self.assertFalse(self.judge(dict.fromkeys(others, frozenset())))
