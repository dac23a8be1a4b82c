"""Rows about addresses: which ones are captured, for which ports, and whose they are."""

from __future__ import annotations

from typing import Any

from .site import CLUSTER_CIDR, PORT, Site, Table

TRACE = "TestTracePackets"


def port(name: str, number: int, protocol: str = "TCP", **more: Any) -> dict[str, Any]:
    """One entry of ``spec.ports``, or of a slice's ports."""
    return {"name": name, "port": number, "protocol": protocol, **more}


UDP = [port("dns", 53, "UDP")]
UDP_SLICE = [port("dns", PORT, "UDP")]

table = Table("ClusterIPs")
case = table.case


@case("cluster-ip", "A ClusterIP serves pods of any node, the node itself and others who are routed here",
      "kubernetes TestClusterIPGeneral", kernel=True)  # fmt: skip
def _(s: Site) -> None:
    s.service()
    s.slice("p0a", "p1a")
    s.flows("*", s.vip, 80, ["p0a", "p1a"])


@case("cluster-ip-udp", "The same for UDP", "kubernetes TestClusterIPGeneral", kernel=True)
def _(s: Site) -> None:
    s.service(ports=UDP)
    s.slice("p0a", "p1a", ports=UDP_SLICE)
    s.flows("*", s.vip, 53, ["p0a", "p1a"], protocol="UDP")


@case("cluster-ip-other-port", "Other ports of a ClusterIP are refused", "kubernetes pkg/proxy/nftables/README.md",
      kernel=True)  # fmt: skip
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    s.flows("pod, node, outside", s.vip, 81, "reject")
    s.flow("pod", s.vip, 80, "reject", protocol="UDP")


@case("cluster-ip-not-allocated", "Addresses in a ServiceCIDR that no Service has are dropped",
      "kubernetes pkg/proxy/nftables/README.md, KEP-1880")  # fmt: skip
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    network = "10.96.0.0/16" if s.family == 4 else "fd00:10:96::/112"
    s.add({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
           "spec": {"cidrs": [network]}})  # fmt: skip
    s.flows("pod, node, outside", s.at(7), 80, "drop")
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("pod", s.vip, 81, "reject")


@case("no-service-cidr", "Without ServiceCIDR objects nothing is dropped", "kubernetes pkg/proxy/nftables/README.md")
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    s.flows("pod, node, outside", s.at(7), 80, "untouched")


@case("multi-port", "Several ports, and one number for TCP and UDP", "kubernetes TestMultiPortServiceBindAddr, DNS",
      kernel=True)  # fmt: skip
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


@case("icmp", "A ClusterIP does not answer ping; what is no TCP, UDP or SCTP is not looked at here",
      "kubernetes-sigs/kpng doc/service-proxy.md", families=(4, 6))  # fmt: skip
def _(s: Site) -> None:
    s.service()
    s.flow("pod", s.vip, 80, "reject")


@case("proxy-name", "A Service labelled for another proxy is left to that one", "KEP-2447, TestServiceProxyName",
      kernel=True)  # fmt: skip
def _(s: Site) -> None:
    s.service(labels={"service.kubernetes.io/service-proxy-name": "another"}, nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("pod", s.vip, 80, "untouched")
    s.flow("outside", s.node, s.nodePort, "untouched")


@case("proxy-name-ours", "With proxy-name, only Services labelled for that name are served", "KEP-2447",
      settings={**CLUSTER_CIDR, "proxy-name": "kproxy"})  # fmt: skip
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


@case("external-name", "ExternalName is a matter of DNS, even with a ClusterIP", "kubernetes TestExternalName")
def _(s: Site) -> None:
    s.service(type="ExternalName", externalName="www.example.org")
    s.slice("p0a")
    s.flow("pod", s.vip, 80, "untouched")


@case("dual-stack", "Each family by itself: one without endpoints fails, the other serves", "kpng doc, TestDualStack",
      kernel=True)  # fmt: skip
def _(s: Site) -> None:
    other = Site(s.row, s.number)
    other.family, other.IPv = (6, "IPv6") if s.family == 4 else (4, "IPv4")
    s.service(clusterIPs=[s.vip, other.at(5)], ipFamilies=[s.IPv, other.IPv], ipFamilyPolicy="PreferDualStack")
    s.slice("p0a", "p1a")
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])
    s.flow("pod", other.at(5), 80, "reject")


