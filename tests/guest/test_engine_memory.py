"""Memory down and up again on a real guest: dimms that leave and that the guest keeps, virtio-mem both ways."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
Boot = Callable[[GuestSpec], Guest]
Send = Callable[..., Any]


def test_balloon_then_dimm_then_virtio_mem_and_all_the_way_back(boot: Boot, send: Send) -> None:
    guest = boot(GuestSpec(name="eng1", kernel_args="memhp_default_state=online_movable"))
    with guest.domain() as domain:
        domain.setMemoryFlags(224 * 1024, 3)
        wait_for(lambda: domain.memoryStats()["actual"] == 224 * 1024, timeout_s=30, what="the balloon")
    start_kib = guest.mem_total_kib()

    reply = send("/vm/hotplug/memory", guest, memorySize=512 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 512 * MIB), reply
    assert [step["step"] for step in reply["steps"]][:2] == ["SetBalloon", "AwaitBalloon"]
    assert reply["after"]["balloonSize"] == 512 * MIB
    assert {stage["stage"]: stage["amount"] for stage in reply["stages"]} == {
        "plugged": 512 * MIB,
        "visible": 512 * MIB,
        "online": 512 * MIB,
    }
    grown_kib = guest.mem_total_kib()
    assert grown_kib - start_kib == reply["guestGrowth"] // 1024

    reply = send("/vm/hotplug/memory", guest, memorySize=768 * MIB, method="virtio-mem")
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 768 * MIB), reply
    assert guest.mem_total_kib() == grown_kib + 256 * 1024
    reply = send("/vm/hotplug/memory", guest, memorySize=1024 * MIB)
    assert (reply["outcome"], reply["memorySize"]) == ("online", 1024 * MIB), reply
    steps = [step["step"] for step in reply["steps"] if step["step"] != "AwaitGuestBlocks"]  # where it lists them late
    assert steps == ["ResizeVirtioMem", "AwaitVirtioMem", "ResizeVirtioMem"]
    assert guest.mem_total_kib() == grown_kib + 512 * 1024

    reply = send("/vm/hotunplug/memory", guest, memorySize=512 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 512 * MIB), reply
    assert guest.mem_total_kib() == grown_kib

    reply = send("/vm/hotunplug/memory", guest, memorySize=256 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 256 * MIB), reply
    assert [step["step"] for step in reply["steps"]] == ["OfflineGuestMemory", "DetachMemory", "ForgetMemory"]
    assert "dimm" not in guest.live_xml().replace("type='dimm'", "")
    assert "model='dimm'" not in guest.persistent_xml()
    assert reply["drift"] == []
    # Again changes nothing; and the guest still stands.
    assert send("/vm/hotunplug/memory", guest, memorySize=256 * MIB)["outcome"] == "unchanged"
    assert guest.mem_total_kib() >= start_kib


def test_a_dimm_that_the_guest_keeps_is_told_and_stays_in_use(boot: Boot, send: Send, server: ManagementServer) -> None:
    guest = boot(GuestSpec(name="eng2"))
    assert send("/vm/hotplug/memory", guest, memorySize=384 * MIB)["outcome"] == "online"
    # Kernel memory that cannot move, in all of what is online.
    guest.run("mkdir -p /pin && mount -t tmpfs none /pin && cd /pin && seq 5000 | xargs mkdir")
    total_kib = guest.mem_total_kib()

    reply = send("/vm/hotunplug/memory", guest, memorySize=256 * MIB)
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "GUEST_MEMORY_IN_USE"), reply
    assert "auto-movable" in reply["remedy"]
    assert (reply["memorySize"], guest.mem_total_kib()) == (384 * MIB, total_kib)
    assert "model='dimm'" in guest.persistent_xml()

    # Without its agent the guest is asked by the hypervisor alone, and refuses that too.
    guest.stop_agent()
    reply = send("/vm/hotunplug/memory", guest, memorySize=256 * MIB)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "MEMORY_REMOVAL_REFUSED"), reply
    assert "model='dimm'" in guest.persistent_xml()
    assert guest.mem_total_kib() == total_kib

    # A guest that does not run answers nothing; it refuses once it does, and that is told as well.
    with guest.domain() as domain:
        domain.suspend()
    reply = send("/vm/hotunplug/memory", guest, memorySize=256 * MIB, timeoutSec=1, lateCallback=True, task="late-no")
    assert (reply["outcome"], reply["errorCode"]) == ("pending", "MEMORY_REMOVAL_PENDING"), reply
    with guest.domain() as domain:
        domain.resume()
    reply = server.wait("late-no", 60, attempt=2)
    assert (reply["success"], reply["outcome"], reply["late"]) == (False, "refused", True), reply
    assert (reply["errorCode"], reply["sameRun"]) == ("MEMORY_REMOVAL_REFUSED", True)
    assert "model='dimm'" in guest.persistent_xml()


def test_what_a_reboot_left_offline_is_told_and_the_same_target_brings_it_back(
    boot: Boot, send: Send, agent: AgentProcess
) -> None:
    guest = boot(GuestSpec(name="eng5", machine="pc"))
    assert send("/vm/hotplug/memory", guest, memorySize=384 * MIB)["outcome"] == "online"
    total_kib = guest.mem_total_kib()
    guest.reboot()
    assert guest.mem_total_kib() <= total_kib - 128 * 1024
    told = agent.get(f"/vms/{guest.uuid}").body
    assert told["pluggedOffline"]["memorySize"] == 128 * MIB
    assert told["guestOs"]["family"] == "linux"
    remedies = {one["code"]: one["remedy"] for one in told["warnings"]}
    assert "memhp_default_state=online" in remedies["GUEST_MEMORY_OFFLINE"]

    reply = send("/vm/hotplug/memory", guest, memorySize=384 * MIB)
    assert (reply["success"], reply["outcome"], reply["sameRun"]) == (True, "online", True), reply
    assert [step["step"] for step in reply["steps"]] == ["OnlineGuestMemory"]
    # In each boot the kernel keeps a few pages more or less.
    assert abs(guest.mem_total_kib() - total_kib) < 1024
    assert send("/vm/hotplug/memory", guest, memorySize=384 * MIB)["outcome"] == "unchanged"


def test_a_removal_that_the_guest_does_late_is_told_by_a_second_callback(
    boot: Boot, send: Send, server: ManagementServer
) -> None:
    guest = boot(GuestSpec(name="eng3", kernel_args="memhp_default_state=online_movable"))
    assert send("/vm/hotplug/memory", guest, memorySize=384 * MIB)["outcome"] == "online"
    with guest.domain() as domain:
        domain.suspend()
    reply = send("/vm/hotunplug/memory", guest, memorySize=256 * MIB, timeoutSec=2, lateCallback=True, task="late-1")
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "pending", "MEMORY_REMOVAL_PENDING")
    assert "model='dimm'" in guest.persistent_xml()
    with guest.domain() as domain:
        domain.resume()
    reply = server.wait("late-1", 120, attempt=2)
    assert (reply["success"], reply["outcome"], reply["late"]) == (True, "online", True), reply
    assert (reply["memorySize"], reply["drift"]) == (256 * MIB, [])
    assert "model='dimm'" not in guest.persistent_xml()


def test_a_guest_without_room_for_the_page_map_gets_its_memory_in_steps(boot: Boot, send: Send) -> None:
    guest = boot(GuestSpec(name="eng4"))
    available_kib = int(guest.run("sed -n 's/^MemAvailable: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo"))
    filled_mib = (available_kib - 36 * 1024) // 1024
    guest.run("mkdir -p /fill && mount -t tmpfs -o size=90% none /fill")
    guest.run(f"dd if=/dev/zero of=/fill/f bs=1M count={filled_mib}")
    total_kib = guest.mem_total_kib()

    reply = send("/vm/hotplug/memory", guest, memorySize=2048 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 2048 * MIB), reply
    sizes = [step["sizeBytes"] for step in reply["steps"] if step["step"] == "AttachMemory"]
    assert len(sizes) > 1
    assert sum(sizes) == 1792 * MIB
    assert guest.mem_total_kib() == total_kib + 1792 * 1024
