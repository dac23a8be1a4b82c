"""
Who we are at the API server at this moment: a token that rotates in its file, or whatever an exec plugin gives.
(Client certificates in files are the business of :mod:`~twisted_kproxy.sources.tls`.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ..interfaces import NotAvailable
from ..redaction import hide
from .credentials import ANONYMOUS, ApiAccess, Identity, asToken, readFile, timeOfDay
from .errors import NoCredentials
from .execplugin import ExecPlugin

#: Seconds after which a token file is read again: client-go's minute, less its leeway of ten seconds.
TOKEN_AGE = 50.0


class BearerToken:
    """
    The token of an access, read again once its file's last reading is :data:`TOKEN_AGE` old. What cannot be read, or
    is empty, leaves the old one in use, unless the server has refused it.
    """

    log = Logger()

    def __init__(self, clock: IReactorTime, access: ApiAccess) -> None:
        self._clock = clock
        self._path = access.tokenFile if access.secure else ""
        self._given = access.token.strip() if access.secure else ""
        self._token = self._given
        self._readAt: float | None = None
        self._fault = ""

    def __repr__(self) -> str:
        return f"<BearerToken {self._path or 'given'}>"

    def current(self) -> str:
        """
        The token to send now, ``""`` for none.

        :raise NotAvailable: where the file cannot be read and there is no token from before.
        """
        if not self._path:
            return self._token
        now = self._clock.seconds()
        if self._readAt is None or now - self._readAt >= TOKEN_AGE:
            self._read(now)
        return self._token

    def _read(self, now: float) -> None:
        try:
            self._token = asToken(readFile(self._path, "token file"), self._path)
        except NotAvailable as error:
            if str(error) != self._fault:
                what = "The last token stays in use" if self._token else "There is no token to be had"
                self.log.warn("{what}: {error}", what=what, error=str(error))
            self._fault = str(error)
            if not self._token:
                self._readAt = None
                raise
        else:
            self._fault = ""
            hide(self._token)
        self._readAt = now

    def refused(self, token: str) -> None:
        """
        The server did not take that token: it is dropped, and the file read again before the next request. A token
        that has rotated since is kept.
        """
        if self._path and token == self._token:
            self._token = self._given if self._given != token else ""
            self._readAt = None


class Credentials:
    """
    Who to be, for each request anew.

    :param plugin: of the access, where it has one: see :class:`~twisted_kproxy.sources.execplugin.ExecPlugin`.
    """

    def __init__(
        self,
        reactor: Any,
        access: ApiAccess,
        environ: Mapping[str, str] | None = None,
        wall: Callable[[], float] = timeOfDay,
    ) -> None:
        self._bearer = BearerToken(reactor, access)
        self._identity = ANONYMOUS
        self._plugin: ExecPlugin | None = None
        if access.exec is not None and access.secure:
            self._plugin = ExecPlugin(reactor, access, access.exec, os.environ if environ is None else environ, wall)

    def current(self) -> Deferred[Identity]:
        """
        Who to be for a request that is made now.

        :return: fires at once, save where a plugin has to run first (at most half a minute); fails with
            :class:`~twisted_kproxy.sources.errors.NoCredentials`. Cancelling it is harmless to others who wait.
        """
        if self._plugin is not None:
            return self._plugin.current()
        try:
            token = self._bearer.current()
        except NotAvailable as error:
            return fail(NoCredentials(str(error)))
        if token != self._identity.token:
            self._identity = Identity(token)
        return succeed(self._identity)

    def refused(self, identity: Identity) -> None:
        """The server answered 401 to a request that was sent as that: find out anew, unless that has been done."""
        if self._plugin is not None:
            self._plugin.refused(identity)
        elif identity.token:
            self._bearer.refused(identity.token)

    def pairRefused(self) -> None:
        """The server ended TLS over the plugin's client certificate: have it renewed."""
        if self._plugin is not None:
            self._plugin.pairRefused()

    def pair(self) -> tuple[bytes, bytes] | None:
        """Client certificates and key in PEM that the plugin gave last."""
        return None if self._plugin is None else self._plugin.pair()

    def whenChanged(self, changed: Callable[[], None]) -> None:
        """Call back when the plugin gives another client certificate than before."""
        if self._plugin is not None:
            self._plugin.changed = changed

    def status(self) -> Mapping[str, Any]:
        """JSON-able facts for operators."""
        return {} if self._plugin is None else self._plugin.status()

    def close(self) -> Deferred[None]:
        """End what runs; fires once that is gone. May be used again afterwards."""
        return succeed(None) if self._plugin is None else self._plugin.close()
