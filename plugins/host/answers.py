"""Answers to the queries of a ZStack management server, and the reports sent to it."""

import functools
import re
from collections.abc import Callable
from typing import Any

import msgspec

from kvmagent.model.facts import VmState
from kvmagent.model.host import (
    HostInventory,
    HostView,
    ManagementServer,
    Progress,
    Query,
    Report,
    VmEvent,
    VmEventKind,
    VmSummary,
)

from .messages import (
    CapacityReply,
    ConnectReply,
    ConnectRequest,
    EchoReply,
    EchoRequest,
    FactReply,
    HostReply,
    HostRequest,
    PingReply,
    UpdateConfigurationRequest,
    VirtualizerInfo,
    VirtualizerReply,
    VmListRequest,
    VmStatesReply,
    failure,
)

# The server's names. It cannot handle Suspended, so a VM asleep is Paused to it.
STATES: dict[VmState, str] = {
    "running": "Running",
    "paused": "Paused",
    "pmsuspended": "Paused",
    "shutoff": "Shutdown",
    "crashed": "Crashed",
    "other": "NoState",
}
# The server's VMs are named by their uuid without dashes; others on the host are none of its business.
_ITS_VM = re.compile(r"[0-9a-f]{32}")


def is_its_vm(name: str) -> bool:
    """Return whether a domain of this name can be the management server's."""
    return _ITS_VM.fullmatch(name) is not None


def _bare(uuid: str) -> str:
    return uuid.replace("-", "").lower()


def echo(_request: EchoRequest, _view: HostView) -> EchoReply:
    """Say that the agent is there."""
    return EchoReply()


def connect(_request: ConnectRequest, view: HostView) -> ConnectReply:
    """Say what the host runs on; the request itself has been remembered."""
    host = _get_host(view)
    return ConnectReply(libvirt_version=host.libvirt_version, qemu_version=host.hypervisor_version)


def remember_connect(request: ConnectRequest, _known: ManagementServer | None) -> ManagementServer:
    """Return the server that connected."""
    return ManagementServer(request.host_uuid, request.send_command_url, request.version)


def notice_ignored(request: ConnectRequest) -> tuple[str, ...]:
    """Return what a connect asks of the host and this agent does not do; nothing that a request carries is ever run."""
    return tuple(f"{words} in a connect: ignored" for field, words in _IGNORED.items() if getattr(request, field))


_IGNORED = {
    "iptables_rules": "iptablesRules (firewall rules)",
    "ignore_msrs": "ignoreMsrs (an option of the kvm module)",
    "page_table_extension_disabled": "pageTableExtensionDisabled (an option of the kvm_intel module)",
    "install_host_shutdown_hook": "installHostShutdownHook (a hook for the host's shutdown)",
    "tcp_server_port": "tcpServerPort (a channel between the server and its own agent)",
}


def remember_configuration(request: UpdateConfigurationRequest, known: ManagementServer | None) -> ManagementServer:
    """Return the server at its new address; its version stays what it was."""
    return ManagementServer(request.host_uuid, request.send_command_url, known.version if known else None)


def update_configuration(_request: UpdateConfigurationRequest, _view: HostView) -> HostReply:
    """Say that the new address is remembered."""
    return HostReply()


def ping(_request: HostRequest, view: HostView) -> PingReply:
    """Say who connected last; without a hostUuid the server connects."""
    if view.server is None:
        return PingReply()
    server = view.server
    return PingReply(host_uuid=server.host_uuid, send_command_url=server.send_command_url, version=server.version)


def virtualizer_info(request: VmListRequest, view: HostView) -> VirtualizerReply:
    """Name the hypervisor of the host and of those VMs that are here."""
    version = _get_host(view).hypervisor_version
    here = {_bare(name) for vm in view.vms or () for name in (vm.name, vm.uuid)}
    return VirtualizerReply(
        host_info=VirtualizerInfo(uuid=view.server.host_uuid if view.server else "", version=version),
        vm_info_list=[
            VirtualizerInfo(uuid=uuid, version=version) for uuid in request.vm_uuids or () if _bare(uuid) in here
        ],
    )


