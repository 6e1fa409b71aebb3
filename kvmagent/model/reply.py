"""What a reply says about a task: its outcome, the numbers behind it, and the fields that every command on a VM has."""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.steps import StageName

Outcome = Literal["online", "plugged", "configured", "unchanged", "partial", "refused", "pending", "planned"]
SUCCESSFUL: frozenset[Outcome] = frozenset({"online", "plugged", "configured", "unchanged", "planned"})


class Problem(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A warning or an error, with its remedy.

    `asked_cpu_num`: how many vCPUs the guest was asked to keep, if time ran out before it was asked to remove the rest.
    """

    code: Code
    message: str
    remedy: str
    asked_cpu_num: int | None = None

    @classmethod
    def of(cls, error: AgentError) -> "Problem":
        """Return what an error says, for a warning, a goal or the journal."""
        asked = error.details.get("askedCpuNum")
        return cls(error.code, error.message, error.remedy, asked if isinstance(asked, int) else None)


class Blocker(msgspec.Struct, frozen=True, rename="camel"):
    """One thing that prevents hotplug.

    `definitions` are the definitions that have it; empty if the guest, the host or the VM as a whole does.
    """

    code: Code
    message: str
    remedy: str
    needs_restart: bool
    definitions: list[Literal["running", "persistent"]] = []


class Numbers(msgspec.Struct, frozen=True, rename="camel"):
    """A VM's numbers at one moment; null means unknown. Sizes are bytes.

    cpuNum and memorySize are those of the running VM, config... those of its persistent definition, guest... what the
    guest reports. memorySize is boot memory plus plugged devices; balloonSize is what the balloon leaves of it;
    guestMemorySize is MemTotal in the guest.
    """

    cpu_num: int | None = None
    max_cpu_num: int | None = None
    config_cpu_num: int | None = None
    guest_cpu_num: int | None = None
    memory_size: int | None = None
    max_memory_size: int | None = None
    config_memory_size: int | None = None
    balloon_size: int | None = None
    guest_memory_size: int | None = None
    free_slots: int | None = None


class Stage(msgspec.Struct, frozen=True, rename="camel"):
    """How far a change has come, as a total of vCPUs or bytes, and how many milliseconds after the task's start.

    plugged: the hypervisor has it; visible: the guest lists it; online: the guest uses it.
    """

    resource: Literal["cpu", "memory"]
    stage: StageName
    amount: int
    elapsed_ms: float


class Drift(msgspec.Struct, frozen=True, rename="camel"):
    """One field in which the running VM and its persistent definition differ."""

    field: str
    live: Any
    config: Any


@dataclass(frozen=True)
class Judgement:
    """The outcome of a task, as far as it was proven. `error` is what the caller sees, whoever raised it."""

    outcome: Outcome
    error: AgentError | None
    warnings: tuple[Problem, ...]
    stages: tuple[Stage, ...]
    before: Numbers
    after: Numbers
    drift: tuple[Drift, ...]
    same_run: bool | None


class VmReply(msgspec.Struct, kw_only=True, rename="camel"):
    """The fields that every command on a VM replies with.

    `recovered`: the task was resumed after the agent restarted. `late`: the task had replied `pending` before.
    `sameRun`: the VM was neither powered off nor migrated while the task ran (no command does either); null if that is
    unknown, and for a VM that is off.
    """

    success: bool
    error: str
    error_code: Code | None = None
    remedy: str | None = None
    details: dict[str, Any] = {}
    vm_uuid: str
    outcome: Outcome
    cpu_num: int | None = None
    memory_size: int | None = None
    before: Numbers
    after: Numbers
    warnings: list[Problem] = []
    stages: list[Stage] = []
    steps: list[dict[str, Any]] = []
    drift: list[Drift] = []
    same_run: bool | None = None
    recovered: bool | msgspec.UnsetType = msgspec.UNSET
    late: bool | msgspec.UnsetType = msgspec.UNSET
