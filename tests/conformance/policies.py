"""Rows about where clients come from: traffic policies, pods and others, and what is masqueraded."""

from __future__ import annotations

from collections.abc import Mapping

from .site import CLUSTER_CIDR, UDP, UDP_SLICE, Site, Table

table = Table("externalTrafficPolicy and internalTrafficPolicy")
case = table.case
ETP = "kubernetes TestExternalTrafficPolicyLocal, kpng doc/service-proxy.md"


@case(
    "etp-local",
    "externalTrafficPolicy Local: from outside only endpoints of this node; pods and the node reach all",
    ETP,
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalIPs=[s.ext], ingress=[{"ip": s.lb}], externalTrafficPolicy="Local")
    s.slice("p0a", "p1a")
    for address, number in ((s.node, s.nodePort), (s.ext, 80), (s.lb, 80)):
        s.flow("outside", address, number, ["p0a"])
        s.flows("pod, other pod, node", address, number, ["p0a", "p1a"])
    s.flows("*", s.vip, 80, ["p0a", "p1a"])


@case(
    "etp-local-none",
    "None on this node, some elsewhere: packets from outside are dropped, so that the client tries again",
    ETP,
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalIPs=[s.ext], ingress=[{"ip": s.lb}], externalTrafficPolicy="Local")
    s.slice("p1a")
    for address, number in ((s.node, s.nodePort), (s.ext, 80), (s.lb, 80)):
        s.flow("outside", address, number, "drop")
        s.flows("pod, other pod, node", address, number, ["p1a"])
    s.flow("outside", s.vip, 80, ["p1a"])


@case("etp-local-udp", "The same for UDP", ETP, kernel=True)
def _(s: Site) -> None:
    s.service(ports=UDP, nodePort=s.nodePort, externalTrafficPolicy="Local")
    s.slice("p0a", "p1a", ports=UDP_SLICE)
    s.flow("outside", s.node, s.nodePort, ["p0a"], protocol="UDP")
    s.flow("pod", s.node, s.nodePort, ["p0a", "p1a"], protocol="UDP")


@case("no-node-name", "An endpoint without nodeName is on another node", "kubernetes endpointslicecache.go")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalTrafficPolicy="Local")
    member = s.member("p0a")
    del member["nodeName"]
    s.slice(member)
    s.flow("outside", s.node, s.nodePort, "drop")
    s.flow("pod", s.node, s.nodePort, ["p0a"])


@case(
    "itp-local",
    "internalTrafficPolicy Local: the ClusterIP leads to endpoints of this node only, whoever asks",
    "KEP-2086, kubernetes TestInternalTrafficPolicyE2E",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(internalTrafficPolicy="Local")
    s.slice("p0a", "p1a")
    s.flows("*", s.vip, 80, ["p0a"])


@case("itp-local-none", "None on this node, some elsewhere: dropped", "KEP-2086", kernel=True)
def _(s: Site) -> None:
    s.service(internalTrafficPolicy="Local", externalIPs=[s.ext])
    s.slice("p1a")
    s.flows("pod, node, outside", s.vip, 80, "drop")
    s.flows("pod, outside", s.ext, 80, ["p1a"])


@case(
    "itp-etp-local",
    "Both Local: pods still reach all endpoints by the external address",
    "kubernetes nftables/proxier.go",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, internalTrafficPolicy="Local", externalTrafficPolicy="Local")
    s.slice("p1a")
    s.flow("pod", s.vip, 80, "drop")
    s.flows("pod, node", s.node, s.nodePort, ["p1a"])
    s.flow("outside", s.node, s.nodePort, "drop")


@case("policy-cluster", "Cluster, the default, uses all endpoints for everybody", "KEP-2086")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalTrafficPolicy="Cluster", internalTrafficPolicy="Cluster")
    s.slice("p1a")
    s.flows("*", s.vip, 80, ["p1a"])
    s.flows("*", s.node, s.nodePort, ["p1a"])


