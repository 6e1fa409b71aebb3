"""Identifies clients by address, certificate, token or user of this host, and says what each may do.

Certificates, tokens and roles are the operator's; `load` reads them all or changes nothing, so that a reload with a
broken file leaves in force what was there. Each load begins a new `generation`: where what lets a client in has
changed, connections of an earlier one end with the request that is under way. A renewed certificate of the agent ends
none. No name of the network is ever looked up.

A token is 256 bits of chance, which nobody can guess from its hash: a slow hash, made for passwords that people
think up, would only make each request slow. Source: NIST SP 800-63B 5.1.2.2 (look-up secrets of 112 bits or more).
"""

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvmagent.api.localpeer import LocalUser
from kvmagent.certificates import find_end
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.roles import ANONYMOUS, ROLES, Access, find_access, parse_rule
from kvmagent.secretfiles import check_file, read_private
from kvmagent.settings import SecuritySection

TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN_LINE = re.compile(rf"(?P<name>{TOKEN_NAME.pattern}):(?P<digest>[0-9a-f]{{64}})")
# How the Host header writes an address; no name ends in a label that is all digits.
_ADDRESS = re.compile(r"[0-9.]+|\[[0-9A-Fa-f:.]+\]")
# The kinds of subject alternative names that name a client, as Python's ssl calls them.
_NAME_KINDS = frozenset({"DNS", "URI", "IP Address", "email"})
# The settings that name a file by which somebody is let in, or the agent known.
_AUTHORITIES = ("client_ca", "client_crl")
_FILES = ("tls_cert", "tls_key", *_AUTHORITIES, "tokens_file")


class Peer(NamedTuple):
    """The other end of a connection, as far as the connection itself shows.

    `names` and `not_after` (seconds since the epoch) are those of the certificate that the TLS handshake verified;
    `user` is the local user at the other end of a UNIX socket.
    """

    address: str
    names: tuple[str, ...] = ()
    not_after: float | None = None
    user: LocalUser | None = None


