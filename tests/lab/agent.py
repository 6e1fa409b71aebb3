"""Owns an agent under test as what it is to an operator: a process with a configuration file, a log and a port.

Knows the HTTP contract, and nothing of how the agent is made.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from configparser import RawConfigParser
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tests.lab.processes import Guard, stop_child, wait_for

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 30.0

#: Whoever reaches this host's loopback gets in: an agent says so, or asks for credentials.
OPEN_TO_LOOPBACK = {"allow_unauthenticated": "true", "allowed_clients": "127.0.0.0/8"}
CREDENTIALS = frozenset({"client_ca", "tokens_file", "allow_unauthenticated"})

Settings = Mapping[str, Mapping[str, str]]


class Reply(NamedTuple):
    """An HTTP answer: its status and its JSON, or its text where it is no JSON."""

    status: int
    body: Any


class AgentProcess:
    """The agent's executable, with a state directory and a port that last across stop, kill and start.

    `settings` is section -> key -> value, over the few that the lab needs; `command` is for another executable.
    `tls` and `token` are how this class's own requests are sent. `by_socket`: by the agent's UNIX socket, with no
    setting of [security] but those given.
    """

    def __init__(
        self,
        *,
        uri: str,
        settings: Settings | None = None,
        command: Sequence[str] | None = None,
        tls: ssl.SSLContext | None = None,
        token: str | None = None,
        by_socket: bool = False,
    ) -> None:
        self._by_socket = by_socket
        self.tls = tls
        self.token = token
        #: What it is given beside the environment of the tests.
        self.environment: dict[str, str] = {}
        self._command = list(command or find_command())
        self.directory = Path(tempfile.mkdtemp(prefix="kvmagent-"))
        self.port = find_free_port()
        self.config_file = self.directory / "kvmagent.conf"
        self.log_file = self.directory / "kvmagent.log"
        self.socket = self.directory / "agent.sock"
        self._child: subprocess.Popen[bytes] | None = None
        self._last_health = "nothing"
        self._guard = Guard(self.directory)
        self._write_configuration(uri, settings or {})

    def __enter__(self) -> AgentProcess:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def url(self) -> str:
        """The agent's base URL."""
        if self._by_socket:
            return f"unix://{self.socket}"
        return f"{'http' if self.tls is None else 'https'}://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the agent that was started last."""
        assert self._child is not None
        return self._child.pid

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._child is not None and self._child.poll() is None

    def start(self, *, health: int = 200) -> None:
        """Start the agent and wait until /healthz answers with this status: 200 ready, 503 up and not ready.

        Raises:
            RuntimeError: it ended at once; the text has its log.
            TimeoutError: it does not get ready; likewise.
        """
        # HOME is how the guard knows the process; without LIBVIRT_AUTOSTART=0, a daemon that a test has
        # killed would be started again by libvirt's client.
        environment = {**os.environ, **self.environment, "HOME": str(self.directory), "LIBVIRT_AUTOSTART": "0"}
        with self.log_file.open("ab") as log:
            self._child = subprocess.Popen(
                [*self._command, "--config", str(self.config_file)],
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(lambda: self._has_health(health), timeout_s=START_TIMEOUT_S, what="the agent to be ready")
        except TimeoutError as error:
            raise TimeoutError(f"{error}, which says {self._last_health}; its log:\n{self._dump()[-8000:]}") from None

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM the agent and wait for its end; its exit status, -9 if it had to be killed."""
        assert self._child is not None
        return stop_child(self._child, timeout_s=timeout_s)

    def kill(self) -> None:
        """SIGKILL the agent: no chance to finish anything."""
        assert self._child is not None
        self._child.kill()
        self._child.wait()

    def remove(self) -> None:
        """Stop the agent if it runs, and remove its directory with state and log."""
        if self._child is not None:
            self.stop()
        self._guard.release()

    def post(
        self,
        path: str,
        body: Any,
        *,
        task_uuid: str | None = None,
        callback_url: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a command. `body` is made JSON unless it is bytes; a header that is None is not sent."""
        sent = {"Content-Type": "application/json", "taskuuid": task_uuid, "callbackurl": callback_url}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name: value for name, value in {**sent, **(headers or {})}.items() if value is not None}
        return self._request("POST", path, content, given)

    def get(self, path: str, *, headers: Mapping[str, str] | None = None) -> Reply:
        """Read."""
        return self._request("GET", path, None, headers or {})

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the agent, over TLS where it speaks that."""
        if self._by_socket:
            return UnixConnection(self.socket)
        if self.tls is None:
            return http.client.HTTPConnection(LOOPBACK, self.port, timeout=REQUEST_TIMEOUT_S)
        return http.client.HTTPSConnection(LOOPBACK, self.port, timeout=REQUEST_TIMEOUT_S, context=self.tls)

    def log(self) -> str:
        """What the agent has written to its standard output and error, over all its starts."""
        return self.log_file.read_text(errors="replace")

    def _dump(self) -> str:
        """The log, with what every thread is at as its last lines."""
        size = self.log_file.stat().st_size
        os.kill(self.pid, signal.SIGUSR1)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self.log_file.stat().st_size > size, timeout_s=1, what="the threads' stacks")
        return self.log()

    def _request(self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]) -> Reply:
        connection = self.connect()
        credentials = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            connection.request(method, path, content, {**credentials, **headers})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return Reply(response.status, json.loads(text))
        except ValueError:
            return Reply(response.status, text)

    def _has_health(self, status: int) -> bool:
        assert self._child is not None
        if self._child.poll() is not None:
            raise RuntimeError(f"the agent ended with {self._child.returncode}; its log:\n{self.log()[-4000:]}")
        try:
            reply = self.get("/healthz")
        except OSError as error:
            self._last_health = repr(error)
            return False
        self._last_health = f"{reply.status} {reply.body}"
        return reply.status == status

    def _write_configuration(self, uri: str, settings: Settings) -> None:
        state_directory = self.directory / "state"
        state_directory.mkdir(mode=0o700)
        configuration = RawConfigParser()
        configuration.read_dict(
            {
                "agent": {"state_dir": str(state_directory)},
                "http": {"host": LOOPBACK, "port": str(self.port), "socket": str(self.socket)},
                "libvirt": {"uri": uri},
            }
        )
        if not self._by_socket and not settings.get("security", {}).keys() & CREDENTIALS:
            configuration.read_dict({"security": OPEN_TO_LOOPBACK})
        configuration.read_dict(settings)
        with self.config_file.open("w") as file:
            configuration.write(file)


class UnixConnection(http.client.HTTPConnection):
    """A connection by the agent's socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REQUEST_TIMEOUT_S)
        self.path = str(path)

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REQUEST_TIMEOUT_S)
        self.sock.connect(self.path)


def find_command() -> list[str]:
    """The agent's console script, beside the interpreter that runs the tests.

    Raises:
        RuntimeError: the project is not installed in this environment.
    """
    script = Path(sys.executable).with_name("kvmagent")
    if not script.exists():
        raise RuntimeError(f"{script} is not there: run `make setup`")
    return [str(script)]


_given_ports: set[int] = set()


def find_free_port() -> int:
    """A port that nobody listens on at this moment, and that nobody was given before.

    Of a hundred agents that are made before the first one listens two would get the same port one time in six.
    """
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def new_task_uuid() -> str:
    """A task id as a management server makes them: 32 hexadecimal digits."""
    return uuid.uuid4().hex
