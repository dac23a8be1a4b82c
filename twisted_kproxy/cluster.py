"""
The merge: what each source last said, and the service map that follows from it for this node.

In come :class:`~twisted_kproxy.core.values.Change`, ``Replaced`` and ``Rejected``; out goes, when asked, one
:class:`~twisted_kproxy.core.values.ServiceMap`. No I/O and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from twisted.logger import Logger
from zope.interface import implementer

from .core import wire
from .core.locality import NO_SETTINGS, NodeSettings
from .core.ownership import UNKNOWN_AGE, Claims
from .core.resolve import NOTHING, Resolved, concerns, passedOver, resolve, serviceOf, slicesOf, unconcerning
from .core.surroundings import KUBERNETES, Surroundings, serversOf
from .core.topology import NodeFacts
from .core.values import (
    Change,
    Kind,
    Problem,
    Reached,
    Rejected,
    Replaced,
    ServiceMap,
    ServicePort,
    ServicePortName,
    Word,
)
from .interfaces import IChannel

#: So many objects of a list are taken over at once; the rest of a longer one waits for :meth:`Cluster.catchUp`.
MERGED_AT_ONCE = 500
#: Resolving so many endpoints is as much work as resolving a Service.
ENDPOINTS_PER_SERVICE = 10
_ServiceKey = tuple[str, str]


def _nothing(*args: object) -> None:
    """The callback of nobody."""


class _Said:
    """The last word of one source about one kind."""

    __slots__ = ("objects", "rejected")

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.rejected: dict[str, str] = {}


@implementer(IChannel)
class Cluster:
    """Merges sources: for one key the first source in configuration order wins."""

    log = Logger()

    def __init__(self, nodeName: str, proxyName: str = "", settings: NodeSettings = NO_SETTINGS) -> None:
        """
        :param nodeName: this node's name in the API.
        :param proxyName: serve Services labelled for this proxy only; ``""`` for those without the label.
        :param settings: what the configuration says about this node.
        """
        #: called after each word that may alter the map, and when something has been listed for the first time
        self.changed: Callable[[], None] = _nothing
        #: called with this node's object when it is another than before, ``None`` when it is gone
        self.nodeChanged: Callable[[wire.Node | None], None] = _nothing
        #: called with the name of a source each time that it has listed nodes
        self.nodesListed: Callable[[str], None] = _nothing
        self._said: dict[str, dict[str, _Said]] = {}
        self._unsynced: set[tuple[str, str]] = set()
        self._nodeName = nodeName
        self._proxyName = proxyName
        self._merged: dict[str, dict[str, Any]] = {}
        self._unmerged: dict[tuple[Kind, str], None] = {}
        self._slices: dict[_ServiceKey, dict[tuple[str, str], list[wire.EndpointSlice]]] = {}
        self._sliceHome: dict[tuple[str, str], _ServiceKey] = {}
        self._dirty: dict[_ServiceKey, None] = {}
        self._resolved: dict[_ServiceKey, Resolved] = {}
        self._claimed: dict[ServicePortName, ServicePort] = {}
        self._claims = Claims()
        self._waiting: dict[ServicePortName, None] = {}
        self._surroundings = Surroundings(nodeName, settings)
        self._facts, self._locality = self._surroundings.known()
        self._map = ServiceMap(locality=self._locality)
        #: what is otherwise than in the map, ``None`` for what has gone
        self._news: dict[ServicePortName, ServicePort | None] = {}

    # --- the channel

    def expect(self, source: str, kinds: Iterable[str]) -> None:
        """
        A source is going to report these kinds. The order of these calls is the order in which sources win; all of
        them come before the first word.
        """
        self._said[source] = {kind: _Said() for kind in kinds}
        self._unsynced.update((source, kind) for kind in self._said[source])

    def say(self, word: Word | Reached) -> None:
        """Take over one word of a source. See :class:`~twisted_kproxy.interfaces.IChannel`."""
        if isinstance(word, Reached):
            if self._findServers(word.source, word.servers):
                self.changed()
            return
        said = self._said[word.source].setdefault(word.kind, _Said())
        if isinstance(word, Replaced):
            self._replaced(word, said)
        elif isinstance(word, Rejected):
            self._reject(word.source, word.kind, word.key, word.reason, said)
        else:
            self._change(word, said)

    def _replaced(self, word: Replaced, said: _Said) -> None:
        objects = dict(word.objects)
        for key in word.rejected:
            if key in said.objects:  # the last good version stays
                objects[key] = said.objects[key]
        touched = [key for key in said.objects if key not in objects]
        touched += [key for key, it in objects.items() if said.objects.get(key) is not it]
        said.objects = objects
        said.rejected = {key: reason for key, reason in said.rejected.items() if key in word.rejected}
        for key, reason in word.rejected.items():
            self._reject(word.source, word.kind, key, reason, said)
        if word.kind in wire.CLUSTER_WIDE:  # at once: they decide what addresses mean here
            differs = sum(self._merge(word.kind, key) for key in touched) > 0
        else:
            self._unmerged.update(dict.fromkeys((word.kind, key) for key in touched))
            differs = self._mergeSome(MERGED_AT_ONCE)
        first = (word.source, word.kind) in self._unsynced
        self._unsynced.discard((word.source, word.kind))
        if word.kind == "Node":
            self.nodesListed(word.source)
        if first or differs or self._unmerged:
            self.changed()

    def _change(self, word: Change, said: _Said) -> None:
        said.rejected.pop(word.key, None)
        before = said.objects.get(word.key)
        if word.object is None:
            said.objects.pop(word.key, None)
        else:
            said.objects[word.key] = word.object
        if before != word.object:
            self._merge(word.kind, word.key)
            self.changed()

    def _reject(self, source: str, kind: Kind, key: str, reason: str, said: _Said) -> None:
        said.rejected[key] = reason  # the source has logged it

    # --- merging

    @property
    def node(self) -> wire.Node | None:
        """This node's object, where a source has it."""
        return self._surroundings.node

    @property
    def synced(self) -> bool:
        """Whether every source has said everything once. Before that, nothing may be written."""
        return not self._unsynced

    @property
    def missing(self) -> list[str]:
        """What is still waited for, as ``source/kind``."""
        return sorted(f"{source}/{kind}" for source, kind in self._unsynced)

    def _first(self, kind: str, key: str) -> Any | None:
        for kinds in self._said.values():
            said = kinds.get(kind)
            if said is not None and key in said.objects:
                return said.objects[key]
        return None

    def _mergeSome(self, limit: int) -> bool:
        """
        Take over up to so many objects of lists.

        :return: whether something differs by that.
        """
        differs = False
        for kind, key in list(islice(self._unmerged, limit)):
            del self._unmerged[kind, key]
            differs |= self._merge(kind, key)
        return differs

    def _merge(self, kind: Kind, key: str) -> bool:
        """
        Take over what the first source that has this object says of it.

        :return: whether that differs from before.
        """
        it = self._first(kind, key)
        merged = self._merged.setdefault(kind, {})
        before = merged.get(key)
        if before is it:
            return False
        if it is None:
            del merged[key]
        else:
            merged[key] = it
            if before == it:
                return False
        if kind == "Service":
            namespace, _, name = key.partition("/")
            self._dirty[namespace, name] = None
        elif kind == "EndpointSlice":
            self._placeSlices(kind, key, [it] if it is not None else [])
        elif kind == "Endpoints":
            self._placeSlices(kind, key, slicesOf(it) if it is not None else [])
        elif kind == "ServiceCIDR":
            self._surroundings.services = merged
            self._locate()
        elif key == self._nodeName:
            self._surroundings.node = it
            self.nodeChanged(it)
            self._locate()
        return True

    def _placeSlices(self, kind: str, key: str, slices: Iterable[wire.EndpointSlice]) -> None:
        """Move what this object said to the Service that it belongs to now: its label may be another than before."""
        home = left = self._sliceHome.pop((kind, key), None)
        if home is not None:
            mine = self._slices[home]
            del mine[kind, key]
            if not mine:
                del self._slices[home]
            self._dirty[home] = None
        placed = [it for it in slices if serviceOf(it) is not None]
        if placed:
            home = serviceOf(placed[0])  # all that comes from one object belongs to one Service
            assert home is not None
            self._sliceHome[kind, key] = home
            self._slices.setdefault(home, {})[kind, key] = placed
            self._dirty[home] = None
        if KUBERNETES in (left, home):
            objects = self._slices.get(KUBERNETES, {}).values()
            self._findServers("", serversOf(it for placed in objects for it in placed))

    def hostAddresses(self, addresses: Iterable[str]) -> None:
        """The addresses by which this machine talks to others: those of the node, as long as no Node object says."""
        self._surroundings.hostAddresses = frozenset(addresses)
        if self._locate():
            self.changed()

    def _findServers(self, who: str, servers: frozenset[tuple[str, int]]) -> bool:
        """
        :param who: knows of these API servers: a source, or ``""`` for what is said of a Service.
        :return: whether that makes a difference.
        """
        if self._surroundings.servers.get(who) == servers:
            return False
        self._surroundings.servers[who] = servers
        return self._locate()

    def _locate(self) -> bool:
        """
        What is known of this node may be something else now; where it is, every Service is resolved anew.

        :return: whether it is.
        """
        before = self._surroundings.problems
        facts, locality = self._surroundings.known()
        self._report(tuple(before), tuple(self._surroundings.problems))
        if (facts, locality) == (self._facts, self._locality):
            return False
        self._locality = locality
        if facts != self._facts:
            self._facts = facts
            self._dirty.update(dict.fromkeys(self._keys()))
        return True

    def _keys(self) -> Iterable[_ServiceKey]:
        for key in self._merged.get("Service", {}):
            namespace, _, name = key.partition("/")
            yield namespace, name

    # --- resolving

    def catchUp(self, limit: int = 100) -> bool:
        """
        Do a bounded piece of the work that :meth:`current` needs: take over objects of a long list, or resolve up to
        so many Services that have changed, fewer where they have many endpoints.

        :return: whether there is more to do; the caller gives the reactor a turn in between.
        """
        if self._unmerged:
            self._mergeSome(MERGED_AT_ONCE)
            return bool(self._unmerged or self._dirty)
        work = 0
        for key in list(islice(self._dirty, limit)):
            if work >= limit:
                break
            work += 1 + self._endpointsOf(key) // ENDPOINTS_PER_SERVICE
            del self._dirty[key]
            self._resolve(key)
        return bool(self._dirty)

    def _endpointsOf(self, key: _ServiceKey) -> int:
        slices = self._slices.get(key, {}).values()
        return sum(len(it.endpoints or ()) for placed in slices for it in placed)

    @property
    def latest(self) -> ServiceMap:
        """The map as it was last asked for; what came since may not be in it. Costs nothing."""
        return self._map

    @property
    def settled(self) -> bool:
        """Whether nothing has come since then."""
        return not (self._unmerged or self._dirty or self._stale)

    @property
    def _stale(self) -> bool:
        return bool(self._news) or self._locality != self._map.locality

    def current(self) -> ServiceMap:
        """The map that follows from everything said so far; the same object as long as nothing differs."""
        while self.catchUp():
            pass
        if self._stale:
            news, self._news = self._news, {}
            self._map = self._map.step(news, self._map.generation + 1, self._locality)
        return self._map

    def _resolve(self, key: _ServiceKey) -> None:
        service: wire.Service | None = self._merged.get("Service", {}).get("/".join(key))
        before = self._resolved.pop(key, NOTHING)
        after, created = NOTHING, UNKNOWN_AGE
        if service is not None and concerns(service, self._proxyName):
            slices = (it for placed in self._slices.get(key, {}).values() for it in placed)
            after = resolve(service, slices, self._facts)
            created = service.metadata.creationTimestamp or UNKNOWN_AGE
        elif service is not None:
            after = passedOver(service, self._proxyName)
        if after is not NOTHING:
            self._resolved[key] = after
        self._report(before.problems, after.problems)
        touched = self._claims.change(before.ports, after.ports, created)
        for port in before.ports:
            self._claimed.pop(port.name, None)
        for port in after.ports:
            self._claimed[port.name] = port
        for name in {*touched, *(port.name for port in (*before.ports, *after.ports))}:
            self._publish(name)

    def _publish(self, name: ServicePortName) -> None:
        """Put what is claimed under a name into the map, less what others own. What is equal stays the same object."""
        claimed = self._claimed.get(name)
        owned = self._claims.owned(claimed) if claimed is not None else None
        if self._map.get(name) == owned:
            self._news.pop(name, None)
        else:
            self._news[name] = owned
        if claimed is None:
            self._waiting.pop(name, None)
        else:
            self._tellWaiting(name, claimed, owned is not claimed)

    def _tellWaiting(self, name: ServicePortName, claimed: ServicePort, waits: bool) -> None:
        if not waits:
            if self._waiting.pop(name, None) is not None:
                self.log.info("{port} has everything that it claims now", port=str(name))
        elif name not in self._waiting:
            self._waiting[name] = None
            for key, owner in self._claims.pending(claimed).items():
                self.log.warn(
                    "{port} waits for {frontend}, which {owner} has: of two that claim the same the "
                    "older one serves, or the first by name",
                    port=str(name), frontend=str(key), owner=str(owner),
                )

    def _report(self, before: tuple[Problem, ...], after: tuple[Problem, ...]) -> None:
        """Log what is new, a line for each object."""
        known = set(before)
        found: dict[tuple[Kind, str], list[str]] = {}
        for problem in after:
            if problem not in known:
                found.setdefault((problem.kind, problem.key), []).append(problem.reason)
        for (kind, key), reasons in found.items():
            self.log.warn("{kind} {key}: {reason}", kind=kind, key=key, reason="; ".join(reasons))

    # --- what operators see

    @property
    def facts(self) -> NodeFacts:
        """What is known of this node."""
        return self._facts

    def objectsOf(self, namespace: str, name: str) -> tuple[wire.Service | None, list[wire.EndpointSlice]]:
        """The Service of that name, as merged from all sources, and its slices."""
        service: wire.Service | None = self._merged.get("Service", {}).get(f"{namespace}/{name}")
        return service, [it for placed in self._slices.get((namespace, name), {}).values() for it in placed]

    def unserved(self, namespace: str, name: str) -> str | None:
        """Why the Service of that name means nothing to this proxy; ``None`` where it does."""
        service, _slices = self.objectsOf(namespace, name)
        if service is not None:
            return unconcerning(service, self._proxyName)
        for source, kinds in self._said.items():
            said = kinds.get("Service")
            if said is not None and f"{namespace}/{name}" in said.rejected:
                reason = said.rejected[f"{namespace}/{name}"]
                return f"source {source} has it, but it cannot be read: {reason}"
        return "no source has it"

    def quarantined(self) -> list[dict[str, str]]:
        """Objects that cannot be read, and whether an earlier version of them serves on."""
        return [
            {
                "source": source,
                "kind": kind,
                "key": key,
                "reason": reason,
                "lastGood": "serving" if key in said.objects else "none",
            }
            for source, kinds in self._said.items()
            for kind, said in kinds.items()
            for key, reason in sorted(said.rejected.items())
        ]

    def problems(self) -> list[Problem]:
        """Parts of objects that are not served, and why."""
        found = {problem for resolved in self._resolved.values() for problem in resolved.problems}
        found.update(self._surroundings.problems)
        for name in self._waiting:
            for key, owner in self._claims.pending(self._claimed[name]).items():
                reason = f"port {name.port or name.protocol}: {key} is served by {owner}, older or first by name"
                found.add(Problem("Service", f"{name.namespace}/{name.service}", reason))
        return sorted(found)

    def refused(self) -> dict[str, int]:
        """How many addresses must not be reached and are not, by what they would be."""
        return {
            "frontend": sum(it.refusedFrontends for it in self._resolved.values()),
            "endpoint": sum(it.refusedEndpoints for it in self._resolved.values()),
        }

    def pending(self) -> dict[str, dict[str, str]]:
        """Service ports that claim what another one owns: name → {frontend: owner}."""
        return {
            str(name): {str(key): str(owner) for key, owner in self._claims.pending(self._claimed[name]).items()}
            for name in self._waiting
        }

    def counts(self) -> dict[str, int]:
        """How many objects of each kind are known."""
        return {kind: len(objects) for kind, objects in sorted(self._merged.items())}
