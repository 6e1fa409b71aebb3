"""The host's memory with NUMA nodes, hugepages and limits, whole tasks of several VMs on threads of their own."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.hostbudget import NORMAL_PAGES, Promise, make_promise
from kvmagent.model.units import GIB, MIB
from tests.fakes.agent import carry_out, make_node
from tests.fakes.libvirt import FakeDomain
from tests.unit.test_hostbudget import STRICT, make_backed_vm, scope, write, write_hugepages, write_nodes

PAGES = "<memoryBacking><hugepages><page size='2' unit='MiB'/></hugepages></memoryBacking>"
BACKINGS = ("", "", PAGES, STRICT.format("0"), STRICT.format("1"), STRICT.format("0-1"), PAGES + STRICT.format("0"))


def measure(vms: list[FakeDomain], page_bytes: int, nodes: frozenset[int]) -> int:
    """What these VMs may have of one kind of pages that comes from these nodes and from nowhere else."""
    found: list[Promise] = []
    for vm in vms:
        live = parse_definition(vm.XMLDesc(0))
        found.append(make_promise(vm.UUIDString(), vm.name(), live, default_page_bytes=2 * MIB))
    return sum(
        claim.size_bytes
        for promise in found
        for claim in promise.claims
        if claim.page_bytes == page_bytes and (not nodes or (claim.nodes and claim.nodes <= nodes))
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    backings=st.lists(st.sampled_from(BACKINGS), min_size=2, max_size=4),
    total_gib=st.integers(3, 12),
    huge_gib=st.integers(1, 4),
    limit_gib=st.none() | st.integers(1, 6),
    tasks=st.lists(st.tuples(st.integers(0, 3), st.integers(5, 40), st.booleans()), min_size=2, max_size=6),
)
def test_tasks_side_by_side_promise_no_kind_of_memory_twice(
    tmp_path_factory: pytest.TempPathFactory,
    backings: list[str],
    total_gib: int,
    huge_gib: int,
    limit_gib: int | None,
    tasks: list[tuple[int, int, bool]],
) -> None:
    directory = tmp_path_factory.mktemp("host")
    vms = [make_backed_vm(n, 512, backing) for n, backing in enumerate(backings, 1)]
    for n, vm in enumerate(vms, 1):
        vm.number, vm.guest.available_bytes = n, 8 * GIB
    node = make_node(directory, *vms, total_mib=total_gib * 1024, free_hugepages=huge_gib * 512)
    root = directory / "host"
    write_nodes(root, total_gib // 2, total_gib - total_gib // 2)
    all_pages = huge_gib * 512
    write_hugepages(root, 2 * MIB, nr=all_pages, free=max(0, all_pages - 256 * backings.count(PAGES)), resv=0)
    for n in range(2):
        write_hugepages(
            root, 2 * MIB, of=f"sys/devices/system/node/node{n}/hugepages", nr=all_pages // 2, free=all_pages // 2
        )
    if limit_gib is not None:
        write(root, {f"sys/fs/cgroup/machine.slice/{scope(vms[0])}/memory.max": limit_gib * GIB})
    kinds = [(pages, frozenset(nodes)) for pages in (NORMAL_PAGES, 2 * MIB) for nodes in ((), (0,), (1,), (0, 1))]
    before = {kind: measure(vms, *kind) for kind in kinds}
    own = {kind: measure(vms[:1], NORMAL_PAGES, frozenset()) for kind in kinds[:1]}

    def plug(n: int, task: tuple[int, int, bool]) -> Any:
        which, blocks, is_both = task
        vm = vms[which % len(vms)]
        fields = {"cpuNum": 2} if is_both else {}
        command = "HotPlugCpuMemory" if is_both else "HotPlugMemory"
        return carry_out(
            node, command, f"t{n}", vmUuid=vm.name(), memorySize=blocks * 128 * MIB, affect="live", **fields
        )

    # One task of a VM at a time, those of several VMs side by side.
    by_vm = [[(n, task) for n, task in enumerate(tasks) if task[0] % len(vms) == which] for which in range(len(vms))]
    with ThreadPoolExecutor(len(vms)) as pool:
        replies = list(itertools.chain(*pool.map(lambda some: [plug(*one) for one in some], by_vm)))
    assert all(reply["errorCode"] != "INTERNAL_ERROR" for reply in replies), replies
    assert node.view_budget().host.reserved == 0
    node_gib = {0: total_gib // 2, 1: total_gib - total_gib // 2}
    for kind in kinds:
        pages, nodes = kind
        if nodes:
            huge = all_pages // 2 * 2 * MIB * len(nodes)
            most = huge if pages else sum(node_gib[one] for one in nodes) * GIB - huge
        else:
            most = all_pages * 2 * MIB if pages else (total_gib - huge_gib) * GIB
        assert measure(vms, *kind) <= max(most, before[kind]), (kind, replies)
    if limit_gib is not None:
        assert measure(vms[:1], NORMAL_PAGES, frozenset()) <= max(limit_gib * GIB, own[kinds[0]])
