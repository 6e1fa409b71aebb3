"""The effects that a plan can name. Each has exactly one performer, in hypervisor/performers.py.

A `soft` step asks the guest. When it fails or its time runs out, the task goes on and the reply carries a warning:
a guest that does not answer is no error of the hypervisor's change. A soft step that failed is not tried again in its
run: `key` names what is given up with it.

A step that changes a `resource` says so, in which definition (`changes`), and how far it brings it (`stage`): it is
performed only for a goal that has a total of that. A step that asks the guest for an amount names what is asked,
another that waits for it names the same, and where the wait does not end well the first says what takes it back: the
guest could follow it at any later time.
"""

from typing import ClassVar, Literal

import msgspec

from kvmagent.model.facts import Definition, Facts, MemoryDevice
from kvmagent.model.units import format_size

Target = Literal["live", "config"]
Resource = Literal["cpu", "memory", "balloon"]
StageName = Literal["plugged", "visible", "online"]
NOTHING: frozenset[Target] = frozenset()
LIVE: frozenset[Target] = frozenset({"live"})
CONFIG: frozenset[Target] = frozenset({"config"})


class Step(msgspec.Struct, frozen=True, tag_field="step", rename="camel"):
    """One effect on one VM."""

    soft: ClassVar[bool] = False
    resource: ClassVar[Resource | None] = None
    stage: ClassVar[StageName | None] = None

    @property
    def key(self) -> str:
        """What a failure of this step gives up: the step type, or with a device's name the type for that device."""
        return type(self).__name__

    @property
    def follows(self) -> bool:
        """Whether it only brings the persistent definition to what the running VM is: it may be done late, too."""
        return False

    @property
    def changes(self) -> frozenset[Target]:
        """What it changes: the running VM, which has its guest, or the persistent definition."""
        return LIVE

    def find_growth(self, facts: Facts, target: Target) -> int:
        """Return by how much it makes its resource grow, or lets it, in the running VM or in the definition.

        Negative where it takes something away.
        """
        return 0

    @property
    def asks(self) -> str | None:
        """What the guest is asked to bring to another size, which it does in its own time: a device of the VM's."""
        return None

    @property
    def request(self) -> str:
        """That in words: the amount, and of what."""
        return ""

    @property
    def awaits(self) -> str | None:
        """What of that it waits for."""
        return None

    def take_back(self, facts: Facts) -> "tuple[AnyStep, ...]":
        """Return what sets a request to what the guest has; nothing where it has what was asked."""
        return ()

    def leaves_offline(self, facts: Facts) -> frozenset[int]:
        """Return the guest's CPUs that are the agent's to bring online from then on, until the guest has used them."""
        return frozenset()


class SetVcpus(Step, frozen=True, tag="SetVcpus", rename="camel"):
    """Set the number of vCPUs of the running VM, of its persistent definition (there as hotpluggable), or of both."""

    resource: ClassVar[Resource | None] = "cpu"
    stage: ClassVar[StageName | None] = "plugged"
    count: int
    target: Target | Literal["both"]

    @property
    def follows(self) -> bool:
        return self.target == "config"

    @property
    def changes(self) -> frozenset[Target]:
        return LIVE | CONFIG if self.target == "both" else frozenset({self.target})

    def find_growth(self, facts: Facts, target: Target) -> int:
        definition = facts.find_definition(target)
        return 0 if definition is None else self.count - definition.vcpu_current

    def leaves_offline(self, facts: Facts) -> frozenset[int]:
        """The guest gives a new CPU the lowest number that is free; one that says nothing has numbered all it had."""
        live, listed = facts.domain.live, facts.guest.vcpus
        if self.target == "config" or live is None or self.count <= live.vcpu_current:
            return frozenset()
        taken = set(range(live.vcpu_current)) if listed is None else {cpu.id for cpu in listed}
        free = (n for n in range(len(taken) + self.count) if n not in taken)
        return frozenset(next(free) for _ in range(self.count - live.vcpu_current))


class SetCpuShares(Step, frozen=True, tag="SetCpuShares", rename="camel"):
    """Set the CPU shares of the whole VM, in the running VM or in its persistent definition."""

    resource: ClassVar[Resource | None] = "cpu"
    soft: ClassVar[bool] = True
    shares: int
    target: Target

    @property
    def key(self) -> str:
        return f"{type(self).__name__} {self.target}"

    @property
    def changes(self) -> frozenset[Target]:
        return frozenset({self.target})


