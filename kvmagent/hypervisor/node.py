"""The compute node as tasks see it: observe a VM, perform a step on it, list the VMs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import libvirt_qemu

from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.deviceevents import DeviceEvents
from kvmagent.hypervisor.domain import Means, VmHandle, find_vm
from kvmagent.hypervisor.domainxml import parse_vcpu_limit
from kvmagent.hypervisor.guestagent import Send
from kvmagent.hypervisor.host import read_boot_id, read_host, read_host_load
from kvmagent.hypervisor.hostfacts import list_vms, read_host_facts
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.hypervisor.performers import perform, preview
from kvmagent.model.facts import Definition, Facts, Host
from kvmagent.model.host import HostLoad, HostView
from kvmagent.model.steps import AnyStep


class Node:
    """Thread-safe. A VM is named by its domain name or UUID, with or without dashes.

    `events` are what an EventConnection reports. `former_xml_dir` is where definitions that are replaced are kept,
    `host_root` where the kernel's files of the host are.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        events: DeviceEvents,
        former_xml_dir: Path,
        send_to_agent: Send = libvirt_qemu.qemuAgentCommand,
        host_root: Path = Path("/"),
    ) -> None:
        self._connection = connection
        self._means = Means(send_to_agent=send_to_agent, events=events, former_xml_dir=former_xml_dir)
        self._host_root = host_root
        self._vcpu_limits: dict[tuple[str, str, str], int | None] = {}

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
        with self._connection.lease() as connection, libvirt_errors("listing VMs"):
            return [domain.UUIDString() for domain in connection.listAllDomains()]

    def read_load(self) -> HostLoad:
        """Return what the host has left, which its kernel tells without libvirt."""
        return read_host_load(self._host_root)

    def view_host(self, needs: frozenset[str]) -> HostView:
        """Return what is so of the host now; `needs` ("host", "vms") is what to look at.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        if not needs:
            return HostView()
        with self._connection.lease() as connection:
            return HostView(
                host=read_host_facts(connection) if "host" in needs else None,
                vms=list_vms(connection) if "vms" in needs else None,
            )

    @contextmanager
    def hold(self, vm: str) -> Iterator["HeldVm"]:
        """Have a VM for a piece of work: looked up once, on a connection of its own.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self._connection.lease() as connection:
            handle = find_vm(connection, vm, self._means)
            yield HeldVm(handle, lambda definition: self._vcpu_limit(connection, definition), self._host_root)

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now, to who does nothing else with the VM; see HeldVm.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self.hold(vm) as held:
            return held.observe(parts)

    def perform(self, vm: str, step: AnyStep) -> str:
        """Perform one step, for who does nothing else with the VM; see HeldVm.

        Raises:
            AgentError: what went wrong; what is so after it must be observed.
        """
        with self.hold(vm) as held:
            return held.perform(step)

    def _vcpu_limit(self, connection: libvirt.virConnect, definition: Definition | None) -> int | None:
        """Return the most vCPUs of a machine type, asked once; None where it is not told."""
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


class HeldVm:
    """One VM as a task sees it while it works on it, by one thread."""

    def __init__(
        self, handle: VmHandle, find_vcpu_limit: Callable[[Definition | None], int | None], host_root: Path
    ) -> None:
        self._handle = handle
        self._find_vcpu_limit = find_vcpu_limit
        self._host_root = host_root

    @property
    def uuid(self) -> str:
        """The VM's UUID, which is the same whatever form it was named in."""
        return self._handle.uuid

    def observe(self, parts: frozenset[str]) -> Facts:
        """Return what is so now; `parts` ("cpus", "memory", "agent", "os") is what to ask the guest itself.

        The host's memory is looked at where the guest's is.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        domain, connected = self._handle.read()
        guest = self._handle.ask_guest(domain, connected, parts)
        limit = self._find_vcpu_limit(domain.live or domain.config)
        if "memory" in parts:
            host = read_host(limit, self._host_root)
        else:
            host = Host(vcpu_limit=limit, boot_id=read_boot_id(self._host_root))
        return Facts(domain=domain, guest=guest, host=host)

    def perform(self, step: AnyStep) -> str:
        """Perform one step; return what it has to tell, mostly nothing.

        Raises:
            AgentError: what went wrong; what is so after it must be observed.
        """
        return perform(self._handle, step)

    def preview(self, step: AnyStep) -> str:
        """Return what the step would tell, without performing it.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        return preview(self._handle, step)
