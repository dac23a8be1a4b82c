"""
What the worker of python-iptables does with a call: read, edit and commit the tables of both families.

One transaction per table is what the legacy interface can do, and a ruleset takes two tables per family. A step
therefore commits in the order in which nothing is open that shall not be: guards that come, then nat, then guards
that go and what is refused. A frontend that goes from served to refused is neither for the moment between two
commits. Where a commit fails, those before it are taken back.
"""

from __future__ import annotations

import random
import select
from collections.abc import Callable
from functools import partial

import iptc
import msgspec
from msgspec import Struct

from ..core.rules import Delta, Ruleset, applied
from ..core.values import FAMILIES, Family, FrontendKey
from . import xttables
from .ruleset import Invalid
from .xtbytes import UnknownBytes, pack
from .xtcheck import Checked, run
from .xtedits import edit, guardsFirst, remove, writeAll
from .xtlayout import (
    TABLES,
    Content,
    TableName,
    familiesOf,
    render,
)
from .xtread import joined, reconstruct
from .xtshapes import lacking
from .xtsteps import Edits, editsOf
from .xttables import Busy, Collision, Gone, LiveTable, Refused
from .xtvalid import check
from .xtwire import Reply, Request

#: How often a commit is tried again when somebody without the lock was faster.
RETRIES = 5
#: From so many changed frontends on, and an eighth of all, chains are written anew: a deletion walks the chain.
BULK = 256


class Lacking(Refused):
    """This machine lacks something that these rules need."""

    def __init__(self, text: str, frontends: frozenset[FrontendKey]) -> None:
        super().__init__(text)
        self.frontends = frontends


class Step(Struct, frozen=True):
    """One commit: what to do to a table that has just been read."""

    table: LiveTable
    edit: Callable[[LiveTable], None]


