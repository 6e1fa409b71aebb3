"""Connections to callback servers: where they may go, and by which certificates. The only user of urllib3.

    check(url, client)   when a command comes in: what can be known then is refused then
    open(url, client)    a channel; each connection of it: resolve -> check every address -> connect to that address

A name may lead elsewhere tomorrow, so what `check` found out is never relied on: a connection goes to an address that
was checked a moment ago, while the name stays what the server's certificate is verified for. Nothing follows a
redirect, and no proxy of the environment is used.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

from kvmagent.certificates import find_end
from kvmagent.logs import Log
from kvmagent.model.command import JSON_TYPE
from kvmagent.model.errors import AgentError, Code
from kvmagent.private import read_private
from kvmagent.settings import CallbackRule, CallbackSection

log = Log(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Returns the addresses of a host, or raises OSError.
Resolve = Callable[[str], Iterable[str]]

_PORTS = {"http": 80, "https": 443}
# More of a receiver's answer is not read: it says nothing to the agent.
_MAX_ANSWER_BYTES = 16384
# A command waits no longer to learn where its callback's name leads; what was learnt is good for the next ones.
_RESOLVE_WAIT_S, _RESOLVED_FOR_S = 1.0, 30.0
_MAX_LOOKUPS, _MAX_RESOLVED = 8, 1024


def resolve_by_system(host: str) -> Iterable[str]:
    """Return the addresses of a host in the order of preference of the system's resolver."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found)


