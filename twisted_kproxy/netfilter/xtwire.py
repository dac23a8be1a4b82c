"""
What the rule writer and its worker process say to each other: JSON, each message after its length in four bytes.

Both sides import this; it knows neither Twisted nor python-iptables.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from ..core.rules import Delta, Guard, Rule, Ruleset
from ..core.values import PLAIN, FrontendKey, Locality

#: File descriptors of the worker: 0, 1 and 2 are out of the question, since the library writes to 1.
REQUESTS, REPLIES = 3, 4

#: Well above any ruleset (a frontend takes some 200 bytes); more is a broken stream.
LIMIT = 256 * 1024 * 1024

_LENGTH = struct.Struct("!I")


class Request(Struct, frozen=True, omit_defaults=True):
    """
    One call.

    :ivar op: ``check``, ``adopt``, ``apply``, ``replace``, ``peek``, ``cleanup``.
    :ivar rules: for ``replace`` all, for ``apply`` the steps.
    :ivar guards: for ``replace`` all, for ``apply`` those to add; so with ``clusterIPs``.
    :ivar locality: for ``apply`` ``None`` where it stays.
    :ivar full: for ``peek``: read everything back whatever the counters say.
    :ivar lockSeconds: how long to wait for the lock of xtables.
    """

    op: str
    rules: list[tuple[FrontendKey, Rule | None]] = []
    guards: frozenset[Guard] = frozenset()
    guardsRemoved: frozenset[Guard] = frozenset()
    clusterIPs: frozenset[str] = frozenset()
    clusterIPsRemoved: frozenset[str] = frozenset()
    locality: Locality | None = None
    full: bool = False
    lockSeconds: float = 20.0

    @classmethod
    def replacing(cls, ruleset: Ruleset, lockSeconds: float = 20.0) -> Request:
        """Make this what is in force."""
        return cls(
            "replace",
            list(ruleset.rules.items()),
            ruleset.guards,
            clusterIPs=ruleset.clusterIPs,
            locality=ruleset.locality,
            lockSeconds=lockSeconds,
        )

    @classmethod
    def applying(cls, delta: Delta, lockSeconds: float = 20.0) -> Request:
        """Take this step."""
        return cls(
            "apply",
            list(delta.rules.items()),
            delta.guardsAdded,
            delta.guardsRemoved,
            delta.clusterIPsAdded,
            delta.clusterIPsRemoved,
            delta.locality,
            lockSeconds=lockSeconds,
        )

    def ruleset(self) -> Ruleset:
        """What ``replace`` asks for."""
        rules = {key: rule for key, rule in self.rules if rule is not None}
        return Ruleset(rules, self.guards, self.clusterIPs, self.locality or PLAIN)

    def delta(self) -> Delta:
        """What ``apply`` asks for."""
        return Delta(
            dict(self.rules), self.guards, self.guardsRemoved, self.clusterIPs, self.clusterIPsRemoved, self.locality
        )


class Reply(Struct, frozen=True, omit_defaults=True):
    """
    What came of it.

    :ivar error: what went wrong, for an operator to read; empty where nothing did.
    :ivar unavailable: the error is about this machine, not about what was asked for.
    :ivar refused: the frontends that the error is about, where that is known.
    :ivar unjudged: nobody got to judge the rules.
    :ivar leaving: the worker ends after this reply; start another one.
    :ivar text: for ``check``: what was found.
    :ivar changed: for ``peek``: somebody else was at our rules; for ``cleanup``: there was something.
    :ivar known: for ``peek``: there is something to compare with.
    :ivar notes: for the log.
    :ivar adopted: for ``adopt``: there is a ruleset in force, and it could be read.
    :ivar seconds: what the call took, and of that: ``waited`` for the lock, ``held`` it.
    """

    error: str = ""
    unavailable: bool = False
    refused: frozenset[FrontendKey] = frozenset()
    unjudged: bool = False
    leaving: bool = False
    text: str = ""
    changed: bool = False
    known: bool = False
    notes: tuple[str, ...] = ()
    adopted: bool = False
    rules: list[tuple[FrontendKey, Rule]] = []
    guards: frozenset[Guard] = frozenset()
    clusterIPs: frozenset[str] = frozenset()
    locality: Locality = PLAIN
    seconds: float = 0.0
    waited: float = 0.0
    held: float = 0.0

    @classmethod
    def adopting(cls, found: Ruleset | None) -> Reply:
        """What ``adopt`` found."""
        if found is None:
            return cls()
        return cls(
            adopted=True,
            rules=list(found.rules.items()),
            guards=found.guards,
            clusterIPs=found.clusterIPs,
            locality=found.locality,
        )

    def ruleset(self) -> Ruleset | None:
        """The same, back."""
        return Ruleset(dict(self.rules), self.guards, self.clusterIPs, self.locality) if self.adopted else None


decodeRequest = msgspec.json.Decoder(Request).decode
decodeReply = msgspec.json.Decoder(Reply).decode


def framed(message: Request | Reply) -> bytes:
    """A message as it goes over the pipe."""
    data = msgspec.json.encode(message)
    return _LENGTH.pack(len(data)) + data


class FrameBuffer:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """
        Take bytes in; gives each message that is complete with them.

        :raise ValueError: for a length that no message has: the stream is of no use any more.
        """
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > LIMIT:
                raise ValueError(f"a message of {length} bytes was announced")
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            message = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield message
