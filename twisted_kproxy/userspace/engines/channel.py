"""What the daemon and its relay workers say to each other: one message a packet."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import Struct

#: The largest message: the early bytes of a client, and a little.
LARGEST = 65536 + 64


class Pair(Struct, frozen=True, tag="pair", array_like=True):
    """Relay between the two sockets that come with this: the client's, the backend's."""

    number: int
    early: bytes = b""


class Cut(Struct, frozen=True, tag="cut", array_like=True):
    """Reset that pair."""

    number: int


Order: TypeAlias = Pair | Cut


class Ended(Struct, frozen=True, array_like=True):
    """How one pair has ended; see :class:`~twisted_kproxy.core.values.Outcome`."""

    number: int
    reason: str
    sent: int
    received: int


class Endings(Struct, frozen=True, array_like=True):
    """What has ended; the first one, empty, says that the worker is ready."""

    ended: list[Ended]


decodeOrder = msgspec.msgpack.Decoder(Order).decode
decodeEndings = msgspec.msgpack.Decoder(Endings).decode
