"""Memory of a running VM that its guest does not use, and how it could be removed. Pure; it removes nothing."""

from typing import Literal

import msgspec

from kvmagent.model.facts import Definition, Facts
from kvmagent.model.units import MIB, align_down

# What a guest keeps of free memory: a part of what it has, and never less than this. An eighth is what a Linux guest
# turns to page cache again within minutes; it is no promise that the guest stays as fast.
_KEPT_PART, _KEPT_BYTES = 8, 256 * MIB

Means = Literal["virtio-mem", "dimm", "balloon"]


class Removable(msgspec.Struct, frozen=True, gc=False):
    """What of a VM could leave at all: of virtio-mem devices, as whole dimms, into the balloon; bytes."""

    virtio_mem_bytes: int = 0
    dimms_bytes: tuple[int, ...] = ()
    balloon_bytes: int = 0


class Way(msgspec.Struct, frozen=True, rename="camel"):
    """How many bytes one way could remove at most."""

    means: Means
    size: int


class Reclaimable(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One running VM, in bytes: what it may use, what QEMU uses, what its guest leaves unused, what could be removed.

    `unused` is None if the guest does not report it. `reclaimable` is the largest of `ways`, which overlap: each
    is what that way alone could remove.
    """

    vm_uuid: str
    name: str
    promised: int
    resident: int | None
    unused: int | None
    reclaimable: int
    ways: list[Way]


def find_removable(live: Definition) -> Removable:
    """Return what of a running VM could leave, were it not used."""
    return Removable(
        virtio_mem_bytes=sum(device.plugged_bytes for device in live.virtio_mems),
        dimms_bytes=tuple(sorted(dimm.size_bytes for dimm in live.dimms)),
        balloon_bytes=live.balloon_total_bytes if live.balloon_gives_back else 0,
    )


def find_spare(total_bytes: int, unused_bytes: int) -> int:
    """Return what a guest of so much memory could do without, of what it does not use."""
    return max(0, unused_bytes - max(_KEPT_BYTES, total_bytes // _KEPT_PART))


def find_ways(removable: Removable, spare_bytes: int) -> list[Way]:
    """Return by which means so much could leave. Whole dimms alone do, the smallest first."""
    ways = []
    if size := align_down(min(removable.virtio_mem_bytes, spare_bytes), 2 * MIB):
        ways.append(Way("virtio-mem", size))
    by_dimm = 0
    for size in removable.dimms_bytes:
        if by_dimm + size > spare_bytes:
            break
        by_dimm += size
    if by_dimm:
        ways.append(Way("dimm", by_dimm))
    if size := align_down(min(removable.balloon_bytes, spare_bytes), MIB):
        ways.append(Way("balloon", size))
    return ways


def find_unused(facts: Facts) -> tuple[int, int] | None:
    """Return what a guest has and what of it it does not use: as its agent says, else its balloon driver; or None."""
    guest = facts.guest
    if guest.mem_total_bytes is not None and guest.mem_available_bytes is not None:
        return guest.mem_total_bytes, guest.mem_available_bytes
    return facts.domain.balloon_unused


def find_reclaimable(facts: Facts, *, promised_bytes: int, resident_bytes: int | None) -> Reclaimable:
    """Return what could come back of a running VM.

    Raises:
        AgentError: VM_NOT_RUNNING.
    """
    removable, unused = find_removable(facts.get_live()), find_unused(facts)
    ways = [] if unused is None else find_ways(removable, find_spare(*unused))
    return Reclaimable(
        vm_uuid=facts.domain.uuid,
        name=facts.domain.name,
        promised=promised_bytes,
        resident=resident_bytes,
        unused=None if unused is None else unused[1],
        reclaimable=max((way.size for way in ways), default=0),
        ways=ways,
    )
