"""
Rules as values: what the kernel shall do with packets for service addresses. Made from a service map by the rule
plane, put into the kernel by an :class:`~twisted_kproxy.interfaces.IRuleWriter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from .values import Family, FrontendKey, Locality, Protocol

#: The bit of a packet's mark (``SO_MARK``, :manpage:`socket(7)`) that says: the proxy itself sends this to an
#: endpoint. No rule of ours rewrites or refuses such a packet. An endpoint whose address and port are a frontend as
#: well (a pod of the host's network behind an external IP that is the node's address; an Endpoints object that names a
#: ClusterIP) would otherwise lead the proxy's own connection back to the proxy, for ever.
#:
#: One bit, so that those of others stay: 14 and 15 are of Kubernetes (masquerade, drop), 16 to 31 of Calico, Weave Net
#: and Tailscale, 0 to 12 of Cilium and the AWS CNI, and the lowest byte is what administrators use in their routing
#: rules. Bit 13 has one other user, the portmap plug-in of CNI, who masquerades what carries it: packets that leave
#: with an address of the node already, so that is harmless; and what portmap marks itself it has rewritten by then.
PROXY_MARK = 0x2000


class Target(Struct, frozen=True, order=True, gc=False):
    """Rewrite the destination to this address and port of the node itself."""

    address: str
    port: int


#: ``reject`` answers at once (ICMP port unreachable); ``drop`` says nothing, so that the client tries again.
Verdict: TypeAlias = Target | Literal["reject", "drop"]


class Rule(Struct, frozen=True, gc=False):
    """
    What happens to new connections to one frontend.

    :ivar outside: those of everybody else.
    :ivar inside: those of the node itself and of pods, as :attr:`Ruleset.locality` has it.
    :ivar sources: networks that either of the two is for, canonical, sorted and apart from each other; packets of all
        others are dropped. ``None`` for no such restriction. Node ports have none.
    """

    outside: Verdict
    inside: Verdict
    sources: tuple[str, ...] | None = None


def portInForce(rule: Rule | None) -> int | None:
    """
    The local port to which a rule leads, ``None`` where it leads nowhere. Where insiders and outsiders are led to two
    ports, that of the outsiders counts.
    """
    for verdict in (rule.outside, rule.inside) if rule is not None else ():
        if isinstance(verdict, Target):
            return verdict.port
    return None


class Guard(Struct, frozen=True, order=True, gc=False):
    """A port of the proxy itself: only what was led there by a rule may reach it."""

    family: Family
    protocol: Protocol
    port: int


class Ruleset(Struct, frozen=True):
    """
    The whole desired (or found) state of our part of the kernel's rules.

    :ivar clusterIPs: addresses that Services have: what is sent to one of them, by whatever protocol, and no rule
        leads anywhere is refused.
    """

    rules: Mapping[FrontendKey, Rule] = {}
    guards: frozenset[Guard] = frozenset()
    clusterIPs: frozenset[str] = frozenset()
    locality: Locality = Locality()


class Delta(Struct, frozen=True):
    """
    The step from one ruleset to the next.

    :ivar rules: key → rule, or ``None`` where the rule goes. A key that changes owner is in here once.
    """

    rules: Mapping[FrontendKey, Rule | None] = {}
    guardsAdded: frozenset[Guard] = frozenset()
    guardsRemoved: frozenset[Guard] = frozenset()
    clusterIPsAdded: frozenset[str] = frozenset()
    clusterIPsRemoved: frozenset[str] = frozenset()
    locality: Locality | None = None

    def __bool__(self) -> bool:
        sets = (self.rules, self.guardsAdded, self.guardsRemoved, self.clusterIPsAdded, self.clusterIPsRemoved)
        return any(sets) or self.locality is not None


def deltaBetween(old: Ruleset, new: Ruleset) -> Delta:
    """What has to change for ``old`` to become ``new``."""
    rules: dict[FrontendKey, Rule | None] = {key: rule for key, rule in new.rules.items() if old.rules.get(key) != rule}
    rules.update((key, None) for key in old.rules if key not in new.rules)
    return Delta(
        rules=rules,
        guardsAdded=new.guards - old.guards,
        guardsRemoved=old.guards - new.guards,
        clusterIPsAdded=new.clusterIPs - old.clusterIPs,
        clusterIPsRemoved=old.clusterIPs - new.clusterIPs,
        locality=new.locality if new.locality != old.locality else None,
    )


def applied(old: Ruleset, delta: Delta) -> Ruleset:
    """``old`` after ``delta``."""
    rules = dict(old.rules)
    for key, rule in delta.rules.items():
        if rule is None:
            rules.pop(key, None)
        else:
            rules[key] = rule
    return Ruleset(
        rules=rules,
        guards=(old.guards - delta.guardsRemoved) | delta.guardsAdded,
        clusterIPs=(old.clusterIPs - delta.clusterIPsRemoved) | delta.clusterIPsAdded,
        locality=old.locality if delta.locality is None else delta.locality,
    )
