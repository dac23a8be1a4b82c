"""
The self-check: are the bytes that are packed here those that libxtables would have made on this machine, and does
this kernel take them?

It runs in forked children of the worker, one for each family, since the library can use NAT targets of one family per
process only; and where it may, in network namespaces that end with them, so that it leaves no trace.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from msgspec import Struct

from ...core.values import FAMILIES, Family
from . import tables as xttables
from .layout import CHAINS, JUMPS, TABLES, TableName
from .packed import Entry, pack
from .shapes import sctpShapes, shapes

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_SECONDS = 20.0
_libc = ctypes.CDLL(None, use_errno=True)


class Checked(Struct, frozen=True):
    """
    What was found.

    :ivar missing: family → why its rules cannot be written; what is not in here works.
    :ivar sctp: family → why those of SCTP cannot be.
    :ivar scratch: it was tried against the kernel, in namespaces of its own.
    """

    missing: dict[Family, str]
    sctp: dict[Family, str]
    scratch: bool

    def text(self) -> str:
        """For the log."""
        try:
            library = f"python-iptables {version('python-iptables')}"
        except PackageNotFoundError:
            library = "python-iptables"
        families = " and ".join(family for family in FAMILIES if family not in self.missing)
        words = (
            f"{library}, legacy tables for {families}: iptables-legacy-save and ip6tables-legacy-save show the rules"
        )
        if not self.scratch:
            words += "; not tried against the kernel, for want of a scratch network namespace"
        for family, reason in self.missing.items():
            words += f"; no {family}: {reason}"
        if self.sctp:
            words += f"; no SCTP: {next(iter(self.sctp.values()))}"
        return words


def run() -> Checked:
    """Check both families."""
    missing: dict[Family, str] = {}
    sctp: dict[Family, str] = {}
    scratch = True
    for family in FAMILIES:
        found = _inChild(lambda family=family: _checkFamily(family))  # type: ignore[misc]
        scratch = scratch and found.get("scratch", True)
        if found.get("error"):
            missing[family] = found["error"]
        elif found.get("sctp"):
            sctp[family] = found["sctp"]
    return Checked(missing, sctp, scratch)


def _checkFamily(family: Family) -> dict[str, Any]:
    scratch = _libc.unshare(_CLONE_NEWNET) == 0
    found: dict[str, Any] = {"scratch": scratch}
    try:
        tables = {name: xttables.LiveTable(family, name) for name in TABLES}
        for table in tables.values():
            table.refresh()
    except xttables.Refused as error:
        module = "ip_tables" if family == "IPv4" else "ip6_tables"
        if "CAP_NET_ADMIN" in str(error):
            found["error"] = str(error)
            return found
        found["error"] = (
            f"the kernel has no legacy tables ({error}): modprobe {module}; on a node that has nf_tables only, "
            "say writer = nftables"
        )
        return found
    found["error"] = _tried(tables, shapes(family), scratch, withJumps=True)
    if not found["error"]:
        for table in tables.values():
            table.refresh()
        found["sctp"] = _tried(tables, sctpShapes(family), scratch, withJumps=False)
    return found


def _tried(
    tables: dict[TableName, xttables.LiveTable],
    entries: list[tuple[TableName, str, Entry]],
    scratch: bool,
    withJumps: bool,
) -> str:
    """Compare, then write and read back; gives what is wrong."""
    try:
        for name, table in tables.items():
            for chain in CHAINS[name]:
                table.clear(chain)
        jumps = [(jump.table, jump.chain, jump.entry(tables["nat"].family)) for jump in JUMPS] if withJumps else []
        for name, _, entry in [*entries, *jumps]:
            rule = xttables.ruleOf(entry, tables[name].library)
            rule.final_check()
            if bytes(rule.rule) != pack(entry):
                return (
                    f"libxtables of this machine writes {entry} in another way than is known here; "
                    "say writer = nftables, and report this line"
                )
        if not scratch:
            return ""
        expected: dict[tuple[TableName, str], list[bytes]] = {}
        for name, chain, entry in entries:
            expected.setdefault((name, chain), []).append(pack(entry))
        for (name, chain), data in expected.items():
            tables[name].append(chain, data)
        for table in tables.values():
            table.placeJumps()
            table.commit()
            table.refresh()
        for (name, chain), data in expected.items():
            if (tables[name].content() or {}).get(chain) != data:
                return f"the kernel gives the rules of {chain} back otherwise than they were written"
        if not all(table.jumpsStand() for table in tables.values()):
            return "the kernel gives the rules that lead to our chains back otherwise than they were written"
    except Exception as error:
        return f"{error} (is an extension of xtables missing? they come with the packages iptables and linux-modules)"
    return ""


def _inChild(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run it in a child, and give what it returns."""
    readEnd, writeEnd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _asChild(work, writeEnd)
    os.close(writeEnd)
    data = b""
    try:
        while select.select([readEnd], [], [], _SECONDS)[0]:
            more = os.read(readEnd, 65536)
            if not more:
                break
            data += more
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(readEnd)
        _, status = os.waitpid(pid, 0)
    try:
        return dict(json.loads(data))
    except ValueError:
        return {"error": f"the self-check of libxtables ended with {os.waitstatus_to_exitcode(status)}"}


def _asChild(work: Callable[[], dict[str, Any]], writeEnd: int) -> None:
    """Never returns: no finally clause or exit function of the worker must run in here."""
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            found = work()
        except Exception as error:
            found = {"error": f"the self-check failed: {type(error).__name__}: {error}"}
        os.write(writeEnd, json.dumps(found).encode())
    finally:
        os._exit(0)
