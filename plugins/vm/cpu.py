"""HotPlugCpu: more vCPUs for a running VM, its persistent definition, or both."""

from dataclasses import replace

import msgspec

from kvmagent.model.command import Command, Ending, Goal, Problem
from kvmagent.model.errors import CPU_ONLINE_HINT, AgentError, Code
from kvmagent.model.facts import Facts, GuestVcpu
from kvmagent.model.steps import (
    AnyStep,
    AwaitGuestVcpus,
    OfflineGuestVcpus,
    OnlineGuestVcpus,
    SetVcpus,
    UnplugVcpus,
)
from kvmagent.model.units import format_ids

from .checks import STATE_REFUSALS, check_cpu, check_expected, check_state, refuse_first
from .cpushares import PlannedShares, are_shares_set, explain_shares, plan_shares, shares_steps
from .policy import explain_not_asked, may_online
from .reply import (
    find_stages,
    not_verified,
    refused_warning,
    settle,
    shared_fields,
    silence_warning,
    tell_undo,
    warning,
)
from .requests import HotPlugCpuRequest, Stage, VmReply
from .vcpus import FormerVcpus, find_former, is_back, undo_steps


class CpuGoal(Goal, frozen=True, rename="camel"):
    """A total of vCPUs. `known` are the guest's CPUs before the change: only others are brought online.

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
    failure: Problem | None = None
    resumed: bool = False


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
            Code.TARGET_BELOW_CURRENT, f"{request.cpu_num} vCPUs were asked for, VM {facts.domain.name} has {current}"
        )
    goal = CpuGoal(
        cpu_num=request.cpu_num,
        live=live,
        config=config,
        added=request.cpu_num - current if live else 0,
        known=tuple(sorted(cpu.id for cpu in facts.guest.vcpus)) if facts.guest.vcpus is not None else None,
        guest_online=request.guest_online and may_online(facts),
        timeout_sec=request.timeout_sec,
        shares=plan_shares(facts, request.affect, request.cpu_num, scale=request.scale_shares),
        former=find_former(facts, live=live, config=config),
    )
    if advance(goal, facts, frozenset()):
        refuse_first(check_cpu(facts, request.affect, request.cpu_num))
    return goal


def advance(goal: CpuGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: the hypervisor's part first, then the guest's; or the way back."""
    if goal.failure is not None:
        return _undo_steps(goal, facts, spent)
    live = goal.live and facts.get_live().vcpu_current < goal.cpu_num
    config = goal.config and facts.get_config().vcpu_current != goal.cpu_num
    steps: list[AnyStep] = []
    if live or config:
        steps.append(SetVcpus(count=goal.cpu_num, target="config" if not live else "both" if config else "live"))
    if steps and goal.added and goal.known is not None:
        steps.append(_await_guest(goal, goal.known))
    return tuple(steps) or shares_steps(goal.shares, facts, goal.cpu_num, spent) or _guest_steps(goal, facts, spent)


def retreat(goal: CpuGoal, seen: Facts, facts: Facts, error: AgentError) -> CpuGoal | None:
    """Return the way back, where there is something to be done on it; None where it failed itself.

    There is none where the VM had other vCPUs than the former ones already when what failed was planned: these may be
    somebody else's.
    """
    if goal.failure is not None or goal.former is None or not is_back(goal.former, seen):
        return None
    way_back = msgspec.structs.replace(goal, failure=Problem.of(error), resumed=False)
    return way_back if advance(way_back, facts, frozenset()) else None


def resume(goal: CpuGoal) -> CpuGoal:
    """Return the goal as it is pursued after an interruption: the same target, the way back with more caution."""
    return msgspec.structs.replace(goal, resumed=True)


def conclude(ending: Ending) -> VmReply:
    """Return the reply: online only where the guest itself runs on all of them, refused where nothing is left of it."""
    goal, facts = ending.goal, ending.after
    undone = goal is not None and facts is not None and _is_undone(goal, facts)
    if goal is not None and facts is not None and ending.planned is None:
        failed = goal.failure and tell_undo(goal.failure, undone=undone)
        ending = replace(ending, error=failed or ending.error or find_shortfall(goal, facts))
    warnings = find_warnings(goal, facts)
    outcome = settle(ending)
    if goal is not None and goal.failure is not None:
        outcome = "refused" if undone else "partial"
    if outcome is None:
        outcome = "configured" if not goal.added else "plugged" if warnings else "online"
    return VmReply(**shared_fields(ending, outcome, warnings + explain_shares(ending), cpu_stages(ending)))


def cpu_stages(ending: Ending) -> list[Stage]:
    """Return how far the vCPUs have come: of the VM, listed by the guest, used by the guest."""
    facts = ending.after
    if facts is None or facts.domain.live is None:
        return []
    listed = None if facts.guest.vcpus is None else len(facts.guest.vcpus)
    return find_stages(
        ending,
        "cpu",
        (facts.domain.live.vcpu_current, listed, facts.guest.cpus_online),
        ((SetVcpus, UnplugVcpus), (AwaitGuestVcpus,), (OnlineGuestVcpus, OfflineGuestVcpus)),
    )


