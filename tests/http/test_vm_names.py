"""One VM is one VM: by its name and its UUID, with dashes or without, in tasks, history, log and audit."""

import itertools
from pathlib import Path

import pytest

from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for


def run_cpu(agent: AgentProcess, vm: str, count: int) -> str:
    """Plug; return the task's id once it has ended."""
    task = new_task_uuid()
    agent.post("/vm/hotplug/cpu", {"vmUuid": vm, "cpuNum": count}, task_uuid=task, callback_url="none")
    wait_for(lambda: agent.get(f"/tasks/{task}").body["finishedAt"], timeout_s=60, what=f"task {task}")
    return task


def all_names(agent: AgentProcess) -> tuple[str, ...]:
    uuid = next(vm["vmUuid"] for vm in agent.get("/vms").body["vms"] if vm["name"] == "vm1")
    return ("vm1", uuid, uuid.replace("-", ""), uuid.upper())


def test_a_task_is_found_by_each_name_whichever_it_was_sent_with(tmp_path: Path) -> None:
    uri = write_node(tmp_path, GuestSpec(name="vm1"), GuestSpec(name="vm2"))
    with AgentProcess(uri=uri) as agent:
        names = all_names(agent)
        tasks = [run_cpu(agent, name, 2) for name in names]
        other = run_cpu(agent, "vm2", 2)
        for name in names:
            listed = agent.get(f"/tasks?vm={name}").body["tasks"]
            assert [entry["taskUuid"] for entry in listed] == tasks[::-1], name
            assert {(entry["vm"], entry["vmUuid"]) for entry in listed} == {names[:2]}
        assert [entry["taskUuid"] for entry in agent.get("/tasks?vm=vm2").body["tasks"]] == [other]
        lines = [line for line in agent.log_file.read_text().splitlines() if f"uuid={names[1]}" in line]
    for task, what in itertools.product(tasks, ("task accepted", "task started", "task finished", "event=finished")):
        assert any(f"task={task} " in f"{line} " and what in line and "vm=vm1 " in line for line in lines), (task, what)


def test_a_task_sent_before_its_vm_was_seen_has_its_names_too(tmp_path: Path) -> None:
    with AgentProcess(
        uri=write_node(tmp_path, GuestSpec(name="vm1")), settings={"metrics": {"sample_sec": "3600"}}
    ) as agent:
        task = run_cpu(agent, "vm1", 2)
        entry = agent.get(f"/tasks/{task}").body
        found = agent.get(f"/tasks?vm={entry['vmUuid'].replace('-', '')}").body["tasks"]
        assert [one["taskUuid"] for one in found] == [task]
        gone = run_cpu(agent, "nobody", 2)
        assert agent.get("/tasks?vm=nobody").body["tasks"][0]["taskUuid"] == gone
        assert agent.get(f"/tasks/{gone}").body["vmUuid"] is None


def test_a_vm_whose_name_looks_like_another_s_uuid_is_found_by_that_name(tmp_path: Path) -> None:
    # No VM has that UUID.
    name = "0123456789abcdef0123456789abcdef"
    dashed = "01234567-89ab-cdef-0123-456789abcdef"
    with AgentProcess(uri=write_node(tmp_path, GuestSpec(name=name))) as agent:
        (uuid,) = (vm["vmUuid"] for vm in agent.get("/vms?fields=vmUuid").body["vms"])
        task = run_cpu(agent, name, 2)
        for restarted in (False, True):
            for one in (name, dashed, uuid) if not restarted else (name, uuid):
                changes = agent.get(f"/vms/{one}/history").body["changes"]
                assert [change["taskUuid"] for change in changes] == [task], (one, restarted)
                listed = agent.get(f"/tasks?vm={one}").body["tasks"]
                assert [entry["taskUuid"] for entry in listed] == [task], (one, restarted)
            if not restarted:
                agent.stop()
                agent.start()


def test_a_history_tells_who_changed_a_vm_from_what_to_what_and_outlives_its_tasks(tmp_path: Path) -> None:
    settings = {"agent": {"keep_tasks": "1"}}
    with AgentProcess(uri=write_node(tmp_path, GuestSpec(name="vm1")), settings=settings) as agent:
        names = all_names(agent)
        first, _same, refused = (run_cpu(agent, name, count) for name, count in zip(names, (3, 3, 99), strict=False))
        for name in names:
            newest, oldest = agent.get(f"/vms/{name}/history").body["changes"]
            assert (newest["taskUuid"], newest["outcome"], newest["errorCode"]) == (
                refused, "refused", "CPU_ABOVE_MAXIMUM",
            )  # fmt: skip
            assert newest["asked"] == {"cpuNum": 99}
            assert (oldest["taskUuid"], oldest["outcome"], oldest["vm"]) == (first, "plugged", "vm1")
            assert (oldest["before"]["cpuNum"], oldest["after"]["cpuNum"]) == (1, 3)
            assert oldest["caller"] == agent.get("/whoami").body["caller"]
            assert oldest["acceptedAt"] <= oldest["finishedAt"]
        wait_for(lambda: len(agent.get("/tasks").body["tasks"]) == 1, timeout_s=60, what="the tasks to be forgotten")
        assert len(agent.get("/vms/vm1/history").body["changes"]) == 2
        assert agent.get("/vms/nobody/history").body["errorCode"] == "VM_NOT_FOUND"


@pytest.mark.parametrize("query", ["limit=0", "since=now", "until=inf", "since=nan", "since=1_000", "since=%D9%A1"])
def test_a_query_that_says_nothing_is_refused(agent: AgentProcess, query: str) -> None:
    reply = agent.get(f"/tasks?{query}")
    assert (reply.status, reply.body["errorCode"]) == (400, "BAD_QUERY")


def test_tasks_are_chosen_by_time_caller_outcome_and_beginning_of_their_id(agent: AgentProcess) -> None:
    tasks = [run_cpu(agent, "vm1", count) for count in (2, 99, 3)]
    whole = [agent.get(f"/tasks/{task}").body for task in tasks]

    def find(query: str) -> list[str]:
        listed = [entry["taskUuid"] for entry in agent.get(f"/tasks?limit=1000&{query}").body["tasks"]]
        return [task for task in tasks if task in listed]

    assert find(f"since={whole[1]['acceptedAt']!r}") == tasks[1:]
    assert find(f"until={whole[1]['acceptedAt']!r}") == tasks[:1]
    assert find("outcome=refused") == tasks[1:2]
    assert find(f"caller={whole[0]['caller']}") == tasks
    assert find("caller=nobody") == []
    assert find(f"id={tasks[2][:20]}") == tasks[2:]
    assert find("id=*") == []
