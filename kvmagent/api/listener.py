"""Connections: TLS, the bytes of a request, limits, the bytes of an answer. The only user of cheroot.

    selector -> worker: handshake and bytes, as far as they are there -> not whole yet: back to the selector
                                                                      -> whole: `respond`, answer
                        an answer that its client does not take at once: back to the selector, until it takes more

A worker that has answered stays with its client for a moment where others are free, and saves the next request the
way over the selector.

From cheroot come the listening socket and the workers. Its own connection reads from the socket and waits: a client
that sends a byte a second keeps a worker for ever, and with TLS it shakes hands in the thread that accepts. Here a
worker takes what has come, writes what is taken, and lets go: however many clients dribble, or ask and never read, a
whole request finds a worker at once. No socket ever blocks.
Source: cheroot 11 server.HTTPConnection.communicate, connections.ConnectionManager.
"""

import contextlib
import errno
import grp
import io
import ipaddress
import logging
import os
import select
import socket
import ssl
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import cheroot.server

from kvmagent.api.connections import Connections
from kvmagent.api.framing import Framing, Request
from kvmagent.api.localpeer import find_local_user
from kvmagent.api.security import Peer, Security, certificate_end, certificate_names
from kvmagent.api.wire import encode_error
from kvmagent.audit import Refusals, network_of
from kvmagent.logs import Log
from kvmagent.model.command import JSON_TYPE
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.roles import LOCAL
from kvmagent.recorder import Recorder
from kvmagent.secretfiles import check_trusted, owners_of
from kvmagent.settings import HttpSection
from kvmagent.shares import Shares

log = Log(__name__)

#: An answer: its status line's rest, its headers, its body.
Response = tuple[bytes, list[tuple[bytes, bytes]], bytes]

# Immediate answers wait for a shared commit at most, so that few threads serve many clients; reads ask libvirt.
_THREADS = 16
# So many of them may stay with their clients, for so long at a time.
_STAYING, _STAY_S = 8, 0.25
# Of the UNIX socket, whose clients are a few tools.
_LOCAL_THREADS, _LOCAL_STAYING = 6, 2
# A list of all VMs has megabytes, of which the C library keeps what it was made of.
_LARGE_BYTES = 2**18
# Connects beyond the backlog wait a second or more for the kernel to try again.
_BACKLOG = 1024
# A connection that says nothing for so long is closed, as is one whose client takes nothing of its answer; and in all
# an answer must be taken within so long.
_IDLE_S, _ANSWER_S = 10, 60
_READ_BYTES = 65536
# Of what a client still sends to whom it was refused so much is taken; one that goes on is not waited for.
_READ_AWAY_TIMES = 64
_TLS_HANDSHAKE = b"\x16"  # RFC 8446 5.1: the first byte of every TLS connection
# What the kernel keeps for a connection, in each direction (it doubles this): it counts for the agent, and would grow.
_KERNEL_BYTES = 128 * 1024
# Requests that are not whole and answers that are not taken have so much memory together, beside two of the largest
# requests: any client has room for one.
_MAX_HELD_BYTES = 64 * 2**20
# All addresses that may not connect get an answer that says so, and no more connections than these together.
_STRANGERS, _MAX_STRANGERS = "strangers", 64