def _guest_steps(goal: CpuGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    guest = facts.guest
    if not goal.added or goal.known is None or guest.vcpus is None:
        return ()
    new = [cpu for cpu in guest.vcpus if cpu.id not in goal.known]
    if len(new) < goal.added and AwaitGuestVcpus.__name__ not in spent:
        return (_await_guest(goal, goal.known),)
    offline = tuple(sorted(cpu.id for cpu in new if not cpu.online))
    if offline and goal.guest_online and OnlineGuestVcpus.__name__ not in spent:
        return (OnlineGuestVcpus(ids=offline),)
    return ()


def _undo_steps(goal: CpuGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """None where the shares have followed already: then the change was whole, and what failed came after it."""
    if goal.former is None or are_shares_set(goal.shares, facts):
        return ()
    return undo_steps(
        goal.former,
        facts,
        spent,
        cpu_num=goal.cpu_num,
        known=goal.known,
        may_offline=not goal.resumed,
        timeout_sec=goal.timeout_sec,
    )


def _is_undone(goal: CpuGoal, facts: Facts) -> bool:
    """Return whether the way back was taken, and the VM has its former vCPUs again; the very same ones."""
    return goal.failure is not None and goal.former is not None and is_back(goal.former, facts)


def _await_guest(goal: CpuGoal, known: tuple[int, ...]) -> AwaitGuestVcpus:
    return AwaitGuestVcpus(known=known, added=goal.added, timeout_sec=goal.timeout_sec)


def find_warnings(goal: CpuGoal | None, facts: Facts | None) -> list[Problem]:
    """Return why the guest may not use all vCPUs of the running VM; nothing when it says that it does."""
    if facts is None or facts.domain.live is None or goal is None or not goal.live:
        return []
    guest, count = facts.guest, facts.domain.live.vcpu_current
    if guest.silence is not None:
        return [silence_warning(guest, CPU_ONLINE_HINT)]
    if guest.vcpus is None:
        return [refused_warning(guest, "guest-get-vcpus", CPU_ONLINE_HINT)]
    found = idle_warnings(guest.vcpus, count, frozenset(goal.known or ()))
    if found:
        found += migration_warnings(facts)
    if not goal.guest_online and any(not cpu.online for cpu in guest.vcpus):
        found.append(explain_not_asked(facts))
    return found


def migration_warnings(facts: Facts) -> list[Problem]:
    """Return that the VM was migrated, where libvirt knows it. Observed by users: cubecos 1269."""
    words = f"VM {facts.domain.name} came to this host by live migration"
    return [warning(Code.VM_MIGRATED, words)] if facts.domain.migrated else []


def idle_warnings(vcpus: tuple[GuestVcpu, ...], count: int, known: frozenset[int] = frozenset()) -> list[Problem]:
    """Return which of the VM's `count` vCPUs the guest does not list or use; `known` were there before a task."""
    found = []
    if len(vcpus) < count:
        found.append(warning(Code.GUEST_CPU_NOT_SEEN, f"the VM has {count} vCPUs, the guest lists {len(vcpus)}"))
    offline = frozenset(cpu.id for cpu in vcpus if not cpu.online)
    if offline:
        kept = offline & known
        whose = f"; {format_ids(kept)} were so before and are left to the guest's owner" if kept else ""
        found.append(warning(Code.GUEST_CPU_OFFLINE, f"CPUs {format_ids(offline)} are offline in the guest{whose}"))
    return found


def find_shortfall(goal: CpuGoal, facts: Facts) -> AgentError | None:
    """Return the error of a definition that, read again, does not have the goal's vCPUs."""
    for name, asked, definition in (
        ("running", goal.live, facts.domain.live),
        ("persistent", goal.config, facts.domain.config),
    ):
        if asked and (definition is None or definition.vcpu_current != goal.cpu_num):
            has = "gone" if definition is None else f"at {definition.vcpu_current}"
            return not_verified(f"{goal.cpu_num} vCPUs were set, the {name} VM is {has}")
    return None


HOT_PLUG_CPU = Command(
    name="HotPlugCpu",
    subcommand="plug-cpu",
    path="/vm/hotplug/cpu",
    summary="Bring a VM up to a total of vCPUs, online in the guest",
    request=HotPlugCpuRequest,
    reply=VmReply,
    goal=CpuGoal,
    observe_guest=frozenset({"cpus"}),
    decide=decide,
    advance=advance,
    conclude=conclude,
    role="plug",
    refusals=(
        *STATE_REFUSALS,
        Code.NOT_AS_EXPECTED,
        Code.TARGET_BELOW_CURRENT,
        Code.NO_ACPI,
        Code.MACHINE_NOT_SUPPORTED,
        Code.ABOVE_POLICY,
        Code.CPU_ABOVE_MAXIMUM,
        Code.CPU_ABOVE_HOST_LIMIT,
        Code.CPU_TOPOLOGY_MISMATCH,
        Code.CPU_NOT_WHOLE_CORE,
    ),
    retreat=retreat,
    resume=resume,
)
