"""What a persistent definition needs so that its next start can be hot-plugged, and still starts."""

from typing import Any

import msgspec

from kvmagent.model.checks import (
    check_machine_age,
    check_opted_out,
    check_passes_nothing,
    check_unlocked,
    find_vcpu_limit,
    has_low_ids,
    refuse_first,
    virtio_mem_block_bytes,
)
from kvmagent.model.command import Goal
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.guestos import check_virtio_mem, find_limits, find_socket_limits, find_unknown
from kvmagent.model.guestuse import warning
from kvmagent.model.machines import check_machine, find_machine
from kvmagent.model.reply import Problem
from kvmagent.model.steps import CellShape, Shape, VirtioMemShape
from kvmagent.model.units import GIB, align_down, align_up, format_ids, format_size

from .requests import Change, Clamp, ReadyForHotplugRequest

# Room that a VM without any is given where the request names none, in multiples of what it has.
DEFAULT_GROWTH = 4
DEFAULT_SLOTS = 16
# Physical addresses that are not memory: those below 4 GiB, and as much again for what QEMU rounds up.
# Source: QEMU 7.2 hw/i386/pc.c, pc_max_used_gpa: each slot may cost 1 GiB of alignment, the 64-bit PCI hole comes on
# top; an AMD vCPU whose addresses would reach the HyperTransport range has its memory from 1 TiB on instead of 4 GiB.
_LOW_ADDRESSES_BYTES = 8 * GIB
_SLOT_ALIGNMENT_BYTES = GIB
_AMD_RANGE_BYTES, _AMD_MOVED_BYTES = 1012 * GIB, 1020 * GIB
# Source: QEMU 7.2 hw/pci-host/q35.c and i440fx.c, pci-hole64-size.
_Q35_HOLE_BYTES, _I440FX_HOLE_BYTES = 32 * GIB, 2 * GIB
# Arm's lies above the memory, at a multiple of its size, and is given up where there is no room for it.
# Source: QEMU 7.2 hw/arm/virt.c, VIRT_HIGH_PCIE_MMIO.
_ARM_HOLE_BYTES = 512 * GIB
_DEFAULT_PHYS_BITS = 40
# Elsewhere memory ends where the host's does: a limit that no VM has is as good as none.
_ADDRESS_BITS_LIMIT, _POWER_BITS = frozenset({"x86_64", "aarch64"}), 64
# A CPU of so many address bits or fewer reaches nothing above 4 GiB, where all plugged memory is.
_UNREACHING_BITS = 32
# Source: QEMU 7.2 hw/i386/x86.c: from 255 on an id needs X2APIC, and an IOMMU that carries it.
_HIGHEST_APIC_ID = 254


class PrepareGoal(Goal, frozen=True, rename="camel"):
    """The shape of the persistent definition, None for a mere question; what changes, and what had to be clamped."""

    shape: Shape | None = None
    changes: tuple[Change, ...] = ()
    clamped: tuple[Clamp, ...] = ()


def plan_preparation(request: ReadyForHotplugRequest, facts: Facts) -> PrepareGoal:
    """Return the shape that allows for the request's maxima: nothing in it is less than the definition has.

    Raises:
        AgentError: VM_TRANSIENT; VM_OPTED_OUT; MACHINE_NOT_SUPPORTED; TARGET_BELOW_CURRENT.
    """
    config = facts.get_config()
    refuse_first(check_opted_out(facts.domain, "config"))
    machine = find_machine(config)
    if not machine.does:
        refuse_first(check_machine("persistent", config, "plug vCPUs"))
    refuse_first(check_machine_age("persistent", config))
    clamped: list[Clamp] = []
    maximum, topology = _plan_vcpus(request, facts, config, clamped)
    max_memory_bytes, slots = _plan_memory(request, facts, config, clamped)
    devices = _plan_virtio_mems(request, facts, config, max_memory_bytes)
    shape = Shape(
        vcpu_maximum=maximum,
        topology=topology,
        max_memory_bytes=max_memory_bytes,
        slots=slots if devices else max(config.slots, slots - _count_virtio_mem_slots(request, facts, config)),
        cells=_plan_cells(config, maximum) if config.cells or machine.needs_cells else (),
        acpi="plug vCPUs" in machine.by_acpi,
        free_page_reporting=request.free_page_reporting,
        virtio_mems=devices,
    )
    return PrepareGoal(shape=shape, changes=tuple(_changes(config, shape)), clamped=tuple(clamped))


