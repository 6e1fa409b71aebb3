"""The outcome of a task: how much of each resource of its goal is plugged, seen and online, and what follows.

    online       the guest itself says so, and its amounts cover the goal
    plugged      the running VM has changed, and the guest's use is not proven: a warning says why
    configured   the running VM has not changed, its persistent definition has
    unchanged    nothing has
    partial      something of the goal is missing, and something was done
    refused      something of the goal is missing, and the VM is as it was
    pending      the guest has neither done nor refused a removal
    planned      a dry run

Everything is read again after the last step. Outcome, numbers and stages come from the same values; nobody else makes
any of them.
"""

from typing import Any, Literal

import msgspec

from kvmagent.model.command import Ending, StepReport, Total, find_asked, find_unreached
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.guestuse import (
    Use,
    amount_of,
    find_cpu_warnings,
    find_mem_total,
    find_memory_warnings,
    measure,
    tell_saved,
    warning,
)
from kvmagent.model.policy import find_mistakes, may_online
from kvmagent.model.reply import SUCCESSFUL, Drift, Judgement, Numbers, Outcome, Problem, Stage
from kvmagent.model.steps import (
    AnyStep,
    DefineShape,
    OfflineGuestMemory,
    OfflineGuestVcpus,
    Resource,
    StageName,
    Target,
)
from kvmagent.model.units import format_ids, format_size

_PENDING = (Code.CPU_REMOVAL_PENDING, Code.MEMORY_REMOVAL_PENDING)
# What a resource may be short of its total for, in the order in which it is told; a removal may fail in any way.
_SHORT_UP = (Code.BALLOON_NOT_ANSWERING, Code.VIRTIO_MEM_STALLED)
_SHORT_DOWN = (*_PENDING, Code.MEMORY_REMOVAL_REFUSED, Code.GUEST_MEMORY_IN_USE)
_DEFINITIONS: tuple[tuple[Target, str], ...] = (("live", "running"), ("config", "persistent"))
_STAGES: tuple[StageName, ...] = ("plugged", "visible", "online")


def judge(ending: Ending) -> Judgement:
    """Return what came of a task."""
    goal, after = ending.goal, ending.after
    error = ending.error
    is_same = _is_same(ending)
    if goal is not None and goal.failure is not None:
        error = _tell_undo(goal.failure, undone=is_same)
    elif error is None and goal is not None and after is not None and ending.planned is None:
        error = _find_shortfall(ending, after)
    outcome = _find_outcome(ending, error, is_same=is_same)
    return Judgement(
        outcome=outcome,
        error=error,
        warnings=tuple(_find_warnings(ending, outcome)),
        stages=tuple(_find_stages(ending)),
        before=numbers(ending.before),
        after=numbers(after),
        drift=tuple(drift(after)),
        same_run=_is_same_run(ending),
    )


def reply_fields(ending: Ending, judgement: Judgement) -> dict[str, Any]:
    """Return the fields of VmReply."""
    error = judgement.error
    return {
        "success": judgement.outcome in SUCCESSFUL,
        "error": error.message if error else "",
        "error_code": error.code if error else None,
        "remedy": error.remedy if error else None,
        "details": error.details if error else {},
        "vm_uuid": ending.request.vm_uuid,
        "outcome": judgement.outcome,
        "cpu_num": judgement.after.cpu_num,
        "memory_size": judgement.after.memory_size,
        "before": judgement.before,
        "after": judgement.after,
        "warnings": list(judgement.warnings),
        "stages": list(judgement.stages),
        "steps": _steps(ending),
        "drift": list(judgement.drift),
        "same_run": judgement.same_run,
        "recovered": ending.recovered or msgspec.UNSET,
        "late": ending.late or msgspec.UNSET,
    }


def numbers(facts: Facts | None) -> Numbers:
    """Return the numbers of one moment; all null where nothing could be read."""
    if facts is None:
        return Numbers()
    live, config = facts.domain.live, facts.domain.config
    current = live or config
    return Numbers(
        cpu_num=live.vcpu_current if live else None,
        max_cpu_num=current.vcpu_maximum if current else None,
        config_cpu_num=config.vcpu_current if config else None,
        guest_cpu_num=measure(facts, "cpu").online,
        memory_size=live.memory_bytes if live else None,
        max_memory_size=current.max_memory_bytes if current else None,
        config_memory_size=config.memory_bytes if config else None,
        balloon_size=facts.domain.balloon_bytes,
        guest_memory_size=find_mem_total(facts),
        free_slots=facts.count_free_slots(current) if current and current.max_memory_bytes is not None else None,
    )


def drift(facts: Facts | None) -> list[Drift]:
    """Return the fields in which the running VM and its persistent definition differ."""
    if facts is None or facts.domain.live is None or facts.domain.config is None:
        return []
    live, config = facts.domain.live, facts.domain.config
    fields = {
        "cpuNum": (live.vcpu_current, config.vcpu_current),
        "maxCpuNum": (live.vcpu_maximum, config.vcpu_maximum),
        "memorySize": (live.memory_bytes, config.memory_bytes),
        "maxMemorySize": (live.max_memory_bytes, config.max_memory_bytes),
        "slots": (live.slots, config.slots),
        "memoryDevices": (len(live.devices), len(config.devices)),
    }
    found = [Drift(field=name, live=a, config=b) for name, (a, b) in fields.items() if a != b]
    if live.vcpu_current == config.vcpu_current and live.enabled_vcpus != config.enabled_vcpus:
        found.append(Drift("vcpus", format_ids(live.enabled_vcpus), format_ids(config.enabled_vcpus)))
    return found


def _find_outcome(ending: Ending, error: AgentError | None, *, is_same: bool) -> Outcome:
    if error is not None:
        # Only what was found here can be so: nothing that was raised asked a guest for a removal.
        if error.code in _PENDING and ending.error is None:
            return "pending"
        return "refused" if is_same and not _find_left_asked(ending) and not _find_left_offline(ending) else "partial"
    if ending.planned is not None:
        return "planned"
    if is_same and not any(map(_is_done, ending.reports)):
        return "unchanged"
    if not _is_live_changed(ending):
        saved = any(_is_done(report) and "config" in report.step.changes for report in ending.reports)
        return "configured" if saved else "unchanged"
    wanted = [total for total in ending.goal.totals if total.live is not None]
    return "online" if wanted and all(_covers(total, ending) for total in wanted) else "plugged"


def _is_done(report: StepReport) -> bool:
    """Whether a step had its effect, or may have had it: one that was cut off."""
    return report.problem is None


def _find_left_asked(ending: Ending) -> list[Problem]:
    """Return the requests that are, or may be, still pending in the guest."""
    if ending.goal is None:
        return []
    asked, after = find_asked(ending.reports), ending.after
    if after is not None:
        is_left = bool(find_unreached(ending.goal, ending.reports, after))
        asked = tuple(step for step in asked if is_left and step.take_back(after))
    if not asked:
        return []
    how = "may still be" if ending.after is None else "is still"
    amounts = " and ".join(step.request for step in asked)
    return [warning(Code.GUEST_STILL_ASKED, f"the request for {amounts} {how} pending in the guest")]


def _is_same(ending: Ending) -> bool:
    """Whether the VM is as it was; nobody can say that where what it was, or is, is unknown."""
    if ending.before is None:
        return ending.goal is None
    return ending.after is not None and _changeable(ending.before) == _changeable(ending.after)


def _changeable(facts: Facts) -> tuple[Any, ...]:
    """Return what only a command changes: the guest moves its own numbers by itself."""
    own = msgspec.structs.replace(numbers(facts), guest_cpu_num=None, guest_memory_size=None)
    config = facts.domain.config
    return own, _parts(facts.domain.live), _parts(config), _next_start(config)


def _next_start(config: Definition | None) -> tuple[Any, ...] | None:
    """What the next start has and allows for."""
    if config is None:
        return None
    room = config.vcpu_maximum, config.topology, config.max_memory_bytes, config.slots
    return config.current_bytes, *room, config.acpi, config.balloon, config.agent_channel


def _parts(definition: Definition | None) -> tuple[Any, ...] | None:
    return None if definition is None else (definition.enabled_vcpus, definition.cpu_shares)


