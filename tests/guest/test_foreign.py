"""What guests of other architectures take while they run, each asked of one that is emulated: two minutes in all.

s390x    vCPUs, without ACPI or a NUMA cell; none leaves, and no memory device comes
aarch64  memory by virtio-mem, without ACPI; no vCPUs
ppc64le  a dimm without a NUMA cell, and what prepare makes of such a VM
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.conftest import booting
from tests.lab.domainxml import GuestSpec
from tests.lab.foreign import build_foreign_image
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd

from .conftest import Send

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
MACHINES = {"s390x": "s390-ccw-virtio", "aarch64": "virt", "ppc64le": "pseries"}


@pytest.fixture(scope="module")
def boot_foreign(lab: PrivateLibvirtd) -> Iterator[Callable[..., Guest]]:
    with ExitStack() as guests:

        def boot(arch: str, **fields: Any) -> Guest:
            boot_guest = guests.enter_context(booting(lab, build_foreign_image(arch)))
            return boot_guest(GuestSpec(name=arch, arch=arch, machine=MACHINES[arch], acpi=False, **fields))

        yield boot


def test_an_s390x_guest_takes_vcpus_and_gives_none_up(boot_foreign: Callable[..., Guest], send: Send) -> None:
    guest = boot_foreign("s390x", max_vcpus=16, memory_mib=512, max_memory_mib=None, numa_cells=0)
    ready = send("/vm/hotplug/ready", guest)
    assert ready["ready"], ready
    reply = send("/vm/hotplug/cpu", guest, cpuNum=3)
    assert (reply["success"], reply["outcome"], guest.cpus_online()) == (True, "online", "0-2"), reply
    for path, fields in (
        ("/vm/hotunplug/cpu", {"cpuNum": 1}),
        ("/vm/hotplug/memory", {"memorySize": 1024 * MIB}),
        ("/vm/hotplug/memory", {"memorySize": 1024 * MIB, "method": "virtio-mem"}),
    ):
        reply = send(path, guest, **fields)
        assert (reply["outcome"], reply["errorCode"]) == ("refused", "MACHINE_NOT_SUPPORTED"), reply
    assert guest.cpus_online() == "0-2"


def test_an_arm_guest_takes_memory_by_virtio_mem_and_no_vcpus(boot_foreign: Callable[..., Guest], send: Send) -> None:
    guest = boot_foreign("aarch64", max_vcpus=1, memory_mib=512, kernel_args="memhp_default_state=online_movable")
    ready = send("/vm/hotplug/ready", guest, memorySize=768 * MIB)
    assert (ready["ready"], ready["headroom"]["memoryMethods"]) == (True, ["virtio-mem"]), ready
    before_kib = guest.mem_total_kib()
    reply = send("/vm/hotplug/memory", guest, memorySize=768 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 768 * MIB), reply
    assert guest.mem_total_kib() - before_kib == 256 * 1024
    reply = send("/vm/hotplug/memory", guest, memorySize=1024 * MIB, method="dimm")
    assert (reply["errorCode"], reply["remedy"]) == ("NO_ACPI", 'Use "method": "virtio-mem".'), reply
    reply = send("/vm/hotplug/cpu", guest, cpuNum=2)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "MACHINE_NOT_SUPPORTED"), reply


def test_a_power_guest_without_a_numa_cell_takes_a_dimm_and_is_prepared(
    boot_foreign: Callable[..., Guest], send: Send
) -> None:
    guest = boot_foreign(
        "ppc64le", max_vcpus=16, memory_mib=1024, numa_cells=0, kernel_args="memhp_default_state=online_movable"
    )
    cells = guest.persistent_xml().count("<cell ")  # newer libvirts add one where a definition has none
    before_kib = guest.mem_total_kib()
    reply = send("/vm/hotplug/memory", guest, memorySize=1280 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 1280 * MIB), reply
    assert guest.mem_total_kib() - before_kib == 256 * 1024
    reply = send("/vm/hotplug/ready", guest, prepare=True, maxCpuNum=24, maxMemorySize=8192 * MIB, slots=64)
    assert [clamp["field"] for clamp in reply["clamped"]] == ["slots"], reply
    prepared = guest.persistent_xml()
    assert "<acpi/>" not in prepared
    assert prepared.count("<cell ") == cells
    assert "slots='32'" in prepared
