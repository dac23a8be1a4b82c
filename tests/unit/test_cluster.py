"""Tests of twisted_kproxy.cluster."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.builders import member, node, portName, service, slice_
from twisted_kproxy.cluster import Cluster
from twisted_kproxy.core import wire
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.locality import NO_SETTINGS, NodeSettings
from twisted_kproxy.core.surroundings import MOST_SERVERS
from twisted_kproxy.core.values import Change, Kind, Reached, Rejected, Replaced, ServiceMap, Word
from twisted_kproxy.interfaces import IChannel

KINDS = ("Service", "EndpointSlice", "Endpoints", "Node")


class ClusterTestCase(SynchronousTestCase):
    """A cluster with one synced source, ``s``."""

    def setUp(self) -> None:
        self.changes = 0
        self.cluster = self.make("s")

    def make(self, *sources: str, synced: bool = True, configured: NodeSettings = NO_SETTINGS) -> Cluster:
        cluster = Cluster("n0", settings=configured)
        cluster.changed = self.count
        for name in sources:
            cluster.expect(name, KINDS)
        if synced:
            for name in sources:
                for kind in KINDS:
                    cluster.say(Replaced(name, kind, {}))
        return cluster

    def count(self) -> None:
        self.changes += 1

    def put(self, it: Any, source: str = "s", cluster: Cluster | None = None) -> None:
        kind: Kind = type(it).__name__
        (cluster or self.cluster).say(Change(source, kind, wire.keyOf(it.metadata), it))

    def drop(self, kind: Kind, key: str, source: str = "s") -> None:
        self.cluster.say(Change(source, kind, key, None))

    def ends(self, name: Any = None) -> list[str] | None:
        port = self.cluster.current().get(name or portName())
        return None if port is None else [str(it) for it in port.cluster]


class SyncTests(ClusterTestCase):
    """Nothing counts before everything was listed once."""

    def test_interface(self) -> None:
        """It is a channel."""
        verifyObject(IChannel, self.cluster)

    def test_everyKindOfEverySource(self) -> None:
        """Only when each source has said each kind is the cluster synced, and the last one tells."""
        cluster = self.make("a", "b", synced=False)
        self.assertEqual(len(cluster.missing), 8)
        for name in ("a", "b"):
            for kind in KINDS:
                self.assertFalse(cluster.synced)
                self.changes = 0
                cluster.say(Replaced(name, kind, {}))
                self.assertEqual(self.changes, 1)
        self.assertTrue(cluster.synced)
        self.assertEqual(cluster.missing, [])


class ServersTests(ClusterTestCase):
    """No Service may take the place of the API server."""

    def served(self) -> list[str]:
        """The external addresses that are served."""
        frontends = self.cluster.current()[portName()].frontends
        return [it.address for it in frontends if it.kind == "ExternalIP" and it.address]

    def external(self, *addresses: str, port: int = 6443) -> None:
        self.put(service(externalIPs=list(addresses), ports=[{"name": "http", "port": port}]))

    def kubernetes(self, *addresses: str, name: str = "kubernetes", port: int = 6443) -> None:
        ports = [{"name": "https", "port": port, "protocol": "TCP"}, {"name": "any"}]
        members = [member(it, ready=False) for it in addresses]
        self.put(slice_(*members, name=name, of="kubernetes", namespace="default", ports=ports))

    def test_reached(self) -> None:
        """Where a source reaches its server, whenever it says so; each has its own word."""
        self.external("192.0.2.4", "192.0.2.5", "192.0.2.6")
        self.assertEqual(len(self.served()), 3)
        self.cluster.say(Reached("s", frozenset({("192.0.2.4", 6443), ("192.0.2.6", 443)})))
        self.assertEqual(self.served(), ["192.0.2.5", "192.0.2.6"])
        self.cluster.say(Reached("t", frozenset({("192.0.2.5", 6443)})))
        self.assertEqual(self.served(), ["192.0.2.6"])
        self.cluster.say(Reached("s", frozenset()))
        self.assertEqual(self.served(), ["192.0.2.4", "192.0.2.6"])

    def test_sameAgain(self) -> None:
        """The same said again makes no work."""
        self.external("192.0.2.4")
        self.cluster.say(Reached("s", frozenset({("192.0.2.4", 6443)})))
        self.cluster.current()
        self.changes = 0
        self.cluster.say(Reached("s", frozenset({("192.0.2.4", 6443)})))
        self.assertEqual((self.changes, self.cluster.settled), (0, True))

    def test_endpointsOfKubernetes(self) -> None:
        """The endpoints of Service default/kubernetes are API servers, ready or not."""
        self.external("192.0.2.4", "192.0.2.5")
        self.kubernetes("192.0.2.4")
        self.assertEqual(self.served(), ["192.0.2.5"])
        self.kubernetes("192.0.2.5", name="another")
        self.assertEqual(self.served(), [])
        self.drop("EndpointSlice", "default/kubernetes")
        self.assertEqual(self.served(), ["192.0.2.4"])
        self.kubernetes("192.0.2.5", name="another", port=443)
        self.assertEqual(self.served(), ["192.0.2.4", "192.0.2.5"])

    def test_legacyEndpointsOfKubernetes(self) -> None:
        """So where there are only Endpoints."""
        self.external("192.0.2.4")
        it = {
            "metadata": {"name": "kubernetes", "namespace": "default"},
            "subsets": [{"addresses": [{"ip": "192.0.2.4"}], "ports": [{"name": "https", "port": 6443}]}],
        }
        self.put(wire.convert("Endpoints", it))
        self.assertEqual(self.served(), [])

    def test_othersOfThatName(self) -> None:
        """A Service of that name in another namespace says nothing about API servers."""
        self.external("192.0.2.4")
        ports = [{"name": "https", "port": 6443, "protocol": "TCP"}]
        self.put(slice_(member("192.0.2.4"), name="kubernetes", of="kubernetes", ports=ports))
        self.assertEqual(self.served(), ["192.0.2.4"])

    def test_unrelatedChangesAreCheap(self) -> None:
        """Only another set of servers has every Service resolved anew."""
        self.external("192.0.2.4")
        self.kubernetes("192.0.2.4")
        self.cluster.current()
        self.kubernetes("192.0.2.4", name="kubernetes")
        self.kubernetes("192.0.2.4", name="again")
        self.put(slice_(member("10.1.0.1"), name="other-1", of="other"))
        self.assertNotIn(("shop", "web"), self.cluster._dirty)

    def test_bounded(self) -> None:
        """Whoever lists thousands there does not fill memory, nor break anything."""
        self.external("192.0.2.4")
        self.kubernetes(*(f"10.9.{n // 256}.{n % 256}" for n in range(3000)), "nonsense")
        self.assertEqual(self.served(), ["192.0.2.4"])
        self.assertEqual(len(self.cluster._surroundings.servers[""]), MOST_SERVERS)

    def test_hostAddresses(self) -> None:
        """A node port of the API server on this node is refused: by the machine's addresses until the Node says."""
        self.put(service(type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}]))
        self.cluster.say(Reached("s", frozenset({("192.0.2.2", 30080)})))

        def nodePorts() -> int:
            return sum(it.kind == "NodePort" for it in self.cluster.current()[portName()].frontends)

        self.assertEqual(nodePorts(), 1)
        self.changes = 0
        self.cluster.hostAddresses(["192.0.2.2"])
        self.assertEqual((self.changes, nodePorts()), (1, 0))
        self.cluster.hostAddresses(["192.0.2.2"])
        self.assertEqual(self.changes, 1)
        addresses = [{"type": "InternalIP", "address": "192.0.2.3"}]
        self.put(wire.convert("Node", {"metadata": {"name": "n0"}, "status": {"addresses": addresses}}))
        self.assertEqual(nodePorts(), 1)
        self.cluster.hostAddresses(["192.0.2.7"])
        self.assertEqual(nodePorts(), 1)
        self.drop("Node", "n0")
        self.cluster.hostAddresses(["192.0.2.2"])
        self.assertEqual(nodePorts(), 0)


