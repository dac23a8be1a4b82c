"""
A whole node at work: the rig, a fake API server, backends in pods, the daemon on node ``n0``. Building it takes
seconds, so the tests of one class share it, each with Services of its own.
"""

from __future__ import annotations

import atexit
import itertools
import json
import signal
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from tests.fakes.daemon import ApiProcess, Backend, Daemon
from tests.fakes.network import Rig

PORT = 8080
PODS = ("p0a", "p0b", "p1a")
CONFIG = """
[kproxy]
node-name = n0
cluster-cidr = 10.244.0.0/16, fd00:10:244::/56
[source:cluster]
type = api
server = {server}
[rules]
writer = {writer}
[userspace]
drain-timeout = 3s
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


def slices(rig: Rig, name: str, *pods: str, ports: Any = None) -> list[Json]:
    """The EndpointSlices, one per family, of a Service that these pods are behind."""
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-{family.lower()}", "namespace": "default",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": family,
            "ports": ports or [{"name": "http", "port": PORT, "protocol": "TCP"}],
            "endpoints": [
                {
                    "addresses": [rig.address(pod, 4 if family == "IPv4" else 6)],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "nodeName": rig.hosts[pod].node,
                }
                for pod in pods
            ],
        }
        for family in ("IPv4", "IPv6")
    ]


class World:
    """
    :param apiOptions: further options of the API server; ``{folder}`` in them is the rig's folder.
    :ivar rig: see :mod:`tests.fakes.network`.
    :ivar api: the API server's process.
    :ivar daemon: kproxy on n0.
    """

    shared: ClassVar[World | None] = None

    def __init__(self, writer: str, apiOptions: Sequence[str] = ()) -> None:
        self.writer = writer
        self.apiOptions = apiOptions
        self.rig = Rig()
        try:
            self.numbers = itertools.count(1)
            self.api = self.startApi()
            self.backends = {pod: Backend(self.rig, pod, http=[PORT], udp=[PORT]) for pod in PODS}
            self.api.apply(
                *(
                    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {}, "status": {}}
                    for name in ("n0", "n1")
                )
            )
            self.daemon = self.startDaemon()
        except BaseException:
            self.rig.close()
            raise

    @classmethod
    def get(cls, writer: str, apiOptions: Sequence[str] = ()) -> World:
        """The world of this writer and these options; one at a time is kept."""
        if cls.shared is None or (cls.shared.writer, cls.shared.apiOptions) != (writer, apiOptions):
            cls.end()
            cls.shared = World(writer, apiOptions)
        return cls.shared

    @classmethod
    def end(cls) -> None:
        if cls.shared is not None:
            cls.shared.rig.close()
            cls.shared = None

    def startApi(self) -> ApiProcess:
        return ApiProcess(self.rig, options=[it.format(folder=self.rig.folder) for it in self.apiOptions])

    def killApi(self) -> None:
        """The API server dies; :meth:`startApi` starts another one at the same address."""
        self.api.stop(signal.SIGKILL)

    def startDaemon(self, extra: str = "", **kw: Any) -> Daemon:
        text = CONFIG.format(server=self.api.url, writer=self.writer) + extra
        daemon = Daemon(self.rig, "n0", text, **kw)
        daemon.waitUntil(lambda: self.status(daemon)["sync"]["inForce"], 20)
        return daemon

    def status(self, daemon: Daemon | None = None) -> Json:
        code, _, body = (daemon or self.daemon).get("http://127.0.0.1:10249/status")
        assert code == 200, code
        found: Json = json.loads(body)
        return found

    def settle(self, expected: Any, seconds: float = 10) -> None:
        """Until what is expected of the status is in force."""
        self.daemon.waitUntil(lambda: (lambda it: it["sync"]["inForce"] and expected(it))(self.status()), seconds)

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

