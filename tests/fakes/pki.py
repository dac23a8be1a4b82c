"""A certificate authority for tests, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


class Authority:
    """
    :param days: from now until it and what it signs ends; each is good for two days. Negative where they are over.
    :ivar certificate: its own, in PEM.
    """

    def __init__(self, name: str = "test authority", days: float = 1) -> None:
        self._days = days
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.certificate = self._sign(self._name, self._key.public_key(), authority=True)

    def issue(
        self, name: str, *alternatives: str, password: bytes = b"", days: float | None = None
    ) -> tuple[bytes, bytes]:
        """
        A certificate and its key, in PEM.

        :param alternatives: DNS names and addresses that it is good for.
        :param days: from now until it ends, where that is not the authority's; 3 for one that begins tomorrow.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for it in alternatives:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(it)))
            except ValueError:
                names.append(x509.DNSName(it))
        certificate = self._sign(_name(name), key.public_key(), names, days=days)
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        return certificate, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, names: list[x509.GeneralName] | None = None,
        authority: bool = False, days: float | None = None,
    ) -> bytes:
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=self._days if days is None else days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - datetime.timedelta(days=2))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
