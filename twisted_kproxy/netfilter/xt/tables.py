"""
The tables of the kernel, by python-iptables: a handle that is read, edited and committed, under the lock of xtables.

For the worker process only. The library talks to libiptc; of its own parsers only those of the fixed rules are used
here (:func:`ruleOf`), bulk rules go in as bytes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import iptc
import iptc.ip4tc
import iptc.xtables

from ...core.rules import PROXY_MARK, Target
from ...core.values import Family, hostPort
from .layout import CHAINS, HOOKS, JUMPS, LATER, PREFIX, Jump, TableName
from .packed import REJECT, RESET, Entry, UnknownBytes, normalised, pack

#: Of every version of iptables since 1.4.20; later ones let the environment say otherwise.
LOCK_FILE = "/run/xtables.lock"


class Busy(Exception):
    """Somebody else kept the lock of xtables for too long."""


class Refused(Exception):
    """The kernel or libiptc refused a change; the text says which."""


class Gone(Refused):
    """What was to be edited is not there: somebody else has changed our rules."""


class Collision(Exception):
    """Somebody changed the table between our read and our commit, without the lock: try again."""


class Lock:
    """
    The lock that iptables, ip6tables and their restore programs take (``flock``).

    Without it a commit silently reverts what another program has committed since the table was read.
    """

    def __init__(self, seconds: float) -> None:
        self.path = os.environ.get("XTABLES_LOCKFILE") or LOCK_FILE
        self._seconds = seconds
        self._fd = -1
        self.waited = 0.0
        self._since = 0.0

    def __enter__(self) -> Lock:
        begin = time.monotonic()
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # flock() has no time limit of its own; a handler that raises ends it, as in iptables -w.
        previous = signal.signal(signal.SIGALRM, self._alarm)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        self._since = time.monotonic()
        self.waited = self._since - begin
        return self

    def __exit__(self, kind: type[BaseException] | None, it: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    @property
    def held(self) -> float:
        """Seconds since it was taken."""
        return time.monotonic() - self._since

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        raise Busy(
            f"another program has kept {self.path} locked for {self._seconds:.0f} s; find it with: fuser -v {self.path}"
        )


def inWords(error: Exception) -> str:
    """What the library says; it prints libiptc's own words as Python writes bytes."""
    words = re.sub(r"b(['\"])(.*)\1", r"\2", str(error))
    return f"{words}: this needs root, or CAP_NET_ADMIN" if "ermission denied" in words else words


# --- without opening anything ----------------------------------------------------------------------------------------

_NAMES = {"IPv4": "/proc/self/net/ip_tables_names", "IPv6": "/proc/self/net/ip6_tables_names"}
_INFO = struct.Struct("=32sI5I5III")  # name, valid_hooks, hook_entry, underflow, num_entries, size
_SO_GET_INFO = 64
_libc = ctypes.CDLL(None, use_errno=True)


def tableNames(family: Family) -> set[str]:
    """
    The legacy tables that there are in this network namespace. Asking the kernel for one would bring it into being,
    and with it the hooks that every packet passes.
    """
    try:
        with open(_NAMES[family], encoding="ascii") as file:
            return set(file.read().split())
    except OSError:
        return set()


def counts(family: Family, table: TableName) -> tuple[int, int] | None:
    """Number of rules and size in bytes of a table that there is; takes some microseconds however large it is."""
    af, level = (socket.AF_INET, socket.IPPROTO_IP) if family == "IPv4" else (socket.AF_INET6, socket.IPPROTO_IPV6)
    buffer = ctypes.create_string_buffer(table.encode(), _INFO.size)
    length = ctypes.c_uint(_INFO.size)
    with socket.socket(af, socket.SOCK_RAW, socket.IPPROTO_RAW) as it:
        if _libc.getsockopt(it.fileno(), int(level), _SO_GET_INFO, buffer, ctypes.byref(length)) != 0:
            return None
    fields = _INFO.unpack(buffer.raw)
    return fields[12], fields[13]


# --- the Rule API ----------------------------------------------------------------------------------------------------


