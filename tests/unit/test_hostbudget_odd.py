"""VMs that nobody's test had in mind: what they may have, added up from what was written, not from what was read."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import MemoryDevice
from kvmagent.model.hostbudget import NORMAL_PAGES, Promise, estimate_overhead, make_promise
from kvmagent.model.units import GIB, KIB, MIB
from tests.fakes.agent import format_spec, make_host
from tests.fakes.libvirt import FakeConnection, FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.unit.test_hostbudget import STRICT, make_backed_vm, make_vm, scope, to, write, write_hugepages, write_nodes

PAGE = mmap.PAGESIZE // KIB
LOOSE = ("preferred", "interleave")
BOUND = ("strict", "restrictive")


def promise_of(vm: FakeDomain) -> Promise:
    live = parse_definition(vm.XMLDesc(0))
    return make_promise(vm.UUIDString(), vm.name(), live, default_page_bytes=2 * MIB)


@dataclass
class Odd:
    """A definition as it is written, and what the VM may have of which kind by the documents alone."""

    xml: str
    kinds: Counter[tuple[int, tuple[int, ...]]] = field(default_factory=Counter)


UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB}


def write_size(choose: random.Random, tag: str, size: int) -> str:
    unit = choose.choice([name for name, one in UNITS.items() if size % one == 0])
    return f"<{tag} unit='{unit}'>{size // UNITS[unit]}</{tag}>"


def make_odd(choose: random.Random) -> Odd:
    """A domain of one to four cells, tuned and backed by cell, with devices of all models."""
    odd, cells = Odd(""), choose.randint(0, 4)
    nodes = [tuple(sorted(choose.sample(range(4), choose.randint(1, 3)))) for _ in range(5)]
    mode = choose.choice([*BOUND, *LOOSE, ""])
    modes = {cell: choose.choice([*BOUND, *LOOSE, ""]) for cell in range(cells)}
    pages = {cell: choose.choice([None, None, 2 * MIB, GIB, mmap.PAGESIZE]) for cell in range(max(cells, 1))}
    others = choose.choice([None, 2 * MIB, GIB, mmap.PAGESIZE])

    def find_nodes(cell: int) -> tuple[int, ...]:
        if modes.get(cell):
            return nodes[cell] if modes[cell] in BOUND else ()
        return nodes[4] if mode in BOUND else ()

    def find_pages(cell: int) -> int:
        own = pages[cell] if pages[cell] is not None else others
        return 0 if own in (None, mmap.PAGESIZE) else own

    boot = [choose.randint(1, 8) * 256 * MIB for _ in range(max(cells, 1))]
    for cell, size in enumerate(boot):
        odd.kinds[find_pages(cell), find_nodes(cell)] += size
    devices, total, now = "", sum(boot), sum(boot)
    for number in range(choose.randint(0, 4)):
        model = choose.choice(["dimm", "dimm", "virtio-mem", "nvdimm", "virtio-pmem"])
        size, cell = choose.randint(1, 8) * 128 * MIB, choose.randrange(max(cells, 1))
        own_pages, own_nodes = (
            choose.choice([None, None, 2 * MIB, mmap.PAGESIZE]),
            choose.choice([(), (), (1,), (0, 3)]),
        )
        source = f"<pagesize unit='KiB'>{own_pages // KIB}</pagesize>" if own_pages else ""
        source += f"<nodemask>{','.join(map(str, own_nodes))}</nodemask>" if own_nodes else ""
        source = "<path>/dev/x</path>" if model in ("nvdimm", "virtio-pmem") else source
        target, promised = write_size(choose, "size", size), size
        if cells:
            target += f"<node>{cell}</node>"
        if model == "virtio-mem":
            asked, has = (choose.randint(0, size // (2 * MIB)) * 2 * MIB for _ in range(2))
            target += f"<block unit='KiB'>2048</block><requested unit='KiB'>{asked // KIB}</requested>"
            target += f"<current unit='KiB'>{has // KIB}</current>"
            promised, now = max(asked, has), now + has
        elif model == "dimm":
            now += size
        else:
            promised = 0
        total += size
        devices += f"<memory model='{model}'><source>{source}</source><target>{target}</target>"
        devices += f"<alias name='m{number}'/></memory>"
        is_loose = modes.get(cell) in LOOSE or (not modes.get(cell) and mode in LOOSE)
        of = find_pages(cell) if own_pages is None else own_pages if own_pages != mmap.PAGESIZE else 0
        odd.kinds[of, (own_nodes if not is_loose else ()) or find_nodes(cell)] += promised
    tuned = "".join(
        f"<memnode cellid='{cell}' mode='{one}' nodeset='{','.join(map(str, nodes[cell]))}'/>"
        for cell, one in modes.items()
        if one
    )
    tuned = f"<memory mode='{mode}' nodeset='{','.join(map(str, nodes[4]))}'/>{tuned}" if mode else tuned
    backed = "".join(
        f"<page size='{size // KIB}' unit='KiB' nodeset='{cell}'/>" for cell, size in pages.items() if size
    )
    backed += f"<page size='{others // KIB}' unit='KiB'/>" if others else ""
    backing = choose.choice(
        ["<source type='file'/>", "<source type='memfd'/><access mode='shared'/>", "<nosharepages/>"]
    )
    backing += f"<hugepages>{backed}</hugepages>" if backed else ""
    numa = "".join(
        f"<cell id='{cell}' cpus='{cell}' memory='{size // KIB}' unit='KiB'/>" for cell, size in enumerate(boot)
    )
    odd.xml = (
        "<domain type='kvm' id='7'><name>odd</name><uuid>00000000-0000-0000-0000-000000000001</uuid>"
        + write_size(choose, "memory", total)
        + (write_size(choose, "currentMemory", now) if choose.random() < 0.8 or now != total else "")
        + f"<vcpu>4</vcpu><memoryBacking>{backing}</memoryBacking><numatune>{tuned}</numatune>"
        + "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>"
        + (f"<cpu><numa>{numa}</numa></cpu>" if cells else "")
        + f"<devices>{devices}<memballoon model='virtio'/></devices></domain>"
    )
    odd.kinds = +odd.kinds
    return odd


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_each_part_of_a_vm_counts_where_its_definition_has_it_come_from(seed: int) -> None:
    odd = make_odd(random.Random(seed))
    live = parse_definition(odd.xml)
    promise = make_promise("", "", live, default_page_bytes=2 * MIB)
    kinds: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for claim in promise.claims[:-1]:
        kinds[claim.page_bytes, tuple(sorted(claim.nodes))] += claim.size_bytes
    assert +kinds == odd.kinds, odd.xml


@pytest.mark.parametrize(
    "pinned",
    [
        "<memoryBacking><locked/></memoryBacking>",
        "<launchSecurity type='sev'><policy>0x1</policy></launchSecurity>",
        "<hostdev mode='subsystem' type='pci'><source/></hostdev>",
        "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>",
    ],
)
def test_a_balloon_in_pinned_memory_holds_nothing_for_the_host(tmp_path: Path, pinned: str) -> None:
    """QEMU gives none of it back, so that it is neither free nor a remedy."""
    vm = make_vm(1, 4096)
    vm.live.find("currentMemory").text = str(1024 * 1024)
    element = etree.fromstring(pinned)
    (vm.live.find("devices") if element.tag in ("hostdev", "interface") else vm.live).append(element)
    assert promise_of(vm).size_bytes == 4 * GIB + estimate_overhead(4 * GIB, 1)
    promise = Budget(host_root=make_host(tmp_path)).view(FakeConnection(vm)).promises[vm.UUIDString()]
    assert not promise.idle_bytes


def test_a_vm_with_a_size_in_no_known_unit_fails_the_budget_of_no_other(tmp_path: Path) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 1024)
    for cell in vm2.live.iterfind("./cpu/numa/cell"):
        cell.set("unit", "PiB")
    budget = Budget(host_root=make_host(tmp_path))
    sizes = {one.name: one.parts[0].size_bytes for one in budget.view(FakeConnection(vm1, vm2)).promises.values()}
    assert sizes == {"vm1": 512 * MIB, "vm2": 1 * GIB}


def test_a_plug_is_backed_as_its_guest_node_beside_a_dimm_that_is_not(tmp_path: Path) -> None:
    root, vm = make_host(tmp_path, total_mib=8 * 1024), make_vm(1, 512)
    dimm = "<memory model='dimm'><source><pagesize unit='KiB'>2048</pagesize></source><target>"
    vm.live.find("devices").append(
        etree.fromstring(f"{dimm}<size unit='MiB'>512</size><node>0</node></target></memory>")
    )
    for name in ("memory", "currentMemory"):
        vm.live.find(name).text = str(1024 * 1024)
    write_hugepages(root, 2 * MIB, nr=256, free=0, resv=0)
    budget = Budget(host_root=root)
    budget.reserve(FakeConnection(vm), "t1", vm.UUIDString(), to(2 * GIB))
    with pytest.raises(AgentError, match="more of normal memory is requested"):
        budget.reserve(FakeConnection(vm), "t1", vm.UUIDString(), to(9 * GIB))


PAGES = "<memoryBacking><hugepages><page size='2' unit='MiB'/></hugepages></memoryBacking>"


@pytest.mark.parametrize(
    ("what", "backing", "remedy"),
    [
        ("memory", "", "raise host.memory_overcommit"),
        ("machine.slice", "", "machine.slice MemoryMax="),
        ("hugepages", PAGES, "vm.nr_hugepages"),
        ("node", STRICT.format("0"), "raise host.memory_overcommit"),
        ("memtune", "", "virsh memtune"),
        ("scope", "", "systemctl set-property"),
    ],
)
def test_the_remedy_is_for_what_ends_the_growth(tmp_path: Path, what: str, backing: str, remedy: str) -> None:
    """Followed, it lets the same plug in."""
    root, vm = make_host(tmp_path, total_mib=4 * 1024), make_backed_vm(1, 512, backing)
    write_nodes(root, 2 if what == "node" else 4)
    write_hugepages(root, 2 * MIB, nr=256 if backing == PAGES else 0, free=0, resv=0)
    group = f"sys/fs/cgroup/machine.slice/{scope(vm)}"
    limits = {"machine.slice": "sys/fs/cgroup/machine.slice", "memtune": f"{group}/libvirt", "scope": group}
    write(root, {f"{group}/libvirt/memory.max": "max"})
    if what in limits:
        write(root, {f"{limits[what]}/memory.max": 2 * GIB})
    size, connection, budget = (5 if what == "memory" else 3) * GIB, FakeConnection(vm), Budget(host_root=root)
    with pytest.raises(AgentError) as refused:
        budget.reserve(connection, "t1", vm.UUIDString(), to(size))
    assert remedy in refused.value.remedy
    if what in limits:
        write(root, {f"{limits[what]}/memory.max": "max"})
    elif what == "hugepages":
        write_hugepages(root, 2 * MIB, nr=1536, free=1280, resv=0)
    else:
        budget.set_ratios(reserve_bytes=0, overcommit=2.0)
    budget.note_change("")
    budget.reserve(connection, "t1", vm.UUIDString(), to(size))


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open nothing more, as under a storm of connections."""
    held, (soft, hard) = list[int](), resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as probe:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, highest + 8), hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(probe.fileno()))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in held:
                os.close(descriptor)


