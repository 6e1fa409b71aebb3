"""The host's memory is promised once: by no plug of the agent's does what is promised exceed the budget."""

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.api.wire import decode_request, encode
from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.host import read_capacity
from kvmagent.model.command import Reservation
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.hostbudget import NORMAL_PAGES, HostCapacity, NodeCapacity, estimate_overhead
from kvmagent.model.units import GIB, MIB
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.journal import Task
from tests.fakes.agent import COMMANDS, FakeAgent, NoJournal, carry_out, make_domain, make_host, make_node
from tests.fakes.libvirt import FIRST_DIMM_BASE, FakeConnection, FakeDomain, qemu_error
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


def to(size_bytes: int, *, vcpus: int = 0, node: int = 0) -> Reservation:
    """What brings a VM of one NUMA node to so much memory."""
    return Reservation(node_bytes={node: size_bytes}, ballooned_bytes=0, vcpus=vcpus)


def promised_of(budget: Budget, connection: FakeConnection) -> int:
    return budget.view(connection).host.promised


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_host(tmp_path, total_mib=16 * 1024)


def test_capacity_is_what_is_left_of_physical_memory(tmp_path: Path) -> None:
    root = make_host(tmp_path, total_mib=16 * 1024, free_hugepages=512, hugepage_mib=2)
    capacity = read_capacity(root, reserve_bytes=1 * GIB, overcommit=1.5)
    size, made_of = capacity.measure(NORMAL_PAGES, frozenset())
    assert size == int((16 - 9 - 1) * 1.5 * GIB)
    assert made_of == "(16 GiB physical - 9 GiB in hugepages - 1 GiB reserve) x 1.5"
    assert capacity.measure(2 * MIB, frozenset())[0] == 9 * GIB, "of hugepages no more can be promised than there are"
    assert capacity.measure(NORMAL_PAGES, frozenset({0}))[0] == int(7 * 1.5 * GIB)
    limit = root / "sys/fs/cgroup/machine.slice/memory.max"
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{2 * GIB}\n")
    assert read_capacity(root, 1 * GIB, 1.5).measure(NORMAL_PAGES, frozenset()) == (
        2 * GIB,
        "the limit of machine.slice",
    )
    limit.write_text("max\n")
    assert read_capacity(root, 1 * GIB, 1.5).limit_bytes is None


def test_nodes_are_counted_alone(tmp_path: Path) -> None:
    nodes = (NodeCapacity(0, 4 * GIB), NodeCapacity(1, 8 * GIB, {2 * MIB: 2 * GIB}))
    capacity = HostCapacity(12 * GIB, 1 * GIB, 1.0, hugepages={2 * MIB: 2 * GIB}, nodes=nodes)
    assert capacity.measure(NORMAL_PAGES, frozenset({1}))[0] == 6 * GIB
    assert capacity.measure(2 * MIB, frozenset({0}))[0] == 0
    assert capacity.measure(2 * MIB, frozenset({0, 1}))[0] == 2 * GIB


def test_what_was_plugged_and_not_touched_counts(root: Path) -> None:
    """The host has as much available as before: a dimm takes nothing until its guest touches it."""
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(reserve_bytes=1 * GIB, host_root=root)
    for task, vm, size_mib in (("t1", vm1, 8 * 1024), ("t2", vm2, 4 * 1024)):
        budget.reserve(connection, task, vm.UUIDString(), to(size_mib * MIB))
        grow(vm, size_mib)
        budget.release(task)
    budget.view(connection)
    with pytest.raises(AgentError) as refused:
        budget.reserve(connection, "t3", vm2.UUIDString(), to(8 * 1024 * MIB))
    error = refused.value
    assert error.code is Code.HOST_MEMORY_PROMISED
    assert error.details["most"] == [
        {"vm": "vm1", "promised": 8 * GIB + estimate_overhead(8 * GIB, 1)},
        {"vm": "vm2", "promised": 4 * GIB + estimate_overhead(4 * GIB, 1)},
    ]
    assert error.message == (
        "4104 MiB more of normal memory is requested; 12.2 GiB of 15 GiB is promised to running VMs and tasks, "
        "most to vm1 8280 MiB, vm2 4176 MiB; 15 GiB is (16 GiB physical - 1 GiB reserve) x 1.0; "
        "guests could give back: vm1 3 GiB"
    )


