"""HotPlugCpu: more vCPUs for a running VM, its persistent definition, or both."""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvmagent.model.checks import STATE_REFUSALS, check_cpu, check_expected, check_state, refuse_first
from kvmagent.model.command import Command, Ending, Goal, Resize, Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.policy import may_online
from kvmagent.model.reply import Problem, VmReply
from kvmagent.model.steps import (
    AnyStep,
    AwaitGuestVcpus,
    OnlineGuestVcpus,
    SetVcpus,
)

from .cpushares import PlannedShares, are_shares_set, explain_shares, plan_shares, shares_steps
from .requests import HotPlugCpuRequest
from .vcpus import FormerVcpus, find_former, is_back, undo_steps


class CpuGoal(Goal, frozen=True, rename="camel"):
    """A total of vCPUs. `known` are the guest's CPUs before the change: only others are brought online, and those that
    an earlier task left offline (`back`).

    With a `failure` the goal is to have the former vCPUs again. `resumed`: the task was interrupted since it has this
    goal, and what the guest uses by now may be somebody else's doing.
    """

    cpu_num: int
    live: bool
    config: bool
    added: int
    known: tuple[int, ...] | None
    guest_online: bool
    timeout_sec: float
    shares: tuple[PlannedShares, ...] = ()
    former: FormerVcpus | None = None
    resumed: bool = False
    back: tuple[int, ...] = ()


def decide(request: HotPlugCpuRequest, facts: Facts, task_uuid: str) -> CpuGoal:
    """Return the goal of a request.

    Raises:
        AgentError: VM_NOT_RUNNING, VM_TRANSIENT, TARGET_BELOW_CURRENT, CPU_ABOVE_MAXIMUM, NO_ACPI, ...
    """
    refuse_first(check_state(facts.domain, request.affect))
    refuse_first(check_expected(facts, request.affect, request.expected_cpu_num, None))
    live, config = request.affect != "config", request.affect != "live"
    current = (facts.get_live() if live else facts.get_config()).vcpu_current
    if request.cpu_num < current:
        raise AgentError(
            Code.TARGET_BELOW_CURRENT, f"{request.cpu_num} vCPUs requested, VM {facts.domain.name} has {current}"
        )
    wanted = request.cpu_num
    goal = CpuGoal(
        totals=(Total("cpu", live=wanted if live else None, config=_keep(wanted, facts) if config else None),),
        cpu_num=wanted,
        live=live,
        config=config,
        added=request.cpu_num - current if live else 0,
        known=tuple(sorted(cpu.id for cpu in facts.guest.vcpus)) if facts.guest.vcpus is not None else None,
        guest_online=request.guest_online and may_online(facts),
        timeout_sec=request.timeout_sec,
        shares=plan_shares(facts, request.affect, wanted, scale=request.scale_shares, direction="up"),
        former=find_former(facts, live=live, config=config),
        back=tuple(sorted(facts.left_offline)) if live else (),
    )
    if next_steps(goal, facts, frozenset()):
        refuse_first(check_cpu(facts, request.affect, request.cpu_num))
    return goal


