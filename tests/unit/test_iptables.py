"""The daemon's side of the legacy tables' writer, with a worker that a test plays, and the worker's own loop."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

import msgspec
from msgspec import structs
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import Clock
from twisted.logger import LogEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.shared.writers import SAMPLE, key, same, to
from twisted_kproxy.core.rules import Delta, Guard, Rule, Ruleset, deltaBetween
from twisted_kproxy.core.values import Locality
from twisted_kproxy.interfaces import IRuleWriter, NotAvailable, RulesRejected
from twisted_kproxy.netfilter import iptworker
from twisted_kproxy.netfilter.iptables import (
    CALL_SECONDS,
    GOODBYE_SECONDS,
    POLL_SECONDS,
    READ_BACK_SECONDS,
    IptablesWriter,
    extensionFolder,
    workerEnvironment,
)
from twisted_kproxy.netfilter.xtwire import LIMIT, FrameBuffer, Reply, Request, decodeReply, decodeRequest, framed


class FakeWorker:
    """The process, as its transport shows it."""

    def __init__(self, protocol: Any, argv: list[str], options: dict[str, Any]) -> None:
        self.protocol = protocol
        self.argv = argv
        self.options = options
        self.requests: list[Request] = []
        self.closed: list[int] = []
        self.over = False
        self._frames = FrameBuffer()

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        assert descriptor == 3
        self.requests += [decodeRequest(message) for message in self._frames.feed(data)]

    def closeChildFD(self, descriptor: int) -> None:
        self.closed.append(descriptor)

    def signalProcess(self, name: str) -> None:
        assert name == "KILL"
        if self.over:
            raise ProcessExitedAlready
        self.end(ProcessTerminated(signal=9))

    def answer(self, reply: Reply) -> None:
        self.protocol.childDataReceived(4, framed(reply))

    def end(self, error: Exception | None = None) -> None:
        self.over = True
        self.protocol.processEnded(Failure(error or ProcessDone(0)))


class FakeReactor(Clock):
    """Time, and processes."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[FakeWorker] = []

    def spawnProcess(self, protocol: Any, executable: str, argv: list[str], **options: Any) -> None:
        assert executable == argv[0]
        worker = FakeWorker(protocol, argv, options)
        self.workers.append(worker)
        protocol.makeConnection(worker)


