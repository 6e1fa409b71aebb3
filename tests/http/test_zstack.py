"""A ZStack management server's side: its headers, its way of reading replies, its conversation with a host.

It opens two connections, waits for the immediate answer on them, ignores its body, and parses each callback as the
command's response: a missing number is 0 to it and a missing success is true.
"""

import http.client
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.agent import MIB, write_node
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for
from tests.lab.server import Answer, ManagementServer

VM = "11112222333344445555666677778888"
HOST = uuid.uuid4().hex
#: The server's own: a libvirt that has just been started looks at its QEMU first.
READ_TIMEOUT_S = 300


class ZStack:
    """The server's RESTFacade, as far as a host can tell."""

    def __init__(self, agent: AgentProcess, server: ManagementServer) -> None:
        self.agent, self.server = agent, server

    def sync(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a sync command: no taskuuid, the answer's body is the response."""
        content = b"" if body is None else json.dumps(body).encode()
        return self._post(path, content, headers)

    def call(self, path: str, body: Any) -> Any:
        """Send an async command and return its callback's body, as the server's parser reads it."""
        task = uuid.uuid4().hex
        headers = {"taskuuid": task, "callbackurl": self.server.url, "X-Resource-UUID": HOST}
        status, _ = self._post(path, json.dumps(body).encode(), headers)
        assert 200 <= status < 300
        reply = self.server.wait(task, 60)
        reply.setdefault("success", True)
        return reply

    def reports(self, path: str) -> list[Any]:
        """What the agent has told by itself on one command path."""
        return [c.body for c in self.server.callbacks() if c.headers.get("commandpath") == path]

    def told(self) -> list[tuple[str, Any]]:
        """All that the agent has told by itself, in order."""
        return [(c.headers["commandpath"], c.body) for c in self.server.callbacks() if "commandpath" in c.headers]

    def _post(self, path: str, content: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.agent.port, timeout=READ_TIMEOUT_S)
        try:
            sent = {"Content-Type": "application/json; charset=utf-8", **headers}
            connection.request("POST", path, content, sent)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(uri=write_node(tmp_path, *(GuestSpec(name=name) for name in (VM, "not-its-own")))) as running:
        yield running


@pytest.fixture
def zstack(agent: AgentProcess, server: ManagementServer) -> ZStack:
    return ZStack(agent, server)


def connect(zstack: ZStack, **fields: Any) -> Any:
    body = {
        "hostUuid": HOST,
        "sendCommandUrl": zstack.server.url,
        "iptablesRules": ["-A INPUT -j REJECT"],
        "ignoreMsrs": True,
        "pageTableExtensionDisabled": False,
        "tcpServerPort": 7123,
        "version": "4.8.0",
        **fields,
    }
    status, reply = zstack.sync("/host/connect", body)
    assert status == 200
    return reply


def test_a_host_is_echoed_connected_and_described(zstack: ZStack) -> None:
    assert zstack.sync("/host/echo")[0] == 200
    fact = zstack.call("/host/fact", {})
    assert fact["success"] is True
    assert all(isinstance(value, str) for key, value in fact.items() if key not in NOT_STRINGS)
    assert fact["libvirtVersion"].count(".") == 2
    assert fact.get("hvmCpuFlag", "absent") in ("vmx", "svm", "vt", "absent")
    assert fact["virtualizerInfo"]["virtualizer"] == "qemu-kvm"
    assert fact["cpuProcessorNum"] >= fact["cpuCoresPerSocket"] * fact["cpuSockets"] > 0
    assert fact["uptime"] == zstack.call("/host/fact", {})["uptime"]
    assert {type(value) for key, value in fact.items() if key.startswith("cpu")} == {str, int}
    reply = connect(zstack)
    assert reply["success"] is True
    assert reply["libvirtVersion"] == fact["libvirtVersion"]
    assert reply["qemuVersion"].count(".") == 2
    assert connect(zstack) == reply
    for field in ("iptablesRules", "ignoreMsrs", "tcpServerPort"):
        assert zstack.agent.log().count(field) == 1
    assert "pageTableExtensionDisabled" not in zstack.agent.log()  # it was not asked for


NUMBERS = {"cpuProcessorNum", "cpuSockets", "cpuCoresPerSocket", "cpuThreadsPerCore"}
NOT_STRINGS = {"success", "ipAddresses", "libvirtCapabilities", "virtualizerInfo", *NUMBERS}


@pytest.mark.parametrize("url", ["", "not a url", "http://[::1/", "ftp://127.0.0.1/", "http://192.0.2.9/send"])
def test_a_server_that_cannot_be_told_anything_is_not_remembered(zstack: ZStack, url: str) -> None:
    reply = connect(zstack, sendCommandUrl=url)
    assert reply["success"] is False
    assert reply["error"]
    assert "hostUuid" not in zstack.call("/host/ping", {})


@pytest.mark.parametrize("secrets", ["user:s3cr3t@", "us er:s3cr3t@", 'u"s3cr3t@'])
def test_a_server_s_password_is_in_no_log_line_error_or_task(zstack: ZStack, secrets: str) -> None:
    url = zstack.server.url.replace("://", f"://{secrets}") + "?token=a s3cr3t"
    assert "s3cr3t" not in str(connect(zstack, sendCommandUrl=url))
    zstack.call("/host/update/configuration", {"hostUuid": HOST, "sendCommandUrl": url})
    tasks = zstack.agent.get("/tasks").body["tasks"]
    for text in (zstack.agent.log(), *(str(zstack.agent.get(f"/tasks/{task['taskUuid']}").body) for task in tasks)):
        assert "s3cr3t" not in text


def test_ping_tells_who_connected_also_after_a_restart(zstack: ZStack) -> None:
    assert zstack.call("/host/ping", {"hostUuid": HOST}) == {"success": True, "error": ""}
    connect(zstack)
    known = {"hostUuid": HOST, "sendCommandUrl": zstack.server.url, "version": "4.8.0"}
    assert known.items() <= zstack.call("/host/ping", {"hostUuid": HOST}).items()
    zstack.agent.kill()
    zstack.agent.start()
    assert known.items() <= zstack.call("/host/ping", {"hostUuid": HOST}).items()
    moved = f"{zstack.server.url}/moved"
    zstack.call("/host/update/configuration", {"hostUuid": HOST, "sendCommandUrl": moved})
    assert zstack.call("/host/ping", {})["sendCommandUrl"] == moved
    assert zstack.call("/host/ping", {})["version"] == "4.8.0"


def test_capacity_and_vm_states_are_libvirt_s(zstack: ZStack) -> None:
    capacity = zstack.call("/host/capacity", {})
    assert capacity["cpuNum"] > 0
    assert capacity["cpuSockets"] > 0
    assert capacity["totalMemory"] > 2**28
    assert capacity["usedMemory"] == 2 * 256 * MIB
    sync = zstack.call("/vm/vmsync", {"hostUuid": HOST})
    assert sync["states"] == {VM: "Running"}
    assert sync["vmInShutdowns"] == []
    dashed = str(uuid.UUID(VM))
    states = zstack.call("/vm/checkstate", {"vmUuids": [VM, dashed, "0" * 32], "hostUuid": HOST})["states"]
    assert states == {VM: "Running", dashed: "Running", "0" * 32: "Shutdown"}
    info = zstack.call("/vm/getvirtualizerinfo", {"vmUuids": [VM, "0" * 32]})
    assert info["hostInfo"]["virtualizer"] == "qemu-kvm"
    assert [vm["uuid"] for vm in info["vmInfoList"]] == [VM]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"kvmHostAddons": {"qcow2Options": " -o cluster_size=2097152 "}, "unknownLater": [1, {"a": None}]},
    ],
    ids=["years ago", "today"],
)
def test_cpu_is_increased_as_it_sends_and_reads_it(zstack: ZStack, extra: dict[str, Any]) -> None:
    reply = zstack.call("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 2, **extra})
    assert (reply["success"], reply["cpuNum"]) == (True, 2)
    assert isinstance(reply["cpuNum"], int)
    again = zstack.call("/vm/increase/cpu", {"vmUuid": str(uuid.UUID(VM)), "cpuNum": 2, **extra})
    assert (again["success"], again["cpuNum"], again["outcome"]) == (True, 2, "unchanged")


def test_progress_is_reported_only_to_a_thread_of_the_server(zstack: ZStack) -> None:
    connect(zstack)
    zstack.call("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 2})
    thread = {"threadContext": {"api": "a1", "task-stage": "10-90"}, "threadContextStack": ["t1"]}
    zstack.call("/vm/increase/cpu", {"vmUuid": str(uuid.UUID(VM)), "cpuNum": 3, **thread})
    wait_for(lambda: zstack.reports("/progress/report"), timeout_s=10, what="the step's report")
    zstack.agent.stop()  # after what is being sent
    assert zstack.reports("/progress/report") == [
        {
            "progress": "0",
            "processType": "IncreaseCpu",
            "resourceUuid": VM,
            "serverUuid": HOST,
            "detail": {"step": "SetVcpus"},
            "threadContextMap": {"api": "a1", "task-stage": "10-90"},
            "threadContextStack": ["t1"],
        }
    ]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 5}, "vm/vm.max.vcpu, then stop the VM and start it again"),
        ("/vm/increase/cpu", {"vmUuid": "f" * 32, "cpuNum": 2}, "f" * 32),
        ("/vm/increase/mem", {"vmUuid": VM, "memorySize": 128 * MIB}, "256 MiB"),
        ("/vm/increase/mem", {"vmUuid": VM, "memorySize": 2**45}, "stop the VM and start it again"),
        ("/vm/online/changecpumem", {"vmUuid": VM}, 'no "cpuNum" and no "memorySize"'),
        ("/vm/online/changecpumem", {"vmUuid": VM, "cpuNum": 2}, 'no "memorySize"'),
        ("/vm/online/changecpumem", {"vmUuid": VM, "cpuNum": 0, "memorySize": 2**30}, 'no "cpuNum"'),
    ],
)
def test_a_failure_is_in_the_body_in_words_with_what_to_do(
    zstack: ZStack, path: str, body: dict[str, Any], words: str
) -> None:
    reply = zstack.call(path, body)
    assert reply["success"] is False
    assert words in reply["error"]
    assert reply["error"].endswith(".")


