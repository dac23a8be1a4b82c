"""
ProxyServer: the one place that joins the parts, and the only one that knows concrete classes.

sources → cluster → syncer → broadcast → metrics, load balancer, dataplane; the dataplane → rule plane → writer.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from . import __version__, plugin
from .balance.balancer import LoadBalancer
from .balance.failures import EndpointFailures
from .broadcast import Broadcast
from .cluster import Cluster
from .config import Config, effective, nodeSettings
from .core.changes import Update
from .core.values import FAMILIES, PoolName
from .interfaces import (
    IBalancingPolicy,
    IDataplane,
    ILoadBalancer,
    IPolicyMaker,
    IProxier,
    IRuleWriter,
    ISource,
    ISourceMaker,
    ISyncObserver,
    ITrafficObserver,
    IWriterMaker,
    KproxyError,
    NotAvailable,
)
from .metrics import LoopLag, Metrics
from .netfilter.choose import chooseWriter, removeLeftovers
from .netfilter.claim import NamespaceClaim
from .netfilter.conntrack import Flows
from .netfilter.node import primaryAddress
from .netfilter.plane import RulePlane
from .redaction import redactedValue
from .report import Report
from .syncer import Syncer
from .systemd import Notifier
from .userspace.accesslog import AccessLog
from .userspace.dataplane import UserspaceDataplane
from .userspace.dial import Dialer
from .userspace.engines.choose import chooseEngines
from .userspace.engines.poller import Poller
from .userspace.ports import Budget, PortRange, raiseLimit
from .userspace.tcp import TcpProxier
from .userspace.udp import UdpProxier
from .web.site import Listener, makeSite
from .web.status import HealthState, healthPages, metricsPages, tree

#: in order of preference; others are chosen by name only
AUTOMATIC_WRITERS = ("nftables", "python-iptables", "iptables")
#: an update that is out for longer means that the daemon is stuck: the watchdog is no longer fed
STUCK_SECONDS = 120.0
#: of the garbage collector: connections make many objects, and none that only it would find
GC_THRESHOLDS = (50_000, 20, 50)
#: of the file descriptors for connections, what UDP flows may take
UDP_SHARE = 0.5


@implementer(ISyncObserver)
class _Observer:
    """Tells health, metrics and systemd what the syncer does."""

    def __init__(
        self, health: HealthState, metrics: Metrics, notifier: Notifier, inForce: Callable[[], None]
    ) -> None:
        self._inForce: Callable[[], None] | None = inForce  # called once, when the first update is
        self._health = health
        self._metrics = metrics
        self._notifier = notifier

    def queued(self) -> None:
        self._health.queued()

    def began(self, update: Update) -> None:
        self._health.began()
        self._metrics.began()

    def applied(self, update: Update, seconds: float) -> None:
        self._health.applied()
        self._metrics.applied(seconds, update.full)
        self._notifier.ready()
        self._notifier.status(f"{len(update.current)} service ports in force")
        first, self._inForce = self._inForce, None
        if first is not None:
            first()

    def failed(self, update: Update, seconds: float) -> None:
        self._metrics.syncFailed()
        self._notifier.status("the last update could not be put into force; trying again")


class ProxyServer(MultiService):
    """
    The daemon. Starting it never waits and never raises: what cannot be had (no rule writer, say) ends the process
    with a clear line and exit status 1.
    """

    log = Logger()

    def __init__(self, reactor: Any, config: Config, environ: Mapping[str, str]) -> None:
        """
        :raise KproxyError: where a configured part cannot be made: a kubeconfig that cannot be read, a name under which
            nothing is offered.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._config = config
        self._stopping = self._cutting = False
        self.metrics = Metrics()
        self.failures = EndpointFailures(reactor, self.metrics)
        self.health = HealthState(reactor, config.syncPeriod)
        self.notifier = Notifier(reactor, environ, self._alive)
        policy = plugin.find(IPolicyMaker, config.policy)
        policy.make()  # now, so that a policy that cannot be had is told before anything starts
        makePolicy: Callable[[], IBalancingPolicy] = policy.make
        self.balancer = LoadBalancer(reactor, makePolicy)
        self.sources: list[ISource] = []
        self.cluster = Cluster(config.nodeName, config.proxyName, nodeSettings(config))
        self.cluster.hostAddresses(filter(None, map(primaryAddress, FAMILIES)))
        self.cluster.nodeChanged = self.health.nodeChanged
        self.cluster.nodesListed = self._nodesListed
        self._makeSources()
        self.dataplane: IDataplane | None = None
        self.syncer: Syncer | None = None
        self._starting: Deferred[None] | None = None
        self._leftovers: Deferred[Any] | None = None
        self._accessLog = AccessLog(reactor, config.accessLog) if config.accessLog else None
        self._makePages()

    # --- making

    def _makeSources(self) -> None:
        config = self._config
        channel = self.metrics.counting(self.cluster)
        for options in config.sources:
            maker = plugin.find(ISourceMaker, options.type)
            source: ISource = maker.make(
                self._reactor, options.name, options, channel,
                nodeName=config.nodeName, proxyName=config.proxyName,
            )
            self.cluster.expect(source.name, source.kinds)
            self.sources.append(source)
        self.metrics.watchSources(lambda: self.sources)
        self.metrics.watchProblems(self.cluster.problems)
        self.metrics.watchRefused(self.cluster.refused)
        self.metrics.watchQuarantined(self.cluster.quarantined)

    def _makePages(self) -> None:
        config = self._config
        about = {"version": __version__, "node": config.nodeName, "mode": config.mode, "policy": config.policy}
        report = Report(
            about, self.cluster, lambda: self.sources, self.balancer, lambda: self.dataplane, lambda: self.syncer,
            self.failures.status,
        )
        health = healthPages(self.health.health, self.metrics.healthAnswered)
        pages = {
            **health,
            **metricsPages(
                self.metrics.exposition,
                lambda: config.mode,
                lambda: redactedValue(effective(config)),
                report.parts(),
            ),
        }
        for what, bind, content in (("health", config.healthBind, health), ("metrics", config.metricsBind, pages)):
            if bind is not None:
                site = makeSite(self._reactor, tree(content))
                Listener(self._reactor, site, bind.host, bind.port, what).setServiceParent(self)  # type: ignore[no-untyped-call]
        LoopLag(self._reactor, self.metrics.observeLag).setServiceParent(self)  # type: ignore[no-untyped-call]
        self.notifier.setServiceParent(self)  # type: ignore[no-untyped-call]

    async def _chooseWriter(self) -> IRuleWriter:
        wanted = self._config.writer
        names = AUTOMATIC_WRITERS if wanted == "auto" else (wanted,)
        candidates = []
        for name in names:
            maker = plugin.find(IWriterMaker, name)
            candidates.append((name, lambda maker=maker: maker.make(self._reactor)))
        return await chooseWriter(candidates)

    def _makeDataplane(self, writer: IRuleWriter) -> IDataplane:
        config, reactor = self._config, self._reactor
        rules = RulePlane(
            reactor, writer, flows=Flows(reactor), changedOutside=self._changedOutside,
            claim=NamespaceClaim() if writer.place != "nowhere" else None,
        )
        self.metrics.watchQuarantined(
            lambda: [
                *self.cluster.quarantined(),
                *({"kind": "ServicePort", "key": name, "reason": why} for name, why in rules.quarantined().items()),
            ]
        )
        raiseLimit()
        budget = Budget(reactor)
        forFlows = budget.share(UDP_SHARE)
        poller = Poller(reactor)
        dialer = Dialer(reactor, poller)
        relay, sockets = chooseEngines(reactor, poller, config.engine, config.nativeThread)

        def makeTcp(reactor: Any, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> IProxier:
            return TcpProxier(
                reactor, pool, balancer, observer,
                relay=relay, dialer=dialer, budget=budget, connectTimeouts=config.connectTimeouts,
                accessLog=self._accessLog,
            )

        def makeUdp(reactor: Any, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> IProxier:
            return UdpProxier(
                reactor, pool, balancer, observer,
                idleTimeout=config.udpIdleTimeout, budget=forFlows, sockets=sockets,
            )

        return UserspaceDataplane(
            reactor, self.balancer, rules,
            makeTcp=makeTcp, makeUdp=makeUdp, addressOf=primaryAddress, observer=self.failures,
            ports=PortRange(*(config.portRange or (0, 0))),
        )

    # --- running

    def startService(self) -> None:
        """Start everything; returns at once."""
        super().startService()  # type: ignore[no-untyped-call]
        self.log.info("kproxy {version} starts on node {node}", version=__version__, node=self._config.nodeName)
        for source in self.sources:
            source.setServiceParent(self)  # type: ignore[no-untyped-call]
        self._reactor.callWhenRunning(self._catchSignals)
        self._starting = Deferred.fromCoroutine(self._start())
        self._starting.addErrback(self._giveUp)

    async def _start(self) -> None:
        config = self._config
        writer = await self._chooseWriter()
        dataplane = self._makeDataplane(writer)
        await dataplane.start()
        self.dataplane = dataplane
        if self._stopping:
            return
        observer = _Observer(self.health, self.metrics, self.notifier, lambda: self._inForce(writer))
        listeners = Broadcast([self.metrics, self.balancer, dataplane])
        self.syncer = Syncer(
            self._reactor, self.cluster, listeners, observer,
            minPeriod=config.minSyncPeriod, fullPeriod=config.syncPeriod,
        )
        self.cluster.changed = self.syncer.changed
        if not self.cluster.synced:
            self.log.info("Waiting for the first lists of {missing}", missing=", ".join(self.cluster.missing))
        self.syncer.start()

    def stopService(self) -> Deferred[None]:
        """
        Stop: no more updates, new clients are refused, what is open may go on for the drain time, then the rules go.
        :meth:`cut` ends the drain.
        """
        self._stopping = True
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        seconds = self._config.drainTimeout
        if self.dataplane is not None:
            self.log.info("Stopping; open connections may go on for up to {seconds:g} s", seconds=seconds)
        self.notifier.stopping()
        self.health.stopping()
        for source in self.sources:
            await maybeDeferred(source.disownServiceParent)
        if self._starting is not None:
            await self._starting
        if self.syncer is not None:
            await self.syncer.stop()
        if self._leftovers is not None:
            await self._leftovers
        if self.dataplane is not None:
            try:
                await self.dataplane.stop(0 if self._cutting else seconds)
            except Exception:
                self.log.failure("Stopping the dataplane failed; --cleanup removes what it may have left")
        if self._accessLog is not None:
            await self._accessLog.close()
        await maybeDeferred(super().stopService)
        self.log.info("Stopped")

    def cut(self) -> None:
        """End draining now: what is still open is reset."""
        self._cutting = True
        if self.dataplane is not None:
            self.log.info("Cutting the connections that are still open")
            self.dataplane.stop(0).addErrback(lambda failure: self.log.failure("Cutting failed", failure))

    def _catchSignals(self) -> None:
        """The first SIGTERM or SIGINT stops the reactor, a second one cuts. Twisted itself knows only the first."""

        def caught(number: int, frame: object) -> None:
            self._reactor.callFromThread(self.cut if self._stopping else self._reactor.stop)

        def ignored(number: int, frame: object) -> None:
            self._reactor.callFromThread(
                self.log.info, "{signal} is ignored; the configuration is read at the start only",
                signal=signal.Signals(number).name,
            )

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, caught)
            # Left alone they would end the process without a word, and its rules would lead nowhere.
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, ignored)

    def _giveUp(self, failure: Failure) -> None:
        if self._stopping:
            return
        if failure.check(KproxyError):  # type: ignore[no-untyped-call]
            self.log.critical("kproxy cannot run: {error}", error=failure.getErrorMessage())
        else:
            self.log.failure("kproxy cannot run", failure)
        _exitStatus(1)
        self._reactor.callWhenRunning(self._reactor.stop)

    # --- what happens meanwhile

    def _changedOutside(self) -> None:
        if self.syncer is not None:
            self.syncer.resync()

    def _inForce(self, active: IRuleWriter) -> None:
        """
        The first update is in force. An operator who changes the writer must not keep the rules of both.

        What there is by now stays, most of it for good: a full collection that went through all of it would keep the
        reactor waiting, for some hundred milliseconds with thousands of Services. Garbage of later on is found as ever.
        """
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        makers = [plugin.find(IWriterMaker, name) for name in plugin.names(IWriterMaker)]
        others = [(maker.name, lambda maker=maker: maker.make(self._reactor)) for maker in makers]
        self._leftovers = removeLeftovers(active, others)

    def _nodesListed(self, source: str) -> None:
        """An API server that does not know our node: a wrong name, most of all, and then nothing is local."""
        byApi = any(it.name == source and it.type == "api" for it in self._config.sources)
        if byApi and self.cluster.node is None:
            self.log.warn(
                "Source {source} has no Node {node}: no endpoint counts as local, and /healthz says 503. "
                "If the node has another name there, set node-name in section [kproxy]",
                source=source, node=self._config.nodeName,
            )
            self.health.nodeChanged(None)

    def _alive(self) -> bool:
        return self.syncer is None or self.syncer.outFor < STUCK_SECONDS


