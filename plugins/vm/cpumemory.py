"""HotPlugCpuMemory: memory first, then vCPUs; if either fails, what was done is undone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from kvmagent.model.checks import check_expected, check_state, refuse_first
from kvmagent.model.command import Command, Ending, Goal, Resize
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Facts
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AnyStep, SetBalloon

from . import cpu, memory, memorygoal, shrink
from .cpu import CpuGoal
from .cpushares import explain_shares
from .memorygoal import MemoryGoal
from .requests import HotPlugCpuMemoryRequest, HotPlugCpuRequest, HotPlugMemoryRequest, MemoryReply
from .shrink import ShrinkGoal


class CpuMemoryGoal(Goal, frozen=True, rename="camel"):
    """Both goals; after a failure the way back instead. `saved_balloon_bytes`: where the definition had it."""

    memory: MemoryGoal
    cpu: CpuGoal
    undo_memory: ShrinkGoal | None = None
    saved_balloon_bytes: int | None = None

    @property
    def slots(self) -> int:
        return self.memory.slots


def decide(request: HotPlugCpuMemoryRequest, facts: Facts, task_uuid: str) -> CpuMemoryGoal:
    """Return the goal of a request: a blocker of either part refuses both.

    Raises:
        AgentError: the first blocker; see `HOT_PLUG_CPU_MEMORY.refusals`.
    """
    shared: dict[str, Any] = {
        "vm_uuid": request.vm_uuid,
        "affect": request.affect,
        "guest_online": request.guest_online,
        "timeout_sec": request.timeout_sec,
    }
    refuse_first(check_state(facts.domain, request.affect))
    refuse_first(check_expected(facts, request.affect, request.expected_cpu_num, request.expected_memory_size))
    more_memory = HotPlugMemoryRequest(memory_size=request.memory_size, **shared)
    more_cpus = HotPlugCpuRequest(cpu_num=request.cpu_num, scale_shares=request.scale_shares, **shared)
    memory_goal, cpu_goal = memory.decide(more_memory, facts, task_uuid), cpu.decide(more_cpus, facts, task_uuid)
    return CpuMemoryGoal(
        totals=memory_goal.totals + cpu_goal.totals,
        memory=memory_goal,
        cpu=cpu_goal,
        saved_balloon_bytes=facts.get_config().current_bytes if memory_goal.balloon_config else None,
    )


def next_steps(goal: CpuMemoryGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: the memory, then the vCPUs; or the way back.

    Raises:
        AgentError: when the memory cannot be had in full: then there are to be no vCPUs either.
    """
    if goal.undo_memory is not None:
        way_back = cpu.next_steps(goal.cpu, facts, failed) if goal.cpu.failure is not None else ()
        return way_back or shrink.next_steps(goal.undo_memory, facts, failed) or _saved_balloon_steps(goal, facts)
    if steps := memorygoal.next_steps(goal.memory, facts, failed):
        return steps
    if shortfall := memorygoal.find_shortfall(goal.memory, facts):
        raise shortfall
    return cpu.next_steps(goal.cpu, facts, failed)


def rollback_goal(goal: CpuMemoryGoal, seen: Facts, facts: Facts, error: AgentError) -> CpuMemoryGoal | None:
    """Return the way back, as far as there is one; None where it failed itself."""
    if goal.undo_memory is not None:
        return None
    return msgspec.structs.replace(
        goal,
        cpu=cpu.rollback_goal(goal.cpu, seen, facts, error) or goal.cpu,
        failure=Problem.of(error),
        undo_memory=_undo_memory(goal.memory, facts, same_run=goal.run == facts.run),
    )


def resumed_goal(goal: CpuMemoryGoal) -> CpuMemoryGoal:
    """Return the goal as it is pursued after an interruption."""
    return msgspec.structs.replace(goal, cpu=cpu.resumed_goal(goal.cpu))


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return what both parts have to say."""
    goal = None if ending.goal is None else ending.goal.memory
    told = memory.reply_fields(replace(ending, goal=goal))
    definition = None
    if ending.after is not None:
        domain = ending.after.domain
        definition = domain.config if ending.request.affect == "config" else domain.live
    return {
        **told,
        "warnings": told["warnings"] + (explain_shares(ending) if ending.is_done else []),
        "aligned": None if goal is None else goal.total_bytes,
        "applied": None if definition is None else definition.memory_bytes,
    }


def _saved_balloon_steps(goal: CpuMemoryGoal, facts: Facts) -> tuple[AnyStep, ...]:
    """Have the definition's balloon where it was; it counts the dimms that could not leave."""
    config = facts.domain.config
    if goal.saved_balloon_bytes is None or config is None:
        return ()
    left = (config.find_device(dimm.alias) for dimm in goal.memory.dimms)
    former = goal.saved_balloon_bytes + sum(device.size_bytes for device in left if device is not None)
    return (SetBalloon(size_bytes=former, target="config"),) if config.current_bytes > former else ()


def _undo_memory(goal: MemoryGoal, facts: Facts, *, same_run: bool) -> ShrinkGoal:
    """Return the way back from a memory goal: what there is of its dimms leaves, sizes become the former ones.

    A virtio-mem device that it attached is emptied, as with every removal. The balloon goes back in the run alone in
    which it was there: a start deflates it.
    """
    live, config = facts.domain.live, facts.domain.config
    removals = []
    for dimm in goal.dimms:
        in_live = live.find_device(dimm.alias) if live is not None and dimm.live else None
        in_config = config.find_device(dimm.alias) if config is not None and dimm.config else None
        if device := in_live or in_config:
            removals.append(shrink.plan_removal(device, facts, live=in_live is not None, config=in_config is not None))
    resizes = [
        msgspec.structs.replace(resize, former_bytes=resize.requested_bytes, requested_bytes=resize.former_bytes)
        for resize in goal.resizes
    ]
    for target, definition in ((name, facts.find_definition(name)) for name in memory.TARGETS):
        attached = definition and goal.virtio_mem and definition.find_device(goal.virtio_mem.alias)
        resizes += [memory.plan_resize(attached, 0, target)] if attached else []
    return ShrinkGoal(
        removals=tuple(removals),
        resizes=tuple(resizes),
        balloon_bytes=goal.former_balloon_bytes if goal.balloon_bytes is not None else None,
        balloon_live=goal.balloon_live and same_run,
        balloon_config=False,
        total_bytes=goal.total_bytes,
        guest_online=True,
        timeout_sec=goal.timeout_sec,
        run=facts.run,
    )


HOT_PLUG_CPU_MEMORY = Command(
    name="HotPlugCpuMemory",
    subcommand="plug",
    path="/vm/hotplug/cpumem",
    summary="Raise a VM's vCPUs and memory to totals: both or neither",
    request=HotPlugCpuMemoryRequest,
    reply=MemoryReply,
    goal=CpuMemoryGoal,
    observe_guest=frozenset({"cpus", "memory"}),
    observe_first=frozenset({"os", "budget", "balloon target"}),
    decide=decide,
    next_steps=next_steps,
    reply_fields=reply_fields,
    role="plug",
    resizes=Resize(frozenset({"cpu", "memory"}), "up"),
    refusals=tuple(dict.fromkeys((*memory.HOT_PLUG_MEMORY.refusals, *cpu.HOT_PLUG_CPU.refusals))),
    rollback_goal=rollback_goal,
    resumed_goal=resumed_goal,
)
