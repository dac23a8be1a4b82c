"""Planting UDP flows in the connection tracking of a namespace, many at once."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from twisted_kproxy.netfilter.netlink import (
    NESTED,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NetlinkSocket,
    attribute,
    message,
)

_NEW = 1 << 8 | 0
_UDP = 17
#: IPS_CONFIRMED, SEEN_REPLY, ASSURED; of those that were led elsewhere also DST_NAT and DST_NAT_DONE
_STATUS = 0x2 | 0x4 | 0x8
_REWRITTEN = 0x20 | 0x100

#: client address and port, dialled address and port, address and port that answers
Flow = tuple[str, int, str, int, str, int]


def _tuple(kind: int, source: str, sport: int, destination: str, dport: int) -> bytes:
    six = ":" in source
    family = socket.AF_INET6 if six else socket.AF_INET
    ip = attribute(3 if six else 1, socket.inet_pton(family, source))
    ip += attribute(4 if six else 2, socket.inet_pton(family, destination))
    ports = attribute(2, struct.pack(">H", sport)) + attribute(3, struct.pack(">H", dport))
    proto = attribute(1, bytes([_UDP])) + ports
    return attribute(kind | NESTED, attribute(1 | NESTED, ip) + attribute(2 | NESTED, proto))


def plant(opener: Callable[..., Any], flows: Iterable[Flow], seconds: int = 600) -> int:
    """Make these flows; gives how many were made."""
    netlink = NetlinkSocket(opener)
    made = 0
    try:
        batch: list[tuple[int, bytes]] = []

        def send() -> None:
            nonlocal made
            first = netlink.numbers(len(batch))
            data = b"".join(
                message(_NEW, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, number, family, payload)
                for number, (family, payload) in enumerate(batch, first)
            )
            codes = netlink.answers(data, first, first + len(batch) - 1)
            made += codes.count(0)
            batch.clear()

        for client, port, dialled, dport, answering, aport in flows:
            payload = _tuple(1, client, port, dialled, dport) + _tuple(2, answering, aport, client, port)
            rewritten = _REWRITTEN if (dialled, dport) != (answering, aport) else 0
            payload += attribute(3, struct.pack(">I", _STATUS | rewritten)) + attribute(7, struct.pack(">I", seconds))
            batch.append((socket.AF_INET6 if ":" in client else socket.AF_INET, payload))
            if len(batch) == 100:
                send()
        if batch:
            send()
    finally:
        netlink.close()
    return made