class Callbacks:
    """Thread-safe."""

    def __init__(
        self, rules: Iterable[CallbackRule], section: CallbackSection, *, resolve: Resolve = resolve_by_system
    ) -> None:
        self._rules = tuple(rules)
        self._section = section
        self._resolve = resolve
        self._lookups = _Lookups(resolve)
        # Made when the first https callback needs it: the system's CAs take megabytes.
        self._context: ssl.SSLContext | None = None
        #: Until when the certificate in force is good; None without one.
        self.certificate_end: float | None = None

    def load(self) -> None:
        """Read the certificates that callbacks are sent with and verified by; connections that are open stay.

        Raises:
            AgentError: BAD_CONFIGURATION; what was in force stays.
        """
        section = self._section
        self._context = self._make_context() if section.server_ca or section.tls_cert else None
        self.certificate_end = find_end(section.tls_cert) if section.tls_cert else None

    def _make_context(self) -> ssl.SSLContext:
        section = self._section
        try:
            context = ssl.create_default_context(cafile=section.server_ca or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if section.tls_cert:
                key_file = section.tls_key or section.tls_cert
                read_private(key_file, "callback.tls_key" if section.tls_key else "callback.tls_cert")
                context.load_cert_chain(section.tls_cert, key_file)
        except OSError as error:
            files = ", ".join(filter(None, (section.server_ca, section.tls_cert, section.tls_key)))
            message = f"callback.server_ca, tls_cert, tls_key ({files}): {error}"
            raise AgentError(Code.BAD_CONFIGURATION, message) from error
        return context

    def check(self, url: str, client: str) -> None:
        """Refuse a callback URL that is known not to be allowed for this client; one that is not known may pass.

        Raises:
            AgentError: CALLBACK_NOT_ALLOWED.
        """
        host, port = _host_and_port(url)
        if any(rule.name == host and rule.port in (None, port) for rule in self._rules):
            return
        literal = _parse_address(host)
        addresses = [literal] if literal else self._lookups.find(host)
        if addresses is not None and not any(self._is_allowed(host, port, address, client) for address in addresses):
            raise AgentError(Code.CALLBACK_NOT_ALLOWED, _words(host, port, addresses))

    def open(self, url: str, client: str) -> "Channel":
        """Return a channel to the server of a URL, for a task that came from `client`."""
        return Channel(url, lambda host, port, timeout: self._connect(host, port, timeout, client), self._get_context)

    def _get_context(self) -> ssl.SSLContext:
        context = self._context or self._make_context()
        self._context = context
        return context

    def _connect(self, host: str, port: int, timeout: Any, client: str) -> socket.socket:
        """Return a connection to the first allowed address that takes one.

        Raises:
            OSError: no such name, none of its addresses is allowed, or none takes the connection.
        """
        host = host.lower().rstrip(".")
        found = [address for text in self._resolve(host) if (address := _parse_address(text))]
        allowed = [address for address in found if self._is_allowed(host, port, address, client)]
        failure = OSError(_words(host, port, found))
        for address in allowed:
            try:
                connection = socket.create_connection((str(address), port), timeout)
            except OSError as error:
                failure = error
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
        raise failure

    def _is_allowed(self, host: str, port: int, address: Address, client: str) -> bool:
        for rule in self._rules:
            if rule.port not in (None, port):
                continue
            if rule.network is not None:
                allowed = address in rule.network
            elif rule.name is not None:
                # Who answers for the name does not thereby reach what only this host reaches.
                allowed = rule.name == host and not (
                    address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
                )
            else:
                caller = _parse_address(client)
                allowed = address == caller or (caller is not None and caller.is_loopback and address.is_loopback)
            if allowed:
                return True
        return False


class Channel:
    """One callback server and a kept connection to it. Used by one thread at a time."""

    def __init__(self, url: str, connect: Callable[..., socket.socket], context: Callable[[], ssl.SSLContext]) -> None:
        host, port = _host_and_port(url)
        kind = _HttpsConnection if urlsplit(url).scheme == "https" else _HttpConnection
        self._connection = kind(host, port, open_socket=connect, get_context=context)

    def post(
        self, url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int | None, str]:
        """Return the receiver's status, or None and why there is none. Half an answer is none."""
        connection = self._connection
        try:
            if connection.sock is not None and not connection.is_connected:
                connection.close()  # by the receiver, meanwhile
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            status = self._exchange(url, body, headers)
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            connection.close()
            return None, f"{type(error).__name__}: {error}"
        return status, f"HTTP {status}"

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._connection.close()

    def _exchange(self, url: str, body: bytes | None, headers: Mapping[str, str]) -> int:
        parts = urlsplit(url)
        self._connection.request(
            "POST",
            (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            body=body,
            headers={"Content-Type": JSON_TYPE, **headers},
            preload_content=False,
            decode_content=False,
        )
        response = self._connection.getresponse()
        # An answer that was cut off shows only when it is read to its end.
        left = _MAX_ANSWER_BYTES
        while left > 0 and (part := response.read(left)):
            left -= len(part)
        if left <= 0:
            self._connection.close()
        return response.status


class _Checked:
    """urllib3's hook: a connection is opened by `open_socket`, not by the name that it is for.

    Source: urllib3 2 connection.HTTPConnection._new_conn, the one place that opens a socket.
    """

    host: str
    port: int
    timeout: Any

    def __init__(
        self,
        *args: Any,
        open_socket: Callable[..., socket.socket],
        get_context: Callable[[], ssl.SSLContext],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._open_socket = open_socket
        self._get_context = get_context

    def _new_conn(self) -> socket.socket:
        try:
            return self._open_socket(self.host, self.port, self.timeout)
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error  # type: ignore[arg-type]


class _HttpConnection(_Checked, HTTPConnection):
    pass


class _HttpsConnection(_Checked, HTTPSConnection):
    def connect(self) -> None:
        self.ssl_context = self._get_context()
        super().connect()


class _Lookups:
    """What names lead to, learnt without making anyone wait for a resolver that hangs."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._changed = threading.Condition()
        self._known: dict[str, tuple[float, list[Address] | None]] = {}
        self._running: set[str] = set()

    def find(self, host: str) -> list[Address] | None:
        """Return a host's addresses; None while they cannot be known."""
        with self._changed:
            expires, addresses = self._known.get(host, (0.0, None))
            if time.monotonic() < expires:
                return addresses
            if host not in self._running:
                if len(self._running) >= _MAX_LOOKUPS:
                    return None
                self._running.add(host)
                # A resolver cannot be interrupted, so that the agent's end does not wait for this thread.
                run = copy_context().run  # with the log context of who asks
                threading.Thread(target=run, args=(self._look_up, host), name="callback lookup", daemon=True).start()
            if not self._changed.wait_for(lambda: host not in self._running, _RESOLVE_WAIT_S):
                self._learn(host, None)  # nobody else waits for it meanwhile
            return self._known.get(host, (0.0, None))[1]

    def _look_up(self, host: str) -> None:
        try:
            addresses = [address for text in self._resolve(host) if (address := _parse_address(text))]
        except (OSError, ValueError) as error:
            log.info("callback host is not known now", host=host, error=str(error))
            addresses = None
        with self._changed:
            self._running.discard(host)
            self._learn(host, addresses)
            self._changed.notify_all()

    def _learn(self, host: str, addresses: list[Address] | None) -> None:
        if len(self._known) >= _MAX_RESOLVED:
            self._known.clear()
        self._known[host] = (time.monotonic() + _RESOLVED_FOR_S, addresses)


def _host_and_port(url: str) -> tuple[str, int]:
    """Return where a URL leads to; a URL may come from a header that was checked, or from a body that was not.

    Raises:
        AgentError: BAD_CALLBACK_URL.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise AgentError(Code.BAD_CALLBACK_URL, f"the URL is {url!r}: {error}") from error
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in _PORTS or not host or port == 0 or not plain or parts.username is not None:
        raise AgentError(Code.BAD_CALLBACK_URL, f"{url!r} is no absolute http or https URL")
    return host.lower().rstrip("."), port or _PORTS[parts.scheme]


def _parse_address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _words(host: str, port: int, addresses: Iterable[Address]) -> str:
    found = ", ".join(map(str, addresses)) or "no address"
    return f"callbacks may not go to port {port} of {host}" + (f" ({found})" if found != host else "")
