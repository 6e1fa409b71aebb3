"""One agent over HTTP: GET, and POST that is repeated with the same task id until it is answered.

Every answer is JSON. What cannot be reached, or not be trusted, ends in a CtlError with the one thing to do about it.
"""

import errno
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from kvmagent.backoff import Backoff
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.model.errors import CODES, AgentError
from kvmagent.model.urls import shown_url
from kvmagent.secretfiles import read_private

_CONNECT_S, _READ_S = 5.0, 30.0
# So many VMs are asked for at once: each page is answered in time, whatever the host has.
_PAGE = 100
# More than any agent has or says: what goes on for longer is none.
_MOST_VMS, _MOST_BYTES = 100_000, 2**26
# How long a server that refuses a client's certificate may take to say so.
_ALERT_S = 2.0
# How long a POST whose answer was lost is sent again, and with what pauses at first and at most.
_RESEND_S, _RESEND = 30.0, Backoff(0.25, 4.0)
_UNREACHABLE = (
    "Start the agent there (systemctl start kvmagent; kvmagentctl doctor says what is wrong), or name another with "
    "--url or KVMAGENT_URL."
)

# No connection was made, so that nothing was sent: no agent has the task.
_NO_CONNECTION = (ConnectionRefusedError, FileNotFoundError, PermissionError, socket.gaierror)


@dataclass(frozen=True)
class Target:
    """Which agent, and who asks: `ca`, `cert`, `key` and `token_file` are files, empty where there is none."""

    url: str
    ca: str = ""
    cert: str = ""
    key: str = ""
    token_file: str = ""


class Reply(NamedTuple):
    """An answer's status, its JSON, and its ETag where it has one."""

    status: int
    body: Any
    tag: str = ""


