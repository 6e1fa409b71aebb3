"""States of a VM on a real libvirt: what excludes a plug, what does not, and what the next start will not have."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from kvmagent.hypervisor.node import Node
from tests.conftest import Boot
from tests.fakes.agent import carry_out, open_node
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for

MIB = 1024 * 1024
Define = Callable[..., Guest]


@pytest.fixture
def node(lab: PrivateLibvirtd, tmp_path: Path) -> Iterator[Node]:
    """The agent's inside on the lab's libvirt."""
    with open_node(lab.uri, tmp_path) as opened:
        yield opened


def test_vcpus_and_memory_are_plugged_while_a_pull_backup_runs(
    lab: PrivateLibvirtd, define: Define, tmp_path: Path
) -> None:
    image, scratch = lab.guests_directory / "backed-up.raw", lab.guests_directory / "backed-up.scratch"
    for file in (image, scratch):
        file.touch()
        os.truncate(file, 16 * MIB)
        lab.own(file)
    lab.own(lab.guests_directory)
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    guest = define(GuestSpec(name="backed-up", devices_xml=disk))
    scratch.unlink()
    with open_node(lab.uri, tmp_path) as node, guest.domain() as domain:
        domain.backupBegin(
            f"<domainbackup mode='pull'><server transport='unix' socket='{lab.directory}/nbd'/><disks>"
            f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk></disks></domainbackup>",
            None,
            0,
        )
        assert domain.jobStats(0)["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        reply = carry_out(node, "HotPlugCpu", vmUuid="backed-up", cpuNum=2)
        assert (reply["outcome"], reply["cpuNum"]) == ("plugged", 2), reply
        reply = carry_out(node, "HotPlugMemory", "task-2", vmUuid="backed-up", memorySize=384 * MIB)
        assert (reply["outcome"], reply["memorySize"]) == ("plugged", 384 * MIB), reply
        assert domain.jobStats(0)["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP, "it still runs"
        domain.abortJob()


def test_a_managed_save_image_is_told_with_every_change_of_the_definition(
    lab: PrivateLibvirtd, define: Define, tmp_path: Path
) -> None:
    guest = define(GuestSpec(name="saved"))
    with guest.domain() as domain:
        domain.managedSave(0)
        with open_node(lab.uri, tmp_path) as node:
            told = [
                carry_out(node, "HotPlugCpu", vmUuid="saved", cpuNum=2, affect="config"),
                carry_out(node, "HotPlugMemory", "task-2", vmUuid="saved", memorySize=384 * MIB, affect="config"),
                carry_out(node, "ReadyForHotplug", "task-3", vmUuid="saved", prepare=True, maxCpuNum=8),
            ]
        for reply in told:
            assert reply["outcome"] == "configured", reply
            assert "VM_SAVED" in [problem["code"] for problem in reply["warnings"]]
        assert told[-1]["readyAfterRestart"] is False
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        assert domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_LIVE) == 1, "restored as it was saved"


def test_vcpus_that_are_as_many_and_not_the_same_are_drift(define: Define, node: Node) -> None:
    guest = define(GuestSpec(name="with-holes", max_vcpus=6))
    with guest.domain() as domain:
        for vcpu in ("1", "3", "5"):
            domain.setVcpu(vcpu, 1, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        domain.setVcpusFlags(4, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    reply = carry_out(node, "ReadyForHotplug", vmUuid="with-holes")
    assert reply["after"]["cpuNum"] == reply["after"]["configCpuNum"] == 4
    assert reply["drift"] == [{"field": "vcpus", "live": "0-1,3,5", "config": "0-3"}]
    (told,) = [problem["message"] for problem in reply["warnings"] if problem["code"] == "DRIFT"]
    assert "0-1,3,5" in told


ODD_CELL = "<cpu><numa><cell id='0' cpus='0-1' memory='1' unit='GB'/></numa></cpu>"
ODD_DIMM = "<memory model='dimm'><target><size unit='KiB'>131073</size><node>0</node></target></memory>"


@pytest.mark.parametrize(
    ("maximum", "cpu", "device"),
    [
        ("", "", ""),
        ("", ODD_CELL, ""),
        ("<maxMemory slots='2' unit='GB'>4</maxMemory>", ODD_CELL, ODD_DIMM),
    ],
    ids=["memory alone", "a cell", "a dimm"],
)
def test_sizes_that_libvirt_rounds_when_it_starts_the_vm_are_no_drift(
    lab: PrivateLibvirtd, node: Node, maximum: str, cpu: str, device: str
) -> None:
    with lab.connect() as connection:
        domain = connection.defineXML(
            f"<domain type='qemu'><name>odd</name>{maximum}<memory unit='GB'>1</memory><vcpu>2</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>{cpu}"
            f"<devices>{device}</devices></domain>"
        )
        try:
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            reply = carry_out(node, "ReadyForHotplug", vmUuid="odd")
            domain.destroy()
        finally:
            domain.undefine()
    assert reply["drift"] == [], reply
    assert reply["restartRequired"] is False
    assert reply["after"]["memorySize"] == (954 + (130 if device else 0)) * MIB


# QEMU ends by SIGTERM alone once its guest is off: where that is held back, the VM stays in shutdown.
SLOW_TO_END = """#!/bin/sh
case " $* " in
    *guest=states,*) exec env --block-signal=TERM qemu-system-x86_64 "$@" ;;
    *) exec qemu-system-x86_64 "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def guest(boot_module: Boot, lab: PrivateLibvirtd) -> Guest:
    """One that goes through states."""
    emulator = lab.guests_directory / "slow-to-end"
    emulator.write_text(SLOW_TO_END)
    emulator.chmod(0o755)
    sleeps = "<pm><suspend-to-mem enabled='yes'/></pm>"
    return boot_module(GuestSpec(name="states", domain_xml=sleeps, devices_xml=f"<emulator>{emulator}</emulator>"))


