"""The HTTP server: the listener hands whole requests in, CherryPy dispatches them. The only user of CherryPy.

    listener -> CherryPy request -> who is it? -> Routes -> handler -> Answer
                  nobody 401, not allowed 403, unknown path 404, other method 405, AgentError its own status, all JSON
                  a public path: an allowed address is enough

Routes come from the declared commands; a handler is a function from `Call` to `Answer` and knows no CherryPy.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import cherrypy

from kvmagent.api.listener import Listener, Request, Response
from kvmagent.api.security import ANONYMOUS, Security
from kvmagent.api.wire import encode, encode_error
from kvmagent.audit import Refusals, audit
from kvmagent.logs import Log, error_fields, log_context
from kvmagent.meters import Meters
from kvmagent.model.command import JSON_TYPE
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.settings import HttpSection

log = Log(__name__)


@dataclass(frozen=True)
class Call:
    """One request: header names are in lower case, `parts` are the path's variable segments.

    `client` is the address that it came from, `caller` who it proved to be.
    """

    headers: Mapping[str, str]
    query: Mapping[str, str]
    parts: tuple[str, ...]
    body: bytes
    client: str
    caller: str


@dataclass(frozen=True)
class Answer:
    """A status and a body, which is JSON already unless the headers say otherwise."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Answer]

