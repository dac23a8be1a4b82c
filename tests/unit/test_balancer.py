"""The load balancer."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.shared.policies import endpoint, endpoints
from twisted_kproxy.balance.balancer import LoadBalancer
from twisted_kproxy.balance.policies import LeastConnections, RoundRobin
from twisted_kproxy.core.changes import Update
from twisted_kproxy.core.values import (
    Endpoint,
    Frontend,
    PoolKind,
    PoolName,
    ServiceMap,
    ServicePort,
    ServicePortName,
)
from twisted_kproxy.interfaces import ILoadBalancer, NoEndpoint

DAY = 86400


def portName(service: str = "web", port: str = "http") -> ServicePortName:
    return ServicePortName("default", service, port, "TCP", "IPv4")


def poolName(service: str = "web", port: str = "http", kind: PoolKind = "cluster") -> PoolName:
    return PoolName(portName(service, port), kind)


def servicePort(
    *numbers: int,
    service: str = "web",
    port: str = "http",
    local: tuple[int, ...] = (),
    affinity: int = 0,
    uid: str = "u1",
    address: str = "10.96.0.10",
) -> ServicePort:
    return ServicePort(
        portName(service, port),
        uid,
        (Frontend("ClusterIP", address, 80), Frontend("NodePort", None, 30080, "local")),
        cluster=endpoints(*numbers),
        local=endpoints(*local),
        reachable=bool(numbers),
        affinitySeconds=affinity,
    )


class BalancerCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.balancer = LoadBalancer(self.clock, lambda: RoundRobin(start=0))
        self.map = ServiceMap()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), [], "the balancer sets no timer"))

    def set(self, *ports: ServicePort, full: bool = False) -> None:
        """The service map is now exactly these."""
        current = ServiceMap({port.name: port for port in ports}, self.map.generation + 1)
        self.assertIsNone(self.successResultOf(self.balancer.onUpdate(Update(self.map, current, full))))
        self.map = current

    def next(self, client: str = "192.0.2.1", pool: PoolName | None = None, avoid: tuple[int, ...] = ()) -> int:
        chosen = self.balancer.nextEndpoint(pool or poolName(), client, {endpoint(n) for n in avoid})
        return next(n for n in range(200) if endpoint(n) == chosen)

    def walk(self, count: int, pool: PoolName | None = None) -> list[int]:
        return [self.next(pool=pool) for _ in range(count)]


class RoundRobinTests(BalancerCase):
    def test_interface(self) -> None:
        """The balancer provides L{ILoadBalancer}."""
        verifyObject(ILoadBalancer, self.balancer)

    def test_unknownPool(self) -> None:
        """A pool that nobody told of has no endpoint; the error names it."""
        error = self.assertRaises(NoEndpoint, self.next)
        self.assertIn("default/web:http/TCP/IPv4/cluster", str(error))
        self.assertEqual(self.balancer.endpoints(poolName()), ())

    def test_noEndpoints(self) -> None:
        """A service without endpoints has none to choose; the error names the pool."""
        self.set(servicePort())
        error = self.assertRaises(NoEndpoint, self.next)
        self.assertIn("default/web:http/TCP/IPv4/cluster has no endpoint", str(error))

    def test_singleEndpoint(self) -> None:
        """The only endpoint gets everything."""
        self.set(servicePort(1))
        self.assertEqual(self.walk(4), [1, 1, 1, 1])

    def test_multipleEndpoints(self) -> None:
        """Several take turns."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.walk(4), [1, 2, 3, 1])
        self.assertEqual(self.balancer.endpoints(poolName()), endpoints(1, 2, 3))

    def test_multiplePorts(self) -> None:
        """Each port of a service takes turns of its own."""
        self.set(servicePort(1, 2, 3, port="p"), servicePort(1, 2, port="q"))
        self.assertEqual(self.walk(2, poolName(port="p")), [1, 2])
        self.assertEqual(self.walk(3, poolName(port="q")), [1, 2, 1])
        self.assertEqual(self.walk(2, poolName(port="p")), [3, 1])

    def test_bothPools(self) -> None:
        """The two pools of a port are two: each has its endpoints and its turns."""
        self.set(servicePort(1, 2, 3, local=(2, 3)))
        self.assertEqual(self.walk(2), [1, 2])
        self.assertEqual(self.walk(3, poolName(kind="local")), [2, 3, 2])
        self.assertEqual(self.walk(1), [3])

    def test_updates(self) -> None:
        """Another endpoint set is in force at once, and the walk goes on from where it was; down to none and back."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.walk(2), [1, 2])
        self.set(servicePort(2, 3, 8, 9))
        self.assertEqual(self.walk(5), [3, 8, 9, 2, 3])
        self.set(servicePort())
        self.assertRaises(NoEndpoint, self.next)
        self.set(servicePort(2, 3, 8, 9))
        self.assertEqual(self.walk(2), [8, 9])

    def test_otherChangesKeepTheTurn(self) -> None:
        """A change of the service that leaves its endpoints alone, and changes of others, keep the turn."""
        self.set(servicePort(1, 2, 3), servicePort(1, service="other"))
        self.assertEqual(self.walk(1), [1])
        self.set(servicePort(1, 2, 3, address="10.96.0.99"), servicePort(4, service="other"))
        self.assertEqual(self.walk(1), [2])
        self.set(servicePort(1, 2, 3, affinity=60, address="10.96.0.99"))
        self.assertEqual(self.next("192.0.2.7"), 3)

    def test_serviceRemoval(self) -> None:
        """A removed service serves no more; others keep their turn."""
        self.set(servicePort(1, 2, 3), servicePort(4, 5, service="bar"))
        self.assertEqual(self.walk(1), [1])
        self.assertEqual(self.walk(1, poolName("bar")), [4])
        self.set(servicePort(4, 5, service="bar"))
        self.assertRaises(NoEndpoint, self.next)
        self.assertEqual(self.balancer.endpoints(poolName()), ())
        self.assertEqual(self.walk(2, poolName("bar")), [5, 4])

    def test_avoided(self) -> None:
        """One that has just failed is not chosen while there is another."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.next(), 1)
        self.assertEqual(self.next(avoid=(1,)), 2)
        self.assertEqual(self.next(avoid=(1, 2)), 3)

    def test_allAvoided(self) -> None:
        """Where all have failed the walk goes on; the only endpoint is tried again."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual([self.next(avoid=(1, 2, 3)) for _ in range(3)], [1, 2, 3])
        self.set(servicePort(2))
        self.assertEqual(self.next(avoid=(2,)), 2)

    def test_sameMapAgain(self) -> None:
        """The same update twice, and a full update, change nothing where nothing is different."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.walk(1), [1])
        update = Update(ServiceMap(), self.map)
        self.successResultOf(self.balancer.onUpdate(update))
        self.successResultOf(self.balancer.onUpdate(update))
        self.assertEqual(self.walk(1), [2])
        self.set(servicePort(1, 2, 3), full=True)
        self.assertEqual(self.walk(1), [3])

    def test_fullUpdate(self) -> None:
        """
        A full update trusts nothing of what came before: after a map that only the balancer took over, what is not
        in the current one goes and what is in it comes.
        """
        before = ServiceMap({portName("kept"): servicePort(1, 2, service="kept")})
        stray = ServiceMap({**before, portName("stray"): servicePort(4, service="stray"), portName(): servicePort(9)})
        self.successResultOf(self.balancer.onUpdate(Update(ServiceMap(), before)))
        self.assertEqual(self.walk(1, poolName("kept")), [1])
        self.successResultOf(self.balancer.onUpdate(Update(before, stray)))
        current = ServiceMap({**before, portName(): servicePort(5)})
        self.successResultOf(self.balancer.onUpdate(Update(before, current, full=True)))
        self.assertRaises(NoEndpoint, self.next, pool=poolName("stray"))
        self.assertEqual(self.walk(1), [5])
        self.assertEqual(self.walk(1, poolName("kept")), [2])

    def test_anotherServiceOfThatName(self) -> None:
        """Another uid is another service: it begins anew."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.walk(2), [1, 2])
        self.set(servicePort(1, 2, 3, uid="u2"))
        self.assertEqual(self.walk(1), [1])


class RenameTests(BalancerCase):
    def test_stateMoves(self) -> None:
        """A renamed port keeps turn, affinity and counts; the old name still finds them."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual([self.next(f"192.0.2.{n}") for n in (1, 2)], [1, 2])
        self.balancer.opened(poolName(), endpoint(1))
        self.set(servicePort(1, 2, 3, affinity=60, port="https"))
        new = poolName(port="https")
        self.assertEqual(self.next("192.0.2.1", new), 1)
        self.assertEqual(self.next("192.0.2.3", new), 3)
        self.assertEqual(self.next("192.0.2.2"), 2)
        self.balancer.closed(poolName(), endpoint(1))
        self.assertEqual(self.balancer.status()[str(new)]["endpoints"][str(endpoint(1))], 0)

    def test_twice(self) -> None:
        """A port that is renamed again is still found under its first name."""
        for port in ("a", "b", "c"):
            self.set(servicePort(1, 2, 3, port=port))
        self.assertEqual(self.walk(2, poolName(port="a")), [1, 2])
        self.assertEqual(self.walk(1, poolName(port="c")), [3])

    def test_sameUpdateAgain(self) -> None:
        """A rename that is told twice, because somebody else failed at it, is harmless."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.walk(1), [1])
        current = ServiceMap({portName(port="b"): servicePort(1, 2, 3, port="b")})
        for full in (False, True):
            self.successResultOf(self.balancer.onUpdate(Update(self.map, current, full)))
        self.assertEqual(self.walk(1, poolName(port="b")), [2])

    def test_oldNameTakenAnew(self) -> None:
        """Once the old name is somebody else's, it means that one."""
        self.set(servicePort(1, 2, port="a"))
        self.set(servicePort(1, 2, port="b"))
        self.set(servicePort(1, 2, port="b"), servicePort(7, port="a", address="10.96.0.77"))
        self.assertEqual(self.walk(1, poolName(port="a")), [7])
        self.assertEqual(self.walk(1, poolName(port="b")), [1])

    def test_ontoANameWithOpenConnections(self) -> None:
        """Connections that were opened under the new name long ago are counted on."""
        self.set(servicePort(1, port="a"), servicePort(1, port="b", address="10.96.0.77"))
        self.balancer.opened(poolName(port="b"), endpoint(1))
        self.set(servicePort(1, port="a"))
        self.set(servicePort(1, port="b"))
        shown = self.balancer.status()
        self.assertEqual(shown[str(poolName(port="b"))]["endpoints"], {str(endpoint(1)): 1})
        self.balancer.closed(poolName(port="b"), endpoint(1))
        self.set()
        self.assertEqual(self.balancer.status(), {})

    def test_removedAfterRename(self) -> None:
        """A renamed port that goes is gone under both names."""
        self.set(servicePort(1, port="a"))
        self.set(servicePort(1, port="b"))
        self.balancer.opened(poolName(port="a"), endpoint(1))
        self.set()
        self.assertRaises(NoEndpoint, self.next, pool=poolName(port="a"))
        self.assertRaises(NoEndpoint, self.next, pool=poolName(port="b"))
        self.balancer.closed(poolName(port="a"), endpoint(1))
        self.assertEqual(self.balancer.status(), {})


