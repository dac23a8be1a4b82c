"""Which resources the fake API server knows; a further one is one line in :data:`KINDS`."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

Json = dict[str, Any]
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


class Kind(Struct, frozen=True, eq=False):
    """
    One resource.

    :ivar plural: its name in paths: ``services``.
    :ivar group: ``""`` for the core group.
    :ivar categories: words that stand for several resources: ``kubectl get all``.
    :ivar fields: what a field selector may name beside ``metadata.name`` and ``metadata.namespace``.
    :ivar bookmark: what a BOOKMARK object of it carries beside kind, apiVersion and metadata: Go writes out the empty
        values of fields that have no ``omitempty``.
    :ivar status: whether it has a ``/status``.
    :ivar returnsDeleted: whether DELETE answers with the object instead of a Status.
    """

    kind: str
    plural: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True
    shortNames: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    bookmark: Json = {}
    status: bool = False
    returnsDeleted: bool = False
    warning: str = ""

    @property
    def verbs(self) -> list[str]:
        """What can be done with it; Namespaces are deleted one by one."""
        return [verb for verb in VERBS if verb != "deletecollection" or self.plural != "namespaces"]

    @property
    def apiVersion(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


_NODE_INFO = (
    "machineID",
    "systemUUID",
    "bootID",
    "kernelVersion",
    "osImage",
    "containerRuntimeVersion",
    "kubeletVersion",
    "kubeProxyVersion",
    "operatingSystem",
    "architecture",
)
_NODE_STATUS = {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}, "nodeInfo": dict.fromkeys(_NODE_INFO, "")}

SERVICES = Kind(
    "Service",
    "services",
    shortNames=("svc",),
    categories=("all",),
    fields=("spec.clusterIP", "spec.type"),
    bookmark={"spec": {}, "status": {"loadBalancer": {}}},
    status=True,
    returnsDeleted=True,
)
SLICES = Kind(
    "EndpointSlice",
    "endpointslices",
    group="discovery.k8s.io",
    bookmark={"addressType": "", "endpoints": None, "ports": None},
)
ENDPOINTS = Kind(
    "Endpoints",
    "endpoints",
    shortNames=("ep",),
    warning="v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice",
)
NODES = Kind(
    "Node",
    "nodes",
    namespaced=False,
    shortNames=("no",),
    fields=("spec.unschedulable",),
    bookmark={"spec": {}, "status": _NODE_STATUS},
    status=True,
)
NAMESPACES = Kind(
    "Namespace",
    "namespaces",
    namespaced=False,
    shortNames=("ns",),
    fields=("status.phase",),
    bookmark={"spec": {}, "status": {}},
    status=True,
    returnsDeleted=True,
)
_REFERENCE = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
EVENTS = Kind(
    "Event",
    "events",
    shortNames=("ev",),
    fields=(*(f"involvedObject.{it}" for it in _REFERENCE), "reason", "reportingComponent", "type"),
)
EVENTS_V1 = Kind(
    "Event",
    "events",
    group="events.k8s.io",
    shortNames=("ev",),
    fields=(*(f"regarding.{it}" for it in _REFERENCE), "reason", "reportingController", "type"),
)

SERVICE_CIDRS = Kind(
    "ServiceCIDR",
    "servicecidrs",
    group="networking.k8s.io",
    namespaced=False,
    bookmark={"spec": {}, "status": {}},
    status=True,
)
SLICES_V1BETA1 = Kind("EndpointSlice", "endpointslices", "discovery.k8s.io", "v1beta1", bookmark=SLICES.bookmark)

KINDS = (SERVICES, SLICES, ENDPOINTS, NODES, NAMESPACES, EVENTS, EVENTS_V1, SERVICE_CIDRS)
KINDS_OF_1_20 = (SERVICES, SLICES_V1BETA1, ENDPOINTS, NODES, NAMESPACES, EVENTS)