def _is_live_changed(ending: Ending) -> bool:
    """Whether the running VM has changed: what it has, or by steps of the task what its guest lists and uses."""
    if ending.before is None:
        return any(total.live is not None for total in ending.goal.totals)
    assert ending.after is not None
    was, has = ending.before.domain.live, ending.after.domain.live
    if (was and was.cpu_shares) != (has and has.cpu_shares):
        return True
    asked = {report.step.resource for report in ending.reports if report.step.stage in ("visible", "online")}
    for total in ending.goal.totals:
        before, after = measure(ending.before, total.resource), measure(ending.after, total.resource)
        if total.live is not None and (
            before.plugged != after.plugged or (total.resource in asked and before[1:] != after[1:])
        ):
            return True
    return False


def _covers(total: Total, ending: Ending) -> bool:
    """Whether the guest's own amounts cover what the running VM was to have."""
    use = measure(ending.after, total.resource)
    assert total.live is not None
    if use.online is None or use.plugged is None:
        return False
    if _is_removal(total, ending):
        return total.resource != "cpu" or use.online <= total.live
    return use.online >= total.live and not _count_unused_blocks(ending, total.resource)


def _is_removal(total: Total, ending: Ending) -> bool:
    """Whether a resource was to shrink: what has grown did not, whatever its goal calls it."""
    was, has = measure(ending.before, total.resource).plugged, measure(ending.after, total.resource).plugged
    return total.direction == "down" and (was is None or has is None or has <= was)


