"""Owns the receiving end of callbacks: a real HTTP server on the loopback interface, which can be made to fail.

agent -- POST callback --> ManagementServer: record, then answer as told (200 if nothing was told)
test  -- wait(task_uuid) --> the body, as soon as it is there
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

LOOPBACK = "127.0.0.1"
#: Ends an idle connection, should a client leave one open.
IDLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the server answers one callback.

    First it waits `hang_s` (cut short when the server stops). `fault` "reset" then resets the connection and "half"
    ends it in the middle of the body; either way the callback has been recorded.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    hang_s: float = 0.0
    fault: Literal["reset", "half"] | None = None


@dataclass(frozen=True, kw_only=True)
class Callback:
    """A callback as it arrived: the `order`-th of all, the `attempt`-th of its task, both counted from 1.

    Header names are in lower case; `body` is the JSON, or None if it was none; `at` is of the monotonic clock.
    """

    order: int
    attempt: int
    task_uuid: str
    path: str
    headers: Mapping[str, str]
    body: Any
    at: float


def accept_all(_task_uuid: str, _attempt: int) -> Answer:
    """200 for every callback."""
    return Answer()


class ManagementServer:
    """Records callbacks and answers them as `answer(task_uuid, attempt)` says, which may be replaced at any time.

    The port stays the same when the server is stopped and started again. With `tls` it speaks that. Threads: any.
    """

    def __init__(self, answer: Callable[[str, int], Answer] = accept_all, *, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self._tls = tls
        self.port = 0
        self._server: CallbackServer | None = None
        self._thread: threading.Thread | None = None
        self._callbacks: list[Callback] = []
        self._arrived = threading.Condition()

    def __enter__(self) -> ManagementServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where callbacks go."""
        return f"http{'s' if self._tls else ''}://{LOOPBACK}:{self.port}/callback"

    def start(self) -> None:
        """Listen; on the earlier port, if there was one."""
        self._server = CallbackServer((LOOPBACK, self.port), self)
        self.port = self._server.server_port
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="management-server")
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every connection, end every thread. What was recorded stays. May be called again."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.close_connections()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    def wait(self, task_uuid: str, timeout_s: float, *, attempt: int = 1) -> Any:
        """The body of a task's callback, waited for if need be; `attempt` 2 is the first repetition.

        Raises:
            TimeoutError: it did not come; the text has what did.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.callbacks(task_uuid)) >= attempt, timeout_s):
                came = [(callback.task_uuid, callback.attempt) for callback in self._callbacks]
                raise TimeoutError(f"no callback {attempt} of {task_uuid} in {timeout_s:g} s; there were {came}")
            return self.callbacks(task_uuid)[attempt - 1].body

    def callbacks(self, task_uuid: str | None = None) -> list[Callback]:
        """What has arrived for a task, or at all, in order of arrival."""
        with self._arrived:
            return [callback for callback in self._callbacks if task_uuid in (None, callback.task_uuid)]

    def record(self, path: str, headers: Mapping[str, str], content: bytes) -> Callback:
        """Take note of a callback and wake those who wait; called by the server's threads."""
        names = {name.lower(): value for name, value in headers.items()}
        task_uuid = names.get("taskuuid", "")
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        with self._arrived:
            callback = Callback(
                order=len(self._callbacks) + 1,
                attempt=len(self.callbacks(task_uuid)) + 1,
                task_uuid=task_uuid,
                path=path,
                headers=names,
                body=body,
                at=time.monotonic(),
            )
            self._callbacks.append(callback)
            self._arrived.notify_all()
        return callback


class CallbackServer(ThreadingHTTPServer):
    """The listening socket of a ManagementServer and the connections it has accepted."""

    # Joined by server_close, so that a test that counts threads finds none.
    daemon_threads = False

    def __init__(self, address: tuple[str, int], owner: ManagementServer) -> None:
        self.owner = owner
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, CallbackHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that breaks, which is what many tests are about; tell all else."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        """Wake every thread that waits for a client, or to answer one."""
        self.stopping.set()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class CallbackHandler(BaseHTTPRequestHandler):
    """One connection, kept open between callbacks."""

    server: CallbackServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_S
    # Head and body go out in two writes; the second must not wait for the first to be acknowledged.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Record the callback, then answer it."""
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        callback = self.server.owner.record(self.path, dict(self.headers.items()), content)
        answer = self.server.owner.answer(callback.task_uuid, callback.attempt)
        if answer.hang_s:
            self.server.stopping.wait(answer.hang_s)
        if answer.fault == "reset":
            # With a linger time of 0, closing sends RST; at once, before the base class ends it in good order.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        self._send(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what arrived is recorded."""

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if answer.fault == "half":
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True
            return
        self.wfile.write(answer.body)
