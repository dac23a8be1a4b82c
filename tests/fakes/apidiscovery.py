"""The discovery documents of the fake API server: which groups, versions and resources there are."""

from __future__ import annotations

from collections.abc import Iterable

from .apikinds import Json, Kind

AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
_STATUS = ["get", "patch", "update"]


def apiVersions(address: str) -> Json:
    """``/api``."""
    where = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": where}


def apiGroup(group: str, kinds: Iterable[Kind], standalone: bool = True) -> Json | None:
    """``/apis/GROUP``, or its entry in ``/apis``; ``None`` where nothing of that group is served."""
    versions = list(dict.fromkeys(kind.version for kind in kinds if kind.group == group))
    if not versions or not group:
        return None
    entries = [{"groupVersion": f"{group}/{version}", "version": version} for version in versions]
    head = {"kind": "APIGroup", "apiVersion": "v1"} if standalone else {}
    return {**head, "name": group, "versions": entries, "preferredVersion": entries[0]}


def apiGroups(kinds: Iterable[Kind]) -> Json:
    """``/apis``."""
    kinds = tuple(kinds)
    groups = [apiGroup(group, kinds, standalone=False) for group in dict.fromkeys(it.group for it in kinds) if group]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def apiResources(group: str, version: str, kinds: Iterable[Kind]) -> Json | None:
    """``/api/v1`` or ``/apis/GROUP/VERSION``; ``None`` where nothing of it is served."""
    resources: list[Json] = []
    for kind in sorted(kinds, key=lambda it: it.plural):
        if (kind.group, kind.version) != (group, version):
            continue
        entry = {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": kind.verbs,
        }
        resources.append({**entry, **_words(kind)})
        if kind.status:
            name = f"{kind.plural}/status"
            resources.append({**entry, "name": name, "singularName": "", "verbs": _STATUS})
    if not resources:
        return None
    # The core group's list has no apiVersion: it predates the field.
    head = {"kind": "APIResourceList", "apiVersion": "v1"} if group else {"kind": "APIResourceList"}
    return {**head, "groupVersion": f"{group}/{version}" if group else version, "resources": resources}


def aggregated(core: bool, kinds: Iterable[Kind]) -> Json:
    """
    ``/api`` (the core group) or ``/apis`` (all others) with everything in it at once, as kubectl asks for it since
    1.26 (KEP-3352).
    """
    kinds = tuple(kinds)
    items: list[Json] = []
    for group in dict.fromkeys(it.group for it in kinds):
        if core is not (group == ""):
            continue
        versions = [
            {"version": version, "resources": _entries(group, version, kinds), "freshness": "Current"}
            for version in dict.fromkeys(it.version for it in kinds if it.group == group)
        ]
        items.append({"metadata": {"name": group} if group else {}, "versions": versions})
    head = {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}}
    return {**head, "items": items}


def _entries(group: str, version: str, kinds: Iterable[Kind]) -> list[Json]:
    found = []
    for kind in sorted(kinds, key=lambda it: it.plural):
        if (kind.group, kind.version) != (group, version):
            continue
        answer = {"group": "", "version": "", "kind": kind.kind}
        entry: Json = {
            "resource": kind.plural,
            "responseKind": answer,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "singularResource": kind.kind.lower(),
            "verbs": kind.verbs,
        }
        entry |= _words(kind)
        if kind.status:
            entry["subresources"] = [{"subresource": "status", "responseKind": answer, "verbs": _STATUS}]
        found.append(entry)
    return found


def _words(kind: Kind) -> Json:
    words = {"shortNames": kind.shortNames, "categories": kind.categories}
    return {name: list(said) for name, said in words.items() if said}
