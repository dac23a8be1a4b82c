"""
The process that python-iptables lives in: ``python -m twisted_kproxy.netfilter.xt.worker``.

The library redirects descriptor 1 while it looks at a rule, ends the process on some errors, and must not meet a
second thread: so it gets a process of its own, which takes one call after the other from descriptor 3 and answers on
4 (:mod:`~twisted_kproxy.netfilter.xt.wire`). It ends when descriptor 3 does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import msgspec

from .wire import REPLIES, REQUESTS, FrameBuffer, Reply, Request, decodeRequest, framed

Serve = Callable[[Request], Reply]

_INSTALL = (
    "the iptables writer needs python-iptables (pip install python-iptables) and the libraries libxtables, libip4tc "
    "and libip6tc (apt install iptables, or dnf install iptables-legacy)"
)


def opened() -> Serve:
    """
    Import the library and give what serves a call. Where that cannot be, each call is answered with the reason.
    """
    try:
        from .engine import Engine
    except Exception as error:  # the library lets anything out: TypeError for want of libxtables, PermissionError, …
        reason = f"{_INSTALL}; importing it failed with {type(error).__name__}: {error}"
        return lambda request: Reply(error=reason, unavailable=True, leaving=True)
    return Engine().serve


def answered(serve: Serve, data: bytes) -> Reply:
    """One call. An error that nobody foresaw ends the worker, after it has been told."""
    begin = time.monotonic()
    try:
        reply = serve(decodeRequest(data))
    except msgspec.DecodeError as error:
        reply = Reply(error=f"the call cannot be read: {error}")
    except Exception as error:
        traceback.print_exc()
        reply = Reply(error=f"{type(error).__name__}: {error}", leaving=True)
    return msgspec.structs.replace(reply, seconds=time.monotonic() - begin)


def main(requests: int = REQUESTS, replies: int = REPLIES) -> None:
    """Serve until there are no more requests."""
    # The service's stop signal goes to the whole group; whether this process is still needed the daemon knows.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    serve: Serve | None = None
    frames = FrameBuffer()
    while data := os.read(requests, 1 << 20):
        for message in frames.feed(data):
            serve = serve or opened()
            reply = answered(serve, message)
            _writeAll(replies, framed(reply))
            if reply.leaving:
                return


def _writeAll(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        pass  # the daemon is gone
    sys.stdout.flush()
