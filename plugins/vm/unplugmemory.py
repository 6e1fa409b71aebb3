"""HotUnplugMemory: less memory for a running VM, its persistent definition, or both.

virtio-mem devices shrink, dimms leave where that is not enough, and below the boot memory the balloon takes the rest.
"""

from collections.abc import Mapping
from typing import Any

from kvmagent.model.checks import (
    STATE_REFUSALS,
    VIRTIO_MEM_BLOCK_BYTES,
    block_bytes,
    check_balloon,
    check_expected,
    check_state,
    refuse_first,
)
from kvmagent.model.command import Affect, Command, Ending, Resize, Total
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.facts import Definition, Facts, MemoryDevice, device_blocks, pick_blocks
from kvmagent.model.guestos import check_gives_up
from kvmagent.model.reply import Problem
from kvmagent.model.steps import Target
from kvmagent.model.units import align_down, align_up, format_size

from .exactfit import Sums
from .guestmemory import (
    BALLOON_FLOOR_BYTES,
    check_guest_can_spare,
    explain_free,
    find_growth,
    offline_bytes,
)
from .memory import (
    TARGETS,
    balloon_actual,
    balloon_page_bytes,
    current_definition,
    find_halves,
    plan_resizes,
)
from .memorygoal import PlannedResize
from .requests import HotUnplugMemoryRequest, MemoryReply
from .shrink import PlannedRemoval, ShrinkGoal, next_steps, plan_removal


def decide(request: HotUnplugMemoryRequest, facts: Facts, task_uuid: str) -> ShrinkGoal:
    """Return the goal of a request.

    Raises:
        AgentError: the first blocker; see `HOT_UNPLUG_MEMORY.refusals`.
    """
    refuse_first(check_state(facts.domain, request.affect))
    refuse_first(check_expected(facts, request.affect, None, request.expected_memory_size))
    definition = current_definition(facts, request.affect)
    usable = _usable_bytes(facts, request.affect)
    surplus = usable - request.memory_size
    if surplus < 0:
        raise AgentError(
            Code.TARGET_ABOVE_CURRENT,
            f"{format_size(request.memory_size)} requested, VM {facts.domain.name} has {format_size(usable)}",
        )
    removals = _decide_removals(request, facts, definition, surplus)
    surplus -= sum(removal.size_bytes for removal in removals)
    resizes, surplus = _decide_resizes(request.affect, facts, surplus)
    balloon = _decide_balloon(request, facts, definition, removals, surplus)
    total = (
        usable
        - sum(removal.size_bytes for removal in removals)
        - sum(
            resize.former_bytes - resize.requested_bytes for resize in resizes if resize.target == _main(request.affect)
        )
    )
    if balloon is None and surplus and not removals and not resizes:
        raise _not_removable(facts, definition, usable, request.memory_size)
    goal = ShrinkGoal(
        removals=removals,
        resizes=resizes,
        balloon_bytes=balloon,
        balloon_live=balloon is not None and request.affect != "config",
        balloon_config=balloon is not None and request.affect != "live",
        total_bytes=total if balloon is None else balloon,
        guest_online=request.guest_online,
        timeout_sec=request.timeout_sec,
        run=facts.run,
        totals=_find_totals(request.affect, facts, removals, resizes, balloon),
    )
    if request.affect != "config":
        check_guest_can_spare(facts, _taken_bytes(goal, facts))
    return goal


