"""A bare VM is made ready for hotplug, loses nothing of what it was, and takes both after its restart."""

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
GIB = 1024 * MIB
NOTE = "<note:owner xmlns:note='http://example.com/note'>team &lt;blue&gt;</note:owner>"


def test_a_bare_vm_is_prepared_and_takes_both_after_its_restart(
    boot: Callable[[GuestSpec], Guest], send: Callable[..., Any]
) -> None:
    guest = boot(
        GuestSpec(
            name="bare",
            vcpus=1,
            max_vcpus=1,
            max_memory_mib=None,
            numa_cells=0,
            acpi=False,
            balloon=False,
            agent_channel=True,
            metadata_xml=NOTE,
            devices_xml="<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1' passwd='s3cret'/>",
            qemu_args=("-name", "guest=bare,debug-threads=on"),
        )
    )
    ready = send("/vm/hotplug/ready", guest)
    codes = {blocker["code"] for blocker in ready["blockers"]}
    assert {"NO_ACPI", "NO_MAX_MEMORY", "NO_NUMA_CELL", "CPU_ABOVE_MAXIMUM"} <= codes
    assert ready["readyAfterRestart"] is False
    live, former = guest.live_xml(), guest.persistent_xml()
    assert "passwd='s3cret'" in former

    wanted = {"prepare": True, "maxCpuNum": 4, "maxMemorySize": 1024 * GIB * 4}
    planned = send("/vm/hotplug/ready", guest, dryRun=True, **wanted)
    assert planned["outcome"] == "planned"
    assert "+  <maxMemory slots=" in planned["diff"]
    assert "s3cret" not in str(planned)
    assert guest.persistent_xml() == former

    reply = send("/vm/hotplug/ready", guest, **wanted)
    assert (reply["success"], reply["outcome"], reply["restartRequired"]) == (True, "configured", True), reply
    assert (reply["ready"], reply["readyAfterRestart"]) == (False, True)
    assert reply["diff"] == planned["diff"]
    (clamp,) = reply["clamped"]
    assert (clamp["field"], clamp["asked"], clamp["prepared"]) == ("maxMemorySize", 4096 * GIB, 956 * GIB)
    assert guest.live_xml() == live
    prepared = guest.persistent_xml()
    assert "passwd='s3cret'" in prepared
    assert "guest=bare,debug-threads=on" in prepared
    owner = ElementTree.fromstring(prepared).find("./metadata/{http://example.com/note}owner")
    assert owner is not None
    assert owner.text == "team <blue>"
    assert send("/vm/hotplug/ready", guest, **wanted)["outcome"] == "unchanged"

    guest.restart()
    ready = send("/vm/hotplug/ready", guest)
    assert (ready["ready"], ready["blockers"]) == (True, [])
    total_kib = guest.mem_total_kib()
    reply = send("/vm/hotplug/cpumem", guest, cpuNum=2, memorySize=512 * MIB)
    assert (reply["success"], reply["outcome"]) == (True, "online"), reply
    assert (reply["cpuNum"], reply["memorySize"]) == (2, 512 * MIB)
    assert guest.cpus_online() == "0-1"
    assert guest.mem_total_kib() == total_kib + 256 * 1024


def test_a_prepared_virtio_mem_grows_and_shrinks_forty_times_and_uses_no_slot(
    boot: Callable[[GuestSpec], Guest], send: Callable[..., Any]
) -> None:
    guest = boot(GuestSpec(name="elastic", numa_cells=2, kernel_args="memhp_default_state=online_movable"))
    reply = send("/vm/hotplug/ready", guest, prepare=True, memoryDevice="virtio-mem")
    assert (reply["success"], reply["outcome"], reply["readyAfterRestart"]) == (True, "configured", True), reply
    assert send("/vm/hotplug/ready", guest, prepare=True, memoryDevice="virtio-mem")["outcome"] == "unchanged"
    guest.power_off()
    guest.start()
    ready = send("/vm/hotplug/ready", guest)
    assert [(one["model"], one["node"], one["requested"]) for one in ready["devices"]] == [
        ("virtio-mem", 0, 0),
        ("virtio-mem", 1, 0),
    ]
    start, slots = ready["after"]["memorySize"], ready["headroom"]["slots"]
    for _ in range(20):
        grown = send("/vm/hotplug/memory", guest, memorySize=start + 128 * MIB)
        assert (grown["success"], grown["memorySize"]) == (True, start + 128 * MIB), grown
        assert "AttachMemory" not in {step["step"] for step in grown["steps"]}
        shrunk = send("/vm/hotunplug/memory", guest, memorySize=start)
        assert (shrunk["success"], shrunk["memorySize"]) == (True, start), shrunk
    assert send("/vm/hotplug/ready", guest)["headroom"]["slots"] == slots
