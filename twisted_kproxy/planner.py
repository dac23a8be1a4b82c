"""
What a run would do, as text: the listeners, the rules, and what differs from what the kernel has now. Pure: whoever
asks has read sources and kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from msgspec import Struct

from .core.rules import Guard, Rule, Ruleset, Target, Verdict, deltaBetween
from .core.values import (
    Endpoint,
    Family,
    FrontendKey,
    Locality,
    PoolKind,
    PoolName,
    Problem,
    ServiceMap,
    ServicePort,
    ServicePortName,
)

#: What the rules would see of a service port whose pools are led to those sockets, and why it is not served, if so.
Redirect: TypeAlias = Callable[
    [ServicePort, Mapping[PoolKind, tuple[Endpoint, ...]], str | None], tuple[ServicePort, str | None]
]
#: Rules of a redirected map, and why those of some service ports cannot be made.
Render: TypeAlias = Callable[[ServiceMap], tuple[Ruleset, Mapping[ServicePortName, str]]]


class Listener(Struct, frozen=True):
    """
    A socket that would be opened.

    :ivar port: on which; a stand-in where ``known`` is false: any free port will do.
    :ivar endpoints: how many there are behind it.
    """

    pool: PoolName
    port: int
    known: bool
    endpoints: int


class Plan(Struct, frozen=True):
    """
    :ivar notServed: by service port, why.
    :ivar portRange: where listeners may be; ``None`` for anywhere.
    """

    listeners: tuple[Listener, ...]
    ruleset: Ruleset
    notServed: Mapping[ServicePortName, str]
    portRange: tuple[int, int] | None = None


class Planner:
    """
    :param poolsOf: the pools of a service port that need a socket.
    :param preferred: the port that a socket for one of its pools should have, by what the rules in force lead to;
        0 for any.
    :param redirect: see :data:`Redirect`. :param render: see :data:`Render`.
    :param addressOf: the node's own address of a family, where rules shall lead; ``None`` while it has none.
    :param portRange: where listeners may be; ``None`` for anywhere.
    """

    def __init__(
        self,
        *,
        poolsOf: Callable[[ServicePort], Iterable[PoolKind]],
        preferred: Callable[[ServicePort, PoolKind, Callable[[FrontendKey], Rule | None]], int],
        redirect: Redirect,
        render: Render,
        addressOf: Callable[[Family], str | None],
        portRange: tuple[int, int] | None = None,
    ) -> None:
        self._poolsOf = poolsOf
        self._preferred = preferred
        self._redirect = redirect
        self._render = render
        self._addressOf = addressOf
        self._range = portRange

    def plan(self, services: ServiceMap, found: Ruleset | None) -> Plan:
        """
        :param found: what is in force; ``None`` for nothing that can be understood.
        """
        listeners = list(self._listeners(services, found or Ruleset()))
        ports = {it.pool: it.port for it in listeners}
        notServed: dict[ServicePortName, str] = {}
        redirected: dict[ServicePortName, ServicePort] = {}
        for name, port in services.items():
            address = self._addressOf(name.family)
            targets = {
                kind: (Endpoint(address, ports[pool], isLocal=True, isSocket=True),)
                for kind in port.poolKinds()
                if (pool := PoolName(name, kind)) in ports and address is not None
            }
            redirected[name], why = self._redirect(port, targets, address)
            if why is not None:
                notServed[name] = why
        ruleset, refused = self._render(ServiceMap(redirected, locality=services.locality))
        return Plan(tuple(listeners), ruleset, {**notServed, **refused}, self._range)

    def _listeners(self, services: ServiceMap, found: Ruleset) -> Iterator[Listener]:
        """Ports that are taken over first, as a run does: what is left is given to the others."""
        needed = [
            PoolName(name, kind)
            for name in sorted(services)
            if self._addressOf(name.family) is not None
            for kind in self._poolsOf(services[name])
        ]
        taken: set[tuple[str, str, int]] = set()
        ports: dict[PoolName, int] = {}
        for pool in needed:
            port = self._preferred(services[pool.port], pool.kind, found.rules.get)
            claim = (pool.port.protocol, pool.port.family, port)
            inRange = self._range is None or self._range[0] <= port <= self._range[1]
            if port and inRange and claim not in taken:
                taken.add(claim)
                ports[pool] = port
        standIns = _StandIns(taken)
        for pool in needed:
            known = ports.get(pool)
            port = known or standIns.next(pool.port)
            yield Listener(pool, port, known is not None, len(services[pool.port].pool(pool.kind)))


class _StandIns:
    """Numbers for ports that the kernel will choose: from the top, and none that is known to be something else."""

    def __init__(self, taken: set[tuple[str, str, int]]) -> None:
        self._taken = taken
        self._last: dict[tuple[str, str], int] = {}

    def next(self, name: ServicePortName) -> int:
        """A number of its own; 1 once there are more sockets than ports."""
        kind = (name.protocol, name.family)
        port = self._last.get(kind, 65536) - 1
        while (*kind, port) in self._taken:
            port -= 1
        self._last[kind] = port
        return max(port, 1)


class PlanText:
    """
    A plan as lines for people, in an order that only depends on what there is.

    :param found: what the kernel has; ``None`` for nothing that can be understood.
    :param uncompared: why it is not known what the kernel has; empty where it is.
    """

    def __init__(self, plan: Plan, found: Ruleset | None = None, uncompared: str = "") -> None:
        self._plan = plan
        self._found = found
        self._uncompared = uncompared
        self._unknown = {
            Guard(it.pool.port.family, it.pool.port.protocol, it.port): it.pool
            for it in plan.listeners
            if not it.known
        }

    def lines(self, problems: Iterable[Problem] = (), unread: Iterable[str] = ()) -> Iterator[str]:
        """
        :param problems: what is not served of objects, and which wait for what others own.
        :param unread: what cannot be read, and so is not in the plan.
        """
        plan, ruleset = self._plan, self._plan.ruleset
        yield from _section("Problems", [*unread, *(f"{it.kind} {it.key}: {it.reason}" for it in sorted(problems))])
        yield from _section("Listeners", [self._listener(it) for it in plan.listeners])
        yield from _section("Rules", [f"{_shown(key)} {self._rule(key, rule)}" for key, rule in _sorted(ruleset.rules)])
        yield from _section("Guarded ports", [self._guard(it) for it in sorted(ruleset.guards)])
        yield from _section("ClusterIPs", sorted(ruleset.clusterIPs))
        yield "Addresses:"
        yield from (f"  {line}" for line in _locality(ruleset.locality))
        notServed = [f"{name}: {why}" for name, why in sorted(plan.notServed.items())]
        yield from _section("Not served", [*notServed, *self._crowded()])
        yield from self._comparison()

    def _crowded(self) -> Iterator[str]:
        """Where there are more listeners than ports: who gets one is only known once they are opened."""
        if self._plan.portRange is None:
            return
        first, last = self._plan.portRange
        counts = Counter((it.pool.port.protocol, it.pool.port.family) for it in self._plan.listeners)
        for (protocol, family), count in sorted(counts.items()):
            if count > last - first + 1:
                some = f"{count - (last - first + 1)} of {count} listeners for {protocol}/{family}"
                yield f"{some}: port-range {first}-{last} has no more ports; widen it"

    def _comparison(self) -> Iterator[str]:
        if self._uncompared:
            yield f"Not compared with the kernel: {self._uncompared}"
            return
        if self._found is None:
            what = "all are written anew" if self._plan.ruleset.rules else "a table without rules is written"
            yield f"The kernel has no rules of kproxy, or none that can be understood: {what}"
        found, wanted = self._found or Ruleset(), self._plan.ruleset
        differences = self._differences(found, wanted)
        yield from _section("Different in the kernel", [f"{sign} {text}" for sign, text in differences])
        counts = {sign: sum(it[0] == sign for it in differences) for sign in "+~-"}
        if differences:
            yield f"{counts['+']} to add, {counts['~']} to change, {counts['-']} to remove"
        elif self._found is not None:
            yield "nothing to do"

    def _differences(self, found: Ruleset, wanted: Ruleset) -> list[tuple[str, str]]:
        """A sign and what it is about; ``~`` for what is there and has to be another."""
        delta = deltaBetween(found, wanted)
        lines: list[tuple[str, str]] = []
        for key in sorted(delta.rules):
            before, after = found.rules.get(key), delta.rules[key]
            if after is None and before is not None:
                lines.append(("-", f"{_shown(key)} {self._rule(key, before, old=True)}"))
            elif after is not None and before is None:
                lines.append(("+", f"{_shown(key)} {self._rule(key, after)}"))
            elif after is not None and before is not None:
                was = self._rule(key, before, old=True)
                lines.append(("~", f"{_shown(key)} {self._rule(key, after)}; it is {was}"))
        lines += [("+", f"guarded port {self._guard(it)}") for it in sorted(delta.guardsAdded)]
        lines += [("-", f"guarded port {_plainGuard(it)}") for it in sorted(delta.guardsRemoved)]
        lines += [("+", f"ClusterIP {it}") for it in sorted(delta.clusterIPsAdded)]
        lines += [("-", f"ClusterIP {it}") for it in sorted(delta.clusterIPsRemoved)]
        if delta.locality is not None:
            for now, was in zip(_locality(delta.locality), _locality(found.locality), strict=True):
                if now != was:
                    lines.append(("~", f"{now}; it is {was.partition(': ')[2]}"))
        return lines

    def _listener(self, it: Listener) -> str:
        where = f"port {it.port}, where the rules lead now" if it.known else self._anyPort()
        return f"{it.pool}: {where}; {it.endpoints} endpoint{'s' if it.endpoints != 1 else ''}"

    def _anyPort(self) -> str:
        return "any free port" if self._plan.portRange is None else "a free port of {}-{}".format(*self._plan.portRange)

    def _guard(self, it: Guard) -> str:
        if it in self._unknown:
            return f"{self._anyPort()}, for {self._unknown[it]}"
        return _plainGuard(it)

    def _rule(self, key: FrontendKey, rule: Rule, old: bool = False) -> str:
        """:param old: it is in the kernel; its ports are no stand-ins."""
        inside, outside = (self._verdict(key, it, old) for it in (rule.inside, rule.outside))
        text = outside if rule.inside == rule.outside else f"inside {inside}, outside {outside}"
        if rule.sources is None:
            return text
        return f"{text}, only from {', '.join(rule.sources) or 'nobody'}"

    def _verdict(self, key: FrontendKey, verdict: Verdict, old: bool) -> str:
        if not isinstance(verdict, Target):
            return verdict
        if not old and Guard(key.family, key.protocol, verdict.port) in self._unknown:
            return f"-> {verdict.address}, {self._anyPort()}"
        return f"-> {Endpoint(verdict.address, verdict.port)}"


def _shown(key: FrontendKey) -> str:
    """An address tells its family; a node port is one of each family's."""
    return str(key) if key.address else f"{key}/{key.family}"


def _plainGuard(it: Guard) -> str:
    return f"{it.port}/{it.protocol}/{it.family}"


def _sorted(rules: Mapping[FrontendKey, Rule]) -> list[tuple[FrontendKey, Rule]]:
    return sorted(rules.items(), key=lambda it: it[0])


def _locality(it: Locality) -> list[str]:
    return [
        f"pod networks: {', '.join(it.insiders) or 'none'}",
        f"interfaces of pods: {', '.join(it.insiderLinks) or 'none'}",
        f"node ports at: {', '.join(it.nodePorts) or 'none'}",
        f"service networks: {', '.join(it.services) or 'none'}",
    ]


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Nothing at all where there is nothing to tell."""
    known = list(lines)
    if known:
        yield f"{title} ({len(known)}):"
        yield from (f"  {line}" for line in known)
