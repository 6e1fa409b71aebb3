"""The main job, end to end: a command over HTTP, a change of a real guest, a callback that says what the guest has.

What the guest has is read in the guest, over its serial port: the agent under test has no part in it.
"""

from collections.abc import Callable
from typing import Any

import pytest

from kvmagent.model.errors import MOVABLE_PARAMETERS
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

MIB = 1024 * 1024


class Caller:
    """A management server's way to an agent: sends a command, waits for its callback."""

    def __init__(self, agent: AgentProcess, server: ManagementServer, vm: str) -> None:
        self.agent, self.server, self.vm = agent, server, vm

    def __call__(self, command: str, **fields: Any) -> Any:
        task = new_task_uuid()
        body = {"vmUuid": self.vm, **fields}
        reply = self.agent.post(f"/vm/hotplug/{command}", body, task_uuid=task, callback_url=self.server.url)
        assert reply == (200, {"taskUuid": task, "state": "accepted"})
        return self.server.wait(task, 120)


def test_the_guest_itself_has_what_the_callback_says(
    boot: Callable[[GuestSpec], Guest], agent: AgentProcess, server: ManagementServer
) -> None:
    guest = boot(GuestSpec(name="vm1"))
    send = Caller(agent, server, guest.uuid)
    mem_total_kib = guest.mem_total_kib()

    reply = send("ready", cpuNum=3, memorySize=512 * MIB)
    assert (reply["ready"], reply["readyAfterRestart"], reply["blockers"]) == (True, True, [])
    headroom = {name: reply["headroom"][name] for name in ("cpuNum", "memorySize", "slots")}
    assert headroom == {"cpuNum": 3, "memorySize": 3840 * MIB, "slots": 16}

    reply = send("cpu", cpuNum=3)
    assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "online", 3)
    assert (reply["before"]["guestCpuNum"], reply["after"]["guestCpuNum"]) == (1, 3)
    assert (reply["warnings"], reply["drift"]) == ([], [])
    assert guest.cpus_online() == "0-2"
    assert "current='3'>4</vcpu>" in guest.persistent_xml()
    assert "<vcpu id='2' enabled='yes' hotpluggable='yes'" in guest.persistent_xml()

    before = guest.live_xml(), guest.persistent_xml()
    reply = send("cpu", cpuNum=3)
    assert (reply["success"], reply["outcome"], reply["steps"]) == (True, "unchanged", [])
    assert (guest.live_xml(), guest.persistent_xml()) == before

    reply = send("memory", memorySize=512 * MIB, method="dimm")
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 512 * MIB)
    assert guest.mem_total_kib() - mem_total_kib == 256 * 1024
    assert reply["after"]["guestMemorySize"] == guest.mem_total_kib() * 1024
    assert reply["after"]["configMemorySize"] == 512 * MIB
    assert guest.persistent_xml().count("ua-kvmagent-") == 1
    assert [warning["code"] for warning in reply["warnings"]] == ["GUEST_FREE_SHOWS_LESS"]
    assert "it grew by 256 MiB" in reply["warnings"][0]["message"]

    before = guest.live_xml(), guest.persistent_xml()
    reply = send("memory", memorySize=512 * MIB, method="dimm")
    assert (reply["success"], reply["outcome"], reply["steps"]) == (True, "unchanged", [])
    assert (guest.live_xml(), guest.persistent_xml()) == before

    # A CPU that the guest's owner took offline stays so, and is told.
    guest.run("echo 0 > /sys/devices/system/cpu/cpu1/online")
    reply = send("cpu", cpuNum=4)
    assert (reply["outcome"], reply["cpuNum"], reply["after"]["guestCpuNum"]) == ("plugged", 4, 3)
    assert [warning["code"] for warning in reply["warnings"]] == ["GUEST_CPU_OFFLINE"]
    assert guest.cpus_online() == "0,2-3"


