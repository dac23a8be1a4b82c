"""The writer that runs iptables-restore, of either variant, in network namespaces of its own."""

from __future__ import annotations

import re
import shutil
from typing import Any, Literal

from twisted.internet import reactor
from twisted.logger import Logger
from twisted.trial.unittest import TestCase

from tests.integration.test_iptables import FOREIGN, ChainHardships, missing
from tests.shared.namespaces import Namespace
from tests.shared.writers import SAMPLE, KernelWriterTests, key, many, same
from twisted_kproxy.core.rules import Delta, applied, deltaBetween
from twisted_kproxy.interfaces import NotAvailable, RulesRejected
from twisted_kproxy.netfilter.xt.restore import RestoreWriter
from twisted_kproxy.netfilter.xt.writer import IptablesWriter


class RestoreCase:
    """A namespace, and writers that live in it."""

    timeout = 300
    variant: Literal["legacy", "nft"]

    def setUp(self) -> None:
        self.space = Namespace("res")
        self.addCleanup(self.space.delete)  # type: ignore[attr-defined]

    def makeWriter(self, **options: Any) -> RestoreWriter:
        options = {"spawnPrefix": self.space.prefix, "openSocket": self.space.socket, **options}
        writer = RestoreWriter(reactor, self.variant, **options)
        self.addCleanup(writer.close)  # type: ignore[attr-defined]
        return writer

    def saved(self) -> str:
        """Both families as the tool prints them, without counters and times."""
        text = "".join(self.space.run(f"{stem}-{self.variant}-save") for stem in ("iptables", "ip6tables"))
        text = re.sub(r"^#.*\n", "", text, flags=re.M)
        return re.sub(r"\[\d+:\d+\]", "[0:0]", text)

    def tool(self, *argv: str) -> str:
        return self.space.run(f"iptables-{self.variant}", *argv)


class LegacyCase(RestoreCase):
    """By the legacy programs."""

    skip = missing()
    variant: Literal["legacy", "nft"] = "legacy"


class NftCase(RestoreCase):
    """By those over nf_tables."""

    skip = missing() or (None if shutil.which("iptables-nft") else "needs iptables-nft")
    variant: Literal["legacy", "nft"] = "nft"


class RestoreWriterSuite(RestoreCase, ChainHardships, KernelWriterTests):
    """What every writer does."""

    @property
    def tools(self) -> tuple[str, ...]:  # type: ignore[override]
        stems = (f"{stem}-{self.variant}" for stem in ("iptables", "ip6tables"))
        return tuple(f"{stem}-{end}" for stem in stems for end in ("restore", "save"))

    def makeFailingWriter(self) -> RestoreWriter:
        """Its programs may not touch the tables."""
        prefix = (*self.space.prefix, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
        return self.makeWriter(spawnPrefix=prefix)

    def disturb(self) -> Any:
        self.tool("-t", "nat", "-F", "KPROXY-PORTALS-CONTAINER")

    def plantForeign(self) -> None:
        for tool, rules in FOREIGN.items():
            for rule in rules:
                self.space.run(tool.replace("legacy", self.variant), *rule.split())

    def foreign(self) -> str:
        """The rules of others to the byte, with their counters."""
        text = "".join(self.space.run(f"{stem}-{self.variant}-save", "-c") for stem in ("iptables", "ip6tables"))
        return "".join(line for line in text.splitlines(keepends=True) if "KPROXY-" not in line and line[0] != "#")


class LegacyWriterTests(LegacyCase, RestoreWriterSuite, TestCase):
    """By the legacy programs."""

    program = "iptables-legacy"
    stem = "iptables-legacy"


class NftWriterTests(NftCase, RestoreWriterSuite, TestCase):
    """By those over nf_tables."""

    bulk = 1500
    program = "iptables-nft"
    stem = "iptables-nft"
    many = 300


class OneLayoutTests(LegacyCase, TestCase):
    """The two writers of the legacy tables write the same."""

    async def test_eachOthers(self) -> None:
        """What one has written the other adopts, goes on with, and cleans up."""
        library = IptablesWriter(reactor, spawnPrefix=self.space.prefix)
        self.addCleanup(library.close)
        programs = self.makeWriter()
        await programs.replace(SAMPLE)
        self.assertEqual(await library.adopt(), SAMPLE)
        step = Delta({key("10.96.0.10", 80): None, key("203.0.113.5", 443): same("drop")})
        await library.apply(step)
        self.assertEqual(await programs.adopt(), applied(SAMPLE, step))
        await programs.apply(deltaBetween(applied(SAMPLE, step), SAMPLE))
        self.assertEqual(await library.adopt(), SAMPLE)
        text = self.saved()
        await library.replace(SAMPLE)
        self.assertEqual(sorted(self.saved().splitlines()), sorted(text.splitlines()))
        self.assertEqual(library.place, programs.place)
        await programs.cleanup()
        self.assertIsNone(await library.adopt())


class VariantTests(NftCase, TestCase):
    """Which variant it is."""

    async def test_detected(self) -> None:
        """The variant is what ``iptables -V`` says; the place of the rules follows from it."""
        writer = RestoreWriter(reactor, spawnPrefix=self.space.prefix)
        self.addCleanup(writer.close)
        self.assertEqual((writer.name, writer.place), ("iptables", ""))
        said = self.space.run("iptables", "-V")
        words = await writer.probe()
        self.assertIn("nf_tables" if "nf_tables" in said else "legacy", words)
        self.assertIn("IPv4 and IPv6", words)
        self.assertTrue(writer.place)

    async def test_notInstalled(self) -> None:
        """Where the programs are missing the probe says which package brings them."""

        def nothing(name: str, package: str) -> str:
            raise NotAvailable(f"there is no {name}: install the {package} package")

        writer = self.makeWriter(findTool=nothing)
        error = await self.assertFailure(writer.probe(), NotAvailable)
        self.assertIn("install the iptables package", str(error))
        self.assertFailure(writer.replace(SAMPLE), RulesRejected)

    async def test_noPrivilege(self) -> None:
        """Without the right to change tables the probe says so."""
        caps = "-net_admin,-sys_admin"
        prefix = (*self.space.prefix, "setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}")
        for variant in ("legacy", "nft"):
            writer = RestoreWriter(reactor, variant, spawnPrefix=prefix)  # type: ignore[arg-type]
            self.addCleanup(writer.close)
            error = await self.assertFailure(writer.probe(), NotAvailable)
            self.assertIn("CAP_NET_ADMIN", str(error))

    async def test_noScratch(self) -> None:
        """Where no scratch namespace can be had, the writer works all the same, and says that it could not be tried."""
        prefix = (*self.space.prefix, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
        writer = self.makeWriter(spawnPrefix=prefix)
        self.assertIn("not tried", await writer.probe())
        await writer.replace(SAMPLE)
        self.assertEqual(await writer.adopt(), SAMPLE)

    async def test_warnsOfMany(self) -> None:
        """A thousand frontends over nf_tables are written, and warned of, once."""
        writer = self.makeWriter()
        said: list[str] = []
        log = Logger()
        log.warn = lambda text, **fields: said.append(text.format(**fields))  # type: ignore[method-assign, union-attr]
        writer.log = log  # type: ignore[misc]
        await writer.replace(many(1001))
        await writer.replace(many(1002))
        self.assertEqual([line for line in said if "are many for iptables over nf_tables" in line], said)
        self.assertEqual(len(said), 1)
        self.assertEqual(await writer.adopt(), many(1002))
