"""Memory as the guest has it: its blocks behind the VM's devices, bringing them online, and what to report."""

from kvmagent.model.command import Ending
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import (
    Definition,
    Facts,
    Guest,
    MemoryDevice,
    count_missing,
    device_blocks,
    dimm_blocks,
    pick_blocks,
)
from kvmagent.model.guestuse import find_mem_total, warning
from kvmagent.model.policy import explain_not_asked
from kvmagent.model.reply import Problem
from kvmagent.model.steps import (
    AnyStep,
    AwaitGuestMemory,
    OnlineGuestMemory,
)
from kvmagent.model.units import MIB, align_down, format_size

# Memory that is added costs the guest a page map of 64 bytes for each page of 4 KiB, out of what it has free by then.
# Source: Linux struct page. Observed by users: kata-containers 4847, 12 GiB need about 190 MiB.
MAP_DIVISOR = 64
# The aliases of what the agent attaches begin so.
OWN_ALIAS = "ua-kvmagent-"
# What a guest must have left for itself when memory is added, removed or ballooned.
GUEST_RESERVE_BYTES = 32 * MIB
# What the balloon must leave of memory that is online in the guest.
BALLOON_FLOOR_BYTES = 128 * MIB


def find_idle(facts: Facts) -> tuple[int, ...]:
    """Return the blocks of plugged memory that the guest does not use: after it has rebooted, say.

    Of what it does not list at all those of the agent's own dimms: they were plugged while it could not take them in.
    """
    live, guest = facts.domain.live, facts.guest
    if live is None or guest.blocks is None or (quantum := guest.block_bytes) is None:
        return ()
    listed = listed_blocks(guest)
    offline = listed - online_blocks(guest)
    idle = pick_blocks(offline, dimm_blocks(live, quantum))
    for device in live.devices:
        if device.model == "dimm" and device.alias is not None and device.alias.startswith(OWN_ALIAS):
            idle |= frozenset(device_blocks(device, quantum)) - listed
    if any(device.plugged_bytes for device in live.virtio_mems):
        floor = _find_device_floor(live)
        idle |= frozenset(index for index in offline if floor is not None and index * quantum >= floor)
    return tuple(sorted(idle))


def _find_device_floor(live: Definition) -> int | None:
    """Return an address above which there is no boot memory; None where it is not known.

    Source: QEMU 7.2, pc_q35_init and pc_init1 (what lies below 4 GiB), pc_memory_init (devices behind the rest).
    """
    if live.arch != "x86_64":
        return None
    least, most = (2816 * MIB, 2048 * MIB) if "q35" in live.machine else (3584 * MIB, 3072 * MIB)
    return 4096 * MIB + (live.boot_bytes - most if live.boot_bytes >= least else 0)


def online_steps(
    guest: Guest, blocks: tuple[range, ...], failed: frozenset[str], *, online: bool, timeout_s: float
) -> tuple[AnyStep, ...]:
    """Return what brings these blocks online: wait until the guest lists them, then ask it."""
    if guest.blocks is None or not any(blocks):
        return ()
    if count_missing(listed_blocks(guest), blocks) and AwaitGuestMemory.__name__ not in failed:
        # The guest's agent reads no block size by which these could be more than it can list.
        wanted = tuple(sorted(index for span in blocks for index in span))
        return (AwaitGuestMemory(blocks=wanted, timeout_sec=timeout_s),)
    offline = tuple(sorted(pick_blocks(listed_blocks(guest) - online_blocks(guest), blocks)))
    if offline and online and OnlineGuestMemory.__name__ not in failed:
        return (OnlineGuestMemory(blocks=offline),)
    return ()


def spans_of(blocks: frozenset[int]) -> tuple[range, ...]:
    """Return blocks that the guest has listed, as `online_steps` takes them."""
    return tuple(range(index, index + 1) for index in sorted(blocks))


def listed_blocks(guest: Guest) -> frozenset[int]:
    """Return the blocks that the guest lists; none if it does not report them."""
    return frozenset(block.index for block in guest.blocks or ())


def online_blocks(guest: Guest) -> frozenset[int]:
    """Return the blocks that the guest uses; none if it does not report them."""
    return frozenset(block.index for block in guest.blocks or () if block.online)


def find_online_bytes(facts: Facts, device: MemoryDevice) -> int | None:
    """Return how much of a device the guest uses; None if it does not report it, or the device's place is not known."""
    guest = facts.guest
    if facts.domain.live is None or guest.blocks is None or guest.block_bytes is None or device.base is None:
        return None
    used = pick_blocks(online_blocks(guest), (device_blocks(device, guest.block_bytes),))
    return min(device.size_bytes, len(used) * guest.block_bytes)


