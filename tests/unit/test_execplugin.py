"""Credentials from a program, on a clock and with programs in the test's hands."""

from __future__ import annotations

import json
import os
from base64 import b64decode
from datetime import UTC, datetime
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.pki import Authority
from tests.fakes.processes import ProcessClock, credential
from twisted_kproxy.interfaces import NotAvailable
from twisted_kproxy.redaction import redacted
from twisted_kproxy.sources.credentials import ApiAccess, Exec, Identity, Pem, Proxy
from twisted_kproxy.sources.errors import NoCredentials
from twisted_kproxy.sources.execplugin import ExecPlugin, execInfo, findCommand, parseCredential

V1 = "client.authentication.k8s.io/v1"
NOON = 1_800_000_000.0


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PluginCase(SynchronousTestCase):
    """A plugin, time of day and all."""

    def setUp(self) -> None:
        self.clock = ProcessClock()
        self.noon = NOON
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def plugin(self, environ: dict[str, str] | None = None, **spec: Any) -> ExecPlugin:
        it = Exec(spec.pop("command", "/bin/true"), spec.pop("apiVersion", V1), **spec)
        access = ApiAccess("https://192.0.2.1:6443", "test", exec=it)
        plugin = ExecPlugin(
            self.clock, access, it, environ or {"PATH": "/usr/bin:/bin"}, lambda: self.noon + self.clock.seconds()
        )
        self.addCleanup(self.assertEqual, self.clock.getDelayedCalls(), [])
        return plugin

    def ask(self, plugin: ExecPlugin) -> Deferred[Identity]:
        return plugin.current()

    def answered(self, plugin: ExecPlugin, **status: Any) -> Identity:
        """Ask; the program that runs for it says that."""
        d = self.ask(plugin)
        self.clock.runs[-1].say(credential(**status)).end()
        return self.successResultOf(d)

    def failure(self, d: Deferred[Identity]) -> str:
        return str(self.failureResultOf(d, NoCredentials).value)

    def logged(self) -> str:
        return "\n".join(formatEvent(it) or "" for it in self.events)