def test_tasks_side_by_side_see_each_other(root: Path) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(reserve_bytes=1 * GIB, host_root=root)
    budget.reserve(connection, "t1", vm1.UUIDString(), to(8 * GIB))
    with pytest.raises(AgentError, match="of 15 GiB is promised"):
        budget.reserve(connection, "t2", vm2.UUIDString(), to(8 * GIB))
    budget.release("t1")
    budget.reserve(connection, "t2", vm2.UUIDString(), to(8 * GIB))


def test_a_plug_counts_once_while_it_goes_on(root: Path) -> None:
    vm = make_vm(1, 512)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    before = promised_of(budget, connection)
    budget.reserve(connection, "t1", vm.UUIDString(), to(2 * GIB))
    reserved = promised_of(budget, connection)
    assert reserved == before + (2 * GIB - 512 * MIB) * 513 // 512
    grow(vm, 1024)
    budget.note_change(vm.UUIDString())
    promised_of(budget, connection)
    budget.release("t1")
    assert promised_of(budget, connection) == before + 512 * MIB * 513 // 512


def test_the_reservation_of_an_earlier_agent_s_task_is_taken_up(root: Path) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(reserve_bytes=1 * GIB, host_root=root)
    budget.recall("t1", vm1.UUIDString(), to(12 * GIB))
    with pytest.raises(AgentError):
        budget.reserve(connection, "t2", vm2.UUIDString(), to(4 * GIB))


def test_a_balloon_that_holds_memory_holds_it_for_the_host(root: Path) -> None:
    vm = make_vm(1, 4096)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    full = promised_of(budget, connection)
    vm.live.find("currentMemory").text = str(1024 * 1024)
    budget.note_change(vm.UUIDString())
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
    budget.note_change(vm.UUIDString())
    assert promised_of(budget, connection) == before + 2 * GIB + 2 * GIB // 512
    for size in device.iterfind("./target/requested"):
        size.text = "3"  # no number of libvirt's statistics shows it
    budget.note_change(vm.UUIDString())
    assert promised_of(budget, connection) == before + 3 * GIB + 3 * GIB // 512


def test_a_host_that_is_over_its_budget_says_since_when(root: Path) -> None:
    vm = make_vm(1, 512)
    connection = FakeConnection(vm)
    clock = itertools.count(100.0)
    budget = Budget(reserve_bytes=1 * GIB, host_root=root, clock=lambda: next(clock))
    assert budget.view(connection).host.over_since is None
    grow(vm, 20 * 1024)
    budget.note_change(vm.UUIDString())
    assert budget.view(connection).host.over_since == 100.0
    assert budget.view(connection).host.over_since == 100.0
    with pytest.raises(AgentError, match=r"of 15 GiB is promised .*, above the budget since 1970-01-01 00:01 UTC;"):
        budget.reserve(connection, "t1", vm.UUIDString(), to(21 * GIB))
    budget.reserve(connection, "t2", vm.UUIDString(), to(20 * GIB))  # what it has already is refused to nobody
    grow(vm, 512)
    budget.note_change(vm.UUIDString())
    assert budget.view(connection).host.over_since is None


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def scope(vm: FakeDomain) -> str:
    return f"machine-qemu\\x2d{vm.ID()}\\x2d{vm.name()}.scope"


@pytest.mark.parametrize("at", ["", "/libvirt"])
def test_a_vm_grows_no_further_than_its_own_cgroup_may(root: Path, at: str) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    vm2.number = 2
    write(
        root,
        {
            f"sys/fs/cgroup/machine.slice/{scope(vm1)}{at}/memory.max": 2 * GIB,
            f"sys/fs/cgroup/machine.slice/{scope(vm2)}{at}/memory.max": "max",
        },
    )
    connection, budget = FakeConnection(vm1, vm2), Budget(host_root=root)
    with pytest.raises(AgentError, match=r"of 2 GiB is promised .*; 2 GiB is its memory.max") as refused:
        budget.reserve(connection, "t1", vm1.UUIDString(), to(2 * GIB))
    assert refused.value.code is Code.MEMORY_HARD_LIMIT
    assert scope(vm1) in refused.value.message
    budget.reserve(connection, "t1", vm1.UUIDString(), to(2 * GIB - estimate_overhead(2 * GIB, 1)))
    budget.reserve(connection, "t2", vm2.UUIDString(), to(2 * GIB))


