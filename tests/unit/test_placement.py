"""Where the next dimm would lie is foreseen as QEMU decides it, and refused where the guest could not use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.hypervisor.domainxml import format_virtio_mem, parse_definition
from kvmagent.model.facts import Definition, Domain, Facts, Guest, Host, MemoryDevice, NumaCell
from kvmagent.model.placement import check_placement
from tests.fakes.agent import carry_out, make_domain, make_guest, make_node
from tests.lab.domainxml import GuestSpec

MIB = 1024 * 1024
GIB = 1024 * MIB
BLOCK = 128 * MIB


def make_facts(*devices: MemoryDevice, boot_bytes: int = 512 * MIB, machine: str = "pc-q35-7.2") -> Facts:
    total = boot_bytes + sum(device.size_bytes for device in devices)
    definition = Definition(
        vcpu_current=1,
        vcpu_maximum=4,
        vcpus=(),
        topology=None,
        total_bytes=total,
        current_bytes=total,
        max_memory_bytes=64 * GIB,
        slots=16,
        cells=(NumaCell(id=0, cpus=frozenset(range(4)), memory_bytes=boot_bytes),),
        devices=devices,
        acpi=True,
        balloon=True,
        agent_channel=True,
        machine=machine,
        arch="x86_64",
        hypervisor="kvm",
    )
    stopped = msgspec.structs.replace(
        definition, devices=tuple(msgspec.structs.replace(device, base=None) for device in devices)
    )
    domain = Domain(name="vm1", uuid="u1", state="running", live=definition, config=stopped)
    return Facts(domain=domain, guest=Guest(block_bytes=BLOCK), host=Host())


def device(model: str, size_mib: int, *, at_mib: int | None = None, **fields: Any) -> MemoryDevice:
    base = None if at_mib is None else 4 * GIB + at_mib * MIB
    return MemoryDevice(model=model, size_bytes=size_mib * MIB, node=0, alias=f"a-{model}", base=base, **fields)


def find(facts: Facts, *sizes_mib: int, affect: Any = "both") -> list[str]:
    found = list(check_placement(facts, affect, tuple(size * MIB for size in sizes_mib), None))
    assert {one.code for one in found} <= {"MEMORY_DEVICE_MISALIGNED"}
    return [one.message for one in found]


@pytest.mark.parametrize(
    "one",
    [device("nvdimm", 258, at_mib=0), device("virtio-mem", 514, block_bytes=2 * MIB), device("dimm", 64, at_mib=0)],
)
def test_a_device_of_any_model_that_leaves_the_next_dimm_unaligned_is_found(one: MemoryDevice) -> None:
    running, persistent = find(make_facts(one), 128)
    assert f"behind a-{one.model} ({one.model}" in running
    assert "running definition the next dimm would not lie at a multiple of the guest's block of 128 MiB" in running
    assert "persistent definition" in persistent
    assert len(find(make_facts(one), 128, affect="live")) == 1
    assert find(make_facts(one)) == []


@pytest.mark.parametrize(
    "devices",
    [
        (),
        (device("nvdimm", 256, at_mib=0),),
        (device("nvdimm", 258, at_mib=0, label_bytes=2 * MIB),),
        (device("virtio-mem", 512),),
        (device("dimm", 128, at_mib=0), device("dimm", 1024, at_mib=128)),
        (device("sgx-epc", 130),),
    ],
)
def test_devices_that_leave_it_aligned_are_in_nobody_s_way(devices: tuple[MemoryDevice, ...]) -> None:
    assert find(make_facts(*devices), 128, 256) == []


def test_a_gap_before_the_device_takes_what_fits_into_it() -> None:
    facts = make_facts(device("nvdimm", 258, at_mib=256))
    assert find(facts, 256, affect="live") == []
    assert len(find(facts, 384, affect="live")) == 1
    assert len(find(facts, 128, 128, 128, affect="live")) == 1


@pytest.mark.parametrize(
    ("machine", "boot_gib", "start_gib"),
    [("pc-q35-7.2", 1, 4), ("pc-q35-7.2", 4, 6), ("pc-i440fx-7.2", 3, 4), ("pc-i440fx-7.2", 4, 5)],
)
def test_the_region_begins_above_the_boot_memory(machine: str, boot_gib: int, start_gib: int) -> None:
    """What was unplugged at the beginning of the region is a gap that the next dimm goes into."""
    odd = MemoryDevice(model="nvdimm", size_bytes=258 * MIB, node=0, base=start_gib * GIB + GIB)
    facts = make_facts(odd, boot_bytes=boot_gib * GIB, machine=machine)
    assert find(facts, 1024, affect="live") == []
    assert len(find(facts, 1152, affect="live")) == 1


spans = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200)), max_size=5)


@given(spans=spans, size=st.integers(1, 8).map(lambda n: n * 128))
def test_the_next_dimm_lies_in_the_first_gap_that_is_large_enough(spans: list[tuple[int, int]], size: int) -> None:
    """Against a search through all addresses; places and sizes in 2 MiB."""
    taken: list[tuple[int, int]] = []
    for at, length in spans:
        if all(at + length <= first or at >= end for first, end in taken):
            taken.append((at, at + length))
    devices = [device("nvdimm", 2 * (end - at), at_mib=2 * at) for at, end in taken]
    expected = next(at for at in range(2000) if all(at + size // 2 <= first or at >= end for first, end in taken))
    assert bool(find(make_facts(*devices), size, affect="live")) is bool(expected * 2 % 128)


def test_the_plug_is_refused_before_the_attach_and_ready_says_so(tmp_path: Path) -> None:
    spec = GuestSpec(name="vm1", memory_mib=512, max_memory_mib=4096)
    domain = make_domain(spec, make_guest(spec), virt_type="kvm")
    nvdimm = (
        "<memory model='nvdimm'><source><path>/nvdimm</path></source><target><size unit='KiB'>264192</size>"
        "<node>0</node></target><alias name='nvdimm0'/><address type='dimm' slot='0' base='0x100000000'/></memory>"
    )
    for root in (domain.live, domain.config):
        root.find("devices").append(etree.fromstring(nvdimm))
        root.find("memory").text = str(int(root.findtext("memory")) + 264192)
    node = make_node(tmp_path, domain)
    reply = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=1024 * MIB, method="dimm")
    assert (reply["outcome"], reply["errorCode"], domain.calls) == ("refused", "MEMORY_DEVICE_MISALIGNED", [])
    told = carry_out(node, "ReadyForHotplug", "t2", vmUuid="vm1")
    assert "MEMORY_DEVICE_MISALIGNED" in [blocker["code"] for blocker in told["blockers"]]
    assert "dimm" not in told["headroom"]["memoryMethods"]


@settings(max_examples=60, deadline=None)
@given(
    bare=st.sampled_from([0, 1]),
    size_mib=st.integers(257, 3000),
    method=st.sampled_from(["auto", "virtio-mem", "dimm"]),
    asked=st.sampled_from([None, None, 0, 1]),
)
def test_a_cell_without_vcpus_gets_memory_only_where_it_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory, bare: int, size_mib: int, method: str, asked: int | None
) -> None:
    """A cell for another kind of memory, with an empty virtio-mem device of its own, as prepare gives it one."""
    domain = make_domain(GuestSpec(name="vm1", vcpus=2, numa_cells=2, memory_mib=256, max_memory_mib=8192))
    for root in (domain.live, domain.config):
        cells = root.findall("cpu/numa/cell")
        cells[1 - bare].set("cpus", "0-3")
        del cells[bare].attrib["cpus"]
    for cell in (0, 1):
        room = {"size_bytes": GIB, "block_bytes": 2 * MIB, "requested_bytes": 0}
        domain.attachDeviceFlags(format_virtio_mem(alias=f"ua-{cell}", node=cell, **room), 3)
    chosen = {} if asked is None else {"node": asked}
    reply = carry_out(
        make_node(tmp_path_factory.mktemp("cells"), domain),
        "HotPlugMemory",
        vmUuid="vm1",
        memorySize=size_mib * MIB,
        method=method,
        **chosen,
    )
    assert reply["success"], reply
    for xml in (domain.XMLDesc(0), domain.XMLDesc(2)):
        for device in parse_definition(xml).devices:
            assert device.plugged_bytes == 0 or device.node == (1 - bare if asked is None else asked)