def offline_bytes(facts: Facts) -> int:
    """Return how much plugged memory the guest does not use; all of it if the guest does not report it."""
    live = facts.get_live()
    quantum = facts.guest.block_bytes
    if facts.guest.blocks is None or quantum is None:
        return sum(device.size_bytes for device in live.devices if device.model == "dimm")
    return count_missing(online_blocks(facts.guest), dimm_blocks(live, quantum)) * quantum


def split_for_guest(
    facts: Facts, sizes_bytes: list[int], quantum_bytes: int, *, online: bool
) -> tuple[list[int], bool]:
    """Return dimm sizes that the guest can take in, and whether each must be online before the next is attached.

    Raises:
        AgentError: GUEST_MEMORY_SHORT, when not even the first block's page map fits, or there are slots for the dimms
            and not for the pieces: another start, with as many slots, would not help.
    """
    available = facts.guest.mem_available_bytes
    if available is None:
        return sizes_bytes, False
    room = available - GUEST_RESERVE_BYTES
    if sum(sizes_bytes) <= room * MAP_DIVISOR:
        return sizes_bytes, False
    pieces = list[int]()
    for size in sizes_bytes:
        left = size
        while left:
            piece = min(left, align_down(max(0, room) * MAP_DIVISOR, quantum_bytes))
            if not piece or not online:
                raise AgentError(
                    Code.GUEST_MEMORY_SHORT,
                    f"{format_size(sum(sizes_bytes))} more needs {format_size(sum(sizes_bytes) // MAP_DIVISOR)} for "
                    f"the guest's page map, with {format_size(GUEST_RESERVE_BYTES)} kept free, but the guest has "
                    f"{format_size(available)} available"
                    + ("" if online else f", and {explain_not_asked(facts).message}"),
                )
            pieces.append(piece)
            left -= piece
            room += piece - piece // MAP_DIVISOR
    assert facts.domain.live is not None
    free_slots = facts.count_free_slots(facts.domain.live)
    if len(sizes_bytes) <= free_slots < len(pieces):
        raise AgentError(
            Code.GUEST_MEMORY_SHORT,
            f"with {format_size(available)} available the guest can take {format_size(sum(sizes_bytes))} more only in "
            f"{len(pieces)} pieces, but {free_slots} memory slots are free",
        )
    return pieces, True


def check_guest_can_spare(facts: Facts, taken_bytes: int) -> None:
    """Refuse to take more memory from the guest than it has free.

    Raises:
        AgentError: GUEST_MEMORY_SHORT.
    """
    available = facts.guest.mem_available_bytes
    if available is not None and taken_bytes and taken_bytes + GUEST_RESERVE_BYTES > available:
        raise AgentError(
            Code.GUEST_MEMORY_SHORT,
            f"{format_size(taken_bytes)} would be taken from the guest, which must keep "
            f"{format_size(GUEST_RESERVE_BYTES)} free and has only {format_size(available)} available",
        )


def explain_free(ending: Ending) -> list[Problem]:
    """Say why `free` in the guest shows less than the VM has: reported on success too, never hidden."""
    facts = ending.after
    if facts is None or ending.goal is None or ending.request.affect == "config":
        return []
    total = find_mem_total(facts)
    if facts.domain.live is None or total is None:
        return []
    has, actual = facts.domain.live.memory_bytes, facts.domain.balloon_bytes
    if total >= has:
        return []
    growth = find_growth(ending)
    grown = f"; it grew by {format_size(growth)} in this task" if growth is not None and growth > 0 else ""
    held = facts.domain.live.balloon_total_bytes - actual if actual is not None else 0
    balloon = f", {format_size(held)} of it in the balloon" if held > 0 else ""
    return [
        warning(
            Code.GUEST_FREE_SHOWS_LESS,
            f"the VM has {format_size(has)}, the guest's MemTotal is {format_size(total)}: "
            f"{format_size(has - total)} less{balloon}{grown}",
        )
    ]


def find_growth(ending: Ending) -> int | None:
    """Return how much MemTotal grew in the guest, which says more than the total; None if it was not reported."""
    before = find_mem_total(ending.before) if ending.before else None
    after = find_mem_total(ending.after) if ending.after else None
    return None if before is None or after is None else after - before
