"""What is known about the compute node, and the queries about it that a plugin answers.

A `Query` asks the host, not a VM: it changes nothing but what the agent remembers of its management server.
`None` means unknown. Sizes are bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from kvmagent.model.decoders import prepare_decoder
from kvmagent.model.facts import VmState
from kvmagent.model.roles import Role, check_role


class VmSummary(msgspec.Struct, frozen=True):
    """One VM of the host, as a list of VMs shows it.

    `in_shutdown`: it is on its way down, or reboots that way; until it is off its QEMU has its disks.
    """

    name: str
    uuid: str
    state: VmState
    vcpus: int
    memory_bytes: int
    in_shutdown: bool = False


class VmStats(msgspec.Struct, frozen=True):
    """One running VM, as libvirt reports many at once; None for what it does not report.

    `run` differs after each start. `promised_bytes` is what it may have of the host's memory, `resident_bytes` what its
    QEMU has.
    """

    uuid: str
    name: str
    run: int
    vcpus: int | None
    max_vcpus: int | None
    balloon_bytes: int | None
    promised_bytes: int | None = None
    resident_bytes: int | None = None


class ManagementServer(msgspec.Struct, frozen=True):
    """What the management server told of itself and of this host when it connected; remembered over a restart.

    `client` is the address that it came from: it may have reports sent to where its callbacks may go.
    """

    host_uuid: str
    send_command_url: str
    version: str | None = None
    client: str = ""


class HostInventory(msgspec.Struct, frozen=True, kw_only=True):
    """The compute node.

    `cpu_mhz` is the nominal clock; `cpu_caches_kib` what the levels 1, 2 and 3 have in all. `hvm_flag` is vmx, svm, or
    vt on aarch64. `up_since` is local time, in seconds. `firmware` has libvirt's names: system_serial, bios_date.
    """

    libvirt_version: str
    hypervisor_version: str
    qemu_img_version: str | None
    arch: str
    cpu_model: str | None
    cpu_model_of_libvirt: str | None
    cpu_mhz: int | None
    cpu_caches_kib: tuple[int, int, int] | None
    cpus: int
    cpu_sockets: int
    cpu_cores: int
    cpu_threads_per_core: int
    hvm_flag: str | None
    has_ept: bool
    memory_total_bytes: int
    memory_slots: int | None
    os_name: str | None
    os_version: str | None
    os_release: str | None
    up_since: str | None
    firmware: dict[str, str]
    addresses: tuple[str, ...]
    hostname: str


class HostLoad(msgspec.Struct, frozen=True, rename="camel"):
    """What the compute node has free, in bytes; `load` is its load average over the last minute."""

    name: str
    cpus: int | None
    load: float | None
    memory_total: int | None
    memory_available: int | None


class HostMemory(msgspec.Struct, frozen=True, rename="camel"):
    """The host's memory as a budget, in bytes: (physical - hugepages - reserve) x overcommit = budget.

    `promised`: what running VMs may use; `reserved`: the part of it that running tasks are about to plug; `resident`:
    what the VMs' QEMU processes use now. `over_since`: since when `promised` has exceeded the budget, in seconds since
    the epoch; None if it does not. `budget_from`: that calculation in words, or the limit of machine.slice if lower.
    """

    physical: int
    reserve: int
    overcommit: float
    hugepages: int
    budget: int
    promised: int
    reserved: int
    resident: int
    over_since: float | None
    budget_from: str = ""


class HostView(msgspec.Struct, frozen=True):
    """What a query may look at: the parts that it declared in `needs`, the others None."""

    server: ManagementServer | None = None
    host: HostInventory | None = None
    vms: tuple[VmSummary, ...] | None = None


@dataclass(frozen=True)
class Query:
    """One query about the host, declared once. A `sync` one is answered in the HTTP answer itself, without a task.

    `remember` returns what the agent is to know of its management server from this request on; it comes before the
    look at the host. `needs` names what to look at: "host", "vms", "settled vms" (the VMs, and those that are paused
    again a moment later). `notice` returns what the operator is told, each once, of such a request. `fail` makes the
    reply of a look that failed. `role` is what its caller needs.
    """

    name: str
    path: str
    summary: str
    request: type[msgspec.Struct]
    reply: type[msgspec.Struct]
    needs: frozenset[str]
    answer: Callable[[Any, HostView], msgspec.Struct]
    fail: Callable[[str], msgspec.Struct]
    role: Role
    sync: bool = False
    remember: Callable[[Any, ManagementServer | None], ManagementServer | None] = lambda _request, _known: None
    notice: Callable[[Any], tuple[str, ...]] = lambda _request: ()

    def __post_init__(self) -> None:
        check_role(self.name, self.role)
        prepare_decoder(self.request)


class Report(msgspec.Struct, frozen=True):
    """A report to the management server without a request: the path that handles it, and its body.

    `optional`: not every version of the server has a handler for it; its 404 says so and is no failure.
    """

    command_path: str
    body: dict[str, Any]
    optional: bool = False


VmEventKind = Literal["started", "shutdown", "stopped", "crashed", "paused", "resumed", "rebooted"]


class VmEvent(msgspec.Struct, frozen=True):
    """Something that happened to a VM.

    shutdown: the guest has powered off, its QEMU is still there; stopped: QEMU is gone, whatever the reason;
    crashed: the guest reported a panic. `detail` says who wanted a shutdown: guest, host, or empty.
    """

    name: str
    uuid: str
    kind: VmEventKind
    detail: str = ""


class Progress(msgspec.Struct, frozen=True):
    """How far a task has come: `percent` of the steps that are known of, and the step that begins.

    `context` is what the request carried for its progress to be recognised by.
    """

    command: str
    vm: str
    percent: int
    step: str
    context: dict[str, Any]
