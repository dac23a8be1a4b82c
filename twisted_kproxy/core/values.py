"""
The values that flow through the proxy. All are frozen; what has not changed stays the *same object*, so that a
diff is a comparison with ``is`` and whatever was rendered from a value can be cached beside it.

A service port belongs to one IP family, and the family is part of its name: dual stack is two entries.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from msgspec import Struct

Family: TypeAlias = Literal["IPv4", "IPv6"]
Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
PoolKind: TypeAlias = Literal["cluster", "local"]
Kind: TypeAlias = Literal["Service", "EndpointSlice", "Endpoints", "Node", "ServiceCIDR"]
FrontendKind: TypeAlias = Literal["ClusterIP", "NodePort", "ExternalIP", "LoadBalancer"]

FAMILIES: tuple[Family, ...] = ("IPv4", "IPv6")
KINDS: tuple[Kind, ...] = ("Service", "EndpointSlice", "Endpoints", "Node", "ServiceCIDR")
#: every address of both families
EVERYWHERE: tuple[str, ...] = ("0.0.0.0/0", "::/0")
#: A service map is so many changes away from the whole one that it shares with others; then it becomes a whole one.
MOST_LAYERED = 512


def hostPort(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address, as in a URL (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ServicePortName(Struct, frozen=True, order=True, gc=False):
    """The identity of everything downstream of the API objects."""

    namespace: str
    service: str
    port: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        """``namespace/service:port/TCP/IPv4``; an unnamed port leaves nothing between colon and slash."""
        return f"{self.namespace}/{self.service}:{self.port}/{self.protocol}/{self.family}"


class PoolName(Struct, frozen=True, order=True, gc=False):
    """One of the two sets of endpoints of a service port: all of the cluster's, or this node's own."""

    port: ServicePortName
    kind: PoolKind

    def __str__(self) -> str:
        return f"{self.port}/{self.kind}"


class Endpoint(Struct, frozen=True, order=True, gc=False):
    """
    Where a connection may go.

    :ivar isLocal: it runs on this node.
    :ivar isSocket: it is a socket of this very proxy, put in the place of a pool by the userspace dataplane; the
        rule plane lets nothing reach it that did not come through a frontend.
    """

    address: str
    port: int
    isLocal: bool = False
    isSocket: bool = False

    def __str__(self) -> str:
        return hostPort(self.address, self.port)


class Frontend(Struct, frozen=True, order=True, gc=False):
    """
    One place that a client may dial.

    :ivar address: canonical text; ``None`` for a node port, which is every address of the node.
    :ivar pool: whom clients from outside reach.
    :ivar insidePool: whom pods and the node itself reach: external addresses are short-circuited for them.
    :ivar sources: networks whose packets are let in, canonical and sorted; those of all others are dropped, whether
        from inside or from outside. ``None`` for everybody.
    """

    kind: FrontendKind
    address: str | None
    port: int
    pool: PoolKind = "cluster"
    insidePool: PoolKind = "cluster"
    sources: tuple[str, ...] | None = None


class FrontendKey(Struct, frozen=True, order=True, gc=False):
    """
    What a frontend occupies on the wire. At any time one service port owns it.

    :ivar address: canonical text, or ``""`` for a node port.
    """

    family: Family
    protocol: Protocol
    address: str
    port: int

    def __str__(self) -> str:
        return f"{hostPort(self.address or 'node', self.port)}/{self.protocol}"


class ServicePort(Struct, frozen=True, gc=False):
    """
    The meaning of one service port on this node.

    :ivar uid: of the Service; another uid under the same name is another Service.
    :ivar frontends: in the order ClusterIP, external IPs, load balancer, node port. Only those that it owns.
    :ivar cluster: usable endpoints wherever they run, sorted, none twice.
    :ivar local: usable endpoints of this node, sorted, none twice.
    :ivar reachable: an endpoint exists somewhere. A frontend with an empty pool drops what it gets when it does
        (the client tries again, and elsewhere), and refuses it when it does not.
    :ivar affinitySeconds: ClientIP affinity's sliding time; 0 for none.
    :ivar healthCheckPort: where load balancers ask whether this node has endpoints of the Service; 0 where they do not,
        where another Service owns that port, and for all but the first of the Service's ports in a family, which has it
        for all of them.
    :ivar localReady: addresses of this node's endpoints that are ready: terminating ones never count. It is these that
        the answer on the health-check port counts.
    :ivar serving: ``address:port`` of every endpoint that still serves, in a pool or not: established UDP flows to
        these may live on.
    """

    name: ServicePortName
    uid: str
    frontends: tuple[Frontend, ...]
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    reachable: bool = False
    affinitySeconds: int = 0
    healthCheckPort: int = 0
    localReady: frozenset[str] = frozenset()
    serving: frozenset[str] = frozenset()

    def pool(self, kind: PoolKind) -> tuple[Endpoint, ...]:
        """The endpoints of a pool."""
        return self.local if kind == "local" else self.cluster

    def poolKinds(self) -> tuple[PoolKind, ...]:
        """The pools that some frontend leads to."""
        used = {f.pool for f in self.frontends} | {f.insidePool for f in self.frontends}
        kinds: tuple[PoolKind, ...] = ("cluster", "local")
        return tuple(kind for kind in kinds if kind in used)

    def key(self, frontend: Frontend) -> FrontendKey:
        """What that frontend of this service port occupies."""
        return FrontendKey(self.name.family, self.name.protocol, frontend.address or "", frontend.port)


class Locality(Struct, frozen=True):
    """
    Which addresses mean what on this node. All networks are canonical CIDRs of either family.

    :ivar insiders: the pod networks: who comes from there is inside, as is the node itself.
    :ivar insiderLinks: interfaces of pods: who comes in by one of these is inside. A name that ends with ``*`` stands
        for all that begin so.
    :ivar nodePorts: node ports are served at those addresses of the node that are in here.
    :ivar services: the networks of ClusterIPs: packets to an address in there that no Service has are dropped.
    """

    insiders: tuple[str, ...] = ()
    insiderLinks: tuple[str, ...] = ()
    nodePorts: tuple[str, ...] = EVERYWHERE
    services: tuple[str, ...] = ()


#: nothing is known: no pods, node ports everywhere
PLAIN = Locality()


class ServiceMap(Mapping[ServicePortName, ServicePort]):
    """
    All service ports of this node, immutable. One that is a :meth:`step` away from another shares with it what did not
    change: neither making it nor comparing the two takes longer where there are many service ports.

    :ivar generation: grows with each map that differs from the one before.
    :ivar locality: which addresses mean what here.
    """

    __slots__ = ("_base", "_length", "_over", "generation", "locality")

    def __init__(
        self,
        ports: Mapping[ServicePortName, ServicePort] | None = None,
        generation: int = 0,
        locality: Locality = PLAIN,
    ) -> None:
        self._base: dict[ServicePortName, ServicePort] = dict(ports or {})
        #: what is otherwise than in the base, ``None`` for what is not there; the base is shared, and never changes
        self._over: dict[ServicePortName, ServicePort | None] = {}
        self._length = len(self._base)
        self.generation = generation
        self.locality = locality

    def step(
        self, changes: Mapping[ServicePortName, ServicePort | None], generation: int, locality: Locality
    ) -> ServiceMap:
        """
        The map with these changes.

        :param changes: name → what it is now, ``None`` where it has gone.
        """
        over = {**self._over, **changes}
        for name, port in changes.items():
            if self._base.get(name) is port:
                del over[name]
        made = ServiceMap(None, generation, locality)
        made._base, made._over = self._base, over
        made._length = self._length + sum(
            (port is not None) - (name in self) for name, port in changes.items()
        )
        return made if len(over) <= MOST_LAYERED else ServiceMap(dict(made.items()), generation, locality)

    def since(self, previous: ServiceMap) -> tuple[frozenset[ServicePortName], frozenset[ServicePortName]]:
        """The names of those that are new or another object than before, and of those that are gone."""
        if self._base is previous._base:
            names = self._over.keys() | previous._over.keys()
            changed = frozenset(it for it in names if it in self and self[it] is not previous.get(it))
            return changed, frozenset(it for it in names if it not in self and it in previous)
        changed = frozenset(name for name, port in self.items() if previous.get(name) is not port)
        return changed, frozenset(name for name in previous if name not in self)

    def __getitem__(self, name: ServicePortName) -> ServicePort:
        port = self._over[name] if name in self._over else self._base[name]
        if port is None:
            raise KeyError(name)
        return port

    def __contains__(self, name: object) -> bool:
        return self._over[name] is not None if name in self._over else name in self._base

    def get(self, name: ServicePortName, default: Any = None) -> Any:
        port = self._over[name] if name in self._over else self._base.get(name)
        return default if port is None else port

    def __iter__(self) -> Iterator[ServicePortName]:
        if not self._over:
            return iter(self._base)
        return self._merged()

    def _merged(self) -> Iterator[ServicePortName]:
        yield from (name for name in self._base if name in self)
        yield from (name for name, port in self._over.items() if port is not None and name not in self._base)

    def items(self) -> ItemsView[ServicePortName, ServicePort]:
        return super().items() if self._over else self._base.items()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<ServiceMap {self.generation}: {len(self)} service ports>"


class Change(Struct, frozen=True):
    """
    One word of a source: an object was set, or removed (``object`` is ``None``).

    :ivar key: ``namespace/name``; just the name for a Node.
    :ivar object: one of :mod:`twisted_kproxy.core.wire`.
    """

    source: str
    kind: Kind
    key: str
    object: Any | None


class Replaced(Struct, frozen=True):
    """
    A whole list of a source: after a list, a relist or a reload. What is not in it is gone.

    :ivar rejected: key → reason, of objects that are there but cannot be read: their last good version stays.
    """

    source: str
    kind: Kind
    objects: Mapping[str, Any]
    rejected: Mapping[str, str] = {}


class Rejected(Struct, frozen=True):
    """An object that cannot be read. Its last good version stays in force; the reason is shown to operators."""

    source: str
    kind: Kind
    key: str
    reason: str


#: What a source says of objects.
Word: TypeAlias = Change | Replaced | Rejected


class Reached(Struct, frozen=True):
    """
    Where the server behind a source is reached: address and port of each. No Service may take these for itself (other
    than as its ClusterIP), since that would cut this node, and whoever else is led by it, off from the API.
    """

    source: str
    servers: frozenset[tuple[str, int]]


class Problem(Struct, frozen=True, order=True):
    """
    Something in an object that is not served, and why.

    :ivar key: ``namespace/name`` of the object.
    :ivar refused: whether it is an address that must not be reached.
    """

    kind: Kind
    key: str
    reason: str
    refused: bool = False


class Outcome(Struct, frozen=True):
    """
    How a relayed connection ended.

    :ivar reason: ``done`` (both sides finished), ``client-reset``, ``backend-reset``, ``client-timeout``,
        ``backend-timeout``, ``aborted`` (by this proxy). A UDP flow has no end of its own; it is given up as ``idle``,
        ``moved`` (its endpoint has left the pool), ``refused``, ``unreachable`` (the client is led elsewhere),
        ``evicted`` (its place was needed) or ``aborted``.
    :ivar sent: bytes from the client to the endpoint.
    :ivar received: bytes from the endpoint to the client.
    """

    reason: str
    sent: int
    received: int
