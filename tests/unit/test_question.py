"""Tests of twisted_kproxy.core.question."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core.question import BadQuestion, Dialled, Question, ServiceAsked, questionOf


def ask(**query: str) -> Question:
    return questionOf({("from" if key == "of" else key): [value] for key, value in query.items()})


class AddressTests(SynchronousTestCase):
    """What is dialled."""

    def test_forms(self) -> None:
        """IPv4 plainly, IPv6 in brackets, protocols in any case, TCP where none is given."""
        for text, expected in (
            ("10.96.0.10:80", Dialled("10.96.0.10", 80, "TCP")),
            ("10.96.0.10:53/UDP", Dialled("10.96.0.10", 53, "UDP")),
            ("[fd00:0::10]:53/udp", Dialled("fd00::10", 53, "UDP")),
            ("[fd00::10]:132/Sctp", Dialled("fd00::10", 132, "SCTP")),
        ):
            self.assertEqual(ask(to=text).about, expected)

    def test_faults(self) -> None:
        """What is wrong is named, with how to write it."""
        for text, words in (
            ("fd00::10:80", "to: write an IPv6 address in brackets, as in [fd00::10]:80, not 'fd00::10:80'"),
            ("10.96.0.10", "to: '10.96.0.10' has no port; write 10.96.0.10:80"),
            ("[fd00::10]", "to: '[fd00::10]' is not as in [fd00::10]:80"),
            ("[fd00::10", "to: '[fd00::10' is not as in [fd00::10]:80"),
            ("[10.96.0.10]:80", "to: brackets are for IPv6 addresses, and '10.96.0.10' is none"),
            ("10.96.0.10:0", "to: '0' is not a port number (1 to 65535)"),
            ("10.96.0.10:65536", "to: '65536' is not a port number (1 to 65535)"),
            ("10.96.0.10:http", "to: 'http' is not a port number (1 to 65535)"),
            ("10.96.0.10:٣", "to: '٣' is not a port number (1 to 65535)"),
            ("10.96.0.10:80/icmp", "protocol 'icmp' is none of tcp, udp, sctp"),
            ("10.96.0.10:80/", "protocol '' is none of tcp, udp, sctp"),
            ("example.com:80", "to: 'example.com' is not an IP address"),
            ("[fe80::1%eth0]:80", "to: 'fe80::1%eth0' has a zone, which means nothing on another node"),
        ):
            with self.assertRaises(BadQuestion) as caught:
                ask(to=text)
            self.assertEqual(str(caught.exception), words)


class ServiceTests(SynchronousTestCase):
    """Which Service is asked for."""

    def test_forms(self) -> None:
        """
        With a port by name or number, with none, and with the unnamed one; also one that no API server would admit, by
        the key under which it is in quarantine.
        """
        for text, expected in (
            ("shop/web:http", ServiceAsked("shop", "web", "http")),
            ("shop/web:80/udp", ServiceAsked("shop", "web", "80", "UDP")),
            ("shop/web", ServiceAsked("shop", "web")),
            ("shop/web:", ServiceAsked("shop", "web", "")),
            ("shop/Bad_Name:80/udp", ServiceAsked("shop", "Bad_Name", "80", "UDP")),
            ("Shop/we b\n", ServiceAsked("Shop", "we b\n")),
            ("../kube/odd", ServiceAsked("..", "kube/odd")),
            ("shop/a:b:", ServiceAsked("shop", "a:b", "")),
        ):
            self.assertEqual(ask(service=text).about, expected)

    def test_faults(self) -> None:
        """A namespace and a name, and a protocol that there is."""
        for text in ("web", "/web", "shop/", "shop/:80", ""):
            with self.assertRaises(BadQuestion) as caught:
                ask(service=text)
            self.assertEqual(str(caught.exception), f"service: {text!r} is not as in NAMESPACE/NAME:PORT")
        with self.assertRaises(BadQuestion) as caught:
            ask(service="shop/web:80/icmp")
        self.assertEqual(str(caught.exception), "protocol 'icmp' is none of tcp, udp, sctp")


class QueryTests(SynchronousTestCase):
    """The whole of it."""

    def check(self, words: str, **query: str) -> None:
        with self.assertRaises(BadQuestion) as caught:
            ask(**query)
        self.assertIn(words, str(caught.exception))

    def test_source(self) -> None:
        """An address with or without brackets, canonical; and the interface by which it comes in."""
        self.assertIsNone(ask(to="10.0.0.1:80").source)
        self.assertEqual(ask(to="10.0.0.1:80", of="10.244.00.5").source, "10.244.0.5")
        self.assertEqual(ask(to="[fd00::1]:80", of="[fd00:1::0]").source, "fd00:1::")
        self.assertEqual(ask(to="10.0.0.1:80", of="10.0.0.2", interface="cni0").link, "cni0")

    def test_faults(self) -> None:
        """One thing is asked, once, with nothing that means nothing."""
        self.check("either to or service must be given")
        self.check("either to or service must be given", to="10.0.0.1:80", service="shop/web")
        self.check("there is no parameter 'src'", to="10.0.0.1:80", src="10.0.0.2")
        self.check("from is IPv6 and to is IPv4", to="10.0.0.1:80", of="fd00::1")
        self.check("from: 'me' is not an IP address", to="10.0.0.1:80", of="me")
        self.check("interface needs a name, and from beside it", to="10.0.0.1:80", interface="cni0")
        with self.assertRaises(BadQuestion) as caught:
            questionOf({"to": ["10.0.0.1:80", "10.0.0.2:80"]})
        self.assertEqual(str(caught.exception), "to is given 2 times; once is enough")
