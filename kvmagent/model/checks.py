"""The checks of the shipped commands: everything that blocks a hotplug.

Planners refuse with the first one; ReadyForHotplug lists all. So a VM that is called ready is a VM that a
planner will not refuse.
"""

import math
import re
from collections.abc import Iterable, Iterator

import msgspec

from kvmagent.model import hostbudget, policy
from kvmagent.model.command import Affect, Total
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest, Host
from kvmagent.model.guestuse import AGENT_COMMANDS
from kvmagent.model.machines import Ability, check_machine, find_machine
from kvmagent.model.reply import Blocker, Problem
from kvmagent.model.units import GIB, MIB, format_ids, format_size

# What the host keeps for itself when memory is plugged.
HOST_RESERVE_BYTES = 256 * MIB
MOST_VCPUS_WITHOUT_EIM = 255
_MACHINE_VERSION, _MEMORY_FROM_MACHINE = re.compile(r"pc-(?:i440fx-|q35-)?(\d+)\.(\d+)"), (2, 1)
# What a virtio-mem device is resized by. Source: libvirt formatdomain, the host's transparent hugepage.
VIRTIO_MEM_BLOCK_BYTES = 2 * MIB
# A guest with pages of 64 KiB has blocks of this size on Arm, and plugs no smaller part of a virtio-mem device.
# Source: Linux 6.1 arch/arm64 sparsemem.h; drivers/virtio/virtio_mem.c: no less than a page block.
_ARM_LARGE_BLOCK_BYTES = 512 * MIB
# What a command on a VM may be refused with before its own checks: the VM is not found, or `check_state` stops it.
STATE_REFUSALS = (Code.VM_NOT_FOUND, Code.VM_NOT_RUNNING, Code.VM_TRANSIENT, Code.LIBVIRT_BUSY, Code.VM_OPTED_OUT)


def block_bytes(facts: Facts) -> int:
    """Return the size that added memory must be a multiple of for the guest to use it.

    Linux adds memory in blocks: the guest agent reports their size; without it the kernel's usual one is assumed.
    Source: Linux Documentation/admin-guide/mm/memory-hotplug.rst.
    """
    if facts.guest.block_bytes is not None:
        return facts.guest.block_bytes
    definition = facts.domain.live or facts.domain.config
    return find_machine(definition).block_bytes if definition else 128 * MIB


def dimm_quantum(facts: Facts, node: int | None) -> int:
    """Return what a dimm for this guest node (None: any) must be a multiple of: the guest's block, and the page.

    Observed: QEMU 7.2 refuses memory that is no multiple of the hugepage behind it.
    """
    definition = facts.domain.live or facts.domain.config
    pages = [find_page_bytes(facts, one) or 0 for one in _guest_nodes(definition, node)] if definition else []
    return max([block_bytes(facts), *pages])


def find_page_bytes(facts: Facts, node: int) -> int | None:
    """Return the size of the hugepages behind a guest node; None for normal pages."""
    definition = facts.domain.live or facts.domain.config
    return hostbudget.find_page_bytes(definition, node, facts.host.hugepage_bytes) or None if definition else None


def virtio_mem_block_bytes(facts: Facts, node: int | None) -> int:
    """Return what a new virtio-mem device is resized by: no less than the host's page, and what the guest plugs."""
    definition, block = facts.domain.live or facts.domain.config, VIRTIO_MEM_BLOCK_BYTES
    if definition is not None and definition.arch == "aarch64" and facts.guest.block_bytes == _ARM_LARGE_BLOCK_BYTES:
        block = _ARM_LARGE_BLOCK_BYTES
    return max(block, find_page_bytes(facts, node or 0) or 0)


def _guest_nodes(definition: Definition, node: int | None) -> list[int]:
    return [cell.id for cell in definition.cells] or [0] if node is None else [node]