def ruleOf(entry: Entry, table: Any) -> Any:
    """
    A rule by the library's own Rule API, from libxtables' parsers.

    :param table: the library's Table that the rule is for. It would otherwise look for a chain to jump to in all
        five tables, and thereby bring those into being that nobody uses.
    """
    base = iptc.Rule if entry.family == "IPv4" else iptc.Rule6

    class OneTableRule(base):  # type: ignore[misc, valid-type]
        tables = (table,)

    rule = OneTableRule()
    if entry.protocol:
        rule.protocol = entry.protocol.lower()
    if entry.source:
        rule.src = entry.source
    if entry.destination:
        rule.dst = entry.destination
    if entry.interface:
        # By libxtables itself: of IPv6 the library would have the kernel compare no more than a bit of each letter.
        name, mask = ctypes.create_string_buffer(16), ctypes.create_string_buffer(16)
        iptc.xtables._lib_xtables.xtables_parse_interface(entry.interface.encode(), name, mask)
        head = rule.entry.ip if entry.family == "IPv4" else rule.entry.ipv6
        head.iniface, head.iniface_mask = name.raw, mask.raw
    rule.create_match("comment").set_parameter("comment", entry.comment)
    if entry.protocol and entry.port:
        rule.create_match(entry.protocol.lower()).set_parameter("dport", str(entry.port))
    if entry.sourceLocal or entry.destinationLocal:
        match = rule.create_match("addrtype")
        if entry.sourceLocal:
            match.set_parameter("src-type", "LOCAL")
        if entry.destinationLocal:
            match.set_parameter("dst-type", "LOCAL")
    if entry.state:
        rule.create_match("conntrack").set_parameter("ctstate", entry.state)
    if entry.unmarked:
        rule.create_match("mark").set_parameter("mark", f"!{PROXY_MARK:#x}/{PROXY_MARK:#x}")
    if isinstance(entry.target, Target):
        there = hostPort(entry.target.address, entry.target.port)
        rule.create_target("DNAT").set_parameter("to-destination", there)
    elif entry.target in (REJECT, RESET):
        port = "icmp-port-unreachable" if entry.family == "IPv4" else "icmp6-port-unreachable"
        reason = "tcp-reset" if entry.target == RESET else port
        rule.create_target("REJECT").set_parameter("reject-with", reason)
    else:
        rule.create_target(entry.target)
    return rule


# --- tables ----------------------------------------------------------------------------------------------------------


