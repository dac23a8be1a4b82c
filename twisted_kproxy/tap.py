"""
``twistd kproxy``: the command line, and the way from it to a running service.

Anything but a run is over before :program:`twistd` starts anything: ``--check``, ``--plan``, ``--cleanup`` and
``--version`` leave while the options are read, as a faulty configuration does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, TypeAlias, cast

from twisted.application.service import IService, MultiService
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import ILogObserver
from twisted.python import usage
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile

from . import __version__, logs, plugin
from .config import ApiOptions, Config, InvalidConfig, checkFiles, fileWarnings, load, render
from .interfaces import IPolicyMaker, ISourceMaker, IWriterMaker, KproxyError
from .reactor import installIfFree

DEFAULT_CONFIG = "/etc/kproxy/kproxy.ini"
CAP_NET_ADMIN = 12
#: lines for standard output, and what is wrong, for standard error
_Result: TypeAlias = tuple[list[str], list[str]]


class Options(usage.Options):
    """The options after ``twistd kproxy``."""

    synopsis = "[options]"
    longdesc = "The node service proxy of Kubernetes. Everything else is said in the configuration file."
    optParameters = [
        ["config", "c", DEFAULT_CONFIG, "The configuration file."],
    ]
    optFlags = [
        ["check", None, "Judge the configuration and the files it names, show what is in force, and exit with 0 or 1."],
        ["plan", None, "Show what a run would do, and what differs in the kernel; change nothing; exit with 0 or 1."],
        ["cleanup", None, "Remove every rule of kproxy from this node's kernel, and exit with 0 or 1."],
    ]
    compData = usage.Completions(optActions={"config": usage.CompleteFiles("*.ini")})  # type: ignore[no-untyped-call]

    #: The configuration; ``None`` before the options are parsed.
    loaded: Config | None = None

    def opt_version(self) -> None:
        """
        Display the version of kproxy and exit.
        """
        _print(f"kproxy {__version__}")
        raise SystemExit(0)

    def postOptions(self) -> None:
        # Before anything imports a reactor: twistd --reactor has had its say by now.
        installIfFree()
        chosen = [f"--{it}" for it in ("check", "plan", "cleanup") if self[it]]
        if len(chosen) > 1:
            raise usage.UsageError(f"{' and '.join(chosen)} exclude each other")
        if self["cleanup"]:
            raise SystemExit(runCleanup())
        try:
            self.loaded = readConfig(self["config"])
        except InvalidConfig as error:
            # Not a UsageError: twistd would print every option before it, and the faults to standard output.
            _print("\n".join(error.faults), sys.stderr)
            raise SystemExit(1) from None
        if self["check"]:
            raise SystemExit(check(self.loaded))
        if self["plan"]:
            raise SystemExit(runPlan(self.loaded))


def readConfig(path: str) -> Config:
    """
    The configuration, judged with every plug-in that is installed.

    :raise InvalidConfig: with every fault.
    """
    return load(
        path,
        writers=plugin.names(IWriterMaker),
        policies=plugin.names(IPolicyMaker),
        sourceTypes=plugin.names(ISourceMaker),
    )


def check(config: Config) -> int:
    """Print what is in force, and on standard error what is wrong with the files that it names; the exit code."""
    from .sources.api import accessFaults, accessFor
    from .sources.files import faultsOf

    warnings = fileWarnings(config)

    def access(name: str, options: ApiOptions, environ: Mapping[str, str]) -> None:
        found, doubtful = accessFaults(accessFor(name, options, environ), environ)
        warnings.extend(f"[source:{name}] {it}" for it in doubtful)
        if found:
            raise KproxyError("; ".join(found))

    faults = checkFiles(config, faultsOf, access=access)
    # Only now: reading credentials has registered what must not be shown.
    _print(logs.redacted(render(config)).rstrip("\n"))
    for line in (*(f"warning: {it}" for it in warnings), *(faults or ["no faults"])):
        _print(logs.redacted(line), sys.stderr)
    return 1 if faults else 0


def useMonotonicClock(reactor: Any) -> None:
    """
    Let a reactor measure time by the monotonic clock.

    Twisted's reactors go by the time of day: when it is set forward every timer fires at once, and when it is set
    back they stand still for as long. To be called before anything is scheduled; what is already is moved over. Twice
    is harmless. Log events and the ``Date`` of HTTP answers have clocks of their own and stay right;
    only the access log of :mod:`twisted.web` would not, and kproxy has none.
    """
    if reactor.seconds is time.monotonic:
        return
    shift = time.monotonic() - reactor.seconds()
    reactor.seconds = time.monotonic
    for call in reactor.getDelayedCalls():
        call.time += shift
        call.seconds = time.monotonic


def runCleanup(
    reactor: Any = None, cleanup: Callable[[Any], Deferred[list[str]]] | None = None, mayWrite: bool | None = None
) -> int:
    """
    Run a reactor for as long as it takes to remove every rule of kproxy; print what was removed.

    :return: the exit code.
    """
    if not (_mayWriteRules() if mayWrite is None else mayWrite):
        _print("kproxy: cleanup needs root, or the capability CAP_NET_ADMIN: try again with sudo", sys.stderr)
        return 1
    if cleanup is None:
        from .assembly import cleanup as removeAll

        cleanup = removeAll
    remove = cleanup

    def work(reactor: Any) -> Deferred[_Result]:
        return remove(reactor).addCallback(lambda lines: (lines or ["There was nothing of kproxy to remove."], []))

    return _runUntilDone("cleanup", work, reactor)


def runPlan(
    config: Config,
    reactor: Any = None,
    plan: Callable[[Any, Config, bool], Deferred[_Result]] | None = None,
    mayRead: bool | None = None,
) -> int:
    """
    Run a reactor for as long as it takes to find out what a run would do; print that.

    :param mayRead: the kernel's rules can be read; they need the right to write them.
    :return: the exit code.
    """
    if plan is None:
        from .plan import plan as planned

        plan = planned
    ask, may = plan, _mayWriteRules() if mayRead is None else mayRead
    return _runUntilDone("plan", lambda reactor: ask(reactor, config, may), reactor)


def _runUntilDone(what: str, work: Callable[[Any], Deferred[_Result]], reactor: Any) -> int:
    """
    Run a reactor until that is done, and print what comes of it.

    :return: the exit code.
    """
    if reactor is None:
        from twisted.internet import reactor
    useMonotonicClock(reactor)
    result: list[int] = []

    def done(come: _Result) -> None:
        lines, faults = come
        _print(logs.redacted("\n".join(lines)))
        if faults:
            _print(logs.redacted("\n".join(faults)), sys.stderr)
        result.append(1 if faults else 0)

    def failed(failure: Failure) -> None:
        words = failure.getErrorMessage()
        if failure.check(KproxyError) is None:  # type: ignore[no-untyped-call]
            words = f"{failure.type.__name__}: {words}" if failure.type else words
        _print(f"kproxy: {what} failed: {logs.redacted(words)}", sys.stderr)
        result.append(1)

    def stop(_: object) -> None:
        if reactor.running:
            reactor.stop()

    def start() -> None:
        maybeDeferred(work, reactor).addCallbacks(done, failed).addBoth(stop)

    reactor.callWhenRunning(start)
    reactor.run()
    if not result:
        _print(f"kproxy: {what} was interrupted; run it again", sys.stderr)
    return result[0] if result else 1


def _mayWriteRules() -> bool:
    """Whether this process has CAP_NET_ADMIN (capabilities(7)), as root usually has."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)
    except (OSError, ValueError, IndexError):
        pass  # no /proc here
    return os.geteuid() == 0


