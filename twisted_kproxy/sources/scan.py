"""
One look at a folder (or file) of manifests: what it says now, and what that changes. Blocks on the disk, touches
nothing but what it is given, and so may run in a thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from msgspec import Struct

from ..core.values import Change, Kind, Rejected, Replaced, Word
from ..core.wording import counted
from .manifests import MAX_BYTES, Broken, Found, Manifest, parse

SUFFIXES = (".yaml", ".yml", ".json")
KINDS: tuple[Kind, ...] = ("Service", "EndpointSlice", "Endpoints", "Node", "ServiceCIDR")
#: More lines about one look than this are only counted.
MOST_NOTES = 20
#: The same of the faults that stand in files which can be read as a whole.
MOST_FAULTS = 20

Signature: TypeAlias = tuple[int, ...]
Identity: TypeAlias = tuple[Kind, str]


class FileState(Struct, frozen=True):
    """
    What is known of one file.

    :ivar signature: of the text that was read last; ``()`` where that could not be.
    :ivar manifest: its last good content.
    :ivar fault: why it cannot be read as it stands; empty when it can.
    :ivar line: where that is; 0 where that cannot be told.
    """

    signature: Signature
    manifest: Manifest = Manifest()
    fault: str = ""
    line: int = 0


class Said(Struct, frozen=True):
    """What was last said of one object: its last good version, and why what stands there now is none."""

    object: object | None
    reason: str = ""


class Double(Struct, frozen=True):
    """An object that stands in a second file: in which it counts, and where the second is."""

    first: str
    second: str
    line: int

    @property
    def reason(self) -> str:
        return f"is also in {shown(self.first)}, which counts: remove one"


class Scan(Struct, frozen=True):
    """
    The outcome of one look.

    :ivar files: by file name.
    :ivar wanted: every object, each from the first file in name order that holds it.
    :ivar doubled: those that stand in a second file.
    :ivar faults: place in a file → what is wrong there, of all that is not said of an object by its key.
    :ivar notes: whether it is a warning, and the line for the log.
    :ivar missing: the path does not exist.
    :ivar isFolder: the path is a folder; what it was before where it is missing.
    :ivar unsettled: some file changed while it was read; look again soon.
    :ivar error: why nothing could be seen; then all stays as it was.
    """

    files: Mapping[str, FileState]
    wanted: Mapping[Identity, Found]
    doubled: Mapping[Identity, Double] = {}
    faults: Mapping[str, str] = {}
    notes: tuple[tuple[bool, str], ...] = ()
    missing: bool = False
    isFolder: bool = True
    unsettled: bool = False
    error: str = ""


def isManifest(name: str) -> bool:
    """Whether a file of that name counts. Hidden files and editors' temporary and backup files do not."""
    return name.endswith(SUFFIXES) and name[0] not in ".#~"


def look(path: str, before: Scan | None = None, force: Collection[str] = ()) -> Scan:
    """
    Look at a path.

    :param before: the look before this one; files that have not changed since are not read again.
    :param force: names of files to read again although they look the same.
    """
    old = before.files if before else {}
    wasFolder = before.isFolder if before else True
    try:
        isFolder = stat.S_ISDIR(os.stat(path).st_mode)
        names = sorted(filter(isManifest, os.listdir(path))) if isFolder else [os.path.basename(path)]
    except FileNotFoundError:
        # A file that was removed takes its objects with it. A folder that has gone may be a volume that is not
        # mounted just now: contact is lost, and what was said stays true.
        return _kept(before if wasFolder else None, missing=True, isFolder=wasFolder)
    except OSError as error:
        return _kept(before, isFolder=wasFolder, error=f"{path}: cannot be read: {error.strerror}")
    folder = path if isFolder else os.path.dirname(path)
    reader = _Reader()
    files = {}
    for name in names:
        state = reader.read(os.path.join(folder, name), old.get(name), name in force)
        if state is not None:
            files[name] = state
    wanted, doubled = _merged(files)
    reader.notes += _doubledNotes(folder, doubled, before.doubled if before else {})
    if before:
        mended = _atFault(before.files, before.doubled) - _atFault(files, doubled)
        reader.notes += ((False, _mended(folder, name, old[name])) for name in sorted(mended & files.keys()))
    notes = _few(reader.notes, path)
    return Scan(files, wanted, doubled, _faults(files, doubled), notes, isFolder=isFolder, unsettled=reader.unsettled)


