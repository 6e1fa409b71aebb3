"""HotPlugMemory: more memory for a running VM, its persistent definition, or both: balloon, virtio-mem, dimms."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from kvmagent.model.checks import (
    STATE_REFUSALS,
    VIRTIO_MEM_BLOCK_BYTES,
    check_balloon,
    check_device_room,
    check_device_support,
    check_expected,
    check_hard_limit,
    check_host,
    check_memory_ceiling,
    check_passes_nothing,
    check_state,
    check_unlocked,
    dimm_quantum,
    refuse_first,
    virtio_mem_block_bytes,
)
from kvmagent.model.command import Affect, Command, Ending, Resize, Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts, MemoryDevice, find_other_half
from kvmagent.model.guestos import check_plugs_memory, check_virtio_mem, find_limits
from kvmagent.model.guestuse import find_imbalance
from kvmagent.model.machines import Ability, find_machine
from kvmagent.model.placement import check_placement
from kvmagent.model.policy import may_online
from kvmagent.model.reply import Blocker, Problem
from kvmagent.model.steps import Target
from kvmagent.model.units import KIB, align_down, align_up, format_size

from .guestmemory import (
    OWN_ALIAS,
    explain_free,
    find_growth,
    find_idle,
    split_for_guest,
)
from .leftovers import cancel_leftovers, explain_leftovers, find_balloon_leftover
from .memorygoal import MemoryGoal, PlannedDimm, PlannedResize, PlannedVirtioMem, next_steps
from .requests import HotPlugMemoryRequest, MemoryReply

TARGETS: tuple[Target, Target] = ("live", "config")


def decide(request: HotPlugMemoryRequest, facts: Facts, task_uuid: str) -> MemoryGoal:
    """Return the goal of a request.

    Raises:
        AgentError: the first blocker; see `HOT_PLUG_MEMORY.refusals`.
    """
    refuse_first(check_state(facts.domain, request.affect))
    refuse_first(check_expected(facts, request.affect, None, request.expected_memory_size))
    request = msgspec.structs.replace(request, guest_online=request.guest_online and may_online(facts))
    found, facts = facts, cancel_leftovers(facts, request.affect)
    balloon_bytes = _decide_balloon(request, facts)
    holds_balloon = balloon_bytes is None and request.affect != "config" and find_balloon_leftover(facts) is not None
    if holds_balloon:
        balloon_bytes = facts.domain.balloon_bytes
    raised = _find_raised(request.affect, facts) if balloon_bytes is None or holds_balloon else None
    if raised is not None:
        holds_balloon, balloon_bytes = True, raised
    missing = {} if request.method == "balloon" else _find_missing(request, facts)
    if request.method == "auto" and auto_method(facts, request.affect) == "plug virtio-mem":
        request = msgspec.structs.replace(request, method="virtio-mem")
    refuse_first(_check_guest_virtio_mem(facts, request.affect) if request.method == "virtio-mem" else ())
    resizes = _decide_resizes(request, facts, missing) if _may_resize(request, facts) else ()
    resizes += _settle_others(found, facts, resizes)
    virtio_mem = _decide_virtio_mem(request, facts, missing, task_uuid) if request.method == "virtio-mem" else None
    dimms, one_by_one = _decide_dimms(request, facts, missing, task_uuid)
    plugs = bool(dimms or resizes or virtio_mem)
    added = {target: _added_bytes(target, resizes, virtio_mem, dimms) for target in TARGETS}
    for target in [name for name in TARGETS if added[name]]:
        size_bytes = current_definition(facts, target).memory_bytes + added[target]
        refuse_first(check_memory_ceiling(facts, target, size_bytes))
    main: Target = "config" if request.affect == "config" else "live"
    saves_hold = holds_balloon and (raised is not None or _is_saved(facts, request.affect))
    return MemoryGoal(
        totals=_find_totals(
            request.affect,
            facts,
            added,
            balloon_bytes,
            dimms,
            with_config=not holds_balloon or saves_hold,
            gains=_find_gains(found, resizes, virtio_mem, dimms),
        ),
        balloon_bytes=balloon_bytes,
        balloon_live=balloon_bytes is not None and request.affect != "config",
        balloon_config=balloon_bytes is not None and request.affect != "live" and (not holds_balloon or saves_hold),
        holds_balloon=holds_balloon,
        former_balloon_bytes=balloon_actual(facts, request.affect),
        dimms=dimms,
        dimm_quantum_bytes=dimm_quantum(facts, request.node) if dimms else 0,
        one_by_one=one_by_one,
        resizes=resizes,
        virtio_mem=virtio_mem,
        back_online=() if plugs or request.affect == "config" or not request.guest_online else find_idle(facts),
        known_blocks=frozenset(block.index for block in facts.guest.blocks or () if resizes or virtio_mem),
        total_bytes=current_definition(facts, request.affect).memory_bytes + added[main],
        guest_online=request.guest_online,
        timeout_sec=request.timeout_sec,
    )


def round_up_addition(request: HotPlugMemoryRequest, wanted_bytes: int, quantum_bytes: int) -> int:
    """Return what to add to have at least `wanted_bytes` more, in whole quanta.

    Raises:
        AgentError: MEMORY_NOT_ALIGNED, when it would have to be rounded and `strict` forbids it.
    """
    aligned = align_up(wanted_bytes, quantum_bytes)
    if request.strict and aligned != wanted_bytes:
        upper = request.memory_size - wanted_bytes + aligned
        raise AgentError(
            Code.MEMORY_NOT_ALIGNED,
            f"{format_size(wanted_bytes)} more requested, but the guest takes multiples of "
            f"{format_size(quantum_bytes)}",
            remedy=f'Request a total of {upper - quantum_bytes} or {upper} bytes, or leave "strict" out to have it '
            "rounded up.",
        )
    return aligned


def auto_method(facts: Facts, affect: Affect) -> Ability:
    """Return what kind of device brings memory where the request names none: dimms, where the machine has them.

    On Arm a guest may have no driver for dimms, and is told of none without ACPI: there it is virtio-mem, but for a
    guest that is known to be too old, and memory that is locked.
    Observed: Debian's kernels lack CONFIG_ACPI_HOTPLUG_MEMORY.
    """
    definition = current_definition(facts, affect)
    if definition.arch != "aarch64" or definition.locked or any(check_virtio_mem(facts.guest.os, definition.arch)):
        return "plug dimms"
    return "plug virtio-mem"


def balloon_page_bytes(facts: Facts) -> int:
    """Return what the balloon moves at once: whole pages of the guest's."""
    definition = facts.domain.live or facts.domain.config
    return find_machine(definition).balloon_page_bytes if definition is not None else 4 * KIB


