"""The operator's hooks around a task, as the management server and the operator see them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hooks import KEEP, HookDirectory
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

CPU = "/vm/hotplug/cpu"


@pytest.fixture
def hooks(tmp_path: Path) -> HookDirectory:
    return HookDirectory(tmp_path)


@pytest.fixture
def agent(node_uri: str, hooks: HookDirectory) -> Iterator[AgentProcess]:
    """An agent with these hooks."""
    with AgentProcess(uri=node_uri, settings={"hooks": {"directory": str(hooks.path)}}) as running:
        yield running


def test_a_hook_refuses_and_the_next_task_is_let_through_and_told_after(
    agent: AgentProcess, server: ManagementServer, hooks: HookDirectory
) -> None:
    refusing = hooks.write("before.d/10-window", "echo 'no changes before 6 o'; exit 1")
    body = {"vmUuid": "vm1", "cpuNum": 2}
    task = new_task_uuid()
    assert agent.post(CPU, body, task_uuid=task, callback_url=server.url).status == 200
    reply = server.wait(task, 20)
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "REFUSED_BY_HOOK")
    assert reply["error"] == "before.d/10-window: no changes before 6 o"
    assert "hook" in reply["remedy"]
    assert (reply["after"]["cpuNum"], reply["steps"]) == (1, [])

    refusing.unlink()
    hooks.write("after.d/10-tell", KEEP)
    task = new_task_uuid()
    agent.post(CPU, body, task_uuid=task, callback_url=server.url)
    reply = server.wait(task, 20)
    assert (reply["outcome"], reply["after"]["cpuNum"]) == ("plugged", 2)
    # The hook may be there in time for the refused task, too.
    wait_for(lambda: any(task in line for line in hooks.lines()), timeout_s=10, what="the hook that is told")
    told = next(json.loads(line) for line in hooks.lines() if task in line)
    assert (told["taskUuid"], told["command"], told["vm"]) == (task, "HotPlugCpu", "vm1")
    assert (told["request"]["cpuNum"], told["reply"]) == (2, reply)


def test_an_after_hook_that_hangs_holds_up_no_callback_and_is_killed(
    node_uri: str, server: ManagementServer, hooks: HookDirectory
) -> None:
    hooks.write("after.d/10-hang", "sleep 1000")
    settings = {"hooks": {"directory": str(hooks.path), "timeout_sec": "1"}}
    with AgentProcess(uri=node_uri, settings=settings) as agent:
        for cpu_num in (2, 3):
            task = new_task_uuid()
            agent.post(CPU, {"vmUuid": "vm2", "cpuNum": cpu_num}, task_uuid=task, callback_url=server.url)
            assert server.wait(task, 20)["cpuNum"] == cpu_num
        wait_for(lambda: agent.log().count("hook failed hook=after.d/10-hang") == 2, timeout_s=10, what="the warnings")


def test_an_agent_whose_hooks_others_can_write_does_not_start(agent: AgentProcess, hooks: HookDirectory) -> None:
    agent.stop()
    hooks.write("before.d/10-a", "exit 0", mode=0o777)
    with pytest.raises(
        RuntimeError, match=r"BAD_CONFIGURATION: hooks.directory: .*10-a is writable by others \(0777\)"
    ):
        agent.start()
