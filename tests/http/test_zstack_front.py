"""The shipped front, in the distribution's haproxy: a server before it, ZStack's own agent and ours behind it."""

import http.client
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvmagent.api.security import new_token
from tests.fakes.agent import MIB, write_node
from tests.http.test_zstack import HOST, VM
from tests.lab.agent import AgentProcess, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.haproxy import Haproxy
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

HOTPLUG = {
    "/vm/increase/cpu": {"vmUuid": VM, "cpuNum": 2},
    "/vm/increase/mem": {"vmUuid": VM, "memorySize": 384 * MIB},
    "/vm/online/changecpumem": {"vmUuid": VM, "cpuNum": 3, "memorySize": 512 * MIB},
}
OTHERS = ["/host/connect", "/host/ping", "/host/echo", "/vm/start", "/vm/vmsync", "/nfsprimarystorage/mount"]


class Original:
    """ZStack's own agent, as far as a front can tell: it takes everything, and says what it has taken."""

    def __init__(self) -> None:
        self.port = find_free_port()
        self.taken: list[tuple[str, dict[str, str], bytes]] = []
        #: Set, but where a test holds what comes.
        self.answers = threading.Event()
        self.answers.set()
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                owner.taken.append((self.path, headers, body))
                owner.answers.wait(240)
                self.send_response(200)
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"orig")

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Node:
    """A node with both agents behind the front, and a management server before it."""

    def __init__(self, agent: AgentProcess, original: Original, front: Haproxy, server: ManagementServer) -> None:
        self.agent, self.original, self.front, self.server = agent, original, front, server

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.front.port, timeout=60)) as connection:
            return self.post_on(connection, path, body, **headers)

    def post_on(self, connection: http.client.HTTPConnection, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        content = {"Content-Type": "application/json; charset=utf-8"}
        connection.request("POST", path, json.dumps(body).encode(), {**content, **headers})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def task(self) -> dict[str, str]:
        return {"taskuuid": uuid.uuid4().hex, "callbackurl": self.server.url, "X-Resource-UUID": HOST}


@pytest.fixture
def node(tmp_path: Path, server: ManagementServer) -> Iterator[Node]:
    uri = write_node(tmp_path, GuestSpec(name=VM))
    token, line = new_token("zstack")
    watcher, watcher_line = new_token("watcher")
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{line}\n{watcher_line}\n")
    settings = {
        "agent": {"plugins": "vm"},
        "security": {
            "tokens_file": str(tokens),
            "roles": "token:zstack plug, token:watcher admin",
            "allowed_callbacks": f"127.0.0.1:{server.port}",
        },
    }
    original = Original()
    original.start()
    try:
        with (
            AgentProcess(uri=uri, settings=settings, token=watcher) as agent,
            Haproxy(kvmagent=agent.port, original=original.port, token=token) as front,
        ):
            yield Node(agent, original, front, server)
    finally:
        original.stop()


def test_three_paths_are_ours_and_everything_else_is_the_original_s(node: Node) -> None:
    for path in OTHERS:
        assert node.post(path, {"hostUuid": HOST}, **node.task()) == (200, "orig")
    assert [path for path, _, _ in node.original.taken] == OTHERS
    assert all(headers["x-resource-uuid"] == HOST for _, headers, _ in node.original.taken)
    assert all("authorization" not in headers for _, headers, _ in node.original.taken)
    for path, body in HOTPLUG.items():
        task = node.task()
        assert node.post(path, body, **task)[0] == 200
        reply = node.server.wait(task["taskuuid"], 30)
        # libvirt's test driver has no memory devices, and each version says so by another code; tests/guest plugs them.
        assert reply["success"] == path.endswith("/cpu"), reply
        assert reply["success"] or reply["errorCode"] in ("NOT_SUPPORTED", "LIBVIRT_REFUSED"), reply
        assert f"{{{task['taskuuid']}}}" in node.front.log()
    assert len(node.original.taken) == len(OTHERS)
    assert "caller=token:zstack" in node.agent.log()


def test_what_was_accepted_outlives_a_kill_of_our_agent(node: Node) -> None:
    task = node.task()
    assert node.post("/vm/increase/cpu", HOTPLUG["/vm/increase/cpu"], **task)[0] == 200
    node.agent.kill()
    status, refusal = node.post("/vm/increase/mem", HOTPLUG["/vm/increase/mem"], **node.task())
    assert (status, refusal["success"]) == (503, False)
    assert "systemctl start kvmagent" in refusal["error"]
    assert node.post("/host/ping", {"hostUuid": HOST}, **node.task()) == (200, "orig")
    node.agent.start()
    # libvirt's test driver begins anew with each agent: a task that was under way may find its VM in another run.
    reply = node.server.wait(task["taskuuid"], 30)
    assert reply["success"] or reply["errorCode"], reply
    again = node.task()
    assert node.post("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 3}, **again)[0] == 200
    assert node.server.wait(again["taskuuid"], 30)["success"] is True


def test_hotplug_works_while_the_original_is_away(node: Node) -> None:
    node.original.stop()
    status, refusal = node.post("/host/ping", {"hostUuid": HOST}, **node.task())
    assert (status, refusal["success"]) == (503, False)
    assert "zstack-kvmagent start" in refusal["error"]
    task = node.task()
    assert node.post("/vm/increase/cpu", HOTPLUG["/vm/increase/cpu"], **task)[0] == 200
    assert node.server.wait(task["taskuuid"], 30)["success"] is True
    node.original.start()
    assert node.post("/host/ping", {"hostUuid": HOST}, **node.task()) == (200, "orig")


def test_two_connections_that_stay_open_are_enough(node: Node) -> None:
    """A long command of the original holds one of the server's two; the other carries on, over a kill of each agent."""
    node.original.answers.clear()
    long, short = (http.client.HTTPConnection("127.0.0.1", node.front.port, timeout=600) for _ in range(2))
    with closing(long), closing(short), ThreadPoolExecutor(1) as pool:
        held = pool.submit(node.post_on, long, "/vm/start", {"vmUuid": VM}, **node.task())
        wait_for(lambda: node.original.taken, timeout_s=10, what="the original to have the long command")
        tasks = [node.task() for _ in range(20)]
        for task in tasks:
            assert node.post_on(short, "/vm/increase/cpu", HOTPLUG["/vm/increase/cpu"], **task)[0] == 200
        node.agent.kill()
        assert node.post_on(short, "/vm/increase/cpu", HOTPLUG["/vm/increase/cpu"], **node.task())[0] == 503
        node.agent.start()
        last = node.task()
        assert node.post_on(short, "/vm/increase/cpu", HOTPLUG["/vm/increase/cpu"], **last)[0] == 200
        assert not held.done()
        node.original.answers.set()
        assert held.result() == (200, "orig")
        for task in (*tasks, last):
            assert node.server.wait(task["taskuuid"], 30)["success"] is True


def test_nobody_but_the_servers_gets_through(node: Node) -> None:
    with Haproxy(kvmagent=node.agent.port, original=node.original.port, token="t", servers="192.0.2.9") as front:
        stranger = Node(node.agent, node.original, front, node.server)
        for path in (*HOTPLUG, *OTHERS):
            if path == "/host/echo":
                continue
            status, refusal = stranger.post(path, {"vmUuid": VM, "cpuNum": 4}, **node.task())
            assert (status, refusal["success"]) == (403, False), path
            assert "zstack-servers" in refusal["error"]
        assert node.original.taken == []
        # What the doctor asks on the node itself changes nothing.
        assert stranger.post("/host/echo", {}) == (200, "orig")
        assert stranger.post("/vm/increase/cpu", {})[1]["errorCode"] == "CREDENTIALS_WRONG"
    assert node.post("/vm/increase/cpu", {})[1]["errorCode"] == "MISSING_TASK_UUID"


def test_a_token_that_a_client_sends_is_not_the_front_s(node: Node) -> None:
    assert node.post("/vm/increase/cpu", {}, Authorization="Bearer nonsense")[1]["errorCode"] == "MISSING_TASK_UUID"
