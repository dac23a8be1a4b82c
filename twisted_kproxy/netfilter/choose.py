"""Which rule writer fits this node: ``writer = auto``."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ..interfaces import IRuleWriter, KproxyError, NotAvailable
from .netlink import NetlinkSocket, SocketOpener, attributes

_log = Logger()
_GETCHAIN = 10 << 8 | 4
_SO_GET_INFO = 64
_INFO = struct.Struct("=32sI5I5III")
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
        with openSocket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as it:
            buffer = ctypes.create_string_buffer(b"nat", _INFO.size)
            size = ctypes.c_uint32(_INFO.size)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.getsockopt(it.fileno(), socket.IPPROTO_IP, _SO_GET_INFO, buffer, ctypes.byref(size)):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return bool(_INFO.unpack(buffer.raw)[12] > _EMPTY_NAT)
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
