"""Events: what the cluster's operators are told through the API."""

from __future__ import annotations

from zope.interface import implementer

from ..interfaces import IEventRecorder


@implementer(IEventRecorder)
class NoEvents:
    """For a configuration without an API server: there is nobody to tell."""

    def record(
        self, kind: str, namespace: str, name: str, uid: str, reason: str, action: str, note: str, warning: bool = False
    ) -> None:
        """See :meth:`IEventRecorder.record`."""
