"""Bytes in, bytes out: the fake API server without a network, for tests that look at what is on the wire."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from msgspec import Struct
from twisted.internet.testing import StringTransport
from twisted.web.server import Site

from .apiserver import FakeApi


class Answer(Struct):
    """
    One HTTP answer.

    :ivar headers: lower-case names.
    :ivar chunks: of the body; one where it is not chunked.
    :ivar complete: whether all of the body is there, its last chunk included.
    """

    code: int
    headers: dict[str, str]
    chunks: list[bytes]
    complete: bool

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Type and object of each event of a watch."""
        return [(it["type"], it["object"]) for it in map(json.loads, self.body.splitlines())]


def parse(data: bytes) -> Answer:
    """The first answer in what was received."""
    head, _, rest = data.partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    code = int(line.split()[1])
    if headers.get("transfer-encoding") != "chunked":
        length = int(headers["content-length"])
        return Answer(code, headers, [rest[:length]], len(rest) >= length)
    chunks: list[bytes] = []
    while b"\r\n" in rest:
        said, _, rest = rest.partition(b"\r\n")
        size = int(said, 16)
        if size == 0:
            return Answer(code, headers, chunks, True)
        chunks.append(rest[:size])
        rest = rest[size + 2 :]
    return Answer(code, headers, chunks, False)


class Wire:
    """
    A connection to a :class:`~tests.fakes.apiserver.FakeApi`.

    :param token: sent as bearer token.
    """

    def __init__(self, api: FakeApi, token: str = "") -> None:
        self._token = token
        self.transport: Any = StringTransport()  # type: ignore[no-untyped-call]
        self._protocol: Any = Site(api.resource, reactor=api.reactor).buildProtocol(None)  # type: ignore[no-untyped-call]
        self._protocol.makeConnection(self.transport)

    def raw(self, data: bytes) -> Wire:
        """Send bytes."""
        self._protocol.dataReceived(data)
        return self

    def send(
        self,
        path: str,
        query: dict[str, Any] | None = None,
        method: str = "GET",
        body: Any = None,
        contentType: str = "application/json",
        **headers: str,
    ) -> Wire:
        """Send a request; what is not bytes goes as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path}{'?' + urlencode(query) if query else ''} HTTP/1.1", "Host: api.example.test"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if self._token:
            lines.append(f"Authorization: Bearer {self._token}")
        if body is not None:
            lines += [f"Content-Type: {contentType}", f"Content-Length: {len(data)}"]
        self.transport.clear()
        return self.raw("\r\n".join([*lines, "", ""]).encode() + data)

    @property
    def answer(self) -> Answer:
        """What has come so far."""
        return parse(self.transport.value())

    @property
    def answered(self) -> bool:
        return bool(self.transport.value())

    def lose(self) -> None:
        """The client is gone."""
        from twisted.internet.error import ConnectionLost
        from twisted.python.failure import Failure

        self._protocol.connectionLost(Failure(ConnectionLost()))  # type: ignore[no-untyped-call]
