"""The compute node as tasks see it: observe a VM, perform a step on it, list the VMs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import libvirt_qemu
import msgspec

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

# Looks that come so close together are one look at the host's memory: a list of VMs is many looks.
_SAME_LOOK_S = 0.05


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
        self._host: tuple[float, Host | None] = (0.0, None)

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
            yield HeldVm(handle, lambda definition, parts: self._look_at_host(connection, definition, parts))

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

    def _look_at_host(
        self, connection: libvirt.virConnect, definition: Definition | None, parts: frozenset[str]
    ) -> Host:
        limit = self._vcpu_limit(connection, definition)
        if "memory" not in parts:
            return Host(vcpu_limit=limit, boot_id=read_boot_id(self._host_root))
        looked_at, host = self._host
        if host is None or time.monotonic() - looked_at > _SAME_LOOK_S:
            host = read_host(None, self._host_root)
            self._host = time.monotonic(), host
        return msgspec.structs.replace(host, vcpu_limit=limit)

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

    def __init__(self, handle: VmHandle, look_at_host: Callable[[Definition | None, frozenset[str]], Host]) -> None:
        self._handle = handle
        self._look_at_host = look_at_host

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
        return Facts(domain=domain, guest=guest, host=self._look_at_host(domain.live or domain.config, parts))

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
