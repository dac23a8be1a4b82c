"""Waiting for what another process does."""

from __future__ import annotations

import http.client
import threading
import time
from typing import Any


def isRunning(pid: int) -> bool:
    """Whether there is such a process. One that has ended may stay until its parent, or who inherits it, asks."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waitFor(what: Any, seconds: float = 10, step: float = 0.02, stop: threading.Event | None = None) -> Any:
    """
    Ask until the answer is true, and give it. For tests that wait for another process.

    :raise AssertionError: after so many seconds, with the last exception that asking raised.
    """
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end and not (stop and stop.is_set()):
        try:
            if answer := what():
                return answer
            last = None
        except (OSError, http.client.HTTPException, AssertionError) as error:
            last = error
        time.sleep(step)
    raise AssertionError(f"it did not come to be within {seconds} s" + (f": {last}" if last else ""))
