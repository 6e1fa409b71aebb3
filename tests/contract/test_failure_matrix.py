"""Every failure of the field as a row: what is asked, what is wrong, and what the caller is told of it.

Where the lab can produce it without a booted guest, the row runs against libvirt and QEMU as well as against the
fake; a row with `fails` or `guest` needs what only the fake can be made to do, with the very error of libvirt 9.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt
import pytest

from kvmagent.hypervisor.node import Node
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.model.steps import AnyStep, AttachMemory, AttachVirtioMem, SetVcpus
from tests.fakes.agent import MIB, carry_out, make_domain, make_guest, make_node, open_node
from tests.fakes.libvirt import libvirt_error, qemu_error
from tests.lab.domainxml import GuestSpec

GIB = 1024 * MIB
Make = Callable[["Row"], Node]


@dataclass
class Row:
    """One operation under one condition. `before` are steps performed first, `fails` a libvirt call that then fails."""

    command: str
    request: dict[str, Any]
    outcome: str
    code: str
    message: str
    remedy: str
    spec: dict[str, Any] = field(default_factory=dict)
    running: bool = True
    before: tuple[AnyStep, ...] = ()
    fails: dict[str, Exception] = field(default_factory=dict)
    guest: dict[str, Any] = field(default_factory=dict)
    domain: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)

    @property
    def fake_only(self) -> bool:
        return bool(self.fails or self.guest or self.domain or self.host)


def dimm(size_mib: int = 128, alias: str = "ua-old") -> AttachMemory:
    return AttachMemory(alias=alias, size_bytes=size_mib * MIB, node=0, live=True, config=True)


def own(attributes: str) -> str:
    """The owner's policy, put where only devices are asked for."""
    return f"</devices><metadata><policy xmlns='{POLICY_NAMESPACE}' {attributes}/></metadata><devices>"


VIRTIO_MEM = AttachVirtioMem(
    alias="ua-vm", size_bytes=1 * GIB, block_bytes=2 * MIB, requested_bytes=0, node=0, live=True, config=True
)
BARE_MEMORY = {"max_memory_mib": None, "numa_cells": 0}
CPU, MEMORY, BOTH = "HotPlugCpu", "HotPlugMemory", "HotPlugCpuMemory"
LESS_CPU, LESS_MEMORY, READY = "HotUnplugCpu", "HotUnplugMemory", "ReadyForHotplug"
MORE_MEMORY = {"memorySize": 512 * MIB}
HOTPLUGGED = (SetVcpus(count=3, target="live"), SetVcpus(count=3, target="config"))
DUPLICATE = "Duplicate device ID 'vcpu3'"
NO_SPACE = libvirt_error(38, libvirt.VIR_FROM_NONE, "Failed to create file 'vm1.xml.new': No space left on device")

