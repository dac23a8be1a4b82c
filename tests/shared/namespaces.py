"""A network namespace for a test to write rules in."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
from pathlib import Path

_numbers = itertools.count(1)
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def canMakeNamespaces() -> bool:
    """Whether this process may make namespaces: root, and the tools are there."""
    return os.geteuid() == 0 and any(Path(folder, "ip").exists() for folder in ("/usr/sbin", "/sbin", "/usr/bin"))


class Namespace:
    """
    A fresh network namespace with its loopback up.

    :ivar prefix: what to put before a command so that it runs in here.
    """

    def __init__(self, label: str = "x") -> None:
        self.name = f"kp-{os.getpid()}-{next(_numbers)}-{label}"
        subprocess.run(["ip", "netns", "add", self.name], check=True, capture_output=True)
        self.prefix = ("ip", "netns", "exec", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """Run a command in here and give its standard output."""
        done = subprocess.run([*self.prefix, *argv], input=stdin, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)} exited with {done.returncode}: {done.stderr}")
        return done.stdout

    def spawn(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a command in here. The caller ends it."""
        return subprocess.Popen([*self.prefix, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def processes(self) -> list[str]:
        """The numbers of those that run in here."""
        argv = ["ip", "netns", "pids", self.name]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.split()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in here, whatever namespace the calling thread is in."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._enter(there)
            try:
                return socket.socket(family, kind, protocol)
            finally:
                self._enter(home)
        finally:
            os.close(there)
            os.close(home)

    @staticmethod
    def _enter(descriptor: int) -> None:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def delete(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)
