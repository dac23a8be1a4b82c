"""The table of recordings in the documentation against the folder and the tests."""

from __future__ import annotations

import importlib
import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.recordings import everyName

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "recordings.rst"
NOT_OURS = "Not for this client"


class Row(Struct, frozen=True):
    """One row: patterns of recordings, and tests."""

    recordings: list[str]
    tests: list[str]


def quoted(cell: str) -> list[str]:
    return re.findall(r"``([^`]+)``", cell)


def rowsOf(text: str) -> list[Row]:
    rows = []
    for row in text.split("\n   * - ")[1:]:
        cells = row.split("\n     - ")
        if quoted(cells[0]):
            rows.append(Row(quoted(cells[0]), quoted(cells[-1])))
    return rows


class TableTests(SynchronousTestCase):
    """Nothing is missing, nothing is made up."""

    def setUp(self) -> None:
        replayed, others = DOCUMENT.read_text().split(f"\n{NOT_OURS}\n")
        self.replayed, self.others = rowsOf(replayed), rowsOf(others)

    def test_everyRecording(self) -> None:
        """Each recording is in one row, and only one."""
        rows = self.replayed + self.others
        for name in everyName():
            exact = [row for row in rows if name in row.recordings]
            found = exact or [row for row in rows if any(fnmatchcase(name, it) for it in row.recordings)]
            self.assertEqual(len(found), 1, name)

    def test_everyRowHasItsRecordings(self) -> None:
        """What is said to be replayed is in the folder."""
        names = everyName()
        for row in self.replayed:
            for pattern in row.recordings:
                self.assertTrue([name for name in names if fnmatchcase(name, pattern)], pattern)

    def test_tests(self) -> None:
        """Each row names tests that exist, and one of their modules speaks of each of its recordings."""
        for row in self.replayed:
            self.assertTrue(row.tests, row.recordings)
            sources = ""
            for test in row.tests:
                module, suite, method = test.split(".")
                found = importlib.import_module(f"tests.unit.test_{module}")
                self.assertTrue(callable(getattr(getattr(found, suite), method)), test)
                sources += inspect.getsource(found)
            for name in row.recordings:
                # Pages are counted, and what a watch starts from is found by the watch's name.
                stem = re.sub(r"\*.*|\.(start|end)$", "", name.rpartition("/")[2])
                self.assertIn(stem or ".end", sources, name)
