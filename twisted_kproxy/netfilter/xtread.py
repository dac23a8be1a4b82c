"""
Chains of ip_tables as the ruleset that they were made from: what :mod:`~twisted_kproxy.netfilter.xtlayout` does, and
back. What was read is rendered again and compared, so that rules need only be told apart here, not judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_network

from ..core.rules import Guard, Rule, Ruleset, Target, Verdict
from ..core.values import EVERYWHERE, Family, FrontendKey, Locality
from .xtbytes import DROP, REJECT, RESET, Entry, UnknownBytes, pack, parse
from .xtlayout import (
    CHAINS,
    CLUSTER_IPS,
    GUARD,
    INSIDERS,
    NO_PORT,
    NODEPORT_CONTAINER,
    NODEPORT_HOST,
    PORTALS_CONTAINER,
    PORTALS_HOST,
    REFUSE,
    TABLES,
    Content,
    frontendOf,
    isOrdered,
    render,
)
from .xtvalid import check

_HALVES = {("0.0.0.0/1", "128.0.0.0/1"): "0.0.0.0/0", ("::/1", "8000::/1"): "::/0"}
_KEPT = re.compile(r"kproxy (insider|node ports|service network) (\S+)")


class _Found:
    """What the chains say of one frontend."""

    __slots__ = ("container", "host", "refuse")

    def __init__(self) -> None:
        self.container: list[Entry] = []
        self.host: list[Entry] = []
        self.refuse: list[Entry] = []

    def rule(self, key: FrontendKey) -> Rule:
        sources = self._sources()
        # Of those that refuse: for the node itself, and last for everybody whom the frontend is for.
        words = [it for it in self.refuse if it.source] if sources is not None else self.refuse
        last = words[-1].target if words else ""
        inside: Target | str = next((it.target for it in self._led(self.host)), "")
        if not inside:
            inside = next((it.target for it in self.refuse if it.sourceLocal), last)
        led = [it.target for it in self._led(self.container)]
        outside = next((it for it in led if it != inside), "")
        if not outside:
            outside = last or inside
        return Rule(_verdict(outside, key), _verdict(inside, key), sources)

    @staticmethod
    def _led(entries: Iterable[Entry]) -> list[Entry]:
        return [it for it in entries if isinstance(it.target, Target)]

    def _sources(self) -> tuple[str, ...] | None:
        """Whom the frontend is for: where one verdict alone is written, without what is for insiders."""
        telling = (
            self._led(self.host)
            or [it for it in self.refuse if it.sourceLocal]
            or self._led(self.container)
            or self.refuse[:-1]
        )
        if telling and telling[0].comment.endswith(" for nobody"):
            return ()
        sources = tuple(dict.fromkeys(str(ip_network(it.source)) for it in telling if it.source))
        return ((_HALVES[sources],) if sources in _HALVES else sources) or None


def _verdict(said: Target | str, key: FrontendKey) -> Verdict:
    if isinstance(said, Target):
        return said
    if said in (REJECT, RESET):
        return "reject"
    if said == DROP:
        return "drop"
    raise UnknownBytes(f"the rules of {key} are not complete")


def reconstruct(family: Family, found: Content[bytes]) -> Ruleset:
    """
    The ruleset that these chains were made from.

    :param found: what was read, as :func:`~.xtbytes.normalised` gives it.
    :raise UnknownBytes: where no ruleset gives exactly this.
    """
    entries: Content[Entry] = Content(
        {chain: [parse(family, data) for data in rules] for chain, rules in found.nat.items()},
        {chain: [parse(family, data) for data in rules] for chain, rules in found.filter.items()},
    )
    frontends: dict[FrontendKey, _Found] = {}
    clusterIPs: set[str] = set()

    def of(chain: str, entry: Entry) -> _Found:
        address, protocol, port = frontendOf(chain, entry)
        if protocol is None:
            raise UnknownBytes(f"a rule is for no protocol: {entry.comment}")
        key = FrontendKey(family, protocol, address, port)
        it = frontends.get(key)
        if it is None:
            it = frontends[key] = _Found()
        return it

    for chain in (PORTALS_CONTAINER, NODEPORT_CONTAINER):
        for entry in entries.nat[chain]:
            of(chain, entry).container.append(entry)
    for chain in (PORTALS_HOST, NODEPORT_HOST):
        for entry in entries.nat[chain]:
            of(chain, entry).host.append(entry)
    for chain, some in entries.filter.items():
        if not isOrdered(chain, (frontendOf(chain, entry) for entry in some)):
            raise UnknownBytes(f"rules of {chain} are out of order")
    for entry in entries.filter[REFUSE]:
        if entry.protocol is not None:
            of(REFUSE, entry).refuse.append(entry)
    for chain in (REFUSE, CLUSTER_IPS):
        clusterIPs.update(entry.destination for entry in entries.filter[chain] if entry.target == NO_PORT)
    guards = set()
    for entry in entries.filter[GUARD]:
        if entry.protocol is None:
            raise UnknownBytes(f"{GUARD} holds something else")
        guards.add(Guard(family, entry.protocol, entry.port))
    try:
        rules = {key: it.rule(key) for key, it in frontends.items()}
        ruleset = Ruleset(rules, frozenset(guards), frozenset(clusterIPs), _locality(entries.nat[INSIDERS]))
        check(ruleset)
    except ValueError as error:  # of which Invalid is one, and what is no network
        raise UnknownBytes(str(error)) from None
    _same(family, entries, found, render(ruleset, family, lambda entry: entry))
    return ruleset


def _locality(entries: Iterable[Entry]) -> Locality:
    kept: dict[str, list[str]] = {"insider": [], "node ports": [], "service network": []}
    links: list[str] = []
    for entry in entries:
        if entry.interface:
            links.append(entry.interface.removesuffix("+") + ("*" if entry.comment.endswith("links") else ""))
            continue
        match = _KEPT.fullmatch(entry.comment)
        if match is None:
            raise UnknownBytes(f"{INSIDERS} holds something else")
        kept[match[1]].append(match[2])
    nodePorts = tuple(kept["node ports"]) or EVERYWHERE
    return Locality(
        insiders=tuple(kept["insider"]),
        insiderLinks=tuple(links),
        nodePorts=() if nodePorts == ("nowhere",) else nodePorts,
        services=tuple(kept["service network"]),
    )


def _same(family: Family, entries: Content[Entry], found: Content[bytes], expected: Content[Entry]) -> None:
    """Of rules for different frontends the order does not matter, that among rules for the same does."""
    for table in TABLES:
        for chain in CHAINS[table]:
            wanted = expected.of(table)[chain]
            there, shall = found.of(table)[chain], [pack(it) for it in wanted]
            if there != shall and _grouped(chain, entries.of(table)[chain], there) != _grouped(chain, wanted, shall):
                raise UnknownBytes(f"{chain} of {table} ({family}) holds what was not written there")


def _grouped(chain: str, entries: Iterable[Entry], rules: Iterable[bytes]) -> dict[object, list[bytes]]:
    groups: dict[object, list[bytes]] = {}
    for entry, data in zip(entries, rules, strict=True):
        groups.setdefault(frontendOf(chain, entry), []).append(data)
    return groups


def joined(found: Mapping[Family, Ruleset]) -> Ruleset | None:
    """
    What both families say together; ``None`` where that is nothing, or where they were written at different times.
    """
    localities = {it.locality for it in found.values()}
    if len(localities) != 1:
        return None
    return Ruleset(
        {key: rule for it in found.values() for key, rule in it.rules.items()},
        frozenset(guard for it in found.values() for guard in it.guards),
        frozenset(address for it in found.values() for address in it.clusterIPs),
        localities.pop(),
    )
