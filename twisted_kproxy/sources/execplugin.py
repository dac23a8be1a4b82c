"""
Credentials from a program: the exec plugins of kubeconfig, ``client.authentication.k8s.io/v1`` and ``v1beta1``
(``k8s.io/client-go/plugin/pkg/client/auth/exec``). The program gets an ``ExecCredential`` in its environment and
prints one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..interfaces import NotAvailable
from ..redaction import MASK, hide
from .certificates import keyPair, moment
from .credentials import ApiAccess, Exec, Identity, Proxy, asToken, netloc, timeOfDay
from .errors import short

#: Seconds that one run may take.
TIME_LIMIT = 30.0
#: Bytes that it may print.
OUTPUT_LIMIT = 1 << 20
#: Bytes of standard error that are kept for the log, and lines of it that get there.
STDERR_LIMIT = 8192
STDERR_LINES = 20
#: Seconds between two such reports, and between two lines about a plugin that goes on failing.
LOG_EVERY = 60.0
#: Credentials are renewed so long before their end, or a tenth of their life where that is shorter.
LEEWAY = 10.0
#: Seconds after a failed run until another one is tried while the credentials are still good.
RETRY_AGE = 5.0
#: Seconds that output may stay open once the program has ended: what it leaves behind in the background may hold it.
_LINGER = 1.0

# A session of its own, so that the program goes with everything that it has started when its time is up.
_LAUNCH = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.setsid()
try:
    os.execv(sys.argv[1], sys.argv[2:])
except OSError as error:
    sys.exit(f"it cannot be run: {error.strerror}")
"""
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


class _Run(ProcessProtocol):
    """
    One run of the program.

    :param ended: called once with its output, and why that does not count (``""`` where it does).
    """

    def __init__(self, reactor: Any, ended: Callable[[bytes, bytes, str], None]) -> None:
        self._reactor = reactor
        self._ended = ended
        self._out: list[bytes] = []
        self._err: list[bytes] = []
        self._size = self._errSize = 0
        self._fault = ""
        self.cancelled = False
        self._timer: IDelayedCall = reactor.callLater(TIME_LIMIT, self._late)

    def connectionMade(self) -> None:
        self.transport.closeStdin()  # type: ignore[union-attr]

    def outReceived(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > OUTPUT_LIMIT:
            self._out.clear()
            self.kill(f"it printed more than {OUTPUT_LIMIT} bytes")
        else:
            self._out.append(data)

    def errReceived(self, data: bytes) -> None:
        if self._errSize < STDERR_LIMIT:
            self._err.append(data[: STDERR_LIMIT - self._errSize])
        self._errSize += len(data)

    def _late(self) -> None:
        self.kill(f"it did not end within {TIME_LIMIT:g} s")

    def cancel(self) -> None:
        """End it, since nobody wants its output any more."""
        self.cancelled = True
        self.kill("it was not needed any more")

    def kill(self, why: str) -> None:
        """End it, and all that it has started."""
        self._fault = self._fault or why
        pid = getattr(self.transport, "pid", None)
        try:
            # Only where the session is its own already: a group of somebody else is nothing to kill.
            if isinstance(pid, int) and pid > 1 and os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass  # it has ended meanwhile
        try:
            self.transport.signalProcess("KILL")  # type: ignore[union-attr]
        except ProcessExitedAlready:
            pass

    def processExited(self, reason: Failure) -> None:
        if self._timer.active():
            self._timer.cancel()
        self._timer = self._reactor.callLater(_LINGER, self._hangUp)

    def _hangUp(self) -> None:
        self.transport.loseConnection()  # type: ignore[union-attr]

    def processEnded(self, reason: Failure) -> None:
        if self._timer.active():
            self._timer.cancel()
        fault = self._fault
        if not fault and not reason.check(ProcessDone):  # type: ignore[no-untyped-call]
            status, number = getattr(reason.value, "status", None), getattr(reason.value, "signal", None)
            code = getattr(reason.value, "exitCode", None)
            fault = f"it was ended by signal {number}" if number else f"it ended with exit status {code or status}"
        self._ended(b"".join(self._out), b"".join(self._err), fault)


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
        self._run: _Run | None = None
        self._closing: list[Deferred[None]] = []
        self._runs = 0
        self._fault = ""
        self._failedAt: float | None = None
        self._loggedAt: dict[str, float] = {}
        self.changed: Callable[[], None] = lambda: None
        for name, value in spec.env:
            if len(value) >= 8 and _SOUNDS_SECRET.search(name):
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
        run = _Run(self._reactor, self._ended)
        try:
            path = findCommand(self._spec, self._environ)
            argv = [path, *self._spec.args]
            if sys.executable:
                argv = [sys.executable, "-I", "-S", "-c", _LAUNCH, path, *argv]
            self._run = run
            self._reactor.spawnProcess(run, argv[0], argv, env=self._environment())
        except (NotAvailable, OSError, ValueError, TypeError) as error:
            if run._timer.active():
                run._timer.cancel()
            self._run = None
            what = str(error) if isinstance(error, NotAvailable) else f"{self._name} cannot be started: {error}"
            self._failed(what)

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in self._environ.items() if name not in _NOT_INHERITED}
        env.update(self._spec.env)
        env["KUBERNETES_EXEC_INFO"] = execInfo(self._access, self._spec)
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
        if self._identity is not None and self._good(now) and self._due("failed", now):
            self.log.warn("The last credentials stay in use: {error}", error=fault)
        for d in askers:
            d.errback(NotAvailable(fault))

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
    return f"{proxy.scheme}://{who}{netloc(proxy.host, proxy.port)}"


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
