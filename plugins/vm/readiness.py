"""ReadyForHotplug: everything that stands in the way of hotplug, from the same checks as the planners run.

With `prepare` the persistent definition is edited so that the next start is ready; the running VM is never touched.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kvmagent.model.command import Affect, Command, Ending
from kvmagent.model.errors import Code
from kvmagent.model.facts import Facts
from kvmagent.model.guestuse import find_memory_warnings, idle_warnings, migration_warnings
from kvmagent.model.judge import drift
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AnyStep, DefineShape
from kvmagent.model.units import align_up, format_size

from .checks import (
    blocker,
    check_balloon,
    check_cpu,
    check_cpu_removal,
    check_dimm_room,
    check_dimm_support,
    check_expected,
    check_guest,
    check_memory_ceiling,
    check_opted_out,
    check_state,
    dimm_quantum,
)
from .guestos import check_gives_up, check_plugs_memory, check_virtio_mem, find_limits
from .prepare import PrepareGoal, explain_preparation, is_prepared, plan_preparation
from .requests import Blocker, Headroom, PluggedOffline, ReadinessReply, ReadyForHotplugRequest


def decide(request: ReadyForHotplugRequest, facts: Facts, task_uuid: str) -> PrepareGoal:
    """Return the shape to prepare; a mere question has none, and all is told in its reply.

    Raises:
        AgentError: what `plan_preparation` refuses.
    """
    return plan_preparation(request, facts) if request.prepare else PrepareGoal()


def advance(goal: PrepareGoal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return the one step of a preparation, if the definition has not that shape yet."""
    if goal.shape is None or is_prepared(facts.get_config(), goal.shape):
        return ()
    return (DefineShape(shape=goal.shape),)