def makeProxyServer(reactor: Any, config: Config, environ: Mapping[str, str] = os.environ) -> ProxyServer:
    """
    The whole daemon, not yet running.

    :raise KproxyError: see :class:`ProxyServer`.
    """
    return ProxyServer(reactor, config, environ)


async def _cleanup(reactor: Any) -> list[str]:
    said: list[str] = []
    faults: list[str] = []
    for name in plugin.names(IWriterMaker):
        if name == "none":
            continue
        try:
            writer: IRuleWriter = plugin.find(IWriterMaker, name).make(reactor)
        except NotAvailable as error:
            said.append(f"{name}: {error}")
            continue
        try:
            await writer.probe()
            said.append(f"{name}: {'rules removed' if await writer.cleanup() else 'nothing to remove'}")
        except NotAvailable as error:
            said.append(f"{name}: cannot have left anything here ({error})")
        except KproxyError as error:
            faults.append(f"{name}: {error}")
        finally:
            await writer.close()
    if faults:
        raise KproxyError("\n".join(faults + said))
    return said


def cleanup(reactor: Any) -> Deferred[list[str]]:
    """
    Remove every rule of ours, of every writer, and nothing else.

    :return: fires with a line for each writer; fails with :class:`~twisted_kproxy.interfaces.KproxyError` where rules
        could not be removed.
    """
    return Deferred.fromCoroutine(_cleanup(reactor))


def _exitStatus(status: int) -> None:
    """
    Let the process end with that status. twistd has no means to say so, and exceptions in shutdown triggers are only
    logged; what is registered last with atexit runs first, so output that others flush there is flushed here.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)

    atexit.register(leave)