class RunTests(PluginCase):
    """How the program is run."""

    def test_once(self) -> None:
        """It runs when somebody asks for the first time; what it says serves for everybody after."""
        plugin = self.plugin()
        self.assertEqual(self.clock.runs, [])
        identity = self.answered(plugin, token="abc")
        self.assertEqual(identity.token, "abc")
        self.clock.advance(100_000)
        self.assertIs(self.successResultOf(self.ask(plugin)), identity)
        self.assertEqual(len(self.clock.runs), 1)

    def test_arguments(self) -> None:
        """Arguments go as they are, without any shell; the environment is ours, with what is listed and the request."""
        environ = {"PATH": "/usr/bin:/bin", "HOME": "/h", "NOTIFY_SOCKET": "/run/x", "A": "1"}
        plugin = self.plugin(environ, args=("get token; x", "$HOME", ""), env=(("A", "2"), ("B", "é")))
        d = self.ask(plugin)
        (run,) = self.clock.runs
        self.assertEqual(run.argv[-4:], ["/bin/true", "get token; x", "$HOME", ""])
        info = json.loads(run.env.pop("KUBERNETES_EXEC_INFO"))
        self.assertEqual(run.env, {"PATH": "/usr/bin:/bin", "HOME": "/h", "A": "2", "B": "é"})
        self.assertEqual(info, {"kind": "ExecCredential", "apiVersion": V1, "spec": {"interactive": False}})
        run.end(1)
        self.failure(d)

    def test_oneAtATime(self) -> None:
        """Whoever asks while it runs waits for the same run."""
        plugin = self.plugin()
        asked = [self.ask(plugin) for _ in range(3)]
        self.assertEqual(len(self.clock.runs), 1)
        self.clock.runs[0].say(credential("abc")).end()
        self.assertEqual({self.successResultOf(it).token for it in asked}, {"abc"})

    def test_oneFailureForAll(self) -> None:
        """A run that fails fails for everybody who waits; the next who asks has another one."""
        plugin = self.plugin()
        asked = [self.ask(plugin) for _ in range(2)]
        self.clock.runs[0].end(3)
        for it in asked:
            self.assertIn("exec plugin /bin/true: it ended with exit status 3", self.failure(it))
        self.assertEqual(self.answered(plugin, token="abc").token, "abc")

    def test_hangs(self) -> None:
        """After half a minute it is killed."""
        plugin = self.plugin()
        d = self.ask(plugin)
        self.clock.advance(29.9)
        self.assertNoResult(d)
        self.clock.advance(0.2)
        self.assertEqual(self.clock.runs[0].killed, ["KILL"])
        self.assertIn("did not end within 30 s", self.failure(d))

    def test_floods(self) -> None:
        """One that prints without end is killed at a mebibyte, also where that comes in many pieces."""
        plugin = self.plugin()
        d = self.ask(plugin)
        run = self.clock.runs[0]
        for _ in range(64):
            run.say(b"x" * 16384)
        self.assertNoResult(d)
        run.say(b"x")
        self.assertEqual(run.killed, ["KILL"])
        self.assertIn("printed more than 1048576 bytes", self.failure(d))

    def test_floodsErrors(self) -> None:
        """What it complains about takes no memory to speak of, and the log gets the beginning."""
        plugin = self.plugin()
        d = self.ask(plugin)
        run = self.clock.runs[0]
        for number in range(10_000):
            run.say(err=b"complaint %d\n" % number)
        run.say(credential("abc")).end()
        self.successResultOf(d)
        said = self.logged()
        self.assertIn("exec plugin /bin/true says: complaint 19\n", said)
        self.assertNotIn("complaint 20\n", said)
        self.assertIn("lines more", said)

    def test_outputStaysOpen(self) -> None:
        """A program that leaves something behind that holds its output open has ended nevertheless."""
        plugin = self.plugin()
        d = self.ask(plugin)
        run = self.clock.runs[0].say(credential("abc"))
        run.exit()
        self.assertNoResult(d)
        self.clock.advance(1)
        self.assertTrue(run.hungUp)
        self.assertEqual(self.successResultOf(d).token, "abc")

    def test_nobodyWaits(self) -> None:
        """When the last one who waits gives up, the program is ended; one who comes then has a run of his own."""
        plugin = self.plugin()
        first, second = self.ask(plugin), self.ask(plugin)
        run = self.clock.runs[0]
        run.stubborn = True
        first.cancel()
        self.assertEqual(run.killed, [])
        second.cancel()
        self.assertEqual(run.killed, ["KILL"])
        for it in (first, second):
            self.failureResultOf(it)
        third = self.ask(plugin)
        self.assertEqual(len(self.clock.runs), 1)
        run.end(signal=9)
        self.clock.runs[1].say(credential("abc")).end()
        self.assertEqual(self.successResultOf(third).token, "abc")

    def test_close(self) -> None:
        """Closing ends the program and fires once it is gone; then all may begin anew."""
        plugin = self.plugin()
        self.successResultOf(plugin.close())
        d = self.ask(plugin)
        run = self.clock.runs[0]
        run.stubborn = True
        d.cancel()
        self.failureResultOf(d)
        closed = plugin.close()
        self.assertNoResult(closed)
        run.end(signal=9)
        self.successResultOf(closed)
        self.assertEqual(self.answered(plugin, token="abc").token, "abc")

    def test_cannotDie(self) -> None:
        """A program that does not even go when it is killed holds up nobody, and may end whenever it likes."""
        plugin = self.plugin()
        d = self.ask(plugin)
        stuck = self.clock.runs[0]
        stuck.stubborn = True
        self.clock.advance(30)
        self.assertEqual(stuck.killed, ["KILL"])
        self.clock.advance(2)
        self.assertIn("did not end within 30 s", self.failure(d))
        d = self.ask(plugin)
        stuck.say(credential("late")).end(signal=9)
        self.assertNoResult(d)
        self.clock.runs[1].say(credential("abc")).end()
        self.assertEqual(self.successResultOf(d).token, "abc")

    def test_cannotDieAtTheEnd(self) -> None:
        """Nor does it hold up the end."""
        plugin = self.plugin()
        d = self.ask(plugin)
        self.clock.runs[0].stubborn = True
        d.cancel()
        self.failureResultOf(d)
        closed = plugin.close()
        self.clock.advance(2)
        self.successResultOf(closed)

    def test_tooMuchToTell(self) -> None:
        """A bundle of authorities that no environment can hold is said to be that."""
        spec = Exec("/bin/true", V1, provideClusterInfo=True)
        access = ApiAccess("https://a", "test", exec=spec, certificateAuthority=Pem("ca", data=b"x" * 100_000))
        plugin = ExecPlugin(self.clock, access, spec, {}, lambda: NOON)
        self.assertIn("provideClusterInfo", self.failure(plugin.current()))
        self.assertEqual(self.clock.runs, [])

    def test_cannotStart(self) -> None:
        """Where no process can be had, that is an error like others."""
        plugin = self.plugin()
        self.clock.failure = OSError(11, "Resource temporarily unavailable")
        self.assertIn("cannot be started", self.failure(self.ask(plugin)))
        self.clock.failure = None
        self.answered(plugin, token="abc")

    def test_missing(self) -> None:
        """A program that is missing is named, with the hint on how to install it; it is looked for each time."""
        folder = os.path.abspath(self.mktemp())
        os.mkdir(folder)
        path = os.path.join(folder, "get-token")
        plugin = self.plugin(command=path, installHint="Install it:\n  apt-get install get-token\n")
        text = self.failure(self.ask(plugin))
        self.assertIn(f"exec plugin {path}: there is no such program", text)
        self.assertIn("Install it: apt-get install get-token", text)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n")
        self.assertIn("may not be run", self.failure(self.ask(plugin)))
        os.chmod(path, 0o755)
        self.answered(plugin, token="abc")

    def test_path(self) -> None:
        """A name without a slash is looked up in PATH, and nowhere else."""
        folder = os.path.abspath(self.mktemp())
        os.mkdir(folder)
        path = os.path.join(folder, "get-token")
        with open(path, "w") as file:
            file.write("#!/bin/sh\n")
        os.chmod(path, 0o755)
        spec = Exec("get-token", V1)
        self.assertEqual(findCommand(spec, {"PATH": f"/nowhere:{folder}"}), path)
        self.assertIn("PATH", str(self.assertRaises(NotAvailable, findCommand, spec, {"PATH": "/nowhere"})))


