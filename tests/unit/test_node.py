"""The node's own address, and the rule writer that fits the node."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.netfilter.choose import chooseWriter, hasLegacyRules, isLegacyNode
from twisted_kproxy.netfilter.memory import MemoryWriter
from twisted_kproxy.netfilter.netlink import HEADER, attribute
from twisted_kproxy.netfilter.node import Address, addresses, ownAddresses, primaryAddress, sourceTowards

FAMILIES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


def said(address: str, scope: int = 0, flags: int = 0x80, peer: str = "") -> bytes:
    """The kernel's word on one address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    payload = struct.pack("=BBBBI", family, 24, flags & 0xFF, scope, 2)
    payload += attribute(1, socket.inet_pton(family, peer or address))
    if family == socket.AF_INET or peer:
        payload += attribute(2, socket.inet_pton(family, address))
    payload += attribute(8, struct.pack("=I", flags))
    return HEADER.pack(16 + len(payload), 20, 2, 1, 0) + payload


class FakeHost:
    """Opens sockets of a host with these addresses."""

    def __init__(self, source: str | None, *known: bytes) -> None:
        self.source = source
        self.known = known
        self.open = 0

    def __call__(self, family: int, kind: int, protocol: int) -> Any:
        host = self

        class It:
            """A socket."""

            def __enter__(self) -> Any:
                host.open += 1
                return self

            def __exit__(self, *_: object) -> None:
                host.open -= 1

            def bind(self, address: object) -> None: ...

            def settimeout(self, seconds: float) -> None: ...

            def setsockopt(self, *_: object) -> None:
                raise OSError(92, "Protocol not available")

            def send(self, data: bytes) -> None: ...

            def connect(self, address: object) -> None:
                if host.source is None:
                    raise OSError(101, "Network is unreachable")

            def getsockname(self) -> tuple[str, int]:
                assert host.source is not None
                return (host.source, 1)

            def recv(self, size: int) -> bytes:
                return b"".join(host.known) + HEADER.pack(20, 3, 2, 1, 0) + bytes(4)

        return It()


class AddressTests(SynchronousTestCase):
    """Where packets are led to."""

    def primary(self, family: Any, source: str | None, *known: bytes) -> str | None:
        host = FakeHost(source, *known)
        try:
            return primaryAddress(family, host)
        finally:
            self.assertEqual(host.open, 0)

    def test_defaultRoute(self) -> None:
        """It is the address that the node talks from along its default route, in canonical text."""
        self.assertEqual(self.primary("IPv4", "192.0.2.2", said("192.0.2.9")), "192.0.2.2")
        self.assertEqual(self.primary("IPv6", "2001:0db8:0::2"), "2001:db8::2")

    def test_noDefaultRoute(self) -> None:
        """Without a default route it is the first global address that stays."""
        known = [said("127.0.0.1", 254), said("169.254.3.3", 253), said("192.0.2.7"), said("192.0.2.8")]
        self.assertEqual(self.primary("IPv4", None, *known), "192.0.2.7")
        known = [
            said("::1", 254),
            said("fe80::1", 253),
            said("2001:db8::10", flags=0x01),
            said("2001:db8::11", flags=0x20),
            said("2001:db8::12", flags=0x40),
            said("2001:db8::13"),
        ]
        self.assertEqual(self.primary("IPv6", None, *known), "2001:db8::13")

    def test_unfitSource(self) -> None:
        """A link-local source is of no use to packets from elsewhere."""
        self.assertEqual(self.primary("IPv6", "fe80::2%eth0", said("2001:db8::13")), "2001:db8::13")

    def test_loopback(self) -> None:
        """With nothing else it is the loopback address; without that, the family is not spoken."""
        self.assertEqual(self.primary("IPv4", None, said("127.0.0.1", 254)), "127.0.0.1")
        self.assertEqual(self.primary("IPv6", None, said("::1", 254), said("fe80::1", 253)), "::1")
        self.assertIsNone(self.primary("IPv6", None))

    def test_noSockets(self) -> None:
        """A kernel without that family gives none."""

        def none(*_: int) -> Any:
            raise OSError(97, "Address family not supported by protocol")

        self.assertIsNone(primaryAddress("IPv6", none))

    def test_pointToPoint(self) -> None:
        """On a point-to-point link the own address counts, not the peer's."""
        [found] = addresses("IPv4", FakeHost(None, said("10.0.0.1", peer="10.0.0.2")))
        self.assertEqual(found, Address("10.0.0.1", 0, 0x80))

    def test_towards(self) -> None:
        """The address by which the node talks to another may be any of its own; without a way there is none."""
        self.assertEqual(sourceTowards("10.0.0.1", FakeHost("127.0.0.1")), "127.0.0.1")
        self.assertEqual(sourceTowards("fe80::9", FakeHost("fe80:0::2%eth0")), "fe80::2")
        self.assertIsNone(sourceTowards("10.0.0.1", FakeHost(None)))

    def test_own(self) -> None:
        """Those of all interfaces; a family that cannot be read has none."""

        def onlyIPv4(*what: int) -> Any:
            return FakeHost(None, said("127.0.0.1", 254), said("192.0.2.7"))(*what)

        self.assertEqual(ownAddresses(onlyIPv4), {"127.0.0.1", "192.0.2.7"})

        def none(*_: int) -> Any:
            raise OSError(97, "Address family not supported by protocol")

        self.assertEqual(ownAddresses(none), frozenset())

    def test_thisHost(self) -> None:
        """This very machine has a loopback address, and one to lead packets to."""
        self.assertIn("127.0.0.1", [it.address for it in addresses("IPv4")])
        self.assertIsNotNone(primaryAddress("IPv4"))


