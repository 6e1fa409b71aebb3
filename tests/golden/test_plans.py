"""Golden plans: for each case the goal, the steps and what the caller is told, as a file to read and to review.

After a change that is meant: pytest tests/golden --update-golden, then read the diff.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt
import pytest
from lxml import etree

from kvmagent.hypervisor.domainxml import format_dimm, format_virtio_mem, parse_definition
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.model.units import format_ids, format_size
from tests.fakes.agent import MIB, FakeAgent, make_domain, make_guest
from tests.fakes.libvirt import FakeDomain, qemu_error
from tests.lab.domainxml import GuestSpec

PLANS = Path(__file__).parent / "plans"
#: Characters in a line of a golden file.
WIDTH = 120
GIB = 1024 * MIB


@dataclass
class Case:
    """One command on one VM; `arrange` changes the fake domain before it, `host` is what `make_host` takes."""

    command: str
    request: dict[str, Any]
    spec: dict[str, Any] = field(default_factory=dict)
    domain: dict[str, Any] = field(default_factory=dict)
    guest: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[FakeDomain], None] = lambda domain: None


def inflate_balloon(size_mib: int) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            root.find("currentMemory").text = str(size_mib * 1024)

    return arrange


def offline_cpu_1(domain: FakeDomain) -> None:
    domain.guest.online_cpus[1] = False


def migrate(domain: FakeDomain) -> None:
    domain.reason = libvirt.VIR_DOMAIN_RUNNING_MIGRATED


def pause(domain: FakeDomain) -> None:
    domain.paused = True


ODD_DIMM = (
    "<memory model='dimm'><target><size unit='MiB'>64</size><node>0</node></target><alias name='ua-odd'/></memory>"
)


def add_xml(path: str, xml: str) -> Callable[[FakeDomain], None]:
    """Put an element into both definitions."""

    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            if root is not None:
                root.find(path).append(etree.fromstring(xml))

    return arrange


def plug(*sizes_mib: int, model: str = "dimm", alias: str = "ua-old") -> Callable[[FakeDomain], None]:
    """Attach memory devices to both definitions, online in the guest."""

    def arrange(domain: FakeDomain) -> None:
        for n, size_mib in enumerate(sizes_mib):
            place = {"alias": f"{alias}-{n}", "node": 0}
            if model == "dimm":
                xml = format_dimm(size_bytes=size_mib * MIB, **place)
            else:
                sizes = {"size_bytes": 1 * GIB, "block_bytes": 2 * MIB, "requested_bytes": size_mib * MIB}
                xml = format_virtio_mem(**sizes, **place)
            domain.attachDeviceFlags(xml, 3)
        for block in domain.guest.blocks:
            domain.guest.blocks[block] = True
        domain.calls.clear()

    return arrange


def plug_vcpus(count: int) -> Callable[[FakeDomain], None]:
    """Plug vCPUs that can be removed again, online in the guest."""

    def arrange(domain: FakeDomain) -> None:
        domain.setVcpusFlags(count, 1)
        domain.setVcpusFlags(count, 2 | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)
        for number in domain.guest.online_cpus:
            domain.guest.online_cpus[number] = True
        domain.calls.clear()

    return arrange


def leave_out(vcpu: int) -> Callable[[FakeDomain], None]:
    """Remove one of the vCPUs, as `virsh setvcpu` does."""

    def arrange(domain: FakeDomain) -> None:
        domain.setVcpu(str(vcpu), 0, 1)
        domain.setVcpu(str(vcpu), 0, 2)
        domain.calls.clear()

    return arrange


def take_vcpus_of_node_1(domain: FakeDomain) -> None:
    """Leave a node of memory alone, the emptier one."""
    for root in (domain.live, domain.config):
        first, second = root.findall("cpu/numa/cell")
        first.set("cpus", "0-3")
        del second.attrib["cpus"]


def sleep(domain: FakeDomain) -> None:
    domain.unusual_state = libvirt.VIR_DOMAIN_PMSUSPENDED


def shut_down(domain: FakeDomain) -> None:
    domain.unusual_state = libvirt.VIR_DOMAIN_SHUTDOWN


def save(domain: FakeDomain) -> None:
    domain.saved = True


def back_up(domain: FakeDomain) -> None:
    domain.job = {"type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP}


def change_ids(domain: FakeDomain) -> None:
    """As many vCPUs live and persistent, but not the same ones."""
    plug_vcpus(3)(domain)
    domain.setVcpu("1", 0, 1)
    domain.setVcpu("2", 0, 2)
    domain.calls.clear()


def then(*arrangements: Callable[[FakeDomain], None]) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        for one in arrangements:
            one(domain)

    return arrange


def offline_plugged(domain: FakeDomain) -> None:
    for block in domain.guest.blocks:
        domain.guest.blocks[block] = block < 32


def fail(call: str, code: int, message: str) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        domain.fail_next[call] = qemu_error(code, message)

    return arrange


def fail_save(domain: FakeDomain) -> None:
    fail("save", 38, "Failed to create file 'vm1.xml.new': No space left on device")(domain)


def fail_vcpu(vcpu: int) -> Callable[[FakeDomain], None]:
    words = f"internal error: unable to execute QEMU command 'device_add': Duplicate device ID 'vcpu{vcpu}'"
    return fail(f"vcpu{vcpu}", 1, words)


def be_a(machine: str) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            if root is not None:
                root.find("./os/type").set("machine", machine)

    return arrange


MACHINE_OF = {"ppc64le": "pseries-7.2", "s390x": "s390-ccw-virtio-7.2", "aarch64": "virt-7.2"}


def be_of(arch: str) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            root.find("./os/type").set("arch", arch)
            root.find("./os/type").set("machine", MACHINE_OF.get(arch, "pc"))

    return arrange


def allow_vcpus(maximum: int) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            root.find("./cpu/topology").set("sockets", str(maximum))
            root.find("vcpu").text = str(maximum)

    return arrange


def own(attributes: str, where: str = "both") -> Callable[[FakeDomain], None]:
    """Put the owner's policy into a definition's metadata."""

    def arrange(domain: FakeDomain) -> None:
        xml = f"<metadata><policy xmlns='{POLICY_NAMESPACE}' {attributes}/></metadata>"
        for name, root in (("live", domain.live), ("config", domain.config)):
            if root is not None and where in ("both", name):
                root.append(etree.fromstring(xml))

    return arrange


HUGE_1G = "<memoryBacking><hugepages><page size='1' unit='GiB'/></hugepages></memoryBacking>"
SHARES = "<cputune><shares>1024</shares></cputune>"
WINDOWS = {"id": "mswindows", "pretty-name": "Windows Server 2022 Standard", "kernel-release": "20348"}
FREEBSD = {
    "id": "freebsd",
    "name": "FreeBSD",
    "kernel-release": "14.0-RELEASE",
    "kernel-version": "FreeBSD 14.0-RELEASE",
}
OLD_LINUX = {
    "id": "ubuntu",
    "pretty-name": "Ubuntu 20.04",
    "kernel-release": "5.4.0-42",
    "kernel-version": "#46-Ubuntu",
}
MIDDLE_LINUX = {"id": "debian", "pretty-name": "Debian 11", "kernel-release": "5.10.0-8", "kernel-version": "#1 SMP"}
NO_BLOCKS = frozenset({"guest-get-memory-blocks", "guest-get-memory-block-info"})
BARE = {
    "vcpus": 1,
    "max_vcpus": 1,
    "max_memory_mib": None,
    "numa_cells": 0,
    "acpi": False,
    "balloon": False,
    "agent_channel": False,
}
KVM = {"virt_type": "kvm"}
CPU, MEMORY, READY = "HotPlugCpu", "HotPlugMemory", "ReadyForHotplug"
BOTH, LESS_CPU, LESS_MEMORY = "HotPlugCpuMemory", "HotUnplugCpu", "HotUnplugMemory"
CASES = {
    "cpu-online": Case(CPU, {"cpuNum": 3}),
    "cpu-unchanged": Case(CPU, {"cpuNum": 1}),
    "cpu-live-only": Case(CPU, {"cpuNum": 2, "affect": "live"}),
    "cpu-config-only": Case(CPU, {"cpuNum": 2, "affect": "config"}),
    "cpu-off-config-only": Case(CPU, {"cpuNum": 2, "affect": "config"}, domain={"running": False}),
    "cpu-transient-live-only": Case(CPU, {"cpuNum": 2, "affect": "live"}, domain={"persistent": False}),
    "cpu-dry-run": Case(CPU, {"cpuNum": 3, "dryRun": True}),
    "cpu-owner-offline": Case(CPU, {"cpuNum": 3}, spec={"vcpus": 2}, arrange=offline_cpu_1),
    "cpu-agent-stopped": Case(CPU, {"cpuNum": 3}, guest={"agent": "stopped"}),
    "cpu-agent-hung": Case(CPU, {"cpuNum": 3}, guest={"agent": "hung"}),
    "cpu-agent-absent": Case(CPU, {"cpuNum": 3}, spec={"agent_channel": False}),
    "cpu-agent-blocks-get": Case(CPU, {"cpuNum": 3}, guest={"refuses": frozenset({"guest-get-vcpus"})}),
    "cpu-agent-blocks-set": Case(CPU, {"cpuNum": 3}, guest={"refuses": frozenset({"guest-set-vcpus"})}),
    "cpu-agent-one-at-a-time": Case(CPU, {"cpuNum": 4}, guest={"onlines": 1}),
    "cpu-guest-sees-nothing": Case(CPU, {"cpuNum": 2, "timeoutSec": 1}, guest={"sees_nothing": True}),
    "cpu-broken-in-guest": Case(CPU, {"cpuNum": 2}, guest={"broken_cpus": True}),
    "cpu-broken-in-guest-after-migration": Case(CPU, {"cpuNum": 2}, guest={"broken_cpus": True}, arrange=migrate),
    "cpu-broken-in-guest-after-migration-undone": Case(
        CPU, {"cpuNum": 3}, domain=KVM, guest={"broken_cpus": True}, arrange=migrate
    ),
    "cpu-silent-guest-after-migration": Case(CPU, {"cpuNum": 3}, guest={"agent": "stopped"}, arrange=migrate),
    "cpu-silent-guest-after-migration-one": Case(CPU, {"cpuNum": 2}, guest={"agent": "stopped"}, arrange=migrate),
    "cpu-online-after-migration": Case(CPU, {"cpuNum": 3}, arrange=migrate),
    "ready-after-migration": Case(READY, {}, arrange=migrate),
    "cpu-online-not-asked": Case(CPU, {"cpuNum": 2, "guestOnline": False}),
    "cpu-refused-suspended": Case(CPU, {"cpuNum": 2}, arrange=sleep),
    "cpu-config-only-suspended": Case(CPU, {"cpuNum": 2, "affect": "config"}, arrange=sleep),
    "less-cpu-refused-suspended": Case(LESS_CPU, {"cpuNum": 2}, domain=KVM, arrange=then(plug_vcpus(3), sleep)),
    "memory-suspended": Case(MEMORY, {"memorySize": 384 * MIB}, arrange=sleep),
    "cpu-refused-in-shutdown": Case(CPU, {"cpuNum": 2}, arrange=shut_down),
    "memory-refused-in-shutdown": Case(MEMORY, {"memorySize": 384 * MIB}, arrange=shut_down),
    "cpu-config-only-saved": Case(CPU, {"cpuNum": 2, "affect": "config"}, domain={"running": False}, arrange=save),
    "memory-config-only-saved": Case(
        MEMORY, {"memorySize": 384 * MIB, "affect": "config"}, domain={"running": False}, arrange=save
    ),
    "prepare-saved": Case(READY, {"prepare": True, "maxCpuNum": 8}, spec=BARE, domain={"running": False}, arrange=save),
    "cpu-frozen-filesystems": Case(CPU, {"cpuNum": 2}, guest={"frozen": True}),
    "memory-frozen-filesystems": Case(MEMORY, {"memorySize": 384 * MIB}, guest={"frozen": True}),
    "cpu-during-a-backup": Case(CPU, {"cpuNum": 2}, arrange=back_up),
    "memory-during-a-backup": Case(MEMORY, {"memorySize": 384 * MIB}, arrange=back_up),
    "ready-other-vcpus": Case(READY, {}, arrange=change_ids),
    "memory-refused-hard-limit-of-the-next-start": Case(
        MEMORY,
        {"memorySize": 384 * MIB},
        arrange=lambda domain: domain.config.append(
            etree.fromstring("<memtune><hard_limit unit='MiB'>300</hard_limit></memtune>")
        ),
    ),
    "cpu-paused": Case(CPU, {"cpuNum": 2}, arrange=pause),
    "cpu-half-plugged-undone": Case(CPU, {"cpuNum": 4}, domain=KVM, arrange=fail_vcpu(3)),
    "cpu-half-plugged-and-used-undone": Case(
        CPU, {"cpuNum": 4}, guest={"auto_online": True}, domain=KVM, arrange=fail_vcpu(3)
    ),
    "cpu-half-plugged-live-only-undone": Case(
        CPU, {"cpuNum": 4, "affect": "live"}, domain=KVM, arrange=then(plug_vcpus(2), fail_vcpu(3))
    ),
    "cpu-half-plugged-and-listed-late-undone": Case(
        CPU, {"cpuNum": 4}, guest={"late_cpus": 3}, domain=KVM, arrange=fail_vcpu(3)
    ),
    "cpu-half-plugged-emulated": Case(CPU, {"cpuNum": 4}, arrange=fail_vcpu(3)),
    "cpu-half-plugged-agent-stopped": Case(
        CPU, {"cpuNum": 4}, guest={"agent": "stopped"}, domain=KVM, arrange=fail_vcpu(3)
    ),
    "cpu-half-plugged-guest-sees-nothing": Case(
        CPU, {"cpuNum": 4, "timeoutSec": 1}, guest={"sees_nothing": True}, domain=KVM, arrange=fail_vcpu(3)
    ),
    "cpu-half-plugged-guest-keeps": Case(
        CPU, {"cpuNum": 4}, guest={"auto_online": True, "broken_cpus": True}, domain=KVM, arrange=fail_vcpu(3)
    ),
    "cpu-half-plugged-guest-cannot": Case(
        CPU,
        {"cpuNum": 4},
        guest={"auto_online": True, "fixed_cpus": frozenset({0, 2})},
        domain=KVM,
        arrange=fail_vcpu(3),
    ),
    "cpu-half-plugged-removal-pending": Case(
        CPU, {"cpuNum": 4, "timeoutSec": 1}, guest={"unplugs": "not answering"}, domain=KVM, arrange=fail_vcpu(3)
    ),
    "cpu-half-plugged-between-others": Case(
        CPU, {"cpuNum": 4}, domain=KVM, arrange=then(plug_vcpus(3), leave_out(1), fail_vcpu(3))
    ),
    "cpu-not-saved-undone": Case(CPU, {"cpuNum": 3}, domain=KVM, arrange=fail_save),
    "cpu-not-saved-emulated": Case(CPU, {"cpuNum": 3}, arrange=fail_save),
    "cpu-not-saved-config-only-undone": Case(CPU, {"cpuNum": 3, "affect": "config"}, arrange=fail_save),
    "cpu-refused-maximum": Case(CPU, {"cpuNum": 5}),
    "cpu-refused-below": Case(CPU, {"cpuNum": 1}, spec={"vcpus": 2}),
    "cpu-refused-off": Case(CPU, {"cpuNum": 2}, domain={"running": False}),
    "cpu-refused-transient": Case(CPU, {"cpuNum": 2}, domain={"persistent": False}),
    "cpu-refused-no-acpi": Case(CPU, {"cpuNum": 2}, spec={"acpi": False}),
    "cpu-as-expected": Case(CPU, {"cpuNum": 2, "expectedCpuNum": 1}),
    "cpu-refused-not-as-expected": Case(CPU, {"cpuNum": 2, "expectedCpuNum": 2}),
    "memory-as-expected": Case(MEMORY, {"memorySize": 384 * MIB, "expectedMemorySize": 256 * MIB}),
    "memory-refused-not-as-expected": Case(MEMORY, {"memorySize": 384 * MIB, "expectedMemorySize": 128 * MIB}),
    "cpumem-refused-not-as-expected": Case(
        BOTH, {"cpuNum": 2, "memorySize": 512 * MIB, "expectedCpuNum": 2, "expectedMemorySize": 256 * MIB}
    ),
    "less-cpu-refused-not-as-expected": Case(
        LESS_CPU, {"cpuNum": 1, "affect": "config", "expectedCpuNum": 1}, arrange=plug_vcpus(3)
    ),
    "less-memory-refused-not-as-expected": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB, "expectedMemorySize": 256 * MIB}, arrange=plug(128)
    ),
    "ready-not-as-expected": Case(READY, {"expectedCpuNum": 2, "expectedMemorySize": 512 * MIB}),
    "cpu-refused-opted-out": Case(CPU, {"cpuNum": 2}, arrange=own("hotplug='off' maxCpuNum='3'")),
    "cpu-refused-opted-out-of-the-next-start": Case(CPU, {"cpuNum": 2}, arrange=own("hotplug='off'", "config")),
    "cpu-live-only-where-the-next-start-is-opted-out": Case(
        CPU, {"cpuNum": 2, "affect": "live"}, arrange=own("hotplug='off'", "config")
    ),
    "cpu-refused-opted-out-by-mistake": Case(CPU, {"cpuNum": 2}, arrange=own("hotplug='of'")),
    "cpu-refused-above-policy": Case(CPU, {"cpuNum": 3}, arrange=own("maxCpuNum='2' maxMemorySize='268435456'")),
    "cpu-up-to-policy": Case(CPU, {"cpuNum": 2}, arrange=own("maxCpuNum='2'")),
    "cpu-above-policy-already": Case(CPU, {"cpuNum": 2}, spec={"vcpus": 2}, arrange=own("maxCpuNum='1'")),
    "cpu-online-not-allowed": Case(CPU, {"cpuNum": 2}, arrange=own("guestOnline='off'")),
    "cpu-online-not-allowed-by-mistake": Case(CPU, {"cpuNum": 2}, arrange=own("guestOnline='maybe'")),
    "memory-refused-opted-out": Case(MEMORY, {"memorySize": 512 * MIB}, arrange=own("hotplug='off'")),
    "memory-refused-above-policy": Case(
        MEMORY, {"memorySize": 512 * MIB}, arrange=own(f"maxMemorySize='{384 * MIB}'", "config")
    ),
    "memory-refused-above-policy-by-rounding": Case(
        MEMORY, {"memorySize": 300 * MIB}, arrange=own(f"maxMemorySize='{300 * MIB}'")
    ),
    "memory-refused-above-policy-by-virtio-mem": Case(
        MEMORY,
        {"memorySize": 512 * MIB, "method": "virtio-mem"},
        arrange=own(f"maxMemorySize='{384 * MIB}'"),
    ),
    "memory-refused-above-policy-by-balloon": Case(
        MEMORY,
        {"memorySize": 256 * MIB, "method": "balloon"},
        arrange=then(inflate_balloon(200), own(f"maxMemorySize='{220 * MIB}'")),
    ),
    "memory-up-to-policy": Case(MEMORY, {"memorySize": 512 * MIB}, arrange=own(f"maxMemorySize='{512 * MIB}'")),
    "memory-online-not-allowed": Case(MEMORY, {"memorySize": 384 * MIB}, arrange=own("guestOnline='off'")),
    "cpumem-refused-above-policy": Case(BOTH, {"cpuNum": 3, "memorySize": 512 * MIB}, arrange=own("maxCpuNum='2'")),
    "less-cpu-refused-opted-out": Case(
        LESS_CPU, {"cpuNum": 1}, domain=KVM, arrange=then(plug_vcpus(3), own("hotplug='off'"))
    ),
    "less-cpu-above-policy": Case(
        LESS_CPU, {"cpuNum": 2}, domain=KVM, arrange=then(plug_vcpus(3), own("maxCpuNum='1'"))
    ),
    "less-memory-refused-opted-out": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, arrange=then(plug(128), own("hotplug='off'"))
    ),
    "prepare-refused-opted-out": Case(READY, {"prepare": True}, arrange=own("hotplug='off'")),
    "prepare-clamped-by-policy": Case(
        READY,
        {"prepare": True, "maxCpuNum": 8, "maxMemorySize": 16 * GIB},
        arrange=own(f"maxCpuNum='6' maxMemorySize='{8 * GIB}'"),
    ),
    "ready-not-opted-out": Case(READY, {}, arrange=own("hotplug='off'")),
    "ready-not-above-policy": Case(READY, {}, arrange=own(f"maxCpuNum='1' maxMemorySize='{256 * MIB}'")),
    "ready-limited-by-policy": Case(READY, {}, arrange=own(f"maxCpuNum='2' maxMemorySize='{512 * MIB}'")),
    "cpu-shares-follow": Case(CPU, {"cpuNum": 3, "scaleShares": True}, arrange=add_xml(".", SHARES)),
    "cpu-shares-not-asked": Case(CPU, {"cpuNum": 3}, arrange=add_xml(".", SHARES)),
    "cpu-shares-not-set": Case(CPU, {"cpuNum": 3, "scaleShares": True}),
    "cpu-shares-refused": Case(
        CPU,
        {"cpuNum": 3, "scaleShares": True},
        arrange=then(
            add_xml(".", SHARES),
            fail(
                "setSchedulerParametersFlags",
                84,
                "Operation not supported: CPU tuning is not available in session mode",
            ),
        ),
    ),
    "less-cpu-shares-follow": Case(
        LESS_CPU, {"cpuNum": 1, "scaleShares": True}, domain=KVM, arrange=then(add_xml(".", SHARES), plug_vcpus(3))
    ),
    "cpumem-shares-follow": Case(
        BOTH, {"cpuNum": 2, "memorySize": 512 * MIB, "scaleShares": True}, arrange=add_xml(".", SHARES)
    ),
    "memory-dimm-online": Case(MEMORY, {"memorySize": 512 * MIB, "method": "dimm"}),
    "memory-dimm-auto-onlined-by-guest": Case(MEMORY, {"memorySize": 512 * MIB}, guest={"auto_online": True}),
    "memory-dimm-rounded": Case(MEMORY, {"memorySize": 300 * MIB}),
    "memory-dimm-several": Case(MEMORY, {"memorySize": 768 * MIB, "dimmSize": 256 * MIB}),
    "memory-dimm-emptiest-node": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"numa_cells": 2, "memory_mib": 257}),
    "memory-dimms-in-balance": Case(
        MEMORY, {"memorySize": 640 * MIB, "dimmSize": 128 * MIB}, spec={"numa_cells": 2, "memory_mib": 257}
    ),
    "memory-dimm-not-on-a-node-without-vcpus": Case(
        MEMORY, {"memorySize": 384 * MIB}, spec={"numa_cells": 2, "memory_mib": 257}, arrange=take_vcpus_of_node_1
    ),
    "memory-dimm-node": Case(MEMORY, {"memorySize": 384 * MIB, "node": 1}, spec={"numa_cells": 2}),
    "memory-dimm-config-only": Case(MEMORY, {"memorySize": 384 * MIB, "affect": "config"}),
    "memory-dimm-live-only": Case(MEMORY, {"memorySize": 384 * MIB, "affect": "live"}),
    "memory-dimm-agent-stopped": Case(MEMORY, {"memorySize": 384 * MIB}, guest={"agent": "stopped"}),
    "memory-dimm-agent-hung": Case(MEMORY, {"memorySize": 384 * MIB}, guest={"agent": "hung"}),
    "memory-dimm-online-not-asked": Case(MEMORY, {"memorySize": 384 * MIB, "guestOnline": False}),
    "memory-dimm-guest-sees-nothing": Case(
        MEMORY, {"memorySize": 384 * MIB, "timeoutSec": 1}, guest={"sees_nothing": True}
    ),
    "memory-dimm-large-blocks": Case(MEMORY, {"memorySize": 900 * MIB}, guest={"block_bytes": 256 * MIB}),
    "memory-movable-beyond-three-times-boot-memory": Case(MEMORY, {"memorySize": 1152 * MIB}),
    "memory-unchanged": Case(MEMORY, {"memorySize": 256 * MIB}),
    "memory-balloon": Case(MEMORY, {"memorySize": 256 * MIB, "method": "balloon"}, arrange=inflate_balloon(200)),
    "memory-balloon-no-driver": Case(
        MEMORY,
        {"memorySize": 256 * MIB, "method": "balloon", "timeoutSec": 1},
        guest={"balloon_driver": False},
        arrange=inflate_balloon(200),
    ),
    "memory-auto-balloon-then-dimm": Case(MEMORY, {"memorySize": 512 * MIB}, arrange=inflate_balloon(200)),
    "memory-auto-dead-balloon-then-dimm": Case(
        MEMORY,
        {"memorySize": 512 * MIB, "timeoutSec": 1},
        guest={"balloon_driver": False},
        arrange=inflate_balloon(200),
    ),
    "memory-auto-within-balloon": Case(MEMORY, {"memorySize": 220 * MIB}, arrange=inflate_balloon(200)),
    "memory-refused-strict": Case(MEMORY, {"memorySize": 300 * MIB, "strict": True}),
    "memory-refused-dimm-size": Case(MEMORY, {"memorySize": 512 * MIB, "dimmSize": 100 * MIB}),
    "memory-refused-maximum": Case(MEMORY, {"memorySize": 5 * GIB}),
    "memory-refused-slots": Case(MEMORY, {"memorySize": 1 * GIB, "dimmSize": 128 * MIB}, spec={"slots": 4}),
    "memory-refused-node": Case(MEMORY, {"memorySize": 384 * MIB, "node": 5}),
    "memory-refused-no-max-memory": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"max_memory_mib": None}),
    "memory-refused-no-numa": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"numa_cells": 0, "max_memory_mib": None}),
    "memory-refused-no-acpi": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"acpi": False}),
    "memory-refused-no-balloon": Case(MEMORY, {"memorySize": 256 * MIB, "method": "balloon"}, spec={"balloon": False}),
    "memory-refused-balloon-above": Case(MEMORY, {"memorySize": 512 * MIB, "method": "balloon"}),
    "memory-refused-off": Case(MEMORY, {"memorySize": 384 * MIB}, domain={"running": False}),
    "memory-refused-transient": Case(MEMORY, {"memorySize": 384 * MIB}, domain={"persistent": False}),
    "memory-refused-misaligned-dimm": Case(MEMORY, {"memorySize": 512 * MIB}, spec={"devices_xml": ODD_DIMM}),
    "memory-refused-below": Case(MEMORY, {"memorySize": 128 * MIB}),
    "memory-refused-host": Case(MEMORY, {"memorySize": 1 * GIB}, host={"available_mib": 512}),
    "cpu-power-needs-no-acpi": Case(CPU, {"cpuNum": 2}, spec={"acpi": False}, arrange=be_of("ppc64le")),
    "cpu-refused-i686": Case(CPU, {"cpuNum": 2}, arrange=be_of("i686")),
    "cpu-refused-machine": Case(CPU, {"cpuNum": 2}, arrange=be_a("microvm")),
    "cpu-refused-host-limit": Case(CPU, {"cpuNum": 2}, arrange=allow_vcpus(300)),
    "memory-refused-machine": Case(MEMORY, {"memorySize": 512 * MIB}, arrange=be_a("microvm")),
    "memory-refused-encrypted": Case(
        MEMORY, {"memorySize": 512 * MIB}, arrange=add_xml(".", "<launchSecurity type='sev'/>")
    ),
    "memory-refused-hard-limit": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        arrange=add_xml(".", "<memtune><hard_limit unit='KiB'>400000</hard_limit></memtune>"),
    ),
    "memory-refused-vfio-limit": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        arrange=then(
            add_xml(".", "<memtune><hard_limit unit='KiB'>1048576</hard_limit></memtune>"),
            add_xml("./devices", "<hostdev mode='subsystem' type='pci'/>"),
        ),
    ),
    "cpu-refused-part-of-a-core": Case(
        CPU, {"cpuNum": 3}, spec={"vcpus": 2, "max_vcpus": 8, "topology": (2, 2, 2)}, arrange=be_of("ppc64le")
    ),
    "memory-refused-virtio-mem-locked": Case(
        MEMORY,
        {"memorySize": 512 * MIB, "method": "virtio-mem"},
        arrange=add_xml(".", "<memoryBacking><locked/></memoryBacking>"),
    ),
    "memory-refused-lock-limit": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        host={"memlock_mib": 1024, "uri": "qemu:///session"},
        arrange=add_xml("./devices", "<hostdev mode='subsystem' type='pci'/>"),
    ),
    "memory-lock-limit-that-libvirt-raises": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        host={"memlock_mib": 1024},
        arrange=add_xml("./devices", "<hostdev mode='subsystem' type='pci'/>"),
    ),
    "memory-refused-hugepages": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        host={"free_hugepages": 100},
        arrange=add_xml(".", "<memoryBacking><hugepages/></memoryBacking>"),
    ),
    "memory-hugepages": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        host={"free_hugepages": 128},
        arrange=add_xml(".", "<memoryBacking><hugepages/></memoryBacking>"),
    ),
    "memory-hugepages-of-1g-rounded": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        host={"free_hugepages": 1, "hugepage_mib": 1024},
        arrange=add_xml(".", HUGE_1G),
    ),
    "memory-hugepages-of-1g-virtio-mem": Case(
        MEMORY,
        {"memorySize": 512 * MIB, "method": "virtio-mem"},
        host={"free_hugepages": 1, "hugepage_mib": 1024},
        arrange=add_xml(".", HUGE_1G),
    ),
    "memory-hugepages-of-another-node": Case(
        MEMORY,
        {"memorySize": 512 * MIB, "node": 1},
        spec={"numa_cells": 2},
        arrange=add_xml(
            ".",
            "<memoryBacking><hugepages><page size='1' unit='GiB' nodeset='0'/></hugepages></memoryBacking>",
        ),
    ),
    "memory-refused-hugepages-of-node": Case(
        MEMORY,
        {"memorySize": 512 * MIB, "node": 1},
        spec={"numa_cells": 2},
        host={"free_hugepages": 100},
        arrange=add_xml(
            ".",
            "<memoryBacking><hugepages><page size='2' unit='MiB' nodeset='1'/></hugepages></memoryBacking>",
        ),
    ),
    "memory-refused-host-node-of-guest-node": Case(
        MEMORY,
        {"memorySize": 1 * GIB, "node": 1},
        spec={"numa_cells": 2},
        host={"node_free_mib": 300},
        arrange=add_xml(".", "<numatune><memnode cellid='1' mode='strict' nodeset='0'/></numatune>"),
    ),
    "memory-refused-host-node": Case(
        MEMORY,
        {"memorySize": 1 * GIB},
        host={"node_free_mib": 300},
        arrange=add_xml(".", "<numatune><memory mode='strict' nodeset='0'/></numatune>"),
    ),
    "memory-refused-guest-short": Case(MEMORY, {"memorySize": 512 * MIB}, guest={"available_bytes": 33 * MIB}),
    "memory-refused-guest-short-offline": Case(
        MEMORY, {"memorySize": 1 * GIB, "guestOnline": False}, guest={"available_bytes": 40 * MIB}
    ),
    "memory-small-guest-in-steps": Case(MEMORY, {"memorySize": 2 * GIB}, guest={"available_bytes": 40 * MIB}),
    "memory-small-guest-stays-offline": Case(
        MEMORY,
        {"memorySize": 2 * GIB},
        guest={"available_bytes": 40 * MIB, "refuses": frozenset({"guest-set-memory-blocks"})},
    ),
    "memory-virtio-mem-attach": Case(MEMORY, {"memorySize": 400 * MIB, "method": "virtio-mem"}),
    "memory-virtio-mem-listed-late": Case(
        MEMORY, {"memorySize": 400 * MIB, "method": "virtio-mem"}, guest={"late_blocks": 2}
    ),
    "memory-virtio-mem-grow": Case(MEMORY, {"memorySize": 640 * MIB}, arrange=plug(128, model="virtio-mem")),
    "memory-virtio-mem-then-dimm": Case(
        MEMORY, {"memorySize": 256 * MIB + 1152 * MIB}, arrange=plug(512, model="virtio-mem")
    ),
    "memory-virtio-mem-stalls": Case(
        MEMORY,
        {"memorySize": 640 * MIB, "method": "virtio-mem", "timeoutSec": 1},
        guest={"virtio_mem_limit": 256 * MIB},
        arrange=plug(128, model="virtio-mem"),
    ),
    "memory-back-online-after-reboot": Case(
        MEMORY, {"memorySize": 512 * MIB}, arrange=then(plug(256), offline_plugged)
    ),
    "memory-back-online-not-asked": Case(
        MEMORY, {"memorySize": 512 * MIB, "guestOnline": False}, arrange=then(plug(256), offline_plugged)
    ),
    "memory-back-online-refused-by-guest": Case(
        MEMORY,
        {"memorySize": 512 * MIB},
        guest={"refuses": frozenset({"guest-set-memory-blocks"})},
        arrange=then(plug(256), offline_plugged),
    ),
    "memory-windows": Case(MEMORY, {"memorySize": 512 * MIB}, guest={"os": WINDOWS, "refuses": NO_BLOCKS}),
    "memory-refused-freebsd": Case(MEMORY, {"memorySize": 512 * MIB}, guest={"os": FREEBSD, "refuses": NO_BLOCKS}),
    "memory-refused-virtio-mem-old-linux": Case(
        MEMORY, {"memorySize": 512 * MIB, "method": "virtio-mem"}, guest={"os": OLD_LINUX}
    ),
    "memory-auto-old-linux-by-dimm": Case(
        MEMORY, {"memorySize": 640 * MIB}, guest={"os": OLD_LINUX}, arrange=plug(128, model="virtio-mem")
    ),
    "memory-virtio-mem-not-advised": Case(
        MEMORY, {"memorySize": 512 * MIB, "method": "virtio-mem"}, guest={"os": MIDDLE_LINUX}
    ),
    "less-cpu-refused-windows": Case(LESS_CPU, {"cpuNum": 1}, guest={"os": WINDOWS}, domain=KVM, arrange=plug_vcpus(3)),
    "less-memory-refused-windows": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, guest={"os": WINDOWS}, arrange=plug(128)
    ),
    "ready-windows": Case(READY, {}, guest={"os": WINDOWS}),
    "ready-not-freebsd": Case(READY, {}, guest={"os": FREEBSD}),
    "ready-old-linux": Case(READY, {}, guest={"os": OLD_LINUX}),
    "ready-unknown-os": Case(READY, {}, guest={"os": {}}),
    "cpumem-online": Case(BOTH, {"cpuNum": 2, "memorySize": 512 * MIB}),
    "cpumem-unchanged": Case(BOTH, {"cpuNum": 1, "memorySize": 256 * MIB}),
    "zstack-cpumem-online": Case(
        "OnlineChangeCpuMem",
        {
            "cpuNum": 2,
            "memorySize": 512 * MIB,
            "expectedCpuNum": 1,
            "expectedMemorySize": 256 * MIB,
            "scaleShares": True,
            "threadContext": {"api": "a1"},
            "threadContextStack": ["t1"],
            "kvmHostAddons": None,
        },
    ),
    "zstack-cpumem-refused-without-numbers": Case("OnlineChangeCpuMem", {}),
    "zstack-cpumem-refused-cpu-maximum": Case("OnlineChangeCpuMem", {"cpuNum": 5, "memorySize": 512 * MIB}),
    "cpumem-refused-cpu-maximum": Case(BOTH, {"cpuNum": 5, "memorySize": 512 * MIB}),
    "cpumem-second-fails-first-undone": Case(
        BOTH,
        {"cpuNum": 2, "memorySize": 512 * MIB},
        arrange=then(inflate_balloon(200), fail("setVcpusFlags", 1, "internal error: Duplicate device ID 'vcpu1'")),
    ),
    "cpumem-second-fails-guest-keeps-first": Case(
        BOTH,
        {"cpuNum": 2, "memorySize": 512 * MIB},
        guest={"pinned": frozenset({33})},
        arrange=fail("setVcpusFlags", 1, "internal error: Duplicate device ID 'vcpu1'"),
    ),
    "cpumem-half-plugged-undone": Case(
        BOTH, {"cpuNum": 4, "memorySize": 512 * MIB}, domain=KVM, guest={"auto_online": True}, arrange=fail_vcpu(3)
    ),
    "cpumem-half-plugged-agent-blocks": Case(
        BOTH,
        {"cpuNum": 4, "memorySize": 512 * MIB},
        domain=KVM,
        guest={"refuses": frozenset({"guest-get-vcpus"})},
        arrange=fail_vcpu(3),
    ),
    "cpumem-memory-fails": Case(
        BOTH,
        {"cpuNum": 2, "memorySize": 512 * MIB},
        arrange=fail("attachDeviceFlags", 1, "internal error: unable to execute QEMU command 'object-add'"),
    ),
    "less-cpu-kvm": Case(LESS_CPU, {"cpuNum": 1}, domain=KVM, arrange=plug_vcpus(3)),
    "less-cpu-config-only": Case(LESS_CPU, {"cpuNum": 1, "affect": "config"}, arrange=plug_vcpus(3)),
    "less-cpu-unchanged": Case(LESS_CPU, {"cpuNum": 1}),
    "less-cpu-dry-run": Case(LESS_CPU, {"cpuNum": 1, "dryRun": True}, domain=KVM, arrange=plug_vcpus(3)),
    "less-cpu-pending": Case(
        LESS_CPU,
        {"cpuNum": 1, "timeoutSec": 1, "lateCallback": True},
        guest={"unplugs": "not answering"},
        domain=KVM,
        arrange=plug_vcpus(3),
    ),
    "less-cpu-refused-emulated": Case(LESS_CPU, {"cpuNum": 1}, arrange=plug_vcpus(3)),
    "less-cpu-refused-machine": Case(LESS_CPU, {"cpuNum": 1}, spec={"vcpus": 2}, domain=KVM, arrange=be_of("s390x")),
    "less-cpu-refused-part-of-a-core": Case(
        LESS_CPU,
        {"cpuNum": 3},
        spec={"vcpus": 2, "max_vcpus": 8, "topology": (2, 2, 2)},
        domain=KVM,
        arrange=then(plug_vcpus(6), be_of("ppc64le")),
    ),
    "less-cpu-refused-part-of-a-core-config-only": Case(
        LESS_CPU,
        {"cpuNum": 3, "affect": "config"},
        spec={"vcpus": 2, "max_vcpus": 8, "topology": (2, 2, 2)},
        arrange=then(plug_vcpus(6), be_of("ppc64le")),
    ),
    "less-cpu-refused-fixed": Case(LESS_CPU, {"cpuNum": 1}, spec={"vcpus": 2}, domain=KVM, arrange=plug_vcpus(3)),
    "less-cpu-refused-in-use": Case(
        LESS_CPU, {"cpuNum": 1}, guest={"fixed_cpus": frozenset({0, 2})}, domain=KVM, arrange=plug_vcpus(3)
    ),
    "less-cpu-refused-above": Case(LESS_CPU, {"cpuNum": 3}),
    "less-cpu-refused-off": Case(LESS_CPU, {"cpuNum": 1}, domain={"running": False}),
    "less-cpu-refused-transient": Case(LESS_CPU, {"cpuNum": 1}, domain={"persistent": False}),
    "less-memory-exact-fit": Case(LESS_MEMORY, {"memorySize": 512 * MIB}, arrange=plug(128, 256, 512)),
    "less-memory-not-exact": Case(LESS_MEMORY, {"memorySize": 300 * MIB}, arrange=plug(128, 256)),
    "less-memory-virtio-mem": Case(LESS_MEMORY, {"memorySize": 384 * MIB}, arrange=plug(512, model="virtio-mem")),
    "less-memory-dimm-and-virtio-mem-exactly": Case(
        LESS_MEMORY,
        {"memorySize": 424 * MIB},
        arrange=then(plug(256), plug(512, model="virtio-mem", alias="ua-vm")),
    ),
    "less-memory-dimm-then-balloon": Case(LESS_MEMORY, {"memorySize": 200 * MIB}, arrange=plug(128)),
    "less-memory-config-only": Case(LESS_MEMORY, {"memorySize": 256 * MIB, "affect": "config"}, arrange=plug(128)),
    "less-memory-live-only": Case(LESS_MEMORY, {"memorySize": 256 * MIB, "affect": "live"}, arrange=plug(128)),
    "less-memory-agent-stopped": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, guest={"agent": "stopped"}, arrange=plug(128)
    ),
    "less-memory-guest-keeps-blocks": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, guest={"pinned": frozenset({33})}, arrange=plug(256)
    ),
    "less-memory-guest-refuses": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, guest={"unplugs": "refuses"}, arrange=plug(128)
    ),
    "less-memory-pending": Case(
        LESS_MEMORY,
        {"memorySize": 256 * MIB, "timeoutSec": 1, "lateCallback": True},
        guest={"unplugs": "not answering"},
        arrange=plug(128),
    ),
    "less-memory-unchanged": Case(LESS_MEMORY, {"memorySize": 256 * MIB}),
    "less-memory-refused-in-use": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, guest={"fixed": frozenset({32})}, arrange=plug(128)
    ),
    "less-memory-refused-guest-short": Case(
        LESS_MEMORY, {"memorySize": 256 * MIB}, guest={"available_bytes": 100 * MIB}, arrange=plug(128)
    ),
    "less-memory-refused-none-fits": Case(LESS_MEMORY, {"memorySize": 400 * MIB}, arrange=plug(256)),
    "less-memory-refused-floor": Case(LESS_MEMORY, {"memorySize": 100 * MIB}),
    "less-memory-refused-floor-offline": Case(
        LESS_MEMORY,
        {"memorySize": 200 * MIB},
        guest={"agent": "stopped", "unplugs": "refuses"},
        arrange=then(plug(128, alias="ua-a"), offline_plugged),
    ),
    "less-memory-refused-no-balloon": Case(LESS_MEMORY, {"memorySize": 200 * MIB}, spec={"balloon": False}),
    "less-memory-refused-above": Case(LESS_MEMORY, {"memorySize": 1 * GIB}),
    "less-memory-refused-off": Case(LESS_MEMORY, {"memorySize": 128 * MIB}, domain={"running": False}),
    "less-memory-refused-transient": Case(LESS_MEMORY, {"memorySize": 128 * MIB}, domain={"persistent": False}),
    "prepare-bare-vm": Case(READY, {"prepare": True, "maxCpuNum": 8, "maxMemorySize": 16 * GIB}, spec=BARE),
    "prepare-defaults": Case(READY, {"prepare": True}, spec=BARE),
    "prepare-virtio-mem": Case(
        READY, {"prepare": True, "memoryDevice": "virtio-mem", "slots": 16}, spec={"numa_cells": 2}
    ),
    "prepare-virtio-mem-unknown-system": Case(READY, {"prepare": True, "memoryDevice": "virtio-mem"}, guest={"os": {}}),
    "prepare-virtio-mem-windows": Case(READY, {"prepare": True, "memoryDevice": "virtio-mem"}, guest={"os": WINDOWS}),
    "prepare-refused-virtio-mem-locked": Case(
        READY,
        {"prepare": True, "memoryDevice": "virtio-mem"},
        arrange=add_xml(".", "<memoryBacking><locked/></memoryBacking>"),
    ),
    "prepare-refused-virtio-mem-old-linux": Case(
        READY, {"prepare": True, "memoryDevice": "virtio-mem"}, guest={"os": OLD_LINUX}
    ),
    "prepare-free-page-reporting": Case(READY, {"prepare": True, "freePageReporting": True}),
    "memory-refused-host-promised": Case(
        MEMORY, {"memorySize": 8 * GIB}, spec={"max_memory_mib": 16384}, host={"total_mib": 4096}
    ),
    "memory-refused-cgroup-limit": Case(MEMORY, {"memorySize": 2 * GIB}, host={"vm_limit_mib": 1024}),
    "cpu-refused-host-promised": Case(CPU, {"cpuNum": 4}, host={"total_mib": 340}),
    "cpu-refused-cgroup-limit": Case(CPU, {"cpuNum": 4}, host={"vm_limit_mib": 340}),
    "prepare-dry-run": Case(READY, {"prepare": True, "maxCpuNum": 8, "dryRun": True}, spec=BARE),
    "prepare-off": Case(READY, {"prepare": True, "maxCpuNum": 8}, spec=BARE, domain={"running": False}),
    "prepare-unchanged": Case(READY, {"prepare": True, "maxCpuNum": 4, "maxMemorySize": 4 * GIB}),
    "prepare-grows-sockets-and-cells": Case(
        READY,
        {"prepare": True, "maxCpuNum": 14, "slots": 32},
        spec={"vcpus": 2, "max_vcpus": 8, "topology": (2, 2, 2), "numa_cells": 2},
    ),
    "prepare-clamped": Case(READY, {"prepare": True, "maxCpuNum": 1000, "maxMemorySize": 32 * 1024 * GIB}, spec=BARE),
    "prepare-refused-libvirt": Case(
        READY,
        {"prepare": True},
        spec=BARE,
        arrange=fail("defineXMLFlags", 67, "unsupported configuration: QEMU does not like it"),
    ),
    "prepare-refused-transient": Case(READY, {"prepare": True}, domain={"persistent": False}),
    "prepare-refused-machine": Case(READY, {"prepare": True}, arrange=be_a("microvm")),
    "prepare-refused-below": Case(READY, {"prepare": True, "maxCpuNum": 1}, spec={"vcpus": 2}),
    "ready-not-set-commands": Case(READY, {}, guest={"refuses": frozenset({"guest-set-memory-blocks"})}),
    "ready": Case(READY, {}),
    "ready-plugged-offline": Case(READY, {}, arrange=then(plug(128, alias="ua-a"), offline_plugged)),
    "ready-for-totals": Case(READY, {"cpuNum": 4, "memorySize": 1 * GIB}),
    "ready-not-bare-vm": Case(
        READY,
        {},
        spec={
            "vcpus": 1,
            "max_vcpus": 1,
            "max_memory_mib": None,
            "numa_cells": 0,
            "acpi": False,
            "balloon": False,
            "agent_channel": False,
        },
    ),
    "ready-not-off": Case(READY, {}, domain={"running": False}),
    "ready-not-agent-blocks": Case(READY, {}, guest={"refuses": frozenset({"guest-get-memory-blocks"})}),
}


def make_case(name: str) -> FakeDomain:
    """The VM of a case, as it is before the command."""
    case = CASES[name]
    spec = GuestSpec(name="vm1", **case.spec)
    domain = make_domain(spec, make_guest(spec, **case.guest), **case.domain)
    case.arrange(domain)
    return domain


@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_golden_one(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case, domain = CASES[name], make_case(name)
    before, vm = xml_of(domain), summarize(domain, case)
    agent = FakeAgent(tmp_path, domain, **case.host)
    done = agent.run(case.command, vmUuid="vm1", **case.request)
    agent.stop()
    told = {name: value for name, value in done.reply.items() if name not in ("before", "vmUuid")}
    for timed in told["steps"] + told["stages"]:
        timed.pop("elapsedMs", None)
    seen = {
        "vm": vm,
        "request": case.request,
        "goal": done.goal,
        "libvirtCalls": domain.calls,
        "reply": told,
    }
    if done.reply["outcome"] in ("refused", "unchanged", "planned"):
        if done.reply["details"].get("undone"):  # libvirt lists single vCPUs from then on, the same ones
            assert [parse_definition(xml) for xml in xml_of(domain) if xml] == [
                parse_definition(xml) for xml in before if xml
            ]
        else:
            assert xml_of(domain) == before
        assert not domain.calls or done.goal
    golden, text = PLANS / f"{name}.json", render(shorten(seen)) + "\n"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def summarize(domain: FakeDomain, case: Case) -> dict[str, Any]:
    """The VM before the command as a reviewer reads it: a line for each definition and each memory device."""
    running, persistent = xml_of(domain)
    told = {}
    if domain.live is not None:
        told["running"] = describe(running)
    if persistent:
        told["persistent"] = describe(persistent)
    if told.get("running") == told.get("persistent"):
        told = {"both": told["running"]}
    return told | {name: sorted(it) if isinstance(it, frozenset) else it for name, it in case.guest.items()}


def describe(xml: str) -> list[str]:
    """A line for the definition and one for each of its memory devices."""
    vm = parse_definition(xml)
    most = "" if vm.max_memory_bytes is None else f" of {format_size(vm.max_memory_bytes)}"
    return [
        f"{vm.hypervisor} {vm.machine}, {vm.vcpu_current} of {vm.vcpu_maximum} vCPUs, "
        f"{format_size(vm.boot_bytes)}{most}, {len(vm.devices)} of {vm.slots} slots, {len(vm.cells)} cells",
        *(f"{it.model} {format_size(it.size_bytes)} node {it.node} slot {it.slot} {it.alias}" for it in vm.devices),
    ]


def shorten(value: Any) -> Any:
    """The same with ids and block numbers as ranges."""
    if isinstance(value, dict):
        return {key: shorten(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 3 and all(type(part) is int for part in value):
            return format_ids(tuple(value))
        return [shorten(part) for part in value]
    return value


def render(value: Any, indent: str = "") -> str:
    """JSON in lines that are full: what fits on one stays on it."""
    flat = json.dumps(value)
    if len(indent) + len(flat) < WIDTH or not isinstance(value, dict | list):
        return flat
    deeper, lines = indent + " ", [""]
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    parts = value.values() if isinstance(value, dict) else value
    for name, part in zip(names, parts, strict=True):
        text = name + render(part, deeper)
        if lines[-1] and ("\n" in text or "\n" in lines[-1] or len(deeper) + len(f"{lines[-1]} {text},") > WIDTH):
            lines.append("")
        lines[-1] += f" {text}," if lines[-1] else f"{text},"
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return f"{opened}\n{deeper}" + f"\n{deeper}".join(lines)[:-1] + f"\n{indent}{closed}"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in PLANS.glob("*.json")} == set(CASES)


def xml_of(domain: FakeDomain) -> tuple[str, str]:
    flags_of_inactive = 2
    return domain.XMLDesc(0), domain.XMLDesc(flags_of_inactive) if domain.config is not None else ""
