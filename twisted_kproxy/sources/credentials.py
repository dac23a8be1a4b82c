"""
How to reach an API server and who to be there: from explicit options or from the service account of a pod, as a
frozen :class:`ApiAccess`; and the bearer token, read again as it rotates.

Nothing here ever shows a secret in its ``repr`` or in an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit

from msgspec import Struct
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ..interfaces import NotAvailable

#: Where a pod finds the credentials of its service account.
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Seconds after which a token file is read again: client-go's minute, less its leeway of ten seconds.
TOKEN_AGE = 50.0


class IApiOptions(Protocol):
    """What is read of a ``[source:NAME]`` section. Exactly one of kubeconfig, inCluster and server is given."""

    @property
    def kubeconfig(self) -> str: ...
    @property
    def inCluster(self) -> bool: ...
    @property
    def server(self) -> str: ...
    @property
    def tokenFile(self) -> str: ...
    @property
    def caFile(self) -> str: ...
    @property
    def clientCertificate(self) -> str: ...
    @property
    def clientKey(self) -> str: ...


class Pem(Struct, frozen=True):
    """
    Certificates or a key, in a file or given at once. A file is read at every use, so that it may rotate.

    :ivar origin: what to call it in errors.
    """

    origin: str
    path: str = ""
    data: bytes = b""

    def __repr__(self) -> str:
        return f"<Pem {self.origin}>"

    def read(self) -> bytes:
        """
        Its bytes now.

        :raise NotAvailable: where the file cannot be read.
        """
        if not self.path:
            return self.data
        return _read(self.path, self.origin)


class ApiAccess(Struct, frozen=True):
    """
    Where an API server is and how to be known there.

    :ivar server: ``https://host:port/prefix``, no slash at the end.
    :ivar origin: where this was read, for errors and status pages.
    :ivar token: a bearer token; with ``tokenFile`` only until the file has been read.
    :ivar tlsServerName: the name to ask for and to verify, where it is not the host.
    :ivar insecure: take any server certificate.
    """

    server: str
    origin: str
    certificateAuthority: Pem | None = None
    clientCertificate: Pem | None = None
    clientKey: Pem | None = None
    token: str = ""
    tokenFile: str = ""
    tlsServerName: str = ""
    insecure: bool = False

    def __repr__(self) -> str:
        return f"<ApiAccess {self.server} from {self.origin}, {self.manner()}>"

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken; without it no credentials are sent."""
        return self.server.startswith("https:")

    def manner(self) -> str:
        """How we are known there, in words."""
        ways = []
        if self.clientCertificate is not None:
            ways.append("client certificate")
        if self.tokenFile:
            ways.append(f"token of {self.tokenFile}")
        elif self.token:
            ways.append("token")
        return " and ".join(ways) or "anonymous"


def checkedServer(server: str, origin: str) -> str:
    """
    A server's URL in its canonical form.

    :raise NotAvailable: where it is none, or carries what it must not.
    """
    try:
        parts = urlsplit(server)
        port = parts.port
        host = parts.hostname
    except ValueError as error:
        raise NotAvailable(f"{origin}: server {server!r} is not a URL: {error}")
    plain = server.isascii() and server.isprintable() and " " not in server
    if parts.scheme not in ("https", "http") or not host or port == 0 or not plain:
        raise NotAvailable(f"{origin}: server {server!r} must be https://HOST[:PORT][/PREFIX]")
    if parts.username is not None or parts.password is not None:
        raise NotAvailable(f"{origin}: server must not carry a user name or password")
    if parts.query or parts.fragment:
        raise NotAvailable(f"{origin}: server {server!r} must not have a query or fragment")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def checked(access: ApiAccess) -> ApiAccess:
    """
    The access itself, once everything in it that can be tried without the network has been.

    :raise NotAvailable: naming the file or field.
    """
    if (access.clientCertificate is None) != (access.clientKey is None):
        there, missing = "client certificate", "client key"
        if access.clientCertificate is None:
            there, missing = missing, there
        raise NotAvailable(f"{access.origin}: there is a {there} but no {missing}; give both or none")
    if access.insecure and access.certificateAuthority is not None:
        raise NotAvailable(
            f"{access.origin}: insecure-skip-tls-verify and a certificate authority exclude each other; drop one"
        )
    if access.tokenFile:
        asToken(_read(access.tokenFile, f"{access.origin}: token file"), access.tokenFile)
    elif access.token:
        asToken(access.token.encode(), f"{access.origin}: token")
    return access