class LifeTests(PluginCase):
    """How long credentials are used."""

    def test_expires(self) -> None:
        """After the expiration timestamp it runs again before anybody gets an answer."""
        plugin = self.plugin()
        self.answered(plugin, token="one", expirationTimestamp=stamp(NOON + 90))
        self.clock.advance(80)
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "one")
        self.assertEqual(len(self.clock.runs), 1)
        self.clock.advance(11)
        d = self.ask(plugin)
        self.assertNoResult(d)
        self.clock.runs[1].say(credential("two")).end()
        self.assertEqual(self.successResultOf(d).token, "two")

    def test_renewedEarly(self) -> None:
        """Shortly before the end it runs again, and nobody waits for that."""
        plugin = self.plugin()
        self.answered(plugin, token="one", expirationTimestamp=stamp(NOON + 90))
        self.clock.advance(82)
        for _ in range(3):
            self.assertEqual(self.successResultOf(self.ask(plugin)).token, "one")
        self.assertEqual(len(self.clock.runs), 2)
        self.clock.runs[1].say(credential("two", expirationTimestamp=stamp(NOON + 180))).end()
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "two")

    def test_failureKeepsTheOld(self) -> None:
        """While credentials are good, a run that fails leaves them in use, is not repeated at once, and is logged."""
        plugin = self.plugin()
        self.answered(plugin, token="one", expirationTimestamp=stamp(NOON + 90))
        self.clock.advance(82)
        self.ask(plugin)
        self.clock.runs[1].say(b"broken").end()
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "one")
        self.assertEqual(len(self.clock.runs), 2)
        self.assertIn("The last credentials stay in use: exec plugin /bin/true: it printed no ExecCredential",
                      self.logged())
        self.assertIn("printed no", plugin.status()["lastError"])
        self.clock.advance(5)
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "one")
        self.clock.runs[2].end(1)
        self.clock.advance(4)
        d = self.ask(plugin)
        self.assertNoResult(d)
        self.clock.runs[3].end(1)
        self.assertIn("exit status 1", self.failure(d))

    def test_refused(self) -> None:
        """What the server refused is renewed before the next request, once for all who were refused."""
        plugin = self.plugin()
        one = self.answered(plugin, token="one")
        plugin.refused(one)
        plugin.refused(one)
        d = self.ask(plugin)
        self.assertNoResult(d)
        self.clock.runs[1].say(credential("two")).end()
        two = self.successResultOf(d)
        plugin.refused(one)  # an answer that comes late
        self.assertIs(self.successResultOf(self.ask(plugin)), two)
        self.assertEqual(len(self.clock.runs), 2)

    def test_refusedAndFailing(self) -> None:
        """What was refused is not used again while the program fails."""
        plugin = self.plugin()
        plugin.refused(self.answered(plugin, token="one"))
        for number in (1, 2):
            d = self.ask(plugin)
            self.clock.runs[number].end(1)
            self.failure(d)

    def test_sameAgain(self) -> None:
        """A program that gives the refused token again is asked again after the next 401, and never in a loop."""
        plugin = self.plugin()
        plugin.refused(self.answered(plugin, token="one"))
        again = self.answered(plugin, token="one")
        self.assertIs(self.successResultOf(self.ask(plugin)), again)
        plugin.refused(again)
        self.assertEqual(self.answered(plugin, token="two").token, "two")
        self.assertEqual(len(self.clock.runs), 3)

    def test_clockSetForward(self) -> None:
        """Setting the time of day forward ends nothing."""
        plugin = self.plugin()
        self.answered(plugin, token="one", expirationTimestamp=stamp(NOON + 3600))
        self.noon += 86400
        self.clock.advance(3000)
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "one")
        self.assertEqual(len(self.clock.runs), 1)

    def test_clockSetBack(self) -> None:
        """Nor does setting it back make credentials last longer."""
        plugin = self.plugin()
        self.answered(plugin, token="one", expirationTimestamp=stamp(NOON + 3600))
        self.noon -= 86400
        self.clock.advance(3601)
        d = self.ask(plugin)
        self.assertNoResult(d)
        self.clock.runs[1].say(credential("two")).end()
        self.assertEqual(self.successResultOf(d).token, "two")

    def test_clockIsWrong(self) -> None:
        """With a clock a year ahead everything has ended when it comes; it is used once nevertheless, each time."""
        plugin = self.plugin()
        self.noon += 365 * 86400
        for number in range(3):
            self.assertEqual(
                self.answered(plugin, token=f"t{number}", expirationTimestamp=stamp(NOON + 60)).token, f"t{number}"
            )
        self.noon -= 365 * 86400
        self.answered(plugin, token="right", expirationTimestamp=stamp(NOON + self.clock.seconds() + 60))
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "right")


