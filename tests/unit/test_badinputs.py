"""
What is wrong in an object costs what is wrong and nothing else: the table of bad inputs, by way of the API server and
of files, into a cluster.
"""

from __future__ import annotations

import json
import os
from typing import Any

from twisted.internet.defer import execute
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.rawhttp import Exchange
from tests.shared.badinputs import (
    API_SERVER,
    BYTES,
    GOOD,
    GOOD_ENDS,
    NODE_ADDRESS,
    SERVICES,
    SLICES,
    TAKEN,
    Bad,
    Spoilt,
    good,
    goodSlice,
)
from tests.shared.reflectors import SERVICES as SERVICE_RESOURCE
from tests.shared.reflectors import ReflectorCase
from tests.shared.sources import manifest
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core import wire
from twisted_kproxy.core.values import Change, Kind, Reached
from twisted_kproxy.metrics import Metrics
from twisted_kproxy.sources.client import Limits, Resource
from twisted_kproxy.sources.files import FilesSource

SLICE_RESOURCE = Resource("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices")
KINDS: tuple[Kind, ...] = ("Service", "EndpointSlice", "Endpoints", "Node")


def neighbours(kind: Kind) -> list[dict[str, Any]]:
    """One whose key sorts before, and one whose key sorts behind that of what is wrong."""
    if kind == "EndpointSlice":
        found = [goodSlice(), goodSlice()]
        for it, name, ip in zip(found, ("left", "right"), ("10.1.0.1", "10.1.0.2"), strict=True):
            it["metadata"] |= {"name": f"{name}-1", "uid": f"u-{name}-1", "labels": {wire.SERVICE_NAME_LABEL: name}}
            it["endpoints"] = [{"addresses": [ip]}]
        return found
    left, right = manifest("left", "10.96.0.1"), manifest("right", "10.96.0.2")
    left["spec"]["ports"][0]["nodePort"] = TAKEN
    for it in (left, right):
        it["spec"]["ports"][0]["name"] = "http"
        it["metadata"] |= {"uid": f"u-{it['metadata']['name']}", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return [left, right]


class Watched:
    """A cluster, what it serves, and what the log says meanwhile."""

    def __init__(self, test: SynchronousTestCase, kind: Kind, kinds: tuple[Kind, ...]) -> None:
        self.kind = kind
        self.cluster = Cluster("n0")
        self.metrics = Metrics()
        self.metrics.watchQuarantined(self.cluster.quarantined)
        self.metrics.watchProblems(self.cluster.problems)
        self.cluster.expect("api", kinds)
        self.cluster.expect("rest", KINDS)
        self.cluster.hostAddresses([NODE_ADDRESS])
        self.cluster.say(Reached("rest", frozenset({API_SERVER})))
        if kind == "EndpointSlice":
            for it in (*neighbours("Service"), good()):
                service = wire.convert("Service", it)
                self.cluster.say(Change("rest", "Service", wire.keyOf(service.metadata), service))
        self.logged: list[str] = []
        globalLogPublisher.addObserver(self._log)
        test.addCleanup(self.close)

    def close(self) -> None:
        """Twice is harmless."""
        globalLogPublisher.removeObserver(self._log)

    def _log(self, event: Any) -> None:
        if event["log_level"] >= LogLevel.warn:
            self.logged.append(formatEvent(event))

    def served(self, service: str) -> list[str]:
        """Frontends of a Service, or its endpoints where it is slices that are tested."""
        ports = [port for name, port in self.cluster.current().items() if name.service == service]
        if self.kind == "EndpointSlice":
            return [str(it) for port in ports for it in port.cluster]
        return [str(port.key(it)) for port in ports for it in port.frontends]

    def told(self) -> list[str]:
        """All that operators are shown."""
        quarantined = [f"{it['key']}: {it['reason']}" for it in self.cluster.quarantined()]
        return [*quarantined, *(f"{it.key}: {it.reason}" for it in self.cluster.problems())]

    def count(self, name: str) -> float:
        """Of the metric with that name; the others are not collected, that would take most of the time."""
        families = {it.name: it for it in self.metrics._state.collect()}
        return sum(it.value for it in families[name].samples if it.labels["kind"] == self.kind)


class Judging(SynchronousTestCase):
    """How it is judged what became of an input."""

    def judge(self, bad: Bad, watched: Watched, lastGood: bool, where: str) -> None:
        """After the input was read, once or more."""
        what = f"{bad.name}, {where}"
        serves = GOOD_ENDS if watched.kind == "EndpointSlice" else GOOD
        key = bad.key or (f"shop/odd{'-1' * (watched.kind == 'EndpointSlice')}" if lastGood else "")
        service = key.partition("/")[2] if watched.kind == "Service" else "odd"
        expected = (serves if lastGood else ()) if bad.fate == "refused" else bad.served
        self.assertEqual(sorted(watched.served(service)), sorted(expected), what)
        self.assertNeighbours(watched, what)
        said = watched.told()
        if bad.fate == "fine":
            self.assertEqual((said, watched.logged), ([], []), what)
            return
        shown = [it for it in said if bad.reason in it]
        if bad.key or lastGood:
            self.assertTrue(shown and all(it.startswith(f"{key}: ") for it in said), (what, said))
            self.assertEqual(watched.count("kproxy_quarantined_objects"), bad.fate == "refused", what)
            self.assertEqual(watched.count("kproxy_problems") > 0, bad.fate == "partial", what)
        if bad.fate == "refused" and bad.key:
            (it,) = watched.cluster.quarantined()
            self.assertEqual(it["lastGood"], "serving" if lastGood else "none", what)
        self.assertEqual(len(watched.logged), 1, (what, watched.logged))

    def assertNeighbours(self, watched: Watched, what: str) -> None:
        if watched.kind == "EndpointSlice":
            expected = [["10.1.0.1:8080"], ["10.1.0.2:8080"]]
        else:
            expected = [["10.96.0.1:80/TCP", f"node:{TAKEN}/TCP"], ["10.96.0.2:80/TCP"]]
        self.assertEqual([watched.served("left"), watched.served("right")], expected, what)

    def assertMended(self, watched: Watched, what: str) -> None:
        """The good version has come."""
        serves = GOOD_ENDS if watched.kind == "EndpointSlice" else GOOD
        self.assertEqual(watched.served("odd"), list(serves), what)
        self.assertEqual(watched.told(), [], what)
        self.assertEqual((watched.count("kproxy_quarantined_objects"), watched.count("kproxy_problems")), (0, 0), what)
        self.assertNeighbours(watched, what)


class ServerCase(Judging, ReflectorCase):
    """A reflector, a cluster behind it, and a server of which every byte is the test's."""

    kind: Kind = "Service"
    limits = Limits(size=100_000_000)

    def makeWords(self) -> Watched:
        self.watched = Watched(self, self.kind, (self.kind,))
        self.watched.say = self.watched.cluster.say  # type: ignore[attr-defined]
        return self.watched

    def setUp(self) -> None:
        self.resource = SLICE_RESOURCE if self.kind == "EndpointSlice" else SERVICE_RESOURCE
        super().setUp()
        self.rv = 100

    def again(self) -> None:
        """For the next input."""
        self.stop()
        self.watched.close()
        self.setUp()

    def good(self) -> bytes:
        return json.dumps(goodSlice() if self.kind == "EndpointSlice" else good()).encode()

    def versioned(self, text: bytes) -> bytes:
        """With the next resource version, where there is a place for it."""
        self.rv += 1
        return text.replace(b'"metadata": {', b'"metadata": {"resourceVersion": "%d", ' % self.rv, 1)

    def event(self, watch: Exchange, type: str, text: bytes) -> None:
        watch.chunk(b'{"type": "%s", "object": %s}\n' % (type.encode(), self.versioned(text)))

    def answer(self, exchange: Exchange, *texts: bytes) -> None:
        self.rv += 1
        head = b'{"kind": "%sList", "apiVersion": "v1", "metadata": {"resourceVersion": "%d"}, "items": ['
        exchange.answer(head % (self.kind.encode(), self.rv) + b", ".join(texts) + b"]}")

    def neighbours(self) -> list[bytes]:
        return [json.dumps(it).encode() for it in neighbours(self.kind)]

    def listed(self, *texts: bytes) -> Exchange:
        """A list of these and the two neighbours around them was read; the watch that follows."""
        self.start()
        left, right = self.neighbours()
        self.answer(self.nextList("0"), left, *texts, right)
        watch = self.nextWatch(str(self.rv))
        watch.begin()
        return watch

    def relisted(self, watch: Exchange, *texts: bytes) -> None:
        """The server has forgotten the version; the next list is of these and the two neighbours around them."""
        watch.event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
        self.answerAgain(*texts)

    def answerAgain(self, *texts: bytes) -> None:
        """The list that is asked for after a pause."""
        self.clock.advance(60)
        left, right = self.neighbours()
        self.answer(self.next(), left, *texts, right)

    @property
    def oddKey(self) -> str:
        return wire.keyOf(wire.decode(self.kind, self.good()).metadata)


class ServerTests(ServerCase):
    """By way of a reflector, from the bytes of the answers on."""

    table = SERVICES

    def test_added(self) -> None:
        """As a new object in a watch, and again and again; then it is mended."""
        for bad in self.table:
            if bad.heavy:
                continue
            watch = self.listed()
            for type in ("ADDED", "MODIFIED", "MODIFIED"):
                self.event(watch, type, bad.text.encode())
                self.judge(bad, self.watched, False, type)
            self.event(watch, "MODIFIED", self.good())
            if bad.key == self.oddKey:
                self.assertMended(self.watched, bad.name)
            self.assertTrue(watch.open, bad.name)
            self.again()

    def test_modified(self) -> None:
        """As a new version of a good object: what was good stays in force where nothing of it can be read."""
        for bad in self.table:
            # One that says neither its name nor its uid: nobody can tell that it is this one.
            if bad.heavy or bad.key not in ("", self.oddKey) or (not bad.key and '"uid": "' not in bad.text):
                continue
            watch = self.listed(self.good())
            for _ in range(3):
                self.event(watch, "MODIFIED", bad.text.encode())
                self.judge(bad, self.watched, True, "MODIFIED")
            self.event(watch, "MODIFIED", self.good())
            self.assertMended(self.watched, bad.name)
            self.again()

    def test_listed(self) -> None:
        """In a list between two good ones, and in the next list again; then it is mended."""
        for bad in self.table:
            watch = self.listed(bad.text.encode())
            self.judge(bad, self.watched, False, "listed")
            self.relisted(watch, bad.text.encode())
            self.judge(bad, self.watched, False, "listed again")
            watch = self.nextWatch(str(self.rv))
            watch.begin()
            self.relisted(watch, self.good())
            self.assertMended(self.watched, bad.name)
            self.nextWatch(str(self.rv))
            self.again()

    def test_gone(self) -> None:
        """Removed while it cannot be read, it is gone, and nothing is told of it any more."""
        for bad in self.table:
            if bad.fate != "refused" or bad.key != self.oddKey:
                continue
            watch = self.listed(self.good())
            self.event(watch, "MODIFIED", bad.text.encode())
            self.event(watch, "DELETED", bad.text.encode())
            self.assertEqual((self.watched.served("odd"), self.watched.told()), ([], []), bad.name)
            self.again()


class SliceServerTests(ServerTests):
    """The same for slices."""

    kind: Kind = "EndpointSlice"
    table = SLICES

    def test_twoNamespaces(self) -> None:
        """Slices of one name in two namespaces are two; a label does not reach into another namespace."""
        other = goodSlice()
        other["metadata"] |= {"namespace": "evil", "uid": "u-evil"}
        other["endpoints"] = [{"addresses": ["10.1.0.66"]}]
        watch = self.listed(self.good())
        self.event(watch, "ADDED", json.dumps(other).encode())
        self.assertEqual(self.watched.served("odd"), list(GOOD_ENDS))
        self.event(watch, "DELETED", json.dumps(other).encode())
        self.assertEqual(self.watched.served("odd"), list(GOOD_ENDS))


class BytesTests(ServerCase):
    """What happens to bytes on their way."""

    def spoilt(self, it: Spoilt) -> bytes:
        text = it.spoil(self.good())
        self.assertNotEqual(text, self.good(), it.name)
        return text

    def test_watched(self) -> None:
        """In a watch: what is no event ends it, and it begins anew from where it was; the last good version stays."""
        for it in BYTES:
            watch = self.listed(self.good())
            self.event(watch, "MODIFIED", self.spoilt(it))
            self.assertEqual(watch.open, it.fate != "text", it.name)
            self.assertEqual(self.watched.served("odd"), list(GOOD), it.name)
            self.assertNeighbours(self.watched, it.name)
            self.assertEqual(len(self.watched.logged), it.fate != "fine", (it.name, self.watched.logged))
            if it.fate == "text":
                self.answerAgain(self.good())
                watch = self.nextWatch(str(self.rv))
                watch.begin()
            self.event(watch, "MODIFIED", self.good())
            self.assertEqual(self.watched.served("odd"), list(GOOD), it.name)
            self.again()

    def test_inList(self) -> None:
        """In a list: one that is no JSON is not believed, and what was known stays until another can be read."""
        for it in BYTES:
            watch = self.listed(self.good())
            self.relisted(watch, self.spoilt(it))
            self.assertNeighbours(self.watched, it.name)
            self.assertEqual(self.watched.served("odd"), list(GOOD), it.name)
            if it.fate == "text":
                self.assertNotEqual(self.reflector.status()["lastError"], "", it.name)
                self.answerAgain(self.good())
            self.assertEqual(self.watched.served("odd"), list(GOOD), it.name)
            self.nextWatch(str(self.rv))
            self.again()


class FileTests(Judging):
    """The same by way of files: alone, and in a list with others."""

    def source(self, kind: Kind) -> None:
        folder = os.path.abspath(self.mktemp())
        os.mkdir(folder)
        self.folder, self.clock = folder, Clock()
        self.watched = Watched(self, kind, KINDS)

        class Where:
            path, pollSeconds = folder, 5.0

        self.files = FilesSource(
            self.clock, "api", Where(), self.watched.cluster, execute, nodeName="n0"  # type: ignore[arg-type]
        )

    def write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.folder, name)
        with open(f"{path}~", "wb") as file:
            file.write(data)
        os.rename(f"{path}~", path)

    def look(self) -> None:
        if not self.files.running:
            self.files.startService()
        self.clock.advance(5)
        self.clock.advance(0)

    def stop(self) -> None:
        self.successResultOf(self.files.stopService())
        self.watched.close()

    def together(self, kind: Kind, *texts: bytes) -> bytes:
        left, right = (json.dumps(it).encode() for it in neighbours(kind))
        head = b'{"kind": "List", "apiVersion": "v1", "items": ['
        return head + b",\n".join((left, *texts, right)) + b"]}"

    def tables(self) -> list[tuple[Kind, Bad, bytes]]:
        mine: list[tuple[Kind, tuple[Bad, ...], Any]] = [
            ("Service", SERVICES, good()), ("EndpointSlice", SLICES, goodSlice()),
        ]  # fmt: skip
        return [
            (kind, bad, json.dumps(it).encode())
            for kind, table, it in mine
            for bad in table
            if not bad.onlyServer and not bad.heavy
        ]

    def test_inList(self) -> None:
        """In one file with its neighbours; looked at again it is not told again; then it is mended."""
        for kind, bad, better in self.tables():
            self.source(kind)
            self.write("all.json", self.together(kind, bad.text.encode()))
            self.look()
            self.judge(bad, self.watched, False, "in a file")
            self.write("all.json", self.together(kind, bad.text.encode()) + b" ")
            self.look()
            self.judge(bad, self.watched, False, "written again")
            self.write("all.json", self.together(kind, better))
            self.look()
            self.assertMended(self.watched, bad.name)
            self.stop()

    def test_overGood(self) -> None:
        """A file of its own, good at first: what was good stays in force where nothing of it can be read."""
        for kind, bad, better in self.tables():
            if bad.key != f"shop/{json.loads(better)['metadata']['name']}":
                continue
            self.source(kind)
            self.write("neighbours.json", self.together(kind))
            self.write("odd.json", better)
            self.look()
            self.write("odd.json", bad.text.encode())
            self.look()
            self.judge(bad, self.watched, True, "over a good file")
            self.write("odd.json", better + b"\n")
            self.look()
            self.assertMended(self.watched, bad.name)
            self.stop()

    def test_bytes(self) -> None:
        """A file that is no JSON keeps its last good content; others do not care."""
        better = json.dumps(good()).encode()
        for it in BYTES:
            self.source("Service")
            self.write("neighbours.json", self.together("Service"))
            self.write("odd.json", better)
            self.look()
            self.write("odd.json", it.spoil(better))
            self.look()
            self.assertNeighbours(self.watched, it.name)
            self.assertEqual(self.watched.served("odd"), list(GOOD), it.name)
            self.assertEqual(len(self.watched.logged), it.fate != "fine", (it.name, self.watched.logged))
            self.write("odd.json", better + b"\n")
            self.look()
            self.assertMended(self.watched, it.name)
            self.stop()