class AffinityTests(BalancerCase):
    CLIENTS = ("192.0.2.1", "192.0.2.2", "192.0.2.3")

    def bindAll(self) -> list[int]:
        return [self.next(client) for client in self.CLIENTS]

    def test_sticky(self) -> None:
        """Each client comes back to its endpoint; clients take turns when they first come."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual(self.bindAll(), [1, 2, 3])
        self.assertEqual(self.bindAll(), [1, 2, 3])

    def test_serviceBeforeEndpoints(self) -> None:
        """A service that is known before its endpoints has its affinity."""
        self.set(servicePort(affinity=60))
        self.set(servicePort(1, 2, affinity=60))
        self.assertEqual([self.next("192.0.2.1"), self.next("192.0.2.2"), self.next("192.0.2.1")], [1, 2, 1])

    def test_off(self) -> None:
        """Without affinity the same client takes turns."""
        self.set(servicePort(1, 2, 3))
        self.assertEqual(self.walk(3), [1, 2, 3])

    def test_endpointRemoved(self) -> None:
        """Only clients of the removed endpoint move; when it comes back, nobody returns to it by himself."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.bindAll()
        self.set(servicePort(1, 2, affinity=60))
        self.assertEqual([self.next("192.0.2.1"), self.next("192.0.2.2")], [1, 2])
        moved = self.next("192.0.2.3")
        self.assertIn(moved, (1, 2))
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual(self.bindAll(), [1, 2, moved])

    def test_updates(self) -> None:
        """Whoever's endpoint stays, stays with it, whatever else joins and leaves; new clients take turns."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.bindAll()
        self.set(servicePort(2, 3, 4, 5, affinity=60))
        self.assertEqual([self.next("192.0.2.2"), self.next("192.0.2.3")], [2, 3])
        self.assertEqual(self.next("192.0.2.9"), 4)

    def test_serviceRemoval(self) -> None:
        """Removing a service leaves the affinity of others alone; when it is back, it begins anew."""
        other = poolName("bar")
        self.set(servicePort(1, 2, affinity=60), servicePort(4, 5, service="bar", affinity=60))
        self.assertEqual([self.next("192.0.2.1"), self.next("192.0.2.1", other)], [1, 4])
        self.set(servicePort(4, 5, service="bar", affinity=60))
        self.assertEqual([self.next("192.0.2.2", other), self.next("192.0.2.1", other)], [5, 4])
        self.set(servicePort(1, 2, affinity=60), servicePort(4, 5, service="bar", affinity=60))
        self.assertEqual(self.balancer.status()[str(poolName())]["affinityEntries"], 0)

    def test_toNothingAndBack(self) -> None:
        """Scaled to none, every client is free: their endpoints are not the ones that come back."""
        self.set(servicePort(1, 2, affinity=60))
        self.assertEqual(self.next(), 1)
        self.set(servicePort(affinity=60))
        self.assertRaises(NoEndpoint, self.next)
        self.set(servicePort(1, 2, affinity=60))
        self.assertEqual([self.next(), self.next()], [2, 2])

    def test_endpointFails(self) -> None:
        """A client whose endpoint failed is bound to the one that it gets instead."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual(self.next(), 1)
        self.assertEqual(self.next(avoid=(1,)), 2)
        self.assertEqual(self.next(), 2)

    def test_allFail(self) -> None:
        """Where all fail, the client is bound to the one that was tried last."""
        self.set(servicePort(1, 2, affinity=60))
        tried = [self.next(), self.next(avoid=(1,)), self.next(avoid=(1, 2))]
        self.assertEqual(tried, [1, 2, 1])
        self.assertEqual(self.next(), 1)

    def test_sliding(self) -> None:
        """The time runs from the last connection."""
        self.set(servicePort(1, 2, affinity=10))
        self.assertEqual(self.next(), 1)
        for _ in range(5):
            self.clock.advance(9)
            self.assertEqual(self.next(), 1)
        self.clock.advance(10)
        self.assertEqual(self.next(), 2)

    def test_oneSecondAndADay(self) -> None:
        """The shortest and the longest time that the API allows are kept."""
        self.set(servicePort(1, 2, affinity=1), servicePort(1, 2, service="long", affinity=DAY))
        self.assertEqual([self.next(), self.next(pool=poolName("long"))], [1, 1])
        self.clock.advance(1)
        self.assertEqual(self.next(), 2)
        self.clock.advance(DAY - 2)
        self.assertEqual(self.next(pool=poolName("long")), 1)

    def test_timeShortened(self) -> None:
        """A shorter time holds at once for clients who were bound under the longer one."""
        self.set(servicePort(1, 2, affinity=10800))
        self.assertEqual(self.next(), 1)
        self.clock.advance(60)
        self.set(servicePort(1, 2, affinity=30))
        self.assertEqual(self.next(), 2)

    def test_timeLengthened(self) -> None:
        """A longer time holds at once for clients who are bound; whose time was over stays free."""
        self.set(servicePort(1, 2, 3, affinity=30))
        self.assertEqual(self.next("192.0.2.1"), 1)
        self.clock.advance(20)
        self.assertEqual(self.next("192.0.2.2"), 2)
        self.clock.advance(15)
        self.set(servicePort(1, 2, 3, affinity=10800))
        self.clock.advance(600)
        self.assertEqual(self.next("192.0.2.2"), 2)
        self.assertEqual(self.next("192.0.2.1"), 3)

    def test_offAndOnAgain(self) -> None:
        """Affinity switched off frees everybody at once; switched on again it begins empty."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual([self.next(), self.next()], [1, 1])
        self.set(servicePort(1, 2, 3))
        self.assertEqual([self.next(), self.next()], [2, 3])
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual(self.balancer.status()[str(poolName())]["affinityEntries"], 0)
        self.assertEqual(self.next("192.0.2.9"), 1)

    def test_otherChangesKeepIt(self) -> None:
        """A change of frontends keeps every client where it is."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.bindAll()
        self.set(servicePort(1, 2, 3, affinity=60, address="10.96.0.99"))
        self.assertEqual(self.bindAll(), [1, 2, 3])

    def test_anotherServiceOfThatName(self) -> None:
        """Another uid is another service: its clients are strangers."""
        self.set(servicePort(1, 2, 3, affinity=60))
        self.bindAll()
        self.set(servicePort(1, 2, 3, affinity=60, uid="u2"))
        self.assertEqual(self.next("192.0.2.3"), 1)

    def test_poolsApart(self) -> None:
        """A client's endpoint elsewhere in the cluster never answers for the local pool."""
        self.set(servicePort(1, 2, 3, local=(3,), affinity=60))
        self.assertEqual(self.next(), 1)
        self.assertEqual(self.next(pool=poolName(kind="local")), 3)
        self.assertEqual(self.next(), 1)

    def test_bounded(self) -> None:
        """The table is bounded: the client not seen for longest is forgotten, and the status shows it."""
        self.balancer = LoadBalancer(self.clock, lambda: RoundRobin(start=0), affinityLimit=2)
        self.set(servicePort(1, 2, 3, affinity=60))
        self.assertEqual([self.next(f"192.0.2.{n}") for n in (1, 2, 1, 3)], [1, 2, 1, 3])
        self.assertEqual(self.next("192.0.2.1"), 1)
        status = self.balancer.status()[str(poolName())]
        self.assertEqual((status["affinityEntries"], status["affinityEvicted"]), (2, 1))


