"""
Long work in short slices, so that the reactor is never kept from its other work for long.

A thread would not do: it shares the interpreter's lock with the reactor, and when a busy machine takes the processor
from it while it holds that lock, the reactor waits too.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar

from twisted.internet.task import deferLater

_T = TypeVar("_T")

#: Work that stops, every now and then, where it may be interrupted.
Slices: TypeAlias = Generator[None, None, _T]

#: How long a slice may last, in seconds.
LONGEST = 0.004


def finish(work: Slices[_T]) -> _T:
    """Do it all at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: _T = end.value
            return value


async def inSlices(reactor: Any, work: Slices[_T], longest: float = LONGEST) -> _T:
    """Do it, and let the reactor turn after each slice."""
    end = reactor.seconds() + longest
    while True:
        try:
            next(work)
        except StopIteration as stop:
            value: _T = stop.value
            return value
        if reactor.seconds() >= end:
            await deferLater(reactor, 0, lambda: None)
            end = reactor.seconds() + longest
