"""
Runs measurements of this folder, each in a process of its own: ``python -m benchmarks [NAME ...] [WORD ...]``.

Without a name that of the data plane; ``all`` is every one. Words that are no names go to the one that is run:
``python -m benchmarks --quick``, ``python -m benchmarks requests kproxy``, ``python -m benchmarks rules connect``.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DEFAULT = "dataplane"
SECONDS = 900


def main() -> int:
    known = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    known += sorted(path.parent.name for path in FOLDER.glob("*/__main__.py"))
    names = list(takewhile(lambda it: it in known or it == "all", sys.argv[1:]))
    words = sys.argv[1 + len(names) :]
    if words and (len(names) > 1 or "all" in names):
        print(f"{' '.join(words)}: for which one? There is {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for name in known if "all" in names else names or [DEFAULT]:
        print(f"=== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *words]
        try:
            failed += subprocess.run(command, cwd=FOLDER.parent, timeout=SECONDS).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{name} took longer than {SECONDS} s", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