class CertificateTests(PluginCase):
    """Client certificates."""

    def pair(self, name: str = "node") -> dict[str, str]:
        certificate, key = Authority().issue(name)
        return {"clientCertificateData": certificate.decode(), "clientKeyData": key.decode()}

    def test_changed(self) -> None:
        """Another certificate than before is told to whoever holds connections; the same, or the first, is not."""
        changes: list[tuple[bytes, bytes] | None] = []
        plugin = self.plugin()
        plugin.changed = lambda: changes.append(plugin.pair())
        first, second = self.pair(), self.pair()
        self.assertIsNone(plugin.pair())
        plugin.refused(self.answered(plugin, **first))
        self.assertEqual(plugin.pair(), tuple(it.encode() for it in first.values()))
        plugin.refused(self.answered(plugin, **first))
        self.assertEqual(changes, [])
        self.answered(plugin, **second)
        self.assertEqual(changes, [tuple(it.encode() for it in second.values())])

    def test_pairRefused(self) -> None:
        """A certificate over which the server ended TLS is renewed; there is no 401 then."""
        plugin = self.plugin()
        plugin.pairRefused()
        self.answered(plugin, token="abc")
        plugin.pairRefused()
        self.assertEqual(self.successResultOf(self.ask(plugin)).token, "abc")
        plugin.refused(self.successResultOf(self.ask(plugin)))
        self.answered(plugin, **self.pair())
        plugin.pairRefused()
        self.answered(plugin, **self.pair())
        self.assertEqual(len(self.clock.runs), 3)

    def test_unusable(self) -> None:
        """A key that is none, is locked, or is another's, and half a pair, are errors that show nothing of it."""
        good, other = self.pair(), self.pair()
        for status, part in (
            ({**good, "clientKeyData": other["clientKeyData"]}, "does not belong"),
            ({**good, "clientKeyData": "s3cr3tk3y"}, "not a private key"),
            ({**good, "clientCertificateData": "x"}, "no certificate"),
            ({"clientCertificateData": good["clientCertificateData"]}, "only one of"),
            ({"clientKeyData": good["clientKeyData"], "token": "abc"}, "only one of"),
        ):
            plugin = self.plugin()
            d = self.ask(plugin)
            self.clock.runs[-1].say(credential(**status)).end()
            text = self.failure(d)
            self.assertIn(part, text)
            self.assertNotIn("s3cr3tk3y", text)


