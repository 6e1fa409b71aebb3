"""Maxima are clamped to what starts: by the highest APIC id, by addresses, by whole sockets in whole cells."""

from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.model.facts import (
    Definition,
    Domain,
    Facts,
    Guest,
    GuestOs,
    Host,
    Hugepages,
    MemoryDevice,
    NumaCell,
    Policy,
)
from kvmagent_plugins.vm.prepare import PrepareGoal, explain_preparation, plan_preparation
from kvmagent_plugins.vm.requests import ReadyForHotplugRequest
from tests.fakes.agent import carry_out, make_domain, make_node
from tests.lab.domainxml import GuestSpec

GIB = 1024**3
HOST = Host(vcpu_limit=288)


def a_definition(**changed: Any) -> Definition:
    fields: dict[str, Any] = {
        "vcpu_current": 2,
        "vcpu_maximum": 2,
        "vcpus": (),
        "topology": None,
        "total_bytes": GIB,
        "current_bytes": GIB,
        "max_memory_bytes": None,
        "slots": 0,
        "cells": (),
        "devices": (),
        "acpi": True,
        "balloon": True,
        "agent_channel": True,
        "machine": "pc-q35-7.2",
        "arch": "x86_64",
        "hypervisor": "qemu",
        "phys_bits": 40,
    }
    return Definition(**fields | changed)


def plan(definition: Definition, *, phys_bits: int = 46, host: Host = HOST, **asked: Any) -> PrepareGoal:
    domain = Domain(name="vm1", uuid="u", state="shutoff", live=None, config=definition)
    facts = Facts(domain=domain, guest=Guest(), host=msgspec.structs.replace(host, phys_bits=phys_bits))
    return plan_preparation(ReadyForHotplugRequest(vm_uuid="vm1", prepare=True, **asked), facts)


def apic_id(number: int, topology: tuple[int, int, int, int]) -> int:
    """The id by its definition: each level has the bits that its largest index needs. Source: Intel SDM 3A, 9.9.3."""
    bits, shift, found = number, 0, 0
    for count in (topology[3], topology[2], topology[1]):
        bits, index = divmod(bits, count)
        found |= index << shift
        shift += max(0, count - 1).bit_length()
    return found | bits << shift


counts = st.integers(1, 12)


@settings(max_examples=300, deadline=None)
@given(counts, st.integers(1, 3), counts, st.integers(1, 4), st.integers(1, 400))
def test_no_apic_id_is_above_what_starts(sockets: int, dies: int, cores: int, threads: int, asked: int) -> None:
    topology = (sockets, dies, cores, threads)
    now = sockets * dies * cores * threads
    if apic_id(now - 1, topology) > 254:
        return
    definition = a_definition(topology=topology, vcpu_current=now, vcpu_maximum=now)
    shape = plan(definition, max_cpu_num=max(now, asked)).shape
    assert shape is not None
    assert shape.topology is not None
    assert apic_id(shape.vcpu_maximum - 1, shape.topology) <= 254
    one_more = (shape.topology[0] + 1, dies, cores, threads)
    more = shape.vcpu_maximum + dies * cores * threads
    assert shape.vcpu_maximum >= asked or apic_id(more - 1, one_more) > 254, "no fewer than can be"


