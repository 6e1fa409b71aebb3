"""One function for each step type: the effect that the step names, on one VM.

A performer ends by returning when the effect is there, or by raising AgentError. Waiting performers look until their
deadline: libvirt has no event for what the guest lists, nor for what it brings online.
"""

import time
from collections.abc import Callable
from typing import Any

from kvmagent.hypervisor.domain import VmHandle
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.steps import (
    AnyStep,
    AttachMemory,
    AwaitBalloon,
    AwaitGuestMemory,
    AwaitGuestVcpus,
    OnlineGuestMemory,
    OnlineGuestVcpus,
    SetBalloon,
    SetVcpus,
)
from kvmagent.model.units import format_ids, format_size

# The guest's kernel lists a new device within tens of milliseconds when it is idle, within seconds when it is busy.
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.5


def perform(vm: VmHandle, step: AnyStep) -> None:
    """Perform one step.

    Raises:
        AgentError: what went wrong; after it nothing is known of the effect: observe again.
    """
    PERFORMERS[type(step)](vm, step)


def _set_vcpus(vm: VmHandle, step: SetVcpus) -> None:
    vm.set_vcpus(step.count, step.target)


def _await_guest_vcpus(vm: VmHandle, step: AwaitGuestVcpus) -> None:
    def is_listed() -> bool:
        return len({cpu.id for cpu in vm.agent.vcpus()} - set(step.known)) >= step.added

    if not _wait(is_listed, step.timeout_sec):
        raise AgentError(
            Code.GUEST_CPU_NOT_SEEN,
            f"after {step.timeout_sec:g} s the guest does not list {step.added} CPUs beside {format_ids(step.known)}",
        )


def _online_guest_vcpus(vm: VmHandle, step: OnlineGuestVcpus) -> None:
    # A short count is no failure: the next round goes on with the rest.
    if vm.agent.online_vcpus(step.ids) == 0:
        raise AgentError(Code.GUEST_CPU_OFFLINE, f"the guest brought none of CPUs {format_ids(step.ids)} online")


def _attach_memory(vm: VmHandle, step: AttachMemory) -> None:
    vm.attach_dimm(alias=step.alias, size_bytes=step.size_bytes, node=step.node, live=step.live, config=step.config)


def _await_guest_memory(vm: VmHandle, step: AwaitGuestMemory) -> None:
    wanted = set(step.blocks)

    def is_listed() -> bool:
        return wanted <= {block.index for block in vm.agent.blocks()}

    if not _wait(is_listed, step.timeout_sec):
        raise AgentError(
            Code.GUEST_MEMORY_NOT_SEEN,
            f"after {step.timeout_sec:g} s the guest does not list memory blocks {format_ids(step.blocks)}",
        )


def _online_guest_memory(vm: VmHandle, step: OnlineGuestMemory) -> None:
    failed = vm.agent.online_blocks(step.blocks)
    if failed:
        words = next(iter(failed.values()))
        raise AgentError(
            Code.GUEST_MEMORY_OFFLINE,
            f"the guest did not bring memory blocks {format_ids(tuple(failed))} online: {words}",
        )


def _set_balloon(vm: VmHandle, step: SetBalloon) -> None:
    vm.set_balloon(step.size_bytes, step.target)


def _await_balloon(vm: VmHandle, step: AwaitBalloon) -> None:
    def is_reached() -> bool:
        return (vm.balloon_bytes() or 0) >= step.size_bytes

    if not _wait(is_reached, step.timeout_sec):
        actual = vm.balloon_bytes()
        shown = "unknown" if actual is None else format_size(actual)
        raise AgentError(
            Code.BALLOON_NOT_ANSWERING,
            f"after {step.timeout_sec:g} s the balloon is at {shown}, asked for {format_size(step.size_bytes)}",
        )


def _wait(is_done: Callable[[], bool], timeout_s: float) -> bool:
    """Look until it is so or the time is over, at growing intervals; return whether it is so."""
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_LOOK_S
    while not is_done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_LOOK_S)
    return True


PERFORMERS: dict[type, Callable[[VmHandle, Any], None]] = {
    SetVcpus: _set_vcpus,
    AwaitGuestVcpus: _await_guest_vcpus,
    OnlineGuestVcpus: _online_guest_vcpus,
    AttachMemory: _attach_memory,
    AwaitGuestMemory: _await_guest_memory,
    OnlineGuestMemory: _online_guest_memory,
    SetBalloon: _set_balloon,
    AwaitBalloon: _await_balloon,
}