# Of every answer that does not say otherwise: what the agent tells is of this moment, and is never run or shown by
# a browser as something else.
_HEADERS: Mapping[str, str] = MappingProxyType(
    {"Content-Type": JSON_TYPE, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
)


class Server:
    """Serves `routes`: (method, path) to handler; a segment of a path that is `*` matches any text.

    The paths of `public` ask nobody for credentials.
    """

    def __init__(
        self,
        http: HttpSection,
        security: Security,
        routes: Mapping[tuple[str, str], Handler],
        *,
        public: frozenset[str] = frozenset(),
        meters: Meters | None = None,
    ) -> None:
        meters = meters or Meters()
        self._http = http
        self._security = security
        self._refusals = Refusals()
        application = _Application(_Dispatcher(security, routes, public, meters, self._refusals))
        self._server = Listener(http, security, application.respond, meters, self._refusals)
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
        scheme = "http" if self._security.context is None else "https"
        log.info("listening", url=f"{scheme}://{self._http.host}:{self._http.port}")

    def look_after(self) -> None:
        """Tell what was only counted. To be called every second or so."""
        self._refusals.flush()

    def stop(self) -> None:
        """Answer what came in, then close."""
        self._server.stop()
        if self._thread.ident is not None:
            self._thread.join()


class _Application:
    """One CherryPy application, called by the listener without WSGI between them."""

    def __init__(self, dispatcher: "_Dispatcher") -> None:
        self._application = cherrypy.Application(None, "", {"/": {"request.dispatch": dispatcher}})
        self._application.request_class = _Request
        # CherryPy's own line for each request repeats what the task's lines say.
        self._application.log.access = lambda: None
        self._application.log.screen = False
        cherrypy.log.screen = False

    def respond(self, asked: Request) -> Response:
        """Return the answer to a request."""
        connection, server = asked.conn, asked.server
        local = cherrypy.lib.httputil.Host(*server.bind_addr[:2])
        remote = cherrypy.lib.httputil.Host(connection.remote_addr, connection.remote_port)
        scheme = "http" if server.security.context is None else "https"
        request, response = self._application.get_serving(local, remote, scheme, "HTTP/1.1")
        request.names = connection.names
        try:
            request.run(
                asked.method.decode("latin-1"),
                _decode_path(asked.path),
                asked.qs.decode("latin-1"),
                asked.request_protocol.decode("latin-1"),
                [(name.decode("latin-1"), value.decode("latin-1")) for name, value in asked.inheaders.items()],
                asked.rfile,
            )
            return response.output_status, response.header_list, b"".join(response.body)
        finally:
            self._application.release_serving()


class _Request(cherrypy.Application.request_class):  # type: ignore[misc]
    """CherryPy's request without what nothing here has: tools, hooks, forms. Everything that it refuses is JSON.

    Source: CherryPy 18 _cprequest.Request.respond.
    """

    def respond(self, path_info: str) -> None:
        response = cherrypy.serving.response
        response.headers["Server"] = "kvmagent"  # and no version of CherryPy
        self.error_page = {"default": _unexpected}
        try:
            self.process_headers()
            self.get_resource(path_info)
            self.process_query_string()
            response.body = self.handler()
        except cherrypy.HTTPError as error:
            error.set_response()
        response.finalize()


class _Dispatcher:
    """CherryPy's dispatcher: sets the handler of each request."""

    def __init__(
        self,
        security: Security,
        routes: Mapping[tuple[str, str], Handler],
        public: frozenset[str],
        meters: Meters,
        refusals: Refusals,
    ) -> None:
        self._refusals = refusals
        self._security = security
        self._public = public
        self._meters = meters
        self._routes: dict[tuple[str, ...], dict[str, Handler]] = {}
        for (method, path), handler in routes.items():
            self._routes.setdefault(tuple(path.strip("/").split("/")), {})[method] = handler

    def __call__(self, path_info: str) -> None:
        cherrypy.serving.request.handler = self._handle

    def _handle(self) -> bytes:
        request, response = cherrypy.serving.request, cherrypy.serving.response
        asked = {"method": request.method, "path": request.path_info, "client": request.remote.ip}
        try:
            answer = self._answer(request)
        except AgentError as error:
            self._meters.refused(error.code)
            log.debug("request refused", **asked, **error_fields(error))
            answer = _refusal(error)
        except Exception as error:
            log.failure("request failed in a way that nothing expected", error, **asked)
            answer = _refusal(AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False))
        response.status = answer.status
        response.headers.update({**_HEADERS, **answer.headers})
        return answer.body

    def _answer(self, request: Any) -> Answer:
        headers = {name.lower(): value for name, value in request.headers.items()}
        client, caller = request.remote.ip, ""
        try:
            self._security.check_browser(request.method, headers)
            if request.path_info in self._public:
                caller = self._security.admit(client)
            else:
                caller = self._security.identify(client, request.names, headers.get("authorization"))
            methods, parts = self._find(request.path_info)
            handler = methods.get(request.method)
            if handler is None:
                allow = ", ".join(sorted(methods))
                message = f"{request.path_info} takes {allow}, not {request.method}"
                raise AgentError(Code.METHOD_NOT_ALLOWED, message, details={"allow": allow})
        except AgentError as error:
            what = f"{request.method} {request.path_info}"
            if caller in ("", ANONYMOUS):
                self._refusals.tell(client, what=what, outcome=error.code, error=error.message)
            else:
                audit("refused", caller=caller, client=client, what=what, outcome=error.code, error=error.message)
            raise
        repeated = [name for name, value in request.params.items() if not isinstance(value, str)]
        if repeated:
            raise AgentError(Code.BAD_QUERY, f"query parameter {repeated[0]!r} stands more than once")
        body = request.rfile.read() if request.method == "POST" else b""
        with log_context(caller=caller):
            return handler(Call(headers, request.params, parts, body, client, caller))

    def _find(self, path: str) -> tuple[dict[str, Handler], tuple[str, ...]]:
        segments = tuple(path.strip("/").split("/"))
        if segments in self._routes:
            return self._routes[segments], ()
        for pattern, methods in self._routes.items():
            if len(pattern) == len(segments) and all(p in ("*", s) for p, s in zip(pattern, segments, strict=True)):
                return methods, tuple(s for p, s in zip(pattern, segments, strict=True) if p == "*")
        raise AgentError(Code.UNKNOWN_PATH, f"nothing is served at {path!r}")


def _decode_path(path: bytes) -> str:
    """Return a path whose %XX are decoded: UTF-8, and what is not that byte by byte."""
    try:
        return path.decode()
    except UnicodeDecodeError:
        return path.decode("latin-1")


def _refusal(error: AgentError) -> Answer:
    headers = {}
    if error.status == 503:
        headers["Retry-After"] = "5"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code is Code.METHOD_NOT_ALLOWED:
        headers["Allow"] = str(error.details["allow"])
    return Answer(encode_error(error), status=error.status, headers=headers)


def _unexpected(status: str, message: str, traceback: str, version: str) -> bytes:
    """Return the body of what CherryPy refused before a handler was reached: a query string that is not UTF-8, say."""
    cherrypy.serving.response.headers["Content-Type"] = JSON_TYPE
    code = Code.INTERNAL_ERROR if status.startswith("5") else Code.BAD_HTTP
    return encode({"success": False, "error": message, "errorCode": code, "remedy": CODES[code].remedy})
