"""
Runs the tests layer by layer, in processes of their own, two at a time, by trial; counts what trial says. What a
process says is printed when it is through.

``python -m tests.run [LAYER ...]``; without layers all of them: every folder of :file:`tests/` with ``test_*.py`` in
it. ``--lint`` runs the static checks first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple

from twisted.trial.reporter import TreeReporter
from twisted.trial.runner import TestLoader, TrialRunner

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ORDER = ("unit", "integration", "packaging")
#: how many processes run at a time
AT_ONCE = 2
CHECKS = (("ruff", "check", "."), ("mypy",), ("lint-imports",))


_running: set[subprocess.Popen[bytes]] = set()


class Counts(NamedTuple):
    """What became of tests; a check that fails is a failure too."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def layers() -> list[str]:
    """The folders that have tests, the quick ones first."""
    found = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    return [*(name for name in ORDER if name in found), *sorted(found - set(ORDER))]


def counted(result: Any) -> Counts:
    """Trial's own result; what was expected to fail and did has passed."""
    return Counts(
        passed=result.successes + len(result.expectedFailures) + len(result.unexpectedSuccesses),
        failed=len(result.failures) + len(result.errors),
        skipped=len(result.skips),
    )


class Timed(TreeReporter):
    """Tells in the end which tests took longest."""

    def startTest(self, test: Any) -> None:
        self._began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        self._took.append((time.monotonic() - self._began, test.id()))

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._took: list[tuple[float, str]] = []

    def done(self) -> None:
        super().done()
        self._writeln("Slowest:")
        for seconds, name in sorted(self._took, reverse=True)[:12]:
            self._writeln(f"{seconds:7.1f} s  {name}")


def parts(layer: str) -> list[list[str]]:
    """
    The modules of a layer, as they are put together in processes. Those of integration wait more than they compute:
    each has its own, the longest first. Packaging builds one thing for all.
    """
    sizes = sorted(((it.stat().st_size, it.stem) for it in TESTS.joinpath(layer).glob("test_*.py")), reverse=True)
    count = {"unit": AT_ONCE, "integration": len(sizes)}.get(layer, 1)
    loads: list[tuple[int, list[str]]] = [(0, []) for _ in range(count)]
    for size, name in sizes:
        index = min(range(count), key=lambda it: loads[it][0])
        loads[index] = (loads[index][0] + size, [*loads[index][1], f"tests.{layer}.{name}"])
    return [sorted(names) for _, names in loads]


def runHere(layer: str, part: int, file: str) -> int:
    """Run one part of a layer in this process, and write its counts to a file once it is through."""
    suite = TestLoader().loadByNames(parts(layer)[part])
    runner = TrialRunner(Timed, workingDirectory=f"_trial_temp_{layer}_{part}")
    result = runner.run(suite)
    Path(file).write_text(json.dumps(counted(result)))
    return 0 if result.wasSuccessful() else 1


def runIn(command: list[str], seconds: float, output: IO[bytes] | None = None) -> int | str:
    """
    Run a command without input.

    :param output: takes what it says.
    :return: its exit status, or in words why there is none that counts.
    """
    errors = subprocess.STDOUT if output is not None else None
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
    )
    _running.add(process)
    try:
        status = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        _end(process)
        return f"took longer than the {seconds:.0f} s that were left"
    except BaseException:
        _end(process)
        raise
    finally:
        _running.discard(process)
    return f"ended by {signal.Signals(-status).name}" if status < 0 else status


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, politely first: tests have namespaces to remove."""
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def runLayer(layer: str, seconds: float) -> tuple[Counts, str]:
    """Run one layer, each part in a process of its own. Counts, and what else there is to say."""
    end = time.monotonic() + seconds
    printing = Lock()

    def run(part: int) -> tuple[Counts, str]:
        file = Path(folder, f"counts{part}.json")
        command = [sys.executable, "-u", "-m", "tests.run", "--here", str(file), "--part", str(part), layer]
        with tempfile.TemporaryFile(dir=folder) as output:
            result = collect(command, file, end - time.monotonic(), output)
            output.seek(0)
            with printing:
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
        return result

    with tempfile.TemporaryDirectory(prefix="kproxy-tests-") as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            results = list(pool.map(run, range(len(parts(layer)))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for it in list(_running):
                _end(it)
            raise
    total = Counts()
    for counts, _ in results:
        total = total.plus(counts)
    return total, "; ".join(remark for _, remark in results if remark)


def collect(
    command: list[str], file: Path, seconds: float, output: IO[bytes] | None = None
) -> tuple[Counts, str]:
    """Run what writes its counts to a file. Whatever keeps it from that, or contradicts them, is a failure."""
    status = runIn(command, seconds, output)
    try:
        counts = Counts(*json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return Counts(failed=1), f"the runner did not finish: {status}"
    if isinstance(status, str) or (status != 0 and not counts.failed):
        return counts.plus(Counts(failed=1)), f"the runner: {status}"
    if not sum(counts):
        return Counts(failed=1), "there was not a single test"
    return counts, ""


def check(command: tuple[str, ...], seconds: float) -> tuple[Counts, str]:
    """Run one static check, out of this interpreter's environment."""
    name, *arguments = command
    status = runIn([str(Path(sys.executable).parent / name), *arguments], seconds)
    return (Counts(), "") if status == 0 else (Counts(failed=1), f"failed: {status}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run")
    parser.add_argument("layer", nargs="*", help=f"of {', '.join(layers())}; by default all")
    parser.add_argument("--lint", action="store_true", help="run the static checks first")
    parser.add_argument("--no-tests", action="store_true", help="run no tests")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for everything")
    parser.add_argument("--summary", help="write the summary to this file instead of printing it")
    parser.add_argument("--here", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return runHere(options.layer[0], options.part, options.here)
    unknown = sorted(set(options.layer) - set(layers()))
    if unknown:
        parser.error(f"there is no layer {', '.join(unknown)}; there is {', '.join(layers())}")
    # As an exception, so that what is running is ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    end = time.monotonic() + options.limit
    rows: list[tuple[str, Counts, float, str]] = []

    def row(name: str, work: Any, *arguments: Any) -> None:
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        if began >= end:
            counts, remark = Counts(failed=1), "no time was left for it"
        else:
            counts, remark = work(*arguments, end - began)
        rows.append((name, counts, time.monotonic() - began, remark))

    for command in CHECKS if options.lint else ():
        row(" ".join(command), check, command)
    for layer in () if options.no_tests else options.layer or layers():
        row(layer, runLayer, layer)

    total = Counts()
    print()
    for name, counts, seconds, remark in rows:
        total = total.plus(counts)
        said = str(counts) if sum(counts) and not (sum(counts) == counts.failed == 1 and remark) else ""
        print(f"{name:<14} {seconds:7.1f} s  {'; '.join(it for it in (said, remark) if it) or 'clean'}")
    if options.summary:
        Path(options.summary).write_text(f"{total}\n")
    else:
        print(total)
    sys.stdout.flush()
    return 1 if total.failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
