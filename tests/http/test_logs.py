"""The log of a running agent: whose each line is, changed and dumped while it runs."""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import RawConfigParser
from functools import partial
from typing import Any

import pytest

from tests.lab.agent import AgentProcess, find_free_port, new_task_uuid
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

CPU = "/vm/hotplug/cpu"


@pytest.fixture
def talker(node_uri: str) -> Iterator[AgentProcess]:
    """An agent that tells everything, as JSON."""
    with AgentProcess(uri=node_uri, settings={"log": {"level": "debug", "format": "json"}}) as running:
        yield running


def json_lines(agent: AgentProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agent.log().splitlines()]


def test_every_line_of_a_task_says_whose_it_is_those_of_libraries_too(
    talker: AgentProcess, server: ManagementServer
) -> None:
    task = new_task_uuid()
    talker.post(CPU, {"vmUuid": "vm1", "cpuNum": 2}, task_uuid=task, callback_url=server.url)
    server.wait(task, 20)
    wait_for(lambda: "callback delivered" in talker.log(), timeout_s=10, what="delivery")
    lines = json_lines(talker)
    ours = [line for line in lines if line.get("task") == task]
    assert all((line["vm"], line["command"], line["caller"]) == ("vm1", "HotPlugCpu", "anonymous") for line in ours)
    assert [line["message"] for line in ours if line["message"].startswith(("task", "callback"))] == [
        "task accepted",
        "task started",
        "task finished",
        "callback delivered",
    ]
    said = {line["message"]: line for line in ours if line.get("event") != "accepted"}
    assert said["task accepted"]["cpuNum"] == 2
    assert (said["step"]["count"], said["step"]["target"]) == (2, "both")
    for line in (said["task finished"], said["audit"]):
        assert (line["cpuNumBefore"], line["cpuNumAfter"]) == (1, 2)
    # libvirt's own words, on the lane's thread.
    assert "kvmagent.hypervisor.connection" in {line["logger"] for line in ours}
    strangers = [line for line in lines if line["logger"].startswith("urllib3") and "task" not in line]
    assert not strangers


def test_a_trace_is_kept_over_a_restart_and_handed_on_in_every_line_and_with_the_callback(node_uri: str) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    task, other = new_task_uuid(), new_task_uuid()
    with ManagementServer() as server, AgentProcess(uri=node_uri, settings={"log": {"format": "json"}}) as agent:
        server.stop()
        body = {"vmUuid": "vm1", "cpuNum": 2}
        for uuid, given in ((task, trace), (other, "00-nonsense")):
            sent = {"traceparent": given}
            reply = agent.post(CPU, body, task_uuid=uuid, callback_url=server.url, headers=sent)
            assert reply.status == 200
        wait_for(lambda: agent.log().count("task finished") == 2, timeout_s=60, what="both tasks")
        agent.kill()
        server.start()
        agent.start()
        # One that is sent again belongs to the trace that it was accepted in.
        agent.post(CPU, body, task_uuid=task, callback_url=server.url, headers={"traceparent": ""})
        for uuid, expected in ((task, trace), (other, None)):
            server.wait(uuid, 60)
            assert server.callbacks(uuid)[0].headers.get("traceparent") == expected
        wait_for(lambda: agent.log().count("callback delivered") >= 2, timeout_s=60, what="both callbacks")
        lines = json_lines(agent)
    ours = [line for line in lines if line.get("task") == task and "client" not in line]
    assert {"task started", "task finished", "callback delivered"} <= {line["message"] for line in ours}
    assert {line.get("traceparent") for line in ours} == {trace}
    assert {line.get("traceparent") for line in lines if line.get("task") == other} == {None}


def test_no_task_starts_before_it_is_accepted_and_nothing_is_an_object_s_repr(node_uri: str) -> None:
    """Many at once, of many VMs: a lane's thread is ready as soon as the task is on disk. Their receiver is away."""
    with AgentProcess(uri=node_uri) as agent:
        dead = f"http://127.0.0.1:{find_free_port()}/done"
        tasks = [new_task_uuid() for _ in range(60)]

        def send(n: int) -> None:
            agent.post(CPU, {"vmUuid": f"nobody{n}", "cpuNum": 2}, task_uuid=tasks[n], callback_url=dead)

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(send, range(len(tasks))))
        wait_for(lambda: agent.log().count("task finished") == len(tasks), timeout_s=60, what="all of them")
        wait_for(lambda: "callback not accepted" in agent.log(), timeout_s=60, what="an attempt")
        for task in tasks:
            told = [line for line in agent.log().splitlines() if f"task={task}" in line]
            assert "audit event=accepted" in told[0]
            assert "task accepted" in told[1]
            assert "task started" in told[2]
        assert not re.search(r"object at 0x|\w+\(\w+=|\w+\('|<\w+", agent.log())


def test_a_refused_command_is_one_line_with_the_reason(agent: AgentProcess, server: ManagementServer) -> None:
    task = new_task_uuid()
    agent.post(CPU, {"vmUuid": "vm1"}, task_uuid=task, callback_url=server.url)
    (line,) = [line for line in agent.log().splitlines() if task in line]
    assert "outcome=MISSING_FIELD error=" in line
    assert "command=HotPlugCpu" in line
    assert "caller=anonymous" in line


