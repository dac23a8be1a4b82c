"""
kubeconfig files: the current context of one file, given by its path. (``KUBECONFIG`` and merging are for people at a
terminal, not for a daemon.)
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml
from msgspec import Struct

from ..interfaces import NotAvailable
from .credentials import ApiAccess, Pem, checked, checkedServer


def _kebab(name: str) -> str:
    return re.sub("[A-Z]", lambda match: f"-{match[0].lower()}", name)


class _Fields(Struct, frozen=True, rename=_kebab):
    """Names in a kubeconfig are in kebab case, save for those that say otherwise."""


class _Cluster(_Fields, frozen=True):
    server: str = ""
    certificateAuthority: str = ""
    certificateAuthorityData: str = ""
    tlsServerName: str = ""
    insecureSkipTlsVerify: bool = False


class _User(_Fields, frozen=True):
    clientCertificate: str = ""
    clientCertificateData: str = ""
    clientKey: str = ""
    clientKeyData: str = ""
    token: str = ""
    tokenFile: str = msgspec.field(name="tokenFile", default="")


class _Context(_Fields, frozen=True):
    cluster: str = ""
    user: str = ""


#: Fields that change where requests go or who we are there: to pass over one would be a silent mistake.
_REFUSED = {
    "exec": "an exec plugin",
    "auth-provider": "an auth provider",
    "username": "basic authentication",
    "password": "basic authentication",
    "as": "impersonation",
    "as-uid": "impersonation",
    "as-groups": "impersonation",
    "as-user-extra": "impersonation",
    "proxy-url": "a proxy",
}


def load(path: str) -> ApiAccess:
    """
    Read a kubeconfig. Relative paths in it count from its own folder.

    :raise NotAvailable: naming the file and the field.
    """
    path = os.path.abspath(path)
    document = _document(path)
    current = document.get("current-context")
    if not isinstance(current, str) or not current:
        raise NotAvailable(f"{path}: current-context is not set")
    context, _ = _named(path, document, "contexts", "context", current, "current-context", _Context)
    if not context.cluster:
        raise NotAvailable(f"{path}: context {current!r} names no cluster")
    cluster, where = _named(path, document, "clusters", "cluster", context.cluster, f"context {current!r}", _Cluster)
    if not cluster.server:
        raise NotAvailable(f"{where}: server is not set")
    user, who = _User(), f"{path}: user"
    if context.user:
        user, who = _named(path, document, "users", "user", context.user, f"context {current!r}", _User)
    folder = os.path.dirname(path)
    return checked(
        ApiAccess(
            server=checkedServer(cluster.server, where),
            origin=path,
            certificateAuthority=_pem(
                folder, where, "certificate-authority", cluster.certificateAuthority, cluster.certificateAuthorityData
            ),
            clientCertificate=_pem(
                folder, who, "client-certificate", user.clientCertificate, user.clientCertificateData
            ),
            clientKey=_pem(folder, who, "client-key", user.clientKey, user.clientKeyData),
            token=user.token,
            tokenFile=os.path.join(folder, user.tokenFile) if user.tokenFile else "",
            tlsServerName=cluster.tlsServerName,
            insecure=cluster.insecureSkipTlsVerify,
        )
    )


def _document(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise NotAvailable(f"kubeconfig {path} cannot be read: {error.strerror or error}")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # The problem and its place only: the text around it may be a secret.
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise NotAvailable(f"kubeconfig {path}: {line}{getattr(error, 'problem', None) or 'it is not YAML'}")
    except (ValueError, RecursionError):
        # What YAML's own types reject, such as a date that does not exist.
        raise NotAvailable(f"kubeconfig {path}: it is not YAML that can be read")
    if not isinstance(document, dict):
        raise NotAvailable(f"kubeconfig {path}: it is not a mapping")
    return document


def _named(
    path: str, document: Mapping[str, Any], section: str, field: str, name: str, asker: str, into: type[Any]
) -> tuple[Any, str]:
    """The entry of that name, and what to call it in errors."""
    entries = document.get(section) or []
    if not isinstance(entries, list):
        raise NotAvailable(f"{path}: {section} is not a list")
    found = [entry for entry in entries if isinstance(entry, dict) and entry.get("name") == name]
    if not found:
        raise NotAvailable(f"{path}: {asker} names the {field} {name!r}, which is not among {section}")
    if len(found) > 1:
        raise NotAvailable(f"{path}: there are {len(found)} {section} of the name {name!r}")
    where = f"{path}: {field} {name!r}"
    # Kubernetes takes null for "not set" everywhere.
    body = found[0].get(field)
    if body is not None and not isinstance(body, dict):
        raise NotAvailable(f"{where}: it is not a mapping")
    fields = {key: value for key, value in (body or {}).items() if value is not None}
    for key, what in _REFUSED.items():
        if fields.get(key):
            raise NotAvailable(
                f"{where}: {key} ({what}) is not supported; "
                "connect directly, with a token, tokenFile or client certificate"
            )
    try:
        return msgspec.convert(fields, into), where
    except msgspec.ValidationError as error:
        raise NotAvailable(f"{where}: {error}")


def _pem(folder: str, where: str, field: str, path: str, data: str) -> Pem | None:
    if data:
        try:
            return Pem(f"{where}: {field}-data", data=base64.b64decode("".join(data.split()), validate=True))
        except (binascii.Error, ValueError):
            raise NotAvailable(f"{where}: {field}-data is not base64")
    if path:
        full = os.path.join(folder, path)
        return Pem(f"{where}: {field} {full}", full)
    return None
