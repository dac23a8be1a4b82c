"""
The rule writer that has no library but the programs ``iptables-restore`` and ``iptables-save``, of the legacy variant
or of the one over nf_tables: for machines that cannot have python-iptables, or whose iptables is for nf_tables.

Rules and chains are those of ``python-iptables``. A step is a few ``-D`` and ``-A`` for each family, but both variants
read and write the whole table for it, so that a change costs in proportion to the number of rules; the variant over
nf_tables also compares texts to find a rule that goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger
from zope.interface import implementer

from ..core.rules import Delta, Ruleset
from ..core.values import FAMILIES, Family
from ..interfaces import IRuleWriter, KproxyError, NotAvailable, RulesNotJudged, RulesRejected
from . import xtscript
from .ipttools import Found, IptablesTools, Refusal, Variant
from .iptwatch import TableSigns
from .netlink import SocketOpener
from .ruleset import Invalid
from .slices import inSlices
from .xtbytes import UnknownBytes
from .xtlayout import familiesOf
from .xtshapes import lacking
from .xtstate import Tables, fingerprint, isOlder, stepOf, understood
from .xtsteps import editsOf
from .xttext import textOf
from .xtvalid import checking

#: A step of more changed frontends than this, and than an eighth of all, is written as a whole: a deletion walks its
#: chain, and in the variant over nf_tables that walk is a comparison of texts.
BULK: dict[Variant, int] = {"legacy": 256, "nft": 16}
#: How often the tables are looked at; after a write or a change of the tables' size they are read back.
POLL_SECONDS = 1.0
READ_BACK_SECONDS = 30.0
#: Service ports from which on the variant over nf_tables is worth a warning.
MANY = 1000
PLACES: dict[Variant, str] = {"legacy": "legacy iptables", "nft": "iptables over nf_tables"}

@implementer(IRuleWriter)
class RestoreWriter:
    """
    Writes by ``iptables-restore --noflush``.

    :param variant: ``""`` for what ``iptables -V`` says, or the one to take.
    :param openSocket: opens the sockets that tell whether a table has changed.
    :param options: for :class:`~twisted_kproxy.netfilter.ipttools.IptablesTools`.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        variant: Literal["", "legacy", "nft"] = "",
        *,
        openSocket: SocketOpener | None = None,
        **options: Any,
    ) -> None:
        self.name = f"iptables-{variant}" if variant else "iptables"
        self.place = PLACES[variant] if variant else ""
        self._reactor = reactor
        self.tools = IptablesTools(reactor, variant, **options)
        self._opener = openSocket
        self._found: Found | None = None
        self._known: Ruleset | None = None
        self._families: set[Family] = set()  # those that have our chains
        #: What is there could not be understood, or is of an earlier version; what is good of it is to be kept.
        self._mend = False
        self._torn = False
        self._warned = False
        self._oneAtATime = DeferredLock()
        self._watcher: Callable[[], None] | None = None
        self._poll: Any = None
        self._signs: TableSigns | None = None
        self._print: object = None  # our rules as they were read when they were last found to be good
        self._readBackAt = 0.0
        self._closed = False

    # --- IRuleWriter ---

    def probe(self) -> Deferred[str]:
        return self._one(self._probe)

    def adopt(self) -> Deferred[Ruleset | None]:
        return self._one(self._adopt)

    def apply(self, delta: Delta) -> Deferred[None]:
        return self._one(self._apply, delta)

    def replace(self, ruleset: Ruleset) -> Deferred[None]:
        return self._one(self._replace, ruleset)

    def cleanup(self) -> Deferred[bool]:
        return self._one(self._cleanup)

    def watch(self, changed: Callable[[], None] | None) -> None:
        """
        Nobody is told of a change: once a second the size of the legacy tables is asked for, or the generation of
        nf_tables, and our rules are read back when that is another than before, and every half a minute.
        """
        self._watcher = changed
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if changed is not None and not self._closed:
            self._readBackAt = self._reactor.seconds() + READ_BACK_SECONDS
            self._poll = self._reactor.callLater(POLL_SECONDS, self._look)

    def close(self) -> Deferred[None]:
        """Ends a program that runs; waits for a thread that reads what one has printed."""
        self.watch(None)
        self._closed = True
        self.tools.kill()
        if self._signs is not None:
            self._signs.close()
        return self.tools.threads.idle()

    def _one(self, work: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        async def guarded() -> Any:
            if self._closed:
                raise RulesRejected("the rule writer has been closed")
            return await work(*arguments)

        return self._oneAtATime.run(lambda: Deferred.fromCoroutine(guarded()))

    # --- probe ---

    async def _probe(self) -> str:
        self._found = None
        found = await self._ensureFound()
        return found.text(self.name)

    async def _ensureFound(self) -> Found:
        if self._found is None:
            found = self._found = await self.tools.probe()
            if self.name != "iptables" and self.name != f"iptables-{found.variant}":
                self._found = None
                raise NotAvailable(f"{self.tools.path('IPv4')} is of the variant {found.variant}")
            self.place = PLACES[found.variant]
            self._signs = TableSigns(found.variant, self._opener)
        return self._found

    async def _usable(self) -> Found:
        try:
            return await self._ensureFound()
        except NotAvailable as error:
            raise RulesNotJudged(str(error)) from error

    # --- reading ---

    async def _adopt(self) -> Ruleset | None:
        tables = await self.tools.save()
        size = sum(len(rules) * 100 for it in tables.values() for saved in it.values() for rules in saved.own.values())
        self._known, self._families, self._print = None, set(), None
        self._torn = False
        try:
            found, self._families = await self.tools.inThread(size, understood, tables)
        except UnknownBytes as error:
            self._mend = True
            self.log.info("The rules in force cannot be understood: {error}.", error=error)
            return None
        self._known = found
        self._mend = (found is None and bool(self._families)) or isOlder(tables)
        if found is not None:
            self._print = await self.tools.inThread(size, fingerprint, tables)
        return self._known

    # --- writing ---

    async def _replace(self, ruleset: Ruleset) -> None:
        await self._checked(ruleset)
        await self._writeWhole(ruleset, self._known, self._mend)
        self._mend = False

    async def _apply(self, delta: Delta) -> None:
        if self._torn:
            raise RulesNotJudged("an earlier write failed half-way: read what is in force, or write all of it, first")
        old = self._known if self._known is not None else await self._adopt()
        if old is None:
            raise RulesRejected("there is nothing in force, or nothing that can be read, that a step could apply to")
        new, changed = await inSlices(self._reactor, stepOf(old, delta))
        found = await self._checked(
            Ruleset(
                {key: rule for key, rule in changed.rules.items() if rule},
                new.guards,
                delta.clusterIPsAdded,
                new.locality,
            )
        )
        bulk = len(changed.rules) > max(BULK[found.variant], len(old.rules) // 8)
        if bulk or self._mend or new.locality != old.locality or not self._wanted(new) <= self._families:
            await self._writeWhole(new, old, self._mend)
            self._mend = False
            return
        scripts = {
            family: xtscript.editScript(editsOf(family, old, new, changed, textOf))
            for family in FAMILIES
            if family in self._families
        }
        await self._write(scripts, old)
        self._wrote(new)

    async def _checked(self, ruleset: Ruleset) -> Found:
        """:raise RulesRejected: where it cannot be written here, naming what."""
        found = await self._usable()
        try:
            await inSlices(self._reactor, checking(ruleset))
        except Invalid as error:
            raise RulesRejected(str(error)) from error
        reason, frontends = lacking(ruleset, found.missing, found.sctp)
        if reason:
            raise RulesRejected(reason, frontends)
        if found.variant == "nft" and len(ruleset.rules) > MANY and not self._warned:
            self._warned = True
            self.log.warn(
                "{count} frontends are many for iptables over nf_tables: each new connection may have to pass all of "
                "their rules, and each change takes longer with each of them; writer = nftables does not",
                count=len(ruleset.rules),
            )
        return found

    async def _writeWhole(self, ruleset: Ruleset, old: Ruleset | None, mend: bool) -> None:
        tables = await self.tools.save()
        scripts = await self.tools.inThread(len(ruleset.rules) * 200, self._wholeScripts, ruleset, tables, mend)
        await self._write(scripts, old)
        self._families = self._wanted(ruleset)
        self._wrote(ruleset)

    def _wholeScripts(self, ruleset: Ruleset, tables: Tables, mend: bool) -> dict[Family, str]:
        scripts: dict[Family, str] = {}
        wanted = self._wanted(ruleset)
        for family in FAMILIES:
            there = tables.get(family, {})
            if family in wanted:
                scripts[family] = xtscript.wholeScript(family, ruleset, there, mend)
            else:
                scripts[family] = xtscript.removeScript(there)
        return scripts

    def _wanted(self, ruleset: Ruleset) -> set[Family]:
        """One family's chains are there even when nothing needs them: that there is a ruleset is a fact too."""
        missing = self._found.missing if self._found is not None else {}
        usable = [family for family in FAMILIES if family not in missing]
        return familiesOf(ruleset) & {*usable} | {*usable[:1]}

    async def _write(self, scripts: dict[Family, str], old: Ruleset | None) -> None:
        """
        Carry out a script per family: all or, as far as can be, nothing.

        :raise RulesRejected: when it was refused.
        """
        some = False
        try:
            for family, script in scripts.items():
                for block in xtscript.blocksOf(script):
                    await self.tools.restore(family, block)
                    some = True
        except (Refusal, RulesNotJudged) as error:
            kind = RulesNotJudged if isinstance(error, RulesNotJudged) else RulesRejected
            self._known, self._print = None, None
            if some:
                self._torn = True
                await self._takeBack(old, error, kind)
            raise kind(str(error)) from error

    async def _takeBack(self, old: Ruleset | None, error: Exception, kind: type[KproxyError]) -> None:
        if old is None:
            raise kind(f"{error}; other tables may have been written already, and what they held is not known")
        try:
            scripts = self._wholeScripts(old, await self.tools.save(), mend=True)
            for family, script in scripts.items():
                for block in xtscript.blocksOf(script):
                    await self.tools.restore(family, block)
        except (Refusal, RulesNotJudged) as worse:
            raise kind(f"{error}; and the tables written before could not be restored: {worse}") from error
        self._families = self._wanted(old)
        self._known, self._torn = old, False

    def _wrote(self, ruleset: Ruleset) -> None:
        self._known, self._torn, self._print = ruleset, False, None
        if self._signs is not None:
            self._signs.remember(self._families)
        # Whether it is really there is looked at soon, but not after each of many steps.
        self._readBackAt = min(self._readBackAt, self._reactor.seconds() + 5 * POLL_SECONDS)

    # --- removing ---

    async def _cleanup(self) -> bool:
        """Does not need a probe, so that rules can be removed where none could be written any more."""
        tables = await self.tools.save()
        self._known, self._families, self._print = None, set(), None
        if not any(saved.own for it in tables.values() for saved in it.values()):
            return False
        for family, there in tables.items():
            for block in xtscript.blocksOf(xtscript.removeScript(there)):
                try:
                    await self.tools.restore(family, block)
                except Refusal as error:
                    raise RulesRejected(f"the rules could not be removed: {error}") from error
            for name, saved in there.items():
                left = xtscript.stuck(saved) & saved.own.keys()
                if left:
                    self.log.warn(
                        "{family} {table}: {chains} is empty, but stays: a rule of another program leads there",
                        family=family, table=name, chains=", ".join(sorted(left)),
                    )
        return True

    # --- watching ---

    def _look(self) -> None:
        self._poll = None
        now = self._reactor.seconds()
        same = self._signs is not None and self._signs.same()
        if self._known is None or self._oneAtATime.locked or (same and now < self._readBackAt):
            self._lookAgain()
            return
        begin = self._watcher

        def failed(failure: Any) -> None:
            if not self._closed:
                self.log.warn("The rules cannot be looked at: {reason}", reason=failure.getErrorMessage())

        def again(_: object) -> None:
            # Reading costs with the size of the tables: never more than a twentieth of the time.
            spent = self._reactor.seconds() - now
            if self._watcher is begin:
                self._lookAgain(20 * spent)
            self._readBackAt = self._reactor.seconds() + max(READ_BACK_SECONDS, 50 * spent)

        def looked(good: bool) -> None:
            if not good and self._watcher is not None and self._watcher is begin:
                self._known = self._print = None
                self._watcher()

        looking = self._one(self._stands)
        looking.addCallbacks(looked, failed)
        looking.addErrback(lambda failure: self.log.failure("Telling of a foreign change failed", failure))
        looking.addCallback(again)

    async def _stands(self) -> bool:
        """Whether what is in force is what is known to be."""
        known = self._known
        if known is None:
            return True
        if self._signs is not None:
            self._signs.remember(self._families)  # before reading: what comes after it is news
        tables = await self.tools.save()
        print_ = await self.tools.inThread(len(known.rules) * 200, fingerprint, tables)
        if print_ == self._print:
            return True
        try:
            found, _ = await self.tools.inThread(len(known.rules) * 200, understood, tables)
        except UnknownBytes:
            return False
        if found != known:
            return False
        self._print = print_
        return True

    def _lookAgain(self, seconds: float = 0.0) -> None:
        if self._watcher is not None and self._poll is None and not self._closed:
            self._poll = self._reactor.callLater(max(POLL_SECONDS, seconds), self._look)


def legacyWriter(reactor: Any) -> RestoreWriter:
    """By the programs of the legacy tables, whichever the system's own are."""
    return RestoreWriter(reactor, "legacy")


def nftWriter(reactor: Any) -> RestoreWriter:
    """By the programs of the variant over nf_tables."""
    return RestoreWriter(reactor, "nft")
