"""The programs of iptables: which variant they are, and running them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct
from twisted.internet.defer import Deferred, gatherResults

from ..core.values import FAMILIES, Family
from ..interfaces import NotAvailable, RulesNotJudged, RulesRejected
from .threads import Threads
from .tool import Finished, Tool, TooSlow, find
from .xtbytes import UnknownBytes
from .xtlayout import CHAINS, JUMPS, TABLES, TableName
from .xtshapes import sctpShapes, shapes
from .xttext import Saved, parseSave, textOf

Variant: TypeAlias = Literal["legacy", "nft"]

#: The first version whose restore programs wait for the lock.
OLDEST = (1, 6, 2)
_STEMS: dict[Family, str] = {"IPv4": "iptables", "IPv6": "ip6tables"}
#: What the programs say when somebody else was faster: EAGAIN of the legacy tables, ERESTART of nf_tables.
_AGAIN = re.compile(r"temporarily unavailable|Interrupted system call should be restarted")
_LOCKED = re.compile(r"holding the xtables lock|xtables lock", re.I)
#: Runs the two programs that it is given in a network namespace that ends with it.
_SCRATCH = ("--net", "sh", "-c", '"$1" --noflush && "$2"', "kproxy-probe")


class Found(Struct, frozen=True):
    """
    What a machine has.

    :ivar missing: family → why its rules cannot be written; what is not in here works.
    :ivar sctp: family → why those of SCTP cannot be.
    :ivar tried: rules of each shape were tried against the kernel, in a namespace of their own.
    """

    version: str
    variant: Variant
    missing: dict[Family, str] = {}
    sctp: dict[Family, str] = {}
    tried: bool = True

    def text(self, program: str) -> str:
        """For the log."""
        families = " and ".join(family for family in FAMILIES if family not in self.missing)
        words = f"{program} {self.version} ({'nf_tables' if self.variant == 'nft' else 'legacy'}) for {families}"
        if not self.tried:
            words += "; not tried against the kernel, for want of a scratch network namespace"
        for family, reason in self.missing.items():
            words += f"; no {family}: {reason}"
        if self.sctp:
            words += f"; no SCTP: {next(iter(self.sctp.values()))}"
        return words


class Refusal(Exception):
    """A restore program said no to a transaction: that one has changed nothing."""


class IptablesTools:
    """
    ``iptables-restore`` and ``iptables-save`` of both families.

    :param flavour: ``""`` for the variant that is the system's own, or the one to take.
    :param spawnPrefix: arguments before each run, such as ``ip netns exec NAME``.
    :param limit: seconds that a run is given.
    :param lockSeconds: how long to wait for the lock of xtables.
    :param findTool: gives the path of a program; see :func:`~twisted_kproxy.netfilter.tool.find`.
    """

    def __init__(
        self,
        reactor: Any,
        flavour: Literal["", "legacy", "nft"] = "",
        *,
        spawnPrefix: Sequence[str] = (),
        limit: float = 30.0,
        lockSeconds: int = 20,
        findTool: Callable[[str, str], str] = find,
    ) -> None:
        self._reactor = reactor
        self._middle = f"-{flavour}" if flavour else ""
        self._prefix = tuple(spawnPrefix)
        self._limit = limit
        self._lockSeconds = lockSeconds
        self._find = findTool
        self._tool: Tool | None = None
        self.threads = Threads(reactor)

    def path(self, family: Family, end: str = "") -> str:
        """:raise NotAvailable: where it is not installed."""
        return self._find(f"{_STEMS[family]}{self._middle}{end}", "iptables")

    def kill(self) -> None:
        """End what runs."""
        if self._tool is not None:
            self._tool.kill()

    async def run(self, path: str, *arguments: str, stdin: str = "") -> Finished:
        """:raise RulesNotJudged: where it does not come to an end of its own."""
        if self._tool is None:
            environment = {it: os.environ[it] for it in ("XTABLES_LOCKFILE",) if it in os.environ}
            self._tool = Tool(self._reactor, path, self._prefix, self._limit, environment)
        name = os.path.basename(path)
        try:
            done = await self._tool.run(*arguments, stdin=stdin, path=path)
        except (TooSlow, OSError) as error:
            raise RulesNotJudged(f"{name}: {error}") from error
        if done.code < 0:
            raise RulesNotJudged(f"{name} was ended by signal {-done.code}")
        return done

    # --- what there is ---

    async def probe(self) -> Found:
        """:raise NotAvailable: with the reason, and what to do."""
        try:
            path = self.path("IPv4")
            done = await self.run(path, "-V")
        except RulesRejected as error:
            raise NotAvailable(f"iptables does not run: {error}") from error
        said = re.search(r"v(\d+)\.(\d+)\.(\d+)\S*(?: \((\w+)\))?", done.out.decode(errors="replace"))
        if said is None:
            raise NotAvailable(f"{path} does not tell its version: {words(done)}")
        if tuple(int(it) for it in said.groups()[:3]) < OLDEST:
            raise NotAvailable(f"iptables {said[0]} is too old: install 1.6.2 or newer")
        variant: Variant = "nft" if said[4] == "nf_tables" else "legacy"
        missing: dict[Family, str] = {}
        sctp: dict[Family, str] = {}
        tried = True
        for family in FAMILIES:
            try:
                reason, here = await self._tryShapes(family, sctpToo=False)
                tried = tried and here
                if reason:
                    missing[family] = reason
                elif here:
                    reason, _ = await self._tryShapes(family, sctpToo=True)
                    if reason:
                        sctp[family] = reason
            except (NotAvailable, RulesRejected) as error:
                missing[family] = str(error)
        if len(missing) == len(FAMILIES):
            raise NotAvailable(next(iter(missing.values())))
        return Found(said[0].split()[0], variant, missing, sctp, tried)

    async def _tryShapes(self, family: Family, sctpToo: bool) -> tuple[str, bool]:
        """Write rules of every shape and read them back. What is wrong, and whether that could be tried at all."""
        restore, save = self.path(family, "-restore"), self.path(family, "-save")
        script, wanted = shapesScript(family, sctpToo)
        try:
            unshare = self._find("unshare", "util-linux")
        except NotAvailable:
            unshare = ""
        if unshare:
            done = await self.run(unshare, *_SCRATCH, restore, save, stdin=script)
            if not done.err.startswith("unshare:"):
                if done.code:
                    return self._reason(family, words(done)), True
                try:
                    found = parseSave(done.out.decode(errors="replace"))
                except UnknownBytes as error:
                    return str(error), True
                if any(found.get(name, Saved()).own != wanted[name] for name in TABLES):
                    return (
                        f"{save} prints rules in another way than is known here; say writer = nftables, and report "
                        "this line",
                        True,
                    )
                return "", True
        done = await self.run(restore, "--noflush", "--test", stdin=script)
        return (self._reason(family, words(done)) if done.code else ""), False

    @staticmethod
    def _reason(family: Family, said: str) -> str:
        if "Permission denied" in said or "must be root" in said or "not permitted" in said:
            return f"{said}: this needs root, or CAP_NET_ADMIN and CAP_NET_RAW"
        return f"{said} (this needs root, or CAP_NET_ADMIN and CAP_NET_RAW, and the kernel's {_STEMS[family]} modules)"

    async def save(self) -> dict[Family, dict[str, Saved]]:
        """
        What there is of ours. Reading brings no table into being.

        :raise RulesNotJudged: where that cannot be found out.
        """
        found = {}
        for family in FAMILIES:
            try:
                path = self.path(family, "-save")
            except NotAvailable:
                continue
            done = await self.run(path)
            if done.code:  # that may have been an accident
                done = await self.run(path)
            if done.code:
                raise RulesNotJudged(f"the rules cannot be listed: {words(done)}")
            try:
                found[family] = await self.inThread(len(done.out), parseSave, done.out.decode(errors="replace"))
            except UnknownBytes as error:
                raise RulesNotJudged(f"the rules cannot be listed: {path}: {error}") from error
        return found

    def inThread(self, size: int, work: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        """Work on text of that size: in a thread where it would take more than a few milliseconds."""
        if size > 100_000:
            return self.threads.run(work, *arguments)
        return gatherResults([]).addCallback(lambda _: work(*arguments))

    # --- writing ---

    async def restore(self, family: Family, block: str) -> None:
        """
        Carry out one transaction.

        :raise Refusal: when it was refused.
        :raise RulesNotJudged: when nobody got to judge it; it may be in force then.
        """
        path = self.path(family, "-restore")
        for attempt in range(6):
            done = await self.run(path, "--noflush", "-w", str(self._lockSeconds), stdin=block)
            if done.code == 0:
                return
            # Once more in any case: it may have been an accident.
            if attempt > 0 and not _AGAIN.search(done.err):
                break
        if _LOCKED.search(done.err):
            raise RulesNotJudged(f"another program has kept the lock of xtables: {words(done)}")
        raise Refusal(f"{os.path.basename(path)} refused the rules: {words(done)}")


def shapesScript(family: Family, sctpToo: bool) -> tuple[str, dict[TableName, dict[str, list[str]]]]:
    """One rule of each shape, as a script; and what the chains hold then."""
    some = sctpShapes(family) if sctpToo else shapes(family)
    chains: dict[TableName, dict[str, list[str]]] = {name: {chain: [] for chain in CHAINS[name]} for name in TABLES}
    for name, chain, entry in some:
        chains[name][chain].append(textOf(entry))
    script = ""
    for name in TABLES:
        script += f"*{name}\n" + "".join(f":{chain} - [0:0]\n" for chain in CHAINS[name])
        script += "".join(f"-A {chain} {it}\n" for chain, rules in chains[name].items() for it in rules)
        script += "".join(f"-A {jump.hook} {textOf(jump.entry(family))}\n" for jump in JUMPS if jump.table == name)
        script += "COMMIT\n"
    return script, chains


def words(done: Finished) -> str:
    """What the program complained of, in one line; without its warnings, and its hint at the manual."""
    lines = [it.strip() for it in done.err.splitlines() if it.strip()]
    lines = [it for it in lines if not it.startswith(("#", "Try `", "Error occurred at line"))] or lines
    return (" ".join(lines) or f"exit status {done.code}")[:400]
