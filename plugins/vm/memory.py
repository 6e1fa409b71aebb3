"""HotPlugMemory: more memory for a running VM, its persistent definition, or both, by balloon or by dimm."""

from dataclasses import replace

import msgspec

from kvmagent.model.command import Affect, Command, Ending, Goal, Problem
from kvmagent.model.errors import MEMORY_ONLINE_HINT, AgentError, Code
from kvmagent.model.facts import Definition, Facts, MemoryDevice
from kvmagent.model.steps import (
    AnyStep,
    AttachMemory,
    AwaitBalloon,
    AwaitGuestMemory,
    OnlineGuestMemory,
    SetBalloon,
)
from kvmagent.model.units import KIB, align_up, format_ids, format_size

from .checks import (
    block_bytes,
    check_balloon,
    check_dimm_room,
    check_dimm_support,
    check_state,
    refuse_first,
    round_up_addition,
)
from .reply import not_verified, refused_warning, settle, shared_fields, silence_warning, warning
from .requests import HotPlugMemoryRequest, MemoryReply

# How far the balloon may stay from its target and still have reached it: QEMU and the guest move whole pages.
BALLOON_PAGE_BYTES = 4 * KIB


class PlannedDimm(msgspec.Struct, frozen=True, rename="camel"):
    """A dimm that a task attaches, by the alias that makes it the task's own."""

    alias: str
    size_bytes: int
    node: int
    live: bool
    config: bool


class MemoryGoal(Goal, frozen=True, rename="camel"):
    """A balloon target, dimms, or both: absolute, so that reaching it twice changes nothing."""

    balloon_bytes: int | None
    balloon_live: bool
    balloon_config: bool
    dimms: tuple[PlannedDimm, ...]
    total_bytes: int
    guest_online: bool
    timeout_sec: float


def decide(request: HotPlugMemoryRequest, facts: Facts, task_uuid: str) -> MemoryGoal:
    """Return the goal of a request.

    Raises:
        AgentError: the first thing that stands in the way; see `HOT_PLUG_MEMORY.refusals`.
    """
    refuse_first(check_state(facts.domain, request.affect))
    balloon_bytes = _decide_balloon(request, facts)
    dimms = () if request.method == "balloon" else _decide_dimms(request, facts, task_uuid)
    current = _current(facts, request.affect)
    return MemoryGoal(
        balloon_bytes=balloon_bytes,
        balloon_live=balloon_bytes is not None and request.affect != "config",
        balloon_config=balloon_bytes is not None and request.affect != "live",
        dimms=dimms,
        total_bytes=current.memory_bytes + sum(dimm.size_bytes for dimm in dimms if dimm.live or not facts.domain.live),
        guest_online=request.guest_online,
        timeout_sec=request.timeout_sec,
    )


