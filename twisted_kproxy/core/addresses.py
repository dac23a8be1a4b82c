"""
Addresses as the API holds them: sloppy on the way in, canonical afterwards.

Kubernetes has always accepted leading zeros (``172.30.0.041`` is 172.30.0.41), and clusters carry such values
(kubernetes k8s.io/utils/net ``ParseIPSloppy``); :mod:`ipaddress` alone refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_network,
)

from .values import EVERYWHERE, Family

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
#: what most are, and what needs nothing done to it
_PLAIN = re.compile(rf"\A{_OCTET}(?:\.{_OCTET}){{3}}\Z")
#: as the first octet of an IPv4 address: nothing speaks against it
_ORDINARY = frozenset(str(octet) for octet in range(1, 224)) - {"127", "169"}
_DOTTED = re.compile(r"\A[0-9]{1,9}(?:\.[0-9]{1,9}){3}\Z")
_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")


class BadAddress(ValueError):
    """Not an address; the text says what was given."""


@lru_cache(maxsize=65536)
def canonical(text: str) -> tuple[str, Family]:
    """
    The canonical text of an address, and its family. An IPv4-mapped IPv6 address is IPv4, as Go has it.

    :raise BadAddress: with what was given.
    """
    if _PLAIN.match(text):
        return text, "IPv4"
    plain = text.strip()
    if _DOTTED.match(plain):
        plain = _ZEROS.sub("", plain)
    try:
        it = ip_address(plain)
    except ValueError:
        raise BadAddress(f"{text!r} is not an IP address") from None
    if isinstance(it, IPv6Address):
        if it.scope_id is not None:
            raise BadAddress(f"{text!r} has a zone, which means nothing on another node")
        if it.ipv4_mapped is None:
            return str(it), "IPv6"
        it = it.ipv4_mapped
    return str(it), "IPv4"


@lru_cache(maxsize=65536)
def unusable(text: str) -> str | None:
    """
    Why a canonical address can be neither endpoint nor frontend, ``None`` where it can. Traffic to these would stay
    on the node or go to everybody on the link (CVE-2021-25737).
    """
    if text.partition(".")[0] in _ORDINARY:
        return None
    it = ip_address(text)
    if it.is_unspecified:
        return "unspecified"
    if it.is_loopback:
        return "loopback"
    if it.is_link_local:
        return "link-local"
    if it.is_multicast:
        return "multicast"
    if text == "255.255.255.255":
        return "broadcast"
    return None


def network(text: str) -> tuple[str, Family]:
    """
    A CIDR in canonical text with host bits cleared, and its family.

    :raise BadAddress: with what was given.
    """
    address, slash, length = text.strip().partition("/")
    host, family = canonical(address)
    if not slash or not length.isdecimal():
        raise BadAddress(f"{text!r} is not a network such as 10.244.0.0/16 or fd00:10:244::/56")
    try:
        it: IPv4Network | IPv6Network = ip_network(f"{host}/{int(length)}", strict=False)
    except ValueError:
        raise BadAddress(f"{text!r} is not a network: the prefix is too long") from None
    return str(it), family


def joined(networks: Iterable[str]) -> tuple[str, ...]:
    """
    Canonical networks in the one form in which equal sets of addresses are equal: overlapping and adjacent ones
    joined, IPv4 first, sorted.
    """
    return collapsed(ip_network(text) for text in networks)


def collapsed(networks: Iterable[IPv4Network | IPv6Network]) -> tuple[str, ...]:
    """As :func:`joined`, of networks that were read before."""
    four: list[IPv4Network] = []
    six: list[IPv6Network] = []
    for it in networks:
        if isinstance(it, IPv4Network):
            four.append(it)
        else:
            six.append(it)
    return (*(str(it) for it in collapse_addresses(four)), *(str(it) for it in collapse_addresses(six)))


@lru_cache(maxsize=65536)
def contains(networks: tuple[str, ...], address: str) -> bool:
    """Whether a canonical address is in one of these networks."""
    it = ip_address(address)
    return any(it in ip_network(text) for text in networks)


def shortened(text: str, most: int = 300) -> str:
    """What somebody has written, where it is to be shown: as much of it as people read."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def overlap(one: str, other: str) -> bool:
    """Whether two canonical networks have addresses in common."""
    first, second = ip_network(one), ip_network(other)
    return first.version == second.version and first.overlaps(second)


def isMapped(text: str) -> bool:
    """Whether an address is written as IPv4 within IPv6 (``::ffff:10.0.0.1``)."""
    return ":" in text and canonical(text)[1] == "IPv4"


def familyOf(address: str) -> Family:
    """The family of a canonical address or network."""
    return "IPv6" if ":" in address else "IPv4"


def everywhere(family: Family) -> str:
    """The network of all addresses of a family."""
    return EVERYWHERE[family == "IPv6"]


def sortKey(address: str) -> tuple[int, IPv4Address | IPv6Address]:
    """Sorts canonical addresses by family, then by number."""
    it = ip_address(address)
    return it.version, it