def _find_totals(
    affect: Affect,
    facts: Facts,
    added: dict[Target, int],
    balloon_bytes: int | None,
    dimms: tuple[PlannedDimm, ...],
    *,
    with_config: bool,
    gains: dict[int, int],
) -> tuple[Total, ...]:
    """Return what each definition is to have in all; the balloon counts dimms as soon as they are attached."""
    has = {target: current_definition(facts, target).memory_bytes for target in TARGETS if affect in ("both", target)}
    memory = {target: size_bytes + added[target] for target, size_bytes in has.items()}
    totals = [Total("memory", live=memory.get("live"), config=memory.get("config"), gains=gains)]
    if balloon_bytes is not None:
        totals.append(
            Total(
                "balloon",
                live=balloon_bytes + sum(dimm.size_bytes for dimm in dimms if dimm.live) if "live" in has else None,
                config=balloon_bytes + sum(dimm.size_bytes for dimm in dimms if dimm.config)
                if "config" in has and with_config
                else None,
            )
        )
    return tuple(totals)


def _find_gains(
    facts: Facts,
    resizes: tuple[PlannedResize, ...],
    virtio_mem: PlannedVirtioMem | None,
    dimms: tuple[PlannedDimm, ...],
) -> dict[int, int]:
    """Return by how much each node of the running guest grows, beyond what was requested for it before."""
    live, gains = facts.domain.live, dict[int, int]()
    for resize in resizes:
        device = None if live is None or resize.target != "live" else resize.find(live)
        if device is not None:
            added = max(0, resize.requested_bytes - device.promised_bytes)
            node = resize.node or 0
            gains[node] = gains.get(node, 0) + added
    for dimm in (*dimms, *([virtio_mem] if virtio_mem else [])):
        added = dimm.requested_bytes if isinstance(dimm, PlannedVirtioMem) else dimm.size_bytes
        node = dimm.node or 0
        gains[node] = gains.get(node, 0) + (added if dimm.live else 0)
    return {node: size for node, size in gains.items() if size}


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return the reply's fields about rounding, and notes about memory that are no fault."""
    goal = ending.goal
    aligned = None
    if goal is not None:
        aligned = goal.balloon_bytes if _is_balloon_s(goal) else goal.total_bytes
    return {
        "warnings": explain(ending) if ending.is_done else [],
        "requested": ending.request.memory_size,
        "aligned": aligned,
        "applied": _applied(ending.request.affect, ending),
        "guest_growth": find_growth(ending),
    }


