"""An HTTP server in front of an agent, or in place of one: passes requests on, answers them itself, or cuts them."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

LOOPBACK = "127.0.0.1"


class Request(NamedTuple):
    """A request as it came in; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """A status and its JSON."""

    status: int
    body: Any


# What becomes of a request: its answer, or None to cut the connection without one.
Decide = Callable[[Request], Answer | None]


class Front:
    """Decides by `decide` what becomes of each request, and records all of them."""

    def __init__(self, decide: Decide) -> None:
        self.decide = decide
        self.requests: list[Request] = []
        self._server = _Server((LOOPBACK, 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="front")

    def __enter__(self) -> Front:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{LOOPBACK}:{self._server.server_port}"

    def posts(self) -> list[Request]:
        """The POST requests that came in, in order."""
        return [request for request in self.requests if request.method == "POST"]


def pass_on(port: int, request: Request) -> Answer:
    """What the agent on that port answers."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
    try:
        connection.request(request.method, request.path, request.body or None, dict(request.headers))
        response = connection.getresponse()
        return Answer(response.status, json.loads(response.read()))
    finally:
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, address: tuple[str, int], owner: Front) -> None:
        self.owner = owner
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        request = Request(self.command, self.path, headers, body)
        self.server.owner.requests.append(request)
        answer = self.server.owner.decide(request)
        if answer is None:
            return
        content = json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what came in is recorded."""
