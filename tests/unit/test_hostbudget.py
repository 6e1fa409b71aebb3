"""The host's memory is promised once: by no plug of the agent's does what is promised exceed the budget."""

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.host import read_capacity
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.hostbudget import NORMAL_PAGES, HostCapacity, NodeCapacity, estimate_overhead
from kvmagent.model.units import GIB, MIB
from tests.fakes.agent import make_domain, make_host
from tests.fakes.libvirt import FakeConnection, FakeDomain
from tests.lab.domainxml import GuestSpec


def make_vm(n: int, memory_mib: int) -> FakeDomain:
    domain = make_domain(GuestSpec(name=f"vm{n}", memory_mib=memory_mib))
    domain._uuid = f"00000000-0000-0000-0000-{n:012}"
    return domain


def grow(domain: FakeDomain, size_mib: int) -> None:
    """Have a running VM at so much memory, as a plug does."""
    for name in ("memory", "currentMemory"):
        domain.live.find(name).text = str(size_mib * 1024)
    for cell in domain.live.iterfind("./cpu/numa/cell"):
        cell.set("memory", str(size_mib * 1024))
        cell.set("unit", "KiB")


def promised_of(budget: Budget, connection: FakeConnection) -> int:
    return budget.view(connection).host.promised


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_host(tmp_path, total_mib=16 * 1024)


def test_capacity_is_what_is_left_of_physical_memory(tmp_path: Path) -> None:
    root = make_host(tmp_path, total_mib=16 * 1024, free_hugepages=512, hugepage_mib=2)
    capacity = read_capacity(root, reserve_bytes=1 * GIB, overcommit=1.5)
    assert capacity.measure(NORMAL_PAGES, frozenset()) == int((16 - 9 - 1) * 1.5 * GIB)
    assert capacity.measure(2 * MIB, frozenset()) == 9 * GIB, "of hugepages no more can be promised than there are"
    assert capacity.measure(NORMAL_PAGES, frozenset({0})) == int(7 * 1.5 * GIB)
    limit = root / "sys/fs/cgroup/machine.slice/memory.max"
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{2 * GIB}\n")
    assert read_capacity(root, 1 * GIB, 1.5).measure(NORMAL_PAGES, frozenset()) == 2 * GIB
    limit.write_text("max\n")
    assert read_capacity(root, 1 * GIB, 1.5).limit_bytes is None


def test_nodes_are_counted_alone(tmp_path: Path) -> None:
    nodes = (NodeCapacity(0, 4 * GIB), NodeCapacity(1, 8 * GIB, {2 * MIB: 2 * GIB}))
    capacity = HostCapacity(12 * GIB, 1 * GIB, 1.0, hugepages={2 * MIB: 2 * GIB}, nodes=nodes)
    assert capacity.measure(NORMAL_PAGES, frozenset({1})) == 6 * GIB
    assert capacity.measure(2 * MIB, frozenset({0})) == 0
    assert capacity.measure(2 * MIB, frozenset({0, 1})) == 2 * GIB


def test_what_was_plugged_and_not_touched_counts(root: Path) -> None:
    """The host has as much available as before: a dimm takes nothing until its guest touches it."""
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(reserve_bytes=1 * GIB, host_root=root)
    for task, vm, size_mib in (("t1", vm1, 8 * 1024), ("t2", vm2, 4 * 1024)):
        budget.reserve(connection, task, vm.UUIDString(), size_mib * MIB)
        grow(vm, size_mib)
        budget.release(task)
    with pytest.raises(AgentError) as refused:
        budget.reserve(connection, "t3", vm2.UUIDString(), 8 * 1024 * MIB)
    error = refused.value
    assert error.code is Code.HOST_MEMORY_PROMISED
    assert error.details["most"] == [
        {"vm": "vm1", "promised": 8 * GIB + estimate_overhead(8 * GIB, 1)},
        {"vm": "vm2", "promised": 4 * GIB + estimate_overhead(4 * GIB, 1)},
    ]
    assert error.message == (
        "4104 MiB more of normal memory is requested; 12.2 GiB of 15 GiB is promised to running VMs and tasks, "
        "most to vm1 8280 MiB, vm2 4176 MiB"
    )


def test_tasks_side_by_side_see_each_other(root: Path) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(reserve_bytes=1 * GIB, host_root=root)
    budget.reserve(connection, "t1", vm1.UUIDString(), 8 * GIB)
    with pytest.raises(AgentError, match="of 15 GiB is promised"):
        budget.reserve(connection, "t2", vm2.UUIDString(), 8 * GIB)
    budget.release("t1")
    budget.reserve(connection, "t2", vm2.UUIDString(), 8 * GIB)


