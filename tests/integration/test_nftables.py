"""The nftables writer on a real kernel."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest, TestCase

from tests.shared.namespaces import Namespace, canMakeNamespaces
from tests.shared.writers import SAMPLE, KernelWriterTests, key, many, same, to
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.rules import Delta, Guard, Ruleset, applied, deltaBetween
from twisted_kproxy.core.values import Endpoint, Frontend, ServiceMap, ServicePort, ServicePortName
from twisted_kproxy.interfaces import RulesRejected
from twisted_kproxy.netfilter.choose import hasLegacyRules, hasNftablesNat
from twisted_kproxy.netfilter.netlink import Refused
from twisted_kproxy.netfilter.nftables import NftablesWriter
from twisted_kproxy.netfilter.nfttext import readListing
from twisted_kproxy.netfilter.plane import RulePlane
from twisted_kproxy.netfilter.slices import Slices

FOREIGN = """
table ip docker {
    map published { type inet_service : ipv4_addr . inet_service; elements = { 8080 : 172.17.0.2 . 80 }; }
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        dnat ip to tcp dport map @published
    }
}
table inet firewall {
    set blocked { type ipv4_addr; flags interval; elements = { 198.51.100.0/24 }; }
    chain input {
        type filter hook input priority filter; policy accept;
        ip saddr @blocked drop
    }
}
"""


#: Leaves as many rules as there were.
EXCHANGED = "flush chain inet kproxy refuse" + "; add rule inet kproxy refuse accept" * 2


class InNamespace:
    """A mixin: writers that work in a namespace of the test's own."""

    def setUp(self) -> None:
        if not canMakeNamespaces():
            raise SkipTest("this needs root and iproute2")
        self.namespace = Namespace("nft")
        self.addCleanup(self.namespace.delete)  # type: ignore[attr-defined]

    def makeWriter(self, **options: Any) -> NftablesWriter:
        writer = NftablesWriter(
            reactor, spawnPrefix=self.namespace.prefix, openSocket=self.namespace.socket, **options
        )
        self.addCleanup(writer.close)  # type: ignore[attr-defined]
        return writer


