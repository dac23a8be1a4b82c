"""The ini file: every rule about values, and every error text."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ..core.wording import suggestion
from ..interfaces import KproxyError
from .ini import MAX_BYTES, Fault, Section, parseIni, shown
from .model import (
    PATH,
    POLICIES,
    SOURCE_KEYS,
    SOURCE_TYPES,
    WRITERS,
    ApiOptions,
    Config,
    FilesOptions,
    InvalidConfig,
    Key,
    PluginOptions,
    SourceOptions,
    schema,
)
from .values import DURATION, NODE_NAME, HostPort, masked

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")


def load(
    path: str,
    writers: Collection[str] = (),
    policies: Collection[str] = (),
    sourceTypes: Collection[str] = (),
    hostname: Callable[[], str] = socket.gethostname,
) -> Config:
    """
    Read and judge an ini file as a whole.

    :param writers: names of rule writers that may be chosen beside the built-in ones; likewise ``policies`` and
        ``sourceTypes``.
    :param hostname: says the name of this machine, where the file says none.
    :raise InvalidConfig: with every fault, not only the first.
    """
    path = os.path.abspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InvalidConfig([f"{path}: is larger than {MAX_BYTES} bytes: this is no configuration"])
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidConfig([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidConfig([f"{path}:{line}: is not UTF-8 text"]) from None
    reading = _Reading(path, text, (*WRITERS, *writers), (*POLICIES, *policies), (*SOURCE_TYPES, *sourceTypes))
    config = reading.config(hostname)
    if reading.faults:
        ordered = sorted(reading.faults, key=lambda fault: fault.line or len(data))
        raise InvalidConfig((f"{path}:{it.line}: " if it.line else f"{path}: ") + masked(it.text) for it in ordered)
    return config


class _Reading:
    """One pass over one file; gathers faults."""

    def __init__(
        self, path: str, text: str, writers: Iterable[str], policies: Iterable[str], sourceTypes: Iterable[str]
    ) -> None:
        self.path = path
        self.folder = os.path.dirname(path)
        self.sections, self.faults = parseIni(text)
        self.schema = schema(writers, policies)
        self.sourceTypes = tuple(dict.fromkeys(sourceTypes))

    def config(self, hostname: Callable[[], str]) -> Config:
        values: dict[str, Any] = {}
        sources: list[SourceOptions] = []
        for section in self.sections.values():
            if section.name in self.schema:
                values.update(self._values(section, self.schema[section.name]))
            elif section.name == "source" or section.name.startswith("source:"):
                options = self._source(section)
                if options is not None:
                    sources.append(options)
            else:
                known = (*self.schema, "source:NAME")
                near = suggestion(section.name, known)
                if section.name.partition(":")[0] in ("sources", "Source", "src"):
                    near = f"; did you mean 'source:{shown(section.name.partition(':')[2]) or 'NAME'}'?"
                names = ", ".join(f"[{name}]" for name in known)
                there = f"{near} There" if near else "; there"
                self._fault(section.line, f"[{shown(section.name)}] is not known{there} is {names}")
        if not any(name == "source" or name.startswith("source:") for name in self.sections):
            example = "[source:local] with type = files and path = services.d"
            self._fault(0, f"no source of services: add one, such as {example}")
        if "nodeName" not in values:
            values["nodeName"] = self._hostname(hostname)
        self._contradictions(values)
        return Config(
            path=self.path, sources=tuple(sources), **{name: it for name, it in values.items() if it is not _BAD}
        )

    def _fault(self, line: int, text: str) -> None:
        self.faults.append(Fault(line, text))

    def _at(self, section: Section, key: str, reason: str) -> None:
        entry = section.entries[key]
        said = f"[{section.name}] {key} = {shown(entry.value)}".rstrip()
        self._fault(entry.line, f"{said}: {reason}")

    def _line(self, section: str, key: str) -> int:
        found = self.sections.get(section)
        entry = found.entries.get(key) if found else None
        return entry.line if entry else 0

    def _values(self, section: Section, keys: tuple[Key, ...]) -> dict[str, Any]:
        """The values of a section by attribute; ``_BAD`` for those at fault."""
        known = {key.name: key for key in keys}
        values: dict[str, Any] = {}
        for name, entry in section.entries.items():
            key = known.get(name)
            if key is None:
                self._unknownKey(section, name, known)
            elif key.value is PATH:
                values[key.attribute] = self._absolute(entry.value)
            elif not entry.value and key.attribute in ("nodeName", "inCluster", "server"):
                continue
            else:
                try:
                    values[key.attribute] = key.value.read(entry.value)
                except ValueError as error:
                    values[key.attribute] = _BAD
                    self._at(section, name, str(error))
        return values

    def _unknownKey(self, section: Section, name: str, known: Iterable[str]) -> None:
        elsewhere = [
            other for other, keys in self.schema.items() if other != section.name and name in {key.name for key in keys}
        ]
        if elsewhere:
            reason = f"is not known here: it belongs under [{elsewhere[0]}]"
        else:
            reason = f"is not known{suggestion(name, known) or ';'} there is {', '.join(known)}"
        self._fault(section.entries[name].line, f"[{section.name}] {shown(name)}: {reason}")

    def _absolute(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.folder, path)) if path else ""

    def _hostname(self, hostname: Callable[[], str]) -> Any:
        name = hostname()
        try:
            return NODE_NAME.read(name)
        except ValueError as error:
            self._fault(0, f"[kproxy] node-name: the hostname {shown(name)!r} {error}; set node-name")
            return _BAD

    def _source(self, section: Section) -> SourceOptions | None:
        name = section.name.partition(":")[2]
        if not _SOURCE_NAME.match(name):
            reason = "name it [source:NAME]: letters, digits, '-', '_' and '.', at most 63"
            self._fault(section.line, f"[{shown(section.name)}]: {reason}")
            return None
        entry = section.entries.pop("type", None)
        types = ", ".join(self.sourceTypes)
        if entry is None:
            self._fault(section.line, f"[{section.name}] type is missing: say type = one of {types}")
            return None
        if entry.value not in self.sourceTypes:
            near = suggestion(entry.value, self.sourceTypes)
            text = f"[{section.name}] type = {shown(entry.value)}: must be one of {types}{near}"
            self._fault(entry.line, text)
            return None
        if entry.value not in SOURCE_KEYS:
            settings = {it.key: it.value for it in section.entries.values()}
            return PluginOptions(name, entry.value, settings, self.folder)
        before = len(self.faults)
        values = self._values(section, SOURCE_KEYS[entry.value])
        if entry.value == "files":
            if not values.get("path"):
                self._fault(section.line, f"[{section.name}] path is missing: say path = a folder or file of manifests")
        else:
            self._contradictoryApi(section, values)
        if len(self.faults) > before:
            return None
        return FilesOptions(name, **values) if entry.value == "files" else ApiOptions(name, **values)

    def _contradictoryApi(self, section: Section, values: Mapping[str, Any]) -> None:
        def given(attribute: str) -> bool:
            return bool(values.get(attribute))

        def fault(key: str, reason: str) -> None:
            self._at(section, key, reason)

        ways = [key for key in SOURCE_KEYS["api"][:3] if given(key.attribute)]
        if not ways and not any(values.get(key.attribute) is _BAD for key in SOURCE_KEYS["api"][:3]):
            choice = "kubeconfig = FILE, in-cluster = yes, or server = https://…"
            self._fault(section.line, f"[{section.name}] does not say where the API server is: give {choice}")
        for other in ways[1:]:
            if (ways[0].attribute, other.attribute) != ("inCluster", "server"):  # the account of a pod, used elsewhere
                line = self._line(section.name, ways[0].name)
                fault(other.name, f"contradicts {ways[0].name} on line {line}: keep one")
        server = values.get("server")
        for key in SOURCE_KEYS["api"][3:]:
            if not given(key.attribute) or key.attribute in ("proxyUrl", "watchList"):
                continue
            isName = key.attribute == "tlsServerName"
            if ways and ways[0].attribute != "server" and not (isName and ways[0].attribute == "inCluster"):
                fault(key.name, f"goes with server, not with {ways[0].name}, which brings its own: remove it")
            elif isinstance(server, str) and server.startswith("http:"):
                fault(key.name, "needs an https server: over http it would be worthless or be read by others")
        if given("inCluster") and isinstance(server, str) and server.startswith("http:"):
            fault("server", "must be an https server beside in-cluster: the pod's token would be read by others")
        if given("clientCertificate") and not given("clientKey"):
            fault("client-certificate", "needs client-key, the file of its private key")
        if given("clientKey") and not given("clientCertificate"):
            fault("client-key", "needs client-certificate, the file of its certificate")

    def _contradictions(self, values: Mapping[str, Any]) -> None:
        given = Config(path=self.path)
        shortest = values.get("minSyncPeriod", given.minSyncPeriod)
        longest = values.get("syncPeriod", given.syncPeriod)
        if _BAD not in (shortest, longest) and longest < shortest:
            line = self._line("kproxy", "sync-period") or self._line("kproxy", "min-sync-period")
            text = f"sync-period = {DURATION.write(longest)}: is shorter than min-sync-period"
            self._fault(line, f"[kproxy] {text}, {DURATION.write(shortest)}: make it at least as long")
        self._contradictoryDetection(values, given)
        health = values.get("healthBind", given.healthBind)
        metrics = values.get("metricsBind", given.metricsBind)
        if isinstance(health, HostPort) and isinstance(metrics, HostPort) and _clash(health, metrics):
            line = self._line("metrics", "bind") or self._line("health", "bind")
            text = f"[metrics] bind = {metrics}: is the same port as [health] bind = {health}"
            self._fault(line, f"{text}: give one of them another")

    def _contradictoryDetection(self, values: Mapping[str, Any], given: Config) -> None:
        """Each way to tell pods from others has a key of its own, which the others have no use for."""
        way = values.get("detectLocal", given.detectLocal)
        keys = {"cluster-cidr": "clusterCIDR", "bridge": "podBridge", "interface-prefix": "podInterfacePrefix"}
        names = {key.attribute: key.name for key in self.schema["kproxy"]}
        for other, attribute in keys.items():
            if way is _BAD or values.get(attribute) is _BAD:
                continue
            name = names[attribute]
            if other == way and not values.get(attribute) and way != "cluster-cidr":
                line = self._line("kproxy", "detect-local")
                self._fault(line, f"[kproxy] detect-local = {way}: needs {name}")
            elif other != way and values.get(attribute):
                self._at(self.sections["kproxy"], name, f"goes with detect-local = {other}, not with {way}: remove it")


#: Stands for a value at fault, so that nothing more is said about it.
_BAD: Any = type("_Bad", (), {"__bool__": lambda self: False})()


def _clash(one: HostPort, other: HostPort) -> bool:
    if one.port != other.port or one.port == 0:
        return False
    hosts = [ipaddress.ip_address(it.host) for it in (one, other)]
    # A socket on :: takes IPv4 as well.
    if any(host.is_unspecified and host.version == 6 for host in hosts):
        return True
    return hosts[0] == hosts[1] or (hosts[0].version == hosts[1].version and any(it.is_unspecified for it in hosts))


def effective(config: Config) -> dict[str, dict[str, str]]:
    """What is in force, by section and key, as the ini file would say it; JSON-able, secrets masked."""
    said = {
        section: {key.name: key.value.write(getattr(config, key.attribute)) for key in keys}
        for section, keys in schema().items()
    }
    sources: dict[str, dict[str, str]] = {}
    for source in config.sources:
        entries = {"type": str(source.type)}
        if isinstance(source, PluginOptions):
            entries.update((key, _unsaid(key, value)) for key, value in source.settings.items())
        else:
            for key in SOURCE_KEYS[source.type]:
                value = getattr(source, key.attribute)
                if value:
                    entries[key.name] = key.value.write(value)
        sources[f"source:{source.name}"] = entries
    return {"kproxy": said.pop("kproxy"), **sources, **said}


def _unsaid(key: str, value: str) -> str:
    """The value of a plug-in's key, masked where the key sounds like a secret and not like the file of one."""
    isSecret = re.search(r"password|passwd|secret|token|credential|api-?key", key.lower())
    return "***" if isSecret and value and not re.search(r"-(file|path|dir)$", key.lower()) else masked(value)