class AwaitGuestVcpus(Step, frozen=True, tag="AwaitGuestVcpus", rename="camel"):
    """Wait until the guest lists `added` CPUs besides the `known` ones."""

    resource: ClassVar[Resource | None] = "cpu"
    stage: ClassVar[StageName | None] = "visible"
    soft: ClassVar[bool] = True
    known: tuple[int, ...]
    added: int
    timeout_sec: float


class OnlineGuestVcpus(Step, frozen=True, tag="OnlineGuestVcpus", rename="camel"):
    """Bring CPUs online in the guest through its agent."""

    resource: ClassVar[Resource | None] = "cpu"
    stage: ClassVar[StageName | None] = "online"
    soft: ClassVar[bool] = True
    ids: tuple[int, ...]

    def leaves_offline(self, facts: Facts) -> frozenset[int]:
        return frozenset(self.ids)


class AttachMemory(Step, frozen=True, tag="AttachMemory", rename="camel"):
    """Attach a dimm under a user alias, to the running VM, its persistent definition, or both.

    It has no node in a guest without NUMA cells.
    """

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "plugged"
    alias: str
    size_bytes: int
    node: int | None
    live: bool
    config: bool

    @property
    def changes(self) -> frozenset[Target]:
        return (LIVE if self.live else NOTHING) | (CONFIG if self.config else NOTHING)

    def find_growth(self, facts: Facts, target: Target) -> int:
        return self.size_bytes


class AwaitGuestMemory(Step, frozen=True, tag="AwaitGuestMemory", rename="camel"):
    """Wait until the guest lists these memory blocks."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "visible"
    soft: ClassVar[bool] = True
    blocks: tuple[int, ...]
    timeout_sec: float


class AwaitGuestBlocks(Step, frozen=True, tag="AwaitGuestBlocks", rename="camel"):
    """Wait until the guest lists this many memory blocks in all: with virtio-mem only the guest knows which are new."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "visible"
    soft: ClassVar[bool] = True
    count: int
    timeout_sec: float


class OnlineGuestMemory(Step, frozen=True, tag="OnlineGuestMemory", rename="camel"):
    """Bring memory blocks online in the guest through its agent."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "online"
    soft: ClassVar[bool] = True
    blocks: tuple[int, ...]


class SetBalloon(Step, frozen=True, tag="SetBalloon", rename="camel"):
    """Set the balloon's target in the running VM or in its persistent definition."""

    resource: ClassVar[Resource | None] = "balloon"
    stage: ClassVar[StageName | None] = "plugged"
    size_bytes: int
    target: Target

    @property
    def changes(self) -> frozenset[Target]:
        return frozenset({self.target})

    def find_growth(self, facts: Facts, target: Target) -> int:
        definition = facts.find_definition(target)
        if definition is None:
            return 0
        actual = facts.domain.balloon_bytes if target == "live" else None
        return self.size_bytes - (definition.current_bytes if actual is None else actual)

    @property
    def asks(self) -> str | None:
        return "balloon" if self.target == "live" else None

    @property
    def request(self) -> str:
        return f"{format_size(self.size_bytes)} by balloon"

    def take_back(self, facts: Facts) -> "tuple[AnyStep, ...]":
        actual = None if facts.domain.live is None else facts.domain.balloon_bytes
        return () if actual is None or actual == self.size_bytes else (SetBalloon(size_bytes=actual, target="live"),)


class AwaitBalloon(Step, frozen=True, tag="AwaitBalloon", rename="camel"):
    """Wait until the balloon's actual size has reached the target."""

    resource: ClassVar[Resource | None] = "balloon"
    stage: ClassVar[StageName | None] = "visible"
    soft: ClassVar[bool] = True
    size_bytes: int
    timeout_sec: float

    @property
    def awaits(self) -> str | None:
        return "balloon"


class OfflineGuestVcpus(Step, frozen=True, tag="OfflineGuestVcpus", rename="camel"):
    """Take CPUs offline in the guest through its agent."""

    resource: ClassVar[Resource | None] = "cpu"
    stage: ClassVar[StageName | None] = "online"
    soft: ClassVar[bool] = True
    ids: tuple[int, ...]

    def leaves_offline(self, facts: Facts) -> frozenset[int]:
        return frozenset(self.ids)


