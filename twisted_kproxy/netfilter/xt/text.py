"""
Rules of ip_tables as the text that ``iptables-restore`` takes and ``iptables-save`` prints: the same to the letter, for
the legacy variant as for the one over nf_tables, so that texts can be compared. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

from msgspec import Struct

from ...core.rules import PROXY_MARK, Target
from ...core.values import Family, Protocol, hostPort
from .layout import CHAINS, LATER, PREFIX, TABLES, Content, TableName
from .packed import REJECT, RESET, Entry, UnknownBytes, pack

_PORTS: dict[Family, str] = {"IPv4": "icmp-port-unreachable", "IPv6": "icmp6-port-unreachable"}
_WIDTH = {"IPv4": "/32", "IPv6": "/128"}
_MARK = f"-m mark ! --mark {PROXY_MARK:#x}/{PROXY_MARK:#x}"
_PROTOCOLS: dict[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}


def textOf(entry: Entry) -> str:
    """A rule's specification, as it follows ``-A CHAIN``."""
    words = []
    if entry.source:
        words.append(f"-s {entry.source}")
    if entry.destination:
        words.append(f"-d {entry.destination}{'' if '/' in entry.destination else _WIDTH[entry.family]}")
    if entry.interface:
        words.append(f"-i {entry.interface}")
    protocol = entry.protocol.lower() if entry.protocol else ""
    if protocol:
        words.append(f"-p {protocol}")
    quoted = f'"{entry.comment}"' if re.search(r"[^A-Za-z0-9/_.:-]", entry.comment) else entry.comment
    words.append(f"-m comment --comment {quoted}")
    if entry.port:
        words.append(f"-m {protocol} --dport {entry.port}")
    if entry.sourceLocal or entry.destinationLocal:
        words.append("-m addrtype")
        words += ["--src-type LOCAL"] * entry.sourceLocal + ["--dst-type LOCAL"] * entry.destinationLocal
    if entry.state:
        words.append(f"-m conntrack {'! ' * entry.state.startswith('!')}--ctstate {entry.state.lstrip('!')}")
    if entry.unmarked:
        words.append(_MARK)
    target = entry.target
    if isinstance(target, Target):
        words.append(f"-j DNAT --to-destination {hostPort(target.address, target.port)}")
    elif target in (REJECT, RESET):
        words.append(f"-j REJECT --reject-with {'tcp-reset' if target == RESET else _PORTS[entry.family]}")
    else:
        words.append(f"-j {target}")
    return " ".join(words)


_SPECIFICATION = re.compile(
    r"(?:-s (?P<source>\S+) )?"
    r"(?:-d (?P<destination>[^ /]+/\d{1,3}) )?"
    r"(?:-i (?P<interface>[^ ]{1,15}) )?"
    r"(?:-p (?P<protocol>tcp|udp|sctp) )?"
    r'-m comment --comment (?:"(?P<quoted>[^"]*)"|(?P<bare>[^" ]+))'
    r"(?: -m (?P<match>tcp|udp|sctp) --dport (?P<port>\d{1,5}))?"
    r"(?: -m addrtype(?P<sourceLocal> --src-type LOCAL)?(?P<destinationLocal> --dst-type LOCAL)?)?"
    r"(?: -m conntrack (?P<inverted>! )?--ctstate (?P<state>NEW|ESTABLISHED|DNAT))?"
    rf"(?P<unmarked> {re.escape(_MARK)})?"
    r" -j (?:DNAT --to-destination (?:\[(?P<six>[^\]]+)\]|(?P<four>[^:\[ ]+)):(?P<to>\d{1,5})"
    r"|REJECT --reject-with (?P<reason>\S+)"
    r"|(?P<word>[A-Z][A-Za-z0-9_-]*))"
)


