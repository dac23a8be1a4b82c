"""``/explain``: what becomes of a request, and why, put together from what each part knows of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from .core import wire
from .core.explain import Explanation, Fate, explain
from .core.flows import Decision, Flow, Frontends, Origin, anybody, decide, originOf, serve
from .core.question import Dialled, Question, ServiceAsked
from .core.topology import NodeFacts
from .core.values import (
    Endpoint,
    Family,
    FrontendKey,
    PoolKind,
    PoolName,
    Problem,
    ServiceMap,
    ServicePort,
    ServicePortName,
)

_NUMBER = re.compile(r"[0-9]{1,5}")
_ANYWHERE: dict[Family, str] = {"IPv4": "0.0.0.0", "IPv6": "::"}
_WORDS = {
    "masquerade-all": "masquerade-all is set",
    "off-cluster": "the client is no pod",
    "external": "the traffic policy is Cluster, so that the endpoint may be elsewhere",
    "node": "the client is the node itself",
}


class _Cluster(Protocol):
    @property
    def latest(self) -> ServiceMap: ...
    @property
    def facts(self) -> NodeFacts: ...
    def objectsOf(self, namespace: str, name: str) -> tuple[wire.Service | None, list[wire.EndpointSlice]]: ...
    def unserved(self, namespace: str, name: str) -> str | None: ...
    def problems(self) -> list[Problem]: ...
    def pending(self) -> dict[str, dict[str, str]]: ...


class Explainer:
    """
    :param applied: gives the map that is in force, ``None`` before there is one; ``sync`` the facts about that for
        people.
    :param boundTo: says where affinity leads a client of a pool.
    :param failing: says which of some endpoints of a service port have failed and not answered since.
    :param unserved: gives the names of service ports that the dataplane does not serve as it should → why.
    :param addresses: gives the addresses of this node, canonical.
    :param sourceTowards: gives the address from which this node talks to another, ``None`` where there is no way.
    :param userspace: a proxy dials endpoints; else the kernel leads clients there.
    """

    def __init__(
        self,
        cluster: _Cluster,
        *,
        applied: Callable[[], ServiceMap | None],
        sync: Callable[[], Mapping[str, Any]],
        boundTo: Callable[[PoolName, str], Endpoint | None],
        failing: Callable[[ServicePortName, tuple[Endpoint, ...]], Mapping[str, Any]],
        unserved: Callable[[], Mapping[str, str]],
        addresses: Callable[[], Collection[str]],
        sourceTowards: Callable[[str], str | None],
        userspace: bool = True,
        masqueradeAll: bool = False,
    ) -> None:
        self._cluster = cluster
        self._applied = applied
        self._sync = sync
        self._boundTo = boundTo
        self._failing = failing
        self._unserved = unserved
        self._addresses = addresses
        self._sourceTowards = sourceTowards
        self._userspace = userspace
        self._masqueradeAll = masqueradeAll
        self._index: Frontends | None = None

    def answer(self, question: Question) -> dict[str, Any]:
        """Everything that is known of what is asked, JSON-able."""
        sync, cluster = self._sync(), self._cluster
        facts = _Facts(self._unserved(), cluster.pending(), cluster.problems(), sync.get("stopping", False))
        if isinstance(question.about, Dialled):
            shown = self._dialled(question, question.about, facts)
        else:
            shown = self._service(question, question.about, facts)
        shown["sync"] = sync
        return shown

    # --- an address is asked for

    def _dialled(self, question: Question, to: Dialled, facts: _Facts) -> dict[str, Any]:
        latest, applied = self._cluster.latest, self._applied()
        index = self._indexOf(latest)
        inForce = index if applied is latest else Frontends(applied) if applied is not None else None
        own = self._ownAddresses()
        flow = Flow(question.source or "", to.address, to.port, to.protocol, question.link)
        answers, decisions = [], []
        for origin in self._origins(flow, latest):
            now = decide(index, own, flow, self._masqueradeAll, origin)
            before = decide(inForce, own, flow, self._masqueradeAll, origin) if inForce is not None else None
            decisions.append(now)
            answers.append(self._shown(now, before, facts))
        key = FrontendKey(flow.family, to.protocol, to.address, to.port)
        shown: dict[str, Any] = {"to": str(key), "answers": answers}
        if decisions[0].port is not None:
            kinds = {it.pool for it in decisions if it.pool is not None}
            shown["servicePorts"] = [self._port(decisions[0].port, kinds, facts)]
            if decisions[0].frontend is not None:
                key = decisions[0].port.key(decisions[0].frontend)
        waiting = sorted(name for name, frontends in facts.pending.items() if str(key) in frontends)
        if waiting:
            shown["alsoClaimedBy"] = waiting
        refused = [it for it in facts.problems if it.refused and _mentions(it.reason, to)]
        if refused and decisions[0].hit != "service":
            shown["refused"] = [_problem(it) for it in refused]
        if decisions[0].hit == "no such port":
            owners = _owners(latest, to.address)
            problems = [_problem(it) for it in facts.problems if it.kind == "Service" and it.key in owners]
            if problems:
                shown["problems"] = problems
        return shown

    # --- a Service is asked for

    def _service(self, question: Question, asked: ServiceAsked, facts: _Facts) -> dict[str, Any]:
        latest, applied = self._cluster.latest, self._applied()
        mine = [it for it in latest.values() if (it.name.namespace, it.name.service) == (asked.namespace, asked.name)]
        shown: dict[str, Any] = {"service": f"{asked.namespace}/{asked.name}", "answers": [], "servicePorts": []}
        ports = [it for it in mine if _isAsked(it, asked, question.source)]
        if not ports:
            found, slices = self._cluster.objectsOf(asked.namespace, asked.name)
            shown["notServed"] = self._whyNot(asked, mine, found)
            facts.addProblems(shown, asked.namespace, asked.name, slices)
        for port in sorted(ports, key=lambda it: it.name):
            old = applied.get(port.name) if applied is not None else None
            for frontend in port.frontends:
                # At whichever address of the node a node port is dialled makes no difference here.
                address = frontend.address or _ANYWHERE[port.name.family]
                flow = Flow(question.source or "", address, frontend.port, port.name.protocol, question.link)
                for origin in self._origins(flow, latest):
                    now = serve(flow, origin, port, frontend, self._masqueradeAll)
                    before = None
                    if old is not None and frontend in old.frontends:
                        before = serve(flow, origin, old, frontend, self._masqueradeAll)
                    shown["answers"].append(self._shown(now, before, facts))
            shown["servicePorts"].append(self._port(port, set(port.poolKinds()), facts))
        return shown

    def _whyNot(self, asked: ServiceAsked, mine: Iterable[ServicePort], found: wire.Service | None) -> str:
        why = self._cluster.unserved(asked.namespace, asked.name)
        if why is not None:
            return why
        known = sorted({f"{it.name.port or '(unnamed)'}/{it.name.protocol}/{it.name.family}" for it in mine})
        if known:
            return f"it has no such port; it has {', '.join(known)}"
        return "nothing of it can be served" if found and found.spec and found.spec.ports else "it has no ports"

    # --- showing

    def _shown(self, now: Decision, before: Decision | None, facts: _Facts) -> dict[str, Any]:
        flow, port = now.flow, now.port
        shown: dict[str, Any] = {
            "from": flow.source or ("inside" if now.origin.isInside else "outside"),
            "inside": now.origin.isInside,
            "whyInside": now.origin.why,
            "hit": now.hit,
            "servicePort": str(now.owner) if now.owner is not None else None,
            "verdict": now.verdict,
            "why": now.why,
        }
        if port is not None and now.frontend is not None:
            shown["frontend"] = {"kind": now.frontend.kind, "address": str(port.key(now.frontend))}
            if now.frontend.sources is not None:
                shown["onlyFrom"] = list(now.frontend.sources)
        if port is not None and now.hit == "service":
            shown["pool"] = now.pool
            fault = facts.faultOf(port.name)
            if fault is not None:
                shown["notServed"] = fault
            if now.endpoints:
                shown["source"] = self._source(now)
            if port.affinitySeconds and now.pool is not None:
                bound = self._boundTo(PoolName(port.name, now.pool), flow.source) if flow.source else None
                shown["affinity"] = {"seconds": port.affinitySeconds, "boundTo": str(bound) if bound else None}
        inForce = before is not None and _essence(before) == _essence(now)
        shown["inForce"] = inForce and "notServed" not in shown
        return shown

    def _source(self, now: Decision) -> str:
        """What becomes of the client's address."""
        if self._userspace:
            return "endpoints see an address of this node, which dials them itself"
        if now.masquerade is not None:
            return f"endpoints see an address of this node: {_WORDS[now.masquerade]}"
        itself = [str(it) for it in now.endpoints if now.masqueradeTo(it) is not None]
        if itself:
            return f"kept; where the client is led to itself ({', '.join(itself)}) it sees an address of this node"
        return "kept"

    def _port(self, port: ServicePort, kinds: Collection[PoolKind], facts: _Facts) -> dict[str, Any]:
        name = port.name
        _found, slices = self._cluster.objectsOf(name.namespace, name.service)
        explained = explain(name, slices, self._cluster.facts)
        shown: dict[str, Any] = {
            "servicePort": str(name),
            "frontends": [{"kind": it.kind, "address": str(port.key(it))} for it in port.frontends],
            "pools": {kind: self._pool(explained, kind) for kind in port.poolKinds() if kind in kinds},
            "notes": list(explained.notes),
        }
        fault = facts.faultOf(name)
        if fault is not None:
            shown["notServed"] = fault
        waits = facts.pending.get(str(name))
        if waits:
            shown["waitsFor"] = waits
        facts.addProblems(shown, name.namespace, name.service, slices)
        return shown

    def _pool(self, explained: Explanation, kind: PoolKind) -> dict[str, Any]:
        failing = self._failing(explained.name, explained.pool(kind))
        members, others = [], []
        for fate in explained.fates:
            why = fate.reasons.get(kind)
            if why is not None:
                others.append({**_fate(fate), "why": why})
                continue
            member = _fate(fate)
            if self._userspace and fate.endpoint is not None:
                member["sees"] = self._sourceTowards(fate.endpoint.address)
            if fate.address in failing:
                member["failing"] = failing[fate.address]
            members.append(member)
        return {"endpoints": members, "leftOut": others}

    # --- inside

    def _indexOf(self, services: ServiceMap) -> Frontends:
        if self._index is None or self._index.services is not services:
            self._index = Frontends(services)
        return self._index

    def _origins(self, flow: Flow, services: ServiceMap) -> list[Origin]:
        """Where the flow comes from; not knowing who sends it, both from inside and from outside."""
        if flow.source:
            return [originOf(flow, services.locality, self._ownAddresses())]
        return [anybody(isInside, services.locality, flow.family) for isInside in (True, False)]

    def _ownAddresses(self) -> Collection[str]:
        return {*self._addresses(), *self._cluster.facts.addresses}


