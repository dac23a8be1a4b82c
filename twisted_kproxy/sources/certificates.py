"""Certificates and keys in PEM: what they are, what is wrong with them, and what to call them in a message."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from ..interfaces import NotAvailable
from .errors import short

#: More alternative names of a certificate than this are only counted.
MOST_NAMES = 8


def certificatesIn(data: bytes, origin: str) -> list[x509.Certificate]:
    """
    Every certificate in a PEM text.

    :param origin: what to call it in errors.
    :raise NotAvailable: where there is none, or one that cannot be read.
    """
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise NotAvailable(f"{origin}: there is no certificate in PEM in it")
    try:
        return x509.load_pem_x509_certificates(data)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm):
        raise NotAvailable(f"{origin}: a certificate in it cannot be read: the PEM is damaged")


def keyPair(certificate: bytes, key: bytes, origin: str, keyOrigin: str) -> tuple[list[x509.Certificate], Any]:
    """
    A certificate with those above it, and its private key.

    :raise NotAvailable: where one of them cannot be read, or they do not belong together.
    """
    chain = certificatesIn(certificate, origin)
    try:
        private: Any = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Not the library's words: they may quote what they could not read.
        raise NotAvailable(f"{keyOrigin}: it is not a private key in PEM without a password")
    if _public(private.public_key()) != _public(chain[0].public_key()):
        raise NotAvailable(f"{keyOrigin}: it does not belong to {origin}")
    return chain, private


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def validity(certificate: x509.Certificate, now: float) -> str:
    """
    What is wrong with its time, in words; ``""`` where nothing is.

    :param now: the time of day.
    """
    here = datetime.fromtimestamp(now, UTC)
    if here > certificate.not_valid_after_utc:
        return (
            f"expired on {moment(certificate.not_valid_after_utc)}, and this node's clock says {moment(here)}: "
            "renew it, or set the clock right"
        )
    if here < certificate.not_valid_before_utc:
        return (
            f"is valid only from {moment(certificate.not_valid_before_utc)} on, and this node's clock says "
            f"{moment(here)}: is the clock wrong?"
        )
    return ""


def moment(when: datetime) -> str:
    """A moment for people: UTC, to the minute."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def subject(certificate: x509.Certificate) -> str:
    """What it calls itself."""
    return _called(certificate.subject)


def issuer(certificate: x509.Certificate) -> str:
    """Who has issued it, as it says."""
    return _called(certificate.issuer)


def _called(name: x509.Name) -> str:
    common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    value = common[0].value if common else name.rfc4514_string()
    text = value if isinstance(value, str) else value.decode("utf-8", "replace")
    return short(text.encode("utf-8", "replace")) or "(no name)"


def namesOf(certificate: x509.Certificate) -> str:
    """The names and addresses that it is good for, in words."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        found = []
    if not found:
        return "no name or address at all (its subject does not count)"
    return _listed([short(it.encode("utf-8", "replace")) for it in found])


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names[:MOST_NAMES])
    return text if len(names) <= MOST_NAMES else f"{text} and {len(names) - MOST_NAMES} more"
