"""
A whole node at work: the rig, a fake API server, backends in pods, the daemon on node ``n0``; or two nodes, with a
daemon on ``n1`` too. Building it takes seconds, so the tests of one class share it, each with Services of its own.
"""

from __future__ import annotations

import atexit
import itertools
import json
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from tests.fakes.daemon import ApiProcess, Backend, Daemon
from tests.fakes.network import Rig, waitFor

PORT = 8080
OTHER_PORT = 8081  # the backends answer there too
PODS = ("p0a", "p0b", "p1a")
CONFIG = """
[kproxy]
node-name = {node}
cluster-cidr = 10.244.0.0/16, fd00:10:244::/56
{settings}
[source:cluster]
type = api
server = {server}
[rules]
writer = {writer}
[userspace]
drain-timeout = 10s
"""
Json = dict[str, Any]


def service(name: str, number: int, ports: Any = None, **spec: Any) -> Json:
    """A dual-stack Service with the addresses of that number, port 80 to the backends'."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "clusterIP": f"10.96.1.{number}",
            "clusterIPs": [f"10.96.1.{number}", f"fd00:10:96::{number:x}"],
            "ipFamilies": ["IPv4", "IPv6"],
            "type": "ClusterIP",
            "ports": ports or [{"name": "http", "port": 80, "protocol": "TCP"}],
            **spec,
        },
        "status": {"loadBalancer": {}},
    }


def slices(
    rig: Rig, name: str, *pods: str, ports: Any = None, more: Mapping[str, Json] | None = None, part: str = ""
) -> list[Json]:
    """
    The EndpointSlices, one per family, of a Service that these pods are behind.

    :param pods: or nodes, for pods in the network of their host.
    :param more: of each pod what its endpoint has beside, such as other conditions.
    :param part: tells slices of one Service apart.
    """
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}{part}-{family.lower()}", "namespace": "default",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": family,
            "ports": ports or [{"name": "http", "port": PORT, "protocol": "TCP"}],
            "endpoints": [
                {
                    "addresses": [rig.address(pod, 4 if family == "IPv4" else 6)],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "nodeName": rig.hosts[pod].node or pod,
                    **(more or {}).get(pod, {}),
                }
                for pod in pods
            ],
        }
        for family in ("IPv4", "IPv6")
    ]


class World:
    """
    :param apiOptions: further options of the API server; ``{folder}`` in them is the rig's folder.
    :param nodes: those that kproxy runs on. With ``n1`` there is a second pod there, ``p1b``.
    :param settings: further lines of the daemons' section ``[kproxy]``.
    :ivar rig: see :mod:`tests.fakes.network`.
    :ivar api: the API server's process.
    :ivar daemons: kproxy on each of these nodes.
    """

    shared: ClassVar[World | None] = None

    def __init__(
        self, writer: str, apiOptions: Sequence[str] = (), nodes: Sequence[str] = ("n0",), settings: str = ""
    ) -> None:
        self.key = (writer, apiOptions, nodes, settings)
        self.writer = writer
        self.apiOptions = apiOptions
        self.settings = settings
        self.rig = Rig()
        try:
            if "n1" in nodes:
                self.rig.addPod("n1", "p1b")
            # Tests are refused more often than the kernel says so, of itself, to one host, and to all of them: many
            # kernels count what all namespaces say as one.
            for name in nodes:
                self.rig.run(name, ["sysctl", "-qw", "net.ipv4.icmp_ratemask=0", "net.ipv6.icmp.ratemask="])
            self.numbers = itertools.count(1)
            self.api = self.startApi()
            pods = [pod for pod, it in self.rig.hosts.items() if it.node]
            self.backends = {pod: self.startBackend(pod) for pod in pods}
            self.api.apply(*(self.node(name) for name in ("n0", "n1")))
            self.daemons: dict[str, Daemon] = {}
            for name in nodes:
                self.startDaemon(node=name)
        except BaseException:
            self.rig.close()
            raise

    @classmethod
    def get(
        cls, writer: str, apiOptions: Sequence[str] = (), nodes: Sequence[str] = ("n0",), settings: str = ""
    ) -> World:
        """The world of this writer and these options; one at a time is kept."""
        if cls.shared is None or cls.shared.key != (writer, apiOptions, nodes, settings):
            cls.end()
            cls.shared = World(writer, apiOptions, nodes, settings)
        return cls.shared

    @classmethod
    def end(cls) -> None:
        if cls.shared is not None:
            cls.shared.rig.close()
            cls.shared = None

    @property
    def daemon(self) -> Daemon:
        """That of n0."""
        return self.daemons["n0"]

    @daemon.setter
    def daemon(self, it: Daemon) -> None:
        self.daemons["n0"] = it

    @staticmethod
    def node(name: str, **labels: str) -> Json:
        """A Node object."""
        metadata = {"name": name, "labels": {f"topology.kubernetes.io/{key}": it for key, it in labels.items()}}
        return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {}, "status": {}}

    def startApi(self) -> ApiProcess:
        return ApiProcess(self.rig, options=[it.format(folder=self.rig.folder) for it in self.apiOptions])

    def killApi(self) -> None:
        """The API server dies; :meth:`startApi` starts another one at the same address."""
        self.api.stop(signal.SIGKILL)

    def startBackend(self, place: str) -> Backend:
        """What answers in a pod, or on a node for pods in its network."""
        return Backend(self.rig, place, http=[PORT, OTHER_PORT], udp=[PORT, OTHER_PORT])

    def startDaemon(self, extra: str = "", node: str = "n0", **kw: Any) -> Daemon:
        text = CONFIG.format(server=self.api.url, writer=self.writer, node=node, settings=self.settings) + extra
        daemon = Daemon(self.rig, node, text, **kw)
        daemon.waitUntil(lambda: self.status(daemon)["sync"]["inForce"])
        self.daemons[node] = daemon
        return daemon

    def status(self, daemon: Daemon | None = None) -> Json:
        code, _, body = (daemon or self.daemon).get("http://127.0.0.1:10249/status")
        assert code == 200, code
        found: Json = json.loads(body)
        return found

    def settle(self, expected: Any, seconds: float = 30) -> None:
        """Until what is expected of the status is in force, on every node."""
        for daemon in self.daemons.values():
            self._settle(daemon, expected, seconds)

    def _settle(self, daemon: Daemon, expected: Any, seconds: float) -> None:
        """A daemon that is late goes on: other tests want it."""
        ended = threading.Event()

        def ask() -> bool:
            if daemon.process.poll() is not None:
                ended.set()
            status = self.status(daemon)
            return bool(expected(status) and status["sync"]["inForce"])

        try:
            waitFor(ask, seconds, 0.02, ended)
        except AssertionError as error:
            status = {key: it for key, it in self.status(daemon).items() if key in ("sync", "sources", "dataplane")}
            raise AssertionError(f"{daemon.name}: {error}: {json.dumps(status)}") from None

    def apply(self, *objects: Json, seconds: float = 30) -> None:
        """Create or replace objects, and wait until every daemon has heard of it and it is in force."""
        self._change(self.api.apply, objects, seconds)

    def delete(self, *objects: Json, seconds: float = 30) -> None:
        """Delete objects; waits likewise."""
        self._change(self.api.delete, objects, seconds)

    def _change(self, change: Any, objects: Iterable[Json], seconds: float) -> None:
        """Bookmarks tell every watch how far it is, also where a change was none or not for it."""
        change(*objects)
        version = int(self.api.state()["resourceVersion"])

        def heard(status: Json) -> bool:
            kinds = status["sources"][0]["kinds"].values()
            if all(int(it["resourceVersion"] or 0) >= version for it in kinds):
                return True
            self.api.fake("bookmarkNow")
            return False

        self.settle(heard, seconds)

    def make(self, name: str, *pods: str, ports: Any = None, slicePorts: Any = None, **spec: Any) -> Json:
        """Create a Service with these pods behind it, and wait until it is in force. Gives the Service."""
        it = service(name, next(self.numbers), ports, **{k: v for k, v in spec.items() if k != "status"})
        if "status" in spec:
            it["status"] = spec["status"]
        self.api.apply(it, *slices(self.rig, name, *pods, ports=slicePorts))
        self.settle(lambda status: any(key.startswith(f"default/{name}:") for key in status["services"]))
        self.endpoints(name, *pods, ports=slicePorts)
        return it

    def endpoints(self, name: str, *pods: str, ports: Any = None) -> None:
        """Change who is behind a Service, and wait until it is in force."""
        self.api.apply(*slices(self.rig, name, *pods, ports=ports))

        expected = {self.rig.address(pod, family) for pod in pods for family in (4, 6)}

        def there(status: Json) -> bool:
            mine = [it for key, it in status["services"].items() if key.startswith(f"default/{name}:")]
            found = {key.rpartition(":")[0].strip("[]") for it in mine for key in it["cluster"]["endpoints"]}
            return bool(mine) and found == expected

        self.settle(there)

    def curl(self, place: str, url: str, seconds: float = 5) -> str:
        """One request by curl: the answer's first word (who answers), or curl's complaint."""
        done = self.rig.run(
            place, ["curl", "-sS", "-g", "--connect-timeout", str(seconds), "-m", str(seconds + 5), url], check=False
        )
        return done.stdout.split()[0] if done.returncode == 0 and done.stdout else f"curl {done.returncode}"

    def who(self, place: str, url: str, times: int = 6) -> Counter[str]:
        return Counter(self.curl(place, url) for _ in range(times))

    def ask(self, place: str, host: str, port: int, data: bytes = b"hello", seconds: float = 3) -> str:
        """One datagram from a port of its own; who answers, or the error's name."""
        it = self.rig.socketIn(place, socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            it.settimeout(seconds)
            it.connect((host, port))
            it.send(data)
            answer = it.recv(65535)
            assert answer.endswith(data), answer
            return answer.split()[0].decode()
        except OSError as error:
            return type(error).__name__
        finally:
            it.close()


@atexit.register
def _end() -> None:
    World.end()

