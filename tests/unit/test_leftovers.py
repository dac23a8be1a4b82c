"""What a writer of an earlier run has left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import SAMPLE
from twisted_kproxy.interfaces import NotAvailable, RulesRejected
from twisted_kproxy.netfilter.choose import removeLeftovers
from twisted_kproxy.netfilter.memory import MemoryWriter, NoWriter


def writerAt(place: str, inForce: Any = SAMPLE) -> MemoryWriter:
    writer = MemoryWriter(inForce=inForce)
    writer.place = place
    return writer


def makers(**writers: Any) -> list[tuple[str, Callable[[], Any]]]:
    return [(name, lambda it=it: it) for name, it in writers.items()]  # type: ignore[misc]


class Broken(MemoryWriter):
    """Fails to clean up."""

    place = "broken"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def cleanup(self) -> Deferred[bool]:
        return fail(self.error)


class LeftoverTests(SynchronousTestCase):
    """``removeLeftovers``."""

    def test_others(self) -> None:
        """Rules in other places are removed, and whose they were is told; the writers are closed."""
        here, there, empty = writerAt("a"), writerAt("b"), writerAt("c", None)
        found = self.successResultOf(removeLeftovers(here, makers(one=there, two=empty)))
        self.assertEqual(found, ["one"])
        self.assertEqual((here.inForce, there.inForce), (SAMPLE, None))
        self.assertTrue(there.closed and empty.closed)

    def test_samePlace(self) -> None:
        """What another writer would remove from the place of the active one are the active one's rules."""
        active, same = writerAt("a"), writerAt("a")
        self.assertEqual(self.successResultOf(removeLeftovers(active, makers(same=same))), [])
        self.assertEqual(same.inForce, SAMPLE)

    def test_unknownPlace(self) -> None:
        """Who does not know where his rules are is not asked: they might be the active one's."""
        self.successResultOf(removeLeftovers(writerAt("a"), makers(who=writerAt(""))))
        unknown = writerAt("")
        self.successResultOf(removeLeftovers(writerAt("a"), makers(who=unknown)))
        self.assertEqual(unknown.inForce, SAMPLE)

    def test_oncePerPlace(self) -> None:
        """A place is cleaned up once, by the first who can."""
        broken = Broken(NotAvailable("it is not installed"))
        broken.place = "b"
        second, third = writerAt("b"), writerAt("b")
        found = self.successResultOf(removeLeftovers(writerAt("a"), makers(x=broken, y=second, z=third)))
        self.assertEqual(found, ["y"])
        self.assertEqual(third.writes, [])

    def test_trouble(self) -> None:
        """What cannot be had or cannot be removed costs nothing else."""

        def missing() -> Any:
            raise NotAvailable("no library")

        last = writerAt("z")
        others = [("a", missing), *makers(b=Broken(RulesRejected("no")), c=Broken(ValueError("bug")), d=last)]
        self.assertEqual(self.successResultOf(removeLeftovers(writerAt("y"), others)), ["d"])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_none(self) -> None:
        """Who writes no rules removes none."""
        other = writerAt("b")
        self.assertEqual(self.successResultOf(removeLeftovers(NoWriter(), makers(other=other))), [])
        self.assertEqual(other.inForce, SAMPLE)
