"""The request and reply of a plan: what resizes of a VM would mean. Sizes are bytes."""

from typing import Annotated, Any, Literal

import msgspec

from kvmagent.model.command import Affect, VmName
from kvmagent.model.decoders import prepare_decoder
from kvmagent.model.facts import VmState
from kvmagent.model.fields import CpuNum, DimmSize, GuestNode, MemoryMethod, MemorySize, ScaleShares, Strict
from kvmagent.model.reply import Outcome, Problem

MOST_TARGETS = 64

#: live...: the command would be accepted now. restart: it would be once the VM was powered off and on, prepared first
#: where `prepare` says so. never: neither, as things are.
Verdict = Literal["live", "live-unconfirmed", "live-rounded", "live-partial", "restart", "never"]


class PlanTarget(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True
):
    """Totals to plan for, above or below the current ones, with the fields and defaults of the commands.

    `method`, `node`, `dimmSize` and `strict` apply to memory that is added.
    """

    cpu_num: CpuNum | None = None
    memory_size: MemorySize | None = None
    method: MemoryMethod | None = None
    node: GuestNode | None = None
    dimm_size: DimmSize | None = None
    strict: Strict | None = None
    scale_shares: ScaleShares | None = None
    affect: Affect | None = None
    guest_online: bool | None = None

    def __post_init__(self) -> None:
        if self.cpu_num is None and self.memory_size is None:
            raise ValueError("a target needs cpuNum, memorySize or both")
        of_memory = {"method": self.method, "node": self.node, "dimmSize": self.dimm_size, "strict": self.strict}
        given = [name for name, value in of_memory.items() if value is not None]
        if given and self.memory_size is None:
            raise ValueError(f"{given[0]} is for a target with memorySize")
        if self.scale_shares is not None and self.cpu_num is None:
            raise ValueError("scaleShares is for a target with cpuNum")


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A VM, and the totals to plan for."""

    vm_uuid: VmName
    targets: Annotated[tuple[PlanTarget, ...], msgspec.Meta(min_length=1, max_length=MOST_TARGETS)]


class Reason(Problem, frozen=True, rename="camel", omit_defaults=True):
    """The reason for a verdict, with its remedy."""

    needs_restart: bool = False


class PlannedCommand(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A command to send, and its steps as far as they can be known in advance.

    `diff`: how the persistent XML would change, if the command edits it.
    """

    command: str
    path: str
    request: dict[str, Any]
    steps: list[dict[str, Any]]
    diff: str | None = None


class Reserved(msgspec.Struct, frozen=True, rename="camel"):
    """What a plan needs: memory slots of the running VM, and bytes of host memory, those for QEMU itself included."""

    slots: int
    host_memory: int


class Took(msgspec.Struct, frozen=True, rename="camel"):
    """How long such steps recently took on this host, in milliseconds, and in how many tasks."""

    median_ms: float
    worst_ms: float
    tasks: int


class Plan(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What one target would mean.

    `cpuNum` and `memorySize` are what the VM would have afterwards, null if unchanged or impossible. `outcome` is what
    the command would reply with if all goes well, null if it would be refused. Send `commands` now, or after `prepare`
    and a restart; there are several if no single command does it. `took` is null if fewer than three such tasks are
    known.
    """

    target: PlanTarget
    verdict: Verdict
    outcome: Outcome | None
    cpu_num: int | None
    memory_size: int | None
    reasons: list[Reason]
    commands: list[PlannedCommand]
    prepare: list[PlannedCommand]
    reserved: Reserved
    took: Took | None


class PlanReply(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The plans in the order of their targets, from one observation of the VM. Nothing was changed or reserved."""

    vm_uuid: str
    name: str
    state: VmState
    plans: list[Plan]


prepare_decoder(PlanRequest)
