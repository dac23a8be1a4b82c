"""From service ports to rules: pure functions, and the cache that makes an unchanged service port cost nothing."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from msgspec import Struct

from ..core.addresses import collapsed
from ..core.rules import Guard, Rule, Target, Verdict
from ..core.values import Family, FrontendKey, PoolKind, ServicePort, ServicePortName
from ..interfaces import KproxyError


class CannotRender(KproxyError):
    """A service port that the rule plane has no rules for; the text names it."""


class Invalid(ValueError):
    """A rule that cannot be written; the text names the object."""


def checkRule(key: FrontendKey, rule: Rule) -> None:
    """:raise Invalid: naming the frontend."""
    if key.address:
        _checkAddress(key.family, key.address, str(key))
    checkPort(key.port, str(key))
    for verdict in (rule.outside, rule.inside):
        if isinstance(verdict, Target):
            _checkAddress(key.family, verdict.address, f"{key} leads to {verdict.address!r}, which")
            checkPort(verdict.port, f"the target of {key}")
        elif verdict not in ("reject", "drop"):
            raise Invalid(f"{key} has an unknown verdict {verdict!r}")
    if rule.sources is not None and not key.address:
        raise Invalid(f"{key}: sources are for frontends with an address of their own")
    for source in rule.sources or ():
        if (":" in source) != (key.family == "IPv6"):
            raise Invalid(f"{key} is for sources of another family, {source!r}")


def _checkAddress(family: Family, address: str, what: str) -> None:
    af = socket.AF_INET if family == "IPv4" else socket.AF_INET6
    try:
        packed = socket.inet_pton(af, address)
    except (OSError, ValueError):
        raise Invalid(f"{what} is no {family} address") from None
    if not any(packed):
        raise Invalid(f"{what} is the unspecified address")
    if socket.inet_ntop(af, packed) != address:
        raise Invalid(f"{what} must be written {socket.inet_ntop(af, packed)!r}")


def checkPort(port: int, what: str) -> None:
    """:raise Invalid: for what is no port."""
    if not 0 < port < 65536:
        raise Invalid(f"{what}: {port} is no port")


#: What several service ports may need at a time: it goes when none of them does any more. A text is a ClusterIP.
Held: TypeAlias = Guard | str


class Fragment(Struct, frozen=True, gc=False):
    """
    What one service port adds to the ruleset.

    :ivar port: the service port that it was made from; the very object, so that a comparison with ``is`` tells
        whether the fragment is still good.
    :ivar held: what it needs beside its rules, and shares with other service ports: the guards of its sockets, and the
        ClusterIP that it is behind.
    """

    port: ServicePort
    rules: tuple[tuple[FrontendKey, Rule], ...]
    held: frozenset[Held]

    @property
    def guards(self) -> frozenset[Guard]:
        """Those of its sockets."""
        return frozenset(it for it in self.held if isinstance(it, Guard))


def canonicalNetworks(networks: Iterable[str]) -> tuple[str, ...]:
    """
    CIDRs in the one form in which equal sets of addresses are equal: host bits cleared, overlapping and adjacent
    ones joined, IPv4 first, sorted.

    :raise ValueError: naming what is no network.
    """
    return collapsed(ipaddress.ip_network(text.strip(), strict=False) for text in networks)


def verdict(port: ServicePort, kind: PoolKind) -> Verdict:
    """
    What a pool comes to. One that is empty refuses when no endpoint exists anywhere; when endpoints exist that this
    pool may not use, packets are dropped, so that the client tries again and elsewhere (as ``pkg/proxy`` of
    Kubernetes does under the Local policies).

    :raise CannotRender: where the pool is not just one socket of this node.
    """
    pool = port.pool(kind)
    if not pool:
        return "drop" if port.reachable else "reject"
    if len(pool) > 1 or not pool[0].isSocket:
        raise CannotRender(
            f"{port.name}: the {kind} pool has {len(pool)} endpoints, the first of which is {pool[0]}; rules can lead"
            " to one socket of this node only. Use mode = userspace"
        )
    return Target(pool[0].address, pool[0].port)


def fragment(port: ServicePort) -> Fragment:
    """
    The rules of one service port, and what else it needs.

    :raise CannotRender: see :func:`verdict`; and where an address or a port is none.
    """
    verdicts: dict[PoolKind, Verdict] = {kind: verdict(port, kind) for kind in port.poolKinds()}
    rules = tuple(
        (port.key(frontend), Rule(verdicts[frontend.pool], verdicts[frontend.insidePool], frontend.sources))
        for frontend in port.frontends
    )
    try:
        for key, rule in rules:
            checkRule(key, rule)
    except Invalid as error:
        raise CannotRender(f"{port.name}: {error}") from None
    guards = frozenset(
        Guard(port.name.family, port.name.protocol, endpoint.port)
        for kind in port.poolKinds()
        for endpoint in port.pool(kind)
        if endpoint.isSocket
    )
    addresses = {frontend.address for frontend in port.frontends if frontend.kind == "ClusterIP" and frontend.address}
    return Fragment(port, rules, guards | addresses)


class Fragments:
    """One fragment per service port, made once per object."""

    def __init__(self) -> None:
        self._fragments: dict[ServicePortName, Fragment] = {}
        self.made = 0  #: how many were rendered, ever

    def __len__(self) -> int:
        return len(self._fragments)

    def of(self, port: ServicePort) -> Fragment:
        """The fragment of a service port, rendered when it is not the object that was seen last under its name."""
        known = self._fragments.get(port.name)
        if known is None or known.port is not port:
            known = self._fragments[port.name] = fragment(port)
            self.made += 1
        return known

    def last(self, name: ServicePortName) -> Fragment | None:
        """What was rendered last under a name."""
        return self._fragments.get(name)

    def keepOnly(self, ports: Mapping[ServicePortName, ServicePort]) -> None:
        """Forget the names that are not among these."""
        if len(self._fragments) > len(ports):
            self._fragments = {name: it for name, it in self._fragments.items() if name in ports}
