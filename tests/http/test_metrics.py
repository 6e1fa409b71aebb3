"""/metrics of a running agent: everything that is promised is there, in a form that Prometheus likes."""

import re
import subprocess
from pathlib import Path

import pytest

from kvmagent.api.metrics.table import METRICS
from tests.lab.agent import AgentProcess, find_free_port, new_task_uuid
from tests.lab.processes import wait_for
from tests.lab.promtool import find_promtool
from tests.lab.server import ManagementServer

CPU = "/vm/hotplug/cpu"


def scrape(agent: AgentProcess) -> dict[str, float]:
    """Series, as they are written, to value."""
    text = agent.get("/metrics").body
    return {series: float(value) for series, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def changed(agent: AgentProcess, before: dict[str, float], series: str) -> float:
    return scrape(agent).get(series, 0.0) - before.get(series, 0.0)


def test_every_metric_is_there_with_the_words_of_the_document(agent: AgentProcess) -> None:
    text = agent.get("/metrics").body
    for metric in METRICS.values():
        assert f"# HELP {metric.exported} {metric.words}" in text
        assert f"# TYPE {metric.exported} {metric.type}" in text
    found = set(re.findall(r"^# TYPE (kvmagent_\w+) ", text, re.MULTILINE))
    assert found == {metric.exported for metric in METRICS.values()}
    assert "process_resident_memory_bytes" in text


def test_promtool_finds_nothing_to_say_of_them(agent: AgentProcess, server: ManagementServer) -> None:
    run(agent, server, {"vmUuid": "vm1", "cpuNum": 2})
    text = agent.get("/metrics").body
    command = [str(find_promtool()), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_command_is_counted_by_outcome_with_the_time_of_each_phase(node_uri: str, server: ManagementServer) -> None:
    # An agent of its own: what was just told to another test may be counted in this one.
    with AgentProcess(uri=node_uri) as agent:
        body = run(agent, server, {"vmUuid": "vm1", "cpuNum": 3, "affect": "live"})
        outcome = f'kvmagent_commands_total{{command="HotPlugCpu",outcome="{body["outcome"]}"}}'
        wait_for(lambda: changed(agent, {}, outcome) == 1, timeout_s=10, what="the count")
        for phase in ("queue", "plan", "journal", "libvirt", "callback"):
            series = f'{{command="HotPlugCpu",phase="{phase}"}}'
            wait_for(
                lambda series=series: changed(agent, {}, f"kvmagent_phase_seconds_count{series}") == 1,  # type: ignore[misc]
                timeout_s=10,
                what=phase,
            )
            assert 0 < changed(agent, {}, f"kvmagent_phase_seconds_sum{series}") < 20
        assert changed(agent, {}, "kvmagent_journal_writes_total") >= 4
        assert changed(agent, {}, "kvmagent_journal_commit_seconds_count") >= 2
        assert changed(agent, {}, 'kvmagent_callbacks_total{result="delivered"}') == 1


def test_a_question_is_counted_as_well(agent: AgentProcess) -> None:
    before = scrape(agent)
    assert agent.post("/host/echo", {}).status == 200
    answered = [series for series in scrape(agent) if series.endswith('outcome="answered"}')]
    assert sum(changed(agent, before, series) for series in answered) == 1


def test_refusals_are_counted_by_code_at_once_and_of_tasks(agent: AgentProcess, server: ManagementServer) -> None:
    before = scrape(agent)
    agent.post(CPU, {"vmUuid": "vm1"}, task_uuid=new_task_uuid(), callback_url=server.url)
    assert changed(agent, before, 'kvmagent_requests_refused_total{code="MISSING_FIELD"}') == 1
    run(agent, server, {"vmUuid": "nobody", "cpuNum": 3})
    # The callback may be there before its task is counted.
    for series in (
        'kvmagent_command_errors_total{code="VM_NOT_FOUND",command="HotPlugCpu"}',
        'kvmagent_commands_total{command="HotPlugCpu",outcome="refused"}',
    ):
        wait_for(lambda series=series: changed(agent, before, series) == 1, timeout_s=10, what=series)  # type: ignore[misc]


def test_what_is_owed_and_for_how_long(node_uri: str) -> None:
    with AgentProcess(uri=node_uri) as agent:
        dead = f"http://127.0.0.1:{find_free_port()}/done"
        agent.post(CPU, {"vmUuid": "vm1", "cpuNum": 2}, task_uuid=new_task_uuid(), callback_url=dead)
        wait_for(lambda: scrape(agent)["kvmagent_callback_destinations_failing"] == 1, timeout_s=10, what="a failure")
        told = scrape(agent)
        assert (told["kvmagent_callbacks_owed"], told["kvmagent_callback_attempts_failed_total"] > 0) == (1, True)
        assert 0 < told["kvmagent_callbacks_owed_oldest_seconds"] < 30
        assert (told["kvmagent_journal_up"], told["kvmagent_libvirt_up"], told["kvmagent_vms_running"]) == (1, 1, 2)


def test_a_libvirt_that_is_away_is_told_and_holds_no_scrape_up(tmp_path: Path) -> None:
    agent = AgentProcess(uri=f"qemu:///system?socket={tmp_path}/none")
    try:
        agent.start(health=503)
        assert scrape(agent)["kvmagent_libvirt_up"] == 0
        assert "kvmagent_vms_running" not in scrape(agent)
    finally:
        agent.remove()


def test_metrics_are_for_those_who_may_read(node_uri: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("")
    tokens.chmod(0o600)
    agent = AgentProcess(uri=node_uri, settings={"security": {"tokens_file": str(tokens)}})
    try:
        agent.start(health=401)
        assert agent.get("/metrics").status == 401
    finally:
        agent.remove()


@pytest.mark.parametrize("query", ["name[]=up", "x=1"])
def test_a_query_is_refused_as_on_other_reads(agent: AgentProcess, query: str) -> None:
    assert agent.get(f"/metrics?{query}").status == 400


def run(agent: AgentProcess, server: ManagementServer, body: dict[str, object]) -> dict[str, object]:
    task = new_task_uuid()
    agent.post(CPU, body, task_uuid=task, callback_url=server.url)
    reply: dict[str, object] = server.wait(task, 20)
    return reply