def fact(_request: HostRequest, view: HostView) -> FactReply:
    """Describe the host as ZStack's own agent does: the server shows any difference to the user as changed hardware."""
    host = _get_host(view)
    firmware: dict[str, Any] = {field: host.firmware.get(name, "unknown") for field, name in _FIRMWARE.items()}
    return FactReply(
        os_distribution=host.os_name or "unknown",
        os_version=host.os_version or "unknown",
        os_release=host.os_release or "unknown",
        qemu_img_version=host.qemu_img_version or "unknown",
        libvirt_version=host.libvirt_version,
        hvm_cpu_flag=host.hvm_flag or msgspec.UNSET,
        ept_flag="ept" if host.has_ept else msgspec.UNSET,
        cpu_architecture=host.arch,
        cpu_model_name=host.cpu_model_of_libvirt or "unknown",
        host_cpu_model_name=host.cpu_model or "unknown",
        cpu_ghz=f"{host.cpu_mhz / 1000:.2f}" if host.cpu_mhz is not None else "unknown",
        cpu_processor_num=host.cpus,
        cpu_sockets=host.cpu_sockets,
        cpu_cores_per_socket=host.cpu_cores // host.cpu_sockets if host.cpu_sockets else 0,
        cpu_threads_per_core=host.cpu_threads_per_core,
        cpu_cache=",".join(map(str, host.cpu_caches_kib)) if host.cpu_caches_kib is not None else "unknown",
        memory_slots_maximum=str(host.memory_slots) if host.memory_slots is not None else "unknown",
        uptime=host.up_since or "unknown",
        ip_addresses=list(host.addresses),
        hostname=host.hostname,
        virtualizer_info=VirtualizerInfo(
            uuid=view.server.host_uuid if view.server else "", version=host.hypervisor_version
        ),
        **firmware,
    )


_FIRMWARE = {
    "system_product_name": "system_product",
    "system_serial_number": "system_serial",
    "system_manufacturer": "system_manufacturer",
    "system_uuid": "system_uuid",
    "bios_vendor": "bios_vendor",
    "bios_version": "bios_version",
    "bios_release_date": "bios_date",
}


def capacity(_request: HostRequest, view: HostView) -> CapacityReply:
    """Say how much the host has and how much of it its running VMs were given."""
    host = _get_host(view)
    running = [vm for vm in view.vms or () if vm.state in ("running", "paused", "pmsuspended")]
    speed = host.cpu_mhz or 0
    return CapacityReply(
        cpu_num=host.cpus,
        cpu_speed=speed,
        used_cpu=sum(vm.vcpus for vm in running) * speed,
        total_memory=host.memory_total_bytes,
        used_memory=sum(vm.memory_bytes for vm in running),
        cpu_sockets=host.cpu_sockets,
        cpu_core_num=host.cpu_cores,
    )


def vm_sync(_request: HostRequest, view: HostView) -> VmStatesReply:
    """Return the states of the VMs that are the server's and active.

    A definition that is off is left out: the VM may run on another host by now. One that is on its way down still has
    its disks, so it runs, and is named beside.
    """
    active = [vm for vm in view.vms or () if is_its_vm(vm.name) and vm.state != "shutoff"]
    return VmStatesReply(
        states={vm.name: STATES[vm.state] for vm in active},
        vm_in_shutdowns=[vm.name for vm in active if vm.in_shutdown],
    )


def check_states(request: VmListRequest, view: HostView) -> VmStatesReply:
    """Return the state of each requested VM under its requested id; a VM that is not here counts as off."""
    by_id: dict[str, VmSummary] = {}
    for vm in view.vms or ():
        by_id[_bare(vm.uuid)] = by_id[_bare(vm.name)] = vm
    found = {uuid: by_id.get(_bare(uuid)) for uuid in request.vm_uuids or ()}
    return VmStatesReply(
        states={uuid: STATES[vm.state if vm is not None else "shutoff"] for uuid, vm in found.items()},
        vm_in_shutdowns=[uuid for uuid, vm in found.items() if vm is not None and vm.in_shutdown],
    )


