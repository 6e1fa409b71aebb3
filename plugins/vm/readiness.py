"""ReadyForHotplug: what the planners would accept now, and everything that prevents more.

With `prepare` the persistent definition is edited so that the next start is ready; the running VM is never touched.
"""

from collections.abc import Mapping
from typing import Any

from kvmagent.model.checks import check_guest
from kvmagent.model.command import Command, Ending, Wish
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.guestos import check_gives_up, find_limits
from kvmagent.model.guestuse import find_imbalance, find_memory_warnings, idle_warnings, migration_warnings, warning
from kvmagent.model.hostbudget import foresee_restart
from kvmagent.model.judge import drift
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AnyStep, DefineShape
from kvmagent.model.units import format_size

from .capacity import Growth, ask_once, find_headroom, is_ready, judge_readiness
from .guestmemory import find_online_bytes
from .prepare import PrepareGoal, explain_preparation, is_prepared, plan_preparation
from .requests import Device, PluggedOffline, ReadinessReply, ReadyForHotplugRequest

# Of these the next start may have more: then a restart is required, and nothing has drifted.
_MAXIMA = frozenset({"maxCpuNum", "maxMemorySize", "slots"})


def decide(request: ReadyForHotplugRequest, facts: Facts, task_uuid: str) -> PrepareGoal:
    """Return the shape to prepare; a request without `prepare` has none, and its reply says everything.

    Raises:
        AgentError: what `plan_preparation` refuses.
    """
    return plan_preparation(request, facts) if request.prepare else PrepareGoal()


def _prepare_for(wish: Wish) -> ReadyForHotplugRequest:
    return ReadyForHotplugRequest(
        vm_uuid=wish.vm,
        cpu_num=wish.cpu_num,
        memory_size=wish.memory_size,
        max_cpu_num=wish.max_cpu_num,
        max_memory_size=wish.max_memory_size,
        prepare=True,
    )


