"""
Which proxy is between this node and the API server: what a URL says, and what the environment says, by the rules of
Go's ``golang.org/x/net/http/httpproxy``, which client-go goes by.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from msgspec.structs import replace

from ..interfaces import NotAvailable
from ..redaction import hide
from .credentials import ApiAccess, Proxy

PORTS = {"http": 80, "https": 443, "socks5": 1080}


def parseProxy(url: str, origin: str) -> Proxy:
    """
    The proxy that a URL names: ``http``, ``https`` or ``socks5``, with user name and password where it wants them.
    They are registered as secrets by then.

    :raise NotAvailable: with what is wrong; without the URL, which may hold a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise NotAvailable(f"{origin}: it is not the URL of a proxy")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    hide(password)
    hide(parts.password or "")
    if user or password:
        hide(f"{user}:{password}")
        hide(f"{parts.username or ''}:{parts.password or ''}@")
    if parts.scheme not in PORTS:
        hint = ", which already leaves names to the proxy" if parts.scheme == "socks5h" else ""
        said = parts.scheme if parts.scheme.isalnum() and "//" in url else "none"
        raise NotAvailable(f"{origin}: the scheme {said} is not supported; it must be http, https or socks5{hint}")
    plain = url.isascii() and url.isprintable() and " " not in url
    if not host or port == 0 or not plain or "%" in host or any(it in host for it in "<>\"\\^`{|}"):
        raise NotAvailable(f"{origin}: it must be {parts.scheme}://[USER:PASSWORD@]HOST[:PORT]")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise NotAvailable(f"{origin}: it must end with the port, without path, '?' or '#'")
    for what, it in (("user name", user), ("password", password)):
        if len(it.encode()) > 255 or not it.isprintable():
            raise NotAvailable(f"{origin}: its {what} is longer than 255 bytes or has control characters")
    if parts.scheme != "socks5" and ":" in user:
        raise NotAvailable(f"{origin}: its user name must not contain a colon (RFC 7617)")
    return Proxy(parts.scheme, host, port or PORTS[parts.scheme], user, password, origin)


def fromEnvironment(server: str, environ: Mapping[str, str]) -> Proxy | None:
    """
    The proxy that ``HTTPS_PROXY`` (``HTTP_PROXY`` for plain http) names for a server, unless ``NO_PROXY`` names the
    server. Each may be in lower case. This node itself is never reached through a proxy.

    :raise NotAvailable: naming the variable.
    """
    parts = urlsplit(server)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    name = f"{parts.scheme}_proxy"
    said = [(it, environ[it]) for it in (name.upper(), name) if environ.get(it)]
    if not said or _isHere(host) or excluded(host, port, environ.get("NO_PROXY") or environ.get("no_proxy") or ""):
        return None
    variable, url = said[0]
    return parseProxy(url if "://" in url else f"http://{url}", f"environment variable {variable}")


def _isHere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def excluded(host: str, port: int, noProxy: str) -> bool:
    """
    Whether a list in the form of ``NO_PROXY`` names a server: by address, ``ADDRESS:PORT``, network, domain (with all
    below it), ``.domain`` or ``*.domain`` (only what is below it), ``domain:port``, or ``*`` for everything.
    """
    host = host.lower().rstrip(".")
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    return any(_matches(it.strip().lower(), host, address, port) for it in noProxy.split(","))


def _matches(
    entry: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int
) -> bool:
    if not entry:
        return False
    if entry == "*":
        return True
    if "/" in entry:
        try:
            network = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
        return address is not None and address.version == network.version and address in network
    name, wanted = _split(entry)
    if not name or (wanted and wanted != str(port)):
        return False
    try:
        return address == ipaddress.ip_address(name)
    except ValueError:
        pass
    if address is not None:
        return False
    if name.startswith("*."):
        name = name[1:]
    return host.endswith(name) if name.startswith(".") else host == name or host.endswith(f".{name}")


def _split(entry: str) -> tuple[str, str]:
    """Host and port of an entry; ``""`` for any port."""
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        return host, rest.removeprefix(":")
    host, colon, port = entry.rpartition(":")
    if colon and ":" not in host:
        return host, port
    return entry, ""


def withProxy(access: ApiAccess, chosen: str, environ: Mapping[str, str]) -> ApiAccess:
    """
    The access with the proxy that it goes through.

    :param chosen: what the configuration says: a URL, ``none``, or ``environment``; empty for what the kubeconfig
        says, and the environment where that says nothing, as client-go does.
    :raise NotAvailable: naming where an unusable URL stands.
    """
    if chosen == "none":
        return replace(access, proxy=None)
    if chosen and chosen != "environment":
        return replace(access, proxy=parseProxy(chosen, f"{access.origin}: proxy-url"))
    if access.proxy is not None and not chosen:
        return access
    return replace(access, proxy=fromEnvironment(access.server, environ))
