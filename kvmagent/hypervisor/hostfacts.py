"""Reads the compute node: libvirt's capabilities, and what the kernel and the firmware provide under /proc and /sys.

What cannot be read is None; nothing here is guessed.
Source: proc(5); sysfs class dmi; os-release(5); libvirt formatcaps.
"""

import fcntl
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import libvirt

from kvmagent.hypervisor.domain import STATES
from kvmagent.hypervisor.hostcpu import find_nominal_mhz, read_caches_kib, read_topology
from kvmagent.hypervisor.hostxml import parse_cpu_model, parse_sysinfo
from kvmagent.hypervisor.kernelfiles import read_fields, read_lines, read_sizes, read_text
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.logs import Log
from kvmagent.model.host import HostInventory, VmStats, VmSummary
from kvmagent.model.units import KIB

log = Log(__name__)

_QEMU_IMG_TIMEOUT_S = 5
_SETTLE_S = 0.5
_SIOCGIFADDR = 0x8915
# By libvirt's names, the kernel's files.
_DMI = {
    "system_manufacturer": "sys_vendor",
    "system_product": "product_name",
    "system_serial": "product_serial",
    "system_uuid": "product_uuid",
    "bios_vendor": "bios_vendor",
    "bios_version": "bios_version",
    "bios_date": "bios_date",
}