class NftablesWriterTests(InNamespace, KernelWriterTests, TestCase):
    """Elements by netlink."""

    netlink = True

    def inForce(self) -> Ruleset | None:
        listing = self.namespace.run("nft", "--json", "list", "table", "inet", "kproxy", check=False)
        return readListing(json.loads(listing)) if listing else None

    def makeFailingWriter(self) -> NftablesWriter:
        def refused(*arguments: Any) -> Any:
            raise PermissionError(1, os.strerror(1))

        writer = NftablesWriter(
            reactor,
            # A process without the capability: the kernel itself refuses.
            spawnPrefix=(*self.namespace.prefix, "setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"),
            openSocket=refused,
        )
        self.addCleanup(writer.close)
        return writer

    async def test_ownMessagesAreTrusted(self) -> None:
        """On this kernel our own messages pass the comparison with what nft writes."""
        writer = await self.writerWith(SAMPLE)
        self.assertIs(writer.usesNetlink, self.netlink)
        await writer.apply(Delta({key("10.96.0.10", 80): None}))
        await writer.replace(SAMPLE)
        self.assertIs(writer.usesNetlink, self.netlink)

    async def test_listingReloads(self) -> None:
        """What nft lists of our table it can load again, and it is the same then."""
        await self.writerWith(SAMPLE)
        listed = self.namespace.run("nft", "list", "table", "inet", "kproxy")
        self.namespace.run("nft", "-f", "-", stdin=f"delete table inet kproxy\n{listed}")
        self.assertEqual(self.namespace.run("nft", "list", "table", "inet", "kproxy"), listed)
        await self.assertInForce(SAMPLE)

    async def test_stepOntoForeignChange(self) -> None:
        """A step that does not fit what somebody else has made of our table puts all of it right."""
        where = key("10.96.0.10", 80)
        delta = Delta({where: None, key("10.96.0.77", 77): same(to(7777))})
        for foreign in (
            "delete element inet kproxy service-ips4 { 10.96.0.10 . tcp . 80 }",
            "add element inet kproxy service-ips4 { 10.96.0.77 . tcp . 77 : 192.0.2.9 . 9 }",
            "delete table inet kproxy",
            "flush ruleset",
        ):
            writer = await self.writerWith(SAMPLE)
            self.namespace.run("nft", "-f", "-", stdin=foreign)
            await writer.apply(delta)
            await self.assertInForce(applied(SAMPLE, delta))

    async def test_foreignStructure(self) -> None:
        """A chain that somebody else has emptied, or whose rules were exchanged, is put right."""
        for foreign in (
            "flush chain inet kproxy lead4",
            "delete chain inet kproxy guard",
            "add chain inet kproxy more",
            "add set inet kproxy more { type ipv4_addr; }",
            EXCHANGED,
        ):
            writer = await self.writerWith(SAMPLE)
            before = self.namespace.run("nft", "list", "table", "inet", "kproxy")
            told: Deferred[None] = Deferred()
            writer.watch(lambda told=told: None if told.called else told.callback(None))
            self.namespace.run("nft", "-f", "-", stdin=foreign)
            self.assertNotEqual(self.namespace.run("nft", "list", "table", "inet", "kproxy"), before)
            await told.addTimeout(5, reactor)
            # Also one who has not watched knows.
            repairer = self.makeWriter()
            self.assertIsNone(await repairer.adopt())
            await repairer.replace(SAMPLE)
            self.assertEqual(self.namespace.run("nft", "list", "table", "inet", "kproxy"), before)
            writer.watch(None)

    async def test_foreignElementIsNoticed(self) -> None:
        """One element changed by somebody else is noticed; other tables' changes are not."""
        writer = await self.writerWith(SAMPLE)
        told: list[bool] = []
        writer.watch(lambda: told.append(True))
        self.plantForeign()
        await deferLater(reactor, 0.2, lambda: None)
        self.assertEqual(told, [])
        self.namespace.run("nft", "delete element inet kproxy service-ips4 { 10.96.0.10 . tcp . 80 }")
        await deferLater(reactor, 0.2, lambda: None)
        self.assertEqual(told, [True])
        found = await writer.adopt()
        self.assertEqual(deltaBetween(found, SAMPLE).rules, {key("10.96.0.10", 80): same(to(40001))})

    async def test_ownBulkIsNoNews(self) -> None:
        """Thousands of changes of our own neither call back nor overflow the watch."""
        writer = await self.writerWith(SAMPLE)
        told: list[bool] = []
        writer.watch(lambda: told.append(True))
        await writer.replace(many(5000))
        await writer.apply(deltaBetween(many(5000), many(5000, port=20000)))
        await deferLater(reactor, 0.2, lambda: None)
        self.assertEqual(told, [])
        self.disturb()
        await deferLater(reactor, 0.2, lambda: None)
        self.assertEqual(told, [True])

    async def test_closeDuringWrite(self) -> None:
        """Closing in the middle of a big write waits for it or ends it, and leaves one state or the other."""
        writer = await self.writerWith(SAMPLE)
        big = many(3000)
        writing = writer.replace(big)
        outcome: list[Any] = []
        writing.addBoth(outcome.append)
        await deferLater(reactor, 0.02, lambda: None)
        await writer.close()
        if not outcome:
            await writing
        found = self.inForce()
        self.assertIn(dict(found.rules), (dict(SAMPLE.rules), dict(big.rules)))

    def disturb(self) -> None:
        self.namespace.run("nft", "flush", "ruleset")

    def plantForeign(self) -> None:
        self.namespace.run("nft", "-f", "-", stdin=FOREIGN)

    def foreign(self) -> str:
        tables = [self.namespace.run("nft", "list", "table", *it) for it in (("ip", "docker"), ("inet", "firewall"))]
        return "".join(tables)


class NftablesByToolTests(NftablesWriterTests):
    """The same where only the nft program writes."""

    netlink = False

    def makeWriter(self, **options: Any) -> NftablesWriter:
        return super().makeWriter(useNetlink=False, **options)


class OwnChangesTests(InNamespace, TestCase):
    """How our own changes are kept apart from those of others. (What nft writes is not over when the call returns.)"""

    async def test_ownChangesAreFiltered(self) -> None:
        """The kernel does not even queue what we change ourselves, but what others change."""
        writer = self.makeWriter()
        await writer.probe()
        await writer.replace(SAMPLE)
        writer.watch(lambda: None)
        readable = [writer._watch]
        await writer.apply(Delta({key("10.96.0.10", 80): None}))
        self.assertEqual(select.select(readable, [], [], 0)[0], [])
        self.namespace.run("nft", "delete element inet kproxy service-ips4 { 203.0.113.5 . tcp . 443 }")
        self.assertEqual(select.select(readable, [], [], 0)[0], readable)


