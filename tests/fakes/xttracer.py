"""Reads rules of ip_tables as the text that ``iptables-restore`` takes, and asks them about a packet."""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct

from .tracer import Chain, NotUnderstood, Packet, Verdict

_HOOKS = {"PREROUTING": "prerouting", "INPUT": "input", "FORWARD": "forward", "OUTPUT": "output"}
_PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0}
_MATCHES = ("comment", "tcp", "udp", "sctp", "addrtype", "conntrack", "mark")

Test: TypeAlias = Callable[[Packet], bool]


class _Rule(Struct):
    tests: list[Test]
    target: str
    to: str = ""


class IptablesRules:
    """
    The tables of one family.

    :param version: 4 or 6.
    :param script: what ``iptables-restore`` is given, on a machine that has no rules yet.
    :raise NotUnderstood:
    """

    def __init__(self, version: int, script: str) -> None:
        self.version = version
        self._tables: dict[str, dict[str, list[_Rule]]] = {}
        table = ""
        for line in script.splitlines():
            if line.startswith("*"):
                table = line[1:]
                chains = self._tables.setdefault(table, {hook: [] for hook in _HOOKS})
            elif line == "COMMIT":
                table = ""
            elif not table:
                raise NotUnderstood(line)
            elif line.startswith(":"):
                chains[line[1:].split()[0]] = []
            else:
                self._edit(chains, shlex.split(line))
        for chains in self._tables.values():
            for rules in chains.values():
                for rule in rules:
                    if rule.target not in ("ACCEPT", "DROP", "REJECT", "RETURN", "DNAT") and rule.target not in chains:
                        raise NotUnderstood(f"there is no chain {rule.target}")

    def _edit(self, chains: dict[str, list[_Rule]], words: list[str]) -> None:
        verb, chain, *rest = words
        if verb == "-A":
            chains[chain].append(self._rule(rest))
        elif verb == "-I":
            number = int(rest.pop(0)) if rest[0].isdigit() else 1
            chains[chain].insert(number - 1, self._rule(rest))
        else:
            raise NotUnderstood(" ".join(words))

    def _rule(self, words: list[str]) -> _Rule:
        tests: list[Test] = []
        target = to = ""
        left = list(words)
        while left:
            negated = left[0] == "!"
            if negated:
                del left[0]
            option, value = left[:2]
            del left[:2]
            if option == "-j":
                target = value
                if value == "DNAT" and left[:1] == ["--to-destination"]:
                    to, left = left[1], left[2:]
                elif value == "REJECT" and left[:1] == ["--reject-with"]:
                    left = left[2:]
                continue
            if (option == "-m" and value in _MATCHES) or option == "--comment":
                continue
            tests.append(self._test(option, value, negated, words))
        if not target:
            raise NotUnderstood(" ".join(words))
        return _Rule(tests, target, to)

    def _test(self, option: str, value: str, negated: bool, words: list[str]) -> Test:
        if option in ("-s", "-d"):
            network = ipaddress.ip_network(value)
            if option == "-s":
                return lambda packet: (ipaddress.ip_address(packet.source) in network) != negated
            return lambda packet: (ipaddress.ip_address(packet.address) in network) != negated
        if option == "-p" and value in ("tcp", "udp", "sctp"):
            return lambda packet: (packet.protocol.lower() == value) != negated
        if option == "-i":
            name = value.removesuffix("+")
            whole = name == value
            return lambda packet: (packet.link == name if whole else packet.link.startswith(name)) != negated
        if option == "--dport" and value.isdigit():
            return lambda packet: (packet.port == int(value)) != negated
        if option in ("--src-type", "--dst-type") and value == "LOCAL":
            if option == "--src-type":
                return lambda packet: packet.isLocal(packet.source) != negated
            return lambda packet: packet.isLocal(packet.address) != negated
        if option == "--ctstate":
            states = value.split(",")
            return lambda packet: ("NEW" in states or ("DNAT" in states and packet.rewritten)) != negated
        if option == "--mark":
            mark, _, mask = value.partition("/")
            number, bits = int(mark, 0), int(mask or "0xffffffff", 0)
            return lambda packet: ((packet.mark & bits) == number) != negated
        raise NotUnderstood(f"iptables: {option} {value} in: {' '.join(words)}")

    def chains(self) -> list[Chain]:
        """Those that the kernel calls."""
        return [
            Chain(
                _HOOKS[hook],
                _PRIORITIES[table],
                table == "nat",
                lambda packet, chains=chains, hook=hook: self._chain(chains, hook, packet) or "accept",  # type: ignore[misc]
                self.version,
            )
            for table, chains in self._tables.items()
            for hook in _HOOKS
        ]

    def _chain(self, chains: dict[str, list[_Rule]], name: str, packet: Packet) -> Verdict | None:
        """What a chain says; ``None`` where its end is reached, or a rule sends the packet back."""
        for rule in chains[name]:
            if not all(holds(packet) for holds in rule.tests):
                continue
            if rule.target == "RETURN":
                return None
            if rule.target in ("ACCEPT", "DROP", "REJECT"):
                return rule.target.lower()  # type: ignore[return-value]
            if rule.target == "DNAT":
                address, _, port = rule.to.rpartition(":")
                packet.address, packet.port = address.strip("[]"), int(port)
                return "accept"
            verdict = self._chain(chains, rule.target, packet)
            if verdict is not None:
                return verdict
        return None
