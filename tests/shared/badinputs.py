"""
Objects that are wrong, strange or hostile, what of each must be served all the same, and what operators must be told.

Every one is called ``shop/odd`` (``shop/odd-1`` for slices), unless its name is what is wrong. :data:`SERVICES` and
:data:`SLICES` hold JSON objects; :data:`BYTES` what is done to the JSON text of a good Service.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from tests.shared.sources import manifest, sliceManifest
from twisted_kproxy.core import wire

#: of this Service's load balancer and node, and where the API server is
NODE_ADDRESS, API_SERVER = "192.0.2.7", ("192.0.2.1", 6443)
#: a node port that an older Service has
TAKEN = 30080
GOOD = ("10.96.0.10:80/TCP",)
GOOD_ENDS = ("10.1.0.10:8080",)

Fate: TypeAlias = Literal["refused", "partial", "fine"]


class Bad(Struct, frozen=True):
    """
    One of them.

    :ivar text: the object as JSON.
    :ivar fate: ``refused`` as a whole, so that its last good version stays in force; ``partial``: what is wrong of it
        is left out; ``fine``: nothing is wrong.
    :ivar served: frontends of a Service, or endpoints that a slice brings to its Service, once it is there.
    :ivar reason: what is told to operators; where the fate is ``fine``, nothing is.
    :ivar key: of the object; ``""`` where not even that can be told.
    :ivar onlyServer: a file means something else by it.
    :ivar heavy: takes long.
    """

    name: str
    text: str
    fate: Fate
    served: tuple[str, ...]
    reason: str = ""
    key: str = "shop/odd"
    onlyServer: bool = False
    heavy: bool = False


def good(**spec: Any) -> dict[str, Any]:
    """The Service, when nothing is wrong with it."""
    it = manifest("odd", "10.96.0.10")
    it["metadata"] |= {"uid": "u-odd", "creationTimestamp": "2026-05-05T00:00:00Z"}
    it["spec"] |= {"ports": [{"name": "http", "port": 80, "protocol": "TCP"}], **spec}
    return it


def goodSlice(**fields: Any) -> dict[str, Any]:
    """Its slice."""
    it = sliceManifest("odd-1", "10.1.0.10")
    it["metadata"] |= {"uid": "u-odd-1", "labels": {"kubernetes.io/service-name": "odd"}}
    it["ports"] = [{"name": "http", "port": 8080, "protocol": "TCP"}]
    return it | fields


def _meta(*without: str, **fields: Any) -> dict[str, Any]:
    it = good()
    it["metadata"] = {name: value for name, value in it["metadata"].items() if name not in without} | fields
    return it


def _port(**fields: Any) -> dict[str, Any]:
    return good(ports=[{"name": "http", "port": 80, "protocol": "TCP", **fields}])


def _balanced(*ranges: str, **ingress: Any) -> dict[str, Any]:
    it = good(type="LoadBalancer", loadBalancerSourceRanges=list(ranges))
    return it | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9", **ingress}]}}}


def _affinity(seconds: Any, kind: str = "ClientIP") -> dict[str, Any]:
    return good(sessionAffinity=kind, sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}})


def _served(*ports: int | str, ip: str = "10.96.0.10") -> tuple[str, ...]:
    return tuple(f"{ip}:{port}/TCP" if isinstance(port, int) else port for port in ports)


def _refused(name: str, it: Any, reason: str, key: str = "shop/odd", **more: Any) -> Bad:
    return Bad(name, it if isinstance(it, str) else json.dumps(it), "refused", (), reason, key, **more)


def _partial(name: str, it: Any, served: tuple[str, ...], reason: str) -> Bad:
    return Bad(name, json.dumps(it), "partial", served, reason)


def _fine(name: str, it: Any, served: tuple[str, ...] = GOOD, **more: Any) -> Bad:
    return Bad(name, json.dumps(it), "fine", served, **more)


def _raw(it: dict[str, Any], value: str) -> str:
    """A JSON text with a number that Python does not know."""
    return json.dumps(it).replace('"@"', value)


_NAMES = [
    ("no ASCII", "dé"), ("script", '"; flush ruleset'), ("line end", "a\nb"), ("terminal codes", "\x1b[31mred"),
    ("NUL", "a\0b"), ("slash", "a/b"), ("254 characters", "a" * 254), ("capitals", "Web"), ("blank", "a b"),
    ("only a dot", "."), ("brace", "a}b"),
]  # fmt: skip
_TWO_NAMES = [{"name": "a", "port": 80}, {"name": "a", "port": 81}, {"name": "c", "port": 82}]
_TWO_NUMBERS = [{"name": "a", "port": 80}, {"name": "b", "port": 80}, {"name": "c", "port": 82}]
_TWO_UNNAMED = [{"port": 80}, {"port": 81}]
_NO_ADDRESS = "it has no clusterIP, and is not served"
_NO_NAME = "is not made of small letters"

SERVICES: tuple[Bad, ...] = (
    _refused("spec null", good() | {"spec": None}, "it has no spec"),
    _refused("no spec", {k: v for k, v in good().items() if k != "spec"}, "it has no spec"),
    _refused("spec text", good() | {"spec": "none"}, " must be a mapping, and is "),
    _partial("clusterIP empty", good(clusterIP="", clusterIPs=[]), (), _NO_ADDRESS),
    _partial("clusterIP null", good(clusterIP=None, clusterIPs=None), (), _NO_ADDRESS),
    _partial("clusterIPs alone", good(clusterIP="", clusterIPs=["10.96.0.10"]), (), _NO_ADDRESS),
    _fine("clusterIP None", good(clusterIP="None", clusterIPs=["None"]), ()),
    _fine("clusterIP None in the list only", good(clusterIP="", clusterIPs=["None"]), ()),
    _refused("clusterIP garbage", good(clusterIP="ten"), "clusterIP: 'ten' is not an IP address"),
    _refused("clusterIPs garbage", good(clusterIPs=["10.96.0.10", "x"]), "clusterIP: 'x' is not an IP address"),
    _refused("clusterIP number", good(clusterIP=10), " must be text, and is "),
    _refused("clusterIP with zone", good(clusterIPs=["fe80::1%eth0"]), "has a zone"),
    _fine("clusterIP IPv4-mapped", good(clusterIPs=["::ffff:10.96.0.10"])),
    _fine("clusterIP leading zeros", good(clusterIPs=["010.096.000.010"])),
    _partial("clusterIP own", good(clusterIPs=[NODE_ADDRESS]), (), f"{NODE_ADDRESS} is an address of this node"),
    _partial("clusterIP unspecified", good(clusterIPs=["0.0.0.0"]), (), "0.0.0.0 is an unspecified address"),
    _partial("clusterIP multicast", good(clusterIPs=["224.0.0.1"]), (), "224.0.0.1 is a multicast address"),
    _partial("clusterIP loopback", good(clusterIPs=["127.0.0.1"]), (), "127.0.0.1 is a loopback address"),
    _fine("clusterIPs disagree", good(clusterIPs=["10.96.0.77"]), _served(80, ip="10.96.0.77")),
    _fine("clusterIPs two of a family", good(clusterIPs=["10.96.0.10", "10.96.0.77"])),
    _fine("no ports", good(ports=[]), ()),
    _fine("ports null", good(ports=None), ()),
    _refused("port 70000", _port(port=70000), "port 70000 is not in 1 to 65535"),
    _refused("port 0", _port(port=0), "port 0 is not in 1 to 65535"),
    _refused("port negative", _port(port=-1), "port -1 is not in 1 to 65535"),
    _refused("port text", _port(port="80"), "spec.ports[0].port must be a number, and is text"),
    _refused("port truth", _port(port=True), "spec.ports[0].port must be a number, and is true or false"),
    _refused("port null", _port(port=None), "spec.ports[0].port must be a number, and is empty"),
    _refused("port fraction", _port(port=80.5), "spec.ports[0].port must be a whole number"),
    _refused("port immense", _raw(_port(port="@"), "1e400"), "spec.ports[0].port"),
    _refused("port of 400 digits", _raw(_port(port="@"), "9" * 400), "is not in 1 to 65535"),
    _refused("port of 5,000 digits", _raw(_port(port="@"), "9" * 5000), "out of range", onlyServer=True),
    _fine("500 ports", good(ports=[{"name": f"p{n}", "port": n} for n in range(1, 501)]), _served(*range(1, 501))),
    _partial("port name twice", good(ports=_TWO_NAMES), _served(80, 82), "81/TCP: the name 'a' is that of an earlier"),
    _partial("ports without name", good(ports=_TWO_UNNAMED), GOOD, "port 81/TCP: it has no name, like an earlier one"),
    _partial("port number twice", good(ports=_TWO_NUMBERS), _served(80, 82), "port b: 80/TCP repeats an earlier one"),
    _refused("protocol unknown", _port(protocol="ICMP"), "protocol 'ICMP' is none of TCP, UDP, SCTP"),
    _refused("protocol lower-case", _port(protocol="tcp"), "protocol 'tcp' is none of TCP, UDP, SCTP"),
    _fine("protocol null", _port(protocol=None)),
    _refused("port name number", _port(name=5), " must be text, and is "),
    _fine("port name hostile", _port(name='"; flush ruleset\n\x1b[31m')),
    _fine("name of 253", _meta(name="a" * 253), key=f"shop/{'a' * 253}"),
    *(_refused(f"name: {what}", _meta(name=name), _NO_NAME, f"shop/{name}") for what, name in _NAMES),
    _refused("namespace hostile", _meta(namespace="../kube"), _NO_NAME, "../kube/odd"),
    _refused("name number", _meta(name=5), " must be text, and is ", ""),
    _refused("nodePort 99999", _port(nodePort=99999), "nodePort 99999 is not in 1 to 65535"),
    _refused("nodePort negative", _port(nodePort=-1), "nodePort -1 is not in 1 to 65535"),
    _fine("nodePort 0", _port(nodePort=0)),
    _fine("nodePort", _port(nodePort=30081), _served(80, "node:30081/TCP")),
    _partial("nodePort of our own", _port(nodePort=10256), GOOD, "nodePort 10256 is where kproxy itself answers"),
    _partial("nodePort clash", _port(nodePort=TAKEN), GOOD, f"node:{TAKEN}/TCP is served by shop/left"),
    _partial("externalIP loopback", good(externalIPs=["127.0.0.1"]), GOOD, "127.0.0.1 is a loopback address"),
    _partial("externalIP garbage", good(externalIPs=["x", "198.51.100.7"]), _served(80, "198.51.100.7:80/TCP"), "'x'"),
    _partial(
        "externalIP of the API server", good(externalIPs=[API_SERVER[0]], ports=[{"port": API_SERVER[1]}]),
        _served(API_SERVER[1]), "192.0.2.1:6443 is where the API server is reached",
    ),
    _partial("10,000 externalIPs", good(externalIPs=[f"bad{n}" for n in range(10_000)]), GOOD, "and 9980 more"),
    _fine(
        "1,000 good externalIPs", good(externalIPs=[f"198.18.{n // 250}.{n % 250}" for n in range(1000)]),
        _served(80, *(f"198.18.{n // 250}.{n % 250}:80/TCP" for n in range(1000))),
    ),
    _refused("externalIPs text", good(externalIPs="198.51.100.7"), " must be a list, and is "),
    _fine("range with blanks", _balanced(" 10.0.0.0/8 "), _served(80, "203.0.113.9:80/TCP")),
    _fine("range with host bits", _balanced("10.1.2.3/8"), _served(80, "203.0.113.9:80/TCP")),
    _fine("range of all", _balanced("0.0.0.0/0"), _served(80, "203.0.113.9:80/TCP")),
    _fine("range of the other family", _balanced("fd00::/8"), _served(80, "203.0.113.9:80/TCP")),
    _partial("range garbage", _balanced("10/8"), _served(80, "203.0.113.9:80/TCP"), "it lets nobody in"),
    _fine("ipMode Proxy", _balanced(ipMode="Proxy")),
    _fine("ipMode unknown", _balanced(ipMode="Tunnel")),
    _partial("ingress garbage", _balanced(ip="lb.example"), GOOD, "status.loadBalancer.ingress: 'lb.example' is not"),
    _partial("affinity 0", _affinity(0), GOOD, "affinity timeoutSeconds 0 is not in 1 to 86400"),
    _partial("affinity negative", _affinity(-1), GOOD, "affinity timeoutSeconds -1 is not"),
    _partial("affinity 86401", _affinity(86401), GOOD, "affinity timeoutSeconds 86401 is not"),
    _fine("affinity null", _affinity(None)),
    _fine("affinity without configuration", good(sessionAffinity="ClientIP", sessionAffinityConfig=None)),
    _partial("affinity unknown", _affinity(5, "Cookie"), GOOD, "sessionAffinity 'Cookie' is none of None, ClientIP"),
    _refused("affinity text", _affinity("5"), " must be a number, and is "),
    _partial(
        "externalTrafficPolicy unknown", good(externalTrafficPolicy="local"), GOOD,
        "externalTrafficPolicy 'local' is none of Cluster, Local; Cluster is used",
    ),
    _partial(
        "internalTrafficPolicy unknown", good(internalTrafficPolicy="LOCAL"), GOOD,
        "internalTrafficPolicy 'LOCAL' is none of Cluster, Local; Cluster is used",
    ),
    _fine("policies empty", good(externalTrafficPolicy="", internalTrafficPolicy=None)),
    _refused("type unknown", good(type="Magic"), "type 'Magic' is none of ClusterIP, NodePort"),
    _fine("type empty", good(type="")),
    _fine("type ExternalName", good(type="ExternalName", externalName="example.com"), ()),
    _fine("being deleted", _meta(deletionTimestamp="2026-05-05T00:00:00Z")),
    _refused("no metadata", {k: v for k, v in good().items() if k != "metadata"}, "metadata", ""),
    _refused("metadata null", good() | {"metadata": None}, "metadata", ""),
    _refused("no name", _meta("name", "uid"), "it has no metadata.name", ""),
    _refused("no name, known uid", _meta("name"), "it has no metadata.name", "", onlyServer=True),
    _refused("no namespace", _meta("namespace"), "it has no metadata.namespace", "odd", onlyServer=True),
    _refused("labels wrong", _meta(labels=5), " must be a mapping, and is "),
    _fine("no uid", _meta("uid")),
    _fine("creationTimestamp garbage", _meta(creationTimestamp="yesterday")),
    _refused("status text", good() | {"status": "ok"}, " must be a mapping, and is "),
    _fine("status null", good() | {"status": None}),
    _fine("unknown fields", good(brandNew={"a": [1, {"b": None}]}) | {"more": 1e300}),
)

_MEMBER = {"addresses": ["10.1.0.10"], "conditions": {"ready": True}}


def _member(**fields: Any) -> dict[str, Any]:
    return goodSlice(endpoints=[_MEMBER | fields])


def _slicePort(**fields: Any) -> dict[str, Any]:
    return goodSlice(ports=[{"name": "http", "port": 8080, "protocol": "TCP"} | fields])


def _slice(name: str, it: Any, served: tuple[str, ...] = GOOD_ENDS, reason: str = "", **more: Any) -> Bad:
    text = it if isinstance(it, str) else json.dumps(it)
    return Bad(name, text, "partial" if reason else "fine", served, reason, "shop/odd-1", **more)


def _badSlice(name: str, it: Any, reason: str, key: str = "shop/odd-1", **more: Any) -> Bad:
    return _refused(name, it, reason, key, **more)


def _sliceMeta(**fields: Any) -> dict[str, Any]:
    it = goodSlice()
    return it | {"metadata": it["metadata"] | fields}


_EVERY = [f"10.{n // 62500 + 10}.{n // 250 % 250}.{n % 250 + 1}" for n in range(100_000)]

SLICES: tuple[Bad, ...] = (
    _slice("no label", _sliceMeta(labels=None), ()),
    _slice("label empty", _sliceMeta(labels={"kubernetes.io/service-name": ""}), ()),
    _slice("label of nobody", _sliceMeta(labels={"kubernetes.io/service-name": "nobody"}), ()),
    _badSlice("labels wrong", _sliceMeta(labels=["odd"]), " must be a mapping, and is "),
    _slice("headless", _sliceMeta(labels={wire.SERVICE_NAME_LABEL: "odd", wire.HEADLESS_LABEL: ""}), ()),
    _slice("FQDN", goodSlice(addressType="FQDN", endpoints=[_MEMBER | {"addresses": ["a.example"]}]), ()),
    _slice(
        "addressType unknown", goodSlice(addressType="ipv4"), (),
        "addressType 'ipv4' is none of IPv4, IPv6, FQDN; the slice is left out",
    ),
    _slice("addressType null", goodSlice(addressType=None), (), "addressType is missing; it must be one of IPv4"),
    _slice("addressType of the other family", goodSlice(addressType="IPv6"), ()),
    _slice("no addresses", _member(addresses=[]), ()),
    _slice("addresses null", _member(addresses=None), ()),
    _slice("three addresses", _member(addresses=["10.1.0.10", "10.1.0.11", "10.1.0.12"])),
    _slice("address leading zeros", _member(addresses=["010.001.000.010"])),
    _slice("address garbage", _member(addresses=["ten"]), (), "endpoint: 'ten' is not an IP address"),
    _slice("address loopback", _member(addresses=["127.0.0.1"]), (), "endpoint 127.0.0.1 is a loopback address"),
    _slice("address IPv4-mapped", _member(addresses=["::ffff:10.1.0.10"]), (), "is an IPv4-mapped address"),
    _slice("address IPv6", _member(addresses=["fd00::1"]), (), "endpoint fd00::1 is not an IPv4 address"),
    _slice(
        "one address garbage", goodSlice(endpoints=[_MEMBER | {"addresses": ["ten"]}, _MEMBER]), GOOD_ENDS,
        "endpoint: 'ten'",
    ),
    _badSlice("address number", _member(addresses=[10]), " must be text, and is "),
    _badSlice("addresses text", _member(addresses="10.1.0.10"), " must be a list, and is "),
    _slice("no endpoints", goodSlice(endpoints=[]), ()),
    _slice("endpoints null", goodSlice(endpoints=None), ()),
    _badSlice("endpoints text", goodSlice(endpoints="all"), " must be a list, and is "),
    _slice("no ports", goodSlice(ports=[]), ()),
    _slice("ports null", goodSlice(ports=None), ()),
    _slice("port name null", _slicePort(name=None), (), "a port without name is ignored", onlyServer=True),
    _slice("port number null", _slicePort(port=None), (), "port 'http' has no usable number (None)"),
    _slice("port number 0", _slicePort(port=0), (), "port 'http' has no usable number (0)"),
    _slice("port number 70000", _slicePort(port=70000), (), "port 'http' has no usable number (70000)"),
    _slice("port protocol null", _slicePort(protocol=None)),
    _slice("port protocol other", _slicePort(protocol="UDP"), ()),
    _badSlice("port number text", _slicePort(port="8080"), " must be a number, and is "),
    _slice("conditions null", _member(conditions=None)),
    _slice("conditions all null", _member(conditions={"ready": None, "serving": None, "terminating": None})),
    _badSlice("condition text", _member(conditions={"ready": "yes"}), " must be true or false, and is "),
    _slice("nodeName empty", _member(nodeName="")),
    _slice("hints to unknown zones", _member(hints={"forZones": [{"name": "atlantis"}]})),
    _slice("hints null", _member(hints={"forZones": None, "forNodes": None})),
    _slice("hints without name", _member(hints={"forZones": [{}], "forNodes": [{}]})),
    _badSlice("name hostile", _sliceMeta(name="a\nb"), _NO_NAME, "shop/a\nb"),
    _badSlice("no metadata", {k: v for k, v in goodSlice().items() if k != "metadata"}, "metadata", ""),
    _slice("no uid", _sliceMeta(uid=None)),
    _slice(
        "100,000 endpoints", goodSlice(endpoints=[{"addresses": [it]} for it in _EVERY]),
        tuple(f"{it}:8080" for it in _EVERY), heavy=True,
    ),
)  # fmt: skip


class Spoilt(Struct, frozen=True):
    """
    What may happen to the bytes of an object on their way.

    :ivar spoil: its JSON text → what arrives.
    :ivar fate: ``object``: it costs only the object; ``text``: all that is read with it (the watch is begun anew, the
        list is not believed, the file keeps its last good content); ``fine``: nothing.
    """

    name: str
    spoil: Callable[[bytes], bytes]
    fate: Literal["object", "text", "fine"]


def _replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda text: text.replace(old, new, 1)


def _deep(text: bytes) -> bytes:
    return _replaced(b'"spec"', b'"x": ' + b"[" * 1000 + b"]" * 1000 + b', "spec"')(text)


BYTES: tuple[Spoilt, ...] = (
    Spoilt("name cut within a character", _replaced(b'"odd"', b'"o\xc3"'), "object"),
    Spoilt("name with a NUL", _replaced(b'"odd"', b'"o\0d"'), "text"),
    Spoilt("name with half a pair", _replaced(b'"odd"', b'"o\\ud800d"'), "text"),
    Spoilt("not a number", _replaced(b'"port": 80', b'"port": NaN'), "text"),
    Spoilt("nested 1,000 deep", _deep, "fine"),
    Spoilt("nested 1,000 deep, and bad", lambda text: _deep(text).replace(b'"port": 80', b'"port": "x"'), "object"),
    Spoilt("nested 100,000 deep", _replaced(b'"spec"', b'"x": ' + b"[" * 100_000 + b', "spec"'), "text"),
    Spoilt("cut short", lambda text: text[:-3], "text"),
    Spoilt("byte order mark within", _replaced(b'"spec"', b'\xef\xbb\xbf"spec"'), "text"),
    Spoilt("HTML instead", lambda text: b"<html><title>Log in</title></html>", "text"),
    Spoilt("key twice", _replaced(b'"port": 80', b'"port": 81, "port": 80'), "fine"),
    Spoilt("key twice, the last one bad", _replaced(b'"port": 80', b'"port": 80, "port": "x"'), "object"),
    Spoilt("blanks and line ends", lambda text: b"\r " + text + b" \r\t", "fine"),
)
