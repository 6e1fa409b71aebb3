"""ReturnBalloon: give a VM back the memory that its balloon holds, except for what the balloon is to keep."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kvmagent.model.checks import check_balloon, check_host, check_state, refuse_first
from kvmagent.model.command import Command, Ending, Goal, Plugin, Total, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.reply import VmReply
from kvmagent.model.steps import AnyStep, AwaitBalloon, SetBalloon


class ReturnBalloonRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The request: one field besides those that every command on a VM takes."""

    keep_size: Annotated[int, msgspec.Meta(ge=0, description="Bytes that the balloon is to keep")] = 0


class ReturnBalloonGoal(Goal, frozen=True, rename="camel"):
    """How much memory the VM is to have, in each definition; None for one that stays unchanged."""

    live_bytes: int | None
    config_bytes: int | None
    timeout_sec: float


class ReturnBalloonReply(VmReply, kw_only=True, rename="camel"):
    """The fields of every command on a VM, and how much memory the balloon still holds."""

    held_size: int | None = None


def decide(request: ReturnBalloonRequest, facts: Facts, task_uuid: str) -> ReturnBalloonGoal:
    """Return the goal. The checks are those of the shipped commands: the same codes, messages and remedies.

    Raises:
        AgentError: the first blocker; see `refusals`.
    """
    refuse_first(check_state(facts.domain, request.affect))
    refuse_first(check_balloon(facts, request.affect, 0))
    wanted: dict[str, int | None] = {"live": None, "config": None}
    if request.affect != "config":
        actual = facts.domain.balloon_bytes
        if actual is None:
            raise AgentError(Code.BALLOON_NOT_ANSWERING, f"libvirt does not report the balloon of {facts.domain.name}")
        live_bytes = max(actual, facts.get_live().balloon_total_bytes - request.keep_size)
        refuse_first(check_host(facts, live_bytes - actual))
        wanted["live"] = live_bytes
    if request.affect != "live":
        config = facts.get_config()
        wanted["config"] = max(config.current_bytes, config.balloon_total_bytes - request.keep_size)
    return ReturnBalloonGoal(
        totals=(Total("balloon", live=wanted["live"], config=wanted["config"]),),
        live_bytes=wanted["live"],
        config_bytes=wanted["config"],
        timeout_sec=request.timeout_sec,
    )


def next_steps(goal: ReturnBalloonGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Ask the guest's driver and wait for it; then set the same in the definition. A guest that did not follow is not
    asked again: the agent withdraws the request."""
    actual = facts.domain.balloon_bytes
    if goal.live_bytes is not None and actual is not None and actual < goal.live_bytes:
        if AwaitBalloon.__name__ in failed:
            return ()
        return (
            SetBalloon(size_bytes=goal.live_bytes, target="live"),
            AwaitBalloon(size_bytes=goal.live_bytes, timeout_sec=goal.timeout_sec),
        )
    if goal.config_bytes is not None and facts.get_config().current_bytes < goal.config_bytes:
        return (SetBalloon(size_bytes=goal.config_bytes, target="config"),)
    return ()


def resumed_goal(goal: ReturnBalloonGoal) -> ReturnBalloonGoal:
    """A task that is resumed after an interruption still waits for the guest, but for a minute at most."""
    return msgspec.structs.replace(goal, timeout_sec=min(goal.timeout_sec, 60))


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return how much memory the balloon still holds."""
    domain = ending.after.domain if ending.after else None
    if domain is None or domain.live is None or domain.balloon_bytes is None:
        return {}
    return {"held_size": domain.live.balloon_total_bytes - domain.balloon_bytes}


PLUGIN = Plugin(
    name="return-balloon",
    commands=(
        Command(
            name="ReturnBalloon",
            path="/example/return-balloon",
            summary="Give a VM back the memory that its balloon holds",
            request=ReturnBalloonRequest,
            reply=ReturnBalloonReply,
            goal=ReturnBalloonGoal,
            observe_guest=frozenset({"memory"}),
            observe_first=frozenset({"budget"}),
            decide=decide,
            next_steps=next_steps,
            resumed_goal=resumed_goal,
            reply_fields=reply_fields,
            role="plug",
            refusals=(
                Code.VM_NOT_FOUND,
                Code.VM_NOT_RUNNING,
                Code.VM_TRANSIENT,
                Code.VM_OPTED_OUT,
                Code.LIBVIRT_BUSY,
                Code.NO_BALLOON,
                Code.BALLOON_NOT_ANSWERING,
                Code.HOST_MEMORY_SHORT,
                Code.HOST_NODE_MEMORY_SHORT,
                Code.HOST_HUGEPAGES_SHORT,
                Code.HOST_MEMORY_PROMISED,
                Code.MEMORY_HARD_LIMIT,
                Code.MEMORY_LOCK_LIMIT,
            ),
            subcommand="return-balloon",
        ),
    ),
)
