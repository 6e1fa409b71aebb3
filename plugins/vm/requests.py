"""What the VM commands take and answer, as the wire has it. Sizes are bytes."""

from typing import Annotated, Any, Literal

import msgspec

from kvmagent.model.command import Outcome, Problem, VmRequest
from kvmagent.model.errors import Code

CpuNum = Annotated[int, msgspec.Meta(ge=1, le=8192, description="Total vCPUs wanted")]
MemorySize = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1, description="Total memory wanted, bytes")]
Method = Literal["auto", "dimm", "balloon"]


class HotPlugCpuRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Bring a VM up to a number of vCPUs."""

    cpu_num: CpuNum


class HotPlugMemoryRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Bring a VM up to an amount of memory."""

    memory_size: MemorySize
    method: Annotated[Method, msgspec.Meta(description="auto gives back the balloon first, then attaches dimms")] = (
        "auto"
    )
    node: Annotated[int, msgspec.Meta(ge=0, le=1023)] | None = None
    dimm_size: Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)] | None = None
    strict: bool = False


class ReadyForHotplugRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Ask what stands in the way of hotplug, up to the given totals where they are given."""

    cpu_num: CpuNum | None = None
    memory_size: MemorySize | None = None


class Numbers(msgspec.Struct, frozen=True, rename="camel"):
    """A VM's numbers at one moment; null where unknown. Sizes are bytes.

    cpuNum and memorySize are the running VM's, config... its persistent definition's, guest... what the guest says.
    memorySize is boot memory plus plugged devices; balloonSize what the balloon leaves of it; guestMemorySize is
    MemTotal in the guest.
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


class Drift(msgspec.Struct, frozen=True, rename="camel"):
    """One field in which the running VM and its persistent definition differ."""

    field: str
    live: Any
    config: Any


class VmReply(msgspec.Struct, kw_only=True, rename="camel"):
    """What every command on a VM answers. `recovered` is there, and true, where an agent's restart lay between."""

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
    steps: list[dict[str, Any]] = []
    drift: list[Drift] = []
    recovered: bool | msgspec.UnsetType = msgspec.UNSET


class MemoryReply(VmReply, kw_only=True, rename="camel"):
    """A VM reply that tells of rounding: totals in bytes."""

    requested: int | None = None
    aligned: int | None = None
    applied: int | None = None


class Blocker(msgspec.Struct, frozen=True, rename="camel"):
    """One thing that stands in the way of hotplug; `scope` says where: the running VM, its definition, guest, host."""

    code: Code
    message: str
    remedy: str
    needs_restart: bool


class Headroom(msgspec.Struct, frozen=True, rename="camel"):
    """How far a VM can grow now, without a restart."""

    cpu_num: int
    memory_size: int
    slots: int


class ReadinessReply(VmReply, kw_only=True, rename="camel"):
    """Whether a VM can be hot-plugged now, and after a restart; if not, all that stands in the way."""

    ready: bool = False
    ready_after_restart: bool = False
    blockers: list[Blocker] = []
    headroom: Headroom | None = None