@pytest.mark.parametrize("what", ["memory", "limits"])
def test_a_host_that_cannot_be_read_now_has_neither_no_memory_nor_all_of_it(tmp_path: Path, what: str) -> None:
    """Its hugepages would be normal memory, its limits none, its memory nothing."""
    root, vm = make_host(tmp_path, total_mib=4 * 1024), make_vm(1, 512)
    write_hugepages(root, 2 * MIB, nr=1024, free=1024, resv=0)
    group = f"sys/fs/cgroup/machine.slice/{scope(vm)}"
    write(root, {f"{group}/memory.max": 1 * GIB if what == "limits" else "max"})
    connection, budget = FakeConnection(vm), Budget(host_root=root)
    wanted = to(1536 * MIB if what == "limits" else 3 * GIB)
    for _ in range(2):
        budget.note_change("")
        with no_descriptors(), pytest.raises(AgentError) as refused:
            budget.reserve(connection, "t1", vm.UUIDString(), wanted)
        assert "/proc or /sys cannot be read" in refused.value.message
        with pytest.raises(AgentError, match="is promised to running VMs") as refused:
            budget.reserve(connection, "t1", vm.UUIDString(), wanted)
        assert refused.value.details["capacity"] == (1 if what == "limits" else 2) * GIB
    (root / "proc/meminfo").write_text("MemFree: 12 kB\n")
    budget.note_change("")
    with pytest.raises(AgentError, match="has no MemTotal"):
        budget.reserve(connection, "t1", vm.UUIDString(), wanted)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_what_a_balloon_holds_leaves_room_nowhere_but_where_it_must_be(seed: int, part: float) -> None:
    """Wherever the held pages are, no kind of memory has less promised than what may be taken of it."""
    choose = random.Random(seed)
    live = parse_definition(make_odd(choose).xml)
    full = make_promise("", "", live, default_page_bytes=2 * MIB)
    sizes = [one.size_bytes for one in full.parts]
    held = int(sum(sizes) * part)
    promise = msgspec.structs.replace(full, ballooned_bytes=held)
    assert promise.size_bytes == full.size_bytes - held
    # One of all ways in which the parts may hold that much.
    left, real = held, list(full.parts)
    for n in choose.sample(range(len(real)), len(real)):
        taken = min(left, sizes[n])
        real[n] = msgspec.structs.replace(real[n], size_bytes=sizes[n] - taken)
        left -= taken
    own = full.claims[-1].size_bytes
    for pages in {one.page_bytes for one in real} | {NORMAL_PAGES}:
        for nodes in [frozenset(some) for count in range(5) for some in itertools.combinations(range(4), count)]:
            inside = [
                one.size_bytes
                for one in real
                if one.page_bytes == pages and (not nodes or (one.host_nodes and one.host_nodes <= nodes))
            ]
            needed = sum(inside) + (own if pages == NORMAL_PAGES and not nodes else 0)
            assert needed <= promise.measure(pages, nodes) <= full.measure(pages, nodes)