def explain_preparation(goal: PrepareGoal | None, facts: Facts, *, planned: bool) -> list[Problem]:
    """Return what a prepared definition cannot promise: what the guest may leave unused, and what was not checked.

    `planned`: the definition was not made.
    """
    if goal is None or goal.shape is None:
        return []
    shape, found = goal.shape, list[Problem]()
    if planned and goal.changes and not facts.host.has_domain_schema:
        words = "the prepared definition was not checked: /usr/share/libvirt/schemas/domain.rng does not exist"
        found.append(warning(Code.DEFINITION_NOT_CHECKED, words))
    sockets = shape.vcpu_maximum if shape.topology is None else shape.topology[0]
    if shape.virtio_mems:
        found += find_unknown(facts.guest.os) + find_limits(facts.guest.os, dimm=False, virtio_mem=True)
    return found + find_socket_limits(facts.guest.os, sockets)


def is_prepared(config: Definition, shape: Shape) -> bool:
    """Return whether a definition has the shape."""
    return not _changes(config, shape)


def _plan_vcpus(
    request: ReadyForHotplugRequest, facts: Facts, config: Definition, clamped: list[Clamp]
) -> tuple[int, tuple[int, int, int, int] | None]:
    """Return the vCPU maximum, and the topology with its sockets grown; cores and threads stay the user's."""
    asked = request.max_cpu_num
    if asked is not None and asked < config.vcpu_current:
        raise AgentError(
            Code.TARGET_BELOW_CURRENT,
            f'"maxCpuNum" is {asked}, VM {facts.domain.name} has {config.vcpu_current} vCPUs',
            remedy="Request a maximum that is not below the VM's current size.",
        )
    (limit, why), ceiling = find_vcpu_limit(facts.host, config), config.policy.max_cpu_num
    unit = _socket_vcpus(config)
    default = config.vcpu_maximum if config.vcpu_maximum > config.vcpu_current else DEFAULT_GROWTH * config.vcpu_current
    likely = align_up(max(default if asked is None else asked, config.vcpu_maximum, request.cpu_num or 0), unit)
    addressed = _most_addressed(facts, config, min(n for n in (likely, limit, ceiling) if n is not None))
    if addressed is not None and (limit is None or addressed < limit):
        limit, why = addressed, f"more in this topology have APIC ids above {_HIGHEST_APIC_ID}"
    if ceiling is not None and (limit is None or ceiling < limit):
        limit, why = ceiling, f"the VM's policy allows at most {ceiling}"
    if "plug vCPUs" not in find_machine(config).does:
        limit, why = config.vcpu_maximum, f"a {config.machine} of architecture {config.arch} takes none while it runs"
    if limit is None:
        limit = max(asked or 0, request.cpu_num or 0, DEFAULT_GROWTH * config.vcpu_current)
    if asked is None:
        asked = min(limit, default)
    wanted = max(asked, config.vcpu_maximum, request.cpu_num or 0)
    maximum = align_up(wanted, unit)
    if maximum > max(limit, config.vcpu_maximum):
        maximum = max(align_down(limit, unit), config.vcpu_maximum)
        clamped.append(Clamp(field="maxCpuNum", asked=wanted, prepared=maximum, why=why))
    elif maximum != wanted:
        why = f"whole sockets of {unit} vCPUs"
        clamped.append(Clamp(field="maxCpuNum", asked=wanted, prepared=maximum, why=why))
    return maximum, None if config.topology is None else (maximum // unit, *config.topology[1:])


def _socket_vcpus(config: Definition) -> int:
    """Return how many vCPUs one socket has; the number of sockets is what a maximum is raised by."""
    return 1 if config.topology is None else config.topology[1] * config.topology[2] * config.topology[3]


def _most_addressed(facts: Facts, config: Definition, vcpus: int) -> int | None:
    """Return the most vCPUs, in whole sockets, whose APIC ids need no X2APIC; None where ids of `vcpus` are no limit.

    Each level of a topology takes whole bits of the id, so ids have gaps where it is no power of two.
    Source: QEMU 7.2 include/hw/i386/topology.h.
    """
    if config.topology is None or not has_low_ids(facts.host, config, vcpus):
        return None
    stride, last = 1, 0
    for count in reversed(config.topology[1:]):
        last += (count - 1) * stride
        stride <<= (count - 1).bit_length()
    return max(0, (_HIGHEST_APIC_ID - last) // stride + 1) * _socket_vcpus(config)


def _plan_memory(
    request: ReadyForHotplugRequest, facts: Facts, config: Definition, clamped: list[Clamp]
) -> tuple[int | None, int]:
    """Return maxMemory and slots: below what the vCPUs can address, or QEMU would not start; None for no room at all.

    QEMU starts with no maxMemory that is what the VM has already.
    """
    asked = request.max_memory_size
    if asked is not None and asked < config.total_bytes:
        raise AgentError(
            Code.TARGET_BELOW_CURRENT,
            f'"maxMemorySize" is {format_size(asked)}, VM {facts.domain.name} has {format_size(config.total_bytes)}',
            remedy="Request a maximum that is not below the VM's current size.",
        )
    machine = find_machine(config)
    if not machine.does & {"plug dimms", "plug virtio-mem"}:
        wanted, has = max(asked or 0, request.memory_size or 0), config.max_memory_bytes or config.total_bytes
        if wanted > has:
            why = f"a {config.machine} of architecture {config.arch} takes no memory while it runs"
            clamped.append(Clamp(field="maxMemorySize", asked=wanted, prepared=has, why=why))
        return config.max_memory_bytes, config.slots
    if asked is None:
        asked = config.max_memory_bytes or DEFAULT_GROWTH * config.total_bytes
    former = config.max_memory_bytes or config.total_bytes
    block = machine.block_bytes
    wanted = align_up(max(asked, request.memory_size or 0, former), block)
    bits = _find_phys_bits(facts, config)
    taken = _count_virtio_mem_slots(request, facts, config)
    slots = _plan_slots(request, config, bits, former, taken, clamped)
    ceiling, allowed = _addressable_bytes(config, bits, slots), config.policy.max_memory_bytes
    why = _explain_bits(facts, config, bits, ceiling, slots)
    if allowed is not None and allowed < ceiling:
        ceiling, why = align_down(allowed, block), f"the VM's policy allows at most {format_size(allowed)}"
    prepared = wanted if wanted <= ceiling or wanted == former else max(ceiling, former)
    if prepared != wanted:
        clamped.append(Clamp(field="maxMemorySize", asked=wanted, prepared=prepared, why=why))
    if config.max_memory_bytes is None and prepared <= config.total_bytes:
        return None, config.slots
    return prepared, slots


def _explain_bits(facts: Facts, config: Definition, bits: int, ceiling: int, slots: int) -> str:
    is_known = config.phys_bits is not None or facts.host.phys_bits is not None
    have = (
        f"the vCPUs have {bits} physical address bits"
        if is_known
        else f"the vCPUs have at least {bits} physical address bits"
    )
    return f"{have}, which leave {format_size(ceiling)} with {slots} slots"


def _find_phys_bits(facts: Facts, config: Definition) -> int:
    """Return how many physical address bits the vCPUs can use; under KVM no more than the host has."""
    if config.arch not in _ADDRESS_BITS_LIMIT:
        return _POWER_BITS
    bits = config.phys_bits or facts.host.phys_bits or _DEFAULT_PHYS_BITS
    bounds = (config.phys_bits_limit, facts.host.phys_bits if config.hypervisor == "kvm" else None)
    return min([bits, *(bound for bound in bounds if bound is not None)])


def _plan_slots(
    request: ReadyForHotplugRequest,
    config: Definition,
    bits: int,
    former_bytes: int,
    taken: int,
    clamped: list[Clamp],
) -> int:
    """Return the slots, and those that new virtio-mem devices take besides; never fewer than now.

    Each costs addresses, so where there are few, there are fewer slots.
    """
    asked = slots = max(request.slots or config.slots or DEFAULT_SLOTS, config.slots) + taken
    most = find_machine(config).most_slots
    if slots > max(most, config.slots):
        slots = max(most, config.slots)
        clamped.append(
            Clamp(field="slots", asked=asked, prepared=slots, why=f"a {config.machine} has at most {most} memory slots")
        )
        asked = slots
    fewest = min(slots, (config.slots or 1) + taken)
    while slots > fewest and _addressable_bytes(config, bits, slots) < former_bytes + find_machine(config).block_bytes:
        slots = max(fewest, slots // 2)
    if slots != asked and bits > _UNREACHING_BITS:
        why = f"each slot needs 1 GiB of an address space of {bits} bits"
        clamped.append(Clamp(field="slots", asked=asked, prepared=slots, why=why))
    return slots


def _addressable_bytes(config: Definition, bits: int, slots: int) -> int:
    """Return the most memory that QEMU starts with."""
    if bits <= _UNREACHING_BITS:
        return 0
    hole = config.pci_hole_bytes
    if config.arch == "aarch64":
        hole = min(_ARM_HOLE_BYTES, 1 << bits - 1)
        return max(0, align_down((1 << bits) - hole - _LOW_ADDRESSES_BYTES - slots * _SLOT_ALIGNMENT_BYTES, GIB))
    if hole is None:
        hole = _Q35_HOLE_BYTES if "q35" in config.machine else _I440FX_HOLE_BYTES
    space = (1 << bits) - hole - _LOW_ADDRESSES_BYTES - slots * _SLOT_ALIGNMENT_BYTES
    beyond_range = (1 << bits) - _AMD_RANGE_BYTES
    return max(0, align_down(space - min(max(0, beyond_range), _AMD_MOVED_BYTES), GIB))


def _plan_virtio_mems(
    request: ReadyForHotplugRequest, facts: Facts, config: Definition, max_memory_bytes: int | None
) -> tuple[VirtioMemShape, ...]:
    """Return a device for each node that has none, which share the room up to the maximum.

    Raises:
        AgentError: MACHINE_NOT_SUPPORTED; MEMORY_LOCKED; GUEST_OS_UNABLE.
    """
    if request.memory_device != "virtio-mem":
        return ()
    if "plug virtio-mem" not in find_machine(config).does:
        refuse_first(check_machine("persistent", config, "plug virtio-mem"))
    refuse_first(check_unlocked(facts, "config"))
    refuse_first(check_passes_nothing(facts, "config"))
    refuse_first(check_virtio_mem(facts.guest.os, config.arch))
    nodes = _find_nodes_without_virtio_mem(config)
    room = max(0, (max_memory_bytes or 0) - config.total_bytes)
    share, devices = room // max(1, len(nodes)), list[VirtioMemShape]()
    for node in nodes:
        # QEMU starts with whole blocks alone, which are no smaller than the page behind them.
        block = virtio_mem_block_bytes(facts, node)
        size = align_down(share, max(block, find_machine(config).block_bytes))
        devices += [VirtioMemShape(node=node, size_bytes=size, block_bytes=block)] if size else []
    return tuple(devices)


def _find_nodes_without_virtio_mem(config: Definition) -> list[int]:
    has = {device.node or 0 for device in config.virtio_mems}
    return [node for node in ([cell.id for cell in config.cells] or [0]) if node not in has]


def _count_virtio_mem_slots(request: ReadyForHotplugRequest, facts: Facts, config: Definition) -> int:
    """Return how many slots the virtio-mem devices would take that are asked for."""
    if request.memory_device != "virtio-mem" or not facts.host.virtio_mem_takes_slots:
        return 0
    return len(_find_nodes_without_virtio_mem(config))


def _plan_cells(config: Definition, maximum: int) -> tuple[CellShape, ...]:
    """Return the cells: those that are there keep memory and vCPUs, and whole new sockets make them as even as can be.

    A cell without vCPUs keeps none: with some it would be another machine.
    """
    if not config.cells:
        return (CellShape(id=0, cpus=tuple(range(maximum)), memory_bytes=config.boot_bytes),)
    cpus = {cell.id: set(cell.cpus) for cell in config.cells}
    takers = [cell.id for cell in config.cells if cell.cpus] or [config.cells[0].id]
    unit, sockets = _socket_vcpus(config), dict[int, list[int]]()
    for vcpu in sorted(set(range(maximum)) - set().union(*cpus.values())):
        home = next((cell for cell in takers if cpus[cell] & set(_siblings(vcpu, unit))), None)
        if home is not None:
            cpus[home].add(vcpu)
        else:
            sockets.setdefault(vcpu // unit, []).append(vcpu)
    new, shares = list(sockets.values()), dict.fromkeys(takers, 0)
    for _ in new:
        shares[min(takers, key=lambda cell: (len(cpus[cell]) + shares[cell] * unit, cell))] += 1
    for cell, share in shares.items():
        cpus[cell].update(vcpu for socket in new[:share] for vcpu in socket)
        new = new[share:]
    return tuple(
        CellShape(id=cell.id, cpus=tuple(sorted(cpus[cell.id])), memory_bytes=cell.memory_bytes)
        for cell in config.cells
    )


def _siblings(vcpu: int, unit: int) -> range:
    """Return the vCPUs of the same socket."""
    return range(vcpu // unit * unit, vcpu // unit * unit + unit)


def _changes(config: Definition, shape: Shape) -> list[Change]:
    """Return what the definition has and is to have, where that differs."""
    cells = {str(cell.id): format_ids(cell.cpus) for cell in config.cells}
    prepared_cells = {str(cell.id): format_ids(cell.cpus) for cell in shape.cells}
    fields: dict[str, tuple[Any, Any]] = {
        "maxCpuNum": (config.vcpu_maximum, shape.vcpu_maximum),
        "topology": (config.topology, shape.topology),
        "maxMemorySize": (config.max_memory_bytes, shape.max_memory_bytes),
        "slots": (config.slots, shape.slots),
        "numaCells": (cells, prepared_cells),
        "acpi": (config.acpi, shape.acpi or config.acpi),
        "balloon": (config.balloon, True),
        "guestAgentChannel": (config.agent_channel, True),
        "freePageReporting": (config.free_page_reporting, shape.free_page_reporting or config.free_page_reporting),
    }
    sizes = {device.node or 0: device.size_bytes for device in config.virtio_mems}
    if added := {device.node: device.size_bytes for device in shape.virtio_mems if device.node not in sizes}:
        fields["virtioMem"] = (_tell_sizes(sizes), _tell_sizes(sizes | added))
    return [
        Change(field=name, former=msgspec.to_builtins(former), prepared=msgspec.to_builtins(prepared))
        for name, (former, prepared) in fields.items()
        if former != prepared
    ]


def _tell_sizes(sizes: dict[int, int]) -> dict[str, str]:
    return {str(node): format_size(size_bytes) for node, size_bytes in sorted(sizes.items())}
