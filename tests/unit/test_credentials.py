"""Who to be at the API server: explicit options, service accounts, tokens that rotate."""

from __future__ import annotations

import os

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.pki import Authority
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.sources.agent import TlsPolicy
from twisted_kproxy.sources.api import accessFor
from twisted_kproxy.sources.credentials import ApiAccess, BearerToken, Pem, explicit, inCluster


class FilesCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder)

    def write(self, name: str, data: bytes | str) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        return path


class ExplicitTests(FilesCase):
    """Options that spell everything out."""

    def test_all(self) -> None:
        """Every option finds its place."""
        path = self.write("token", "abc\n")
        options = ApiOptions(
            "main", server="https://api.example:6443/", tokenFile=path,
            caFile="/ca", clientCertificate="/c", clientKey="/k",
        )
        access = explicit("main", options)
        assert access.certificateAuthority and access.clientCertificate and access.clientKey
        self.assertEqual(access.server, "https://api.example:6443")
        self.assertEqual(
            [it.path for it in (access.certificateAuthority, access.clientCertificate, access.clientKey)],
            ["/ca", "/c", "/k"],
        )
        self.assertEqual(access.manner(), f"client certificate and token of {path}")

    def test_errors(self) -> None:
        """What is wrong is named with the source and the file."""
        for options, parts in (
            (ApiOptions("main", server="api"), ("source main", "server")),
            (ApiOptions("main", server="https://a", tokenFile="/nowhere/token"), ("source main", "/nowhere/token")),
            (ApiOptions("main", server="https://a", clientKey="/k"), ("source main", "client certificate")),
            (ApiOptions("main", server="https://a", caFile="/nowhere/ca"), ("source main", "ca-file", "/nowhere/ca")),
            (ApiOptions("main", server="https://a", caFile=self.write("ca", "x")), ("source main", "no certificate")),
            (ApiOptions("main", kubeconfig="/nowhere/config"), ("source main", "/nowhere/config")),
            (ApiOptions("main", inCluster=True), ("source main", "KUBERNETES_SERVICE_HOST")),
            (ApiOptions("main"), ("source main", "kubeconfig")),
        ):
            with self.assertRaises(NotAvailable) as caught:
                accessFor("main", options, {})
            for part in parts:
                self.assertIn(part, str(caught.exception))
            self.assertEqual(str(caught.exception).count("source main"), 1)


class InClusterTests(FilesCase):
    """The service account of a pod."""

    def test_access(self) -> None:
        """Address from the environment, token and authority from the mounted folder."""
        self.write("token", "abc")
        for host, server in (("10.96.0.1", "https://10.96.0.1:443"), ("fd00::1", "https://[fd00::1]:443")):
            environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": "443"}
            access = inCluster(environ, self.folder)
            assert access.certificateAuthority is not None
            self.assertEqual(access.server, server)
            self.assertEqual(access.tokenFile, os.path.join(self.folder, "token"))
            self.assertEqual(access.certificateAuthority.path, os.path.join(self.folder, "ca.crt"))

    def test_noToken(self) -> None:
        """A pod without a mounted token is told so."""
        environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        with self.assertRaises(NotAvailable) as caught:
            inCluster(environ, self.folder)
        self.assertIn("token", str(caught.exception))


