"""A folder (or one file) of manifests as a source: what lies there is what exists."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..core.values import Replaced, Word
from ..core.wording import counted
from ..interfaces import IChannel, ISource
from .scan import KINDS, Identity, Said, Scan, faultsOf, firstWords, isManifest, look, nextWords, shown
from .watch import FolderWatch

__all__ = ["FilesSource", "faultsOf"]

#: How long a burst of changes is gathered, in seconds.
BURST = 0.1
#: So often the very first look is put off because a file is being written.
PATIENCE = 10
#: How many objects are said in one turn of the reactor.
SLICE = 500


class Options(Protocol):
    """Where to look, and how many seconds after the last look at the latest."""

    @property
    def path(self) -> str: ...

    @property
    def pollSeconds(self) -> float: ...


RunInThread = Callable[..., "Deferred[Any]"]


@implementer(ISource)
class FilesSource(Service):
    """
    Says what the manifests in a folder say: ``*.yaml``, ``*.yml`` and ``*.json``, without subfolders, hidden files
    and what editors leave. Changes are noticed at once where the kernel tells (inotify), else at the next poll; they
    are best made by renaming a finished file into place.

    A file that cannot be read keeps its last good content, and an object that cannot be read its last good version.
    Of an object in two files, the one in the first file by name counts. A file that goes takes its objects with it;
    a whole folder that goes says nothing, as any loss of contact. An empty folder says that there is nothing; a path
    that is missing, or cannot be read, at the start says nothing before it can.

    :param options: of the configuration: ``path``, ``pollSeconds``.
    :param runInThread: ``(function, *args) → Deferred``; instead of the reactor's thread pool.
    """

    log = Logger()
    kinds: tuple[str, ...] = KINDS

    def __init__(
        self,
        reactor: Any,
        name: str,
        options: Options,
        channel: IChannel,
        runInThread: RunInThread | None = None,
        **facts: object,
    ) -> None:
        self.name = name
        self._reactor = reactor
        self._path = options.path
        self._pollSeconds = options.pollSeconds
        self._channel = channel
        self._runInThread = runInThread or self._inPool
        self._watch = FolderWatch(reactor, self._noticed)
        self._timer: IDelayedCall | None = None
        self._busy: Deferred[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._scan: Scan | None = None
        self._said: dict[Identity, Said] | None = None
        self._words: list[Word] = []
        self._dirty: set[str] = set()
        self._again = False
        self._tries = 0
        self._agreed: float | None = None
        self._trouble = ""
        self._missing = False

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self._reset()
        if self._busy is None:
            self._look()
        else:
            self._again = True

    def stopService(self) -> Deferred[None]:
        """Nothing is said from now on. Fires when no thread is at work any more."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._words = []
        self._watch.close()
        self._cancelTimer()
        done: Deferred[None] = Deferred()
        if self._busy is None:
            done.callback(None)
        else:
            self._busy.addCallback(done.callback)
        return done

    def ages(self) -> Mapping[str, float | None]:
        age = None if self._agreed is None else self._reactor.seconds() - self._agreed
        return dict.fromkeys(self.kinds, age)

    def faults(self) -> Mapping[str, str]:
        trouble = {shown(self._path): self._trouble.removeprefix(self._path).lstrip(": ")} if self._trouble else {}
        return {**trouble, **self._broken(), **(self._scan.faults if self._scan else {})}

    def _broken(self) -> dict[str, str]:
        """Files that cannot be read, by name: on which line, and why."""
        files = self._scan.files if self._scan else {}
        return {
            shown(name): f"line {state.line}: {state.fault}" if state.line else state.fault
            for name, state in sorted(files.items())
            if state.fault
        }

    def status(self) -> Mapping[str, Any]:
        scan = self._scan
        files = scan.files if scan else {}
        broken = self._broken()
        rejected = sum(1 for said in (self._said or {}).values() if said.reason)
        if self._missing:
            state = "missing"
        elif self._said is None:
            state = "trouble" if self._trouble else "reading" if self.running else "stopped"
        else:
            state = "trouble" if self._trouble or broken else "in agreement"
        return {
            "type": "files",
            "path": self._path,
            "state": state,
            "watching": self._watch.active,
            "files": len(files),
            "objects": len(self._said or {}),
            "rejected": rejected,
            "broken": broken,
            "error": self._trouble,
        }

    # --- when to look ---

    def _inPool(self, function: Callable[..., Any], *args: Any) -> Deferred[Any]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), function, *args)

    def _noticed(self, name: str) -> None:
        """The kernel tells of a change; ``..data`` is where a mounted ConfigMap is exchanged."""
        if name == os.path.basename(self._path) or isManifest(name or "."):
            self._dirty.add(name)
        elif name and not name.startswith(".."):
            return
        self._soon()

    def _soon(self, seconds: float = BURST) -> None:
        """Look so long from now, or earlier where that is due already."""
        if not self.running:
            return
        if self._busy is not None or self._words:
            self._again = True
            return
        if self._timer is not None and self._timer.active():
            if self._timer.getTime() <= self._reactor.seconds() + seconds:
                return
            self._timer.cancel()
        self._timer = cast(IDelayedCall, self._reactor.callLater(seconds, self._look))

    def _cancelTimer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def _look(self) -> None:
        self._cancelTimer()
        # Watched before it is read: what changes in between is noticed.
        isFolder = os.path.isdir(self._path)
        self._watch.watch(self._path if isFolder else os.path.dirname(self._path))
        dirty, self._dirty = frozenset(self._dirty), set()
        self._again = False
        self._busy = Deferred()
        before = self._scan
        self._runInThread(_work, self.name, self._path, before, dirty, self._said).addCallbacks(
            self._looked, self._failed, callbackArgs=(before,)
        ).addErrback(self._lost).addBoth(self._idle)

    # --- what was seen ---

    def _looked(self, result: tuple[Scan, list[Word], dict[Identity, Said]], before: Scan | None) -> None:
        if not self.running or before is not self._scan:
            self._again = True  # stopped, or stopped and started anew, while the thread was at work
            return
        scan, words, said = result
        for isWarning, note in scan.notes:
            if isWarning:
                self.log.warn("Source {source}: {note}", source=self.name, note=note)
            else:
                self.log.info("Source {source}: {note}", source=self.name, note=note)
        self._tell(scan)
        if scan.unsettled:
            self._again = True
            if self._said is None and self._tries < PATIENCE:
                self._tries += 1
                return
        if self._trouble and self._said is None:
            return  # nothing is known yet, not even that there is nothing: a volume may not be mounted yet
        self._scan, self._said, self._words = scan, said, words
        self._say()

    def _tell(self, scan: Scan) -> None:
        """Log when the path itself goes or comes back."""
        trouble = scan.error
        self._missing = scan.missing
        if scan.missing:
            count = len(scan.wanted)
            stay = "stays" if count == 1 else "stay"
            kept = f"; its {counted(count, 'object')} {stay} in force" if count else ""
            trouble = f"{self._path} does not exist{kept}"
        if trouble and self._said is None:
            trouble += "; until it has been read, rules stay as they are"
        if trouble and trouble != self._trouble:
            self.log.error("Source {source}: {trouble}", source=self.name, trouble=trouble)
        elif self._trouble and not trouble:
            self.log.info("Source {source}: {path} can be read now", source=self.name, path=self._path)
        self._trouble = trouble

    def _say(self) -> None:
        """Say the words, a slice in each turn of the reactor."""
        weight = 0
        while self._words and weight < SLICE:
            word = self._words.pop()
            weight += len(word.objects) if isinstance(word, Replaced) else 1
            self._channel.say(word)
        if self._words:
            self._timer = cast(IDelayedCall, self._reactor.callLater(0, self._say))
            return
        if not self._trouble:
            self._agreed = self._reactor.seconds()
        if self._busy is None:
            self._rest()

    def _failed(self, failure: Failure) -> None:
        if self.running:
            self._trouble = f"cannot look at {self._path}: {failure.getErrorMessage()}"
            self.log.failure("Source {source}: cannot look at {path}", failure, source=self.name, path=self._path)

    def _lost(self, failure: Failure) -> None:
        self.log.failure("Source {source}: a look was lost", failure, source=self.name)

    def _idle(self, _: object) -> None:
        busy, self._busy = self._busy, None
        if self.running and not self._words:
            self._rest()
        if busy is not None:
            busy.callback(None)

    def _rest(self) -> None:
        """Until the next look."""
        again, self._again = self._again, False
        self._soon(BURST if again or self._dirty else self._pollSeconds)


def _work(
    source: str, path: str, before: Scan | None, dirty: frozenset[str], said: Mapping[Identity, Said] | None
) -> tuple[Scan, list[Word], dict[Identity, Said]]:
    """Look, and find the words for it, last word first; in a thread."""
    scan = look(path, before, dirty)
    words, now = firstWords(source, scan.wanted) if said is None else nextWords(source, scan.wanted, said)
    words.reverse()
    return scan, words, now
