"""The writers that touch no kernel."""

from __future__ import annotations

from twisted.trial.unittest import TestCase

from tests.shared.writers import SAMPLE, WriterTests, many
from twisted_kproxy.core.rules import Delta, Ruleset
from twisted_kproxy.interfaces import RulesRejected
from twisted_kproxy.netfilter.memory import MemoryWriter, NoWriter


class MemoryWriterTests(WriterTests, TestCase):
    """The remembering writer is as atomic as the kernel's."""

    def setUp(self) -> None:
        self.writer = MemoryWriter()

    def makeWriter(self) -> MemoryWriter:
        return self.writer

    def inForce(self) -> Ruleset | None:
        return self.writer.inForce

    def makeFailingWriter(self) -> MemoryWriter:
        self.writer.failures.append(RulesRejected("the kernel is out of memory"))
        return self.writer

    def disturb(self) -> None:
        self.writer.disturb(None)

    def test_hang(self) -> None:
        """While it hangs nothing happens; released, it goes on."""
        self.writer.hang = True
        call = self.writer.replace(SAMPLE)
        self.assertNoResult(call)
        self.assertIsNone(self.writer.inForce)
        self.assertRaises(AssertionError, self.writer.replace, many(1))
        self.writer.release()
        self.successResultOf(call)
        self.assertEqual(self.writer.inForce, SAMPLE)

    def test_history(self) -> None:
        """It remembers what it was told."""
        self.successResultOf(self.writer.replace(Ruleset()))
        self.successResultOf(self.writer.apply(Delta()))
        self.assertEqual([it.call for it in self.writer.writes], ["replace", "apply"])


class NoWriterTests(TestCase):
    """The writer that does nothing says yes to everything."""

    def test_everything(self) -> None:
        """Every call works, and a cleanup has found nothing."""
        writer = NoWriter()
        self.successResultOf(writer.probe())
        self.assertIsNone(self.successResultOf(writer.adopt()))
        self.successResultOf(writer.replace(SAMPLE))
        self.successResultOf(writer.apply(Delta()))
        self.assertIs(self.successResultOf(writer.cleanup()), False)
        self.successResultOf(writer.close())