def refuse_first(blockers: Iterable[Blocker]) -> None:
    """Raise the first blocker, if there is one.

    Raises:
        AgentError: with the blocker's code, message and remedy.
    """
    for blocker in blockers:
        raise AgentError(
            blocker.code,
            blocker.message,
            remedy=blocker.remedy,
            details={"needsRestart": blocker.needs_restart},
        )


def check_state(domain: Domain, affect: Affect) -> Iterator[Blocker]:
    """The VM must be there in the form that is to be changed, its owner allow it, and no other job hold it."""
    if affect != "config" and (domain.live is None or domain.state == "in shutdown"):
        yield blocker(Code.VM_NOT_RUNNING, f'VM {domain.name} is {domain.state}, and "affect" is {affect}')
    if affect != "live" and domain.config is None:
        yield blocker(Code.VM_TRANSIENT, f'VM {domain.name} is transient, and "affect" is {affect}')
    yield from check_opted_out(domain, affect)
    if domain.job is not None:
        yield blocker(Code.LIBVIRT_BUSY, f"VM {domain.name} has a {domain.job} job in progress")


def check_awake(domain: Domain, affect: Affect) -> Iterator[Blocker]:
    """A guest that sleeps must not find other vCPUs when it wakes up.

    Observed: QEMU 7.2, Linux 6.1: dead after the wake-up in 3 of 3 runs; a dimm does no harm.
    """
    if affect != "config" and domain.state == "pmsuspended":
        yield blocker(Code.VM_SUSPENDED, f"VM {domain.name} is suspended to memory")


def check_opted_out(domain: Domain, affect: Affect) -> Iterator[Blocker]:
    """The owner must allow hotplug of each definition to be changed."""
    for name, definition in find_changed(domain, affect):
        yield from _blockers(policy.check_opt_out(domain, name, definition))


def check_memory_ceiling(facts: Facts, affect: Affect, size_bytes: int) -> Iterator[Blocker]:
    """Memory that grows to this must stay within the ceiling of each definition to be changed."""
    for name, definition in find_changed(facts.domain, affect):
        yield from _blockers(policy.check_memory_ceiling(facts.domain, name, definition, size_bytes))


def check_expected(facts: Facts, affect: Affect, cpu_num: int | None, memory_size: int | None) -> Iterator[Blocker]:
    """The VM must have what the caller believes it to have, or its target was worked out from something else.

    Only a task's own decision asks this: one that goes on after an interruption has its goal, and is not refused by
    what it has done itself.
    """
    definition = facts.domain.config if affect == "config" else facts.domain.live
    if definition is None:
        return
    if cpu_num is not None and cpu_num != definition.vcpu_current:
        yield blocker(
            Code.NOT_AS_EXPECTED,
            f"{cpu_num} vCPUs were expected, VM {facts.domain.name} has {definition.vcpu_current}",
        )
    if memory_size is not None and memory_size != definition.memory_bytes:
        yield blocker(
            Code.NOT_AS_EXPECTED,
            f"{memory_size} bytes of memory were expected, VM {facts.domain.name} has {definition.memory_bytes} bytes",
        )


def check_cpu(facts: Facts, affect: Affect, cpu_num: int) -> Iterator[Blocker]:
    """Each definition to be changed, and its owner, must allow `cpu_num` vCPUs, and the host its maximum."""
    yield from check_awake(facts.domain, affect)
    for name, definition in find_changed(facts.domain, affect):
        yield from check_machine(name, definition, "plug vCPUs")
        limit, why = find_vcpu_limit(facts.host, definition)
        if limit is not None and definition.vcpu_maximum > limit:
            yield blocker(
                Code.CPU_ABOVE_HOST_LIMIT,
                f"the {name} definition allows {definition.vcpu_maximum} vCPUs, and {why}",
                needs_restart=True,
            )
        if cpu_num > definition.vcpu_maximum:
            yield blocker(
                Code.CPU_ABOVE_MAXIMUM,
                f"{cpu_num} vCPUs requested, the {name} definition allows at most {definition.vcpu_maximum}",
                needs_restart=True,
            )
        yield from _blockers(policy.check_cpu_ceiling(facts.domain, name, definition, cpu_num))
        if definition.topology is not None:
            product = math.prod(definition.topology)
            yield from _check_whole_cores(name, definition, cpu_num)
            if product != definition.vcpu_maximum:
                yield blocker(
                    Code.CPU_TOPOLOGY_MISMATCH,
                    f"the {name} definition's topology makes {product} vCPUs, but the maximum is "
                    f"{definition.vcpu_maximum}",
                    needs_restart=True,
                )


