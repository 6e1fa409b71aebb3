"""Killed at every transition of the journal and between every two steps, the agent loses and repeats nothing."""

import http.client
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.crash.conftest import Host, MortalAgent, StartAgent
from tests.fakes.hooks import HookDirectory
from tests.lab.processes import wait_for
from tests.lab.server import Answer, ManagementServer

TASK = "task-1"
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """A command that brings `number`, of vm1's reply, from one value to another: running and persistent."""

    path: str
    request: Mapping[str, Any]
    number: str
    before: int
    after: int
    read: Callable[[Host, str], tuple[int, int]]
    outcome: str


# One step. What is expected is so before the task, and no longer after its step.
CPUS = Work("/vm/hotplug/cpu", {"cpuNum": 3, "expectedCpuNum": 1}, "cpuNum", 1, 3, Host.vcpus, "plugged")
# Three: the running VM's balloon, the wait for it, then the persistent definition's.
BALLOON = Work(
    "/vm/hotplug/memory", {"memorySize": 256 * MIB}, "balloonSize", 128 * MIB, 256 * MIB, Host.balloon, "plugged"
)
# The last step's end is nobody's business but the result's: mostly both come to disk by one commit.
AT_THE_END = ("finish_step", "committed", 3)
ON_THE_WAY = [
    *(f"journal.{name}:{when}" for name in ("start_task", "record_goal") for when in ("written", "committed")),
    # The first step's beginning is written with the goal.
    *(
        f"journal.{name}:{when}@{n}"
        for name, n in (
            ("finish_step", 1),
            ("start_step", 1),
            ("finish_step", 2),
            ("start_step", 2),
            ("finish_step", 3),
        )
        for when in ("written", "committed")
        if (name, when, n) != AT_THE_END
    ),
    *(f"step:{when}@{n}" for n in (1, 2, 3) for when in ("begun", "done")),
    "journal.finish:written",
]
ON_ONE_STEP = ["journal.record_goal:committed", "step:begun@1", "step:done@1", "journal.finish:written"]
AFTER_THE_RESULT = ["journal.finish:committed", "callback:taken", "journal.settle:written", "journal.settle:committed"]


def send(agent: MortalAgent, server: ManagementServer, work: Work = CPUS) -> int | None:
    """Send the task; its status, or None when the agent died over it."""
    try:
        request = {"vmUuid": "vm1", **work.request}
        return agent.post(work.path, request, task_uuid=TASK, callback_url=server.url).status
    except (OSError, http.client.HTTPException):
        return None


def check_done_once(agent: MortalAgent, server: ManagementServer, host: Host, work: Work = CPUS) -> Any:
    """The task has one result, true and delivered, and the VM what was asked for; return that result."""
    wait_for(lambda: agent.get(f"/tasks/{TASK}").body["state"] == "delivered", timeout_s=20, what="the delivery")
    replies = [callback.body for callback in server.callbacks(TASK)]
    assert replies
    assert all(reply == replies[0] for reply in replies), "one task, two results"
    assert len(agent.get("/tasks").body["tasks"]) == 1
    reply = replies[0]
    assert (reply["success"], reply["outcome"]) == (True, work.outcome)
    assert (reply["before"][work.number], reply["after"][work.number]) == (work.before, work.after)
    assert work.read(host, "vm1") == (work.after, work.after)
    return reply


@pytest.mark.parametrize("point", ["journal.accept:written", "journal.accept:committed"])
def test_a_task_that_was_not_answered_is_sent_again_and_done_once(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point)
    assert send(agent, server) is None
    agent.wait_killed()
    agent.start()
    assert send(agent, server) == 200
    check_done_once(agent, server, host)


@pytest.mark.parametrize("point", ON_THE_WAY)
def test_an_accepted_task_goes_on_from_where_it_was_cut_off(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point)
    assert send(agent, server, BALLOON) in (200, None)
    agent.wait_killed()
    agent.start()
    reply = check_done_once(agent, server, host, BALLOON)
    assert reply["recovered"] is True
    assert [step.get("target") for step in reply["steps"] if step["step"] == "SetBalloon"][-1] == "config"


@pytest.mark.parametrize("point", ON_ONE_STEP)
def test_a_change_in_one_step_that_was_cut_off_goes_on(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point)
    assert send(agent, server) in (200, None)
    agent.wait_killed()
    agent.start()
    reply = check_done_once(agent, server, host)
    assert reply["recovered"] is True
    assert {(step["step"], step["target"]) for step in reply["steps"]} == {("SetVcpus", "both")}


