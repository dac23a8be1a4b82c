"""
Kubernetes' end-to-end tests that are ``[Disruptive]``: the proxy, the API server and the rules go and come back; see
:mod:`.scenario`. Here the daemons have default settings, so that a change may wait a second for the one before it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, ClassVar

from twisted.trial.unittest import TestCase

from tests.fakes.network import waitFor

from .scenario import BOTH, PLACES, Json, Load, Scenario, port
from .test_e2e_networking import HTTP, SLICE, UDP

#: requests and seconds, at the least, during which there is no API server
OUTAGE = (100, 10.0)
#: seconds: two of the longest pauses between two tries, for who finds that his watch cannot be continued
RETURN = 120.0


class UpheavalsCore(Scenario):
    """What every rule writer must bring about."""

    disturbed = True
    #: Each takes away rules of ours, in a way of its own.
    damages: ClassVar[Sequence[Sequence[str]]] = ()

    def test_proxyRestarts(self) -> None:
        """
        "should work after restarting kube-proxy": after SIGTERM and after SIGKILL, on both nodes; the node whose proxy
        stays notices nothing. (A proxy in userspace serves nobody while it is away.)
        """
        number = self.nodePort()
        first = self.make("p0a", "p1a")
        second = self.make("p0b", "p1a", type="NodePort", ports=[port(nodePort=number)])
        for node, other, kind in (("n0", "n1", signal.SIGTERM), ("n0", "n1", signal.SIGKILL), ("n1", "n0", 9)):
            with Load(self, f"p{other[1]}b", self.clusterIPs(first)) as load:
                load.until(10)
                self.world.daemons[node].stop(kind)
                self.world.startDaemon(node=node)
                load.until(10)
            self.assertEqual(load.failed, [])
            self.expect(self.clusterIPs(first), BOTH, ("p0b", "p1b"))
            self.expect(self.onNodes(number), {"p0b", "p1a"}, ("x", "p0a"))
        third = self.make("p0a")
        self.expect(self.clusterIPs(third), {"p0a"}, ("p0b", "p1b"))
        self.expect(self.clusterIPs(second), {"p0b", "p1a"}, ("p0a", "p1b"))

    def test_rulesRecreated(self) -> None:
        """
        "should recreate its iptables rules if they are deleted": however they were; they are there again before the
        sync period of half a minute would have brought them (upstream: a sync period).
        """
        it = self.service()
        targets, datagrams = [*self.clusterIPs(it)], self.clusterIPs(it, 90)
        self.expect(targets, BOTH)
        for damage in self.damages:
            self.rig.run("n0", damage)
            waitFor(lambda: self.serves(targets, False) and self.serves(datagrams, True), 25)
            self.expect(targets, BOTH)
            self.expect(datagrams, BOTH, udp=True)

    def service(self) -> Json:
        return self.make("p0a", "p1a", ports=[HTTP, UDP], slicePorts=SLICE)

    def serves(self, targets: Any, udp: bool) -> bool:
        return all(self.ask(place, target, udp, 0.5).name in BOTH for place in PLACES for target in targets)


class UpheavalsMore(UpheavalsCore):
    """What does not depend on the rule writer, or hardly."""

    settings = ""

    def test_closeWait(self) -> None:
        """
        "should set TCP CLOSE_WAIT timeout [Privileged]": the kernel keeps a connection that the server has closed, and
        the client has not, for an hour give or take a minute.
        """
        daemon = self.world.daemon
        daemon.stop()
        daemon.assertNoTraceback()
        self.addCleanup(lambda: (self.world.daemon.stop(), self.world.startDaemon()))
        self.world.startDaemon("[conntrack]\nsysctls = on\n")
        it = self.make("p0a")
        client = self.rig.connect("p0b", self.clusterIPs(it)[0])
        self.addCleanup(client.close)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while client.recv(1000):
            pass
        argv = ["conntrack", "-L", "-p", "tcp", "--state", "CLOSE_WAIT", "--sport", str(client.getsockname()[1])]
        found = waitFor(lambda: self.rig.run("n0", argv).stdout, 20)
        seconds = int(found.split()[2])
        self.assertTrue(3540 <= seconds <= 3660, found)

    def test_apiRestarts(self) -> None:
        """
        "should work after restarting apiserver": killed, away for ten seconds, started again. No request fails; a
        Service that is made then is served once those who watch have come back.
        (The mechanism is the same for any outage: nothing is taken away because nobody says that it is there.)
        """
        first = self.make("p0a", "p1a")
        with Load(self, "p0b", self.clusterIPs(first)) as load:
            load.until(20)
            self.world.killApi()
            load.until(*OUTAGE)
            self.world.api = self.world.startApi()
            second = self.make("p1a", seconds=RETURN)
            self.expect(self.clusterIPs(second), {"p1a"}, ("p0b", "p1b"))
            self.expect(self.clusterIPs(first), BOTH, ("p0b", "p1b"))
            load.until(20)
        self.assertEqual(load.failed, [])
        self.behind(first, "p1a")
        self.expect(self.clusterIPs(first), {"p1a"}, ("p0b", "p1b"))


class NftablesUpheavalsTests(UpheavalsMore, TestCase):
    """With rules by nftables."""

    writer = "nftables"
    damages = (
        ("nft", "delete table inet kproxy"),
        ("nft", "flush table inet kproxy"),
        ("nft", "flush chain inet kproxy nat-prerouting"),
        ("nft", "flush chain inet kproxy lead4-inside; flush chain inet kproxy lead6-inside"),
        ("nft", "flush map inet kproxy service-ips4; flush map inet kproxy service-ips6"),
        ("nft", "flush ruleset"),
    )
