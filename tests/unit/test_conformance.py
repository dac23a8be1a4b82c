"""
The table of flows (:mod:`tests.conformance`): every row by the rules of every writer, and by the functions that say
what becomes of a flow; and the page that is made of it.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

import tests
from tests.conformance.__main__ import PAGE
from tests.conformance.page import page
from tests.conformance.pipeline import LOCAL, WRITERS, Machine, faults, packetOf, settingsOf
from tests.conformance.site import LAN, Row
from tests.conformance.site import Flow as Packets
from tests.conformance.table import rows
from twisted_kproxy.configmodel import SOURCE_KEYS, schema
from twisted_kproxy.core.flows import Decision, Flow, Frontends, decide
from twisted_kproxy.core.rules import PROXY_MARK

TESTS = Path(tests.__file__).parent
ROWS = rows()


def decisions(row: Row, machine: Machine) -> list[Decision]:
    """What is decided of each flow of a row."""
    frontends = Frontends(machine.map)
    everything = settingsOf(row.settings).masqueradeAll
    found = []
    for it in row.flows:
        packet = packetOf(it, row.settings)
        flow = Flow(packet.source, it.address, it.port, it.protocol, packet.link or None, not packet.link)
        found.append(decide(frontends, LOCAL, flow, everything))
    return found


def contradictions(row: Row, machine: Machine) -> list[str]:
    """Where :func:`decide` says something else than a row."""
    found = []
    for flow, decision in zip(row.flows, decisions(row, machine), strict=True):
        if flow.protocol == "SCTP":  # which endpoints there are is decided; no socket leads there
            continue
        said: Any = decision.verdict
        if said == "endpoints":
            said = frozenset(str(it) for it in decision.endpoints)
        if said != flow.expected:
            found.append(f"{row}: {flow}: {said}: {decision.why}")
        masqueraded = {bool(decision.masqueradeTo(it)) for it in decision.endpoints}
        if flow.masquerade is not None and masqueraded != {flow.masquerade}:
            found.append(f"{row}: {flow}: masqueraded: {masqueraded}: {decision.masquerade}")
    return found


class FlowTests(SynchronousTestCase):
    """
    Packets end where their row says. There is a test for each row (made below): its objects go through the cluster,
    the userspace dataplane and the rule plane, and packets through the rules that come out, as each writer writes them.
    """

    maxDiff = None

    def check(self, row: Row) -> None:
        machine = Machine(row)
        found = [fault for writer in WRITERS for fault in faults(row, writer, machine)]
        self.assertEqual(found + contradictions(row, machine), [])

    def test_wrongRowsFail(self) -> None:
        """A row that expects something else of a packet does not hold: with any writer, and by decision."""
        wrong = []
        for row in ROWS:
            if row.name in ("cluster-ip", "source-ranges", "no-endpoints", "etp-local", "node-port-networks"):
                machine = Machine(row)
                for number, flow in enumerate(row.flows):
                    other = msgspec.structs.replace(flow, expected="drop" if flow.expected != "drop" else "reject")
                    altered = msgspec.structs.replace(row, flows=[other])
                    wrong += [(row.name, number, *faults(altered, writer, machine)) for writer in WRITERS]
                    wrong.append((row.name, number, *contradictions(altered, machine)))
        self.assertEqual([it for it in wrong if len(it) != 3], [])
        self.assertGreater(len(wrong), 100)

    def named(self, name: str) -> list[Row]:
        return [row for row in ROWS if row.name == name]

    def test_ownPorts(self) -> None:
        """A port of the proxy refuses whoever dials it himself: from outside, a pod or the node."""
        for row in self.named("cluster-ip") + self.named("cluster-ip-udp"):
            machine = Machine(row)
            for _family, protocol, port in machine.sockets:
                for source in ("outside", "pod", "node"):
                    flow = Packets(source, LAN[row.family].format(2), port, protocol, "reject")
                    for writer, chains in WRITERS.items():
                        found = machine.answer(chains(machine.ruleset), packetOf(flow, row.settings))
                        self.assertEqual(found, "reject", f"{flow} {writer}")

    def test_ownPackets(self) -> None:
        """What the proxy itself sends to an endpoint goes there, were it a frontend or one that is refused."""
        for row in (it for name in ("cluster-ip", "node-port", "no-endpoints") for it in self.named(name)):
            machine = Machine(row)
            for flow in row.flows:
                if flow.source == "node":
                    for writer, chains in WRITERS.items():
                        packet = packetOf(flow, row.settings)
                        packet.mark = PROXY_MARK | 0x4000
                        found = machine.answer(chains(machine.ruleset), packet)
                        self.assertEqual(found, "untouched", f"{flow} {writer}")


def _add(row: Row) -> None:
    def test(self: FlowTests) -> None:
        self.check(row)

    test.__doc__ = f"{row.title}."
    name = "".join(word.capitalize() for word in row.name.split("-"))
    test.__name__ = f"test_{name[0].lower()}{name[1:]}{row.family}"
    test.__qualname__ = f"FlowTests.{test.__name__}"
    setattr(FlowTests, test.__name__, test)


for _row in ROWS:
    if _row.flows:
        _add(_row)


class TableTests(SynchronousTestCase):
    """The table itself."""

    def test_enough(self) -> None:
        """Every row is tried, shown by a test or told to be left out; names, addresses and ports are its own."""
        self.assertEqual(len({(row.name, row.family) for row in ROWS}), len(ROWS))
        for row in ROWS:
            shown = bool(row.flows or row.proofs or row.keys or row.why)
            self.assertTrue(shown, row.name)
            self.assertTrue(row.verdict == "works" or row.why, row.name)
        addresses: dict[tuple[int, str], str] = {}
        for row in ROWS:
            for it in row.objects:
                if it["kind"] == "Service" and it["spec"]["clusterIP"] != "None":
                    owner = addresses.setdefault((row.family, it["spec"]["clusterIP"]), row.name)
                    self.assertEqual(owner, row.name)

    def test_proofs(self) -> None:
        """The tests that rows name exist."""
        known: dict[str, set[str]] = {}
        for name in sorted({proof for row in ROWS for proof in row.proofs}):
            module, _, test = name.rpartition(".")
            if module not in known:
                tree = ast.parse((TESTS / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
                functions = (ast.FunctionDef, ast.AsyncFunctionDef)
                known[module] = {node.name for node in ast.walk(tree) if isinstance(node, functions)}
            self.assertIn(test, known[module], name)

    def test_keys(self) -> None:
        """The keys that rows name exist."""
        known = {f"[{section}] {key.name}" for section, keys in schema().items() for key in keys}
        known |= {f"[source:NAME] {key.name}" for keys in SOURCE_KEYS.values() for key in keys}
        self.assertEqual([key for row in ROWS for key in row.keys if key not in known], [])

    def test_page(self) -> None:
        """``docs/conformance.rst`` is what the table gives: ``python -m tests.conformance`` writes it."""
        self.assertEqual(PAGE.read_text(encoding="utf-8"), page(ROWS, WRITERS))
