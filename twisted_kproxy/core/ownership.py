"""
Who owns a frontend that several Services claim.

One rule, the same on every node: the oldest Service wins, then the first by namespace and name, then by port name.
The others wait, and the next one takes over when the owner lets go. Because claims are kept by (address, port,
protocol) and not by object, it does not matter whether the new owner is seen before the old one has gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import msgspec

from .values import FrontendKey, ServicePort, ServicePortName

Rank: TypeAlias = tuple[str, ServicePortName]


class Claims:
    """Keeps, for each frontend, who claims it. Holds no service ports."""

    def __init__(self) -> None:
        self._claims: dict[FrontendKey, dict[ServicePortName, Rank]] = {}

    def change(
        self, old: Iterable[ServicePort], new: Iterable[ServicePort], created: str
    ) -> set[ServicePortName]:
        """
        Take over what one Service claims now instead of before.

        :param created: its creationTimestamp; ``""`` (an object from a file) counts as oldest.
        :return: names of other service ports whose ownership may have changed by it.
        """
        touched: set[ServicePortName] = set()
        before = {(port.key(f), port.name) for port in old for f in port.frontends}
        after = {(port.key(f), port.name) for port in new for f in port.frontends}
        for key, name in before - after:
            claimants = self._claims.get(key, {})
            claimants.pop(name, None)
            touched.update(claimants)
            if not claimants:
                self._claims.pop(key, None)
        for key, name in after:
            claimants = self._claims.setdefault(key, {})
            rank = (created, name)
            if claimants.get(name) != rank:
                claimants[name] = rank
                touched.update(claimants)
        return touched

    def owner(self, key: FrontendKey) -> ServicePortName | None:
        """The one that serves this frontend."""
        claimants = self._claims.get(key)
        return min(claimants.values())[1] if claimants else None

    def owned(self, port: ServicePort) -> ServicePort:
        """The service port with only those frontends that it owns; the same object when it owns all."""
        kept = tuple(f for f in port.frontends if self.owner(port.key(f)) == port.name)
        return port if len(kept) == len(port.frontends) else msgspec.structs.replace(port, frontends=kept)

    def pending(self, port: ServicePort) -> Mapping[FrontendKey, ServicePortName]:
        """Frontends that the port claims and another one owns: key → owner."""
        found = {}
        for frontend in port.frontends:
            key = port.key(frontend)
            owner = self.owner(key)
            if owner is not None and owner != port.name:
                found[key] = owner
        return found