class CountTests(BalancerCase):
    def active(self, pool: PoolName | None = None) -> dict[str, dict[str, int]]:
        status = self.balancer.status()[str(pool or poolName())]
        return {"endpoints": status["endpoints"], "leaving": status["leaving"]}

    def test_counts(self) -> None:
        """Open connections are counted per endpoint."""
        self.set(servicePort(1, 2))
        for number in (1, 1, 2):
            self.balancer.opened(poolName(), endpoint(number))
        self.balancer.closed(poolName(), endpoint(1))
        self.assertEqual(self.active()["endpoints"], {str(endpoint(1)): 1, str(endpoint(2)): 1})

    def test_left(self) -> None:
        """Connections to one that left are still shown, until the last has ended."""
        self.set(servicePort(1, 2))
        self.balancer.opened(poolName(), endpoint(1))
        self.set(servicePort(2))
        self.assertEqual(self.active(), {"endpoints": {str(endpoint(2)): 0}, "leaving": {str(endpoint(1)): 1}})
        self.balancer.closed(poolName(), endpoint(1))
        self.assertEqual(self.active()["leaving"], {})

    def test_neverNegative(self) -> None:
        """An end that has no beginning is not counted."""
        self.set(servicePort(1))
        self.balancer.closed(poolName(), endpoint(1))
        self.balancer.closed(poolName("stranger"), endpoint(1))
        self.balancer.opened(poolName(), endpoint(1))
        self.assertEqual(self.active()["endpoints"], {str(endpoint(1)): 1})

    def test_serviceRemovedAndBack(self) -> None:
        """Connections outlive their service, and are counted again when it comes back, or another of its name."""
        self.set(servicePort(1, 2))
        for _ in range(2):
            self.balancer.opened(poolName(), endpoint(1))
        self.set()
        self.assertEqual(self.active()["leaving"], {str(endpoint(1)): 2})
        self.balancer.closed(poolName(), endpoint(1))
        self.set(servicePort(1, 2, uid="u2"))
        self.assertEqual(self.active()["endpoints"], {str(endpoint(1)): 1, str(endpoint(2)): 0})
        self.balancer.closed(poolName(), endpoint(1))
        self.set()
        self.assertEqual(self.balancer.status(), {})

    def test_policyIsTold(self) -> None:
        """The policy knows the open connections: also one that is made anew for another service of the name."""
        self.balancer = LoadBalancer(self.clock, LeastConnections)
        self.set(servicePort(1, 2))
        self.balancer.opened(poolName(), endpoint(1))
        self.assertEqual(set(self.walk(20)), {2})
        self.set(servicePort(1, 2, uid="u2"))
        self.assertEqual(set(self.walk(20)), {2})
        self.balancer.closed(poolName(), endpoint(1))
        self.assertEqual(set(self.walk(50)), {1, 2})

    def test_status(self) -> None:
        """The status is plain JSON with one entry for each pool that a frontend leads to."""
        self.set(servicePort(1, 2, local=(2,), affinity=60))
        self.next()
        status: Any = json.loads(json.dumps(self.balancer.status()))
        self.assertEqual(set(status), {str(poolName()), str(poolName(kind="local"))})
        self.assertEqual(
            status[str(poolName())],
            {
                "policy": "round-robin",
                "endpoints": {str(endpoint(1)): 0, str(endpoint(2)): 0},
                "leaving": {},
                "affinitySeconds": 60,
                "affinityEntries": 1,
                "affinityEvicted": 0,
            },
        )

    def test_statusOfUnusedPool(self) -> None:
        """A pool that no frontend leads to is not shown."""
        port = servicePort(1)
        clusterOnly = ServicePort(port.name, port.uid, port.frontends[:1], cluster=port.cluster)
        self.set(clusterOnly)
        self.assertEqual(list(self.balancer.status()), [str(poolName())])


