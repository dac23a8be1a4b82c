"""
UDP through each engine, beside nginx: round trips per second and what they cost. In a network namespace of its own, so
as root; what is not installed (nginx with its stream module, a C compiler) is left out or said.

Programs take turns, several times; the figures are medians. Client, endpoints and proxy share the machine: the time on
the processor per round trip is the fairer figure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
HOST = "127.0.0.1"
ENDPOINTS = 2
#: Where nginx may have its modules.
MODULES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules")


class Load(NamedTuple):
    """What clients do: datagrams of that size, or trains of them, so many under way on each socket."""

    name: str
    sockets: int
    outstanding: int
    size: int
    train: int = 1


#: Few trains under way: a receive buffer of the usual size must hold them, cut up.
LOADS = (Load("single", 16, 16, 64), Load("trains", 4, 1, 1200, 16))


class Result(NamedTuple):
    """
    :ivar perSecond: datagrams answered per second.
    :ivar micros: processor time of the proxy per round trip, in microseconds.
    :ivar silences: how often a client heard nothing for 50 ms.
    """

    perSecond: float
    micros: float
    silences: int


class Missing(Exception):
    """Something that a measurement needs is not on this machine."""


def build(folder: Path) -> Path:
    """
    Compile the program that is both ends of the measurement.

    :raise Missing: where there is no C compiler.
    """
    program = folder / "udpload"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Missing("there is no C compiler")
    subprocess.run([compiler, "-O2", "-o", str(program), str(FOLDER / "udpload.c")], check=True)
    return program


@contextmanager
def running(argv: Sequence[str], ready: str = "") -> Iterator[subprocess.Popen[str]]:
    """A program that runs meanwhile; after it has said so, where there is something that it says."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE if ready else None, text=True)
    try:
        if ready:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            if said != ready:
                raise Missing(f"{argv[0]} said {said!r} instead of {ready!r}")
        yield process
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def cpuSeconds(pid: int) -> float:
    """Processor time of all threads of a process and of its children (schedstat)."""
    nanoseconds = 0
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((thread / "schedstat").read_text().split()[0])
        children += map(int, (thread / "children").read_text().split())
    return nanoseconds / 1e9 + sum(map(cpuSeconds, children))


def memory(pid: int) -> int:
    """The proportional set size of a process, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def run(program: Path, load: Load, port: int, pid: int | None, seconds: float = 2.0, host: str = HOST) -> Result:
    """
    Let clients talk to that port.

    :param pid: the proxy, whose processor time counts; ``None`` for none.
    """
    before = cpuSeconds(pid) if pid else 0.0
    argv = [program, "load", host, port, seconds, load.sockets, load.outstanding, load.size, load.train]
    done = subprocess.run([str(it) for it in argv], capture_output=True, text=True, check=True)
    spent = (cpuSeconds(pid) if pid else 0.0) - before
    answered, took, silences = done.stdout.split()
    return Result(int(answered) / float(took), spent * 1e6 / max(1, int(answered)), int(silences))


def freePort() -> int:
    """A port that nobody has right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def echoes(program: Path, count: int = ENDPOINTS) -> Iterator[list[int]]:
    """So many endpoints, by their ports."""
    ports = [freePort() for _ in range(count)]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(running([str(program), "echo", HOST, str(port)], "ready"))
        yield ports


@contextmanager
def nginx(folder: Path, endpoints: Sequence[int]) -> Iterator[tuple[int, int]]:
    """
    nginx with one worker, as it comes; its port and process.

    :raise Missing: where it or its stream module is not installed.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise Missing("nginx is not installed")
    modules = [it for it in (Path(name) / "ngx_stream_module.so" for name in MODULES) if it.exists()]
    port = freePort()
    servers = " ".join(f"server {HOST}:{it};" for it in endpoints)
    config = folder / "nginx.conf"
    config.write_text(
        (f"load_module {modules[0]};\n" if modules else "")
        + f"daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid;\n"
        f"error_log {folder}/nginx.log; events {{ worker_connections 40000; }}\n"
        f"stream {{ upstream e {{ {servers} }} server {{ listen {HOST}:{port} udp; proxy_pass e; }} }}\n"
    )
    said = subprocess.run([program, "-t", "-q", "-c", str(config)], capture_output=True, text=True)
    if said.returncode:
        raise Missing(f"nginx does not take its configuration: {said.stderr.strip()}")
    with running([program, "-q", "-c", str(config)]) as process:
        waitFor(port)
        yield port, process.pid


def waitFor(port: int) -> None:
    """Until something answers there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.1)
        client.connect((HOST, port))
        for _ in range(100):
            try:
                client.send(b"?")
                client.recv(100)
                return
            except OSError:
                time.sleep(0.02)
    raise Missing(f"nothing answers on port {port}")