def read_host_facts(connection: libvirt.virConnect, *, root: Path = Path("/")) -> HostInventory:
    """Return what is known of the node that this connection leads to; `root` is where its /proc and /sys are."""
    with libvirt_errors("reading the host"):
        arch, memory_mib, cpus, _, nodes, sockets, cores, threads = connection.getInfo()
        libvirt_version, hypervisor_version = connection.getLibVersion(), connection.getVersion()
        capabilities = connection.getCapabilities()
    firmware = _read_firmware(connection, root)
    cpu = read_fields(root / "proc/cpuinfo")
    flags = set(cpu.get("flags", "").split())
    os_release = _read_os_release(root / "etc/os-release")
    all_sockets, all_cores = read_topology(root) or (nodes * sockets, nodes * sockets * cores)
    return HostInventory(
        libvirt_version=_version(libvirt_version),
        hypervisor_version=_version(hypervisor_version),
        qemu_img_version=_read_qemu_img_version(),
        arch=arch,
        cpu_model=cpu.get("model name"),
        cpu_model_of_libvirt=parse_cpu_model(capabilities),
        cpu_mhz=find_nominal_mhz(cpu.get("model name"), firmware.get("processor_max_speed"), root),
        cpu_caches_kib=read_caches_kib(root),
        cpus=cpus,
        cpu_sockets=all_sockets,
        cpu_cores=all_cores,
        cpu_threads_per_core=max(1, cpus // all_cores) if all_cores else threads,
        hvm_flag="vt" if arch == "aarch64" else next((flag for flag in ("vmx", "svm") if flag in flags), None),
        has_ept="ept" in flags,
        memory_total_bytes=read_sizes(root / "proc/meminfo").get("MemTotal") or memory_mib * 1024 * KIB,
        memory_slots=len(list(root.glob("sys/firmware/dmi/entries/17-*"))) or None,
        os_name=os_release.get("ID"),
        os_version=os_release.get("VERSION_ID"),
        os_release=_find_codename(os_release),
        up_since=_find_up_since(root),
        firmware=firmware,
        addresses=_addresses(),
        hostname=socket.gethostname(),
    )


def _read_firmware(connection: libvirt.virConnect, root: Path) -> dict[str, str]:
    """Return what the firmware says of the machine, by libvirt's names.

    A system libvirt may read all of it, by dmidecode where that is installed; for what it does not tell, the kernel
    shows some to everybody.
    """
    told = {name: text for name, file in _DMI.items() if (text := read_text(root / "sys/class/dmi/id" / file))}
    try:
        return told | parse_sysinfo(connection.getSysinfo(0))
    except libvirt.libvirtError as error:
        log.debug("libvirt does not report the firmware", error=str(error))
        return told


def list_vms(
    connection: libvirt.virConnect, *, reread_paused: bool = False, sleep: Callable[[float], None] = time.sleep
) -> tuple[VmSummary, ...]:
    """Return all VMs of the host. One that vanishes while it is read is left out.

    With `settle`, VMs that are paused are read again a moment later: a snapshot and the switch-over of a migration
    pause a VM that long.
    """
    with libvirt_errors("listing VMs"):
        domains = connection.listAllDomains()
    found = {domain.UUIDString(): _read_summary(domain) for domain in domains}
    paused = [domain for domain in domains if (vm := found[domain.UUIDString()]) is not None and vm.state == "paused"]
    if reread_paused and paused:
        sleep(_SETTLE_S)
        found |= {domain.UUIDString(): _read_summary(domain) for domain in paused}
    return tuple(vm for vm in found.values() if vm is not None)


def _read_summary(domain: libvirt.virDomain) -> VmSummary | None:
    """Return the state of one VM; None if it was deleted."""
    try:
        state, maximum_kib, _, vcpus, _ = domain.info()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        with libvirt_errors("reading a VM"):
            raise
    return VmSummary(
        name=domain.name(),
        uuid=domain.UUIDString(),
        # It runs for a management server until it is off; `in_shutdown` tells.
        state="running" if state == libvirt.VIR_DOMAIN_SHUTDOWN else STATES.get(state, "other"),
        vcpus=vcpus,
        memory_bytes=maximum_kib * KIB,
        in_shutdown=state == libvirt.VIR_DOMAIN_SHUTDOWN,
    )


def read_stats(connection: libvirt.virConnect) -> tuple[VmStats, ...]:
    """Return what libvirt reports on all running VMs in one call.

    NOWAIT: of a VM whose QEMU does not answer another call, only what libvirt itself knows is told, which is enough.
    Source: libvirt virConnectGetAllDomainStats; Observed: libvirt 9.0.
    """
    asked = libvirt.VIR_DOMAIN_STATS_STATE | libvirt.VIR_DOMAIN_STATS_VCPU | libvirt.VIR_DOMAIN_STATS_BALLOON
    flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    with libvirt_errors("reading the VMs' statistics"):
        found = connection.getAllDomainStats(asked, flags)
    return tuple(
        VmStats(
            uuid=domain.UUIDString(),
            name=domain.name(),
            run=domain.ID(),
            vcpus=stats.get("vcpu.current"),
            max_vcpus=stats.get("vcpu.maximum"),
            balloon_bytes=stats["balloon.current"] * KIB if "balloon.current" in stats else None,
        )
        for domain, stats in found
    )


def _version(number: int) -> str:
    """libvirt packs a version into one number: 9000000 is 9.0.0."""
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def _read_qemu_img_version() -> str | None:
    try:
        done = subprocess.run(
            ["qemu-img", "--version"], capture_output=True, text=True, timeout=_QEMU_IMG_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"version (\d+(?:\.\d+)+)", done.stdout)
    return found.group(1) if found else None


def _find_codename(os_release: dict[str, str]) -> str | None:
    """Return the release's codename. CentOS 7 has it in brackets behind its version: 7 (Core)."""
    in_brackets = re.search(r"\((.+)\)", os_release.get("VERSION", ""))
    return os_release.get("VERSION_CODENAME") or (in_brackets and in_brackets.group(1))


def _find_up_since(root: Path) -> str | None:
    """Return when the host was booted, in its own time, as `uptime -s` prints it: the same each time it is asked."""
    booted = read_lines(root / "proc/stat").get("btime")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(booted))) if booted else None


def _read_os_release(path: Path) -> dict[str, str]:
    lines = (read_text(path) or "").splitlines()
    return {name: value.strip("\"'") for name, _, value in (line.partition("=") for line in lines)}


def _addresses() -> tuple[str, ...]:
    """Return the first IPv4 address of each interface but loopback. Source: netdevice(7), SIOCGIFADDR."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an IPv4 address
            found.append(socket.inet_ntoa(answer[20:24]))
    return tuple(address for address in found if not address.startswith("127."))
