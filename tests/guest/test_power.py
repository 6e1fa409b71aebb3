"""vCPUs leave a real guest: a POWER guest, whose QEMU 7.2 tells of each that left and plugs it again.

An emulated x86 guest shows none of this before QEMU 11: the guest ejects its CPU and QEMU never tells. So only here
does a real guest see a removal, a removal that takes longer than its task, and the way back of a plug that failed.
A dimm comes before any vCPU has left: QEMU 7.2 does not survive one that comes after.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Boot, booting
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.foreign import build_foreign_image
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.newest import build_newest_tree
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
Send = Callable[..., Any]


@pytest.fixture(scope="module")
def lab(lab: PrivateLibvirtd) -> Iterator[PrivateLibvirtd]:
    """Observed: QEMU 10.0 dies of the first vCPU that leaves; where it is the host's, the newest has the guest."""
    with lab.connect() as connection:
        works = connection.getVersion() < 10_000_000
    if works:
        yield lab
        return
    with PrivateLibvirtd(build_newest_tree()) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def agent(lab: PrivateLibvirtd) -> Iterator[AgentProcess]:
    with AgentProcess(uri=lab.uri, settings={"libvirt": {"allow_emulated_removal": "true"}}) as running:
        yield running


@pytest.fixture(scope="module")
def boot_power(lab: PrivateLibvirtd) -> Iterator[Boot]:
    with booting(lab, build_foreign_image("ppc64le")) as boot:
        yield boot


def spec(name: str, **changes: Any) -> GuestSpec:
    """QEMU plugs no more vCPUs in one life than the maximum less one, when it emulates."""
    values = {
        "arch": "ppc64le",
        "machine": "pseries",
        "acpi": False,
        "max_vcpus": 16,
        "memory_mib": 1024,
        "kernel_args": "memhp_default_state=online_movable",
    }
    return GuestSpec(name=name, **{**values, **changes})


@pytest.fixture(scope="module")
def guest(boot_power: Boot) -> Guest:
    taken = ("-device", "virtio-rng-pci,id=vcpu4,bus=pci.0,addr=0x1d")  # what cannot be plugged
    return boot_power(spec("power", qemu_args=taken))


def test_a_dimm_comes_and_goes(guest: Guest, send: Send) -> None:
    ready = send("/vm/hotplug/ready", guest)
    assert "NO_ACPI" not in [blocker["code"] for blocker in ready["blockers"]], ready
    before_kib = guest.mem_total_kib()
    reply = send("/vm/hotplug/memory", guest, memorySize=1280 * MIB, method="dimm")
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 1280 * MIB), reply
    assert guest.mem_total_kib() - before_kib == 256 * 1024
    reply = send("/vm/hotunplug/memory", guest, memorySize=1024 * MIB)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 1024 * MIB), reply
    assert guest.mem_total_kib() == before_kib


def test_vcpus_come_leave_and_come_again(guest: Guest, send: Send) -> None:
    for path, count, online in (
        ("/vm/hotplug/cpu", 4, "0-3"),
        ("/vm/hotunplug/cpu", 3, "0-2"),
        ("/vm/hotunplug/cpu", 1, "0"),
        ("/vm/hotplug/cpu", 3, "0-2"),
    ):
        reply = send(path, guest, cpuNum=count)
        assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "online", count), reply
        assert reply["after"]["guestCpuNum"] == reply["after"]["configCpuNum"] == count
        assert guest.cpus_online() == online
    assert send("/vm/hotplug/cpu", guest, cpuNum=3)["outcome"] == "unchanged"


def test_half_of_a_plug_is_taken_back_out_of_the_guest(guest: Guest, send: Send) -> None:
    reply = send("/vm/hotplug/cpu", guest, cpuNum=6)
    assert (reply["success"], reply["outcome"], reply["details"]) == (False, "refused", {"undone": True}), reply
    assert "vcpu4" in reply["error"]
    assert {"SetVcpus", "UnplugVcpus"} <= {step["step"] for step in reply["steps"]}
    assert guest.cpus_online() == "0-2"


def test_a_plug_that_cannot_be_saved_is_taken_back_out_of_the_guest(
    guest: Guest, send: Send, lab: PrivateLibvirtd
) -> None:
    assert guest.cpus_online() == "0-2"
    in_the_way = lab.directory / f"c/libvirt/qemu/{guest.name}.xml.new"
    in_the_way.mkdir()
    try:
        reply = send("/vm/hotplug/cpu", guest, cpuNum=4)
    finally:
        in_the_way.rmdir()
    assert (reply["success"], reply["outcome"], reply["details"]) == (False, "refused", {"undone": True}), reply
    assert reply["before"]["cpuNum"] == reply["after"]["cpuNum"] == 3
    assert guest.cpus_online() == "0-2"


def test_a_guest_that_is_paused_gives_its_vcpus_up_later(
    guest: Guest, agent: AgentProcess, server: ManagementServer, send: Send, lab: PrivateLibvirtd
) -> None:
    """The task is answered while the first is pending; it leaves later, and the last word says what was not asked.

    libvirt 12.4 and newer ask for all at once.
    """
    with lab.connect() as connection:
        all_asked = connection.getLibVersion() >= 12_004_000
    with guest.domain() as domain:
        domain.suspend()
    task = new_task_uuid()
    reply = send("/vm/hotunplug/cpu", guest, cpuNum=1, timeoutSec=1, lateCallback=True, task=task)
    assert (reply["outcome"], reply["errorCode"], reply["cpuNum"]) == ("pending", "CPU_REMOVAL_PENDING", 3), reply
    assert ("the guest was not asked for 1 of them" in reply["error"]) != all_asked
    with guest.domain() as domain:
        domain.resume()
    left = "0" if all_asked else "0-1"
    wait_for(lambda: guest.cpus_online() == left, timeout_s=30, what="the guest to give up a CPU")

    def late() -> Any:
        told = agent.get(f"/tasks/{task}").body
        return told if told["outcome"] != "pending" else None

    ended = wait_for(late, timeout_s=60, what="the late end")
    assert ended["outcome"] == ("online" if all_asked else "partial"), ended
    reply = send("/vm/hotunplug/cpu", guest, cpuNum=1)
    ends = "unchanged" if all_asked else "online"
    assert (reply["success"], reply["outcome"], guest.cpus_online()) == (True, ends, "0"), reply
