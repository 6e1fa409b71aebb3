"""The hotplug commands as a ZStack management server sends and reads them: other paths, the same planners.

It may send fields that are not ours; they are ignored. It writes the numbers of a success over its own record, so
they are always there and true. It shows `error` to its user, so that what to do about it is part of the words.
"""

from dataclasses import replace
from typing import Annotated, Any

import msgspec

from kvmagent.model.command import Goal, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.fields import Method, ScaleShares

from .cpu import HOT_PLUG_CPU
from .cpumemory import HOT_PLUG_CPU_MEMORY
from .memory import HOT_PLUG_MEMORY
from .requests import (
    ExpectedCpuNum,
    ExpectedMemorySize,
    HotPlugCpuRequest,
    HotPlugMemoryRequest,
)

# The server's own thread of work, where the request is to be followed step by step; echoed as it came.
ThreadContext = dict[str, Any] | None
ThreadContextStack = list[Any] | None


class IncreaseCpuRequest(HotPlugCpuRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=False):
    """Raise a VM's vCPUs to a total."""

    thread_context: ThreadContext = None
    thread_context_stack: ThreadContextStack = None


class IncreaseMemoryRequest(
    HotPlugMemoryRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=False
):
    """Raise a VM's memory to a total: boot memory and dimms, whatever its balloon holds back."""

    method: Method = "dimm"
    thread_context: ThreadContext = None
    thread_context_stack: ThreadContextStack = None


class ChangeCpuMemoryRequest(VmRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=False):
    """Raise a VM's vCPUs and memory to totals, as older servers request both at once.

    A server that has no number sends 0 or leaves the field out, and waits for the callback.
    """

    cpu_num: Annotated[int, msgspec.Meta(ge=0, le=8192, description="Total number of vCPUs")] | None = None
    memory_size: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1, description="Total memory, bytes")] | None = None
    expected_cpu_num: ExpectedCpuNum = None
    expected_memory_size: ExpectedMemorySize = None
    scale_shares: ScaleShares = False
    thread_context: ThreadContext = None
    thread_context_stack: ThreadContextStack = None


def decide_both(request: ChangeCpuMemoryRequest, facts: Facts, task_uuid: str) -> Goal:
    """Return the goal of a request that has both numbers.

    Raises:
        AgentError: MISSING_FIELD, and what HotPlugCpuMemory is refused with.
    """
    missing = [
        f'"{name}"' for name, number in (("cpuNum", request.cpu_num), ("memorySize", request.memory_size)) if not number
    ]
    if missing:
        raise AgentError(Code.MISSING_FIELD, f"the command has no {' and no '.join(missing)}")
    return HOT_PLUG_CPU_MEMORY.decide(request, facts, task_uuid)


def find_progress_context(request: Any) -> dict[str, Any] | None:
    """Return what the server recognises reports by; of a request without it, it would not know whose progress it is."""
    if request.thread_context is None and request.thread_context_stack is None:
        return None
    return {
        "threadContextMap": request.thread_context or {},
        "threadContextStack": request.thread_context_stack or [],
    }


