"""The answers of the GET paths, as on the wire. Times are seconds since the epoch, sizes are bytes."""

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
    """Stands in the list for a VM that could not be read in time."""

    vm_uuid: str
    success: bool
    error: str
    error_code: Code
    remedy: str
    details: dict[str, Any] = {}


class DeliveryState(msgspec.Struct, rename="camel"):
    """How far the delivery of a task's callback has come."""

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
    """Tasks, newest first. `next`: the cursor of the next page, if any."""

    tasks: list[TaskEntry]
    next: str | msgspec.UnsetType = msgspec.UNSET


class WholeTask(TaskEntry, kw_only=True, rename="camel"):
    """Everything known about one task; request, goal and reply have the types of its command."""

    request: dict[str, Any]
    goal: dict[str, Any] | None
    steps: list[dict[str, Any]]
    reply: dict[str, Any] | None


class VmNumbers(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """A VM's vCPUs and memory, and whatever else the task changed; unknown numbers are absent."""

    cpu_num: int | None = None
    memory_size: int | None = None
    max_cpu_num: int | None = None
    max_memory_size: int | None = None
    config_cpu_num: int | None = None
    config_memory_size: int | None = None
    balloon_size: int | None = None


class HistoryEntry(msgspec.Struct, kw_only=True, rename="camel"):
    """A task that changed a VM, or failed to: who, when, what was requested, from what to what.

    `vm` is the VM's name at that time; `caller` is the authenticated sender, `client` its address.
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
    """Changes of a VM, newest first, kept longer than their tasks. `next`: the cursor of the next page, if any."""

    changes: list[HistoryEntry]
    next: str | msgspec.UnsetType = msgspec.UNSET


class RunningTask(msgspec.Struct, rename="camel"):
    """A running task, and for how many seconds it has run."""

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
    """Memory that running VMs do not use, the most first, and the host's budget."""

    host: HostMemory
    vms: list[Reclaimable]


class WhoAmI(msgspec.Struct, rename="camel"):
    """How the agent identifies the caller; `vms`: patterns of the VMs that its roles cover, null for all."""

    caller: str
    client: str
    roles: list[Role]
    vms: list[str] | None
