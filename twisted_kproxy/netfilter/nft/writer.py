"""
The rule writer for nf_tables. The table's structure goes into the kernel by ``nft -f -``; elements by netlink messages
of our own, which cost a hundredth of a run of ``nft``, or by ``nft`` too where those do not work on this kernel.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import implementer

from ...core.rules import Delta, Guard, Rule, Ruleset, applied
from ...core.values import FrontendKey
from ...interfaces import IRuleWriter, RulesNotJudged, RulesRejected
from ..netlink import Interrupted, Refused, SocketOpener
from ..planning import differing, updating
from ..slices import Slices, finish, inSlices
from ..threads import Threads
from .elements import Elements, elementsOf
from .elementsocket import ElementSocket
from .layout import ALLOWED, Step, Unreadable, costly, placing, sourcesOf, stepping
from .program import Misfit, NftProgram, parsed
from .text import readListing, telling
from .watch import TableWatch

_T = TypeVar("_T")
_ERESTART = 85
#: The kernel's answers to a step that does not fit what is in force: somebody else has been there.
_MISFITS = frozenset({errno.EEXIST, errno.ENOENT, errno.EBUSY, _ERESTART})


class _Known:
    """What is in force, as far as we know."""

    def __init__(self, ruleset: Ruleset) -> None:
        self.rules: dict[FrontendKey, Rule] = dict(ruleset.rules)
        self.guards: set[Guard] = set(ruleset.guards)
        self.clusterIPs: set[str] = set(ruleset.clusterIPs)
        self.locality = ruleset.locality
        self.sources = sourcesOf(self.rules.values())  # how many

    def advancing(self, delta: Delta) -> Slices[None]:
        """The delta is in force."""
        self.sources += sourcesOf(delta.rules.values()) - sourcesOf(map(self.rules.get, delta.rules))
        yield from updating(self.rules, delta.rules)
        self.guards -= delta.guardsRemoved
        self.guards |= delta.guardsAdded
        self.clusterIPs -= delta.clusterIPsRemoved
        self.clusterIPs |= delta.clusterIPsAdded
        if delta.locality is not None:
            self.locality = delta.locality

    def ruleset(self) -> Ruleset:
        return Ruleset(dict(self.rules), frozenset(self.guards), frozenset(self.clusterIPs), self.locality)


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
    :ivar INLINE: steps of up to so many elements are sent at once; bigger ones are put together in slices, and sent
        from a thread. So are those that change sources, of which the kernel makes a copy each time.
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
        findTool: Callable[[str, str], str] | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,59}", table):
            raise ValueError(f"{table!r} is no name for a table")
        self._reactor = reactor
        self._table = table
        self.place = f"nf_tables, table inet {table}"
        self._opener = openSocket
        self.usesNetlink = useNetlink
        self._nft = NftProgram(
            reactor, table, self._ownProgram, spawnPrefix=spawnPrefix, limit=limit, findTool=findTool
        )
        self._elements = ElementSocket(openSocket, table, self._ownSocket)
        self._known: _Known | None = None
        self._closed = False
        self._damaged = False  # the structure is ours, some elements are not
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

        try:
            self._watch = TableWatch(self._reactor, self._opener, self._table, lambda structure: changed())
        except OSError as error:
            self.log.warn("Changes by others to our rules cannot be watched: {error}.", error=error)
            return
        if self._elements.port is not None:
            self._ownSocket(self._elements.port)

    def cleanup(self) -> Deferred[bool]:
        return Deferred.fromCoroutine(self._cleanup())

    async def _cleanup(self) -> bool:
        self._known = None
        return await self._nft.delete()

    def close(self) -> Deferred[None]:
        """Ends an ``nft`` that runs; waits for a thread that talks to the kernel. No other one is begun."""
        self.watch(None)
        self._closed = True
        self._nft.kill()
        return self._threads.idle().addCallback(lambda _: self._elements.close())

    async def _probe(self) -> str:
        # A thread that begins when the machine is busy would keep the reactor waiting until it gets a processor.
        await self._threads.run(lambda: None)
        version = await self._nft.probe()
        how = "elements by netlink" if self.usesNetlink else "elements by nft"
        if self.usesNetlink:
            try:
                self._elements.open()
            except OSError as error:
                how = f"elements by nft, since netlink failed: {error}"
                self._distrust(str(error))
        return f"nft {version}, {how}"

    # --- reading ---

    async def _adopt(self) -> Ruleset | None:
        self._known = None
        self._damaged = False
        problem, links = await self._nft.look()
        if problem:
            if problem != "absent":
                self.log.info("The table {table} will be made anew: {problem}.", table=self._table, problem=problem)
            return None
        try:
            found = await self._read(links)
        except Unreadable as error:
            self._damaged = True
            self.log.warn("The table {table} will be mended: {error}.", table=self._table, error=error)
            return None
        self._known = _Known(found)
        return found

    async def _read(self, links: tuple[str, ...]) -> Ruleset:
        """
        :param links: of insiders, as the rules have them.
        :raise Unreadable: where it is not what we write.
        """
        strange: Unreadable | None = None
        if self.usesNetlink:
            try:
                return await self._readElements(links)
            except Unreadable as error:
                strange = error
            except (OSError, Interrupted) as error:
                self._elements.close()
                self.log.warn("The elements could not be read by netlink: {error!r}.", error=error)
        listing = await self._nft.listing()
        found = await self._threads.run(lambda: readListing(parsed(listing)))
        if strange is not None:  # what nft can read and we cannot is no damage
            self._distrust(str(strange))
        return found

    async def _readElements(self, links: tuple[str, ...]) -> Ruleset:
        collected = await self._threads.run(self._elements.collect)
        return await inSlices(self._reactor, self._elements.reading(collected, links))

    # --- writing ---

    async def _apply(self, delta: Delta) -> None:
        known = self._known
        if known is None:
            if await self._adopt() is None or self._known is None:
                raise RulesRejected("nothing of ours is in force that a step could be applied to")
            known = self._known
        if delta.locality is not None and delta.locality.insiderLinks != known.locality.insiderLinks:
            # These are in the rules, so the table is made anew: once in a life, when somebody configures it otherwise.
            await self._replace(applied(known.ruleset(), delta))
            return
        step = await self._sliced(len(delta.rules), stepping(known, delta))
        if not step:
            await self._sliced(len(delta.rules), known.advancing(delta))
            return
        if costly(step, known.sources):
            await self._replace(applied(known.ruleset(), delta), "many sources change")
            return
        try:
            await self._send(step)
        except Misfit as misfit:
            self.log.warn("The rules in force are not those that we wrote ({why}): writing all.", why=misfit)
            await self._replace(applied(known.ruleset(), delta))
            return
        await self._sliced(len(delta.rules), known.advancing(delta))

    async def _replace(self, ruleset: Ruleset, why: str = "") -> None:
        """
        :param why: to make the table anew, though it is as it should be.
        """
        known = self._known
        looking = Deferred.fromCoroutine(self._nft.look())  # it takes a while, and another process
        try:
            step = await self._sliced(len(ruleset.rules), placing(ruleset))
            elements = await self._sliced(len(step), elementsOf(step)) if self.usesNetlink else None
        finally:
            problem, links = await looking
        wanted = ruleset.locality.insiderLinks
        if not problem and links != wanted:
            problem = "the links of insiders are others"
        damaged, self._damaged = self._damaged, False
        if not problem and damaged and self.usesNetlink and await self._mend(step):
            self._known = _Known(ruleset)
            return
        sources = sourcesOf(ruleset.rules.values())
        if not problem and (why or costly(step, known.sources if known is not None else sources)):
            problem = why or "there are many sources"
        if not problem and self.usesNetlink:
            try:
                await self._send(step, elements)
            except Misfit as misfit:
                problem = str(misfit)
        if problem or not self.usesNetlink:
            await self._loadText(step, wanted if problem else None)
            if problem:
                self._known = None
                if await self._misread(ruleset):
                    # Somebody else may have changed something meanwhile; that does not happen twice.
                    await self._loadText(step, wanted)
                    why = await self._misread(ruleset)
                    if why:
                        self._distrust(why)
        self._known = _Known(ruleset)

    async def _mend(self, whole: Step) -> bool:
        """
        Put right what is wrong, and nothing else: only while nobody changes anything meanwhile.

        :return: whether that was possible.
        """
        guarded = True
        for _try in range(4):
            try:
                collected = await self._threads.run(self._elements.collect)
                step = await inSlices(self._reactor, self._elements.mending(collected, whole))
                if costly(step, sum(name in ALLOWED for name, _item, _value in whole.added)):
                    return False
                self.log.info("{count} elements are out of place and will be mended.", count=len(step))
                elements = await inSlices(self._reactor, elementsOf(step))
                generation = collected.generation if guarded else None
                await self._threads.run(self._elements.commit, elements, generation)
                return True
            except Refused as error:
                # Where a kernel does not know what a generation is, the next one is sent without.
                guarded = error.errno == _ERESTART
            except (OSError, Interrupted) as error:
                self._elements.close()
                self.log.debug("The elements could not be mended: {error!r}.", error=error)
                return False
        return False

    async def _misread(self, ruleset: Ruleset) -> str:
        """
        What ``nft`` has written tells whether netlink messages of our own mean the same.

        :return: how it reads otherwise; ``""`` where it does not.
        """
        if not self.usesNetlink:
            return ""
        try:
            found = await self._readElements(ruleset.locality.insiderLinks)
        except Interrupted:
            return ""
        except (OSError, Unreadable) as error:
            return repr(error)
        differs = await inSlices(self._reactor, differing(ruleset, found))
        return "what nft has written reads otherwise" if differs else ""

    async def _send(self, step: Step, elements: Elements | None = None) -> None:
        """
        Carry out a step on a table of our structure.

        :param elements: of the step, where they are at hand.
        :raise Misfit: when the step does not fit what is there.
        """
        if not self.usesNetlink:
            await self._loadText(step)
            return
        try:
            if elements is None:
                elements = await self._sliced(len(step), elementsOf(step))
            if len(step) <= self.INLINE and ALLOWED.keys().isdisjoint({*elements.gone, *elements.new}):
                self._elements.commit(elements)
            else:
                await self._threads.run(self._elements.commit, elements)
        except Refused as error:
            if error.errno in _MISFITS:
                raise Misfit(str(error)) from error
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                self._distrust(str(error))
                raise Misfit(str(error)) from error
            raise RulesRejected(f"the kernel refused the rules: {error}") from error
        except OSError as error:
            # Whether the batch was carried out is not known.
            self._known = None
            self._elements.close()
            if error.errno == errno.ENOBUFS:  # there were too many answers to hear the last one: they were refusals
                raise Misfit(str(error)) from error
            raise RulesNotJudged(f"the rules could not be handed to the kernel: {error}") from error

    async def _loadText(self, step: Step, links: tuple[str, ...] | None = None) -> None:
        """See :meth:`~.program.NftProgram.load`."""
        script = await self._sliced(len(step), telling(self._table, step))
        if self._closed:
            raise RulesRejected("the rule writer has been closed")
        try:
            await self._nft.load(script, links)
        except RulesNotJudged:
            self._known = None
            raise

    # --- inside ---

    def _ownProgram(self, pid: int) -> None:
        if self._watch is not None:
            self._watch.own(pid)

    def _ownSocket(self, port: int) -> None:
        if self._watch is not None:
            self._watch.own(port, lasting=True)

    def _distrust(self, why: str) -> None:
        self.usesNetlink = False
        self._elements.close()
        self.log.warn("Rules go through the nft program from now on, which is slower: {why}.", why=why)

    async def _sliced(self, size: int, work: Slices[_T]) -> _T:
        return finish(work) if size <= self.INLINE else await inSlices(self._reactor, work)
