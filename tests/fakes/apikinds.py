"""
Which resources the fake API server knows, and the discovery documents that say so.

A further resource is one line in :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec import Struct

Json = dict[str, Any]
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class Kind(Struct, frozen=True, eq=False):
    """
    One resource.

    :ivar plural: its name in paths: ``services``.
    :ivar group: ``""`` for the core group.
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
    fields: tuple[str, ...] = ()
    bookmark: Json = {}
    status: bool = False
    returnsDeleted: bool = False
    warning: str = ""

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
    "Namespace", "namespaces", namespaced=False, shortNames=("ns",), bookmark={"spec": {}, "status": {}}, status=True
)
EVENTS = Kind("Event", "events", shortNames=("ev",))
EVENTS_V1 = Kind("Event", "events", group="events.k8s.io", shortNames=("ev",))

SLICES_V1BETA1 = Kind("EndpointSlice", "endpointslices", "discovery.k8s.io", "v1beta1", bookmark=SLICES.bookmark)

KINDS = (SERVICES, SLICES, ENDPOINTS, NODES, NAMESPACES, EVENTS, EVENTS_V1)
KINDS_OF_1_20 = (SERVICES, SLICES_V1BETA1, ENDPOINTS, NODES, NAMESPACES, EVENTS)


def apiVersions(address: str) -> Json:
    """``/api``."""
    where = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": where}


def apiGroup(group: str, kinds: Iterable[Kind], standalone: bool = True) -> Json | None:
    """``/apis/GROUP``, or its entry in ``/apis``; ``None`` where nothing of that group is served."""
    versions = list(dict.fromkeys(kind.version for kind in kinds if kind.group == group))
    if not versions or not group:
        return None
    entries = [{"groupVersion": f"{group}/{version}", "version": version} for version in versions]
    head = {"kind": "APIGroup", "apiVersion": "v1"} if standalone else {}
    return {**head, "name": group, "versions": entries, "preferredVersion": entries[0]}


def apiGroups(kinds: Iterable[Kind]) -> Json:
    """``/apis``."""
    kinds = tuple(kinds)
    groups = [apiGroup(group, kinds, standalone=False) for group in dict.fromkeys(it.group for it in kinds) if group]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def apiResources(group: str, version: str, kinds: Iterable[Kind]) -> Json | None:
    """``/api/v1`` or ``/apis/GROUP/VERSION``; ``None`` where nothing of it is served."""
    resources: list[Json] = []
    for kind in sorted(kinds, key=lambda it: it.plural):
        if (kind.group, kind.version) != (group, version):
            continue
        entry = {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": VERBS,
        }
        resources.append({**entry, "shortNames": list(kind.shortNames)} if kind.shortNames else entry)
        if kind.status:
            name = f"{kind.plural}/status"
            resources.append({**entry, "name": name, "singularName": "", "verbs": ["get", "patch", "update"]})
    if not resources:
        return None
    # The core group's list has no apiVersion: it predates the field.
    head = {"kind": "APIResourceList", "apiVersion": "v1"} if group else {"kind": "APIResourceList"}
    return {**head, "groupVersion": f"{group}/{version}" if group else version, "resources": resources}
