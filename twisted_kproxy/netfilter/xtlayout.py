"""
A ruleset as chains of ip_tables. (:mod:`~twisted_kproxy.netfilter.xtread` reads them back.)

The chains are those of the first kube-proxy (``pkg/proxy/userspace``), under a prefix of our own::

    nat     PREROUTING  first  KPROXY-PORTALS-CONTAINER     what comes in: cluster, external and load balancer IPs
                        last   KPROXY-NODEPORT-CONTAINER    … to an address of the node: node ports
            OUTPUT      first  KPROXY-PORTALS-HOST          the same for what the node itself sends
                        last   KPROXY-NODEPORT-HOST
    filter  INPUT       first  KPROXY-GUARD                 the proxy's own ports: only what a rule led there
            INPUT, FORWARD, OUTPUT  KPROXY-REFUSE           frontends that are refused or dropped

Portals come before node ports, since some clouds give a load balancer's IP to the node itself. Rules rewrite to one
address and port of the node (DNAT), not to the address of the interface that a packet came in on (REDIRECT): an
interface may have none, and a local UDP client would not take the answer.

REJECT works in these three hooks of filter only. So a node that does not forward answers nothing to others who dial a
refused cluster IP, where the rules of nf_tables would.

What the proxy itself sends to an endpoint carries a mark (:data:`~twisted_kproxy.core.rules.PROXY_MARK`). It is not
led to the chains of OUTPUT; nor to those that refuse in INPUT, where it arrives when the endpoint is on this node.

A frontend with source ranges has its rules once for each range. In nat they are followed by one that lets everybody
else go on unrewritten, in filter by one that drops him there. A node port that is served at some addresses only has its
rules once for each of these networks.

``KPROXY-REFUSE`` has two parts. New rules of frontends are put at its head, since they come before the rest: each
network of ClusterIPs leads to ``KPROXY-CLUSTER-IPS``, where each ClusterIP has one rule, and what comes back from there
is dropped unless the node has that address. So who sends to other addresses passes none of the ClusterIPs' rules. Those
outside of these networks (none may be known) have their rule in ``KPROXY-REFUSE`` itself. Each of these rules leads to
``KPROXY-NO-PORT``, which refuses.

``KPROXY-INSIDERS`` is led to by nothing. Its rules' comments keep the pod networks, and whatever else a
:class:`~twisted_kproxy.core.values.Locality` holds, for whoever reads the state back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_network
from typing import Generic, Literal, TypeVar

from msgspec import Struct, structs

from ..core.addresses import contains, familyOf
from ..core.rules import Guard, Rule, Ruleset, Target, Verdict
from ..core.values import EVERYWHERE, Family, FrontendKey, Locality, Protocol
from .xtbytes import ACCEPT, DROP, REJECT, RESET, RETURN, Entry, pack, sanitised

PREFIX = "KPROXY-"
PORTALS_CONTAINER = "KPROXY-PORTALS-CONTAINER"
PORTALS_HOST = "KPROXY-PORTALS-HOST"
NODEPORT_CONTAINER = "KPROXY-NODEPORT-CONTAINER"
NODEPORT_HOST = "KPROXY-NODEPORT-HOST"
INSIDERS = "KPROXY-INSIDERS"
GUARD = "KPROXY-GUARD"
REFUSE = "KPROXY-REFUSE"
CLUSTER_IPS = "KPROXY-CLUSTER-IPS"
NO_PORT = "KPROXY-NO-PORT"

_T = TypeVar("_T")

TableName = Literal["nat", "filter"]
TABLES: tuple[TableName, ...] = ("nat", "filter")
CHAINS: dict[TableName, tuple[str, ...]] = {
    "nat": (PORTALS_CONTAINER, PORTALS_HOST, NODEPORT_CONTAINER, NODEPORT_HOST, INSIDERS),
    "filter": (GUARD, REFUSE, CLUSTER_IPS, NO_PORT),
}
#: Chains that earlier versions did not have, and that are empty where nothing needs them.
LATER = frozenset({CLUSTER_IPS, NO_PORT})


class Jump(Struct, frozen=True):
    """
    A rule of a built-in chain that leads to one of ours. ``last``: behind everybody else's, not before; ``others``:
    not what the proxy itself sends.
    """

    table: TableName
    hook: str
    chain: str
    comment: str
    last: bool = False
    destinationLocal: bool = False
    state: Literal["", "NEW", "!ESTABLISHED"] = ""
    others: bool = False

    def entry(self, family: Family) -> Entry:
        """The rule itself."""
        return Entry(
            family,
            self.comment,
            self.chain,
            destinationLocal=self.destinationLocal,
            state=self.state,
            unmarked=self.others,
        )


_PORTALS, _NODEPORTS = "kproxy service addresses", "kproxy node ports: after service addresses"
#: In the order in which those of one hook stand.
JUMPS: tuple[Jump, ...] = (
    Jump("nat", "PREROUTING", PORTALS_CONTAINER, _PORTALS),
    Jump("nat", "PREROUTING", NODEPORT_CONTAINER, _NODEPORTS, last=True, destinationLocal=True),
    Jump("nat", "OUTPUT", PORTALS_HOST, _PORTALS, others=True),
    Jump("nat", "OUTPUT", NODEPORT_HOST, _NODEPORTS, last=True, destinationLocal=True, others=True),
    Jump("filter", "INPUT", GUARD, "kproxy own ports", state="!ESTABLISHED"),
    Jump("filter", "INPUT", REFUSE, "kproxy refused services", state="NEW", others=True),
    Jump("filter", "FORWARD", REFUSE, "kproxy refused services", state="NEW"),
    Jump("filter", "OUTPUT", REFUSE, "kproxy refused services", state="NEW", others=True),
)
HOOKS: dict[TableName, tuple[str, ...]] = {
    "nat": ("PREROUTING", "OUTPUT"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}


# --- conditions ------------------------------------------------------------------------------------------------------

#: Addresses that nothing is sent from and that no node has: broadcast to the link (RFC 919), and the multicast address
#: that is never given to anybody (RFC 4291, 2.7.1). Where there is no network, rules are for these, so that they can
#: be read back.
NEVER: dict[Family, str] = {"IPv4": "255.255.255.255", "IPv6": "ff00::"}
_WHOLE: dict[Family, str] = {"IPv4": "/32", "IPv6": "/128"}
_NOBODY = " for nobody"


class Place(Struct, frozen=True):
    """
    What a :class:`~twisted_kproxy.core.values.Locality` means to the rules of one family, as conditions.

    :ivar insiders: the pod networks.
    :ivar links: the interfaces of pods; one that ends with ``+`` stands for all that begin so.
    :ivar nodePorts: where node ports are served; an empty text for every address of the node.
    :ivar services: the networks of ClusterIPs.
    """

    insiders: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    nodePorts: tuple[str, ...] = ("",)
    services: tuple[str, ...] = ()


@lru_cache(maxsize=64)
def placeOf(family: Family, locality: Locality) -> Place:
    """What concerns one family."""
    nodePorts: tuple[str, ...] = ("",)
    if not any(it.endswith("/0") for it in locality.nodePorts if familyOf(it) == family):
        own = _conditions(family, locality.nodePorts)
        nodePorts = tuple(it.removesuffix(_WHOLE[family]) for it in own) or (NEVER[family],)
    return Place(
        _conditions(family, locality.insiders),
        tuple(_written(it) for it in locality.insiderLinks),
        nodePorts,
        _conditions(family, locality.services),
    )


def _conditions(family: Family, networks: Iterable[str]) -> tuple[str, ...]:
    """
    Those of one family. A condition that everybody meets would be no condition, and the rule not to be told from one
    that has none: it is written as two halves.
    """
    own: list[str] = []
    for cidr in networks:
        if familyOf(cidr) == family:
            own += [str(half) for half in ip_network(cidr).subnets()] if cidr.endswith("/0") else [cidr]
    return tuple(own)


def _written(link: str) -> str:
    """An interface as iptables writes it. A whole name's length leaves nothing for a prefix to stand for."""
    return link[:-1] + ("+" if len(link) < 16 else "") if link.endswith("*") else link


