"""
The kernel's settings of connection tracking, and of local ports (``Documentation/networking/nf_conntrack-sysctl.rst``,
``ip-sysctl.rst``). What is wanted follows kubernetes ``pkg/proxy/conntrack/sysctls.go``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct
from twisted.logger import Logger

from ..core.values import ServiceMap

#: Of what is derived from the number of CPUs: machines with very many must not spend their memory on it.
LIMIT = 1 << 20
_FOLDER = "proc/sys/net/netfilter"
_MAX, _BUCKETS = "nf_conntrack_max", "nf_conntrack_buckets"
_RANGE, _RESERVED = "proc/sys/net/ipv4/ip_local_port_range", "proc/sys/net/ipv4/ip_local_reserved_ports"
#: How many ports are named in a warning.
_NAMED = 5

_log = Logger()


class Wishes(Struct, frozen=True):
    """
    What the configuration says, in the order of its keys. Seconds; 0 leaves a setting as it is.

    :ivar mode: ``auto`` writes in the host's own network namespace only.
    """

    mode: str = "auto"
    maxPerCore: int = 32768
    minimum: int = 131072
    tcpEstablished: int = 86400
    tcpCloseWait: int = 3600
    udp: int = 0
    udpStream: int = 0
    tcpBeLiberal: bool = False


class Setting(Struct, frozen=True):
    """
    One setting as it is.

    :ivar value: ``None`` where it cannot be read.
    :ivar writable: by its mode. Settings of the whole machine are read-only in all network namespaces but the host's.
    """

    value: int | None
    writable: bool


class Write(Struct, frozen=True):
    """One setting as it shall be."""

    name: str
    value: int


def connectionsWanted(wishes: Wishes, cpus: int) -> int:
    """How many connections shall be tracked; 0 for as many as there are now."""
    if not wishes.maxPerCore:
        return 0
    return max(min(wishes.maxPerCore * cpus, LIMIT), wishes.minimum)


def decide(wishes: Wishes, cpus: int, found: Mapping[str, Setting]) -> list[Write]:
    """
    What is to be written, in this order.

    The number of connections is never lowered: somebody has found the larger one right. The hash table is to have a
    quarter of it at least. Times are set to what is wanted, whether longer or shorter.

    :param found: by name, those that there are.
    """
    if wishes.mode == "off" or (wishes.mode == "auto" and not isHost(found)):
        return []
    writes: list[Write] = []
    for name, value, raises in (
        (_MAX, connectionsWanted(wishes, cpus), True),
        (_BUCKETS, connectionsWanted(wishes, cpus) // 4, True),
        ("nf_conntrack_tcp_timeout_established", wishes.tcpEstablished, False),
        ("nf_conntrack_tcp_timeout_close_wait", wishes.tcpCloseWait, False),
        ("nf_conntrack_udp_timeout", wishes.udp, False),
        ("nf_conntrack_udp_timeout_stream", wishes.udpStream, False),
        ("nf_conntrack_tcp_be_liberal", int(wishes.tcpBeLiberal), False),
    ):
        setting = found.get(name)
        if not value or setting is None or not setting.writable or setting.value == value:
            continue
        if raises and setting.value is not None and setting.value > value:
            continue
        writes.append(Write(name, value))
    return writes


def isHost(found: Mapping[str, Setting]) -> bool:
    """Whether this is the host's own network namespace."""
    return _MAX in found and found[_MAX].writable


def read(root: str = "/") -> dict[str, Setting]:
    """Every setting of connection tracking; nothing where the kernel has not loaded it."""
    found: dict[str, Setting] = {}
    folder = os.path.join(root, _FOLDER)
    for name in (
        _MAX, _BUCKETS, "nf_conntrack_tcp_timeout_established", "nf_conntrack_tcp_timeout_close_wait",
        "nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream", "nf_conntrack_tcp_be_liberal",
    ):  # fmt: skip
        path = os.path.join(folder, name)
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue
        value = None
        try:
            with open(path, encoding="ascii") as file:
                value = int(file.read())
        except (OSError, ValueError):
            pass
        found[name] = Setting(value, bool(mode & 0o200))
    return found


class KernelSettings:
    """
    Writes what is wanted, once. A setting that cannot be written is one warning, and nothing else stops.

    :param root: where ``proc`` is.
    :param cpus: how many there are; ``None`` to find out.
    :ivar done: whether it has been done.
    """

    log = Logger()

    def __init__(self, wishes: Wishes, root: str = "/", cpus: int | None = None) -> None:
        self._wishes = wishes
        self._root = root
        self._cpus = cpus or os.cpu_count() or 1
        self.done = wishes.mode == "off"

    def apply(self) -> None:
        """Write, unless that was done; where the kernel does not track connections yet the next call does it."""
        found = {} if self.done else read(self._root)
        self.done = self.done or bool(found)
        for it in decide(self._wishes, self._cpus, found):
            self._write(it, found[it.name].value)

    def _write(self, it: Write, before: int | None) -> None:
        try:
            with open(os.path.join(self._root, _FOLDER, it.name), "w", encoding="ascii") as file:
                file.write(str(it.value))
        except OSError as error:
            self.log.warn(
                "net.netfilter.{name} is {before} and could not be set to {value}: {reason}. Set it with sysctl, allow "
                "kproxy to (its systemd unit does), or say sysctls = off in section [conntrack]",
                name=it.name, before=before, value=it.value, reason=error.strerror,
            )
        else:
            self.log.info(
                "net.netfilter.{name} was {before} and is {value} now", name=it.name, before=before, value=it.value
            )


def nodePortsOf(services: ServiceMap) -> Iterator[int]:
    """Every node port and health-check port."""
    for port in services.values():
        yield from (it.port for it in port.frontends if it.kind == "NodePort")
        if port.healthCheckPort:
            yield port.healthCheckPort


def unreserved(portRange: str, reserved: str, ports: Iterable[int]) -> list[int]:
    """
    Which of some ports the kernel may give to whoever connects from this node.

    :param portRange: the content of ``ip_local_port_range``.
    :param reserved: that of ``ip_local_reserved_ports``: numbers and ranges, comma separated.
    :raise ValueError: for what is neither.
    """
    first, last = (int(it) for it in portRange.split())
    kept = []
    for part in reserved.strip().split(",") if reserved.strip() else ():
        low, _, high = part.partition("-")
        kept.append((int(low), int(high or low)))
    return sorted(
        it for it in set(ports) if first <= it <= last and not any(low <= it <= high for low, high in kept)
    )


def warnOfLocalPorts(ports: Iterable[int], root: str = "/") -> None:
    """
    Say which node ports lie where the kernel takes ports for connections of this node's own. Whoever got one would have
    its answers led to a Service; and a health-check port that is in use could not be opened.
    """
    try:
        with open(os.path.join(root, _RANGE), encoding="ascii") as file:
            portRange = file.read()
        with open(os.path.join(root, _RESERVED), encoding="ascii") as file:
            reserved = file.read()
        found = unreserved(portRange, reserved, ports)
    except (OSError, ValueError):
        return  # no such kernel: then there is nothing to compare with
    if found:
        named = ", ".join(map(str, found[:_NAMED]))
        if len(found) > _NAMED:
            named += f" and {len(found) - _NAMED} more"
        _log.warn(
            "Node ports lie where this node takes ports for connections of its own (net.ipv4.ip_local_port_range is "
            "{range}): {ports}. Such a connection would not get its answers. Reserve the cluster's node ports in "
            "net.ipv4.ip_local_reserved_ports, such as 30000-32767",
            range="-".join(portRange.split()), ports=named,
        )
