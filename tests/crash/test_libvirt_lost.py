"""libvirtd dies, restarts and hangs in the middle of plugs: tasks finish or fail in time, and nothing is done twice."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.crash.conftest import StartAgent, find_dimms
from tests.lab.agent import new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

MIB = 1024 * 1024
pytestmark = pytest.mark.guest


@pytest.fixture
def guest(define: Any) -> Guest:
    """A VM that QEMU has started and that never runs: plugging needs no guest."""
    made: Guest = define(GuestSpec(name="lost", max_memory_mib=8192))
    return made


def test_tasks_finish_when_the_daemon_is_killed_and_comes_back(
    lab: Any, guest: Guest, make_agent: StartAgent, server: ManagementServer
) -> None:
    agent = make_agent(lab.uri, settings={"agent": {"max_queued_per_vm": "50"}})
    tasks = []
    for n in range(1, 11):
        tasks.append(new_task_uuid())
        body = {"vmUuid": "lost", "memorySize": (256 + 128 * n) * MIB}
        assert agent.post("/vm/hotplug/memory", body, task_uuid=tasks[-1], callback_url=server.url).status == 200
    for n in (1, 4, 7):
        server.wait(tasks[n], 60)
        lab.kill()
        lab.start()
    for n, task in enumerate(tasks, start=1):
        reply = server.wait(task, 60)
        assert (reply["outcome"], reply["memorySize"]) == ("plugged", (256 + 128 * n) * MIB), reply
        assert reply["after"]["configMemorySize"] == (256 + 128 * n) * MIB
    live, config = find_dimms(guest)
    assert live == config == [f"ua-kvmagent-{task}-0" for task in tasks]


def test_without_libvirt_a_task_fails_after_the_time_limit(
    lab: Any, guest: Guest, make_agent: StartAgent, server: ManagementServer
) -> None:
    agent = make_agent(lab.uri, settings={"libvirt": {"wait_sec": "2"}})
    lab.kill()
    try:
        task = new_task_uuid()
        body = {"vmUuid": "lost", "cpuNum": 2}
        assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200
        reply = server.wait(task, 10)
        assert (reply["success"], reply["errorCode"]) == (False, "LIBVIRT_UNAVAILABLE")
        health = agent.get("/healthz")
        assert health.status == 503
        assert "libvirt" in health.body["down"]
        assert agent.get("/vms").status == 503
    finally:
        lab.start()
    wait_for(lambda: agent.get("/healthz").status == 200, timeout_s=20, what="the agent to be ready again")


def test_a_task_that_waits_for_libvirt_is_left_to_the_next_start_by_a_stop(
    lab: Any, guest: Guest, make_agent: StartAgent, server: ManagementServer
) -> None:
    agent = make_agent(lab.uri)
    lab.kill()
    try:
        task = new_task_uuid()
        agent.post("/vm/hotplug/cpu", {"vmUuid": "lost", "cpuNum": 2}, task_uuid=task, callback_url=server.url)
        wait_for(lambda: agent.get("/healthz").body["running"], timeout_s=10, what="the task to run")
        assert agent.stop() == 0
    finally:
        lab.start()
    agent.start()
    reply = server.wait(task, 30)
    assert (reply["outcome"], reply["recovered"], reply["cpuNum"]) == ("plugged", True, 2)


def test_a_daemon_that_hangs_holds_up_neither_health_nor_reads_and_the_task_goes_on(
    lab: Any, guest: Guest, make_agent: StartAgent, server: ManagementServer
) -> None:
    agent = make_agent(lab.uri)
    lab.pause()
    try:
        task = new_task_uuid()
        agent.post("/vm/hotplug/cpu", {"vmUuid": "lost", "cpuNum": 3}, task_uuid=task, callback_url=server.url)
        health = wait_for(
            lambda: (found := agent.get("/healthz")).status == 503 and found, timeout_s=15, what="health to tell"
        )
        assert [(one["vm"], one["taskUuid"]) for one in health.body["running"]] == [("lost", task)]
        assert agent.get("/vms/lost").status == 503
        second = new_task_uuid()
        body = {"vmUuid": "other", "cpuNum": 3}
        assert agent.post("/vm/hotplug/cpu", body, task_uuid=second, callback_url=server.url).status == 200
        wait_for(lambda: "lost" in agent.log(), timeout_s=20, what="the keep-alive to strike")
    finally:
        lab.resume()
    reply = server.wait(task, 60)
    assert (reply["outcome"], reply["cpuNum"]) == ("plugged", 3)
    assert server.wait(second, 30)["errorCode"] == "VM_NOT_FOUND"
    with guest.domain() as domain:
        assert domain.vcpusFlags(1) == domain.vcpusFlags(2) == 3


def test_vms_that_hang_occupy_their_own_lanes_and_no_other(
    lab: Any, define: Callable[..., Guest], make_agent: StartAgent, server: ManagementServer
) -> None:
    """Six, for libvirtd takes five calls at once from one client."""
    hanging = [define(GuestSpec(name=f"hang{n}")) for n in range(6)]
    define(GuestSpec(name="well"))
    agent = make_agent(lab.uri)
    tasks = {guest.name: new_task_uuid() for guest in hanging}
    with stopped([find_qemu(guest.name) for guest in hanging]):
        for vm, task in tasks.items():
            agent.post("/vm/hotplug/cpu", {"vmUuid": vm, "cpuNum": 2}, task_uuid=task, callback_url=server.url)
        wait_for(lambda: len(agent.get("/healthz").body["running"]) == 6, timeout_s=10, what="six tasks to run")
        task = new_task_uuid()
        agent.post("/vm/hotplug/cpu", {"vmUuid": "well", "cpuNum": 2}, task_uuid=task, callback_url=server.url)
        assert server.wait(task, 10)["cpuNum"] == 2
        began = time.monotonic()
        assert agent.get("/vms/hang0").status == 503
        assert agent.get("/vms/well").status == 200
        assert time.monotonic() - began < 15
        health = agent.get("/healthz")
        assert health.status == 200
        assert {one["vm"]: one["taskUuid"] for one in health.body["running"]} == tasks
        assert all(one["seconds"] >= 5 for one in health.body["running"])
    for task in tasks.values():
        assert server.wait(task, 60)["cpuNum"] == 2


def test_vms_that_were_started_while_no_event_came_are_promised_what_they_have(
    lab: Any, define: Callable[..., Guest], make_agent: StartAgent
) -> None:
    """A libvirtd that restarts gives out its numbers again: the VM with number 1 is another run by then."""
    lab.restart()
    first, asking = define(GuestSpec(name="first")), define(GuestSpec(name="asking"))
    agent = make_agent(lab.uri, settings={"host": {"memory_reserve": str(1 << 50)}})

    def promised_to() -> str:
        """The VMs that have most of the host's memory, as the refusal of any more names them."""
        found = wait_for(
            lambda: (told := agent.get("/vms/asking")).status == 200 and told, timeout_s=60, what="libvirt to be back"
        )
        return str([one["message"] for one in found.body["blockers"] if one["code"] == "HOST_MEMORY_PROMISED"])

    assert "most to first " in promised_to()
    with first.domain() as domain:
        number = domain.ID()
    with stopped([agent.pid]):
        ends = [find_qemu(guest.name) for guest in (first, asking)]
        lab.kill()
        for process in ends:
            os.kill(process, signal.SIGKILL)
        lab.start()
        wait_for(lambda: not first.is_running() and not asking.is_running(), timeout_s=60, what="the VMs to be off")
        lab.restart()
        with first.domain() as domain:
            domain.rename("second")
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            assert domain.ID() == number
        asking.start_paused()
    try:
        wait_for(lambda: "most to second " in promised_to(), timeout_s=60, what="all VMs to be read anew")
    finally:
        first.name = "second"


def find_qemu(name: str) -> int:
    """The process id of a VM's QEMU."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"guest={name},".encode() in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise AssertionError(f"no QEMU runs {name}")


@contextlib.contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Processes that do nothing meanwhile."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)
