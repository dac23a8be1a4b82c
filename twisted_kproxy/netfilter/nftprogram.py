"""The program ``nft``, as far as our table needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import __version__
from ..interfaces import NotAvailable, RulesNotJudged, RulesRejected
from . import tool
from .nfttext import linksIn, signature, structureProblem, structureText
from .tool import Finished, Tool, TooSlow

_OLDEST = (1, 0, 1)


class Misfit(Exception):
    """A step does not fit what is in force; nothing has changed."""


class NftProgram:
    """
    Runs ``nft`` for one table.

    :param started: called with the process id of each run: what others see of its changes carries it.
    :param limit: seconds that a run is given.
    :param findTool: gives the path of the program; see :func:`~twisted_kproxy.netfilter.tool.find`.
    """

    def __init__(
        self,
        reactor: Any,
        table: str,
        started: Callable[[int], None],
        *,
        spawnPrefix: Sequence[str] = (),
        limit: float = 30.0,
        findTool: Callable[[str, str], str] | None = None,
    ) -> None:
        self._reactor = reactor
        self._table = table
        self._started = started
        self._prefix = tuple(spawnPrefix)
        self._limit = limit
        self._find = findTool
        self._tool: Tool | None = None

    def kill(self) -> None:
        """End what runs."""
        if self._tool is not None:
            self._tool.kill()

    async def run(self, *arguments: str, stdin: str = "") -> Finished:
        """
        Run it; its status is the caller's to judge.

        :raise RulesNotJudged: where it does not come to an end of its own.
        """
        if self._tool is None:
            path = (self._find or tool.find)("nft", "nftables")
            self._tool = Tool(self._reactor, path, self._prefix, self._limit)
        try:
            running = self._tool.run(*arguments, stdin=stdin)
            for pid in self._tool.pids:  # its netlink port is its process id
                self._started(pid)
            done = await running
        except (TooSlow, OSError) as error:
            raise RulesNotJudged(f"nft {arguments[0]}: {error}") from error
        if done.code < 0:
            raise RulesNotJudged(f"nft {arguments[0]} was ended by signal {-done.code}")
        return done

    async def _ask(self, *arguments: str) -> Finished:
        """Run what may be run twice: once more where it fails, since that may have been an accident."""
        done = await self.run(*arguments)
        if done.code == 0 or "No such file or directory" in done.err:
            return done
        return await self.run(*arguments)

    async def probe(self) -> str:
        """
        Its version, where it and the kernel take our table.

        :raise NotAvailable: with the reason, and what to do.
        """
        try:
            version = await self.run("--version")
        except RulesRejected as error:
            raise NotAvailable(f"nft does not run: {error}") from error
        found = re.search(r"v(\d+)\.(\d+)\.(\d+)", version.out.decode(errors="replace"))
        if found is None:
            raise NotAvailable(f"nft does not tell its version: {words(version)}")
        numbers = tuple(int(it) for it in found.groups())
        if numbers < _OLDEST:
            raise NotAvailable(f"nft {found[0]} is too old: install nftables 1.0.1 or newer")
        # --check hands the whole structure to the kernel and takes it back in the same transaction.
        structure = structureText(f"{self._table}-probe", __version__)
        try:
            done = await self.run("--check", "--file", "-", stdin=structure)
        except RulesRejected as error:
            raise NotAvailable(f"nft does not run: {error}") from error
        if done.code != 0:
            if "Operation not permitted" in done.err or "Permission denied" in done.err:
                raise NotAvailable("nf_tables refuses this process: run it as root or with CAP_NET_ADMIN")
            raise NotAvailable(f"this kernel's nf_tables does not take our rules: {words(done)}")
        return found[0]

    async def delete(self) -> bool:
        """Remove the table; whether there was one."""
        done = await self.run("delete", "table", "inet", self._table)
        if done.code == 0:
            return True
        if "No such file or directory" in done.err:
            return False
        raise RulesRejected(f"the table {self._table} could not be removed: {words(done)}")

    async def look(self) -> tuple[str, tuple[str, ...]]:
        """
        What is wrong with the table's structure (see :func:`~.nfttext.structureProblem`), and the links of insiders
        that it is for.
        """
        listing = await self._structure()
        return (structureProblem(listing), linksIn(listing)) if listing is not None else ("absent", ())

    async def _structure(self) -> Mapping[str, Any] | None:
        """
        The table without its elements; ``None`` where there is none.

        Asked for one table, nft 1.0.6 fetches all elements though it does not print them, which at a hundred thousand
        takes a second; asked for all tables it does not. But tables of others may be such as it cannot print.
        """
        done = await self._ask("--json", "--terse", "list", "ruleset", "inet")
        if done.code == 0:
            mine = [item for item in parsed(done.out).get("nftables", ()) if _tableOf(item) == self._table]
            return {"nftables": mine} if mine else None
        done = await self._ask("--json", "--terse", "list", "table", "inet", self._table)
        if done.code != 0:
            if "No such file or directory" in done.err:
                return None
            raise RulesNotJudged(f"the table {self._table} cannot be listed: {words(done)}")
        return parsed(done.out)

    async def listing(self) -> bytes:
        """The table with its elements, as JSON."""
        done = await self._ask("--json", "list", "table", "inet", self._table)
        if done.code != 0:
            raise RulesNotJudged(f"the table {self._table} cannot be listed: {words(done)}")
        return done.out

    async def load(self, script: str, links: tuple[str, ...] | None = None) -> None:
        """
        Carry out a script.

        :param links: make the table anew, for these links of insiders.
        :raise Misfit: when it does not fit what is there.
        """
        structure = links is not None
        if links is not None:
            script = structureText(self._table, __version__, links) + script
        for _once_more in range(2):  # a failure without a reason may have been an accident
            done = await self.run("--file", "-", stdin=script)
            if done.code == 0:
                break
            if not structure and ("No such file or directory" in done.err or "File exists" in done.err):
                raise Misfit(words(done))
        else:
            raise RulesRejected(f"nft refused the rules: {words(done)}")
        if structure:
            await self._sign()

    async def _sign(self) -> None:
        """See :func:`~.nfttext.structureProblem`. Without a signature, all is written anew at the next start."""
        listing = await self._structure()
        if listing is not None:
            await self._ask("add", "chain", "inet", self._table, signature(listing))


def _tableOf(item: Mapping[str, Any]) -> str:
    """The table that an item of a listing belongs to."""
    for kind, it in item.items():
        if isinstance(it, dict):
            return str(it.get("name" if kind == "table" else "table", ""))
    return ""


def parsed(listing: bytes) -> Mapping[str, Any]:
    """
    A listing of ``nft --json``.

    :raise RulesNotJudged: where it is none.
    """
    try:
        found = json.loads(listing)
    except ValueError as error:
        raise RulesNotJudged(f"nft gave a listing that is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RulesNotJudged("nft gave a listing that is not a JSON object")
    return found


def words(done: Finished) -> str:
    """What the program complained of, in one line."""
    lines = [it.strip() for it in done.err.splitlines() if it.strip()] or [f"exit status {done.code}"]
    return lines[0][:400]
