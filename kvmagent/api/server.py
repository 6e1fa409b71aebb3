"""The HTTP server: the listener hands whole requests in, CherryPy dispatches them. The only user of CherryPy.

    listener -> CherryPy request -> who is it? -> route -> has it the role? -> query -> handler -> Answer
                  nobody 401, not allowed 403, unknown path 404, other method 405, AgentError its own status, all JSON
                  a public path: an allowed address is enough

Only this module checks a caller's role, before it reads anything of the body; which VM a command is for, its body
says, and the same `Access` is asked again when that is known. Routes come from the declared commands; a handler is a
function from `Call` to `Answer` and knows no CherryPy.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from urllib.parse import parse_qsl

import cherrypy

from kvmagent.api.framing import Request
from kvmagent.api.listener import Listener, Response
from kvmagent.api.security import Peer, Security
from kvmagent.api.wire import encode_error
from kvmagent.audit import Refusals, audit
from kvmagent.logs import Log, error_fields, log_context
from kvmagent.model.command import JSON_TYPE
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.roles import ANONYMOUS, OPEN, ROLES, Access, Open, Role, check_role
from kvmagent.recorder import Recorder
from kvmagent.settings import HttpSection

log = Log(__name__)


@dataclass(frozen=True)
class Call:
    """One request: header names are in lower case, `parts` are the path's variable segments.

    `client` is the address that it came from, `access` who it proved to be and what that may.
    """

    headers: Mapping[str, str]
    query: Mapping[str, str]
    parts: tuple[str, ...]
    body: bytes
    client: str
    access: Access


@dataclass(frozen=True)
class Answer:
    """A status and a body, which is JSON already unless the headers say otherwise."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Answer]


@dataclass(frozen=True)
class Route:
    """What answers a path, the role that its callers need, and the query parameters that it takes.

    `host`: it concerns the whole host, so that a role for some VMs is not enough. `changes`: no page in a browser may
    send it; what changes nothing the agent's own page may.
    """

    handler: Handler
    needs: Role | Open
    host: bool = False
    query: frozenset[str] = frozenset()
    changes: bool = True


