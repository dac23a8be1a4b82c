"""The step from one service map to the next, as every listener gets it."""

from __future__ import annotations

from msgspec import Struct

from .values import FrontendKey, ServiceMap, ServicePort, ServicePortName


class StaleFlow(Struct, frozen=True, order=True):
    """
    UDP flows that the kernel may still lead where they no longer belong.

    :ivar key: the frontend that they were sent to.
    """

    key: FrontendKey


class Update:
    """
    The whole current map, and what is different from the one that was last put into force.

    :ivar previous: what the listeners last took over without fail.
    :ivar current: what shall be now. The same map twice is harmless.
    :ivar full: do not trust ``previous``: something failed or was changed behind our back. Listeners compare with
        the world itself.
    :ivar changed: names that are new, or whose service port is another than before.
    :ivar removed: names that are gone.
    :ivar renamed: new name → old name, of ports that were only renamed within one Service: the same frontends under
        another port name. Both names are also in ``changed`` and ``removed``.
    """

    __slots__ = ("changed", "current", "full", "previous", "removed", "renamed")

    def __init__(self, previous: ServiceMap, current: ServiceMap, full: bool = False) -> None:
        self.previous = previous
        self.current = current
        self.full = full
        self.changed, self.removed = current.since(previous)
        self.renamed = self._renamed()

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed or self.full or self.relocated)

    @property
    def relocated(self) -> bool:
        """Whether addresses mean something else on this node than before."""
        return self.previous.locality != self.current.locality

    def __repr__(self) -> str:
        how = "full, " if self.full else ""
        return f"<Update {how}{len(self.changed)} changed, {len(self.removed)} removed of {len(self.current)}>"

    def _renamed(self) -> dict[ServicePortName, ServicePortName]:
        def tuples(port: ServicePort) -> set[FrontendKey]:
            return {port.key(frontend) for frontend in port.frontends}

        leaving: dict[tuple[str, str, str], list[ServicePort]] = {}
        for name in self.removed:
            port = self.previous[name]
            leaving.setdefault((name.namespace, name.service, port.uid), []).append(port)
        renamed: dict[ServicePortName, ServicePortName] = {}
        if not leaving:
            return renamed
        for name in self.changed:
            if name in self.previous:
                continue
            port = self.current[name]
            for old in leaving.get((name.namespace, name.service, port.uid), ()):
                if tuples(old) & tuples(port):
                    renamed[name] = old.name
                    break
        return renamed

    @property
    def staleFlows(self) -> frozenset[StaleFlow]:
        """
        UDP frontends whose established flows must be looked at once the rules are in: those that are new (packets
        may have gone out unrewritten before), gone, or led elsewhere.
        """
        stale: set[StaleFlow] = set()
        for name in self.changed | self.removed:
            if name.protocol != "UDP":
                continue
            before = self.previous.get(name)
            after = self.current.get(name)
            old = _ways(before) if before else {}
            new = _ways(after) if after else {}
            stale.update(StaleFlow(key) for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return frozenset(stale)


def _ways(port: ServicePort) -> dict[FrontendKey, object]:
    return {port.key(f): (port.pool(f.pool), port.pool(f.insidePool)) for f in port.frontends}
