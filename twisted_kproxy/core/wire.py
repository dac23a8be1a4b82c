"""
API objects, only the fields that a service proxy reads, under their JSON names. Unknown fields are ignored; what the
API may leave out or send as ``null`` has a default here, and its meaning is decided in
:mod:`twisted_kproxy.core.resolve`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from .addresses import BadAddress, canonical, shortened
from .values import Kind
from .wording import fieldFault

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
#: kinds whose objects live in no namespace
CLUSTER_WIDE: tuple[Kind, ...] = ("Node", "ServiceCIDR")
SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
PROTOCOLS = ("TCP", "UDP", "SCTP")
ADDRESS_TYPES = ("IPv4", "IPv6", "FQDN")
CHANGE_TRIGGER_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
#: How deeply what nobody reads may be nested, at the least (more with other Pythons than 3.12): as deep as is safe in a
#: thread with 2 MiB of stack. Kubernetes' own reader stops at 10,000; no object of these kinds has twenty levels.
MAX_DEPTH = 1_400
#: a DNS subdomain (RFC 1123), as the names of all these kinds are; namespaces are even narrower
_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?\Z")


class ObjectMeta(Struct, frozen=True):
    name: str = ""
    namespace: str | None = None
    uid: str | None = None
    resourceVersion: str | None = None
    creationTimestamp: str | None = None
    deletionTimestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None

    def label(self, name: str) -> str | None:
        """The value of a label, ``None`` where it is not set."""
        return (self.labels or {}).get(name)


class ServicePortSpec(Struct, frozen=True):
    port: int
    name: str | None = None
    protocol: str | None = None
    nodePort: int | None = None


class ClientIPConfig(Struct, frozen=True):
    timeoutSeconds: int | None = None


class SessionAffinityConfig(Struct, frozen=True):
    clientIP: ClientIPConfig | None = None


class ServiceSpec(Struct, frozen=True):
    type: str | None = None
    clusterIP: str | None = None
    clusterIPs: list[str] | None = None
    ports: list[ServicePortSpec] | None = None
    externalIPs: list[str] | None = None
    sessionAffinity: str | None = None
    sessionAffinityConfig: SessionAffinityConfig | None = None
    externalTrafficPolicy: str | None = None
    internalTrafficPolicy: str | None = None
    healthCheckNodePort: int | None = None
    loadBalancerSourceRanges: list[str] | None = None


class LoadBalancerIngress(Struct, frozen=True):
    ip: str | None = None
    hostname: str | None = None
    ipMode: str | None = None


class LoadBalancerStatus(Struct, frozen=True):
    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(Struct, frozen=True):
    loadBalancer: LoadBalancerStatus | None = None


class Service(Struct, frozen=True):
    metadata: ObjectMeta
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class EndpointConditions(Struct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForNode(Struct, frozen=True):
    name: str = ""


class EndpointHints(Struct, frozen=True):
    forZones: list[ForNode] | None = None
    forNodes: list[ForNode] | None = None


# There are very many of these, and none is ever part of a cycle: garbage collection passes them over.
class SliceEndpoint(Struct, frozen=True, gc=False):
    addresses: list[str] | None = None
    conditions: EndpointConditions | None = None
    nodeName: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None
    topology: dict[str, str] | None = None  # discovery.k8s.io/v1beta1


class SlicePort(Struct, frozen=True):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class EndpointSlice(Struct, frozen=True):
    metadata: ObjectMeta
    addressType: str | None = None
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


class EndpointAddress(Struct, frozen=True):
    ip: str | None = None
    nodeName: str | None = None


class EndpointSubset(Struct, frozen=True):
    addresses: list[EndpointAddress] | None = None
    notReadyAddresses: list[EndpointAddress] | None = None
    ports: list[SlicePort] | None = None


class Endpoints(Struct, frozen=True):
    metadata: ObjectMeta
    subsets: list[EndpointSubset] | None = None


class Taint(Struct, frozen=True):
    key: str = ""
    effect: str | None = None


class NodeSpec(Struct, frozen=True):
    podCIDR: str | None = None
    podCIDRs: list[str] | None = None
    taints: list[Taint] | None = None


class NodeAddress(Struct, frozen=True):
    type: str = ""
    address: str = ""


class NodeStatus(Struct, frozen=True):
    addresses: list[NodeAddress] | None = None


class Node(Struct, frozen=True):
    metadata: ObjectMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class ServiceCIDRSpec(Struct, frozen=True):
    cidrs: list[str] | None = None


class ServiceCIDR(Struct, frozen=True):
    metadata: ObjectMeta
    spec: ServiceCIDRSpec | None = None


class ListMeta(Struct, frozen=True):
    resourceVersion: str | None = None
    continue_: str | None = msgspec.field(name="continue", default=None)
    remainingItemCount: int | None = None


class ListOf(Struct, frozen=True):
    """A list whose items are not decoded yet: one bad item must not cost the others."""

    kind: str | None = None
    metadata: ListMeta = ListMeta()
    items: list[Raw] | None = None


class Event(Struct, frozen=True):
    """One frame of a watch."""

    type: str
    object: Raw


class StatusCause(Struct, frozen=True):
    reason: str | None = None
    message: str | None = None


class StatusDetails(Struct, frozen=True):
    causes: list[StatusCause] | None = None
    retryAfterSeconds: int | None = None


class Status(Struct, frozen=True):
    """What the API server says instead of what was asked for."""

    status: str | None = None
    message: str | None = None
    reason: str | None = None
    code: int | None = None
    details: StatusDetails | None = None
    metadata: ListMeta | None = None


class OnlyMeta(Struct, frozen=True):
    """What every object has."""

    kind: str | None = None
    apiVersion: str | None = None
    metadata: ObjectMeta | None = None


class Identity(Struct, frozen=True):
    """Enough of its metadata to say which object it is, whatever else is wrong with it."""

    name: str = ""
    namespace: str | None = None


class OnlyIdentity(Struct, frozen=True):
    """Enough of an object to say which one it is."""

    metadata: Identity | None = None


TYPES: dict[Kind, type[Any]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Endpoints": Endpoints,
    "Node": Node,
    "ServiceCIDR": ServiceCIDR,
}
_Decoded = TypeVar("_Decoded")
_deep = Lock()


def deeply(decoder: msgspec.json.Decoder[_Decoded]) -> Callable[[bytes | Raw], _Decoded]:
    """
    The same decoder for JSON in which some field that nobody here reads may be nested deeply (:data:`MAX_DEPTH`):
    Python up to 3.11 counts that as calls of its own, and allows 1,000 of them.
    """
    decode = decoder.decode

    def decodeDeeply(data: bytes | Raw) -> _Decoded:
        try:
            return decode(data)
        except RecursionError:
            # The limit is one for all threads.
            with _deep:
                limit = sys.getrecursionlimit()
                sys.setrecursionlimit(limit + MAX_DEPTH)
                try:
                    return decode(data)
                finally:
                    sys.setrecursionlimit(limit)

    return decodeDeeply


def _decoder(type: type[_Decoded]) -> Callable[[bytes | Raw], _Decoded]:
    return deeply(msgspec.json.Decoder(type))


DECODERS: dict[Kind, Callable[[bytes | Raw], Any]] = {kind: _decoder(it) for kind, it in TYPES.items()}
decodeMeta = _decoder(OnlyMeta)
decodeIdentity = _decoder(OnlyIdentity)
decodeList = _decoder(ListOf)
decodeEvent = _decoder(Event)
decodeStatus = _decoder(Status)


class Unreadable(ValueError):
    """
    An object that cannot be read.

    :ivar key: which one, ``""`` where not even that can be told.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = shortened(reason)


