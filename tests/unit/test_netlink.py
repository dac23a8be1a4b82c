"""Netlink messages: what is sent, how answers are read. The kernel's part is played by a socket pair."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.shared.writers import SAMPLE, key, many, same, to
from twisted_kproxy.core.rules import Guard, Ruleset
from twisted_kproxy.netfilter import netlink
from twisted_kproxy.netfilter.netlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    Interrupted,
    NetlinkSocket,
    Refused,
    attribute,
    attributes,
    messages,
)
from twisted_kproxy.netfilter.nft import elements as nftelements
from twisted_kproxy.netfilter.nft import reading as nftreading
from twisted_kproxy.netfilter.nft.layout import (
    CLUSTER_IPS,
    MAPS,
    SETS,
    Allowed,
    Element,
    Step,
    Unreadable,
    gathered,
    placed,
    wholeStep,
)


class FakeSocket:
    """A socket whose answers are made up beforehand."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.answers: list[bytes | OSError] = []
        self.options: list[tuple[int, int, int]] = []
        self.closed = False
        self.waits = 0.0
        self.waited = 0.0

    def settimeout(self, seconds: float) -> None:
        self.waits = seconds

    def bind(self, address: tuple[int, int]) -> None:
        pass

    def getsockname(self) -> tuple[int, int]:
        return (4711, 0)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.options.append((level, option, value))

    def send(self, data: bytes) -> int:
        self.sent.append(data)
        return len(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        if not self.answers:
            self.waited += self.waits
            raise TimeoutError("timed out") if self.waits else BlockingIOError()
        it = self.answers.pop(0)
        if isinstance(it, OSError):
            raise it
        return it

    def close(self) -> None:
        self.closed = True


def answer(kind: int, sequence: int, payload: bytes = b"", flags: int = 0) -> bytes:
    data = HEADER.pack(16 + len(payload), kind, flags, sequence, 4711) + payload
    return data + bytes(-len(data) % 4)


def error(sequence: int, code: int, words: str = "") -> bytes:
    payload = struct.pack("=i", -code) + HEADER.pack(100, 0, 0, sequence, 0)
    if words:
        payload += attribute(1, words.encode() + b"\0")
        return answer(NLMSG_ERROR, sequence, payload, NLM_F_ACK_TLVS | NLM_F_CAPPED)
    return answer(NLMSG_ERROR, sequence, payload, NLM_F_CAPPED)


class SocketTests(SynchronousTestCase):
    """Requests and dumps."""

    def setUp(self) -> None:
        self.fake = FakeSocket()
        self.socket = NetlinkSocket(lambda *_: self.fake)  # type: ignore[arg-type,return-value]

    def test_acknowledged(self) -> None:
        """A request is done when its last message is acknowledged; late answers to earlier ones are passed over."""
        self.fake.answers = [error(3, errno.EPERM), error(7, 0)]
        self.socket.request(b"data", 5, 7)
        self.assertEqual(self.fake.sent, [b"data"])

    def test_refused(self) -> None:
        """The first error counts, with the kernel's words; what else is queued is thrown away."""
        self.fake.answers = [error(6, errno.EEXIST, "element exists") + error(7, errno.EINVAL), error(7, 0)]
        said = self.assertRaises(Refused, self.socket.request, b"data", 5, 7)
        self.assertEqual(said.errno, errno.EEXIST)
        self.assertIn("element exists", str(said))
        self.assertEqual(self.fake.answers, [])
        self.assertEqual((self.fake.waited, self.fake.waits), (0.0, 5.0), "it waits for what does not come")

    def test_silence(self) -> None:
        """A kernel that says nothing is given up: the state is not known then, which is another error."""
        said = self.assertRaises(OSError, self.socket.request, b"data", 1, 1)
        self.assertNotIsInstance(said, Refused)

    def test_bigRequest(self) -> None:
        """For a big request the send buffer is made big enough first."""
        self.fake.answers = [error(1, 0)]
        self.socket.request(bytes(1 << 20), 1, 1)
        self.assertIn((socket.SOL_SOCKET, 32, (1 << 20) + 4096), self.fake.options)

    def test_dump(self) -> None:
        """A dump gives the payload of each answer behind the netfilter header, over several reads."""
        self.fake.answers = [
            answer(0x0A0C, 1, b"nfgnfirst123") + answer(0x0A0C, 1, b"nfgnsecond12"),
            answer(0x0A0C, 9, b"nfgnstranger"),
            answer(0x0A0C, 1, b"nfgnthird123") + answer(NLMSG_DONE, 1, struct.pack("=i", 0)),
        ]
        self.assertEqual(list(self.socket.dump(0x0A0D, 1)), [b"first123", b"second12", b"third123"])

    def test_dumpOfWhatChanged(self) -> None:
        """A dump that was not consistent says so at its end."""
        self.fake.answers = [
            answer(0x0A0C, 1, b"nfgnfirst123", NLM_F_DUMP_INTR) + answer(NLMSG_DONE, 1, struct.pack("=i", 0))
        ]
        self.assertRaises(Interrupted, list, self.socket.dump(0x0A0D, 1))

    def test_dumpRefused(self) -> None:
        """A dump of what is not there is refused."""
        self.fake.answers = [error(1, errno.ENOENT)]
        said = self.assertRaises(Refused, list, self.socket.dump(0x0A0D, 1))
        self.assertEqual(said.errno, errno.ENOENT)

    def test_dumpFailsAtTheEnd(self) -> None:
        """A dump that ends with an error is no dump."""
        self.fake.answers = [answer(NLMSG_DONE, 1, struct.pack("=i", -errno.ENOMEM))]
        self.assertEqual(self.assertRaises(Refused, list, self.socket.dump(0x0A0D, 1)).errno, errno.ENOMEM)

    def test_answers(self) -> None:
        """Of messages that are all acknowledged each one's answer is given."""
        self.fake.answers = [error(1, 0) + error(2, errno.ENOENT), error(3, 0)]
        self.assertEqual(self.socket.answers(b"x", 1, 3), [0, errno.ENOENT, 0])

    def test_cannotOpen(self) -> None:
        """A socket that cannot be set up is closed again."""

        def bind(address: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        fake = FakeSocket()
        fake.bind = bind  # type: ignore[assignment]
        self.assertRaises(PermissionError, NetlinkSocket, lambda *_: fake)
        self.assertTrue(fake.closed)


class ParsingTests(SynchronousTestCase):
    """Bytes from outside."""

    @settings(deadline=None)
    @given(st.binary(max_size=200))
    def test_anyBytes(self, data: bytes) -> None:
        """Whatever comes is read to its end, without an error."""
        list(messages(data))
        list(attributes(data))

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40)), max_size=8))
    def test_attributes(self, pairs: list[tuple[int, bytes]]) -> None:
        """Attributes come back as they were written."""
        self.assertEqual(list(attributes(b"".join(attribute(*pair) for pair in pairs))), pairs)


