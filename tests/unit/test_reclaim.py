"""What could come back of a VM: only what its guest says that it does not use, and some of that is left to it."""

import msgspec
import pytest

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest, Host, MemoryDevice
from kvmagent.model.reclaim import Way, find_reclaimable
from kvmagent.model.units import GIB, MIB
from tests.fakes.agent import format_spec
from tests.lab.domainxml import GuestSpec


def make_live(*devices: MemoryDevice) -> Definition:
    live = parse_definition(format_spec(GuestSpec(name="vm1", memory_mib=2048), "kvm"))
    size = sum(device.size_bytes for device in devices)
    return msgspec.structs.replace(live, devices=devices, total_bytes=live.total_bytes + size)


def ways(live: Definition, guest: Guest) -> list[Way]:
    facts = Facts(Domain("vm1", "u1", "running", live, live), guest, Host())
    return find_reclaimable(facts, promised_bytes=3 * GIB, resident_bytes=1 * GIB).ways


DIMMS = tuple(MemoryDevice("dimm", size * MIB, 0) for size in (256, 512, 1024))


@pytest.mark.parametrize(
    ("devices", "available_mib", "found"),
    [
        (DIMMS, None, []),
        (DIMMS, 500, []),
        (DIMMS, 512 + 256, [Way("dimm", 256 * MIB), Way("balloon", 256 * MIB)]),
        (DIMMS, 512 + 800, [Way("dimm", 768 * MIB), Way("balloon", 800 * MIB)]),
        ((), 512 + 800, [Way("balloon", 800 * MIB)]),
        (
            (MemoryDevice("virtio-mem", 4 * GIB, 0, requested_bytes=GIB, current_bytes=600 * MIB),),
            512 + 800,
            [Way("virtio-mem", 600 * MIB), Way("balloon", 800 * MIB)],
        ),
    ],
)
def test_an_eighth_is_left_to_the_guest(
    devices: tuple[MemoryDevice, ...], available_mib: int | None, found: list[Way]
) -> None:
    available = None if available_mib is None else available_mib * MIB
    guest = Guest(mem_total_bytes=4 * GIB, mem_available_bytes=available)
    assert ways(make_live(*devices), guest) == found


def test_a_vm_without_a_balloon_gives_nothing_by_it() -> None:
    live = msgspec.structs.replace(make_live(), balloon=False)
    assert ways(live, Guest(mem_total_bytes=4 * GIB, mem_available_bytes=3 * GIB)) == []


def test_memory_that_libvirt_does_not_know_is_not_said_to_come_back() -> None:
    unknown = [msgspec.structs.replace(dimm, known=False) for dimm in DIMMS]
    unknown.append(MemoryDevice("virtio-mem", GIB, 0, requested_bytes=GIB, current_bytes=GIB, known=False))
    guest = Guest(mem_total_bytes=4 * GIB, mem_available_bytes=3 * GIB)
    assert {way.means for way in ways(make_live(*unknown), guest)} == {"balloon"}


def test_a_vm_that_is_off_has_nothing() -> None:
    facts = Facts(Domain("vm1", "u1", "shutoff", None, make_live()), Guest(), Host())
    with pytest.raises(AgentError) as refused:
        find_reclaimable(facts, promised_bytes=0, resident_bytes=None)
    assert refused.value.code is Code.VM_NOT_RUNNING