class OutputTests(PluginCase):
    """What it prints, and what comes out of that."""

    def test_versions(self) -> None:
        """Both versions are understood, each only where it was asked for."""
        for version in ("v1", "v1beta1"):
            out = json.dumps(credential("abc", version)).encode()
            self.assertEqual(parseCredential(out, f"client.authentication.k8s.io/{version}").token, "abc")
        text = str(self.assertRaises(NotAvailable, parseCredential, out, V1))
        self.assertIn(f"configured to use {V1}, and printed client.authentication.k8s.io/v1beta1", text)

    def test_unusable(self) -> None:
        """Anything else is an error that quotes nothing of it."""
        good = credential("s3cr3tt0k3n")
        for out, part in (
            (b"", "printed nothing"),
            (b" \n", "printed nothing"),
            (b"s3cr3tt0k3n", "no ExecCredential as JSON"),
            (b'{"status":{"token":"s3cr3tt0k3n"', "no ExecCredential as JSON"),
            (b"[" * 100_000, "no ExecCredential as JSON"),
            (b"\xff\xfes3cr3tt0k3n", "no ExecCredential as JSON"),
            ({**good, "kind": "s3cr3tt0k3n"}, "not of kind ExecCredential"),
            ({**good, "apiVersion": "s3cr3tt0k3n"}, "printed another apiVersion"),
            ({**good, "apiVersion": None}, "no ExecCredential"),
            ({"kind": "ExecCredential", "apiVersion": V1}, "has no status"),
            (credential(), "neither a token nor"),
            (credential(clientCertificateData="", token=""), "neither a token nor"),
            (credential("s3cr3t t0k3n"), "is not a token"),
            (credential("s3cr3tt0k3n\nX-Injected: 1"), "is not a token"),
            (credential(token="s3cr3tt0k3n", expirationTimestamp="tomorrow"), "no ExecCredential"),
            (credential(token="s3cr3tt0k3n", expirationTimestamp="2027-01-01T00:00:00"), "no ExecCredential"),
            ({**good, "status": {"token": 12345}}, "no ExecCredential"),
        ):
            data = out if isinstance(out, bytes) else json.dumps(out).encode()
            text = str(self.assertRaises(NotAvailable, parseCredential, data, V1))
            self.assertIn(part, text)
            self.assertNotIn("s3cr3t", text)

    def test_secrets(self) -> None:
        """A token and a key that it gave are hidden from then on, in what it says as in everything else."""
        plugin = self.plugin(
            args=("--client-secret=cl13nt-s3cr3t", "--password", "p4ssw0rd-arg", "--token-file", "/t"),
            env=(("AWS_SECRET_ACCESS_KEY", "sup3r-s3cr3t-k3y"), ("STAGE", "production")),
        )
        d = self.ask(plugin)
        self.clock.runs[0].say(credential("t0k3n-of-n0d3"), b"got t0k3n-of-n0d3 from there\n").end()
        self.successResultOf(d)
        self.assertEqual(redacted("x t0k3n-of-n0d3 sup3r-s3cr3t-k3y production"), "x *** *** production")
        self.assertEqual(redacted("x cl13nt-s3cr3t p4ssw0rd-arg"), "x *** ***")
        self.assertNotIn("t0k3n", self.logged())
        self.assertIn("says: got *** from there", self.logged())
        for it in (plugin.status(), plugin._identity, repr(plugin), vars(plugin)["_spec"]):
            self.assertNotIn("t0k3n", repr(it))
            self.assertNotIn("sup3r", repr(it))

    def test_complaintRepeatsOutput(self) -> None:
        """Where the output cannot be used, nothing that stands in it comes out by way of what it complains about."""
        plugin = self.plugin()
        d = self.ask(plugin)
        run = self.clock.runs[0]
        run.say(b'{"token": "t0k3n-that-n0b0dy-kn0ws', b"debug: t0k3n-that-n0b0dy-kn0ws\nand more\n").end()
        self.assertNotIn("t0k3n", self.failure(d))
        self.assertNotIn("t0k3n", self.logged())
        self.assertIn("says: and more", self.logged())

    def test_complaintsAreRare(self) -> None:
        """A program that complains at every run is quoted once a minute."""
        plugin = self.plugin()
        for number in range(4):
            d = self.ask(plugin)
            self.clock.runs[number].say(err=b"complaint\n").end(1)
            self.failure(d)
            self.clock.advance(25)
        self.assertEqual(self.logged().count("says: complaint"), 2)

    def test_controlCharacters(self) -> None:
        """What it says cannot forge lines."""
        plugin = self.plugin()
        d = self.ask(plugin)
        self.clock.runs[0].say(credential("abc"), b"a\x1b[31m\rb\n").end()
        self.successResultOf(d)
        self.assertIn("says: a?[31m", self.logged())