class UnplugVcpus(Step, frozen=True, tag="UnplugVcpus", rename="camel"):
    """Reduce the running VM to a number of vCPUs, and wait until the guest has released the others."""

    resource: ClassVar[Resource | None] = "cpu"
    stage: ClassVar[StageName | None] = "plugged"
    soft: ClassVar[bool] = True
    count: int
    timeout_sec: float

    def find_growth(self, facts: Facts, target: Target) -> int:
        live = facts.domain.live
        return 0 if live is None else self.count - live.vcpu_current


class OfflineGuestMemory(Step, frozen=True, tag="OfflineGuestMemory", rename="camel"):
    """Take the memory blocks of one device offline in the guest through its agent."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "online"
    soft: ClassVar[bool] = True
    alias: str
    blocks: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{type(self).__name__} {self.alias}"


class DetachMemory(Step, frozen=True, tag="DetachMemory", rename="camel"):
    """Ask the guest to release a dimm of the running VM, and wait until it does or refuses."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "plugged"
    soft: ClassVar[bool] = True
    alias: str
    timeout_sec: float

    @property
    def key(self) -> str:
        return f"{type(self).__name__} {self.alias}"

    def find_growth(self, facts: Facts, target: Target) -> int:
        device = None if facts.domain.live is None else facts.domain.live.find_device(self.alias)
        return 0 if device is None else -device.plugged_bytes


class ForgetMemory(Step, frozen=True, tag="ForgetMemory", rename="camel"):
    """Remove a dimm from the persistent definition: found by its user alias, else by slot, node and size."""

    resource: ClassVar[Resource | None] = "memory"
    alias: str | None
    slot: int | None
    node: int | None
    size_bytes: int

    @property
    def follows(self) -> bool:
        return True

    @property
    def changes(self) -> frozenset[Target]:
        return CONFIG

    def find_growth(self, facts: Facts, target: Target) -> int:
        return -self.size_bytes


class AttachVirtioMem(Step, frozen=True, tag="AttachVirtioMem", rename="camel"):
    """Attach a virtio-mem device under a user alias, and ask the guest to plug `requested_bytes` of it."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "plugged"
    alias: str
    size_bytes: int
    block_bytes: int
    requested_bytes: int
    node: int | None
    live: bool
    config: bool

    @property
    def changes(self) -> frozenset[Target]:
        return (LIVE if self.live else NOTHING) | (CONFIG if self.config else NOTHING)

    def find_growth(self, facts: Facts, target: Target) -> int:
        return self.requested_bytes

    @property
    def asks(self) -> str | None:
        return self.alias if self.live else None

    @property
    def request(self) -> str:
        return f"{format_size(self.requested_bytes)} of virtio-mem device {self.alias}"

    def take_back(self, facts: Facts) -> "tuple[AnyStep, ...]":
        """The definition, too, was given what was requested."""
        live, config = facts.domain.live, facts.domain.config
        has = None if live is None else live.find_device(self.alias)
        saved = None if config is None else config.find_device(self.alias)
        back = _take_back_request(self, facts)
        if not self.config or has is None or has.current_bytes is None or saved is None:
            return back
        is_saved = saved.requested_bytes == self.requested_bytes != has.current_bytes
        return (*back, _request(self, has.current_bytes, "config")) if is_saved else back


class ResizeVirtioMem(Step, frozen=True, tag="ResizeVirtioMem", rename="camel"):
    """Set the requested size of a virtio-mem device: found by alias, or in the definition by place, node and size."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "plugged"
    alias: str | None
    node: int | None
    size_bytes: int
    requested_bytes: int
    target: Target
    address: str | None = None

    @property
    def changes(self) -> frozenset[Target]:
        return frozenset({self.target})

    def find_growth(self, facts: Facts, target: Target) -> int:
        """Of a device that cannot be told from another, what it is for the one that grows most.

        A request that is lowered lets nothing grow, though the guest had not met it.
        """
        definition = facts.find_definition(target)
        devices = [] if definition is None else self.find_devices(definition)
        lowered = [self.requested_bytes < device.promised_bytes for device in devices]
        added = [self.requested_bytes - device.plugged_bytes for device in devices]
        return max((min(0, a) if low else a for a, low in zip(added, lowered, strict=True)), default=0)

    def find_devices(self, definition: Definition) -> list[MemoryDevice]:
        """Return the device in a definition; several where they cannot be told apart."""
        devices = definition.virtio_mems
        named = [device for device in devices if self.alias is not None and device.alias == self.alias]
        alike = [device for device in devices if (device.node, device.size_bytes) == (self.node, self.size_bytes)]
        placed = [device for device in alike if self.address is not None and device.address == self.address]
        return named or placed or alike

    @property
    def asks(self) -> str | None:
        return self.alias if self.target == "live" else None

    @property
    def request(self) -> str:
        return f"{format_size(self.requested_bytes)} of virtio-mem device {self.alias}"

    def take_back(self, facts: Facts) -> "tuple[AnyStep, ...]":
        return _take_back_request(self, facts)


