"""
The rule writer for the legacy tables (ip_tables, ip6_tables), by python-iptables.

The library lives in a process of its own (:mod:`~twisted_kproxy.netfilter.iptworker`); here is the side that the
daemon has of it. ``iptables-legacy-save`` shows the rules; where ``iptables`` is the variant for nf_tables (Debian 10,
RHEL 8 and later), ``iptables -S`` shows nothing of them.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from glob import glob
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, DeferredLock, fail
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..core.rules import Delta, Ruleset
from ..interfaces import IRuleWriter, KproxyError, NotAvailable, RulesNotJudged, RulesRejected
from .xtwire import REPLIES, REQUESTS, FrameBuffer, Reply, Request, decodeReply, framed

#: A call may take so long, and so much longer for each frontend in it; the lock of xtables gets most of that.
CALL_SECONDS = 30.0
SECONDS_PER_RULE = 0.005
LOCK_SECONDS = 20.0
#: How often the tables' sizes are looked at, and all our rules read back.
POLL_SECONDS = 1.0
READ_BACK_SECONDS = 30.0
#: A call whose worker died is made again by another one; each call is about what shall be, so twice is harmless.
ATTEMPTS = 2
#: How long a worker may take to end by itself.
GOODBYE_SECONDS = 5.0

_LINE_LIMIT = 2000


class WorkerGone(KproxyError):
    """The worker ended before it answered."""


class WorkerEnded(WorkerGone):
    """The worker had to be ended: it took too long, or spoke in tongues."""


def _gone(error: WorkerGone) -> Failure:
    return Failure(error)  # type: ignore[no-untyped-call]


def extensionFolder() -> str | None:
    """
    Where libxtables' extensions are; python-iptables cannot always find out. ``None`` where they are not in any of
    the usual folders.
    """
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders = [f"/usr/lib/{multiarch}/xtables", f"/lib/{multiarch}/xtables"] if multiarch else []
    folders += ["/usr/lib64/xtables", "/lib64/xtables", "/usr/lib/xtables", "/lib/xtables"]
    folders += ["/usr/local/lib64/xtables", "/usr/local/lib/xtables", "/usr/libexec/xtables"]
    folders += sorted(glob("/usr/lib/*/xtables"))
    for folder in folders:
        if os.path.exists(os.path.join(folder, "libxt_comment.so")):
            return folder
    return None


def workerEnvironment() -> dict[str, str]:
    """
    All that the worker gets of an environment. The library runs what it finds on the path (ldconfig, and a compiler
    where there is one), so the path is fixed.
    """
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    # The code comes from where the daemon's own comes from.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if os.path.isabs(path))
    folder = os.environ.get("XTABLES_LIBDIR") or extensionFolder()
    if folder:
        environment["XTABLES_LIBDIR"] = folder
    if "XTABLES_LOCKFILE" in os.environ:
        environment["XTABLES_LOCKFILE"] = os.environ["XTABLES_LOCKFILE"]
    return environment


class _Worker(ProcessProtocol):
    """
    One run of the worker process.

    :ivar usable: it takes calls.
    """

    log = Logger()

    def __init__(self) -> None:
        self.usable = True
        self.ended: Deferred[None] = Deferred()
        self._over = False
        self._pending: Deferred[Reply] | None = None
        self._frames = FrameBuffer()
        self._lines = b""

    def call(self, request: Request) -> Deferred[Reply]:
        """One at a time. Fails with :class:`WorkerGone`; to cancel it is to end the worker."""
        self._pending = Deferred(lambda _: self.kill("the call was cancelled"))
        self.transport.writeToChild(REQUESTS, framed(request))  # type: ignore[union-attr]
        return self._pending

    def leave(self) -> None:
        """No more calls: it ends by itself when it is done with the one that it has."""
        self.usable = False
        if not self._over:
            self.transport.closeChildFD(REQUESTS)  # type: ignore[union-attr]

    def kill(self, why: str) -> None:
        self.usable = False
        pending, self._pending = self._pending, None
        try:
            self.transport.signalProcess("KILL")  # type: ignore[union-attr]
        except ProcessExitedAlready:
            pass
        if pending is not None:
            pending.callback(_gone(WorkerEnded(why)))

    # From the process.

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if childFD != REPLIES:
            self._printed(data)
            return
        try:
            for message in self._frames.feed(data):
                reply = decodeReply(message)
                if reply.leaving:
                    self.usable = False
                self._answer(reply)
        except ValueError as error:  # of which msgspec's are
            self.kill(f"the rule worker said what cannot be read ({error}) and was ended")

    def childConnectionLost(self, childFD: int) -> None:
        if childFD in (REQUESTS, REPLIES):
            self.usable = False

    def _printed(self, data: bytes) -> None:
        """What the library or libxtables prints. It only ever has something to say when something is wrong."""
        *lines, self._lines = (self._lines + data).split(b"\n")
        if len(self._lines) > _LINE_LIMIT:
            lines.append(self._lines)
            self._lines = b""
        for line in lines:
            if line.strip():
                text = line[:_LINE_LIMIT].decode("utf-8", "replace")
                self.log.info("The rule worker prints: {text}", text=text)

    def processEnded(self, reason: Failure) -> None:
        self._over, self.usable = True, False
        if self._lines:
            self._printed(b"\n")
        why = f"the rule worker ended before it answered: {reason.getErrorMessage()}"
        self._answer(_gone(WorkerGone(why)))
        self.ended.callback(None)

    def _answer(self, result: Reply | Failure) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.callback(result)


@implementer(IRuleWriter)
class IptablesWriter:
    """
    Writes by python-iptables, both families, one transaction per table.

    A frontend costs two rules of nat that every new connection of the node may have to pass: above a thousand or so
    service ports, choose ``writer = nftables``.

    :param spawnPrefix: a command to start the worker with, such as ``("ip", "netns", "exec", NAME)``.
    """

    name = "python-iptables"
    place = "legacy iptables"
    log = Logger()

    def __init__(self, reactor: Any, spawnPrefix: Sequence[str] = ()) -> None:
        self._reactor = reactor
        self._prefix = tuple(spawnPrefix)
        self._worker: _Worker | None = None
        self._workers: set[_Worker] = set()  # all that have not ended
        self._oneAtATime = DeferredLock()
        self._watcher: Callable[[], None] | None = None
        self._poll: Any = None
        self._readBackAt = 0.0
        self._mayBeOurs = False  # since when rules may be in force that a new worker knows nothing of
        self._closed = False
        self.lastSeconds = 0.0  #: what the last writing call took, in the worker

    # --- IRuleWriter ---

    def probe(self) -> Deferred[str]:
        return self._call(Request("check"), NotAvailable).addCallback(lambda reply: reply.text)

    def adopt(self) -> Deferred[Ruleset | None]:
        def found(reply: Reply) -> Ruleset | None:
            ruleset = reply.ruleset()
            self._mayBeOurs = ruleset is not None
            return ruleset

        return self._call(Request("adopt"), RulesRejected).addCallback(found)

    def apply(self, delta: Delta) -> Deferred[None]:
        return self._call(Request.applying(delta, LOCK_SECONDS), RulesRejected).addCallback(self._wrote)

    def replace(self, ruleset: Ruleset) -> Deferred[None]:
        return self._call(Request.replacing(ruleset, LOCK_SECONDS), RulesRejected).addCallback(self._wrote)

    def watch(self, changed: Callable[[], None] | None) -> None:
        """
        The legacy tables tell nobody of a change: their sizes are looked at once a second, and every half a minute
        all our rules are read back, since a change may keep the sizes.
        """
        self._watcher = changed
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if changed is not None and not self._closed:
            self._readBackAt = self._reactor.seconds() + READ_BACK_SECONDS
            self._poll = self._reactor.callLater(POLL_SECONDS, self._look)

    def cleanup(self) -> Deferred[bool]:
        def cleaned(reply: Reply) -> bool:
            self._mayBeOurs = False
            self._noted(reply)
            return reply.changed

        return self._call(Request("cleanup", lockSeconds=LOCK_SECONDS), RulesRejected).addCallback(cleaned)

    def close(self) -> Deferred[None]:
        """Fires when the worker has ended."""
        self.watch(None)
        self._closed = True
        self._worker = None
        return DeferredList([self._farewell(worker) for worker in self._workers]).addCallback(lambda _: None)

    # --- the worker ---

    def _wrote(self, reply: Reply) -> None:
        self._mayBeOurs = True
        self.lastSeconds = reply.seconds
        self._noted(reply)
        self.log.debug(
            "Rules written in {seconds:.3f} s, of which {waited:.3f} s waiting for the lock and {held:.3f} s under it",
            seconds=reply.seconds,
            waited=reply.waited,
            held=reply.held,
        )

    def _noted(self, reply: Reply) -> None:
        for note in reply.notes:
            self.log.warn("{note}", note=note)

    def _call(self, request: Request, otherwise: type[KproxyError]) -> Deferred[Reply]:
        """
        :param otherwise: what it fails with; where the reason is this machine, with :class:`NotAvailable` for a probe.
        """
        if self._closed:
            return fail(otherwise("the rule writer has been closed"))
        return self._oneAtATime.run(self._ask, request, otherwise)

    def _ask(self, request: Request, otherwise: type[KproxyError], attempt: int = 1) -> Deferred[Reply]:
        if self._closed:
            return fail(otherwise("the rule writer has been closed"))
        unheard = RulesNotJudged if otherwise is RulesRejected else otherwise
        try:
            worker = self._usableWorker()
        except OSError as error:
            return fail(unheard(f"the rule worker cannot be started: {error}"))
        seconds = CALL_SECONDS + SECONDS_PER_RULE * len(request.rules)
        timer = self._reactor.callLater(
            seconds, worker.kill, f"the rule worker did not answer within {seconds:.0f} s and was ended"
        )

        def answered(reply: Reply) -> Reply:
            if reply.error and otherwise is RulesRejected:
                if reply.unjudged or reply.unavailable:
                    raise RulesNotJudged(reply.error)
                raise RulesRejected(reply.error, reply.refused)
            if reply.error:
                raise otherwise(reply.error)
            return reply

        def gone(failure: Failure) -> Deferred[Reply]:
            if attempt < ATTEMPTS and not isinstance(failure.value, WorkerEnded) and not self._closed:
                self.log.warn("{reason}; another one is asked", reason=failure.getErrorMessage())
                return self._ask(request, otherwise, attempt + 1)
            hint = "; whether the rules were changed will show when they are read" if request.rules else ""
            raise unheard(f"{failure.value}{hint}")

        def done(result: Any) -> Any:
            if timer.active():
                timer.cancel()
            return result

        called = worker.call(request)
        called.addBoth(done)
        called.addCallbacks(answered, gone)
        return called

    def _farewell(self, worker: _Worker) -> Deferred[None]:
        worker.leave()
        impatience = self._reactor.callLater(
            GOODBYE_SECONDS, worker.kill, f"the rule worker did not end within {GOODBYE_SECONDS:.0f} s"
        )
        waiting: Deferred[None] = Deferred()

        def ended(_: None) -> None:
            if impatience.active():
                impatience.cancel()
            waiting.callback(None)

        worker.ended.addCallback(ended)
        return waiting

    def _usableWorker(self) -> _Worker:
        if self._worker is None or not self._worker.usable:
            worker = _Worker()
            # -P: no module from the current folder, which is whatever the daemon was started in.
            argv = [*self._prefix, sys.executable, "-P", "-m", "twisted_kproxy.netfilter.iptworker"]
            self._reactor.spawnProcess(
                worker,
                argv[0],
                argv,
                env=workerEnvironment(),
                path="/",
                childFDs={0: "w", 1: "r", 2: "r", REQUESTS: "w", REPLIES: "r"},
            )
            worker.transport.closeChildFD(0)  # type: ignore[union-attr]
            self._worker = worker
            self._workers.add(worker)
            worker.ended.addCallback(lambda _: self._workers.discard(worker))
        return self._worker

    # --- watching ---

    def _look(self) -> None:
        self._poll = None
        if self._oneAtATime.locked:  # a call is under way; it will find out itself
            self._lookAgain()
            return
        now = self._reactor.seconds()
        full = now >= self._readBackAt
        begin = self._watcher
        call = self._call(Request("peek", full=full), RulesRejected)

        def looked(reply: Reply) -> None:
            if full:
                # Reading back costs with the size of the tables: never more than a few hundredths of a core.
                self._readBackAt = self._reactor.seconds() + max(READ_BACK_SECONDS, 50 * reply.seconds)
            lost = not reply.known and self._mayBeOurs and not reply.changed
            if (reply.changed or lost) and self._watcher is not None and self._watcher is begin:
                # A worker that was started anew cannot tell what happened meanwhile; let them be read again.
                self._mayBeOurs = False
                self._watcher()

        def failed(failure: Failure) -> None:
            if not self._closed:
                self.log.warn("The rules cannot be looked at: {reason}", reason=failure.getErrorMessage())

        def again(_: object) -> None:
            if self._watcher is begin:
                self._lookAgain()

        call.addCallbacks(looked, failed)
        call.addErrback(lambda failure: self.log.failure("Telling of a foreign change failed", failure))
        call.addCallback(again)

    def _lookAgain(self) -> None:
        if self._watcher is not None and self._poll is None and not self._closed:
            self._poll = self._reactor.callLater(POLL_SECONDS, self._look)