@contextmanager
def kproxy(engine: str, endpoints: Sequence[int]) -> Iterator[tuple[int, int]]:
    """
    A process with one proxier, on that engine and our reactor; its port and process.

    :raise Missing: where the engine cannot be had.
    """
    port = freePort()
    argv = [sys.executable, "-m", "benchmarks.udp", "serve", engine, str(port), *map(str, endpoints)]
    with running(argv, "ready") as process:
        yield port, process.pid


def measure(
    folder: Path, programs: Sequence[str] = ("nginx", "native", "python"), loads: Sequence[Load] = LOADS,
    rounds: int = 5, seconds: float = 2.0,
) -> dict[tuple[str, str], Result]:
    """
    Medians by program and load; to be called in a namespace whose loopback is up. ``direct`` is no proxy at all.

    :raise Missing: where something is not there that cannot be done without.
    """
    program = build(folder)
    found: dict[tuple[str, str], list[Result]] = {}
    with ExitStack() as stack:
        ports = stack.enter_context(echoes(program))
        running: dict[str, tuple[int, int | None]] = {"direct": (ports[0], None)}
        for name in programs:
            try:
                peer = nginx(folder, ports) if name == "nginx" else kproxy(name, ports)
                running[name] = stack.enter_context(peer)
            except Missing as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
        for _ in range(rounds):
            for load in loads:
                for name, (port, pid) in running.items():
                    found.setdefault((name, load.name), []).append(run(program, load, port, pid, seconds))
    return {key: Result(*map(statistics.median, zip(*results, strict=True))) for key, results in found.items()}


_WIDTHS = (12, 9, 7, 9, 9)


def table(results: dict[tuple[str, str], Result]) -> str:
    """The figures as text, with ratios to nginx."""
    heads = ("datagrams/s", "of nginx", "CPU us", "of nginx", "silences")
    lines = [f"{'load':<8} {'through':<8} " + " ".join(f"{it:>{n}}" for it, n in zip(heads, _WIDTHS, strict=True))]
    for (name, load), it in sorted(results.items(), key=lambda item: item[0][1]):
        peer = results.get(("nginx", load))
        ratio = f"{it.perSecond / peer.perSecond:9.2f}" if peer else " " * 9
        cost = f"{it.micros / peer.micros:9.2f}" if peer and it.micros else " " * 9
        lines.append(f"{load:<8} {name:<8} {it.perSecond:12.0f} {ratio} {it.micros:7.2f} {cost} {it.silences:9.0f}")
    return "\n".join(lines)


def flows(folder: Path, engines: Sequence[str] = ("native", "python"), count: int = 5000) -> dict[str, float]:
    """What a flow takes of the proxy's memory, in bytes, by engine: so many clients that each were answered."""
    program = build(folder)
    found = {}
    for engine in engines:
        with echoes(program) as ports, kproxy(engine, ports) as (port, pid):
            few = Load("few", 100, 1, 64)
            run(program, few, port, pid, 0.3)
            before = memory(pid)
            for _ in range(count // 1000):
                run(program, Load("many", 1000, 1, 64), port, pid, 0.4)
            found[engine] = (memory(pid) - before) / count
    return found


def serve(engine: str, port: int, endpoints: Sequence[int]) -> None:
    """The process that is measured."""
    from twisted_kproxy.reactor import install

    reactor: Any = install()

    from twisted_kproxy.core.values import Endpoint, PoolName, ServicePortName
    from twisted_kproxy.userspace.engines.choose import makeEngines
    from twisted_kproxy.userspace.engines.poller import Poller
    from twisted_kproxy.userspace.ports import Budget, raiseLimit
    from twisted_kproxy.userspace.udp import UdpProxier

    turns = [Endpoint(HOST, it) for it in endpoints]

    class Turns:
        """In the places of balancer and observer."""

        def nextEndpoint(self, pool: PoolName, client: str, avoid: Any = ()) -> Endpoint:
            turns.append(turns.pop(0))
            return turns[-1]

        def opened(self, *_: Any) -> None: ...

        missed = failed = closed = opened

    raiseLimit()
    _, sockets = makeEngines(reactor, Poller(reactor), engine)
    both: Any = Turns()
    pool = PoolName(ServicePortName("bench", "udp", "udp", "UDP", "IPv4"), "cluster")
    proxier = UdpProxier(reactor, pool, both, both, idleTimeout=30.0, budget=Budget(reactor), sockets=sockets)
    proxier.listen(port)
    reactor.callWhenRunning(print, "ready", flush=True)
    reactor.run()


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]), [int(it) for it in sys.argv[4:]])
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if os.geteuid() or not shutil.which("unshare"):
            print("needs root, and unshare", file=sys.stderr)
            return 1
        return subprocess.call(["unshare", "--net", sys.executable, "-m", "benchmarks.udp", "--inside", *sys.argv[1:]])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory(prefix="kproxy-udp-") as folder:
        try:
            print(table(measure(Path(folder), rounds=options.rounds, seconds=options.seconds)))
            for engine, size in flows(Path(folder)).items():
                print(f"a flow of the engine {engine} takes {size:.0f} bytes of the process")
        except Missing as missing:
            print(f"cannot be measured: {missing}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
