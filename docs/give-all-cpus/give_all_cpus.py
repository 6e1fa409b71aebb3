"""GiveAllCpus: bring a VM up to the most vCPUs that its definition allows, but for those that are to be left out."""

from typing import Annotated

import msgspec

from kvmagent.model.command import SUCCESSFUL, Command, Ending, Goal, Outcome, Plugin, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.steps import AnyStep, OnlineGuestVcpus, SetVcpus


class GiveAllCpusRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What is sent: one field beside those that every command on a VM takes."""

    leave_out: Annotated[int, msgspec.Meta(ge=0, description="vCPUs of the maximum that the VM is not given")] = 0


class GiveAllCpusGoal(Goal, frozen=True, rename="camel"):
    """Where the task is going, as a total: on disk before the first step, and what a restarted agent goes on from."""

    cpu_num: int
    live: bool
    config: bool
    guest_online: bool


class GiveAllCpusReply(msgspec.Struct, kw_only=True, rename="camel"):
    """What is posted to the callback URL. `guestCpuNum` is what the guest itself runs on; null: it does not tell."""

    success: bool
    outcome: Outcome
    error: str = ""
    error_code: Code | None = None
    remedy: str | None = None
    vm_uuid: str
    cpu_num: int | None = None
    guest_cpu_num: int | None = None


def decide(request: GiveAllCpusRequest, facts: Facts, task_uuid: str) -> GiveAllCpusGoal:
    """Return the goal, once: it is recorded, and a task that is taken up again does not decide anew.

    Raises:
        AgentError: VM_NOT_RUNNING, VM_TRANSIENT; CPU_ABOVE_MAXIMUM.
    """
    live, config = request.affect != "config", request.affect != "live"
    definition: Definition = facts.get_live() if live else facts.get_config()
    wanted = definition.vcpu_maximum - request.leave_out
    if wanted < 1:
        raise AgentError(
            Code.CPU_ABOVE_MAXIMUM,
            f"leaveOut is {request.leave_out}, VM {facts.domain.name} may have {definition.vcpu_maximum} vCPUs in all",
            remedy="Leave out fewer.",
        )
    return GiveAllCpusGoal(
        cpu_num=max(wanted, definition.vcpu_current),
        live=live,
        config=config and facts.domain.config is not None,
        guest_online=request.guest_online,
    )


def advance(goal: GiveAllCpusGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do, as far as it can be seen now; after these steps it is asked again. None: done."""
    steps: list[AnyStep] = []
    if goal.live and facts.get_live().vcpu_current < goal.cpu_num:
        steps.append(SetVcpus(count=goal.cpu_num, target="live"))
    if goal.config and facts.get_config().vcpu_current < goal.cpu_num:
        steps.append(SetVcpus(count=goal.cpu_num, target="config"))
    if steps or not (goal.live and goal.guest_online) or OnlineGuestVcpus.__name__ in spent:
        return tuple(steps)
    offline = tuple(cpu.id for cpu in facts.guest.vcpus or () if not cpu.online)
    return (OnlineGuestVcpus(ids=offline),) if offline else ()


def conclude(ending: Ending) -> GiveAllCpusReply:
    """Return the reply, from what is so now and not from what was asked."""
    error, after = ending.error, ending.after
    live = after.domain.live if after else None
    outcome = find_outcome(ending)
    return GiveAllCpusReply(
        success=outcome in SUCCESSFUL,
        outcome=outcome,
        error=error.message if error else "",
        error_code=error.code if error else None,
        remedy=error.remedy if error else None,
        vm_uuid=ending.request.vm_uuid,
        cpu_num=live.vcpu_current if live else None,
        guest_cpu_num=after.guest.cpus_online if after else None,
    )


def find_outcome(ending: Ending) -> Outcome:
    """Return online only where the guest itself runs on all of them."""
    if ending.error is not None:
        return "partial" if ending.reports else "refused"
    if ending.planned is not None:
        return "planned"
    if not ending.reports:
        return "unchanged"
    if not ending.goal.live:
        return "configured"
    assert ending.after is not None
    return "online" if ending.after.guest.cpus_online == ending.goal.cpu_num else "plugged"


PLUGIN = Plugin(
    name="give-all-cpus",
    commands=(
        Command(
            name="GiveAllCpus",
            path="/example/give-all-cpus",
            summary="Bring a VM up to the most vCPUs that its definition allows",
            request=GiveAllCpusRequest,
            reply=GiveAllCpusReply,
            goal=GiveAllCpusGoal,
            observe_guest=frozenset({"cpus"}),
            decide=decide,
            advance=advance,
            conclude=conclude,
            role="plug",
            refusals=(Code.VM_NOT_FOUND, Code.VM_NOT_RUNNING, Code.VM_TRANSIENT, Code.CPU_ABOVE_MAXIMUM),
            subcommand="give-all-cpus",
        ),
    ),
)
