"""Killed in the middle of memory attaches on a real guest: each device is there once, and online in the guest."""

import http.client
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from lxml import etree

from tests.crash.conftest import MortalAgent, StartAgent, find_dimms
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.server import ManagementServer

MIB = 1024 * 1024
DIMM_MIB = 128
# Around AttachMemory and what the guest then does; the other rounds are at random.
POINTS = [
    "journal.record_goal:committed",
    *(f"step:{when}@{n}" for n in (1, 2) for when in ("begun", "done")),
    "journal.finish:written",
]
ROUNDS = 10

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def guest(boot_module: Callable[[GuestSpec], Guest]) -> Guest:
    return boot_module(GuestSpec(name="mortal", memory_mib=512, max_memory_mib=8192))


def test_ten_kills_over_memory_attaches_attach_each_dimm_once(
    lab: Any, guest: Guest, make_agent: StartAgent, server: ManagementServer
) -> None:
    agent = make_agent(lab.uri)
    chance = random.Random(4)
    for n in range(1, ROUNDS + 1):
        agent.stop()
        fault = POINTS[n - 1] if n <= len(POINTS) else ""
        agent.start_to_die(fault)
        send(agent, server, f"round{n}", 512 + DIMM_MIB * n)
        if fault:
            agent.wait_killed()
        else:
            threading.Event().wait(chance.uniform(0.0, 0.4))
            agent.kill()
        agent.start()
        reply = server.wait(f"round{n}", 60)
        total = (512 + DIMM_MIB * n) * MIB
        assert (reply["outcome"], reply["memorySize"], reply["after"]["configMemorySize"]) == ("online", total, total)
        assert all(callback.body in (reply, None) for callback in server.callbacks(f"round{n}"))
    expected = [f"ua-kvmagent-round{n}-0" for n in range(1, ROUNDS + 1)]
    assert find_dimms(guest) == (expected, expected)
    assert guest.run("cat /sys/devices/system/memory/memory*/state").split().count("online") == 4 + ROUNDS


def test_a_virtio_mem_device_that_was_cut_off_goes_on_and_grows(
    lab: Any, guest: Guest, make_agent: StartAgent, server: ManagementServer
) -> None:
    """Killed when the attach had its effect, and over the growth of the same device; before and in the wait, too."""
    agent = make_agent(lab.uri)
    before_mib, seen = read_total_mib(guest), guest.mem_total_kib()
    for n, fault in enumerate(("step:done@1", "step:begun@2", "step:begun@1", "step:done@2"), start=1):
        agent.stop()
        agent.start_to_die(fault)
        total = before_mib + DIMM_MIB * n
        send(agent, server, f"virtio{n}", total, method="virtio-mem")
        agent.wait_killed()
        agent.start()
        reply = server.wait(f"virtio{n}", 60)
        assert (reply["outcome"], reply["memorySize"]) == ("online", total * MIB), reply
        assert reply["after"]["configMemorySize"] == total * MIB
        assert reply["recovered"]
    devices = [etree.fromstring(xml).findall("./devices/memory[@model='virtio-mem']") for xml in both_xmls(guest)]
    assert [[one.find("alias").get("name") for one in some] for some in devices] == [["ua-kvmagent-virtio1-0"]] * 2
    assert guest.mem_total_kib() - seen == DIMM_MIB * 4 * 1024


def read_total_mib(guest: Guest) -> int:
    """What the VM has."""
    with guest.domain() as domain:
        return int(domain.maxMemory()) // 1024


def both_xmls(guest: Guest) -> tuple[str, str]:
    """The running VM's definition, and the persistent one."""
    return guest.live_xml(), guest.persistent_xml()


def send(agent: MortalAgent, server: ManagementServer, task: str, total_mib: int, **fields: Any) -> None:
    """Send a task. The agent may die over the answer, but not before the task is on disk."""
    body = {"vmUuid": "mortal", "memorySize": total_mib * MIB, **fields}
    try:
        answer = agent.post("/vm/hotplug/memory", body, task_uuid=task, callback_url=server.url)
    except (OSError, http.client.HTTPException):
        return
    assert answer.status == 200
