"""kubeconfig files."""

from __future__ import annotations

import base64
import os
from typing import Any

import yaml
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.pki import Authority
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.sources.credentials import ApiAccess
from twisted_kproxy.sources.kubeconfig import load

SECRET = "s3cr3t-t0k3n"


def config(cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "x"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.1:6443", **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "preferences": {},
    }


class KubeconfigTests(SynchronousTestCase):
    """What a kubeconfig comes to."""

    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder)

    def write(self, name: str, text: str | bytes) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        return path

    def load(self, document: Any) -> ApiAccess:
        return load(self.write("config", yaml.safe_dump(document)))

    def refused(self, document: Any) -> str:
        with self.assertRaises(NotAvailable) as caught:
            self.load(document)
        text = str(caught.exception)
        self.assertIn(os.path.join(self.folder, "config"), text)
        self.assertNotIn(SECRET, text)
        return text

    def test_token(self) -> None:
        """The current context names cluster and user; the token shows in no repr."""
        access = self.load(config(user={"token": SECRET}))
        self.assertEqual((access.server, access.token), ("https://192.0.2.1:6443", SECRET))
        self.assertNotIn(SECRET, repr(access))

    def test_paths(self) -> None:
        """Relative paths count from the kubeconfig's own folder, wherever we are; absolute ones stay."""
        self.write("token", SECRET)
        certificate, key = Authority().issue("node")
        self.write("node.crt", certificate)
        path = self.write("node.key", key)
        access = self.load(
            config(
                {"certificate-authority": "ca.crt"},
                {"tokenFile": "token", "client-certificate": "./node.crt", "client-key": path},
            )
        )
        assert access.certificateAuthority and access.clientCertificate and access.clientKey
        self.assertEqual(access.tokenFile, os.path.join(self.folder, "token"))
        self.assertEqual(access.certificateAuthority.path, os.path.join(self.folder, "ca.crt"))
        self.assertEqual(access.clientCertificate.read(), certificate)
        self.assertEqual(access.clientKey.read(), key)

    def test_dataOverrides(self) -> None:
        """Data given at once goes before a file of the same meaning, and shows in no repr."""
        data = base64.b64encode(b"PEM").decode()
        access = self.load(
            config(
                {"certificate-authority": "nowhere", "certificate-authority-data": data},
                {"client-certificate-data": data, "client-key-data": data, "client-key": "nowhere"},
            )
        )
        assert access.certificateAuthority and access.clientKey
        self.assertEqual(access.certificateAuthority.read(), b"PEM")
        self.assertEqual(access.clientKey.read(), b"PEM")
        self.assertNotIn("PEM", repr(access.clientKey).replace("<Pem", ""))

    def test_cluster(self) -> None:
        """Path prefix, server name, IPv6 and null fields are understood."""
        access = self.load(
            config({"server": "https://[2001:db8::1]/k8s/", "tls-server-name": "api", "certificate-authority": None})
        )
        self.assertEqual((access.server, access.tlsServerName), ("https://[2001:db8::1]/k8s", "api"))

    def test_noUser(self) -> None:
        """A context without a user is anonymous."""
        document = config()
        del document["contexts"][0]["context"]["user"]
        self.assertEqual(self.load(document).manner(), "anonymous")

    def test_dangling(self) -> None:
        """A name that leads nowhere is named, and so is who says it."""
        for section, parts in (
            ("contexts", ("current-context", "'here'", "contexts")),
            ("clusters", ("context 'here'", "'c'", "clusters")),
            ("users", ("context 'here'", "'u'", "users")),
        ):
            text = self.refused({**config(), section: []})
            for part in parts:
                self.assertIn(part, text)

    def test_noContext(self) -> None:
        """Without a current context there is nothing to go by."""
        document = config()
        del document["current-context"]
        self.assertIn("current-context", self.refused(document))

    def test_twice(self) -> None:
        """A name that two entries carry is refused."""
        document = config()
        document["clusters"] *= 2
        self.assertIn("'c'", self.refused(document))

    def test_halves(self) -> None:
        """A certificate without a key, or a key without a certificate, is refused."""
        data = base64.b64encode(b"PEM").decode()
        self.assertIn("no client key", self.refused(config(user={"client-certificate-data": data})))
        self.assertIn("no client certificate", self.refused(config(user={"client-key-data": data})))

    def test_unsupported(self) -> None:
        """What would change who we are or where we go is refused by name, rather than passed over."""
        for field, value in (
            ("exec", {"command": "aws"}), ("auth-provider", {"name": "gcp"}), ("username", "admin"),
            ("password", SECRET), ("as", "root"), ("as-groups", ["a"]), ("as-uid", "1"),
            ("as-user-extra", {"a": ["b"]}),
        ):
            text = self.refused(config(user={field: value}))
            self.assertIn(f"user 'u': {field} ", text)
        self.assertIn("cluster 'c': proxy-url ", self.refused(config({"proxy-url": "http://192.0.2.9:3128"})))

    def test_unsupportedEmpty(self) -> None:
        """The same fields without a value say nothing."""
        access = self.load(config({"proxy-url": ""}, {"exec": None, "username": "", "token": SECRET}))
        self.assertEqual(access.token, SECRET)

    def test_insecure(self) -> None:
        """Taking any certificate is possible, but not together with an authority."""
        self.assertTrue(self.load(config({"insecure-skip-tls-verify": True})).insecure)
        text = self.refused(config({"insecure-skip-tls-verify": True, "certificate-authority": "ca.crt"}))
        self.assertIn("insecure-skip-tls-verify", text)

    def test_server(self) -> None:
        """A server must be an HTTP URL without credentials, query or fragment."""
        for server in ("", "192.0.2.1:6443", "ftp://x", "https://", "https://a:b@x", "https://x:0", "https://x:99999",
                       "https://x/?a=b", "https://[::1", "unix:///x", "https://a b", "https://\u00e9.example"):
            self.assertIn("server", self.refused(config({"server": server})))

    def test_base64(self) -> None:
        """Data that is not base64 is refused without being shown."""
        self.assertIn("client-key-data", self.refused(config(user={"client-key-data": f"{SECRET}!"})))

    def test_types(self) -> None:
        """A value of another type is refused by the name of its field."""
        self.assertIn("token", self.refused(config(user={"token": 12345})))
        self.assertIn("insecure", self.refused(config({"insecure-skip-tls-verify": "yes"})))
        self.assertIn("clusters", self.refused({**config(), "clusters": {"c": {}}}))
        self.assertIn("user 'u'", self.refused({**config(), "users": [{"name": "u", "user": ["x"]}]}))

    def test_unreadableTokenFile(self) -> None:
        """A token file must be readable at the start."""
        self.assertIn("nowhere", self.refused(config(user={"tokenFile": "nowhere"})))

    def test_badFiles(self) -> None:
        """A file that is missing, or not YAML, or not a mapping is named, with the line; nothing of it is shown."""
        with self.assertRaises(NotAvailable) as caught:
            load(os.path.join(self.folder, "nowhere"))
        self.assertIn("nowhere", str(caught.exception))
        for text in (
            f"a: 1\ntoken: {SECRET}: [\n", "- a\n", "", "\x00", "a: !!python/object:os.system {}\n", "a: 2001-99-99\n",
        ):
            with self.assertRaises(NotAvailable) as caught:
                load(self.write("config", text))
            self.assertIn(os.path.join(self.folder, "config"), str(caught.exception))
            self.assertNotIn(SECRET, str(caught.exception))
