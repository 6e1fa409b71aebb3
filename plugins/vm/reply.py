"""From what was seen to what is said: the parts of a reply that all VM commands share."""

from typing import Any

import msgspec

from kvmagent.model.command import SUCCESSFUL, Ending, Outcome, Problem
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.facts import Facts, Guest

from .requests import Drift, Numbers


def shared_fields(ending: Ending, outcome: Outcome, warnings: list[Problem]) -> dict[str, Any]:
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
        "warnings": _warnings(ending, warnings) if outcome not in ("refused", "planned") else [],
        "steps": _steps(ending),
        "drift": drift(ending.after),
        "recovered": ending.recovered or msgspec.UNSET,
    }


def settle(ending: Ending) -> Outcome | None:
    """Return the outcome where it does not depend on the command: a failure, a dry run, or nothing to do."""
    if ending.error is not None:
        touched = any(not report.step.soft for report in ending.reports)
        same = (
            ending.before is not None and ending.after is not None and numbers(ending.before) == numbers(ending.after)
        )
        return "partial" if touched and not same else "refused"
    if ending.planned is not None:
        return "planned"
    if not ending.reports:
        return "unchanged"
    return None


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


def _warnings(ending: Ending, warnings: list[Problem]) -> list[Problem]:
    """Return one warning of each code: what went wrong on the way, then what is so now."""
    problems = [report.problem for report in ending.reports if report.problem] + warnings
    return list({problem.code: problem for problem in problems}.values())