def test_a_kill_at_the_end_of_the_last_step_leaves_one_result(
    make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    name, when, n = AT_THE_END
    agent = make_agent(host.uri, fault=f"journal.{name}:{when}@{n}")
    assert send(agent, server, BALLOON) in (200, None)
    agent.wait_killed()
    agent.start()
    check_done_once(agent, server, host, BALLOON)


@pytest.mark.parametrize("point", AFTER_THE_RESULT)
def test_a_result_that_was_written_is_the_one_that_is_told(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point)
    send(agent, server)
    agent.wait_killed()
    agent.start()
    reply = check_done_once(agent, server, host)
    assert "recovered" not in reply


@pytest.mark.parametrize("point", ["journal.record_attempt:written", "journal.record_attempt:committed"])
def test_a_callback_that_was_refused_before_the_kill_is_delivered_after_it(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    server.answer = lambda _task, attempt: Answer(status=500 if attempt == 1 else 200)
    agent = make_agent(host.uri, fault=point)
    assert send(agent, server) == 200
    agent.wait_killed()
    agent.start()
    check_done_once(agent, server, host)


@pytest.mark.parametrize("point", ["journal.owe_again:written", "journal.owe_again:committed"])
def test_a_callback_that_was_asked_for_again_still_can_be(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point)
    assert send(agent, server) == 200
    check_done_once(agent, server, host)
    assert send(agent, server) is None
    agent.wait_killed()
    agent.start()
    assert send(agent, server) == 200
    server.wait(TASK, 20, attempt=2)
    check_done_once(agent, server, host)


@pytest.mark.parametrize("point", ["journal.prune:written", "journal.prune:committed"])
def test_a_kill_while_forgetting_old_tasks_loses_no_other(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point, settings={"agent": {"keep_tasks": "5"}})
    send(agent, server)
    agent.wait_killed()
    agent.start()
    if agent.get(f"/tasks/{TASK}").status != 200:
        assert send(agent, server) == 200
    check_done_once(agent, server, host)


@pytest.mark.parametrize("point", ["journal.cancel:written", "journal.cancel:committed"])
def test_a_task_that_was_taken_back_before_the_kill_stays_so_and_one_that_was_not_still_can_be(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=point)
    host.pause()
    try:
        assert send(agent, server) == 200
        with pytest.raises((OSError, http.client.HTTPException)):
            agent.post(f"/tasks/{TASK}/cancel", b"")
        agent.wait_killed()
        agent.start(health=503)
        again = agent.post(f"/tasks/{TASK}/cancel", b"")
        assert again.status == 200
        assert again.body["state"] in ("finished", "delivered")
    finally:
        host.resume()
    assert server.wait(TASK, 20)["errorCode"] == "CANCELLED"
    wait_for(lambda: agent.get(f"/tasks/{TASK}").body["state"] == "delivered", timeout_s=20, what="the delivery")
    assert send(agent, server) == 200  # known, and not done
    assert server.wait(TASK, 20, attempt=2)["errorCode"] == "CANCELLED"
    assert host.vcpus("vm1") == (1, 1)
    assert agent.get("/healthz").body["queued"] == 0


def test_a_task_whose_commit_failed_is_refused_and_done_once_when_it_is_sent_again(
    make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    """The commit was written and not kept: after a crash the task may be there, although its caller was told no."""
    agent = make_agent(host.uri, fault="fsync!journal.accept:written")
    assert send(agent, server) == 503
    assert "journal" in agent.get("/healthz").body["down"]
    assert send(agent, server) == 503
    assert host.vcpus("vm1") == (1, 1)
    agent.kill()
    agent.start()
    assert send(agent, server) == 200
    check_done_once(agent, server, host)


@pytest.mark.parametrize("point", ["journal.record_goal:written", "journal.finish:written"])
def test_a_task_whose_later_commit_fails_waits_for_the_disk_and_is_done_once(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    agent = make_agent(host.uri, fault=f"fsync!{point}")
    assert send(agent, server) == 200
    wait_for(lambda: "journal" in agent.get("/healthz").body["down"], timeout_s=20, what="the disk's failure")
    # Nothing is touched before it is on disk, and nothing told.
    assert host.vcpus("vm1") == ((1, 1) if "record_goal" in point else (3, 3))
    assert server.callbacks(TASK) == []
    agent.kill()
    agent.start()
    check_done_once(agent, server, host)


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ("journal.record_goal:written", ["before", "before", "after"]),
        ("journal.record_goal:committed", ["before", "after"]),
        ("step:done", ["before", "after"]),
        ("journal.finish:committed", ["before"]),
    ],
)
def test_hooks_before_are_asked_until_the_goal_is_kept_and_those_after_once_at_most(
    point: str, told: list[str], make_agent: StartAgent, server: ManagementServer, host: Host, tmp_path: Path
) -> None:
    hooks = HookDirectory(tmp_path)
    for event in ("before", "after"):
        hooks.write(f"{event}.d/10-tell", f'echo {event} >> "{{told}}"')
    agent = make_agent(host.uri, fault=point, settings={"hooks": {"directory": str(hooks.path)}})
    assert send(agent, server) in (200, None)
    agent.wait_killed()
    agent.start()
    check_done_once(agent, server, host)
    wait_for(lambda: len(hooks.lines()) >= len(told), timeout_s=10, what="the hooks to run")
    assert agent.stop() == 0
    assert hooks.lines() == told


@pytest.mark.parametrize("point", ["journal.record_goal:committed", "step:done", "journal.finish:written"])
def test_tasks_of_one_vm_under_three_spellings_have_one_goal_at_a_time_over_a_kill(
    point: str, make_agent: StartAgent, server: ManagementServer, host: Host
) -> None:
    uuid = host.uuid("vm1")
    sent = {"by-name": ("vm1", 3), "by-uuid": (uuid, 4), "bare": (uuid.replace("-", ""), 5)}
    agent = make_agent(host.uri, fault=point)
    host.pause()
    try:
        for task, (vm, cpu_num) in sent.items():
            body = {"vmUuid": vm, "cpuNum": cpu_num}
            assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200
    finally:
        host.resume()
    agent.wait_killed(timeout_s=60)
    agent.start()
    replies = {task: server.wait(task, 60) for task in sent}
    # Whichever went first: each began with what the one before it had left, and none was cut into.
    done = sorted((reply for reply in replies.values() if reply["success"]), key=lambda reply: reply["cpuNum"])
    had = 1
    for reply in done:
        assert (reply["outcome"], reply["before"]["cpuNum"]) == ("plugged", had), replies
        had = reply["after"]["cpuNum"]
    refused = {reply["errorCode"] for reply in replies.values() if not reply["success"]}
    assert refused <= {"TARGET_BELOW_CURRENT"}, replies
    assert had == 5
    assert host.vcpus("vm1") == (5, 5)
