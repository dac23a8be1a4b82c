"""
Events: written as ``events.k8s.io/v1``, shown as ``v1`` too, as kubectl asks for them; and what is checked of them
(kubernetes pkg/apis/core/validation/events.go).
"""

from __future__ import annotations

import re
from typing import Any

from .apiinvalid import Problems
from .apikinds import EVENTS, EVENTS_V1, Json
from .apistore import Event, Store

_QUALIFIED = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_SERIES = "series"


def checkEvent(new: Json, old: Json | None, problems: Problems) -> None:
    """Of one in ``events.k8s.io/v1``."""
    namespace, about = new["metadata"].get("namespace", ""), new.get("regarding") or {}
    wanted = (about["namespace"],) if about.get("namespace") else ("default", "kube-system")
    if namespace not in wanted:
        problems.invalid("regarding.namespace", about.get("namespace", ""), "does not match event.namespace")
    if not new.get("eventTime"):
        problems.required("eventTime")
    if not _QUALIFIED.fullmatch(new.get("reportingController", "")):
        problems.invalid("reportingController", new.get("reportingController", ""), "must be a qualified name")
    for field, most in (("reportingInstance", 128), ("action", 128), ("reason", 128)):
        _length(field, new.get(field, ""), most, problems)
        if not new.get(field):
            problems.required(field)
    _length("note", new.get("note", ""), 1024, problems)
    problems.oneOf("type", new.get("type", ""), ("Normal", "Warning"))
    series = new.get(_SERIES)
    if series is not None:
        if series.get("count", 0) < 2:
            problems.invalid("series.count", series.get("count"), "should be at least 2")
        if not series.get("lastObservedTime"):
            problems.required("series.lastObservedTime")
    for field in (set(old or ()) | set(new if old is not None else ())) - {"metadata", "kind", "apiVersion", _SERIES}:
        problems.same(field, (old or {}).get(field), new.get(field))


def _length(field: str, value: str, most: int, problems: Problems) -> None:
    if len(value.encode()) > most:
        problems.invalid(field, "", f"can have at most {most} characters")


def mirrorEvents(store: Store) -> None:
    """From now on, each Event in ``events.k8s.io/v1`` is there in ``v1`` as well."""

    def changed(event: Event) -> None:
        if event.kind is not EVENTS_V1:
            return
        if event.new is not None:
            store.apply(_asCore(event.new))
        elif event.key in store.objects(EVENTS):
            store.remove(EVENTS, *event.key)

    if {EVENTS, EVENTS_V1} <= set(store.kinds):
        store.subscribe(changed)


def _asCore(it: Json) -> Json:
    meta = {name: value for name, value in it["metadata"].items() if name in ("name", "namespace", "uid")}
    core: dict[str, Any] = {"apiVersion": "v1", "kind": "Event", "metadata": meta, "source": {}}
    core |= {"involvedObject": it.get("regarding", {}), "message": it.get("note", "")}
    core |= {"reportingComponent": it.get("reportingController", "")}
    fields = ("eventTime", "reportingInstance", "action", "reason", "type", _SERIES)
    return core | {field: it[field] for field in fields if field in it}
