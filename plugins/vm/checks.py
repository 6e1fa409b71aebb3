"""What stands in the way of hotplug: each check yields every blocker that it finds.

Planners refuse with the first one; ReadyForHotplug tells them all. So a VM that is called ready is a VM that a
planner will not refuse.
"""

from collections.abc import Iterable, Iterator

from kvmagent.model.command import Affect
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest
from kvmagent.model.units import MIB, align_up, format_ids, format_size

from .requests import Blocker

# Linux adds memory in blocks: the guest agent tells their size, and without it the kernel's smallest is assumed.
# Source: Linux Documentation/admin-guide/mm/memory-hotplug.rst; Observed: 128 MiB on Linux 6.1, x86-64.
DEFAULT_BLOCK_BYTES = {"ppc64le": 256 * MIB, "ppc64": 256 * MIB}
X86_BLOCK_BYTES = 128 * MIB
# What the host keeps for itself when memory is plugged.
HOST_RESERVE_BYTES = 256 * MIB


def block_bytes(facts: Facts) -> int:
    """Return the size that added memory must be a multiple of for the guest to use it."""
    if facts.guest.block_bytes is not None:
        return facts.guest.block_bytes
    definition = facts.domain.live or facts.domain.config
    arch = definition.arch if definition else "x86_64"
    return DEFAULT_BLOCK_BYTES.get(arch, X86_BLOCK_BYTES)


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
    """The VM must be there in the form that is to be changed, and no other job may hold it."""
    if affect != "config" and domain.live is None:
        yield blocker(Code.VM_NOT_RUNNING, f"VM {domain.name} is {domain.state}, and affect is {affect}")
    if affect != "live" and domain.config is None:
        yield blocker(Code.VM_TRANSIENT, f"VM {domain.name} is transient, and affect is {affect}")
    if domain.job is not None:
        yield blocker(Code.LIBVIRT_BUSY, f"VM {domain.name} has a {domain.job} job in progress")


def check_cpu(facts: Facts, affect: Affect, cpu_num: int) -> Iterator[Blocker]:
    """Each definition to be changed must allow `cpu_num` vCPUs."""
    for name, definition in _definitions(facts.domain, affect):
        if not definition.acpi:
            yield blocker(Code.NO_ACPI, f"the {name} definition has no ACPI", needs_restart=True)
        if cpu_num > definition.vcpu_maximum:
            yield blocker(
                Code.CPU_ABOVE_MAXIMUM,
                f"{cpu_num} vCPUs were asked for, the {name} definition allows at most {definition.vcpu_maximum}",
                needs_restart=True,
            )
        if definition.topology is not None:
            sockets, dies, cores, threads = definition.topology
            product = sockets * dies * cores * threads
            if product != definition.vcpu_maximum:
                yield blocker(
                    Code.CPU_TOPOLOGY_MISMATCH,
                    f"the {name} definition's topology makes {product} vCPUs, its maximum is {definition.vcpu_maximum}",
                    needs_restart=True,
                )


def check_dimm_support(facts: Facts, affect: Affect) -> Iterator[Blocker]:
    """Each definition to be changed must be able to take a dimm at all."""
    quantum = block_bytes(facts)
    for name, definition in _definitions(facts.domain, affect):
        if not definition.acpi:
            yield blocker(Code.NO_ACPI, f"the {name} definition has no ACPI", needs_restart=True)
        if not definition.cells:
            yield blocker(Code.NO_NUMA_CELL, f"the {name} definition has no guest NUMA cell", needs_restart=True)
        else:
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
        for device in definition.devices:
            if device.model == "dimm" and device.size_bytes % quantum:
                yield blocker(
                    Code.MEMORY_DEVICE_MISALIGNED,
                    f"{device.alias or 'a dimm'} of the {name} definition has {format_size(device.size_bytes)}, "
                    f"not a multiple of the guest's block of {format_size(quantum)}",
                )