def entryOf(family: Family, text: str) -> Entry:
    """
    The rule that a specification says.

    :raise UnknownBytes: when it is none that :func:`textOf` gives.
    """
    found = _SPECIFICATION.fullmatch(text)
    if found is None:
        raise UnknownBytes(f"a rule of another shape than is written here: {text[:200]}")
    it = found.groupdict()
    target: Target | str
    if it["to"]:
        target = Target(it["six"] or it["four"], int(it["to"]))
    elif it["reason"]:
        target = RESET if it["reason"] == "tcp-reset" else REJECT
    else:
        target = it["word"]
    state: Any = ("!" if it["inverted"] else "") + (it["state"] or "")
    protocol = _PROTOCOLS.get(it["protocol"] or "")
    destination = (it["destination"] or "").removesuffix(_WIDTH[family])
    entry = Entry(
        family, it["quoted"] or it["bare"] or "", target, it["source"] or "", destination, protocol,
        int(it["port"] or 0), bool(it["sourceLocal"]), bool(it["destinationLocal"]), state, bool(it["unmarked"]),
        it["interface"] or "",
    )  # fmt: skip
    if textOf(entry) != text or not _isCanonical(destination):
        raise UnknownBytes(f"a rule of another shape than is written here: {text[:200]}")
    return entry


def _isCanonical(destination: str) -> bool:
    try:
        return "/" not in destination or str(ip_network(destination)) == destination
    except ValueError:
        return False


# --- what iptables-save prints ---------------------------------------------------------------------------------------


class Lead(Struct, frozen=True):
    """
    A rule of a chain that is not ours which leads to one of ours.

    :ivar hook: that chain.
    :ivar index: its place there, from 0.
    :ivar text: its specification.
    :ivar to: our chain.
    """

    hook: str
    index: int
    text: str
    to: str


class Saved(Struct):
    """
    One table, as far as it concerns us.

    :ivar own: our chains, of whichever version → specifications of their rules.
    :ivar leads: the rules of other chains that lead to ours.
    :ivar builtin: the kernel's own chains → how many rules each has.
    """

    own: dict[str, list[str]] = {}
    leads: list[Lead] = []
    builtin: dict[str, int] = {}


_LEADS = re.compile(rf" -[jg] ({PREFIX}\S*)$")


def parseSave(text: str) -> dict[str, Saved]:
    """
    The tables in what ``iptables-save`` has printed.

    :raise UnknownBytes: when it is not complete, or not the output of that program.
    """
    tables: dict[str, Saved] = {}
    counts: dict[str, int] = {}
    table: Saved | None = None
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        if line[0] == "*":
            if table is not None:
                raise UnknownBytes("iptables-save gave a table without an end")
            table, counts = Saved(), {}
            tables[line[1:]] = table
        elif table is None:
            raise UnknownBytes(f"iptables-save gave a line outside of any table: {line[:200]!r}")
        elif line[0] == ":":
            chain, policy = line[1:].split()[:2]
            if policy != "-":
                table.builtin[chain] = 0
            elif chain.startswith(PREFIX):
                table.own[chain] = []
        elif line.startswith("-A "):
            _, chain, specification = line.split(" ", 2)
            if chain in table.own:
                table.own[chain].append(specification)
                continue
            index = counts[chain] = counts.get(chain, -1) + 1
            if chain in table.builtin:
                table.builtin[chain] = index + 1
            led = _LEADS.search(line)
            if led is not None:
                table.leads.append(Lead(chain, index, specification, led[1]))
        elif line == "COMMIT":
            table = None
        else:
            raise UnknownBytes(f"iptables-save gave a line that is not known here: {line[:200]!r}")
    if table is not None:
        raise UnknownBytes("iptables-save has stopped in the middle of a table")
    return tables


def packedContent(family: Family, tables: dict[str, Saved]) -> Content[bytes] | None:
    """
    What our chains hold, as bytes; ``None`` where there are none.

    :raise UnknownBytes: where one is missing that earlier versions had, or holds a rule that cannot be one of ours.
    """
    contents: dict[TableName, dict[str, list[bytes]]] = {}
    for name in TABLES:
        saved = tables.get(name)
        if saved is None or not saved.own:
            continue
        if saved.own.keys() | LATER != set(CHAINS[name]) | LATER:
            raise UnknownBytes(f"{family} {name} has the chains {', '.join(sorted(saved.own))}")
        contents[name] = {chain: list(_packed(family, saved.own.get(chain, []))) for chain in CHAINS[name]}
    if not contents:
        return None
    if len(contents) < len(TABLES):
        raise UnknownBytes(f"{family} has our chains in one table only")
    return Content(contents["nat"], contents["filter"])


def _packed(family: Family, specifications: list[str]) -> Iterator[bytes]:
    for specification in specifications:
        try:
            yield pack(entryOf(family, specification))
        except (OSError, ValueError, OverflowError, KeyError) as error:  # an address that is none, and the like
            raise UnknownBytes(str(error)) from None