@case("single-stack", "Addresses of a family that the Service does not have are not captured",
      "kubernetes TestIPFamilies")  # fmt: skip
def _(s: Site) -> None:
    other = Site(s.row, s.number)
    other.family = 6 if s.family == 4 else 4
    s.service(externalIPs=[s.ext, other.ext])
    s.slice("p0a")
    s.flow("outside", s.ext, 80, ["p0a"])
    s.flow("outside", other.ext, 80, "untouched")


@case("sctp", "SCTP", "KEP-614", why="SCTP needs an endpoint's own rules; a relay in userspace does not carry it. Its "
      "clients are refused rather than kept waiting.")  # fmt: skip
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


@case("node-port", "A node port is served at every address of this node, and at no other node's",
      "kubernetes TestNodePorts", kernel=True)  # fmt: skip
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


@case("node-port-loopback", "Node ports are served on the node's loopback addresses, of both families",
      "KEP-6032, kubernetes#90259", kernel=True)  # fmt: skip
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice("p1a")
    s.flow("node", s.loopback, s.nodePort, ["p1a"])


def _nodePortCase(name: str, title: str, words: str, kernel: bool = False) -> Any:
    settings = {**CLUSTER_CIDR, "node-port-addresses": words}
    return case(name, title, "kubernetes TestNodePorts, nodeport_addresses.go", settings=settings, kernel=kernel)


@_nodePortCase("node-port-networks", "With node-port-addresses, only at addresses in these networks",
               "192.0.2.0/24, 2001:db8:2::/64", kernel=True)  # fmt: skip
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


@case("node-port-last", "Addresses of Services come before node ports", "kubernetes pkg/proxy/iptables/proxier.go",
      kernel=True)  # fmt: skip
def _(s: Site) -> None:
    number = s.nodePort
    s.service(ports=[port("http", number)], externalIPs=[s.node])
    s.slice("p0a")
    s.service(f"{s.name}-b", clusterIP=s.at(1), nodePort=number)
    s.slice("p1a", of=f"{s.name}-b")
    s.flows("pod, outside", s.node, number, ["p0a"])
    s.flow("pod", s.bridge, number, ["p1a"])


table.topic = "External IPs and load balancers"


@case("external-ip", "External IPs, for everybody", "kubernetes TestExternalIPsOnly", kernel=True)
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext, s.at(4)])
    s.slice("p0a", "p1a")
    s.flows("*", s.ext, 80, ["p0a", "p1a"])
    s.flow("outside", s.at(4), 80, ["p0a", "p1a"])
    s.flow("outside", s.ext, 81, "untouched")


@case("load-balancer", "Addresses of load balancers are captured on every node, from pods too", "kubernetes TestLoadBalancer",
      kernel=True)  # fmt: skip
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, ingress=[{"ip": s.lb}])
    s.slice("p0a", "p1a")
    s.flows("*", s.lb, 80, ["p0a", "p1a"])
    s.flow("outside", s.node, s.nodePort, ["p0a", "p1a"])
    s.flow("outside", s.lb, 81, "untouched")


for mode, expected in (("VIP", "served"), ("Proxy", "left to the load balancer")):

    @case(f"ip-mode-{mode.lower()}", f"ipMode {mode}: {expected}",
          "KEP-1860, kubernetes TestLoadBalancerIngressRouteTypeProxy", kernel=True)  # fmt: skip
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


@case("source-ranges", "Only sources in the ranges get to the load balancer's address; others are dropped",
      "kubernetes TestLoadBalancer", kernel=True)  # fmt: skip
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


@case("source-ranges-elsewhere", "Node ports, external IPs and ClusterIPs of the same Service are open to all",
      "kubernetes TestLoadBalancer", kernel=True)  # fmt: skip
def _(s: Site) -> None:
    s.service(
        nodePort=s.nodePort, ingress=[{"ip": s.lb}], externalIPs=[s.ext],
        loadBalancerSourceRanges=["198.51.100.0/24", "2001:db8:51::/48"],
    )  # fmt: skip
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


