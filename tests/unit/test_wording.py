"""Words for people."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy.core import wire
from twisted_kproxy.core.wording import counted, fieldFault


class WordingTests(SynchronousTestCase):
    """See above."""

    def test_counted(self) -> None:
        """One is not many."""
        self.assertEqual([counted(n, "object") for n in (0, 1, 2)], ["0 objects", "1 object", "2 objects"])
        self.assertEqual([counted(n, "try", "tries") for n in (1, 2)], ["1 try", "2 tries"])

    def test_fieldFault(self) -> None:
        """Which field must be what; whatever else the library says is kept."""
        for data, words in (
            ({"metadata": {}, "spec": {"ports": [{"port": "80"}]}}, "spec.ports[0].port must be a number, and is text"),
            ({"metadata": {}, "spec": {"ports": [{}]}}, "spec.ports[0].port is missing"),
            ({}, "metadata is missing"),
            ({"metadata": {"labels": {"a": 1}}}, "metadata.labels[...] must be text, and is a number"),
            ([], "it must be a mapping, and is a list"),
        ):
            self.assertEqual(self.faultOf(data), words)
        self.assertEqual(fieldFault("Integer out of range - at `$.port`"), "port: Integer out of range")
        self.assertEqual(fieldFault("JSON is malformed (byte 3)"), "JSON is malformed (byte 3)")

    def faultOf(self, data: Any) -> str:
        try:
            msgspec.convert(data, wire.Service)
        except msgspec.ValidationError as error:
            return fieldFault(str(error))
        self.fail("it was taken")
