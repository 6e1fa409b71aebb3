"""Owns a ZStack management server's side, as far as a host agent can tell: its connections, its parser, its beliefs.

    ZStackServer -- two connections at most --> agent
    agent -- POST /zstack/asyncrest/callback, /zstack/asyncrest/sendcommand --> ZStackServer

Bodies are read as Tomcat and Gson read them: ISO-8859-1 where no charset is given, a missing number is 0, a missing
`success` is true, what a class has no field for is ignored, and a number that a field cannot hold fails the task.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from urllib3.util import wait_for_read

CALLBACK, SEND_COMMAND = "/zstack/asyncrest/callback", "/zstack/asyncrest/sendcommand"
MAX_PER_ROUTE = 2
READ_TIMEOUT_S = 300.0
VERSION = "5.3.0"
_LIMITS = {"int": 2**31, "long": 2**63}

# Classes by their fields: int, long, boolean, String, or a list, a map or a class of these.
_VIRTUALIZER = {"uuid": "String", "virtualizer": "String", "version": "String"}
_STATES = {"states": {"*": "String"}, "vmInShutdowns": ["String"]}
_FACTS = (
    *("osDistribution", "osVersion", "osRelease", "qemuImgVersion", "libvirtVersion", "hvmCpuFlag", "eptFlag"),
    *("cpuArchitecture", "cpuModelName", "hostCpuModelName", "cpuGHz", "cpuCache", "uptime", "hostname"),
    *("systemUUID", "systemSerialNumber", "memorySlotsMaximum"),
)
RESPONSES: Mapping[str, Mapping[str, Any]] = {
    "/host/connect": {"libvirtVersion": "String", "qemuVersion": "String", "iptablesSucc": "boolean"},
    "/host/ping": {"hostUuid": "String", "sendCommandUrl": "String", "version": "String"},
    "/host/fact": {
        **dict.fromkeys(_FACTS, "String"),
        **dict.fromkeys(("cpuProcessorNum", "cpuSockets", "cpuCoresPerSocket", "cpuThreadsPerCore"), "int"),
        "ipAddresses": ["String"],
        "libvirtCapabilities": ["String"],
        "virtualizerInfo": _VIRTUALIZER,
    },
    "/host/capacity": {
        **dict.fromkeys(("cpuNum", "cpuSpeed", "usedCpu", "totalMemory", "usedMemory"), "long"),
        "cpuSockets": "int",
        "cpuCoreNum": "int",
    },
    "/vm/getvirtualizerinfo": {"hostInfo": _VIRTUALIZER, "vmInfoList": [_VIRTUALIZER]},
    "/vm/vmsync": _STATES,
    "/vm/checkstate": _STATES,
    "/vm/increase/cpu": {"cpuNum": "int"},
    "/vm/increase/mem": {"memorySize": "long"},
    "/vm/online/changecpumem": {"cpuNum": "int", "memorySize": "long"},
}


class Unreadable(Exception):
    """The server's parser fails on a body, and with it the task."""


def read_text(content: bytes, content_type: str | None) -> str:
    """A body as Tomcat reads it."""
    message = Message()
    message["Content-Type"] = content_type or "text/plain"
    return content.decode(message.get_content_charset("iso-8859-1"))