def test_a_hangup_takes_the_log_section_of_the_changed_file(node_uri: str) -> None:
    with AgentProcess(uri=node_uri) as agent:
        before = agent.config_file.read_text()
        agent.config_file.write_text(f"{before}\n[log]\nlevel = debug\nformat = json\n")
        hang_up(agent)
        agent.get("/vms/vm9")
        assert {"debug"} <= {json.loads(line)["level"] for line in agent.log().splitlines() if line.startswith("{")}
        agent.config_file.write_text(f"{before}\n[log]\nlevel = loud\n")
        hang_up(agent)
        last = json_lines_after_text(agent)[-1]
        assert (last["level"], last["section"], last["error_code"]) == ("error", "log", "BAD_CONFIGURATION")
        assert "loud" in last["error"]
        agent.config_file.unlink()
        hang_up(agent)
        assert json_lines_after_text(agent)[-1]["level"] == "error"
        assert agent.get("/healthz").status == 200


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_dumps_stacks_and_what_runs_waits_and_is_owed_to_the_log_file(
    node_uri: str, number: signal.Signals
) -> None:
    with AgentProcess(uri=node_uri, settings={"log": {"file": "own.log"}}) as agent:
        file = agent.directory / "own.log"
        task, dead = new_task_uuid(), f"http://127.0.0.1:{find_free_port()}/done"
        agent.post(CPU, {"vmUuid": "vm1", "cpuNum": 2}, task_uuid=task, callback_url=dead)
        wait_for(lambda: "callback not accepted" in file.read_text(), timeout_s=20, what="the first attempt")
        file.rename(file.with_suffix(".1"))
        wait_for(file.exists, timeout_s=10, what="the agent to follow")
        os.kill(agent.pid, number)
        told = wait_for(
            lambda: (text := file.read_text()) and "dump thread thread=journal" in text and text,
            timeout_s=30,
            what="the dump, the journal's thread in it",
        )
        assert "Thread 0x" in told
        assert re.search(r"dump totals threads=\d+ running=0 queued=0 owed=1 journal=well commit_seconds=0", told)
        assert re.search(rf'dump callbacks destination="{dead[:-5]}.*" owed=1 oldest_seconds=\d+ failures=', told)
        names = dict(re.findall(r"dump thread thread=(\S+) id=(0x[0-9a-f]+)", told))
        assert f"Thread {names['journal']} " in told  # Python 3.14 has the name behind it
        assert agent.get("/healthz").status == 200


def hang_up(agent: AgentProcess) -> None:
    """Send SIGHUP and wait for the last section to be read, or not."""
    said = len(re.findall(r'section"?[=:] ?"?log', agent.log()))
    os.kill(agent.pid, signal.SIGHUP)
    wait_for(lambda: len(re.findall(r'section"?[=:] ?"?log', agent.log())) > said, timeout_s=10, what="the reload")


def json_lines_after_text(agent: AgentProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agent.log().splitlines() if line.startswith("{")]


def test_a_hangup_takes_limits_ratios_and_allow_lists_and_says_what_needs_a_restart(node_uri: str) -> None:
    url = f"http://127.0.0.2:{find_free_port()}/done"
    with AgentProcess(uri=node_uri, settings={"security": {"allowed_callbacks": "127.0.0.1"}}) as agent:
        post = partial(agent.post, "/vm/hotplug/cpu", {"vmUuid": "vm1", "cpuNum": 2}, callback_url=url)
        assert post(task_uuid=new_task_uuid()).body["errorCode"] == "CALLBACK_NOT_ALLOWED"
        parser = RawConfigParser()
        parser.read(agent.config_file)
        for place, value in {
            "agent.max_queued": "123", "host.memory_reserve": "0", "security.allowed_callbacks": "127.0.0.2",
            "http.max_body_bytes": "256", "http.port": str(find_free_port()), "libvirt.uri": "test:///default",
        }.items():  # fmt: skip
            section, key = place.split(".")
            if not parser.has_section(section):
                parser.add_section(section)
            parser.set(section, key, value)
        with agent.config_file.open("w") as file:
            parser.write(file)
        hang_up(agent)
        assert post(task_uuid=new_task_uuid()).status == 200
        assert "kvmagent_tasks_queued_limit 123" in agent.get("/metrics").body
        wait_for(lambda: agent.get("/healthz").body["memory"]["reserve"] == 0, timeout_s=60, what="the new reserve")
        long = {"vmUuid": "v" * 300, "cpuNum": 2}
        told = agent.post("/vm/hotplug/cpu", long, task_uuid=new_task_uuid(), callback_url=url)
        assert told.status == 413
        waiting = re.findall(r"WARNING setting needs a restart key=(\S+)", agent.log())
        assert sorted(waiting) == ["http.port", "libvirt.uri"]
        assert "setting changed key=agent.max_queued value=123 former=10000" in agent.log()
        assert sorted(vm["name"] for vm in agent.get("/vms").body["vms"]) == ["vm1", "vm2"], (
            "what needs a restart stays"
        )