def test_a_vm_of_two_nodes_with_a_full_balloon_leaves_neither_to_another(tmp_path: Path) -> None:
    root = make_host(tmp_path, total_mib=32 * 1024)
    write_nodes(root, 4, 4)
    tuned = "".join(f"<memnode cellid='{n}' mode='strict' nodeset='{n}'/>" for n in range(2))
    vm1 = make_backed_vm(1, 6 * 1024, f"<numatune>{tuned}</numatune>", cells=2)
    vm1.live.find("currentMemory").text = str(3 * 1024 * 1024)
    vm2 = make_backed_vm(2, 512, STRICT.format("0"))
    vm2.number = 2
    budget = Budget(host_root=root)
    with pytest.raises(AgentError, match="of host NUMA nodes 0 is requested"):
        budget.reserve(FakeConnection(vm1, vm2), "t1", vm2.UUIDString(), to(2 * GIB))
    budget.reserve(FakeConnection(vm1, vm2), "t1", vm2.UUIDString(), to(1 * GIB))


def test_dimms_that_are_backed_alike_are_one_part_however_many_they_are() -> None:
    """Each look at the host counts the parts of all VMs."""
    spec = GuestSpec(name="vm1", memory_mib=512, max_memory_mib=16384, slots=64)
    definition = parse_definition(format_spec(spec, "qemu"))
    dimms = tuple(MemoryDevice(model="dimm", size_bytes=128 * MIB, node=0, alias=f"ua-{n}") for n in range(60))
    grown = msgspec.structs.replace(definition, devices=dimms)
    (part,) = make_promise("", "", grown, default_page_bytes=None).parts
    assert part.size_bytes == (512 + 60 * 128) * MIB
