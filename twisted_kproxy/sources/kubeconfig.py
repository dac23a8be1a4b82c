"""
kubeconfig files: the current context of one file, given by its path. (``KUBECONFIG`` and merging are for people at a
terminal, not for a daemon.)

What a field means is what client-go makes of it (``k8s.io/client-go/tools/clientcmd``); what is not supported is
refused by name, since to pass over it would be to go elsewhere, or as somebody else, than the file says.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from ..interfaces import NotAvailable
from ..redaction import hide
from .credentials import ApiAccess, Exec, Pem, checked, checkedServer, readFile
from .manifests import Broken, yamlDocuments
from .proxychoice import parseProxy

EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
#: Name of the extension of a cluster that is for its exec plugin.
EXEC_EXTENSION = "client.authentication.k8s.io/exec"


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
    disableCompression: bool = False
    proxyUrl: str = ""
    extensions: list[dict[str, Any]] = []


class _User(_Fields, frozen=True):
    clientCertificate: str = ""
    clientCertificateData: str = ""
    clientKey: str = ""
    clientKeyData: str = ""
    token: str = ""
    tokenFile: str = msgspec.field(name="tokenFile", default="")
    exec: dict[str, Any] | None = None


class _Variable(Struct, frozen=True):
    name: str
    value: str = ""


class _Exec(Struct, frozen=True, rename="camel"):
    command: str = ""
    args: list[str] | None = None
    env: list[_Variable] | None = None
    apiVersion: str = ""
    installHint: str = ""
    provideClusterInfo: bool = False
    interactiveMode: str = ""


class _Context(_Fields, frozen=True):
    cluster: str = ""
    user: str = ""


#: Fields that change who we are there.
_REFUSED = {
    "auth-provider": "an auth provider, which client-go has given up for exec plugins",
    "username": "basic authentication",
    "password": "basic authentication",
    **{
        f"{prefix}{it}": "impersonation"
        for prefix in ("as", "act-as") for it in ("", "-uid", "-groups", "-user-extra")
    },
}
#: Fields that say nothing about the way to the server.
_HARMLESS = frozenset({"extensions", "namespace", "locationOfOrigin", "LocationOfOrigin"})


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
    unknown: list[str] = []
    context, _ = _named(path, document, "contexts", "context", current, "current-context", _Context, unknown)
    if not context.cluster:
        raise NotAvailable(f"{path}: context {current!r} names no cluster")
    asker = f"context {current!r}"
    cluster, where = _named(path, document, "clusters", "cluster", context.cluster, asker, _Cluster, unknown)
    if not cluster.server:
        raise NotAvailable(f"{where}: server is not set")
    user, who = _User(), f"{path}: user"
    if context.user:
        user, who = _named(path, document, "users", "user", context.user, asker, _User, unknown)
    hide(user.token)
    folder = os.path.dirname(path)
    plugin = None if user.exec is None else _exec(user.exec, cluster, folder, f"{who}: exec", unknown)
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
            disableCompression=cluster.disableCompression,
            exec=plugin,
            proxy=parseProxy(cluster.proxyUrl, f"{where}: proxy-url") if cluster.proxyUrl else None,
            warnings=tuple(f"{it} is not a known field and is passed over" for it in unknown),
        )
    )


def _document(path: str) -> Mapping[str, Any]:
    data = readFile(path, "kubeconfig")
    try:
        documents = list(yamlDocuments(data))
    except Broken as error:
        line = f"line {error.line}: " if error.line else ""
        raise NotAvailable(f"kubeconfig {path}: {line}{_without(error.reason)}{_tabs(data, error.line)}")
    if len(documents) > 1:
        raise NotAvailable(f"kubeconfig {path}: line {documents[1][0]}: a second document begins; keep one")
    if not documents or not isinstance(documents[0][1], dict):
        raise NotAvailable(f"kubeconfig {path}: it is not a mapping")
    document: Mapping[str, Any] = documents[0][1]
    return document


def _without(reason: str) -> str:
    """What is wrong with the text, without anything of the text: it may be a secret."""
    for sign, what in (("stands for nothing", "an alias (*…)"), ("the tag", "a tag (!…)")):
        if sign in reason:
            return f"{what} that is not known; put a value that begins so in quotes"
    if re.search(r" is no \w+$", reason) and not reason.startswith(("is no", "is not")):
        return "a value does not fit its tag (!!…)"
    return re.sub(r"'(?!\\?.')[^']*'|\"[^\"]*\"|![^\s,]+", "…", reason)


def _tabs(data: bytes, line: int) -> str:
    lines = data.split(b"\n")
    near = lines[max(0, line - 2) : line] if line else []
    return "; indent with blanks, not with tabs" if any(it.lstrip(b" ").startswith(b"\t") for it in near) else ""


def _named(
    path: str,
    document: Mapping[str, Any],
    section: str,
    field: str,
    name: str,
    asker: str,
    into: type[Any],
    unknown: list[str],
) -> tuple[Any, str]:
    """The entry of that name, and what to call it in errors. Gathers fields that are not known."""
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
                "use a token, tokenFile, client certificate or exec plugin"
            )
    return _converted(fields, into, where, unknown), where


def _converted(fields: Mapping[Any, Any], into: type[Any], where: str, unknown: list[str]) -> Any:
    known = {it.encode_name for it in msgspec.structs.fields(into)} | _HARMLESS | _REFUSED.keys()
    unknown += [f"{where}: {str(key)[:60]!r}" for key in fields if key not in known]
    try:
        return msgspec.convert(fields, into)
    except msgspec.ValidationError as error:
        raise NotAvailable(f"{where}: {error}")


def _exec(fields: Mapping[str, Any], cluster: _Cluster, folder: str, where: str, unknown: list[str]) -> Exec:
    it: _Exec = _converted({key: value for key, value in fields.items() if value is not None}, _Exec, where, unknown)
    if not it.command:
        raise NotAvailable(f"{where}: command is not set")
    if not it.apiVersion:
        raise NotAvailable(f"{where}: apiVersion is not set; it must be one of {' and '.join(EXEC_VERSIONS)}")
    if it.apiVersion not in EXEC_VERSIONS:
        raise NotAvailable(
            f"{where}: apiVersion {it.apiVersion!r} is not supported; it must be one of {' and '.join(EXEC_VERSIONS)}"
        )
    if it.interactiveMode == "Always":
        raise NotAvailable(f"{where}: interactiveMode Always cannot be: a daemon has nobody to ask; say IfAvailable")
    if not it.interactiveMode and it.apiVersion == EXEC_VERSIONS[0]:
        raise NotAvailable(f"{where}: interactiveMode is not set; {it.apiVersion} wants Never or IfAvailable")
    if it.interactiveMode not in ("", "Never", "IfAvailable"):
        raise NotAvailable(f"{where}: interactiveMode {it.interactiveMode!r} is not known; say Never or IfAvailable")
    for variable in it.env or ():
        if not variable.name or "=" in variable.name or "\0" in variable.name + variable.value:
            raise NotAvailable(f"{where}: env has a variable without a name, or with one that cannot be")
    if any("\0" in text for text in (it.command, *(it.args or ()))):
        raise NotAvailable(f"{where}: command and args must not contain NUL")
    extension = next((it.get("extension") for it in cluster.extensions if it.get("name") == EXEC_EXTENSION), None)
    return Exec(
        # A name alone is looked up in PATH; with a slash it counts from the kubeconfig's folder.
        command=os.path.normpath(os.path.join(folder, it.command)) if "/" in it.command else it.command,
        apiVersion=it.apiVersion,
        args=tuple(it.args or ()),
        env=tuple((variable.name, variable.value) for variable in it.env or ()),
        installHint=it.installHint,
        provideClusterInfo=it.provideClusterInfo,
        clusterConfig=msgspec.Raw(b"" if extension is None else msgspec.json.encode(extension)),
    )


def _pem(folder: str, where: str, field: str, path: str, data: str) -> Pem | None:
    if data:
        try:
            decoded = base64.b64decode("".join(data.split()), validate=True)
        except (binascii.Error, ValueError):
            raise NotAvailable(f"{where}: {field}-data is not base64")
        if not decoded:
            raise NotAvailable(f"{where}: {field}-data is empty")
        return Pem(f"{where}: {field}-data", data=decoded)
    if path:
        full = os.path.join(folder, path)
        return Pem(f"{where}: {field} {full}", full)
    return None