class KernelErrorTests(InNamespace, TestCase):
    """What the kernel answers to netlink messages."""

    STEP = Delta({key("10.96.0.10", 80): None})

    async def failing(self, error: OSError) -> NftablesWriter:
        writer = self.makeWriter()
        await writer.replace(SAMPLE)

        def commit(step: object) -> None:
            writer._elements.commit = real  # type: ignore[method-assign]
            raise error

        real, writer._elements.commit = writer._elements.commit, commit  # type: ignore[method-assign]
        return writer

    async def assertGoesOn(self, writer: NftablesWriter) -> None:
        await writer.apply(self.STEP)
        self.assertEqual(await self.makeWriter().adopt(), applied(SAMPLE, self.STEP))
        self.assertTrue(writer.usesNetlink)

    async def test_refused(self) -> None:
        """A refusal is told with the kernel's reason; what is in force is still known."""
        writer = await self.failing(Refused(errno.ENOMEM, "Cannot allocate memory"))
        with self.assertRaises(RulesRejected) as caught:
            await writer.apply(self.STEP)
        self.assertIn("Cannot allocate memory", str(caught.exception))
        self.assertEqual(await self.makeWriter().adopt(), SAMPLE)
        await self.assertGoesOn(writer)

    async def test_unknown(self) -> None:
        """When it is not known whether a step was carried out, the next one reads first."""
        writer = await self.failing(TimeoutError("timed out"))
        with self.assertRaises(RulesRejected):
            await writer.apply(self.STEP)
        await self.assertGoesOn(writer)

    async def test_notUnderstood(self) -> None:
        """When the kernel does not understand our messages, nft carries the elements from then on."""
        writer = await self.failing(Refused(errno.EINVAL, "Invalid argument"))
        await writer.apply(self.STEP)
        self.assertFalse(writer.usesNetlink)
        self.assertEqual(await self.makeWriter().adopt(), applied(SAMPLE, self.STEP))

    async def test_readsOtherwise(self) -> None:
        """When elements that nft has written read otherwise than meant, our own messages are not used."""
        writer = self.makeWriter()

        def nothing(collected: object) -> Slices[Ruleset]:
            yield
            return Ruleset()

        writer._elements.reading = nothing  # type: ignore[method-assign]
        await writer.replace(SAMPLE)
        self.assertFalse(writer.usesNetlink)
        self.assertEqual(await self.makeWriter().adopt(), SAMPLE)


class PlaneTests(InNamespace, TestCase):
    """The rule plane over the kernel."""

    async def test_foreignFlushIsRepaired(self) -> None:
        """Somebody flushes all rules: the plane says so at once, and the update that follows puts ours back."""
        name = ServicePortName("default", "web", "", "TCP", "IPv4")
        pool = (Endpoint("192.0.2.2", 40001, True, True),)
        current = ServiceMap({name: ServicePort(name, "u", (Frontend("ClusterIP", "10.96.0.1", 80),), pool)})
        told: Deferred[None] = Deferred()
        plane = RulePlane(reactor, self.makeWriter(), changedOutside=lambda: told.callback(None))
        await plane.start()
        await plane.onUpdate(Update(ServiceMap(), current))
        expected = Ruleset({key("10.96.0.1", 80): same(to(40001))}, frozenset({Guard("IPv4", "TCP", 40001)}))
        self.assertEqual(await self.makeWriter().adopt(), expected)
        self.namespace.run("nft", "flush", "ruleset")
        await told.addTimeout(2, reactor)
        await plane.onUpdate(Update(current, current))
        self.assertEqual(await self.makeWriter().adopt(), expected)
        await plane.stop(0)
        self.assertIsNone(await self.makeWriter().adopt())
        self.assertEqual(self.namespace.run("nft", "list", "ruleset"), "")


class DetectionTests(InNamespace, TestCase):
    """Whose rules a node has already."""

    def test_legacy(self) -> None:
        """Rules in the legacy nat table count, an empty table does not."""
        if shutil.which("iptables-legacy") is None:
            raise SkipTest("this needs iptables-legacy")
        names = self.mktemp()
        Path(names).write_text("nat\n", encoding="ascii")
        self.namespace.run("iptables-legacy", "-t", "nat", "-S")
        self.assertFalse(hasLegacyRules(self.namespace.socket, names))
        self.namespace.run("iptables-legacy", "-t", "nat", "-A", "PREROUTING", "-j", "ACCEPT")
        self.assertTrue(hasLegacyRules(self.namespace.socket, names))

    def test_nftables(self) -> None:
        """A nat chain of nf_tables counts, whoever's it is; a filter chain does not."""
        self.namespace.run("nft", "-f", "-", stdin="table ip t { chain c { type filter hook input priority 0; }; }")
        self.assertFalse(hasNftablesNat(self.namespace.socket))
        self.namespace.run("nft", "-f", "-", stdin="table ip u { chain c { type nat hook output priority 0; }; }")
        self.assertTrue(hasNftablesNat(self.namespace.socket))
