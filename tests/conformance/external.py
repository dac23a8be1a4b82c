"""Rows about external IPs and load balancers: who may come in, and whose the addresses are."""

from __future__ import annotations

from .site import CLUSTER_CIDR, PORT, Site, Table, port

table = Table("External IPs and load balancers")
case = table.case


@case("external-ip", "External IPs, for everybody", "kubernetes pkg/proxy/iptables/proxier.go", kernel=True)
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext, s.at(4)])
    s.slice("p0a", "p1a")
    s.flows("*", s.ext, 80, ["p0a", "p1a"])
    s.flow("outside", s.at(4), 80, ["p0a", "p1a"])
    s.flow("outside", s.ext, 81, "untouched")


@case(
    "load-balancer",
    "Addresses of load balancers are captured on every node, from pods too",
    "kubernetes TestLoadBalancer",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, ingress=[{"ip": s.lb}])
    s.slice("p0a", "p1a")
    s.flows("*", s.lb, 80, ["p0a", "p1a"])
    s.flow("outside", s.node, s.nodePort, ["p0a", "p1a"])
    s.flow("outside", s.lb, 81, "untouched")


for mode, expected in (("VIP", "served"), ("Proxy", "left to the load balancer")):

    @case(
        f"ip-mode-{mode.lower()}",
        f"ipMode {mode}: {expected}",
        "KEP-1860, kubernetes TestLoadBalancerIngressRouteTypeProxy",
        kernel=True,
    )
    def _(s: Site, mode: str = mode) -> None:
        s.service(nodePort=s.nodePort, ingress=[{"ip": s.lb, "ipMode": mode}])
        s.slice("p0a")
        for source in ("pod", "node", "outside"):
            s.flow(source, s.lb, 80, ["p0a"] if mode == "VIP" else "untouched")
        s.flow("outside", s.node, s.nodePort, ["p0a"])


@case("ingress-hostname", "An ingress that has only a host name is not captured", "KEP-1860")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, ingress=[{"hostname": "lb.example.org"}])
    s.slice("p0a")
    s.flow("outside", s.node, s.nodePort, ["p0a"])
    s.flow("outside", s.lb, 80, "untouched")


@case("no-node-ports", "allocateLoadBalancerNodePorts: false: the address alone", "KEP-1864", kernel=True)
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], allocateLoadBalancerNodePorts=False)
    s.slice("p0a")
    s.flows("pod, outside", s.lb, 80, ["p0a"])


table.topic = "loadBalancerSourceRanges"


@case(
    "source-ranges",
    "Only sources in the ranges get to the load balancer's address; others are dropped",
    "kubernetes TestLoadBalancer",
    kernel=True,
)
def _(s: Site) -> None:
    ranges = ["198.51.100.0/24", " 203.0.113.0/25"] if s.family == 4 else ["2001:db8:51::/48", " 2001:db8:cb::/48"]
    inside = ("198.51.100.7", "203.0.113.127") if s.family == 4 else ("2001:db8:51::7", "2001:db8:cb::7")
    past = "203.0.113.128" if s.family == 4 else "2001:db8:cc::1"
    s.service(nodePort=s.nodePort, ingress=[{"ip": s.lb}], externalIPs=[s.ext], loadBalancerSourceRanges=ranges)
    s.slice("p0a")
    for source in inside:
        s.flow(source, s.lb, 80, ["p0a"])
    s.flow(past, s.lb, 80, "drop")
    s.flows("pod, node, outside", s.lb, 80, "drop")


@case(
    "source-ranges-elsewhere",
    "Node ports, external IPs and ClusterIPs of the same Service are open to all",
    "kubernetes TestLoadBalancer",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(
        nodePort=s.nodePort,
        ingress=[{"ip": s.lb}],
        externalIPs=[s.ext],
        loadBalancerSourceRanges=["198.51.100.0/24", "2001:db8:51::/48"],
    )
    s.slice("p0a")
    s.flow("outside", s.node, s.nodePort, ["p0a"])
    s.flow("outside", s.ext, 80, ["p0a"])
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("outside", s.lb, 80, "drop")


@case("source-ranges-let-in", "A client in the ranges is served", "kubernetes TestLoadBalancer", kernel=True)
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=[f" {s.width(s.outside)}\t"])
    s.slice("p0a", "p1a")
    s.flow("outside", s.lb, 80, ["p0a", "p1a"])
    s.flows("pod, node", s.lb, 80, "drop")


