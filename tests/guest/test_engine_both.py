"""vCPUs and memory in one task on a real guest: when the second fails, the first is undone."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest

pytestmark = pytest.mark.guest

MIB = 1024 * 1024


def test_memory_leaves_again_when_the_vcpus_fail(boot: Callable[[GuestSpec], Guest], send: Callable[..., Any]) -> None:
    # QEMU refuses a vCPU whose id is taken: libvirt plugs the second one as "vcpu1".
    guest = boot(
        GuestSpec(
            name="both",
            kernel_args="memhp_default_state=online_movable",
            qemu_args=("-device", "virtio-rng-pci,id=vcpu1,bus=pcie.0,addr=0x1d"),
        )
    )
    total_kib, former = guest.mem_total_kib(), guest.persistent_xml()

    reply = send("/vm/hotplug/cpumem", guest, cpuNum=2, memorySize=512 * MIB)
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "LIBVIRT_REFUSED"), reply
    assert "Duplicate device ID" in reply["error"]
    assert reply["details"] == {"undone": True}
    steps = [step["step"] for step in reply["steps"]]
    assert steps[0] == "AttachMemory"
    assert steps[-4:] == ["SetVcpus", "OfflineGuestMemory", "DetachMemory", "ForgetMemory"]
    assert (reply["cpuNum"], reply["memorySize"]) == (1, 256 * MIB)
    assert (guest.cpus_online(), guest.mem_total_kib()) == ("0", total_kib)
    assert guest.persistent_xml() == former


def test_vcpus_of_an_emulated_vm_are_not_touched(boot: Callable[[GuestSpec], Guest], send: Callable[..., Any]) -> None:
    """TCG differs from KVM here: QEMU 7.2 never confirms the removal, and crashes at the next plug of memory."""
    guest = boot(GuestSpec(name="emulated"))
    assert send("/vm/hotplug/cpu", guest, cpuNum=2)["outcome"] == "online"
    live = guest.live_xml()
    reply = send("/vm/hotunplug/cpu", guest, cpuNum=1)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "CPU_REMOVAL_UNSAFE")
    assert guest.live_xml() == live
    reply = send("/vm/hotunplug/cpu", guest, cpuNum=1, affect="config")
    assert (reply["success"], reply["outcome"], reply["after"]["configCpuNum"]) == (True, "configured", 1)
    assert (guest.live_xml(), guest.cpus_online()) == (live, "0-1")