def _sources(rule: Rule, family: Family) -> tuple[str, ...]:
    """Whom a rule is for: an empty text for everybody."""
    if rule.sources is None:
        return ("",)
    return _conditions(family, rule.sources) or (NEVER[family] + _WHOLE[family],)


def _within(cidr: str, sources: Iterable[str]) -> Iterator[str]:
    """What of a network is in these sources, each part as a network."""
    for source in sources:
        part = _overlap(cidr, source) if source else cidr
        if part:
            yield part


@lru_cache(maxsize=4096)
def _overlap(one: str, other: str) -> str:
    """Of two networks one holds the other, or they are apart."""
    first, second = ip_network(one), ip_network(other)
    if not first.overlaps(second):
        return ""
    return one if first.prefixlen >= second.prefixlen else other


# --- from a ruleset --------------------------------------------------------------------------------------------------


def ruleEntries(key: FrontendKey, rule: Rule, place: Place) -> Iterator[tuple[TableName, str, Entry]]:
    """
    The rules of one frontend: ``(table, chain, entry)``, in their order within each chain.

    :param place: of the frontend's family.
    """
    family = key.family
    nobody = _NOBODY if rule.sources is not None and not rule.sources else ""
    comment = sanitised(f"kproxy {key}{nobody}")
    container, host = (PORTALS_CONTAINER, PORTALS_HOST) if key.address else (NODEPORT_CONTAINER, NODEPORT_HOST)
    destinations = (key.address,) if key.address else place.nodePorts

    def entries(
        target: Target | str, sources: Iterable[str] = ("",), link: str = "", *, fromNode: bool = False
    ) -> list[Entry]:
        protocol, port = key.protocol, key.port
        return [
            Entry(family, comment, target, source, destination, protocol, port, fromNode, interface=link)
            for destination in destinations
            for source in sources
        ]

    outside, inside, sources = rule.outside, rule.inside, _sources(rule, family)
    insiders = [part for cidr in place.insiders for part in _within(cidr, sources)] if inside != outside else []
    # Who is refused is not rewritten by what follows: an address that is refused may be the node's own, and its port a
    # node port of another Service.
    refused = ACCEPT if key.address else RETURN
    led = isinstance(inside, Target), isinstance(outside, Target)
    if inside != outside and any(led):
        own: Target | str = inside if isinstance(inside, Target) else refused
        for entry in entries(own, insiders if led[0] else place.insiders):
            yield "nat", container, entry
        for link in place.links:
            for entry in entries(own, sources if led[0] else ("",), link):
                yield "nat", container, entry
    for chain, verdict in ((container, outside), (host, inside)):
        if isinstance(verdict, Target):
            for entry in entries(verdict, sources):
                yield "nat", chain, entry
        if key.address and (rule.sources is not None or not isinstance(verdict, Target)):
            for entry in entries(refused):
                yield "nat", chain, entry
    # Packets that were rewritten no longer go to the frontend: where one side is served, one rule for the other is
    # enough.
    words: list[list[Entry]] = []
    if not any(led) and inside != outside:
        word = _word(inside, key)
        words.append(entries(word, sources, fromNode=True))
        words.append(entries(word, insiders))
        words += [entries(word, sources, link) for link in place.links]
    if not all(led):
        words.append(entries(_word(inside if led[1] else outside, key), sources))
    if rule.sources is not None:
        words.append(entries(DROP))
    for some in words:
        for entry in some:
            # A node port is a port of the node's own addresses and of no other's.
            yield "filter", REFUSE, entry if key.address else structs.replace(entry, destinationLocal=True)


