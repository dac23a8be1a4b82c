"""
The load balancer: for every pool its endpoints, its policy's position, its clients' affinity, and how many
connections each endpoint has. It does no I/O and sets no timer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from ..core.changes import Update
from ..core.values import Endpoint, PoolKind, PoolName, ServicePort, ServicePortName
from ..interfaces import IBalancingPolicy, ILoadBalancer, NoEndpoint
from .affinity import AffinityTable

_KINDS: tuple[PoolKind, ...] = ("cluster", "local")


class _Pool:
    """What is known of one pool. Whoever asks the policy or the affinity table does so through here."""

    __slots__ = ("active", "affinity", "endpoints", "policy", "uid", "used")

    def __init__(self, uid: str, policy: IBalancingPolicy, active: Mapping[Endpoint, int]) -> None:
        self.uid = uid
        self.policy = policy
        self.endpoints: tuple[Endpoint, ...] = ()
        self.affinity: AffinityTable | None = None
        self.used = False
        # Connections are facts: those that were opened under an earlier Service of the name are still open.
        self.active: dict[Endpoint, int] = {}
        self.takeOver(active)

    def takeOver(self, active: Mapping[Endpoint, int]) -> None:
        """Connections are open that were opened before this pool was, or under another name."""
        for endpoint, count in active.items():
            self.active[endpoint] = self.active.get(endpoint, 0) + count
            for _ in range(count):
                self.policy.opened(endpoint)

    def follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        if endpoints == self.endpoints:
            return
        self.endpoints = endpoints
        self.policy.replaced(endpoints)
        if self.affinity is not None:
            self.affinity.retain(endpoints)

    def remember(self, seconds: int, limit: int, now: float) -> None:
        if not seconds:
            self.affinity = None
        elif self.affinity is None:
            self.affinity = AffinityTable(limit, seconds)
        elif self.affinity.seconds != seconds:
            self.affinity.setSeconds(seconds, now)

    def choose(self, client: str, avoid: Collection[Endpoint], now: float) -> Endpoint | None:
        if not self.endpoints:
            return None
        if self.affinity is not None and not avoid:
            bound = self.affinity.find(client, now)
            if bound is not None:
                return bound
        endpoint = self.policy.choose(client, avoid)
        if endpoint is None and avoid:
            endpoint = self.policy.choose(client, ())
        if endpoint is not None and self.affinity is not None:
            self.affinity.bind(client, endpoint, now)
        return endpoint

    def status(self, seconds: float) -> dict[str, Any]:
        here = {str(endpoint): self.active.get(endpoint, 0) for endpoint in self.endpoints}
        leaving = {str(endpoint): count for endpoint, count in self.active.items() if str(endpoint) not in here}
        affinity = self.affinity
        return {
            "policy": getattr(self.policy, "name", type(self.policy).__name__),
            "endpoints": here,
            "leaving": leaving,
            "affinitySeconds": affinity.seconds if affinity is not None else 0,
            "affinityEntries": affinity.count(seconds) if affinity is not None else 0,
            "affinityEvicted": affinity.evicted if affinity is not None else 0,
        }


@implementer(ILoadBalancer)
class LoadBalancer:
    """
    Holds the state of both pools of every service port.

    ClientIP affinity is kept per client address and service port, whichever frontend was dialled. The two pools of a
    service port have a table each, because they are different sets: an endpoint elsewhere in the cluster, that a
    client was bound to through an inside frontend, must never answer for a ``Local`` traffic policy, and a client is
    outside or inside, so that it meets but one of the two for one frontend.

    What happens to the state of a pool:

    - another endpoint set: position goes on in the ring, clients of endpoints that stayed stay, the others are free;
    - another affinity time: in force at once; none forgets all clients;
    - renamed port: everything moves to the new name. The old name goes on to be understood, for connections that were
      opened under it;
    - another uid under the same name: another Service. Position and affinity begin anew;
    - service port removed: forgotten, but for the count of its open connections.

    :param reactor: its ``seconds()`` is the monotonic clock.
    :param makePolicy: makes the policy of one pool.
    :param affinityLimit: clients remembered per pool, at most.
    """

    def __init__(
        self, reactor: IReactorTime, makePolicy: Callable[[], IBalancingPolicy], *, affinityLimit: int = 65536
    ) -> None:
        self._reactor = reactor
        self._makePolicy = makePolicy
        self._affinityLimit = affinityLimit
        self._pools: dict[PoolName, _Pool] = {}
        self._aliases: dict[PoolName, PoolName] = {}
        #: open connections of pools that are gone.
        self._leaving: dict[PoolName, dict[Endpoint, int]] = {}

    # --- following the map -------------------------------------------------------------------------------------------

    def onUpdate(self, update: Update) -> Deferred[None]:
        """Take over the current map. Fires at once."""
        for new, old in update.renamed.items():
            self._rename(old, new)
        current = update.current
        if update.full:
            gone = {name.port for name in self._pools if name.port not in current}
            toDo: Collection[ServicePortName] = current
        else:
            gone = set(update.removed)
            toDo = update.changed
        for name in gone:
            self._remove(name)
        now = self._reactor.seconds()
        for name in toDo:
            self._follow(current[name], now)
        return succeed(None)

    def _follow(self, port: ServicePort, now: float) -> None:
        used = port.poolKinds()
        for kind in _KINDS:
            name = PoolName(port.name, kind)
            pool = self._pools.get(name)
            if pool is None or pool.uid != port.uid:
                # A name that exists is itself, no longer another's former name.
                self._aliases.pop(name, None)
                active = pool.active if pool is not None else self._leaving.pop(name, {})
                pool = self._pools[name] = _Pool(port.uid, self._makePolicy(), active)
            pool.used = kind in used
            pool.remember(port.affinitySeconds, self._affinityLimit, now)
            pool.follow(port.pool(kind))

    def _rename(self, oldPort: ServicePortName, newPort: ServicePortName) -> None:
        for kind in _KINDS:
            old, new = PoolName(oldPort, kind), PoolName(newPort, kind)
            if new in self._pools or old not in self._pools:
                continue  # the same update again
            self._pools[new] = self._pools.pop(old)
            self._pools[new].takeOver(self._leaving.pop(new, {}))
            self._aliases.pop(new, None)
            for alias, target in self._aliases.items():
                if target == old:
                    self._aliases[alias] = new
            self._aliases[old] = new

    def _remove(self, port: ServicePortName) -> None:
        for kind in _KINDS:
            name = PoolName(port, kind)
            pool = self._pools.pop(name, None)
            if pool is None:
                continue
            if pool.active:
                self._leaving[name] = pool.active
            else:
                self._forgetAliases(name)

    def _forgetAliases(self, target: PoolName) -> None:
        for alias in [alias for alias, name in self._aliases.items() if name == target]:
            del self._aliases[alias]

    def _find(self, name: PoolName) -> _Pool | None:
        pool = self._pools.get(name)
        if pool is None and name in self._aliases:
            pool = self._pools.get(self._aliases[name])
        return pool

    # --- asked by proxiers -------------------------------------------------------------------------------------------

    def nextEndpoint(self, pool: PoolName, client: str, avoid: Collection[Endpoint] = ()) -> Endpoint:
        state = self._find(pool)
        if state is None:
            raise NoEndpoint(f"{pool} is not known; its Service has gone, or this node has not heard of it yet")
        endpoint = state.choose(client, avoid, self._reactor.seconds())
        if endpoint is None:
            raise NoEndpoint(f"{pool} has no endpoint")
        return endpoint

    def endpoints(self, pool: PoolName) -> tuple[Endpoint, ...]:
        state = self._find(pool)
        return state.endpoints if state is not None else ()

    def opened(self, pool: PoolName, endpoint: Endpoint) -> None:
        state = self._find(pool)
        if state is None:
            active = self._leaving.setdefault(self._aliases.get(pool, pool), {})
        else:
            state.policy.opened(endpoint)
            active = state.active
        active[endpoint] = active.get(endpoint, 0) + 1

    def closed(self, pool: PoolName, endpoint: Endpoint) -> None:
        state = self._find(pool)
        name = self._aliases.get(pool, pool)
        active = state.active if state is not None else self._leaving.get(name, {})
        left = active.get(endpoint, 0) - 1
        if left < 0:
            return  # never reported as opened: nothing to take back
        if state is not None:
            state.policy.closed(endpoint)
        if left:
            active[endpoint] = left
            return
        del active[endpoint]
        if state is None and not active:
            del self._leaving[name]
            self._forgetAliases(name)

    def boundTo(self, pool: PoolName, client: str) -> Endpoint | None:
        """Where affinity leads a client's next connection, ``None`` where it does not. To look changes nothing."""
        state = self._find(pool)
        if state is None or state.affinity is None:
            return None
        return state.affinity.peek(client, self._reactor.seconds())

    def status(self) -> Mapping[str, Any]:
        """
        By name, each pool that a frontend leads to or that has open connections: ``policy``, ``endpoints`` (address →
        open connections), ``leaving`` (the same, of endpoints that are no longer in the pool), ``affinitySeconds``,
        ``affinityEntries``, ``affinityEvicted`` (clients forgotten because the table was full).
        """
        now = self._reactor.seconds()
        known = {str(name): pool.status(now) for name, pool in self._pools.items() if pool.used or pool.active}
        for name, active in self._leaving.items():
            known[str(name)] = {
                "policy": "",
                "endpoints": {},
                "leaving": {str(endpoint): count for endpoint, count in active.items()},
                "affinitySeconds": 0,
                "affinityEntries": 0,
                "affinityEvicted": 0,
            }
        return known