@case("source-ranges-pods", "Ranges that hold the pods let these in", "kubernetes TestLoadBalancer", kernel=True)
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=["10.244.0.0/16", "fd00:10:244::/56"])
    s.slice("p0a")
    s.flow("pod", s.lb, 80, ["p0a"])
    s.flow("other pod", s.lb, 80, ["p0a"])
    s.flow("outside", s.lb, 80, "drop")


@case(
    "source-ranges-node",
    "Where the node may come in, so may the load balancer's address as source",
    "kubernetes pkg/proxy/nftables/proxier.go",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=[s.width(s.node)])
    s.slice("p0a")
    s.flow("node", s.lb, 80, ["p0a"])
    s.flow(s.lb, s.lb, 80, ["p0a"])
    s.flows("pod, outside", s.lb, 80, "drop")


@case("source-ranges-other-family", "Ranges of the other family alone close nothing", "kubernetes serviceport.go")
def _(s: Site) -> None:
    other = "2001:db8:51::/48" if s.family == 4 else "198.51.100.0/24"
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=[other])
    s.slice("p0a")
    s.flow("outside", s.lb, 80, ["p0a"])


@case(
    "source-ranges-local",
    "With externalTrafficPolicy Local, ranges hold for short-circuited clients too",
    "kubernetes TestLoadBalancer, TestExternalTrafficPolicyLocal",
)
def _(s: Site) -> None:
    s.service(
        ingress=[{"ip": s.lb}],
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=[s.width(s.outside), s.width(s.pod("p1a"))],
    )
    s.slice("p0a", "p1a")
    s.flow("outside", s.lb, 80, ["p0a"])
    s.flow("other pod", s.lb, 80, ["p0a", "p1a"])
    s.flows("pod, node", s.lb, 80, "drop")


@case(
    "source-ranges-unreadable",
    "Where not one range of a family can be read, nobody of it is let in",
    "fails closed",
    why="The API server admits no such Service; kube-proxy would let everybody in.",
)
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=["10.0.0.0/33" if s.family == 4 else "2001:db8::/129"])
    s.slice("p0a")
    s.flows("pod, outside", s.lb, 80, "drop")
    s.flow("pod", s.vip, 80, ["p0a"])


@case(
    "source-ranges-no-endpoints",
    "Without endpoints, those in the ranges are refused and others dropped",
    "kubernetes TestLoadBalancer, TestNoEndpointsReject",
)
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=[s.width(s.outside)])
    s.flow("outside", s.lb, 80, "reject")
    s.flow("pod", s.lb, 80, "drop")


table.topic = "Whose address it is"


@case(
    "ownership",
    "Of Services that claim the same external IP and port the oldest has it; the others keep the rest",
    "one owner on every node",
    kernel=True,
    why="kube-proxy leaves it open who wins.",
    proofs=("unit.test_ownership.test_oldestWins",),
)
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext], created="2024-05-01T00:00:00Z")
    s.slice("p0a")
    s.service(f"{s.name}-a", clusterIP=s.at(1), externalIPs=[s.ext, s.at(4)], created="2024-05-02T00:00:00Z")
    s.slice("p1a", of=f"{s.name}-a")
    s.flow("outside", s.ext, 80, ["p0a"])
    s.flow("outside", s.at(4), 80, ["p1a"])
    s.flow("pod", s.at(1), 80, ["p1a"])