class LiveTable:
    """
    One table, read once, edited in memory, committed once.

    :ivar dirty: there is something to commit.
    """

    def __init__(self, family: Family, name: TableName) -> None:
        self.family = family
        self.name: TableName = name
        self.dirty = False
        # autocommit would swallow errors, and commit each rule alone.
        make = iptc.Table if family == "IPv4" else iptc.Table6
        self.library = self._tried(lambda: make(name, autocommit=False), "read")

    def __str__(self) -> str:
        return f"{self.family} {self.name}"

    def refresh(self) -> None:
        """Read it anew; what was not committed is forgotten."""
        self.dirty = False
        self._tried(self.library.refresh, "read")

    def close(self) -> None:
        """Let go of the handle, which is as large as the table."""
        self.library.close()

    def commit(self) -> None:
        """
        Make what was edited the state in force, in one step of the kernel's. The handle is dead afterwards.

        :raise Collision: when the number of rules is another by now.
        """
        if not self.dirty:
            return
        try:
            self.library.commit()
        except iptc.IPTCError as error:
            number = iptc.ip4tc._get_errno_loc()[0]
            if number == errno.EAGAIN or "temporarily unavailable" in str(error):
                raise Collision(inWords(error)) from None
            raise Refused(f"{self}: {inWords(error)}") from None
        self.dirty = False

    # What there is.

    def isChain(self, chain: str) -> bool:
        return bool(self.library.is_chain(chain))

    def ownChains(self) -> list[str]:
        """Every chain under our prefix, of whichever version."""
        return [chain.name for chain in self.library.chains if chain.name.startswith(PREFIX)]

    def rules(self, chain: str) -> Iterator[tuple[bytes, str]]:
        """Each rule of a chain: its bytes as read, and the chain or verdict that it leads to (or ``""``)."""
        entry = self.library.first_rule(chain)
        while entry:
            data = ctypes.string_at(ctypes.addressof(entry), entry.next_offset)
            target = self.library.get_target(entry)
            yield data, (target or b"").decode("ascii", "replace")
            entry = self.library.next_rule(entry)

    def content(self) -> dict[str, list[bytes]] | None:
        """
        What our chains hold; ``None`` when none of them exists.

        :raise UnknownBytes: where one is missing that earlier versions had, or holds a rule that cannot be one of ours.
        """
        own = set(self.ownChains())
        if not own:
            return None
        if own | LATER != set(CHAINS[self.name]) | LATER:
            raise UnknownBytes(f"{self} has the chains {', '.join(sorted(own))}")
        return {chain: self.normalised(chain) if chain in own else [] for chain in CHAINS[self.name]}

    def isOlder(self) -> bool:
        """Whether chains are missing that an earlier version did not have."""
        return not set(CHAINS[self.name]) <= set(self.ownChains())

    def normalised(self, chain: str) -> list[bytes]:
        """:raise UnknownBytes: where a rule cannot be one of ours."""
        return [self.normal(data, target) for data, target in self.rules(chain)]

    def normal(self, data: bytes, target: str) -> bytes:
        """One rule, as :meth:`rules` gives it, in the form in which it can be compared."""
        return normalised(self.family, data, target if target.startswith(PREFIX) else "")

    def jumps(self, hook: str) -> list[tuple[int, str, bytes]]:
        """The rules of a built-in chain that lead to ours: ``(index, chain, bytes)``."""
        found = []
        for index, (data, target) in enumerate(self.rules(hook)):
            if target.startswith(PREFIX):
                found.append((index, target, normalised(self.family, data, target)))
        return found

    def jumpsStand(self) -> bool:
        """
        Whether each jump is there, once, as it is written, and in the right order among ours.

        That somebody else has put a rule before them is no reason to move them: programs that insist on being first
        (Calico in its insert mode) would do the same, for ever.
        """
        for hook in HOOKS[self.name]:
            expected = [pack(jump.entry(self.family)) for jump in JUMPS if (jump.table, jump.hook) == (self.name, hook)]
            if [data for _, _, data in self.jumps(hook)] != expected:
                return False
        return True

    # Edits: in memory, up to commit().

    def append(self, chain: str, entries: Iterable[bytes]) -> None:
        append = self.library.append_entry
        try:
            for data in entries:
                self.dirty = True
                append(chain, data)
        except iptc.IPTCError as error:
            raise Refused(f"{self}: cannot append to {chain}: {inWords(error)}") from None

    def prepend(self, chain: str, data: bytes) -> None:
        """Put a rule at the head of a chain."""
        self.dirty = True
        self._tried(lambda: self.library.insert_entry(chain, data, 0), f"put a rule at the head of {chain}")

    def delete(self, chain: str, entries: Iterable[bytes]) -> None:
        """
        Delete the first rule of the chain that is this one, for each.

        :raise Gone: where there is none.
        """
        for data in entries:
            self.dirty = True
            try:
                self.library.delete_entry(chain, data, b"\xff" * len(data))
            except iptc.IPTCError as error:
                raise Gone(f"a rule that was written is no longer in {chain} of {self}: {inWords(error)}") from None

    def clear(self, chain: str) -> None:
        """Make the chain exist, and empty."""
        self.dirty = True
        act = self.library.flush_entries if self.isChain(chain) else self.library.create_chain
        self._tried(lambda: act(chain), f"prepare {chain}")

    def deleteAt(self, chain: str, index: int) -> None:
        self.dirty = True
        number = ctypes.c_uint(index)
        if self.library._iptc.iptc_delete_num_entry(chain.encode(), number, self.library._handle) != 1:
            raise Refused(f"{self}: cannot delete rule {index} of {chain}: {self.library.strerror()}")

    def placeJumps(self) -> None:
        """Put each jump where it belongs: before everybody else's rules, or behind them. What is right stays."""
        for hook in HOOKS[self.name]:
            jumps = [jump for jump in JUMPS if (jump.table, jump.hook) == (self.name, hook)]
            if not self._placed(hook, jumps):
                self.removeJumps(hook)
                chain = iptc.Chain(self.library, hook)
                for index, jump in enumerate(jump for jump in jumps if not jump.last):
                    self._place(jump, partial(chain.insert_rule, position=index))
                for jump in jumps:
                    if jump.last:
                        self._place(jump, chain.append_rule)

    def _placed(self, hook: str, jumps: list[Jump]) -> bool:
        found = self.jumps(hook)
        total = sum(1 for _ in self.rules(hook))
        firsts = sum(1 for jump in jumps if not jump.last)
        lasts = len(jumps) - firsts
        places = [*range(firsts), *range(total - lasts, total)]
        return [it[0] for it in found] == places and [it[2] for it in found] == [
            pack(jump.entry(self.family)) for jump in jumps
        ]

    def _place(self, jump: Jump, put: Callable[[Any], None]) -> None:
        self.dirty = True
        self._tried(lambda: put(ruleOf(jump.entry(self.family), self.library)), f"lead {jump.hook} to {jump.chain}")

    def removeJumps(self, hook: str) -> None:
        for index, _, _ in reversed(self.jumps(hook)):
            self.deleteAt(hook, index)

    def removeOwn(self, keep: Iterable[str] = ()) -> tuple[str, ...]:
        """
        Remove our chains, and the built-in chains' rules that lead to them.

        :param keep: chains that stay, with their jumps.
        :return: what could not be removed, since somebody else's rules lead there; these are empty now.
        """
        doomed = [chain for chain in self.ownChains() if chain not in set(keep)]
        for hook in [chain.name for chain in self.library.chains if self.library.builtin_chain(chain)]:
            for index, chain, _ in reversed(self.jumps(hook)):
                if chain in doomed:
                    self.deleteAt(hook, index)
        for chain in doomed:
            self.clear(chain)
        stuck = []
        for chain in doomed:
            try:
                self.library.delete_chain(chain)
            except iptc.IPTCError:
                stuck.append(chain)
        return tuple(stuck)

    def _tried(self, act: Callable[[], Any], what: str) -> Any:
        try:
            return act()
        except iptc.IPTCError as error:
            raise Refused(f"{self.family} tables: cannot {what}: {inWords(error)}") from None