def report_event(event: VmEvent, server: ManagementServer) -> tuple[Report, ...]:
    """Return the reports to the server on something that happened to a VM.

    Never its state: the server would believe "Shutdown" of a VM that has migrated away, and start it a second time.
    For the same reason nothing is told of a QEMU that ended, whatever ended it: the server asks every minute.
    """
    if not is_its_vm(event.name):
        return ()
    vm = {"vmUuid": event.name}
    if event.kind == "shutdown":
        # Without the detail the server takes a VM that its user has powered off for one to be started again.
        detail = f"by {event.detail}" if event.detail else "finished"
        told = [Report("/kvm/reportvmshutdown", {**vm, "detail": detail})]
        if event.detail == "guest":
            told.append(Report("/kvm/reportvmshutdown/from/guest", vm, optional=True))
        return tuple(told)
    path = _REPORTS.get(event.kind)
    return () if path is None else (Report(path, vm),)


_REPORTS: dict[VmEventKind, str] = {
    "started": "/kvm/reportvmstart",
    "crashed": "/kvm/reportvmcrash",
    "rebooted": "/kvm/reportvmreboot",
}


def report_gap(reason: str, server: ManagementServer) -> tuple[Report, ...]:
    """Return the reports to the server when events may have been missed: it connects again, and so reads the states."""
    return (Report("/kvm/reconnectme", {"hostUuid": server.host_uuid, "reason": reason}),)


def report_progress(progress: Progress, server: ManagementServer) -> tuple[Report, ...]:
    """Return the reports to the server on a task's progress, which it finds by the context of its own request."""
    body = {
        "progress": str(progress.percent),
        "processType": progress.command,
        "resourceUuid": _bare(progress.vm),
        "serverUuid": server.host_uuid,
        "detail": {"step": progress.step},
        **progress.context,
    }
    return (Report("/progress/report", body),)


def _get_host(view: HostView) -> HostInventory:
    assert view.host is not None, "the query declares that it needs the host"
    return view.host


def _fails(reply: type[HostReply]) -> functools.partial[HostReply]:
    return functools.partial(failure, reply)


_HOST, _VMS, _SETTLED_VMS = frozenset({"host"}), frozenset({"vms"}), frozenset({"settled vms"})


def _query(
    name: str,
    path: str,
    summary: str,
    request: type[msgspec.Struct],
    reply: type[HostReply],
    answer: Callable[[Any, HostView], HostReply],
    *,
    needs: frozenset[str] = frozenset(),
    **others: Any,
) -> Query:
    """Return an async query; `others` are the fields of Query that few have."""
    return Query(
        name, path, summary, request, reply, needs=needs, answer=answer, fail=_fails(reply), role="host", **others
    )


QUERIES = (
    _query("HostEcho", "/host/echo", "Check that the agent answers", EchoRequest, EchoReply, echo, sync=True),
    _query(
        "HostConnect",
        "/host/connect",
        "Connect the host to a management server",
        ConnectRequest,
        ConnectReply,
        connect,
        needs=_HOST,
        sync=True,
        remember=remember_connect,
        notice=notice_ignored,
    ),
    _query("HostPing", "/host/ping", "Which management server connected last", HostRequest, PingReply, ping),
    _query(
        "HostUpdateConfiguration",
        "/host/update/configuration",
        "Record the new address of the management server",
        UpdateConfigurationRequest,
        HostReply,
        update_configuration,
        remember=remember_configuration,
    ),
    _query("HostFact", "/host/fact", "Describe the host", HostRequest, FactReply, fact, needs=_HOST),
    _query(
        "HostCapacity",
        "/host/capacity",
        "How much CPU and memory the host has, and how much is in use",
        HostRequest,
        CapacityReply,
        capacity,
        needs=_HOST | _VMS,
    ),
    _query(
        "VmGetVirtualizerInfo",
        "/vm/getvirtualizerinfo",
        "The hypervisor of the host and of its VMs",
        VmListRequest,
        VirtualizerReply,
        virtualizer_info,
        needs=_HOST | _VMS,
    ),
    _query(
        "VmSync",
        "/vm/vmsync",
        "The states of all active VMs of the management server",
        HostRequest,
        VmStatesReply,
        vm_sync,
        needs=_SETTLED_VMS,
    ),
    _query(
        "VmCheckState",
        "/vm/checkstate",
        "The states of the requested VMs",
        VmListRequest,
        VmStatesReply,
        check_states,
        needs=_SETTLED_VMS,
    ),
)
