"""kubeconfig files."""

from __future__ import annotations

import base64
import os
from typing import Any

import yaml
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.pki import Authority
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.redaction import redacted
from twisted_kproxy.sources.credentials import FILE_LIMIT, ApiAccess, Exec
from twisted_kproxy.sources.kubeconfig import EXEC_VERSIONS, load

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
        """What would change who we are there is refused by name, rather than passed over."""
        for field, value in (
            ("auth-provider", {"name": "gcp"}), ("username", "a"), ("password", SECRET), ("as", "root"),
            ("as-groups", ["a"]), ("as-uid", "1"), ("as-user-extra", {"a": ["b"]}), ("act-as", "root"),
        ):
            text = self.refused(config(user={field: value}))
            self.assertIn(f"user 'u': {field} ", text)
            self.assertIn("is not supported", text)

    def test_unsupportedEmpty(self) -> None:
        """The same fields without a value say nothing."""
        access = self.load(config({"proxy-url": ""}, {"exec": None, "username": "", "token": SECRET}))
        self.assertEqual((access.token, access.proxy, access.exec), (SECRET, None, None))

    def test_unknown(self) -> None:
        """A field that nobody knows, such as a misspelt one, is passed over with a warning that names it."""
        access = self.load(config({"extensions": [{"name": "x"}], "insecure": True}, {"tokenfile": SECRET}))
        self.assertEqual(len(access.warnings), 2)
        self.assertIn("cluster 'c': 'insecure' is not a known field", access.warnings[0])
        self.assertIn("user 'u': 'tokenfile' is not a known field", access.warnings[1])

    def test_proxy(self) -> None:
        """A proxy by its URL, whose password shows nowhere; one that cannot be used names the field."""
        access = self.load(config({"proxy-url": f"http://me:{SECRET}@192.0.2.9:3128"}))
        assert access.proxy is not None
        self.assertEqual((access.proxy.host, access.proxy.password), ("192.0.2.9", SECRET))
        self.assertNotIn(SECRET, repr(access) + str(access.proxy))
        text = self.refused(config({"proxy-url": f"socks4://me:{SECRET}@192.0.2.9"}))
        self.assertIn("cluster 'c': proxy-url: the scheme socks4 is not supported", text)

    def test_compression(self) -> None:
        """Compression can be turned off."""
        self.assertFalse(self.load(config()).disableCompression)
        self.assertTrue(self.load(config({"disable-compression": True})).disableCompression)

    def test_oneMethod(self) -> None:
        """An exec plugin beside a token or certificate is refused; a token beside a certificate is not."""
        plugin = {"command": "x", "apiVersion": EXEC_VERSIONS[1]}
        data = base64.b64encode(b"PEM").decode()
        for other, what in (
            ({"token": SECRET}, "a token"), ({"tokenFile": "x"}, "a token"),
            ({"client-certificate-data": data, "client-key-data": data}, "a client certificate"),
        ):
            self.assertIn(f"an exec plugin and {what}", self.refused(config(user={"exec": plugin, **other})))
        access = self.load(config(user={"token": SECRET, "client-certificate-data": data, "client-key-data": data}))
        self.assertEqual(access.manner(), "client certificate and token")

    def test_tokenAndFile(self) -> None:
        """Beside a token, a file that cannot be read yet is no reason not to start."""
        access = self.load(config(user={"token": SECRET, "tokenFile": "nowhere"}))
        self.assertEqual(access.tokenFile, os.path.join(self.folder, "nowhere"))

    def test_plainHttp(self) -> None:
        """Over plain http whoever we are is ignored, with a warning, be it readable or not."""
        server = {"server": "http://192.0.2.1:8080"}
        data = base64.b64encode(b"PEM").decode()
        for user, what in (
            ({"token": SECRET}, "token"), ({"tokenFile": "nowhere"}, "token of"),
            ({"client-certificate-data": data, "client-key-data": data}, "client certificate"),
            ({"exec": {"command": "x", "apiVersion": EXEC_VERSIONS[1]}}, "exec plugin x"),
        ):
            (warning,) = self.load(config(server, user)).warnings
            self.assertIn("http://192.0.2.1:8080 is asked without TLS", warning)
            self.assertIn(what, warning)
        self.assertEqual(self.load(config(server)).warnings, ())

    def plugin(self, cluster: dict[str, Any] | None = None, **fields: Any) -> Exec:
        access = self.load(
            config(cluster, {"exec": {"command": "x", "apiVersion": EXEC_VERSIONS[1], **fields}})
        )
        assert access.exec is not None
        return access.exec

    def test_exec(self) -> None:
        """Every field of an exec plugin; a command with a slash counts from the kubeconfig's folder."""
        found = self.plugin(
            {"extensions": [
                {"name": "other", "extension": 1},
                {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "a"}},
            ]},
            command="./bin/get", args=["token", "--x"], env=[{"name": "A", "value": "1"}, {"name": "B"}],
            apiVersion=EXEC_VERSIONS[0], interactiveMode="Never", provideClusterInfo=True, installHint="get it",
        )
        self.assertEqual(found.command, os.path.join(self.folder, "bin", "get"))
        self.assertEqual((found.args, found.env), (("token", "--x"), (("A", "1"), ("B", ""))))
        self.assertEqual((found.apiVersion, found.installHint), (EXEC_VERSIONS[0], "get it"))
        self.assertTrue(found.provideClusterInfo)
        self.assertEqual(bytes(found.clusterConfig), b'{"audience":"a"}')
        self.assertEqual(self.plugin().command, "x")
        self.assertEqual(self.plugin(command="/bin/x").command, "/bin/x")
        self.assertEqual(self.plugin(args=None, env=None, interactiveMode="IfAvailable").args, ())
        self.assertNotIn(SECRET, repr(self.plugin(args=[SECRET], env=[{"name": "A", "value": SECRET}])))

    def test_badExec(self) -> None:
        """What an exec plugin must not say is refused by the name of its field."""
        v1, beta = EXEC_VERSIONS
        for fields, part in (
            ({"command": ""}, "command is not set"),
            ({"apiVersion": ""}, "apiVersion is not set"),
            ({"apiVersion": "client.authentication.k8s.io/v1alpha1"}, "v1alpha1' is not supported"),
            ({"apiVersion": v1}, "interactiveMode is not set"),
            ({"apiVersion": v1, "interactiveMode": "Always"}, "interactiveMode Always cannot be"),
            ({"apiVersion": beta, "interactiveMode": "Always"}, "interactiveMode Always cannot be"),
            ({"apiVersion": v1, "interactiveMode": "never"}, "'never' is not known"),
            ({"args": "x"}, "args"),
            ({"args": ["a\0b"]}, "NUL"),
            ({"env": [{"value": SECRET}]}, "name"),
            ({"env": [{"name": "A=B", "value": SECRET}]}, "env"),
            ({"env": {"A": SECRET}}, "env"),
        ):
            document = config(user={"exec": {"command": "x", "apiVersion": beta, **fields}})
            text = self.refused(document)
            self.assertIn(part, text)
            self.assertIn("user 'u': exec", text)

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
            f"token: *{SECRET}\n", f"token: !{SECRET} x\n", f"token: !!int {SECRET}\n", f"token: !{SECRET}!x y\n",
            f"token: @{SECRET}\n", f'token: "{SECRET}\\q"\n', f"? [{SECRET}]\n: 1\n", f"{SECRET}: 1\n{SECRET}: 1\n",
            f"a: 1\n---\ntoken: {SECRET}\n", f"token: '{SECRET}\n", b"token: \xff\xfe\n", "[" * 10_000,
        ):
            with self.assertRaises(NotAvailable) as caught:
                load(self.write("config", text))
            self.assertIn(os.path.join(self.folder, "config"), str(caught.exception))
            self.assertNotIn(SECRET, str(caught.exception))

    def test_lines(self) -> None:
        """What is wrong with the YAML is told with its line; tabs by name."""
        for text, parts in (
            ("a: 1\nb: [\n", ("line 3",)),
            ("clusters:\n\t- name: c\n", ("line 2", "not with tabs")),
            ("a: 1\nb: *gone\n", ("line 2", "alias")),
            ("a: 1\na: 2\n", ("line 2", "twice")),
            ("a: 1\n---\nb: 2\n", ("line 3", "second document")),
        ):
            with self.assertRaises(NotAvailable) as caught:
                load(self.write("config", text))
            for part in parts:
                self.assertIn(part, str(caught.exception))

    def test_bombs(self) -> None:
        """Aliases that stand for aliases, and files without end, cost neither memory nor time."""
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
        merged = ["a0: &a0 {x: 1}"]
        merged += [f"a{n}: &a{n} {{y{n}: 1, <<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
        for text, part in (
            ("\n".join(lines), "aliases stand for more than"), ("\n".join(merged), "aliases stand for more than"),
            ("#" * (FILE_LIMIT + 1), "larger than"),
        ):
            with self.assertRaises(NotAvailable) as caught:
                load(self.write("config", text))
            self.assertIn(part, str(caught.exception))

    def test_notAFile(self) -> None:
        """A pipe or folder in its place is refused rather than waited for."""
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)
        for path in (fifo, self.folder):
            with self.assertRaises(NotAvailable):
                load(path)

    def test_anchors(self) -> None:
        """Ordinary anchors are understood."""
        text = (
            "current-context: &n here\ncontexts: [{name: *n, context: {cluster: *n}}]\n"
            "clusters: [{name: *n, cluster: {server: 'https://192.0.2.1'}}]\n"
        )
        self.assertEqual(load(self.write("config", text)).server, "https://192.0.2.1")

    def test_hidden(self) -> None:
        """A token is hidden wherever text goes out from the moment it was read, whatever is wrong with the rest."""
        for number, extra in enumerate(({}, {"client-key-data": "!"}, {"exec": {"command": ""}})):
            token = f"hidd3n-t0k3n-{number}"
            try:
                self.load(config(user={"token": token, **extra}))
            except NotAvailable as error:
                self.assertNotIn(token, str(error))
            self.assertEqual(redacted(f"x {token}"), "x ***")

    def test_emptyData(self) -> None:
        """Data that decodes to nothing is no certificate, and does not fall back to the platform's authorities."""
        self.assertIn("certificate-authority-data", self.refused(config({"certificate-authority-data": "\n "})))
