"""TLS, programs and proxies as they are: who the server must be, who we are, and the way there."""

from __future__ import annotations

import os
import signal
from typing import Any

import yaml
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.internet.protocol import Factory, Protocol

from tests.fakes.pki import Authority
from tests.fakes.waiting import isRunning
from tests.integration.apirig import ApiCase
from tests.shared.sources import Words
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.sources import agent, execrun, proxies, tls
from twisted_kproxy.sources.api import ApiSource, accessFor
from twisted_kproxy.sources.credentials import Exec, Pem, Proxy
from twisted_kproxy.sources.errors import ConnectionLost, NoCredentials, Unauthorized, Unreachable, Unverified
from twisted_kproxy.sources.proxychoice import withProxy

BETA = "client.authentication.k8s.io/v1beta1"


class TlsTests(ApiCase):
    """Whom to believe, and what to say when that is nobody."""

    async def test_addresses(self) -> None:
        """Servers by address, IPv4 and IPv6, and by name."""
        for interface in ("127.0.0.1", "::1"):
            listing = await self.list(self.client(self.serve(interface, interface=interface)))
            self.assertEqual(listing.rv, "7")
        await self.list(self.client(self.serve("localhost").replace("127.0.0.1", "localhost")))

    async def test_prefix(self) -> None:
        """A path in the server's URL goes before every request's."""
        await self.list(self.client(self.serve("127.0.0.1") + "/k8s/clusters/c1"))
        self.assertEqual(self.api.requests[0]["path"], "/k8s/clusters/c1/api/v1/services")

    async def test_wrongName(self) -> None:
        """A certificate for others says for whom it is; nothing is sent."""
        for names, interface, parts in (
            (("kubernetes", "10.96.0.1"), "127.0.0.1", ("kubernetes, 10.96.0.1", "not for 127.0.0.1")),
            (("127.0.0.1",), "::1", ("it is for 127.0.0.1", "not for ::1")),
            ((), "127.0.0.1", ("no name or address at all",)),
            (("localhost",), "127.0.0.1", ("it is for localhost",)),
            (tuple(f"h{n}" for n in range(50)), "127.0.0.1", ("h7 and 42 more",)),
        ):
            client = self.client(self.serve(*names, interface=interface), token="s3cr3t-t0k3n")
            text = await self.error(self.list(client), Unverified)
            for part in ("for another name or address", "tls-server-name", *parts):
                self.assertIn(part, text)
        self.assertEqual(self.api.requests, [])

    async def test_serverName(self) -> None:
        """The name to verify replaces the host, and is sent, so that the server can choose by it."""
        certificate, key = self.authority.issue("kube-apiserver", "kubernetes.default")
        server = self.serve(pair=(certificate, key))
        await self.list(self.client(server, tlsServerName="kubernetes.default"))
        text = await self.error(self.list(self.client(server, tlsServerName="other.default")), Unverified)
        self.assertIn("it is for kubernetes.default, not for other.default", text)
        self.assertEqual(self.names, [b"kubernetes.default", b"other.default"])
        await self.error(self.list(self.client(server)), Unverified)
        self.assertIsNone(self.names[-1])

    async def test_unknownAuthority(self) -> None:
        """Who issued the certificate, and who would have counted."""
        server = self.serve("127.0.0.1", pair=Authority("mallory").issue("kube-apiserver", "127.0.0.1"))
        text = await self.error(self.list(self.client(server)), Unverified)
        for part in ("certificate verify failed", "kube-apiserver, issued by mallory", "the authority: kubernetes"):
            self.assertIn(part, text)
        text = await self.error(self.list(self.client(server, certificateAuthority=None)), Unverified)
        self.assertIn("the platform's", text)
        await self.list(self.client(server, certificateAuthority=None, insecure=True))

    async def test_validity(self) -> None:
        """A server's certificate whose time is over, or has not come, speaks of the clock."""
        for days, part in ((-1, "expired on"), (3, "valid only from")):
            pair = self.authority.issue("kube-apiserver", "127.0.0.1", days=days)
            text = await self.error(self.list(self.client(self.serve(pair=pair))), Unverified)
            self.assertIn("(kube-apiserver, issued by kubernetes)", text)
            self.assertIn(part, text)
            self.assertIn("clock", text)

    async def test_oldTls(self) -> None:
        """Nothing older than TLS 1.2, not even with whom nothing has to be proved."""
        for extra in ({}, {"insecure": True, "certificateAuthority": None}):
            server = self.serve("127.0.0.1", newest=SSL.TLS1_1_VERSION)
            text = await self.error(self.list(self.client(server, **extra)), Unverified)
            self.assertIn("the server speaks no TLS 1.2 or newer", text)
            await self.list(self.client(self.serve("127.0.0.1", newest=SSL.TLS1_2_VERSION), **extra))
        self.assertEqual(len(self.api.requests), 2)

    async def test_noTls(self) -> None:
        """Ports that speak something else."""
        for said in (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"SSH-2.0-x\r\n", b"\x00" * 100):
            factory = Factory.forProtocol(lambda said=said: _Says(said))
            factory.noisy = False
            server = self.serve(plain=True, site=factory).replace("http:", "https:")
            text = await self.error(self.list(self.client(server)), Unverified)
            self.assertIn("does not speak TLS", text)

    def ours(self, days: float | None = None, authority: Authority | None = None) -> dict[str, Pem]:
        certificate, key = (authority or self.authority).issue("system:node:n", days=days)
        return {
            "clientCertificate": Pem("our certificate", data=certificate), "clientKey": Pem("our key", data=key),
        }

    async def test_clientCertificate(self) -> None:
        """The server gets our certificate; where it does not take it, the message says which that was."""
        server = self.serve("127.0.0.1", demand=True)
        await self.list(self.client(server, **self.ours()))
        self.assertEqual(self.api.requests[0]["peer"], "system:node:n")
        for access, parts in (
            (self.ours(authority=Authority("mallory")), ("(system:node:n, issued by mallory)", "is valid until")),
            (self.ours(days=-1), ("expired on", "clock")),
            ({}, ("there is none",)),
        ):
            text = await self.error(self.list(self.client(server, **access)), Unverified, ConnectionLost)
            for part in parts:
                self.assertIn(part, text)
        self.assertEqual(len(self.api.requests), 1)


