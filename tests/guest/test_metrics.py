"""The number that no hypervisor knows, of a real guest: what is plugged and not used there. And a QEMU that hangs."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import Send
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for

pytestmark = pytest.mark.guest

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def agent(lab: PrivateLibvirtd) -> Iterator[AgentProcess]:
    """An agent that asks each guest every second."""
    with AgentProcess(uri=lab.uri, settings={"metrics": {"sample_sec": "1"}}) as running:
        yield running


def scrape(agent: AgentProcess, guest: Guest) -> dict[str, float]:
    """The guest's series by name, and those of no VM."""
    text = agent.get("/metrics").body
    found = re.findall(rf'^kvmagent_(\w+)(?:\{{name="[^"]*",uuid="{guest.uuid}"\}})? (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def wait_told(agent: AgentProcess, guest: Guest, **numbers: float | None) -> None:
    wait_for(
        lambda: numbers.items() <= {**dict.fromkeys(numbers), **scrape(agent, guest)}.items(),
        timeout_s=30,
        what=f"{numbers}",
    )


def test_what_is_plugged_and_offline_is_told_until_the_guest_uses_it_and_a_qemu_that_hangs_holds_up_no_scrape(
    boot: Callable[[GuestSpec], Guest], define: Callable[..., Guest], agent: AgentProcess, send: Send
) -> None:
    guest = boot(GuestSpec(name="vm1"))
    wait_told(agent, guest, vm_vcpus=1, vm_guest_vcpus=1, vm_offline_vcpus=0, vm_offline_memory_bytes=0)
    free = scrape(agent, guest)["vm_slots_free"]

    send("/vm/hotplug/cpu", guest, cpuNum=3, guestOnline=False)
    send("/vm/hotplug/memory", guest, memorySize=512 * MIB, method="dimm", guestOnline=False)
    wait_told(
        agent,
        guest,
        vm_vcpus=3,
        vm_vcpus_max=4,
        vm_guest_vcpus=1,
        vm_offline_vcpus=2,
        vm_memory_bytes=512 * MIB,
        vm_offline_memory_bytes=256 * MIB,
        vm_slots_free=free - 1,
    )
    (vm,) = agent.get("/vms").body["vms"]
    assert vm["pluggedOffline"] == {"cpuNum": 2, "memorySize": 256 * MIB, "ballooned": 0}, "as the status page has it"
    guest.run("echo 1 > /sys/devices/system/cpu/cpu1/online")
    wait_told(agent, guest, vm_guest_vcpus=2, vm_offline_vcpus=1)
    guest.run("cd /sys/devices/system/memory; grep -l offline memory*/state | while read f; do echo online > $f; done")
    wait_told(agent, guest, vm_offline_memory_bytes=0, vm_guest_memory_bytes=guest.mem_total_kib() * 1024)

    qemu = find_qemu(guest)
    os.kill(qemu, signal.SIGSTOP)
    try:
        other = define(GuestSpec(name="vm2"))

        # The call that hangs has the VM for itself: the next one tells of all others.
        def other_is_told() -> bool:
            assert scrape(agent, guest)["vm_vcpus"] == 3
            return "vm_vcpus" in scrape(agent, other) and scrape(agent, guest)["vm_guest_vcpus_age_seconds"] >= 6

        wait_for(other_is_told, timeout_s=60, what="the other VM to be told of")
        assert scrape(agent, guest)["vm_offline_vcpus"] == 1, "as it was seen last"
    finally:
        os.kill(qemu, signal.SIGCONT)
    wait_for(
        lambda: scrape(agent, guest)["vm_guest_vcpus_age_seconds"] < 3, timeout_s=30, what="the guest to answer again"
    )
    guest.destroy()
    wait_told(agent, guest, vm_vcpus=None, vm_offline_vcpus=None, vms_running=1)


def find_qemu(guest: Guest) -> int:
    """The process that the guest runs in."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f"guest={guest.name},".encode() in words and guest.uuid.encode() in words:
            return int(path.parent.name)
    raise AssertionError(f"no QEMU runs {guest.name}")