def test_vms_of_one_partition_share_its_limit(root: Path) -> None:
    vms = [make_vm(n, 512) for n in (1, 2, 3)]
    partition = "sys/fs/cgroup/machine.slice/machine-test.slice"
    write(root, {f"{partition}/memory.max": 4 * GIB})
    for n, vm in enumerate(vms, 1):
        vm.number = n
        write(root, {f"{partition if n < 3 else 'sys/fs/cgroup/machine.slice'}/{scope(vm)}/memory.max": "max"})
    connection, budget = FakeConnection(*vms), Budget(host_root=root)
    budget.reserve(connection, "t1", vms[0].UUIDString(), to(2 * GIB))
    with pytest.raises(AgentError, match=r"machine-test.slice is requested"):
        budget.reserve(connection, "t2", vms[1].UUIDString(), to(2 * GIB))
    budget.reserve(connection, "t3", vms[2].UUIDString(), to(2 * GIB))


@pytest.mark.parametrize("broken", ["no XML", "libvirt's error"])
def test_a_vm_whose_definition_cannot_be_read_counts_with_what_libvirt_says_it_has(root: Path, broken: str) -> None:
    class BrokenDomain(FakeDomain):
        def XMLDesc(self, flags: int) -> str:
            if broken == "no XML":
                return "<domain"
            raise qemu_error(libvirt.VIR_ERR_INTERNAL_ERROR, "internal error: cannot format")

    vm1, vm2 = make_vm(1, 512), make_vm(2, 2048)
    vm2.__class__ = BrokenDomain
    connection, budget = FakeConnection(vm1, vm2), Budget(host_root=root)
    sizes = {one.name: one.size_bytes for one in budget.view(connection).promises.values()}
    assert sizes == {
        "vm1": 512 * MIB + estimate_overhead(512 * MIB, 1),
        "vm2": 2 * GIB + estimate_overhead(2 * GIB, 1),
    }
    with pytest.raises(AgentError):
        budget.reserve(connection, "t1", vm1.UUIDString(), to(14 * GIB))
    vm2.live = None
    budget.note_change(vm2.UUIDString())
    budget.reserve(connection, "t1", vm1.UUIDString(), to(14 * GIB))


class HangingConnection(FakeConnection):
    """Answers with what was so when it was asked, once it is let go."""

    def __init__(self, *domains: FakeDomain) -> None:
        super().__init__(*domains)
        self.asked, self.answers = threading.Event(), threading.Event()

    def listAllDomains(self, flags: int = 0) -> list[FakeDomain]:
        found = super().listAllDomains(flags)
        self.asked.set()
        assert self.answers.wait(60)
        return found

    def lookupByUUIDString(self, uuid: str) -> FakeDomain:
        found = super().lookupByUUIDString(uuid)
        self.asked.set()
        assert self.answers.wait(60)
        return found


@pytest.mark.parametrize("elapsed_s", [0.0, 10.0])
def test_a_libvirt_that_hangs_holds_up_no_task_s_end_and_what_ends_meanwhile_still_counts(
    root: Path, elapsed_s: float
) -> None:
    """Whether that VM alone is read or all are."""
    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    now_s = [0.0]
    budget = Budget(reserve_bytes=1 * GIB, host_root=root, monotonic=lambda: now_s[0])
    budget.reserve(FakeConnection(vm1, vm2), "t1", vm1.UUIDString(), to(8 * GIB))
    now_s[0] += elapsed_s
    budget.note_change(vm2.UUIDString())
    hanging = HangingConnection(vm1, vm2)
    with ThreadPoolExecutor(1) as pool:
        reserving = pool.submit(budget.reserve, hanging, "t2", vm2.UUIDString(), to(8 * GIB))
        try:
            assert hanging.asked.wait(60)
            grow(vm1, 8 * 1024)  # libvirt's answer is older
            budget.release("t1")
        finally:
            hanging.answers.set()
        assert isinstance(reserving.exception(60), AgentError)


