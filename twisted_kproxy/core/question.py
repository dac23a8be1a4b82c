"""What ``/explain`` is asked: the query of its URL as a value, or what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from .addresses import BadAddress, canonical, familyOf
from .values import Protocol

USAGE = (
    "ask /explain?to=10.96.0.10:80 or /explain?service=NAMESPACE/NAME:PORT, and add from=ADDRESS for one client: "
    "to=[fd00::10]:53/udp for IPv6 and other protocols; interface=NAME by which the client comes in; pretty"
)
_PROTOCOLS: dict[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}
_KEYS = ("from", "to", "service", "interface")
_NUMBER = re.compile(r"[0-9]{1,5}")
#: Names may be anything: that of an object that cannot be read is asked for as well.
_SERVICE = re.compile(
    r"(?P<namespace>[^/]+)/(?P<name>[^:].*?)(?::(?P<port>[^:/]*)(?P<slash>/(?P<protocol>.*))?)?", re.DOTALL
)


class BadQuestion(ValueError):
    """The text says what is wrong, and how to ask."""


class Dialled(Struct, frozen=True):
    """An address and port that a client dials."""

    address: str
    port: int
    protocol: Protocol


class ServiceAsked(Struct, frozen=True):
    """
    :ivar port: name or number; ``None`` for all of its ports.
    :ivar protocol: ``None`` for each.
    """

    namespace: str
    name: str
    port: str | None = None
    protocol: Protocol | None = None


class Question(Struct, frozen=True):
    """
    :ivar source: canonical address of the client; ``None`` for anybody, from inside and from outside.
    :ivar about: what is dialled.
    :ivar link: the interface by which the client comes in.
    """

    about: Dialled | ServiceAsked
    source: str | None = None
    link: str | None = None


def questionOf(query: Mapping[str, Sequence[str]]) -> Question:
    """
    :param query: decoded; by name all values given.
    :raise BadQuestion: with what is wrong.
    """
    for key, values in query.items():
        if key not in _KEYS:
            raise BadQuestion(f"there is no parameter {key!r}; {USAGE}")
        if len(values) != 1:
            raise BadQuestion(f"{key} is given {len(values)} times; once is enough")
    given = {key: values[0] for key, values in query.items()}
    if ("to" in given) == ("service" in given):
        raise BadQuestion(f"either to or service must be given; {USAGE}")
    about = _dialled(given["to"]) if "to" in given else _service(given["service"])
    source = _address("from", given["from"]) if "from" in given else None
    if source is not None and isinstance(about, Dialled) and familyOf(source) != familyOf(about.address):
        raise BadQuestion(f"from is {familyOf(source)} and to is {familyOf(about.address)}: no such flow can be")
    link = given.get("interface")
    if link is not None and (source is None or not link):
        raise BadQuestion("interface needs a name, and from beside it")
    return Question(about, source, link)


def _address(key: str, text: str) -> str:
    plain = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return canonical(plain)[0]
    except BadAddress as error:
        raise BadQuestion(f"{key}: {error}") from None


def _protocol(text: str) -> Protocol:
    found = _PROTOCOLS.get(text.lower())
    if found is None:
        raise BadQuestion(f"protocol {text!r} is none of tcp, udp, sctp")
    return found


def _dialled(text: str) -> Dialled:
    """``ADDRESS:PORT`` or ``ADDRESS:PORT/PROTOCOL``, an IPv6 address in brackets."""
    where, slash, protocol = text.partition("/")
    if where.startswith("["):
        host, bracket, rest = where[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise BadQuestion(f"to: {text!r} is not as in [fd00::10]:80")
        number = rest[1:]
    else:
        host, colon, number = where.rpartition(":")
        if ":" in host:
            raise BadQuestion(f"to: write an IPv6 address in brackets, as in [fd00::10]:80, not {text!r}")
        if not colon:
            raise BadQuestion(f"to: {text!r} has no port; write 10.96.0.10:80")
    if not _NUMBER.fullmatch(number) or not 0 < int(number) < 65536:
        raise BadQuestion(f"to: {number!r} is not a port number (1 to 65535)")
    address = _address("to", host)
    if where.startswith("[") and ":" not in host:
        raise BadQuestion(f"to: brackets are for IPv6 addresses, and {host!r} is none")
    return Dialled(address, int(number), _protocol(protocol) if slash else "TCP")


def _service(text: str) -> ServiceAsked:
    """``NAMESPACE/NAME``, ``NAMESPACE/NAME:PORT`` or ``NAMESPACE/NAME:PORT/PROTOCOL``."""
    found = _SERVICE.fullmatch(text)
    if found is None:
        raise BadQuestion(f"service: {text!r} is not as in NAMESPACE/NAME:PORT")
    protocol = _protocol(found["protocol"]) if found["slash"] else None
    return ServiceAsked(found["namespace"], found["name"], found["port"], protocol)