class Root(MultiService):
    """
    The service that twistd runs. When it is given to the application, the application gets the log observer that the
    configuration wants; ``twistd --logger`` and ``--syslog`` still have the last word.
    """

    def __init__(self, observer: Callable[[], ILogObserver] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observer = observer

    def setServiceParent(self, parent: Any) -> None:
        if self._observer is not None and isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._observer())  # type: ignore[no-untyped-call]
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]


def makeService(options: Options) -> IService:
    """The whole daemon as a service that is not started yet; called by twistd."""
    from twisted.internet import reactor

    useMonotonicClock(reactor)
    config = options.loaded
    if config is None:
        config = readConfig(options["config"])
    logs.useJournalFormat(config.logFormat)
    logs.useLevel(config.logLevel)
    try:
        from .server import makeProxyServer

        server = makeProxyServer(reactor, config)
    except KproxyError as error:
        _print(f"kproxy: {logs.redacted(str(error))}", sys.stderr)
        raise SystemExit(1) from None
    root = Root(_observerFor(config, options.parent))
    server.setServiceParent(root)  # type: ignore[no-untyped-call]
    return cast(IService, root)


def _observerFor(config: Config, twistd: Any) -> Callable[[], ILogObserver] | None:
    """
    What makes the log observer; ``None`` where twistd was told of another.

    :param twistd: the options before ``kproxy``.
    """
    chosen: dict[str, Any] = dict(twistd or {})
    if chosen.get("logger") or chosen.get("syslog"):
        return None
    factory: Callable[[TextIO | None], ILogObserver] = logs.json if config.logFormat == "json" else logs.text

    def make() -> ILogObserver:
        path = chosen.get("logfile")
        if path == "-" or (not path and (chosen.get("nodaemon") or chosen.get("debug") or not chosen)):
            return factory(None)  # standard output, as it is by now
        # As twistd itself would do.
        file = LogFile.fromFullPath(path or "twistd.log")  # type: ignore[no-untyped-call]
        return factory(cast(TextIO, file))

    return make


def _print(text: str, file: TextIO | None = None) -> None:
    print(text, file=file or sys.stdout, flush=True)