table.topic = "Who counts as a pod"


def local(s: Site) -> None:
    """A Service that tells pods from others."""
    s.service(externalIPs=[s.ext], externalTrafficPolicy="Local")
    s.slice("p0a", "p1a")


@case("detect-cluster-cidr", "detect-local = cluster-cidr: sources in the pod networks", "kubernetes getLocalDetectors")
def _(s: Site) -> None:
    local(s)
    s.flows("pod, other pod, node", s.ext, 80, ["p0a", "p1a"])
    s.flow("outside", s.ext, 80, ["p0a"])
    s.flow("10.245.0.1" if s.family == 4 else "fd00:10:245::1", s.ext, 80, ["p0a"])


@case("detect-nothing", "Nothing is said: only the node itself is inside", "kubernetes getLocalDetectors", settings={})
def _(s: Site) -> None:
    local(s)
    s.flow("node", s.ext, 80, ["p0a", "p1a"])
    s.flows("pod, outside", s.ext, 80, ["p0a"])
    s.flow("pod", s.vip, 80, ["p0a", "p1a"], masquerade=False)


@case(
    "detect-one-family",
    "Pod networks of one family: the other has none",
    "kubernetes getLocalDetectors",
    settings={"cluster-cidr": "10.244.0.0/16"},
)
def _(s: Site) -> None:
    local(s)
    s.flow("pod", s.ext, 80, ["p0a", "p1a"] if s.family == 4 else ["p0a"])
    s.flow("outside", s.vip, 80, ["p0a", "p1a"], masquerade=s.family == 4)


@case(
    "detect-node-cidr",
    "detect-local = node-cidr: sources in podCIDRs of the Node object",
    "kubernetes getLocalDetectors",
    settings={"detect-local": "node-cidr"},
)
def _(s: Site) -> None:
    s.nodeObject(podCIDRs=["10.244.0.0/24", "fd00:10:244::/64"])
    local(s)
    s.flows("pod, node", s.ext, 80, ["p0a", "p1a"])
    s.flows("other pod, outside", s.ext, 80, ["p0a"])


@case(
    "detect-node-cidr-later",
    "… and as long as it has none, nobody but the node",
    "kubernetes getLocalDetectors",
    settings={"detect-local": "node-cidr"},
    why="kube-proxy waits for them for five minutes, and then ends.",
)
def _(s: Site) -> None:
    local(s)
    s.flow("node", s.ext, 80, ["p0a", "p1a"])
    s.flow("pod", s.ext, 80, ["p0a"])


@case(
    "detect-bridge",
    "detect-local = bridge: what comes in by that interface",
    "kubernetes getLocalDetectors",
    settings={"detect-local": "bridge", "pod-bridge": "cbr"},
    kernel=True,
)
def _(s: Site) -> None:
    local(s)
    s.flows("pod, node", s.ext, 80, ["p0a", "p1a"])
    s.flows("other pod, outside", s.ext, 80, ["p0a"])


@case(
    "detect-prefix",
    "detect-local = interface-prefix: what comes in by interfaces that begin so",
    "kubernetes getLocalDetectors",
    settings={"detect-local": "interface-prefix", "pod-interface-prefix": "cali"},
)
def _(s: Site) -> None:
    local(s)
    s.flows("pod, node", s.ext, 80, ["p0a", "p1a"])
    s.flows("other pod, outside", s.ext, 80, ["p0a"])


table.topic = "Masquerading"


