"""Network namespaces: making many at once, entering them, and removing what dead test runs have left of theirs."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import IO

RECORDS = os.path.join(tempfile.gettempdir(), "kproxy-rigs")
CLONE_NEWNET = 0x40000000
_FAILED = re.compile(r"Command failed -:(\d+)")
_libc = ctypes.CDLL(None, use_errno=True)


class RigError(Exception):
    """A namespace, an address or a program could not be set up; the text has what the tool said."""


def sweep() -> int:
    """Remove what networks of processes that are no more have left: by their records, and nothing else."""
    swept = 0
    with suppress(FileNotFoundError):
        for name in os.listdir(RECORDS):
            path = os.path.join(RECORDS, name)
            try:
                with open(path, encoding="ascii") as file:
                    said = json.load(file)
            except (OSError, ValueError):
                continue
            if isAlive(said["owner"]):
                continue
            for process in said["processes"]:
                if isAlive(process):
                    with suppress(ProcessLookupError):
                        os.kill(process[0], signal.SIGKILL)
            delete(it for it in namespacesNow() if it.startswith(said["prefix"]))
            shutil.rmtree(said["folder"], ignore_errors=True)
            with suppress(FileNotFoundError):
                os.unlink(path)
            swept += 1
    return swept


def namespacesNow() -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir("/run/netns")
    return []


def identity(pid: int) -> list[int]:
    """A process, told apart from a later one of the same number by when it started."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return [pid, int(file.read().rpartition(")")[2].split()[19])]
    except (OSError, IndexError):
        return [pid, 0]


def isAlive(known: list[int]) -> bool:
    """Whether that very process is still there."""
    return known[1] != 0 and identity(known[0]) == known


def killInside(namespace: str) -> None:
    """What programs of the test have started in turn. The namespace is ours, and so is all in it."""
    told = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in told.stdout.split():
        if int(pid) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def delete(names: Iterable[str]) -> None:
    lines = [f"netns del {name}" for name in names if os.path.exists(f"/run/netns/{name}")]
    if lines:
        parallel([(["ip", "-force", "-batch", "-"], "\n".join(lines) + "\n")], check=False)


def ipEach(batches: Sequence[tuple[str, Sequence[str]]]) -> None:
    """A batch of ``ip`` commands for each of several namespaces, all at the same time; ``-6`` may precede a line."""
    calls = []
    for namespace, lines in batches:
        where = ["-n", namespace] if namespace else []
        for option in ("", "-6"):
            mine = [line.removeprefix("-6 ") for line in lines if line.startswith("-6 ") == bool(option)]
            if mine:
                argv = ["ip", *where, *([option] if option else []), "-batch", "-"]
                calls.append((argv, "\n".join(mine) + "\n"))
    # The v6 lines of a namespace are routes, and need what its other lines set up.
    parallel([call for call in calls if "-6" not in call[0]])
    parallel([call for call in calls if "-6" in call[0]])


def parallel(calls: Sequence[tuple[list[str], str]], check: bool = True) -> None:
    running = []
    for argv, _ in calls:
        running.append(
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    problems = []
    for process, (argv, text) in zip(running, calls, strict=True):
        said, _ = process.communicate(text, timeout=30)
        if process.returncode:
            line = _FAILED.search(said)
            what = text.splitlines()[int(line[1]) - 1] if line else ""
            problems.append(f"{' '.join(argv)}: {what}: {said.strip()}")
    if problems and check:
        raise RigError("\n".join(problems))


def runToEnd(
    argv: list[str], check: bool, timeout: float, input: str | None, env: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    stdin = subprocess.DEVNULL if input is None else None
    done = subprocess.run(
        argv, check=False, timeout=timeout, input=input, stdin=stdin, capture_output=True, text=True, env=env
    )
    if check and done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise RigError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
    return done


def enter(namespace: IO[bytes]) -> None:
    """Move this thread, and no other, into a network namespace."""
    if _libc.setns(namespace.fileno(), CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