def _find_totals(
    affect: Affect,
    facts: Facts,
    removals: tuple[PlannedRemoval, ...],
    resizes: tuple[PlannedResize, ...],
    balloon_bytes: int | None,
) -> tuple[Total, ...]:
    """Return what each definition is to have left: a dimm that one of them has not got leaves the other alone."""
    left: dict[Target, int] = {}
    for target in TARGETS:
        if affect not in ("both", target):
            continue
        definition = current_definition(facts, target)
        leaving = sum(
            removal.size_bytes
            for removal in removals
            if (removal.live if target == "live" else removal.config and removal.find_config(definition) is not None)
        )
        shrunk = sum(one.former_bytes - one.requested_bytes for one in resizes if one.target == target)
        left[target] = definition.memory_bytes - leaving - shrunk
    live, config = left.get("live"), left.get("config")
    totals = [Total("memory", live=live, config=config, direction="down")]
    if balloon_bytes is not None:
        asked = dict.fromkeys(left, balloon_bytes)
        totals.append(Total("balloon", live=asked.get("live"), config=asked.get("config"), direction="down"))
    return tuple(totals)


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return what the reply says of rounding, and of what could not be reached exactly."""
    goal = ending.goal
    not_exact = [] if goal is None or goal.total_bytes <= ending.request.memory_size else [_not_exact(ending)]
    return {
        "warnings": (not_exact if ending.is_done or ending.planned is not None else [])
        + (explain_free(ending) if ending.is_done else []),
        "requested": ending.request.memory_size,
        "aligned": None if goal is None else goal.total_bytes,
        "applied": _applied(ending),
        "guest_growth": find_growth(ending),
    }


def _decide_resizes(affect: Affect, facts: Facts, surplus: int) -> tuple[tuple[PlannedResize, ...], int]:
    """Return how far the virtio-mem devices shrink, and what is then still too much of the definition that counts."""
    resizes, left = list[PlannedResize](), surplus
    for target in TARGETS:
        if affect not in ("both", target):
            continue
        devices = (facts.get_live() if target == "live" else facts.get_config()).virtio_mems
        sizes, rest = [device.plugged_bytes for device in devices], surplus
        for limits in (find_halves(devices, target, facts, resizes), [0] * len(devices)):
            for n, (device, least) in enumerate(zip(devices, limits, strict=True)):
                block = device.block_bytes or VIRTIO_MEM_BLOCK_BYTES
                taken = max(0, min(align_down(rest, block), sizes[n] - least))
                sizes[n] -= taken
                rest -= taken
        resizes += plan_resizes(devices, sizes, target)
        if target == _main(affect):
            left = rest
    return tuple(resizes), left


def _decide_removals(
    request: HotUnplugMemoryRequest, facts: Facts, definition: Definition, surplus: int
) -> tuple[PlannedRemoval, ...]:
    """Return the dimms that leave: with what the virtio-mem devices can give, nearest to the surplus and not above.

    Raises:
        AgentError: GUEST_MEMORY_IN_USE, when the guest's own blocks say that the best fit would be refused.
    """
    dimms = _dimms(definition)
    quantum = block_bytes(facts)
    fine = sum(device.plugged_bytes for device in definition.virtio_mems)
    best = _fit(Sums([dimm.size_bytes for dimm in dimms], quantum), surplus, fine)
    free = [dimm for dimm in dimms if not _kept_blocks(dimm, facts)]
    sums = Sums([dimm.size_bytes for dimm in free], quantum)
    fit = _fit(sums, surplus, fine)
    if request.affect != "config" and fit < best:
        kept = next(dimm for dimm in dimms if _kept_blocks(dimm, facts))
        raise AgentError(
            Code.GUEST_MEMORY_IN_USE,
            f"the guest says that memory of {kept.alias} cannot go offline; without it "
            f"{format_size(fit + min(fine, surplus - fit))} of {format_size(surplus)} could be removed",
        )
    picked = [free[n] for n in sums.pick(fit)]
    refuse_first(check_gives_up(facts.guest.os) if picked and request.affect != "config" else ())
    return tuple(
        plan_removal(dimm, facts, live=request.affect != "config", config=request.affect != "live") for dimm in picked
    )


def _fit(sums: Sums, surplus: int, fine: int) -> int:
    """Return what dimms are to give of a surplus of which `fine` can be had to the page: as little as is needed."""
    if surplus <= fine:
        return 0
    enough = sums.next_above(surplus - fine - 1)
    return enough if enough is not None and enough <= surplus else sums.best_below(surplus)


def _decide_balloon(
    request: HotUnplugMemoryRequest,
    facts: Facts,
    definition: Definition,
    removals: tuple[PlannedRemoval, ...],
    surplus: int,
) -> int | None:
    """Return the balloon's target where the VM is to come below its boot memory; else None.

    The balloon counts memory that is plugged but offline in the guest, and takes its size out of what is online.
    Observed: a guest with dimms offline was ballooned to its boot memory and killed its own processes.

    Raises:
        AgentError: NO_BALLOON, BALLOON_BELOW_FLOOR.
    """
    target = align_up(request.memory_size, balloon_page_bytes(facts))
    if not surplus or request.memory_size >= definition.boot_bytes:
        return None
    refuse_first(check_balloon(facts, request.affect, target))
    floor = BALLOON_FLOOR_BYTES
    if request.affect != "config":
        leaving = sum(removal.size_bytes - len(removal.online_blocks) * block_bytes(facts) for removal in removals)
        floor += max(0, offline_bytes(facts) - leaving)
    if target < floor:
        raise AgentError(
            Code.BALLOON_BELOW_FLOOR,
            f"{format_size(target)} requested, but the guest needs the balloon to leave {format_size(floor)}",
            remedy=f"Request no less than {floor} bytes; bring plugged memory online in the guest first.",
        )
    return target


def _taken_bytes(goal: ShrinkGoal, facts: Facts) -> int:
    """Return how much memory that the guest uses now it would lose."""
    taken = sum(len(removal.online_blocks) for removal in goal.removals) * block_bytes(facts)
    taken += sum(resize.former_bytes - resize.requested_bytes for resize in goal.resizes if resize.target == "live")
    if goal.balloon_bytes is not None:
        total = facts.get_live().balloon_total_bytes - sum(removal.size_bytes for removal in goal.removals)
        taken += max(0, min(total, balloon_actual(facts, "live")) - goal.balloon_bytes)
    return taken


def _not_removable(facts: Facts, definition: Definition, usable: int, target: int) -> AgentError:
    totals = _reachable(facts, definition, usable, target)
    return AgentError(
        Code.MEMORY_NOT_REMOVABLE,
        f"VM {facts.domain.name} has no memory device as small as the {format_size(usable - target)} to be removed",
        remedy=f"Request a total of {' or '.join(map(str, totals))} bytes." if totals else None,
        details={"reachable": totals},
    )


def _not_exact(ending: Ending) -> Problem:
    assert ending.before is not None
    facts, request = ending.before, ending.request
    definition = current_definition(facts, request.affect)
    totals = _reachable(facts, definition, _usable_bytes(facts, request.affect), request.memory_size)
    return Problem(
        code=Code.MEMORY_SIZE_NOT_REACHABLE,
        message=f"{format_size(request.memory_size)} requested, "
        f"{format_size(ending.goal.total_bytes)} is the nearest total above it that the VM's devices can make",
        remedy=f"Request a total of {' or '.join(map(str, totals))} bytes for an exact total."
        if totals
        else CODES[Code.MEMORY_SIZE_NOT_REACHABLE].remedy,
    )


def _reachable(facts: Facts, definition: Definition, usable: int, target: int) -> list[int]:
    """Return the totals next to the target, above and below, that the devices make."""
    sums = Sums([dimm.size_bytes for dimm in _dimms(definition)], block_bytes(facts))
    fine, surplus = sum(device.plugged_bytes for device in definition.virtio_mems), usable - target
    fit = _fit(sums, surplus, fine)
    below = sums.next_above(surplus)
    above = usable - fit - min(fine, align_down(surplus - fit, VIRTIO_MEM_BLOCK_BYTES))
    return [*([above] if above < usable else []), *([usable - below] if below is not None else [])]


def _dimms(definition: Definition) -> list[MemoryDevice]:
    """Return the dimms that can leave, those that were plugged last at the end."""
    return sorted(definition.dimms, key=lambda dimm: (dimm.base or 0, dimm.slot or 0))


def _kept_blocks(dimm: MemoryDevice, facts: Facts) -> frozenset[int]:
    """Return the blocks of a dimm that the guest says it cannot take offline; none if it does not report them."""
    if facts.guest.blocks is None or facts.guest.block_bytes is None:
        return frozenset()
    fixed = frozenset(block.index for block in facts.guest.blocks if block.online and not block.can_offline)
    return pick_blocks(fixed, (device_blocks(dimm, facts.guest.block_bytes),))


def _applied(ending: Ending) -> int | None:
    facts, affect = ending.after, ending.request.affect
    if facts is None or (facts.domain.config if affect == "config" else facts.domain.live) is None:
        return None
    return _usable_bytes(facts, affect)


def _usable_bytes(facts: Facts, affect: Affect) -> int:
    """Return what the VM has, without what the balloon holds back: that has left already."""
    definition = current_definition(facts, affect)
    return definition.memory_bytes - max(0, definition.balloon_total_bytes - balloon_actual(facts, affect))


def _main(affect: Affect) -> Target:
    return "config" if affect == "config" else "live"


HOT_UNPLUG_MEMORY = Command(
    name="HotUnplugMemory",
    subcommand="unplug-memory",
    path="/vm/hotunplug/memory",
    summary="Lower a VM's memory to a total, never below it",
    request=HotUnplugMemoryRequest,
    reply=MemoryReply,
    goal=ShrinkGoal,
    observe_guest=frozenset({"memory"}),
    observe_first=frozenset({"os"}),
    decide=decide,
    next_steps=next_steps,
    reply_fields=reply_fields,
    role="unplug",
    resizes=Resize(frozenset({"memory"}), "down"),
    refusals=(
        *STATE_REFUSALS,
        Code.NOT_AS_EXPECTED,
        Code.TARGET_ABOVE_CURRENT,
        Code.MEMORY_NOT_REMOVABLE,
        Code.GUEST_MEMORY_IN_USE,
        Code.GUEST_MEMORY_SHORT,
        Code.GUEST_OS_UNABLE,
        Code.NO_BALLOON,
        Code.BALLOON_BELOW_FLOOR,
    ),
)
