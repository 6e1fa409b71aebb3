"""What a VM's balloon was asked to come to, past libvirt, which forgets it: QEMU shows it to the guest's driver alone,
in the device's own registers.

    query-pci                    where the device's memory is
    xp /8bx (human monitor)      two registers there, of four bytes each: pages asked for, pages that the driver holds

Source: virtio 1.1, 5.5.4, struct virtio_balloon_config, little-endian; QEMU hw/virtio/virtio-pci.c: the device's
registers begin 0x2000 into a region of 16 KiB. Reading them has no effect. libvirt marks the VM as tainted
(custom-monitor) for it: so it is asked only where a plug depends on it. Observed: QEMU 7.2, 3 ms.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import libvirt
import msgspec

from kvmagent.hypervisor.qemumemory import AskQemu, ask_qemu
from kvmagent.model.units import KIB

_VENDOR, _BALLOONS = 0x1AF4, (0x1002, 0x1045)
_REGION_BYTES, _REGISTERS_AT, _PAGE_BYTES = 16 * KIB, 0x2000, 4 * KIB
_BYTES = re.compile(r"0x([0-9a-f]{2})\b")


class BalloonPages(NamedTuple):
    """What the guest's driver was asked to hold back, and what it does."""

    target_bytes: int
    actual_bytes: int


class _Id(msgspec.Struct):
    vendor: int
    device: int


class _Region(msgspec.Struct):
    type: str
    address: int
    size: int


class _Bridge(msgspec.Struct):
    devices: list["_Device"] = []


class _Device(msgspec.Struct):
    id: _Id
    regions: list[_Region] = []
    pci_bridge: _Bridge | None = None


class _Bus(msgspec.Struct):
    devices: list[_Device] = []


class _Buses(msgspec.Struct):
    """Source: QEMU qapi/pci.json, PciInfo."""

    returned: list[_Bus] = msgspec.field(name="return", default_factory=list)


class _Text(msgspec.Struct):
    returned: str = msgspec.field(name="return", default="")


# Made here and once, for the reason that model.decoders gives.
_BUSES = msgspec.json.Decoder(_Buses)
_TEXT = msgspec.json.Decoder(_Text)


def ask_balloon_pages(domain: libvirt.virDomain, ask: AskQemu) -> BalloonPages | None:
    """Return what a VM's balloon was asked for and has; None where it is no PCI device, or QEMU does not report it.

    Raises:
        AgentError: LIBVIRT_UNAVAILABLE.
    """

    def read() -> BalloonPages | None:
        buses = _BUSES.decode(ask(domain, '{"execute": "query-pci"}', 0)).returned
        place = next(_find_registers(device for bus in buses for device in bus.devices), None)
        if place is None:
            return None
        command = {"command-line": f"xp /8bx {place:#x}"}
        request = msgspec.json.encode({"execute": "human-monitor-command", "arguments": command}).decode()
        return _parse(_TEXT.decode(ask(domain, request, 0)).returned)

    return ask_qemu(read, "asking QEMU for the balloon")


def _find_registers(devices: Any) -> Iterator[int]:
    for device in devices:
        if device.id.vendor == _VENDOR and device.id.device in _BALLOONS:
            for region in device.regions:
                # An address of -1: the guest has not given it a place yet.
                if region.type == "memory" and region.size == _REGION_BYTES and region.address > 0:
                    yield region.address + _REGISTERS_AT
        if device.pci_bridge is not None:
            yield from _find_registers(device.pci_bridge.devices)


def _parse(text: str) -> BalloonPages | None:
    found = bytes(int(one, 16) for line in text.splitlines() for one in _BYTES.findall(line.partition(":")[2]))
    if len(found) != 8:
        return None
    asked, actual = (int.from_bytes(found[n : n + 4], "little") * _PAGE_BYTES for n in (0, 4))
    return BalloonPages(asked, actual)
