"""What the reads answer, as the wire has it. Times are seconds since the epoch, sizes are bytes."""

from typing import Any, NamedTuple

import msgspec

from kvmagent.model.errors import Code
from kvmagent.model.host import HostLoad, HostMemory
from kvmagent.model.reclaim import Reclaimable
from kvmagent.model.roles import Role
from kvmagent.tasks.journal import State

#: The version of the contract: within one nothing is removed and nothing narrowed.
API_VERSION = "1"


class Extension(NamedTuple):
    """Something that was added to the contract: its name in /healthz, what it is, and the paths, query parameters and
    request fields that came with it, which an older agent refuses.
    """

    name: str
    words: str
    adds: tuple[str, ...]


#: What was added since version 1 was frozen, in order; a client asks for what it needs.
EXTENSIONS = (
    Extension(
        "prepare_memory_device",
        "ReadyForHotplug prepares dimms or a virtio-mem device.",
        ("POST /vm/hotplug/ready memoryDevice",),
    ),
    Extension(
        "task_search",
        "/tasks can be searched by outcome, caller, time and the beginning of the id.",
        ("GET /tasks ?outcome", "GET /tasks ?caller", "GET /tasks ?since", "GET /tasks ?until", "GET /tasks ?id"),
    ),
    Extension("vm_history", "The changes of a VM, kept longer than its tasks.", ("GET /vms/{vmUuid}/history",)),
    Extension(
        "list_pages",
        "Lists can be read by pages and fields, and have an ETag.",
        ("GET /vms ?limit", "GET /vms ?cursor", "GET /vms ?fields", "GET /tasks ?cursor", "GET /tasks ?fields"),
    ),
    Extension("guest_fell_silent", "guestFellSilent of a VM: its guest agent answered before, but no longer does.", ()),
)


class UnreadableVm(msgspec.Struct, kw_only=True, rename="camel"):
    """A VM that could not be read in time, in its place in the list."""

    vm_uuid: str
    success: bool
    error: str
    error_code: Code
    remedy: str
    details: dict[str, Any] = {}


class DeliveryState(msgspec.Struct, rename="camel"):
    """How the callback of a task is doing."""

    url: str
    attempts: int
    error: str | None


class TaskEntry(msgspec.Struct, kw_only=True, rename="camel"):
    """A task as a list shows it."""

    task_uuid: str
    command: str
    vm: str
    state: State
    outcome: str | None
    error: str | None
    error_code: str | None
    remedy: str | None
    accepted_at: float
    started_at: float | None
    finished_at: float | None
    client: str
    caller: str
    vm_uuid: str | None
    delivery: DeliveryState


class TaskList(msgspec.Struct, rename="camel"):
    """Tasks, newest first; `next` is the cursor of those that follow, where there are more."""

    tasks: list[TaskEntry]
    next: str | msgspec.UnsetType = msgspec.UNSET


class WholeTask(TaskEntry, kw_only=True, rename="camel"):
    """All that is known of one task: request, goal and reply are its command's own."""

    request: dict[str, Any]
    goal: dict[str, Any] | None
    steps: list[dict[str, Any]]
    reply: dict[str, Any] | None


class VmNumbers(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """What a VM had: its vCPUs and memory, and what else a task changed; a number that is not known is left out."""

    cpu_num: int | None = None
    memory_size: int | None = None
    max_cpu_num: int | None = None
    max_memory_size: int | None = None
    config_cpu_num: int | None = None
    config_memory_size: int | None = None
    balloon_size: int | None = None


class HistoryEntry(msgspec.Struct, kw_only=True, rename="camel"):
    """A task that changed a VM, or failed to: who, when, what was asked, from what to what.

    `vm` is what the VM was called then; `caller` is who proved to have sent it, `client` from where.
    """

    task_uuid: str
    vm: str
    vm_uuid: str
    command: str
    caller: str
    client: str
    accepted_at: float
    finished_at: float
    outcome: str
    error_code: str | None
    asked: VmNumbers
    before: VmNumbers
    after: VmNumbers


class History(msgspec.Struct, rename="camel"):
    """What changed a VM, newest first; entries stay for longer than their tasks. `next` is as that of tasks."""

    changes: list[HistoryEntry]
    next: str | msgspec.UnsetType = msgspec.UNSET


class RunningTask(msgspec.Struct, rename="camel"):
    """A task that runs now, and for how many seconds."""

    vm: str
    task_uuid: str
    command: str
    seconds: float


class Health(msgspec.Struct, kw_only=True, rename="camel"):
    """Whether the agent is ready; `down` names the parts that are not, each with the reason."""

    ready: bool
    down: dict[str, str]
    version: str
    api_version: str
    extensions: list[str]
    host: HostLoad
    memory: HostMemory | None
    running: list[RunningTask]
    queued: int
    owed_callbacks: int


class ReclaimableMemory(msgspec.Struct, rename="camel"):
    """What running VMs do not use, most first, beside the host's budget."""

    host: HostMemory
    vms: list[Reclaimable]


class WhoAmI(msgspec.Struct, rename="camel"):
    """Who the caller is to the agent; `vms` are the patterns of those that its roles are for, null: all."""

    caller: str
    client: str
    roles: list[Role]
    vms: list[str] | None
