"""
Networks of namespaces for tests: nodes, pods, an outside host, the API server's host. Needs root.

::

    pods p0a p0b        p1a                10.244.<k>.10 …   fd00:10:244:<k>::10 …
           |  |          |
         cbr (n0)      cbr (n1)            10.244.<k>.1      fd00:10:244:<k>::1
            |             |
            +---- sw -----+---- api ---- x
           .2            .3     .4      .5  192.0.2.0/24     2001:db8:2::/64

Services live in 10.96.0.0/16 and fd00:10:96::/112. Nodes have their default route to ``x``, which forwards nothing and
reaches services through ``n0``. As on a node prepared for Kubernetes, bridged frames pass the rules of the node, and
bridge ports are in hairpin mode.

Everything is in namespaces called ``kp-<pid>-r<n>-…``; nothing in the root namespace is touched.
"""

from __future__ import annotations

import http.client
import ipaddress
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec

from .netns import RECORDS, RigError, delete, enter, identity, ipEach, killInside, parallel, runToEnd, sweep
from .waiting import waitFor

__all__ = ["SERVICES4", "SERVICES6", "Host", "Network", "Rig", "RigError", "SmallRig", "sweep", "waitFor"]

SERVICES4, SERVICES6 = "10.96.0.0/16", "fd00:10:96::/112"
_counter = itertools.count(1)


class Host(msgspec.Struct, frozen=True):
    """One namespace that has an address."""

    name: str
    ip4: str
    ip6: str
    node: str = ""

    def ip(self, family: int) -> str:
        return self.ip6 if family in (6, socket.AF_INET6) else self.ip4