class WriterTests(SynchronousTestCase):
    """Calls and what becomes of them."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.writer = IptablesWriter(self.reactor)
        self.addCleanup(lambda: self.assertEqual(self.reactor.getDelayedCalls(), []))

    @property
    def worker(self) -> FakeWorker:
        return self.reactor.workers[-1]

    def closed(self) -> None:
        """Close the writer, with a worker that does as it is told."""
        done = self.writer.close()
        for worker in self.reactor.workers:
            if not worker.over:
                self.assertIn(3, worker.closed)
                worker.end()
        self.successResultOf(done)

    def test_interface(self) -> None:
        """It starts no process before it is asked something."""
        verifyObject(IRuleWriter, self.writer)
        self.assertEqual(self.reactor.workers, [])
        self.closed()

    def test_process(self) -> None:
        """The worker has pipes of its own for the calls, a clean environment, and none of the current folder's code."""
        self.writer = IptablesWriter(self.reactor, spawnPrefix=("ip", "netns", "exec", "x"))
        self.patch(os, "environ", {"SECRET": "1", "PATH": "/home/x/bin", "LD_PRELOAD": "x.so"})
        done = self.writer.adopt()
        self.assertEqual(self.worker.argv[:5], ["ip", "netns", "exec", "x", sys.executable])
        self.assertIn("-P", self.worker.argv)
        self.assertEqual(self.worker.options["childFDs"], {0: "w", 1: "r", 2: "r", 3: "w", 4: "r"})
        self.assertEqual(self.worker.closed, [0])
        environment = self.worker.options["env"]
        self.assertEqual(environment["PATH"], "/usr/sbin:/usr/bin:/sbin:/bin")
        self.assertLessEqual(set(environment), {"PATH", "LC_ALL", "PYTHONPATH", "XTABLES_LIBDIR"})
        self.worker.answer(Reply())
        self.assertIsNone(self.successResultOf(done))
        self.closed()

    def test_environment(self) -> None:
        """Where libxtables looks for its lock and its extensions may be said as for iptables itself."""
        self.patch(os, "environ", {"XTABLES_LOCKFILE": "/tmp/lock", "XTABLES_LIBDIR": "/opt/xtables"})
        environment = workerEnvironment()
        self.assertEqual(
            (environment["XTABLES_LOCKFILE"], environment["XTABLES_LIBDIR"]), ("/tmp/lock", "/opt/xtables")
        )
        for path in environment["PYTHONPATH"].split(os.pathsep):
            self.assertTrue(os.path.isabs(path))

    def test_extensionFolder(self) -> None:
        """The first of the usual folders that has the extensions; none where none has."""
        self.patch(os.path, "exists", lambda path: path.startswith(("/usr/lib64/", "/usr/local/")))
        self.assertEqual(extensionFolder(), "/usr/lib64/xtables")
        self.patch(os.path, "exists", lambda path: False)
        self.assertIsNone(extensionFolder())

    def test_calls(self) -> None:
        """Each call reaches the worker as it was made, and one after the other."""
        locality = Locality(("10.0.0.0/8",))
        step = Delta({key("10.96.0.1", 1): None}, frozenset({Guard("IPv4", "TCP", 1)}), locality=locality)
        calls = [self.writer.probe(), self.writer.adopt(), self.writer.replace(SAMPLE), self.writer.apply(step)]
        calls.append(self.writer.cleanup())
        answers = [Reply(text="fine"), Reply(adopted=True, rules=list(SAMPLE.rules.items()))]
        answers += [Reply(), Reply(), Reply(changed=True)]
        for n, answer in enumerate(answers):
            self.assertEqual(len(self.worker.requests), n + 1)
            self.worker.answer(answer)
        self.assertEqual(len(self.reactor.workers), 1)
        results = [self.successResultOf(call) for call in calls]
        self.assertEqual(results, ["fine", Ruleset(SAMPLE.rules), None, None, True])
        ops = [request.op for request in self.worker.requests]
        self.assertEqual(ops, ["check", "adopt", "replace", "apply", "cleanup"])
        self.assertEqual(self.worker.requests[2].ruleset(), SAMPLE)
        self.assertEqual(self.worker.requests[3].delta(), step)
        self.closed()

    def test_errors(self) -> None:
        """What the worker refuses comes back as what the caller expects of that call."""
        expected = [
            (self.writer.probe, NotAvailable),
            (lambda: self.writer.replace(SAMPLE), RulesRejected),
            (lambda: self.writer.apply(Delta()), RulesRejected),
            (self.writer.adopt, RulesRejected),
        ]
        for call, error in expected:
            done = call()
            self.worker.answer(Reply(error="no such luck"))
            self.assertEqual(str(self.failureResultOf(done, error).value), "no such luck")
        self.closed()

    def test_leaving(self) -> None:
        """A worker that says it leaves is asked nothing more."""
        done = self.writer.replace(SAMPLE)
        self.worker.answer(Reply(error="libxtables: bad", leaving=True))
        self.failureResultOf(done, RulesRejected)
        again = self.writer.replace(SAMPLE)
        self.assertEqual([len(worker.requests) for worker in self.reactor.workers], [1, 1])
        self.worker.answer(Reply())
        self.successResultOf(again)
        self.closed()

    def test_died(self) -> None:
        """A call whose worker dies is made again by another one; where that dies too, the call has failed."""
        done = self.writer.replace(SAMPLE)
        self.worker.end(ProcessTerminated(signal=11))
        self.assertEqual([len(worker.requests) for worker in self.reactor.workers], [1, 1])
        self.worker.answer(Reply())
        self.successResultOf(done)
        done = self.writer.replace(SAMPLE)
        self.worker.end(ProcessTerminated(signal=11))
        self.worker.end(ProcessTerminated(signal=11))
        self.failureResultOf(done, RulesRejected)
        self.assertEqual(len(self.reactor.workers), 3)
        self.closed()

    def test_diedBetween(self) -> None:
        """A worker that ends between calls is replaced at the next one."""
        done = self.writer.adopt()
        self.worker.answer(Reply())
        self.successResultOf(done)
        self.worker.protocol.childConnectionLost(3)
        done = self.writer.adopt()
        self.assertEqual(len(self.reactor.workers), 2)
        self.worker.answer(Reply())
        self.successResultOf(done)
        self.closed()

    def test_hangs(self) -> None:
        """A worker that does not answer in time is ended, and not asked again."""
        done = self.writer.replace(SAMPLE)
        self.reactor.advance(CALL_SECONDS - 1)
        self.assertNoResult(done)
        self.reactor.advance(2)
        self.assertTrue(self.worker.over)
        self.assertIn("did not answer", str(self.failureResultOf(done, RulesRejected).value))
        self.assertEqual(len(self.reactor.workers), 1)
        self.closed()

    def test_largeMayTakeLonger(self) -> None:
        """The time limit grows with what is to be done."""
        done = self.writer.replace(Ruleset({key("10.96.0.1", n): same(to(1)) for n in range(1, 10001)}))
        self.reactor.advance(CALL_SECONDS + 40)
        self.assertNoResult(done)
        self.worker.answer(Reply())
        self.successResultOf(done)
        self.closed()

    def test_cancelled(self) -> None:
        """Who cancels a call ends the worker: its late answer must not be taken for another call's."""
        done = self.writer.adopt()
        done.cancel()
        self.assertTrue(self.worker.over)
        self.failureResultOf(done)
        again = self.writer.adopt()
        self.worker.answer(Reply())
        self.assertIsNone(self.successResultOf(again))
        self.closed()

    def test_nonsense(self) -> None:
        """A worker that says what cannot be read is ended."""
        for nonsense in (b"\xff\xff\xff\xff", b"\0\0\0\x02{]"):
            done = self.writer.adopt()
            self.worker.protocol.childDataReceived(4, nonsense)
            self.failureResultOf(done, RulesRejected)
            self.assertTrue(self.worker.over)
        self.closed()

    def test_printed(self) -> None:
        """What the library prints is logged, line by line, however it arrives."""
        events: list[LogEvent] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        done = self.writer.adopt()
        for data in (b"one\ntw", b"o\n\n", b"x" * 5000, b"last"):
            self.worker.protocol.childDataReceived(2, data)
        self.worker.answer(Reply())
        self.successResultOf(done)
        self.closed()
        texts = [event["text"] for event in events if "text" in event]
        self.assertEqual(texts, ["one", "two", "x" * 2000, "last"])

    def test_close(self) -> None:
        """Closing lets the worker end by itself, and ends it when it does not; nothing can be asked any more."""
        done = self.writer.adopt()
        self.worker.answer(Reply())
        self.successResultOf(done)
        closing = self.writer.close()
        self.assertNoResult(closing)
        self.reactor.advance(GOODBYE_SECONDS + 1)
        self.assertTrue(self.worker.over)
        self.successResultOf(closing)
        self.successResultOf(self.writer.close())
        self.failureResultOf(self.writer.replace(SAMPLE), RulesRejected)

    def test_closeDuringCall(self) -> None:
        """A call that is under way when the writer is closed comes to its end; one that waits fails."""
        first, second = self.writer.replace(SAMPLE), self.writer.adopt()
        closing = self.writer.close()
        self.worker.answer(Reply())
        self.successResultOf(first)
        self.failureResultOf(second, RulesRejected)
        self.worker.end()
        self.successResultOf(closing)