def check_cores_left(domain: Domain, affect: Affect, cpu_num: int) -> Iterator[Blocker]:
    """What is left in each definition that comes down to `cpu_num` must be whole cores."""
    for name, definition in find_changed(domain, affect):
        if cpu_num < definition.vcpu_current:
            yield from _check_whole_cores(name, definition, cpu_num)


def _check_whole_cores(name: str, definition: Definition, cpu_num: int) -> Iterator[Blocker]:
    """vCPUs come and leave by the core where they cannot by the thread."""
    if cpu_num % definition.vcpu_quantum:
        yield blocker(
            Code.CPU_NOT_WHOLE_CORE,
            f"{cpu_num} vCPUs requested, cores of the {name} definition have {definition.vcpu_quantum} threads",
        )


def check_cpu_removal(definition: Definition) -> Iterator[Blocker]:
    """The running VM's machine must be one that gives vCPUs up at all."""
    yield from check_machine("running", definition, "unplug vCPUs")


def find_vcpu_limit(host: Host, definition: Definition) -> tuple[int | None, str]:
    """Return the most vCPUs that the VM can be started with, and why no more; None if unknown.

    Source: libvirt domain capabilities, vcpu max. On x86 APIC ids above 255 need more than that: `has_low_ids`.
    """
    limit, kind = host.vcpu_limit, f"a {definition.machine} ({definition.hypervisor})"
    if has_low_ids(host, definition, MOST_VCPUS_WITHOUT_EIM + 1) and (limit is None or limit > MOST_VCPUS_WITHOUT_EIM):
        most = MOST_VCPUS_WITHOUT_EIM
        if definition.hypervisor == "kvm":
            return most, f"more than {most} need an <iommu> that carries their APIC ids (eim='on', AMD's xtsup='on')"
        return most, f"an emulated VM has at most {most}: QEMU does not always carry higher APIC ids there"
    return limit, f"the hypervisor gives at most {limit} to {kind}"


def has_low_ids(host: Host, definition: Definition, vcpus: int) -> bool:
    """Return whether nothing carries APIC ids above 255 to so many vCPUs: an IOMMU does, where they take such ids.

    Newer libvirt sees to that IOMMU by itself where a q35 VM is defined with more than 255 vCPUs, unless the definition
    says otherwise: with an IOMMU of virtio, or eim='off'.
    Source: QEMU hw/i386/x86-iommu, "eim". Observed: QEMU 7.2 emulating refuses such ids, "requires kernel irqchip and
    X2APIC API support"; QEMU 10.0 and 11.1 start 300 emulated vCPUs with some IOMMUs and CPU models only.
    """
    if definition.arch != "x86_64":
        return False
    is_seen_to = host.adds_iommu and definition.iommu_open and vcpus > MOST_VCPUS_WITHOUT_EIM
    carried = definition.iommu_eim or (is_seen_to and "q35" in definition.machine)
    return not (carried and definition.hypervisor == "kvm")


def check_machine_age(name: str, definition: Definition) -> Iterator[Blocker]:
    """The machine type must be of a QEMU that could take memory while it ran.

    Observed: QEMU 7.2 does not start pc-i440fx-2.0 and older with maxMemory. Source: Ubuntu's trusty is 2.0, RHEL 6's
    are older.
    """
    machine = definition.machine
    version = _MACHINE_VERSION.match(machine)
    is_old = version is not None and (int(version[1]), int(version[2])) < _MEMORY_FROM_MACHINE
    if is_old or machine.startswith("rhel6.") or machine.endswith("-trusty"):
        yield Blocker(
            code=Code.MACHINE_NOT_SUPPORTED,
            message=f"the {name} definition is a {machine}, and machine types before 2.1 take no memory while they run",
            remedy="Give the VM a newer machine type in its definition, then power it off and start it again.",
            needs_restart=True,
        )


