"""What the fake API server answers to those who ask what it can do: discovery and OpenAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import apidiscovery, apistatus
from .apiopenapi import V2_TYPE
from .apistore import encode

if TYPE_CHECKING:
    from .apiresources import Call


def discovery(call: Call) -> None:
    """Below ``/api`` and ``/apis``, as far as no resource is named."""
    kinds, parts = call.api.store.kinds, call.parts
    if len(parts) == 1 and _wantsAggregated(call):
        call.headers |= {"Vary": "Accept", "Cache-Control": "public"}
        call.send(200, encode(apidiscovery.aggregated(parts[0] == "api", kinds)) + b"\n", apidiscovery.AGGREGATED)
    elif parts[0] == "api":
        if len(parts) == 1:
            host = call.request.getHost()
            call.json(apidiscovery.apiVersions(f"{host.host}:{host.port}"))
        elif resources := apidiscovery.apiResources("", parts[1], kinds):
            call.json(resources)
        else:
            raise apistatus.noResource()
    elif len(parts) == 1:
        call.json(apidiscovery.apiGroups(kinds))
    elif not (group := apidiscovery.apiGroup(parts[1], kinds)):
        call.notFound()
    elif len(parts) == 2:
        call.json(group)
    elif resources := apidiscovery.apiResources(parts[1], parts[2], kinds):
        call.json(resources)
    else:
        raise apistatus.noResource()


def _wantsAggregated(call: Call) -> bool:
    """Of the aggregated form there is v2; who knows only v2beta1 gets the plain one, as of a server 1.36."""
    offered = {part.strip().replace(" ", "") for part in call.header("accept").split(",")}
    return call.api.modern and apidiscovery.AGGREGATED in offered


def openApi(call: Call) -> None:
    """Below ``/openapi``."""
    documents, what = call.api.openApi, "/".join(call.parts[1:])
    if what == "v2":
        call.send(200, documents.v2(), V2_TYPE)
    elif not call.api.modern or call.parts[1:2] != ["v3"]:
        call.notFound()
    elif what == "v3":
        call.send(200, encode(documents.index()), "text/plain; charset=utf-8")
    else:
        try:
            body, hash = documents.document(what.removeprefix("v3/"))
        except KeyError:
            call.notFound()
            return
        call.headers |= {"Etag": f'"{hash}"', "Cache-Control": "public, immutable", "Vary": "Accept"}
        call.send(200, body, "application/json")
