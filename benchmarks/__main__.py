"""Runs every measurement of this folder, or those named, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SECONDS = 600


def main() -> int:
    known = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    unknown = sorted(set(sys.argv[1:]) - set(known))
    if unknown:
        print(f"there is no benchmark {', '.join(unknown)}; there is {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for name in sys.argv[1:] or known:
        print(f"=== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        try:
            failed += subprocess.run(command, cwd=FOLDER.parent, timeout=SECONDS).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{name} took longer than {SECONDS} s", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
