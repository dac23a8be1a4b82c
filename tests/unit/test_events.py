"""Events: what the cluster's operators are told through the API."""

from __future__ import annotations

import json
from typing import Any

from treq.testing import RequestTraversalAgent
from twisted.internet.task import Clock
from twisted.logger import LogLevel, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.fakes.apikinds import EVENTS, EVENTS_V1
from tests.fakes.apiserver import FakeApi
from tests.shared.sources import Words
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.interfaces import IEventRecorder
from twisted_kproxy.sources.api import ApiSource
from twisted_kproxy.sources.client import ApiClient
from twisted_kproxy.sources.credentials import ApiAccess
from twisted_kproxy.sources.events import (
    BURST,
    EVERY,
    FOLD,
    MOST,
    MUTE,
    PATIENCE,
    EventRecorder,
    NoEvents,
)

MORNING = 1_790_000_000.0  # 2026-09-21T14:13:20Z


class RecorderCase(SynchronousTestCase):
    """A recorder before an API server that checks what it is given as the real one does."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.api = FakeApi(self.clock, admission=True)
        for name in ("shop",):
            self.api.store.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        self.agent = RequestTraversalAgent(self.api.resource)
        client = ApiClient(self.clock, ApiAccess("http://192.0.2.1", "test"), self.agent)
        self.recorder = EventRecorder(
            self.clock, client, "main", "node-a", lambda: 0.0, lambda: MORNING + self.clock.seconds()
        )
        self.recorder.start()
        self.logged: list[Any] = []
        globalLogPublisher.addObserver(self.logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.logged.append)
        self.addCleanup(self.stop)

    def stop(self) -> None:
        """Also holds after each test: nothing is left running."""
        self.recorder.stop()
        self.agent.flush()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def pass_(self, seconds: float = 1.0, step: float = 0.5) -> None:
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.agent.flush()

    def record(self, note: str = "port 30500 is taken", **other: Any) -> None:
        said: dict[str, Any] = {
            "kind": "Service", "namespace": "shop", "name": "web", "uid": "u1", "reason": "FailedToStart",
            "action": "Listen", "note": note, "warning": True,
        }
        self.recorder.record(**{**said, **other})

    def events(self) -> list[Any]:
        return list(self.api.store.objects(EVENTS_V1).values())

    def notes(self) -> list[str]:
        return sorted(it["note"] for it in self.events())

    def asked(self, verb: str = "*") -> int:
        return len(self.api.asked("events", verb))

    def warnings(self) -> list[str]:
        return [it["log_format"].format(**it) for it in self.logged if it["log_level"] >= LogLevel.warn]


class WrittenTests(RecorderCase):
    """What the server gets."""

    def test_interface(self) -> None:
        """Both recorders are ones."""
        verifyObject(IEventRecorder, self.recorder)
        verifyObject(IEventRecorder, NoEvents())
        NoEvents().record("Node", "", "n", "", "Starting", "Start", "it starts")

    def test_service(self) -> None:
        """An event about a Service is in its namespace, with all that there is to say."""
        self.record()
        self.pass_()
        (it,) = self.events()
        self.assertEqual(it["metadata"]["namespace"], "shop")
        self.assertRegex(it["metadata"]["name"], r"^web\.[0-9a-f]+$")
        del it["metadata"]
        self.assertEqual(it, {
            "eventTime": "2026-09-21T14:13:20.000000Z", "reportingController": "kproxy",
            "reportingInstance": "node-a", "action": "Listen", "reason": "FailedToStart", "type": "Warning",
            "note": "port 30500 is taken",
            "regarding": {"apiVersion": "v1", "kind": "Service", "namespace": "shop", "name": "web", "uid": "u1"},
        })  # fmt: skip

    def test_node(self) -> None:
        """One about a Node is in the namespace default."""
        self.record(kind="Node", namespace="", name="node-a", uid="", warning=False)
        self.pass_()
        (it,) = self.events()
        self.assertEqual((it["metadata"]["namespace"], it["type"]), ("default", "Normal"))
        self.assertEqual(it["regarding"], {"apiVersion": "v1", "kind": "Node", "name": "node-a"})

    def test_kubectl(self) -> None:
        """It is there for those who ask for events of the core group as well, as kubectl does."""
        self.record()
        self.pass_()
        (it,) = self.api.store.objects(EVENTS).values()
        self.assertEqual((it["message"], it["involvedObject"]["name"]), ("port 30500 is taken", "web"))

    def test_long(self) -> None:
        """Text that is longer than a server takes is cut, not within a character."""
        self.record("ä" * 2000, name="n" * 63, reason="R" * 200)
        self.pass_()
        (it,) = self.events()
        self.assertEqual((it["note"], it["reason"]), ("ä" * 512, "R" * 128))

    def test_neverAtOnce(self) -> None:
        """Whoever records something goes on first: nothing is asked before the reactor's next turn."""
        self.record()
        self.assertEqual(self.api.requests, [])

    def test_stopped(self) -> None:
        """Before start and after stop there is nobody to tell."""
        self.recorder.stop()
        self.record()
        self.pass_()
        self.assertEqual(self.asked(), 0)

    def test_stopWithinRequest(self) -> None:
        """Stopping ends a request that is under way."""
        self.api.faults.add(resource="events", blackHole=True)
        self.record()
        self.pass_()
        self.recorder.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class FoldTests(RecorderCase):
    """The same again."""

    def test_repeated(self) -> None:
        """Within minutes it is counted; then the count is told, and with it when it was last."""
        for _ in range(5):
            self.record()
            self.pass_(10)
        self.assertEqual(self.asked(), 1)
        self.pass_(FOLD, 5)
        (it,) = self.events()
        self.assertEqual(it["series"], {"count": 5, "lastObservedTime": "2026-09-21T14:14:00.000000Z"})
        self.assertEqual((self.asked("create"), self.asked("patch")), (1, 1))
        self.assertEqual(self.warnings(), [])

    def test_goesOn(self) -> None:
        """Counting goes on as long as it comes; once it has not for a while, it is news again."""
        for _ in range(4):
            self.record()
            self.pass_(FOLD * 0.75, 5)
        self.assertEqual([it["series"]["count"] for it in self.events()], [4])
        self.pass_(3 * FOLD, 5)
        self.assertEqual(self.asked(), 4)
        self.record()
        self.pass_()
        self.assertEqual(len(self.events()), 2)

    def test_others(self) -> None:
        """Another note, object or reason is another event."""
        self.record()
        self.record("port 30501 is taken")
        self.record(uid="u2")
        self.record(reason="Other")
        self.pass_()
        self.assertEqual(len(self.events()), 4)

    def test_gone(self) -> None:
        """An event that the server has forgotten meanwhile is not counted further, and is no fault."""
        self.record()
        self.pass_()
        self.record()
        self.api.store.remove(EVENTS_V1, "shop", self.events()[0]["metadata"]["name"])
        self.pass_(FOLD, 5)
        self.assertEqual((self.asked("patch"), self.warnings()), (1, []))
        self.record()
        self.pass_()
        self.assertEqual(len(self.events()), 1)