class Agent:
    """One agent. Each request has a connection of its own."""

    def __init__(self, target: Target) -> None:
        parts = _split(target.url)
        self.url = target.url.rstrip("/")
        self.is_tls = parts.scheme == "https"
        self._host = parts.hostname or "localhost"
        self._port = parts.port or (443 if self.is_tls else 80)
        self._socket = parts.path if parts.scheme == "unix" else ""
        self._prefix = "" if self._socket else parts.path.rstrip("/")
        self._context = _make_context(target) if self.is_tls else None
        # Of what was read last at a path its ETag and its answer: an unchanged list is not sent again.
        self._known: dict[str, tuple[str, Any]] = {}
        self._headers = {"Authorization": f"Bearer {_read_token(target.token_file)}"} if target.token_file else {}
        shows_token = bool(target.token_file) and parts.scheme == "http" and not _is_loopback(self._host)
        #: What whoever asks is to know before the first request; empty for nothing.
        self.warning = (
            f"{shown_url(self.url)} is plain HTTP: others on the network can read the token" if shows_token else ""
        )

    def get(self, *segments: str, query: str = "", timeout_s: float = _READ_S) -> Any:
        """Return what a GET path answers; /healthz also where it answers that the agent is not ready.

        Raises:
            CtlError: no answer; a refusal.
        """
        path = "/" + "/".join(quote(segment, safe="") for segment in segments) + (f"?{query}" if query else "")
        known_tag, known = self._known.get(path, ("", None))
        try:
            reply = self._request("GET", path, None, {"If-None-Match": known_tag} if known_tag else {}, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if reply.body is None:
            return known
        if reply.tag:
            self._known[path] = reply.tag, reply.body
        if reply.status == 200 or (segments == ("healthz",) and "ready" in reply.body):
            return reply.body
        raise _refusal(reply)

    def list_vms(self, *, fields: str = "", timeout_s: float = _READ_S) -> list[Any]:
        """Return all VMs, page by page, with these fields alone or whole. An agent without pages returns all at once.

        Raises:
            CtlError: no answer; a refusal.
        """
        query = {"limit": _PAGE} | ({"fields": fields} if fields else {})
        found: dict[str, Any] = {}
        try:
            while True:
                body = self.get("vms", query=urlencode(query), timeout_s=timeout_s)
                known = len(found)
                found |= self._read_vms(body)
                if "next" not in body:
                    return list(found.values())
                if len(found) == known or len(found) > _MOST_VMS:
                    raise self.not_understood("its list of VMs does not end")
                query["cursor"] = body["next"]
        except CtlError as error:
            if error.code != "BAD_QUERY" or found:
                raise
            return list(self._read_vms(self.get("vms", timeout_s=timeout_s)).values())

    def _read_vms(self, body: Any) -> dict[str, Any]:
        """Return the VMs of a list by their UUIDs."""
        vms = body.get("vms")
        if not isinstance(vms, list) or not all(
            isinstance(vm, dict) and isinstance(vm.get("vmUuid"), str) for vm in vms
        ):
            raise self.not_understood("what it lists are no VMs")
        return {vm["vmUuid"]: vm for vm in vms}

    def not_understood(self, words: str) -> CtlError:
        """Return the error of an agent, or what is taken for one, whose answer has not the shape of one."""
        words = f"{self.url}: its answer cannot be understood ({words})"
        remedy = "See that the URL is an agent's, and that kvmagentctl --version is no older than the agent's."
        return CtlError(Exit.UNREACHABLE, "NOT_UNDERSTOOD", words, remedy)

    def ask(self, path: str, body: Mapping[str, Any], *, timeout_s: float = _READ_S) -> Any:
        """Return the answer of a POST that changes nothing.

        Raises:
            CtlError: no answer; a refusal.
        """
        headers = {"Content-Type": "application/json"}
        try:
            reply = self._request("POST", path, json.dumps(body).encode(), headers, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if reply.status == 200:
            return reply.body
        raise _refusal(reply)

    def probe(self, path: str, timeout_s: float = _READ_S) -> tuple[int, str]:
        """Return the status and the content type of what is no JSON: the page, the metrics.

        Raises:
            CtlError: no answer.
        """
        try:
            status, headers, _ = self._exchange("GET", f"/{path}", None, {}, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        return status, headers.get("Content-Type", "")

    def get_text(self, path: str) -> str:
        """Return an answer that is not JSON: the metrics.

        Raises:
            CtlError: no answer; a refusal.
        """
        try:
            status, _, content = self._exchange("GET", f"/{path}", None, {}, _READ_S)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if status != http.HTTPStatus.OK:
            raise CtlError(Exit.FAILED, f"HTTP_{status}", f"{self.url}/{path} answers HTTP {status}", "")
        return content.decode(errors="replace")

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        task_uuid: str,
        callback_url: str,
        tell: Callable[[str], None],
    ) -> str:
        """Send a command until it is answered, always as the same task; return the task's state.

        Without an answer it is sent again for as long as `_RESEND_S`.

        Raises:
            CtlError: refused; or no answer in time, and then the agent may or may not have received the task.
        """
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "taskuuid": task_uuid, "callbackurl": callback_url}
        give_up_at, failures = time.monotonic() + _RESEND_S, 0
        is_first = True
        while True:
            try:
                reply = self._request("POST", path, content, headers, _READ_S)
                if reply.status == 200:
                    return str(reply.body["state"])
                if reply.status != 503:
                    raise _refusal(reply)
                trouble = f"the agent accepts no tasks now: {reply.body.get('error')}"
            except (OSError, http.client.HTTPException) as error:
                if (refusal := self._find_refusal(error)) is not None:
                    raise self._unreachable(refusal) from error
                if is_first and isinstance(error, _NO_CONNECTION):
                    raise self._unreachable(error) from error
                trouble = f"the connection was lost: {_words(error)}"
            failures += 1
            pause_s = _RESEND.pause_s(failures)
            if time.monotonic() + pause_s >= give_up_at:
                raise CtlError(
                    Exit.UNREACHABLE,
                    "ANSWER_LOST",
                    f"{self.url}: {trouble}; the agent may or may not have received the task",
                    f"When the agent is back, run: kvmagentctl task {task_uuid}",
                    task_uuid=task_uuid,
                )
            is_first = False
            tell(f"{trouble}; sending the same task again")
            time.sleep(pause_s)

    def _request(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        """Raises OSError and HTTPException where no whole answer came."""
        status, told, text = self._exchange(method, path, content, headers, timeout_s)
        if status == 304 and "If-None-Match" in headers:
            return Reply(status, None)
        try:
            answer = json.loads(text)
            if isinstance(answer, dict):
                return Reply(status, answer, told.get("ETag", ""))
        except (ValueError, RecursionError):
            pass
        raise CtlError(
            Exit.UNREACHABLE,
            "NOT_AN_AGENT",
            f"{self.url}: answered HTTP {status}, but is not a kvmagent",
            "Give the agent's own address with --url, without a proxy in between.",
        )

    def _exchange(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body. Raises OSError and HTTPException where no whole answer came in time."""
        connection = self._open()
        is_late = threading.Event()
        timer = None
        try:
            connection.connect()
            # Of each read by itself: who sends a byte now and then would never be late.
            connection.sock.settimeout(timeout_s)
            timer = threading.Timer(timeout_s, _cut, (connection.sock, is_late))
            timer.daemon = True
            timer.start()
            connection.request(method, self._prefix + path, content, {**self._headers, **headers})
            response = connection.getresponse()
            body = response.read(_MOST_BYTES)
            if is_late.is_set():
                raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(body, response.length)
            if len(body) == _MOST_BYTES:
                raise OSError(errno.EFBIG, f"an answer of more than {_MOST_BYTES // 2**20} MiB")
            return response.status, response.headers, body
        except (OSError, http.client.HTTPException) as error:
            if is_late.is_set():
                raise TimeoutError from error
            raise
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()

    def _open(self) -> http.client.HTTPConnection:
        if self._socket:
            return _UnixConnection(self._socket)
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_S)
        return http.client.HTTPSConnection(self._host, self._port, timeout=_CONNECT_S, context=self._context)

    def _find_refusal(self, error: Exception) -> ssl.SSLError | None:
        """Return why TLS was refused, if it was that which ended a connection.

        In TLS 1.3 a client learns only after its handshake that its certificate, or none, is refused; a request that
        it has sent by then resets the connection, and the alert is lost. One that sends nothing gets it.
        """
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return error
        if self._context is None or isinstance(error, ConnectionRefusedError):
            return None
        connection = self._open()
        try:
            connection.connect()
            connection.sock.settimeout(_ALERT_S)
            connection.sock.recv(1)
        except ssl.SSLEOFError:
            return None
        except ssl.SSLError as refusal:
            return refusal
        except OSError:
            return None
        finally:
            connection.close()
        return None

    def _unreachable(self, error: Exception) -> CtlError:
        return _explain(self.url, self._find_refusal(error) or error)


def _cut(connection: socket.socket, is_late: threading.Event) -> None:
    """End a connection that another thread reads from; without TLS's word of farewell, which would wait for it."""
    is_late.set()
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _UnixConnection(http.client.HTTPConnection):
    """A connection to the agent of this host, by its socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CONNECT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_S)
        self.sock.connect(self._path)


def _explain(url: str, error: Exception) -> CtlError:
    """Return the error of an agent that does not answer, or that cannot be trusted, or does not trust us."""
    if isinstance(error, PermissionError):
        remedy = "Run it as root, join the socket's group (ls -l shows it), or name an address with --url."
        return CtlError(Exit.UNREACHABLE, "SOCKET_NOT_ALLOWED", f"{url}: {_words(error)}", remedy)
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = (
            "Give the CA that signed its certificate with --ca or KVMAGENT_CA, and a name of that certificate in --url."
        )
        return CtlError(Exit.UNREACHABLE, "AGENT_NOT_TRUSTED", f"{url}: {error.verify_message}", remedy)
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return CtlError(Exit.UNREACHABLE, "NOT_TLS", f"{url}: it does not use TLS", "Use http:// in the URL.")
    if isinstance(error, ssl.SSLError):
        remedy = "Give a certificate that the agent's client_ca has signed: --cert and --key."
        return CtlError(Exit.UNREACHABLE, "TLS_REFUSED", f"{url}: {_words(error)}", remedy)
    return CtlError(Exit.UNREACHABLE, "AGENT_UNREACHABLE", f"{url}: {_words(error)}", _UNREACHABLE)


def _refusal(reply: Reply) -> CtlError:
    body = reply.body
    code, message = body.get("errorCode") or f"HTTP_{reply.status}", body.get("error") or "refused without a reason"
    return CtlError(Exit.FAILED, str(code), str(message), str(body.get("remedy") or ""))


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.RemoteDisconnected):
        return "closed without an answer"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _split(url: str) -> Any:
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        parts, has_port = None, False
    if parts is not None and parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
        return parts
    is_plain = parts is not None and has_port and not parts.query and "@" not in parts.netloc
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        remedy = "Write it as https://node1.example:7070, or unix:///run/kvmagent/kvmagent.sock."
        raise CtlError(Exit.USAGE, "BAD_URL", f"{shown_url(url)!r} is not an agent's URL", remedy)
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _make_context(target: Target) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=target.ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if target.cert:
            context.load_cert_chain(target.cert, target.key or None, password=_refuse_passphrase)
    except (OSError, ValueError) as error:
        files = ", ".join(filter(None, (target.ca, target.cert, target.key)))
        remedy = "Give readable PEM files; the key must have no passphrase."
        raise CtlError(Exit.USAGE, "BAD_CREDENTIALS", f"{files}: {_words(error)}", remedy) from error
    return context


def _refuse_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _read_token(path: str) -> str:
    try:
        lines = read_private(path, "--token-file").split()
    except AgentError as error:
        is_plain = error.remedy == CODES[error.code].remedy  # the one for the agent's own configuration
        remedy = "Give a readable file that contains the token." if is_plain else error.remedy
        raise CtlError(Exit.USAGE, "BAD_CREDENTIALS", error.message, remedy) from error
    if len(lines) != 1:
        remedy = "Write only the token into it: the second line that kvmagent --new-token printed."
        raise CtlError(Exit.USAGE, "BAD_CREDENTIALS", f"--token-file {path} holds {len(lines)} words", remedy)
    return lines[0]
