"""QEMU puts a dimm where the agent has foreseen it: on a real QEMU, which need not run its guest for that."""

from collections.abc import Callable

import libvirt
import pytest

from kvmagent.hypervisor.domainxml import format_dimm, format_virtio_mem, parse_definition
from kvmagent.model.placement import find_gap, find_spans
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest

pytestmark = pytest.mark.guest

MIB = 1024 * 1024


@pytest.mark.parametrize(("machine", "memory_mib"), [("q35", 256), ("q35", 3072), ("pc", 256), ("pc", 4096)])
def test_each_dimm_lies_where_it_was_foreseen(
    define: Callable[[GuestSpec], Guest], machine: str, memory_mib: int
) -> None:
    guest = define(GuestSpec(name="placed", machine=machine, memory_mib=memory_mib, max_memory_mib=16384))
    unaligned = 0
    with guest.domain() as domain:
        for n, size_mib in enumerate((128, 130, 128, 0, 64, 256)):
            live = parse_definition(domain.XMLDesc(0))
            alias = f"ua-{n}"
            if not size_mib:
                xml = format_virtio_mem(
                    alias=alias, size_bytes=514 * MIB, block_bytes=2 * MIB, requested_bytes=0, node=0
                )
                domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
                continue
            foreseen, _ = find_gap(*find_spans(live), size_mib * MIB, 2 * MIB)
            xml = format_dimm(alias=alias, size_bytes=size_mib * MIB, node=0)
            domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            device = parse_definition(domain.XMLDesc(0)).find_device(alias)
            assert device is not None
            assert device.base == foreseen, alias
            unaligned += foreseen % (128 * MIB) != 0
    assert unaligned, "else nothing was tried"
