"""One VM: narrow calls on a libvirt domain, every libvirt error translated. No policy.

A handle belongs to the connection that it was looked up on: take a fresh one for each task.
"""

import os
import queue
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import libvirt

from kvmagent.hypervisor.definitions import Definitions
from kvmagent.hypervisor.deviceevents import DeviceEvent, DeviceEvents, has_vcpu_removals
from kvmagent.hypervisor.domainxml import (
    edit_requested,
    find_memory_xml,
    format_dimm,
    format_virtio_mem,
    parse_definition,
    read_written_bytes,
)
from kvmagent.hypervisor.guestagent import CommandRefused, GuestAgent, GuestSilent, Send
from kvmagent.hypervisor.libvirterrors import libvirt_errors, translate
from kvmagent.hypervisor.migrations import MIGRATED
from kvmagent.hypervisor.qemuballoon import ask_balloon_pages
from kvmagent.hypervisor.qemumemory import AskQemu, add_unknown, ask_devices, remove_backend
from kvmagent.hypervisor.schema import check_definition
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Guest, MemoryDevice, VmState
from kvmagent.model.machines import find_largest_block_bytes
from kvmagent.model.steps import Target
from kvmagent.model.units import KIB
from kvmagent.model.vmname import parse_uuid
from kvmagent.recorder import Recorder

STATES: dict[int, VmState] = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "in shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shutoff",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}
_OFF: frozenset[VmState] = frozenset({"shutoff", "crashed"})
# Source: libvirt virDomainRunningReason. Observed: libvirt 9.0 keeps it over its own restart, not over a pause.
_AFFECT = {"live": libvirt.VIR_DOMAIN_AFFECT_LIVE, "config": libvirt.VIR_DOMAIN_AFFECT_CONFIG}
# The number is libvirt's for good; a libvirt-python that was built before it has no name for it.
_ASYNC_UNPLUG = getattr(libvirt, "VIR_DOMAIN_VCPU_ASYNC_UNPLUG", 1 << 5)
_JOBS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE: "restore",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "incoming migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "outgoing migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
}
# libvirt lets a VM be changed while it is backed up. Source: libvirt 9.0 qemuBackupBegin, its job mask.
_JOBS_BESIDE = frozenset({libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP})


@dataclass(frozen=True)
class Means:
    """What a handle needs beside libvirt: the agent's transport, device events, where former XML is kept, recorder,
    libvirt's schema of domains, and the definitions that were parsed before.
    """

    send_to_agent: Send
    ask_qemu: AskQemu
    # UUIDs of VMs of whose memory QEMU may have more than libvirt knows.
    suspects: set[str]
    events: DeviceEvents
    former_xml_dir: Path
    recorder: Recorder
    domain_schema: Path
    definitions: Definitions


class _Balloon(NamedTuple):
    """What a balloon leaves of the memory, what it was asked to leave, what its driver says that the guest has and
    does not use.
    """

    left_bytes: int | None = None
    target_bytes: int | None = None
    unused: tuple[int, int] | None = None