def read(data: bytes) -> list[tuple[int, dict[int, bytes]]]:
    """The messages of a batch: type, attributes."""
    return [(kind, dict(attributes(payload, 4))) for kind, _flags, _sequence, _sender, payload in messages(data)]


class ElementTests(SynchronousTestCase):
    """Steps as batches."""

    def test_bytes(self) -> None:
        """A frontend's element is, byte for byte, what the kernel's header files say."""
        step = Step(added=[("service-ips4", key("10.96.0.10", 80), to(40001))])
        data, last = nftelements.encode("kproxy", step, 5)
        self.assertEqual(last, 6)
        self.assertEqual(
            data.hex(" ", 4),
            "14000000 10000100 05000000 00000000 0000000a"  # begin of the batch
            " 60000000 0c0a0504 06000000 00000000 01000000"  # new elements, with an acknowledgement
            " 0b000100 6b70726f 78790000"  # of the table
            " 11000200 73657276 6963652d 69707334 00000000"  # of the set
            " 2c000380 28000180"  # elements: one
            " 14000180 10000100 0a60000a 06000000 00500000"  # its key: address, protocol, port
            " 10000280 0c000100 c0000202 9c410000"  # its data: address, port
            " 14000000 11000100 07000000 00000000 0000000a",  # end of the batch
        )

    def test_order(self) -> None:
        """Removing comes before adding, so that a frontend can change its value in one batch."""
        where = key("10.96.0.10", 80)
        step = Step(removed=[("service-ips4", where)], added=[("service-ips4", where, to(40002))])
        kinds = [kind for kind, _ in read(nftelements.encode("kproxy", step)[0])]
        self.assertEqual(kinds, [0x10, nftelements.DELSETELEM, nftelements.NEWSETELEM, 0x11])

    def test_whole(self) -> None:
        """A whole ruleset begins with emptying every set."""
        found = read(nftelements.encode("kproxy", wholeStep(SAMPLE))[0])
        emptied = [said[2][:-1].decode() for kind, said in found if kind == nftelements.DELSETELEM and 3 not in said]
        self.assertEqual(sorted(emptied), sorted(SETS))

    def test_nothing(self) -> None:
        """A step that changes nothing has no bytes."""
        self.assertEqual(nftelements.encode("kproxy", Step())[0], b"")

    def test_longLists(self) -> None:
        """No attribute is longer than its length can say, and nothing is lost in the parts."""
        ruleset = many(5000)
        data, last = nftelements.encode("kproxy", wholeStep(ruleset), 1)
        found: dict[str, list[tuple[bytes, bytes]]] = {}
        flags = {}
        for kind, flag, sequence, _sender, payload in messages(data):
            flags[sequence] = flag
            self.assertLess(len(payload), 65536)
            if kind == nftelements.NEWSETELEM:
                name = dict(attributes(payload, 4))[2][:-1].decode()
                for where, what, _ends, _last in nftreading.elementsIn(payload[4:]):
                    found.setdefault(name, []).append((where, what))
        elements = [
            (name, *nftreading.decodeMap(name, *it)) for name, some in found.items() if name in MAPS for it in some
        ]
        self.assertEqual(gathered(elements), ruleset.rules)
        self.assertEqual([number for number, flag in flags.items() if flag & NLM_F_ACK], [last])

    def test_decodeEach(self) -> None:
        """Every element of the sample is read as it was written."""
        for where, rule in SAMPLE.rules.items():
            self.assertThereAndBack(placed(where, rule))
        self.assertThereAndBack([it for it in wholeStep(SAMPLE).added if isinstance(it[1], (Guard, str))])
        for name in CLUSTER_IPS:
            those = [it for it in SAMPLE.clusterIPs if (":" in it) == name.endswith("6")]
            data = b"".join(map(nftelements.itemElement, those))
            self.assertEqual(list(nftreading.addresses(name, attribute(3, data))), those)

    def assertThereAndBack(self, elements: Sequence[Element]) -> None:
        self.assertTrue(elements)
        for name, item, value in elements:
            one = nftelements.itemElement(item, nftelements.valueBytes(value) if value is not None else b"")
            [raw] = nftreading.elementsIn(attribute(3, one))
            self.assertEqual((nftreading.decode(name, raw), raw.ends), ((item, value), False))

    def test_readQuickly(self) -> None:
        """Reading many elements gives what reading each with care gives, also of addresses with several spellings."""
        addresses = ["10.96.0.1", "10.96.0.2", "::ffff:a00:1", "::a00:1", "fd00::1:0:0:1", "fd00:0:1:2::", "::1"]
        addresses = [str(ip_address(it)) for it in addresses]  # Python 3.13 writes IPv4-mapped ones in another way
        for name in ("service-ips4", "service-ips6", "blocked-ips6", "node-ports4", "blocked-ports6-inside"):
            family, hasAddress, leads = MAPS[name]
            keys = [key(it, 80 + n, p) for n, it in enumerate(addresses) for p in ("TCP", "UDP", "SCTP")]
            keys = [it for it in keys if it.family == family]
            if not hasAddress:
                keys = [key("", n, "UDP", family) for n in (1, 255, 256, 65535)]
            node = "192.0.2.2" if family == "IPv4" else "2001:db8::2"
            values = [to(n % 2 + 1, node) if leads else ("reject", "drop", "pass")[n % 3] for n in range(len(keys))]
            data = b"".join(
                nftelements.element(nftelements.keyBytes(it), nftelements.valueBytes(value))  # type: ignore[arg-type]
                for it, value in zip(keys, values, strict=True)
            )
            found = list(nftreading.MapReader(name).read(attribute(3, data)))
            self.assertEqual(found, [(name, it, value) for it, value in zip(keys, values, strict=True)])

    def test_strangeAmongMany(self) -> None:
        """An element that is strange is noticed behind others that are not."""
        good = nftelements.element(nftelements.keyBytes(key("10.96.0.1", 80)), nftelements.valueBytes(to(1)))
        raw = nftelements.keyBytes(key("10.96.0.2", 80))
        for bad in (raw[:-1] + b"x", raw[:5] + b"x" + raw[6:], raw[:4] + b"\x01" + raw[5:]):
            data = good + good + nftelements.element(bad, nftelements.valueBytes(to(1)))
            self.assertRaises(Unreadable, list, nftreading.MapReader("service-ips4").read(attribute(3, data)))

    def test_insiders(self) -> None:
        """Networks become intervals and come back; also those at zero, at the last address, and side by side."""
        for networks in (
            ["10.244.0.0/16"],
            ["0.0.0.0/0"],
            ["0.0.0.0/8", "255.0.0.0/8"],
            ["10.0.0.0/24", "10.0.1.0/25", "10.0.2.7/32"],
            [],
        ):
            elements = b"".join(nftelements.networkElements(networks, "IPv4"))
            found = nftreading.decodeNetworks(nftreading.elementsIn(attribute(3, elements)))
            self.assertEqual(found, networks)
        elements = b"".join(nftelements.networkElements(["fd00::/64", "10.0.0.0/8", "::/1"], "IPv6"))
        found = nftreading.decodeNetworks(nftreading.elementsIn(attribute(3, elements)))
        self.assertEqual(found, ["::/1", "fd00::/64"])

    def test_zeroIntervalOfNft(self) -> None:
        """nft begins an interval set with an end at zero, which belongs to no network."""
        elements = nftelements.element(bytes(4), nftelements._END)
        elements += b"".join(nftelements.networkElements(["10.244.0.0/16"], "IPv4"))
        self.assertEqual(
            nftreading.decodeNetworks(nftreading.elementsIn(attribute(3, elements))), ["10.244.0.0/16"]
        )

    def test_strangeElements(self) -> None:
        """What would not be written so is not understood, rather than taken for something else."""
        raw, data = nftelements.keyBytes(key("10.96.0.10", 80)), nftelements.valueBytes(to(1))[4:]
        jump = attribute(2, attribute(1, struct.pack(">i", -3)) + attribute(2, b"refuse\0"))
        for name, where, what in (
            ("service-ips4", raw[:-2], data),
            ("service-ips4", raw[:-2] + b"xx", data),
            ("service-ips4", raw[:4] + b"\x01" + raw[5:], data),
            ("service-ips4", raw, data[:-4]),
            ("service-ips4", raw, data[:-2] + b"xx"),
            ("service-ips4", raw, b""),
            ("service-ips6", raw, data),
            ("blocked-ips4", raw, data),
            ("blocked-ips4", raw, jump),
        ):
            self.assertRaises(Unreadable, nftreading.decodeMap, name, where, what)

    def test_strangeSources(self) -> None:
        """The same for the elements of sets."""
        where = key("203.0.113.5", 80)
        raw = nftelements.keyBytes(where)
        first, last = nftelements.allowedBytes(Allowed(where, "10.0.0.0/8"))
        for name, one, two in (
            ("proxy-ports4", b"\x06", b""),
            ("cluster-ips4", bytes(16), b""),
            ("cluster-ips6", bytes(4), b""),
            ("restricted-ips4", raw[:-1], b""),
            ("restricted-ips4", raw[:-1] + b"x", b""),
            ("restricted-ips6", raw, b""),
            ("allowed-sources4", raw, raw),
            ("allowed-sources4", first, last[:-1] + b"\xfe"),  # no network
            ("allowed-sources4", last, first),  # none at all
            ("allowed-sources4", first, first[:3] + b"\x06" + last[4:]),  # several addresses
            ("allowed-sources4", first, last[:10] + b"\x51" + last[11:]),  # several ports
            ("allowed-sources4", first, last + bytes(12)),
            ("allowed-sources6", first, last),
        ):
            it = nftreading.Raw(one, b"", False, two)
            self.assertRaises(Unreadable, nftreading.decode, name, it)

    def test_sourceBytes(self) -> None:
        """A frontend and a network are, byte for byte, an element with the end of its key."""
        it = Allowed(key("203.0.113.5", 443), "10.0.0.0/8")
        self.assertEqual(
            nftelements.itemElement(it).hex(" ", 4),
            "34000180"  # an element
            " 18000180 14000100 cb007105 06000000 01bb0000 0a000000"  # its key: address, protocol, port, first source
            " 18000a80 14000100 cb007105 06000000 01bb0000 0affffff",  # the end of it: the last source
        )
        [raw] = nftreading.elementsIn(attribute(3, nftelements.element(nftelements.allowedBytes(it)[0])))
        one = Allowed(it.key, "10.0.0.0/32")
        self.assertEqual(nftreading.decode("allowed-sources4", raw), (one, None))

    def test_addressesWithMore(self) -> None:
        """What somebody has said beside an address does not keep it from being read; another size does."""
        it = nftelements.element(socket.inet_aton("10.96.0.1"), attribute(6, b"a comment"))
        self.assertEqual(list(nftreading.addresses("cluster-ips4", attribute(3, it))), ["10.96.0.1"])
        self.assertRaises(Unreadable, list, nftreading.addresses("cluster-ips6", attribute(3, it)))

    def test_guards(self) -> None:
        """Guards come and go with the family's set."""
        step = Step(
            removed=[("proxy-ports4", Guard("IPv4", "TCP", 1))], added=[("proxy-ports6", Guard("IPv6", "UDP", 2), None)]
        )
        found = [(kind, said.get(2)) for kind, said in read(nftelements.encode("kproxy", step)[0])]
        self.assertEqual(
            found[1:-1],
            [(nftelements.DELSETELEM, b"proxy-ports4\0"), (nftelements.NEWSETELEM, b"proxy-ports6\0")],
        )

    def test_valuesShared(self) -> None:
        """Frontends that lead to one socket give one encoding of it."""
        rules = {key(f"10.96.0.{n}", 80): same(to(40001)) for n in range(1, 4)}
        data, _ = nftelements.encode("kproxy", wholeStep(Ruleset(rules)))
        self.assertEqual(data.count(nftelements.valueBytes(to(40001))), 3)

    def test_module(self) -> None:
        """The numbers of the subsystem are those of the header files."""
        self.assertEqual((nftelements.NEWSETELEM, nftelements.GETSETELEM, nftelements.DELSETELEM), (2572, 2573, 2574))
        self.assertEqual(netlink.NETLINK_NETFILTER, 12)
