"""GiveAllCpus: bring a VM up to the most vCPUs that its definition allows, but for those that are to be left out."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kvmagent.model.command import Command, Ending, Goal, Plugin, Total, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.reply import VmReply
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


class GiveAllCpusReply(VmReply, kw_only=True, rename="camel"):
    """What is posted to the callback URL: what every command on a VM says, and what this one adds to it."""

    left_out: int | None = None


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
    """Return what is left to do, as far as it can be seen now; after these steps it is asked again. None: done."""
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
    """Return what the reply says beside what the agent itself says: here how many vCPUs of the maximum are left."""
    live = ending.after.domain.live if ending.after else None
    return {"left_out": None if live is None else live.vcpu_maximum - live.vcpu_current}


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
            next_steps=next_steps,
            reply_fields=reply_fields,
            role="plug",
            refusals=(Code.VM_NOT_FOUND, Code.VM_NOT_RUNNING, Code.VM_TRANSIENT, Code.CPU_ABOVE_MAXIMUM),
            subcommand="give-all-cpus",
        ),
    ),
)
