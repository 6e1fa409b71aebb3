"""What the VM commands take and answer, as the wire has it. Sizes are bytes."""

from typing import Annotated, Any, Literal

import msgspec

from kvmagent.model.command import VmRequest
from kvmagent.model.facts import GuestOs, VmState
from kvmagent.model.fields import (
    MOST_BYTES,
    MOST_CPUS,
    CpuNum,
    DimmSize,
    GuestNode,
    MemoryMethod,
    MemorySize,
    ScaleShares,
    Strict,
)
from kvmagent.model.reply import Blocker, VmReply

LateCallback = Annotated[bool, msgspec.Meta(description="Send a second callback if a pending removal completes later")]

ExpectedCpuNum = (
    Annotated[
        int,
        msgspec.Meta(ge=1, le=8192, description="Refuse unless the VM's current cpuNum is this"),
    ]
    | None
)
ExpectedMemorySize = (
    Annotated[
        int,
        msgspec.Meta(ge=1, le=2**53 - 1, description="Refuse unless the VM's current memorySize is this"),
    ]
    | None
)


class HotPlugCpuRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Raise a VM's vCPUs to a total."""

    cpu_num: CpuNum
    expected_cpu_num: ExpectedCpuNum = None
    scale_shares: ScaleShares = False


class HotPlugMemoryRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Raise a VM's memory to a total."""

    memory_size: MemorySize
    expected_memory_size: ExpectedMemorySize = None
    method: MemoryMethod = "auto"
    node: GuestNode | None = None
    dimm_size: DimmSize | None = None
    strict: Strict = False


class HotPlugCpuMemoryRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Raise a VM's vCPUs and memory to totals: both or neither."""

    cpu_num: CpuNum
    memory_size: MemorySize
    expected_cpu_num: ExpectedCpuNum = None
    scale_shares: ScaleShares = False
    expected_memory_size: ExpectedMemorySize = None


class HotUnplugCpuRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Lower a VM's vCPUs to a total."""

    cpu_num: CpuNum
    expected_cpu_num: ExpectedCpuNum = None
    scale_shares: ScaleShares = False
    late_callback: LateCallback = False


class HotUnplugMemoryRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Lower a VM's memory to a total, never below it."""

    memory_size: MemorySize
    expected_memory_size: ExpectedMemorySize = None
    late_callback: LateCallback = False


class ReadyForHotplugRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Ask what stands in the way of hotplug, up to the given totals; with `prepare` make the next start ready."""

    cpu_num: CpuNum | None = None
    memory_size: MemorySize | None = None
    expected_cpu_num: ExpectedCpuNum = None
    expected_memory_size: ExpectedMemorySize = None
    prepare: Annotated[bool, msgspec.Meta(description="Change the persistent definition, never the running VM")] = False
    max_cpu_num: Annotated[int, msgspec.Meta(ge=1, le=MOST_CPUS, description="vCPUs to prepare for")] | None = None
    max_memory_size: (
        Annotated[int, msgspec.Meta(ge=1, le=MOST_BYTES, description="Memory to prepare for, bytes")] | None
    ) = None
    slots: Annotated[int, msgspec.Meta(ge=1, le=256, description="Memory slots to prepare")] | None = None
    free_page_reporting: Annotated[
        bool, msgspec.Meta(description="Prepare the balloon to return to the host what the guest frees")
    ] = False
    memory_device: Annotated[
        Literal["dimm", "virtio-mem"],
        msgspec.Meta(
            description="Prepare for dimms, or give each guest NUMA node an empty virtio-mem device of that size"
        ),
    ] = "dimm"


class MemoryReply(VmReply, kw_only=True, rename="camel"):
    """A VM reply that reports rounding: totals in bytes. `guestGrowth` is how much MemTotal grew in the guest."""

    requested: int | None = None
    aligned: int | None = None
    applied: int | None = None
    guest_growth: int | None = None


class Headroom(msgspec.Struct, frozen=True, rename="camel"):
    """How far a VM can grow now, without a restart, and how far come down: vCPUs, bytes, slots.

    What is added up to cpuNum and memorySize would be accepted now, and one more vCPU or block would not.

    `memoryGranularity` is what added memory must be a multiple of; `memoryMethods` are those that can add any.
    """

    cpu_num: int
    memory_size: int
    slots: int
    removable_cpu_num: int
    removable_memory_size: int
    memory_granularity: int
    memory_methods: list[str]


class Change(msgspec.Struct, frozen=True):
    """One thing that prepare changes in the persistent definition."""

    field: str
    former: Any
    prepared: Any


class Clamp(msgspec.Struct, frozen=True):
    """One amount that prepare could not take as asked, and why."""

    field: str
    asked: int
    prepared: int
    why: str


class PluggedOffline(msgspec.Struct, frozen=True, rename="camel"):
    """What the running VM has and its guest does not use: vCPUs, bytes; null if the guest does not report it.

    `ballooned` is no trouble: it is what the balloon holds back of the memory, which was asked of it.
    """

    cpu_num: int | None = None
    memory_size: int | None = None
    ballooned: int | None = None


class Device(msgspec.Struct, frozen=True, rename="camel"):
    """One memory device of a VM, in bytes; null where unknown, or of another model.

    `online` is how much of it the guest uses.
    """

    alias: str | None
    model: str
    slot: int | None
    node: int | None
    size: int
    block: int | None
    requested: int | None
    current: int | None
    base: int | None
    online: int | None


class ReadinessReply(VmReply, kw_only=True, rename="camel"):
    """Whether a VM can be hot-plugged now, and after a restart; if not, all that stands in the way.

    `ready`: a command to the totals that were asked for would be accepted now; where none were, one that adds anything.
    `atMaximum`: it would not, and nothing is wrong: the VM has all that it can have without a restart. `confirmable`:
    the guest can say whether it uses what is plugged; else a warning with the code GUEST_AGENT_... says why.
    `guestFellSilent`: its agent spoke before in this run of the VM, and does not now; a guest without one never did.
    `restartRequired`: the persistent definition has something that the running VM lacks until it is powered off and on;
    `restartRequiredSince` is when that was first seen, in seconds since the epoch.
    `name` is the domain's name, however the VM was asked for. `warnings` say what is plugged and offline,
    and what the guest's operating system is known not to do; `guestOs` is what it says of itself.
    """

    name: str | None = None
    state: VmState | None = None
    plugged_offline: PluggedOffline | None = None
    guest_os: GuestOs | None = None
    ready: bool = False
    at_maximum: bool = False
    confirmable: bool = False
    guest_fell_silent: bool = False
    ready_after_restart: bool = False
    blockers: list[Blocker] = []
    headroom: Headroom | None = None
    changes: list[Change] = []
    clamped: list[Clamp] = []
    diff: str | None = None
    restart_required: bool = False
    restart_required_since: float | None = None
    devices: list[Device] = []
