"""
The data plane's figures, beside the kernel's own way, HAProxy and nginx.

``python -m benchmarks.dataplane [--quick] [NAME ...]``, as root. A name is a measurement (requests, connections, bulk,
latency, datagrams, idle) or a contestant (with ``-`` for a blank: kproxy-python, haproxy, nginx-16k …; ``kproxy`` for
all of its engines). Those who are compared take turns, several rounds; what is shown are medians and ratios within a
round. It never fails on a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.fakes.network import sweep
from twisted_kproxy.config.model import ENGINES

from . import plots
from .contestants import KPROXIES, MANIES, PEERS, BenchRig, Contestant, make
from .machine import Steal, build, burst, describe, install, limitDescriptors
from .measures import MEASURES, Figures
from .table import DIRECT, HAPROXY, bars, tables

ROUNDS, QUICK_ROUNDS = 5, 2
#: Seconds: a round that would take longer than what is left of them is not begun.
ENOUGH, QUICK_ENOUGH = 600.0, 85.0
QUICK_WHO = ("direct", "haproxy", "nginx 16k", "kproxy python", "kproxy native")
NAN = float("nan")


def known() -> list[str]:
    """Every contestant there is, in the order of the tables."""
    engines = [it for it, options in KPROXIES.items() if options[0].split()[-1] in ENGINES]
    return [*PEERS, *engines, *MANIES]


def chosen(words: list[str], quick: bool) -> tuple[list[str], list[str]]:
    """
    Who, and what, by the names given; nothing named of a kind: all of it.

    :raise SystemExit: for an unknown name.
    """
    who: list[str] = []
    what = []
    for word in words:
        name = word.replace("-", " ")
        if word in MEASURES:
            what.append(word)
        elif name in known():
            who.append(name)
        elif name == "kproxy":
            who += [it for it in known() if it.startswith("kproxy")]
        else:
            raise SystemExit(f"there is no {word}; there is {', '.join([*MEASURES, *known()]).replace(' ', '-')}")
    if who:
        who += [HAPROXY, DIRECT]  # for the ratios
    else:
        who = list(QUICK_WHO if quick else known())
    return [it for it in known() if it in who], [it for it in MEASURES if it in what or not what]


class Run:
    """One run: who is there, and what was measured so far."""

    def __init__(self, who: list[str], stack: ExitStack, seconds: float, factor: float) -> None:
        self.steal = Steal()
        self.raw: dict[str, dict[str, list[float]]] = {name: {} for name in who}
        self.contestants: list[Contestant] = []
        self._began = time.monotonic()
        self._seconds = seconds
        self._factor = factor
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kproxy-bench-"))
        load = build(folder)
        peers = [it for it in who if it in PEERS and it != "dnat"]
        nodes: list[list[str]] = [[it] for it in who if it not in peers]
        first = next((it for it in nodes if it[0].startswith("kproxy")), None)
        if first is None:
            nodes.append(peers)
        else:
            first += peers
        for names in nodes:
            rig = stack.enter_context(BenchRig(load, len(names)))
            self.contestants += [make(name, rig) for name in names]
        self.contestants.sort(key=lambda it: who.index(it.name))
        for it in self.contestants:
            it.check()

    def left(self) -> float:
        return self._began + self._seconds - time.monotonic()

    def turn(self, what: list[str], once: bool) -> None:
        """Every measurement of that kind, each with all contestants in turn."""
        for name in what:
            work, seconds, turns, takesPart = MEASURES[name]
            if turns is once:
                continue
            for it in self.contestants:
                if takesPart(it):
                    self._measure(name, it, partial(work, it, seconds * self._factor))

    def _measure(self, name: str, it: Contestant, work: Callable[[], Figures]) -> None:
        try:
            found = self.steal.steady(work)
        except Exception as error:
            print(f"    {name} of {it.name} failed: {error}", flush=True)
            return
        for figure, value in found.items():
            self.raw[it.name].setdefault(figure, []).append(value)

    def pad(self) -> None:
        """After a round: what it did not give is not there, so that rounds stay side by side."""
        most: dict[str, int] = {}
        for figures in self.raw.values():
            for figure, values in figures.items():
                most[figure] = max(most.get(figure, 0), len(values))
        for figures in self.raw.values():
            for figure, values in figures.items():
                values += [NAN] * (most[figure] - len(values))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME")
    options.add_argument("--quick", action="store_true", help="two rounds of the most important, in two minutes")
    options.add_argument("--rounds", type=int, help=f"by default {ROUNDS}")
    options.add_argument("--out", default="build/bench", help="folder for raw.json, table.txt and pictures")
    given = options.parse_args()
    who, what = chosen(given.names, given.quick)
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    install()
    limitDescriptors()
    sweep()
    # A signal unwinds like an error: processes end and namespaces go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about: dict[str, Any] = describe()
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    began = time.monotonic()
    with ExitStack() as stack:
        run = Run(who, stack, QUICK_ENOUGH if given.quick else ENOUGH, 0.6 if given.quick else 1)
        print(f"{len(run.contestants)} contestants are ready after {time.monotonic() - began:.0f} s", flush=True)
        stack.enter_context(burst())
        for it in run.contestants:  # warm-up
            MEASURES["requests"][0](it, 0.5)
        run.turn(what, once=True)
        for n in range(rounds):
            start = time.monotonic()
            run.turn(what, once=False)
            run.pad()
            took = time.monotonic() - start
            print(f"round {n + 1} of {rounds}: {took:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
            if n + 1 < rounds and took > run.left():
                print("no time for further rounds", flush=True)
                break
    about.update(
        seconds=round(time.monotonic() - began), rounds=n + 1, stolen=round(run.steal.worst, 4),
        repeated=run.steal.again, loadAfter=os.getloadavg(),
    )
    report(run, about, given.out)
    return 0


def report(run: Run, about: dict[str, Any], out: str) -> None:
    """The table, to read; the raw figures and pictures, as files."""
    os.makedirs(out, exist_ok=True)
    judged, missed = bars(run.raw)
    head = "\n".join(f"{key}: {value}" for key, value in about.items())
    text = f"{head}\n\n{tables(run.raw)}\n\n{judged}\n{missed} missed\n"
    print(f"\n{text}")
    Path(out, "table.txt").write_text(text, encoding="utf-8")
    raw = {
        who: {figure: [None if it != it else it for it in values] for figure, values in figures.items()}
        for who, figures in run.raw.items()
    }
    Path(out, "raw.json").write_text(json.dumps({"about": about, "raw": raw}, indent=1), encoding="utf-8")
    if plots.available():
        plots.draw(run.raw, out)
        print(f"table, raw figures and pictures are in {out}")
    else:
        print(f"table and raw figures are in {out}; for pictures install matplotlib (pip install -e '.[bench]')")


if __name__ == "__main__":
    sys.exit(main())
