"""On a real guest: nothing that was asked and not reached stays armed, and the same command again succeeds."""

from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from kvmagent.hypervisor.qemuballoon import BalloonPages, ask_balloon_pages
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
Boot = Callable[[GuestSpec], Guest]
Send = Callable[..., Any]


@pytest.fixture(scope="module")
def guest(boot_module: Boot) -> Iterator[Guest]:
    """One guest for all; each test leaves it as the next one finds it."""
    return boot_module(GuestSpec(name="again1"))


def balloon(guest: Guest) -> BalloonPages:
    with guest.domain() as domain:
        pages = ask_balloon_pages(domain, libvirt_qemu.qemuMonitorCommand)
    assert pages is not None
    return pages


def test_a_balloon_target_that_no_driver_follows_is_not_followed_once_there_is_one(guest: Guest, send: Send) -> None:
    guest.run("rmmod virtio_balloon")
    reply = send("/vm/hotunplug/memory", guest, memorySize=200 * MIB, timeoutSec=1)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "BALLOON_NOT_ANSWERING"), reply
    assert balloon(guest) == (0, 0)

    # What somebody else has asked a plug finds, sets right and tells.
    with guest.domain() as domain:
        domain.setMemoryFlags(200 * 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    assert balloon(guest) == (56 * MIB, 0)
    reply = send("/vm/hotplug/memory", guest, memorySize=384 * MIB)
    assert (reply["success"], reply["outcome"]) == (True, "online"), reply
    assert "LEFTOVER_TAKEN_BACK" in [warning["code"] for warning in reply["warnings"]]
    assert balloon(guest) == (0, 0)

    total_kib = guest.mem_total_kib()
    guest.run("insmod /lib/modules/virtio_balloon.ko")
    # By what it does next the driver shows that it is there, and has seen all that was asked until now.
    for size_kib in (320 * 1024, 384 * 1024):
        with guest.domain() as domain:
            assert domain.memoryStats()["actual"] == (384 * 1024 if size_kib < 384 * 1024 else 320 * 1024)
            domain.setMemoryFlags(size_kib, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            wait_for(lambda kib=size_kib: domain.memoryStats()["actual"] == kib, timeout_s=60, what="the balloon")
    assert guest.mem_total_kib() == total_kib


def test_vcpus_of_a_plug_into_a_paused_vm_come_online_with_the_same_again(guest: Guest, send: Send) -> None:
    with guest.domain() as domain:
        domain.suspend()
    reply = send("/vm/hotplug/cpu", guest, cpuNum=3)
    assert (reply["outcome"], [warning["code"] for warning in reply["warnings"]]) == ("plugged", ["VM_PAUSED"]), reply
    with guest.domain() as domain:
        domain.resume()
    reply = send("/vm/hotplug/cpu", guest, cpuNum=3)
    assert (reply["success"], reply["outcome"]) == (True, "online"), reply
    assert guest.cpus_online() == "0-2"
    # What its owner takes offline is his.
    guest.run("echo 0 > /sys/devices/system/cpu/cpu2/online")
    reply = send("/vm/hotplug/cpu", guest, cpuNum=3)
    assert reply["outcome"] == "unchanged", reply
    assert guest.cpus_online() == "0-1"


def test_memory_of_a_plug_into_a_paused_vm_comes_online_with_the_same_again(guest: Guest, send: Send) -> None:
    size = guest_memory_bytes(guest) + 128 * MIB
    with guest.domain() as domain:
        domain.suspend()
    reply = send("/vm/hotplug/memory", guest, memorySize=size, method="dimm")
    assert reply["outcome"] == "plugged", reply
    with guest.domain() as domain:
        domain.resume()
    total_kib = guest.mem_total_kib()
    reply = send("/vm/hotplug/memory", guest, memorySize=size, method="dimm")
    assert (reply["success"], reply["outcome"]) == (True, "online"), reply
    assert guest.mem_total_kib() == total_kib + 128 * 1024


def guest_memory_bytes(guest: Guest) -> int:
    with guest.domain() as domain:
        return int(domain.maxMemory()) * 1024


def test_twenty_first_attaches_of_virtio_mem_in_a_row_are_told_as_they_are(
    boot: Boot, send: Send, lab: PrivateLibvirtd
) -> None:
    """The same guest from the same moment on, twenty times: libvirt restores it from a file in a second."""
    guest, file = boot(GuestSpec(name="again2")), str(lab.guests_directory / "again2.save")
    total_kib = guest.mem_total_kib()
    with guest.domain() as domain:
        domain.save(file)
    for n in range(20):
        with lab.connect() as connection:
            connection.restore(file)
        wait_for(guest.is_agent_connected, timeout_s=60, what="the guest agent")
        reply = send("/vm/hotplug/memory", guest, memorySize=512 * MIB, method="virtio-mem", affect="live")
        assert (reply["outcome"], reply["guestGrowth"]) == ("online", 256 * MIB), (n, reply)
        assert guest.mem_total_kib() == total_kib + 256 * 1024, n
        with guest.domain() as domain:
            domain.destroy()
