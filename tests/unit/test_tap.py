"""The command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from twisted.application.service import Application, MultiService
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.selectreactor import SelectReactor
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import ILogObserver
from twisted.python.reflect import namedAny
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from tests.fakes.pki import Authority
from tests.shared.sources import manifest
from twisted_kproxy import __version__, logs, tap
from twisted_kproxy.config import Config
from twisted_kproxy.interfaces import KproxyError, NotAvailable

GOOD = "[source:local]\ntype = files\npath = services.d\n"
NOBODY = "[health]\nbind =\n[metrics]\nbind =\n"
ETC = Path(__file__).parents[2] / "etc"
TWISTD = os.path.join(os.path.dirname(sys.executable), "twistd")


class TapCase(SynchronousTestCase):
    """A folder with a configuration, and what is printed."""

    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.makedirs(os.path.join(self.folder, "services.d"))
        self.path = os.path.join(self.folder, "kproxy.ini")
        self.out = StringIO()
        self.err = StringIO()
        self.write(GOOD)

    def write(self, text: str) -> None:
        with open(self.path, "w") as file:
            file.write(text)

    def capture(self) -> None:
        self.patch(sys, "stdout", self.out)
        self.patch(sys, "stderr", self.err)

    def parse(self, *args: str) -> tap.Options:
        self.capture()
        options = tap.Options()
        options.parseOptions(list(args))
        return options

    def exits(self, *args: str) -> int:
        """The exit status with which these options leave at once."""
        return int(self.assertRaises(SystemExit, self.parse, *args).code)  # type: ignore[attr-defined]


class OptionsTests(TapCase):
    """What the options do without twistd around them."""

    def test_version(self) -> None:
        """--version tells kproxy's, not Twisted's."""
        self.assertEqual(self.exits("--version"), 0)
        self.assertEqual(self.out.getvalue(), f"kproxy {__version__}\n")

    def test_loaded(self) -> None:
        """A good configuration is at hand once the options are parsed."""
        loaded = self.parse("--config", self.path).loaded
        assert loaded is not None
        self.assertEqual((loaded.path, len(loaded.sources)), (self.path, 1))
        self.assertEqual(self.out.getvalue() + self.err.getvalue(), "")

    def test_faults(self) -> None:
        """Each fault is a line on standard error, and the exit status is 1."""
        self.write("[kproxy]\nmode = x\n[nothing]\n")
        self.assertEqual(self.exits("--config", self.path), 1)
        lines = self.err.getvalue().splitlines()
        self.assertEqual(len(lines), 3)
        self.assertTrue(all(line.startswith(self.path) for line in lines))
        self.assertEqual(self.out.getvalue(), "")

    def test_check(self) -> None:
        """--check shows what is in force on standard output, as ini text that is good itself."""
        self.assertEqual(self.exits("--check", "--config", self.path), 0)
        self.assertEqual(self.err.getvalue(), "no faults\n")
        shown = self.out.getvalue()
        self.assertIn("[userspace]\nconnect-timeouts = 250ms 500ms 1s 2s\n", shown)
        self.assertIn("tcp-established-timeout = 24h\ntcp-close-wait-timeout = 1h\n", shown)
        self.write(shown)
        self.parse("--config", self.path)

    def test_checkAccessLog(self) -> None:
        """--check warns of an access log that could not be written; the daemon would serve all the same."""
        self.write(f"{GOOD}[userspace]\naccess-log = /nonexistent/dir/access.log\n")
        self.assertEqual(self.exits("--check", "--config", self.path), 0)
        warning, rest = self.err.getvalue().splitlines()
        told = "[userspace] access-log = /nonexistent/dir/access.log: cannot be written: No such file or directory"
        self.assertEqual((warning, rest), (f"warning: {told}; its lines are lost until it can", "no faults"))

    def test_checkFiles(self) -> None:
        """--check also judges what the configuration names."""
        with open(os.path.join(self.folder, "services.d", "a.yaml"), "w") as file:
            file.write("a: 1\nb: [\n")
        self.write(f"{GOOD}[source:c]\ntype = api\nkubeconfig = nowhere\n")
        self.assertEqual(self.exits("--check", "--config", self.path), 1)
        faults = self.err.getvalue().splitlines()
        self.assertEqual(len(faults), 2)
        self.assertIn("services.d/a.yaml:3: is no YAML", faults[0])
        self.assertIn("kubeconfig = ", faults[1])
        self.assertIn("[rules]", self.out.getvalue())

    def test_checkAccess(self) -> None:
        """
        --check tells of what a run would only warn of: certificates that have ended and plugins that are missing are
        faults, a doubtful field is a warning. What is read there does not come out.
        """
        certificate, key = Authority(days=-1).issue("node")
        for name, data in (("c", certificate), ("k", key)):
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(data)
        plugin = {"command": "/nowhere/get-token", "apiVersion": "client.authentication.k8s.io/v1beta1"}
        for name, user in (("one", {"token": "t0k3n-0f-0n3", "tokenfile": "x"}), ("two", {"exec": plugin})):
            with open(os.path.join(self.folder, name), "w") as file:
                json.dump(
                    {
                        "current-context": "x", "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
                        "clusters": [{"name": "x", "cluster": {"server": "https://192.0.2.1"}}],
                        "users": [{"name": "x", "user": user}],
                    },
                    file,
                )
        self.write(
            "[source:one]\ntype = api\nkubeconfig = one\n[source:two]\ntype = api\nkubeconfig = two\n"
            "[source:three]\ntype = api\nserver = https://192.0.2.1\nclient-certificate = c\nclient-key = k\n"
        )
        self.assertEqual(self.exits("--check", "--config", self.path), 1)
        warning, two, three = self.err.getvalue().splitlines()
        self.assertIn("warning: [source:one]", warning)
        self.assertIn("'tokenfile' is not a known field", warning)
        self.assertIn("[source:two]", two)
        self.assertIn("exec plugin /nowhere/get-token: there is no such program", two)
        self.assertIn("[source:three]", three)
        self.assertIn("expired on", three)
        self.write("[source:one]\ntype = api\nkubeconfig = one\n")
        self.assertEqual(self.exits("--check", "--config", self.path), 0)
        self.assertNotIn("t0k3n", self.out.getvalue() + self.err.getvalue())

    def test_pluginsAreKnown(self) -> None:
        """The names that installed plug-ins offer can be chosen."""
        self.write(f"{GOOD}[rules]\nwriter = none\n")
        loaded = self.parse("--config", self.path).loaded
        assert loaded is not None
        self.assertEqual(loaded.writer, "none")

    def test_exclusive(self) -> None:
        """--check and --cleanup together are refused."""
        self.assertRaises(UsageError, self.parse, "--check", "--cleanup")


class ShippedTests(TapCase):
    """The files in etc."""

    def unit(self) -> dict[str, list[str]]:
        """The settings of the systemd unit."""
        said: dict[str, list[str]] = {}
        for line in (ETC / "kproxy.service").read_text("utf-8").splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                said.setdefault(key, []).append(value)
        return said

    def test_unitStarts(self) -> None:
        """What the unit starts is a command line that twistd understands."""
        unit = self.unit()
        (command,) = unit["ExecStart"]
        program, *args = command.split()
        self.assertEqual(os.path.basename(program), "twistd")
        at = args.index("kproxy")
        self.assertIs(namedAny(dict(arg.split("=", 1) for arg in args[:at] if "=" in arg)["--logger"]), logs.journal)
        self.assertEqual(args[at + 1 :], ["--config", tap.DEFAULT_CONFIG])
        self.parse("--config", str(ETC / "kproxy.ini"))

    def test_unitLetsDrain(self) -> None:
        """
        systemd waits for longer than connections are drained by default, and lets the processes live that carry them.
        """
        (seconds,) = self.unit()["TimeoutStopSec"]
        self.assertGreater(float(seconds), Config("x").drainTimeout)
        self.assertEqual(self.unit()["KillMode"], ["mixed"])

    def test_unitPrivileges(self) -> None:
        """The unit gives up everything but two capabilities, and keeps what the proxy needs."""
        unit = self.unit()
        for key in ("AmbientCapabilities", "CapabilityBoundingSet"):
            self.assertEqual(unit[key], ["CAP_NET_ADMIN CAP_NET_BIND_SERVICE"])
        for key, value in (
            ("Type", "notify"),
            ("NoNewPrivileges", "yes"),
            ("ProtectSystem", "strict"),
            ("ProtectHome", "yes"),
            ("PrivateTmp", "yes"),
            ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX AF_NETLINK"),
            ("SystemCallFilter", "@system-service"),
            ("LimitNOFILE", "65536"),
            ("OOMScoreAdjust", "-999"),
            ("Restart", "always"),
            ("RestartSec", "500ms"),
            ("WatchdogSec", "30"),
            # The one place where it may write: the access log.
            ("LogsDirectory", "kproxy"),
        ):
            self.assertEqual(unit[key], [value])
        self.assertNotIn("root", unit.get("User", []))

    def test_accessRights(self) -> None:
        """The role holds what kproxy reads, events to write, and no more; the binding gives it to the account."""
        account, role, binding = yaml.safe_load_all((ETC / "rbac.yaml").read_text("utf-8"))
        rights = {
            (group, resource, verb)
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        self.assertEqual(
            rights,
            {
                *(("", "services", verb) for verb in ("list", "watch")),
                *(("discovery.k8s.io", "endpointslices", verb) for verb in ("list", "watch")),
                *(("", "nodes", verb) for verb in ("list", "watch")),
                *(("networking.k8s.io", "servicecidrs", verb) for verb in ("list", "watch")),
                *(("events.k8s.io", "events", verb) for verb in ("create", "patch")),
            },
        )
        self.assertEqual(binding["roleRef"]["name"], role["metadata"]["name"])
        (subject,) = binding["subjects"]
        meta = account["metadata"]
        self.assertEqual((subject["name"], subject["namespace"]), (meta["name"], meta["namespace"]))


class FakeReactor:
    """Runs what it is told to run when it runs."""

    def __init__(self) -> None:
        self.seconds = time.monotonic
        self.running = False
        self.hooks: list[Any] = []

    def callWhenRunning(self, function: Any) -> None:
        self.hooks.append(function)

    def run(self) -> None:
        self.running = True
        for hook in self.hooks:
            hook()

    def stop(self) -> None:
        self.running = False

    def getDelayedCalls(self) -> list[Any]:
        return []


class CleanupTests(TapCase):
    """Removing what is left in the kernel."""

    def cleanup(self, result: Deferred[list[str]], mayWrite: bool = True) -> int:
        self.capture()
        reactor = FakeReactor()
        code = tap.runCleanup(reactor, lambda it: result, mayWrite)
        self.stopped = not reactor.running
        return code

    def test_removed(self) -> None:
        """What was removed is printed, and the reactor runs no longer than that."""
        self.assertEqual(self.cleanup(succeed(["nftables: rules removed", "none: nothing to remove"])), 0)
        self.assertEqual(self.out.getvalue(), "nftables: rules removed\nnone: nothing to remove\n")
        self.assertTrue(self.stopped)

    def test_nothing(self) -> None:
        """That there was nothing is said, and no failure."""
        self.assertEqual(self.cleanup(succeed([])), 0)
        self.assertIn("nothing of kproxy", self.out.getvalue())

    def test_failed(self) -> None:
        """What went wrong is told in a line, without traceback."""
        self.assertEqual(self.cleanup(fail(NotAvailable("nft is not installed"))), 1)
        self.assertEqual(self.err.getvalue(), "kproxy: cleanup failed: nft is not installed\n")
        self.assertTrue(self.stopped)

    def test_crashed(self) -> None:
        """An error that nobody foresaw is told with its type."""
        self.assertEqual(self.cleanup(fail(RuntimeError("odd"))), 1)
        self.assertEqual(self.err.getvalue(), "kproxy: cleanup failed: RuntimeError: odd\n")

    def test_interrupted(self) -> None:
        """A cleanup that was interrupted has not succeeded."""
        self.assertEqual(self.cleanup(Deferred()), 1)
        self.assertIn("interrupted", self.err.getvalue())

    def test_notAllowed(self) -> None:
        """Who may not write rules is told so before anything is tried."""
        self.assertEqual(self.cleanup(fail(AssertionError("must not be asked")).addErrback(lambda _: []), False), 1)
        self.assertIn("needs root, or the capability CAP_NET_ADMIN", self.err.getvalue())


class RunPlanTests(TapCase):
    """Showing what a run would do."""

    def plan(self, result: Deferred[tuple[list[str], list[str]]], mayRead: bool = True) -> int:
        self.capture()
        self.asked: list[Any] = []

        def plan(reactor: Any, config: Config, may: bool) -> Deferred[tuple[list[str], list[str]]]:
            self.asked.append((config, may))
            return result

        return tap.runPlan(Config(path="x"), FakeReactor(), plan, mayRead)

    def test_lines(self) -> None:
        """The lines are printed; that something differs is no failure."""
        self.assertEqual(self.plan(succeed((["+ a", "1 to add"], []))), 0)
        self.assertEqual(self.out.getvalue(), "+ a\n1 to add\n")
        self.assertEqual(self.asked, [(Config(path="x"), True)])

    def test_noRight(self) -> None:
        """Without the right to read rules it goes on without them."""
        self.assertEqual(self.plan(succeed((["a"], [])), mayRead=False), 0)
        self.assertEqual(self.asked, [(Config(path="x"), False)])

    def test_incomplete(self) -> None:
        """What is not in the plan since it cannot be read makes a failure of it."""
        self.assertEqual(self.plan(succeed((["+ a"], ["local: b.yaml: is no YAML"]))), 1)
        self.assertEqual((self.out.getvalue(), self.err.getvalue()), ("+ a\n", "local: b.yaml: is no YAML\n"))

    def test_unreadable(self) -> None:
        """Sources that cannot be read are told, and make a failure."""
        self.assertEqual(self.plan(fail(KproxyError("within 30 s these could not be read: c/Service"))), 1)
        self.assertEqual(self.err.getvalue(), "kproxy: plan failed: within 30 s these could not be read: c/Service\n")

    def test_exclusive(self) -> None:
        """One thing at a time."""
        error = self.assertRaises(UsageError, self.parse, "--check", "--plan", "--cleanup")
        self.assertEqual(str(error), "--check and --plan and --cleanup exclude each other")

    def test_faultyConfiguration(self) -> None:
        """It begins with the configuration, as a run does."""
        self.write("[nothing]\n")
        self.assertEqual(self.exits("--plan", "--config", self.path), 1)
        self.assertIn("[nothing]", self.err.getvalue())

    def test_program(self) -> None:
        """The real program, with rights to nothing: it reads the files, prints the plan and ends."""
        text = yaml.safe_dump(manifest("web"))
        Path(self.folder, "services.d", "a.yaml").write_text(text)
        self.write(f"{GOOD}[rules]\nwriter = none\n")
        done = subprocess.run(
            [TWISTD, "kproxy", "--config", self.path, "--plan"], capture_output=True, text=True, cwd=self.folder,
            timeout=60,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("  10.96.0.10:80/TCP reject\n", done.stdout)
        Path(self.folder, "services.d", "bad.yaml").write_text("[")
        Path(self.folder, "services.d", "odd.yaml").write_text(yaml.safe_dump(manifest("odd", port="eighty")))
        done = subprocess.run(
            [TWISTD, "kproxy", "--config", self.path, "--plan"], capture_output=True, text=True, cwd=self.folder,
            timeout=60,
        )
        self.assertEqual(done.returncode, 1)
        self.assertIn("not in the plan: local: bad.yaml: line ", done.stderr)
        lines = done.stdout.splitlines()
        self.assertEqual(lines[1], "Problems (2):")
        self.assertIn("(a daemon that runs keeps its last good content)", lines[2])
        self.assertIn("odd cannot be read: spec.ports[0].port must be a number, and is text", lines[3])
        self.assertIn("  10.96.0.10:80/TCP reject", lines)
        self.assertIn("Not compared with the kernel", done.stdout)


class ClockTests(SynchronousTestCase):
    """The time by which timers run."""

    def makeReactor(self) -> SelectReactor:
        reactor = SelectReactor()
        for reader in reactor.removeAll():
            self.addCleanup(reader.connectionLost, None)
        return reactor

    def test_monotonic(self) -> None:
        """The reactor goes by the monotonic clock, and what was scheduled before is due as it was."""
        reactor = self.makeReactor()
        fired: list[str] = []
        before = time.monotonic()
        soon = reactor.callLater(0.0, fired.append, "soon")
        later = reactor.callLater(10.0, fired.append, "later")
        tap.useMonotonicClock(reactor)
        self.assertIs(reactor.seconds, time.monotonic)
        between = time.monotonic()
        after = reactor.callLater(20.0, fired.append, "after")
        # Two clocks may drift apart a little in the meantime.
        self.assertTrue(before + 9.95 <= later.getTime() <= between + 10.05, later.getTime() - before)
        self.assertTrue(between + 20.0 <= after.getTime() <= time.monotonic() + 20.0, after.getTime() - before)
        reactor.runUntilCurrent()
        self.assertEqual(fired, ["soon"])
        self.assertFalse(soon.active())
        later.reset(0.0)
        reactor.runUntilCurrent()
        self.assertEqual(fired, ["soon", "later"])
        after.cancel()

    def test_twice(self) -> None:
        """Doing it twice moves nothing."""
        reactor = self.makeReactor()
        tap.useMonotonicClock(reactor)
        call = reactor.callLater(10.0, list)
        due = call.getTime()
        tap.useMonotonicClock(reactor)
        self.assertEqual(call.getTime(), due)
        call.cancel()

    def test_dateOfAnswers(self) -> None:
        """The Date of an HTTP answer is the time of day, whatever clock the reactor goes by."""
        clock = Clock()
        clock.advance(5)
        page = Resource()
        page.putChild(b"", type("Page", (Resource,), {"render_GET": lambda self, request: b"x"})())
        site = Site(page, reactor=clock)
        site.startFactory()
        self.addCleanup(site.stopFactory)
        protocol = site.buildProtocol(None)
        transport = StringTransport()
        protocol.makeConnection(transport)
        protocol.dataReceived(b"GET / HTTP/1.0\r\n\r\n")
        (date,) = (line for line in transport.value().split(b"\r\n") if line.lower().startswith(b"date:"))
        self.assertNotIn(b"1970", date)


class ServiceTests(TapCase):
    """From the options to a service."""

    def make(self, text: str = GOOD, twistd: dict[str, Any] | None = None) -> tuple[Any, Config]:
        self.write(text)
        options = self.parse("--config", self.path)
        options.parent = twistd  # type: ignore[assignment]
        made: list[Config] = []
        self.clocks: list[Any] = []

        def makeProxyServer(reactor: Any, config: Config) -> MultiService:
            self.assertEqual(len(self.clocks), 1, "the clock comes first")
            made.append(config)
            return MultiService()

        from twisted_kproxy import server

        self.patch(server, "makeProxyServer", makeProxyServer)
        self.patch(tap, "useMonotonicClock", self.clocks.append)
        self.addCleanup(logs.useJournalFormat, "text")
        return tap.makeService(options), made[0]

    def observer(self, service: Any) -> Any:
        application = Application("kproxy")
        service.setServiceParent(application)
        return application.getComponent(ILogObserver, None)

    def logged(self, observer: Any) -> str:
        before = len(self.out.getvalue())
        observer({"log_format": "said Bearer abcdef", "log_time": 0.0, "log_level": None, "log_namespace": "n"})
        return self.out.getvalue()[before:]

    def test_service(self) -> None:
        """The service holds the server, made from the configuration; it is not running yet."""
        service, config = self.make()
        self.assertEqual(config.path, self.path)
        self.assertEqual(len(list(service)), 1)
        self.assertFalse(service.running)

    def test_text(self) -> None:
        """In the foreground, logs are Twisted's text on standard output, without secrets."""
        service, _ = self.make(twistd={"nodaemon": 1})
        text = self.logged(self.observer(service))
        self.assertIn("said Bearer ***", text)
        self.assertIn("[n#", text)

    def test_json(self) -> None:
        """log-format = json makes each line an object."""
        service, _ = self.make(f"{GOOD}[kproxy]\nlog-format = json\n", {"nodaemon": 1})
        self.assertEqual(json.loads(self.logged(self.observer(service)))["message"], "said Bearer ***")

    def test_logfile(self) -> None:
        """twistd's --logfile is where they go."""
        path = os.path.join(self.folder, "log")
        service, _ = self.make(f"{GOOD}[kproxy]\nlog-format = json\n", {"nodaemon": 1, "logfile": path})
        self.assertEqual(self.logged(self.observer(service)), "")
        with open(path) as file:
            self.assertEqual(json.loads(file.read())["namespace"], "n")

    def test_chosenLogger(self) -> None:
        """twistd's --logger has the last word; that for the journal follows log-format."""
        service, _ = self.make(f"{GOOD}[kproxy]\nlog-format = json\n", {"logger": logs.journal})
        self.assertIsNone(self.observer(service))
        json.loads(self.logged(logs.journal()))

    def test_unavailable(self) -> None:
        """A server that cannot be made is a line on standard error and exit status 1."""
        options = self.parse("--config", self.path)
        from twisted_kproxy import server

        def makeProxyServer(reactor: Any, config: Config) -> None:
            raise KproxyError("no such thing here; install it")

        self.patch(server, "makeProxyServer", makeProxyServer)
        self.patch(tap, "useMonotonicClock", lambda reactor: None)
        error = self.assertRaises(SystemExit, tap.makeService, options)
        self.assertEqual(error.code, 1)  # type: ignore[attr-defined]
        self.assertEqual(self.err.getvalue(), "kproxy: no such thing here; install it\n")


