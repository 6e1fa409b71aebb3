"""The compute node as tasks see it: observe a VM, perform a step on it, list the VMs."""

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt_qemu

from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.domain import VmHandle, find_vm
from kvmagent.hypervisor.guestagent import Send
from kvmagent.hypervisor.host import read_host
from kvmagent.hypervisor.hostfacts import list_vms, read_host_facts
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.hypervisor.performers import perform
from kvmagent.model.facts import Facts
from kvmagent.model.host import HostView
from kvmagent.model.steps import AnyStep


class Node:
    """Thread-safe. A VM is named by its domain name or UUID, with or without dashes."""

    def __init__(self, connection: Connection, *, send_to_agent: Send = libvirt_qemu.qemuAgentCommand) -> None:
        self._connection = connection
        self._send_to_agent = send_to_agent

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

    def get_uuid(self, vm: str) -> str:
        """Return the UUID of a VM, which is the same whatever form it was named in."""
        with self._find(vm) as handle:
            return handle.uuid

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now; `parts` ("cpus", "memory") is what to ask the guest itself.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self._find(vm) as handle:
            domain, connected = handle.read()
            return Facts(domain=domain, guest=handle.ask_guest(domain, connected, parts), host=read_host())

    def perform(self, vm: str, step: AnyStep) -> None:
        """Perform one step.

        Raises:
            AgentError: what went wrong; what is so after it must be observed.
        """
        with self._find(vm) as handle:
            perform(handle, step)

    @contextmanager
    def _find(self, vm: str) -> Iterator[VmHandle]:
        with self._connection.lease() as connection:
            yield find_vm(connection, vm, self._send_to_agent)