@pytest.mark.parametrize(
    ("silence", "code"), [("stop", "GUEST_AGENT_DISCONNECTED"), ("hang", "GUEST_AGENT_UNRESPONSIVE")]
)
def test_without_its_agent_the_guest_s_numbers_are_unknown_and_the_remedy_is_told(
    boot: Callable[[GuestSpec], Guest], agent: AgentProcess, server: ManagementServer, silence: str, code: str
) -> None:
    guest = boot(GuestSpec(name=f"vm-{silence}"))
    send = Caller(agent, server, guest.name)
    guest.stop_agent() if silence == "stop" else guest.hang_agent()

    reply = send("cpu", cpuNum=2)
    assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "plugged", 2)
    assert reply["after"]["guestCpuNum"] is None
    assert [warning["code"] for warning in reply["warnings"]] == [code]
    assert 'SUBSYSTEM=="cpu"' in reply["warnings"][0]["remedy"]
    assert guest.cpus_online() == "0"
    assert guest.cpus_present() == "0-1"

    reply = send("memory", memorySize=384 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "plugged", 384 * MIB)
    assert reply["after"]["guestMemorySize"] is None
    assert "memhp_default_state=online" in reply["warnings"][0]["remedy"]
    assert 'SUBSYSTEM=="memory"' in reply["warnings"][0]["remedy"]

    reply = send("ready")
    assert (reply["ready"], reply["blockers"], reply["confirmable"]) == (True, [], False)
    assert [warning["code"] for warning in reply["warnings"]] == [code]


def test_the_balloon_gives_memory_back_and_auto_goes_on_with_a_dimm(
    boot: Callable[[GuestSpec], Guest], agent: AgentProcess, server: ManagementServer
) -> None:
    guest = boot(GuestSpec(name="vm-balloon", kernel_args=MOVABLE_PARAMETERS))
    send = Caller(agent, server, guest.name)
    full_kib = guest.mem_total_kib()
    with guest.domain() as domain:
        domain.setMemoryFlags(200 * 1024, 1)
    reply = _until_inflated(send)

    reply = send("memory", memorySize=230 * MIB, method="balloon")
    assert (reply["success"], reply["outcome"], reply["after"]["balloonSize"]) == (True, "online", 230 * MIB)
    assert full_kib - guest.mem_total_kib() == 26 * 1024
    assert (reply["memorySize"], reply["applied"]) == (256 * MIB, 230 * MIB)

    reply = send("memory", memorySize=512 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 512 * MIB)
    assert [step["step"] for step in reply["steps"]][:2] == ["SetBalloon", "AwaitBalloon"]
    assert reply["after"]["balloonSize"] == 512 * MIB
    assert guest.mem_total_kib() - full_kib == 256 * 1024
    assert reply["drift"] == []
    # The kernel parameters that every remedy names: plugged memory comes up by itself, and movable up to its ratio. In
    # a slow guest the agent may be before the kernel.
    assert guest.run("cat /sys/devices/system/memory/auto_online_blocks").strip() != "offline"
    parameters = guest.run("ls /sys/module/memory_hotplug/parameters || true")
    zone = "Movable" if "online_policy" in parameters else "Normal"  # older than Linux 5.16
    assert guest.run("cat /sys/devices/system/memory/memory3[23]/valid_zones").split() == [zone] * 2
    reply = send("memory", memorySize=1536 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 1536 * MIB), reply
    assert guest.run("cat /sys/devices/system/memory/memory3[45]/valid_zones").split() == ["Normal"] * 2


def _until_inflated(send: Caller) -> Any:
    from tests.lab.processes import wait_for

    return wait_for(
        lambda: (reply := send("ready"))["after"]["balloonSize"] == 200 * MIB and reply,
        timeout_s=30,
        what="the balloon to be inflated",
    )


