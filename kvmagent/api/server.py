"""The HTTP server: CherryPy dispatches, cheroot serves. The only user of both.

    cheroot thread -> CherryPy request -> Routes -> handler -> Answer
                        unknown path 404, other method 405, AgentError its own status, all as JSON

Routes come from the declared commands; a handler is a function from `Call` to `Answer` and knows no CherryPy.
"""

import ipaddress
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cheroot.server
import cheroot.wsgi
import cherrypy

from kvmagent.api.wire import encode, encode_error
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.settings import HttpSection, SecuritySection

log = logging.getLogger(__name__)

# Immediate answers wait for a shared commit at most, so that few threads serve many clients; reads ask libvirt.
_THREADS = 16
# Connects beyond the backlog wait a second or more for the kernel to try again.
_BACKLOG = 1024
_MAX_HEADER_BYTES = 16384
_SOCKET_TIMEOUT_S = 10
_READ_BYTES = 65536
# A body that is too large by more than this is not read away: its connection is closed on it.
_READ_AWAY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Call:
    """One request: header names are in lower case, `parts` are the path's variable segments."""

    headers: Mapping[str, str]
    query: Mapping[str, str]
    parts: tuple[str, ...]
    body: bytes
    client: str


@dataclass(frozen=True)
class Answer:
    """A status and a body that is JSON already."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Answer]


class Server:
    """Serves `routes`: (method, path) to handler; a segment of a path that is `*` matches any text."""

    def __init__(self, http: HttpSection, security: SecuritySection, routes: Mapping[tuple[str, str], Handler]) -> None:
        self._http = http
        application = cherrypy.Application(None, "", {"/": {"request.dispatch": _Dispatcher(http, security, routes)}})
        # CherryPy's own line for each request repeats what the task's lines say.
        application.log.access = lambda: None
        application.log.screen = False
        cherrypy.log.screen = False
        self._server = _CherootServer(
            (http.host, http.port),
            application,
            numthreads=_THREADS,
            request_queue_size=_BACKLOG,
            timeout=_SOCKET_TIMEOUT_S,
            server_name="kvmagent",
        )
        self._server.max_request_header_size = _MAX_HEADER_BYTES
        self._server.max_request_body_size = http.max_body_bytes + _READ_AWAY_BYTES
        self._thread = threading.Thread(target=self._server.serve, name="http", daemon=True)

    def bind(self) -> None:
        """Listen: clients can connect, and wait for `start` to be answered.

        Raises:
            AgentError: BAD_CONFIGURATION, when the address cannot be bound.
        """
        try:
            self._server.prepare()
        except OSError as error:
            address = f"{self._http.host}:{self._http.port}"
            raise AgentError(Code.BAD_CONFIGURATION, f"cannot listen on {address}: {error}") from error

    def start(self) -> None:
        """Serve."""
        self._thread.start()
        log.info("listening on http://%s:%d", self._http.host, self._http.port)

    def stop(self) -> None:
        """Answer what came in, then close."""
        self._server.stop()
        if self._thread.ident is not None:
            self._thread.join()


class _Dispatcher:
    """CherryPy's dispatcher: sets the handler of each request. Everything that it refuses is JSON."""

    def __init__(self, http: HttpSection, security: SecuritySection, routes: Mapping[tuple[str, str], Handler]) -> None:
        self._http = http
        self._allowed = [ipaddress.ip_network(network) for network in security.allowed_clients]
        self._routes: dict[tuple[str, ...], dict[str, Handler]] = {}
        for (method, path), handler in routes.items():
            self._routes.setdefault(tuple(path.strip("/").split("/")), {})[method] = handler

    def __call__(self, path_info: str) -> None:
        request = cherrypy.serving.request
        request.config = {}
        request.error_page = {"default": _unexpected}
        request.process_request_body = False
        request.handler = self._handle

    def _handle(self) -> bytes:
        request, response = cherrypy.serving.request, cherrypy.serving.response
        try:
            answer = self._answer(request)
        except AgentError as error:
            answer = _refusal(error)
        except Exception as error:
            log.exception("request failed method=%s path=%r", request.method, request.path_info)
            answer = _refusal(AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False))
        response.status = answer.status
        response.headers["Content-Type"] = "application/json"
        response.headers.update(answer.headers)
        return answer.body

    def _answer(self, request: Any) -> Answer:
        self._check_client(request.remote.ip)
        methods, parts = self._find(request.path_info)
        handler = methods.get(request.method)
        if handler is None:
            allow = ", ".join(sorted(methods))
            error = AgentError(Code.METHOD_NOT_ALLOWED, f"{request.path_info} takes {allow}, not {request.method}")
            return _refusal(error, Allow=allow)
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = self._read_body(request) if request.method == "POST" else b""
        return handler(Call(headers, request.params, parts, body, request.remote.ip))

    def _find(self, path: str) -> tuple[dict[str, Handler], tuple[str, ...]]:
        segments = tuple(path.strip("/").split("/"))
        if segments in self._routes:
            return self._routes[segments], ()
        for pattern, methods in self._routes.items():
            if len(pattern) == len(segments) and all(p in ("*", s) for p, s in zip(pattern, segments, strict=True)):
                return methods, tuple(s for p, s in zip(pattern, segments, strict=True) if p == "*")
        raise AgentError(Code.UNKNOWN_PATH, f"nothing is served at {path!r}")

    def _read_body(self, request: Any) -> bytes:
        """Read the body, keeping no more than the limit; the rest is read away, so that the client sees the answer."""
        limit = self._http.max_body_bytes
        kept, size = bytearray(), 0
        while part := request.rfile.read(_READ_BYTES):
            size += len(part)
            if size <= limit:
                kept += part
        if size > limit:
            raise AgentError(Code.BODY_TOO_LARGE, f"the body has {size} bytes, the limit is {limit}")
        return bytes(kept)

    def _check_client(self, client: str) -> None:
        address = ipaddress.ip_address(client)
        if not address.is_loopback and not any(address in network for network in self._allowed):
            raise AgentError(Code.CLIENT_NOT_ALLOWED, f"{client} is not an allowed client")


