"""What of a ruleset cannot be written into chains of ip_tables."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from ipaddress import ip_network

from ..core.addresses import familyOf
from ..core.rules import Ruleset
from ..core.values import Locality
from .ruleset import Invalid, checkPort, checkRule
from .slices import Slices, finish

#: An interface: nothing that ends a word in what ``iptables-restore`` reads. Rules have room for 15 characters.
_LINK = re.compile(r"(?=[!-~]*\Z)[^/:*+\"'%!\\]{1,15}\*?")


def check(ruleset: Ruleset) -> None:
    """:func:`checking` at once."""
    finish(checking(ruleset))


def checking(ruleset: Ruleset) -> Slices[None]:
    """
    Judge a ruleset, in slices.

    :raise Invalid: naming what is wrong. What passes can be packed, and the kernel has no reason to refuse it.
    """
    checkLocality(ruleset.locality)
    for guard in ruleset.guards:
        checkPort(guard.port, f"guard {guard.protocol}")
    for address in ruleset.clusterIPs:
        _checkClusterIP(address)
    for key, rule in ruleset.rules.items():
        checkRule(key, rule)
        if rule.sources:
            _checkNetworks(rule.sources, f"the source range of {key},")
        yield


def checkLocality(locality: Locality) -> None:
    """:raise Invalid: for anything but networks in canonical form, and interfaces."""
    _checkNetworks(locality.insiders, "the pod network")
    _checkNetworks(locality.nodePorts, "the network of node ports")
    _checkNetworks(locality.services, "the network of ClusterIPs")
    for link in locality.insiderLinks:
        if not _LINK.fullmatch(link):
            raise Invalid(f"the pods' interface {link!r} is no interface, nor how one begins followed by *")


def _checkNetworks(networks: Iterable[str], what: str) -> None:
    for cidr in networks:
        try:
            canonical = str(ip_network(cidr))
        except ValueError as error:
            raise Invalid(f"{what} {cidr!r} is no network: {error}") from None
        if canonical != cidr:
            raise Invalid(f"{what} {cidr!r} must be written {canonical!r}")


def _checkClusterIP(address: str) -> None:
    af = socket.AF_INET6 if familyOf(address) == "IPv6" else socket.AF_INET
    try:
        packed = socket.inet_pton(af, address)
    except (OSError, ValueError):
        raise Invalid(f"the ClusterIP {address!r} is no address") from None
    if not any(packed):
        raise Invalid(f"the ClusterIP {address!r} is the unspecified address")
    if socket.inet_ntop(af, packed) != address:
        raise Invalid(f"the ClusterIP {address!r} must be written {socket.inet_ntop(af, packed)!r}")