def _kept(before: Scan | None, **kw: Any) -> Scan:
    """All as it was, but for what is said of the path itself."""
    if before is None:
        return Scan({}, {}, **kw)
    return Scan(before.files, before.wanted, before.doubled, before.faults, **kw)


class _Reader:
    """Reads files one after the other, and gathers what is to be logged."""

    def __init__(self) -> None:
        self.notes: list[tuple[bool, str]] = []
        self.unsettled = False

    def read(self, path: str, old: FileState | None, force: bool) -> FileState | None:
        """The state of a file now; ``None`` where there is none."""
        manifest = old.manifest if old else Manifest()
        try:
            found = os.stat(path)
            signature = _signature(found)
            if old and old.signature == signature and not force:
                return old
            if stat.S_ISDIR(found.st_mode):
                return None
            if not stat.S_ISREG(found.st_mode):
                return self._faulty(path, old, FileState(signature, manifest, "is no regular file"))
            data, after = _bytes(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                return None
            reason = "is a link to nothing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
            return self._faulty(path, old, FileState((), manifest, f"cannot be read: {reason}"))
        if after != signature:
            self.unsettled = True
            return old or FileState(())
        try:
            now = parse(data, path.endswith(".json"))
        except Broken as error:
            return self._faulty(path, old, FileState(signature, manifest, error.reason, error.line))
        self._note(path, now, old)
        return FileState(signature, now)

    def _faulty(self, path: str, old: FileState | None, new: FileState) -> FileState:
        if old is None or old.fault != new.fault or (old.signature != new.signature and new.signature):
            place = f"{path}:{new.line}" if new.line else path
            count = len(new.manifest.found)
            kept = f"; its last good content of {counted(count, 'object')} stays" if count else ""
            self.notes.append((True, f"{place}: {new.fault}{kept}"))
        return new

    def _note(self, path: str, now: Manifest, old: FileState | None) -> None:
        known = set(old.manifest.faults) if old and not old.fault else set()
        self.notes += ((True, f"{path}:{line}: {reason}") for line, reason in now.faults if (line, reason) not in known)
        if now.skipped and (old is None or now.skipped != old.manifest.skipped):
            kinds = ", ".join(sorted(now.skipped))
            count = sum(now.skipped.values())
            are = "is" if count == 1 else "are"
            self.notes.append((False, f"{path}: {counted(count, 'object')} {are} not for us: {kinds}"))


def _signature(found: os.stat_result) -> Signature:
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _bytes(path: str) -> tuple[bytes, Signature]:
    """The bytes of a file, at most one more than is allowed, and its signature after they were read."""
    # Should it have become a pipe meanwhile, opening it must not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        data = file.read(MAX_BYTES + 1)
        return data, _signature(os.fstat(fd))


def _merged(files: Mapping[str, FileState]) -> tuple[dict[Identity, Found], dict[Identity, Double]]:
    """Every object from the first file in name order; and those that stand in a second file."""
    wanted: dict[Identity, Found] = {}
    owner: dict[Identity, str] = {}
    doubled: dict[Identity, Double] = {}
    for name in sorted(files):
        for found in files[name].manifest.found:
            identity = (found.kind, found.key)
            if identity in wanted:
                doubled.setdefault(identity, Double(owner[identity], name, found.line))
            else:
                wanted[identity] = found
                owner[identity] = name
    return wanted, doubled


def _doubledNotes(
    folder: str, doubled: Mapping[Identity, Double], known: Mapping[Identity, Double]
) -> Iterable[tuple[bool, str]]:
    for identity, it in doubled.items():
        old = known.get(identity)
        if old is None or (old.first, old.second) != (it.first, it.second):
            yield True, f"{os.path.join(folder, it.second)}: {' '.join(identity)} {it.reason}"


def _atFault(files: Mapping[str, FileState], doubled: Mapping[Identity, Double]) -> set[str]:
    """The names of the files that something is wrong with."""
    names = {name for name, state in files.items() if state.fault or state.manifest.faults}
    return names | {it.second for it in doubled.values()}


def _mended(folder: str, name: str, old: FileState) -> str:
    return f"{os.path.join(folder, name)}: {'can be read again' if old.fault else 'has no fault any more'}"


def _faults(files: Mapping[str, FileState], doubled: Mapping[Identity, Double]) -> dict[str, str]:
    """What is wrong in files that can be read as a whole, by name and line, the first of it by these."""
    found = [
        (name, line, reason)
        for name, state in files.items()
        if not state.fault  # else its lines are those of a text that stands there no more
        for line, reason in state.manifest.loose
    ]
    found += ((it.second, it.line, f"{' '.join(identity)} {it.reason}") for identity, it in doubled.items())
    found.sort(key=lambda it: it[:2])
    if len(found) > MOST_FAULTS:
        name, line, _ = found[MOST_FAULTS]
        found[MOST_FAULTS:] = [(name, line, f"{len(found) - MOST_FAULTS} more faults from here on are left out")]
    told: dict[str, str] = {}
    for name, line, reason in found:
        place = f"{shown(name)}:{line}"
        told[place] = f"{told[place]}; {reason}" if place in told else reason
    return told


def shown(name: str) -> str:
    """A file's name for people: what is no UTF-8 in it is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _few(notes: list[tuple[bool, str]], path: str) -> tuple[tuple[bool, str], ...]:
    if len(notes) > MOST_NOTES:
        isWarning = any(it for it, _ in notes[MOST_NOTES:])
        left = f"{path}: {len(notes) - MOST_NOTES} more such lines are left out"
        notes = [*notes[:MOST_NOTES], (isWarning, left)]
    return tuple(notes)


def firstWords(source: str, wanted: Mapping[Identity, Found]) -> tuple[list[Word], dict[Identity, Said]]:
    """A ``Replaced`` for each kind."""
    objects: dict[str, dict[str, object]] = {kind: {} for kind in KINDS}
    rejected: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    said = {}
    for (kind, key), found in wanted.items():
        if found.object is None:
            rejected[kind][key] = found.reason
        else:
            objects[kind][key] = found.object
        said[kind, key] = Said(found.object, found.reason)
    return [Replaced(source, kind, objects[kind], rejected[kind]) for kind in KINDS], said


def nextWords(
    source: str, wanted: Mapping[Identity, Found], said: Mapping[Identity, Said]
) -> tuple[list[Word], dict[Identity, Said]]:
    """The fewest words that lead from what was said to what is wanted."""
    words: list[Word] = []
    now: dict[Identity, Said] = {}
    for identity, found in wanted.items():
        kind, key = identity
        old = said.get(identity)
        if found.object is None:
            now[identity] = Said(old.object if old else None, found.reason)
            if old is None or old.reason != found.reason:
                words.append(Rejected(source, kind, key, found.reason))
        elif old is None or old.reason or old.object != found.object:
            now[identity] = Said(found.object)
            words.append(Change(source, kind, key, found.object))
        else:
            now[identity] = old
    words += (Change(source, kind, key, None) for kind, key in said if (kind, key) not in wanted)
    return words, now


def faultsOf(path: str) -> list[str]:
    """What is wrong with the manifests at a path, a line each, for ``--check``."""
    seen = look(path)
    if seen.missing:
        return [f"{path}: does not exist"]
    return [seen.error] if seen.error else [note for isWarning, note in seen.notes if isWarning]
