"""When established UDP flows are compared with the rules, and with which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twisted.logger import Logger

from ..core.changes import Update
from ..core.rules import Delta, Rule, Ruleset, Target
from ..core.values import FrontendKey
from .planning import FlowRemover
from .slices import Slices, inSlices


def targetsOf(rule: Rule | None) -> frozenset[Target]:
    """Where a rule leads."""
    verdicts = () if rule is None else (rule.outside, rule.inside)
    return frozenset(it for it in verdicts if isinstance(it, Target))


def leading(rules: Mapping[FrontendKey, Rule]) -> Slices[dict[FrontendKey, frozenset[Target]]]:
    """Where each UDP frontend leads."""
    led: dict[FrontendKey, frozenset[Target]] = {}
    for key, rule in rules.items():
        if key.protocol == "UDP":
            led[key] = targetsOf(rule)
        yield
    return led


class FlowKeeper:
    """
    Has UDP flows forgotten that the kernel leads where they no longer belong; always after the rules are in, never
    before. A failure costs the flows, not the update.

    A step of the rules tells whose flows are stale. Whatever else there may be (of an earlier run, of an update that
    broke off, of rules that others have changed) is found by a look at all flows, once everything was compared.

    :param flows: does it; ``None`` for nobody.
    :ivar forgotten: how many flows, ever.
    """

    log = Logger()

    def __init__(self, reactor: Any, flows: FlowRemover | None) -> None:
        self._reactor = reactor
        self._flows = flows
        self._doubt = True  # there may be stale flows that no step tells of
        self._former: frozenset[Target] = frozenset()
        self.forgotten = 0

    def doubt(self) -> None:
        """Something went wrong: with the next full comparison all flows are looked at."""
        self._doubt = True

    async def found(self, rules: Mapping[FrontendKey, Rule]) -> None:
        """These rules were in force, left by an earlier run or changed by others. Flows may still be led by them."""
        self._former = self._former.union(*(await self._leading(rules)).values())

    async def follow(
        self,
        update: Update,
        written: Delta | Ruleset | None,
        rules: Mapping[FrontendKey, Rule],
        nodePorts: Sequence[str],
        whole: bool,
    ) -> None:
        """
        An update is in force.

        :param written: what was written for it.
        :param rules: all that are in force.
        :param nodePorts: the networks in which addresses of this node serve node ports.
        :param whole: everything was compared.
        """
        if self._flows is None:
            return
        keys = {flow.key for flow in update.staleFlows}
        if written is not None:
            keys.update(key for key in written.rules if key.protocol == "UDP")
            self._doubt = self._doubt or whole
        everything = whole and self._doubt
        if not keys and not everything:
            return
        stale = {key: targetsOf(rules.get(key)) for key in keys}
        try:
            if everything:
                led = await self._leading(rules)
                own = self._former.union(*led.values())
                count = await self._flows.reconcile({**stale, **led}, own, nodePorts)
                self._doubt, self._former = False, frozenset()
            else:
                count = await self._flows.forget(stale, nodePorts)
        except Exception as error:
            self._doubt = True
            self.log.warn(
                "Stale UDP flows could not be forgotten: {error}. It is tried again with the next full comparison.",
                error=error,
            )
            return
        self._count(count)

    async def end(self, rules: Mapping[FrontendKey, Rule], nodePorts: Sequence[str]) -> None:
        """
        The rules are gone, and the sockets that they led to are about to close: so are the flows. Whoever comes next
        would find nothing that tells of them.
        """
        own: frozenset[Target] = frozenset().union(*(await self._leading(rules)).values())
        if self._flows is None or not own:
            return
        try:
            self._count(await self._flows.reconcile({}, own, nodePorts))
        except Exception as error:
            self.log.warn("UDP flows to our sockets could not be forgotten: {error}.", error=error)

    async def _leading(self, rules: Mapping[FrontendKey, Rule]) -> dict[FrontendKey, frozenset[Target]]:
        return await inSlices(self._reactor, leading(rules))

    def _count(self, count: int) -> None:
        self.forgotten += count
        if count:
            self.log.info("{count} stale UDP flows were forgotten.", count=count)
