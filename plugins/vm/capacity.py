"""What commands would be accepted now: the planners themselves decide it.

    find_headroom     the largest totals that a planner accepts, and the methods by which it adds memory
    find_growth       whether it accepts any more at all, for a fraction of the price
    judge_readiness   what keeps it from accepting given totals, or any more
    is_ready          whether anything does

The checks that the planners run are run here once more only to tell, beside what a planner refused with, all else that
it would have refused with.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from kvmagent.model.checks import (
    VIRTIO_MEM_BLOCK_BYTES,
    check_cpu,
    check_cpu_removal,
    check_device_room,
    check_device_support,
    check_expected,
    check_memory_ceiling,
    check_promised,
    check_state,
    dimm_quantum,
    virtio_mem_block_bytes,
)
from kvmagent.model.command import Affect, Goal, Once
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.fields import Method
from kvmagent.model.guestos import check_gives_up, check_plugs_memory
from kvmagent.model.hostbudget import refuse_growth
from kvmagent.model.ownerpolicy import check_owner_policy
from kvmagent.model.placement import check_placement
from kvmagent.model.reply import Blocker
from kvmagent.model.units import align_up

from . import cpu, memory
from .requests import Headroom, HotPlugCpuRequest, HotPlugMemoryRequest, ReadyForHotplugRequest

# Nothing is wrong with a VM that has all that it can have without a restart.
_AT_MAXIMUM = frozenset({Code.CPU_ABOVE_MAXIMUM, Code.MEMORY_ABOVE_MAXIMUM, Code.SLOTS_EXHAUSTED})
_METHODS: tuple[Method, ...] = ("balloon", "virtio-mem", "dimm")
_BOTH: tuple[tuple[Literal["running", "persistent"], Affect], ...] = (("running", "live"), ("persistent", "config"))


AnswerT = TypeVar("AnswerT")


def ask_once(
    once: Once,
    find: Callable[[ReadyForHotplugRequest, Facts], AnswerT],
    request: ReadyForHotplugRequest,
    facts: Facts,
) -> AnswerT:
    """Return the answer for all VMs that differ in nothing but names, by an Ending's `once`; it may have no name in it.

    The planners are most of what a list of VMs costs, and many VMs of a host are of one kind.
    """
    asked = msgspec.structs.replace(request, vm_uuid=""), _strip_names(facts)
    answer: AnswerT = once((find, *asked), lambda: find(*asked))
    return answer


def _strip_names(facts: Facts) -> Facts:
    """Return facts without what only messages need: the VM's name, and which VMs have most of the host's memory."""
    domain, host = facts.domain, facts.host
    live = None if domain.live is None else msgspec.structs.replace(domain.live, domain_id=None)
    domain = msgspec.structs.replace(domain, name="", uuid="", live=live)
    pools = tuple(msgspec.structs.replace(pool, most=(), idle=()) for pool in host.pools)
    return msgspec.structs.replace(facts, domain=domain, host=msgspec.structs.replace(host, pools=pools))


class Readiness(msgspec.Struct, frozen=True):
    """One of three states: ready, at its maximum, or neither, with the blockers."""

    ready: bool
    at_maximum: bool
    blockers: tuple[Blocker, ...]


class Growth(NamedTuple):
    """Whether any growth at all would be accepted without a restart."""

    cpu: bool
    memory: bool


class _Range(NamedTuple):
    """What a planner says to `n` times `quantum` more; above `most` times it need not be asked."""

    accepts: Callable[[int], bool]
    most: int
    quantum: int

    def is_open(self) -> bool:
        return self.most > 0 and (self.accepts(1) or self.accepts(self.most))

    def measure(self) -> int:
        return self.quantum * find_largest(self.accepts, self.most)


class _Planners:
    """The planners, asked with the facts and the common fields of one request."""

    def __init__(self, request: ReadyForHotplugRequest, facts: Facts) -> None:
        self.affect, self.facts = request.affect, facts
        self._shared: dict[str, Any] = {
            "vm_uuid": request.vm_uuid,
            "affect": request.affect,
            "guest_online": request.guest_online,
            "timeout_sec": request.timeout_sec,
        }
        self._expected_cpu, self._expected_memory = request.expected_cpu_num, request.expected_memory_size

    def refuse_cpu(self, cpu_num: int) -> AgentError | None:
        """Return why HotPlugCpu would be refused, if it would."""
        request = HotPlugCpuRequest(cpu_num=cpu_num, expected_cpu_num=self._expected_cpu, **self._shared)
        return self._find_refusal(lambda: cpu.decide(request, self.facts, ""))

    def refuse_memory(self, size_bytes: int, method: Method = "auto") -> AgentError | None:
        """Return why HotPlugMemory would be refused, if it would."""
        request = HotPlugMemoryRequest(
            memory_size=size_bytes, method=method, expected_memory_size=self._expected_memory, **self._shared
        )
        return self._find_refusal(lambda: memory.decide(request, self.facts, ""))

    def _find_refusal(self, decide: Callable[[], Goal]) -> AgentError | None:
        """The executor asks the owner of every goal, and holds it against the host's memory, as this does."""
        try:
            goal = decide()
            check_owner_policy(self.facts, self.affect, goal)
            refuse_growth(goal.totals, self.facts)
        except AgentError as error:
            return error
        return None


