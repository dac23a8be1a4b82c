"""
How rows of the table are written: a function gets a :class:`Site` of one family, puts Services there, and says where
packets end. Addresses are those of :class:`tests.fakes.network.Rig`, so that the same rows can be tried there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from msgspec import Struct

Json = dict[str, Any]
Answer = frozenset[str] | Literal["reject", "drop", "untouched"]

NODE = "n0"
PORT = 8080
CLUSTER_CIDR = {"cluster-cidr": "10.244.0.0/16, fd00:10:244::/56"}
#: of the node's network, by family: the node itself, another node, somebody outside
LAN = {4: "192.0.2.{}", 6: "2001:db8:2::{}"}


class Flow(Struct, frozen=True):
    """
    Packets that open connections, and where they end.

    :ivar source: ``pod`` (of this node), ``other pod``, ``node``, ``outside``; or an address.
    :ivar expected: the endpoints that may answer, as ``address:port``; ``reject``; ``drop``; ``untouched``: no service
        address, it goes its way.
    :ivar masquerade: whether a dataplane that only rewrites addresses has to hide the source, so that answers come
        back the same way; ``None`` where the row says nothing about it. Where this proxy connects itself, an endpoint
        always sees the node.
    """

    source: str
    address: str
    port: int
    protocol: str
    expected: Answer
    masquerade: bool | None = None

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.source} to {host}:{self.port}/{self.protocol}"


class Row(Struct):
    """
    One rule of what a service proxy does.

    :ivar topic: the heading that it is under.
    :ivar rule: where the rule comes from.
    :ivar family: 4 or 6; 0 for what has none.
    :ivar servers: where API servers are reached.
    :ivar proofs: tests that show what packets cannot: ``LAYER.MODULE.test``.
    :ivar keys: what takes the place of a flag here: ``[section] key`` of the configuration.
    :ivar verdict: ``works``, ``differs`` or ``left out``; the last two with a reason, in ``why``.
    :ivar kernel: whether it is tried with the real kernel too.
    """

    name: str
    topic: str
    title: str
    rule: str
    family: int = 0
    objects: list[Json] = []
    settings: Mapping[str, str] = {}
    flows: list[Flow] = []
    servers: tuple[tuple[str, int], ...] = ()
    proofs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    verdict: Literal["works", "differs", "left out"] = "works"
    why: str = ""
    kernel: bool = False

    def __str__(self) -> str:
        return f"{self.name}/IPv{self.family}" if self.family else self.name


class Site:
    """One row in the making. Each has addresses and node ports that no other row has."""

    def __init__(self, row: Row, number: int) -> None:
        self.row = row
        self.family = row.family
        self.number = number
        self.IPv: Literal["IPv4", "IPv6"] = "IPv4" if self.family == 4 else "IPv6"

    # --- addresses

    def at(self, k: int) -> str:
        """One of eight service addresses."""
        number = 8 * self.number + k
        return f"10.96.{number >> 8}.{number & 255}" if self.family == 4 else f"fd00:10:96::{number:x}"

    @property
    def vip(self) -> str:
        """The ClusterIP of the row's Service, unless it says otherwise."""
        return self.at(0)

    @property
    def ext(self) -> str:
        """Its external IP."""
        return self.at(2)

    @property
    def lb(self) -> str:
        """Its load balancer's address."""
        return self.at(3)

    @property
    def nodePort(self) -> int:
        """A node port of this row; the three that follow are its own too."""
        return 30000 + 4 * self.number + 2000 * (self.family == 6)

    @property
    def node(self) -> str:
        """This node's address."""
        return LAN[self.family].format(2)

    @property
    def otherNode(self) -> str:
        return LAN[self.family].format(3)

    @property
    def outside(self) -> str:
        """The address of whoever is outside."""
        return LAN[self.family].format(5)

    @property
    def bridge(self) -> str:
        """The node's address on the bridge of its pods."""
        return "10.244.0.1" if self.family == 4 else "fd00:10:244::1"

    @property
    def loopback(self) -> str:
        return "127.0.0.1" if self.family == 4 else "::1"

    def width(self, address: str) -> str:
        """The network of that address alone."""
        return f"{address}/{32 if self.family == 4 else 128}"

    def pod(self, name: str) -> str:
        """The address of a pod: ``p0a`` is the first one of node n0."""
        node, number = int(name[1]), 10 + ord(name[2]) - ord("a")
        return f"10.244.{node}.{number}" if self.family == 4 else f"fd00:10:244:{node}::{number}".replace(":0::", "::")

    # --- objects

    def add(self, it: Json) -> Json:
        self.row.objects.append(it)
        return it

    def service(
        self,
        name: str = "",
        ports: Any = None,
        *,
        nodePort: int = 0,
        labels: Mapping[str, str] | None = None,
        created: str | None = None,
        ingress: Any = None,
        **spec: Any,
    ) -> Json:
        """A Service with TCP port 80 named http; of type NodePort or LoadBalancer where that follows."""
        ports = copy.deepcopy(ports) if ports else [{"name": "http", "port": 80, "protocol": "TCP"}]
        if nodePort:
            ports[0]["nodePort"] = nodePort
        kind = "LoadBalancer" if ingress is not None else "NodePort" if nodePort else "ClusterIP"
        spec = {
            "type": kind,
            "clusterIP": self.vip,
            "clusterIPs": [spec.get("clusterIP", self.vip)],
            "ipFamilies": [self.IPv],
            "ports": ports,
            **spec,
        }
        metadata: Json = {"name": name or self.name, "namespace": "default", "uid": f"uid-{name or self.name}"}
        if labels:
            metadata["labels"] = dict(labels)
        if created:
            metadata["creationTimestamp"] = created
        status: Json = {"loadBalancer": {"ingress": ingress} if ingress else {}}
        return self.add({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status})

    @property
    def name(self) -> str:
        """What the row's objects are called."""
        return f"{self.row.name}-{self.family}"

    def slice(
        self,
        *members: str | Json,
        of: str = "",
        ports: Any = None,
        suffix: str = "1",
        addressType: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> Json:
        """An EndpointSlice: pods by name, or endpoints that :meth:`member` makes."""
        name = of or self.name
        everything = {"kubernetes.io/service-name": name, **(labels or {})}
        return self.add(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": f"{name}-{suffix}", "namespace": "default", "labels": everything},
                "addressType": addressType or self.IPv,
                "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}] if ports is None else ports,
                "endpoints": [self.member(it) if isinstance(it, str) else it for it in members],
            }
        )

    def member(
        self, pod: str, *, address: str = "", nodes: Iterable[str] = (), zones: Iterable[str] = (), **conditions: Any
    ) -> Json:
        """One endpoint: ready unless the conditions say otherwise."""
        said: Json = {
            "addresses": [address or self.pod(pod)],
            "nodeName": f"n{pod[1]}",
            "conditions": {"ready": True, "serving": True, "terminating": False, **conditions},
        }
        hints: Json = {}
        if nodes:
            hints["forNodes"] = [{"name": it} for it in nodes]
        if zones:
            hints["forZones"] = [{"name": it} for it in zones]
        return {**said, "hints": hints} if hints else said

    def nodeObject(self, zone: str = "z0", **spec: Any) -> Json:
        """This node's object; without one in a row there is :func:`plainNode`."""
        return self.add(plainNode(zone, **spec))

    # --- packets

    def flow(
        self,
        source: str,
        address: str,
        port: int,
        expected: Answer | Iterable[str],
        masquerade: bool | None = None,
        protocol: str = "TCP",
    ) -> None:
        """
        :param expected: names of pods (their port is 8080 unless it is given: ``p0a:9090``), or a word.
        """
        if expected not in ("reject", "drop", "untouched"):
            expected = frozenset(self._endpoint(it) for it in expected)
        self.row.flows.append(Flow(source, address, port, protocol, expected, masquerade))  # type: ignore[arg-type]

    def flows(self, sources: str, address: str, port: int, expected: Any, **kw: Any) -> None:
        """The same from several, comma separated; ``*`` for everybody."""
        for source in EVERYBODY if sources == "*" else sources.split(", "):
            self.flow(source, address, port, expected, **kw)

    def _endpoint(self, text: str) -> str:
        name, _, port = text.partition(":")
        address = self.pod(name)
        return f"{f'[{address}]' if ':' in address else address}:{port or PORT}"


