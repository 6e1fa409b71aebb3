"""What the hypervisor has, what the guest lists, and what the guest uses: three amounts of each resource.

The last two come from the guest. If it reports more than its VM has, its report is not believed: None.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kvmagent.model.errors import CODES, CPU_ONLINE_HINT, MEMORY_ONLINE_HINT, Code
from kvmagent.model.facts import (
    Definition,
    Domain,
    Facts,
    Guest,
    GuestOs,
    GuestVcpu,
    device_blocks,
    dimm_blocks,
    pick_blocks,
)
from kvmagent.model.policy import explain_not_asked
from kvmagent.model.reply import Problem
from kvmagent.model.steps import Resource, Target
from kvmagent.model.units import format_ids, format_size

# Source: Linux admin-guide/mm/memory-hotplug.rst: ratios of 3:1 to 4:1 are bearable, what is above is not.
MOST_MOVABLE_RATIO = 3


#: What the guest's part is done with, by resource.
AGENT_COMMANDS: Mapping[Resource, frozenset[str]] = {
    "cpu": frozenset({"guest-get-vcpus", "guest-set-vcpus"}),
    "memory": frozenset({"guest-get-memory-blocks", "guest-get-memory-block-info", "guest-set-memory-blocks"}),
}


class Use(NamedTuple):
    """vCPUs or bytes in all; None if unknown. `blocks` is how many memory blocks the guest uses."""

    plugged: int | None = None
    seen: int | None = None
    online: int | None = None
    blocks: int | None = None


def measure(facts: Facts | None, resource: Resource) -> Use:
    """Return what there is of a resource of the running VM."""
    if facts is None or facts.domain.live is None:
        return Use()
    measures = {"cpu": _measure_cpus, "memory": _measure_memory, "balloon": _measure_balloon}
    return measures[resource](facts, facts.domain.live)


def amount_of(facts: Facts, resource: Resource, target: Target) -> int | None:
    """Return what the running VM or the definition has of a resource; None where there is none, or it is unknown."""
    if target == "live":
        return measure(facts, resource).plugged
    config = facts.domain.config
    if config is None:
        return None
    amounts = {"cpu": config.vcpu_current, "memory": config.memory_bytes, "balloon": config.current_bytes}
    return amounts[resource]


def find_mem_total(facts: Facts) -> int | None:
    """Return the guest's MemTotal; None if it does not report it, or reports an impossible value."""
    total, live = facts.guest.mem_total_bytes, facts.domain.live
    return total if total is not None and live is not None and 0 < total <= live.total_bytes else None


def _measure_cpus(facts: Facts, live: Definition) -> Use:
    """Some guests list all CPUs that are possible, offline ones too: what they see of those that are there is open."""
    listed, plugged = facts.guest.vcpus, live.vcpu_current
    if listed is None:
        return Use(plugged)
    online = sum(cpu.online for cpu in listed)
    if online > plugged or len(listed) > live.vcpu_maximum:
        return Use(plugged)
    return Use(plugged, len(listed) if len(listed) <= plugged else None, online)


def _measure_memory(facts: Facts, live: Definition) -> Use:
    """Blocks behind dimms are known by their place; the others hold boot memory and virtio-mem, some only in part."""
    blocks, quantum, plugged = facts.guest.blocks, facts.guest.block_bytes, live.memory_bytes
    if blocks is None or quantum is None or quantum <= 0:
        return Use(plugged)
    dimms = dimm_blocks(live, quantum)
    placed = sum(device.size_bytes for device in live.devices if device.model == "dimm" and device.base is not None)
    rest = plugged - placed
    shares = [device.plugged_bytes for device in live.virtio_mems if device.plugged_bytes]
    # Boot memory may end inside a block, which not every kernel lists; a virtio-mem device has blocks of its own.
    needed = (rest - sum(shares)) // quantum + sum(-(-share // quantum) for share in shares)
    most = needed + len(live.devices) + len(live.cells) + 1

    def amount(indexes: frozenset[int]) -> tuple[int, int]:
        """Return bytes, and how many blocks are no dimm's."""
        in_dimms = len(pick_blocks(indexes, dimms))
        others = len(indexes) - in_dimms
        has = rest if others >= needed else min(others * quantum, rest - min([quantum, *shares]))
        return min(placed, in_dimms * quantum) + max(0, has), others

    listed = frozenset(block.index for block in blocks)
    online = frozenset(block.index for block in blocks if block.online)
    seen, others = amount(listed)
    if others > most:
        return Use(plugged)
    return Use(plugged, seen, amount(online)[0], len(online))


def _measure_balloon(facts: Facts, live: Definition) -> Use:
    """The guest's driver moves the balloon; that the guest lives, and uses its memory, its agent must say."""
    actual = facts.domain.balloon_bytes
    told = find_mem_total(facts) is not None or bool(_measure_memory(facts, live).online)
    return Use(actual, actual if told else None, actual if told else None)


def tell_saved(domain: Domain) -> str:
    """Return what a managed save image means for whoever changes the persistent definition."""
    return f"VM {domain.name} has a managed save image, and its next start will not have what is defined now"


def warning(code: Code, message: str) -> Problem:
    """Return a warning with the code's own remedy."""
    return Problem(code=code, message=message, remedy=CODES[code].remedy)


def silence_warning(guest: Guest, hint: str) -> Problem:
    """Return the warning of a guest that says nothing, with what would bring the change online without its agent."""
    assert guest.silence is not None
    return Problem(
        code=guest.silence,
        message=f"it is unknown what the guest uses: {guest.silence_words}",
        remedy=f"{CODES[guest.silence].remedy} {hint}".strip(),
    )


