"""Rows of the table of flows (:mod:`tests.conformance`) on the real kernel, with each rule writer."""

from __future__ import annotations

import os
from typing import ClassVar
from unittest import SkipTest

from twisted.trial.unittest import TestCase

from tests.conformance.kernel import Place


class Kernel:
    """What every writer must bring about."""

    writer: ClassVar[str]
    maxDiff = None

    def test_rows(self) -> None:
        """Connections and datagrams from pods, the node and outside end where the rows say."""
        if os.geteuid():
            raise SkipTest("network namespaces need root")
        place = Place(self.writer)
        try:
            self.assertEqual(place.faults(), [])  # type: ignore[attr-defined]
            self.assertGreater(place.made, 150)  # type: ignore[attr-defined]
        finally:
            place.close()


class NftablesTests(Kernel, TestCase):
    """With rules of nf_tables."""

    writer = "nftables"
    timeout = 300


class PythonIptablesTests(Kernel, TestCase):
    """With rules by python-iptables."""

    writer = "python-iptables"
    timeout = 300


class IptablesTests(Kernel, TestCase):
    """With rules by iptables-restore, of whichever variant the node has."""

    writer = "iptables"
    timeout = 300