class MergeTests(ClusterTestCase):
    """From words to a map."""

    def test_eitherOrder(self) -> None:
        """Service before slice, slice before Service: the same map."""
        self.put(service())
        self.assertEqual(self.ends(), [])
        self.put(slice_(member("10.1.0.1")))
        self.assertEqual(self.ends(), ["10.1.0.1:8080"])
        self.drop("Service", "shop/web")
        self.assertIsNone(self.ends())
        self.put(service())
        self.assertEqual(self.ends(), ["10.1.0.1:8080"])

    def test_sameObjectWhenUnchanged(self) -> None:
        """Fields that mean nothing here change neither the map nor the service port objects."""
        self.put(service())
        before = self.cluster.current()
        self.put(service(labels={"unrelated": "x"}))
        self.assertIs(self.cluster.current(), before)
        self.put(service("other", clusterIP="10.96.0.11"))
        after = self.cluster.current()
        self.assertIs(after[portName()], before[portName()])
        self.assertGreater(after.generation, before.generation)

    def test_equalWordIsSilent(self) -> None:
        """The same object said again causes no work."""
        self.put(service())
        self.changes = 0
        self.put(service())
        self.assertEqual(self.changes, 0)

    def test_replaceIsADiff(self) -> None:
        """A relist removes what is missing, adds what is new and leaves the rest alone."""
        self.put(service("a", clusterIP="10.96.0.1"))
        self.put(service("b", clusterIP="10.96.0.2"))
        before = self.cluster.current()
        kept, fresh = service("b", clusterIP="10.96.0.2"), service("c", clusterIP="10.96.0.3")
        self.cluster.say(Replaced("s", "Service", {"shop/b": kept, "shop/c": fresh}))
        after = self.cluster.current()
        self.assertEqual({name.service for name in after}, {"b", "c"})
        self.assertIs(after[portName("b")], before[portName("b")])

    def test_sliceMovesToAnotherService(self) -> None:
        """A slice whose label changes leaves one Service and joins the other."""
        self.put(service())
        self.put(service("other", clusterIP="10.96.0.11"))
        self.put(slice_(member("10.1.0.1")))
        self.put(slice_(member("10.1.0.1"), of="other"))
        self.assertEqual((self.ends(), self.ends(portName("other"))), ([], ["10.1.0.1:8080"]))

    def test_sliceLosesLabel(self) -> None:
        """A slice that loses its Service label (or becomes headless) is no longer used."""
        self.put(service())
        for it in (slice_(member("10.1.0.1"), of=None), slice_(member("10.1.0.1"), labels={wire.HEADLESS_LABEL: ""})):
            self.put(slice_(member("10.1.0.1")))
            self.assertEqual(self.ends(), ["10.1.0.1:8080"])
            self.put(it)
            self.assertEqual(self.ends(), [])

    def test_noClusterIP(self) -> None:
        """A Service that has no address is a problem until it gets one, says that it wants none, or is gone."""
        for mended in (service(), service(clusterIP="None"), service(type="ExternalName", clusterIP=""), None):
            self.put(service(clusterIP=""))
            self.cluster.current()
            [problem] = self.cluster.problems()
            self.assertEqual((problem.kind, problem.key), ("Service", "shop/web"))
            self.assertIn("it has no clusterIP", problem.reason)
            if mended is None:
                self.drop("Service", "shop/web")
            else:
                self.put(mended)
            self.cluster.current()
            self.assertEqual(self.cluster.problems(), [])

    def test_sliceOfAnotherNamespace(self) -> None:
        """A slice feeds only a Service of its own namespace."""
        self.put(service())
        self.put(slice_(member("10.1.0.1"), namespace="evil"))
        self.assertEqual(self.ends(), [])

    def test_endpointMovesBetweenSlices(self) -> None:
        """An endpoint that is in two slices for a moment is used once, and never missing."""
        self.put(service())
        self.put(slice_(member("10.1.0.1"), name="a"))
        self.put(slice_(member("10.1.0.1"), name="b"))
        self.assertEqual(self.ends(), ["10.1.0.1:8080"])
        self.put(slice_(name="a"))
        self.assertEqual(self.ends(), ["10.1.0.1:8080"])

    def test_legacyEndpoints(self) -> None:
        """An Endpoints object feeds the Service of its name, and can be changed and removed."""
        def endpoints(*ips: str) -> Any:
            subset = {"addresses": [{"ip": ip} for ip in ips], "ports": [{"name": "http", "port": 8080}]}
            return wire.convert("Endpoints", {"metadata": {"name": "web", "namespace": "shop"}, "subsets": [subset]})

        self.put(service())
        self.put(endpoints("10.1.0.1", "10.1.0.2"))
        self.assertEqual(self.ends(), ["10.1.0.1:8080", "10.1.0.2:8080"])
        self.put(endpoints("10.1.0.2"))
        self.assertEqual(self.ends(), ["10.1.0.2:8080"])
        self.drop("Endpoints", "shop/web")
        self.assertEqual(self.ends(), [])

    def test_zone(self) -> None:
        """When this node's zone changes, hints are looked at again; other nodes do not matter."""
        hinted = [member(f"10.1.0.{n}", hints={"forZones": [{"name": zone}]}) for n, zone in ((1, "a"), (2, "b"))]
        self.put(service())
        self.put(slice_(*hinted))
        self.assertEqual(len(self.ends() or ()), 2)
        self.put(node("n0", "b"))
        self.assertEqual(self.ends(), ["10.1.0.2:8080"])
        self.put(node("n1", "a"))
        self.assertEqual(self.ends(), ["10.1.0.2:8080"])
        self.drop("Node", "n0")
        self.assertEqual(len(self.ends() or ()), 2)

    def test_podNetworks(self) -> None:
        """With detect-local = node-cidr, the pods of this node are where its Node says, as soon as it does."""
        self.cluster = self.make("s", configured=NodeSettings(detectLocal="node-cidr"))
        self.put(service())
        before = self.cluster.current()
        self.assertEqual(before.locality.insiders, ())
        seen = []
        for spec in ({"podCIDR": "10.244.3.0/24"}, {"podCIDRs": ["10.244.4.0/24", "fd00:10:244:4::/64"]}, {}):
            self.changes = 0
            self.put(wire.convert("Node", {"metadata": {"name": "n0"}, "spec": spec}))
            self.put(wire.convert("Node", {"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.9.0/24"}}))
            self.assertGreater(self.changes, 0)
            seen.append(self.cluster.current())
        self.assertEqual(
            [it.locality.insiders for it in seen],
            [("10.244.3.0/24",), ("10.244.4.0/24", "fd00:10:244:4::/64"), ()],
        )
        # That is all that is new: no Service means anything else by it, so nothing is to be rendered again.
        self.assertIs(seen[-1][portName()], before[portName()])
        self.assertGreater(seen[1].generation, seen[0].generation)
        self.drop("Node", "n0")
        self.assertEqual(self.cluster.current().locality.insiders, ())

    def test_serviceNetworks(self) -> None:
        """ServiceCIDRs need not be promised; they are followed, and those of two sources are one set by name."""
        for name, cidrs in (("kubernetes", ["10.96.0.0/16"]), ("more", ["10.97.0.0/16", "nonsense"])):
            self.put(wire.convert("ServiceCIDR", {"metadata": {"name": name}, "spec": {"cidrs": cidrs}}))
        self.assertEqual(self.cluster.current().locality.services, ("10.96.0.0/15",))
        self.drop("ServiceCIDR", "more")
        self.assertEqual(self.cluster.current().locality.services, ("10.96.0.0/16",))

    def test_nodeCallbacks(self) -> None:
        """Who wants to know is told of this node's object, and of each list of nodes."""
        seen: list[object] = []
        self.cluster.nodeChanged = seen.append
        self.cluster.nodesListed = seen.append
        mine = node("n0", "a")
        self.put(mine)
        self.put(node("n1", "a"))
        self.drop("Node", "n0")
        self.cluster.say(Replaced("s", "Node", {}))
        self.assertEqual(seen, [mine, None, "s"])

    def test_recreated(self) -> None:
        """Another uid under the same name is another service port."""
        self.put(service())
        before = self.cluster.current()[portName()]
        self.put(service(uid="u2"))
        self.assertNotEqual(self.cluster.current()[portName()], before)

    def test_recreatedInList(self) -> None:
        """So is one that a list brings, whatever else is equal: who was bound to the old one is not to the new one."""
        self.put(service())
        self.put(slice_(member("10.1.0.1")))
        before = self.cluster.current()
        self.cluster.say(Replaced("s", "Service", {"shop/web": service(uid="u2")}))
        after = self.cluster.current()
        self.assertEqual(after[portName()].cluster, before[portName()].cluster)
        self.assertEqual(after[portName()].uid, "u2")
        self.assertEqual(Update(before, after).changed, {portName()})

    def test_goneAndAddedAtOnce(self) -> None:
        """The same where it is told as gone and as new, without a map in between."""
        self.put(service())
        before = self.cluster.current()
        self.drop("Service", "shop/web")
        self.put(service(uid="u2"))
        self.assertEqual(Update(before, self.cluster.current()).changed, {portName()})

    def test_equalList(self) -> None:
        """A list of equal objects, the same ones or not, is no change."""
        self.put(service())
        self.changes = 0
        for it in (service(), self.cluster._merged["Service"]["shop/web"]):
            self.cluster.say(Replaced("s", "Service", {"shop/web": it}))
        self.assertEqual(self.changes, 0)

    def long(self, count: int = 1800) -> dict[str, Any]:
        return {f"shop/s{n}": service(f"s{n}", clusterIP=f"10.96.{n // 250}.{n % 250 + 1}") for n in range(count)}

    def test_longList(self) -> None:
        """A long list is taken over in pieces; the map is the same as if it were not."""
        self.changes = 0
        self.cluster.say(Replaced("s", "Service", self.long()))
        self.assertEqual(self.changes, 1)
        self.assertLess(self.cluster.counts()["Service"], 1800)
        turns = 1
        while self.cluster.catchUp():
            turns += 1
        self.assertGreaterEqual(turns, 18)
        self.assertEqual(self.cluster.counts()["Service"], 1800)
        self.assertEqual(len(self.cluster.current()), 1800)

    def test_changeWithinLongList(self) -> None:
        """What is said while a long list is being taken over counts, whichever of its objects it is about."""
        self.cluster.say(Replaced("s", "Service", self.long()))
        self.cluster.catchUp()
        for number in (0, 700, 1799):
            self.put(service(f"s{number}", clusterIP=f"10.97.{number // 250}.9" if number else None))
        self.drop("Service", "shop/s1500")
        current = self.cluster.current()
        self.assertEqual(len(current), 1798)
        for number in (700, 1799):
            (frontend,) = current[portName(f"s{number}")].frontends
            self.assertEqual(frontend.address, f"10.97.{number // 250}.9")

    def test_longListTwice(self) -> None:
        """A second list before the first is taken over: the second counts."""
        self.cluster.say(Replaced("s", "Service", self.long()))
        self.cluster.say(Replaced("s", "Service", self.long(3)))
        self.assertEqual(len(self.cluster.current()), 3)
        self.assertEqual(self.cluster.counts()["Service"], 3)

    def test_manyEndpoints(self) -> None:
        """Services with many endpoints are resolved in smaller pieces, but at least one at a time."""
        for number in range(8):
            self.put(service(f"s{number}", clusterIP=f"10.96.1.{number}"))
            ends = [member(f"10.1.{number}.{n}") for n in range(250)]
            for part in range(4):
                self.put(slice_(*ends, name=f"s{number}-{part}", of=f"s{number}"))
        turns = 1
        while self.cluster.catchUp():
            turns += 1
        self.assertEqual(turns, 8)
        self.assertFalse(self.cluster.catchUp())

    def test_catchUp(self) -> None:
        """Work is done in bounded pieces, none of it lost."""
        many = {f"shop/s{n}": service(f"s{n}", clusterIP=f"10.96.1.{n}") for n in range(25)}
        self.cluster.say(Replaced("s", "Service", many))
        self.assertEqual([self.cluster.catchUp(10) for _ in range(3)], [True, True, False])
        self.assertEqual(len(self.cluster.current()), 25)