# What an administrator of ZStack does, where a code's own remedy is for somebody with a shell on the host. Settings by
# category and name. Source: ZStack's VmGlobalConfig, "vm/numa" and "vm/vm.max.vcpu".
_STOP_AND_START = "Change the offering, then stop the VM and start it again: its new start takes the new size."
_NUMA = (
    "The VM was started without online change of CPU and memory: set the global setting vm/numa to true, then stop the "
    "VM and start it again."
)
_HOST = "Migrate the VM to a host with more free memory, or choose a smaller offering."
_PRODUCT = "Stop the VM and start it again with the new offering: this VM takes no more while it runs."
_OWNER = "The VM's owner limits what it may be given while it runs (docs/operate.md of kvmagent, Per-VM limits)."
_REMEDIES: dict[Code, str] = {
    Code.MISSING_FIELD: "Choose an offering with both CPU and memory.",
    Code.VM_NOT_FOUND: "Reconnect the host in ZStack: the VM does not run there.",
    Code.VM_NOT_RUNNING: "Change the offering while the VM is stopped; it takes effect at its start.",
    Code.VM_TRANSIENT: "Stop the VM and start it again from ZStack, then try again.",
    Code.VM_PAUSED: "Resume the VM, then try again.",
    Code.VM_SUSPENDED: "Wake the guest, from its console, then try again.",
    Code.VM_SAVED: "Start the VM, stop it and start it again.",
    Code.VM_MIGRATED: "Stop the VM, choose the offering, and start it again.",
    Code.GUEST_AGENT_FROZEN: "Wait for the VM's backup to end, then try again.",
    Code.LIBVIRT_BUSY: "Wait for the VM's migration, snapshot or backup to end, then try again.",
    Code.CPU_ABOVE_MAXIMUM: "Choose an offering with no more CPUs, or raise the global setting vm/vm.max.vcpu, then "
    "stop the VM and start it again.",
    Code.CPU_ABOVE_HOST_LIMIT: "Lower the global setting vm/vm.max.vcpu, then stop the VM and start it again.",
    Code.CPU_TOPOLOGY_MISMATCH: "Give the VM a CPU topology that fits its CPUs, then stop the VM and start it again.",
    Code.CPU_NOT_WHOLE_CORE: "Choose an offering whose CPUs are a multiple of the threads of one core.",
    Code.CPU_REMOVAL_UNSAFE: _STOP_AND_START,
    Code.CPU_NOT_REMOVABLE: _STOP_AND_START,
    Code.TARGET_BELOW_CURRENT: "To make the VM smaller, stop it, change the offering, and start it.",
    Code.MEMORY_ABOVE_MAXIMUM: _STOP_AND_START,
    Code.SLOTS_EXHAUSTED: "Stop the VM and start it again with the new offering: all of its memory slots are taken.",
    Code.NO_MAX_MEMORY: _NUMA,
    Code.NO_NUMA_CELL: _NUMA,
    Code.NUMA_CELLS_INCOMPLETE: _NUMA,
    Code.NUMA_NODE_NOT_FOUND: _NUMA,
    Code.NO_ACPI: _PRODUCT,
    Code.GUEST_OS_UNABLE: _PRODUCT,
    Code.MACHINE_NOT_SUPPORTED: _PRODUCT,
    Code.MEMORY_DEVICE_MISALIGNED: _PRODUCT,
    Code.MEMORY_ENCRYPTED: _PRODUCT,
    Code.MEMORY_LOCKED: _PRODUCT,
    Code.MEMORY_HARD_LIMIT: _PRODUCT,
    Code.MEMORY_LOCK_LIMIT: _PRODUCT,
    Code.HOST_MEMORY_SHORT: _HOST,
    Code.HOST_MEMORY_PROMISED: _HOST,
    Code.HOST_NODE_MEMORY_SHORT: _HOST,
    Code.HOST_HUGEPAGES_SHORT: _HOST,
    Code.MEMORY_NOT_ALIGNED: "Choose an offering whose memory is a multiple of what the message names.",
    Code.BALLOON_ABOVE_TOTAL: _STOP_AND_START,
    Code.NO_BALLOON: _STOP_AND_START,
    Code.NOT_AS_EXPECTED: "Reconnect the host in ZStack, so that both know the same size, then try again.",
    Code.ABOVE_POLICY: _OWNER,
    Code.VM_OPTED_OUT: _OWNER,
    Code.POLICY_UNREADABLE: _OWNER,
    Code.REFUSED_BY_HOOK: "Do what the hook of the host says, then try again.",
    Code.CANCELLED: "Try again if the change is wanted after all.",
    Code.TASK_UNREADABLE: "Put the plugin vm of the host's kvmagent back into agent.plugins, then try again.",
    Code.DEFINITION_REFUSED: _STOP_AND_START,
    Code.CPU_SHARES_NOT_SET: _STOP_AND_START,
    Code.DRIFT: "Stop the VM and start it again: ZStack then starts it with the offering that it has on record.",
    Code.MEMORY_UNKNOWN_TO_LIBVIRT: "Stop the VM and start it again when that suits.",
}


INCREASE_CPU = replace(
    HOT_PLUG_CPU,
    name="IncreaseCpu",
    subcommand="",
    path="/vm/increase/cpu",
    summary="HotPlugCpu, as a ZStack management server sends it",
    request=IncreaseCpuRequest,
    remedies_in_error=_REMEDIES,
    resizes=None,
    find_progress_context=find_progress_context,
)
INCREASE_MEMORY = replace(
    HOT_PLUG_MEMORY,
    name="IncreaseMemory",
    subcommand="",
    path="/vm/increase/mem",
    summary="HotPlugMemory by dimm, as a ZStack management server sends it",
    request=IncreaseMemoryRequest,
    remedies_in_error=_REMEDIES,
    resizes=None,
    find_progress_context=find_progress_context,
)
CHANGE_CPU_MEMORY = replace(
    HOT_PLUG_CPU_MEMORY,
    name="OnlineChangeCpuMem",
    subcommand="",
    path="/vm/online/changecpumem",
    summary="HotPlugCpuMemory, as a ZStack management server sends it",
    request=ChangeCpuMemoryRequest,
    remedies_in_error=_REMEDIES,
    resizes=None,
    decide=decide_both,
    refusals=(Code.MISSING_FIELD, *HOT_PLUG_CPU_MEMORY.refusals),
    find_progress_context=find_progress_context,
)
