"""Rows about slices: which ports and addresses in them count."""

from __future__ import annotations

from .site import PORT, Site, Table, port

table = Table("Slices and their ports")
case = table.case


@case(
    "named-target-port", "Pods whose named port has different numbers", "kubernetes endpointslicecache.go", kernel=True
)
def _(s: Site) -> None:
    s.service()
    s.slice("p0a")
    s.slice("p1a", ports=[port("http", PORT + 1)], suffix="2")
    s.flows("pod, outside", s.vip, 80, ["p0a", f"p1a:{PORT + 1}"])


@case("slice-port-names", "Ports go together by name and protocol, not by number", "kubernetes endpointslicecache.go")
def _(s: Site) -> None:
    s.service(ports=[port("a", 80), port("b", 81)])
    s.slice("p0a", ports=[port("b", 80), port("c", 8081), port("a", 82, "UDP")])
    s.flow("pod", s.vip, 80, "reject")
    s.flow("pod", s.vip, 81, ["p0a:80"])


@case(
    "slice-port-oddities",
    "Ports of a slice without a name or without a number are passed over",
    "kubernetes endpointslicecache.go",
)
def _(s: Site) -> None:
    s.service()
    s.slice("p0a", ports=[{"name": None, "port": 8081}, {"name": "http", "port": None}])
    s.slice("p1a", ports=[{"name": "http", "port": 0}], suffix="2")
    s.slice("p1b", suffix="3")
    s.flow("pod", s.vip, 80, ["p1b"])


@case(
    "first-address",
    "Of an endpoint's addresses the first counts; one without any is passed over",
    "kubernetes endpointslicecache.go",
    kernel=True,
)
def _(s: Site) -> None:
    s.service()
    s.slice({**s.member("p0a"), "addresses": [s.pod("p0a"), s.pod("p1a")]}, {**s.member("p0b"), "addresses": []})
    s.flow("pod", s.vip, 80, ["p0a"])


@case("address-spelling", "Addresses are compared as addresses, however they are spelt", "kubernetes ParseIPSloppy")
def _(s: Site) -> None:
    spelt = "010.244.000.010" if s.family == 4 else "FD00:0010:244:0:0:0:0:10"
    s.service()
    s.slice({**s.member("p0a"), "addresses": [spelt]}, "p0a")
    s.flow("pod", s.vip, 80, ["p0a"])


@case(
    "address-types",
    "FQDN slices, and those of the other family, are passed over",
    "kubernetes endpointschangetracker.go",
)
def _(s: Site) -> None:
    other = "IPv6" if s.family == 4 else "IPv4"
    s.service()
    s.slice({**s.member("p1a"), "addresses": ["pod.example.org"]}, addressType="FQDN", suffix="2")
    s.slice("p1a", addressType=other, suffix="3")
    s.slice("p0a")
    s.flow("pod", s.vip, 80, ["p0a"])


@case("slice-of-nobody", "A slice without the label of a Service belongs to none", "kubernetes endpointslicecache.go")
def _(s: Site) -> None:
    s.service()
    stray = s.slice("p1a", suffix="2")
    stray["metadata"]["labels"] = {}
    s.slice("p0a")
    s.flow("pod", s.vip, 80, ["p0a"])


@case("slice-duplicates", "One endpoint in two slices counts once", "kubernetes endpointslicecache.go", kernel=True)
def _(s: Site) -> None:
    s.service()
    s.slice("p0a", "p1a")
    s.slice("p0a", suffix="2")
    s.flow("pod", s.vip, 80, ["p0a", "p1a"])


@case(
    "slice-duplicate-terminating",
    "A running pod beats one that terminates and had the same address",
    "kubernetes endpointslicecache.go",
)
def _(s: Site) -> None:
    gone = {"ready": False, "serving": False, "terminating": True}
    s.service()
    s.slice(s.member("p0a", **gone))
    s.slice("p0a", suffix="2")
    s.service(f"{s.name}-b", clusterIP=s.at(1))
    s.slice("p0a", of=f"{s.name}-b")
    s.slice(s.member("p0a", **gone), of=f"{s.name}-b", suffix="2")
    s.flow("pod", s.vip, 80, ["p0a"])
    s.flow("pod", s.at(1), 80, ["p0a"])


@case("legacy-endpoints", "An Endpoints object serves where a source has no slices", "kubernetes v1.18 and older")
def _(s: Site) -> None:
    s.service()
    s.add(
        {
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": s.name, "namespace": "default"},
            "subsets": [
                {
                    "addresses": [{"ip": s.pod("p0a"), "nodeName": "n0"}],
                    "notReadyAddresses": [{"ip": s.pod("p1a")}],
                    "ports": [port("http", PORT)],
                }
            ],
        }
    )
    s.flow("pod", s.vip, 80, ["p0a"])


@case(
    "refused-endpoints",
    "Endpoints at loopback, link-local or multicast addresses are not dialled",
    "kubernetes API validation",
    why="The API server admits none; files may hold them.",
)
def _(s: Site) -> None:
    s.service()
    s.slice({**s.member("p0a"), "addresses": [s.loopback]}, "p1a")
    s.flow("pod", s.vip, 80, ["p1a"])
