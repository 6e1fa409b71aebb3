"""What is known about a VM, its guest and its host at one moment.

Facts are read by hypervisor/ and judged by planners. Sizes are bytes. `None` always means unknown, never zero.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Literal

import msgspec

from kvmagent.model.errors import AgentError, Code

VmState = Literal["running", "paused", "shutoff", "crashed", "pmsuspended", "in shutdown", "other"]


class Vcpu(msgspec.Struct, frozen=True):
    """One possible vCPU of a definition: libvirt's `<vcpus><vcpu>`."""

    id: int
    enabled: bool
    hotpluggable: bool


class NumaCell(msgspec.Struct, frozen=True):
    """One guest NUMA cell with its boot memory, without devices plugged into it."""

    id: int
    cpus: frozenset[int]
    memory_bytes: int


class MemoryDevice(msgspec.Struct, frozen=True):
    """One `<memory>` device. `base` (guest physical address) is known on a running VM alone.

    A virtio-mem device has `size_bytes` at most, was asked for `requested_bytes` and has `current_bytes` plugged.
    Of an nvdimm `label_bytes` are no memory of the guest's.
    `address` is where it sits on its bus (PCI), which tells two of a kind apart in the running VM and its definition.
    `page_bytes` is the size of the pages behind it (0: normal, None: as behind its guest node), `host_nodes` the host
    NUMA nodes that it must come from alone (empty: as its guest node's).
    `known` is false of one that QEMU has and libvirt does not know: it gives what it gives, and cannot be changed.
    """

    model: str
    size_bytes: int
    node: int | None
    alias: str | None = None
    slot: int | None = None
    base: int | None = None
    requested_bytes: int | None = None
    current_bytes: int | None = None
    block_bytes: int | None = None
    label_bytes: int = 0
    address: str | None = None
    known: bool = True
    page_bytes: int | None = None
    host_nodes: frozenset[int] = frozenset()

    @property
    def is_settled(self) -> bool:
        """Whether a virtio-mem device of a running VM has what was requested of it; others always do."""
        return (
            self.model != "virtio-mem"
            or None in (self.current_bytes, self.requested_bytes)
            or (self.current_bytes == self.requested_bytes)
        )

    @property
    def room_bytes(self) -> int:
        """What a virtio-mem device can still give; a dimm has given all."""
        return self.size_bytes - self.plugged_bytes if self.model == "virtio-mem" else 0

    @property
    def promised_bytes(self) -> int:
        """What of the host's memory the guest may take by this device: a virtio-mem device all that was requested."""
        return max(self.plugged_bytes, self.requested_bytes or 0) if self.model == "virtio-mem" else self.plugged_bytes

    @property
    def plugged_bytes(self) -> int:
        """What the device gives to the guest: a dimm all of it, a virtio-mem device its current part."""
        if self.model == "dimm":
            return self.size_bytes
        if self.model == "virtio-mem":
            current = self.current_bytes if self.current_bytes is not None else self.requested_bytes
            return current or 0
        return 0


class Hugepages(msgspec.Struct, frozen=True):
    """Which guest NUMA nodes (None: all others) are backed by hugepages of which size; 0: the host's, None: normal."""

    size_bytes: int | None
    nodes: frozenset[int] | None = None


#: The namespace of what an owner says of a VM in its metadata. Stable: definitions out there hold it.
POLICY_NAMESPACE = "urn:kvmagent:policy:1"


class Policy(msgspec.Struct, frozen=True):
    """What the owner of a VM allows, as its definition's metadata says it; without any, everything.

    `max_cpu_num` and `max_memory_bytes` are ceilings (None: none), not what the VM must come down to. `mistakes` say
    what could not be read: each counts as the strictest that it could have meant.
    """

    hotplug: bool = True
    guest_online: bool = True
    max_cpu_num: int | None = None
    max_memory_bytes: int | None = None
    mistakes: tuple[str, ...] = ()


_WHOLE_CORE_ARCHES = frozenset({"ppc64", "ppc64le"})


