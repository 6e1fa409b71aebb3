"""Lists by pages, fields and ETag, as a client reads them."""

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from kvmagent.tasks.journal import JOURNAL, Journal, Task
from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for

NAMES = [f"vm{number}" for number in range(1, 6)]
TASKS = 200


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent with five VMs, and with tasks of before."""
    node = write_node(tmp_path_factory.mktemp("node"), *(GuestSpec(name=name) for name in NAMES))
    with AgentProcess(uri=node) as running:
        running.stop()
        fill(running.directory / "state" / JOURNAL)
        running.start()
        yield running


def fill(file: Path) -> None:
    """Write tasks that have ended."""
    journal = Journal(file, on_accepted=lambda _task: None)
    journal.start()
    reply = json.dumps({"error": "e", "remedy": "r", "errorCode": "TIMED_OUT"}).encode()
    for number in range(TASKS):
        name = f"old-{number}"
        journal.accept(
            Task(task_uuid=name, command="HotPlugCpu", lane="vm1", request=b"{}", callback_url="none", client="::1")
        )
        journal.start_task(name)
        journal.finish(name, reply, "refused")
    journal.stop()


def get(agent: AgentProcess, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    with closing(agent.connect()) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response, response.read()


def walk(agent: AgentProcess, path: str, name: str) -> Iterator[Any]:
    cursor = ""
    while True:
        body = agent.get(path + cursor).body
        yield from body[name]
        if "next" not in body:
            return
        cursor = f"&cursor={body['next']}"


def test_pages_and_fields_are_those_of_the_whole_list(agent: AgentProcess) -> None:
    whole = agent.get("/vms").body
    assert sorted(vm["name"] for vm in whole["vms"]) == NAMES
    assert "next" not in whole
    assert list(walk(agent, "/vms?limit=2", "vms")) == whole["vms"]
    response, body = get(agent, "/vms?fields=name,cpuNum")
    assert response.headers["Content-Type"] == "application/vnd.kvmagent.fields+json"
    chosen = [{name: vm[name] for name in ("vmUuid", "name", "cpuNum")} for vm in whole["vms"]]
    assert sorted(json.loads(body)["vms"], key=str) == sorted(chosen, key=str)
    tasks = list(walk(agent, "/tasks?limit=90&fields=command", "tasks"))
    assert tasks == [{"taskUuid": f"old-{n}", "command": "HotPlugCpu"} for n in reversed(range(TASKS))]


@pytest.mark.parametrize("path", ["/vms", "/vms?limit=3&fields=cpuNum", "/tasks?limit=5", "/tasks?vm=vm2"])
def test_a_list_that_is_as_it_was_is_told_without_a_body(agent: AgentProcess, path: str) -> None:
    tag = get(agent, path)[0].headers["ETag"]
    response, body = get(agent, path, **{"If-None-Match": tag})
    assert (response.status, body, response.headers["ETag"]) == (304, b"", tag)
    # What it was made of has changed.
    has = agent.get("/vms/vm2").body["cpuNum"]
    for vm in NAMES:
        agent.post(
            "/vm/hotplug/cpu" if has < 4 else "/vm/hotunplug/cpu",
            {"vmUuid": vm, "cpuNum": has % 4 + 1, "dryRun": "limit=5" in path},
            task_uuid=(task := new_task_uuid()),
            callback_url="none",
        )
        wait_for(
            lambda task=task: agent.get(f"/tasks/{task}").body["state"] == "delivered", timeout_s=60, what="its end"
        )
    response, body = get(agent, path, **{"If-None-Match": tag})
    assert (response.status, response.headers["ETag"] != tag, body != b"") == (200, True, True)


def test_a_vm_s_history_has_pages_too(agent: AgentProcess) -> None:
    for cpus in (3, 2, 3):
        for path in ("/vm/hotplug/cpu", "/vm/hotunplug/cpu"):
            agent.post(
                path, {"vmUuid": "vm5", "cpuNum": cpus}, task_uuid=(task := new_task_uuid()), callback_url="none"
            )
            wait_for(
                lambda task=task: agent.get(f"/tasks/{task}").body["state"] == "delivered", timeout_s=60, what="its end"
            )
    whole = agent.get("/vms/vm5/history").body["changes"]
    assert len(whole) >= 3
    assert list(walk(agent, "/vms/vm5/history?limit=2", "changes")) == whole
    chosen = list(walk(agent, "/vms/vm5/history?limit=1&fields=asked", "changes"))
    assert chosen == [{name: one[name] for name in ("taskUuid", "asked")} for one in whole]


@pytest.mark.parametrize("query", ["limit=0", "limit=" + "9" * 500, "cursor=x", "fields=", "fields=nothing"])
@pytest.mark.parametrize("path", ["/vms", "/tasks", "/vms/vm1/history"])
def test_a_query_that_is_none_is_refused(agent: AgentProcess, path: str, query: str) -> None:
    reply = agent.get(f"{path}?{query}")
    assert (reply.status, reply.body["errorCode"]) == (400, "BAD_QUERY")