class SourcesTests(ClusterTestCase):
    """Several sources form a union."""

    def test_firstWins(self) -> None:
        """For one key the first source in order wins; the other takes over when it lets go."""
        self.cluster = self.make("a", "b")
        self.put(service(clusterIP="10.96.0.1"), "b")
        self.put(service(clusterIP="10.96.0.2"), "a")

        def ip() -> str | None:
            return self.cluster.current()[portName()].frontends[0].address

        self.assertEqual(ip(), "10.96.0.2")
        self.drop("Service", "shop/web", "a")
        self.assertEqual(ip(), "10.96.0.1")

    def test_serviceHereSlicesThere(self) -> None:
        """A Service of one source is joined with slices of another."""
        self.cluster = self.make("a", "b")
        self.put(service(), "a")
        self.put(slice_(member("10.1.0.1")), "b")
        self.assertEqual(self.ends(), ["10.1.0.1:8080"])


class OwnershipTests(ClusterTestCase):
    """Frontends that several Services claim."""

    def test_loserWaitsAndIsPromoted(self) -> None:
        """The older Service serves the external IP; the other is shown as pending and takes over later."""
        old = service("old", clusterIP="10.96.0.1", externalIPs=["198.51.100.7"], created="2026-01-01T00:00:00Z")
        young = service("young", clusterIP="10.96.0.2", externalIPs=["198.51.100.7"], created="2026-02-01T00:00:00Z")
        self.put(young)
        self.put(old)

        def kinds(name: str) -> list[str]:
            return [f.kind for f in self.cluster.current()[portName(name)].frontends]

        self.assertEqual((kinds("old"), kinds("young")), (["ClusterIP", "ExternalIP"], ["ClusterIP"]))
        self.assertEqual(
            self.cluster.pending(),
            {"shop/young:http/TCP/IPv4": {"198.51.100.7:80/TCP": "shop/old:http/TCP/IPv4"}},
        )
        (problem,) = self.cluster.problems()
        self.assertEqual(problem.key, "shop/young")
        self.assertTrue(problem.reason.endswith("is served by shop/old:http/TCP/IPv4, older or first by name"))
        self.drop("Service", "shop/old")
        self.assertEqual(kinds("young"), ["ClusterIP", "ExternalIP"])
        self.assertEqual(self.cluster.problems(), [])
        self.assertEqual(self.cluster.pending(), {})

    def test_fromAFile(self) -> None:
        """An object without age (from a file) takes nothing from one that the cluster has."""
        self.put(service("aaa", clusterIP="10.96.0.10"))
        self.put(service("web", clusterIP="10.96.0.10", created="2026-01-01T00:00:00Z"))
        now = self.cluster.current()
        self.assertEqual([len(now[portName(name)].frontends) for name in ("aaa", "web")], [0, 1])

    def test_swap(self) -> None:
        """Two Services swap their node ports in one go."""
        def it(name: str, ip: str, number: int) -> Any:
            return service(name, clusterIP=ip, ports=[{"name": "http", "port": 80, "nodePort": number}])

        self.put(it("a", "10.96.0.1", 30001))
        self.put(it("b", "10.96.0.2", 30002))
        self.cluster.current()
        self.put(it("a", "10.96.0.1", 30002))
        self.put(it("b", "10.96.0.2", 30001))
        now = self.cluster.current()
        self.assertEqual([now[portName(n)].frontends[-1].port for n in "ab"], [30002, 30001])