class _Request(cheroot.server.HTTPRequest):
    """A request that cheroot itself refuses is told as JSON too."""

    def simple_response(self, status: str, msg: str = "") -> None:
        number = int(str(status).split()[0])
        if number >= 400:
            code = Code.BODY_TOO_LARGE if number == 413 else Code.BAD_HTTP
            msg = encode_error(AgentError(code, msg or str(status))).decode()
        head = [
            f"{self.server.protocol} {status}",
            f"Content-Length: {len(msg.encode())}",
            "Content-Type: application/json",
        ]
        if number == 413:
            self.close_connection = True
            head.append("Connection: close")
        try:
            self.conn.wfile.write("\r\n".join([*head, "", msg]).encode())
        except OSError as error:
            log.debug("client left before its answer error=%s", error)


class _Connection(cheroot.server.HTTPConnection):
    RequestHandlerClass = _Request


class _CherootServer(cheroot.wsgi.Server):
    ConnectionClass = _Connection

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        log.log(level, "http: %s", msg.strip(), exc_info=traceback)


def _refusal(error: AgentError, **headers: str) -> Answer:
    if error.status == 503:
        headers["Retry-After"] = "5"
    return Answer(encode_error(error), status=error.status, headers=headers)


def _unexpected(status: str, message: str, traceback: str, version: str) -> bytes:
    """Return the body of what CherryPy refused before a handler was reached: a query string that is not UTF-8, say."""
    cherrypy.serving.response.headers["Content-Type"] = "application/json"
    code = Code.INTERNAL_ERROR if status.startswith("5") else Code.BAD_HTTP
    return encode({"success": False, "error": message, "errorCode": code, "remedy": CODES[code].remedy})
