"""One VM: narrow calls on a libvirt domain, every libvirt error translated. No policy.

A handle belongs to the connection that it was looked up on: take a fresh one for each task.
"""

from collections.abc import Callable
from typing import Any

import libvirt

from kvmagent.hypervisor.domainxml import format_dimm, is_agent_connected, parse_definition
from kvmagent.hypervisor.guestagent import CommandRefused, GuestAgent, GuestSilent, Send
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Domain, Guest, VmState
from kvmagent.model.steps import Target
from kvmagent.model.units import KIB

STATES: dict[int, VmState] = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "running",
    libvirt.VIR_DOMAIN_SHUTOFF: "shutoff",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}
_OFF: frozenset[VmState] = frozenset({"shutoff", "crashed"})
_AFFECT = {"live": libvirt.VIR_DOMAIN_AFFECT_LIVE, "config": libvirt.VIR_DOMAIN_AFFECT_CONFIG}
_JOBS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE: "restore",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "incoming migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "outgoing migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
    libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
}


class VmHandle:
    """One VM on the current connection. `is_test_driver` is for libvirt's own test driver, which knows fewer flags."""

    def __init__(self, domain: libvirt.virDomain, *, is_test_driver: bool, send_to_agent: Send) -> None:
        self._domain = domain
        self._is_test_driver = is_test_driver
        self.agent = GuestAgent(domain, send=send_to_agent)

    @property
    def uuid(self) -> str:
        """The VM's UUID, with dashes."""
        return str(self._domain.UUIDString())

    def read(self) -> tuple[Domain, bool | None]:
        """Return the VM as libvirt has it, and whether its agent channel is open (None: no channel)."""
        with libvirt_errors("reading the VM"):
            state = STATES.get(self._domain.state()[0], "other")
            live_xml = None if state in _OFF else self._domain.XMLDesc(0)
            persistent = self._domain.isPersistent()
            config_xml = self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if persistent else None
        domain = Domain(
            name=self._domain.name(),
            uuid=self.uuid,
            state=state,
            live=parse_definition(live_xml) if live_xml else None,
            config=parse_definition(config_xml) if config_xml else None,
            balloon_bytes=self.balloon_bytes() if live_xml else None,
            job=self._find_job() if live_xml else None,
        )
        return domain, is_agent_connected(live_xml) if live_xml else None

    def ask_guest(self, domain: Domain, connected: bool | None, parts: frozenset[str]) -> Guest:
        """Return what the guest says of the `parts` ("cpus", "memory"). A silent guest is an answer, not an error."""
        if not parts or domain.live is None:
            return Guest()
        if domain.state != "running":
            return Guest(silence=Code.VM_PAUSED, silence_words=f"the VM is {domain.state}")
        if connected is None:
            return Guest(silence=Code.GUEST_AGENT_ABSENT, silence_words="the VM has no guest-agent channel")
        if not connected:
            return Guest(silence=Code.GUEST_AGENT_DISCONNECTED, silence_words="no guest agent is connected")
        refused: dict[str, str] = {}

        def part(name: str, ask: Callable[[], Any]) -> Any:
            if name not in parts:
                return None
            try:
                return ask()
            except CommandRefused as error:
                refused[error.command] = error.words
                return None

        try:
            return Guest(
                vcpus=part("cpus", self.agent.vcpus),
                blocks=part("memory", self.agent.blocks),
                block_bytes=part("memory", self.agent.block_bytes),
                mem_total_bytes=part("memory", self.agent.mem_total_bytes),
                refused=refused,
            )
        except GuestSilent as error:
            return Guest(silence=error.code, silence_words=error.message)

    def set_vcpus(self, count: int, target: Target) -> None:
        """Set the number of vCPUs. Persistent ones are hotpluggable: else they could never be unplugged again."""
        flags = _AFFECT[target]
        if target == "config" and not self._is_test_driver:
            flags |= libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE
        with libvirt_errors(f"setting {count} vCPUs ({target})"):
            self._domain.setVcpusFlags(count, flags)

    def attach_dimm(self, *, alias: str, size_bytes: int, node: int, live: bool, config: bool) -> None:
        """Attach a dimm under a user alias. libvirt refuses an alias that is there already."""
        flags = (_AFFECT["live"] if live else 0) | (_AFFECT["config"] if config else 0)
        with libvirt_errors(f"attaching {alias}"):
            self._domain.attachDeviceFlags(format_dimm(alias=alias, size_bytes=size_bytes, node=node), flags)

    def set_balloon(self, size_bytes: int, target: Target) -> None:
        """Ask the guest's balloon driver for a size. The call returns before the guest has done anything."""
        with libvirt_errors(f"setting the balloon ({target})"):
            self._domain.setMemoryFlags(size_bytes // KIB, _AFFECT[target])

    def balloon_bytes(self) -> int | None:
        """Return what the balloon leaves of the memory now; None where there is no balloon or it is not told."""
        try:
            actual = self._domain.memoryStats().get("actual")
        except libvirt.libvirtError as error:
            if error.get_error_domain() == libvirt.VIR_FROM_RPC:
                with libvirt_errors("reading the balloon"):
                    raise
            return None
        return None if actual is None else actual * KIB

    def _find_job(self) -> str | None:
        """Return the name of the libvirt job that holds the VM; None where there is none or it cannot be told."""
        try:
            stats = self._domain.jobStats(0)
        except libvirt.libvirtError:
            return None
        if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        return _JOBS.get(stats.get("operation"), "libvirt")


def find_vm(connection: libvirt.virConnect, vm: str, send_to_agent: Send) -> VmHandle:
    """Look a VM up by name or UUID, each with or without dashes.

    Raises:
        AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE.
    """
    with libvirt_errors("asking libvirt for its driver"):
        is_test_driver = connection.getType().upper() == "TEST"
    bare = vm.replace("-", "").lower()
    is_uuid = len(bare) == 32 and all(digit in "0123456789abcdef" for digit in bare)
    attempts = [(connection.lookupByName, vm)]
    if is_uuid:
        attempts += [(connection.lookupByUUIDString, bare), (connection.lookupByName, bare)]
    for lookup, key in attempts:
        try:
            return VmHandle(lookup(key), is_test_driver=is_test_driver, send_to_agent=send_to_agent)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                with libvirt_errors(f"looking up {vm}"):
                    raise
    raise AgentError(Code.VM_NOT_FOUND, f"no VM is named {vm} or has that UUID on this host")