class LocalityTests(ClusterTestCase):
    """Which addresses mean what follows what is known of the node."""

    def put(self, it: Any, source: str = "s", cluster: Cluster | None = None) -> None:
        self.changes = 0
        super().put(it, source, cluster)

    def test_podNetworks(self) -> None:
        """With node-cidr insiders are those whom the Node object names, as soon as it does; service ports stay."""
        self.cluster = self.make("s", configured=NodeSettings(detectLocal="node-cidr"))
        self.put(service())
        before = self.cluster.current()
        self.assertEqual(before.locality.insiders, ())
        self.put(node(podCIDRs=["10.244.3.0/24"]))
        self.assertEqual(self.changes, 1)
        self.assertFalse(self.cluster.settled)
        after = self.cluster.current()
        self.assertTrue(self.cluster.settled)
        self.assertEqual(after.locality.insiders, ("10.244.3.0/24",))
        self.assertIs(after[portName()], before[portName()])
        update = Update(before, after)
        self.assertEqual((update.changed, update.relocated, bool(update)), (frozenset(), True, True))
        self.drop("Node", "n0")
        self.assertEqual(self.cluster.current().locality.insiders, ())

    def test_otherNodes(self) -> None:
        """Other nodes do not matter, nor what else is in this one."""
        self.cluster = self.make("s", configured=NodeSettings(detectLocal="node-cidr", nodePortAddresses=("primary",)))
        self.put(node(podCIDRs=["10.244.3.0/24"], addresses=["192.0.2.7"]))
        before = self.cluster.current()
        self.put(node("n1", podCIDRs=["10.244.4.0/24"], addresses=["192.0.2.8"]))
        self.put(node(podCIDRs=["10.244.3.0/24"], addresses=["192.0.2.7"], taints=[{"key": "x"}]))
        self.assertIs(self.cluster.current(), before)

    def test_hostAddresses(self) -> None:
        """Until the Node object says its addresses, those by which the machine talks to others are taken for them."""
        self.cluster = self.make("s", configured=NodeSettings(nodePortAddresses=("primary",)))

        def at() -> tuple[str, ...]:
            return self.cluster.current().locality.nodePorts

        self.assertEqual(at(), ())
        self.changes = 0
        self.cluster.hostAddresses(["192.0.2.7", "2001:db8::7"])
        self.assertEqual(at(), ("192.0.2.7/32", "2001:db8::7/128"))
        self.cluster.hostAddresses(["2001:db8::7", "192.0.2.7"])
        self.assertEqual(self.changes, 1)
        self.put(node(addresses=["198.51.100.7"]))
        self.assertEqual(at(), ("198.51.100.7/32",))
        self.cluster.hostAddresses(["203.0.113.7"])
        self.assertEqual(at(), ("198.51.100.7/32",))
        self.put(node())
        self.assertEqual(at(), ("203.0.113.7/32",))

    def test_ownAddress(self) -> None:
        """A ClusterIP that turns out to be the node's own address is served no longer; its owner's heir takes over."""
        self.put(service(clusterIP="192.0.2.7"))
        self.assertEqual(self.ends(), [])
        self.put(node(addresses=["192.0.2.7"]))
        self.assertIsNone(self.ends())
        self.put(node(addresses=["192.0.2.8"]))
        self.assertEqual(self.ends(), [])

    def test_atOnce(self) -> None:
        """A list of nodes counts at once, also while a long list of Services is being taken over."""
        self.cluster = self.make("s", configured=NodeSettings(detectLocal="node-cidr"))
        many = {f"shop/s{n}": service(f"s{n}", clusterIP=f"10.96.{n // 250}.{n % 250 + 1}") for n in range(1000)}
        self.cluster.say(Replaced("s", "Service", many))
        self.cluster.say(Replaced("s", "Node", {"n0": node(podCIDRs=["10.244.3.0/24"])}))
        self.assertEqual(self.cluster._locality.insiders, ("10.244.3.0/24",))
        self.assertEqual(len(self.cluster.current()), 1000)


