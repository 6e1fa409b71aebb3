"""Owns what a guest of the lab looks like to libvirt. Conversion only: from a specification to domain XML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from tests.lab.image import Image

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
AGENT_PORT = "org.qemu.guest_agent.0"
AGENT_CHANNEL = f"<channel type='unix'><target type='virtio' name='{AGENT_PORT}'/></channel>"

# Newer kernels count the CPUs that QEMU may yet plug only where they know the hypervisor, and of an emulated machine
# they do not: such a guest would never see a plugged CPU. They do know VMware: by the serial number, asked for where
# the CPU does not tell of a hypervisor, and by the port that QEMU emulates.
# Source: Linux adbf61cc47cb, "x86/acpi/boot: Correct acpi_is_processor_usable() check again".
# Observed: Linux 6.12.117 of Debian 13 needs it, 6.1.192 of Debian 12 does not. Can go when QEMU sets the
# "online capable" flag of ACPI 6.3 for the CPUs that it may yet plug.
SMBIOS = "<sysinfo type='smbios'><system><entry name='serial'>VMware-lab</entry></system></sysinfo>"
NO_HYPERVISOR_BIT = "<feature policy='disable' name='hypervisor'/>"
VMPORT = "<vmport state='on'/>"


class Board(NamedTuple):
    """How a guest of an architecture gets its two lines: the kernel's console, and the port of the harness.

    `console` and `port` are the guest's names of them, the others their elements, with the paths left open.
    """

    cpu: str
    console: str
    console_xml: str
    port: str
    port_xml: str


_FILE, _SOCKET = "<source path={console_log}/>", "<source mode='bind' path={harness}/>"
_VIRTIO_PORT = f"<console type='unix'>{_SOCKET}<target type='virtio' port='1'/></console>"
BOARDS = {
    "x86_64": Board(
        "<cpu mode='custom'><model>qemu64</model>",
        "ttyS0,115200",
        f"<serial type='file'>{_FILE}<target port='0'/></serial>",
        "ttyS1",
        f"<serial type='unix'>{_SOCKET}<target port='1'/></serial>",
    ),
    "ppc64le": Board(
        "<cpu>",
        "hvc0",
        f"<serial type='file'>{_FILE}<target type='spapr-vio-serial' port='0'/></serial>",
        "hvc1",
        f"<serial type='unix'>{_SOCKET}<target type='spapr-vio-serial' port='1'/></serial>",
    ),
    "s390x": Board(
        "<cpu>",
        "ttysclp0",
        f"<console type='file'>{_FILE}<target type='sclp' port='0'/></console>",
        "hvc0",
        _VIRTIO_PORT,
    ),
    "aarch64": Board(
        "<cpu mode='custom'><model>cortex-a57</model>",
        "ttyAMA0",
        f"<serial type='file'>{_FILE}<target port='0'/></serial>",
        "hvc0",
        _VIRTIO_PORT,
    ),
}


@dataclass(frozen=True, kw_only=True)
class GuestSpec:
    """A guest as a test wants it; the defaults are a guest that can be given CPUs and memory.

    `max_memory_mib` None leaves out maxMemory. `numa_cells` shares memory and CPUs among so many cells, 0 leaves
    them out. `boots` False leaves out the operating system: QEMU runs its firmware alone. `topology` is sockets,
    cores, threads; None makes each CPU a socket. The `_xml` fields and `qemu_args` go into the domain, its devices,
    its metadata and QEMU's command line as they are.
    """

    name: str
    vcpus: int = 1
    max_vcpus: int = 4
    memory_mib: int = 256
    max_memory_mib: int | None = 4096
    slots: int = 16
    numa_cells: int = 1
    topology: tuple[int, int, int] | None = None
    acpi: bool = True
    balloon: bool = True
    agent_channel: bool = True
    boots: bool = True
    arch: str = "x86_64"
    machine: str = "q35"
    kernel_args: str = ""
    domain_xml: str = ""
    devices_xml: str = ""
    metadata_xml: str = ""
    qemu_args: tuple[str, ...] = ()


def format_domain(spec: GuestSpec, image: Image, *, virt_type: str, console_log: Path, harness: Path) -> str:
    """The domain XML of a guest that boots `image`, logs its console and has the harness on a socket."""
    sockets, cores, threads = spec.topology or (spec.max_vcpus, 1, 1)
    board, is_pc = BOARDS.get(spec.arch, BOARDS["x86_64"]), spec.arch == "x86_64"
    disguised = is_pc and virt_type == "qemu"
    paths = {"console_log": quoteattr(str(console_log)), "harness": quoteattr(str(harness))}
    parts = [
        f"<domain type={quoteattr(virt_type)} xmlns:qemu={quoteattr(QEMU_NAMESPACE)}>",
        f"<name>{escape(spec.name)}</name>",
        f"<metadata>{spec.metadata_xml}</metadata>" if spec.metadata_xml else "",
        f"<memory unit='MiB'>{spec.memory_mib}</memory>",
        format_max_memory(spec),
        f"<vcpu placement='static' current='{spec.vcpus}'>{spec.max_vcpus}</vcpu>",
        f"<os><type arch={quoteattr(spec.arch)} machine={quoteattr(spec.machine)}>hvm</type>",
        format_boot(spec, image) if spec.boots else "",
        "<smbios mode='sysinfo'/></os>" if disguised else "</os>",
        f"<features>{'<acpi/>' if spec.acpi else ''}{VMPORT if disguised else ''}</features>",
        SMBIOS if disguised else "",
        "<cpu mode='host-passthrough'>" if is_pc and virt_type == "kvm" else board.cpu,
        f"<topology sockets='{sockets}' cores='{cores}' threads='{threads}'/>",
        NO_HYPERVISOR_BIT if disguised else "",
        f"{format_numa(spec)}</cpu>",
        "<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>",
        "<devices>",
        (board.console_xml + board.port_xml).format(**paths),
        AGENT_CHANNEL if spec.agent_channel else "",
        f"<memballoon model='{'virtio' if spec.balloon else 'none'}'/>",
        "<controller type='usb' model='none'/>",
        f"{spec.devices_xml}</devices>",
        spec.domain_xml,
        format_qemu_arguments(spec.qemu_args),
        "</domain>",
    ]
    return "\n".join(part for part in parts if part)


def format_boot(spec: GuestSpec, image: Image) -> str:
    """What is booted."""
    return (
        f"<kernel>{image.kernel}</kernel><initrd>{image.initramfs}</initrd>\n"
        f"<cmdline>{escape(format_kernel_arguments(spec))}</cmdline>"
    )


def format_max_memory(spec: GuestSpec) -> str:
    """The ceiling for hot-plugged memory, without which none can be plugged."""
    if spec.max_memory_mib is None:
        return ""
    return f"<maxMemory slots='{spec.slots}' unit='MiB'>{spec.max_memory_mib}</maxMemory>"


def format_kernel_arguments(spec: GuestSpec) -> str:
    """The kernel command line; of what is there twice, the kernel takes the later, which is the test's own.

    lab.agent tells the guest's start-up to wait for the agent's port. Whether plugged memory is used at once is a
    choice of each distribution's kernel: here it never is, unless a test says so.
    """
    board = BOARDS.get(spec.arch, BOARDS["x86_64"])
    arguments = [
        f"console={board.console}",
        f"lab.port={board.port}",
        "quiet",
        "panic=-1",
        "mitigations=off",
        "memhp_default_state=offline",
    ]
    return " ".join([*arguments, *(["lab.agent=1"] if spec.agent_channel else []), spec.kernel_args]).strip()


def format_numa(spec: GuestSpec) -> str:
    """The cells, each with its share; what does not divide goes to the first ones."""
    cells = ""
    first_cpu = 0
    for cell in range(spec.numa_cells):
        cpus = share(spec.max_vcpus, spec.numa_cells, cell)
        memory_mib = share(spec.memory_mib, spec.numa_cells, cell)
        last_cpu = first_cpu + cpus - 1
        cells += f"<cell id='{cell}' cpus='{first_cpu}-{last_cpu}' memory='{memory_mib}' unit='MiB'/>"
        first_cpu += cpus
    return f"<numa>{cells}</numa>" if cells else ""


def share(total: int, count: int, index: int) -> int:
    """The part of `total` that falls to one of `count`."""
    return total // count + (index < total % count)


def format_qemu_arguments(arguments: tuple[str, ...]) -> str:
    """Arguments passed on to QEMU, which libvirt allows and marks the guest as tainted for."""
    items = "".join(f"<qemu:arg value={quoteattr(argument)}/>" for argument in arguments)
    return f"<qemu:commandline>{items}</qemu:commandline>" if items else ""
