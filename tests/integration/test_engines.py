"""
What carries the bytes, in the whole daemon: each engine, workers, the access log, and how it goes under load. One node,
two pods, clients outside; rules by nftables.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

from twisted.logger import Logger
from twisted.trial.unittest import SkipTest, TestCase

from tests.fakes.daemon import ApiProcess, Backend, Daemon
from tests.fakes.network import SmallRig, waitFor
from tests.fakes.waiting import isRunning
from tests.integration.world import service, slices
from tests.shared.namespaces import canMakeNamespaces

CONFIG = """
[kproxy]
node-name = n0
cluster-cidr = 10.244.0.0/16, fd00:10:244::/56
[source:cluster]
type = api
server = {server}
[rules]
writer = nftables
[userspace]
drain-timeout = 20s
access-log = access.log
"""
STATUS = "http://127.0.0.1:10249/status"
HOST4, HOST6 = "10.96.1.1", "fd00:10:96::1"
#: port of the Service → of the backends, and what they do there
PORTS = {"http": (80, 8080), "echo": (81, 8081), "source": (82, 8082)}
SERVED = [{"name": name, "port": it, "protocol": "TCP"} for name, (it, _) in PORTS.items()]
BUILT = importlib.util.find_spec("twisted_kproxy.userspace.engines._pump") is not None
#: Bulk on as many connections as there are threads, and short requests on as many more; until it is ended.
LOAD = """
import socket, sys, threading
host = sys.argv[1]
def bulk():
    with socket.create_connection((host, 82)) as it:
        while it.recv(1 << 20):
            pass
def short():
    while True:
        try:
            with socket.create_connection((host, 80)) as it:
                it.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                while it.recv(65536):
                    pass
        except OSError:
            pass
threads = [threading.Thread(target=it, daemon=True) for it in [bulk, short] * 4]
for it in threads:
    it.start()
print("running", flush=True)
for it in threads:
    it.join()