class Definition(msgspec.Struct, frozen=True, dict=True):
    """A VM's definition, live or persistent: the parts that hotplug depends on.

    `topology` is sockets, dies, cores (of all clusters of a die) and threads.
    `total_bytes` is libvirt's `<memory>`: boot memory and the full size of every device.
    `current_bytes` is `<currentMemory>`: what the balloon leaves.
    `hugepages` say what memory is backed with, dimms included.
    `hard_limit_bytes` is memtune's, `vfio_devices` how many devices of the host are passed
    through so that all memory is pinned, `locked_copies` how often it is counted for them,
    `host_nodes` the host NUMA nodes that memory must come from (empty: any) and `cell_host_nodes` those of single guest
    nodes, `phys_bits` the vCPUs' physical address bits (None: those of the host), `phys_bits_limit` the most of the
    host's that they use, `pci_hole_bytes` what is kept for 64-bit PCI addresses (None: the machine's default),
    `iommu_eim` whether an IOMMU carries APIC ids above 255 (Intel's eim, AMD's xtsup), `iommu_open` whether the
    definition leaves it to libvirt to say so: it has no IOMMU, or Intel's that says neither, `cpu_shares`
    what the whole VM weighs (None: the host's default). `domain_id` is libvirt's number of a running VM, another after
    every start. `policy` is what this definition's owner allows. With `free_page_reporting` the
    balloon gives back to the host what the guest frees; one that `deflates` by itself gives the guest what it holds
    when that is short of memory; of one that `tells` libvirt asks what the guest does not use.
    """

    vcpu_current: int
    vcpu_maximum: int
    vcpus: tuple[Vcpu, ...]
    topology: tuple[int, int, int, int] | None
    total_bytes: int
    current_bytes: int
    max_memory_bytes: int | None
    slots: int
    cells: tuple[NumaCell, ...]
    devices: tuple[MemoryDevice, ...]
    acpi: bool
    balloon: bool
    agent_channel: bool
    machine: str
    arch: str
    hypervisor: str
    hugepages: tuple[Hugepages, ...] = ()
    locked: bool = False
    hard_limit_bytes: int | None = None
    vfio_devices: int = 0
    locked_copies: int = 0
    launch_security: str | None = None
    host_nodes: frozenset[int] = frozenset()
    cell_host_nodes: tuple[tuple[int, frozenset[int]], ...] = ()
    phys_bits: int | None = None
    phys_bits_limit: int | None = None
    pci_hole_bytes: int | None = None
    iommu_eim: bool = False
    iommu_open: bool = False
    cpu_shares: int | None = None
    domain_id: int | None = None
    policy: Policy = Policy()
    free_page_reporting: bool = False
    balloon_deflates: bool = False
    balloon_tells: bool = False

    @cached_property
    def boot_bytes(self) -> int:
        """Memory that the VM starts with, without devices."""
        return self.total_bytes - sum(device.size_bytes for device in self.devices)

    @cached_property  # asked for 70 times in a plug
    def memory_bytes(self) -> int:
        """Boot memory and what the devices give: the size that the VM is configured with."""
        return self.boot_bytes + sum(device.plugged_bytes for device in self.devices)

    @cached_property
    def balloon_total_bytes(self) -> int:
        """What a fully deflated balloon leaves to the guest. Source: libvirt leaves virtio-mem out of it."""
        return self.boot_bytes + sum(device.size_bytes for device in self.devices if device.model == "dimm")

    @property
    def virtio_mem_bytes(self) -> int:
        """What the virtio-mem devices give: the part of the memory that the balloon has no hand in."""
        return self.memory_bytes - self.balloon_total_bytes

    @property
    def balloon_gives_back(self) -> bool:
        """Whether what the balloon holds is the host's until somebody asks for less to be held.

        Source: QEMU virtio-balloon: with deflate-on-oom the guest takes it back when it is short of memory, and asks
        nobody; virtio_balloon_inhibited: of memory that is pinned for VFIO or encryption nothing is given back.
        madvise(2): nor of locked memory.
        """
        is_pinned = self.locked or self.vfio_devices > 0 or self.launch_security is not None
        return self.balloon and not self.balloon_deflates and not is_pinned

    @property
    def vcpu_quantum(self) -> int:
        """How many vCPUs are plugged, or removed, at once at least.

        Source: libvirt 9.0, "vcpu granularity": QEMU plugs whole cores on POWER. Observed: single threads on x86.
        """
        return self.topology[3] if self.topology and self.arch in _WHOLE_CORE_ARCHES else 1

    @cached_property
    def enabled_vcpus(self) -> frozenset[int]:
        """The ids of the vCPUs that it has."""
        return frozenset(vcpu.id for vcpu in self.vcpus if vcpu.enabled)

    @property
    def dimms(self) -> tuple[MemoryDevice, ...]:
        """The dimms that can leave."""
        return tuple(device for device in self.devices if device.model == "dimm" and device.known)

    @cached_property
    def virtio_mems(self) -> tuple[MemoryDevice, ...]:
        """The virtio-mem devices that can be resized."""
        return tuple(device for device in self.devices if device.model == "virtio-mem" and device.known)

    def find_hugepage_bytes(self, node: int) -> int | None:
        """Return the hugepage's size behind a guest node, 0 for the host's default one; None for normal pages.

        Source: libvirt formatdomain, memoryBacking; a dimm that is plugged is backed as its node is.
        """
        own = [page.size_bytes for page in self.hugepages if page.nodes is not None and node in page.nodes]
        others = [page.size_bytes for page in self.hugepages if page.nodes is None]
        return next(iter(own + others), None)

    def find_host_nodes(self, node: int) -> frozenset[int]:
        """Return the host NUMA nodes that a guest node's memory must come from; empty: any."""
        return dict(self.cell_host_nodes).get(node, self.host_nodes)

    def find_device(self, alias: str) -> MemoryDevice | None:
        """Return the memory device of that alias."""
        return next((device for device in self.devices if device.alias == alias), None)


