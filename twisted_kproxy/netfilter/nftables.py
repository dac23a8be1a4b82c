"""
The rule writer for nf_tables. The table's structure goes into the kernel by ``nft -f -``; elements by netlink messages
of our own, which cost a hundredth of a run of ``nft``, or by ``nft`` too where those do not work on this kernel.
"""

from __future__ import annotations

import errno
import json
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import implementer

from .. import __version__
from ..core.rules import Delta, Rule, Ruleset, applied
from ..core.values import FrontendKey
from ..interfaces import IRuleWriter, NotAvailable, RulesNotJudged, RulesRejected
from .netlink import Interrupted, Refused, SocketOpener
from .nftlayout import (
    Step,
    Unreadable,
    readListing,
    stepFor,
    stepText,
    structureProblem,
    structureText,
    wholeStep,
)
from .nftsocket import ElementSocket
from .nftwatch import TableWatch
from .threads import Threads
from .tool import Finished, Tool, TooSlow, find

_T = TypeVar("_T")
_OLDEST = (1, 0, 1)
#: The kernel's answers to a step that does not fit what is in force: somebody else has been there.
_MISFITS = frozenset({errno.EEXIST, errno.ENOENT, 85, errno.EBUSY})  # 85: ERESTART


class _Known:
    """What is in force, as far as we know."""

    def __init__(self, ruleset: Ruleset) -> None:
        self.rules: dict[FrontendKey, Rule] = dict(ruleset.rules)
        self.guards = ruleset.guards
        self.insiders = ruleset.insiders

    def advance(self, delta: Delta) -> None:
        for key, rule in delta.rules.items():
            if rule is None:
                self.rules.pop(key, None)
            else:
                self.rules[key] = rule
        self.guards = (self.guards - delta.guardsRemoved) | delta.guardsAdded
        if delta.insiders is not None:
            self.insiders = delta.insiders

    def ruleset(self) -> Ruleset:
        return Ruleset(dict(self.rules), self.guards, self.insiders)