@pytest.mark.guest
def test_a_frozen_agent_is_told_with_what_thaws_it(guest: Guest, node: Node) -> None:
    """The guest agent comes up frozen, as it does where it is started again amid a backup."""
    guest.stop_agent()
    guest.run("touch /run/qga.state.isfrozen")
    guest.start_agent()
    reply: dict[str, Any] = carry_out(node, "HotPlugCpu", vmUuid="states", cpuNum=2)
    assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "plugged", 2), reply
    (told,) = [problem for problem in reply["warnings"] if problem["code"] == "GUEST_AGENT_FROZEN"]
    assert "virsh domfsthaw" in told["remedy"]
    reply = carry_out(node, "ReadyForHotplug", "task-2", vmUuid="states")
    assert (reply["ready"], reply["confirmable"]) == (True, False), reply
    with guest.domain() as domain:
        domain.fsThaw()
    reply = carry_out(node, "ReadyForHotplug", "task-3", vmUuid="states")
    assert (reply["confirmable"], reply["after"]["guestCpuNum"]) == (True, 1), reply


@pytest.mark.guest
def test_a_frozen_filesystem_is_told_with_what_thaws_it(boot_module: Boot, lab: PrivateLibvirtd, node: Node) -> None:
    image = lab.guests_directory / "frozen.raw"
    image.touch()
    os.truncate(image, 16 * MIB)
    lab.own(image)
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    guest = boot_module(GuestSpec(name="frozen", devices_xml=disk))
    guest.run("mke2fs /dev/vda && mkdir /run/data && mount -t ext4 /dev/vda /run/data")
    with guest.domain() as domain:
        assert domain.fsFreeze() == 1
        guest.run("(echo waits >/run/data/file; touch /run/written) >/dev/null 2>&1 &")
        reply: dict[str, Any] = carry_out(node, "HotPlugCpu", vmUuid="frozen", cpuNum=2)
        assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "plugged", 2), reply
        (told,) = [problem for problem in reply["warnings"] if problem["code"] == "GUEST_AGENT_FROZEN"]
        assert "virsh domfsthaw" in told["remedy"]
        reply = carry_out(node, "ReadyForHotplug", "task-2", vmUuid="frozen")
        assert (reply["ready"], reply["confirmable"], reply["guestFellSilent"]) == (True, False, False), reply
        assert guest.run("ls /run").split().count("written") == 0, "the filesystem is frozen still"
        assert domain.fsThaw() == 1, "what virsh domfsthaw does"
    wait_for(lambda: "written" in guest.run("ls /run").split(), timeout_s=30, what="the guest's write to end")
    reply = carry_out(node, "ReadyForHotplug", "task-3", vmUuid="frozen")
    assert (reply["confirmable"], reply["after"]["guestCpuNum"]) == (True, 1), reply