def check_device_support(facts: Facts, affect: Affect, ability: Ability) -> Iterator[Blocker]:
    """Each definition to be changed must be able to take a memory device of the kind at all."""
    for name, definition in find_changed(facts.domain, affect):
        cannot = list(check_machine(name, definition, ability))
        yield from cannot
        if any(one.code is Code.MACHINE_NOT_SUPPORTED for one in cannot):
            continue  # nothing else would help
        yield from check_machine_age(name, definition)
        if definition.launch_security is not None:
            yield blocker(
                Code.MEMORY_ENCRYPTED, f"the {name} definition has launchSecurity {definition.launch_security}"
            )
        if not definition.cells and find_machine(definition).needs_cells:
            yield blocker(Code.NO_NUMA_CELL, f"the {name} definition has no guest NUMA cell", needs_restart=True)
        elif definition.cells:
            covered = frozenset[int]().union(*(cell.cpus for cell in definition.cells))
            missing = frozenset(range(definition.vcpu_maximum)) - covered
            if missing:
                yield blocker(
                    Code.NUMA_CELLS_INCOMPLETE,
                    f"vCPUs {format_ids(missing)} of {definition.vcpu_maximum} are in no NUMA cell "
                    f"of the {name} definition",
                    needs_restart=True,
                )
        if definition.max_memory_bytes is None:
            yield blocker(Code.NO_MAX_MEMORY, f"the {name} definition has no <maxMemory>", needs_restart=True)


def check_unlocked(facts: Facts, affect: Affect) -> Iterator[Blocker]:
    """A virtio-mem device gives pages back, which locked memory cannot. Source: QEMU, virtio-mem and mlock."""
    for name, definition in find_changed(facts.domain, affect):
        if definition.locked:
            yield blocker(Code.MEMORY_LOCKED, f"memory of the {name} definition is locked (memoryBacking)")


def check_passes_nothing(facts: Facts, affect: Affect) -> Iterator[Blocker]:
    """What is passed through has all memory pinned, and a virtio-mem device's is not to be."""
    for name, definition in find_changed(facts.domain, affect):
        if definition.vfio_devices:
            yield blocker(
                Code.MEMORY_LOCKED, f"the {name} definition passes {definition.vfio_devices} host devices through"
            )


def check_device_room(
    facts: Facts, affect: Affect, ability: Ability, sizes_bytes: tuple[int, ...], node: int | None
) -> Iterator[Blocker]:
    """Each definition to be changed must have slots and address room for these devices, and the node.

    Only what `check_device_support` passed is judged.
    """
    wanted = sum(sizes_bytes)
    for name, definition in find_changed(facts.domain, affect):
        nodes = frozenset(cell.id for cell in definition.cells)
        if node is not None and node not in nodes and (nodes or not find_machine(definition).needs_cells):
            has = format_ids(nodes) if nodes else "no guest NUMA cell"
            yield blocker(
                Code.NUMA_NODE_NOT_FOUND, f"guest NUMA node {node} was requested, but the {name} definition has {has}"
            )
        if definition.max_memory_bytes is None:
            continue
        if definition.total_bytes + wanted > definition.max_memory_bytes:
            yield blocker(
                Code.MEMORY_ABOVE_MAXIMUM,
                f"{format_size(definition.total_bytes)} and {format_size(wanted)} more requested, "
                f"the {name} definition allows at most {format_size(definition.max_memory_bytes)}",
                needs_restart=True,
            )
        if name == "persistent":
            yield from _check_hard_limit(name, definition, wanted)
        free = facts.count_free_slots(definition)
        takes_slots = ability == "plug dimms" or facts.host.virtio_mem_takes_slots
        if takes_slots and len(sizes_bytes) > free:
            yield blocker(
                Code.SLOTS_EXHAUSTED,
                f"{len(sizes_bytes)} memory slots are needed, the {name} definition has {free} of "
                f"{definition.slots} free",
                needs_restart=True,
            )
    if affect != "config" and wanted:
        yield from check_host(facts, wanted)


