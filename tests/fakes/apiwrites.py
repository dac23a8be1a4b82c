"""POST, PUT, PATCH and DELETE, as the fake API server does them."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import yaml

from . import apistatus
from .apikinds import NAMESPACES, Json, Kind
from .apipatch import APPLY, PATCHES, applied, mergePatch
from .apirequest import Target, parseBody
from .apischema import Misfit, conform, schemaOf
from .apistatus import badRequest
from .apistore import full

if TYPE_CHECKING:
    from .apiresources import Call

_DIRECTIVES = ("Ignore", "Warn", "Strict")


class Write:
    """
    One request that changes something.

    :param call: where it comes from, and where the answer goes.
    """

    def __init__(self, call: Call, kind: Kind, target: Target) -> None:
        self._call = call
        self._api = call.api
        self._store = call.api.store
        self._kind = kind
        self._target = target
        self._body: bytes = call.request.content.read()
        self._dry = call.query.get("dryRun") == "All"

    def perform(self) -> None:
        """Do it, and answer."""
        verb = self._call.verb
        if verb == "create" and not self._target.name:
            self._create(self._object())
        elif verb == "delete" and not self._target.name and "deletecollection" in self._kind.verbs:
            self._deleteCollection()
        elif verb == "delete" and self._target.name:
            self._delete()
        elif verb == "update" and self._target.name:
            self._replace(self._old(), self._object())
        elif verb == "patch" and self._target.name:
            self._patch()
        else:
            raise apistatus.noMethod()

    # --- each verb ---

    def _create(self, new: Json) -> None:
        metadata = new["metadata"]
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if self._api.admission is not None:
            self._store.absent(new)
            # What the server alone says; tests that choose it themselves put the objects into the store.
            for field in ("uid", "creationTimestamp", "deletionTimestamp", "resourceVersion", "generation"):
                metadata.pop(field, None)
            new = self._admitted(new, None)
        self._call.object(self._kind, self._store.create(new, dry=self._dry), 201)

    def _old(self) -> Json:
        return self._store.get(self._kind, self._target.namespace, self._target.name)

    def _replace(self, old: Json, new: Json) -> None:
        metadata = new["metadata"]
        if self._target.subresource:  # only the status counts
            metadata = {**old["metadata"], "resourceVersion": metadata.get("resourceVersion", "")}
            new = {**full(self._kind, old), "metadata": metadata, "status": new.get("status", {})}
        elif self._kind.status:  # anything but the status counts
            new = mergePatch(new, {"status": None}) | ({"status": old["status"]} if "status" in old else {})
        self._store.matches(new, old)
        if self._api.admission is not None:
            new = self._admitted(new, old)
        self._call.object(self._kind, self._store.update(new, dry=self._dry))

    def _patch(self) -> None:
        contentType = self._call.header("content-type").split(";")[0].strip()
        if contentType == APPLY:
            self._apply()
            return
        patch = PATCHES.get(contentType)
        if patch is None:
            raise apistatus.failure(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})
        try:
            said = json.loads(self._body)
        except ValueError as error:
            raise badRequest(f"error decoding patch: {error}") from None
        old = self._old()
        new = patch(schemaOf(self._kind), full(self._kind, old), said)
        if not isinstance(new, dict) or not isinstance(new.get("metadata"), dict):
            raise badRequest("the patch leaves no object")
        self._replace(old, self._conforming(new))

    def _apply(self) -> None:
        """Server-side apply; see :mod:`tests.fakes.apipatch`."""
        who = self._call.query.get("fieldManager")
        if not who:
            text = 'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch'
            causes = [{"reason": "FieldValueRequired", "message": "Required value: is required for apply patch",
                       "field": "fieldManager"}]  # fmt: skip
            details = {"group": "meta.k8s.io", "kind": "PatchOptions", "causes": causes}
            raise apistatus.failure(422, "Invalid", text, details)
        try:
            said = yaml.safe_load(self._body)
        except yaml.YAMLError as error:
            raise badRequest(f"error decoding YAML: {error}") from None
        if not isinstance(said, dict) or not isinstance(said.setdefault("metadata", {}), dict):
            raise badRequest("an apply patch must be an object")
        now = self._placed(self._conforming(said))
        key = (self._kind.apiVersion, self._kind.plural, self._target.namespace, self._target.name, who)
        there = self._store.objects(self._kind).get((self._target.namespace, self._target.name))
        if there is None:
            uid = ""
            self._create(now)
        else:
            uid = there["metadata"]["uid"]
            wasUid, before = self._api.applied.get(key, ("", {}))
            plain = {name: value for name, value in now.items() if name not in ("apiVersion", "kind")}
            new = applied(schemaOf(self._kind), full(self._kind, there), before if wasUid == uid else {}, plain)
            self._replace(there, new)
        if not self._dry:
            stored = self._store.objects(self._kind)[self._target.namespace, self._target.name]
            self._api.applied[key] = (
                uid or stored["metadata"]["uid"],
                {name: value for name, value in now.items() if name not in ("apiVersion", "kind")},
            )

    def _delete(self) -> None:
        old = self._old()
        options = self._options()
        for field, said in (options.get("preconditions") or {}).items():
            if said and said != old["metadata"].get(field):
                text = f"Precondition failed: {field} in precondition: {said}, {field} in object meta: "
                raise apistatus.conflict(self._kind, self._target.name, text + str(old["metadata"].get(field)))
        if self._dry or options.get("dryRun") == ["All"]:
            gone = old
        else:
            if self._kind is NAMESPACES and self._api.admission is not None:
                self._empty(self._target.name)
            gone = self._store.remove(self._kind, old["metadata"].get("namespace", ""), self._target.name)
        if self._kind.returnsDeleted:
            self._call.object(self._kind, gone)
        else:
            self._call.json(apistatus.deleted(self._kind, gone))

    def _empty(self, namespace: str) -> None:
        """A namespace does not go alone."""
        for kind in self._store.kinds:
            for key in [key for key in self._store.objects(kind) if kind.namespaced and key[0] == namespace]:
                self._store.remove(kind, *key)

    def _deleteCollection(self) -> None:
        if self._kind.namespaced and not self._target.namespace:
            raise apistatus.noMethod()
        wanted = self._call.selection(self._kind)
        gone = self._store.list(self._kind, self._target.namespace, wanted).items
        if not self._dry and self._options().get("dryRun") != ["All"]:
            gone = [self._store.remove(self._kind, self._target.namespace, it["metadata"]["name"]) for it in gone]
        metadata = {"resourceVersion": str(self._store.resourceVersion)}
        head = {"kind": f"{self._kind.kind}List", "apiVersion": self._kind.apiVersion, "metadata": metadata}
        self._call.json({**head, "items": gone})

    def _options(self) -> Json:
        try:
            said = json.loads(self._body) if self._body.strip() else {}
        except ValueError:
            return {}  # typed clients send theirs as protobuf
        return said if isinstance(said, dict) else {}

    # --- objects ---

    def _object(self) -> Json:
        """The object in the body, made to agree with the path."""
        return self._placed(self._conforming(parseBody(self._call.header("content-type"), self._body, self._kind)))

    def _placed(self, new: Json) -> Json:
        kind = self._kind
        new = {**new, "apiVersion": kind.apiVersion, "kind": kind.kind, "metadata": dict(new["metadata"])}
        for field, said in (("namespace", self._target.namespace), ("name", self._target.name)):
            if said and new["metadata"].setdefault(field, said) != said:
                raise badRequest(f"the {field} of the provided object does not match the {field} sent on the URL")
        return new

    def _conforming(self, it: Json) -> Json:
        """
        As Go would read it: fields that it does not know are refused, warned of or passed over, as the client wishes.
        Where nothing is admitted or refused, everything is kept.
        """
        schema = schemaOf(self._kind)
        if self._api.admission is None or schema is None:
            return it
        said = self._call.query.get("fieldValidation") or "Warn"
        if said not in _DIRECTIVES:
            said = "Warn"
        what = f'{self._kind.kind} in version "{self._kind.version}" cannot be handled as a {self._kind.kind}'
        try:
            known, unknown = conform(schema, it)
        except Misfit as error:
            raise badRequest(f"{what}: {error}") from None
        if unknown and said == "Strict":
            texts = ", ".join(f'unknown field "{path}"' for path in unknown)
            raise badRequest(f"{what}: strict decoding error: {texts}")
        if unknown and said == "Warn":
            self._call.warn(*(f'unknown field "{path}"' for path in unknown))
        known.setdefault("metadata", {})
        return known

    def _admitted(self, new: Json, old: Json | None) -> Any:
        assert self._api.admission is not None
        return self._api.admission.admit(self._kind, new, old, self._target.subresource)
