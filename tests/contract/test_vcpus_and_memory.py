"""What the agent relies on of libvirt, held to by the tests' fake, libvirt's own test driver and the lab's libvirt.

Where the fake and the real thing part, these tests fail: the fake is mended, never the expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

from kvmagent.hypervisor.node import Node
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.steps import (
    AnyStep,
    AttachMemory,
    AttachVirtioMem,
    CellShape,
    DefineShape,
    DetachMemory,
    ForgetMemory,
    OnlineGuestMemory,
    OnlineGuestVcpus,
    ResizeVirtioMem,
    SetBalloon,
    SetCpuShares,
    SetVcpus,
    Shape,
)
from kvmagent_plugins.vm.vcpus import enabled_ids, leaving_ids, resized_ids
from tests.fakes.agent import MIB, carry_out, format_spec, make_domain, make_node, open_node
from tests.fakes.libvirt import libvirt_error, qemu_error
from tests.lab.domainxml import GuestSpec

NOTHING: frozenset[str] = frozenset()
BOTH = frozenset({"cpus", "memory"})

MakeNode = Callable[..., Node]


@pytest.fixture
def fake(tmp_path: Path) -> MakeNode:
    """Domains whose guest has not booted: it never answers."""

    def make(spec: GuestSpec, **options: Any) -> Node:
        domain = make_domain(spec, **options)
        domain.guest.unplugs = "not answering"
        return make_node(tmp_path, domain)

    return make


@pytest.fixture
def test_driver(tmp_path: Path) -> Iterator[MakeNode]:
    def make(spec: GuestSpec, *, running: bool = True) -> Node:
        state = "" if running else " xmlns:test='http://libvirt.org/schemas/domain/test/1.0'"
        xml = format_spec(spec, "test").replace("<domain ", f"<domain{state} ", 1)
        if not running:
            xml = xml.replace("</domain>", "<test:runstate>5</test:runstate></domain>")
        file = tmp_path / "node.xml"
        file.write_text(f"<node>{xml}</node>")
        return nodes.enter_context(open_node(f"test://{file}", tmp_path))

    with ExitStack() as nodes:
        yield make


@pytest.fixture
def lab_libvirt(lab: Any, define: Any, tmp_path: Path) -> Iterator[MakeNode]:
    """The lab's QEMU, its guest started but never run: what only libvirt and QEMU answer needs no guest."""

    def make(spec: GuestSpec, *, running: bool = True) -> Node:
        define(spec, running=running)
        return nodes.enter_context(open_node(lab.uri, tmp_path))

    with ExitStack() as nodes:
        yield make


ALL = ["fake", "test_driver", pytest.param("lab_libvirt", marks=pytest.mark.guest)]
QEMU = ["fake", pytest.param("lab_libvirt", marks=pytest.mark.guest)]


@pytest.fixture
def make(request: pytest.FixtureRequest) -> MakeNode:
    maker: MakeNode = request.getfixturevalue(request.param)
    return maker


def observe(node: Node) -> Facts:
    return node.observe("vm1", NOTHING)


def failure_of(node: Node, step: AnyStep) -> AgentError:
    before = observe(node).domain
    with pytest.raises(AgentError) as caught:
        node.perform("vm1", step)
    assert observe(node).domain == before
    return caught.value


def dimm(**changes: Any) -> AttachMemory:
    values = {"alias": "ua-kvmagent-a-0", "size_bytes": 128 * MIB, "node": 0, "live": True, "config": True}
    return AttachMemory(**(values | changes))


@pytest.mark.guest
def test_a_session_libvirt_has_no_cgroups_and_refuses_cpu_shares(lab_libvirt: MakeNode) -> None:
    error = failure_of(lab_libvirt(GuestSpec(name="vm1")), SetCpuShares(shares=2048, target="config"))
    assert (error.code, error.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, 84)
    assert "session mode" in error.message


def test_cpu_shares_of_a_definition_are_set_and_read(fake: MakeNode) -> None:
    """On the fake alone: the lab's libvirt is one of a session."""
    node = fake(GuestSpec(name="vm1"))
    assert observe(node).get_config().cpu_shares is None
    node.perform("vm1", SetCpuShares(shares=2048, target="config"))
    assert (observe(node).get_live().cpu_shares, observe(node).get_config().cpu_shares) == (None, 2048)


