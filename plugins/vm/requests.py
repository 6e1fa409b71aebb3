"""The requests and replies of the VM commands, as on the wire. Sizes are bytes."""

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
    """Check what prevents hotplug up to the given totals; with `prepare` make the VM ready at its next start."""

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
    """How far a VM can grow or shrink now, without a restart: vCPUs, bytes, slots.

    A command that adds up to cpuNum and memorySize would be accepted now; one more vCPU or block would be refused.

    Added memory must be a multiple of `memoryGranularity`; `memoryMethods` are the methods that can add some.
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
    """A requested amount that prepare had to change, and why."""

    field: str
    asked: int
    prepared: int
    why: str


class PluggedOffline(msgspec.Struct, frozen=True, rename="camel"):
    """vCPUs and bytes that the running VM has but its guest does not use; null if the guest does not report it.

    `ballooned` is no fault: it is memory that the balloon was told to hold.
    """

    cpu_num: int | None = None
    memory_size: int | None = None
    ballooned: int | None = None


class Device(msgspec.Struct, frozen=True, rename="camel"):
    """One memory device of a VM, in bytes; null means unknown, or that its model has no such field.

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
    """Whether a VM can be hot-plugged now, and after a restart; if not, everything that prevents it.

    `ready`: a command to the requested totals would be accepted now; without totals, one that adds anything.
    `atMaximum`: the VM is not ready, but nothing is wrong: it has all that it can have without a restart.
    `confirmable`: the guest can report whether it uses what is plugged; if not, a warning GUEST_AGENT_... says why.
    `guestFellSilent`: the guest's agent answered before, since the VM was powered on, but no longer does.
    `restartRequired`: the persistent definition has something that the running VM lacks until it is powered off and on;
    `restartRequiredSince`: when the agent first observed that, in seconds since the epoch.
    `name`: the domain's name, also if the request has its UUID. `warnings` say what is plugged but offline, and what
    the guest's operating system is known not to support; `guestOs`: how it identifies itself.
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
