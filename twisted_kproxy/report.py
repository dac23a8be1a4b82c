"""``/status``: what is served, by whom, and how it goes, put together from what each part says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from .core.values import Endpoint, PoolName, Problem, ServiceMap, ServicePort, ServicePortName
from .interfaces import IDataplane, ILoadBalancer, ISource
from .redaction import redacted, redactedValue


class _Cluster(Protocol):
    @property
    def synced(self) -> bool: ...
    @property
    def missing(self) -> list[str]: ...
    @property
    def latest(self) -> ServiceMap: ...
    @property
    def settled(self) -> bool: ...
    def quarantined(self) -> list[dict[str, str]]: ...
    def problems(self) -> list[Problem]: ...
    def pending(self) -> dict[str, dict[str, str]]: ...
    def counts(self) -> dict[str, int]: ...


class _Syncer(Protocol):
    @property
    def applied(self) -> ServiceMap: ...
    @property
    def failures(self) -> int: ...
    @property
    def outFor(self) -> float: ...


class Report:
    """
    The parts of the page, each computed when it is asked for.

    :param about: facts that do not change: version, node name, mode.
    :param dataplane: gives the dataplane, ``None`` before there is one; the same for ``syncer``.
    :param failing: says which of some endpoints of a service port have failed and not answered since.
    :param stopping: whether the daemon is about to end, and refuses new clients.
    :param relay: what carries the bytes of connections says of itself.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        cluster: _Cluster,
        sources: Callable[[], Iterable[ISource]],
        balancer: ILoadBalancer,
        dataplane: Callable[[], IDataplane | None],
        syncer: Callable[[], _Syncer | None],
        failing: Callable[[ServicePortName, tuple[Endpoint, ...]], Mapping[str, Any]],
        relay: Callable[[], Mapping[str, Any]],
        stopping: Callable[[], bool],
    ) -> None:
        self._about = about
        self._cluster = cluster
        self._sources = sources
        self._balancer = balancer
        self._dataplane = dataplane
        self._syncer = syncer
        self._failing = failing
        self._relay = relay
        self._stopping = stopping

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Name on the page → what makes it."""
        return {
            "about": lambda: self._about,
            "sync": self.sync,
            "sources": self.sources,
            "services": self.services,
            "pending": self._cluster.pending,
            "quarantined": self._cluster.quarantined,
            "problems": self.problems,
            "dataplane": self.dataplane,
            "relay": self._relay,
        }

    def sync(self) -> dict[str, Any]:
        """Whether what should be is in force."""
        syncer, stopping = self._syncer(), self._stopping()
        applied = self._cluster.settled and syncer is not None and syncer.applied is self._cluster.latest
        return {
            "waitingFor": self._cluster.missing,
            "inForce": applied and not stopping,
            "stopping": stopping,
            "failuresInARow": syncer.failures if syncer else 0,
            "running": syncer is not None and syncer.outFor > 0,
            "objects": self._cluster.counts(),
        }

    def sources(self) -> list[dict[str, Any]]:
        """Each source, and how many seconds ago it was known to be up to date."""
        found = [{"name": it.name, "ageSeconds": dict(it.ages()), **it.status()} for it in self._sources()]
        # What went wrong there is told in the words of servers and programs.
        shown: list[dict[str, Any]] = redactedValue(found)
        return shown

    def problems(self) -> list[dict[str, str]]:
        """Everything that is not as somebody wanted it: what sources cannot read, and what of objects is not served."""
        faults = [
            {"kind": f"source {source.name}", "key": redacted(key), "reason": redacted(reason)}
            for source in self._sources()
            for key, reason in source.faults().items()
        ]
        return faults + [{"kind": it.kind, "key": it.key, "reason": it.reason} for it in self._cluster.problems()]

    def services(self) -> dict[str, Any]:
        """
        Every service port: where it can be dialled, the endpoints of its pools with the connections open to each, and
        the clients that are bound to one by affinity.
        """
        pools = self._balancer.status()
        return {str(name): self._service(port, pools) for name, port in sorted(self._cluster.latest.items())}

    def _service(self, port: ServicePort, pools: Mapping[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "frontends": [{"kind": f.kind, "address": str(port.key(f))} for f in port.frontends],
            "affinitySeconds": port.affinitySeconds,
            "reachable": port.reachable,
        }
        for kind in port.poolKinds():
            shown[kind] = pools.get(
                str(PoolName(port.name, kind)), {"endpoints": {str(it): 0 for it in port.pool(kind)}}
            )
        failing = self._failing(port.name, tuple({*port.cluster, *port.local}))
        if failing:
            shown["failing"] = failing
        return shown

    def dataplane(self) -> Mapping[str, Any]:
        """What the dataplane says of itself."""
        dataplane = self._dataplane()
        return dataplane.status() if dataplane is not None else {"state": "not started"}

    def unserved(self) -> Mapping[str, str]:
        """Names of service ports that the dataplane does not serve as it should → why."""
        dataplane = self._dataplane()
        return dataplane.unserved() if dataplane is not None else {}