def check_host(facts: Facts, added_bytes: int, node: int | None = None) -> Iterator[Blocker]:
    """The host must have the memory that the running VM is to get, of the kind and from where it must come.

    `node` is the guest node that gets it; where it is not known yet, only what is so of all of them is judged.
    """
    live, host = facts.domain.live, facts.host
    if live is None:
        return
    yield from _check_hard_limit("running", live, added_bytes)
    is_pinned, needed = _is_pinned(live), _needed_bytes(live, added_bytes)
    # A privileged libvirt raises the limit of its QEMU process by itself when memory is attached.
    # Source: libvirt qemuDomainAdjustMaxMemLock.
    lockable = facts.domain.memlock_bytes
    if is_pinned and lockable is not None and needed > lockable and not host.libvirt_is_privileged:
        yield blocker(
            Code.MEMORY_LOCK_LIMIT,
            f"{format_size(needed)} must be locked, but RLIMIT_MEMLOCK of the QEMU process is {format_size(lockable)}, "
            "which an unprivileged libvirt cannot raise",
        )
    nodes = _guest_nodes(live, node)
    sizes = {find_page_bytes(facts, one) for one in nodes}
    where = [live.find_host_nodes(one) for one in nodes]
    sources = frozenset[int]().union(*where) if all(where) else frozenset[int]()
    if len(sizes) > 1:
        return
    size = sizes.pop()
    if size is not None:
        yield from _check_hugepages(host, size, sources, added_bytes)
    else:
        yield from _check_available(host, sources, added_bytes)


def check_promised(facts: Facts, added_bytes: int) -> Iterator[Blocker]:
    """The host must not have promised to VMs already what the running VM is to get. The executor asks this of goals."""
    live = facts.domain.live
    try:
        total = live and Total("memory", live=live.memory_bytes + added_bytes, config=None)
        hostbudget.refuse_growth((total,) if total else (), facts)
    except AgentError as error:
        yield msgspec.structs.replace(blocker(error.code, error.message), remedy=error.remedy)


def _check_available(host: Host, sources: frozenset[int], added_bytes: int) -> Iterator[Blocker]:
    """Normal memory must be there now."""
    available = host.memory_available_bytes
    if available is not None and added_bytes + HOST_RESERVE_BYTES > available:
        yield blocker(
            Code.HOST_MEMORY_SHORT,
            f"{format_size(added_bytes)} is needed, with {format_size(HOST_RESERVE_BYTES)} kept free, "
            f"but the host has {format_size(available)} available",
        )
    bound = [one for one in host.nodes if one.id in sources]
    if bound and sum(one.free_bytes for one in bound) < added_bytes:
        yield blocker(
            Code.HOST_NODE_MEMORY_SHORT,
            f"{format_size(added_bytes)} is needed from host NUMA nodes {format_ids(sources)}, "
            f"but they have {format_size(sum(one.free_bytes for one in bound))} free",
        )


def check_hard_limit(facts: Facts, affect: Affect, added_bytes: int) -> Iterator[Blocker]:
    """Each definition to be changed must allow its QEMU so much memory."""
    for name, definition in find_changed(facts.domain, affect):
        yield from _check_hard_limit(name, definition, added_bytes)


def _check_hard_limit(name: str, definition: Definition, added_bytes: int) -> Iterator[Blocker]:
    needed = _needed_bytes(definition, added_bytes)
    if definition.hard_limit_bytes is not None and needed > definition.hard_limit_bytes:
        yield blocker(
            Code.MEMORY_HARD_LIMIT,
            f"{format_size(needed)} is needed, but the hard_limit of the {name} definition is "
            f"{format_size(definition.hard_limit_bytes)}",
        )