class RotationTests(ApiCase):
    """Certificates that rotate in their files."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(tls, "RELOAD_AGE", 0.2)
        self.patch(agent, "RELOAD_AGE", 0.2)
        self.patch(tls, "RETRY_AGE", 0.05)

    def writePair(self, name: str) -> None:
        certificate, key = self.authority.issue(name)
        self.write("c", certificate)
        self.write("k", key)

    async def test_clientCertificate(self) -> None:
        """A watch under a certificate that has been replaced is closed; the next one is under the new one."""
        self.writePair("one")
        paths = [os.path.join(self.folder, name) for name in "ck"]
        client = self.client(
            self.serve("127.0.0.1"), clientCertificate=Pem("c", paths[0]), clientKey=Pem("k", paths[1])
        )
        done = await self.watch(client)
        self.writePair("two")
        await self.error(done, ConnectionLost)
        done = await self.watch(client)
        self.assertEqual([it["peer"] for it in self.api.requests], ["one", "two"])
        self.assertIn("The client certificate is a new one: two, valid until", self.logged())
        self.write("c", b"broken")
        await self.until(lambda: "The last certificates stay in use" in self.logged())
        self.assertFalse(done.called)
        done.addErrback(lambda _: None)
        await self.agent.close()
        self.assertEqual(self.agent.links, set())

    async def test_authority(self) -> None:
        """When the authority has been replaced, its file is read again after the first failure."""
        path = self.write("ca", self.authority.certificate)
        client = self.client(self.serve("127.0.0.1"), certificateAuthority=Pem("ca", path))
        await self.list(client)
        self.patch(tls, "RELOAD_AGE", 1000.0)
        self.agent.policy.expire()  # type: ignore[union-attr]
        await self.list(client)
        other = Authority("kubernetes")
        client = self.client(
            self.serve(pair=other.issue("x", "127.0.0.1")), certificateAuthority=Pem("ca", path)
        )
        await self.error(self.list(client), Unverified)
        self.write("ca", other.certificate)
        await self.list(client)


class PluginTests(ApiCase):
    """Programs that give credentials."""

    def plugin(self, command: str, **spec: Any) -> Any:
        return self.client(self.serve("127.0.0.1"), exec=Exec(command, BETA, **spec))

    def says(self, status: str) -> str:
        return f'print(json.dumps({{"apiVersion": "{BETA}", "kind": "ExecCredential", "status": {status}}}))'

    async def test_token(self) -> None:
        """One run for several requests at once; the program sees what it was given, and nothing on its input."""
        command = self.script(
            "get-token",
            "said = [sys.argv[1:], sys.stdin.read(), os.getsid(0) == os.getpid()]\n"
            "open(os.environ['OUT'], 'a').write(json.dumps(said))\n"
            "assert json.loads(os.environ['KUBERNETES_EXEC_INFO'])['spec']['cluster']['server'].startswith('https://')\n"
            + self.says('{"token": "t0k3n-" + os.environ["WHO"]}'),
        )
        out = os.path.join(self.folder, "out")
        client = self.plugin(
            command, args=("a b", "$HOME"), env=(("WHO", "m3"), ("OUT", out)), provideClusterInfo=True
        )
        await gatherResults([self.list(client) for _ in range(3)])
        self.assertEqual([it["authorization"] for it in self.api.requests], ["Bearer t0k3n-m3"] * 3)
        with open(out) as file:
            self.assertEqual(file.read(), '[["a b", "$HOME"], "", true]')

    async def test_unauthorized(self) -> None:
        """After a 401 it runs again; the next request goes with what it says then."""
        command = self.script("get-token", self.says('{"token": open(sys.argv[1]).read()}'))
        client = self.plugin(command, args=(self.write("said", "token-1"),))
        self.api.accepted = {"token-1"}
        await self.list(client)
        self.write("said", "token-2")
        self.api.accepted = {"token-2"}
        await self.error(self.list(client), Unauthorized)
        await self.list(client)

    async def test_certificate(self) -> None:
        """A certificate it gives is used; when it gives another one, connections under the old one are closed."""
        pairs = [self.authority.issue(name) for name in ("one", "two")]
        command = self.script(
            "get-pair",
            "said = [open(sys.argv[1] + it).read() for it in ('.c', '.k')]\n"
            + self.says('dict(zip(("clientCertificateData", "clientKeyData"), said))'),
        )
        base = os.path.join(self.folder, "pair")

        def put(pair: tuple[bytes, bytes]) -> None:
            self.write("pair.c", pair[0])
            self.write("pair.k", pair[1])

        put(pairs[0])
        client = self.plugin(command, args=(base,))
        done = await self.watch(client)
        put(pairs[1])
        self.api.answer = (401, {}, b"{}")
        await self.error(self.list(client), Unauthorized)
        self.assertFalse(done.called)
        self.api.answer = None
        await self.list(client)
        await self.error(done, ConnectionLost)
        self.assertEqual([it["peer"] for it in self.api.requests], ["one", "one", "two"])

    async def test_certificateRefused(self) -> None:
        """A certificate that the server refuses by TLS alone is renewed as well."""
        mallory = Authority("mallory").issue("one")
        command = self.script(
            "get-pair",
            "said = [open(sys.argv[1] + it).read() for it in ('.c', '.k')]\n"
            + self.says('dict(zip(("clientCertificateData", "clientKeyData"), said))'),
        )
        for name, pair in (("pair", mallory), ("good", self.authority.issue("two"))):
            self.write(f"{name}.c", pair[0])
            self.write(f"{name}.k", pair[1])
        spec = Exec(command, BETA, args=(os.path.join(self.folder, "pair"),))
        client = self.client(self.serve("127.0.0.1", demand=True), exec=spec)
        self.assertIn("issued by mallory", await self.error(self.list(client), Unverified))
        for it in "ck":
            os.replace(os.path.join(self.folder, f"good.{it}"), os.path.join(self.folder, f"pair.{it}"))
        await self.list(client)
        self.assertEqual(self.api.requests[0]["peer"], "two")

    async def test_hangs(self) -> None:
        """One that hangs is killed with all that it has started."""
        command = self.script(
            "hang",
            "child = os.fork()\nopen(sys.argv[1] + str(child), 'w').close() if child else None\ntime.sleep(60)",
        )
        pids = os.path.join(self.folder, "pids-")
        listing = self.list(self.plugin(command, args=(pids,)))
        await self.until(lambda: any(name.startswith("pids-") for name in os.listdir(self.folder)))
        # Its time is over as soon as it has come so far, and not before.
        (limit,) = [
            it for it in reactor.getDelayedCalls()  # type: ignore[attr-defined]
            if isinstance(getattr(it.func, "__self__", None), execrun.Run)
        ]
        self.assertGreater(limit.getTime() - reactor.seconds(), 0)  # type: ignore[attr-defined]
        limit.reset(0)
        text = await self.error(listing, NoCredentials)
        self.assertIn(f"exec plugin {command}: it did not end within 30 s", text)
        (child,) = (int(name[5:]) for name in os.listdir(self.folder) if name.startswith("pids-"))
        await self.until(lambda: not isRunning(child))
        self.assertEqual(self.api.requests, [])

    async def test_leavesBehind(self) -> None:
        """What it leaves behind on purpose may hold its output open and goes on."""
        command = self.script(
            "daemon",
            self.says('{"token": "t0k3n-m3"}') + "\nsys.stdout.flush()\nchild = os.fork()\n"
            "if child:\n    open(sys.argv[1] + str(child), 'w').close()\nelse:\n    time.sleep(60)",
        )
        pids = os.path.join(self.folder, "pids-")
        await self.list(self.plugin(command, args=(pids,)))
        (child,) = (int(name[5:]) for name in os.listdir(self.folder) if name.startswith("pids-"))
        self.assertTrue(isRunning(child))
        os.kill(child, signal.SIGKILL)

    async def test_fails(self) -> None:
        """Every way to fail names the program, shows nothing of its output, and quotes its complaints in the log."""
        for name, body, part in (
            ("exits", "print('s3cr3tt0k3n'); sys.exit('no login: s3cr3tt0k3n')", "it ended with exit status 1"),
            ("dies", "os.kill(os.getpid(), 15)", "it was ended by signal 15"),
            ("floods", "sys.stdout.write('s3cr3tt0k3n' * 200_000)", "printed more than 1048576 bytes"),
            ("garbles", "print('s3cr3tt0k3n')", "no ExecCredential as JSON"),
            ("other", 'print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}))',
             f"configured to use {BETA}, and printed client.authentication.k8s.io/v1"),
        ):
            command = self.script(name, body)
            text = await self.error(self.list(self.plugin(command)), NoCredentials)
            self.assertIn(f"exec plugin {command}: ", text)
            self.assertIn(part, text)
            self.assertNotIn("s3cr3t", text)
        self.assertIn("exits says: no login: ***", self.logged())
        self.assertNotIn("s3cr3t", self.logged())

    async def test_notAProgram(self) -> None:
        """A file that cannot be run."""
        path = self.write("text", "no program")
        os.chmod(path, 0o755)
        await self.error(self.list(self.plugin(path)), NoCredentials)
        self.assertIn("says: it cannot be run: Exec format error", self.logged())

    async def test_stopped(self) -> None:
        """A source that is stopped while its plugin runs ends it, and waits for that."""
        command = self.script("slow", "open(sys.argv[1] + str(os.getpid()), 'w').close()\ntime.sleep(60)")
        pids = os.path.join(self.folder, "pids-")
        source = ApiSource(
            reactor, "main", ApiOptions("main", kubeconfig=self.kubeconfig(command, pids)), Words(), nodeName="n"
        )
        source.startService()
        await self.until(lambda: any(name.startswith("pids-") for name in os.listdir(self.folder)))
        await source.stopService()
        (child,) = (int(name[5:]) for name in os.listdir(self.folder) if name.startswith("pids-"))
        self.assertFalse(isRunning(child))

    def kubeconfig(self, command: str, *args: str) -> str:
        document = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {
                "server": self.serve("127.0.0.1"),
                "certificate-authority": self.write("ca", self.authority.certificate),
            }}],
            "users": [{"name": "u", "user": {"exec": {"command": command, "apiVersion": BETA, "args": list(args)}}}],
        }
        return self.write("kubeconfig", yaml.safe_dump(document))

    async def test_kubeconfig(self) -> None:
        """The whole way from a kubeconfig, with a command relative to its folder."""
        self.script("get-token", self.says('{"token": "t0k3n-m3"}'))
        words = Words()
        options = ApiOptions("main", kubeconfig=self.kubeconfig("./get-token"), watchList="off")
        source = ApiSource(reactor, "main", options, words, nodeName="n")
        self.addCleanup(source.stopService)
        source.startService()
        await self.until(lambda: len(self.api.watching) == 3)
        self.assertEqual(len(words.said), 3)
        self.assertEqual({it["authorization"] for it in self.api.requests}, {"Bearer t0k3n-m3"})
        self.assertEqual(source.status()["credentials"]["runs"], 1)
        self.assertEqual(source.status()["access"], f"exec plugin {self.folder}/get-token")


class ProxyTests(ApiCase):
    """Through proxies."""

    def through(self, kind: str, server: str, user: str = "", tls: bool = False, **options: Any) -> Any:
        fake, host, port = self.proxy(kind, tls, **options)
        name, _, password = user.partition(":")
        scheme = {"connect": "https" if tls else "http"}.get(kind, kind)
        client = self.client(server, proxy=Proxy(scheme, host, port, name, password), token="s3cr3t-t0k3n")
        return fake, client

    async def test_ways(self) -> None:
        """Each kind, with and without users; names are looked up by the proxy, and TLS is with the server itself."""
        server = self.serve("api.cluster.example")
        port = int(server.rpartition(":")[2])
        for kind, tls_ in (("connect", False), ("connect", True), ("socks5", False)):
            for user, users in (("", {}), ("me:p@ss:w0rd", {"me": "p@ss:w0rd"})):
                fake, client = self.through(
                    kind, f"https://api.cluster.example:{port}", user, tls_, users=users,
                    hosts={"api.cluster.example": ("127.0.0.1", port)},
                )
                fake.trickle = 3
                await self.list(client)
                done = await self.watch(client)
                done.addErrback(lambda _: None)
                self.assertEqual(fake.targets, [("api.cluster.example", port)] * 2)
                self.assertNotIn(b"s3cr3t", b"".join(fake.heard))
                await self.agent.close()
        self.assertEqual({it["authorization"] for it in self.api.requests}, {"Bearer s3cr3t-t0k3n"})
        self.assertNotIn("proxy-authorization", {name for it in self.api.requests for name in it})

    async def test_ipv6(self) -> None:
        """To a server by IPv6 address."""
        server = self.serve("::1", interface="::1")
        for kind in ("connect", "socks5"):
            fake, client = self.through(kind, server)
            await self.list(client)
            self.assertEqual(fake.targets, [("::1", int(server.rpartition(":")[2]))])

    async def test_refused(self) -> None:
        """What a proxy has against it is told, without passwords, and apart from what a server has."""
        server = self.serve("127.0.0.1")
        for kind, options, user, part in (
            ("connect", {"users": {"me": "right"}}, "", "407 Proxy Authentication Required"),
            ("connect", {"users": {"me": "right"}}, "me:wr0ngpw", "does not take user name and password"),
            ("socks5", {"users": {"me": "right"}}, "", "give user name and password"),
            ("socks5", {"users": {"me": "right"}}, "me:wr0ngpw", "does not take user name and password"),
            ("connect", {"hosts": {"127.0.0.1": ("127.0.0.1", 1)}}, "", "502 Bad Gateway"),
            ("socks5", {"hosts": {"127.0.0.1": ("127.0.0.1", 1)}}, "", "the connection was refused"),
        ):
            _, client = self.through(kind, server, user, **options)
            text = await self.error(self.list(client), Unreachable)
            self.assertIn("no way through the proxy", text)
            self.assertIn(part, text)
            self.assertNotIn("wr0ngpw", text)
        self.assertEqual(self.api.requests, [])

    async def test_silent(self) -> None:
        """A proxy that accepts and says nothing is given up, and its connection closed."""
        self.patch(proxies, "ANSWER_TIMEOUT", 0.3)
        for kind in ("connect", "socks5"):
            fake, client = self.through(kind, "https://192.0.2.1")
            fake.silent = True
            self.assertIn("no answer within 0.3 s", await self.error(self.list(client), Unreachable))
            self.assertEqual(fake.connections, 1)
            await self.until(lambda: not self.agent.links)

    async def test_absent(self) -> None:
        """A proxy that is not there is told apart from a server that is not there."""
        client = self.client("https://192.0.2.1", proxy=Proxy("http", "127.0.0.1", 1))
        text = await self.error(self.list(client), Unreachable)
        self.assertIn("the proxy http://127.0.0.1:1 cannot be reached", text)

    async def test_unprovenProxy(self) -> None:
        """A proxy that cannot prove who it is gets no password; the message is about the proxy."""
        fake, host, port = self.proxy("connect", True, users={"me": "s3cr3tpw"})
        client = self.client(
            self.serve("127.0.0.1"), proxy=Proxy("https", host, port, "me", "s3cr3tpw"),
            certificateAuthority=Pem("the authority", data=Authority("other").certificate),
        )
        text = await self.error(self.list(client), Unverified)
        self.assertIn(f"the proxy https://***@{host}:{port}: certificate verify failed", text)
        self.assertEqual(fake.heard, [])

    async def test_unprovenServer(self) -> None:
        """A server beyond a proxy has to prove itself as any other."""
        server = self.serve("elsewhere.example")
        for kind in ("connect", "socks5"):
            _, client = self.through(kind, server)
            self.assertIn("not for 127.0.0.1", await self.error(self.list(client), Unverified))
        self.assertEqual(self.api.requests, [])

    async def test_environment(self) -> None:
        """From the environment, save for what NO_PROXY names and for loopback."""
        fake, host, port = self.proxy("connect", hosts={"api.example": ("127.0.0.1", 0)})
        server = self.serve("api.example")
        fake.hosts["api.example"] = ("127.0.0.1", int(server.rpartition(":")[2]))
        options = ApiOptions("main", server="https://api.example", caFile=self.write("ca", self.authority.certificate))
        environ = {"HTTPS_PROXY": f"{host}:{port}"}
        await self.list(self.clientOf(accessFor("main", options, environ)))
        self.assertEqual(fake.targets, [("api.example", 443)])
        for variables in ({}, {**environ, "NO_PROXY": "other, .example"}):
            self.assertIsNone(accessFor("main", options, variables).proxy)
        self.assertIsNone(withProxy(accessFor("main", options, environ), "none", environ).proxy)


class AnswerTests(ApiCase):
    """Answers that would have us carry credentials elsewhere."""

    async def test_redirects(self) -> None:
        """No redirect is followed, neither to another host nor to the same; it is an error that says where to."""
        other = self.serve("127.0.0.1")
        elsewhere = len(self.api.requests)
        client = self.client(self.serve("127.0.0.1"), token="s3cr3t-t0k3n")
        for code in (301, 302, 303, 307, 308):
            for where in (f"{other}/api/v1/services", "/elsewhere", "http://me:s3cr3tpw@127.0.0.1/", "\x1b[31m"):
                self.api.answer = (code, {"location": where}, b"")
                text = await self.error(self.list(client), Exception)
                self.assertIn(f"{code}", text)
                self.assertIn("which is not followed", text)
                self.assertNotIn("\x1b", text)
                elsewhere += 1
                self.assertEqual(len(self.api.requests), elsewhere)

    async def test_cookies(self) -> None:
        """No cookie is kept."""
        client = self.client(self.serve("127.0.0.1"))
        self.api.answer = (
            200, {"set-cookie": "a=b; Path=/", "content-type": "application/json"},
            b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"}}',
        )
        for _ in range(2):
            await self.list(client)
        self.assertEqual([it.get("cookie") for it in self.api.requests], [None, None])

    async def test_compression(self) -> None:
        """Compressed answers are asked for, unless that is turned off."""
        for disable, expected in ((False, "gzip"), (True, None)):
            await self.list(self.client(self.serve("127.0.0.1"), disableCompression=disable))
            self.assertEqual(self.api.requests[-1].get("accept-encoding"), expected)

    async def test_plainHttp(self) -> None:
        """Over plain http neither token nor plugin comes into play."""
        spec = Exec("/nowhere", BETA)
        for access in ({"token": "s3cr3t-t0k3n"}, {"exec": spec}):
            await self.list(self.client(self.serve(plain=True), certificateAuthority=None, **access))
            self.assertNotIn("authorization", self.api.requests[-1])


class _Says(Protocol):
    """Says something to whoever says something."""

    def __init__(self, said: bytes) -> None:
        self.said = said

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(self.said)  # type: ignore[union-attr]
