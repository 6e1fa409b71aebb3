"""The messages between a ZStack management server and a host. Unknown fields are ignored.

Sizes are bytes. Its parser makes a missing number 0 and a missing success true, so both are always there.
"""

from typing import Any

import msgspec


class HostRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The fields that every request about the host may have."""

    host_uuid: str | None = None


class EchoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An empty request, to check that the agent answers."""


class ConnectRequest(HostRequest, frozen=True, kw_only=True, rename="camel"):
    """The server connects the host. Settings of the host that it sends along are ignored."""

    host_uuid: str
    send_command_url: str
    version: str | None = None
    iptables_rules: list[str] | None = None
    ignore_msrs: bool | None = None
    page_table_extension_disabled: bool | None = None
    install_host_shutdown_hook: bool | None = None
    tcp_server_port: int | None = None


class UpdateConfigurationRequest(HostRequest, frozen=True, kw_only=True, rename="camel"):
    """The server has a new address."""

    host_uuid: str
    send_command_url: str


class VmListRequest(HostRequest, frozen=True, kw_only=True, rename="camel"):
    """The VMs that the query is about."""

    vm_uuids: list[str] | None = None


class HostReply(msgspec.Struct, kw_only=True, rename="camel"):
    """The fields that every answer has."""

    success: bool = True
    error: str = ""


class EchoReply(HostReply, kw_only=True):
    """The agent answers."""


class ConnectReply(HostReply, kw_only=True, rename="camel"):
    """What the host runs on."""

    libvirt_version: str = "unknown"
    qemu_version: str = "unknown"


class PingReply(HostReply, kw_only=True, rename="camel"):
    """The server that connected last, empty if none has; another server then connects again."""

    host_uuid: str | msgspec.UnsetType = msgspec.UNSET
    send_command_url: str | msgspec.UnsetType = msgspec.UNSET
    version: str | msgspec.UnsetType | None = msgspec.UNSET


class VirtualizerInfo(msgspec.Struct, kw_only=True):
    """The hypervisor of a host or VM."""

    uuid: str
    virtualizer: str = "qemu-kvm"
    version: str = "unknown"


class VirtualizerReply(HostReply, kw_only=True, rename="camel"):
    """The hypervisor of this host and of each requested VM."""

    host_info: VirtualizerInfo | None = None
    vm_info_list: list[VirtualizerInfo] = []


class FactReply(HostReply, kw_only=True, rename="camel"):
    """The host; "unknown" if it is not known.

    `hvmCpuFlag` and `eptFlag` are absent if the processor lacks them: the server then rejects the host.
    """

    os_distribution: str = "unknown"
    os_version: str = "unknown"
    os_release: str = "unknown"
    qemu_img_version: str = "unknown"
    libvirt_version: str = "unknown"
    hvm_cpu_flag: str | msgspec.UnsetType = msgspec.UNSET
    ept_flag: str | msgspec.UnsetType = msgspec.UNSET
    cpu_architecture: str = "unknown"
    cpu_model_name: str = "unknown"
    host_cpu_model_name: str = "unknown"
    cpu_ghz: str = msgspec.field(default="unknown", name="cpuGHz")
    cpu_processor_num: int = 0
    cpu_sockets: int = 0
    cpu_cores_per_socket: int = 0
    cpu_threads_per_core: int = 0
    cpu_cache: str = "unknown"
    memory_slots_maximum: str = "unknown"
    uptime: str = "unknown"
    system_product_name: str = "unknown"
    system_serial_number: str = "unknown"
    system_manufacturer: str = "unknown"
    system_uuid: str = msgspec.field(default="unknown", name="systemUUID")
    bios_vendor: str = "unknown"
    bios_version: str = "unknown"
    bios_release_date: str = "unknown"
    hostname: str = "unknown"
    ip_addresses: list[str] = []
    libvirt_capabilities: list[str] = []
    virtualizer_info: VirtualizerInfo | None = None


class CapacityReply(HostReply, kw_only=True, rename="camel"):
    """How much CPU and memory the host has, and how much of it running VMs use. Speeds are MHz."""

    cpu_num: int = 0
    cpu_speed: int = 0
    used_cpu: int = 0
    total_memory: int = 0
    used_memory: int = 0
    cpu_sockets: int = 0
    cpu_core_num: int = 0


class VmStatesReply(HostReply, kw_only=True, rename="camel"):
    """The state of each VM by its id, and which of them are shutting down."""

    states: dict[str, str] = {}
    vm_in_shutdowns: list[str] = []


def failure(reply: type[HostReply], error: str) -> Any:
    """Return the reply of a question that could not be answered."""
    return reply(success=False, error=error)
