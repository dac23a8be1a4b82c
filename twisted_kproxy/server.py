"""
ProxyServer: the one place that joins the parts, and the only one that knows concrete classes.

sources → cluster → syncer → broadcast → metrics, load balancer, dataplane; the dataplane → rule plane → writer.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from . import __version__, plugin
from .assembly import Carriers, makeSources, writersOf
from .balance.balancer import LoadBalancer
from .balance.failures import EndpointFailures
from .broadcast import Broadcast
from .cluster import Cluster
from .config import Config, conntrackSettings, effective, nodeSettings
from .core.changes import Update
from .core.values import Family
from .explainer import Explainer
from .interfaces import (
    IBalancingPolicy,
    IDataplane,
    IEventRecorder,
    IPolicyMaker,
    IRuleWriter,
    ISource,
    ISyncObserver,
    IWriterMaker,
    KproxyError,
)
from .metrics import LoopLag, Metrics
from .netfilter.addresswatch import AddressWatch
from .netfilter.choose import chooseWriter, removeLeftovers
from .netfilter.claim import NamespaceClaim
from .netfilter.flows.conntrack import Flows
from .netfilter.node import ownAddresses, primaryAddress, sourceTowards
from .netfilter.plane import RulePlane
from .netfilter.sysctls import KernelSettings, Wishes, nodePortsOf, warnOfLocalPorts
from .process import catchSignals, exitStatus
from .redaction import redactedValue
from .report import Report
from .sources.events import NoEvents
from .syncer import Syncer
from .systemd import Notifier
from .userspace.dataplane import UserspaceDataplane
from .userspace.ports import PortRange
from .web.healthcheck import HealthChecks
from .web.site import Listener, makeSite
from .web.status import HealthState, explainPage, healthPages, metricsPages, tree

#: an update that is out for longer means that the daemon is stuck: the watchdog is no longer fed
STUCK_SECONDS = 120.0
#: of the garbage collector: connections make many objects, and none that only it would find
GC_THRESHOLDS = (50_000, 20, 50)


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
        self.addresses = AddressWatch(reactor, self._addressesChanged)
        self.addresses.setServiceParent(self)  # type: ignore[no-untyped-call]
        self.cluster.hostAddresses(filter(None, self.addresses.addresses.values()))
        self.cluster.nodeChanged = self.health.nodeChanged
        self.cluster.nodesListed = self._nodesListed
        self._makeSources()
        self.dataplane: IDataplane | None = None
        self.checks: HealthChecks | None = None
        self._kernel = KernelSettings(Wishes(*conntrackSettings(config)))
        self.syncer: Syncer | None = None
        self._starting: Deferred[None] | None = None
        self._leftovers: Deferred[Any] | None = None
        self._carriers: Carriers | None = None
        self._rules: RulePlane | None = None
        self._makePages()

    # --- making

    def _makeSources(self) -> None:
        for source in makeSources(self._reactor, self._config, self.metrics.counting(self.cluster)):
            self.cluster.expect(source.name, source.kinds)
            self.sources.append(source)
        #: of the first source that has somebody to tell
        self.events: IEventRecorder = next(
            (IEventRecorder(it) for it in self.sources if IEventRecorder.providedBy(it)), NoEvents()
        )
        self.metrics.watchSources(lambda: self.sources)
        self.metrics.watchProblems(self.cluster.problems)
        self.metrics.watchRefused(self.cluster.refused)
        self.metrics.watchQuarantined(self._quarantined)

    def _makePages(self) -> None:
        config = self._config
        about = {"version": __version__, "node": config.nodeName, "mode": config.mode, "policy": config.policy}
        report = Report(
            about, self.cluster, lambda: self.sources, self.balancer, lambda: self.dataplane, lambda: self.syncer,
            self.failures.status, lambda: self._carriers.status() if self._carriers is not None else {},
            lambda: self._stopping,
        )
        health = healthPages(self.health.health, self.metrics.healthAnswered)
        pages = {
            **health,
            **metricsPages(
                self.metrics.exposition,
                lambda: config.mode,
                lambda: redactedValue(effective(config)),
                {**report.parts(), "healthChecks": lambda: self.checks.status() if self.checks else {}},
            ),
            **explainPage(self._makeExplainer(report).answer),
        }
        for what, bind, content in (("health", config.healthBind, health), ("metrics", config.metricsBind, pages)):
            if bind is not None:
                site = makeSite(self._reactor, tree(content))
                Listener(self._reactor, site, bind.host, bind.port, what).setServiceParent(self)  # type: ignore[no-untyped-call]
        LoopLag(self._reactor, self.metrics.observeLag).setServiceParent(self)  # type: ignore[no-untyped-call]
        self.notifier.setServiceParent(self)  # type: ignore[no-untyped-call]

    def _makeExplainer(self, report: Report) -> Explainer:
        config = self._config
        return Explainer(
            self.cluster,
            applied=lambda: self.syncer.applied if self.syncer is not None else None,
            sync=report.sync,
            boundTo=self.balancer.boundTo,
            failing=self.failures.status,
            unserved=report.unserved,
            addresses=ownAddresses,
            sourceTowards=sourceTowards,
            userspace=config.mode == "userspace",
            masqueradeAll=config.masqueradeAll,
        )

    async def _chooseWriter(self) -> IRuleWriter:
        return await chooseWriter(writersOf(self._reactor, self._config))

    def _makeDataplane(self, writer: IRuleWriter, carriers: Carriers) -> IDataplane:
        config, reactor = self._config, self._reactor
        rules = self._rules = RulePlane(
            reactor, writer, flows=Flows(reactor, observe=self.metrics.upkeep.looked),
            changedOutside=self._changedOutside,
            claim=NamespaceClaim() if writer.place != "nowhere" else None,
        )
        return UserspaceDataplane(
            reactor, self.balancer, rules,
            makeTcp=carriers.makeTcp, makeUdp=carriers.makeUdp, addressOf=primaryAddress, observer=self.failures,
            ports=PortRange(*(config.portRange or (0, 0))),
        )

    # --- running

    def startService(self) -> None:
        """Start everything; returns at once."""
        super().startService()  # type: ignore[no-untyped-call]
        self.log.info("kproxy {version} starts on node {node}", version=__version__, node=self._config.nodeName)
        for source in self.sources:
            source.setServiceParent(self)  # type: ignore[no-untyped-call]
        self._reactor.callWhenRunning(catchSignals, self._reactor, lambda: self._stopping, self.cut)
        self._starting = Deferred.fromCoroutine(self._start())
        self._starting.addErrback(self._giveUp)

    async def _start(self) -> None:
        config = self._config
        writer = await self._chooseWriter()
        carriers = self._carriers = Carriers(self._reactor, config)
        dataplane = self._makeDataplane(writer, carriers)
        await dataplane.start()
        self.dataplane = dataplane
        if self._stopping:
            return
        if writer.place != "nowhere":
            self._kernel.apply()
        self.checks = HealthChecks(
            self._reactor, config.nodeName, lambda: self.health.health().healthy, self.events,
            budget=carriers.budget, answered=self.metrics.upkeep.answered,
        )
        self.metrics.upkeep.watchPorts(self.checks.counts)
        self.checks.setServiceParent(self)  # type: ignore[no-untyped-call]
        observer = _Observer(self.health, self.metrics, self.notifier, lambda: self._inForce(writer))
        listeners = Broadcast([self.metrics, self.balancer, dataplane, self.checks])
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
        if self.checks is not None:
            self.checks.stopping()
        self.addresses.stopService()
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
        if self._carriers is not None:
            await self._carriers.stop()
        await maybeDeferred(super().stopService)
        self.log.info("Stopped")

    def cut(self) -> None:
        """End draining now: what is still open is reset."""
        self._cutting = True
        if self.dataplane is not None:
            self.log.info("Cutting the connections that are still open")
            self.dataplane.stop(0).addErrback(lambda failure: self.log.failure("Cutting failed", failure))

    def _giveUp(self, failure: Failure) -> None:
        if self._stopping:
            return
        if failure.check(KproxyError):  # type: ignore[no-untyped-call]
            self.log.critical("kproxy cannot run: {error}", error=failure.getErrorMessage())
        else:
            self.log.failure("kproxy cannot run", failure)
        exitStatus(1)
        self._reactor.callWhenRunning(self._reactor.stop)

    # --- what happens meanwhile

    def _addressesChanged(self, addresses: Mapping[Family, str | None]) -> None:
        self.cluster.hostAddresses(filter(None, addresses.values()))
        if self.syncer is not None:
            self.syncer.resync()

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
        if active.place != "nowhere":
            self._kernel.apply()  # the first rules make the kernel track connections, where it did not yet
            warnOfLocalPorts(nodePortsOf(self.cluster.latest))
        makers = [plugin.find(IWriterMaker, name) for name in plugin.names(IWriterMaker)]
        others = [(maker.name, lambda maker=maker: maker.make(self._reactor)) for maker in makers]
        self._leftovers = removeLeftovers(active, others)
        node, name = self.cluster.node, self._config.nodeName
        self.events.record(
            # kubectl looks for events of a Node by its name in the place of its uid, too
            "Node", "", name, (node.metadata.uid if node is not None else None) or name,
            "Starting", "StartKproxy", f"kproxy {__version__} serves on this node",
        )

    def _nodesListed(self, source: str) -> None:
        """An API server that does not know our node: a wrong name, most of all, and then nothing is local."""
        byApi = any(it.name == source and it.type == "api" for it in self._config.sources)
        if byApi and self.cluster.node is None:
            self.log.warn(
                "Source {source} has no Node {node}: endpoints count as local by nodeName {node} alone, zone and "
                "podCIDRs of the node are not known, and /healthz says 503. If the node has another name there, set "
                "node-name in section [kproxy]",
                source=source, node=self._config.nodeName,
            )
            self.health.nodeChanged(None)

    def _quarantined(self) -> list[dict[str, str]]:
        """What is not in force as it is wanted: objects that cannot be read, service ports that have no rules."""
        ports = self._rules.unserved() if self._rules is not None else {}
        return [
            *self.cluster.quarantined(),
            *({"kind": "ServicePort", "key": name, "reason": why} for name, why in ports.items()),
        ]

    def _alive(self) -> bool:
        return self.syncer is None or self.syncer.outFor < STUCK_SECONDS


def makeProxyServer(reactor: Any, config: Config, environ: Mapping[str, str] = os.environ) -> ProxyServer:
    """
    The whole daemon, not yet running.

    :raise KproxyError: see :class:`ProxyServer`.
    """
    return ProxyServer(reactor, config, environ)
