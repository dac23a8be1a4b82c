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
from .addresses import BadAddress, canonical, contains, everywhere, familyOf, joined, network, overlap
from .values import EVERYWHERE, FAMILIES, Family, Locality, Problem

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
    :ivar listeners: addresses and TCP ports where this proxy itself answers.
    """

    detectLocal: DetectLocal = "cluster-cidr"
    clusterCIDRs: tuple[str, ...] = ()
    podInterface: str = ""
    nodePortAddresses: tuple[str, ...] = ("all",)
    allowed: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    listeners: tuple[tuple[str, int], ...] = (("0.0.0.0", 10256), ("127.0.0.1", 10249))


#: as an empty configuration has it
NO_SETTINGS = NodeSettings()


def localityOf(
    settings: NodeSettings,
    node: wire.Node | None,
    addresses: Iterable[str] = (),
    services: Mapping[str, wire.ServiceCIDR] | None = None,
) -> tuple[Locality, list[Problem]]:
    """
    Put together what is known by now; what is not known yet is left out.

    :param addresses: the node's own, canonical: what ``primary`` means.
    :param services: the ServiceCIDR objects, by name.
    :return: that, and what of the objects is not followed.
    """
    links: tuple[str, ...] = ()
    insiders: tuple[str, ...] = ()
    if settings.detectLocal == "cluster-cidr":
        insiders = joined(settings.clusterCIDRs)
    elif settings.detectLocal == "node-cidr":
        insiders = joined(podNetworks(node))
    elif settings.podInterface:
        links = (settings.podInterface + ("*" if settings.detectLocal == "interface-prefix" else ""),)
    networks, problems = serviceNetworks(services or {}, insiders)
    locality = Locality(
        insiders=insiders,
        insiderLinks=links,
        nodePorts=_nodePorts(settings.nodePortAddresses, addresses),
        services=joined(networks),
    )
    return locality, problems


def takenPorts(settings: NodeSettings, locality: Locality) -> frozenset[int]:
    """The TCP ports where this proxy would no longer be reached by everybody, were they node ports."""
    return frozenset(port for host, port in settings.listeners if _servesNodePorts(host, locality.nodePorts))


def _servesNodePorts(host: str, networks: tuple[str, ...]) -> bool:
    if host == "::":  # a socket for IPv4 as well
        return bool(networks)
    if host == "0.0.0.0":
        return any(familyOf(it) == "IPv4" for it in networks)
    return contains(networks, host)


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


def serviceNetworks(
    objects: Mapping[str, wire.ServiceCIDR], pods: tuple[str, ...] = ()
) -> tuple[list[str], list[Problem]]:
    """
    The networks of all ServiceCIDR objects. What no Service has of these is dropped: so one that cannot be meant, since
    it holds everything or pods, is left out.

    :param pods: their networks, as far as they are known.
    :return: the networks, and what is wrong with others.
    """
    found: list[str] = []
    problems: list[Problem] = []
    for key, it in objects.items():
        for text in (it.spec.cidrs if it.spec else None) or ():
            try:
                cidr = network(text)[0]
            except BadAddress as error:
                problems.append(Problem("ServiceCIDR", key, f"{error}; it is left out"))
                continue
            overlapped = next((pod for pod in pods if overlap(pod, cidr)), None)
            if cidr in EVERYWHERE:
                problems.append(Problem("ServiceCIDR", key, f"{cidr} is every address there is; it is left out"))
            elif overlapped is not None:
                problems.append(Problem("ServiceCIDR", key, f"{cidr} overlaps {overlapped}, of pods; it is left out"))
            else:
                found.append(cidr)
    return found, problems


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
