"""Short ways to write API objects in tests; each returns what a decoder would."""

from __future__ import annotations

from typing import Any

import msgspec

from twisted_kproxy.core import wire
from twisted_kproxy.core.values import Endpoint, Frontend, ServiceMap, ServicePort, ServicePortName


def service(
    name: str = "web",
    namespace: str = "shop",
    clusterIP: str | None = "10.96.0.10",
    ports: Any = None,
    uid: str = "u1",
    labels: dict[str, str] | None = None,
    created: str | None = None,
    ingress: Any = None,
    **spec: Any,
) -> wire.Service:
    """A Service with one TCP port 80 named http, unless said otherwise."""
    data: dict[str, Any] = {
        "metadata": {
            "name": name, "namespace": namespace, "uid": uid, "labels": labels, "creationTimestamp": created,
        },
        "spec": {
            "clusterIP": clusterIP,
            "ports": [{"name": "http", "port": 80}] if ports is None else ports,
            **spec,
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    return msgspec.convert(data, wire.Service)  # past the checks of a whole object: parts are judged one by one


def member(address: str, **fields: Any) -> dict[str, Any]:
    """One endpoint of a slice; ready, serving and terminating go into its conditions."""
    conditions = {key: fields.pop(key) for key in ("ready", "serving", "terminating") if key in fields}
    return {"addresses": [address], "conditions": conditions, **fields}


def slice_(
    *members: dict[str, Any],
    name: str = "web-1",
    of: str | None = "web",
    namespace: str = "shop",
    ports: Any = None,
    addressType: str = "IPv4",
    labels: dict[str, str] | None = None,
) -> wire.EndpointSlice:
    """An EndpointSlice of Service ``of`` with port http = 8080, unless said otherwise."""
    allLabels = dict(labels or {})
    if of is not None:
        allLabels[wire.SERVICE_NAME_LABEL] = of
    data = {
        "metadata": {"name": name, "namespace": namespace, "labels": allLabels},
        "addressType": addressType,
        "endpoints": list(members),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}] if ports is None else ports,
    }
    it: wire.EndpointSlice = wire.convert("EndpointSlice", data)
    return it


def node(name: str = "n0", zone: str | None = None, addresses: Any = (), **spec: Any) -> wire.Node:
    """A Node; addresses are internal ones, or ``(type, address)``."""
    data = {
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}},
        "spec": spec,
        "status": {
            "addresses": [
                {"type": it[0], "address": it[1]} if isinstance(it, tuple) else {"type": "InternalIP", "address": it}
                for it in addresses
            ]
        },
    }
    it: wire.Node = wire.convert("Node", data)
    return it


def serviceCIDR(*cidrs: str, name: str = "kubernetes") -> wire.ServiceCIDR:
    """A ServiceCIDR."""
    it: wire.ServiceCIDR = wire.convert("ServiceCIDR", {"metadata": {"name": name}, "spec": {"cidrs": list(cidrs)}})
    return it


def portName(service: str = "web", port: str = "http", protocol: Any = "TCP", family: Any = "IPv4") -> ServicePortName:
    """The name of a service port in namespace shop."""
    return ServicePortName("shop", service, port, protocol, family)


def servicePort(
    name: ServicePortName | None = None,
    cluster: Any = (),
    local: Any = (),
    frontends: Any = None,
    **fields: Any,
) -> ServicePort:
    """A service port; endpoints may be given as ``(address, port)``."""

    def endpoints(given: Any) -> tuple[Endpoint, ...]:
        return tuple(it if isinstance(it, Endpoint) else Endpoint(*it) for it in given)

    if frontends is None:
        frontends = (Frontend("ClusterIP", "10.96.0.10", 80),)
    fields.setdefault("uid", "u1")
    fields.setdefault("reachable", bool(cluster or local))
    return ServicePort(
        name or portName(), frontends=tuple(frontends), cluster=endpoints(cluster), local=endpoints(local), **fields
    )


def serviceMap(*ports: ServicePort) -> ServiceMap:
    """A map of these."""
    return ServiceMap({port.name: port for port in ports})
