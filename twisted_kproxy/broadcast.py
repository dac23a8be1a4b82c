"""One update to every listener, in order; one Deferred back."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from zope.interface import implementer

from .core.changes import Update
from .interfaces import IUpdateListener


@implementer(IUpdateListener)
class Broadcast:
    """
    Hands each update to its listeners one after the other. One that fails does not keep the update from those after
    it, but the whole then counts as failed.
    """

    log = Logger()

    def __init__(self, listeners: Sequence[IUpdateListener]) -> None:
        self._listeners = tuple(listeners)

    def onUpdate(self, update: Update) -> Deferred[None]:
        """
        See :class:`~twisted_kproxy.interfaces.IUpdateListener`.

        :return: fires when all listeners have; fails with the first failure.
        """
        return Deferred.fromCoroutine(self._tell(update))

    async def _tell(self, update: Update) -> None:
        first: Exception | None = None
        for listener in self._listeners:
            try:
                await maybeDeferred(listener.onUpdate, update)
            except Exception as error:
                if first is None:
                    first = error
                else:
                    self.log.failure("{listener} failed, too", listener=type(listener).__name__)
        if first is not None:
            raise first
