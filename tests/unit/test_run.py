"""The runner of the tests: that what it counts is what happened."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from twisted.trial.reporter import TestResult
from twisted.trial.runner import ErrorHolder, TestLoader
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests import run
from tests.run import Counts, collect, counted, layers, runIn


class Mixed:
    """One of everything; made a test case only where it is wanted."""

    def test_passes(self) -> None:
        pass

    def test_fails(self) -> None:
        self.fail("on purpose")  # type: ignore[attr-defined]

    def test_breaks(self) -> None:
        raise RuntimeError("on purpose")

    def test_skips(self) -> None:
        raise SkipTest("on purpose")

    def test_expected(self) -> None:
        self.fail("on purpose")  # type: ignore[attr-defined]

    test_expected.todo = "on purpose"  # type: ignore[attr-defined]


class RunTests(SynchronousTestCase):
    """Counting and its honesty."""

    def test_counts(self) -> None:
        """Failures and errors have failed, expected failures have passed, skips are skips."""
        result = TestResult()
        TestLoader().loadClass(type("MixedTests", (Mixed, SynchronousTestCase), {})).run(result)
        self.assertEqual(counted(result), Counts(passed=2, failed=2, skipped=1))

    def test_unloadable(self) -> None:
        """A module that cannot be imported has failed."""
        result = TestResult()
        ErrorHolder("tests.none", (ImportError, ImportError("on purpose"), None)).run(result)
        self.assertEqual(counted(result), Counts(failed=1))

    def test_summary(self) -> None:
        """The line that others read."""
        total = Counts(3, 1, 0).plus(Counts(1, 0, 2))
        self.assertEqual(str(total), "4 passed, 1 failed, 2 skipped")

    def test_statuses(self) -> None:
        """An exit status is given as it is; an end by a signal or for lack of time is no status."""
        self.assertEqual(runIn([sys.executable, "-c", "raise SystemExit(3)"], 60), 3)
        died = runIn([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60)
        self.assertEqual(died, "ended by SIGKILL")
        late = runIn([sys.executable, "-c", "import signal; signal.pause()"], 1)
        self.assertRegex(str(late), "took longer than the 1 s")

    def test_noInput(self) -> None:
        """Nothing can wait for input."""
        self.assertEqual(runIn([sys.executable, "-c", "import sys; sys.exit(len(sys.stdin.read()))"], 60), 0)

    def collected(self, counts: object, status: int) -> tuple[Counts, str]:
        file = Path(self.mktemp()).absolute()
        program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); sys.exit(int(sys.argv[3]))"
        return collect([sys.executable, "-c", program, str(file), json.dumps(counts), str(status)], file, 60)

    def test_collected(self) -> None:
        """What a runner wrote is what counts, with the exit status that goes with it."""
        self.assertEqual(self.collected([5, 0, 1], 0), (Counts(5, 0, 1), ""))
        self.assertEqual(self.collected([5, 2, 1], 1), (Counts(5, 2, 1), ""))

    def test_contradiction(self) -> None:
        """A runner that counts no failure and yet ends with an error has failed."""
        counts, remark = self.collected([5, 0, 0], 1)
        self.assertEqual(counts, Counts(passed=5, failed=1))
        self.assertTrue(remark)

    def test_nothingRan(self) -> None:
        """No tests at all are a failure, however well they went; so are counts that cannot be read."""
        for written in ([0, 0, 0], None, [1, 2, 3, 4]):
            counts, remark = self.collected(written, 0)
            self.assertEqual(counts, Counts(failed=1), written)
            self.assertTrue(remark)

    def test_crashedRunner(self) -> None:
        """A runner that dies before it has counted is a failure, not nothing."""
        program = "import os; os.kill(os.getpid(), 11)"
        counts, remark = collect([sys.executable, "-c", program], Path(self.mktemp()).absolute(), 60)
        self.assertEqual(counts, Counts(failed=1))
        self.assertIn("SIGSEGV", remark)

    def test_parts(self) -> None:
        """Every module of a layer is in one of its parts, and in one only."""
        for layer in run.layers():
            parts = run.parts(layer)
            found = sorted(name for names in parts for name in names)
            wanted = sorted(f"tests.{layer}.{it.stem}" for it in run.TESTS.joinpath(layer).glob("test_*.py"))
            self.assertEqual(found, wanted)
            self.assertTrue(all(parts))

    def test_layers(self) -> None:
        """Every folder with tests is a layer; the quick one comes first."""
        self.assertEqual(layers()[0], "unit")
        self.assertIn("packaging", layers())
