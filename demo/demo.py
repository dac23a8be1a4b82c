"""
kproxy at work, on one machine and without a cluster.

Makes a "node", two "pods" and an outside "client" out of network namespaces, runs the daemon in the node on
``etc/kproxy.ini``, and sends requests. Nothing outside these namespaces is touched; all of it goes away at the end.
The namespaces have fixed names, so that one can look into them: only one demonstration runs at a time.

Usage: demo.py [--once]
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
NODE, POD_A, POD_B, CLIENT = (f"kproxy-demo-{name}" for name in ("node", "pod-a", "pod-b", "client"))
PODS = {POD_A: 11, POD_B: 12}
LOG = ROOT / "kproxy-demo.log"
#: Held for as long as a demonstration runs; the kernel lets go of it when the process is gone, however it went.
LOCK = Path("/run/kproxy-demo.lock")
NODE_IP, NODE_IP6 = "192.0.2.1", "2001:db8:2::1"

faults: list[str] = []


def run(*argv: str, check: bool = True, timeout: float = 20) -> str:
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
    )
    if check and done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stdout}")
    return done.stdout


def inside(namespace: str, *argv: str, check: bool = True) -> str:
    return run("ip", "netns", "exec", namespace, *argv, check=check)


def spawn(namespace: str, *argv: str, log: Path | None = None) -> subprocess.Popen[str]:
    out = log.open("w") if log else subprocess.PIPE
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *argv],
        stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
    )


def claim() -> TextIO:
    """
    Be the only demonstration on this machine, for as long as the file that this gives is open. What a dead one has
    left, and whatever still runs in there, is nobody's and may be removed.
    """
    lock = LOCK.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        other = lock.read().strip() or "unknown"
        raise SystemExit(f"make demo: another one is running here (process {other}): end it first, with kill {other}")
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def makeNetwork() -> None:
    """The node has a bridge with both pods on it, and a cable to the client outside."""
    removeNetwork()
    for namespace in (NODE, POD_A, POD_B, CLIENT):
        run("ip", "netns", "add", namespace)
        inside(namespace, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
        run("ip", "-n", namespace, "link", "set", "lo", "up")
    inside(NODE, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    run("ip", "-n", NODE, "link", "add", "pods", "type", "bridge")
    for namespace, last in PODS.items():
        cable(namespace, f"pod{last}")
        run("ip", "-n", NODE, "link", "set", f"pod{last}", "master", "pods", "up")
        address(namespace, "eth0", f"10.244.0.{last}/24", f"fd00:10:244::{last}/64")
        route(namespace, "10.244.0.1", "fd00:10:244::1")
    address(NODE, "pods", "10.244.0.1/24", "fd00:10:244::1/64")
    cable(CLIENT, "uplink")
    address(NODE, "uplink", f"{NODE_IP}/24", f"{NODE_IP6}/64")
    address(CLIENT, "eth0", "192.0.2.2/24", "2001:db8:2::2/64")
    route(NODE, "192.0.2.2", "2001:db8:2::2")
    route(CLIENT, NODE_IP, NODE_IP6)


def cable(namespace: str, atNode: str) -> None:
    run("ip", "-n", NODE, "link", "add", atNode, "type", "veth", "peer", "name", "eth0", "netns", namespace)


def address(namespace: str, device: str, *addresses: str) -> None:
    for it in addresses:
        run("ip", "-n", namespace, "addr", "add", it, "dev", device, *(["nodad"] if ":" in it else []))
    run("ip", "-n", namespace, "link", "set", device, "up")


def route(namespace: str, *gateways: str) -> None:
    for gateway in gateways:
        run("ip", "-n", namespace, "route", "add", "default", "via", gateway)


def removeNetwork() -> None:
    """Also what a demonstration that was killed has left, and whatever still runs in there."""
    known = run("ip", "netns", "list").split()
    for namespace in (NODE, POD_A, POD_B, CLIENT):
        if namespace in known:
            for pid in run("ip", "netns", "pids", namespace).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            run("ip", "netns", "del", namespace)


def get(namespace: str, url: str, times: int = 6) -> list[str]:
    """Some requests, each over a connection of its own; who answered each, or why nobody did."""
    answers = []
    for _ in range(times):
        out = inside(namespace, "curl", "-sS", "-m", "5", url, check=False).strip()
        answers.append(out.splitlines()[-1] if out else "nothing")
    return answers


def udp(namespace: str, host: str, port: int, times: int = 4) -> list[str]:
    """Some datagrams, each from a port of its own."""
    script = (
        "import socket,sys\n"
        "for n in range(int(sys.argv[3])):\n"
        "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
        "    s.connect((sys.argv[1], int(sys.argv[2]))); s.send(b'hello')\n"
        "    try: print(s.recv(100).decode())\n"
        "    except OSError as error: print(error)\n"
    )
    return inside(namespace, sys.executable, "-c", script, host, str(port), str(times)).splitlines()


def who(answers: list[str]) -> Counter[str]:
    return Counter(answer.split()[0] if answer.startswith("pod-") else answer for answer in answers)


def show(what: str, command: str, answers: list[str], good: bool) -> None:
    print(f"\n{what}\n  $ {command}")
    for answer, count in who(answers).items():
        print(f"    {count} x {answer}")
    print("  as it should be" if good else "  THIS IS NOT AS IT SHOULD BE")
    if not good:
        faults.append(what)


def backend(namespace: str) -> subprocess.Popen[str]:
    name = namespace.removeprefix("kproxy-demo-")
    process = spawn(namespace, sys.executable, str(ROOT / "demo" / "backend.py"), name, "8080")
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"the backend {name} did not start")
    return process


def startDaemon() -> subprocess.Popen[str]:
    twistd = Path(sys.executable).with_name("twistd")
    argv = (str(twistd), "-n", "--pidfile=", "kproxy", "--config", "etc/kproxy.ini")
    print(f"Starting in the node: {' '.join(('twistd', *argv[1:]))}   (log: {LOG})")
    daemon = spawn(NODE, *argv, log=LOG)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            raise SystemExit(f"the daemon ended at once:\n{LOG.read_text()}")
        if get(NODE, "http://10.96.0.80/", 1)[0].startswith("pod-"):
            return daemon
        time.sleep(0.2)
    raise SystemExit(f"the daemon did not serve within 30 s:\n{LOG.read_text()}")


def demonstrate(backends: dict[str, subprocess.Popen[str]]) -> None:
    url, url6 = "http://10.96.0.80/", "http://[fd00:10:96::80]/"
    for place, namespace in (("a pod", POD_A), ("the node itself", NODE)):
        answers = get(namespace, url)
        show(f"A ClusterIP, from {place}: the backends take turns.", f"curl {url}", answers, len(who(answers)) == 2)
    answers = get(POD_A, url6)
    show("The same Service over IPv6.", f"curl '{url6}'", answers, len(who(answers)) == 2)
    nodePort = f"http://{NODE_IP}:30080/"
    answers = get(CLIENT, nodePort)
    show("Its node port, from outside.", f"curl {nodePort}", answers, len(who(answers)) == 2)
    answers = get(POD_B, "http://10.96.0.81/")
    show("A Service with ClientIP affinity: one client, one backend.", "curl http://10.96.0.81/", answers,
         len(who(answers)) == 1 and answers[0].startswith("pod-"))
    answers = udp(POD_A, "10.96.0.82", 7)
    show("A UDP Service.", "echo hello | nc -u 10.96.0.82 7", answers, len(who(answers)) == 2)
    answers = get(POD_A, "http://10.96.0.83/", 1)
    refused = "refused" in answers[0] or "Couldn't connect" in answers[0] or "Failed to connect" in answers[0]
    show("A Service without endpoints refuses at once.", "curl http://10.96.0.83/", answers, refused)
    stop(backends.pop(POD_A))
    answers = get(POD_B, url, 8)
    show("Backend pod-a was just killed, and nobody told the proxy: it is skipped, no request fails.", f"curl {url}",
         answers, set(who(answers)) == {"pod-b"})
    backends[POD_A] = backend(POD_A)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process. The daemon lets open connections go on after the first signal, and cuts them after the second."""
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGTERM, 10), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        os.kill(process.pid, number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    if process.stdout is not None:
        process.stdout.close()


def invite() -> None:
    print(f"""
The proxy stays up. Try, in another terminal:

  ip netns exec {POD_A} curl http://10.96.0.80/              # from a pod; again and again
  ip netns exec {CLIENT} curl http://{NODE_IP}:30080/          # from outside
  ip netns exec {NODE} curl 'http://127.0.0.1:10249/status?pretty'  # what it serves, and how it goes
  ip netns exec {NODE} curl http://127.0.0.1:10249/metrics
  ip netns exec {NODE} curl http://127.0.0.1:10256/healthz
  ip netns exec {NODE} nft list table inet kproxy              # the rules (with the nftables writer)
  $EDITOR etc/services.d/demo.yaml                                    # changes are served as soon as they are saved

Ctrl-C, or kill {os.getpid()}, ends it and removes all it made.""", flush=True)


class Ended(Exception):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def endOn(*numbers: int) -> None:
    def caught(number: int, _frame: object) -> None:
        raise Ended(number)

    for number in numbers:
        signal.signal(number, caught)


def main() -> int:
    once = "--once" in sys.argv[1:]
    if os.geteuid():
        print("make demo needs root: it makes network namespaces and writes rules in them.", file=sys.stderr)
        return 1
    began = time.monotonic()
    lock = claim()
    # A shell that starts this in the background may have it ignore Ctrl-C; so be it. SIGTERM always works.
    endOn(signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        endOn(signal.SIGINT)
    status, shown = 0, False
    backends: dict[str, subprocess.Popen[str]] = {}
    daemon: subprocess.Popen[str] | None = None
    try:
        makeNetwork()
        backends.update((namespace, backend(namespace)) for namespace in PODS)
        daemon = startDaemon()
        demonstrate(backends)
        said = f"{len(faults)} of the steps above went wrong" if faults else "All as it should be"
        print(f"\n{said}; it took {time.monotonic() - began:.0f} s.", flush=True)
        shown = True
        if not once:
            invite()
            daemon.wait()
            print("The daemon has ended; its log is", LOG)
    except Ended as ended:
        print(f"\n{ended}: removing everything.", flush=True)
        # At a terminal Ctrl-C is how the demonstration ends; before it is through, it has not shown everything.
        status = 0 if ended.number == signal.SIGINT and shown else 128 + ended.number
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if daemon is not None:
            stop(daemon)
        for process in backends.values():
            stop(process)
        removeNetwork()
        lock.close()
    return 1 if faults else status


if __name__ == "__main__":
    sys.exit(main())