def judge_readiness(request: ReadyForHotplugRequest, facts: Facts, growth: Growth) -> Readiness:
    """Return whether the totals of a request would be accepted, or where it names none any growth at all.

    `growth` is of the same request and facts.
    """
    definition, planners, found = _current(facts, request.affect), _Planners(request, facts), list[Blocker]()
    asks = request.cpu_num is not None or request.memory_size is not None
    if definition is None:
        return Readiness(ready=False, at_maximum=False, blockers=_merge(_find_state(request, facts)))
    if request.cpu_num is not None or (not asks and not growth.cpu):
        wanted = definition.vcpu_current + definition.vcpu_quantum if request.cpu_num is None else request.cpu_num
        if refusal := planners.refuse_cpu(wanted):
            found += _explain(refusal, _explain_cpu(request, facts, wanted))
    if request.memory_size is not None or (not asks and not growth.memory):
        wanted = request.memory_size or definition.memory_bytes + _finest_bytes(facts, definition)
        if refusal := planners.refuse_memory(wanted):
            found += _explain(refusal, _explain_memory(request, facts, wanted))
    grows = any(growth)
    # Nor with one of a machine that never takes the one, and has room for the other.
    harmless = _AT_MAXIMUM | {Code.MACHINE_NOT_SUPPORTED} if grows else _AT_MAXIMUM
    is_full = bool(found) and all(one.code in harmless for one in found)
    if asks:
        at_maximum = bool(found) and all(one.code in _AT_MAXIMUM for one in found)
        return Readiness(ready=not found, at_maximum=at_maximum, blockers=_merge(found))
    blockers = () if is_full else _merge(found)
    return Readiness(ready=grows and not blockers, at_maximum=not grows and not blockers, blockers=blockers)


def is_ready(request: ReadyForHotplugRequest, facts: Facts) -> bool:
    """Return whether the totals of a request would be accepted, or where it names none any growth at all."""
    return judge_readiness(request, facts, find_growth(request, facts)).ready


def find_headroom(request: ReadyForHotplugRequest, facts: Facts) -> Headroom | None:
    """Return how far a VM can grow without a restart: what the planners accept; None where there is no definition."""
    definition = facts.domain.live or facts.domain.config
    current = _current(facts, request.affect)
    if definition is None:
        return None
    planners, removable = _Planners(request, facts), 0
    cpu_num = memory_bytes = 0
    methods: list[str] = []
    if current is not None:
        cpu_num = _cpu_range(planners, current).measure()
        memory_bytes = _memory_range(planners, current).measure()
        methods = [
            name for name in _METHODS if planners.refuse_memory(_least_by(name, facts, request.affect), name) is None
        ]
    known: Affect = "config" if facts.domain.live is None else "live"
    by_virtio_mem = memory.auto_method(facts, known if current is None else request.affect) == "plug virtio-mem"
    removable_bytes = sum(device.plugged_bytes for device in (*definition.dimms, *definition.virtio_mems))
    emulated = definition.hypervisor == "qemu" and not facts.host.removes_emulated
    fixed = emulated or any(check_cpu_removal(definition)) or any(check_gives_up(facts.guest.os))
    if definition.policy.hotplug and not fixed:
        removable = sum(vcpu.enabled and vcpu.hotpluggable for vcpu in definition.vcpus)
    return Headroom(
        cpu_num=cpu_num,
        memory_size=memory_bytes,
        slots=facts.count_free_slots(definition) if definition.max_memory_bytes is not None else 0,
        removable_cpu_num=removable,
        removable_memory_size=removable_bytes if definition.policy.hotplug else 0,
        memory_granularity=_device_quantum(facts, "virtio-mem" if by_virtio_mem else "dimm"),
        memory_methods=methods,
    )


def find_growth(request: ReadyForHotplugRequest, facts: Facts) -> Growth:
    """Return what of a VM can grow at all, as `find_headroom` has it."""
    current = _current(facts, request.affect)
    if current is None:
        return Growth(cpu=False, memory=False)
    planners = _Planners(request, facts)
    return Growth(cpu=_cpu_range(planners, current).is_open(), memory=_memory_range(planners, current).is_open())


