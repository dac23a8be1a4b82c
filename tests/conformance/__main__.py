"""Writes ``docs/conformance.rst``: ``python -m tests.conformance``, or elsewhere: ``… FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from .page import page
from .pipeline import WRITERS, faults
from .table import rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.rst"


def main() -> int:
    """Nothing is written while a row does not hold."""
    every = rows()
    wrong = [fault for row in every for writer in WRITERS for fault in faults(row, writer)]
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(every, WRITERS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
