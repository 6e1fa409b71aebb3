"""What the budget keeps of its last look: never more is promised for it, and a plug asks the same of any host."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.deviceevents import DeviceEvents
from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.vmevents import VmEvents
from kvmagent.model.command import Reservation
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Domain, Facts, Guest, Host, MemoryPool
from kvmagent.model.hostbudget import make_promise
from kvmagent.model.units import GIB, MIB
from tests.fakes.agent import carry_out, make_host, make_node
from tests.fakes.libvirt import FakeConnection, FakeDomain, qemu_error
from tests.unit.test_hostbudget import (
    STRICT,
    grow,
    make_backed_vm,
    make_vm,
    promised_of,
    scope,
    to,
    write,
    write_hugepages,
    write_nodes,
)
from tests.unit.test_hostbudget_odd import no_descriptors

PAGES = "<memoryBacking><hugepages><page size='2' unit='MiB'/></hugepages></memoryBacking>"
BACKINGS = ("", "", PAGES, STRICT.format("0"), STRICT.format("0-1"), PAGES + STRICT.format("1"))
#: How long what others do may stay unseen.
BOUND_S = 1.0


def observe(vm: FakeDomain) -> Facts:
    """What an observation of a VM has of its size."""
    live = None if vm.live is None else parse_definition(vm.XMLDesc(0))
    config = parse_definition(vm.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    domain = Domain(vm.name(), vm.UUIDString(), "off" if live is None else "running", live, config)
    return Facts(domain, Guest(), Host())


def measure(vm: FakeDomain) -> int:
    live = observe(vm).domain.live
    return make_promise("", "", live, default_page_bytes=2 * MIB).size_bytes if live else 0


class Hosts:
    """One host, seen by a budget that keeps its looks and by one that looks anew each time."""

    def __init__(self, directory: Path, backings: list[str]) -> None:
        self.root = make_host(directory, total_mib=12 * 1024)
        write_nodes(self.root, 4, 8)
        write_hugepages(self.root, 2 * MIB, nr=2048, free=1536, resv=0)
        self.vms = [make_backed_vm(n, 512, backing) for n, backing in enumerate(backings, 1)]
        partition = "sys/fs/cgroup/machine.slice/machine-test.slice"
        write(self.root, {f"{partition}/memory.max": 4 * GIB})
        for n, vm in enumerate(self.vms, 1):
            vm.number = n
            write(self.root, {f"{partition}/{scope(vm)}/memory.max": "max" if n % 2 else 3 * GIB})
        self.connection = FakeConnection(*self.vms)
        self.now_s = 100.0
        self.kept = self._make()
        self.reservations: dict[str, tuple[FakeDomain, Reservation]] = {}
        # What was observed and is not noted yet: the guest takes its time to answer.
        self.observed: list[tuple[Facts, int]] = []
        # By how much VMs grew without anybody telling, and when.
        self.untold: list[tuple[float, int]] = []

    def _make(self) -> Budget:
        return Budget(reserve_bytes=1 * GIB, host_root=self.root, clock=lambda: 0.0, monotonic=lambda: self.now_s)

    def look_anew(self) -> Budget:
        budget = self._make()
        for task, (vm, reservation) in self.reservations.items():
            budget.recall(task, vm.UUIDString(), reservation)
        return budget

    def is_known(self) -> bool:
        self.untold = [(at, size) for at, size in self.untold if self.now_s - at <= BOUND_S]
        return not self.untold

    def change(self, vm: FakeDomain, act: Callable[[], Any], *, told: str) -> None:
        before, begun, seen = measure(vm), self.kept.begin(), observe(vm)
        act()
        if told in ("event", "late"):
            self.kept.note_change(vm.UUIDString())
            if told == "late":
                self.kept.note(seen, begun)
        elif told == "observed":
            begun = self.kept.begin()
            self.kept.note(observe(vm), begun)
        else:
            self.untold.append((self.now_s, max(0, measure(vm) - before)))

    def reserve(self, task: str, vm: FakeDomain, size_mib: int) -> None:
        """One task of a VM at a time, which has just observed it."""
        if any(of is vm for of, _ in self.reservations.values()):
            return
        begun = self.kept.begin()
        self.kept.note(observe(vm), begun)
        wanted = to(size_mib * MIB, vcpus=size_mib // 256)
        said = [_ask(one, self.connection, task, vm.UUIDString(), wanted) for one in (self.kept, self.look_anew())]
        if self.is_known():
            assert said[0] == said[1]
        live = observe(vm).domain.live
        if said[0] is None and live is not None:
            own = make_promise("", "", live, default_page_bytes=2 * MIB)
            if own.grown_to(wanted) != own:
                self.reservations[task] = vm, wanted

    def check(self) -> None:
        anew = self.look_anew()
        for vm in self.vms:
            domain = observe(vm).domain
            kept, real = (self._look(budget, domain) for budget in (self.kept, anew))
            if self.is_known():
                assert kept == real
            elif vm.live is not None:
                slack = sum(size for _, size in self.untold)
                for kind, pool in real.items():
                    if kind in kept:
                        assert kept[kind].promised_bytes >= pool.promised_bytes - slack

    def _look(self, budget: Budget, domain: Domain) -> dict[Any, MemoryPool]:
        pools = budget.look(self.connection, domain)
        return {(pool.page_bytes, pool.nodes, pool.cgroup): pool for pool in pools}


def _ask(budget: Budget, connection: FakeConnection, *wanted: Any) -> tuple[str, Any] | None:
    try:
        budget.reserve(connection, *wanted)
    except AgentError as error:
        return error.message, error.details
    return None


@settings(max_examples=100, deadline=None)
@given(
    backings=st.lists(st.sampled_from(BACKINGS), min_size=1, max_size=5),
    events=st.lists(
        st.tuples(
            st.sampled_from(
                ["reserve", "reserve", "end", "fail", "size", "size", "power", "renumber nodes", "wait", "look", "note"]
            ),
            st.integers(0, 4),
            st.integers(1, 40),
            st.sampled_from(["event", "observed", "late", "untold"]),
        ),
        max_size=30,
    ),
)
@example(["", ""], [("power", 0, 1, "event"), ("power", 0, 1, "untold"), ("reserve", 0, 4, "event")])
def test_what_is_kept_promises_no_more_than_a_look_at_all_would(
    tmp_path_factory: pytest.TempPathFactory, backings: list[str], events: list[tuple[str, int, int, str]]
) -> None:
    host = Hosts(tmp_path_factory.mktemp("host"), backings)
    for n, (event, which, size, told) in enumerate(events):
        vm = host.vms[which % len(host.vms)]
        if event == "reserve":
            host.reserve(f"t{n}", vm, size * 128)
        elif event == "wait":
            host.now_s += size / 20
        elif event == "look":
            begun = host.kept.begin()
            host.observed.append((observe(vm), begun))
        elif event == "note" and host.observed:
            host.kept.note(*host.observed.pop(which % len(host.observed)))
        elif event in ("end", "fail") and host.reservations:
            task = next(iter(host.reservations))
            of, reservation = host.reservations.pop(task)
            if event == "end" and of.live is not None:
                mib = max(reservation.node_bytes[0] // MIB, int(of.live.findtext("memory")) // 1024)
                grow(of, mib)
                host.kept.note_change(of.UUIDString())
            if told == "observed":
                begun = host.kept.begin()
                host.kept.note(observe(of), begun)
            host.kept.release(task)
        elif event == "size" and vm.live is not None:
            host.change(vm, partial(grow, vm, size * 64), told=told)
        elif event == "power":
            host.change(vm, partial(vm.power_cycle, start=vm.live is None), told=told)
            for task in [one for one, (of, _) in host.reservations.items() if of is vm]:
                del host.reservations[task]
                host.kept.release(task)
        elif event == "renumber nodes" and vm.live is not None and told != "untold":
            for memory in vm.live.iterfind("./numatune/memory"):
                host.change(vm, partial(memory.set, "nodeset", "1"), told=told)
        host.check()


class CountingConnection(FakeConnection):
    """Counts what is asked of libvirt."""

    def __init__(self, *domains: FakeDomain) -> None:
        super().__init__(*domains)
        self.asked: Counter[str] = Counter()

    def listAllDomains(self, flags: int = 0) -> list[FakeDomain]:
        self.asked["listAllDomains"] += 1
        return super().listAllDomains(flags)

    def lookupByUUIDString(self, uuid: str) -> FakeDomain:
        self.asked["lookupByUUIDString"] += 1
        return super().lookupByUUIDString(uuid)


class CountingDomain(FakeDomain):
    def info(self) -> list[int]:
        self.connect().asked["info"] += 1  # type: ignore[attr-defined]
        return super().info()

    def XMLDesc(self, flags: int) -> str:
        self.connect().asked["XMLDesc"] += 1  # type: ignore[attr-defined]
        return super().XMLDesc(flags)


def count_calls(directory: Path, number: int) -> Counter[str]:
    """What three plugs ask, of two VMs, once all VMs were looked at."""
    first = make_vm(0, 512)
    xml, domains = first.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), []
    for n in range(number):
        domain = CountingDomain(xml.replace("vm0", f"vm{n}"))
        domain._uuid, domain.number = f"00000000-0000-0000-0000-{n:012}", n + 1
        domains.append(domain)
    connection = CountingConnection(*domains)
    now_s = [0.0]
    budget = Budget(overcommit=100.0, host_root=directory / "host", monotonic=lambda: now_s[0])
    node = make_node(directory, connection=connection, budget=budget)
    node.view_budget()
    connection.asked.clear()
    for n, (vm, size) in enumerate([(1, 1), (number - 1, 1), (1, 2)]):
        domains[vm].guest.available_bytes = 8 * GIB
        reply = carry_out(
            node, "HotPlugMemory", f"t{n}", vmUuid=f"vm{vm}", memorySize=(512 + size * 128) * MIB, affect="live"
        )
        assert reply["success"], reply
        node.release(f"t{n}")
    counted = Counter(connection.asked)
    now_s[0] += 2 * BOUND_S
    node.view_budget()
    assert connection.asked["info"] - counted["info"] == number, "then all are looked at again"
    return counted


def test_a_plug_asks_libvirt_as_often_where_a_thousand_vms_run_as_where_ten_do(tmp_path: Path) -> None:
    few, many = count_calls(tmp_path / "10", 10), count_calls(tmp_path / "1000", 1000)
    assert few == many
    assert not few["listAllDomains"]


def test_a_vm_that_is_observed_first_and_is_as_it_was_read_is_not_read_again(tmp_path: Path) -> None:
    """Else the first plug on each of many VMs would cost more than later ones."""
    vm = CountingDomain(make_vm(1, 512).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    connection = CountingConnection(vm)
    node = make_node(tmp_path, connection=connection, budget=Budget(host_root=tmp_path / "host", monotonic=lambda: 0.0))
    node.view_budget()
    connection.asked.clear()
    assert node.observe("vm1", frozenset({"memory", "budget"})).host.pools
    assert not connection.asked["lookupByUUIDString"]


def test_whoever_waited_for_a_slow_look_does_not_look_again(tmp_path: Path) -> None:
    """Else on a slow libvirt each task of many would read all VMs, one after the other."""
    now_s, asking = 100.0, threading.Semaphore(0)

    class SlowConnection(CountingConnection):
        def listAllDomains(self, flags: int = 0) -> list[FakeDomain]:
            nonlocal now_s
            if not self.asked["listAllDomains"]:
                for other in others:
                    other.start()
                for _ in others:
                    assert asking.acquire(timeout=60)
                now_s += 30
            return super().listAllDomains(flags)

    def tell_time() -> float:
        if threading.current_thread() in others:
            asking.release()
        return now_s

    vm = CountingDomain(make_vm(1, 512).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    connection = SlowConnection(vm)
    budget, domain = Budget(host_root=make_host(tmp_path), monotonic=tell_time), observe(vm).domain
    others = [threading.Thread(target=budget.look, args=(connection, domain), daemon=True) for _ in range(8)]
    budget.look(connection, domain)
    for other in others:
        other.join(60)
        assert not other.is_alive()
    assert connection.asked["listAllDomains"] == 1


def test_a_vm_counts_at_once_when_an_event_tells_of_it(tmp_path: Path) -> None:
    vm1, vm2 = make_vm(1, 512), make_vm(2, 2048)
    vm2.power_cycle(start=False)
    connection = FakeConnection(vm1, vm2)
    budget = Budget(host_root=make_host(tmp_path), monotonic=lambda: 0.0)
    DeviceEvents(on_event=budget.note_change).register(connection)
    VmEvents(lambda _event: None, hear=(budget.hear,)).register(connection)

    def tell(number: int, *about: Any) -> None:
        for wanted, callback in connection.callbacks.values():
            if wanted == number:
                callback(vm2, *about, None)

    without = promised_of(budget, connection)
    vm2.power_cycle()
    assert promised_of(budget, connection) == without, "nobody told yet"
    tell(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, libvirt.VIR_DOMAIN_EVENT_STARTED, 0)
    assert promised_of(budget, connection) == without + measure(vm2)
    grow(vm2, 1024)
    tell(libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, 1024 * 1024)
    assert promised_of(budget, connection) == without + measure(vm2)
    vm2.power_cycle(start=False)
    tell(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, libvirt.VIR_DOMAIN_EVENT_STOPPED, 0)
    assert promised_of(budget, connection) == without


def test_hugepages_that_a_task_has_plugged_are_not_those_of_others(tmp_path: Path) -> None:
    """While it goes on, they are in use already."""
    root = make_host(tmp_path, total_mib=16 * 1024)
    vms = [make_backed_vm(n, 1024, PAGES) for n in (1, 2)]
    write_hugepages(root, 2 * MIB, nr=3072, free=2048, resv=0)
    connection, budget = FakeConnection(*vms), Budget(host_root=root, monotonic=lambda: 0.0)
    budget.reserve(connection, "t1", vms[0].UUIDString(), to(3 * GIB))
    grow(vms[0], 3 * 1024)
    write_hugepages(root, 2 * MIB, nr=3072, free=1024, resv=0)
    with pytest.raises(AgentError):
        budget.reserve(connection, "t2", vms[1].UUIDString(), to(3 * GIB + 2 * MIB))
    budget.reserve(connection, "t2", vms[1].UUIDString(), to(3 * GIB))


def test_after_a_failed_look_all_vms_are_read(tmp_path: Path) -> None:
    class FailingConnection(FakeConnection):
        def lookupByUUIDString(self, uuid: str) -> FakeDomain:
            raise qemu_error(libvirt.VIR_ERR_INTERNAL_ERROR, "internal error: client socket is closed")

    vm1, vm2 = make_vm(1, 512), make_vm(2, 512)
    connection, budget = FakeConnection(vm1, vm2), Budget(host_root=make_host(tmp_path), monotonic=lambda: 0.0)
    promised_of(budget, connection)
    grow(vm1, 1024)
    budget.note_change(vm1.UUIDString())
    with pytest.raises(AgentError):
        budget.look(FailingConnection(vm1, vm2), observe(vm2).domain)
    assert promised_of(budget, connection) == measure(vm1) + measure(vm2)


class Hooked(FakeConnection):
    """Does something once all VMs are listed, before they are read on."""

    def __init__(self, *domains: FakeDomain) -> None:
        super().__init__(*domains)
        self.on_listed: Callable[[], object] = lambda: None

    def listAllDomains(self, flags: int = 0) -> list[FakeDomain]:
        listed = super().listAllDomains(flags)
        self.on_listed()
        return listed


def put_on(vm: FakeDomain, pages: str) -> None:
    """Have a VM in hugepages from now on, of the same size as before."""
    vm.live.append(etree.fromstring(pages))


def test_what_an_event_told_counts_after_a_look_that_failed_at_any_point(tmp_path: Path) -> None:
    """Also where the look read all VMs, and only then a file could not be opened."""
    started, changed = make_vm(1, 512), make_vm(2, 512)
    started.power_cycle(start=False)
    connection, now_s = Hooked(started, changed), [0.0]
    budget = Budget(host_root=make_host(tmp_path), monotonic=lambda: now_s[0])
    promised_of(budget, connection)
    started.power_cycle()
    put_on(changed, PAGES)
    for vm in (started, changed):
        budget.note_change(vm.UUIDString())
    now_s[0] += 2 * BOUND_S
    with ExitStack() as stack:
        connection.on_listed = lambda: stack.enter_context(no_descriptors())
        with pytest.raises(AgentError, match="Too many open files"):
            budget.look(connection, observe(started).domain)
    connection.on_listed = lambda: None
    host = budget.view(connection)
    assert host.promises.keys() == {started.UUIDString(), changed.UUIDString()}
    assert {part.page_bytes for part in host.promises[changed.UUIDString()].parts} == {2 * MIB}


def test_the_time_that_a_look_takes_counts(tmp_path: Path) -> None:
    """Else what changes while it reads would count later than a second after it."""
    vm = make_vm(1, 512)
    connection, now_s = Hooked(vm), [0.0]

    def pass_time() -> None:
        now_s[0] += 2 * BOUND_S

    budget = Budget(host_root=make_host(tmp_path), monotonic=lambda: now_s[0])
    promised_of(budget, connection)
    now_s[0] += 2 * BOUND_S
    connection.on_listed = pass_time
    budget.look(connection, observe(vm).domain)
    connection.on_listed = lambda: None
    grow(vm, 1024)
    (pool,) = budget.look(connection, observe(vm).domain)
    assert pool.promised_bytes == measure(vm)


def test_nothing_is_kept_of_a_vm_that_ended_before_it_was_read(tmp_path: Path) -> None:
    connection, now_s = FakeConnection(), [0.0]
    budget = Budget(host_root=make_host(tmp_path), monotonic=lambda: now_s[0])
    promised_of(budget, connection)
    for n in range(1, 10):
        begun = budget.begin()
        budget.note(observe(make_vm(n, 512)), begun)
        now_s[0] += 2 * BOUND_S
        promised_of(budget, connection)
        assert not budget._notes


def test_after_lost_events_a_vm_is_not_taken_for_an_earlier_run_of_the_same_number(tmp_path: Path) -> None:
    """A restarted libvirt counts from 1 again."""
    vm = make_vm(1, 512)
    connection, budget = FakeConnection(vm), Budget(host_root=make_host(tmp_path), monotonic=lambda: 0.0)
    promised_of(budget, connection)
    begun = budget.begin()
    before = observe(vm)
    vm.power_cycle()
    vm.number = 1
    put_on(vm, PAGES)
    budget.note_gap()
    budget.note(before, begun)
    parts = budget.view(connection).promises[vm.UUIDString()].parts
    assert {part.page_bytes for part in parts} == {2 * MIB}