def explain(ending: Ending) -> list[Problem]:
    """Return notes about plugged memory: what the guest's system cannot do, and why free shows less."""
    goal, before, after = ending.goal, ending.before, ending.after
    if goal is None or before is None or not goal.changes_live:
        return explain_free(ending)
    leftovers = explain_leftovers(ending)
    imbalance = find_imbalance(after, before.guest.os) if after is not None and goal.plugs else []
    virtio_mem = goal.virtio_mem is not None or any(resize.target == "live" for resize in goal.resizes)
    limits = find_limits(before.guest.os, dimm=any(dimm.live for dimm in goal.dimms), virtio_mem=virtio_mem)
    return leftovers + limits + imbalance + explain_free(ending)


def _added_bytes(
    target: Target,
    resizes: tuple[PlannedResize, ...],
    virtio_mem: PlannedVirtioMem | None,
    dimms: tuple[PlannedDimm, ...],
) -> int:
    """Return what all that is planned adds to one definition."""
    added = sum(resize.requested_bytes - resize.former_bytes for resize in resizes if resize.target == target)
    added += sum(dimm.size_bytes for dimm in dimms if (dimm.live if target == "live" else dimm.config))
    if virtio_mem and (virtio_mem.live if target == "live" else virtio_mem.config):
        added += virtio_mem.requested_bytes
    return added


def _find_missing(request: HotPlugMemoryRequest, facts: Facts) -> dict[Target, int]:
    """Return what each definition to be changed lacks of the target.

    Raises:
        AgentError: TARGET_BELOW_CURRENT.
    """
    current, target = current_definition(facts, request.affect), request.memory_size
    if target < current.memory_bytes:
        actual = balloon_actual(facts, request.affect)
        if request.method == "auto" and actual < current.balloon_total_bytes:
            return {}
        held = f", of which the balloon leaves {format_size(actual)}" if actual < current.balloon_total_bytes else ""
        raise _below_current(facts, target, current.memory_bytes, held)
    missing: dict[Target, int] = {}
    if request.affect != "config":
        missing["live"] = target - facts.get_live().memory_bytes
    if request.affect != "live":
        missing["config"] = target - facts.get_config().memory_bytes
    return {name: amount for name, amount in missing.items() if amount > 0}


def _check_guest_virtio_mem(facts: Facts, affect: Affect) -> Iterator[Blocker]:
    return check_virtio_mem(facts.guest.os, current_definition(facts, affect).arch)


