"""ReadyForHotplug: everything that stands in the way of hotplug, from the same checks as the planners run."""

from collections.abc import Iterator

from kvmagent.model.command import Affect, Command, Ending, Goal
from kvmagent.model.errors import Code
from kvmagent.model.facts import Facts
from kvmagent.model.steps import AnyStep
from kvmagent.model.units import align_up

from .checks import (
    block_bytes,
    blocker,
    check_balloon,
    check_cpu,
    check_dimm_room,
    check_dimm_support,
    check_guest,
    check_state,
)
from .reply import drift, shared_fields
from .requests import Blocker, Headroom, ReadinessReply, ReadyForHotplugRequest


def decide(request: ReadyForHotplugRequest, facts: Facts, task_uuid: str) -> Goal:
    """A question has no goal: nothing is refused, all is told in the reply."""
    return Goal()


def advance(goal: Goal, facts: Facts, spent: frozenset[str]) -> tuple[AnyStep, ...]:
    """A question takes no steps."""
    return ()


def conclude(ending: Ending) -> ReadinessReply:
    """Return the answer: ready when nothing stands in the way, all blockers when something does."""
    facts = ending.after
    if facts is None or ending.error is not None:
        return ReadinessReply(**shared_fields(ending, "refused", []))
    blockers = list(dict.fromkeys(_blockers(ending.request, facts)))
    lasting = list(_blockers_after_restart(ending.request, facts))
    return ReadinessReply(
        **shared_fields(ending, "unchanged", []),
        ready=not blockers,
        ready_after_restart=not lasting,
        blockers=blockers,
        headroom=_headroom(facts),
    )


def _blockers(request: ReadyForHotplugRequest, facts: Facts) -> Iterator[Blocker]:
    """What stands in the way now."""
    yield from check_state(facts.domain, request.affect)
    yield from _definition_blockers(request, facts, request.affect)
    if facts.domain.live is not None:
        yield from check_guest(facts.guest)
    for change in drift(facts):
        yield blocker(
            Code.DRIFT, f"{change.field} is {change.live} in the running VM, {change.config} in its definition"
        )


def _blockers_after_restart(request: ReadyForHotplugRequest, facts: Facts) -> Iterator[Blocker]:
    """What would stand in the way if the VM were powered off and started from its persistent definition."""
    if facts.domain.config is None:
        yield from check_state(facts.domain, "config")
        return
    yield from _definition_blockers(request, facts, "config")
    if not facts.domain.config.agent_channel:
        yield blocker(Code.GUEST_AGENT_ABSENT, "the persistent definition has no guest-agent channel")


def _definition_blockers(request: ReadyForHotplugRequest, facts: Facts, affect: Affect) -> Iterator[Blocker]:
    """Where no total is asked for, room for one more vCPU and one more memory block is."""
    definition = facts.domain.config if affect == "config" else facts.domain.live or facts.domain.config
    if definition is None:
        return
    yield from check_cpu(facts, affect, request.cpu_num or definition.vcpu_current + 1)
    yield from check_dimm_support(facts, affect)
    quantum = block_bytes(facts)
    wanted = definition.memory_bytes + quantum if request.memory_size is None else request.memory_size
    added = align_up(max(0, wanted - definition.memory_bytes), quantum)
    yield from check_dimm_room(facts, affect, (added,) if added else (), node=None)
    yield from check_balloon(facts, affect, 0)


def _headroom(facts: Facts) -> Headroom | None:
    definition = facts.domain.live or facts.domain.config
    if definition is None:
        return None
    slots = definition.slots - definition.slots_used if definition.max_memory_bytes is not None else 0
    room = (definition.max_memory_bytes or 0) - definition.total_bytes if slots > 0 else 0
    removable = sum(vcpu.enabled and vcpu.hotpluggable for vcpu in definition.vcpus)
    methods = {
        "balloon": definition.balloon and (facts.domain.balloon_bytes or 0) < definition.balloon_total_bytes,
        "virtio-mem": any(device.room_bytes for device in definition.virtio_mems) or room > 0,
        "dimm": room > 0,
    }
    return Headroom(
        cpu_num=definition.vcpu_maximum - definition.vcpu_current,
        memory_size=max(0, room),
        slots=max(0, slots),
        removable_cpu_num=0 if definition.hypervisor == "qemu" else removable,
        removable_memory_size=definition.memory_bytes - definition.boot_bytes,
        memory_granularity=block_bytes(facts),
        memory_methods=[name for name, can in methods.items() if can],
    )


READY_FOR_HOTPLUG = Command(
    name="ReadyForHotplug",
    path="/vm/hotplug/ready",
    summary="Tell whether a VM can be hot-plugged, and everything that stands in the way",
    request=ReadyForHotplugRequest,
    reply=ReadinessReply,
    goal=Goal,
    observe_guest=frozenset({"cpus", "memory"}),
    decide=decide,
    advance=advance,
    conclude=conclude,
    refusals=(Code.VM_NOT_FOUND,),
)