class RefusalTests(ClusterTestCase):
    """Addresses that must not be reached."""

    def reach(self, *servers: tuple[str, int], source: str = "s") -> None:
        self.changes = 0
        self.cluster.say(Reached(source, frozenset(servers)))

    def frontends(self, name: str = "web") -> list[str]:
        port = self.cluster.current()[portName(name)]
        return [str(port.key(f)) for f in port.frontends]

    def test_refusedTakesNothing(self) -> None:
        """What one Service may not serve it does not keep from another that may: ownership is about what is served."""
        self.cluster = self.make("s", configured=NodeSettings(denied=("198.51.100.0/24",)))
        self.put(service("old", clusterIP="10.96.0.1", externalIPs=["198.51.100.7"], created="2025-01-01T00:00:00Z"))
        self.assertEqual(self.frontends("old"), ["10.96.0.1:80/TCP"])
        self.put(service("young", clusterIP="198.51.100.7", created="2026-01-01T00:00:00Z"))
        self.assertEqual(self.frontends("young"), ["198.51.100.7:80/TCP"])
        self.assertEqual(self.cluster.pending(), {})

    def test_counted(self) -> None:
        """Frontends and endpoints are counted by themselves, over all Services, and no longer when they are gone."""
        self.put(service(externalIPs=["127.0.0.1", "224.0.0.1", "nonsense"]))
        self.put(slice_(member("127.0.0.1"), member("10.1.0.1")))
        self.put(service("other", clusterIP="10.96.0.11", externalIPs=["::1"]))
        self.cluster.current()
        self.assertEqual(self.cluster.refused(), {"frontend": 3, "endpoint": 1})
        self.assertEqual(sum(it.refused for it in self.cluster.problems()), 4)
        self.drop("EndpointSlice", "shop/web-1")
        self.drop("Service", "shop/other")
        self.cluster.current()
        self.assertEqual(self.cluster.refused(), {"frontend": 2, "endpoint": 0})

    def test_loggedOnce(self) -> None:
        """What is refused is logged once, in one line for each object; not again when anything is resolved anew."""
        with capturedLogs() as logged:
            self.put(service(externalIPs=["127.0.0.1", "224.0.0.1"]))
            self.put(slice_(member("127.0.0.1")))
            self.cluster.current()
            self.put(node(addresses=["192.0.2.7"], zone="a"))
            self.cluster.current()
            self.reach(("192.0.2.1", 6443))
            self.cluster.current()
            self.put(slice_(member("127.0.0.1"), member("10.1.0.1")))
            self.put(service(externalIPs=["127.0.0.1", "224.0.0.1"], labels={"a": "b"}))
            self.cluster.current()
        self.assertEqual(
            [formatEvent(it) for it in logged],
            [
                "Service shop/web: externalIPs: 127.0.0.1 is a loopback address; it is not served; "
                "externalIPs: 224.0.0.1 is a multicast address; it is not served",
                "EndpointSlice shop/web-1: endpoint 127.0.0.1 is a loopback address; it is not used",
            ],
        )

    def test_loggedAgain(self) -> None:
        """What is mended, and wrong again later, is told again."""
        with capturedLogs() as logged:
            for addresses in (["127.0.0.1"], [], ["127.0.0.1"]):
                self.put(service(externalIPs=addresses))
                self.cluster.current()
        self.assertEqual(len(logged), 2)


