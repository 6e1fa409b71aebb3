"""HotPlugCpuMemory: memory first, then vCPUs; when either fails on the way, what was done is undone."""

from dataclasses import replace
from typing import Any

import msgspec

from kvmagent.model.command import Command, Ending, Goal, Problem
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Facts
from kvmagent.model.steps import AnyStep

from . import cpu, memory, memorygoal, shrink
from .checks import check_expected, check_state, refuse_first
from .cpu import CpuGoal
from .cpushares import explain_shares
from .guestmemory import find_growth, memory_stages
from .memorygoal import MemoryGoal
from .reply import settle, shared_fields, tell_undo
from .requests import HotPlugCpuMemoryRequest, HotPlugCpuRequest, HotPlugMemoryRequest, MemoryReply
from .shrink import ShrinkGoal


class CpuMemoryGoal(Goal, frozen=True, rename="camel"):
    """Both goals; after a failure, which one it was and the way back instead."""

    memory: MemoryGoal
    cpu: CpuGoal
    failure: Problem | None = None
    undo_memory: ShrinkGoal | None = None


def decide(request: HotPlugCpuMemoryRequest, facts: Facts, task_uuid: str) -> CpuMemoryGoal:
    """Return the goal of a request: what stands in the way of either part refuses both.

    Raises:
        AgentError: the first thing that stands in the way; see `HOT_PLUG_CPU_MEMORY.refusals`.
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
    return CpuMemoryGoal(
        memory=memory.decide(more_memory, facts, task_uuid),
        cpu=cpu.decide(more_cpus, facts, task_uuid),
    )


def advance(goal: CpuMemoryGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: the memory, then the vCPUs; or the way back.

    Raises:
        AgentError: when the memory cannot be had in full: then there are to be no vCPUs either.
    """
    if goal.undo_memory is not None:
        way_back = cpu.advance(goal.cpu, facts, spent) if goal.cpu.failure is not None else ()
        return way_back or shrink.advance(goal.undo_memory, facts, spent)
    if steps := memorygoal.advance(goal.memory, facts, spent):
        return steps
    if shortfall := memorygoal.find_shortfall(goal.memory, facts):
        raise shortfall
    return cpu.advance(goal.cpu, facts, spent)


def retreat(goal: CpuMemoryGoal, seen: Facts, facts: Facts, error: AgentError) -> CpuMemoryGoal | None:
    """Return the way back, as far as there is one; None where it failed itself."""
    if goal.undo_memory is not None:
        return None
    return msgspec.structs.replace(
        goal,
        cpu=cpu.retreat(goal.cpu, seen, facts, error) or goal.cpu,
        failure=Problem.of(error),
        undo_memory=_undo_memory(goal.memory, facts),
    )


def resume(goal: CpuMemoryGoal) -> CpuMemoryGoal:
    """Return the goal as it is pursued after an interruption."""
    return msgspec.structs.replace(goal, cpu=cpu.resume(goal.cpu))


def conclude(ending: Ending) -> MemoryReply:
    """Return the reply: refused where nothing is left of it, partial where something is."""
    goal, facts = ending.goal, ending.after
    if goal is not None and facts is not None and ending.planned is None:
        ending = replace(ending, error=_find_error(goal, ending, facts))
    warnings: list[Problem] = []
    if goal is not None and goal.failure is None:
        warnings = memorygoal.find_warnings(goal.memory, facts) + cpu.find_warnings(goal.cpu, facts)
    if (outcome := settle(ending)) is None:
        changes_live = goal.memory.changes_live or goal.cpu.added
        outcome = "configured" if not changes_live else "plugged" if warnings else "online"
    definition = None if facts is None else facts.domain.config if _is_config(ending) else facts.domain.live
    explained = memory.explain(replace(ending, goal=None if goal is None else goal.memory)) + explain_shares(ending)
    return MemoryReply(
        **shared_fields(ending, outcome, warnings + explained, memory_stages(ending) + cpu.cpu_stages(ending)),
        requested=ending.request.memory_size,
        aligned=None if goal is None else goal.memory.total_bytes,
        applied=None if definition is None else definition.memory_bytes,
        guest_growth=find_growth(ending),
    )


def _find_error(goal: CpuMemoryGoal, ending: Ending, facts: Facts) -> AgentError | None:
    if goal.failure is not None:
        undone = settle(replace(ending, error=ending.error or tell_undo(goal.failure, undone=True))) == "refused"
        return tell_undo(goal.failure, undone=undone)
    return ending.error or memorygoal.find_shortfall(goal.memory, facts) or cpu.find_shortfall(goal.cpu, facts)


def _is_config(ending: Ending) -> bool:
    return bool(ending.request.affect == "config")


def _undo_memory(goal: MemoryGoal, facts: Facts) -> ShrinkGoal:
    """Return the way back from a memory goal: what there is of its dimms leaves, sizes become the former ones."""
    live, config = facts.domain.live, facts.domain.config
    removals = []
    for dimm in goal.dimms:
        in_live = live.find_device(dimm.alias) if live is not None and dimm.live else None
        in_config = config.find_device(dimm.alias) if config is not None and dimm.config else None
        if device := in_live or in_config:
            removals.append(shrink.plan_removal(device, facts, live=in_live is not None, config=in_config is not None))
    return ShrinkGoal(
        removals=tuple(removals),
        resizes=tuple(
            msgspec.structs.replace(resize, former_bytes=resize.requested_bytes, requested_bytes=resize.former_bytes)
            for resize in goal.resizes
        ),
        balloon_bytes=goal.former_balloon_bytes if goal.balloon_bytes is not None else None,
        balloon_live=goal.balloon_live,
        balloon_config=goal.balloon_config,
        total_bytes=goal.total_bytes,
        guest_online=True,
        timeout_sec=goal.timeout_sec,
        run=facts.run,
    )


HOT_PLUG_CPU_MEMORY = Command(
    name="HotPlugCpuMemory",
    subcommand="plug",
    path="/vm/hotplug/cpumem",
    summary="Bring a VM up to a total of vCPUs and of memory: both or neither",
    request=HotPlugCpuMemoryRequest,
    reply=MemoryReply,
    goal=CpuMemoryGoal,
    observe_guest=frozenset({"cpus", "memory"}),
    observe_first=frozenset({"os"}),
    decide=decide,
    advance=advance,
    conclude=conclude,
    role="plug",
    refusals=tuple(dict.fromkeys((*memory.HOT_PLUG_MEMORY.refusals, *cpu.HOT_PLUG_CPU.refusals))),
    retreat=retreat,
    resume=resume,
)