def _may_resize(request: HotPlugMemoryRequest, facts: Facts) -> bool:
    """Whether virtio-mem devices that are there may grow; what the guest cannot use of them is had by dimm."""
    if request.method != "auto":
        return request.method == "virtio-mem"
    affect = request.affect
    blocked = (
        _check_guest_virtio_mem(facts, affect),
        check_unlocked(facts, affect),
        check_passes_nothing(facts, affect),
    )
    return not any(any(found) for found in blocked)


def _decide_resizes(
    request: HotPlugMemoryRequest, facts: Facts, missing: dict[Target, int]
) -> tuple[PlannedResize, ...]:
    """Return how the virtio-mem devices that are there grow, and take that from what is missing.

    Of the persistent definition first to what their other halves have, so that both definitions come to the same.
    """
    resizes: list[PlannedResize] = []
    for target in [name for name in TARGETS if name in missing]:
        devices, takers = _virtio_mems(facts, target), _find_takers(current_definition(facts, target))
        sizes = [device.plugged_bytes for device in devices]
        for limits in (find_halves(devices, target, facts, resizes), [device.size_bytes for device in devices]):
            for n, (device, most) in enumerate(zip(devices, limits, strict=True)):
                block = device.block_bytes or VIRTIO_MEM_BLOCK_BYTES
                is_meant = device.node == request.node if request.node is not None else device.node in takers
                if target not in missing or not is_meant:
                    continue
                wanted = round_up_addition(request, missing[target], block)
                added = min(wanted, align_down(min(most, device.size_bytes) - sizes[n], block))
                if added <= 0:
                    continue
                refuse_first(check_host(facts, added) if target == "live" else check_hard_limit(facts, target, added))
                sizes[n] += added
                _take(missing, target, added)
        resizes += plan_resizes(devices, sizes, target)
    return tuple(resizes)


def find_halves(
    devices: tuple[MemoryDevice, ...], target: Target, facts: Facts, resizes: list[PlannedResize]
) -> list[int]:
    """Return what the other half of each persistent virtio-mem device has once the running VM's are resized.

    Where there is none, and for the running VM: what the device has itself.
    """
    live = facts.domain.live
    halves = [None if target == "live" or live is None else find_other_half(device, live) for device in devices]
    planned = {(one.alias, one.address): one.requested_bytes for one in resizes if one.target == "live"}
    return [
        device.plugged_bytes if half is None else planned.get((half.alias, half.address), half.plugged_bytes)
        for device, half in zip(devices, halves, strict=True)
    ]


def plan_resizes(devices: tuple[MemoryDevice, ...], sizes_bytes: list[int], target: Target) -> list[PlannedResize]:
    """Return the resizes of those devices that are to have another size than they have."""
    sized = zip(devices, sizes_bytes, strict=True)
    return [plan_resize(device, size, target) for device, size in sized if size != device.plugged_bytes]


def plan_resize(device: MemoryDevice, requested_bytes: int, target: Target) -> PlannedResize:
    """Return the resize of a virtio-mem device of one definition."""
    return PlannedResize(
        alias=device.alias,
        node=device.node,
        size_bytes=device.size_bytes,
        former_bytes=device.plugged_bytes,
        requested_bytes=requested_bytes,
        target=target,
        address=device.address,
    )


def _settle_others(found: Facts, settled: Facts, resizes: tuple[PlannedResize, ...]) -> tuple[PlannedResize, ...]:
    """Return what takes back the requests that were not reached of the devices that do not grow."""
    grow = {(resize.target, resize.alias, resize.address) for resize in resizes}
    others = []
    for target in TARGETS:
        for was, device in zip(_virtio_mems(found, target), _virtio_mems(settled, target), strict=True):
            if was != device and (target, device.alias, device.address) not in grow:
                resize = plan_resize(device, device.plugged_bytes, target)
                others.append(msgspec.structs.replace(resize, found_bytes=was.requested_bytes))
    return tuple(others)