class QuarantineTests(ClusterTestCase):
    """Objects that cannot be read."""

    def test_lastGoodStays(self) -> None:
        """A bad version keeps the last good one in force, is shown, and goes when it is mended."""
        self.put(service())
        self.cluster.say(Rejected("s", "Service", "shop/web", "spec is a fish"))
        self.assertEqual(self.ends(), [])
        self.assertEqual(
            self.cluster.quarantined(),
            [{"source": "s", "kind": "Service", "key": "shop/web", "reason": "spec is a fish", "lastGood": "serving"}],
        )
        self.put(service(clusterIP="10.96.0.99"))
        self.assertEqual(self.cluster.quarantined(), [])

    def test_inAList(self) -> None:
        """A bad object in a list costs only itself: neighbours are served and its last good version stays."""
        self.put(service())
        other = service("other", clusterIP="10.96.0.11")
        self.cluster.say(Replaced("s", "Service", {"shop/other": other}, {"shop/web": "bad", "shop/new": "worse"}))
        self.assertEqual({name.service for name in self.cluster.current()}, {"web", "other"})
        self.assertEqual([it["lastGood"] for it in self.cluster.quarantined()], ["none", "serving"])

    def test_deleted(self) -> None:
        """Removal is honoured also for an object in quarantine."""
        self.put(service())
        self.cluster.say(Rejected("s", "Service", "shop/web", "bad"))
        self.drop("Service", "shop/web")
        self.assertEqual((self.ends(), self.cluster.quarantined()), (None, []))

    def test_problems(self) -> None:
        """Parts that are not served are listed with their object."""
        self.put(service(externalIPs=["x"]))
        self.cluster.current()
        self.assertEqual([(p.kind, p.key) for p in self.cluster.problems()], [("Service", "shop/web")])


