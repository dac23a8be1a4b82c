"""
Our table in nf_tables: which sets there are, and which element of which set says what. Pure: values, no kernel.

The table's rules hardly ever change; everything about services is in the elements of its sets and maps. A new
connection is first looked at by the ``block`` chains, before any address is rewritten: they drop what a frontend is not
for, and answer for frontends that lead nowhere. Then come the ``nat`` chains. The node itself, sources in ``insiders``
and whoever comes in by a link of pods are asked for in the ``inside`` maps first; those hold only what differs. Node
ports come after every frontend with an address of its own. The ``rest`` chains see what was led nowhere: what goes to
an address of a Service is refused, what goes to another address of their networks is dropped, unless the node has it.
The ``guard`` chain refuses what reaches a port of the proxy without having been led there. What the proxy itself sends
to an endpoint carries a mark, and is let through as it is (:data:`~twisted_kproxy.core.rules.PROXY_MARK`).

Sources are in a set of their own, whose keys are a frontend and a network. Such a set is copied by the kernel with each
transaction that changes it, so only frontends that are not for everybody are in there.

TCP is refused by a reset: an ICMP error would do as well for the client, but the kernel sends only a few of them per
second to one host, and what comes after those would wait for its own time-out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal, TypeAlias
from typing import Protocol as Form

from msgspec import Struct

from ..core.addresses import familyOf
from ..core.rules import Delta, Guard, Rule, Ruleset, Target
from ..core.values import FAMILIES, Family, FrontendKey, Locality, Protocol
from ..interfaces import RulesRejected
from .ruleset import canonicalNetworks
from .slices import finish

#: Grows with every change of the chains, sets or rules. It is a chain's name, so that a listing shows it.
LAYOUT = "layout-3"

#: What an element of a ``blocked`` map says; ``pass`` ends the search: insiders are not blocked where others are.
Block: TypeAlias = Literal["reject", "drop", "pass"]
Value: TypeAlias = Target | Block

BLOCKS: dict[Block, str] = {"reject": "goto refuse", "drop": "drop", "pass": "accept"}
PROTOCOLS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
DIGITS: dict[Family, str] = {"IPv4": "4", "IPv6": "6"}


class Unreadable(ValueError):
    """What is in force is not what this module writes."""


class Torn(Unreadable):
    """Each element is one that this module writes, but some do not belong together: somebody has removed others."""


#: How many elements are looked at before there may be an interruption.
BREATH = 64


class Names:
    """The names of one family's sets."""

    def __init__(self, digit: str) -> None:
        self.lead = {True: f"service-ips{digit}", False: f"node-ports{digit}"}
        self.leadInside = {True: f"service-ips{digit}-inside", False: f"node-ports{digit}-inside"}
        self.block = {True: f"blocked-ips{digit}", False: f"blocked-ports{digit}"}
        self.blockInside = {True: f"blocked-ips{digit}-inside", False: f"blocked-ports{digit}-inside"}
        self.restricted = f"restricted-ips{digit}"
        self.allowed = f"allowed-sources{digit}"
        self.clusterIPs = f"cluster-ips{digit}"
        self.guards = f"proxy-ports{digit}"
        self.insiders = f"insiders{digit}"
        self.nodeNetworks = f"node-networks{digit}"
        self.serviceNetworks = f"service-networks{digit}"

    def maps(self) -> Iterator[tuple[str, bool, bool]]:
        """Each map that frontends are in: name, whether its key has an address, whether it leads somewhere."""
        for hasAddress in (True, False):
            yield self.lead[hasAddress], hasAddress, True
            yield self.leadInside[hasAddress], hasAddress, True
            yield self.block[hasAddress], hasAddress, False
            yield self.blockInside[hasAddress], hasAddress, False


NAMES: dict[Family, Names] = {family: Names(digit) for family, digit in DIGITS.items()}

#: Every map: its name → (family, key has an address, it leads somewhere).
MAPS: dict[str, tuple[Family, bool, bool]] = {
    name: (family, hasAddress, leads) for family in FAMILIES for name, hasAddress, leads in NAMES[family].maps()
}
#: The frontends that are not for everybody; and, of each of these, the networks that it is for.
RESTRICTED: dict[str, Family] = {NAMES[family].restricted: family for family in FAMILIES}
ALLOWED: dict[str, Family] = {NAMES[family].allowed: family for family in FAMILIES}
CLUSTER_IPS: dict[str, Family] = {NAMES[family].clusterIPs: family for family in FAMILIES}
GUARDS: dict[str, Family] = {NAMES[family].guards: family for family in FAMILIES}
#: Sets of networks: what they are in a :class:`~twisted_kproxy.core.values.Locality`.
NETWORKS: dict[str, tuple[Family, str]] = {
    name: (family, attribute)
    for family in FAMILIES
    for name, attribute in (
        (NAMES[family].insiders, "insiders"),
        (NAMES[family].nodeNetworks, "nodePorts"),
        (NAMES[family].serviceNetworks, "services"),
    )
}
#: Those whose elements stand for themselves; a set of networks is always written as a whole.
SINGLE: tuple[str, ...] = (*MAPS, *RESTRICTED, *ALLOWED, *CLUSTER_IPS, *GUARDS)
SETS: tuple[str, ...] = (*SINGLE, *NETWORKS)


