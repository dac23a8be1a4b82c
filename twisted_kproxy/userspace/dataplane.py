"""
Userspace mode: a filter over the rule plane.

A service served in userspace is a service whose only endpoint is a socket of this node. So one proxier is opened for
each pool in use, the pool is replaced by that socket, and the rule plane gets the map: every kind of frontend, source
and verdict is its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.error import CannotListenError
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..core.changes import Update
from ..core.values import (
    FAMILIES,
    Endpoint,
    Family,
    PoolKind,
    PoolName,
    ServiceMap,
    ServicePort,
    ServicePortName,
)
from ..core.wording import counted
from ..interfaces import IDataplane, ILoadBalancer, IProxier, IRulePlane, ITrafficObserver, KproxyError
from .ports import PortRange
from .redirect import (
    KINDS,
    NO_SCTP,
    Pace,
    Socket,
    closed,
    homeless,
    openingError,
    poolsOf,
    preferred,
    redirected,
    same,
)

ProxierFactory: TypeAlias = Callable[[Any, PoolName, ILoadBalancer, ITrafficObserver], IProxier]

@implementer(IDataplane)
class UserspaceDataplane:
    """
    Opens a proxier per pool in use and leads the frontends there.

    :param reactor: provides IReactorTime.
    :param rules: gets the redirected map; it must not be told of updates by anybody else.
    :param makeTcp: ``makeTcp(reactor, pool, balancer, observer)``.
    :param makeUdp: the same for UDP.
    :param addressOf: the node's own address of a family, where the rules shall lead; ``None`` while it has none.
    :param ports: where proxiers may listen.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        balancer: ILoadBalancer,
        rules: IRulePlane,
        *,
        makeTcp: ProxierFactory,
        makeUdp: ProxierFactory,
        addressOf: Callable[[Family], str | None],
        observer: ITrafficObserver,
        ports: PortRange | None = None,
    ) -> None:
        self._reactor = reactor
        self._balancer = balancer
        self._rules = rules
        self._makers = {"TCP": makeTcp, "UDP": makeUdp}
        self._addressOf = addressOf
        self._observer = observer
        self._ports = ports or PortRange()
        self._lock = DeferredLock()
        self._addresses: Mapping[Family, str | None] = {}
        self._wanted = ServiceMap()
        self._redirected = ServiceMap()
        self._inForce = ServiceMap()
        #: Whether ``_inForce`` is known to be so.
        self._sound = True
        self._sockets: dict[PoolName, Socket] = {}
        #: Replaced by another Service of the same name: closed once the rules lead to its successor.
        self._replaced: list[Socket] = []
        #: Closed, with connections that go on.
        self._draining: dict[IProxier, None] = {}
        self._refused: dict[ServicePortName, str] = {}
        self._pending: dict[ServicePortName, str] = {}
        #: Families whose lack of an address was logged.
        self._homeless: set[Family] = set()
        self._stopping = False
        self._waiting: list[Deferred[None]] = []

    # --- IDataplane

    def start(self) -> Deferred[None]:
        return self._rules.start()

    def onUpdate(self, update: Update) -> Deferred[None]:
        """
        Open what is new, hand the redirected map to the rules, and then close what is gone: its connections go on.

        :return: fails as the rules do: old and new sockets then stay open, and the next update is taken as a full one.
        """
        done: Deferred[None] = self._lock.run(lambda: Deferred.fromCoroutine(self._follow(update)))
        return done

    def stop(self, drainSeconds: float) -> Deferred[None]:
        """
        Have new clients refused at once; close the sockets; let connections go on for so long; then cut them, and take
        back the rules.

        :return: fires when no connection is left. Never fails: trouble with the rules is logged.
        """
        if self._stopping:
            if drainSeconds <= 0:
                return Deferred.fromCoroutine(self._cut())
            waiting: Deferred[None] = Deferred()
            self._waiting.append(waiting)
            return waiting
        self._stopping = True
        return Deferred.fromCoroutine(self._stop(drainSeconds))

    def status(self) -> Mapping[str, Any]:
        """
        ``servicePorts`` by name: its frontends, its sockets by pool (as the proxiers describe themselves), its open
        connections; ``refused`` and ``pending``: reason by name; ``draining``: closed sockets with connections left.
        """
        ports: dict[str, Any] = {}
        for name, port in self._wanted.items():
            sockets = {
                kind: dict(it.proxier.status())
                for kind in KINDS
                if (it := self._sockets.get(PoolName(name, kind))) is not None
            }
            ports[str(name)] = {
                "frontends": [f"{it.kind} {port.key(it)}" for it in port.frontends],
                "sockets": sockets,
                "active": sum(int(it.get("active", 0)) for it in sockets.values()),
            }
        return {
            "mode": "userspace",
            "addresses": dict(self._addresses),
            "servicePorts": ports,
            "refused": {str(name): reason for name, reason in self._refused.items()},
            "pending": {str(name): reason for name, reason in self._pending.items()},
            "draining": [{"pool": str(it.pool), **it.status()} for it in self._draining],
            "rules": dict(self._rules.status()),
        }

    def unserved(self) -> Mapping[str, str]:
        own = {str(name): reason for told in (self._pending, self._refused) for name, reason in told.items()}
        return {**self._rules.unserved(), **own}

    # --- following the map

    async def _follow(self, update: Update) -> None:
        self._mayGoOn()
        addresses = {family: self._addressOf(family) for family in FAMILIES}
        everything = update.full or not self._sound or addresses != self._addresses
        previous, full = self._inForce, update.full or not self._sound
        self._tellAddresses(addresses)
        self._addresses = addresses
        self._sound = False
        self._wanted = update.current
        self._rename(update.renamed)
        names = self._toLookAt(update, everything)
        gone = [name for name in self._redirected if name not in update.current] if everything else update.removed
        step: dict[ServicePortName, ServicePort | None] = dict.fromkeys(gone)
        pace = Pace(self._reactor)
        for name in names:
            step[name] = self._lookSafely(update.current[name], self._redirected.get(name), pace)
            if pace.due():
                await pace.turn()
                self._mayGoOn()
        self._forgetFaults(update.current)
        self._tellHomeless()
        self._redirected = self._redirected.step(step, update.current.generation, update.current.locality)
        await self._rules.onUpdate(Update(previous, self._redirected, full))
        self._inForce = self._redirected
        self._sound = True
        await self._closeGone(update.current, names, update.removed, everything)

    def _tellAddresses(self, addresses: Mapping[Family, str | None]) -> None:
        for family, address in addresses.items():
            before = self._addresses.get(family)
            if before is not None and before != address:
                self.log.warn(
                    "The {family} address of this node was {before} and is {address} now; the rules follow",
                    family=family, before=before, address=address or "none",
                )

    def _mayGoOn(self) -> None:
        if self._stopping:
            raise KproxyError("the userspace dataplane is being stopped; it takes no more updates")

    def _toLookAt(self, update: Update, everything: bool) -> list[ServicePortName]:
        if not everything:
            again = [name for name in self._pending if name in update.current and self._addresses[name.family]]
            return list(dict.fromkeys([*update.changed, *again]))
        if self._sockets:
            return list(update.current)
        # At the start those come first whose old port is known, before the kernel gives it to another one.
        return sorted(update.current, key=lambda name: not any(self._oldPorts(update.current[name])))

    def _oldPorts(self, port: ServicePort) -> Iterable[int]:
        return (self._preferred(port, kind) for kind in poolsOf(port))

    def _rename(self, renamed: Mapping[ServicePortName, ServicePortName]) -> None:
        for new, old in renamed.items():
            for kind in KINDS:
                before, after = PoolName(old, kind), PoolName(new, kind)
                if before in self._sockets and after not in self._sockets:
                    self._sockets[after] = self._sockets.pop(before)
                    self._sockets[after].proxier.renamed(after)

    def _lookSafely(self, port: ServicePort, before: ServicePort | None, pace: Pace) -> ServicePort:
        try:
            return self._look(port, before, pace)
        except Exception:
            self.log.failure("{name} cannot be set up.", name=str(port.name))
            self._wait(port.name, "an internal error, which was logged")
            return same(before, closed(port))

    def _look(self, port: ServicePort, before: ServicePort | None, pace: Pace) -> ServicePort:
        """
        See to the sockets of a service port.

        :param before: what it was last redirected to; the same object comes back if it still says the same.
        """
        name = port.name
        if name.protocol == "SCTP":
            self._refuse(name, NO_SCTP)
            return same(before, closed(port))
        address = self._addresses[name.family]
        needed = poolsOf(port)
        fault = None
        targets: dict[PoolKind, tuple[Endpoint, ...]] = {"cluster": (), "local": ()}
        for kind in KINDS:
            pool = PoolName(name, kind)
            it = self._sockets.get(pool)
            if it is not None and it.uid != port.uid:
                self._replaced.append(self._sockets.pop(pool))
                it = None
            if it is not None:
                it.follow(port.pool(kind) if kind in needed else ())
            if kind not in needed:
                continue
            if address is None:
                fault = homeless(name.family)
                continue
            if it is None:
                pace.step()
                try:
                    it = self._open(port, pool)
                except (OSError, CannotListenError) as error:
                    fault = f"no socket for the {kind} pool: {openingError(error)}"
                    continue
            targets[kind] = (Endpoint(address, it.proxier.port, isLocal=True, isSocket=True),)
        self._wait(name, fault)
        return same(before, redirected(port, targets, fault is None))

    def _open(self, port: ServicePort, pool: PoolName) -> Socket:
        endpoints = port.pool(pool.kind)
        proxier = self._makers[port.name.protocol](self._reactor, pool, self._balancer, self._observer)
        proxier.endpointsChanged(endpoints)
        self._ports.open(proxier, self._preferred(port, pool.kind))
        it = self._sockets[pool] = Socket(proxier, port.uid, endpoints)
        return it

    def _preferred(self, port: ServicePort, kind: PoolKind) -> int:
        """Where rules left by an earlier run lead its clients: listening there keeps them served."""
        return preferred(port, kind, self._rules.ruleInForce)

    def _refuse(self, name: ServicePortName, reason: str) -> None:
        if self._refused.get(name) != reason:
            self._refused[name] = reason
            self.log.warn("{name} is not served: {reason}.", name=str(name), reason=reason)

    def _wait(self, name: ServicePortName, reason: str | None) -> None:
        if reason is None:
            if self._pending.pop(name, None) is not None:
                self.log.info("{name} is served now.", name=str(name))
        elif self._pending.get(name) != reason:
            self._pending[name] = reason
            if not self._addresses[name.family]:
                return  # There may be thousands: see _tellHomeless().
            self.log.error(
                "{name} is not served: {reason}. Its clients are refused; it is tried again with every update.",
                name=str(name),
                reason=reason,
            )

    def _tellHomeless(self) -> None:
        for family, address in self._addresses.items():
            if address is not None:
                self._homeless.discard(family)
            elif family not in self._homeless and (count := sum(it.family == family for it in self._pending)):
                self._homeless.add(family)
                self.log.warn(
                    "This node has no {family} address: {count} service ports of that family wait for one.",
                    family=family,
                    count=count,
                )

    def _forgetFaults(self, current: ServiceMap) -> None:
        for faults in (self._refused, self._pending):
            for name in [name for name in faults if name not in current]:
                del faults[name]

    # --- closing

    async def _closeGone(
        self, current: ServiceMap, looked: Iterable[ServicePortName], removed: Iterable[ServicePortName], all_: bool
    ) -> None:
        replaced, self._replaced = self._replaced, []
        gone = [it.proxier for it in replaced]
        names = {pool.port for pool in self._sockets} if all_ else {*looked, *removed}
        for name in names:
            needed = poolsOf(current.get(name))
            for kind in KINDS:
                if kind not in needed and (it := self._sockets.pop(PoolName(name, kind), None)) is not None:
                    gone.append(it.proxier)
        await self._close(gone)

    async def _close(self, proxiers: Iterable[IProxier]) -> None:
        pace = Pace(self._reactor)
        todo = dict.fromkeys(proxiers)
        # All of them drain from now on: whoever cuts what drains finds those whose turn has not come.
        self._draining.update(todo)
        for proxier in todo:
            self._closeOne(proxier)
            pace.step()
            if pace.due():
                await pace.turn()

    def _closeOne(self, proxier: IProxier) -> None:
        try:
            proxier.stopListening()
        except Exception:
            self.log.failure("The socket of {pool} could not be closed.", pool=str(proxier.pool))
        self._ports.release(proxier)
        proxier.drained().addCallback(lambda _: self._draining.pop(proxier, None))

    def _drained(self) -> Deferred[None]:
        """Fires once nothing drains any more; not to be called while sockets are open."""
        waiting = DeferredList([it.drained() for it in self._draining])
        return waiting.addCallback(lambda _: None)

    # --- stopping

    async def _stop(self, drainSeconds: float) -> None:
        await self._lock.acquire()
        try:
            if drainSeconds > 0:
                await self._drain(drainSeconds)
            await self._takeRulesBack()
            await self._cut()
        finally:
            self._lock.release()
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.callback(None)

    async def _drain(self, seconds: float) -> None:
        """
        Have new clients refused at once, and let those that are connected go on.

        The rules go only afterwards. Without any, clients would wait for an answer that never comes; and where they are
        the only ones that rewrite addresses the kernel would no longer do so for established connections either.
        """
        refusing = ServiceMap(
            {name: closed(port) for name, port in self._redirected.items()}, locality=self._redirected.locality
        )
        try:
            await self._rules.onUpdate(Update(self._inForce, refusing, not self._sound))
        except Exception:
            self.log.failure("The rules could not be changed; until all is drained they lead to closed sockets.")
        await self._close(self._takeAll())
        timer = self._reactor.callLater(seconds, self._drainOver)
        await self._drained()
        if timer.active():
            timer.cancel()

    async def _takeRulesBack(self) -> None:
        try:
            await self._rules.stop(0)
        except Exception:
            self.log.failure("The rules could not be taken back; they lead to closed sockets from now on.")

    def _takeAll(self) -> list[IProxier]:
        proxiers = [it.proxier for it in (*self._sockets.values(), *self._replaced)]
        self._sockets.clear()
        self._replaced.clear()
        return proxiers

    def _drainOver(self) -> None:
        left = sum(int(it.status().get("active", 0)) for it in self._draining)
        are = "is" if left == 1 else "are"
        self.log.warn("The drain time is over; {what} {are} cut.", what=counted(left, "connection"), are=are, left=left)
        Deferred.fromCoroutine(self._cut()).addErrback(self._unexpected)

    async def _cut(self) -> None:
        """Close and cut everything, now."""
        await self._close(self._takeAll())
        pace = Pace(self._reactor)
        for proxier in list(self._draining):
            # Its turn in another's _close() may not have come.
            self._closeOne(proxier)
            proxier.abort()
            pace.step()
            if pace.due():
                await pace.turn()
        await self._drained()

    def _unexpected(self, failure: Failure) -> None:
        self.log.failure("Connections could not be cut.", failure)