def check_dimm_room(facts: Facts, affect: Affect, sizes_bytes: tuple[int, ...], node: int | None) -> Iterator[Blocker]:
    """Each definition to be changed must have slots and address room for these dimms, and the node.

    Only what `check_dimm_support` passed is judged.
    """
    wanted = sum(sizes_bytes)
    for name, definition in _definitions(facts.domain, affect):
        nodes = frozenset(cell.id for cell in definition.cells)
        if node is not None and nodes and node not in nodes:
            yield blocker(
                Code.NUMA_NODE_NOT_FOUND,
                f"guest NUMA node {node} was asked for, the {name} definition has {format_ids(nodes)}",
            )
        if definition.max_memory_bytes is None:
            continue
        if definition.total_bytes + wanted > definition.max_memory_bytes:
            yield blocker(
                Code.MEMORY_ABOVE_MAXIMUM,
                f"{format_size(definition.total_bytes)} and {format_size(wanted)} more were asked for, "
                f"the {name} definition allows at most {format_size(definition.max_memory_bytes)}",
                needs_restart=True,
            )
        free = definition.slots - definition.slots_used
        if len(sizes_bytes) > free:
            yield blocker(
                Code.SLOTS_EXHAUSTED,
                f"{len(sizes_bytes)} memory slots are needed, the {name} definition has {free} of "
                f"{definition.slots} free",
                needs_restart=True,
            )
    available = facts.host.memory_available_bytes
    if affect != "config" and available is not None and wanted + HOST_RESERVE_BYTES > available:
        yield blocker(
            Code.HOST_MEMORY_SHORT,
            f"{format_size(wanted)} are needed and {format_size(HOST_RESERVE_BYTES)} kept free, "
            f"the host has {format_size(available)} available",
        )


def check_balloon(facts: Facts, affect: Affect, size_bytes: int) -> Iterator[Blocker]:
    """Each definition to be changed must have a balloon, which gives back no more than the VM has."""
    for name, definition in _definitions(facts.domain, affect):
        if not definition.balloon:
            yield blocker(Code.NO_BALLOON, f"the {name} definition has no memory balloon device", needs_restart=True)
        if size_bytes > definition.balloon_total_bytes:
            yield blocker(
                Code.BALLOON_ABOVE_TOTAL,
                f"{format_size(size_bytes)} were asked for by balloon, the {name} definition has "
                f"{format_size(definition.balloon_total_bytes)}",
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
    for command, words in guest.refused.items():
        yield blocker(Code.GUEST_AGENT_REFUSED, f"{command}: {words}")


def round_up_addition(facts: Facts, current_bytes: int, target_bytes: int, *, strict: bool) -> int:
    """Return what to add to reach at least the target in whole guest blocks.

    Raises:
        AgentError: MEMORY_NOT_ALIGNED, when it would have to be rounded and `strict` forbids it.
    """
    quantum = block_bytes(facts)
    wanted = target_bytes - current_bytes
    aligned = align_up(wanted, quantum)
    if strict and aligned != wanted:
        raise AgentError(
            Code.MEMORY_NOT_ALIGNED,
            f"{format_size(wanted)} more were asked for, the guest takes multiples of {format_size(quantum)}",
            remedy=f"Ask for a total of {current_bytes + aligned - quantum} or {current_bytes + aligned} bytes, "
            "or leave strict out to have it rounded up.",
        )
    return aligned


def _definitions(domain: Domain, affect: Affect) -> Iterator[tuple[str, Definition]]:
    if affect != "config" and domain.live is not None:
        yield "running", domain.live
    if affect != "live" and domain.config is not None:
        yield "persistent", domain.config


def blocker(code: Code, message: str, *, needs_restart: bool = False) -> Blocker:
    """Return a blocker with the code's own remedy."""
    return Blocker(code=code, message=message, remedy=CODES[code].remedy, needs_restart=needs_restart)