def _take_back_request(step: AttachVirtioMem | ResizeVirtioMem, facts: Facts) -> "tuple[AnyStep, ...]":
    live = facts.domain.live
    device = None if live is None or step.alias is None else live.find_device(step.alias)
    if device is None or device.current_bytes is None or device.is_settled:
        return ()
    return (_request(step, device.current_bytes, "live"),)


def _request(step: AttachVirtioMem | ResizeVirtioMem, size_bytes: int, target: Target) -> ResizeVirtioMem:
    return ResizeVirtioMem(
        alias=step.alias,
        node=step.node,
        size_bytes=step.size_bytes,
        requested_bytes=size_bytes,
        target=target,
    )


class AwaitVirtioMem(Step, frozen=True, tag="AwaitVirtioMem", rename="camel"):
    """Wait until a virtio-mem device's current size is the requested one."""

    resource: ClassVar[Resource | None] = "memory"
    stage: ClassVar[StageName | None] = "visible"
    soft: ClassVar[bool] = True
    alias: str
    size_bytes: int
    timeout_sec: float

    @property
    def key(self) -> str:
        return f"{type(self).__name__} {self.alias}"

    @property
    def awaits(self) -> str | None:
        return self.alias


class CellShape(msgspec.Struct, frozen=True, rename="camel"):
    """One guest NUMA cell as the persistent definition is to have it."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


class VirtioMemShape(msgspec.Struct, frozen=True, rename="camel"):
    """An empty virtio-mem device for one guest NUMA node: the most that it can give, and what it is resized by."""

    node: int
    size_bytes: int
    block_bytes: int


class Shape(msgspec.Struct, frozen=True, rename="camel"):
    """What the persistent definition must have so that its next start can be hot-plugged; the rest of it stays.

    `topology` (sockets, dies, cores, threads) is None where the definition has none, `max_memory_bytes` where there is
    no room for more memory. There are no `cells` where the machine asks for none, and without `acpi` it stays as it is.
    With `free_page_reporting` the balloon gives back to the host what the guest frees; without, it stays as it is.
    `virtio_mems` are added where their nodes have none.
    """

    vcpu_maximum: int
    topology: tuple[int, int, int, int] | None
    max_memory_bytes: int | None
    slots: int
    cells: tuple[CellShape, ...]
    free_page_reporting: bool = False
    acpi: bool = True
    virtio_mems: tuple[VirtioMemShape, ...] = ()


class DefineShape(Step, frozen=True, tag="DefineShape", rename="camel"):
    """Change the persistent definition to a shape, with a balloon and an agent channel; keep the former one."""

    shape: Shape

    @property
    def changes(self) -> frozenset[Target]:
        return CONFIG


AnyStep = (
    SetVcpus
    | SetCpuShares
    | AwaitGuestVcpus
    | OnlineGuestVcpus
    | AttachMemory
    | AwaitGuestMemory
    | AwaitGuestBlocks
    | OnlineGuestMemory
    | SetBalloon
    | AwaitBalloon
    | OfflineGuestVcpus
    | UnplugVcpus
    | OfflineGuestMemory
    | DetachMemory
    | ForgetMemory
    | AttachVirtioMem
    | ResizeVirtioMem
    | AwaitVirtioMem
    | DefineShape
)