@pytest.mark.guest
def test_a_guest_that_ignores_the_shutdown_is_one_that_runs(guest: Guest, node: Node) -> None:
    guest.run("killall acpid")
    with guest.domain() as domain:
        domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    reply: dict[str, Any] = carry_out(node, "HotPlugCpu", vmUuid="states", cpuNum=2)
    assert (reply["success"], reply["cpuNum"]) == (True, 2), reply


@pytest.mark.guest
def test_a_guest_that_sleeps_gets_memory_and_no_vcpu(guest: Guest, node: Node) -> None:
    looked = threading.Event()
    with guest.domain() as domain:
        guest.run("(usleep 200000; echo mem > /sys/power/state) &")
        while domain.state()[0] != libvirt.VIR_DOMAIN_PMSUSPENDED:
            looked.wait(0.1)
        reply: dict[str, Any] = carry_out(node, "HotPlugCpu", vmUuid="states", cpuNum=3)
        assert (reply["outcome"], reply["errorCode"]) == ("refused", "VM_SUSPENDED"), reply
        assert "virsh dompmwakeup" in reply["remedy"]
        reply = carry_out(node, "HotPlugMemory", "task-2", vmUuid="states", memorySize=384 * MIB)
        assert (reply["outcome"], reply["memorySize"]) == ("plugged", 384 * MIB), reply
        domain.pMWakeup(0)
        while domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            looked.wait(0.1)
        # Its agent may not answer after that: Observed: Linux 6.1, virtio-serial of QEMU 7.2.
        reply = carry_out(node, "HotPlugCpu", "task-3", vmUuid="states", cpuNum=3, guestOnline=False, timeoutSec=1)
        assert (reply["success"], reply["cpuNum"]) == (True, 3), reply


@pytest.mark.guest
def test_a_vm_in_shutdown_is_given_nothing(guest: Guest, node: Node) -> None:
    guest.restart()
    guest.run_later("poweroff -f")
    with guest.domain() as domain:
        wait_for(
            lambda: domain.state()[0] == libvirt.VIR_DOMAIN_SHUTDOWN, timeout_s=60, what="the VM to be in shutdown"
        )
        for command, fields in (
            ("HotPlugCpu", {"cpuNum": 4}),
            ("HotPlugMemory", {"memorySize": 512 * MIB}),
            ("HotUnplugMemory", {"memorySize": 256 * MIB}),
        ):
            reply = carry_out(node, command, f"task-{command}", vmUuid="states", **fields)
            assert (reply["outcome"], reply["errorCode"]) == ("refused", "VM_NOT_RUNNING"), reply
            assert "in shutdown" in reply["error"]
            assert reply["steps"] == []
        reply = carry_out(node, "ReadyForHotplug", vmUuid="states")
        assert (reply["ready"], reply["state"]) == (False, "in shutdown"), reply
        assert "VM_NOT_RUNNING" in [blocker["code"] for blocker in reply["blockers"]]
        assert domain.state()[0] == libvirt.VIR_DOMAIN_SHUTDOWN, "QEMU lives still"