def _matrix(s: Site, toCluster: Mapping[str, bool], external: Mapping[str, bool], localTo: Mapping[str, bool]) -> None:
    """TestInternalExternalMasquerade: Services of each policy, from everywhere."""
    s.service(nodePort=s.nodePort, ingress=[{"ip": s.lb}])
    s.slice("p0a", "p1a")
    name = f"{s.name}-local"
    s.service(
        name,
        clusterIP=s.at(1),
        nodePort=s.nodePort + 1,
        ingress=[{"ip": s.at(4)}],
        externalTrafficPolicy="Local",
        internalTrafficPolicy="Local",
    )
    s.slice("p0a", "p1a", of=name)
    for source, masquerade in toCluster.items():
        s.flow(source, s.vip, 80, ["p0a", "p1a"], masquerade)
        s.flow(source, s.at(1), 80, ["p0a"], masquerade)
    for source, masquerade in external.items():
        s.flow(source, s.node, s.nodePort, ["p0a", "p1a"], masquerade)
        s.flow(source, s.lb, 80, ["p0a", "p1a"], masquerade)
    for source, masquerade in localTo.items():
        whom = ["p0a"] if source == "outside" else ["p0a", "p1a"]
        s.flow(source, s.node, s.nodePort + 1, whom, masquerade)
        s.flow(source, s.at(4), 80, whom, masquerade)


RELAYED = "kubernetes TestInternalExternalMasquerade"
WHY = "The proxy connects by itself, so endpoints see an address of the node in every case; nothing is masqueraded."


@case(
    "masquerade",
    "Who is masqueraded: others and the node to ClusterIPs, everybody to external addresses with policy "
    "Cluster; with Local only the node",
    RELAYED,
    why=WHY,
)
def _(s: Site) -> None:
    _matrix(
        s,
        {"pod": False, "node": True, "outside": True},
        {"pod": True, "node": True, "outside": True},
        {"pod": False, "node": True, "outside": False},
    )


@case(
    "masquerade-all",
    "masquerade-all: everybody to ClusterIPs",
    RELAYED,
    why=WHY,
    settings={**CLUSTER_CIDR, "masquerade-all": "yes"},
)
def _(s: Site) -> None:
    _matrix(
        s,
        {"pod": True, "node": True, "outside": True},
        {"pod": True, "node": True, "outside": True},
        {"pod": False, "node": True, "outside": False},
    )


@case(
    "hairpin",
    "A pod that is led to itself",
    "kubernetes pkg/proxy/iptables/proxier.go",
    why=WHY + " So it needs no hairpin mode of the bridge.",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flow(s.pod("p0a"), s.vip, 80, ["p0a"], True)
    s.flow(s.pod("p0a"), s.node, s.nodePort, ["p0a"], True)


table.leftOut(
    "source-kept",
    "externalTrafficPolicy Local: endpoints see the client's address",
    "kpng doc",
    "only a dataplane in the kernel can leave the source as it is; the proxy connects by itself, and endpoints "
    "see the node",
)
table.leftOut(
    "masquerade-bit",
    "Mark of packets to be masqueraded (masqueradeBit)",
    "kubernetes config types.go",
    "nothing is masqueraded; the proxy's own packets carry mark 0x2000",
)
table.leftOut(
    "snat-node-ip",
    "snatNodeInternalIP",
    "kubernetes config types.go",
    "the proxy connects from the address that the node's routes say",
)
table.shown(
    "forward",
    "Other programs' rules: packets that were led here pass INPUT; nothing is done about FORWARD",
    "KEP-3866",
    "integration.test_iptables_traffic.test_closedFirewall",
    why="kube-proxy's iptables mode accepts marked packets in FORWARD; here endpoints are reached from the node "
    "itself, so forwarding is no matter.",
)
table.shown(
    "refused-without-forwarding",
    "Refusals reach others than the node also where the node does not forward",
    "kubernetes pkg/proxy/nftables/README.md",
    "integration.test_nftables_traffic.test_refusedWithoutForwarding",
    why="So it is with the writer nftables; those over iptables can refuse no one but the node then.",
)
table.leftOut(
    "invalid-packets",
    "Dropping packets that conntrack calls INVALID",
    "kubernetes#74839",
    "rules lead to a socket of this node; a stray packet never leaves it with a wrong address",
)
