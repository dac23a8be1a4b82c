"""Rows about ClusterIPs and node ports."""

from __future__ import annotations

from typing import Any

from .site import CLUSTER_CIDR, PORT, UDP, UDP_SLICE, Site, Table, port

table = Table("ClusterIPs")
case = table.case


@case(
    "cluster-ip",
    "A ClusterIP serves pods of any node, the node itself and others who are routed here",
    "kubernetes TestClusterIPGeneral",
    kernel=True,
)
def _(s: Site) -> None:
    s.service()
    s.slice("p0a", "p1a")
    s.flows("*", s.vip, 80, ["p0a", "p1a"])


@case("cluster-ip-udp", "The same for UDP", "kubernetes TestClusterIPGeneral", kernel=True)
def _(s: Site) -> None:
    s.service(ports=UDP)
    s.slice("p0a", "p1a", ports=UDP_SLICE)
    s.flows("*", s.vip, 53, ["p0a", "p1a"], protocol="UDP")


@case(
    "cluster-ip-other-port",
    "Other ports of a ClusterIP are refused",
    "kubernetes pkg/proxy/nftables/README.md",
    kernel=True,
)
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    s.flows("pod, node, outside", s.vip, 81, "reject")
    s.flow("pod", s.vip, 80, "reject", protocol="UDP")


@case(
    "cluster-ip-not-allocated",
    "Addresses in a ServiceCIDR that no Service has are dropped",
    "kubernetes pkg/proxy/nftables/README.md, KEP-1880",
)
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    network = "10.96.0.0/16" if s.family == 4 else "fd00:10:96::/112"
    s.add(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": [network]},
        }
    )
    s.flows("pod, node, outside", s.at(7), 80, "drop")
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("pod", s.vip, 81, "reject")


