"""The networks that integration tests are played on, and the programs that run in them."""

from __future__ import annotations

import hashlib
import http.client
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from ..fakes import network
from ..fakes.apiserver import FakeApi
from ..fakes.daemon import ApiProcess, Backend, Daemon, Program
from ..fakes.network import Rig, RigError, SmallRig, waitFor
from ..fakes.waiting import isRunning
from ..unit.test_fakes_apistore import service

ROOT_NEEDED = "" if os.geteuid() == 0 else "network namespaces need root"


def work() -> float:
    """
    Seconds of processor time of this thread and of the programs that it has waited for: what something takes on a
    machine with nothing else to do.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.thread_time() + children.ru_utime + children.ru_stime


def ask(rig: network.Network, name: str, address: str, port: int, text: str = "hi") -> str:
    """Say a line to a backend, over TCP from a namespace; gives its answer."""
    with rig.connect(name, (address, port)) as client:
        client.sendall(f"{text}\n".encode())
        return client.makefile().readline().strip()


class RigTests(SynchronousTestCase):
    """The big network."""

    skip = ROOT_NEEDED or None

    def setUp(self) -> None:
        start = work()
        self.rig = Rig()
        self.took = work() - start
        self.addCleanup(self.rig.close)

    def backends(self, *names: str) -> None:
        for name in names:
            Backend(self.rig, name, tcp=[8080], udp=[5353], http=[80])

    def test_built(self) -> None:
        """Building it is less than half a second's work."""
        self.assertLess(self.took, 0.5)

    def test_podToPod(self) -> None:
        """A pod reaches pods on its own node and on the other one, in both families, with its own address."""
        self.backends("p0a", "p1a")
        for name in ("p0a", "p1a"):
            for family in (4, 6):
                mine = self.rig.address("p0b", family)
                answer = ask(self.rig, "p0b", self.rig.address(name, family), 8080)
                self.assertEqual(answer.split()[0], name)
                self.assertIn(f"{mine}]:" if family == 6 else f"{mine}:", answer)

    def test_outsideToNode(self) -> None:
        """The host outside and the API server's host reach both nodes, in both families."""
        self.backends("n0", "n1")
        for host in ("x", "api"):
            for node in ("n0", "n1"):
                for family in (4, 6):
                    answer = ask(self.rig, host, self.rig.address(node, family), 8080)
                    self.assertEqual(answer.split()[0], node)

    def test_outsideToPod(self) -> None:
        """The host outside has no way to pods: it must go through services."""
        self.backends("p0a")
        self.assertRaises(OSError, self.rig.connect, "x", (self.rig.address("p0a"), 8080), 0.5)

    def test_udp(self) -> None:
        """Datagrams find their way, and are answered with who asked."""
        self.backends("p1a")
        for family in (socket.AF_INET, socket.AF_INET6):
            with self.rig.socketIn("p0b", family, socket.SOCK_DGRAM) as client:
                client.settimeout(5)
                client.sendto(b"hi", (self.rig.address("p1a", family), 5353))
                self.assertIn(self.rig.address("p0b", family).encode(), client.recv(1000))

    def test_http(self) -> None:
        """HTTP from a namespace: rig.http(), and keep-alive over one connection."""
        self.backends("n0")
        status, headers, body = self.rig.http("x", f"http://{self.rig.address('n0')}/any")
        self.assertEqual((status, headers["x-backend"]), (200, "n0"))
        self.assertIn(self.rig.address("x").encode(), body)
        connection = http.client.HTTPConnection(self.rig.address("n0"))
        connection.sock = self.rig.connect("x", (self.rig.address("n0"), 80))
        answers = []
        for _ in range(2):
            connection.request("POST", "/", b"data")
            answers.append(connection.getresponse().read())
        connection.close()
        self.assertEqual(answers[0], answers[1])
        self.assertTrue(answers[0].endswith(b"\ndata"))

    def test_rewrittenOnTheSameNode(self) -> None:
        """Rules of a node see traffic between its pods, there and back: a rewritten address works from pod to pod."""
        self.backends("p0a")
        rules = """
        table inet kp-test {
          chain pre { type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.7 tcp dport 80 dnat ip to %s:8080
            ip6 daddr fd00:10:96::7 tcp dport 80 dnat ip6 to [%s]:8080
          }
        }"""
        rules %= (self.rig.address("p0a", 4), self.rig.address("p0a", 6))
        self.rig.run("n0", ["nft", "-f", "-"], input=rules)
        for address, family in (("10.96.0.7", 4), ("fd00:10:96::7", 6)):
            answer = ask(self.rig, "p0b", address, 80)
            self.assertEqual(answer.split()[0], "p0a")
            self.assertIn(self.rig.address("p0b", family), answer)

    def test_hairpin(self) -> None:
        """A pod reaches itself through a rewritten address, where its node masquerades that."""
        self.backends("p0a")
        pod = self.rig.address("p0a")
        rules = f"""
        table ip kp-test {{
          chain pre {{ type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.7 tcp dport 80 dnat to {pod}:8080; }}
          chain post {{ type nat hook postrouting priority srcnat; ip saddr {pod} ip daddr {pod} masquerade; }}
        }}"""
        self.rig.run("n0", ["nft", "-f", "-"], input=rules)
        self.assertTrue(ask(self.rig, "p0a", "10.96.0.7", 80).startswith("p0a 10.244.0.1:"))

    def test_fail(self) -> None:
        """Packets can be dropped or refused on their way in, until that is healed."""
        self.backends("n0")
        node = self.rig.address("n0")
        self.rig.fail("n0", "tcp dport 8080")
        self.assertRaises(TimeoutError, self.rig.connect, "x", (node, 8080), 0.3)
        self.rig.heal("n0")
        self.rig.fail("n0", "tcp dport 8080", "reject with tcp reset")
        self.assertTrue(self.refused("x", node, 8080))
        self.rig.heal("n0")
        self.rig.heal("n0")
        self.rig.connect("x", (node, 8080)).close()

    def test_servicesFromOutside(self) -> None:
        """The host outside sends traffic for services to n0."""
        self.backends("p1a")
        rules = f"""
        table ip kp-test {{
          chain pre {{ type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.8 tcp dport 80 dnat to {self.rig.address("p1a")}:8080; }}
          chain post {{ type nat hook postrouting priority srcnat; ct status dnat masquerade; }}
        }}"""
        self.rig.run("n0", ["nft", "-f", "-"], input=rules)
        answer = ask(self.rig, "x", "10.96.0.8", 80)
        self.assertEqual(answer.split()[0], "p1a")
        self.assertIn(self.rig.address("n0"), answer)

    def test_addPod(self) -> None:
        """A further pod can be had at any time."""
        pod = self.rig.addPod("n1", "p1b")
        self.assertEqual((pod.ip4, pod.node), ("10.244.1.11", "n1"))
        Backend(self.rig, "p1b", tcp=[8080])
        for family in (4, 6):
            self.assertEqual(ask(self.rig, "p0a", self.rig.address("p1b", family), 8080).split()[0], "p1b")

    def test_open(self) -> None:
        """A socket made inside belongs to the namespace; the thread is home again afterwards."""
        home = os.stat("/proc/thread-self/ns/net").st_ino
        with self.rig.open("p0a"):
            self.assertNotEqual(os.stat("/proc/thread-self/ns/net").st_ino, home)
            listener = socket.create_server((self.rig.address("p0a"), 9000))
        self.addCleanup(listener.close)
        self.assertEqual(os.stat("/proc/thread-self/ns/net").st_ino, home)
        self.rig.connect("p1a", (self.rig.address("p0a"), 9000)).close()

    def test_runFails(self) -> None:
        """A program that fails is an error with what it said; or not, if so wanted."""
        error = self.assertRaises(RigError, self.rig.run, "n0", ["ip", "link", "show", "nosuch"])
        self.assertIn("nosuch", str(error))
        self.assertNotEqual(self.rig.run("n0", ["false"], check=False).returncode, 0)
        self.assertEqual(self.rig.run("n0", ["cat"], input="text").stdout, "text")

    def test_apiProcess(self) -> None:
        """The fake API server runs beside the nodes and is scripted from here; 1,500 changes are quick."""
        start = work()
        api = ApiProcess(self.rig, options=["--bookmark-seconds", "5"])
        self.addCleanup(api.stop)
        self.assertEqual(api.url, "http://192.0.2.4:6443")
        api.apply(*(service(f"s{n}") for n in range(500)))
        api.apply(*(service(f"s{n % 500}", a=n) for n in range(1000)))
        status, _, body = self.rig.http("n0", f"{api.url}/api/v1/services")
        self.assertEqual((status, body.count(b'"resourceVersion"')), (200, 501))
        self.assertEqual([it["verb"] for it in api.requests()], ["list"])
        self.assertEqual(api.state()["resourceVersion"], 1501)
        api.fake("pause")
        waitFor(lambda: self.refused("n0", "192.0.2.4", 6443))
        self.assertEqual(api.state()["connections"], 0)
        api.fake("resume")
        self.assertEqual(self.rig.http("n0", f"{api.url}/readyz")[0], 200)
        self.assertEqual(api.stop(), 0)
        self.assertLess(work() - start, 2)
        api.assertNoTraceback()

    def refused(self, name: str, address: str, port: int) -> bool:
        try:
            self.rig.connect(name, (address, port), 1).close()
        except ConnectionRefusedError:
            return True
        return False


