"""One function for each step type, which has the effect that the step names on one VM.

A performer ends by returning when the effect is there (with its output, if it has any), or by raising
AgentError. Waiting performers poll until their deadline, or are woken by an event: libvirt has none for what the guest
lists or brings online, older ones none for a removed vCPU.
"""

import contextlib
import math
import queue
import time
from collections.abc import Callable
from typing import Any

from kvmagent.hypervisor.deviceevents import DeviceEvent
from kvmagent.hypervisor.domain import VmHandle
from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.guestagent import CommandRefused
from kvmagent.hypervisor.shapexml import edit_shape, format_diff
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition
from kvmagent.model.steps import (
    AnyStep,
    AttachMemory,
    AttachVirtioMem,
    AwaitBalloon,
    AwaitGuestBlocks,
    AwaitGuestMemory,
    AwaitGuestVcpus,
    AwaitVirtioMem,
    DefineShape,
    DetachMemory,
    ForgetMemory,
    OfflineGuestMemory,
    OfflineGuestVcpus,
    OnlineGuestMemory,
    OnlineGuestVcpus,
    ResizeVirtioMem,
    SetBalloon,
    SetCpuShares,
    SetVcpus,
    UnplugVcpus,
)
from kvmagent.model.units import format_ids, format_size
from kvmagent.recorder import phase

# The guest's kernel lists a new device within tens of milliseconds when it is idle, within seconds when it is busy.
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.5
# Events are lost with a connection: so a waiter polls as well.
_LOOK_WITHOUT_EVENT_S = 1.0


def perform(vm: VmHandle, step: AnyStep) -> str:
    """Perform one step; return its output, mostly empty.

    Raises:
        AgentError: what went wrong; after it nothing is known of the effect: observe again.
    """
    return PERFORMERS[type(step)](vm, step) or ""


def preview(vm: VmHandle, step: AnyStep) -> str:
    """Return the output of a step without performing it: the diff of a definition; nothing of other steps.

    Raises:
        AgentError: when the VM cannot be read; DEFINITION_REFUSED, where libvirt's schema would not let it pass.
    """
    return foresee(vm, step)[0] if isinstance(step, DefineShape) else ""


def foresee(vm: VmHandle, step: DefineShape) -> tuple[str, Definition]:
    """Return the diff of a definition, and what it would be, without making it.

    Raises:
        AgentError: as `preview`.
    """
    former = vm.config_xml()
    edited = edit_shape(former, step.shape)
    vm.check_definition(edited)
    return format_diff(former, edited), parse_definition(edited)


def _set_vcpus(vm: VmHandle, step: SetVcpus) -> None:
    vm.set_vcpus(step.count, step.target)


def _set_cpu_shares(vm: VmHandle, step: SetCpuShares) -> None:
    vm.set_cpu_shares(step.shares, step.target)


def _await_guest_vcpus(vm: VmHandle, step: AwaitGuestVcpus) -> None:
    def is_listed() -> bool:
        listed = vm.agent.vcpus()
        new = [cpu for cpu in listed if cpu.id not in step.known]
        if len(new) > step.added and len(listed) > vm.live_vcpus():
            # It lists all that it may ever have: only their use tells which ones are there.
            new = [cpu for cpu in new if cpu.online]
        return len(new) >= step.added

    if not _wait(is_listed, step.timeout_sec):
        raise AgentError(
            Code.GUEST_CPU_NOT_SEEN,
            f"after {step.timeout_sec:g} s the guest does not list {step.added} CPUs besides {format_ids(step.known)}",
        )


def _online_guest_vcpus(vm: VmHandle, step: OnlineGuestVcpus) -> None:
    try:
        count = vm.agent.online_vcpus(step.ids)
    except CommandRefused as error:
        if error.command in vm.agent.disabled():
            raise
        raise AgentError(
            Code.GUEST_CPU_OFFLINE, f"the guest did not bring CPUs {format_ids(step.ids)} online: {error.words}"
        ) from error
    # A short count is no failure: the next round goes on with the rest.
    if count == 0:
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