class Model:
    """What a load balancer is, said as plainly as can be: one dict of what each client was last told."""

    def __init__(self) -> None:
        self.ring: list[Endpoint] = []
        self.last: Endpoint | None = None
        self.seconds = 0
        self.bound: dict[str, tuple[Endpoint, float]] = {}

    def change(self, ring: tuple[Endpoint, ...], seconds: int, now: float) -> None:
        self.ring = list(ring)
        self.bound = {
            client: (chosen, used)
            for client, (chosen, used) in self.bound.items()
            if chosen in ring and now - used < self.seconds and now - used < seconds
        }
        self.seconds = seconds

    def next(self, client: str, avoid: set[Endpoint], now: float) -> Endpoint | None:
        chosen, used = self.bound.get(client, (None, 0.0))
        if avoid or chosen is None or now - used >= self.seconds:
            last = self.last
            turn = [e for e in self.ring if last is None or e > last] + [e for e in self.ring if last and e <= last]
            chosen = next((e for e in turn if e not in avoid), turn[0] if turn else None)
            if chosen is None:
                return None
            self.last = chosen
        if self.seconds:
            self.bound[client] = (chosen, now)
        return chosen


_STEPS = st.one_of(
    st.tuples(st.just("next"), st.integers(0, 4), st.sets(st.integers(0, 5), max_size=2)),
    st.tuples(st.just("wait"), st.integers(1, 40), st.none()),
    st.tuples(st.just("set"), st.sampled_from([0, 1, 30, 60]), st.sets(st.integers(0, 5))),
)


class ModelTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=300)
    @given(st.lists(_STEPS, max_size=40), st.booleans())
    def test_asTheModel(self, steps: list[tuple[str, int, Any]], full: bool) -> None:
        """
        Property: over any sequence of updates, waits, connections and retries the balancer chooses as the model
        does, whatever else is in the map.
        """
        clock = Clock()
        balancer = LoadBalancer(clock, lambda: RoundRobin(start=0))
        model = Model()
        current = ServiceMap()
        for kind, number, members in steps:
            if kind == "wait":
                clock.advance(number)
            elif kind == "set":
                port = servicePort(*members, affinity=number)
                other = servicePort(*members, service="other", affinity=60 - number)
                following = ServiceMap({port.name: port, other.name: other})
                balancer.onUpdate(Update(current, following, full))
                current = following
                model.change(port.cluster, number, clock.seconds())
            else:
                client, avoid = f"192.0.2.{number}", {endpoint(n) for n in members}
                expected = model.next(client, avoid, clock.seconds())
                try:
                    got: Endpoint | None = balancer.nextEndpoint(poolName(), client, avoid)
                except NoEndpoint:
                    got = None
                self.assertEqual(got, expected)

    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.sets(st.integers(0, 4))), max_size=40))
    def test_countsAgree(self, steps: list[tuple[bool, int, set[int]]]) -> None:
        """
        Property: whoever joins and leaves, the counts shown add up to the connections that are open, and are those
        of each endpoint.
        """
        clock = Clock()
        balancer = LoadBalancer(clock, LeastConnections)
        current = ServiceMap()
        counts: Counter[str] = Counter()
        for opens, number, members in steps:
            port = servicePort(*members, uid=f"u{number % 2}")
            following = ServiceMap({port.name: port} if members else {})
            balancer.onUpdate(Update(current, following))
            current = following
            name = str(endpoint(number))
            if opens:
                balancer.opened(poolName(), endpoint(number))
                counts[name] += 1
            elif counts[name]:
                balancer.closed(poolName(), endpoint(number))
                counts[name] -= 1
            shown = balancer.status().get(str(poolName()), {"endpoints": {}, "leaving": {}})
            self.assertEqual(
                {e: n for e, n in {**shown["endpoints"], **shown["leaving"]}.items() if n},
                {e: n for e, n in counts.items() if n},
            )
