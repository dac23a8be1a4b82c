"""Recorded conversations with real API servers, as the client's tests replay them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from msgspec import structs

from twisted_kproxy.core import wire
from twisted_kproxy.core.values import Kind
from twisted_kproxy.sources.client import Resource

ROOT = Path(__file__).parent.parent / "fixtures" / "apiserver"
WATCHES = ROOT / "v1.36" / "watches"
KINDS: dict[str, Kind] = {
    "services": "Service", "endpointslices": "EndpointSlice", "endpoints": "Endpoints", "nodes": "Node",
}


class Recorded:
    """
    One answer.

    :param name: with the folders, as ``v1.36/lists/services-rv0``.
    :ivar response: as it was received, with its headers and chunk framing.
    :ivar path: that was asked for.
    :ivar query: that was asked.
    :ivar pieces: the answer as it was received: seconds since the request, bytes.
    :ivar cut: seconds after which the connection ended before the answer did; ``None`` where it did not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.response = (ROOT / f"{name}.response").read_bytes()
        target = (ROOT / f"{name}.request").read_text("latin-1").split(" ", 2)[1]
        self.path = urlsplit(target).path
        self.query = dict(parse_qsl(urlsplit(target).query, keep_blank_values=True))
        self.pieces: list[tuple[float, bytes]] = [(0.0, self.response)]
        self.cut: float | None = None
        timing = ROOT / f"{name}.timing.json"
        if timing.exists():
            told = json.loads(timing.read_text())
            cut = [(it["seconds"], self.response[it["offset"] : it["offset"] + it["length"]]) for it in told["recv"]]
            self.pieces = [it for it in cut if it[1]]
            if told["end"] != "complete":
                self.cut = told["recv"][-1]["seconds"]

    @property
    def body(self) -> bytes:
        """Without headers, framing and coding; of one that was cut, what there is."""
        body = bodyOf(self.response)
        return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def resource(self) -> Resource:
        """What was asked for, as a client of ours asks for it."""
        return Resource(
            KINDS[self.path.rpartition("/")[2]], self.path,
            self.query.get("labelSelector", ""), self.query.get("fieldSelector", ""),
        )


class Recording:
    """
    One watch.

    :ivar response: the answer as it was received, with its headers and chunk framing.
    :ivar body: without them.
    :ivar start: the answer to the list from which it starts, ``b""`` where it starts from nothing.
    :ivar segments: the answer in the pieces in which it was received.
    :ivar expected: events and final state.
    """

    def __init__(self, name: str, version: str = "v1.36") -> None:
        self.name = f"{version}/watches/{name}"
        self.recorded = Recorded(self.name)
        self.kind = self.recorded.resource.kind
        self.response = self.recorded.response
        self.body = self.recorded.body
        self.segments = [data for _, data in self.recorded.pieces]
        start = ROOT / f"{self.name}.start.response"
        self.start = start.read_bytes() if start.exists() else b""
        expected = ROOT / f"{self.name}.expected.json"
        self.expected: dict[str, Any] = json.loads(expected.read_text()) if expected.exists() else {}

    def final(self) -> dict[str, Any]:
        """What a client must hold in the end, as far as a list after the watch told; see :func:`comparable`."""
        state = {}
        for key, fields in self.expected["final"].items():
            namespace, _, name = key.rpartition("/")
            metadata = {
                "name": name,
                "namespace": namespace or None,
                **{field: fields[field] for field in ("uid", "resourceVersion", "labels") if field in fields},
            }
            state[key] = comparable(wire.convert(self.kind, {**fields, "metadata": metadata}))
        return state

    @property
    def last(self) -> str:
        """The resource version to watch from once it has ended."""
        return max([self.expected["lastEventResourceVersion"],
                    *(it["resourceVersion"] for it in self.expected["bookmarks"])], key=int)


def names(version: str = "v1.36") -> list[str]:
    """The recordings of watches whose end is known."""
    found = (ROOT / version / "watches").glob("*.expected.json")
    return sorted(path.name.removesuffix(".expected.json") for path in found)


def everyName() -> list[str]:
    """Every recording there is."""
    return sorted(str(path.relative_to(ROOT)).removesuffix(".response") for path in ROOT.rglob("*.response"))


def comparable(it: Any) -> dict[str, Any]:
    """Every field that is read of an object, save those of its metadata that the recordings do not keep."""
    metadata = it.metadata
    return {
        **structs.asdict(it),
        "metadata": (metadata.name, metadata.namespace, metadata.uid, metadata.resourceVersion, metadata.labels),
    }


def bodyOf(response: bytes) -> bytes:
    """The body of a recorded answer, whether it came in chunks or at once."""
    head, _, rest = response.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    parts = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return b"".join(parts)
