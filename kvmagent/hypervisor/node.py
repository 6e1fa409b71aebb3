"""The compute node for tasks: observe a VM, perform a step on it, list the VMs."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import libvirt
import libvirt_qemu
import msgspec

from kvmagent.hypervisor.budget import Budget, BudgetView
from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.definitions import Definitions
from kvmagent.hypervisor.deviceevents import DeviceEvents
from kvmagent.hypervisor.domain import Means, VmHandle, find_vm
from kvmagent.hypervisor.domainxml import parse_vcpu_limit
from kvmagent.hypervisor.guestagent import Send
from kvmagent.hypervisor.host import read_boot_id, read_host, read_host_load
from kvmagent.hypervisor.hostfacts import list_vms, read_host_facts, read_stats
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.hypervisor.migrations import Migrations
from kvmagent.hypervisor.performers import foresee, perform, preview
from kvmagent.hypervisor.qemumemory import AskQemu
from kvmagent.hypervisor.qemuprocess import find_pid, read_memlock_bytes
from kvmagent.hypervisor.restartmemory import RestartMemory
from kvmagent.hypervisor.schema import DOMAIN_SCHEMA, has_schema
from kvmagent.hypervisor.silentguests import SilentGuests
from kvmagent.hypervisor.vmnames import VmNames
from kvmagent.model.command import Reservation
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Host
from kvmagent.model.host import HostLoad, HostMemory, HostView, VmStats
from kvmagent.model.reclaim import Reclaimable, find_reclaimable
from kvmagent.model.steps import AnyStep, AttachMemory, DefineShape
from kvmagent.recorder import Recorder, phase

# Source: libvirt 9.5 stopped to count virtio-mem among the slots; 10.10 adds an IOMMU with EIM when a VM of more than
# 255 vCPUs is defined. Observed: libvirt 11.3 and 12.8.
_VIRTIO_MEM_WITHOUT_SLOTS, _ADDS_IOMMU = 9_005_000, 10_010_000
# Looks that come so close together are one look at the host's memory: a list of VMs is many looks.
_SAME_LOOK_S = 0.05
_VMS = frozenset({"vms", "settled vms"})


class Node:
    """Thread-safe. A VM is named by its domain name or UUID, with or without dashes.

    `events` are what an EventConnection reports. `former_xml_dir` is where definitions that are replaced are kept,
    `host_root` where the kernel's files of the host are, `domain_schema` what a dry run is held against.
    `removes_emulated`: see Host. `restarts` remembers since when VMs wait for one, `migrations` which came by one,
    `definitions` what was parsed of each.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        events: DeviceEvents,
        former_xml_dir: Path,
        send_to_agent: Send = libvirt_qemu.qemuAgentCommand,
        ask_qemu: AskQemu = libvirt_qemu.qemuMonitorCommand,
        host_root: Path = Path("/"),
        budget: Budget | None = None,
        recorder: Recorder | None = None,
        domain_schema: Path = DOMAIN_SCHEMA,
        removes_emulated: bool = False,
        restarts: RestartMemory | None = None,
        migrations: Migrations | None = None,
        definitions: Definitions | None = None,
    ) -> None:
        #: The names of the VMs that were seen.
        self.names = VmNames()
        self._restarts = restarts
        self._connection = connection
        self._removes_emulated = removes_emulated
        self._recorder = recorder or Recorder()
        self._definitions = definitions or Definitions()
        self._means = Means(
            send_to_agent=send_to_agent,
            ask_qemu=ask_qemu,
            suspects=set(),
            events=events,
            former_xml_dir=former_xml_dir,
            recorder=self._recorder,
            domain_schema=domain_schema,
            definitions=self._definitions,
        )
        self._host_root = host_root
        self._budget = budget or Budget(host_root=host_root, definitions=self._definitions)
        self._versions: WeakKeyDictionary[libvirt.virConnect, int] = WeakKeyDictionary()
        self._vcpu_limits: dict[tuple[str, str, str], int | None] = {}
        self._host: tuple[float, Host | None] = (0.0, None)
        self._migrations = migrations or Migrations(host_root=host_root)
        self._silent_guests = SilentGuests()

    def check(self) -> None:
        """Prove that libvirt answers.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE.
        """
        with self._connection.lease() as connection, libvirt_errors("asking libvirt for its version"):
            connection.getLibVersion()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until libvirt is not known to be away; return whether it is so."""
        return self._connection.wait_connected(timeout_s)

    def list_vms(self) -> list[str]:
        """Return the UUIDs of all VMs of this host, running or not."""
        # Before the look: what comes meanwhile is not in the list, and is there.
        memories = (self._migrations, self._restarts, self._silent_guests, self._definitions)
        known = [(memory, memory.known()) for memory in memories if memory is not None]
        with self._connection.lease() as connection, libvirt_errors("listing VMs"):
            domains = connection.listAllDomains()
            for domain in domains:
                self.names.note(domain.UUIDString(), domain.name())
            uuids = [domain.UUIDString() for domain in domains]
        for memory, of_vms in known:
            memory.forget(of_vms.difference(uuids))
        return uuids

    def check_vm(self, vm: str) -> None:
        """Prove that a VM is there.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self.open_vm(vm):
            return

    def read_stats(self) -> tuple[VmStats, ...]:
        """Return what libvirt reports on all running VMs in one call, and what each may have of the host's memory."""
        with self._connection.lease() as connection:
            promises = self._budget.view(connection).promises
            stats = read_stats(connection)
        for vm in stats:
            self.names.note(vm.uuid, vm.name)
        return tuple(
            msgspec.structs.replace(vm, promised_bytes=promise.size_bytes, resident_bytes=promise.resident_bytes)
            if (promise := promises.get(vm.uuid)) is not None
            else vm
            for vm in stats
        )

    def last_budget(self) -> HostMemory | None:
        """Return the host's memory budget as it was seen last; asks nobody."""
        return None if self._budget.last is None else self._budget.last.host

    def find_reclaimable(self, vm: str) -> Reclaimable:
        """Return what could come back of a running VM, of which its guest is asked.

        Raises:
            AgentError: VM_NOT_FOUND; VM_NOT_RUNNING; libvirt's errors.
        """
        facts = self.observe(vm, frozenset({"memory"}))
        promise = self.view_budget().promises.get(facts.domain.uuid)
        return find_reclaimable(
            facts,
            promised_bytes=promise.size_bytes if promise else 0,
            resident_bytes=promise.resident_bytes if promise else None,
        )

    def view_budget(self) -> BudgetView:
        """Return the host's memory budget.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self._connection.lease() as connection:
            return self._budget.view(connection)

    def recall_reservation(self, task_uuid: str, uuid: str, reservation: Reservation) -> None:
        """Take up what a task of an earlier agent had reserved; before any task runs."""
        self._budget.recall(task_uuid, uuid, reservation)

    def release(self, task_uuid: str) -> None:
        """Free the memory that a task has reserved."""
        self._budget.release(task_uuid)

    def read_load(self) -> HostLoad:
        """Return what the host has left, which its kernel tells without libvirt."""
        return read_host_load(self._host_root)

    def view_host(self, needs: frozenset[str]) -> HostView:
        """Return what is so of the host now; `needs` ("host", "vms", "settled vms") is what to look at.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        if not needs:
            return HostView()
        with self._connection.lease() as connection:
            return HostView(
                host=read_host_facts(connection) if "host" in needs else None,
                vms=list_vms(connection, reread_paused="settled vms" in needs) if needs & _VMS else None,
            )

    @contextmanager
    def open_vm(self, vm: str) -> Iterator["OpenVm"]:
        """Have a VM for a piece of work: looked up once, on a connection of its own.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with ExitStack() as stack:
            with phase("libvirt"):
                connection = stack.enter_context(self._connection.lease())
                handle = find_vm(connection, vm, self._means)
            yield OpenVm(
                handle,
                lambda parts, ask_job, done: self._observe(connection, handle, parts, ask_job=ask_job, done=done),
                lambda task_uuid, reservation: self._budget.reserve(connection, task_uuid, handle.uuid, reservation),
                lambda: self._budget.note_change(handle.uuid),
            )

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now, to who does nothing else with the VM; see OpenVm.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self.open_vm(vm) as held:
            return held.observe(parts)

    def perform(self, vm: str, step: AnyStep) -> str:
        """Perform one step, for who does nothing else with the VM; see OpenVm.

        Raises:
            AgentError: what went wrong; what is so after it must be observed.
        """
        with self.open_vm(vm) as held:
            return held.perform(step)

    def _observe(
        self,
        connection: libvirt.virConnect,
        handle: VmHandle,
        parts: frozenset[str],
        *,
        ask_job: bool,
        done: AnyStep | None,
    ) -> Facts:
        """Return what is so of a VM, of its guest and of its host; `done` is the step that has just had its effect."""
        begun = self._budget.begin()
        domain, connected = handle.read(
            ask_balloon="memory" in parts,
            ask_target="balloon target" in parts,
            ask_job=ask_job,
            is_balloon_told=isinstance(done, AttachMemory) and done.live,
        )
        guest = handle.ask_guest(domain, connected, parts)
        self.names.note(domain.uuid, domain.name)
        limit = self._vcpu_limit(connection, domain.live or domain.config)
        if "memory" in parts:
            host = self._read_host()
            domain = self._with_memlock(domain)
        else:
            host = Host(boot_id=read_boot_id(self._host_root))
        version = self._find_version(connection)
        host = msgspec.structs.replace(
            host,
            vcpu_limit=limit,
            removes_emulated=self._removes_emulated,
            virtio_mem_takes_slots=version < _VIRTIO_MEM_WITHOUT_SLOTS,
            adds_iommu=version >= _ADDS_IOMMU,
        )
        facts = Facts(domain=domain, guest=guest, host=host)
        domain = msgspec.structs.replace(domain, migrated=self._migrations.note(connection, facts))
        facts = msgspec.structs.replace(facts, domain=domain, fell_silent=self._silent_guests.note(facts))
        self._budget.note(facts, begun)
        if "budget" in parts:
            pools = self._budget.look(connection, domain)
            facts = msgspec.structs.replace(facts, host=msgspec.structs.replace(host, pools=pools))
        self._recorder.observed(facts)
        if self._restarts is not None:
            facts = msgspec.structs.replace(facts, restart_since=self._restarts.note(facts))
        return facts

    def _read_host(self) -> Host:
        looked_at, host = self._host
        if host is None or time.monotonic() - looked_at > _SAME_LOOK_S:
            host = read_host(None, self._host_root)
            self._host = time.monotonic(), host
        return msgspec.structs.replace(
            host,
            libvirt_is_privileged=self._connection.is_privileged,
            has_domain_schema=has_schema(self._means.domain_schema),
        )

    def _with_memlock(self, domain: Domain) -> Domain:
        """Return the domain with what its process may lock: looked up where memory is locked, by VFIO or by wish."""
        if domain.live is None or not (domain.live.vfio_devices or domain.live.locked):
            return domain
        pid = find_pid(self._host_root, domain.uuid)
        limit = None if pid is None else read_memlock_bytes(self._host_root, pid)
        return msgspec.structs.replace(domain, memlock_bytes=limit)

    def _find_version(self, connection: libvirt.virConnect) -> int:
        """Return the version of the libvirt at the end of a connection, which ends with it: it is asked once."""
        if (version := self._versions.get(connection)) is None:
            version = self._versions[connection] = connection.getLibVersion()
        return version

    def _vcpu_limit(self, connection: libvirt.virConnect, definition: Definition | None) -> int | None:
        """Return the most vCPUs of a machine type, read once; None if it is not known."""
        if definition is None:
            return None
        key = (definition.arch, definition.machine, definition.hypervisor)
        if key not in self._vcpu_limits:
            try:
                limits = [parse_vcpu_limit(connection.getDomainCapabilities(None, *key, 0))]
                if definition.hypervisor == "kvm":
                    limits.append(connection.getMaxVcpus("kvm"))
                self._vcpu_limits[key] = min((limit for limit in limits if limit), default=None)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                    return None
                self._vcpu_limits[key] = None
        return self._vcpu_limits[key]


class OpenVm:
    """One VM as a task sees it while it works on it, by one thread.

    `observe` returns what is so of the VM and of the parts that are asked for, after the step that was done last; if
    told to, also the job that excludes changes: nobody decides about that after the first step. `reserve` reserves
    memory of the host for a task, and `note_change` is called after each step.
    """

    def __init__(
        self,
        handle: VmHandle,
        observe: Callable[[frozenset[str], bool, AnyStep | None], Facts],
        reserve: Callable[[str, Reservation], None],
        note_change: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._observe = observe
        self._reserve = reserve
        self._note_change = note_change
        self._is_changed = False
        self._done: AnyStep | None = None

    @property
    def uuid(self) -> str:
        """The VM's UUID, which is the same whatever form it was named in."""
        return self._handle.uuid

    def observe(self, parts: frozenset[str]) -> Facts:
        """Return what is so now; `parts` ("cpus", "memory", "agent", "os") is what to ask the guest itself.

        The host's memory is observed if the guest's is, "budget" and "balloon target" as they are asked for.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with phase("libvirt"):
            return self._observe(parts, not self._is_changed, self._done)

    def reserve(self, task_uuid: str, reservation: Reservation) -> None:
        """Reserve what of the host's memory a task may bring the running VM to, until `release`.

        Raises:
            AgentError: HOST_MEMORY_PROMISED, MEMORY_HARD_LIMIT; libvirt's errors.
        """
        with phase("libvirt"):
            self._reserve(task_uuid, reservation)

    def perform(self, step: AnyStep) -> str:
        """Perform one step; return its output, mostly empty.

        Raises:
            AgentError: what went wrong; what is so after it must be observed.
        """
        self._is_changed, self._done = True, None
        with phase("libvirt"):
            try:
                output = perform(self._handle, step)
                self._done = step
                return output
            except AgentError as error:
                # libvirt gives one code to a QEMU that ended and to some host errors.
                if error.code is Code.VM_CRASHED and self._handle.is_active():
                    raise AgentError(Code.LIBVIRT_REFUSED, error.message, details=error.details) from error
                raise
            finally:
                self._note_change()

    def preview(self, step: AnyStep) -> str:
        """Return the output that the step would have, without performing it.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with phase("libvirt"):
            return preview(self._handle, step)

    def foresee(self, step: DefineShape) -> tuple[str, Definition]:
        """Return the diff of a definition that is not made, and what it would be.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE and other libvirt errors; DEFINITION_REFUSED.
        """
        with phase("libvirt"):
            return foresee(self._handle, step)