@case("source-ranges-node", "Where the node may come in, so may the load balancer's address as source",
      "kubernetes pkg/proxy/nftables/proxier.go", kernel=True)  # fmt: skip
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


@case("source-ranges-local", "With externalTrafficPolicy Local, ranges hold for short-circuited clients too",
      "kubernetes TestLoadBalancer, TestExternalTrafficPolicyLocal")  # fmt: skip
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], externalTrafficPolicy="Local",
              loadBalancerSourceRanges=[s.width(s.outside), s.width(s.pod("p1a"))])  # fmt: skip
    s.slice("p0a", "p1a")
    s.flow("outside", s.lb, 80, ["p0a"])
    s.flow("other pod", s.lb, 80, ["p0a", "p1a"])
    s.flows("pod, node", s.lb, 80, "drop")


@case("source-ranges-unreadable", "Where not one range can be read, nobody is let in", "fails closed",
      why="The API server admits no such Service; kube-proxy would let everybody in.")  # fmt: skip
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=["10.0.0.0/33"])
    s.slice("p0a")
    s.flows("pod, outside", s.lb, 80, "drop")
    s.flow("pod", s.vip, 80, ["p0a"])


@case("source-ranges-no-endpoints", "Without endpoints, those in the ranges are refused and others dropped",
      "kubernetes TestLoadBalancer, TestNoEndpointsReject")  # fmt: skip
def _(s: Site) -> None:
    s.service(ingress=[{"ip": s.lb}], loadBalancerSourceRanges=[s.width(s.outside)])
    s.flow("outside", s.lb, 80, "reject")
    s.flow("pod", s.lb, 80, "drop")


table.topic = "Whose address it is"


@case("ownership", "Of Services that claim the same external IP and port the oldest has it; the others keep the rest",
      "one owner on every node", kernel=True,
      why="kube-proxy leaves it open who wins.", proofs=("unit.test_ownership.test_oldestWins",))  # fmt: skip
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


@case("frontend-deny", "External IPs in a network that frontend-deny names are not captured", "CVE-2020-8554",
      settings={**CLUSTER_CIDR, "frontend-deny": "10.96.0.0/16, fd00:10:96::/112"})  # fmt: skip
def _(s: Site) -> None:
    s.service(externalIPs=[s.ext], ingress=[{"ip": s.lb}], nodePort=s.nodePort)
    s.slice("p0a")
    s.flow("pod", s.ext, 80, "untouched")
    s.flow("pod", s.lb, 80, "untouched")
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("outside", s.node, s.nodePort, ["p0a"])


@case("frontend-allow", "With frontend-allow, only external IPs in these networks are captured", "CVE-2020-8554",
      settings={**CLUSTER_CIDR, "frontend-allow": "203.0.113.0/24, 2001:db8:cb::/48"})  # fmt: skip
def _(s: Site) -> None:
    allowed = "203.0.113.9" if s.family == 4 else "2001:db8:cb::9"
    s.service(externalIPs=[s.ext, allowed])
    s.slice("p0a")
    s.flow("pod", s.ext, 80, "untouched")
    s.flow("pod", allowed, 80, ["p0a"])


@case("unusable-address", "Loopback, link-local and multicast addresses are never captured", "CVE-2020-8554, KEP-5707",
      why="kube-proxy captures what the API server lets pass.")  # fmt: skip
def _(s: Site) -> None:
    bad = [s.loopback, *(["169.254.169.254", "224.0.0.9"] if s.family == 4 else ["fe80::7", "ff02::7"])]
    s.service(externalIPs=bad)
    s.slice("p0a")
    s.flow("node", s.loopback, 80, "untouched")
    for address in bad[1:]:
        s.flow("pod", address, 80, "untouched")
    s.flow("pod", s.vip, 80, ["p0a"])


table.leftOut("host-port", "hostPort", "CNI portmap", "no duty of a service proxy: the CNI plug-in portmap does it")
table.leftOut(
    "port-holding", "Holding each node port with a socket of its own", "kubernetes#100643",
    "kube-proxy has given it up, since it never protected reliably. The proxy's own sockets show in ss",
)  # fmt: skip
table.leftOut(
    "allow-external-ips", "Gate AllowServiceExternalIPs", "KEP-5707",
    "frontend-allow and frontend-deny say for each network what that gate says for all",
)  # fmt: skip