def test_what_cannot_be_accepted_is_refused_at_once(zstack: ZStack) -> None:
    for path, body, headers in (
        ("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 2}, {}),  # async without a task id
        ("/host/echo", {}, {"taskuuid": uuid.uuid4().hex}),  # sync with one
        ("/host/connect", {"hostUuid": HOST}, {}),
        (
            "/vm/increase/cpu",
            {"vmUuid": VM},
            {"taskuuid": uuid.uuid4().hex, "callbackurl": zstack.server.url},
        ),
    ):
        status, reply = zstack.sync(path, body, **headers)
        assert status == 400
        assert reply["error"]


def test_a_question_without_a_callbackurl_is_answered_and_nothing_is_called_back(zstack: ZStack) -> None:
    task = uuid.uuid4().hex
    assert zstack.sync("/host/ping", {"hostUuid": HOST}, taskuuid=task)[0] == 200
    ended = wait_for(
        lambda: (found := zstack.agent.get(f"/tasks/{task}").body)["state"] == "delivered" and found,
        timeout_s=10,
        what="the answer",
    )
    assert ended["reply"]["success"] is True
    assert zstack.server.callbacks(task) == []
    status, refusal = zstack.sync("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 2}, taskuuid=task)
    assert (status, refusal["errorCode"]) == (400, "MISSING_CALLBACK_URL")


def test_what_is_said_says_its_charset(zstack: ZStack) -> None:
    connect(zstack)
    zstack.call("/vm/increase/cpu", {"vmUuid": VM, "cpuNum": 2, "threadContext": {"api": "ä"}})
    wait_for(lambda: zstack.reports("/progress/report"), timeout_s=10, what="the step's report")
    told = zstack.server.callbacks()
    assert {one.headers["content-type"] for one in told} == {"application/json; charset=utf-8"}
    connection = zstack.agent.connect()
    for path in ("/host/echo", "/vm/increase/cpu"):
        connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    connection.close()


def test_where_libvirt_cannot_be_asked_nothing_is_made_up(server: ManagementServer, tmp_path: Path) -> None:
    agent = AgentProcess(uri=f"qemu+unix:///session?socket={tmp_path}/none")
    try:
        agent.start(health=503)
        reply = ZStack(agent, server).call("/vm/vmsync", {"hostUuid": HOST})
        assert reply["success"] is False
        assert reply["states"] == {}
        assert "libvirt" in reply["error"]
    finally:
        agent.remove()


def test_a_server_that_forgot_the_task_is_left_alone(zstack: ZStack) -> None:
    task = uuid.uuid4().hex
    zstack.server.answer = lambda _task, _attempt: Answer(status=404)
    headers = {"taskuuid": task, "callbackurl": zstack.server.url}
    zstack.sync("/host/ping", {"hostUuid": HOST}, **headers)
    wait_for(
        lambda: zstack.agent.get(f"/tasks/{task}").body["state"] == "gone", timeout_s=10, what="the task to be gone"
    )
    zstack.server.answer = lambda _task, _attempt: Answer()
    assert len(zstack.server.callbacks(task)) == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_dumps_the_stacks_of_all_threads_and_ends_nothing(agent: AgentProcess, number: signal.Signals) -> None:
    os.kill(agent.pid, number)
    wait_for(lambda: "Thread 0x" in agent.log(), timeout_s=10, what="the dump")
    assert agent.get("/healthz").status == 200
