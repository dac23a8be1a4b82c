"""
What a UDP proxier does in a network namespace of its own: a program, run by :mod:`tests.integration.test_udp` within
``unshare --net``. It says ``as it should be``, or what is not.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater, react

from tests.integration.test_udp import AF, Echo, Peer, Seen, Turns, Unlimited
from tests.shared.datagrams import socketsOf
from twisted_kproxy.core.values import Endpoint, Family, Outcome, PoolName, ServicePortName
from twisted_kproxy.userspace.udp import UdpProxier

reactor: Any = _reactor

NODE: dict[Family, tuple[str, str]] = {"IPv4": ("10.1.0.1", "10.1.0.2"), "IPv6": ("fd01::1", "fd01::2")}
SERVICE: dict[Family, str] = {"IPv4": "10.96.0.10", "IPv6": "fd96::10"}
DEAD: dict[Family, str] = {"IPv4": "10.1.0.77", "IPv6": "fd01::77"}
NFT: dict[Family, str] = {"IPv4": "ip", "IPv6": "ip6"}


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=10)


def nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=f"{rules}\n", check=True, text=True, timeout=10)


def network(family: Family) -> None:
    """One interface with two addresses, and a default route through it."""
    option, length = ("-4", "24") if family == "IPv4" else ("-6", "64")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    run("ip", "link", "set", "eth1", "up")
    run("ip", "link", "set", "eth0", "up")
    for address in NODE[family]:
        nodad = ["nodad"] if family == "IPv6" else []
        run("ip", option, "address", "add", f"{address}/{length}", "dev", "eth0", *nodad)
    run("ip", option, "route", "add", "default", "dev", "eth0")


def proxierOf(family: Family, engine: str) -> tuple[UdpProxier, Turns, Seen]:
    balancer, seen = Turns(), Seen()
    pool = PoolName(ServicePortName("default", "dns", "dns", "UDP", family), "cluster")
    proxier = UdpProxier(
        reactor,
        pool,
        balancer,  # type: ignore[arg-type]
        seen,  # type: ignore[arg-type]
        idleTimeout=30,
        budget=Unlimited(),
        sockets=socketsOf(engine, reactor),
    )
    proxier.listen()
    return proxier, balancer, seen


async def rules(family: Family, engine: str) -> None:
    """The node's own clients, led from the service address to the node's second address."""
    proxier, balancer, _ = proxierOf(family, engine)
    first, second = NODE[family]
    echo = Echo(family, first)
    balancer.pool = [Endpoint(first, echo.port)]
    word = NFT[family]
    to = f"[{second}]" if family == "IPv6" else second
    nft(
        f"table {word} t {{ chain out {{ type nat hook output priority -100; "
        f"{word} daddr {SERVICE[family]} udp dport 53 dnat to {to}:{proxier.port}; }}; }}"
    )
    client = Peer(family, first)
    connected = Peer(family, first)
    connected.socket.connect((SERVICE[family], 53))
    client.socket.sendto(b"question", (SERVICE[family], 53))
    connected.socket.send(b"another")
    await client.arrivals(1)
    await connected.arrivals(1)
    assert client.arrived == [(b"question", (SERVICE[family], 53))], client.arrived
    assert connected.arrived == [(b"another", (SERVICE[family], 53))], connected.arrived


async def unreachable(family: Family, engine: str) -> None:
    """An endpoint on a node that is dead: nobody answers for its address."""
    proxier, balancer, seen = proxierOf(family, engine)
    first, _ = NODE[family]
    settings = Path("/proc/sys/net", family.lower(), "neigh/eth0")
    (settings / "mcast_solicit").write_text("1")
    (settings / "retrans_time_ms").write_text("100")
    echo = Echo(family, first)
    balancer.pool = [Endpoint(first, echo.port), Endpoint(DEAD[family], 53)]
    client = Peer(family, first)
    client.socket.sendto(b"question", (first, proxier.port))
    await client.arrivals(1)
    assert client.arrived == [(b"question", (first, proxier.port))], client.arrived
    assert seen.misses == ["unreachable"], seen.misses
    assert seen.outcomes == [Outcome("unreachable", 8, 0)], seen.outcomes


async def filtered(family: Family, engine: str) -> None:
    """An endpoint that this node's own packet filter does not let us reach."""
    proxier, balancer, seen = proxierOf(family, engine)
    first, _ = NODE[family]
    echo = Echo(family, first)
    balancer.pool = [Endpoint(first, echo.port), Endpoint(DEAD[family], 53)]
    word = NFT[family]
    kind = "icmp type host-unreachable" if family == "IPv4" else "icmpv6 type addr-unreachable"
    nft(
        f"table {word} t {{ chain out {{ type filter hook output priority 0; "
        f"{word} daddr {DEAD[family]} reject with {kind}; }}; }}"
    )
    client = Peer(family, first)
    client.socket.sendto(b"question", (first, proxier.port))
    await client.arrivals(1)
    assert client.arrived == [(b"question", (first, proxier.port))], client.arrived
    assert seen.misses == ["unreachable"], seen.misses


async def main(_reactor: Any, what: str, family: Family, engine: str) -> None:
    assert AF[family] in (socket.AF_INET, socket.AF_INET6)
    network(family)
    await {"rules": rules, "unreachable": unreachable, "filtered": filtered}[what](family, engine)
    await deferLater(reactor, 0, lambda: None)
    print("as it should be")


if __name__ == "__main__":
    react(main, sys.argv[1:])