class Engine:
    """
    :ivar state: what is in force as far as is known; ``None`` when it has to be read first.
    """

    def __init__(self) -> None:
        self.state: Ruleset | None = None
        self._families: set[Family] = set()  # those that have our chains
        self._tables: dict[tuple[Family, TableName], LiveTable] = {}
        self._counts: dict[tuple[Family, TableName], tuple[int, int] | None] = {}
        self._checked: Checked | None = None
        #: What is there could not be understood, or is of an earlier version; what is good of it is to be kept.
        self._mend = False
        self._torn = False  # some tables were written and others not; steps have to wait for a whole
        self._waited = self._held = 0.0

    def serve(self, request: Request) -> Reply:
        """One call. What the kernel, the lock or the caller is to blame for comes back as an error in words."""
        self._waited = self._held = 0.0
        try:
            reply = self._act(request)
        except Lacking as error:
            reply = Reply(error=str(error), refused=error.frontends)
        except Busy as error:
            reply = Reply(error=str(error), unjudged=True)
        except (Refused, Invalid, UnknownBytes) as error:
            reply = Reply(error=str(error))
        except OSError as error:
            reply = Reply(error=f"the tables cannot be changed: {error}", unjudged=True)
        except iptc.XTablesError as error:
            # libxtables leaves by a longjmp over Python's frames: nothing in this process can be trusted any more.
            reply = Reply(error=f"libxtables: {error}", leaving=True)
        finally:
            for table in self._tables.values():
                table.close()
        return msgspec.structs.replace(reply, waited=self._waited, held=self._held)

    def _act(self, request: Request) -> Reply:
        if request.op == "check":
            self._checked = None  # what was missing may have come meanwhile
            checked = self._ensureChecked()
            if len(checked.missing) == len(FAMILIES):
                return Reply(error=next(iter(checked.missing.values())), unavailable=True)
            return Reply(text=checked.text())
        if request.op == "adopt":
            found = self._adopt()
            self._torn = False  # the caller knows by now what there is
            return Reply.adopting(found)
        if request.op == "replace":
            return Reply(notes=self._replace(request.ruleset(), request.lockSeconds))
        if request.op == "apply":
            return Reply(notes=self._apply(request.delta(), request.lockSeconds))
        if request.op == "peek":
            return self._peek(request.full)
        if request.op == "cleanup":
            return self._cleanup(request.lockSeconds)
        return Reply(error=f"unknown call {request.op!r}")

    # --- reading ---

    def _table(self, family: Family, name: TableName) -> LiveTable:
        table = self._tables.get((family, name))
        if table is None:
            table = self._tables[family, name] = LiveTable(family, name)
        return table

    def _ensureChecked(self) -> Checked:
        if self._checked is None:
            self._checked = run()
        return self._checked

    def _adopt(self) -> Ruleset | None:
        """What is in force; needs no lock, since each table is read in one piece."""
        self.state, self._families, self._mend = None, set(), False
        self._count()
        found: dict[Family, Ruleset] = {}
        try:
            for family in FAMILIES:
                it = self._adoptFamily(family)
                if it is not None:
                    found[family] = it
        except UnknownBytes:
            self._mend = True
            return None
        self.state = joined(found)
        if self.state is not None:
            self._families = set(found)
        return self.state

    def _adoptFamily(self, family: Family) -> Ruleset | None:
        contents: dict[TableName, dict[str, list[bytes]]] = {}
        for name in TABLES:
            if name in xttables.tableNames(family):
                table = self._table(family, name)
                table.refresh()
                content = table.content()
                if content is not None:
                    if not table.jumpsStand():
                        raise UnknownBytes(f"a rule of {table} that leads to our chains is missing or misplaced")
                    contents[name] = content
                    self._mend = self._mend or table.isOlder()
        if not contents:
            return None
        if len(contents) < len(TABLES):
            raise UnknownBytes(f"{family} has our chains in one table only")
        return reconstruct(family, Content(contents["nat"], contents["filter"]))

    def _count(self) -> None:
        """Remember how large the tables are now."""
        self._counts = {(family, name): self._counted(family, name) for family in FAMILIES for name in TABLES}

    @staticmethod
    def _counted(family: Family, name: TableName) -> tuple[int, int] | None:
        return xttables.counts(family, name) if name in xttables.tableNames(family) else None

    def _peek(self, full: bool) -> Reply:
        """
        Whether somebody was at our rules. Their number and size tell at once when nobody was at any; a change that
        keeps both is found by reading all back.
        """
        if self.state is None:
            return Reply(known=False)
        before = self._counts
        same = all(self._counted(*which) == count for which, count in before.items())
        if same and not full:
            return Reply(known=True)
        state, families = self.state, self._families
        found = self._adopt()
        if found == state:
            return Reply(known=True)
        self.state, self._families = found, self._families or families
        return Reply(known=found is not None, changed=True)

    # --- writing ---

    def _replace(self, ruleset: Ruleset, lockSeconds: float) -> tuple[str, ...]:
        check(ruleset)
        self._commit(lambda: self._replaceSteps(ruleset), lockSeconds)
        self.state, self._torn, self._mend = ruleset, False, False
        return ()

    def _apply(self, delta: Delta, lockSeconds: float) -> tuple[str, ...]:
        if self._torn:
            raise Refused("an earlier write failed half-way: read what is in force, or write all of it, first")
        old = self.state if self.state is not None else self._adopt()
        if old is None:
            raise Refused("there is nothing in force, or nothing that can be read, that a step could be applied to")
        new = applied(old, delta)
        changed = Delta({key: rule for key, rule in delta.rules.items() if old.rules.get(key) != rule})
        rules = {key: rule for key, rule in changed.rules.items() if rule}
        come = Ruleset(rules, new.guards, delta.clusterIPsAdded, new.locality)
        check(come)
        bulk = len(changed.rules) > max(BULK, len(old.rules) // 8)
        if bulk or self._mend or new.locality != old.locality or not self._wanted(new) <= self._families:
            self._commit(lambda: self._replaceSteps(new), lockSeconds)
            self._mend = False
        else:
            edits = {family: editsOf(family, old, new, changed, pack) for family in self._families}
            self._ensureCan(come)
            self._commit(lambda: self._applySteps(edits), lockSeconds)
        self.state = new
        return ()

    def _ensureCan(self, ruleset: Ruleset) -> None:
        """:raise Refused: where this machine lacks something that these rules need."""
        checked = self._ensureChecked()
        reason, frontends = lacking(ruleset, checked.missing, checked.sctp)
        if reason:
            raise Lacking(reason, frontends)

    def _replaceSteps(self, ruleset: Ruleset) -> list[Step]:
        self._ensureCan(ruleset)
        wanted = self._wanted(ruleset)
        steps = []
        for family in FAMILIES:
            if family in wanted:
                content: Content[bytes] = render(ruleset, family)
                nat, filters = self._table(family, "nat"), self._table(family, "filter")
                mend = self._mend
                steps.append(Step(filters, partial(guardsFirst, content=content, mend=mend)))
                steps.append(Step(nat, partial(writeAll, content=content.nat, mend=mend)))
                steps.append(Step(filters, partial(writeAll, content=content.filter, mend=mend)))
            else:
                steps += self._removeSteps(family)
        self._families = wanted
        return steps

    def _wanted(self, ruleset: Ruleset) -> set[Family]:
        """
        The families whose chains are there. One of them is even when nothing needs it: that there is a ruleset is a
        fact too.
        """
        usable = [family for family in FAMILIES if family not in self._ensureChecked().missing]
        return familiesOf(ruleset) & {*usable} | {*usable[:1]}

    def _applySteps(self, edits: dict[Family, Edits[bytes]]) -> list[Step]:
        steps = []
        for family, it in edits.items():
            nat, filters = self._table(family, "nat"), self._table(family, "filter")
            if it.guardsNew:
                steps.append(Step(filters, partial(edit, gone=(), come=it.guardsNew)))
            if it.natGone or it.natNew:
                steps.append(Step(nat, partial(edit, gone=it.natGone, come=it.natNew)))
            if it.filterGone or it.filterFirst or it.filterNew:
                do = partial(edit, gone=it.filterGone, come=it.filterNew, first=it.filterFirst)
                steps.append(Step(filters, do))
        return steps

    # --- committing ---

    def _commit(self, plan: Callable[[], list[Step]], lockSeconds: float) -> None:
        """Take the steps, all or none, under the lock. What can be computed is computed before it is taken."""
        old, families = self.state, self._families
        done: list[Step] = []
        try:
            steps = plan()
            with xttables.Lock(lockSeconds) as lock:
                self._waited = lock.waited
                try:
                    self._take(steps, done)
                except (Refused, UnknownBytes) as error:
                    if done:
                        self.state, self._torn = None, True
                        self._takeBack(old, error)
                    raise
                finally:
                    self._held = lock.held
                    self._count()
        except BaseException as error:
            self._families = families
            if isinstance(error, Gone):
                self.state = None  # what is in force is not what was thought
            raise

    def _take(self, steps: list[Step], done: list[Step]) -> None:
        """
        Each table's first edit is made before the first commit: what is found wrong by then has cost nothing.
        """
        edited: dict[str, Step] = {}
        for step in steps:
            if str(step.table) not in edited:
                step.table.refresh()
                step.edit(step.table)
                edited[str(step.table)] = step
        for step in steps:
            for attempt in range(RETRIES + 1):
                try:
                    if edited.get(str(step.table)) is not step:
                        step.table.refresh()
                        step.edit(step.table)
                    edited.pop(str(step.table), None)
                    wrote = step.table.dirty
                    step.table.commit()
                except Collision as error:
                    if attempt == RETRIES:
                        raise Refused(
                            f"{step.table}: another program keeps changing this table without the lock of xtables: "
                            f"{error}"
                        ) from None
                    # This process has nothing else to do, and a wait on nothing is a wait.
                    select.select([], [], [], random.uniform(0.002, 0.02) * (attempt + 1))  # noqa: S311
                else:
                    if wrote:
                        done.append(step)
                    break

    def _takeBack(self, old: Ruleset | None, error: BaseException) -> None:
        """Some tables were committed, another one could not be."""
        if old is None:
            raise Refused(f"{error}; other tables have been written already, and what they held is not known") from None
        try:
            self._take(self._replaceSteps(old), [])
        except (Refused, Collision) as worse:
            raise Refused(f"{error}; and the tables written before could not be restored: {worse}") from None
        self.state, self._torn = old, False

    # --- removing ---

    def _removeSteps(self, family: Family) -> list[Step]:
        """For tables that there are; asking for one would bring it into being."""
        names = xttables.tableNames(family)
        return [Step(self._table(family, name), remove) for name in TABLES if name in names]

    def _cleanup(self, lockSeconds: float) -> Reply:
        steps = [step for family in FAMILIES for step in self._removeSteps(family)]
        if not steps:
            return Reply()
        done: list[Step] = []
        with xttables.Lock(lockSeconds) as lock:
            self._waited = lock.waited
            self.state, self._families = None, set()
            try:
                self._take(steps, done)
            finally:
                self._held = lock.held
        notes = []
        for step in done:
            step.table.refresh()
            left = step.table.ownChains()
            if left:
                notes.append(
                    f"{step.table}: {', '.join(left)} is empty, but stays: a rule of another program leads there"
                )
        return Reply(changed=bool(done), notes=tuple(notes))
