"""
Who is measured: kproxy with each of its engines, and what else leads clients to endpoints. Each has namespaces: the
client's, the node's, the endpoint's. Clients of kproxy dial a ClusterIP, and its rules do the rest; the peers listen
on the node's address. The peers are on the node of the first kproxy, where connections are tracked as on every node of
Kubernetes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Literal

from tests.fakes.daemon import Daemon, Program
from tests.fakes.network import Network, waitFor

from .machine import family

#: What clients dial: HTTP, bulk, UDP.
Way = Literal["web", "bulk", "udp"]
WAYS: tuple[Way, ...] = ("web", "bulk", "udp")
CLUSTER_IP = "10.96.0.1"
SERVICE_PORTS: dict[Way, int] = {"web": 80, "bulk": 81, "udp": 53}
#: Ports of the endpoints: a pair for web, one of bulk and one of UDP for each that uses the same node.
WEB, BULK, UDP = 9000, 9100, 9200
MANY = 1000
_CONFIG = """
[kproxy]
node-name = n0
cluster-cidr = 10.244.0.0/16
[source:local]
type = files
path = {services}
[rules]
writer = nftables
[userspace]
drain-timeout = 0s
{options}
"""
_NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/{name}.pid;
error_log {folder}/{name}.err;
"""
_BACKEND = """
events {{ worker_connections 16000; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ {listen} location / {{ return 200 "ok\\n"; }} }}
}}
"""
_STREAM = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections 16000; }}
stream {{
  proxy_timeout 1h; proxy_half_close on; proxy_buffer_size {buffer};
  upstream web {{ server {pod}:{web}; server {pod}:{web2}; }}
  server {{ listen {node}:{port} backlog=4096; proxy_pass web; }}
  server {{ listen {node}:{bulkPort} backlog=4096; proxy_pass {pod}:{bulk}; }}
  server {{ listen {node}:{udpPort} udp; proxy_timeout 30s; proxy_pass {pod}:{udp}; }}
}}
"""
_HAPROXY = """
global
  nbthread {threads}
  maxconn 7000
defaults
  mode tcp
  backlog 4096
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  {options}
frontend web
  bind {node}:{port}
  default_backend web
backend web
  balance roundrobin
  server a {pod}:{web}
  server b {pod}:{web2}
frontend bulk
  bind {node}:{bulkPort}
  default_backend bulk
backend bulk
  server a {pod}:{bulk}