class BearerTokenTests(FilesCase):
    """A token that rotates."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.path = self.write("token", "one\n")
        self.token = BearerToken(self.clock, ApiAccess("https://a", "test", tokenFile=self.path, token="zero"))

    def test_rotation(self) -> None:
        """The file is read again once the last reading is about a minute old."""
        self.assertEqual(self.token.current(), "one")
        self.write("token", "two")
        self.clock.advance(49)
        self.assertEqual(self.token.current(), "one")
        self.clock.advance(1)
        self.assertEqual(self.token.current(), "two")
        self.write("token", "three")
        self.clock.advance(49)
        self.assertEqual(self.token.current(), "two")

    def test_unreadableKeepsTheOld(self) -> None:
        """A file that is missing, empty or no token for a while leaves the last token in use."""
        self.assertEqual(self.token.current(), "one")
        for data in ("", "\n", "a b", "a\x00b", "a\nInjected: b", "\u00e9"):
            self.write("token", data)
            self.clock.advance(60)
            self.assertEqual(self.token.current(), "one")
        os.unlink(self.path)
        self.clock.advance(60)
        self.assertEqual(self.token.current(), "one")
        self.write("token", "two")
        self.clock.advance(60)
        self.assertEqual(self.token.current(), "two")

    def test_neverRead(self) -> None:
        """Where a file never could be read, the token given beside it serves; without one there is an error."""
        os.unlink(self.path)
        self.assertEqual(self.token.current(), "zero")
        token = BearerToken(self.clock, ApiAccess("https://a", "test", tokenFile=self.path))
        with self.assertRaises(NotAvailable):
            token.current()

    def test_refused(self) -> None:
        """A token that the server did not take is read again at once; an older one that comes back late is not."""
        self.assertEqual(self.token.current(), "one")
        self.write("token", "two")
        self.token.refused("one")
        self.assertEqual(self.token.current(), "two")
        self.write("token", "three")
        self.token.refused("one")
        self.assertEqual(self.token.current(), "two")

    def test_plainHttp(self) -> None:
        """No token goes over an open connection."""
        self.assertEqual(BearerToken(self.clock, ApiAccess("http://a", "t", tokenFile=self.path)).current(), "")
        self.assertEqual(BearerToken(self.clock, ApiAccess("http://a", "t", token="x")).current(), "")

    def test_repr(self) -> None:
        """No repr shows a token."""
        self.token.current()
        self.assertNotIn("one", repr(self.token))


class TlsPolicyTests(FilesCase):
    """Certificates that cannot be used are found before the first connection."""

    def access(self, certificate: bytes, key: bytes, ca: bytes = b"") -> ApiAccess:
        return ApiAccess(
            "https://a", "test",
            certificateAuthority=Pem("the authority", data=ca) if ca else None,
            clientCertificate=Pem("the certificate", data=certificate),
            clientKey=Pem("the key", data=key),
        )

    def test_usable(self) -> None:
        """A key that belongs to its certificate, with a bundle of two authorities."""
        authority = Authority()
        certificate, key = authority.issue("node")
        policy = TlsPolicy(self.access(certificate + authority.certificate, key, authority.certificate * 2))
        policy.creatorForNetloc(b"192.0.2.1", 6443)

    def test_unusable(self) -> None:
        """What is wrong is named, and never asked for at a terminal."""
        authority = Authority()
        certificate, key = authority.issue("node")
        _, other = authority.issue("other")
        _, locked = authority.issue("locked", password=b"x")
        for access, part in (
            (self.access(certificate, other), "the key: it does not belong to the certificate"),
            (self.access(certificate, locked), "the key"),
            (self.access(certificate, b"x"), "the key"),
            (self.access(b"x", key), "the certificate"),
            (self.access(certificate, key, b"x"), "the authority"),
        ):
            with self.assertRaises(NotAvailable) as caught:
                TlsPolicy(access)
            self.assertIn(part, str(caught.exception))

    def test_rotation(self) -> None:
        """Files are read again for each connection; new ones that are of no use leave the old ones in force."""
        one, two = Authority("one"), Authority("two")
        path = self.write("ca.crt", one.certificate)
        policy = TlsPolicy(ApiAccess("https://a", "test", certificateAuthority=Pem("ca", path)))
        first = policy._trustRoot
        policy.creatorForNetloc(b"a", 443)
        self.assertIs(policy._trustRoot, first)
        self.write("ca.crt", "broken")
        policy.creatorForNetloc(b"a", 443)
        self.assertIs(policy._trustRoot, first)
        self.write("ca.crt", two.certificate)
        policy.creatorForNetloc(b"a", 443)
        self.assertIsNot(policy._trustRoot, first)