class BoundTests(RecorderCase):
    """However many there are."""

    def test_oneAtATime(self) -> None:
        """The next one goes out when the one before has been answered."""
        self.api.faults.add(resource="events", delay=2.0, times=3)
        for number in range(3):
            self.record(str(number))
        self.pass_(1)
        self.assertEqual(self.asked(), 1)
        self.pass_(2)
        self.assertEqual(self.asked(), 2)
        self.pass_(10)
        self.assertEqual(self.notes(), ["0", "1", "2"])

    def test_rate(self) -> None:
        """A burst, and then one every few seconds."""
        for number in range(BURST + 10):
            self.record(str(number))
        self.pass_(1)
        self.assertEqual(len(self.events()), BURST)
        self.pass_(EVERY * 5)
        self.assertEqual(len(self.events()), BURST + 5)

    def test_oldestGoes(self) -> None:
        """Where there is no room the oldest is let go, and counted; what is remembered has an end, too."""
        for number in range(3 * MOST):
            self.record(str(number))
        status = self.recorder.status()
        self.assertEqual((status["waiting"], status["dropped"]), (MOST, 2 * MOST))
        self.pass_(1)
        self.assertEqual(self.notes(), [str(2 * MOST + number) for number in range(BURST)])
        self.assertLessEqual(len(self.recorder._known), MOST)


