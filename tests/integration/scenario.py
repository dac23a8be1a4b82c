"""
What the scenarios of Kubernetes' end-to-end tests are told with: Services on two nodes with a daemon each, and clients
in pods, on nodes and outside. The first words of a test's docstring are the title of the original.

Other than there,

- nothing takes longer than it must: every change must be in force soon (:data:`VISIBLE`) and at the first try, and
  whatever is asked then must be right at once, where the originals try again for half a minute;
- ``min-sync-period`` is 100 ms, so that hundreds of changes need no hundreds of seconds; in
  ``test_e2e_upheavals.py`` it is the default, a second;
- both families are asked.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple
from unittest import SkipTest

from tests.fakes.network import Rig, waitFor
from tests.integration.world import PORT, Json, World, service, slices

#: seconds that a change may take to be in force, on a machine that has much else to do; upstream's
#: ``KubeProxyEndpointLagTimeout`` is 30
VISIBLE = 15.0
API_OPTIONS = ("--state", "{folder}/api.state")  # what it knows outlives it, as a cluster's does
BOTH = {"p0a", "p1a"}
REFUSED = "ConnectionRefusedError"
SILENT = "TimeoutError"
DOWN = {REFUSED, SILENT}
#: pod, node, outside
PLACES = ("p0b", "n0", "x")
Target = tuple[str, int]


def port(number: int = 80, nodePort: int = 0, name: str = "http", protocol: str = "TCP") -> Json:
    """A port of a Service."""
    it: Json = {"name": name, "port": number, "protocol": protocol}
    return {**it, "nodePort": nodePort} if nodePort else it


def behind(number: int = PORT, name: str = "http", protocol: str = "TCP") -> Json:
    """A port of an EndpointSlice."""
    return {"name": name, "port": number, "protocol": protocol}


#: conditions of endpoints
UNREADY = {"conditions": {"ready": False, "serving": False, "terminating": False}}
TERMINATING = {"conditions": {"ready": False, "serving": True, "terminating": True}}
DEAD = {"conditions": {"ready": False, "serving": False, "terminating": True}}


class Answer(NamedTuple):
    """Who answered, or the name of the error; and as whom the client was seen."""

    name: str
    client: str = ""


class Scenario:
    """
    A mix-in for TestCase. All classes of one writer share a World; each test has Services of its own.

    :cvar disturbed: whether something else than changes befalls the daemons, which they may have to try twice for.
    """

    writer: ClassVar[str]
    disturbed: ClassVar[bool] = False
    settings: ClassVar[str] = "min-sync-period = 100ms"
    timeout = 120
    _nodePorts = itertools.count(30200)
    _names = itertools.count(1)
    _ports = itertools.count(12340)

    def setUp(self) -> None:
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        self.world = World.get(self.writer, API_OPTIONS, ("n0", "n1"), self.settings)
        self.rig: Rig = self.world.rig

    def tearDown(self) -> None:
        for daemon in self.world.daemons.values():
            daemon.assertNoTraceback()
            if not self.disturbed:
                self.assertNotIn("Could not apply", daemon.log())

    # --- objects

    def nodePort(self) -> int:
        """One that no other test has."""
        return next(self._nodePorts)

    def make(
        self,
        *pods: str,
        ports: Any = None,
        slicePorts: Any = None,
        more: Any = None,
        labels: Any = None,
        status: Any = None,
        seconds: float = VISIBLE,
        **spec: Any,
    ) -> Json:
        """A Service with these pods behind it, in force everywhere. It goes with the test."""
        name = f"s{next(self._names)}"
        it = service(name, next(self.world.numbers), ports, **spec)
        it["metadata"]["labels"] = labels or {}
        if status:
            it["status"] = {"loadBalancer": {"ingress": [{"ip": ip} for ip in status]}}
        self.addCleanup(self.drop, name)
        self.world.apply(it, *self.slices(it, *pods, ports=slicePorts, more=more), seconds=seconds)
        return it

    def drop(self, name: str) -> None:
        """Delete a Service and its slices, where they still are."""
        for kind, version in (("Service", "v1"), ("EndpointSlice", "discovery.k8s.io/v1")):
            for suffix in ("",) if kind == "Service" else ("-ipv4", "-ipv6", "-2-ipv4", "-2-ipv6"):
                it = {"apiVersion": version, "kind": kind, "metadata": {"name": name + suffix, "namespace": "default"}}
                try:
                    self.world.api.delete(it)
                except AssertionError:  # it is gone
                    continue

    def slices(self, it: Json, *pods: str, **kw: Any) -> list[Json]:
        return slices(self.rig, it["metadata"]["name"], *pods, **kw)

    def behind(self, it: Json, *pods: str, ports: Any = None, more: Any = None) -> None:
        """Change who is behind a Service, and wait until it is in force."""
        self.world.apply(*self.slices(it, *pods, ports=ports, more=more), seconds=VISIBLE)

    def change(self, it: Json, **spec: Any) -> None:
        """Change fields of a Service's spec (``None`` takes one away), and wait until it is in force."""
        for key, value in spec.items():
            it["spec"].pop(key, None)
            if value is not None:
                it["spec"][key] = value
        self.world.apply(it, seconds=VISIBLE)

    def ingress(self, it: Json, *ips: str) -> None:
        """A load balancer says at which addresses it serves."""
        it["status"] = {"loadBalancer": {"ingress": [{"ip": ip} for ip in ips]}}
        self.world.apply(it, seconds=VISIBLE)

    # --- where it can be dialled

    def clusterIPs(self, it: Json, number: int = 80) -> list[Target]:
        return [(ip, number) for ip in it["spec"]["clusterIPs"]]

    def onNodes(self, number: int, *nodes: str) -> list[Target]:
        """A node port on these nodes; on both where none is named."""
        return [(self.rig.address(node, family), number) for node in nodes or ("n0", "n1") for family in (4, 6)]

    # --- asking

    def ask(
        self, place: str, target: Target, udp: bool = False, seconds: float = 5, body: bytes = b"hello"
    ) -> Answer:
        """One request on a connection of its own, or one datagram from a socket of its own."""
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        it = self.rig.socketIn(place, family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        with it:
            it.settimeout(seconds)
            try:
                it.connect(target)
                if udp:
                    it.send(body)
                    answer = it.recv(65535)
                else:
                    it.sendall(b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    whole = b"".join(iter(lambda: it.recv(65536), b""))
                    answer = whole.partition(b"\r\n\r\n")[2]
            except OSError as error:
                return Answer(type(error).__name__)
        name, client = answer.split(b"\n", 1)[0].decode().split()[:2] if answer else ("", "")
        return Answer(name, client) if answer.endswith(body) else Answer(f"{answer!r}")

    def who(
        self, place: str, target: Target, times: int = 8, udp: bool = False, seconds: float = 5
    ) -> Counter[str]:
        return Counter(self.ask(place, target, udp, seconds).name for _ in range(times))

    def expect(
        self,
        targets: Iterable[Target],
        whom: set[str],
        places: Sequence[str] = PLACES,
        udp: bool = False,
        times: int = 0,
    ) -> None:
        """At each of these, from each of these places, exactly these answer. At once, and every time."""
        for target in targets:
            for place in places:
                found = self.who(place, target, times or 2 + 2 * len(whom), udp)
                self.assertEqual(set(found), whom, f"{place} {target}: {found}")

    def refused(self, targets: Iterable[Target], places: Sequence[str] = PLACES, udp: bool = False) -> None:
        """Refused, not ignored."""
        for target in targets:
            for place in places:
                self.assertEqual(self.ask(place, target, udp).name, REFUSED, f"{place} {target}")

    def down(
        self,
        targets: Iterable[Target],
        places: Sequence[str] = PLACES,
        udp: bool = False,
        seconds: float = 0.3,
        times: int = 1,
    ) -> None:
        """Nobody answers: refused, or no answer for so long."""
        tries = [(place, target) for target in targets for place in places for _ in range(times)]
        with ThreadPoolExecutor(len(tries)) as pool:
            found = list(pool.map(lambda it: self.ask(*it, udp, seconds).name, tries))
        wrong = [(it, name) for it, name in zip(tries, found, strict=True) if name not in DOWN]
        self.assertEqual(wrong, [])

    def healthy(self, number: int) -> dict[str, int]:
        """What each node says to load balancers on a health-check node port; the same by both families."""
        found: dict[str, set[int]] = {}
        for node in ("n0", "n1"):
            hosts = (self.rig.address(node, 4), f"[{self.rig.address(node, 6)}]")
            found[node] = {self.rig.http("x", f"http://{host}:{number}/healthz")[0] for host in hosts}
        self.assertEqual([len(codes) for codes in found.values()], [1, 1], found)
        return {node: next(iter(codes)) for node, codes in found.items()}

    def sticks(self, place: str, target: Target, udp: bool = False) -> str:
        """15 requests, one endpoint. Gives it."""
        found = self.who(place, target, 15, udp)
        self.assertEqual(len(found), 1, f"{place} {target}: {found}")
        return next(iter(found))

    def connected(self, place: str, target: Target) -> Callable[[], str]:
        """A connection that stays open; calling gives who answers on it."""
        it = self.rig.connect(place, target)
        self.addCleanup(it.close)

        def ask() -> str:
            it.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            data: bytes = it.recv(1000)
            return data.partition(b"\r\n\r\n")[2].decode().split()[0]

        return ask

    def talker(self, place: str, target: Target) -> Talker:
        """A client that keeps its port."""
        it = Talker(self.rig, place, target, next(self._ports))
        self.addCleanup(it.close)
        return it

    def cycles(self, it: Json, talkers: list[Talker], first: str, second: str, ports: Any) -> None:
        """
        The first pod comes; the second one comes, the first goes; and all over again with the parts exchanged. Beyond
        upstream, clients ask before there is a Service, and while it has no pod in between.
        """
        self.world.delete(it)
        for talker in talkers:
            talker.unanswered(3)
        self.world.apply(it)
        for old, new in ((first, second), (second, first)):
            self.behind(it, old, ports=ports)
            for talker in talkers:
                talker.hears(old)
            self.behind(it, old, new, ports=ports)
            self.behind(it, new, ports=ports)
            for talker in talkers:
                talker.hears(new)
            self.behind(it, ports=ports)
            for talker in talkers:
                talker.unanswered(3)


class Talker:
    """
    A client that keeps its port: a datagram every 50 ms, whatever becomes of it.

    :ivar last: who answered last; ``""`` for nobody.
    :ivar misses: how many had no answer since.
    """

    def __init__(self, rig: Rig, place: str, target: Target, own: int = 12345) -> None:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self._socket = rig.socketIn(place, family, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", own))
        self._socket.connect(target)
        self._socket.settimeout(0.05)
        self._stop = threading.Event()
        self.where = f"{place} from port {own} at {target}"
        self.last = ""
        self.misses = 0
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _talk(self) -> None:
        while not self._stop.wait(0.05):
            try:
                self._socket.send(b"hostname")
                self.last = self._socket.recv(1000).split()[0].decode()
                self.misses = 0
            except OSError:  # refused, or no answer
                self.misses += 1

    def hears(self, whom: str, seconds: float = 10) -> None:
        """:raise AssertionError: where it is not so within so many seconds (upstream: 60)."""
        try:
            waitFor(lambda: self.last == whom and not self.misses, seconds)
        except AssertionError:
            heard = f"{self.last!r} last, then {self.misses} times nobody"
            raise AssertionError(f"{self.where} was to hear {whom!r} within {seconds} s, and heard {heard}") from None

    def unanswered(self, count: int) -> None:
        """Until so many datagrams one after the other had no answer."""
        waitFor(lambda: self.misses >= count, 10)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()


class Load:
    """
    Requests without end, each on a connection of its own, at these targets in turn; about 200 in a second.

    :ivar failed: what went wrong.
    """

    def __init__(self, scenario: Any, place: str, targets: Sequence[Target]) -> None:
        self._scenario, self._place, self._targets = scenario, place, targets
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()
        self.total = 0
        self.failed: list[Answer] = []
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        for target in itertools.cycle(self._targets):
            answer = self._scenario.ask(self._place, target, seconds=5)
            self.total += 1
            self.answers[answer.name] += 1
            if answer.name in DOWN or "Error" in answer.name or not answer.client:
                self.failed.append(answer)
            if self._stop.wait(0.005):
                return

    def until(self, more: int, seconds: float = 0) -> None:
        """Until so many more requests have been made and so many seconds are over, or one request has failed."""
        wanted, end = self.total + more, time.monotonic() + seconds
        waitFor(lambda: (self.total >= wanted and time.monotonic() >= end) or self.failed, seconds + 30)
