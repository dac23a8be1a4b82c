"""What is known of the node itself, put together from all who know a part of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import wire
from .addresses import BadAddress, canonical
from .locality import NodeSettings, addressesOf, localityOf, takenPorts
from .topology import NodeFacts
from .values import Locality, Problem

ZONE_LABEL = "topology.kubernetes.io/zone"
#: the Service whose endpoints are the API servers: namespace and name
KUBERNETES = ("default", "kubernetes")
#: no cluster has so many API servers
MOST_SERVERS = 100

Server = tuple[str, int]


class Surroundings:
    """
    :param name: this node's name in the API.
    :param settings: what the configuration says about this node.
    :ivar node: this node's object, where there is one.
    :ivar services: the ServiceCIDR objects.
    :ivar hostAddresses: those by which this machine talks to others: the node's, as long as no Node object says.
    :ivar problems: what of these objects is not followed, as of the last time that somebody asked.
    :ivar servers: for whoever knows some, where API servers are reached.
    """

    def __init__(self, name: str, settings: NodeSettings) -> None:
        self._name = name
        self._settings = settings
        self.node: wire.Node | None = None
        self.services: Mapping[str, wire.ServiceCIDR] = {}
        self.hostAddresses: frozenset[str] = frozenset()
        self.problems: list[Problem] = []
        self.servers: dict[str, frozenset[Server]] = {}

    def known(self) -> tuple[NodeFacts, Locality]:
        """What follows from all that is known by now."""
        node, settings = self.node, self._settings
        addresses = addressesOf(node) or self.hostAddresses
        locality, self.problems = localityOf(settings, node, addresses, self.services)
        facts = NodeFacts(
            name=self._name,
            zone=(node.metadata.label(ZONE_LABEL) or "") if node is not None else "",
            addresses=addresses,
            servers=frozenset().union(*self.servers.values()),
            allowed=settings.allowed,
            denied=settings.denied,
            taken=takenPorts(settings, locality),
        )
        return facts, locality


def serversOf(slices: Iterable[wire.EndpointSlice]) -> frozenset[Server]:
    """The addresses and TCP ports of the endpoints of :data:`KUBERNETES`, ready or not."""
    found: set[Server] = set()
    for it in slices:
        ports = [port.port for port in it.ports or () if port.port and port.protocol in (None, "TCP")]
        for endpoint in it.endpoints or ():
            for text in endpoint.addresses or ():
                try:
                    address = canonical(text)[0]
                except BadAddress:
                    continue
                found.update((address, port) for port in ports)
    return frozenset(sorted(found)[:MOST_SERVERS])