def test_a_plug_counts_once_while_it_goes_on(root: Path) -> None:
    vm = make_vm(1, 512)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    before = promised_of(budget, connection)
    budget.reserve(connection, "t1", vm.UUIDString(), 2 * GIB)
    reserved = promised_of(budget, connection)
    assert reserved == before + (2 * GIB - 512 * MIB) * 513 // 512
    grow(vm, 1024)
    assert budget.look(connection, vm.UUIDString())
    budget.release("t1")
    assert promised_of(budget, connection) == before + 512 * MIB * 513 // 512


def test_the_reservation_of_an_earlier_agent_s_task_is_taken_up(root: Path) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(reserve_bytes=1 * GIB, host_root=root)
    budget.recall("t1", vm1.UUIDString(), 12 * GIB)
    with pytest.raises(AgentError):
        budget.reserve(connection, "t2", vm2.UUIDString(), 4 * GIB)


def test_a_balloon_that_holds_memory_holds_it_for_the_host(root: Path) -> None:
    vm = make_vm(1, 4096)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    full = promised_of(budget, connection)
    vm.live.find("currentMemory").text = str(1024 * 1024)
    budget.release("none")
    assert promised_of(budget, connection) == full - 3 * GIB


def test_a_virtio_mem_device_counts_with_what_was_requested(root: Path) -> None:
    vm = make_vm(1, 512)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    before = promised_of(budget, connection)
    device = etree.fromstring(
        "<memory model='virtio-mem'><target><size unit='GiB'>8</size><node>0</node><block unit='MiB'>2</block>"
        "<requested unit='GiB'>2</requested><current unit='GiB'>1</current></target></memory>"
    )
    vm.live.find("devices").append(device)
    vm.live.find("memory").text = str((512 + 8 * 1024) * 1024)
    vm.live.find("currentMemory").text = str((512 + 1024) * 1024)
    budget.release("none")
    assert promised_of(budget, connection) == before + 2 * GIB + 2 * GIB // 512
    for size in device.iterfind("./target/requested"):
        size.text = "3"  # no number of libvirt's statistics shows it
    budget.release("none")
    assert promised_of(budget, connection) == before + 3 * GIB + 3 * GIB // 512


def test_a_host_that_is_over_its_budget_says_since_when(root: Path) -> None:
    vm = make_vm(1, 512)
    connection = FakeConnection(vm)
    clock = itertools.count(100.0)
    budget = Budget(reserve_bytes=1 * GIB, host_root=root, clock=lambda: next(clock))
    assert budget.view(connection).host.over_since is None
    grow(vm, 20 * 1024)
    budget.release("none")
    assert budget.view(connection).host.over_since == 100.0
    assert budget.view(connection).host.over_since == 100.0
    with pytest.raises(AgentError, match="of 15 GiB is promised"):
        budget.reserve(connection, "t1", vm.UUIDString(), 21 * GIB)
    budget.reserve(connection, "t2", vm.UUIDString(), 20 * GIB)  # what it has already is refused to nobody
    grow(vm, 512)
    budget.release("none")
    assert budget.view(connection).host.over_since is None


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 64),
    st.lists(st.integers(128, 4096), min_size=1, max_size=5),
    st.lists(
        st.tuples(st.sampled_from(["reserve", "plug", "fail", "restart"]), st.integers(0, 4), st.integers(0, 32)),
        max_size=30,
    ),
)
def test_no_plug_of_ours_exceeds_the_budget_and_no_reservation_outlives_its_task(
    tmp_path_factory: pytest.TempPathFactory, total_gib: int, sizes_mib: list[int], events: list[tuple[str, int, int]]
) -> None:
    root = make_host(tmp_path_factory.mktemp("host"), total_mib=total_gib * 1024)
    vms = [make_vm(n, size) for n, size in enumerate(sizes_mib)]
    connection = FakeConnection(*vms)
    budget, tasks = Budget(host_root=root), dict[str, tuple[FakeDomain, int]]()
    started_over = promised_of(budget, connection) > budget.view(connection).host.budget
    started_with = promised_of(budget, connection)
    for number, (event, which, size) in enumerate(events):
        vm, task = vms[which % len(vms)], next(iter(tasks), "")
        if event == "reserve":
            with contextlib.suppress(AgentError):
                budget.reserve(connection, f"t{number}", vm.UUIDString(), size * 512 * MIB)
                tasks[f"t{number}"] = (vm, size * 512)
        elif event == "restart":
            budget = Budget(host_root=root)
            for known, (of, mib) in tasks.items():
                budget.recall(known, of.UUIDString(), mib * MIB)
        elif task:
            of, mib = tasks.pop(task)
            have_mib = int(of.live.findtext("memory")) // 1024
            if event == "plug" and mib > have_mib:
                grow(of, mib)
            budget.release(task)
        view = budget.view(connection)
        assert view.host.promised <= max(view.host.budget, started_with)
        if started_over:
            assert view.host.promised == started_with, "a host that is over its budget promises no more"
    for task in tasks:
        budget.release(task)
    assert budget.view(connection).host.reserved == 0