"""


class Node:
    """The network, the API server and the backends: what the tests share."""

    shared: ClassVar[Node | None] = None

    def __init__(self) -> None:
        self.rig = SmallRig()
        try:
            self.rig.addPod("n0", "p0b")
            self.api = ApiProcess(self.rig, "x")
            for pod in ("p0a", "p0b"):
                Backend(self.rig, pod, http=[8080])
                Backend(self.rig, pod, tcp=[8081], mode="echo")
                Backend(self.rig, pod, tcp=[8082], mode="source")
        except BaseException:
            self.rig.close()
            raise

    @classmethod
    def get(cls) -> Node:
        if cls.shared is None:
            cls.shared = cls()
        return cls.shared

    @classmethod
    def end(cls) -> None:
        if cls.shared is not None:
            cls.shared.rig.close()
            cls.shared = None


atexit.register(Node.end)


class EngineCase(TestCase):
    """A daemon on that node."""

    timeout = 180
    log = Logger()

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("network namespaces need root")
        node = Node.get()
        self.rig, self.api = node.rig, node.api
        self.api.apply(
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0"}, "spec": {}, "status": {}},
            service("web", 1, SERVED),
        )
        self.endpoints("p0a", "p0b")
        for name in ("access.log", "access.log.1"):
            Path(self.rig.folder, name).unlink(missing_ok=True)

    def endpoints(self, *pods: str) -> None:
        ports = [{"name": name, "port": it, "protocol": "TCP"} for name, (_, it) in PORTS.items()]
        self.api.apply(*slices(self.rig, "web", *pods, ports=ports))

    def start(self, *userspace: str, twistd: tuple[str, ...] = ()) -> Daemon:
        text = CONFIG.format(server=self.api.url) + "\n".join((*userspace, ""))
        daemon = Daemon(self.rig, "n0", text, twistd=twistd)
        self.addCleanup(daemon.stop, signal.SIGKILL)
        daemon.waitUntil(lambda: self.status(daemon)["sync"]["inForce"])
        return daemon

    @staticmethod
    def status(daemon: Daemon) -> Any:
        return json.loads(daemon.get(STATUS, 5)[2])

    def workersReady(self, daemon: Daemon) -> list[int]:
        """Wait for two workers; their process numbers."""

        def both() -> Any:
            found = self.status(daemon)["relay"]["workers"]
            return [it["pid"] for it in found] if len(found) == 2 and all(it["ready"] for it in found) else None

        pids: list[int] = daemon.waitUntil(both)
        return pids

    def curl(self, place: str, host: str) -> str:
        url = f"http://[{host}]/" if ":" in host else f"http://{host}/"
        done = self.rig.run(place, ["curl", "-sS", "-g", "-m", "10", url], check=False)
        return done.stdout.split()[0] if done.stdout else done.stderr

    def echo(self, place: str, host: str, size: int) -> bool:
        """Whether so many bytes come back whole, the last of them after the half-close."""
        payload = random.Random(size).randbytes(size)
        with self.rig.connect(place, (host, 81), 20) as client:
            sender = threading.Thread(target=lambda: (client.sendall(payload), client.shutdown(socket.SHUT_WR)))
            sender.start()
            digest = hashlib.sha256()
            while data := client.recv(1 << 18):
                digest.update(data)
            sender.join()
        return digest.digest() == hashlib.sha256(payload).digest()

    def lines(self, name: str = "access.log") -> list[str]:
        path = Path(self.rig.folder, name)
        return path.read_text().splitlines() if path.exists() else []

    def active(self, daemon: Daemon) -> dict[str, int]:
        """Open connections of service port ``echo`` by endpoint, as the load balancer knows them."""
        services = self.status(daemon)["services"]
        found: dict[str, int] = services["default/web:echo/TCP/IPv4"]["cluster"]["endpoints"]
        return found

    def hold(self, count: int) -> list[socket.socket]:
        """So many connections that have echoed something, from outside."""
        held = []
        for _ in range(count):
            it = self.rig.connect("x", (HOST4, 81), 10)
            self.addCleanup(it.close)
            it.sendall(b"?")
            self.assertEqual(it.recv(1), b"?")
            held.append(it)
        return held


class ServingTests(EngineCase):
    """Each of them serves."""

    def serves(self, engine: str, *userspace: str, twistd: tuple[str, ...] = (), workers: bool = False) -> None:
        if engine == "native" and not BUILT:
            raise SkipTest("the C module was not built here")
        daemon = self.start(f"engine = {engine}", *userspace, twistd=twistd)
        if workers:
            self.workersReady(daemon)
        for host in (HOST4, HOST6):
            for place in ("x", "p0a"):
                self.assertIn(self.curl(place, host), ("p0a", "p0b"), place)
            self.assertTrue(self.echo("x", host, 4 << 20))
            self.assertTrue(self.echo("p0b", host, 1))
        waitFor(lambda: self.status(daemon)["relay"]["active"] == 0, 10)
        status = self.status(daemon)["relay"]
        self.assertEqual((status["engine"], status["active"], status["accessLog"]["dropped"]), (engine, 0, 0))
        daemon.assertNoTraceback()
        self.assertEqual(daemon.stop() in (0, -signal.SIGTERM), True)
        daemon.assertNoTraceback()
        lines = self.lines()
        self.assertEqual(len(lines), 8, lines)
        self.assertEqual({re.search(r"outcome=(.*)", line)[1] for line in lines}, {"done"})  # type: ignore[index]
        for frontend, count in ((f"{HOST4}:80", 2), (f"[{HOST6}]:80", 2), (f"{HOST4}:81", 2), (f"[{HOST6}]:81", 2)):
            self.assertEqual(len([it for it in lines if f" frontend={frontend} " in it]), count, lines)
        sizes = sorted(re.search(r"sent=(\d+) received=(\d+)", it).groups() for it in lines if ":81 " in it)  # type: ignore[union-attr]
        self.assertEqual(sizes, [("1", "1")] * 2 + [(str(4 << 20),) * 2] * 2)

    def test_python(self) -> None:
        """The engine in Python."""
        self.serves("python")

    def test_native(self) -> None:
        """The engine in C."""
        self.serves("native")

    def test_nativeThread(self) -> None:
        """The engine in C, in a thread of its own."""
        self.serves("native", "native-thread = yes")

    def test_protocol(self) -> None:
        """The engine of Twisted protocols."""
        self.serves("protocol")

    def test_otherReactor(self) -> None:
        """Under a reactor that somebody else has chosen."""
        self.serves("python", twistd=("--reactor=poll",))

    def test_workersPython(self) -> None:
        """Two workers with the engine in Python."""
        self.serves("python", "workers = 2", workers=True)

    def test_workersNative(self) -> None:
        """Two workers with the engine in C."""
        self.serves("native", "workers = 2", workers=True)


class WorkerTests(EngineCase):
    """More than one process."""

    def test_killedUnderLoad(self) -> None:
        """
        A worker is killed while clients come and go: of those that stay connected its own are lost, and no others; no
        new client is refused; another worker takes its place.
        """
        daemon = self.start("workers = 2", "engine = python")
        pids = self.workersReady(daemon)
        held = self.hold(8)
        self.assertEqual([it["active"] for it in self.status(daemon)["relay"]["workers"]], [4, 4])
        refused: list[str] = []
        served: list[str] = []
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                try:
                    served.append(self.rig.http("x", f"http://{HOST4}/", timeout=10)[2].split()[0].decode())
                except (ConnectionRefusedError, TimeoutError) as error:
                    refused.append(repr(error))
                except Exception:
                    pass  # it was on its way through the worker that was killed

        threads = [threading.Thread(target=load) for _ in range(3)]
        for it in threads:
            it.start()
        try:
            waitFor(lambda: len(served) > 30, 20)
            os.kill(pids[0], signal.SIGKILL)
            daemon.waitUntil(lambda: len(self.status(daemon)["relay"]["workers"]) < 2
                             or self.status(daemon)["relay"]["workers"][0]["pid"] != pids[0])  # fmt: skip
            after = self.workersReady(daemon)
            count = len(served)
            waitFor(lambda: len(served) > count + 30, 20)
        finally:
            done.set()
            for it in threads:
                it.join()
        self.assertEqual(refused, [])
        self.assertEqual((after[0] != pids[0], after[1]), (True, pids[1]))
        alive = []
        for it in held:
            try:
                it.sendall(b"!")
                alive.append(it.recv(1) == b"!")
            except OSError:
                alive.append(False)
        self.assertEqual(alive.count(True), 4, alive)
        waitFor(lambda: sum(self.active(daemon).values()) == 4, 10)
        daemon.assertNoTraceback()

    def test_affinityAndCounters(self) -> None:
        """ClientIP affinity is one for all workers, and what ``/status`` counts is what is open, over all of them."""
        sticky = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
        self.api.apply(service("web", 1, SERVED, **sticky))
        daemon = self.start("workers = 2")
        self.workersReady(daemon)
        for place in ("x", "n0", "p0b"):
            self.assertEqual(len({self.curl(place, HOST4) for _ in range(6)}), 1, place)
        # The last of those may have ended for its client, and not yet for the worker.
        waitFor(lambda: self.status(daemon)["relay"]["active"] == 0, 10)
        held = self.hold(7)
        status = self.status(daemon)
        self.assertEqual(sorted(self.active(daemon).values()), [0, 7])
        self.assertEqual(sorted(it["active"] for it in status["relay"]["workers"]), [3, 4])
        self.assertEqual(status["dataplane"]["servicePorts"]["default/web:echo/TCP/IPv4"]["active"], 7)
        for sock in held[:5]:
            sock.close()
        waitFor(lambda: sorted(self.active(daemon).values()) == [0, 2], 10)
        self.assertEqual(self.status(daemon)["relay"]["active"], 2)
        daemon.assertNoTraceback()

    def test_drain(self) -> None:
        """
        A service manager that sends SIGTERM to every process: workers go on, so that open connections may end by
        themselves; then the daemon ends, and no worker stays behind.
        """
        daemon = self.start("workers = 2")
        pids = self.workersReady(daemon)
        (client,) = self.hold(1)
        for pid in (*pids, daemon.pid):
            os.kill(pid, signal.SIGTERM)
        daemon.waitUntil(lambda: "Stopping" in daemon.log())
        waitFor(lambda: "Failed to connect" in self.curl("x", HOST4), 10)
        client.sendall(b"still here")
        self.assertEqual(client.recv(100), b"still here")
        client.close()
        daemon.process.wait(15)
        self.ended(pids)
        daemon.assertNoTraceback()

    def test_killedDaemon(self) -> None:
        """When the daemon is killed its workers end as well."""
        daemon = self.start("workers = 2")
        pids = self.workersReady(daemon)
        daemon.stop(signal.SIGKILL)
        self.ended(pids)

    def ended(self, pids: list[int]) -> None:
        """Until these are no more; who has inherited them from their daemon may be in no hurry to notice."""
        for pid in pids:
            waitFor(lambda pid=pid: not isRunning(pid), 10)  # type: ignore[misc]


class AccessLogTests(EngineCase):
    """The access log of a real daemon."""

    def test_moved(self) -> None:
        """logrotate moves the file away: later lines are in a new one, and none is lost."""
        daemon = self.start()
        for _ in range(3):
            self.curl("x", HOST4)
        waitFor(lambda: len(self.lines()) == 3, 10)
        os.rename(os.path.join(self.rig.folder, "access.log"), os.path.join(self.rig.folder, "access.log.1"))
        for _ in range(2):
            self.curl("x", HOST6)
        waitFor(lambda: len(self.lines()) == 2, 10)
        self.assertEqual(len(self.lines("access.log.1")), 3)
        line = self.lines()[0]
        address = self.rig.address("x", 6)
        self.assertRegex(
            line,
            r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z service=default/web:http "
            rf"client=\[{address}\]:\d+ frontend=\[{HOST6}\]:80 endpoint=\[fd00:10:244::1[01]\]:8080 tries=1 "
            r"connect=[\d.]+ms total=[\d.]+ms sent=\d+ received=\d+ outcome=done$",
        )
        self.assertEqual(self.status(daemon)["relay"]["accessLog"]["dropped"], 0)
        daemon.assertNoTraceback()

    def test_refusedByAll(self) -> None:
        """A client that no endpoint took has a line too, with what was tried and where it wanted to go."""
        dead = service("dead", 2)
        self.addCleanup(self.api.delete, dead)
        ports = [{"name": "http", "port": 9, "protocol": "TCP"}]
        self.api.apply(dead, *slices(self.rig, "dead", "p0a", "p0b", ports=ports))
        daemon = self.start()
        self.curl("x", "10.96.1.2")
        waitFor(lambda: len(self.lines()) == 1, 10)
        self.assertRegex(self.lines()[0], r"frontend=10\.96\.1\.2:80 endpoint=- tries=4 connect=- .* outcome=refused$")
        daemon.assertNoTraceback()


class FairnessTests(EngineCase):
    """A Service under full load."""

    def loaded(self, *userspace: str) -> None:
        daemon = self.start(*userspace)
        load = self.rig.spawn("x", [sys.executable, "-c", LOAD, HOST4], stdout=-1)
        assert load.stdout is not None
        self.assertEqual(load.stdout.readline().strip(), "running")
        daemon.waitUntil(lambda: sum(
            self.status(daemon)["services"]["default/web:source/TCP/IPv4"]["cluster"]["endpoints"].values()) >= 4)
        for _ in range(20):
            for page in ("healthz", "livez"):
                self.assertEqual(daemon.get(f"http://127.0.0.1:10256/{page}", 10)[0], 200)
        for pods in (("p0a",), ("p0b",), ("p0a", "p0b")):
            wanted = {f"{self.rig.address(pod)}:8080" for pod in pods}
            self.endpoints(*pods)
            daemon.waitUntil(lambda wanted=wanted: set(  # type: ignore[misc]
                (it := self.status(daemon))["services"]["default/web:http/TCP/IPv4"]["cluster"]["endpoints"]
            ) == wanted and it["sync"]["inForce"])
        self.assertIn(self.curl("p0a", HOST6), ("p0a", "p0b"))
        lag = re.findall(r"(?m)^kproxy_loop_lag_seconds_(?:bucket.*|sum|count) .*$",
                         daemon.get("http://127.0.0.1:10249/metrics", 10)[2].decode())  # fmt: skip
        # No bar: what it was is for whoever reads the log of the tests.
        self.log.info("{name}: {lag}", name=self.id(), lag="; ".join(lag))
        self.assertTrue(lag)
        self.rig.stop(load)
        daemon.assertNoTraceback()

    def test_python(self) -> None:
        """Health answers and a change of endpoints come through while the engine in Python is as busy as can be."""
        self.loaded("engine = python")

    def test_native(self) -> None:
        """The same in C."""
        if not BUILT:
            raise SkipTest("the C module was not built here")
        self.loaded("engine = native")

    def test_protocol(self) -> None:
        """The same with protocols."""
        self.loaded("engine = protocol")

    def test_workers(self) -> None:
        """The same with workers."""
        self.loaded("workers = 2", "engine = python")