# Of every answer that does not say otherwise: what the agent tells is of this moment, and is never run or shown by
# a browser as something else.
_HEADERS: Mapping[str, str] = MappingProxyType(
    {"Content-Type": JSON_TYPE, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
)


# CherryPy asks where a request came to and from; nothing here asks CherryPy.
_NO_HOST = cherrypy.lib.httputil.Host("", 0)


class Server:
    """Serves `routes` by (method, path); a segment of a path that is `*` matches any text."""

    def __init__(
        self,
        http: HttpSection,
        security: Security,
        routes: Mapping[tuple[str, str], Route],
        *,
        opens_tcp: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        recorder = recorder or Recorder()
        self._refusals = Refusals()
        application = _Application(_Dispatcher(security, routes, recorder, self._refusals))
        self._opens_tcp = opens_tcp
        paths = ([http.socket] if http.socket else []) + ([""] if opens_tcp else [])
        self._listeners = [
            Listener(http, security, application.respond, recorder, self._refusals, path=path) for path in paths
        ]
        self._threads = [
            threading.Thread(target=listener.serve, name="http", daemon=True) for listener in self._listeners
        ]

    def bind(self) -> None:
        """Listen: clients can connect, and wait for `start` to be answered.

        Raises:
            AgentError: ADDRESS_NOT_FREE, when an address cannot be bound.
        """
        for listener in self._listeners:
            try:
                listener.prepare()
            except OSError as error:
                raise AgentError(Code.ADDRESS_NOT_FREE, f"cannot listen on {listener.url}: {error}") from error

    def start(self) -> None:
        """Serve."""
        for listener, thread in zip(self._listeners, self._threads, strict=True):
            thread.start()
            log.info("listening", url=listener.url)
        if not self._opens_tcp:
            log.info("no TCP listener", reason="[security] admits no TCP client, see SECURITY.md")

    def set_limits(self, http: HttpSection) -> None:
        """Have the limits of a section, which is of the same address."""
        for listener in self._listeners:
            listener.set_limits(http)

    def look_after(self) -> None:
        """Tell what was only counted, give back what large answers took. To be called every second or so."""
        self._refusals.flush()
        sent = [listener for listener in self._listeners if listener.sent_large]
        for listener in sent:
            listener.sent_large = False
        if sent:
            _give_memory_back()

    def stop(self) -> None:
        """Answer what came in, then close."""
        for listener in self._listeners:
            listener.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()


class _Application:
    """One CherryPy application, called by the listener without WSGI between them."""

    def __init__(self, dispatcher: "_Dispatcher") -> None:
        self._application = cherrypy.Application(None, "", {"/": {"request.dispatch": dispatcher}})
        self._application.log.screen = False
        cherrypy.log.screen = False

    def respond(self, asked: Request, peer: Peer) -> Response:
        """Return the answer to a request.

        CherryPy's own way there reads a request line once more, and runs hooks, tools and an engine's listeners that
        nothing here has: half of its time. Source: CherryPy 18 _cptree.Application.get_serving, _cprequest.Request.run.
        """
        request, response = self._application.request_class(_NO_HOST, _NO_HOST), self._application.response_class()
        request.app, request.asked, request.peer = self._application, asked, peer
        cherrypy.serving.load(request, response)
        try:
            request.get_resource(asked.path)
            response.headers["Server"] = "kvmagent"  # and no version of CherryPy
            response.body = request.handler()
            response.finalize()
            body = b"" if asked.method == "HEAD" else b"".join(response.body)
            return response.output_status, response.header_list, body
        except Exception as error:
            log.failure("request failed before it was dispatched", error, client=peer.address)
            body = encode_error(AgentError(Code.INTERNAL_ERROR, type(error).__name__, expected=False))
            headers = [(b"Content-Type", JSON_TYPE.encode()), (b"Content-Length", str(len(body)).encode())]
            return b"500 Internal Server Error", headers, body
        finally:
            cherrypy.serving.clear()


class _Dispatcher:
    """CherryPy's dispatcher: sets the handler of each request."""

    def __init__(
        self,
        security: Security,
        routes: Mapping[tuple[str, str], Route],
        recorder: Recorder,
        refusals: Refusals,
    ) -> None:
        self._refusals = refusals
        self._security = security
        self._recorder = recorder
        self._routes: dict[tuple[str, ...], dict[str, Route]] = {}
        for (method, path), route in routes.items():
            check_role(f"{method} {path}", route.needs, (*ROLES, *OPEN))
            self._routes.setdefault(tuple(path.strip("/").split("/")), {})[method] = route

    def __call__(self, path_info: str) -> None:
        cherrypy.serving.request.handler = self._handle

    def _handle(self) -> bytes:
        request, response = cherrypy.serving.request, cherrypy.serving.response
        asked: Request = request.asked
        about = {"method": asked.method, "path": asked.path, "client": request.peer.address}
        try:
            answer = self._answer(asked, request.peer)
        except AgentError as error:
            self._recorder.refused(error.code)
            log.debug("request refused", **about, **error_fields(error))
            answer = _refusal(error)
        except Exception as error:
            log.failure("request failed with an unexpected error", error, **about)
            answer = _refusal(AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False))
        response.status = answer.status
        response.headers.update({**_HEADERS, **answer.headers})
        return answer.body

    def _answer(self, asked: Request, peer: Peer) -> Answer:
        client, path, access = peer.address, asked.path, Access("")
        try:
            methods, parts = self._find(path)
            asks_only = asked.method in methods and not methods[asked.method].changes
            self._security.check_browser(asked.method, asked.headers, peer, asks_only=asks_only)
            if any(route.needs == "public" for route in methods.values()):
                access = self._security.admit(peer)
            else:
                access = self._security.identify(peer, asked.headers.get("authorization"))
            route = _choose(methods, asked.method, path)
            role = _check_role(access, route)
            query = _read_query(asked.query, route.query)
        except AgentError as error:
            what, caller = f"{asked.method} {path}", access.caller
            if caller in ("", ANONYMOUS):
                self._refusals.tell(client, what=what, outcome=error.code, error=error.message)
            else:
                audit("refused", caller=caller, client=client, what=what, outcome=error.code, error=error.message)
            raise
        with log_context(caller=access.caller, role=role):
            return route.handler(Call(asked.headers, query, parts, asked.body, client, access))

    def _find(self, path: str) -> tuple[dict[str, Route], tuple[str, ...]]:
        """Return the routes of a path by method, none where nothing is there, and the path's variable segments."""
        segments = tuple(path.strip("/").split("/"))
        # A path may have a `*` too, which is text like any other.
        if "*" not in segments and segments in self._routes:
            return self._routes[segments], ()
        for pattern, methods in self._routes.items():
            if len(pattern) == len(segments) and all(p in ("*", s) for p, s in zip(pattern, segments, strict=True)):
                return methods, tuple(s for p, s in zip(pattern, segments, strict=True) if p == "*")
        return {}, ()


def _choose(methods: Mapping[str, Route], method: str, path: str) -> Route:
    if not methods:
        raise AgentError(Code.UNKNOWN_PATH, f"the agent has no path {path!r}")
    if method not in methods:
        allow = ", ".join(sorted(methods))
        raise AgentError(Code.METHOD_NOT_ALLOWED, f"{path} takes {allow}, not {method}", details={"allow": allow})
    return methods[method]


def _check_role(access: Access, route: Route) -> str:
    """Return the role that lets a caller in, none where it needs none.

    Raises:
        AgentError: ROLE_MISSING.
    """
    if route.needs == "public" or route.needs == "caller":
        return ""
    return access.check(route.needs, host=route.host)


def _read_query(text: str, known: frozenset[str]) -> dict[str, str]:
    """Return the query parameters, each of which is known and stands once.

    Raises:
        AgentError: BAD_QUERY.
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict", max_num_fields=100)
    except ValueError as error:
        raise AgentError(Code.BAD_QUERY, "the query is not NAME=VALUE&... in UTF-8") from error
    query = dict(pairs)
    if unknown := [name for name in query if name not in known]:
        raise AgentError(Code.BAD_QUERY, f"unknown query parameter {unknown[0]!r}")
    if len(query) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise AgentError(Code.BAD_QUERY, f"query parameter {repeated!r} appears more than once")
    return query


def _give_memory_back() -> None:
    """Have the C library return what is free to the system. Source: malloc_trim(3)."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _refusal(error: AgentError) -> Answer:
    headers = {}
    if error.status == 503:
        headers["Retry-After"] = "5"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code is Code.METHOD_NOT_ALLOWED:
        headers["Allow"] = str(error.details["allow"])
    return Answer(encode_error(error), status=error.status, headers=headers)