def find_largest(accepts: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that is accepted, where all below are; 0 where none is.

    What is above `most` need not be asked: it is more than the VM's definition allows.
    """
    if most <= 0:
        return 0
    if accepts(most):
        return most
    if not accepts(1):
        return 0
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepts(middle) else (low, middle)
    return low


def _cpu_range(planners: _Planners, current: Definition) -> _Range:
    quantum = current.vcpu_quantum
    return _Range(
        lambda n: planners.refuse_cpu(current.vcpu_current + n * quantum) is None,
        max(0, current.vcpu_maximum - current.vcpu_current) // quantum,
        quantum,
    )


def _memory_range(planners: _Planners, current: Definition) -> _Range:
    room = max(0, (current.max_memory_bytes or 0) - current.total_bytes)
    room += sum(device.room_bytes for device in current.devices)
    quantum = _finest_bytes(planners.facts, current)
    return _Range(
        lambda n: planners.refuse_memory(current.memory_bytes + n * quantum) is None, room // quantum, quantum
    )


def _current(facts: Facts, affect: Affect) -> Definition | None:
    """Return the definition that a target is held against."""
    return facts.domain.config if affect == "config" else facts.domain.live


def _finest_bytes(facts: Facts, definition: Definition) -> int:
    """Return the smallest amount by which memory may grow: a virtio-mem device's block, where one has room."""
    blocks = (device.block_bytes or VIRTIO_MEM_BLOCK_BYTES for device in definition.virtio_mems if device.room_bytes)
    return min([dimm_quantum(facts, None), *blocks])


def _least_by(method: Method, facts: Facts, affect: Affect) -> int:
    """Return the smallest total above the present one that a method could make."""
    if method == "balloon":
        return memory.balloon_actual(facts, affect) + memory.balloon_page_bytes(facts)
    step = VIRTIO_MEM_BLOCK_BYTES if method == "virtio-mem" else dimm_quantum(facts, None)
    return memory.current_definition(facts, affect).memory_bytes + step


def _device_quantum(facts: Facts, method: Method) -> int:
    """Return what a new device of a kind must be a multiple of."""
    return virtio_mem_block_bytes(facts, None) if method == "virtio-mem" else dimm_quantum(facts, None)


def _find_state(request: ReadyForHotplugRequest, facts: Facts) -> Iterator[Blocker]:
    yield from check_state(facts.domain, request.affect)
    yield from check_expected(facts, request.affect, request.expected_cpu_num, request.expected_memory_size)


def _explain_cpu(request: ReadyForHotplugRequest, facts: Facts, cpu_num: int) -> Iterator[Blocker]:
    yield from _find_state(request, facts)
    for name, affect in _affected(request.affect):
        yield from _stand_in(name, check_cpu(facts, affect, cpu_num))


def _explain_memory(request: ReadyForHotplugRequest, facts: Facts, size_bytes: int) -> Iterator[Blocker]:
    yield from _find_state(request, facts)
    yield from check_plugs_memory(facts.guest.os) if request.affect != "config" else ()
    for name, affect in _affected(request.affect):
        definition = _current(facts, affect)
        if definition is None:
            continue
        kind = memory.auto_method(facts, request.affect)
        yield from _stand_in(name, check_device_support(facts, affect, kind))
        added = align_up(max(0, size_bytes - definition.memory_bytes), dimm_quantum(facts, None))
        yield from _stand_in(name, check_device_room(facts, affect, kind, (added,) if added else (), node=None))
        if added and kind == "plug dimms":
            yield from _stand_in(name, check_placement(facts, affect, (added,), node=None))
        if added:
            yield from _stand_in(name, check_memory_ceiling(facts, affect, definition.memory_bytes + added))
            yield from check_promised(facts, added) if affect == "live" else ()


def _explain(refusal: AgentError, found: Iterable[Blocker]) -> list[Blocker]:
    """Return what a planner refused with, and what else it would have refused with."""
    others = list(found)
    if any(one.code == refusal.code for one in others):
        return others
    needs_restart = bool(refusal.details.get("needsRestart"))
    first = Blocker(
        code=refusal.code, message=refusal.message, remedy=refusal.remedy, needs_restart=needs_restart, definitions=[]
    )
    return [first, *others]


def _affected(affect: Affect) -> Iterator[tuple[Literal["running", "persistent"], Affect]]:
    return ((name, one) for name, one in _BOTH if affect in ("both", one))


def _stand_in(name: Literal["running", "persistent"], found: Iterable[Blocker]) -> Iterator[Blocker]:
    for one in found:
        is_of_it = f"the {name} definition" in one.message
        yield msgspec.structs.replace(one, definitions=[name]) if is_of_it else one


def _merge(found: Iterable[Blocker]) -> tuple[Blocker, ...]:
    """Return each blocker once, with the definitions that have it."""
    merged: dict[Code, Blocker] = {}
    for one in found:
        known = merged.get(one.code)
        if known is None:
            merged[one.code] = one
            continue
        definitions = [name for name, _ in _BOTH if name in (*known.definitions, *one.definitions)]
        message = known.message
        if _without_name(one.message) not in map(_without_name, known.message.split("; ")):
            message = f"{known.message}; {one.message}"
        elif len(definitions) > 1:
            message = _without_name(known.message)
        merged[one.code] = msgspec.structs.replace(known, message=message, definitions=definitions)
    return tuple(merged.values())


def _without_name(message: str) -> str:
    for name, _ in _BOTH:
        message = message.replace(f"the {name} definition", "each definition")
    return message
