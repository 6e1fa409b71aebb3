"""GiveAllCpus: give a VM all the vCPUs that its definition allows, except for those that are to be left out."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kvmagent.model.command import Command, Ending, Goal, Plugin, Total, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.reply import VmReply
from kvmagent.model.steps import AnyStep, OnlineGuestVcpus, SetVcpus


class GiveAllCpusRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The request: one field besides those that every command on a VM takes."""

    leave_out: Annotated[int, msgspec.Meta(ge=0, description="How many vCPUs below its maximum the VM stays")] = 0


class GiveAllCpusGoal(Goal, frozen=True, rename="camel"):
    """The goal, as a total: it is on disk before the first step, and a restarted agent continues from it."""

    cpu_num: int
    live: bool
    config: bool
    guest_online: bool


class GiveAllCpusReply(VmReply, kw_only=True, rename="camel"):
    """The reply that is posted to the callback URL: the fields of every command on a VM, and one more."""

    left_out: int | None = None


def decide(request: GiveAllCpusRequest, facts: Facts, task_uuid: str) -> GiveAllCpusGoal:
    """Return the goal. It is called once: the goal is recorded, and a task that is resumed does not decide again.

    Raises:
        AgentError: VM_NOT_RUNNING, VM_TRANSIENT; CPU_ABOVE_MAXIMUM.
    """
    live, config = request.affect != "config", request.affect != "live"
    definition: Definition = facts.get_live() if live else facts.get_config()
    wanted = definition.vcpu_maximum - request.leave_out
    if wanted < 1:
        raise AgentError(
            Code.CPU_ABOVE_MAXIMUM,
            f"leaveOut is {request.leave_out}, VM {facts.domain.name} can have {definition.vcpu_maximum} vCPUs in all",
            remedy="Leave out fewer.",
        )
    cpu_num = max(wanted, definition.vcpu_current)
    saved = max(cpu_num, facts.domain.config.vcpu_current) if config and facts.domain.config is not None else None
    return GiveAllCpusGoal(
        totals=(Total("cpu", live=cpu_num if live else None, config=saved),),
        cpu_num=cpu_num,
        live=live,
        config=config and facts.domain.config is not None,
        guest_online=request.guest_online,
    )


def next_steps(goal: GiveAllCpusGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return the steps that are left, as far as is known now. It is called again after them; no step: done."""
    steps: list[AnyStep] = []
    if goal.live and facts.get_live().vcpu_current < goal.cpu_num:
        steps.append(SetVcpus(count=goal.cpu_num, target="live"))
    if goal.config and facts.get_config().vcpu_current < goal.cpu_num:
        steps.append(SetVcpus(count=goal.cpu_num, target="config"))
    if steps or not (goal.live and goal.guest_online) or OnlineGuestVcpus.__name__ in failed:
        return tuple(steps)
    offline = tuple(cpu.id for cpu in facts.guest.vcpus or () if not cpu.online)
    return (OnlineGuestVcpus(ids=offline),) if offline else ()


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return the reply's further field: how many vCPUs the VM is below its maximum."""
    live = ending.after.domain.live if ending.after else None
    return {"left_out": None if live is None else live.vcpu_maximum - live.vcpu_current}


PLUGIN = Plugin(
    name="give-all-cpus",
    commands=(
        Command(
            name="GiveAllCpus",
            path="/example/give-all-cpus",
            summary="Give a VM all the vCPUs that its definition allows",
            request=GiveAllCpusRequest,
            reply=GiveAllCpusReply,
            goal=GiveAllCpusGoal,
            observe_guest=frozenset({"cpus"}),
            decide=decide,
            next_steps=next_steps,
            reply_fields=reply_fields,
            role="plug",
            refusals=(Code.VM_NOT_FOUND, Code.VM_NOT_RUNNING, Code.VM_TRANSIENT, Code.CPU_ABOVE_MAXIMUM),
            subcommand="give-all-cpus",
        ),
    ),
)