class Network:
    """
    What :class:`Rig` and :class:`SmallRig` have in common. Also a context manager.

    :ivar prefix: of the names of its namespaces.
    :ivar hosts: all that have an address, by their short names.
    :ivar folder: for files of the test; goes with the network.
    """

    nodes: tuple[str, ...] = ()
    others: tuple[tuple[str, int], ...] = ()  # further hosts of the nodes' network, with their number in it
    pods: tuple[tuple[str, str], ...] = ()  # name and node
    switch = "sw"

    def __init__(self) -> None:
        sweep()
        self.prefix = f"kp-{os.getpid()}-r{next(_counter)}-"
        self.hosts: dict[str, Host] = {}
        self.processes: list[subprocess.Popen[Any]] = []
        self._namespaces: list[str] = []
        self._podNumbers: dict[str, int] = {}
        self._closed = False
        self.folder = tempfile.mkdtemp(prefix=self.prefix)
        self._record()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what tests use ---

    def namespace(self, name: str) -> str:
        """The full name of a namespace, for ``ip netns``."""
        return self.prefix + name

    def address(self, name: str, family: int = 4) -> str:
        """The address of a node, a pod or another host; family 4 or 6."""
        return self.hosts[name].ip(family)

    def argv(self, name: str, argv: Sequence[str]) -> list[str]:
        """What runs a program in a namespace."""
        return ["ip", "netns", "exec", self.namespace(name), *argv]

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """
        Run a program in a namespace to its end.

        :raise RigError: where it ends with an error and ``check`` is set.
        """
        return runToEnd(self.argv(name, argv), check, timeout, input, env)

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.DEVNULL,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        text: bool = True,
    ) -> subprocess.Popen[Any]:
        """Start a program in a namespace. It is ended by :meth:`close` at the latest."""
        process = subprocess.Popen(
            self.argv(name, argv), stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, text=text
        )
        self.processes.append(process)
        self._record()
        return process

    def stop(self, process: subprocess.Popen[Any], number: int = signal.SIGTERM, seconds: float = 5) -> int:
        """End a program that :meth:`spawn` started, by force after so many seconds. Gives its exit code."""
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        if process in self.processes:
            self.processes.remove(process)
        return process.returncode

    @contextmanager
    def open(self, name: str) -> Iterator[None]:
        """Sockets that this thread makes inside belong to that namespace, and stay there."""
        with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{self.namespace(name)}", "rb") as there:
            enter(there)
            try:
                yield
            finally:
                enter(home)

    def socketIn(self, name: str, family: int = socket.AF_INET, type: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket that lives in a namespace."""
        with self.open(name):
            return socket.socket(family, type)

    def connect(self, name: str, address: tuple[str, int], timeout: float = 5) -> socket.socket:
        """A TCP connection from a namespace."""
        it = self.socketIn(name, socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        it.settimeout(timeout)
        try:
            it.connect(address)
        except BaseException:
            it.close()
            raise
        return it

    def http(
        self,
        name: str,
        url: str,
        method: str = "GET",
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5,
    ) -> tuple[int, dict[str, str], bytes]:
        """
        One plain HTTP request from a namespace: status, headers (lower case), body.

        :raise OSError: (or :class:`http.client.HTTPException`).
        """
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.sock = self.connect(name, (host, port), timeout)
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(method, path, body, {"Connection": "close", **(headers or {})})
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def fail(self, name: str, match: str, verdict: str = "drop") -> None:
        """
        Let packets go wrong that arrive in a namespace: ``rig.fail("api", "tcp dport 6443")``, or every tenth one:
        ``rig.fail("n0", "numgen random mod 10 < 1")``. Adds to what is failing already.

        :param match: of an nft rule.
        :param verdict: such as ``reject with tcp reset``.
        """
        rules = f"""
        table inet kp-faults {{
          chain arriving {{ type filter hook prerouting priority -350; }}
        }}
        add rule inet kp-faults arriving {match} {verdict}
        """
        self.run(name, ["nft", "-f", "-"], input=rules)

    def heal(self, name: str) -> None:
        """End what :meth:`fail` has begun in a namespace."""
        self.run(name, ["nft", "delete", "table", "inet", "kp-faults"], check=False)

    def addPod(self, node: str, name: str) -> Host:
        """A further pod on a node."""
        ipEach([("", [f"netns add {self.namespace(name)}"])])
        self._namespaces.append(name)
        self._record()
        self._sysctl([name])
        pod, onNode, inPod = self._pod(node, name)
        ipEach([(self.namespace(node), onNode)])
        ipEach([(self.namespace(name), inPod)])
        return pod

    def close(self) -> None:
        """End every program, delete every namespace. May be called again."""
        if self._closed:
            return
        self._closed = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in list(self.processes):
            self.stop(process, 0, seconds=2)  # one signal is enough: a second one could hit it on its way out
        for name in self._namespaces:
            killInside(self.namespace(name))
        delete(self.namespace(name) for name in self._namespaces)
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.unlink(self._recordPath)

    # --- how it is built ---

    def _build(self) -> None:
        lan = [*((node, 2 + k) for k, node in enumerate(self.nodes)), *self.others]
        names = [*(name for name, _ in lan), *(pod for pod, _ in self.pods), *([self.switch] if self.switch else [])]
        self._namespaces = names
        ipEach([("", [f"netns add {self.namespace(name)}" for name in names])])
        self._sysctl(names)
        plan: dict[str, list[str]] = {name: [] for name in names}
        if self.switch:
            plan[self.switch] += ["link add lan0 type bridge mcast_snooping 0", "link set lan0 up"]
        for name, number in lan:
            self.hosts[name] = Host(name, f"192.0.2.{number}", f"2001:db8:2::{number}")
            if self.switch:
                peer = f"v{name}"
                plan[self.switch].append(f"link add {peer} type veth peer name eth0 netns {self.namespace(name)}")
                plan[self.switch].append(f"link set {peer} master lan0 up")
            plan[name] += self._host(self.hosts[name])
        if not self.switch:  # two hosts, face to face
            (first, _), (second, _) = lan
            veth = f"link add eth0 type veth peer name eth0 netns {self.namespace(second)}"
            plan[first].insert(0, veth)
        later: dict[str, list[str]] = {}
        for k, node in enumerate(self.nodes):
            plan[node] += self._node(k)
        for pod, node in self.pods:
            _, onNode, later[pod] = self._pod(node, pod)
            plan[node] += onNode
        if "x" in names:
            plan["x"] += [f"route add {SERVICES4} via 192.0.2.2", f"-6 route add {SERVICES6} via 2001:db8:2::2"]
        # What makes the cables comes first; the rest may run at the same time.
        first = self.switch or self.nodes[0]
        ipEach([(self.namespace(first), plan.pop(first))])
        ipEach([(self.namespace(name), lines) for name, lines in plan.items() if name not in later])
        ipEach([(self.namespace(name), lines) for name, lines in later.items()])

    @staticmethod
    def _host(host: Host) -> list[str]:
        return [
            "link set lo up",
            f"addr add {host.ip4}/24 dev eth0",
            f"addr add {host.ip6}/64 dev eth0",
            "link set eth0 up",
        ]

    def _node(self, k: int) -> list[str]:
        lines = [
            "link add cbr type bridge mcast_snooping 0",
            f"addr add 10.244.{k}.1/24 dev cbr",
            f"addr add fd00:10:244:{k}::1/64 dev cbr",
            "link set cbr up",
            "route add default via 192.0.2.5",
            "-6 route add default via 2001:db8:2::5",
        ]
        for other in range(len(self.nodes)):
            if other != k:
                lines.append(f"route add 10.244.{other}.0/24 via 192.0.2.{2 + other}")
                lines.append(f"-6 route add fd00:10:244:{other}::/64 via 2001:db8:2::{2 + other}")
        return lines

    def _pod(self, node: str, name: str) -> tuple[Host, list[str], list[str]]:
        """The pod, what is to be done in the node's namespace, and then in its own."""
        k, number = self.nodes.index(node), self._podNumbers.get(node, 10)
        self._podNumbers[node] = number + 1
        ip6 = str(ipaddress.ip_address(f"fd00:10:244:{k}::{number}"))
        pod = self.hosts[name] = Host(name, f"10.244.{k}.{number}", ip6, node)
        veth = f"v{name}"
        onNode = [
            f"link add {veth} type veth peer name eth0 netns {self.namespace(name)}",
            f"link set {veth} master cbr up",
            f"link set {veth} type bridge_slave hairpin on",
        ]
        inPod = [
            *self._host(pod),
            f"route add default via 10.244.{k}.1",
            f"-6 route add default via fd00:10:244:{k}::1",
        ]
        return pod, onNode, inPod

    def _sysctl(self, names: Sequence[str]) -> None:
        """Before there are interfaces: what is set as default then holds for all of them."""
        calls = []
        for name in names:
            settings = ["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"]
            settings += ["net.ipv6.conf.all.accept_ra=0", "net.ipv6.conf.default.accept_ra=0"]
            if name in self.nodes:
                settings += ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]
                settings += ["net.ipv6.conf.default.forwarding=1"]
                # Answers between pods of one node must pass the node's rules, though they are only bridged.
                for key in ("iptables", "ip6tables"):
                    if os.path.exists(f"/proc/sys/net/bridge/bridge-nf-call-{key}"):
                        settings.append(f"net.bridge.bridge-nf-call-{key}=1")
            elif name == self.switch:  # a piece of hardware: no rules there
                for key in ("iptables", "ip6tables"):
                    if os.path.exists(f"/proc/sys/net/bridge/bridge-nf-call-{key}"):
                        settings.append(f"net.bridge.bridge-nf-call-{key}=0")
            calls.append((self.argv(name, ["sysctl", "-qw", *settings]), ""))
        parallel(calls)

    # --- what an earlier run may have left ---

    @property
    def _recordPath(self) -> str:
        return os.path.join(RECORDS, f"{self.prefix}.json")

    def _record(self) -> None:
        os.makedirs(RECORDS, exist_ok=True)
        said = {
            "owner": identity(os.getpid()),
            "prefix": self.prefix,
            "folder": self.folder,
            "processes": [identity(process.pid) for process in self.processes if process.poll() is None],
        }
        with open(f"{self._recordPath}.new", "w", encoding="ascii") as file:
            json.dump(said, file)
        os.replace(f"{self._recordPath}.new", self._recordPath)


class Rig(Network):
    """Two nodes ``n0`` and ``n1``, pods ``p0a``, ``p0b`` and ``p1a``, the API server's host ``api``, outside ``x``."""

    nodes = ("n0", "n1")
    others = (("api", 4), ("x", 5))
    pods = (("p0a", "n0"), ("p0b", "n0"), ("p1a", "n1"))


class SmallRig(Network):
    """One node ``n0``, one pod ``p0a``, outside ``x``: quicker to build."""

    nodes = ("n0",)
    others = (("x", 5),)
    pods = (("p0a", "n0"),)
    switch = ""
