"""Connections: TLS, the bytes of a request, limits. The only user of cheroot.

    selector -> worker: handshake and bytes, as far as they are there -> not whole yet: back to the selector
                                                                      -> whole: parse, `respond`, answer

A worker that has answered stays with its client for a moment where others are free, and saves the next request the
way over the selector.

cheroot's own worker reads from the socket and waits: a client that sends a byte a second keeps it for ever, and with
TLS cheroot shakes hands in the thread that accepts. Here a worker takes what has come and lets go, so that however
many clients dribble, a whole request finds a worker at once.
Source: cheroot 11 server.HTTPConnection.communicate, connections.ConnectionManager.
"""

import io
import ipaddress
import logging
import select
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import cheroot.server

from kvmagent.api.framing import MAX_HEAD_BYTES, READ_AWAY_BYTES, Framing
from kvmagent.api.security import Security, certificate_names
from kvmagent.api.wire import encode_error
from kvmagent.audit import Refusals, network_of
from kvmagent.logs import Log
from kvmagent.meters import Meters
from kvmagent.model.command import JSON_TYPE
from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import HttpSection

log = Log(__name__)

#: An answer: its status line's rest, its headers, its body.
Response = tuple[bytes, list[tuple[bytes, bytes]], bytes]

# Immediate answers wait for a shared commit at most, so that few threads serve many clients; reads ask libvirt.
_THREADS = 16
# So many of them may stay with their clients, for so long at a time.
_STAYING, _STAY_S = 8, 0.25
# Connects beyond the backlog wait a second or more for the kernel to try again.
_BACKLOG = 1024
# A connection that says nothing for so long is closed, and a client that does not read its answer given up.
_IDLE_S = 10
_READ_BYTES = 65536
_TLS_HANDSHAKE = b"\x16"  # RFC 8446 5.1: the first byte of every TLS connection
# Requests that are not whole take so much memory together, beside one of the largest.
_MAX_HELD_BYTES = 64 * 2**20
# All addresses that may not connect get an answer that says so, and no more connections than these together.
_STRANGERS, _MAX_STRANGERS = "strangers", 64


class Listener(cheroot.server.HTTPServer):
    """Serves those whom `security` lets in with what `respond` makes of their requests."""

    def __init__(
        self,
        http: HttpSection,
        security: Security,
        respond: Callable[["Request"], Response],
        meters: Meters,
        refusals: Refusals,
    ) -> None:
        super().__init__(
            (http.host, http.port), _Gateway, minthreads=_THREADS, maxthreads=_THREADS, server_name="kvmagent"
        )
        self.request_queue_size = _BACKLOG
        self.timeout = _IDLE_S
        self.respond = respond
        self.ConnectionClass = _Connection
        self.max_request_header_size = MAX_HEAD_BYTES
        self.max_request_body_size = http.max_body_bytes + READ_AWAY_BYTES
        self.keep_alive_conn_limit = http.max_connections
        self.http = http
        self.security = security
        self.meters = meters
        self.refusals = refusals
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._held_bytes = 0
        self._staying = threading.BoundedSemaphore(_STAYING)

    def stay(self, connection: "_Connection") -> bool:
        """Wait for more from a client for a moment, where enough workers are free; return whether there is."""
        if not self._staying.acquire(blocking=False):
            return False
        try:
            return bool(self.ready) and connection.wait_readable(_STAY_S)
        finally:
            self._staying.release()

    def enter(self, address: str) -> None:
        """Count a connection in.

        Raises:
            AgentError: TOO_MANY_CONNECTIONS; then it is not counted.
        """
        key, limit = self._limit(address)
        with self._lock:
            # Nobody takes more than are free: two who work together leave the others a third.
            if self._open[key] >= min(limit, self.http.max_connections - self._open.total()):
                found = f"{self._open[key]} connections of {key} are open, {self._open.total()} in all"
                limits = f"the limits are {limit} and {self.http.max_connections}"
                raise AgentError(Code.TOO_MANY_CONNECTIONS, f"{found}; {limits}")
            self._open[key] += 1

    def leave(self, address: str) -> None:
        """Count a connection out that was counted in."""
        key, _ = self._limit(address)
        with self._lock:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def hold(self, before: int, now: int) -> None:
        """Count the bytes that a connection keeps of a request which is not whole.

        Raises:
            AgentError: TOO_MANY_CONNECTIONS: all together keep too many; they are counted all the same.
        """
        with self._lock:
            self._held_bytes += now - before
            held, limit = self._held_bytes, _MAX_HELD_BYTES + self.http.max_body_bytes
        if now > before and held > limit:
            message = f"{held} bytes of requests that are not whole are kept, the limit is {limit}"
            raise AgentError(Code.TOO_MANY_CONNECTIONS, message)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        log.write(level, "http server", sys.exc_info()[1] if traceback else None, error=msg.strip())

    def _limit(self, address: str) -> tuple[str, int]:
        if not self.security.is_allowed_address(address):
            return _STRANGERS, _MAX_STRANGERS
        return network_of(address), self.http.max_connections_per_client