class VmHandle:
    """One VM on the current connection. `is_test_driver` is for libvirt's own test driver, which knows fewer flags."""

    def __init__(self, domain: libvirt.virDomain, *, is_test_driver: bool, means: Means) -> None:
        self._domain = domain
        self._is_test_driver = is_test_driver
        self._means = means
        #: The VM's UUID, with dashes.
        self.uuid = str(domain.UUIDString())
        # libvirt's number of the run in which there was no managed save image.
        self._unsaved_run: int | None = None
        self.agent = GuestAgent(domain, send=means.send_to_agent, recorder=means.recorder)

    def read(
        self, *, ask_balloon: bool, ask_target: bool, ask_job: bool, is_balloon_told: bool
    ) -> tuple[Domain, bool | None]:
        """Return the VM as libvirt has it, and whether its agent channel is open (None: no channel).

        Of its balloon see `_look_at_balloon`.
        """
        with libvirt_errors("reading the VM"):
            number, reason, persistent = self._read_state()
            state = STATES.get(number, "other")
            live_xml = None if state in _OFF else self._domain.XMLDesc(0)
            config_xml = self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if persistent else None
        definitions = self._means.definitions
        live, connected = definitions.read_live(self.uuid, live_xml) if live_xml else (None, None)
        balloon = _Balloon()
        if live is not None:
            live, balloon = self._look_at_balloon(live, ask=ask_balloon, ask_target=ask_target, is_told=is_balloon_told)
        domain = Domain(
            name=self._domain.name(),
            uuid=self.uuid,
            state=state,
            live=live,
            config=definitions.read_config(self.uuid, config_xml) if config_xml else None,
            balloon_bytes=balloon.left_bytes,
            balloon_target_bytes=balloon.target_bytes,
            balloon_unused=balloon.unused,
            job=self.find_job() if live_xml and ask_job else None,
            saved=bool(config_xml) and self._has_saved_state(live),
            migrated=number == libvirt.VIR_DOMAIN_RUNNING and reason in MIGRATED,
        )
        return domain, connected

    def _read_state(self) -> tuple[int, int, bool]:
        """Return libvirt's number of the state and of its reason, and whether there is a persistent definition.

        One question for both, which libvirt answers of persistent VMs alone. Observed: 0.25 ms instead of 0.45.
        """
        persistent = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_PERSISTENT
        found = self._domain.connect().domainListGetStats([self._domain], libvirt.VIR_DOMAIN_STATS_STATE, persistent)
        for _, stats in found:
            return stats["state.state"], stats["state.reason"], True
        # It is transient; or it is gone, and this raises.
        return (*self._domain.state(), False)

    def _look_at_balloon(
        self, live: Definition, *, ask: bool, ask_target: bool, is_told: bool
    ) -> tuple[Definition, _Balloon]:
        """Return what is so of a running VM's balloon, and its definition with what QEMU has beside it.

        libvirt has what QEMU told it last, once a second at most; QEMU alone knows what is so now, and what the balloon
        was asked for. But each question to QEMU takes as long as ten to libvirt (Observed: 1.5 ms against 0.15), so it
        is not asked again where libvirt has just asked itself (`is_told`: at the end of a dimm's attach) and found that
        nothing is held back. What libvirt says with virtio-mem depends on its version. Source: libvirt
        qemuDomainAttachMemory, "fix the balloon size"; qemuProcessRefreshBalloonState; QEMU's BALLOON_CHANGE.
        """
        told = live.current_bytes if live.balloon else None
        held = ask_balloon_pages(self._domain, self._means.ask_qemu) if live.balloon and ask_target else None
        left, unused = told, None
        if live.balloon and ask:
            is_full = is_told and told == live.balloon_total_bytes and not live.virtio_mems
            if live.balloon_tells or not is_full:
                left, unused = self.read_balloon()
            if (left or 0) > live.balloon_total_bytes:
                self._means.suspects.add(self.uuid)
        if self.uuid in self._means.suspects:
            live = self._add_unknown(live)
            # What libvirt has of the balloon leaves out what it does not know.
            left = self.balloon_bytes()
        target = None
        # What QEMU says of the present must be what libvirt says: else it was read from another place.
        if held is not None and live.balloon_total_bytes - held.actual_bytes == left:
            target = live.balloon_total_bytes - held.target_bytes
        return live, _Balloon(left, target, unused)

    def ask_guest(self, domain: Domain, connected: bool | None, parts: frozenset[str]) -> Guest:
        """Return what the guest says of the `parts` ("cpus", "memory", "agent", "os"); silence is an answer too."""
        if not parts or domain.live is None:
            return Guest()
        if domain.state != "running":
            asleep = domain.state == "pmsuspended"
            code = Code.VM_SUSPENDED if asleep else Code.VM_PAUSED
            return Guest(silence=code, silence_words=f"the VM is {domain.state}")
        if connected is None:
            return Guest(silence=Code.GUEST_AGENT_ABSENT, silence_words="the VM has no guest-agent channel")
        if not connected:
            return Guest(silence=Code.GUEST_AGENT_DISCONNECTED, silence_words="no guest agent is connected")
        refused: dict[str, str] = {}
        memory_bytes, most_bytes = domain.live.memory_bytes, find_largest_block_bytes(domain.live)

        def part(name: str, ask: Callable[[], Any]) -> Any:
            if name not in parts:
                return None
            try:
                return ask()
            except CommandRefused as error:
                if self.agent.is_frozen():
                    words = "the guest's filesystems are frozen, and its agent does nothing else meanwhile"
                    raise GuestSilent(Code.GUEST_AGENT_FROZEN, words) from error
                refused[error.command] = error.words
                return None

        try:
            vcpus, blocks = part("cpus", self.agent.vcpus), part("memory", self.agent.blocks)
            if vcpus is not None and len(vcpus) > domain.live.vcpu_current:
                # On POWER the guest lists all that it may ever have. Observed: Linux 6.1, ppc64le.
                there = domain.live.enabled_vcpus
                vcpus = tuple(cpu for cpu in vcpus if cpu.online or cpu.id in there)
            # After the blocks: what one of them has just added is in it.
            meminfo = part("memory", self.agent.meminfo) or {}
            return Guest(
                vcpus=vcpus,
                blocks=blocks,
                block_bytes=part("memory", lambda: self.agent.block_bytes(memory_bytes, most_bytes)),
                mem_total_bytes=meminfo.get("MemTotal"),
                mem_available_bytes=meminfo.get("MemAvailable"),
                disabled=part("agent", self.agent.disabled) or frozenset(),
                os=part("os", self.agent.os),
                refused=refused,
            )
        except GuestSilent as error:
            return Guest(silence=error.code, silence_words=error.message)

    def set_vcpus(self, count: int, target: Target | Literal["both"]) -> None:
        """Set the number of vCPUs. Persistent ones are hotpluggable: else they could never be unplugged again."""
        targets: tuple[Target, ...] = ("live", "config") if target == "both" else (target,)
        flags = sum(_AFFECT[one] for one in targets)
        if target != "live" and not self._is_test_driver:
            flags |= libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE
        with libvirt_errors(f"setting {count} vCPUs ({' and '.join(targets)})"):
            self._domain.setVcpusFlags(count, flags)

    def ask_vcpus_back(self, count: int, *, nearest: int) -> int:
        """Ask the guest to come down towards `count` vCPUs; return what it has been asked to come down to.

        Older libvirt waits up to 5 s for each, and then says timeout: so it is asked for the `nearest` number alone,
        or nobody could tell what it has asked the guest for. Newer ones ask for all, and return at once.
        Source: libvirt qemuDomainRemoveDeviceWaitTime; 12.4, VIR_DOMAIN_VCPU_ASYNC_UNPLUG.

        Raises:
            AgentError: CPU_REMOVAL_REFUSED, LIBVIRT_BUSY (another job has the VM), LIBVIRT_REFUSED, ...
        """
        with libvirt_errors("reading the vCPUs"):
            at_once = has_vcpu_removals(self._domain.connect())
        asked = count if at_once else nearest
        try:
            with libvirt_errors(f"setting {asked} vCPUs (live)"):
                self._domain.setVcpusFlags(asked, _AFFECT["live"] | (_ASYNC_UNPLUG if at_once else 0))
        except AgentError as error:
            if error.details.get("libvirtCode") == libvirt.VIR_ERR_OPERATION_FAILED:
                raise AgentError(Code.CPU_REMOVAL_REFUSED, error.message, details=error.details) from error
            if error.code is not Code.LIBVIRT_BUSY or self.find_job() is not None:
                raise
        return asked

    def set_cpu_shares(self, shares: int, target: Target) -> None:
        """Set what the whole VM weighs for CPU time. A session libvirt has no cgroups, and refuses it."""
        with libvirt_errors(f"setting CPU shares ({target})"):
            self._domain.setSchedulerParametersFlags({libvirt.VIR_DOMAIN_SCHEDULER_CPU_SHARES: shares}, _AFFECT[target])

    def is_active(self) -> bool:
        """Return whether the VM runs, or is paused."""
        with libvirt_errors("checking whether the VM runs"):
            return bool(self._domain.isActive())

    def attach_dimm(self, *, alias: str, size_bytes: int, node: int | None, live: bool, config: bool) -> None:
        """Attach a dimm under a user alias. libvirt refuses an alias that is there already.

        Where QEMU has a device that libvirt does not know, it gets a slot that is free in QEMU.
        """

        def attach(slot: int | None) -> None:
            xml = format_dimm(alias=alias, size_bytes=size_bytes, node=node, slot=slot)
            self._attach(xml, alias, live=live, config=config)

        self._attach_suspiciously(attach, alias, live=live)

    def _attach_suspiciously(self, attach: Callable[[int | None], None], alias: str, *, live: bool) -> None:
        """Attach a device to a slot, and look from then on what QEMU has where libvirt may not know of all of it."""
        try:
            attach(self._find_free_slot(alias) if live and self.uuid in self._means.suspects else None)
        except AgentError as error:
            if not live or self.uuid in self._means.suspects:
                raise
            if error.code is Code.LIBVIRT_UNAVAILABLE:  # libvirtd may have been killed after QEMU had it
                self._means.suspects.add(self.uuid)
            if error.code is not Code.LIBVIRT_REFUSED:
                raise
            self._means.suspects.add(self.uuid)
            slot = self._find_free_slot(alias)
            if slot is None:
                raise
            attach(slot)

    def _add_unknown(self, live: Definition) -> Definition:
        """Return a running VM's definition with what QEMU has beside it; a VM where it has nothing is no suspect."""
        devices = ask_devices(self._domain, self._means.ask_qemu)
        whole = live if devices is None else add_unknown(live, devices)
        if all(device.known for device in whole.devices):
            self._means.suspects.discard(self.uuid)
        return whole

    def _find_free_slot(self, alias: str) -> int | None:
        """Return a slot that is free in QEMU and in both definitions; None where libvirt may choose, or has to fail:
        QEMU has nothing that libvirt does not know, or has this very device."""
        with libvirt_errors("reading the VM"):
            live = self._add_unknown(self._read_live())
            config = parse_definition(self.config_xml()) if self._domain.isPersistent() else live
        unknown = {device.alias for device in live.devices if not device.known}
        if not unknown or alias in unknown:
            return None
        taken = {device.slot for device in (*live.devices, *config.devices)}
        return next((slot for slot in range(live.slots) if slot not in taken), None)

    def attach_virtio_mem(
        self,
        *,
        alias: str,
        size_bytes: int,
        block_bytes: int,
        requested_bytes: int,
        node: int | None,
        live: bool,
        config: bool,
    ) -> None:
        """Attach a virtio-mem device under a user alias; it takes no slot that could be another's."""
        xml = format_virtio_mem(
            alias=alias, size_bytes=size_bytes, block_bytes=block_bytes, requested_bytes=requested_bytes, node=node
        )
        self._attach_suspiciously(lambda _: self._attach(xml, alias, live=live, config=config), alias, live=live)

    def _attach(self, xml: str, alias: str, *, live: bool, config: bool) -> None:
        """Attach a device. Memory of it that a killed libvirtd left in QEMU is removed, and the attach is repeated."""
        flags = (_AFFECT["live"] if live else 0) | (_AFFECT["config"] if config else 0)
        try:
            with libvirt_errors(f"attaching {alias}"):
                self._domain.attachDeviceFlags(xml, flags)
        except AgentError as error:
            if not live or error.code is not Code.LIBVIRT_REFUSED:
                raise
            if not remove_backend(self._domain, alias, self._means.ask_qemu):
                raise
            with libvirt_errors(f"attaching {alias} again"):
                self._domain.attachDeviceFlags(xml, flags)

    def resize_virtio_mem(
        self,
        *,
        alias: str | None,
        node: int | None,
        size_bytes: int,
        requested_bytes: int,
        target: Target,
        address: str | None = None,
    ) -> None:
        """Request another size of a virtio-mem device. The call returns before the guest has done anything.

        libvirt takes the device's whole XML, each definition's own: with its address and, live, its alias.
        Observed: libvirt 9.0, alias alone and LIVE|CONFIG without a user alias are refused.
        """
        doing = f"resizing virtio-mem {alias or ''} ({target})"
        device: dict[str, Any] = {"alias": alias, "node": node, "size_bytes": size_bytes, "address": address}
        xml = self._find_memory(target, model="virtio-mem", **device)
        if xml is None:
            raise AgentError(Code.LIBVIRT_REFUSED, f"{doing}: the device is gone")
        with libvirt_errors(doing):
            self._domain.updateDeviceFlags(edit_requested(xml, requested_bytes), _AFFECT[target])

    def watch(self) -> AbstractContextManager["queue.SimpleQueue[DeviceEvent]"]:
        """Collect this VM's device events while the block lasts."""
        return self._means.events.watch(self.uuid)

    def request_detach(self, alias: str) -> None:
        """Ask the guest to give a memory device up; its answer comes as an event.

        Without the config flag: libvirt would drop the persistent device even where the guest refuses.
        """
        with libvirt_errors(f"detaching {alias}"):
            self._domain.detachDeviceAlias(alias, _AFFECT["live"])

    def forget_memory(self, *, alias: str | None, slot: int | None, node: int | None, size_bytes: int) -> None:
        """Remove a dimm from the persistent definition; one that is not there is done."""
        xml = self._find_memory("config", model="dimm", alias=alias, slot=slot, node=node, size_bytes=size_bytes)
        if xml is None:
            return
        with libvirt_errors(f"removing {alias or 'a dimm'} from the persistent definition"):
            self._domain.detachDeviceFlags(xml, _AFFECT["config"])

    def find_live_device(self, alias: str) -> MemoryDevice | None:
        """Return a memory device of the running VM as it is now."""
        with libvirt_errors("reading the VM"):
            return self._read_live().find_device(alias)

    def _read_live(self) -> Definition:
        return self._means.definitions.read_live(self.uuid, self._domain.XMLDesc(0))[0]

    def vcpu_quantum(self) -> int:
        """Return how many vCPUs of the running VM are plugged and removed at once at least."""
        with libvirt_errors("reading the vCPUs"):
            return self._read_live().vcpu_quantum

    def live_vcpus(self) -> int:
        """Return how many vCPUs the running VM has now."""
        with libvirt_errors("reading the vCPUs"):
            return int(self._domain.vcpusFlags(_AFFECT["live"]))

    def config_xml(self) -> str:
        """Return the persistent XML without its passwords."""
        with libvirt_errors("reading the persistent definition"):
            return str(self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    def secure_config_xml(self) -> str:
        """Return the persistent XML with its passwords, so that it can be defined again without losing them."""
        with libvirt_errors("reading the persistent definition"):
            return str(self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))

    def check_definition(self, xml: str) -> None:
        """Hold a definition against libvirt's schema, without defining it.

        Raises:
            AgentError: DEFINITION_REFUSED.
        """
        check_definition(xml, self._means.domain_schema)

    def define(self, xml: str) -> None:
        """Replace the persistent definition, once libvirt has found the new one valid, and keep the former.

        Raises:
            AgentError: FORMER_XML_NOT_KEPT, DEFINITION_REFUSED: nothing was changed.
        """
        kept = self._keep_former_xml()
        connection = self._domain.connect()
        try:
            connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        except libvirt.libvirtError as error:
            kept.unlink(missing_ok=True)
            failure = translate(error, "defining the prepared VM")
            if failure.code in (Code.LIBVIRT_UNAVAILABLE, Code.LIBVIRT_BUSY):
                raise failure from error
            raise AgentError(Code.DEFINITION_REFUSED, failure.message, details=failure.details) from error

    def find_job(self) -> str | None:
        """Return the name of the libvirt job that excludes changes of the VM; None if none is reported."""
        try:
            stats = self._domain.jobStats(0)
        except libvirt.libvirtError:
            return None
        if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        operation = stats.get("operation")
        return None if operation in _JOBS_BESIDE else _JOBS.get(operation, "libvirt")

    def set_balloon(self, size_bytes: int, target: Target) -> None:
        """Ask the guest's balloon driver for a size. The call returns before the guest has done anything."""
        if target == "config":
            # Sizes in a definition may be odd; what the facts have is what it starts with.
            size_bytes = min(size_bytes, read_written_bytes(self.config_xml()))
        with libvirt_errors(f"setting the balloon ({target})"):
            self._domain.setMemoryFlags(size_bytes // KIB, _AFFECT[target])

    def balloon_bytes(self) -> int | None:
        """Return what the balloon leaves of the memory now; None if there is no balloon or it is not known."""
        return self.read_balloon()[0]

    def read_balloon(self) -> tuple[int | None, tuple[int, int] | None]:
        """Return what the balloon leaves of the memory, and what its driver says that the guest has and does not use.

        None where there is no balloon, or where that is not told. The driver tells only where libvirt was told to ask
        it (<memballoon><stats period>). Source: libvirt virDomainMemoryStats: available, usable, last_update.
        """
        try:
            stats = self._domain.memoryStats()
        except libvirt.libvirtError as error:
            if error.get_error_domain() == libvirt.VIR_FROM_RPC:
                with libvirt_errors("reading the balloon"):
                    raise
            return None, None
        actual, total, usable = (stats.get(name) for name in ("actual", "available", "usable"))
        is_told = stats.get("last_update") and total is not None and usable is not None
        return None if actual is None else actual * KIB, (total * KIB, usable * KIB) if is_told else None

    def _has_saved_state(self, live: Definition | None) -> bool:
        """Return whether the VM has a managed save image. One that comes to be ends the run in which there was none."""
        run = None if live is None else live.domain_id
        if run is not None and run == self._unsaved_run:
            return False
        try:
            is_saved = bool(self._domain.hasManagedSaveImage(0))
            self._unsaved_run = None if is_saved else run
            return is_saved
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                return False
            with libvirt_errors("looking for a managed save image"):
                raise

    def _find_memory(self, target: Target, **device: Any) -> str | None:
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if target == "config" else 0
        with libvirt_errors("reading the VM"):
            return find_memory_xml(self._domain.XMLDesc(flags), **device)

    def _keep_former_xml(self) -> Path:
        """Write the persistent XML, passwords and all, where only this user can read it; return the file."""
        directory = self._means.former_xml_dir
        path = directory / f"{self.uuid}-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns() % 10**6:06}.xml"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(self.secure_config_xml())
                file.flush()
                os.fsync(descriptor)
        except OSError as error:
            raise AgentError(Code.FORMER_XML_NOT_KEPT, f"{path}: {error}", expected=False) from error
        return path


def find_vm(connection: libvirt.virConnect, vm: str, means: Means) -> VmHandle:
    """Look a VM up by UUID or name, each with or without dashes.

    What is a VM's UUID is no other's name: whoever may name VMs must not get what is meant for that one.

    Raises:
        AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE.
    """
    with libvirt_errors("asking libvirt for its driver"):
        is_test_driver = connection.getType().upper() == "TEST"
    attempts = [(connection.lookupByName, vm)]
    if bare := parse_uuid(vm):
        attempts = [(connection.lookupByUUIDString, bare), *attempts, (connection.lookupByName, bare)]
    for lookup, key in attempts:
        if "\0" in key:  # no name has it, and libvirt's binding raises a ValueError for it
            continue
        try:
            return VmHandle(lookup(key), is_test_driver=is_test_driver, means=means)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                with libvirt_errors(f"looking up {vm}"):
                    raise
    raise AgentError(Code.VM_NOT_FOUND, f"no VM on this host has the name or UUID {vm}")