class InfoTests(SynchronousTestCase):
    """What the program is told."""

    def test_cluster(self) -> None:
        """On demand: all that it needs to reach the server itself."""
        spec = Exec("x", V1, provideClusterInfo=True, clusterConfig=msgspec.Raw(b'{"audience":"a","n":[1]}'))
        access = ApiAccess(
            "https://192.0.2.1:6443/k8s", "test", certificateAuthority=Pem("ca", data=b"PEM"), tlsServerName="api",
            disableCompression=True, proxy=Proxy("http", "192.0.2.9", 3128, "me", "p@ss"), exec=spec,
        )
        cluster = json.loads(execInfo(access, spec))["spec"]["cluster"]
        self.assertEqual(b64decode(cluster.pop("certificate-authority-data")), b"PEM")
        self.assertEqual(
            cluster,
            {
                "server": "https://192.0.2.1:6443/k8s", "tls-server-name": "api", "disable-compression": True,
                "proxy-url": "http://me:p%40ss@192.0.2.9:3128", "config": {"audience": "a", "n": [1]},
            },
        )

    def test_plain(self) -> None:
        """What is not said is left out."""
        spec = Exec("x", V1, provideClusterInfo=True)
        said = json.loads(execInfo(ApiAccess("https://a", "test", insecure=True), spec))
        self.assertEqual(said["spec"]["cluster"], {"server": "https://a", "insecure-skip-tls-verify": True})