_services = st.builds(
    lambda name, ip, number, uid, made: service(
        name, clusterIP=f"10.96.0.{ip}", uid=uid, created=made, ports=[{"name": "http", "port": 80, "nodePort": number}]
    ),
    st.sampled_from("abc"), st.integers(1, 3), st.sampled_from([0, 30001, 30002]), st.sampled_from(["u1", "u2"]),
    st.sampled_from(["2026-01", "2026-02"]),
)
_slices = st.builds(
    lambda name, of, ip, ready: slice_(member(f"10.1.0.{ip}", ready=ready), name=name, of=of),
    st.sampled_from(["s1", "s2"]), st.sampled_from("abc"), st.integers(1, 3), st.booleans(),
)


@st.composite
def _words(draw: Any) -> Word:
    source = draw(st.sampled_from(["a", "b"]))
    it = draw(st.one_of(_services, _slices))
    kind: Kind = type(it).__name__
    key = wire.keyOf(it.metadata)
    what = draw(st.sampled_from(["set", "set", "set", "drop", "list", "bad"]))
    if what == "set":
        return Change(source, kind, key, it)
    if what == "drop":
        return Change(source, kind, key, None)
    if what == "bad":
        return Rejected(source, kind, key, "bad")
    return Replaced(source, kind, {key: it})


class HistoryTests(ClusterTestCase):
    """How one came here does not matter."""

    @given(st.lists(_words(), max_size=30), st.data())
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def test_replayEqualsFresh(self, words: list[Word], data: st.DataObject) -> None:
        """After any history, with any pauses in between, the map equals that of a fresh start on the same objects."""
        lived = self.make("a", "b")
        for word in words:
            lived.say(word)
            if data.draw(st.booleans()):
                lived.current()
        fresh = self.make("a", "b")
        for name, kinds in lived._said.items():
            for kind, said in kinds.items():
                fresh.say(Replaced(name, kind, dict(said.objects)))
        self.assertEqual(dict(lived.current()), dict(fresh.current()))
        self.assertEqual(lived.pending(), fresh.pending())
        keys = [port.key(f) for port in lived.current().values() for f in port.frontends]
        self.assertEqual(len(keys), len(set(keys)), "a frontend has two owners")
        self.assertIsInstance(lived.current(), ServiceMap)
