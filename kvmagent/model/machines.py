"""What machines of each architecture can change while they run, and what they need for it. The only such table.

    x86-64   vCPUs, dimms, virtio-mem; told to the guest by ACPI, where the guest knows its memory from NUMA cells
    POWER    vCPUs by whole cores and dimms, told by firmware calls; neither ACPI nor cells
    Arm      memory alone: virtio-mem, and dimms where there is ACPI; no vCPU comes or goes
    s390x    vCPUs come, and none goes; memory by the balloon alone

Source: QEMU 7.2 hw/i386, hw/ppc/spapr.c, hw/arm/virt.c, hw/s390x; libvirt 9.0 qemu_validate.c.
Observed: QEMU 7.2; tests/guest/test_power.py, test_foreign.py.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from kvmagent.model.errors import CODES, Code
from kvmagent.model.facts import Definition
from kvmagent.model.reply import Blocker
from kvmagent.model.units import GIB, KIB, MIB

Ability = Literal["plug vCPUs", "unplug vCPUs", "plug dimms", "plug virtio-mem"]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the machines of one architecture do, of those types that begin so.

    `by_acpi` is what they cannot do without ACPI, `needs_cells` whether memory is plugged into guest NUMA cells alone.
    `block_bytes` is what a dimm must be a multiple of where the guest does not tell, `largest_block_bytes` what it is
    believed to be at most, `balloon_page_bytes` what the guest gives back at once, `most_slots` how many memory slots
    there can be.
    """

    types: tuple[str, ...]
    but: tuple[str, ...] = ()
    does: frozenset[Ability]
    by_acpi: frozenset[Ability] = frozenset()
    needs_cells: bool = False
    block_bytes: int
    largest_block_bytes: int = 1 * GIB
    balloon_page_bytes: int
    most_slots: int = 256


_X86 = Machine(
    types=("",),
    but=("microvm", "isapc"),
    does=frozenset({"plug vCPUs", "unplug vCPUs", "plug dimms", "plug virtio-mem"}),
    by_acpi=frozenset({"plug vCPUs", "unplug vCPUs", "plug dimms", "plug virtio-mem"}),
    needs_cells=True,
    block_bytes=128 * MIB,
    largest_block_bytes=512 * MIB,
    balloon_page_bytes=4 * KIB,
)
_POWER = Machine(
    types=("pseries",),
    does=frozenset({"plug vCPUs", "unplug vCPUs", "plug dimms"}),
    block_bytes=256 * MIB,
    balloon_page_bytes=64 * KIB,
    most_slots=32,
)
# A block is 128 MiB with pages of 4 KiB and 512 MiB with pages of 64 KiB, before Linux 5.12 1 GiB with either. Source:
# Linux arch/arm64, sparsemem.h.
_ARM = Machine(
    types=("virt",),
    does=frozenset({"plug dimms", "plug virtio-mem"}),
    by_acpi=frozenset({"plug dimms"}),
    needs_cells=True,
    block_bytes=512 * MIB,
    balloon_page_bytes=64 * KIB,
)
_S390X = Machine(
    types=("s390-ccw-virtio",),
    does=frozenset({"plug vCPUs"}),
    block_bytes=256 * MIB,
    balloon_page_bytes=4 * KIB,
)
_NONE = Machine(types=(), does=frozenset(), block_bytes=128 * MIB, balloon_page_bytes=64 * KIB)
# x86-64: a block is 128 MiB (with 32 bits up to 512 MiB) where boot memory ends below 64 GiB, of which up to 4 GiB are
# the hole for PCI devices; else up to 2 GiB. Source: Linux arch/x86/mm/init_64.c, probe_memory_block_size; sparsemem.h.
_X86_LARGE_FROM_BYTES, _X86_LARGE_BYTES = 60 * GIB, 2 * GIB
# s390x: a block is no smaller than the machine's increment, of which there are at most so many: 1 GiB up to 1020 GiB of
# boot memory, 8 GiB up to 8160 GiB, and so on; machine types from 5.0 on have increments of 1 MiB.
# Source: QEMU hw/s390x/sclp.c, MAX_STORAGE_INCREMENTS; Linux arch/s390/mm/init.c, memory_block_size_bytes.
_S390X_INCREMENTS = 1020
# QEMU moves the memory above 4 GiB of an AMD vCPU to 1 TiB where the highest address of the VM reaches 1012 GiB; with
# that its boot memory ends far above 64 GiB. The bound leaves room for the PCI hole and what QEMU rounds up.
# Source: QEMU 7.1 hw/i386/pc.c, pc_max_used_gpa, AMD_HT_START.
_AMD_MOVED_FROM_BYTES = 900 * GIB
_MACHINES = {"x86_64": _X86, "ppc64": _POWER, "ppc64le": _POWER, "aarch64": _ARM, "s390x": _S390X}
_CANNOT: dict[Ability, str] = {
    "plug vCPUs": "takes no vCPUs while it runs",
    "unplug vCPUs": "gives up no vCPUs while it runs",
    "plug dimms": "takes no dimms while it runs",
    "plug virtio-mem": "takes no virtio-mem device",
}