def _await_guest_blocks(vm: VmHandle, step: AwaitGuestBlocks) -> None:
    listed = 0

    def are_listed() -> bool:
        nonlocal listed
        listed = len(vm.agent.blocks())
        return listed >= step.count

    if not _wait(are_listed, step.timeout_sec):
        raise AgentError(
            Code.GUEST_MEMORY_NOT_SEEN,
            f"after {step.timeout_sec:g} s the guest lists {listed} memory blocks instead of {step.count}",
        )


def _online_guest_memory(vm: VmHandle, step: OnlineGuestMemory) -> None:
    failed = vm.agent.set_blocks(step.blocks, online=True)
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
        return vm.balloon_bytes() == step.size_bytes

    with vm.watch() as events:
        # QEMU tells of a balloon's changes once a second at most: so a look comes between.
        reached = _wait(is_reached, step.timeout_sec, lambda pause_s: _next_event(events, pause_s))
    if not reached:
        actual = vm.balloon_bytes()
        shown = "unknown" if actual is None else format_size(actual)
        raise AgentError(
            Code.BALLOON_NOT_ANSWERING,
            f"after {step.timeout_sec:g} s the balloon is at {shown} instead of {format_size(step.size_bytes)}",
        )


def _offline_guest_vcpus(vm: VmHandle, step: OfflineGuestVcpus) -> None:
    if vm.agent.offline_vcpus(step.ids) == 0:
        raise AgentError(Code.GUEST_CPU_IN_USE, f"the guest took none of CPUs {format_ids(step.ids)} offline")


def _unplug_vcpus(vm: VmHandle, step: UnplugVcpus) -> None:
    """Ask the guest, and again each time that it has released all that it was asked for, until the time is over."""
    began, quantum = time.monotonic(), vm.vcpu_quantum()
    asked, refused = math.inf, set[str]()
    with vm.watch() as events:
        while (have := vm.live_vcpus()) > step.count:
            left_s = began + step.timeout_sec - time.monotonic()
            if have <= asked and (left_s > 0 or asked == math.inf):
                asked = vm.ask_vcpus_back(step.count, nearest=max(step.count, have - quantum))
            elif have - len(refused) * quantum <= asked < have:
                raise _removal_failure(Code.CPU_REMOVAL_REFUSED, have, asked, step, ", ".join(sorted(refused)))
            elif left_s <= 0:
                code = Code.CPU_REMOVAL_UNFINISHED if have <= asked else Code.CPU_REMOVAL_PENDING
                raise _removal_failure(code, have, asked, step, f"after {step.timeout_sec:g} s")
            else:
                event = _next_event(events, min(left_s, _pause_s(step.timeout_sec - left_s)))
                if event is not None and event.kind == "removal-failed" and event.alias.startswith("vcpu"):
                    refused.add(event.alias)


def _removal_failure(code: Code, have: int, asked: float, step: UnplugVcpus, why: str) -> AgentError:
    begin = f"the guest refused to give up {why}:" if code is Code.CPU_REMOVAL_REFUSED else why
    unasked = int(asked) - step.count
    end = f"; the guest was not asked for {unasked} of them" if unasked else ""
    return AgentError(
        code,
        f"{begin} the VM still has {have} vCPUs instead of {step.count}{end}",
        details={"askedCpuNum": int(asked)} if unasked else {},
    )


def _offline_guest_memory(vm: VmHandle, step: OfflineGuestMemory) -> None:
    failed = vm.agent.set_blocks(step.blocks, online=False)
    if failed:
        words = next(iter(failed.values()))
        raise AgentError(
            Code.GUEST_MEMORY_IN_USE,
            f"the guest did not take memory blocks {format_ids(tuple(failed))} of {step.alias} offline: {words}",
        )


def _detach_memory(vm: VmHandle, step: DetachMemory) -> None:
    deadline = time.monotonic() + step.timeout_sec
    with vm.watch() as events:
        if vm.find_live_device(step.alias) is None:
            return
        vm.request_detach(step.alias)
        while vm.find_live_device(step.alias) is not None:
            if time.monotonic() >= deadline:
                raise AgentError(
                    Code.MEMORY_REMOVAL_PENDING,
                    f"after {step.timeout_sec:g} s the guest has neither given up {step.alias} nor refused",
                )
            event = _await_event(events, deadline)
            if event is not None and event.kind == "removal-failed" and event.alias == step.alias:
                raise AgentError(Code.MEMORY_REMOVAL_REFUSED, f"the guest refused to give up {step.alias}")


