"""What work costs, whatever else the machine does meanwhile."""

from __future__ import annotations

import os
from pathlib import Path


def spent(*pids: int) -> float:
    """Seconds of a processor that this process, programs that it has seen end, and these processes have used."""
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[11:13]))
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")
