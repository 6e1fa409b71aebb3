"""With prepare.on_define the agent prepares what libvirt tells it of, once, over kills and restarts of both."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from lxml import etree

from tests.crash.conftest import CONFIG_XML, VM, Host, MortalAgent, StartAgent
from tests.lab.processes import wait_for

ON_DEFINE = {"prepare": {"on_define": "true", "max_cpus": "8", "max_memory": "x2"}}
EXCLUDED = "<metadata><k:policy xmlns:k='urn:kvmagent:policy:1' hotplug='off'/></metadata><memory>"
# It is accepted, begun, defined, and its result written; each cut off before and after.
POINTS = [
    "journal.accept:written",
    "journal.accept:committed",
    "journal.record_goal:committed",
    "step:done",
    "journal.finish:committed",
]


def make_xml(name: str, *, excluded: bool = False, max_vcpus: int = 1) -> str:
    xml = VM.format(name=name, max_vcpus=max_vcpus)
    return xml.replace("<memory>", EXCLUDED, 1) if excluded else xml


def maximum(host: Host, name: str) -> int:
    root = etree.fromstring(host._connection.lookupByName(name).XMLDesc(CONFIG_XML))
    return int(root.findtext("vcpu"))


def own_tasks(agent: MortalAgent, host: Host, name: str) -> list[dict[str, Any]]:
    tasks = agent.get("/tasks?limit=1000").body["tasks"]
    return [task for task in tasks if task["vmUuid"] == host.uuid(name) and task["caller"] == "agent:on_define"]


def wait_prepared(agent: MortalAgent, host: Host, name: str, *, to: int = 8) -> list[dict[str, Any]]:
    """Wait until the definition is prepared and nothing is left to do; the tasks that it took."""

    def is_done() -> bool:
        return maximum(host, name) == to and all(task["state"] != "running" for task in own_tasks(agent, host, name))

    wait_for(is_done, timeout_s=20, what=f"{name} to be prepared")
    return own_tasks(agent, host, name)


def settle(agent: MortalAgent, host: Host, marker: str) -> None:
    """Have one more VM defined and prepared: whatever came before it has been looked at by then."""
    host._connection.defineXML(make_xml(marker))
    wait_prepared(agent, host, marker)


def test_what_is_there_and_what_comes_later_is_prepared_once(host: Host, make_agent: StartAgent) -> None:
    host._connection.defineXML(make_xml("excluded", excluded=True))
    agent = make_agent(host.uri, settings=ON_DEFINE)
    # vm1 was there, and runs: it keeps its 64, and what else it lacks is added.
    host._connection.defineXML(make_xml("new"))
    (task,) = wait_prepared(agent, host, "new")
    assert (task["command"], task["outcome"]) == ("ReadyForHotplug", "configured")
    settle(agent, host, "marker")
    assert len(own_tasks(agent, host, "new")) == 1, "its own event is followed by nothing"
    assert maximum(host, "vm1") == 64
    assert [task["outcome"] for task in own_tasks(agent, host, "vm1")] == ["configured"]
    assert maximum(host, "excluded") == 1
    assert own_tasks(agent, host, "excluded") == []
    told = [line for line in agent.log().splitlines() if "audit event=refused" in line and "VM_OPTED_OUT" in line]
    assert len(told) == 1
    accepted = [line for line in agent.log().splitlines() if "audit event=accepted caller=agent:on_define" in line]
    assert len(accepted) == 3

    # The same definition again is one more to prepare; a start of it alone is not.
    host._connection.lookupByName("new").create()
    settle(agent, host, "marker2")
    assert len(own_tasks(agent, host, "new")) == 1
    host._connection.lookupByName("new").destroy()
    host._connection.defineXML(make_xml("new", max_vcpus=2).replace("<name>", f"<uuid>{host.uuid('new')}</uuid><name>"))
    wait_prepared(agent, host, "new")
    settle(agent, host, "marker3")
    assert len(own_tasks(agent, host, "new")) == 2

    # What was defined while it was away is found at its start.
    agent.stop()
    host._connection.defineXML(make_xml("meanwhile"))
    agent.start()
    assert len(wait_prepared(agent, host, "meanwhile")) == 1
    settle(agent, host, "marker4")
    assert len(own_tasks(agent, host, "new")) == 2


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_one_task_and_a_prepared_definition(
    point: str, host: Host, make_agent: StartAgent
) -> None:
    host._connection.lookupByName("vm1").destroy()
    host._connection.lookupByName("vm1").undefine()
    agent = make_agent(host.uri, settings=ON_DEFINE)
    agent.stop()
    host._connection.defineXML(make_xml("new"))
    with contextlib.suppress(RuntimeError):  # it was killed before it was ready
        agent.start_to_die(point)
    agent.wait_killed()
    agent.start()
    settle(agent, host, "marker")
    tasks = wait_prepared(agent, host, "new")
    assert [task["outcome"] for task in tasks] == ["configured"]
    agent.stop()
    agent.start()
    settle(agent, host, "marker2")
    assert len(own_tasks(agent, host, "new")) == 1


def test_the_agent_stops_and_starts_without_libvirt(host: Host, make_agent: StartAgent) -> None:
    agent = make_agent(host.uri, settings=ON_DEFINE)
    host.pause()
    try:
        agent.stop()
    finally:
        host.resume()
    assert "Traceback" not in agent.log()