def _forget_memory(vm: VmHandle, step: ForgetMemory) -> None:
    vm.forget_memory(alias=step.alias, slot=step.slot, node=step.node, size_bytes=step.size_bytes)


def _attach_virtio_mem(vm: VmHandle, step: AttachVirtioMem) -> None:
    vm.attach_virtio_mem(
        alias=step.alias,
        size_bytes=step.size_bytes,
        block_bytes=step.block_bytes,
        requested_bytes=step.requested_bytes,
        node=step.node,
        live=step.live,
        config=step.config,
    )


def _resize_virtio_mem(vm: VmHandle, step: ResizeVirtioMem) -> None:
    vm.resize_virtio_mem(
        alias=step.alias,
        node=step.node,
        size_bytes=step.size_bytes,
        requested_bytes=step.requested_bytes,
        target=step.target,
        address=step.address,
    )


def _await_virtio_mem(vm: VmHandle, step: AwaitVirtioMem) -> None:
    deadline = time.monotonic() + step.timeout_sec
    with vm.watch() as events:
        while (device := vm.find_live_device(step.alias)) is None or device.current_bytes != step.size_bytes:
            if device is None or time.monotonic() >= deadline:
                shown = "gone" if device is None else f"at {format_size(device.plugged_bytes)}"
                raise AgentError(
                    Code.VIRTIO_MEM_STALLED,
                    f"{step.alias} was set to {format_size(step.size_bytes)}, but after {step.timeout_sec:g} s it is "
                    f"{shown}",
                )
            _await_event(events, deadline)


def _define_shape(vm: VmHandle, step: DefineShape) -> str:
    """The diff is made of what anybody may read, the definition of what has the passwords in it."""
    former = vm.config_xml()
    told = format_diff(former, edit_shape(former, step.shape))
    vm.define(edit_shape(vm.secure_config_xml(), step.shape))
    return told


def _await_event(events: "queue.SimpleQueue[DeviceEvent]", deadline: float) -> DeviceEvent | None:
    """Wait for an event of the guest's, as long as may be without a look."""
    return _next_event(events, min(_LOOK_WITHOUT_EVENT_S, max(0.0, deadline - time.monotonic())))


def _next_event(events: "queue.SimpleQueue[DeviceEvent]", timeout_s: float) -> DeviceEvent | None:
    with phase("guest"), contextlib.suppress(queue.Empty):
        return events.get(timeout=timeout_s)
    return None


def _wait(is_done: Callable[[], bool], timeout_s: float, pause: Callable[[float], object] = time.sleep) -> bool:
    """Look until it is so or the time is over; return whether it is so."""
    began = time.monotonic()
    while not is_done():
        waited_s = time.monotonic() - began
        if waited_s >= timeout_s:
            return False
        with phase("guest"):
            pause(_pause_s(waited_s))
    return True


def _pause_s(waited_s: float) -> float:
    """A tenth of the time waited so far, within bounds: so what took long is not seen much later."""
    return min(max(waited_s / 10, _FIRST_LOOK_S), _LONGEST_LOOK_S)


PERFORMERS: dict[type, Callable[[VmHandle, Any], str | None]] = {
    SetVcpus: _set_vcpus,
    SetCpuShares: _set_cpu_shares,
    AwaitGuestVcpus: _await_guest_vcpus,
    OnlineGuestVcpus: _online_guest_vcpus,
    AttachMemory: _attach_memory,
    AwaitGuestMemory: _await_guest_memory,
    AwaitGuestBlocks: _await_guest_blocks,
    OnlineGuestMemory: _online_guest_memory,
    SetBalloon: _set_balloon,
    AwaitBalloon: _await_balloon,
    OfflineGuestVcpus: _offline_guest_vcpus,
    UnplugVcpus: _unplug_vcpus,
    OfflineGuestMemory: _offline_guest_memory,
    DetachMemory: _detach_memory,
    ForgetMemory: _forget_memory,
    AttachVirtioMem: _attach_virtio_mem,
    ResizeVirtioMem: _resize_virtio_mem,
    AwaitVirtioMem: _await_virtio_mem,
    DefineShape: _define_shape,
}
