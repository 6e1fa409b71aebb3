"""Connections to callback servers: where they may go, with which certificates. The only user of urllib3.

    check(url, client)   when a command comes in: what can be known then is refused then
    open(url, client)    a channel; each connection of it: resolve -> check every address -> connect to that address

A name may lead elsewhere tomorrow, so what `check` found out is never relied on: a connection goes to an address that
was checked a moment ago, while the name stays what the server's certificate is verified for. Nothing follows a
redirect, and no proxy of the environment is used.

An exchange has one deadline for all of it: looking the name up, connecting, the handshake, the request, the answer.
urllib3 and the socket module have none: their timeouts are for one read each, so that a receiver that sends a byte now
and then would keep a thread for ever.
"""

import io
import ipaddress
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, IncompleteRead, parse_headers
from typing import Any
from urllib.parse import urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

from kvmagent.certificates import find_end
from kvmagent.logs import Log
from kvmagent.model.command import JSON_TYPE
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.roles import LOCAL
from kvmagent.model.urls import shown_line, shown_url
from kvmagent.secretfiles import check_file, read_private
from kvmagent.settings import CallbackRule, CallbackSection
from kvmagent.shares import Shares

log = Log(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Returns the addresses of a host, or raises OSError.
Resolve = Callable[[str], Iterable[str]]

# The settings that name a file by which receivers are known, or the agent to them.
_FILES = ("server_ca", "tls_cert", "tls_key")
_LOCALHOST = ipaddress.ip_address("127.0.0.1")
_PORTS = {"http": 80, "https": 443}
# More of a receiver's answer is not read: it says nothing to the agent.
_MAX_ANSWER_BYTES = 16384
# A receiver that is slow may say so each second; one that does nothing else keeps a processor.
_MAX_INTERIM = 1000
# An error may repeat what the receiver sent, and is kept with the task.
_MAX_WORDS = 500
# A command waits no longer to learn where its callback's name leads; what was learnt is good for the next ones.
_RESOLVE_WAIT_S, _RESOLVED_FOR_S = 1.0, 30.0
_MAX_LOOKUPS, _MAX_RESOLVED = 32, 1024


def resolve_by_system(host: str) -> Iterable[str]:
    """Return the addresses of a host in the order of preference of the system's resolver."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found)


class CallbackClient:
    """Thread-safe. `user_id` is the agent's user, this process's where none is given: who may own its files."""

    def __init__(
        self,
        rules: Iterable[CallbackRule],
        section: CallbackSection,
        *,
        resolve: Resolve = resolve_by_system,
        user_id: int | None = None,
    ) -> None:
        self._user_id = user_id
        self._rules = tuple(rules)
        self._section = section
        self._resolve = resolve
        self._lookups = _Lookups(resolve)
        # Made when the first https callback needs it: the system's CAs take megabytes.
        self._context: ssl.SSLContext | None = None
        #: Until when the certificate in force is good; None without one.
        self.certificate_end: float | None = None

    def load(self, section: CallbackSection | None = None, rules: Iterable[CallbackRule] | None = None) -> None:
        """Read the certificates that callbacks are sent with and verified by; connections that are open stay.

        A `section` and `rules` that are given take the place of those in force.

        Raises:
            AgentError: BAD_CONFIGURATION; what was in force stays.
        """
        section = section or self._section
        for name in _FILES:
            if path := getattr(section, name):
                check_file(path, f"callback.{name}", user_id=self._user_id)
        context = self._make_context(section) if section.server_ca or section.tls_cert else None
        self._section, self._context = section, context
        self._rules = self._rules if rules is None else tuple(rules)
        self.certificate_end = find_end(section.tls_cert) if section.tls_cert else None

    def _make_context(self, section: CallbackSection) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=section.server_ca or None)
            context.sslsocket_class = _TimedTlsSocket
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
        _, host, port = find_receiver(url)
        if any(rule.name == host and rule.port in (None, port) for rule in self._rules):
            return
        literal = _parse_address(host)
        addresses = [literal] if literal else self._lookups.find(host, client)
        if addresses is not None and not any(self._is_allowed(host, port, address, client) for address in addresses):
            raise AgentError(Code.CALLBACK_NOT_ALLOWED, _words(host, port, addresses))

    def open(self, url: str, client: str) -> "Channel":
        """Return a channel to the server of a URL, for a task that came from `client`."""
        return Channel(url, lambda host, port, end: self._connect(host, port, client, end), self._get_context)

    def _get_context(self) -> ssl.SSLContext:
        context = self._context or self._make_context(self._section)
        self._context = context
        return context

    def _connect(self, host: str, port: int, client: str, end: float) -> socket.socket:
        """Return a connection to the first allowed address that takes one, by then.

        Raises:
            OSError: no such name, none of its addresses is allowed, or none takes the connection.
        """
        host = host.lower().rstrip(".")
        literal = _parse_address(host)
        found = [literal] if literal else self._lookups.find_now(host, client, _left_s(end))
        allowed = [address for address in found if self._is_allowed(host, port, address, client)]
        failure = OSError(_words(host, port, found))
        for tried, address in enumerate(allowed):
            try:
                # An address that does not answer leaves the others their part of the time.
                connection = socket.create_connection((str(address), port), _left_s(end) / (len(allowed) - tried))
            except OSError as error:
                failure = error
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _TimedSocket(fileno=connection.detach())
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
                caller = _LOCALHOST if client == LOCAL else _parse_address(client)
                allowed = address == caller or (caller is not None and caller.is_loopback and address.is_loopback)
            if allowed:
                return True
        return False


class Channel:
    """One callback server and a kept connection to it. Used by one thread at a time."""

    def __init__(
        self, url: str, connect: Callable[[str, int, float], socket.socket], context: Callable[[], ssl.SSLContext]
    ) -> None:
        scheme, host, port = find_receiver(url)
        kind = _HttpsConnection if scheme == "https" else _HttpConnection
        self._connection = kind(host, port, open_socket=connect, get_context=context)

    def post(
        self, url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int | None, str]:
        """Return the receiver's status, or None and why there is none. Half an answer is none.

        `timeout_s` is for the whole exchange.
        """
        connection = self._connection
        try:
            if connection.sock is not None and not connection.is_connected:
                connection.close()  # by the receiver, meanwhile
            connection.begin(time.monotonic() + timeout_s)
            status = self._exchange(url, body, headers)
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            connection.close()
            late = f" (the receiver has {timeout_s:g} s in all)" if isinstance(error, TimeoutError) else ""
            return None, shown_line(f"{_tell(error)}{late}")[:_MAX_WORDS]
        return status, f"HTTP {status}"

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._connection.close()

    def _exchange(self, url: str, body: bytes | None, headers: Mapping[str, str]) -> int:
        # http.client lets folded lines and control characters pass, which a receiver may read as another header. Other
        # than Latin-1 it refuses midway, and sends the lines before it with the next request. Observed: CPython 3.11.
        if not all(value.isprintable() and max(value, default="") <= "\xff" for value in headers.values()):
            raise ValueError("a header's value has a character that cannot be sent")
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
        if left <= 0 or response.status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._connection.close()
        return response.status


class _Timed(socket.socket):
    """A socket whose reads and writes all end by one moment, `end`, however many they are.

    `sendall` and a TLS handshake are bounded as a whole by the socket's timeout; reads are so one by one.
    Source: CPython 3.11 socketmodule.c sock_sendall, _ssl.c do_handshake.
    """

    end = math.inf

    def recv_into(self, *args: Any, **options: Any) -> int:
        self.settimeout(_left_s(self.end))
        return super().recv_into(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        self.settimeout(_left_s(self.end))
        super().sendall(*args, **options)


class _TimedSocket(_Timed):
    pass


class _TimedTlsSocket(_Timed, ssl.SSLSocket):
    pass


def _left_s(end: float) -> float:
    """Return how many seconds are left.

    Raises:
        TimeoutError: none.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _WholeLines(io.BufferedReader):
    """Raises where the end comes inside a line: http.client takes it for the end of the head."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise IncompleteRead(line)
        return line


class _WholeResponse(HTTPResponse):
    """The answer itself: http.client takes any interim one but 100 for it, and the answer for that of the next request.

    Source: RFC 9110 15.2: a client must parse one or more 1xx before the final one; 101 is final.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = _WholeLines(self.fp.detach())

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(_MAX_INTERIM):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            parse_headers(self.fp)
        raise HTTPException(f"got more than {_MAX_INTERIM} interim answers")


def _tell(error: Exception) -> str:
    """Return what went wrong; urllib3 has its connection's repr in front of why there is none."""
    if isinstance(error, NewConnectionError) and error.__cause__ is not None:
        return str(error.__cause__)
    return f"{type(error).__name__}: {error}"


class _Checked:
    """urllib3's hook: a connection is opened by `open_socket`, not by the name that it is for.

    Source: urllib3 2 connection.HTTPConnection._new_conn, the one place that opens a socket.
    """

    host: str
    port: int
    sock: Any
    connect: Callable[[], None]
    response_class: Any

    def __init__(
        self,
        *args: Any,
        open_socket: Callable[[str, int, float], socket.socket],
        get_context: Callable[[], ssl.SSLContext],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.response_class = _WholeResponse
        self._open_socket = open_socket
        self._get_context = get_context
        self._end = 0.0

    def begin(self, end: float) -> None:
        """Begin an exchange that ends by then: connect, where there is no connection.

        Raises:
            HTTPError, OSError: there is none to be had.
        """
        self._end = end
        if self.sock is None:
            self.connect()
        self.sock.end = end

    def _new_conn(self) -> socket.socket:
        try:
            connection = self._open_socket(self.host, self.port, self._end)
            connection.settimeout(_left_s(self._end))  # for the handshake
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error  # type: ignore[arg-type]
        return connection


class _HttpConnection(_Checked, HTTPConnection):
    pass


class _HttpsConnection(_Checked, HTTPSConnection):
    def connect(self) -> None:
        self.ssl_context = self._get_context()
        super().connect()


class _Lookups:
    """What names lead to, learnt without making anyone wait for a resolver that hangs.

    A resolver cannot be interrupted: a lookup that hangs keeps a thread, which nobody waits for, and a place of the
    client that asked first. Whose names hang leaves other clients theirs.
    """

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._changed = threading.Condition()
        self._known: dict[str, tuple[float, list[Address] | None]] = {}
        self._running: set[str] = set()
        self._places = Shares(_MAX_LOOKUPS)

    def find(self, host: str, client: str) -> list[Address] | None:
        """Return a host's addresses, of a moment ago at most; None while they cannot be known."""
        with self._changed:
            expires, addresses = self._known.get(host, (0.0, None))
            if time.monotonic() >= expires:
                addresses = self._ask(host, client, _RESOLVE_WAIT_S)
                if host in self._running:
                    self._learn(host, None)  # nobody else waits for it meanwhile
            return addresses

    def find_now(self, host: str, client: str, wait_s: float) -> list[Address]:
        """Return a host's addresses as they are now.

        Raises:
            OSError: they are not known, or not in time.
        """
        with self._changed:
            addresses = self._ask(host, client, wait_s)
        if addresses is None:
            raise OSError(f"{host} could not be resolved")
        return addresses

    def _ask(self, host: str, client: str, wait_s: float) -> list[Address] | None:
        """Look a host up and wait for it so long; under the lock."""
        if host not in self._running:
            if not self._places.has_room(client):
                return None
            self._places.take(client)
            self._running.add(host)
            run = copy_context().run  # with the log context of who asks
            thread = threading.Thread(
                target=run, args=(self._look_up, host, client), name="callback lookup", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system has no thread to give
                self._forget(host, client)
                return None
        if not self._changed.wait_for(lambda: host not in self._running, wait_s):
            return None
        return self._known.get(host, (0.0, None))[1]

    def _look_up(self, host: str, client: str) -> None:
        try:
            addresses = [address for text in self._resolve(host) if (address := _parse_address(text))]
        except (OSError, ValueError) as error:
            log.info("callback host cannot be resolved now", host=host, error=str(error))
            addresses = None
        with self._changed:
            self._forget(host, client)
            self._learn(host, addresses)
            self._changed.notify_all()

    def _forget(self, host: str, client: str) -> None:
        self._running.discard(host)
        self._places.leave(client)

    def _learn(self, host: str, addresses: list[Address] | None) -> None:
        if len(self._known) >= _MAX_RESOLVED:
            self._known.clear()
        self._known[host] = (time.monotonic() + _RESOLVED_FOR_S, addresses)


def find_receiver(url: str) -> tuple[str, str, int]:
    """Return where a URL leads to: scheme, host and port, the same for each spelling of them.

    A URL may come from a header that was checked, or from a body that was not.

    Raises:
        AgentError: BAD_CALLBACK_URL.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise AgentError(Code.BAD_CALLBACK_URL, f"the URL {shown_url(url)!r} cannot be read") from error
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in _PORTS or not host or port == 0 or not plain or parts.username is not None:
        raise AgentError(Code.BAD_CALLBACK_URL, f"{shown_url(url)!r} is not an absolute http or https URL")
    return parts.scheme, str(_parse_address(host) or host), port or _PORTS[parts.scheme]


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