def _is_pinned(definition: Definition) -> bool:
    """Return whether QEMU pins all guest memory: for devices that are passed through, or because it is to."""
    return bool(definition.vfio_devices or definition.locked)


def _needed_bytes(definition: Definition, added_bytes: int) -> int:
    """Return what QEMU may use and lock. Source: libvirt qemuDomainGetMemLockLimitBytes: 1 GiB on top where pinned."""
    if not _is_pinned(definition):
        return definition.memory_bytes + added_bytes
    return max(1, definition.locked_copies) * (definition.memory_bytes + added_bytes) + GIB


def _check_hugepages(host: Host, size: int, sources: frozenset[int], added_bytes: int) -> Iterator[Blocker]:
    nodes = [node for node in host.nodes if not sources or node.id in sources]
    if not nodes:
        return
    free = sum(node.free_hugepages.get(size, 0) for node in nodes)
    if free * size < added_bytes:
        yield blocker(
            Code.HOST_HUGEPAGES_SHORT,
            f"{-(-added_bytes // size)} hugepages of {format_size(size)} are needed, "
            f"but {free} are free on host NUMA nodes {format_ids(frozenset(node.id for node in nodes))}",
        )


def check_balloon(facts: Facts, affect: Affect, size_bytes: int) -> Iterator[Blocker]:
    """Each definition to be changed must have a balloon, which gives back no more than the VM has."""
    for name, definition in find_changed(facts.domain, affect):
        if not definition.balloon:
            yield blocker(Code.NO_BALLOON, f"the {name} definition has no memory balloon device", needs_restart=True)
        if size_bytes > definition.balloon_total_bytes:
            live = facts.domain.live if affect == "both" else None
            is_enough = live is not None and size_bytes <= live.balloon_total_bytes
            yield Blocker(
                code=Code.BALLOON_ABOVE_TOTAL,
                message=f"{format_size(size_bytes)} were requested by balloon, but the {name} definition has "
                f"{format_size(definition.balloon_total_bytes)}",
                remedy='Use "affect": "live" to change the running VM alone.'
                if is_enough
                else CODES[Code.BALLOON_ABOVE_TOTAL].remedy,
                needs_restart=False,
            )


def check_guest(guest: Guest) -> Iterator[Blocker]:
    """Without its agent, what the guest uses can be neither brought online nor confirmed."""
    if guest.silence is not None:
        yield Blocker(
            code=guest.silence,
            message=f"hot-plug works, but the guest's use cannot be confirmed: {guest.silence_words}",
            remedy=CODES[guest.silence].remedy,
            needs_restart=guest.silence is Code.GUEST_AGENT_ABSENT,
        )
    for command in sorted(guest.disabled & frozenset().union(*AGENT_COMMANDS.values()) - guest.refused.keys()):
        yield blocker(Code.GUEST_AGENT_REFUSED, f"{command} is disabled in the guest agent's configuration")
    for command, words in guest.refused.items():
        yield blocker(Code.GUEST_AGENT_REFUSED, f"{command}: {words}")


def find_changed(domain: Domain, affect: Affect) -> Iterator[tuple[str, Definition]]:
    """Yield the definitions that a command changes, of those that there are, each with what messages call it."""
    return domain.definitions(live=affect != "config", config=affect != "live")


def _blockers(problems: Iterable[Problem]) -> Iterator[Blocker]:
    """Return problems that no restart of the VM removes."""
    for one in problems:
        yield Blocker(code=one.code, message=one.message, remedy=one.remedy, needs_restart=False)


def blocker(code: Code, message: str, *, needs_restart: bool = False) -> Blocker:
    """Return a blocker with the code's own remedy."""
    return Blocker(code=code, message=message, remedy=CODES[code].remedy, needs_restart=needs_restart)
