"""
A ruleset as chains of ip_tables, and back.

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

``KPROXY-INSIDERS`` is led to by nothing. Its rules' comments keep the pod networks for whoever reads the state back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_network
from typing import Generic, Literal, TypeVar

from msgspec import Struct

from ..core.rules import Guard, Rule, Ruleset, Target, Verdict
from ..core.values import Family, FrontendKey, Locality, Protocol
from .ruleset import Invalid, checkPort, checkRule
from .slices import Slices, finish
from .xtbytes import ACCEPT, DROP, REJECT, RESET, RETURN, Entry, UnknownBytes, pack, parse, sanitised

PREFIX = "KPROXY-"
PORTALS_CONTAINER = "KPROXY-PORTALS-CONTAINER"
PORTALS_HOST = "KPROXY-PORTALS-HOST"
NODEPORT_CONTAINER = "KPROXY-NODEPORT-CONTAINER"
NODEPORT_HOST = "KPROXY-NODEPORT-HOST"
INSIDERS = "KPROXY-INSIDERS"
GUARD = "KPROXY-GUARD"
REFUSE = "KPROXY-REFUSE"

_T = TypeVar("_T")

TableName = Literal["nat", "filter"]
TABLES: tuple[TableName, ...] = ("nat", "filter")
CHAINS: dict[TableName, tuple[str, ...]] = {
    "nat": (PORTALS_CONTAINER, PORTALS_HOST, NODEPORT_CONTAINER, NODEPORT_HOST, INSIDERS),
    "filter": (GUARD, REFUSE),
}


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


# --- from a ruleset --------------------------------------------------------------------------------------------------


def check(ruleset: Ruleset) -> None:
    """:func:`checking` at once."""
    finish(checking(ruleset))


def checking(ruleset: Ruleset) -> Slices[None]:
    """
    Judge a ruleset, in slices.

    :raise Invalid: naming what is wrong. What passes can be packed, and the kernel has no reason to refuse it.
    """
    for cidr in ruleset.locality.insiders:
        checkInsider(cidr)
    for guard in ruleset.guards:
        checkPort(guard.port, f"guard {guard.protocol}")
    for key, rule in ruleset.rules.items():
        checkRule(key, rule)
        yield


def checkInsider(cidr: str) -> None:
    """:raise Invalid: for anything but a network in canonical form."""
    try:
        canonical = str(ip_network(cidr))
    except ValueError as error:
        raise Invalid(f"the pod network {cidr!r} is no network: {error}") from None
    if canonical != cidr:
        raise Invalid(f"the pod network {cidr!r} must be written {canonical!r}")


def ruleEntries(key: FrontendKey, rule: Rule, insiders: Iterable[str]) -> Iterator[tuple[TableName, str, Entry]]:
    """
    The rules of one frontend: ``(table, chain, entry)``, in their order within each chain.

    :param insiders: the pod networks of the frontend's family.
    """
    family, comment = key.family, sanitised(f"kproxy {key}")
    container, host = (PORTALS_CONTAINER, PORTALS_HOST) if key.address else (NODEPORT_CONTAINER, NODEPORT_HOST)

    def entry(target: Target | str, source: str = "", fromNode: bool = False, toNode: bool = False) -> Entry:
        return Entry(family, comment, target, source, key.address, key.protocol, key.port, fromNode, toNode)

    outside, inside = rule.outside, rule.inside
    # Who is refused is not rewritten by what follows: an address that is refused may be the node's own, and its port a
    # node port of another Service.
    refused = ACCEPT if key.address else RETURN
    if inside != outside and (isinstance(inside, Target) or isinstance(outside, Target)):
        for cidr in insiders:
            yield "nat", container, entry(inside if isinstance(inside, Target) else refused, cidr)
    if isinstance(outside, Target) or key.address:
        yield "nat", container, entry(outside if isinstance(outside, Target) else refused)
    if isinstance(inside, Target) or key.address:
        yield "nat", host, entry(inside if isinstance(inside, Target) else refused)
    # Packets that were rewritten no longer go to the frontend: where one side is served, one rule for the other is
    # enough. A node port is a port of the node's own addresses and of no other's.
    toNode = not key.address
    if not isinstance(inside, Target) and not isinstance(outside, Target) and inside != outside:
        word = _word(inside, key)
        yield "filter", REFUSE, entry(word, fromNode=True, toNode=toNode)
        for cidr in insiders:
            yield "filter", REFUSE, entry(word, cidr, toNode=toNode)
        yield "filter", REFUSE, entry(_word(outside, key), toNode=toNode)
    elif not isinstance(outside, Target):
        yield "filter", REFUSE, entry(_word(outside, key), toNode=toNode)
    elif not isinstance(inside, Target):
        yield "filter", REFUSE, entry(_word(inside, key), toNode=toNode)


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


def insiderEntries(family: Family, insiders: Iterable[str]) -> list[Entry]:
    """What ``KPROXY-INSIDERS`` holds: all networks, of both families, in their order."""
    return [Entry(family, sanitised(f"kproxy insider {cidr}"), RETURN) for cidr in insiders]


def insidersOf(family: Family, insiders: Iterable[str]) -> tuple[str, ...]:
    """
    Those of one family, as conditions for a rule. A condition that everybody meets would be no condition, and the
    rule not to be told from the one that follows it: it is written as two halves.
    """
    own: list[str] = []
    for cidr in insiders:
        if (":" in cidr) == (family == "IPv6"):
            own += [str(half) for half in ip_network(cidr).subnets()] if cidr.endswith("/0") else [cidr]
    return tuple(own)


class Content(Struct, Generic[_T], frozen=True):
    """What the chains of one family hold: chain → each rule, as bytes or in another form."""

    nat: dict[str, list[_T]]
    filter: dict[str, list[_T]]

    def of(self, table: TableName) -> dict[str, list[_T]]:
        return self.nat if table == "nat" else self.filter


def familiesOf(ruleset: Ruleset) -> set[Family]:
    """The families that a ruleset has something for."""
    return {key.family for key in ruleset.rules} | {guard.family for guard in ruleset.guards}


def render(ruleset: Ruleset, family: Family, form: Callable[[Entry], _T] = pack) -> Content[_T]:  # type: ignore[assignment]
    """
    Everything that a ruleset means for a family.

    :param form: what a rule is written as.
    """
    content: Content[_T] = Content({chain: [] for chain in CHAINS["nat"]}, {chain: [] for chain in CHAINS["filter"]})
    own = insidersOf(family, ruleset.locality.insiders)
    for key, rule in ruleset.rules.items():
        if key.family == family:
            for table, chain, entry in ruleEntries(key, rule, own):
                content.of(table)[chain].append(form(entry))
    for guard in sorted(ruleset.guards):
        if guard.family == family:
            content.filter[GUARD].extend(form(entry) for entry in guardEntries(guard))
    content.nat[INSIDERS].extend(form(entry) for entry in insiderEntries(family, ruleset.locality.insiders))
    return content


# --- and back --------------------------------------------------------------------------------------------------------


class _Found:
    """What the chains say of one frontend."""

    __slots__ = ("closed", "container", "fromNode", "host", "refuse")

    def __init__(self) -> None:
        self.closed = False  # a rule for everybody was seen: none may follow
        self.container: Target | None = None
        self.host: Target | None = None
        self.fromNode: str = ""
        self.refuse: str = ""

    def rule(self, key: FrontendKey) -> Rule:
        refusal = self.fromNode or self.refuse
        outside = self.container or _verdict(self.refuse, key)
        return Rule(outside, self.host or _verdict(refusal, key))


def _verdict(word: str, key: FrontendKey) -> Verdict:
    if word in (REJECT, RESET):
        return "reject"
    if word == DROP:
        return "drop"
    raise UnknownBytes(f"the rules of {key} are not complete")


_INSIDER = re.compile(r"kproxy insider (\S+)")


def reconstruct(family: Family, found: Content[bytes]) -> Ruleset:
    """
    The ruleset that these chains were made from.

    :param found: what was read, as :func:`~.xtbytes.normalised` gives it.
    :raise UnknownBytes: where no ruleset gives exactly this.
    """
    insiders: list[str] = []
    for data in found.nat[INSIDERS]:
        match = _INSIDER.fullmatch(parse(family, data).comment)
        if match is None:
            raise UnknownBytes(f"{INSIDERS} holds something else")
        insiders.append(match[1])
    frontends: dict[FrontendKey, _Found] = {}
    for chain in (PORTALS_CONTAINER, NODEPORT_CONTAINER, PORTALS_HOST, NODEPORT_HOST):
        for data in found.nat[chain]:
            entry = parse(family, data)
            it = frontends.setdefault(_keyOf(entry), _Found())
            if chain in (PORTALS_CONTAINER, NODEPORT_CONTAINER):
                if it.closed:
                    raise UnknownBytes(f"a rule of {chain} is never reached: {entry.comment}")
                it.closed = not entry.source
            if entry.source or not isinstance(entry.target, Target):
                continue  # an insider's; the comparison below tells whether it is right
            if chain in (PORTALS_HOST, NODEPORT_HOST):
                it.host = entry.target
            else:
                it.container = entry.target
    for data in found.filter[REFUSE]:
        entry = parse(family, data)
        it = frontends.setdefault(_keyOf(entry), _Found())
        if it.refuse:
            raise UnknownBytes(f"a rule of {REFUSE} is never reached: {entry.comment}")
        if entry.sourceLocal:
            it.fromNode = str(entry.target)
        elif not entry.source:
            it.refuse = str(entry.target)
    guards = set()
    for data in found.filter[GUARD]:
        entry = parse(family, data)
        if entry.protocol is None:
            raise UnknownBytes(f"{GUARD} holds something else")
        guards.add(Guard(family, entry.protocol, entry.port))
    rules = {key: it.rule(key) for key, it in frontends.items()}
    ruleset = Ruleset(rules, frozenset(guards), locality=Locality(tuple(insiders)))
    try:
        check(ruleset)
    except Invalid as error:
        raise UnknownBytes(str(error)) from None
    _same(family, found, render(ruleset, family))
    return ruleset


def _keyOf(entry: Entry) -> FrontendKey:
    if entry.protocol is None:
        raise UnknownBytes(f"a rule is for no protocol: {entry.comment}")
    return FrontendKey(entry.family, entry.protocol, entry.destination, entry.port)


def _same(family: Family, found: Content[bytes], expected: Content[bytes]) -> None:
    """Of rules of different frontends the order does not matter; that within one was looked at before."""
    for table in TABLES:
        for chain in CHAINS[table]:
            if sorted(found.of(table)[chain]) != sorted(expected.of(table)[chain]):
                raise UnknownBytes(f"{chain} of {table} ({family}) holds what was not written there")
    # A guard's two rules exclude each other; the networks' order is kept by their chain.
    if found.nat[INSIDERS] != expected.nat[INSIDERS]:
        raise UnknownBytes(f"{INSIDERS} is out of order")


def joined(found: Mapping[Family, Ruleset]) -> Ruleset | None:
    """
    What both families say together; ``None`` where that is nothing, or where they were written at different times.
    """
    localities = {it.locality for it in found.values()}
    if len(localities) != 1:
        return None
    rules = {key: rule for it in found.values() for key, rule in it.rules.items()}
    return Ruleset(rules, frozenset(guard for it in found.values() for guard in it.guards), locality=localities.pop())
