"""Slow, greedy and broken clients: what they cost is theirs to pay."""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import Task
from kvmagent.tasks.lanes import Lanes
from tests.lab.agent import LOOPBACK, AgentProcess, new_task_uuid
from tests.lab.pki import Authority
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

DRIBBLERS = 200
HEAD = b"POST /vm/hotplug/cpu HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
# One byte of these a moment: a head that never ends, a body that does not, a handshake of which the first byte came.
SLOW = {
    "head": HEAD + b"X-Slow: " + b"x" * 10000,
    "body": HEAD + b"Content-Length: 4000\r\n\r\n" + b" " * 4000,
    "chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nfa0\r\n" + b" " * 4000,
    "handshake": b"\x16\x03\x01\x40\x00" + b"x" * 10000,
    "nothing": b"",
}


class Dribblers:
    """Clients that send a byte each in turn, for as long as the block lasts."""

    def __init__(self, port: int, parts: list[bytes]) -> None:
        self._stop = threading.Event()
        self._parts = parts
        self.sockets = [socket.create_connection((LOOPBACK, port), timeout=10) for _ in parts]
        self._thread = threading.Thread(target=self._dribble)

    def __enter__(self) -> "Dribblers":
        for connection, part in zip(self.sockets, self._parts, strict=True):
            connection.sendall(part[: part.find(b"x") + 1 if b"x" in part[:200] else len(part) // 2])
            connection.settimeout(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for connection in self.sockets:
            connection.close()

    def _dribble(self) -> None:
        while not self._stop.wait(0.1):
            for connection, part in zip(self.sockets, self._parts, strict=True):
                if part:
                    with contextlib.suppress(OSError):
                        connection.send(part[-1:])


def slowest_s(agent: AgentProcess, server: ManagementServer, seconds: float) -> float:
    """The longest that a healthy client waited, for an answer or for a command to be accepted."""
    slowest, until = 0.0, time.monotonic() + seconds
    while (started := time.monotonic()) < until:
        task = new_task_uuid()
        body = {"vmUuid": "vm1", "cpuNum": 1, "dryRun": True}
        assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200
        assert agent.get("/healthz").status == 200
        slowest = max(slowest, time.monotonic() - started)
    return slowest


def check_healthy(agent: AgentProcess, server: ManagementServer, seconds: float) -> None:
    """A healthy client is held up by nobody: a busy machine slows one look, those who hold it up every one."""
    wait_for(
        lambda: slowest_s(agent, server, seconds) < 8, timeout_s=20, what="a healthy client to be answered at once"
    )


@pytest.mark.parametrize("slow", ["head", "body", "chunk", "nothing"])
def test_200_dribbling_connections_hold_up_no_healthy_client(
    agent: AgentProcess, server: ManagementServer, slow: str
) -> None:
    with Dribblers(agent.port, [SLOW[slow]] * DRIBBLERS):
        check_healthy(agent, server, 3)


def test_200_handshakes_that_do_not_end_hold_up_no_healthy_client(
    node_uri: str, server: ManagementServer, tmp_path: Path
) -> None:
    own = Authority(tmp_path)
    security = {"tls_cert": str(own.issue(LOOPBACK)), "client_ca": str(own.ca_file)}
    tls = own.client(own.issue("server.example"))
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=tls) as agent:
        with Dribblers(agent.port, [SLOW["handshake"], SLOW["nothing"]] * (DRIBBLERS // 2)):
            check_healthy(agent, server, 3)
        # Beside them a whole handshake with half a request behind it.
        with contextlib.ExitStack() as half:
            for _ in range(20):
                plain = half.enter_context(socket.create_connection((LOOPBACK, agent.port), timeout=10))
                half.enter_context(tls.wrap_socket(plain, server_hostname=LOOPBACK)).sendall(HEAD)
            check_healthy(agent, server, 1)


@pytest.fixture(scope="module")
def strict(node_uri: str) -> Iterator[AgentProcess]:
    """An agent with little patience."""
    http_section = {"request_timeout_sec": "1", "max_connections_per_client": "20", "max_body_bytes": "4096"}
    with AgentProcess(uri=node_uri, settings={"http": http_section}) as running:
        yield running


@pytest.mark.parametrize("slow", ["head", "body", "chunk"])
def test_a_request_that_is_not_whole_in_time_is_told_so_and_closed(strict: AgentProcess, slow: str) -> None:
    with Dribblers(strict.port, [SLOW[slow]]) as dribblers:
        connection = dribblers.sockets[0]
        answer = b""

        def read() -> bool:
            nonlocal answer
            with contextlib.suppress(BlockingIOError):
                part = connection.recv(65536)
                answer += part
                return not part
            return False

        wait_for(read, timeout_s=10, what="the end of the connection")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"REQUEST_TOO_SLOW" in answer


def test_half_a_request_behind_a_whole_one_is_not_waited_for_longer_than_any_other(strict: AgentProcess) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with socket.create_connection((LOOPBACK, strict.port), timeout=120) as connection:
        connection.sendall(whole + whole[:10])
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answers.startswith(b"HTTP/1.1 200 ")


def test_a_client_has_so_many_connections_and_gets_more_when_it_closes_some(strict: AgentProcess) -> None:
    def is_full() -> bool:
        try:
            reply = strict.get("/healthz")
        except OSError:
            return True
        assert reply.status in (200, 503)
        return reply.status == 503 and reply.body["errorCode"] == "TOO_MANY_CONNECTIONS"

    with contextlib.ExitStack() as many:
        for _ in range(20):
            many.enter_context(socket.create_connection((LOOPBACK, strict.port), timeout=10))
        wait_for(is_full, timeout_s=5, what="the limit")
    wait_for(lambda: not is_full(), timeout_s=5, what="room")


def test_a_client_has_so_many_unfinished_tasks_and_others_have_theirs() -> None:
    go_on = threading.Event()
    lanes = Lanes(
        lambda _task: go_on.wait(20),
        workers=8,
        max_queued=100,
        max_queued_per_lane=100,
        max_queued_per_client=2,
    )

    def put(number: int, client: str) -> None:
        task = Task(
            task_uuid=f"t{number}",
            command="HotPlugCpu",
            lane=f"vm{number}",
            request=b"{}",
            callback_url="http://127.0.0.1/",
            client=client,
            caller="token:zstack",
        )
        with lanes.hold_place(task):
            lanes.put(task)

    try:
        put(1, "192.0.2.1")
        put(2, "192.0.2.1")
        with pytest.raises(AgentError) as caught:
            put(3, "192.0.2.1")
        assert caught.value.code is Code.QUEUE_FULL
        assert "token:zstack at 192.0.2.1" in caught.value.message
        put(4, "192.0.2.2")
        go_on.set()

        def has_room() -> bool:
            with contextlib.suppress(AgentError):
                put(5, "192.0.2.1")
                return True
            return False

        wait_for(has_room, timeout_s=60, what="the tasks to end")
    finally:
        go_on.set()
        lanes.stop(5)


def test_bodies_that_do_not_end_take_so_much_memory_and_no_more(agent_of_large_bodies: AgentProcess) -> None:
    agent, size = agent_of_large_bodies, 8 * 2**20
    head = HEAD + f"Content-Length: {size}\r\n\r\n".encode()
    with contextlib.ExitStack() as many:
        connections = []
        for _ in range(12):
            connection = many.enter_context(socket.create_connection((LOOPBACK, agent.port), timeout=10))
            with contextlib.suppress(OSError):
                connection.sendall(head + b" " * (size - 1))
            connections.append(connection)
        assert agent.get("/healthz").status == 200
        refused = 0
        for connection in connections:
            connection.settimeout(0.5)
            with contextlib.suppress(OSError):
                refused += b"TOO_MANY_CONNECTIONS" in connection.recv(65536)
        assert refused >= 1
        kib = int(Path(f"/proc/{agent.pid}/status").read_text().partition("VmRSS:")[2].split()[0])
        assert kib < 256 * 1024
    wait_for(lambda: can_send(agent, head, size), timeout_s=10, what="room for a body")


def can_send(agent: AgentProcess, head: bytes, size: int) -> bool:
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
        connection.sendall(head + b" " * size)
        return b"MISSING_TASK_UUID" in connection.recv(65536)


@pytest.fixture
def agent_of_large_bodies(node_uri: str) -> Iterator[AgentProcess]:
    settings = {"http": {"max_body_bytes": str(8 * 2**20), "request_timeout_sec": "60"}}
    with AgentProcess(uri=node_uri, settings=settings) as running:
        yield running


def test_kept_connections_are_answered_in_order_and_pipelined_requests_too(agent: AgentProcess) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
        connection.sendall(request * 3 + request[:10])
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 3:
            answers += connection.recv(65536)
        connection.sendall(request[10:])
        while answers.count(b"HTTP/1.1 200") < 4:
            answers += connection.recv(65536)


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(agent: AgentProcess, server: ManagementServer) -> None:
    task, body = new_task_uuid(), json.dumps({"vmUuid": "vm1", "cpuNum": 1}).encode()
    head = HEAD + f"taskuuid: {task}\r\ncallbackurl: {server.url}\r\nContent-Length: {len(body)}\r\n".encode()
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
        connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "URL_TOO_LONG"),
        (b"GET /" + b"a" * 5000, 414, "URL_TOO_LONG"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 17000 + b"\r\n\r\n", 431, "HEAD_TOO_LARGE"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 4000, 431, "HEAD_TOO_LARGE"),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", 413, "BODY_TOO_LARGE"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n", 413, "BODY_TOO_LARGE"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Content-Length: +5\r\n\r\n12345", 400, "BAD_HTTP"),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab0\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n\r\n", 400, "BAD_HTTP"),
        (HEAD + b"taskuuid: a\r\ntaskuuid: b\r\n\r\n", 400, "BAD_HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n", 400, "BAD_HTTP"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "BAD_HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400, "BAD_HTTP"),
        (b"\x16\x03\x01\x02\x00\x01", 400, "BAD_HTTP"),
        (b"GET http://[a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "BAD_HTTP"),
        (b"GET //[a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "BAD_HTTP"),
    ],
)
def test_what_is_too_long_or_can_be_read_in_two_ways_is_refused(
    agent: AgentProcess, request_bytes: bytes, status: int, code: str
) -> None:
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
        connection.sendall(request_bytes)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        assert json.loads(response.read())["errorCode"] == code
    assert "Traceback" not in agent.log()


@pytest.mark.parametrize("clients", [20, 200])
def test_clients_that_never_read_hold_up_no_healthy_client(
    agent: AgentProcess, server: ManagementServer, clients: int
) -> None:
    ask = b"GET /page.css HTTP/1.1\r\nHost: a\r\n\r\n" * 1000
    with contextlib.ExitStack() as many:
        for _ in range(clients):
            connection = many.enter_context(connect_narrow(agent.port))
            connection.settimeout(0)
            with contextlib.suppress(OSError):
                connection.send(ask)
        # Workers that wait for a reader wait for ten seconds at a time.
        check_healthy(agent, server, 6)
    assert "Traceback" not in agent.log()


def test_a_client_that_never_reads_is_let_go_with_what_was_kept_for_it(agent: AgentProcess) -> None:
    with connect_narrow(agent.port) as connection:
        port = connection.getsockname()[1]
        assert is_kept(agent, port)
        connection.settimeout(0)
        with contextlib.suppress(OSError):
            connection.send(b"GET /page.css HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
        wait_for(lambda: not is_kept(agent, port), timeout_s=30, what="the end of the connection")


def is_kept(agent: AgentProcess, port: int) -> bool:
    """Whether the agent's end of a connection is open: waiting to be accepted, established, or a file of the agent's.

    Source: proc_pid_net(5), tcp: addresses in hexadecimal, state 01 is established, inode 0 belongs to no process.
    """
    for line in Path(f"/proc/{agent.pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{agent.port:04X}") and fields[2].endswith(f":{port:04X}"):
            return fields[3] == "01" or fields[9] != "0"
    return False


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
def test_an_answer_that_is_read_slowly_arrives_whole(node_uri: str, tmp_path: Path, *, secured: bool) -> None:
    own = Authority(tmp_path)
    security = {"tls_cert": str(own.issue(LOOPBACK)), "client_ca": str(own.ca_file)}
    tls = own.client(own.issue("server.example")) if secured else None
    with AgentProcess(uri=node_uri, settings={"security": security} if secured else {}, tls=tls) as agent:
        expected = agent.get("/openapi.json").body
        connection: socket.socket = connect_narrow(agent.port)
        if tls is not None:
            connection = tls.wrap_socket(connection, server_hostname=LOOPBACK)
        with connection:
            # Two asked for at once, so that the second one waits for the first one to be read.
            ask = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n"
            connection.sendall(ask + b"\r\n" + ask + b"Connection: close\r\n\r\n")
            answers = b""
            while part := connection.recv(8192):
                answers += part
                time.sleep(0.001)
    for answer in answers.split(b"HTTP/1.1 200 OK\r\n")[1:]:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}" in head.decode().lower()
        assert json.loads(body) == expected
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 2


def connect_narrow(port: int) -> socket.socket:
    """A connection whose client takes little before it reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((LOOPBACK, port))
    return connection


def test_a_client_that_resets_a_handshake_costs_nothing(node_uri: str, tmp_path: Path) -> None:
    own = Authority(tmp_path)
    security = {"tls_cert": str(own.issue(LOOPBACK)), "client_ca": str(own.ca_file)}
    tls = own.client(own.issue("server.example"))
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=tls) as agent:
        for data in (b"", b"\x16", b"\x16\x03\x01\x00\x05xxxxx", b"\x15\x03\x01\x00\x02\x02\x28"):
            with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
                connection.sendall(data)
        with socket.create_connection((LOOPBACK, agent.port)) as plain, pytest.raises((ssl.SSLError, OSError)):
            ssl.create_default_context().wrap_socket(plain, server_hostname=LOOPBACK)
        assert agent.get("/healthz").status == 200
        assert "Traceback" not in agent.log()
