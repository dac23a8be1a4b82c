"""
Where log lines go and how they look: sentences for people, lines with a priority for systemd's journal, JSON lines for
machines. Whatever the form, registered secrets and credentials in headers or URLs never come out.

``twistd --logger=twisted_kproxy.logs.journal`` and ``--logger=twisted_kproxy.logs.json`` name the two factories.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from json import dumps
from math import isfinite
from typing import Any, Protocol, TextIO, cast

from twisted.internet.interfaces import IReactorTime
from twisted.logger import (
    FilteringLogObserver,
    ILogFilterPredicate,
    ILogObserver,
    LogEvent,
    LogLevel,
    PredicateResult,
    formatEvent,
    textFileLogObserver,
)
from twisted.python.failure import Failure
from zope.interface import implementer, provider

from .redaction import MASK, hide, redacted

__all__ = ["MASK", "LineObserver", "Once", "hide", "journal", "json", "redacted", "text", "useJournalFormat"]

#: syslog(3) priorities, as sd-daemon(3) reads them at the head of a line.
_PRIORITIES = {LogLevel.debug: 7, LogLevel.info: 6, LogLevel.warn: 4, LogLevel.error: 3, LogLevel.critical: 2}
#: What is said in another way, or by the machinery of Twisted's older logging.
_OWN = frozenset({"time", "level", "namespace", "message", "traceback"})
_LEGACY = frozenset({"isError", "system", "format", "why", "failure", "message", "time", "log_text"})


class _Writable(Protocol):
    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class _RedactingFile:
    """A text file that lets no secret through."""

    def __init__(self, file: _Writable) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write("\n".join(_visible(line, "\t") for line in redacted(text).split("\n")))

    def flush(self) -> None:
        self._file.flush()


def _sentence(event: LogEvent) -> str:
    return formatEvent(event) or ""


def _traceback(event: LogEvent) -> str:
    failure = event.get("log_failure")
    if not isinstance(failure, Failure):
        return ""
    try:
        return failure.getTraceback()
    except Exception as error:
        return f"(the traceback cannot be shown: {type(error).__name__})"


def _level(event: LogEvent) -> Any:
    return event.get("log_level") or LogLevel.info


def jsonLine(event: LogEvent) -> str:
    """
    An event as one line of JSON: ``time`` (RFC 3339, UTC), ``level``, ``namespace``, ``message`` (the sentence), the
    fields that are text, numbers, booleans or null, and ``traceback`` where there was a failure. A field whose name is
    one of these gets ``field_`` before it.
    """
    when = datetime.fromtimestamp(event.get("log_time") or 0, UTC)
    line: dict[str, Any] = {
        "time": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "level": _level(event).name,
        "namespace": str(event.get("log_namespace") or ""),
        "message": redacted(_sentence(event)),
    }
    legacy = "log_legacy" in event or "log_text" in event
    for name, value in event.items():
        if not isinstance(name, str) or name.startswith("log_") or (legacy and name in _LEGACY):
            continue
        if isinstance(value, str):
            value = redacted(value)
        elif isinstance(value, float) and not isfinite(value):
            value = str(value)  # JSON knows neither infinity nor NaN
        elif not isinstance(value, bool | int | float | None):
            continue
        line[f"field_{name}" if name in _OWN else name] = value
    traceback = _traceback(event)
    if traceback:
        line["traceback"] = redacted(traceback)
    return dumps(line) + "\n"


def journalLines(event: LogEvent) -> str:
    """
    An event as lines for the journal, each with ``<N>``, its syslog priority (sd-daemon(3)). Control characters are
    escaped, so that no name of an object can forge a line. The journal adds time and unit itself.
    """
    head = f"<{_PRIORITIES.get(_level(event), 6)}>"
    namespace = str(event.get("log_namespace") or "-")
    lines = [f"[{namespace}] {_visible(redacted(_sentence(event)))}"]
    lines += (_visible(line) for line in redacted(_traceback(event)).splitlines())
    return "".join(f"{head}{line}\n" for line in lines)


def _visible(text: str, kept: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


@implementer(ILogObserver)
class LineObserver:
    """
    Writes each event to a file as the given function puts it. Never raises: what cannot be written is lost.

    :param file: a text file; ``None``: what is standard output now. (:program:`twistd` replaces it later on.)
    """

    def __init__(self, line: Callable[[LogEvent], str], file: TextIO | None = None) -> None:
        self._line = line
        self._file = sys.stdout if file is None else file

    def __call__(self, event: LogEvent) -> None:
        try:
            line = self._line(event)
        except Exception as error:
            line = dumps({"level": "error", "message": f"an event cannot be shown: {type(error).__name__}"}) + "\n"
        try:
            # An encoding that cannot say a name must not cost the line.
            encoding = getattr(self._file, "encoding", None) or "utf-8"
            self._file.write(line.encode(encoding, "backslashreplace").decode(encoding))
            self._file.flush()
        except (OSError, ValueError):
            pass  # the reader has gone or the disk is full: there is nowhere to say so


_FORMS: dict[str, Callable[[LogEvent], str]] = {"text": journalLines, "json": jsonLine}
_chosen = {"journal": "text"}
_threshold = [LogLevel.info]


def useJournalFormat(name: str) -> None:
    """
    Say in which form :func:`journal` writes: ``text`` or ``json``. :program:`twistd` is told of the observer before
    the configuration is read, and makes it after.
    """
    _chosen["journal"] = name


def useLevel(name: str) -> None:
    """Say from which level on events are written: ``debug``, ``info``, ``warn``, ``error``. Holds for all observers."""
    _threshold[0] = LogLevel.lookupByName(name)


@provider(ILogFilterPredicate)
def _isLoud(event: LogEvent) -> Any:
    """
    Whether an event is written. What Twisted says of its own ports, factories and connections (``X starting on N``, for
    every socket) is for debugging; what twistd says of itself is not.
    """
    level = _level(event)
    namespace = str(event.get("log_namespace") or "")
    inside = namespace.startswith("twisted.") and not namespace.startswith("twisted.scripts.")
    if (inside or namespace == "log_legacy") and level is LogLevel.info:
        level = LogLevel.debug
    return PredicateResult.yes if level >= _threshold[0] else PredicateResult.no


def _loud(observer: ILogObserver) -> ILogObserver:
    return cast(ILogObserver, FilteringLogObserver(observer, [cast(ILogFilterPredicate, _isLoud)]))


def journal(file: TextIO | None = None) -> ILogObserver:
    """The observer for systemd: lines with priorities, or JSON lines where the configuration says so."""
    return _loud(LineObserver(_FORMS[_chosen["journal"]], file))


def json(file: TextIO | None = None) -> ILogObserver:
    """The observer for machines: a JSON object per line."""
    return _loud(LineObserver(jsonLine, file))


def text(file: TextIO | None = None) -> ILogObserver:
    """The observer for people: Twisted's own text, redacted."""
    out = _RedactingFile(sys.stdout if file is None else file)
    return _loud(cast(ILogObserver, textFileLogObserver(cast(TextIO, out))))


class Once:
    """
    Says whether a thing is due to be logged: the first time, and again when it has not been said for a while.

    :param seconds: how long a key stays silent once it was due.
    """

    _MOST = 4096

    def __init__(self, reactor: IReactorTime, seconds: float = 60.0) -> None:
        self._reactor = reactor
        self._seconds = seconds
        self._last: dict[Hashable, float] = {}
        self._silent: dict[Hashable, int] = {}

    def due(self, key: Hashable) -> bool:
        """Whether to log now. A ``False`` is counted, see :meth:`suppressed`."""
        now = self._reactor.seconds()
        last = self._last.get(key)
        if last is not None and now - last < self._seconds:
            self._silent[key] = self._silent.get(key, 0) + 1
            return False
        if len(self._last) >= self._MOST:
            self._forget(now)
        self._last[key] = now
        return True

    def suppressed(self, key: Hashable) -> int:
        """How often it was not due since it was last; asking sets it back to 0."""
        return self._silent.pop(key, 0)

    def _forget(self, now: float) -> None:
        stale = [key for key, last in self._last.items() if now - last >= self._seconds]
        for key in stale or list(self._last)[: self._MOST // 2]:
            del self._last[key]
            self._silent.pop(key, None)