def conclude(ending: Ending) -> Mapping[str, Any]:
    """Return the answer: ready when nothing stands in the way, all blockers when something does."""
    facts, goal = ending.after, ending.goal
    if facts is None or ending.error is not None:
        return {}
    blockers = list(dict.fromkeys(_blockers(ending.request, facts)))
    lasting = list(_blockers_after_restart(ending.request, facts))
    return {
        "warnings": (_find_warnings(facts) if ending.is_done else [])
        + explain_preparation(goal, facts, planned=ending.planned is not None),
        "name": facts.domain.name,
        "state": facts.domain.state,
        "plugged_offline": _find_offline(facts),
        "guest_os": facts.guest.os,
        "ready": not blockers,
        "ready_after_restart": not lasting,
        "blockers": blockers,
        "headroom": _headroom(facts),
        "changes": list(goal.changes),
        "clamped": list(goal.clamped),
        "diff": _find_diff(ending),
        "restart_required": _needs_restart(facts) if ending.request.prepare else None,
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
    """Return the same in words, with remedies; a guest that does not tell is a blocker already."""
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
    return _offline_warnings(facts) + _os_warnings(facts) + migration_warnings(facts)


def _find_diff(ending: Ending) -> str | None:
    """Return the diff of the persistent XML; None for a mere question."""
    if not ending.request.prepare:
        return None
    return ending.preview or "".join(report.told for report in ending.reports)


def _needs_restart(facts: Facts) -> bool:
    """Return whether the running VM is another than its definition would start: power off and on to have it."""
    live, config = facts.domain.live, facts.domain.config
    if live is None or config is None:
        return False
    return (live.vcpu_maximum, live.max_memory_bytes, live.slots, live.cells, live.acpi, live.agent_channel) != (
        config.vcpu_maximum,
        config.max_memory_bytes,
        config.slots,
        config.cells,
        config.acpi,
        config.agent_channel,
    )


def _blockers(request: ReadyForHotplugRequest, facts: Facts) -> Iterator[Blocker]:
    """What stands in the way now."""
    yield from check_state(facts.domain, request.affect)
    yield from check_expected(facts, request.affect, request.expected_cpu_num, request.expected_memory_size)
    yield from _definition_blockers(request, facts, request.affect)
    yield from check_plugs_memory(facts.guest.os)
    if facts.domain.live is not None:
        yield from check_guest(facts.guest)
    for change in drift(facts):
        live, config = _words(change.field, change.live), _words(change.field, change.config)
        yield blocker(Code.DRIFT, f"{change.field} is {live} in the running VM, {config} in its definition")


def _blockers_after_restart(request: ReadyForHotplugRequest, facts: Facts) -> Iterator[Blocker]:
    """What would stand in the way if the VM were powered off and started from its persistent definition."""
    if facts.domain.config is None:
        yield from check_state(facts.domain, "config")
        return
    yield from check_opted_out(facts.domain, "config")
    yield from _definition_blockers(request, facts, "config")
    if not facts.domain.config.agent_channel:
        yield blocker(Code.GUEST_AGENT_ABSENT, "the persistent definition has no guest-agent channel")


def _definition_blockers(request: ReadyForHotplugRequest, facts: Facts, affect: Affect) -> Iterator[Blocker]:
    """Where no total is asked for, room for one more vCPU and one more memory block is."""
    definition = facts.domain.config if affect == "config" else facts.domain.live or facts.domain.config
    if definition is None:
        return
    yield from check_cpu(facts, affect, request.cpu_num or definition.vcpu_current + definition.vcpu_quantum)
    yield from check_dimm_support(facts, affect)
    quantum = dimm_quantum(facts, None)
    wanted = definition.memory_bytes + quantum if request.memory_size is None else request.memory_size
    added = align_up(max(0, wanted - definition.memory_bytes), quantum)
    yield from check_dimm_room(facts, affect, (added,) if added else (), node=None)
    if added:
        yield from check_memory_ceiling(facts, affect, definition.memory_bytes + added)
    yield from check_balloon(facts, affect, 0)


def _words(field: str, value: int | None) -> str:
    if value is None:
        return "none"
    return format_size(value) if field.endswith("Size") else str(value)


def _headroom(facts: Facts) -> Headroom | None:
    definition = facts.domain.live or facts.domain.config
    if definition is None:
        return None
    slots = definition.slots - definition.slots_used if definition.max_memory_bytes is not None else 0
    room = (definition.max_memory_bytes or 0) - definition.total_bytes if slots > 0 else 0
    os, policy, balloon_bytes = facts.guest.os, definition.policy, facts.domain.balloon_bytes or 0
    most_cpus = definition.vcpu_maximum
    if policy.max_cpu_num is not None:
        most_cpus = min(most_cpus, policy.max_cpu_num)
    if policy.max_memory_bytes is not None:
        room = min(room, policy.max_memory_bytes - definition.memory_bytes)
    if not policy.hotplug:
        return Headroom(0, 0, 0, 0, 0, memory_granularity=dimm_quantum(facts, None), memory_methods=[])
    emulated = definition.hypervisor == "qemu" and not facts.host.removes_emulated
    fixed = emulated or any(check_cpu_removal(definition)) or any(check_gives_up(os))
    removable = 0 if fixed else sum(vcpu.enabled and vcpu.hotpluggable for vcpu in definition.vcpus)
    methods = {
        "balloon": definition.balloon
        and balloon_bytes < definition.balloon_total_bytes
        and policy.allows_above(balloon_bytes + definition.virtio_mem_bytes),
        "virtio-mem": (any(device.room_bytes for device in definition.virtio_mems) or room > 0)
        and policy.allows_above(definition.memory_bytes)
        and not any(check_virtio_mem(os)),
        "dimm": room > 0 and not any(check_plugs_memory(os)),
    }
    return Headroom(
        cpu_num=max(0, most_cpus - definition.vcpu_current),
        memory_size=max(0, room),
        slots=max(0, slots),
        removable_cpu_num=removable,
        removable_memory_size=definition.memory_bytes - definition.boot_bytes,
        memory_granularity=dimm_quantum(facts, None),
        memory_methods=[name for name, can in methods.items() if can],
    )


READY_FOR_HOTPLUG = Command(
    name="ReadyForHotplug",
    subcommand="ready",
    path="/vm/hotplug/ready",
    summary="Tell whether a VM can be hot-plugged, and everything that stands in the way",
    request=ReadyForHotplugRequest,
    reply=ReadinessReply,
    goal=PrepareGoal,
    observe_guest=frozenset({"cpus", "memory", "agent", "os", "budget"}),
    decide=decide,
    advance=advance,
    conclude=conclude,
    role="read",
    needs_also=lambda request: "prepare" if request.prepare else None,
    refusals=(
        Code.VM_NOT_FOUND,
        Code.VM_TRANSIENT,
        Code.VM_OPTED_OUT,
        Code.MACHINE_NOT_SUPPORTED,
        Code.TARGET_BELOW_CURRENT,
    ),
)