class ApiInNamespaceTests(TestCase):
    """The fake API server of this very process, in a namespace."""

    skip = ROOT_NEEDED or None
    timeout = 20

    @inlineCallbacks
    def test_within(self) -> Iterator[Deferred[Any]]:
        """It listens there, also after a pause."""
        rig = Rig()
        self.addCleanup(rig.close)
        api = FakeApi(reactor)
        self.addCleanup(api.close)
        api.listen("192.0.2.4", 6443, within=lambda: rig.open("api"))
        for _ in range(2):
            status, _, _ = yield deferToThread(rig.http, "n1", f"{api.url}/api/v1/services")
            self.assertEqual(status, 200)
            yield api.pause()
            yield self.assertFailure(deferToThread(rig.connect, "n1", ("192.0.2.4", 6443)), ConnectionRefusedError)
            api.resume()


class SmallRigTests(SynchronousTestCase):
    """The small network, and how networks come and go."""

    skip = ROOT_NEEDED or None

    def namespaces(self, prefix: str) -> list[str]:
        return [name for name in os.listdir("/run/netns") if name.startswith(prefix)]

    def test_small(self) -> None:
        """Building it is less than 0.3 s of work; pod and host outside reach the node, and each other's family."""
        start = work()
        rig = SmallRig()
        self.addCleanup(rig.close)
        self.assertLess(work() - start, 0.3)
        Backend(rig, "n0", tcp=[8080])
        Backend(rig, "p0a", tcp=[8080])
        for family in (4, 6):
            for name, target in (("p0a", "n0"), ("x", "n0"), ("n0", "p0a")):
                self.assertEqual(ask(rig, name, rig.address(target, family), 8080).split()[0], target)

    def test_closeIsComplete(self) -> None:
        """After close() there is no namespace, no program, no file; a second close() does nothing."""
        rig = Rig()
        self.addCleanup(rig.close)
        backend = Backend(rig, "p0a", tcp=[8080])
        # one that ignores the polite signal, and one that the network was not told of
        stubborn = rig.spawn("p0b", [sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\n"
                                     "print(flush=True)\ntime.sleep(60)"], stdout=subprocess.PIPE)  # fmt: skip
        assert stubborn.stdout
        stubborn.stdout.readline()
        stray = subprocess.Popen(rig.argv("n1", ["sleep", "60"]))
        self.addCleanup(stray.wait)
        waitFor(lambda: str(stray.pid) in rig.run("n1", ["ip", "netns", "pids", rig.namespace("n1")]).stdout.split())
        self.assertEqual(len(self.namespaces(rig.prefix)), 8)
        rig.close()
        rig.close()
        self.assertEqual(self.namespaces(rig.prefix), [])
        self.assertEqual(backend.process.poll(), 0)
        self.assertEqual(stubborn.poll(), -signal.SIGKILL)
        self.assertEqual(stray.wait(5), -signal.SIGKILL)
        self.assertFalse(os.path.exists(rig.folder))

    def test_twoAtOnce(self) -> None:
        """Several networks live side by side, with the same addresses."""
        with SmallRig() as one, SmallRig() as two:
            Backend(one, "n0", tcp=[8080], called="one")
            Backend(two, "n0", tcp=[8080], called="two")
            self.assertEqual(ask(one, "x", one.address("n0"), 8080).split()[0], "one")
            self.assertEqual(ask(two, "x", two.address("n0"), 8080).split()[0], "two")

    def test_leftovers(self) -> None:
        """What a run that was killed has left is removed by the next one: namespaces and programs."""
        script = (
            "import sys\nfrom tests.fakes.network import SmallRig\nrig = SmallRig()\n"
            "process = rig.spawn('n0', ['sleep', '60'])\n"
            "print(rig.prefix, process.pid, flush=True)\nsys.stdin.read()\n"
        )
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        died = subprocess.Popen(
            [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert died.stdout and died.stdin
        prefix, pid = died.stdout.readline().split()
        network.sweep()
        self.assertEqual(len(self.namespaces(prefix)), 3)  # its owner lives
        died.kill()
        died.wait()
        died.stdout.close()
        died.stdin.close()
        SmallRig().close()
        self.assertEqual(self.namespaces(prefix), [])
        waitFor(lambda: not isRunning(int(pid)))

    def test_cannotBuild(self) -> None:
        """What the tool said is in the error, and nothing is left."""

        class Broken(SmallRig):
            pods = (("p0a", "n0"), ("name-that-is-too-long", "n0"))

        before = self.namespaces(f"kp-{os.getpid()}-r")  # other tests of this process may keep theirs
        error = self.assertRaises(RigError, Broken)
        self.assertIn("vname-that-is-too-long", str(error))
        self.assertEqual(set(self.namespaces(f"kp-{os.getpid()}-r")), set(before))


class BackendTests(SynchronousTestCase):
    """The ways in which backends behave and misbehave."""

    skip = ROOT_NEEDED or None

    def setUp(self) -> None:
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)

    def backend(self, mode: str, *options: str, port: int = 8080) -> socket.socket:
        """A connection to a backend in that mode."""
        backend = Backend(self.rig, "n0", tcp=[port], udp=[port], mode=mode, options=options)
        self.addCleanup(backend.stop)
        client = self.rig.connect("x", (self.rig.address("n0"), port), 5)
        self.addCleanup(client.close)
        return client

    def everything(self, client: socket.socket) -> bytes:
        return client.makefile("rb").read()

    def test_start(self) -> None:
        """It starts with little work, and says why when it cannot listen."""
        start = work()
        backend = Backend(self.rig, "n0", tcp=[8080])
        error = self.assertRaises(AssertionError, Backend, self.rig, "n0", tcp=[8080])
        self.assertIn("cannot listen on tcp 0.0.0.0:8080: Address already in use", str(error))
        self.assertEqual(backend.stop(), 0)
        self.assertLess(work() - start, 1)  # of both

    def test_line(self) -> None:
        """Each line is answered with the backend's name and the client's address; CR LF will do."""
        client = self.backend("line")
        client.sendall(b"one\r\ntw")
        client.sendall(b"o\n")
        client.shutdown(socket.SHUT_WR)
        me = f"{self.rig.address('x')}:{client.getsockname()[1]}"
        self.assertEqual(self.everything(client).decode(), f"n0 {me} one\nn0 {me} two\n")

    def test_echo(self) -> None:
        """A megabyte goes and comes back."""
        client = self.backend("echo")
        data = os.urandom(1 << 20)
        got = b""
        for at in range(0, len(data), 65536):
            client.sendall(data[at : at + 65536])
            got += client.recv(1 << 20)
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(hashlib.sha256(got + self.everything(client)).digest(), hashlib.sha256(data).digest())

    def test_greet(self) -> None:
        """It speaks first, and closes."""
        self.assertTrue(self.everything(self.backend("greet")).startswith(b"n0 192.0.2.5:"))

    def test_halfCloseReply(self) -> None:
        """It answers only after the client has said all."""
        client = self.backend("half-close-reply")
        client.sendall(b"data")
        client.settimeout(0.2)
        self.assertRaises(TimeoutError, client.recv, 1)
        client.settimeout(5)
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(self.everything(client).split()[2:], [b"4", hashlib.sha256(b"data").hexdigest().encode()])

    def test_stall(self) -> None:
        """It neither answers nor reads: the client's sending comes to a halt."""
        client = self.backend("accept-and-stall")
        client.settimeout(0.3)
        self.assertRaises(TimeoutError, client.sendall, bytes(64 << 20))

    def test_sink(self) -> None:
        """It takes all and says nothing, and goes when the client does."""
        client = self.backend("sink")
        client.sendall(bytes(8 << 20))
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(self.everything(client), b"")

    def test_reset(self) -> None:
        """It resets at once, or at the first bytes."""
        # Already while connecting, where the backend is quicker than our return from it.
        self.assertRaises(ConnectionResetError, lambda: self.backend("rst").recv(1))
        client = self.backend("rst-on-data", port=8081)
        client.settimeout(0.2)
        self.assertRaises(TimeoutError, client.recv, 1)
        client.settimeout(5)
        client.sendall(b"x")
        self.assertRaises(ConnectionResetError, client.recv, 1)

    def test_slow(self) -> None:
        """It answers byte by byte."""
        client = self.backend("slow", "--slow-seconds", "0.05")
        start = time.monotonic()
        client.sendall(b"hi\n")
        # One by one: several may have come by the time that we look.
        self.assertEqual(b"".join(client.recv(1) for _ in range(3)), b"n0 ")
        self.assertGreater(time.monotonic() - start, 0.08)

    def test_source(self) -> None:
        """It sends so many bytes of a known pattern."""
        got = self.everything(self.backend("source", "--bytes", "3000000"))
        self.assertEqual(len(got), 3_000_000)
        self.assertEqual(got[:512], bytes(range(256)) * 2)

    def test_udpSilence(self) -> None:
        """A sink does not answer datagrams."""
        self.backend("sink")
        with self.rig.socketIn("x", socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.2)
            client.sendto(b"x", (self.rig.address("n0"), 8080))
            self.assertRaises(TimeoutError, client.recv, 10)


class ProgramTests(SynchronousTestCase):
    """Programs under watch."""

    skip = ROOT_NEEDED or None

    def setUp(self) -> None:
        self.rig = SmallRig()
        self.addCleanup(self.rig.close)

    def program(self, code: str, **kw: Any) -> Program:
        return Program(self.rig, "n0", [sys.executable, "-c", code], **kw)

    def test_log(self) -> None:
        """All it says is kept, and a traceback in it is found."""
        program = self.program("print('ready', flush=True)\nraise ValueError('no')", ready="ready")
        program.process.wait(5)
        self.assertEqual(program.stop(), 1)
        self.assertIn("ValueError: no", program.log())
        self.assertRaises(AssertionError, program.assertNoTraceback)

    def test_endsTooSoon(self) -> None:
        """One that ends before it is ready is an error with what it said, at once."""
        start = time.monotonic()
        error = self.assertRaises(AssertionError, self.program, "print('why')", ready="ready")
        self.assertIn("why", str(error))
        self.assertLess(time.monotonic() - start, 5)

    def test_daemon(self) -> None:
        """The daemon starts, answers, follows the API server on the host outside, and ends in order."""
        api = ApiProcess(self.rig, "x")
        text = f"[kproxy]\nnode-name = n0\n[source:cluster]\ntype = api\nserver = {api.url}\n"
        daemon = Daemon(self.rig, "n0", text)
        waitFor(lambda: {"services", "endpointslices"} <= {it["resource"] for it in api.requests()})
        self.assertEqual(daemon.stop(), 0)
        daemon.assertNoTraceback()

    def test_daemonThatCannotStart(self) -> None:
        """A daemon that ends at once is an error with its log, long before the time is over."""
        start = time.monotonic()
        error = self.assertRaises(AssertionError, Daemon, self.rig, "n0", "/nonexistent/kproxy.ini")
        self.assertIn("it ended with", str(error))
        self.assertLess(time.monotonic() - start, 15)