def find_other_half(device: MemoryDevice, definition: Definition) -> MemoryDevice | None:
    """Return the same virtio-mem device in the VM's other definition: by user alias, else by its place on the bus."""
    for other in definition.virtio_mems:
        if other.alias is not None and other.alias == device.alias:
            return other
    same = (device.node, device.size_bytes)
    return next(
        (
            other
            for other in definition.virtio_mems
            if None in (device.alias, other.alias)
            and device.address == other.address
            and (other.node, other.size_bytes) == same
        ),
        None,
    )


def device_blocks(device: MemoryDevice, quantum_bytes: int) -> range:
    """Return the guest's block numbers behind a device; none where its place is not known.

    A range: how large a block is, is the guest's claim, and must not decide how much memory the agent needs.
    """
    if device.base is None:
        return range(0)
    return range(device.base // quantum_bytes, (device.base + device.size_bytes) // quantum_bytes)


def dimm_blocks(live: Definition, quantum_bytes: int) -> tuple[range, ...]:
    """Return the guest's block numbers behind each dimm of a running VM."""
    return tuple(device_blocks(device, quantum_bytes) for device in live.devices if device.model == "dimm")


def pick_blocks(listed: frozenset[int], spans: tuple[range, ...]) -> frozenset[int]:
    """Return the listed blocks that lie in any of the spans: as much work as the smaller of both is."""
    return frozenset(
        index
        for span in spans
        for index in (span if len(span) < len(listed) else listed)
        if index in span and index in listed
    )


def count_missing(listed: frozenset[int], spans: tuple[range, ...]) -> int:
    """Return how many blocks of the spans, none of which overlap, are not listed."""
    return sum(map(len, spans)) - len(pick_blocks(listed, spans))


#: What is asked of the guest: its CPUs, its memory (and the host's beside it), its agent, its operating system; and of
#: others: what of the host's memory is promised to all VMs, what was asked of the balloon.
Part = Literal["cpus", "memory", "agent", "os", "budget", "balloon target"]


class Domain(msgspec.Struct, frozen=True):
    """One VM as libvirt has it. `live` is None when it is off, `config` when it is transient.

    `migrated` is true where the VM came here by live migration, for as long as it runs: its QEMU was started for that.
    `job` is a job of libvirt's that excludes changes. `saved` tells of a managed save image: the next start restores it
    with the definition that it holds. `memlock_bytes` is what its QEMU process may lock, where that matters and can be
    seen. `balloon_target_bytes` is what the guest was asked to come to by balloon last, whoever asked, where it was
    looked at: the guest may follow it at any later time. `balloon_unused` is what
    the balloon's driver tells of its guest: what it has, and does not use.
    """

    name: str
    uuid: str
    state: VmState
    live: Definition | None
    config: Definition | None
    balloon_bytes: int | None = None
    job: str | None = None
    migrated: bool = False
    saved: bool = False
    memlock_bytes: int | None = None
    balloon_target_bytes: int | None = None
    balloon_unused: tuple[int, int] | None = None

    def definitions(self, *, live: bool = True, config: bool = True) -> Iterator[tuple[str, Definition]]:
        """Yield the definitions that there are of those wanted, each with what messages call it."""
        if live and self.live is not None:
            yield "running", self.live
        if config and self.config is not None:
            yield "persistent", self.config


class GuestVcpu(msgspec.Struct, frozen=True):
    """One CPU that the guest's kernel lists, by its logical id there."""

    id: int
    online: bool
    can_offline: bool


class GuestBlock(msgspec.Struct, frozen=True):
    """One memory block that the guest's kernel lists: guest physical address = index x block size."""

    index: int
    online: bool
    can_offline: bool


class GuestOs(msgspec.Struct, frozen=True):
    """The guest's operating system: the name that it reports, and, if known, its family and kernel version."""

    name: str
    family: Literal["linux", "windows", "freebsd"] | None = None
    kernel: Annotated[tuple[int, ...], msgspec.Meta(min_length=2, max_length=2)] | None = None


class Guest(msgspec.Struct, frozen=True):
    """What the guest says of itself through its agent.

    `silence` is why it reports nothing at all: one of the GUEST_AGENT codes. A single part that could not be had
    (a blocked command, say) is None, and `refused` names the commands with the agent's words. `disabled` are the
    commands that the agent's configuration blocks, and `os` the operating system, where it was asked for them.
    """

    silence: Code | None = None
    silence_words: str = ""
    vcpus: tuple[GuestVcpu, ...] | None = None
    blocks: tuple[GuestBlock, ...] | None = None
    block_bytes: int | None = None
    mem_total_bytes: int | None = None
    mem_available_bytes: int | None = None
    refused: dict[str, str] = {}
    disabled: frozenset[str] = frozenset()
    os: GuestOs | None = None

    @property
    def spoke(self) -> bool:
        """Whether its agent said anything, be it a refusal or what cannot be used."""
        if self.silence is not None:
            return self.silence in (Code.GUEST_AGENT_INVALID, Code.GUEST_AGENT_FROZEN)
        parts = (self.vcpus, self.blocks, self.block_bytes, self.mem_total_bytes, self.os)
        return bool(self.refused or self.disabled) or any(part is not None for part in parts)

    @property
    def cpus_online(self) -> int | None:
        """How many CPUs run in the guest."""
        return None if self.vcpus is None else sum(cpu.online for cpu in self.vcpus)


class HostNode(msgspec.Struct, frozen=True):
    """One NUMA node of the compute node: free memory, and free hugepages by their size in bytes."""

    id: int
    free_bytes: int
    free_hugepages: dict[int, int] = {}


class MemoryPool(msgspec.Struct, frozen=True):
    """One kind of the host's memory: how much of it may be promised to VMs, and how much is.

    `page_bytes` is the size of hugepages (0: normal pages), `nodes` the host NUMA nodes that it is of (empty: all),
    `cgroup` the one that limits it (empty: none). `made_of` says what the capacity comes from, `most` names the VMs
    that have most of it, `idle` those whose guests could do without some of it, with their bytes. `over_since` says
    since when more is promised than there is, in UTC; empty: it is not.
    """

    page_bytes: int
    nodes: frozenset[int]
    capacity_bytes: int
    promised_bytes: int
    cgroup: str = ""
    made_of: str = ""
    most: tuple[tuple[str, int], ...] = ()
    idle: tuple[tuple[str, int], ...] = ()
    over_since: str = ""


class Host(msgspec.Struct, frozen=True):
    """The compute node.

    `pools` are the kinds of its memory that the VM's comes from, with what is promised of each to all VMs.

    `memory_available_bytes` can be had without swapping. `vcpu_limit` is the most vCPUs that the hypervisor gives to
    a VM of the observed VM's machine type. `hugepage_bytes` is the default hugepage's size, `boot_id` another after
    every start of the host. An unprivileged libvirt (qemu:///session) cannot raise the limits of its QEMU processes.
    `virtio_mem_takes_slots`: libvirt counts such devices among the memory slots; `adds_iommu`: it adds the IOMMU by
    itself that more than 255 vCPUs need.
    `has_domain_schema` tells whether libvirt's schema is there to hold a definition against.
    `removes_emulated`: vCPUs of emulated VMs may be removed too (libvirt.allow_emulated_removal).
    """

    memory_available_bytes: int | None = None
    vcpu_limit: int | None = None
    phys_bits: int | None = None
    nodes: tuple[HostNode, ...] = ()
    hugepage_bytes: int | None = None
    boot_id: str | None = None
    libvirt_is_privileged: bool = True
    has_domain_schema: bool = True
    removes_emulated: bool = False
    virtio_mem_takes_slots: bool = True
    adds_iommu: bool = False
    pools: tuple[MemoryPool, ...] = ()


def format_run(domain_id: int | None, boot_id: str | None) -> str | None:
    """Return the name of a VM's run; None where it does not run, or it is not known which boot of the host this is."""
    return None if domain_id is None or domain_id < 0 or boot_id is None else f"{domain_id}@{boot_id}"


class Facts(msgspec.Struct, frozen=True):
    """All that a planner may look at.

    `left_offline` are the guest's CPUs that the agent plugged, or took offline, in this run of the VM, and that it has
    not seen in use since: others that are offline are so by their owner's will.
    `fell_silent`: its guest's agent spoke before in this run of the VM, and was asked and did not now.
    `restart_since` is since when it waits for a restart, in seconds since the epoch; None: it does not, or unknown.
    """

    domain: Domain
    guest: Guest
    host: Host
    left_offline: frozenset[int] = frozenset()
    fell_silent: bool = False
    restart_since: float | None = None

    @property
    def run(self) -> str | None:
        """Which run of the VM this is: another after every power-off, and on every host; None when off, or unknown.

        Source: libvirt counts domain ids up for as long as it runs, or the host does while a VM runs.
        """
        live = self.domain.live
        return None if live is None else format_run(live.domain_id, self.host.boot_id)

    def find_definition(self, target: Literal["live", "config"]) -> Definition | None:
        """Return what the running VM is, or the persistent definition; None where there is none."""
        return self.domain.live if target == "live" else self.domain.config

    def get_live(self) -> Definition:
        """Return the running VM's definition.

        Raises:
            AgentError: VM_NOT_RUNNING, when the VM is off, or went off on the way.
        """
        if self.domain.live is None:
            raise AgentError(Code.VM_NOT_RUNNING, f"VM {self.domain.name} is {self.domain.state}")
        return self.domain.live

    def get_config(self) -> Definition:
        """Return the persistent definition.

        Raises:
            AgentError: VM_TRANSIENT, when there is none.
        """
        if self.domain.config is None:
            raise AgentError(Code.VM_TRANSIENT, f"VM {self.domain.name} is transient")
        return self.domain.config

    def after_restart(self, config: "Definition | None" = None) -> "Facts":
        """Return what would be so after a power cycle: the VM runs as its definition says, its guest unknown.

        `config` is what the persistent definition would be by then; None: what it is.
        """
        domain, config = self.domain, config or self.domain.config
        return Facts(
            domain=Domain(name=domain.name, uuid=domain.uuid, state="running", live=config, config=config),
            guest=Guest(os=self.guest.os),
            host=self.host,
        )

    def count_free_slots(self, definition: Definition) -> int:
        """Return how many memory slots of a definition are free."""
        counts = self.host.virtio_mem_takes_slots
        used = sum(counts or device.model != "virtio-mem" for device in definition.devices)
        return max(0, definition.slots - used)

    @property
    def restart_required(self) -> bool:
        """Whether the persistent definition has something that the running VM lacks until it is powered off and on."""
        live, config = self.domain.live, self.domain.config
        if live is None or config is None:
            return False
        return (
            config.vcpu_maximum > live.vcpu_maximum
            or (config.max_memory_bytes or 0) > (live.max_memory_bytes or 0)
            or config.slots > live.slots
            or len(config.cells) > len(live.cells)
            or len(config.virtio_mems) > len(live.virtio_mems)
            or (config.acpi and not live.acpi)
            or (config.balloon and not live.balloon)
            or (config.agent_channel and not live.agent_channel)
            or (config.free_page_reporting and not live.free_page_reporting)
        )

    @property
    def offline_vcpus(self) -> int | None:
        """How many vCPUs of the running VM its guest does not use; None if the guest does not report it."""
        live, online = self.domain.live, self.guest.cpus_online
        return None if live is None or online is None else max(0, live.vcpu_current - online)

    @property
    def offline_memory_bytes(self) -> int | None:
        """How much memory the guest lists and does not use, or has plugged and does not list; None where unknown."""
        live, blocks, quantum = self.domain.live, self.guest.blocks, self.guest.block_bytes
        if live is None or blocks is None or quantum is None:
            return None
        unseen = count_missing(frozenset(block.index for block in blocks), dimm_blocks(live, quantum))
        return (unseen + sum(not block.online for block in blocks)) * quantum