class Listener(cheroot.server.HTTPServer):
    """Serves those whom `security` lets in with what `respond` makes of their requests.

    By TCP, or where a `path` is given by a UNIX socket there.
    """

    _connections: Any

    def __init__(
        self,
        http: HttpSection,
        security: Security,
        respond: Callable[[Request, Peer], Response],
        recorder: Recorder,
        refusals: Refusals,
        *,
        path: str = "",
    ) -> None:
        threads, staying = (_LOCAL_THREADS, _LOCAL_STAYING) if path else (_THREADS, _STAYING)
        super().__init__(path or (http.host, http.port), gateway=None, minthreads=threads, maxthreads=threads)
        self.path = path
        #: Whether there was an answer since this was last False after which memory should be returned to the system.
        self.sent_large = False
        self._bound: os.stat_result | None = None
        self.request_queue_size = _BACKLOG
        self.respond = respond
        self.security = security
        self.recorder = recorder
        self.refusals = refusals
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._held = Shares(0)
        self._staying = threading.BoundedSemaphore(staying)
        self.set_limits(http)

    def set_limits(self, http: HttpSection) -> None:
        """Have the limits of a section, which is of the same address."""
        self.http = http
        with self._lock:
            self._held.resize(_MAX_HELD_BYTES + 2 * http.max_body_bytes)

    def stay(self, connection: "_Connection") -> bool:
        """Wait for more from a client for a moment, where enough workers are free; return whether there is."""
        if not self._staying.acquire(blocking=False):
            return False
        try:
            return bool(self.ready) and connection.wait_readable(_STAY_S)
        finally:
            self._staying.release()

    @property
    def url(self) -> str:
        """Where it listens."""
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.http.host}]" if ":" in self.http.host else self.http.host
        return f"http{'' if self.context is None else 's'}://{host}:{self.http.port}"

    @property
    def context(self) -> ssl.SSLContext | None:
        """The TLS context of new connections; None for plain HTTP."""
        return None if self.path else self.security.context

    def bind_unix_socket(self, bind_addr: str) -> None:
        """Listen at a path, for a group; cheroot's own opens it to everybody.

        Raises:
            OSError: another process listens on it, something else is there, or others could put something there.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(bind_addr), 0o755)
        # Who could put another socket there would be taken for the agent.
        check_trusted(Path(bind_addr).parent, owners_of())
        _remove_old_socket(bind_addr)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # of the file that bind makes. Source: Linux, unix_bind_bsd
            self.socket.bind(bind_addr)
            _open_to_group(bind_addr, self.http.socket_group)
            self._bound = os.lstat(bind_addr)
        except OSError:
            self.socket.close()
            raise

    def prepare(self) -> None:
        super().prepare()
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # what is accepted inherits them
            self.socket.setsockopt(socket.SOL_SOCKET, option, _KERNEL_BYTES)
        self._connections.close()  # cheroot's own, which nothing has come to yet
        self._connections = Connections(self.socket, self._connect, self.process_conn, idle_s=_IDLE_S)

    def stop(self) -> None:
        """Close, and leave no socket behind that nobody listens at."""
        super().stop()
        with contextlib.suppress(OSError):
            if self._bound is not None and os.path.samestat(os.lstat(self.path), self._bound):
                os.unlink(self.path)

    def find_share(self, address: str) -> tuple[str, int]:
        """Return as whose an address's connections count, and how many of them may be open."""
        if not self.path and not self.security.is_allowed_address(address):
            return _STRANGERS, _MAX_STRANGERS
        return network_of(address), self.http.max_connections_per_client

    def enter(self, key: str, limit: int) -> None:
        """Count a connection in.

        Raises:
            AgentError: TOO_MANY_CONNECTIONS; then it is not counted.
        """
        with self._lock:
            # Nobody takes more than are free: two who work together leave the others a third.
            if self._open[key] >= min(limit, self.http.max_connections - self._open.total()):
                found = f"{self._open[key]} connections of {key} are open, {self._open.total()} in all"
                limits = f"the limits are {limit} and {self.http.max_connections}"
                raise AgentError(Code.TOO_MANY_CONNECTIONS, f"{found}; {limits}")
            self._open[key] += 1

    def leave(self, key: str) -> None:
        """Count a connection out that was counted in."""
        with self._lock:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def count_partial_bytes(self, key: str, before: int, now: int) -> None:
        """Count the bytes that are kept for a connection: of a request, or of an answer.

        Raises:
            AgentError: TOO_MANY_CONNECTIONS: its client has too many already; they are counted all the same.
        """
        with self._lock:
            self._held.leave(key, places=before)
            has_room = now <= before or self._held.has_room(key, places=now)
            self._held.take(key, places=now)
            held, free = self._held.taken(key), self._held.free
        if not has_room:
            message = f"{held} bytes of requests and answers are buffered for {key}; {free} are free for all clients"
            raise AgentError(Code.TOO_MANY_CONNECTIONS, message)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        log.write(level, "http server", sys.exc_info()[1] if traceback else None, error=msg.strip())

    def _connect(self, accepted: socket.socket, address: Any) -> "_Connection":
        connection = _Connection(self, accepted)
        if not self.path:
            connection.remote_addr, connection.remote_port = address[:2]
        return connection


