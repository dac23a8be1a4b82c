"""
``--plan``: read the sources once, and the kernel where that may be, and say what a run would do. Writes nothing, opens
no socket that anybody could reach, and takes nothing from a daemon that runs beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred

from .assembly import makeSources, writersOf
from .cluster import Cluster
from .config import Config, FilesOptions, nodeSettings
from .core.rules import Ruleset
from .core.values import FAMILIES, Family
from .interfaces import IRuleWriter, ISource, KproxyError, NotAvailable
from .netfilter.choose import chooseWriter
from .netfilter.node import primaryAddress
from .netfilter.planning import rendered
from .planner import Planner, PlanText
from .redaction import redacted
from .userspace.redirect import planned, poolsOf, preferred

#: so long sources may take to say what there is, in seconds
READING_SECONDS = 30.0
KEPT = "a daemon that runs keeps its last good content"
#: ends the name of what is only a part of a file: of that there may never have been a good version
_LINE = re.compile(r":\d+\Z")
MakeSources = Callable[[Any, Config, Cluster], Iterable[ISource]]
ChooseWriter = Callable[[Any, Config], "Deferred[IRuleWriter]"]


def _chosen(reactor: Any, config: Config) -> Deferred[IRuleWriter]:
    return chooseWriter(writersOf(reactor, config))


def plan(
    reactor: Any,
    config: Config,
    mayRead: bool,
    *,
    sources: MakeSources = makeSources,
    choose: ChooseWriter = _chosen,
    addressOf: Callable[[Family], str | None] = primaryAddress,
    seconds: float = READING_SECONDS,
) -> Deferred[tuple[list[str], list[str]]]:
    """
    :param mayRead: this process may read the kernel's rules.
    :param sources: makes the sources, which speak to the cluster that they are given.
    :param choose: gives the rule writer that a run would use, probed.
    :param seconds: how long the sources may take.
    :return: fires with the plan as lines, and with what of the sources is not in it since it cannot be read; fails with
        :class:`~twisted_kproxy.interfaces.KproxyError` where a whole source cannot be read.
    """
    return Deferred.fromCoroutine(_plan(reactor, config, mayRead, sources, choose, addressOf, seconds))


async def _plan(
    reactor: Any,
    config: Config,
    mayRead: bool,
    sources: MakeSources,
    choose: ChooseWriter,
    addressOf: Callable[[Family], str | None],
    seconds: float,
) -> tuple[list[str], list[str]]:
    for it in config.sources:
        if isinstance(it, FilesOptions) and not os.access(it.path, os.R_OK):  # who asks for a plan will not wait for it
            why = "cannot be read" if os.path.exists(it.path) else "does not exist"
            raise KproxyError(f"[source:{it.name}] path = {it.path}: {why}; {KEPT}")
    addresses = {family: addressOf(family) for family in FAMILIES}
    cluster = Cluster(config.nodeName, config.proxyName, nodeSettings(config))
    cluster.hostAddresses(it for it in addresses.values() if it is not None)
    unread = await _read(reactor, cluster, list(sources(reactor, config, cluster)), seconds)
    writer, found, uncompared = await _inForce(reactor, config, mayRead, choose)
    planner = Planner(
        poolsOf=poolsOf,
        preferred=preferred,
        redirect=planned,
        render=rendered,
        addressOf=lambda family: addresses[family],
        portRange=config.portRange,
    )
    text = PlanText(planner.plan(cluster.current(), found), found, uncompared)
    lines = [f"Plan for node {config.nodeName}, mode {config.mode}, rules by {writer}"]
    if cluster.node is None and any(it.type == "api" for it in config.sources):
        lines.append(
            f"No source has a Node {config.nodeName}: endpoints count as local by nodeName {config.nodeName} alone, "
            "and zone and podCIDRs of the node are not known"
        )
    unreadable = [f"{it['kind']} {it['key']} cannot be read: {it['reason']}" for it in cluster.quarantined()]
    told = [f"{it} ({KEPT})" if isWhole else it for it, isWhole in unread]
    lines += text.lines(cluster.problems(), [*told, *unreadable])
    return lines, [f"kproxy: not in the plan: {it}" for it, _ in unread]


async def _read(reactor: Any, cluster: Cluster, sources: list[ISource], seconds: float) -> list[tuple[str, bool]]:
    """
    :return: what is at fault though all has been read, and whether that is a whole file, folder or kind.
    :raise KproxyError: naming what could not be read in time, and what the sources say of it.
    """
    done: Deferred[None] = Deferred()
    timer = reactor.callLater(seconds, done.callback, None)

    def changed() -> None:
        if cluster.synced and timer.active():
            timer.reset(0)  # a source must not be stopped while it speaks

    for source in sources:
        cluster.expect(source.name, source.kinds)
    cluster.changed = changed
    changed()  # where there is nothing to read
    try:
        for source in sources:
            source.startService()  # type: ignore[no-untyped-call]
        await done
        if not cluster.synced:
            missing = ", ".join(cluster.missing)
            said = [f"within {seconds:g} s these could not be read: {missing}", *(it for it, _ in _faultsOf(sources))]
            raise KproxyError("\n".join(said))
        return _faultsOf(sources)
    finally:
        if timer.active():
            timer.cancel()
        for source in sources:
            await maybeDeferred(source.stopService)


def _faultsOf(sources: Iterable[ISource]) -> list[tuple[str, bool]]:
    return [
        (f"{source.name}: {what}: {why}", _LINE.search(what) is None)
        for source in sources
        for what, why in source.faults().items()
    ]


async def _inForce(
    reactor: Any, config: Config, mayRead: bool, choose: ChooseWriter
) -> tuple[str, Ruleset | None, str]:
    """The writer's name, what the kernel has, and why that is not known, if so."""
    if not mayRead:
        return config.writer, None, "that needs root, or the capability CAP_NET_ADMIN"
    try:
        writer = await choose(reactor, config)
    except NotAvailable as error:
        return config.writer, None, redacted(str(error))
    try:
        if writer.place == "nowhere":
            return writer.name, None, f"writer {writer.name} writes no rules"
        return writer.name, await writer.adopt(), ""
    except KproxyError as error:
        return writer.name, None, f"its rules cannot be read: {redacted(str(error))}"
    finally:
        await writer.close()
