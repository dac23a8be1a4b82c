"""
A backend for tests: says who it is and who asks, over TCP, HTTP and UDP; or misbehaves.

``python -m tests.fakes.backends --name p0a --tcp 0.0.0.0:8080 --tcp '[::]:8080' --udp 0.0.0.0:53 --http 0.0.0.0:80``
prints ``ready`` when it listens, and ends at SIGTERM. IPv6 sockets take no IPv4.

- HTTP answers every request with ``NAME ADDRESS:PORT`` and a newline, then the request's body; keep-alive as asked.
- UDP answers ``NAME ADDRESS:PORT `` and the datagram.
- TCP does as ``--mode`` says:

  ``line``              each line is answered by ``NAME ADDRESS:PORT LINE``
  ``echo``              bytes go back as they are
  ``greet``             says ``NAME ADDRESS:PORT`` at once, then closes
  ``accept-and-stall``  neither reads nor writes
  ``rst``               resets the connection at once
  ``rst-on-data``       resets it when the first bytes come
  ``half-close-reply``  reads to the end, then says ``NAME ADDRESS:PORT BYTES SHA256`` and closes
  ``sink``              reads and says nothing
  ``slow``              like ``line``, but answers one byte per ``--slow-seconds``
  ``source``            sends ``--bytes`` bytes (0: without end), then closes

  UDP is silent in the modes accept-and-stall, rst, rst-on-data and sink. HTTP obeys accept-and-stall, rst,
  rst-on-data, sink and slow.

Plain sockets, one thread: it starts fast and holds thousands of connections.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

MODES = (
    "line", "echo", "greet", "accept-and-stall", "rst", "rst-on-data", "half-close-reply", "sink", "slow", "source",
)  # fmt: skip
CHUNK = 65536
PATTERN = bytes(range(256)) * 256  # what a source sends, over and over
HIGH_WATER = 1 << 20


class Server:
    """All sockets of the program."""

    def __init__(self, name: str, mode: str, slow: float, count: int) -> None:
        self.name = name
        self.mode = mode
        self.slow = slow
        self.count = count
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._running = True

    def listen(self, address: str, kind: str) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        it = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        it.bind((host, int(port)))
        it.setblocking(False)
        if kind == "udp":
            self.watch(it, selectors.EVENT_READ, lambda _: self._datagrams(it))
        else:
            it.listen(4096)
            self.watch(it, selectors.EVENT_READ, lambda _: self._accept(it, Http if kind == "http" else Tcp))

    def watch(self, it: socket.socket, events: int, what: Callable[[int], None]) -> None:
        """Call when the socket is ready for these; 0 for not now."""
        known = it in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(it)
        elif known:
            self._selector.modify(it, events, what)
        else:
            self._selector.register(it, events, what)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), what))

    def run(self) -> None:
        while self._running:
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(wait):
                key.data(events)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def stop(self, *_: object) -> None:
        self._running = False

    def _accept(self, listener: socket.socket, kind: type[Tcp]) -> None:
        for _ in range(64):
            try:
                it, peer = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors: take a breath instead of spinning
                print(error, file=sys.stderr, flush=True)
                self.watch(listener, 0, lambda _: None)
                self.later(
                    0.1, lambda: self.watch(listener, selectors.EVENT_READ, lambda _: self._accept(listener, kind))
                )
                return
            it.setblocking(False)
            it.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind(self, it, peer).begin()

    def _datagrams(self, it: socket.socket) -> None:
        for _ in range(64):
            try:
                data, peer = it.recvfrom(65535)
            except (BlockingIOError, ConnectionRefusedError):
                return
            if self.mode in ("accept-and-stall", "sink", "rst", "rst-on-data"):
                continue
            answer = f"{self.name} {spell(peer)} ".encode() + data

            def send(answer: bytes = answer, peer: Any = peer) -> None:
                try:
                    it.sendto(answer[:65507], peer)
                except OSError as error:
                    print(f"{spell(peer)}: {error}", file=sys.stderr, flush=True)

            if self.mode == "slow":
                self.later(self.slow, send)
            else:
                send()


class Tcp:
    """One connection."""

    def __init__(self, server: Server, it: socket.socket, peer: Any) -> None:
        self.server = server
        self.socket = it
        self.who = f"{server.name} {spell(peer)}"
        self.out = bytearray()
        self.rest = b""
        self.ended = False  # the other side has said all
        self.closing = False  # close once everything is written
        self.closed = False
        self.read = 0
        self.digest = hashlib.sha256()
        self.left = server.count if server.count else -1
        self.waiting = False

    def begin(self) -> None:
        mode = self.server.mode
        if mode == "rst":
            self.reset()
            return
        if mode == "accept-and-stall":
            STALLED.append(self)  # kept, or the socket would be closed
            return
        if mode == "greet":
            self.out += f"{self.who}\n".encode()
            self.closing = True
        self.pump()

    def ready(self, events: int) -> None:
        if events & selectors.EVENT_READ:
            try:
                data = self.socket.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            if data:
                self.received(data)
            else:
                self.ended = True
                self.finished()
        self.pump()

    def received(self, data: bytes) -> None:
        mode = self.server.mode
        if mode == "rst-on-data":
            self.reset()
        elif mode == "echo":
            self.out += data
        elif mode == "half-close-reply":
            self.read += len(data)
            self.digest.update(data)
        elif mode in ("line", "slow"):
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self.out += f"{self.who} ".encode() + line.rstrip(b"\r") + b"\n"

    def finished(self) -> None:
        """The other side has said all."""
        if self.server.mode == "half-close-reply":
            self.out += f"{self.who} {self.read} {self.digest.hexdigest()}\n".encode()
        if self.server.mode != "source":
            self.closing = True

    def pump(self) -> None:
        """Write what can be written, and wait for what comes next."""
        if self.closed:
            return
        if self.server.mode == "source":
            self.refill()
        slow = self.server.mode == "slow"
        if self.out and not (slow and self.waiting):
            try:
                sent = self.socket.send(self.out[:1] if slow else self.out)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            del self.out[:sent]
            if slow and sent:
                self.waiting = True
                self.server.later(self.server.slow, self.awake)
        if self.closing and not self.out:
            self.close()
            return
        events = 0 if self.ended or len(self.out) > HIGH_WATER else selectors.EVENT_READ
        if (self.out or self.server.mode == "source") and not self.waiting:
            events |= selectors.EVENT_WRITE
        self.server.watch(self.socket, events, self.ready)

    def awake(self) -> None:
        self.waiting = False
        self.pump()

    def refill(self) -> None:
        while self.left and len(self.out) < CHUNK:
            piece = PATTERN if self.left < 0 else PATTERN[: self.left]
            self.out += piece
            self.left -= len(piece) if self.left > 0 else 0
        if not self.left:
            self.closing = True

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.server.watch(self.socket, 0, self.ready)
            self.socket.close()


class Http(Tcp):
    """One HTTP connection: no chunked request bodies."""

    def received(self, data: bytes) -> None:
        if self.server.mode in ("rst-on-data", "sink"):
            if self.server.mode == "rst-on-data":
                self.reset()
            return
        self.rest += data
        while not self.closing and (end := self.rest.find(b"\r\n\r\n")) >= 0:
            line, *headers = self.rest[:end].decode("latin-1").split("\r\n")
            fields = {name.strip().lower(): value.strip() for name, _, value in (it.partition(":") for it in headers)}
            length = int(fields.get("content-length", 0))
            if len(self.rest) < end + 4 + length:
                return
            body = self.rest[end + 4 : end + 4 + length]
            self.rest = self.rest[end + 4 + length :]
            said = fields.get("connection", "").lower()
            keep = said != "close" if line.endswith("HTTP/1.1") else said == "keep-alive"
            answer = f"{self.who}\n".encode() + body
            self.out += (
                f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(answer)}\r\n"
                f"X-Backend: {self.server.name}\r\nConnection: {'keep-alive' if keep else 'close'}\r\n\r\n"
            ).encode()
            if not line.startswith("HEAD "):
                self.out += answer
            self.closing = not keep


STALLED: list[Tcp] = []


def spell(peer: Any) -> str:
    """``1.2.3.4:5`` or ``[fd00::1]:5``."""
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.backends")
    parser.add_argument("--name", required=True)
    for kind in ("tcp", "http", "udp"):
        parser.add_argument(f"--{kind}", f"--{kind}6", action="append", default=[], metavar="ADDRESS:PORT")
    parser.add_argument("--mode", choices=MODES, default="line")
    parser.add_argument("--slow-seconds", type=float, default=1.0)
    parser.add_argument("--bytes", type=int, default=0, help="how much a source sends")
    options = parser.parse_args(argv)
    server = Server(options.name, options.mode, options.slow_seconds, options.bytes)
    for kind in ("tcp", "http", "udp"):
        for address in getattr(options, kind):
            try:
                server.listen(address, kind)
            except OSError as error:
                print(f"cannot listen on {kind} {address}: {error.strerror or error}", file=sys.stderr)
                return 1
    signal.signal(signal.SIGTERM, server.stop)
    # A signal must interrupt select(), which Python would otherwise go on with after calling our function.
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno())
    server.watch(reading, selectors.EVENT_READ, server.stop)
    print("ready", flush=True)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