ROWS = {
    # vCPUs
    "vcpus above the maximum": Row(
        CPU, {"cpuNum": 5}, "refused", "CPU_ABOVE_MAXIMUM", "5 vCPUs requested", "no more than the maximum"
    ),
    "vcpus of a vm that is off": Row(
        CPU, {"cpuNum": 2}, "refused", "VM_NOT_RUNNING", "is shutoff", '"affect": "config"', running=False
    ),
    "vcpus without acpi": Row(CPU, {"cpuNum": 2}, "refused", "NO_ACPI", "no ACPI", "prepare", spec={"acpi": False}),
    "vcpus fewer on the plug path": Row(
        CPU, {"cpuNum": 1}, "refused", "TARGET_BELOW_CURRENT", "has 2", "hot-unplug", spec={"vcpus": 2}
    ),
    "vcpus other than the caller believes": Row(
        CPU,
        {"cpuNum": 3, "expectedCpuNum": 2},
        "refused",
        "NOT_AS_EXPECTED",
        "2 vCPUs were expected, VM vm1 has 1",
        "new taskuuid",
    ),
    "vcpus of a vm whose owner wants none": Row(
        CPU,
        {"cpuNum": 2},
        "refused",
        "VM_OPTED_OUT",
        "VM vm1's running definition has hotplug off",
        f"virsh metadata vm1 {POLICY_NAMESPACE} --key kvmagent --set '<policy/>' --live --config",
        spec={"devices_xml": own("hotplug='off'")},
    ),
    "vcpus above what the owner allows": Row(
        CPU,
        {"cpuNum": 3},
        "refused",
        "ABOVE_POLICY",
        "allows at most 2",
        "--set '<policy maxCpuNum=\"3\"/>' --live --config",
        spec={"devices_xml": own("maxCpuNum='2'")},
    ),
    "memory above a ceiling that cannot be read": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "ABOVE_POLICY",
        "maxMemorySize is '4G', which is not a whole number; it counts as 0",
        "--set '<policy maxMemorySize=\"536870912\"/>' --live --config",
        spec={"devices_xml": own("maxMemorySize='4G'")},
    ),
    "vcpu plug that QEMU refuses": Row(
        CPU,
        {"cpuNum": 2},
        "refused",
        "LIBVIRT_REFUSED",
        "Duplicate device ID",
        "QEMU log",
        fails={
            "setVcpusFlags": qemu_error(
                1, "internal error: unable to execute QEMU command 'device_add': Duplicate device ID 'vcpu1'"
            )
        },
    ),
    "vcpu plug that fails on the way": Row(
        CPU,
        {"cpuNum": 4},
        "refused",
        "LIBVIRT_REFUSED",
        "Duplicate device ID 'vcpu3'; what was done before was undone",
        "QEMU log",
        fails={"vcpu3": qemu_error(1, "internal error: unable to execute QEMU command 'device_add': " + DUPLICATE)},
        guest={"auto_online": True},
        domain={"virt_type": "kvm"},
    ),
    "vcpu plug that fails on the way in a guest that keeps them": Row(
        CPU,
        {"cpuNum": 4},
        "partial",
        "LIBVIRT_REFUSED",
        "Duplicate device ID 'vcpu3'; what was done before could not all be undone",
        "QEMU log",
        fails={"vcpu3": qemu_error(1, "internal error: unable to execute QEMU command 'device_add': " + DUPLICATE)},
        guest={"auto_online": True, "broken_cpus": True},
        domain={"virt_type": "kvm"},
    ),
    "vcpu plug that fails on the way in an emulated vm": Row(
        CPU,
        {"cpuNum": 4},
        "partial",
        "LIBVIRT_REFUSED",
        DUPLICATE,
        "QEMU log",
        fails={"vcpu3": qemu_error(1, "internal error: unable to execute QEMU command 'device_add': " + DUPLICATE)},
        guest={"agent": "running"},
    ),
    "vcpus of which the definition cannot be saved": Row(
        CPU,
        {"cpuNum": 2},
        "refused",
        "LIBVIRT_REFUSED",
        "No space left on device; what was done before was undone",
        "libvirt's error",
        fails={"save": NO_SPACE},
        guest={"agent": "running"},
        domain={"virt_type": "kvm"},
    ),
    "vcpu removal that is emulated": Row(
        LESS_CPU, {"cpuNum": 1}, "refused", "CPU_REMOVAL_UNSAFE", "is emulated", "KVM", before=HOTPLUGGED
    ),
    "vcpu removal of fixed ones": Row(
        LESS_CPU,
        {"cpuNum": 1},
        "refused",
        "CPU_NOT_REMOVABLE",
        "2 vCPUs of VM vm1 cannot be removed",
        "at least the number",
        spec={"vcpus": 2},
        domain={"virt_type": "kvm"},
    ),
    "vcpu removal from a guest that gives none up": Row(
        LESS_CPU,
        {"cpuNum": 1},
        "refused",
        "GUEST_OS_UNABLE",
        "Windows gives up neither vCPUs nor dimms",
        "power the VM off",
        before=HOTPLUGGED,
        domain={"virt_type": "kvm"},
        guest={"os": {"id": "mswindows", "name": "Windows"}},
    ),
    "vcpu removal without an answer": Row(
        LESS_CPU,
        {"cpuNum": 1, "timeoutSec": 1},
        "pending",
        "CPU_REMOVAL_PENDING",
        "still has 3 vCPUs",
        "pinned",
        before=HOTPLUGGED,
        domain={"virt_type": "kvm"},
        guest={"unplugs": "not answering"},
    ),
    "vcpu removal that libvirt finds no vcpus for": Row(
        LESS_CPU,
        {"cpuNum": 1},
        "refused",
        "LIBVIRT_REFUSED",
        "failed to find appropriate hotpluggable vcpus",
        "QEMU log",
        before=HOTPLUGGED,
        domain={"virt_type": "kvm"},
        fails={
            "setVcpusFlags": qemu_error(
                67,
                "unsupported configuration: failed to find appropriate hotpluggable vcpus to reach the desired "
                "target vcpu count",
            )
        },
    ),
    # dimms
    "dimm without maxMemory": Row(
        MEMORY, MORE_MEMORY, "refused", "NO_NUMA_CELL", "no guest NUMA cell", "prepare", spec=BARE_MEMORY
    ),
    "dimm above maxMemory": Row(
        MEMORY, {"memorySize": 8 * GIB}, "refused", "MEMORY_ABOVE_MAXIMUM", "at most 4 GiB", "no more than the maximum"
    ),
    "dimm for a vm that has other memory than the caller believes": Row(
        MEMORY,
        {**MORE_MEMORY, "expectedMemorySize": 256 * MIB},
        "refused",
        "NOT_AS_EXPECTED",
        "268435456 bytes of memory were expected, VM vm1 has 402653184",
        "new taskuuid",
        before=(dimm(),),
    ),
    "dimm for a guest that takes none": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "GUEST_OS_UNABLE",
        "FreeBSD takes no memory",
        "power the VM off",
        guest={"os": {"id": "freebsd", "name": "FreeBSD"}},
    ),
    "dimm removal from a guest that gives none up": Row(
        LESS_MEMORY,
        {"memorySize": 256 * MIB},
        "refused",
        "GUEST_OS_UNABLE",
        "Windows gives up neither",
        "power the VM off",
        before=(dimm(),),
        guest={"os": {"id": "mswindows", "name": "Windows"}},
    ),
    "virtio-mem for a kernel that is too old": Row(
        MEMORY,
        {**MORE_MEMORY, "method": "virtio-mem"},
        "refused",
        "GUEST_OS_UNABLE",
        "runs Linux 5.4, virtio-mem needs 5.8",
        '"method": "dimm"',
        guest={"os": {"id": "ubuntu", "kernel-release": "5.4.0-1", "kernel-version": "#1 SMP"}},
    ),
    "dimm for a vm whose memory may not be locked": Row(
        MEMORY,
        {"memorySize": 512 * MIB},
        "refused",
        "MEMORY_LOCK_LIMIT",
        "RLIMIT_MEMLOCK of the QEMU process is 1 GiB",
        "LimitMEMLOCK",
        host={"memlock_mib": 1024, "uri": "qemu:///session"},
        spec={"devices_xml": "<hostdev mode='subsystem' type='pci'/>"},
    ),
    "virtio-mem for a vm whose memory is locked": Row(
        MEMORY,
        {**MORE_MEMORY, "method": "virtio-mem"},
        "refused",
        "MEMORY_LOCKED",
        "is locked",
        '"method": "dimm"',
        spec={"devices_xml": "</devices><memoryBacking><locked/></memoryBacking><devices>"},
        guest={"agent": "running"},
    ),
    "dimm without a free slot": Row(
        MEMORY, MORE_MEMORY, "refused", "SLOTS_EXHAUSTED", "0 of 1 free", "slots", spec={"slots": 1}, before=(dimm(),)
    ),
    "dimm on a node that is not there": Row(
        MEMORY, {**MORE_MEMORY, "node": 5}, "refused", "NUMA_NODE_NOT_FOUND", "has 0", 'leave "node" out'
    ),
    "dimm that the guest's block does not divide": Row(
        MEMORY,
        {"memorySize": 300 * MIB, "strict": True},
        "refused",
        "MEMORY_NOT_ALIGNED",
        "multiples of 128 MiB",
        "402653184",
    ),
    "dimm after one that the guest cannot use": Row(
        MEMORY, {"memorySize": 1 * GIB}, "refused", "MEMORY_DEVICE_MISALIGNED", "64 MiB", "Detach", before=(dimm(64),)
    ),
    "dimm without acpi": Row(MEMORY, MORE_MEMORY, "refused", "NO_ACPI", "no ACPI", "prepare", spec={"acpi": False}),
    "dimm of a vm that is off": Row(
        MEMORY, MORE_MEMORY, "refused", "VM_NOT_RUNNING", "is shutoff", '"affect": "config"', running=False
    ),
    "dimm that the host cannot allocate": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "LIBVIRT_REFUSED",
        "cannot set up guest memory",
        "QEMU log",
        fails={
            "attachDeviceFlags": qemu_error(
                1,
                "internal error: unable to execute QEMU command 'object-add': "
                "cannot set up guest memory 'memua-x': Cannot allocate memory",
            )
        },
    ),
    "dimm while another job holds the vm": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "LIBVIRT_BUSY",
        "cannot acquire state change lock",
        "virsh domjobinfo",
        fails={
            "attachDeviceFlags": qemu_error(
                68,
                "Timed out during operation: cannot acquire state change lock "
                "(held by monitor=remoteDispatchDomainMigratePerform3Params)",
            )
        },
    ),
    "dimm for which the host has no hugepage file": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "LIBVIRT_REFUSED",
        "unable to create hugepage path",
        "QEMU log",
        fails={"attachDeviceFlags": qemu_error(38, "unable to create hugepage path /dev/hugepages/libvirt/qemu/1-vm1")},
    ),
    "dimm while QEMU dies": Row(
        MEMORY,
        MORE_MEMORY,
        "partial",
        "VM_CRASHED",
        "End of file from qemu monitor",
        "QEMU log",
        fails={"attachDeviceFlags": qemu_error(38, "End of file from qemu monitor (vm='vm1')")},
    ),
    "dimm with libvirtd gone": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "LIBVIRT_UNAVAILABLE",
        "client socket is closed",
        "libvirtd runs",
        fails={"attachDeviceFlags": libvirt_error(1, libvirt.VIR_FROM_RPC, "internal error: client socket is closed")},
    ),
    "dimm that the driver does not support": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "NOT_SUPPORTED",
        "not supported by the connection driver",
        "supports it",
        fails={
            "attachDeviceFlags": qemu_error(
                3, "this function is not supported by the connection driver: virDomainAttachDeviceFlags"
            )
        },
    ),
    "dimm into an encrypted vm's transient definition": Row(
        MEMORY,
        MORE_MEMORY,
        "refused",
        "VM_TRANSIENT",
        "is transient",
        '"affect": "live"',
        domain={"persistent": False},
    ),
    # removal of memory
    "dimm removal without an answer": Row(
        LESS_MEMORY,
        {"memorySize": 256 * MIB, "timeoutSec": 1},
        "pending",
        "MEMORY_REMOVAL_PENDING",
        "neither given up ua-old nor refused",
        "lateCallback",
        before=(dimm(),),
    ),
    "dimm removal that the guest refuses": Row(
        LESS_MEMORY,
        {"memorySize": 256 * MIB},
        "refused",
        "MEMORY_REMOVAL_REFUSED",
        "refused to give up ua-old",
        "auto-movable",
        before=(dimm(),),
        guest={"unplugs": "refuses", "agent": "stopped"},
    ),
    "dimm removal that the guest's kernel prevents": Row(
        LESS_MEMORY,
        {"memorySize": 256 * MIB},
        "refused",
        "GUEST_MEMORY_IN_USE",
        "errno 16",
        "auto-movable",
        before=(dimm(),),
        guest={"pinned": frozenset({32}), "auto_online": True},
    ),
    "dimm removal that nothing fits": Row(
        LESS_MEMORY,
        {"memorySize": 300 * MIB},
        "refused",
        "MEMORY_NOT_REMOVABLE",
        "no memory device",
        "268435456",
        before=(dimm(256),),
    ),
    "memory removal above what there is": Row(
        LESS_MEMORY, {"memorySize": 1 * GIB}, "refused", "TARGET_ABOVE_CURRENT", "has 256 MiB", "hot-plug path"
    ),
    "balloon under a guest's offline dimm": Row(
        LESS_MEMORY,
        {"memorySize": 100 * MIB},
        "refused",
        "BALLOON_BELOW_FLOOR",
        "needs the balloon to leave",
        "bring plugged memory online",
    ),
    # virtio-mem and balloon
    "virtio-mem in a guest that does not answer": Row(
        MEMORY,
        {"memorySize": 512 * MIB, "method": "virtio-mem", "timeoutSec": 1},
        "refused",
        "VIRTIO_MEM_STALLED",
        "ua-vm was set to 256 MiB, but after 1 s it is at 0 B",
        "virtio_mem driver",
        before=(VIRTIO_MEM,),
        guest={"virtio_mem_limit": 0},
    ),
    "balloon above the vm's memory": Row(
        MEMORY,
        {"memorySize": 512 * MIB, "method": "balloon"},
        "refused",
        "BALLOON_ABOVE_TOTAL",
        "has 256 MiB",
        '"method": "dimm"',
    ),
    "balloon that is not there": Row(
        MEMORY,
        {"memorySize": 256 * MIB, "method": "balloon"},
        "refused",
        "NO_BALLOON",
        "no memory balloon device",
        "memballoon",
        spec={"balloon": False},
    ),
    # both, and preparation
    "both, the second above its maximum": Row(
        BOTH, {"cpuNum": 9, **MORE_MEMORY}, "refused", "CPU_ABOVE_MAXIMUM", "9 vCPUs", "no more than the maximum"
    ),
    "preparation that libvirt does not take": Row(
        READY,
        {"prepare": True},
        "refused",
        "DEFINITION_REFUSED",
        "CPU topology doesn't match",
        "libvirt's error",
        spec=BARE_MEMORY,
        fails={
            "defineXMLFlags": qemu_error(67, "unsupported configuration: CPU topology doesn't match maximum vcpu count")
        },
    ),
    "preparation for less than there is": Row(
        READY,
        {"prepare": True, "maxMemorySize": 128 * MIB},
        "refused",
        "TARGET_BELOW_CURRENT",
        "has 256 MiB",
        "not below the VM's current size",
    ),
    "a vm that is not there": Row(
        CPU, {"cpuNum": 2, "vmUuid": "vm2"}, "refused", "VM_NOT_FOUND", "vm2", "virsh list --all"
    ),
}
# What the guest's agent says no to is no failure of the hypervisor's change: a warning, by the code.
WARNINGS = {
    "agent absent": ({"agent_channel": False}, {}, "GUEST_AGENT_ABSENT", "qemu-ga"),
    "agent stopped": ({}, {"agent": "stopped"}, "GUEST_AGENT_DISCONNECTED", "memhp_default_state=online"),
    "agent hung": ({}, {"agent": "hung"}, "GUEST_AGENT_UNRESPONSIVE", "memhp_default_state=online"),
    "agent blocks": ({}, {"refuses": frozenset({"guest-get-memory-blocks"})}, "GUEST_AGENT_REFUSED", "allow-rpcs"),
    "guest ignores": ({}, {"sees_nothing": True}, "GUEST_MEMORY_NOT_SEEN", "kernel log"),
}