@pytest.mark.parametrize("make", ALL, indirect=True)
class TestVcpus:
    def test_reads_what_the_vm_has(self, make: MakeNode) -> None:
        facts = observe(make(GuestSpec(name="vm1", vcpus=2, memory_mib=300, numa_cells=2)))
        assert facts.domain.state in ("running", "paused")
        for definition in (facts.get_live(), facts.get_config()):
            assert (definition.vcpu_current, definition.vcpu_maximum) == (2, 4)
            assert definition.topology == (4, 1, 1, 1)
            assert definition.memory_bytes == definition.boot_bytes == 300 * MIB
            assert (definition.max_memory_bytes, definition.slots) == (4096 * MIB, 16)
            assert [sorted(cell.cpus) for cell in definition.cells] == [[0, 1], [2, 3]]
            assert definition.acpi
            assert definition.balloon
            assert definition.agent_channel

    def test_a_vm_is_found_by_name_and_by_uuid_with_or_without_dashes(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        (uuid,) = node.list_vms()
        for name in ("vm1", uuid, uuid.replace("-", "").upper()):
            assert node.observe(name, NOTHING).domain.uuid == uuid
        for unknown in ("vm2", "0" * 32, "vm1 "):
            with pytest.raises(AgentError) as caught:
                node.observe(unknown, NOTHING)
            assert caught.value.code is Code.VM_NOT_FOUND

    def test_live_and_persistent_counts_are_set_apart(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        node.perform("vm1", SetVcpus(count=3, target="live"))
        assert (observe(node).get_live().vcpu_current, observe(node).get_config().vcpu_current) == (3, 1)
        node.perform("vm1", SetVcpus(count=2, target="config"))
        assert (observe(node).get_live().vcpu_current, observe(node).get_config().vcpu_current) == (3, 2)

    @pytest.mark.parametrize("target", ["live", "config"])
    def test_more_than_the_maximum_is_refused(self, make: MakeNode, target: Any) -> None:
        error = failure_of(make(GuestSpec(name="vm1")), SetVcpus(count=5, target=target))
        assert (error.code, error.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, 8)

    def test_a_vm_that_is_off_takes_persistent_changes_alone(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"), running=False)
        assert observe(node).domain.state == "shutoff"
        assert observe(node).domain.live is None
        error = failure_of(node, SetVcpus(count=2, target="live"))
        assert (error.code, error.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, 55)
        node.perform("vm1", SetVcpus(count=2, target="config"))
        assert observe(node).get_config().vcpu_current == 2


@dataclass
class HalfWay:
    """A VM whose fourth vCPU QEMU refuses, as its id is taken; `ask` has libvirt's own domain do something."""

    node: Node
    ask: Callable[[Callable[[Any], Any]], Any]
    keep_from_saving: Callable[[bool], None]

    def ids(self) -> list[tuple[int, ...]]:
        facts = observe(self.node)
        return [enabled_ids(definition) for definition in (facts.get_live(), facts.get_config())]


@pytest.fixture
def fake_half_way(tmp_path: Path) -> HalfWay:
    domain = make_domain(GuestSpec(name="vm1", max_vcpus=6))
    domain.fail_next["vcpu3"] = qemu_error(1, "internal error: unable to execute QEMU command 'device_add': Duplicate")

    def keep_from_saving(keep: bool) -> None:
        error = libvirt_error(38, libvirt.VIR_FROM_NONE, "Failed to create file 'vm1.xml.new'")
        domain.fail_next = {"save": error} if keep else {}

    return HalfWay(make_node(tmp_path, domain), lambda question: question(domain), keep_from_saving)


@pytest.fixture
def lab_half_way(lab: Any, define: Any, tmp_path: Path) -> Iterator[HalfWay]:
    taken = ("-device", "virtio-rng-pci,id=vcpu3,bus=pcie.0,addr=0x1d")
    guest = define(GuestSpec(name="vm1", max_vcpus=6, qemu_args=taken))

    def ask(question: Callable[[Any], Any]) -> Any:
        with guest.domain() as domain:
            return question(domain)

    in_the_way = lab.directory / "c/libvirt/qemu/vm1.xml.new"

    def keep_from_saving(keep: bool) -> None:
        if in_the_way.exists():
            in_the_way.rmdir()
        if keep:
            in_the_way.mkdir()

    try:
        with open_node(lab.uri, tmp_path) as node:
            yield HalfWay(node, ask, keep_from_saving)
    finally:
        keep_from_saving(False)


@pytest.mark.parametrize("where", ["fake_half_way", pytest.param("lab_half_way", marks=pytest.mark.guest)])
class TestHalfWay:
    """What the way back of a plug that failed relies on: see plugins/vm/vcpus.py."""

    def test_a_plug_that_fails_leaves_what_it_plugged_before(self, where: str, request: pytest.FixtureRequest) -> None:
        vm: HalfWay = request.getfixturevalue(where)
        with pytest.raises(AgentError) as caught:
            vm.node.perform("vm1", SetVcpus(count=5, target="both"))
        assert (caught.value.code, caught.value.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, 1)
        assert vm.ids() == [(0, 1, 2), (0,)]
        assert leaving_ids(observe(vm.node).get_live(), 1) == {1, 2}

    def test_a_definition_that_cannot_be_saved_is_changed_in_libvirt_s_memory_and_can_be_changed_back_there(
        self, where: str, request: pytest.FixtureRequest
    ) -> None:
        vm: HalfWay = request.getfixturevalue(where)
        for count, target, ids in ((2, "both", [(0, 1), (0, 1)]), (1, "config", [(0, 1), (0,)])):
            vm.keep_from_saving(True)
            with pytest.raises(AgentError) as caught:
                vm.node.perform("vm1", SetVcpus(count=count, target=target))
            assert (caught.value.code, caught.value.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, 38)
            assert vm.ids() == ids

    def test_an_emulated_vm_keeps_its_vcpus_and_the_same_target_goes_on(
        self, where: str, request: pytest.FixtureRequest
    ) -> None:
        vm: HalfWay = request.getfixturevalue(where)
        vm.keep_from_saving(True)
        reply = carry_out(vm.node, "HotPlugCpu", vmUuid="vm1", cpuNum=3)
        assert (reply["outcome"], reply["errorCode"], reply["details"]) == (
            "partial",
            "LIBVIRT_REFUSED",
            {"undone": False},
        )
        assert vm.ids() == [(0, 1, 2), (0,)]
        vm.keep_from_saving(False)
        reply = carry_out(vm.node, "HotPlugCpu", vmUuid="vm1", cpuNum=3)
        assert (reply["success"], vm.ids()) == (True, [(0, 1, 2), (0, 1, 2)])

    def test_the_lowest_free_vcpus_come_and_the_highest_of_the_definition_leave(
        self, where: str, request: pytest.FixtureRequest
    ) -> None:
        vm: HalfWay = request.getfixturevalue(where)
        vm.ask(lambda domain: domain.setVcpu("2", 1, libvirt.VIR_DOMAIN_AFFECT_LIVE))
        vm.ask(lambda domain: domain.setVcpu("4", 1, libvirt.VIR_DOMAIN_AFFECT_CONFIG))
        assert vm.ids() == [(0, 2), (0, 4)]
        vm.node.perform("vm1", SetVcpus(count=3, target="both"))
        assert vm.ids() == [(0, 1, 2), (0, 1, 4)]
        assert [resized_ids(ids, 3) for ids in ((0, 2), (0, 4))] == vm.ids()
        vm.node.perform("vm1", SetVcpus(count=2, target="config"))
        assert vm.ids()[1] == resized_ids((0, 1, 4), 2) == (0, 1)


@pytest.mark.parametrize("make", QEMU, indirect=True)
class TestMemory:
    def test_a_dimm_is_there_live_and_persistent_under_its_alias(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        node.perform("vm1", dimm())
        facts = observe(node)
        for definition in (facts.get_live(), facts.get_config()):
            device = definition.find_device("ua-kvmagent-a-0")
            assert device is not None
            assert (device.model, device.size_bytes, device.node, device.slot) == ("dimm", 128 * MIB, 0, 0)
            assert (definition.boot_bytes, definition.memory_bytes) == (256 * MIB, 384 * MIB)
        assert facts.get_live().devices[0].base == 0x100000000
        assert facts.domain.balloon_bytes == 384 * MIB

    def test_an_alias_is_taken_once(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        node.perform("vm1", dimm(config=False))
        error = failure_of(node, dimm())
        assert (error.code, error.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, 67)
        node.perform("vm1", dimm(live=False))
        assert observe(node).get_config().find_device("ua-kvmagent-a-0") is not None

    def test_an_alias_may_hold_a_whole_task_id(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        alias = f"ua-kvmagent-{'x' * 62}-_-255"
        node.perform("vm1", dimm(alias=alias))
        assert observe(node).get_live().find_device(alias) is not None

    @pytest.mark.parametrize(
        ("spec", "step", "code"),
        [
            ({"max_memory_mib": 512}, dimm(size_bytes=512 * MIB), 67),
            ({"max_memory_mib": None}, dimm(), 67),
            ({}, dimm(node=3), 35),
            ({"acpi": False}, dimm(), 1),
            ({}, dimm(size_bytes=127 * MIB), 1),
        ],
    )
    def test_what_qemu_cannot_take_is_refused_and_changes_nothing(
        self, make: MakeNode, spec: dict[str, Any], step: AttachMemory, code: int
    ) -> None:
        error = failure_of(make(GuestSpec(name="vm1", **spec)), step)
        assert (error.code, error.details["libvirtCode"]) == (Code.LIBVIRT_REFUSED, code)

    def test_no_more_devices_than_slots(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1", slots=1))
        node.perform("vm1", dimm())
        error = failure_of(node, dimm(alias="ua-kvmagent-a-1"))
        assert error.details["libvirtCode"] == 67

    def test_the_balloon_is_no_larger_than_the_vm(self, make: MakeNode) -> None:
        error = failure_of(make(GuestSpec(name="vm1")), SetBalloon(size_bytes=512 * MIB, target="live"))
        assert error.details["libvirtCode"] == 8

    def test_without_a_balloon_there_is_no_size_to_set_or_to_read(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1", balloon=False))
        assert observe(node).domain.balloon_bytes is None
        assert failure_of(node, SetBalloon(size_bytes=128 * MIB, target="live")).details["libvirtCode"] == 55


VIRTIO_MEM = AttachVirtioMem(
    alias="ua-vm", size_bytes=1024 * MIB, block_bytes=2 * MIB, requested_bytes=0, node=0, live=True, config=True
)
SHAPE = Shape(
    vcpu_maximum=8,
    topology=(8, 1, 1, 1),
    max_memory_bytes=8192 * MIB,
    slots=32,
    cells=(CellShape(id=0, cpus=tuple(range(8)), memory_bytes=256 * MIB),),
)
PASSWORD = "<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1' passwd='s3cret'/>"


@pytest.mark.parametrize("make", QEMU, indirect=True)
class TestDevices:
    def test_a_virtio_mem_device_is_resized_in_each_definition(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        node.perform("vm1", VIRTIO_MEM)
        for target in ("live", "config"):
            step = ResizeVirtioMem(
                alias="ua-vm", node=0, size_bytes=1024 * MIB, requested_bytes=128 * MIB, target=target
            )
            node.perform("vm1", step)
        facts = observe(node)
        for definition in (facts.get_live(), facts.get_config()):
            (device,) = definition.virtio_mems
            assert (device.alias, device.size_bytes, device.block_bytes) == ("ua-vm", 1024 * MIB, 2 * MIB)
            assert device.requested_bytes == 128 * MIB
        step = ResizeVirtioMem(alias="ua-vm", node=0, size_bytes=1024 * MIB, requested_bytes=2048 * MIB, target="live")
        assert failure_of(node, step).details["libvirtCode"] == 35

    def test_a_dimm_leaves_the_persistent_definition_alone(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        node.perform("vm1", dimm())
        forget = ForgetMemory(alias="ua-kvmagent-a-0", slot=0, node=0, size_bytes=128 * MIB)
        node.perform("vm1", forget)
        facts = observe(node)
        assert (len(facts.get_live().devices), len(facts.get_config().devices)) == (1, 0)
        node.perform("vm1", forget)

    def test_a_dimm_that_the_guest_does_not_give_up_is_pending_in_both(self, make: MakeNode) -> None:
        node = make(GuestSpec(name="vm1"))
        node.perform("vm1", dimm())
        error = failure_of(node, DetachMemory(alias="ua-kvmagent-a-0", timeout_sec=0.5))
        assert error.code is Code.MEMORY_REMOVAL_PENDING

    def test_a_shape_is_taken_and_the_running_vm_is_not_touched(self, make: MakeNode, tmp_path: Path) -> None:
        node = make(GuestSpec(name="vm1", devices_xml=PASSWORD))
        live = observe(node).get_live()
        with node.open_vm("vm1") as vm:
            told = vm.preview(DefineShape(shape=SHAPE))
        assert "+" in told
        assert "s3cret" not in told
        assert node.perform("vm1", DefineShape(shape=SHAPE)) == told
        facts = observe(node)
        config = facts.get_config()
        assert (config.vcpu_maximum, config.topology, config.slots) == (8, (8, 1, 1, 1), 32)
        assert config.max_memory_bytes == 8192 * MIB
        assert facts.get_live() == live
        (former,) = (tmp_path / "former-xml").iterdir()
        assert former.stat().st_mode & 0o777 == 0o600
        assert "s3cret" in former.read_text()

    def test_a_shape_that_libvirt_finds_wrong_changes_nothing(self, make: MakeNode, tmp_path: Path) -> None:
        node = make(GuestSpec(name="vm1"))
        odd = msgspec.structs.replace(SHAPE, topology=(3, 1, 1, 1))
        error = failure_of(node, DefineShape(shape=odd))
        assert error.code is Code.DEFINITION_REFUSED
        assert list((tmp_path / "former-xml").iterdir()) == []


@pytest.fixture
def fake_guest(tmp_path: Path) -> tuple[Node, Any]:
    domain = make_domain(GuestSpec(name="vm1"))

    class Agent:
        def stop_agent(self) -> None:
            domain.guest.agent = "stopped"

        def hang_agent(self) -> None:
            domain.guest.agent = "hung"

    return make_node(tmp_path, domain), Agent()


@pytest.fixture
def lab_guest(lab: Any, boot: Any, tmp_path: Path) -> Iterator[tuple[Node, Any]]:
    guest = boot(GuestSpec(name="vm1"))
    with open_node(lab.uri, tmp_path) as node:
        yield node, guest


@pytest.mark.parametrize("pair", ["fake_guest", pytest.param("lab_guest", marks=pytest.mark.guest)])
def test_what_is_plugged_is_offline_in_the_guest_until_its_agent_brings_it_online(
    pair: str, request: pytest.FixtureRequest
) -> None:
    """One guest, one story: booting a real one costs too much for a test each."""
    node, guest = request.getfixturevalue(pair)
    first = node.observe("vm1", BOTH).guest
    assert first.silence is None
    assert [(cpu.id, cpu.online, cpu.can_offline) for cpu in first.vcpus] == [(0, True, False)]
    assert [(block.index, block.online) for block in first.blocks] == [(0, True), (1, True)]
    assert first.block_bytes == 128 * MIB

    node.perform("vm1", SetVcpus(count=2, target="live"))
    node.perform("vm1", dimm(config=False))
    plugged = _wait_listed(node)
    assert [(cpu.id, cpu.online) for cpu in plugged.vcpus] == [(0, True), (1, False)]
    assert [(block.index, block.online) for block in plugged.blocks] == [(0, True), (1, True), (32, False)]
    assert plugged.mem_total_bytes == first.mem_total_bytes

    node.perform("vm1", OnlineGuestVcpus(ids=(1,)))
    node.perform("vm1", OnlineGuestMemory(blocks=(32,)))
    online = node.observe("vm1", BOTH).guest
    assert all(item.online for item in (*online.vcpus, *online.blocks))
    assert online.mem_total_bytes - first.mem_total_bytes == 128 * MIB
    node.perform("vm1", OnlineGuestMemory(blocks=(32,)))  # a second time is no error
    with pytest.raises(AgentError) as caught:
        node.perform("vm1", OnlineGuestMemory(blocks=(999,)))
    assert caught.value.code is Code.GUEST_MEMORY_OFFLINE
    assert "not-found" in caught.value.message

    guest.hang_agent()
    hung = node.observe("vm1", BOTH)
    assert (hung.guest.silence, hung.fell_silent) == (Code.GUEST_AGENT_UNRESPONSIVE, True)
    if pair == "lab_guest":
        guest.resume_agent()
    guest.stop_agent()
    stopped = node.observe("vm1", BOTH)
    assert (stopped.guest.silence, stopped.fell_silent) == (Code.GUEST_AGENT_DISCONNECTED, True)


def _wait_listed(node: Node) -> Any:
    from tests.lab.processes import wait_for

    def listed() -> Any:
        guest = node.observe("vm1", BOTH).guest
        return guest if len(guest.vcpus) == 2 and len(guest.blocks) == 3 else None

    return wait_for(listed, timeout_s=20, what="the guest to list what was plugged")
