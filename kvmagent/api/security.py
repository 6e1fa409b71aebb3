"""Who a client is, and whether it may come in: its address, its certificate's names, its token.

Certificates and tokens are files of the operator; `load` reads them all or changes nothing, so that a reload with a
broken file leaves in force what was there. Nobody's name is ever looked up.

A token is 256 bits of chance, which nobody can guess from its hash: a slow hash, made for passwords that people
think up, would only make each request slow. Source: NIST SP 800-63B 5.1.2.2 (look-up secrets of 112 bits or more).
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import ssl
from collections.abc import Iterable, Mapping
from typing import Any

from kvmagent.certificates import find_end
from kvmagent.model.errors import AgentError, Code
from kvmagent.private import read_private
from kvmagent.settings import SecuritySection

# A caller that nobody asked who it is.
ANONYMOUS = "anonymous"
TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN_LINE = re.compile(rf"(?P<name>{TOKEN_NAME.pattern}):(?P<digest>[0-9a-f]{{64}})")
# How the Host header writes an address; no name ends in a label that is all digits.
_ADDRESS = re.compile(r"[0-9.]+|\[[0-9A-Fa-f:.]+\]")
# The kinds of subject alternative names that name a client, as Python's ssl calls them.
_NAME_KINDS = frozenset({"DNS", "URI", "IP Address", "email"})


class Security:
    """Thread-safe: what `load` read is replaced whole."""

    def __init__(self, section: SecuritySection) -> None:
        self._section = section
        self._networks = tuple(ipaddress.ip_network(network) for network in section.allowed_clients)
        self._allowed_names = frozenset(_normal_name(name) for name in section.allowed_names)
        self._tokens: tuple[tuple[str, bytes], ...] = ()
        #: The TLS context for new connections; None for plain HTTP.
        self.context: ssl.SSLContext | None = None
        #: Until when the certificate in force is good; None without one.
        self.certificate_end: float | None = None

    def load(self) -> None:
        """Read certificates and tokens.

        Raises:
            AgentError: BAD_CONFIGURATION; what was in force stays.
        """
        section = self._section
        tokens = parse_tokens(read_private(section.tokens_file, "security.tokens_file")) if section.tokens_file else ()
        context = make_server_context(section) if section.tls_cert else None
        self._tokens, self.context = tokens, context
        self.certificate_end = find_end(section.tls_cert) if section.tls_cert else None

    def is_allowed_address(self, client: str) -> bool:
        """Whether an address may connect at all."""
        address = ipaddress.ip_address(client)
        if not self._networks:
            return self._section.authenticates or address.is_loopback
        return any(address in network for network in self._networks)

    def admit(self, client: str) -> str:
        """Return who asks for what holds no secret: "anonymous", from an allowed address.

        Raises:
            AgentError: CLIENT_NOT_ALLOWED.
        """
        if not self.is_allowed_address(client):
            raise AgentError(Code.CLIENT_NOT_ALLOWED, f"{client} is not an allowed client")
        return ANONYMOUS

    def check_browser(self, method: str, headers: Mapping[str, str]) -> None:
        """Refuse what a web page of others made a browser send. Header names are in lower case.

        A browser shows its user's certificate, and reaches loopback, for any page that it has open. The agent's own
        page only reads; on all else a browser puts Origin. What another page reads is kept from it, unless its name
        was made to resolve to the agent after it had been loaded: where nobody has to say who they are (which is on
        loopback alone, but for `allow_unauthenticated`), a name that may be the page's is refused.
        Source: Fetch Standard, "append a request Origin header"; RFC 9110 7.2.

        Raises:
            AgentError: WEB_PAGE_NOT_ALLOWED.
        """
        if method != "GET" and "origin" in headers:
            raise AgentError(Code.WEB_PAGE_NOT_ALLOWED, f"a page of {headers['origin']} sent a {method}")
        if self._section.authenticates or self._section.allow_unauthenticated:
            return
        host = re.sub(r":[0-9]*\Z", "", headers.get("host", ""))
        if "." in host and not _ADDRESS.fullmatch(host):
            raise AgentError(Code.WEB_PAGE_NOT_ALLOWED, f"the Host header is {host!r}, which is no address")

    def identify(self, client: str, names: Iterable[str], authorization: str | None) -> str:
        """Return who asks: "certificate:NAME", "token:NAME" or "anonymous".

        `names` are those of the certificate that the TLS handshake verified.

        Raises:
            AgentError: CLIENT_NOT_ALLOWED, CREDENTIALS_MISSING, CREDENTIALS_WRONG, CERTIFICATE_NOT_ALLOWED.
        """
        self.admit(client)
        if not self._section.authenticates:
            return ANONYMOUS
        if authorization is not None and self._section.tokens_file:
            return f"token:{self._find_token(authorization)}"
        names = list(names)
        if not names:
            raise AgentError(Code.CREDENTIALS_MISSING, "the request has neither a token nor a certificate with a name")
        allowed = [name for name in names if not self._allowed_names or _normal_name(name) in self._allowed_names]
        if not allowed:
            raise AgentError(Code.CERTIFICATE_NOT_ALLOWED, f"the certificate is for {', '.join(names)}")
        return f"certificate:{allowed[0]}"

    def _find_token(self, authorization: str) -> str:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise AgentError(Code.CREDENTIALS_WRONG, "the Authorization header is not of the form: Bearer TOKEN")
        digest = _digest(token.strip())
        # Every one is compared, and in constant time: how long it takes says nothing of how near a guess was.
        matches = [name for name, known in self._tokens if hmac.compare_digest(known, digest)]
        if not matches:
            raise AgentError(Code.CREDENTIALS_WRONG, "the token is unknown")
        return matches[0]


def make_server_context(section: SecuritySection) -> ssl.SSLContext:
    """Return a TLS context that asks clients for the certificates that `section` wants.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    key_file = section.tls_key or section.tls_cert
    read_private(key_file, "security.tls_key" if section.tls_key else "security.tls_cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would skip the check of a certificate that has expired or lost its CA since.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    try:
        context.load_cert_chain(section.tls_cert, key_file, password=_refuse_passphrase)
        if section.client_ca:
            context.load_verify_locations(section.client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL if section.tokens_file else ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        files = ", ".join(filter(None, (section.tls_cert, section.tls_key, section.client_ca)))
        raise AgentError(Code.BAD_CONFIGURATION, f"security.tls_cert, tls_key, client_ca ({files}): {error}") from error
    return context


def certificate_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the subject alternative names of a verified certificate, as ssl.SSLSocket.getpeercert has it."""
    found = (certificate or {}).get("subjectAltName", ())
    return tuple(value for kind, value in found if kind in _NAME_KINDS)


def parse_tokens(text: str) -> tuple[tuple[str, bytes], ...]:
    """Return (name, SHA-256) of each line NAME:SHA256; empty lines and # comments are left out.

    A name may stand twice, so that a token can be replaced without a gap.

    Raises:
        AgentError: BAD_CONFIGURATION, with the line's number and never its text.
    """
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise AgentError(
                Code.BAD_CONFIGURATION,
                f"security.tokens_file: line {number} is not NAME:SHA256",
                remedy="Make lines with: kvmagent --new-token NAME",
            )
        tokens.append((match["name"], bytes.fromhex(match["digest"])))
    return tuple(tokens)


def new_token(name: str) -> tuple[str, str]:
    """Return a fresh token, and the line for security.tokens_file that lets it in.

    Raises:
        AgentError: BAD_CONFIGURATION: such a name cannot stand in the file.
    """
    if not TOKEN_NAME.fullmatch(name):
        raise AgentError(Code.BAD_CONFIGURATION, f"{name!r} is no token name: 1 to 64 of A-Z a-z 0-9 . _ -")
    token = secrets.token_urlsafe(32)
    return token, f"{name}:{_digest(token).hex()}"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _normal_name(name: str) -> str:
    return name.lower()


def _refuse_passphrase() -> str:
    raise ValueError("the key has a passphrase, which nobody is there to type")
