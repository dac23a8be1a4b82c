"""
TLS with an API server: who it must prove to be, who we prove to be, certificates that rotate, and what to say when it
fails.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509, PKey
from service_identity import VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IReactorTime
from twisted.internet.ssl import Certificate, CertificateOptions, platformTrust, trustRootFromCertificates
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from ..interfaces import NotAvailable
from ..redaction import hide
from .certificates import certificatesIn, issuer, keyPair, moment, namesOf, subject, validity
from .credentials import ApiAccess, timeOfDay

#: Seconds after which certificate files are read again; at once after a failure.
RELOAD_AGE = 60.0
#: Seconds after which files that are of no use are tried again: they may be just being written.
RETRY_AGE = 10.0

# verify(1): what OpenSSL thinks of a certificate.
_EXPIRED, _NOT_YET = (10, 12), (9, 11)
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
_OTHERWISE = {
    7: "its signature is wrong", 22: "its chain is too long", 24: "a certificate in its chain is no authority's",
    26: "it is not meant for servers", 66: "its key is too weak", 68: "its signature algorithm is too weak",
}


@implementer(IOpenSSLClientConnectionCreator)
class TlsAttempt:
    """
    Makes one TLS connection, and knows afterwards why it failed.

    :param context: has the authorities that count.
    :param name: what the server must prove to be.
    :param insecure: do not ask for proof.
    :param us: our client certificate, ``None`` where we have none.
    :param trusted: the authorities in words.
    :ivar alerted: after :meth:`explained`: it was the server that ended it, while we have a client certificate.
    """

    def __init__(
        self,
        context: SSL.Context,
        name: str,
        insecure: bool,
        us: x509.Certificate | None,
        trusted: str,
        wall: Callable[[], float] = timeOfDay,
    ) -> None:
        self._context = context
        self._name = name
        self._insecure = insecure
        self._us = us
        self._trusted = trusted
        self._wall = wall
        self._fault = ""
        self.alerted = False

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        connection = SSL.Connection(self._context, None)
        if not isAddress(self._name):
            connection.set_tlsext_host_name(self._name.encode("ascii"))
        if self._insecure:
            connection.set_verify(SSL.VERIFY_NONE)
        else:
            connection.set_verify(SSL.VERIFY_PEER, self._judge)
        return connection

    def _judge(self, connection: SSL.Connection, certificate: X509, code: int, depth: int, good: int) -> bool:
        """OpenSSL asks this for each certificate of the chain, the server's own last."""
        try:
            if not good:
                self._fault = self._fault or self._chainFault(certificate.to_cryptography(), code, depth)
                return False
            return depth != 0 or self._isIt(certificate.to_cryptography())
        except Exception as error:  # what cannot be understood is not trusted
            self._fault = self._fault or f"the server's certificate cannot be understood: {type(error).__name__}"
            return False

    def _isIt(self, certificate: x509.Certificate) -> bool:
        verify = verify_certificate_ip_address if isAddress(self._name) else verify_certificate_hostname
        try:
            verify(certificate, self._name)
        except VerificationError:
            found = namesOf(certificate)
        except Exception:
            # service-identity's words for a certificate without any name; a DNS name may be none for it, too
            found = namesOf(certificate)
        else:
            return True
        self._fault = (
            f"the server's certificate is for another name or address: it is for {found}, not for {self._name}; "
            "reach the server by one of these, or set tls-server-name to one, or have the certificate issued anew"
        )
        return False

    def _chainFault(self, certificate: x509.Certificate, code: int, depth: int) -> str:
        whose = "the server's certificate" if depth == 0 else "the authority's certificate"
        who = f"{whose} ({subject(certificate)}, issued by {issuer(certificate)})"
        if code in _EXPIRED or code in _NOT_YET:
            fault = validity(certificate, self._wall()) or "is not valid at this time: is this node's clock right?"
            return f"certificate verify failed: {who} {fault}"
        if code in _UNKNOWN_ISSUER:
            return (
                f"certificate verify failed: {who} was not issued by an authority that counts, {self._trusted}; "
                "give the certificate of its authority"
            )
        return f"certificate verify failed: {who}: {_OTHERWISE.get(code, f'OpenSSL says {code}, see verify(1)')}"

    def explained(self, error: BaseException | None) -> str:
        """Why TLS failed, and what to do; ``""`` where it is not TLS that failed."""
        if self._fault:
            return self._fault
        found = _sslError(error)
        if found is None:
            return ""
        told = found.args[0] if found.args and isinstance(found.args[0], list) else []
        said = "; ".join(dict.fromkeys(str(it[-1]) for it in told if it)) or type(found).__name__
        if "protocol version" in said or "unsupported protocol" in said:
            return f"the server speaks no TLS 1.2 or newer ({said})"
        if "alert" in said:
            return self._alerted(said)
        if any(it in said for it in ("wrong version number", "http request", "packet length too long", "record")):
            return f"what answers there does not speak TLS ({said}): is the port right?"
        return said

    def _alerted(self, said: str) -> str:
        if self._us is None:
            hint = ""
            if "certificate" in said or "handshake failure" in said:
                hint = ": it may want a client certificate, and there is none"
            return f"the server ended it ({said}){hint}"
        self.alerted = True
        fault = validity(self._us, self._wall())
        until = fault or f"is valid until {moment(self._us.not_valid_after_utc)}"
        ours = f"our client certificate ({subject(self._us)}, issued by {issuer(self._us)}) {until}"
        return f"the server ended it ({said}); {ours}"


