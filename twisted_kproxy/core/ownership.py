"""
Who owns a frontend that several Services claim.

One rule, the same on every node: the oldest Service wins, then the first by namespace and name, then by port name.
The others wait, and the next one takes over when the owner lets go. Because claims are kept by (address, port,
protocol) and not by object, it does not matter whether the new owner is seen before the old one has gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import msgspec

from .values import FrontendKey, ServicePort, ServicePortName


def healthCheckKey(port: ServicePort) -> FrontendKey | None:
    """What a health-check port occupies: the same as a node port of that number would."""
    return FrontendKey(port.name.family, "TCP", "", port.healthCheckPort) if port.healthCheckPort else None


def _keys(port: ServicePort) -> Iterator[FrontendKey]:
    """Everything that a service port claims."""
    for frontend in port.frontends:
        yield port.key(frontend)
    health = healthCheckKey(port)
    if health is not None:
        yield health


Rank: TypeAlias = tuple[str, ServicePortName]
#: sorts behind every creationTimestamp: an object from a file takes nothing from one of the cluster
UNKNOWN_AGE = "~"


class Claims:
    """Keeps, for each frontend, who claims it. Holds no service ports."""

    def __init__(self) -> None:
        self._claims: dict[FrontendKey, dict[ServicePortName, Rank]] = {}
        self._owners: dict[FrontendKey, Rank] = {}

    def change(
        self, old: Iterable[ServicePort], new: Iterable[ServicePort], created: str
    ) -> set[ServicePortName]:
        """
        Take over what one Service claims now instead of before.

        :param created: its creationTimestamp, or :data:`UNKNOWN_AGE`.
        :return: names of other service ports that own more or less by it. However many claim the same frontend, these
            are two at the most for each.
        """
        touched: set[ServicePortName] = set()
        before = {(key, port.name) for port in old for key in _keys(port)}
        after = {(key, port.name) for port in new for key in _keys(port)}
        for key, name in before - after:
            claimants = self._claims[key]
            rank = claimants.pop(name)
            if not claimants:
                del self._claims[key], self._owners[key]
            elif self._owners[key] == rank:
                self._own(key, min(claimants.values()), touched)
        for key, name in after:
            claimants = self._claims.setdefault(key, {})
            rank = (created, name)
            known = claimants.get(name)
            if known == rank:
                continue
            claimants[name] = rank
            owner = self._owners.get(key)
            if owner is None or rank < owner:
                self._own(key, rank, touched)
            elif owner == known:  # it owned, under a better rank than the one that it has now
                self._own(key, min(claimants.values()), touched)
        return touched

    def _own(self, key: FrontendKey, rank: Rank, touched: set[ServicePortName]) -> None:
        before = self._owners.get(key)
        self._owners[key] = rank
        touched.add(rank[1])
        if before is not None:
            touched.add(before[1])

    def owner(self, key: FrontendKey) -> ServicePortName | None:
        """The one that serves this frontend."""
        rank = self._owners.get(key)
        return rank[1] if rank else None

    def owned(self, port: ServicePort) -> ServicePort:
        """The service port with only what it owns; the same object when it owns all."""
        kept = tuple(f for f in port.frontends if self.owner(port.key(f)) == port.name)
        health = healthCheckKey(port)
        if health is not None and self.owner(health) != port.name:
            return msgspec.structs.replace(port, frontends=kept, healthCheckPort=0)
        return port if len(kept) == len(port.frontends) else msgspec.structs.replace(port, frontends=kept)

    def pending(self, port: ServicePort) -> Mapping[FrontendKey, ServicePortName]:
        """What the port claims and another one owns: key → owner."""
        found = {}
        for key in _keys(port):
            owner = self.owner(key)
            if owner is not None and owner != port.name:
                found[key] = owner
        return found