class TroubleTests(RecorderCase):
    """A server that does not take them."""

    def test_forbidden(self) -> None:
        """Without the right to do so one line says which it is, and nothing is asked for an hour; then again."""
        self.api.forbidden = {("events", "create")}
        for number in range(3):
            self.record(str(number))
        self.pass_(5)
        for number in range(3, 100):
            self.record(str(number))
        self.pass_(MUTE - 60, 30)
        self.assertEqual(self.asked(), 1)
        (line,) = self.warnings()
        for part in ("events.k8s.io", "resources [events]", "[create, patch]", "etc/rbac.yaml"):
            self.assertIn(part, line)
        self.assertEqual(self.recorder.status()["waiting"], 0)
        self.api.forbidden = set()
        self.pass_(120, 30)
        self.record("0")
        self.pass_()
        self.assertEqual(self.notes(), ["0"])

    def test_terminating(self) -> None:
        """A namespace that is going takes no more events: that is no matter of rights."""
        text = 'events "x" is forbidden: unable to create new content in namespace shop because it is being terminated'
        body = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": text}
        self.api.faults.add(resource="events", status=403, body=json.dumps(body), times=1)
        self.record()
        self.record("another", namespace="default")
        self.pass_(5)
        self.assertEqual((self.notes(), self.warnings()), (["another"], []))

    def test_unavailable(self) -> None:
        """A server that fails is asked again, ever more slowly; what came is told when it is well."""
        self.api.faults.add(resource="events", status=503, times=0)
        self.record()
        self.pass_(60)
        self.assertTrue(3 <= self.asked() <= 8, self.asked())
        self.api.faults.clear()
        self.pass_(60)
        self.assertEqual(len(self.events()), 1)
        self.assertEqual(self.warnings(), [])

    def test_retryAfter(self) -> None:
        """It is not asked before the time that it names."""
        self.api.faults.add(resource="events", status=429, headers={"Retry-After": "40"}, times=1)
        self.record()
        self.pass_(38)
        self.assertEqual(self.asked(), 1)
        self.pass_(5)
        self.assertEqual(len(self.events()), 1)

    def test_patience(self) -> None:
        """An event that cannot be told is let go in the end; that time was not long enough for it to matter."""
        self.api.faults.add(resource="events", status=503, times=0)
        self.record()
        self.pass_(PATIENCE + 120, 5)
        asked = self.asked()
        self.assertEqual((self.recorder.status()["waiting"], self.recorder.status()["dropped"]), (0, 1))
        self.pass_(600, 5)
        self.assertEqual(self.asked(), asked)
        self.api.faults.clear()
        self.record()
        self.pass_(60)
        self.assertEqual(len(self.events()), 1)

    def test_deadLink(self) -> None:
        """So is one to whom nobody answers, and others go on after it."""
        self.api.faults.add(resource="events", blackHole=True, times=1)
        self.record()
        self.record("another")
        self.pass_(40)
        self.assertEqual(len(self.events()), 2)

    def test_refusedContent(self) -> None:
        """An event that the server finds wrong is let go, with a line an hour at most; the next one is told."""
        for number in range(4):
            self.record(str(number), action="")
        self.record("good")
        self.pass_(5)
        self.assertEqual(self.notes(), ["good"])
        said = [it for it in self.logged if "was not taken" in it["log_format"]]
        self.assertEqual((len(said), self.recorder.status()["dropped"]), (1, 4))

    def test_noSuchApi(self) -> None:
        """A server without such events costs one line."""
        self.api.faults.add(resource="events", status=404, times=0)
        for number in range(4):
            self.record(str(number))
        self.pass_(5)
        self.assertEqual(self.warnings(), [])
        self.assertEqual(self.recorder.status()["waiting"], 0)

    def test_defect(self) -> None:
        """An unforeseen error costs what waited, is logged, and the next event is tried."""

        def broken(*_: Any) -> Any:
            raise ZeroDivisionError("oops")

        send = self.recorder._send
        self.recorder._send = broken  # type: ignore[method-assign]
        self.record()
        self.pass_()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.recorder._send = send  # type: ignore[method-assign]
        self.record("another")
        self.pass_()
        self.assertEqual(self.notes(), ["another"])


class SourceTests(SynchronousTestCase):
    """The source passes on."""

    def test_source(self) -> None:
        """An API source is a recorder; with its credentials, and only while it runs."""
        clock = Clock()
        api = FakeApi(clock)
        agent = RequestTraversalAgent(api.resource)
        source = ApiSource(
            clock, "main", ApiOptions("main", server="http://192.0.2.1"), Words(), nodeName="node-a", agent=agent,
            random=lambda: 0.0,
        )
        verifyObject(IEventRecorder, source)
        source.record("Node", "", "node-a", "u", "Starting", "Start", "too early")
        source.startService()
        source.record("Node", "", "node-a", "u", "Starting", "Start", "now")
        for _ in range(4):
            clock.advance(0.5)
            agent.flush()
        self.assertEqual([it["note"] for it in api.store.objects(EVENTS_V1).values()], ["now"])
        self.assertEqual(source.status()["events"]["sent"], 1)
        source.stopService()
        for watch in list(api.watches):
            watch.end()
        agent.flush()
        self.assertEqual(clock.getDelayedCalls(), [])
