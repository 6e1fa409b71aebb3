"""The GET paths."""

import json
import re

import pytest

from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer


def test_health_says_ready(agent: AgentProcess) -> None:
    reply = agent.get("/healthz/")
    assert reply.status == 200
    assert reply.body["ready"] is True
    assert reply.body["down"] == {}


def test_vms_lists_each_with_its_numbers_and_blockers(agent: AgentProcess) -> None:
    vms = agent.get("/vms").body["vms"]
    assert sorted((vm["name"], vm["state"]) for vm in vms) == [("vm1", "running"), ("vm2", "running")]
    for vm in vms:
        assert vm["after"]["maxCpuNum"] == 4
        assert vm["headroom"]["slots"] == 16
        assert (vm["ready"], vm["blockers"], vm["confirmable"]) == (True, [], False)
        assert [warning["code"] for warning in vm["warnings"]] == ["GUEST_AGENT_DISCONNECTED"]
    assert agent.get("/vms/vm1").body["vmUuid"] == "vm1"


def test_a_task_can_be_read_whole(agent: AgentProcess, server: ManagementServer) -> None:
    task = new_task_uuid()
    agent.post("/vm/hotplug/cpu", {"vmUuid": "vm1", "cpuNum": 4}, task_uuid=task, callback_url=server.url)
    reply = server.wait(task, 20)
    whole = wait_for(
        lambda: (body := agent.get(f"/tasks/{task}").body)["state"] == "delivered" and body,
        timeout_s=10,
        what="delivery",
    )
    assert whole["reply"] == reply
    assert whole["goal"]["cpuNum"] == 4
    assert [step["step"] for step in whole["steps"]] == ["SetVcpus"]
    assert whole["delivery"] == {"url": server.url, "attempts": 1, "error": None}
    newest = agent.get("/tasks?vm=vm1&limit=1&state=delivered").body["tasks"]
    assert [entry["taskUuid"] for entry in newest] == [task]


def test_a_list_of_tasks_says_what_went_wrong_and_what_to_do(agent: AgentProcess, server: ManagementServer) -> None:
    task = new_task_uuid()
    agent.post("/vm/hotplug/cpu", {"vmUuid": "vm2", "cpuNum": 64}, task_uuid=task, callback_url=server.url)
    reply = server.wait(task, 20)
    (entry,) = agent.get("/tasks?vm=vm2&limit=1").body["tasks"]
    assert entry["errorCode"] == "CPU_ABOVE_MAXIMUM"
    assert (entry["error"], entry["remedy"]) == (reply["error"], reply["remedy"])


def test_openapi_describes_every_command_and_error(agent: AgentProcess) -> None:
    document = agent.get("/openapi.json").body
    assert document["openapi"] == "3.1.0"
    commands = {path for path, item in document["paths"].items() if "post" in item}
    assert {"/vm/hotplug/cpu", "/vm/hotplug/memory", "/vm/hotplug/ready"} <= commands
    request = document["components"]["schemas"]["HotPlugCpuRequest"]
    assert request["required"] == ["vmUuid", "cpuNum"]
    assert request["additionalProperties"] is False
    assert document["x-error-codes"]["SLOTS_EXHAUSTED"]["remedy"]


def test_every_path_is_typed_named_tagged_shown_by_example_and_tells_its_codes(agent: AgentProcess) -> None:
    document = agent.get("/openapi.json").body
    operations = [
        (path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(names) == len(set(names))
    for path, _, operation in operations:
        assert operation["summary"], path
        assert operation["tags"], path
        for content in operation["responses"]["200"]["content"].values():
            assert content["schema"], path
            assert "example" in content, path
        for status, response in operation["responses"].items():
            assert status in ("200", "304") or "_" in response["description"] or path == "/healthz", (path, status)
    # A tuple is written as no client generator takes it.
    assert "prefixItems" not in str(document)
    assert document["info"]["license"]["identifier"] == "Apache-2.0"
    assert agent.get("/healthz").body["apiVersion"] == document["info"]["x-api-version"]


@pytest.mark.parametrize("path", ["/vms/{}", "/vms/{}/history", "/tasks/{}"])
@pytest.mark.parametrize("name", ["*", "%2A", "%00", "vm1%00", "%0A", "%ff", "%2F", "%20"])
def test_what_names_nothing_is_not_found(agent: AgentProcess, path: str, name: str) -> None:
    reply = agent.get(path.format(name))
    assert (reply.status, reply.body["errorCode"]) == (404, "UNKNOWN_TASK" if "task" in path else "VM_NOT_FOUND")


def test_the_document_s_patterns_are_those_that_every_language_reads(agent: AgentProcess) -> None:
    # JSON Schema's are ECMA-262's, which has no \A and \Z, and of groups that begin with a question mark three kinds.
    text = json.dumps(agent.get("/openapi.json").body)
    patterns = {json.loads(found) for found in re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', text)}
    assert patterns
    for pattern in patterns:
        assert not re.search(r"\\[AZzG]|\(\?(?![:=!])", pattern), pattern


def test_the_examples_of_the_document_are_requests_that_the_agent_understands(agent: AgentProcess) -> None:
    document = agent.get("/openapi.json").body
    for path, item in document["paths"].items():
        if "requestBody" not in item.get("post", {}):
            continue
        example = item["post"]["requestBody"]["content"]["application/json"]["example"]
        is_task = any(one["name"] == "taskuuid" for one in item["post"].get("parameters", ()))
        sent = {"task_uuid": new_task_uuid(), "callback_url": "none"} if is_task else {}
        reply = agent.post(path, example, **sent)
        # Its VM is not there.
        assert reply.status in (200, 404), (path, example, reply)
