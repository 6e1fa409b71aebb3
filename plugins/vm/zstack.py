"""The hotplug commands as a ZStack management server sends and reads them: other paths, the same planners.

It may send fields that are not ours; they are ignored. It writes the numbers of a success over its own record, so
they are always there and true. It shows `error` to its user, so that what to do about it is part of the words.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from kvmagent.model.command import Ending

from .cpu import HOT_PLUG_CPU
from .cpumemory import HOT_PLUG_CPU_MEMORY
from .memory import HOT_PLUG_MEMORY
from .requests import HotPlugCpuMemoryRequest, HotPlugCpuRequest, HotPlugMemoryRequest, Method, VmReply

# The server's own thread of work, where the request is to be followed step by step; echoed as it came.
ThreadContext = dict[str, Any] | None
ThreadContextStack = list[Any] | None


class IncreaseCpuRequest(HotPlugCpuRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=False):
    """Bring a VM up to a number of vCPUs."""

    thread_context: ThreadContext = None
    thread_context_stack: ThreadContextStack = None


class IncreaseMemoryRequest(
    HotPlugMemoryRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=False
):
    """Bring a VM up to an amount of memory: boot memory and dimms, whatever its balloon holds back."""

    method: Method = "dimm"
    thread_context: ThreadContext = None
    thread_context_stack: ThreadContextStack = None


class ChangeCpuMemoryRequest(
    HotPlugCpuMemoryRequest, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=False
):
    """Bring a VM up to a number of vCPUs and an amount of memory, as older servers ask for both at once."""

    thread_context: ThreadContext = None
    thread_context_stack: ThreadContextStack = None


def find_progress_context(request: Any) -> dict[str, Any] | None:
    """Return what the server recognises reports by; of a request without it, it would not know whose progress it is."""
    if request.thread_context is None and request.thread_context_stack is None:
        return None
    return {
        "threadContextMap": request.thread_context or {},
        "threadContextStack": request.thread_context_stack or [],
    }


def in_its_words(conclude: Callable[[Ending], msgspec.Struct]) -> Callable[[Ending], msgspec.Struct]:
    """Return a `conclude` whose `error` says what to do as well."""

    def conclude_in_its_words(ending: Ending) -> msgspec.Struct:
        reply = conclude(ending)
        if isinstance(reply, VmReply) and reply.error and reply.remedy:
            reply.error = f"{reply.error}. {reply.remedy}"
        return reply

    return conclude_in_its_words


INCREASE_CPU = replace(
    HOT_PLUG_CPU,
    name="IncreaseCpu",
    subcommand="",
    path="/vm/increase/cpu",
    summary="HotPlugCpu, as a ZStack management server sends it",
    request=IncreaseCpuRequest,
    conclude=in_its_words(HOT_PLUG_CPU.conclude),
    find_progress_context=find_progress_context,
)
INCREASE_MEMORY = replace(
    HOT_PLUG_MEMORY,
    name="IncreaseMemory",
    subcommand="",
    path="/vm/increase/mem",
    summary="HotPlugMemory by dimm, as a ZStack management server sends it",
    request=IncreaseMemoryRequest,
    conclude=in_its_words(HOT_PLUG_MEMORY.conclude),
    find_progress_context=find_progress_context,
)
CHANGE_CPU_MEMORY = replace(
    HOT_PLUG_CPU_MEMORY,
    name="OnlineChangeCpuMem",
    subcommand="",
    path="/vm/online/changecpumem",
    summary="HotPlugCpuMemory, as a ZStack management server sends it",
    request=ChangeCpuMemoryRequest,
    conclude=in_its_words(HOT_PLUG_CPU_MEMORY.conclude),
    find_progress_context=find_progress_context,
)
