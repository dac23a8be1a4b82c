"""Is told by the kernel when a folder changes (inotify(7)), where the reactor and the machine can do that."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet import inotify
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorFDSet
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.filepath import FilePath

#: Not IN_MODIFY: a file counts once its writer has closed it, or has put it in place.
MASK = (
    inotify.IN_CLOSE_WRITE
    | inotify.IN_ATTRIB
    | inotify.IN_CREATE
    | inotify.IN_DELETE
    | inotify.IN_MOVED_FROM
    | inotify.IN_MOVED_TO
    | inotify.IN_DELETE_SELF
    | inotify.IN_MOVE_SELF
    | inotify.IN_UNMOUNT
)


class FolderWatch:
    """
    Watches one folder at a time.

    :param changed: called with the name of what changed in the folder, or ``""`` for the folder itself.
    """

    log = Logger()

    def __init__(self, reactor: Any, changed: Callable[[str], None]) -> None:
        self._reactor = reactor
        self._changed = changed
        self._notifier: Any = None
        self._identity: tuple[int, int] | None = None
        self._complained = False

    @property
    def active(self) -> bool:
        """Whether the kernel is watching for us now."""
        return self._notifier is not None

    def watch(self, folder: str) -> None:
        """
        Watch that folder from now on; nothing happens where it is the one that is being watched. Where it cannot be
        watched, that is logged once.
        """
        if not IReactorFDSet.providedBy(self._reactor):
            return
        try:
            found = os.stat(folder)
            identity = (found.st_dev, found.st_ino)
            if self._notifier is not None and identity == self._identity:
                return
            self.close()
            notifier: Any = inotify.INotify(reactor=self._reactor)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._complain(folder, error)
            return
        try:
            path = FilePath(folder)
            notifier.watch(path, MASK, callbacks=[self._told])
        except (OSError, inotify.INotifyError) as error:
            _close(notifier)
            self._complain(folder, error)
            return
        notifier.startReading()
        self._notifier = notifier
        self._identity = identity
        self._complained = False

    def close(self) -> None:
        """Watch nothing."""
        notifier, self._notifier, self._identity = self._notifier, None, None
        if notifier is not None:
            notifier.stopReading()
            _close(notifier)

    def _told(self, watch: Any, path: FilePath[bytes], mask: int) -> None:
        if mask & inotify.IN_DELETE_SELF:
            # INotify closes itself after this; closing it twice would close somebody else's descriptor.
            self._notifier = self._identity = None
        itself = path.path == watch.path.path
        self._changed("" if itself else os.fsdecode(path.basename()))

    def _complain(self, folder: str, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            self.log.warn(
                "Cannot be told of changes in {folder} ({error}); looking from time to time instead",
                folder=folder,
                error=str(error) or type(error).__name__,
            )


def _close(notifier: Any) -> None:
    notifier.connectionLost(Failure(ConnectionDone()))  # type: ignore[no-untyped-call]