@case(
    "service-cidr-of-node",
    "Addresses of the node are not dropped, were they in a ServiceCIDR",
    "kubernetes pkg/proxy/nftables/README.md",
    why="kube-proxy relies on the networks to be apart.",
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    cidrs = ["10.244.0.0/16" if s.family == 4 else "fd00:10:244::/56"]
    metadata = {"name": "kubernetes"}
    s.add({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": metadata, "spec": {"cidrs": cidrs}})
    s.flows("pod, other pod, node", s.bridge, 22, "untouched")
    s.flows("pod, node", s.bridge, s.nodePort, ["p0a"])
    s.flow("outside", s.bridge, 0, "untouched", protocol="ICMP")


@case("no-service-cidr", "Without ServiceCIDR objects nothing is dropped", "kubernetes pkg/proxy/nftables/README.md")
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    s.flows("pod, node, outside", s.at(7), 80, "untouched")


@case(
    "multi-port",
    "Several ports, and one number for TCP and UDP",
    "kubernetes endpointslicecache.go",
    kernel=True,
)
def _(s: Site) -> None:
    ports = [port("dns", 53, "UDP"), port("dns-tcp", 53), port("metrics", 9153)]
    s.service(ports=ports)
    s.slice("p0a", ports=[port("dns", PORT, "UDP"), port("dns-tcp", PORT)])
    s.slice("p1a", ports=[port("metrics", PORT)], suffix="2")
    s.flow("pod", s.vip, 53, ["p0a"], protocol="UDP")
    s.flow("pod", s.vip, 53, ["p0a"])
    s.flow("pod", s.vip, 9153, ["p1a"])


@case("unnamed-port", "One port without a name", "kubernetes endpointslicecache.go", kernel=True)
def _(s: Site) -> None:
    s.service(ports=[{"port": 80, "protocol": "TCP"}])
    s.slice("p0a", ports=[port("", PORT)])
    s.flows("pod, node", s.vip, 80, ["p0a"])


@case(
    "icmp",
    "Ping, and whatever else is no TCP, UDP or SCTP, is not answered by a ClusterIP",
    "kubernetes-sigs/kpng doc/service-proxy.md",
)
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext])
    s.slice("p0a")
    s.flows("pod, node, outside", s.vip, 0, "reject", protocol="ICMP")
    s.flow("outside", s.ext, 0, "untouched", protocol="ICMP")
    s.flow("outside", s.node, 0, "untouched", protocol="ICMP")


@case(
    "cluster-ip-of-node",
    "A ClusterIP that is an address of this node is not captured",
    "CVE-2020-8554",
    why="All ports of the node would be taken. Only a Service from a file can have one.",
)
def _(s: Site) -> None:
    s.service(clusterIP=s.node, clusterIPs=[s.node])
    s.slice("p0a")
    s.flows("pod, node, outside", s.node, 80, "untouched")
    s.flow("outside", s.node, 22, "untouched")


@case(
    "proxy-name",
    "A Service labelled for another proxy is left to that one",
    "KEP-2447",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(labels={"service.kubernetes.io/service-proxy-name": "another"}, nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("pod", s.vip, 80, "untouched")
    s.flow("outside", s.node, s.nodePort, "untouched")


@case(
    "proxy-name-ours",
    "With proxy-name, only Services labelled for that name are served",
    "KEP-2447",
    settings={**CLUSTER_CIDR, "proxy-name": "kproxy"},
)
def _(s: Site) -> None:
    s.service(labels={"service.kubernetes.io/service-proxy-name": "kproxy"})
    s.slice("p0a")
    s.service(f"{s.name}-plain", clusterIP=s.at(1))
    s.slice("p0a", of=f"{s.name}-plain")
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("pod", s.at(1), 80, "untouched")


@case("headless", "A headless Service has no address, whatever its slices hold", "kubernetes ShouldSkipService")
def _(s: Site) -> None:
    s.service(clusterIP="None", clusterIPs=["None"], externalIPs=[s.ext])
    s.slice("p0a", labels={"service.kubernetes.io/headless": ""})
    s.flow("pod", s.ext, 80, "untouched")
    s.flow("pod", s.pod("p0a"), PORT, "untouched")


@case("external-name", "ExternalName is a matter of DNS, even with a ClusterIP", "kubernetes ShouldSkipService")
def _(s: Site) -> None:
    s.service(type="ExternalName", externalName="www.example.org")
    s.slice("p0a")
    s.flow("pod", s.vip, 80, "untouched")


@case(
    "dual-stack",
    "Each family by itself: one without endpoints fails, the other serves",
    "kubernetes pkg/proxy/metaproxier, kpng doc/service-proxy.md",
    kernel=True,
)
def _(s: Site) -> None:
    other = Site(s.row, s.number)
    other.family, other.IPv = (6, "IPv6") if s.family == 4 else (4, "IPv4")
    s.service(clusterIPs=[s.vip, other.at(5)], ipFamilies=[s.IPv, other.IPv], ipFamilyPolicy="PreferDualStack")
    s.slice("p0a", "p1a")
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])
    s.flow("pod", other.at(5), 80, "reject")


@case(
    "single-stack",
    "Addresses of a family that the Service does not have are not captured",
    "kubernetes pkg/proxy/serviceport.go",
)
def _(s: Site) -> None:
    other = Site(s.row, s.number)
    other.family = 6 if s.family == 4 else 4
    s.service(externalIPs=[s.ext, other.ext])
    s.slice("p0a")
    s.flow("outside", s.ext, 80, ["p0a"])
    s.flow("outside", other.ext, 80, "untouched")


@case(
    "sctp",
    "SCTP",
    "KEP-614",
    why="SCTP needs an endpoint's own rules; a relay in userspace does not carry it. Its "
    "clients are refused rather than kept waiting.",
)
def _(s: Site) -> None:
    s.service(ports=[port("sig", 3868, "SCTP", nodePort=s.nodePort), port("http", 80)], type="NodePort")
    s.slice("p0a", ports=[port("sig", 3868, "SCTP"), port("http", PORT)])
    s.flows("*", s.vip, 3868, "reject", protocol="SCTP")
    s.flow("outside", s.node, s.nodePort, "reject", protocol="SCTP")
    s.flow("pod", s.vip, 80, ["p0a"])


@case("app-protocol", "appProtocol changes nothing", "KEP-1507")
def _(s: Site) -> None:
    s.service(ports=[port("http", 80, appProtocol="kubernetes.io/h2c")])
    s.slice("p0a", ports=[port("http", PORT, appProtocol="kubernetes.io/h2c")])
    s.flow("pod", s.vip, 80, ["p0a"])


table.topic = "Node ports"


@case(
    "node-port",
    "A node port is served at every address of this node, and at no other node's",
    "kubernetes TestNodePorts",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a", "p1a")
    s.flows("*", s.node, s.nodePort, ["p0a", "p1a"])
    s.flows("pod, node", s.bridge, s.nodePort, ["p0a", "p1a"])
    s.flows("pod, node", s.otherNode, s.nodePort, "untouched")
    s.flow("pod", s.node, s.nodePort + 1, "untouched")


@case("node-port-udp", "The same for UDP", "kubernetes TestNodePorts", kernel=True)
def _(s: Site) -> None:
    s.service(ports=UDP, nodePort=s.nodePort)
    s.slice("p0a", "p1a", ports=UDP_SLICE)
    s.flows("pod, node, outside", s.node, s.nodePort, ["p0a", "p1a"], protocol="UDP")
    s.flow("outside", s.node, s.nodePort, "untouched", protocol="TCP")


@case(
    "node-port-loopback",
    "Node ports are served on the node's loopback addresses, of both families",
    "KEP-6032, kubernetes#90259",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p1a")
    s.flow("node", s.loopback, s.nodePort, ["p1a"])


def _nodePortCase(name: str, title: str, words: str, kernel: bool = False) -> Any:
    settings = {**CLUSTER_CIDR, "node-port-addresses": words}
    return case(name, title, "kubernetes TestNodePorts, nodeport_addresses.go", settings=settings, kernel=kernel)


@_nodePortCase(
    "node-port-networks",
    "With node-port-addresses, only at addresses in these networks",
    "192.0.2.0/24, 2001:db8:2::/64",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flows("*", s.node, s.nodePort, ["p0a"])
    s.flows("pod, node", s.bridge, s.nodePort, "untouched")
    s.flow("node", s.loopback, s.nodePort, "untouched")
    s.flow("pod", s.vip, 80, ["p0a"])


@_nodePortCase("node-port-primary", "The word primary: the addresses of the Node object", "primary")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flows("pod, node, outside", s.node, s.nodePort, ["p0a"])
    s.flow("pod", s.bridge, s.nodePort, "untouched")


@_nodePortCase("node-port-localhost", "The word localhost: the loopback addresses of both families", "localhost")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("node", s.loopback, s.nodePort, ["p0a"])
    s.flows("pod, node, outside", s.node, s.nodePort, "untouched")


@_nodePortCase("node-port-words", "Words and networks go together", "primary, localhost")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("node", s.loopback, s.nodePort, ["p0a"])
    s.flow("outside", s.node, s.nodePort, ["p0a"])
    s.flow("pod", s.bridge, s.nodePort, "untouched")


@_nodePortCase("node-port-zero", "A network of everything wins over the others", "192.0.2.0/24, 0.0.0.0/0, ::/0")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flows("pod, node", s.bridge, s.nodePort, ["p0a"])


@_nodePortCase("node-port-other-family", "A family of which nothing is said means all of its addresses", "10.0.0.0/8")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("outside", s.node, s.nodePort, "untouched" if s.family == 4 else ["p0a"])
    s.flow("pod", s.bridge, s.nodePort, ["p0a"])


@case(
    "node-port-last",
    "Addresses of Services come before node ports",
    "kubernetes pkg/proxy/iptables/proxier.go",
    kernel=True,
)
def _(s: Site) -> None:
    number = s.nodePort
    s.service(ports=[port("http", number)], externalIPs=[s.node])
    s.slice("p0a")
    s.service(f"{s.name}-b", clusterIP=s.at(1), nodePort=number)
    s.slice("p1a", of=f"{s.name}-b")
    s.flows("pod, outside", s.node, number, ["p0a"])
    s.flow("pod", s.bridge, number, ["p1a"])


@case(
    "node-port-last-refused",
    "… also where they refuse or drop: nobody gets to a node port of the same number then",
    "kubernetes pkg/proxy/iptables/proxier.go",
    kernel=True,
)
def _(s: Site) -> None:
    number = s.nodePort
    s.service(
        ports=[port("none", number), port("local", number + 1)], externalIPs=[s.node], externalTrafficPolicy="Local"
    )
    s.slice("p1a", ports=[port("local", PORT)])
    ranges = ["198.51.100.0/24", "2001:db8:51::/48"]
    s.service(
        f"{s.name}-ranges",
        [port("http", number + 2)],
        clusterIP=s.at(1),
        ingress=[{"ip": s.node}],
        loadBalancerSourceRanges=ranges,
    )
    s.slice("p1a", of=f"{s.name}-ranges")
    ports = [port("a", 80, nodePort=number), port("b", 81, nodePort=number + 1), port("c", 82, nodePort=number + 2)]
    s.service(f"{s.name}-node-ports", ports, type="NodePort", clusterIP=s.at(2))
    s.slice("p0a", of=f"{s.name}-node-ports", ports=[port(name, PORT) for name in "abc"])
    s.flows("pod, node, outside", s.node, number, "reject")
    s.flow("outside", s.node, number + 1, "drop")
    s.flow("pod", s.node, number + 1, ["p1a"])
    s.flows("pod, outside", s.node, number + 2, "drop")
    for k in range(3):
        s.flow("pod", s.bridge, number + k, ["p0a"])
