"""What is refused at once: each with its status, its code and a remedy, and nothing is stored."""

import socket
from typing import Any

import pytest

from tests.lab.agent import AgentProcess, Reply, new_task_uuid
from tests.lab.server import ManagementServer

CPU = "/vm/hotplug/cpu"
GOOD = {"vmUuid": "vm1", "cpuNum": 2}


def assert_refused(reply: Reply, status: int, code: str) -> None:
    assert (reply.status, reply.body["errorCode"]) == (status, code), reply
    assert reply.body["success"] is False
    assert reply.body["error"]
    assert reply.body["remedy"]


def post(agent: AgentProcess, server: ManagementServer, body: Any = None, **given: Any) -> Reply:
    options = {"task_uuid": new_task_uuid(), "callback_url": server.url, **given}
    return agent.post(options.pop("path", CPU), GOOD if body is None else body, **options)


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ({"task_uuid": None}, 400, "MISSING_TASK_UUID"),
        ({"task_uuid": "no spaces"}, 400, "BAD_TASK_UUID"),
        ({"callback_url": None}, 400, "MISSING_CALLBACK_URL"),
        ({"callback_url": "ftp://127.0.0.1/"}, 400, "BAD_CALLBACK_URL"),
        ({"callback_url": "/callback"}, 400, "BAD_CALLBACK_URL"),
        ({"headers": {"Content-Type": "text/plain"}}, 400, "BAD_CONTENT_TYPE"),
        ({"path": "/vm/hotplug/gpu"}, 404, "UNKNOWN_PATH"),
        ({"path": "/"}, 405, "METHOD_NOT_ALLOWED"),
        ({"path": "/healthz"}, 405, "METHOD_NOT_ALLOWED"),
        ({"body": b"{"}, 400, "BAD_JSON"),
        ({"body": b""}, 400, "BAD_JSON"),
        ({"body": b"[1]"}, 400, "NOT_AN_OBJECT"),
        ({"body": b'{"vmUuid": "vm1", "cpuNum": NaN}'}, 400, "NOT_A_JSON_NUMBER"),
        ({"body": b'{"vmUuid": "vm1", "cpuNum": 2, "cpuNum": 3}'}, 400, "DUPLICATE_KEY"),
        ({"body": GOOD | {"cpuNum": "4"}}, 400, "WRONG_TYPE"),
        ({"body": GOOD | {"cpuNum": 4.5}}, 400, "WRONG_TYPE"),
        ({"body": GOOD | {"cpuNum": True}}, 400, "WRONG_TYPE"),
        ({"body": GOOD | {"cpuNum": 0}}, 400, "OUT_OF_RANGE"),
        ({"body": GOOD | {"cpuNum": -1}}, 400, "OUT_OF_RANGE"),
        ({"body": GOOD | {"cpuNum": 2**63}}, 400, "OUT_OF_RANGE"),
        ({"body": GOOD | {"cpus": 2}}, 400, "UNKNOWN_FIELD"),
        ({"body": {"vmUuid": "vm1"}}, 400, "MISSING_FIELD"),
        ({"body": b" " * 4097}, 413, "BODY_TOO_LARGE"),
        ({"body": b" " * 4_000_000}, 413, "BODY_TOO_LARGE"),
    ],
)
def test_bad_input_is_refused_by_code_and_stored_nowhere(
    agent: AgentProcess, server: ManagementServer, given: dict[str, Any], status: int, code: str
) -> None:
    before = agent.get("/tasks").body
    assert_refused(post(agent, server, **given), status, code)
    assert agent.get("/tasks").body == before


def test_a_chunked_body_over_the_limit_is_refused_too(agent: AgentProcess, server: ManagementServer) -> None:
    head = (
        f"POST {CPU} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\ntaskuuid: chunked\r\n"
        f"callbackurl: {server.url}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    answer = exchange(agent, head.encode() + chunk * 2 + b"0\r\n\r\n")
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"BODY_TOO_LARGE" in answer


@pytest.mark.parametrize("line", [b"nonsense\r\n\r\n", b"POST /vm/hotplug/cpu HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_is_answered_in_json(agent: AgentProcess, line: bytes) -> None:
    answer = exchange(agent, line)
    assert b"application/json" in answer
    assert b"BAD_HTTP" in answer


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nothing", 404, "UNKNOWN_PATH"),
        ("/tasks/unknown", 404, "UNKNOWN_TASK"),
        ("/vms/unknown", 404, "VM_NOT_FOUND"),
        ("/vm/hotplug/cpu", 405, "METHOD_NOT_ALLOWED"),
        ("/tasks?limit=0", 400, "BAD_QUERY"),
        ("/tasks?limit=x", 400, "BAD_QUERY"),
        ("/tasks?state=lost", 400, "BAD_QUERY"),
        ("/tasks?order=asc", 400, "BAD_QUERY"),
        ("/tasks?limit=1&limit=2", 400, "BAD_QUERY"),
        ("/vms?x=%ff", 400, "BAD_QUERY"),
        ("/vms?x=1", 400, "BAD_QUERY"),
        ("/openapi.json?x=1", 400, "BAD_QUERY"),
    ],
)
def test_bad_reads_are_refused_by_code(agent: AgentProcess, path: str, status: int, code: str) -> None:
    assert_refused(agent.get(path), status, code)


def test_a_task_id_belongs_to_one_request(agent: AgentProcess, server: ManagementServer) -> None:
    task = new_task_uuid()
    assert post(agent, server, task_uuid=task).status == 200
    assert_refused(post(agent, server, GOOD | {"cpuNum": 3}, task_uuid=task), 409, "TASK_CONFLICT")
    assert_refused(post(agent, server, task_uuid=task, callback_url=f"{server.url}/other"), 409, "TASK_CONFLICT")


def exchange(agent: AgentProcess, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer
