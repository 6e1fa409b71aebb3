"""Calls a command's plugin to decide and plan, and checks that against the owner's policy and the host's memory.

Tasks and the planner both use it. A plan that changes what its goal has no total for, or what its caller did not ask
to be changed, is the plugin's mistake: no step of it is performed. So is one that takes something away though its goal
only adds, or the other way round: a goal may be pursued long after it was made, and the VM have more, or less, by then.
"""

from collections import Counter

import msgspec

from kvmagent.model.command import Affect, Command, Goal, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts, MemoryDevice, find_other_half
from kvmagent.model.guestuse import amount_of
from kvmagent.model.hostbudget import refuse_growth
from kvmagent.model.ownerpolicy import check_owner_policy
from kvmagent.model.reply import Problem
from kvmagent.model.steps import (
    CONFIG,
    LIVE,
    AnyStep,
    DetachMemory,
    ForgetMemory,
    ResizeVirtioMem,
    Resource,
    Step,
    Target,
)
from kvmagent.tasks.plugincalls import call

_AFFECTED: dict[Affect, frozenset[Target]] = {"both": LIVE | CONFIG, "live": LIVE, "config": CONFIG}
_CALLED: dict[Target, str] = {"live": "running VM", "config": "persistent definition"}


def decide(command: Command, request: VmRequest, facts: Facts, task_uuid: str) -> tuple[Goal, tuple[AnyStep, ...]]:
    """Return the goal of a request, bound to this VM and its present run (since its power-on), and the first steps.

    Raises:
        AgentError: what the command, the owner or the host's memory refuses; INTERNAL_ERROR, of the plugin's plan.
    """
    decided = call(command.decide, request, facts, task_uuid)
    # No plugin has to remember which VM, and which run of the VM, it was.
    goal = _bind(command, decided, Goal(vm=facts.domain.uuid, run=facts.run))
    steps = _ask(command, goal, facts, frozenset())
    if steps or goal.totals:
        check_owner_policy(facts, request.affect, goal, steps)
        refuse_growth(goal.totals, facts)
    _check_plan(command, request, goal, facts, steps, before=facts)
    return goal, steps


def plan(
    command: Command,
    request: VmRequest,
    goal: Goal,
    facts: Facts,
    failed: frozenset[str] = frozenset(),
    *,
    before: Facts | None,
    late: bool = False,
) -> tuple[AnyStep, ...]:
    """Return what is left to do towards a goal; `before` is what was so when it was decided, None where unknown.

    `late`, only by which steps the definition follows the running VM.

    Raises:
        AgentError: INTERNAL_ERROR, of the plugin's plan.
    """
    steps = tuple(step for step in _ask(command, goal, facts, failed) if step.follows or not late)
    _check_plan(command, request, goal, facts, steps, before=before)
    return steps


def resume(command: Command, goal: Goal) -> Goal:
    """Return what of a recorded goal may still be pursued after an interruption."""
    return _bind(command, call(command.resumed_goal, goal), goal)


def find_way_back(command: Command, goal: Goal, seen: Facts, facts: Facts, error: AgentError) -> Goal | None:
    """Return where a command goes after a failure, instead of its goal; None: nowhere.

    Raises:
        AgentError: INTERNAL_ERROR: that would be further than it was to go, of which nobody asked the owner.
    """
    back = call(command.rollback_goal, goal, seen, facts, error)
    if back is None:
        return None
    back = _bind(command, back, msgspec.structs.replace(goal, failure=Problem.of(error)))
    for total in back.totals:
        for target in _CALLED:
            wanted, most = getattr(total, target), _find_most(goal, facts, total.resource, target)
            if wanted is not None and wanted > max(most, amount_of(seen, total.resource, target) or 0):
                message = f"{command.name} would roll back to more {total.resource} than its goal had"
                raise AgentError(Code.INTERNAL_ERROR, message, expected=False)
    return back


def _bind(command: Command, goal: object, former: Goal) -> Goal:
    """Return what a plugin gave as a goal: of that VM and run, and with what else of it is the agent's own.

    Raises:
        TypeError: it is none; what is recorded is read back as the declared type.
    """
    if not isinstance(goal, command.goal):
        raise TypeError(f"{command.name} has a {type(goal).__name__} as its goal instead of {command.goal.__name__}")
    own = {"vm": former.vm, "run": former.run, "reservation": former.reservation, "failure": former.failure}
    return msgspec.structs.replace(goal, **own)


def _find_most(goal: Goal, facts: Facts, resource: Resource, target: Target) -> int:
    """Return what a definition may come to: what the goal says, or what it has."""
    totals = [getattr(total, target) for total in goal.totals if total.resource == resource]
    has = amount_of(facts, resource, target)
    return max([amount for amount in (*totals, has) if amount is not None], default=0)


def _ask(command: Command, goal: Goal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    steps = tuple(call(command.next_steps, goal, facts, failed))
    for step in steps:
        if not isinstance(step, Step):
            raise TypeError(f"{command.name} plans a {type(step).__name__}, which is not a step")
    return steps


def _check_plan(
    command: Command,
    request: VmRequest,
    goal: Goal,
    facts: Facts,
    steps: tuple[AnyStep, ...],
    *,
    before: Facts | None,
) -> None:
    """What the goal has no total of cannot be judged, nor could its owner be asked; nor of more than the total."""
    growth: Counter[tuple[Resource, Target]] = Counter()
    loss: Counter[tuple[Resource, Target]] = Counter()
    for step in steps:
        why = _find_fault(request.affect, goal, step)
        for target in step.changes if step.resource is not None and not why else ():
            assert step.resource is not None
            added, one = step.find_growth(facts, target), (step.resource, target)
            has = amount_of(facts, step.resource, target)
            if has is None or _has_left(step, facts, before):
                continue
            growth[one] += max(0, added)
            loss[one] += max(0, -added)
            if added > 0 and growth[one] > _find_ceiling(goal, facts, *one) - has:
                why = f"that is more {step.resource} than its goal has for the {_CALLED[target]}"
            elif (
                added < 0
                and not (goal.failure is not None and _is_own(step, target, facts, before))
                and loss[one] > has - _find_floor(goal, facts, before, *one)
            ):
                why = f"that takes more {step.resource} from the {_CALLED[target]} than its goal allows"
        if why:
            message = f"{command.name} plans {type(step).__name__}, but {why}"
            raise AgentError(Code.INTERNAL_ERROR, message, expected=False)


def _find_ceiling(goal: Goal, facts: Facts, resource: Resource, target: Target) -> int:
    """Return what a plan may bring a resource to: a removal gives nothing, but on its way back."""
    has = amount_of(facts, resource, target) or 0
    return has if _is_removal(goal, resource) and goal.failure is None else _find_most(goal, facts, resource, target)


def _find_floor(goal: Goal, facts: Facts, before: Facts | None, resource: Resource, target: Target) -> int:
    """Return what a plan has to leave: a removal its total, the way back what was there before; any other all of it.

    Memory requested of a virtio-mem device but not yet plugged is not counted. On a way back of which nobody knows any
    longer what was there before, nothing can be judged.
    """
    has = amount_of(facts, resource, target) or 0
    if goal.failure is None and _is_removal(goal, resource):
        totals: list[int | None] = [getattr(total, target) for total in goal.totals if total.resource == resource]
        return min([has, *(amount for amount in totals if amount is not None)])
    if goal.failure is not None:
        if before is None:
            return 0
        # After another start of the VM it has what its definition had then, and its balloon holds nothing.
        is_other = resource != "cpu" and target == "live" and goal.run != facts.run
        had = amount_of(before, resource, target)
        return has if is_other or had is None else min(has, had)
    return has - _find_unmet(facts, before) if (resource, target) == ("memory", "config") else has


def _find_unmet(facts: Facts, before: Facts | None) -> int:
    """Return what the definition has of requests that the guest had not met before, and that are the same still.

    Where nobody knows what was before: of requests that it has not met now.
    """
    unmet, live, config = 0, facts.domain.live, facts.domain.config
    if before is None and live is not None and config is not None:
        pairs = [(device, find_other_half(device, live)) for device in config.virtio_mems]
        return sum(max(0, one.plugged_bytes - half.plugged_bytes) for one, half in pairs if half is not None)
    if before is None or before.domain.live is None or before.domain.config is None or config is None:
        return 0
    for device in before.domain.live.virtio_mems:
        saved, now = find_other_half(device, before.domain.config), find_other_half(device, config)
        if device.is_settled or saved is None or now is None or now.requested_bytes != device.requested_bytes:
            continue
        if saved.requested_bytes == device.requested_bytes:
            half = None if live is None else find_other_half(now, live)
            unmet += max(0, now.plugged_bytes - (half or device).plugged_bytes)
    return unmet


def _is_own(step: AnyStep, target: Target, facts: Facts, before: Facts | None) -> bool:
    """Whether a way back takes what its task had given, whatever else the VM has got or lost meanwhile.

    That is a device that was not there before, or what a virtio-mem device has grown by.
    """
    was, now = None if before is None else before.find_definition(target), facts.find_definition(target)
    if before is None or was is None or now is None:
        return False
    if not isinstance(step, DetachMemory | ForgetMemory | ResizeVirtioMem):
        return False
    if step.alias is not None and was.find_device(step.alias) is None:
        return now.find_device(step.alias) is not None
    if isinstance(step, ResizeVirtioMem):
        had = (_find_met(device, before) if target == "config" else device for device in step.find_devices(was))
        return step.requested_bytes >= max((device.plugged_bytes for device in had), default=0)
    return False


def _find_met(saved: MemoryDevice, before: Facts) -> MemoryDevice:
    """Return a virtio-mem device of the definition; where the running VM had not met its request, what is there."""
    half = None if before.domain.live is None else find_other_half(saved, before.domain.live)
    is_unmet = half is not None and half.requested_bytes == saved.requested_bytes
    return half if half is not None and is_unmet and half.plugged_bytes < saved.plugged_bytes else saved


def _has_left(step: AnyStep, facts: Facts, before: Facts | None) -> bool:
    """Whether a device leaves the definition that has left the running VM: others may have left it meanwhile, too."""
    live = facts.domain.live
    if not isinstance(step, ForgetMemory) or step.alias is None or live is None or live.find_device(step.alias):
        return False
    was = None if before is None else before.domain.live
    return before is None or (was is not None and was.find_device(step.alias) is not None)


def _is_removal(goal: Goal, resource: Resource) -> bool:
    return any(total.resource == resource and total.direction == "down" for total in goal.totals)


def _find_fault(affect: Affect, goal: Goal, step: AnyStep) -> str:
    for target in sorted(step.changes):
        if target not in _AFFECTED[affect]:
            return f"the request leaves the {_CALLED[target]} alone (affect {affect})"
        totals = [getattr(total, target) for total in goal.totals if total.resource == step.resource]
        if step.resource is not None and all(amount is None for amount in totals):
            return f"its goal has no total of {step.resource} for the {_CALLED[target]}"
    return ""
