"""Answers to the questions of a ZStack management server, and what it is told unasked."""

import functools
import re
from typing import Any

from kvmagent.model.facts import VmState
from kvmagent.model.host import HostFacts, HostView, ManagementServer, Query, Report, VmEvent, VmSummary

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


def notice_rules(request: ConnectRequest) -> str | None:
    """Say that nothing which a request carries is ever run."""
    return "iptables rules in a connect are ignored" if request.iptables_rules else None


def remember_configuration(request: UpdateConfigurationRequest, known: ManagementServer | None) -> ManagementServer:
    """Return the server at its new address; its version stays what it was."""
    return ManagementServer(request.host_uuid, request.send_command_url, known.version if known else None)


def update_configuration(_request: UpdateConfigurationRequest, _view: HostView) -> HostReply:
    """Say that the new address is remembered."""
    return HostReply()


def ping(_request: HostRequest, view: HostView) -> PingReply:
    """Say who connected last; nulls make the server connect again."""
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
    """Describe the host."""
    host = _get_host(view)
    dmi: dict[str, Any] = {name: host.dmi.get(name, "unknown") for name in _DMI_FIELDS.values()}
    return FactReply(
        os_distribution=host.os_name or "unknown",
        os_version=host.os_version or "unknown",
        os_release=host.os_release or "unknown",
        qemu_img_version=host.qemu_img_version or "unknown",
        libvirt_version=host.libvirt_version,
        hvm_cpu_flag=host.hvm_flag,
        ept_flag="ept" if host.has_ept else "",
        cpu_architecture=host.arch,
        cpu_model_name=host.cpu_model or "unknown",
        host_cpu_model_name=host.cpu_model or "unknown",
        cpu_ghz=f"{host.cpu_mhz / 1000:.2f}" if host.cpu_mhz is not None else "unknown",
        cpu_processor_num=str(host.cpus),
        cpu_cache=host.cpu_cache or "unknown",
        uptime=f"{host.uptime_s:.0f}" if host.uptime_s is not None else "unknown",
        ip_addresses=list(host.addresses),
        virtualizer_info=VirtualizerInfo(
            uuid=view.server.host_uuid if view.server else "", version=host.hypervisor_version
        ),
        **{field: dmi[name] for field, name in _DMI_FIELDS.items()},
    )


_DMI_FIELDS = {
    "system_product_name": "product_name",
    "system_serial_number": "product_serial",
    "system_manufacturer": "sys_vendor",
    "system_uuid": "product_uuid",
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
    )


def vm_sync(_request: HostRequest, view: HostView) -> VmStatesReply:
    """Return the states of all VMs that are the server's."""
    return VmStatesReply(states={vm.name: STATES[vm.state] for vm in view.vms or () if is_its_vm(vm.name)})


def check_states(request: VmListRequest, view: HostView) -> VmStatesReply:
    """Return the states of the VMs asked for, under the ids that they were asked by."""
    by_id: dict[str, VmSummary] = {}
    for vm in view.vms or ():
        by_id[_bare(vm.uuid)] = by_id[_bare(vm.name)] = vm
    found = {uuid: by_id.get(_bare(uuid)) for uuid in request.vm_uuids or ()}
    return VmStatesReply(states={uuid: STATES[vm.state] for uuid, vm in found.items() if vm is not None})


def report_event(event: VmEvent, server: ManagementServer) -> tuple[Report, ...]:
    """Return what the server is told of something that happened to a VM: its new state, and the event by its name."""
    if not is_its_vm(event.name) or event.kind not in _REPORTS:
        return ()
    state, path = _REPORTS[event.kind]
    reports = []
    if state is not None:
        body = {"hostUuid": server.host_uuid, "vmUuid": event.name, "vmState": state}
        reports.append(Report("/kvm/reportvmstate", body))
    if path is not None:
        reports.append(Report(path, {"vmUuid": event.name}))
    return tuple(reports)


