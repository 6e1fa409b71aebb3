"""Certificates: reads what operators need to know about them, and issues new ones. The only user of cryptography.

New ones are as SECURITY.md makes them with openssl: P-256, a CA that signs certificates and nothing else, names in
subjectAltName alone.
"""

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS = 3650
# A clock that is a little behind takes the certificate too.
_BEFORE = timedelta(minutes=5)
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class Certificate(msgspec.Struct, frozen=True):
    """One certificate: its subject, when it is good, and the names and addresses that it is for."""

    subject: str
    not_before: datetime
    not_after: datetime
    names: frozenset[str]


class Issued(NamedTuple):
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


class Use(Enum):
    """What a certificate is for: to be an agent, or a client of one."""

    AGENT = ExtendedKeyUsageOID.SERVER_AUTH
    CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH


class Authority:
    """A CA; `issued` is its own certificate and key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.issued = _format(certificate, key)

    def issue(self, names: Sequence[str], use: Use, *, days: int) -> Issued:
        """Return a certificate for host names and addresses.

        Raises:
            ValueError: one of them is neither.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _begin(names[0], self._certificate.subject, key.public_key(), days)
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use.value]), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(authority, critical=False)
        return _format(builder.sign(self._key, hashes.SHA256()), key)


def make_authority() -> Authority:
    """Return a new CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvmagent CA")])
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only", "crl_sign"), False,
    )  # fmt: skip
    builder = _begin("kvmagent CA", subject, key.public_key(), _CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, **usage), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def load_authority(certificate: bytes, key: bytes) -> Authority:
    """Return the CA of two PEM files.

    Raises:
        ValueError: they hold something else.
    """
    found = serialization.load_pem_private_key(key, password=None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError("the CA's key is not an elliptic curve key")
    return Authority(x509.load_pem_x509_certificate(certificate), found)


def read_certificates(path: Path) -> list[Certificate]:
    """Return the certificates of a PEM file, in order; what else is in it is passed over.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no certificate, or what is none.
    """
    return [_read(certificate) for certificate in x509.load_pem_x509_certificates(path.read_bytes())]


def _read(certificate: x509.Certificate) -> Certificate:
    names: set[str] = set()
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names |= {name.lower() for name in found.get_values_for_type(x509.DNSName)}
        names |= {str(address) for address in found.get_values_for_type(x509.IPAddress)}
    except x509.ExtensionNotFound:
        pass
    return Certificate(
        subject=certificate.subject.rfc4514_string() or ", ".join(sorted(names)),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        names=frozenset(names),
    )


def _begin(common_name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]),
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BEFORE,
        not_valid_after=now + timedelta(days=days),
    )


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST_NAME.fullmatch(text):
            raise ValueError(f"{text!r} is neither a host name nor an address") from None
        return x509.DNSName(text)


def _format(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return Issued(certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
