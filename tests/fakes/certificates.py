"""Throw-away certificates for a fake API server and its clients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from twisted.internet import ssl

from . import pki


class Pair(Struct, frozen=True):
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class Authority(pki.Authority):
    """Signs for servers and clients, and makes a server's TLS context."""

    def server(self, hosts: Sequence[str]) -> Pair:
        """For a server of these names and addresses."""
        return Pair(*self.issue("kube-apiserver", *hosts))

    def client(self, name: str = "system:node-proxier") -> Pair:
        """For a user: the API server takes the common name as the user's."""
        return Pair(*self.issue(name))

    def serverContext(self, pair: Pair, requireCertificate: bool = False) -> Any:
        """
        For :meth:`tests.fakes.apiserver.FakeApi.listen`: asks clients for a certificate of this authority.

        :param requireCertificate: refuse those who have none.
        """
        return _context(pair.certificate, pair.key, self.certificate, requireCertificate)

    def write(self, folder: str, hosts: Sequence[str], client: str = "system:node-proxier") -> None:
        """Leave ``ca.crt``, ``server.crt``, ``server.key``, ``client.crt`` and ``client.key`` in a folder."""
        files = {"ca.crt": self.certificate}
        for name, pair in (("server", self.server(hosts)), ("client", self.client(client))):
            files |= {f"{name}.crt": pair.certificate, f"{name}.key": pair.key}
        for name, data in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)


def contextFrom(folder: str, requireCertificate: bool = False) -> Any:
    """A server's context from the files that :meth:`Authority.write` has left."""
    data = []
    for name in ("server.crt", "server.key", "ca.crt"):
        with open(os.path.join(folder, name), "rb") as file:
            data.append(file.read())
    return _context(data[0], data[1], data[2], requireCertificate)


def _context(certificate: bytes, key: bytes, authority: bytes, requireCertificate: bool) -> Any:
    own = ssl.PrivateCertificate.loadPEM(certificate + key)  # type: ignore[no-untyped-call]
    return ssl.CertificateOptions(
        privateKey=own.privateKey.original,
        certificate=own.original,
        verify=True,
        requireCertificate=requireCertificate,
        caCerts=[ssl.Certificate.loadPEM(authority).original],
    )