#: Whom packets come from.
EVERYBODY = ("pod", "other pod", "node", "outside")


def plainNode(zone: str = "z0", **spec: Any) -> Json:
    """The object of this node."""
    addresses = [{"type": "InternalIP", "address": LAN[family].format(2)} for family in (4, 6)]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": zone, "kubernetes.io/hostname": NODE}},
        "spec": spec,
        "status": {"addresses": [*addresses, {"type": "Hostname", "address": NODE}]},
    }


def port(name: str, number: int, protocol: str = "TCP", **more: Any) -> dict[str, Any]:
    """One entry of ``spec.ports``, or of a slice's ports."""
    return {"name": name, "port": number, "protocol": protocol, **more}


#: A port for UDP of a Service, and of its slices.
UDP = [port("dns", 53, "UDP")]
UDP_SLICE = [port("dns", PORT, "UDP")]


class Table:
    """
    Rows in the order in which they are written.

    :ivar topic: what the next rows are about.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self._made: list[tuple[Row, Callable[[Site], None] | None]] = []

    def case(
        self,
        name: str,
        title: str,
        rule: str,
        *,
        settings: Mapping[str, str] = CLUSTER_CIDR,
        kernel: bool = False,
        families: Iterable[int] = (4, 6),
        why: str = "",
        proofs: Iterable[str] = (),
    ) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
        """
        The function that follows makes the row, once for each family.

        :param why: in which way it differs from what others do; ``""`` where it does not.
        """

        def taken(make: Callable[[Site], None]) -> Callable[[Site], None]:
            for family in families:
                verdict: Literal["works", "differs"] = "differs" if why else "works"
                row = Row(
                    name,
                    self.topic,
                    title,
                    rule,
                    family,
                    settings=settings,
                    proofs=tuple(proofs),
                    verdict=verdict,
                    why=why,
                    kernel=kernel,
                )
                self._made.append((row, make))
            return make

        return taken

    def shown(self, name: str, title: str, rule: str, *proofs: str, why: str = "") -> None:
        """What is no packet: tests prove it."""
        row = Row(name, self.topic, title, rule, proofs=proofs, verdict="differs" if why else "works", why=why)
        self._made.append((row, None))

    def flag(self, flags: str, *keys: str, why: str = "") -> None:
        """Flags of kube-proxy, without their dashes, and the keys of the configuration that say the same here."""
        title = ", ".join(f"``--{it}``" for it in flags.split())
        verdict: Literal["works", "differs"] = "differs" if why else "works"
        row = Row(f"flag-{flags.split()[0]}", self.topic, title, "", keys=keys, verdict=verdict, why=why)
        self._made.append((row, None))

    def leftOut(self, name: str, title: str, rule: str, why: str) -> None:
        """What this proxy does not do, and why."""
        self._made.append((Row(name, self.topic, title, rule, verdict="left out", why=why), None))

    def rows(self, first: int) -> list[Row]:
        """All of them, made; the first one has that number."""
        found = []
        numbers: dict[str, int] = {}
        for row, make in self._made:
            fresh = copy.deepcopy(row)
            number = numbers.setdefault(row.name, first + len(numbers))
            if make is not None:
                make(Site(fresh, number))
            found.append(fresh)
        return found
