"""From what was seen to what is said: the parts of a reply that all VM commands share."""

from typing import Any, Literal

import msgspec

from kvmagent.model.command import SUCCESSFUL, Ending, Outcome, Problem
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.facts import Facts, Guest
from kvmagent.model.steps import AnyStep, DefineShape, OfflineGuestMemory, OfflineGuestVcpus, Step
from kvmagent.model.units import format_ids

from .policy import find_mistakes
from .requests import Drift, Numbers, Stage
from .vcpus import enabled_ids


def shared_fields(
    ending: Ending, outcome: Outcome, warnings: list[Problem], stages: list[Stage] | None = None
) -> dict[str, Any]:
    """Return the fields of VmReply for this ending."""
    error = ending.error
    before, after = numbers(ending.before), numbers(ending.after)
    return {
        "success": outcome in SUCCESSFUL,
        "error": error.message if error else "",
        "error_code": error.code if error else None,
        "remedy": error.remedy if error else None,
        "details": error.details if error else {},
        "vm_uuid": ending.request.vm_uuid,
        "outcome": outcome,
        "cpu_num": after.cpu_num,
        "memory_size": after.memory_size,
        "before": before,
        "after": after,
        "warnings": find_mistakes(ending.after or ending.before)
        + (
            _planned_warnings(ending)
            if outcome in ("refused", "planned")
            else _warnings(ending, warnings + (_left_offline(ending) if outcome == "partial" else []))
        ),
        "stages": stages or [],
        "steps": _steps(ending),
        "drift": drift(ending.after),
        "same_run": is_same_run(ending),
        "recovered": ending.recovered or msgspec.UNSET,
        "late": ending.late or msgspec.UNSET,
    }


def settle(ending: Ending) -> Outcome | None:
    """Return the outcome where it does not depend on the command: a failure, a dry run, or nothing to do.

    Nobody can say that the VM is as it was where what it was is unknown: after an interruption and an upgrade.
    """
    if ending.before is None:
        same = ending.goal is None
    else:
        same = _without_guest(ending.before) == _without_guest(ending.after)
    if ending.error is not None:
        left_asked = bool(ending.reports) and ending.error.code in _LEFT_ASKED
        return "refused" if same and not left_asked and not _left_offline(ending) else "partial"
    if ending.planned is not None:
        return "planned"
    return "unchanged" if same and not ending.reports else None


# Failures after which libvirt still asks the guest for what it did not do.
_LEFT_ASKED = (Code.BALLOON_NOT_ANSWERING, Code.VIRTIO_MEM_STALLED)
_PENDING = (Code.CPU_REMOVAL_PENDING, Code.MEMORY_REMOVAL_PENDING)


def settle_removal(ending: Ending) -> Outcome | None:
    """Return "pending" for a removal that the guest has neither done nor refused; else None."""
    return "pending" if ending.error is not None and ending.error.code in _PENDING else None


def _left_offline(ending: Ending) -> list[Problem]:
    """Return what the task took offline in the guest for a removal, is there yet and not known to be used again."""
    if ending.after is None or ending.after.domain.live is None or is_same_run(ending) is False:
        return []
    guest, there, found = ending.after.guest, enabled_ids(ending.after.domain.live), []
    taken = [report.step for report in ending.reports if guest.silence is None or report.problem is None]
    cpus = frozenset(n for step in taken if isinstance(step, OfflineGuestVcpus) for n in step.ids if n in there)
    if guest.vcpus is not None:
        cpus &= frozenset(cpu.id for cpu in guest.vcpus if not cpu.online)
    if cpus:
        words = f"CPUs {format_ids(cpus)} were taken offline for their removal, and are not known to be used again"
        found.append(warning(Code.GUEST_CPU_OFFLINE, words))
    blocks = frozenset(n for step in taken if isinstance(step, OfflineGuestMemory) for n in step.blocks)
    if guest.blocks is not None:
        blocks &= frozenset(block.index for block in guest.blocks if not block.online)
    if blocks:
        words = f"memory blocks {format_ids(blocks)} were taken offline for their removal, and are not known to be used"
        found.append(warning(Code.GUEST_MEMORY_OFFLINE, words))
    return found


def _without_guest(facts: Facts | None) -> Numbers:
    """Return the numbers that only a command changes: the guest moves its own by itself."""
    return msgspec.structs.replace(numbers(facts), guest_cpu_num=None, guest_memory_size=None)


def find_stages(
    ending: Ending,
    resource: Literal["cpu", "memory"],
    amounts: tuple[int | None, int | None, int | None],
    step_types: tuple[tuple[type[Step], ...], tuple[type[Step], ...], tuple[type[Step], ...]],
) -> list[Stage]:
    """Return how far a change came: for plugged, visible and online what there is, and when its last step ended.

    A stage without a step of its own was seen together with the one before it; an amount of None was not told.
    """
    names: tuple[Literal["plugged", "visible", "online"], ...] = ("plugged", "visible", "online")
    stages, ended_ms = [], 0.0
    for stage, amount, types in zip(names, amounts, step_types, strict=True):
        ended = [report.ended_ms for report in ending.reports if isinstance(report.step, types)]
        ended_ms = max([ended_ms, *ended])
        if amount is not None:
            stages.append(Stage(resource=resource, stage=stage, amount=amount, elapsed_ms=round(ended_ms, 3)))
    return stages if ending.reports and ending.request.affect != "config" else []