def _sslError(error: BaseException | None) -> SSL.Error | None:
    """The error of OpenSSL at the bottom of what the HTTP client says."""
    if error is None or isinstance(error, SSL.Error):
        return error
    causes = [getattr(it, "value", it) for it in getattr(error, "reasons", ())]
    for cause in (*causes, error.__cause__):
        found = _sslError(cause)
        if found is not None:
            return found
    return None


def isAddress(host: str) -> bool:
    """Whether this is an IP address rather than a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return True
    return False


class _Material:
    """Certificates and key as they were last read, and the contexts made of them."""

    def __init__(self, access: ApiAccess, read: tuple[bytes, ...], origins: tuple[str, str]) -> None:
        self.read = read
        ca = access.certificateAuthority
        self.authorities = [] if ca is None else certificatesIn(read[0], ca.origin)
        self.chain: list[x509.Certificate] = []
        extra: dict[str, Any] = {}
        if read[1] or read[2]:
            self.chain, key = keyPair(read[1], read[2], *origins)
            hide(read[2].decode("latin-1"))
            extra["privateKey"] = PKey.from_cryptography_key(key)
            extra["certificate"] = X509.from_cryptography(self.chain[0])
            extra["extraCertChain"] = [X509.from_cryptography(it) for it in self.chain[1:]]
        if access.insecure:
            trust: dict[str, Any] = {}
        elif ca is None:
            trust = {"trustRoot": platformTrust()}  # type: ignore[no-untyped-call]
        else:
            anchors = [Certificate(X509.from_cryptography(it)) for it in self.authorities]  # type: ignore[no-untyped-call]
            trust = {"trustRoot": trustRootFromCertificates(anchors)}  # type: ignore[no-untyped-call]
        self.context = _context({**trust, **extra})
        self._trust = trust
        self._bare: SSL.Context | None = None

    def bare(self) -> SSL.Context:
        """One without client certificate, which is nothing for a proxy to see."""
        if self._bare is None:
            self._bare = _context(self._trust)
        return self._bare


def _context(options: dict[str, Any]) -> SSL.Context:
    context: SSL.Context = CertificateOptions(**options).getContext()
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    return context


@implementer(IPolicyForHTTPS)
class TlsPolicy:
    """
    TLS as an access asks for it. Certificate files are read again once they were last read a minute ago, and after a
    failure, so that they may rotate; new ones that cannot be used leave the old ones in use.

    :param clock: without one, files are read again for each connection.
    :param pair: gives certificate and key that do not come from files.
    :ivar changed: called when the client certificate has become another one.
    :raise NotAvailable: naming the file or field.
    """

    log = Logger()

    def __init__(
        self,
        access: ApiAccess,
        clock: IReactorTime | None = None,
        pair: Callable[[], tuple[bytes, bytes] | None] = lambda: None,
        wall: Callable[[], float] = timeOfDay,
    ) -> None:
        self._access = access
        self._clock = clock
        self._pair = pair
        self._wall = wall
        self._due = 0.0
        self._fault = ""
        self.changed: Callable[[], None] = lambda: None
        self._material = self._load(None)

    @property
    def rotates(self) -> bool:
        """Whether the client certificate may become another one by itself."""
        pem = self._access.clientCertificate
        return pem is not None and bool(pem.path)

    def creatorForNetloc(self, hostname: bytes, port: int) -> TlsAttempt:
        """What makes one TLS connection to the API server at that host."""
        self.refresh()
        return self._attempt(self._access.tlsServerName or hostname.decode("ascii"), True)

    def creatorForProxy(self, hostname: str) -> TlsAttempt:
        """What makes one TLS connection to a proxy, which the same authorities vouch for."""
        self.refresh()
        return self._attempt(hostname, False)

    def _attempt(self, name: str, isServer: bool) -> TlsAttempt:
        it = self._material
        trusted = "the platform's"
        if it.authorities:
            ca = self._access.certificateAuthority
            names = ", ".join(dict.fromkeys(subject(each) for each in it.authorities[:4]))
            trusted = f"those of {ca.origin if ca else ''}: {names}"
        us = it.chain[0] if it.chain and isServer else None
        context = it.context if isServer else it.bare()
        return TlsAttempt(context, name, self._access.insecure, us, trusted, self._wall)

    def expire(self) -> None:
        """Something failed that other certificates may mend: read the files again before the next connection."""
        self._due = 0.0

    def refresh(self) -> None:
        """Read the files again where that is due."""
        now = self._clock.seconds() if self._clock is not None else 0.0
        pair = self._pair()
        given = self._access.exec is None or (pair or (b"", b"")) == self._material.read[1:]
        if now < self._due and given:
            return
        before = self._material
        try:
            self._material = self._load(before)
        except NotAvailable as error:
            self._due = now + RETRY_AGE
            if str(error) != self._fault:
                self.log.warn("The last certificates stay in use: {error}", error=str(error))
            self._fault = str(error)
            return
        self._fault = ""
        if before.chain and self._material.read[1:] != before.read[1:]:
            self.log.info("The client certificate is a new one: {what}", what=self._ours())
            self.changed()

    def _load(self, before: _Material | None) -> _Material:
        access = self._access
        pems = (access.certificateAuthority, access.clientCertificate, access.clientKey)
        read = tuple(b"" if pem is None else pem.read() for pem in pems)
        origins = tuple("" if pem is None else pem.origin for pem in pems)
        pair = self._pair()
        if pair is not None:
            read = (read[0], *pair)
            origins = ("", "the exec plugin's certificate", "the exec plugin's key")
        if self._clock is not None:
            self._due = self._clock.seconds() + RELOAD_AGE
        if before is not None and read == before.read:
            return before
        made = _Material(access, read, (origins[1], origins[2]))
        for fault in _overdue(access, made, self._wall()):
            self.log.warn("{fault}", fault=fault)
        return made

    def faults(self) -> list[str]:
        """Certificates that are not valid at this time of day, a line each."""
        return _overdue(self._access, self._material, self._wall())

    def _ours(self) -> str:
        own = self._material.chain[0]
        return f"{subject(own)}, valid until {moment(own.not_valid_after_utc)}"

    def status(self) -> dict[str, str]:
        """JSON-able facts for operators."""
        return {"clientCertificate": self._ours()} if self._material.chain else {}


def _overdue(access: ApiAccess, material: _Material, now: float) -> list[str]:
    faults = []
    ca, own = access.certificateAuthority, access.clientCertificate
    # One authority that ends is of no matter while there is another in the bundle: bundles rotate that way.
    ended = [fault for it in material.authorities if (fault := validity(it, now))]
    if ca is not None and len(ended) == len(material.authorities):
        faults.append(f"{ca.origin}: the certificate {ended[0]}")
    if material.chain and (fault := validity(material.chain[0], now)):
        faults.append(f"{own.origin if own else 'the exec plugin'}: the client certificate {fault}")
    return faults
