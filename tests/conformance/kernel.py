"""
Rows on the real kernel: the daemon on node n0 of the rig, with every row's objects at once, and connections from where
packets come from. One daemon for all rows of the same settings.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Iterable, Mapping

from msgspec import Struct

from tests.fakes.daemon import Backend, Daemon
from tests.fakes.network import Rig

from .site import LAN, PORT, Flow, Row, plainNode
from .table import rows

PODS = ("p0a", "p0b", "p1a")
#: How long nothing may come back before it counts as dropped.
SILENCE = 1.0
#: The kernel sends ICMP errors to one client rarely; for so long a datagram is sent again.
PATIENCE = 15.0
CONFIG = """
[kproxy]
node-name = n0
{settings}
[source:table]
type = files
path = {path}
[rules]
writer = {writer}
[userspace]
drain-timeout = 1s
"""


class Try(Struct):
    """One connection that is expected to get no answer."""

    row: Row
    flow: Flow
    socket: socket.socket
    answer: str = "drop"


class Place:
    """
    A node with a writer, and the backends.

    :ivar made: how many flows were tried.
    """

    def __init__(self, writer: str) -> None:
        self.writer = writer
        self.made = 0
        self.rig = Rig()
        try:
            self._names: dict[str, str] = {}
            for pod in PODS:
                for port in (PORT, PORT + 1) if pod == "p1a" else (PORT,):
                    Backend(self.rig, pod, tcp=[port], udp=[port], mode="greet", called=f"{pod}:{port}")
                    for family in (4, 6):
                        address = self.rig.address(pod, family)
                        host = f"[{address}]" if family == 6 else address
                        self._names[f"{pod}:{port}"] = self._names.get(f"{pod}:{port}", "") + f" {host}:{port}"
        except BaseException:
            self.rig.close()
            raise

    def close(self) -> None:
        self.rig.close()

    def faults(self) -> list[str]:
        """What is not as the rows say."""
        groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
        for row in rows():
            if row.kernel:
                groups.setdefault(tuple(row.settings.items()), []).append(row)
        return [fault for settings, group in groups.items() for fault in self._group(dict(settings), group)]

    def _group(self, settings: Mapping[str, str], group: list[Row]) -> list[str]:
        path = os.path.join(self.rig.folder, "objects.json")
        items = [plainNode(), *(it for row in group for it in row.objects)]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"apiVersion": "v1", "kind": "List", "items": items}, file)
        said = "\n".join(f"{key} = {value}" for key, value in settings.items())
        daemon = Daemon(self.rig, "n0", CONFIG.format(settings=said, path=path, writer=self.writer))
        try:
            daemon.waitUntil(lambda: self._inForce(daemon))
            found = self._tried(group)
            daemon.assertNoTraceback()
            return found
        finally:
            daemon.stop()

    @staticmethod
    def _inForce(daemon: Daemon) -> bool:
        code, _, body = daemon.get("http://127.0.0.1:10249/status")
        return code == 200 and bool(json.loads(body)["sync"]["inForce"])

    def _tried(self, group: Iterable[Row]) -> list[str]:
        found: list[str] = []
        silent: list[Try] = []
        for row in group:
            for flow in row.flows:
                place = self._place(flow)
                if place is None:
                    continue
                self.made += 1
                if flow.expected in ("drop", "untouched"):
                    silent.append(Try(row, flow, self._begun(place, flow)))
                    continue
                times = 1 if flow.expected == "reject" else 2 * len(flow.expected)
                answers = {self._ask(place, flow) for _ in range(times)}
                wanted = {"reject"} if flow.expected == "reject" else {self._known(it) for it in flow.expected}
                if answers != wanted:
                    found.append(f"{row}: {flow}: {sorted(answers)} instead of {sorted(wanted)} ({self.writer})")
        self._listen(silent)
        for it in silent:
            wrong = it.answer != "drop" if it.flow.expected == "drop" else it.answer not in ("drop", "reject")
            if wrong:
                found.append(f"{it.row}: {it.flow}: {it.answer} instead of {it.flow.expected} ({self.writer})")
        return found

    def _known(self, endpoint: str) -> str:
        return next(name for name, spelt in self._names.items() if f" {endpoint}" in f"{spelt} ")

    def _place(self, flow: Flow) -> str | None:
        """The namespace that packets of a flow come from; ``None`` where the rig has none, or no way from there."""
        if flow.protocol not in ("TCP", "UDP"):
            return None
        if flow.source == "other pod":  # the other node knows the way to this one, and to no service
            return "p1a" if flow.address in (LAN[4].format(2), LAN[6].format(2)) else None
        named = {"pod": "p0b", "node": "n0", "outside": "x"}
        pods = {self.rig.address(pod, family): pod for pod in PODS for family in (4, 6)}
        return named.get(flow.source) or pods.get(flow.source)

    def _socket(self, place: str, flow: Flow) -> socket.socket:
        kind = socket.SOCK_DGRAM if flow.protocol == "UDP" else socket.SOCK_STREAM
        return self.rig.socketIn(place, socket.AF_INET6 if ":" in flow.address else socket.AF_INET, kind)

    def _ask(self, place: str, flow: Flow) -> str:
        """Who answers; or a word."""
        with self._socket(place, flow) as it:
            end = time.monotonic() + PATIENCE
            it.settimeout(0.5 if flow.protocol == "UDP" else 5.0)
            while True:
                try:
                    it.connect((flow.address, flow.port))
                    if flow.protocol == "UDP":
                        it.send(b"hello")
                    answer = it.recv(1000).split()
                    return answer[0].decode() if answer else "nothing"
                except (ConnectionRefusedError, PermissionError):  # the latter: for datagrams of the node itself
                    return "reject"
                except TimeoutError:
                    if flow.protocol == "UDP" and time.monotonic() < end:
                        continue
                    return "drop"
                except OSError as error:
                    return errno.errorcode.get(error.errno or 0, str(error))

    def _begun(self, place: str, flow: Flow) -> socket.socket:
        it = self._socket(place, flow)
        it.setblocking(False)
        it.connect_ex((flow.address, flow.port))
        if flow.protocol == "UDP":
            it.send(b"hello")
        return it

    @staticmethod
    def _listen(silent: Iterable[Try]) -> None:
        """Wait for answers that shall not come, all at once."""
        selector = selectors.DefaultSelector()
        for it in silent:
            selector.register(it.socket, selectors.EVENT_READ, it)
        end = time.monotonic() + SILENCE
        while (left := end - time.monotonic()) > 0 and selector.get_map():
            for key, _events in selector.select(left):
                it = key.data
                selector.unregister(it.socket)
                try:
                    it.answer = it.socket.recv(1000).decode() or "nothing"
                except ConnectionRefusedError:
                    it.answer = "reject"
                except OSError as error:
                    it.answer = "drop" if error.errno == errno.EHOSTUNREACH else str(error)
        selector.close()
        for it in silent:
            it.socket.close()
