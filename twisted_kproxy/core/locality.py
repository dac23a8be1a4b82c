"""
Which addresses mean what on this node: from the configuration, the Node object and the ServiceCIDR objects.

The rules about pod networks are those of kubernetes ``cmd/kube-proxy/app/server_linux.go`` (``getLocalDetectors``),
those about node ports of ``pkg/proxy/util/nodeport_addresses.go``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from . import wire
from .addresses import BadAddress, canonical, everywhere, familyOf, joined, network
from .values import EVERYWHERE, FAMILIES, Family, Locality

DetectLocal: TypeAlias = Literal["cluster-cidr", "node-cidr", "bridge", "interface-prefix"]
LOCALHOST: dict[Family, str] = {"IPv4": "127.0.0.0/8", "IPv6": "::1/128"}


class NodeSettings(Struct, frozen=True):
    """
    What the configuration says about this node.

    :ivar detectLocal: how pods of this node are told from everybody else.
    :ivar clusterCIDRs: the pod networks, for ``cluster-cidr``.
    :ivar podInterface: the bridge of the pods, for ``bridge``; how their interfaces begin, for ``interface-prefix``.
    :ivar nodePortAddresses: CIDRs, and the words ``primary``, ``localhost`` and ``all``.
    :ivar allowed: networks that external IPs and addresses of load balancers must be in; none for no restriction.
    :ivar denied: networks that they must not be in.
    """

    detectLocal: DetectLocal = "cluster-cidr"
    clusterCIDRs: tuple[str, ...] = ()
    podInterface: str = ""
    nodePortAddresses: tuple[str, ...] = ("all",)
    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()


#: as an empty configuration has it
NO_SETTINGS = NodeSettings()


def localityOf(
    settings: NodeSettings,
    node: wire.Node | None,
    addresses: Iterable[str] = (),
    services: Iterable[str] = (),
) -> Locality:
    """
    Put together what is known by now; what is not known yet is left out.

    :param addresses: the node's own, canonical: what ``primary`` means.
    :param services: the networks of ClusterIPs.
    """
    links: tuple[str, ...] = ()
    insiders: tuple[str, ...] = ()
    if settings.detectLocal == "cluster-cidr":
        insiders = joined(settings.clusterCIDRs)
    elif settings.detectLocal == "node-cidr":
        insiders = joined(podNetworks(node))
    elif settings.podInterface:
        links = (settings.podInterface + ("*" if settings.detectLocal == "interface-prefix" else ""),)
    return Locality(
        insiders=insiders,
        insiderLinks=links,
        nodePorts=_nodePorts(settings.nodePortAddresses, addresses),
        services=joined(services),
    )


def addressesOf(node: wire.Node | None) -> frozenset[str]:
    """The node's own addresses, canonical, without those that cannot be read."""
    found: set[str] = set()
    status = node.status if node is not None else None
    for it in (status.addresses if status else None) or ():
        if it.type in ("InternalIP", "ExternalIP"):
            try:
                found.add(canonical(it.address)[0])
            except BadAddress:
                continue
    return frozenset(found)


def podNetworks(node: wire.Node | None) -> list[str]:
    """Its ``podCIDRs``, canonical, without those that cannot be read."""
    spec = node.spec if node is not None else None
    if spec is None:
        return []
    return _networks(spec.podCIDRs or ([spec.podCIDR] if spec.podCIDR else []))


def serviceNetworks(objects: Mapping[str, wire.ServiceCIDR]) -> list[str]:
    """The networks of all ServiceCIDR objects, without those that cannot be read."""
    return [text for it in objects.values() for text in _networks((it.spec.cidrs if it.spec else None) or ())]


def _networks(texts: Iterable[str]) -> list[str]:
    found = []
    for text in texts:
        try:
            found.append(network(text)[0])
        except BadAddress:
            continue
    return found


def _nodePorts(words: Iterable[str], addresses: Iterable[str]) -> tuple[str, ...]:
    """A family for which nothing is said at all means every address of it; a word says something of both."""
    found: list[str] = []
    said: set[Family] = set()
    for word in words:
        if word == "all":
            found += EVERYWHERE
            said.update(FAMILIES)
        elif word == "localhost":
            found += LOCALHOST.values()
            said.update(FAMILIES)
        elif word == "primary":
            found += [f"{it}/{128 if ':' in it else 32}" for it in addresses]
            said.update(FAMILIES)
        else:
            found.append(word)
            said.add(familyOf(word))
    found += [everywhere(family) for family in FAMILIES if family not in said]
    return joined(found)
