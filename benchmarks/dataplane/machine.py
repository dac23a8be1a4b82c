"""The machine under the measurements: what must be installed, and how much of it others take meanwhile."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

#: Steal time above which a measurement is done again, and how often at the most.
STEAL, AGAIN = 0.02, 2
#: Beyond this many descriptors nothing is measured here, whatever the machine allows.
DESCRIPTORS = 20_000
NICE = -10
_T = TypeVar("_T")

#: what tells that it is there, and the package that has it
_NEEDED = {
    "haproxy": "haproxy", "nginx": "nginx-light", "wrk": "wrk", "cc": "gcc libc6-dev", "nft": "nftables",
    "conntrack": "conntrack",
    "/usr/lib/nginx/modules/ngx_stream_module.so": "libnginx-mod-stream",
}  # fmt: skip


def install() -> None:
    """
    Install with apt what is missing; its services are not started.

    :raise SystemExit: where that is not possible, with what is missing.
    """
    missing = [package for it, package in _NEEDED.items() if not (shutil.which(it) or os.path.exists(it))]
    if not missing:
        return
    packages = " ".join(missing).split()
    if os.geteuid() or not shutil.which("apt-get"):
        raise SystemExit(f"not installed here, and only root can do that with apt: {' '.join(packages)}")
    print(f"installing {' '.join(packages)}", flush=True)
    # A run level of 1 keeps the packages from starting the servers that they bring.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True)
        if done.returncode and arguments[0] == "install":
            raise SystemExit(f"apt-get install {' '.join(packages)} failed: {done.stderr.strip()}")


def build(folder: str) -> str:
    """The load program, compiled; gives its path."""
    program = os.path.join(folder, "load")
    source = Path(__file__).with_name("load.c")
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, str(source)], check=True)
    return program


def limitDescriptors() -> None:
    """The same limit for all that is started from now on."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


@contextmanager
def burst() -> Iterator[None]:
    """
    Ahead of what else runs. Where sessions are scheduled as groups a process's nice counts within its own only; it is
    the group's that has to be raised.
    """
    path = "/proc/self/autogroup"
    try:
        before = Path(path).read_text(encoding="ascii").rsplit(None, 1)[-1]
        Path(path).write_text(str(NICE), encoding="ascii")
    except (OSError, IndexError):
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            time.sleep(0.2)  # the kernel takes one such change per 100 ms from those who may not do what they like
            Path(path).write_text(before, encoding="ascii")


def threads(pids: Iterable[int]) -> Iterator[int]:
    for pid in pids:
        with suppress(FileNotFoundError):
            yield from map(int, os.listdir(f"/proc/{pid}/task"))


@contextmanager
def realTime(pids: Iterable[int]) -> Iterator[None]:
    """These processes before all others; among themselves in turns."""
    changed = []
    for tid in threads(pids):
        with suppress(OSError):
            os.sched_setscheduler(tid, os.SCHED_RR, os.sched_param(1))
            changed.append(tid)
    try:
        yield
    finally:
        for tid in changed:
            with suppress(OSError):
                os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))


def processorTime(pids: Iterable[int]) -> float:
    """Seconds of processor time of all threads of these processes."""
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError):
            for tid in os.listdir(f"/proc/{pid}/task"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    total += int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text(encoding="ascii").split()[0])
    return total / 1e9


def memory(pids: Iterable[int]) -> int:
    """Bytes that these processes have, what they share divided among those who do."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def family(pid: int) -> list[int]:
    """A process and those that it has started."""
    found = [pid]
    for tid in threads([pid]):
        with suppress(FileNotFoundError):
            for child in Path(f"/proc/{pid}/task/{tid}/children").read_text(encoding="ascii").split():
                found += family(int(child))
    return found


def _times() -> tuple[int, int]:
    words = list(map(int, Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]))
    return sum(words), words[7]


class Steal:
    """
    How much of the machine others on the same hardware took.

    :ivar worst: the largest share that was put up with.
    :ivar again: how many measurements were repeated for it.
    """

    def __init__(self) -> None:
        self.worst = 0.0
        self.again = 0

    def steady(self, work: Callable[[], _T]) -> _T:
        """What that gives when little was stolen meanwhile, or the least of three times."""
        best: tuple[float, Any] | None = None
        for attempt in range(1 + AGAIN):
            before = _times()
            result = work()
            after = _times()
            share = (after[1] - before[1]) / max(1, after[0] - before[0])
            if best is None or share < best[0]:
                best = share, result
            if share <= STEAL:
                break
            if attempt < AGAIN:
                self.again += 1
        assert best is not None
        self.worst = max(self.worst, best[0])
        found: _T = best[1]
        return found


def describe() -> dict[str, Any]:
    """What a reader must know of where this was measured."""

    def version(*argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True)
        return ((done.stdout or done.stderr).strip().splitlines() or ["?"])[0]

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "processor": model,
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "load": os.getloadavg(),
        "haproxy": version("haproxy", "-v"),
        "nginx": version("nginx", "-v"),
    }