class ChooseTests(SynchronousTestCase):
    """``writer = auto``."""

    def setUp(self) -> None:
        self.made: dict[str, MemoryWriter] = {}

    def maker(self, name: str, reason: str = "") -> tuple[str, Callable[[], Any]]:
        def probe() -> Deferred[str]:
            return fail(NotAvailable(reason)) if reason else succeed("works")

        def make() -> MemoryWriter:
            writer = self.made[name] = MemoryWriter()
            writer.probe = probe  # type: ignore[method-assign]
            return writer

        return name, make

    def test_first(self) -> None:
        """The first that works is chosen; what comes after it is not even made."""
        chosen = self.successResultOf(
            chooseWriter([self.maker("nftables"), self.maker("python-iptables")], lambda: False)
        )
        self.assertIs(chosen, self.made["nftables"])
        self.assertEqual(list(self.made), ["nftables"])

    def test_second(self) -> None:
        """When the first does not work it is closed, and the next is taken."""
        makers = [self.maker("nftables", "there is no nft"), self.maker("python-iptables")]
        chosen = self.successResultOf(chooseWriter(makers, lambda: False))
        self.assertIs(chosen, self.made["python-iptables"])
        self.assertTrue(self.made["nftables"].closed)
        self.assertFalse(self.made["python-iptables"].closed)

    def test_legacyNode(self) -> None:
        """On a node with legacy rules python-iptables comes first; when it does not work, the others follow."""
        makers = [self.maker("nftables"), self.maker("python-iptables")]
        self.assertIs(self.successResultOf(chooseWriter(makers, lambda: True)), self.made["python-iptables"])
        makers = [self.maker("nftables"), self.maker("python-iptables", "no library")]
        self.assertIs(self.successResultOf(chooseWriter(makers, lambda: True)), self.made["nftables"])

    def test_none(self) -> None:
        """When nothing works, every reason is told."""

        def missing() -> Any:
            raise NotAvailable("no library; install python-iptables")

        makers = [self.maker("nftables", "there is no nft"), ("python-iptables", missing)]
        error = self.failureResultOf(chooseWriter(makers, lambda: False), NotAvailable).value
        self.assertIn("nftables: there is no nft", str(error))
        self.assertIn("python-iptables: no library; install python-iptables", str(error))

    def test_bug(self) -> None:
        """A writer that fails in an unforeseen way costs only itself."""

        def broken() -> Any:
            raise ZeroDivisionError("oops")

        chosen = self.successResultOf(chooseWriter([("broken", broken), self.maker("nftables")], lambda: False))
        self.assertIs(chosen, self.made["nftables"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_nothingToTry(self) -> None:
        """Without candidates that is said."""
        error = self.failureResultOf(chooseWriter([], lambda: False), NotAvailable).value
        self.assertIn("there is none to try", str(error))

    def test_detection(self) -> None:
        """A node where no legacy nat table was ever asked for is none with legacy rules."""
        path = self.mktemp()
        self.assertIs(hasLegacyRules(tables=path), False)
        with open(path, "w", encoding="ascii") as file:
            file.write("filter\n")

        def forbidden(*_: int) -> Any:
            raise AssertionError("the kernel was asked, which loads a module")

        self.assertIs(hasLegacyRules(forbidden, path), False)
        self.assertIsInstance(isLegacyNode(), bool)