def find_machine(definition: Definition) -> Machine:
    """Return what a definition's machine does; nothing where it is not known."""
    machine = _MACHINES.get(definition.arch, _NONE)
    is_known = definition.machine.startswith(machine.types) and not definition.machine.startswith(machine.but)
    return machine if is_known else _NONE


def find_largest_block_bytes(definition: Definition) -> int:
    """Return the largest memory block that the guest's kernel can have: what it says is a claim, and dimms follow it.

    A block is no larger than what the VM was started with, but may be as large as the architecture's usual block.
    """
    machine, boot = find_machine(definition), definition.boot_bytes
    most = machine.largest_block_bytes
    if definition.arch == "x86_64" and (boot >= _X86_LARGE_FROM_BYTES or _may_be_moved(definition)):
        most = _X86_LARGE_BYTES
    elif definition.arch == "s390x":
        most = max(most, 1 << (boot // (_S390X_INCREMENTS + 1)).bit_length())
    return max(machine.block_bytes, min(boot, most))


def _may_be_moved(definition: Definition) -> bool:
    """Return whether its memory above 4 GiB would be moved if it had an AMD vCPU; each slot may cost 1 GiB more."""
    memory_bytes = max(definition.boot_bytes, definition.max_memory_bytes or 0)
    return memory_bytes + definition.slots * GIB + (definition.pci_hole_bytes or 0) >= _AMD_MOVED_FROM_BYTES


def check_machine(name: str, definition: Definition, ability: Ability) -> Iterator[Blocker]:
    """The machine must be one that does this at all, and have what it does it by."""
    machine = find_machine(definition)
    what = f"a {definition.machine or 'machine'} of architecture {definition.arch}"
    if ability not in machine.does:
        other = _find_other(machine, ability)
        yield Blocker(
            code=Code.MACHINE_NOT_SUPPORTED,
            message=f"the {name} definition is {what}, which {_CANNOT[ability]}",
            remedy=other or CODES[Code.MACHINE_NOT_SUPPORTED].remedy,
            needs_restart=other is None,
        )
    elif ability in machine.by_acpi and not definition.acpi:
        other = _find_other(machine, ability)
        yield Blocker(
            code=Code.NO_ACPI,
            message=f"the {name} definition has no ACPI" + (f", and without it {what} takes no dimms" if other else ""),
            remedy=other or CODES[Code.NO_ACPI].remedy,
            needs_restart=other is None,
        )


def _find_other(machine: Machine, ability: Ability) -> str | None:
    """Return the other way to have memory, where the machine has one that needs no restart."""
    if ability == "plug dimms" and "plug virtio-mem" in machine.does - machine.by_acpi:
        return 'Use "method": "virtio-mem".'
    if ability == "plug virtio-mem" and "plug dimms" in machine.does:
        return 'Use "method": "dimm".'
    return None