# --- elements --------------------------------------------------------------------------------------------------------


class Allowed(Struct, frozen=True, gc=False):
    """A network that a frontend is for."""

    key: FrontendKey
    network: str


#: What an element stands for; a text is a ClusterIP.
Item: TypeAlias = FrontendKey | Allowed | Guard | str
#: Set, what stands in it, and what a map says of that.
Element: TypeAlias = tuple[str, Item, Value | None]


def _ways(key: FrontendKey, rule: Rule) -> list[tuple[str, Value]]:
    """In which maps a frontend is, and what they say of it."""
    names, hasAddress = NAMES[key.family], bool(key.address)
    outside, inside = rule.outside, rule.inside
    leads = isinstance(outside, Target)
    found: list[tuple[str, Value]] = [((names.lead if leads else names.block)[hasAddress], outside)]
    if inside != outside:
        if isinstance(inside, Target):
            found.append((names.leadInside[hasAddress], inside))
            if not leads:
                found.append((names.blockInside[hasAddress], "pass"))
        else:
            found.append((names.blockInside[hasAddress], inside))
    return found


def placed(key: FrontendKey, rule: Rule) -> list[Element]:
    """
    The elements of a frontend.

    :raise RulesRejected: for a node port that is not for everybody: there is no set of such.
    """
    found: list[Element] = [(name, key, value) for name, value in _ways(key, rule)]
    if rule.sources is not None:
        if not key.address:
            raise RulesRejected(f"{key}: sources are for frontends with an address of their own", [key])
        names = NAMES[key.family]
        found.append((names.restricted, key, None))
        found += [(names.allowed, Allowed(key, network), None) for network in rule.sources]
    return found


def gathering(elements: Iterable[Element]) -> Generator[None, None, dict[FrontendKey, Rule]]:
    """
    The rules that elements of maps, of ``restricted`` and of ``allowed`` sets add up to, in slices.

    :raise Torn: where they are not such as :func:`placed` gives.
    """
    found: dict[FrontendKey, dict[str, Value]] = {}
    restricted: set[FrontendKey] = set()
    allowed: dict[FrontendKey, list[str]] = {}
    for count, (name, item, value) in enumerate(elements):
        if isinstance(item, FrontendKey):
            if value is not None:
                found.setdefault(item, {})[name] = value
            else:
                restricted.add(item)
        elif isinstance(item, Allowed):
            allowed.setdefault(item.key, []).append(item.network)
        if not count % BREATH:
            yield
    for key in (*restricted.difference(found), *allowed.keys() - restricted):
        raise Torn(f"the elements of {key} do not belong together")
    rules: dict[FrontendKey, Rule] = {}
    for count, (key, said) in enumerate(found.items()):
        names, hasAddress = NAMES[key.family], bool(key.address)
        outside = said.get(names.lead[hasAddress]) or said.get(names.block[hasAddress])
        inside = said.get(names.leadInside[hasAddress]) or said.get(names.blockInside[hasAddress]) or outside
        if outside is None or inside is None or outside == "pass" or inside == "pass":
            raise Torn(f"the elements of {key} do not belong together")
        sources = canonicalNetworks(allowed.get(key, ())) if key in restricted else None
        rule = rules[key] = Rule(outside, inside, sources)
        if dict(_ways(key, rule)) != said or (sources and set(sources) != set(allowed[key])):
            raise Torn(f"the elements of {key} do not belong together")
        if not count % BREATH:
            yield
    return rules


def gathered(elements: Iterable[Element]) -> dict[FrontendKey, Rule]:
    """:func:`gathering` at once."""
    return finish(gathering(elements))


def intervals(networks: Iterable[str], family: Family) -> list[tuple[bytes, bytes | None]]:
    """Networks of one family as (first address, first address after it); ``None`` after the last one there is."""
    found: list[tuple[bytes, bytes | None]] = []
    for text in canonicalNetworks(networks):
        network = ipaddress.ip_network(text)
        if f"IPv{network.version}" != family:
            continue
        last = network.broadcast_address
        end = None if int(last) == (1 << last.max_prefixlen) - 1 else (last + 1).packed
        found.append((network.network_address.packed, end))
    return found


def networksOf(locality: Locality) -> dict[str, tuple[str, ...]]:
    """What is in each set of networks."""
    return {
        name: tuple(it for it in canonicalNetworks(getattr(locality, attribute)) if familyOf(it) == family)
        for name, (family, attribute) in NETWORKS.items()
    }