def _virtio_mems(facts: Facts, target: Target) -> tuple[MemoryDevice, ...]:
    definition = facts.domain.live if target == "live" else facts.domain.config
    return () if definition is None else definition.virtio_mems


def _find_raised(affect: Affect, facts: Facts) -> int | None:
    """Return what the balloon of the definition is to leave at the next start, where that is less than it leaves now.

    Both definitions are to have the total: with a lower currentMemory the next start would hold some of it back.
    """
    live, config = facts.domain.live, facts.domain.config
    if affect != "both" or live is None or config is None or not config.balloon:
        return None
    wanted = min(balloon_actual(facts, "live"), config.balloon_total_bytes)
    return wanted if config.current_bytes < wanted else None


def _is_saved(facts: Facts, affect: Affect) -> bool:
    """Whether what was asked of the balloon and not reached is in the persistent definition, too."""
    config, actual = facts.domain.config, facts.domain.balloon_bytes
    if affect != "both" or config is None or actual is None:
        return False
    return config.current_bytes == find_balloon_leftover(facts) and actual <= config.balloon_total_bytes


def _is_balloon_s(goal: MemoryGoal) -> bool:
    """Whether the balloon alone provides the requested memory."""
    return goal.balloon_bytes is not None and not goal.holds_balloon and not goal.plugs


def _decide_virtio_mem(
    request: HotPlugMemoryRequest, facts: Facts, missing: dict[Target, int], task_uuid: str
) -> PlannedVirtioMem | None:
    """Return a new virtio-mem device for what the present ones have no room for, as large as it can ever be."""
    if not missing:
        return None
    refuse_first(check_device_support(facts, request.affect, "plug virtio-mem"))
    node = _place(current_definition(facts, request.affect), [max(missing.values())], request.node)[0]
    block = virtio_mem_block_bytes(facts, node)
    added = round_up_addition(request, max(missing.values()), block)
    affect: Affect = "both" if len(missing) == 2 else next(iter(missing))
    refuse_first(check_device_room(facts, affect, "plug virtio-mem", (added,), request.node))
    refuse_first(check_unlocked(facts, affect))
    refuse_first(check_host(facts, added, node) if "live" in missing else ())
    rooms = [
        (definition.max_memory_bytes or 0) - definition.total_bytes
        for definition, name in ((facts.domain.live, "live"), (facts.domain.config, "config"))
        if definition is not None and name in missing
    ]
    planned = PlannedVirtioMem(
        alias=f"{OWN_ALIAS}{task_uuid}-0",
        size_bytes=align_down(min(rooms), block),
        node=node,
        live="live" in missing,
        config="config" in missing,
        block_bytes=block,
        requested_bytes=added,
    )
    missing.clear()
    return planned


def _decide_balloon(request: HotPlugMemoryRequest, facts: Facts) -> int | None:
    """Return the balloon's target, or None where the balloon has no part in this."""
    if request.method in ("dimm", "virtio-mem"):
        return None
    current = current_definition(facts, request.affect)
    actual = balloon_actual(facts, request.affect)
    wanted = align_up(request.memory_size, balloon_page_bytes(facts))
    if request.method == "auto":
        if not current.balloon or actual >= current.balloon_total_bytes:
            return None
        wanted = min(wanted, current.balloon_total_bytes)
    refuse_first(check_balloon(facts, request.affect, wanted))
    if wanted < actual:
        raise _below_current(facts, request.memory_size, actual, "")
    if request.affect != "config":
        refuse_first(check_host(facts, wanted - actual))
    if wanted > actual:
        refuse_first(check_memory_ceiling(facts, request.affect, wanted + current.virtio_mem_bytes))
    return wanted