class _Facts:
    """
    What others know of all service ports, asked for once.

    :ivar stopping: nothing is served any more.
    """

    def __init__(
        self,
        unserved: Mapping[str, str],
        pending: Mapping[str, Mapping[str, str]],
        problems: Iterable[Problem],
        stopping: bool = False,
    ) -> None:
        self.stopping = stopping
        self._unserved = unserved
        self.pending = pending
        self.problems = list(problems)

    def faultOf(self, name: ServicePortName) -> str | None:
        """Why a service port is not served though it should be."""
        return "kproxy is stopping" if self.stopping else self._unserved.get(str(name))

    def addProblems(
        self, shown: dict[str, Any], namespace: str, name: str, slices: Iterable[wire.EndpointSlice]
    ) -> None:
        """What is wrong with a Service and its slices, where something is."""
        own = {f"{namespace}/{name}", *(wire.keyOf(it.metadata) for it in slices)}
        problems = [_problem(it) for it in self.problems if it.key in own]
        if problems:
            shown["problems"] = problems


def _isAsked(port: ServicePort, asked: ServiceAsked, source: str | None) -> bool:
    name = port.name
    if asked.protocol not in (None, name.protocol) or (source and (":" in source) != (name.family == "IPv6")):
        return False
    if asked.port is None or asked.port == name.port:
        return True
    return bool(_NUMBER.fullmatch(asked.port)) and any(it.port == int(asked.port) for it in port.frontends)


def _owners(services: ServiceMap, address: str) -> set[str]:
    """Keys of the Services that have that ClusterIP."""
    return {
        f"{it.name.namespace}/{it.name.service}"
        for it in services.values()
        if any(frontend.kind == "ClusterIP" and frontend.address == address for frontend in it.frontends)
    }


def _mentions(reason: str, to: Dialled) -> bool:
    """Whether a problem is about that address, or a node port of that number."""
    words = {it.rstrip(".:") for it in re.findall(r"[0-9A-Fa-f.:]+", reason)}
    return bool(words & {to.address, f"{to.address}:{to.port}"}) or f"nodePort {to.port} " in reason


def _essence(it: Decision) -> tuple[Any, ...]:
    return it.owner, it.hit, it.verdict, it.pool, it.endpoints, it.masquerade


def _problem(it: Problem) -> dict[str, str]:
    return {"kind": it.kind, "key": it.key, "reason": it.reason}


def _fate(it: Fate) -> dict[str, Any]:
    conditions = {"ready": it.ready, "serving": it.serving, "terminating": it.terminating}
    return {"endpoint": it.address, "slice": it.slice, "node": it.node or None, "conditions": conditions}