@pytest.fixture
def fake(tmp_path: Path) -> Make:
    def make(row: Row) -> Node:
        spec = GuestSpec(name="vm1", **row.spec)
        domain = make_domain(spec, make_guest(spec, **row.guest), running=row.running, **row.domain)
        # As in the lab, where nothing has booted; a row that says something of the guest has one.
        domain.paused = row.running and not row.guest
        if row.domain.get("persistent", True) and domain.paused:
            domain.guest.unplugs = "not answering"
        node = make_node(tmp_path, domain, **row.host)
        for step in row.before:
            node.perform("vm1", step)
        domain.fail_next.update(row.fails)
        return node

    return make


@pytest.fixture
def lab_libvirt(lab: Any, define: Any, tmp_path: Path) -> Iterator[Make]:
    def make(row: Row) -> Node:
        define(GuestSpec(name="vm1", **row.spec), running=row.running)
        node = nodes.enter_context(open_node(lab.uri, tmp_path))
        for step in row.before:
            node.perform("vm1", step)
        return node

    with ExitStack() as nodes:
        yield make


CASES = [pytest.param("fake", name, id=f"fake-{name}") for name in ROWS] + [
    pytest.param("lab_libvirt", name, id=f"lab-{name}", marks=pytest.mark.guest)
    for name, row in ROWS.items()
    if not row.fake_only
]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_the_caller_is_told_what_is_wrong_and_what_to_do(where: str, name: str, request: pytest.FixtureRequest) -> None:
    row = ROWS[name]
    node = request.getfixturevalue(where)(row)
    reply = carry_out(node, row.command, **{"vmUuid": "vm1", **row.request})
    assert (reply["outcome"], reply["errorCode"]) == (row.outcome, row.code), reply["error"]
    assert reply["success"] is False
    assert row.message in reply["error"]
    assert row.remedy in reply["remedy"]
    if row.outcome == "refused" and reply["steps"] == [] and row.code != "VM_NOT_FOUND":
        assert reply["before"] == reply["after"]


