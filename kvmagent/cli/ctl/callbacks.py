"""Takes the agent's callbacks: a small HTTP server that lives for one task, on the address that the agent sees.

The path holds a secret of chance: whoever else finds the port is answered 404, and so is a callback of another task.
"""

import hmac
import json
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

# A client that says nothing, or too much, is not waited for.
_IDLE_S, _MAX_BODY_BYTES = 10.0, 64 * 2**20


class Receiver:
    """The receiving end of one task's callback. `wait` may be called from any thread."""

    def __init__(self, address: str, task_uuid: str) -> None:
        self._task_uuid = task_uuid
        self._path = f"/{secrets.token_urlsafe(24)}"
        self._arrived = threading.Event()
        self._server = _Server((address, 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="callbacks", daemon=True)
        host = f"[{address}]" if ":" in address else address
        #: Where the callback goes.
        self.url = f"http://{host}:{self._server.server_address[1]}{self._path}"
        #: The reply, once it has come.
        self.reply: Any = None

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the callback; return whether it has come."""
        return self._arrived.wait(timeout_s)

    def take(self, path: str, task_uuid: str, content: bytes) -> int:
        """Take a callback in; return the status that it is answered with."""
        if not hmac.compare_digest(path.encode(), self._path.encode()) or task_uuid != self._task_uuid:
            return 404
        try:
            reply = json.loads(content)
        except ValueError:
            return 400
        if not isinstance(reply, dict):
            return 400
        self.reply = reply
        self._arrived.set()
        return 200


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], receiver: Receiver) -> None:
        self.receiver = receiver
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind; without the base class's look-up of the address's name, which may take long where no resolver is."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is no concern of the operator's."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _IDLE_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY_BYTES:
            status = 400
        else:
            content = self.rfile.read(int(length))
            status = self.server.receiver.take(self.path, self.headers.get("taskuuid", ""), content)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the operator's."""