def explicit(name: str, options: IApiOptions) -> ApiAccess:
    """
    The access that the options themselves spell out.

    :raise NotAvailable: naming the option.
    """
    origin = f"source {name}"

    def pem(path: str, what: str) -> Pem | None:
        return Pem(f"{origin}: {what} {path}", path) if path else None

    return checked(
        ApiAccess(
            server=checkedServer(options.server, origin),
            origin=origin,
            certificateAuthority=pem(options.caFile, "ca-file"),
            clientCertificate=pem(options.clientCertificate, "client-certificate"),
            clientKey=pem(options.clientKey, "client-key"),
            tokenFile=options.tokenFile,
        )
    )


def inCluster(environ: Mapping[str, str], path: str = SERVICE_ACCOUNT) -> ApiAccess:
    """
    The access that Kubernetes gives to a pod.

    The address is a ClusterIP, which is this very proxy's to provide: it works as long as rules of an earlier run
    are in force.

    :param path: of the service account's folder.
    :raise NotAvailable: outside of a pod.
    """
    host = environ.get("KUBERNETES_SERVICE_HOST", "")
    port = environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise NotAvailable(
            "in-cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set, so this is not a pod; "
            "give kubeconfig or server instead"
        )
    ca = os.path.join(path, "ca.crt")
    netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return checked(
        ApiAccess(
            server=checkedServer(f"https://{netloc}", "in-cluster"),
            origin="in-cluster",
            certificateAuthority=Pem(f"in-cluster: {ca}", ca),
            tokenFile=os.path.join(path, "token"),
        )
    )


class BearerToken:
    """
    The token of an access, read again once its file's last reading is :data:`TOKEN_AGE` old or the server has not
    taken it. What cannot be read, or is empty, leaves the old one in use.
    """

    log = Logger()

    def __init__(self, clock: IReactorTime, access: ApiAccess) -> None:
        self._clock = clock
        self._path = access.tokenFile if access.secure else ""
        self._token = access.token.strip() if access.secure else ""
        self._readAt: float | None = None

    def __repr__(self) -> str:
        return f"<BearerToken {self._path or 'given'}>"

    def current(self) -> str:
        """
        The token to send now, ``""`` for none.

        :raise NotAvailable: where the file cannot be read and never could.
        """
        if not self._path:
            return self._token
        now = self._clock.seconds()
        if self._readAt is None or now - self._readAt >= TOKEN_AGE:
            try:
                self._token = asToken(_read(self._path, "token file"), self._path)
            except NotAvailable as error:
                if not self._token:
                    raise
                self.log.warn("The last token stays in use: {error}", error=str(error))
            self._readAt = now
        return self._token

    def refused(self, token: str) -> None:
        """The server did not take that token: read the file again before the next request."""
        if token == self._token:
            self._readAt = None


def asToken(data: bytes, origin: str) -> str:
    """
    A token as it may stand in a header.

    :raise NotAvailable: where it is empty or contains what no token does.
    """
    try:
        token = data.decode("ascii").strip()
    except UnicodeDecodeError:
        raise NotAvailable(f"{origin} is not a token: it is not ASCII")
    if not token:
        raise NotAvailable(f"{origin} is empty")
    if not token.isprintable() or " " in token:
        raise NotAvailable(f"{origin} is not a token: it contains spaces or control characters")
    return token


def _read(path: str, origin: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        where = origin if path in origin else f"{origin} {path}"
        raise NotAvailable(f"{where} cannot be read: {error.strerror or error}")
