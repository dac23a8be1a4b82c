"""Who to be at the API server: explicit options, service accounts, tokens that rotate."""

from __future__ import annotations

import os
import time

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.pki import Authority
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.redaction import redacted
from twisted_kproxy.sources.api import accessFaults, accessFor
from twisted_kproxy.sources.authentication import BearerToken, Credentials
from twisted_kproxy.sources.credentials import ApiAccess, Pem, checked, checkedServer, explicit, inCluster, readFile
from twisted_kproxy.sources.errors import NoCredentials
from twisted_kproxy.sources.tls import TlsPolicy


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

    def test_warning(self) -> None:
        """That the address is this proxy's own to provide is said, with what to do; a server given needs none."""
        self.write("token", "abc")
        self.write("ca.crt", Authority().certificate)
        environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        (warning,) = accessFor("main", ApiOptions("main", inCluster=True), environ, self.folder).warnings
        for part in ("https://10.96.0.1:443", "ClusterIP", "server = https://"):
            self.assertIn(part, warning)
        options = ApiOptions("main", inCluster=True, server="https://192.0.2.1:6443", tlsServerName="kubernetes")
        for variables in (environ, {}):
            access = accessFor("main", options, variables, self.folder)
            self.assertEqual((access.server, access.tlsServerName), ("https://192.0.2.1:6443", "kubernetes"))
            self.assertEqual(access.tokenFile, os.path.join(self.folder, "token"))
            self.assertEqual(access.warnings, ())


class ServerTests(SynchronousTestCase):
    """The URL of a server."""

    def test_good(self) -> None:
        """Addresses of both families, names, ports and prefixes."""
        for server in ("https://192.0.2.1:6443", "https://[2001:db8::1]:6443", "https://api/k8s/clusters/c1",
                       "http://[::1]:8080"):
            self.assertEqual(checkedServer(f"{server}/", "o"), server)

    def test_zone(self) -> None:
        """A link-local address with a zone is refused by that name."""
        for server in ("https://[fe80::1%25eth0]:6443", "https://[fe80::1%eth0]:6443"):
            self.assertIn("zone", str(self.assertRaises(NotAvailable, checkedServer, server, "o").args[0]))

    def test_noPassword(self) -> None:
        """A password in it is refused, and not shown."""
        for server in ("https://me:s3cr3tpw@h", "https://me:s3cr3tpw@h:99999", "https://me:s3cr3tpw@[::1"):
            self.assertNotIn("s3cr3tpw", str(self.assertRaises(NotAvailable, checkedServer, server, "o").args[0]))


