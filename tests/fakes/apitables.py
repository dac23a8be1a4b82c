"""
Tables (``as=Table``), as kubectl prints them: the columns and cells of the real server's printers
(kubernetes pkg/printers/internalversion); and objects cut down to their metadata.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from msgspec import Struct

from .apikinds import Json, Kind

NONE, UNKNOWN, UNSET = "<none>", "<unknown>", "<unset>"
MAX_ENDPOINTS = 3  # listed in a cell; of the others only the number is given


class Column(Struct, frozen=True):
    """
    :ivar wide: whether it is shown with ``-o wide`` only.
    """

    name: str
    wide: bool = False
    type: str = "string"
    format: str = ""

    def definition(self) -> Json:
        head = {"name": self.name, "type": self.type, "format": self.format, "description": f"See {self.name}."}
        return {**head, "priority": int(self.wide)}


def humanDuration(seconds: float) -> str:
    """Go's ``duration.HumanDuration``: two units where that says more."""
    whole = int(seconds)
    if whole < -1:
        return "<invalid>"
    minutes, hours = whole // 60, whole // 3600
    days = hours // 24
    if whole < 120:
        return f"{max(0, whole)}s"
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if hours < 192:
        return _two(days, "d", hours % 24, "h")
    if days < 365 * 2:
        return f"{days}d"
    if days < 365 * 8:
        return _two(days // 365, "y", days % 365, "d")
    return f"{days // 365}y"


def _two(first: int, unit: str, second: int, lesser: str) -> str:
    return f"{first}{unit}{second}{lesser}" if second else f"{first}{unit}"


def _since(text: Any, now: datetime) -> str:
    try:
        then = calendar.timegm(time.strptime(str(text).split(".")[0].rstrip("Z"), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return UNKNOWN
    return humanDuration(now.timestamp() - then)


def _age(it: Json, now: datetime) -> str:
    return _since(it.get("metadata", {}).get("creationTimestamp"), now)


# --- the kinds ---


def _service(it: Json, now: datetime) -> list[Any]:
    spec = it.get("spec") or {}
    ports = []
    for port in spec.get("ports") or ():
        number = f"{port.get('port', 0)}:{port['nodePort']}" if port.get("nodePort") else str(port.get("port", 0))
        ports.append(f"{number}/{port.get('protocol', '')}")
    internal = (spec.get("clusterIPs") or [spec.get("clusterIP") or NONE])[0]
    selector = ",".join(f"{key}={value}" for key, value in sorted((spec.get("selector") or {}).items()))
    return [_name(it), spec.get("type", ""), internal, _externalIp(it), ",".join(ports) or NONE, _age(it, now),
            selector or NONE]  # fmt: skip


def _externalIp(it: Json) -> str:
    spec = it.get("spec") or {}
    type, external = spec.get("type"), spec.get("externalIPs") or []
    if type == "ExternalName":
        return spec.get("externalName") or NONE
    if type == "LoadBalancer":
        ingress = ((it.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
        found = {point.get("ip") or point.get("hostname") for point in ingress} - {None, ""}
        return ",".join([*sorted(found), *external]) or "<pending>"
    return ",".join(external) or NONE


def _slice(it: Json, now: datetime) -> list[Any]:
    ports = [str(port.get("port", "*")) if port.get("port") else "*" for port in it.get("ports") or ()]
    addresses = [address for endpoint in it.get("endpoints") or () for address in endpoint.get("addresses") or ()]
    return [_name(it), it.get("addressType", ""), _some(ports), _some(addresses), _age(it, now)]


def _some(texts: list[str]) -> str:
    if not texts:
        return UNSET
    more = len(texts) - MAX_ENDPOINTS
    return ",".join(texts[:MAX_ENDPOINTS]) + (f" + {more} more..." if more > 0 else "")


def _endpoints(it: Json, now: datetime) -> list[Any]:
    found = []
    for subset in it.get("subsets") or ():
        for address in subset.get("addresses") or ():
            ip = address.get("ip", "")
            host = f"[{ip}]" if ":" in ip else ip
            found += [f"{host}:{port.get('port')}" for port in subset.get("ports") or ()] or [host]
    text = _some(found)
    return [_name(it), NONE if text == UNSET else text, _age(it, now)]


def _node(it: Json, now: datetime) -> list[Any]:
    status, spec = it.get("status") or {}, it.get("spec") or {}
    ready = [one for one in status.get("conditions") or () if one.get("type") == "Ready"]
    words = ["Ready" if one.get("status") == "True" else "NotReady" for one in ready] or ["Unknown"]
    if spec.get("unschedulable"):
        words.append("SchedulingDisabled")
    labels = it.get("metadata", {}).get("labels") or {}
    roles = {key.partition("node-role.kubernetes.io/")[2] for key in labels if key.startswith("node-role.kub")} - {""}
    info = status.get("nodeInfo") or {}

    def address(type: str) -> str:
        return next((one["address"] for one in status.get("addresses") or () if one.get("type") == type), NONE)

    return [
        _name(it), ",".join(words), ",".join(sorted(roles)) or NONE, _age(it, now), info.get("kubeletVersion", ""),
        address("InternalIP"), address("ExternalIP"), info.get("osImage") or UNKNOWN,
        info.get("kernelVersion") or UNKNOWN, info.get("containerRuntimeVersion") or UNKNOWN,
    ]  # fmt: skip


def _namespace(it: Json, now: datetime) -> list[Any]:
    return [_name(it), (it.get("status") or {}).get("phase", ""), _age(it, now)]


def _event(it: Json, now: datetime) -> list[Any]:
    about = it.get("involvedObject") or it.get("regarding") or {}
    source = it.get("source") or it.get("deprecatedSource") or {}
    told = it.get("reportingComponent") or it.get("reportingController") or source.get("component", "")
    first = it.get("firstTimestamp") or it.get("deprecatedFirstTimestamp") or it.get("eventTime")
    last = it.get("lastTimestamp") or it.get("deprecatedLastTimestamp") or first
    subject = f"{about.get('kind', '').lower()}/{about.get('name', '')}"
    return [
        _since(last, now), it.get("type", ""), it.get("reason", ""), subject, about.get("fieldPath", ""),
        ", ".join(filter(None, (told, source.get("host", "")))), str(it.get("message") or it.get("note") or "").strip(),
        _since(first, now), it.get("count") or 1, _name(it),
    ]  # fmt: skip


def _serviceCidr(it: Json, now: datetime) -> list[Any]:
    return [_name(it), ",".join((it.get("spec") or {}).get("cidrs") or ()), _age(it, now)]


def _any(it: Json, now: datetime) -> list[Any]:
    return [_name(it), it.get("metadata", {}).get("creationTimestamp")]


def _name(it: Json) -> str:
    return str(it.get("metadata", {}).get("name", ""))


NAME, AGE = Column("Name", format="name"), Column("Age")


def _columns(names: str, wide: str = "") -> list[Column]:
    return [*(Column(it) for it in names.split()), *(Column(it, True) for it in wide.split())]


_SERVICE = [NAME, *_columns("Type Cluster-IP External-IP Port(s)"), AGE, Column("Selector", True)]
_SLICE = [NAME, *_columns("AddressType Ports Endpoints"), AGE]
_NODE = [
    NAME, *_columns("Status Roles"), AGE,
    *_columns("Version", "Internal-IP External-IP OS-Image Kernel-Version Container-Runtime"),
]  # fmt: skip
_EVENT = [
    Column("Last Seen"), *_columns("Type Reason Object", "Subobject Source"), Column("Message"),
    Column("First Seen", True), Column("Count", True, "integer", "int32"), Column("Name", True, format="name"),
]  # fmt: skip
_ANY = [NAME, Column("Created At", type="date")]
PRINTERS: dict[str, tuple[list[Column], Callable[[Json, datetime], list[Any]]]] = {
    "Service": (_SERVICE, _service),
    "EndpointSlice": (_SLICE, _slice),
    "Endpoints": ([NAME, Column("Endpoints"), AGE], _endpoints),
    "Node": (_NODE, _node),
    "Namespace": ([NAME, Column("Status"), AGE], _namespace),
    "Event": (_EVENT, _event),
    "ServiceCIDR": ([NAME, Column("CIDRs"), AGE], _serviceCidr),
}

# --- documents ---


def table(
    kind: Kind, items: Iterable[Json], metadata: Json, now: datetime, include: str = "", version: str = "v1",
    head: bool = True,
) -> Json:  # fmt: skip
    """
    :param include: what of each object goes with its row: ``Metadata`` (the default), ``Object``, ``None``.
    :param version: of meta.k8s.io, ``v1beta1`` for old clients.
    :param head: whether the columns are described; in a watch only the first event does.
    """
    columns, cells = PRINTERS.get(kind.kind, (_ANY, _any))
    rows = []
    for it in items:
        row: Json = {"cells": cells(it, now)}
        if include == "Object":
            row["object"] = {"kind": kind.kind, "apiVersion": kind.apiVersion, **it}
        elif include != "None":
            row["object"] = partial(it, version)
        rows.append(row)
    definitions = [column.definition() for column in columns] if head else None
    answer = {"kind": "Table", "apiVersion": f"meta.k8s.io/{version}", "metadata": metadata}
    return {**answer, "columnDefinitions": definitions, "rows": rows}


def partial(it: Json, version: str = "v1") -> Json:
    """An object's metadata and nothing else."""
    head = {"kind": "PartialObjectMetadata", "apiVersion": f"meta.k8s.io/{version}"}
    return {**head, "metadata": it.get("metadata", {})}


def partialList(items: Iterable[Json], metadata: Json, version: str = "v1") -> Json:
    """A list of such."""
    head = {"kind": "PartialObjectMetadataList", "apiVersion": f"meta.k8s.io/{version}", "metadata": metadata}
    return {**head, "items": [partial(it, version) for it in items]}