@implementer(IRuleWriter)
class NftablesWriter:
    """
    Keeps our rules in an ``inet`` table of its own.

    :param table: its name.
    :param spawnPrefix: arguments before each run of ``nft``, such as ``ip netns exec NAME``; with ``openSocket``, to
        write into another network namespace than this process's: for tests, and to serve a node's namespace from
        beside it.
    :param openSocket: opens the netlink sockets.
    :param limit: seconds that a run of ``nft`` is given.
    :param useNetlink: whether batches of our own are tried at all.
    :ivar usesNetlink: whether elements go by batches of our own.
    :ivar INLINE: steps of up to so many elements are sent in the reactor's thread; bigger ones, and dumps, in one of
        its pool.
    """

    log = Logger()
    name = "nftables"
    INLINE = 128

    def __init__(
        self,
        reactor: Any,
        table: str = "kproxy",
        *,
        spawnPrefix: Sequence[str] = (),
        openSocket: SocketOpener = socket.socket,
        limit: float = 30.0,
        useNetlink: bool = True,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,59}", table):
            raise ValueError(f"{table!r} is no name for a table")
        self._reactor = reactor
        self._table = table
        self.place = f"nf_tables, table inet {table}"
        self._prefix = tuple(spawnPrefix)
        self._opener = openSocket
        self._limit = limit
        self.usesNetlink = useNetlink
        self._tool: Tool | None = None
        self._elements = ElementSocket(openSocket, table, self._own)
        self._known: _Known | None = None
        self._suspect = False  # somebody else has changed more than elements
        self._watch: TableWatch | None = None
        self._threads = Threads(reactor)

    # --- IRuleWriter ---

    def probe(self) -> Deferred[str]:
        return Deferred.fromCoroutine(self._probe())

    def adopt(self) -> Deferred[Ruleset | None]:
        return Deferred.fromCoroutine(self._adopt())

    def apply(self, delta: Delta) -> Deferred[None]:
        return Deferred.fromCoroutine(self._apply(delta))

    def replace(self, ruleset: Ruleset) -> Deferred[None]:
        return Deferred.fromCoroutine(self._replace(ruleset))

    def watch(self, changed: Callable[[], None] | None) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if changed is None:
            return

        def seen(structure: bool) -> None:
            self._suspect = self._suspect or structure
            changed()

        try:
            self._watch = TableWatch(self._reactor, self._opener, self._table, seen)
        except OSError as error:
            self.log.warn("Changes by others to our rules cannot be watched: {error}.", error=error)
            return
        self._own(self._elements.port)

    def cleanup(self) -> Deferred[bool]:
        return Deferred.fromCoroutine(self._cleanup())

    async def _cleanup(self) -> bool:
        done = await self._nft("delete", "table", "inet", self._table)
        self._known = None
        if done.code == 0:
            return True
        if "No such file or directory" in done.err:
            return False
        raise RulesRejected(f"the table {self._table} could not be removed: {_words(done)}")

    def close(self) -> Deferred[None]:
        """Ends an ``nft`` that runs; waits for a thread that talks to the kernel."""
        self.watch(None)
        if self._tool is not None:
            self._tool.kill()
        return self._threads.idle().addCallback(lambda _: self._elements.close())

    # --- probe ---

    async def _probe(self) -> str:
        try:
            version = await self._nft("--version")
        except RulesRejected as error:
            raise NotAvailable(f"nft does not run: {error}") from error
        found = re.search(r"v(\d+)\.(\d+)\.(\d+)", version.out.decode(errors="replace"))
        if found is None:
            raise NotAvailable(f"nft does not tell its version: {_words(version)}")
        numbers = tuple(int(it) for it in found.groups())
        if numbers < _OLDEST:
            raise NotAvailable(f"nft {found[0]} is too old: install nftables 1.0.1 or newer")
        # --check hands the whole structure to the kernel and takes it back in the same transaction.
        structure = structureText(f"{self._table}-probe", __version__)
        try:
            done = await self._nft("--check", "--file", "-", stdin=structure)
        except RulesRejected as error:
            raise NotAvailable(f"nft does not run: {error}") from error
        if done.code != 0:
            if "Operation not permitted" in done.err or "Permission denied" in done.err:
                raise NotAvailable("nf_tables refuses this process: run it as root or with CAP_NET_ADMIN")
            raise NotAvailable(f"this kernel's nf_tables does not take our rules: {_words(done)}")
        how = "elements by netlink" if self.usesNetlink else "elements by nft"
        if self.usesNetlink:
            try:
                self._elements.open()
            except OSError as error:
                how = f"elements by nft, since netlink failed: {error}"
                self._distrust(str(error))
        return f"nft {found[0]}, {how}"

    # --- reading ---

    async def _adopt(self) -> Ruleset | None:
        self._known = None
        problem = await self._structureProblem()
        if problem:
            if problem != "absent":
                self.log.info("The table {table} will be made anew: {problem}.", table=self._table, problem=problem)
            return None
        try:
            found = await self._read()
        except Unreadable as error:
            self.log.warn("The table {table} will be made anew: {error}.", table=self._table, error=error)
            return None
        self._known = _Known(found)
        return found

    async def _structureProblem(self) -> str:
        """What is wrong with the table: ``""`` for nothing."""
        done = await self._nft("--json", "--terse", "list", "table", "inet", self._table)
        if done.code != 0:
            if "No such file or directory" in done.err:
                return "absent"
            raise RulesNotJudged(f"the table {self._table} cannot be listed: {_words(done)}")
        problem = structureProblem(_parsed(done.out))
        if not problem and self._suspect:
            return "somebody else has changed its chains, rules or sets"
        return problem

    async def _read(self) -> Ruleset:
        if self.usesNetlink:
            try:
                return await self._inThread(self._elements.read)
            except Unreadable as error:
                self._distrust(str(error))
            except (OSError, Interrupted) as error:
                self._elements.close()
                self.log.warn("The elements could not be read by netlink: {error!r}.", error=error)
        done = await self._nft("--json", "list", "table", "inet", self._table)
        if done.code != 0:
            raise RulesNotJudged(f"the table {self._table} cannot be listed: {_words(done)}")
        return await self._inThread(lambda: readListing(_parsed(done.out)))

    # --- writing ---

    async def _apply(self, delta: Delta) -> None:
        known = self._known
        if known is None:
            if await self._adopt() is None or self._known is None:
                raise RulesRejected("nothing of ours is in force that a step could be applied to")
            known = self._known
        if len(delta.rules) > self.INLINE:
            step = await self._inThread(stepFor, known.rules, known.guards, delta)
        else:
            step = stepFor(known.rules, known.guards, delta)
        if not step and step.insiders is None:
            known.advance(delta)
            return
        try:
            await self._send(step)
        except _Misfit as misfit:
            self.log.warn("The rules in force are not those that we wrote ({why}): writing all.", why=misfit)
            await self._replace(applied(known.ruleset(), delta))
            return
        known.advance(delta)

    async def _replace(self, ruleset: Ruleset) -> None:
        problem = await self._structureProblem()
        step = await self._inThread(wholeStep, ruleset) if len(ruleset.rules) > self.INLINE else wholeStep(ruleset)
        if not problem and self.usesNetlink:
            try:
                await self._send(step)
            except _Misfit as misfit:
                problem = str(misfit)
        if problem or not self.usesNetlink:
            suspect, self._suspect = self._suspect, False
            try:
                await self._loadText(step, structure=bool(problem))
            except BaseException:
                self._suspect = self._suspect or suspect
                raise
            if problem:
                self._known = None
                await self._verify(ruleset)
        self._known = _Known(ruleset)

    async def _verify(self, ruleset: Ruleset) -> None:
        """What ``nft`` has written tells whether netlink messages of our own mean the same."""
        if not self.usesNetlink:
            return
        try:
            found = await self._inThread(self._elements.read)
        except Interrupted:
            return
        except (OSError, Unreadable) as error:
            self._distrust(repr(error))
            return
        if dict(found.rules) != dict(ruleset.rules) or found.guards != ruleset.guards:
            self._distrust("what nft has written reads otherwise")

    async def _send(self, step: Step) -> None:
        """
        Carry out a step on a table of our structure.

        :raise _Misfit: when the step does not fit what is there; nothing has changed.
        """
        if not self.usesNetlink:
            await self._loadText(step, structure=False)
            return
        try:
            if len(step) <= self.INLINE:
                self._elements.commit(step)
            else:
                await self._inThread(self._elements.commit, step)
        except Refused as error:
            if error.errno in _MISFITS:
                raise _Misfit(str(error)) from error
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                self._distrust(str(error))
                raise _Misfit(str(error)) from error
            raise RulesRejected(f"the kernel refused the rules: {error}") from error
        except OSError as error:
            # Whether the batch was carried out is not known.
            self._known = None
            self._elements.close()
            raise RulesNotJudged(f"the rules could not be handed to the kernel: {error}") from error

    async def _loadText(self, step: Step, structure: bool) -> None:
        def text() -> str:
            return (structureText(self._table, __version__) if structure else "") + stepText(self._table, step)

        script = await self._inThread(text) if len(step) > self.INLINE else text()
        done = await self._nft("--file", "-", stdin=script)
        if done.code == 0:
            return
        if not structure and ("No such file or directory" in done.err or "File exists" in done.err):
            raise _Misfit(_words(done))
        raise RulesRejected(f"nft refused the rules: {_words(done)}")

    # --- inside ---

    def _own(self, port: int | None) -> None:
        if self._watch is not None and port is not None:
            self._watch.own(port)

    def _distrust(self, why: str) -> None:
        self.usesNetlink = False
        self._elements.close()
        self.log.warn("Rules go through the nft program from now on, which is slower: {why}.", why=why)

    def _inThread(self, work: Callable[..., _T], *arguments: Any) -> Deferred[_T]:
        return self._threads.run(work, *arguments)

    async def _nft(self, *arguments: str, stdin: str = "") -> Finished:
        """Run ``nft``; its status is the caller's to judge."""
        if self._tool is None:
            self._tool = Tool(self._reactor, find("nft", "nftables"), self._prefix, self._limit)
        try:
            running = self._tool.run(*arguments, stdin=stdin)
            for pid in self._tool.pids:  # its netlink port is its process id
                self._own(pid)
            done = await running
        except (TooSlow, OSError) as error:
            self._known = None
            raise RulesNotJudged(f"nft {arguments[0]}: {error}") from error
        if done.code < 0:
            self._known = None
            raise RulesNotJudged(f"nft {arguments[0]} was ended by signal {-done.code}")
        return done


class _Misfit(Exception):
    """A step does not fit what is in force; nothing has changed."""


def _parsed(listing: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(listing)
    except ValueError as error:
        raise RulesNotJudged(f"nft gave a listing that is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RulesNotJudged("nft gave a listing that is not a JSON object")
    return found


def _words(done: Finished) -> str:
    """What the program complained of, in one line."""
    lines = [it.strip() for it in done.err.splitlines() if it.strip()] or [f"exit status {done.code}"]
    return lines[0][:400]
