"""What the rule plane reckons with, and what it needs of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Protocol, TypeVar

from twisted.internet.defer import Deferred

from ..core.rules import Delta, Guard, Rule, Ruleset, Target
from ..core.values import FrontendKey, Locality, ServiceMap, ServicePortName
from .ruleset import CannotRender, Fragment, Held, fragment
from .slices import Slices, finish

_K = TypeVar("_K")
_V = TypeVar("_V")


class Claim(Protocol):
    """The right to write rules here, which one daemon has at a time."""

    def take(self) -> None:
        """:raise NotAvailable: where another one has it."""

    def release(self) -> None:
        """Give it back; twice is harmless."""


class FlowRemover(Protocol):
    """Makes the kernel forget where established UDP flows were led."""

    def forget(self, stale: Mapping[FrontendKey, frozenset[Target]], nodePorts: Sequence[str]) -> Deferred[int]:
        """
        Delete the flows to each frontend but those that are led to one of its targets.

        :param nodePorts: the networks in which addresses of this node serve node ports.
        :return: fires with how many were deleted.
        """

    def reconcile(
        self, led: Mapping[FrontendKey, frozenset[Target]], own: Collection[Target], nodePorts: Sequence[str]
    ) -> Deferred[int]:
        """
        The same for every frontend, and for flows that are led to ``own`` from where nothing leads there any more.

        :return: fires with how many were deleted.
        """


def joining(
    fragments: Mapping[ServicePortName, Fragment], yielding: Collection[ServicePortName]
) -> Slices[tuple[dict[FrontendKey, Rule], Counter[Held]]]:
    """
    The rules of all, and how many need each of the things held.

    :param yielding: names whose frontends belong to whoever else has them.
    """
    rules: dict[FrontendKey, Rule] = {}
    held: Counter[Held] = Counter()
    for name in yielding:
        if name in fragments:
            rules.update(fragments[name].rules)
    for name, it in fragments.items():
        if name not in yielding:
            rules.update(it.rules)
        held.update(it.held)
        yield
    return rules, held


def rulesetOf(rules: Mapping[FrontendKey, Rule], held: Iterable[Held], locality: Locality) -> Ruleset:
    """What is desired, of rules and what service ports hold."""
    guards, clusterIPs = _apart(held)
    return Ruleset(rules, guards, clusterIPs, locality)


def rendered(services: ServiceMap) -> tuple[Ruleset, dict[ServicePortName, str]]:
    """The rules of a whole map at once, and why those of some service ports cannot be made."""
    fragments: dict[ServicePortName, Fragment] = {}
    refused: dict[ServicePortName, str] = {}
    for name, port in services.items():
        try:
            fragments[name] = fragment(port)
        except CannotRender as error:
            refused[name] = str(error)
    rules, held = finish(joining(fragments, ()))
    return rulesetOf(rules, held, services.locality), refused


def deltaOf(
    rules: Mapping[FrontendKey, Rule | None],
    added: Iterable[Held],
    removed: Iterable[Held] = (),
    locality: Locality | None = None,
) -> Delta:
    """A step, of rules and what service ports hold from now on, or no more."""
    guardsAdded, clusterIPsAdded = _apart(added)
    guardsRemoved, clusterIPsRemoved = _apart(removed)
    return Delta(rules, guardsAdded, guardsRemoved, clusterIPsAdded, clusterIPsRemoved, locality)


def _apart(held: Iterable[Held]) -> tuple[frozenset[Guard], frozenset[str]]:
    guards: set[Guard] = set()
    clusterIPs: set[str] = set()
    for it in held:
        if isinstance(it, Guard):
            guards.add(it)
        else:
            clusterIPs.add(it)
    return frozenset(guards), frozenset(clusterIPs)


def differing(found: Ruleset, wanted: Ruleset) -> Slices[Delta]:
    """The step from one ruleset to another; see :func:`~twisted_kproxy.core.rules.deltaBetween`."""
    rules: dict[FrontendKey, Rule | None] = {}
    for key, rule in wanted.rules.items():
        if found.rules.get(key) != rule:
            rules[key] = rule
        yield
    for key in found.rules:
        if key not in wanted.rules:
            rules[key] = None
        yield
    return Delta(
        rules,
        guardsAdded=wanted.guards - found.guards,
        guardsRemoved=found.guards - wanted.guards,
        clusterIPsAdded=wanted.clusterIPs - found.clusterIPs,
        clusterIPsRemoved=found.clusterIPs - wanted.clusterIPs,
        locality=wanted.locality if found.locality != wanted.locality else None,
    )


def updating(known: MutableMapping[_K, _V], step: Mapping[_K, _V | None]) -> Slices[None]:
    """Take over what has changed; ``None`` for what is gone."""
    for key, value in step.items():
        if value is None:
            known.pop(key, None)
        else:
            known[key] = value
        yield
