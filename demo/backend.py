"""
A backend for the demonstration: answers HTTP and UDP with its name, on every address of its namespace.

Usage: backend.py NAME PORT
"""

from __future__ import annotations

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answer(BaseHTTPRequestHandler):
    """Every path is answered with one line: who answers, and whom it saw."""

    protocol_version = "HTTP/1.1"
    name = ""

    def do_GET(self) -> None:
        host = self.client_address[0].removeprefix("::ffff:")
        body = f"{self.name} answers {host}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """One socket for both families."""

    address_family = socket.AF_INET6
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def answerDatagrams(name: str, port: int) -> None:
    """Echo each datagram behind the backend's name."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    while True:
        data, client = sock.recvfrom(65535)
        sock.sendto(name.encode() + b" echoes " + data, client)


def main() -> None:
    Answer.name, port = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=answerDatagrams, args=(Answer.name, port), daemon=True).start()
    server = Server(("::", port), Answer)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
