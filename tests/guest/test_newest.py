"""vCPUs leave a real x86-64 guest: the newest QEMU tells of it, and the newest libvirt does not make anybody wait.

The agent runs in the same directory, with its Python and a libvirt-python that knows the newest events.

QEMU tells, when it emulates, at the next change of the guest's memory map. The guest makes one every so many seconds
(by turning an unused device's memory off and on): so long each removal takes.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import booting
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.foreign import build_foreign_image
from tests.lab.guest import Guest
from tests.lab.image import Image
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.newest import build_newest_tree, enter, install_checkout
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

from .conftest import Send

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
PLUG, UNPLUG = "/vm/hotplug/cpu", "/vm/hotunplug/cpu"
DIAL = """
cat >/run/dial.sh <<'END'
config=/sys/bus/pci/devices/0000:00:1f.2/config
while :; do
    printf '\\000\\000' | dd of=$config bs=1 seek=4 conv=notrunc
    printf '\\002\\000' | dd of=$config bs=1 seek=4 conv=notrunc
    sleep "$(cat /run/dial)"
done
END
echo 1 >/run/dial
sh /run/dial.sh >/dev/null 2>&1 &
"""

#: Hears, as the agent does, of a VM's devices and vCPUs, until so many vCPUs were removed.
LISTENER = """
import sys, threading, libvirt
from kvmagent.hypervisor.deviceevents import DeviceEvents

def run():
    while True:
        libvirt.virEventRunDefaultImpl()

libvirt.virEventRegisterDefaultImpl()
threading.Thread(target=run, daemon=True).start()
connection, events = libvirt.open(sys.argv[1]), DeviceEvents()
events.register(connection)
with events.watch(sys.argv[2]) as told:
    print("listens", flush=True)
    left = int(sys.argv[3])
    while left:
        left -= told.get().kind == "vcpu-removed"
