"""
What the fake API server has stored, kept in a file, so that it can be killed and started again as the real one can,
whose objects live in etcd. The history is not kept: who watches has to list again, as after a compaction.
"""

from __future__ import annotations

import json
import os

from .apistore import Event, Store, encode


class Journal:
    """
    Every change as one line of JSON in a file, from its beginning to now.

    :param path: of the file; one that exists is read into the store first, up to its last whole line.
    """

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        whole = self._read(path) if os.path.exists(path) else 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)
        self._end = store.subscribe(self._write)

    def close(self) -> None:
        self._end()
        os.close(self._file)

    def _read(self, path: str) -> int:
        """Gives how far the whole lines reach: what was being written when the process was killed never happened."""
        kinds = {(kind.apiVersion, kind.kind): kind for kind in self._store.kinds}
        whole = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                version, apiVersion, kind, namespace, name, it = json.loads(line)
                self._store.restore(version, kinds[apiVersion, kind], (namespace, name), it)
        return whole

    def _write(self, event: Event) -> None:
        kind = event.kind
        os.write(self._file, encode([event.version, kind.apiVersion, kind.kind, *event.key, event.new]) + b"\n")