def localityOf(networks: Mapping[str, Iterable[str]], links: tuple[str, ...]) -> Locality:
    """What sets of networks say, and the links that are in the rules."""
    said: dict[str, list[str]] = {}
    for name, (_family, attribute) in NETWORKS.items():
        said.setdefault(attribute, []).extend(networks.get(name, ()))
    return Locality(insiderLinks=links, **{name: canonicalNetworks(some) for name, some in said.items()})


# --- steps -----------------------------------------------------------------------------------------------------------


class Step(Struct, frozen=True):
    """
    What one transaction does to the elements: removing comes before adding.

    :ivar networks: sets of networks that are emptied and filled anew.
    :ivar strange: elements to remove by their bytes, that nobody here would have written: set, key, and the end of the
        key where it has one.
    :ivar whole: empty every set first.
    """

    removed: list[tuple[str, Item]] = []
    added: list[Element] = []
    networks: dict[str, tuple[str, ...]] = {}
    strange: list[tuple[str, bytes, bytes]] = []
    whole: bool = False

    def __len__(self) -> int:
        return len(self.removed) + len(self.added) + len(self.networks) + len(self.strange)


#: See :func:`costly`.
_MUCH = 50_000


def costly(step: Step, there: int) -> bool:
    """
    Whether a table that is made anew is less work for the kernel than this step on the one that is there. To find a
    source that goes it looks at all sources before it, two microseconds each (``pipapo_remove()`` in
    ``net/netfilter/nft_set_pipapo.c``); when all of them go, the one that it looks for is always the first.

    :param there: how many sources are in force, of all frontends.
    """
    if step.whole:
        new = sum(name in ALLOWED for name, _item, _value in step.added)
        return there * (there + new) > 16 * _MUCH
    if there < BREATH:
        return False
    gone = sum(it[0] in ALLOWED for it in step.removed) + sum(it[0] in ALLOWED for it in step.strange)
    return gone * there > _MUCH


def sourcesOf(rules: Iterable[Rule | None]) -> int:
    """How many sources there are."""
    return sum(len(rule.sources) for rule in rules if rule is not None and rule.sources)


class InForce(Form):
    """What is in force: a :class:`~twisted_kproxy.core.rules.Ruleset`, or what a writer keeps of it."""

    @property
    def rules(self) -> Mapping[FrontendKey, Rule]: ...
    @property
    def guards(self) -> AbstractSet[Guard]: ...
    @property
    def clusterIPs(self) -> AbstractSet[str]: ...
    @property
    def locality(self) -> Locality: ...


def _guard(guard: Guard) -> tuple[str, Item]:
    return NAMES[guard.family].guards, guard


def _clusterIP(address: str) -> tuple[str, Item]:
    return NAMES[familyOf(address)].clusterIPs, address


def placing(ruleset: Ruleset) -> Generator[None, None, Step]:
    """From whatever there is to exactly this, in slices. Links of insiders are no elements."""
    added: list[Element] = []
    for count, (key, rule) in enumerate(ruleset.rules.items()):
        added += placed(key, rule)
        if not count % BREATH:
            yield
    added += [(*_guard(it), None) for it in ruleset.guards]
    for count, address in enumerate(ruleset.clusterIPs):
        added.append((*_clusterIP(address), None))
        if not count % BREATH:
            yield
    return Step(added=added, networks=networksOf(ruleset.locality), whole=True)


def wholeStep(ruleset: Ruleset) -> Step:
    """:func:`placing` at once."""
    return finish(placing(ruleset))


def stepping(known: InForce, delta: Delta) -> Generator[None, None, Step]:
    """The elements that a delta changes, in slices. Links of insiders are no elements."""
    removed: list[tuple[str, Item]] = []
    added: list[Element] = []
    for count, (key, rule) in enumerate(delta.rules.items()):
        before = known.rules.get(key)
        if before != rule:
            old = placed(key, before) if before is not None else []
            new = placed(key, rule) if rule is not None else []
            both = set(old).intersection(new)
            removed += [(it[0], it[1]) for it in old if it not in both]
            added += [it for it in new if it not in both]
        if not count % BREATH:
            yield
    removed += [_guard(it) for it in delta.guardsRemoved & known.guards]
    added += [(*_guard(it), None) for it in delta.guardsAdded - known.guards]
    removed += [_clusterIP(it) for it in delta.clusterIPsRemoved & known.clusterIPs]
    added += [(*_clusterIP(it), None) for it in delta.clusterIPsAdded - known.clusterIPs]
    networks: dict[str, tuple[str, ...]] = {}
    if delta.locality is not None:
        there = networksOf(known.locality)
        networks = {name: some for name, some in networksOf(delta.locality).items() if there[name] != some}
    return Step(removed, added, networks)


def stepFor(known: InForce, delta: Delta) -> Step:
    """:func:`stepping` at once."""
    return finish(stepping(known, delta))
