"""States of a VM on a real libvirt: what excludes a plug, what does not, and what the next start will not have."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.fakes.agent import carry_out, open_node
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd

MIB = 1024 * 1024
Define = Callable[..., Guest]


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


@pytest.mark.guest
def test_a_guest_that_sleeps_gets_memory_and_no_vcpu(
    boot: Callable[[GuestSpec], Guest], lab: PrivateLibvirtd, tmp_path: Path
) -> None:
    guest = boot(GuestSpec(name="sleeper", domain_xml="<pm><suspend-to-mem enabled='yes'/></pm>"))
    looked = threading.Event()
    with open_node(lab.uri, tmp_path) as node, guest.domain() as domain:
        guest.run("(usleep 200000; echo mem > /sys/power/state) &")
        while domain.state()[0] != libvirt.VIR_DOMAIN_PMSUSPENDED:
            looked.wait(0.1)
        reply: dict[str, Any] = carry_out(node, "HotPlugCpu", vmUuid="sleeper", cpuNum=2)
        assert (reply["outcome"], reply["errorCode"]) == ("refused", "VM_SUSPENDED"), reply
        assert "virsh dompmwakeup" in reply["remedy"]
        reply = carry_out(node, "HotPlugMemory", "task-2", vmUuid="sleeper", memorySize=384 * MIB)
        assert (reply["outcome"], reply["memorySize"]) == ("plugged", 384 * MIB), reply
        domain.pMWakeup(0)
        while domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            looked.wait(0.1)
        # Its agent may not answer after that: Observed: Linux 6.1, virtio-serial of QEMU 7.2.
        reply = carry_out(node, "HotPlugCpu", "task-3", vmUuid="sleeper", cpuNum=2, guestOnline=False, timeoutSec=1)
        assert (reply["success"], reply["cpuNum"]) == (True, 2), reply