@settings(max_examples=200, deadline=None)
@given(counts, st.integers(1, 3), counts, st.integers(1, 4), st.integers(1, 700), st.booleans(), st.booleans())
def test_ids_are_high_only_where_libvirt_adds_what_carries_them(
    sockets: int, dies: int, cores: int, threads: int, asked: int, is_open: bool, has_ceiling: bool
) -> None:
    topology = (sockets, dies, cores, threads)
    now = sockets * dies * cores * threads
    if apic_id(now - 1, topology) > 254:
        return
    definition = a_definition(
        topology=topology, vcpu_current=now, vcpu_maximum=now, hypervisor="kvm", iommu_open=is_open,
        policy=Policy(max_cpu_num=max(now, 240)) if has_ceiling else Policy(),
    )  # fmt: skip
    host = Host(vcpu_limit=4096, adds_iommu=True)
    shape = plan(definition, host=host, max_cpu_num=max(now, asked)).shape
    assert shape is not None
    assert shape.topology is not None
    is_carried = is_open and shape.vcpu_maximum > 255
    assert is_carried or apic_id(shape.vcpu_maximum - 1, shape.topology) <= 254
    if is_open and not has_ceiling and asked > 255:
        assert shape.vcpu_maximum >= asked


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 40), st.lists(st.booleans(), min_size=1, max_size=4))
def test_whole_sockets_are_dealt_to_cells_with_vcpus(
    sockets: int, cores: int, grown: int, has_cpus: list[bool]
) -> None:
    takers = [n for n, has in enumerate(has_cpus) if has] or [0]
    owner = {socket: takers[socket % len(takers)] for socket in range(sockets)}
    cells = tuple(
        NumaCell(
            id=n,
            cpus=frozenset(cpu for cpu in range(sockets * cores) if owner[cpu // cores] == n),
            memory_bytes=GIB // len(has_cpus),
        )
        for n in range(len(has_cpus))
    )
    now = sockets * cores
    definition = a_definition(topology=(sockets, 1, cores, 1), vcpu_current=now, vcpu_maximum=now, cells=cells)
    shape = plan(definition, max_cpu_num=min(now * grown, 200)).shape
    assert shape is not None
    dealt = [cpu for cell in shape.cells for cpu in cell.cpus]
    assert sorted(dealt) == list(range(shape.vcpu_maximum))
    for cell, former in zip(shape.cells, cells, strict=True):
        assert former.cpus <= set(cell.cpus)
        assert bool(former.cpus) == bool(cell.cpus)
        assert len({cpu // cores for cpu in cell.cpus}) * cores == len(cell.cpus)


def test_a_cpu_without_addresses_above_4_gib_gets_vcpus_alone() -> None:
    goal = plan(a_definition(phys_bits=32), max_cpu_num=4, max_memory_size=8 * GIB)
    assert goal.shape is not None
    assert (goal.shape.vcpu_maximum, goal.shape.max_memory_bytes, goal.shape.slots) == (4, None, 0)
    assert [(clamp.field, clamp.prepared) for clamp in goal.clamped] == [("maxMemorySize", GIB)]


def test_slots_are_given_up_where_each_costs_addresses() -> None:
    goal = plan(a_definition(phys_bits=36), max_memory_size=64 * GIB, slots=64)
    assert goal.shape is not None
    assert goal.shape.slots == 16
    assert goal.shape.max_memory_bytes == (64 - 32 - 8 - 16) * GIB
    assert {clamp.field for clamp in goal.clamped} == {"maxMemorySize", "slots"}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 256), st.none() | st.integers(1, 256), st.integers(1, 8), st.integers(36, 44))
def test_the_slots_that_virtio_mem_devices_take_are_counted_wherever_slots_are(
    has: int, asked: int | None, nodes: int, bits: int
) -> None:
    """Observed: QEMU 7.2 refuses more than 256, and each costs addresses."""
    former = 4 * GIB if has else None
    cells = tuple(NumaCell(id=n, cpus=frozenset({n}), memory_bytes=GIB // nodes) for n in range(nodes))
    definition = a_definition(
        cells=cells, vcpu_current=nodes, vcpu_maximum=nodes, slots=has, max_memory_bytes=former, phys_bits=bits
    )
    request: dict[str, Any] = {"max_memory_size": 8192 * GIB, "memory_device": "virtio-mem", "slots": asked}
    shape = plan(definition, **request).shape
    assert shape is not None
    assert has <= shape.slots <= 256
    assert len(shape.virtio_mems) <= shape.slots
    assert shape.max_memory_bytes is None or (
        shape.max_memory_bytes == former or shape.max_memory_bytes + (8 + 32 + shape.slots) * GIB <= 1 << bits
    )
    anew = msgspec.structs.replace(
        definition,
        slots=shape.slots,
        max_memory_bytes=shape.max_memory_bytes,
        total_bytes=GIB + sum(one.size_bytes for one in shape.virtio_mems),
        devices=tuple(
            MemoryDevice(model="virtio-mem", size_bytes=one.size_bytes, node=one.node, requested_bytes=0, block_bytes=1)
            for one in shape.virtio_mems
        ),
    )
    again = plan(anew, **(request | {"slots": None})).shape
    assert again is not None
    assert again.slots == shape.slots, "the same again changes nothing"


@settings(max_examples=100, deadline=None)
@given(
    pages=st.lists(st.sampled_from([None, 2 * 1024**2, GIB]), min_size=1, max_size=3),
    boot_mib=st.integers(8, 40).map(lambda n: n * 128),
    asked=st.none() | st.integers(2**34, 2**37),
)
def test_a_virtio_mem_device_is_whole_blocks_of_its_own(
    pages: list[int | None], boot_mib: int, asked: int | None
) -> None:
    """QEMU starts with no other: its block is no smaller than the page behind it."""
    each = boot_mib * 1024**2
    cells = tuple(NumaCell(id=n, cpus=frozenset({n}), memory_bytes=each) for n in range(len(pages)))
    backed = tuple(Hugepages(size, frozenset({n})) for n, size in enumerate(pages) if size is not None)
    total = each * len(pages)
    definition = a_definition(
        cells=cells, hugepages=backed, total_bytes=total, current_bytes=total, vcpu_current=3, vcpu_maximum=3
    )
    shape = plan(definition, max_memory_size=asked, memory_device="virtio-mem").shape
    assert shape is not None
    assert shape.max_memory_bytes is not None
    assert total + sum(one.size_bytes for one in shape.virtio_mems) <= shape.max_memory_bytes
    for one in shape.virtio_mems:
        assert one.block_bytes >= (pages[one.node] or 0)
        assert one.size_bytes > 0
        assert one.size_bytes % one.block_bytes == 0


def test_the_hole_the_limit_and_the_host_bound_the_addresses() -> None:
    def most(**changed: Any) -> int:
        shape = plan(a_definition(**changed), phys_bits=39, max_memory_size=8192 * GIB).shape
        assert shape is not None
        assert shape.max_memory_bytes is not None
        return shape.max_memory_bytes // GIB

    assert most() == 1012 - 32 - 8 - 16
    assert most(pci_hole_bytes=512 * GIB) == 1012 - 512 - 8 - 16
    assert most(machine="pc-i440fx-7.2") == 1012 - 2 - 8 - 16
    assert most(hypervisor="kvm") == 512 - 32 - 8 - 16, "QEMU starts with 40 bits, the host's pages end at 39"
    assert most(phys_bits=None, hypervisor="kvm", phys_bits_limit=38) == 256 - 32 - 8 - 16


def test_a_maximum_that_the_vm_has_already_leaves_maxmemory_out() -> None:
    goal = plan(a_definition(), max_memory_size=GIB)
    assert goal.shape is not None
    assert (goal.shape.max_memory_bytes, goal.clamped) == (None, ())


def test_windows_desktop_editions_are_told_their_sockets() -> None:
    goal = plan(a_definition(), max_cpu_num=4)

    def told(name: str) -> list[str]:
        domain = Domain(name="vm1", uuid="u", state="shutoff", live=None, config=a_definition())
        os = GuestOs(name=name, family="windows")
        facts = Facts(domain=domain, guest=Guest(os=os), host=Host())
        return [problem.message for problem in explain_preparation(goal, facts, planned=True)]

    assert told("Windows 11 Pro") == ["Windows 11 Pro uses at most 2 CPU sockets, the VM is to have up to 4"]
    assert told("Windows 10 Home") == ["Windows 10 Home uses at most 1 CPU socket, the VM is to have up to 4"]
    assert told("Windows Server 2022") == []


def test_a_dry_run_without_the_schema_says_that_it_could_not_check(tmp_path: Path) -> None:
    spec = GuestSpec(name="vm1", max_vcpus=1, max_memory_mib=None, numa_cells=0)
    node = make_node(tmp_path, make_domain(spec), domain_schema=tmp_path / "none.rng")
    reply = carry_out(node, "ReadyForHotplug", vmUuid="vm1", prepare=True, dryRun=True)
    assert [problem["code"] for problem in reply["warnings"]] == ["DEFINITION_NOT_CHECKED"]
    reply = carry_out(node, "ReadyForHotplug", vmUuid="vm1", prepare=True)
    assert [problem["code"] for problem in reply["warnings"]] == ["RESTART_REQUIRED"]


def test_a_dry_run_is_refused_what_the_schema_refuses(tmp_path: Path) -> None:
    spec = GuestSpec(name="vm1", max_vcpus=1, max_memory_mib=None, devices_xml="<unheard-of/>")
    reply = carry_out(
        make_node(tmp_path, make_domain(spec)), "ReadyForHotplug", vmUuid="vm1", prepare=True, dryRun=True
    )
    assert reply["errorCode"] == "DEFINITION_REFUSED"
