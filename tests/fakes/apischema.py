"""
What fields the objects of the fake API server have: one table for each kind.

From these tables come the OpenAPI documents, how patches merge lists, which fields of a request are unknown or of the
wrong type, and which empty values Go would leave out. They hold every field of Service, EndpointSlice, Endpoints,
Namespace, Event and ServiceCIDR, and of a Node those that its printing and the proxy look at. A kind without a table
takes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from .apikinds import Json, Kind

CORE, META = "io.k8s.api.core.v1.", "io.k8s.apimachinery.pkg.apis.meta.v1."


class Field(Struct, frozen=True, eq=False):
    """
    One field, or what is in a list or a map.

    :ivar type: ``string``, ``integer``, ``boolean``, ``intOrString``, ``object``, ``array``, ``map``, ``any``.
    :ivar omit: Go leaves it out where it is empty.
    :ivar name: of an object's type, as OpenAPI calls it.
    :ivar fields: of an object.
    :ivar item: of an array or a map.
    :ivar mergeKey: by which a strategic merge patch finds an item; ``""`` where lists are replaced as a whole.
    :ivar listKeys: by which server-side apply does. For the ports of a Service that is port and protocol, while a
        strategic merge patch knows them by port alone: two ports of one number confuse it, there as here
        (https://github.com/kubernetes/kubernetes/issues/39188).
    :ivar merged: lists of plain values of which a strategic merge patch makes the union.
    :ivar required: names of fields that must be there.
    """

    type: str
    omit: bool = True
    name: str = ""
    fields: dict[str, Field] = {}
    item: Field | None = None
    mergeKey: str = ""
    listKeys: tuple[str, ...] = ()
    merged: bool = False
    required: tuple[str, ...] = ()


STRING, INTEGER, BOOLEAN = Field("string"), Field("integer"), Field("boolean")
# In Go pointers, or fields without omitempty: empty values of them are written.
SET_STRING, SET_INTEGER, SET_BOOLEAN = Field("string", False), Field("integer", False), Field("boolean", False)
INT_OR_STRING, TIME, ANY = Field("intOrString", False), Field("time", False), Field("any", False)


def of(name: str, required: str = "", /, **fields: Field) -> Field:
    """An object of that type."""
    return Field("object", False, name, fields, required=tuple(required.split()))


def array(item: Field, keys: str = "", mergeKey: str = "", merged: bool = False, omit: bool = True) -> Field:
    listKeys = tuple(keys.split())
    return Field("array", omit, item=item, mergeKey=mergeKey, listKeys=listKeys, merged=merged)


def mapOf(item: Field) -> Field:
    return Field("map", item=item)


STRINGS, LABELS = array(STRING), mapOf(STRING)
OWNER = of(
    META + "OwnerReference", "apiVersion kind name uid", apiVersion=SET_STRING, kind=SET_STRING, name=SET_STRING,
    uid=SET_STRING, controller=SET_BOOLEAN, blockOwnerDeletion=SET_BOOLEAN,
)  # fmt: skip
METADATA = of(
    META + "ObjectMeta", name=STRING, generateName=STRING, namespace=STRING, selfLink=STRING, uid=STRING,
    resourceVersion=STRING, generation=INTEGER, creationTimestamp=TIME, deletionTimestamp=TIME,
    deletionGracePeriodSeconds=SET_INTEGER, labels=LABELS, annotations=LABELS,
    ownerReferences=array(OWNER, "uid", "uid"), finalizers=array(STRING, merged=True), managedFields=ANY,
)  # fmt: skip
CONDITION = of(
    META + "Condition", "type status lastTransitionTime reason message", type=SET_STRING, status=SET_STRING,
    observedGeneration=INTEGER, lastTransitionTime=TIME, reason=SET_STRING, message=SET_STRING,
)  # fmt: skip
REFERENCE = of(
    CORE + "ObjectReference", kind=STRING, namespace=STRING, name=STRING, uid=STRING, apiVersion=STRING,
    resourceVersion=STRING, fieldPath=STRING,
)  # fmt: skip


def top(name: str, required: str = "", /, **fields: Field) -> Field:
    return of(name, required, apiVersion=STRING, kind=STRING, metadata=METADATA, **fields)


SERVICE_PORT = of(
    CORE + "ServicePort", "port", name=STRING, protocol=STRING, appProtocol=SET_STRING, port=SET_INTEGER,
    targetPort=INT_OR_STRING, nodePort=INTEGER,
)  # fmt: skip
INGRESS = of(
    CORE + "LoadBalancerIngress", ip=STRING, hostname=STRING, ipMode=SET_STRING,
    ports=array(of(CORE + "PortStatus", "port protocol", port=SET_INTEGER, protocol=SET_STRING, error=SET_STRING)),
)  # fmt: skip
CLIENT_IP = of(CORE + "ClientIPConfig", timeoutSeconds=SET_INTEGER)
SERVICE = top(
    CORE + "Service",
    spec=of(
        CORE + "ServiceSpec", ports=array(SERVICE_PORT, "port protocol", "port"), selector=LABELS, clusterIP=STRING,
        clusterIPs=STRINGS, type=STRING, externalIPs=STRINGS, sessionAffinity=STRING, loadBalancerIP=STRING,
        loadBalancerSourceRanges=STRINGS, externalName=STRING, externalTrafficPolicy=STRING,
        healthCheckNodePort=INTEGER, publishNotReadyAddresses=BOOLEAN,
        sessionAffinityConfig=of(CORE + "SessionAffinityConfig", clientIP=CLIENT_IP), ipFamilies=STRINGS,
        ipFamilyPolicy=SET_STRING, allocateLoadBalancerNodePorts=SET_BOOLEAN, loadBalancerClass=SET_STRING,
        internalTrafficPolicy=SET_STRING, trafficDistribution=SET_STRING,
    ),
    status=of(
        CORE + "ServiceStatus", loadBalancer=of(CORE + "LoadBalancerStatus", ingress=array(INGRESS)),
        conditions=array(CONDITION, "type", "type"),
    ),
)  # fmt: skip


def slices(version: str, /, **fields: Field) -> Field:
    name = f"io.k8s.api.discovery.{version}."
    zones = array(of(name + "ForZone", "name", name=SET_STRING))
    nodes = array(of(name + "ForNode", "name", name=SET_STRING))
    endpoint = of(
        name + "Endpoint", "addresses", addresses=array(STRING, omit=False),
        conditions=of(name + "EndpointConditions", ready=SET_BOOLEAN, serving=SET_BOOLEAN, terminating=SET_BOOLEAN),
        hostname=SET_STRING, targetRef=REFERENCE, nodeName=SET_STRING,
        hints=of(name + "EndpointHints", forZones=zones, forNodes=nodes), **fields,
    )  # fmt: skip
    port = of(name + "EndpointPort", name=SET_STRING, protocol=SET_STRING, port=SET_INTEGER, appProtocol=SET_STRING)
    return top(
        name + "EndpointSlice", "addressType endpoints", addressType=SET_STRING,
        endpoints=array(endpoint, omit=False), ports=array(port, omit=False),
    )  # fmt: skip


SUBSET_ADDRESS = of(
    CORE + "EndpointAddress", "ip", ip=SET_STRING, hostname=STRING, nodeName=SET_STRING, targetRef=REFERENCE
)
SUBSET_PORT = of(
    CORE + "EndpointPort", "port", name=STRING, port=SET_INTEGER, protocol=STRING, appProtocol=SET_STRING
)  # fmt: skip
ENDPOINTS = top(
    CORE + "Endpoints",
    subsets=array(
        of(CORE + "EndpointSubset", addresses=array(SUBSET_ADDRESS), notReadyAddresses=array(SUBSET_ADDRESS),
           ports=array(SUBSET_PORT))
    ),
)  # fmt: skip
NAMESPACE = top(
    CORE + "Namespace",
    spec=of(CORE + "NamespaceSpec", finalizers=STRINGS),
    status=of(CORE + "NamespaceStatus", phase=STRING, conditions=array(ANY, "type", "type")),
)
NODE = top(
    CORE + "Node",
    spec=of(
        CORE + "NodeSpec", podCIDR=STRING, podCIDRs=array(STRING, merged=True), providerID=STRING,
        unschedulable=BOOLEAN, taints=ANY, configSource=ANY, externalID=STRING,
    ),
    status=of(
        CORE + "NodeStatus", capacity=mapOf(ANY), allocatable=mapOf(ANY), phase=STRING,
        conditions=array(ANY, "type", "type"),
        addresses=array(of(CORE + "NodeAddress", "type address", type=SET_STRING, address=SET_STRING), "type", "type"),
        daemonEndpoints=ANY, nodeInfo=ANY, images=ANY, volumesInUse=ANY, volumesAttached=ANY, config=ANY,
        runtimeHandlers=ANY, features=ANY, declaredFeatures=ANY,
    ),
)  # fmt: skip
SOURCE = of(CORE + "EventSource", component=STRING, host=STRING)
EVENT = top(
    CORE + "Event", "metadata involvedObject", involvedObject=REFERENCE, reason=STRING, message=STRING, source=SOURCE,
    firstTimestamp=TIME, lastTimestamp=TIME, count=INTEGER, type=STRING, eventTime=TIME, series=ANY, action=STRING,
    related=REFERENCE, reportingComponent=SET_STRING, reportingInstance=SET_STRING,
)  # fmt: skip
EVENT_V1 = top(
    "io.k8s.api.events.v1.Event", "eventTime", eventTime=TIME, series=ANY, reportingController=STRING,
    reportingInstance=STRING, action=STRING, reason=STRING, regarding=REFERENCE, related=REFERENCE, note=STRING,
    type=STRING, deprecatedSource=SOURCE, deprecatedFirstTimestamp=TIME, deprecatedLastTimestamp=TIME,
    deprecatedCount=INTEGER,
)  # fmt: skip
SERVICE_CIDR = top(
    "io.k8s.api.networking.v1.ServiceCIDR",
    spec=of("io.k8s.api.networking.v1.ServiceCIDRSpec", cidrs=STRINGS),
    status=of("io.k8s.api.networking.v1.ServiceCIDRStatus", conditions=array(CONDITION, "type", "type")),
)

SCHEMAS = {
    ("v1", "Service"): SERVICE,
    ("discovery.k8s.io/v1", "EndpointSlice"): slices("v1", zone=SET_STRING, deprecatedTopology=LABELS),
    ("discovery.k8s.io/v1beta1", "EndpointSlice"): slices("v1beta1", topology=LABELS),
    ("v1", "Endpoints"): ENDPOINTS,
    ("v1", "Namespace"): NAMESPACE,
    ("v1", "Node"): NODE,
    ("v1", "Event"): EVENT,
    ("events.k8s.io/v1", "Event"): EVENT_V1,
    ("networking.k8s.io/v1", "ServiceCIDR"): SERVICE_CIDR,
}
_GO = {"integer": "int32", "boolean": "bool", "string": "string", "intOrString": "intstr.IntOrString"}


def schemaOf(kind: Kind) -> Field | None:
    return SCHEMAS.get((kind.apiVersion, kind.kind))


class Misfit(ValueError):
    """A value of the wrong type, in Go's words."""


def conform(schema: Field, it: Json) -> tuple[Json, list[str]]:
    """
    The object as Go would read and write it: without fields that it does not know, without null and without empty
    values that it leaves out.

    :return: that, and the paths of unknown fields.
    :raise Misfit: for a value of another type than the field's.
    """
    unknown: list[str] = []
    return _object(schema, it, "", unknown), unknown


def _object(schema: Field, it: Any, path: str, unknown: list[str]) -> Json:
    known: Json = {}
    for name, value in it.items():
        where = f"{path}.{name}" if path else name
        field = schema.fields.get(name)
        if field is None:
            unknown.append(where)
        elif value is not None:
            read = _value(field, value, where, schema, unknown)
            if not (field.omit and read in ("", 0, False, [], {})):
                known[name] = read
    return known


def _value(field: Field, value: Any, path: str, owner: Field, unknown: list[str]) -> Any:
    expected = {"object": dict, "map": dict, "array": list, "boolean": bool, "integer": int, "string": str}
    wanted = expected.get(field.type)
    if wanted is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        raise _misfit(field, value, path, owner)
    if field.type == "object":
        return _object(field, value, path, unknown)
    if field.type == "array":
        assert field.item is not None
        return [_value(field.item, it, f"{path}[{at}]", owner, unknown) for at, it in enumerate(value)]
    if field.type == "map":
        assert field.item is not None
        return {name: _value(field.item, it, f"{path}.{name}", owner, unknown) for name, it in value.items()}
    if field.type == "intOrString" and (not isinstance(value, int | str) or isinstance(value, bool)):
        raise _misfit(field, value, path, owner)
    return value


def _misfit(field: Field, value: Any, path: str, owner: Field) -> Misfit:
    kinds = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    where = ".".join(part.partition("[")[0] for part in path.split("."))
    struct, given = owner.name.rpartition(".")[2], kinds.get(type(value), "value")
    return Misfit(f"json: cannot unmarshal {given} into Go struct field {struct}.{where} of type {_goType(field)}")


def _goType(field: Field) -> str:
    if field.item is not None:
        return f"{'[]' if field.type == 'array' else 'map[string]'}{_goType(field.item)}"
    return _GO.get(field.type) or "v1." + field.name.rpartition(".")[2]


def named(schema: Field) -> Iterator[Field]:
    """Every object type in it, itself included."""
    if schema.type == "object":
        yield schema
    for field in schema.fields.values():
        yield from named(field)
    if schema.item is not None:
        yield from named(schema.item)
