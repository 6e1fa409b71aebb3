"""Owns a certificate authority of the lab, and what is signed by it: files that an agent or a receiver is given."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LOOPBACK = "127.0.0.1"


class Authority:
    """A CA; its certificate lies in `ca_file`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.ca_file = directory / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.ca_file)

    def issue(
        self, *names: str, expired: bool = False, not_after: datetime | None = None, file_name: str | None = None
    ) -> Path:
        """A file of key and certificate, mode 0600, whose subject alternative names are `names`."""
        if expired:
            not_after = datetime.now(UTC) - timedelta(days=1)
        issued = self._ca.issue_cert(*names, not_after=not_after, key_type=trustme.KeyType.ECDSA)
        file = self._directory / f"{file_name or names[0]}.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(file)
        file.chmod(0o600)
        return file

    def revoke(self, *certificates: Path) -> bytes:
        """A revocation list of this CA, PEM, with these certificates on it."""
        own = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(own.subject)
        builder = builder.last_update(now - timedelta(days=1)).next_update(now + timedelta(days=1))
        for file in certificates:
            serial = x509.load_pem_x509_certificate(file.read_bytes()).serial_number
            one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(one)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def client(self, certificate: Path | None = None) -> ssl.SSLContext:
        """How a client that trusts this CA connects, with its own certificate if it has one."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if certificate is not None:
            context.load_cert_chain(certificate)
        return context

    def server(self, certificate: Path, *, clients: bool = False) -> ssl.SSLContext:
        """How a server speaks that has this certificate; it may ask clients for one of this CA."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.ca_file)
        context.load_cert_chain(certificate)
        context.verify_mode = ssl.CERT_REQUIRED if clients else ssl.CERT_NONE
        return context