def refused_warning(guest: Guest, command: str, hint: str) -> Problem:
    """Return the warning of a guest agent that would not answer one command."""
    return Problem(
        code=Code.GUEST_AGENT_REFUSED,
        message=f"it is unknown what the guest uses: {command}: {guest.refused.get(command, 'no answer')}",
        remedy=f"{CODES[Code.GUEST_AGENT_REFUSED].remedy} {hint}".strip(),
    )


def find_cpu_warnings(
    facts: Facts, before: Facts | None, *, asked_online: bool, hint: str = CPU_ONLINE_HINT
) -> list[Problem]:
    """Return why the guest may not use all vCPUs of the running VM; nothing when it says that it does."""
    live, guest = facts.domain.live, facts.guest
    if live is None:
        return []
    if guest.silence is not None:
        return [silence_warning(guest, hint)]
    if guest.vcpus is None:
        return [refused_warning(guest, "guest-get-vcpus", hint)]
    if measure(facts, "cpu").online is None:
        words = f"the guest lists {len(guest.vcpus)} CPUs, {guest.cpus_online} online, the VM has {live.vcpu_current}"
        return [warning(Code.GUEST_AGENT_INVALID, words)]
    known = before.guest.vcpus if before is not None else None
    owners = frozenset(cpu.id for cpu in known or ()) - (before.left_offline if before is not None else frozenset())
    found = idle_warnings(guest.vcpus, live.vcpu_current, owners)
    if found:
        found += migration_warnings(facts)
    if not asked_online and any(not cpu.online for cpu in guest.vcpus):
        found.append(explain_not_asked(facts))
    return found


def migration_warnings(facts: Facts) -> list[Problem]:
    """Return that the VM was migrated, where libvirt knows it. Observed by users: cubecos 1269."""
    words = f"VM {facts.domain.name} was live-migrated to this host"
    return [warning(Code.VM_MIGRATED, words)] if facts.domain.migrated else []


def idle_warnings(vcpus: tuple[GuestVcpu, ...], count: int, known: frozenset[int] = frozenset()) -> list[Problem]:
    """Return which of the VM's `count` vCPUs the guest does not list or use; `known` were there before a task."""
    found = []
    if len(vcpus) < count:
        found.append(warning(Code.GUEST_CPU_NOT_SEEN, f"the VM has {count} vCPUs, the guest lists {len(vcpus)}"))
    offline = frozenset(cpu.id for cpu in vcpus if not cpu.online)
    if offline and sum(cpu.online for cpu in vcpus) < count:
        kept = offline & known
        whose = (
            f"; {format_ids(kept)} were offline before, and stay so until the guest's owner changes it" if kept else ""
        )
        found.append(warning(Code.GUEST_CPU_OFFLINE, f"CPUs {format_ids(offline)} are offline in the guest{whose}"))
    return found


def find_imbalance(facts: Facts, os: GuestOs | None) -> list[Problem]:
    """Return that the guest's kernel may lack memory for itself, beside more than three times as much movable.

    Movable is what the guest could take offline, and plugged memory that it does not list, or does not tell of.
    """
    live, guest = facts.domain.live, facts.guest
    if live is None or (os is not None and os.family not in (None, "linux")):
        return []
    plugged = live.memory_bytes - live.boot_bytes
    if guest.blocks is not None and guest.block_bytes is not None:
        fixed = frozenset(block.index for block in guest.blocks if block.online and not block.can_offline)
        spans = tuple(device_blocks(device, guest.block_bytes) for device in live.devices)
        plugged -= len(pick_blocks(fixed, spans)) * guest.block_bytes
    if plugged <= MOST_MOVABLE_RATIO * live.boot_bytes:
        return []
    words = f"{format_size(plugged)} of plugged memory may be movable, more than {MOST_MOVABLE_RATIO} times the"
    return [warning(Code.GUEST_MEMORY_IMBALANCED, f"{words} {format_size(live.boot_bytes)} of boot memory")]


def find_memory_warnings(facts: Facts, *, asked_online: bool, hint: str = MEMORY_ONLINE_HINT) -> list[Problem]:
    """Return why the guest may not use all memory of the running VM; nothing when it says that it does."""
    live, guest = facts.domain.live, facts.guest
    if live is None:
        return []
    if guest.silence is not None:
        return [silence_warning(guest, hint)]
    if guest.blocks is None or guest.block_bytes is None:
        refused = "guest-get-memory-blocks" if guest.blocks is None else "guest-get-memory-block-info"
        return [refused_warning(guest, refused, hint)]
    plugged, seen, _online, _blocks = measure(facts, "memory")
    if seen is None:
        words = f"the guest lists {len(guest.blocks)} blocks of {format_size(guest.block_bytes)}"
        return [warning(Code.GUEST_AGENT_INVALID, f"{words}, the VM has {format_size(live.memory_bytes)}")]
    found = []
    assert plugged is not None
    if seen < plugged:
        unseen = format_size(plugged - seen)
        found.append(warning(Code.GUEST_MEMORY_NOT_SEEN, f"{unseen} that the VM has are not listed by the guest"))
    offline = frozenset(block.index for block in guest.blocks if not block.online)
    if offline:
        found.append(
            warning(
                Code.GUEST_MEMORY_OFFLINE,
                f"memory blocks {format_ids(offline)} ({format_size(len(offline) * guest.block_bytes)}) "
                "are offline in the guest",
            )
        )
        if not asked_online:
            found.append(explain_not_asked(facts))
    return found
