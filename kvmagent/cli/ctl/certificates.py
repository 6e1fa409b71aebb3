"""Certificates in PEM files, as far as an operator has to look after them. The only user of cryptography."""

from datetime import datetime
from pathlib import Path

import msgspec
from cryptography import x509


class Certificate(msgspec.Struct, frozen=True):
    """One certificate: its subject, when it is good, and the names and addresses that it is for."""

    subject: str
    not_before: datetime
    not_after: datetime
    names: frozenset[str]


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