def _word(verdict: Verdict, key: FrontendKey) -> str:
    """
    TCP is refused by a reset. An ICMP error is one of a few per second that the kernel sends to a host
    (``icmp_ratelimit``); a client who dials again soon would wait for a second or three.
    """
    return _refusal(key.protocol) if verdict == "reject" else DROP


def _refusal(protocol: Protocol) -> str:
    return RESET if protocol == "TCP" else REJECT


def guardEntries(guard: Guard) -> tuple[Entry, Entry]:
    """
    A port of the proxy: who dials it himself is refused; what a rule led there is let in, whatever the node's own
    firewall says of that port (the first kube-proxy's ``KUBE-NODEPORT-NON-LOCAL``).
    """
    comment = sanitised(f"kproxy guard {guard.port}/{guard.protocol}")
    refusal = _refusal(guard.protocol)
    return (
        Entry(guard.family, comment, refusal, protocol=guard.protocol, port=guard.port, state="!DNAT"),
        Entry(guard.family, comment, ACCEPT, protocol=guard.protocol, port=guard.port, state="DNAT"),
    )


def clusterEntry(address: str, place: Place) -> tuple[str, Entry]:
    """What is sent to a ClusterIP and was led nowhere: the chain of its one rule, and that rule."""
    chain = CLUSTER_IPS if contains(place.services, address) else REFUSE
    return chain, Entry(familyOf(address), sanitised(f"kproxy ClusterIP {address}"), NO_PORT, destination=address)


