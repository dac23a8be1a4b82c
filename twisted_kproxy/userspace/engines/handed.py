"""A connection that was handed to somebody else: to C, or to another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...core.values import Outcome


class Keeper(Protocol):
    """Who has it."""

    def cut(self, number: int) -> None:
        """Reset both of its sides; how it ended is told as ever."""


class Handed:
    """
    :param number: under which the keeper knows it; may be another's once it has ended.
    :param ended: is told the outcome.
    """

    __slots__ = ("_ended", "_keeper", "_number")

    def __init__(self, keeper: Keeper, number: int, ended: Callable[[Outcome], None]) -> None:
        self._keeper: Keeper | None = keeper
        self._number = number
        self._ended = ended

    def cut(self) -> None:
        """Reset both sides. Harmless when it has ended."""
        if self._keeper is not None:
            self._keeper.cut(self._number)

    def over(self) -> Callable[[Outcome], None]:
        """
        It has ended, and lets go of everybody: whoever is to be told of that has :meth:`cut`, and a circle would wait
        for the garbage collector.

        :return: whom to tell.
        """
        ended = self._ended
        self._keeper = None
        del self._ended
        return ended
