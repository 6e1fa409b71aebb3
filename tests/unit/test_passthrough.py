"""Devices that pin all guest memory, in every spelling that libvirt has for them, and what that costs."""

from typing import Any

import msgspec
import pytest
from lxml import etree

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.schema import DOMAIN_SCHEMA, check_definition
from kvmagent.model.checks import check_device_room, check_host
from kvmagent.model.facts import Definition, Domain, Facts, Guest, Host
from tests.fakes.agent import MIB, format_spec
from tests.lab.domainxml import GuestSpec

GIB = 1024 * MIB
PCI = "<address domain='0x0000' bus='0x05' slot='0x00' function='0x{}'/>"
HOSTDEV = f"<hostdev mode='subsystem' type='pci' managed='yes'><source>{PCI}</source></hostdev>"
MDEV = (
    "<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>"
    "<address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>"
)
INTERFACE = (
    "<interface type='hostdev' managed='yes'><source><address type='pci' domain='0x0000' bus='0x05' slot='0x00' "
    "function='0x1'/></source></interface>"
)
VDPA = "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>"
NVME = (
    "<disk type='nvme' device='disk'><driver name='qemu' type='raw'/><source type='pci' managed='yes' namespace='1'>"
    f"{PCI.format(0)}</source><target dev='vdb' bus='virtio'/></disk>"
)
OVERLAY = (
    "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/vm/top.qcow2'/>"
    "<backingStore type='nvme'><format type='raw'/><source type='pci' managed='yes' namespace='1'>"
    f"{PCI.format(0)}</source><backingStore/></backingStore><target dev='vdc' bus='virtio'/></disk>"
)
# The schema of libvirt 9.0 has none.
VDPA_DISK = (
    "<disk type='vhostvdpa' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vhost-vdpa-1'/>"
    "<target dev='vdd' bus='virtio'/></disk>"
)
IOMMU = "<iommu model='intel'/>"
USB = "<hostdev mode='subsystem' type='usb'><source><address bus='1' device='2'/></source></hostdev>"


def parse(*devices: str, domain_xml: str = "") -> Definition:
    spec = GuestSpec(name="vm1", devices_xml="".join(devices), domain_xml=domain_xml)
    xml = etree.tostring(etree.fromstring(format_spec(spec, "qemu")), encoding="unicode")
    check_definition(xml, DOMAIN_SCHEMA)
    return parse_definition(xml)


@pytest.mark.parametrize(
    ("devices", "pinning", "copies"),
    [
        ((), 0, 0),
        ((USB,), 0, 0),
        ((HOSTDEV.format(0),), 1, 1),
        ((MDEV,), 1, 1),
        ((INTERFACE,), 1, 1),
        ((VDPA,), 1, 1),
        ((NVME,), 1, 1),
        ((OVERLAY,), 1, 1),
        ((HOSTDEV.format(0), HOSTDEV.format(2), INTERFACE), 3, 1),
        ((HOSTDEV.format(0), HOSTDEV.format(2), INTERFACE, IOMMU), 3, 3),
        ((HOSTDEV.format(0), VDPA, VDPA, NVME), 4, 4),
    ],
)
def test_every_spelling_is_counted(devices: tuple[str, ...], pinning: int, copies: int) -> None:
    definition = parse(*devices)
    assert (definition.vfio_devices, definition.locked_copies) == (pinning, copies)


def test_a_disk_by_vdpa_is_counted_as_an_interface_is() -> None:
    definition = parse_definition(format_spec(GuestSpec(name="vm1", devices_xml=VDPA_DISK + VDPA), "qemu"))
    assert (definition.vfio_devices, definition.locked_copies) == (2, 2)


def facts_of(live: Definition | None, config: Definition | None, **domain: Any) -> Facts:
    state: Any = "running" if live else "shutoff"
    return Facts(
        domain=Domain("vm1", "u", state, live=live, config=config, **domain),
        guest=Guest(),
        host=Host(libvirt_is_privileged=False),
    )


@pytest.mark.parametrize("device", [HOSTDEV.format(0), MDEV, INTERFACE, VDPA, NVME])
def test_what_qemu_may_lock_is_judged_for_each(device: str) -> None:
    facts = facts_of(parse(device), None, memlock_bytes=1536 * MIB)
    assert [blocker.code for blocker in check_host(facts, 256 * MIB)] == []
    assert [blocker.code for blocker in check_host(facts, 384 * MIB)] == ["MEMORY_LOCK_LIMIT"]


def test_a_viommu_takes_a_copy_for_each_device() -> None:
    facts = facts_of(parse(HOSTDEV.format(0), INTERFACE, IOMMU), None, memlock_bytes=2 * GIB)
    assert [blocker.code for blocker in check_host(facts, 256 * MIB)] == []
    assert [blocker.code for blocker in check_host(facts, 384 * MIB)] == ["MEMORY_LOCK_LIMIT"]


@pytest.mark.parametrize("devices", [(), (HOSTDEV.format(0),)])
def test_the_hard_limit_of_the_next_start_is_judged_too(devices: tuple[str, ...]) -> None:
    limit = 512 * MIB + (GIB if devices else 0)
    config = msgspec.structs.replace(parse(*devices), hard_limit_bytes=limit)
    for facts in (facts_of(None, config), facts_of(msgspec.structs.replace(config, hard_limit_bytes=None), config)):
        affect = "config" if facts.domain.live is None else "both"
        assert list(check_device_room(facts, affect, "plug dimms", (256 * MIB,), None)) == []  # type: ignore[arg-type]
        (blocker,) = check_device_room(facts, affect, "plug dimms", (384 * MIB,), None)  # type: ignore[arg-type]
        assert (blocker.code, "persistent" in blocker.message) == ("MEMORY_HARD_LIMIT", True)