class FileTests(FilesCase):
    """Files with credentials."""

    def test_odd(self) -> None:
        """What is no small regular file is refused at once, rather than waited for or read for ever."""
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)
        for path, part in (
            (fifo, "no regular file"), ("/dev/zero", "no regular file"), (self.folder, "irectory"),
            (self.write("big", b"x" * 1001), "larger than 1000"), ("/nowhere", "No such file"), ("a\0b", "NUL"),
        ):
            text = str(self.assertRaises(NotAvailable, readFile, path, "the file", 1000).args[0])
            self.assertIn(part, text)
            self.assertTrue(text.startswith("the file "), text)


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

    def test_refusedIsDropped(self) -> None:
        """A token that was refused is not sent again while its file cannot be read; the one given beside it is."""
        self.assertEqual(self.token.current(), "one")
        os.unlink(self.path)
        self.token.refused("one")
        self.assertEqual(self.token.current(), "zero")
        token = BearerToken(self.clock, ApiAccess("https://a", "test", tokenFile=self.write("token", "one")))
        token.current()
        os.unlink(self.path)
        token.refused("one")
        with self.assertRaises(NotAvailable):
            token.current()
        self.write("token", "two")
        self.assertEqual(token.current(), "two")

    def test_hidden(self) -> None:
        """Every token that was read is hidden from then on."""
        for it in ("t0k3n-number-1", "t0k3n-number-2"):
            self.write("token", it)
            self.clock.advance(60)
            self.token.current()
            self.assertEqual(redacted(f"x {it} y"), "x *** y")

    def test_identity(self) -> None:
        """Requests under one token are one identity; one that was refused late does not cost the new one."""
        credentials = Credentials(self.clock, ApiAccess("https://a", "test", tokenFile=self.path))
        one = self.successResultOf(credentials.current())
        self.assertIs(self.successResultOf(credentials.current()), one)
        self.assertNotIn("one", repr(one))
        self.write("token", "two")
        credentials.refused(one)
        two = self.successResultOf(credentials.current())
        self.write("token", "three")
        credentials.refused(one)
        self.assertIs(self.successResultOf(credentials.current()), two)
        os.unlink(self.path)
        credentials.refused(two)
        self.failureResultOf(credentials.current(), NoCredentials)

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

    def test_combined(self) -> None:
        """Certificate and key may stand in one file, as the kubelet's do, in either order."""
        certificate, key = Authority().issue("node")
        for data in (certificate + key, key + certificate):
            TlsPolicy(self.access(data, data))

    def test_validity(self) -> None:
        """A certificate whose time is over, or has not come, is a fault that speaks of the clock; no reason to end."""
        certificate, key = Authority().issue("node")
        ca = Authority("another").certificate
        now = time.time()
        for days, words in ((0, ()), (2, ("expired on", "clock")), (-2, ("valid only from", "clock wrong"))):
            policy = TlsPolicy(self.access(certificate, key, ca), wall=lambda days=days: now + days * 86400)
            faults = policy.faults()
            self.assertEqual(len(faults), 2 if words else 0)
            for fault, whose in zip(faults, ("the authority: the cert", "the certificate: the client"), strict=False):
                for word in (*words, whose):
                    self.assertIn(word, fault)
        # Bundles rotate: one that has ended beside one that has not is as it should be.
        old = Authority("old", days=-1).certificate
        access = ApiAccess("https://a", "test", certificateAuthority=Pem("ca", data=old + ca))
        self.assertEqual(accessFaults(access, {})[0], [])
        access = ApiAccess("https://a", "test", certificateAuthority=Pem("ca", data=old))
        self.assertIn("expired on", accessFaults(access, {})[0][0])

    def test_rotation(self) -> None:
        """
        Files are read again after a minute, and after a failure at once; new ones that are of no use leave the old
        ones in force, and are tried again soon.
        """
        clock = Clock()
        path = self.write("ca.crt", Authority("one").certificate)
        policy = TlsPolicy(ApiAccess("https://a", "test", certificateAuthority=Pem("ca", path)), clock)
        first = policy._material
        self.write("ca.crt", Authority("two").certificate)
        clock.advance(59)
        policy.creatorForNetloc(b"a", 443)
        self.assertIs(policy._material, first)
        clock.advance(1)
        policy.creatorForNetloc(b"a", 443)
        second = policy._material
        self.assertIsNot(second, first)
        self.write("ca.crt", "broken")
        policy.expire()
        policy.creatorForNetloc(b"a", 443)
        self.assertIs(policy._material, second)
        self.write("ca.crt", Authority("three").certificate)
        clock.advance(9)
        policy.creatorForNetloc(b"a", 443)
        self.assertIs(policy._material, second)
        clock.advance(1)
        policy.creatorForNetloc(b"a", 443)
        self.assertIsNot(policy._material, second)

    def test_clientCertificateChanges(self) -> None:
        """Another client certificate is told of; the same bytes again, or half of a new pair, is not."""
        clock = Clock()
        changes: list[str] = []
        one, two = Authority().issue("node"), Authority().issue("node")
        paths = self.write("c", one[0]), self.write("k", one[1])
        pems = [Pem(path, path) for path in paths]
        policy = TlsPolicy(ApiAccess("https://a", "test", clientCertificate=pems[0], clientKey=pems[1]), clock)
        policy.changed = lambda: changes.append("changed")
        self.write("c", one[0])
        clock.advance(60)
        policy.refresh()
        self.write("c", two[0])
        clock.advance(60)
        policy.refresh()
        self.assertEqual(changes, [])
        self.write("k", two[1])
        clock.advance(10)
        policy.refresh()
        self.assertEqual(changes, ["changed"])

    def test_badName(self) -> None:
        """A name to verify that can be none is refused at the start."""
        for name in ("a b", "\u00e9", "a\n"):
            with self.assertRaises(NotAvailable) as caught:
                checked(ApiAccess("https://a", "t", tlsServerName=name))
            self.assertIn("tls-server-name", str(caught.exception))
