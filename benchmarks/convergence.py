"""
How fast the node follows the cluster, end to end: fake API server → daemon → rules → real connections.

Usage, as root, in a checkout: ``.venv/bin/python -m benchmarks.convergence [SERVICES] [WRITER]`` (500, nftables).

Prints seconds from the start of the process until each of the Services answers, then from one endpoint change in the
API until a new connection arrives at the new endpoint: when quiet, and while others change twenty times a second.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from typing import Any

from tests.fakes.daemon import ApiProcess, Backend, Daemon
from tests.fakes.network import Rig
from tests.integration.world import CONFIG, PODS, PORT, Json, service, slices


def address(number: int) -> Json:
    """A Service with addresses of its own, however many there are."""
    it = service(f"s{number}", 1)
    ips = [f"10.96.{1 + number // 250}.{1 + number % 250}", f"fd00:10:96::{number + 1:x}"]
    it["spec"].update(clusterIP=ips[0], clusterIPs=ips)
    return it


def who(rig: Rig, host: str) -> str:
    """Who answers one request from pod p0b; ``""`` for nobody."""
    try:
        with rig.connect("p0b", (host, 80), 2) as it:
            it.sendall(b"GET / HTTP/1.0\r\n\r\n")
            data = b""
            while chunk := it.recv(1000):
                data += chunk
        return data.partition(b"\r\n\r\n")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def changed(rig: Rig, api: ApiProcess, name: str, host: str, pod: str) -> float:
    """Seconds from the change until a new connection goes to that pod."""
    objects = slices(rig, name, pod)
    began = time.monotonic()
    api.apply(*objects)
    while who(rig, host) != pod:
        if time.monotonic() - began > 20:
            raise SystemExit(f"{name} was not moved to {pod} within 20 s")
        time.sleep(0.002)
    return time.monotonic() - began


def show(what: str, seconds: list[float]) -> None:
    print(f"{what:<44} median {statistics.median(seconds):6.3f} s   max {max(seconds):6.3f} s   of {len(seconds)}")


def measure(rig: Rig, count: int, writer: str) -> None:
    api = ApiProcess(rig)
    for pod in PODS:
        Backend(rig, pod, http=[PORT])
    objects: list[Any] = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0"}, "spec": {}}]
    for number in range(count):
        objects += [address(number), *slices(rig, f"s{number}", *PODS)]
    for at in range(0, len(objects), 300):
        api.apply(*objects[at : at + 300])
    hosts = [address(number)["spec"]["clusterIP"] for number in range(count)]

    began = time.monotonic()
    daemon = Daemon(rig, "n0", CONFIG.format(server=api.url, writer=writer), waitFor=None)
    waiting = hosts
    while waiting:
        time.sleep(0.02)
        waiting = [host for at, host in enumerate(waiting) if at > 20 or not who(rig, host)]
        if time.monotonic() - began > 120:
            raise SystemExit(f"{len(waiting)} of {count} Services are not served after 120 s:\n{daemon.log()[-3000:]}")
    print(f"{count} Services x 2 families x {len(PODS)} endpoints, writer {writer}")
    print(f"{'all served, from the start of the process':<44} {time.monotonic() - began:13.3f} s")

    times = []
    for turn in range(20):
        time.sleep(2.5)
        times.append(changed(rig, api, "s0", hosts[0], PODS[turn % 3]))
    show("one endpoint change, when quiet", times)

    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            api.apply(*slices(rig, f"s{1 + number % (count - 1)}", *PODS[: 1 + number % 3]))

    changer = threading.Thread(target=churn)
    changer.start()
    try:
        show("one endpoint change, 20 others a second", [
            changed(rig, api, "s0", hosts[0], PODS[turn % 3]) for turn in range(20)
        ])
    finally:
        stop.set()
        changer.join()
    daemon.stop()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with Rig() as rig:
        measure(rig, count, sys.argv[2] if len(sys.argv) > 2 else "nftables")


if __name__ == "__main__":
    main()
