"""Medians, ratios within the same round, spread; and which bars are met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .measures import FIGURES

#: contestant → figure → one value per round; NaN stands for none
Raw: TypeAlias = Mapping[str, Mapping[str, Sequence[float]]]
HAPROXY, DIRECT, NGINX = "haproxy", "direct", "nginx 16k"
_EMPTY = ""
#: figures of one table, with its heading
_TABLES = (
    ("Requests over kept connections", ("requests", "requests cpu")),
    ("New connections, one request each", ("connections", "connections cpu")),
    ("Bulk, to the client, one stream and eight", ("down 1", "down 8", "down 1 cpu")),
    ("Bulk, from the client", ("up 1", "up 8", "up 1 cpu")),
    ("Latency at a fixed rate", ("p50", "p99", "p99.9")),
    ("Memory of the proxy per idle connection, and before any", ("idle", "idle again", "base")),
    ("Datagrams", ("udp", "udp cpu", "udp trains", "udp trains cpu")),
)  # fmt: skip


def median(raw: Raw, who: str, figure: str) -> float | None:
    """``None`` where it was not measured."""
    values = [it for it in raw.get(who, {}).get(figure, ()) if it == it]
    return statistics.median(values) if values else None


def ratio(raw: Raw, who: str, other: str, figure: str) -> float | None:
    """The median of the ratios that each round gave; ``None`` where one of the two was not measured."""
    pairs = zip(raw.get(who, {}).get(figure, ()), raw.get(other, {}).get(figure, ()), strict=False)
    values = [mine / theirs for mine, theirs in pairs if mine == mine and theirs == theirs and theirs]
    return statistics.median(values) if values else None


def spread(raw: Raw, who: str, figure: str) -> float | None:
    """Half of the distance between the quartiles, as a share of the median."""
    values = sorted(it for it in raw.get(who, {}).get(figure, ()) if it == it)
    if len(values) < 3:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else None


def number(value: float | None) -> str:
    """With as many digits as mean something."""
    if value is None:
        return _EMPTY
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def tables(raw: Raw) -> str:
    """All that was measured, as text."""
    parts = []
    for heading, figures in _TABLES:
        shown = [it for it in figures if any(median(raw, who, it) is not None for who in raw)]
        if shown:
            parts.append(_table(raw, heading, shown))
    return "\n\n".join(parts)


def _table(raw: Raw, heading: str, figures: Sequence[str]) -> str:
    head = [[""], [""]]
    for figure in figures:
        name, unit = (" ".join(figure.split()[:-1]) + " CPU" if figure.endswith("cpu") else figure), FIGURES[figure][0]
        head[0] += [name, "xHA", "xdirect", "±%"]
        head[1] += [unit, "", "", ""]
    rows = []
    for who in raw:
        if all(median(raw, who, figure) is None for figure in figures):
            continue
        row = [who]
        for figure in figures:
            swing = spread(raw, who, figure)
            row.append(number(median(raw, who, figure)))
            row += [_share(ratio(raw, who, other, figure)) for other in (HAPROXY, DIRECT)]
            row.append(_EMPTY if swing is None else f"{swing * 100:.0f}")
        rows.append(row)
    # A column that says nothing of anybody is left out.
    keep = [n for n in range(len(head[0])) if not n or any(row[n] for row in rows)]
    lines = [[row[n] for n in keep] for row in (*head, *rows)]
    widths = [max(len(row[n]) for row in lines) for n in range(len(keep))]
    out = [heading, "-" * len(heading)]
    for row in lines:
        first, *others = (it.rjust(width) for it, width in zip(row, widths, strict=True))
        out.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    return "\n".join(out)


def _share(value: float | None) -> str:
    return _EMPTY if value is None else f"{value:.2f}"


# --- bars -----------------------------------------------------------------------------------------------------------

#: contestant, figure, beside whom ("" for the figure itself), at least (or at most, where less is better)
BARS: tuple[tuple[str, str, str, float], ...] = (
    ("kproxy python", "requests", HAPROXY, 0.85),
    ("kproxy python", "connections", HAPROXY, 0.80),
    ("kproxy python", "down 1", HAPROXY, 1.8),
    ("kproxy python", "up 1", HAPROXY, 1.8),
    ("kproxy python", "down 1", DIRECT, 0.75),
    ("kproxy python", "p99", HAPROXY, 1.4),
    ("kproxy python", "idle", "", 2.0),
    ("kproxy python", "udp", NGINX, 0.75),
    ("kproxy native", "requests", HAPROXY, 1.0),
    ("kproxy native", "connections", HAPROXY, 1.0),
    ("kproxy native", "down 1", HAPROXY, 3.0),
    ("kproxy thread", "p99", HAPROXY, 1.2),
    ("kproxy native", "udp", NGINX, 1.1),
    *(
        (f"kproxy {engine} 1000", figure, f"kproxy {engine}", 0.9 if FIGURES[figure][1] else 1 / 0.9)
        for engine in ("python", "native")
        for figure in ("requests", "connections", "down 1", "p99", "udp")
    ),
)


def bars(raw: Raw) -> tuple[str, int]:
    """Each bar whose figures are there, and whether it is met; and how many are missed."""
    lines, missed = [], 0
    for who, figure, other, bar in BARS:
        value = ratio(raw, who, other, figure) if other else median(raw, who, figure)
        if value is None:
            continue
        unit, more = FIGURES[figure]
        met = value >= bar if more else value <= bar
        missed += not met
        beside = f"x {other}" if other else unit
        lines.append(
            f"{'met   ' if met else 'MISSED'}  {who:<20} {figure:<12} {value:6.2f} {beside:<14} "
            f"{'at least' if more else 'at most'} {bar:.2f}"
        )
    return "\n".join(["Bars", "----", *lines]), missed
