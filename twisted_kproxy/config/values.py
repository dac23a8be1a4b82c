"""
The values that the ini file may hold: for each sort one function that reads it and one that writes it. What cannot be
read raises :class:`ValueError`, whose text says what is allowed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from ..core.values import hostPort
from ..core.wording import suggestion

LONGEST = 86400.0
LONGEST_TIMEOUT = 8760 * 3600
LARGEST_COUNT = 2**31 - 1
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)")
_BARE = re.compile(r"\d+(\.\d+)?")
#: RFC 1123 subdomain, as the API server demands of a Node's name.
_NODE_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_LABEL_VALUE = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?\Z")
_SWITCH = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


NODE_PORT_WORDS = ("primary", "localhost", "all")


class HostPort(Struct, frozen=True):
    host: str
    port: int

    def __str__(self) -> str:
        return hostPort(self.host, self.port)


class Value(Struct, frozen=True):
    """One sort of value: how it is read and how it is written."""

    read: Callable[[str], Any]
    write: Callable[[Any], str] = str


def oneOf(known: Iterable[str], refused: dict[str, str] | None = None) -> Value:
    """
    One of these words.

    :param refused: words that deserve an answer of their own.
    """
    words = list(dict.fromkeys(known))

    def read(text: str) -> str:
        if refused and text in refused:
            raise ValueError(refused[text])
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}{suggestion(text, words)}")
        return text

    return Value(read)


def _milliseconds(text: str) -> float:
    end = 0
    total = 0.0
    for match in _DURATION.finditer(text):
        if match.start() != end:
            break
        total += float(match[1]) * _UNITS[match[2]]
        end = match.end()
    if end == 0 or end != len(text):
        if _BARE.fullmatch(text):
            raise ValueError(f"a bare number has no unit: write {text}s for seconds; units are ms, s, m and h")
        raise ValueError("must be a duration with a unit, ms, s, m or h, such as 250ms, 30s or 1m30s")
    return total


def readDuration(text: str) -> float:
    """Seconds of ``250ms``, ``1.5s``, ``1m30s``."""
    seconds = _milliseconds(text) / 1000
    if seconds > LONGEST:
        raise ValueError("must be at most 24h")
    return seconds


def readPositiveDuration(text: str) -> float:
    seconds = readDuration(text)
    if seconds < 0.001:
        raise ValueError("must be at least 1ms")
    return seconds


def writeDuration(seconds: float) -> str:
    """The shortest text that is read as the same, with the unit that people would take."""
    if seconds and seconds % 3600 == 0:
        return f"{seconds / 3600:.0f}h"
    text = f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"
    thousandths = f"{seconds * 1000:.9f}".rstrip("0").rstrip(".") + "ms"
    return thousandths if 0 < seconds < 1 else text


def readDurations(text: str) -> tuple[float, ...]:
    parts = text.replace(",", " ").split()
    if not parts:
        raise ValueError("must hold at least one duration, such as 250ms 500ms 1s 2s")
    if len(parts) > 16:
        raise ValueError("must hold at most 16 durations")
    for part in parts:
        if _BARE.fullmatch(part):
            # These are short, and who comes from elsewhere may well have meant milliseconds.
            raise ValueError(f"{part} has no unit: write {part}ms or {part}s; units are ms, s, m and h")
    return tuple(readPositiveDuration(part) for part in parts)


def readTimeout(text: str) -> int:
    """Whole seconds of a duration; 0, or nothing, is 0: leave it as it is."""
    if not text:
        return 0
    seconds = _milliseconds(text) / 1000
    if seconds != int(seconds) or seconds > LONGEST_TIMEOUT:
        raise ValueError("must be whole seconds, at most 8760h, such as 90s or 24h; empty to leave it as it is")
    return int(seconds)


def readCount(text: str) -> int:
    """A number; 0 leaves things as they are."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > LARGEST_COUNT:
        raise ValueError(f"must be a number from 0 to {LARGEST_COUNT}; 0 to leave it as it is")
    return int(text)


def readCIDRs(text: str) -> tuple[str, ...]:
    """Networks, comma separated, at most one per family; canonical."""
    found: dict[int, str] = {}
    for part in (part.strip() for part in text.split(",")):
        if not part:
            if text.strip():
                raise ValueError("has an empty item: write networks as 10.128.0.0/14, fd00:10::/48")
            continue
        if "/" not in part:
            raise ValueError(f"{part} has no prefix length: write a network such as 10.128.0.0/14 or fd00:10::/48")
        try:
            network = ipaddress.ip_network(part)
        except ValueError:
            try:
                loose = ipaddress.ip_network(part, strict=False)
            except ValueError:
                raise ValueError(f"{part} is no network: write one such as 10.128.0.0/14 or fd00:10::/48")
            raise ValueError(f"{part} has bits set after its prefix: write {loose}")
        if network.version in found:
            raise ValueError(
                f"has two IPv{network.version} networks, {found[network.version]} and {network}: one per family"
            )
        found[network.version] = str(network)
    return tuple(found.values())


def readNetworks(text: str) -> tuple[str, ...]:
    """Networks, comma separated, as many as there are; canonical."""
    found: list[str] = []
    for part in (part.strip() for part in text.split(",") if text.strip()):
        found += readCIDRs(part) or (_empty(),)
    return tuple(dict.fromkeys(found))