class _Connection(cheroot.server.HTTPConnection):
    """One client's connection. On one worker at a time, or with the selector.

    cheroot's workers call `communicate` and `close`; its own files of the socket are not used.
    """

    server: Listener
    #: The other end, as far as the connection shows.
    peer: Peer

    def __init__(self, server: Listener, sock: socket.socket) -> None:
        sock.setblocking(False)
        super().__init__(server, sock, lambda *_: io.BytesIO())
        self._framing = Framing(server.http.max_body_bytes)
        self._generation = server.security.generation  # before the context, which may be one load newer then
        self._context = server.context
        self._has_shaken_hands = self._context is None
        self._is_counted = False
        self._held_bytes = 0
        # By when the request must be whole that is under way, if one is; the first one with its handshake.
        self._deadline: float | None = self._next_deadline()
        # By when an answer must be taken, if one waits; and whether it is the last one.
        self._answer_deadline: float | None = None
        self._is_last = False
        #: Whether bytes came behind the last request that were not parsed yet.
        self._has_unread = False
        #: What of an answer its client has not taken yet.
        self._waiting = bytearray()
        self._is_large = False

    @property
    def is_writing(self) -> bool:
        """Whether its client has not taken its answer yet."""
        return bool(self._waiting)

    @property
    def has_more(self) -> bool:
        """Whether it can go on at once: bytes of its next request are there."""
        return self._has_unread and not self.is_writing

    @property
    def is_outdated(self) -> bool:
        """Whether what this connection has proved counts no longer: another CA, other rules, a user's other groups."""
        security = self.server.security
        return self._generation < (security.generation if self.server.path else security.changed_at)

    def communicate(self) -> bool:
        """Go on with what has come in; return whether the connection stays open, if only to be written to."""
        try:
            self._flush()
            goes_on = True
            while goes_on and not self.is_writing and not self._is_last:
                answered = self._go_on()
                self._is_last = answered is None
                goes_on = bool(answered) and not self.is_writing and self.server.stay(self)
            return self._wait_taken() if self.is_writing else not self._is_last
        except AgentError as error:
            self.server.recorder.refused(error.code)
            self.server.refusals.tell(self.remote_addr, what="answer", outcome=error.code, error=error.message)
        except OSError as error:
            log.debug("client left", client=self.remote_addr, error=str(error))
        return False

    def _wait_taken(self) -> bool:
        """Let go until the client takes more of its answer; return False where it has had its time.

        Raises:
            AgentError: TOO_MANY_CONNECTIONS: too much waits for it.
        """
        if self._answer_deadline is None:
            self._answer_deadline = time.monotonic() + _ANSWER_S
        self._count_partial_bytes(len(self._waiting))
        return time.monotonic() < self._answer_deadline

    def wait_readable(self, timeout_s: float) -> bool:
        """Wait until more has come in from the client, or it has gone; return whether it is so."""
        if self._has_unread or (isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()):
            return True
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _go_on(self) -> bool | None:
        """Go on with what has come in; return whether a request was answered, None when no other one will be."""
        self._answer_deadline = None
        try:
            if not self._is_counted:
                self._enter()
            try:
                request = self._receive()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._wait()
                return False
        except AgentError as error:
            self._refuse(error)
            return None
        if request is None:
            return None
        response = self.server.respond(request, self.peer)
        keeps = request.keeps and self.server.ready and not self.is_outdated
        self._queue(response, connection=None if keeps and request.minor else b"keep-alive" if keeps else b"close")
        del response  # a large one is gone when it is sent
        self._flush()
        return True if keeps else None

    def _queue(self, response: Response, *, connection: bytes | None) -> None:
        """Have an answer wait to be sent; `connection` says what becomes of it where its client may err."""
        status, headers, body = response
        told = [(b"Connection", connection)] if connection else []
        lines = [b"HTTP/1.1 " + status, *(name + b": " + value for name, value in (*headers, *told))]
        self._waiting += b"\r\n".join(lines) + b"\r\n\r\n" + body
        self._is_large = self._is_large or len(body) >= _LARGE_BYTES

    def _flush(self) -> None:
        """Send what the client takes at once, and wait for nobody."""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
            while self._waiting:
                del self._waiting[: self.socket.send(self._waiting)]
            if self._is_large:
                self._is_large, self.server.sent_large = False, True

    def _refuse(self, error: AgentError) -> None:
        """Answer what is no request, or may not become one; the connection is of no use after it."""
        self.server.recorder.refused(error.code)
        self.server.refusals.tell(self.remote_addr, what="connection", outcome=error.code, error=error.message)
        if not self._has_shaken_hands and error.code is not Code.TLS_REQUIRED:
            return  # a TLS client that has shaken no hands can read nothing
        body = encode_error(error)
        status = f"{error.status} {HTTPStatus(error.status).phrase}"
        headers = {"Content-Type": JSON_TYPE, "Content-Length": str(len(body))}
        if error.status == 503:
            headers["Retry-After"] = "5"
        told = [(name.encode(), value.encode()) for name, value in headers.items()]
        with contextlib.suppress(OSError):  # a client that is gone gets none
            self._queue((status.encode(), told, body), connection=b"close")
            self._flush()
            self._read_away()

    def close(self) -> None:
        """Close, and make room for another."""
        self._count_partial_bytes(0)
        if self._is_large:  # its client left before it had taken all of it
            self._waiting.clear()
            self._is_large, self.server.sent_large = False, True
        if self._is_counted:
            self._is_counted = False
            self.server.leave(self._key)
        super().close()

    def _wait(self) -> None:
        """Let go until more comes.

        Raises:
            AgentError: REQUEST_TOO_SLOW, TOO_MANY_CONNECTIONS: nothing more is waited for.
        """
        self._has_unread = False
        self._count_partial_bytes(self._framing.size)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            seconds = self.server.http.request_timeout_sec
            raise AgentError(Code.REQUEST_TOO_SLOW, f"the request was not complete after {seconds} s")

    def _count_partial_bytes(self, size: int) -> None:
        before, self._held_bytes = self._held_bytes, size
        if size != before:
            self.server.count_partial_bytes(self._key, before, size)

    def _enter(self) -> None:
        if self.server.path:
            self.remote_addr, self.remote_port = LOCAL, 0
            self.peer = Peer(LOCAL, user=find_local_user(self.socket))
            counted_as = f"unix:{self.peer.user.name if self.peer.user else ''}"
        else:
            address = ipaddress.ip_address(self.remote_addr)
            if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
                self.remote_addr = str(address.ipv4_mapped)
            self.peer, counted_as = Peer(self.remote_addr), self.remote_addr
        self._key, limit = self.server.find_share(counted_as)
        self.server.enter(self._key, limit)
        self._is_counted = True

    def _receive(self) -> Request | None:
        """Take in what is there; return a request once it is whole, None when the client is done.

        Raises:
            BlockingIOError, ssl.SSLWantReadError: more is needed.
            AgentError: what came in is not taken.
        """
        if not self._has_shaken_hands and not self._shake_hands():
            return None
        if self.is_outdated and self._framing.is_empty:
            return None  # the client connects anew
        while (request := self._framing.take()) is None:
            if self._framing.take_expectation():
                self._waiting += b"HTTP/1.1 100 Continue\r\n\r\n"
                self._flush()
            data = self.socket.recv(_READ_BYTES)
            if not data and self._framing.is_empty:
                return None
            if not data:
                raise AgentError(Code.BAD_HTTP, "the connection ended inside a request")
            if self._deadline is None:
                self._deadline = self._next_deadline()
            self._framing.feed(data)
        self._has_unread = not self._framing.is_empty
        self._deadline = self._next_deadline() if self._has_unread else None
        self._count_partial_bytes(self._framing.size)
        return request

    def _next_deadline(self) -> float:
        return time.monotonic() + self.server.http.request_timeout_sec

    def _shake_hands(self) -> bool:
        """Go on with the TLS handshake; return False when the client has ended it."""
        assert self._context is not None
        if not isinstance(self.socket, ssl.SSLSocket):
            first = self.socket.recv(1, socket.MSG_PEEK)
            if first != _TLS_HANDSHAKE:
                if first:
                    raise AgentError(Code.TLS_REQUIRED, "this port accepts only TLS, but received plain text")
                return False
            self.socket = self._context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        try:
            self.socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.server.refusals.tell(self.remote_addr, what="TLS", outcome=error.reason or "TLS_FAILED")
            return False
        self._has_shaken_hands = True
        shown = self.socket.getpeercert()
        self.peer = self.peer._replace(names=certificate_names(shown), not_after=certificate_end(shown))
        return True

    def _read_away(self) -> None:
        """Say that no more comes and take what is there: else closing would reset the answer away."""
        self.socket.shutdown(socket.SHUT_WR)
        for _ in range(_READ_AWAY_TIMES):
            if not self.socket.recv(_READ_BYTES):
                break


def _remove_old_socket(path: str) -> None:
    """Remove the socket that an earlier agent left.

    Raises:
        OSError: somebody listens there, or it is no socket.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "exists and is not a socket", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another process listens on it", path)


def _open_to_group(path: str, group: str) -> None:
    """Let a group connect; without such a group, or where it may not be given away, root and the agent's user alone."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, 0o660)
    except (KeyError, PermissionError) as error:
        log.info("only root and the agent's user can open the socket", path=path, group=group, error=str(error))