class Security:
    """Thread-safe: what `load` read is replaced whole. `clock` returns seconds since the epoch.

    `user_id` is the agent's user, this process's where none is given: who beside root may own its files.
    """

    def __init__(
        self, section: SecuritySection, *, clock: Callable[[], float] = time.time, user_id: int | None = None
    ) -> None:
        self._clock = clock
        self._user_id = user_id
        self._own_name = socket.gethostname().lower()
        self._tokens: tuple[tuple[str, bytes], ...] = ()
        #: The TLS context for new connections; None for plain HTTP.
        self.context: ssl.SSLContext | None = None
        #: Until when the certificate in force is good; None without one.
        self.certificate_end: float | None = None
        #: Counts the loads; and the one that changed last what lets a client in by TCP.
        self.generation = self.changed_at = 0
        #: What decides that: settings, tokens, the CA's certificate and revocation list.
        self._deciding: object = None
        self._use(section)

    def load(self, section: SecuritySection | None = None) -> None:
        """Read certificates and tokens, of another section than before where one is given.

        Raises:
            AgentError: BAD_CONFIGURATION; what was in force stays.
        """
        section = section or self._section
        for name in _FILES:
            if path := getattr(section, name):
                check_file(path, f"security.{name}", user_id=self._user_id)
        tokens = parse_tokens(read_private(section.tokens_file, "security.tokens_file")) if section.tokens_file else ()
        # Read before the context reads them: what is written in between is a change for the load that follows.
        deciding = (section, tokens, [_read_bytes(getattr(section, name), name) for name in _AUTHORITIES])
        context = make_server_context(section) if section.tls_cert else None
        self._use(section)
        self._tokens, self.context = tokens, context
        self.certificate_end = find_end(section.tls_cert) if section.tls_cert else None
        self.generation += 1
        if deciding != self._deciding:
            self._deciding, self.changed_at = deciding, self.generation

    def _use(self, section: SecuritySection) -> None:
        self._section = section
        self._networks = tuple(ipaddress.ip_network(network) for network in section.allowed_clients)
        self._allowed_names = frozenset(_normal_name(name) for name in section.allowed_names)
        self._host_names = frozenset({self._own_name, *(name.lower().rstrip(".") for name in section.host_names)})
        self._rules = tuple(map(parse_rule, section.roles))

    def is_allowed_address(self, client: str) -> bool:
        """Whether an address of the network may connect at all."""
        if not self._networks:
            return self._section.authenticates
        address = ipaddress.ip_address(client)
        return any(address in network for network in self._networks)

    def admit(self, peer: Peer) -> Access:
        """Return who asks for what holds no secret: "anonymous", from an allowed address.

        Raises:
            AgentError: CLIENT_NOT_ALLOWED.
        """
        if peer.user is None and not self.is_allowed_address(peer.address):
            raise AgentError(Code.CLIENT_NOT_ALLOWED, f"{peer.address} is not an allowed client")
        return Access(ANONYMOUS)

    def check_browser(self, method: str, headers: Mapping[str, str], peer: Peer, *, asks_only: bool = False) -> None:
        """Refuse what a web page of others made a browser send. Header names are in lower case.

        A browser shows its user's certificate, and reaches what its host reaches, for any page that it has open. The
        agent's own page only reads, and asks what changes nothing (`asks_only`); on all but GET a browser puts Origin.
        What another page reads is kept from it, unless its name was made to resolve to the agent after it had been
        loaded: where the request carries nothing that says who sent it, a name that may be the page's is refused.
        Source: Fetch Standard, "append a request Origin header"; RFC 9110 7.2.

        Raises:
            AgentError: WEB_PAGE_NOT_ALLOWED.
        """
        if method != "GET" and "origin" in headers and not (asks_only and _is_own_page(headers)):
            raise AgentError(Code.WEB_PAGE_NOT_ALLOWED, f"a page of {headers['origin']} sent a {method}")
        if self._section.authenticates and peer.user is None:
            return
        host = re.sub(r":[0-9]*\Z", "", headers.get("host", "")).lower().rstrip(".")
        if "." in host and not _ADDRESS.fullmatch(host) and host not in self._host_names:
            message = f"the Host header is {host!r}, neither an address nor a name in security.host_names"
            raise AgentError(Code.WEB_PAGE_NOT_ALLOWED, message)

    def identify(self, peer: Peer, authorization: str | None) -> Access:
        """Return who asks and what that may: "unix:NAME", "certificate:NAME", "token:NAME" or "anonymous".

        Raises:
            AgentError: CLIENT_NOT_ALLOWED, CREDENTIALS_MISSING, CREDENTIALS_WRONG, CERTIFICATE_NOT_ALLOWED.
        """
        if peer.user is not None:
            return self._identify_user(peer.user)
        self.admit(peer)
        section = self._section
        if not section.authenticates:
            return find_access(ANONYMOUS, (ANONYMOUS,), self._rules)
        if authorization is not None and section.tokens_file:
            caller = f"token:{self._find_token(authorization)}"
        else:
            caller = f"certificate:{self._find_name(peer)}"
        return find_access(caller, (caller,), self._rules)

    def _identify_user(self, user: LocalUser) -> Access:
        caller = f"unix:{user.name}"
        # Whoever could replace the agent, or read its memory, need not be kept from asking it.
        if user.uid in (0, os.geteuid()):
            return Access(caller, frozenset(ROLES))
        return find_access(caller, (caller, *(f"group:{group}" for group in user.groups)), self._rules)

    def _find_name(self, peer: Peer) -> str:
        if not peer.names:
            raise AgentError(Code.CREDENTIALS_MISSING, "the request has neither a token nor a certificate with a name")
        if peer.not_after is not None and self._clock() >= peer.not_after:
            ended = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(peer.not_after))
            raise AgentError(
                Code.CERTIFICATE_NOT_ALLOWED,
                f"the certificate for {', '.join(peer.names)} expired at {ended}",
                remedy="Connect with a certificate that has not expired.",
            )
        allowed = [name for name in peer.names if not self._allowed_names or _normal_name(name) in self._allowed_names]
        if not allowed:
            raise AgentError(Code.CERTIFICATE_NOT_ALLOWED, f"the certificate is for {', '.join(peer.names)}")
        # Names are compared without regard to case: an entry that gives less must not be passed by another spelling.
        return _normal_name(allowed[0])

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
    # A resumed session would skip the check of a certificate that has lost its CA since.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    try:
        context.load_cert_chain(section.tls_cert, key_file, password=_refuse_passphrase)
        if section.client_ca:
            context.load_verify_locations(section.client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL if section.tokens_file else ssl.CERT_REQUIRED
        if section.client_crl:
            context.load_verify_locations(section.client_crl)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as error:
        files = ", ".join(filter(None, (section.tls_cert, section.tls_key, section.client_ca, section.client_crl)))
        message = f"security.tls_cert, tls_key, client_ca, client_crl ({files}): {error}"
        raise AgentError(Code.BAD_CONFIGURATION, message) from error
    return context


def _read_bytes(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise AgentError(Code.BAD_CONFIGURATION, f"security.{name} {path}: {error}") from error


def certificate_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the subject alternative names of a verified certificate, as ssl.SSLSocket.getpeercert has it."""
    found = (certificate or {}).get("subjectAltName", ())
    return tuple(_as_written(value) if kind == "IP Address" else value for kind, value in found if kind in _NAME_KINDS)


def certificate_end(certificate: Mapping[str, Any] | None) -> float | None:
    """Return until when such a certificate is good, seconds since the epoch; None without one."""
    not_after = (certificate or {}).get("notAfter")
    return None if not_after is None else ssl.cert_time_to_seconds(not_after)


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
    """Return a new token, and its line for security.tokens_file.

    Raises:
        AgentError: BAD_CONFIGURATION: the name is not allowed in the file.
    """
    if not TOKEN_NAME.fullmatch(name):
        raise AgentError(Code.BAD_CONFIGURATION, f"{name!r} is not a token name: use 1 to 64 of A-Z a-z 0-9 . _ -")
    token = secrets.token_urlsafe(32)
    return token, f"{name}:{_digest(token).hex()}"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _normal_name(name: str) -> str:
    return _as_written(name.lower())


def _as_written(text: str) -> str:
    """Return an address as Python writes it: OpenSSL writes all eight groups of IPv6, others leave zeros out."""
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        return text


def _refuse_passphrase() -> str:
    raise ValueError("the key has a passphrase, which the agent cannot ask for")


def _is_own_page(headers: Mapping[str, str]) -> bool:
    """Whether the page that sent a request came from where it is sent to."""
    return headers["origin"].lower().partition("://")[2] == headers.get("host", "").lower() != ""
