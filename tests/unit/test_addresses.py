"""Tests of twisted_kproxy.core.addresses."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core.addresses import BadAddress, canonical, network, sortKey, unusable


class CanonicalTests(SynchronousTestCase):
    """Addresses are read as Kubernetes reads them, and written in one way."""

    def test_leadingZeros(self) -> None:
        """Leading zeros are decimal, as Go's old parser had it, never octal."""
        self.assertEqual(canonical("172.30.0.041"), ("172.30.0.41", "IPv4"))
        self.assertEqual(canonical("010.000.0.1"), ("10.0.0.1", "IPv4"))

    def test_spaces(self) -> None:
        """Spaces around an address are dropped."""
        self.assertEqual(canonical(" 203.0.113.5 "), ("203.0.113.5", "IPv4"))

    def test_ipv6(self) -> None:
        """IPv6 is compressed and lower case."""
        self.assertEqual(canonical("FD00:0:0:0:0:0:0:1"), ("fd00::1", "IPv6"))

    def test_mapped(self) -> None:
        """An IPv4-mapped address is the IPv4 address."""
        self.assertEqual(canonical("::ffff:10.0.0.1"), ("10.0.0.1", "IPv4"))

    def test_refused(self) -> None:
        """What is no address is refused with what was given."""
        for text in ("", "None", "web", "1.2.3", "1.2.3.4.5", "1.2.3.256", "fe80::1%eth0", "10.0.0.1/24", "1.2.3.4\n5"):
            error = self.assertRaises(BadAddress, canonical, text)
            self.assertIn(repr(text), str(error))


class UnusableTests(SynchronousTestCase):
    """Some addresses are nobody's to serve."""

    def test_refusedRanges(self) -> None:
        """Loopback, link-local, multicast, unspecified and broadcast addresses are named as such."""
        expected = {
            "127.0.0.1": "loopback", "127.9.9.9": "loopback", "::1": "loopback",
            "169.254.169.254": "link-local", "fe80::1": "link-local",
            "224.0.0.1": "multicast", "ff02::1": "multicast",
            "0.0.0.0": "unspecified", "::": "unspecified", "255.255.255.255": "broadcast",
        }
        self.assertEqual({text: unusable(text) for text in expected}, expected)

    def test_ordinary(self) -> None:
        """Private, documentation and public addresses are fine."""
        for text in ("10.0.0.1", "192.0.2.1", "8.8.8.8", "fd00::1", "2001:db8::1"):
            self.assertIsNone(unusable(text))


class NetworkTests(SynchronousTestCase):
    """CIDRs."""

    def test_hostBits(self) -> None:
        """Host bits are cleared, spaces and leading zeros forgiven."""
        self.assertEqual(network(" 203.0.113.9/25"), ("203.0.113.0/25", "IPv4"))
        self.assertEqual(network("fd00::1/64"), ("fd00::/64", "IPv6"))

    def test_refused(self) -> None:
        """An address alone, or a prefix that is too long, is refused."""
        for text in ("10.0.0.1", "10.0.0.0/33", "fd00::/129", "10.0.0.0/-1", "10.0.0.0/255.0.0.0", "x/8"):
            self.assertRaises(BadAddress, network, text)

    def test_sort(self) -> None:
        """Addresses sort by number, IPv4 first."""
        given = ["10.0.0.10", "fd00::1", "10.0.0.9"]
        self.assertEqual(sorted(given, key=sortKey), ["10.0.0.9", "10.0.0.10", "fd00::1"])