def advance(goal: MemoryGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: balloon, then dimms, then the guest's part."""
    return _balloon_steps(goal, facts, spent) or _attach_steps(goal, facts) or _guest_steps(goal, facts, spent)


def conclude(ending: Ending) -> MemoryReply:
    """Return the reply: online only where the guest itself uses every block of what was plugged."""
    ending = replace(ending, error=ending.error or _find_shortfall(ending))
    warnings = _warnings(ending)
    if (outcome := settle(ending)) is None:
        outcome = "configured" if not _changes_live(ending.goal) else "plugged" if warnings else "online"
    fields = shared_fields(ending, outcome, warnings + _explanations(ending))
    goal = ending.goal
    aligned = None
    if goal is not None:
        aligned = goal.total_bytes if goal.balloon_bytes is None or goal.dimms else goal.balloon_bytes
    return MemoryReply(
        **fields, requested=ending.request.memory_size, aligned=aligned, applied=_applied(ending.request.affect, ending)
    )


def _decide_balloon(request: HotPlugMemoryRequest, facts: Facts) -> int | None:
    """Return the balloon's target, or None where the balloon has no part in this."""
    if request.method == "dimm":
        return None
    current = _current(facts, request.affect)
    actual = _balloon_actual(facts, request.affect)
    wanted = align_up(request.memory_size, BALLOON_PAGE_BYTES)
    if request.method == "auto":
        if not current.balloon or actual >= current.balloon_total_bytes:
            return None
        wanted = min(wanted, current.balloon_total_bytes)
    refuse_first(check_balloon(facts, request.affect, wanted))
    if wanted < actual:
        raise _below_current(facts, request.memory_size, actual, "")
    return wanted


def _decide_dimms(request: HotPlugMemoryRequest, facts: Facts, task_uuid: str) -> tuple[PlannedDimm, ...]:
    """Return the dimms that bring each definition up to the target: what both lack is attached to both at once."""
    current = _current(facts, request.affect)
    target = request.memory_size
    actual = _balloon_actual(facts, request.affect)
    if target < current.memory_bytes:
        if request.method == "auto" and actual < current.balloon_total_bytes:
            return ()
        ballooned = (
            f", of which the balloon leaves {format_size(actual)}" if actual < current.balloon_total_bytes else ""
        )
        raise _below_current(facts, target, current.memory_bytes, ballooned)
    missing_live = max(0, target - facts.get_live().memory_bytes) if request.affect != "config" else 0
    missing_config = max(0, target - facts.get_config().memory_bytes) if request.affect != "live" else 0
    if not missing_live and not missing_config:
        return ()
    refuse_first(check_dimm_support(facts, request.affect))
    refuse_first(check_dimm_room(facts, request.affect, (), request.node))
    parts: list[tuple[int, bool, bool]] = []
    both = min(missing_live, missing_config)
    for amount, live, config in (
        (both, True, True),
        (missing_live - both, True, False),
        (missing_config - both, False, True),
    ):
        if amount:
            added = round_up_addition(facts, target - amount, target, strict=request.strict)
            parts += [(size, live, config) for size in _split(facts, added, request.dimm_size)]
    for affect in ("live", "config"):
        sizes = tuple(size for size, live, config in parts if (live if affect == "live" else config))
        if sizes:
            refuse_first(check_dimm_room(facts, affect, sizes, request.node))
    node = request.node if request.node is not None else _emptiest_node(current)
    return tuple(
        PlannedDimm(alias=f"ua-kvmagent-{task_uuid}-{n}", size_bytes=size, node=node, live=live, config=config)
        for n, (size, live, config) in enumerate(parts)
    )


def _split(facts: Facts, added_bytes: int, dimm_bytes: int | None) -> list[int]:
    """Return the sizes of the dimms that make up an aligned amount, none larger than `dimm_bytes`."""
    if dimm_bytes is None:
        return [added_bytes]
    quantum = block_bytes(facts)
    if dimm_bytes % quantum:
        raise AgentError(
            Code.MEMORY_NOT_ALIGNED,
            f"dimmSize is {format_size(dimm_bytes)}, the guest takes multiples of {format_size(quantum)}",
            remedy=f"Ask for dimms of {align_up(dimm_bytes, quantum)} bytes.",
        )
    whole, rest = divmod(added_bytes, dimm_bytes)
    return [dimm_bytes] * whole + ([rest] if rest else [])


def _emptiest_node(definition: Definition) -> int:
    """Return the guest NUMA node with the least memory; the lowest of equals."""
    plugged = {cell.id: cell.memory_bytes for cell in definition.cells}
    for device in definition.devices:
        if device.node in plugged:
            plugged[device.node] += device.plugged_bytes
    return min(plugged, key=lambda node: (plugged[node], node))


def _balloon_steps(goal: MemoryGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """The guest moves the balloon, so that its actual size, not the call, tells what was reached."""
    if goal.balloon_bytes is None:
        return ()
    steps: list[AnyStep] = []
    actual = facts.domain.balloon_bytes
    short = goal.balloon_live and actual is not None and actual < goal.balloon_bytes
    if short and AwaitBalloon.__name__ not in spent:
        steps.append(SetBalloon(size_bytes=goal.balloon_bytes, target="live"))
        steps.append(AwaitBalloon(size_bytes=goal.balloon_bytes, timeout_sec=goal.timeout_sec))
    attached = sum(dimm.size_bytes for dimm in goal.dimms if dimm.config and _in_config(dimm, facts))
    if goal.balloon_config and facts.get_config().current_bytes < goal.balloon_bytes + attached:
        steps.append(SetBalloon(size_bytes=goal.balloon_bytes + attached, target="config"))
    return tuple(steps)


def _attach_steps(goal: MemoryGoal, facts: Facts) -> tuple[AnyStep, ...]:
    """A device that is already there under the task's alias is not attached again."""
    steps = []
    for dimm in goal.dimms:
        live = dimm.live and facts.get_live().find_device(dimm.alias) is None
        config = dimm.config and not _in_config(dimm, facts)
        if live or config:
            steps.append(
                AttachMemory(alias=dimm.alias, size_bytes=dimm.size_bytes, node=dimm.node, live=live, config=config)
            )
    return tuple(steps)


def _in_config(dimm: PlannedDimm, facts: Facts) -> bool:
    return facts.get_config().find_device(dimm.alias) is not None


def _guest_steps(goal: MemoryGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """Bring online what this task plugged, and nothing else."""
    guest = facts.guest
    wanted = _blocks_of(goal, facts)
    if guest.blocks is None or not wanted:
        return ()
    listed = {block.index: block for block in guest.blocks}
    if not wanted <= listed.keys() and AwaitGuestMemory.__name__ not in spent:
        return (AwaitGuestMemory(blocks=tuple(sorted(wanted)), timeout_sec=goal.timeout_sec),)
    offline = tuple(sorted(index for index in wanted & listed.keys() if not listed[index].online))
    if offline and goal.guest_online and OnlineGuestMemory.__name__ not in spent:
        return (OnlineGuestMemory(blocks=offline),)
    return ()


def _blocks_of(goal: MemoryGoal, facts: Facts) -> set[int]:
    """Return the guest's blocks behind this goal's dimms; nothing where the guest did not tell its block size."""
    if facts.guest.block_bytes is None or facts.domain.live is None:
        return set()
    devices = [facts.domain.live.find_device(dimm.alias) for dimm in goal.dimms if dimm.live]
    return set().union(*(_device_blocks(device, facts.guest.block_bytes) for device in devices if device))


def _device_blocks(device: MemoryDevice, quantum_bytes: int) -> range:
    if device.base is None:
        return range(0)
    return range(device.base // quantum_bytes, (device.base + device.size_bytes) // quantum_bytes)


def _changes_live(goal: MemoryGoal) -> bool:
    return goal.balloon_live or any(dimm.live for dimm in goal.dimms)


def _warnings(ending: Ending) -> list[Problem]:
    """Return why the guest may not use all memory of the running VM; nothing when it says that it does."""
    facts, goal = ending.after, ending.goal
    if facts is None or facts.domain.live is None or goal is None or not _changes_live(goal):
        return []
    if goal.dimms:
        return _dimm_warnings(goal, facts)
    actual = facts.domain.balloon_bytes
    if actual is None or actual < goal.balloon_bytes:
        shown = "unknown" if actual is None else format_size(actual)
        return [warning(Code.BALLOON_NOT_ANSWERING, f"asked for {format_size(goal.balloon_bytes)}, it is at {shown}")]
    return []


def _dimm_warnings(goal: MemoryGoal, facts: Facts) -> list[Problem]:
    guest = facts.guest
    if guest.silence is not None:
        return [silence_warning(guest, MEMORY_ONLINE_HINT)]
    if guest.blocks is None or guest.block_bytes is None:
        refused = "guest-get-memory-blocks" if guest.blocks is None else "guest-get-memory-block-info"
        return [refused_warning(guest, refused, MEMORY_ONLINE_HINT)]
    found = []
    unseen = _blocks_of(goal, facts) - {block.index for block in guest.blocks}
    if unseen:
        found.append(
            warning(
                Code.GUEST_MEMORY_NOT_SEEN,
                f"{format_size(len(unseen) * guest.block_bytes)} that the VM has are not listed by the guest",
            )
        )
    offline = frozenset(block.index for block in guest.blocks if not block.online)
    if offline:
        found.append(
            warning(
                Code.GUEST_MEMORY_OFFLINE,
                f"memory blocks {format_ids(offline)} ({format_size(len(offline) * guest.block_bytes)}) "
                "are offline in the guest",
            )
        )
        if not goal.guest_online:
            found.append(warning(Code.GUEST_ONLINE_NOT_ASKED, "guestOnline was false"))
    return found


def _explanations(ending: Ending) -> list[Problem]:
    """Say why `free` in the guest shows less than the VM has: told on success too, never hidden."""
    facts = ending.after
    if facts is None or ending.goal is None or ending.request.affect == "config":
        return []
    if facts.domain.live is None or facts.guest.mem_total_bytes is None:
        return []
    has, total, actual = facts.domain.live.memory_bytes, facts.guest.mem_total_bytes, facts.domain.balloon_bytes
    if total >= has:
        return []
    before = ending.before.guest.mem_total_bytes if ending.before else None
    grown = f"; it grew by {format_size(total - before)} in this task" if before is not None and total > before else ""
    held = facts.domain.live.balloon_total_bytes - actual if actual is not None else 0
    balloon = f", {format_size(held)} of it in the balloon" if held > 0 else ""
    return [
        warning(
            Code.GUEST_FREE_SHOWS_LESS,
            f"the VM has {format_size(has)}, the guest's MemTotal is {format_size(total)}: "
            f"{format_size(has - total)} less{balloon}{grown}",
        )
    ]


def _find_shortfall(ending: Ending) -> AgentError | None:
    """Return the error of a definition that, read again, lacks a dimm of the goal."""
    goal, facts = ending.goal, ending.after
    if goal is None or facts is None or ending.planned is not None:
        return None
    for dimm in goal.dimms:
        for name, asked, definition in (
            ("running", dimm.live, facts.domain.live),
            ("persistent", dimm.config, facts.domain.config),
        ):
            if asked and (definition is None or definition.find_device(dimm.alias) is None):
                return not_verified(f"{dimm.alias} was attached, the {name} VM does not show it")
    return None


def _applied(affect: Affect, ending: Ending) -> int | None:
    if ending.after is None:
        return None
    goal = ending.goal
    if goal is not None and goal.balloon_live and not goal.dimms:
        return ending.after.domain.balloon_bytes
    definition = ending.after.domain.config if affect == "config" else ending.after.domain.live
    return definition.memory_bytes if definition else None


def _current(facts: Facts, affect: Affect) -> Definition:
    return facts.get_config() if affect == "config" else facts.get_live()


def _balloon_actual(facts: Facts, affect: Affect) -> int:
    """Return what the balloon leaves of boot memory and dimms now."""
    if affect == "config":
        return facts.get_config().current_bytes
    actual = facts.domain.balloon_bytes
    return facts.get_live().current_bytes if actual is None else actual


def _below_current(facts: Facts, target_bytes: int, current_bytes: int, addition: str) -> AgentError:
    return AgentError(
        Code.TARGET_BELOW_CURRENT,
        f"{format_size(target_bytes)} were asked for, "
        f"VM {facts.domain.name} has {format_size(current_bytes)}{addition}",
    )


HOT_PLUG_MEMORY = Command(
    name="HotPlugMemory",
    path="/vm/hotplug/memory",
    summary="Bring a VM up to a total of memory, online in the guest",
    request=HotPlugMemoryRequest,
    reply=MemoryReply,
    goal=MemoryGoal,
    observe_guest=frozenset({"memory"}),
    decide=decide,
    advance=advance,
    conclude=conclude,
    refusals=(
        Code.VM_NOT_FOUND,
        Code.VM_NOT_RUNNING,
        Code.VM_TRANSIENT,
        Code.LIBVIRT_BUSY,
        Code.TARGET_BELOW_CURRENT,
        Code.NO_ACPI,
        Code.NO_MAX_MEMORY,
        Code.NO_NUMA_CELL,
        Code.NUMA_CELLS_INCOMPLETE,
        Code.NUMA_NODE_NOT_FOUND,
        Code.MEMORY_ABOVE_MAXIMUM,
        Code.SLOTS_EXHAUSTED,
        Code.MEMORY_NOT_ALIGNED,
        Code.MEMORY_DEVICE_MISALIGNED,
        Code.HOST_MEMORY_SHORT,
        Code.NO_BALLOON,
        Code.BALLOON_ABOVE_TOTAL,
    ),
)
