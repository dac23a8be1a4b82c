"""Recorded conversations with real API servers, as the client's tests replay them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import structs

from twisted_kproxy.core import wire
from twisted_kproxy.core.values import Kind

WATCHES = Path(__file__).parent.parent / "fixtures" / "apiserver" / "v1.36" / "watches"


class Recording:
    """
    One watch.

    :ivar response: the answer as it was received, with its headers and chunk framing.
    :ivar body: without them.
    :ivar start: the answer to the list from which it starts, ``b""`` where it starts from nothing.
    :ivar segments: the answer in the pieces in which it was received.
    :ivar expected: events and final state.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind: Kind = "Service"
        if name.startswith("endpointslices"):
            self.kind = "EndpointSlice"
        elif name.startswith("node"):
            self.kind = "Node"
        self.response = (WATCHES / f"{name}.response").read_bytes()
        self.body = bodyOf(self.response)
        start = WATCHES / f"{name}.start.response"
        self.start = start.read_bytes() if start.exists() else b""
        timing = json.loads((WATCHES / f"{name}.timing.json").read_text())
        self.segments = [self.response[it["offset"] : it["offset"] + it["length"]] for it in timing["recv"]]
        expected = WATCHES / f"{name}.expected.json"
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


def names() -> list[str]:
    """The recordings of watches whose end is known."""
    return sorted(path.name.removesuffix(".expected.json") for path in WATCHES.glob("*.expected.json"))


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
