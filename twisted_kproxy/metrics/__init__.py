"""``/metrics``: everything that is counted and measured."""

from .looplag import LoopLag
from .registry import Metrics

__all__ = ["LoopLag", "Metrics"]
