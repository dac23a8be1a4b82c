"""Reads our nf_tables rules as text, as ``nft -f`` would, and asks them about a packet."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from msgspec import Struct

from .tracer import Chain, NotUnderstood, Packet, Verdict

_PRIORITIES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}
_TOKEN = re.compile(r'"[^"]*"|[{},;]|[^\s{},;"]+')


class Elements(Struct):
    """A set or a map: how many parts a key has, whether these may be ranges, the type of its values; what it holds."""

    parts: int
    interval: bool
    leads: str = ""
    items: dict[tuple[str, ...], list[str]] = {}

    def find(self, key: tuple[str, ...]) -> list[str] | None:
        """The value for a key (empty in a set), ``None`` where it is not there."""
        found = self.items.get(key)
        if found is not None or not self.interval:
            return found
        for known, value in self.items.items():
            if all(_matches(text, it) for text, it in zip(known, key, strict=True)):
                return value
        return None


class NftRules:
    """
    One table.

    :param text: chains, sets and elements.
    :raise NotUnderstood:
    """

    def __init__(self, text: str) -> None:
        self.sets: dict[str, Elements] = {}
        self.rules: dict[str, list[list[str]]] = {}
        self.hooks: dict[str, tuple[str, int, bool]] = {}
        self._policies: dict[str, str] = {}
        chain = ""
        for line in text.splitlines():
            words = _TOKEN.findall(line.strip())
            if not words or words[0] in ("table", "delete", "comment"):
                if words[:2] == ["delete", "element"]:
                    self._elements(words)
                continue
            if words[0] in ("set", "map") and not chain:
                self._declare(line.strip())
            elif words[0] == "chain":
                chain = words[1]
                self.rules[chain] = []
            elif words == ["}"]:
                chain = ""
            elif words[0] in ("add", "flush"):
                self._elements(words)
            elif chain and words[0] == "type":
                self._hook(chain, line.strip())
            elif chain:
                self.rules[chain].append([it for it in words if it != ";"])
            else:
                raise NotUnderstood(line)
        for rules in self.rules.values():
            for rule in rules:
                _Rule(self, list(rule), None).run()
        for it in self.sets.values():
            for value in it.items.values():
                if it.leads == "verdict":
                    _Rule(self, list(value), None).run()
                elif len(value) != (3 if it.leads else 0):
                    raise NotUnderstood(f"an element that says {' '.join(value)}")

    def chains(self) -> list[Chain]:
        """Those that the kernel calls."""
        return [
            Chain(hook, priority, isNat, lambda packet, name=name: self._base(name, packet))  # type: ignore[misc]
            for name, (hook, priority, isNat) in self.hooks.items()
        ]

    # --- reading

    def _hook(self, chain: str, line: str) -> None:
        found = re.fullmatch(
            r"type (filter|nat) hook (\w+) priority (-?\d+|[a-z]+)(?: ([+-]) (\d+))?; policy (accept|drop);", line
        )
        if found is None:
            raise NotUnderstood(line)
        kind, hook, priority, sign, more, policy = found.groups()
        number = _PRIORITIES[priority] if priority in _PRIORITIES else int(priority)
        number += int(f"{sign}{more}") if more else 0
        self.hooks[chain] = (hook, number, kind == "nat")
        self._policies[chain] = policy

    def _declare(self, line: str) -> None:
        found = re.fullmatch(
            r"(?:set|map) (\S+) \{ type ([^;:]+?)(?: : ([^;]+?))?; ?(?:flags interval; ?)?(?:auto-merge; ?)?\}", line
        )
        if found is None:
            raise NotUnderstood(line)
        name, key, value = found.groups()
        if value not in (None, "verdict", "ipv4_addr . inet_service", "ipv6_addr . inet_service"):
            raise NotUnderstood(line)
        self.sets[name] = Elements(len(key.split(" . ")), "flags interval" in line, value or "")

    def _elements(self, words: list[str]) -> None:
        if words[0] == "flush":
            self.sets[words[4]].items.clear()
            return
        if words[1] != "element" or words[5] != "{" or words[-1] != "}":
            raise NotUnderstood(" ".join(words))
        into = self.sets[words[4]]
        for item in _split(words[6:-1], ","):
            key, *value = _split(item, ":") if ":" in item else (item,)
            parts = tuple(_literal(it) for it in key if it != ".")
            if len(parts) != into.parts or (not into.interval and any("/" in it or "*" in it for it in parts)):
                raise NotUnderstood(f"the set {words[4]} has no place for {' '.join(item)}")
            if words[0] == "delete":
                del into.items[parts]
            else:
                into.items[parts] = value[0] if value else []

    # --- asking

    def _base(self, chain: str, packet: Packet) -> Verdict:
        verdict = self._chain(chain, packet)
        return verdict or self._policies[chain]  # type: ignore[return-value]

    def _chain(self, chain: str, packet: Packet) -> Verdict | None:
        """What a chain says; ``None`` where its end is reached."""
        for rule in self.rules[chain]:
            done, verdict = _Rule(self, list(rule), packet).run()
            if done:
                return verdict
        return None


class _Stop(Exception):
    """This rule is not about this packet."""


class _Rule:
    """
    One rule, and how far it has been read.

    :param packet: ``None`` to read the rule to its end, whatever it says: what is not understood comes out then.
    """

    def __init__(self, rules: NftRules, words: list[str], packet: Packet | None) -> None:
        self.rules, self.words = rules, words
        self.dry = packet is None
        self.packet = packet or Packet("192.0.2.1", "192.0.2.2", 1)

    def _differs(self) -> None:
        """The rule is not about this packet."""
        if not self.dry:
            raise _Stop

    def run(self) -> tuple[bool, Verdict | None]:
        """Whether the chain ends here, and what with."""
        try:
            while self.words:
                ended = self._statement()
                if ended is not None and not self.dry:
                    return ended
        except _Stop:
            pass
        return False, None

    def _take(self, *words: str) -> bool:
        if self.words[: len(words)] != list(words):
            return False
        del self.words[: len(words)]
        return True

    def _unknown(self) -> NotUnderstood:
        return NotUnderstood(f"nft: {' '.join(self.words) or 'the end of a rule'}")

    def _statement(self) -> tuple[bool, Verdict | None] | None:
        if self._take("counter"):
            return None
        if self._take("comment"):
            del self.words[0]
            return None
        if self._take("dnat"):
            self._dnat()
            return True, "accept"
        before = len(self.words)
        verdict = self._verdict()
        if verdict is None and len(self.words) == before:
            self._match()
        return verdict

    def _verdict(self) -> tuple[bool, Verdict | None] | None:
        """A word that ends a rule."""
        for word in ("accept", "drop"):
            if self._take(word):
                return True, word  # type: ignore[return-value]
        if self._take("return"):
            return True, None
        if self._take("reject"):
            if self._take("with", "tcp", "reset"):
                if self.packet.protocol != "TCP":
                    self._differs()
            elif not self._take("with", "icmpx", "port-unreachable") and self.words[:1] not in ([], ["comment"]):
                raise self._unknown()
            return True, "reject"
        for word in ("goto", "jump"):
            if self._take(word):
                chain = self.words.pop(0)
                if chain not in self.rules.rules:
                    raise NotUnderstood(f"there is no chain {chain}")
                verdict = None if self.dry else self.rules._chain(chain, self.packet)
                return (True, verdict) if word == "goto" or verdict is not None else None
        return None

    def _dnat(self) -> None:
        for word, version in (("ip", 4), ("ip6", 6)):
            if self._take(word) and self.packet.version != version:
                self._differs()
        if not self._take("to"):
            raise self._unknown()
        key = self._selector()
        if not self._take("map"):
            raise self._unknown()
        found = self._set(key).find(key)
        if found is None:
            self._differs()
            return
        address, port = (it for it in found if it != ".")
        self.packet.address, self.packet.port = address, int(port)

    def _match(self) -> None:
        flags = self.words[:2] in (["ct", "state"], ["ct", "status"])
        key = self._selector()
        if self._take("vmap"):
            found = self._set(key).find(key)
            if found is None:
                self._differs()
            self.words[:0] = found or []
            return
        if self._take("&"):
            key = (hex(int(key[0], 0) & int(self.words.pop(0), 0)),)
        negated = self._take("!=") or self._take("!")
        if not negated:
            self._take("==")
        if self.words and self.words[0].startswith("@"):
            holds = self._set(key).find(key) is not None
        elif self._take("{"):
            end = self.words.index("}")
            listed = [it for it in self.words[:end] if it != ","]
            del self.words[: end + 1]
            if len(key) != 1:
                raise self._unknown()
            holds = any(_matches(_literal(it), key[0]) for it in listed)
        elif self.words and len(key) == 1:
            listed = [_literal(self.words.pop(0))]
            while self._take(","):
                listed.append(_literal(self.words.pop(0)))
            holds = any(it in key[0].split(",") if flags else _matches(it, key[0]) for it in listed)
        else:
            raise self._unknown()
        if holds == negated:
            self._differs()

    def _set(self, key: tuple[str, ...]) -> Elements:
        """The set that is named, for such a key."""
        name = self.words.pop(0)
        if not name.startswith("@") or name[1:] not in self.rules.sets:
            raise NotUnderstood(f"there is no set {name}")
        it = self.rules.sets[name[1:]]
        if it.parts != len(key):
            raise NotUnderstood(f"{name} has other keys than {key}")
        return it

    def _selector(self) -> tuple[str, ...]:
        found = [self._field()]
        while self._take("."):
            found.append(self._field())
        return tuple(found)

    def _field(self) -> str:
        packet = self.packet
        for version, name in ((4, "ip"), (6, "ip6")):
            for field, value in (("saddr", packet.source), ("daddr", packet.address)):
                if self._take(name, field):
                    if packet.version != version:
                        self._differs()
                    return value
        if self._take("ct", "state"):
            return "new"
        if self._take("ct", "status"):
            return "dnat" if packet.rewritten else ""
        if self._take("meta", "mark"):
            return hex(packet.mark)
        if self._take("meta", "nfproto"):
            return f"ipv{packet.version}"
        if self._take("meta", "l4proto"):
            return packet.protocol.lower()
        for word in ("th", "tcp", "udp", "sctp"):
            if self._take(word, "dport"):
                if packet.protocol == "ICMP" or word not in ("th", packet.protocol.lower()):
                    self._differs()
                return str(packet.port)
        if self._take("meta", "iifname") or self._take("iifname"):
            return packet.link
        for field, value in (("daddr", packet.address), ("saddr", packet.source)):
            if self._take("fib", field, "type"):
                return "local" if packet.isLocal(value) else "unicast"
        raise self._unknown()


def _split(words: list[str], at: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in words:
        if word == at:
            found.append([])
        else:
            found[-1].append(word)
    return [it for it in found if it]


def _literal(text: str) -> str:
    return text.strip('"')


def _matches(text: str, value: Any) -> bool:
    """Whether a literal of a rule stands for a value of a packet."""
    if text == value:
        return True
    if text.endswith("*"):
        return str(value).startswith(text[:-1])
    if text.startswith("0x") or str(value).startswith("0x"):
        return int(text, 0) == int(value, 0)
    low, dash, high = text.partition("-")
    try:
        if "/" in text:
            return ipaddress.ip_address(value) in ipaddress.ip_network(text)
        if dash and low.isdigit():
            return int(low) <= int(value) <= int(high)
        if dash and ("." in low or ":" in low):
            one, other, it = (int(ipaddress.ip_address(a)) for a in (low, high, value))
            return one <= it <= other
    except ValueError:
        return False
    return False
