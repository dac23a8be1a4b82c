"""
How to reach an API server and who to be there, as a frozen :class:`ApiAccess`: from explicit options or from the
service account of a pod. (From a kubeconfig: :mod:`~twisted_kproxy.sources.kubeconfig`.)

Nothing here ever shows a secret in its ``repr`` or in an error.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from ..core.values import hostPort
from ..interfaces import NotAvailable
from ..redaction import hide

#: Where a pod finds the credentials of its service account.
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Bytes of any file with credentials; no true one comes near.
FILE_LIMIT = 1 << 20


class IApiOptions(Protocol):
    """
    What is read of a ``[source:NAME]`` section. Exactly one of kubeconfig, inCluster and server is given; server may
    also stand beside inCluster, and is then where that account is used.
    """

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
    @property
    def tlsServerName(self) -> str: ...
    @property
    def proxyUrl(self) -> str: ...


class Pem(Struct, frozen=True):
    """
    Certificates or a key, in a file or given at once. A file may rotate.

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
        return readFile(self.path, self.origin)


class Exec(Struct, frozen=True):
    """
    A program that gives credentials (``client.authentication.k8s.io``).

    :ivar command: absolute, or a name to be looked up in ``PATH``.
    :ivar env: beside the environment of this process.
    :ivar apiVersion: of the request and of the answer, group included.
    :ivar installHint: for whoever finds that the program is missing.
    :ivar provideClusterInfo: whether it is told about the API server.
    :ivar clusterConfig: what the kubeconfig has for it in the cluster's extension, as JSON.
    """

    command: str
    apiVersion: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    installHint: str = ""
    provideClusterInfo: bool = False
    clusterConfig: msgspec.Raw = msgspec.Raw(b"")

    def __repr__(self) -> str:
        return f"<Exec {self.command}>"


class Proxy(Struct, frozen=True):
    """
    What stands between this node and the API server.

    :ivar scheme: ``http``, ``https`` or ``socks5``.
    :ivar host: without brackets.
    :ivar origin: where this was read.
    """

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""
    origin: str = ""

    def __str__(self) -> str:
        """Its URL, with ``***`` for whoever we are there."""
        who = "***@" if self.user or self.password else ""
        return f"{self.scheme}://{who}{hostPort(self.host, self.port)}"

    def __repr__(self) -> str:
        return f"<Proxy {self}>"


