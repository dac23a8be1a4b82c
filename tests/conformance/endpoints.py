"""Rows about endpoints: which of them a frontend may use."""

from __future__ import annotations

from typing import Any

from .site import UDP, UDP_SLICE, Site, Table

table = Table("Readiness and termination")
case = table.case


@case("conditions-absent", "A condition that is not given: ready, serving, not terminating", "discovery.k8s.io/v1")
def _(s: Site) -> None:
    s.service()
    s.slice({**s.member("p0a"), "conditions": {}}, {**s.member("p1a"), "conditions": {"ready": None}})
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


@case("not-ready", "Endpoints that are not ready get nothing", "kubernetes topology.go", kernel=True)
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", ready=False, serving=False), "p1a")
    s.flow("pod", s.vip, 80, ["p1a"])


@case(
    "publish-not-ready",
    "publishNotReadyAddresses: what the slice says counts, terminating or not",
    "kubernetes EndpointSlice controller",
)
def _(s: Site) -> None:
    s.service(publishNotReadyAddresses=True)
    s.slice(s.member("p0a", ready=True, serving=False, terminating=True), "p1a")
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


LEAVING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}


@case(
    "terminating-unused",
    "Terminating endpoints get nothing while one is ready",
    "KEP-1669, TestTerminatingEndpointsTrafficPolicyCluster",
    kernel=True,
)
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", **LEAVING), "p1a")
    s.flows("pod, outside", s.vip, 80, ["p1a"])


@case(
    "terminating-fallback",
    "Where none is ready, those that serve while terminating do",
    "KEP-1669, TestTerminatingEndpointsTrafficPolicyCluster",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice(s.member("p0a", **LEAVING), s.member("p1a", **LEAVING), s.member("p1b", **GONE))
    s.flows("pod, outside", s.vip, 80, ["p0a", "p1a"])
    s.flow("outside", s.node, s.nodePort, ["p0a", "p1a"])


@case(
    "terminating-gone",
    "Those that terminate and do not serve never do",
    "KEP-1669, TestTerminatingEndpointsTrafficPolicyCluster",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice(s.member("p0a", **GONE), s.member("p1a", ready=False, serving=True))
    s.flows("pod, outside", s.vip, 80, "reject")
    s.flow("outside", s.node, s.nodePort, "reject")


@case(
    "terminating-local",
    "The fallback holds for this node's endpoints by themselves",
    "KEP-1669, TestTerminatingEndpointsTrafficPolicyLocal",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, ingress=[{"ip": s.lb}], externalTrafficPolicy="Local")
    s.slice(s.member("p0a", **LEAVING), "p1a")
    s.flow("outside", s.node, s.nodePort, ["p0a"])
    s.flow("outside", s.lb, 80, ["p0a"])
    s.flows("pod, node", s.lb, 80, ["p1a"])
    s.flow("pod", s.vip, 80, ["p1a"])


@case(
    "terminating-local-ready",
    "One that is ready here: those that terminate here get nothing",
    "KEP-1669, TestTerminatingEndpointsTrafficPolicyLocal",
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalTrafficPolicy="Local")
    s.slice(s.member("p0a", **LEAVING), "p0c", "p1a")
    s.flow("outside", s.node, s.nodePort, ["p0c"])


@case(
    "terminating-local-gone",
    "None left here that serves: dropped while others exist",
    "KEP-1669, TestTerminatingEndpointsTrafficPolicyLocal",
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalTrafficPolicy="Local", internalTrafficPolicy="Local")
    s.slice(s.member("p0a", **GONE), s.member("p1a", **LEAVING))
    s.flow("outside", s.node, s.nodePort, "drop")
    s.flow("pod", s.node, s.nodePort, ["p1a"])
    s.flow("pod", s.vip, 80, "drop")


table.topic = "Hints"


def hints(name: str, title: str, kernel: bool = False) -> Any:
    return case(name, title, "kubernetes topology.go, KEP-2433, KEP-4444", kernel=kernel)


@hints("hints-zone", "Every endpoint has a zone, some this node's: those", kernel=True)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort)
    s.slice(s.member("p0a", zones=["z0"]), s.member("p1a", zones=["z1"]), s.member("p1b", zones=["z1", "z2"]))
    s.flows("pod, outside", s.vip, 80, ["p0a"])
    s.flow("outside", s.node, s.nodePort, ["p0a"])


@hints("hints-one-without", "One endpoint without a hint: all")
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", zones=["z0"]), "p1a")
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


@hints("hints-nobody", "No endpoint for this zone: all")
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", zones=["z2"]), s.member("p1a", zones=["z1"]))
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


@hints("hints-node", "Hints for nodes come before hints for zones", kernel=True)
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", zones=["z0"], nodes=["n1"]), s.member("p1a", zones=["z1"], nodes=["n0"]))
    s.flow("pod", s.vip, 80, ["p1a"])


@hints("hints-node-nobody", "No endpoint for this node: hints for zones count")
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", zones=["z0"], nodes=["n5"]), s.member("p1a", zones=["z1"], nodes=["n1"]))
    s.flow("pod", s.vip, 80, ["p0a"])


@hints("hints-not-ready", "An endpoint that is not ready needs no hint")
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", zones=["z0"]), s.member("p1a", zones=["z1"]), s.member("p1b", ready=False))
    s.flow("pod", s.vip, 80, ["p0a"])


@hints("hints-no-zone", "A node without a zone: all")
def _(s: Site) -> None:
    s.nodeObject(zone="")
    s.service()
    s.slice(s.member("p0a", zones=["z0"]), s.member("p1a", zones=[""]))
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


@hints("hints-terminating", "Endpoints that are used since none is ready: hints say nothing")
def _(s: Site) -> None:
    s.service()
    s.slice(s.member("p0a", zones=["z1"], **LEAVING), s.member("p1a", zones=["z0"], **LEAVING))
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


@hints("hints-local", "Local policies look at the node, not at hints")
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalTrafficPolicy="Local", internalTrafficPolicy="Local")
    s.slice(s.member("p0a", zones=["z1"]), s.member("p1a", zones=["z0"]))
    s.flow("outside", s.node, s.nodePort, ["p0a"])
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("pod", s.node, s.nodePort, ["p1a"])


