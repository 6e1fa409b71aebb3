"""The effects that a plan can name. Each has exactly one performer, in hypervisor/performers.py.

A `soft` step asks the guest. When it fails or its time runs out, the task goes on and the reply carries a warning:
a guest that does not answer is no error of the hypervisor's change.
"""

from typing import ClassVar, Literal

import msgspec

Target = Literal["live", "config"]


class Step(msgspec.Struct, frozen=True, tag_field="step", rename="camel"):
    """One effect on one VM."""

    soft: ClassVar[bool] = False


class SetVcpus(Step, frozen=True, tag="SetVcpus", rename="camel"):
    """Set the number of vCPUs, of the running VM or of its persistent definition (there hotpluggable)."""

    count: int
    target: Target


class AwaitGuestVcpus(Step, frozen=True, tag="AwaitGuestVcpus", rename="camel"):
    """Wait until the guest lists `added` CPUs beside the `known` ones."""

    soft: ClassVar[bool] = True
    known: tuple[int, ...]
    added: int
    timeout_sec: float


class OnlineGuestVcpus(Step, frozen=True, tag="OnlineGuestVcpus", rename="camel"):
    """Bring CPUs online in the guest through its agent."""

    soft: ClassVar[bool] = True
    ids: tuple[int, ...]


class AttachMemory(Step, frozen=True, tag="AttachMemory", rename="camel"):
    """Attach a dimm under a user alias, to the running VM, its persistent definition, or both."""

    alias: str
    size_bytes: int
    node: int
    live: bool
    config: bool


class AwaitGuestMemory(Step, frozen=True, tag="AwaitGuestMemory", rename="camel"):
    """Wait until the guest lists these memory blocks."""

    soft: ClassVar[bool] = True
    blocks: tuple[int, ...]
    timeout_sec: float


class OnlineGuestMemory(Step, frozen=True, tag="OnlineGuestMemory", rename="camel"):
    """Bring memory blocks online in the guest through its agent."""

    soft: ClassVar[bool] = True
    blocks: tuple[int, ...]


class SetBalloon(Step, frozen=True, tag="SetBalloon", rename="camel"):
    """Set the balloon's target, of the running VM or of its persistent definition."""

    size_bytes: int
    target: Target


class AwaitBalloon(Step, frozen=True, tag="AwaitBalloon", rename="camel"):
    """Wait until the balloon's actual size reached the target."""

    soft: ClassVar[bool] = True
    size_bytes: int
    timeout_sec: float


AnyStep = (
    SetVcpus
    | AwaitGuestVcpus
    | OnlineGuestVcpus
    | AttachMemory
    | AwaitGuestMemory
    | OnlineGuestMemory
    | SetBalloon
    | AwaitBalloon
)
