"""
Parts made from a configuration. This module and :mod:`.server` are the only ones that know concrete classes; here is
what a plan, a run and a clean-up have in common, and what carries bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred

from . import plugin
from .config import Config
from .core.rules import Ruleset, Target
from .core.values import EVERYWHERE, PoolName
from .core.wording import counted
from .interfaces import (
    IChannel,
    ILoadBalancer,
    IProxier,
    IRuleWriter,
    ISource,
    ISourceMaker,
    ITrafficObserver,
    IWriterMaker,
    KproxyError,
    NotAvailable,
)
from .netfilter.claim import NamespaceClaim
from .netfilter.flows.conntrack import Flows
from .netfilter.planning import Claim
from .userspace.accesslog import AccessLog
from .userspace.dial import Dialer
from .userspace.engines.choose import makeEngines
from .userspace.engines.poller import Poller
from .userspace.ports import Budget, raiseLimit
from .userspace.tcp import TcpProxier
from .userspace.udp import UdpProxier

#: in order of preference; others are chosen by name only
AUTOMATIC_WRITERS = ("nftables", "python-iptables", "iptables")
#: of the file descriptors for connections, what UDP flows may take
UDP_SHARE = 0.5


def makeSources(reactor: Any, config: Config, channel: IChannel) -> Iterator[ISource]:
    """
    What the configuration names, in order; none is running.

    :raise KproxyError: where one cannot be made.
    """
    for options in config.sources:
        maker = plugin.find(ISourceMaker, options.type)
        source: ISource = maker.make(
            reactor, options.name, options, channel, nodeName=config.nodeName, proxyName=config.proxyName
        )
        yield source


def writersOf(reactor: Any, config: Config) -> list[tuple[str, Callable[[], IRuleWriter]]]:
    """By name, what makes each of the rule writers that the configuration lets choose from."""
    names = AUTOMATIC_WRITERS if config.writer == "auto" else (config.writer,)
    return [(name, partial(plugin.find(IWriterMaker, name).make, reactor)) for name in names]


class Carriers:
    """
    What serves clients in userspace mode: makes a proxier for each pool, and holds what all of them share.

    :ivar budget: file descriptors.
    :raise NotAvailable: where the configured engine cannot be had.
    """

    def __init__(self, reactor: Any, config: Config) -> None:
        self._reactor = reactor
        self._config = config
        raiseLimit()
        self.budget = Budget(reactor)
        self._forFlows = self.budget.share(UDP_SHARE)
        poller = Poller(reactor)
        self._dialer = Dialer(reactor, poller)
        self._relay, self._sockets = makeEngines(
            reactor, poller, config.engine, config.nativeThread, config.workers
        )
        self._accessLog = AccessLog(reactor, config.accessLog) if config.accessLog else None
        if self._accessLog is not None:
            self._accessLog.open()

    def makeTcp(self, reactor: Any, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> IProxier:
        """A proxier for a pool of a TCP service port."""
        proxier: IProxier = TcpProxier(
            reactor, pool, balancer, observer,
            relay=self._relay, dialer=self._dialer, budget=self.budget,
            connectTimeouts=self._config.connectTimeouts, accessLog=self._accessLog,
        )
        return proxier

    def makeUdp(self, reactor: Any, pool: PoolName, balancer: ILoadBalancer, observer: ITrafficObserver) -> IProxier:
        """The same for UDP."""
        proxier: IProxier = UdpProxier(
            reactor, pool, balancer, observer,
            idleTimeout=self._config.udpIdleTimeout, budget=self._forFlows, sockets=self._sockets,
        )
        return proxier

    def status(self) -> Mapping[str, Any]:
        """What carries the bytes of TCP connections, and the access log, say of themselves."""
        shown = dict(self._relay.status())
        if self._accessLog is not None:
            shown["accessLog"] = {"path": self._config.accessLog, "dropped": self._accessLog.dropped}
        return shown

    async def stop(self) -> None:
        """Let go of what they share, once every proxier is drained: processes, threads, files."""
        await self._relay.stop()
        if self._accessLog is not None:
            await self._accessLog.close()


async def _cleanup(reactor: Any, claim: Claim) -> list[str]:
    try:
        claim.take()  # nor does one start meanwhile
    except NotAvailable as error:
        raise KproxyError(f"{error}: as it ends (systemctl stop kproxy) it removes its rules itself") from error
    try:
        return await _removeAll(reactor)
    finally:
        claim.release()


async def _removeAll(reactor: Any) -> list[str]:
    said: list[str] = []
    led: set[Target] = set()
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
            led |= await _targets(writer)
            said.append(f"{name}: {'rules removed' if await writer.cleanup() else 'nothing to remove'}")
        except NotAvailable as error:
            said.append(f"{name}: cannot have left anything here ({error})")
        except KproxyError as error:
            faults.append(f"{name}: {error}")
        finally:
            await writer.close()
    if led:
        # Their clients would go on to sockets that nobody has any more.
        try:
            count = await Flows(reactor).reconcile({}, frozenset(led), EVERYWHERE)
        except KproxyError as error:
            faults.append(f"UDP flows to sockets of kproxy could not be forgotten: {error}")
        else:
            said += [f"{counted(count, 'UDP flow')} to sockets of kproxy forgotten"] if count else []
    if faults:
        raise KproxyError("\n".join(faults + said))
    return said


async def _targets(writer: IRuleWriter) -> set[Target]:
    """Where its UDP rules lead; nothing where they cannot be read."""
    try:
        found: Ruleset | None = await writer.adopt()
    except KproxyError:
        return set()
    rules = found.rules.items() if found is not None else ()
    verdicts = (it for key, rule in rules if key.protocol == "UDP" for it in (rule.outside, rule.inside))
    return {it for it in verdicts if isinstance(it, Target)}


def cleanup(reactor: Any, claim: Claim | None = None) -> Deferred[list[str]]:
    """
    Remove every rule of ours, of every writer, and nothing else; not beside a daemon, which would write its own again.

    :param claim: held meanwhile; instead of that of this network namespace.
    :return: fires with a line for each writer; fails with :class:`~twisted_kproxy.interfaces.KproxyError` where rules
        could not be removed, or a daemon is at work.
    """
    return Deferred.fromCoroutine(_cleanup(reactor, claim if claim is not None else NamespaceClaim()))
