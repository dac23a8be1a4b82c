"""Which rule writer fits this node: ``writer = auto``; and what others have left here."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ..interfaces import IRuleWriter, KproxyError, NotAvailable, RulesNotJudged, RulesRejected
from .netlink import NetlinkSocket, SocketOpener, attributes
from .xt.watch import legacyCounts

_log = Logger()
_GETCHAIN = 10 << 8 | 4
#: Entries of a nat table without rules: four policies and the end.
_EMPTY_NAT = 5


def hasLegacyRules(openSocket: SocketOpener = socket.socket, tables: str = "/proc/net/ip_tables_names") -> bool:
    """Whether the legacy iptables of this node have rules in their nat table. Loads no module."""
    try:
        if "nat" not in Path(tables).read_text(encoding="ascii").split():
            return False
    except OSError:
        return False
    try:
        return legacyCounts(openSocket, "IPv4", "nat")[0] > _EMPTY_NAT
    except OSError:
        return False


def hasNftablesNat(openSocket: SocketOpener = socket.socket) -> bool:
    """Whether nf_tables has a chain that rewrites addresses, whoever's."""
    try:
        netlink = NetlinkSocket(openSocket)
    except OSError:
        return False
    try:
        return any(dict(attributes(answer)).get(7) == b"nat\0" for answer in netlink.dump(_GETCHAIN, 0))
    except Exception:
        return False
    finally:
        netlink.close()


def isLegacyNode() -> bool:
    """Whether the node's other rules are legacy iptables: then ours belong beside them, where operators look."""
    return hasLegacyRules() and not hasNftablesNat()


def chooseWriter(
    candidates: Iterable[tuple[str, Callable[[], Any]]],
    legacyNode: Callable[[], bool] = isLegacyNode,
) -> Deferred[IRuleWriter]:
    """
    The first writer that works here, in the order given; on a node that uses legacy iptables, ``python-iptables``
    before the others. The choice and its reason are logged.

    :param candidates: name, and what makes the writer.
    :return: fires with the writer, probed; fails with :class:`~twisted_kproxy.interfaces.NotAvailable`, which has the
        reason of each. Those that were not chosen are closed.
    """
    return Deferred.fromCoroutine(_choose(list(candidates), legacyNode))


async def _choose(candidates: list[tuple[str, Callable[[], Any]]], legacyNode: Callable[[], bool]) -> IRuleWriter:
    legacy = any(name == "python-iptables" for name, _make in candidates) and legacyNode()
    if legacy:
        candidates.sort(key=lambda it: it[0] != "python-iptables")
    reasons: list[str] = []
    for name, make in candidates:
        writer: IRuleWriter | None = None
        try:
            writer = make()
            words = await writer.probe()
        except KproxyError as error:
            reasons.append(f"{name}: {error}")
        except Exception as error:
            _log.failure("The rule writer {name} could not be tried.", name=name)
            reasons.append(f"{name}: {error!r}")
        else:
            why = "this node has rules of legacy iptables" if legacy and name == "python-iptables" else "it works here"
            if reasons:
                why += f"; {'; '.join(reasons)}"
            _log.info("Rules will be written by {name} ({words}): {why}.", name=name, words=words, why=why)
            assert writer is not None
            return writer
        if writer is not None:
            try:
                await writer.close()
            except Exception:
                _log.failure("The rule writer {name} could not be closed.", name=name)
    raise NotAvailable(f"no rule writer works here: {'; '.join(reasons) or 'there is none to try'}")


def removeLeftovers(active: IRuleWriter, others: Iterable[tuple[str, Callable[[], Any]]]) -> Deferred[list[str]]:
    """
    Remove rules of ours that another writer has written, in an earlier run with another configuration. To be called
    once the rules of the active one are in force: up to then the old ones may be all that serves.

    Where no rules are written at all (``writer = none``), none are removed either. Writers whose rules are where the
    active one's are, or who know where only after a probe, are left alone. A failure is logged and costs nothing else.

    :param others: name, and what makes the writer.
    :return: fires with the names of those that had left something.
    """
    return Deferred.fromCoroutine(_removeLeftovers(active, list(others)))


async def _removeLeftovers(active: IRuleWriter, others: list[tuple[str, Callable[[], Any]]]) -> list[str]:
    found: list[str] = []
    if active.place == "nowhere":
        return found
    done = {active.place, "", "nowhere"}
    for name, make in others:
        writer: IRuleWriter | None = None
        try:
            writer = make()
            assert writer is not None
            if writer.place in done:
                continue
            if await writer.cleanup():
                found.append(name)
                _log.info(
                    "Rules of an earlier run with another writer were removed from {place}; {active} has taken over.",
                    place=writer.place, active=active.name,
                )
            done.add(writer.place)
        except RulesRejected as error:
            if isinstance(error, RulesNotJudged):
                _log.debug("Whether {name} has left rules here cannot be found out: {error}", name=name, error=error)
            else:
                _log.warn("Rules that {name} has left cannot be removed: {error}", name=name, error=error)
        except KproxyError as error:
            # A program or library that is not installed has most probably left nothing.
            _log.debug("Whether {name} has left rules here cannot be found out: {error}", name=name, error=error)
        except Exception:
            _log.failure("Rules that {name} may have left could not be removed.", name=name)
        finally:
            if writer is not None:
                try:
                    await writer.close()
                except Exception:
                    _log.failure("The rule writer {name} could not be closed.", name=name)
    return found
