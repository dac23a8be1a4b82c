"""Tests of twisted_kproxy.core.locality."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.builders import node, serviceCIDR
from twisted_kproxy.core import wire
from twisted_kproxy.core.locality import (
    NO_SETTINGS,
    NodeSettings,
    addressesOf,
    localityOf,
    podNetworks,
    serviceNetworks,
    takenPorts,
)
from twisted_kproxy.core.values import PLAIN

PODS = ("10.244.0.0/16", "fd00:10:244::/56")
HERE = ["10.244.3.0/24", "fd00:10:244:3::/64"]


class InsiderTests(SynchronousTestCase):
    """How pods are told from everybody else (kubernetes cmd/kube-proxy/app/server_linux.go, getLocalDetectors)."""

    def insiders(self, of: Any = None, **settings: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        locality, _ = localityOf(NodeSettings(**settings), of)
        return locality.insiders, locality.insiderLinks

    def test_nothingSaid(self) -> None:
        """Without a word nobody is inside but the node itself, and node ports are everywhere."""
        self.assertEqual(localityOf(NO_SETTINGS, None), (PLAIN, []))
        self.assertEqual(localityOf(NO_SETTINGS, node(podCIDRs=HERE)), (PLAIN, []))

    def test_clusterCIDR(self) -> None:
        """The networks of the configuration, whatever the Node says."""
        self.assertEqual(self.insiders(node(podCIDRs=HERE), clusterCIDRs=PODS), (PODS, ()))

    def test_nodeCIDR(self) -> None:
        """The networks of the Node; nobody as long as it has none."""
        self.assertEqual(self.insiders(detectLocal="node-cidr"), ((), ()))
        self.assertEqual(self.insiders(node(), detectLocal="node-cidr"), ((), ()))
        self.assertEqual(self.insiders(node(podCIDRs=HERE), detectLocal="node-cidr"), (tuple(HERE), ()))

    def test_interfaces(self) -> None:
        """One bridge, or all interfaces that begin so; no networks."""
        self.assertEqual(self.insiders(detectLocal="bridge", podInterface="cni0"), ((), ("cni0",)))
        self.assertEqual(self.insiders(detectLocal="interface-prefix", podInterface="veth"), ((), ("veth*",)))
        self.assertEqual(self.insiders(node(podCIDRs=HERE), detectLocal="bridge", podInterface="b"), ((), ("b",)))

    def test_podNetworks(self) -> None:
        """The old single field counts where the list is not there; sloppy ones are read, bad ones left out."""
        self.assertEqual(podNetworks(None), [])
        self.assertEqual(podNetworks(wire.Node(wire.ObjectMeta("n0"))), [])
        self.assertEqual(podNetworks(node(podCIDR="10.244.3.0/24")), ["10.244.3.0/24"])
        self.assertEqual(podNetworks(node(podCIDR="10.0.0.0/8", podCIDRs=["10.244.3.0/24"])), ["10.244.3.0/24"])
        bad = ["10.244.003.7/24", "pods", "10.244.4.0", "10.244.5.0/33", "fd00::/129"]
        self.assertEqual(podNetworks(node(podCIDRs=bad)), ["10.244.3.0/24"])


class NodePortTests(SynchronousTestCase):
    """Where node ports are served (kubernetes pkg/proxy/util/nodeport_addresses.go)."""

    def at(self, *words: str, addresses: Any = ("192.0.2.7", "2001:db8::7")) -> tuple[str, ...]:
        return localityOf(NodeSettings(nodePortAddresses=words), None, addresses)[0].nodePorts

    def test_all(self) -> None:
        """All is every address; so is nothing."""
        self.assertEqual(self.at("all"), ("0.0.0.0/0", "::/0"))
        self.assertEqual(self.at(), ("0.0.0.0/0", "::/0"))

    def test_networks(self) -> None:
        """Networks restrict their own family; one of which none is given means every address of it."""
        self.assertEqual(self.at("192.0.2.0/24"), ("192.0.2.0/24", "::/0"))
        self.assertEqual(self.at("2001:db8::/32"), ("0.0.0.0/0", "2001:db8::/32"))
        self.assertEqual(self.at("192.0.2.0/24", "2001:db8::/32"), ("192.0.2.0/24", "2001:db8::/32"))

    def test_zeroWins(self) -> None:
        """A network of everything wins over the others of its family; so does the word."""
        self.assertEqual(self.at("192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32"), ("0.0.0.0/0", "2001:db8::/32"))
        self.assertEqual(self.at("192.0.2.0/24", "all"), ("0.0.0.0/0", "::/0"))

    def test_primary(self) -> None:
        """The addresses of the node. A family in which it has none is not served: the word is about both."""
        self.assertEqual(self.at("primary"), ("192.0.2.7/32", "2001:db8::7/128"))
        self.assertEqual(self.at("primary", addresses=["192.0.2.7"]), ("192.0.2.7/32",))
        self.assertEqual(self.at("primary", addresses=[]), ())

    def test_localhost(self) -> None:
        """Loopback of both families, and nothing else."""
        self.assertEqual(self.at("localhost"), ("127.0.0.0/8", "::1/128"))

    def test_together(self) -> None:
        """Words and networks add up, each once, sorted by number, adjacent ones joined."""
        self.assertEqual(
            self.at("primary", "localhost", "192.0.2.0/24", addresses=["192.0.2.7", "198.51.100.9", "2001:db8::7"]),
            ("127.0.0.0/8", "192.0.2.0/24", "198.51.100.9/32", "::1/128", "2001:db8::7/128"),
        )
        self.assertEqual(self.at("192.0.2.128/25", "192.0.2.0/25", "::/1", "8000::/1"), ("192.0.2.0/24", "::/0"))

    def test_order(self) -> None:
        """Whatever the order of words and addresses, the result is equal: rules are not written again for it."""
        words = ["primary", "localhost", "203.0.113.0/24", "10.0.0.0/8"]
        addresses = ["192.0.2.7", "198.51.100.9", "2001:db8::7"]
        self.assertEqual(self.at(*words, addresses=addresses), self.at(*words[::-1], addresses=addresses[::-1]))

    def test_taken(self) -> None:
        """No node port is where this proxy itself answers, as far as node ports are served at that address."""
        for words, listeners, expected in (
            (("all",), NO_SETTINGS.listeners, {10256, 10249}),
            (("192.0.2.0/24",), NO_SETTINGS.listeners, {10256}),
            (("localhost",), NO_SETTINGS.listeners, {10256, 10249}),
            (("all",), (), set()),
            (("192.0.2.0/24",), (("192.0.2.7", 1), ("198.51.100.7", 2), ("::1", 3)), {1, 3}),
            (("192.0.2.0/24", "2001:db8::/32"), (("::", 1), ("::1", 2)), {1}),
        ):
            settings = NodeSettings(nodePortAddresses=words, listeners=listeners)
            self.assertEqual(takenPorts(settings, localityOf(settings, None)[0]), expected, (words, listeners))
        settings = NodeSettings(nodePortAddresses=("primary",))
        self.assertEqual(takenPorts(settings, localityOf(settings, None, ["2001:db8::7"])[0]), set())


class AddressTests(SynchronousTestCase):
    """The node's own addresses."""

    def test_types(self) -> None:
        """Internal and external ones; names are none."""
        it = node(addresses=[
            "192.0.2.7", ("ExternalIP", "198.51.100.7"), ("Hostname", "192.0.2.99"), ("InternalDNS", "n0.example"),
            "2001:DB8:0::7",
        ])  # fmt: skip
        self.assertEqual(addressesOf(it), {"192.0.2.7", "198.51.100.7", "2001:db8::7"})

    def test_unreadable(self) -> None:
        """One that is none costs only itself."""
        self.assertEqual(addressesOf(node(addresses=["192.0.2.07", "n0", ""])), {"192.0.2.7"})
        self.assertEqual(addressesOf(None), frozenset())
        self.assertEqual(addressesOf(wire.Node(wire.ObjectMeta("n0"))), frozenset())