"""


@pytest.fixture(scope="module")
def newest() -> Iterator[PrivateLibvirtd]:
    with PrivateLibvirtd(build_newest_tree()) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def agent(newest: PrivateLibvirtd) -> Iterator[AgentProcess]:
    tree = build_newest_tree()
    command = enter(tree, f"{install_checkout(tree)}/bin/kvmagent")
    settings = {"libvirt": {"allow_emulated_removal": "true"}}
    with AgentProcess(uri=newest.uri, settings=settings, command=command) as running:
        yield running


@pytest.fixture(scope="module")
def guest(newest: PrivateLibvirtd, image: Image) -> Iterator[Guest]:
    """It cannot be given vCPU 6, whose name is taken."""
    taken = ("-device", "virtio-rng-pci,id=vcpu6,bus=pcie.0,addr=0x1d")
    spec = GuestSpec(name="newest", max_vcpus=64, kernel_args="memhp_default_state=online_movable", qemu_args=taken)
    with booting(newest, image) as boot:
        running = boot(spec)
        running.run(DIAL)
        yield running


def test_vcpus_come_leave_and_come_again_with_a_dimm_in_between(guest: Guest, send: Send) -> None:
    for count, path in ((4, PLUG), (3, UNPLUG), (1, UNPLUG), (3, PLUG)):
        reply = send(path, guest, cpuNum=count)
        assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "online", count), reply
        assert guest.cpus_online() == ("0" if count == 1 else f"0-{count - 1}")
    reply = send("/vm/hotplug/memory", guest, memorySize=384 * MIB, method="dimm")
    assert (reply["success"], reply["outcome"]) == (True, "online"), reply
    reply = send(UNPLUG, guest, cpuNum=1)
    assert (reply["success"], reply["outcome"], guest.cpus_online()) == (True, "online", "0"), reply


def test_a_slow_guest_is_waited_for_and_one_that_is_slower_is_told_late(
    guest: Guest, agent: AgentProcess, send: Send
) -> None:
    """Nine seconds are more than older libvirt waits; twenty are more than the second task does."""
    assert send(PLUG, guest, cpuNum=4)["outcome"] == "online"
    guest.run("echo 9 >/run/dial")
    reply = send(UNPLUG, guest, cpuNum=2)
    assert (reply["success"], reply["outcome"], guest.cpus_online()) == (True, "online", "0-1"), reply
    guest.run("echo 20 >/run/dial; sleep 10")
    task = new_task_uuid()
    reply = send(UNPLUG, guest, cpuNum=1, timeoutSec=1, lateCallback=True, task=task)
    assert (reply["outcome"], reply["errorCode"]) == ("pending", "CPU_REMOVAL_PENDING"), reply

    def late() -> Any:
        told = agent.get(f"/tasks/{task}").body
        return told if told["outcome"] != "pending" else None

    assert wait_for(late, timeout_s=90, what="the late end")["outcome"] == "online"
    assert guest.cpus_online() == "0"


def test_libvirt_is_asked_for_all_at_once_and_tells_of_each_that_left(
    guest: Guest, send: Send, newest: PrivateLibvirtd
) -> None:
    guest.run("echo 1 >/run/dial")
    assert send(PLUG, guest, cpuNum=4)["outcome"] == "online"
    tree = build_newest_tree()
    python = f"{install_checkout(tree)}/bin/python"
    listen = enter(tree, python, "-c", LISTENER, newest.uri, guest.uuid, "3")
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listener:
        try:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "listens\n"
            reply = send(UNPLUG, guest, cpuNum=1)
            assert (reply["outcome"], guest.cpus_online()) == ("online", "0"), reply
            assert [step["step"] for step in reply["steps"]].count("UnplugVcpus") == 1, reply
            assert listener.wait(timeout=120) == 0
        finally:
            listener.kill()


@pytest.mark.parametrize("killed", ["agent", "libvirtd"])
def test_a_removal_goes_on_after_a_kill(
    guest: Guest, agent: AgentProcess, server: ManagementServer, send: Send, newest: PrivateLibvirtd, killed: str
) -> None:
    guest.run("echo 1 >/run/dial")
    assert send(PLUG, guest, cpuNum=3)["outcome"] == "online"
    guest.run("echo 6 >/run/dial; sleep 2")
    task = new_task_uuid()
    body = {"vmUuid": guest.uuid, "cpuNum": 1}
    assert agent.post(UNPLUG, body, task_uuid=task, callback_url=server.url).status == 200
    wait_for(lambda: guest.cpus_online() == "0", timeout_s=30, what="the guest to give up its CPUs")
    if killed == "agent":
        agent.kill()
        agent.start()
    else:
        newest.restart()
    reply = server.wait(task, 120)
    assert (reply["success"], reply["cpuNum"], guest.cpus_online()) == (True, 1, "0"), reply


def test_half_of_a_plug_is_taken_back_out_of_the_guest(guest: Guest, send: Send) -> None:
    guest.run("echo 1 >/run/dial")
    reply = send(PLUG, guest, cpuNum=8)
    assert (reply["success"], reply["outcome"], reply["details"]) == (False, "refused", {"undone": True}), reply
    assert {"SetVcpus", "UnplugVcpus"} <= {step["step"] for step in reply["steps"]}
    assert (reply["after"]["cpuNum"], guest.cpus_online()) == (1, "0")


def test_both_or_neither_of_vcpus_and_memory_that_the_guest_used_already(guest: Guest, send: Send) -> None:
    guest.run("echo 1 >/run/dial")
    before_kib = guest.mem_total_kib()
    reply = send("/vm/hotplug/cpumem", guest, cpuNum=8, memorySize=512 * MIB)
    assert (reply["success"], reply["outcome"], reply["details"]) == (False, "refused", {"undone": True}), reply
    assert {"AttachMemory", "SetVcpus", "UnplugVcpus", "DetachMemory"} <= {step["step"] for step in reply["steps"]}
    assert (guest.cpus_online(), guest.mem_total_kib()) == ("0", before_kib)


def test_whole_cores_come_and_leave(newest: PrivateLibvirtd, send: Send) -> None:
    """Of POWER, whose vCPUs come by the core. QEMU 7.2 emulates no core of two threads."""
    with booting(newest, build_foreign_image("ppc64le")) as boot:
        topology, kernel_args = (8, 1, 2), "memhp_default_state=online_movable"
        spec = GuestSpec(name="cores", arch="ppc64le", machine="pseries", acpi=False, vcpus=2, memory_mib=1024)
        guest = boot(replace(spec, max_vcpus=16, topology=topology, kernel_args=kernel_args))
        reply = send(PLUG, guest, cpuNum=3)
        assert (reply["outcome"], reply["errorCode"]) == ("refused", "CPU_NOT_WHOLE_CORE"), reply
        reply = send(UNPLUG, guest, cpuNum=1)
        assert (reply["outcome"], reply["errorCode"], guest.cpus_online()) == ("refused", "CPU_NOT_WHOLE_CORE", "0-1")
        for path, count, online in ((PLUG, 6, "0-5"), (UNPLUG, 2, "0-1"), (PLUG, 4, "0-3")):
            reply = send(path, guest, cpuNum=count)
            assert (reply["success"], reply["outcome"], guest.cpus_online()) == (True, "online", online), reply


def test_virtio_mem_takes_no_slot(newest: PrivateLibvirtd, image: Image, send: Send) -> None:
    """Since libvirt 9.5."""
    with booting(newest, image) as boot:
        guest = boot(GuestSpec(name="slotless", slots=0, kernel_args="memhp_default_state=online_movable"))
        assert "<maxMemory unit=" in guest.persistent_xml()
        reply = send("/vm/hotplug/memory", guest, memorySize=384 * MIB, method="dimm")
        assert (reply["outcome"], reply["errorCode"]) == ("refused", "SLOTS_EXHAUSTED"), reply
        before_kib = guest.mem_total_kib()
        reply = send("/vm/hotplug/memory", guest, memorySize=384 * MIB, method="virtio-mem")
        assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "online", 384 * MIB), reply
        assert guest.mem_total_kib() - before_kib == 128 * 1024