class _Gateway(cheroot.server.Gateway):
    """From cheroot's request to the listener's `respond`."""

    def respond(self) -> None:
        req = self.req
        req.status, req.outheaders, body = req.server.respond(req)
        req.ensure_headers_sent()
        req.write(body)


class Request(cheroot.server.HTTPRequest):
    """A request as cheroot parsed it; one that cheroot itself refuses is told as JSON too."""

    conn: "_Connection"

    def respond(self) -> None:
        super().respond()
        self.conn.wfile.flush()

    def simple_response(self, status: str, msg: str = "") -> None:
        number = int(str(status).split()[0])
        if number < 400:
            self.conn.send(f"{self.server.protocol} {status}\r\n\r\n".encode())
        else:
            self.conn.refuse(AgentError(Code.BAD_HTTP, msg or str(status)))


class _Inbox(io.BytesIO):
    """One whole request, for cheroot to read; `more` says whether bytes of the next one are there already."""

    more = False

    def has_data(self) -> bool:
        return self.more


class _Outbox(io.RawIOBase):
    """What is written to a client, sent whole: cheroot's own writer sends the head of an answer before its body."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._waiting: list[bytes] = []

    def write(self, data: Any) -> int:
        self._waiting.append(data)
        return len(data)

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._socket.sendall(b"".join(waiting))


class _Connection(cheroot.server.HTTPConnection):
    """One client's connection. On one worker at a time, or with the selector."""

    RequestHandlerClass = Request
    server: Listener
    #: The names of the client's certificate.
    names: tuple[str, ...] = ()

    def __init__(self, server: Listener, sock: socket.socket, makefile: Any = None) -> None:
        super().__init__(server, sock, _make_file)
        self._framing = Framing(server.http.max_body_bytes)
        self._context = server.security.context
        self._has_shaken_hands = self._context is None
        self._is_counted = False
        self._held_bytes = 0
        # By when the request must be whole that is under way, if one is; the first one with its handshake.
        self._deadline: float | None = time.monotonic() + server.http.request_timeout_sec

    def communicate(self) -> bool:
        """Go on with what has come in; return whether the connection stays open."""
        while (answered := self._go_on()) and self.server.stay(self):
            pass
        return answered is not None

    def wait_readable(self, timeout_s: float) -> bool:
        """Wait until more has come in from the client, or it has gone; return whether it is so."""
        if self.rfile.has_data() or (isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()):
            return True
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _go_on(self) -> bool | None:
        """Go on with what has come in; return whether a request was answered, None when the connection is done."""
        try:
            if not self._is_counted:
                self._enter()
            try:
                if not self._receive():
                    return None
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._wait()
                return False
        except AgentError as error:
            self.refuse(error)
            return None
        except OSError as error:
            log.debug("client left", client=self.remote_addr, error=str(error))
            return None
        finally:
            self.socket.settimeout(self.server.timeout)
        return True if super().communicate() else None  # type: ignore[no-untyped-call]

    def send(self, data: bytes) -> None:
        """Send a few bytes; a client that is gone gets none."""
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError as error:
            log.debug("client left before its answer", client=self.remote_addr, error=str(error))

    def refuse(self, error: AgentError) -> None:
        """Answer what is no request, or may not become one; the connection is of no use after it."""
        self.server.meters.refused(error.code)
        self.server.refusals.tell(self.remote_addr, what="connection", outcome=error.code, error=error.message)
        if not self._has_shaken_hands and error.code is not Code.TLS_REQUIRED:
            return  # a TLS client that has shaken no hands can read nothing
        body = encode_error(error)
        status = HTTPStatus(error.status)
        head = (
            f"{self.server.protocol} {status} {status.phrase}\r\nContent-Type: {JSON_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n"
            + ("Retry-After: 5\r\n\r\n" if error.status == 503 else "\r\n")
        )
        self.socket.settimeout(self.server.timeout)
        self.send(head.encode() + body)
        self._read_away()

    def close(self) -> None:
        """Close, and make room for another."""
        self._hold(0)
        if self._is_counted:
            self._is_counted = False
            self.server.leave(self.remote_addr)
        super().close()

    def _wait(self) -> None:
        """Let go until more comes.

        Raises:
            AgentError: REQUEST_TOO_SLOW, TOO_MANY_CONNECTIONS: nothing more is waited for.
        """
        self._hold(self._framing.size)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            seconds = self.server.http.request_timeout_sec
            raise AgentError(Code.REQUEST_TOO_SLOW, f"the request was not whole after {seconds} s")

    def _hold(self, size: int) -> None:
        before, self._held_bytes = self._held_bytes, size
        if size != before:
            self.server.hold(before, size)

    def _enter(self) -> None:
        address = ipaddress.ip_address(self.remote_addr)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            self.remote_addr = str(address.ipv4_mapped)
        self.server.enter(self.remote_addr)
        self._is_counted = True

    def _receive(self) -> bool:
        """Take in what is there; return True once a request is whole, False when the client is done.

        Raises:
            BlockingIOError, ssl.SSLWantReadError: more is needed.
            AgentError: what came in is not taken.
        """
        self.socket.settimeout(0)
        if not self._has_shaken_hands and not self._shake_hands():
            return False
        if self._context is not self.server.security.context and self._framing.is_empty:
            return False  # shaken under certificates that have been replaced: the client connects anew
        while (request := self._framing.take()) is None:
            if self._framing.take_expectation():
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            data = self.socket.recv(_READ_BYTES)
            if not data and self._framing.is_empty:
                return False
            if not data:
                raise AgentError(Code.BAD_HTTP, "the connection ended inside a request")
            if self._deadline is None:
                self._deadline = time.monotonic() + self.server.http.request_timeout_sec
            self._framing.feed(data)
        self._deadline = None
        self._hold(0)
        self.rfile = _Inbox(request)
        self.rfile.more = not self._framing.is_empty
        return True

    def _shake_hands(self) -> bool:
        """Go on with the TLS handshake; return False when the client has ended it."""
        assert self._context is not None
        if not isinstance(self.socket, ssl.SSLSocket):
            first = self.socket.recv(1, socket.MSG_PEEK)
            if first != _TLS_HANDSHAKE:
                if first:
                    raise AgentError(Code.TLS_REQUIRED, "this port speaks TLS, and plain text came in")
                return False
            self.socket = self._context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            self.wfile = _make_file(self.socket, "wb")
        try:
            self.socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.server.refusals.tell(self.remote_addr, what="TLS", outcome=error.reason or "TLS_FAILED")
            return False
        self._has_shaken_hands = True
        self.names = certificate_names(self.socket.getpeercert())
        return True

    def _read_away(self) -> None:
        """Say that no more comes and take what is there: else closing would reset the answer away."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(0)
            while self.socket.recv(_READ_BYTES):
                pass
        except OSError:
            pass


def _make_file(sock: socket.socket, mode: str = "rb", _bufsize: int = 0) -> Any:
    """cheroot's hook: what a connection is read from, and written to."""
    return _Inbox() if "r" in mode else _Outbox(sock)