@case("ownership-ports", "Services may share an address with different ports", "kubernetes API", kernel=True)
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext])
    s.slice("p0a")
    s.service(f"{s.name}-b", [port("http", 81)], clusterIP=s.at(1), externalIPs=[s.ext])
    s.slice("p1a", of=f"{s.name}-b")
    s.flow("outside", s.ext, 80, ["p0a"])
    s.flow("outside", s.ext, 81, ["p1a"])


@case(
    "frontend-deny",
    "External IPs in a network that frontend-deny names are not captured",
    "CVE-2020-8554",
    settings={**CLUSTER_CIDR, "frontend-deny": "10.96.0.0/16, fd00:10:96::/112"},
)
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext], ingress=[{"ip": s.lb}], nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("pod", s.ext, 80, "untouched")
    s.flow("pod", s.lb, 80, "untouched")
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("outside", s.node, s.nodePort, ["p0a"])


@case(
    "frontend-allow",
    "With frontend-allow, only external IPs in these networks are captured",
    "CVE-2020-8554",
    settings={**CLUSTER_CIDR, "frontend-allow": "203.0.113.0/24, 2001:db8:cb::/48"},
)
def _(s: Site) -> None:
    allowed = "203.0.113.9" if s.family == 4 else "2001:db8:cb::9"
    s.service(externalIPs=[s.ext, allowed])
    s.slice("p0a")
    s.flow("pod", s.ext, 80, "untouched")
    s.flow("pod", allowed, 80, ["p0a"])


@case(
    "unusable-address",
    "Loopback, link-local and multicast addresses are never captured",
    "CVE-2020-8554, KEP-5707",
    why="kube-proxy captures what the API server lets pass.",
)
def _(s: Site) -> None:
    bad = [s.loopback, *(["169.254.169.254", "224.0.0.9"] if s.family == 4 else ["fe80::7", "ff02::7"])]
    s.service(externalIPs=bad)
    s.slice("p0a")
    s.flow("node", s.loopback, 80, "untouched")
    for address in bad[1:]:
        s.flow("pod", address, 80, "untouched")
    s.flow("pod", s.vip, 80, ["p0a"])


@case(
    "api-server",
    "Nobody is led away from the API server: neither by an external IP nor by a node port",
    "CVE-2020-8554, kubernetes#111682",
    why="kube-proxy captures its address.",
)
def _(s: Site) -> None:
    server = "192.0.2.4" if s.family == 4 else "2001:db8:2::4"
    s.row.servers = ((server, 6443), (s.node, s.nodePort))
    s.service(ports=[port("api", 6443), port("http", 80)], externalIPs=[server], nodePort=s.nodePort)
    s.slice("p0a", ports=[port("api", 6443), port("http", PORT)])
    s.flows("pod, node", server, 6443, "untouched")
    s.flow("outside", s.node, s.nodePort, "untouched")
    s.flow("pod", s.vip, 6443, ["p0a:6443"])
    s.flow("pod", server, 80, ["p0a"])


table.shown(
    "own-ports",
    "The proxy's own sockets take only what a rule led there",
    "kubernetes pkg/proxy/userspace",
    "unit.test_conformance.test_ownPorts",
    "integration.test_endtoend.test_ownPortsAreClosed",
    why="kube-proxy has no such ports.",
)
table.shown(
    "loops",
    "An endpoint that is itself a frontend makes no loop",
    "needed of any proxy in userspace",
    "unit.test_conformance.test_ownPackets",
    "integration.test_loops.test_served",
    "integration.test_endtoend.test_endpointIsAFrontend",
)
table.leftOut("host-port", "hostPort", "CNI portmap", "no duty of a service proxy: the CNI plug-in portmap does it")
table.leftOut(
    "port-holding",
    "Holding each node port with a socket of its own",
    "kubernetes#100643",
    "kube-proxy has given it up, since it never protected reliably. The proxy's own sockets show in ss",
)
table.leftOut(
    "allow-external-ips",
    "Gate AllowServiceExternalIPs",
    "KEP-5707",
    "frontend-allow and frontend-deny say for each network what that gate says for all",
)