def report_gap(reason: str, server: ManagementServer) -> tuple[Report, ...]:
    """Return what the server is told when events may have been missed: to connect again, and so to look itself."""
    return (Report("/kvm/reconnectme", {"hostUuid": server.host_uuid, "reason": reason}),)


# By kind of event: the state that the VM has now, and the path of the event's own report.
_REPORTS: dict[str, tuple[str | None, str | None]] = {
    "started": ("Running", "/kvm/reportvmstart"),
    "resumed": ("Running", None),
    "paused": ("Paused", None),
    "stopped": ("Shutdown", "/kvm/reportvmshutdown"),
    "crashed": ("Crashed", "/kvm/reportvmcrash"),
    "shutdown-by-guest": (None, "/kvm/reportvmshutdown/from/guest"),
    "rebooted": (None, "/kvm/reportvmreboot"),
}


def _get_host(view: HostView) -> HostFacts:
    assert view.host is not None, "the query declares that it needs the host"
    return view.host


def _fails(reply: type[HostReply]) -> functools.partial[HostReply]:
    return functools.partial(failure, reply)


_HOST, _VMS = frozenset({"host"}), frozenset({"vms"})

QUERIES = (
    Query(
        name="HostEcho",
        path="/host/echo",
        summary="Is the agent there?",
        request=EchoRequest,
        reply=EchoReply,
        sync=True,
        needs=frozenset(),
        answer=echo,
        fail=_fails(EchoReply),
    ),
    Query(
        name="HostConnect",
        path="/host/connect",
        summary="The management server takes the host into its care",
        request=ConnectRequest,
        reply=ConnectReply,
        sync=True,
        needs=_HOST,
        answer=connect,
        fail=_fails(ConnectReply),
        remember=remember_connect,
        notice=notice_rules,
    ),
    Query(
        name="HostPing",
        path="/host/ping",
        summary="Who connected last?",
        request=HostRequest,
        reply=PingReply,
        sync=False,
        needs=frozenset(),
        answer=ping,
        fail=_fails(PingReply),
    ),
    Query(
        name="HostUpdateConfiguration",
        path="/host/update/configuration",
        summary="The management server has moved",
        request=UpdateConfigurationRequest,
        reply=HostReply,
        sync=False,
        needs=frozenset(),
        answer=update_configuration,
        fail=_fails(HostReply),
        remember=remember_configuration,
    ),
    Query(
        name="HostFact",
        path="/host/fact",
        summary="Describe the host",
        request=HostRequest,
        reply=FactReply,
        sync=False,
        needs=_HOST,
        answer=fact,
        fail=_fails(FactReply),
    ),
    Query(
        name="HostCapacity",
        path="/host/capacity",
        summary="How much the host has and how much of it is taken",
        request=HostRequest,
        reply=CapacityReply,
        sync=False,
        needs=_HOST | _VMS,
        answer=capacity,
        fail=_fails(CapacityReply),
    ),
    Query(
        name="VmGetVirtualizerInfo",
        path="/vm/getvirtualizerinfo",
        summary="The hypervisor of the host and of VMs",
        request=VmListRequest,
        reply=VirtualizerReply,
        sync=False,
        needs=_HOST | _VMS,
        answer=virtualizer_info,
        fail=_fails(VirtualizerReply),
    ),
    Query(
        name="VmSync",
        path="/vm/vmsync",
        summary="The states of all VMs of the management server",
        request=HostRequest,
        reply=VmStatesReply,
        sync=False,
        needs=_VMS,
        answer=vm_sync,
        fail=_fails(VmStatesReply),
    ),
    Query(
        name="VmCheckState",
        path="/vm/checkstate",
        summary="The states of the VMs asked for",
        request=VmListRequest,
        reply=VmStatesReply,
        sync=False,
        needs=_VMS,
        answer=check_states,
        fail=_fails(VmStatesReply),
    ),
)