table.topic = "No endpoints"


@case(
    "no-endpoints",
    "Nothing to go to anywhere: every frontend refuses, for everybody",
    "kubernetes TestNoEndpointsReject",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalIPs=[s.ext], ingress=[{"ip": s.lb}])
    for address in (s.vip, s.ext, s.lb):
        s.flows("pod, node, outside", address, 80, "reject")
    s.flows("pod, node, outside", s.node, s.nodePort, "reject")


@case("no-endpoints-udp", "The same for UDP", "kubernetes TestNoEndpointsReject", kernel=True)
def _(s: Site) -> None:
    s.service(ports=UDP, nodePort=s.nodePort)
    s.slice(s.member("p0a", ready=False, serving=False), ports=UDP_SLICE)
    s.flows("pod, node, outside", s.vip, 53, "reject", protocol="UDP")
    s.flow("outside", s.node, s.nodePort, "reject", protocol="UDP")


@case(
    "no-endpoints-local",
    "Local policies refuse too, where no endpoint exists anywhere",
    "kubernetes TestNoEndpointsReject, TestExternalTrafficPolicyLocal",
    kernel=True,
)
def _(s: Site) -> None:
    s.service(nodePort=s.nodePort, externalTrafficPolicy="Local", internalTrafficPolicy="Local")
    s.flows("pod, outside", s.vip, 80, "reject")
    s.flows("pod, outside", s.node, s.nodePort, "reject")


table.topic = "Choice among endpoints"
table.shown(
    "round-robin",
    "Each endpoint in turn",
    "kubernetes pkg/proxy/userspace/roundrobin.go",
    "unit.test_balancer.test_multipleEndpoints",
    "unit.test_policies.test_oneAfterTheOther",
    why="kube-proxy chooses by chance, which is uneven at low rates; policy = random does so too.",
)
table.shown(
    "retry",
    "A client whose endpoint does not answer is connected to another one",
    "kubernetes pkg/proxy/userspace",
    "integration.test_endtoend.test_killedBackend",
    why="No dataplane in the kernel can do that: it chooses before anything is known.",
)
table.shown(
    "affinity",
    "sessionAffinity ClientIP: one client, one endpoint",
    "kubernetes pkg/proxy/userspace/roundrobin.go",
    "unit.test_balancer.test_sticky",
    "integration.test_e2e_services.test_affinity",
)
table.shown(
    "affinity-time",
    "timeoutSeconds from 1 to 86400, three hours by default; every connection renews it",
    "kubernetes API",
    "unit.test_resolve.test_affinity",
    "unit.test_balancer.test_oneSecondAndADay",
    "unit.test_balancer.test_sliding",
)
table.shown(
    "affinity-service",
    "By client and service port, whichever of its addresses is dialled; no limit of 100 clients",
    "kubernetes nftables/proxier.go",
    "unit.test_balancer.test_bounded",
    "unit.test_balancer.test_poolsApart",
    why="The local and the cluster pool of a service port remember apart from each other.",
)
table.shown(
    "affinity-loss",
    "What is remembered goes with the endpoint, and outlives other changes of the Service",
    "kubernetes nftables/proxier.go",
    "unit.test_balancer.test_endpointRemoved",
    "unit.test_balancer.test_otherChangesKeepIt",
)
table.shown(
    "affinity-failure",
    "A client whose endpoint fails is bound to another one",
    "kubernetes#24648",
    "unit.test_balancer.test_endpointFails",
    why="kube-proxy sends it to the failed one until the slice changes.",
)
table.leftOut(
    "traffic-distribution",
    "The field trafficDistribution, and the annotation topology-mode",
    "KEP-3015, KEP-4444",
    "controllers read them and write hints, which are followed",
)
