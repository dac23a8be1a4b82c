"""
Credentials from a program: the exec plugins of kubeconfig, ``client.authentication.k8s.io/v1`` and ``v1beta1``
(``k8s.io/client-go/plugin/pkg/client/auth/exec``). The program gets an ``ExecCredential`` in its environment and
prints one.
"""

from __future__ import annotations

import os
import re
import shutil
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from ..core.values import hostPort
from ..interfaces import NotAvailable
from ..redaction import MASK, hide
from .certificates import keyPair, moment
from .credentials import ApiAccess, Exec, Identity, Proxy, asToken, timeOfDay
from .errors import NoCredentials, short
from .execrun import Run

#: Bytes that it can be told: Linux takes 128 KiB for one variable.
INFO_LIMIT = 120 * 1024
#: Lines of standard error that get into the log.
STDERR_LINES = 20
#: Seconds between two such reports, and between two lines about a plugin that goes on failing.
LOG_EVERY = 60.0
#: Credentials are renewed so long before their end, or a tenth of their life where that is shorter.
LEEWAY = 10.0
#: Seconds after a failed run until another one is tried while the credentials are still good.
RETRY_AGE = 5.0
#: Told to this process alone by systemd.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_SOUNDS_SECRET = re.compile(r"(?i)password|passwd|secret|token|credential|api_?key|private_?key")
_WORD = re.compile(r"[\w.~+/=-]{8,}")


class _Status(Struct, rename="camel"):
    token: str | None = None
    clientCertificateData: str | None = None
    clientKeyData: str | None = None
    expirationTimestamp: Annotated[datetime, Meta(tz=True)] | None = None


class _Credential(Struct, rename="camel"):
    apiVersion: str = ""
    kind: str = ""
    status: _Status | None = None