class ServiceNetworkTests(SynchronousTestCase):
    """The networks of ClusterIPs."""

    def test_joined(self) -> None:
        """Those of all objects together, in one form whatever their order; bad ones left out."""
        one, other = serviceCIDR("10.96.0.0/13", "fd00:96::/112"), serviceCIDR("10.104.0.0/13", "x", name="more")
        for objects in ({"a": one, "b": other}, {"b": other, "a": one}):
            locality, problems = localityOf(NO_SETTINGS, None, services=objects)
            self.assertEqual(locality.services, ("10.96.0.0/12", "fd00:96::/112"))
            self.assertEqual([(it.kind, it.key) for it in problems], [("ServiceCIDR", "b")])

    def test_empty(self) -> None:
        """An object without spec or networks is nothing."""
        bare = wire.ServiceCIDR(wire.ObjectMeta("bare"))
        self.assertEqual(serviceNetworks({"a": bare, "b": serviceCIDR()}), ([], []))

    def test_tooWide(self) -> None:
        """
        A network that holds everything, or pods, would cut the node or its pods off: it is left out, and told of.
        """
        objects = {"wide": serviceCIDR("0.0.0.0/0", "::/0", "10.0.0.0/8", "10.96.0.0/12")}
        settings = NodeSettings(clusterCIDRs=("10.244.0.0/16",))
        locality, problems = localityOf(settings, None, services=objects)
        self.assertEqual(locality.services, ("10.96.0.0/12",))
        self.assertEqual(
            [it.reason for it in problems],
            [
                "0.0.0.0/0 is every address there is; it is left out",
                "::/0 is every address there is; it is left out",
                "10.0.0.0/8 overlaps 10.244.0.0/16, of pods; it is left out",
            ],
        )
