"""HotUnplugCpu: fewer vCPUs for a running VM, its persistent definition, or both."""

from collections.abc import Mapping
from typing import Any

from kvmagent.model.checks import (
    STATE_REFUSALS,
    check_awake,
    check_cores_left,
    check_cpu_removal,
    check_expected,
    check_state,
    refuse_first,
)
from kvmagent.model.command import Command, Ending, Goal, Resize, Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.guestos import check_gives_up
from kvmagent.model.reply import VmReply
from kvmagent.model.steps import AnyStep, OfflineGuestVcpus, OnlineGuestVcpus, SetVcpus, UnplugVcpus
from kvmagent.model.units import format_ids

from .cpushares import PlannedShares, explain_shares, plan_shares, shares_steps
from .requests import HotUnplugCpuRequest
from .vcpus import can_remove_vcpus, leaving_ids

_ONLINE = OnlineGuestVcpus.__name__


class UnplugCpuGoal(Goal, frozen=True, rename="camel"):
    """A total of vCPUs to come down to.

    `used` are the guest's CPUs that are taken offline for it: what does not leave is used again.
    """

    cpu_num: int
    live: bool
    config: bool
    guest_online: bool
    timeout_sec: float
    shares: tuple[PlannedShares, ...] = ()
    used: tuple[int, ...] = ()


def decide(request: HotUnplugCpuRequest, facts: Facts, task_uuid: str) -> UnplugCpuGoal:
    """Return the goal of a request.

    Raises:
        AgentError: TARGET_ABOVE_CURRENT, CPU_NOT_WHOLE_CORE, CPU_NOT_REMOVABLE, CPU_REMOVAL_UNSAFE, ...
    """
    refuse_first(check_state(facts.domain, request.affect))
    refuse_first(check_expected(facts, request.affect, request.expected_cpu_num, None))
    live, config = request.affect != "config", request.affect != "live"
    current = (facts.get_live() if live else facts.get_config()).vcpu_current
    if request.cpu_num > current:
        raise AgentError(
            Code.TARGET_ABOVE_CURRENT, f"{request.cpu_num} vCPUs requested, VM {facts.domain.name} has {current}"
        )
    refuse_first(check_cores_left(facts.domain, request.affect, request.cpu_num))
    if live and request.cpu_num < current:
        refuse_first(check_awake(facts.domain, request.affect))
        _refuse_unremovable(facts, request.cpu_num)
    wanted = request.cpu_num
    total = Total(
        "cpu", live=wanted if live else None, config=_keep(wanted, facts) if config else None, direction="down"
    )
    return UnplugCpuGoal(
        totals=(total,),
        cpu_num=wanted,
        live=live,
        config=config,
        guest_online=request.guest_online,
        timeout_sec=request.timeout_sec,
        shares=plan_shares(facts, request.affect, wanted, scale=request.scale_shares, direction="down"),
        used=_used_ids(facts, wanted) if live and request.guest_online else (),
    )


def next_steps(goal: UnplugCpuGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: out of use in the guest, out of the VM; the definition follows what really left."""
    steps: list[AnyStep] = []
    wanted = goal.cpu_num
    if goal.live and facts.get_live().vcpu_current > goal.cpu_num:
        if UnplugVcpus.__name__ in failed:
            wanted = facts.get_live().vcpu_current
            back = _unused_ids(goal, facts)
            if back and f"{UnplugVcpus.__name__} {Code.CPU_REMOVAL_PENDING}" not in failed and _ONLINE not in failed:
                steps.append(OnlineGuestVcpus(ids=back))
        else:
            online = tuple(sorted(frozenset(_used_ids(facts, goal.cpu_num)) & frozenset(goal.used)))
            if online and OfflineGuestVcpus.__name__ not in failed:
                steps.append(OfflineGuestVcpus(ids=online))
            steps.append(UnplugVcpus(count=goal.cpu_num, timeout_sec=goal.timeout_sec))
    if goal.config and facts.get_config().vcpu_current > wanted:
        steps.append(SetVcpus(count=wanted, target="config"))
    return tuple(steps) or shares_steps(goal.shares, facts, goal.cpu_num, failed)


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return the warning about CPU shares that could not follow."""
    return {"warnings": explain_shares(ending) if ending.is_done else []}


def _keep(cpu_num: int, facts: Facts) -> int:
    """Return what the persistent definition is to have: it may have fewer already, and keeps to that."""
    return min(cpu_num, facts.get_config().vcpu_current)


def _used_ids(facts: Facts, cpu_num: int) -> tuple[int, ...]:
    """Return the guest's CPUs that it uses, of those that leave."""
    leaving = leaving_ids(facts.get_live(), cpu_num)
    return tuple(cpu.id for cpu in facts.guest.vcpus or () if cpu.id in leaving and cpu.online)


def _unused_ids(goal: UnplugCpuGoal, facts: Facts) -> tuple[int, ...]:
    """Return the guest's CPUs that were taken offline for the goal, and are there yet."""
    there = leaving_ids(facts.get_live(), goal.cpu_num) & frozenset(goal.used)
    return tuple(cpu.id for cpu in facts.guest.vcpus or () if cpu.id in there and not cpu.online)


def _refuse_unremovable(facts: Facts, cpu_num: int) -> None:
    """Refuse before anything is touched what cannot be removed, or what the guest is known not to give up."""
    live = facts.get_live()
    refuse_first(check_cpu_removal(live))
    if not can_remove_vcpus(facts):
        raise AgentError(
            Code.CPU_REMOVAL_UNSAFE, f"VM {facts.domain.name} is emulated: none of its vCPUs can be removed safely"
        )
    refuse_first(check_gives_up(facts.guest.os))
    fixed = sum(vcpu.enabled and not vcpu.hotpluggable for vcpu in live.vcpus)
    if cpu_num < fixed:
        raise AgentError(
            Code.CPU_NOT_REMOVABLE,
            f"{cpu_num} vCPUs requested, but {fixed} vCPUs of VM {facts.domain.name} cannot be removed while it runs",
            details={"least": fixed},
        )
    leaving = leaving_ids(live, cpu_num)
    kept = frozenset(cpu.id for cpu in facts.guest.vcpus or () if cpu.id in leaving and not cpu.can_offline)
    if kept:
        raise AgentError(Code.GUEST_CPU_IN_USE, f"the guest says that CPUs {format_ids(kept)} cannot go offline")


HOT_UNPLUG_CPU = Command(
    name="HotUnplugCpu",
    subcommand="unplug-cpu",
    path="/vm/hotunplug/cpu",
    summary="Lower a VM's vCPUs to a total",
    request=HotUnplugCpuRequest,
    reply=VmReply,
    goal=UnplugCpuGoal,
    observe_guest=frozenset({"cpus"}),
    observe_first=frozenset({"os"}),
    decide=decide,
    next_steps=next_steps,
    reply_fields=reply_fields,
    role="unplug",
    resizes=Resize(frozenset({"cpu"}), "down"),
    refusals=(
        *STATE_REFUSALS,
        Code.VM_SUSPENDED,
        Code.NOT_AS_EXPECTED,
        Code.TARGET_ABOVE_CURRENT,
        Code.CPU_NOT_WHOLE_CORE,
        Code.MACHINE_NOT_SUPPORTED,
        Code.CPU_NOT_REMOVABLE,
        Code.CPU_REMOVAL_UNSAFE,
        Code.GUEST_CPU_IN_USE,
        Code.GUEST_OS_UNABLE,
    ),
)
