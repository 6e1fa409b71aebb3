"""Grows memory to a goal: balloon, virtio-mem devices and dimms, each with the guest's part."""

from typing import TypeVar

import msgspec

from kvmagent.model.checks import dimm_quantum
from kvmagent.model.command import Goal
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import (
    Definition,
    Facts,
    MemoryDevice,
    count_missing,
    device_blocks,
    dimm_blocks,
    find_other_half,
    pick_blocks,
)
from kvmagent.model.steps import (
    AnyStep,
    AttachMemory,
    AttachVirtioMem,
    AwaitBalloon,
    AwaitGuestBlocks,
    AwaitVirtioMem,
    ResizeVirtioMem,
    SetBalloon,
    Target,
)
from kvmagent.model.units import align_down, format_size

from .guestmemory import listed_blocks, online_blocks, online_steps, spans_of

Size = TypeVar("Size")


class PlannedDimm(msgspec.Struct, frozen=True, rename="camel"):
    """A dimm that a task attaches, by the alias that makes it the task's own; to no node where there are no cells."""

    alias: str
    size_bytes: int
    node: int | None
    live: bool
    config: bool


class PlannedVirtioMem(PlannedDimm, frozen=True, rename="camel"):
    """A virtio-mem device that a task attaches."""

    block_bytes: int
    requested_bytes: int


class PlannedResize(msgspec.Struct, frozen=True, rename="camel"):
    """A virtio-mem device of one definition that a task resizes, and what it had before.

    `found_bytes` is the request that is to be taken back there.
    """

    alias: str | None
    node: int | None
    size_bytes: int
    former_bytes: int
    requested_bytes: int
    target: Target
    address: str | None = None
    found_bytes: int | None = None

    def find(self, definition: Definition) -> MemoryDevice | None:
        """Return the device in its definition; libvirt's own aliases are not in the persistent one."""
        named = definition.find_device(self.alias) if self.alias is not None else None
        same = (
            device
            for device in definition.virtio_mems
            if (device.node, device.size_bytes) == (self.node, self.size_bytes)
            and self.address in (None, device.address)
        )
        return named or (next(same, None) if self.target == "config" else None)

    def is_somebody_s(self, device: MemoryDevice) -> bool:
        """Whether the definition has another request by now than the one to be taken back: somebody has changed it."""
        is_known = device.requested_bytes in (self.found_bytes, self.requested_bytes)
        return self.target == "config" and self.found_bytes is not None and not is_known


class MemoryGoal(Goal, frozen=True, rename="camel"):
    """A balloon target, virtio-mem sizes and dimms: absolute, so that reaching it twice changes nothing.

    `former_balloon_bytes` is where the balloon was; `known_blocks` what the guest listed before, where virtio-mem adds
    blocks of which only the guest knows the place. With `one_by_one` each dimm must be online in the guest before the
    next is attached: the guest has no room for all their page maps. `back_online` are blocks of dimms that were there
    before, where nothing is to be plugged: the guest has left them offline. With `holds_balloon` the balloon is only to
    stay where it is: what was asked of it before is taken back, and the definition follows. `dimm_quantum_bytes` is
    what the guest takes whole multiples of: it may not answer when a smaller dimm is enough.
    """

    balloon_bytes: int | None
    balloon_live: bool
    balloon_config: bool
    dimms: tuple[PlannedDimm, ...]
    total_bytes: int
    guest_online: bool
    timeout_sec: float
    former_balloon_bytes: int | None = None
    resizes: tuple[PlannedResize, ...] = ()
    virtio_mem: PlannedVirtioMem | None = None
    known_blocks: frozenset[int] = frozenset()
    one_by_one: bool = False
    back_online: tuple[int, ...] = ()
    holds_balloon: bool = False
    dimm_quantum_bytes: int = 0

    @property
    def changes_live(self) -> bool:
        """Whether the running VM is to change."""
        plugs = any(dimm.live for dimm in self.dimms) or (self.virtio_mem is not None and self.virtio_mem.live)
        resizes = any(resize.target == "live" for resize in self.resizes)
        return self.balloon_live or plugs or resizes or bool(self.back_online)

    @property
    def slots(self) -> int:
        """How many memory slots of the running VM it takes."""
        devices = (*self.dimms, *([self.virtio_mem] if self.virtio_mem else []))
        return sum(device.live for device in devices)

    @property
    def plugs(self) -> bool:
        """Whether memory devices are to be attached or to grow."""
        grows = any(resize.requested_bytes != resize.former_bytes for resize in self.resizes)
        return bool(self.dimms or grows or self.virtio_mem)


