"""The figures as pictures; needs matplotlib (``pip install -e .[bench]``)."""

from __future__ import annotations

import os

from .measures import FIGURES
from .table import Raw, median, spread

_PICTURES = {
    "throughput": ("requests", "connections", "requests cpu", "connections cpu"),
    "bulk": ("down 1", "up 1", "down 8", "up 8"),
    "latency": ("p50", "p99", "p99.9"),
    "memory-udp": ("idle", "idle again", "udp", "udp trains"),
}


def available() -> bool:
    try:
        import matplotlib  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        return False
    return True


def draw(raw: Raw, folder: str) -> list[str]:
    """One picture per kind of figure; gives their paths."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    made = []
    for name, figures in _PICTURES.items():
        shown = [it for it in figures if any(median(raw, who, it) is not None for who in raw)]
        if not shown:
            continue
        canvas, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 4), squeeze=False)
        for figure, axis in zip(shown, axes[0], strict=True):
            who = [it for it in raw if median(raw, it, figure) is not None]
            values = [median(raw, it, figure) or 0.0 for it in who]
            errors = [(spread(raw, it, figure) or 0.0) * value for it, value in zip(who, values, strict=True)]
            colours = ["tab:blue" if it.startswith("kproxy") else "tab:gray" for it in who]
            axis.barh(who, values, xerr=errors, color=colours)
            axis.invert_yaxis()
            unit, more = FIGURES[figure]
            axis.set_title(f"{figure}, {unit}" + ("" if more else " (less is better)"), fontsize=9)
            axis.tick_params(labelsize=7)
        canvas.tight_layout()
        path = os.path.join(folder, f"{name}.png")
        canvas.savefig(path, dpi=80)
        pyplot.close(canvas)
        made.append(path)
    return made
