"""What of a running VM's memory its guest does not use, and by which means it could leave. Pure; nothing is taken."""

from typing import Literal

import msgspec

from kvmagent.model.facts import Facts
from kvmagent.model.units import MIB, align_down

# What a guest keeps of free memory: a part of what it has, and never less than this. An eighth is what a Linux guest
# turns to page cache again within minutes; it is no promise that the guest stays as fast.
_KEPT_PART, _KEPT_BYTES = 8, 256 * MIB

Means = Literal["virtio-mem", "dimm", "balloon"]


class Way(msgspec.Struct, frozen=True, rename="camel"):
    """How much could leave by one means: at most so many bytes."""

    means: Means
    size: int


class Reclaimable(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One running VM: what it may have, what its QEMU has now, what its guest does not use, what could leave; bytes.

    `unused` is None where the guest tells nothing. `reclaimable` is the most that could leave by any of `ways`, which
    overlap: each is what could leave by it alone.
    """

    vm_uuid: str
    name: str
    promised: int
    resident: int | None
    unused: int | None
    reclaimable: int
    ways: list[Way]


def find_reclaimable(facts: Facts, *, promised_bytes: int, resident_bytes: int | None) -> Reclaimable:
    """Return what could come back of a running VM.

    Raises:
        AgentError: VM_NOT_RUNNING.
    """
    live, guest = facts.get_live(), facts.guest
    unused = guest.mem_available_bytes
    spare = 0
    if unused is not None and guest.mem_total_bytes is not None:
        spare = max(0, unused - max(_KEPT_BYTES, guest.mem_total_bytes // _KEPT_PART))
    ways = []
    by_virtio_mem = sum(device.plugged_bytes for device in live.virtio_mems)
    if size := align_down(min(by_virtio_mem, spare), 2 * MIB):
        ways.append(Way("virtio-mem", size))
    # Whole dimms alone leave, the smallest first: as many as the guest can spare.
    by_dimm = 0
    for size in sorted(device.size_bytes for device in live.devices if device.model == "dimm"):
        if by_dimm + size > spare:
            break
        by_dimm += size
    if by_dimm:
        ways.append(Way("dimm", by_dimm))
    if live.balloon and (size := align_down(min(spare, live.balloon_total_bytes), MIB)):
        ways.append(Way("balloon", size))
    return Reclaimable(
        vm_uuid=facts.domain.uuid,
        name=facts.domain.name,
        promised=promised_bytes,
        resident=resident_bytes,
        unused=unused,
        reclaimable=max((way.size for way in ways), default=0),
        ways=ways,
    )