class ExecPlugin:
    """
    Who we are by the word of a program, which runs when somebody asks and what it said last has ended or was refused.
    One run at a time; whoever asks meanwhile waits for it. A run that fails leaves the last credentials in use for as
    long as they are good.

    :param spec: what to run.
    :param environ: what it inherits.
    :param wall: the time of day, of which expiration timestamps speak. It is asked when a timestamp is read and at no
        other moment: from then on the monotonic clock counts, so that setting the clock makes nothing end early or
        never; should the server see it differently, its 401 leads to another run.
    :ivar changed: called when the client certificate has become another one.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        access: ApiAccess,
        spec: Exec,
        environ: Mapping[str, str],
        wall: Callable[[], float] = timeOfDay,
    ) -> None:
        self._reactor = reactor
        self._access = access
        self._spec = spec
        self._environ = environ
        self._wall = wall
        self._name = f"exec plugin {spec.command}"
        self._identity: Identity | None = None
        self._refused = False
        self._renewAt: float | None = None
        self._endsAt: float | None = None
        self._until = ""
        self._askers: list[Deferred[Identity]] = []
        self._run: Run | None = None
        self._closing: list[Deferred[None]] = []
        self._runs = 0
        self._fault = ""
        self._failedAt: float | None = None
        self._loggedAt: dict[str, float] = {}
        self.changed: Callable[[], None] = lambda: None
        # Twisted quotes the arguments where a program cannot be started.
        flags = (it.partition("=")[::2] for it in spec.args)
        for name, value in (*spec.env, *flags, *pairwise(spec.args)):
            if _SOUNDS_SECRET.search(name) and not value.startswith("-"):
                hide(value)

    # --- what others ask

    def current(self) -> Deferred[Identity]:
        """See :meth:`~twisted_kproxy.sources.authentication.Credentials.current`."""
        now = self._reactor.seconds()
        identity = self._identity
        if identity is not None and self._good(now):
            due = self._renewAt is not None and now >= self._renewAt
            if due and (self._failedAt is None or now - self._failedAt >= RETRY_AGE):
                self._start()  # nobody has to wait for it
            return succeed(identity)
        d: Deferred[Identity] = Deferred(self._leave)
        self._askers.append(d)
        self._start()
        return d

    def refused(self, identity: Identity) -> None:
        """The server did not take that. Where it is still what is in use, the next one who asks has it renewed."""
        if identity is self._identity:
            self._refused = True

    def pairRefused(self) -> None:
        """The same for its client certificate alone."""
        if self.pair() is not None:
            self._refused = True

    def pair(self) -> tuple[bytes, bytes] | None:
        """The client certificate and key that it gave last."""
        it = self._identity
        return (it.certificate, it.key) if it is not None and it.certificate else None

    def status(self) -> Mapping[str, Any]:
        """JSON-able facts for operators."""
        return {
            "plugin": self._spec.command, "runs": self._runs, "running": self._run is not None,
            "validUntil": self._until, "lastError": self._fault,
        }

    def close(self) -> Deferred[None]:
        """End a run; fires once the program is gone."""
        if self._run is None:
            return succeed(None)
        d: Deferred[None] = Deferred()
        self._closing.append(d)
        self._run.cancel()
        return d

    # --- running

    def _good(self, now: float) -> bool:
        return not self._refused and (self._endsAt is None or now < self._endsAt)

    def _leave(self, d: Deferred[Identity]) -> None:
        self._askers.remove(d)
        if not self._askers and self._run is not None:
            self._run.cancel()

    def _start(self) -> None:
        if self._run is not None:
            return
        self._runs += 1
        run = Run(self._reactor, self._ended)
        try:
            path = findCommand(self._spec, self._environ)
            env = self._environment()
            self._run = run
            run.start(path, self._spec.args, env)
        except (NotAvailable, OSError, ValueError, TypeError) as error:
            run.stop()
            self._run = None
            what = str(error) if isinstance(error, NotAvailable) else f"{self._name} cannot be started: {error}"
            self._failed(what)

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in self._environ.items() if name not in _NOT_INHERITED}
        env.update(self._spec.env)
        info = env["KUBERNETES_EXEC_INFO"] = execInfo(self._access, self._spec)
        if len(info) > INFO_LIMIT:
            raise NotAvailable(f"{self._name}: what it is to be told of the cluster is longer than {INFO_LIMIT} bytes; "
                               "give a certificate authority of its own, or set provideClusterInfo to false")
        return env

    def _ended(self, out: bytes, err: bytes, fault: str) -> None:
        run, self._run = self._run, None
        closing, self._closing = self._closing, []
        if run is not None and run.cancelled:
            if self._askers:
                self._start()  # they came while it was being ended
        else:
            self._finished(out, err, fault)
        for d in closing:
            d.callback(None)

    def _finished(self, out: bytes, err: bytes, fault: str) -> None:
        try:
            if fault:
                raise NotAvailable(fault)
            said = parseCredential(out, self._spec.apiVersion)
        except NotAvailable as error:
            self._report(out, err)
            self._failed(f"{self._name}: {error}")
        else:
            self._report(out, err)
            self._take(said)

    def _take(self, said: _Status) -> None:
        before = self._identity
        identity = Identity(
            said.token or "", (said.clientCertificateData or "").encode(), (said.clientKeyData or "").encode()
        )
        now = self._reactor.seconds()
        self._endsAt = self._renewAt = None
        self._until = ""
        if said.expirationTimestamp is not None:
            left = max(0.0, said.expirationTimestamp.timestamp() - self._wall())
            self._endsAt = now + left
            self._renewAt = self._endsAt - min(LEEWAY, left / 10)
            self._until = moment(said.expirationTimestamp)
        self._identity, self._refused, self._fault, self._failedAt = identity, False, "", None
        self.log.info(
            "{name} gave {what}, valid {until}",
            name=self._name,
            what=" and ".join(it for it, there in (("a token", said.token), ("a certificate", identity.key)) if there),
            until=f"until {self._until}" if self._until else "until it is refused",
        )
        if before is not None and before.certificate and before.certificate != identity.certificate:
            self.changed()
        askers, self._askers = self._askers, []
        for d in askers:
            d.callback(identity)

    def _failed(self, fault: str) -> None:
        now = self._reactor.seconds()
        self._fault, self._failedAt = fault, now
        askers, self._askers = self._askers, []
        if self._due("failed", now):
            kept = self._identity is not None and self._good(now)
            what = "The last credentials stay in use" if kept else "There are no credentials to be had"
            self.log.warn("{what}: {error}", what=what, error=fault)
        for d in askers:
            d.errback(NoCredentials(fault))

    def _report(self, out: bytes, err: bytes) -> None:
        """What the program said on standard error, for the log: without anything that stands in its output, too."""
        if not err.strip() or not self._due("stderr", self._reactor.seconds()):
            return
        text = err.decode("utf-8", "replace")
        for word in sorted(set(_WORD.findall(out.decode("utf-8", "replace"))), key=len, reverse=True):
            text = text.replace(word, MASK)
        lines = [short(line.encode()) for line in text.splitlines() if line.strip()]
        for line in lines[:STDERR_LINES]:
            self.log.warn("{name} says: {line}", name=self._name, line=line)
        if len(lines) > STDERR_LINES:
            self.log.warn("{name} says {more} lines more", name=self._name, more=len(lines) - STDERR_LINES)

    def _due(self, what: str, now: float) -> bool:
        last = self._loggedAt.get(what)
        if last is not None and now - last < LOG_EVERY:
            return False
        self._loggedAt[what] = now
        return True


def findCommand(spec: Exec, environ: Mapping[str, str]) -> str:
    """
    The program's path.

    :raise NotAvailable: where it cannot be found; with the hint on how to install it.
    """
    if "/" in spec.command:
        found = spec.command if os.path.isfile(spec.command) and os.access(spec.command, os.X_OK) else None
        where = "there is no such program, or it may not be run"
    else:
        found = shutil.which(spec.command, path=environ.get("PATH", os.defpath))
        where = "there is no such program in PATH"
    if found is None:
        hint = f". {' '.join(spec.installHint.split())}" if spec.installHint.strip() else ""
        raise NotAvailable(f"exec plugin {spec.command}: {where}{hint}")
    return os.path.abspath(found)


def execInfo(access: ApiAccess, spec: Exec) -> str:
    """
    What the program is told: an ``ExecCredential`` as JSON.

    :raise NotAvailable: where the file of the certificate authority cannot be read.
    """
    said: dict[str, Any] = {"interactive": False}
    if spec.provideClusterInfo:
        cluster: dict[str, Any] = {"server": access.server}
        if access.tlsServerName:
            cluster["tls-server-name"] = access.tlsServerName
        if access.insecure:
            cluster["insecure-skip-tls-verify"] = True
        if access.certificateAuthority is not None:
            cluster["certificate-authority-data"] = b64encode(access.certificateAuthority.read()).decode("ascii")
        if access.proxy is not None:
            cluster["proxy-url"] = _url(access.proxy)
        if access.disableCompression:
            cluster["disable-compression"] = True
        if bytes(spec.clusterConfig):
            cluster["config"] = spec.clusterConfig
        said["cluster"] = cluster
    return msgspec.json.encode(
        {"kind": "ExecCredential", "apiVersion": spec.apiVersion, "spec": said}
    ).decode()


def _url(proxy: Proxy) -> str:
    who = f"{quote(proxy.user, safe='')}:{quote(proxy.password, safe='')}@" if proxy.user or proxy.password else ""
    return f"{proxy.scheme}://{who}{hostPort(proxy.host, proxy.port)}"


def _shownVersion(version: str) -> str:
    return version if re.fullmatch(r"client\.authentication\.k8s\.io/v\w{1,16}", version) else "another apiVersion"


def parseCredential(out: bytes, apiVersion: str) -> _Status:
    """
    What a program has printed. Its secrets are registered by then.

    :raise NotAvailable: where that is not what was asked for; nothing of it is in the text.
    """
    try:
        said = msgspec.json.decode(out, type=_Credential)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "nothing" if not out.strip() else f"no ExecCredential as JSON ({short(str(error).encode())})"
        raise NotAvailable(f"it printed {what}")
    it = said.status or _Status()
    hide(it.token or "")
    hide(it.clientKeyData or "")
    if said.kind != "ExecCredential":
        raise NotAvailable("what it printed is not of kind ExecCredential")
    if said.apiVersion != apiVersion:
        raise NotAvailable(
            f"it is configured to use {apiVersion}, and printed {_shownVersion(said.apiVersion)}"
        )
    if said.status is None:
        raise NotAvailable("what it printed has no status")
    if bool(it.clientCertificateData) != bool(it.clientKeyData):
        raise NotAvailable("it gave only one of clientCertificateData and clientKeyData; it takes both")
    if not it.token and not it.clientKeyData:
        raise NotAvailable("it gave neither a token nor a client certificate with its key")
    if it.token:
        it.token = asToken(it.token.encode(), "its token")
        hide(it.token)
    if it.clientKeyData:
        keyPair(
            (it.clientCertificateData or "").encode(), it.clientKeyData.encode(),
            "its clientCertificateData", "its clientKeyData",
        )
    return it