def render(config: Config) -> str:
    """What is in force, as ini text that :func:`load` would read as the same, save for masked secrets."""
    parts = [
        "\n".join((f"[{section}]", *(f"{key} = {value}".rstrip() for key, value in entries.items())))
        for section, entries in effective(config).items()
    ]
    return "\n\n".join(parts) + "\n"


def checkFiles(
    config: Config,
    manifests: Callable[[str], Iterable[str]] | None = None,
    environ: Mapping[str, str] = os.environ,
    access: Callable[[str, ApiOptions, Mapping[str, str]], object] | None = None,
) -> list[str]:
    """
    What is wrong with the files that a configuration names, a line each; empty when nothing is.

    :param manifests: says what is wrong with the manifests in a folder or file.
    :param environ: of a daemon started now.
    :param access: finds out, from a source's name, its options and the environment, how to reach its API server, and
        raises :class:`~twisted_kproxy.interfaces.KproxyError` where that cannot be; asked only where every file can be
        read.
    """
    faults: list[str] = []
    for source in config.sources:
        section = f"[source:{source.name}]"
        if isinstance(source, FilesOptions):
            if not os.path.exists(source.path):
                faults.append(f"{section} path = {source.path}: does not exist; make it, or name another")
            elif manifests is not None:
                faults += manifests(source.path)
        elif isinstance(source, ApiOptions):
            before = len(faults)
            named = {key.name: getattr(source, key.attribute) for key in SOURCE_KEYS["api"] if key.value is PATH}
            faults += _fileFaults(section, named)
            if source.inCluster:
                inside = ("token", "ca.crt")
                faults += _fileFaults(f"{section} in-cluster", {it: f"{SERVICE_ACCOUNT}/{it}" for it in inside})
                if not source.server and not environ.get("KUBERNETES_SERVICE_HOST"):
                    faults.append(f"{section} in-cluster: KUBERNETES_SERVICE_HOST is not set; is this not a pod?")
            if access is not None and len(faults) == before:
                try:
                    access(source.name, source, environ)
                except KproxyError as error:
                    faults.append(f"{section} {masked(str(error))}")
    return faults


def fileWarnings(config: Config) -> list[str]:
    """What a daemon would do without, of the files that a configuration names, a line each. Touches nothing."""
    path = config.accessLog
    if not path:
        return []
    code = 0
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        code = errno.EISDIR
    elif not os.path.isdir(folder):
        code = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
    elif not (os.access(path, os.W_OK) if os.path.exists(path) else os.access(folder, os.W_OK | os.X_OK)):
        code = errno.EACCES
    reason = f"cannot be written: {os.strerror(code)}; its lines are lost until it can"
    return [f"[userspace] access-log = {path}: {reason}"] if code else []


def _fileFaults(section: str, named: Mapping[str, str]) -> list[str]:
    faults = []
    for key, path in named.items():
        if not path:
            continue
        try:
            with open(path, "rb") as file:
                start = file.read(1 << 20)
        except OSError as error:
            faults.append(f"{section} {key} = {path}: cannot be read: {error.strerror}")
            continue
        if not start.strip():
            faults.append(f"{section} {key} = {path}: is empty")
        elif key in ("ca-file", "client-certificate", "client-key", "ca.crt") and b"-----BEGIN " not in start:
            faults.append(f"{section} {key} = {path}: is no PEM file")
    return faults
