"""What the rule plane reckons with, and what it needs of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, MutableMapping
from typing import Protocol, TypeVar

from twisted.internet.defer import Deferred

from ..core.rules import Delta, Guard, Rule, Ruleset, Target
from ..core.values import FrontendKey, ServicePortName
from .ruleset import Fragment
from .slices import Slices

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

    def forget(self, stale: Mapping[FrontendKey, frozenset[Target]]) -> Deferred[int]:
        """
        Delete the flows to each frontend but those that are led to one of its targets.

        :return: fires with how many were deleted.
        """


def joining(
    fragments: Mapping[ServicePortName, Fragment], yielding: Collection[ServicePortName]
) -> Slices[tuple[dict[FrontendKey, Rule], Counter[Guard]]]:
    """
    The rules and guards of all.

    :param yielding: names whose frontends belong to whoever else has them.
    """
    rules: dict[FrontendKey, Rule] = {}
    guards: Counter[Guard] = Counter()
    for name in yielding:
        if name in fragments:
            rules.update(fragments[name].rules)
    for name, fragment in fragments.items():
        if name not in yielding:
            rules.update(fragment.rules)
        guards.update(fragment.guards)
        yield
    return rules, guards


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
    insiders = wanted.insiders if found.insiders != wanted.insiders else None
    return Delta(rules, wanted.guards - found.guards, found.guards - wanted.guards, insiders)


def updating(known: MutableMapping[_K, _V], step: Mapping[_K, _V | None]) -> Slices[None]:
    """Take over what has changed; ``None`` for what is gone."""
    for key, value in step.items():
        if value is None:
            known.pop(key, None)
        else:
            known[key] = value
        yield