BAD: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "more vCPUs than the maximum": ({}, "cpu", {"cpuNum": 5}, "CPU_ABOVE_MAXIMUM"),
    "fewer vCPUs than it has": ({"vcpus": 2}, "cpu", {"cpuNum": 1}, "TARGET_BELOW_CURRENT"),
    "more memory than the maximum": ({}, "memory", {"memorySize": 8192 * MIB}, "MEMORY_ABOVE_MAXIMUM"),
    "less memory than it has": ({}, "memory", {"memorySize": 128 * MIB}, "TARGET_BELOW_CURRENT"),
    "no free slot": (
        {"slots": 1},
        "memory",
        {"memorySize": 768 * MIB, "dimmSize": 256 * MIB},
        "SLOTS_EXHAUSTED",
    ),
    "not a multiple of the block": ({}, "memory", {"memorySize": 300 * MIB, "strict": True}, "MEMORY_NOT_ALIGNED"),
    "no such NUMA node": ({}, "memory", {"memorySize": 384 * MIB, "node": 7}, "NUMA_NODE_NOT_FOUND"),
    "no maxMemory": ({"max_memory_mib": None}, "memory", {"memorySize": 384 * MIB}, "NO_MAX_MEMORY"),
    "no NUMA cell": (
        {"max_memory_mib": None, "numa_cells": 0},
        "memory",
        {"memorySize": 384 * MIB},
        "NO_NUMA_CELL",
    ),
    "no ACPI for a vCPU": ({"acpi": False}, "cpu", {"cpuNum": 2}, "NO_ACPI"),
    "no ACPI for a dimm": ({"acpi": False}, "memory", {"memorySize": 384 * MIB}, "NO_ACPI"),
    "no balloon device": (
        {"balloon": False},
        "memory",
        {"memorySize": 256 * MIB, "method": "balloon"},
        "NO_BALLOON",
    ),
    "more than a balloon can give": (
        {},
        "memory",
        {"memorySize": 512 * MIB, "method": "balloon"},
        "BALLOON_ABOVE_TOTAL",
    ),
    "off": ({"off": True}, "cpu", {"cpuNum": 2}, "VM_NOT_RUNNING"),
    "off, memory": ({"off": True}, "memory", {"memorySize": 384 * MIB}, "VM_NOT_RUNNING"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_code_and_changes_nothing(
    define: Callable[..., Guest], agent: AgentProcess, server: ManagementServer, name: str
) -> None:
    spec, command, request, code = BAD[name]
    options = {key: value for key, value in spec.items() if key != "off"}
    guest = define(GuestSpec(name="vm-bad", **options), running="off" not in spec)
    before = guest.live_xml(), guest.persistent_xml()
    reply = Caller(agent, server, guest.name)(command, **request)
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", code), reply
    assert reply["error"]
    assert reply["remedy"]
    assert reply["steps"] == []
    assert (guest.live_xml(), guest.persistent_xml()) == before


def test_an_unknown_vm_is_refused_by_code(agent: AgentProcess, server: ManagementServer) -> None:
    for command, request in (("cpu", {"cpuNum": 2}), ("memory", {"memorySize": 2**30}), ("ready", {})):
        reply = Caller(agent, server, "nobody")(command, **request)
        assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "VM_NOT_FOUND")


def test_a_vm_that_is_off_takes_its_change_at_the_next_start(
    define: Callable[..., Guest], agent: AgentProcess, server: ManagementServer
) -> None:
    guest = define(GuestSpec(name="vm-off"), running=False)
    send = Caller(agent, server, guest.name)
    reply = send("cpu", cpuNum=2, affect="config")
    assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "configured", None)
    assert reply["after"]["configCpuNum"] == 2
    reply = send("memory", memorySize=384 * MIB, affect="config")
    assert (reply["success"], reply["outcome"], reply["after"]["configMemorySize"]) == (True, "configured", 384 * MIB)
    guest.start()
    guest.wait_booted()
    assert guest.cpus_online() == "0-1"
    assert send("ready")["after"]["memorySize"] == 384 * MIB