def test_a_task_that_ends_between_libvirt_s_answer_and_its_use_counts_with_what_it_plugged(root: Path) -> None:
    class ReadAsTheTaskEnds(FakeDomain):
        def XMLDesc(self, flags: int) -> str:
            answer = super().XMLDesc(flags)
            if due:
                budget.release(due.pop())
            return answer

    due, now_s = list[str](), [0.0]
    vm = ReadAsTheTaskEnds(make_vm(1, 512).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    budget = Budget(host_root=root, monotonic=lambda: now_s[0])
    budget.reserve(FakeConnection(vm), "t1", vm.UUIDString(), to(8 * GIB))
    grow(vm, 8 * 1024)
    budget.note_change(vm.UUIDString())
    now_s[0] += 10.0
    due.append("t1")
    promised_of(budget, FakeConnection(vm))
    assert not due
    assert promised_of(budget, FakeConnection(vm)) == measure_anew(root, vm)


def measure_anew(root: Path, vm: FakeDomain) -> int:
    return promised_of(Budget(host_root=root), FakeConnection(vm))


def test_vcpus_count_with_what_qemu_needs_for_them(root: Path) -> None:
    vm = make_vm(1, 512)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    before = promised_of(budget, connection)
    budget.reserve(connection, "t1", vm.UUIDString(), to(0, vcpus=9))
    assert promised_of(budget, connection) == before + 8 * 8 * MIB
    with pytest.raises(AgentError):
        budget.reserve(connection, "t2", vm.UUIDString(), to(0, vcpus=4000))


def test_plugged_vcpus_count_after_their_task_has_ended(root: Path) -> None:
    vm = make_vm(1, 512)
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    before = promised_of(budget, connection)
    budget.reserve(connection, "t1", vm.UUIDString(), to(0, vcpus=4))
    vm.setVcpusFlags(4, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    budget.note_change(vm.UUIDString())
    budget.release("t1")
    assert promised_of(budget, connection) == before + 3 * 8 * MIB


def test_a_balloon_that_the_guest_may_empty_by_itself_holds_nothing_for_the_host(root: Path) -> None:
    vm = make_vm(1, 2048)
    vm.live.find("currentMemory").text = str(512 * 1024)
    connection = FakeConnection(vm)
    held = promised_of(Budget(host_root=root), connection)
    vm.live.find("./devices/memballoon").set("autodeflate", "on")
    budget = Budget(host_root=root)
    assert promised_of(budget, connection) == held + 1536 * MIB
    assert not budget.view(connection).promises[vm.UUIDString()].idle_bytes


HUGE_SIZES = (2 * MIB, 1 * GIB)


def make_backed_vm(n: int, memory_mib: int, backing: str, cells: int = 1) -> FakeDomain:
    spec = GuestSpec(name=f"vm{n}", memory_mib=memory_mib, numa_cells=cells, max_vcpus=4, domain_xml=backing)
    domain = make_domain(spec)
    domain._uuid = f"00000000-0000-0000-0000-{n:012}"
    return domain


def write_hugepages(root: Path, size: int, *, of: str = "sys/kernel/mm/hugepages", **counts: int) -> None:
    directory = f"{of}/hugepages-{size // 1024}kB"
    write(root, {f"{directory}/{name}_hugepages": count for name, count in counts.items()})


@pytest.mark.parametrize("size", HUGE_SIZES)
def test_hugepages_of_each_size_are_promised_once_and_not_those_that_others_use(root: Path, size: int) -> None:
    other = next(one for one in HUGE_SIZES if one != size)
    pages = "<memoryBacking><hugepages><page size='{}' unit='KiB'/></hugepages></memoryBacking>"
    vm1 = make_backed_vm(1, 1024, pages.format(size // 1024))
    vm2 = make_backed_vm(2, 1024, pages.format(other // 1024))
    # 6 GiB of each: one for each VM, of one kind a GiB that somebody else uses and one that is reserved by somebody.
    write_hugepages(root, size, nr=6 * GIB // size, free=4 * GIB // size, resv=1 * GIB // size)
    write_hugepages(root, other, nr=6 * GIB // other, free=5 * GIB // other, resv=0)
    connection, budget = FakeConnection(vm1, vm2), Budget(host_root=root)
    budget.reserve(connection, "t2", vm2.UUIDString(), to(6 * GIB))
    with pytest.raises(AgentError, match=r"hugepages of .*; 4 GiB is 6 GiB of such pages - 2 GiB that others use"):
        budget.reserve(connection, "t1", vm1.UUIDString(), to(5 * GIB))
    budget.reserve(connection, "t1", vm1.UUIDString(), to(4 * GIB))
    budget.reserve(connection, "t1", vm1.UUIDString(), to(4 * GIB))
    assert budget.view(connection).host.hugepages == 12 * GIB


STRICT = "<numatune><memory mode='strict' nodeset='{}'/></numatune>"


def write_nodes(root: Path, *sizes_gib: int) -> None:
    for node, size in enumerate(sizes_gib):
        write(root, {f"sys/devices/system/node/node{node}/meminfo": f"Node {node} MemTotal: {size * 1024 * 1024} kB"})


def test_vms_that_are_bound_to_nodes_leave_each_other_room_on_them(root: Path) -> None:
    """What is bound to two nodes has its place on either, until both are full."""
    write_nodes(root, 4, 4, 2)
    vm1, vm2, vm3 = (make_backed_vm(n, 512, STRICT.format(nodes)) for n, nodes in enumerate(["0-1", "1", "2"], 1))
    connection, budget = FakeConnection(vm1, vm2, vm3), Budget(host_root=root)
    budget.reserve(connection, "t1", vm1.UUIDString(), to(6 * GIB))
    with pytest.raises(AgentError, match="of host NUMA nodes 0-1 is requested"):
        budget.reserve(connection, "t2", vm2.UUIDString(), to(3 * GIB))
    budget.reserve(connection, "t2", vm2.UUIDString(), to(2 * GIB))
    with pytest.raises(AgentError, match="of host NUMA nodes 2 is requested"):
        budget.reserve(connection, "t3", vm3.UUIDString(), to(3 * GIB))


def test_memory_comes_from_where_its_guest_node_s_does(tmp_path: Path) -> None:
    """One guest node of hugepages, one of normal ones: a dimm for the first takes hugepages."""
    backing = "<memoryBacking><hugepages><page size='2' unit='MiB' nodeset='1'/></hugepages></memoryBacking>"
    vm = make_backed_vm(1, 512, backing, cells=2)
    node = make_node(tmp_path, vm, free_hugepages=2048)
    write_hugepages(tmp_path / "host", 2 * MIB, nr=128 + 128 + 64, free=192, resv=0)
    for of in (1, 0):
        reply = carry_out(node, "HotPlugMemory", f"t{of}", vmUuid="vm1", memorySize=1024 * MIB, node=of, method="dimm")
        if of:
            assert reply["errorCode"] == "HOST_MEMORY_PROMISED", reply
            assert "512 MiB more of hugepages of 2 MiB is requested; 256 MiB of 640 MiB" in reply["error"]
        else:
            assert reply["success"], reply


def test_a_balloon_that_grows_before_a_dimm_counts_once(tmp_path: Path) -> None:
    vm = make_vm(1, 2048)
    vm.live.find("currentMemory").text = str(1024 * 1024)
    overhead = estimate_overhead(3 * GIB, 1)
    node = make_node(tmp_path, vm, total_mib=(3 * GIB + overhead) // MIB)
    ready = carry_out(node, "ReadyForHotplug", vmUuid="vm1", affect="live")
    assert ready["headroom"]["memorySize"] == 1 * GIB
    reply = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=3 * GIB + 128 * MIB, affect="live")
    assert reply["errorCode"] == "HOST_MEMORY_PROMISED", reply
    reply = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=3 * GIB, affect="live")
    assert reply["success"], reply
    assert node.view_budget().host.promised == node.view_budget().host.budget


def test_memory_that_libvirt_does_not_know_counts(tmp_path: Path) -> None:
    vm = make_vm(1, 512)
    node = make_node(tmp_path, vm)
    before = node.view_budget().host.promised
    vm.unknown.append(
        {"id": "dimmua-x-0", "size": 1 * GIB, "slot": 3, "node": 0, "addr": FIRST_DIMM_BASE, "memdev": "/objects/m"}
    )
    carry_out(node, "ReadyForHotplug", vmUuid="vm1")
    assert node.view_budget().host.promised == before + 1 * GIB * 513 // 512


def test_a_reservation_lasts_as_long_as_its_task_is_in_the_journal(tmp_path: Path) -> None:
    """A task whose end cannot be written has not ended: it goes on once the journal is there again."""
    vm = make_vm(1, 512)
    node, journal = make_node(tmp_path, vm), UnwritableJournal()
    executor = Executor(node, journal, COMMANDS, on_finished=print, on_pending=print, libvirt_wait_s=0)  # type: ignore[arg-type]
    task = make_task()
    executor.run(task)
    assert node.view_budget().host.reserved == (2 * GIB - 512 * MIB) * 513 // 512
    journal.is_writable = True
    executor.run(task)
    assert node.view_budget().host.reserved == 0
    assert node.view_budget().host.promised == 2 * GIB + estimate_overhead(2 * GIB, 1)


def make_task(**fields: bytes) -> Task:
    """A plug of vm1 to 2 GiB."""
    request = encode(decode_request(b'{"vmUuid": "vm1", "memorySize": 2147483648}', COMMANDS["HotPlugMemory"].request))
    name = "HotPlugMemory"
    return Task(task_uuid="t1", command=name, lane="vm1", request=request, callback_url="", client="", **fields)


class UnwritableJournal(NoJournal):
    is_writable = False

    def record_goal(self, *args: object) -> None:
        if not self.is_writable:
            raise AgentError(Code.JOURNAL_UNAVAILABLE, "no space left on device")


@pytest.mark.parametrize("before", [b"null", b"{}"])
def test_what_was_reserved_is_known_after_a_restart_without_what_was_seen_before_it(
    tmp_path: Path, before: bytes
) -> None:
    """An earlier version may have written facts that this one cannot read."""
    agent, vm = FakeAgent(tmp_path, make_vm(1, 512)), make_vm(1, 512)
    done = agent.run("HotPlugMemory", vmUuid="vm1", memorySize=2 * GIB)
    agent.stop()
    node = make_node(tmp_path / "b", vm)
    executor = Executor(node, NoJournal(), COMMANDS, on_finished=print, on_pending=print, libvirt_wait_s=0)  # type: ignore[arg-type]
    task = make_task(goal=encode(done.goal), before=before)
    executor.recall(task)
    assert node.view_budget().host.reserved == (2 * GIB - 512 * MIB) * 513 // 512


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 8),
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["auto", "dimm", "virtio-mem", "balloon", "cpu"]),
            st.integers(1, 40),
            st.sampled_from(["", "", "attachDeviceFlags", "XMLDesc", "setMemoryFlags"]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_whatever_is_asked_of_whichever_vm_ready_says_what_happens_and_the_budget_holds(
    tmp_path_factory: pytest.TempPathFactory, total_gib: int, tasks: list[tuple[int, str, int, str]], deflates: bool
) -> None:
    vms = [make_vm(n, 512 * (n + 1)) for n in range(3)]
    for vm in vms:
        vm.guest.available_bytes = 8 * GIB
    vms[2].live.find("currentMemory").text = str(1024 * 1024)
    if deflates:
        vms[2].live.find("./devices/memballoon").set("autodeflate", "on")
    directory = tmp_path_factory.mktemp("host")
    node = make_node(directory, *vms, total_mib=total_gib * 1024)
    started = node.view_budget().host
    for n, (which, method, size, fails) in enumerate(tasks):
        vm = vms[which]
        wanted = {"cpuNum": min(4, size)} if method == "cpu" else {"memorySize": size * 128 * MIB}
        how = {} if method in ("cpu", "auto") else {"method": method}
        told = carry_out(node, "ReadyForHotplug", f"r{n}", vmUuid=vm.name(), affect="live", **wanted)
        if fails:
            vm.fail_next[fails] = qemu_error(libvirt.VIR_ERR_OPERATION_FAILED, "operation failed")
        command = "HotPlugCpu" if method == "cpu" else "HotPlugMemory"
        reply = carry_out(node, command, f"t{n}", vmUuid=vm.name(), affect="live", **wanted, **how)
        vm.fail_next.clear()
        if not how and not fails:
            assert told["ready"] == (reply["outcome"] != "refused"), (told, reply)
        node.release(f"t{n}")
        now = node.view_budget().host
        assert now.promised <= max(now.budget, started.promised)
        assert now.reserved == 0
        anew = Budget(host_root=directory / "host").view(vms[0].connect()).host
        assert now.promised == anew.promised, "what is kept of earlier looks is what a first look sees"


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
                budget.reserve(connection, f"t{number}", vm.UUIDString(), to(size * 512 * MIB))
                tasks[f"t{number}"] = (vm, size * 512)
        elif event == "restart":
            budget = Budget(host_root=root)
            for known, (of, mib) in tasks.items():
                budget.recall(known, of.UUIDString(), to(mib * MIB))
        elif task:
            of, mib = tasks.pop(task)
            have_mib = int(of.live.findtext("memory")) // 1024
            if event == "plug" and mib > have_mib:
                grow(of, mib)
                budget.note_change(of.UUIDString())
            budget.release(task)
        view = budget.view(connection)
        assert view.host.promised <= max(view.host.budget, started_with)
        if started_over:
            assert view.host.promised == started_with, "a host that is over its budget promises no more"
    for task in tasks:
        budget.release(task)
    assert budget.view(connection).host.reserved == 0