def _decide_dimms(
    request: HotPlugMemoryRequest, facts: Facts, missing: dict[Target, int], task_uuid: str
) -> tuple[tuple[PlannedDimm, ...], bool]:
    """Return the dimms that bring each definition up to the target, and whether they go one by one.

    What both definitions lack is attached to both at once.
    """
    if not missing:
        return (), False
    refuse_first(check_plugs_memory(facts.guest.os) if request.affect != "config" else ())
    refuse_first(check_device_support(facts, request.affect, "plug dimms"))
    refuse_first(check_device_room(facts, request.affect, "plug dimms", (), request.node))
    parts: list[tuple[int, bool, bool]] = []
    one_by_one, quantum = False, dimm_quantum(facts, request.node)
    both = min(missing.get("live", 0), missing.get("config", 0))
    for amount, live, config in (
        (both, True, True),
        (missing.get("live", 0) - both, True, False),
        (missing.get("config", 0) - both, False, True),
    ):
        if amount:
            machine = find_machine(current_definition(facts, request.affect))
            added = round_up_addition(request, amount, quantum)
            sizes = _split(added, request.dimm_size, quantum, machine.most_slots)
            if live:
                sizes, one_by_one = split_for_guest(facts, sizes, quantum, online=request.guest_online)
            parts += [(size, live, config) for size in sizes]
    for affect in TARGETS:
        wanted = tuple(size for size, live, config in parts if (live if affect == "live" else config))
        if wanted:
            refuse_first(check_device_room(facts, affect, "plug dimms", wanted, request.node))
            refuse_first(check_placement(facts, affect, wanted, request.node))
    nodes = _place(current_definition(facts, request.affect), [size for size, _, _ in parts], request.node)
    for node in sorted(set(nodes), key=lambda one: one or 0):
        live_bytes = sum(size for (size, live, _), place in zip(parts, nodes, strict=True) if live and place == node)
        refuse_first(check_host(facts, live_bytes, node))
    dimms = tuple(
        PlannedDimm(alias=f"{OWN_ALIAS}{task_uuid}-{n}", size_bytes=size, node=node, live=live, config=config)
        for n, ((size, live, config), node) in enumerate(zip(parts, nodes, strict=True))
    )
    return dimms, one_by_one