def next_steps(goal: MemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: balloon, then virtio-mem, then dimms; each with the guest's part.

    Raises:
        AgentError: GUEST_MEMORY_SHORT, when the guest did not take in a dimm that the next one needs.
    """
    return (
        _balloon_steps(goal, facts, failed)
        or resize_steps(_fit_resizes(goal, facts), facts, failed, goal.timeout_sec)
        or _virtio_mem_steps(goal, facts, failed)
        or _dimm_steps(goal, facts, failed)
        or _back_online_steps(goal, facts, failed)
    )


def find_shortfall(goal: MemoryGoal, facts: Facts) -> AgentError | None:
    """Return the error of a VM that, read again, lacks something of the goal.

    What others have given it meanwhile is not attached again.
    """
    lacks = _find_room(goal, facts)
    for device in (*goal.dimms, *([goal.virtio_mem] if goal.virtio_mem else [])):
        asked: tuple[tuple[Target, str, bool], ...]
        asked = ("live", "running", device.live), ("config", "persistent", device.config)
        for target, name, is_asked in asked:
            definition = facts.find_definition(target)
            is_there = definition is not None and definition.find_device(device.alias) is not None
            if is_asked and not is_there and lacks[target] > 0:
                lack = f"the {format_size(lacks[target])} that the {name} VM still lacks"
                return AgentError(
                    Code.NOT_VERIFIED, f"{device.alias} was not attached: no device of its kind can give {lack}"
                )
    return find_stalled(_fit_resizes(goal, facts), goal.virtio_mem, facts) or _find_dead_balloon(goal, facts)


def find_stalled(
    resizes: tuple[PlannedResize, ...], virtio_mem: PlannedVirtioMem | None, facts: Facts
) -> AgentError | None:
    """Return the error of a virtio-mem device that the guest did not bring to its requested size."""
    live = facts.domain.live
    if live is None:
        return None
    wanted = [(resize.find(live), resize.requested_bytes) for resize in resizes if resize.target == "live"]
    if virtio_mem is not None and virtio_mem.live and (own := live.find_device(virtio_mem.alias)) is not None:
        wanted.append((own, _find_requested(virtio_mem, own)))
    for device, requested_bytes in wanted:
        if device is not None and device.current_bytes != requested_bytes:
            return AgentError(
                Code.VIRTIO_MEM_STALLED,
                f"{device.alias} was set to {format_size(requested_bytes)} but is at "
                f"{format_size(device.plugged_bytes)}",
            )
    return None


def _find_dead_balloon(goal: MemoryGoal, facts: Facts) -> AgentError | None:
    actual, wanted = facts.domain.balloon_bytes, _balloon_wanted(goal, facts)
    if not goal.balloon_live or actual is None or actual >= wanted:
        return None
    return AgentError(
        Code.BALLOON_NOT_ANSWERING,
        f"the balloon was set to {format_size(wanted)} but is at {format_size(actual)}",
    )


def _balloon_wanted(goal: MemoryGoal, facts: Facts) -> int:
    """Return where the balloon is to be: it counts the dimms of this task as soon as they are attached."""
    live = facts.domain.live
    attached = (dimm.size_bytes for dimm in goal.dimms if dimm.live and live and live.find_device(dimm.alias))
    return (goal.balloon_bytes or 0) + sum(attached)


def _balloon_steps(goal: MemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """The guest moves the balloon: its actual size, not the call, shows what was reached; the definition follows."""
    if goal.balloon_bytes is None:
        return ()
    actual, wanted = facts.domain.balloon_bytes, _balloon_wanted(goal, facts)
    asked = facts.domain.balloon_target_bytes
    if goal.balloon_live and actual is not None:
        # The VM was restarted meanwhile, or somebody else gave it more: it keeps that.
        wanted = max(wanted, actual)
        if actual < wanted or asked not in (None, wanted):
            if AwaitBalloon.__name__ in failed:
                return ()
            return (
                SetBalloon(size_bytes=wanted, target="live"),
                AwaitBalloon(size_bytes=wanted, timeout_sec=goal.timeout_sec),
            )
    attached = sum(dimm.size_bytes for dimm in goal.dimms if dimm.config and _in_config(dimm, facts))
    if goal.balloon_config and facts.get_config().current_bytes < goal.balloon_bytes + attached:
        return (SetBalloon(size_bytes=goal.balloon_bytes + attached, target="config"),)
    return ()


def resize_steps(
    resizes: tuple[PlannedResize, ...], facts: Facts, failed: frozenset[str], timeout_s: float
) -> tuple[AnyStep, ...]:
    """Return what brings virtio-mem devices to their sizes: ask, then wait for the guest; then the definition."""
    for resize in resizes:
        device = resize.find(facts.get_live() if resize.target == "live" else facts.get_config())
        if device is None:
            continue
        steps: list[AnyStep] = []
        if device.requested_bytes != resize.requested_bytes:
            steps.append(
                ResizeVirtioMem(
                    alias=device.alias,
                    node=resize.node,
                    size_bytes=resize.size_bytes,
                    requested_bytes=resize.requested_bytes,
                    target=resize.target,
                    address=device.address if device.alias is None else None,
                )
            )
        if resize.target == "live" and device.alias is not None and device.current_bytes != resize.requested_bytes:
            wait = AwaitVirtioMem(alias=device.alias, size_bytes=resize.requested_bytes, timeout_sec=timeout_s)
            if wait.key in failed:  # the definition follows what the guest did, not what it was asked for
                return ()
            steps.append(wait)
        if steps:
            return tuple(steps)
    return ()


def _fit_resizes(goal: MemoryGoal, facts: Facts) -> tuple[PlannedResize, ...]:
    """Return the resizes as far as they lack to the totals: somebody may have plugged memory meanwhile.

    What a device has by now it keeps. A request that was not reached is taken back in both definitions, but where the
    running VM has reached it meanwhile.
    """
    room, fitting = _find_room(goal, facts), []
    for resize in goal.resizes:
        definition = facts.find_definition(resize.target)
        device = None if definition is None else resize.find(definition)
        if device is not None and resize.requested_bytes > (asked := device.requested_bytes or 0):
            block = device.block_bytes or 1
            most = max(asked, device.plugged_bytes + max(0, room[resize.target]) // block * block)
            resize = msgspec.structs.replace(resize, requested_bytes=min(resize.requested_bytes, most))
        elif device is not None:
            resize = msgspec.structs.replace(resize, requested_bytes=_find_kept(resize, device, facts))
        fitting.append(resize)
    return tuple(fitting)


def _find_kept(resize: PlannedResize, device: MemoryDevice, facts: Facts) -> int:
    """Return what a device comes to that was to have no more than is requested of it now: never below what it has."""
    live = facts.domain.live
    takes_back = resize.requested_bytes == resize.former_bytes
    if resize.is_somebody_s(device):
        return device.plugged_bytes
    if resize.target == "live" or not takes_back or live is None:
        return max(resize.requested_bytes, device.plugged_bytes)
    half = find_other_half(device, live)
    if half is None:
        return resize.requested_bytes
    return min(device.plugged_bytes, max(resize.requested_bytes, half.plugged_bytes))


def _virtio_mem_steps(goal: MemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Attach the new virtio-mem device; then bring online what the guest did not list before."""
    if goal.virtio_mem is not None:
        if steps := _attach_virtio_mem(goal, goal.virtio_mem, facts):
            return steps
        device = facts.get_live().find_device(goal.virtio_mem.alias) if goal.virtio_mem.live else None
        if device is not None and device.current_bytes != (size := _find_requested(goal.virtio_mem, device)):
            wait = AwaitVirtioMem(alias=goal.virtio_mem.alias, size_bytes=size, timeout_sec=goal.timeout_sec)
            if wait.key not in failed:
                return (wait,)
    if goal.dimms or not goal.changes_live or not goal.plugs or facts.guest.blocks is None:
        return ()
    if steps := _await_blocks(goal, facts, failed):
        return steps
    new = spans_of(listed_blocks(facts.guest) - goal.known_blocks)
    return online_steps(facts.guest, new, failed, online=goal.guest_online, timeout_s=goal.timeout_sec)


def _attach_virtio_mem(goal: MemoryGoal, planned: PlannedVirtioMem, facts: Facts) -> tuple[AnyStep, ...]:
    """Attach it where it lacks, and request what lacks to the total.

    Others may have used up part of its maximum size.
    """
    steps, room = list[AnyStep](), _find_room(goal, facts)
    sizes = dict[Target, tuple[int, int]]()
    for target, definition in _find_lacking(planned, facts):
        free = (definition.max_memory_bytes or 0) - definition.total_bytes
        size = min(planned.size_bytes, align_down(max(0, free), planned.block_bytes))
        if (requested := min(planned.requested_bytes, size, align_down(max(0, room[target]), planned.block_bytes))) > 0:
            sizes[target] = size, requested
    for (size, requested), live, config in _group(sizes):
        own = {"size_bytes": size, "requested_bytes": requested, "live": live, "config": config}
        steps.append(AttachVirtioMem(**msgspec.structs.asdict(planned) | own))
    return tuple(steps)


def _find_requested(planned: PlannedVirtioMem, device: MemoryDevice) -> int:
    """Return what the task's own device was asked for: less than planned where others gave the VM some of it."""
    return min(planned.requested_bytes, device.requested_bytes or planned.requested_bytes)


def _find_lacking(device: PlannedDimm, facts: Facts) -> list[tuple[Target, Definition]]:
    """Return the definitions that a device is to be in and is not."""
    asked: dict[Target, bool] = {"live": device.live, "config": device.config}
    found = [
        (target, facts.get_live() if target == "live" else facts.get_config()) for target in asked if asked[target]
    ]
    return [(target, definition) for target, definition in found if definition.find_device(device.alias) is None]


def _group(sizes: dict[Target, Size]) -> list[tuple[Size, bool, bool]]:
    """Return each size once, and whether it is the running VM's and the definition's."""
    distinct = dict.fromkeys(sizes.values())
    return [(size, sizes.get("live") == size, sizes.get("config") == size) for size in distinct]


def _await_blocks(goal: MemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Wait until the guest lists what its virtio-mem devices have grown by: it says that it took the memory before.

    Observed: Linux 6.1, in one of three first attaches. Where it told nothing before, nobody knows how many there were.
    """
    quantum, live = facts.guest.block_bytes, facts.domain.live
    if quantum is None or live is None or not goal.known_blocks:
        return ()
    former = {resize.alias: resize.former_bytes for resize in goal.resizes if resize.target == "live"}
    if goal.virtio_mem is not None and goal.virtio_mem.live:
        former[goal.virtio_mem.alias] = 0
    added = sum(
        max(0, -(-device.plugged_bytes // quantum) - -(-former[device.alias] // quantum))
        for device in live.virtio_mems
        if device.alias in former
    )
    listed = listed_blocks(facts.guest) - goal.known_blocks
    new = listed - pick_blocks(listed, dimm_blocks(live, quantum))
    if len(new) >= added or AwaitGuestBlocks.__name__ in failed:
        return ()
    count = len(facts.guest.blocks or ()) + added - len(new)
    return (AwaitGuestBlocks(count=count, timeout_sec=goal.timeout_sec),)


def _dimm_steps(goal: MemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    if not goal.one_by_one:
        return _attach_steps(goal, goal.dimms, facts) or _dimm_online_steps(goal, goal.dimms, facts, failed)
    for dimm in goal.dimms:
        if steps := _attach_steps(goal, (dimm,), facts) or _dimm_online_steps(goal, (dimm,), facts, failed):
            return steps
        if dimm is not goal.dimms[-1] and count_missing(online_blocks(facts.guest), _dimm_blocks((dimm,), facts)):
            raise AgentError(
                Code.GUEST_MEMORY_SHORT,
                f"{dimm.alias} is not online in the guest, and the page map of further dimms must lie in it",
            )
    return ()


def _back_online_steps(goal: MemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """What has left the VM meanwhile is not waited for."""
    quantum, live, wanted = facts.guest.block_bytes, facts.domain.live, frozenset(goal.back_online)
    there = listed_blocks(facts.guest) & wanted
    if wanted and live is not None and quantum is not None:
        there |= pick_blocks(wanted, dimm_blocks(live, quantum))
    return online_steps(facts.guest, spans_of(there), failed, online=True, timeout_s=goal.timeout_sec)


def _attach_steps(goal: MemoryGoal, dimms: tuple[PlannedDimm, ...], facts: Facts) -> tuple[AnyStep, ...]:
    """A device that already exists under the task's alias is not attached again, and none above the goal's total.

    The VM may have been restarted meanwhile with more, or given more: then only what still lacks is attached, in a
    smaller dimm where a whole one is too much.
    """
    steps, room = list[AnyStep](), _find_room(goal, facts)
    for dimm in dimms:
        sizes = dict[Target, int]()
        for target, _ in _find_lacking(dimm, facts):
            most = max(0, room[target])
            quantum = max(goal.dimm_quantum_bytes, dimm_quantum(facts, dimm.node))
            size = dimm.size_bytes if dimm.size_bytes <= most else align_down(most, quantum)
            room[target] -= size
            sizes |= {target: size} if size else {}
        for size, live, config in _group(sizes):
            own = {"size_bytes": size, "live": live, "config": config}
            steps.append(AttachMemory(**msgspec.structs.asdict(dimm) | own))
    return tuple(steps)


def _find_room(goal: MemoryGoal, facts: Facts) -> dict[Target, int]:
    """Return what each definition still lacks to the goal's total."""
    total = goal.find_total("memory")

    def lack(wanted: int | None, definition: Definition | None) -> int:
        return 0 if wanted is None or definition is None else wanted - definition.memory_bytes

    return {
        "live": lack(total.live if total else None, facts.domain.live),
        "config": lack(total.config if total else None, facts.domain.config),
    }


def _in_config(device: PlannedDimm, facts: Facts) -> bool:
    return facts.get_config().find_device(device.alias) is not None


def _dimm_online_steps(
    goal: MemoryGoal, dimms: tuple[PlannedDimm, ...], facts: Facts, failed: frozenset[str]
) -> tuple[AnyStep, ...]:
    """Bring online what this task plugged, and nothing else."""
    blocks = _dimm_blocks(dimms, facts)
    if any(resize.target == "live" for resize in goal.resizes) and not goal.one_by_one:
        if steps := _await_blocks(goal, facts, failed):
            return steps
        new = listed_blocks(facts.guest) - goal.known_blocks
        blocks += spans_of(new - pick_blocks(new, blocks))
    return online_steps(facts.guest, blocks, failed, online=goal.guest_online, timeout_s=goal.timeout_sec)


def _dimm_blocks(dimms: tuple[PlannedDimm, ...], facts: Facts) -> tuple[range, ...]:
    """Return the guest's blocks behind these dimms; none if the guest did not report its block size."""
    if facts.guest.block_bytes is None or facts.domain.live is None:
        return ()
    devices = [facts.domain.live.find_device(dimm.alias) for dimm in dimms if dimm.live]
    return tuple(device_blocks(device, facts.guest.block_bytes) for device in devices if device)