def next_steps(goal: CpuGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: the hypervisor's part first, then the guest's; or the way back.

    Raises:
        AgentError: VM_MIGRATED, when the guest does not use the one vCPU that it was given first.
    """
    if goal.failure is not None:
        return _undo_steps(goal, facts, failed)
    if _is_one_first(goal, facts):
        return _first_steps(goal, facts, failed)
    return _plug_steps(goal, facts, failed)


def _plug_steps(goal: CpuGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    live = goal.live and facts.get_live().vcpu_current < goal.cpu_num
    config = goal.config and facts.get_config().vcpu_current < goal.cpu_num
    steps: list[AnyStep] = []
    if live or config:
        steps.append(SetVcpus(count=goal.cpu_num, target="config" if not live else "both" if config else "live"))
    if steps and goal.added and goal.known is not None:
        steps.append(_await_guest(goal, goal.known))
    return tuple(steps) or shares_steps(goal.shares, facts, goal.cpu_num, failed) or _guest_steps(goal, facts, failed)


def rollback_goal(goal: CpuGoal, seen: Facts, facts: Facts, error: AgentError) -> CpuGoal | None:
    """Return the way back, where there is something to be done on it; None where it failed itself.

    There is none where the VM had other vCPUs than the former ones already when what failed was planned: these may be
    somebody else's.
    """
    if goal.failure is not None or goal.former is None:
        return None
    # What was planned last began from the first vCPU, which is the task's own.
    if error.code is not Code.VM_MIGRATED and not is_back(goal.former, seen):
        return None
    way_back = msgspec.structs.replace(goal, failure=Problem.of(error), resumed=False)
    return way_back if next_steps(way_back, facts, frozenset()) else None


def resumed_goal(goal: CpuGoal) -> CpuGoal:
    """Return the goal as it is pursued after an interruption: the same target, the way back with more caution."""
    return msgspec.structs.replace(goal, resumed=True)


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return the warning about CPU shares that could not follow."""
    return {"warnings": explain_shares(ending) if ending.is_done else []}


def _keep(cpu_num: int, facts: Facts) -> int:
    """Return what the persistent definition is to have: it may have more already, and keeps it."""
    return max(cpu_num, facts.get_config().vcpu_current)


def _guest_steps(goal: CpuGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    guest = facts.guest
    added = goal.added + len(goal.back)
    if not added or goal.known is None or guest.vcpus is None:
        return ()
    others = tuple(n for n in goal.known if n not in goal.back)
    new = [cpu for cpu in guest.vcpus if cpu.id not in others]
    if len(new) < added and AwaitGuestVcpus.__name__ not in failed:
        return (AwaitGuestVcpus(known=others, added=added, timeout_sec=goal.timeout_sec),)
    offline = tuple(sorted(cpu.id for cpu in new if not cpu.online))
    if offline and goal.guest_online and OnlineGuestVcpus.__name__ not in failed:
        return (OnlineGuestVcpus(ids=offline),)
    return ()


def _is_one_first(goal: CpuGoal, facts: Facts) -> bool:
    """Return whether a single vCPU is plugged, into the running VM alone, until the guest uses it.

    After a live migration some guests never can. A single one that nobody can prove is plugged as any other.
    """
    known, listed = goal.known, facts.guest.vcpus or ()
    if known is not None and any(cpu.online and cpu.id not in known for cpu in listed):
        return False
    return facts.domain.migrated and goal.added >= (1 if known is not None and goal.guest_online else 2)


def _first_steps(goal: CpuGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do for the first vCPU of a VM that was migrated.

    Raises:
        AgentError: VM_MIGRATED, when that is nothing.
    """
    first = goal.cpu_num - goal.added + 1
    alone = msgspec.structs.replace(goal, cpu_num=first, added=1, config=False, shares=())
    if steps := _plug_steps(alone, facts, failed):
        return steps
    rest = f"; {goal.added - 1} more were not plugged" if goal.added > 1 else ""
    raise AgentError(
        Code.VM_MIGRATED,
        f"VM {facts.domain.name} was live-migrated to this host, and its guest does not use the first vCPU that "
        f"was plugged since{rest}",
    )


def _undo_steps(goal: CpuGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """None where the shares have followed already: then the change was whole, and what failed came after it."""
    if goal.former is None or are_shares_set(goal.shares, facts):
        return ()
    return undo_steps(
        goal.former,
        facts,
        failed,
        cpu_num=goal.cpu_num,
        known=goal.known,
        may_offline=not goal.resumed,
        timeout_sec=goal.timeout_sec,
    )


def _await_guest(goal: CpuGoal, known: tuple[int, ...]) -> AwaitGuestVcpus:
    return AwaitGuestVcpus(known=known, added=goal.added, timeout_sec=goal.timeout_sec)


HOT_PLUG_CPU = Command(
    name="HotPlugCpu",
    subcommand="plug-cpu",
    path="/vm/hotplug/cpu",
    summary="Raise a VM's vCPUs to a total, online in the guest",
    request=HotPlugCpuRequest,
    reply=VmReply,
    goal=CpuGoal,
    observe_guest=frozenset({"cpus"}),
    observe_first=frozenset({"budget"}),
    decide=decide,
    next_steps=next_steps,
    reply_fields=reply_fields,
    role="plug",
    resizes=Resize(frozenset({"cpu"}), "up"),
    refusals=(
        *STATE_REFUSALS,
        Code.VM_SUSPENDED,
        Code.NOT_AS_EXPECTED,
        Code.TARGET_BELOW_CURRENT,
        Code.NO_ACPI,
        Code.MACHINE_NOT_SUPPORTED,
        Code.ABOVE_POLICY,
        Code.CPU_ABOVE_MAXIMUM,
        Code.CPU_ABOVE_HOST_LIMIT,
        Code.CPU_TOPOLOGY_MISMATCH,
        Code.CPU_NOT_WHOLE_CORE,
        Code.VM_MIGRATED,
        Code.HOST_MEMORY_PROMISED,
        Code.MEMORY_HARD_LIMIT,
    ),
    rollback_goal=rollback_goal,
    resumed_goal=resumed_goal,
)
