"""What is lost on the way, and who goes away while a task is under way: never two tasks, never an outcome made up."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.ctl.ctl import TIMEOUT_S, Ctl, interrupt
from tests.ctl.front import Answer, Front, Request, pass_on
from tests.lab.agent import AgentProcess
from tests.lab.processes import wait_for

TASK: dict[str, Any] = {
    "command": "HotPlugCpu",
    "vm": "db-7",
    "state": "running",
    "outcome": None,
    "acceptedAt": 1.0,
    "startedAt": 1.0,
    "finishedAt": None,
    "client": "127.0.0.1",
    "delivery": {"url": "http://127.0.0.1:1/", "attempts": 0, "error": None},
    "request": {"vmUuid": "db-7", "cpuNum": 2},
    "steps": [
        {"step": "SetVcpus", "count": 2, "target": "live", "elapsedMs": 8.0, "problem": None},
        {"step": "AwaitGuestVcpus", "known": [0], "added": 1, "timeoutSec": 60, "elapsedMs": None, "problem": None},
    ],
    "reply": None,
}
REPLY = {"success": True, "error": "", "outcome": "online", "vmUuid": "db-7", "before": {}, "after": {}}


@contextmanager
def unhurried(**task: Any) -> Iterator[Front]:
    """In place of an agent: accepts whatever comes, and says of it what is given, else that it runs for ever."""

    def decide(request: Request) -> Answer:
        if request.method == "POST":
            return Answer(200, {"taskUuid": request.headers["taskuuid"], "state": "accepted"})
        return Answer(200, {**TASK, "taskUuid": request.path.rpartition("/")[2], **task})

    with Front(decide) as front:
        yield front


def test_an_answer_that_is_lost_is_asked_for_again_as_the_same_task(ctl: Ctl, agent: AgentProcess) -> None:
    def decide(request: Request) -> Answer | None:
        answer = pass_on(agent.port, request)
        return None if request.method == "POST" and len(front.posts()) < 3 else answer

    with Front(decide) as front:
        done = ctl("--url", front.url, "plug-cpu", "db-7", "2", "--json")
    assert done.json["after"]["cpuNum"] == 2
    assert done.err.count("the connection was lost: closed without an answer; sending the same task again") == 2
    sent = {(post.headers["taskuuid"], post.headers["callbackurl"], post.body) for post in front.posts()}
    assert (len(front.posts()), len(sent)) == (3, 1)
    newest = agent.get("/tasks?limit=2").body["tasks"]
    assert [task["taskUuid"] == done.json["taskUuid"] for task in newest] in ([True], [True, False])


def test_an_agent_that_takes_no_tasks_now_is_asked_again(ctl: Ctl, agent: AgentProcess) -> None:
    def decide(request: Request) -> Answer:
        if request.method == "POST" and len(front.posts()) == 1:
            return Answer(503, {"success": False, "error": "the agent is stopping", "errorCode": "STOPPING"})
        return pass_on(agent.port, request)

    with Front(decide) as front:
        done = ctl("--url", front.url, "plug-cpu", "db-7", "2")
    assert done.status in (0, 3)
    assert "the agent accepts no tasks now: the agent is stopping; sending the same task again" in done.err


def test_an_agent_that_restarts_is_waited_for(ctl: Ctl, agent: AgentProcess) -> None:
    def decide(request: Request) -> Answer | None:
        if request.method == "POST":
            return Answer(200, {"taskUuid": request.headers["taskuuid"], "state": "accepted"})
        if len(front.requests) < 4:
            return None
        task = {**TASK, "taskUuid": "x", "state": "finished", "reply": REPLY, "finishedAt": 2.0}
        task["delivery"] = {"url": "http://127.0.0.1:1/", "attempts": 1, "error": "no route to host"}
        return Answer(200, task)

    with Front(decide) as front:
        done = ctl("--url", front.url, "plug-cpu", "db-7", "2")
    assert done.status == 0
    assert "the task is on the agent's disk and continues when the agent is back" in done.err


def test_an_agent_whose_callbacks_may_go_elsewhere_alone_is_asked_all_the_same(node_uri: str) -> None:
    with AgentProcess(uri=node_uri, settings={"security": {"allowed_callbacks": "10.0.0.100:8080"}}) as agent:
        done = Ctl({"KVMAGENT_URL": agent.url})("plug-cpu", "db-7", "2", "--json")
        assert (done.json["after"]["cpuNum"], done.err) == (2, "")


def test_who_follows_tasks_goes_on_when_the_agent_is_back(ctl: Ctl, agent: AgentProcess) -> None:
    def decide(request: Request) -> Answer | None:
        return None if len(front.requests) in (2, 3) else pass_on(agent.port, request)

    task = ctl("plug-cpu", "db-7", "77", "--json").json["taskUuid"]
    with Front(decide) as front, ctl.start("--url", front.url, "tasks", "--follow", "--limit", "1") as following:
        assert following.stdout is not None
        assert task in following.stdout.readline()
        wait_for(lambda: len(front.requests) > 3, timeout_s=20, what="a look after two that failed")
        later = ctl("plug-cpu", "db-7", "78", "--json").json["taskUuid"]
        while later not in (line := following.stdout.readline()):
            assert task in line  # delivered meanwhile
        done = interrupt(following)
    assert (done.status, done.err.count("; waiting for it")) == (130, 1)


def test_ctrl_c_says_that_the_task_goes_on_and_how_to_look_at_it(ctl: Ctl) -> None:
    with unhurried() as front, ctl.start("--url", front.url, "plug-cpu", "db-7", "2") as waiting:
        wait_for(lambda: len(front.requests) > 1, timeout_s=20, what="a look at the task")
        done = interrupt(waiting)
    task = front.posts()[0].headers["taskuuid"]
    assert (done.status, done.out) == (130, "")
    assert done.err == (
        f"kvmagentctl: INTERRUPTED: interrupted; the task continues in the agent as {task}; "
        f"remedy: Run: kvmagentctl task {task}\n"
    )


def test_the_time_of_wait_ends_the_waiting_and_not_the_task(ctl: Ctl) -> None:
    with unhurried() as front:
        done = ctl("--url", front.url, "plug-cpu", "db-7", "2", "--wait", "0.2", "--json")
        assert (done.status, done.json["errorCode"]) == (8, "UNFINISHED")
        assert done.json["taskUuid"] == front.posts()[0].headers["taskuuid"]
        assert ctl("--url", front.url, "plug-cpu", "db-7", "2", "--wait", "0").status == 8
        assert [post.headers["callbackurl"] for post in front.posts()] == ["none", "none"]


def test_a_terminal_shows_the_step_that_is_under_way(ctl: Ctl) -> None:
    with unhurried() as front:
        arguments = ("--url", front.url, "plug-cpu", "db-7", "2", "--wait", "2")
        shown = ctl.on_terminal(*arguments, environment={"NO_COLOR": "1"}).out
    lines = re.split(r"\n|\r\033\[K", shown)
    assert lines[0] == "  SetVcpus count=2 target=live 8 ms"
    assert lines[1] == "  AwaitGuestVcpus known=0 added=1 timeoutSec=60 ... 0 s"
    assert lines[-2].startswith("kvmagentctl: UNFINISHED: no outcome after 2 s; the task continues in the agent as ")


def test_what_an_agent_says_moves_no_cursor(ctl: Ctl) -> None:
    reply = {**REPLY, "warnings": [{"code": "X", "message": "\033[2Jgone\a", "remedy": ""}]}
    with unhurried(state="finished", outcome="online", finishedAt=2.0, reply=reply) as front:
        shown = ctl.on_terminal("--url", front.url, "task", "x", environment={"NO_COLOR": "1"}).out
    assert "\033" not in shown
    assert "X: \N{REPLACEMENT CHARACTER}[2Jgone\N{REPLACEMENT CHARACTER}" in shown


def lose_output(ctl: Ctl, redirections: str, *arguments: str) -> tuple[int, str]:
    """Run it with such redirections of a shell; its status, and what it wrote to standard error if that was left."""
    ours, theirs = os.pipe()
    os.close(ours)  # whoever was to read it
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", ctl.script, *arguments],
        env=ctl.environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    os.close(theirs)
    assert "Traceback" not in done.stderr, done.stderr
    assert "INTERNAL_ERROR" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("output", "errors", "form"),
    [
        ("", "", ""),
        ("", "", "--json"),
        (">/dev/full", "", ""),
        (">/dev/full", "", "-oyaml"),
        (">/dev/full", "2>&-", "--json"),
        (">&-", "2>&-", ""),
        (">&-", "2>/dev/full", "--json"),
    ],
)
def test_a_change_ends_in_its_own_status_also_where_nobody_can_read_what_is_printed(
    ctl: Ctl, output: str, errors: str, form: str
) -> None:
    reply = {**REPLY, "outcome": "plugged", "warnings": [{"code": "X", "message": "m" * 9000, "remedy": "r"}]}
    with unhurried(state="delivered", finishedAt=2.0, reply=reply) as front:
        given = ("--url", front.url, "plug-cpu", "db-7", "2", *filter(None, [form]))
        status, told = lose_output(ctl, f"{output} {errors}", *given)
        assert len(front.posts()) == 1
    assert status == 3
    if not errors:
        assert ("No space left on device" in told) == (output == ">/dev/full"), told


@pytest.mark.parametrize("command", [("vms",), ("vms", "--json"), ("--version",)])
def test_a_result_that_cannot_be_written_is_told_as_such(ctl: Ctl, command: tuple[str, ...]) -> None:
    status, told = lose_output(ctl, ">/dev/full", *command)
    assert status == 1
    assert "OUTPUT_LOST: standard output cannot be written: No space left on device" in told
    assert lose_output(ctl, ">&-", *command) == (0, "")
