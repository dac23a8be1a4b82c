"""
What the fake API server says of its API in OpenAPI: documents of version 3, made of :mod:`tests.fakes.apischema`, and
as much of version 2 as old clients need.

kubectl 1.27 and later read the index and one document of version 3 before they create or change anything: to learn that
the server validates fields, how lists are merged, and for ``kubectl explain``. Older ones read version 2, in protobuf:
without definitions there, they skip their own validation, and from the paths they learn that dry runs are possible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from .apikinds import Json, Kind
from .apiproto import message
from .apischema import Field, named, schemaOf
from .apistore import encode

PARAMETERS = ("dryRun", "fieldManager", "fieldValidation", "force", "pretty")
# Asked for as …/com.github.proto-openapi.spec.v2@v1.0+protobuf, which is no proper media type.
V2_TYPE = "application/octet-stream"
_REF = "#/components/schemas/"
_SCALARS: dict[str, Json] = {
    "string": {"type": "string"},
    "integer": {"type": "integer", "format": "int32"},
    "boolean": {"type": "boolean"},
    "intOrString": {"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]},
    "time": {"type": "string", "format": "date-time"},
    "any": {"x-kubernetes-preserve-unknown-fields": True},
}


class OpenApi:
    """All documents of a server with these kinds."""

    def __init__(self, kinds: Iterable[Kind], version: str) -> None:
        self.kinds = tuple(kinds)
        self._version = version
        self._documents: dict[str, tuple[bytes, str]] = {}

    def index(self) -> Json:
        """``/openapi/v3``."""
        paths = {path: f"/openapi/v3/{path}?hash={self.document(path)[1]}" for path in self._paths()}
        return {"paths": {path: {"serverRelativeURL": url} for path, url in paths.items()}}

    def document(self, path: str) -> tuple[bytes, str]:
        """
        ``/openapi/v3/`` and such a path, and its hash.

        :raise KeyError: where there is none.
        """
        if path not in self._documents:
            body = encode(self._document(self._paths()[path]))
            self._documents[path] = (body, hashlib.sha512(body).hexdigest().upper())
        return self._documents[path]

    def v2(self) -> bytes:
        """``/openapi/v2`` in protobuf (github.com/google/gnostic, openapiv2/OpenAPIv2.proto)."""
        paths = b""
        for kind in self.kinds:
            gvk = f"group: {kind.group!r}\nversion: {kind.version!r}\nkind: {kind.kind!r}\n".replace("'", '"')
            extension = message((1, "x-kubernetes-group-version-kind"), (2, message((2, gvk))))
            parameters = [
                (8, message((1, message((2, message((3, message((2, "query"), (4, name)))))))))
                for name in PARAMETERS
                if name != "fieldValidation"
            ]
            operation = message(*parameters, (13, extension))
            paths += message((2, message((1, _path(kind)), (2, message((8, operation))))))
        return message((1, "2.0"), (2, message((1, "Kubernetes"), (2, self._version))), (8, paths))

    def _paths(self) -> dict[str, list[Kind]]:
        found: dict[str, list[Kind]] = {}
        for kind in self.kinds:
            path = f"apis/{kind.group}/{kind.version}" if kind.group else f"api/{kind.version}"
            found.setdefault(path, []).append(kind)
        return found

    def _document(self, kinds: list[Kind]) -> Json:
        schemas: Json = {}
        paths: Json = {}
        for kind in kinds:
            schema = schemaOf(kind)
            gvk = {"group": kind.group, "kind": kind.kind, "version": kind.version}
            if schema is not None:
                for it in named(schema):
                    schemas.setdefault(it.name, _definition(it))
                schemas[schema.name]["x-kubernetes-group-version-kind"] = [gvk]
            item = _path(kind)
            paths[item.removesuffix("/{name}")] = {
                method: _operation(action, gvk, schema)
                for method, action in (("get", "list"), ("post", "post"), ("delete", "deletecollection"))
            }
            paths[item] = {method: _operation(method, gvk, schema) for method in ("get", "put", "patch", "delete")}
        info = {"title": "Kubernetes", "version": self._version}
        return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _path(kind: Kind) -> str:
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    return f"{root}{'/namespaces/{namespace}' if kind.namespaced else ''}/{kind.plural}/{{name}}"


def _operation(action: str, gvk: Json, schema: Field | None) -> Json:
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in PARAMETERS]
    content = {"application/json": {"schema": {"$ref": _REF + schema.name} if schema else {"type": "object"}}}
    it = {"parameters": parameters, "responses": {"200": {"description": "OK", "content": content}}}
    return {**it, "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk}


def _definition(schema: Field) -> Json:
    it: Json = {"type": "object", "properties": {name: _property(field) for name, field in schema.fields.items()}}
    return {**it, "required": list(schema.required)} if schema.required else it


def _property(field: Field) -> Json:
    if field.type == "object":
        return {"allOf": [{"$ref": _REF + field.name}], "default": {}}
    if field.type == "map":
        assert field.item is not None
        return {"type": "object", "additionalProperties": _property(field.item)}
    if field.type != "array":
        return dict(_SCALARS[field.type])
    assert field.item is not None
    it: dict[str, Any] = {"type": "array", "items": _property(field.item)}
    if field.mergeKey:
        it["x-kubernetes-patch-merge-key"] = field.mergeKey
    if field.mergeKey or field.merged:
        it["x-kubernetes-patch-strategy"] = "merge"
    if field.listKeys:
        it |= {"x-kubernetes-list-map-keys": list(field.listKeys), "x-kubernetes-list-type": "map"}
    else:
        it["x-kubernetes-list-type"] = "set" if field.merged else "atomic"
    return it