def keyOf(meta: ObjectMeta | Identity) -> str:
    """``namespace/name``, or the name alone for what lives in no namespace."""
    return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name


def decode(kind: Kind, data: bytes | Raw) -> Any:
    """
    Decode one object of a kind.

    :raise Unreadable: with the object's key where that much can be read.
    """
    try:
        it = DECODERS[kind](data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(_keyIn(data), fieldFault(str(error))) from None
    return _checked(kind, it)


def convert(kind: Kind, data: Any) -> Any:
    """
    The same from plain Python values, such as a YAML parser gives.

    :raise Unreadable: with the object's key where that much can be read.
    """
    try:
        it = msgspec.convert(data, TYPES[kind])
    except (msgspec.ValidationError, RecursionError) as error:
        meta = data.get("metadata") if isinstance(data, dict) else None
        try:
            key = keyOf(msgspec.convert(meta, Identity))
        except (msgspec.ValidationError, RecursionError):
            key = ""
        raise Unreadable(key, fieldFault(str(error))) from None
    return _checked(kind, it)


def _fault(service: Service) -> str | None:
    """
    What makes a Service unfit to be served as a whole: the API server admits no such thing, so it is a mistake in a
    manifest or a broken object, and its last good version is the better guess.
    """
    spec = service.spec
    if spec is None:
        return "it has no spec"
    if spec.type not in (None, "", *SERVICE_TYPES):
        return f"type {spec.type!r} is none of {', '.join(SERVICE_TYPES)}"
    if spec.type == "ExternalName":
        return None
    for text in (spec.clusterIP, *(spec.clusterIPs or ())):
        if text not in (None, "", "None"):
            try:
                canonical(text)
            except BadAddress as error:
                return f"clusterIP: {error}"
    for port in spec.ports or ():
        if not 0 < port.port < 65536:
            return f"port {shortened(str(port.port), 20)} is not in 1 to 65535"
        if port.nodePort is not None and not 0 <= port.nodePort < 65536:
            return f"nodePort {shortened(str(port.nodePort), 20)} is not in 1 to 65535"
        if port.protocol not in (None, "", *PROTOCOLS):
            return f"protocol {port.protocol!r} is none of {', '.join(PROTOCOLS)}"
    return None


def _checked(kind: Kind, it: Any) -> Any:
    if not it.metadata.name:
        raise Unreadable("", "it has no metadata.name")
    if kind not in CLUSTER_WIDE and not it.metadata.namespace:
        raise Unreadable(it.metadata.name, "it has no metadata.namespace")
    for field, name in (("name", it.metadata.name), ("namespace", it.metadata.namespace)):
        if name and not _NAME.match(name):
            reason = f"metadata.{field} {name[:80]!r} is not made of small letters, digits, '-' and '.', at most 253"
            raise Unreadable(keyOf(it.metadata), reason)
    fault = _fault(it) if kind == "Service" else None
    if fault:
        raise Unreadable(keyOf(it.metadata), fault)
    return it


def _keyIn(data: bytes | Raw) -> str:
    try:
        meta = decodeIdentity(data).metadata
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return keyOf(meta) if meta else ""