def next_steps(goal: PrepareGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return the one step of a preparation, if the definition has not that shape yet."""
    if goal.shape is None or is_prepared(facts.get_config(), goal.shape):
        return ()
    return (DefineShape(shape=goal.shape),)


def reply_fields(ending: Ending) -> Mapping[str, Any]:
    """Return the answer: ready when nothing stands in the way, all blockers when something does."""
    facts, goal, request = ending.after, ending.goal, ending.request
    if facts is None or ending.error is not None:
        return {}
    silence, room = _find_silence(facts), ask_once(ending.once, find_headroom, request, facts)
    growth = Growth(cpu=bool(room and room.cpu_num), memory=bool(room and room.memory_size))
    now = judge_readiness(request, facts, growth)
    return {
        "warnings": (_find_warnings(facts) + silence if ending.is_done else [])
        + explain_preparation(goal, facts, planned=ending.planned is not None),
        "name": facts.domain.name,
        "state": facts.domain.state,
        "plugged_offline": _find_offline(facts),
        "guest_os": facts.guest.os,
        "ready": now.ready,
        "at_maximum": now.at_maximum,
        "guest_fell_silent": facts.fell_silent,
        "confirmable": facts.domain.live is not None and not silence,
        "ready_after_restart": _is_ready_after_restart(ending, facts),
        "blockers": list(now.blockers),
        "headroom": room,
        "devices": _find_devices(facts),
        "changes": list(goal.changes),
        "clamped": list(goal.clamped),
        "diff": _find_diff(ending),
        "restart_required": facts.restart_required,
        "restart_required_since": facts.restart_since,
    }


def _find_offline(facts: Facts) -> PluggedOffline | None:
    """Return what is plugged and not used in the guest; None for a VM that is off."""
    live, actual = facts.domain.live, facts.domain.balloon_bytes
    if live is None:
        return None
    return PluggedOffline(
        cpu_num=facts.offline_vcpus,
        memory_size=facts.offline_memory_bytes,
        ballooned=None if actual is None else max(0, live.balloon_total_bytes - actual),
    )


def _offline_warnings(facts: Facts) -> list[Problem]:
    """Return the same in words, with remedies; a guest that does not report it is another warning."""
    live, guest, found = facts.domain.live, facts.guest, list[Problem]()
    if live is not None and guest.vcpus is not None:
        found += idle_warnings(guest.vcpus, live.vcpu_current)
    if live is not None and guest.blocks is not None and guest.block_bytes is not None:
        found += find_memory_warnings(facts, asked_online=True)
    return found


def _os_warnings(facts: Facts) -> list[Problem]:
    """Return what the guest's operating system is known not to do: of memory that can be plugged, and of removals."""
    os, live = facts.guest.os, facts.domain.live
    if live is None:
        return []
    told = [Problem(code=one.code, message=one.message, remedy=one.remedy) for one in check_gives_up(os)]
    return told + find_limits(os, dimm=True, virtio_mem=bool(live.virtio_mems))[:1]


def _find_warnings(facts: Facts) -> list[Problem]:
    return [
        *_offline_warnings(facts),
        *_find_drift(facts),
        *_find_restart(facts),
        *_os_warnings(facts),
        *find_imbalance(facts, facts.guest.os),
        *migration_warnings(facts),
    ]


def _is_ready_after_restart(ending: Ending, facts: Facts) -> bool:
    """Return whether the same totals would be accepted once the VM was powered off and on.

    With a managed save image the next start has another definition than the persistent one.
    """
    request = ending.request
    if facts.domain.config is None or facts.domain.saved:
        return False
    same = ReadyForHotplugRequest(vm_uuid=request.vm_uuid, cpu_num=request.cpu_num, memory_size=request.memory_size)
    return ask_once(ending.once, is_ready, same, foresee_restart(facts))


def _find_diff(ending: Ending) -> str | None:
    """Return the diff of the persistent XML; None for a mere question."""
    if not ending.request.prepare:
        return None
    return ending.preview or "".join(report.told for report in ending.reports)


def _find_restart(facts: Facts) -> list[Problem]:
    """Return that the running VM lacks what its definition would start it with: no blocker, and easily forgotten."""
    if not facts.restart_required:
        return []
    words = f"the persistent definition of VM {facts.domain.name} has something that the running VM lacks"
    return [warning(Code.RESTART_REQUIRED, words)]


def _find_drift(facts: Facts) -> list[Problem]:
    """Return where the next start would have less, or other devices; what it would have more is no drift."""
    live, config = facts.domain.live, facts.domain.config
    if live is None or config is None:
        return []
    told = [
        f"{change.field} is {_words(change.field, change.live)} in the running VM, "
        f"{_words(change.field, change.config)} in its definition"
        for change in drift(facts)
        if (change.field not in _MAXIMA or (change.config or 0) < (change.live or 0))
        and not (change.field == "memoryDevices" and _has_empty_devices_alone(live, config))
    ]
    return [warning(Code.DRIFT, "; ".join(told))] if told else []


def _has_empty_devices_alone(live: Definition, config: Definition) -> bool:
    """Whether all that the next start has besides are virtio-mem devices that give nothing yet, as prepare makes."""
    empty = sum(not device.plugged_bytes for device in config.virtio_mems)
    return 0 < len(config.devices) - len(live.devices) <= empty


def _find_silence(facts: Facts) -> list[Problem]:
    """Return why the guest could not confirm a change; nothing of a VM that is off."""
    if facts.domain.live is None:
        return []
    found: dict[Code, Problem] = {}
    for one in check_guest(facts.guest):
        known = found.get(one.code)
        words = one.message if known is None else f"{known.message}; {one.message}"
        found[one.code] = Problem(code=one.code, message=words, remedy=one.remedy)
    return list(found.values())


def _find_devices(facts: Facts) -> list[Device]:
    """Return the memory devices of the running VM, or of the definition of one that is off."""
    definition = facts.domain.live or facts.domain.config
    if definition is None:
        return []
    return [
        Device(
            alias=device.alias,
            model=device.model,
            slot=device.slot,
            node=device.node,
            size=device.size_bytes,
            block=device.block_bytes,
            requested=device.requested_bytes,
            current=device.current_bytes,
            base=device.base,
            online=find_online_bytes(facts, device),
        )
        for device in definition.devices
    ]


def _words(field: str, value: int | None) -> str:
    if value is None:
        return "none"
    return format_size(value) if field.endswith("Size") else str(value)


READY_FOR_HOTPLUG = Command(
    name="ReadyForHotplug",
    subcommand="ready",
    path="/vm/hotplug/ready",
    summary="Check whether a VM is ready for hotplug, and why not",
    request=ReadyForHotplugRequest,
    reply=ReadinessReply,
    goal=PrepareGoal,
    observe_guest=frozenset({"cpus", "memory", "agent", "os", "budget"}),
    decide=decide,
    next_steps=next_steps,
    reply_fields=reply_fields,
    role="read",
    prepares=_prepare_for,
    needs_also=lambda request: "prepare" if request.prepare else None,
    refusals=(
        Code.VM_NOT_FOUND,
        Code.VM_TRANSIENT,
        Code.VM_OPTED_OUT,
        Code.MACHINE_NOT_SUPPORTED,
        Code.TARGET_BELOW_CURRENT,
        Code.MEMORY_LOCKED,
        Code.GUEST_OS_UNABLE,
    ),
)