def noPortEntries(family: Family) -> tuple[Entry, Entry]:
    """What ``KPROXY-NO-PORT`` holds as soon as there is a ClusterIP."""
    comment = "kproxy no such port"
    return Entry(family, comment, RESET, protocol="TCP"), Entry(family, comment, REJECT)


def serviceEntries(family: Family, place: Place) -> Iterator[Entry]:
    """What ``KPROXY-REFUSE`` does with the networks of ClusterIPs."""
    for cidr in place.services:
        comment, destination = sanitised(f"kproxy services {cidr}"), cidr.removesuffix(_WHOLE[family])
        yield Entry(family, comment, CLUSTER_IPS, destination=destination)
        # Whoever gave it to the node knows why: a resolver for the node's pods has an address like that.
        yield Entry(family, comment, RETURN, destination=destination, destinationLocal=True)
        yield Entry(family, comment, DROP, destination=destination)


def localityEntries(family: Family, locality: Locality) -> list[Entry]:
    """What ``KPROXY-INSIDERS`` holds: all of it, of both families, in its order."""
    kept = [Entry(family, sanitised(f"kproxy insider {cidr}"), RETURN) for cidr in locality.insiders]
    for link in locality.insiderLinks:
        comment = "kproxy insider links" if link.endswith("*") else "kproxy insider link"
        kept.append(Entry(family, comment, RETURN, interface=_written(link)))
    if locality.nodePorts != EVERYWHERE:
        for cidr in locality.nodePorts or ("nowhere",):
            kept.append(Entry(family, sanitised(f"kproxy node ports {cidr}"), RETURN))
    return kept + [Entry(family, sanitised(f"kproxy service network {cidr}"), RETURN) for cidr in locality.services]


class Content(Struct, Generic[_T], frozen=True):
    """What the chains of one family hold: chain → each rule, as bytes or in another form."""

    nat: dict[str, list[_T]]
    filter: dict[str, list[_T]]

    def of(self, table: TableName) -> dict[str, list[_T]]:
        return self.nat if table == "nat" else self.filter


def familiesOf(ruleset: Ruleset) -> set[Family]:
    """The families that a ruleset has something for."""
    texts = (*ruleset.clusterIPs, *ruleset.locality.services)
    return {it.family for its in (ruleset.rules, ruleset.guards) for it in its} | {familyOf(text) for text in texts}


def render(ruleset: Ruleset, family: Family, form: Callable[[Entry], _T] = pack) -> Content[_T]:  # type: ignore[assignment]
    """
    Everything that a ruleset means for a family.

    :param form: what a rule is written as.
    """
    content: Content[_T] = Content({chain: [] for chain in CHAINS["nat"]}, {chain: [] for chain in CHAINS["filter"]})
    place = placeOf(family, ruleset.locality)
    for key, rule in ruleset.rules.items():
        if key.family == family:
            for table, chain, entry in ruleEntries(key, rule, place):
                content.of(table)[chain].append(form(entry))
    for guard in sorted(ruleset.guards):
        if guard.family == family:
            content.filter[GUARD].extend(form(entry) for entry in guardEntries(guard))
    content.filter[REFUSE].extend(form(entry) for entry in serviceEntries(family, place))
    own = ownOf(family, ruleset.clusterIPs)
    for address in own:
        chain, entry = clusterEntry(address, place)
        content.filter[chain].append(form(entry))
    if own:
        content.filter[NO_PORT].extend(form(entry) for entry in noPortEntries(family))
    content.nat[INSIDERS].extend(form(entry) for entry in localityEntries(family, ruleset.locality))
    return content


def ownOf(family: Family, addresses: Iterable[str]) -> list[str]:
    """Those of one family, sorted."""
    return sorted(it for it in addresses if familyOf(it) == family)


def frontendOf(chain: str, entry: Entry) -> tuple[str, Protocol | None, int]:
    """What a rule is for. The order of rules matters among those for the same only, and see :func:`isOrdered`."""
    isNodePort = chain in (NODEPORT_CONTAINER, NODEPORT_HOST) or (entry.destinationLocal and entry.protocol is not None)
    return "" if isNodePort else entry.destination, entry.protocol, entry.port


def isOrdered(chain: str, frontends: Iterable[tuple[str, Protocol | None, int]]) -> bool:
    """Whether the rules for all protocols come last, where that matters."""
    last = False
    for _address, protocol, _port in frontends if chain in (REFUSE, NO_PORT) else ():
        if protocol is not None and last:
            return False
        last = last or protocol is None
    return True