@pytest.mark.parametrize("name", WARNINGS)
def test_a_guest_that_does_not_take_part_is_a_warning(name: str, fake: Make) -> None:
    spec, guest, code, remedy = WARNINGS[name]
    node = fake(Row(MEMORY, {}, "", "", "", "", spec=spec, guest=guest or {"agent": "running"}))
    reply = carry_out(node, MEMORY, vmUuid="vm1", timeoutSec=1, **MORE_MEMORY)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "plugged", 512 * MIB)
    (warning,) = [warning for warning in reply["warnings"] if warning["code"] == code]
    assert remedy in warning["remedy"]


def test_a_dimm_that_is_there_already_is_not_attached_again(fake: Make) -> None:
    row = Row(MEMORY, {}, "", "", "", "", before=(dimm(256, alias="ua-kvmagent-task-1-0"),), guest={"agent": "running"})
    reply = carry_out(fake(row), MEMORY, "task-1", vmUuid="vm1", **MORE_MEMORY)
    # The guest had left it offline, and uses it now.
    assert (reply["outcome"], [step["step"] for step in reply["steps"]]) == ("online", ["OnlineGuestMemory"])


def test_a_definition_that_cannot_be_saved_is_told_with_what_the_running_vm_has(fake: Make) -> None:
    row = Row(CPU, {}, "", "", "", "", guest={"agent": "running"}, fails={"save": NO_SPACE})
    reply = carry_out(fake(row), CPU, vmUuid="vm1", cpuNum=2)
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "partial", "LIBVIRT_REFUSED")
    assert "No space left on device" in reply["error"]
    assert (reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == (2, 1)
    assert [drift["field"] for drift in reply["drift"]] == ["cpuNum"]