def parse(text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A response as Gson reads it into its class."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Unreadable(f"{error}: {text[:200]!r}") from error
    shape = {"success": "boolean", "error": "String", **fields}
    read: dict[str, Any] = _read(value, shape)
    if "success" not in value:
        read["success"] = True
    return read


def _read(value: Any, kind: Any) -> Any:
    if isinstance(kind, str):
        return _read_simple(value, kind)
    if value is None:
        return None
    if isinstance(kind, list):
        return [_read(one, kind[0]) for one in _expect(value, list)]
    if "*" in kind:
        return {name: _read(one, kind["*"]) for name, one in _expect(value, dict).items()}
    return {name: _read(_expect(value, dict).get(name), of) for name, of in kind.items()}


def _read_simple(value: Any, kind: str) -> Any:
    if value is None:
        return {"int": 0, "long": 0, "boolean": False}.get(kind)
    if kind == "String":
        if isinstance(value, dict | list):
            raise Unreadable(f"a string was expected, got {value!r}")
        return value if isinstance(value, str) else json.dumps(value)
    if kind == "boolean":
        return _expect(value, bool)
    if isinstance(value, bool) or not isinstance(value, int) or not -_LIMITS[kind] <= value < _LIMITS[kind]:
        raise Unreadable(f"{value!r} is no {kind}")
    return value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise Unreadable(f"{kind.__name__} was expected, got {value!r}")
    return value


@dataclass
class Host:
    """A host as the server has it: what it believes of the VMs there, in the order in which it came to believe it."""

    port: int
    uuid: str = field(default_factory=lambda: uuid.uuid4().hex)
    states: dict[str, str] = field(default_factory=dict)
    reconnects: int = 0


class ZStackServer:
    """A management server that may forget everything but its hosts (`restart`).

    `on_belief` is called, on whatever thread, whenever it comes to believe a state of a VM: host, VM, state.
    """

    def __init__(self, on_belief: Callable[[Host, str, str], None] = lambda _host, _vm, _state: None) -> None:
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.late: list[str] = []
        self._on_belief = on_belief
        self._hosts: dict[str, Host] = {}
        self._tasks: dict[str, queue.SimpleQueue[str]] = {}
        self._pools: dict[int, queue.SimpleQueue[http.client.HTTPConnection]] = {}
        self._server = _Listener(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> ZStackServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def send_command_url(self) -> str:
        """Where an agent reports to."""
        return f"http://127.0.0.1:{self._server.server_port}{SEND_COMMAND}"

    @property
    def callback_url(self) -> str:
        """Where an agent's callbacks go."""
        return f"http://127.0.0.1:{self._server.server_port}{CALLBACK}"

    # What the server does

    def connect(self, host: Host) -> None:
        """Take a host into its care, in the server's order; also one that it has had before."""
        self._hosts[host.uuid] = host
        assert self._post(host, "/host/echo", b"", {})[0] == 200
        fact = self.call(host, "/host/fact", {})
        assert fact["success"]
        assert None not in (fact["libvirtVersion"], fact["virtualizerInfo"])
        body = {
            "hostUuid": host.uuid,
            "sendCommandUrl": self.send_command_url,
            "iptablesRules": ["-A INPUT -j ACCEPT"],
            "tcpServerPort": 7123,
            "version": VERSION,
        }
        status, text = self._post(host, "/host/connect", json.dumps(body).encode(), {})
        assert (status, parse(text, RESPONSES["/host/connect"])["success"]) == (200, True), text
        info = self.call(host, "/vm/getvirtualizerinfo", {"vmUuids": list(host.states)})
        assert None not in (info["hostInfo"], info["vmInfoList"])
        assert self.call(host, "/host/capacity", {})["totalMemory"] > 0
        self.sync(host)

    def ping(self, host: Host) -> None:
        """What the server does every minute: ping, connect again where the host says another thing, and sync."""
        reply = self.call(host, "/host/ping", {"hostUuid": host.uuid})
        known = (host.uuid, self.send_command_url, VERSION)
        if not reply["success"] or (reply["hostUuid"], reply["sendCommandUrl"], reply["version"]) != known:
            host.reconnects += 1
            self.connect(host)
        else:
            self.sync(host)

    def sync(self, host: Host) -> None:
        """Ask for all states; a VM that the host does not have any more is looked for there once, then stopped."""
        reply = self.call(host, "/vm/vmsync", {"hostUuid": host.uuid})
        assert reply["success"], reply["error"]
        missing = [vm for vm in host.states if vm not in reply["states"]]
        for vm, state in reply["states"].items():
            assert state in ("Running", "Paused", "Crashed", "NoState"), state
            self._believe(host, vm, "Running" if vm in reply["vmInShutdowns"] else state)
        if missing:
            checked = self.call(host, "/vm/checkstate", {"vmUuids": missing, "hostUuid": host.uuid})["states"]
            assert set(checked) == set(missing)
            for vm, state in checked.items():
                self._believe(host, vm, state)

    def call(self, host: Host, path: str, body: Any) -> dict[str, Any]:
        """Send an async command and return its response, as the server reads it."""
        status, task = self.send(host, path, body)
        assert 200 <= status < 300
        return self.wait(path, task)

    def send(self, host: Host, path: str, body: Any) -> tuple[int, str]:
        """Send an async command; its immediate answer's status, and its task."""
        task = uuid.uuid4().hex
        self._tasks[task] = queue.SimpleQueue()
        headers = {"taskuuid": task, "callbackurl": self.callback_url, "X-Resource-UUID": host.uuid}
        return self._post(host, path, json.dumps(body).encode(), headers)[0], task

    def wait(self, path: str, task: str) -> dict[str, Any]:
        """The response of a task."""
        return parse(self._tasks[task].get(timeout=180), RESPONSES[path])

    def restart(self) -> None:
        """Forget every task, as a server does that was restarted, and all connections."""
        self._tasks.clear()
        self._pools.clear()

    def forget(self, host: Host, vm: str) -> None:
        """A VM is no longer this host's: the server has migrated it."""
        del host.states[vm]

    # What comes in

    def take_callback(self, task: str | None, text: str) -> int:
        """Return the status of a callback's answer."""
        if not task:
            return 400
        waiting = self._tasks.get(task)
        if waiting is None:
            self.late.append(task)
            return 404
        waiting.put(text)
        return 200

    def take_report(self, path: str, text: str) -> int:
        """Return the status of a report's answer; there is no handler of a shutdown by the guest, as in 4.x."""
        body = json.loads(text)
        self.reports.append((path, body))
        if path == "/kvm/reportvmshutdown/from/guest":
            return 404
        states = {"/kvm/reportvmstart": "Running", "/kvm/reportvmshutdown": "Shutdown", "/kvm/reportvmcrash": "Crashed"}
        for host in list(self._hosts.values()):
            if path in states and body["vmUuid"] in host.states:
                self._believe(host, body["vmUuid"], states[path])
        return 200

    def _believe(self, host: Host, vm: str, state: str) -> None:
        host.states[vm] = state
        self._on_belief(host, vm, state)

    def _post(self, host: Host, path: str, content: bytes, headers: dict[str, str]) -> tuple[int, str]:
        pool = self._pools.get(host.port)
        if pool is None:
            pool = self._pools[host.port] = queue.SimpleQueue()
            for _ in range(MAX_PER_ROUTE):
                pool.put(http.client.HTTPConnection("127.0.0.1", host.port, timeout=READ_TIMEOUT_S))
        connection = pool.get(timeout=READ_TIMEOUT_S)
        # A kept connection is looked at before it is used again, as its pool does: the agent may have closed it.
        if connection.sock is not None and wait_for_read(connection.sock, 0):
            connection.close()
        try:
            connection.request("POST", path, content, {"Content-Type": "application/json; charset=utf-8", **headers})
            answer = connection.getresponse()
            return answer.status, read_text(answer.read(), answer.getheader("Content-Type"))
        except (OSError, http.client.HTTPException):
            connection.close()
            raise
        finally:
            pool.put(connection)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    owner: ZStackServer


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        text = read_text(content, self.headers.get("Content-Type"))
        if self.path == CALLBACK:
            status = self.server.owner.take_callback(self.headers.get("taskuuid"), text)
        else:
            status = self.server.owner.take_report(self.headers["commandpath"], text)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what came is recorded."""