class TwistdTests(TapCase):
    """The real thing."""

    def twistd(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TWISTD, *args], cwd=self.folder, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )

    def test_check(self) -> None:
        """twistd kproxy --check ends with 0, in the foreground, and leaves nothing behind."""
        done = self.twistd("kproxy", "--check", "--config", "kproxy.ini")
        self.assertEqual((done.returncode, done.stderr), (0, "no faults\n"))
        self.assertIn(f"path = {self.folder}/services.d\n", done.stdout)
        self.assertEqual(sorted(os.listdir(self.folder)), ["kproxy.ini", "services.d"])

    def test_faults(self) -> None:
        """A bad configuration ends a run with 1 before anything starts, and with nothing but the faults."""
        self.write("[kproxy]\nmode = nftables\n")
        done = self.twistd("-n", "kproxy", "--config", "kproxy.ini")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(
            done.stderr,
            f"{self.path}:2: [kproxy] mode = nftables: is not built yet; use userspace\n"
            f"{self.path}: no source of services: add one, such as [source:local] with type = files and "
            "path = services.d\n",
        )
        self.assertEqual(sorted(os.listdir(self.folder)), ["kproxy.ini", "services.d"])

    def test_run(self) -> None:
        """It runs in the foreground with the journal's logger, tells when it is in force, and ends on SIGTERM."""
        self.write(f"{GOOD}[kproxy]\nlog-format = json\n[rules]\nwriter = none\n{NOBODY}")
        with open(os.path.join(self.folder, "services.d", "web.json"), "w") as file:
            json.dump(manifest("web"), file)
        args = [TWISTD, "-n", "--pidfile=", "--logger=twisted_kproxy.logs.journal", "kproxy", "--config", "kproxy.ini"]
        with subprocess.Popen(args, cwd=self.folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                said = []
                for line in process.stdout:
                    said.append(json.loads(line)["message"])
                    if said[-1].startswith("Applied 1 changed"):
                        process.send_signal(signal.SIGTERM)
                self.assertIn(process.wait(30), (0, -signal.SIGTERM), said)
            finally:
                if process.poll() is None:
                    process.kill()
        self.assertTrue(any(line.startswith("Applied 1 changed") for line in said), said)
        self.assertEqual(said[-1], "Server Shut Down.")
        self.assertEqual(sorted(os.listdir(self.folder)), ["kproxy.ini", "services.d"])

    def test_reactor(self) -> None:
        """It runs in its own reactor, unless twistd is told of another: then the engine makes do with that one."""
        self.write(f"{GOOD}[rules]\nwriter = none\n[userspace]\nengine = python\n{NOBODY}")
        for options, expected in (
            ([], "events by the reactor's own epoll"),
            (["--reactor=poll"], "events by an epoll nested in PollReactor"),
            (["--reactor=epoll"], "events by an epoll nested in EPollReactor"),
            (["--reactor=asyncio"], "events by an epoll nested in AsyncioSelectorReactor"),
        ):
            said = self.daemon(*options)
            (line,) = [it for it in said if "Connections are relayed by" in it]
            self.assertIn("the engine python in the reactor's thread; ", line)
            self.assertIn(expected, line)
            self.assertIn("Server Shut Down.", said[-1])

    def test_withoutModule(self) -> None:
        """Where the C module was not built, ``engine = auto`` runs in Python, and says why in the same line."""
        folder = os.path.join(self.folder, "site")
        os.mkdir(folder)
        Path(folder, "sitecustomize.py").write_text(
            "import sys\nsys.modules['twisted_kproxy.userspace.engines._pump'] = None\n"
        )
        self.write(f"{GOOD}[rules]\nwriter = none\n{NOBODY}")
        said = self.daemon(env={"PYTHONPATH": folder})
        (line,) = [it for it in said if "Connections are relayed by" in it]
        self.assertIn("the engine python", line)
        self.assertIn("(not native: its C module is not there", line)

    def daemon(self, *options: str, env: dict[str, str] | None = None) -> list[str]:
        """Run it in the foreground until a Service is in force; all that it has said."""
        Path(self.folder, "services.d", "web.json").write_text(json.dumps(manifest("web")))
        args = [TWISTD, "-n", "--pidfile=", *options, "kproxy", "--config", "kproxy.ini"]
        said = []
        with subprocess.Popen(
            args, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **(env or {})},
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said.append(line)
                    if "Applied 1 changed" in line:
                        process.send_signal(signal.SIGTERM)
                self.assertIn(process.wait(30), (0, -signal.SIGTERM), said)
            finally:
                if process.poll() is None:
                    process.kill()
        return said