def _split(added_bytes: int, dimm_bytes: int | None, quantum: int, most: int) -> list[int]:
    """Return the sizes of the dimms that make up an aligned amount, none larger than `dimm_bytes`.

    Raises:
        AgentError: MEMORY_NOT_ALIGNED; SLOTS_EXHAUSTED, before a list is made of more than any VM can have.
    """
    if dimm_bytes is None:
        return [added_bytes]
    if dimm_bytes % quantum:
        raise AgentError(
            Code.MEMORY_NOT_ALIGNED,
            f'"dimmSize" is {format_size(dimm_bytes)}, the guest takes multiples of {format_size(quantum)}',
            remedy=f"Request dimms of {align_up(dimm_bytes, quantum)} bytes.",
        )
    if (count := -(-added_bytes // dimm_bytes)) > most:
        raise AgentError(
            Code.SLOTS_EXHAUSTED,
            f"{count} dimms of {format_size(dimm_bytes)} requested, but a VM has at most {most} memory slots",
            remedy='Request larger dimms, or leave "dimmSize" out.',
        )
    whole, rest = divmod(added_bytes, dimm_bytes)
    return [dimm_bytes] * whole + ([rest] if rest else [])


def _place(definition: Definition, sizes_bytes: list[int], node: int | None) -> list[int | None]:
    """Return a guest NUMA node for each device: the asked one, else each time the one that has least by then.

    None where the guest has no cells, and its machine asks for none.
    """
    if node is not None:
        return [node for _ in sizes_bytes]
    takers = _find_takers(definition)
    has = {cell.id: cell.memory_bytes for cell in definition.cells if cell.id in takers}
    for device in definition.devices:
        if device.node in has:
            has[device.node] += device.plugged_bytes
    nodes = list[int | None]()
    for size in sizes_bytes if has else ():
        chosen = min(has, key=lambda cell: (has[cell], cell))
        has[chosen] += size
        nodes.append(chosen)
    return nodes or [None] * len(sizes_bytes)


def _find_takers(definition: Definition) -> frozenset[int | None]:
    """Return the guest NUMA nodes that get memory where none is asked for; None stands for the one without cells.

    A node without vCPUs gets memory only where it is asked for: it is there for another kind of memory.
    """
    with_cpus = frozenset(cell.id for cell in definition.cells if cell.cpus)
    return with_cpus or frozenset(cell.id for cell in definition.cells) or frozenset({None, 0})


def _applied(affect: Affect, ending: Ending) -> int | None:
    if ending.after is None:
        return None
    goal = ending.goal
    if goal is not None and goal.balloon_live and _is_balloon_s(goal):
        return ending.after.domain.balloon_bytes
    definition = ending.after.domain.config if affect == "config" else ending.after.domain.live
    return definition.memory_bytes if definition else None


def _take(missing: dict[Target, int], target: Target, amount: int) -> None:
    missing[target] -= amount
    if missing[target] <= 0:
        del missing[target]


def current_definition(facts: Facts, affect: Affect) -> Definition:
    """Return the definition that a target is held against: the running VM's, where that is to change."""
    return facts.get_config() if affect == "config" else facts.get_live()


def balloon_actual(facts: Facts, affect: Affect) -> int:
    """Return what the balloon leaves of boot memory and dimms now."""
    if affect == "config":
        return facts.get_config().current_bytes
    actual = facts.domain.balloon_bytes
    return facts.get_live().current_bytes if actual is None else actual


def _below_current(facts: Facts, target_bytes: int, current_bytes: int, addition: str) -> AgentError:
    return AgentError(
        Code.TARGET_BELOW_CURRENT,
        f"{format_size(target_bytes)} requested, VM {facts.domain.name} has {format_size(current_bytes)}{addition}",
    )


HOT_PLUG_MEMORY = Command(
    name="HotPlugMemory",
    subcommand="plug-memory",
    path="/vm/hotplug/memory",
    summary="Raise a VM's memory to a total, online in the guest",
    request=HotPlugMemoryRequest,
    reply=MemoryReply,
    goal=MemoryGoal,
    observe_guest=frozenset({"memory"}),
    observe_first=frozenset({"os", "budget", "balloon target"}),
    decide=decide,
    next_steps=next_steps,
    reply_fields=reply_fields,
    role="plug",
    resizes=Resize(frozenset({"memory"}), "up"),
    refusals=(
        *STATE_REFUSALS,
        Code.NOT_AS_EXPECTED,
        Code.TARGET_BELOW_CURRENT,
        Code.MACHINE_NOT_SUPPORTED,
        Code.NO_ACPI,
        Code.NO_MAX_MEMORY,
        Code.NO_NUMA_CELL,
        Code.NUMA_CELLS_INCOMPLETE,
        Code.NUMA_NODE_NOT_FOUND,
        Code.ABOVE_POLICY,
        Code.MEMORY_ABOVE_MAXIMUM,
        Code.MEMORY_ENCRYPTED,
        Code.MEMORY_HARD_LIMIT,
        Code.MEMORY_LOCK_LIMIT,
        Code.MEMORY_LOCKED,
        Code.SLOTS_EXHAUSTED,
        Code.MEMORY_NOT_ALIGNED,
        Code.MEMORY_DEVICE_MISALIGNED,
        Code.HOST_MEMORY_SHORT,
        Code.HOST_MEMORY_PROMISED,
        Code.HOST_NODE_MEMORY_SHORT,
        Code.HOST_HUGEPAGES_SHORT,
        Code.GUEST_MEMORY_SHORT,
        Code.GUEST_OS_UNABLE,
        Code.NO_BALLOON,
        Code.BALLOON_ABOVE_TOTAL,
    ),
)
