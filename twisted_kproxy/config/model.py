"""What a configuration holds, as frozen values, and which key of which section of the ini file fills it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from msgspec import Struct

from ..core.locality import DetectLocal, NodeSettings
from ..interfaces import KproxyError
from .values import (
    BIND,
    CIDRS,
    COUNT,
    DURATION,
    DURATIONS,
    HOST_NAME,
    INTERFACE,
    NETWORKS,
    NODE_NAME,
    NODE_PORT_ADDRESSES,
    PORT_RANGE,
    POSITIVE_DURATION,
    PROXY_NAME,
    PROXY_URL,
    SERVER,
    SWITCH,
    TIMEOUT,
    WORKERS,
    HostPort,
    Value,
    oneOf,
)

_NOT_BUILT = dict.fromkeys(("nftables", "iptables"), "is not built yet; use userspace")
WRITERS = ("auto", "nftables", "python-iptables", "iptables", "iptables-legacy", "iptables-nft", "none")
POLICIES = ("round-robin", "random", "least-connections")
ENGINES = ("auto", "native", "python", "protocol")
SOURCE_TYPES = ("api", "files")


class InvalidConfig(KproxyError):
    """
    The ini file says what cannot be.

    :ivar faults: one line each, in the order of the file.
    """

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class ApiOptions(Struct, frozen=True):
    """
    ``[source:NAME]`` with ``type = api``. Exactly one of kubeconfig, in-cluster and server is given; server may also
    stand beside in-cluster.
    """

    name: str
    kubeconfig: str = ""
    inCluster: bool = False
    server: str = ""
    tokenFile: str = ""
    caFile: str = ""
    clientCertificate: str = ""
    clientKey: str = ""
    tlsServerName: str = ""
    proxyUrl: str = ""
    watchList: str = "auto"
    type: Literal["api"] = "api"


class FilesOptions(Struct, frozen=True):
    """``[source:NAME]`` with ``type = files``."""

    name: str
    path: str
    pollSeconds: float = 5.0
    type: Literal["files"] = "files"


class PluginOptions(Struct, frozen=True):
    """
    ``[source:NAME]`` whose type somebody else offers.

    :ivar settings: every other key of the section as it stands there; the plug-in judges them.
    :ivar folder: where the ini file lies; relative paths are relative to it.
    """

    name: str
    type: str
    settings: Mapping[str, str] = {}
    folder: str = ""


SourceOptions: TypeAlias = ApiOptions | FilesOptions | PluginOptions


class Config(Struct, frozen=True):
    """The whole effective configuration. Durations are seconds, paths are absolute."""

    path: str
    mode: str = "userspace"
    nodeName: str = ""
    clusterCIDR: tuple[str, ...] = ()
    detectLocal: DetectLocal = "cluster-cidr"
    podBridge: str = ""
    podInterfacePrefix: str = ""
    masqueradeAll: bool = False
    nodePortAddresses: tuple[str, ...] = ("all",)
    frontendAllow: tuple[str, ...] = ()
    frontendDeny: tuple[str, ...] = ()
    minSyncPeriod: float = 1.0
    syncPeriod: float = 30.0
    proxyName: str = ""
    logFormat: str = "text"
    logLevel: str = "info"
    sources: tuple[SourceOptions, ...] = ()
    writer: str = "auto"
    connectTimeouts: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    udpIdleTimeout: float = 30.0
    portRange: tuple[int, int] | None = None
    drainTimeout: float = 300.0
    engine: str = "auto"
    nativeThread: bool = False
    workers: int = 1
    accessLog: str = ""
    policy: str = "round-robin"
    conntrackSysctls: str = "auto"
    conntrackMaxPerCore: int = 32768
    conntrackMin: int = 131072
    conntrackTcpEstablished: int = 86400
    conntrackTcpCloseWait: int = 3600
    conntrackUdp: int = 0
    conntrackUdpStream: int = 0
    conntrackTcpBeLiberal: bool = False
    healthBind: HostPort | None = HostPort("0.0.0.0", 10256)
    metricsBind: HostPort | None = HostPort("127.0.0.1", 10249)


def nodeSettings(config: Config) -> NodeSettings:
    """What a configuration says about its node."""
    return NodeSettings(
        detectLocal=config.detectLocal,
        clusterCIDRs=config.clusterCIDR,
        podInterface=config.podBridge if config.detectLocal == "bridge" else config.podInterfacePrefix,
        nodePortAddresses=config.nodePortAddresses,
        allowed=config.frontendAllow,
        denied=config.frontendDeny,
        listeners=tuple((it.host, it.port) for it in (config.healthBind, config.metricsBind) if it is not None),
    )


def conntrackSettings(config: Config) -> tuple[Any, ...]:
    """What a configuration says in section ``[conntrack]``, in the order of its keys."""
    return tuple(getattr(config, key.attribute) for key in schema()["conntrack"])


class Key(Struct, frozen=True):
    """One key of a section, the attribute that it fills, and what it may hold."""

    name: str
    attribute: str
    value: Value


PATH = Value(str)
SOURCE_KEYS: dict[str, tuple[Key, ...]] = {
    "api": (
        Key("kubeconfig", "kubeconfig", PATH),
        Key("in-cluster", "inCluster", SWITCH),
        Key("server", "server", SERVER),
        Key("token-file", "tokenFile", PATH),
        Key("ca-file", "caFile", PATH),
        Key("client-certificate", "clientCertificate", PATH),
        Key("client-key", "clientKey", PATH),
        Key("tls-server-name", "tlsServerName", HOST_NAME),
        Key("proxy-url", "proxyUrl", PROXY_URL),
        Key("watch-list", "watchList", oneOf(("auto", "off"))),
    ),
    "files": (Key("path", "path", PATH), Key("poll-interval", "pollSeconds", POSITIVE_DURATION)),
}


def schema(writers: Iterable[str] = (), policies: Iterable[str] = ()) -> dict[str, tuple[Key, ...]]:
    """Every section but those of sources, with its keys in order."""
    return {
        "kproxy": (
            Key("mode", "mode", oneOf(("userspace",), _NOT_BUILT)),
            Key("node-name", "nodeName", NODE_NAME),
            Key("cluster-cidr", "clusterCIDR", CIDRS),
            Key("detect-local", "detectLocal", oneOf(get_args(DetectLocal))),
            Key("pod-bridge", "podBridge", INTERFACE),
            Key("pod-interface-prefix", "podInterfacePrefix", INTERFACE),
            Key("masquerade-all", "masqueradeAll", SWITCH),
            Key("node-port-addresses", "nodePortAddresses", NODE_PORT_ADDRESSES),
            Key("frontend-allow", "frontendAllow", NETWORKS),
            Key("frontend-deny", "frontendDeny", NETWORKS),
            Key("min-sync-period", "minSyncPeriod", DURATION),
            Key("sync-period", "syncPeriod", POSITIVE_DURATION),
            Key("proxy-name", "proxyName", PROXY_NAME),
            Key("log-format", "logFormat", oneOf(("text", "json"))),
            Key("log-level", "logLevel", oneOf(("debug", "info", "warn", "error"))),
        ),
        "rules": (Key("writer", "writer", oneOf(writers)),),
        "userspace": (
            Key("connect-timeouts", "connectTimeouts", DURATIONS),
            Key("udp-idle-timeout", "udpIdleTimeout", POSITIVE_DURATION),
            Key("port-range", "portRange", PORT_RANGE),
            Key("drain-timeout", "drainTimeout", DURATION),
            Key("engine", "engine", oneOf(ENGINES)),
            Key("native-thread", "nativeThread", SWITCH),
            Key("workers", "workers", WORKERS),
            Key("access-log", "accessLog", PATH),
        ),
        "balance": (Key("policy", "policy", oneOf(policies)),),
        "conntrack": (
            Key("sysctls", "conntrackSysctls", oneOf(("auto", "on", "off"))),
            Key("max-per-core", "conntrackMaxPerCore", COUNT),
            Key("min", "conntrackMin", COUNT),
            Key("tcp-established-timeout", "conntrackTcpEstablished", TIMEOUT),
            Key("tcp-close-wait-timeout", "conntrackTcpCloseWait", TIMEOUT),
            Key("udp-timeout", "conntrackUdp", TIMEOUT),
            Key("udp-stream-timeout", "conntrackUdpStream", TIMEOUT),
            Key("tcp-be-liberal", "conntrackTcpBeLiberal", SWITCH),
        ),
        "health": (Key("bind", "healthBind", BIND),),
        "metrics": (Key("bind", "metricsBind", BIND),),
    }
