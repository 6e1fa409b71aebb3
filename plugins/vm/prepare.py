"""What a persistent definition has to be so that its next start can be hot-plugged, and still starts."""

import msgspec

from kvmagent.model.command import Goal
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.steps import CellShape, Shape
from kvmagent.model.units import GIB, align_down, align_up, format_ids, format_size

from .checks import X86_BLOCK_BYTES, check_opted_out, refuse_first, vcpu_limit
from .requests import Change, Clamp, ReadyForHotplugRequest

# Room that a VM without any is given where the request names none, in multiples of what it has.
DEFAULT_GROWTH = 4
DEFAULT_SLOTS = 16
PREPARABLE_ARCHES = frozenset({"x86_64"})
# Physical addresses that are not memory: the hole below 4 GiB, 64-bit PCI windows, alignment; at most a quarter.
# Source: QEMU 7.2 hw/i386/pc.c: each slot may cost 1 GiB of alignment; from 40 bits up memory of an AMD VM may begin
# at 1 TiB. Observed: 40 bits took 990 GiB with 16 slots, and 900 to 950 GiB with 64.
_OTHER_ADDRESSES_BYTES = 64 * GIB
_SLOT_ALIGNMENT_BYTES = GIB
_AMD_START_BYTES, _AMD_FROM_BITS = 1024 * GIB, 41
_DEFAULT_PHYS_BITS = 40


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
    if config.arch not in PREPARABLE_ARCHES or config.machine.startswith(("microvm", "isapc")):
        raise AgentError(
            Code.MACHINE_NOT_SUPPORTED, f"VM {facts.domain.name} is a {config.machine} of architecture {config.arch}"
        )
    clamped: list[Clamp] = []
    maximum, topology = _plan_vcpus(request, facts, config, clamped)
    slots = max(request.slots or config.slots or DEFAULT_SLOTS, config.slots)
    shape = Shape(
        vcpu_maximum=maximum,
        topology=topology,
        max_memory_bytes=_plan_max_memory(request, facts, config, slots, clamped),
        slots=slots,
        cells=_plan_cells(config, maximum),
    )
    return PrepareGoal(shape=shape, changes=tuple(_changes(config, shape)), clamped=tuple(clamped))


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
            f"maxCpuNum is {asked}, VM {facts.domain.name} has {config.vcpu_current} vCPUs",
            remedy="Ask for a maximum that is not below what the VM has.",
        )
    limit, ceiling = vcpu_limit(facts.host, config), config.policy.max_cpu_num
    why = f"the hypervisor gives at most {limit} to a {config.machine} ({config.hypervisor})"
    if ceiling is not None and ceiling < limit:
        limit, why = ceiling, f"the VM's policy allows at most {ceiling}"
    if asked is None:
        grown = config.vcpu_maximum > config.vcpu_current
        asked = config.vcpu_maximum if grown else min(limit, DEFAULT_GROWTH * config.vcpu_current)
    wanted = max(asked, config.vcpu_maximum, request.cpu_num or 0)
    unit = 1
    if config.topology is not None:
        unit = config.topology[1] * config.topology[2] * config.topology[3]
    maximum = align_up(wanted, unit)
    if maximum > max(limit, config.vcpu_maximum):
        maximum = max(align_down(limit, unit), config.vcpu_maximum)
        clamped.append(Clamp(field="maxCpuNum", asked=wanted, prepared=maximum, why=why))
    elif maximum != wanted:
        why = f"whole sockets of {unit} vCPUs"
        clamped.append(Clamp(field="maxCpuNum", asked=wanted, prepared=maximum, why=why))
    return maximum, None if config.topology is None else (maximum // unit, *config.topology[1:])


def _plan_max_memory(
    request: ReadyForHotplugRequest, facts: Facts, config: Definition, slots: int, clamped: list[Clamp]
) -> int:
    """Return maxMemory: below what the vCPUs can address, or QEMU would not start."""
    asked = request.max_memory_size
    if asked is not None and asked < config.total_bytes:
        raise AgentError(
            Code.TARGET_BELOW_CURRENT,
            f"maxMemorySize is {format_size(asked)}, VM {facts.domain.name} has {format_size(config.total_bytes)}",
            remedy="Ask for a maximum that is not below what the VM has.",
        )
    if asked is None:
        asked = config.max_memory_bytes or DEFAULT_GROWTH * config.total_bytes
    former = config.max_memory_bytes or config.total_bytes
    wanted = align_up(max(asked, request.memory_size or 0, former), X86_BLOCK_BYTES)
    bits = config.phys_bits or facts.host.phys_bits or _DEFAULT_PHYS_BITS
    ceiling, allowed = _addressable_bytes(bits, slots), config.policy.max_memory_bytes
    why = f"the vCPUs have {bits} physical address bits, which leave {format_size(ceiling)} with {slots} slots"
    if allowed is not None and allowed < ceiling:
        ceiling, why = align_down(allowed, X86_BLOCK_BYTES), f"the VM's policy allows at most {format_size(allowed)}"
    if wanted <= ceiling or wanted == former:
        return wanted
    prepared = max(ceiling, former)
    clamped.append(Clamp(field="maxMemorySize", asked=wanted, prepared=prepared, why=why))
    return prepared


def _addressable_bytes(bits: int, slots: int) -> int:
    space = 1 << bits
    other = min(_OTHER_ADDRESSES_BYTES, space // 4) + slots * _SLOT_ALIGNMENT_BYTES
    return align_down(space - other - (_AMD_START_BYTES if bits >= _AMD_FROM_BITS else 0), GIB)


def _plan_cells(config: Definition, maximum: int) -> tuple[CellShape, ...]:
    """Return the cells: those that are there keep memory and vCPUs, and new vCPUs make them as even as can be."""
    if not config.cells:
        return (CellShape(id=0, cpus=tuple(range(maximum)), memory_bytes=config.boot_bytes),)
    cpus = {cell.id: set(cell.cpus) for cell in config.cells}
    new = sorted(set(range(maximum)) - set().union(*cpus.values()))
    shares = dict.fromkeys(cpus, 0)
    for _ in new:
        shares[min(cpus, key=lambda cell: (len(cpus[cell]) + shares[cell], cell))] += 1
    for cell, share in shares.items():
        cpus[cell] |= set(new[:share])
        new = new[share:]
    return tuple(
        CellShape(id=cell.id, cpus=tuple(sorted(cpus[cell.id])), memory_bytes=cell.memory_bytes)
        for cell in config.cells
    )


def _changes(config: Definition, shape: Shape) -> list[Change]:
    """Return what the definition has and is to have, where that differs."""
    cells = {str(cell.id): format_ids(cell.cpus) for cell in config.cells}
    prepared_cells = {str(cell.id): format_ids(cell.cpus) for cell in shape.cells}
    fields = {
        "maxCpuNum": (config.vcpu_maximum, shape.vcpu_maximum),
        "topology": (config.topology, shape.topology),
        "maxMemorySize": (config.max_memory_bytes, shape.max_memory_bytes),
        "slots": (config.slots, shape.slots),
        "numaCells": (cells, prepared_cells),
        "acpi": (config.acpi, True),
        "balloon": (config.balloon, True),
        "guestAgentChannel": (config.agent_channel, True),
    }
    return [
        Change(field=name, former=msgspec.to_builtins(former), prepared=msgspec.to_builtins(prepared))
        for name, (former, prepared) in fields.items()
        if former != prepared
    ]