class ApiAccess(Struct, frozen=True):
    """
    Where an API server is and how to be known there.

    :ivar server: ``https://host:port/prefix``, no slash at the end.
    :ivar origin: where this was read, for errors and status pages.
    :ivar token: a bearer token; with ``tokenFile`` only until the file has been read.
    :ivar tlsServerName: the name to ask for and to verify, where it is not the host.
    :ivar insecure: take any server certificate.
    :ivar disableCompression: never ask for compressed answers.
    :ivar warnings: what is allowed, but hardly meant.
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
    disableCompression: bool = False
    exec: Exec | None = None
    proxy: Proxy | None = None
    warnings: tuple[str, ...] = ()

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
        if self.exec is not None:
            ways.append(f"exec plugin {self.exec.command}")
        if self.tokenFile:
            ways.append(f"token of {self.tokenFile}")
        elif self.token:
            ways.append("token")
        return " and ".join(ways) or "anonymous"


class Identity(Struct, frozen=True, eq=False):
    """
    Who we are: what one request is sent with, and to be handed back when the server does not take it.

    :ivar token: for the ``Authorization`` header; ``""`` for none.
    :ivar certificate: client certificates in PEM that came with it, and their ``key``; ``b""`` for none.
    """

    token: str = ""
    certificate: bytes = b""
    key: bytes = b""

    def __repr__(self) -> str:
        ways = [name for name, it in (("token", self.token), ("certificate", self.certificate)) if it]
        return f"<Identity by {' and '.join(ways) or 'nothing'}>"


ANONYMOUS = Identity()


def timeOfDay() -> float:
    """
    Seconds since the epoch: what credentials and certificates say about their end is in terms of it. Only to be
    compared with such words at the moment they are read; everything else goes by the monotonic clock.
    """
    return time.time()


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
        raise NotAvailable(f"{origin}: server {_masked(server)!r} is not a URL: {_masked(str(error))}")
    if parts.username is not None or parts.password is not None:
        raise NotAvailable(f"{origin}: server must not carry a user name or password")
    plain = server.isascii() and server.isprintable() and " " not in server
    if parts.scheme not in ("https", "http") or not host or port == 0 or not plain:
        raise NotAvailable(f"{origin}: server {_masked(server)!r} must be https://HOST[:PORT][/PREFIX]")
    if parts.query or parts.fragment:
        raise NotAvailable(f"{origin}: server {server!r} must not have a query or fragment")
    if "%" in parts.netloc:
        raise NotAvailable(
            f"{origin}: server {server!r} has a zone; link-local addresses cannot be used, give a global one or a name"
        )
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise NotAvailable(f"{origin}: server {server!r} has no IPv6 address between its brackets")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _masked(url: str) -> str:
    return f"{url.partition('//')[0]}//***@{url.rpartition('@')[2]}" if "@" in url else url


def checked(access: ApiAccess) -> ApiAccess:
    """
    The access itself, once everything in it that can be tried without the network has been. Its secrets are registered
    by then.

    :raise NotAvailable: naming the file or field.
    """
    hide(access.token)
    if access.clientKey is not None:
        hide(access.clientKey.data.decode("latin-1"))
    if (access.clientCertificate is None) != (access.clientKey is None):
        there, missing = "client certificate", "client key"
        if access.clientCertificate is None:
            there, missing = missing, there
        raise NotAvailable(f"{access.origin}: there is a {there} but no {missing}; give both or none")
    if access.exec is not None:
        for other, given in (
            ("a client certificate", access.clientCertificate), ("a token", access.token or access.tokenFile),
        ):
            if given:
                raise NotAvailable(f"{access.origin}: there is an exec plugin and {other}; keep one of them")
    if not (access.tlsServerName.isascii() and access.tlsServerName.isprintable()) or " " in access.tlsServerName:
        raise NotAvailable(f"{access.origin}: tls-server-name {access.tlsServerName!r} is no host name")
    if access.insecure and access.certificateAuthority is not None:
        raise NotAvailable(
            f"{access.origin}: insecure-skip-tls-verify and a certificate authority exclude each other; drop one"
        )
    if access.token:
        asToken(access.token.encode(), f"{access.origin}: token")
    if not access.secure:
        if access.manner() != "anonymous":
            said = f"{access.origin}: {access.server} is asked without TLS, so the {access.manner()} is not used"
            access = msgspec.structs.replace(access, warnings=(*access.warnings, said))
        return access
    if access.tokenFile and not access.token:
        hide(asToken(readFile(access.tokenFile, f"{access.origin}: token file"), access.tokenFile))
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
            tlsServerName=options.tlsServerName,
        )
    )


def inCluster(
    environ: Mapping[str, str], path: str = SERVICE_ACCOUNT, server: str = "", tlsServerName: str = ""
) -> ApiAccess:
    """
    The access that Kubernetes gives to a pod.

    Its address is as a rule a ClusterIP, which is this very proxy's to provide: it works as long as rules of an
    earlier run are in force, and not on a fresh node. So it comes with a warning.

    :param path: of the service account's folder.
    :param server: where to use the account instead.
    :raise NotAvailable: outside of a pod.
    """
    warnings: tuple[str, ...] = ()
    if not server:
        host = environ.get("KUBERNETES_SERVICE_HOST", "")
        port = environ.get("KUBERNETES_SERVICE_PORT", "")
        if not host or not port:
            raise NotAvailable(
                "in-cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set, so this is not a pod; "
                "give kubeconfig or server instead"
            )
        server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        warnings = (
            f"in-cluster: {server} is as a rule the ClusterIP of Service default/kubernetes, which this very proxy "
            "provides: on a fresh node nothing leads there. Add server = https://ADDRESS:6443, an address of an API "
            "server that is reached without a service proxy",
        )
    ca = os.path.join(path, "ca.crt")
    return checked(
        ApiAccess(
            server=checkedServer(server, "in-cluster"),
            origin="in-cluster",
            certificateAuthority=Pem(f"in-cluster: {ca}", ca),
            tokenFile=os.path.join(path, "token"),
            tlsServerName=tlsServerName,
            warnings=warnings,
        )
    )


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


def readFile(path: str, origin: str, limit: int = FILE_LIMIT) -> bytes:
    """
    The content of a small regular file. Never waits: a pipe or device is refused.

    :param origin: what to call it in errors; the path is added where it is not part of it.
    :raise NotAvailable: where it cannot be read, or is larger than the limit.
    """
    where = origin if path in origin else f"{origin} {path}"
    try:
        with open(path, "rb", opener=_openWithoutWaiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise NotAvailable(f"{where} cannot be read: it is no regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise NotAvailable(f"{where} cannot be read: {error.strerror or error}")
    except ValueError:
        raise NotAvailable(f"{where} cannot be read: there is a NUL in its name")
    if len(data) > limit:
        raise NotAvailable(f"{where} cannot be read: it is larger than {limit} bytes")
    return data


def _openWithoutWaiting(path: Any, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