"""
_DNAT = """
table ip bench {{
  chain arriving {{
    type nat hook prerouting priority -100;
    ip daddr {ip} tcp dport 80 dnat to numgen inc mod 2 map {{ 0 : {pod} . {web}, 1 : {pod} . {web2} }}
    ip daddr {ip} tcp dport 81 dnat to {pod}:{bulk}
    ip daddr {ip} udp dport 53 dnat to {pod}:{udp}
  }}
}}
"""


class BenchRig(Network):
    """A client ``x``, a node ``n0``, a pod ``p0a`` in a row, with servers in the pod for a number of contestants."""

    nodes = ("n0",)
    others = (("x", 5),)
    pods = (("p0a", "n0"),)
    switch = ""

    def __init__(self, load: str, users: int) -> None:
        super().__init__()
        try:
            self.load = load
            self.users = 0
            self.run("x", ["ip", "route", "add", "10.244.0.0/24", "via", self.address("n0")])
            for name in ("x", "n0", "p0a"):
                # Below 10000 are listeners. Where ports are used again as fast as here, the tracking of what is over
                # must not get in the way, nor fill.
                settings = ["net.ipv4.ip_local_port_range=10000 60999", "net.ipv4.tcp_tw_reuse=1"]
                if name == "n0":
                    settings += [f"net.netfilter.nf_conntrack_tcp_timeout_{it}=5" for it in ("time_wait", "close")]
                self.run(name, ["sysctl", "-qw", *settings])
            listen = " ".join(f"listen {WEB + n} backlog=4096;" for n in range(2 * users))
            config = self.write("backend.conf", _NGINX + _BACKEND, name="backend", listen=listen)
            self.web = Program(self, "p0a", ["nginx", "-e", f"{self.folder}/e", "-c", config])
            self.bulk = Program(self, "p0a", [load, "serve", *(str(BULK + n) for n in range(users))])
            self.udp = Program(self, "p0a", [load, "echo", *(str(UDP + n) for n in range(users))])
            waitFor(lambda: self.http("x", f"http://{self.address('p0a')}:{WEB}/"), 10)
        except BaseException:
            self.close()
            raise

    def write(self, file: str, text: str, **values: Any) -> str:
        """A file of that text, filled in; gives its path."""
        path = os.path.join(self.folder, file)
        with open(path, "w", encoding="utf-8") as out:
            out.write(text.format(folder=self.folder, node=self.address("n0"), pod=self.address("p0a"), **values))
        return path

    def user(self) -> dict[str, int]:
        """Ports of the endpoints for one more contestant."""
        n, self.users = self.users, self.users + 1
        return {"web": WEB + 2 * n, "web2": WEB + 2 * n + 1, "bulk": BULK + n, "udp": UDP + n}


class Contestant:
    """
    One way from the client to the endpoints.

    :ivar pids: of the proxy; none where the kernel does it all.
    :ivar udp: whether it has UDP.
    """

    udp = True

    def __init__(self, name: str, rig: BenchRig) -> None:
        self.name = name
        self.rig = rig
        self.ports = rig.user()
        self.program: Program | None = None

    @property
    def pids(self) -> list[int]:
        return family(self.program.pid) if self.program is not None else []

    def target(self, way: Way) -> tuple[str, int]:
        """Whom clients dial."""
        return CLUSTER_IP, SERVICE_PORTS[way]

    def check(self) -> None:
        """:raise AssertionError: where it cannot be reached."""
        host, port = self.target("web")
        try:
            waitFor(lambda: self.rig.http("x", f"http://{host}:{port}/"), 20)
        except AssertionError as error:
            said = self.program.log() if self.program is not None else ""
            raise AssertionError(f"{self.name}: {error}\n{said}") from None


class Direct(Contestant):
    """No proxy, and no address to rewrite: the node only forwards."""

    def target(self, way: Way) -> tuple[str, int]:
        return self.rig.address("p0a"), self.ports[way]


class Dnat(Contestant):
    """The kernel rewrites addresses, the endpoint chosen by a counter."""

    def __init__(self, name: str, rig: BenchRig) -> None:
        super().__init__(name, rig)
        rig.run("n0", ["nft", "-f", rig.write("dnat.nft", _DNAT, ip=CLUSTER_IP, **self.ports)])


class Peer(Contestant):
    """A proxy that listens on the node's address."""

    def __init__(self, name: str, rig: BenchRig) -> None:
        super().__init__(name, rig)
        first = 8000 + 10 * rig.users
        self.listens: dict[Way, int] = dict(zip(WAYS, range(first, first + 3), strict=True))

    def target(self, way: Way) -> tuple[str, int]:
        return self.rig.address("n0"), self.listens[way]

    def _start(self, argv: Sequence[str], text: str, **values: Any) -> None:
        ports = {"port": self.listens["web"], "bulkPort": self.listens["bulk"], "udpPort": self.listens["udp"]}
        config = self.rig.write(f"{self.name.replace(' ', '-')}.conf", text, **self.ports, **ports, **values)
        self.program = Program(self.rig, "n0", [*argv, config])


class Haproxy(Peer):
    """HAProxy in TCP mode."""

    udp = False

    def __init__(self, name: str, rig: BenchRig, threads: int = 1, options: Sequence[str] = ()) -> None:
        super().__init__(name, rig)
        self._start(["haproxy", "-db", "-f"], _HAPROXY, threads=threads, options="\n  ".join(options))