def find_failure(ending: Ending, codes: tuple[Code, ...]) -> AgentError | None:
    """Return what a step that may fail ended in, as the error of the task: the first of these codes that was met."""
    for code in codes:
        for report in ending.reports:
            if report.problem is not None and report.problem.code is code:
                return AgentError(code, report.problem.message, remedy=report.problem.remedy)
    return None


def find_lost(run: str | None, ending: Ending) -> AgentError | None:
    """Return the error of a removal that was still pending when the VM's run ended: QEMU alone knew of it."""
    if not ending.late or run is None or ending.after is None or ending.after.run == run:
        return None
    return AgentError(Code.REMOVAL_LOST, f"VM {ending.after.domain.name} was powered off while the removal was pending")


def is_same_run(ending: Ending) -> bool | None:
    """Return whether the VM at the end is the one of the beginning: neither powered off nor migrated meanwhile."""
    before, after = (facts.run if facts else None for facts in (ending.before, ending.after))
    return None if before is None or after is None else before == after


def numbers(facts: Facts | None) -> Numbers:
    """Return the numbers of one moment; all null where nothing could be read."""
    if facts is None:
        return Numbers()
    live, config, guest = facts.domain.live, facts.domain.config, facts.guest
    current = live or config
    return Numbers(
        cpu_num=live.vcpu_current if live else None,
        max_cpu_num=current.vcpu_maximum if current else None,
        config_cpu_num=config.vcpu_current if config else None,
        guest_cpu_num=guest.cpus_online,
        memory_size=live.memory_bytes if live else None,
        max_memory_size=current.max_memory_bytes if current else None,
        config_memory_size=config.memory_bytes if config else None,
        balloon_size=facts.domain.balloon_bytes,
        guest_memory_size=guest.mem_total_bytes,
        free_slots=current.slots - current.slots_used if current and current.max_memory_bytes is not None else None,
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
    return [Drift(field=name, live=a, config=b) for name, (a, b) in fields.items() if a != b]


def silence_warning(guest: Guest, hint: str) -> Problem:
    """Return the warning of a guest that says nothing, with what would bring the change online without its agent."""
    assert guest.silence is not None
    return Problem(
        code=guest.silence,
        message=f"what the guest uses is unknown: {guest.silence_words}",
        remedy=f"{CODES[guest.silence].remedy} {hint}",
    )


def refused_warning(guest: Guest, command: str, hint: str) -> Problem:
    """Return the warning of a guest agent that would not answer one command."""
    return Problem(
        code=Code.GUEST_AGENT_REFUSED,
        message=f"what the guest uses is unknown: {command}: {guest.refused.get(command, 'no answer')}",
        remedy=f"{CODES[Code.GUEST_AGENT_REFUSED].remedy} {hint}",
    )


def warning(code: Code, message: str) -> Problem:
    """Return a warning with the code's own remedy."""
    return Problem(code=code, message=message, remedy=CODES[code].remedy)


def not_verified(message: str) -> AgentError:
    """Return the error of a change that libvirt confirmed and the VM does not show."""
    return AgentError(Code.NOT_VERIFIED, message, expected=False)


def tell_undo(failure: Problem, *, undone: bool) -> AgentError:
    """Return the error of a task that failed on the way and went back."""
    told = "what was done before was undone" if undone else "what was done before could not all be undone"
    return AgentError(failure.code, f"{failure.message}; {told}", remedy=failure.remedy, details={"undone": undone})


def _steps(ending: Ending) -> list[dict[str, Any]]:
    if ending.planned is not None:
        return [msgspec.to_builtins(step) for step in ending.planned]
    told = []
    for report in ending.reports:
        elapsed_ms = None if report.elapsed_ms is None else round(report.elapsed_ms, 3)
        entry = msgspec.to_builtins(report.step) | {"elapsedMs": elapsed_ms}
        if report.problem:
            entry["problem"] = report.problem.code
        told.append(entry)
    return told


def _planned_warnings(ending: Ending) -> list[Problem]:
    """Say that a plan for a running VM goes on; one for a definition is whole."""
    if ending.request.affect == "config" or not any(_touches_vm(step) for step in ending.planned or ()):
        return []
    return [warning(Code.PLAN_NOT_WHOLE, "more steps may follow from what the guest shows after these")]


def _touches_vm(step: AnyStep) -> bool:
    return not step.follows and not isinstance(step, DefineShape)


def _warnings(ending: Ending, warnings: list[Problem]) -> list[Problem]:
    """Return one warning of each code: what is so now, and in whose words it went wrong on the way."""
    told = {report.problem.code: report.problem for report in ending.reports if report.problem}
    for now in warnings:
        way = told.get(now.code)
        words = now.message if way is None or way.message == now.message else f"{now.message}; {way.message}"
        told[now.code] = msgspec.structs.replace(now, message=words)
    return list(told.values())