class WatchTests(SynchronousTestCase):
    """Looking for foreign changes."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.writer = IptablesWriter(self.reactor)
        self.called = 0
        done = self.writer.replace(SAMPLE)
        self.reactor.workers[0].answer(Reply())
        self.successResultOf(done)
        self.writer.watch(self.changed)
        self.addCleanup(lambda: self.assertEqual(self.reactor.getDelayedCalls(), []))
        self.addCleanup(self.end)

    def end(self) -> None:
        done = self.writer.close()
        for worker in self.reactor.workers:
            if not worker.over:
                worker.end()
        self.successResultOf(done)

    def changed(self) -> None:
        self.called += 1

    def looked(self, reply: Reply) -> Request:
        """One look, answered like this."""
        worker = self.reactor.workers[-1]
        self.reactor.advance(POLL_SECONDS)
        worker = self.reactor.workers[-1]
        request = worker.requests[-1]
        self.assertEqual(request.op, "peek")
        worker.answer(reply)
        return request

    def test_nothing(self) -> None:
        """While nothing happens nobody is called; every now and then everything is read back."""
        fulls = [self.looked(Reply(known=True)).full for _ in range(int(2 * READ_BACK_SECONDS) + 1)]
        self.assertEqual(self.called, 0)
        self.assertEqual(fulls.count(True), 2)

    def test_changed(self) -> None:
        """A foreign change is told once, and the watch goes on."""
        self.looked(Reply(changed=True))
        self.assertEqual(self.called, 1)
        self.looked(Reply())
        self.assertEqual(self.called, 1)
        self.looked(Reply(known=True, changed=True))
        self.assertEqual(self.called, 2)

    def test_lostTrack(self) -> None:
        """A worker that has nothing to compare with is a reason to read again, once."""
        self.reactor.workers[-1].end()
        self.looked(Reply())
        self.looked(Reply())
        self.assertEqual(self.called, 1)

    def test_busy(self) -> None:
        """While a call is under way nobody looks."""
        done = self.writer.replace(SAMPLE)
        self.reactor.advance(POLL_SECONDS)
        self.assertEqual(self.reactor.workers[-1].requests[-1].op, "replace")
        self.reactor.workers[-1].answer(Reply())
        self.successResultOf(done)
        self.looked(Reply(known=True))

    def test_ended(self) -> None:
        """After the end of the watch nobody is called, not even by a look that was under way."""
        self.reactor.advance(POLL_SECONDS)
        self.writer.watch(None)
        self.reactor.workers[-1].answer(Reply(changed=True))
        self.assertEqual(self.called, 0)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_failing(self) -> None:
        """A look that fails is not the end of looking; nor is a callback that does."""
        self.looked(Reply(error="no"))
        self.looked(Reply(changed=True))
        self.assertEqual(self.called, 1)

        def broken() -> None:
            raise ZeroDivisionError

        self.writer.watch(broken)
        self.looked(Reply(changed=True))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.looked(Reply(known=True))

    def test_slowReadBack(self) -> None:
        """What takes long is done seldom."""
        for _ in range(int(READ_BACK_SECONDS) - 1):
            self.looked(Reply(known=True))
        self.assertTrue(self.looked(Reply(known=True, seconds=10.0)).full)
        fulls = [self.looked(Reply(known=True)).full for _ in range(400)]
        self.assertEqual(fulls.count(True), 0)


class WorkerTests(SynchronousTestCase):
    """The loop in the worker process."""

    def served(self, *requests: bytes, serve: Any) -> list[Reply]:
        """Run the loop over these, without the signals of a process of its own."""
        self.patch(iptworker, "opened", lambda: serve)
        self.patch(iptworker.signal, "signal", lambda number, what: None)
        inside, outside = os.pipe(), os.pipe()
        os.write(inside[1], b"".join(requests))
        os.close(inside[1])
        iptworker.main(inside[0], outside[1])
        os.close(inside[0])
        os.close(outside[1])
        with os.fdopen(outside[0], "rb") as file:
            return [decodeReply(message) for message in FrameBuffer().feed(file.read())]

    def test_loop(self) -> None:
        """One reply per request, in order, with the time that it took; then the end."""
        calls: list[str] = []

        def serve(request: Request) -> Reply:
            calls.append(request.op)
            return Reply(text=request.op)

        replies = self.served(framed(Request("check")), framed(Request("adopt")), serve=serve)
        self.assertEqual([reply.text for reply in replies], calls)
        self.assertEqual(calls, ["check", "adopt"])
        self.assertGreater(replies[0].seconds, 0)

    def test_unforeseen(self) -> None:
        """An error that nobody foresaw is told, and the worker leaves: what follows is for the next one."""

        def serve(request: Request) -> Reply:
            raise RecursionError("too deep")

        self.patch(iptworker.traceback, "print_exc", lambda: None)
        replies = self.served(framed(Request("apply")), framed(Request("apply")), serve=serve)
        self.assertEqual(len(replies), 1)
        self.assertIn("too deep", replies[0].error)
        self.assertTrue(replies[0].leaving)

    def test_unreadable(self) -> None:
        """A call that cannot be read is refused; the worker goes on."""
        bad = msgspec.json.encode({"op": "replace", "guards": [{"family": "IPX", "protocol": "TCP", "port": 1}]})
        replies = self.served(
            len(bad).to_bytes(4, "big") + bad, framed(Request("check")), serve=lambda request: Reply(text="here")
        )
        self.assertIn("IPX", replies[0].error)
        self.assertEqual(replies[1].text, "here")

    def test_noLibrary(self) -> None:
        """Where the library cannot be imported each call says what to install."""
        mine = [name for name in sys.modules if name.startswith("twisted_kproxy.netfilter.xt")]
        with patch.dict(sys.modules, {"iptc": None}):
            for name in mine:
                del sys.modules[name]
            reply = iptworker.opened()(Request("check"))
        self.assertTrue(reply.unavailable and reply.leaving)
        self.assertIn("pip install python-iptables", reply.error)
        self.assertIn("apt install iptables", reply.error)


class WireTests(SynchronousTestCase):
    """Messages between the two."""

    def test_pieces(self) -> None:
        """Messages come out whole however their bytes arrive."""
        messages = [Request("adopt"), Request("replace", rules=list(SAMPLE.rules.items())), Request("peek", full=True)]
        data = b"".join(framed(message) for message in messages)
        for size in (1, 3, 1000, len(data)):
            frames = FrameBuffer()
            found = [
                decodeRequest(it) for at in range(0, len(data), size) for it in frames.feed(data[at : at + size])
            ]  # fmt: skip
            self.assertEqual(found, messages)

    def test_limit(self) -> None:
        """An absurd length is an error, not a wait for it."""
        self.assertRaises(ValueError, list, FrameBuffer().feed((LIMIT + 1).to_bytes(4, "big")))

    def test_rulesets(self) -> None:
        """Rulesets and steps come through as they are."""
        everything = structs.replace(
            SAMPLE,
            rules={**SAMPLE.rules, key("203.0.113.9", 1): Rule("drop", "reject", ("198.51.100.0/24",))},
            clusterIPs=frozenset({"10.96.0.10", "fd00:10:96::10"}),
            locality=Locality(("10.0.0.0/8",), ("cali*",), ("192.0.2.0/24",), ("10.96.0.0/12",)),
        )
        for ruleset in (SAMPLE, everything, Ruleset()):
            self.assertEqual(decodeRequest(framed(Request.replacing(ruleset))[4:]).ruleset(), ruleset)
            self.assertEqual(decodeReply(framed(Reply.adopting(ruleset))[4:]).ruleset(), ruleset)
            for step in (deltaBetween(ruleset, SAMPLE), deltaBetween(SAMPLE, ruleset)):
                self.assertEqual(decodeRequest(framed(Request.applying(step))[4:]).delta(), step)
        self.assertEqual(decodeRequest(framed(Request("apply"))[4:]).delta(), Delta())
        self.assertIsNone(decodeReply(framed(Reply())[4:]).ruleset())