def _count_unused_blocks(ending: Ending, resource: Resource) -> int:
    """Return how many blocks less than the devices grew by the guest has taken into use in the same run.

    Boot memory may end inside a block, which then stands for more than it holds, and could hide one that is missing.
    """
    if resource != "memory" or not _is_same_run(ending) or ending.before is None or ending.after is None:
        return 0
    before, after = measure(ending.before, resource), measure(ending.after, resource)
    was, has, quantum = ending.before.domain.live, ending.after.domain.live, ending.after.guest.block_bytes
    if before.blocks is None or after.blocks is None or was is None or has is None or quantum is None:
        return 0
    former = {device.alias: device.plugged_bytes for device in was.devices}
    grown = sum(
        -(-device.plugged_bytes // quantum) - -(-former.get(device.alias, 0) // quantum) for device in has.devices
    )
    return max(0, grown - (after.blocks - before.blocks))


def _find_shortfall(ending: Ending, after: Facts) -> AgentError | None:
    """Return why the VM, read again, is not at the goal's totals."""
    if _is_lost(ending, after):
        return AgentError(Code.REMOVAL_LOST, f"VM {after.domain.name} was powered off while the removal was pending")
    for total in ending.goal.totals:
        for target, name in _DEFINITIONS:
            wanted: int | None = getattr(total, target)
            if wanted is None:
                continue
            has, is_there = amount_of(after, total.resource, target), after.find_definition(target) is not None
            if not is_there or (has is not None and (has < wanted if total.direction == "up" else has > wanted)):
                cause = _find_cause(ending, total)
                if cause is not None and cause.code is Code.CPU_REMOVAL_PENDING and has is not None:
                    cause = _find_unfinished(ending, has, wanted) or cause
                return cause or _not_verified(total.resource, name, wanted, has)
    return None


def _is_lost(ending: Ending, after: Facts) -> bool:
    """Whether a removal was still pending when the VM's run ended: QEMU alone knew of it."""
    removes = any(total.direction == "down" for total in ending.goal.totals)
    return bool(ending.late and removes and ending.goal.run is not None and ending.goal.run != after.run)


def _find_cause(ending: Ending, total: Total) -> AgentError | None:
    """Return what a step that may fail ended in, as the error of the task."""
    told = [report.problem for report in ending.reports if report.problem is not None and _concerns(report.step, total)]
    codes = _SHORT_UP if total.direction == "up" else (*_SHORT_DOWN, *(problem.code for problem in told))
    for code in codes:
        for problem in told:
            if problem.code is code:
                return AgentError(code, problem.message, remedy=problem.remedy)
    return None


def _find_unfinished(ending: Ending, current: int, cpu_num: int) -> AgentError | None:
    """Return the error of a removal that is no longer pending: all vCPUs that the guest was asked for have left."""
    told = [report.problem.asked_cpu_num for report in ending.reports if report.problem is not None]
    asked = next((number for number in reversed(told) if number is not None), None)
    if asked is None or current > asked:
        return None
    return AgentError(
        Code.CPU_REMOVAL_UNFINISHED,
        f"the VM has {current} vCPUs instead of {cpu_num}; time ran out after the guest was asked to go to {asked}",
    )


def _find_left_offline(ending: Ending) -> list[Problem]:
    """Return what the task took offline in the guest for a removal, is there yet and not known to be used again."""
    if ending.after is None or ending.after.domain.live is None or _is_same_run(ending) is False:
        return []
    guest, live, found = ending.after.guest, ending.after.domain.live, []
    there = live.enabled_vcpus
    taken = [report.step for report in ending.reports if guest.silence is None or report.problem is None]
    cpus = frozenset(n for step in taken if isinstance(step, OfflineGuestVcpus) for n in step.ids if n in there)
    if guest.vcpus is not None:
        cpus &= frozenset(cpu.id for cpu in guest.vcpus if not cpu.online)
    if cpus:
        words = f"CPUs {format_ids(cpus)} were taken offline for a removal, and may still be offline"
        found.append(warning(Code.GUEST_CPU_OFFLINE, words))
    blocks = frozenset(n for step in taken if isinstance(step, OfflineGuestMemory) for n in step.blocks)
    if guest.blocks is not None:
        blocks &= frozenset(block.index for block in guest.blocks if not block.online)
    if blocks:
        words = f"memory blocks {format_ids(blocks)} were taken offline for a removal, and may still be offline"
        found.append(warning(Code.GUEST_MEMORY_OFFLINE, words))
    return found


def _concerns(step: AnyStep, total: Total) -> bool:
    return step.resource == total.resource


def _not_verified(resource: Resource, name: str, wanted: int, has: int | None) -> AgentError:
    def words(amount: int) -> str:
        return f"{amount} vCPUs" if resource == "cpu" else format_size(amount)

    what = {"cpu": "", "memory": " of memory", "balloon": " by balloon"}[resource]
    found = "gone" if has is None else f"at {words(has)}"
    return AgentError(
        Code.NOT_VERIFIED, f"{words(wanted)}{what} were set, but the {name} VM is {found}", expected=False
    )


def _tell_undo(failure: Problem, *, undone: bool) -> AgentError:
    """Return the error of a task that failed on the way and went back."""
    told = "what was done before was undone" if undone else "what was done before could not all be undone"
    return AgentError(failure.code, f"{failure.message}; {told}", remedy=failure.remedy, details={"undone": undone})


def _is_same_run(ending: Ending) -> bool | None:
    """Return whether the VM at the end is the one of the beginning: neither powered off nor migrated meanwhile."""
    before, after = (facts.run if facts else None for facts in (ending.before, ending.after))
    return None if before is None or after is None else before == after


def _find_warnings(ending: Ending, outcome: Outcome) -> list[Problem]:
    """Return one warning of each code: what is so now, and in whose words it went wrong on the way."""
    found = find_mistakes(ending.after or ending.before) + _find_unknown(ending.after or ending.before)
    found += _saved_warnings(ending, outcome)
    if outcome in ("refused", "planned"):
        return found + _planned_warnings(ending)
    told = {report.problem.code: report.problem for report in ending.reports if report.problem}
    left = _find_left_asked(ending)
    left += _find_left_offline(ending) if outcome == "partial" else []
    for now in [*_guest_warnings(ending, outcome), *left]:
        way = told.get(now.code)
        words = now.message if way is None or way.message == now.message else f"{now.message}; {way.message}"
        told[now.code] = msgspec.structs.replace(now, message=words)
    if ending.goal is not None and ending.after is not None and _is_same_run(ending) is False and not ending.late:
        words = f"VM {ending.after.domain.name} was powered off, or left this host, while the task ran"
        told[Code.VM_RESTARTED] = warning(Code.VM_RESTARTED, words)
    return found + list(told.values())


def _find_unknown(facts: Facts | None) -> list[Problem]:
    """Warn of what the running VM has that libvirt does not know, whatever the outcome."""
    live = None if facts is None else facts.domain.live
    unknown = [device for device in live.devices if not device.known] if live is not None else []
    if not unknown:
        return []
    devices = ", ".join(f"{device.alias} ({format_size(device.size_bytes)})" for device in unknown)
    return [warning(Code.MEMORY_UNKNOWN_TO_LIBVIRT, f"QEMU has memory that libvirt does not know of: {devices}")]


def _guest_warnings(ending: Ending, outcome: Outcome) -> list[Problem]:
    """Return why the guest may not use what the running VM was to have."""
    goal, after = ending.goal, ending.after
    if goal is None or after is None or after.domain.live is None:
        return []
    found: list[Problem] = []
    asked_online = ending.request.guest_online and may_online(after)
    for total in goal.totals:
        if total.live is None:
            continue
        removal = _is_removal(total, ending)
        # What has left has not to be brought online.
        hint = {"hint": ""} if removal else {}
        if total.resource == "cpu":
            one = find_cpu_warnings(after, ending.before, asked_online=asked_online, **hint)
        else:
            one = find_memory_warnings(after, asked_online=asked_online, **hint)
        use = measure(after, total.resource)
        if removal:
            # What has left need not be used; but the guest must be there to say so.
            one = one if use.online is None else []
        elif total.resource == "balloon" and use.online is not None:
            one = []
        found += [problem for problem in one if problem.code not in [known.code for known in found]]
    if outcome == "plugged" and not found:
        missing = sum(_count_unused_blocks(ending, total.resource) for total in goal.totals)
        words = f"the guest uses {missing} memory blocks fewer than the VM was given"
        found.append(warning(Code.GUEST_MEMORY_NOT_SEEN, words))
    return found


def _planned_warnings(ending: Ending) -> list[Problem]:
    """Say that a plan for a running VM goes on; one for a definition is whole."""
    if ending.request.affect == "config" or not any(_touches_vm(step) for step in ending.planned or ()):
        return []
    return [warning(Code.PLAN_NOT_WHOLE, "more steps may follow, depending on what the guest does after these")]


def _saved_warnings(ending: Ending, outcome: Outcome) -> list[Problem]:
    """Say that a changed definition is not what the next start has."""
    facts = ending.after or ending.before
    if facts is None or not facts.domain.saved or outcome not in ("configured", "partial", "planned"):
        return []
    return [warning(Code.VM_SAVED, tell_saved(facts.domain))]


def _touches_vm(step: AnyStep) -> bool:
    return not step.follows and not isinstance(step, DefineShape)


def _find_stages(ending: Ending) -> list[Stage]:
    """Return how far each resource has come, and when its last step ended; an unknown amount is left out.

    A stage without a step of its own was seen together with the one before it.
    """
    goal, after = ending.goal, ending.after
    if goal is None or after is None or not ending.reports or ending.request.affect == "config":
        return []
    stages = []
    kinds: dict[Literal["cpu", "memory"], tuple[Resource, ...]] = {"cpu": ("cpu",), "memory": ("memory", "balloon")}
    named: dict[Literal["cpu", "memory"], None] = {}
    for total in goal.totals:
        named["cpu" if total.resource == "cpu" else "memory"] = None
    for resource, resources in ((name, kinds[name]) for name in named):
        totals = [total for total in goal.totals if total.resource in resources and total.live is not None]
        if not totals:
            continue
        use = measure(after, resource)
        if any(total.resource == "balloon" for total in totals):
            use = _leave_out_balloon(use, after)
        ended_ms = 0.0
        for stage, amount in zip(_STAGES, use[:3], strict=True):
            ended = [
                report.ended_ms
                for report in ending.reports
                if report.step.resource in resources and report.step.stage == stage
            ]
            ended_ms = max([ended_ms, *ended])
            if amount is not None:
                stages.append(Stage(resource=resource, stage=stage, amount=amount, elapsed_ms=round(ended_ms, 3)))
    return stages


def _leave_out_balloon(use: Use, after: Facts) -> Use:
    """Return the use of memory without what the balloon holds: the guest lists it, and cannot use it."""
    live, actual = after.domain.live, after.domain.balloon_bytes
    if live is None or actual is None or use.online is None:
        return use._replace(online=None)
    return use._replace(online=max(0, use.online - max(0, live.balloon_total_bytes - actual)))


def _steps(ending: Ending) -> list[dict[str, Any]]:
    if ending.planned is not None:
        return [msgspec.to_builtins(step) for step in ending.planned]
    told = []
    for report in ending.reports:
        elapsed_ms = None if report.elapsed_ms is None else round(report.elapsed_ms, 3)
        entry = msgspec.to_builtins(report.step) | {"elapsedMs": elapsed_ms}
        if elapsed_ms is None:
            entry["cutOff"] = True
        if report.problem:
            entry["problem"] = report.problem.code
        told.append(entry)
    return told