def _empty() -> str:
    raise ValueError("has an empty item: write networks as 10.128.0.0/14, fd00:10::/48")


def readNodePortAddresses(text: str) -> tuple[str, ...]:
    """Networks and words, comma separated."""
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part in NODE_PORT_WORDS:
            found.append(part)
        else:
            try:
                found += readNetworks(part) or (_empty(),)
            except ValueError as error:
                raise ValueError(f"{error}; or say one of {', '.join(NODE_PORT_WORDS)}")
    return tuple(dict.fromkeys(found))


def readInterface(text: str) -> str:
    """The name of a network interface, or how such names begin."""
    if text and not re.fullmatch(r"[^\s/:*+\"'%!]{1,15}", text):
        raise ValueError("must be the name of an interface: at most 15 characters, without blanks, / : * + % and !")
    return text


def readBind(text: str) -> HostPort | None:
    """``ADDRESS:PORT``; port 0 is any free one. Empty is ``None``: off."""
    if not text:
        return None
    allowed = "must be ADDRESS:PORT with an IP address, such as 127.0.0.1:10249 or [::1]:10249, or empty for off"
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise ValueError(allowed)
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise ValueError(allowed)
    if (address.version == 6) != bracketed:
        raise ValueError(f"{allowed}; only IPv6 addresses are bracketed, and all of them are")
    if int(port) > 65535:
        raise ValueError("the port must be 0 to 65535 (0: any free one)")
    return HostPort(str(address), int(port))


def readPortRange(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,5})\s*-\s*(\d{1,5})", text, re.ASCII)
    if not match:
        raise ValueError("must be FIRST-LAST, such as 20000-20999, or empty for any free port")
    first, last = int(match[1]), int(match[2])
    if first < 1024 or last > 65535 or last < 1:
        raise ValueError("must lie within 1024 to 65535")
    if first > last:
        raise ValueError(f"is reversed: write {last}-{first}")
    return first, last


def readWorkers(text: str) -> int:
    """How many relay workers."""
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= 64:
        raise ValueError("must be a number from 1 to 64; 1 for none beside the daemon itself")
    return int(text)


def readNodeName(text: str) -> str:
    """A Node's name; lower-cased, as kube-proxy does with ``--hostname-override``."""
    name = text.strip().lower()
    if not _NODE_NAME.match(name):
        raise ValueError("must be the name of a Node: lower-case letters, digits, '-' and '.', at most 253")
    return name


def readProxyName(text: str) -> str:
    if text and not _LABEL_VALUE.match(text):
        raise ValueError(
            "must be a label value: letters, digits, '-', '_' and '.', at most 63, with a letter or digit at both ends"
        )
    return text


def readSwitch(text: str) -> bool:
    try:
        return _SWITCH[text.lower()]
    except KeyError:
        raise ValueError("must be yes or no")


def readServer(text: str) -> str:
    """The base URL of an API server."""
    allowed = "must be a URL such as https://10.0.0.1:6443"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(allowed)
    if parts.scheme not in ("http", "https") or not host or port == 0 or re.search(r"\s", text):
        raise ValueError(allowed)
    if parts.query or parts.fragment:
        raise ValueError(f"{allowed}, without '?' or '#'")
    return text


def readHostName(text: str) -> str:
    """A host name or address to be verified in a certificate."""
    if not re.fullmatch(r"[A-Za-z0-9._:-]{0,253}", text):
        raise ValueError("must be a host name or an address, such as kubernetes.default.svc")
    return text


def readProxyUrl(text: str) -> str:
    """Where the API server is reached through; the source judges the rest."""
    if text in ("", "none", "environment") or re.fullmatch(r"(http|https|socks5)://\S+", text):
        return text
    raise ValueError("must be none, environment, or the URL of a proxy such as http://10.0.0.9:3128 or socks5://…")


def masked(text: str) -> str:
    """The same without what stands before an ``@`` in a URL."""
    return re.sub(r"//\S*@", "//***@", text)


DURATION = Value(readDuration, writeDuration)
POSITIVE_DURATION = Value(readPositiveDuration, writeDuration)
TIMEOUT = Value(readTimeout, lambda seconds: writeDuration(seconds) if seconds else "")
COUNT = Value(readCount)
DURATIONS = Value(readDurations, lambda values: " ".join(writeDuration(value) for value in values))
CIDRS = Value(readCIDRs, ", ".join)
NETWORKS = Value(readNetworks, ", ".join)
NODE_PORT_ADDRESSES = Value(readNodePortAddresses, ", ".join)
INTERFACE = Value(readInterface)
BIND = Value(readBind, lambda value: "" if value is None else str(value))
PORT_RANGE = Value(readPortRange, lambda value: "" if value is None else f"{value[0]}-{value[1]}")
WORKERS = Value(readWorkers)
NODE_NAME = Value(readNodeName)
PROXY_NAME = Value(readProxyName)
SWITCH = Value(readSwitch, lambda value: "yes" if value else "no")
SERVER = Value(readServer, masked)
HOST_NAME = Value(readHostName)
PROXY_URL = Value(readProxyUrl, masked)