class Nginx(Peer):
    """nginx's stream module, one worker."""

    def __init__(self, name: str, rig: BenchRig, buffer: str) -> None:
        super().__init__(name, rig)
        self._start(
            ["nginx", "-e", f"{rig.folder}/e", "-c"], _NGINX + _STREAM, buffer=buffer, name=name.replace(" ", "-")
        )


def _service(name: str, ip: str, port: int, protocol: str, pod: str, *targets: int) -> list[dict[str, Any]]:
    """A Service with one port, and a slice for each port of the pod that is behind it."""
    meta = {"namespace": "default", "labels": {"kubernetes.io/service-name": name}}
    ports = [{"name": "p", "port": port, "protocol": protocol}]
    found: list[dict[str, Any]] = [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "type": "ClusterIP", "ports": ports},
        }
    ]  # fmt: skip
    for n, target in enumerate(targets):
        found.append(
            {
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {**meta, "name": f"{name}-{n}"},
                "endpoints": [{"addresses": [pod], "conditions": {"ready": True}}],
                "ports": [{"name": "p", "port": target, "protocol": protocol}],
            }
        )  # fmt: skip
    return found


class Kproxy(Contestant):
    """
    The daemon itself, by twistd, its Services in a file, its rules by the nftables writer.

    :param options: of its section ``[userspace]``.
    :param further: Services beside those that are measured.
    """

    def __init__(self, name: str, rig: BenchRig, options: Sequence[str], further: int = 0) -> None:
        super().__init__(name, rig)
        pod, ports = rig.address("p0a"), self.ports
        items = _service("web", CLUSTER_IP, 80, "TCP", pod, ports["web"], ports["web2"])
        items += _service("bulk", CLUSTER_IP, 81, "TCP", pod, ports["bulk"])
        items += _service("udp", CLUSTER_IP, 53, "UDP", pod, ports["udp"])
        for n in range(further):
            items += _service(f"further-{n}", f"10.96.{1 + n // 250}.{1 + n % 250}", 80, "TCP", pod, ports["web"])
        services = os.path.join(rig.folder, "services.json")
        with open(services, "w", encoding="utf-8") as file:
            json.dump({"apiVersion": "v1", "kind": "List", "items": items}, file)
        config = _CONFIG.format(services=services, options="\n".join(options))
        self.program = Daemon(rig, "n0", config, waitFor=None)

    def check(self) -> None:
        assert isinstance(self.program, Daemon)
        self.program.waitUntil("http://127.0.0.1:10256/healthz", 30)
        super().check()


#: by name; further ones of kproxy have the Services of MANY beside
KPROXIES: dict[str, tuple[str, ...]] = {
    "kproxy python": ("engine = python",),
    "kproxy native": ("engine = native",),
    "kproxy thread": ("engine = native", "native-thread = yes"),
    "kproxy workers": ("engine = native", "workers = 2"),
    "kproxy protocol": ("engine = protocol",),
}
PEERS = ("direct", "dnat", "haproxy", "haproxy 2", "haproxy splice", "nginx 16k", "nginx 64k")
MANIES = ("kproxy python 1000", "kproxy native 1000")


def make(name: str, rig: BenchRig) -> Contestant:
    """The contestant of that name, begun."""
    match name.split():
        case ["direct"]:
            return Direct(name, rig)
        case ["dnat"]:
            return Dnat(name, rig)
        case ["haproxy"]:
            return Haproxy(name, rig)
        case ["haproxy", "2"]:
            return Haproxy(name, rig, threads=2)
        case ["haproxy", "splice"]:
            return Haproxy(name, rig, options=("option splice-request", "option splice-response"))
        case ["nginx", buffer]:
            return Nginx(name, rig, buffer)
    further = MANY if name in MANIES else 0
    return Kproxy(name, rig, KPROXIES[name.removesuffix(" 1000")], further)
